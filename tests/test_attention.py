"""Attention's backward pass in C: the formula's gradients, and a run that keeps how it began."""

import functools
import json
import sys
from pathlib import Path

import train
from parts import attention, auto, checkpoint, compiler
from parts.runtime import Runtime

import pytest
import torch
import torch.nn.functional as F
from conftest import ids, make_toy, metrics
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")


def cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


needs_kernel = pytest.mark.skipif(
    sys.platform != "linux" or not cpu_has_bf16(), reason="it is for AVX512_BF16 on Linux"
)


@pytest.fixture(autouse=True)
def back_to_torch():
    yield
    attention.use_kernel(False)
    attention.load_kernel.cache_clear()


@pytest.fixture(params=["AMX", "AVX-512"])
def kernel(request):
    """The kernel with each of its ways to multiply; the first is the second on a CPU without it."""
    kernel = attention.load_kernel()
    assert kernel is not None
    kernel.set_up(use_amx=request.param == "AMX")
    return kernel


def draw_heads(B: int, n_head: int, T: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    """grad_out, q, k and v (B, nh, T, hs) in bf16, laid out as in the network."""
    draw = torch.Generator().manual_seed(seed)
    C = n_head * width
    qkv = torch.randn(B, T, 3 * C, generator=draw).bfloat16()
    grad_out = torch.randn(B, T, C, generator=draw).bfloat16()
    tensors = (grad_out, *qkv.split(C, dim=2))
    return [tensor.view(B, T, n_head, width).transpose(1, 2) for tensor in tensors]


def gradients(kernel: attention.Kernel, grad_out, q, k, v) -> tuple[torch.Tensor, ...]:
    out, logsumexp = attention.forward_pass(q, k, v, is_causal=True)
    return kernel.backward(grad_out, q, k, v, out, logsumexp)


def spelled_out(grad_out, q, k, v, out) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k and v in float64, where out may have been rounded."""
    grad_out, q, k, v, out = (tensor.double() for tensor in (grad_out, q, k, v, out))
    T, width = q.shape[-2:]
    scores = q @ k.mT / width**0.5
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    p = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    delta = (grad_out * out).sum(dim=-1, keepdim=True)
    grad_scores = p * (grad_out @ v.mT - delta) / width**0.5
    return grad_scores @ k, grad_scores.mT @ q, p.mT @ grad_out


@needs_kernel
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 127, 128, 129, 300, 1024])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_gradients_are_those_of_the_formula(kernel, T, width):
    """To the rounding of bf16: a number is off by a 256th at most, on the average by less."""
    grad_out, q, k, v = draw_heads(2, 3, T, width)
    out, logsumexp = attention.forward_pass(q, k, v, is_causal=True)
    results = kernel.backward(grad_out, q, k, v, out, logsumexp)
    for result, exact in zip(results, spelled_out(grad_out, q, k, v, out)):
        assert (result - exact).norm() <= 0.004 * exact.norm() + 1e-5


@needs_kernel
def test_gradients_are_at_least_as_exact_as_torchs(kernel):
    grad_out, q, k, v = draw_heads(2, 4, 512, 64)
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torchs = torch.autograd.grad(out, inputs, grad_out)
    results = gradients(kernel, grad_out, q, k, v)
    exact = attention.exact_gradients(grad_out, q, k, v)
    for result, theirs, right in zip(results, torchs, exact):
        assert (result - right).norm() < 1.05 * (theirs - right).norm()


@needs_kernel
@given(st.integers(1, 200), st.integers(0, 99), st.floats(0.01, 30))
def test_whatever_the_size_of_the_scores(T, seed, size):
    """Scores of hundreds make a softmax of zeros and a one. Nothing becomes infinite."""
    grad_out, q, k, v = draw_heads(1, 2, T, 32, seed)
    tensors = (grad_out, (size * q.float()).bfloat16(), k, v)
    kernel = attention.load_kernel()
    for result, exact in zip(gradients(kernel, *tensors), attention.exact_gradients(*tensors)):
        # What cancels in a gradient cannot be more exact than its terms.
        terms = grad_out.double().norm() * max(1.0, size) * v.double().norm() / T**0.5
        assert (result - exact).norm() <= 0.005 * exact.norm() + 0.001 * terms


@needs_kernel
def test_threads_do_not_change_a_bit(kernel):
    tensors = draw_heads(3, 2, 200, 64)
    results = []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        results.append(torch.stack(gradients(kernel, *tensors)))
    torch.set_num_threads(2)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernel
def test_a_network_trains_with_it_compiled_or_not(monkeypatch):
    """The loss is the same, the gradients are close, and attention's comes from the kernel."""
    model = make_toy(n_head=1, n_embd=32, block_size=48)
    idx = ids(2, 49)
    calls = []
    backward = attention.Kernel.backward

    def count(self, *tensors):
        calls.append(1)
        return backward(self, *tensors)

    monkeypatch.setattr(attention.Kernel, "backward", count)

    def loss_and_gradient(module):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(idx[:, :-1], idx[:, 1:])
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, expected = loss_and_gradient(model)
    assert attention.load_kernel() is not None
    calls.clear()
    attention.use_kernel(True)
    for module in (model, torch.compile(model, backend="aot_eager")):
        loss_now, gradient = loss_and_gradient(module)
        assert abs(loss_now - loss) < 1e-3
        assert (gradient - expected).norm() < 0.01 * expected.norm()
    assert len(calls) == 2 * model.config.n_layer


@needs_kernel
@pytest.mark.parametrize(
    "case", ["float32", "dropout", "mask", "no causal", "odd width", "no grad"]
)
def test_all_else_is_torchs(case, monkeypatch):
    attention.use_kernel(True)
    monkeypatch.setattr(attention.FusedAttention, "apply", None)  # calling it would fail
    width = 24 if case == "odd width" else 32
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    q, k, v = torch.randn(3, 1, 2, 8, width).to(dtype).requires_grad_()
    mask = torch.ones(8, 8, dtype=torch.bool).tril() if case == "mask" else None
    arguments = dict(
        attn_mask=mask,
        dropout_p=0.5 if case == "dropout" else 0.0,
        is_causal=case not in ("mask", "no causal"),
    )
    with torch.set_grad_enabled(case != "no grad"):
        torch.manual_seed(0)
        result = attention.fused_attention(q, k, v, **arguments)
        torch.manual_seed(0)
        assert torch.equal(result, F.scaled_dot_product_attention(q, k, v, **arguments))


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    class Wrong:
        def backward(self, grad_out, q, k, v, out, logsumexp):
            right = attention.exact_gradients(grad_out, q, k, v)
            return [right[0], right[1], 1.02 * right[2]]

    assert not attention.is_right(Wrong())


# ---- A run ---------------------------------------------------------------------------------------


@pytest.fixture
def bf16_run(config):
    """Settings of a toy run that can use the kernel."""
    settings = dict(dtype="bf16", flash=True, n_head=1, n_embd=32, hellaswag_every=0)
    return functools.partial(config, **settings)


def choose(config, saved: dict) -> tuple[auto.Arithmetic, str]:
    return auto.choose_arithmetic(config, make_toy(n_head=1, n_embd=32), Runtime(CPU), saved)


@needs_kernel
def test_a_run_keeps_how_it_began(bf16_run, tmp_path):
    """Resumed, it has the losses of a straight run; a run of an earlier version goes on without."""
    train.train(bf16_run(max_steps=6, checkpoint_every=3, keep_checkpoints=0))
    folder = tmp_path / "run" / "step_0000003"
    content = json.loads((folder / "settings.json").read_text())
    assert content["chosen"]["attention_kernel"] is True
    straight = [record["loss"] for record in metrics(tmp_path / "run")]
    train.train(bf16_run(max_steps=6, resume=str(folder)))
    assert [record["loss"] for record in metrics(tmp_path / "run")] == straight

    del content["chosen"]["attention_kernel"]
    content["checksum"] = checkpoint.checksum(content)
    (folder / "settings.json").write_text(json.dumps(content))
    train.train(bf16_run(max_steps=6, resume=str(folder)))
    assert not attention.kernel_is_used
    resumed = [record["loss"] for record in metrics(tmp_path / "run")]
    assert resumed != straight and resumed == pytest.approx(straight, rel=1e-3)


@needs_kernel
def test_which_runs_have_it(bf16_run, monkeypatch):
    assert choose(bf16_run(), {})[0].attention_kernel
    assert not choose(bf16_run(dtype="fp32"), {})[0].attention_kernel
    assert not choose(bf16_run(flash=False), {})[0].attention_kernel
    earlier = dict(dtype="bf16", flash=True, exact_norm=False)
    assert not choose(bf16_run(), earlier)[0].attention_kernel


def test_a_machine_without_a_compiler_says_so_on_a_resume(bf16_run, monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    attention.load_kernel.cache_clear()
    saved = dict(dtype="bf16", flash=True, attention_kernel=True)
    chosen, why = choose(bf16_run(), saved)
    assert not chosen.attention_kernel
    assert "the checkpoint's backward pass of attention cannot be compiled here" in why
    chosen, why = choose(bf16_run(), {})
    assert not chosen.attention_kernel and "cannot be compiled" not in why
