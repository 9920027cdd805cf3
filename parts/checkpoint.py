"""A run's folder and its checkpoints: written aside, checked before use, chosen, and pruned.

out_dir/step_0001000/ is a model's folder as parts/pretrained.py writes it (a Hugging Face GPT-2,
unless model.py was changed into something else), with the tokenizer's files, a card in README.md,
and two more files: train_state.pt, the state of the optimizer and of fp16's scaler, and
settings.json. A folder with such a name is whole: it is written under a name that begins with a
dot, synced to the disk, and renamed. What a resume relies on is under a checksum: the SHA-256 of
each file is in settings.json, which has one of its own content as well.
"""

if __name__ == "__main__":
    raise SystemExit("parts/checkpoint.py is no command: README.md lists the commands")

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from parts import GPT
from parts.console import print_lines
from parts.files import delete, delete_leftovers, fsync, sha256
from parts.json_files import read_json
from parts.metrics import is_count, read_metrics, select
from parts.pretrained import ModelState, checkpoints, copy_state, step_of, write
from parts.report import make_card
from parts.runtime import DTYPES
from parts.snapshot import Snapshot, tensors_in
from parts.tokenizer import Tokenizer, save_tokenizer
from parts.zero import OptimizerShare

import torch

TRAIN_STATE = "train_state.pt"
SETTINGS = "settings.json"  # it has the SHA-256 of the other files
# What a checkpoint had before settings.json listed its files.
FIRST_FILES = ("config.json", "model.safetensors", TRAIN_STATE)
# What settings.json had before it had a checksum of its own.
FIRST_NAMES = ("step", "val_loss", "settings", "train_tokens", "chosen", "sha256")
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
# Those that a kill can leave under a temporary name: see files.write_whole.
WHOLE_FILES = (
    "metrics.jsonl",
    "wandb_id",
    "report.md",
    "loss.svg",
    "loss.png",
    "training.svg",
    "training.png",
)
# What an optimizer keeps of each parameter, by the rule of its group.
MOMENTS = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "sgd": {"momentum_buffer"},
    "muon": {"step", "momentum"},
}


# Settings that came after the first checkpoints, whose runs were as with today's defaults.
CAME_LATER = ("exact_gelu", "muon_learning_rate", "muon_momentum", "checkpoint_first", "hours")


@dataclasses.dataclass(frozen=True)
class RunState:
    """settings.json of a checkpoint. The first versions lacked what has a default here."""

    step: int  # updates so far
    # Nats a token; None if it was not evaluated at this step, or not finite.
    val_loss: float | None
    settings: dict
    train_tokens: int | None = None  # in data_dir
    train_sha256: str | None = None  # of the training shards: see data.digest_of_shards
    chosen: dict = dataclasses.field(default_factory=dict)  # the fields of auto.Arithmetic
    sha256: dict = dataclasses.field(default_factory=dict)  # file name -> its sum
    checksum: str | None = None  # of all of the above; see `checksum`


class ResumePoint(NamedTuple):
    """Where a run continues."""

    folder: Path
    state: RunState


# ---- Reading -------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> RunState:
    """settings.json of a checkpoint. ValueError if it is unreadable, or not as it was written."""
    try:
        content = read_json(checkpoint / SETTINGS, allow_nan=True)
        if "checksum" in content:
            if content["checksum"] != checksum(content):
                raise ValueError("it is not as it was written: its checksum differs")
        elif not content.keys() <= set(FIRST_NAMES):
            raise ValueError("it is not as it was written: its checksum is missing")
        known = {field.name for field in dataclasses.fields(RunState)}
        state = RunState(**{name: content[name] for name in known & content.keys()})
        problem = find_problem(state)
        if problem:
            raise ValueError(problem)
        check_number(checkpoint, state)
        return state
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint}: {SETTINGS} cannot be read ({error})") from None


def checksum(content: dict) -> str:
    """The SHA-256 of what settings.json says, without the checksum itself and the line breaks."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def find_problem(state: RunState) -> str:
    """What is of the wrong kind in a state that anyone may have written; empty if nothing is."""
    if not is_count(state.step):
        return "its step is no number of steps"
    if state.val_loss is not None and type(state.val_loss) not in (int, float):
        return "its val_loss is no number"
    if state.train_tokens is not None and not is_count(state.train_tokens):
        return "its train_tokens is no number of tokens"
    for name in ("settings", "chosen", "sha256"):
        if not isinstance(getattr(state, name), dict):
            return f"its {name} is no table of names and values"
    for name, digest in state.sha256.items():
        # A name alone: no file outside the checkpoint is any of its business.
        if Path(name).name != name or not isinstance(digest, str):
            return f"its sha256 of {name!r} is none"
    is_right = {
        "dtype": lambda value: value in tuple(DTYPES),
        "flash": lambda value: type(value) is bool,
        "threads": lambda value: type(value) is int and 1 <= value <= 4096,
        "compile": lambda value: type(value) is bool,
        "exact_norm": lambda value: type(value) is bool,
        "attention_kernel": lambda value: type(value) is bool,
    }
    for name, check in is_right.items():
        value = state.chosen.get(name)
        if value is not None and not check(value):
            return f"its chosen {name} is {value!r}"
    return ""


def check_number(checkpoint: Path, state: RunState) -> None:
    """ValueError if the folder is named after another step. Any other name is right."""
    name = checkpoint.absolute().name
    digits = name.removeprefix("step_")
    if name.startswith("step_") and digits.isdecimal() and int(digits) != state.step:
        raise ValueError(f"its step is {state.step}, not that of the folder's name")


def verify(checkpoint: Path) -> RunState:
    """A checkpoint's state. ValueError or OSError unless its files are as they were written."""
    state = read_state(checkpoint)
    for name in state.sha256 or FIRST_FILES:
        digest = sha256(checkpoint / name)
        if state.sha256.get(name, digest) != digest:
            raise ValueError(f"{checkpoint / name} is not as it was written: its SHA-256 differs")
    if not state.sha256:
        load_train_state(checkpoint)  # the only way to see whether it is whole
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
            print_lines(f"WARNING: a damaged checkpoint: {error}")
    if folders:
        raise ValueError(f"{out_dir}: no checkpoint is whole; start over with --resume=never")
    return None


def saved_settings(config) -> dict:
    """The settings of the checkpoint that config.resume stands for; {} if there is none.

    Damaged ones are passed over in silence: `find_resume_point` speaks of them.
    """
    folders = []
    if config.resume == "auto":
        folders = checkpoints(Path(config.out_dir))
    elif config.resume != "never":
        folders = [Path(config.resume)]
    for folder in reversed(folders):
        with contextlib.suppress(ValueError):
            return read_state(folder).settings
    return {}


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
        if not folder.is_dir():
            raise ValueError(f"resume={folder}: no such checkpoint; or use auto, or never")
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

    A setting that the checkpoint does not know is one that somebody has added since.
    """
    defaults = vars(type(config)())
    differences = {}
    for name, new in vars(config).items():
        if name not in saved and name not in CAME_LATER:
            differences[name] = f"{name} is new: {new}"
            continue
        old = saved.get(name, defaults[name])
        if old != new:
            differences[name] = f"{name} {old} -> {new}"
    return differences


def check_text(point: ResumePoint, config, n_tokens: int, digest: str | None) -> None:
    """ValueError if the training text is not the one that the checkpoint was trained on.

    n_tokens and digest are those of the shards: see data.digest_of_shards.
    """
    if config.resume_anyway:
        return
    state = point.state
    restore_it = "restore it, or add --resume_anyway=True"
    if state.train_tokens not in (None, n_tokens):
        raise ValueError(
            f"data_dir {config.data_dir} has {n_tokens:,} training tokens, "
            f"but {point.folder} was trained on {state.train_tokens:,}: {restore_it}"
        )
    if None not in (state.train_sha256, digest) and state.train_sha256 != digest:
        raise ValueError(
            f"data_dir {config.data_dir} has other training text than {point.folder} was trained "
            f"on, though as many tokens: {restore_it}"
        )


def restore(point: ResumePoint, config, names: list[str], share: OptimizerShare, scaler) -> str:
    """Restore optimizer and scaler; returns a line that says so.

    names: see `parameter_names`. ValueError if they were not saved by a run of this model.
    """
    # Ranks that share the optimizer out also share one copy of the file in memory.
    saved = load_train_state(point.folder, mmap=share.shared)
    try:
        if "parameters" in saved:
            saved["optimizer"] = in_order_of(names, saved["parameters"], saved["optimizer"])
        check_optimizer_state(saved["optimizer"], share.optimizer, names, config.resume_anyway)
        if scaler.is_enabled() and saved["scaler"]:
            check_scaler_state(saved["scaler"], scaler)
    except ValueError as error:
        raise ValueError(f"{point.folder / TRAIN_STATE}: {error}") from None
    share.load(saved["optimizer"])
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])

    line = f"resume: {point.folder}, after {point.state.step:,} steps"
    differences = compare_settings(point.state.settings, config)
    changed = [text for name, text in differences.items() if not name.startswith("resume")]
    if changed:
        line += f"; changed since then: {', '.join(changed)}"
    if point.state.checksum is None:
        line += (
            "\nNOTE: an earlier version saved it: "
            "its settings and its training text are under no checksum"
        )
    return line


def load_train_state(checkpoint: Path, mmap: bool = False) -> dict[str, dict]:
    """The states of the "optimizer" and the "scaler", on the CPU.

    ValueError if the file is damaged, OSError if it cannot be opened.
    """
    path = checkpoint / TRAIN_STATE
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many types
        reason = f"{error} ".splitlines()[0].strip()
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {reason})") from None
    for name in ("optimizer", "scaler"):
        if not isinstance(saved, dict) or not isinstance(saved.get(name), dict):
            raise ValueError(f"{path}: no state of the {name} is in it")
    return saved


def parameter_names(model: GPT, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [name_of[p] for group in optimizer.param_groups for p in group["params"]]


def in_order_of(names: list[str], saved_names: Any, state: dict) -> dict:
    """The state of parameters (index -> values) that were saved in another order, in this one.

    An optimizer knows parameters by their place only, and two may have the same shape. ValueError
    if they are not the same parameters.
    """
    if not isinstance(saved_names, list) or sorted(map(str, saved_names)) != sorted(names):
        raise ValueError("it is the state of another model: its parameters have other names")
    index_of = {name: index for index, name in enumerate(names)}
    in_order = {}
    for index, values in state.items():
        if index not in range(len(saved_names)):
            raise ValueError(
                f"it is the state of another model: "
                f"parameter {index} has no name among {len(saved_names)}"
            )
        in_order[index_of[saved_names[index]]] = values
    return in_order


def check_optimizer_state(
    state: dict, optimizer: torch.optim.Optimizer, names: list[str], anyway: bool
) -> None:
    """ValueError unless the state is one of this optimizer's parameters.

    The kernels of the optimizer trust shapes and dtypes, and the checksums beside a state protect
    it from accidents only: who writes a foreign folder writes them too. anyway: accept numbers that
    are not finite.
    """
    n_parameters = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = state.get(n_parameters, {})
            where = f"the optimizer's state of {names[n_parameters]}"
            n_parameters += 1
            if not isinstance(values, dict):
                raise ValueError(f"{where} is no table of names and tensors")
            # An empty state is right for a parameter that has had no update.
            expected = MOMENTS.get(group["rule"], values.keys())
            if values and values.keys() != expected:
                raise ValueError(f"{where} is no state of {group['rule']}")
            for name, value in values.items():
                # SGD without momentum has None.
                if value is not None:
                    problem = compare_moment(name, value, parameter, anyway)
                    if problem:
                        raise ValueError(f"{where}: {name} {problem}")
    if not state.keys() <= set(range(n_parameters)):
        raise ValueError(
            f"it is the state of another model: this one has {n_parameters} parameters"
        )


def compare_moment(name: str, value: Any, parameter: torch.Tensor, anyway: bool) -> str:
    """What is wrong with a tensor of a parameter's state, in words; empty if nothing is."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return "is no plain tensor"
    shape = () if name == "step" else tuple(parameter.shape)
    dtype = torch.float32 if name == "step" else parameter.dtype
    if tuple(value.shape) != shape or value.dtype != dtype:
        return f"is {value.dtype} {tuple(value.shape)}, but the model has it as {dtype} {shape}"
    if not anyway and not torch.isfinite(value).all():
        return "is not finite; --resume_anyway=True takes it as it is"
    return ""


def check_scaler_state(state: dict, scaler) -> None:
    """ValueError unless the state has the numbers that fp16's scaler has."""
    for name, own_value in scaler.state_dict().items():
        value: Any = state.get(name)
        if type(value) is not type(own_value) or not math.isfinite(value) or value < 0:
            raise ValueError(f"the scaler's {name} is {value!r}")


def finished_message(out_dir: Path, step: int, max_steps: int, command: str) -> str:
    """What to do with a run that has all its steps. command: the one that said so."""
    steps = f"it has {step:,} steps, max_steps is {max_steps:,}"
    return f"""{out_dir} is finished: {steps}{best_note(out_dir)}.
  to sample from it:  python sample.py --model {out_dir}
  to look at it:      python plot.py --report {out_dir}
  to train longer:    {command} --max_steps={2 * step} --resume_anyway=True
  to start over:      {command} --resume=never"""


def delete_unfinished(out_dir: Path) -> None:
    """Delete what killed runs have left behind in a run's folder, which must be locked."""
    for leftover in out_dir.glob(".step_*"):
        delete(leftover)
    for name in WHOLE_FILES:
        delete_leftovers(out_dir / name)


def make_room(out_dir: Path, point: ResumePoint | None) -> None:
    """Prepare a run's folder: delete leftovers of killed runs, and move what is in the way.

    The checkpoints later than the resume point move into a new folder beside out_dir, with a copy
    of metrics.jsonl. Without a resume point, or if it is another run's, all that a run has written
    here moves.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    delete_unfinished(out_dir)

    metrics = out_dir / "metrics.jsonl"
    moved = []
    continues = point is not None and is_in(out_dir, point)
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
        if not os.path.lexists(aside):
            break
    aside.mkdir()
    try:
        if continues and metrics.is_file():
            shutil.copy(metrics, aside)
        for path in moved:
            path.rename(aside / path.name)
    except OSError:
        # The next try makes a folder of its own.
        if not any((aside / path.name).exists() for path in moved):
            delete(aside)
        raise
    print_lines(f"files of the earlier run are moved to {aside}")


def is_in(out_dir: Path, point: ResumePoint) -> bool:
    """Whether a checkpoint is one of the run in this folder."""
    return point.folder.resolve().parent == out_dir.resolve()


# ---- Writing -------------------------------------------------------------------------------------


class Saver(contextlib.AbstractContextManager):
    """Writes checkpoints on a thread, one at a time, while training continues."""

    def __init__(self, out_dir: Path, keep: int, departure: str, say: Callable[[str], None]):
        """keep: how many of the newest checkpoints stay, 0 for all. departure: see pretrained."""
        self.out_dir = out_dir
        self.keep = keep
        self.departure = departure
        self.say = say
        self.snapshot = Snapshot()
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing = self.thread.submit(lambda: None)

    def __exit__(self, kind, *_) -> None:
        self.thread.shutdown(wait=kind is not KeyboardInterrupt)  # a second Ctrl-C does not wait

    def save(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        train_state: dict,
        state: RunState,
        live: bool = False,
    ) -> None:
        """Begin to write everything.

        train_state: the states of the "optimizer", see zero.OptimizerShare.collect, and of the
        "scaler", and the optimizer's "parameters", see `parameter_names`.
        live: the weights and the optimizer's state are written from where they are, so that
        `preserve` has to be called before they change. Otherwise the weights are copied now, and
        the optimizer's state is a copy already.
        OSError if there is no room, or if the checkpoint before could not be written.
        """
        self.wait()
        check_space(self.out_dir, model)
        weights = copy_state(model, self.departure, live)
        self.snapshot = Snapshot()
        if live:
            self.snapshot = Snapshot([*model.parameters(), *tensors_in(train_state["optimizer"])])
        self.writing = self.thread.submit(self.write, weights, tokenizer, train_state, state)

    def preserve(self) -> None:
        """Copy what has not been written yet, because weights and moments are about to change."""
        if not self.writing.done():
            self.snapshot.preserve()

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
            delete(aside)
            names = write(aside, weights, tokenizer.end_of_text, self.snapshot)
            names += save_tokenizer(tokenizer, aside, weights.config.block_size)
            self.snapshot.write_pt(train_state, aside / TRAIN_STATE)
            try:
                card = make_card(self.out_dir, state.step, weights.departure)
                (aside / "README.md").write_text(card, encoding="utf-8", errors="replace")
            except Exception as error:  # no card is worth a checkpoint
                delete(aside / "README.md")  # half a card is none
                self.say(f"NOTE: {folder} has no card ({type(error).__name__}: {error})")
            names.append(TRAIN_STATE)
            sums = {name: sha256(aside / name) for name in names}
            content = dataclasses.asdict(dataclasses.replace(state, sha256=sums))
            content["checksum"] = checksum(content)
            (aside / SETTINGS).write_text(json.dumps(content, indent=2) + "\n")
            # The records up to this step survive what the checkpoint survives.
            metrics = self.out_dir / "metrics.jsonl"
            if metrics.is_file():
                fsync(metrics)
            for path in (*aside.iterdir(), aside):
                fsync(path)
            aside.rename(folder)
            fsync(self.out_dir)
        except Exception as error:  # safetensors and torch.save have types of their own
            delete(aside)
            reason = str(error) or type(error).__name__
            raise OSError(
                f"{folder} could not be written ({reason}); disk full? Earlier ones are good"
            ) from error
        prune(self.out_dir, self.keep, self.say)
        self.say(f"step {state.step:,} | saved {folder}")


def prune(out_dir: Path, keep: int, say: Callable[[str], None]) -> None:
    """Delete all checkpoints but the newest `keep` and the best. keep = 0 keeps all."""
    if not keep:
        return
    kept = best(out_dir)
    for folder in checkpoints(out_dir)[:-keep]:
        if kept is not None and folder == kept.folder:
            continue
        gone = folder.with_name(f".{folder.name}.gone")
        delete(gone)
        try:
            # Renamed first: a folder under its own name is always whole.
            folder.rename(gone)
        except OSError as error:
            say(f"NOTE: an old checkpoint could not be deleted: {error}")
            continue
        # A file that is still open on NFS stays: the next start tries again.
        delete(gone)


def check_space(folder: Path, model: GPT) -> None:
    """OSError if there is no room for a checkpoint: float32 weights and two moments, about."""
    needed = 3 * 4 * model.num_params()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: a checkpoint takes {needed / 1e9:,.3g} GB, but only "
            f"{free / 1e9:,.3g} GB are free"
        )
