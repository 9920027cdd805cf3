"""Tokenizers, shards, windows and batches, and the command that makes shards of local text."""

import gzip
import hashlib
import io
import itertools
import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import clean_environment
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Batches, Shard, ShardWriter, Windows, get_tokenizer


def windows(*lengths: int, block_size: int = 8, vocab_size: int = 60_000) -> Windows:
    """Shards in memory whose tokens count up from 0 through all of them, so that a token tells its place."""
    ends = np.cumsum(lengths)
    shards = [
        Shard(Path(f"shard{i}"), np.arange(end - n, end, dtype=np.uint16))
        for i, (n, end) in enumerate(zip(lengths, ends))
    ]
    return Windows(shards, block_size, vocab_size)


def make(tmp_path, files: dict[str, str | bytes], *options: str):
    """Write files into a folder, run data.py over it, and return the shard folder."""
    for name, content in files.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    data.main([str(tmp_path / "text"), "--out", str(tmp_path / "out"), *options])
    return tmp_path / "out"


def fails(capsys, *argv: str) -> str:
    """Run data.py, which must end with exit code 2 and one line; return the line."""
    with pytest.raises(SystemExit) as exit_:
        data.main(list(argv))
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data.py: ")]
    assert len(lines) == 1
    return lines[0]


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


@given(st.text())
def test_tokenizers_give_back_the_text(text):
    text = text.encode("utf-8", errors="replace").decode()  # lone surrogates are no text
    for name in data.TOKENIZERS:
        tokenizer = get_tokenizer(name)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and (ids < tokenizer.end_of_text).all()
        assert tokenizer.decode(ids.tolist()) == text


def test_gpt2_ids_are_the_known_ones():
    ids = get_tokenizer("gpt2").encode("Hello, I'm a language model,")
    assert ids.tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert get_tokenizer(50257).end_of_text == 50256


@pytest.mark.parametrize("name", data.TOKENIZERS)
def test_transformers_reads_our_tokenizer_files(tmp_path, name):
    from transformers import AutoTokenizer

    ours = get_tokenizer(name)
    data.save_tokenizer(ours, tmp_path, block_size=64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn x  # naïve ☃ 𝄞 \x00 don't   stop\n"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs.eos_token_id == ours.end_of_text and len(theirs) == ours.vocab_size


@given(
    st.lists(
        st.sampled_from(
            ["word", "don't", "naïve", "漢字。", "☃", " ", "  ", "\n", "\t", "\u3000", "\xa0", "12", "\r\n"]
        )
    ),
    st.integers(2, 30),
)
def test_segments_tokenise_as_the_whole(parts, size):
    """Cut at the pre-tokeniser's own breaks, a text has the same ids; and where there is none, the same text."""
    text = "".join(parts)
    encoding, raw = get_tokenizer("gpt2").encoding, text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PIECE_BYTES", size)
        pieces = list(data.segments(io.BytesIO(raw), len(raw)))
        ids = get_tokenizer("gpt2").encode(text)
    assert b"".join(pieces) == raw and encoding.decode(ids.tolist()) == text
    ends = list(itertools.accumulate(map(len, pieces)))[:-1]
    if all(end in {match.start() for match in data.BREAK.finditer(raw)} for end in ends):
        assert ids.tolist() == encoding.encode_ordinary(text)


def test_breaks_change_no_id():
    """Every break that the pattern finds in a text, against the ids of the uncut text."""
    text = "A  b\n\nc\t d\u3000 e\xa0\n f'll\u2009 g! ?\r\n 漢字 。\n12 \x85 x\u205f\ny\u1680 z \u2028 ."
    encode, raw = get_tokenizer("gpt2").encoding.encode_ordinary, text.encode()
    breaks = [match.start() for match in data.BREAK.finditer(raw)]
    expected = [i for i in range(1, len(text)) if text[i] in " \n" and not text[i - 1].isspace()]
    assert breaks == [len(text[:i].encode()) for i in expected] and len(breaks) == 7
    for at in breaks:
        assert encode(raw[:at].decode()) + encode(raw[at:].decode()) == encode(text)


@pytest.mark.parametrize("run", ["a", " ", "\n", "漢", "😀", "=-", "x" * 999 + " "], ids=ascii)
def test_long_runs_neither_panic_nor_stall(run):
    """Three million characters: more than a segment in one run. The decoded text is the same."""
    text = run * (3_000_000 // len(run))
    assert get_tokenizer("gpt2").decode(get_tokenizer("gpt2").encode(text).tolist()) == text


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ValueError, match=r"'bert'; there are gpt2 \(50257 ids\), bytes \(257 ids\)"):
        get_tokenizer("bert")


# ---- Shards ----------------------------------------------------------------------------------------------------------


def test_a_shard_is_what_its_description_says(tmp_path):
    """Read with nothing but the format's description: 256 int32, then uint16, all little-endian."""
    row = data.write_shard(tmp_path / "x_train_000001.bin", np.array([7, 50256, 65535], dtype=np.uint16))
    content = (tmp_path / "x_train_000001.bin").read_bytes()
    header, tokens = struct.unpack("<256i", content[:1024]), struct.unpack("<3H", content[1024:])
    assert header == (20240520, 1, 3) + (0,) * 253 and tokens == (7, 50256, 65535)
    assert row == {"file": "x_train_000001.bin", "tokens": 3, "sha256": hashlib.sha256(content).hexdigest()}


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


def test_npy_shards_are_read(tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(10, dtype=np.uint16))
    assert data.open_shards(tmp_path, "train")[0].tokens.tolist() == list(range(10))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(10))
    with pytest.raises(ValueError, match="holds int64"):
        data.open_shards(tmp_path, "train")
    for content in (b"", b"junk", (tmp_path / "edufineweb_train_000001.npy").read_bytes()[:-8]):
        (tmp_path / "edufineweb_train_000001.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"edufineweb_train_000001.npy: not a whole .npy file"):
            data.open_shards(tmp_path, "train")


def test_the_name_of_the_folder_does_not_decide_the_split(tmp_path):
    """shards/pre_train_mix once gave its validation shard to training."""
    for name in ("pre_train_mix_val_000001.bin", "pre_train_mix_train_000001.bin"):
        data.write_shard(tmp_path / name, np.zeros(5, dtype=np.uint16))
    assert [shard.path.name for shard in data.open_shards(tmp_path, "train")] == ["pre_train_mix_train_000001.bin"]
    assert [shard.path.name for shard in data.open_shards(tmp_path, "val")] == ["pre_train_mix_val_000001.bin"]


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


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a token shard"),
        (b"\0" * 5000, "not a token shard"),
        (struct.pack("<256i", 20240520, 2, 10, *[0] * 253) + b"\0" * 20, "version 2"),
        (struct.pack("<256i", 20240520, 1, 10, *[0] * 253) + b"\0" * 18, "promises 10 tokens, the file holds 9"),
    ],
)
def test_damaged_shards_are_named(tmp_path, content, message):
    (tmp_path / "x_train_000001.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"x_train_000001.bin: .*{message}"):
        data.open_shards(tmp_path, "train")


def test_unfinished_and_broken_meta(tmp_path):
    data.write_shard(tmp_path / "x_train_000001.bin", np.zeros(10, dtype=np.uint16))
    assert data.read_meta(tmp_path) == {} and len(data.open_shards(tmp_path, "train")) == 1
    (tmp_path / "meta.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="still being written, or interrupted"):
        data.open_shards(tmp_path, "train")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        data.read_meta(tmp_path)


# ---- Law 7: windows and batches --------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    block_size=st.integers(1, 20),
    batch_size=st.integers(1, 3),
    n_accumulate=st.integers(1, 3),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_ranks_and_micro_steps_cover_each_window_of_an_epoch_once(
    lengths, block_size, batch_size, n_accumulate, world_size, seed
):
    source = windows(*lengths, block_size=block_size)
    per_step = batch_size * n_accumulate * world_size
    try:
        batches = Batches(source, batch_size, per_step, world_size, seed)
    except ValueError:
        assert sum(max(0, n - block_size) // block_size for n in lengths) < per_step
        return
    steps = 2 * batches.windows_per_epoch // per_step + 2
    order = [
        tuple(place)
        for step in range(steps)
        for k in range(n_accumulate)
        for rank in range(world_size)
        for place in batches.places(step, k, rank).tolist()
    ]
    for epoch in (0, 1):
        seen = order[epoch * batches.windows_per_epoch :][: batches.windows_per_epoch]
        assert len(set(seen)) == batches.windows_per_epoch
        for shard, n in enumerate(lengths):  # evenly spaced, not overlapping, all inside
            firsts = sorted(first for s, first in seen if s == shard)
            assert len(firsts) == max(0, n - block_size) // block_size
            assert all(b - a == block_size for a, b in itertools.pairwise(firsts))
            assert not firsts or (firsts[0] >= 0 and firsts[-1] + block_size < n)


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    source = windows(500, 90)
    whole = Batches(source, 12, 12, 1, seed=3)
    for batch_size, n_accumulate, world_size in ((6, 2, 1), (6, 1, 2), (2, 2, 3), (1, 1, 12)):
        parts = Batches(source, batch_size, 12, world_size, seed=3)
        for step in (0, 3, 100):
            pieces = [parts.batch(step, k, rank) for k in range(n_accumulate) for rank in range(world_size)]
            assert np.array_equal(np.concatenate(pieces), whole.batch(step))


def test_batches_are_shuffled_shifted_and_seeded():
    source = windows(2000)
    one, two, again = (Batches(source, 4, 4, 1, seed) for seed in (1, 2, 1))
    batch = one.batch(0)
    assert batch.shape == (4, 9) and batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all()  # consecutive tokens
    assert np.array_equal(batch, again.batch(0)) and not np.array_equal(batch, two.batch(0))
    firsts = [one.places(step, 0, 0)[:, 1] for step in range(one.windows_per_epoch // 4)]
    assert not np.array_equal(np.sort(np.concatenate(firsts)), np.concatenate(firsts))
    offsets = {one.draw_epoch(epoch)[1] for epoch in range(20)}
    assert len(offsets) > 3  # epochs begin at different tokens


def test_validation_windows_are_the_first_in_order():
    source = windows(30, 20)
    assert source.first(max_tokens=10**9).tolist() == [[0, 0], [0, 8], [0, 16], [1, 0], [1, 8]]
    assert source.first(max_tokens=17).tolist() == [[0, 0], [0, 8]]
    assert source.first(max_tokens=1).tolist() == [[0, 0]]


def test_too_few_tokens_are_named():
    with pytest.raises(ValueError, match="15 training tokens, but no shard has the 16"):
        Batches(Windows([Shard(Path("d/x"), np.zeros(15, np.uint16))], 8, 257), 1, 1, 1, 0)
    with pytest.raises(ValueError, match="8 validation tokens, but no shard has the 9"):
        Windows([Shard(Path("d/x"), np.zeros(8, np.uint16))], 8, 257).first(100)


def test_an_id_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match=r"shard1: holds the token id 44, but the vocabulary ends at 39"):
        windows(32, 32, vocab_size=40).read(np.array([[0, 3], [1, 4]]))


def test_prefetch_gives_the_batches_in_order():
    batches = Batches(windows(500), 2, 4, 1, seed=0)
    keys = [(step, k) for step in range(5) for k in range(2)]
    got = list(data.prefetch(batches.batch, iter(keys), torch.device("cpu")))
    for key, (x, y) in zip(keys, got, strict=True):
        assert np.array_equal(x, batches.batch(*key)[:, :-1]) and np.array_equal(y, batches.batch(*key)[:, 1:])


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
        patch.setattr(data, "too_few", lambda files, stride: n < stride)
        route, tail = data.split_for([], fraction, seed)
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
    route, _ = data.split_for([], 0, 0)
    assert [(split, part.tolist()) for split, part in route(np.arange(4), [2], 5, 0)] == [
        ("train", [0, 1]),
        ("train", [2, 3]),
    ]
    odd = data.functools.partial(data.split_by_document, is_val=lambda document: document == 4)
    parts = odd(np.arange(4), [2], 5, 0)  # the rest of document 4, and the beginning of document 5
    assert [(split, part.tolist()) for split, part in parts] == [("val", [0, 1]), ("train", [2, 3])]


def test_which_files_are_taken(tmp_path):
    names = ["a.py", "b.txt", "deep/er/c.py", "tests/d.py", "deep/tests/e.py", ".git/f.py", "deep/test_g.py"]
    make(tmp_path, dict.fromkeys(names, "some text\n" * 9), "--tokenizer", "bytes")
    out = tmp_path / "text" / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "shard.py").write_text("written by an earlier run")
    found = data.find_files([str(tmp_path / "text")], "*.py", ["tests", "test_*"], out)
    assert [str(path.relative_to(tmp_path / "text")) for path in found] == ["a.py", "deep/er/c.py"]
    b, a = str(tmp_path / "text" / "**" / "*.txt"), str(tmp_path / "text" / "a.py")
    assert [path.name for path in data.find_files([b, a, b, a], "*", [], out)] == ["b.txt", "a.py"]


def test_the_same_command_again_does_nothing_and_another_is_refused(tmp_path, capsys):
    out = make(tmp_path, {"a.txt": "some text\n" * 50}, "--tokenizer", "bytes")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    data.main([str(tmp_path / "text"), "--out", str(out), "--tokenizer", "bytes"])
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
    tokenise, seen = data.tokenise, []

    def counted(piece, tokenizer_name):
        seen.append(sum(len(text) for text, _ in piece.documents()))
        if sum(seen) > 15_000:
            raise KeyboardInterrupt
        return tokenise(piece, tokenizer_name)

    monkeypatch.setattr(data, "tokenise", counted)
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
    monkeypatch.setattr(data, "ROWS_BYTES", 1000)  # several pieces in a row group
    paths = tables(tmp_path / "tables", "body")
    options = ["--text_column", "body", "--tokenizer", tokenizer, "--val_fraction", "0"]
    data.main([*paths, "--out", str(tmp_path / "out"), *options])
    texts = [text for text in ROWS if text]
    assert documents_of(tmp_path / "out", "train", tokenizer) == [*texts, *texts, *texts, "a text file\n"]
    assert data.read_meta(tmp_path / "out")["source"]["text_column"] == "body"


def test_a_few_rows_give_their_tails(tmp_path):
    rows = ["ab cd ef gh " * 50, "", "x", None, "漢字" * 90]
    pq.write_table(pa.table({"text": rows}), tmp_path / "t.parquet")
    out = tmp_path / "out"
    data.main([str(tmp_path / "t.parquet"), "--out", str(out), "--tokenizer", "bytes", "--val_fraction", "0.1"])
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
        script = "import data, sys; data.PIECE_BYTES, data.ROWS_BYTES = 4000, 1000; data.main(sys.argv[1:])"
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
                data.main([*options, "--shard_tokens", "1000"])
        capsys.readouterr()

    stopped_while(data, "tokenise")  # before anything was written: no harm in another command
    data.main([*options, "--shard_tokens", "4000"])
    shutil.rmtree(tmp_path / "out")
    stopped_while(data.Section, "save")  # with a shard there
    line = fails(capsys, *options, "--shard_tokens", "2000")
    assert "was begun, from something else (shard_tokens 1000 -> 2000)" in line and "delete that folder" in line
    data.main([*options, "--shard_tokens", "1000"])
    assert data.read_meta(tmp_path / "out")["complete"]


def test_two_commands_at_one_folder_do_not_mix(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("some text\n" * 900)
    out = tmp_path / "out"
    with data.prepared(out, {"name": "another"}):
        assert "another process is making these shards" in fails(capsys, str(text), "--out", str(out))
    shutil.rmtree(out)
    with data.prepared(out, {"name": "a part"}, alone=False), data.prepared(out, {"name": "a part"}, alone=False):
        assert "another process" in fails(capsys, str(text), "--out", str(out))
        with (
            pytest.raises(ValueError, match="name a part -> other"),
            data.prepared(out, {"name": "other"}, alone=False),
        ):
            pass
    data.main([str(text), "--out", str(out), "--tokenizer", "bytes"])  # nothing was written there: it may be taken
    assert data.read_meta(out)["complete"]


@pytest.mark.parametrize("meta", ['{"complete": true, "source": null}', '{"tokenizer": 5}', "[]"])
def test_a_meta_that_is_none_is_one_line(tmp_path, capsys, meta):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json").write_text(meta)
    (tmp_path / "a.txt").write_text("text " * 100)
    assert "meta.json: not what data.py writes" in fails(
        capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")
    )


@given(st.text(max_size=12), st.sampled_from([0.05, 0.1, 0.5]))
def test_halves_are_whole_characters(text, tail):
    raw = text.encode("utf-8", errors="replace")
    halves = data.whole_or_halves(raw, tail)
    assert len(halves) == (2 if len(raw.decode()) > 1 else 0)
    assert b"".join(half for half, _ in halves) == (raw if halves else b"")
    assert all(half.decode() and begins for half, begins in halves)


def test_raw_tokens_of_nanogpt_are_read(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    (shard,) = data.open_shards(tmp_path, "train")
    assert shard.tokens.tolist() == list(range(100)) and "no header, so taken as nanoGPT's raw uint16" in shard.note
    with pytest.raises(ValueError, match="no val shards"):
        data.open_shards(tmp_path, "val")
    (tmp_path / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match=r"val.bin: 3 bytes cannot be uint16 tokens"):
        data.open_shards(tmp_path, "val")


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
            data.main(["x.txt", "--out", "y", *option.split()])
        assert exit_.value.code == 2 and option.split()[0] in capsys.readouterr().err


def test_text_that_is_not_utf8(tmp_path):
    """GPT-2's tokens are text, so what is not becomes U+FFFD; bytes stay what they are."""
    latin = b"na\xefve caf\xe9 " * 40
    out = make(tmp_path, {"latin.txt": latin}, "--tokenizer", "gpt2", "--val_fraction", "0")
    assert get_tokenizer("gpt2").decode(data.open_shards(out, "train")[0].tokens[1:].tolist()).startswith("na\ufffdve")
    other = tmp_path / "bytes"
    data.main([str(tmp_path / "text"), "--out", str(other), "--tokenizer", "bytes", "--val_fraction", "0"])
    assert bytes(data.open_shards(other, "train")[0].tokens[1:].tolist()) == latin
    assert json.loads((other / "meta.json").read_text())["tokens"] == {"train": len(latin) + 1, "val": 0}
