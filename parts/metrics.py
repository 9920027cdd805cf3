"""A run's records in metrics.jsonl, and the published figures that they are compared with."""

import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from parts import data
from parts.files import write_whole
from parts.runtime import Runtime
from parts.tokenizer import Tokenizer

PUBLISHED = {  # acc, acc_norm of OpenAI's weights on all 10,042 tasks, from Karpathy's build-nanogpt
    "completion": {"gpt2": (0.2859, 0.2955), "gpt2-xl": (0.3842, 0.4893)},
    "harness": {"gpt2": (0.2892, 0.3114), "gpt2-xl": (0.4004, 0.5089)},
}
GPT2_LOSS = 3.292  # OpenAI's 124M on the FineWeb-Edu validation set, from build-nanogpt
GPT3_HELLASWAG = 0.337  # acc_norm of GPT-3 124M, from the GPT-3 paper
# Validation loss of llm.c's GPT-2 124M on FineWeb: tokens seen (524,288 a step) and losses
LLMC_STEPS = np.array([250, 500, 1000, 2000, 4000, 8000, 12000, 16000, 19560])
LLMC_LOSSES = LLMC_STEPS * 524_288, (6.171, 5.374, 4.317, 3.859, 3.618, 3.443, 3.351, 3.288, 3.272)


# ---- Writing -------------------------------------------------------------------------------------


class Log(contextlib.ExitStack):
    """`log(kind, step, **values)`: on the main rank to metrics.jsonl and, if wanted, to W&B and
    TensorBoard.
    """

    def __init__(self, config, start_step: int, machine: Runtime):
        super().__init__()  # it closes what is entered here
        self.file = self.wandb = self.tensorboard = None
        if not machine.is_main:
            return
        out_dir = Path(config.out_dir)
        if config.wandb:
            import wandb

            id_file = out_dir / "wandb_id"  # a resumed run continues the same curve
            if start_step == 0 or not id_file.exists():
                id_file.write_text(os.urandom(4).hex())
            names = dict(project=config.wandb_project, name=out_dir.name, id=id_file.read_text())
            self.wandb = wandb.init(**names, resume="allow", config=vars(config))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first = start_step and start_step + 1
            self.tensorboard = self.enter_context(
                SummaryWriter(out_dir / "tensorboard", purge_step=first)
            )
        # Drop the records that a resumed run will write again, and a line that a kill cut short.
        path = out_dir / "metrics.jsonl"
        kept = [
            json.dumps(record) + "\n"
            for record in read_metrics(path)
            if updates(record) <= start_step
        ]
        write_whole(path, "".join(kept).encode())
        self.file = self.enter_context(open(path, "a", encoding="utf-8"))

    def __call__(self, kind: str, step: int, **values) -> None:
        if self.file:
            # JSON has no NaN and no infinity: they become null.
            finite = {
                n: None if isinstance(v, float) and not math.isfinite(v) else v
                for n, v in values.items()
            }
            print(json.dumps(dict(step=step, kind=kind) | finite), file=self.file, flush=True)
        numbers = {
            f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)
        }
        if self.wandb and numbers:
            self.wandb.log(numbers, step=step)
        for name, value in numbers.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)


def facts(
    config, machine: Runtime, model, compiled: bool, tokenizer: Tokenizer, n_tokens: int
) -> dict:
    """What is needed to understand or repeat a run: settings, command, machine, commit, versions,
    data.
    """
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    commit = (
        subprocess.run(git, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else None
    )
    launcher = (
        "python" if machine.world_size == 1 else f"torchrun --nproc_per_node={machine.local_size}"
    )
    meta = data.read_meta(config.data_dir)
    source = {
        name: value
        for name, value in meta.get("source", {}).items()
        if not isinstance(value, (dict, list))
    }
    return dict(
        settings=vars(config),
        parameters=model.num_params(),
        flops_per_token=model.flops_per_token(config.block_size),
        device=machine.device_name(),
        dtype=str(machine.dtype).removeprefix("torch."),
        command=f"{launcher} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        compiled=compiled,
        world_size=machine.world_size,
        job=os.environ.get("TORCHELASTIC_RUN_ID"),
        commit=commit,
        versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__),
        tokenizer=tokenizer.name,
        data=dict(train_tokens=n_tokens, documents=meta.get("documents"), source=source),
    )


# ---- Reading -------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl, without lines that a kill cut short; empty if there is no such
    file.
    """
    records = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    ):
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def of_kind(records: list[dict], kind: str, *names: str) -> list[dict]:
    """The records of this kind in which none of these values is missing or null (a NaN is logged as
    null).
    """
    return [
        r for r in records if r["kind"] == kind and all(r.get(name) is not None for name in names)
    ]


def updates(record: dict) -> int:
    """The updates before a record. `train` follows the update of its step, all others precede
    it.
    """
    return record["step"] + (record["kind"] == "train")


def tokens_seen(records: list[dict], n_updates):
    """Tokens after n_updates (an int or an array); --resume_anyway may have changed the batch on
    the way.
    """
    runs = of_kind(records, "run")
    # Steps before the first record, of another run, count with its batch.
    starts = [0, *(record["step"] for record in runs[1:]), math.inf]
    sizes = [record["settings"]["total_batch_size"] for record in runs]
    return sum(
        size * np.clip(n_updates - a, 0, b - a) for size, a, b in zip(sizes, starts, starts[1:])
    )


def evenly(items: list, n: int) -> list:
    """At most n of the items, evenly spaced, with the first and the last."""
    return (
        [items[i] for i in sorted({round(k * (len(items) - 1) / (n - 1)) for k in range(n)})]
        if items
        else []
    )
