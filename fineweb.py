"""FineWeb-Edu, or any other text dataset on the Hugging Face hub -> token shards.

    python fineweb.py                                            the 10B-token sample, to shards/fineweb_edu_10B
    python fineweb.py --max_tokens 500_000_000                   the beginning of it
    python fineweb.py --pretokenized                             the same amount, ready-made: 20 GB, nothing to compute
    python fineweb.py --dataset Skylion007/openwebtext --name plain_text
    python fineweb.py --part 3/8                                 on the third of eight machines that share a disk

The dataset's files are fetched one by one, tokenised on all CPUs, and removed. Each is cut into shards of its own:
NAME_train_004007.bin is the seventh shard of file 4. So the bytes depend on the dataset alone, not on how many
processes or machines made them, nor on how often they were stopped. The first shard of all is for validation.
Run again after an interruption, the same command goes on.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

import data
import prepare

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
PRETOKENIZED = "karpathy/fineweb-edu-100B-gpt2-token-shards"
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
WAITS = (5, 15, 45, 120)  # seconds before a new attempt; within each, the hub's client has tried several times itself


@dataclass(frozen=True)
class HubFile:
    path: str  # in the dataset's repository
    size: int  # bytes
    sha256: str | None  # None for the small files that the hub keeps in git


# ----------------------------------------------------------------------------------------------------------------------
# The hub, with patience


def patiently(what: str, attempt: Callable[[], object]) -> object:
    """attempt(), repeated after a while when it failed for a reason that may pass; else ValueError.

    What this machine got wrong, such as a full disk, is raised as it is: an OSError.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for wait in (*WAITS, None):
        try:
            return attempt()
        except (OSError, HTTPError, RuntimeError) as error:  # hf_xet, in Rust, knows RuntimeError only
            reason = " ".join(str(error).split()) or type(error).__name__
            if getattr(error, "errno", None) and not isinstance(error, ConnectionError | TimeoutError):
                raise
            if not may_pass(error):
                raise ValueError(f"{what}: {reason}") from None
            if wait is None:
                raise ValueError(f"{what}: {reason} What is done is kept: run the same command again") from None
            headers = error.response.headers if isinstance(error, HfHubHTTPError) and error.response else {}
            asked_for = headers.get("Retry-After", "")
            wait = max(wait, int(asked_for)) if asked_for.isdigit() else wait
            print(f"{what}: {reason[:200]} Trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def may_pass(error: Exception) -> bool:
    """Whether an error of the network or the hub may go away by itself."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        FileMetadataError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it was sought in the cache because of this one
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, EntryNotFoundError | OfflineModeIsEnabled | FileMetadataError)


def list_files(dataset: str, revision: str, choose: Callable[[object], list[str]]) -> tuple[str, list[HubFile]]:
    """The commit that the revision is now, and the files that choose(DatasetInfo) names, sorted."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    info = patiently(dataset, lambda: api.dataset_info(dataset, revision=revision))
    paths = set(choose(info))

    def tree(folder: str) -> list:
        return patiently(
            dataset, lambda: list(api.list_repo_tree(dataset, folder, revision=info.sha, repo_type="dataset"))
        )

    entries = [entry for folder in {path.rpartition("/")[0] for path in paths} for entry in tree(folder)]
    files = [
        HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
        for entry in entries
        if isinstance(entry, RepoFile) and entry.path in paths
    ]
    return info.sha, sorted(files, key=lambda file: file.path)


def choose_text(info, name: str | None) -> list[str]:
    """Paths of the training split of a dataset's subset: as its card says, or else what lies in the folder `name`."""
    paths = [s.rfilename for s in info.siblings if s.rfilename.endswith(SUFFIXES)]
    configs = (info.card_data.to_dict() if info.card_data else {}).get("configs") or []
    patterns = {config.get("config_name", "default"): training_patterns(config) for config in configs}
    if name is None:
        name = next(iter(patterns)) if len(patterns) == 1 else "default"
    if name in patterns:
        chosen = [path for path in paths if any(same_path(path, pattern) for pattern in patterns[name])]
    else:
        chosen = [path for path in paths if path.startswith(f"{name}/") or (name == "default" and not patterns)]
        named = [path for path in chosen if re.search(r"(?<![a-z])train(?![a-z])", path.removeprefix(name))]
        chosen = named or [
            path for path in chosen if not re.search(r"(?<![a-z])(test|valid(ation)?|dev)(?![a-z])", path)
        ]
    if not chosen:
        names = list(patterns) or sorted({path.rpartition("/")[0] for path in paths})
        known = f"choose --name: {', '.join(names[:12])}{' ...' * (len(names) > 12)}" if paths else "it has none at all"
        raise ValueError(f"{info.id}: no {', '.join(SUFFIXES)} files under the name {name!r}; {known}")
    return chosen


def training_patterns(config: dict) -> list[str]:
    """The globs of a subset's training split, from any of the forms that a dataset's card may have them in."""
    data_files = config.get("data_files")
    if data_files is None:
        return [f"{config.get('data_dir', '.')}/**".removeprefix("./")]
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    patterns = []
    for entry in data_files:
        if isinstance(entry, str):
            patterns.append(entry)
        elif entry.get("split", "train") == "train":
            patterns += [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
    return patterns


def same_path(path: str, pattern: str) -> bool:
    """Glob as the hub has it: only ** matches a slash, or nothing."""
    if "**" in pattern:
        return fnmatch(path, pattern) or fnmatch(path, pattern.replace("**/", ""))
    return fnmatch(path, pattern) and path.count("/") == pattern.count("/")


def choose_shards(info) -> list[str]:
    """Paths of all ready-made shards; which of them are needed is seen by their sizes."""
    paths = [s.rfilename for s in info.siblings if re.search(r"_(train|val)_\d+\.bin$", s.rfilename)]
    if not any("_train_" in path for path in paths):
        raise ValueError(
            f"{info.id}: no token shards there (..._train_000001.bin); without --pretokenized, text is read"
        )
    names = [path.rpartition("/")[2] for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{info.id}: has shards of the same name in several folders; fetch one folder with hf download"
        )
    return paths


def fetch(file: HubFile, dataset: str, commit: str, folder: Path | None, own: bool = False) -> Path:
    """The file on this disk, verified: from the hub's cache if it is there, else downloaded.

    folder: where to download to; None for the hub's cache. own: only in `folder`, to be moved from there.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    what = dict(repo_id=dataset, filename=file.path, repo_type="dataset", revision=commit)
    cached = try_to_load_from_cache(**what)
    if not own and isinstance(cached, str) and is_whole(Path(cached), file):
        return Path(cached)
    for stale in folder.rglob("*.incomplete") if folder else ():  # of a run that was killed: the client begins anew
        stale.unlink()

    def attempt() -> Path:
        path = Path(hf_hub_download(**what, local_dir=folder, force_download=isinstance(cached, str)))
        if not is_whole(path, file):
            path.resolve().unlink()
            raise OSError("what arrived differs from what the hub has, by size or SHA-256.")
        return path

    return patiently(file.path, attempt)


def is_whole(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    return file.sha256 is None or data.read_through(path)[0].hex() == file.sha256


def fetch_ahead(numbers: list[int], fetch_one: Callable[[int], Path], ahead: bool) -> Iterator[Path]:
    """Each of the files on this disk; the next one is downloaded while this one is in use."""

    def begin(number: int) -> Future:
        coming = Future()

        def work():
            try:
                coming.set_result(fetch_one(number))
            except BaseException as error:
                coming.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # a daemon, so that Ctrl-C need not wait for it
        return coming

    coming = None
    for number, following in itertools.zip_longest(numbers, numbers[1:]):
        path = (coming or begin(number)).result()
        coming = begin(following) if ahead and following is not None else None
        yield path


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fineweb.py",
        description="Turn a text dataset on the Hugging Face hub into shards of GPT-2's tokens. Run again after an "
        "interruption, the same command goes on. HF_HOME, HF_TOKEN and HF_ENDPOINT are honoured.",
    )
    tokens = functools.partial(parser.add_argument, type=int, metavar="N")
    parser.add_argument("--dataset", help=f"on the hub (default: {FINEWEB_EDU}; with --pretokenized: {PRETOKENIZED})")
    parser.add_argument(
        "--name", help="subset: sample-10BT (default), sample-100BT, sample-350BT, CC-MAIN-2024-10, default"
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the dataset (default: main)")
    parser.add_argument("--text_column", default="text", help="the column with the text (default: text)")
    parser.add_argument(
        "--out", help="folder for the shards (default: shards/fineweb_edu_10B, or as the dataset is named)"
    )
    tokens(
        "--max_tokens", help="stop after so many, validation included (default: all; with --pretokenized: 10 billion)"
    )
    tokens("--shard_tokens", default=100_000_000, help="tokens in a shard, 2 bytes each (default: 100_000_000)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise (default: one for each CPU)")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="do the I-th of N parts, on N machines at one --out"
    )
    parser.add_argument("--keep_downloads", action="store_true", help="leave the dataset's files in the hub's cache")
    parser.add_argument("--pretokenized", action="store_true", help="fetch ready-made shards of GPT-2's tokens instead")
    arguments = parser.parse_args(argv)
    prepare.check_amounts(parser, arguments)
    part = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        parser.error(f"--part={arguments.part}: it must be like 1/4, 2/4, 3/4 or 4/4")
    arguments.part = int(part[1]), int(part[2])
    complete_arguments(parser, arguments)
    return arguments


def complete_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Defaults that depend on other options, and options that exclude each other."""
    if arguments.pretokenized:
        if arguments.name or arguments.keep_downloads:
            parser.error("--name and --keep_downloads have no meaning with --pretokenized")
        arguments.max_tokens = 10_000_000_000 if arguments.max_tokens is None else arguments.max_tokens
        arguments.out = arguments.out or (
            f"shards/{folder_name(arguments.dataset)}" if arguments.dataset else "shards/fineweb_edu_10B"
        )
        arguments.dataset = arguments.dataset or PRETOKENIZED
    else:
        if arguments.dataset in (None, FINEWEB_EDU):
            arguments.dataset, arguments.name = FINEWEB_EDU, arguments.name or "sample-10BT"
        subset = (arguments.name or "").removeprefix("sample-").removesuffix("T")  # sample-10BT -> 10B
        arguments.out = arguments.out or "shards/" + "_".join(
            map(folder_name, filter(None, (arguments.dataset, subset)))
        )
        if arguments.max_tokens is not None and arguments.max_tokens <= arguments.shard_tokens:
            parser.error(
                f"--max_tokens={arguments.max_tokens}: the first --shard_tokens={arguments.shard_tokens} are for "
                f"validation, and none is left for training; add --shard_tokens={max(1, arguments.max_tokens // 10)}"
            )
        if arguments.max_tokens is not None and arguments.part[1] > 1:
            parser.error("--part and --max_tokens exclude each other: no machine knows how much the others have")


def folder_name(name: str) -> str:
    """HuggingFaceFW/fineweb-edu -> fineweb_edu."""
    return re.sub(r"[^\w.]+", "_", name.rpartition("/")[2])


@dataclass(frozen=True)
class Job:
    """What a run has to do: the files of the dataset, and which of them are this machine's part."""

    arguments: argparse.Namespace
    out: Path
    commit: str
    files: list[HubFile]

    @property
    def mine(self) -> range:
        part, parts = self.arguments.part
        return range(part - 1, len(self.files), parts)

    def record(self, i: int) -> dict:
        return prepare.Section.read(self.record_path(i), ())

    def record_path(self, i: int) -> Path:
        return self.out / "progress" / f"{i:06d}.json"

    def downloads(self, i: int) -> Path | None:
        return None if self.arguments.keep_downloads else self.out / "downloads" / f"{i:06d}"

    def fetched(self, numbers: list[int], ahead: bool, own: bool = False) -> Iterator[Path]:
        def fetch_one(i: int) -> Path:
            return fetch(self.files[i], self.arguments.dataset, self.commit, self.downloads(i), own)

        return fetch_ahead(numbers, fetch_one, ahead)

    def discard(self, i: int) -> None:
        """Remove what was downloaded; what lies in the hub's cache stays."""
        prepare.open_parquet.cache_clear()  # an open file would keep its place on the disk
        shutil.rmtree(self.out / "downloads" / f"{i:06d}", ignore_errors=True)


def tokenise_files(job: Job) -> None:
    """This machine's files, one after the other, into shards."""
    arguments, records = job.arguments, {i: job.record(i) for i in job.mine}
    missing = [i for i, record in records.items() if not record["complete"]]
    paths = job.fetched(missing, ahead=not arguments.max_tokens)  # where an end is set, the next may not be needed
    workers, left = arguments.workers or prepare.available_cpus(), arguments.max_tokens or sys.maxsize
    with (
        prepare.tokenising("gpt2", workers) as tokenise_all,
        prepare.Bar(sum(job.files[i].size for i in job.mine), arguments.out) as bar,
    ):
        for i, record in records.items():
            file = job.files[i]
            if record["complete"]:
                bar.skip(file.size, record["documents"], n_tokens(record))
            elif left:
                bar.say(f"{file.path}, {file.size / 1e9:.2f} GB ({i + 1} of {len(job.files)} files)")
                section = section_of(job, i)
                pieces = prepare.pieces_of([next(paths)], arguments.text_column)
                route = functools.partial(prepare.split_by_position, val_tokens=arguments.shard_tokens if i == 0 else 0)
                section.write(pieces, tokenise_all, route, bar, limit=left)
                record = section.record
                job.discard(i)
                bar.say(f"  {record['documents']:,} documents, {n_tokens(record):,} tokens")
            left -= n_tokens(record)


def section_of(job: Job, i: int) -> prepare.Section:
    """Where the shards of file i go. The first three digits of their number are i; more, if there are as many files."""
    file = f"{i:0{max(3, len(str(len(job.files) - 1)))}d}"
    path_of = {"train": lambda n: job.out / f"{job.out.name}_train_{file}{n + 1:03d}.bin"}
    if i == 0:
        path_of["val"] = lambda n: job.out / f"{job.out.name}_val_{file}{n:03d}.bin"
    return prepare.Section(job.record_path(i), path_of, dict.fromkeys(path_of, job.arguments.shard_tokens))


def n_tokens(record: dict) -> int:
    return sum(row["tokens"] for rows in record["shards"].values() for row in rows)


def take_shards(job: Job) -> None:
    """This machine's part of the ready-made shards, each checked before it gets its name."""
    missing = [i for i in job.mine if not job.record(i)["complete"]]
    with prepare.Bar(sum(job.files[i].size for i in job.mine), job.arguments.out) as bar:
        bar.skip(sum(job.files[i].size for i in job.mine if i not in missing), 0, 0)
        for i, path in zip(missing, job.fetched(missing, ahead=True, own=True)):
            tokens = data.open_shard(path).tokens  # header and size
            if (largest := tokens.max(initial=0)) >= data.GPT2Tokenizer.vocab_size:
                raise ValueError(f"{job.files[i].path}: holds the id {largest}, where GPT-2's end at 50256")
            documents = int(np.count_nonzero(tokens == data.GPT2Tokenizer.end_of_text))
            row = {
                "file": path.name,
                "tokens": len(tokens),
                "sha256": job.files[i].sha256 or data.read_through(path)[0].hex(),
            }
            os.replace(path, job.out / path.name)
            split = "val" if "_val_" in path.name else "train"
            data.write_json(job.record_path(i), dict(complete=True, documents=documents, shards={split: [row]}))
            bar.show(job.files[i].size, documents, len(tokens))


def needed_shards(files: list[HubFile], max_tokens: int) -> list[HubFile]:
    """Validation first, then as many for training as it takes."""
    files = sorted(files, key=lambda file: ("_val_" not in file.path, file.path))
    tokens_before = itertools.accumulate(((file.size - data.HEADER_BYTES) // 2 for file in files), initial=0)
    needed = [file for file, before in zip(files, tokens_before) if before < max_tokens]
    if not any("_train_" in file.path for file in needed):
        raise ValueError(f"--max_tokens={max_tokens}: the first shard, for validation, has as many; ask for more")
    return needed


def shard_hub_dataset(arguments: argparse.Namespace) -> None:
    """Do what is missing of this machine's part, and finish the folder if all parts are there."""
    out = Path(arguments.out).resolve()
    names = ["dataset", "revision", "max_tokens", "pretokenized"]
    names += [] if arguments.pretokenized else ["name", "text_column", "shard_tokens"]
    options = {name: getattr(arguments, name) for name in names}
    with prepare.prepared(out, options, alone=arguments.part[1] == 1) as meta:
        if meta["complete"]:
            print(f"{arguments.out}: already made from {arguments.dataset}")
        else:
            fill(out, arguments, meta)


def fill(out: Path, arguments: argparse.Namespace, meta: dict) -> None:
    source = meta["source"]
    if "files" not in source:  # the list of an earlier run stays: the dataset may have changed since
        if arguments.pretokenized:
            commit, files = list_files(arguments.dataset, arguments.revision, choose_shards)
            files = needed_shards(files, arguments.max_tokens)
        else:
            choose = functools.partial(choose_text, name=arguments.name)
            commit, files = list_files(arguments.dataset, arguments.revision, choose)
        source |= dict(commit=commit, files=[dataclasses.asdict(file) for file in files])
        data.write_json(out / "meta.json", meta)
    job = Job(arguments, out, source["commit"], [HubFile(**row) for row in source["files"]])
    take_shards(job) if arguments.pretokenized else tokenise_files(job)
    finish(job, source)


def finish(job: Job, source: dict) -> None:
    """Write the last meta.json if all files are done, or all that --max_tokens asks for; say how things stand."""
    done = [record for record in map(job.record, range(len(job.files))) if record["complete"]]
    reached = sum(map(n_tokens, done)) == job.arguments.max_tokens
    if len(done) < len(job.files) and not reached:
        part, parts = job.arguments.part
        print(f"{job.arguments.out}: part {part} of {parts} is done; {len(done)} of {len(job.files)} files are there")
        return
    if not any(record["shards"].get("train") for record in done):
        n = sum(map(n_tokens, done))
        raise ValueError(
            f"{job.arguments.out}: all {n:,} tokens are in the first shard, which is for validation; delete the folder "
            f"and run again with --shard_tokens={max(1, n // 20)}"
        )
    meta = prepare.finish_folder(job.out, data.get_tokenizer("gpt2"), source, done)
    shutil.rmtree(job.out / "downloads", ignore_errors=True)
    print(
        f"{job.arguments.out}: {meta['documents']:,} documents, {meta['tokens']['train']:,} training and "
        f"{meta['tokens']['val']:,} validation tokens (gpt2)"
    )


def main(argv: list[str] | None = None) -> None:
    try:
        shard_hub_dataset(parse_arguments(argv))
    except (ValueError, OSError) as error:
        print(f"fineweb.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fineweb.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
