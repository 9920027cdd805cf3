"""A page for sample.py --web: a prompt, the settings, and the text as it comes, each token with what else was likely.

It is for the person at this computer. The server listens on 127.0.0.1 only, and refuses what other pages in the same
browser may send there: requests under another host's name, or from another origin. (Through `ssh -L` it is the same
page under the same name, on whatever port.) The page is web.html, one file that asks nothing of any other host.
"""

import json
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

HOST = "127.0.0.1"
HEADERS = {
    # The page's own script and style, and requests to this server: should text ever become HTML, it can send nothing.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

# A request (prompt, stop, settings, checkpoint, taken: ids of tokens that the text has already) -> events. The first is
# {"taken": what each of those shows}, the others {"text": what can be shown now, "tokens": [{"id", "token", "p",
# "likely": [{"id", "token", "p"}, ...]}]}. ValueError if something is missing or wrong.
Answer = Callable[[dict], Generator[dict, None, None]]


class Desk:
    """Serves one request after another: the model writes one text at a time, and the next requests wait."""

    def __init__(self, answer: Answer):
        self.answer, self.turn, self.closed = answer, threading.Lock(), threading.Event()

    def lines(self, asked: dict) -> Iterator[str]:
        """The events, a line of JSON each. When the reader leaves, this generator is closed, and the answer with it."""
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
        """End the running text at its next token, because a thread must not be in the model when Python ends."""
        self.closed.set()
        self.turn.acquire(timeout=10)


def line(**event) -> str:
    return json.dumps(event, allow_nan=False) + "\n"


def make_app(answer: Answer, progress: Callable[[], dict], form: dict):
    """The Flask application: the page, what fills its form, how the run's training went, and the answers."""
    from flask import Flask, Response, abort, request

    app = Flask("web", static_folder=None)
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
        return Response(Path(__file__).with_name("web.html").read_bytes(), mimetype="text/html")

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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job, as with nohup, ignores Ctrl-C
    with listener, suppress(KeyboardInterrupt):
        server = make_server(HOST, port, app, threaded=True, request_handler=Handler, fd=listener.fileno())
        print(f"http://{HOST}:{listener.getsockname()[1]}", flush=True)
        server.serve_forever()
    app.desk.close()
