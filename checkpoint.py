"""A run's folder: one process at a time writes to it, and its checkpoints are written aside and checked before use.

out_dir/step_0001000/ is a Hugging Face model folder (config.json, model.safetensors, the tokenizer's files, and in
README.md the model's card) and beside:

    train_state.pt   what the optimizer and fp16's scaler remember; loads with weights_only=True
    settings.json    step, val_loss (null if not evaluated then), settings, train_tokens, and the other files' SHA-256

A folder of such a name that exists is whole; what a kill leaves has a name that begins with a dot.
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn

import data
import pretrained
import report
from model import GPT, GPTConfig
from pretrained import checkpoints

# What a run writes into its folder; no other file there is ever moved.
OURS = re.compile(
    r"step_\d+|metrics\.jsonl|(wandb_id|tensorboard|report\.md|(loss|training)\.(svg|png)|profile\.txt|trace\.json)$"
)

FILES = ("config.json", "model.safetensors", "settings.json", "train_state.pt")


# ----------------------------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def held(out_dir: Path) -> Iterator[None]:
    """Keep other runs out of out_dir meanwhile; a process that is killed lets go of it.

    Raises ValueError if another run is there, or nothing can be written. If nothing was, no folder is left behind.
    """
    made = not out_dir.exists()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / ".lock", "a")
    except OSError as error:
        raise ValueError(f"out_dir {out_dir} cannot be written ({error.strerror}); choose another --out_dir") from None
    with lock:
        data.lock_file(lock, True, f"out_dir {out_dir}: another run is writing to it; let it finish, or stop it")
        try:
            yield
        finally:
            if made and not [path for path in out_dir.iterdir() if path.name != ".lock"]:
                shutil.rmtree(out_dir)


def make_room(out_dir: Path, found: Path | None, start_over: bool) -> None:
    """Prepare out_dir for a run that goes on from `found`: what a kill left goes, what came after it is moved aside."""
    out_dir.mkdir(parents=True, exist_ok=True)
    own = found is not None and found.resolve().parent == out_dir.resolve()
    start_step = read_state(found)["step"] if own else 0
    for left_over in out_dir.glob(".step_*"):
        shutil.rmtree(left_over, ignore_errors=True)
    old = [path for path in out_dir.iterdir() if OURS.match(path.name)]
    if start_over and old:
        aside = free_name(out_dir, "old")
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        print(f"resume=never: the old run is moved to {aside}")
    later = [folder for folder in checkpoints(out_dir) if int(folder.name.removeprefix("step_")) > start_step]
    if later and start_step:
        shutil.copy(out_dir / "metrics.jsonl", free_name(out_dir / "metrics.jsonl", "old"))
    for folder in later:
        print(f"{folder} is of a later step: moved to {move_aside(folder)}")
    if start_step == 0 and (out_dir / "metrics.jsonl").exists():
        move_aside(out_dir / "metrics.jsonl")


def free_name(path: Path, word: str) -> Path:
    """The path with .old1, .old2, ... behind (word "old"), whichever is free."""
    path = path.resolve()
    return next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{word}{n}")).exists())


def move_aside(path: Path, word: str = "old") -> Path:
    return path.rename(free_name(path, word))


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def newest_whole(out_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is not damaged; None if there are no checkpoints, ValueError if all are damaged.

    Damaged ones are moved aside, so that nothing takes them for good.
    """
    wrong = {}
    for folder in reversed(checkpoints(out_dir)):
        wrong[folder] = damage(folder) or mislabelled(folder)
        if not wrong[folder]:
            break
    else:
        if wrong:  # they stay: without them, the same command would start over
            what = "; ".join(f"{folder.name}: {why}" for folder, why in wrong.items())
            raise ValueError(f"{out_dir}: no checkpoint is whole ({what}); start over with --resume=never")
        return None
    for damaged in [other for other in wrong if wrong[other]]:
        say(f"WARNING: {damaged} is damaged ({wrong[damaged]}); it is now {move_aside(damaged, 'damaged')}")
    return folder


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, in words; nothing if they are as they were written."""
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        sums = read_state(checkpoint)["sha256"]
    except ValueError as error:
        return str(error)
    changed = [name for name, expected in sums.items() if sha256(checkpoint / name) != expected]
    return f"{changed[0]} is not as it was written, its SHA-256 differs" if changed else ""


def mislabelled(checkpoint: Path) -> str:
    """That a folder is not named after its step; nothing if it is."""
    step = read_state(checkpoint)["step"]
    return "" if checkpoint.name == f"step_{step:07d}" else f"settings.json says step {step}"


def read_state(checkpoint: Path) -> dict:
    """settings.json of a checkpoint: step, val_loss, settings, train_tokens, sha256."""
    try:
        state = json.loads((checkpoint / "settings.json").read_text())
        known = dict(step=int(state["step"]), val_loss=state["val_loss"], settings=dict(state["settings"]))
        # The first checkpoints of this project had neither.
        return known | dict(train_tokens=state.get("train_tokens"), sha256=dict(state.get("sha256", {})))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint}: settings.json cannot be read ({error})") from None


def load_train_state(checkpoint: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Give optimizer and scaler their memory back; the optimizer's settings stay those of this run."""
    try:
        state = torch.load(checkpoint / "train_state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(dict(state=state["optimizer"], param_groups=optimizer.state_dict()["param_groups"]))
    except Exception as error:  # torch raises half a dozen types for a file that is damaged
        raise ValueError(
            f"{checkpoint}: train_state.pt is damaged or of another model ({type(error).__name__}); delete this "
            "folder to go on from the one before it"
        ) from None
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def best(out_dir: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None where none was evaluated."""
    losses = {}
    for folder in checkpoints(out_dir):
        with contextlib.suppress(ValueError, OSError):  # an old one that is damaged must not end a run
            loss = read_state(folder)["val_loss"]
            if loss is not None and math.isfinite(loss):
                losses[folder] = loss
    return min(losses, key=losses.get, default=None)


def sha256(path: Path) -> str:
    return data.read_through(path)[0].hex()


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class Saver:
    """Writes checkpoints on a thread of its own, one at a time, while training goes on from copies of what it wrote."""

    def __init__(self, out_dir: Path, keep: int, saved: Callable[[int, Path], None]):
        self.out_dir, self.keep, self.saved = out_dir, keep, saved  # saved is called with step and folder of each
        self.thread = self.error = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
        elif kind is not KeyboardInterrupt:  # who presses Ctrl-C twice does not want to wait
            with contextlib.suppress(OSError):  # there is an error to be told already
                self.wait()

    def save(self, model: GPT, tokenizer: data.Tokenizer, optimizer, scaler, state: dict) -> None:
        """Copy model and optimizer and begin to write them as out_dir/step_N, N being state["step"].

        Raises OSError if there is no room for it, or if the one before could not be written.
        """
        self.wait()
        check_space(self.out_dir, bytes_needed(model))
        folder = self.out_dir / f"step_{state['step']:07d}"
        memory = dict(optimizer=copied(optimizer.state_dict()["state"]), scaler=scaler.state_dict())
        content = (folder, model.config, model.weights(), tokenizer, memory, state)
        self.thread = threading.Thread(target=self.write, args=content, daemon=True)
        self.thread.start()

    def write(self, folder: Path, *content) -> None:
        try:
            write(folder, *content)
            prune(self.out_dir, self.keep)
            self.saved(content[-1]["step"], folder)
        except Exception as error:  # to be raised where the run can be ended
            self.error = error

    def check(self) -> None:
        """Raise what went wrong in writing, if it is known by now."""
        if self.error:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        if self.thread:
            self.thread.join()
        self.check()


def copied(state: dict) -> dict:
    """An optimizer's state with its tensors on the CPU, not shared with those that go on changing."""
    return {
        index: {n: v.to("cpu", copy=True) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        for index, values in state.items()
    }


def bytes_needed(model: nn.Module) -> int:
    """About, for a checkpoint: float32 weights, and AdamW's two running means."""
    return 3 * 4 * sum(parameter.numel() for parameter in model.parameters())


def check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: a checkpoint takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; make room, then "
            "run the same command again. Earlier checkpoints are good"
        )


def write(folder: Path, config: GPTConfig, weights: dict, tokenizer: data.Tokenizer, memory: dict, state: dict) -> None:
    """Write a checkpoint into a folder beside, sync it to the disk, and rename it to `folder`.

    Raises OSError when that fails, a full disk being the usual reason; the checkpoints before it are untouched.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        pretrained.write(aside, config, weights)
        data.save_tokenizer(tokenizer, aside, config.block_size)
        torch.save(memory, aside / "train_state.pt")
        (aside / "README.md").write_bytes(card_of(folder.parent, state["step"]))
        sums = {name: sha256(aside / name) for name in FILES if name != "settings.json"}
        (aside / "settings.json").write_text(json.dumps(state | dict(sha256=sums), indent=2) + "\n")
        for path in (*aside.iterdir(), aside):
            fsync(path)
        aside.rename(folder)
        fsync(folder.parent)
    except Exception as error:  # safetensors and torch.save have types of their own for a disk that is full
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written ({error}); is the disk full? Earlier checkpoints are good"
        ) from error


def card_of(out_dir: Path, step: int) -> bytes:
    """The checkpoint's card; a line in its place if it cannot be written, for no card is worth a checkpoint."""
    try:
        card = report.card(out_dir, step)
    except Exception as error:
        card = f"Step {step:,}. The card could not be made: {type(error).__name__}: {error}\n"
    return card.encode(errors="replace")


def fsync(path: Path) -> None:
    """Have the disk hold what was written to a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prune(out_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the one with the lowest validation loss; 0 keeps all."""
    kept = best(out_dir)
    for folder in checkpoints(out_dir)[:-keep] if keep else []:
        if folder != kept:
            # Renamed first: a folder that exists under its own name is whole.
            gone = folder.rename(folder.with_name(f".{folder.name}.gone"))
            shutil.rmtree(gone, ignore_errors=True)  # open elsewhere, on NFS: the next start tries again
