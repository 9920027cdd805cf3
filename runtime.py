"""Where the process meets the machine: which device, which precision, which rank, and how fast it could be.

Each choice left on "auto" comes with a sentence that says why, so that nobody has to guess what a run used.
"""

import contextlib
import ctypes
import os
import re
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16 (fp16 on V100 and T4) FLOP/s by the makers' data sheets; the first that the device's name has as a word.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class Runtime:
    """One process's place on the machine and in the group; without torchrun, the only one."""

    device: torch.device
    dtype: torch.dtype  # what matrix products compute in; weights stay float32
    rank: int = 0
    world_size: int = 1
    local_size: int = 1  # processes on this machine
    notes: tuple[str, ...] = ()  # one line for each choice made

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that a clock read now means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place (gloo knows no average)."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """The largest value on any rank, on every rank."""
        if self.world_size == 1:
            return value  # a tensor would make the CPU wait for the GPU
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, value: Any) -> Any:
        """The main rank's value, any object that pickles, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def wait_at_most(self, seconds: int) -> None:
        """How long a collective operation waits for the others from now on, before it is an error."""
        if self.world_size > 1:
            # torch has no public name for it (2.13); torchtitan sets it in the same way.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))

    def device_name(self) -> str:
        return device_name(self.device)

    def peak_memory(self) -> float | None:
        """The most memory that this process has held so far, in GB: the GPU's, else its own; None on Windows."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere

    def mfu(self, flops_per_s: float) -> float | None:
        """Model FLOPs utilisation of the group (PaLM, appendix B), 0 to 1; None if the device's peak is unknown."""
        peak = self.peak_flops()
        return flops_per_s / (peak * self.world_size) if peak else None

    def peak_flops(self) -> float | None:
        """The device's dense half-precision FLOP/s where the data sheet is known, else None."""
        here = self.device_name()
        return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", here)), None)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def start(device: str = "auto", dtype: str = "auto", tf32: bool = True) -> Runtime:
    """Choose device and precision, and join the group if torchrun started this process.

    Raises ValueError for a device that is not there.
    """
    # torchrun tells each process its place; without torchrun it is alone.
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device, why = choose_device(device, world_size, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Products of float32 matrices with 10 bits of mantissa instead of 23, on tensor cores.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    elif device.type == "cpu":
        keep_freed_memory()
    dtype, dtype_note = choose_dtype(dtype, device)

    if world_size > 1:
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        place = dict(store=meeting_place(world_size, local_size), rank=rank, world_size=world_size)
        dist.init_process_group(backend, **place, timeout=timedelta(minutes=10), device_id=device_id)
        why += f"; {world_size} processes over {backend}"
    notes = f"device: {device_name(device)} ({why})", f"dtype: {dtype_note}"
    return Runtime(device, dtype, rank, world_size, local_size, notes)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next step needs as much; other C libraries do as they do.

    Otherwise each tensor of some megabytes is mapped anew and given back when it is freed, and the kernel zeroes its
    pages one fault at a time: a third of a million in a step of 4 layers and 4 x 1,024 tokens.
    """
    TRIM_THRESHOLD, MMAP_MAX = -1, -4  # their numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def meeting_place(world_size: int, local_size: int) -> dist.Store:
    """The store in which processes find each other's addresses, as torchrun's environment says.

    torchrun --max-restarts starts processes anew on the store of those before, where they may find the addresses of the
    dead (pytorch/pytorch#135712). On one machine the count of restarts tells them apart; several machines count each
    for itself, and need a variable that makes torchrun open a store for each start: ValueError if it is not set.
    """
    restarts, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world_size > local_size and shared and most != "0":
        raise ValueError(
            "torchrun --max-restarts over several machines: put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, "
            "or a restart may hang"
        )
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"start_{restarts}", store) if world_size == local_size else store


def choose_device(
    setting: str, world_size: int = 1, local_rank: int = 0, local_size: int = 1
) -> tuple[torch.device, str]:
    """The device for "auto", "cpu", "cuda", "cuda:1" or "mps", and why. Each local process gets a GPU of its own."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name, why = setting, "as set"
    if setting == "auto":
        # DistributedDataParallel knows no mps: several processes on Macs run on their CPUs.
        has_mps = has_mps and world_size == 1
        name, why = (
            "cuda" if has_cuda else "mps" if has_mps else "cpu",
            "found" if has_cuda or has_mps else "no GPU here",
        )
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device={setting}: not a device; use auto, cpu, cuda, cuda:1 or mps")
    if name == "mps" and not has_mps:
        raise ValueError("device=mps: this PyTorch sees no Apple GPU here; use --device=cpu")
    device = torch.device(name)
    if device.type != "cuda":
        return device, why

    if not has_cuda:
        raise ValueError(
            f"device={setting}: PyTorch {torch.__version__} sees no CUDA GPU here; use --device=cpu, or install a "
            "driver and a CUDA build of PyTorch"
        )
    count = torch.cuda.device_count()
    if local_size > count:  # said by every process, not only by those that go without
        raise ValueError(f"{local_size} processes but {count} GPUs on this machine; use --nproc_per_node={count}")
    index = local_rank if device.index is None or local_size > 1 else device.index
    if index >= count:
        raise ValueError(f"device={setting}: this machine has {count} GPUs, counted from 0")
    return torch.device("cuda", index), why


def choose_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of matrix products for "auto", "fp32", "bf16" or "fp16", and why it was taken."""
    if setting != "auto":
        if setting == "fp16" and device.type != "cuda":
            raise ValueError(f"dtype=fp16 is for CUDA GPUs without bf16; on {device.type} use bf16 or fp32")
        return DTYPES[setting], f"{setting} (as set)"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16 (float32's range, so gradients need no scaling)"
        return torch.float16, "fp16 with a gradient scaler (this GPU has no bf16)"
    if device.type == "cpu" and cpu_multiplies_bf16():
        return torch.bfloat16, "bf16 (this CPU multiplies bf16 matrices faster than fp32)"
    return torch.float32, f"fp32 (this {device.type} gains nothing from less)"


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 matrix products: AMX tiles, or AVX-512's dot product.

    Read from what the CPU says of itself and not by a race, so that a resumed run decides as the first one did. LOG.md
    has the races: AVX512_BF16 alone makes a training step 1.3 to 1.9 times faster.
    """
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def choose_compile(setting: bool | str, device: torch.device, seconds: float) -> tuple[bool, str]:
    """Whether to torch.compile a run expected to last so many seconds, for "auto", True or False, and why."""
    if setting is True and (missing := missing_for_compile(device)):
        raise ValueError(f"compile=True: {missing}; use --compile=False, or install what is missing")
    if setting != "auto":
        return setting, f"{'on' if setting else 'off'} (as set)"
    # Compiling takes 15 to 60 s. A GPU wins that back in a minute or two; a CPU gains some 15 %, if anything.
    worth = {"cuda": 120, "cpu": 900}.get(device.type)
    if worth is None:
        return False, f"off (not worth it on {device.type})"
    if seconds < worth:
        minutes = f"about {seconds / 60:.1f} minutes" if seconds > 60 else "less than a minute"
        return False, f"off (compiling would not pay in a run of {minutes})"
    if missing := missing_for_compile(device):
        return False, f"off ({missing})"
    return True, "on (the first step takes a minute longer, the others less)"


def missing_for_compile(device: torch.device) -> str:
    """What torch.compile lacks on this machine, in words; empty when a trial succeeds."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(64, device=device))
    except Exception as error:  # the compiler, its headers, OpenMP or Triton: whatever it is, the run goes on without
        return f"a trial failed with {type(error).__name__}"
    return ""


def expected_seconds(flops: float, runtime: Runtime) -> float:
    """A guess, within a factor of three, of how long the group takes for so many FLOPs: only to decide on compiling."""
    if runtime.device.type == "cuda":
        return flops / (0.4 * (runtime.peak_flops() or 100e12) * runtime.world_size)
    return flops / (75e9 * torch.get_num_threads() * runtime.world_size)
