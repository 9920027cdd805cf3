"""A run's records in metrics.jsonl, and the published figures that they are compared with."""

if __name__ == "__main__":
    raise SystemExit("parts/metrics.py is no command: README.md lists the commands")

import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from parts import data
from parts.files import check_is_file, write_whole
from parts.json_files import parse_json
from parts.runtime import Runtime
from parts.tokenizer import Tokenizer

import numpy as np
import torch

# HellaSwag acc and acc_norm of OpenAI's weights on all 10,042 tasks, as build-nanogpt reports them.
# The keys are the styles of hellaswag.py: "harness" is what EleutherAI's lm-evaluation-harness has.
PUBLISHED = {
    "completion": {"gpt2": (0.2859, 0.2955), "gpt2-xl": (0.3842, 0.4893)},
    "harness": {"gpt2": (0.2892, 0.3114), "gpt2-xl": (0.4004, 0.5089)},
}
# Loss of OpenAI's 124M on the FineWeb-Edu validation set, in nats a token, from build-nanogpt.
GPT2_LOSS = 3.292
# HellaSwag acc_norm of GPT-3 124M, from the GPT-3 paper (Brown et al. 2020).
GPT3_HELLASWAG = 0.337
# Validation loss of llm.c's GPT-2 124M on FineWeb after these steps of 524,288 tokens each.
LLMC_STEPS = np.array([250, 500, 1000, 2000, 4000, 8000, 12000, 16000, 19560])
LLMC_TOKENS = LLMC_STEPS * 524_288
LLMC_LOSSES = (6.171, 5.374, 4.317, 3.859, 3.618, 3.443, 3.351, 3.288, 3.272)


# ---- Writing -------------------------------------------------------------------------------------


class Log:
    """Writes the records of a run: `log(kind, step, **values)`.

    The main rank appends each record to metrics.jsonl as one line and, if the settings ask for it,
    sends the float values to Weights & Biases and TensorBoard. The other ranks write nothing.
    """

    def __init__(self, config, start_step: int, machine: Runtime):
        self.file = None
        self.failure: OSError | None = None  # that of the first record that could not be written
        self.wandb = None
        self.tensorboard = None
        if not machine.is_main:
            return
        out_dir = Path(config.out_dir)
        if config.wandb:
            import wandb

            # A resumed run continues the curve of the run with this id.
            id_file = out_dir / "wandb_id"
            if start_step == 0 or not id_file.exists():
                write_whole(id_file, os.urandom(4).hex().encode())
            self.wandb = wandb.init(
                project=config.wandb_project,
                name=out_dir.name,
                id=id_file.read_text(),
                resume="allow",
                config=vars(config),
            )
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Drop the points that a resumed run will write again.
            purge_step = start_step + 1 if start_step > 0 else 0
            self.tensorboard = SummaryWriter(out_dir / "tensorboard", purge_step=purge_step)
        path = out_dir / "metrics.jsonl"
        cut_back(path, start_step)
        self.file = open(path, "a", encoding="utf-8")

    def __call__(self, kind: str, step: int, **values) -> None:
        if self.file:
            record = dict(step=step, kind=kind)
            for name, value in values.items():
                # JSON has no NaN and no infinity: they become null.
                finite = not isinstance(value, float) or math.isfinite(value)
                record[name] = value if finite else None
            self.write(json.dumps(record) + "\n")
        numbers = {f"{kind}/{n}": value for n, value in values.items() if isinstance(value, float)}
        if self.wandb and numbers:
            self.wandb.log(numbers, step=step)
        if self.tensorboard:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, step)

    def write(self, line: str) -> None:
        """Append a line. A full disk is no exception here, so that the run can save first: it looks
        at `failure`.
        """
        assert self.file is not None
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            if self.failure is None:
                self.failure = OSError(error.errno, error.strerror, self.file.name)

    def close(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):  # it is in `failure`
                self.file.close()
        if self.tensorboard:
            self.tensorboard.close()


def cut_back(path: Path, start_step: int) -> None:
    """Drop the records of metrics.jsonl that a run resumed at start_step will write again, and
    lines that are no records, as a kill leaves one. Creates the file if there is none.
    """
    kept = []
    for line in read_lines(path):
        record = parse_record(line)
        if record is not None and updates_done(record) <= start_step:
            kept.append(line + "\n")
    write_whole(path, "".join(kept).encode())


def describe_run(
    config,
    machine: Runtime,
    model,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype,
    compiled: bool,
    train_tokens: int,
) -> dict:
    """The values of the record "run": what is needed to understand or to repeat a run.

    dtype is the precision of matrix products, train_tokens the number of tokens in the training
    shards.
    """
    meta = data.read_meta(config.data_dir)
    source = {}
    for name, value in meta.get("source", {}).items():
        if not isinstance(value, (dict, list)):
            source[name] = value
    return dict(
        settings=vars(config),
        parameters=model.num_params(),
        flops_per_token=model.flops_per_token(config.block_size),
        device=machine.device_name(),
        dtype=str(dtype).removeprefix("torch."),
        command=command_line(machine),
        compiled=compiled,
        world_size=machine.world_size,
        job=os.environ.get("TORCHELASTIC_RUN_ID"),
        commit=read_commit(),
        versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__),
        tokenizer=tokenizer.name,
        data=dict(train_tokens=train_tokens, documents=meta.get("documents"), source=source),
    )


def command_line(machine: Runtime) -> str:
    """The command that started this process, to be pasted."""
    launcher = "python"
    if machine.world_size > 1:
        launcher = f"torchrun --nproc_per_node={machine.local_size}"
    return f"{launcher} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def read_commit() -> str | None:
    """The commit of this code, ending in "-dirty" if files differ from it; "" if it is not in a git
    repository, None if there is no git.
    """
    if not shutil.which("git"):
        return None
    here = str(Path(__file__).parent)
    # --exclude keeps tags out of it, so that only the hash remains.
    describe = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


# ---- Reading -------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl; [] if there is no file.

    This is the one place that decides what a record is: see `parse_record`.
    """
    records = []
    for line in read_lines(path):
        record = parse_record(line)
        if record is not None:
            records.append(record)
    return records


def read_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    check_is_file(path)
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def parse_record(line: str) -> dict | None:
    """The record in a line of metrics.jsonl; None if it has none, as when a kill has cut it short.

    A record has a step and a kind, and one of the kind "run" has the batch size. A known value of
    another type than `Log` writes becomes None, which is what a NaN is logged as.
    """
    try:
        record = parse_json(line, allow_nan=True)
    except ValueError:
        return None
    kind = record.get("kind")
    if not isinstance(kind, str) or not is_count(record.get("step")):
        return None
    for name, is_right in KNOWN_VALUES.get(kind, {}).items():
        if name in record and not is_right(record[name]):
            record[name] = None
    if kind == "run":
        settings = record.get("settings") or {}
        if not is_count(settings.get("total_batch_size")):
            return None
    return record


def is_count(value) -> bool:
    # float64 holds every integer up to this one.
    return type(value) is int and 0 <= value <= 2**53


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def is_text(value) -> bool:
    return isinstance(value, str)


def is_style(value) -> bool:
    return isinstance(value, str) and value in PUBLISHED


def is_table(value) -> bool:
    return isinstance(value, dict)


# Kind of record -> the values that are read again, and what is right for them.
KNOWN_VALUES: dict[str, dict[str, Callable[[object], bool]]] = {
    "run": {
        "settings": is_table,
        "parameters": is_number,
        "flops_per_token": is_number,
        "device": is_text,
        "world_size": is_count,
        "command": is_text,
        "tokenizer": is_text,
        "data": is_table,
    },
    "train": {
        "loss": is_number,
        "lr": is_number,
        "grad_norm": is_number,
        "tokens_per_s": is_number,
        "mfu": is_number,
        "ms": is_number,
    },
    "val": {"loss": is_number, "val_bpb": is_number},
    "hellaswag": {"acc": is_number, "acc_norm": is_number, "style": is_style},
    "sample": {"text": is_text},
}


def select(records: list[dict], kind: str, *names: str) -> list[dict]:
    """The records of this kind in which none of the named values is missing or null.

    A NaN is logged as null.
    """
    selected = []
    for record in records:
        if record["kind"] == kind and all(record.get(name) is not None for name in names):
            selected.append(record)
    return selected


def published_score(record: dict) -> float:
    """The acc_norm of GPT-2 124M in the style of a HellaSwag record."""
    # The records of earlier versions name no style.
    style = record.get("style") or "completion"
    _, acc_norm = PUBLISHED[style]["gpt2"]
    return acc_norm


def updates_done(record: dict) -> int:
    """How many updates of the weights came before this record.

    A train record is written after the update of its step, every other kind before it.
    """
    if record["kind"] == "train":
        return record["step"] + 1
    return record["step"]


def tokens_seen(records: list[dict], n_updates):
    """The training tokens in the first n_updates updates (an int or an int array).

    The batch size is that of the run record in force, for --resume_anyway may have changed it.
    """
    runs = select(records, "run")
    # Steps before the first record belong to the run that this one continues; assume its batch.
    starts = [0, *(run["step"] for run in runs[1:])]
    ends = [*starts[1:], math.inf]
    tokens = 0
    for run, start, end in zip(runs, starts, ends):
        n_updates_of_run = np.clip(n_updates - start, 0, end - start)
        tokens = tokens + run["settings"]["total_batch_size"] * n_updates_of_run
    return tokens


def pick_evenly(items: list, n: int) -> list:
    """At most n of the items, evenly spaced, with the first and the last."""
    if len(items) <= n:
        return list(items)
    return [items[round(k * (len(items) - 1) / (n - 1))] for k in range(n)]
