"""HellaSwag (Zellers et al. 2019): which of four endings continues a context? A random guess is
right once in four.

    python hellaswag.py --model gpt2                              OpenAI's 124M, on all 10,042 tasks
    python hellaswag.py --model out/gpt2_124M --limit 1000        an own run's newest checkpoint, the first 1,000
    python hellaswag.py --model gpt2 --style harness              as lm-evaluation-harness scores
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model gpt2-xl

A task is a line of JSON. The fields that count (the others say where it comes from):

    {"activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b":
    "he", "label": 3,
     "ctx": "A man is sitting on a roof. he", "endings": ["is using wrap to wrap a pair of skis.",
     "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a
     roof."]}

The model never sees the endings side by side. Each follows the context, and the losses of its
tokens are summed. acc takes the ending with the lowest sum, acc_norm the one with the lowest mean.
There are two styles:

    completion   ctx and endings as they are; the mean is a token's
    harness      as lm-evaluation-harness: cleaned texts; the mean is a character's; the context above becomes
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

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT
from parts import runtime
from parts.auto import prepare_for_inference
from parts.console import command
from parts.files import write_whole
from parts.metrics import PUBLISHED
from parts.pretrained import locate, resolve
from parts.runtime import Runtime
from parts.tokenizer import Tokenizer, tokenizer_of_model

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"  # 12 MB
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
HUB = "Rowan/hellaswag"  # the same tasks on the Hugging Face hub, for a machine that GitHub does not answer
N_TASKS = 10_042
FILE = Path("shards/hellaswag/hellaswag_val.jsonl")  # where it is kept
BATCH_TOKENS = 8192  # tokens in one forward pass
LOGIT_ROWS = 256  # how many predictions are over the whole vocabulary at once: 50 MB in float32


@dataclass(frozen=True)
class Example:
    context: str
    endings: tuple[str, ...]
    label: int  # the number of the right ending
    style: str = "completion"  # a key of PUBLISHED


@dataclass(frozen=True)
class Rendered:
    """An example in tokens: the context once, and the endings that go on from it."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        """Tokens that go into the model: nothing follows an ending's last one, so it is only
        predicted.
        """
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def clean(text: str) -> str:
    """Without the marks of WikiHow's articles, in the steps of lm-evaluation-harness (0.4.13, task
    version 1.0).
    """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def example_of(record: dict, style: str) -> Example:
    """A task from a line's record. ValueError, KeyError, TypeError or AttributeError if it is not
    one.
    """
    context, endings = record["ctx"], record["endings"]
    if style == "harness":
        context = clean(
            record["activity_label"] + ": " + record["ctx_a"] + " " + record["ctx_b"].capitalize()
        )
        endings = [clean(ending) for ending in endings]
    task = Example(
        context, tuple(endings), int(record["label"]), style
    )  # the label is "3" in some copies
    texts = all(isinstance(text, str) for text in (task.context, *task.endings))
    if not texts or len(task.endings) != 4 or not 0 <= task.label < 4:
        raise ValueError("ctx must be a string, endings four strings, label 0 to 3")
    return task


def examples(
    path: str | Path | None = None, limit: int = 0, style: str = "completion"
) -> list[Example]:
    """The tasks of a file (None: the official one), the first `limit` or all. ValueError for a line
    that is not one.
    """
    path, tasks = Path(path or fetch()), []
    lines = enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1)
    for number, line in [(number, line) for number, line in lines if line.strip()][: limit or None]:
        try:
            tasks.append(example_of(json.loads(line), style))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number}: not a HellaSwag task ({reason})") from None
    if not tasks:
        raise ValueError(f"{path}: no tasks in it; it should have one JSON object a line")
    return tasks


def fetch() -> Path:
    """The official file or the hub's copy, downloaded if it is not here yet. ValueError if that
    fails.
    """
    if not FILE.is_file():
        try:
            with urllib.request.urlopen(URL, timeout=30) as answer:
                content = answer.read()
            if hashlib.sha256(content).hexdigest() != SHA256:
                raise OSError("the SHA-256 of what arrived is not that of the official file")
        except (OSError, http.client.HTTPException) as error:
            content = from_hub(f"HellaSwag could not be fetched from {URL} ({error})")
        FILE.parent.mkdir(parents=True, exist_ok=True)
        write_whole(FILE, content)
    return FILE


def from_hub(problem: str) -> bytes:
    """The tasks of the dataset HUB as JSON lines. ValueError with both problems if that fails
    too.
    """
    try:
        import datasets
        from huggingface_hub.hf_api import HfApi

        commit = (
            HfApi().dataset_info(HUB, revision="main").sha
        )  # it fails at once; datasets would ask six times
        rows = datasets.load_dataset(HUB, split="validation", revision=commit, streaming=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        if len(lines) != N_TASKS:
            raise ValueError(f"{len(lines):,} tasks instead of {N_TASKS:,}")
        return "".join(lines).encode()
    except Exception as error:  # of the network, the hub, the dataset's card, or no such package
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{problem} nor from the hub's {HUB} ({reason}); copy the file to {FILE}"
        ) from None


# --------------------------------------------------------------------------------------------------
# Tasks -> batches. The four endings of a task follow its context in one row and do not see each
# other, so the context is computed once:
#
#     context context context | ending 0 | ending 1 ending 1 | ending 2 | ending 3
#     0       1       2         3          3        4          3          3            positions


@functools.lru_cache(maxsize=100_000)  # the tasks are the same at each evaluation of a run
def render(example: Example, tokenizer: Tokenizer, block_size: int) -> Rendered:
    """An example in tokens, cut to what a model with block_size positions can read.

    The context loses its beginning, as much as the longest ending needs. An ending longer than the
    window is judged by its beginning. In the harness style, the white space at a context's end is
    part of each ending.
    """
    text = example.context.rstrip() if example.style == "harness" else example.context
    between = example.context[len(text) :] + " "
    context = tokenizer.encode(text)
    context = context if len(context) else np.array([tokenizer.end_of_text], dtype=np.uint16)
    endings = tuple(tokenizer.encode(between + ending)[:block_size] for ending in example.endings)
    room = block_size - max(len(ending) for ending in endings) + 1
    return Rendered(context[-room:], endings)


def batches_of(rendered: list[Rendered], batch_tokens: int) -> list[list[int]]:
    """Numbers of the tasks that go through the model together: of like length, batch_tokens with
    padding at most.
    """
    batches, longest = [], 0
    for i in sorted(range(len(rendered)), key=lambda i: (-len(rendered[i]), i)):
        full = batches and (len(batches[-1]) + 1) * longest > batch_tokens
        if not batches or full or len(rendered[i]) < 0.85 * longest:
            batches.append([])
            longest = len(rendered[i])
        batches[-1].append(i)
    return batches


def lay_out(rendered: list[Rendered]) -> tuple[np.ndarray, ...]:
    """A batch as int64 arrays: ids, positions and parts (B, T); and for each token of an ending, in
    order, (N) each:

    where in the flattened (B T) it is predicted, and the token. A part is 0, or 1 + the number of
    the ending.
    """
    B, T = len(rendered), max(map(len, rendered))
    idx, position, part = np.zeros((3, B, T), dtype=np.int64)
    predicted_at, targets = [], []
    for b, task in enumerate(rendered):
        n = column = len(task.context)
        idx[b, :n], position[b, :n] = task.context, np.arange(n)
        for number, ending in enumerate(task.endings, 1):
            end = column + len(ending) - 1
            idx[b, column:end], part[b, column:end] = ending[:-1], number
            position[b, column:end] = np.arange(n, n + len(ending) - 1)
            # The context's last token predicts the first of each ending.
            predicted_at += [b * T + n - 1, *range(b * T + column, b * T + end)]
            targets.append(ending)
            column = end
    return idx, position, part, np.array(predicted_at), np.concatenate(targets).astype(np.int64)


@torch.no_grad()
def ending_losses(model: GPT, rendered: list[Rendered], machine: Runtime) -> np.ndarray:
    """The summed loss, in nats, of each ending of each task: (B, 4). ValueError if they are not
    numbers.
    """
    arrays = (torch.from_numpy(array).to(machine.device) for array in lay_out(rendered))
    idx, position, part, predicted_at, targets = arrays
    before = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool, device=machine.device).tril()
    same = part[:, :, None] == part[:, None, :]
    mask = before & (
        same | (part[:, None, :] == 0)
    )  # (B, T, T): what came before in its own part, or in the context
    with machine.autocast():
        hidden = model.hidden(idx, position, mask[:, None]).flatten(0, 1)[predicted_at]  # (N, C)
        losses = [
            F.cross_entropy(model.logits(some).float(), target, reduction="none")
            for some, target in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS))
        ]
    of_endings = (
        torch.cat(losses)
        .cpu()
        .double()
        .split([len(ending) for task in rendered for ending in task.endings])
    )
    sums = torch.stack([of_one.sum() for of_one in of_endings]).view(len(rendered), -1).numpy()
    if not np.isfinite(sums).all():
        raise ValueError(
            "the model's losses are not numbers: it is damaged, or its training diverged"
        )
    return sums


def evaluate(
    model: GPT, tokenizer, machine: Runtime, tasks: list[Example], show_progress=False
) -> dict:
    """{"style", "n", "acc", "acc_norm", ...} over the tasks. Each rank scores a share of them; all
    get the result.

    Nothing is drawn from a random generator, and the model is left as it was.
    """
    from tqdm import tqdm

    rendered = [render(task, tokenizer, model.config.block_size) for task in tasks]
    batches = batches_of(rendered, BATCH_TOKENS)[machine.rank :: machine.world_size]
    style = tasks[0].style
    measured = (
        tasks if style == "harness" else rendered
    )  # an ending's length is in characters or in tokens
    right = torch.zeros(2)  # tasks that the lowest sum and the lowest mean get right
    was_training = model.training
    model.eval()
    for batch in tqdm(
        batches, unit="batch", disable=None if show_progress else True, dynamic_ncols=True
    ):
        sums = ending_losses(model, [rendered[i] for i in batch], machine)  # (B, 4)
        lengths = np.array([[len(ending) for ending in measured[i].endings] for i in batch])
        labels = np.array([tasks[i].label for i in batch])
        with np.errstate(
            divide="ignore"
        ):  # an ending of marks only has no characters: its mean is infinite
            chosen = np.stack(
                [sums.argmin(axis=1), (sums / lengths).argmin(axis=1)]
            )  # (2, B); of equals, the first
        right += torch.from_numpy((chosen == labels).sum(axis=1))
    model.train(was_training)
    n = len(tasks)
    acc, acc_norm = (count / n for count in machine.sum(right.to(machine.device)).tolist())
    stderr, stderr_norm = (math.sqrt(p * (1 - p) / n) for p in (acc, acc_norm))
    result = {"style": style, "n": n, "acc": acc, "acc_norm": acc_norm}
    return result | {"acc_stderr": stderr, "acc_norm_stderr": stderr_norm}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("hellaswag.py", description="Score a GPT-2 on HellaSwag.")
    add = parser.add_argument
    add(
        "--model",
        default="gpt2",
        help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: %(default)s)",
    )
    add(
        "--data",
        metavar="FILE",
        help="tasks, one JSON object a line (none: the official ones, fetched once)",
    )
    add(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="only the first N tasks; 0 is all (default: %(default)s)",
    )
    add(
        "--style",
        default="completion",
        choices=[*PUBLISHED],
        help="how it is scored (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", *runtime.DTYPES],
        help="of matrix products (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object instead of sentences")
    arguments = parser.parse_args(argv)
    if arguments.limit < 0:
        parser.error("--limit must be at least 0")
    return arguments


def in_words(result: dict, published: tuple[float, float] | None) -> str:
    lines = [f"HellaSwag, {result['style']} style, {result['n']:,} tasks:"]
    mean = "lowest mean a " + ("character" if result["style"] == "harness" else "token")
    for i, (name, what) in enumerate([("acc", "lowest sum"), ("acc_norm", mean)]):
        beside = f"   published: {published[i]:.4f}" if published else ""
        lines.append(
            f"  {name:9}{result[name]:.4f} +- {result[name + '_stderr']:.4f}  ({what}){beside}"
        )
    return "\n".join([*lines, f"  {result['n'] / result['seconds']:.1f} tasks/s"])


@command("hellaswag.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    machine = runtime.start(arguments.device)
    tasks = machine.broadcast(
        machine.is_main and examples(arguments.data, arguments.limit, arguments.style)
    )
    source = resolve(arguments.model)
    folder = locate(source)
    model = GPT.from_pretrained(folder)
    tokenizer = tokenizer_of_model(folder, model.config.vocab_size)
    n_parameters = model.num_params()
    model, machine, note = prepare_for_inference(model, machine, arguments.dtype, rows=1024)
    if machine.is_main:
        print(
            f"model: {source}, {n_parameters:,} parameters\n{machine.note}\n{note}", file=sys.stderr
        )
    start = time.perf_counter()
    try:
        result = evaluate(model, tokenizer, machine, tasks, show_progress=machine.is_main)
    except torch.OutOfMemoryError:
        raise ValueError(
            "out of GPU memory; stop what else uses the GPU, or use --device=cpu"
        ) from None
    result = {"model": str(source)} | result | {"seconds": time.perf_counter() - start}
    if machine.is_main:
        published = (
            None
            if arguments.data or arguments.limit
            else PUBLISHED[arguments.style].get(arguments.model)
        )
        print(json.dumps(result) if arguments.json else in_words(result, published))
    machine.close()
    if machine.world_size > 1:
        # Past Python's end, in one run of ten a process aborts in a destructor of C++ (torch 2.13
        # with gloo, see LOG), and torchrun would report a failure of work that is done.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
