"""fineweb.py against a small hub on loopback, with the real clients and real files; and failures of
both.
"""

import csv
import hashlib
import io
import json
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

import fineweb
from parts import data
from parts.tokenizer import get_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "some/texts"
SECOND = "sample/tiny/001_00000.parquet"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub and datasets ask for: a dataset's commit, its tree, its files.

    files: name -> content. trouble: name -> what to do wrong at each of the next requests. delay:
    seconds a chunk.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        api, _, rest = path.partition(f"/api/datasets/{DATASET}/")
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if not api and rest in ("revision/main", f"revision/{COMMIT}"):
            self.answer(200, json.dumps({"id": DATASET, "sha": COMMIT, "siblings": []}).encode())
        elif not api and rest.startswith(f"tree/{COMMIT}"):
            self.answer(200, json.dumps(self.tree(rest.partition(COMMIT)[2].strip("/"))).encode())
        elif name in self.files:
            self.answer_file(name, self.files[name])
        else:
            self.answer(
                404,
                headers={
                    "X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
                },
            )

    do_HEAD = do_GET

    def tree(self, folder: str) -> list[dict]:
        folder_entry, entries = {"type": "directory", "oid": "1" * 40, "size": 0}, {}
        for name, content in self.files.items():
            if name.startswith(folder):
                lfs = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
                entries |= {
                    str(parent): folder_entry | {"path": str(parent)}
                    for parent in Path(name).parents
                }
                entries[name] = {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": "0" * 40,
                    "lfs": lfs,
                }
        return list(entries.values())

    def answer_file(self, name: str, content: bytes):
        trouble = self.trouble.get(name, [])
        wrong = trouble.pop(0) if trouble and self.command == "GET" else ""
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        headers |= (
            {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
        )
        if wrong == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if isinstance(wrong, int):
            return self.answer(wrong)
        self.answer(206 if first else 200, content[first:], headers, drop=wrong == "drop")

    def answer(self, code: int, content=b"", headers=None, drop=False):
        self.send_response(code)
        for name, value in ((headers or {}) | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0 if self.command == "HEAD" else len(content) // 2 if drop else len(content)
        for start in range(0, sent, 20_000):
            self.wfile.write(content[start : min(sent, start + 20_000)])
            time.sleep(self.delay)
        self.close_connection |= drop


def documents(seed: int, n: int) -> list[str]:
    """Texts as they come: short and long, an empty one, one long word, one that names the
    end-of-text token.
    """
    rng = random.Random(seed)
    words = (
        "the quick brown naïve fox ☃ don't 1234 jumps\n\nover <|endoftext|> 漢字 lazy\tdogs".split(
            " "
        )
    )
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 400))) for _ in range(n)]
    texts[1:4] = ["", "x" * 3000, "one <|endoftext|> two"]
    return texts


def parquet(texts) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"id": list(range(len(texts))), "text": texts}), sink, row_group_size=40
    )
    return sink.getvalue().to_pybytes()


def jsonl(texts) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)
    ).encode()


def csv_with_semicolons(texts) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=";").writerows([("id", "text"), *enumerate(texts)])
    return file.getvalue().encode()


def zstd_in_two_frames(texts) -> bytes:
    """As parallel programs write it: a reader that stops after the first frame loses most of it."""
    lines = jsonl(texts)
    return b"".join(
        pa.compress(part, "zstd", asbytes=True) for part in (lines[:5000], lines[5000:])
    )


FORMATS = {"parquet": parquet, "csv": csv_with_semicolons, "jsonl.zst": zstd_in_two_frames}
TEXTS = [documents(seed, 100) for seed in range(3)]
SUBSETS = {"tiny": "sample/tiny/*", "other": "sample/other/*"}
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {name}\n  sep: ;\n  data_files:\n  - split: train\n    path: {path}\n"
    for name, path in SUBSETS.items()
)


def tiny(format: str) -> dict[str, bytes]:
    """The three files of the subset `tiny`."""
    return {
        f"sample/tiny/{i:03d}_00000.{format}": FORMATS[format](texts)
        for i, texts in enumerate(TEXTS)
    }


@pytest.fixture
def hub():
    """A hub with one dataset; its subset `tiny` has three files."""
    files = tiny("parquet") | {"README.md": f"{CARD}---\n".encode()}
    files["sample/other/000.parquet"] = parquet(["of another subset"] * 9)
    settings = dict(files=files, trouble={}, delay=0.0, asked=[], log_message=lambda *_: None)
    handler = type("ThisHub", (Hub,), settings)
    handler.serving = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.serving.handle_error = lambda *_: None  # a killed client hangs up
    threading.Thread(target=handler.serving.serve_forever, daemon=True).start()
    yield handler
    handler.serving.shutdown()
    handler.serving.server_close()


def start(hub, out: Path, *options: str, name="tiny", before="") -> subprocess.Popen:
    """fineweb.py in a process of its own, with small shards. It waits for no download to be tried
    again.
    """
    script = f"import sys, fineweb\nfrom parts import data, sharding\nfineweb.WAIT = 0\n{before}\nfineweb.main(sys.argv[1:])"
    plain = [] if "--pretokenized" in options else ["--name", name, "--shard_tokens", "9000"]
    command = [
        "-c",
        script,
        "--dataset",
        DATASET,
        "--out",
        str(out),
        "--workers",
        "1",
        *plain,
        *options,
    ]
    off = dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_UPDATE_DOWNLOAD_COUNTS="0")
    endpoint = f"http://127.0.0.1:{hub.serving.server_address[1]}"
    environment = clean_environment(HF_ENDPOINT=endpoint, HF_HOME=str(out.parent / "home"), **off)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *command], env=environment, **pipes)


def fetch(hub, out: Path, *options: str, code=0, **more) -> str:
    """It must end with this exit code; return what it prints."""
    process = start(hub, out, *options, **more)
    printed = "".join(process.communicate(timeout=120))
    assert process.returncode == code and "Traceback" not in printed, printed
    return printed


def fails(hub, out: Path, *options: str, **more) -> str:
    """It must end with exit code 2 and one line of its own; return the line."""
    printed = fetch(hub, out, *options, code=2, **more).splitlines()
    (line,) = (line for line in printed if line.startswith("fineweb.py: "))
    return line


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """The shards of TEXTS, made by a plain loop: names and tokens."""
    encode, shards = get_tokenizer("gpt2").encoding.encode_ordinary, {}
    for i, texts in enumerate(TEXTS):
        stream = np.array(
            [token for text in texts if text for token in (50256, *encode(text))], dtype=np.uint16
        )
        for n in range(-(-len(stream) // 9000)):
            # The very first is for validation; in the other files, shards count from 1.
            name = f"out_train_{i:03d}{n + (i > 0):03d}.bin" if i or n else "out_val_000000.bin"
            shards[name] = stream[n * 9000 :][:9000]
    return shards


def assert_made(out: Path, reference: dict[str, np.ndarray]) -> None:
    """The folder is complete, and its shards and number of documents are the reference's."""
    meta = data.read_meta(out)
    assert meta["complete"] and meta["documents"] == sum(
        np.count_nonzero(t == 50256) for t in reference.values()
    )
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == sorted(
        [*reference, "meta.json"]
    )
    for name, tokens in reference.items():
        assert np.array_equal(data.open_shard(out / name).tokens, tokens), name


# ---- What is made --------------------------------------------------------------------------------


def test_shards_equal_those_of_a_plain_loop(hub, tmp_path, reference):
    """Also if a download breaks off, is refused or comes wrong once: it is repeated."""
    out = tmp_path / "out"
    hub.trouble = {SECOND: ["drop", 429], "sample/tiny/002_00000.parquet": ["corrupt"]}
    fetch(hub, out)
    assert not any(hub.trouble.values())  # all of it happened
    assert_made(out, reference)
    source = data.read_meta(out)["source"]
    assert source["commit"] == COMMIT and len(source["files"]) == 3
    assert not list((tmp_path / "home").rglob("*.parquet"))  # the use of disk is bounded
    hub.asked.clear()
    assert "already made" in fetch(hub, out) and not hub.asked


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
    both = [
        start(hub, out, "--part", part, "--workers", "2", before=TOGETHER)
        for part in ("2/3", "3/3")
    ]
    said = ["".join(process.communicate(timeout=120)) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (
        sum("another part has finished the folder" in text for text in said) == 1
    )  # one of them, not both
    assert_made(out, reference)


def test_max_tokens_is_the_beginning(hub, tmp_path, reference):
    out, across, few = (tmp_path / name for name in ("out", "across", "few"))
    fetch(hub, out, "--max_tokens", "20000")
    sizes = {"out_val_000000.bin": 9000, "out_train_000001.bin": 9000, "out_train_000002.bin": 2000}
    assert_made(out, {name: reference[name][:size] for name, size in sizes.items()})
    assert not any("001_00000" in request for request in hub.asked if "resolve" in request)
    in_first = sum(len(tokens) for name, tokens in reference.items() if "_000" in name)
    fetch(hub, across, "--max_tokens", str(in_first + 5))
    last = data.open_shard(across / "across_train_001001.bin").tokens
    assert np.array_equal(last, reference["out_train_001001.bin"][:5])
    fetch(hub, few, "--max_tokens", "50")  # fewer than a shard: a tenth for validation
    assert data.read_meta(few)["tokens"] == {"train": 45, "val": 5}


def test_kept_downloads_are_used_again_and_checked(hub, tmp_path, reference):
    fetch(hub, tmp_path / "out", "--keep_downloads")
    damaged, _, _ = kept = list((tmp_path / "home").rglob("*.parquet"))
    (tmp_path / "out").rename(tmp_path / "before")
    damaged.resolve().write_bytes(b"junk")
    hub.asked.clear()
    fetch(hub, tmp_path / "out", "--keep_downloads")
    assert_made(tmp_path / "out", reference)
    files = {
        request for request in hub.asked if request.startswith("GET") and ".parquet" in request
    }
    assert len(files) == 1 and all(path.exists() for path in kept)  # only the damaged one


# ---- What goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, kills",
    [
        ("parquet", 3),
        ("csv", 2),
        ("jsonl.zst", 2),
        pytest.param("parquet", 12, marks=pytest.mark.torture),
    ],
)
def test_killed_and_run_again_ends_with_the_same_bytes(hub, tmp_path, reference, format, kills):
    """Law 8 of CONTRIBUTING.md: killed with -9 during the download and between shards, the same
    command then runs to its end.
    """
    out, rng = tmp_path / "[1]" / "out", random.Random(0)  # a name with the marks of a pattern
    out.parent.mkdir()
    hub.delay, hub.files = 0.02, tiny(format) | {"README.md": hub.files["README.md"]}
    slow = "import time\nsharding.PIECE_BYTES, plain = 2000, sharding.tokenise\n"
    slow += "sharding.tokenise = lambda *a, **k: (time.sleep(0.02), plain(*a, **k))[1]"
    made = set()
    for attempt in range(kills):
        with start(hub, out, before=slow) as process:
            while (
                process.poll() is None
            ):  # until a download has begun, or one or two shards are new
                begun = attempt == 0 and any(
                    "GET" in request and "_00000." in request for request in hub.asked
                )
                if begun or len(list(out.glob("*.bin"))) > len(made) + attempt % 2:
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        now = {path.name for path in out.glob("*.bin")}
        assert now >= made and all(
            np.array_equal(data.open_shard(out / name).tokens, reference[name]) for name in now
        )
        made = now
    assert made
    fetch(hub, out, before="sharding.PIECE_BYTES = 2000")
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
    assert SECOND in line and message in line
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert len(made) == sum(
        "_000" in name for name in reference
    )  # the first file's, and nothing of the second's
    hub.trouble = {}
    hub.asked.clear()
    fetch(hub, out)
    assert_made(out, reference)
    assert all(
        (out / name).stat().st_mtime_ns == time for name, time in made.items()
    )  # not made twice, nor listed:
    assert not any("000_00000" in request or "/api/" in request for request in hub.asked)


def test_no_network_is_one_line(hub, tmp_path):
    assert (
        "offline"
        in fails(
            hub, tmp_path / "out", before="import os; os.environ['HF_HUB_OFFLINE'] = '1'"
        ).lower()
    )
    hub.serving.shutdown()
    hub.serving.server_close()
    assert "fineweb.py: some/texts: " in fails(
        hub, tmp_path / "out", before="import time; time.sleep = lambda s: None"
    )


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
    tables, card = tiny("csv"), hub.files["README.md"]
    cut = {name: content[:-100] for name, content in tiny("jsonl.zst").items()}
    cases = {
        "column": (
            tables,
            "no text in the column 'body' among id, text; choose with --text_column",
        ),
        "damaged": (cut, "sample/tiny/000_00000.jsonl.zst: Compressed file ended before"),
        "script": ({"texts.py": b"raise SystemExit(3)"}, "Dataset scripts are no longer supported"),
        "card": (
            tables | {"README.md": b"---\nconfigs: [{\n---\n"},
            "some/texts: while parsing a flow",
        ),
        "split": (
            tables | {"README.md": card.replace(b"train", b"test")},
            "'tiny' has no split named train, only test",
        ),
    }
    for name, (files, message) in cases.items():
        hub.files = {"README.md": card} | files
        (tmp_path / name).mkdir()
        column = ["--text_column", "body"] if name == "column" else []
        assert message in fails(hub, tmp_path / name / "out", *column)


def test_options(capsys):
    """Impossible ones are one line; and where shards go."""
    cases = {
        "--part 3/2": "--part=3/2: must be like 1/4",
        "--part 1/2 --max_tokens 900_000_000": "excludes --part",
        "--max_tokens 1": "--max_tokens=1: must be at least 2",
        "--workers 0": "--workers=0: must be at least 1",
        "--pretokenized --name x": "no meaning with --pretokenized",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit, match="2"):
            fineweb.main(options.split())
        assert message in capsys.readouterr().err
    cases = {
        "": "edu_10B",
        "--name CC-MAIN-2024-10": "edu_CC_MAIN_2024_10",
        "--pretokenized": "edu_10B",
    }
    cases["--dataset HuggingFaceFW/fineweb --name sample-10BT"] = "10B"
    for options, out in cases.items():
        assert fineweb.parse_arguments(options.split()).out == f"shards/fineweb_{out}"
    assert (
        fineweb.parse_arguments(["--pretokenized", "--dataset", "a/b-gpt2"]).out == "shards/b_gpt2"
    )


# ---- Ready-made shards ---------------------------------------------------------------------------


def ready_made(tokens: np.ndarray) -> bytes:
    return struct.pack("<3i1012x", 20240520, 1, len(tokens)) + tokens.astype("<u2").tobytes()


@pytest.fixture
def ready(hub):
    """Five published shards of 1000 tokens, ten documents each."""
    shards = {f"edu_{'train' if n else 'val'}_{n:06d}.bin": np.arange(1000) + n for n in range(5)}
    for tokens in shards.values():
        tokens[::100] = 50256
    hub.files = {name: ready_made(tokens) for name, tokens in shards.items()} | {"README.md": b""}
    return shards


def test_ready_made_shards(hub, ready, tmp_path):
    out = tmp_path / "out"
    hub.trouble = {"edu_train_000001.bin": ["drop"], "edu_train_000002.bin": [404, 404]}
    assert "404" in fails(hub, out, "--pretokenized", "--max_tokens", "3000")
    hub.asked.clear()
    fetch(hub, out, "--pretokenized", "--max_tokens", "3000")
    assert not any("val_000000" in request for request in hub.asked)  # it was there
    names = ["edu_train_000001.bin", "edu_train_000002.bin", "edu_val_000000.bin"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "meta.json"]
    assert all(np.array_equal(data.open_shard(out / name).tokens, ready[name]) for name in names)
    meta = data.read_meta(out)
    assert meta["complete"] and meta["tokenizer"] == "gpt2" and meta["documents"] == 30
    assert (
        meta["tokens"] == {"train": 2000, "val": 1000} and len(data.open_shards(out, "train")) == 2
    )
    assert "max_tokens 3000 -> 4000" in fails(hub, out, "--pretokenized", "--max_tokens", "4000")


def test_wrong_published_shards_are_one_line(hub, ready, tmp_path):
    out, missing = tmp_path / "out", "no training shards (..._train_000001.bin) in the first"
    assert f"{missing} 500 tokens" in fails(hub, out, "--pretokenized", "--max_tokens", "500")
    hub.files["edu_train_000002.bin"] = ready_made(np.arange(1000))[:-2]
    assert "its header promises 1000 tokens, the file holds 999" in fails(
        hub, out, "--pretokenized"
    )
    assert not (out / "edu_train_000002.bin").exists()
    hub.files = {"README.md": b""}
    assert missing in fails(hub, tmp_path / "none", "--pretokenized")


def test_hellaswag_comes_from_the_hub_where_github_does_not_answer(hub, tmp_path):
    task = dict(
        ctx="She bends down", endings=["and", "lifts", "a weight", "over her head"], label="3"
    )
    hub.files.clear()
    hub.files["data/validation-00000-of-00001.jsonl"] = (2 * f"{json.dumps(task)}\n").encode()
    kept = tmp_path / "kept" / "hellaswag_val.jsonl"
    script = f"""
import hellaswag
hellaswag.URL, hellaswag.HUB, hellaswag.FILE = "http://127.0.0.1:1", {DATASET!r}, hellaswag.Path({str(kept)!r})
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
