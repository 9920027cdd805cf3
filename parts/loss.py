"""The loss at the head of the model, without keeping the logits.

Logits are the largest tensors of all: for 64 x 1,024 tokens of GPT-2 they take 13 GB in float32,
and autograd would keep several tensors of that size.
"""

if __name__ == "__main__":
    raise SystemExit("parts/loss.py is no command: README.md lists the commands")

import torch
import torch.nn.functional as F

# Logits are computed so many rows at a time: 8,192 rows of GPT-2's take 0.8 GB in bf16.
ROWS = 8192
# They are converted to float32 in slices of those rows. On a CPU a slice fits into the cache, which
# is 32 rows of GPT-2's.
CACHE_BYTES = 6_500_000
GPU_ROWS = 1024


def head_loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """The mean of F.cross_entropy(x Wᵀ, targets) in nats, float32.

    x (..., C) float; weight (PV, C), whose rows from vocab_size on are padding and have no part in
    it; targets (...) int64 below vocab_size. Under autocast the product has autocast's dtype.
    """
    # Inside autograd.Function.forward grad mode is always off, so it has to be told whether a
    # backward pass will follow.
    with_grad = torch.is_grad_enabled()
    return HeadLoss.apply(x.flatten(0, -2), weight, targets.flatten(), vocab_size, with_grad)


class HeadLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, because the logits are at hand there.

    The gradient of the loss with respect to the logits is softmax(logits) - one_hot(targets). So
    the logits of some rows are computed, overwritten by their gradient, multiplied into the
    gradients of x and W, and freed.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size: int, with_grad: bool) -> torch.Tensor:
        """x (N, C), weight (PV, C), targets (N) -> the mean loss, float32."""
        device = x.device.type
        dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # grad_w sums up to 8,192 rows, and fp16 overflows at 65,504: each term is scaled down.
        ctx.scale_down = 256 if dtype == torch.float16 else 1

        with torch.autocast(device, enabled=False):  # the dtypes below are explicit
            x = x.to(dtype)
            w = weight.to(dtype)
            total = torch.zeros((), device=x.device)
            grad_x = torch.empty_like(x if with_grad else x[:0])
            grad_w = None
            for first in range(0, len(x), ROWS):
                rows = slice(first, first + ROWS)
                logits = F.linear(x[rows], w)  # (rows, PV)
                # Padding gets no probability: it has no part in the loss and a gradient of zero.
                logits[:, vocab_size:] = float("-inf")
                # This overwrites the logits with their gradient.
                total = total + summed_loss(logits, targets[rows], with_grad)
                if with_grad:
                    grad_x[rows] = logits @ w
                    if rows.stop >= len(x):
                        del w  # no rows follow; the next product may have its memory
                    x_rows = x[rows]
                    if ctx.scale_down > 1:
                        x_rows = x_rows / ctx.scale_down
                    grad_w_rows = logits.t() @ x_rows
                    # One term stays in the dtype of the product: half of float32's memory.
                    if grad_w is None:
                        grad_w = grad_w_rows
                    else:
                        grad_w = grad_w.float().add_(grad_w_rows)
                del logits  # before the next ones are made
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w)
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad_loss / len(grad_x)
        if grad_w.dtype == torch.float32:
            grad_w = grad_w * (scale * ctx.scale_down)
        else:
            grad_w = grad_w.float().mul_(scale * ctx.scale_down)
        return grad_x.float() * scale, grad_w, None, None, None


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, with_grad: bool) -> torch.Tensor:
    """The sum of the cross entropies of logits (N, PV) at targets (N), float32.

    With grad, the gradient overwrites the logits.
    """
    # Compiled kernels write no float32 logits to memory, so they need no slices.
    compiling = torch.compiler.is_compiling()
    if compiling:
        rows = len(logits)
    elif logits.device.type == "cpu":
        rows = max(1, CACHE_BYTES // (4 * logits.size(1)))
    else:
        rows = GPU_ROWS

    total = torch.zeros((), device=logits.device)
    for chunk, target in zip(logits.split(rows), targets[:, None].split(rows)):
        log_p = F.log_softmax(chunk, dim=-1, dtype=torch.float32)
        if compiling:
            # One kernel for all of it. The gathers of all chunks would be another one, at the end,
            # for which the logits of every chunk stay in memory; a scatter would write p.
            columns = torch.arange(logits.size(1), device=logits.device)
            is_target = columns == target
            total = total - torch.where(is_target, log_p, 0.0).sum(dim=-1).sum()
            if with_grad:
                p = log_p.exp()
                chunk.copy_(torch.where(is_target, p - 1, p))
            continue
        total = total - log_p.gather(1, target).sum()
        if with_grad:
            minus_one = torch.full_like(target, -1, dtype=torch.float32)
            chunk.copy_(log_p.exp_().scatter_add_(1, target, minus_one))
    return total
