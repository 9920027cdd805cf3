"""The network against references: transformers' GPT-2, spelled-out loops, and arithmetic done
another way.
"""

import math

from model import GPT, SIZES, GPTConfig, attention_spelled_out
from parts import loss as head
from parts.loss import HeadLoss
from parts.optimizer import make_groups
from parts.pretrained import is_conv1d

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY, ids, make_toy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
        ],
    ),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flash", [True, False])
def test_logits_and_gradients_equal_transformers(tmp_path, bias, flash):
    """The erf-GELU, a forgotten transpose, a wrong scale: all of them show here and nowhere else so
    clearly.
    """
    ours = make_toy(bias=bias, flash=flash)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(theirs, GPT2LMHeadModel)
    x, y = ids(3, 16), ids(3, 16, seed=1)
    assert torch.allclose(ours(x), theirs(x).logits, atol=1e-5)

    ours(x, y).backward()
    F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = parameter.grad[:257] if name.endswith("wte.weight") else parameter.grad
        gradient = gradient.t() if is_conv1d(name) else gradient
        assert torch.allclose(gradient, expected[name].grad, atol=1e-5), name


def test_loss_at_initialisation_is_that_of_knowing_nothing():
    """At GPT-2's shape. A final norm of length sqrt(C) against rows of N(0, 0.02) gives logits of
    variance 0.0004 C, and those cost half their variance above ln V: 10.825 + 0.154."""
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    with torch.no_grad():
        loss = model(ids(1, 512, vocab_size=50257), ids(1, 512, vocab_size=50257, seed=1)).item()
    assert abs(loss - (math.log(50257) + 0.02**2 * 768 / 2)) < 0.05
    assert abs(loss - math.log(50257)) < 0.2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad_vocab", [True, False])
def test_the_loss_in_pieces_is_the_loss(monkeypatch, device, dtype, pad_vocab):
    """Loss and all gradients, against cross_entropy over the whole logits; pieces that do not
    divide the rows.
    """
    monkeypatch.setattr(head, "ROWS", 10)
    model = make_toy(pad_vocab=pad_vocab).to(device)
    monkeypatch.setattr(head, "CACHE_BYTES", 3 * 4 * model.config.padded_vocab_size)
    x, y = ids(2, 16).to(device), ids(2, 16, seed=1).to(device)
    found = []
    for in_pieces in (True, False):
        model.zero_grad()
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = (
                model(x, y)
                if in_pieces
                else F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
            )
        (loss / 3).backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (loss, grads), (expected, expected_grads) = found
    assert torch.allclose(loss, expected, atol=1e-5)
    for grad, reference in zip(grads, expected_grads):
        rounding = 1e-5 if dtype == torch.float32 else 0.02
        assert (grad - reference).norm() < rounding * reference.norm()
    with torch.no_grad():
        assert torch.equal(model(x, y), loss) or dtype != torch.float32


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.dim() == 1:
            assert parameter.eq(1).all(), name
        else:
            rows = parameter[:1000] if name.endswith("wte.weight") else parameter
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(rows.std().item() / expected - 1) < 0.05, name
            assert abs(rows.mean().item()) < 0.1 * expected, name


def test_head_and_embedding_are_one_tensor(toy):
    assert toy.lm_head.weight.data_ptr() == toy.transformer.wte.weight.data_ptr()
    assert toy.to(torch.float64).lm_head.weight is toy.transformer.wte.weight


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameters_of_the_four_sizes(name, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig(**SIZES[name])).num_params() == parameters


def test_flops_per_token_is_what_torch_counts():
    """Counted by torch over forward and backward; our 6N has norms and biases, which are no
    products: 3 % here.
    """
    model = make_toy(block_size=64, n_embd=64, flash=False, pad_vocab=False)
    with FlopCounterMode(display=False) as counter:
        model(ids(2, 64), ids(2, 64)).backward()
    assert model.flops_per_token(64) * 2 * 64 == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("kind", ["causal", "bool", "float"])
def test_attention_spelled_out_is_the_fused_one_under_any_mask(kind):
    """A float mask is added: ALiBi's and T5's biases are such."""
    q, k, v = torch.randn(3, 2, 4, 7, 8).unbind()
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    mask: dict = dict(is_causal=True)
    if kind == "bool":
        mask = dict(attn_mask=causal.triu(-2))
    elif kind == "float":
        mask = dict(attn_mask=torch.randn(4, 7, 7).masked_fill(~causal, float("-inf")))
    expected = F.scaled_dot_product_attention(q, k, v, **mask)
    assert torch.allclose(attention_spelled_out(q, k, v, **mask), expected, atol=1e-5)


def test_every_parameter_is_in_one_group_and_has_a_gradient(toy):
    groups = make_groups(toy, "adamw", lr=1e-3, weight_decay=0.1)
    listed = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, toy.parameters()))
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and groups[0]["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0.0
    toy(ids(2, 16), ids(2, 16)).backward()
    for name, parameter in toy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("flash", [True, False])
def test_the_future_does_not_change_the_past(flash):
    model = make_toy(flash=flash)
    x = ids(1, 16)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 257
    before, after = model(x), model(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_padding_the_vocabulary_changes_nothing():
    """257 tokens become 320 rows: the same initial weights, loss and gradients, and nothing flows
    into the padding.
    """
    plain, padded = make_toy(pad_vocab=False), make_toy(pad_vocab=True)
    assert padded.transformer.wte.weight.shape[0] == 320
    x, y = ids(2, 16), ids(2, 16, seed=1)
    assert torch.allclose(plain(x), padded(x), atol=1e-6) and padded(x).shape[-1] == 257
    (one := plain(x, y)).backward()
    (two := padded(x, y)).backward()
    assert torch.allclose(one, two, atol=1e-6)
    gradient = padded.transformer.wte.weight.grad
    assert torch.allclose(gradient[:257], plain.transformer.wte.weight.grad, atol=1e-6)
    assert gradient[257:].eq(0).all()


def test_dropout_acts_in_training_only():
    model = make_toy(dropout=0.5)
    x = ids(2, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_embd=30, n_head=4), "n_embd 30 is not divisible by n_head 4"),
        (dict(n_layer=0), "n_layer is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**(TOY | changes)))


def test_the_heads_gradient_does_not_overflow_in_fp16():
    """Thousands of rows with one target: their sum is beyond fp16's largest number, the mean is
    not.
    """
    x, targets = torch.full((4096, 8), 30.0, dtype=torch.float16), torch.full((4096,), 3)
    weight = torch.zeros(64, 8, requires_grad=True)
    HeadLoss.apply(x, weight, targets, 64, True).backward()
    expected = torch.full((64, 8), 30.0 / 64)
    expected[3] -= 30.0
    assert torch.allclose(weight.grad, expected, rtol=1e-2)


def test_without_gradients_a_loss_costs_no_more_than_logits(toy):
    """Each evaluation computed the head's gradients too: 1.5 times the work."""

    def flops(*arguments: torch.Tensor) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            toy(*arguments)
        return counter.get_total_flops()

    assert flops(ids(2, 16), ids(2, 16)) == flops(ids(2, 16)) > 0


@pytest.mark.parametrize("flash", [True, False])
def test_it_exports_for_any_batch_and_length(flash):
    """What ONNX's exporter needs: no size of the example may become a constant of the graph."""
    model = make_toy(flash=flash)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=16)}
    exported = torch.export.export(model, (ids(2, 9),), dynamic_shapes=(sizes,)).module()
    for shape in [(1, 1), (3, 16), (5, 4)]:
        x = ids(*shape, seed=shape[0])
        assert torch.allclose(exported(x), model(x), atol=1e-5), shape
