"""HellaSwag (Zellers et al. 2019): which of four endings continues a context? A random guess is right once in four.

    python hellaswag.py --model gpt2                              OpenAI's 124M, on all 10,042 tasks
    python hellaswag.py --model out/gpt2_124M --limit 1000        an own run's newest checkpoint, the first 1,000
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model gpt2-xl

A task is a line of JSON:

    {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
     "ctx": "A man is sitting on a roof. he", "split": "val", "split_type": "indomain", "label": 3,
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."],
     "source_id": "activitynet~v_-JhWjGDPHMY"}

    ind, source_id   where it comes from: a video's caption (ActivityNet) or an article (WikiHow)
    activity_label   what the video or article is about; not shown to the model
    ctx              the context: ctx_a, and ctx_b where the last sentence is begun
    endings, label   four of them, three written by a machine; the number of the right one, from 0
    split_type       whether the training split has the same activity (indomain) or not (zeroshot)

Completion style: the model never sees the endings side by side. Each follows the context, and the losses of its tokens
are summed. acc takes the ending with the lowest sum, acc_norm the one with the lowest mean a token. Published for
OpenAI's weights in this style (Karpathy, build-nanogpt), n = 10,042:

    gpt2     acc 0.2859   acc_norm 0.2955            gpt2-xl  acc 0.3842   acc_norm 0.4893
"""

import argparse
import functools
import http.client
import itertools
import json
import math
import os
import secrets
import shutil
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import configurator
import data
import generate
import runtime
from model import GPT
from pretrained import resolve
from runtime import Runtime

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
SHA256 = {"val": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"}
FOLDER = Path("shards/hellaswag")  # where the tasks are kept
WAITS = (2, 10)  # seconds before a download is tried again

PUBLISHED = {"gpt2": (0.2859, 0.2955), "gpt2-xl": (0.3842, 0.4893)}  # acc, acc_norm
BATCH_TOKENS = 8192  # tokens in one forward pass
LOGIT_ROWS = 256  # how many predictions are over the whole vocabulary at once: 50 MB in float32


@dataclass(frozen=True)
class Example:
    context: str
    endings: tuple[str, ...]
    label: int  # the number of the right ending


@dataclass(frozen=True)
class Rendered:
    """An example in tokens: the context once, and the endings that go on from it."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        """Tokens that go into the model: nothing follows an ending's last one, so it is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


# ----------------------------------------------------------------------------------------------------------------------
# The tasks


def examples(path: str | Path | None = None, limit: int = 0, split: str = "val") -> list[Example]:
    """The tasks of a file, or of the official one, which is fetched once; only the first `limit` unless it is 0.

    ValueError if a line is not a task.
    """
    path = Path(path or fetch(split))
    with open(path, encoding="utf-8", errors="replace") as file:
        numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        found = [read_example(line, f"{path}, line {n}") for n, line in itertools.islice(numbered, limit or None)]
    if not found:
        raise ValueError(f"{path}: no tasks in it; it should have one JSON object a line")
    return found


def read_example(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
        context, endings, label = record["ctx"], tuple(record["endings"]), int(record["label"])  # "3" in some copies
        texts = all(isinstance(text, str) for text in (context, *endings))
        if not texts or len(endings) != 4 or not 0 <= label < 4:
            raise ValueError("ctx must be a string, endings four strings, label 0 to 3")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: not a HellaSwag task ({type(error).__name__}: {error})") from None
    return Example(context, endings, label)


def fetch(split: str = "val") -> Path:
    """The official file, downloaded if it is not here yet. ValueError if that fails three times."""
    path, url = FOLDER / f"hellaswag_{split}.jsonl", URL.format(split=split)
    if path.is_file():
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{secrets.token_hex(4)}.part")  # no two processes write to the same file
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(url, timeout=30) as answer, open(part, "wb") as file:
                shutil.copyfileobj(answer, file)
                if answer.length:
                    raise ConnectionError(f"the connection broke off {answer.length:,} bytes before the end")
            digest = data.sha256(part)
            if SHA256.get(split, digest) != digest:
                raise ConnectionError("the SHA-256 of what arrived is not that of the official file")
            os.replace(part, path)
            return path
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            part.unlink(missing_ok=True)
            if wait is None:
                raise ValueError(
                    f"HellaSwag could not be fetched from {url} ({error}); without network, copy the file to {path}"
                ) from None
            time.sleep(wait)


# ----------------------------------------------------------------------------------------------------------------------
# Tasks -> batches. The four endings of a task follow its context in one row and do not see each other, so the context
# is computed once:
#
#     context context context | ending 0 | ending 1 ending 1 | ending 2 | ending 3
#     0       1       2         3          3        4          3          3            positions


@functools.lru_cache(maxsize=100_000)  # the tasks are the same at each evaluation of a run
def render(example: Example, tokenizer: data.Tokenizer, block_size: int) -> Rendered:
    """An example in tokens, cut to what a model with block_size positions can read.

    The context loses its beginning, as much as the longest ending needs. An ending longer than the window is judged by
    its beginning.
    """
    context = tokenizer.encode(example.context)
    context = context if len(context) else np.array([tokenizer.end_of_text], dtype=np.uint16)
    endings = tuple(tokenizer.encode(" " + ending)[:block_size] for ending in example.endings)
    room = block_size - max(len(ending) for ending in endings) + 1
    return Rendered(context[-room:], endings)


def batches_of(rendered: list[Rendered], batch_tokens: int) -> list[list[int]]:
    """Numbers of the tasks that go through the model together: of like length, batch_tokens with padding at most."""
    batches, longest = [], 0
    for i in sorted(range(len(rendered)), key=lambda i: (-len(rendered[i]), i)):
        full = batches and (len(batches[-1]) + 1) * longest > batch_tokens
        if not batches or full or len(rendered[i]) < 0.85 * longest:
            batches.append([])
            longest = len(rendered[i])
        batches[-1].append(i)
    return batches


def lay_out(rendered: list[Rendered]) -> tuple[np.ndarray, ...]:
    """A batch as arrays: ids, positions and parts (B, T); and one row for each token of an ending, (N) each.

    part is 0 in the context and behind the end, else 1 + the number of the ending. The rows: where in the flattened
    (B T) the token is predicted, the token, and 4 b + the number of the ending it belongs to (4: for four endings).
    """
    B, T = len(rendered), max(map(len, rendered))
    idx, position, part = np.zeros((3, B, T), dtype=np.int64)
    predicted_at, targets, owners = [], [], []
    for b, task in enumerate(rendered):
        n = len(task.context)
        idx[b, :n], position[b, :n] = task.context, np.arange(n)
        column = n
        for number, ending in enumerate(task.endings):
            end = column + len(ending) - 1
            idx[b, column:end], part[b, column:end] = ending[:-1], number + 1
            position[b, column:end] = n + np.arange(len(ending) - 1)
            # The context's last token predicts the first of each ending.
            predicted_at += [b * T + n - 1, *range(b * T + column, b * T + end)]
            targets.append(ending)
            owners += [b * len(task.endings) + number] * len(ending)
            column = end
        part[b, column:] = -1
    return idx, position, part, np.array(predicted_at), np.concatenate(targets).astype(np.int64), np.array(owners)


# ----------------------------------------------------------------------------------------------------------------------
# The score


@torch.no_grad()
def ending_losses(model: GPT, rendered: list[Rendered], machine: Runtime) -> np.ndarray:
    """The summed loss, in nats, of each ending of each task: (B, 4). ValueError if they are not numbers."""
    idx, position, part, predicted_at, targets, owners = lay_out(rendered)
    idx, position, part, predicted_at, targets = (
        torch.from_numpy(array).to(machine.device) for array in (idx, position, part, predicted_at, targets)
    )
    T = idx.size(1)
    before = torch.ones(T, T, dtype=torch.bool, device=machine.device).tril()
    same = part[:, :, None] == part[:, None, :]
    mask = before & (same | (part[:, None, :] == 0))  # (B, T, T): what came before in its own part, or in the context
    with machine.autocast():
        hidden = model.hidden(idx, position, mask[:, None]).flatten(0, 1)[predicted_at]  # (N, C)
        losses = [
            F.cross_entropy(model.logits(some).float(), target, reduction="none")
            for some, target in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS))
        ]
    losses = torch.cat(losses).cpu().double().numpy()  # (N)
    sums = np.bincount(owners, weights=losses).reshape(len(rendered), -1)
    # Equal endings are a tie, and must not be told apart by a rounding that depends on where they lie in the row.
    for row, task in zip(sums, rendered):
        first = {}
        row[:] = [row[first.setdefault(ending.tobytes(), i)] for i, ending in enumerate(task.endings)]
    if not np.isfinite(sums).all():
        raise ValueError("the model's losses are not numbers: it is damaged, or its training diverged")
    return sums


def score(sums: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses (B, 4) and numbers of tokens (B, 4) of the endings -> predictions by sum and by mean, (B) each.

    Of equals the first is taken.
    """
    return sums.argmin(axis=1), (sums / lengths).argmin(axis=1)


def evaluate(
    model: GPT,
    tokenizer: data.Tokenizer,
    machine: Runtime,
    tasks: list[Example],
    batch_tokens: int = BATCH_TOKENS,
    show_progress: bool = False,
) -> dict:
    """{"n", "acc", "acc_norm", ...} over the tasks. Each rank scores a share of them; all get the result.

    Nothing is drawn from a random generator, and the model is left as it was.
    """
    from tqdm import tqdm

    rendered = [render(task, tokenizer, model.config.block_size) for task in tasks]
    batches = batches_of(rendered, batch_tokens)[machine.rank :: machine.world_size]
    counts = torch.zeros(3, device=machine.device)  # tasks, right by sum, right by mean
    was_training = model.training
    model.eval()
    for batch in tqdm(batches, unit="batch", disable=None if show_progress else True, dynamic_ncols=True):
        some = [rendered[i] for i in batch]
        sums = ending_losses(model, some, machine)
        by_sum, by_mean = score(sums, np.array([[len(ending) for ending in task.endings] for task in some]))
        labels = np.array([tasks[i].label for i in batch])
        counts += torch.tensor([len(batch), (by_sum == labels).sum(), (by_mean == labels).sum()], device=machine.device)
    model.train(was_training)
    n, right, right_norm = (int(count) for count in machine.sum(counts).tolist())
    acc, acc_norm = right / n, right_norm / n
    return {
        "n": n,
        "acc": acc,
        "acc_norm": acc_norm,
        "acc_stderr": math.sqrt(acc * (1 - acc) / n),
        "acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / n),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hellaswag.py",
        description="Score a GPT-2 on HellaSwag, completion style.",
    )
    add = parser.add_argument
    add("--model", default="gpt2", help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: %(default)s)")
    add("--data", metavar="FILE", help="tasks, one JSON object a line (none: the official ones, fetched once)")
    add("--split", choices=["val", "train"], default="val", help="which of the official files (default: %(default)s)")
    add("--limit", type=int, default=0, metavar="N", help="only the first N tasks; 0 is all (default: %(default)s)")
    add(
        "--batch_tokens",
        type=int,
        default=BATCH_TOKENS,
        metavar="N",
        help="tokens in one forward pass, as memory allows (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", *runtime.DTYPES], help="of matrix products (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of sentences")
    arguments = parser.parse_args(argv)
    if arguments.limit < 0 or arguments.batch_tokens < 1:
        parser.error("--limit must be at least 0, --batch_tokens at least 1")
    return arguments


def hellaswag(arguments: argparse.Namespace) -> None:
    machine = runtime.start(arguments.device)
    if machine.is_main:
        examples(arguments.data, arguments.limit, arguments.split)  # one process fetches, and the others wait
    machine.barrier()
    tasks = examples(arguments.data, arguments.limit, arguments.split)
    source = resolve(arguments.model)
    model = GPT.from_pretrained(source)
    n_parameters = model.num_params()
    model, machine, note = generate.ready(model, machine, arguments.dtype, rows=1024)
    tokenizer = data.get_tokenizer(model.config.vocab_size)
    if machine.is_main:
        print(f"model: {source}, {n_parameters:,} parameters; {machine.note}; {note}", file=sys.stderr)
    start = time.perf_counter()
    result = evaluate(model, tokenizer, machine, tasks, arguments.batch_tokens, machine.is_main)
    seconds = time.perf_counter() - start
    if machine.is_main:
        result = {"model": str(source), "style": "completion"} | result | {"seconds": seconds}
        official = not arguments.data and arguments.split == "val" and not arguments.limit
        published = PUBLISHED.get(arguments.model, (None, None)) if official else (None, None)
        print(json.dumps(result) if arguments.json else in_words(result, published))
    machine.close()
    if machine.world_size > 1:
        # Past Python's end, in one run of ten a process aborts in a destructor of C++ (torch 2.13 with gloo, see LOG),
        # and torchrun would report a failure of work that is done.
        sys.stdout.flush()
        os._exit(0)


def in_words(result: dict, published: tuple[float | None, float | None]) -> str:
    lines = [f"HellaSwag, completion style, {result['n']:,} tasks:"]
    for name, figure, what in zip(("acc", "acc_norm"), published, ("lowest sum", "lowest mean a token")):
        beside = f"   published: {figure:.4f}" if figure else ""
        lines.append(f"  {name:9}{result[name]:.4f} +- {result[name + '_stderr']:.4f}  ({what}){beside}")
    return "\n".join([*lines, f"  {result['n'] / result['seconds']:.1f} tasks/s"])


@configurator.command("hellaswag.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        hellaswag(arguments)
    except torch.OutOfMemoryError:
        raise ValueError(f"out of memory; set --batch_tokens={arguments.batch_tokens // 2 or 1}") from None


if __name__ == "__main__":
    main()
