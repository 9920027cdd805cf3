"""HellaSwag (Zellers et al. 2019): which of four endings continues a context? A random guess is
right once in four.

    # OpenAI's 124M, on all 10,042 tasks.
    python hellaswag.py --model gpt2
    # The newest checkpoint of your own run, on the first 1,000 tasks.
    python hellaswag.py --model out/gpt2_124M --limit 1000
    # The score that lm-evaluation-harness would give.
    python hellaswag.py --model gpt2 --style harness
    # Eight GPUs share the tasks.
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model gpt2-xl

A task is a line of JSON. The fields that count (the others say where the task comes from):

    {"activity_label": "Roof shingle removal",
     "ctx_a": "A man is sitting on a roof.",
     "ctx_b": "he",
     "ctx": "A man is sitting on a roof. he",
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."],
     "label": 3}

The model never sees the endings side by side. Each follows the context, and the losses of its
tokens are summed. acc takes the ending with the lowest sum, acc_norm the one with the lowest mean.
There are two styles:

    completion   ctx and endings as they are; the mean is over the tokens of an ending
    harness      what lm-evaluation-harness does: the texts are cleaned, and the mean is over the
                 characters of an ending; the context above becomes
                 "Roof shingle removal: A man is sitting on a roof. He"
"""

import argparse
import functools
import hashlib
import http.client
import json
import math
import os
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model import GPT, GPTConfig, open_model
from parts import hub, runtime
from parts.auto import WEIGHTS, prepare_for_inference
from parts.console import OptionParser, command, path_option, print_note
from parts.files import check_is_file, delete_leftovers, lock, write_whole
from parts.json_files import parse_json
from parts.metrics import PUBLISHED
from parts.runtime import Runtime
from parts.standin import differ, exact_arithmetic, make_standin, random_ids
from parts.tokenizer import Tokenizer

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# 12 MB.
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
# The same tasks on the Hugging Face hub, in case GitHub cannot be reached.
HUB = "Rowan/hellaswag"
N_TASKS = 10_042
# Where the tasks are kept.
FILE = Path("shards/hellaswag/hellaswag_val.jsonl")

# Tokens in one forward pass.
BATCH_TOKENS = 8192
# So many predictions have logits over the whole vocabulary at once: 50 MB in float32.
LOGIT_ROWS = 256


# ---- Tasks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A task as text."""

    context: str
    endings: tuple[str, ...]
    # The index of the right ending.
    label: int
    # A key of PUBLISHED.
    style: str = "completion"


def examples(
    path: str | Path | None = None, limit: int = 0, style: str = "completion"
) -> list[Example]:
    """The tasks of a file (None: the official one), the first `limit` or all.

    Raises ValueError for a line that is not a task, and for a file without tasks.
    """
    path = Path(path or fetch())
    check_is_file(path)
    tasks: list[Example] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit and len(tasks) == limit:
            break
        try:
            tasks.append(parse_example(parse_json(line), style))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number}: not a HellaSwag task ({reason})") from None
    if not tasks:
        raise ValueError(f"{path}: no tasks in it; it should have one JSON object a line")
    return tasks


def parse_example(record: dict, style: str) -> Example:
    """The task in a line's JSON object. Raises ValueError, KeyError, TypeError or AttributeError if
    it is not one.
    """
    context = record["ctx"]
    endings = record["endings"]
    if style == "harness":
        sentence = record["activity_label"] + ": " + record["ctx_a"]
        context = clean(sentence + " " + record["ctx_b"].capitalize())
        endings = [clean(ending) for ending in endings]
    # The label is "3" instead of 3 in some copies.
    label = record["label"]
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    are_four = isinstance(endings, list) and len(endings) == 4
    if not are_four or not all(isinstance(text, str) for text in (context, *endings)):
        raise ValueError("ctx must be a string, endings a list of four strings")
    if type(label) is not int or not 0 <= label < 4:
        raise ValueError("label must be 0 to 3")
    return Example(context, tuple(endings), label, style)


def clean(text: str) -> str:
    """The text without the marks of WikiHow's articles, in the steps of lm-evaluation-harness
    (0.4.13, task version 1.0).
    """
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def fetch() -> Path:
    """The official file or the hub's copy, downloaded if it is not here yet. Raises ValueError if
    that fails.
    """
    if FILE.is_file():
        return FILE
    FILE.parent.mkdir(parents=True, exist_ok=True)
    # Two runs that start together fetch them once.
    with lock(FILE.with_suffix(".lock")):
        if not FILE.is_file():
            delete_leftovers(FILE)
            write_whole(FILE, download())
    return FILE


def download() -> bytes:
    """The tasks from either source. Raises ValueError if that fails."""
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise OSError("the SHA-256 of what arrived is not that of the official file")
    except (OSError, http.client.HTTPException) as error:
        return fetch_from_hub(f"HellaSwag could not be fetched from {URL} ({error})")
    return content


def fetch_from_hub(problem: str) -> bytes:
    """The tasks of the dataset HUB as lines of JSON. Raises ValueError if that fails too, with the
    `problem` of the first source in its message.
    """
    try:
        import datasets
        from huggingface_hub.hf_api import HfApi

        hub.limit_waits()
        # Without a network this fails at once; datasets would try six times.
        commit = HfApi().dataset_info(HUB, revision="main", timeout=hub.PATIENCE).sha
        rows = datasets.load_dataset(HUB, split="validation", revision=commit, streaming=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        if len(lines) != N_TASKS:
            raise ValueError(f"{len(lines):,} tasks instead of {N_TASKS:,}")
        return "".join(lines).encode()
    # The network, the hub or the dataset's card can be at fault, or a package is missing.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{problem} nor from the hub's {HUB} ({reason}); copy the file to {FILE}"
        ) from None


# ---- Tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """A task in tokens: the context once, and the endings that continue it."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        """How many tokens the model reads. The last token of an ending is only predicted, because
        nothing follows it.
        """
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


# The tasks are the same at each evaluation of a run.
@functools.lru_cache(maxsize=100_000)
def render(example: Example, tokenizer: Tokenizer, block_size: int) -> Rendered:
    """A task in tokens, cut to what a model with block_size positions can read.

    The context loses its beginning, as much as the longest ending needs. An ending longer than
    block_size loses its end. In the harness style, white space at the end of the context becomes
    part of each ending.
    """
    text = example.context
    if example.style == "harness":
        text = text.rstrip()
    between = example.context[len(text) :] + " "
    context = tokenizer.encode(text)
    if len(context) == 0:
        context = np.array([tokenizer.start], dtype=np.uint16)
    endings = tuple(tokenizer.encode(between + ending)[:block_size] for ending in example.endings)
    max_context = block_size - max(len(ending) for ending in endings) + 1
    return Rendered(context[-max_context:], endings)


def make_batches(rendered: list[Rendered], batch_tokens: int) -> list[list[int]]:
    """Indices of the tasks that go through the model together: tasks of similar length, with at
    most batch_tokens tokens, padding included.
    """
    batches: list[list[int]] = []
    longest = 0
    longest_first = sorted(range(len(rendered)), key=lambda i: (-len(rendered[i]), i))
    for i in longest_first:
        is_full = bool(batches) and (len(batches[-1]) + 1) * longest > batch_tokens
        if not batches or is_full or len(rendered[i]) < 0.85 * longest:
            batches.append([])
            longest = len(rendered[i])
        batches[-1].append(i)
    return batches


# ---- Losses --------------------------------------------------------------------------------------
# The four endings of a task share one row behind their context, and a mask keeps them from seeing
# each other. So the context is computed once:
#
#     context context context | ending 0 | ending 1 ending 1 | ending 2 | ending 3
#     0       1       2         3          3        4          3          3            positions
#
# This is right for a model that knows where a token stands by its position alone, such as GPT-2.
# A model that counts columns (a sliding window, biases by distance, a convolution over time) would
# compute something else. can_share_rows finds that out; then each ending has a row of its own.


class SharedRows(NamedTuple):
    """A batch of tasks, one in a row, as int64 arrays."""

    # Token ids (B, T).
    idx: np.ndarray
    # The position that each token would have if its ending stood alone behind the context (B, T).
    position: np.ndarray
    # 0 in the context and the padding, 1 + the number of the ending in an ending (B, T).
    part: np.ndarray
    # For each token of each ending, in order (N): its index, in the flattened (B T), is that of the
    # token that predicts it.
    predicted_at: np.ndarray
    # The tokens themselves (N).
    targets: np.ndarray


def lay_out(rendered: list[Rendered]) -> SharedRows:
    """Put each task into a row of its own, padded at the right."""
    B = len(rendered)
    T = max(len(task) for task in rendered)
    idx, position, part = np.zeros((3, B, T), dtype=np.int64)
    predicted_at = []
    targets = []
    for b, task in enumerate(rendered):
        n = len(task.context)
        idx[b, :n] = task.context
        position[b, :n] = np.arange(n)
        start = n
        for number, ending in enumerate(task.endings, 1):
            end = start + len(ending) - 1
            idx[b, start:end] = ending[:-1]
            position[b, start:end] = np.arange(n, n + len(ending) - 1)
            part[b, start:end] = number
            # The last token of the context predicts the first of each ending.
            predicted_at.append(b * T + n - 1)
            predicted_at += range(b * T + start, b * T + end)
            targets.append(ending)
            start = end
    all_targets = np.concatenate(targets).astype(np.int64)
    return SharedRows(idx, position, part, np.array(predicted_at), all_targets)


def losses_in_shared_rows(
    model: GPT, rendered: list[Rendered], machine: Runtime, dtype: torch.dtype
) -> torch.Tensor:
    """The loss of each token of each ending, in order: (N) float32, in nats."""
    arrays = (torch.from_numpy(array).to(machine.device) for array in lay_out(rendered))
    idx, position, part, predicted_at, targets = arrays
    T = idx.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=machine.device).tril()
    same_part = part[:, :, None] == part[:, None, :]
    of_context = part[:, None, :] == 0
    mask = causal & (same_part | of_context)  # (B, T, T)
    losses = []
    with machine.autocast(dtype):
        hidden = model.hidden(idx, position=position, mask=mask[:, None])  # (B, T, C)
        hidden = hidden.flatten(0, 1)[predicted_at]  # (N, C)
        for chunk, target in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
            logits = in_float32(model.logits(chunk))
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses)


def losses_in_separate_rows(
    model: GPT, rendered: list[Rendered], machine: Runtime, dtype: torch.dtype
) -> torch.Tensor:
    """The same, by the definition: a row for each ending, which is plain text to the model."""
    losses = []
    for task in rendered:
        rows = []
        for ending in task.endings:
            row = np.concatenate([task.context, ending[:-1]]).astype(np.int64)
            rows.append(torch.from_numpy(row))
        # Padding at the right is in no token's past.
        idx = pad_sequence(rows, batch_first=True).to(machine.device)
        with machine.autocast(dtype):
            logits = model(idx)  # (endings, T, V)
        first = len(task.context) - 1
        for row_logits, ending in zip(logits, task.endings):
            target = torch.from_numpy(ending.astype(np.int64)).to(machine.device)
            ending_logits = in_float32(row_logits[first : first + len(ending)])
            losses.append(F.cross_entropy(ending_logits, target, reduction="none"))
    return torch.cat(losses)


def in_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits of a lower precision in float32; those of a stand-in stay in float64."""
    if logits.dtype == torch.float64:
        return logits
    return logits.float()


@torch.no_grad()
def ending_losses(
    model: GPT,
    rendered: list[Rendered],
    machine: Runtime,
    dtype: torch.dtype = torch.float32,
    share_rows: bool = True,
) -> np.ndarray:
    """The summed loss, in nats, of each ending of each task: (B, 4) float64.

    Matrix products are in dtype. Raises ValueError if a sum is not a finite number.
    """
    compute_losses = losses_in_shared_rows if share_rows else losses_in_separate_rows
    with runtime.changing_shapes(machine.device):
        losses = compute_losses(model, rendered, machine, dtype).cpu().double()
    lengths = [len(ending) for task in rendered for ending in task.endings]
    each = torch.stack([ending.sum() for ending in losses.split(lengths)])
    sums = each.view(len(rendered), -1).numpy()
    if not np.isfinite(sums).all():
        raise ValueError(
            "the model's losses are not numbers: it is damaged, or its training diverged"
        )
    return sums


@functools.cache
def can_share_rows(cls: Any, config: GPTConfig) -> bool:
    """Whether the endings of a task can share a row with models of this class and config.

    Numbers decide: the losses of a made-up task are computed both ways by a stand-in. Its row is
    longer than the context, as rows of real tasks are.
    """
    model = make_standin(cls, config)
    n_context = max(1, min(config.block_size, 512) * 3 // 4)
    n_ending = min(config.block_size, 512) - n_context + 1
    ids = random_ids(model, n_context + 4 * n_ending).numpy().astype(np.uint16)
    endings = tuple(np.split(ids[n_context:], 4))
    task = Rendered(ids[:n_context], endings)
    alone = Runtime(torch.device("cpu"))
    with exact_arithmetic():
        expected = losses_in_separate_rows(model, [task], alone, torch.float32)
        try:
            losses = losses_in_shared_rows(model, [task], alone, torch.float32)
        except Exception:  # it takes no positions and no mask, or no row longer than block_size
            return False
    return not differ(losses, expected)


# A run asks before each of its scores; the note is printed the first time.
@functools.cache
def note_separate_rows() -> None:
    from tqdm import tqdm

    note = (
        "NOTE: HellaSwag: this model computes something else where the endings of a task share a "
        "row. Each ending gets a row of its own; that is right, and slower."
    )
    # Above a progress bar, if there is one.
    tqdm.write(note, file=sys.stderr)


# ---- The score -----------------------------------------------------------------------------------


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    machine: Runtime,
    tasks: list[Example],
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> dict:
    """{"style", "n", "acc", "acc_norm", ...} over the tasks. Each rank scores a share of them; all
    get the result.

    dtype is the precision of matrix products. Nothing is drawn from torch's random generator, and
    the model is left as it was.
    """
    from tqdm import tqdm

    cls: Any = type(model)
    share_rows = can_share_rows(cls, model.config)
    if not share_rows and machine.is_main:
        note_separate_rows()
    rendered = [render(task, tokenizer, model.config.block_size) for task in tasks]
    batches = make_batches(rendered, BATCH_TOKENS)[machine.rank :: machine.world_size]
    # None: on a terminal only.
    bar_off = None if show_progress else True
    was_training = model.training
    model.eval()
    # How many tasks are right by the lowest sum, and by the lowest mean.
    right = torch.zeros(2)
    for batch in tqdm(batches, unit="batch", disable=bar_off, dynamic_ncols=True):
        sums = ending_losses(model, [rendered[i] for i in batch], machine, dtype, share_rows)
        lengths = np.array([ending_lengths(tasks[i], rendered[i]) for i in batch])  # (B, 4)
        labels = np.array([tasks[i].label for i in batch])
        # An ending that is empty after cleaning has length 0: its mean is infinite.
        with np.errstate(divide="ignore"):
            means = sums / lengths
        # Of equal endings, the first is chosen.
        right[0] += int((sums.argmin(axis=1) == labels).sum())
        right[1] += int((means.argmin(axis=1) == labels).sum())
    model.train(was_training)
    n = len(tasks)
    n_right, n_right_norm = machine.sum(right.to(machine.device)).tolist()
    acc = n_right / n
    acc_norm = n_right_norm / n
    return {
        "style": tasks[0].style,
        "n": n,
        "acc": acc,
        "acc_norm": acc_norm,
        "acc_stderr": math.sqrt(acc * (1 - acc) / n),
        "acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / n),
    }


def ending_lengths(task: Example, rendered: Rendered) -> list[int]:
    """What acc_norm divides the loss of each ending by: its number of characters in the harness
    style, of tokens in the completion style.
    """
    if task.style == "harness":
        return [len(text) for text in task.endings]
    return [len(tokens) for tokens in rendered.endings]


def score_lines(result: dict, published: tuple[float, float] | None) -> str:
    """The result of `evaluate`, with its "seconds", in lines for a person."""
    unit = "character" if result["style"] == "harness" else "token"
    meanings = {"acc": "lowest sum", "acc_norm": f"lowest mean a {unit}"}
    lines = [f"HellaSwag, {result['style']} style, {result['n']:,} tasks:"]
    for i, (name, meaning) in enumerate(meanings.items()):
        line = f"  {name:9}{result[name]:.4f} +- {result[name + '_stderr']:.4f}  ({meaning})"
        if published:
            line += f"   published: {published[i]:.4f}"
        lines.append(line)
    lines.append(f"  {result['n'] / result['seconds']:.1f} tasks/s")
    return "\n".join(lines)


# ---- The command ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OptionParser("hellaswag.py", description="Score a GPT-2 on HellaSwag.")

    def add(name: str, text: str, **options) -> None:
        parser.add_argument(name, help=text, **options)

    model = "gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: %(default)s)"
    data = "tasks, one JSON object a line (none: the official ones, fetched once)"
    limit = "only the first N tasks; 0 is all (default: %(default)s)"
    dtypes = ["auto", *WEIGHTS]
    add("--model", model, default="gpt2", type=path_option)
    add("--data", data, metavar="FILE", type=path_option)
    add("--limit", limit, type=int, default=0, metavar="N")
    add(
        "--style",
        "how it is scored (default: %(default)s)",
        default="completion",
        choices=[*PUBLISHED],
    )
    add("--device", "auto, cpu, cuda, cuda:1 or mps (default: %(default)s)", default="auto")
    add(
        "--dtype",
        "of matrix products; int8: 8-bit weights on a CPU (default: %(default)s)",
        default="auto",
        choices=dtypes,
    )
    add("--json", "print one JSON object instead of sentences", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.limit < 0:
        parser.error("--limit must be at least 0")
    return arguments


@command("hellaswag.py", "stop what else uses it, or use --device=cpu")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    machine = runtime.start(arguments.device)
    tasks = []
    if machine.is_main:
        tasks = examples(arguments.data, arguments.limit, arguments.style)
    tasks = machine.broadcast(tasks)
    model, tokenizer, source = open_model(arguments.model)
    n_parameters = model.num_params()
    prepared = prepare_for_inference(model, machine, arguments.dtype, rows=1024)
    if machine.is_main:
        print_note(f"model: {source}, {n_parameters:,} parameters")
        print_note(f"{machine.note}\n{prepared.note}")
    start = time.perf_counter()
    result = evaluate(
        prepared.model,
        tokenizer,
        machine,
        tasks,
        dtype=prepared.packing.dtype,
        show_progress=machine.is_main,
    )
    seconds = time.perf_counter() - start
    result = {"model": str(source), **result, "seconds": seconds}
    if machine.is_main and arguments.json:
        print(json.dumps(result))
    elif machine.is_main:
        published = None
        if not arguments.data and not arguments.limit:
            published = PUBLISHED[arguments.style].get(arguments.model)
        print(score_lines(result, published))
    machine.close()
    if machine.world_size > 1:
        # At Python's end, in one run of ten a process aborts in a destructor of C++ (torch 2.13
        # with gloo, see LOG), and torchrun would report a failure of work that is done.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
