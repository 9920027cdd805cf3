"""fineweb.py against a small hub on loopback, with the real clients and real files; and failures of
both.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import random
import re
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fineweb
from parts import data
from parts.documents import zstd
from parts.tokenizer import get_tokenizer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import clean_environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "some/texts"
SECOND = "sample/tiny/001_00000.parquet"


class Hub(BaseHTTPRequestHandler):
    """A hub with one dataset, as huggingface_hub and datasets see it: its commit, tree, and files.

    files: name -> content. trouble: name -> what goes wrong at each of the next requests: a code of
    HTTP, "corrupt" or "drop". delay: seconds between chunks. requests: what was asked for. silent:
    requests with this in their path are accepted and never answered.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        if self.silent and self.silent in path:
            time.sleep(600)
        api, _, rest = path.partition(f"/api/datasets/{DATASET}/")
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if not api and rest in ("revision/main", f"revision/{COMMIT}"):
            self.answer(200, json.dumps({"id": DATASET, "sha": COMMIT, "siblings": []}).encode())
        elif not api and rest.startswith(f"tree/{COMMIT}"):
            self.answer(200, json.dumps(self.tree(rest.partition(COMMIT)[2].strip("/"))).encode())
        elif name in self.files:
            self.answer_file(name, self.files[name])
        elif "/resolve/" in path:
            self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def tree(self, folder: str) -> list[dict]:
        """The entries of a folder and of all folders below it."""
        entries = {}
        for name, content in self.files.items():
            if name.startswith(folder):
                for parent in map(str, Path(name).parents):
                    entries[parent] = {
                        "type": "directory",
                        "path": parent,
                        "oid": "1" * 40,
                        "size": 0,
                    }
                lfs = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
                entries[name] = {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": "0" * 40,
                    "lfs": lfs,
                }
        return list(entries.values())

    def answer_file(self, name: str, content: bytes) -> None:
        trouble = self.trouble.get(name, [])
        wrong = ""
        if trouble and self.command == "GET":
            wrong = trouble.pop(0)
        if isinstance(wrong, int):
            self.answer(wrong)
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if wrong == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        code = 200
        first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if first > 0:
            code = 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.answer(code, content[first:], headers, drop=wrong == "drop")

    def answer(self, code: int, content: bytes = b"", headers=None, drop: bool = False) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        n_bytes = len(content)
        if self.command == "HEAD":
            n_bytes = 0
        elif drop:
            n_bytes //= 2
            self.close_connection = True
        for start in range(0, n_bytes, 20_000):
            self.wfile.write(content[start : min(n_bytes, start + 20_000)])
            time.sleep(self.delay)


def draw_documents(seed: int, n: int) -> list[str]:
    """Texts as they come: short and long, an empty one, one long word, one that names the
    end-of-text token.
    """
    rng = random.Random(seed)
    words = "the quick brown naïve fox ☃ don't 1234 jumps\n\nover <|endoftext|> 漢字 lazy\tdogs"
    texts = [" ".join(rng.choices(words.split(" "), k=rng.randrange(1, 400))) for _ in range(n)]
    texts[1:4] = ["", "x" * 3000, "one <|endoftext|> two"]
    return texts


def write_parquet(texts) -> bytes:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=40)
    return sink.getvalue().to_pybytes()


def write_jsonl(texts) -> bytes:
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    return "".join(lines).encode()


def write_csv_with_semicolons(texts) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=";").writerows([("id", "text"), *enumerate(texts)])
    return file.getvalue().encode()


def write_zstd_in_two_frames(texts) -> bytes:
    """As parallel programs write it: a reader that stops after the first frame loses most of it."""
    lines = write_jsonl(texts)
    first = pa.compress(lines[:5000], "zstd", asbytes=True)
    second = pa.compress(lines[5000:], "zstd", asbytes=True)
    return first + second


FORMATS = {
    "parquet": write_parquet,
    "csv": write_csv_with_semicolons,
    "jsonl.zst": write_zstd_in_two_frames,
}
TEXTS = [draw_documents(seed, 100) for seed in range(3)]
SUBSETS = {"tiny": "sample/tiny/*", "other": "sample/other/*"}
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {name}\n  sep: ;\n  data_files:\n  - split: train\n    path: {path}\n"
    for name, path in SUBSETS.items()
)


def make_tiny(format: str) -> dict[str, bytes]:
    """The three files of the subset `tiny`: name -> content."""
    files = {}
    for i, texts in enumerate(TEXTS):
        files[f"sample/tiny/{i:03d}_00000.{format}"] = FORMATS[format](texts)
    return files


@pytest.fixture
def hub():
    """A hub with one dataset; its subset `tiny` has three files."""
    files = make_tiny("parquet") | {"README.md": f"{CARD}---\n".encode()}
    files["sample/other/000.parquet"] = write_parquet(["of another subset"] * 9)
    settings = dict(files=files, trouble={}, delay=0.0, requests=[], silent="")
    settings["log_message"] = lambda *_: None
    handler = type("ThisHub", (Hub,), settings)
    handler.serving = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.serving.daemon_threads = True
    handler.serving.block_on_close = False
    handler.serving.handle_error = lambda *_: None  # a killed client hangs up
    threading.Thread(target=handler.serving.serve_forever, daemon=True).start()
    yield handler
    handler.serving.shutdown()
    handler.serving.server_close()


def start(hub, out: Path, *options: str, name="tiny", before="") -> subprocess.Popen:
    """Start fineweb.py in a process of its own, with small shards.

    It does not wait before it repeats a download. `before` is Python code to run first.
    """
    script = f"""
import sys, fineweb
from parts import data, hub, sharding
fineweb.WAIT = 0
{before}
fineweb.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, "--dataset", DATASET, "--out", str(out)]
    command += ["--workers", "1"]
    if "--pretokenized" not in options:
        command += ["--name", name, "--shard_tokens", "9000"]
    environment = clean_environment(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.serving.server_address[1]}",
        HF_HOME=str(out.parent / "home"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_UPDATE_DOWNLOAD_COUNTS="0",
    )
    return subprocess.Popen(
        [*command, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(hub, out: Path, *options: str, code=0, **more) -> str:
    """Run fineweb.py, which must end with this exit code; return what it prints."""
    process = start(hub, out, *options, **more)
    printed = "".join(process.communicate(timeout=120))
    assert process.returncode == code, printed
    assert "Traceback" not in printed, printed
    return printed


def fails(hub, out: Path, *options: str, **more) -> str:
    """Run fineweb.py, which must end with exit code 2 and one line of its own; return the line."""
    printed = fetch(hub, out, *options, code=2, **more).splitlines()
    [line] = [line for line in printed if line.startswith("fineweb.py: ")]
    return line


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """The shards of TEXTS, made by a plain loop: names and tokens."""
    encode = get_tokenizer("gpt2").encoding.encode_ordinary
    shards = {}
    for i, texts in enumerate(TEXTS):
        tokens = []
        for text in texts:
            if text:
                tokens += [50256, *encode(text)]
        for n, start in enumerate(range(0, len(tokens), 9000)):
            if i == n == 0:  # the very first shard is for validation
                name = "out_val_000000.bin"
            elif i == 0:
                name = f"out_train_000{n:03d}.bin"
            else:  # in the other files, shards count from 1
                name = f"out_train_{i:03d}{n + 1:03d}.bin"
            shards[name] = np.array(tokens[start : start + 9000], dtype=np.uint16)
    return shards


def assert_made(out: Path, reference: dict[str, np.ndarray]) -> None:
    """The folder is complete, and its shards and number of documents are the reference's."""
    meta = data.read_meta(out)
    assert meta["complete"]
    n_documents = sum(np.count_nonzero(tokens == 50256) for tokens in reference.values())
    assert meta["documents"] == n_documents
    names = {path.name for path in out.iterdir()}
    assert names - {".lock"} == {*reference, "meta.json"}
    for name, tokens in reference.items():
        assert np.array_equal(data.open_shard(out / name).tokens, tokens), name


# ---- What is made --------------------------------------------------------------------------------


def test_shards_equal_those_of_a_plain_loop(hub, tmp_path, reference):
    """Also if a download breaks off, is refused or comes wrong once: it is repeated."""
    out = tmp_path / "out"
    hub.trouble = {SECOND: ["drop", 429], "sample/tiny/002_00000.parquet": ["corrupt"]}
    fetch(hub, out)
    assert not any(hub.trouble.values())  # all of the trouble happened
    assert_made(out, reference)
    source = data.read_meta(out)["source"]
    assert source["commit"] == COMMIT and len(source["files"]) == 3
    assert not list((tmp_path / "home").rglob("*.parquet"))  # the use of disk is bounded
    hub.requests.clear()
    assert "already made" in fetch(hub, out)
    assert not hub.requests


@pytest.mark.parametrize("format", ["json", "json.gz", "csv.xz", "jsonl.zst"])
def test_the_same_rows_under_another_name_give_the_same_shards(hub, tmp_path, reference, format):
    """Law 13 of CONTRIBUTING.md, also where a later row has one more key, and half a surrogate."""
    files = {"README.md": hub.files["README.md"]}
    for i, texts in enumerate(TEXTS):
        lines = write_jsonl(texts) + b'{"more": "\\ud83d", "text": null}\n'
        if format.startswith("csv"):
            lines = write_csv_with_semicolons(texts)
        packed = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd.compress}
        content = packed.get(format.rpartition(".")[2], bytes)(lines)
        files[f"sample/tiny/{i:03d}_00000.{format}"] = content
    hub.files = files
    fetch(hub, tmp_path / "out")
    assert_made(tmp_path / "out", reference)


# Two parts that tokenise until both are ready, and then count the files at the same time.
TOGETHER = """
import os, pathlib, time
tokenise_files = fineweb.tokenise_files
def tokenise_both(arguments, out, *rest):
    tokenise_files(arguments, out, *rest)
    (out.parent / f"{os.getpid()}.ready").touch()
    while len(list(out.parent.glob("*.ready"))) < 2:
        time.sleep(0.01)
fineweb.tokenise_files = tokenise_both
"""


def test_parts_make_the_same_bytes(hub, tmp_path, reference):
    """Three machines at one folder, the last two at the same time."""
    out = tmp_path / "out"
    assert "part 1 of 3 is done; 1 of 3 files are there" in fetch(hub, out, "--part", "1/3")
    with pytest.raises(ValueError, match="still being written"):
        data.open_shards(out, "train")
    options = ["--workers", "2", "--part"]
    second = start(hub, out, *options, "2/3", before=TOGETHER)
    third = start(hub, out, *options, "3/3", before=TOGETHER)
    printed = ["".join(process.communicate(timeout=120)) for process in (second, third)]
    assert second.returncode == third.returncode == 0, printed
    # One of them has finished the folder, not both.
    assert sum("another part has finished the folder" in text for text in printed) == 1
    assert_made(out, reference)


def was_downloaded(hub, part_of_name: str) -> bool:
    return any("resolve" in request and part_of_name in request for request in hub.requests)


def test_max_tokens_is_the_beginning(hub, tmp_path, reference):
    out = tmp_path / "out"
    fetch(hub, out, "--max_tokens", "20000")
    expected = {
        "out_val_000000.bin": reference["out_val_000000.bin"],
        "out_train_000001.bin": reference["out_train_000001.bin"],
        "out_train_000002.bin": reference["out_train_000002.bin"][:2000],
    }
    assert_made(out, expected)
    assert not was_downloaded(hub, "001_00000")

    # Five tokens of the second file.
    across = tmp_path / "across"
    in_first_file = sum(len(tokens) for name, tokens in reference.items() if "_000" in name)
    fetch(hub, across, "--max_tokens", str(in_first_file + 5))
    last = data.open_shard(across / "across_train_001001.bin").tokens
    assert np.array_equal(last, reference["out_train_001001.bin"][:5])

    # Fewer than a shard has: a tenth is for validation.
    few = tmp_path / "few"
    fetch(hub, few, "--max_tokens", "50")
    assert data.read_meta(few)["tokens"] == {"train": 45, "val": 5}


def test_kept_downloads_are_used_again_and_checked(hub, tmp_path, reference):
    out = tmp_path / "out"
    fetch(hub, out, "--keep_downloads")
    kept = list((tmp_path / "home").rglob("*.parquet"))
    assert len(kept) == 3
    out.rename(tmp_path / "first")
    kept[0].resolve().write_bytes(b"junk")
    hub.requests.clear()
    fetch(hub, out, "--keep_downloads")
    assert_made(out, reference)
    # Only the damaged file was downloaded again.
    assert len({request for request in hub.requests if re.match("GET .*parquet", request)}) == 1
    assert all(path.exists() for path in kept)


# ---- What goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, kills",
    [
        ("parquet", 3),
        pytest.param("csv", 2, marks=pytest.mark.torture),
        pytest.param("jsonl.zst", 2, marks=pytest.mark.torture),
        pytest.param("parquet", 12, marks=pytest.mark.torture),
    ],
)
def test_killed_and_run_again_ends_with_the_same_bytes(hub, tmp_path, reference, format, kills):
    """Law 8 of CONTRIBUTING.md: killed with -9 during the download and between shards, the same
    command ends with the same bytes.
    """
    rng = random.Random(0)
    out = tmp_path / "[1]" / "out"  # the name has the marks of a pattern
    out.parent.mkdir()
    hub.delay = 0.02
    hub.files = make_tiny(format) | {"README.md": hub.files["README.md"]}
    small_pieces = "sharding.PIECE_BYTES = 2000"
    slow = f"""
import time
{small_pieces}
tokenise = sharding.tokenise
def tokenise_slowly(*arguments, **keywords):
    time.sleep(0.02)
    return tokenise(*arguments, **keywords)
sharding.tokenise = tokenise_slowly
"""

    def download_has_begun() -> bool:
        return any("GET" in request and "_00000." in request for request in hub.requests)

    names: set[str] = set()
    for attempt in range(kills):
        with start(hub, out, before=slow) as process:
            # Kill it after a download has begun, or one or two shards are new.
            while process.poll() is None:
                if attempt == 0 and download_has_begun():
                    break
                if len(list(out.glob("*.bin"))) > len(names) + attempt % 2:
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        names_now = {path.name for path in out.glob("*.bin")}
        assert names_now >= names
        names = names_now
        for name in names:
            assert np.array_equal(data.open_shard(out / name).tokens, reference[name])
    assert names
    fetch(hub, out, before=small_pieces)
    assert_made(out, reference)


@pytest.mark.parametrize(
    "wrong, message", [("corrupt", "differs from the hub's file"), (404, "404"), (503, "503")]
)
def test_a_download_that_fails_again_is_one_line_and_nothing_is_lost(
    hub, tmp_path, reference, wrong, message
):
    out = tmp_path / "out"
    hub.trouble = {SECOND: [wrong] * 99}
    line = fails(hub, out)
    assert SECOND in line
    assert message in line
    # All shards of the first file are there, and none of the second's.
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert times.keys() == {name for name in reference if "_000" in name}

    hub.trouble = {}
    hub.requests.clear()
    fetch(hub, out)
    assert_made(out, reference)
    # The first file was not tokenised again, or downloaded; nor was the dataset listed.
    for name, time_ in times.items():
        assert (out / name).stat().st_mtime_ns == time_
    assert not was_downloaded(hub, "000_00000")
    assert not any("/api/" in request for request in hub.requests)


def test_no_network_is_one_line(hub, tmp_path):
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'"
    assert "offline" in fails(hub, tmp_path / "out", before=offline).lower()
    hub.serving.shutdown()
    hub.serving.server_close()
    do_not_wait = "import time; time.sleep = lambda seconds: None"
    assert "fineweb.py: some/texts: " in fails(hub, tmp_path / "out", before=do_not_wait)


@pytest.mark.parametrize("silent", ["/revision/", "/tree/", "README.md", "000_00000"])
def test_a_hub_that_does_not_answer_ends_in_one_line(hub, tmp_path, silent):
    hub.silent = silent
    impatient = """
import time
hub.PATIENCE = 0.2
time.sleep = lambda seconds: None
"""
    assert fails(hub, tmp_path / "out", before=impatient)
    assert any(silent in request for request in hub.requests)


def test_mistakes_in_the_command_are_one_line(hub, tmp_path):
    out = tmp_path / "out"  # one folder: nothing is made there
    line = fails(hub, out, "--text_column", "body")
    assert "'body' among id (int64), text (string); choose with --text_column" in line
    assert "'tinny' not found. Available: ['tiny', 'other']" in fails(hub, out, name="tinny")
    assert "404" in fails(hub, out, "--dataset", "some/typo")
    line = fails(hub, out, "--shard_tokens", "100000000", name="other")
    assert "all 36 tokens are for validation" in line and "--shard_tokens=1" in line


def test_mistakes_in_a_dataset_are_one_line(hub, tmp_path):
    """Each in a home of its own, as all have the same commit, and the clients keep what they
    got.
    """
    card = hub.files["README.md"]

    def fails_with(name: str, files: dict[str, bytes], *options: str) -> str:
        hub.files = {"README.md": card} | files
        (tmp_path / name).mkdir()
        return fails(hub, tmp_path / name / "out", *options)

    tables = make_tiny("csv")
    line = fails_with("column", tables, "--text_column", "body")
    assert "no text in the column 'body' among id, text; choose with --text_column" in line
    cut = {name: content[:-100] for name, content in make_tiny("jsonl.zst").items()}
    line = fails_with("damaged", cut)
    assert "sample/tiny/000_00000.jsonl.zst: Compressed file ended before" in line
    line = fails_with("script", {"texts.py": b"raise SystemExit(3)"})
    assert "Dataset scripts are no longer supported" in line
    line = fails_with("card", tables | {"README.md": b"---\nconfigs: [{\n---\n"})
    assert "some/texts: while parsing a flow" in line
    line = fails_with("split", tables | {"README.md": card.replace(b"train", b"test")})
    assert "'tiny' has no split named train, only test" in line


@pytest.mark.parametrize(
    "options, message",
    [
        ("--part 3/2", "--part=3/2: must be like 1/4"),
        ("--part 1/2 --max_tokens 900_000_000", "excludes --part"),
        ("--max_tokens 1", "--max_tokens=1: must be at least 2"),
        ("--workers 0", "--workers=0: must be at least 1"),
        ("--pretokenized --name x", "no meaning with --pretokenized"),
    ],
)
def test_impossible_options_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        fineweb.main(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, out",
    [
        ("", "shards/fineweb_edu_10B"),
        ("--name CC-MAIN-2024-10", "shards/fineweb_edu_CC_MAIN_2024_10"),
        ("--pretokenized", "shards/fineweb_edu_10B"),
        ("--dataset HuggingFaceFW/fineweb --name sample-10BT", "shards/fineweb_10B"),
        ("--pretokenized --dataset a/b-gpt2", "shards/b_gpt2"),
    ],
)
def test_where_shards_go(options, out):
    assert fineweb.parse_arguments(options.split()).out == out


# ---- Ready-made shards ---------------------------------------------------------------------------


def write_published_shard(tokens: np.ndarray) -> bytes:
    header = struct.pack("<3i1012x", 20240520, 1, len(tokens))
    return header + tokens.astype("<u2").tobytes()


@pytest.fixture
def published(hub) -> dict[str, np.ndarray]:
    """Five published shards of 1000 tokens, ten documents each: name -> tokens."""
    shards = {}
    hub.files = {"README.md": b""}
    for n in range(5):
        name = f"edu_train_{n:06d}.bin" if n else "edu_val_000000.bin"
        shards[name] = np.arange(1000) + n
        shards[name][::100] = 50256
        hub.files[name] = write_published_shard(shards[name])
    return shards


def test_ready_made_shards(hub, published, tmp_path):
    out = tmp_path / "out"
    hub.trouble = {"edu_train_000001.bin": ["drop"], "edu_train_000002.bin": [404, 404]}
    assert "404" in fails(hub, out, "--pretokenized", "--max_tokens", "3000")
    hub.requests.clear()
    fetch(hub, out, "--pretokenized", "--max_tokens", "3000")
    assert not was_downloaded(hub, "val_000000")  # it was there
    names = ["edu_train_000001.bin", "edu_train_000002.bin", "edu_val_000000.bin"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "meta.json"]
    assert all(
        np.array_equal(data.open_shard(out / name).tokens, published[name]) for name in names
    )
    meta = data.read_meta(out)
    assert meta["complete"]
    assert meta["tokenizer"] == "gpt2"
    assert meta["documents"] == 30
    assert meta["tokens"] == {"train": 2000, "val": 1000}
    assert len(data.open_shards(out, "train")) == 2
    assert "max_tokens 3000 -> 4000" in fails(hub, out, "--pretokenized", "--max_tokens", "4000")


def test_wrong_published_shards_are_one_line(hub, published, tmp_path):
    out = tmp_path / "out"
    missing = "no training shards (..._train_000001.bin) in the first"
    assert f"{missing} 500 tokens" in fails(hub, out, "--pretokenized", "--max_tokens", "500")
    hub.files["edu_train_000002.bin"] = write_published_shard(np.arange(1000))[:-2]
    line = fails(hub, out, "--pretokenized")
    assert "its header promises 1000 tokens (2000 bytes), the file holds 1998" in line
    assert not (out / "edu_train_000002.bin").exists()
    hub.files = {"README.md": b""}
    assert missing in fails(hub, tmp_path / "none", "--pretokenized")


def test_hellaswag_comes_from_the_hub_where_github_does_not_answer(hub, tmp_path):
    endings = ["and", "lifts", "a weight", "over her head"]
    task = {"ctx": "She bends down", "endings": endings, "label": "3"}
    lines = 2 * f"{json.dumps(task)}\n"
    hub.files = {"data/validation-00000-of-00001.jsonl": lines.encode()}
    kept = tmp_path / "kept" / "hellaswag_val.jsonl"
    script = f"""
import hellaswag
hellaswag.URL = "http://127.0.0.1:1"
hellaswag.HUB = {DATASET!r}
hellaswag.FILE = hellaswag.Path({str(kept)!r})
try:
    hellaswag.fetch()
except ValueError as error:
    assert "2 tasks instead of 10,042" in str(error) and not hellaswag.FILE.exists(), error
hellaswag.N_TASKS = 2
print(len(hellaswag.examples()))
sys.exit()"""
    printed, errors = start(hub, tmp_path / "out", before=script).communicate(timeout=120)
    assert printed == "2\n", errors
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [task, task]


slow_to_give_up = pytest.param("validation-00000", marks=pytest.mark.torture)


@pytest.mark.parametrize("silent", ["/revision/", "/tree/", "README.md", slow_to_give_up])
def test_hellaswags_wait_for_a_hub_that_does_not_answer_ends(hub, tmp_path, silent):
    hub.files = {"README.md": b"", "data/validation-00000-of-00001.parquet": write_parquet(["a"])}
    hub.silent = silent
    script = f"""
import time
import hellaswag
hellaswag.URL = "http://127.0.0.1:1"
hellaswag.HUB = {DATASET!r}
hellaswag.FILE = hellaswag.Path("nowhere")
hub.PATIENCE = 0.2
time.sleep = lambda seconds: None
try:
    hellaswag.fetch()
except ValueError as error:
    print(error)
sys.exit()"""
    printed, errors = start(hub, tmp_path / "out", before=script).communicate(timeout=60)
    assert f"nor from the hub's {DATASET} (" in printed, errors
    assert any(silent in request for request in hub.requests)
