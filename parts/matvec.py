"""The product of a matrix with a few vectors on a CPU, by a kernel in C.

A new token of each text takes one vector through every matrix, and the time is that of reading the
weights from memory. torch's products are made for many vectors: with one they reach half of the
memory's rate, and they have none for weights of 8 bits that is faster. So there is parts/matvec.c.
Where it cannot be compiled, or its results are wrong, torch does the work.
"""

if __name__ == "__main__":
    raise SystemExit("parts/matvec.py is no command: README.md lists the commands")

import ctypes
import functools
import math
import mmap
from contextlib import suppress

from parts.compiler import load_library

import torch
import torch.nn.functional as F

# Beyond so many vectors, torch's products are faster. With weights of 8 bits, torch has to make
# numbers of 32 bits of them first.
MOST_VECTORS = 4
MOST_VECTORS_INT8 = 32


class Kernel:
    """The compiled parts/matvec.c."""

    def __init__(self, functions: ctypes.CDLL):
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
    functions = load_library("matvec")
    if functions is None:
        return None
    kernel = Kernel(functions)
    return kernel if is_right(kernel) else None


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


class Room:
    """One piece of memory for several matrices, which is read faster than a piece for each."""

    def __init__(self, sizes: list[int]):
        """sizes: of the matrices, in bytes."""
        self.memory = large_pages(sum(round_up(size) for size in sizes))
        self.used = 0

    def store(self, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of the next matrix, in this dtype."""
        n_bytes = matrix.numel() * dtype.itemsize
        place = self.memory[self.used : self.used + n_bytes]
        self.used += round_up(n_bytes)
        return place.view(dtype).view(matrix.shape).copy_(matrix)


def round_up(n_bytes: int) -> int:
    """To whole cache lines."""
    return math.ceil(n_bytes / 64) * 64


def large_pages(n_bytes: int) -> torch.Tensor:
    """Zeros (n_bytes) uint8 in pages of 2 MB, where Linux has them: a CPU that reads through pages
    of 4 kB stops at each of them to look it up.
    """
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


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
