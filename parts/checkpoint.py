"""A run's folder and its checkpoints: written aside, checked before use, chosen, and pruned.

out_dir/step_0001000/ is a model's folder as parts/pretrained.py writes it (a Hugging Face GPT-2,
unless model.py was changed into something else), with the tokenizer's files, a card in README.md,
and two more files: train_state.pt, the state of the optimizer and of fp16's scaler, and
settings.json. A folder with such a name is whole: it is written under a name that begins with a
dot, synced to the disk, and renamed.
"""

if __name__ == "__main__":
    raise SystemExit("parts/checkpoint.py is no command: README.md lists the commands")

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from parts import GPT
from parts.files import fsync, sha256
from parts.metrics import read_metrics, select
from parts.pretrained import ModelState, checkpoints, copy_state, step_of, write
from parts.report import make_card
from parts.tokenizer import TOKENIZER_FILE, Tokenizer, save_tokenizer

import torch

TRAIN_STATE = "train_state.pt"
SETTINGS = "settings.json"  # it has the SHA-256 of the other files
# What a checkpoint had before settings.json listed its files.
FIRST_FILES = ("config.json", "model.safetensors", TRAIN_STATE)
# What a run writes into its folder. No other file there is ever moved.
RUN_FILES = (
    "step_*",
    "metrics.jsonl*",
    "wandb_id",
    "tensorboard",
    "report.md",
    "loss.[sp]?g",
    "training.[sp]?g",
    "profile.txt",
    "trace.json",
)


@dataclasses.dataclass(frozen=True)
class RunState:
    """settings.json of a checkpoint. The first versions lacked what has a default here."""

    step: int  # updates so far
    val_loss: float | None  # nats a token; None if it was not evaluated at this step
    settings: dict
    train_tokens: int | None = None  # in data_dir
    chosen: dict = dataclasses.field(default_factory=dict)  # the fields of auto.Arithmetic
    sha256: dict = dataclasses.field(default_factory=dict)  # file name -> its sum


class ResumePoint(NamedTuple):
    """Where a run continues."""

    folder: Path
    state: RunState


# ---- Reading -------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> RunState:
    """settings.json of a checkpoint. ValueError if it is unreadable."""
    try:
        content = json.loads((checkpoint / SETTINGS).read_text())
        known = {field.name for field in dataclasses.fields(RunState)}
        state = RunState(**{name: content[name] for name in known & content.keys()})
        return dataclasses.replace(state, step=int(state.step), settings=dict(state.settings))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint}: {SETTINGS} cannot be read ({error})") from None


def verify(checkpoint: Path) -> RunState:
    """A checkpoint's state. ValueError or OSError unless its files are as they were written."""
    state = read_state(checkpoint)
    for name in state.sha256 or FIRST_FILES:
        digest = sha256(checkpoint / name)
        if state.sha256.get(name, digest) != digest:
            raise ValueError(f"{checkpoint / name} is not as it was written: its SHA-256 differs")
    return state


def newest_whole(out_dir: Path) -> ResumePoint | None:
    """The newest checkpoint that is not damaged; None if there are no checkpoints.

    ValueError if all are damaged.
    """
    folders = checkpoints(out_dir)
    for folder in reversed(folders):
        try:
            return ResumePoint(folder, verify(folder))
        except (OSError, ValueError) as error:
            print(f"WARNING: a damaged checkpoint: {error}")
    if folders:
        raise ValueError(f"{out_dir}: no checkpoint is whole; start over with --resume=never")
    return None


def best(out_dir: Path) -> ResumePoint | None:
    """The checkpoint with the lowest validation loss; None if none was evaluated."""
    lowest = math.inf
    point = None
    for folder in checkpoints(out_dir):
        with contextlib.suppress(ValueError):  # an old damaged checkpoint must not end a run
            state = read_state(folder)
            if state.val_loss is not None and state.val_loss < lowest:
                lowest = state.val_loss
                point = ResumePoint(folder, state)
    return point


def best_note(out_dir: Path) -> str:
    """The end of a line: the best checkpoint; empty if none was evaluated."""
    point = best(out_dir)
    if point is None:
        return ""
    return f"; best {point.folder} (val loss {point.state.val_loss:.4f})"


# ---- Resuming ------------------------------------------------------------------------------------


def find_resume_point(config, rules: dict[str, str], restarts: int) -> ResumePoint | None:
    """The checkpoint to continue from, by config.resume; None to start anew.

    rules: how each setting counts on a resume, "fixed", "changes the losses" or "free". restarts:
    how often torchrun has restarted this job. ValueError if the checkpoint is damaged or unfit.
    """
    out_dir = Path(config.out_dir)
    runs = select(read_metrics(out_dir / "metrics.jsonl"), "run")
    # A process that torchrun restarts resumes the run that its job has begun; --resume was meant
    # for the first start.
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    restarted = restarts > 0 and bool(runs) and runs[-1].get("job") == job
    point = None
    if config.resume == "auto" or restarted:
        point = newest_whole(out_dir)
    if point is None and config.resume not in ("auto", "never"):
        folder = Path(config.resume)
        point = ResumePoint(folder, verify(folder))
        if checkpoints(out_dir) and folder.resolve().parent != out_dir.resolve():
            raise ValueError(
                f"resume={folder}: out_dir {out_dir} has a run of its own; choose another --out_dir"
            )
    if point is not None:
        check_settings(point, config, rules)
    return point


def check_settings(point: ResumePoint, config, rules: dict[str, str]) -> None:
    """ValueError if settings differ from the checkpoint's that may not."""
    differences = compare_settings(point.state.settings, config)
    fixed = [text for name, text in differences.items() if rules[name] == "fixed"]
    losses = [text for name, text in differences.items() if rules[name] == "changes the losses"]
    if fixed:
        way_out = "--resume=never starts over"
    elif losses and not config.resume_anyway:
        way_out = "--resume_anyway=True continues with the new ones"
    else:
        return
    changed = ", ".join(fixed + losses)
    raise ValueError(
        f"{point.folder} has other settings ({changed}): "
        f"restore them, or use another out_dir; {way_out}"
    )


def compare_settings(saved: dict, config) -> dict[str, str]:
    """Setting -> "name old -> new", for those that differ.

    A setting that the checkpoint does not know yet had its default.
    """
    defaults = vars(type(config)())
    differences = {}
    for name, new in vars(config).items():
        old = saved.get(name, defaults[name])
        if old != new:
            differences[name] = f"{name} {old} -> {new}"
    return differences


def restore(
    point: ResumePoint, config, n_tokens: int, optimizer: torch.optim.Optimizer, scaler
) -> str:
    """Restore optimizer and scaler; returns a line that says so.

    ValueError if the length of the training text, in tokens, has changed.
    """
    trained_on = point.state.train_tokens
    if trained_on not in (None, n_tokens) and not config.resume_anyway:
        raise ValueError(
            f"data_dir {config.data_dir} has {n_tokens:,} training tokens, "
            f"but {point.folder} was trained on {trained_on:,}: "
            f"restore it, or add --resume_anyway=True"
        )
    saved = torch.load(point.folder / TRAIN_STATE, map_location="cpu", weights_only=True)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(dict(state=saved["optimizer"], param_groups=groups))
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])

    line = f"resume: {point.folder}, after {point.state.step:,} steps"
    differences = compare_settings(point.state.settings, config)
    changed = [text for name, text in differences.items() if not name.startswith("resume")]
    if changed:
        line += f"; changed since then: {', '.join(changed)}"
    return line


def finished_message(out_dir: Path, step: int, max_steps: int) -> str:
    """What to do with a run that has all its steps."""
    steps = f"it has {step:,} steps, max_steps is {max_steps:,}"
    return f"""{out_dir} is finished: {steps}{best_note(out_dir)}.
  to sample from it:  python sample.py --model {out_dir}
  to look at it:      python plot.py --report {out_dir}
  to train longer:    the same command with --max_steps={2 * step} --resume_anyway=True
  to start over:      the same command with --resume=never"""


def make_room(out_dir: Path, point: ResumePoint | None) -> None:
    """Prepare a run's folder: delete leftovers of killed runs, and move what is in the way.

    The checkpoints later than the resume point move into a new folder beside out_dir. Without a
    resume point, or if it is another run's, all that a run has written here moves.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)

    moved = []
    continues = point is not None and point.folder.resolve().parent == out_dir.resolve()
    if point is not None and continues:
        for folder in checkpoints(out_dir):
            if step_of(folder) > point.state.step:
                moved.append(folder)
    else:
        for pattern in RUN_FILES:
            moved += out_dir.glob(pattern)
    if not moved:
        return
    for n in itertools.count(1):
        aside = Path(f"{out_dir.resolve()}.old{n}")
        if not aside.exists():
            break
    aside.mkdir()
    if continues:
        shutil.copy(out_dir / "metrics.jsonl", aside)
    for path in moved:
        path.rename(aside / path.name)
    print(f"files of the earlier run are moved to {aside}")


# ---- Writing -------------------------------------------------------------------------------------


class Saver(contextlib.AbstractContextManager):
    """Writes checkpoints on a thread, one at a time, from copies, while training continues."""

    def __init__(self, out_dir: Path, keep: int, departure: str, say: Callable[[str], None]):
        """keep: how many of the newest checkpoints stay, 0 for all. departure: see pretrained."""
        self.out_dir = out_dir
        self.keep = keep
        self.departure = departure
        self.say = say
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing = self.thread.submit(lambda: None)

    def __exit__(self, kind, *_) -> None:
        self.thread.shutdown(wait=kind is not KeyboardInterrupt)  # a second Ctrl-C does not wait

    def save(self, model: GPT, tokenizer: Tokenizer, optimizer, scaler, state: RunState) -> None:
        """Copy everything and begin to write it.

        OSError if there is no room, or if the checkpoint before could not be written.
        """
        self.wait()
        check_space(self.out_dir, model)
        train_state = dict(
            optimizer=copy_to_cpu(optimizer.state_dict()["state"]), scaler=scaler.state_dict()
        )
        weights = copy_state(model, self.departure)
        self.writing = self.thread.submit(self.write, weights, tokenizer, train_state, state)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. OSError if that failed, as on a full disk."""
        self.writing.result()

    def check(self) -> None:
        """Raise the error of a write that has failed; do not wait for one that goes on."""
        if self.writing.done():
            self.writing.result()

    def write(
        self, weights: ModelState, tokenizer: Tokenizer, train_state: dict, state: RunState
    ) -> None:
        """Write a checkpoint aside, sync and rename it; then delete old ones."""
        folder = self.out_dir / f"step_{state.step:07d}"
        aside = folder.with_name(f".{folder.name}.tmp")
        try:
            names = write(aside, weights)
            save_tokenizer(tokenizer, aside, weights.config.block_size)
            torch.save(train_state, aside / TRAIN_STATE)
            with contextlib.suppress(Exception):  # no card is worth a checkpoint
                card = make_card(self.out_dir, state.step, weights.departure)
                (aside / "README.md").write_text(card, encoding="utf-8", errors="replace")
            names.append(TRAIN_STATE)
            if (aside / TOKENIZER_FILE).exists():
                names.append(TOKENIZER_FILE)
            sums = {name: sha256(aside / name) for name in names}
            content = dataclasses.asdict(dataclasses.replace(state, sha256=sums))
            (aside / SETTINGS).write_text(json.dumps(content, indent=2) + "\n")
            for path in (*aside.iterdir(), aside):
                fsync(path)
            aside.rename(folder)
            fsync(self.out_dir)
        except Exception as error:  # safetensors and torch.save have types of their own
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written ({error}); disk full? Earlier ones are good"
            ) from error
        self.prune()
        self.say(f"step {state.step:,} | saved {folder}")

    def prune(self) -> None:
        """Delete all checkpoints but the newest `keep` and the best."""
        if not self.keep:
            return
        kept = best(self.out_dir)
        for folder in checkpoints(self.out_dir)[: -self.keep]:
            if kept is not None and folder == kept.folder:
                continue
            # Renamed first: a folder under its own name is always whole.
            gone = folder.rename(folder.with_name(f".{folder.name}.gone"))
            # A file that is still open on NFS stays: the next start tries again.
            shutil.rmtree(gone, ignore_errors=True)


def copy_to_cpu(state: dict) -> dict:
    """An optimizer's state with its tensors copied to the CPU."""
    copies: dict = {}
    for index, values in state.items():
        copies[index] = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.to("cpu", copy=True)
            copies[index][name] = value
    return copies


def check_space(folder: Path, model: GPT) -> None:
    """OSError if there is no room for a checkpoint: float32 weights and two moments, about."""
    needed = 3 * 4 * model.num_params()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: a checkpoint takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free"
        )
