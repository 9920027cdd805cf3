"""What "auto" means on this machine: precision, attention, threads, torch.compile, and the batch.

No flag of a CPU tells which precision it multiplies faster: with AVX512_BF16, bf16 was twice as
fast as fp32 on one CPU and slower on another. So candidates run a piece of the real work, and the
fastest is taken.
"""

import copy
import functools
import math
import os
import statistics
import time
from collections.abc import Callable

import torch

from parts import GPT
from parts.inference import pack
from parts.runtime import DTYPES, Runtime

RACE_PAYS = 20  # seconds: a shorter run takes the first candidate
MOST_TOKENS = {
    "cuda": 65_536,
    "cpu": 8_192,
    "mps": 8_192,
}  # in a micro-step; larger ones are not faster
SMALL = 1_000_000  # multiply-adds in a block: threads would spend more time on meeting each other


def race(candidates: dict[str, Callable[[], object]], seconds: float = 0.15) -> dict[str, float]:
    """The median time in ms of each candidate. They take turns, at least three."""
    for run in candidates.values():
        run()  # the first call sets up kernels and memory
    times, end = {name: [] for name in candidates}, time.perf_counter() + seconds
    while min(map(len, times.values())) < 3 or time.perf_counter() < end:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def fastest(times: dict, margin: float = 1.03) -> object:
    """The name with the lowest time. The first name stays unless another one is faster by the
    margin.
    """
    first, best = next(iter(times)), min(times, key=times.get)
    return best if times[best] * margin < times[first] else first


def race_threads(run: Callable[[], object], ms: float) -> dict[int, float]:
    """Number of threads -> ms of `run`, which takes `ms` with all of them. Empty where a race
    cannot pay.

    In a small model the threads spend more time on meeting each other than on work, above all when
    other programs use the CPU too. OMP_NUM_THREADS, which torchrun sets as well, leaves nothing to
    choose.
    """
    most = torch.get_num_threads()
    counts = sorted({max(1, most >> shift) for shift in (0, 2, 4, 6, 8)}, reverse=True)
    if "OMP_NUM_THREADS" in os.environ or most * ms > 120 or len(counts) == 1:
        return {}

    def run_on(n: int) -> None:
        torch.set_num_threads(n)
        run()

    times = race({n: functools.partial(run_on, n) for n in counts})
    torch.set_num_threads(most)
    return times


def contest(
    runs: dict[str, Callable[[], object]], margin: float = 1.03
) -> tuple[str, int | None, dict, str]:
    """The name that wins the race, its best number of threads (None: no race), the times, and these
    in words.
    """
    times = race(runs)
    name = fastest(times, margin)
    threads = race_threads(runs[name], times[name])
    shown = [f"{ms:.1f}" for ms in sorted(times.values())]
    shown += [f"{n} thread{'s' * (n > 1)} {ms:.1f}" for n, ms in threads.items()]
    why = f" (ms a block: {', '.join(shown)})"
    return name, fastest(threads) if threads else None, times, why


# ---- Training ------------------------------------------------------------------------------------


def precisions(setting: str, device: torch.device) -> list[str]:
    """The precisions of matrix products to choose from. ValueError for one that the device does not
    have.
    """
    if setting == "fp16" and device.type != "cuda":
        raise ValueError(
            f"dtype=fp16 is for CUDA GPUs without bf16; on {device.type} use bf16 or fp32"
        )
    if setting != "auto":
        return [setting]
    if device.type == "cuda":  # bf16 has float32's range, so gradients need no scaling
        return ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]
    # Without instructions for it, bf16 on a CPU is a hundred times slower: too slow for a race.
    has_bf16 = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return (
        ["fp32", "bf16"] if has_bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["fp32"]
    )


def choose(config, model: GPT, machine: Runtime, before: dict) -> tuple[dict, str]:
    """How a training run computes, {"dtype", "flash", "threads", "compile"}, and two lines that say
    why.

    The whole run decides what pays, not the steps left. before: what a run that is resumed has
    chosen; it stays.
    """
    on_cpu, T = machine.device.type == "cpu", config.block_size
    seconds = expected_seconds(
        model.flops_per_token(T) * config.total_batch_size * config.max_steps, machine
    )
    dtypes = precisions(config.dtype, machine.device)
    # Spelled-out attention can win where the (T, T) matrix is small.
    flashes = [True, False] if on_cpu and T <= 256 else [True]
    flashes = flashes if config.flash == "auto" else [config.flash]
    named = {in_words(dtype, flash): (dtype, flash) for dtype in dtypes for flash in flashes}
    name, threads, times, why = next(iter(named)), None, {}, ""
    if on_cpu and seconds > RACE_PAYS:
        runs = {
            name: block_pass(model, T, DTYPES[dtype], flash)
            for name, (dtype, flash) in named.items()
        }
        name, threads, times, why = contest(runs)
        model.zero_grad(set_to_none=True)

    choice = dict(zip(("dtype", "flash"), named[name]), threads=threads)
    compiled = before.get("compile", "auto") if config.compile == "auto" else config.compile
    choice["compile"], compile_why = compilation(compiled, machine.device, seconds)
    choice |= {
        n: before[n]
        for n in choice
        if before.get(n) is not None and getattr(config, n, "auto") == "auto"
    }
    used = in_words(choice["dtype"], choice["flash"])
    if times and times.get(used, math.inf) > 1.1 * times[name]:
        why += f"; kept from the checkpoint, this machine would take {name}"
    return (
        choice,
        f"arithmetic: {used}{why}\ncompile: {'on' if choice['compile'] else 'off'} ({compile_why})",
    )


def in_words(dtype: str, flash: bool) -> str:
    return f"{dtype}, {'fused' if flash else 'spelled-out'} attention"


def apply(choice: dict, model: GPT) -> None:
    """Set the model and torch to what `choose` has chosen (the precision is the Runtime's)."""
    for block in model.transformer.h:
        block.attn.flash = choice["flash"]
    if choice["threads"]:
        torch.set_num_threads(choice["threads"])


def block_pass(model: GPT, T: int, dtype: torch.dtype, flash: bool) -> Callable[[], None]:
    """Forward and backward pass of the model's first block on about 2.5 GFLOP, some 20 ms on two
    cores.
    """
    block, C = model.transformer.h[0], model.config.n_embd
    tokens = max(128, int(2.5e9 / (72 * C**2)))
    x = torch.randn(max(1, tokens // T), min(T, tokens), C, requires_grad=True)

    def run() -> None:
        block.attn.flash = flash
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            y = block(x)
        y.sum().backward()

    return run


def compilation(setting: bool | str, device: torch.device, seconds: float) -> tuple[bool, str]:
    """Whether to torch.compile a run expected to last so many seconds, for "auto", True or False,
    and why.
    """
    if setting is True and (missing := missing_for_compile(device)):
        raise ValueError(
            f"compile=True: {missing}; use --compile=False, or install what is missing"
        )
    if setting != "auto":
        return setting, "as set"
    # Compiling takes 15 to 60 s. A GPU wins that back in a minute or two; a CPU gains some 15 %, if
    # anything.
    worth = {"cuda": 120, "cpu": 900}.get(device.type, math.inf)
    if seconds < worth:
        return (
            False,
            f"compiling would not pay in a run of about {seconds / 60:.1f} minutes on {device.type}",
        )
    missing = missing_for_compile(device)
    return not missing, missing or "the first step takes a minute longer, the others less"


def missing_for_compile(device: torch.device) -> str:
    """What torch.compile lacks on this machine, in words; empty when a trial succeeds."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(64, device=device))
        return ""
    except Exception as error:  # the compiler, its headers, OpenMP or Triton: whatever it is, the run goes on without
        return f"a trial failed: {str(error).splitlines()[0]}"


def expected_seconds(flops: float, machine: Runtime) -> float:
    """A guess, within a factor of three, of how long the group takes for so many FLOPs."""
    if machine.device.type == "cuda":
        return flops / (0.4 * (machine.peak_flops() or 100e12) * machine.world_size)
    return flops / (75e9 * torch.get_num_threads() * machine.world_size)


def batch_size(setting: int | str, sequences: int, model: GPT, T: int, machine: Runtime) -> int:
    """Sequences in a micro-step: the largest divisor of `sequences`, a process's share of a step,
    up to the setting.

    "auto" takes what fits into the GPU's memory, found by trying: a forward and a backward pass,
    with room for AdamW's two moments. On other devices it takes 8,192 tokens. The result of a step
    does not depend on it.
    """
    most = max(1, MOST_TOKENS[machine.device.type] // T) if setting == "auto" else setting
    divisors = [b for b in range(min(most, sequences), 0, -1) if sequences % b == 0]
    if setting != "auto" or machine.device.type != "cuda":
        return divisors[0]
    for size in divisors:
        if not machine.max(out_of_memory(model, size, T, machine)):  # the same size on all ranks
            return size
    raise torch.OutOfMemoryError("a single sequence does not fit")


def out_of_memory(model: GPT, batch_size: int, T: int, machine: Runtime) -> bool:
    """Whether a training step on this batch needs more memory than the GPU has left."""
    try:
        try_step(model, batch_size, T, machine, moments=2)
        return False
    except torch.OutOfMemoryError:
        return True
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def try_step(
    model: torch.nn.Module, batch_size: int, T: int, machine: Runtime, moments: int
) -> None:
    """Forward and backward pass on a batch of zeros, beside memory for so many moments of the
    optimizer.
    """
    room = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(moments)]  # noqa: F841
    idx = torch.zeros(batch_size, T, dtype=torch.int64, device=machine.device)
    with machine.autocast():
        loss = model(idx, idx)
    loss.backward()


# ---- Inference -----------------------------------------------------------------------------------


def prepare_for_inference(
    model: GPT, machine: Runtime, dtype: str, rows: int
) -> tuple[GPT, Runtime, str]:
    """The model packed on its device, the Runtime with its precision, and a line that says why.

    rows: how many tokens one forward pass has. With "auto" on a CPU, one block races with so many:
    a few rows are bound by reading the weights, so bf16 can win here on CPUs where it loses in
    training.
    """
    model, names, why = model.to(machine.device), precisions(dtype, machine.device), ""
    block, name = model.transformer.h[0], names[0]
    if machine.device.type == "cpu" and rows * 12 * model.config.n_embd**2 < SMALL:
        torch.set_num_threads(1)
        why = " (a small model: one thread)"
    elif machine.device.type == "cpu" and dtype == "auto":
        x = torch.randn(rows, 1, model.config.n_embd)
        runs = {n: functools.partial(pack(copy.deepcopy(block), DTYPES[n]), x) for n in names}
        with torch.no_grad():
            name, threads, _, why = contest(
                runs, margin=1.1
            )  # a near tie must not change the text of a seed
        torch.set_num_threads(threads or torch.get_num_threads())
    return pack(model, DTYPES[name]), machine.computing_in(name), f"dtype: {name}{why}"
