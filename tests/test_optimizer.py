"""Muon's update against singular values and torch's own Muon, and its groups. (test_train.py has
its trajectory.)
"""

import functools
from types import SimpleNamespace

from model import GPT, SIZES, GPTConfig, Linear
from parts import optimizer as optimizers
from parts.optimizer import Muon, build_optimizer, clip_gradients, describe, orthogonalise

import pytest
import torch
import torch.nn as nn
from conftest import ids, make_toy
from torch.utils._python_dispatch import TorchDispatchMode

CONFIG = SimpleNamespace(
    optimizer="muon", learning_rate=1e-3, muon_learning_rate=2e-2, muon_momentum=0.9
)
vars(CONFIG).update(weight_decay=0.1, beta1=0.9, beta2=0.95, fused=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 256, 64), (1, 64, 256)])
def test_an_update_is_nearly_orthogonal(shape, dtype, fused):
    """Singular values from 1 to 1/100 become 0.7 to 1.2, as the paper says, and the singular
    vectors stay.
    """
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2, 64)
    update = orthogonalise((U * values) @ Vh, dtype, fused).float()
    assert update.shape == shape
    after = torch.linalg.svdvals(update)
    assert after.min() > 0.66 and after.max() < 1.22
    exact = U.mT @ update @ Vh.mT  # diagonal, if the singular vectors are the same
    off_diagonal = exact - torch.diag_embed(exact.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def test_a_matrix_is_updated_as_torch_does():
    """torch.optim.Muon computes in bfloat16, so equality is to its rounding."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(64, 256)) for _ in range(2))
    group = dict(params=[ours], rule="muon", weight_decay=0.1, lr=1e-2)
    rest = dict(params=[torch.nn.Parameter(torch.ones(2))], rule="adamw")
    muon = Muon([group, rest], splits={ours: (64,)}, momentum=0.95, dtype=torch.bfloat16)
    reference = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        ours.grad = torch.randn(64, 256)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - 1).norm()


def grouped_queries() -> torch.nn.Module:
    """A toy whose keys and values have fewer heads than its queries: splits of unequal heights."""
    toy = make_toy()
    for block in toy.transformer.h:
        layer = Linear(32, 64, bias=True, splits=(32, 16, 16))
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        block.attn.c_attn = layer
    return toy


@pytest.mark.parametrize("make_model", [make_toy, grouped_queries])
def test_stacked_matrices_are_updated_as_single_ones(monkeypatch, make_model):
    """GPUs update many matrices of one shape together. Three at once here, so that a stack ends
    within a layer.
    """
    monkeypatch.setattr(optimizers, "NUMBERS_AT_ONCE", 3 * 32 * 32)
    updated = []
    for stacked in (False, True):
        torch.manual_seed(0)
        model = make_model()
        muon = build_optimizer(model, CONFIG, torch.float32)
        muon.stacked = stacked
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            muon.step()
        updated.append(dict(model.named_parameters()))
    single, together = updated
    for name, parameter in single.items():
        assert torch.allclose(parameter, together[name], atol=1e-5), name


class CountOperations(TorchDispatchMode):
    """Counts what is computed. Views cost nothing, and a call for a list of tensors is one kernel
    (or a few, for many tensors).
    """

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size, most", [("gpt2", 120), ("gpt2-xl", 750)])
def test_muon_takes_few_kernels(monkeypatch, size, most):
    """For the matrices. One at a time, it would be 2,304 for GPT-2 124M and 9,216 for 1558M."""
    monkeypatch.setattr(optimizers.AdamW, "step", lambda self: None)
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES[size]))
        muon = build_optimizer(model, CONFIG, torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        muon.step()  # makes the state
        with CountOperations() as operations:
            muon.step()
    assert 0 < operations.n <= most


def test_every_parameter_is_in_one_group():
    model = make_toy()
    optimizer = build_optimizer(model, CONFIG, torch.float32)
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, embeddings, vectors = (
        [names[p] for p in group["params"]] for group in optimizer.param_groups
    )
    assert len(muon) == 4 * 2 and all(
        name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight")) for name in muon
    )
    assert embeddings == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(name.endswith("bias") or "ln_" in name for name in vectors)
    rest = sum(parameter.numel() for parameter in model.parameters()) - 24_576
    muon, adamw = describe(optimizer).split("; ")
    assert muon == "muon for 24,576 parameters, learning rate up to 0.02"
    assert adamw == f"adamw for {rest:,} parameters, learning rate up to 0.001"

    model(ids(2, 16), ids(2, 16)).backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert not [
        name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])
    ]
    assert [group["rule"] for group in optimizer.param_groups] == [
        "muon",
        "adamw",
        "adamw",
    ]  # all of them again


def test_the_norm_of_a_large_gradient_is_right_and_small_models_keep_torchs_numbers():
    """torch's norm of 4 million numbers in float32 is 1e-4 too small on a CPU."""
    torch.manual_seed(0)

    def make_parameters(rows: int) -> list[torch.nn.Parameter]:
        parameters = [
            torch.nn.Parameter(torch.zeros(shape)) for shape in ((rows, 1024), (7,), (3,))
        ]
        for parameter in parameters[:2]:
            parameter.grad = 1e-4 * torch.randn(parameter.shape)
        return parameters

    large = make_parameters(4096)
    before = [parameter.grad.clone() for parameter in large[:2]]
    expected = torch.cat([gradient.flatten().double() for gradient in before]).norm().item()
    assert clip_gradients(large, 1e9).item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(large[0].grad, before[0])
    clip_gradients(large, 0.01)
    assert torch.allclose(large[0].grad, before[0] * (0.01 / expected), rtol=1e-5)
    for parameter, gradient in zip(large, before):
        parameter.grad = gradient.clone()
    assert clip_gradients(large, 1e9, exact=False).item() < expected * (1 - 5e-5)

    for max_norm in (0.001, 1e9):
        small = make_parameters(64)
        again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in small]
        for parameter, copy in zip(small[:2], again):
            copy.grad = parameter.grad.clone()
        assert torch.equal(
            clip_gradients(small, max_norm), torch.nn.utils.clip_grad_norm_(again, max_norm)
        )
        assert torch.equal(small[0].grad, again[0].grad)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_given_back(wrong):
    parameter = torch.nn.Parameter(torch.zeros(2**11, 2**10))
    parameter.grad = torch.zeros(2**11, 2**10)
    parameter.grad[5, 7] = wrong
    assert not torch.isfinite(clip_gradients([parameter], 1.0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_without_its_compiler_an_optimizer_is_torchs(name, fused):
    """Three steps, a new group and a state that is loaded."""
    results = []
    for module in (optimizers, torch.optim):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(5, 3)) for _ in range(2)]
        make = functools.partial(getattr(module, name), lr=0.1, weight_decay=0.1, fused=fused)
        optimizer = make(weights[:1])
        optimizer.add_param_group(dict(params=weights[1:], lr=0.2))
        for _ in range(3):
            optimizer.zero_grad()
            sum(weight.square().sum() for weight in weights).backward()
            optimizer.step()
            state = optimizer.state_dict()
            optimizer = make([dict(params=[weight]) for weight in weights])
            optimizer.load_state_dict(state)
        assert torch.is_grad_enabled()
        results.append(torch.stack(weights))
    assert torch.equal(*results)
