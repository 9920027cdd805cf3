"""fineweb.py against a small hub on loopback: the real client, real parquet files, and what goes wrong with both."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import clean_environment

import data
import fineweb

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "some/texts"


class Hub(BaseHTTPRequestHandler):
    """The hub's three doors: a dataset's card and file names, the sizes and hashes of a folder, the files themselves.

    trouble: for a file's name, what to do wrong at each of the next requests for it, in turn; a delay a chunk.
    """

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    configs: list[dict]
    trouble: dict[str, list]
    delay: float
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        type(self).asked.append(f"{self.command} {path}")
        if path == f"/api/datasets/{DATASET}/revision/main":
            card = {"configs": self.configs} if self.configs else {}
            siblings = [{"rfilename": name} for name in self.files]
            self.answer_json({"id": DATASET, "sha": COMMIT, "siblings": siblings, "cardData": card})
        elif path.startswith(f"/api/datasets/{DATASET}/tree/{COMMIT}"):
            folder = path.partition(COMMIT)[2].strip("/")
            self.answer_json([self.entry(name) for name in self.files if name.rpartition("/")[0] == folder])
        elif path.startswith(f"/datasets/{DATASET}/resolve/{COMMIT}/"):
            self.answer_file(path.partition(COMMIT + "/")[2])
        else:
            self.refuse(404, **{"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict:
        content = self.files[name]
        oid = hashlib.sha256(content).hexdigest()
        lfs = {"oid": oid, "size": len(content), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs}

    def answer_file(self, name: str):
        content = self.files[name]
        trouble = self.trouble.get(name, [])
        wrong = trouble.pop(0) if trouble and self.command == "GET" else ""
        if isinstance(wrong, int):
            return self.refuse(wrong, **({"Retry-After": "0"} if wrong == 429 else {}))
        if wrong == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        sent = content[:-100] if wrong == "short" else content
        first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(self.files[name]).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(sent) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            end = (first + len(sent)) // 2 if wrong == "drop" else len(sent)
            for start in range(first, end, 20_000):
                self.wfile.write(sent[start : min(end, start + 20_000)])
                time.sleep(self.delay)
            self.close_connection = wrong == "drop"

    def refuse(self, code: int, **headers: str):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def answer_json(self, content):
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


def documents(seed: int, n: int) -> list[str]:
    """Texts as they come: short and long, one empty, one of a single run, one that names the end-of-text token."""
    rng = random.Random(seed)
    words = "the quick brown naïve fox ☃ don't 1234 jumps\n\nover <|endoftext|> 漢字 lazy\tdogs".split(" ")
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 400))) for _ in range(n)]
    texts[1:4] = ["", "x" * 3000, "one <|endoftext|> two"]
    return texts


def parquet(texts: list, rows_per_group: int = 40, column: str = "text") -> bytes:
    table = pa.table({"id": list(range(len(texts))), column: texts})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows_per_group)
    return sink.getvalue().to_pybytes()


TEXTS = [documents(seed, 150) for seed in range(3)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one dataset of three files; this process's client is pointed at it and waits for nothing."""
    files = {f"sample/tiny/{i:03d}_00000.parquet": parquet(texts) for i, texts in enumerate(TEXTS)}
    files["README.md"] = b"a card"
    files["sample/other/000.parquet"] = parquet(["of another subset"] * 9)
    files["test/000.parquet"] = parquet(["not for training"] * 9)
    configs = [
        {"config_name": "tiny", "data_files": [{"split": "train", "path": "sample/tiny/*"}]},
        {"config_name": "other", "data_files": [{"split": "train", "path": ["sample/other/*"]}]},
    ]
    settings = dict(files=files, configs=configs, trouble={}, delay=0.0, asked=[])
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), settings))
    server.handle_error = lambda *_: None  # a client that was killed hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def at(hub) -> type[Hub]:
    return hub.RequestHandlerClass


def fetch(hub, out: Path, *options: str, name="tiny", before="") -> subprocess.CompletedProcess:
    """fineweb.py in a process of its own, with small shards and no waits."""
    return subprocess.run(command(out, *options, name=name, before=before), **where(hub, out), timeout=120)


def fails(hub, out: Path, *options: str, **more) -> str:
    """It must end with exit code 2 and, after what it says about new attempts, one line; return the line."""
    run = fetch(hub, out, *options, **more)
    lines = [line for line in run.stderr.splitlines() if line.startswith("fineweb.py: ")]
    assert run.returncode == 2 and len(lines) == 1 and "Traceback" not in run.stderr, run.stderr
    return lines[0]


def command(out: Path, *options: str, name="tiny", before="") -> list[str]:
    script = f"import sys, fineweb, data, prepare\nfineweb.WAITS = (0, 0, 0)\n{before}\nfineweb.main(sys.argv[1:])"
    plain = [] if "--pretokenized" in options else ["--name", name, "--shard_tokens", "9000"]
    return [sys.executable, "-c", script, "--dataset", DATASET, "--out", str(out), "--workers", "1", *plain, *options]


def where(hub, out: Path) -> dict:
    environment = clean_environment(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_address[1]}",
        HF_HOME=str(out.parent / "home"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    return dict(cwd=ROOT, env=environment, capture_output=True, text=True)


def bytes_of(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.bin"))}


def read_shard(path: Path) -> np.ndarray:
    """From the description of the format alone: 256 int32, then as many uint16 as the third says, little-endian."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[:2] == (20240520, 1) and len(content) == 1024 + 2 * header[2]
    return np.frombuffer(content[1024:], dtype="<u2")


def decoded(tokens: np.ndarray) -> list[str]:
    """The documents of a stream that begins with one."""
    starts = np.flatnonzero(tokens == 50256)
    assert starts[0] == 0
    return [data.get_tokenizer("gpt2").decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """The shards of TEXTS, made the plain way: their names and tokens."""
    encode, shards = data.get_tokenizer("gpt2").encoding.encode_ordinary, {}
    for i, texts in enumerate(TEXTS):
        stream = np.array([token for text in texts if text for token in (50256, *encode(text))], dtype=np.uint16)
        for n in range(-(-len(stream) // 9000)):
            # The very first is for validation; in the other files, shards count from 1.
            name = f"out_train_{i:03d}{n + (i > 0):03d}.bin" if i or n else "out_val_000000.bin"
            shards[name] = stream[n * 9000 :][:9000]
    return shards


def assert_made(out: Path, reference: dict[str, np.ndarray]) -> None:
    """The folder is complete, and its shards are the reference's."""
    assert data.read_meta(out)["complete"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*reference, "meta.json"])
    for name, tokens in reference.items():
        assert np.array_equal(read_shard(out / name), tokens), name


# ---- What is made ----------------------------------------------------------------------------------------------------


def test_shards_are_those_of_a_plain_loop(hub, tmp_path, reference):
    out = tmp_path / "out"
    run = fetch(hub, out)
    assert run.returncode == 0, run.stderr
    assert_made(out, reference)
    for i, texts in enumerate(TEXTS):
        ours = [
            read_shard(out / name) for name in sorted(reference, key=lambda name: name[-10:]) if f"_{i:03d}" in name
        ]
        assert decoded(np.concatenate(ours)) == [text for text in texts if text]
    meta = data.read_meta(out)
    assert meta["documents"] == sum(bool(text) for texts in TEXTS for text in texts)
    assert meta["source"]["commit"] == COMMIT and len(meta["source"]["files"]) == 3
    for split in ("train", "val"):
        assert sum(len(shard.tokens) for shard in data.open_shards(out, split)) == meta["tokens"][split]
        for row in meta["shards"][split]:
            assert hashlib.sha256((out / row["file"]).read_bytes()).hexdigest() == row["sha256"]
    assert not list((tmp_path / "home").rglob("*.parquet"))  # the disk's use is bounded
    # Again: nothing to do, and nobody is asked.
    at(hub).asked.clear()
    again = fetch(hub, out)
    assert again.returncode == 0 and "already made" in again.stdout and not at(hub).asked


@pytest.mark.parametrize("workers, before", [(2, ""), (4, ""), (2, "prepare.START_METHOD = 'forkserver'")])
def test_any_number_of_workers_makes_the_same_bytes(hub, tmp_path, reference, workers, before):
    run = fetch(hub, tmp_path / "out", "--workers", str(workers), before=f"prepare.ROWS_BYTES = 20_000\n{before}")
    assert run.returncode == 0, run.stderr
    assert_made(tmp_path / "out", reference)


def test_parts_make_the_same_bytes(hub, tmp_path, reference):
    """Three machines at one folder, the last two at the same time; the second is stopped and started once more."""
    out = tmp_path / "out"
    first = fetch(hub, out, "--part", "1/3")
    assert first.returncode == 0 and "part 1 of 3 is done; 1 of 3 files are there" in first.stdout, first.stderr
    with pytest.raises(ValueError, match="still being written"):
        data.open_shards(out, "train")
    assert not list(out.rglob("*.parquet"))  # what is in shards is removed at once
    at(hub).trouble["sample/tiny/001_00000.parquet"] = [404]
    assert "001_00000.parquet" in fails(hub, out, "--part", "2/3")
    both = [subprocess.Popen(command(out, "--part", part), **streams(hub, out)) for part in ("2/3", "3/3")]
    assert [process.wait(120) for process in both] == [0, 0]
    assert_made(out, reference)
    assert "already made" in fetch(hub, out, "--part", "1/3").stdout


def test_max_tokens_is_the_beginning(hub, tmp_path, reference):
    out = tmp_path / "out"
    run = fetch(hub, out, "--max_tokens", "20000")
    assert run.returncode == 0, run.stderr
    made = {name: reference[name] for name in ("out_val_000000.bin", "out_train_000001.bin")}
    assert_made(out, made | {"out_train_000002.bin": reference["out_train_000002.bin"][:2000]})
    assert not any("001_00000" in request for request in at(hub).asked if "resolve" in request)
    tokens = [read_shard(path) for path in sorted(out.glob("*.bin"))]
    assert data.read_meta(out)["documents"] == np.count_nonzero(np.concatenate(tokens) == 50256)
    across = tmp_path / "across"
    in_first = sum(len(tokens) for name, tokens in reference.items() if "_000" in name)
    assert fetch(hub, across, "--max_tokens", str(in_first + 5)).returncode == 0
    assert read_shard(across / "across_train_001001.bin").tolist() == reference["out_train_001001.bin"][:5].tolist()


def test_keep_downloads_and_the_cache(hub, tmp_path, reference):
    """Kept files are in the hub's cache; from there they are taken, and not removed, by the next run."""
    assert fetch(hub, tmp_path / "out", "--keep_downloads").returncode == 0
    kept = list((tmp_path / "home").rglob("*.parquet"))
    assert len(kept) == 3
    (tmp_path / "out").rename(tmp_path / "before")
    at(hub).asked.clear()
    assert fetch(hub, tmp_path / "out").returncode == 0
    assert_made(tmp_path / "out", reference)
    assert not any("resolve" in request for request in at(hub).asked) and all(path.exists() for path in kept)
    # A file that is damaged there is not believed.
    (tmp_path / "out").rename(tmp_path / "second")
    kept[0].resolve().write_bytes(b"junk")
    assert fetch(hub, tmp_path / "out").returncode == 0
    assert_made(tmp_path / "out", reference)


def test_other_formats_and_odd_text(hub, tmp_path):
    """gzipped JSON lines; a null and invalid UTF-8 in a parquet file; a document longer than several shards."""
    rows = [{"body": "a lone surrogate: \ud800"}, {"body": None}, {"body": "word " * 30_000}, {"body": ""}]
    lines = gzip.compress("\n\n".join(map(json.dumps, rows)).encode())
    raw = [b"na\xefve", None, "ünïcode".encode()]
    column = pa.array(raw, pa.binary()).view(pa.string())
    at(hub).files = {"data/b.jsonl.gz": lines, "data/c.parquet": parquet(column, column="body"), "data/README.md": b""}
    at(hub).configs = []
    out = tmp_path / "out"
    run = fetch(hub, out, "--text_column", "body", name="data")
    assert run.returncode == 0, run.stderr
    first = [read_shard(out / name) for name in sorted(bytes_of(out), key=lambda name: name[-10:]) if "_000" in name]
    assert decoded(np.concatenate(first)) == ["a lone surrogate: ?", "word " * 30_000]
    assert decoded(read_shard(out / "out_train_001001.bin")) == ["na\ufffdve", "ünïcode"]


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def streams(hub, out: Path) -> dict:
    """For a process that runs beside the test: in a group of its own, silent."""
    kept = {name: value for name, value in where(hub, out).items() if name in ("cwd", "env")}
    return kept | dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.torture
def test_killed_at_ten_moments(hub, tmp_path, reference):
    """Law 8: kill -9 while it downloads, tokenises, writes. The workers end too. Then the same command, left alone."""
    out, rng = tmp_path / "out", random.Random(0)
    at(hub).delay = 0.02  # a download takes a tenth of a second, and a piece of 2 kB some time too
    slow = """
import time
prepare.ROWS_BYTES, plain = 2000, prepare.tokenise
prepare.tokenise = lambda *a, **k: (time.sleep(0.02), plain(*a, **k))[1]"""
    progress = []
    for attempt, moment in enumerate(["downloading", 1, 2, 3, "downloading", 1, 2, 1, 3, 2]):
        workers = ["--workers", "2"] if attempt in (2, 5) else []
        before = "prepare.ROWS_BYTES = 2000" if workers else slow
        process = subprocess.Popen(command(out, *workers, before=before), **streams(hub, out))
        wait_for(moment, out, process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        progress.append(len(bytes_of(out)))
        assert all(np.array_equal(read_shard(out / name), reference[name]) for name in bytes_of(out))
    assert progress[0] == 0 and progress == sorted(progress) and len(set(progress)) > 5, progress  # nothing is lost
    deadline = time.monotonic() + 20
    while workers_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers_of(out)
    run = fetch(hub, out, before="prepare.ROWS_BYTES = 2000")
    assert run.returncode == 0, run.stderr
    assert_made(out, reference)


def wait_for(moment: str | int, out: Path, process: subprocess.Popen) -> None:
    """Until half a download is there that was not before, or so many more shards; or the process has ended."""
    halves, shards = halves_in(out), len(list(out.glob("*.bin")))
    while process.poll() is None:
        more = len(list(out.glob("*.bin"))) - shards
        if moment == "downloading" and (halves_in(out) - halves or more > 3):
            return
        if moment != "downloading" and more >= moment:
            return
        time.sleep(0.002)


def halves_in(out: Path) -> set[str]:
    """Downloads that are on their way. os.walk passes over folders that the process deletes meanwhile."""
    return {name for _, _, names in os.walk(out) for name in names if name.endswith(".incomplete")}


def workers_of(out: Path) -> list[str]:
    """Processes that a run with this folder left behind."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            home = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"HF_HOME={out.parent}/home".encode() in home:
            found.append((process / "cmdline").read_text())
    return found


@pytest.mark.parametrize(
    "trouble", [["drop"], [429], [500, 500, 500], ["short"], ["corrupt"], ["drop", 503, "corrupt", "drop"]], ids=str
)
def test_what_may_pass_is_tried_again(hub, tmp_path, reference, trouble):
    at(hub).trouble = {"sample/tiny/001_00000.parquet": list(trouble)}
    run = fetch(hub, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert not at(hub).trouble["sample/tiny/001_00000.parquet"]  # all of it came to pass
    assert_made(tmp_path / "out", reference)


@pytest.mark.parametrize(
    "wrong, message",
    [("corrupt", "differs from what the hub has"), ("short", "Consistency check failed"), (503, "503"), (404, "404")],
)
def test_what_does_not_pass_is_one_line_and_nothing_is_lost(hub, tmp_path, reference, wrong, message):
    out = tmp_path / "out"
    at(hub).trouble = {"sample/tiny/001_00000.parquet": [wrong] * 99}
    line = fails(hub, out)
    assert "sample/tiny/001_00000.parquet" in line and message in line
    whole = bytes_of(out)
    assert len(whole) == sum("_000" in name for name in reference)  # the first file's, and nothing of the second's
    at(hub).trouble = {}
    at(hub).asked.clear()
    assert fetch(hub, out).returncode == 0
    assert_made(out, reference)
    # What was done was not done again; nor were the files listed again, for the dataset may have changed since.
    assert not any("000_00000" in request or "/api/" in request for request in at(hub).asked)


def test_no_network_is_one_line(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    assert "fineweb.py: some/texts: " in fails(hub, tmp_path / "out")
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'"
    assert "offline" in fails(hub, tmp_path / "out", before=offline)


def test_a_full_disk_is_one_line_and_nothing_is_lost(hub, tmp_path, reference):
    out = tmp_path / "out"
    full = """
calls, fsync = [], data.os.fsync
def full(fd):
    calls.append(fd)
    if len(calls) == 7: raise OSError(28, "No space left on device")
    fsync(fd)
data.os.fsync = full"""
    line = fails(hub, out, before=full)
    assert "No space left on device" in line and ".bin" in line
    made = bytes_of(out)
    assert 1 <= len(made) < len(reference) and not list(out.glob("*.tmp"))
    assert all(np.array_equal(read_shard(out / name), reference[name]) for name in made)
    assert fetch(hub, out).returncode == 0
    assert_made(out, reference)


def test_a_worker_that_dies_is_one_line(hub, tmp_path, reference):
    out = tmp_path / "out"
    killed = "prepare.start_worker = prepare.os.abort"
    assert "a worker process was killed (was memory short?)" in fails(hub, out, "--workers", "2", before=killed)
    assert fetch(hub, out).returncode == 0
    assert_made(out, reference)


def test_a_program_that_cuts_other_pieces_goes_on_right(hub, tmp_path, reference):
    """A record speaks of pieces of the input; where they are of another size now, its file is begun again."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(out, before="prepare.ROWS_BYTES = 2000"), **streams(hub, out))
    while len(bytes_of(out)) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert fetch(hub, out, before="prepare.ROWS_BYTES = 50_000").returncode == 0
    assert_made(out, reference)


def test_a_missing_shard_is_made_again(hub, tmp_path, reference):
    """Where somebody removed a shard of an interrupted run, its file's shards are made anew."""
    out = tmp_path / "out"
    at(hub).trouble = {"sample/tiny/001_00000.parquet": [404]}
    fails(hub, out)
    (out / "out_train_000001.bin").unlink()
    assert fetch(hub, out).returncode == 0
    assert_made(out, reference)


def test_mistakes_in_the_command_are_one_line(hub, tmp_path):
    out = tmp_path / "out"
    assert "no column 'body'; there are: id, text (choose with --text_column)" in fails(
        hub, out, "--text_column", "body"
    )
    assert "the column 'id' holds int64, not text" in fails(hub, tmp_path / "a", "--text_column", "id")
    line = fails(hub, tmp_path / "b", name="tinny")
    assert "no .parquet, .jsonl, .jsonl.gz files under the name 'tinny'; choose --name: tiny, other" in line
    assert "404" in fails(hub, tmp_path / "c", "--dataset", "some/typo")
    line = fails(hub, tmp_path / "d", "--shard_tokens", "100000000", name="other")
    assert "all 36 tokens are in the first shard, which is for validation" in line and "--shard_tokens=1" in line


@pytest.mark.parametrize(
    "options, message",
    [
        ("--part 3/2", "--part=3/2: it must be like 1/4"),
        ("--part 1", "--part=1: it must be like 1/4"),
        ("--part 1/2 --max_tokens 900_000_000", "exclude each other"),
        ("--max_tokens 1000000", "add --shard_tokens=100000"),
        ("--shard_tokens 0", "--shard_tokens=0: it must be at least 1"),
        ("--workers 0", "--workers=0: it must be at least 1"),
        ("--pretokenized --name x", "no meaning with --pretokenized"),
    ],
)
def test_impossible_options_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        fineweb.main(options.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_errors_of_the_rust_client_are_tried_again(monkeypatch, capsys):
    """hf_xet, which fetches what the hub keeps in its newer storage, raises RuntimeError for all that goes wrong."""
    monkeypatch.setattr(fineweb, "WAITS", (0, 0))
    answers = [RuntimeError("CAS Client Error: connection refused"), "done"]

    def attempt():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert fineweb.patiently("a file", attempt) == "done"
    assert "a file: CAS Client Error: connection refused Trying again in 0 s" in capsys.readouterr().err
    answers += [RuntimeError("no")] * 3
    with pytest.raises(ValueError, match="a file: no What is done is kept"):
        fineweb.patiently("a file", attempt)


# ---- Which files -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Info:
    """As much of the hub's DatasetInfo as is read, with the card of FineWeb-Edu if nothing else is given."""

    names: list[str]
    configs: list[dict] | None = None
    id: str = "some/texts"

    @property
    def siblings(self):
        return [type("Sibling", (), {"rfilename": name}) for name in self.names]

    @property
    def card_data(self):
        return type("Card", (), {"to_dict": lambda _: {"configs": self.configs} if self.configs else {}})()


def test_which_files_of_fineweb_edu():
    names = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)] + ["sample/100BT/000_00000.parquet", "README.md"]
    names += [
        f"data/CC-MAIN-{dump}/train-{i:05d}-of-00002.parquet" for dump in ("2013-20", "2024-10") for i in range(2)
    ]
    paths = {"default": "data/*/*", "sample-10BT": "sample/10BT/*", "CC-MAIN-2024-10": "data/CC-MAIN-2024-10/*"}
    configs = [{"config_name": n, "data_files": [{"split": "train", "path": path}]} for n, path in paths.items()]
    info = Info(names, configs)
    assert fineweb.choose_text(info, "sample-10BT") == names[:3]
    assert fineweb.choose_text(info, "CC-MAIN-2024-10") == names[-2:]
    assert fineweb.choose_text(info, "default") == fineweb.choose_text(info, None) == names[-4:]


@pytest.mark.parametrize(
    "data_files",
    ["a/*", ["a/*"], {"train": "a/*"}, {"train": ["a/*"], "test": "b/*"}, [{"split": "train", "path": ["a/*"]}]],
    ids=str,
)
def test_all_forms_of_a_card_are_understood(data_files):
    info = Info(["a/1.parquet", "a/deep/2.parquet", "b/3.parquet"], [{"config_name": "x", "data_files": data_files}])
    assert fineweb.choose_text(info, "x") == fineweb.choose_text(info, None) == ["a/1.parquet"]


def test_other_cards():
    names = ["1.parquet", "a/1.parquet", "a/deep/2.parquet", "b/3.parquet"]
    assert fineweb.choose_text(Info(names, [{"config_name": "x", "data_dir": "a"}]), "x") == names[1:3]
    assert fineweb.choose_text(Info(names, [{"config_name": "x", "data_files": "**/*.parquet"}]), "x") == names
    assert fineweb.choose_text(Info(names, [{"config_name": "x", "data_files": [{"path": "b/*"}]}]), "x") == names[3:]


def test_files_without_a_card():
    assert fineweb.choose_text(Info(["x/constraints.parquet", "x/0.parquet", "x/test.parquet"]), "x") == [
        "x/constraints.parquet",
        "x/0.parquet",
    ]
    info = Info(["plain_text/train-0.parquet", "plain_text/test-0.parquet", "other/0.jsonl.gz", "other/0.bin"])
    assert fineweb.choose_text(info, "plain_text") == ["plain_text/train-0.parquet"]
    assert fineweb.choose_text(info, "other") == ["other/0.jsonl.gz"]
    assert fineweb.choose_text(info, None) == ["plain_text/train-0.parquet"]
    with pytest.raises(ValueError, match="under the name 'more'; choose --name: other, plain_text"):
        fineweb.choose_text(info, "more")
    with pytest.raises(ValueError, match="it has none at all"):
        fineweb.choose_text(Info(["a.py"]), None)


@pytest.mark.parametrize(
    "options, out",
    [
        ("", "shards/fineweb_edu_10B"),
        ("--name sample-100BT", "shards/fineweb_edu_100B"),
        ("--name CC-MAIN-2024-10", "shards/fineweb_edu_CC_MAIN_2024_10"),
        ("--dataset Skylion007/openwebtext", "shards/openwebtext"),
        ("--dataset HuggingFaceFW/fineweb --name sample-10BT", "shards/fineweb_10B"),
        ("--pretokenized", "shards/fineweb_edu_10B"),
        ("--pretokenized --dataset kjj0/fineweb10B-gpt2", "shards/fineweb10B_gpt2"),
    ],
)
def test_where_shards_go(options, out):
    assert fineweb.parse_arguments(options.split()).out == out


# ---- Ready-made shards -----------------------------------------------------------------------------------------------


def ready_made(tokens: np.ndarray) -> bytes:
    return struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + tokens.astype("<u2").tobytes()


@pytest.fixture
def ready(hub):
    """Five published shards of 1000 tokens, ten documents each."""
    shards = {f"edu_train_{n:06d}.bin": np.arange(1000) + n for n in range(1, 5)}
    shards["edu_val_000000.bin"] = np.arange(1000)
    for tokens in shards.values():
        tokens[::100] = 50256
    at(hub).files = {name: ready_made(tokens) for name, tokens in shards.items()} | {"README.md": b""}
    at(hub).configs = []
    return shards


def test_ready_made_shards(hub, ready, tmp_path):
    out = tmp_path / "out"
    at(hub).trouble = {"edu_train_000001.bin": ["drop"]}
    run = fetch(hub, out, "--pretokenized", "--max_tokens", "3000")
    assert run.returncode == 0, run.stderr
    names = ["edu_train_000001.bin", "edu_train_000002.bin", "edu_val_000000.bin"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "meta.json"]
    assert all(np.array_equal(read_shard(out / name), ready[name]) for name in names)
    meta = data.read_meta(out)
    assert meta["complete"] and meta["tokenizer"] == "gpt2" and meta["documents"] == 30
    assert meta["tokens"] == {"train": 2000, "val": 1000}
    assert len(data.open_shards(out, "train")) == 2
    assert "already made" in fetch(hub, out, "--pretokenized", "--max_tokens", "3000").stdout
    half = fetch(hub, tmp_path / "half", "--pretokenized", "--part", "1/2")
    assert "part 1 of 2 is done; 3 of 5 files are there" in half.stdout, half.stderr
    assert not list((tmp_path / "half" / "downloads").rglob("*.bin"))
    assert "max_tokens 3000 -> 4000" in fails(hub, out, "--pretokenized", "--max_tokens", "4000")


@pytest.mark.parametrize(
    "content, message",
    [
        (ready_made(np.arange(1000))[:-2], "its header promises 1000 tokens, the file holds 999"),
        (ready_made(np.full(9, 50257)), "edu_train_000002.bin: holds the id 50257, where GPT-2's end at 50256"),
        (b"\0" * 3000, "not a token shard"),
    ],
    ids=["short", "ids", "header"],
)
def test_published_shards_that_are_none(hub, ready, tmp_path, content, message):
    at(hub).files["edu_train_000002.bin"] = content
    assert message in fails(hub, tmp_path / "out", "--pretokenized")
    assert not (tmp_path / "out" / "edu_train_000002.bin").exists()


def test_ready_made_shards_that_are_in_the_cache_stay_there(hub, ready, tmp_path):
    before = "from huggingface_hub import hf_hub_download as get\n"
    before += f"get('{DATASET}', 'edu_train_000001.bin', repo_type='dataset', revision='{COMMIT}')"
    for out in (tmp_path / "a", tmp_path / "b"):
        run = fetch(hub, out, "--pretokenized", "--max_tokens", "2000", before=before)
        assert run.returncode == 0, run.stderr
        assert not (out / "edu_train_000001.bin").is_symlink()
        assert np.array_equal(read_shard(out / "edu_train_000001.bin"), ready["edu_train_000001.bin"])


def test_pretokenized_wants_shards(hub, tmp_path):
    assert "no token shards there" in fails(hub, tmp_path / "out", "--pretokenized")
    at(hub).files = {f"{folder}/edu_train_000001.bin": ready_made(np.arange(9)) for folder in ("10B", "100B")}
    assert "shards of the same name in several folders" in fails(hub, tmp_path / "out", "--pretokenized")


def test_pretokenized_wants_more_than_validation(hub, ready, tmp_path):
    line = fails(hub, tmp_path / "out", "--pretokenized", "--max_tokens", "500")
    assert "--max_tokens=500: the first shard, for validation, has as many" in line
