"""Documents to shards: reading, the split, the shards, interruptions, and the command."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import clean_environment
from hypothesis import given
from hypothesis import strategies as st

import prepare
from parts import data, sharding
from parts import tokenizer as tokenizer_room
from parts.documents import find_files
from parts.files import write_whole
from parts.sharding import Split, lock_shard_folder
from parts.tokenizer import get_tokenizer


def small_pieces(monkeypatch, n_bytes: int) -> None:
    """Workers get so many bytes of text at a time."""
    monkeypatch.setattr(sharding, "PIECE_BYTES", n_bytes)
    monkeypatch.setattr(tokenizer_room, "PIECE_BYTES", n_bytes)


def make(tmp_path: Path, files: dict[str, str | bytes], *options: str) -> Path:
    """Write files into a folder, run prepare.py on it, and return the shard folder."""
    for name, content in files.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    prepare.main([str(tmp_path / "text"), "--out", str(tmp_path / "out"), *options])
    return tmp_path / "out"


def fails(capsys, *argv: str, code=2) -> str:
    """Run prepare.py, which must end with this exit code and one line; return the line."""
    with pytest.raises(SystemExit) as exit_:
        prepare.main(list(argv))
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare.py: ")
    ]
    assert exit_.value.code == code and len(lines) == 1
    return lines[0]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def read_back(out: Path, split: str) -> list[str]:
    tokens = np.concatenate([shard.tokens for shard in data.open_shards(out, split)])
    tokenizer = data.tokenizer_of_shards(out)
    starts = np.flatnonzero(tokens == tokenizer.end_of_text)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


# ---- Shards and split ----------------------------------------------------------------------------


@given(st.integers(1, 500), st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.5]))
def test_one_document_of_each_block_is_for_validation(n, fraction):
    split = Split(round(1 / fraction))
    drawn = [i for i in range(n) if split.find_ends(b"x", i) == {"val": 1}]
    blocks = [i // split.stride for i in drawn]
    assert blocks in (
        list(range(n // split.stride)),
        list(range(-(-n // split.stride))),
    )  # the last one is not whole


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_shards_decode_back_to_the_documents(tmp_path, tokenizer):
    """Every document of both splits, each after an end of text, in the order of the file names;
    shards of one size.
    """
    files = {f"{i:02d}.txt": f"Document {i}: naïve ☃\n" * (i + 1) for i in range(24)}
    options = ("--tokenizer", tokenizer, "--val_fraction", "0.25", "--shard_tokens", "200")
    out = make(tmp_path, files | {"empty.txt": ""}, *options)
    meta, found = data.read_meta(out), []
    for split, n in (("train", 18), ("val", 6)):
        documents = read_back(out, split)
        assert len(documents) == n and documents == sorted(documents, key=len)  # their order
        assert meta["tokens"][split] == sum(
            len(shard.tokens) for shard in data.open_shards(out, split)
        )
        found += documents
    assert sorted(found) == sorted(files.values())
    assert meta["documents"] == 24 and meta["complete"] is True
    assert meta["vocab_size"] == get_tokenizer(tokenizer).vocab_size
    for rows in meta["shards"].values():
        assert len(rows) > 2 and [row["tokens"] for row in rows[:-1]] == [200] * (len(rows) - 1)
        for row in rows:
            assert hashlib.sha256((out / row["file"]).read_bytes()).hexdigest() == row["sha256"]


def test_few_documents_give_their_tails(tmp_path):
    rows = ["ab cd ef gh " * 50, "", None, "漢字" * 91, "字"]
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"text": rows}), tmp_path / "text" / "t.parquet")
    files = {"book.txt": "abcdefghij" * 10, "empty.txt": ""}
    out = make(tmp_path, files, "--tokenizer", "bytes", "--val_fraction", "0.1")
    train, val = (read_back(out, split) for split in ("train", "val"))
    assert [head + tail for head, tail in zip(train, [*val, ""])] == [
        files["book.txt"],
        rows[0],
        rows[3],
        "字",
    ]
    # A tenth; it begins at white space if there is some, else at a character.
    assert val == ["abcdefghij", " cd ef gh " + "ab cd ef gh " * 4, "漢字" * 9]
    assert data.read_meta(out)["documents"] == 4
    assert Split(tail=0.5).find_ends(b"a", 0) == {
        "train": 1,
        "val": 1,
    }  # training has something of each


ROWS = [f"Row {i}: naïve ☃\n" * (i % 7) for i in range(200)]  # every seventh is empty


def tables(folder: Path) -> list[str]:
    """The same rows as .jsonl, .jsonl.gz and .parquet, and a text file."""
    folder.mkdir(exist_ok=True)
    lines = "".join(
        json.dumps({"n": i, "body": text or None}) + "\n" * (1 + i % 2)
        for i, text in enumerate(ROWS)
    )
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(
        pa.table({"n": range(200), "body": [text or None for text in ROWS]}),
        folder / "c.parquet",
        30,
    )
    (folder / "d.txt").write_text("a text file\n" * 5000)
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]


def test_rows_are_documents(tmp_path):
    paths = tables(tmp_path / "tables")
    prepare.main(
        [*paths, "--out", str(tmp_path / "out"), "--text_column", "body", "--val_fraction", "0"]
    )
    texts = [text for text in ROWS if text]
    assert read_back(tmp_path / "out", "train") == [
        *texts,
        *texts,
        *texts,
        "a text file\n" * 5000,
    ]
    assert data.read_meta(tmp_path / "out")["source"]["text_column"] == "body"


# By documents, and by tails.
@pytest.mark.parametrize(
    "val_fraction, tokenizer", [("0.1", "bytes"), ("0.001", "bytes"), ("0.1", "300")]
)
def test_any_number_of_workers_makes_the_same_bytes(tmp_path, val_fraction, tokenizer, monkeypatch):
    paths = tables(tmp_path / "tables")
    small_pieces(monkeypatch, 4000)
    options = f"--shard_tokens 3000 --val_fraction {val_fraction} --tokenizer {tokenizer} --text_column body".split()
    made = []
    for workers in ("1", "3"):
        out = tmp_path / workers / "out"
        prepare.main([*paths, "--out", str(out), *options, "--workers", workers])
        made.append(contents(out))
    assert made[0] == made[1] and len(made[0]) > 10


def test_text_that_is_not_utf8(tmp_path):
    """GPT-2's tokens are of text: invalid bytes become U+FFFD. The bytes tokenizer keeps them."""
    latin, column = (
        b"na\xefve caf\xe9 " * 40,
        pa.array([b"caf\xe9", "ünïcode".encode()], pa.binary()),
    )
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "text" / "a.parquet")
    files = {"b.jsonl": r'{"text": "a lone surrogate: \ud800"}', "c.txt": latin}
    out = make(tmp_path, files, "--val_fraction", "0")
    expected = ["caf\ufffd", "ünïcode", "a lone surrogate: ?", latin.decode(errors="replace")]
    assert read_back(out, "train") == expected
    out = make(tmp_path / "b", {"c.txt": latin}, "--val_fraction", "0", "--tokenizer", "bytes")
    assert bytes(data.open_shards(out, "train")[0].tokens[1:].tolist()) == latin


# ---- Interruptions -------------------------------------------------------------------------------

FILES = {f"{i:02d}.txt": "".join(f"{i},{k}\n" for k in range(i * 37 % 180 + 2)) for i in range(60)}
OPTIONS = ("--shard_tokens", "1500", "--val_fraction", "0.25", "--tokenizer")


@pytest.mark.parametrize("tokenizer", ["bytes", "300"])
def test_interrupted_at_every_write_and_run_again_ends_with_the_same_bytes(
    tmp_path, monkeypatch, tokenizer
):
    """Law 8 of CONTRIBUTING.md: stopped at the first file that is written, then at the second, and
    so on, all in one folder.
    """
    small_pieces(monkeypatch, 700)
    out = make(tmp_path, FILES, *OPTIONS, tokenizer)
    whole, write, left = contents(out), write_whole, 0
    shutil.rmtree(out)

    def stopped(path, *content):
        nonlocal left
        if left == 0:
            path.with_name(path.name + ".0a.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        left -= 1
        write(path, *content)

    for room in (data, sharding, prepare):
        monkeypatch.setattr(room, "write_whole", stopped)
    for attempt in range(99):
        left = attempt
        try:
            make(tmp_path, FILES, *OPTIONS, tokenizer)
            break
        except SystemExit as exit_:
            assert exit_.code == 130
        assert all(path.read_bytes() == whole[path.name] for path in out.glob("*.bin"))
        with pytest.raises(ValueError, match=r"no train shards|interrupted|no folder"):
            data.open_shards(out, "train")
    assert attempt > 5 and len(whole) > 10 and contents(out) == whole


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """A run that continues tokenises at most one shard and one piece again, and writes no shard
    again.
    """
    small_pieces(monkeypatch, 500)
    files = {"a.txt": "some text\n" * 1999 + "some text"}
    options = ("--tokenizer", "bytes", "--shard_tokens", "2000", "--val_fraction", "0")
    tokenise, seen = sharding.tokenise, []

    def counted(piece, tokenizer_name):
        seen.append(sum(len(segment.text) for segment in piece))
        if sum(seen) > 15_000:
            raise KeyboardInterrupt
        return tokenise(piece, tokenizer_name)

    monkeypatch.setattr(sharding, "tokenise", counted)
    with pytest.raises(SystemExit, match="130"):
        make(tmp_path, files, *options)
    seen.clear()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    make(tmp_path, files, *options)
    assert 20_000 - 15_000 < sum(seen) <= 20_000 - 15_000 + 2000 + 2 * 500
    assert len(before) == 7 and all(
        path.stat().st_mtime_ns == time for path, time in before.items()
    )
    assert [row["tokens"] for row in data.read_meta(tmp_path / "out")["shards"]["train"]] == [
        2000
    ] * 10  # no empty one


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    monkeypatch.setattr(sharding, "prepare_worker", os._exit)
    options = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "2"]
    assert "a worker process was killed (out of memory?)" in fails(
        capsys, str(tmp_path / "a.txt"), *options
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize(
    "how, seconds", [(signal.SIGINT, 0.0), (signal.SIGINT, 0.1), (signal.SIGKILL, 0.5)]
)
def test_workers_end_with_their_parent(tmp_path, how, seconds):
    """Ctrl-C is one line, also while the workers start: a terminal sends it to them too. kill -9
    leaves none behind.
    """
    (tmp_path / "a.txt").write_text("some text\n" * 5_000_000)
    script = "import signal, sys, prepare; signal.signal(2, signal.default_int_handler); prepare.main(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]
    options = dict(
        env=clean_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with subprocess.Popen(command, **options) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 3:  # the resource tracker is one
            assert process.poll() is None
        time.sleep(seconds)
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        err = process.communicate(timeout=20)[1].strip()  # it ends when the last worker has
        assert how == signal.SIGKILL or (err, process.returncode) == (
            "prepare.py: interrupted",
            130,
        )


# ---- The command ---------------------------------------------------------------------------------


def test_no_file_of_the_user_is_deleted(tmp_path, capsys):
    """--out that is the input folder, or any folder with something in it, is refused and stays as
    it was.
    """
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("notes_2024.txt", "notes_train_000001.bin"):
        (notes / name).write_text("my notes\n" * 50)
    for out in (notes, tmp_path):
        line = fails(capsys, str(notes / "notes_2024.txt"), "--out", str(out))
        assert (
            "choose a new folder" in line or "no files match" in line
        )  # what lies in --out is no input
    assert len(list(notes.iterdir())) == 2


def test_which_files_are_taken(tmp_path):
    names = [
        "a.py",
        "b.txt",
        "deep/er/c.py",
        "tests/d.py",
        "deep/tests/e.py",
        ".git/f.py",
        "deep/test_g.py",
    ]
    make(tmp_path, dict.fromkeys(names, "some text\n" * 9), "--tokenizer", "bytes")
    out = tmp_path / "text" / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "shard.py").write_text("written by an earlier run")
    found = find_files([str(tmp_path / "text")], "*.py", ["tests", "test_*"], out)
    assert [str(path.relative_to(tmp_path / "text")) for path in found] == ["a.py", "deep/er/c.py"]
    b, a = str(tmp_path / "text" / "**" / "*.txt"), str(tmp_path / "text" / "a.py")
    assert [path.name for path in find_files([b, a, b, a], "*", [], out)] == ["b.txt", "a.py"]


def test_wrong_rows_are_named(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    table = pa.table({"n": range(2000), "body": [f"{i * i} squares" for i in range(2000)]})
    pq.write_table(table, tmp_path / "whole.parquet", compression="zstd")
    whole = (tmp_path / "whole.parquet").read_bytes()
    middle = len(whole) // 2
    no_object = "not a JSON object with text in the column 'body' (choose with --text_column)"
    cases = {
        "a.jsonl": (
            b'{"body": "x"}\n\n{"body": \n',
            f'a.jsonl: line 3: {no_object}: b\'{{"body": ',
        ),
        "b.jsonl": (b'{"body": "x"}\n[1]\n', f"b.jsonl: line 2: {no_object}"),
        "c.jsonl": (b'{"text": "x", "n": 1}\n', f"c.jsonl: line 1: {no_object}"),
        "d.jsonl": (b'{"body": 5}\n', f"d.jsonl: line 1: {no_object}"),
        "deep.jsonl": (b'{"body": ' + b"[" * 100_000, f"deep.jsonl: line 1: {no_object}"),
        "e.jsonl.gz": (
            gzip.compress(b'{"body": "x"}\n' * 1000)[:-9],
            "e.jsonl.gz: Compressed file ended before",
        ),
        "f.jsonl.gz": (b"junk", "f.jsonl.gz: Not a gzipped file"),
        "g.parquet": (b"PAR1 junk", "g.parquet: Parquet"),
        "i.parquet": (
            whole[: middle - 80] + bytes(80) + whole[middle:],
            "i.parquet: ",
        ),  # its index is intact
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert message in fails(capsys, str(tmp_path / name), *out, "--text_column", "body")
    for column in ("text", "n"):
        line = fails(capsys, str(tmp_path / "whole.parquet"), *out, "--text_column", column)
        assert (
            f"whole.parquet: no text in the column '{column}' among n (int64), body (string)"
            in line
        )


def test_only_the_same_command_continues_and_at_the_end_does_nothing(tmp_path, capsys, monkeypatch):
    """The shards of an interrupted run are safe from a command with other options."""
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    options = [str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes", "--shard_tokens"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for where, name in (
        (sharding, "tokenise"),
        (np, "savez"),
    ):  # before the first shard, and after it
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            fails(capsys, *options, "1000", code=130)
        if where is prepare:
            prepare.main([*options, "4000"])  # no shard yet: another command may begin
            shutil.rmtree(out)
    line = fails(capsys, *options, "2000")
    assert "another source (shard_tokens 1000 -> 2000)" in line and "delete that folder" in line
    prepare.main([*options, "1000"])
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare.main([*options, "1000"])  # nothing is left to do
    assert data.read_meta(out)["complete"] and "already made" in capsys.readouterr().out
    assert "(tokenizer bytes -> gpt2)" in fails(capsys, *options, "1000", "--tokenizer", "gpt2")
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_two_commands_at_one_folder_do_not_mix(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    out, source = tmp_path / "out", {"name": "a part"}
    command = [str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes"]
    with lock_shard_folder(out, {"name": "another"}):
        assert "another process makes these shards" in fails(capsys, *command)
    shutil.rmtree(out)
    with (
        lock_shard_folder(out, source, part=1, parts=2),
        lock_shard_folder(out, source, part=2, parts=2),
    ):
        assert "another process" in fails(capsys, *command)
        for part, parts in ((1, 2), (1, 3)):
            with pytest.raises(ValueError, match="another process"):
                lock_shard_folder(out, source, part=part, parts=parts).__enter__()
    with pytest.raises(ValueError, match="name a part -> other"):
        lock_shard_folder(out, {"name": "other"}, part=1, parts=2).__enter__()
    prepare.main(command)  # nothing was written there
    assert data.read_meta(out)["complete"]


def test_bad_input_is_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0binary")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "file").touch()
    assert "nowhere.txt: no such file or folder" in fails(
        capsys, str(tmp_path / "nowhere.txt"), *out
    )
    assert "photo.jpg: binary (NUL bytes), not text; leave it out with --exclude" in fails(
        capsys, str(tmp_path), *out
    )
    assert "no files match '*.md'" in fails(capsys, str(tmp_path), *out, "--glob", "*.md")
    assert "Not a directory" in fails(
        capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "file" / "out")
    )
    for name in ("empty.txt", "a.txt"):  # nothing at all, and nothing for validation
        assert f"{name}: too little text" in fails(capsys, str(tmp_path / name), *out)
    for option in (
        "--val_fraction 0.9",
        "--val_fraction 1e-320",
        "--shard_tokens 0",
        "--tokenizer bert",
        "--tokenizer 299",
    ):
        assert option.split()[0] in fails(capsys, str(tmp_path / "a.txt"), *out, *option.split())
