"""Measured speed. Each figure comes from the functions that the scripts themselves call, and from interleaved rounds.

    python bench.py tokenize                               the source of Python's own library
    python bench.py tokenize text.parquet --workers 8      files of text, .jsonl or .parquet
    python bench.py hellaswag --data tasks.jsonl           the score's batches against one task at a time
    python bench.py sample --batch 32                      generation against transformers'
    python bench.py train --batch_size 8                   a training step against transformers', and what it waits for
    python bench.py memory                                 which batch of which GPT-2 fits into which GPU: estimates
    python bench.py ladder --chart ladder.svg              what each of a step's speed-ups brings, one after the other
    python bench.py show results/cpu/ladder.json           the table of a result printed with --json

The table goes to the standard output, how far things are to the standard error.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import configurator
import data
import generate
import hellaswag
import model as gpt
import prepare
import runtime
import train
from model import GPT, SIZES, GPTConfig
from run import read_metrics
from runtime import Runtime


def say(line: str) -> None:
    print(line, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# tokenize: data.py's pipeline, from files to shards, against tiktoken alone


def documents_of(files: list[Path], column: str) -> list[str]:
    pieces = prepare.pieces_of(files, column)
    return [text.decode("utf-8", errors="replace") for piece in pieces for _, _, text in piece]


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
    with multiprocessing.get_context(prepare.START_METHOD).Pool(n) as pool:
        times = pool.starmap(plain_tiktoken, [(files, column)] * n, chunksize=1)
    return statistics.mean(end - start for start, end in times)


def shard(files: list[Path], column: str, workers: int) -> tuple[float, int]:
    """Seconds from files to fsynced shards, without the start of the workers; and the tokens."""
    with tempfile.TemporaryDirectory() as folder, prepare.tokenising("gpt2", workers) as tokenise_all:
        out, tokenizer, start = Path(folder) / "bench", data.get_tokenizer("gpt2"), time.time()
        rows = prepare.shard_files(files, out, tokenise_all, tokenizer, {"train": 100_000_000}, column)
        return time.time() - start, sum(row["tokens"] for row in rows["train"])


def bench_tokenize(arguments: argparse.Namespace) -> dict:
    files = [Path(path) for path in arguments.files] or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    column, workers = arguments.text_column, arguments.workers or prepare.available_cpus()
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
    model = GPT.from_pretrained(arguments.model) if arguments.model else GPT(GPTConfig())
    model = model.to(machine.device).eval()
    packed = generate.pack(copy.deepcopy(model), machine.dtype)  # as hellaswag.py has it
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
        generate.generate(ours, prompts, n, temperature=0)

    def generate_theirs(n: int) -> None:
        theirs.generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None)

    both = {"ours": generate_ours, "transformers": generate_theirs}
    rounds, n = [], arguments.max_tokens
    for write in both.values():
        write(2)
    for _ in range(arguments.rounds):
        row = {}
        for name, write in both.items():
            row[f"{name}, tokens/s"] = arguments.batch * n / seconds_of(write, n, machine)
            row[f"{name}, first token, ms"] = 1000 * seconds_of(write, 1, machine)
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
    return generate.pack(ours.to(machine.device).eval(), machine.dtype), theirs.to(machine.device).eval()


def seconds_of(write: Callable[[int], None], n: int, machine: Runtime) -> float:
    start = time.perf_counter()
    write(n)
    machine.synchronize()
    return time.perf_counter() - start


def show_sample(result: dict) -> None:
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:32} {value:10.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# train and ladder: steps of train.py itself, each run a process of its own

# The lecture's order. Each rung keeps the settings of those below it.
LADDER = {
    "float32": dict(dtype="fp32", tf32=False, compile=False, flash=False, pad_vocab=False, fused=False),
    "TF32": dict(tf32=True),
    "bf16 autocast": dict(dtype="bf16"),
    "torch.compile": dict(compile=True),
    "flash attention": dict(flash=True),
    "padded vocabulary": dict(pad_vocab=True),
    "fused AdamW": dict(fused=True),
    "4 micro-steps": dict(accumulate=4),
}


def steps_of_train(arguments: argparse.Namespace, folder: Path, accumulate: int = 1, **settings) -> dict:
    """`python train.py` with these settings on random tokens: medians over its steps but the first."""
    B, T = arguments.batch_size, arguments.block_size
    n_steps = settings.pop("max_steps", 1 + arguments.steps)
    if not (folder / "tokens_train_000001.bin").exists():
        tokens = np.random.default_rng(0).integers(0, 50257, 4 * (B * n_steps + 4) * T, dtype=np.uint16)
        data.write_shard(folder / "tokens_train_000001.bin", tokens)
    settings |= dict(data_dir=folder, out_dir=folder / "run", resume="never", batch_size=B, block_size=T)
    settings |= dict(total_batch_size=B * T * accumulate, max_steps=n_steps, warmup_steps=0, device=arguments.device)
    settings = dict(eval_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0) | settings
    settings |= dict(n_layer=arguments.n_layer, n_head=arguments.n_head, n_embd=arguments.n_embd)
    command = [sys.executable, str(Path(train.__file__)), *(f"--{name}={value}" for name, value in settings.items())]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = f"train.py ended with {run.returncode}: {(run.stderr.splitlines() or ['?'])[-1]}"
        out_of_memory = run.returncode == -9 or "out of memory" in run.stderr  # -9: the kernel killed it
        raise (torch.OutOfMemoryError if out_of_memory else ValueError)(reason)
    records = read_metrics(folder / "run" / "metrics.jsonl")
    timed = [record for record in records if record["kind"] == "train"][1:]
    ms = statistics.median(record["ms"] for record in timed)
    flops = records[0]["flops_per_token"] * B * T * accumulate / (ms / 1000)
    found = dict(ms=ms, tokens_per_s=B * T * accumulate / (ms / 1000), flops=flops, mfu=timed[-1]["mfu"])
    found["memory_gb"] = max(record["memory_gb"] for record in timed)
    waits = [record["waited_ms"] for record in timed]
    return found | dict(waited_ms=statistics.median(waits), longest_wait_ms=max(waits))


def steps_of_transformers(arguments: argparse.Namespace, machine: Runtime, dtype: torch.dtype, compiled: bool) -> dict:
    """The same steps as most people write them: GPT2LMHeadModel, autocast, fused AdamW, clipping."""
    B, T = arguments.batch_size, arguments.block_size
    shape = dict(n_layer=arguments.n_layer, n_head=arguments.n_head, n_embd=arguments.n_embd)
    model = gpt2_of_transformers(T, **shape).to(machine.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    seconds = []
    for _ in range(1 + arguments.steps):
        idx = torch.randint(50257, (B, T), device=machine.device)
        machine.synchronize()
        start = time.perf_counter()
        with torch.autocast(machine.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        machine.synchronize()
        seconds.append(time.perf_counter() - start)
    ms = 1000 * statistics.median(seconds[1:])
    return dict(ms=ms, tokens_per_s=B * T / (ms / 1000), memory_gb=machine.peak_memory())


def in_a_process_of_its_own(function: Callable, *arguments) -> dict:
    """function(*arguments) in a new process, without our settings. torch.OutOfMemoryError if the process is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenExecutor:
            raise torch.OutOfMemoryError("a process was killed; try a smaller --batch_size") from None


def matmul_rate(machine: Runtime) -> float:
    """FLOP/s of one large product in the dtype of training: the most that this machine gives, now."""
    n = 8192 if machine.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        machine.synchronize()
        start = time.perf_counter()
        a @ b
        machine.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[2:])


def bench_train(arguments: argparse.Namespace) -> dict:
    machine = runtime.start(arguments.device, arguments.dtype)
    dtype = next(name for name, value in runtime.DTYPES.items() if value == machine.dtype)
    say("; ".join(machine.notes))
    with tempfile.TemporaryDirectory() as folder:
        ours = functools.partial(steps_of_train, arguments, Path(folder), dtype=dtype)
        theirs = functools.partial(in_a_process_of_its_own, steps_of_transformers, arguments, machine)
        runs = {"ours": functools.partial(ours, compile=False)}
        runs["transformers"] = functools.partial(theirs, machine.dtype, False)
        if arguments.compile:
            runs["ours, compiled"] = functools.partial(ours, compile=True)
            runs["transformers, compiled"] = functools.partial(theirs, machine.dtype, True)
        if arguments.fp32:
            runs["transformers, float32"] = functools.partial(theirs, torch.float32, False)
        result = measured(runs, arguments, machine) | {"baseline": "transformers"}

        try:  # One more run, which saves a checkpoint. If it fails, the measurements above are kept.
            saving = ours(compile=False, checkpoint_every=arguments.steps)
            result["checkpoint_wait_ms"] = saving["longest_wait_ms"]
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            say(f"NOTE: {error}")
    return result


def bench_ladder(arguments: argparse.Namespace) -> dict:
    machine = runtime.start(arguments.device, arguments.dtype)
    say("; ".join(machine.notes))
    runs, settings = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changed in LADDER.items():
            settings = settings | changed
            if name != "TF32" or machine.device.type == "cuda":  # there is none elsewhere
                runs[name] = functools.partial(steps_of_train, arguments, Path(folder), **settings)
        return measured(runs, arguments, machine) | {"baseline": "float32"}


def measured(runs: dict[str, Callable[[], dict]], arguments: argparse.Namespace, machine: Runtime) -> dict:
    """Medians over rounds of all runs, and the best matmul rate in that time. A run that is out of memory is None."""
    rounds, rates = [], []
    for _ in range(arguments.rounds):
        rates.append(matmul_rate(machine))
        rounds.append({})
        for name, run in runs.items():
            try:
                rounds[-1][name] = run()
                say(f"{name:24} {rounds[-1][name]['ms']:10,.1f} ms")
            except torch.OutOfMemoryError as error:
                rounds[-1][name] = None
                say(f"{name:24} out of memory: {str(error).splitlines()[0]}")
    rate = max(*rates, matmul_rate(machine))
    rows = {}
    for name in runs:
        if any(each[name] is None for each in rounds):
            rows[name] = None
            continue
        rows[name] = {key: median([each[name][key] for each in rounds]) for key in rounds[0][name]}
        if "flops" in rows[name]:
            rows[name]["of_matmul"] = rows[name]["flops"] / rate
    shape = {name: getattr(arguments, name) for name in ("n_layer", "batch_size", "block_size", "rounds")}
    return dict(device=machine.device_name(), torch=torch.__version__, **shape, matmul_flops=rate, rows=rows)


def median(values: list) -> float | None:
    return None if None in values else statistics.median(values)


def show_steps(result: dict) -> None:
    print(
        f"{result['device']}, torch {result['torch']}; {result['batch_size']} x {result['block_size']} tokens; ", end=""
    )
    print(f"a large matmul does {result['matmul_flops'] / 1e9:,.0f} GFLOP/s")
    print(f"{'':24} {'ms a step':>10} {'tokens/s':>10} {'speed-up':>9} {'of matmul':>10} {'mfu':>6} {'memory':>9}")
    base = (result["rows"][result["baseline"]] or {}).get("tokens_per_s", math.nan)
    for name, row in result["rows"].items():
        if row is None:
            print(f"{name:24} out of memory")
            continue
        share, mfu, memory = row.get("of_matmul"), row.get("mfu"), row.get("memory_gb")
        print(
            f"{name:24} {row['ms']:10,.1f} {row['tokens_per_s']:10,.0f} {row['tokens_per_s'] / base:8.2f}x "
            f"{f'{share:.0%}' if share else '':>10} {f'{mfu:.0%}' if mfu else '':>6} "
            f"{f'{memory:.1f} GB' if memory else '':>9}"
        )


def show_train(result: dict) -> None:
    show_steps(result)
    ours, saving, every = result["rows"]["ours"], result.get("checkpoint_wait_ms"), train.TrainConfig.checkpoint_every
    if ours is None:
        return
    if "waited_ms" in ours:  # older results have neither
        share = ours["waited_ms"] / ours["ms"]
        print(f"waiting for data and the log: {ours['waited_ms']:.2f} ms, {share:.3%} of a step")
    if saving is not None:
        print(f"waiting for a checkpoint: {saving:,.0f} ms, {saving / (every * ours['ms']):.3%} of {every:,} steps")


def draw_ladder(result: dict, path: str) -> None:
    """One bar of tokens/s for each rung that was measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--chart needs matplotlib: pip install matplotlib") from None
    rows = {name: row for name, row in result["rows"].items() if row}
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens/s", title=f"Training steps of GPT-2 on {result['device']}")
    bars = axes.barh(list(rows), [row["tokens_per_s"] for row in rows.values()])
    axes.bar_label(bars, [f" {row['ms']:,.0f} ms" for row in rows.values()])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    figure.savefig(path)


# ----------------------------------------------------------------------------------------------------------------------
# memory: what a step needs of it, counted on any machine, and so which batch fits into which GPU

CARDS_GB = (24, 80, 141)
USABLE = 0.9  # of them; the rest is CUDA's own, and gaps between tensors
TYPICAL_MFU = 0.4  # to tell tokens/s: what others reach with GPT-2 124M on an H100


def bytes_kept(model: torch.nn.Module, loss_of: Callable, idx: torch.Tensor) -> int:
    """What autograd keeps of a forward pass under bf16 autocast until the backward pass, besides the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # the storage's address -> bytes: some tensors are kept several times

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, idx)  # held, or all would be freed while it is counted
    assert loss.requires_grad
    return sum(size for address, size in kept.items() if address not in parameters)


def bytes_a_sequence(build: Callable[[int], torch.nn.Module], loss_of: Callable, n_layer: int, T: int) -> dict:
    """What each sequence adds: to the blocks, and to one of them; from one and two blocks, one and two sequences."""
    of_sequence = []
    for layers in (1, 2):
        model = build(layers)
        one, two = (bytes_kept(model, loss_of, torch.zeros(B, T, dtype=torch.int64)) for B in (1, 2))
        of_sequence.append(two - one)
    block = of_sequence[1] - of_sequence[0]
    return dict(sequence=of_sequence[0] + (n_layer - 1) * block, block=block)


def our_loss(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    return model(idx, idx)


def their_loss(model: torch.nn.Module, idx: torch.Tensor) -> torch.Tensor:
    return model(idx, labels=idx).loss


def gpt2_of_transformers(T: int, n_layer: int, **shape) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_layer=n_layer, n_positions=T, **shape, **no_dropout)
    )


def memory_of(name: str, T: int) -> dict:
    """Estimates for one of GPT-2's sizes: bytes that are there for any batch, and bytes for each sequence of it."""
    shape, C = SIZES[name], SIZES[name]["n_embd"]
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape, block_size=T))
    # Weights, gradients and AdamW's two means in float32, weights in bf16; the head's gradient, and its logits at work.
    padded = model.config.padded_vocab_size
    fixed = 18 * model.num_params() + 4 * padded * C + (2 + 4) * padded * gpt.ROWS

    def build(layers: int) -> GPT:
        return GPT(GPTConfig(**shape | dict(n_layer=layers), block_size=T))

    kept = bytes_a_sequence(build, our_loss, shape["n_layer"], T)
    # Computed again, a block keeps what came in, float32, and one at a time has all of it.
    again = kept["sequence"] - (shape["n_layer"] - 1) * kept["block"] + shape["n_layer"] * 4 * T * C
    batches = {
        kind: {str(card): largest_batch(USABLE * card * 1e9 - fixed, size) for card in CARDS_GB}
        for kind, size in (("kept", kept["sequence"]), ("recomputed", again))
    }
    speed = TYPICAL_MFU * runtime.PEAK_FLOPS["H100"] / model.flops_per_token(T)
    return dict(fixed=fixed, kept=kept["sequence"], recomputed=again, batches=batches, tokens_per_s=speed)


def largest_batch(room: float, sequence: float) -> int:
    """The largest power of two of sequences for which there is room; 0 if there is none for one."""
    return 2 ** int(math.log2(room / sequence)) if room >= sequence else 0


def bench_memory(arguments: argparse.Namespace) -> dict:
    T = arguments.block_size
    rows = {}
    for name in SIZES:
        rows[name] = memory_of(name, T)
        say(f"{name} {rows[name]['kept'] / 1e6:,.0f} MB a sequence")
    theirs = bytes_a_sequence(functools.partial(gpt2_of_transformers, T), their_loss, SIZES["gpt2"]["n_layer"], T)
    return dict(block_size=T, rows=rows, transformers=theirs["sequence"])


def show_memory(result: dict) -> None:
    print(f"Estimates for {result['block_size']:,} tokens a sequence in bf16, AdamW, {USABLE:.0%} of a GPU's memory")
    print(f"{'':12} {'always':>9} {'a sequence':>12}  largest batch_size:", end="")
    print("".join(f"{card:>7} GB" for card in CARDS_GB), f"{'tokens/s':>10}")
    for name, row in result["rows"].items():
        # To compute the blocks once more makes four passes of what was three (a backward pass being two).
        for kind, label, slower in (("kept", name, 1), ("recomputed", "  recompute", 3 / 4)):
            print(f"{label:12} {row['fixed'] / 1e9:6.1f} GB {row[kind] / 1e6:9,.0f} MB {'':20}", end="")
            print("".join(f"{batch or '-':>10}" for batch in row["batches"][kind].values()), end="")
            print(f"{row['tokens_per_s'] * slower:>11,.0f}")
    print(f"tokens/s are {TYPICAL_MFU:.0%} of an H100's or H200's data sheet. ", end="")
    print(f"transformers' gpt2 keeps {result['transformers'] / 1e6:,.0f} MB a sequence")


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

    steps_benches = add_steps_benches(benches)
    for bench in (score, sample, *steps_benches):
        bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
        bench.add_argument("--dtype", default="auto", choices=["auto", *runtime.DTYPES], help="(default: %(default)s)")
    for bench in (tokenize, score, sample, *steps_benches):
        bench.add_argument("--rounds", type=int, default=3, help="how often all is measured (default: %(default)s)")
        bench.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    if getattr(arguments, "rounds", 1) < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def add_steps_benches(benches) -> list[argparse.ArgumentParser]:
    steps = benches.add_parser("train", help="a training step of GPT-2 124M, against transformers'")
    steps.add_argument("--compile", action="store_true", help="also with torch.compile, both")
    steps.add_argument("--fp32", action="store_true", help="also transformers' in float32")
    ladder = benches.add_parser("ladder", help="the same step with one speed-up after the other")
    memory = benches.add_parser("memory", help="estimates: which batch of which GPT-2 fits into which GPU")
    memory.add_argument("--block_size", type=int, default=1024, help="tokens in a sequence (default: %(default)s)")
    memory.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    show = benches.add_parser("show", help="the table of a result that was printed with --json")
    show.add_argument("file", help="with that JSON object")
    for bench in (ladder, show):
        bench.add_argument("--chart", metavar="FILE", help="also draw a ladder, as .svg or .png (needs matplotlib)")
    for bench in (steps, ladder):
        bench.add_argument("--batch_size", type=int, default=4, help="sequences a step (default: %(default)s)")
        bench.add_argument("--block_size", type=int, default=1024, help="tokens in each (default: %(default)s)")
        bench.add_argument("--n_layer", type=int, default=12, help="number of blocks (default: %(default)s)")
        bench.add_argument("--n_head", type=int, default=12, help="attention heads (default: %(default)s)")
        bench.add_argument("--n_embd", type=int, default=768, help="width (default: %(default)s)")
        bench.add_argument("--steps", type=int, default=3, help="that are timed, in a round (default: %(default)s)")
    return [steps, ladder]


def read_result(file: Path) -> dict:
    """The object that --json printed. ValueError if the file holds something else."""
    with contextlib.suppress(ValueError):
        result = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(result, dict) and result.get("bench") in BENCHES:
            return result
    raise ValueError(f"{file}: not a result of bench.py --json")


def show(file: Path, chart: str | None) -> None:
    """Print the table of a saved result. ValueError if the result is incomplete."""
    result = read_result(file)
    try:
        BENCHES[result["bench"]][1](result)
        if chart:
            draw_ladder(result, chart)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: the result is incomplete ({error}); measure again with --json") from None


BENCHES = {  # name: how to measure, how to print
    "tokenize": (bench_tokenize, show_tokenize),
    "hellaswag": (bench_hellaswag, show_hellaswag),
    "sample": (bench_sample, show_sample),
    "train": (bench_train, show_train),
    "ladder": (bench_ladder, show_steps),
    "memory": (bench_memory, show_memory),
}


@configurator.command("bench.py")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.bench == "show":
        show(Path(arguments.file), arguments.chart)
        return
    measure, print_table = BENCHES[arguments.bench]
    try:
        result = dict(bench=arguments.bench) | measure(arguments)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory: {str(error).splitlines()[0]}") from None
    print(json.dumps(result)) if arguments.json else print_table(result)
    if getattr(arguments, "chart", None):
        draw_ladder(result, arguments.chart)


if __name__ == "__main__":
    main()
