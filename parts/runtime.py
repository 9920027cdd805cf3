"""Where the process meets the machine: its device, its rank, and how fast the device could be."""

if __name__ == "__main__":
    raise SystemExit("parts/runtime.py is no command: README.md lists the commands")

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention import SDPBackend, sdpa_kernel

# Tensors are broadcast together, up to so many bytes in a message.
MESSAGE_BYTES = 100 * 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16 FLOP/s (fp16 on V100 and T4) from the makers' data sheets. A device has the first of
# these names that occurs as a word in its own.
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
    """One process: its device and its place in the group. Without torchrun it is alone."""

    device: torch.device
    rank: int = 0
    world_size: int = 1  # processes on all machines
    local_size: int = 1  # processes on this machine
    why: str = ""  # the reason for this device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def note(self) -> str:
        """The line that a run prints about its device."""
        return f"device: {self.device_name()} ({self.why})"

    # ---- Computing -------------------------------------------------------------------------------

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager:
        """A context in which matrix products are computed in `dtype`. Weights stay float32."""
        if dtype == torch.float32:
            # torch 2.9 warns on mps about an autocast to float32, even a disabled one.
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def synchronize(self) -> None:
        """Wait until the device has finished all its work. Do so before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    # ---- The group: each rank calls these; a process alone gets its own value back ---------------

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, computed in place. (gloo has no average.)"""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """The largest value on any rank."""
        if self.world_size == 1:
            # Not through a tensor, which would make the CPU wait for the GPU.
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, value: Any) -> Any:
        """The main rank's value, which may be any object that can be pickled."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    @torch.no_grad()
    def broadcast_tensors(self, tensors: list[torch.Tensor], rank: int) -> None:
        """Overwrite the tensors, which have one dtype, with those of that rank."""
        messages: list[list[torch.Tensor]] = []
        n_bytes = MESSAGE_BYTES
        for tensor in tensors:
            if n_bytes + tensor.nbytes > MESSAGE_BYTES:
                messages.append([])
                n_bytes = 0
            messages[-1].append(tensor.detach())
            n_bytes += tensor.nbytes
        for message in messages:
            if len(message) == 1:
                dist.broadcast(message[0], src=rank)
                continue
            numbers = torch.cat([tensor.flatten() for tensor in message])
            dist.broadcast(numbers, src=rank)
            if self.rank != rank:
                pieces = numbers.split([tensor.numel() for tensor in message])
                for tensor, piece in zip(message, pieces):
                    tensor.copy_(piece.view_as(tensor))

    def gather(self, value: Any) -> list:
        """The value of each rank on the main rank, an empty list on the others."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor to the main rank, which calls `receive`."""
        dist.send(tensor.contiguous(), dst=0)

    def receive(self, shape: torch.Size, rank: int) -> torch.Tensor:
        """The float32 tensor of this shape that the rank sends."""
        tensor = torch.empty(shape, device=self.device)
        dist.recv(tensor, src=rank)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def wait_at_most(self, seconds: int) -> None:
        """Set how long a collective operation waits for the other ranks before it fails."""
        if self.world_size > 1:
            # torch 2.13 has no public name for this; torchtitan calls it too.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1:
            dist.destroy_process_group()

    # ---- The device ------------------------------------------------------------------------------

    def device_name(self) -> str:
        """The device and its model, or the number of threads on a CPU."""
        if self.device.type == "cuda":
            return f"{self.device}, {torch.cuda.get_device_name(self.device)}"
        if self.device.type == "cpu":
            n_threads = torch.get_num_threads()
            unit = "thread" if n_threads == 1 else "threads"
            return f"cpu, {n_threads} {unit}"
        return str(self.device)

    def peak_memory(self) -> float | None:
        """The most memory this process has used so far, in GB: on the GPU if there is one, else of
        the process itself. None on Windows.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, the others units of 1,024 bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return peak * unit / 1e9

    def total_memory(self) -> int:
        """The bytes of memory of this GPU."""
        _, total = torch.cuda.mem_get_info(self.device)
        return total

    def peak_flops(self) -> float | None:
        """The device's dense half-precision FLOP/s by its data sheet; None if it is not listed."""
        device_name = self.device_name()
        for name, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{name}\b", device_name):
                return flops
        return None

    def mfu(self, flops_per_s: float) -> float | None:
        """Model FLOPs utilisation of the group, 0 to 1 (PaLM, appendix B); None if the device's
        peak is not known.
        """
        peak = self.peak_flops()
        if peak is None:
            return None
        return flops_per_s / (peak * self.world_size)


def changing_shapes(device: torch.device) -> AbstractContextManager:
    """A context for attention whose shapes change from call to call: without cuDNN's kernels.

    torch takes these first on an H100 (torch 2.11 and newer), and they are the fastest in training.
    But for each new shape they build a plan, which others have measured at 0.4 to 1 second.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)


def start(device: str = "auto", tf32: bool = True, large_pages: bool = False) -> Runtime:
    """Choose the device, and join the group if torchrun started this process.

    device: "auto", "cpu", "cuda", "cuda:1" or "mps".
    tf32: on a CUDA GPU, multiply float32 matrices with 10 bits of mantissa instead of 23, on its
    tensor cores.
    large_pages: on a CPU, `use_large_pages`.
    Raises ValueError if the device does not exist or cannot be used.
    """
    # torchrun sets these; without it, the process is alone.
    rank = read_count("RANK", 0)
    local_rank = read_count("LOCAL_RANK", 0)
    world_size = read_count("WORLD_SIZE", 1)
    local_size = read_count("LOCAL_WORLD_SIZE", 1)
    if not rank < world_size or not local_rank < local_size <= world_size:
        raise ValueError(
            f"RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} and "
            f"LOCAL_WORLD_SIZE={local_size} do not fit together; "
            "torchrun sets them, and without it none may be set"
        )

    chosen, why = choose_device(device, world_size, local_rank, local_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    elif chosen.type == "cpu":
        keep_freed_memory()
        if large_pages:
            use_large_pages()

    if world_size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        with say_if_waiting(rank, world_size):
            dist.init_process_group(
                backend,
                store=meeting_place(world_size, local_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(minutes=10),
                device_id=chosen if chosen.type == "cuda" else None,
            )
        why += f"; {world_size} processes over {backend}"
    return Runtime(chosen, rank, world_size, local_size, why)


def waits_for_cores() -> dict[str, float]:
    """Thread of this process -> the seconds so far in which it could have run, but other work had
    its core. Empty where the system, which is not Linux, does not tell.
    """
    waits = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            _, waited_ns, _ = file.read_text().split()
        except (OSError, ValueError):  # the thread has ended, or the kernel does not count
            continue
        waits[file.parent.name] = int(waited_ns) / 1e9
    return waits


def physical_memory() -> int | None:
    """The memory of this machine in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def read_count(name: str, default: int) -> int:
    """A number of torchrun's in the environment. ValueError if it is none."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{name}={text} in the environment: must be a number, as torchrun sets it")
    return int(text)


@contextlib.contextmanager
def say_if_waiting(rank: int, world_size: int, seconds: float = 5) -> Iterator[None]:
    """Print a line if what is done inside takes longer: the other processes are not there yet.

    They may never come, where a scheduler has left its variables in the environment.
    """
    address = os.environ.get("MASTER_ADDR", "?") + ":" + os.environ.get("MASTER_PORT", "?")
    advice = "torchrun --local-addr=127.0.0.1 helps where this machine's name does not resolve"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        advice = "torchrun did not start this process; to run alone: unset WORLD_SIZE RANK"
    line = (
        f"rank {rank} waits at {address} for the others of WORLD_SIZE={world_size} processes "
        f"({advice})"
    )
    timer = threading.Timer(seconds, print, [line], dict(file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the kernel.

    Otherwise each tensor of some megabytes is mapped when it is made and unmapped when it is freed,
    and the kernel zeroes its pages one fault at a time: a third of a million faults in a step of 4
    layers on 4 x 1,024 tokens. Other C libraries are left as they are.
    """
    # Their numbers in malloc.h.
    TRIM_THRESHOLD = -1
    MMAP_MAX = -4
    # Windows raises TypeError for CDLL(None); other C libraries may lack mallopt.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def use_large_pages() -> None:
    """Let the heap grow in pages of 2 MB from now on, where Linux has them for who asks.

    A CPU remembers where some thousand pages are, and has to look up the others: with 4 kB each,
    these are a few megabytes, and every tensor of a larger model is looked up page by page.

    The heap is extended by half of the machine's memory at once and marked; what is not touched
    costs nothing. It stays as it is where the addresses themselves are counted. Afterwards, freed
    memory has to stay in the heap: `keep_freed_memory`.
    """
    MADV_HUGEPAGE = 14  # in Linux' mman.h
    LARGE_PAGE = 2**21
    if sys.platform != "linux":
        return
    # musl has no mallopt, and another heap; a sandbox may have no /proc/sys.
    with contextlib.suppress(OSError, AttributeError):
        if addresses_are_counted():
            return
        libc = ctypes.CDLL(None)
        _ = libc.mallopt
        libc.malloc.argtypes = [ctypes.c_size_t]
        libc.malloc.restype = ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        start = libc.malloc(n_bytes)
        if start:
            first = -(-start // LARGE_PAGE) * LARGE_PAGE
            last = (start + n_bytes) // LARGE_PAGE * LARGE_PAGE
            libc.madvise(first, last - first, MADV_HUGEPAGE)
            libc.free(start)


def addresses_are_counted() -> bool:
    """Whether memory that is not touched uses up a limit: `ulimit -v`, or a Linux that lends no
    more than it has.
    """
    import resource

    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return True
    never_more = "2"
    return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == never_more


def meeting_place(world_size: int, local_size: int) -> dist.Store:
    """The store through which the processes find each other's addresses.

    With --max-restarts, torchrun restarts the processes on the store of the previous start, where
    they may find the addresses of processes that have ended (pytorch/pytorch#135712). On one
    machine a prefix with the number of restarts keeps the starts apart. Several machines count
    their restarts separately, so they need the environment variable that makes torchrun open a new
    store for each start.

    Raises ValueError if that variable is missing.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    max_restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    one_store_for_all_starts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_machine = world_size == local_size
    if not one_machine and one_store_for_all_starts and max_restarts != "0":
        raise ValueError(
            "--max-restarts on several machines: put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "before torchrun"
        )
    store, _, _ = next(rendezvous("env://"))
    if one_machine:
        return dist.PrefixStore(f"start_{restarts}", store)
    return store


def choose_device(
    setting: str, world_size: int = 1, local_rank: int = 0, local_size: int = 1
) -> tuple[torch.device, str]:
    """The device for "auto", "cpu", "cuda", "cuda:1" or "mps", and the reason for it.

    Each of the local_size processes on this machine gets a GPU of its own.
    Raises ValueError if the device does not exist or cannot be used.
    """
    has_cuda = torch.cuda.is_available()
    # DistributedDataParallel does not support mps: several processes on Macs use their CPUs.
    has_mps = world_size == 1 and torch.backends.mps.is_available()
    name = setting
    why = "as set"
    if setting == "auto":
        # Without this check, a driver that is too old would mean days of training on the CPU
        # before anyone notices.
        if torch.version.cuda and not has_cuda and Path("/dev/nvidia0").exists():
            raise ValueError(
                f"PyTorch {torch.__version__} for CUDA {torch.version.cuda} cannot use this GPU; "
                "install a newer driver or an older build, or --device=cpu"
            )
        why = "found"
        if has_cuda:
            name = "cuda"
        elif has_mps:
            name = "mps"
        else:
            name = "cpu"
            why = "no GPU here"

    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", name):
        raise ValueError(f"device={setting}: not a device; use auto, cpu, cuda, cuda:1 or mps")
    if name == "mps" and not has_mps:
        raise ValueError(
            "device=mps: no Apple GPU is seen here, or there are several processes; "
            "use --device=cpu"
        )
    device = torch.device(name)
    if device.type != "cuda":
        return device, why

    if not has_cuda:
        raise ValueError(
            f"device={setting}: PyTorch {torch.__version__} sees no CUDA GPU here; use --device=cpu"
        )
    n_gpus = torch.cuda.device_count()
    if local_size > n_gpus:
        # Every process raises, so that none waits for those that would have no GPU.
        raise ValueError(
            f"{local_size} processes, but GPUs on this machine: {n_gpus}; "
            f"use --nproc_per_node={n_gpus}"
        )
    index = device.index
    if index is None or local_size > 1:
        index = local_rank
    if index >= n_gpus:
        raise ValueError(f"device={setting}: GPUs on this machine, counted from 0: {n_gpus}")
    check_compute_capability(index)
    return torch.device("cuda", index), why


def check_compute_capability(index: int) -> None:
    """Raise ValueError if this PyTorch has no kernels for this GPU, such as a V100 with a build
    for CUDA 13.
    """
    architectures = " ".join(torch.cuda.get_arch_list())
    supported = [int(number) for number in re.findall(r"\bsm_(\d+)\b", architectures)]
    major, minor = torch.cuda.get_device_capability(index)
    if supported and 10 * major + minor < min(supported):
        raise ValueError(
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, "
            f"this PyTorch has kernels from {min(supported) / 10} on; install one for an older CUDA"
        )
