"""What a run keeps and shows: its folder, metrics.jsonl, the console, the profiler, and the signals that stop it."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import data
import report
from pretrained import checkpoints
from runtime import Runtime

# What a run writes into its folder; no other file there is ever moved.
OURS = re.compile(
    r"step_\d+|metrics\.jsonl|(wandb_id|tensorboard|report\.md|(loss|training)\.(svg|png)|profile\.txt|trace\.json)$"
)

# A loss is a spike when it is this many standard deviations above the mean of the last SPIKE_WINDOW losses.
SPIKE, SPIKE_WINDOW = 6, 100


# ----------------------------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def held(out_dir: Path) -> Iterator[None]:
    """Lock out_dir against other runs; the lock of a killed process is free. An out_dir that stays empty is removed.

    Raises ValueError if another run holds it or if it cannot be written.
    """
    made = not out_dir.exists()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = data.lock(out_dir / ".lock", f"out_dir {out_dir}: another run is writing to it; wait for it, or stop it")
        lock.__enter__()
    except OSError as error:
        raise ValueError(f"out_dir {out_dir} cannot be written ({error.strerror}); choose another --out_dir") from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
        if made and not [path for path in out_dir.iterdir() if path.name != ".lock"]:
            shutil.rmtree(out_dir)


def make_room(out_dir: Path, found: Path | None, start_step: int) -> None:
    """Prepare out_dir for a run that continues from the checkpoint `found`: what came later moves to a folder beside.

    Without one, or with one of another run, all files of a run move there. Leftovers of killed runs are deleted: their
    names begin with a dot.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    continues = found is not None and found.resolve().parent == out_dir.resolve()
    if continues:
        moved = [folder for folder in checkpoints(out_dir) if int(folder.name.removeprefix("step_")) > start_step]
    else:
        moved = [path for path in out_dir.iterdir() if OURS.match(path.name)]
    if not moved:
        return
    aside = free_name(out_dir, "old")
    aside.mkdir()
    if continues:
        shutil.copy(out_dir / "metrics.jsonl", aside)
    for path in moved:
        path.rename(aside / path.name)
    print(f"files of the earlier run are moved to {aside}")


def free_name(path: Path, word: str) -> Path:
    """The path with .old1, .old2, ... appended (for the word "old"): the first name that is free."""
    path = path.resolve()
    return next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{word}{n}")).exists())


# ----------------------------------------------------------------------------------------------------------------------
# The log


class Log:
    """`log(kind, step, **values)`: on the main rank to metrics.jsonl and, if wanted, to W&B and TensorBoard."""

    def __init__(self, config, start_step: int, machine: Runtime):
        self.file = self.wandb = self.tensorboard = None
        if not machine.is_main:
            return
        out_dir = Path(config.out_dir)
        try:
            if config.wandb:
                import wandb

                id_file = out_dir / "wandb_id"  # a resumed run continues the same curve
                if start_step == 0 or not id_file.exists():
                    id_file.write_text(uuid.uuid4().hex[:8])
                names = dict(project=config.wandb_project, name=out_dir.name, id=id_file.read_text())
                self.wandb = wandb.init(**names, resume="allow", config=dataclasses.asdict(config))
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(out_dir / "tensorboard", purge_step=start_step and start_step + 1)
        except ImportError as error:
            package = "wandb" if "wandb" in str(error) else "tensorboard"
            raise ValueError(f"{package}=True needs a package that is not installed: pip install {package}") from None
        cut_metrics(out_dir / "metrics.jsonl", start_step)
        self.file = open(out_dir / "metrics.jsonl", "a", encoding="utf-8")

    def __call__(self, kind: str, step: int, **values) -> None:
        if self.file:
            # JSON has no NaN and no infinity: they become null.
            finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
            print(json.dumps(dict(step=step, kind=kind) | finite), file=self.file, flush=True)
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)}
        if self.wandb and numbers:
            self.wandb.log(numbers, step=step)
        for name, value in numbers.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        for writer in (self.file, self.tensorboard):
            if writer:
                writer.close()
        if self.wandb:
            self.wandb.finish()


def cut_metrics(path: Path, step: int) -> None:
    """Drop the records that a run resumed at `step` will write again, and a line that a kill cut short."""
    # The checkpoint's own step was evaluated before it was saved; only its update is still to come.
    kept = [
        record
        for record in report.read_metrics(path)
        if record["step"] < step or (record["step"] == step and record["kind"] not in ("train", "note"))
    ]
    data.write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def spike(loss: float, recent) -> str:
    """A sentence if the loss is far above the recent ones; empty if it is not, or if there are few."""
    recent = [value for value in recent if math.isfinite(value)]
    if len(recent) < SPIKE_WINDOW // 2 or not loss > statistics.mean(recent) + SPIKE * statistics.pstdev(recent):
        return ""
    return f"the loss jumped to {loss:.4f} from about {statistics.mean(recent):.4f}"


def facts(config, machine: Runtime, model, compiled: bool, tokenizer: data.Tokenizer, n_tokens: int) -> dict:
    """What is needed to understand or repeat a run: settings, command, machine, commit, versions, data."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    launcher = "python" if machine.world_size == 1 else f"torchrun --nproc_per_node={machine.local_size}"
    meta = data.read_meta(config.data_dir)
    source = {name: value for name, value in meta.get("source", {}).items() if not isinstance(value, (dict, list))}
    return dict(
        settings=dataclasses.asdict(config),
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


def profiler(out_dir: Path, steps: int, machine: Runtime) -> contextlib.AbstractContextManager:
    """torch's profiler for `steps` steps after two of warm-up, on the main rank; nothing for 0 steps.

    It writes profile.txt (operators by time) and trace.json (for ui.perfetto.dev) into out_dir.
    """
    if not (steps and machine.is_main):
        return contextlib.nullcontext()

    def write(profile: torch.profiler.profile) -> None:
        order = f"self_{'device' if machine.device.type == 'cuda' else 'cpu'}_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=50)
        (out_dir / "profile.txt").write_text(table)
        profile.export_chrome_trace(str(out_dir / "trace.json"))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


# ----------------------------------------------------------------------------------------------------------------------
# The console


class Console:
    """A progress bar on a terminal, plain lines in a file, nothing on ranks above 0."""

    def __init__(self, max_steps: int, start_step: int, log_every: int, is_main: bool):
        from tqdm import tqdm

        self.max_steps, self.is_main = max_steps, is_main
        self.on_terminal = is_main and sys.stdout.isatty() and log_every > 0
        self.latest, self.scores = [], {}  # what the bar shows: the last step, and the last value of each evaluation
        form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        hidden = not self.on_terminal
        self.bar = tqdm(total=max_steps, initial=start_step, bar_format=form, dynamic_ncols=True, disable=hidden)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def line(self, text: str) -> None:
        if self.is_main:
            try:
                self.bar.write(text) if self.on_terminal else print(text, flush=True)
            except BrokenPipeError:  # the reader of a pipe is gone, but a checkpoint may still have to be saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def score(self, step: int, name: str, value: float, more: str = "") -> None:
        """Show the result of an evaluation as a line, and from then on in the bar."""
        self.scores[name] = f"{name} {value:.4f}"
        self.bar.set_postfix_str(" | ".join([*self.latest, *self.scores.values()]), refresh=False)
        self.line(f"step {step:,} | {self.scores[name]}{more}")

    def step(self, step: int, record: dict) -> None:
        """Show one training record (the dict that goes to metrics.jsonl)."""
        speed = f"{record['tokens_per_s']:,.0f} tok/s" + (f" | mfu {record['mfu']:.1%}" if record["mfu"] else "")
        self.latest = [f"loss {record['loss']:.4f}", speed]
        self.bar.set_postfix_str(" | ".join([*self.latest, *self.scores.values()]), refresh=False)
        if not self.on_terminal:
            minutes_left = (self.max_steps - 1 - step) * record["ms"] / 60_000
            self.line(
                f"step {step:,}/{self.max_steps:,} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | norm "
                f"{record['grad_norm']:.2f} | {record['ms']:,.0f} ms | {speed} | {minutes_left:.1f} min left"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Signals


class StopSignal:
    """While in use, a first signal asks the run to stop after its step; a second Ctrl-C stops it at once.

    SIGINT is Ctrl-C, SIGTERM comes from torchrun and most systems, SIGUSR1 from SLURM before the time limit.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self.received = 0  # the signal's number

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in self.NUMBERS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.is_main:
            # os.write, not print: the signal may have interrupted a print, and the reader may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, then saving; Ctrl-C again stops at once, unsaved\n")
