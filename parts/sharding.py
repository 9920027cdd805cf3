"""Documents -> tokens -> shards, on all cores: what prepare.py and fineweb.py have in common.

After an interruption, the same command continues and ends with the same bytes, on any number of
workers.
"""

if __name__ == "__main__":
    raise SystemExit("parts/sharding.py is no command: README.md lists the commands")

import argparse
import functools
import io
import itertools
import json
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

from parts import data
from parts.console import print_lines, print_note
from parts.documents import (
    BLANK_LINE,
    DEFAULT_OPTIONS,
    Document,
    InputFile,
    ReadOptions,
    read_documents,
)
from parts.encoding import LIMIT, Replacements, check_encoding
from parts.files import delete, lock, write_whole
from parts.tokenizer import (
    BREAK,
    PIECE_BYTES,
    TOKENIZER_FILE,
    TOKENIZERS,
    Tokenizer,
    cut_into_segments,
    load_tokenizer,
)

import numpy as np

# How worker processes start: the same way on all systems, and safe beside threads.
START_METHOD = "spawn"

# It draws the validation documents.
SEED = 1337


# ---- Documents -> pieces for the workers ---------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Which text is for validation: of every `stride` documents one, or the end of each document.

    With stride 0 and tail 0, all text is for training.
    """

    stride: int = 0  # one document is drawn from each block of so many
    tail: float = 0.0  # the share of each document, at its end, that is for validation

    def find_ends(self, text: bytes | mmap.mmap, number: int) -> dict[str, int]:
        """Return where the parts of document `number` end: split -> index, in their order.

        A part begins where the part before it ends.
        """
        if self.tail:
            return {"train": self.find_tail(text), "val": len(text)}
        if self.is_for_validation(number):
            return {"val": len(text)}
        return {"train": len(text)}

    def find_tail(self, text: bytes | mmap.mmap) -> int:
        """Return where the validation part begins: at white space, or else at a character."""
        cut = max(1, round((1 - self.tail) * len(text)))
        window = text[cut : cut + 4096]
        # The first byte of a UTF-8 character is any byte but 80 to BF.
        start = re.search(rb"\s", window) or re.search(rb"[^\x80-\xbf]", window)
        return cut + start.start() if start else len(text)

    def is_for_validation(self, number: int) -> bool:
        """Return whether document `number` is the one that is drawn from its block."""
        if self.stride == 0:
            return False
        block, position = divmod(number, self.stride)
        drawn = random.Random(f"{SEED}, {block}").randrange(self.stride)
        return position == drawn


class Segment(NamedTuple):
    """A part of a document, of one split."""

    split: str  # "train" or "val"
    begins: bool  # whether the document, or its part for this split, begins here
    text: bytes  # UTF-8


Piece = list[Segment]  # a worker gets one at a time
Tokens = dict[str, np.ndarray]  # split -> uint16


def split_into_pieces(
    documents: Iterator[Document],
    split: Split = Split(),
    progress: Callable[[float], Any] = lambda n_bytes: None,
    breaks: re.Pattern = BREAK,
) -> Iterator[Piece]:
    """Yield the documents in pieces of about PIECE_BYTES of text.

    `progress` is called with the bytes of the files that each segment takes.
    """
    piece: Piece = []
    piece_bytes = 0
    for number, document in enumerate(documents):
        text = document.text
        start = 0
        for name, end in split.find_ends(text, number).items():
            begins = True
            for segment in cut_into_segments(text, start, end, breaks):
                piece.append(Segment(name, begins, segment))
                begins = False
                piece_bytes += len(segment)
                progress(document.file_bytes * len(segment) / len(text))
                if piece_bytes >= PIECE_BYTES:
                    yield piece
                    piece = []
                    piece_bytes = 0
            start = end
    if piece:
        yield piece


# ---- Pieces -> tokens, on worker processes -------------------------------------------------------


def tokenise(piece: Piece, tokenizer_name: str) -> Tokens:
    """Return the tokens of a piece. The end-of-text token stands before each document."""
    tokenizer = load_tokenizer(tokenizer_name)
    arrays = defaultdict(list)
    for segment in piece:
        if segment.begins and tokenizer.end_of_text is not None:
            arrays[segment.split].append(np.array([tokenizer.end_of_text], dtype=np.uint16))
        arrays[segment.split].append(tokenizer.encode(segment.text))
    return {split: np.concatenate(parts) for split, parts in arrays.items()}


TokeniseAll = Callable[[Iterator[Piece]], Iterator[Tokens]]


@contextmanager
def start_workers(tokenizer_name: str, workers: int) -> Iterator[TokeniseAll]:
    """Give a function that tokenises pieces, in order, on so many workers.

    They have started when the `with` block begins. With one worker, this thread does the work. The
    quick tokenizer runs beside Python, so its workers are threads, which share the text with this
    one. tiktoken's workers are processes. ValueError if one of them is killed.
    """
    tokenise_one = functools.partial(tokenise, tokenizer_name=tokenizer_name)
    tokenizer = load_tokenizer(tokenizer_name)
    tokenizer.quicken()
    if workers == 1:
        yield functools.partial(map, tokenise_one)
    elif tokenizer.quick is not None:
        with ThreadPoolExecutor(workers) as threads:
            yield functools.partial(tokenise_on, threads, workers, tokenise_one)
    else:
        with start_processes(tokenizer_name, workers) as processes:
            yield functools.partial(tokenise_on, processes, workers, tokenise_one)


def tokenise_on(
    pool: Executor,
    workers: int,
    tokenise_one: Callable[[Piece], Tokens],
    pieces: Iterator[Piece],
) -> Iterator[Tokens]:
    """Yield the tokens of the pieces, in order. At most 3 pieces per worker are in memory."""
    running: deque[Future[Tokens]] = deque()
    for piece in pieces:
        running.append(pool.submit(tokenise_one, piece))
        if len(running) == 3 * workers:
            yield running.popleft().result()
    for future in running:
        yield future.result()


@contextmanager
def start_processes(tokenizer_name: str, workers: int) -> Iterator[Executor]:
    """Start worker processes with the tokenizer. ValueError if one is killed."""
    context = multiprocessing.get_context(START_METHOD)
    barrier = context.Barrier(workers)
    pool = ProcessPoolExecutor(workers, context, prepare_worker, (tokenizer_name, barrier))
    try:
        with block_ctrl_c():
            started = [pool.submit(int) for _ in range(workers)]
        for future in started:
            future.result()
        yield pool
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (out of memory?): run the same command again, "
            f"with fewer --workers than {workers}; finished shards are kept"
        ) from None
    except BaseException:
        # A worker that has started waits for those that could not, and shutdown would wait for it.
        barrier.abort()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def block_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back inside a `with` block. It arrives when the block ends.

    Processes that start inside it inherit this, so Ctrl-C cannot end them before they have begun to
    ignore it. Windows cannot hold it back.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def prepare_worker(tokenizer_name: str, all_started) -> None:
    """Run first in each worker: load the tokenizer, and wait at the barrier for the other workers.

    From now on the worker ignores Ctrl-C, which its parent handles, and exits if the parent dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    load_tokenizer(tokenizer_name)
    try:
        all_started.wait()
    except threading.BrokenBarrierError:  # another worker could not start
        os._exit(1)


def available_cpus() -> int:
    """Return how many CPUs this process may use; a scheduler may grant fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    # A pool of processes on Windows has 61 at most.
    return min(61, os.cpu_count() or 1)


# ---- Tokens -> shards ----------------------------------------------------------------------------


class ShardWriter:
    """Cuts streams of tokens, one for each split, into shards of equal size.

    After each new shard it saves a record, from which it continues after an interruption: the rows
    of meta.json so far, the number of pieces done, and the tokens that are in no shard yet.
    """

    def __init__(
        self,
        record: Path,
        name_shard: Callable[[str, int], Path],
        sizes: dict[str, int],
        end_of_text: int | None,
    ):
        """Continue from the file `record`, if it exists.

        name_shard gives the file of a split's shard number 0, 1, ...; sizes are the tokens in a
        shard of each split.
        """
        self.record = record
        self.name_shard = name_shard
        self.sizes = sizes
        self.end_of_text = end_of_text

        self.n_pieces = 0
        self.n_tokens = 0
        self.complete = False
        self.rows: dict[str, list[dict]] = {split: [] for split in sizes}
        # Tokens that are in no shard yet.
        self.rest: dict[str, list[np.ndarray]] = {split: [] for split in sizes}
        if record.exists():
            self.load_record()

    def load_record(self) -> None:
        """Continue from the record. Begin anew, with a note, if it is damaged, or if a shard that
        it names is gone.
        """
        try:
            with np.load(self.record) as saved:
                state = json.loads(str(saved["state"]))
                rest = {split: [saved[split]] for split in self.sizes}
            rows = state["rows"]
            folder = self.name_shard(next(iter(self.sizes)), 0).parent
            lost = data.find_lost_shards(folder, itertools.chain(*rows.values()))
            if lost:
                raise ValueError(f"{lost[0].name} is gone, or not whole")
            self.n_pieces = state["pieces"]
            self.n_tokens = state["n_tokens"]
            self.complete = state["complete"]
            self.rows = rows
            self.rest = rest
        except (ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            print_note(f"NOTE: {self.record}: {error}; its shards are made again")

    def save_record(self) -> None:
        state = {
            "pieces": self.n_pieces,
            "n_tokens": self.n_tokens,
            "complete": self.complete,
            "rows": self.rows,
        }
        arrays: dict[str, Any] = {split: self.join_rest(split) for split in self.sizes}
        arrays["state"] = json.dumps(state)
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_whole(self.record, file.getvalue())

    def join_rest(self, split: str) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype=np.uint16), *self.rest[split]])

    def count_rest(self, split: str) -> int:
        return sum(map(len, self.rest[split]))

    def add(self, tokens: Tokens) -> None:
        """Take the tokens of the next piece, and write the shards that they fill."""
        self.n_pieces += 1
        for split, part in tokens.items():
            self.rest[split].append(part)
            self.n_tokens += len(part)
        n_shards = self.count_shards()
        for split, size in self.sizes.items():
            while self.count_rest(split) >= size:
                self.write_shard(split)
        if self.count_shards() > n_shards:
            self.save_record()

    def finish(self) -> None:
        """Write the tokens that are left, as the last shard of each split."""
        for split in self.sizes:
            if self.count_rest(split) > 0:
                self.write_shard(split)
        self.complete = True
        self.save_record()

    def count_shards(self) -> int:
        return sum(map(len, self.rows.values()))

    def write_shard(self, split: str) -> None:
        """Write the next shard of a split, and keep the tokens after it."""
        stream = self.join_rest(split)
        shard = stream[: self.sizes[split]]
        # A copy, so that the memory of the whole stream is freed.
        self.rest[split] = [stream[len(shard) :].copy()]
        row = data.write_shard(self.name_shard(split, len(self.rows[split])), shard)
        row["documents"] = int(np.count_nonzero(shard == self.end_of_text))
        self.rows[split].append(row)

    def fill(
        self,
        pieces: Iterator[Piece],
        tokenise_all: TokeniseAll,
        bar,
        limit: int = sys.maxsize,
    ) -> None:
        """Tokenise the pieces after those of the record, and write all their shards.

        With a limit, which is for a single split, only the first `limit` tokens are taken.
        """
        for tokens in tokenise_all(itertools.islice(pieces, self.n_pieces, None)):
            left = limit - self.n_tokens
            self.add({split: part[:left] for split, part in tokens.items()})
            bar.set_postfix(tokens=f"{self.n_tokens:,}", refresh=False)
            if self.n_tokens == limit:
                break
        self.finish()


def make_progress_bar(total: int, what: str):
    """Make a tqdm bar that counts bytes of input. It shows on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


def shard_files(
    files: list[InputFile],
    out: Path,
    tokenise_all: TokeniseAll,
    tokenizer: Tokenizer,
    sizes: dict[str, int],
    options: ReadOptions = DEFAULT_OPTIONS,
    split: Split = Split(),
    replacements: Replacements | None = None,
) -> dict[str, list[dict]]:
    """Turn files into shards of sizes[split] tokens in the folder `out`.

    Returns the shards' rows of meta.json: split -> rows. ValueError if a file is damaged, or too
    much of it cannot be decoded.
    """
    (out / "progress").mkdir(parents=True, exist_ok=True)

    def name_shard(split_name: str, number: int) -> Path:
        return out / f"{out.name}_{split_name}_{number + 1:06d}.bin"

    record = out / "progress" / "all.npz"
    writer = ShardWriter(record, name_shard, sizes, tokenizer.end_of_text)
    n_bytes = sum(file.path.stat().st_size for file in files)
    with make_progress_bar(n_bytes, out.name) as bar:
        documents = read_documents(files, options, replacements)
        pieces = split_into_pieces(documents, split, bar.update, tokenizer.breaks)
        writer.fill(pieces, tokenise_all, bar)
    return writer.rows


# ---- The folder ----------------------------------------------------------------------------------


@contextmanager
def lock_shard_folder(
    out: Path,
    source: dict,
    describe_more: Callable[[], dict] = dict,
    part: int = 1,
    parts: int = 1,
) -> Iterator[dict]:
    """Lock a folder for the shards of `source`, and give its meta.json.

    A new folder's source gets what describe_more() returns too. `parts` processes may work on one
    folder at the same time, each on another `part` from 1. ValueError if the folder holds other
    files or shards of another source, or if another process works on this part or counts the parts
    otherwise.
    """
    meta = data.read_meta(out)
    lost = find_lost(out, meta)
    progress = out / "progress"
    if not meta and out.is_dir() and has_foreign_files(out):
        raise ValueError(
            f"{out}: holds files that this command did not write; choose a new folder for --out"
        )
    with ExitStack() as locks:
        if not meta.get("complete") or lost:
            progress.mkdir(parents=True, exist_ok=True)
            busy = f"{out}: another process makes these shards; wait, or stop it"
            locks.enter_context(lock(progress / f"{part}_of_{parts}.lock", busy))
            # Processes with the same number of parts may work here. With another number, none may.
            others = set(progress.glob("*.lock")) - set(progress.glob(f"*_of_{parts}.lock"))
            for other in others:
                with lock(other, busy):
                    pass
            meta = data.read_meta(out)  # again: it may have changed before the lock was ours
            lost = find_lost(out, meta)

        # While there is no shard, the source may change: nothing is lost by a new beginning.
        may_begin = parts == 1 and not any(out.glob("*.bin"))
        if not meta or may_begin:
            for old in (*progress.glob("*.npz"), *out.glob(TOKENIZER_FILE)):
                old.unlink()
            described = {**source, **describe_more()}
            # What is not there compares as None does.
            described = {name: value for name, value in described.items() if value is not None}
            meta = {"source": described, "complete": False}
            write_meta(out, meta)

        recorded = meta.get("source", {})
        changes = []
        for name, value in source.items():
            if recorded.get(name) != value:
                changes.append(f"{name} {recorded.get(name)} -> {value}")
        if changes:
            raise ValueError(
                f"{out}: made from another source ({', '.join(changes)}); "
                "choose another --out or delete that folder"
            )
        if lost:
            print_lines(f"{lost[0]}: gone, or not whole; it is made again")
            meta = {"source": recorded, "complete": False}
            write_meta(out, meta)
            for path in lost:
                path.unlink(missing_ok=True)
        elif meta.get("complete"):
            delete_progress(out)
        yield meta


def find_lost(out: Path, meta: dict) -> list[Path]:
    """Return the files of a complete folder that are not there any more, or are not whole."""
    if not meta.get("complete"):
        return []
    lost = data.find_lost_shards(out, itertools.chain(*meta.get("shards", {}).values()))
    is_learned = meta.get("tokenizer", "gpt2") not in TOKENIZERS
    if is_learned and not (out / TOKENIZER_FILE).is_file():
        lost.append(out / TOKENIZER_FILE)
    return lost


def delete_progress(out: Path) -> None:
    """Delete what a complete folder does not need any more: records, and what kills have left."""
    shutil.rmtree(out / "progress", ignore_errors=True)
    for path in out.glob("*.tmp"):
        delete(path)


def has_foreign_files(out: Path) -> bool:
    """Return whether a folder without meta.json has files that are not left from a killed run."""
    for path in out.iterdir():
        if path.name not in ("progress", "downloads") and path.suffix != ".tmp":
            return True
    return False


def write_meta(out: Path, meta: dict) -> None:
    write_whole(out / "meta.json", json.dumps(meta, indent=1).encode())


def finish_folder(
    out: Path,
    tokenizer: Tokenizer,
    source: dict,
    shards: dict[str, list[dict]],
    documents: int,
) -> str:
    """Write the meta.json of a complete folder, and delete what only an interrupted run needs.

    shards: split -> rows of meta.json. Returns a summary for the terminal.
    """
    n_tokens = {}
    for split, rows in shards.items():
        n_tokens[split] = sum(row["tokens"] for row in rows)
    meta = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "tokens": n_tokens,
        "shards": shards,
        "source": source,
        "complete": True,
    }
    lost = find_lost(out, meta)
    if lost:
        raise ValueError(f"{lost[0]}: gone, or not whole; run the same command again")
    write_meta(out, meta)
    delete_progress(out)
    documents_made = "1 document" if documents == 1 else f"{documents:,} documents"
    tokens_made = f"{n_tokens['train']:,} training and {n_tokens['val']:,} validation tokens"
    return f"{documents_made}, {tokens_made} ({tokenizer.name})"


# ---- The options that prepare.py and fineweb.py share --------------------------------------------


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text_column",
        metavar="NAME",
        help="column with the text, of rows; a.b is the field b of a (default: text)",
    )
    parser.add_argument(
        "--separator",
        metavar="TEXT",
        help="what stands between the documents of one text, such as '<|endoftext|>' or '\\n'; "
        f"{BLANK_LINE}: blank lines (default: a text is one document)",
    )
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help="of text that is not UTF-8 and has no byte-order mark, such as cp1252 (default: such "
        "text is refused)",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="take U+FFFD for what cannot be decoded, however much it is (default: more than one "
        f"character in {LIMIT:,} bytes of a file is refused)",
    )
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens in a training shard, 2 bytes each (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that tokenise (default: one per CPU)",
    )


def check_shard_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program with exit code 2 if a number is out of range."""
    # So many processes would take all memory before they do anything.
    largest = {"shard_tokens": 2**31 - 1, "workers": 1024}
    for name, most in largest.items():
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= most:
            parser.error(f"--{name}={value}: must be at least 1 and at most {most:,}")
    for name in ("separator", "encoding"):
        if getattr(arguments, name) == "":
            parser.error(f"--{name}: must not be empty")


def choose_read_options(arguments: argparse.Namespace, **more) -> ReadOptions:
    """Return what the options say about how files are read. ValueError if an encoding is unknown.

    In a separator, \\n is a line feed, as it is hard to type in a shell.
    """
    if arguments.encoding:
        check_encoding(arguments.encoding)
    separator = arguments.separator
    if separator:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
    return ReadOptions(
        text_column=arguments.text_column,
        separator=separator,
        encoding=arguments.encoding,
        **more,
    )
