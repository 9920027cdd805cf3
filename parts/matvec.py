"""The product of a matrix with a few vectors on a CPU, by a kernel in C.

A new token of each text takes one vector through every matrix, and the time is that of reading the
weights from memory. torch's products are made for many vectors: with one they reach half of the
memory's rate, and they have none for weights of 8 bits that is faster. So parts/matvec.c is
compiled where it is first needed, and kept in the user's cache; where there is no GCC, or the
kernel's results are wrong, torch does the work.
"""

if __name__ == "__main__":
    raise SystemExit("parts/matvec.py is no command: README.md lists the commands")

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

SOURCE = Path(__file__).with_name("matvec.c")

# Beyond so many vectors, torch's products are faster.
MOST_VECTORS = 4

COMPILE = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-c"]
# Without -fopenmp: the kernel's threads are then those of the OpenMP that torch has loaded, and
# not of a second one beside it.
LINK = ["-shared", "-nostartfiles"]


class Kernel:
    """The compiled parts/matvec.c."""

    def __init__(self, library: Path):
        """OSError if the library cannot be loaded."""
        functions = ctypes.CDLL(str(library))
        self.functions = {
            torch.bfloat16: functions.multiply_bf16,
            torch.int8: functions.multiply_int8,
        }
        for function in self.functions.values():
            function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3
            function.restype = None

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (..., n_in), weight (n_out, n_in) in bf16 or int8 -> (..., n_out) in float32.

        scale and bias are (n_out) in float32: y = scale * (W x) + bias.
        """
        n_out, n_in = weight.shape
        x = x.to(torch.float32).contiguous()
        y = x.new_empty(*x.shape[:-1], n_out)
        n_vectors = x.numel() // n_in
        tensors = (x, weight, scale, bias, y)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.functions[weight.dtype](*pointers, n_vectors, n_in, n_out)
        return y


@functools.cache
def load_kernel() -> Kernel | None:
    """The kernel, compiled for this CPU if it was not yet; None where it cannot be had."""
    compiler = shutil.which("gcc")
    # Elsewhere torch has another OpenMP.
    if sys.platform != "linux" or compiler is None:
        return None
    try:
        library = cache_folder() / f"matvec-{fingerprint()}.so"
        if not library.exists():
            compile_kernel(compiler, library)
        kernel = Kernel(library)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # Path.home() may not be known
        return None
    return kernel if is_right(kernel) else None


def cache_folder() -> Path:
    """Where the user's programs keep what they can make again."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "reproduce-gpt2"


def fingerprint() -> str:
    """What the library depends on: its source, how it is compiled, and the CPU, because several
    machines may share a home folder.
    """
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features", "model name")):
            cpu += line
        if not line:
            break  # the first CPU is described
    facts = [SOURCE.read_text(), cpu, *COMPILE, *LINK]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def compile_kernel(compiler: str, library: Path) -> None:
    """Compile the library, which takes half a second. OSError or SubprocessError if it fails."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        object_file = Path(folder) / "matvec.o"
        linked = Path(folder) / "matvec.so"
        commands = [
            [compiler, *COMPILE, str(SOURCE), "-o", str(object_file)],
            [compiler, *LINK, str(object_file), "-o", str(linked)],
        ]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        os.replace(linked, library)  # two programs may compile it at once


def is_right(kernel: Kernel) -> bool:
    """Whether the kernel gives what torch gives, also where the width is odd."""
    draw = torch.Generator().manual_seed(0)
    for n_in in (64, 203):
        x = torch.randn(3, n_in, generator=draw)
        weight = torch.randn(7, n_in, generator=draw)
        bias = torch.randn(7, generator=draw)
        half = weight.to(torch.bfloat16)
        whole, scale = quantise(weight)
        results = [
            (kernel.multiply(x, half, bias=bias), F.linear(x, half.float(), bias)),
            (
                kernel.multiply(x, whole, scale, bias),
                F.linear(x, dequantise(whole, scale), bias),
            ),
        ]
        for result, expected in results:
            if not torch.allclose(result, expected, rtol=1e-4, atol=1e-4):
                return False
    return True


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (n_out, n_in) as int8 and the scale of each row (n_out): W = scale * int8, about.

    The largest weight of a row becomes 127. A row's error is at most half a step.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def dequantise(whole: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The matrix that `quantise` stands for, in float32."""
    return whole.float() * scale[:, None]
