"""Measure speed, with the functions that the commands themselves call.

    python bench.py tokenize text.parquet --workers 8  # files to shards, against tiktoken alone
    python bench.py hellaswag --data tasks.jsonl  # batches of tasks, against one task at a time
    python bench.py sample --batch 32  # generation, against transformers
    python bench.py train --batch_size 8  # a training step, against transformers
    python bench.py ladder  # what each speed-up of a step brings, one after the other
    python bench.py choices --size quickstart  # what auto chooses, against the other choices
    python bench.py memory  # which batch of which GPT-2 fits into which GPU, counted
    python bench.py plan --gpus 64 --model gpt2-xl  # time and cost of a run, calculated
    python bench.py peers --nanogpt nanoGPT  # training and more, beside other programs
    python bench.py show results/cpu/ladder.json  # the table of a result printed with --json

A result has bench, device, torch, settings, rows {name: {column: figure}} and ratios {name: times
the baseline}. Measured figures are medians of rounds. The row of a run that failed, for example
because memory ran out, is null.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hellaswag
import train
from model import GPT, SIZES, GPTConfig
from parts import auto, data, inference, loss, peers, runtime
from parts.auto import Arithmetic, prepare_for_inference
from parts.console import OptionParser, command, path_option, print_note
from parts.documents import identify, read_documents
from parts.files import check_is_file
from parts.json_files import read_json
from parts.metrics import read_metrics, select
from parts.runtime import Runtime
from parts.sharding import (
    START_METHOD,
    available_cpus,
    shard_files,
    split_into_pieces,
    start_workers,
)
from parts.tokenizer import get_tokenizer
from parts.zero import assign_owners

import numpy as np
import torch
import torch.nn.functional as F

# ---- Measuring -----------------------------------------------------------------------------------


def measure_rate(n: float, machine: Runtime, work: Callable, *arguments, **options) -> float:
    """Call work(*arguments, **options), which does n of something. Return how many a second."""
    machine.synchronize()
    begin = time.perf_counter()
    work(*arguments, **options)
    machine.synchronize()
    return n / (time.perf_counter() - begin)


def measure_in_rounds(runs: Mapping[str, Callable[[], dict]], rounds: int, baseline: str) -> dict:
    """Call each run once a round. Return {"rows": medians, "ratios": medians of the first column's
    ratio to the baseline}.

    runs: name -> a function that returns {column: figure}.

    Runs are interleaved, so a slow minute affects all of them. There is no warm-up: the median of
    three rounds leaves out a slow first one. A failing run does not spoil the others.
    Raises ValueError if all of them fail.
    """
    # One entry a round; None where the run failed.
    measured: dict[str, list] = {name: [] for name in runs}
    message = ""
    for _ in range(max(1, rounds)):
        for name, run in runs.items():
            try:
                row = run()
                message = "  ".join(f"{column} {value:,.2f}" for column, value in row.items())
            except Exception as error:
                # In most cases it is out of memory; a compiler may also be missing.
                row = None
                message = f"{type(error).__name__}: {first_line(str(error))}"
            measured[name].append(row)
            print_note(f"{name:32} {message}")

    rows: dict[str, Any] = {}  # None where a run failed
    ratios = {}
    for name, entries in measured.items():
        if None in entries:
            rows[name] = None
            continue
        columns = list(entries[0])
        rows[name] = {}
        for column in columns:
            rows[name][column] = statistics.median(entry[column] for entry in entries)
        if None not in measured[baseline]:
            speed = columns[0]
            pairs = zip(entries, measured[baseline])
            ratios[name] = statistics.median(ours[speed] / base[speed] for ours, base in pairs)
    if not any(rows.values()):
        raise ValueError(f"nothing could be measured: {message}")
    return {"rows": rows, "ratios": ratios}


def first_line(text: str) -> str:
    lines = text.splitlines()
    return lines[0] if lines else "?"


# ---- tokenize ------------------------------------------------------------------------------------


def bench_tokenize(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Text to shards, against tiktoken alone in as many processes."""
    files = [Path(path) for path in arguments.files]
    if not files:
        library = Path(sysconfig.get_path("stdlib"))
        files = sorted(library.glob("*.py"))
    if not arguments.workers:
        arguments.workers = available_cpus()
    workers = arguments.workers
    for path in files:
        check_is_file(path)
    megabytes = sum(len(text.encode()) for text in read_texts(files)) / 1e6
    if not megabytes:
        raise ValueError(f"{arguments.files[0]}: no text in it; there is nothing to measure")

    def run_tiktoken() -> dict:
        with multiprocessing.get_context(START_METHOD).Pool(workers) as pool:
            seconds = pool.map(time_tiktoken, [files] * workers, chunksize=1)
        return {"MB/s": workers * megabytes / statistics.mean(seconds)}

    def make_shards() -> dict:
        # The start of the workers is not measured. Writing is, to the disk (fsync).
        with (
            tempfile.TemporaryDirectory() as folder,
            start_workers("gpt2", workers) as tokenise_all,
        ):
            tokenizer = get_tokenizer("gpt2")
            out = Path(folder, "bench")
            begin = time.perf_counter()
            identified = [identify(path) for path in files]
            rows = shard_files(identified, out, tokenise_all, tokenizer, {"train": 100_000_000})
            seconds = time.perf_counter() - begin
        n_tokens = sum(row["tokens"] for row in rows["train"])
        return {"MB/s": megabytes / seconds, "tokens/s": n_tokens / seconds}

    unit = "process" if workers == 1 else "processes"
    baseline = f"tiktoken alone, {workers} {unit}"
    runs = {baseline: run_tiktoken, f"shards, {workers} workers": make_shards}
    return measure_in_rounds(runs, arguments.rounds, baseline)


def time_tiktoken(files: list[Path]) -> float:
    """Seconds of a loop over texts in memory that does nothing but call tiktoken."""
    texts = read_texts(files)
    encoding: Any = get_tokenizer("gpt2").encoding  # type: ignore[attr-defined]
    begin = time.perf_counter()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return time.perf_counter() - begin


def read_texts(files: list[Path]) -> list[str]:
    """The text of the files, in the segments that a worker tokenises."""
    texts = []
    inputs = [identify(file) for file in files]
    for file in inputs:
        if file.kind == "binary":
            raise ValueError(f"{file.path}: binary ({file.about}), not text")
    for piece in split_into_pieces(read_documents(iter(inputs))):
        for segment in piece:
            texts.append(segment.text.decode(errors="replace"))
    return texts


# ---- hellaswag -----------------------------------------------------------------------------------


def bench_hellaswag(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Score tasks in batches, against one task at a time. The model is an untrained GPT-2 124M,
    which is as fast as a trained one.
    """
    tokenizer = get_tokenizer("gpt2")
    model = GPT(GPTConfig()).to(machine.device).eval()
    tasks = hellaswag.examples(arguments.data, arguments.limit)
    prepared = prepare_for_inference(copy.deepcopy(model), machine, arguments.dtype, rows=1024)
    print_note(prepared.note)
    # About 40 tasks are enough for the slow way.
    subset = tasks[:: max(1, len(tasks) // 40)]
    rendered = [hellaswag.render(task, tokenizer, 1024) for task in subset]

    def score_in_batches() -> dict:
        speed = measure_rate(
            len(tasks),
            machine,
            hellaswag.evaluate,
            prepared.model,
            tokenizer,
            machine,
            tasks,
            dtype=prepared.packing.dtype,
        )
        return {"tasks/s": speed}

    def score_singly() -> dict:
        speed = measure_rate(
            len(rendered),
            machine,
            score_one_at_a_time,
            model,
            rendered,
            machine,
            prepared.packing.dtype,
        )
        return {"tasks/s": speed}

    runs = {"in batches": score_in_batches, "one at a time": score_singly}
    return measure_in_rounds(runs, arguments.rounds, "one at a time")


@torch.no_grad()
def score_one_at_a_time(
    model: GPT, tasks: list[hellaswag.Rendered], machine: Runtime, dtype: torch.dtype
) -> None:
    """Score each task by itself, as four rows of context and ending, padded at the right. Logits
    and losses are computed for every token.
    """
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    for task in tasks:
        rows = []
        for ending in task.endings:
            tokens = np.concatenate([task.context, ending]).astype(np.int64)
            rows.append(torch.from_numpy(tokens))
        idx = pad(rows).to(machine.device)  # (4, T)
        # cross_entropy ignores targets of -100: the padding, and the context.
        targets = pad(rows, padding_value=-100).to(machine.device)
        targets[:, : len(task.context)] = -100
        with machine.autocast(dtype):
            logits = model(idx)[:, :-1]
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets[:, 1:].flatten(), reduction="none"
        )
        losses.view(4, -1).sum(dim=1).tolist()


# ---- sample --------------------------------------------------------------------------------------


def bench_sample(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Greedy generation after 16 tokens, against transformers, by an untrained GPT-2 124M."""
    B = arguments.batch
    n_new = arguments.max_tokens
    prepared = prepare_for_inference(GPT(GPTConfig()).eval(), machine, arguments.dtype, rows=B)
    print_note(prepared.note)
    theirs: Any = (
        build_transformers_gpt2(1024, SIZES["gpt2"])
        .to(machine.device, prepared.packing.dtype)
        .eval()
    )
    idx = torch.randint(50257, (B, 16), device=machine.device)
    prompts = idx.tolist()

    def generate() -> None:
        inference.generate(prepared.model, prompts, n_new, temperature=0)

    def generate_by_transformers() -> None:
        theirs.generate(
            idx,
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )

    runs = {
        "ours": lambda: {"tokens/s": measure_rate(B * n_new, machine, generate)},
        "transformers": lambda: {
            "tokens/s": measure_rate(B * n_new, machine, generate_by_transformers)
        },
    }
    return measure_in_rounds(runs, arguments.rounds, "transformers")


def build_transformers_gpt2(block_size: int, shape: dict) -> torch.nn.Module:
    """transformers' GPT-2 without dropout, untrained. shape: n_layer, n_head, n_embd."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt2",
        n_positions=block_size,
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return AutoModelForCausalLM.from_config(config)


# ---- train, ladder and choices: each run is a process that runs train.py -------------------------

SHAPES: dict[str, dict[str, Any]] = SIZES | {"quickstart": dict(n_layer=3, n_head=2, n_embd=128)}

# The order of "Let's reproduce GPT-2 (124M)". Each rung keeps the settings of those below it.
LADDER: dict[str, dict[str, Any]] = {
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


def bench_train(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """A training step, and how long it waits for data and checkpoints, against transformers."""
    arithmetic = choose_as_train_does(arguments, machine)

    def measure_theirs(dtype: torch.dtype, compiled: bool) -> dict:
        # A new process has torch's own settings of malloc, and returns all its memory at its end.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            job = pool.submit(measure_transformers, arguments, machine, dtype, compiled)
            return job.result()

    ours = functools.partial(measure_train, arguments, dtype=arithmetic.dtype)
    theirs = functools.partial(measure_theirs, arithmetic.torch_dtype)
    runs = {
        "ours": functools.partial(ours, compile=False),
        "ours, saving": functools.partial(ours, compile=False, checkpoint_every=arguments.steps),
        "transformers": functools.partial(theirs, compiled=False),
    }
    if arguments.compile:
        runs["ours, compiled"] = functools.partial(ours, compile=True)
        runs["transformers, compiled"] = functools.partial(theirs, compiled=True)
    if arguments.fp32:
        runs["transformers, float32"] = functools.partial(
            measure_theirs, torch.float32, compiled=False
        )
    result = measure_in_rounds(runs, arguments.rounds, "transformers")
    add_matmul_share(result["rows"], arguments, machine, arithmetic.torch_dtype)
    return result


def bench_ladder(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """The same training step with one speed-up after the other."""
    arithmetic = choose_as_train_does(arguments, machine)
    settings: dict[str, Any] = {}
    runs = {}
    for name, changes in LADDER.items():
        settings = settings | changes
        if name == "TF32" and machine.device.type != "cuda":
            continue
        runs[name] = functools.partial(measure_train, arguments, **settings)
    result = measure_in_rounds(runs, arguments.rounds, "float32")
    add_matmul_share(result["rows"], arguments, machine, arithmetic.torch_dtype)
    return result


def bench_choices(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """The four ways to compute a step on a CPU. The baseline is the one that train.py chooses."""
    chosen = choose_as_train_does(arguments, machine)
    runs = {}
    for dtype in ("fp32", "bf16"):
        for flash in (True, False):
            way = Arithmetic(dtype, flash, threads=None, compile=False)
            runs[str(way)] = functools.partial(
                measure_train, arguments, dtype=dtype, flash=flash, compile=False
            )
    return measure_in_rounds(runs, arguments.rounds, str(chosen))


def choose_as_train_does(arguments: argparse.Namespace, machine: Runtime) -> Arithmetic:
    """What train.py chooses in a run that is long enough for a race. Sets arguments.dtype to it, so
    that the result names it.
    """
    shape = SHAPES[arguments.size]
    T = arguments.block_size
    config = train.TrainConfig(**shape, block_size=T, dtype=arguments.dtype, compile=False)
    vocab_size = 257 if arguments.size == "quickstart" else 50257
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=T, **shape))
    arithmetic, why = auto.choose_arithmetic(config, model, machine, saved={})
    print_note(why)
    arguments.dtype = arithmetic.dtype
    return arithmetic


def measure_train(arguments: argparse.Namespace, accumulate: int = 1, **settings) -> dict:
    """Run train.py with these settings on random tokens. Return medians over its steps without the
    first. ValueError, with the last line of its output, if it fails.

    accumulate: micro-steps in a step.
    """
    B = arguments.batch_size
    T = arguments.block_size
    tokens_per_step = B * T * accumulate
    n_steps = 1 + arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(
            Path(folder),
            n_tokens=(tokens_per_step + B * T) * (n_steps + 1),
            tokenizer="bytes" if arguments.size == "quickstart" else "gpt2",
        )
        all_settings = dict(
            data_dir=folder,
            out_dir=folder,
            device=arguments.device,
            batch_size=B,
            block_size=T,
            total_batch_size=tokens_per_step,
            max_steps=n_steps,
            warmup_steps=0,
            eval_every=0,
            hellaswag_every=0,
            sample_every=0,
            checkpoint_every=0,
            report=False,
        )
        all_settings.update(SHAPES[arguments.size])
        all_settings.update(settings)
        flags = [f"--{name}={value}" for name, value in all_settings.items()]
        run = subprocess.run(
            [sys.executable, train.__file__, *flags], capture_output=True, text=True
        )
        if run.returncode:
            last_line = run.stderr.splitlines()[-1] if run.stderr else "?"
            raise ValueError(f"train.py ended with {run.returncode}: {last_line}")
        steps = select(read_metrics(Path(folder, "metrics.jsonl")), "train")[1:]

    ms = statistics.median(step["ms"] for step in steps)
    waits = [step["waited_ms"] for step in steps]
    return {
        "tokens/s": 1000 * tokens_per_step / ms,
        "ms": ms,
        "GB": steps[-1]["memory_gb"] or 0,
        "wait ms": statistics.median(waits),
        "max wait ms": max(waits),
    }


def write_random_shards(folder: Path, n_tokens: int, tokenizer: str) -> None:
    """A shard of random bytes, which are tokens of both tokenizers."""
    tokens = np.random.default_rng(0).integers(0, 256, n_tokens, dtype=np.uint16)
    data.write_shard(folder / "tokens_train_000001.bin", tokens)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": tokenizer}))


def measure_transformers(
    arguments: argparse.Namespace, machine: Runtime, dtype: torch.dtype, compiled: bool
) -> dict:
    """The same steps as most people write them: GPT2LMHeadModel, autocast, fused AdamW and
    gradient clipping.
    """
    B = arguments.batch_size
    T = arguments.block_size
    model = build_transformers_gpt2(T, SHAPES[arguments.size]).to(machine.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    idx = torch.randint(50257, (B, T), device=machine.device)

    def step() -> None:
        with torch.autocast(machine.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    speeds = [measure_rate(B * T, machine, step) for _ in range(1 + arguments.steps)]
    speed = statistics.median(speeds[1:])
    return {"tokens/s": speed, "ms": 1000 * B * T / speed, "GB": machine.peak_memory() or 0}


def add_matmul_share(
    rows: dict[str, dict | None],
    arguments: argparse.Namespace,
    machine: Runtime,
    dtype: torch.dtype,
) -> None:
    """Add to each row its FLOP/s, also as a share of the best of 20 large matrix products, and a
    row for these products.
    """
    n = 8192 if machine.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=machine.device, dtype=dtype)
    b = torch.randn(n, n, device=machine.device, dtype=dtype)
    best = max(measure_rate(2 * n**3, machine, torch.matmul, a, b) for _ in range(20))
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPES[arguments.size]))
    flops_per_token = model.flops_per_token(arguments.block_size)
    for row in rows.values():
        if row is not None:
            flops = row["tokens/s"] * flops_per_token
            row["TFLOP/s"] = flops / 1e12
            row["% of matmul"] = 100 * flops / best
    rows["a large matmul"] = {"TFLOP/s": best / 1e12}


# ---- memory: tensors without contents go through a real step, on any machine ---------------------

CARDS_GB = (16, 24, 40, 80, 141)


def bench_memory(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Which batch of which GPT-2 fits into which GPU, counted for bf16 and AdamW.

    With --gpus, they share the optimizer's state out (train.py's shard_optimizer).
    """
    models = {}
    for name, shape in SIZES.items():
        models[name] = shape
        models[f"{name}, recompute"] = shape | dict(recompute=True)
    models["transformers' gpt2"] = SIZES["gpt2"]

    rows = {}
    for name, shape in models.items():
        theirs = name.startswith("transformers")
        count = functools.partial(count_peak_memory, shape, arguments.block_size, theirs=theirs)
        peak = subtract(count, 0 if theirs else count_state_elsewhere(shape, arguments.gpus))
        rows[name] = {"GB for B=16": peak(16) / 1e9}
        for card in CARDS_GB:
            rows[name][f"{card} GB"] = find_largest_batch(auto.USABLE * card * 1e9, peak)
        print(f"{name}: counted", file=sys.stderr)
    return {"rows": rows, "ratios": {}}


def count_peak_memory(shape: dict, T: int, B: int, theirs: bool = False) -> float:
    """Bytes of weights, gradients, AdamW's averages and activations at the fullest moment of a bf16
    step on a GPU.

    theirs: transformers' GPT-2 instead of ours.

    Models of one and of two blocks are counted; each further block adds as much as the second.
    MemTracker's time grows with the square of the number of modules.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    # The tensors are the CPU's, because a CPU build of torch has no backward pass for a GPU's. Two
    # things are made as on a GPU: the loss works on slices of GPU_ROWS rows of logits, and autocast
    # computes powers (in transformers' GELU) in float32.
    gpu_slices = mock.patch.object(loss, "CACHE_BYTES", 4 * 50304 * loss.GPU_ROWS)
    float32_powers = mock.patch.object(torch, "pow", lambda x, exponent: x.float() ** exponent)
    peaks = []
    for n_layer in (1, 2):
        with FakeTensorMode(), gpu_slices, float32_powers:
            layers = shape | dict(n_layer=n_layer)
            if theirs:
                model = build_transformers_gpt2(T, layers)
            else:
                model = GPT(GPTConfig(block_size=T, **layers))
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            # All micro-steps but the first start with gradients in memory.
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            idx = torch.zeros(B, T, dtype=torch.int64)
            with tracker:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    if theirs:
                        mean_loss = model(idx, labels=idx).loss
                    else:
                        mean_loss = model(idx, idx)
                mean_loss.backward()
                optimizer.step()
        snapshot = tracker.get_tracker_snapshot("peak")
        peaks.append(snapshot[torch.device("cpu")]["Total"])

    with_one, with_two = peaks
    return with_one + (shape["n_layer"] - 1) * (with_two - with_one)


def subtract(count: Callable[[int], float], n_bytes: int) -> Callable[[int], float]:
    """The same count without so many bytes. It counts each batch once."""
    return functools.cache(lambda batch_size: count(batch_size) - n_bytes)


def count_state_elsewhere(shape: dict, n_gpus: int) -> int:
    """The bytes of AdamW's averages that a GPU does not keep, because others do, where n_gpus share
    them out. It is counted for the one that keeps the most.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    owned = count_owned(model, n_gpus)
    return 8 * (sum(owned) - max(owned))


def count_owned(model: GPT, n_gpus: int) -> list[int]:
    """How many of the weights each GPU updates, where they share the optimizer's state out."""
    optimizer = torch.optim.AdamW([dict(params=list(model.parameters()), rule="adamw")])
    owned = [0] * n_gpus
    for parameter, rank in assign_owners(optimizer, n_gpus).items():
        owned[rank] += parameter.numel()
    return owned


def find_largest_batch(usable: float, peak: Callable[[int], float]) -> int:
    """The largest power of two of sequences, at most 256, that takes no more than the usable bytes;
    0 if a single sequence takes more. peak: sequences -> bytes.
    """
    largest = 0
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if peak(batch) > usable:
            break
        largest = batch
    return largest


# ---- plan: FLOPs, bytes and messages are counted; docs/scale.md has sources and assumptions ------


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet. (Its FLOP/s are in runtime.PEAK_FLOPS.)"""

    memory: float  # bytes
    memory_rate: float  # bytes/s
    link: float  # bytes/s one way to the other GPUs of the machine; NVLink, the RTX 4090's is PCIe
    network: float  # bytes/s from one machine to another, for all its GPUs
    dollars: float  # an hour


GPUS = {
    "A100": Gpu(80e9, 2.04e12, link=300e9, network=200e9, dollars=1.75),
    "H100": Gpu(80e9, 3.35e12, link=450e9, network=400e9, dollars=3.00),
    "RTX 4090": Gpu(24e9, 1.01e12, link=32e9, network=12.5e9, dollars=0.34),
}

EFFICIENCY = 0.8  # the assumed share of the rates in GPUS and PEAK_FLOPS

# Bytes moved in a GPU's memory, counted in docs/scale.md.
BYTES_PER_CHANNEL = 246  # for each token, by each of n_layer x n_embd
FORWARD_BYTES_PER_CHANNEL = 84  # the forward pass's part of it
BYTES_PER_LOGIT = 10  # for each token
BYTES_PER_WEIGHT = 20  # in a micro-step
BYTES_PER_UPDATE = 44  # in a step, by each weight
ADAMW_BYTES = 28  # AdamW's part of it

TILES = 132 * 128 * 256  # a tile of 128 x 256 outputs for each of 132 multiprocessors
BUCKET = 100 * 2**20  # bytes in a bucket of gradients, as in train.py
MESSAGE = 5e-6  # seconds that a message takes besides its bytes
DISK = 1e9  # bytes/s, for all machines


def bench_plan(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Calculate a training run on one GPU and more: time, cost, and what limits it next."""
    T = arguments.block_size
    n_gpus = arguments.gpus
    per_node = arguments.gpus_per_node
    batch_tokens = arguments.batch_tokens
    gpu = GPUS[arguments.gpu]
    shape = SIZES[arguments.model] | dict(recompute=arguments.recompute)
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=T, **shape))

    smallest = min(n_gpus, per_node, batch_tokens, arguments.tokens)
    has_negatives = smallest < 1 or arguments.network < 0 or arguments.card_gb < 0
    if has_negatives or batch_tokens % (n_gpus * T) or n_gpus % min(n_gpus, per_node):
        raise ValueError(
            f"plan: {n_gpus} GPUs must be machines of {per_node} and divide {batch_tokens // T} "
            "sequences; no negatives"
        )
    card_bytes = 1e9 * arguments.card_gb or gpu.memory
    usable = auto.USABLE * card_bytes
    count = functools.cache(functools.partial(count_peak_memory, shape, T))

    rows = {}
    for n in sorted({1, per_node, 2 * per_node, n_gpus}):
        if n > n_gpus or batch_tokens % (n * T):
            continue
        elsewhere = 0
        if arguments.shard_optimizer:
            elsewhere = count_state_elsewhere(shape, n)
        peak = subtract(count, elsewhere)
        largest = find_largest_batch(usable, peak)
        if not largest:
            continue  # fewer GPUs keep more of the state each
        sequences = batch_tokens // T // n
        seconds, uses = plan_step(
            model,
            arguments.gpu,
            n_gpus=n,
            per_node=per_node,
            batch_tokens=batch_tokens,
            batch_size=auto.batch_size(largest, sequences, model, T, machine, torch.bfloat16),
            network=1e9 * arguments.network,
            shard_optimizer=arguments.shard_optimizer,
        )
        uses["memory"] = peak(1) / usable
        hours = arguments.tokens / batch_tokens * seconds / 3600
        row = {
            "tokens/s": batch_tokens / seconds,
            "hours": hours,
            "dollars": hours * n * gpu.dollars,
        }
        for name, share in uses.items():
            row[f"% {name}"] = 100 * share
        limits = [name for name in uses if name != "compute"]
        row["next"] = max(limits, key=uses.__getitem__)
        rows[f"{max(1, n // per_node)} x {min(n, per_node)}"] = row
    if not rows:
        advice = ""
        if not arguments.recompute:
            advice = "; try --recompute, and --shard_optimizer on several GPUs"
        raise ValueError(
            f"{arguments.model}: a sequence takes {peak(1) / 1e9:.0f} GB, "
            f"too much for an {arguments.gpu}{advice}"
        )
    return {"device": f"paper, {arguments.gpu}", "rows": rows, "ratios": {}}


def plan_step(
    model: GPT,
    gpu_name: str,
    *,
    n_gpus: int,
    per_node: int,
    batch_tokens: int,
    batch_size: int,
    network: float = 0,
    shard_optimizer: bool = False,
) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and {resource: the share of it that is used}.

    per_node: GPUs in a machine. batch_tokens: tokens in a step, on all GPUs. batch_size: sequences
    in a micro-step of one GPU. network: bytes/s between machines, 0 for the data sheet's.
    shard_optimizer: each GPU updates a part of the weights, and sends them to the others. Whether
    blocks are recomputed, model.config says.
    """
    config = model.config
    T = config.block_size
    n_params = model.num_params()
    gpu = GPUS[gpu_name]
    flops_rate = EFFICIENCY * runtime.PEAK_FLOPS[gpu_name]
    memory_rate = EFFICIENCY * gpu.memory_rate

    # A micro-step: the time of each token for computing and moving bytes, and that of the weights.
    channels = config.n_layer * config.n_embd
    channel_bytes = BYTES_PER_CHANNEL * channels
    logit_bytes = BYTES_PER_LOGIT * config.padded_vocab_size
    token_flops: float = model.flops_per_token(T)
    if config.recompute:
        # The forward pass of the blocks once more: a third of their work.
        head_flops = 6 * config.padded_vocab_size * config.n_embd
        token_flops += (token_flops - head_flops) / 3
        channel_bytes += FORWARD_BYTES_PER_CHANNEL * channels
    token_seconds = token_flops / flops_rate
    token_seconds += (channel_bytes + logit_bytes) / memory_rate
    # Fewer sequences than give each multiprocessor a tile take as long as those.
    sequences_to_fill = TILES / config.n_embd / T
    micro_step = max(batch_size, sequences_to_fill) * T * token_seconds
    micro_step += BYTES_PER_WEIGHT * n_params / memory_rate
    n_micro_steps = batch_tokens / n_gpus / T / batch_size
    compute = n_micro_steps * micro_step
    backward = micro_step * 2 / 3

    # The last backward pass hides the all-reduce, except for the tied embedding's: its gradient is
    # complete only at the end.
    link = EFFICIENCY * gpu.link
    if n_gpus > per_node:
        link = min(link, network or EFFICIENCY * gpu.network)
    exchange = time_all_reduce(4 * n_params, n_gpus, link)
    embedding_bytes = 4 * config.padded_vocab_size * config.n_embd
    embedding = time_all_reduce(embedding_bytes, n_gpus, link)
    waiting = max(exchange - backward, embedding)

    update = BYTES_PER_UPDATE * n_params / memory_rate
    if shard_optimizer and n_gpus > 1:
        # Norm, clipping and zeroing are for all gradients, AdamW for the parameters that are owned.
        # Then each GPU receives the weights that it does not own.
        share = max(count_owned(model, n_gpus)) / n_params
        update_bytes = BYTES_PER_UPDATE - (1 - share) * ADAMW_BYTES
        update = update_bytes * n_params / memory_rate
        update += 4 * n_params / link + (4 * n_params // runtime.MESSAGE_BYTES + n_gpus) * MESSAGE
    seconds = compute + waiting + update
    # Three float32 for each weight in a checkpoint, two bytes for each token.
    checkpoint_bytes = 12 * n_params / train.TrainConfig.checkpoint_every
    disk = (checkpoint_bytes + 2 * batch_tokens) / DISK
    uses = {
        "compute": compute / seconds,
        "all-reduce": exchange / backward,
        "sequences": sequences_to_fill / batch_size,
        "disk": disk / seconds,
    }
    return seconds, uses


def time_all_reduce(n_bytes: float, n_gpus: int, bytes_per_s: float) -> float:
    """Seconds in which a ring of GPUs sums gradients: 2 (n_gpus - 1) messages, one after the other,
    for each bucket.
    """
    n_buckets = n_bytes // BUCKET + 1
    return 2 * (n_gpus - 1) * (n_bytes / n_gpus / bytes_per_s + n_buckets * MESSAGE)


# ---- peers ---------------------------------------------------------------------------------------


def bench_peers(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """GPT-2 124M on the CPU beside other programs, each in processes of its own: a training step,
    the start of a new and of a resumed run, memory, greedy generation, HellaSwag, and from text to
    token files. Programs that are missing are left out, and said.
    """
    kinds = arguments.only or list(peers.KINDS)
    workload = peers.Workload(SHAPES["gpt2"])
    sources = peers.Sources(
        nanogpt=arguments.nanogpt or "",
        build_nanogpt=arguments.build_nanogpt or "",
        gguf=arguments.gguf or "",
        python=arguments.python or "",
    )
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        programs = peers.Peers(
            Path(folder).resolve(), sources, workload, arguments.text or "", arguments.tasks or ""
        )
        programs.prepare()
        for name, missing in programs.left_out.items():
            print_note(f"{name}: left out, {missing}")
        megabytes = peers.megabytes_of(programs.text)
        result = programs.measure(kinds, arguments.rounds)
    # Not the options, which name this machine's folders.
    settings = workload._asdict() | {"megabytes": round(megabytes, 1)} | programs.versions
    del settings["shape"]
    return result | {"settings": settings | {"rounds": arguments.rounds}, "ratios": {}}


# ---- show, and the table of a result -------------------------------------------------------------


def bench_show(arguments: argparse.Namespace, machine: Runtime) -> dict:
    """The table of a result that was printed with --json."""
    result = read_json(Path(arguments.file))
    try:
        format_table(result)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError(
            f"{arguments.file}: not a result of this bench.py's --json; measure again"
        ) from None
    return result


def format_table(result: dict) -> str:
    """A line that says what was measured, then the rows under their columns. Ratios are the last
    column; a run that failed has a dash in each.
    """
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    rows = result["rows"]
    ratios = result["ratios"]
    columns = []
    for row in rows.values():
        for column in row or {}:
            if column not in columns:
                columns.append(column)
    if ratios:
        columns.append("ratio")

    width = max(len(name) for name in rows)
    header = " ".join(f"{column:>12}" for column in columns)
    lines = [
        f"{result['bench']} on {result['device']}, torch {result['torch']}; {settings}",
        f"{'':{width}} {header}",
    ]
    for name, row in rows.items():
        line = name.ljust(width)
        for column in columns:
            if row is None:
                text = "-"
            elif column == "ratio" and name in ratios:
                text = format_figure(ratios[name])
            else:
                text = format_figure(row.get(column, ""))
            line += f" {text:>12}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def format_figure(value: float | str) -> str:
    """Two decimals for a figure below 100 that is not whole."""
    if isinstance(value, str):
        return value
    if value >= 100 or value % 1 == 0:
        return f"{value:,.0f}"
    return f"{value:,.2f}"


# ---- The command ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="bench.py", description="Measure speed on this machine; medians of rounds."
    )
    benches = parser.add_subparsers(dest="bench", required=True)

    def add_bench(name: str, measure: Callable) -> argparse.ArgumentParser:
        about = " ".join((measure.__doc__ or "").split())
        bench = benches.add_parser(
            name,
            help=about,
            description=about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        bench.set_defaults(measure=measure)
        return bench

    # What each bench alone has.
    tokenize = add_bench("tokenize", bench_tokenize)
    tokenize.add_argument(
        "files",
        nargs="*",
        type=path_option,
        help="text, .jsonl or .parquet; none: Python's own library",
    )
    tokenize.add_argument("--workers", type=int, default=0, help="processes; 0: as many as CPUs")

    score = add_bench("hellaswag", bench_hellaswag)
    score.add_argument(
        "--data", type=path_option, help="file of tasks; none: the official ones, fetched once"
    )
    score.add_argument("--limit", type=int, default=500, help="the first so many tasks; 0: all")

    sample = add_bench("sample", bench_sample)
    sample.add_argument("--batch", type=int, default=1, help="prompts at once")
    sample.add_argument("--max_tokens", type=int, default=256, help="new tokens")

    step = add_bench("train", bench_train)
    step.add_argument("--compile", action="store_true", help="also both with torch.compile")
    step.add_argument("--fp32", action="store_true", help="also transformers in float32")

    ladder = add_bench("ladder", bench_ladder)
    choices = add_bench("choices", bench_choices)

    memory = add_bench("memory", bench_memory)
    memory.add_argument("--block_size", type=int, default=1024, help="tokens in a sequence")
    memory.add_argument("--gpus", type=int, default=1, help="that share the optimizer's state out")

    plan = add_bench("plan", bench_plan)
    plan.add_argument("--block_size", type=int, default=1024, help="tokens in a sequence")
    plan.add_argument("--gpus", type=int, default=8, help="how many")
    plan.add_argument("--gpu", default="H100", choices=GPUS, help="which")
    plan.add_argument("--gpus_per_node", type=int, default=8, help="GPUs in a machine")
    plan.add_argument(
        "--network", type=float, default=0, help="GB/s of a machine; 0: 0.8 of its maker's"
    )
    plan.add_argument("--model", default="gpt2", choices=SIZES, help="which GPT-2")
    plan.add_argument("--card_gb", type=float, default=0, help="GB of a GPU; 0: its maker's")
    plan.add_argument(
        "--shard_optimizer", action="store_true", help="GPUs share the optimizer's state out"
    )
    plan.add_argument("--recompute", action="store_true", help="blocks in the backward pass")
    plan.add_argument("--tokens", type=int, default=10_000_000_000, help="in the run")
    plan.add_argument("--batch_tokens", type=int, default=524_288, help="in a step, on all GPUs")

    beside = add_bench("peers", bench_peers)
    beside.add_argument("--nanogpt", type=path_option, help="folder of nanoGPT")
    beside.add_argument("--build_nanogpt", type=path_option, help="folder of build-nanogpt")
    beside.add_argument("--gguf", type=path_option, help="GPT-2 124M as llama.cpp reads it")
    beside.add_argument(
        "--python",
        type=path_option,
        help="of an environment with packages that this one lacks: accelerate, ctranslate2, "
        "llama-cpp-python, optimum-onnx with onnxruntime, optimum-intel with openvino",
    )
    beside.add_argument("--text", type=path_option, help=".parquet; none: Python's own library")
    beside.add_argument(
        "--tasks", type=path_option, help="of HellaSwag, .jsonl; none: random words"
    )
    beside.add_argument("--only", nargs="+", choices=peers.KINDS, help="these; none: all")
    beside.add_argument(
        "--folder",
        type=path_option,
        help="for what is prepared and measured, so that the same command goes on where it was "
        "stopped; none: a temporary one",
    )

    show = add_bench("show", bench_show)
    show.add_argument("file", type=path_option, help="what --json printed")

    # What several have.
    for bench in (step, ladder, choices):
        bench.add_argument("--size", default="gpt2", choices=SHAPES, help="which GPT-2")
        bench.add_argument("--batch_size", type=int, default=4, help="sequences")
        bench.add_argument("--block_size", type=int, default=1024, help="tokens in a sequence")
        bench.add_argument("--steps", type=int, default=3, help="steps timed in a round")
    for bench in (score, sample, step, ladder, choices):
        known = auto.WEIGHTS if bench in (score, sample) else runtime.DTYPES
        dtypes = ["auto", *known]
        bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
        bench.add_argument("--dtype", default="auto", choices=dtypes, help="of matrix products")
    for bench in (tokenize, score, sample, step, ladder, choices, beside):
        bench.add_argument("--rounds", type=int, default=3, help="how often each run is measured")
    for bench in (tokenize, score, sample, step, ladder, choices, memory, plan, beside):
        bench.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def check_counts(arguments: argparse.Namespace) -> None:
    """ValueError if a number is too small to measure anything."""
    smallest = dict.fromkeys(("rounds", "batch", "max_tokens", "prompt_tokens", "steps"), 1)
    smallest |= dict.fromkeys(("workers", "limit"), 0)
    for name, least in smallest.items():
        value = getattr(arguments, name, least)
        if value < least:
            raise ValueError(f"--{name} {value}: must be {least} or more")


@command("bench.py")
def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    check_counts(arguments)
    machine = runtime.start(getattr(arguments, "device", "cpu"))
    measured = arguments.measure(arguments, machine)
    settings = {}
    for name, value in vars(arguments).items():
        if name not in ("bench", "measure", "json"):
            settings[name] = value
    result = {
        "bench": arguments.bench,
        "device": machine.device_name(),
        "torch": torch.__version__,
        "settings": settings,
    }
    # plan and show bring a device of their own; show brings a whole result.
    result.update(measured)
    if getattr(arguments, "json", False):
        print(json.dumps(result))
    else:
        print(format_table(result))


if __name__ == "__main__":
    main()
