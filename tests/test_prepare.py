"""Documents to shards: reading, the split, the shards, interruptions, and the command."""

import gzip
import hashlib
import json
import os
import random
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
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import prepare
from data import get_tokenizer


def make(tmp_path: Path, files: dict[str, str | bytes], *options: str) -> Path:
    """Write files into a folder, run prepare.py on it, and return the shard folder."""
    for name, content in files.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    prepare.main([str(tmp_path / "text"), "--out", str(tmp_path / "out"), *options])
    return tmp_path / "out"


def fails(capsys, *argv: str) -> str:
    """Run prepare.py, which must end with exit code 2 and one line; return the line."""
    with pytest.raises(SystemExit) as exit_:
        prepare.main(list(argv))
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare.py: ")]
    assert len(lines) == 1
    return lines[0]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def documents_of(out: Path, split: str, tokenizer: str) -> list[str]:
    tokens = np.concatenate([shard.tokens for shard in data.open_shards(out, split)])
    starts = np.flatnonzero(tokens == get_tokenizer(tokenizer).end_of_text)
    return [get_tokenizer(tokenizer).decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


# ---- Shards and split ------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 25))
def test_shards_have_equal_size_and_all_tokens(tmp_path_factory, pieces, size):
    folder = tmp_path_factory.mktemp("w")
    (folder / "progress").mkdir()
    tokens = np.arange(sum(pieces), dtype=np.uint16)
    shards = prepare.Shards(folder / "progress" / "w.npz", lambda _, n: folder / f"w_train_{n}.bin", {"train": size}, 0)
    for piece in np.split(tokens, np.cumsum(pieces)[:-1]):
        shards.add({"train": piece} if len(piece) else {})
    shards.add({}, last=True)
    counts = [row["tokens"] for row in shards.rows["train"]]
    assert counts == [size] * (len(tokens) // size) + [rest for rest in [len(tokens) % size] if rest]
    read = [data.open_shard(folder / row["file"]).tokens for row in shards.rows["train"]]
    assert np.concatenate([tokens[:0], *read]).tolist() == tokens.tolist()


@given(st.text(max_size=12), st.sampled_from([0.05, 0.1, 0.5]))
def test_a_tail_begins_at_a_character(text, tail):
    raw = text.encode("utf-8", errors="replace")
    if raw:
        ends = prepare.Split(tail=tail).ends(raw, 0)
        assert list(ends) == ["train", "val"] and 0 < ends["train"] <= ends["val"] == len(raw)
        assert raw[: ends["train"]].decode() + raw[ends["train"] :].decode() == raw.decode()


@given(st.integers(1, 500), st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.5]), st.integers(0, 3))
def test_one_document_of_each_block_is_for_validation(n, fraction, seed):
    split = prepare.Split(round(1 / fraction), seed)
    drawn = [i for i in range(n) if split.ends(b"x", i) == {"val": 1}]
    blocks = [i // split.stride for i in drawn]
    assert blocks in (list(range(n // split.stride)), list(range(-(-n // split.stride))))  # the last one is not whole


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_shards_decode_back_to_the_documents(tmp_path, tokenizer):
    """Every document of both splits, each after an end of text, in the order of the file names."""
    files = {f"{i:02d}.txt": f"Document {i}: naïve ☃\n" * (i + 1) for i in range(24)}
    out = make(tmp_path, files | {"empty.txt": ""}, "--tokenizer", tokenizer, "--val_fraction", "0.25")
    meta, found = data.read_meta(out), []
    for split, n in (("train", 18), ("val", 6)):
        documents = documents_of(out, split, tokenizer)
        assert len(documents) == n and documents == sorted(documents, key=len)  # their order
        assert meta["tokens"][split] == sum(len(shard.tokens) for shard in data.open_shards(out, split))
        found += documents
    assert sorted(found) == sorted(files.values())
    assert meta["documents"] == 24 and meta["complete"] is True
    assert meta["vocab_size"] == get_tokenizer(tokenizer).vocab_size
    for rows in meta["shards"].values():
        for row in rows:
            assert hashlib.sha256((out / row["file"]).read_bytes()).hexdigest() == row["sha256"]


def test_few_documents_give_their_tails(tmp_path):
    rows = ["ab cd ef gh " * 50, "", None, "漢字" * 90]
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"text": rows}), tmp_path / "text" / "t.parquet")
    files = {"book.txt": "abcdefghij" * 10, "empty.txt": ""}
    out = make(tmp_path, files, "--tokenizer", "bytes", "--val_fraction", "0.1")
    train, val = (documents_of(out, split, "bytes") for split in ("train", "val"))
    assert [head + tail for head, tail in zip(train, val)] == [files["book.txt"], rows[0], rows[3]]
    # A tenth; it begins at white space if there is some.
    assert val == ["abcdefghij", " cd ef gh " + "ab cd ef gh " * 4, "漢字" * 9]
    assert data.read_meta(out)["documents"] == 3


ROWS = [f"Row {i}: naïve ☃\n" * (i % 7) for i in range(200)]  # every seventh is empty


def tables(folder: Path, column: str = "text") -> list[str]:
    """The same rows as .jsonl, .jsonl.gz and .parquet, and a text file."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"n": i, column: text or None}) + "\n" * (1 + i % 2) for i, text in enumerate(ROWS))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"n": range(200), column: [text or None for text in ROWS]}), folder / "c.parquet", 30)
    (folder / "d.txt").write_text("a text file\n")
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]


def test_rows_are_documents(tmp_path):
    paths = tables(tmp_path / "tables", "body")
    prepare.main([*paths, "--out", str(tmp_path / "out"), "--text_column", "body", "--val_fraction", "0"])
    texts = [text for text in ROWS if text]
    assert documents_of(tmp_path / "out", "train", "gpt2") == [*texts, *texts, *texts, "a text file\n"]
    assert data.read_meta(tmp_path / "out")["source"]["text_column"] == "body"


@pytest.mark.parametrize("val_fraction", ["0.1", "0.001"])  # by documents, and by tails
def test_any_number_of_workers_makes_the_same_bytes(tmp_path, val_fraction, monkeypatch):
    paths = tables(tmp_path / "tables")
    (tmp_path / "tables" / "e.md").write_text("a longer document\n" * 5000)
    monkeypatch.setattr(data, "PIECE_BYTES", 4000)
    options = ["--shard_tokens", "3000", "--val_fraction", val_fraction, "--tokenizer", "bytes"]
    made = []
    for workers in ("1", "3"):
        out = tmp_path / workers / "out"
        prepare.main([*paths, str(tmp_path / "tables" / "e.md"), "--out", str(out), *options, "--workers", workers])
        made.append(contents(out))
    assert made[0] == made[1] and len(made[0]) > 20


def test_text_that_is_not_utf8(tmp_path):
    """GPT-2's tokens are of text: invalid bytes become U+FFFD. The bytes tokenizer keeps them."""
    latin, column = b"na\xefve caf\xe9 " * 40, pa.array([b"caf\xe9", "ünïcode".encode()], pa.binary())
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "text" / "a.parquet")
    files = {"b.jsonl": r'{"text": "a lone surrogate: \ud800"}', "c.txt": latin}
    out = make(tmp_path, files, "--val_fraction", "0")
    expected = ["caf\ufffd", "ünïcode", "a lone surrogate: ?", latin.decode(errors="replace")]
    assert documents_of(out, "train", "gpt2") == expected
    latin_only = [str(tmp_path / "text" / "c.txt"), "--tokenizer", "bytes", "--val_fraction", "0"]
    prepare.main([*latin_only, "--out", str(tmp_path / "b")])
    assert bytes(data.open_shards(tmp_path / "b", "train")[0].tokens[1:].tolist()) == latin


# ---- Interruptions ---------------------------------------------------------------------------------------------------

LETTERS = random.Random(1)
FILES = {f"{i:02d}.txt": "".join(LETTERS.choices("abc d\n", k=LETTERS.randrange(10, 900))) for i in range(60)}
OPTIONS = ("--tokenizer", "bytes", "--shard_tokens", "1500", "--val_fraction", "0.25")


def test_interrupted_at_every_write_and_run_again_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Law 8: stopped at the first file that is written, then at the second, and so on, all in one folder."""
    monkeypatch.setattr(data, "PIECE_BYTES", 700)
    out = make(tmp_path, FILES, *OPTIONS)
    whole = contents(out)
    assert len(whole) > 20
    shutil.rmtree(out)
    write, written = data.write_whole, []

    def stopped(path, *content):
        if len(written) + 1 == attempt:
            path.with_name(path.name + ".0a.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *content)

    monkeypatch.setattr(data, "write_whole", stopped)
    for attempt in range(1, 99):  # noqa: B007 (stopped() reads it)
        written.clear()
        before = {path.name for path in out.glob("*.bin")}
        try:
            make(tmp_path, FILES, *OPTIONS)
            break
        except SystemExit as exit_:
            assert exit_.code == 130
        assert before <= {path.name for path in out.glob("*.bin")}
        assert all(path.read_bytes() == whole[path.name] for path in out.glob("*.bin"))
        with pytest.raises(ValueError, match=r"no train shards|interrupted|no folder"):
            data.open_shards(out, "train")
    assert attempt > 5
    assert whole == contents(out)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """A run that continues tokenises at most one shard and one piece again, and writes no shard again."""
    monkeypatch.setattr(data, "PIECE_BYTES", 500)
    files, options = {"a.txt": "some text\n" * 2000}, ("--tokenizer", "bytes", "--shard_tokens", "2000")
    tokenise, seen = prepare.tokenise, []

    def counted(piece, tokenizer_name):
        seen.append(sum(len(text) for _, _, text in piece))
        if sum(seen) > 15_000:
            raise KeyboardInterrupt
        return tokenise(piece, tokenizer_name)

    monkeypatch.setattr(prepare, "tokenise", counted)
    with pytest.raises(SystemExit, match="130"):
        make(tmp_path, files, *options)
    seen.clear()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    make(tmp_path, files, *options)
    assert 20_000 - 15_000 < sum(seen) <= 20_000 - 15_000 + 2000 + 2 * 500
    assert len(before) == 7 and all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    monkeypatch.setattr(prepare, "start_worker", os._exit)
    options = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "2"]
    assert "a worker process was killed (out of memory?)" in fails(capsys, str(tmp_path / "a.txt"), *options)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("how, seconds", [(signal.SIGINT, 0.0), (signal.SIGINT, 0.1), (signal.SIGKILL, 0.5)])
def test_workers_end_with_their_parent(tmp_path, how, seconds):
    """Ctrl-C is one line, also while the workers start: a terminal sends it to them too. kill -9 leaves none behind."""
    (tmp_path / "a.txt").write_text("some text\n" * 5_000_000)
    script = "import signal, sys, prepare; signal.signal(2, signal.default_int_handler); prepare.main(sys.argv[1:])"
    command = [sys.executable, "-c", script, str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--workers", "2"]
    options = dict(env=clean_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(command, **options) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(workers := children.read_text().split()) < 3:  # the resource tracker is one
            assert process.poll() is None
        time.sleep(seconds)
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        err = process.communicate(timeout=60)[1].strip()
        assert how == signal.SIGKILL or (err, process.returncode) == ("prepare.py: interrupted", 130)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- The command -----------------------------------------------------------------------------------------------------


def test_no_file_of_the_user_is_deleted(tmp_path, capsys):
    """--out that is the input folder, or any folder with something in it, is refused and stays as it was."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("notes_2024.txt", "notes_train_000001.bin"):
        (notes / name).write_text("my notes\n" * 50)
    for out in (notes, tmp_path):
        line = fails(capsys, str(notes / "notes_2024.txt"), "--out", str(out))
        assert "choose a new folder" in line or "no files match" in line  # what lies in --out is no input
    assert len(list(notes.iterdir())) == 2


def test_which_files_are_taken(tmp_path):
    names = ["a.py", "b.txt", "deep/er/c.py", "tests/d.py", "deep/tests/e.py", ".git/f.py", "deep/test_g.py"]
    make(tmp_path, dict.fromkeys(names, "some text\n" * 9), "--tokenizer", "bytes")
    out = tmp_path / "text" / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "shard.py").write_text("written by an earlier run")
    found = prepare.find_files([str(tmp_path / "text")], "*.py", ["tests", "test_*"], out)
    assert [str(path.relative_to(tmp_path / "text")) for path in found] == ["a.py", "deep/er/c.py"]
    b, a = str(tmp_path / "text" / "**" / "*.txt"), str(tmp_path / "text" / "a.py")
    assert [path.name for path in prepare.find_files([b, a, b, a], "*", [], out)] == ["b.txt", "a.py"]


def test_the_same_command_again_does_nothing_and_another_is_refused(tmp_path, capsys):
    out = make(tmp_path, {"a.txt": "some text\n" * 50}, "--tokenizer", "bytes")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare.main([str(tmp_path / "text"), "--out", str(out), "--tokenizer", "bytes"])
    assert "already made" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    line = fails(capsys, str(tmp_path / "text"), "--out", str(out), "--tokenizer", "gpt2")
    assert "(tokenizer bytes -> gpt2); choose another --out or delete that folder" in line


def test_wrong_rows_are_named(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    table = pa.table({"n": range(2000), "body": [f"{i * i} squares" for i in range(2000)]})
    pq.write_table(table, tmp_path / "whole.parquet", compression="zstd")
    whole = (tmp_path / "whole.parquet").read_bytes()
    middle = len(whole) // 2
    no_object = "not a JSON object with text in the column 'body' (choose with --text_column)"
    cases = {
        "a.jsonl": (b'{"body": "x"}\n\n{"body": \n', f'a.jsonl: line 3: {no_object}: b\'{{"body": '),
        "b.jsonl": (b'{"body": "x"}\n[1]\n', f"b.jsonl: line 2: {no_object}"),
        "c.jsonl": (b'{"text": "x", "n": 1}\n', f"c.jsonl: line 1: {no_object}"),
        "d.jsonl": (b'{"body": 5}\n', f"d.jsonl: line 1: {no_object}"),
        "deep.jsonl": (b'{"body": ' + b"[" * 100_000, f"deep.jsonl: line 1: {no_object}"),
        "e.jsonl.gz": (gzip.compress(b'{"body": "x"}\n' * 1000)[:-9], "e.jsonl.gz: Compressed file ended before"),
        "f.jsonl.gz": (b"junk", "f.jsonl.gz: Not a gzipped file"),
        "g.parquet": (b"PAR1 junk", "g.parquet: Parquet"),
        "h.parquet": (b"", "h.parquet: empty"),
        "i.parquet": (whole[: middle - 80] + bytes(80) + whole[middle:], "i.parquet: "),  # its index is intact
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert message in fails(capsys, str(tmp_path / name), *out, "--text_column", "body")
        assert not list((tmp_path / "out").glob("*.bin"))
    for column in ("text", "n"):
        line = fails(capsys, str(tmp_path / "whole.parquet"), *out, "--text_column", column)
        assert f"whole.parquet: no text in the column '{column}' among n (int64), body (string)" in line


def test_another_command_does_not_undo_a_begun_one(tmp_path, capsys, monkeypatch):
    """The shards of an interrupted run are safe from a command with other options."""
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("some text\n" * 900)
    options = [str(text), "--out", str(out), "--tokenizer", "bytes"]

    def stopped_in(where, name):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(SystemExit, match="130"):
                prepare.main([*options, "--shard_tokens", "1000"])
        capsys.readouterr()

    stopped_in(prepare, "tokenise")  # no shard yet: another command may begin
    prepare.main([*options, "--shard_tokens", "4000"])
    shutil.rmtree(out)
    stopped_in(np, "savez")  # with a shard
    line = fails(capsys, *options, "--shard_tokens", "2000")
    assert "another source (shard_tokens 1000 -> 2000)" in line and "delete that folder" in line
    prepare.main([*options, "--shard_tokens", "1000"])
    assert data.read_meta(out)["complete"]


def test_two_commands_at_one_folder_do_not_mix(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 900)
    out, source = tmp_path / "out", {"name": "a part"}
    command = [str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes"]
    with prepare.shard_folder(out, {"name": "another"}):
        assert "another process makes these shards" in fails(capsys, *command)
    shutil.rmtree(out)
    with prepare.shard_folder(out, source, part=1, parts=2), prepare.shard_folder(out, source, part=2, parts=2):
        assert "another process" in fails(capsys, *command)
        for part, parts in ((1, 2), (1, 3)):
            with pytest.raises(ValueError, match="another process"):
                prepare.shard_folder(out, source, part=part, parts=parts).__enter__()
    with pytest.raises(ValueError, match="name a part -> other"):
        prepare.shard_folder(out, {"name": "other"}, part=1, parts=2).__enter__()
    prepare.main(command)  # nothing was written there
    assert data.read_meta(out)["complete"]


def test_a_killed_process_releases_its_lock(tmp_path):
    with (
        data.lock(tmp_path / "lock", "taken"),
        pytest.raises(ValueError, match="taken"),
        data.lock(tmp_path / "lock", "taken"),
    ):
        pass
    if (child := os.fork()) == 0:
        data.lock(tmp_path / "lock", "").__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with data.lock(tmp_path / "lock", "taken"):
        pass


@pytest.mark.parametrize("meta", ['{"complete": true, "source": null}', '{"tokenizer": 5}', "[]"])
def test_a_meta_that_is_none_is_one_line(tmp_path, capsys, meta):
    out = tmp_path / "out"
    out.mkdir()
    (out / "meta.json").write_text(meta)
    (tmp_path / "a.txt").write_text("text " * 100)
    assert "meta.json: damaged, or not what" in fails(capsys, str(tmp_path / "a.txt"), "--out", str(out))


def test_bad_input_is_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0binary")
    (tmp_path / "a.txt").write_text("a")
    assert "nowhere.txt: no such file or folder" in fails(capsys, str(tmp_path / "nowhere.txt"), *out)
    assert "empty.txt: empty" in fails(capsys, str(tmp_path / "empty.txt"), *out)
    line = fails(capsys, str(tmp_path), *out)
    assert "photo.jpg: binary (NUL bytes), not text; leave it out" in line and "--exclude '*.jpg'" in line
    assert "no files match '*.md'" in fails(capsys, str(tmp_path), *out, "--glob", "*.md")
    assert "too little text" in fails(capsys, str(tmp_path / "a.txt"), *out)
    (tmp_path / "file").touch()
    assert "Not a directory" in fails(capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "file" / "out"))
    assert "no files match '/abs/*'" in fails(capsys, str(tmp_path), *out, "--glob", "/abs/*")
    with pytest.raises(ValueError):
        data.open_shards(tmp_path / "out", "train")


def test_impossible_options_are_one_line(capsys):
    for option in ("--val_fraction 0.9", "--val_fraction 1e-320", "--shard_tokens 0", "--tokenizer bert"):
        with pytest.raises(SystemExit) as exit_:
            prepare.main(["x.txt", "--out", "y", *option.split()])
        assert exit_.value.code == 2 and option.split()[0] in capsys.readouterr().err
