"""Where the process meets the machine: which device, which rank, and how fast it could be."""

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16 (fp16 on V100 and T4) FLOP/s by the makers' data sheets; the first that the device's
# name has as a word.
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


class Gpu(NamedTuple):
    """A GPU in a data sheet, for plans on paper; PEAK_FLOPS has its FLOP/s."""

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


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One process's place on the machine and in the group; without torchrun, the only one."""

    device: torch.device
    dtype: torch.dtype  # what matrix products compute in; weights stay float32
    rank: int = 0
    world_size: int = 1
    local_size: int = 1  # processes on this machine
    why: str = ""  # the reason for this device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def note(self) -> str:
        return f"device: {self.device_name()} ({self.why})"

    def computing_in(self, dtype: str) -> "Runtime":
        """The same place with products in fp32, bf16 or fp16."""
        return dataclasses.replace(self, dtype=DTYPES[dtype])

    def autocast(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return (
                contextlib.nullcontext()
            )  # a disabled autocast to float32 makes torch 2.9 warn on mps
        return torch.autocast(self.device.type, dtype=self.dtype)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that a clock read now means
        something.
        """
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

    def wait_at_most(self, seconds: int) -> None:
        """How long a collective operation waits for the others from now on, before it is an
        error.
        """
        if self.world_size > 1:
            # torch has no public name for it (2.13); torchtitan sets it in the same way.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return f"{self.device}, {torch.cuda.get_device_name(self.device)}"
        n = torch.get_num_threads()
        return f"cpu, {n} thread{'s' * (n > 1)}" if self.device.type == "cpu" else str(self.device)

    def peak_memory(self) -> float | None:
        """The most memory that this process has held so far, in GB: the GPU's, else its own; None
        on Windows.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere

    def mfu(self, flops_per_s: float) -> float | None:
        """Model FLOPs utilisation of the group (PaLM, appendix B), 0 to 1; None if the device's
        peak is unknown.
        """
        peak = self.peak_flops()
        return flops_per_s / (peak * self.world_size) if peak else None

    def peak_flops(self) -> float | None:
        """The device's dense half-precision FLOP/s where the data sheet is known, else None."""
        here = self.device_name()
        return next(
            (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", here)), None
        )

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def start(device: str = "auto", tf32: bool = True) -> Runtime:
    """Choose the device, and join the group if torchrun started this process.

    Raises ValueError for a device that is not there.
    """
    # torchrun tells each process its place; without torchrun it is alone.
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_size = (
        int(os.environ.get("WORLD_SIZE", 1)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    device, why = choose_device(device, world_size, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Products of float32 matrices with 10 bits of mantissa instead of 23, on tensor cores.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    elif device.type == "cpu":
        keep_freed_memory()

    if world_size > 1:
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        place = dict(store=meeting_place(world_size, local_size), rank=rank, world_size=world_size)
        dist.init_process_group(
            backend, **place, timeout=timedelta(minutes=10), device_id=device_id
        )
        why += f"; {world_size} processes over {backend}"
    return Runtime(device, torch.float32, rank, world_size, local_size, why)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next step needs as much; other C libraries do as they
    do.

    Otherwise each tensor of some megabytes is mapped anew and given back when it is freed, and the
    kernel zeroes its pages one fault at a time: a third of a million in a step of 4 layers and 4 x
    1,024 tokens.
    """
    TRIM_THRESHOLD, MMAP_MAX = -1, -4  # their numbers in malloc.h
    with contextlib.suppress(
        OSError, AttributeError, TypeError
    ):  # TypeError: Windows has no CDLL(None)
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def meeting_place(world_size: int, local_size: int) -> dist.Store:
    """The store in which processes find each other's addresses, as torchrun's environment says.

    torchrun --max-restarts starts processes anew on the store of those before, where they may find
    the addresses of the dead (pytorch/pytorch#135712). On one machine the count of restarts tells
    them apart; several machines count each for itself, and need a variable that makes torchrun open
    a store for each start: ValueError if it is not set.
    """
    restarts, most = (
        os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world_size > local_size and shared and most != "0":
        raise ValueError(
            "--max-restarts on several machines: put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"start_{restarts}", store) if world_size == local_size else store


def choose_device(
    setting: str, world_size=1, local_rank=0, local_size=1
) -> tuple[torch.device, str]:
    """The device for "auto", "cpu", "cuda", "cuda:1" or "mps", and why. Each local process gets a
    GPU of its own.
    """
    has_cuda = torch.cuda.is_available()
    # DistributedDataParallel knows no mps: several processes on Macs run on their CPUs.
    has_mps = world_size == 1 and torch.backends.mps.is_available()
    name, why = setting, "as set"
    if setting == "auto":
        # Without this, a driver that is too old would train on the CPU for days before anyone
        # notices.
        if torch.version.cuda and not has_cuda and Path("/dev/nvidia0").exists():
            build = f"PyTorch {torch.__version__} for CUDA {torch.version.cuda}"
            raise ValueError(
                f"{build} cannot use this GPU; install a newer driver or an older build, or --device=cpu"
            )
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
        why = "no GPU here" if name == "cpu" else "found"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device={setting}: not a device; use auto, cpu, cuda, cuda:1 or mps")
    if name == "mps" and not has_mps:
        raise ValueError(
            "device=mps: no Apple GPU is seen here, or there are several processes; use --device=cpu"
        )
    device = torch.device(name)
    if device.type != "cuda":
        return device, why

    if not has_cuda:
        raise ValueError(
            f"device={setting}: PyTorch {torch.__version__} sees no CUDA GPU here; use --device=cpu"
        )
    count = torch.cuda.device_count()
    if local_size > count:  # said by every process, not only by those that go without
        raise ValueError(
            f"{local_size} processes, but GPUs on this machine: {count}; use --nproc_per_node={count}"
        )
    index = local_rank if device.index is None or local_size > 1 else device.index
    if index >= count:
        raise ValueError(f"device={setting}: GPUs on this machine, counted from 0: {count}")
    major, minor = torch.cuda.get_device_capability(index)
    oldest = min(
        (int(arch[3:]) for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)),
        default=0,
    )
    if 10 * major + minor < oldest:  # for example a V100 with a build for CUDA 13
        gpu = f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}"
        raise ValueError(
            f"{gpu}, this PyTorch has kernels from {oldest / 10} on; install one for an older CUDA"
        )
    return torch.device("cuda", index), why
