"""The token in C: it is the model's token, in each type of weights, and only of a GPT-2."""

import shutil
import sys

import model as model_file
import sample
from model import MLP, Block
from parts import auto, decode, inference, matvec, runtime
from parts.compiler import SOURCES
from parts.inference import computes_gpt2, forward_cached, generate, make_decoder, pack, prefill
from parts.pretrained import compare_with_gpt2
from parts.standin import make_standin

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TOY, ids, make_toy

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="it is compiled by GCC on Linux"
)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def forget() -> None:
    """Answers are kept by class and config; here functions and classes change under them."""
    for question in (computes_gpt2, compare_with_gpt2, make_standin, decode.load_functions):
        question.cache_clear()


@pytest.fixture(autouse=True)
def fresh_answers():
    forget()
    yield
    forget()


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """How many rows each token of a toy had that was computed in C; trials have other sizes."""
    rows = []
    call = decode.Decoder.__call__

    def count(self, idx):
        if self.config.vocab_size == 257:
            rows.append(len(idx))
        return call(self, idx)

    monkeypatch.setattr(decode.Decoder, "__call__", count)
    return rows


def make_packed(name: str, **changes):
    toy = make_toy(**changes)
    return toy if name == "fp32" else pack(toy, TYPES[name], for_c=True)


def count_most_rows(dtype: torch.dtype, width: int = 32) -> int:
    """How many rows a step may have."""
    return max(n for n in range(1, 70) if decode.takes(n, dtype, width))


SHAPES = [
    dict(),
    dict(bias=False, exact_gelu=True),
    dict(n_embd=138, n_head=2, n_layer=3),  # heads of 69
    dict(n_embd=33, n_head=11, n_layer=1, pad_vocab=False),
    dict(n_embd=64, n_head=1, flash=False, dropout=0.3),
]


@pytest.mark.parametrize("dtype, samples", [("fp32", 1), ("bf16", 40), ("int8", 3)])
def test_sample_py_computes_its_tokens_in_c(tmp_path, steps, capsys, dtype, samples):
    if samples > count_most_rows(TYPES[dtype]):
        pytest.skip("this CPU has no products of matrices in bf16")
    make_toy(**TOY).save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--device", "cpu", "--dtype", dtype]
    sample.main([*options, "-p", "abc", "-n", str(samples), "-m", "5"])
    assert steps == [samples] * 4  # the first token comes from the prompt


@torch.no_grad()
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [(3,), (2, 7, 4), (1, 1, 1, 1)], ids=str)
def test_a_token_in_c_is_the_models(name, shape, lengths):
    """One or more rows, of one or several lengths, until the cache is full: logits and cache."""
    toy = make_packed(name, **shape)
    rows = [ids(n, seed=n).tolist() for n in lengths]
    (by_model, _), (in_c, _) = (prefill(toy, rows, 16) for _ in range(2))
    step = make_decoder(toy, in_c)
    assert step is not None
    for column in range(max(lengths), 16):
        token = ids(len(rows), 1, seed=column)
        expected = forward_cached(toy, token, by_model)
        logits = step(token)
        assert logits.shape == expected.shape and logits.dtype == torch.float32
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert in_c.length == 16
    for layer, filled in by_model.layers.items():
        for x, y in zip(filled, in_c.layers[layer]):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        step(token)  # no column is left


@torch.no_grad()
def test_in_float32_it_is_the_text_without_a_cache(steps):
    toy = make_toy(n_layer=3, block_size=64)
    text = ids(1, 40)
    cache, first = prefill(toy, text[:, :5].tolist(), 59)
    step = make_decoder(toy, cache)
    logits = torch.stack([first, *(step(token) for token in text[:, 5:].split(1, dim=1))], dim=1)
    expected = toy(text)[:, 4:]
    assert torch.allclose(logits, expected, rtol=1e-4, atol=2e-5 * expected.abs().max())


@torch.no_grad()
def assert_same_bits(toy, length: int, n_rows: int, choices: list[list[int]]) -> None:
    """The logits of row 1 behind texts of this length are the same beside each choice of the rows,
    with one thread, two, and seven, of which some have no processor.
    """
    rows = ids(n_rows, length).tolist()
    tokens = ids(n_rows, 12, seed=1)
    results = []
    for chosen in choices:
        for n_threads in (1, 2, 7):
            cache, _ = prefill(toy, [rows[b] for b in chosen], 20)
            # A prompt's products may depend on its batch: start from the same keys.
            for layer in cache.layers.values():
                for x in layer:
                    x.copy_(torch.linspace(-1, 1, x[0].numel()).view_as(x[0]))
            torch.set_num_threads(n_threads)
            try:
                step = make_decoder(toy, cache)
                logits = [step(token) for token in tokens[chosen].split(1, dim=1)]
            finally:
                torch.set_num_threads(1)
            results.append(torch.stack(logits)[:, chosen.index(1)])
    for result in results:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("name", TYPES)
def test_neither_threads_nor_rows_change_a_bit(name):
    """Texts are long, so that threads meet in the middle of their work."""
    toy = make_packed(name, n_embd=96, n_head=24, block_size=520)
    assert_same_bits(toy, 500, 3, [[0, 1, 2], [1]])


# ---- Many rows, as products of matrices ----------------------------------------------------------


@pytest.fixture(params=["amx", "avx"])
def many(request) -> int:
    """As many rows as a step may have."""
    functions = decode.load_functions()
    assert functions is not None
    most = count_most_rows(torch.bfloat16)
    if most == matvec.MOST_VECTORS:
        pytest.skip("no AVX512_BF16 here")
    decode.set_up(functions, use_amx=request.param == "amx")
    yield most
    decode.set_up(functions)


def exact_logits(toy, idx):
    """In float64, with the matrices as they are packed."""
    exact = make_toy(**{name: getattr(toy.config, name) for name in ("n_embd", "n_head", "bias")})
    exact = exact.double()
    for (_, plain), (_, packed) in zip(exact.named_modules(), toy.named_modules(), strict=True):
        if isinstance(plain, nn.Linear):
            plain.weight = nn.Parameter(packed.weight.double())
    return exact(idx)[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("n_rows", [5, 32, 33, 64])
@pytest.mark.parametrize(
    "shape", [dict(n_embd=64, n_head=2), dict(n_embd=96, n_head=2, bias=False)]
)
def test_many_rows_are_as_exact_as_torch_in_bf16(n_rows, shape, many):
    """Also the rows of the vocabulary beyond a multiple of 32, of which 257 has one."""
    toy = make_packed("bf16", **shape)
    rows = ids(n_rows, 7)
    (by_model, _), (in_c, _) = (prefill(toy, rows[:, :6].tolist(), 1) for _ in range(2))
    expected = exact_logits(toy, rows)
    logits = make_decoder(toy, in_c)(rows[:, 6:])
    by_model = forward_cached(toy, rows[:, 6:], by_model).float()
    assert logits.shape == expected.shape
    size = expected.norm()
    assert (logits - expected).norm() < 0.01 * size
    assert (logits - expected).norm() < 1.05 * (by_model - expected).norm()


@torch.no_grad()
def test_rows_of_several_lengths(many):
    toy = make_packed("bf16", n_embd=64, n_head=2)
    rows = [ids(1 + b % 9, seed=b).tolist() for b in range(20)]
    cache, _ = prefill(toy, rows, 4)
    tokens = ids(20, 1, seed=99)
    logits = make_decoder(toy, cache)(tokens)
    for row, token, shown in zip(rows, tokens.tolist(), logits):
        expected = exact_logits(toy, torch.tensor([row + token]))[0]
        assert (shown - expected).norm() < 0.02 * expected.norm()


def test_neither_threads_nor_other_rows_change_a_bit_of_many(many):
    toy = make_packed("bf16", n_embd=96, n_head=24, block_size=200)
    assert_same_bits(toy, 150, many, [[3, 1, 5, 7, 9, 2], list(range(many))])


def test_no_thread_is_without_rows_of_a_small_matrix(many):
    toy = make_packed("bf16", n_embd=64, n_head=2)
    cache, _ = prefill(toy, [[1, 2]] * 5, 2)
    torch.set_num_threads(7)
    try:
        assert make_decoder(toy, cache).n_threads == 2
    finally:
        torch.set_num_threads(1)


def test_many_rows_are_prepared_for_it_without_a_race(many, monkeypatch):
    monkeypatch.setattr(auto, "race", None)
    machine = runtime.start("cpu")
    for n_rows in (5, many):
        prepared = auto.prepare_for_inference(make_toy(), machine, "auto", n_rows)
        assert prepared.packing == auto.Packing("bf16", for_c=True)
    odd_width = auto.prepare_for_inference(make_toy(n_embd=72), machine, "bf16", 5)
    assert odd_width.packing == auto.Packing("bf16", for_c=False)
    assert count_most_rows(torch.bfloat16, width=72) == matvec.MOST_VECTORS
    bf16 = decode.TYPES.index(torch.bfloat16)
    assert decode.load_functions().most_rows(bf16, 32) == decode.MOST_ROWS
    int8 = auto.prepare_for_inference(make_toy(), machine, "int8", many)
    assert int8.packing == auto.Packing("int8", for_c=False)


def test_many_rows_of_a_changed_model_are_prepared_as_before(many, monkeypatch):
    monkeypatch.setattr(model_file, "MLP", Relu)
    machine = runtime.start("cpu")
    for n_rows in (5, many):
        prepared = auto.prepare_for_inference(make_toy(), machine, "bf16", n_rows)
        assert prepared.packing == auto.Packing("bf16", for_c=False)


@pytest.mark.parametrize("name", TYPES)
def test_generation_takes_it(name, steps, monkeypatch):
    """For a few texts, up to the window's end; and the greedy texts are those of the model."""
    toy = make_packed(name)
    prompts = [[1, 2, 3], [4], [5] * 9, [6]]
    texts = generate(toy, prompts, 20, temperature=0)
    assert steps == [4] * 7  # behind the longest prompt, seven columns are left
    steps.clear()
    assert generate(toy, prompts[:1], 20, temperature=0)[0][:13] == texts[0][:13]
    assert steps == [1] * 13
    steps.clear()
    most = count_most_rows(TYPES[name])
    generate(toy, [[7]] * (most + 1), 5)
    assert steps == []
    generate(toy, [[7]] * most, 5)
    assert steps == [most] * 4
    steps.clear()
    monkeypatch.setattr(decode, "load_functions", lambda: None)
    assert generate(toy, prompts, 20, temperature=0) == texts
    assert steps == []


def test_it_is_for_inference_in_the_models_own_arithmetic(steps):
    toy = make_toy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(toy, [[1]], 5)
    list(inference.stream(toy.train(), [[1]], 5))
    generate(toy.double(), [[1]], 5)
    assert steps == []


# ---- What is no GPT-2, or no longer as its class made it -----------------------------------------


class Relu(MLP):
    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)))


class SlightlyScaled(Block):
    """Off by a hundred-thousandth."""

    def forward(self, x, layout):
        return super().forward(x, layout) * 1.00001


class OtherNorm(Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.ln_2.eps = 1e-3


class Loud(model_file.GPT):
    """Logits of twice the size, where only the head's function changes."""

    def logits(self, x):
        return 2 * super().logits(x)


@pytest.mark.parametrize("change", [Relu, SlightlyScaled, OtherNorm, Loud])
def test_a_changed_model_computes_its_tokens_itself(change, steps, monkeypatch):
    [name] = {"GPT", "Block", "MLP"} & {base.__name__ for base in change.__mro__}
    monkeypatch.setattr(model_file, name, change)
    toy = make_toy()
    if name == "GPT":
        toy.__class__ = change
    [text] = generate(toy, [[1, 2]], 10, temperature=0)
    assert steps == []
    with torch.no_grad():
        assert text == toy(torch.tensor([[1, 2, *text]]))[0, 1:-1].argmax(dim=-1).tolist()


def listen(toy):
    toy.transformer.h[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0)


def replace_activation(toy):
    toy.transformer.h[1].mlp.gelu = nn.Identity()


def untie(toy):
    toy.lm_head.weight = nn.Parameter(toy.lm_head.weight[:200].detach().clone())


def adapt(toy):
    toy.transformer.h[0].attn.c_attn.down = nn.Linear(3, 3)


@pytest.mark.parametrize("change", [listen, replace_activation, untie, adapt])
def test_a_model_that_was_changed_after_it_was_made_is_left_to_itself(change, steps):
    toy = make_toy()
    change(toy)
    with torch.no_grad():
        cache, _ = prefill(toy, [[1, 2]], 3)
    assert make_decoder(toy, cache) is None


@pytest.mark.parametrize("old, new", [("0.044715f", "0.05f"), ("s->pads[row]", "0")])
def test_a_function_that_gives_other_numbers_is_not_used(old, new, monkeypatch, tmp_path, steps):
    """The first fault shows when it is loaded, the second where rows differ in length."""
    for name in ("decode.c", "rows.h", "products.h"):
        (tmp_path / name).write_text((SOURCES / name).read_text().replace(old, new))
    monkeypatch.setattr("parts.compiler.SOURCES", tmp_path)
    toy = make_toy()
    prompts = [[1, 2, 3], [4]]
    texts = generate(toy, prompts, 10, temperature=0)
    assert steps == [] or new == "0"
    assert not computes_gpt2(type(toy), toy.config, torch.float32) or not decode.load_functions()
    monkeypatch.undo()
    forget()
    assert generate(toy, prompts, 10, temperature=0) == texts


def test_an_id_of_no_token_is_a_mistake_here():
    toy = make_toy()
    with torch.no_grad():
        cache, _ = prefill(toy, [[1, 2]], 3)
    step = make_decoder(toy, cache)
    for token in (-1, 257):
        with pytest.raises(AssertionError):
            step(torch.tensor([[token]]))


def test_damage_behind_the_prompt_is_said():
    """Token 7 alone is damaged, and comes after the prompt."""
    toy = make_toy()
    toy.transformer.wpe.weight.data[4] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(toy, [[1, 2]], 5)


def test_large_pages_hold_the_numbers():
    toy = make_packed("int8")
    weights = [x.weight for x in toy.modules() if isinstance(x, inference.PackedLinear)]
    memory = {weight.untyped_storage().data_ptr() for weight in weights}
    assert len(memory) == 1 and len(weights) == 9
    plain = make_toy()
    for linear, packed in zip(
        (x for x in plain.modules() if isinstance(x, nn.Linear)), weights, strict=True
    ):
        assert torch.equal(matvec.quantise(linear.weight.detach())[0], packed)
