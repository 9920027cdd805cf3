"""Measured speed. Each figure comes from the functions that the scripts themselves call, and from interleaved rounds.

    python bench.py tokenize                               the source of Python's own library
    python bench.py tokenize text.parquet --workers 8      files of text, .jsonl or .parquet
    python bench.py hellaswag --data tasks.jsonl           the score's batches against one task at a time
    python bench.py sample --batch 32                      generation against transformers'

The table goes to the standard output, how far things are to the standard error.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import hellaswag
import runtime
from model import GPT, GPTConfig, resolve
from runtime import Runtime


def say(line: str) -> None:
    print(line, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# tokenize: data.py's pipeline, from files to shards, against tiktoken alone


def documents_of(files: list[Path], column: str) -> list[str]:
    parts = (part for piece in data.pieces_of(files, column) for part, _ in piece.documents())
    return [part.decode("utf-8", errors="replace") for part in parts]


def plain_tiktoken(files: list[Path], column: str) -> tuple[float, float]:
    """When a loop over documents in memory, with nothing but tiktoken in it, began and ended."""
    texts, encoding = documents_of(files, column), data.get_tokenizer("gpt2").encoding
    encoding.encode_to_numpy("warm")
    start = time.time()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return start, time.time()


def side_by_side(files: list[Path], column: str, n: int) -> float:
    """Seconds of that loop in n processes at once: the most that this machine's cores can give to n workers."""
    with multiprocessing.get_context(data.START_METHOD).Pool(n) as pool:
        times = pool.starmap(plain_tiktoken, [(files, column)] * n, chunksize=1)
    return statistics.mean(end - start for start, end in times)


def shard(files: list[Path], column: str, workers: int) -> tuple[float, int]:
    """Seconds from files to fsynced shards, without the start of the workers; and the tokens."""
    with tempfile.TemporaryDirectory() as folder, data.tokenising("gpt2", workers) as tokenise_all:
        warm = list(tokenise_all(data.Texts(1, [(b"warm", True)]) for _ in range(8 * workers)))
        assert len(warm) == 8 * workers
        (Path(folder) / "progress").mkdir()
        section = data.Section(
            Path(folder) / "progress" / "all.json",
            {"train": lambda n: Path(folder) / f"bench_train_{n:06d}.bin"},
            {"train": 100_000_000},
        )
        route, _ = data.split_for(files, 0.0, 0)
        size = sum(path.stat().st_size for path in files)
        start = time.time()
        with data.Bar(size, f"{workers} workers") as bar:
            section.write(data.pieces_of(files, column), tokenise_all, route, bar)
        return time.time() - start, sum(row["tokens"] for row in section.record["shards"]["train"])


def bench_tokenize(arguments: argparse.Namespace) -> dict:
    files = [Path(path) for path in arguments.files] or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    column, workers = arguments.text_column, arguments.workers or data.available_cpus()
    megabytes = sum(len(text.encode()) for text in documents_of(files, column)) / 1e6
    say(f"{len(files)} files, {megabytes:.1f} MB of text, {arguments.rounds} rounds")
    rounds = []
    for _ in range(arguments.rounds):
        start, end = plain_tiktoken(files, column)
        one, tokens = shard(files, column, 1)
        many, _ = shard(files, column, workers)
        at_once = side_by_side(files, column, workers) / workers
        rounds.append({"tiktoken": end - start, "one": one, "many": many, "at_once": at_once})
        say("  ".join(f"{name} {seconds:.2f} s" for name, seconds in rounds[-1].items()))
    seconds = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    ratios = {
        "1 worker / tiktoken alone": statistics.median(row["tiktoken"] / row["one"] for row in rounds),
        f"{workers} workers / ({workers} x tiktoken alone)": statistics.median(
            row["tiktoken"] / row["many"] / workers for row in rounds
        ),
        f"{workers} workers / tiktoken in {workers} processes at once": statistics.median(
            row["at_once"] / row["many"] for row in rounds
        ),
    }
    speeds = {name: {"MB/s": megabytes / s, "tokens/s": tokens / s} for name, s in seconds.items()}
    return {"workers": workers, "megabytes": megabytes, "tokens": tokens, "speed": speeds, "ratio": ratios}


def show_tokenize(result: dict) -> None:
    what = {
        "tiktoken": "tiktoken alone, one process",
        "one": "files to shards, 1 worker",
        "many": f"files to shards, {result['workers']} workers",
        "at_once": f"tiktoken alone, {result['workers']} processes at once",
    }
    for name, speed in result["speed"].items():
        print(f"{what[name]:42} {speed['MB/s']:8.1f} MB/s {speed['tokens/s'] / 1e6:8.2f}M tokens/s")
    for name, ratio in result["ratio"].items():
        print(f"{name:52} {ratio:.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# hellaswag: the score as the script computes it, against the way it is usually written


@torch.no_grad()
def one_at_a_time(model: GPT, tasks: list[hellaswag.Rendered], machine: Runtime) -> list[np.ndarray]:
    """Four rows, each with the context, padded at the right; logits and losses of every token; one task at a time."""
    found = []
    for task in tasks:
        rows = [torch.from_numpy(np.concatenate([task.context, ending]).astype(np.int64)) for ending in task.endings]
        idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(machine.device)  # (4, T)
        column = torch.arange(1, idx.size(1), device=machine.device)
        ends = torch.tensor([len(row) for row in rows], device=machine.device)
        of_ending = (column >= len(task.context)) & (column < ends[:, None])  # (4, T - 1)
        with machine.autocast():
            logits = model(idx)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none")
        found.append((losses.view(4, -1) * of_ending).sum(dim=1).cpu().numpy())
    return found


def bench_hellaswag(arguments: argparse.Namespace) -> dict:
    machine = runtime.start(arguments.device, arguments.dtype)
    model = GPT.from_pretrained(resolve(arguments.model)) if arguments.model else GPT(GPTConfig())
    model = model.to(machine.device).eval()
    packed = copy.deepcopy(model).pack(machine.dtype)  # as hellaswag.py has it
    tokenizer = data.get_tokenizer(model.config.vocab_size)
    tasks = hellaswag.examples(arguments.data, arguments.limit)
    rendered = [hellaswag.render(task, tokenizer, model.config.block_size) for task in tasks]
    some = rendered[:: max(1, len(rendered) // arguments.naive)]
    batches = hellaswag.batches_of(rendered, arguments.batch_tokens)
    useful = sum(map(len, rendered)) / sum(len(b) * max(len(rendered[i]) for i in b) for b in batches)
    say("; ".join(machine.notes))
    say(f"{len(tasks):,} tasks; {100 * useful:.1f} % of the tokens in {len(batches)} batches are not padding")
    one_at_a_time(model, some[:2], machine)
    hellaswag.ending_losses(packed, some[:2], machine)
    rounds = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        one_at_a_time(model, some, machine)
        naive = len(some) / (time.perf_counter() - start)
        start = time.perf_counter()
        hellaswag.evaluate(packed, tokenizer, machine, tasks, arguments.batch_tokens)
        ours = len(tasks) / (time.perf_counter() - start)
        rounds.append({"one at a time": naive, "in batches": ours, "ratio": ours / naive})
        say("  ".join(f"{name} {value:.2f}" for name, value in rounds[-1].items()))
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    return {"tasks": len(tasks), "useful": useful, "notes": machine.notes} | medians


def show_hellaswag(result: dict) -> None:
    print(f"one task at a time   {result['one at a time']:8.1f} tasks/s")
    print(f"in batches           {result['in batches']:8.1f} tasks/s, {100 * result['useful']:.1f} % useful tokens")
    print(f"ratio                {result['ratio']:8.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# sample: generation, against transformers' with its cache


def bench_sample(arguments: argparse.Namespace) -> dict:
    machine = runtime.start(arguments.device, arguments.dtype)
    say("; ".join(machine.notes))
    ours, theirs = the_same_model(machine)
    idx = torch.randint(50257, (arguments.batch, arguments.prompt_tokens), device=machine.device)
    prompts = idx.tolist()

    def generate_ours(n: int) -> None:
        ours.generate(prompts, n, temperature=0)

    def generate_theirs(n: int) -> None:
        theirs.generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None)

    both = {"ours": generate_ours, "transformers": generate_theirs}
    rounds, n = [], arguments.max_tokens
    for generate in both.values():
        generate(2)
    for _ in range(arguments.rounds):
        row = {}
        for name, generate in both.items():
            row[f"{name}, tokens/s"] = arguments.batch * n / seconds_of(generate, n, machine)
            row[f"{name}, first token, ms"] = 1000 * seconds_of(generate, 1, machine)
        rounds.append(row | {"ratio": row["ours, tokens/s"] / row["transformers, tokens/s"]})
        say("  ".join(f"{name} {value:.2f}" for name, value in rounds[-1].items()))
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def the_same_model(machine: Runtime) -> tuple:
    """An untrained GPT-2 124M, as ours and as transformers', both made ready to generate."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ours = GPT(GPTConfig())
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=machine.dtype)
    return ours.to(machine.device).eval().pack(machine.dtype), theirs.to(machine.device).eval()


def seconds_of(generate: Callable[[int], None], n: int, machine: Runtime) -> float:
    start = time.perf_counter()
    generate(n)
    machine.synchronize()
    return time.perf_counter() - start


def show_sample(result: dict) -> None:
    for name, value in result.items():
        print(f"{name:32} {value:10.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description="Measure speed on this machine; medians of rounds.")
    benches = parser.add_subparsers(dest="bench", required=True)
    tokenize = benches.add_parser("tokenize", help="text to shards, against tiktoken alone")
    tokenize.add_argument("files", nargs="*", help="text, .jsonl, .parquet (none: the source of Python's own library)")
    tokenize.add_argument("--text_column", default="text", help="of .jsonl and .parquet files (default: %(default)s)")
    tokenize.add_argument("--workers", type=int, help="processes (default: as many as there are CPUs)")

    score = benches.add_parser("hellaswag", help="the score's batches against one task at a time")
    score.add_argument("--model", help="as hellaswag.py takes it (none: an untrained GPT-2 124M, which is as fast)")
    score.add_argument("--data", metavar="FILE", help="tasks (none: the official ones, fetched once)")
    score.add_argument("--limit", type=int, default=500, help="the first so many; 0 is all (default: %(default)s)")
    score.add_argument("--naive", type=int, default=40, help="of them one at a time (default: %(default)s)")
    about_batch = "tokens in one forward pass (default: %(default)s)"
    score.add_argument("--batch_tokens", type=int, default=hellaswag.BATCH_TOKENS, help=about_batch)

    sample = benches.add_parser("sample", help="greedy generation with GPT-2 124M, against transformers'")
    sample.add_argument("--batch", type=int, default=1, help="prompts at once (default: %(default)s)")
    sample.add_argument("--prompt_tokens", type=int, default=16, help="length of each (default: %(default)s)")
    sample.add_argument("--max_tokens", type=int, default=256, help="new tokens (default: %(default)s)")

    for bench in (score, sample):
        bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
        bench.add_argument("--dtype", default="auto", choices=["auto", *runtime.DTYPES], help="(default: %(default)s)")
    for bench in (tokenize, score, sample):
        bench.add_argument("--rounds", type=int, default=3, help="how often all is measured (default: %(default)s)")
        bench.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    measure, show = {
        "tokenize": (bench_tokenize, show_tokenize),
        "hellaswag": (bench_hellaswag, show_hellaswag),
        "sample": (bench_sample, show_sample),
    }[arguments.bench]
    try:
        result = measure(arguments)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result)) if arguments.json else show(result)


if __name__ == "__main__":
    main()
