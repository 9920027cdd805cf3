"""A page for sample.py --web: a prompt, the settings, and the text as it comes, each token with
what else was likely.

It is for the person at this computer. The server listens on 127.0.0.1 only, and refuses what other
pages in the same browser may send there: requests under another host's name, or from another
origin. (Through `ssh -L` it is the same page under the same name, on whatever port.) The page is
page.html, one file that asks nothing of any other host.
"""

import json
import math
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

from parts import GPT, inference, runtime
from parts.inference import Text, checked, complete
from parts.metrics import evenly, of_kind, read_metrics, updates
from parts.pretrained import checkpoints
from parts.tokenizer import Tokenizer

HOST = "127.0.0.1"
HEADERS = {
    # The page's own script and style, and requests to this server: should text ever become HTML, it
    # can send nothing.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

# A request (prompt, stop, settings, checkpoint, taken: ids of tokens that the text has already) ->
# events. The first is {"taken": what each of those shows}, the others {"text": what can be shown
# now, "tokens": [{"id", "token", "p", "likely": [{"id", "token", "p"}, ...]}]}. ValueError if
# something is missing or wrong.
Answer = Callable[[dict], Generator[dict, None, None]]


class Shelf:
    """The page's models: the checkpoints of a run, of which one at a time is open, or one model
    that is no run's.
    """

    def __init__(
        self, source: Path, model: GPT, machine: runtime.Runtime, open_model: Callable[[Path], GPT]
    ):
        folder = source.resolve()
        self.run_folder, self.is_run = folder.parent, folder in checkpoints(folder.parent)
        self.title = folder.parent.name if self.is_run else folder.name
        self.name, self.opened, self.machine, self.open_model = (
            folder.name,
            model,
            machine,
            open_model,
        )

    def names(self) -> list[str]:
        """Oldest first. A run that is still going adds checkpoints and deletes old ones."""
        return [folder.name for folder in checkpoints(self.run_folder)] if self.is_run else []

    def model(self, name: str) -> GPT:
        """The model of a name that `names` gave. ValueError if it is not there, or damaged."""
        if name != self.name or self.opened is None:
            if name not in self.names():
                raise ValueError(f"there is no checkpoint {name} (any more); choose another")
            self.name, self.opened = name, None  # two at once may need too much memory
            found = self.open_model(self.run_folder / name).to(self.machine.device)
            self.opened = inference.pack(found, self.machine.dtype)
        return self.opened

    def progress(self) -> dict:
        """The checkpoints' names, and the losses in nats a token as pairs (steps, loss), 300 at
        most.
        """
        records = read_metrics(self.run_folder / "metrics.jsonl") if self.is_run else []
        curves = {kind: evenly(of_kind(records, kind, "loss"), 300) for kind in ("train", "val")}
        pairs = {
            kind: [(updates(record), record["loss"]) for record in curve]
            for kind, curve in curves.items()
        }
        return dict(checkpoints=self.names(), **pairs)


def answer(shelf: Shelf, tokenizer: Tokenizer, asked: dict) -> Iterator[dict]:
    """The events of web.py: after each token, the text that can be shown, and the token with its
    probability.
    """
    settings, taken, model = checked(asked), asked["taken"], shelf.model(asked["checkpoint"])
    if not all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in taken):
        raise ValueError("taken must be the ids of tokens")
    text = Text(
        tokenizer, asked["prompt"], settings["seed"] + len(taken), [asked["stop"]]
    )  # other draws than before
    yield dict(taken=text.take(taken))
    for [new] in complete(model, [text], settings, logprobs=True, cut=True):
        tokens = [
            dict(
                token=token,
                p=math.exp(p),
                id=i,
                likely=[dict(token=t, p=math.exp(q), id=j) for t, q, j in likely],
            )
            for token, p, i, likely in text.record
        ]
        text.record.clear()
        yield dict(text=new, tokens=tokens)


class Desk:
    """Serves one request after another: the model writes one text at a time, and the next requests
    wait.
    """

    def __init__(self, answer: Answer):
        self.answer, self.turn, self.closed = answer, threading.Lock(), threading.Event()

    def lines(self, asked: dict) -> Iterator[str]:
        """The events, a line of JSON each. When the reader leaves, this generator is closed, and
        the answer with it.
        """
        while not self.turn.acquire(timeout=0.5):
            yield line(waiting=True)  # fails if the reader has left
        try:
            with closing(self.answer(asked)) as events:
                for event in events:
                    yield line(**event)
                    if self.closed.is_set():
                        return
        except ValueError as error:
            yield line(error=str(error))
        except Exception as error:  # a mistake in the program, or no memory left: all of it belongs on the terminal
            traceback.print_exc()
            yield line(error=f"{type(error).__name__}: {error}")
        finally:
            self.turn.release()

    def close(self) -> None:
        """End the running text at its next token, because a thread must not be in the model when
        Python ends.
        """
        self.closed.set()
        self.turn.acquire(timeout=10)


def line(**event) -> str:
    return json.dumps(event, allow_nan=False) + "\n"


def make_app(answer: Answer, progress: Callable[[], dict], form: dict):
    """The Flask application: the page, what fills its form, how the run's training went, and the
    answers.
    """
    from flask import Flask, Response, abort, request

    app = Flask("page", static_folder=None)
    app.desk = desk = Desk(answer)

    @app.before_request
    def refuse_strangers():
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host):  # DNS rebinding
            abort(403, f"this page is http://{HOST} only")
        if origin not in (None, f"http://{host}"):
            abort(403, "the request comes from another site's page")

    @app.after_request
    def protect(response):
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def page():
        return Response(Path(__file__).with_name("page.html").read_bytes(), mimetype="text/html")

    @app.get("/form")
    def fill():
        return form

    app.add_url_rule("/run", view_func=progress)

    @app.post("/answer")
    def answer_one():
        return Response(desk.lines(request.get_json(force=True)), mimetype="application/x-ndjson")

    return app


def serve(answer: Answer, progress: Callable[[], dict], form: dict, port: int) -> None:
    """Until Ctrl-C. Port 0 is any free one."""
    app = make_app(answer, progress, form)
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        timeout = 60  # seconds, for a client that connects and says nothing, or does not read
        disable_nagle_algorithm = True  # a token is sent at once
        log = staticmethod(lambda *_: None)

    try:
        listener = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: {error} (try another, or 0 for any free one)") from None
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job, as with nohup, ignores Ctrl-C
    with listener, suppress(KeyboardInterrupt):
        server = make_server(
            HOST, port, app, threaded=True, request_handler=Handler, fd=listener.fileno()
        )
        print(f"http://{HOST}:{listener.getsockname()[1]}", flush=True)
        server.serve_forever()
    app.desk.close()
