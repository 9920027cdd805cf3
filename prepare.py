"""Documents -> tokens -> shards, on all cores; and the command that shards any local text.

    python prepare.py book.txt --out shards/book
    python prepare.py notes/ 'logs/*.md' --out shards/mine --glob '*.txt' --exclude drafts --tokenizer bytes
    python prepare.py reviews.jsonl.gz table.parquet --out shards/rows --text_column body

An interrupted command continues when it is run again, and ends with the same bytes, on any number of workers.
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
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import numpy as np

import data

ROWS_BYTES = 32 << 20  # of parquet to a worker at once: to reach a row, the rows before it in its group are read too
START_METHOD = "spawn"  # for workers: the same on all systems; a forked one may inherit a lock that nobody will free


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
            self.shards.append(data.write_shard(self.path_of(len(self.shards)), self.buffer[: self.n_waiting]))
            self.written, self.n_waiting = self.written + self.n_waiting, 0


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
    """A file in data.segments, with a mark at the first of its document; or at those of its head and of its tail."""
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
            for segment in data.segments(file, end):
                yield segment, begins
                begins = False


def gather(parts: Iterator[tuple[bytes, bool]]) -> Iterator[Texts]:
    """Parts of text, put together into pieces."""
    texts, size = [], 0
    for text, begins in parts:
        texts.append((text, begins))
        size += len(text)
        if size >= data.PIECE_BYTES:
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
            while lines := file.readlines(data.PIECE_BYTES):
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
    tokenizer = data.get_tokenizer(tokenizer_name)
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
            sizes = {path.parent.parent / row["file"]: data.HEADER_BYTES + 2 * row["tokens"] for row in rows}
            whole = all(shard.is_file() and shard.stat().st_size == size for shard, size in sizes.items())
            # Pieces of other sizes have other numbers.
            if whole and (record["complete"] or record["piece_bytes"] == [data.PIECE_BYTES, ROWS_BYTES]):
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
            self.record["piece_bytes"] = [data.PIECE_BYTES, ROWS_BYTES]
            data.write_json(self.path, self.record)


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
    meta = data.read_meta(out)
    if not meta and holds_other_files(out) and not (meta := data.read_meta(out)):  # another part may just have begun
        raise ValueError(f"{out}: holds files that this command did not write; choose a new folder for --out")
    if meta.get("complete"):
        refuse_other_source(out, meta.get("source", {}), source, "holds shards made")
        shutil.rmtree(out / "progress", ignore_errors=True)  # of a run that was killed at its very end
        yield meta
        return
    (out / "progress").mkdir(parents=True, exist_ok=True)
    with open(out / "progress" / "lock", "w") as lock:
        data.lock_file(lock, alone, f"{out}: another process is making these shards; let it finish, or stop it")
        yield begin(out, source, alone)


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
        data.write_json(out / "meta.json", dict(source=source, complete=False), replace=False)
    meta = data.read_meta(out)
    refuse_other_source(out, meta.get("source", {}), source, "is being made, or was begun,")
    return meta


def finish_folder(out: Path, tokenizer: data.Tokenizer, source: dict, records: list[dict]) -> dict:
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
    data.write_json(out / "meta.json", meta)
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
        prog="prepare.py",
        description="Turn local text into token shards: a document is a row of a .jsonl, .jsonl.gz or .parquet file, "
        "or any other file as a whole. Run again after an interruption, the same command goes on.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders, or globs in quotes")
    add("--out", required=True, help="folder for the shards, for example shards/mine")
    add(
        "--tokenizer", choices=data.TOKENIZERS, default="gpt2", help="gpt2's BPE, or plain bytes (default: %(default)s)"
    )
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
        for path, (content_digest, has_nul) in zip(files, threads.map(data.read_through, files)):
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
    tokenizer = data.get_tokenizer(arguments.tokenizer)
    meta = finish_folder(out, tokenizer, source, [record])
    print(
        f"{arguments.out}: {meta['documents']:,} documents, {meta['tokens']['train']:,} training and "
        f"{meta['tokens']['val']:,} validation tokens ({tokenizer.name})"
    )


def main(argv: list[str] | None = None) -> None:
    try:
        shard_local_text(parse_arguments(argv))
    except (ValueError, OSError) as error:
        print(f"prepare.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
