"""The gradient of the token embedding, row by row, against autograd's."""

from parts.embedding import is_plain, rows_added_last

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ids, losses, make_toy
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


def test_training_on_a_cpu_makes_no_second_matrix(config):
    with DenseGradients() as made:
        losses(config(max_steps=1, batch_size=2, total_batch_size=64))
    assert made.rows == [32]  # of the positions


def test_a_model_may_overwrite_what_it_reads():
    """As in `x = wte(idx); x *= 8`. And one row alone, without a batch."""
    embedding = nn.Embedding(7, 5)
    with rows_added_last(embedding):
        rows = embedding(torch.tensor(3))
        rows *= 8
        rows.sum().backward()
    assert embedding.weight.grad[3].tolist() == [8.0] * 5
    assert embedding.weight.grad.sum() == 40


def test_a_frozen_embedding_has_no_gradient_and_an_error_leaves_no_hook():
    embedding = nn.Embedding(7, 5).requires_grad_(False)
    scale = torch.ones(5, requires_grad=True)
    with pytest.raises(KeyError), rows_added_last(embedding):
        (scale * embedding(input=torch.tensor([3]))).sum().backward()
        raise KeyError
    assert embedding.weight.grad is None and scale.grad is not None
    assert not embedding._forward_hooks


class Scaled(nn.Embedding):
    def forward(self, idx):
        return 3 * super().forward(idx)


def changed(change):
    """Makes an embedding and changes it."""

    def make(*size: int) -> nn.Embedding:
        embedding = nn.Embedding(*size)
        change(embedding)
        return embedding

    return make


def replace_forward(embedding: nn.Embedding) -> None:
    embedding.forward = lambda idx: 3 * F.embedding(idx, embedding.weight)  # type: ignore[method-assign]


def triple_gradient(weight: torch.Tensor) -> None:
    weight.grad *= 3


@pytest.mark.parametrize(
    "make",
    [
        Scaled,
        changed(replace_forward),
        changed(lambda one: one.register_forward_hook(lambda module, inputs, rows: 3 * rows)),
        changed(lambda one: one.weight.register_hook(lambda gradient: 3 * gradient)),
        changed(lambda one: one.weight.register_post_accumulate_grad_hook(triple_gradient)),
        lambda *size: nn.Embedding(*size, padding_idx=1),
        lambda *size: nn.Embedding(*size, scale_grad_by_freq=True),
        lambda *size: nn.Embedding(*size, sparse=True),
        lambda *size: nn.Embedding(*size, max_norm=0.1),
        lambda *size: nn.utils.parametrizations.weight_norm(nn.Embedding(*size)),
        lambda *size: nn.utils.spectral_norm(nn.Embedding(*size)),
    ],
)
def test_an_embedding_that_somebody_changed_is_autograds(make):
    def gradients_of(rows_last: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        embedding = make(7, 5)
        idx = torch.tensor([1, 2, 2, 4])
        if rows_last:
            assert not is_plain(embedding)
            with rows_added_last(embedding):
                embedding(idx).exp().sum().backward()
        else:
            embedding(idx).exp().sum().backward()
        return [parameter.grad for parameter in embedding.parameters()]

    for ours, expected in zip(gradients_of(True), gradients_of(False), strict=True):
        assert ours is not None and torch.equal(ours.to_dense(), expected.to_dense())


def test_rows_that_the_loss_does_not_depend_on_have_no_gradient():
    embedding = nn.Embedding(7, 5)
    idx = torch.tensor([1, 2])
    with rows_added_last(embedding):
        embedding(idx)
        with torch.no_grad():
            embedding(idx)
    assert embedding.weight.grad is None
