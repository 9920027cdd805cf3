"""Tokenizers, shards, windows and batches, and the command that makes shards of local text."""

import hashlib
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Batches, Shard, ShardWriter, Windows, choose_split, get_tokenizer


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
    writer, tokens = ShardWriter(folder, "train", shard_tokens), np.arange(sum(documents), dtype=np.uint16)
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
        assert "choose a new folder" in fails(capsys, str(notes / "notes_2024.txt"), "--out", str(out))
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
    out = make(tmp_path, {"book.txt": "abcdefghij" * 10}, "--tokenizer", "bytes", "--val_fraction", "0.1")
    train, val = (data.open_shards(out, split)[0].tokens for split in ("train", "val"))
    assert bytes(train[1:].tolist()) == b"abcdefghij" * 9 and bytes(val[1:].tolist()) == b"abcdefghij"


@given(st.integers(1, 500), st.sampled_from([0, 0.01, 0.05, 0.1, 0.3, 0.5]), st.integers(0, 3))
def test_the_split_takes_its_share(n, fraction, seed):
    parts = choose_split(n, fraction, seed)
    assert len(parts) == n and parts == choose_split(n, fraction, seed)
    if fraction and n >= round(1 / fraction):
        assert parts.count(0.0) == n // round(1 / fraction) >= 1
    elif fraction:
        assert parts == [1 - fraction] * n


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


def test_an_interrupted_command_run_again_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Law 8: killed while the third shard was being written. What is there then is not taken for a whole."""
    files, options = {"a.txt": "some text\n" * 500}, ("--tokenizer", "bytes", "--shard_tokens", "1000")
    out = make(tmp_path, files, *options)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for path in out.iterdir():
        path.unlink()
    calls, write = [], data.write_whole

    def killed(path, content):
        calls.append(path)
        if len(calls) == 4:  # meta.json, two shards, and this one
            path.with_name(path.name + ".tmp").write_bytes(content[:100])
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(data, "write_whole", killed)
    with pytest.raises(SystemExit, match="130"):
        make(tmp_path, files, *options)
    assert len(list(out.glob("*.bin"))) == 2
    with pytest.raises(ValueError, match="interrupted"):
        data.open_shards(out, "train")
    monkeypatch.setattr(data, "write_whole", write)
    make(tmp_path, files, *options)
    assert whole == {path.name: path.read_bytes() for path in out.iterdir()}


def test_bad_input_is_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0binary")
    (tmp_path / "a.txt").write_text("a")
    assert "nowhere.txt: no such file or folder" in fails(capsys, str(tmp_path / "nowhere.txt"), *out)
    assert "empty.txt: empty" in fails(capsys, str(tmp_path / "empty.txt"), *out)
    line = fails(capsys, str(tmp_path), *out)
    assert "photo.jpg: binary (NUL bytes), not text; leave out with --exclude '*.jpg'" in line
    assert "no files match '*.md'" in fails(capsys, str(tmp_path), *out, "--glob", "*.md")
    assert "too little text" in fails(capsys, str(tmp_path / "a.txt"), *out)
    (tmp_path / "file").touch()
    assert "file" in fails(capsys, str(tmp_path / "a.txt"), "--out", str(tmp_path / "file" / "out"))
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
