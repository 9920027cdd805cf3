"""FineWeb-Edu, or any other text dataset on the Hugging Face hub -> token shards.

    python fineweb.py                               # the 10B-token sample -> shards/fineweb_edu_10B
    python fineweb.py --max_tokens 500_000_000      # the beginning of it
    python fineweb.py --pretokenized                # as many tokens in ready-made shards: 20 GB
    python fineweb.py --dataset Skylion007/openwebtext --name plain_text
    python fineweb.py --part 3/8                    # the third of 8 machines with a shared disk

The dataset's files are downloaded one by one, tokenised on all CPUs, and deleted. Each file gets
its own shards: NAME_train_004007.bin is the seventh shard of file 4. So the bytes depend on the
dataset only, not on the number of processes, machines or interruptions. The first shard of all is
for validation. After an interruption, run the same command again: it continues.
"""

import argparse
import contextlib
import glob
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any

from parts import data, hub
from parts.console import OptionParser, command, path_option, print_note, printable
from parts.documents import Document, ReadOptions, identify, read_documents
from parts.encoding import Replacements, to_utf8
from parts.files import lock, sha256
from parts.sharding import (
    ShardWriter,
    add_shard_options,
    available_cpus,
    check_shard_options,
    choose_read_options,
    finish_folder,
    lock_shard_folder,
    make_progress_bar,
    split_into_pieces,
    start_workers,
)
from parts.tokenizer import GPT2Tokenizer, get_tokenizer

import numpy as np

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = "karpathy/fineweb-edu-100B-gpt2-token-shards"
WAIT = 30  # seconds before a failed download is repeated

# The formats of `datasets` that are read as prepare.py reads them, unless the card has options or
# the files are archives.
OWN_FORMATS = ("parquet", "json", "csv", "arrow", "text")
ARCHIVES = (".zip", ".lz4", ".7z", ".rar", ".tar")

# In folders of earlier versions, `datasets` reads all files but these.
EARLIER_TABLES = (".parquet", ".jsonl", ".jsonl.gz")


# ---- The options ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OptionParser(
        "fineweb.py",
        description="A text dataset on the hub -> shards of GPT-2's tokens. "
        "HF_HOME, HF_TOKEN and HF_ENDPOINT are honoured.",
    )
    add = parser.add_argument
    add(
        "--dataset",
        metavar="ID",
        help=f"on the hub (default: {FINEWEB_EDU}; with --pretokenized: {PRETOKENIZED})",
    )
    add(
        "--name",
        help="subset of the dataset (default: sample-10BT of FineWeb-Edu; "
        "else the dataset's own default)",
    )
    add(
        "--out",
        type=path_option,
        metavar="FOLDER",
        help="folder for the shards (default: shards/fineweb_edu_10B, or after the dataset)",
    )
    add(
        "--max_tokens",
        type=int,
        metavar="N",
        help="with validation (default: all; --pretokenized: 10 billion)",
    )
    add(
        "--part",
        default="1/1",
        metavar="I/N",
        help="part I of N, for N machines and one --out (default: %(default)s)",
    )
    add(
        "--keep_downloads",
        action="store_true",
        help="keep and use files in the hub's cache (default: delete them)",
    )
    add(
        "--pretokenized",
        action="store_true",
        help="download ready-made shards of GPT-2's tokens (default: make them)",
    )
    add_shard_options(parser)
    arguments = parser.parse_args(argv)
    check_shard_options(parser, arguments)

    # Check the options together, and fill in the defaults that depend on others.
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        parser.error(f"--part={arguments.part}: must be like 1/4, 2/4, 3/4 or 4/4")
    arguments.part = int(match[1])
    arguments.parts = int(match[2])
    max_tokens = arguments.max_tokens
    if arguments.pretokenized:
        if arguments.name or arguments.keep_downloads or arguments.parts > 1:
            parser.error("--name, --part and --keep_downloads have no meaning with --pretokenized")
        if arguments.text_column or arguments.separator or arguments.encoding or arguments.replace:
            parser.error("how text is read has no meaning with --pretokenized")
        if max_tokens is None:
            arguments.max_tokens = 10_000_000_000
    elif max_tokens is not None:
        if max_tokens < 2 or arguments.parts > 1:
            parser.error(f"--max_tokens={max_tokens}: must be at least 2, and excludes --part")
        # The first shard is for validation, so there must be more than one.
        if max_tokens <= arguments.shard_tokens:
            arguments.shard_tokens = max(1, max_tokens // 10)
    if not arguments.dataset:
        arguments.dataset = PRETOKENIZED if arguments.pretokenized else FINEWEB_EDU
    if arguments.dataset == FINEWEB_EDU and not arguments.name:
        arguments.name = "sample-10BT"
    if not arguments.out:
        arguments.out = name_folder(arguments.dataset, arguments.name or "")
    return arguments


def name_folder(dataset: str, subset: str) -> str:
    """Return the default of --out, such as shards/fineweb_edu_10B."""
    if dataset == PRETOKENIZED:
        words = "fineweb edu 10B"
    else:
        size = subset.removeprefix("sample-").removesuffix("T")
        words = f"{Path(dataset).name} {size}"
    return "shards/" + re.sub(r"[^\w.]+", "_", words.strip())


# ---- What the hub has ----------------------------------------------------------------------------


def list_files(arguments: argparse.Namespace) -> dict:
    """Ask the hub for the dataset's commit, and for the files to read.

    Returns {"commit", "files", and maybe "reader" or "delimiter"}. A file is {"path", "size" in
    bytes, "sha256", which is None for a small file}; "reader" is how `datasets` reads the files, if
    it must. ValueError for any error of the network, the hub, or the dataset's card.
    """
    from huggingface_hub.hf_api import HfApi, RepoFile

    hub.limit_waits()
    dataset = arguments.dataset
    api = HfApi()
    try:
        commit = str(api.dataset_info(dataset, revision="main", timeout=hub.PATIENCE).sha)
        tree = api.list_repo_tree(dataset, recursive=True, revision=commit, repo_type="dataset")
        files: list[dict] = []
        for entry in tree:
            if isinstance(entry, RepoFile):
                digest = entry.lfs.sha256 if entry.lfs else None
                files.append({"path": entry.path, "size": entry.size, "sha256": digest})
        files.sort(key=lambda file: file["path"])
        if arguments.pretokenized:
            return {"commit": commit, "files": select_ready_made(files, arguments.max_tokens)}
        return {"commit": commit} | select_training_files(arguments, commit, files)
    except Exception as error:
        raise ValueError(f"{dataset}: {' '.join(str(error).split())}") from None


def select_training_files(arguments: argparse.Namespace, commit: str, files: list[dict]) -> dict:
    """Select the files of the subset's training split.

    Returns {"files"}, and "delimiter" if the card names one for csv. If only `datasets` can read
    them, "reader" has the arguments for datasets.load_dataset.
    """
    import datasets

    builder = datasets.load_dataset_builder(
        f"hf://datasets/{arguments.dataset}", arguments.name, revision=commit
    )
    config = builder.config
    splits = config.data_files or {}
    if "train" not in splits:
        raise ValueError(
            f"the subset {config.name!r} has no split named train, "
            f"only {', '.join(map(str, splits))}"
        )
    paths = {path.partition(f"@{commit}/")[2] for path in splits["train"]}
    # A subset may have options too, such as the separator of csv.
    reader = {"path": builder.name}
    defaults = vars(type(config)())
    for option, value in vars(config).items():
        if value != defaults[option] and option not in ("data_files", "data_dir", "features"):
            reader[option] = value
    selected: dict[str, Any] = {"files": [file for file in files if file["path"] in paths]}
    has_archives = any(path.endswith(ARCHIVES) for path in paths)
    options = reader.keys() - {"path", "name", "sep", "delimiter"}
    if builder.name not in OWN_FORMATS or options or has_archives:
        selected["reader"] = reader
    elif "sep" in reader:
        selected["delimiter"] = reader["sep"]
    return selected


def select_ready_made(files: list[dict], max_tokens: int) -> list[dict]:
    """Select shards with max_tokens tokens together: first those for validation, then training."""

    def is_for_training(file: dict) -> bool:
        return "_val_" not in file["path"]

    shards = [file for file in files if re.search(r"_(train|val)_\d+\.bin$", file["path"])]
    shards.sort(key=lambda file: (is_for_training(file), file["path"]))
    selected = []
    n_tokens = 0
    for file in shards:
        if n_tokens < max_tokens:
            selected.append(file)
            n_tokens += (file["size"] - data.HEADER_BYTES) // 2
    if not selected or "_train_" not in selected[-1]["path"]:
        raise ValueError(
            f"no training shards (..._train_000001.bin) in the first {max_tokens:,} tokens"
        )
    return selected


def download_file(file: dict, arguments: argparse.Namespace, commit: str, folder: Path) -> Path:
    """Download a file to `folder`, or with --keep_downloads to the hub's cache.

    Its size and SHA-256 are checked. A download that fails is repeated once; then ValueError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    for wait in (WAIT, 0):
        try:
            local_path = hf_hub_download(
                arguments.dataset,
                file["path"],
                repo_type="dataset",
                revision=commit,
                local_dir=None if arguments.keep_downloads else folder,
            )
            path = Path(local_path)
            if path.stat().st_size == file["size"] and file["sha256"] in (None, sha256(path)):
                return path
            path.resolve().unlink()
            problem = "the download differs from the hub's file in size or SHA-256"
        except (HTTPError, OSError, RuntimeError) as error:  # hf_xet raises RuntimeError
            problem = " ".join(str(error).split())
        time.sleep(wait)
    raise ValueError(
        f"{file['path']}: {problem}. Finished shards are kept: run the same command again"
    )


# ---- Files -> shards -----------------------------------------------------------------------------


def read_file(
    path: Path, source: dict, options: ReadOptions, replacements: Replacements
) -> Iterator[Document]:
    """Read the documents of a file. ValueError if it is damaged, or no text."""
    if "reader" in source and not path.name.endswith(EARLIER_TABLES):
        yield from read_rows(path, options.column, source["reader"])
        return
    file = identify(path, options)
    if file.kind == "binary":
        raise ValueError(f"{path}: binary ({file.about}), not text")
    if options.text_column and not file.has_columns:
        raise ValueError(f"{path}: is {file.describe()}, without columns; leave out --text_column")
    yield from read_documents([file], options, replacements)


def read_rows(path: Path, column: str, reader: dict) -> Iterator[Document]:
    """Read the rows of a file by `datasets`, as read_documents does.

    How many bytes of the file a row takes is not known: 0.
    """
    import datasets

    # Its errors are raised too, so they need not be logged.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            **reader, data_files=glob.escape(str(path)), split="train", streaming=True
        )
        for row in rows:
            if column not in row or not isinstance(row[column], str | None):
                raise ValueError(
                    f"no text in the column {column!r} among {', '.join(row)}; "
                    "choose with --text_column"
                )
            if row[column]:
                yield Document(to_utf8(row[column]), 0)
    except Exception as error:  # each format has a library of its own, with errors of its own
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def open_writer(out: Path, file_number: int, n_files: int, shard_tokens: int) -> ShardWriter:
    """Return the writer of one file's shards, which continues after an interruption.

    Shard numbers begin with the file's number, padded to at least three digits, and end with the
    shard's number in the file. In the first file that counts from 0, and number 0 is the validation
    shard; in the other files it counts from 1.
    """
    n_digits = max(3, len(str(n_files - 1)))

    def name_shard(_split: str, number: int) -> Path:
        split = "train"
        if file_number > 0:
            number += 1
        elif number == 0:
            split = "val"
        return out / f"{out.name}_{split}_{file_number:0{n_digits}d}{number:03d}.bin"

    record = out / "progress" / f"{file_number:06d}.npz"
    return ShardWriter(record, name_shard, {"train": shard_tokens}, GPT2Tokenizer.end_of_text)


def tokenise_files(arguments: argparse.Namespace, out: Path, source: dict) -> None:
    """Turn this machine's files into shards, one after the other.

    The next file is downloaded while one is tokenised, except with --max_tokens, where it may not
    be needed.
    """
    files = source["files"]
    writers = {}
    for i in range(arguments.part - 1, len(files), arguments.parts):
        writers[i] = open_writer(out, i, len(files), arguments.shard_tokens)
    missing = [i for i in writers if not writers[i].complete]
    done = [i for i in writers if writers[i].complete]
    tokens_left = arguments.max_tokens or sys.maxsize
    tokens_left -= sum(writers[i].n_tokens for i in done)
    options = choose_read_options(arguments, delimiter=source.get("delimiter"))
    replacements = Replacements(allowed=arguments.replace)

    with (
        start_workers("gpt2", arguments.workers or available_cpus()) as tokenise_all,
        make_progress_bar(sum(files[i]["size"] for i in writers), arguments.out) as bar,
        ThreadPool(1) as thread,  # a daemon: Ctrl-C does not wait for its download
    ):
        bar.update(sum(files[i]["size"] for i in done))

        def start_download(i: int) -> AsyncResult:
            folder = out / "downloads" / str(i)
            return thread.apply_async(
                download_file, (files[i], arguments, source["commit"], folder)
            )

        download = None
        for position, i in enumerate(missing):
            if tokens_left == 0:
                break
            if download is None:
                download = start_download(i)
            path = download.get()
            download = None
            is_last = position + 1 == len(missing)
            if not arguments.max_tokens and not is_last:
                download = start_download(missing[position + 1])

            path_shown = printable(files[i]["path"])
            bar.write(f"{path_shown} ({i + 1} of {len(files)} files)", sys.stderr)
            documents = read_file(path, source, options, replacements)
            bytes_before = bar.n
            pieces = split_into_pieces(documents, progress=bar.update)
            writers[i].fill(pieces, tokenise_all, bar, tokens_left)
            if bar.n == bytes_before:
                bar.update(files[i]["size"])  # read_rows could not tell
            tokens_left -= writers[i].n_tokens
            shutil.rmtree(out / "downloads" / str(i), ignore_errors=True)
    if replacements.total:
        print_note(replacements.describe())


def count_parts(arguments: argparse.Namespace, out: Path, source: dict) -> str:
    """Complete the folder if the files of all parts are done. Returns a summary for the terminal.

    Parts that end together count one after the other, and the last one completes the folder.
    """
    this_part = f"part {arguments.part} of {arguments.parts} is done"
    with lock(out / ".lock") if arguments.parts > 1 else contextlib.nullcontext():
        if data.read_meta(out)["complete"]:  # and the records are deleted
            return f"{this_part}; another part has finished the folder"
        n_files = len(source["files"])
        n_done = 0
        n_tokens = 0
        rows = []
        for i in range(n_files):
            writer = open_writer(out, i, n_files, arguments.shard_tokens)
            if writer.complete:
                n_done += 1
                n_tokens += writer.n_tokens
                rows += writer.rows["train"]
        if n_done < n_files and n_tokens != arguments.max_tokens:
            return f"{this_part}; {n_done} of {n_files} files are there"
        return finish(out, source, rows)


# ---- Ready-made shards ---------------------------------------------------------------------------


def take_ready_made(
    arguments: argparse.Namespace, out: Path, commit: str, files: list[dict]
) -> list[dict]:
    """Download published shards to the folder, and check those that are there.

    Returns their rows of meta.json.
    """
    rows = []
    with make_progress_bar(sum(file["size"] for file in files), arguments.out) as bar:
        for file in files:
            path = out / file["path"].replace("/", "_")
            local_path = path
            if not path.exists():
                local_path = download_file(file, arguments, commit, out / "downloads")
            tokens = data.open_shard(local_path).tokens  # checks header and size
            row = {
                "file": path.name,
                "tokens": len(tokens),
                "sha256": file["sha256"] or sha256(local_path),
                "documents": int(np.count_nonzero(tokens == GPT2Tokenizer.end_of_text)),
            }
            rows.append(row)
            del tokens  # The system Windows moves no file that is mapped.
            os.replace(local_path, path)
            bar.update(file["size"])
    return rows


# ---- The folder ----------------------------------------------------------------------------------


def finish(out: Path, source: dict, rows: list[dict]) -> str:
    """Complete the folder, whose shards are `rows`. Returns a summary for the terminal.

    ValueError if all of them are for validation.
    """
    train = []
    val = []
    for row in rows:
        # The folder's name, which may have "_val_" too, decides nothing.
        if "_val_" in row["file"].removeprefix(out.name):
            val.append(row)
        else:
            train.append(row)
    if not train:
        n_tokens = sum(row["tokens"] for row in rows)
        raise ValueError(
            f"{out}: all {n_tokens:,} tokens are for validation; "
            f"delete it, set --shard_tokens={max(1, n_tokens // 20)}"
        )
    shutil.rmtree(out / "downloads", ignore_errors=True)
    documents = sum(row["documents"] for row in rows)
    return finish_folder(
        out, get_tokenizer("gpt2"), source, {"train": train, "val": val}, documents
    )


@command("fineweb.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out = Path(arguments.out).resolve()
    options = ["dataset", "max_tokens", "pretokenized"]
    if not arguments.pretokenized:
        options += ["name", "text_column", "separator", "encoding", "shard_tokens"]
    wanted = {option: getattr(arguments, option) for option in options}
    if not arguments.pretokenized:
        wanted["text_column"] = choose_read_options(arguments).column

    def ask_the_hub() -> dict:
        return list_files(arguments)

    with lock_shard_folder(out, wanted, ask_the_hub, arguments.part, arguments.parts) as meta:
        if meta["complete"]:
            print(f"{arguments.out}: already made from {arguments.dataset}")
            return
        source = meta["source"]
        if arguments.pretokenized:
            rows = take_ready_made(arguments, out, source["commit"], source["files"])
            summary = finish(out, source, rows)
        else:
            tokenise_files(arguments, out, source)
            summary = count_parts(arguments, out, source)
        print(f"{arguments.out}: {summary}")


if __name__ == "__main__":
    main()
