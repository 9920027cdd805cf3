"""Documents -> tokens -> shards, on all cores: what prepare.py and fineweb.py have in common.

After an interruption, the same command continues and ends with the same bytes, on any number of
workers.
"""

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
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parts import data
from parts.documents import Documents, documents_of
from parts.files import lock, write_whole
from parts.tokenizer import BREAK, PIECE_BYTES, TOKENIZER_FILE, Tokenizer, load_tokenizer, segments

START_METHOD = "spawn"  # of worker processes: the same on all systems, and safe with threads
SEED = 1337  # draws the validation documents


# ---- Documents -> pieces for the workers ---------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Which text is for validation: one drawn document of every `stride`, or the last share `tail`
    of each document.
    """

    stride: int = 0  # 0: none
    tail: float = 0.0

    def ends(self, text: bytes | mmap.mmap, document: int) -> dict[str, int]:
        """Where the training part and the validation part of a document end."""
        if self.tail:
            cut = max(1, round((1 - self.tail) * len(text)))
            window = text[cut : cut + 4096]
            start = re.search(rb"\s", window) or re.search(
                rb"[^\x80-\xbf]", window
            )  # else at a UTF-8 character
            return {"train": cut + start.start() if start else len(text), "val": len(text)}
        block, place = divmod(document, self.stride or 1)
        drawn = self.stride and random.Random(f"{SEED}, {block}").randrange(self.stride) == place
        return {"val" if drawn else "train": len(text)}


Piece = list[tuple[str, bool, bytes]]  # split, whether a document begins here, UTF-8
Tokens = dict[str, np.ndarray]  # split -> uint16


def pieces_of(
    documents: Documents, split=Split(), progress=lambda n_bytes: None, breaks=BREAK
) -> Iterator[Piece]:
    """The documents in pieces of about PIECE_BYTES of text. `progress` is told of the bytes read of
    the files.
    """
    piece, piece_bytes = [], 0
    for number, (text, in_file) in enumerate(documents):
        start = 0
        for name, end in split.ends(text, number).items():
            for n, segment in enumerate(segments(text, start, end, breaks)):
                piece.append((name, n == 0, segment))
                piece_bytes += len(segment)
                progress(in_file * len(segment) / len(text))
                if piece_bytes >= PIECE_BYTES:
                    yield piece
                    piece, piece_bytes = [], 0
            start = end
    if piece:
        yield piece


# ---- Pieces -> tokens, on worker processes -------------------------------------------------------


def tokenise(piece: Piece, tokenizer_name: str) -> Tokens:
    """The tokens of a piece. Each document begins with the end-of-text token."""
    tokenizer, tokens = load_tokenizer(tokenizer_name), {}
    start = np.array([tokenizer.end_of_text], dtype=np.uint16)
    for split, begins, text in piece:
        tokens.setdefault(split, []).extend(
            [start, tokenizer.encode(text)] if begins else [tokenizer.encode(text)]
        )
    return {split: np.concatenate(arrays) for split, arrays in tokens.items()}


@contextmanager
def tokenising(
    tokenizer_name: str, workers: int
) -> Iterator[Callable[[Iterator[Piece]], Iterator[Tokens]]]:
    """A function that tokenises pieces, in order, on worker processes, which have started when the
    block begins.
    """
    job = functools.partial(tokenise, tokenizer_name=tokenizer_name)
    if workers == 1:
        load_tokenizer(tokenizer_name)  # load it now
        yield functools.partial(map, job)
        return
    context, can_block = (
        multiprocessing.get_context(START_METHOD),
        hasattr(signal, "pthread_sigmask"),
    )  # not on Windows
    pool = ProcessPoolExecutor(
        workers, context, start_worker, (tokenizer_name, context.Barrier(workers))
    )

    def in_order(pieces):
        running = deque()
        for piece in pieces:
            running.append(pool.submit(job, piece))
            if len(running) == 3 * workers:  # so many are in memory
                yield running.popleft().result()
        yield from (future.result() for future in running)

    try:
        if (
            can_block
        ):  # workers inherit it, and ignore Ctrl-C later; this process gets it when it unblocks
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            starting = [pool.submit(int) for _ in range(workers)]
        finally:
            if can_block:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for future in starting:
            future.result()
        yield in_order
    except BrokenProcessPool:
        advice = f"run the same command again, with fewer --workers than {workers}; finished shards are kept"
        raise ValueError(f"a worker process was killed (out of memory?): {advice}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(tokenizer_name: str, all_started) -> None:
    """Load the tokenizer, and wait for the other workers. Ctrl-C is for the parent; without a
    parent, exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    load_tokenizer(tokenizer_name)
    all_started.wait()


def available_cpus() -> int:
    """CPUs that this process may use; a scheduler may grant fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return min(61, os.cpu_count() or 1)  # a pool on Windows has at most 61 processes


# ---- Tokens -> shards ----------------------------------------------------------------------------


class Shards:
    """Cuts streams of tokens, one for each split, into shards of equal size, and can continue after
    an interruption.

    After each new shard it saves a record: the rows of meta.json so far, the number of pieces done,
    and the tokens that are in no shard yet.
    """

    def __init__(
        self,
        record: Path,
        path_of: Callable[[str, int], Path],
        sizes: dict[str, int],
        end_of_text: int,
    ):
        """path_of: split and number of a shard (from 0) -> its file. sizes: split -> tokens in a
        shard.
        """
        self.record, self.path_of, self.sizes, self.end_of_text = (
            record,
            path_of,
            sizes,
            end_of_text,
        )
        self.pieces, self.n_tokens, self.complete = 0, 0, False
        self.rows: dict[str, list[dict]] = {split: [] for split in sizes}
        self.rest = {
            split: [np.empty(0, dtype=np.uint16)] for split in sizes
        }  # tokens that are in no shard yet
        if record.exists():
            with np.load(record) as saved:
                vars(self).update(
                    json.loads(str(saved["state"])), rest={split: [saved[split]] for split in sizes}
                )

    def add(self, tokens: Tokens, last: bool = False) -> None:
        """Write the shards that the tokens of the next piece fill; after the last piece, also what
        is left.
        """
        self.pieces, self.complete, new = self.pieces + 1, last, last
        for split, part in tokens.items():
            self.rest[split].append(part)
            self.n_tokens += len(part)
        for split, size in self.sizes.items():
            while (n := sum(map(len, self.rest[split]))) >= size or (last and n):
                stream = np.concatenate(self.rest[split])
                shard, self.rest[split], new = stream[:size], [stream[size:].copy()], True
                row = data.write_shard(self.path_of(split, len(self.rows[split])), shard)
                self.rows[split].append(
                    row | {"documents": int(np.count_nonzero(shard == self.end_of_text))}
                )
        if new:
            state = dict(
                pieces=self.pieces, n_tokens=self.n_tokens, complete=self.complete, rows=self.rows
            )
            rest, file = (
                {split: np.concatenate(parts) for split, parts in self.rest.items()},
                io.BytesIO(),
            )
            np.savez(file, state=json.dumps(state), **rest)
            write_whole(self.record, file.getvalue())

    def fill(
        self, pieces: Iterator[Piece], tokenise_all: Callable, bar, limit: int = sys.maxsize
    ) -> None:
        """Tokenise the pieces, `limit` tokens at most (of a single split), from where the record
        ends.
        """
        for tokens in tokenise_all(itertools.islice(pieces, self.pieces, None)):
            left = limit - self.n_tokens
            self.add({split: new[:left] for split, new in tokens.items()})
            bar.set_postfix(tokens=f"{self.n_tokens:,}", refresh=False)
            if self.n_tokens == limit:
                break
        self.add({}, last=True)


def progress_bar(total: int, what: str):
    """Bytes of input, speed and time left; on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


def shard_files(
    files, out: Path, tokenise_all: Callable, tokenizer, sizes: dict, column="text", split=Split()
) -> dict:
    """Turn files into shards of sizes[split] tokens in the folder `out`. Returns split -> rows of
    meta.json.
    """
    (out / "progress").mkdir(parents=True, exist_ok=True)
    name, record = out / out.name, out / "progress" / "all.npz"
    shards = Shards(
        record, lambda s, n: Path(f"{name}_{s}_{n + 1:06d}.bin"), sizes, tokenizer.end_of_text
    )
    with progress_bar(sum(path.stat().st_size for path in files), out.name) as bar:
        pieces = pieces_of(documents_of(files, column), split, bar.update, tokenizer.breaks)
        shards.fill(pieces, tokenise_all, bar)
    return shards.rows


@contextmanager
def shard_folder(
    out: Path, source: dict, begin: Callable[[], dict] = dict, part=1, parts=1
) -> Iterator[dict]:
    """Lock a folder for the shards of `source`; gives its meta.json. begin() is what to add to a
    new folder's source.

    ValueError if it holds other files or shards of another source, or if another process works on
    the same part.
    """
    meta, progress = data.read_meta(out), out / "progress"
    left_over = ("progress", "downloads")
    if (
        not meta
        and out.is_dir()
        and any(p.name not in left_over and p.suffix != ".tmp" for p in out.iterdir())
    ):
        raise ValueError(
            f"{out}: holds files that this command did not write; choose a new folder for --out"
        )
    with ExitStack() as locks:
        if not meta.get("complete"):
            progress.mkdir(parents=True, exist_ok=True)
            taken = f"{out}: another process makes these shards; wait, or stop it"
            locks.enter_context(lock(progress / f"{part}_of_{parts}.lock", taken))
            for other in set(progress.glob("*.lock")) - set(progress.glob(f"*_of_{parts}.lock")):
                with lock(other, taken):  # only a look
                    pass
            meta = data.read_meta(out)
        if not meta or (
            parts == 1 and not any(out.glob("*.bin"))
        ):  # nothing is made yet: other options are welcome
            for old in (*progress.glob("*.npz"), *out.glob(TOKENIZER_FILE)):
                old.unlink()
            meta = {"source": source | begin(), "complete": False}
            write_whole(out / "meta.json", json.dumps(meta, indent=1).encode())
        before = meta.get("source", {})
        changed = [
            f"{name} {before.get(name)} -> {new}"
            for name, new in source.items()
            if before.get(name) != new
        ]
        if changed:
            advice = "choose another --out or delete that folder"
            raise ValueError(f"{out}: made from another source ({', '.join(changed)}); {advice}")
        yield meta


def finish_folder(
    out: Path, tokenizer: Tokenizer, source: dict, shards: dict, documents: int
) -> str:
    """Write the meta.json of a complete folder. shards: split -> rows. Returns a summary for the
    terminal.
    """
    n_tokens = {split: sum(row["tokens"] for row in rows) for split, rows in shards.items()}
    meta = dict(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        documents=documents,
        tokens=n_tokens,
    )
    meta |= dict(shards=shards, source=source, complete=True)
    write_whole(out / "meta.json", json.dumps(meta, indent=1).encode())
    shutil.rmtree(out / "progress", ignore_errors=True)
    for path in out.glob("*.tmp"):  # of killed runs
        path.unlink(missing_ok=True)
    tokens = f"{n_tokens['train']:,} training and {n_tokens['val']:,} validation tokens"
    return f"{documents:,} document{'s' * (documents != 1)}, {tokens} ({tokenizer.name})"


def parse_shared(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Add the options that prepare.py and fineweb.py share, and parse."""
    add = parser.add_argument
    add(
        "--text_column",
        default="text",
        metavar="NAME",
        help="column with the text, of rows (default: %(default)s)",
    )
    shard = "tokens in a training shard, 2 bytes each (default: %(default)s)"
    add("--shard_tokens", type=int, default=100_000_000, metavar="N", help=shard)
    add("--workers", type=int, metavar="N", help="processes that tokenise (default: one per CPU)")
    arguments = parser.parse_args(argv)
    for name, value in (("shard_tokens", arguments.shard_tokens), ("workers", arguments.workers)):
        if value is not None and not 1 <= value < 2**31:
            parser.error(f"--{name}={value}: must be at least 1 and below 2**31")
    return arguments
