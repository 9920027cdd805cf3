"""Documents -> tokens -> shards, on all cores; and the command that shards local text.

    python prepare.py book.txt --out shards/book
    python prepare.py notes/ 'logs/*.md' --out shards/mine --glob '*.txt' --exclude drafts --tokenizer bytes
    python prepare.py reviews.jsonl.gz table.parquet --out shards/rows --text_column body

After an interruption, the same command continues and ends with the same bytes, on any number of workers.
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
import shutil
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

import configurator
import data

START_METHOD = "spawn"  # of worker processes: the same on all systems, and safe with threads


# ----------------------------------------------------------------------------------------------------------------------
# Files -> documents -> pieces for the workers, in an order that depends on the files only


@dataclass(frozen=True)
class Split:
    """Which text is for validation: one drawn document of every `stride`, or the last share `tail` of each document."""

    stride: int = 0  # 0: none
    seed: int = 0
    tail: float = 0.0

    def ends(self, file: BinaryIO, size: int, document: int) -> dict[str, int]:
        """Where the training part and the validation part of a document of `size` bytes end."""
        if self.tail:
            cut = max(1, round((1 - self.tail) * size))
            file.seek(cut)
            window = file.read(4096)
            start = re.search(rb"\s", window) or re.search(rb"[^\x80-\xbf]", window)  # else at a UTF-8 character
            return {"train": cut + start.start() if start else size, "val": size}
        block, place = divmod(document, self.stride or 1)
        drawn = self.stride and random.Random(f"{self.seed}, {block}").randrange(self.stride) == place
        return {"val" if drawn else "train": size}


class Piece(NamedTuple):
    size: int  # bytes of the input files
    parts: list[tuple[str, bool, bytes]]  # split, whether a document begins here, UTF-8


def pieces_of(files: list[Path], column: str = "text", split: Split = Split()) -> Iterator[Piece]:
    """All documents, as pieces of about data.PIECE_BYTES of text. Empty documents are skipped."""
    parts, text_bytes, file_bytes, n_documents = [], 0, 0, 0
    for document, size, in_file in itertools.chain.from_iterable(documents_in(path, column) for path in files):
        ends = split.ends(document, size, n_documents) if size else {}
        n_documents += size > 0
        document.seek(0)
        for name, end in ends.items():
            begins = True
            for text in data.segments(document, end):
                parts.append((name, begins, text))
                begins, text_bytes, file_bytes = False, text_bytes + len(text), file_bytes + in_file * len(text) / size
                if text_bytes >= data.PIECE_BYTES:
                    yield Piece(round(file_bytes), parts)
                    parts, text_bytes, file_bytes = [], 0, 0
    if parts:
        yield Piece(round(file_bytes), parts)


def texts_of(files: list[Path], column: str = "text") -> Iterator[bytes]:
    """The text of every document, UTF-8. A document of more than data.PIECE_BYTES comes in several texts."""
    return (text for piece in pieces_of(files, column) for _, _, text in piece.parts)


def is_text(path: Path) -> bool:
    return not path.name.endswith((".parquet", ".jsonl", ".jsonl.gz"))


def documents_in(path: Path, column: str) -> Iterator[tuple[BinaryIO, int, float]]:
    """Text, its size, and its bytes in the file: of each row of .jsonl, .jsonl.gz or .parquet; else the whole file."""
    if is_text(path):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield file, size, size
    else:
        for text, in_file in (read_parquet if path.suffix == ".parquet" else read_jsonl)(path, column):
            yield io.BytesIO(text), len(text), in_file


def read_jsonl(path: Path, column: str) -> Iterator[tuple[bytes, float]]:
    with open(path, "rb") as raw:
        file, before = gzip.open(raw) if path.suffix == ".gz" else raw, 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield text_of(line, column, f"{path}, line {number}"), raw.tell() - before
                    before = raw.tell()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: truncated or damaged ({error}). Copy or download it again") from None


def text_of(line: bytes, column: str, where: str) -> bytes:
    """The text in a line of JSON, UTF-8. null is an empty text."""
    try:
        text = json.loads(line.decode("utf-8-sig", errors="replace"))[column]
        return b"" if text is None else text.encode("utf-8", errors="replace")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        wanted = f"not a JSON object with text in the column {column!r}"
        raise ValueError(f"{where}: {wanted} (choose with --text_column): {line[:80]!r}") from None


def read_parquet(path: Path, column: str) -> Iterator[tuple[bytes, float]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if columns.get(column) not in ("string", "large_string", "string_view"):
                names = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                raise ValueError(f"{path}: no text in the column {column!r} among {names}; choose with --text_column")
            in_file = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(1000, columns=[column]):
                for text in batch.column(0).cast(pa.large_binary()).to_pylist():  # bytes: UTF-8 may be invalid
                    yield text or b"", in_file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}). Copy or download it again") from None


# ----------------------------------------------------------------------------------------------------------------------
# Pieces -> tokens, on worker processes

Tokens = dict[str, np.ndarray]  # split -> uint16
TokeniseAll = Callable[[Iterable[Piece]], Iterator[tuple[Piece, Tokens]]]


def tokenise(piece: Piece, tokenizer_name: str) -> Tokens:
    """The tokens of a piece. Each document begins with the end-of-text token."""
    tokenizer = data.get_tokenizer(tokenizer_name)
    start = np.array([tokenizer.end_of_text], dtype=np.uint16)
    tokens = {split: [] for split, _, _ in piece.parts}
    for split, begins, text in piece.parts:
        tokens[split] += [start, tokenizer.encode(text)] if begins else [tokenizer.encode(text)]
    return {split: np.concatenate(arrays) for split, arrays in tokens.items()}


@contextmanager
def tokenising(tokenizer_name: str, workers: int) -> Iterator[TokeniseAll]:
    """A function that tokenises pieces in order on worker processes, which have started when the block begins."""
    job = functools.partial(tokenise, tokenizer_name=tokenizer_name)
    if workers == 1:
        data.get_tokenizer(tokenizer_name)  # load it now
        yield lambda pieces: ((piece, job(piece)) for piece in pieces)
        return
    context = multiprocessing.get_context(START_METHOD)
    initargs = (tokenizer_name, context.Barrier(workers))
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=initargs)
    try:
        for future in [pool.submit(int) for _ in range(workers)]:  # each starts a worker
            future.result()
        yield functools.partial(in_order, pool, job, 3 * workers)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (out of memory?). Finished shards are kept: run the same command again, "
            f"with fewer --workers than {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool: ProcessPoolExecutor, job: Callable, ahead: int, pieces: Iterable[Piece]):
    """Yield (piece, tokens) in the order of the pieces. At most `ahead` pieces are in memory."""
    running = deque()
    for piece in pieces:
        running.append((piece, pool.submit(job, piece)))
        if len(running) == ahead:
            piece, future = running.popleft()
            yield piece, future.result()
    for piece, future in running:
        yield piece, future.result()


def start_worker(tokenizer_name: str, all_started) -> None:
    """Load the tokenizer. Ctrl-C is for the parent only; a worker whose parent was killed exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    data.get_tokenizer(tokenizer_name)
    all_started.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Tokens -> shards


class Shards:
    """Cuts streams of tokens, one for each split, into shards of equal size, and can continue after an interruption.

    After each new shard it saves a record: the rows of meta.json so far, the number of pieces done, and the tokens that
    are in no shard yet.
    """

    def __init__(self, record: Path, path_of: Callable[[str, int], Path], sizes: dict[str, int], end_of_text: int):
        """path_of: split and number of a shard (from 0) -> its file. sizes: split -> tokens in a shard."""
        self.record, self.path_of, self.sizes, self.end_of_text = record, path_of, sizes, end_of_text
        self.pieces, self.n_tokens, self.complete = 0, 0, False
        self.rows: dict[str, list[dict]] = {split: [] for split in sizes}
        self.rest = {split: [np.empty(0, dtype=np.uint16)] for split in sizes}  # tokens that are in no shard yet
        if record.exists():
            with np.load(record) as saved:
                state = json.loads(str(saved["state"]))
                files = [record.parent.parent / row["file"] for rows in state["rows"].values() for row in rows]
                # Pieces of another size have other numbers. And somebody may have removed a shard.
                if state.pop("piece_bytes") == data.PIECE_BYTES and all(file.exists() for file in files):
                    vars(self).update(state, rest={split: [saved[split]] for split in sizes})

    def add(self, tokens: Tokens, last: bool = False) -> None:
        """Write the shards that the tokens of the next piece fill; after the last piece, also what is left."""
        n_shards, self.pieces, self.complete = sum(map(len, self.rows.values())), self.pieces + 1, last
        self.n_tokens += sum(map(len, tokens.values()))
        for split, size in self.sizes.items():
            self.rest[split].append(tokens.get(split, self.rest[split][0][:0]))
            if last or sum(map(len, self.rest[split])) >= size:
                stream = np.concatenate(self.rest[split])
                end = len(stream) if last else len(stream) // size * size
                for first in range(0, end, size):
                    shard = stream[first : min(first + size, end)]
                    row = data.write_shard(self.path_of(split, len(self.rows[split])), shard)
                    self.rows[split].append(row | {"documents": int(np.count_nonzero(shard == self.end_of_text))})
                self.rest[split] = [stream[end:].copy()]
        if last or sum(map(len, self.rows.values())) > n_shards:
            self.save()

    def save(self) -> None:
        state = dict(pieces=self.pieces, n_tokens=self.n_tokens, complete=self.complete, rows=self.rows)
        state["piece_bytes"], file = data.PIECE_BYTES, io.BytesIO()
        np.savez(file, state=json.dumps(state), **{split: np.concatenate(rest) for split, rest in self.rest.items()})
        data.write_whole(self.record, file.getvalue())

    def fill(self, pieces: Iterator[Piece], tokenise_all: TokeniseAll, bar, limit: int = sys.maxsize) -> None:
        """Tokenise the pieces, `limit` tokens at most (of a single split), from where the record ends."""
        for piece in itertools.islice(pieces, self.pieces):
            bar.update(piece.size)
        for piece, tokens in tokenise_all(pieces):
            left = limit - self.n_tokens
            self.add({split: new[:left] for split, new in tokens.items()})
            bar.set_postfix(tokens=f"{self.n_tokens:,}", refresh=False)
            bar.update(piece.size)
            if self.n_tokens == limit:
                break
        self.add({}, last=True)


def progress_bar(total: int, what: str):
    """Bytes of input, speed and time left; on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


def shard_files(
    files, out: Path, tokenise_all: TokeniseAll, tokenizer, sizes: dict, column="text", split=Split()
) -> dict:
    """Turn files into shards of sizes[split] tokens in the folder `out`. Returns split -> rows of meta.json."""
    (out / "progress").mkdir(parents=True, exist_ok=True)
    name, record = out / out.name, out / "progress" / "all.npz"
    shards = Shards(record, lambda s, n: Path(f"{name}_{s}_{n + 1:06d}.bin"), sizes, tokenizer.end_of_text)
    with progress_bar(sum(path.stat().st_size for path in files), out.name) as bar:
        if not shards.complete:
            shards.fill(pieces_of(files, column, split), tokenise_all, bar)
    return shards.rows


# ----------------------------------------------------------------------------------------------------------------------
# The folder


@contextmanager
def shard_folder(out: Path, source: dict, begin: Callable[[], dict] = dict, part=1, parts=1) -> Iterator[dict]:
    """Lock a folder for the shards of `source`; gives its meta.json. begin() is what to add to a new folder's source.

    ValueError if it holds other files or shards of another source, or if another process works on the same part.
    """
    meta, progress = data.read_meta(out), out / "progress"
    ours = ("meta.json", "progress", "downloads")
    if not meta and out.is_dir() and any(p.name not in ours and p.suffix != ".tmp" for p in out.iterdir()):
        raise ValueError(f"{out}: holds files that this command did not write; choose a new folder for --out")
    with ExitStack() as locks:
        if not meta.get("complete"):
            progress.mkdir(parents=True, exist_ok=True)
            taken = f"{out}: another process makes these shards; wait, or stop it"
            locks.enter_context(data.lock(progress / f"{part}_of_{parts}.lock", taken))
            for other in set(progress.glob("*.lock")) - set(progress.glob(f"*_of_{parts}.lock")):
                with data.lock(other, taken):  # only a look
                    pass
            if parts == 1:
                begun = [] if any(out.glob("*.bin")) else [out / "meta.json", *progress.glob("*.npz")]
                for path in [*out.glob("*.tmp"), *progress.glob("*.tmp"), *begun]:  # of killed runs
                    path.unlink(missing_ok=True)
            meta = data.read_meta(out)
        if not meta:
            meta = {"source": source | begin(), "complete": False}
            data.write_json(out / "meta.json", meta)
        before = meta.get("source", {})
        changed = [f"{name} {before.get(name)} -> {new}" for name, new in source.items() if before.get(name) != new]
        if changed:
            raise ValueError(
                f"{out}: made from another source ({', '.join(changed)}); choose another --out or delete that folder"
            )
        if meta.get("complete"):
            shutil.rmtree(progress, ignore_errors=True)  # a run was killed at its very end
        yield meta


def finish_folder(out: Path, tokenizer: data.Tokenizer, source: dict, shards: dict, documents: int) -> str:
    """Write the meta.json of a complete folder. shards: split -> rows. Returns a summary for the terminal."""
    n_tokens = {split: sum(row["tokens"] for row in rows) for split, rows in shards.items()}
    meta = dict(tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, documents=documents, tokens=n_tokens)
    data.write_json(out / "meta.json", meta | dict(shards=shards, source=source, complete=True))
    shutil.rmtree(out / "progress", ignore_errors=True)
    tokens = f"{n_tokens['train']:,} training and {n_tokens['val']:,} validation tokens"
    return f"{documents:,} documents, {tokens} ({tokenizer.name})"


# ----------------------------------------------------------------------------------------------------------------------
# The command


def find_files(paths: list[str], pattern: str, exclude: list[str], out: Path) -> list[Path]:
    """Files, folders and globs -> files, each once, in the order of their names.

    Skipped are: hidden files and folders inside a folder, what matches `exclude` there, and files in `out`.
    """
    if Path(pattern).is_absolute():
        raise ValueError(f"--glob {pattern}: a pattern for names inside folders; give the folder itself as PATH")
    files = {}  # real path -> the first path that leads to it
    for path in paths:
        for top in map(Path, [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True)) or [path]):
            if not top.exists():
                raise ValueError(f"{top}: no such file or folder")
            for file in sorted(top.rglob(pattern)) if top.is_dir() else [top]:
                skipped = (fnmatch(p, e) for p in file.relative_to(top).parts for e in [*exclude, ".*"])
                if file.is_file() and out not in file.resolve().parents and not any(skipped):
                    files.setdefault(file.resolve(), file)
    if not files:
        raise ValueError(f"{' '.join(paths)}: no files match {pattern!r} (see --glob and --exclude)")
    return list(files.values())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Turn local text into token shards. A document is a row of a .jsonl, .jsonl.gz or .parquet file, "
        "or any other file as a whole. After an interruption, run the same command again: it continues.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders, or globs in quotes")
    add("--out", required=True, metavar="FOLDER", help="folder for the shards, such as shards/mine (required)")
    add("--tokenizer", choices=data.TOKENIZERS, default="gpt2", help="GPT-2's BPE, or bytes (default: %(default)s)")
    add("--glob", default="*", help="names of the files to take from folders, at any depth (default: all)")
    skip = "names of files and folders to skip inside folders; repeatable (default: hidden ones only)"
    add("--exclude", action="append", default=[], metavar="GLOB", help=skip)
    validation = "share of documents for validation; with fewer than 1/F, the last share of each (default: %(default)s)"
    add("--val_fraction", type=float, default=0.05, metavar="F", help=validation)
    add("--seed", type=int, default=1337, metavar="N", help="draws the validation documents (default: %(default)s)")
    arguments = parse_shared(parser, argv, "one per CPU, fewer for little text")
    if arguments.val_fraction != 0 and not 1e-6 <= arguments.val_fraction <= 0.5:
        parser.error(f"--val_fraction={arguments.val_fraction}: must be 0, or from 0.000001 to 0.5")
    return arguments


def parse_shared(parser: argparse.ArgumentParser, argv: list[str] | None, workers: str) -> argparse.Namespace:
    """Add the options that prepare.py and fineweb.py share, and parse."""
    add = parser.add_argument
    add("--text_column", default="text", metavar="NAME", help="column with the text, of rows (default: %(default)s)")
    shard = "tokens in a training shard, 2 bytes each (default: %(default)s)"
    add("--shard_tokens", type=int, default=100_000_000, metavar="N", help=shard)
    add("--workers", type=int, metavar="N", help=f"processes that tokenise (default: {workers})")
    arguments = parser.parse_args(argv)
    for name, value in (("shard_tokens", arguments.shard_tokens), ("workers", arguments.workers)):
        if value is not None and not 1 <= value < 2**31:
            parser.error(f"--{name}={value}: must be at least 1 and below 2**31")
    return arguments


def choose_split(files: list[Path], column: str, val_fraction: float, seed: int) -> Split:
    """One document of every 1 / val_fraction for validation; with fewer documents than that, the tail of each."""
    if val_fraction == 0:
        return Split()
    stride = round(1 / val_fraction)
    documents = (1 for path in files for _, size, _ in documents_in(path, column) if size)
    enough = sum(itertools.islice(documents, stride)) == stride
    return Split(stride, seed) if enough else Split(tail=val_fraction)


def describe(arguments: argparse.Namespace, files: list[Path]) -> dict:
    """What decides the shards' bytes, for meta.json: the options, and a hash of the files' names and contents."""
    digest = hashlib.sha256()
    for path in filter(is_text, files):
        with open(path, "rb") as file:
            if b"\0" in file.read(1 << 20):
                skip = "*" + path.suffix if path.suffix else path.name
                raise ValueError(f"{path}: binary (NUL bytes), not text; leave it out, in folders: --exclude '{skip}'")
    with ThreadPoolExecutor() as threads:
        for path, content in zip(files, threads.map(data.sha256, files)):
            digest.update(os.fsencode(path.name) + bytes.fromhex(content))
    size = sum(path.stat().st_size for path in files)
    if size == 0:
        raise ValueError(f"{files[0]}{' and others' * (len(files) > 1)}: empty; there is no text to tokenise")
    names = ["tokenizer", "shard_tokens", "val_fraction", "seed"] + ["text_column"] * (not all(map(is_text, files)))
    options = {name: getattr(arguments, name) for name in names}
    return options | dict(files=len(files), bytes=size, sha256=digest.hexdigest())


def available_cpus() -> int:
    """CPUs that this process may use; a scheduler may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shard_local_text(arguments: argparse.Namespace) -> str:
    """Do what the command asks. Returns a summary for the terminal."""
    out = Path(arguments.out).resolve()
    files = find_files(arguments.paths, arguments.glob, arguments.exclude, out)
    source = describe(arguments, files)
    with shard_folder(out, source) as meta:
        if meta["complete"]:
            return f"already made from these {len(files)} files"
        split = choose_split(files, arguments.text_column, arguments.val_fraction, arguments.seed)
        # A validation shard fills as fast as a training shard, so an interruption loses little of either.
        n = arguments.shard_tokens
        sizes = {"train": n, "val": max(min(n, 1 << 20), round(n * arguments.val_fraction))}
        # A worker takes a second to start, in which another one tokenises some 8 MB.
        workers = arguments.workers or min(available_cpus(), 1 + source["bytes"] // (8 << 20))
        tokenizer = data.get_tokenizer(arguments.tokenizer)
        with tokenising(arguments.tokenizer, workers) as tokenise_all:
            rows = shard_files(files, out, tokenise_all, tokenizer, sizes, arguments.text_column, split)
        if not rows["train"] or (arguments.val_fraction and not rows["val"]):
            raise ValueError(
                f"{files[0]}{' and others' * (len(files) > 1)}: too little text for a training and a validation split; "
                f"delete {arguments.out}, and take more text or --val_fraction 0"
            )
        counted = rows["train"] if split.tail else rows["train"] + rows["val"]  # a tail is no document of its own
        return finish_folder(out, tokenizer, source, rows, sum(row["documents"] for row in counted))


@configurator.command("prepare.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    print(f"{arguments.out}: {shard_local_text(arguments)}")


if __name__ == "__main__":
    main()
