"""Tokens for training: the shard format, windows, and batches. (prepare.py and fineweb.py make
shards.)

A shard, NAME_train_000001.bin, is a header of 256 little-endian int32 (magic 20240520, version 1,
number of tokens) and then uint16 tokens: the format of llm.c and modded-nanogpt, so published
shards work here and ours work there. Every document begins with the end-of-text token. meta.json
beside the shards says what they were made of and with.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parts.files import sha256, write_whole
from parts.tokenizer import Tokenizer

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4


# ---- Shards --------------------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write uint16 tokens as a shard file, atomically. Returns its row of meta.json."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_whole(path, header, tokens.astype("<u2", copy=False))
    return {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}


@dataclass(frozen=True)
class Shard:
    path: Path
    tokens: np.ndarray  # uint16, memory-mapped: only the pages that are read take memory


def open_shard(path: Path) -> Shard:
    """Memory-map one shard, checked: ours and llm.c's .bin, or build-nanogpt's .npy. ValueError if
    it is damaged.
    """
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path}: not a whole .npy file ({error}). Copy it or make it again"
            ) from None
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(
                f"{path}: holds {tokens.dtype} of shape {tokens.shape}; tokens are a row of uint16"
            )
        return Shard(path, tokens)

    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or tuple(header[:2]) != (MAGIC, VERSION):
        raise ValueError(
            f"{path}: not a token shard: it does not begin with {MAGIC} and version {VERSION} (uint16)"
        )
    held = (path.stat().st_size - HEADER_BYTES) / 2
    if held != header[2]:
        raise ValueError(
            f"{path}: its header promises {header[2]} tokens, the file holds {int(held)}; copy it again"
        )
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))


def open_shards(data_dir: str | Path, split: str) -> list[Shard]:
    """All shards of a split, in the order of their names. ValueError if there are none, or one is
    not whole.
    """
    folder = Path(data_dir)
    paths = sorted(p for p in folder.glob("*") if re.search(rf"_{split}_\d+\.(bin|npy)$", p.name))
    raw = folder / f"{split}.bin"
    if (
        not paths and raw.is_file()
    ):  # nanoGPT's: uint16 tokens and nothing else, so hardly anything can be checked
        if (size := raw.stat().st_size) == 0 or size % 2:
            raise ValueError(
                f"{raw}: {size:,} bytes cannot be uint16 tokens. Copy it or make it again"
            )
        return [Shard(raw, np.memmap(raw, dtype="<u2", mode="r"))]
    if not paths:
        make = f"python fineweb.py, or python prepare.py TEXT --out {folder}"
        raise ValueError(f"data_dir: no {split} shards in {folder.absolute()}; make them: {make}")
    meta = read_meta(folder)
    if not meta.get("complete", True):
        raise ValueError(
            f"{folder}: still being written, or interrupted; run the command that makes it again"
        )
    shards = [open_shard(path) for path in paths]
    promised = {row["file"]: row["tokens"] for row in meta.get("shards", {}).get(split, [])}
    found = {shard.path.name: len(shard.tokens) for shard in shards}
    for name in promised.keys() | found.keys() if promised else ():
        if promised.get(name) != found.get(name):
            counts = (
                f"{found.get(name, 'no')} tokens here, {promised.get(name, 'none')} by meta.json"
            )
            raise ValueError(f"{folder / name}: {counts}; copy the folder whole, or make it again")
    return shards


def read_meta(data_dir: str | Path) -> dict:
    """meta.json of a shard folder; {} without one, as beside published shards. ValueError if it is
    not readable.
    """
    path = Path(data_dir) / "meta.json"
    kinds = {"tokenizer": str, "source": dict, "shards": dict, "complete": bool}
    with suppress(ValueError):
        meta = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(meta, dict) and all(
            isinstance(meta.get(name, kind()), kind) for name, kind in kinds.items()
        ):
            return meta
    raise ValueError(f"{path}: damaged, or not what prepare.py writes; make the shards again")


# ---- Batches -------------------------------------------------------------------------------------


class Windows:
    """Shards seen as windows of T + 1 tokens: T to read, and the same T shifted by one to
    predict.
    """

    def __init__(self, shards: list[Shard], block_size: int, vocab_size: int):
        self.shards, self.block_size, self.vocab_size = shards, block_size, vocab_size
        self.n_tokens = sum(len(shard.tokens) for shard in shards)

    def read(self, places: np.ndarray) -> np.ndarray:
        """The windows at (shard, first token) rows (B, 2) -> (B, T + 1) int64. ValueError if the
        model lacks an id.
        """
        batch = [
            self.shards[s].tokens[first : first + self.block_size + 1]
            for s, first in places.tolist()
        ]
        batch = np.stack(batch).astype(np.int64)
        if batch.max() >= self.vocab_size:
            shard = self.shards[
                places[batch.max(axis=1).argmax(), 0]
            ]  # made with another tokenizer, or damaged
            raise ValueError(
                f"{shard.path}: holds the token id {batch.max()}; the largest is {self.vocab_size - 1}"
            )
        return batch

    def first(self, max_tokens: int) -> np.ndarray:
        """Places (n, 2) of the first windows in order, max_tokens or as many as there are: for
        validation.
        """
        T = self.block_size
        places = [
            (s, first)
            for s, shard in enumerate(self.shards)
            for first in range(0, len(shard.tokens) - T, T)
        ]
        if not places:
            raise ValueError(self.too_small("validation", T + 1))
        return np.array(places[: max(1, max_tokens // T)])

    def bits_per_byte(self, places: np.ndarray, tokenizer: Tokenizer) -> float:
        """The bits a byte of a loss of one nat a token, over the tokens that the windows at these
        places predict.
        """
        counts, batches = tokenizer.byte_counts(), np.array_split(places, -(-len(places) // 64))
        n_bytes = sum(int(counts[self.read(batch)[:, 1:]].sum()) for batch in batches)
        return len(places) * self.block_size / max(1, n_bytes) / math.log(2)

    def too_small(self, split: str, needed: int) -> str:
        missing = f"no shard has the {needed:,} that block_size {self.block_size} needs"
        advice = "take more text, a smaller block_size, or another --val_fraction"
        return f"{self.shards[0].path.parent}: {self.n_tokens:,} {split} tokens, but {missing}; {advice}"


class Batches:
    """The training batches of a run, as a pure function of step, micro-step and rank.

    An epoch is all non-overlapping windows in random order. Where in a shard its first window
    begins is drawn anew for each epoch, so two epochs do not show the same windows. Each step takes
    the next `windows_per_step` of that order, and each rank and micro-step its part of them: the
    global batch is the same on any number of ranks, no two of them see the same window, and to
    resume takes nothing but the step number.
    """

    def __init__(
        self, windows: Windows, batch_size: int, windows_per_step: int, world_size: int, seed: int
    ):
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.windows_per_step, self.world_size = windows_per_step, world_size
        # Beginning at any offset below T, a shard of n tokens has room for (n - T) // T windows and
        # the token after.
        T = windows.block_size
        self.ends = np.cumsum([max(0, len(shard.tokens) - T) // T for shard in windows.shards])
        self.windows_per_epoch = int(self.ends[-1])
        if self.windows_per_epoch == 0:
            raise ValueError(windows.too_small("training", 2 * T))
        if self.windows_per_epoch < windows_per_step:
            what = (
                f"{windows.n_tokens:,} training tokens make {self.windows_per_epoch} windows of {T}"
            )
            advice = f"too few for a step of {windows_per_step}; take more text or a lower total_batch_size"
            raise ValueError(f"{windows.shards[0].path.parent}: {what}, {advice}")
        self.epoch = functools.lru_cache(maxsize=2)(
            self.draw_epoch
        )  # two: a step may lie across an epoch's end

    def draw_epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        """An epoch's windows in random order, and the offset of the first window of each shard."""
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.windows.block_size))
        return rng.permutation(np.arange(self.windows_per_epoch, dtype=np.int32)), offset

    def places(self, step: int, micro_step: int, rank: int) -> np.ndarray:
        """(shard, first token) of each window of this batch: (batch_size, 2)."""
        first = (
            step * self.windows_per_step + (micro_step * self.world_size + rank) * self.batch_size
        )
        places = []
        for position in range(first, first + self.batch_size):
            epoch, index = divmod(position, self.windows_per_epoch)
            order, offset = self.epoch(epoch)
            shard = int(np.searchsorted(self.ends, order[index], side="right"))
            window = int(order[index]) - (
                int(self.ends[shard - 1]) if shard else 0
            )  # counted in its shard
            places.append((shard, offset + window * self.windows.block_size))
        return np.array(places)

    def batch(self, step: int, micro_step: int = 0, rank: int = 0) -> np.ndarray:
        """(batch_size, T + 1) int64."""
        return self.windows.read(self.places(step, micro_step, rank))


def prefetch(make: Callable[..., np.ndarray], keys: Iterator[tuple], device) -> Iterator[tuple]:
    """For each key, (x, y) = make(*key) on the torch.device, (B, T) each; the next is read while
    this one is in use.
    """
    import torch  # here alone, so that prepare.py starts in a tenth of a second

    def read(key):
        batch = torch.from_numpy(make(*key))
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(read, next(keys))
        while coming:
            # Only from pinned memory: otherwise the copy may still be reading when the memory is
            # freed.
            batch = coming.result().to(device, non_blocking=device.type == "cuda")
            key = next(keys, None)
            coming = thread.submit(read, key) if key is not None else None
            yield batch[:, :-1], batch[:, 1:]
