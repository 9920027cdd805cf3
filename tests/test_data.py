"""Shards, windows, batches, and their loader."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import threading
from pathlib import Path

from parts import data
from parts.data import Batches, BatchLoader, Shard, TokenWindows
from parts.files import write_whole
from parts.tokenizer import get_tokenizer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def make_windows(*lengths: int, block_size: int = 8, vocab_size: int = 60_000) -> TokenWindows:
    """Shards in memory whose tokens count up from 0 through all of them.

    So a token tells where it stands.
    """
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1], dtype=np.uint16)
    shards = []
    for number, part in enumerate(np.split(tokens, ends[:-1])):
        shards.append(Shard(Path(f"shard{number}"), part))
    return TokenWindows(shards, block_size, vocab_size)


# ---- Shards --------------------------------------------------------------------------------------


def test_a_shard_is_what_its_description_says(tmp_path):
    """Read with nothing but the format's description: 256 int32, then uint16, all little-endian."""
    row = data.write_shard(
        tmp_path / "x_train_000001.bin", np.array([7, 50256, 65535], dtype=np.uint16)
    )
    content = (tmp_path / "x_train_000001.bin").read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header == (20240520, 1, 3) + (0,) * 253
    tokens = struct.unpack("<3H", content[1024:])
    assert tokens == (7, 50256, 65535)
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
    for split in ("val", "train"):
        path = tmp_path / f"pre_train_mix_{split}_000001.bin"
        data.write_shard(path, np.zeros(5, dtype=np.uint16))
    for split in ("val", "train"):
        [shard] = data.open_shards(tmp_path, split)
        assert shard.path.name == f"pre_train_mix_{split}_000001.bin"


@pytest.mark.parametrize(
    "magic, version, promised", [(0, 1, 9), (20240520, 2, 9), (20240520, 1, 10)]
)
def test_damaged_shards_are_named(tmp_path, magic, version, promised):
    header = struct.pack("<3i1012x", magic, version, promised)
    (tmp_path / "x_train_000001.bin").write_bytes(header + bytes(2 * 9))
    message = "promises 10 tokens .20 bytes., the file holds 18 bytes"
    if promised == 9:
        message = "not a token shard"
    with pytest.raises(ValueError, match=f"x_train_000001.bin: .*{message}"):
        data.open_shards(tmp_path, "train")


def test_unfinished_and_broken_meta(tmp_path):
    data.write_shard(tmp_path / "x_train_000001.bin", np.zeros(10, dtype=np.uint16))
    assert data.read_meta(tmp_path) == {}
    assert len(data.open_shards(tmp_path, "train")) == 1
    (tmp_path / "meta.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="still being written, or interrupted"):
        data.open_shards(tmp_path, "train")
    for content in ("{", "[]", '{"complete": true, "source": null}', '{"tokenizer": 5}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(ValueError, match=r"meta.json: damaged, or not what prepare"):
            data.read_meta(tmp_path)


def test_shards_must_be_those_of_meta(tmp_path):
    """One is missing, one is new, one has another length: each is named, with both counts."""
    for number, n_tokens in enumerate((10, 20, 30), 1):
        data.write_shard(tmp_path / f"x_train_00000{number}.bin", np.zeros(n_tokens, np.uint16))
    counts = {"x_train_000001.bin": 10, "x_train_000002.bin": 20, "x_train_000003.bin": 30}

    def open_with(**changes: int | None) -> int:
        rows = []
        for file, tokens in (counts | {f"{name}.bin": n for name, n in changes.items()}).items():
            if tokens is not None:
                rows.append({"file": file, "tokens": tokens})
        (tmp_path / "meta.json").write_text(json.dumps({"shards": {"train": rows}}))
        return len(data.open_shards(tmp_path, "train"))

    assert open_with() == 3
    with pytest.raises(ValueError, match=r"x_train_000002.bin: 20 tokens here, 21 by meta.json;"):
        open_with(x_train_000002=21)
    with pytest.raises(ValueError, match=r"x_train_000003.bin: 30 tokens here, none by meta.json"):
        open_with(x_train_000003=None)
    with pytest.raises(ValueError, match=r"x_train_000004.bin: no tokens here, 40 by meta.json;"):
        open_with(x_train_000004=40)


def test_the_tokenizer_of_shards_is_named_by_meta(tmp_path):
    assert (
        data.tokenizer_of_shards(tmp_path).name == "gpt2"
    )  # as published shards have no meta.json
    (tmp_path / "meta.json").write_text('{"tokenizer": "bytes"}')
    assert data.tokenizer_of_shards(tmp_path).name == "bytes"
    (tmp_path / "meta.json").write_text('{"tokenizer": "bpe300-0123456789abcdef"}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not there; copy the folder whole"):
        data.tokenizer_of_shards(tmp_path)


def test_raw_tokens_of_nanogpt_are_read(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    (shard,) = data.open_shards(tmp_path, "train")
    assert shard.tokens.tolist() == list(range(100))
    with pytest.raises(ValueError, match="no val shards"):
        data.open_shards(tmp_path, "val")
    (tmp_path / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match=r"val.bin: 3 bytes cannot be uint16 tokens"):
        data.open_shards(tmp_path, "val")


# ---- Windows -------------------------------------------------------------------------------------


def test_validation_windows_are_the_first_in_order():
    windows = make_windows(30, 20)
    all_starts = [[0, 0], [0, 8], [0, 16], [1, 0], [1, 8]]
    assert windows.select_first(max_tokens=10**9).tolist() == all_starts
    assert windows.select_first(max_tokens=17).tolist() == all_starts[:2]
    assert windows.select_first(max_tokens=1).tolist() == all_starts[:1]


def test_a_sample_is_windows_from_all_over():
    windows = make_windows(30, 7, 20)
    all_starts = [[0, 0], [0, 8], [0, 16], [2, 0], [2, 8]]
    assert windows.select_spread(max_tokens=10**9).tolist() == all_starts
    assert windows.select_spread(max_tokens=25).tolist() == [[0, 0], [0, 16], [2, 8]]
    assert windows.select_spread(max_tokens=17).tolist() == [[0, 0], [2, 8]]
    assert windows.select_spread(max_tokens=1).tolist() == [[0, 0]]


def test_bits_per_byte_of_one_nat_a_token():
    """150 windows of 8 targets, whose bytes are counted one by one."""
    tokenizer = get_tokenizer("gpt2")
    windows = make_windows(1250)
    starts = windows.select_first(150 * 8)
    targets = windows.read(starts)[:, 1:].flatten().tolist()
    n_bytes = sum(len(tokenizer.decode_bytes([token])) for token in targets)
    assert windows.bits_per_byte(starts, tokenizer) == pytest.approx(
        150 * 8 / n_bytes / math.log(2), rel=1e-12
    )


def test_too_few_tokens_are_named():
    def make(n_tokens: int) -> TokenWindows:
        return TokenWindows([Shard(Path("d/x"), np.zeros(n_tokens, np.uint16))], 8, 257)

    with pytest.raises(ValueError, match="15 training tokens, but no shard has the 16"):
        Batches(make(15), batch_size=1, windows_per_step=1, world_size=1, seed=0)
    with pytest.raises(ValueError, match="make 3 windows of 8, too few for a step of 4"):
        Batches(make(32), batch_size=4, windows_per_step=4, world_size=1, seed=0)
    with pytest.raises(ValueError, match="8 validation tokens, but no shard has the 9"):
        make(8).select_first(100)
    with pytest.raises(ValueError, match="8 training tokens, but no shard has the 9"):
        make(8).select_spread(100)


def test_an_id_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="shard1: holds the token id 44; the largest is 39"):
        make_windows(32, 32, vocab_size=40).read(np.array([[0, 3], [1, 4]]))


# ---- Batches: law 7 of CONTRIBUTING.md -----------------------------------------------------------


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.integers(1, 20),
    st.tuples(*[st.integers(1, 3)] * 3),
)
def test_ranks_and_micro_steps_cover_each_window_of_an_epoch_once(lengths, block_size, counts):
    batch_size, n_micro_steps, world_size = counts
    windows = make_windows(*lengths, block_size=block_size)
    windows_per_step = math.prod(counts)
    windows_per_shard = [max(0, n - block_size) // block_size for n in lengths]
    try:
        batches = Batches(
            windows,
            batch_size=batch_size,
            windows_per_step=windows_per_step,
            world_size=world_size,
            seed=sum(lengths),
        )
    except ValueError:
        assert sum(windows_per_shard) < windows_per_step
        return
    n = batches.windows_per_epoch
    assert n == sum(windows_per_shard)

    order = []
    steps = 2 * n // windows_per_step + 2
    for key in itertools.product(range(steps), range(n_micro_steps), range(world_size)):
        order += map(tuple, batches.find_starts(*key).tolist())
    for epoch in (order[:n], order[n : 2 * n]):
        assert len(set(epoch)) == n
        # In each shard they are evenly spaced, do not overlap, and all lie inside.
        for shard, length in enumerate(lengths):
            firsts = sorted(first for s, first in epoch if s == shard)
            assert len(firsts) == windows_per_shard[shard]
            assert all(b - a == block_size for a, b in itertools.pairwise(firsts))
            assert not firsts or (firsts[0] >= 0 and firsts[-1] + block_size < length)


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    windows = make_windows(500, 90)
    whole = Batches(windows, batch_size=12, windows_per_step=12, world_size=1, seed=3)
    for batch_size, n_micro_steps, world_size in ((6, 2, 1), (6, 1, 2), (2, 2, 3), (1, 1, 12)):
        batches = Batches(
            windows, batch_size=batch_size, windows_per_step=12, world_size=world_size, seed=3
        )
        for step in (0, 3, 100):
            parts = []
            for micro_step in range(n_micro_steps):
                for rank in range(world_size):
                    parts.append(batches.batch(step, micro_step, rank))
            assert np.array_equal(np.concatenate(parts), whole.batch(step))


def test_batches_are_shuffled_shifted_and_seeded():
    windows = make_windows(2000)

    def make(seed: int) -> Batches:
        return Batches(windows, batch_size=4, windows_per_step=4, world_size=1, seed=seed)

    batches = make(1)
    batch = batches.batch(0)
    assert batch.shape == (4, 9)
    assert batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all()
    assert np.array_equal(batch, make(1).batch(0))
    assert not np.array_equal(batch, make(2).batch(0))
    steps = range(batches.windows_per_epoch // 4)
    firsts = np.concatenate([batches.find_starts(step, 0, 0)[:, 1] for step in steps])
    assert not np.array_equal(np.sort(firsts), firsts)
    offsets = {batches.draw_epoch(epoch)[1] for epoch in range(20)}
    assert len(offsets) > 3


# ---- The loader ----------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def batches() -> Batches:
    """Of two ranks and two micro-steps."""
    return Batches(make_windows(500), batch_size=2, windows_per_step=8, world_size=2, seed=0)


@pytest.fixture
def loader(batches):
    """Rank 1's batches of the steps 3, 4 and 5."""
    loader = BatchLoader(batches, rank=1, n_micro_steps=2, first_step=3, end_step=6, device=CPU)
    with contextlib.closing(loader):
        yield loader


def test_the_loader_gives_the_batches_in_order(batches, loader):
    for step in (3, 4, 5):
        for micro_step in (0, 1):
            x, y = loader.batch(step, micro_step)
            expected = batches.batch(step, micro_step, rank=1)
            assert x.dtype == y.dtype == torch.int64
            assert np.array_equal(x, expected[:, :-1])
            assert np.array_equal(y, expected[:, 1:])


@pytest.mark.parametrize("step, micro_step", [(3, 0), (4, 0), (3, 2), (2, 1)])
def test_the_loader_must_be_asked_in_order(loader, step, micro_step):
    loader.batch(3, 0)
    with pytest.raises(AssertionError, match=r"the next is \(3, 1\)"):
        loader.batch(step, micro_step)
    loader.batch(3, 1)  # the mistake has moved nothing


def test_the_loader_ends_with_the_last_step(batches, loader):
    for step in (3, 4, 5):
        loader.batch(step, 0)
        loader.batch(step, 1)
    with pytest.raises(AssertionError, match="6 is the end"):
        loader.batch(6, 0)
    # A run that only evaluates has no batch at all.
    empty = BatchLoader(batches, rank=0, n_micro_steps=2, first_step=6, end_step=6, device=CPU)
    empty.close()


def test_the_loader_reads_one_batch_ahead_and_no_more(batches, loader, monkeypatch):
    """And does so on a thread of its own."""
    read = batches.batch
    keys = []
    threads = set()
    is_read = threading.Semaphore(0)

    def watched(*key):
        keys.append(key)
        threads.add(threading.current_thread())
        batch = read(*key)
        is_read.release()
        return batch

    loader.pending.result(timeout=10)  # step 3, micro-step 0 was read before anyone asked
    monkeypatch.setattr(batches, "batch", watched)
    loader.batch(3, 0)
    assert is_read.acquire(timeout=10)
    loader.pending.result(timeout=10)
    assert keys == [(3, 1, 1)]
    loader.batch(3, 1)
    assert is_read.acquire(timeout=10)
    assert keys == [(3, 1, 1), (4, 0, 1)]
    assert threading.current_thread() not in threads


def test_what_goes_wrong_on_the_thread_reaches_the_run():
    windows = make_windows(64, vocab_size=40)
    batches = Batches(windows, batch_size=7, windows_per_step=7, world_size=1, seed=0)
    loader = BatchLoader(batches, rank=0, n_micro_steps=1, first_step=0, end_step=9, device=CPU)
    with contextlib.closing(loader), pytest.raises(ValueError, match="shard0: holds the token id"):
        loader.batch(0, 0)


def test_close_ends_the_thread(loader):
    loader.batch(3, 0)
    [thread] = loader.thread._threads
    loader.close()
    assert not thread.is_alive()


def test_llmcs_small_datasets_have_names_without_a_number(tmp_path):
    for split in ("train", "val"):
        data.write_shard(tmp_path / f"tiny_shakespeare_{split}.bin", np.arange(9, dtype=np.uint16))
    [shard] = data.open_shards(tmp_path, "train")
    assert shard.tokens.tolist() == list(range(9))


def test_a_train_bin_with_llmcs_header_is_a_shard(tmp_path):
    data.write_shard(tmp_path / "train.bin", np.arange(9, dtype=np.uint16))
    [shard] = data.open_shards(tmp_path, "train")
    assert shard.tokens.tolist() == list(range(9))


def test_missing_shards_name_the_folders_that_are_there(shards, tmp_path, monkeypatch):
    for name in ("tale", "other"):
        (tmp_path / "shards" / name).mkdir(parents=True)
    for file in shards.iterdir():
        shutil.copy(file, tmp_path / "shards" / "tale")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"shards/tail \(there are shards/tale\); make"):
        data.open_shards("shards/tail", "train")
