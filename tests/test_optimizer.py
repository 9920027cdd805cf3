"""Muon's update against singular values and torch's own Muon, and its groups. (test_train.py has
its trajectory.)
"""

from types import SimpleNamespace

from parts.optimizer import Muon, build_optimizer, describe, orthogonalise

import pytest
import torch
from conftest import ids, make_toy

CONFIG = SimpleNamespace(
    optimizer="muon", learning_rate=1e-3, muon_learning_rate=2e-2, muon_momentum=0.9
)
vars(CONFIG).update(weight_decay=0.1, beta1=0.9, beta2=0.95, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64), (256, 64), (64, 256)])
def test_an_update_is_nearly_orthogonal(shape, dtype):
    """Singular values from 1 to 1/100 become 0.7 to 1.2, as the paper says, and the singular
    vectors stay.
    """
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2, 64)
    found = orthogonalise((U * values) @ Vh, dtype).float()
    assert found.shape == shape
    after = torch.linalg.svdvals(found)
    assert after.min() > 0.66 and after.max() < 1.22
    exact = U.mT @ found @ Vh.mT  # diagonal, if the singular vectors are the same
    off_diagonal = exact - torch.diag_embed(exact.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def test_a_matrix_is_updated_as_torch_does():
    """torch.optim.Muon computes in bfloat16, so equality is to its rounding."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(64, 256)) for _ in range(2))
    group = dict(params=[ours], splits=[(64,)], rule="muon", weight_decay=0.1, lr=1e-2)
    rest = dict(params=[torch.nn.Parameter(torch.ones(2))], rule="adamw")
    muon = Muon([group, rest], 0.95, torch.bfloat16)
    reference = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        ours.grad = torch.randn(64, 256)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - 1).norm()


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
