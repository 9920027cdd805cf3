"""What "auto" means on this machine: precision, attention, threads, torch.compile, and the batch.

CPU feature flags do not tell which precision is faster: with AVX512_BF16, bf16 was twice as fast as
fp32 on one CPU and slower on another. So candidates run a piece of the real work, and the fastest
is taken.
"""

if __name__ == "__main__":
    raise SystemExit("parts/auto.py is no command: README.md lists the commands")

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from parts import GPT, attention, matvec
from parts.console import plural
from parts.inference import decodes_many, pack
from parts.runtime import DTYPES, Runtime, waits_for_cores

import torch

RACE_PAYS = 20  # seconds: a shorter run takes the first candidate
RACE_SECONDS = 0.15
PATIENCE = 0.5  # seconds that inference waits for other programs
# In a race, the share of a turn for which a thread may wait for a core. Without other programs it
# is below 0.01, beside one a third.
DISTURBED = 0.1
MOST_TOKENS = {"cuda": 65_536, "cpu": 8_192, "mps": 8_192}  # in a micro-step; more is not faster
# The share of a GPU's memory that a step may take. CUDA, NCCL and the gaps between tensors take the
# rest.
USABLE = 0.9
# Multiply-adds in a block: below, synchronising the threads costs more than they save.
SMALL = 1_000_000


@dataclass(frozen=True)
class Arithmetic:
    """How a training run computes. It is chosen once, and a resumed run keeps it."""

    dtype: str  # of matrix products: fp32, bf16 or fp16; weights stay float32
    flash: bool  # fused attention, or the (T, T) matrix in memory
    threads: int | None  # of a CPU; None: as many as torch takes by itself
    compile: bool  # torch.compile
    # The norm of large gradients on a CPU: see optimizer.clip_gradients. Runs of earlier versions
    # go on without.
    exact_norm: bool = False
    # Fused attention's backward pass by parts/attention.c; the same for earlier runs.
    attention_kernel: bool = False

    def __str__(self) -> str:
        attention = "fused" if self.flash else "spelled-out"
        return f"{self.dtype}, {attention} attention"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


# ---- Races ---------------------------------------------------------------------------------------


class Race(NamedTuple):
    """What a race between candidates has shown."""

    times: dict  # candidate -> ms of a turn
    busy: bool  # other programs were in the way of too many turns


class Pick(NamedTuple):
    """The winner of a race between candidates."""

    winner: Any
    threads: int | None  # the winner's best number of threads; None if they did not race
    times: dict  # candidate -> ms of a turn
    note: str  # the times in words


def race(candidates: dict, patience: float = 0.0) -> Race:
    """Time the candidates (anything -> a function to call) in turn, for RACE_SECONDS and at least
    three turns.

    Another program on the same cores makes threads wait for each other, which changes who wins. So
    turns in which a thread had to wait for a core do not count, and the race goes on until each
    candidate has three others, for at most so many seconds of patience more. If there are too few
    even then, all turns count. Whatever disturbs a turn makes it longer: a candidate's time is the
    lower quartile of its turns.
    """
    for run in candidates.values():
        run()  # the first call sets up kernels and memory
    turns: dict[Hashable, list[float]] = {candidate: [] for candidate in candidates}
    calm_turns: dict[Hashable, list[float]] = {candidate: [] for candidate in candidates}
    begin = time.perf_counter()
    while True:
        for candidate, run in candidates.items():
            waits = waits_for_cores()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            waited = longest_wait(waits, waits_for_cores())
            turns[candidate].append(1000 * seconds)
            if waited < DISTURBED * seconds:
                calm_turns[candidate].append(1000 * seconds)
        elapsed = time.perf_counter() - begin
        busy = min(len(calm) for calm in calm_turns.values()) < 3
        n_turns = min(len(each) for each in turns.values())
        limit = RACE_SECONDS + patience if busy else RACE_SECONDS
        if n_turns >= 3 and elapsed >= limit:
            break

    times = {}
    for candidate, ms in (turns if busy else calm_turns).items():
        times[candidate] = statistics.quantiles(ms, n=4)[0]
    return Race(times, busy)


def longest_wait(before: dict[str, float], after: dict[str, float]) -> float:
    """The seconds between two readings of waits_for_cores in which a thread waited, of the thread
    that waited the longest.
    """
    return max((after[thread] - before.get(thread, 0.0) for thread in after), default=0.0)


def fastest(times: dict, margin: float = 1.03) -> Any:
    """The candidate with the lowest time.

    The first candidate stays unless another one is faster by the margin.
    """
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] * margin < times[first] else first


def race_threads(run: Callable[[], object], ms: float, patience: float = 0.0) -> Race:
    """Race numbers of threads, from all to one, in `run`, which takes `ms` with all threads.

    In a small model, synchronising the threads costs more than they save, above all when other
    programs use the CPU too. No times where a race cannot pay, and where OMP_NUM_THREADS, which
    torchrun sets as well, leaves nothing to choose.
    """
    most = torch.get_num_threads()
    counts = {max(1, most >> shift) for shift in (0, 2, 4, 6, 8)}
    if "OMP_NUM_THREADS" in os.environ or most * ms > 120 or len(counts) == 1:
        return Race({}, busy=False)

    def run_on(n: int) -> None:
        torch.set_num_threads(n)
        run()

    candidates = {n: functools.partial(run_on, n) for n in sorted(counts, reverse=True)}
    result = race(candidates, patience)
    torch.set_num_threads(most)
    return result


def pick_threads(threads: Race) -> int | None:
    """The number of threads to take; None if they did not race.

    Beside another program, all threads stay unless fewer are faster by half: the program may end
    long before the work does.
    """
    if not threads.times:
        return None
    return fastest(threads.times, margin=1.5 if threads.busy else 1.03)


def describe_races(candidates: Race, threads: Race) -> str:
    """The times of two races in words."""
    shown = [f"{ms:.1f}" for ms in sorted(candidates.times.values())]
    for n, ms in threads.times.items():
        shown.append(f"{plural(n, 'thread')} {ms:.1f}")
    if candidates.busy or threads.busy:
        shown.append("beside other programs")
    return f" (ms a block: {', '.join(shown)})"


def pick_fastest(candidates: dict, patience: float = 0.0) -> Pick:
    """Race the candidates (anything -> a function to call), then the winner's thread counts."""
    first = race(candidates, patience)
    winner = fastest(first.times)
    # Who has waited once in vain does not wait again.
    left = 0.0 if first.busy else patience
    second = race_threads(candidates[winner], first.times[winner], left)
    return Pick(winner, pick_threads(second), first.times, describe_races(first, second))


def precisions(setting: str, device: torch.device) -> list[str]:
    """The precisions of matrix products to choose from.

    ValueError for one that the device does not have.
    """
    if setting == "fp16" and device.type != "cuda":
        raise ValueError(
            f"dtype=fp16 is for CUDA GPUs without bf16; on {device.type} use bf16 or fp32"
        )
    if setting != "auto":
        return [setting]
    if device.type == "cuda":
        # bf16 has float32's range, so gradients need no scaling.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["bf16"] if has_bf16 else ["fp16"]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # Without instructions for it, bf16 on a CPU is a hundred times slower: too slow to race.
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return ["fp32", "bf16"]
    return ["fp32"]


# ---- Training ------------------------------------------------------------------------------------


def choose_arithmetic(config, model: GPT, machine: Runtime, saved: dict) -> tuple[Arithmetic, str]:
    """How a training run computes, and two lines that say why.

    Decided by the length of the whole run. saved: the fields of the Arithmetic that a resumed run
    began with, which are kept; empty for a new run.
    """
    on_cpu = machine.device.type == "cpu"
    flops = model.flops_per_token(config.block_size) * config.total_batch_size * config.max_steps
    seconds = expected_seconds(flops, machine)

    flash_choices = [config.flash]
    if config.flash == "auto":
        flash_choices = [True]
        if on_cpu and config.block_size <= 256:
            flash_choices.append(False)  # it can win where the (T, T) matrix is small
    candidates = []
    for dtype in precisions(config.dtype, machine.device):
        for flash in flash_choices:
            candidate = Arithmetic(dtype, flash, threads=None, compile=False)
            candidates.append(with_attention_kernel(candidate, machine, saved))

    pick = Pick(candidates[0], None, {}, "")
    if on_cpu and seconds > RACE_PAYS:
        try:
            micro_step_tokens = MOST_TOKENS["cpu"]
            if config.batch_size != "auto":
                micro_step_tokens = config.batch_size * config.block_size
            micro_step_tokens = min(micro_step_tokens, config.total_batch_size)
            passes = block_passes(candidates, model, config.block_size, micro_step_tokens)
            # The longer the run, the more a choice of a busy moment would cost.
            pick = pick_fastest(passes, patience=min(10, seconds / 100))
        except Exception as error:  # a changed model.py may not do with one layer
            pick = pick._replace(note=f" (not timed: {type(error).__name__} in one block)")
    chosen = replace(pick.winner, threads=pick.threads)

    chosen = replace(chosen, exact_norm=saved.get("exact_norm", not saved))

    for name in ("dtype", "flash"):
        if getattr(config, name) == "auto" and saved.get(name) is not None:
            chosen = replace(chosen, **{name: saved[name]})
    chosen = with_attention_kernel(chosen, machine, saved)
    if saved.get("threads") is not None:
        # Two threads add up in another order than one.
        threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else saved["threads"]
        chosen = replace(chosen, threads=threads)
    compile_setting = config.compile
    if compile_setting == "auto" and saved.get("compile") is not None:
        compile_setting = saved["compile"]
    compiles, compile_note = compilation(
        compile_setting, machine.device, seconds, model.config.n_layer
    )
    chosen = replace(chosen, compile=compiles)

    note = pick.note
    kept = replace(chosen, threads=None, compile=False, exact_norm=False)
    if pick.times and pick.times.get(kept, math.inf) > 1.1 * pick.times[pick.winner]:
        note += f"; kept from the checkpoint, this machine would take {pick.winner}"
    is_bf16 = chosen.flash and chosen.dtype == "bf16"
    if saved.get("attention_kernel") and is_bf16 and not chosen.attention_kernel:
        note += (
            "; the checkpoint's backward pass of attention cannot be compiled here: torch's differs"
        )
    if pick.threads and chosen.threads and chosen.threads != pick.threads:
        note += (
            f"; {plural(chosen.threads, 'thread')} as the checkpoint says, this machine would "
            f"take {pick.threads} now: OMP_NUM_THREADS sets another number"
        )
    state = "on" if compiles else "off"
    return chosen, f"arithmetic: {chosen}{note}\ncompile: {state} ({compile_note})"


def apply(arithmetic: Arithmetic, model: GPT) -> None:
    """Set the model's attention and torch's threads. (Callers use the dtype in autocast.)"""
    model.use_flash(arithmetic.flash)
    # A process on another machine may have no compiler.
    attention.use_kernel(arithmetic.attention_kernel and attention.load_kernel() is not None)
    if arithmetic.threads:
        torch.set_num_threads(arithmetic.threads)


def with_attention_kernel(arithmetic: Arithmetic, machine: Runtime, saved: dict) -> Arithmetic:
    """The same with our own backward pass of attention, where it is for that and can be had, and
    the run did not begin without it.
    """
    is_for_it = arithmetic.flash and arithmetic.dtype == "bf16" and machine.device.type == "cpu"
    wanted = saved.get("attention_kernel", not saved)
    use = is_for_it and wanted and attention.load_kernel() is not None
    return replace(arithmetic, attention_kernel=use)


def block_passes(candidates: list[Arithmetic], model: GPT, T: int, micro_step_tokens: int) -> dict:
    """Candidate -> a function that does a forward and backward pass of a thin model in that way.

    It has one block of the model's shape, and of the head as large a share. It reads the tokens of
    a micro-step, or fewer, so that the work is about 5 GFLOP, some 35 ms on two cores. (Without the
    head, or with half of these tokens, one thread is as fast as two in the quickstart's model,
    where it takes a third longer in training.)
    """
    C = model.config.n_embd
    vocab_size = max(64, model.config.vocab_size // model.config.n_layer)
    thin = type(model)(replace(model.config, n_layer=1, vocab_size=vocab_size, recompute=False))
    thin.train()
    T = min(T, model.config.block_size)
    n_tokens = max(128, int(5e9 / (72 * C**2 + 6 * C * vocab_size)))
    n_tokens = min(n_tokens, micro_step_tokens)
    tokens = torch.randint(vocab_size, (max(1, n_tokens // T), min(T, n_tokens) + 1))

    def run(candidate: Arithmetic) -> None:
        apply(candidate, thin)
        low_precision = candidate.torch_dtype != torch.float32
        with torch.autocast("cpu", dtype=candidate.torch_dtype, enabled=low_precision):
            loss = thin(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    return {candidate: functools.partial(run, candidate) for candidate in candidates}


def compilation(
    setting: bool | str, device: torch.device, seconds: float, n_layer: int
) -> tuple[bool, str]:
    """Whether to torch.compile a run that is expected to last so many seconds, and why.

    setting: "auto", True or False. ValueError if it is True and the machine cannot.
    """
    if setting is True:
        missing = missing_for_compile(device)
        if missing:
            advice = "use --compile=False, or install what is missing"
            raise ValueError(f"compile=True: {missing}; {advice}")
    if setting != "auto":
        return bool(setting), "as set"
    # Compiling takes a few seconds a layer: some twenty in all for 12 layers, minutes for 48. A GPU
    # gains a third or more of the time by it, a CPU some 15 %, if anything.
    pays_from = {"cuda": max(120, 10 * n_layer), "cpu": 900}.get(device.type, math.inf)
    if seconds < pays_from:
        minutes = f"{seconds / 60:.1f} minutes on {device.type}"
        return False, f"compiling would not pay in a run of about {minutes}"
    missing = missing_for_compile(device)
    if missing:
        return False, missing
    minutes = plural(math.ceil(n_layer / 15), "minute")
    return True, f"the first step takes up to {minutes} longer, the others less"


def missing_for_compile(device: torch.device) -> str:
    """What torch.compile lacks on this machine, in words; empty when a trial succeeds."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(64, device=device))
        return ""
    except Exception as error:
        # The compiler, its headers, OpenMP or Triton: whatever it is, the run goes on without.
        return f"a trial failed: {str(error).splitlines()[0]}"


def expected_seconds(flops: float, machine: Runtime) -> float:
    """A guess, within a factor of three, of how long the group takes for so many FLOPs."""
    if machine.device.type == "cuda":
        peak = machine.peak_flops() or 100e12
        flops_per_s = 0.4 * peak
    else:
        flops_per_s = 75e9 * torch.get_num_threads()
    return flops / (flops_per_s * machine.world_size)


def batch_size(
    setting: int | str,
    sequences: int,
    model: GPT,
    T: int,
    machine: Runtime,
    dtype: torch.dtype,
    held_bytes: int = 0,
) -> int:
    """Sequences in a micro-step: a divisor of `sequences`, a process's share of a step.

    It is the largest one up to the setting. "auto" takes what fits into the GPU's memory, found by
    trying: a forward and a backward pass, beside held_bytes for the optimizer's state, in USABLE
    of the memory. On other devices it takes 8,192 tokens. The result of a step does not depend on
    it.
    """
    if setting == "auto":
        most = max(1, MOST_TOKENS[machine.device.type] // T)
    else:
        most = int(setting)
    divisors = [b for b in range(min(most, sequences), 0, -1) if sequences % b == 0]
    if setting != "auto" or machine.device.type != "cuda":
        return divisors[0]
    held_bytes += round((1 - USABLE) * machine.total_memory())
    for size in divisors:
        failed = out_of_memory(model, size, T, machine, dtype, held_bytes)
        if not machine.max(failed):  # the same size on all ranks
            return size
    raise torch.OutOfMemoryError("a single sequence does not fit")


def out_of_memory(
    model: GPT, batch_size: int, T: int, machine: Runtime, dtype: torch.dtype, held_bytes: int
) -> bool:
    """Whether a training step on this batch needs more memory than the GPU has left."""
    try:
        try_step(model, batch_size, T, machine, dtype, held_bytes)
        return False
    except torch.OutOfMemoryError:
        return True
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def try_step(
    model: torch.nn.Module,
    batch_size: int,
    T: int,
    machine: Runtime,
    dtype: torch.dtype,
    held_bytes: int,
) -> None:
    """A forward and a backward pass on a batch of zeros. So many bytes are held meanwhile, where
    the optimizer's state will be.
    """
    held = torch.empty(held_bytes, dtype=torch.uint8, device=machine.device)
    # Views of one tensor, as in training: torch.compile would compile again for other strides.
    batch = torch.zeros(batch_size, T + 1, dtype=torch.int64, device=machine.device)
    with machine.autocast(dtype):
        loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    del held


# ---- Inference -----------------------------------------------------------------------------------


class Packing(NamedTuple):
    """How a model's weights are stored for inference."""

    name: str  # of the setting: fp32, bf16, fp16 or int8
    for_c: bool  # rows as they are, for the functions in C: on a CPU, a few tokens at a time

    def pack(self, model: GPT) -> GPT:
        """Pack a model's weights, in place."""
        return pack(model, WEIGHTS[self.name], self.for_c)

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products; with weights in int8, float32."""
        return DTYPES.get(self.name, torch.float32)


# The settings of --dtype, and the weights' dtype.
WEIGHTS = {**DTYPES, "int8": torch.int8}


class Prepared(NamedTuple):
    """A model ready for inference."""

    model: GPT  # packed, on its device
    packing: Packing
    note: str  # a line that says why


def prepare_for_inference(model: GPT, machine: Runtime, dtype: str, rows: int) -> Prepared:
    """Move a model to its device and pack its weights, in place. On a CPU this may also set torch's
    number of threads.

    rows: how many tokens one forward pass has. With dtype "auto" on a CPU, the layers of one block
    race with so many: a few rows are bound by reading the weights, so that bf16 can win here on
    CPUs where it loses in training. Where parts/decode.c multiplies matrices, bf16 needs no race.
    ValueError for a dtype that the device does not have.
    """
    model = model.to(machine.device)
    on_cpu = machine.device.type == "cpu"
    note = ""
    is_small = on_cpu and rows * 12 * model.config.n_embd**2 < SMALL
    if is_small:
        torch.set_num_threads(1)
        note = " (a small model: one thread)"
    if on_cpu and dtype in ("auto", "bf16") and decodes_many(model, rows):
        packing = Packing("bf16", for_c=True)
        return Prepared(packing.pack(model), packing, f"dtype: {packing.name}{note}")
    for_c = on_cpu and rows <= matvec.MOST_VECTORS
    if dtype == "int8":
        names = [dtype]
        if not on_cpu:
            raise ValueError("dtype=int8 is for CPUs; on a GPU use bf16, fp16 or fp32")
    else:
        names = precisions(dtype, machine.device)
    if on_cpu and dtype == "auto" and for_c and matvec.load_kernel() is not None:
        # The kernel needs no instructions for bf16.
        names = ["fp32", "bf16"]
    packing = Packing(names[0], for_c)
    first = None
    if on_cpu and dtype == "auto" and not is_small:
        first = race_packings(model, names, for_c, rows)
        # A near tie must not change the text of a seed from one time to the next.
        packing = fastest(first.times, margin=1.1)
    packed = packing.pack(model)
    if first is not None:
        second = race_threads_of_model(packed, rows, first.times[packing], first.busy)
        threads = pick_threads(second)
        if threads is not None:
            torch.set_num_threads(threads)
        note = describe_races(first, second)
    return Prepared(packed, packing, f"dtype: {packing.name}{note}")


@torch.no_grad()
def race_packings(model: GPT, names: list[str], for_c: bool, rows: int) -> Race:
    """Race the packings of these names in one block of the model's shape."""
    candidates = {}
    for name in names:
        packing = Packing(name, for_c)
        candidates[packing] = pass_through_block(model, packing, rows)
    return race(candidates, PATIENCE)


@torch.no_grad()
def race_threads_of_model(packed: GPT, rows: int, ms_of_block: float, busy: bool) -> Race:
    """Race numbers of threads in the whole packed model. The times are a block's. One block alone
    would stay in the cache, which more threads read no faster.

    busy: other programs were in the way of the race before, so this one does not wait for them.
    """
    n_layer = packed.config.n_layer
    idx = torch.zeros(rows, 1, dtype=torch.int64)
    run = functools.partial(packed.hidden, idx)
    result = race_threads(run, n_layer * ms_of_block, 0.0 if busy else PATIENCE)
    times = {n: ms / n_layer for n, ms in result.times.items()}
    return result._replace(times=times)


def pass_through_block(model: GPT, packing: Packing, rows: int) -> Callable[[], torch.Tensor]:
    """A function: one token of each of so many rows through a packed model of one block."""
    small = type(model)(replace(model.config, n_layer=1, vocab_size=64)).eval()
    packed = packing.pack(small)
    idx = torch.zeros(rows, 1, dtype=torch.int64)
    return lambda: packed.hidden(idx)
