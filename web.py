"""A page for sample.py --web: a prompt, the settings, and the text as it comes, each token with what else was likely.

It is for the person at this computer. The server listens on 127.0.0.1 only, and turns away what other pages in the same
browser may send there: requests under another host's name, or from another origin. (Through `ssh -L` it is the same
page under the same name, on whatever port.) The page is web.html, one file that asks nothing of any other host.
"""

import json
import math
import re
import socket
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

HOST = "127.0.0.1"
FIELDS = {
    **dict(prompt=str, max_tokens=int, temperature=float, top_k=int, top_p=float, min_p=float),
    **dict(repetition_penalty=float, seed=int, stop=str),
}
CALLED = {str: "a text", int: "a whole number", float: "a number"}
MAX_BYTES = 4 << 20  # of a request: longer than any prompt
HEADERS = {
    # The page's own script and style, and requests to this server: should text ever become HTML, it can send nothing.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

# Settings -> events: {"text": what can be shown now, "tokens": what it came from, each with "token", "p" and "likely"}
Answer = Callable[[dict], Generator[dict, None, None]]


class Desk:
    """Serves one request after another: the model writes one text at a time, and who comes meanwhile waits."""

    def __init__(self, answer: Answer):
        self.answer, self.turn, self.closed = answer, threading.Lock(), threading.Event()

    def lines(self, settings: dict) -> Iterator[str]:
        """The events, a line of JSON each. When the reader leaves, this generator is closed, and the answer with it."""
        while not self.turn.acquire(timeout=0.5):
            yield line(waiting=True)  # which fails if the reader has left
            if self.closed.is_set():
                return
        try:
            with closing(self.answer(settings)) as events:
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
        """Let the text being written end at its next token, as a thread should not be in the model when Python ends."""
        self.closed.set()
        self.turn.acquire(timeout=10)


def line(**event) -> str:
    """An event as JSON on one line, errors as one line too."""
    if "error" in event:
        event["error"] = " ".join(event["error"].split())
    return json.dumps(event, allow_nan=False) + "\n"


def parse_settings(body: bytes) -> dict:
    """The request's settings, all of them, of the right types. Whether they are in range is for the answer to say."""
    try:
        settings = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON") from None
    if not isinstance(settings, dict) or set(settings) != set(FIELDS):
        raise ValueError(f"the request must be an object with exactly {', '.join(FIELDS)}")
    for name, kind in FIELDS.items():
        value = settings[name]
        if kind is float and type(value) is int and abs(value) < 2**53:
            settings[name] = value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{name}: it must be {CALLED[kind]}")
        if kind is str and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{name}: it has half a character (a lone surrogate)")
    return settings


def stranger(host: str, origin: str | None) -> str:
    """Why a request is not the page's own; nothing if it is."""
    if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host):
        return f"this page is http://{HOST} only"  # a name of someone's who has pointed it here
    if origin not in (None, f"http://{host}"):
        return "the request comes from another site's page"
    return ""


def make_app(answer: Answer, about: str, defaults: dict):
    """The Flask application: the page, what fills its form, and the answers."""
    try:
        from flask import Flask, Response, abort, request
        from werkzeug.exceptions import HTTPException
    except ImportError:
        raise ValueError("--web needs Flask: pip install flask==3.1.3") from None
    app = Flask("web", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    app.desk = desk = Desk(answer)

    @app.before_request
    def check():
        if why := stranger(request.headers.get("Host", ""), request.headers.get("Origin")):
            abort(403, why)

    @app.after_request
    def protect(response):
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def refuse(error):
        return Response(line(error=error.description), error.code, mimetype="application/x-ndjson")

    @app.get("/")
    def page():
        return Response(Path(__file__).with_name("web.html").read_bytes(), mimetype="text/html")

    @app.get("/form")
    def form():
        return dict(about=about, defaults=defaults)

    @app.post("/answer")
    def answer_one():
        try:
            settings = parse_settings(request.get_data())
        except ValueError as error:
            abort(400, str(error))
        return Response(desk.lines(settings), mimetype="application/x-ndjson")

    return app


def serve(answer: Answer, about: str, defaults: dict, port: int) -> None:
    """Until Ctrl-C. Port 0 is any free one."""
    app = make_app(answer, about, defaults)
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        timeout = 60  # for who connects and says nothing, or does not read
        disable_nagle_algorithm = True  # a token is sent when it is there

        def log(self, *_) -> None:
            pass

    try:
        listener = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "it must be at most 65535"
        raise ValueError(f"--port {port}: {reason}; try another, or 0 for any free one") from None
    with listener, suppress(KeyboardInterrupt):
        server = make_server(HOST, port, app, threaded=True, request_handler=Handler, fd=listener.fileno())
        print(f"http://{HOST}:{listener.getsockname()[1]}", flush=True)
        server.serve_forever()
    app.desk.close()
