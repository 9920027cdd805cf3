"""What a run keeps and shows: its folder, metrics.jsonl, report.md and model cards, the console, and signals."""

import contextlib
import datetime
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import fill, indent

import numpy as np
import torch

import data
from hellaswag import PUBLISHED
from pretrained import checkpoints
from runtime import Runtime

# What a run writes into its folder; no other file there is ever moved.
OURS = "step_* metrics.jsonl* wandb_id tensorboard report.md loss.[sp]?g training.[sp]?g profile.txt trace.json"


def make_room(out_dir: Path, found: Path | None, start_step: int) -> None:
    """Move the checkpoints later than `found` into a new folder beside out_dir, and delete leftovers of killed runs.

    Without `found`, or if it is another run's, all that a run has written here moves.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    continues = found is not None and found.resolve().parent == out_dir.resolve()
    if continues:
        moved = [folder for folder in checkpoints(out_dir) if int(folder.name.removeprefix("step_")) > start_step]
    else:
        moved = [path for pattern in OURS.split() for path in out_dir.glob(pattern)]
    if moved:
        aside = next(p for n in itertools.count(1) if not (p := Path(f"{out_dir.resolve()}.old{n}")).exists())
        aside.mkdir()
        if continues:
            shutil.copy(out_dir / "metrics.jsonl", aside)
        for path in moved:
            path.rename(aside / path.name)
        print(f"files of the earlier run are moved to {aside}")


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


class Log(contextlib.ExitStack):
    """`log(kind, step, **values)`: on the main rank to metrics.jsonl and, if wanted, to W&B and TensorBoard."""

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
            self.tensorboard = self.enter_context(SummaryWriter(out_dir / "tensorboard", purge_step=first))
        # Drop the records that a resumed run will write again, and a line that a kill cut short.
        path = out_dir / "metrics.jsonl"
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if updates(record) <= start_step]
        data.write_whole(path, "".join(kept).encode())
        self.file = self.enter_context(open(path, "a", encoding="utf-8"))

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


def facts(config, machine: Runtime, model, compiled: bool, tokenizer: data.Tokenizer, n_tokens: int) -> dict:
    """What is needed to understand or repeat a run: settings, command, machine, commit, versions, data."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else None
    launcher = "python" if machine.world_size == 1 else f"torchrun --nproc_per_node={machine.local_size}"
    meta = data.read_meta(config.data_dir)
    source = {name: value for name, value in meta.get("source", {}).items() if not isinstance(value, (dict, list))}
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


def profiler(out_dir: Path, steps: int, machine: Runtime) -> contextlib.AbstractContextManager:
    """On the main rank, after two steps of warm-up: profile.txt (operators by time), trace.json (ui.perfetto.dev)."""
    if not (steps and machine.is_main):
        return contextlib.nullcontext()

    def write(profile: torch.profiler.profile) -> None:
        order = f"self_{'device' if machine.device.type == 'cuda' else 'cpu'}_time_total"
        (out_dir / "profile.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=30))
        profile.export_chrome_trace(str(out_dir / "trace.json"))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl, without lines that a kill cut short; empty if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def of_kind(records: list[dict], kind: str, *names: str) -> list[dict]:
    """The records of this kind in which none of these values is missing or null (a NaN is logged as null)."""
    return [r for r in records if r["kind"] == kind and all(r.get(name) is not None for name in names)]


def updates(record: dict) -> int:
    """The updates before a record. `train` follows the update of its step, all others precede it."""
    return record["step"] + (record["kind"] == "train")


def tokens_seen(records: list[dict], n_updates):
    """Tokens after n_updates (an int or an array); --resume_anyway may have changed the batch on the way."""
    runs = of_kind(records, "run")
    # Steps before the first record, of another run, count with its batch.
    starts = [0, *(record["step"] for record in runs[1:]), math.inf]
    sizes = [record["settings"]["total_batch_size"] for record in runs]
    return sum(size * np.clip(n_updates - a, 0, b - a) for size, a, b in zip(sizes, starts, starts[1:]))


# ---- report.md and model cards ---------------------------------------------------------------------------------------


def report(folder: Path) -> Path:
    """Write report.md into a run's folder, with the pictures that exist there; return its path."""
    records, path = read_metrics(folder / "metrics.jsonl"), folder / "report.md"
    shown = "\n".join(f"\n![{name}]({name}.svg)" for name in ("loss", "training") if (folder / f"{name}.svg").exists())
    text = sections(folder.resolve().name, records, max(map(updates, records)), shown)
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def card(folder: Path, step: int) -> str:
    """The README.md of a run's checkpoint of this step: the report up to there, below the header that the hub reads."""
    from huggingface_hub import ModelCardData

    records = [record for record in read_metrics(folder / "metrics.jsonl") if updates(record) <= step]
    started, name = of_kind(records, "run")[-1], folder.resolve().name
    origin, dataset = started["settings"]["init_from"], started["data"]["source"].get("dataset")
    facts = dict(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"])
    facts["datasets"] = [dataset] if dataset else None
    facts["base_model"] = f"openai-community/{origin}" if origin.startswith("gpt2") else None
    use = f'transformers.pipeline("text-generation", model=".")({started["settings"]["sample_prompt"]!r})'
    body = sections(name, records, step, f"\nIn Python, in this folder:\n\n    {use}")
    return f"---\n{ModelCardData(**facts).to_yaml()}\n---\n\n{body}"


def sections(name: str, records: list[dict], n_steps: int, more: str) -> str:
    """A run's results after n_steps in Markdown, with `more` below the table."""
    started = of_kind(records, "run")[-1]
    table = [("", ""), ("---", "---"), *results(records, n_steps).items()]
    lines = [f"# {name}", "", *(f"| {left} | {right} |" for left, right in table), more]
    for title, kind, key in (("Validation loss", "val", "loss"), ("HellaSwag, acc_norm", "hellaswag", "acc_norm")):
        if scored := of_kind(records, kind, key):
            lines += ["", f"## {title}", ""]
            lines += [f"* step {record['step']:,}: {record[key]:.4f}" for record in evenly(scored, 12)]
    # Indented text is shown as it is: unlike a fence, nothing in it can end the block.
    for record in evenly(of_kind(records, "sample"), 4):
        lines += ["", f"## Sample after {record['step']:,} steps", "", indent(data.printable(record["text"]), " " * 4)]
    lines += ["", "## Reproduce", "", indent(started["command"], " " * 4), ""]
    lines += ["<details><summary>Machine, versions, data and all settings</summary>", ""]
    return "\n".join([*lines, indent(json.dumps(started, indent=2), " " * 4), "", "</details>", ""])


def results(records: list[dict], n_steps: int) -> dict[str, str]:
    """The rows of the table of results after n_steps."""
    started, tokens = of_kind(records, "run")[-1], int(tokens_seen(records, n_steps))
    settings = started["settings"]
    rows = {name: f"`{settings[name]}`" for name in ("data_dir", "init_from")}
    rows |= {"parameters": f"{started['parameters']:,}", "steps": f"{n_steps:,} of {settings['max_steps']:,}"}
    rows |= {"tokens": f"{tokens:,}", "compute": f"{started['flops_per_token'] * tokens:.3g} FLOPs"}
    if train := of_kind(records, "train", "loss"):
        rows["training loss"] = f"{train[-1]['loss']:.4f} (step {train[-1]['step']:,})"
        # ms is the mean of the steps since the record before.
        n_timed = np.diff([record["step"] for record in train], prepend=records[0]["step"] - 1)
        time = datetime.timedelta(seconds=round(n_timed @ [record["ms"] / 1000 for record in train]))
        device = started["device"].removeprefix("cuda:0, ")
        rows["training time (h:mm:ss)"] = f"{time} on {started['world_size']} x {device}"
        rows["tokens/s (median)"] = f"{np.median([record['tokens_per_s'] for record in train]):,.0f}"
    if val := of_kind(records, "val", "loss"):
        best = min(val, key=lambda record: record["loss"])
        rows["validation loss"] = f"{val[-1]['loss']:.4f} (best: {best['loss']:.4f} at step {best['step']:,})"
    if val := of_kind(records, "val", "val_bpb"):
        rows["validation, bits a byte"] = f"{val[-1]['val_bpb']:.4f} ({started['tokenizer']})"
    if scores := of_kind(records, "hellaswag"):
        _, published = PUBLISHED[scores[-1].get("style", "completion")]["gpt2"]
        rows["HellaSwag (acc_norm)"] = f"{scores[-1]['acc_norm']:.4f} (GPT-2 124M: {published})"
    if mfu := [record["mfu"] for record in of_kind(records, "train", "mfu")]:
        rows["MFU (median)"] = f"{np.median(mfu):.1%}"
    return rows


def evenly(items: list, n: int) -> list:
    """At most n of the items, evenly spaced, with the first and the last."""
    return [items[i] for i in sorted({round(k * (len(items) - 1) / (n - 1)) for k in range(n)})] if items else []


# ---- Console and signals ---------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print lines; a terminal gets them broken at words, with an indent."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    style = dict(subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(*(fill(line, width, **style) for line in text.splitlines()), sep="\n", flush=True)


class Console(contextlib.AbstractContextManager):
    """A progress bar on a terminal, plain lines in a file, nothing on ranks above 0."""

    def __init__(self, max_steps: int, start_step: int, log_every: int, is_main: bool):
        from tqdm import tqdm

        self.max_steps, self.is_main = max_steps, is_main
        self.live = is_main and sys.stdout.isatty() and log_every > 0
        form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=max_steps, initial=start_step, bar_format=form, dynamic_ncols=True, disable=not self.live)

    def __exit__(self, *_) -> None:
        self.bar.close()

    def line(self, text: str) -> None:
        """Print what was done besides training. The bar's time left does not count it."""
        self.bar.set_postfix_str("", refresh=False)
        self.bar.unpause()
        if self.is_main:
            try:
                self.bar.write(text) if self.live else print(text, flush=True)
            except BrokenPipeError:  # the reader of a pipe is gone, but a checkpoint may still have to be saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def step(self, step: int, record: dict) -> None:
        """Show one training record (the dict that goes to metrics.jsonl)."""
        loss = f"loss {record['loss']:.4f}"
        speed = f"{record['tokens_per_s']:,.0f} tok/s" + (f" | mfu {record['mfu']:.1%}" if record["mfu"] else "")
        self.bar.set_postfix_str(f"{loss} | {speed}", refresh=False)
        if not self.live:
            minutes = (self.max_steps - 1 - step) * record["ms"] / 60_000
            update = f"lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {record['ms']:,.0f} ms"
            self.line(f"step {step:,}/{self.max_steps:,} | {loss} | {update} | {speed} | {minutes:.1f} min left")


class StopSignal:
    """While in use, a first signal asks the run to stop after its step; a second Ctrl-C stops it at once."""

    # Ctrl-C; from torchrun and most systems; from SLURM before the time limit (not on Windows)
    NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, is_main: bool):
        self.is_main, self.received = is_main, 0  # received: the signal's number

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
