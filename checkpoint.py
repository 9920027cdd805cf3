"""A checkpoint: written aside, checked before use, chosen, and pruned.

out_dir/step_0001000/ is a Hugging Face model folder (config.json, model.safetensors, the tokenizer's files, and the
model card in README.md) with two more files:

    train_state.pt   the state of the optimizer and of fp16's scaler; loads with weights_only=True
    settings.json    step, val_loss (null if not evaluated then), settings, train_tokens, SHA-256 of the other files

A folder with such a name is whole: it is written under a name that begins with a dot, synced to the disk, and renamed.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import data
import pretrained
import report
import run
from model import GPT, GPTConfig
from pretrained import checkpoints

FILES = ("config.json", "model.safetensors", "settings.json", "train_state.pt")

# These may not change between a checkpoint and the run that continues it: the tensors would not fit.
FIXED = ("n_layer", "n_head", "n_embd", "bias", "pad_vocab", "optimizer")

# These may change only with resume_anyway: they change the losses. (Others change rounding, paths or intervals only.)
CURVE = (
    *("seed", "dtype", "block_size", "dropout", "total_batch_size", "weight_decay", "beta1", "beta2", "grad_clip"),
    *("learning_rate", "min_lr", "lr_schedule", "warmup_steps", "cooldown_steps", "max_steps"),
)


# ----------------------------------------------------------------------------------------------------------------------
# Choosing


def choose(config, restarts: int, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that the run continues from, by config.resume; None to start at step 0.

    Raises ValueError if it is damaged, does not fit the settings, or would continue on another loss curve.
    """
    out_dir, named = Path(config.out_dir), Path(config.resume)
    # A process that torchrun restarts resumes its own run; --resume was meant for the first start.
    if config.resume == "auto" or (restarts and has_begun(out_dir, config.resume == "never")):
        found = newest_whole(out_dir, say)
    elif config.resume == "never":
        found = None
    elif wrong := damage(named):
        raise ValueError(f"resume={named}: not a whole checkpoint ({wrong}); name a folder such as step_0001000")
    elif checkpoints(out_dir) and named.resolve().parent != out_dir.resolve():
        raise ValueError(f"resume={named}: out_dir {out_dir} has a run of its own; choose another --out_dir")
    else:
        found = named
    if found is None:
        return None

    before = read_state(found)["settings"]
    for name in FIXED:
        if before.get(name) != getattr(config, name):
            raise ValueError(
                f"{found} was trained with {name}={before.get(name)}, but {name}={getattr(config, name)} is set: use "
                "another out_dir, or --resume=never to start over"
            )
    changed = changes(before, config, CURVE)
    if changed and not config.resume_anyway:
        raise ValueError(
            f"{found} was trained with other settings ({', '.join(changed)}), which change the losses. Restore them, "
            "add --resume_anyway=True to continue with the new ones, or use another out_dir"
        )
    return found


def has_begun(out_dir: Path, start_over: bool) -> bool:
    """Whether this job of torchrun had already started the run in out_dir before this restart."""
    runs = [record for record in report.read_metrics(out_dir / "metrics.jsonl") if record["kind"] == "run"]
    same_job = bool(runs) and runs[-1].get("job") == os.environ.get("TORCHELASTIC_RUN_ID")
    return same_job and (start_over or bool(checkpoints(out_dir)))


def changes(before: dict, config, names) -> list[str]:
    """The settings that differ, as "name old -> new"."""
    now = vars(config)
    return [f"{name} {before.get(name)} -> {now[name]}" for name in names if before.get(name, now[name]) != now[name]]


def newest_whole(out_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is not damaged; None if there are no checkpoints, ValueError if all are damaged.

    Damaged ones that are newer are renamed.
    """
    wrong = {}
    for folder in reversed(checkpoints(out_dir)):
        why = damage(folder)
        if not why:
            for damaged, reason in wrong.items():
                aside = damaged.rename(run.free_name(damaged, "damaged"))
                say(f"WARNING: {damaged} is damaged ({reason}); renamed to {aside}")
            return folder
        wrong[folder] = why
    if wrong:
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in wrong.items())
        raise ValueError(f"{out_dir}: no checkpoint is whole ({reasons}); start over with --resume=never")
    return None


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; empty if they are as they were written."""
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        state = read_state(checkpoint)
    except ValueError as error:
        return str(error)
    if checkpoint.name.startswith("step_") and checkpoint.name != f"step_{state['step']:07d}":
        return f"settings.json says step {state['step']}"
    changed = [name for name, expected in state["sha256"].items() if data.sha256(checkpoint / name) != expected]
    return f"{changed[0]} is not as it was written, its SHA-256 differs" if changed else ""


def read_state(checkpoint: Path) -> dict:
    """settings.json of a checkpoint: step, val_loss, settings, train_tokens, sha256. ValueError if it is unreadable."""
    try:
        state = json.loads((checkpoint / "settings.json").read_text())
        known = dict(step=int(state["step"]), val_loss=state["val_loss"], settings=dict(state["settings"]))
        # The first checkpoints of this project had none of these.
        known |= dict(train_tokens=state.get("train_tokens"), sha256=dict(state.get("sha256", {})))
        return known | dict(chosen=dict(state.get("chosen", {})))  # what auto meant
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint}: settings.json cannot be read ({error})") from None


def resume(checkpoint: Path, config, n_tokens: int, optimizer: torch.optim.Optimizer, scaler) -> str:
    """Restore the state of optimizer and scaler (their settings stay those of this run); returns a line that says so.

    Raises ValueError if the file is damaged, or if the training text has another number of tokens than before.
    """
    before = read_state(checkpoint)
    if before["train_tokens"] not in (None, n_tokens) and not config.resume_anyway:
        raise ValueError(
            f"data_dir {config.data_dir} has {n_tokens:,} training tokens, but {checkpoint} was trained on "
            f"{before['train_tokens']:,}: another text. Restore data_dir, or add --resume_anyway=True"
        )
    try:
        state = torch.load(checkpoint / "train_state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(dict(state=state["optimizer"], param_groups=optimizer.state_dict()["param_groups"]))
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise ValueError(
            f"{checkpoint}: train_state.pt is damaged or of another model ({type(error).__name__}); delete this "
            "folder to continue from the one before it"
        ) from None
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    names = [name for name in vars(config) if not name.startswith("resume")]
    changed = ", ".join(changes(before["settings"], config, names))
    return f"resume: {checkpoint}, after {before['step']:,} steps{changed and '; changed since then: '}{changed}"


def best(out_dir: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None if none was evaluated."""
    losses = {}
    for folder in checkpoints(out_dir):
        with contextlib.suppress(ValueError):  # an old damaged checkpoint must not end a run
            loss = read_state(folder)["val_loss"]
            if loss is not None and math.isfinite(loss):
                losses[folder] = loss
    return min(losses, key=losses.get, default=None)


def best_note(out_dir: Path) -> str:
    found = best(out_dir)
    return f"; best {found} (val loss {read_state(found)['val_loss']:.4f})" if found else ""


def finished_message(out_dir: Path, step: int, max_steps: int) -> str:
    return (
        f"{out_dir} is finished: it has {step:,} steps, max_steps is {max_steps:,}{best_note(out_dir)}.\n"
        f"  to sample from it:  python sample.py --model {out_dir}\n"
        f"  to look at it:      python plot.py --report {out_dir}\n"
        f"  to train longer:    the same command with --max_steps={2 * step} --resume_anyway=True\n"
        f"  to start over:      the same command with --resume=never"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class Saver:
    """Writes checkpoints on a thread, one at a time, from copies, while training continues."""

    def __init__(self, out_dir: Path, keep: int, say: Callable[[str], None]):
        self.out_dir, self.keep, self.say = out_dir, keep, say
        self.thread, self.writing = ThreadPoolExecutor(max_workers=1), None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not KeyboardInterrupt:  # a second Ctrl-C does not wait
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # the first error is reported
                self.wait()
        self.thread.shutdown(wait=False)

    def save(self, model: GPT, tokenizer: data.Tokenizer, optimizer, scaler, state: dict) -> None:
        """Copy model and optimizer, and begin to write them as out_dir/step_N with N = state["step"].

        Raises OSError if there is no room, or if the checkpoint before could not be written.
        """
        self.wait()
        check_space(self.out_dir, model)
        memory = dict(optimizer=copied(optimizer.state_dict()["state"]), scaler=scaler.state_dict())
        folder = self.out_dir / f"step_{state['step']:07d}"
        self.writing = self.thread.submit(self.write, folder, model.config, model.weights(), tokenizer, memory, state)

    def write(self, folder: Path, *content) -> None:
        write(folder, *content)
        prune(self.out_dir, self.keep)
        self.say(f"step {int(folder.name.removeprefix('step_')):,} | saved {folder}")

    def check(self) -> None:
        """Raise the error of a write that has failed by now."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing:
            writing.result()


def copied(state: dict) -> dict:
    """An optimizer's state with its tensors copied to the CPU."""
    return {
        index: {n: v.to("cpu", copy=True) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        for index, values in state.items()
    }


def check_space(folder: Path, model: GPT) -> None:
    """OSError if there is no room for a checkpoint: float32 weights and AdamW's two moments, about."""
    needed, free = 3 * 4 * sum(parameter.numel() for parameter in model.parameters()), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: a checkpoint takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; make room, then "
            "run the same command again. Earlier checkpoints are good"
        )


def write(folder: Path, config: GPTConfig, weights: dict, tokenizer: data.Tokenizer, memory: dict, state: dict) -> None:
    """Write a checkpoint aside, sync it to the disk, and rename it to `folder`.

    Raises OSError when that fails, usually on a full disk; earlier checkpoints are untouched.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        pretrained.write(aside, config, weights)
        data.save_tokenizer(tokenizer, aside, config.block_size)
        torch.save(memory, aside / "train_state.pt")
        try:
            card = report.card(folder.parent, state["step"])
        except Exception as error:  # no card is worth a checkpoint
            card = f"Step {state['step']:,}. The card could not be made: {type(error).__name__}: {error}\n"
        (aside / "README.md").write_text(card, encoding="utf-8", errors="replace")
        sums = {name: data.sha256(aside / name) for name in FILES if name != "settings.json"}
        (aside / "settings.json").write_text(json.dumps(state | dict(sha256=sums), indent=2) + "\n")
        for path in (*aside.iterdir(), aside):
            fsync(path)
        aside.rename(folder)
        fsync(folder.parent)
    except Exception as error:  # safetensors and torch.save have types of their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written ({error}); is the disk full? Earlier checkpoints are good"
        ) from error


def fsync(path: Path) -> None:
    """Make the disk hold what was written to a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prune(out_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the one with the lowest validation loss; 0 keeps all."""
    kept = best(out_dir)
    for folder in checkpoints(out_dir)[:-keep] if keep else []:
        if folder != kept:
            # Renamed first: a folder under its own name is always whole.
            gone = folder.rename(folder.with_name(f".{folder.name}.gone"))
            shutil.rmtree(gone, ignore_errors=True)  # a file still open on NFS: the next start tries again
