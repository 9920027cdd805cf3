"""FineWeb-Edu, or any other text dataset on the Hugging Face hub -> token shards.

    python fineweb.py                                            the 10B-token sample, to shards/fineweb_edu_10B
    python fineweb.py --max_tokens 500_000_000                   the beginning of it
    python fineweb.py --pretokenized                             the same amount as ready-made shards: 20 GB
    python fineweb.py --dataset Skylion007/openwebtext --name plain_text
    python fineweb.py --part 3/8                                 on the third of eight machines with a shared disk

The dataset's files are downloaded one by one, tokenised on all CPUs, and deleted. Each file gets its own shards:
NAME_train_004007.bin is the seventh shard of file 4. So the bytes depend on the dataset only, not on the number of
processes, machines or interruptions. The first shard of all is for validation. After an interruption, run the same
command again: it continues.
"""

import argparse
import dataclasses
import itertools
import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import configurator
import data
import prepare

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = "karpathy/fineweb-edu-100B-gpt2-token-shards"


@dataclasses.dataclass(frozen=True)
class HubFile:
    path: str  # in the dataset's repository
    size: int  # bytes
    sha256: str | None  # None for small files, which the hub keeps in git


# ----------------------------------------------------------------------------------------------------------------------
# The hub


def list_files(arguments: argparse.Namespace) -> dict:
    """What meta.json records of the dataset: the commit of the revision, and the files to process, in order."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.hf_api import RepoFile

    dataset, api = arguments.dataset, HfApi()
    try:
        commit = api.dataset_info(dataset, revision=arguments.revision).sha
        tree = api.list_repo_tree(dataset, recursive=True, revision=commit, repo_type="dataset")
        files = [
            HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
        chosen = needed_shards if arguments.pretokenized else training_files
        files = chosen(arguments, commit, sorted(files, key=lambda file: file.path))
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"{dataset}: {' '.join(str(error).split())}") from None
    return dict(commit=commit, files=[dataclasses.asdict(file) for file in files])


def training_files(arguments: argparse.Namespace, commit: str, files: list[HubFile]) -> list[HubFile]:
    """The files of the subset's training split, which the `datasets` library finds from the dataset's card."""
    import datasets

    builder = datasets.load_dataset_builder(arguments.dataset, arguments.name, revision=commit)
    found = {path.partition(f"@{commit}/")[2] for path in (builder.config.data_files or {}).get("train", ())}
    chosen = [file for file in files if file.path in found]
    if not chosen or any(prepare.is_text(Path(file.path)) for file in chosen):
        raise ValueError(f"the training split of {arguments.name!r} is not in .parquet, .jsonl or .jsonl.gz files")
    return chosen


def needed_shards(arguments: argparse.Namespace, commit: str, files: list[HubFile]) -> list[HubFile]:
    """Ready-made shards with max_tokens tokens together: validation first."""
    files = [file for file in files if re.search(r"_(train|val)_\d+\.bin$", file.path)]
    if not any("_train_" in file.path for file in files):
        raise ValueError("no token shards there (..._train_000001.bin); without --pretokenized, text is read")
    if len({Path(file.path).name for file in files}) < len(files):
        raise ValueError("shards of the same name in several folders; download one folder with hf download")
    files.sort(key=lambda file: ("_val_" not in file.path, file.path))
    before = itertools.accumulate(((file.size - data.HEADER_BYTES) // 2 for file in files), initial=0)
    needed = [file for file, n in zip(files, before) if n < arguments.max_tokens]
    if "_train_" not in needed[-1].path:
        raise ValueError(f"--max_tokens={arguments.max_tokens}: validation alone has as many; ask for more")
    return needed


def fetch(file: HubFile, dataset: str, commit: str, folder: Path, cache: bool, keep: bool) -> Path:
    """The file on this disk, with the size and SHA-256 that the hub has. A failed download is repeated once.

    cache: take it from the hub's cache if it is there. keep: download to that cache, else to `folder`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    what = dict(repo_id=dataset, filename=file.path, repo_type="dataset", revision=commit)
    local_dir = None if keep or (cache and isinstance(try_to_load_from_cache(**what), str)) else folder
    for left_over in folder.rglob("*.incomplete"):  # of a killed run: hf_hub_download does not resume it
        left_over.unlink()
    for again in (False, True):
        try:
            path = Path(hf_hub_download(**what, local_dir=local_dir, force_download=again))
            if path.stat().st_size == file.size and file.sha256 in (None, data.sha256(path)):
                return path
            path.resolve().unlink()
            problem = "the download differs from the hub's file in size or SHA-256"
        except (HTTPError, OSError, RuntimeError) as error:  # hf_xet raises RuntimeError
            problem = " ".join(str(error).split())
    raise ValueError(f"{file.path}: {problem}. Finished shards are kept: run the same command again")


def fetch_ahead(numbers: list[int], fetch_one: Callable[[int], Path], ahead: bool) -> Iterator[Path]:
    """Each file in turn. With `ahead`, the next one is downloaded while this one is in use."""
    wanted, results = threading.Semaphore(int(ahead)), queue.SimpleQueue()

    def work():
        for number in numbers:
            wanted.acquire()
            try:
                results.put(fetch_one(number))
            except Exception as error:
                results.put(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon, so that Ctrl-C does not wait for a download
    for _ in numbers:
        wanted.release()
        result = results.get()
        if isinstance(result, Exception):
            raise result
        yield result


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fineweb.py",
        description="Turn a text dataset on the Hugging Face hub into shards of GPT-2's tokens. After an interruption, "
        "run the same command again: it continues. The variables HF_HOME, HF_TOKEN and HF_ENDPOINT are honoured.",
    )
    add = parser.add_argument
    add("--dataset", metavar="ID", help=f"on the hub (default: {FINEWEB_EDU}; with --pretokenized: {PRETOKENIZED})")
    add("--name", help="subset of the dataset (default: sample-10BT of FineWeb-Edu; else the dataset's own default)")
    add("--revision", default="main", help="branch, tag or commit of the dataset (default: %(default)s)")
    add("--out", metavar="FOLDER", help="folder for the shards (default: shards/fineweb_edu_10B, or after the dataset)")
    add(
        "--max_tokens", type=int, metavar="N", help="tokens, with validation (default: all; --pretokenized: 10 billion)"
    )
    add(
        "--part",
        default="1/1",
        metavar="I/N",
        help="do part I of N, on N machines with one --out (default: %(default)s)",
    )
    add("--keep_downloads", action="store_true", help="keep the dataset's files in the hub's cache (default: delete)")
    add("--pretokenized", action="store_true", help="download ready-made shards of GPT-2's tokens (default: make them)")
    arguments = prepare.parse_shared(parser, argv, "one per CPU")
    part = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        parser.error(f"--part={arguments.part}: must be like 1/4, 2/4, 3/4 or 4/4")
    arguments.part = int(part[1]), int(part[2])
    if arguments.pretokenized and (arguments.name or arguments.keep_downloads):
        parser.error("--name and --keep_downloads have no meaning with --pretokenized")
    add_defaults(arguments)
    if arguments.max_tokens is not None and not arguments.pretokenized:
        if arguments.max_tokens <= arguments.shard_tokens:
            parser.error(
                f"--max_tokens={arguments.max_tokens}: the first --shard_tokens={arguments.shard_tokens} are for "
                f"validation, and none is left for training; add --shard_tokens={max(1, arguments.max_tokens // 10)}"
            )
        if arguments.part[1] > 1:
            parser.error("--part and --max_tokens exclude each other: a machine does not know what the others have")
    return arguments


def add_defaults(arguments: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other options."""
    named = arguments.dataset
    if arguments.pretokenized:
        arguments.max_tokens = 10_000_000_000 if arguments.max_tokens is None else arguments.max_tokens
        names = [named] if named else [FINEWEB_EDU, "10B"]
        arguments.dataset = named or PRETOKENIZED
    else:
        arguments.dataset = named or FINEWEB_EDU
        if arguments.dataset == FINEWEB_EDU:
            arguments.name = arguments.name or "sample-10BT"
        names = [arguments.dataset, (arguments.name or "").removeprefix("sample-").removesuffix("T")]
    folder = "_".join(re.sub(r"[^\w.]+", "_", name.rpartition("/")[2]) for name in names if name)
    arguments.out = arguments.out or f"shards/{folder}"


def shards_of(out: Path, i: int, n_files: int, shard_tokens: int) -> prepare.Shards:
    """The shards of file i. The first three digits of their number are i; more, if there are as many files."""
    digits = max(3, len(str(n_files - 1)))

    def path_of(split: str, n: int) -> Path:
        name = "val" if i == n == 0 else "train"
        return out / f"{out.name}_{name}_{i:0{digits}d}{n + (i > 0):03d}.bin"

    end_of_text = data.GPT2Tokenizer.end_of_text
    return prepare.Shards(out / "progress" / f"{i:06d}.npz", path_of, {"train": shard_tokens}, end_of_text)


def take_shard(shards: prepare.Shards, path: Path, file: HubFile, out: Path) -> None:
    """Check a ready-made shard, and move it to the folder."""
    tokens = data.open_shard(path).tokens  # checks header and size
    if (largest := tokens.max(initial=0)) >= data.GPT2Tokenizer.vocab_size:
        raise ValueError(f"{file.path}: holds the token id {largest}; GPT-2's largest is 50256")
    documents = int(np.count_nonzero(tokens == shards.end_of_text))
    row = dict(file=path.name, tokens=len(tokens), sha256=file.sha256 or data.sha256(path), documents=documents)
    os.replace(path, out / path.name)
    shards.rows["train"], shards.n_tokens, shards.complete = [row], len(tokens), True
    shards.save()


def process_files(arguments: argparse.Namespace, out: Path, commit: str, files: list[HubFile]) -> None:
    """Turn this machine's files into shards, one after the other."""
    part, parts = arguments.part
    shards = {i: shards_of(out, i, len(files), arguments.shard_tokens) for i in range(part - 1, len(files), parts)}
    ready_made = arguments.pretokenized
    left = sys.maxsize if ready_made or arguments.max_tokens is None else arguments.max_tokens

    def fetch_one(i: int) -> Path:
        folder = out / "downloads" / f"{i:06d}"
        return fetch(files[i], arguments.dataset, commit, folder, not ready_made, arguments.keep_downloads)

    missing = [i for i in shards if not shards[i].complete]
    paths = fetch_ahead(missing, fetch_one, ahead=left == sys.maxsize)  # with a limit, the next may not be needed
    workers = 1 if ready_made else arguments.workers or prepare.available_cpus()
    with (
        prepare.tokenising("gpt2", workers) as tokenise_all,
        prepare.progress_bar(sum(files[i].size for i in shards), arguments.out) as bar,
    ):
        for i, file_shards in shards.items():
            if file_shards.complete or not left:
                bar.update(files[i].size)
            else:
                path = next(paths)
                bar.write(f"{files[i].path}, {files[i].size / 1e9:.2f} GB ({i + 1} of {len(files)} files)", sys.stderr)
                if ready_made:
                    take_shard(file_shards, path, files[i], out)
                    bar.update(files[i].size)
                else:
                    pieces = prepare.pieces_of([path], arguments.text_column)
                    file_shards.fill(pieces, tokenise_all, bar, left)
                shutil.rmtree(out / "downloads" / f"{i:06d}", ignore_errors=True)
            left -= file_shards.n_tokens


def shard_hub_dataset(arguments: argparse.Namespace) -> str:
    """Do what is missing of this machine's part; finish the folder if all parts are there. Returns a summary."""
    out = Path(arguments.out).resolve()
    names = ["dataset", "revision", "max_tokens", "pretokenized"]
    names += [] if arguments.pretokenized else ["name", "text_column", "shard_tokens"]
    source, (part, parts) = {name: getattr(arguments, name) for name in names}, arguments.part
    with prepare.shard_folder(out, source, lambda: list_files(arguments), part, parts) as meta:
        if meta["complete"]:
            return f"already made from {arguments.dataset}"
        files = [HubFile(**row) for row in meta["source"]["files"]]
        process_files(arguments, out, meta["source"]["commit"], files)
        shards = (shards_of(out, i, len(files), arguments.shard_tokens) for i in range(len(files)))
        done = [file_shards for file_shards in shards if file_shards.complete]
        rows, n = [row for s in done for row in s.rows["train"]], sum(s.n_tokens for s in done)
        if len(done) < len(files) and n != arguments.max_tokens:
            return f"part {part} of {parts} is done; {len(done)} of {len(files)} files are there"
        val = [row for row in rows if "_val_" in row["file"].removeprefix(out.name)]
        if len(val) == len(rows):
            raise ValueError(
                f"{arguments.out}: all {n:,} tokens are in the first shard, which is for validation; delete the folder "
                f"and run again with --shard_tokens={max(1, n // 20)}"
            )
        shutil.rmtree(out / "downloads", ignore_errors=True)
        shards = {"train": [row for row in rows if row not in val], "val": val}
        documents = sum(row["documents"] for row in rows)
        return prepare.finish_folder(out, data.get_tokenizer("gpt2"), meta["source"], shards, documents)


@configurator.command("fineweb.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    print(f"{arguments.out}: {shard_hub_dataset(arguments)}")


if __name__ == "__main__":
    main()
