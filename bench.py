"""Measured speed. Each figure comes from the functions that the scripts themselves call, and from
interleaved rounds.

    python bench.py tokenize text.parquet --workers 8      files to shards, against tiktoken alone in as many processes
    python bench.py hellaswag --data tasks.jsonl           the score's batches against one task at a time
    python bench.py sample --batch 32                      generation against transformers'
    python bench.py train --batch_size 8                   a training step against transformers', and what it waits for
    python bench.py ladder                                 what each of a step's speed-ups brings, one after the other
    python bench.py choices --size quickstart --batch_size 16 --block_size 128     what auto chooses, against the rest
    python bench.py memory                                 which batch of which GPT-2 fits into which GPU, counted
    python bench.py plan --gpus 64 --model gpt2-xl         a run on paper: time, cost, what saturates first
    python bench.py show results/cpu/ladder.json           the table of a result printed with --json

A result has bench, device, torch, settings, rows {name: {column: figure}} and ratios {name: times
the baseline}, all of them medians of the rounds. The row of a run that failed, as one that is out
of memory, is null.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import hellaswag
import train
from model import GPT, SIZES, GPTConfig
from parts import auto, data, inference, runtime
from parts import loss as head
from parts.auto import prepare_for_inference
from parts.console import command
from parts.documents import documents_of
from parts.metrics import of_kind, read_metrics
from parts.runtime import Runtime
from parts.sharding import START_METHOD, available_cpus, pieces_of, shard_files, tokenising
from parts.tokenizer import get_tokenizer


def rate(n: float, machine: Runtime, work: Callable, *arguments, **options) -> float:
    """How many a second, if this call of `work` does n of them."""
    machine.synchronize()
    begin = time.perf_counter()
    work(*arguments, **options)
    machine.synchronize()
    return n / (time.perf_counter() - begin)


def interleaved(runs: dict[str, Callable[[], dict]], rounds: int, baseline: str) -> dict:
    """Rows and ratios of runs that return {column: figure}. Each round has every run, so a busy
    minute meets all.

    Ratios are those of the first column. Nothing warms up, as the median of three rounds leaves out
    a slow first one. A run that fails costs no other its figures. ValueError if all fail.
    """
    found = {name: [] for name in runs}
    for _ in range(max(1, rounds)):
        for name, run in runs.items():
            try:
                found[name].append(run())
                said = "  ".join(
                    f"{column} {value:,.2f}" for column, value in found[name][-1].items()
                )
            except (
                Exception
            ) as error:  # out of memory in most cases, but also a compiler that is not there
                found[name].append(None)
                said = f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"
            print(f"{name:32} {said}", file=sys.stderr)
    rows, ratios = dict.fromkeys(runs), {}
    for name, each in found.items():
        if None not in each:
            rows[name] = {
                column: statistics.median(row[column] for row in each) for column in each[0]
            }
            if None not in found[baseline]:
                (speed, *_), pairs = each[0], zip(each, found[baseline])
                ratios[name] = statistics.median(
                    ours[speed] / theirs[speed] for ours, theirs in pairs
                )
    if not any(rows.values()):
        raise ValueError(f"nothing could be measured: {said}")
    return dict(rows=rows, ratios=ratios)


def texts_of(files: list[Path]) -> list[str]:
    return [
        t.decode(errors="replace") for piece in pieces_of(documents_of(files)) for _, _, t in piece
    ]


def plain_tiktoken(files: list[Path]) -> float:
    """Seconds of a loop over texts in memory, with nothing but tiktoken in it."""
    texts, encoding = texts_of(files), get_tokenizer("gpt2").encoding
    begin = time.perf_counter()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return time.perf_counter() - begin


def bench_tokenize(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Text to shards, against tiktoken alone in as many processes."""
    files = [Path(path) for path in arguments.files] or sorted(
        Path(sysconfig.get_path("stdlib")).glob("*.py")
    )
    workers = arguments.workers = arguments.workers or available_cpus()
    megabytes = sum(len(text.encode()) for text in texts_of(files)) / 1e6

    def side_by_side() -> dict:
        with multiprocessing.get_context(START_METHOD).Pool(workers) as pool:
            return {
                "MB/s": workers
                * megabytes
                / statistics.mean(pool.map(plain_tiktoken, [files] * workers, 1))
            }

    def shards() -> dict:  # fsynced; the start of the workers is not counted
        with tempfile.TemporaryDirectory() as folder, tokenising("gpt2", workers) as tokenise_all:
            out, tokenizer, begin = (
                Path(folder) / "bench",
                get_tokenizer("gpt2"),
                time.perf_counter(),
            )
            rows = shard_files(files, out, tokenise_all, tokenizer, {"train": 100_000_000})
            seconds = time.perf_counter() - begin
        return {
            "MB/s": megabytes / seconds,
            "tokens/s": sum(row["tokens"] for row in rows["train"]) / seconds,
        }

    alone = f"tiktoken alone, {workers} process{'es' * (workers > 1)}"
    return interleaved(
        {alone: side_by_side, f"shards, {workers} workers": shards}, arguments.rounds, alone
    )


@torch.no_grad()
def one_at_a_time(model: GPT, tasks: list[hellaswag.Rendered], machine: Runtime) -> None:
    """Four rows, each with the context, padded at the right; logits and losses of every token; one
    task at a time.
    """
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    for task in tasks:
        rows = [
            torch.from_numpy(np.concatenate([task.context, ending]).astype(np.int64))
            for ending in task.endings
        ]
        idx, targets = (
            pad(rows).to(machine.device),
            pad(rows, padding_value=-100).to(machine.device),
        )  # (4, T)
        targets[:, : len(task.context)] = -100  # cross_entropy leaves it out
        with machine.autocast():
            logits = model(idx)[:, :-1]
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets[:, 1:].flatten(), reduction="none"
        )
        losses.view(4, -1).sum(dim=1).tolist()


def bench_hellaswag(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """The score's batches against one task at a time, by an untrained GPT-2 124M, which is as
    fast.
    """
    tokenizer, model = get_tokenizer("gpt2"), GPT(GPTConfig()).to(machine.device).eval()
    packed, machine, why = prepare_for_inference(
        copy.deepcopy(model), machine, arguments.dtype, rows=1024
    )
    print(why, file=sys.stderr)
    tasks = hellaswag.examples(arguments.data, arguments.limit)
    some = [hellaswag.render(task, tokenizer, 1024) for task in tasks[:: max(1, len(tasks) // 40)]]

    score = functools.partial(hellaswag.evaluate, packed, tokenizer, machine, tasks)
    runs = {"in batches": lambda: {"tasks/s": rate(len(tasks), machine, score)}}
    runs["one at a time"] = lambda: {
        "tasks/s": rate(len(some), machine, one_at_a_time, model, some, machine)
    }
    return interleaved(runs, arguments.rounds, "one at a time")


def bench_sample(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Greedy generation by an untrained GPT-2 124M after 16 tokens, against transformers'."""
    ours, machine, why = prepare_for_inference(
        GPT(GPTConfig()).eval(), machine, arguments.dtype, rows=arguments.batch
    )
    print(why, file=sys.stderr)
    theirs = gpt2_of_transformers(1024, **SIZES["gpt2"]).to(machine.device, machine.dtype).eval()
    B, n = arguments.batch, arguments.max_tokens
    idx = torch.randint(50257, (B, 16), device=machine.device)
    greedy = dict(
        max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    write_ours = functools.partial(inference.generate, ours, idx.tolist(), n, temperature=0)
    runs = {"ours": lambda: {"tokens/s": rate(B * n, machine, write_ours)}}
    runs["transformers"] = lambda: {
        "tokens/s": rate(B * n, machine, theirs.generate, idx, **greedy)
    }
    return interleaved(runs, arguments.rounds, "transformers")


# ---- train and ladder: steps of train.py itself, each run a process of its own -------------------

SHAPES = SIZES | {"quickstart": dict(n_layer=3, n_head=2, n_embd=128)}

# The lecture's order. Each rung keeps the settings of those below it.
LADDER = {
    "float32": dict(
        dtype="fp32", tf32=False, compile=False, flash=False, pad_vocab=False, fused=False
    ),
    "TF32": dict(tf32=True),
    "bf16 autocast": dict(dtype="bf16"),
    "torch.compile": dict(compile=True),
    "flash attention": dict(flash=True),
    "padded vocabulary": dict(pad_vocab=True),
    "fused AdamW": dict(fused=True),
    "4 micro-steps": dict(accumulate=4),
}


def steps_of_train(arguments: argparse.Namespace, accumulate: int = 1, **settings) -> dict:
    """`python train.py` with these settings on random tokens: medians over its steps but the
    first.
    """
    B, T, n_steps = arguments.batch_size, arguments.block_size, 1 + arguments.steps
    total = B * T * accumulate
    settings = (
        dict(eval_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0, report=False)
        | settings
    )
    settings |= dict(
        batch_size=B, block_size=T, total_batch_size=total, max_steps=n_steps, warmup_steps=0
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = "bytes" if arguments.size == "quickstart" else "gpt2"
        tokens = np.random.default_rng(0).integers(
            0, 256, (total + B * T) * (n_steps + 1), dtype=np.uint16
        )
        data.write_shard(Path(folder, "tokens_train_000001.bin"), tokens)
        Path(folder, "meta.json").write_text(json.dumps(dict(tokenizer=tokenizer)))
        settings |= (
            dict(data_dir=folder, out_dir=folder, device=arguments.device) | SHAPES[arguments.size]
        )
        command = [
            sys.executable,
            train.__file__,
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise ValueError(
                f"train.py ended with {run.returncode}: {(run.stderr.splitlines() or ['?'])[-1]}"
            )
        steps = of_kind(read_metrics(Path(folder, "metrics.jsonl")), "train")[1:]
    ms, waits = (
        statistics.median(step["ms"] for step in steps),
        [step["waited_ms"] for step in steps],
    )
    figures = {"tokens/s": 1000 * total / ms, "ms": ms, "GB": steps[-1]["memory_gb"] or 0}
    return figures | {"wait ms": statistics.median(waits), "max wait ms": max(waits)}


def steps_of_transformers(
    arguments: argparse.Namespace, machine: Runtime, dtype: torch.dtype, compiled: bool
) -> dict:
    """The same steps as most people write them: GPT2LMHeadModel, autocast, fused AdamW,
    clipping.
    """
    B, T = arguments.batch_size, arguments.block_size
    model = gpt2_of_transformers(T, **SHAPES[arguments.size]).to(machine.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    forward, idx = (
        torch.compile(model) if compiled else model,
        torch.randint(50257, (B, T), device=machine.device),
    )

    def step() -> None:
        with torch.autocast(machine.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    speeds = [rate(B * T, machine, step) for _ in range(1 + arguments.steps)]
    speed = statistics.median(speeds[1:])
    return {"tokens/s": speed, "ms": 1000 * B * T / speed, "GB": machine.peak_memory() or 0}


def gpt2_of_transformers(T: int, **shape) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape |= dict(n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape))


def as_train_chooses(arguments: argparse.Namespace, machine: Runtime) -> tuple[Runtime, str]:
    """The Runtime in the precision that train.py takes in a run long enough for a race; how it
    computes, in words.
    """
    shape, T = SHAPES[arguments.size], arguments.block_size
    config = train.TrainConfig(**shape, block_size=T, dtype=arguments.dtype, compile=False)
    vocab_size = 257 if arguments.size == "quickstart" else 50257
    chosen, why = auto.choose(config, GPT(GPTConfig(vocab_size, T, **shape)), machine, before={})
    print(why, file=sys.stderr)
    arguments.dtype = chosen["dtype"]
    return machine.computing_in(chosen["dtype"]), auto.in_words(chosen["dtype"], chosen["flash"])


def bench_train(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """A training step against transformers', and what it waits for."""
    machine, _ = as_train_chooses(arguments, machine)

    def theirs(dtype: torch.dtype, compiled: bool) -> dict:
        # A new process is without our settings of malloc, and gives all of its memory back.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(steps_of_transformers, arguments, machine, dtype, compiled).result()

    ours = functools.partial(steps_of_train, arguments, dtype=arguments.dtype)
    runs = {"ours": functools.partial(ours, compile=False)}
    runs["ours, saving"] = functools.partial(ours, compile=False, checkpoint_every=arguments.steps)
    runs["transformers"] = functools.partial(theirs, machine.dtype, False)
    if arguments.compile:
        runs["ours, compiled"] = functools.partial(ours, compile=True)
        runs["transformers, compiled"] = functools.partial(theirs, machine.dtype, True)
    if arguments.fp32:
        runs["transformers, float32"] = functools.partial(theirs, torch.float32, False)
    return against_matmul(runs, arguments, machine, "transformers")


def bench_ladder(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """The same step with one speed-up after the other."""
    machine, _ = as_train_chooses(arguments, machine)
    settings, runs = {}, {}
    for name, changed in LADDER.items():
        settings = settings | changed
        if name != "TF32" or machine.device.type == "cuda":  # there is none elsewhere
            runs[name] = functools.partial(steps_of_train, arguments, **settings)
    return against_matmul(runs, arguments, machine, "float32")


def bench_choices(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """The four ways to compute a step on a CPU; the ratios are to the one that train.py chooses by
    itself.
    """
    _, chosen = as_train_chooses(arguments, machine)
    ways = {
        auto.in_words(d, f): dict(dtype=d, flash=f) for d in ("fp32", "bf16") for f in (True, False)
    }
    runs = {
        name: functools.partial(steps_of_train, arguments, compile=False, **way)
        for name, way in ways.items()
    }
    return interleaved(runs, arguments.rounds, chosen)


def against_matmul(
    runs: dict, arguments: argparse.Namespace, machine: Runtime, baseline: str
) -> dict:
    """`interleaved`, with each row's FLOP/s beside those of a large product, the best of some."""
    n = 8192 if machine.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    best = max(rate(2 * n**3, machine, torch.matmul, a, b) for _ in range(20))
    result = interleaved(runs, arguments.rounds, baseline)
    with torch.device("meta"):
        flops = GPT(GPTConfig(**SHAPES[arguments.size])).flops_per_token(arguments.block_size)
    for row in filter(None, result["rows"].values()):
        done = row["tokens/s"] * flops
        row |= {"TFLOP/s": done / 1e12, "% of matmul": 100 * done / best}
    result["rows"]["a large matmul"] = {"TFLOP/s": best / 1e12}
    return result


# ---- memory: which batch fits into which GPU. Tensors without contents go through a real step, on

CARDS_GB = (16, 24, 80, 141)
USABLE = 0.9  # of them; the rest is CUDA's own, and gaps between tensors


def peak_memory(shape: dict, T: int, B: int, theirs: bool = False) -> float:
    """Bytes at the fullest moment of a bf16 step on a GPU: weights, gradients, AdamW's means,
    activations.

    One and two blocks are counted, each further block adds what the second adds: the time that
    MemTracker takes grows with the square of the modules.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    # The tensors are the CPU's, as a CPU build of torch has no backward pass for a GPU's. Where a
    # GPU differs it is followed: the loss takes GPU_ROWS at once, and autocast has powers (in
    # transformers' GELU) in float32.
    whole = mock.patch.object(head, "CACHE_BYTES", 4 * 50304 * head.GPU_ROWS)
    in_float32 = mock.patch.object(torch, "pow", lambda x, exponent: x.float() ** exponent)
    peaks = []
    for n_layer in (1, 2):
        with FakeTensorMode(), whole, in_float32:
            layers = shape | dict(n_layer=n_layer)
            model = (
                gpt2_of_transformers(T, **layers)
                if theirs
                else GPT(GPTConfig(block_size=T, **layers))
            )
            optimizer = torch.optim.AdamW(model.train().parameters(), fused=True)
            for (
                parameter
            ) in model.parameters():  # the gradients are there in all micro-steps but the first
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            idx = torch.zeros(B, T, dtype=torch.int64)
            with tracker:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(idx, labels=idx).loss if theirs else model(idx, idx)
                loss.backward()
                optimizer.step()
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    return peaks[0] + (shape["n_layer"] - 1) * (peaks[1] - peaks[0])


def largest_batch(room: float, peak: Callable[[int], float]) -> int:
    """The largest power of two of sequences, up to 256, whose peak(B) has room; 0 if not even one
    has.
    """
    return 2 ** bisect_right(range(9), room, key=lambda k: peak(2**k)) // 2


def bench_memory(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Which batch of which GPT-2 fits into which GPU, counted for bf16 and AdamW."""
    models, rows = {}, {}
    for name, shape in SIZES.items():
        models |= {name: shape, f"{name}, recompute": shape | dict(recompute=True)}
    for name, shape in (models | {"transformers' gpt2": SIZES["gpt2"]}).items():
        theirs = name.startswith("transformers")
        peak = functools.cache(
            functools.partial(peak_memory, shape, arguments.block_size, theirs=theirs)
        )
        batches = {f"{card} GB": largest_batch(USABLE * card * 1e9, peak) for card in CARDS_GB}
        rows[name] = {"GB for B=16": peak(16) / 1e9} | batches
        print(f"{name}: counted", file=sys.stderr)
    return dict(rows=rows, ratios={})


# ---- plan: a run on paper. FLOPs, bytes and messages are counted; docs/scale.md has the sources and what is assumed --

class Gpu(NamedTuple):
    """A GPU in its data sheet; runtime.PEAK_FLOPS has its FLOP/s."""

    memory: float  # bytes
    memory_rate: float  # bytes/s
    link: float  # bytes/s one way to the machine's other GPUs: NVLink; for the RTX 4090, PCIe
    network: float  # bytes/s between machines, for all GPUs of one
    dollars: float  # an hour


GPUS = {
    "A100": Gpu(80e9, 2.04e12, 300e9, 200e9, 1.75),
    "H100": Gpu(80e9, 3.35e12, 450e9, 400e9, 3.00),
    "RTX 4090": Gpu(24e9, 1.01e12, 32e9, 12.5e9, 0.34),
}

EFFICIENCY = 0.8  # of the rates in GPUS and PEAK_FLOPS: assumed
CHANNEL, LOGIT, WEIGHT, UPDATE = (
    246,
    10,
    20,
    44,
)  # bytes moved in a GPU's memory; docs/scale.md counts them
BUCKET, MESSAGE, DISK = (
    100 * 2**20,
    5e-6,
    1e9,
)  # bytes, as in train.py; seconds; bytes/s of the disk of all machines


def all_reduce(size: float, n: int, rate: float) -> float:
    """Seconds in which a ring of n GPUs sums `size` bytes: 2 (n - 1) messages, one after the other,
    for each bucket.
    """
    return 2 * (n - 1) * (size / n / rate + (size // BUCKET + 1) * MESSAGE)


def plan(
    model: GPT, gpu: str, n: int, per_node: int, batch: int, at_once: int, network: float = 0
) -> tuple:
    """Seconds of a step of `batch` tokens, `at_once` sequences a micro-step, and {resource: used};
    1 is all of it.
    """
    config, size, T = model.config, model.num_params(), model.config.block_size
    memory_rate, link, own_network = (EFFICIENCY * rate for rate in GPUS[gpu][1:4])

    # A micro-step: what it computes and moves for each token, and what it moves for each parameter.
    moved = CHANNEL * config.n_layer * config.n_embd + LOGIT * config.padded_vocab_size
    token = model.flops_per_token(T) / (EFFICIENCY * runtime.PEAK_FLOPS[gpu]) + moved / memory_rate
    full = (
        132 * 128 * 256 / config.n_embd / T
    )  # sequences that give each of 132 multiprocessors a tile of 128 x 256
    piece = max(at_once, full) * T * token + WEIGHT * size / memory_rate
    compute, backward = batch / n / T / at_once * piece, piece * 2 / 3

    # The last backward pass hides the all-reduce, but not the tied embedding's: its gradient is
    # whole only at the end.
    rate = min(link, network or own_network) if n > per_node else link
    exchange = all_reduce(4 * size, n, rate)
    embedding = all_reduce(4 * config.padded_vocab_size * config.n_embd, n, rate)
    seconds = compute + max(exchange - backward, embedding) + UPDATE * size / memory_rate
    disk = (12 * size / train.TrainConfig.checkpoint_every + 2 * batch) / DISK
    uses = {
        "compute": compute / seconds,
        "all-reduce": exchange / backward,
        "sequences": full / at_once,
    }
    return seconds, uses | {"disk": disk / seconds}


def bench_plan(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """A training run on paper, on one GPU up to all: time, cost, what is used, and what is full
    next.
    """
    N, per_node, T, batch = (
        arguments.gpus,
        arguments.gpus_per_node,
        arguments.block_size,
        arguments.batch_tokens,
    )
    gpu, shape, rows = GPUS[arguments.gpu], SIZES[arguments.model], {}
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=T, **shape))
    negative = min(N, per_node, batch, arguments.tokens) < 1 or arguments.network < 0
    if negative or batch % (N * T) or N % min(N, per_node):
        raise ValueError(
            f"plan: {N} GPUs must be machines of {per_node} and divide {batch // T} sequences; no negatives"
        )
    room, peak = USABLE * gpu.memory, functools.cache(functools.partial(peak_memory, shape, T))
    if not (fits := largest_batch(room, peak)):
        raise ValueError(
            f"{arguments.model}: a sequence takes {peak(1) / 1e9:.0f} GB, too much for an {arguments.gpu}"
        )
    for n in sorted({1, per_node, 2 * per_node, N}):
        if n > N or batch % (n * T):
            continue
        at_once = auto.batch_size(fits, batch // T // n, model, T, machine)
        seconds, uses = plan(
            model, arguments.gpu, n, per_node, batch, at_once, 1e9 * arguments.network
        )
        uses["memory"] = peak(1) / room
        hours = arguments.tokens / batch * seconds / 3600
        row = {"tokens/s": batch / seconds, "hours": hours, "dollars": hours * n * gpu.dollars}
        row |= {f"% {name}": 100 * use for name, use in uses.items()}
        row["next"] = max((name for name in uses if name != "compute"), key=uses.get)
        rows[f"{max(1, n // per_node)} x {min(n, per_node)}"] = row
    return dict(device=f"paper, {arguments.gpu}", rows=rows, ratios={})


def bench_show(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """The table of a result that was printed with --json."""
    try:
        result = json.loads(Path(arguments.file).read_text(encoding="utf-8"))
        table(result)
        return result
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{arguments.file}: not a result of this bench.py's --json; measure again"
        ) from None


def cell(value: float | str) -> str:
    """A figure with two decimals, if it is below 100 and not whole."""
    return (
        value
        if isinstance(value, str)
        else f"{value:,.{0 if value >= 100 or value % 1 == 0 else 2}f}"
    )


def table(result: dict) -> str:
    """A result in lines: what was measured, then the rows under their columns, with the ratios at
    the end.
    """
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    lines = [f"{result['bench']} on {result['device']}, torch {result['torch']}; {settings}"]
    rows = result["rows"] | {
        name: result["rows"][name] | {"ratio": r} for name, r in result["ratios"].items()
    }
    columns = dict.fromkeys(column for row in result["rows"].values() if row for column in row)
    columns, first = [*columns, "ratio"] if result["ratios"] else [*columns], max(map(len, rows))
    lines.append(" ".join([" " * first, *(f"{column:>12}" for column in columns)]))
    for name, row in rows.items():
        cells = {column: cell(value) for column, value in (row or {}).items()}
        shown = (
            f"{cells.get(column, '' if row else '-'):>12}" for column in columns
        )  # all -: it failed
        lines.append(" ".join([name.ljust(first), *shown]).rstrip())
    return "\n".join(lines)


BENCHES = (
    bench_tokenize,
    bench_hellaswag,
    bench_sample,
    bench_train,
    bench_ladder,
    bench_choices,
    bench_memory,
)
STEPS, MODELS = (
    ("train", "ladder", "choices"),
    ("hellaswag", "sample", "train", "ladder", "choices"),
)
OPTIONS = {  # the benches that have it, what it is, what argparse must know of it
    "files": (
        ["tokenize"],
        "text, .jsonl or .parquet; none: Python's own library",
        dict(nargs="*"),
    ),
    "file": (["show"], "what --json printed", {}),
    "--workers": (["tokenize"], "processes; 0: as many as CPUs", dict(default=0, type=int)),
    "--data": (["hellaswag"], "file of tasks; none: the official ones, fetched once", {}),
    "--limit": (["hellaswag"], "the first so many tasks; 0: all", dict(default=500, type=int)),
    "--batch": (["sample"], "prompts at once", dict(default=1, type=int)),
    "--max_tokens": (["sample"], "new tokens", dict(default=256, type=int)),
    "--compile": (["train"], "also with torch.compile, both", dict(action="store_true")),
    "--fp32": (["train"], "also transformers' in float32", dict(action="store_true")),
    "--size": (STEPS, "which GPT-2", dict(default="gpt2", choices=SHAPES)),
    "--batch_size": (STEPS, "sequences", dict(default=4, type=int)),
    "--block_size": (
        [*STEPS, "memory", "plan"],
        "tokens in a sequence",
        dict(default=1024, type=int),
    ),
    "--steps": (STEPS, "steps that are timed, in a round", dict(default=3, type=int)),
    "--gpus": (["plan"], "how many", dict(default=8, type=int)),
    "--gpu": (["plan"], "which", dict(default="H100", choices=GPUS)),
    "--gpus_per_node": (["plan"], "in a machine", dict(default=8, type=int)),
    "--network": (
        ["plan"],
        "GB/s of a machine; 0: 0.8 of its maker's",
        dict(default=0, type=float),
    ),
    "--model": (["plan"], "which GPT-2", dict(default="gpt2", choices=SIZES)),
    "--tokens": (["plan"], "in the run", dict(default=10_000_000_000, type=int)),
    "--batch_tokens": (["plan"], "in a step, on all GPUs", dict(default=524_288, type=int)),
    "--device": (MODELS, "auto, cpu, cuda, cuda:1 or mps", dict(default="auto")),
    "--dtype": (
        MODELS,
        "of matrix products",
        dict(default="auto", choices=["auto", *runtime.DTYPES]),
    ),
    "--rounds": ([*MODELS, "tokenize"], "how often all is measured", dict(default=3, type=int)),
    "--json": (
        [*MODELS, "tokenize", "memory", "plan"],
        "JSON instead of the table",
        dict(action="store_true"),
    ),
}


@command("bench.py")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Measure speed on this machine; medians of rounds."
    )
    benches = parser.add_subparsers(dest="bench", required=True)
    for function in (*BENCHES, bench_plan, bench_show):
        bench, form = (
            function.__name__.removeprefix("bench_"),
            argparse.ArgumentDefaultsHelpFormatter,
        )
        options = benches.add_parser(
            bench, help=function.__doc__, description=function.__doc__, formatter_class=form
        )
        options.set_defaults(measure=function)
        for name, (having, about, details) in OPTIONS.items():
            if bench in having:
                options.add_argument(name, help=about, **details)
    arguments = parser.parse_args(argv)
    machine = runtime.start(getattr(arguments, "device", "cpu"))
    found = arguments.measure(arguments, machine)
    settings = {
        name: v for name, v in vars(arguments).items() if name not in ("bench", "measure", "json")
    }
    result = dict(
        bench=arguments.bench,
        device=machine.device_name(),
        torch=torch.__version__,
        settings=settings,
    )
    result |= found
    print(json.dumps(result) if getattr(arguments, "json", False) else table(result))


if __name__ == "__main__":
    main()
