"""FineWeb-Edu, or any other text dataset on the Hugging Face hub -> token shards.

    python fineweb.py                                            the 10B-token sample, to shards/fineweb_edu_10B
    python fineweb.py --max_tokens 500_000_000                   the beginning of it
    python fineweb.py --pretokenized                             the same amount as ready-made shards: 20 GB
    python fineweb.py --dataset Skylion007/openwebtext --name plain_text
    python fineweb.py --part 3/8                                 on the third of eight machines with a shared disk

The dataset's files are downloaded one by one, tokenised on all CPUs, and deleted. Each file gets
its own shards: NAME_train_004007.bin is the seventh shard of file 4. So the bytes depend on the
dataset only, not on the number of processes, machines or interruptions. The first shard of all is
for validation. After an interruption, run the same command again: it continues.
"""

import argparse
import contextlib
import glob
import itertools
import os
import re
import shutil
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from parts import data
from parts.console import command
from parts.documents import TABLES, Documents, documents_of
from parts.files import lock, sha256
from parts.sharding import (
    Shards,
    available_cpus,
    finish_folder,
    parse_shared,
    pieces_of,
    progress_bar,
    shard_folder,
    tokenising,
)
from parts.tokenizer import GPT2Tokenizer, get_tokenizer

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = "karpathy/fineweb-edu-100B-gpt2-token-shards"
WAIT = 30  # seconds before a failed download is repeated


def list_files(arguments: argparse.Namespace) -> dict:
    """The dataset's commit; path, size in bytes and sha256 (None for a small file) of each file;
    how to read them.
    """
    from huggingface_hub.hf_api import HfApi, RepoFile

    dataset, api = arguments.dataset, HfApi()
    try:
        commit = api.dataset_info(dataset, revision="main").sha
        tree = api.list_repo_tree(dataset, recursive=True, revision=commit, repo_type="dataset")
        entries = sorted(
            (entry for entry in tree if isinstance(entry, RepoFile)), key=lambda entry: entry.path
        )
        files = [
            dict(path=e.path, size=e.size, sha256=e.lfs.sha256 if e.lfs else None) for e in entries
        ]
        chosen = needed_shards if arguments.pretokenized else training_files
        return dict(commit=commit) | chosen(arguments, commit, files)
    except Exception as error:  # of the network, the hub, the dataset's card
        raise ValueError(f"{dataset}: {' '.join(str(error).split())}") from None


def training_files(arguments: argparse.Namespace, commit: str, files: list[dict]) -> dict:
    """The files of the subset's training split, and the arguments with which datasets.load_dataset
    reads them.
    """
    import datasets

    builder = datasets.load_dataset_builder(
        f"hf://datasets/{arguments.dataset}", arguments.name, revision=commit
    )
    config, splits = builder.config, builder.config.data_files or {}
    if "train" not in splits:
        raise ValueError(
            f"the subset {config.name!r} has no split named train, only {', '.join(map(str, splits))}"
        )
    found = {path.partition(f"@{commit}/")[2] for path in splits["train"]}
    # A subset may have options too, such as the separator of csv.
    usual, elsewhere = vars(type(config)()), ("data_files", "data_dir", "features")
    options = {
        key: value
        for key, value in vars(config).items()
        if value != usual[key] and key not in elsewhere
    }
    return dict(
        files=[file for file in files if file["path"] in found],
        reader=dict(path=builder.name) | options,
    )


def needed_shards(arguments: argparse.Namespace, commit: str, files: list[dict]) -> dict:
    """Ready-made shards with max_tokens tokens together: validation first."""
    shards = [file for file in files if re.search(r"_(train|val)_\d+\.bin$", file["path"])]
    shards.sort(key=lambda file: ("_val_" not in file["path"], file["path"]))
    before = itertools.accumulate(
        ((file["size"] - data.HEADER_BYTES) // 2 for file in shards), initial=0
    )
    needed = [file for file, n in zip(shards, before) if n < arguments.max_tokens]
    if not needed or "_train_" not in needed[-1]["path"]:
        raise ValueError(
            f"no training shards (..._train_000001.bin) in the first {arguments.max_tokens:,} tokens"
        )
    return dict(files=needed)


def fetch(file: dict, arguments: argparse.Namespace, commit: str, folder: Path) -> Path:
    """The file in `folder` or the hub's cache, with the hub's size and SHA-256. A failed download
    is repeated once.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    where = dict(
        repo_id=arguments.dataset, filename=file["path"], repo_type="dataset", revision=commit
    )
    for wait in (WAIT, 0):
        try:
            path = Path(
                hf_hub_download(**where, local_dir=None if arguments.keep_downloads else folder)
            )
            if path.stat().st_size == file["size"] and file["sha256"] in (None, sha256(path)):
                return path
            path.resolve().unlink()
            problem = "the download differs from the hub's file in size or SHA-256"
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of hf_xet
            problem = " ".join(str(error).split())
        time.sleep(wait)
    raise ValueError(
        f"{file['path']}: {problem}. Finished shards are kept: run the same command again"
    )


def read_rows(path: Path, column: str, reader: dict) -> Documents:
    """Like documents_of, for a file in any other format of `datasets`; the bytes in the file are
    not known.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it also raises
    try:
        for row in datasets.load_dataset(
            **reader, data_files=glob.escape(str(path)), split="train", streaming=True
        ):
            if not isinstance(text := row.get(column, 0), str | None):
                raise ValueError(
                    f"no text in the column {column!r} among {', '.join(row)}; choose with --text_column"
                )
            if text:
                yield text.encode("utf-8", errors="replace"), 0
    except Exception as error:  # each format has a library of its own, with errors of its own
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def shards_of(out: Path, i: int, n_files: int, shard_tokens: int) -> Shards:
    """The shards of file i. The first three digits of their number are i; more, if there are as
    many files.
    """
    digits = max(3, len(str(n_files - 1)))

    def path_of(split: str, n: int) -> Path:
        name = "val" if i == n == 0 else "train"
        return out / f"{out.name}_{name}_{i:0{digits}d}{n + (i > 0):03d}.bin"

    record = out / "progress" / f"{i:06d}.npz"
    return Shards(record, path_of, {"train": shard_tokens}, GPT2Tokenizer.end_of_text)


def tokenise_files(arguments: argparse.Namespace, out: Path, source: dict) -> None:
    """Turn this machine's files into shards, one after the other. The next one is downloaded
    meanwhile.
    """
    (part, parts), commit, files = arguments.part, source["commit"], source["files"]
    shards = {
        i: shards_of(out, i, len(files), arguments.shard_tokens)
        for i in range(part - 1, len(files), parts)
    }
    missing = [i for i in shards if not shards[i].complete]
    left = (arguments.max_tokens or sys.maxsize) - sum(
        shards[i].n_tokens for i in shards if i not in missing
    )
    with (
        tokenising("gpt2", arguments.workers or available_cpus()) as tokenise_all,
        progress_bar(sum(files[i]["size"] for i in shards), arguments.out) as bar,
        ThreadPool(1) as thread,  # a daemon: Ctrl-C does not wait for its download
    ):
        bar.update(sum(files[i]["size"] for i in shards if i not in missing))
        jobs = ((files[i], arguments, commit, out / "downloads" / str(i)) for i in missing)
        downloads = (thread.apply_async(fetch, job) for job in jobs)  # next() begins one
        coming = None
        for i in missing:
            if left == 0:
                break
            path = (coming or next(downloads)).get()
            coming = (
                None if arguments.max_tokens else next(downloads, None)
            )  # with a limit, it may not be needed
            bar.write(f"{files[i]['path']} ({i + 1} of {len(files)} files)", sys.stderr)
            column, own = arguments.text_column, path.name.endswith(TABLES)
            documents = (
                documents_of([path], column) if own else read_rows(path, column, source["reader"])
            )
            shards[i].fill(pieces_of(documents, progress=bar.update), tokenise_all, bar, left)
            bar.update(0 if own else files[i]["size"])
            left -= shards[i].n_tokens
            shutil.rmtree(out / "downloads" / str(i), ignore_errors=True)


def take_ready_made(
    arguments: argparse.Namespace, out: Path, commit: str, files: list[dict]
) -> list[dict]:
    """Download published shards to the folder, and check those that are there. Returns their rows
    of meta.json.
    """
    rows = []
    with progress_bar(sum(file["size"] for file in files), arguments.out) as bar:
        for file in files:
            path = out / file["path"].replace("/", "_")
            found = path if path.exists() else fetch(file, arguments, commit, out / "downloads")
            tokens = data.open_shard(found).tokens  # checks header and size
            row = dict(file=path.name, tokens=len(tokens), sha256=file["sha256"] or sha256(found))
            rows.append(
                row | dict(documents=int(np.count_nonzero(tokens == GPT2Tokenizer.end_of_text)))
            )
            del tokens  # Windows moves no file that is mapped
            os.replace(found, path)
            bar.update(file["size"])
    return rows


def finish(out: Path, source: dict, rows: list[dict]) -> str:
    """Complete the folder, whose shards are `rows`. Returns a summary for the terminal."""
    val = [row for row in rows if "_val_" in row["file"].removeprefix(out.name)]
    if len(val) == len(rows):
        n = sum(row["tokens"] for row in rows)
        raise ValueError(
            f"{out}: all {n:,} tokens are for validation; delete it, set --shard_tokens={max(1, n // 20)}"
        )
    shutil.rmtree(out / "downloads", ignore_errors=True)
    shards = {"train": [row for row in rows if row not in val], "val": val}
    documents = sum(row["documents"] for row in rows)
    return finish_folder(out, get_tokenizer("gpt2"), source, shards, documents)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    about = "A text dataset on the hub -> shards of GPT-2's tokens. HF_HOME, HF_TOKEN and HF_ENDPOINT are honoured."
    parser = argparse.ArgumentParser("fineweb.py", description=about)
    add = parser.add_argument
    add(
        "--dataset",
        metavar="ID",
        help=f"on the hub (default: {FINEWEB_EDU}; with --pretokenized: {PRETOKENIZED})",
    )
    add(
        "--name",
        help="subset of the dataset (default: sample-10BT of FineWeb-Edu; else the dataset's own default)",
    )
    add(
        "--out",
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
    arguments = parse_shared(parser, argv)

    # Check the options together, and fill in the defaults that depend on others.
    max_tokens, part = arguments.max_tokens, re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        parser.error(f"--part={arguments.part}: must be like 1/4, 2/4, 3/4 or 4/4")
    arguments.part = int(part[1]), int(part[2])
    if arguments.pretokenized:
        if arguments.name or arguments.keep_downloads or arguments.part[1] > 1:
            parser.error("--name, --part and --keep_downloads have no meaning with --pretokenized")
        arguments.max_tokens = 10_000_000_000 if max_tokens is None else max_tokens
    elif max_tokens is not None:
        if max_tokens < 2 or arguments.part[1] > 1:
            parser.error(f"--max_tokens={max_tokens}: must be at least 2, and excludes --part")
        if max_tokens <= arguments.shard_tokens:  # the first shard is for validation
            arguments.shard_tokens = max(1, max_tokens // 10)
    arguments.dataset = arguments.dataset or (
        PRETOKENIZED if arguments.pretokenized else FINEWEB_EDU
    )
    if arguments.dataset == FINEWEB_EDU and not arguments.name:
        arguments.name = "sample-10BT"
    subset = (arguments.name or "").removeprefix("sample-").removesuffix("T")
    words = (
        "fineweb edu 10B"
        if arguments.dataset == PRETOKENIZED
        else f"{Path(arguments.dataset).name} {subset}"
    )
    arguments.out = arguments.out or "shards/" + re.sub(r"[^\w.]+", "_", words.strip())
    return arguments


@command("fineweb.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out = Path(arguments.out).resolve()
    names = ["dataset", "max_tokens", "pretokenized"]
    names += [] if arguments.pretokenized else ["name", "text_column", "shard_tokens"]
    source, (part, parts) = {name: getattr(arguments, name) for name in names}, arguments.part
    with shard_folder(out, source, lambda: list_files(arguments), part, parts) as meta:
        if meta["complete"]:
            print(f"{arguments.out}: already made from {arguments.dataset}")
            return
        commit, files = meta["source"]["commit"], meta["source"]["files"]
        if arguments.pretokenized:
            rows = take_ready_made(arguments, out, commit, files)
            print(f"{arguments.out}: {finish(out, meta['source'], rows)}")
            return
        tokenise_files(arguments, out, meta["source"])
        # Parts that end together count one after the other, and the last one finishes the folder.
        with lock(out / ".lock") if parts > 1 else contextlib.nullcontext():
            finished = data.read_meta(out)[
                "complete"
            ]  # by another part, which has deleted the records
            shards = (
                shards_of(out, i, len(files), arguments.shard_tokens) for i in range(len(files))
            )
            done = [file_shards for file_shards in shards if file_shards.complete]
            rows, n = [row for s in done for row in s.rows["train"]], sum(s.n_tokens for s in done)
            if finished:
                summary = f"part {part} of {parts} is done; another part has finished the folder"
            elif len(done) < len(files) and n != arguments.max_tokens:
                summary = (
                    f"part {part} of {parts} is done; {len(done)} of {len(files)} files are there"
                )
            else:
                summary = finish(out, meta["source"], rows)
        print(f"{arguments.out}: {summary}")


if __name__ == "__main__":
    main()
