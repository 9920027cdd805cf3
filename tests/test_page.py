"""parts/page.py and page.html: a page that shows text as it is written, to its own user only."""

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

from parts import page as page_part

import pytest
from conftest import clean_environment

pytest.importorskip("flask")

ROOT = Path(__file__).parent.parent
SETTINGS = dict(
    max_tokens=9, temperature=1.0, top_k=50, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1337
)
REQUEST = SETTINGS | dict(prompt="x", stop="", checkpoint="step_0000300", taken=[])
LIMITS = dict.fromkeys(SETTINGS, (0, 2**62)) | dict(
    max_tokens=(1, 2**62), top_p=(0, 1), min_p=(0, 1)
)
FORM = dict(
    about="a <b>toy</b>",
    settings=SETTINGS,
    limits=LIMITS,
    prompts=["import os", "x"],
    stop=[],
    pinned=False,
)
FORM |= dict(end_of_text=0, title="small", checkpoint="step_0000300")
RUN = dict(checkpoints=["step_0000100", "step_0000200", "step_0000300"])
RUN |= dict(
    train=[(step, 4 - step / 100) for step in range(0, 301, 10)],
    val=[(0, 4.25), (100, 3.25), (300, 1.25)],
)
WRITTEN = ".token:not(.prompt)"  # the tokens behind the prompt
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# In place of sample.py, in another process. The prompt decides the answer; "closed" is printed when
# an answer ends. A prompt of digits is continued by counting modulo 10, with tokens whose ids are
# their digits plus 1; 0 is the end of text.
SERVER = """
import atexit, json, pathlib, signal, sys, time
from parts import page
page.PATIENCE = 3  # seconds
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job, such as nohup make test
def token(text, p=0.3, id=1):
    likely = [(text, p, id), ("\\n", 0.25, 11), (" <i>a</i>", 0.2, 12), ("b", 0.1, 13)]
    likely.append(("\\t", 0.05, 14))
    return dict(token=text, p=p, id=id, likely=[dict(token=t, p=q, id=i) for t, q, i in likely])
def digit(n):
    p = [0.5 if d == n else 0.05 for d in range(10)]
    order = sorted(range(10), key=lambda d: -p[d])
    likely = [dict(token=str(d), p=p[d], id=d + 1) for d in order[:4]]
    return dict(token=str(n), p=p[n], id=n + 1, likely=[*likely, dict(token="", p=0.04, id=0)])
def begin(request):
    # A token for each character of the prompt, whose id is its code; 5 of them are the context.
    prompt = request["prompt"]
    start = max(0, len(prompt) - 5) if prompt.startswith("long") else 0
    pieces = [dict(id=ord(letter), text=letter) for letter in prompt[start:]]
    taken = [dict(id=i, text="" if i == 0 else str(i - 1)) for i in request["taken"]]
    context = 5 if prompt.startswith("long") else 1000
    facts = dict(start=start, context=context, length=len(prompt))
    return dict(**facts, prompt=pieces, taken=taken)
def look(request):
    # Two layers of two heads, which look at the first token only, and at all alike.
    n = request["end"] - request["start"]
    first = [1000] + [0] * (n - 1)
    alike = [1000 // n] * n
    guesses = [dict(id=3, token="2", p=0.1), dict(id=3, token="2", p=0.2)]
    guesses.append(dict(id=5, token="4", p=0.5))
    if request["prompt"] == "7":
        yield dict(attention=[], guesses=[], missing=["nothing to see <i>here</i>"])
    else:
        yield dict(attention=[[first, alike], [alike, alike]], guesses=guesses, missing=[])
def read(request):
    ids = [ord(letter) for letter in request["prompt"]] + request["taken"]
    tokens = []
    for i in ids[request["start"] + 1 : request["end"]]:
        tokens.append(dict(id=i, token=chr(i), p=0.002, likely=[dict(id=i, token=chr(i), p=0.002)]))
    yield dict(tokens=tokens)
def answer(request):
    try:
        if request["checkpoint"] not in progress()["checkpoints"]:
            raise ValueError("there is no such checkpoint")
        if request["prompt"] == "wrong":
            raise ValueError("this is wrong")
        yield begin(request)
        if request["prompt"] == "slow":
            time.sleep(1)
        if request["prompt"].isdecimal():
            n = request["taken"][-1] - 1 if request["taken"] else int(request["prompt"][-1])
            for _ in range(request["max_tokens"]):
                n = (n + 1) % 10
                yield dict(text=str(n), tokens=[digit(n)])
        if request["prompt"] == "html":
            text = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
            yield dict(text=text, tokens=[token(text)])
        # An emoji of three tokens, newlines, a stop text that is held back.
        if request["prompt"] == "pieces":
            yield dict(text=" \\N{LLAMA}", tokens=[token("\\ufffd")] * 3)
            yield dict(text="", tokens=[token("\\n\\n", 0.004)])
            yield dict(text="\\n\\ndef", tokens=[token("def", 0.9)])
            yield dict(text="", tokens=[token("STOP")])
            return
        if request["prompt"] == "who":
            text = f"{request['checkpoint']} {request['seed']}"
            yield dict(text=text, tokens=[token(text)])
        while request["prompt"] == "forever":
            yield dict(text=" word", tokens=[token(" word")])
            time.sleep(0.01)
        while request["prompt"] == "flood":
            yield dict(text=" word" * 10_000, tokens=[])
        if request["prompt"] == "x":
            yield dict(text=" end", tokens=[token(" end")])
    finally:
        print("closed", flush=True)
def progress():
    return json.loads(pathlib.Path(sys.argv[2]).read_text())
answers = dict(answer=answer, look=look, read=read)
# Python's own end, which unwinds the threads of requests, is not what ends the process.
atexit.register(sys.stderr.write, "Python's own end")
page.serve(answers, progress, json.loads(sys.argv[1]), 0)
"""


def words(settings: dict):
    yield from (dict(text=text) for text in ("a", "b\u2028\n", "</script>"))


TOKEN = "let-me-in"


def client(answer=words):
    desk = page_part.Desk(dict.fromkeys(page_part.ANSWERS, answer))
    return page_part.make_app(desk, lambda: RUN, FORM, TOKEN).test_client()


def get(client, path: str, **options):
    return client.get(path, query_string=dict(token=TOKEN), **options)


def post(client, **headers):
    return client.post("/answer", json=REQUEST, query_string=dict(token=TOKEN), headers=headers)


def parsed(response) -> list[dict]:
    return [json.loads(line) for line in response.get_data(as_text=True).splitlines()]


# ---- The application -----------------------------------------------------------------------------


def test_the_page_what_fills_it_and_its_answers():
    got = []
    app = client(lambda settings: got.append(settings) or words(settings))
    page, answer, missing = get(app, "/"), post(app), get(app, "/web.py")
    assert (page.status_code, page.mimetype, missing.status_code) == (200, "text/html", 404)
    assert get(app, "/form").json == json.loads(json.dumps(FORM))
    assert get(app, "/run").json == json.loads(json.dumps(RUN))
    assert parsed(answer) == list(words({})) and got == [REQUEST]
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
    for response in (post(client(), **headers), get(client(), "/form", headers=headers)):
        assert response.status_code == status


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é"])
def test_only_who_has_the_token_is_answered(token):
    query = {} if token is None else dict(token=token)
    app = client(lambda request: pytest.fail("it was computed"))
    for response in (
        app.get("/", query_string=query),
        app.get("/form", query_string=query),
        app.get("/run", query_string=query),
        app.post("/answer", json=REQUEST, query_string=query),
    ):
        assert response.status_code == 403
        assert "open the address that sample.py --web printed" in response.get_data(as_text=True)


# ---- The server, in another process --------------------------------------------------------------


class Server:
    def __init__(self, run_file: Path):
        command = [sys.executable, "-u", "-c", SERVER, json.dumps(FORM), str(run_file)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), **pipes)
        self.lines = queue.Queue()
        threading.Thread(
            target=lambda: [self.lines.put(line) for line in self.process.stdout], daemon=True
        ).start()
        self.address = self.line()
        self.url, _, query = self.address.partition("/?")
        self.token = query.removeprefix("token=")
        self.port = int(self.url.rpartition(":")[2])

    def line(self) -> str:
        return self.lines.get(timeout=60).strip()

    def ask(self, prompt: str) -> tuple[socket.socket, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps({**REQUEST, "prompt": prompt})
        connection.request("POST", f"/answer?token={self.token}", body)
        return connection.sock, connection.getresponse()

    def interrupt(self) -> None:
        """It ends as it should: nothing was logged, no traceback shown."""
        self.process.send_signal(signal.SIGINT)
        assert (self.process.wait(timeout=60), self.process.stderr.read()) == (0, "")


@pytest.fixture
def run_file(tmp_path) -> Path:
    """What the server tells of the run."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps(RUN))
    return file


@pytest.fixture
def server(run_file):
    server = Server(run_file)
    try:
        yield server
        server.interrupt()
    finally:
        server.process.kill()


def test_it_listens_on_this_computer_only_and_says_where(server):
    assert server.url == f"http://127.0.0.1:{server.port}"
    # A server on 0.0.0.0 would listen here too.
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.port))
    for port in (server.port, 70000):
        with pytest.raises(ValueError, match=rf"^--port {port}: .* 0 for any free one\)$"):
            page_part.serve(dict(answer=words), dict, FORM, port)


def test_the_answer_ends_when_the_connection_does_and_with_control_c(server):
    for how in ("orderly", "abruptly"):
        connection, response = server.ask("forever")
        response.readline()
        assert json.loads(response.readline())["text"] == " word"
        if how == "abruptly":
            no_goodbye = struct.pack("ii", 1, 0)  # closing sends a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_goodbye)
        response.close()
        connection.close()
        assert server.line() == "closed"
    assert b" end" in server.ask("x")[1].read()
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
    assert json.loads(first.readline())["text"] == " word"
    first.close()
    connection.close()
    events = [json.loads(line) for line in third.read().splitlines()]
    assert [event["text"] for event in events if "text" in event] == [" end"]


def test_a_client_that_stops_reading_loses_the_model(server):
    connection, response = server.ask("flood")
    response.readline()
    assert server.line() == "closed"  # after page.PATIENCE
    assert b" end" in server.ask("x")[1].read()
    connection.close()


def test_more_requests_than_places_wait_for_one(server):
    """They are all answered, in the end; a client that only connects is sent away."""
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(80)]
    assert b" end" in server.ask("x")[1].read()
    for connection in idle:
        connection.close()


# ---- The page in a browser -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def context():
    """A window of Chromium or Chrome.

    CHROMIUM names the program where it is not on the PATH, and CHROMIUM_ARGS has further options
    for it, such as "--single-process --no-zygote" in a container that allows no more.
    """
    api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip("no Chromium here")
    arguments = ["--no-sandbox", *os.environ.get("CHROMIUM_ARGS", "").split()]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        context = browser.new_context(viewport=dict(width=900, height=700))
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.new_page()  # stays open: a browser of a single process ends with its last page
        yield context
        browser.close()


@pytest.fixture
def page(context, server):
    """The page, opened; at the end, nothing went wrong in it, and it asked this server only."""
    page = context.new_page()
    urls, wrong = [], []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    page.goto(server.address)
    assert server.line() == "closed"  # a text stands there at the first view
    shows(page, "import os")
    yield page
    assert not wrong
    assert urls and all(url.startswith((f"{server.url}/", "data:")) for url in urls)
    page.close()


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def ask(page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    press(page, "Generate")


def status(page, text: str) -> None:
    page.wait_for_function(
        "text => document.getElementById('status').textContent === text", arg=text
    )


def shows(page, text: str) -> None:
    """Wait until this is the text, and all of it is there."""
    page.wait_for_function("text => document.getElementById('out').textContent === text", arg=text)
    page.wait_for_selector("#generate:enabled")


def point_at(page, token: int) -> None:
    """Move the pointer to a token, and wait for its tip."""
    page.locator(WRITTEN).nth(token).hover()
    page.wait_for_function(f"n => pointed === document.querySelectorAll('{WRITTEN}')[n]", arg=token)


def alternative(page, text: str) -> None:
    page.locator("#tip button").get_by_text(text, exact=True).click()


def branches(page) -> list[str]:
    return page.locator("#branches button").all_inner_texts()


def test_text_streams_and_stops(page, server):
    assert page.title() == page.get_by_role("heading").text_content() == "small"
    assert page.locator("#about").text_content() == "a <b>toy</b>"
    ask(page, "forever")
    page.wait_for_selector(".token:nth-child(20)")  # of a text without end: it is shown as it comes
    assert "tokens/s" in page.locator("#rate").text_content()
    assert page.get_by_role("button", name="Generate").is_disabled()
    press(page, "Stop")
    status(page, "Stopped.")
    assert server.line() == "closed"
    n = page.locator(WRITTEN).count()
    assert page.locator("#out").text_content() == "forever" + n * " word"
    assert "".join(page.locator("#out .prompt").all_text_contents()) == "forever"


def test_continue_writes_on_from_the_end(page):
    ask(page, "3")
    shows(page, "3456789012")
    page.get_by_label("Prompt", exact=True).fill(
        "what it continues is the text, whatever stands here"
    )
    page.get_by_label("Tokens", exact=True).fill("3")
    for text in ("3456789012345", "3456789012345678"):
        press(page, "Continue")
        shows(page, text)
    assert page.locator("#branches").is_hidden()
    press(page, "Copy")
    status(page, "Copied.")
    assert page.evaluate("() => navigator.clipboard.readText()") == "3456789012345678"


def test_another_token_begins_a_branch(page):
    ask(page, "3")
    shows(page, "3456789012")
    point_at(page, 2)  # the 6, where 0 was likely too
    alternative(page, "0")
    shows(page, "3450123456789")
    assert page.locator(".fork").all_inner_texts() == ["0"]
    point_at(page, 5)  # a branch of the branch, at the 3
    alternative(page, "1")
    shows(page, "3450121234567890")
    assert page.locator(".fork").all_inner_texts() == ["0", "1"]
    assert branches(page) == ["456789012", "↳ 450123456789", "↳ 450121234567890"]
    press(page, "Back")
    shows(page, "3450123456789")
    press(page, "Back")
    shows(page, "3456789012")
    press(page, "Back")
    shows(page, "import os")
    assert page.get_by_role("button", name="Back").is_disabled()
    ask(page, "3")  # by a fresh seed: another text
    shows(page, "3456789012")
    for token, text in ((2, "0"), (5, "1")):
        point_at(page, token)
        alternative(page, text)
        page.wait_for_selector("#generate:enabled")
    shows(page, "3450121234567890")
    page.locator("#branches button").nth(0).click()
    shows(page, "3456789012")
    point_at(page, 8)  # a sister of the first, which stands before it
    alternative(page, "∎")
    shows(page, "345678901∎012345678")
    assert branches(page) == [
        "456789012",
        "↳ 45678901∎012345678",
        "↳ 450123456789",
        "↳ 450121234567890",
    ]
    page.locator("#branches button").nth(3).click()
    shows(page, "3450121234567890")
    assert page.locator("[aria-current=true]").all_inner_texts() == ["↳ 450121234567890"]
    press(page, "Copy")
    status(page, "Copied.")
    ask(page, "7")
    shows(page, "7890123456")
    assert page.locator("#branches").is_hidden()  # another text's
    press(page, "Back")
    shows(page, "3450121234567890")
    assert len(branches(page)) == 4


def test_a_branch_ends_the_text_that_is_being_written(page, server):
    ask(page, "forever")
    page.wait_for_selector(".token:nth-child(4)")
    point_at(page, 0)
    alternative(page, "b")
    assert server.line() == "closed"
    page.wait_for_function("() => document.querySelectorAll('#branches button').length === 2")
    press(page, "Stop")
    status(page, "Stopped.")
    # This server shows the ids of what was taken, less 1.
    assert page.locator("#out").text_content().startswith("forever12 word")


def test_the_slider_goes_back_to_earlier_checkpoints(page, server):
    slider = page.get_by_label("Trained up to")
    assert page.locator("#at").text_content() == "step 300 of 300, validation loss 1.25"
    ask(page, "who")
    seed = page.get_by_label("Seed", exact=True).input_value()
    shows(page, f"whostep_0000300 {seed}")
    assert server.line() == "closed"
    slider.press("ArrowLeft")
    shows(page, f"whostep_0000200 {seed}")
    # The training loss: this step has no validation.
    assert page.locator("#at").text_content() == "step 200 of 300, training loss 2.00"
    assert server.line() == "closed"
    slider.fill("30")
    shows(page, f"whostep_0000100 {seed}")
    assert slider.input_value() == "100"
    assert slider.get_attribute("aria-valuetext") == "step 100 of 300, validation loss 3.25"
    assert server.line() == "closed"
    slider.press("ArrowRight")
    shows(page, f"whostep_0000200 {seed}")  # as it was written before: the server has nothing to do
    press(page, "Generate")
    page.wait_for_selector("#generate:enabled")
    fresh = page.get_by_label("Seed", exact=True).input_value()
    shows(page, f"whostep_0000200 {fresh}")
    assert fresh != seed and server.line() == "closed" and server.lines.empty()
    curve = page.locator("path.val").get_attribute("d")
    assert curve.startswith("M333.3") and curve.count("L") == 1  # not from step 0


def test_a_checkpoint_that_is_gone(page, run_file):
    ask(page, "3")
    shows(page, "3456789012")
    run_file.write_text(json.dumps(RUN | dict(checkpoints=RUN["checkpoints"][1:])))
    page.get_by_label("Trained up to").fill("100")
    status(page, "there is no such checkpoint")
    page.wait_for_function("() => run.checkpoints.length === 2")  # the page fetched the list again
    page.get_by_label("Trained up to").fill("90")
    status(page, "Done.")
    assert page.locator("#at").text_content().startswith("step 200 of 300")


def test_a_run_without_losses_and_a_model_that_is_no_runs(page, run_file):
    run_file.write_text(json.dumps(RUN | dict(train=[], val=[])))
    page.evaluate("() => readRun()")
    assert page.locator("#at").text_content() == "step 300 of 300"
    run_file.write_text(json.dumps(dict(checkpoints=[], train=[], val=[])))
    page.evaluate("() => readRun()")
    assert page.locator("#learning").is_hidden()


def test_keys(page, server):
    page.get_by_label("Prompt", exact=True).fill("forever")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    page.wait_for_selector(".token:nth-child(4)")
    page.keyboard.press("Escape")
    status(page, "Stopped.")
    ask(page, "3")
    shows(page, "3456789012")
    page.locator("#out").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    second = f"() => document.activeElement === document.querySelectorAll('{WRITTEN}')[1]"
    assert page.evaluate(second)
    assert page.get_by_role(
        "group", name="Alternatives to this token: choose one to continue with it"
    ).is_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    # The second alternative: a 0 in the place of the 5.
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    shows(page, "340123456789")
    page.keyboard.press("Backspace")
    shows(page, "3456789012")


def test_what_else_was_likely(page):
    ask(page, "pieces")
    status(page, "Done.")
    tokens = page.locator(WRITTEN)
    assert tokens.all_text_contents() == [" \N{LLAMA}", "\n\n", "def", "∎"]
    point_at(page, 2)
    bars = page.locator("#tip button")
    assert bars.count() == 5 and page.locator("#tip .head").count() == 0
    assert page.locator("#tip .taken").nth(0).inner_text().split() == ["def", "90%"]
    shown = [row.split() for row in bars.all_inner_texts()]
    assert shown == [["def", "90%"], ["⏎", "25%"], ["·<i>a</i>", "20%"], ["b", "10%"], ["⇥", "5%"]]
    widths = [page.locator("#tip button .fill").nth(i).bounding_box()["width"] for i in range(5)]
    assert widths == sorted(widths, reverse=True)
    point_at(page, 0)  # a character of three tokens
    assert bars.count() == 15
    press(page, "Copy")
    status(page, "Copied.")
    # Without the mark of the end.
    assert page.evaluate("() => navigator.clipboard.readText()") == "pieces \N{LLAMA}\n\ndef"
    page.mouse.move(0, 0)
    page.wait_for_selector("#tip", state="hidden")
    heats = [tokens.nth(i).get_attribute("class").split() for i in range(3)]
    for classes, heat in zip(heats, ("heat2", "heat3", "heat0")):
        assert heat in classes


def test_text_is_never_html(page):
    ask(page, "html")
    status(page, "Done.")
    shown = page.locator("#out").text_content()
    assert shown.startswith("html<script>window.broken = 1</script><img")
    point_at(page, 0)
    assert "<script>" in page.locator("#tip").text_content()
    alternative(page, "·<i>a</i>")
    page.wait_for_selector("#branches")
    elements = "#out script, #out img, #tip script, #tip i, #about b, #branches i, #branches img"
    assert page.locator(elements).count() == 0
    assert page.evaluate("() => window.broken") is None


def test_a_value_that_cannot_be_is_marked_and_the_text_stays(page, server):
    ask(page, "3")
    shows(page, "3456789012")
    assert server.line() == "closed"
    wrong = [
        ("Temperature", "-1", "Temperature must be 0 or more"),
        ("Temperature", "", "Temperature must be a number"),
        ("Tokens", "2.5", "Tokens must be a whole number"),
        ("Top p", "1.5", "Top p must be 1 or less"),
    ]
    for label, value, says in wrong:
        field = page.get_by_label(label, exact=True)
        old_value = field.input_value()
        field.fill(value)
        for button in ("Generate", "Continue"):
            press(page, button)
            status(page, says)
            assert field.get_attribute("aria-invalid") == "true"
            assert field.evaluate("field => field === document.activeElement")
        field.fill(old_value)
        assert field.get_attribute("aria-invalid") is None
    shows(page, "3456789012")
    assert server.lines.empty()  # no request came
    press(page, "Continue")
    shows(page, "3456789012345678901")


def test_what_the_server_refuses_is_said_and_the_text_stays(page):
    ask(page, "3")
    shows(page, "3456789012")
    ask(page, "wrong")
    status(page, "this is wrong")
    shows(page, "3456789012")
    ask(page, "4")
    shows(page, "4567890123")


def test_each_text_has_a_fresh_seed_unless_it_is_kept(page):
    def seed(action) -> str:
        action()
        status(page, "Done.")
        page.wait_for_selector("#generate:enabled")
        return page.locator("#out").text_content().split()[1]

    field = page.get_by_label("Seed", exact=True)
    seeds = {seed(lambda: ask(page, "who")) for _ in range(3)}
    assert len(seeds) == 3 and field.input_value() in seeds
    kept = field.input_value()
    page.get_by_label("Keep the seed").check()
    assert seed(lambda: ask(page, "who")) == kept
    page.get_by_label("Keep the seed").uncheck()
    field.fill("42")  # who types one means it
    assert seed(lambda: ask(page, "who")) == "42"
    assert page.get_by_label("Keep the seed").is_checked()


def test_prompts_to_try(page):
    """The command's, and those that go with them."""
    assert page.get_by_label("Prompt", exact=True).input_value() == "import os"
    chips = page.locator("#chips button")
    assert chips.all_inner_texts()[:4] == ["import os", "x", "def main(", "class Queue:"]
    chips.nth(1).click()
    shows(page, "x end")
    assert page.get_by_label("Prompt", exact=True).input_value() == "x"


def test_it_fits_a_telephone_and_every_part_has_a_name(page):
    page.set_viewport_size(dict(width=400, height=800))
    ask(page, "3")
    shows(page, "3456789012")
    point_at(page, 3)
    alternative(page, "0")
    shows(page, "34560123456789")
    point_at(page, 3)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 400
    named = "element => Boolean(element.textContent.trim() || element.labels?.length)"
    parts = page.locator("button, input, textarea")
    assert parts.count() > 20 and all(parts.nth(i).evaluate(named) for i in range(parts.count()))


def test_forced_colours_keep_what_is_told_by_colour_and_nothing_blinks(page):
    """Windows' contrast themes take all backgrounds away, except where the page says that a
    background is the message.
    """
    page.emulate_media(forced_colors="active", reduced_motion="reduce")
    ask(page, "3")
    shows(page, "3456789012")
    point_at(page, 2)
    for part in ("#tip .fill", ".legend b", WRITTEN):
        read = "element => getComputedStyle(element).forcedColorAdjust"
        assert page.locator(part).first.evaluate(read) == "none", part
    page.evaluate("document.getElementById('out').classList.add('writing')")
    assert page.evaluate("document.getAnimations().length") == 0
    page.emulate_media(forced_colors="none", reduced_motion="no-preference")
    assert page.evaluate("document.getAnimations().length") == 1


# ---- What the model saw, and how it learned ------------------------------------------------------


def test_a_text_stands_there_at_the_first_view(page):
    assert page.locator("#out").text_content() == "import os"
    seed = page.get_by_label("Seed", exact=True).input_value()
    assert seed == "1337" and not page.get_by_label("Keep the seed").is_checked()


def shades(page) -> list[float]:
    """How strongly each token is shaded, in percent."""
    strengths = (
        "spans => spans.map((span) => parseFloat(span.style.getPropertyValue('--attention')))"
    )
    return page.locator(".token").evaluate_all(strengths)


def test_where_it_looked_and_when_it_knew(page):
    ask(page, "3")
    shows(page, "3456789012")
    point_at(page, 1)  # the 5, before which 3 and 4 stood
    page.wait_for_selector("#out.looking")
    knew = [row.inner_text().split() for row in page.locator("#tip .block").all()]
    assert knew == [["1", "to", "2", "2", "20%"], ["block", "3", "4", "50%"]]
    tip = page.locator("#tip").inner_text()
    assert "Where it looked: 3 62%, 4 37%" in tip or "Where it looked: 3 63%, 4 38%" in tip
    first, second, *rest = shades(page)
    assert first > second > 0 and not any(rest)
    page.get_by_label("shows where the model looked").select_option("block 1, head 1")
    point_at(page, 2)
    page.wait_for_function("() => document.getElementById('tip').innerText.includes('3 100%')")
    first, *rest = shades(page)
    assert first == 85 and not any(rest)
    page.mouse.move(0, 0)
    page.wait_for_selector("#out:not(.looking)")
    ask(page, "7")
    shows(page, "7890123456")
    point_at(page, 2)
    page.get_by_text("nothing to see <i>here</i>").wait_for()  # a model that hides it
    assert page.locator("#tip button").count() == 5


def test_the_prompt_is_coloured_too(page):
    ask(page, "123")
    status(page, "Done.")
    page.wait_for_selector(".prompt.heat3")
    heats = [set(each.split()) for each in page.locator(".prompt").evaluate_all(CLASSES)]
    assert "heat3" not in heats[0] and "heat3" in heats[1] and "heat3" in heats[2]
    page.locator(".prompt").nth(1).hover()
    page.wait_for_selector("#tip .taken")
    # It is the person's: nothing in it can be exchanged.
    assert page.locator("#tip button").count() == 0


CLASSES = "spans => spans.map((span) => span.className)"


def test_what_is_outside_the_context_is_grey_and_a_long_prompt_is_folded(page):
    ask(page, "long" + 200 * "a line of the prompt\n" + "END")
    status(page, "Done.")
    assert len(page.locator("#out .outside").nth(0).text_content()) == 2000
    read = page.locator(".token:not(.outside)").all_text_contents()
    assert read == [" end"] or len(read) == 5
    assert "its context is 5 tokens" in page.locator("#outside").inner_text()
    bottom = page.locator("#out").evaluate("out => out.getBoundingClientRect().bottom")
    assert bottom < 700  # the new text is in the window
    assert page.get_by_role("button", name="Generate").is_visible()
    top = page.locator("#actions").evaluate("row => row.getBoundingClientRect().top")
    assert top == 0  # the buttons stay
    page.get_by_role("button", name="characters more").click()
    assert len(page.locator("#out").text_content()) == 4 + 200 * 21 + 3
    press(page, "Copy")
    status(page, "Copied.")
    assert len(page.evaluate("() => navigator.clipboard.readText()")) == 4 + 200 * 21 + 3
    ask(page, "3")
    shows(page, "3456789012")
    assert page.locator(".outside").count() == 0 and page.locator("#outside").is_hidden()


def test_a_slow_prompt_is_said_to_be_read(page):
    ask(page, "slow")
    status(page, "Reading the prompt (4 tokens) …")
    assert page.locator("#rate").text_content() == ""
    status(page, "Done.")


def test_watch_it_learn(page, server):
    page.get_by_label("Prompt", exact=True).fill("who")
    button = page.locator("#watch")
    page.evaluate("() => { window.seen = []; const begin = window.goTo; }")
    page.evaluate(
        """() => new MutationObserver(() => seen.push(document.getElementById('out').textContent))
        .observe(document.getElementById('out'), { childList: true })"""
    )
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    page.wait_for_function("() => film === null")
    texts = [f"whostep_0000{n}00 1337" for n in (1, 2, 3)]
    seen = [text for text in page.evaluate("() => seen") if text in texts]
    assert sorted(set(seen), key=seen.index) == texts
    shows(page, texts[-1])
    assert button.get_attribute("aria-pressed") == "false"
    for _ in range(3):
        assert server.line() == "closed"
    page.get_by_label("Trained up to").press("ArrowLeft")
    shows(page, texts[1])  # as it was written before
    assert server.lines.empty()
    page.locator("#watch").click()
    page.wait_for_function(
        "text => document.getElementById('out').textContent === text", arg=texts[0]
    )
    page.keyboard.press("Escape")
    page.wait_for_function("() => film === null")
    page.wait_for_timeout(1500)
    shows(page, texts[0])  # it has stopped
    press(page, "Back")
    shows(page, texts[1])


def test_a_reload_keeps_texts_branches_and_settings(page, server):
    page.get_by_label("Tokens", exact=True).fill("4")
    ask(page, "3")
    shows(page, "34567")
    point_at(page, 2)
    alternative(page, "0")
    shows(page, "34501234")
    page.get_by_label("Prompt", exact=True).fill("something else")
    while not server.lines.empty():
        server.line()
    page.reload()
    shows(page, "3450123" + "4")
    assert page.get_by_label("Prompt", exact=True).input_value() == "something else"
    assert page.get_by_label("Tokens", exact=True).input_value() == "4"
    assert branches(page) == ["4567", "↳ 450123" + "4"]
    assert page.locator(".fork").all_inner_texts() == ["0"]
    assert server.lines.empty()  # nothing was written again
    point_at(page, 1)
    page.wait_for_selector("#out.looking")
    page.mouse.move(0, 0)
    press(page, "Continue")
    shows(page, "3450123456" + "78")
    press(page, "Back")
    shows(page, "34567")


def test_a_link_gives_the_same_text_elsewhere(page, context, run_file):
    page.get_by_label("Temperature", exact=True).fill("0.7")
    ask(page, "who")
    page.wait_for_selector("#generate:enabled")
    text = page.locator("#out").text_content()
    press(page, "Link")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('Copied')"
    )
    link = page.evaluate("() => navigator.clipboard.readText()")
    assert "token" not in link.partition("#")[0] and "#" in link
    other_server = Server(run_file)
    try:
        other = context.new_page()
        other.goto(f"{other_server.address}#{link.partition('#')[2]}")
        shows(other, text)
        assert other.get_by_label("Temperature", exact=True).input_value() == "0.7"
        gone = link.partition("#")[2].replace("step_0000300", "step_0000999")
        other.goto(f"{other_server.address}#{gone}")
        other.get_by_text("The link is to a text of step_0000999").wait_for()
        other.close()
        other_server.interrupt()
    finally:
        other_server.process.kill()
    ask(page, "3")
    shows(page, "3456789012")
    point_at(page, 4)
    alternative(page, "0")
    shows(page, "345670123456789")
    address = page.url
    page.evaluate("() => sessionStorage.clear()")
    page.goto("about:blank")
    page.goto(address)
    shows(page, "345670123456789")  # a branch's link has the tokens up to it


def test_a_token_has_a_name_and_home_and_end_lead_to_the_ends(page):
    ask(page, "3")
    shows(page, "3456789012")
    page.locator("#out").focus()
    page.keyboard.press("End")
    assert page.locator("#out").get_by_role("button", name="2 50%", exact=True).count() == 1
    page.keyboard.press("Home")
    assert page.evaluate("() => document.activeElement.textContent") == "3"
    assert page.locator("#out [role=button]").count() == 1
    page.locator("#prompt").focus()
    assert page.locator("#out [role]").count() == 0  # to be read as plain text
