"""The loss at the head of the model, without keeping the logits.

Logits are the largest tensor of all: for 64 x 1,024 tokens of GPT-2 they take 13 GB in float32, and
autograd would keep several tensors of that size.
"""

import torch
import torch.nn.functional as F

ROWS = 8192  # of logits that exist at once: 0.8 GB in bf16
# Of these, float32 copies exist of a slice at a time: on a CPU what stays in its cache, 32 rows of
# GPT-2's.
CACHE_BYTES, GPU_ROWS = 6_500_000, 1024


class HeadLoss(torch.autograd.Function):
    """The mean of F.cross_entropy(x Wᵀ, targets) in nats, without keeping the logits.

    The gradient of the loss with respect to the logits, softmax(logits) - one_hot(targets), is
    known as soon as they are. So a slice of logits is computed, overwritten by its gradient,
    multiplied into the gradients of x and W, and freed.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size: int, with_grad: bool) -> torch.Tensor:
        """x (N, C), weight (PV, C), targets (N) int64 below vocab_size -> the mean loss,
        float32.
        """
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        # The gradient of W is a sum over ROWS, and fp16 ends at 65,504: its summands are divided by
        # this.
        ctx.room = 256 if dtype == torch.float16 else 1
        with torch.autocast(kind, enabled=False):  # the dtypes below are explicit
            low, w = x.to(dtype), weight.to(dtype)
            total = torch.zeros((), device=x.device)
            grad_x, grad_w = torch.empty_like(low) if with_grad else None, None
            for first in range(0, len(low), ROWS):
                rows = slice(first, first + ROWS)
                logits = F.linear(low[rows], w)  # (rows, PV)
                # Padding gets no probability, so it has no part in the loss and a gradient of zero.
                logits[:, vocab_size:] = float("-inf")
                total = total + summed_loss(
                    logits, targets[rows], with_grad
                )  # overwrites logits with their gradient
                if with_grad:
                    grad_x[rows] = logits @ w
                    piece = logits.t() @ (low[rows] / ctx.room if ctx.room > 1 else low[rows])
                    grad_w = piece.float() if grad_w is None else grad_w.add_(piece)
                del logits  # before the next ones are made
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w)
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad_loss / len(grad_x)
        return grad_x.float() * scale, grad_w * (scale * ctx.room), None, None, None


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, with_grad: bool) -> torch.Tensor:
    """The sum of the cross entropies of logits (N, PV), float32. With grad, the gradient overwrites
    the logits.
    """
    fused = (
        torch.compiler.is_compiling()
    )  # into kernels that write no float32 logits, so no slices are needed
    if fused:
        rows = len(logits)
    else:
        rows = (
            max(1, CACHE_BYTES // (4 * logits.size(1))) if logits.device.type == "cpu" else GPU_ROWS
        )
    total = torch.zeros((), device=logits.device)
    for some, target in zip(logits.split(rows), targets[:, None].split(rows)):
        log_p = F.log_softmax(some, dim=-1, dtype=torch.float32)
        total = total - log_p.gather(1, target).sum()
        if with_grad and fused:  # one kernel, where a scatter is another one and writes p to memory
            p, columns = log_p.exp(), torch.arange(logits.size(1), device=logits.device)
            some.copy_(torch.where(columns == target, p - 1, p))
        elif with_grad:
            some.copy_(
                log_p.exp_().scatter_add_(
                    1, target, torch.full_like(target, -1, dtype=torch.float32)
                )
            )
    return total
