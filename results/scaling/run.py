"""Make the runs of the scaling study that are missing, one after another.

    python results/scaling/run.py BOOKS...   # makes the shards first, where they are missing
    python results/scaling/run.py --list     # which runs there are, done and missing
    python results/scaling/run.py --collect  # brings what is new into results/scaling/runs.jsonl

Killed at any time, the same command goes on: train.py resumes the run that was under way. A run
that is over has a line in out/scaling/runs.jsonl, so that the working tree stays clean and each
line tells the commit that it was made with. Two of it at a time share the runs.
"""

import fcntl
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from grid import BLOCK_SIZE, CODE, CODE_PACKAGES, PIECE, VOCABULARIES, Run, all_runs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from parts import dial  # noqa: E402
from parts.data import TokenWindows, open_shards, read_meta, tokenizer_of_shards, write_shard  # noqa: E402

COLLECTED = HERE / "runs.jsonl"
NEW = ROOT / "out" / "scaling" / "runs.jsonl"


def read_records() -> dict[str, dict]:
    """The runs that are over, by name."""
    records = {}
    for file in (COLLECTED, NEW):
        if file.exists():
            for line in file.read_text().splitlines():
                record = json.loads(line)
                records[record["name"]] = record
    return records


def list_runs() -> None:
    records = read_records()
    for run in all_runs():
        loss = ""
        if run.name in records:
            loss = f"{records[run.name]['validations'][-1][1]:.4f}"
        print(f"{run.name:60} {run.steps:6,} steps  {loss}")


def collect() -> None:
    lines = [json.dumps(record) + "\n" for record in read_records().values()]
    COLLECTED.write_text("".join(lines))
    shutil.copy(NEW.parent / "texts.json", HERE)
    print(f"{len(lines)} runs in {COLLECTED}")


def make_shards(texts: list[str]) -> None:
    """Those missing: the books as GPT-2's tokens and as 4,096 learned ones, and the code."""
    for name, rows in VOCABULARIES.items():
        if (ROOT / "shards" / name / "meta.json").exists():
            continue
        if name == CODE:
            arguments = code_arguments()
        elif texts:
            arguments = texts
        else:
            sys.exit(f"shards/{name} is missing: name the books' files, and they are made")
        tokenizer = str(rows) if name.endswith(str(rows)) else "gpt2"
        command = ["prepare.py", *arguments, "--out", f"shards/{name}", "--tokenizer", tokenizer]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def code_arguments() -> list[str]:
    """Where prepare.py finds the Python sources of the packages, without their tests."""
    folders = []
    for package in CODE_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            sys.exit(f"shards/{CODE} is missing, and so is {package}: pip install {package}")
        folders += spec.submodule_search_locations
    return [*folders, "--glob", "*.py", "--exclude", "test", "--exclude", "tests"]


def study_texts() -> None:
    """What the law's text is to parts/dial.py, for fit.py."""
    facts = {}
    for name in VOCABULARIES:
        folder = ROOT / "shards" / name
        tokenizer = tokenizer_of_shards(folder)
        text = dial.study_text(str(folder), tokenizer)
        windows = TokenWindows(open_shards(folder, "train"), BLOCK_SIZE, tokenizer.vocab_size)
        xz_bits = {}
        for size in dial.LAW_XZ_BITS:
            tokens = round(size / text.bytes_per_token) + BLOCK_SIZE  # enough, and then cut
            content = dial.sample_text(windows, tokenizer, tokens)
            xz_bits[size] = dial.xz_bits(content[:size])
        facts[name] = dict(bytes_per_token=text.bytes_per_token, xz_bits=xz_bits)
    (NEW.parent / "texts.json").write_text(json.dumps(facts, indent=1) + "\n")


def cut_shards(run: Run) -> None:
    """A part of the books as a folder of its own, with the same validation text."""
    source = ROOT / "shards" / run.vocabulary
    folder = ROOT / run.data_dir
    if (folder / "meta.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    [whole] = open_shards(source, "train")
    tokens = whole.tokens[: run.epoch_tokens + 1]
    if run.in_pieces:
        tokens = spread_pieces(whole.tokens, run.epoch_tokens)
    row = write_shard(folder / "books_train_000001.bin", tokens)
    for file in [*source.glob("*_val_*.bin"), source / "tokenizer.json"]:
        if file.exists():
            shutil.copy(file, folder)
    meta = read_meta(source)
    meta["shards"]["train"] = [row]
    meta["tokens"]["train"] = row["tokens"]
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def spread_pieces(tokens: np.ndarray, wanted: int) -> np.ndarray:
    """Pieces of the text with as many tokens together, and one more, equally far apart."""
    n_pieces = math.ceil((wanted + 1) / PIECE)
    starts = np.linspace(0, len(tokens) - PIECE, n_pieces).astype(int)
    pieces = [tokens[start : start + PIECE] for start in starts]
    return np.concatenate(pieces)[: wanted + 1]


def summarise(run: Run, metrics: Path) -> dict:
    """A run's line for runs.jsonl: its shape, its validations and ten of its training losses."""
    validations = []
    losses = []
    milliseconds = 0.0
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "run":
            start = record
        elif record["kind"] == "val":
            validations.append([record["step"], record["loss"], record["val_bpb"]])
        elif record["kind"] == "train":
            losses.append([record["step"], round(record["loss"], 4)])
            milliseconds += record["ms"]
    settings = start["settings"]
    every = max(1, len(losses) // 10)
    return dict(
        name=run.name,
        vocabulary=run.vocabulary,
        n_layer=settings["n_layer"],
        n_head=settings["n_head"],
        n_embd=settings["n_embd"],
        optimizer=settings["optimizer"],
        learning_rate=settings["learning_rate"],
        muon_learning_rate=run.muon_learning_rate or None,
        beta2=settings["beta2"],
        seed=settings["seed"],
        epochs=run.epochs,
        in_pieces=run.in_pieces,
        budget=run.flops,
        steps=settings["max_steps"],
        tokens=settings["max_steps"] * settings["total_batch_size"],
        block_parameters=run.size.block_parameters,
        embedding_rows=VOCABULARIES[run.vocabulary],
        flops_per_token=start["flops_per_token"],
        validations=validations,
        training=losses[::every],
        mean_ms=round(milliseconds / len(losses), 1),
        dtype=start["dtype"],
        device=start["device"],
        commit=start["commit"],
        torch=start["versions"]["torch"],
    )


@contextmanager
def claim(run: Run) -> Iterator[bool]:
    """Whether the run is ours to make: no other process, of this machine, is making it."""
    NEW.parent.mkdir(parents=True, exist_ok=True)
    with (NEW.parent / f"{run.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield run.name not in read_records()


def make(run: Run) -> None:
    """Train, and add the run's line."""
    if run.epochs > 1:
        cut_shards(run)
    command = [sys.executable, "train.py", *run.arguments()]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    record = summarise(run, ROOT / "out" / "scaling" / run.name / "metrics.jsonl")
    with NEW.open("a") as file:
        file.write(json.dumps(record) + "\n")


def main() -> None:
    texts = sys.argv[1:]
    if texts == ["--list"]:
        return list_runs()
    if texts == ["--collect"]:
        return collect()
    make_shards(texts)
    study_texts()
    for run in all_runs():
        with claim(run) as ours:
            if ours:
                make(run)


if __name__ == "__main__":
    main()
