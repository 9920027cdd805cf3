"""The gradient of the token embedding, row by row, against autograd's."""

import copy

from parts.embedding import rows_added_last

import pytest
import torch
import torch.nn as nn
from conftest import ids, make_toy
from torch.utils._python_dispatch import TorchDispatchMode


def gradients(model, batches, rows_last: bool) -> list[torch.Tensor]:
    """Of the sum of the losses of these batches."""
    model.zero_grad()
    for x, y in batches:
        if rows_last:
            with rows_added_last(model.transformer.wte):
                model(x, y).backward()
        else:
            model(x, y).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_every_gradient_is_autograds_to_the_last_bit(tied, micro_steps):
    """With tokens that stand in the batch many times, and some that do not."""
    model = make_toy().train()
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    batches = []
    for k in range(micro_steps):
        tokens = ids(6, 17, vocab_size=40, seed=k)
        batches.append((tokens[:, :-1], tokens[:, 1:]))
    expected = gradients(model, batches, rows_last=False)
    ours = gradients(model, batches, rows_last=True)
    for gradient, other in zip(ours, expected, strict=True):
        assert torch.equal(gradient, other)
    assert not model.transformer.wte._forward_hooks


class DenseGradients(TorchDispatchMode):
    """Of how many rows embeddings make gradients inside."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.rows.append(args[2])
        return func(*args, **(kwargs or {}))


def test_no_second_matrix_is_made():
    model = make_toy().train()
    tokens = ids(2, 9)
    with DenseGradients() as made, rows_added_last(model.transformer.wte):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert made.rows == [model.config.block_size]  # of the positions


class Scaled(nn.Embedding):
    def forward(self, idx):
        return 3 * super().forward(idx)


def hooked(*size: int) -> nn.Embedding:
    embedding = nn.Embedding(*size)
    embedding.register_forward_hook(lambda module, inputs, rows: 3 * rows)
    return embedding


@pytest.mark.parametrize(
    "make",
    [
        Scaled,
        hooked,
        lambda *size: nn.Embedding(*size, padding_idx=1),
        lambda *size: nn.Embedding(*size, scale_grad_by_freq=True),
        lambda *size: nn.Embedding(*size, max_norm=0.1),
        lambda *size: nn.utils.parametrizations.weight_norm(nn.Embedding(*size)),
    ],
)
def test_an_embedding_that_somebody_changed_is_autograds(make):
    original = make(7, 5)
    idx = torch.tensor([1, 2, 2, 4])

    def gradient(rows_last: bool) -> list[torch.Tensor]:
        embedding = copy.deepcopy(original)  # max_norm changes the weights
        if rows_last:
            with rows_added_last(embedding):
                embedding(idx).square().sum().backward()
        else:
            embedding(idx).square().sum().backward()
        return [parameter.grad for parameter in embedding.parameters()]

    for ours, expected in zip(gradient(True), gradient(False), strict=True):
        assert torch.equal(ours, expected)


def test_rows_that_the_loss_does_not_depend_on_have_no_gradient():
    embedding = nn.Embedding(7, 5)
    idx = torch.tensor([1, 2])
    with rows_added_last(embedding):
        embedding(idx)
        with torch.no_grad():
            embedding(idx)
    assert embedding.weight.grad is None
