"""Tokenizers, shards, windows and batches."""

import errno
import hashlib
import itertools
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parts import data, tokenizer
from parts.data import Batches, Shard, Windows
from parts.files import write_whole
from parts.tokenizer import BREAK, TOKENIZERS, get_tokenizer, save_tokenizer, segments


def windows(*lengths: int, block_size: int = 8, vocab_size: int = 60_000) -> Windows:
    """Shards in memory whose tokens count up from 0 through all of them, so that a token tells its
    place.
    """
    parts = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])
    return Windows(
        [Shard(Path(f"shard{i}"), part) for i, part in enumerate(parts)], block_size, vocab_size
    )


# ---- Tokenizers ----------------------------------------------------------------------------------


@given(st.text())
def test_tokenizers_give_back_the_text(text):
    text = text.encode("utf-8", errors="replace").decode()  # lone surrogates are no text
    for name in TOKENIZERS:
        tokenizer = get_tokenizer(name)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and (ids < tokenizer.end_of_text).all()
        assert tokenizer.decode(ids.tolist()) == text


def test_gpt2_ids_are_the_known_ones():
    ids = get_tokenizer("gpt2").encode("Hello, I'm a language model,")
    assert (
        ids.tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
        and get_tokenizer(50257).end_of_text == 50256
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_reads_our_tokenizer_files(tmp_path, name):
    from transformers import AutoTokenizer

    ours = get_tokenizer(name)
    save_tokenizer(ours, tmp_path, block_size=64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn x  # naïve ☃ 𝄞 \x00 don't   stop\n"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs.eos_token_id == ours.end_of_text and len(theirs) == ours.vocab_size


SPACE = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2009",
    "\u2028",
    "\u205f",
    "\u3000",
]


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["word", "don't", "naïve", "漢字。", "☃", "12", "! ?", *SPACE])),
    st.integers(2, 30),
)
def test_segments_tokenise_as_the_whole(parts, size):
    """Cut at a break, a text has the same ids; and where there is none, the same text."""
    text = "".join(parts)
    encode, raw = get_tokenizer("gpt2").encoding.encode_ordinary, text.encode()
    breaks = [match.start() for match in BREAK.finditer(raw)]
    places = [i for i in range(1, len(text)) if text[i] in " \n" and not text[i - 1].isspace()]
    assert breaks == [len(text[:i].encode()) for i in places]
    for at in breaks:
        assert encode(raw[:at].decode()) + encode(raw[at:].decode()) == encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_BYTES", 2 * size)
        pieces, ids = (
            list(segments(raw, 0, len(raw), size=size)),
            get_tokenizer("gpt2").encode(text).tolist(),
        )
    assert b"".join(pieces) == raw and get_tokenizer("gpt2").decode(ids) == text
    if set(itertools.accumulate(map(len, pieces[:-1]))) <= set(breaks):
        assert ids == encode(text)


@pytest.mark.parametrize(
    "run",
    ["a", " ", "\n", "漢", "😀", "=-", "x" * 999 + " ", " " * 1_000_001 + "a"],
    ids=lambda run: ascii(run[:4]),
)
def test_long_runs_neither_panic_nor_stall(run):
    """Three million characters: more than a segment in one run. The decoded text is the same."""
    text = run * (3_000_000 // len(run))
    assert get_tokenizer("gpt2").decode(get_tokenizer("gpt2").encode(text).tolist()) == text


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(
        ValueError, match=r"'bert'; there are gpt2 \(50257 ids\), bytes \(257 ids\)"
    ):
        get_tokenizer("bert")


# ---- Shards --------------------------------------------------------------------------------------


def test_a_shard_is_what_its_description_says(tmp_path):
    """Read with nothing but the format's description: 256 int32, then uint16, all little-endian."""
    row = data.write_shard(
        tmp_path / "x_train_000001.bin", np.array([7, 50256, 65535], dtype=np.uint16)
    )
    content = (tmp_path / "x_train_000001.bin").read_bytes()
    header, tokens = struct.unpack("<256i", content[:1024]), struct.unpack("<3H", content[1024:])
    assert header == (20240520, 1, 3) + (0,) * 253 and tokens == (7, 50256, 65535)
    assert row == {
        "file": "x_train_000001.bin",
        "tokens": 3,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x'"):
        write_whole(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


def test_npy_shards_are_read(tmp_path):
    path = tmp_path / "edufineweb_train_000001.npy"
    np.save(path, np.arange(10, dtype=np.uint16))
    assert data.open_shards(tmp_path, "train")[0].tokens.tolist() == list(range(10))
    for content in (b"", b"junk", path.read_bytes()[:-8]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"edufineweb_train_000001.npy: not a whole .npy file"):
            data.open_shards(tmp_path, "train")
    np.save(path, np.arange(10))
    with pytest.raises(ValueError, match="holds int64"):
        data.open_shards(tmp_path, "train")


def test_the_name_of_the_folder_does_not_decide_the_split(tmp_path):
    """shards/pre_train_mix once gave its validation shard to training."""
    for name in ("pre_train_mix_val_000001.bin", "pre_train_mix_train_000001.bin"):
        data.write_shard(tmp_path / name, np.zeros(5, dtype=np.uint16))
    assert [shard.path.name for shard in data.open_shards(tmp_path, "train")] == [
        "pre_train_mix_train_000001.bin"
    ]
    assert [shard.path.name for shard in data.open_shards(tmp_path, "val")] == [
        "pre_train_mix_val_000001.bin"
    ]


@pytest.mark.parametrize(
    "magic, version, promised", [(0, 1, 9), (20240520, 2, 9), (20240520, 1, 10)]
)
def test_damaged_shards_are_named(tmp_path, magic, version, promised):
    (tmp_path / "x_train_000001.bin").write_bytes(
        struct.pack("<3i1012x", magic, version, promised) + bytes(2 * 9)
    )
    message = "not a token shard" if promised == 9 else "promises 10 tokens, the file holds 9;"
    with pytest.raises(ValueError, match=f"x_train_000001.bin: .*{message}"):
        data.open_shards(tmp_path, "train")


def test_unfinished_and_broken_meta(tmp_path):
    data.write_shard(tmp_path / "x_train_000001.bin", np.zeros(10, dtype=np.uint16))
    assert data.read_meta(tmp_path) == {} and len(data.open_shards(tmp_path, "train")) == 1
    (tmp_path / "meta.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="still being written, or interrupted"):
        data.open_shards(tmp_path, "train")
    for content in ("{", "[]", '{"complete": true, "source": null}', '{"tokenizer": 5}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(ValueError, match=r"meta.json: damaged, or not what prepare"):
            data.read_meta(tmp_path)


# ---- Law 7: windows and batches ------------------------------------------------------------------


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.integers(1, 20),
    st.tuples(*[st.integers(1, 3)] * 3),
)
def test_ranks_and_micro_steps_cover_each_window_of_an_epoch_once(lengths, block_size, counts):
    batch_size, n_accumulate, world_size = counts
    source = windows(*lengths, block_size=block_size)
    per_step = math.prod(counts)
    try:
        batches = Batches(source, batch_size, per_step, world_size, seed=sum(lengths))
    except ValueError:
        assert sum(max(0, n - block_size) // block_size for n in lengths) < per_step
        return
    steps = 2 * batches.windows_per_epoch // per_step + 2
    keys = itertools.product(range(steps), range(n_accumulate), range(world_size))
    order = [tuple(place) for key in keys for place in batches.places(*key).tolist()]
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
            pieces = [
                parts.batch(step, k, rank)
                for k in range(n_accumulate)
                for rank in range(world_size)
            ]
            assert np.array_equal(np.concatenate(pieces), whole.batch(step))


def test_batches_are_shuffled_shifted_and_seeded():
    source = windows(2000)
    one, two, again = (Batches(source, 4, 4, 1, seed) for seed in (1, 2, 1))
    batch = one.batch(0)
    assert batch.shape == (4, 9) and batch.dtype == np.int64 and (np.diff(batch, axis=1) == 1).all()
    assert np.array_equal(batch, again.batch(0)) and not np.array_equal(batch, two.batch(0))
    firsts = np.concatenate(
        [one.places(step, 0, 0)[:, 1] for step in range(one.windows_per_epoch // 4)]
    )
    assert not np.array_equal(np.sort(firsts), firsts)
    assert (
        len({one.draw_epoch(epoch)[1] for epoch in range(20)}) > 3
    )  # epochs begin at different tokens


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
    with pytest.raises(ValueError, match="shard1: holds the token id 44; the largest is 39"):
        windows(32, 32, vocab_size=40).read(np.array([[0, 3], [1, 4]]))


def test_prefetch_gives_the_batches_in_order():
    batches = Batches(windows(500), 2, 4, 1, seed=0)
    keys = [(step, k) for step in range(5) for k in range(2)]
    got = list(data.prefetch(batches.batch, iter(keys), torch.device("cpu")))
    for key, (x, y) in zip(keys, got, strict=True):
        assert np.array_equal(x, batches.batch(*key)[:, :-1]) and np.array_equal(
            y, batches.batch(*key)[:, 1:]
        )


def test_raw_tokens_of_nanogpt_are_read(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    (shard,) = data.open_shards(tmp_path, "train")
    assert shard.tokens.tolist() == list(range(100))
    with pytest.raises(ValueError, match="no val shards"):
        data.open_shards(tmp_path, "val")
    (tmp_path / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match=r"val.bin: 3 bytes cannot be uint16 tokens"):
        data.open_shards(tmp_path, "val")
