"""Tokens for training: shards, windows, and batches. (prepare.py and fineweb.py make shards.)

A shard, NAME_train_000001.bin, is a header of 256 little-endian int32 (magic 20240520, version 1,
number of tokens) and then uint16 tokens. It is the format of llm.c and modded-nanogpt, so published
shards work here and ours work there. Every document begins with the end-of-text token. meta.json
beside the shards says what they were made of and with.
"""

if __name__ == "__main__":
    raise SystemExit("parts/data.py is no command: README.md lists the commands")

import functools
import hashlib
import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.files import allow_open_files, check_is_file, sha256, write_whole
from parts.json_files import read_json
from parts.tokenizer import (
    CHARACTERS_FILE,
    TOKENIZER_FILE,
    TOKENIZERS,
    Tokenizer,
    get_tokenizer,
    name_by_content,
    note,
    read_characters,
    read_tokenizer,
)

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4


# ---- Shards --------------------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write uint16 tokens as a shard file, atomically. Returns its row of meta.json."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_whole(path, header.data, tokens.astype("<u2", copy=False).data)
    return {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}


@dataclass(frozen=True)
class Shard:
    path: Path
    tokens: np.ndarray  # uint16, memory-mapped: only the pages that are read take memory


def open_shard(path: Path) -> Shard:
    """Memory-map a shard: a .bin of ours or llm.c's, a .npy of build-nanogpt's, or nanoGPT's file.

    ValueError if the file is damaged.
    """
    check_is_file(path)
    if path.suffix == ".npy":
        return open_npy_shard(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if path.stem in ("train", "val") and tuple(header[:2]) != (MAGIC, VERSION):
        return open_nanogpt_file(path)
    if len(header) < HEADER_INTS or tuple(header[:2]) != (MAGIC, VERSION):
        raise ValueError(
            f"{path}: not a token shard: "
            f"it does not begin with {MAGIC} and version {VERSION} (uint16)"
        )
    n_bytes = path.stat().st_size - HEADER_BYTES
    n_tokens = int(header[2])
    if n_bytes != 2 * n_tokens:
        raise ValueError(
            f"{path}: its header promises {n_tokens} tokens ({2 * n_tokens} bytes), "
            f"the file holds {n_bytes} bytes of them; copy it again"
        )
    if n_bytes == 0:
        return Shard(path, np.empty(0, dtype="<u2"))  # an empty file cannot be mapped
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))


def open_npy_shard(path: Path) -> Shard:
    """Memory-map a .npy file of uint16 tokens. ValueError if it is anything else."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        if "pickle" in reason:  # numpy's advice is to load such a file unsafely
            reason = "it holds no plain numbers"
        raise ValueError(
            f"{path}: not a whole .npy file ({reason}). Copy it or make it again"
        ) from None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{path}: an archive (.npz), not a row of tokens (.npy)")
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(
            f"{path}: holds {tokens.dtype} of shape {tokens.shape}; tokens are a row of uint16"
        )
    return Shard(path, tokens)


def open_nanogpt_file(path: Path) -> Shard:
    """Memory-map nanoGPT's train.bin or val.bin: uint16 tokens without a header.

    ValueError if the size cannot be right; nothing else can be checked.
    """
    check_is_file(path)
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(
            f"{path}: {size:,} bytes cannot be uint16 tokens. Copy it or make it again"
        )
    return Shard(path, np.memmap(path, dtype="<u2", mode="r"))


def find_lost_shards(folder: Path, rows: Iterable[dict]) -> list[Path]:
    """Return the files of the rows of meta.json that are missing, or of another size."""
    lost = []
    for row in rows:
        path = folder / row["file"]
        if not path.is_file() or path.stat().st_size != HEADER_BYTES + 2 * row["tokens"]:
            lost.append(path)
    return lost


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in the order of their names; empty if there are none.

    They are named NAME_train_000001.bin or .npy, or as llm.c's small datasets NAME_train.bin, or as
    nanoGPT's train.bin.
    """
    if not folder.is_dir():
        return []
    for pattern in (rf"_{split}_\d+\.(bin|npy)", rf".+_{split}\.bin", rf"{split}\.bin"):
        name = re.compile(rf"{pattern}$")
        paths = []
        # Not glob, which finds nothing in a folder that it may not list, and does not say so.
        for path in sorted(folder.iterdir()):
            if name.search(path.name):
                paths.append(path)
        if paths:
            return paths
    return []


def open_shards(data_dir: str | Path, split: str) -> list[Shard]:
    """Memory-map all shards of a split ("train" or "val"), in the order of their names.

    ValueError if there are none, if one is damaged, or if they are not those of meta.json.
    """
    folder = Path(data_dir)
    paths = find_shards(folder, split)
    if not paths:
        new_folder = "shards/NAME" if folder.exists() else folder
        others = []
        for other in sorted(folder.parent.glob("*")):
            if find_shards(other, split):
                others.append(str(other))
        there = f" (there are {', '.join(others)})" if others else ""
        raise ValueError(
            f"data_dir: no {split} shards in {folder.absolute()}{there}; "
            f"make them: python fineweb.py, or python prepare.py TEXT --out {new_folder}"
        )
    meta = read_meta(folder)
    if not meta.get("complete", True):
        raise ValueError(
            f"{folder}: still being written, or interrupted; run the command that makes it again"
        )
    # Training and validation shards are open at the same time.
    allow_open_files(2 * len(paths))
    shards = [open_shard(path) for path in paths]
    rows = meta.get("shards", {}).get(split, [])
    if rows:
        check_counts(shards, rows, folder)
    return shards


def check_still_whole(shard: Shard) -> None:
    """ValueError if a shard's file was cut since it was mapped: to read it would kill the process
    (SIGBUS), without a word.
    """
    if not isinstance(shard.tokens, np.memmap):
        return
    with suppress(FileNotFoundError):  # what is deleted stays mapped
        if shard.path.stat().st_size < shard.tokens.offset + shard.tokens.nbytes:
            raise ValueError(f"{shard.path}: was cut while it was read; copy it again")


def check_counts(shards: list[Shard], rows: list[dict], folder: Path) -> None:
    """Compare the shards with their rows of meta.json. ValueError if a name or a size differs."""
    here = {shard.path.name: len(shard.tokens) for shard in shards}
    recorded = {row["file"]: row["tokens"] for row in rows}
    for name in sorted(here.keys() | recorded.keys()):
        if here.get(name) != recorded.get(name):
            counts = (
                f"{here.get(name, 'no')} tokens here, {recorded.get(name, 'none')} by meta.json"
            )
            raise ValueError(f"{folder / name}: {counts}; copy the folder whole, or make it again")


def read_meta(data_dir: str | Path) -> dict:
    """Read the meta.json of a shard folder.

    Returns {} if there is none, as beside published shards. ValueError if it is damaged.
    """
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = read_json(path)
        check_meta(meta)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path}: damaged, or not what prepare.py writes ({reason}); make the shards again"
        ) from None
    return meta


def check_meta(meta: dict) -> None:
    """ValueError says what is not of the kind that prepare.py writes."""
    types = {"tokenizer": str, "source": dict, "shards": dict, "complete": bool}
    for name, type_ in types.items():
        if name in meta and not isinstance(meta[name], type_):
            raise ValueError(f"{name} is not a {type_.__name__}")
    for split, rows in meta.get("shards", {}).items():
        if not isinstance(rows, list) or not all(is_shard_row(row) for row in rows):
            raise ValueError(f"{split} has no rows of a file and its tokens")


def is_shard_row(row: Any) -> bool:
    """Whether it is a row of meta.json about a shard."""
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        return False
    return type(row.get("tokens")) is int and row["tokens"] >= 0


def digest_of_shards(data_dir: str | Path) -> str | None:
    """Return one SHA-256 for all training shards in their order, from those in meta.json.

    None where meta.json has none, as beside published shards.
    """
    rows = read_meta(data_dir).get("shards", {}).get("train", [])
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row["file"]):
        if "sha256" not in row:
            return None
        digest.update(f"{row['tokens']} {row['sha256']}\n".encode())
    return digest.hexdigest() if rows else None


def tokenizer_of_shards(data_dir: str | Path) -> Tokenizer:
    """Return the tokenizer that meta.json names, or that of the characters in nanoGPT's meta.pkl.

    Where neither is there, as beside published shards, the tokens count as GPT-2's, and a line says
    so. ValueError if the tokenizer.json of meta.json's tokenizer is missing, damaged, or another
    one.
    """
    folder = Path(data_dir)
    name = read_meta(folder).get("tokenizer")
    if name in TOKENIZERS:
        return get_tokenizer(name)
    if name is not None:
        file = folder / TOKENIZER_FILE
        tokenizer = read_tokenizer(file)
        # Earlier versions named a tokenizer after the bytes of its file.
        by_bytes = name_by_content("bpe", tokenizer.vocab_size, file.read_bytes().decode())
        if name not in (tokenizer.name, by_bytes):
            raise ValueError(
                f"{file}: is {tokenizer.name}, but the shards beside it were made with {name}"
            )
        return tokenizer
    if (folder / CHARACTERS_FILE).exists():
        return read_characters(folder / CHARACTERS_FILE)
    paths = find_shards(folder, "train")
    if paths:
        guess = guess_from_ids(open_shard(paths[0]))
        note(f"{folder}: no meta.json says which tokenizer made it; {guess}")
    return get_tokenizer("gpt2")


def guess_from_ids(shard: Shard) -> str:
    """What the ids of a shard without meta.json say about its tokenizer, in words."""
    words = "its ids count as GPT-2's"
    ids = shard.tokens[:1_000_000]
    largest = int(ids.max(initial=0))
    # Each document of GPT-2's begins with 50,256; even without, a text of this length has an id
    # from the upper half.
    if len(ids) >= 10_000 and largest < 25_000:
        words += f", but the largest of {len(ids):,} is {largest:,}, as of another tokenizer"
    return words


# ---- Windows -------------------------------------------------------------------------------------


class TokenWindows:
    """Shards, seen as windows of T + 1 tokens: T to read, and the same T shifted by one to predict.

    A window is named by its start, a row (shard, first token): which shard it lies in, and where in
    that shard it begins. T is block_size.
    """

    def __init__(self, shards: list[Shard], block_size: int, vocab_size: int):
        self.shards = shards
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.n_tokens = sum(len(shard.tokens) for shard in shards)

    def read(self, starts: np.ndarray) -> np.ndarray:
        """Read the windows with these starts: (B, 2) int -> (B, T + 1) int64.

        ValueError if the model has no such id: the shard was made with another tokenizer, or it is
        damaged.
        """
        length = self.block_size + 1
        for number in np.unique(starts[:, 0]):
            check_still_whole(self.shards[number])
        windows = []
        for shard, first in starts.tolist():
            windows.append(self.shards[shard].tokens[first : first + length])
        batch = np.stack(windows).astype(np.int64)
        largest = batch.max()
        if largest >= self.vocab_size:
            row = batch.max(axis=1).argmax()
            path = self.shards[starts[row, 0]].path
            raise ValueError(
                f"{path}: holds the token id {largest}; the largest is {self.vocab_size - 1}"
            )
        return batch

    def select_first(self, max_tokens: int) -> np.ndarray:
        """Return the starts of the first windows in order, for validation: (n, 2) int.

        They predict max_tokens tokens, or fewer if there are fewer, but are always one at least.
        ValueError if the shards are too small for one.
        """
        T = self.block_size
        starts = []
        for number, shard in enumerate(self.shards):
            for first in range(0, len(shard.tokens) - T, T):
                starts.append((number, first))
        if not starts:
            raise ValueError(self.explain_too_small("validation", T + 1))
        return np.array(starts[: max(1, max_tokens // T)])

    def select_spread(self, max_tokens: int) -> np.ndarray:
        """Return the starts of windows from all over the text, equally far apart, as a sample of
        training: (n, 2) int.

        They predict max_tokens tokens, or fewer if there are fewer, but are always one at least.
        ValueError if the shards are too small for one.
        """
        T = self.block_size
        counts = np.array([max(0, len(shard.tokens) - 1) // T for shard in self.shards])
        n_windows = int(counts.sum())
        if n_windows == 0:
            raise ValueError(self.explain_too_small("training", T + 1))
        n_selected = min(n_windows, max(1, max_tokens // T))
        selected = np.linspace(0, n_windows - 1, n_selected).astype(np.int64)
        numbers = np.searchsorted(np.cumsum(counts), selected, side="right")
        windows_before = np.cumsum(counts) - counts
        firsts = (selected - windows_before[numbers]) * T
        return np.stack([numbers, firsts], axis=1)

    def bits_per_byte(self, starts: np.ndarray, tokenizer: Tokenizer) -> float:
        """Return what a loss of one nat per token is in bits per byte, over the windows' targets.

        bits per byte = loss * tokens / bytes / ln 2. End of text counts as a token of 0 bytes.
        """
        byte_counts = tokenizer.byte_counts()
        n_bytes = 0
        for chunk in np.array_split(starts, math.ceil(len(starts) / 64)):
            targets = self.read(chunk)[:, 1:]
            n_bytes += int(byte_counts[targets].sum())
        n_tokens = len(starts) * self.block_size
        return n_tokens / max(1, n_bytes) / math.log(2)

    def count_per_shard(self) -> np.ndarray:
        """Return how many windows of an epoch lie in each shard.

        The first window of a shard may begin at any offset below T, so a shard of n tokens has
        (n - T) // T windows for certain, each with the token after it.
        """
        T = self.block_size
        return np.array([max(0, len(shard.tokens) - T) // T for shard in self.shards])

    def check_enough(self, windows_per_step: int) -> None:
        """ValueError if there are too few training tokens for a step."""
        T = self.block_size
        windows_per_epoch = int(self.count_per_shard().sum())
        if windows_per_epoch == 0:
            raise ValueError(self.explain_too_small("training", 2 * T))
        if windows_per_epoch < windows_per_step:
            raise ValueError(
                f"{self.shards[0].path.parent}: {self.n_tokens:,} training tokens make "
                f"{windows_per_epoch} windows of {T}, too few for a step of "
                f"{windows_per_step}; take more text or a lower total_batch_size"
            )

    def explain_too_small(self, split: str, needed: int) -> str:
        """Return the message that no shard has the `needed` tokens."""
        return (
            f"{self.shards[0].path.parent}: {self.n_tokens:,} {split} tokens, but no shard has the "
            f"{needed:,} that block_size {self.block_size} needs; "
            "take more text, a smaller block_size, or another --val_fraction"
        )


# ---- Batches -------------------------------------------------------------------------------------


class Batches:
    """The training batches of a run, as a pure function of step, micro-step and rank.

    An epoch is all non-overlapping windows in random order. Where in a shard its first window
    begins is drawn anew for each epoch, so two epochs do not show the same windows. Each step takes
    the next `windows_per_step` of that order, and each rank and micro-step its part of them. So the
    global batch is the same on any number of ranks, no two ranks see the same window, and to resume
    takes nothing but the step number.

    batch_size counts the windows of one rank and micro-step, windows_per_step those of all of them.
    ValueError if there are too few tokens for a step.
    """

    def __init__(
        self,
        windows: TokenWindows,
        *,
        batch_size: int,
        windows_per_step: int,
        world_size: int,
        seed: int,
    ):
        self.windows = windows
        self.batch_size = batch_size
        self.windows_per_step = windows_per_step
        self.world_size = world_size
        self.seed = seed

        windows.check_enough(windows_per_step)
        # Shard s has the windows from ends[s - 1] up to ends[s].
        self.ends = np.cumsum(windows.count_per_shard())
        self.windows_per_epoch = int(self.ends[-1])
        # Two epochs are kept, because a step may lie across the end of one.
        self.recall_epoch = functools.lru_cache(maxsize=2)(self.draw_epoch)

    def draw_epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        """Draw the order of an epoch's windows, and the offset of the first window in its shard."""
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.windows.block_size))
        order = rng.permutation(np.arange(self.windows_per_epoch, dtype=np.int32))
        return order, offset

    def find_starts(self, step: int, micro_step: int, rank: int) -> np.ndarray:
        """Return where the windows of a batch begin, as rows (shard, first token): (B, 2) int."""
        part = micro_step * self.world_size + rank
        first = step * self.windows_per_step + part * self.batch_size
        starts = []
        for position in range(first, first + self.batch_size):
            epoch, index = divmod(position, self.windows_per_epoch)
            order, offset = self.recall_epoch(epoch)
            window = int(order[index])
            shard = int(np.searchsorted(self.ends, window, side="right"))
            if shard > 0:
                window -= int(self.ends[shard - 1])  # now counted from the shard's first window
            starts.append((shard, offset + window * self.windows.block_size))
        return np.array(starts)

    def batch(self, step: int, micro_step: int = 0, rank: int = 0) -> np.ndarray:
        """Read one batch: (B, T + 1) int64."""
        return self.windows.read(self.find_starts(step, micro_step, rank))


class BatchLoader:
    """Gives one rank its batches in order, on its device. A thread reads the next one meanwhile.

    The batches are those of all micro-steps, 0 to n_micro_steps - 1, of the steps from first_step
    up to, and without, end_step. `device` is a torch.device. close() ends the thread.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        rank: int,
        n_micro_steps: int,
        first_step: int,
        end_step: int,
        device: Any,
    ):
        self.batches = batches
        self.rank = rank
        self.n_micro_steps = n_micro_steps
        self.end_step = end_step
        self.device = device
        # The copy to a GPU runs beside the computation, but only from pinned memory: other memory
        # could be freed while the copy still reads it.
        self.pinned = device.type == "cuda"
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.expect(first_step, 0)

    def expect(self, step: int, micro_step: int) -> None:
        """Begin to read the batch that comes next, if there is one."""
        self.expected = (step, micro_step)
        self.pending = None
        if step < self.end_step:
            self.pending = self.thread.submit(self.read, step, micro_step)

    def read(self, step: int, micro_step: int) -> Any:
        """Read a batch into a tensor on the CPU: (B, T + 1) int64."""
        import torch  # Here, so that prepare.py, which does without, starts in a tenth of a second.

        batch = torch.from_numpy(self.batches.batch(step, micro_step, self.rank))
        return batch.pin_memory() if self.pinned else batch

    def batch(self, step: int, micro_step: int) -> tuple[Any, Any]:
        """Return (x, y), the tokens to read and to predict: (B, T) int64 each, on the device.

        Each batch must be asked for once, and in order.
        """
        assert self.pending is not None and (step, micro_step) == self.expected, (
            f"asked for the batch of step {step}, micro-step {micro_step}; "
            f"the next is {self.expected}, and {self.end_step} is the end"
        )
        batch = self.pending.result().to(self.device, non_blocking=self.pinned)
        if micro_step + 1 < self.n_micro_steps:
            self.expect(step, micro_step + 1)
        else:
            self.expect(step + 1, 0)
        return batch[:, :-1], batch[:, 1:]

    def close(self) -> None:
        """End the thread, after the batch that it is reading."""
        self.thread.shutdown(cancel_futures=True)
