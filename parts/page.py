"""The page of sample.py --web: a prompt, the settings, and the text as it is written, with the
alternatives to each token, what the model looked at before it wrote it, and when it knew.

It is for the person at this computer. The server listens on 127.0.0.1 only, and answers only
requests with the token of its address, which other users of this machine do not have. It also
refuses what other pages in the same browser may send: requests under another host's name, or from
another origin.
(Through `ssh -L` it is the same page under the same name, on any port.) The page is page.html, one
file that loads nothing from any other host.
"""

if __name__ == "__main__":
    raise SystemExit("parts/page.py is no command: README.md lists the commands")

import json
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from parts import GPT
from parts.inference import Candidate, Record, Text, check_settings, complete, count_cut
from parts.json_files import parse_json
from parts.look import look, rate
from parts.metrics import pick_evenly, read_metrics, select, updates_done
from parts.pretrained import checkpoints
from parts.tokenizer import Tokenizer

HOST = "127.0.0.1"
CURVE_POINTS = 300  # at most, of the training loss and of the validation loss
HEADERS = {
    # The page may run its own script and style, and send requests to this server. Even if generated
    # text were taken for HTML, it could not send anything out.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    # The address has the token.
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

# What a request may hold: far more than the context of any GPT-2.
LONGEST_BODY = 1 << 20  # bytes
LONGEST = dict(prompt=200_000, stop=1_000, checkpoint=200)  # characters
MOST_TAKEN = 100_000  # tokens
# Requests at the same time; further ones wait until one of these is answered.
MOST_REQUESTS = 64
PATIENCE = 10  # seconds, for a client that connects and sends nothing, or does not read

# A function from the page's request to events, lines of JSON that it sends one by one. Raises
# ValueError if a value is wrong.
Answer = Callable[[dict], Generator[dict, None, None]]

# The page asks for three things, each an Answer; all requests have prompt (text), checkpoint (name)
# and taken (ids of tokens that the text has already).
#
# answer   Continue the text; the request also has the settings of sampling, and stop (text). The
#          first event is {"start", "context", "length", "prompt", "taken"}: the model reads the
#          tokens from number `start` of prompt and taken on, and at most `context` of them, and the
#          prompt has `length`; of the prompt's tokens that it reads, and of those taken, it has
#          {"id", "text"}, where the text is what can be shown from this token on. The other
#          events, one a token, are {"text": what can be shown now,
#           "tokens": [{"id", "token", "p", "likely": [{"id", "token", "p"}, ...]}]}.
# look     What the model saw before it wrote token number `end`; the request also has start and
#          end. One event: {"attention": of each layer, of each head, thousandths of the weight of
#          each token before; "guesses": [{"id", "token", "p"}] after each block;
#          "missing": sentences}.
# read     How likely the tokens from number start + 1 to end - 1 were; the request as for `look`.
#          One event: {"tokens": [{"id", "token", "p", "likely"}, ...]}.
ANSWERS = ("answer", "look", "read")

# With these the first text of a small model is better than with the terminal's.
FIRST_SETTINGS = dict(temperature=0.8, top_p=0.9)


# ---- The models, and their answers ---------------------------------------------------------------


class Shelf:
    """The models that the page can use: a run's checkpoints, one loaded at a time, or a single
    model.
    """

    def __init__(self, source: Path, model: GPT, packing: Any, open_model: Callable[[Path], Any]):
        """source: the folder that the model comes from. The model is packed already.

        packing: what packed it (auto.Packing), and packs the others.
        open_model: a function from a checkpoint's folder to what has its model as `.model`, in
        float32 on the CPU.
        """
        folder = source.resolve()
        self.run_folder = folder.parent
        self.is_run = folder in checkpoints(self.run_folder)
        self.title = self.run_folder.name if self.is_run else folder.name
        self.name = folder.name
        self.loaded: GPT | None = model  # of that name
        self.device = next(model.parameters()).device
        self.packing = packing
        self.open_model = open_model

    def list_checkpoints(self) -> list[str]:
        """Their names, oldest first. A run that still trains adds some, and deletes old ones."""
        if not self.is_run:
            return []
        return [folder.name for folder in checkpoints(self.run_folder)]

    def load(self, name: str) -> GPT:
        """The model of this name. Raises ValueError if it is not there, or damaged."""
        if name == self.name and self.loaded is not None:
            return self.loaded
        if name not in self.list_checkpoints():
            raise ValueError(f"there is no checkpoint {name} (any more); choose another")
        self.name = name
        self.loaded = None  # two models at once may need too much memory
        model = self.open_model(self.run_folder / name).model
        self.loaded = self.packing.pack(model.to(self.device))
        return self.loaded

    def progress(self) -> dict:
        """The checkpoints' names as "checkpoints", and "train" and "val": pairs (updates done, loss
        in nats a token).
        """
        records = []
        if self.is_run:
            records = read_metrics(self.run_folder / "metrics.jsonl")
        told: dict[str, list] = dict(checkpoints=self.list_checkpoints())
        for kind in ("train", "val"):
            known = [
                record for record in select(records, kind, "loss") if is_number(record["loss"])
            ]
            curve = pick_evenly(known, CURVE_POINTS)
            told[kind] = [(updates_done(record), record["loss"]) for record in curve]
        return told


def is_number(value: Any) -> bool:
    """Whether JSON has it: a number, but not NaN and not infinite."""
    return type(value) in (int, float) and math.isfinite(value)


def check_request(kind: str, body: bytes) -> dict:
    """The request in a body, with every value of the right kind and size: see ANSWERS.

    ValueError says which is not.
    """
    request = parse_json(body)
    checked: dict[str, Any] = {}
    names = ["prompt", "checkpoint"]
    if kind == "answer":
        checked = check_settings(request)
        names.append("stop")
    for name in names:
        text = request.get(name)
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a text")
        if len(text) > LONGEST[name]:
            raise ValueError(f"{name} must have at most {LONGEST[name]:,} characters")
        checked[name] = text
    taken = request.get("taken")
    if not isinstance(taken, list) or not all(type(token) is int for token in taken):
        raise ValueError("taken must be a list of the ids of tokens")
    if len(taken) > MOST_TAKEN:
        raise ValueError(f"taken must have at most {MOST_TAKEN:,} tokens")
    checked["taken"] = taken
    if kind != "answer":
        for name in ("start", "end"):
            if type(request.get(name)) is not int or request[name] < 0:
                raise ValueError(f"{name} must be the number of a token")
            checked[name] = request[name]
    return checked


def begin_text(tokenizer: Tokenizer, request: dict) -> Text:
    """The prompt as a text that continues. ValueError if the tokens taken are none of its own."""
    for token in request["taken"]:
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            raise ValueError("taken must be the ids of tokens")
    # Not the draws that gave the tokens taken.
    seed = request.get("seed", 0) + len(request["taken"])
    return Text(tokenizer, request["prompt"], seed, [request.get("stop", "")])


def answer(shelf: Shelf, tokenizer: Tokenizer, request: dict) -> Generator[dict, None, None]:
    """Continue the text: see ANSWERS."""
    settings = check_settings(request)
    model = shelf.load(request["checkpoint"])
    text = begin_text(tokenizer, request)
    taken = request["taken"]
    context = model.config.block_size
    n_ids = len(text.ids) + len(taken)
    start = count_cut(n_ids, context, settings["max_tokens"])
    shown_ids = text.ids[start:] if request["prompt"] else []
    pieces = Text(tokenizer, "", 0, []).append_given(shown_ids)
    yield dict(
        start=start,
        context=context,
        length=len(text.ids),
        prompt=with_ids(shown_ids, pieces),
        taken=with_ids(taken, text.append_given(taken)),
    )
    for [shown] in complete(model, [text], settings, logprobs=True, cut=True):
        tokens = [describe_record(record) for record in text.record]
        text.record.clear()
        yield dict(text=shown, tokens=tokens)


def with_ids(ids: list[int], pieces: list[str]) -> list[dict]:
    return [dict(id=token, text=piece) for token, piece in zip(ids, pieces)]


def describe_record(record: Record) -> dict:
    likely = [describe_candidate(candidate) for candidate in record.likely]
    return describe_candidate(record.token) | dict(likely=likely)


def describe_candidate(candidate: Candidate) -> dict:
    return dict(token=candidate.text, p=math.exp(candidate.logprob), id=candidate.id)


def tokens_in_place(model: GPT, text: Text, request: dict) -> list[int]:
    """The tokens from number start to number end, without this one; as many as the model reads."""
    ids = text.ids + request["taken"]
    start = request["start"]
    end = request["end"]
    if not start < end <= len(ids):
        raise ValueError(f"the text has no tokens from number {start} to {end}")
    return ids[start:end]


def look_at(shelf: Shelf, tokenizer: Tokenizer, request: dict) -> Generator[dict, None, None]:
    """What the model saw in a place: see ANSWERS."""
    model = shelf.load(request["checkpoint"])
    ids = tokens_in_place(model, begin_text(tokenizer, request), request)
    sight = look(model, ids[-model.config.block_size :])
    attention = []
    for weights in sight.attention:
        attention.append((1000 * weights).round().int().tolist())
    guesses = []
    for guess in sight.guesses:
        guesses.append(dict(id=guess.id, token=tokenizer.decode([guess.id]), p=guess.p))
    yield dict(attention=attention, guesses=guesses, missing=sight.missing)


def read_tokens(shelf: Shelf, tokenizer: Tokenizer, request: dict) -> Generator[dict, None, None]:
    """How likely the model found tokens that it has not written: see ANSWERS."""
    model = shelf.load(request["checkpoint"])
    text = begin_text(tokenizer, request)
    ids = tokens_in_place(model, text, request)[: model.config.block_size]
    records = []
    for token, logprobs in zip(ids[1:], rate(model, ids)):
        records.append(describe_record(text.make_record(token, logprobs)))
    yield dict(tokens=records)


# ---- The server ----------------------------------------------------------------------------------


class Desk:
    """Serves one request after another: the model writes one text at a time, and the next requests
    wait.
    """

    def __init__(self, answers: dict[str, Answer]):
        """answers: one for each of ANSWERS."""
        self.answers = answers
        self.turn = threading.Lock()
        self.is_closed = threading.Event()

    def lines(self, kind: str, request: dict) -> Iterator[str]:
        """The events of a kind of answer, a line of JSON each. When the reader leaves, this
        generator is closed, and the answer with it.
        """
        while not self.turn.acquire(timeout=0.5):
            yield line(waiting=True)  # fails if the reader has left
        try:
            with closing(self.answers[kind](request)) as events:
                for event in events:
                    yield line(**event)
                    if self.is_closed.is_set():
                        return
        except ValueError as error:
            yield line(error=str(error))
        except Exception as error:
            # A mistake in the program, or no memory left: the terminal gets the whole traceback.
            traceback.print_exc()
            yield line(error=f"{type(error).__name__}: {error}")
        finally:
            self.turn.release()

    def close(self) -> None:
        """End the running text at its next token; wait PATIENCE seconds for it, because a long
        prompt may take more.
        """
        self.is_closed.set()
        self.turn.acquire(timeout=PATIENCE)


def line(**event) -> str:
    return json.dumps(event, allow_nan=False) + "\n"


def make_app(desk: Desk, progress: Callable[[], dict], form: dict, token: str):
    """The Flask application. It serves the page, the values that fill its form, the progress of the
    run's training, and the answers, to requests with ?token= in their address.

    What it refuses is a line of JSON {"error": a sentence}, with a status of 400 or more.
    """
    from flask import Flask, Response, request
    from werkzeug.exceptions import HTTPException

    app = Flask("page", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LONGEST_BODY

    def refuse(status: int, sentence: str):
        if request.path == "/":  # a person reads it
            return Response(sentence + "\n", status, mimetype="text/plain")
        return Response(line(error=sentence), status, mimetype="application/json")

    @app.before_request
    def refuse_strangers():
        host = request.headers.get("Host", "")
        origin = request.headers.get("Origin")
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host):  # DNS rebinding
            return refuse(403, f"this page is http://{HOST} only")
        if origin not in (None, f"http://{host}"):
            return refuse(403, "the request comes from another site's page")
        # compare_digest takes as long for a token that is nearly right as for any other.
        if not secrets.compare_digest(request.args.get("token", "").encode(), token.encode()):
            return refuse(
                403,
                "the token is missing or old: open the address that sample.py --web printed "
                "(with what stands behind # in a link, to see that text)",
            )
        return None

    @app.errorhandler(HTTPException)
    def describe(error):
        return refuse(error.code or 500, f"{error.name}: {error.description}")

    @app.after_request
    def protect(response):
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def send_page():
        return Response(Path(__file__).with_name("page.html").read_bytes(), mimetype="text/html")

    @app.get("/form")
    def send_form():
        return form

    @app.get("/run")
    def send_progress():
        return progress()

    @app.post("/<any(answer, look, read):kind>")
    def send_answer(kind):
        # Before a byte of it is read.
        if request.content_length is None:
            return refuse(411, "the request must say its length")
        if request.content_length > LONGEST_BODY:
            return refuse(413, f"the request must have at most {LONGEST_BODY:,} bytes")
        try:
            wanted = check_request(kind, request.get_data(cache=False))
        except ValueError as error:
            return refuse(400, str(error))
        return Response(desk.lines(kind, wanted), mimetype="application/x-ndjson")

    return app


def serve(answers: dict[str, Answer], progress: Callable[[], dict], form: dict, port: int) -> None:
    """Serve the page until Ctrl-C, and end the process. Prints the page's address, which has the
    token. Port 0 is any free one.

    answers: one for each of ANSWERS. progress: see Shelf.progress. form: the values that the page's
    form begins with. Raises ValueError if the port cannot be had.
    """
    desk = Desk(answers)
    token = secrets.token_urlsafe(16)
    app = make_app(desk, progress, form, token)
    from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

    class Handler(WSGIRequestHandler):
        timeout = PATIENCE
        disable_nagle_algorithm = True  # a token is sent at once

        def log(self, type: str, message: str, *args) -> None:
            """Nothing: the terminal shows what goes wrong, and no list of requests."""

    class Server(ThreadedWSGIServer):
        places = threading.BoundedSemaphore(MOST_REQUESTS)

        def process_request(self, *request) -> None:
            self.places.acquire()
            try:
                super().process_request(*request)
            except RuntimeError:  # no memory for another thread
                self.places.release()
                self.shutdown_request(request[0])

        def process_request_thread(self, *request) -> None:
            try:
                super().process_request_thread(*request)
            finally:
                self.places.release()

    try:
        listener = socket.create_server((HOST, port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: {error} (try another, or 0 for any free one)") from None
    # A job in the background, such as one of nohup, starts with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with listener, suppress(KeyboardInterrupt):
        server = Server(HOST, port, app, handler=Handler, fd=listener.fileno())
        print(f"http://{HOST}:{listener.getsockname()[1]}/?token={token}", flush=True)
        server.serve_forever()
    with suppress(KeyboardInterrupt):  # again: it need not wait
        desk.close()
    # A request's thread may still be on its way out, or in the middle of torch. Python's own end
    # would unwind it, with a message of C++'s and a core dump.
    sys.stdout.flush()
    os._exit(0)
