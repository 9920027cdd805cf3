"""Local text -> token shards.

    python prepare.py book.txt --out shards/book python prepare.py notes/ 'logs/*.md' --out
    shards/mine --glob '*.txt' --exclude drafts --tokenizer 4096 python prepare.py reviews.jsonl.gz
    table.parquet --out shards/rows --text_column body

After an interruption, the same command continues and ends with the same bytes, on any number of
workers.
"""

import argparse
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from parts.console import command, printable
from parts.documents import TABLES, documents_of, find_files
from parts.files import sha256, write_whole
from parts.sharding import (
    SEED,
    Split,
    available_cpus,
    finish_folder,
    parse_shared,
    pieces_of,
    shard_files,
    shard_folder,
    tokenising,
)
from parts.tokenizer import (
    KNOWN,
    LARGEST,
    SMALLEST,
    TOKENIZER_FILE,
    TOKENIZERS,
    GPT2Tokenizer,
    LearnedTokenizer,
    Tokenizer,
    learn_tokenizer,
    load_tokenizer,
    sample_texts,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    about = "Turn local text into token shards. A document is a row of a .jsonl, .jsonl.gz or .parquet, or a whole file."
    parser = argparse.ArgumentParser("prepare.py", description=about)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders, or globs in quotes")
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for the shards, such as shards/mine (required)",
    )
    tokenizer = "gpt2, bytes, a number of tokens to learn from the text, or a folder that has learned ones (default: "
    add(
        "--tokenizer",
        default="gpt2",
        metavar="gpt2|bytes|N|FOLDER",
        help=tokenizer + "%(default)s)",
    )
    add(
        "--glob",
        default="*",
        help="names of the files to take from folders, at any depth (default: all)",
    )
    skip = (
        "names of files and folders to skip inside folders; repeatable (default: hidden ones only)"
    )
    add("--exclude", action="append", default=[], metavar="GLOB", help=skip)
    validation = "share of documents for validation; with fewer than 1/F, the last share of each (default: %(default)s)"
    add("--val_fraction", type=float, default=0.05, metavar="F", help=validation)
    arguments = parse_shared(parser, argv)
    if arguments.val_fraction != 0 and not 1e-6 <= arguments.val_fraction <= 0.5:
        parser.error(f"--val_fraction={arguments.val_fraction}: must be 0, or from 0.000001 to 0.5")
    return arguments


def parse_tokenizer_option(wanted: str) -> Tokenizer | int:
    """prepare.py's --tokenizer: a tokenizer, or the number of tokens to learn. ValueError if it is
    neither.
    """
    if wanted.isdecimal() and SMALLEST <= int(wanted) <= LARGEST and int(wanted) not in KNOWN:
        return int(wanted)
    if wanted in TOKENIZERS or (Path(wanted) / TOKENIZER_FILE).exists():
        return load_tokenizer(wanted if wanted in TOKENIZERS else Path(wanted) / TOKENIZER_FILE)
    number = (
        f"a number from {SMALLEST} to {LARGEST} (not {GPT2Tokenizer.vocab_size}, which is GPT-2's)"
    )
    raise ValueError(
        f"--tokenizer {wanted}: must be gpt2, bytes, {number}, or a folder with a {TOKENIZER_FILE}"
    )


def provide_tokenizer(
    chosen: Tokenizer | int, file: Path, texts: Iterator[bytes], seed: int
) -> str:
    """Learn or copy what was chosen to the file, if it is not there yet. Returns the name or file
    for `load`.
    """
    if not isinstance(chosen, (int, LearnedTokenizer)):
        return chosen.name
    if isinstance(chosen, LearnedTokenizer):
        write_whole(file, chosen.content.encode())
    elif not file.exists():
        drawn = sample_texts(texts, seed)
        write_whole(file, learn_tokenizer(drawn, chosen).encode())
        print(f"vocabulary: {describe_tokenizer(load_tokenizer(file), drawn)}")
    return str(file)


def describe_tokenizer(tokenizer: LearnedTokenizer, texts: list[bytes]) -> str:
    """One line: tokens, bytes a token in the texts' first megabyte, the ten longest (not runs of a
    sign or space).
    """
    some = b"".join(texts)[:1_000_000]
    tokens = {tokenizer.decode_bytes([i]).strip() for i in range(tokenizer.end_of_text)}
    words = sorted(
        (token for token in tokens if len(set(token)) > 2), key=lambda token: (len(token), token)
    )
    longest = b" ".join(words[:-11:-1]).decode(errors="replace")
    each = len(some) / len(tokenizer.encode(some))
    return f"{tokenizer.vocab_size:,} tokens, {each:.2f} bytes a token; the longest: {printable(longest)}"


def describe(arguments: argparse.Namespace, files: list[Path], chosen: Tokenizer | int) -> dict:
    """What decides the shards' bytes, for meta.json: the options, and a hash of the files' names
    and contents.
    """
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            if not path.name.endswith(TABLES) and b"\0" in file.read(1 << 20):
                raise ValueError(
                    f"{path}: binary (NUL bytes), not text; leave it out with --exclude"
                )
        digest.update(os.fsencode(path.name) + bytes.fromhex(sha256(path)))
    size, tables = (
        sum(path.stat().st_size for path in files),
        [path for path in files if path.name.endswith(TABLES)],
    )
    names = ["shard_tokens", "val_fraction"] + (["text_column"] if tables else [])
    options = dict(tokenizer=getattr(chosen, "name", chosen)) | {
        name: getattr(arguments, name) for name in names
    }
    return options | dict(seed=SEED, files=len(files), bytes=size, sha256=digest.hexdigest())


@command("prepare.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out = Path(arguments.out).resolve()
    files = find_files(arguments.paths, arguments.glob, arguments.exclude, out)
    chosen = parse_tokenizer_option(arguments.tokenizer)
    source = describe(arguments, files, chosen)
    with shard_folder(out, source) as meta:
        if meta["complete"]:
            print(f"{arguments.out}: already made from these files ({len(files):,})")
            return
        # One document of every `stride` is for validation; with fewer documents than that, the tail
        # of each.
        n, fraction, column = arguments.shard_tokens, arguments.val_fraction, arguments.text_column
        stride = round(1 / fraction) if fraction else 0
        enough = sum(1 for _ in itertools.islice(documents_of(files, column), stride)) == stride
        split = Split(stride) if enough else Split(tail=fraction)
        # A validation shard fills as fast as a training shard, so an interruption loses little of
        # either.
        sizes = {"train": n, "val": max(min(n, 1 << 20), round(n * fraction))}
        # A worker takes a second to start, in which another one tokenises some 8 MB.
        workers = arguments.workers or min(available_cpus(), 1 + source["bytes"] // (8 << 20))
        pieces = itertools.chain.from_iterable(pieces_of(documents_of(files, column), split))
        texts = (text for name, _, text in pieces if name == "train")
        name = provide_tokenizer(chosen, out / TOKENIZER_FILE, texts, SEED)
        tokenizer = load_tokenizer(name)
        with tokenising(name, workers) as tokenise_all:
            rows = shard_files(files, out, tokenise_all, tokenizer, sizes, column, split)
        if not rows["train"] or (fraction and not rows["val"]):
            advice = f"delete {arguments.out}, and take more text or --val_fraction 0"
            raise ValueError(
                f"{files[0]}: too little text for a training and a validation split; {advice}"
            )
        counted = (
            rows["train"] if split.tail else rows["train"] + rows["val"]
        )  # a tail is no document of its own
        documents = sum(row["documents"] for row in counted)
        print(f"{arguments.out}: {finish_folder(out, tokenizer, source, rows, documents)}")


if __name__ == "__main__":
    main()
