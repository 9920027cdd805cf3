"""Documents to shards: the writer, the split, interruptions, and the command."""

import gzip
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import clean_environment
from hypothesis import given
from hypothesis import strategies as st

import data
import prepare
from data import get_tokenizer
from prepare import ShardWriter


def make(tmp_path, files: dict[str, str | bytes], *options: str):
    """Write files into a folder, run prepare.py over it, and return the shard folder."""
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


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 25))
def test_the_writer_cuts_and_loses_nothing(tmp_path_factory, documents, shard_tokens):
    """Also documents longer than a shard, or than several."""
    folder = tmp_path_factory.mktemp("w")
    tokens = np.arange(sum(documents), dtype=np.uint16)
    writer = ShardWriter(lambda n: folder / f"w_train_{n:06d}.bin", shard_tokens)
    for document in np.split(tokens, np.cumsum(documents)[:-1]) if documents else []:
        writer.write(document)
    writer.flush()
    counts = [row["tokens"] for row in writer.shards]
    assert counts == [shard_tokens] * (len(tokens) // shard_tokens) + [r for r in [len(tokens) % shard_tokens] if r]
    if counts:
        read = [shard.tokens for shard in data.open_shards(folder, "train")]
        assert np.concatenate(read).tolist() == tokens.tolist()


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    out = make(tmp_path, {"a.txt": "some text\n" * 500}, "--tokenizer", "bytes", "--shard_tokens", "1000")
    shard = sorted(out.glob("*_train_*"))[2]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: no tokens here, 1000 by meta.json"):
        data.open_shards(out, "train")


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


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_shards_decode_back_to_the_documents(tmp_path, tokenizer):
    """Every document of both splits, each behind an end of text, in the order of the file names."""
    files = {f"{i:02d}.txt": f"Document {i}: naïve ☃\n" * (i + 1) for i in range(24)}
    out = make(tmp_path, files | {"empty.txt": ""}, "--tokenizer", tokenizer, "--val_fraction", "0.25")
    meta, end = data.read_meta(out), get_tokenizer(tokenizer).end_of_text
    found = []
    for split in ("train", "val"):
        tokens = np.concatenate([shard.tokens for shard in data.open_shards(out, split)])
        assert tokens[0] == end and meta["tokens"][split] == len(tokens)
        starts = np.flatnonzero(tokens == end)
        documents = [get_tokenizer(tokenizer).decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
        assert documents == sorted(documents, key=len)  # their order
        assert len(documents) == {"train": 18, "val": 6}[split]
        found += documents
    assert sorted(found) == sorted(files.values())
    assert meta["documents"] == 24 and meta["vocab_size"] == end + 1 and meta["complete"] is True
    for rows in meta["shards"].values():
        for row in rows:
            assert hashlib.sha256((out / row["file"]).read_bytes()).hexdigest() == row["sha256"]


def test_a_lone_document_gives_its_tail_to_validation(tmp_path):
    files = {"a.txt": "x", "book.txt": "abcdefghij" * 10, "empty.txt": ""}  # of one character there is no tail
    out = make(tmp_path, files, "--tokenizer", "bytes", "--val_fraction", "0.1")
    train, val = (data.open_shards(out, split)[0].tokens for split in ("train", "val"))
    assert bytes(train[1:].tolist()) == b"abcdefghij" * 9 and bytes(val[1:].tolist()) == b"abcdefghij"


@given(st.integers(1, 500), st.sampled_from([0, 0.01, 0.05, 0.1, 0.3, 0.5]), st.integers(0, 3), st.integers(1, 9))
def test_the_split_takes_its_share(n, fraction, seed, at_once):
    """Of documents of one token each, however many of them come at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "too_few", lambda files, stride: n < stride)
        route, tail = prepare.split_for([], fraction, seed)
    if tail:
        assert tail == fraction and n < round(1 / fraction)
        return
    val = []
    for first in range(0, n, at_once):
        documents = np.arange(first, min(n, first + at_once), dtype=np.uint16)
        for split, tokens in route(documents, list(range(len(documents))), first, first):
            val += tokens.tolist() if split == "val" else []
    if fraction == 0:
        assert val == []
    else:
        stride = round(1 / fraction)
        whole = [document for document in val if document < n // stride * stride]
        assert [document // stride for document in whole] == list(range(n // stride))  # one of each block


def test_a_document_may_lie_in_several_pieces():
    route, _ = prepare.split_for([], 0, 0)
    assert [(split, part.tolist()) for split, part in route(np.arange(4), [2], 5, 0)] == [
        ("train", [0, 1]),
        ("train", [2, 3]),
    ]
    odd = data.functools.partial(prepare.split_by_document, is_val=lambda document: document == 4)
    parts = odd(np.arange(4), [2], 5, 0)  # the rest of document 4, and the beginning of document 5
    assert [(split, part.tolist()) for split, part in parts] == [("val", [0, 1]), ("train", [2, 3])]


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


def test_interrupted_at_every_write_and_run_again_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Law 8: stopped in the middle of the first file that is written, then of the second, and so on; all in a row."""
    rng = random.Random(1)
    files = {f"{i:02d}.txt": "".join(rng.choices("abc d\n", k=rng.randrange(10, 900))) for i in range(60)}
    options = ("--tokenizer", "bytes", "--shard_tokens", "1500", "--val_fraction", "0.25")
    monkeypatch.setattr(data, "PIECE_BYTES", 700)
    out = make(tmp_path, files, *options)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(whole) > 20
    shutil.rmtree(out)
    write, written = data.write_whole, []

    def stopped(path, *content, **options):
        if len(written) + 1 == attempt:
            path.with_name(path.name + ".0a.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *content, **options)

    monkeypatch.setattr(data, "write_whole", stopped)
    for attempt in range(1, 99):  # noqa: B007 (stopped() reads it)
        written.clear()
        before = {path.name for path in out.glob("*.bin")}
        try:
            make(tmp_path, files, *options)
            break
        except SystemExit as exit_:
            assert exit_.code == 130
        assert before <= {path.name for path in out.glob("*.bin")}
        for path in out.glob("*.bin"):
            assert path.read_bytes() == whole[path.name]
        with pytest.raises(ValueError, match=r"no train shards|interrupted|no folder"):
            data.open_shards(out, "train")
    assert attempt > 5
    assert whole == {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """A run that goes on tokenises no more than what is in no shard yet: at most one shard, and a piece."""
    monkeypatch.setattr(data, "PIECE_BYTES", 500)
    files, options = {"a.txt": "some text\n" * 2000}, ("--tokenizer", "bytes", "--shard_tokens", "2000")
    tokenise, seen = prepare.tokenise, []

    def counted(piece, tokenizer_name):
        seen.append(sum(len(text) for text, _ in piece.documents()))
        if sum(seen) > 15_000:
            raise KeyboardInterrupt
        return tokenise(piece, tokenizer_name)

    monkeypatch.setattr(prepare, "tokenise", counted)
    with pytest.raises(SystemExit, match="130"):
        make(tmp_path, files, *options)
    seen.clear()
    make(tmp_path, files, *options)
    assert 20_000 - 15_000 < sum(seen) <= 20_000 - 15_000 + 2000 + 2 * 500


ROWS = [f"Row {i}: naïve ☃\n" * (i % 7) for i in range(200)]  # every seventh is empty


def tables(folder: Path, column: str = "text") -> list[str]:
    """The same rows as .jsonl, .jsonl.gz and .parquet, with rows of other kinds between them."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"n": i, column: text or None}) + "\n" * (1 + i % 2) for i, text in enumerate(ROWS))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"n": range(200), column: [text or None for text in ROWS]}), folder / "c.parquet", 30)
    (folder / "d.txt").write_text("a text file\n")
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]


def documents_of(out: Path, split: str, tokenizer: str) -> list[str]:
    tokens = np.concatenate([shard.tokens for shard in data.open_shards(out, split)])
    starts = np.flatnonzero(tokens == get_tokenizer(tokenizer).end_of_text)
    return [get_tokenizer(tokenizer).decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_rows_are_documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "ROWS_BYTES", 1000)  # several pieces in a row group
    paths = tables(tmp_path / "tables", "body")
    options = ["--text_column", "body", "--tokenizer", tokenizer, "--val_fraction", "0"]
    prepare.main([*paths, "--out", str(tmp_path / "out"), *options])
    texts = [text for text in ROWS if text]
    assert documents_of(tmp_path / "out", "train", tokenizer) == [*texts, *texts, *texts, "a text file\n"]
    assert data.read_meta(tmp_path / "out")["source"]["text_column"] == "body"


def test_a_few_rows_give_their_tails(tmp_path):
    rows = ["ab cd ef gh " * 50, "", "x", None, "漢字" * 90]
    pq.write_table(pa.table({"text": rows}), tmp_path / "t.parquet")
    out = tmp_path / "out"
    prepare.main([str(tmp_path / "t.parquet"), "--out", str(out), "--tokenizer", "bytes", "--val_fraction", "0.1"])
    train, val = (documents_of(out, split, "bytes") for split in ("train", "val"))
    assert [head + tail for head, tail in zip(train, val, strict=True)] == ["ab cd ef gh " * 50, "漢字" * 90]
    assert val == [" cd ef gh " + "ab cd ef gh " * 4, "漢字" * 9]  # a tenth, from white space on if there is some
    assert data.read_meta(out)["documents"] == 2


@pytest.mark.parametrize("val_fraction", ["0.1", "0.001"])  # by whole documents; and fewer than 1000, each by its tail
def test_any_number_of_workers_makes_the_same_bytes(tmp_path, val_fraction):
    paths = tables(tmp_path / "tables")
    (tmp_path / "tables" / "e.md").write_text("a longer document\n" * 20_000)
    options = ["--shard_tokens", "3000", "--val_fraction", val_fraction]
    made = []
    for workers in ("1", "2", "4"):
        out = tmp_path / workers / "out"
        out.parent.mkdir()
        script = (
            "import data, prepare, sys; data.PIECE_BYTES, prepare.ROWS_BYTES = 4000, 1000; prepare.main(sys.argv[1:])"
        )
        command = [sys.executable, "-c", script, *paths, str(tmp_path / "tables" / "e.md"), "--out", str(out), *options]
        run = subprocess.run(
            [*command, "--workers", workers], env=clean_environment(), capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1] == made[2] and len(made[0]) > 20


def test_rows_that_are_wrong_are_named(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    cases = {
        "a.jsonl": ('{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        "b.jsonl": ('{"text": "x"}\n[1]\n', "b.jsonl, line 2: a list, where an object is expected"),
        "c.jsonl": ('{"body": "x", "n": 1}\n', "c.jsonl, line 1: no column 'text'; there are: body, n"),
        "d.jsonl": ('{"text": 5}\n', "d.jsonl, line 1: 'text' is a int, not text"),
        "e.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 1000)[:-9], "e.jsonl.gz: cut off or damaged"),
        "f.jsonl.gz": (b"junk", "f.jsonl.gz: cut off or damaged"),
        "g.parquet": (b"PAR1 junk", "g.parquet: cut off or damaged"),
        "deep.jsonl": ('{"text": ' + "[" * 100_000, "deep.jsonl, line 1: not JSON"),
        "h.parquet": (b"", "h.parquet: empty"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert message in fails(capsys, str(path), *out)
        assert not list((tmp_path / "out").glob("*.bin"))
    table = pa.table({"n": range(2000), "body": [f"{i * i} squares" for i in range(2000)]})
    pq.write_table(table, tmp_path / "i.parquet", compression="zstd")
    assert "i.parquet: no column 'text'; there are: n, body" in fails(capsys, str(tmp_path / "i.parquet"), *out)
    assert "holds int64, not text" in fails(capsys, str(tmp_path / "i.parquet"), *out, "--text_column", "n")
    whole = (tmp_path / "i.parquet").read_bytes()
    middle = len(whole) // 2
    (tmp_path / "i.parquet").write_bytes(whole[: middle - 80] + bytes(80) + whole[middle:])  # its index is intact
    assert "i.parquet: cut off or damaged" in fails(capsys, str(tmp_path / "i.parquet"), *out, "--text_column", "body")


def test_another_command_does_not_undo_a_begun_one(tmp_path, capsys, monkeypatch):
    """What an interrupted run wrote is kept from a command with other options, and from other text."""
    text = tmp_path / "a.txt"
    text.write_text("some text\n" * 900)
    options = [str(text), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]

    def stopped_while(where, name):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(SystemExit, match="130"):
                prepare.main([*options, "--shard_tokens", "1000"])
        capsys.readouterr()

    stopped_while(prepare, "tokenise")  # before anything was written: no harm in another command
    prepare.main([*options, "--shard_tokens", "4000"])
    shutil.rmtree(tmp_path / "out")
    stopped_while(prepare.Section, "save")  # with a shard there
    line = fails(capsys, *options, "--shard_tokens", "2000")
    assert "was begun, from something else (shard_tokens 1000 -> 2000)" in line and "delete that folder" in line
    prepare.main([*options, "--shard_tokens", "1000"])
    assert data.read_meta(tmp_path / "out")["complete"]


def test_two_commands_at_one_folder_do_not_mix(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("some text\n" * 900)
    out = tmp_path / "out"
    with prepare.prepared(out, {"name": "another"}):
        assert "another process is making these shards" in fails(capsys, str(text), "--out", str(out))
    shutil.rmtree(out)
    with prepare.prepared(out, {"name": "a part"}, alone=False), prepare.prepared(out, {"name": "a part"}, alone=False):
        assert "another process" in fails(capsys, str(text), "--out", str(out))
        with (
            pytest.raises(ValueError, match="name a part -> other"),
            prepare.prepared(out, {"name": "other"}, alone=False),
        ):
            pass
    prepare.main([str(text), "--out", str(out), "--tokenizer", "bytes"])  # nothing was written there: it may be taken
    assert data.read_meta(out)["complete"]


@pytest.mark.parametrize("meta", ['{"complete": true, "source": null}', '{"tokenizer": 5}', "[]"])
def test_a_meta_that_is_none_is_one_line(tmp_path, capsys, meta):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json").write_text(meta)
    (tmp_path / "a.txt").write_text("text " * 100)
    assert "meta.json: not what prepare.py writes" in fails(
        capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")
    )


@given(st.text(max_size=12), st.sampled_from([0.05, 0.1, 0.5]))
def test_halves_are_whole_characters(text, tail):
    raw = text.encode("utf-8", errors="replace")
    halves = prepare.whole_or_halves(raw, tail)
    assert len(halves) == (2 if len(raw.decode()) > 1 else 0)
    assert b"".join(half for half, _ in halves) == (raw if halves else b"")
    assert all(half.decode() and begins for half, begins in halves)


def test_bad_input_is_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0binary")
    (tmp_path / "a.txt").write_text("a")
    assert "nowhere.txt: no such file or folder" in fails(capsys, str(tmp_path / "nowhere.txt"), *out)
    assert "empty.txt: empty" in fails(capsys, str(tmp_path / "empty.txt"), *out)
    line = fails(capsys, str(tmp_path), *out)
    assert "photo.jpg: binary (NUL bytes), not text; leave out" in line and "with --exclude '*.jpg'" in line
    assert "no files match '*.md'" in fails(capsys, str(tmp_path), *out, "--glob", "*.md")
    assert "too little text" in fails(capsys, str(tmp_path / "a.txt"), *out)
    (tmp_path / "file").touch()
    assert "Not a directory" in fails(capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "file" / "out"))
    assert "--glob /abs/*: a pattern for names inside" in fails(capsys, str(tmp_path), *out, "--glob", "/abs/*")
    with pytest.raises(ValueError):
        data.open_shards(tmp_path / "out", "train")


def test_impossible_options_are_one_line(capsys):
    for option in ("--val_fraction 0.9", "--val_fraction 1e-320", "--shard_tokens 0", "--tokenizer bert"):
        with pytest.raises(SystemExit) as exit_:
            prepare.main(["x.txt", "--out", "y", *option.split()])
        assert exit_.value.code == 2 and option.split()[0] in capsys.readouterr().err


def test_text_that_is_not_utf8(tmp_path):
    """GPT-2's tokens are text, so what is not becomes U+FFFD; bytes stay what they are."""
    latin = b"na\xefve caf\xe9 " * 40
    out = make(tmp_path, {"latin.txt": latin}, "--tokenizer", "gpt2", "--val_fraction", "0")
    assert get_tokenizer("gpt2").decode(data.open_shards(out, "train")[0].tokens[1:].tolist()).startswith("na\ufffdve")
    other = tmp_path / "bytes"
    prepare.main([str(tmp_path / "text"), "--out", str(other), "--tokenizer", "bytes", "--val_fraction", "0"])
    assert bytes(data.open_shards(other, "train")[0].tokens[1:].tolist()) == latin
    assert json.loads((other / "meta.json").read_text())["tokens"] == {"train": len(latin) + 1, "val": 0}
