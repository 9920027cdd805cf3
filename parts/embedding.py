"""The token embedding's gradient without a second matrix.

The matrix that reads tokens in is also the head's. Autograd makes two gradients of it and adds
them: the head's, and one that is zero but for the rows that were read. For GPT-2 on 1,024 tokens
the second one is 154 MB for 3 MB of numbers.
"""

if __name__ == "__main__":
    raise SystemExit("parts/embedding.py is no command: README.md lists the commands")

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
import torch.nn as nn


@contextmanager
def rows_added_last(embedding: nn.Module) -> Iterator[None]:
    """Around a forward and a backward pass on a CPU: the rows get their gradient after the head.

    Where the embedding is read once, in float32, the sum is autograd's to the last bit. Inside,
    autograd ends at the rows that were read. All is as without if somebody has changed the
    embedding, or if it has a gradient already, as in later micro-steps.
    """
    if not is_plain(embedding) or embedding.weight.grad is not None:
        yield
        return
    reads: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cut(module: nn.Module, inputs: tuple, rows: torch.Tensor) -> torch.Tensor:
        if not inputs or not rows.requires_grad:
            return rows
        rows = rows.detach().requires_grad_()
        reads.append((inputs[0], rows))
        return rows.clone()  # which the model may overwrite

    hook = embedding.register_forward_hook(cut)
    try:
        yield
    finally:
        hook.remove()
    for idx, rows in reads:
        if rows.grad is not None:  # the loss depends on them
            add_rows(embedding.weight, idx, rows.grad)


def is_plain(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether what this module gives are rows of its weight, and their gradient the weight's."""
    return (
        isinstance(embedding, nn.Embedding)
        and type(embedding).forward is nn.Embedding.forward
        and "forward" not in vars(embedding)
        and not embedding._forward_hooks
        and isinstance(embedding.weight, nn.Parameter)
        and not embedding.weight._backward_hooks
        and not embedding.weight._post_accumulate_grad_hooks
        and embedding.padding_idx is None
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
    )


@torch.no_grad()
def add_rows(weight: torch.Tensor, idx: torch.Tensor, gradients: torch.Tensor) -> None:
    """Add the gradients (..., C) of the rows idx (...) int64 to that of weight (V, C)."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    # A row that was read several times gets one sum, as from autograd.
    read, where = idx.unique(return_inverse=True)
    sums = weight.new_zeros(len(read), weight.size(1))
    sums.index_add_(0, where.flatten(), gradients.reshape(-1, weight.size(1)))
    weight.grad.index_add_(0, read, sums)
