"""Local text -> token shards.

    python prepare.py book.txt --out shards/book
    python prepare.py notes/ 'logs/*.md' --out shards/mine --glob '*.txt' --exclude drafts
    python prepare.py code/ --out shards/code --tokenizer 4096
    python prepare.py reviews.csv dump.jsonl.zst table.parquet --out shards/rows --text_column body
    python prepare.py TinyStories.txt --out shards/stories --separator '<|endoftext|>'

After an interruption, the same command continues and ends with the same bytes, on any number of
workers.
"""

import argparse
import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from parts.console import (
    OptionParser,
    command,
    path_option,
    plural,
    print_lines,
    print_note,
    printable,
)
from parts.documents import (
    InputFile,
    ReadOptions,
    check_encoding_of,
    find_files,
    identify,
    is_saved_split,
    read_documents,
)
from parts.encoding import Replacements
from parts.files import sha256, write_whole
from parts.overlap import find_copies
from parts.sharding import (
    SEED,
    Split,
    add_shard_options,
    available_cpus,
    check_shard_options,
    choose_read_options,
    finish_folder,
    lock_shard_folder,
    shard_files,
    split_into_pieces,
    start_workers,
)
from parts.tokenizer import (
    END_OF_TEXT,
    LARGEST,
    SMALLEST,
    TOKENIZER_FILE,
    TOKENIZERS,
    BytesTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    get_tokenizer,
    learn_tokenizer,
    load_tokenizer,
    read_object,
    read_tokenizer,
    sample_texts,
    tokenizer_of_folder,
)

# As a share of the validation tokens.
COPIES_WORTH_A_NOTE = 0.05

# ---- The options ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OptionParser(
        "prepare.py",
        description="Turn local text into token shards. A document is a row of JSON lines, a JSON "
        "array, csv, tsv, Parquet or Arrow, or a whole text; any file may be compressed (gzip, "
        "bzip2, xz, zstd). What a file is, its content says.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=path_option,
        metavar="PATH",
        help="files, folders, or globs in quotes",
    )
    add(
        "--out",
        required=True,
        type=path_option,
        metavar="FOLDER",
        help="folder for the shards, such as shards/mine (required)",
    )
    add(
        "--tokenizer",
        type=path_option,
        default="gpt2",
        metavar="gpt2|bytes|N|FOLDER",
        help="gpt2, bytes, a number of tokens to learn from the text, or the folder of a model or "
        "of shards: theirs (default: %(default)s)",
    )
    add(
        "--glob",
        default="*",
        help="names of the files to take from folders, at any depth (default: all)",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="names of files and folders to skip inside folders; repeatable "
        "(default: hidden ones only)",
    )
    add(
        "--val_fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of documents for validation; with fewer than 1/F, the last share of each "
        "(default: %(default)s)",
    )
    add(
        "--as_text",
        action="store_true",
        help="take every file as text, also csv and JSON (default: their rows are documents)",
    )
    add_shard_options(parser)
    arguments = parser.parse_args(argv)
    check_shard_options(parser, arguments)
    if arguments.val_fraction != 0 and not 1e-6 <= arguments.val_fraction <= 0.5:
        parser.error(f"--val_fraction={arguments.val_fraction}: must be 0, or from 0.000001 to 0.5")
    return arguments


def parse_tokenizer_option(value: str) -> Tokenizer | int:
    """Read the value of --tokenizer: an existing tokenizer, or the number of tokens to learn.

    ValueError if it is neither.
    """
    # A model of one of these sizes, without files of a tokenizer, counts as one with that.
    taken_sizes = [tokenizer.vocab_size for tokenizer in TOKENIZERS.values()]
    if value.isdecimal() and SMALLEST <= int(value) <= LARGEST and int(value) not in taken_sizes:
        return int(value)
    if value in TOKENIZERS:
        return get_tokenizer(value)
    tokenizer = None
    if Path(value).is_dir():
        folder = newest_checkpoint(Path(value))
        rows = read_object(folder / "config.json").get("vocab_size")
        tokenizer = tokenizer_of_folder(folder, rows)
    if tokenizer is not None:
        return tokenizer
    raise ValueError(
        f"--tokenizer {value}: must be gpt2, bytes, a number from {SMALLEST} to {LARGEST} "
        f"(not {GPT2Tokenizer.vocab_size}, which is GPT-2's), or a folder with a {TOKENIZER_FILE} "
        f"or with vocab.json and merges.txt"
    )


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run's folder; any other folder itself."""
    return max(folder.glob("step_*"), key=lambda path: path.name, default=folder)


# ---- The steps -----------------------------------------------------------------------------------


def identify_files(
    arguments: argparse.Namespace, out: Path, options: ReadOptions
) -> list[InputFile]:
    """Find the files, and tell what each is. Binary files inside folders are left out, with a line.

    ValueError if a file that is named is binary, no file is left, or an option can apply to none.
    """
    named = {Path(path) for path in arguments.paths}
    files = []
    binary = []
    for path in find_files(arguments.paths, arguments.glob, arguments.exclude, out):
        file = identify(path, options)
        if file.kind != "binary":
            files.append(file)
        elif path in named:
            raise ValueError(f"{path}: binary ({file.about}), not text; leave it out")
        else:
            binary.append(file)
    if binary:
        first = f"{binary[0].path} ({binary[0].about})"
        left_out = plural(len(binary), "file")
        print_note(f"left out {left_out} that are not text, first {first}")
    if not files:
        raise ValueError(f"{' '.join(arguments.paths)}: no text in it, only binary files")
    check_options_apply(files, options)
    suggest_options(files, options)
    return files


def check_options_apply(files: list[InputFile], options: ReadOptions) -> None:
    """Raise ValueError if an option is given that can apply to none of the files."""
    has_text = any(file.kind == "text" for file in files)
    if options.text_column and not any(file.has_columns for file in files):
        raise ValueError(
            f"--text_column {options.text_column}: {files[0].path} has no columns (it is "
            f"{files[0].describe()}), nor has any other file; rows are those of csv, JSON lines, "
            "JSON arrays, Parquet and Arrow"
        )
    if options.separator and not has_text:
        raise ValueError(f"--separator: {files[0].path} has rows, as all files here, and no texts")
    encoding = options.encoding
    if encoding and not any(file.encoding == encoding for file in files):
        raise ValueError(f"--encoding {encoding}: {files[0].path} and all other files are UTF-8")


def suggest_options(files: list[InputFile], options: ReadOptions) -> None:
    """Print a line where an option seems to be missing, or applies to a part of the files only."""
    marked = [file for file in files if file.end_of_text_marks > 2]
    if marked and not options.separator:
        print_note(
            f"{marked[0].path}: has {END_OF_TEXT} in its text; if it stands between documents, "
            f"give --separator '{END_OF_TEXT}'"
        )
    rowless = [file for file in files if file.is_named_json]
    if rowless:
        n_files = plural(len(rowless), "JSON file")
        print_note(
            f"{n_files} without rows read as text: {rowless[0].path} first; rows are objects in "
            "an array, or one a line"
        )
    others = []
    for file in files:
        if file.encoding != options.encoding and file.kind not in ("parquet", "arrow"):
            others.append(file)
    if options.encoding and others:
        n_others = plural(len(others), "file")
        print_note(f"{n_others} read as {others[0].encoding}: {others[0].path} first")
    splits = {file.path.parent.parent for file in files if is_saved_split(file.path)}
    for folder in sorted(splits):
        print_note(f"{folder}: all its splits are read; name one of its folders")


def describe_source(
    arguments: argparse.Namespace,
    files: list[InputFile],
    options: ReadOptions,
    tokenizer: Tokenizer | int,
) -> dict:
    """Read all files, and describe all that decides the shards' bytes, for meta.json.

    It is the options, and one hash of the files' names and contents.
    """
    digest = hashlib.sha256()
    n_bytes = 0
    kinds: dict[str, int] = defaultdict(int)
    for file in files:
        digest.update(os.fsencode(file.path.name) + bytes.fromhex(sha256(file.path)))
        n_bytes += file.path.stat().st_size
        if not file.has_default_kind():
            kinds[file.describe()] += 1
    source = {
        "tokenizer": tokenizer if isinstance(tokenizer, int) else tokenizer.name,
        "shard_tokens": arguments.shard_tokens,
        "val_fraction": arguments.val_fraction,
    }
    if any(file.has_columns for file in files):
        source["text_column"] = options.column
    source["separator"] = options.separator
    source["seed"] = SEED
    source["files"] = len(files)
    source["bytes"] = n_bytes
    source["sha256"] = digest.hexdigest()
    # What is not read as earlier versions did, which knew two kinds of rows by their names.
    source["kinds"] = dict(sorted(kinds.items())) or None
    return source


def read_states(files: list[Path]) -> dict[Path, tuple[int, int]]:
    """Return the size and the time of the last change of each file."""
    states = {}
    for path in files:
        status = path.stat()
        states[path] = (status.st_size, status.st_mtime_ns)
    return states


def check_unchanged(states: dict[Path, tuple[int, int]], out: str) -> None:
    """Raise ValueError if a file is another one than it was when `read_states` saw it.

    The files are read several times, so the shards would hold a text that never was.
    """
    for path, state in states.items():
        if not path.is_file() or read_states([path])[path] != state:
            raise ValueError(
                f"{path}: changed while it was read; delete {out}, "
                "and run the same command again when no program writes to it"
            )


def choose_split(files: list[InputFile], options: ReadOptions, val_fraction: float) -> Split:
    """Decide which text is for validation: one document of every `stride`, if there are so many.

    With fewer documents, it is the end of each. Reads the first `stride` documents.
    """
    if val_fraction == 0:
        return Split()
    stride = round(1 / val_fraction)
    first_documents = itertools.islice(read_documents(files, options), stride)
    n_documents = sum(1 for _ in first_documents)
    if n_documents == stride:
        return Split(stride=stride)
    return Split(tail=val_fraction)


def read_training_texts(
    files: list[InputFile], options: ReadOptions, split: Split
) -> Iterator[bytes]:
    """Read the segments of all documents that are for training."""
    for piece in split_into_pieces(read_documents(files, options), split):
        for segment in piece:
            if segment.split == "train":
                yield segment.text


def provide_tokenizer(choice: Tokenizer | int, file: Path, texts: Iterator[bytes]) -> str:
    """Learn or copy the tokenizer to `file`, if it is not in TOKENIZERS and not there yet.

    Returns what load_tokenizer takes: a name, or the file. The texts are read only to learn from
    them.
    """
    if isinstance(choice, Tokenizer):
        if choice.content is None:
            return choice.name
        write_whole(file, choice.content.encode())
    elif not file.exists():
        sample = sample_texts(texts, SEED)
        write_whole(file, learn_tokenizer(sample, choice).encode())
        print_lines(f"vocabulary: {describe_tokenizer(read_tokenizer(file), sample)}")
    return str(file)


def describe_tokenizer(tokenizer: Tokenizer, texts: list[bytes]) -> str:
    """Describe a learned tokenizer in one line: its size, bytes per token, and longest tokens.

    The bytes per token are those of the texts' first megabyte. The ten longest tokens leave out
    runs of a sign or of white space.
    """
    first_megabyte = b"".join(texts)[:1_000_000]
    bytes_per_token = len(first_megabyte) / len(tokenizer.encode(first_megabyte))
    tokens = {tokenizer.decode_bytes([i]).strip() for i in range(tokenizer.vocab_size - 1)}
    words = [token for token in tokens if len(set(token)) > 2]
    words.sort(key=lambda token: (len(token), token), reverse=True)
    longest = b" ".join(words[:10]).decode(errors="replace")
    return (
        f"{tokenizer.vocab_size:,} tokens, {bytes_per_token:.2f} bytes a token; "
        f"the longest: {printable(longest)}"
    )


def note_copies(out: Path, tokenizer: Tokenizer) -> None:
    """Print a line if much of the validation text is no test of what a model has learned."""
    share = find_copies(out, tokenizer).mean()
    if share >= COPIES_WORTH_A_NOTE:
        print_note(
            f"at least {share:.0%} of the validation tokens are copies of training text, so the "
            "validation loss will be lower than that of new text; --exclude leaves out copies and "
            "generated files"
        )


@command("prepare.py")
def main(argv: list[str] | None = None) -> None:
    """Read the files up to four times: to hash them, to count documents (the first ones only), to
    learn a tokenizer (if it is to be learned), and to write the shards.
    """
    arguments = parse_arguments(argv)
    options = choose_read_options(arguments, as_text=arguments.as_text)
    out = Path(arguments.out).resolve()
    choice = parse_tokenizer_option(arguments.tokenizer)
    files = identify_files(arguments, out, options)
    states = read_states([file.path for file in files])
    source = describe_source(arguments, files, options, choice)

    with lock_shard_folder(out, source) as meta:
        if meta["complete"]:
            print(f"{arguments.out}: already made from these files ({len(files):,})")
            return

        # As bytes, every text is what it is.
        keeps_bytes = isinstance(choice, BytesTokenizer)
        replacements = Replacements(allowed=arguments.replace or keeps_bytes)
        for file in files:
            check_encoding_of(file, replacements)
        split = choose_split(files, options, arguments.val_fraction)

        texts = read_training_texts(files, options, split)
        name_or_file = provide_tokenizer(choice, out / TOKENIZER_FILE, texts)
        tokenizer = load_tokenizer(name_or_file)

        # A validation shard fills as fast as a training shard, so an interruption loses little of
        # either. But below a million tokens, it is not smaller than a training shard.
        train_size = arguments.shard_tokens
        val_size = max(min(train_size, 1 << 20), round(train_size * arguments.val_fraction))
        # A worker takes a second to start, in which another one tokenises some 8 MB.
        workers = arguments.workers or min(available_cpus(), 1 + source["bytes"] // (8 << 20))
        with start_workers(name_or_file, workers) as tokenise_all:
            sizes = {"train": train_size, "val": val_size}
            rows = shard_files(
                files, out, tokenise_all, tokenizer, sizes, options, split, replacements
            )

        if not rows["train"] or (arguments.val_fraction and not rows["val"]):
            raise ValueError(
                f"{files[0].path}: too little text for a training and a validation split; "
                f"delete {arguments.out}, and take more text or --val_fraction 0"
            )
        check_unchanged(states, arguments.out)
        documents = sum(row["documents"] for row in rows["train"])
        # The end of a document that is for validation is no document of its own.
        if not split.tail:
            documents += sum(row["documents"] for row in rows["val"])
        if replacements.total:
            print_note(replacements.describe(keeps_bytes))
        print(f"{arguments.out}: {finish_folder(out, tokenizer, meta['source'], rows, documents)}")
        if rows["val"]:
            note_copies(out, tokenizer)


if __name__ == "__main__":
    main()
