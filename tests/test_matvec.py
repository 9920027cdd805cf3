"""The kernel for a few vectors: it is torch's product, wherever it can be had."""

import shutil
import subprocess
import sys

from model import GPT
from parts import compiler, decode, matvec, runtime
from parts.auto import Packing, prepare_for_inference
from parts.inference import generate, pack
from parts.runtime import Runtime

import pytest
import torch
import torch.nn.functional as F
from conftest import clean_environment, ids, make_toy
from hypothesis import given
from hypothesis import strategies as st

needs_kernel = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="it is compiled by GCC on Linux"
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_the_kernel():
    """A test that takes something away must not leave the kernel away."""
    yield
    matvec.load_kernel.cache_clear()
    decode.load_functions.cache_clear()


@needs_kernel
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 40), st.booleans(), st.integers(0, 9))
def test_the_kernel_is_torchs_product(n_vectors, n_in, n_out, has_bias, seed):
    kernel = matvec.load_kernel()
    assert kernel is not None
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n_vectors, 1, n_in, generator=draw)
    weight = torch.randn(n_out, n_in, generator=draw)
    bias = torch.randn(n_out, generator=draw) if has_bias else None
    half = weight.to(torch.bfloat16)
    close = dict(rtol=1e-4, atol=1e-4)
    assert torch.allclose(
        kernel.multiply(x, half, bias=bias), F.linear(x, half.float(), bias), **close
    )
    whole, scale = matvec.quantise(weight)
    expected = F.linear(x, matvec.dequantise(whole, scale), bias)
    assert torch.allclose(kernel.multiply(x, whole, scale, bias), expected, **close)


@needs_kernel
def test_threads_do_not_change_a_bit():
    kernel = matvec.load_kernel()
    x = torch.randn(2, 192)
    weight = torch.randn(1000, 192).to(torch.bfloat16)
    one = kernel.multiply(x, weight)
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernel.multiply(x, weight), one)
    finally:
        torch.set_num_threads(1)


def test_a_weight_of_8_bits_is_off_by_half_a_step_at_most():
    weight = torch.randn(50, 70) * torch.logspace(-6, 3, 50)[:, None]
    weight[3] = 0
    whole, scale = matvec.quantise(weight)
    assert whole.dtype == torch.int8 and whole.abs().amax() == 127
    assert (matvec.dequantise(whole, scale) - weight).abs().le(0.5001 * scale[:, None]).all()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("name, tolerance", [("bf16", 0.02), ("int8", 0.02)])
def test_a_few_vectors_or_many_give_about_the_exact_logits(name, tolerance):
    """A batch takes torch's product, a single token the kernel."""
    x = ids(3, 16)
    exact = make_toy()(x)
    packed = Packing(name, for_c=True).pack(make_toy())
    assert packed.lm_head.kernel is not None
    scale = exact.abs().max()
    assert (packed(x) - exact).abs().max() < tolerance * scale
    first = make_toy()(x[:, :1])
    assert (packed(x[:, :1]) - first).abs().max() < tolerance * scale
    assert not torch.allclose(packed(x[:, :1]), first, atol=1e-6)  # fewer bits were used


@torch.no_grad()
def test_without_gcc_8_bits_are_the_same_numbers(monkeypatch):
    x = ids(1, 4)
    with_kernel = pack(make_toy(), torch.int8, for_c=True)(x)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    matvec.load_kernel.cache_clear()
    assert matvec.load_kernel() is None
    without = pack(make_toy(), torch.int8, for_c=True)
    assert without.lm_head.kernel is None
    assert torch.allclose(without(x), with_kernel, rtol=1e-3, atol=1e-3)


@needs_kernel
@pytest.mark.parametrize("fault", ["compiler", "cache", "result"])
def test_a_kernel_that_cannot_be_had_is_not_used(monkeypatch, tmp_path, fault):
    matvec.load_kernel.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if fault == "compiler":
        monkeypatch.setattr(compiler, "COMPILE", ["--no-such-option"])
    elif fault == "cache":
        (tmp_path / "cache").write_text("not a folder")
    else:
        honest = matvec.Kernel.multiply
        monkeypatch.setattr(matvec.Kernel, "multiply", lambda *args, **kw: 2 * honest(*args, **kw))
    assert matvec.load_kernel() is None
    prepared = prepare_for_inference(make_toy(), Runtime(CPU), "bf16", rows=1)
    assert len(generate(prepared.model, [[1, 2]], 5)[0]) == 5


@needs_kernel
def test_it_is_compiled_once(tmp_path):
    script = "from parts import matvec; assert matvec.load_kernel() is not None"
    environment = clean_environment(XDG_CACHE_HOME=str(tmp_path))
    started = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(timeout=100) for process in started] == [0, 0]
    [library] = (tmp_path / "reproduce-gpt2").iterdir()
    made = library.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert library.stat().st_mtime_ns == made


@needs_kernel
@pytest.mark.parametrize("rows, few", [(1, True), (4, True), (5, False)])
def test_sampling_takes_the_kernel_for_a_few_texts(rows, few):
    """And for more where decode.c multiplies matrices, which it does not with this width."""
    prepared = prepare_for_inference(make_toy(n_embd=72), Runtime(CPU), "bf16", rows)
    assert (prepared.model.lm_head.kernel is not None) == few


def test_8_bits_are_for_cpus():
    machine = Runtime(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    if machine is None:
        machine = Runtime(torch.device("meta"))
    with pytest.raises(ValueError, match="dtype=int8 is for CPUs"):
        prepare_for_inference(GPT(make_toy().config), machine, "int8", rows=1)
    assert "int8" not in runtime.DTYPES  # no product is computed in it
