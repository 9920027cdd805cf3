"""A checkpoint: written aside, checked before use, chosen, and pruned.

out_dir/step_0001000/ is a Hugging Face model folder (config.json, model.safetensors, the
tokenizer's files, and a card in README.md) with two more files: train_state.pt, the state of the
optimizer and of fp16's scaler, and settings.json. A folder with such a name is whole: it is written
under a name that begins with a dot, synced to the disk, and renamed.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from parts import GPT, GPTConfig, pretrained
from parts.files import fsync, sha256
from parts.metrics import of_kind, read_metrics
from parts.pretrained import checkpoints
from parts.report import card
from parts.tokenizer import TOKENIZER_FILE, Tokenizer, save_tokenizer

FILES = (
    "config.json",
    "model.safetensors",
    "train_state.pt",
)  # and settings.json, which has their SHA-256
# These may not change between a checkpoint and the run that continues it: the tensors would not
# fit.
FIXED = ("n_layer", "n_head", "n_embd", "bias", "pad_vocab", "optimizer")
# These may change only with resume_anyway: they change the losses. (Others change rounding, paths
# or intervals only.)
CURVE = (
    *(
        "seed",
        "dtype",
        "block_size",
        "dropout",
        "total_batch_size",
        "weight_decay",
        "beta1",
        "beta2",
        "grad_clip",
    ),
    *(
        "learning_rate",
        "muon_learning_rate",
        "muon_momentum",
        "min_lr",
        "lr_schedule",
        "warmup_steps",
        "max_steps",
    ),
)
# What a run writes into its folder; no other file there is ever moved.
OURS = "step_* metrics.jsonl* wandb_id tensorboard report.md loss.[sp]?g training.[sp]?g profile.txt trace.json"


def choose(config, restarts: int) -> Path | None:
    """The checkpoint to continue from, by config.resume; None to start anew. ValueError if it is
    damaged or unfit.
    """
    out_dir, found = Path(config.out_dir), None
    # A process that torchrun restarts resumes the run that its job has begun; --resume was meant
    # for the first start.
    begun = [record["job"] for record in of_kind(read_metrics(out_dir / "metrics.jsonl"), "run")][
        -1:
    ]
    if config.resume == "auto" or (restarts and begun == [os.environ.get("TORCHELASTIC_RUN_ID")]):
        found = newest_whole(out_dir)
    if found is None and config.resume not in ("auto", "never"):
        found = Path(config.resume)
        verify(found)
        if checkpoints(out_dir) and found.resolve().parent != out_dir.resolve():
            raise ValueError(
                f"resume={found}: out_dir {out_dir} has a run of its own; choose another --out_dir"
            )

    before = read_state(found)["settings"] if found else {}
    fixed, curve = changes(before, config, FIXED), changes(before, config, CURVE)
    if fixed or (curve and not config.resume_anyway):
        way_out = (
            "--resume=never starts over"
            if fixed
            else "--resume_anyway=True continues with the new ones"
        )
        changed = ", ".join(fixed + curve)
        raise ValueError(
            f"{found} has other settings ({changed}): restore them, or use another out_dir; {way_out}"
        )
    return found


def changes(before: dict, config, names) -> list[str]:
    """The settings that differ, as "name old -> new". Settings that the checkpoint does not know
    yet do not count.
    """
    now = vars(config)
    return [
        f"{name} {before[name]} -> {now[name]}"
        for name in names
        if before.get(name, now[name]) != now[name]
    ]


def newest_whole(out_dir: Path) -> Path | None:
    """The newest checkpoint that is not damaged; None if there are no checkpoints, ValueError if
    all are damaged.
    """
    for folder in reversed(checkpoints(out_dir)):
        try:
            verify(folder)
            return folder
        except (OSError, ValueError) as error:
            print(f"WARNING: a damaged checkpoint: {error}")
    if checkpoints(out_dir):
        raise ValueError(f"{out_dir}: no checkpoint is whole; start over with --resume=never")
    return None


def verify(checkpoint: Path) -> None:
    """ValueError or OSError unless the files of a checkpoint are as they were written."""
    expected = read_state(checkpoint)["sha256"]
    for name in {*FILES, *expected}:  # a learned vocabulary is in `expected` only
        found = sha256(checkpoint / name)
        if expected.get(name, found) != found:
            raise ValueError(f"{checkpoint / name} is not as it was written: its SHA-256 differs")


def read_state(checkpoint: Path) -> dict:
    """settings.json of a checkpoint: step, val_loss, settings, train_tokens, sha256. ValueError if
    it is unreadable.
    """
    try:
        # The first checkpoints of this project lacked some of this. chosen: what auto meant.
        state = dict(train_tokens=None, sha256={}, chosen={}) | json.loads(
            (checkpoint / "settings.json").read_text()
        )
        return state | dict(
            step=int(state["step"]), val_loss=state["val_loss"], settings=dict(state["settings"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint}: settings.json cannot be read ({error})") from None


def resume(
    checkpoint: Path, config, n_tokens: int, optimizer: torch.optim.Optimizer, scaler
) -> str:
    """Restore optimizer and scaler; returns a line that says so. ValueError if the text's length
    has changed.
    """
    before = read_state(checkpoint)
    if before["train_tokens"] not in (None, n_tokens) and not config.resume_anyway:
        lengths = f"{n_tokens:,} training tokens, but {checkpoint} was trained on {before['train_tokens']:,}"
        raise ValueError(
            f"data_dir {config.data_dir} has {lengths}: restore it, or add --resume_anyway=True"
        )
    state = torch.load(checkpoint / "train_state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(
        dict(state=state["optimizer"], param_groups=optimizer.state_dict()["param_groups"])
    )
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    changed = ", ".join(
        changes(before["settings"], config, [n for n in vars(config) if not n.startswith("resume")])
    )
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
    return f"""{out_dir} is finished: it has {step:,} steps, max_steps is {max_steps:,}{best_note(out_dir)}.
  to sample from it:  python sample.py --model {out_dir}
  to look at it:      python plot.py --report {out_dir}
  to train longer:    the same command with --max_steps={2 * step} --resume_anyway=True
  to start over:      the same command with --resume=never"""


def make_room(out_dir: Path, found: Path | None, start_step: int) -> None:
    """Move the checkpoints later than `found` into a new folder beside out_dir, and delete
    leftovers of killed runs.

    Without `found`, or if it is another run's, all that a run has written here moves.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    continues = found is not None and found.resolve().parent == out_dir.resolve()
    if continues:
        moved = [
            folder
            for folder in checkpoints(out_dir)
            if int(folder.name.removeprefix("step_")) > start_step
        ]
    else:
        moved = [path for pattern in OURS.split() for path in out_dir.glob(pattern)]
    if moved:
        aside = next(
            p for n in itertools.count(1) if not (p := Path(f"{out_dir.resolve()}.old{n}")).exists()
        )
        aside.mkdir()
        if continues:
            shutil.copy(out_dir / "metrics.jsonl", aside)
        for path in moved:
            path.rename(aside / path.name)
        print(f"files of the earlier run are moved to {aside}")


class Saver(contextlib.AbstractContextManager):
    """Writes checkpoints on a thread, one at a time, from copies, while training continues."""

    def __init__(self, out_dir: Path, keep: int, say: Callable[[str], None]):
        self.out_dir, self.keep, self.say = out_dir, keep, say
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing = self.thread.submit(lambda: None)

    def __exit__(self, kind, *_) -> None:
        self.thread.shutdown(wait=kind is not KeyboardInterrupt)  # a second Ctrl-C does not wait

    def save(self, model: GPT, tokenizer: Tokenizer, optimizer, scaler, state: dict) -> None:
        """Copy all and begin to write it. OSError if there is no room, or if the checkpoint before
        was not written.
        """
        self.wait()
        check_space(self.out_dir, model)
        memory = dict(optimizer=copied(optimizer.state_dict()["state"]), scaler=scaler.state_dict())
        self.writing = self.thread.submit(
            self.write, model.config, model.weights(), tokenizer, memory, state
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is written. OSError if that fails, usually on a full
        disk.
        """
        self.writing.result()

    def write(
        self, config: GPTConfig, weights: dict, tokenizer: Tokenizer, memory: dict, state: dict
    ) -> None:
        """Write a checkpoint aside, sync and rename it, then delete all but the newest `keep` and
        the best.
        """
        folder = self.out_dir / f"step_{state['step']:07d}"
        aside = folder.with_name(f".{folder.name}.tmp")
        try:
            pretrained.write(aside, config, weights)
            save_tokenizer(tokenizer, aside, config.block_size)
            torch.save(memory, aside / "train_state.pt")
            with contextlib.suppress(Exception):  # no card is worth a checkpoint
                text = card(self.out_dir, state["step"])
                (aside / "README.md").write_text(text, encoding="utf-8", errors="replace")
            files = [aside / name for name in (*FILES, TOKENIZER_FILE)]
            sums = {file.name: sha256(file) for file in files if file.exists()}
            (aside / "settings.json").write_text(
                json.dumps(state | dict(sha256=sums), indent=2) + "\n"
            )
            for path in (*aside.iterdir(), aside):
                fsync(path)
            aside.rename(folder)
            fsync(self.out_dir)
        except (
            Exception
        ) as error:  # safetensors and torch.save have types of their own for a full disk
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written ({error}); disk full? Earlier ones are good"
            ) from error
        kept = best(self.out_dir)
        for old in checkpoints(self.out_dir)[: -self.keep] if self.keep else []:
            if old != kept:
                # Renamed first: a folder under its own name is always whole.
                gone = old.rename(old.with_name(f".{old.name}.gone"))
                shutil.rmtree(
                    gone, ignore_errors=True
                )  # a file still open on NFS: the next start tries again
        self.say(f"step {state['step']:,} | saved {folder}")


def copied(state: dict) -> dict:
    """An optimizer's state with its tensors copied to the CPU."""
    return {
        index: {
            n: v.to("cpu", copy=True) if isinstance(v, torch.Tensor) else v
            for n, v in values.items()
        }
        for index, values in state.items()
    }


def check_space(folder: Path, model: GPT) -> None:
    """OSError if there is no room for a checkpoint: float32 weights and AdamW's two moments,
    about.
    """
    needed, free = 3 * 4 * model.num_params(), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: a checkpoint takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free"
        )
