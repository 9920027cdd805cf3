"""Fused causal attention for training, with a backward pass in C for bf16 on a CPU.

torch's fused attention multiplies in small blocks there, and its backward pass takes four times as
long as its forward pass. parts/attention.c has another one; where it cannot be compiled, or its
results are wrong, torch does the work.
"""

if __name__ == "__main__":
    raise SystemExit("parts/attention.py is no command: README.md lists the commands")

import ctypes
import functools
from typing import Any

from parts.compiler import load_library

import torch
import torch.nn.functional as F

CACHE_LINE = 64

# Fused attention of torch for a CPU, which gives also the logsumexp of each query.
forward_pass: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Heads(ctypes.Structure):
    _fields_ = [
        ("numbers", ctypes.c_void_p),
        ("batch", ctypes.c_long),
        ("head", ctypes.c_long),
        ("token", ctypes.c_long),
    ]


class Task(ctypes.Structure):
    """The structures are those of attention.c, where they are explained."""

    _fields_ = [
        ("q", Heads),
        ("k", Heads),
        ("v", Heads),
        ("out", Heads),
        ("grad_out", Heads),
        ("grad_q", Heads),
        ("grad_k", Heads),
        ("grad_v", Heads),
        ("logsumexp", ctypes.c_void_p),
        ("logsumexp_batch", ctypes.c_long),
        ("logsumexp_head", ctypes.c_long),
        ("logsumexp_token", ctypes.c_long),
        ("n_batch", ctypes.c_long),
        ("n_head", ctypes.c_long),
        ("n_tokens", ctypes.c_long),
        ("width", ctypes.c_long),
        ("scale", ctypes.c_float),
        ("scratch", ctypes.c_void_p),
        ("n_threads", ctypes.c_long),
    ]


class Kernel:
    """The compiled parts/attention.c."""

    def __init__(self, functions: ctypes.CDLL):
        self.functions = functions
        functions.scratch_bytes.argtypes = [ctypes.c_long] * 2
        functions.scratch_bytes.restype = ctypes.c_long
        functions.attention_backward.argtypes = [ctypes.POINTER(Task)]
        functions.attention_backward.restype = None
        functions.set_up.argtypes = [ctypes.c_int]
        functions.set_up.restype = None
        self.set_up()

    def set_up(self, use_amx: bool = True) -> None:
        """Multiply by AMX where the CPU and the system have it, or always by AVX-512."""
        self.functions.set_up(use_amx)

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of q, k and v: (B, nh, T, hs) in bf16, as they are; the same for all.

        logsumexp (B, nh, T) in float32, of the scaled scores. hs is a multiple of 32.
        """
        B, n_head, T, width = q.shape
        gradients = empty_gradients(q)
        n_threads = torch.get_num_threads()
        scratch_bytes = n_threads * self.functions.scratch_bytes(T, width)
        scratch = torch.empty(scratch_bytes + CACHE_LINE, dtype=torch.uint8)
        task = Task(
            q=describe_heads(q),
            k=describe_heads(k),
            v=describe_heads(v),
            out=describe_heads(out),
            grad_out=describe_heads(grad_out),
            grad_q=describe_heads(gradients[0]),
            grad_k=describe_heads(gradients[1]),
            grad_v=describe_heads(gradients[2]),
            logsumexp=logsumexp.data_ptr(),
            logsumexp_batch=logsumexp.stride(0),
            logsumexp_head=logsumexp.stride(1),
            logsumexp_token=logsumexp.stride(2),
            n_batch=B,
            n_head=n_head,
            n_tokens=T,
            width=width,
            scale=width**-0.5,
            scratch=round_up(scratch.data_ptr(), CACHE_LINE),
            n_threads=n_threads,
        )
        self.functions.attention_backward(ctypes.byref(task))
        return gradients


def round_up(number: int, unit: int) -> int:
    return (number + unit - 1) // unit * unit


def describe_heads(tensor: torch.Tensor) -> Heads:
    return Heads(tensor.data_ptr(), *tensor.stride()[:3])


def empty_gradients(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three tensors like q, (B, nh, T, hs), whose memory is (B, T, nh, hs): as the gradient of one
    product for q, k and v wants them.
    """
    B, n_head, T, width = q.shape
    dq, dk, dv = (q.new_empty(B, T, n_head, width).transpose(1, 2) for _ in range(3))
    return dq, dk, dv


@functools.cache
def load_kernel() -> Kernel | None:
    """The kernel, compiled for this CPU if it was not yet; None where it cannot be had."""
    functions = load_library("attention")
    if functions is None:
        return None
    kernel = Kernel(functions)
    return kernel if is_right(kernel) else None


def is_right(kernel: Kernel) -> bool:
    """Whether the kernel's gradients are those of the formula in float64, to bf16's rounding."""
    draw = torch.Generator().manual_seed(0)
    for T, width in ((70, 32), (300, 64)):
        q, k, v, grad_out = torch.randn(4, 2, 3, T, width, generator=draw).bfloat16()
        out, logsumexp = forward_pass(q, k, v, is_causal=True)
        results = kernel.backward(grad_out, q, k, v, out, logsumexp)
        for result, expected in zip(results, exact_gradients(grad_out, q, k, v)):
            if not (result - expected).norm() < 0.01 * expected.norm():
                return False
    return True


@torch.enable_grad()
def exact_gradients(grad_out, q, k, v) -> tuple[torch.Tensor, ...]:
    """The gradients of causal attention with respect to q, k and v, in float64."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.autograd.grad((out * grad_out.double()).sum(), (q, k, v))


# ---- In the network ------------------------------------------------------------------------------

kernel_is_used = False


def use_kernel(use: bool) -> None:
    """Whether fused attention has its backward pass from the kernel from now on. It must be there:
    `load_kernel`.
    """
    global kernel_is_used
    kernel_is_used = use


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(hs)) v without the (T, T) matrix in memory.

    F.scaled_dot_product_attention, whose arguments these are. (B, nh, T, hs) -> (B, nh, T, hs).
    """
    is_plain = is_causal and not dropout_p and not options
    if kernel_is_used and is_plain and suits_kernel(q, k, v):
        return FusedAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options
    )


def suits_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a backward pass will come, of tensors that the kernel can take."""
    if not torch.is_grad_enabled() or q.device.type != "cpu" or q.size(-1) % 32 != 0:
        return False
    return all(
        tensor.dtype == torch.bfloat16 and tensor.shape == q.shape and tensor.stride(-1) == 1
        for tensor in (q, k, v)
    )


class FusedAttention(torch.autograd.Function):
    """torch's forward pass, and the kernel's backward pass."""

    @staticmethod
    def forward(ctx, q, k, v) -> torch.Tensor:
        out, logsumexp = forward_pass(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        return attention_backward(grad_out, *ctx.saved_tensors)


# An operation of torch's own, so that torch.compile need not look into it. (Made by
# torch.library.custom_op, it would import all of torch.compile when it is first called.)
own_operations = torch.library.Library("reproduce_gpt2", "DEF")
backward_name = own_operations.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor logsumexp) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
attention_backward: Any = torch.ops.reproduce_gpt2.attention_backward


@torch.library.impl(own_operations, backward_name, "CPU")
def _(grad_out, q, k, v, out, logsumexp):
    kernel = load_kernel()
    assert kernel is not None, "use_kernel was called without a kernel"
    return kernel.backward(grad_out, q, k, v, out, logsumexp)


@torch.library.register_fake(f"reproduce_gpt2::{backward_name}")
def _(grad_out, q, k, v, out, logsumexp):
    return empty_gradients(q)
