"""web.py and web.html: a page that shows what comes as it comes, to its own user only."""

import http.client
import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import clean_environment

import web

pytest.importorskip("flask")

ROOT = Path(__file__).parent.parent
SETTINGS = dict(prompt="x", max_tokens=9, temperature=1.0, top_k=50, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
SETTINGS |= dict(seed=1337, stop="")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# sample.py's part, in another process. The prompt says what comes; "closed" is printed when an answer ends.
SERVER = """
import json, signal, sys, time, web
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job, such as nohup make test
def token(text, p=0.3):
    likely = [[text, p], ["\\n", 0.25], [" <i>a</i>", 0.2], ["b", 0.1], ["\\t", 0.05]]
    return dict(token=text, p=p, likely=likely)
def answer(settings):
    try:
        if settings["temperature"] is None:  # an empty field
            raise ValueError("temperature must be a number")
        if settings["prompt"] == "html":
            text = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
            yield dict(text=text, tokens=[token(text)])
        if settings["prompt"] == "pieces":  # an emoji of three tokens, newlines, a held-back stop text
            yield dict(text=" \\N{LLAMA}", tokens=[token("\\ufffd")] * 3)
            yield dict(text="", tokens=[token("\\n\\n", 0.004)])
            yield dict(text="\\n\\ndef", tokens=[token("def", 0.9)])
            yield dict(text="", tokens=[token("STOP")])
            return
        while settings["prompt"] == "forever":
            yield dict(text=" word", tokens=[token(" word")])
            time.sleep(0.01)
        yield dict(text=" end", tokens=[token(" end")])
    finally:
        print("closed", flush=True)
web.serve(answer, "a <b>toy</b>", json.loads(sys.argv[1]), 0)
"""


def words(settings: dict):
    yield from (dict(text=text) for text in ("a", "b\u2028\n", "</script>"))


def client(answer=words):
    return web.make_app(answer, "a model", SETTINGS).test_client()


def post(client, **headers):
    return client.post("/answer", json=SETTINGS, headers=headers)


def parsed(response) -> list[dict]:
    return [json.loads(line) for line in response.get_data(as_text=True).splitlines()]


# ---- The application -------------------------------------------------------------------------------------------------


def test_the_page_what_fills_it_and_its_answers():
    got = []
    app = client(lambda settings: got.append(settings) or words(settings))
    page, answer, missing = app.get("/"), post(app), app.get("/web.py")
    assert (page.status_code, page.mimetype, missing.status_code) == (200, "text/html", 404)
    assert app.get("/form").json == dict(about="a model", defaults=SETTINGS)
    assert parsed(answer) == list(words({})) and got == [SETTINGS]
    assert answer.get_data().count(b"\n") == 3  # whatever line ends are in the text
    for response in (page, answer, missing):
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_errors_are_a_line_and_the_next_request_is_served(capfd):
    errors = [ValueError("top_p must be at most 1"), MemoryError("no room")]

    def answer(settings):
        yield dict(text="a")
        raise errors.pop(0)

    app = client(answer)
    assert parsed(post(app)) == [dict(text="a"), dict(error="top_p must be at most 1")]
    assert capfd.readouterr() == ("", "")
    assert parsed(post(app)) == [dict(text="a"), dict(error="MemoryError: no room")]
    assert "Traceback" in capfd.readouterr().err  # a mistake of the program's, for who can mend it
    assert "error" in parsed(post(client(lambda settings: (yield dict(text=float("nan"))))))[0]


@pytest.mark.parametrize(
    "host, origin, status",
    [
        ("127.0.0.1:8000", None, 200),
        ("localhost:9999", "http://localhost:9999", 200),  # through ssh -L
        ("127.0.0.1.evil.example", None, 403),
        ("127.0.0.1:8000", "http://127.0.0.1:3000", 403),
    ],
)
def test_only_the_page_itself_may_ask(host, origin, status):
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    for response in (post(client(), **headers), client().get("/form", headers=headers)):
        assert response.status_code == status


# ---- The server, in another process ----------------------------------------------------------------------------------


class Server:
    def __init__(self):
        command = [sys.executable, "-u", "-c", SERVER, json.dumps(SETTINGS)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), **pipes)
        self.lines = queue.Queue()
        threading.Thread(target=lambda: [self.lines.put(line) for line in self.process.stdout], daemon=True).start()
        self.url = self.line()
        self.port = int(self.url.rpartition(":")[2])

    def line(self) -> str:
        return self.lines.get(timeout=60).strip()

    def ask(self, prompt: str) -> tuple[socket.socket, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/answer", json.dumps({**SETTINGS, "prompt": prompt}))
        return connection.sock, connection.getresponse()

    def interrupt(self) -> None:
        """It ends as it should: nothing was logged, no traceback shown."""
        self.process.send_signal(signal.SIGINT)
        assert (self.process.wait(timeout=60), self.process.stderr.read()) == (0, "")


@pytest.fixture
def server():
    server = Server()
    try:
        yield server
        server.interrupt()
    finally:
        server.process.kill()


def test_it_listens_on_this_computer_only_and_says_where(server):
    assert server.url == f"http://127.0.0.1:{server.port}"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.port))  # where a server on 0.0.0.0 listens too
    for port in (server.port, 70000):
        with pytest.raises(ValueError, match=rf"^--port {port}: .* 0 for any free one\)$"):
            web.serve(words, "a model", SETTINGS, port)


def test_the_answer_ends_when_the_connection_does_and_with_control_c(server):
    for how in ("orderly", "abruptly"):
        connection, response = server.ask("forever")
        assert json.loads(response.readline())["text"] == " word"
        if how == "abruptly":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        response.close()
        connection.close()
        assert server.line() == "closed"
    assert json.loads(server.ask("x")[1].readline())["text"] == " end"
    assert server.line() == "closed"
    _, response = server.ask("forever")
    response.readline()
    server.interrupt()
    assert server.line() == "closed"


def test_a_second_connection_waits(server):
    connection, first = server.ask("forever")
    first.readline()
    (leaving, second), (_, third) = server.ask("x"), server.ask("x")
    assert json.loads(second.readline()) == json.loads(third.readline()) == dict(waiting=True)
    second.close()  # who leaves the queue takes nothing along
    leaving.close()
    assert json.loads(first.readline())["text"] == " word"
    first.close()
    connection.close()
    events = [json.loads(line) for line in third.read().splitlines()]
    assert [event["text"] for event in events if "text" in event] == [" end"]


# ---- The page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, opened; at the end, nothing went wrong in it, and it asked this server only."""
    context = browser.new_context(viewport=dict(width=900, height=700))
    page, asked, wrong = context.new_page(), [], []
    context.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#generate:enabled")
    yield page
    assert not wrong
    assert asked and all(url.startswith((f"{server.url}/", "data:")) for url in asked)
    context.close()


def ask(page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()


def status(page, text: str) -> None:
    page.wait_for_function("text => document.getElementById('status').textContent === text", arg=text)


def test_text_streams_and_stops(page, server):
    assert page.locator("#about").text_content() == "a <b>toy</b>"
    ask(page, "forever")
    page.wait_for_selector(".token:nth-child(20)")  # of a text without end: it is shown as it comes
    assert "tokens/s" in page.locator("#rate").text_content()
    assert page.get_by_role("button", name="Generate").is_disabled()
    page.get_by_role("button", name="Stop").click()
    status(page, "Stopped.")
    assert server.line() == "closed"
    n = page.locator(".token").count()
    assert page.locator("#out").text_content() == "forever" + n * " word"
    assert page.locator("#out .prompt").text_content() == "forever"
    page.get_by_role("button", name="Continue").click()
    assert page.get_by_label("Prompt").input_value() == "forever" + n * " word"


def test_keys(page, server):
    page.get_by_label("Prompt").fill("forever")
    page.get_by_label("Prompt").press("Control+Enter")
    page.wait_for_selector(".token:nth-child(4)")
    page.keyboard.press("Escape")
    status(page, "Stopped.")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[1]")
    assert page.get_by_role("tooltip").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_what_else_was_likely(page):
    ask(page, "pieces")
    status(page, "Done.")
    tokens = page.locator(".token")
    assert tokens.all_text_contents() == [" \N{LLAMA}", "\n\n", "def", "∎"]
    page.locator(".token", has_text="def").hover()
    bars = page.locator("#tip .bar:not(.head)")
    assert bars.count() == 5 and page.locator("#tip .head").inner_text().split() == ["def", "90%"]
    shown = [row.split() for row in bars.all_inner_texts()]
    assert shown == [["def", "90%"], ["⏎", "25%"], ["·<i>a</i>", "20%"], ["b", "10%"], ["⇥", "5%"]]
    widths = [page.locator("#tip .bar:not(.head) .fill").nth(i).bounding_box()["width"] for i in range(5)]
    assert widths == sorted(widths, reverse=True)
    tokens.first.hover()  # a character of three tokens
    assert page.locator("#tip .head").count() == 3 and bars.count() == 15
    page.get_by_role("button", name="Continue").click()
    assert page.get_by_label("Prompt").input_value() == "pieces \N{LLAMA}\n\ndef"  # without the mark of the end
    assert page.locator("#tip").is_hidden()
    assert [tokens.nth(i).get_attribute("class").split()[1] for i in range(3)] == ["heat2", "heat3", "heat0"]


def test_text_is_never_html(page):
    ask(page, "html")
    status(page, "Done.")
    assert page.locator("#out").text_content().startswith("html<script>window.broken = 1</script><img")
    page.locator(".token").first.hover()
    assert "<script>" in page.locator("#tip").text_content()
    assert page.locator("#out script, #out img, #tip script, #tip i, #about b").count() == 0
    assert page.evaluate("window.broken") is None


def test_errors_are_shown(page):
    for temperature, says in (("", "temperature must be a number"), ("1", "Done.")):
        page.get_by_label("Temperature").fill(temperature)
        ask(page, "x")
        status(page, says)
