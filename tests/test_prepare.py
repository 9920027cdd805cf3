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
from collections.abc import Iterable
from pathlib import Path

import prepare
from parts import data, sharding
from parts import tokenizer as tokenizer_room
from parts.documents import find_files
from parts.files import write_whole
from parts.sharding import Split, lock_shard_folder
from parts.tokenizer import BytePairTokenizer, get_tokenizer, parse_tokenizer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import clean_environment
from hypothesis import given
from hypothesis import strategies as st


def small_pieces(monkeypatch, n_bytes: int) -> None:
    """Give the workers n_bytes of text at a time."""
    monkeypatch.setattr(sharding, "PIECE_BYTES", n_bytes)
    monkeypatch.setattr(tokenizer_room, "PIECE_BYTES", n_bytes)


def make(tmp_path: Path, files: dict[str, str | bytes], *options: str) -> Path:
    """Write files into a folder, run prepare.py on it, and return the shard folder."""
    for name, content in files.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
    out = tmp_path / "out"
    prepare.main([str(tmp_path / "text"), "--out", str(out), *options])
    return out


def fails(capsys, *argv: str, code=2) -> str:
    """Run prepare.py, which must end with this exit code and one line; return the line."""
    with pytest.raises(SystemExit) as exit_:
        prepare.main(list(argv))
    errors = capsys.readouterr().err.splitlines()
    [line] = [line for line in errors if line.startswith("prepare.py: ")]
    assert exit_.value.code == code
    return line


def read_bytes(out: Path) -> dict[str, bytes]:
    """The files of a folder: name -> content."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


def read_times(paths: Iterable[Path]) -> dict[Path, int]:
    """When each file was last written."""
    return {path: path.stat().st_mtime_ns for path in paths}


def decode_documents(out: Path, split: str) -> list[str]:
    """The documents of a split, from the tokens of its shards."""
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
    n_whole_blocks = n // split.stride
    # The last block, if it is not whole, has a drawn document or not.
    assert blocks[:n_whole_blocks] == list(range(n_whole_blocks))
    assert blocks[n_whole_blocks:] in ([], [n_whole_blocks])


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_shards_decode_back_to_the_documents(tmp_path, tokenizer):
    """Every document of both splits, each after an end of text, in the order of the file names;
    shards of one size.
    """
    files = {f"{i:02d}.txt": f"Document {i}: naïve ☃\n" * (i + 1) for i in range(24)}
    options = ("--tokenizer", tokenizer, "--val_fraction", "0.25", "--shard_tokens", "200")
    out = make(tmp_path, files | {"empty.txt": ""}, *options)
    meta = data.read_meta(out)
    documents = []
    for split, n_documents in (("train", 18), ("val", 6)):
        part = decode_documents(out, split)
        assert len(part) == n_documents
        assert part == sorted(part, key=len)  # the order of the names
        documents += part
        n_tokens = sum(len(shard.tokens) for shard in data.open_shards(out, split))
        assert meta["tokens"][split] == n_tokens
    assert sorted(documents) == sorted(files.values())
    assert meta["documents"] == 24
    assert meta["complete"] is True
    assert meta["vocab_size"] == get_tokenizer(tokenizer).vocab_size
    for rows in meta["shards"].values():
        assert len(rows) > 2
        assert {row["tokens"] for row in rows[:-1]} == {200}
        for row in rows:
            content = (out / row["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == row["sha256"]


def test_few_documents_give_their_tails(tmp_path):
    rows = ["ab cd ef gh " * 50, "", None, "漢字" * 91, "字"]
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"text": rows}), tmp_path / "text" / "t.parquet")
    files = {"book.txt": "abcdefghij" * 10, "empty.txt": ""}
    out = make(tmp_path, files, "--tokenizer", "bytes", "--val_fraction", "0.1")
    train = decode_documents(out, "train")
    val = decode_documents(out, "val")
    whole = [head + tail for head, tail in zip(train, [*val, ""])]
    assert whole == [files["book.txt"], rows[0], rows[3], "字"]
    # A tenth; it begins at white space if there is some, else at a character.
    assert val == ["abcdefghij", " cd ef gh " + "ab cd ef gh " * 4, "漢字" * 9]
    assert data.read_meta(out)["documents"] == 4
    # Training gets something of each document, however short.
    assert Split(tail=0.5).find_ends(b"a", 0) == {"train": 1, "val": 1}


ROWS = [f"Row {i}: naïve ☃\n" * (i % 7) for i in range(200)]  # every seventh is empty


def make_tables(folder: Path) -> list[str]:
    """The same rows as .jsonl, .jsonl.gz and .parquet, and a text file."""
    folder.mkdir(exist_ok=True)
    texts = [text or None for text in ROWS]
    lines = ""
    for i, text in enumerate(texts):
        lines += json.dumps({"n": i, "body": text}) + "\n"
        if i % 2:
            lines += "\n"  # blank lines are no rows
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.table({"n": range(200), "body": texts})
    pq.write_table(table, folder / "c.parquet", row_group_size=30)
    (folder / "d.txt").write_text("a text file\n" * 5000)
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]


def test_rows_are_documents(tmp_path):
    paths = make_tables(tmp_path / "tables")
    out = tmp_path / "out"
    prepare.main([*paths, "--out", str(out), "--text_column", "body", "--val_fraction", "0"])
    texts = [text for text in ROWS if text]
    expected = [*texts, *texts, *texts, "a text file\n" * 5000]
    assert decode_documents(out, "train") == expected
    assert data.read_meta(out)["source"]["text_column"] == "body"


# By documents, and by tails.
@pytest.mark.parametrize(
    "val_fraction, tokenizer", [("0.1", "bytes"), ("0.001", "bytes"), ("0.1", "300")]
)
def test_any_number_of_workers_makes_the_same_bytes(tmp_path, val_fraction, tokenizer, monkeypatch):
    paths = make_tables(tmp_path / "tables")
    small_pieces(monkeypatch, 4000)
    options = ["--shard_tokens", "3000", "--val_fraction", val_fraction]
    options += ["--tokenizer", tokenizer, "--text_column", "body"]
    made = []
    for workers in ("1", "3"):
        out = tmp_path / workers / "out"
        prepare.main([*paths, "--out", str(out), *options, "--workers", workers])
        made.append(read_bytes(out))
    # The library that defines the ids, on processes.
    monkeypatch.setattr(BytePairTokenizer, "quicken", lambda self: None)
    parse_tokenizer.cache_clear()
    out = tmp_path / "slow" / "out"
    prepare.main([*paths, "--out", str(out), *options, "--workers", "3"])
    made.append(read_bytes(out))
    assert made[0] == made[1] == made[2]
    assert len(made[0]) > 10


def test_text_that_is_not_utf8(tmp_path):
    """GPT-2's tokens are of text: invalid bytes become U+FFFD. The bytes tokenizer keeps them."""
    latin = b"na\xefve caf\xe9 " * 40
    column = pa.array([b"caf\xe9", "ünïcode".encode()], pa.binary()).view(pa.string())
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"text": column}), tmp_path / "text" / "a.parquet")
    files = {"b.jsonl": r'{"text": "a lone surrogate: \ud800"}', "c.txt": latin}
    out = make(tmp_path, files, "--val_fraction", "0", "--replace")
    halves = "a lone surrogate: \ufffd"
    expected = ["caf\ufffd", "ünïcode", halves, latin.decode(errors="replace")]
    assert decode_documents(out, "train") == expected

    out = make(tmp_path / "b", {"c.txt": latin}, "--val_fraction", "0", "--tokenizer", "bytes")
    [shard] = data.open_shards(out, "train")
    assert bytes(shard.tokens[1:].tolist()) == latin


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
    whole = read_bytes(out)
    shutil.rmtree(out)
    writes_left = 0

    def write_or_interrupt(path, *content):
        nonlocal writes_left
        if writes_left == 0:
            path.with_name(path.name + ".0a.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        writes_left -= 1
        write_whole(path, *content)

    for module in (data, sharding, prepare):
        monkeypatch.setattr(module, "write_whole", write_or_interrupt)
    for attempt in range(99):
        writes_left = attempt
        try:
            make(tmp_path, FILES, *OPTIONS, tokenizer)
            break
        except SystemExit as exit_:
            assert exit_.code == 130
        assert all(path.read_bytes() == whole[path.name] for path in out.glob("*.bin"))
        with pytest.raises(ValueError, match=r"no train shards|interrupted|no folder"):
            data.open_shards(out, "train")
    assert attempt > 5
    assert len(whole) > 10
    assert read_bytes(out) == whole


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """A run that continues tokenises at most one shard and one piece again, and writes no shard
    again.
    """
    small_pieces(monkeypatch, 500)
    files = {"a.txt": "some text\n" * 1999 + "some text"}
    options = ("--tokenizer", "bytes", "--shard_tokens", "2000", "--val_fraction", "0")
    tokenise = sharding.tokenise
    sizes = []

    def tokenise_or_interrupt(piece, tokenizer_name):
        sizes.append(sum(len(segment.text) for segment in piece))
        if sum(sizes) > 15_000:
            raise KeyboardInterrupt
        return tokenise(piece, tokenizer_name)

    monkeypatch.setattr(sharding, "tokenise", tokenise_or_interrupt)
    with pytest.raises(SystemExit, match="130"):
        make(tmp_path, files, *options)
    sizes.clear()
    times = read_times((tmp_path / "out").glob("*.bin"))
    assert len(times) == 7
    out = make(tmp_path, files, *options)
    assert 20_000 - 15_000 < sum(sizes) <= 20_000 - 15_000 + 2000 + 2 * 500
    assert read_times(times) == times
    rows = data.read_meta(out)["shards"]["train"]
    assert [row["tokens"] for row in rows] == [2000] * 10  # and no empty one


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    monkeypatch.setattr(sharding, "prepare_worker", os._exit)
    options = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "2"]
    line = fails(capsys, str(tmp_path / "a.txt"), *options)
    assert "a worker process was killed (out of memory?)" in line


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize(
    "how, seconds", [(signal.SIGINT, 0.0), (signal.SIGINT, 0.1), (signal.SIGKILL, 0.5)]
)
def test_workers_end_with_their_parent(tmp_path, how, seconds):
    """Ctrl-C is one line, also while the workers start: a terminal sends it to them too. kill -9
    leaves none behind.
    """
    (tmp_path / "a.txt").write_text("some text\n" * 5_000_000)
    script = (
        "import signal, sys, prepare\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "prepare.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.txt")]
    # The workers of this tokenizer are processes.
    command += ["--out", str(tmp_path / "out"), "--workers", "2", "--tokenizer", "bytes"]
    with subprocess.Popen(
        command,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 3:  # one is Python's resource tracker
            assert process.poll() is None
        time.sleep(seconds)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
        else:
            process.kill()
        # The workers hold the pipe open, so this returns when the last one has ended.
        err = process.communicate(timeout=20)[1].strip()
    if how == signal.SIGINT:
        assert err == "prepare.py: interrupted"
        assert process.returncode == 130


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
        # What lies in --out is no input.
        assert "choose a new folder" in line or "no files match" in line
    assert len(list(notes.iterdir())) == 2


def test_which_files_are_taken(tmp_path):
    top = tmp_path / "text"
    names = ["a.py", "b.txt", "deep/er/c.py"]
    names += ["tests/d.py", "deep/tests/e.py", ".git/f.py", "deep/test_g.py", "out/deep/shard.py"]
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text("some text")
    files = find_files([str(top)], "*.py", ["tests", "test_*"], top / "out")
    assert files == [top / "a.py", top / "deep/er/c.py"]

    # A glob, and a file; each file is taken once.
    b = str(top / "**" / "*.txt")
    a = str(top / "a.py")
    assert find_files([b, a, b, a], "*", [], top / "out") == [top / "b.txt", top / "a.py"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Unless it is excluded. (A test that runs as root may read everything.)"""
    for name in ("a.txt", "closed/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some text")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="closed: Permission denied; leave it out with --exclude"):
        find_files([str(tmp_path)], "*", [], tmp_path / "out")
    assert find_files([str(tmp_path)], "*", ["clos*"], tmp_path / "out") == [tmp_path / "a.txt"]


NO_TEXT = "not a JSON object with text in the column 'body'"
NO_OBJECT = f"{NO_TEXT} (choose with --text_column)"
WRONG_ROWS = {
    "a.jsonl": (b'{"body": "x"}\n\n{"body": \n', f'line 3: {NO_OBJECT}: b\'{{"body": '),
    "b.jsonl": (b'{"body": "x"}\n[1]\n', f"line 2: {NO_OBJECT}"),
    "c.jsonl": (
        b'{"text": "x", "n": 1}\n',
        f"line 1: {NO_TEXT} among text, n; choose with --text_column",
    ),
    "d.jsonl": (b'{"body": 5}\n', f"line 1: {NO_TEXT} among body"),
    "deep.jsonl": (b'{"body": ' + b"[" * 100_000, f"line 1: {NO_OBJECT}"),
    "cut.jsonl.gz": (gzip.compress(b'{"body": "x"}\n' * 1000)[:-9], "Compressed file ended before"),
    "no.jsonl.gz": (b"junk", f"line 1: {NO_OBJECT}"),
    "no.parquet": (b"PAR1 junk", "Parquet"),
    "not.parquet": (b"<html>", "damaged"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_rows_are_named(tmp_path, capsys, name):
    content, message = WRONG_ROWS[name]
    (tmp_path / name).write_bytes(content)
    options = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--text_column", "body"]
    assert f"{name}: {message}" in fails(capsys, str(tmp_path / name), *options)


def test_wrong_tables_are_named(tmp_path, capsys):
    options = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--text_column"]
    whole = tmp_path / "whole.parquet"
    table = pa.table({"n": range(2000), "body": [f"{i * i} squares" for i in range(2000)]})
    pq.write_table(table, whole, compression="zstd")
    for column in ("text", "n"):
        line = fails(capsys, str(whole), *options, column)
        columns = "n (int64), body (string)"
        assert f"whole.parquet: no text in the column '{column}' among {columns}" in line

    # Its rows are damaged, its index is not.
    content = whole.read_bytes()
    middle = len(content) // 2
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content[: middle - 80] + bytes(80) + content[middle:])
    assert "damaged.parquet: " in fails(capsys, str(damaged), *options, "body")


def a_text(folder: Path, tokenizer: str = "bytes") -> tuple[Path, list[str]]:
    """A text of several shards, and the command that makes them, without the program's name."""
    path = folder / "a.txt"
    path.write_text("".join(f"the square of {n} is {n * n}\n" for n in range(400)))
    options = ["--out", str(folder / "out"), "--tokenizer", tokenizer, "--shard_tokens", "2000"]
    return path, [str(path), *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_text_that_changes_while_it_is_read_is_named(tmp_path, capsys, monkeypatch):
    path, options = a_text(tmp_path)
    choose_split = prepare.choose_split

    def change(*arguments):
        path.write_text("other text\n" * 900)
        return choose_split(*arguments)

    monkeypatch.setattr(prepare, "choose_split", change)
    assert "a.txt: changed while it was read; delete " in fails(capsys, *options)
    assert not data.read_meta(tmp_path / "out")["complete"]


@pytest.mark.parametrize("tokenizer", ["bytes", "300"])
def test_lost_files_are_made_again_with_the_same_bytes(tmp_path, capsys, tokenizer):
    """One that is missing, one that was cut, and a learned tokenizer."""
    _, options = a_text(tmp_path, tokenizer)
    out = tmp_path / "out"
    prepare.main(options)
    whole = contents(out)
    first, *_, last = sorted(out.glob("*.bin"))
    first.unlink()
    last.write_bytes(last.read_bytes()[:-2])
    if tokenizer == "300":
        (out / "tokenizer.json").unlink()
    capsys.readouterr()
    prepare.main(options)
    assert f"{first.name}: gone, or not whole" in capsys.readouterr().out.replace(
        str(out) + "/", ""
    )
    assert contents(out) == whole
    prepare.main(options)
    assert "already made" in capsys.readouterr().out


def test_a_shard_lost_between_interruptions_is_made_again(tmp_path, capsys, monkeypatch):
    _, options = a_text(tmp_path)
    out = tmp_path / "out"
    prepare.main(options)
    whole = contents(out)
    shutil.rmtree(out)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finish_folder", interrupt)
        fails(capsys, *options, code=130)
    next(out.glob("*.bin")).unlink()
    prepare.main(options)
    assert "its shards are made again" in capsys.readouterr().err
    assert contents(out) == whole

    # Lost at the last moment: the folder does not become complete.
    shutil.rmtree(out)
    finish = sharding.ShardWriter.finish

    def lose(self):
        finish(self)
        next(out.glob("*.bin")).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(sharding.ShardWriter, "finish", lose)
        assert "gone, or not whole; run the same command again" in fails(capsys, *options)
    prepare.main(options)
    assert contents(out) == whole


@pytest.mark.parametrize("content", [b"", b"junk", b"PK"])
def test_a_damaged_record_of_progress_begins_anew(tmp_path, capsys, monkeypatch, content):
    _, options = a_text(tmp_path)
    out = tmp_path / "out"
    prepare.main(options)
    whole = contents(out)
    shutil.rmtree(out)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finish_folder", interrupt)
        fails(capsys, *options, code=130)
    (out / "progress" / "all.npz").write_bytes(content)
    prepare.main(options)
    assert contents(out) == whole


def test_a_complete_folder_is_tidied(tmp_path, capsys):
    """After a kill between meta.json and the deletion of the records."""
    _, options = a_text(tmp_path)
    out = tmp_path / "out"
    prepare.main(options)
    whole = contents(out)
    (out / "progress").mkdir()
    (out / "progress" / "all.npz").write_bytes(b"x")
    (out / "out_train_000001.bin.0123abcd.tmp").write_bytes(b"x")
    prepare.main(options)
    assert "already made" in capsys.readouterr().out
    assert contents(out) == whole


def test_only_the_same_command_continues_and_at_the_end_does_nothing(tmp_path, capsys, monkeypatch):
    """The shards of an interrupted run are safe from a command with other options."""
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    options = [str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes", "--shard_tokens"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    # Interrupted before the first shard: another command may begin.
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "tokenise", interrupt)
        fails(capsys, *options, "1000", code=130)
    prepare.main([*options, "4000"])
    shutil.rmtree(out)

    # Interrupted after the first shard, before its record: no other command may.
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupt)
        fails(capsys, *options, "1000", code=130)
    line = fails(capsys, *options, "2000")
    assert "another source (shard_tokens 1000 -> 2000)" in line
    assert "delete that folder" in line
    prepare.main([*options, "1000"])
    assert data.read_meta(out)["complete"]

    times = read_times(out.iterdir())
    capsys.readouterr()
    prepare.main([*options, "1000"])
    assert "already made" in capsys.readouterr().out
    line = fails(capsys, *options, "1000", "--tokenizer", "gpt2")
    assert "(tokenizer bytes -> gpt2)" in line
    assert read_times(out.iterdir()) == times


def test_two_commands_at_one_folder_do_not_mix(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    out = tmp_path / "out"
    command = [str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes"]
    with lock_shard_folder(out, {"name": "another"}):
        assert "another process makes these shards" in fails(capsys, *command)
    shutil.rmtree(out)

    source = {"name": "a part"}
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

    # No shard was written there, so this command may begin.
    prepare.main(command)
    assert data.read_meta(out)["complete"]


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0binary")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "file").touch()

    def fails_with(name: str, *options: str) -> str:
        out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
        return fails(capsys, str(tmp_path / name), *out, *options)

    assert "nowhere.txt: no such file or folder" in fails_with("nowhere.txt")
    assert "photo.jpg: binary (NUL bytes), not text" in fails_with("photo.jpg")
    assert "no text in it, only binary files" in fails_with("", "--glob", "*.jpg")
    assert "no files match '*.md'" in fails_with("", "--glob", "*.md")
    assert "Not a directory" in fails_with("a.txt", "--out", str(tmp_path / "file" / "out"))
    # No text at all, and none for validation.
    assert "empty.txt: too little text" in fails_with("empty.txt")
    assert "a.txt: too little text" in fails_with("a.txt")


@pytest.mark.parametrize(
    "option, value",
    [
        ("--val_fraction", "0.9"),
        ("--val_fraction", "1e-320"),
        ("--shard_tokens", "0"),
        ("--tokenizer", "bert"),
        ("--tokenizer", "299"),
    ],
)
def test_options_out_of_range_are_one_line(tmp_path, capsys, option, value):
    (tmp_path / "a.txt").write_text("a")
    line = fails(capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), option, value)
    assert option in line
    assert value in line
