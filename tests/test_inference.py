"""Generation: cached equals uncached, packed equals plain, the filters equal those of transformers,
and a changed model samples what it computes.
"""

from model import GPT, Block, CausalSelfAttention, GPTConfig
from parts import decode
from parts.inference import (
    PLAIN,
    KVCache,
    Method,
    TokenGraph,
    choose_method,
    computes_gpt2,
    forward_cached,
    generate,
    pack,
    penalize,
    prefill,
    restrict,
    sample,
    stream,
)
from parts.pretrained import compare_with_gpt2
from parts.standin import make_standin

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ids, make_toy
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# The last one: the current one is the first.
GPU = f"cuda:{max(torch.cuda.device_count(), 1) - 1}"
DEVICES = [
    "cpu",
    pytest.param(
        GPU,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
        ],
    ),
]


@torch.no_grad()
def generate_plainly(
    model: GPT,
    prompt: list[int],
    n: int,
    seed: int,
    stop_token=None,
    repetition_penalty=1.0,
    **options,
) -> list[int]:
    """One row, no cache: the whole context through the network for each token."""
    generator = torch.Generator().manual_seed(seed)
    row = list(prompt)
    for _ in range(n):
        draw = torch.rand((), generator=generator)
        logits = model(torch.tensor([row[-model.config.block_size :]]))[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, row] = True
        logits = penalize(logits, seen, repetition_penalty)
        row.append(sample(logits, draw[None], **options).item())
        if row[-1] == stop_token:
            break
    return row[len(prompt) :]


SAMPLERS = [
    dict(temperature=0),
    dict(temperature=1.0),
    dict(temperature=0.8, top_k=5),
    dict(temperature=3.0, top_p=0.9),
    dict(temperature=3.0, min_p=0.1, repetition_penalty=1.3),
    dict(temperature=0, repetition_penalty=1.5),
]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
@pytest.mark.parametrize("flash", [True, False])
def test_cached_equals_uncached(options, flash):
    """Prompts of several lengths in one batch, one as long as the context, and 40 tokens: far past
    the window of 16.
    """
    model = make_toy(flash=flash)
    prompts = [ids(n, seed=n).tolist() for n in (1, 3, 3, 16, 9)]
    together = generate(model, prompts, 40, seeds=[5, 6, 7, 8, 9], **options)
    for prompt, seed, completion in zip(prompts, (5, 6, 7, 8, 9), together):
        assert completion == generate_plainly(model, prompt, 40, seed, **options)
        assert generate(model, [prompt], 40, seeds=[seed], **options) == [completion]


def test_rows_end_at_the_stop_token_each_on_its_own(toy):
    prompts = [ids(3, seed=n).tolist() for n in range(6)]
    free = generate(toy, prompts, 12, seeds=range(6))
    stop = free[0][4]
    for completion, row in zip(generate(toy, prompts, 12, seeds=range(6), stop_token=stop), free):
        assert completion == (row[: row.index(stop) + 1] if stop in row else row)
    # And nothing is computed after it.
    assert len(list(stream(toy, prompts[:1], 12, seeds=[0], stop_token=stop))) == 5


def test_stream_is_generate_in_pieces_and_leaves_the_mode_alone():
    toy = make_toy(dropout=0.5)
    steps = list(stream(toy, [[1, 2], [3]], 5, seeds=[0, 1]))
    rows = [list(row) for row in zip(*(step.tokens for step in steps))]
    # The seeds are 0, 1, ... where none are given.
    assert rows == generate(toy.train(), [[1, 2], [3]], 5)
    assert toy.training
    # The logits that come with a token are the model's own.
    expected = toy.eval()(torch.tensor([[1, 2, *rows[0]]]))[0, 1:-1]
    assert torch.allclose(torch.stack([step.logits[0] for step in steps]), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("size", ["toy", pytest.param("gpt2", marks=pytest.mark.torture)])
def test_greedy_text_equals_transformers(tmp_path, size, penalty):
    """12 tokens; at GPT-2's size too, with random weights."""
    ours = make_toy() if size == "toy" else GPT(GPTConfig())
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = ids(1, 4)
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = theirs.generate(prompt, max_new_tokens=12, repetition_penalty=penalty, **options)
    text = generate(ours, prompt.tolist(), 12, temperature=0, repetition_penalty=penalty)
    assert text == expected[:, 4:].tolist()


@pytest.mark.parametrize("length", [0, 17])
def test_a_prompt_must_fit_the_context(toy, length):
    with pytest.raises(ValueError, match=rf"{length} tokens: this model takes 1 to 16; shorten it"):
        generate(toy, [[0] * length], 1)


def test_several_tokens_onto_a_filled_cache(toy):
    """`is_causal` with more keys than queries lets the first query see the first key only: a mask
    is needed there.
    """
    x = ids(2, 16)
    cache = KVCache(capacity=16)
    parts = [forward_cached(toy, part, cache) for part in x.split([5, 1, 7, 3], dim=1)]
    assert torch.allclose(torch.stack(parts, dim=1), toy(x)[:, [4, 5, 12, 15]], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(5, 5), (2, 7, 4)])
def test_a_token_as_a_graph_is_that_token(device, lengths):
    """The full capacity behind a mask against the filled part alone; on a GPU really captured and
    replayed.
    """
    toy = pack(make_toy().to(device), torch.float32)
    rows = [ids(n, seed=n).tolist() for n in lengths]
    (plain, _), (graphed, _) = (prefill(toy, rows, 16) for _ in range(2))
    step = TokenGraph(toy, graphed)
    tokens = [ids(len(lengths), 1, seed=n).to(device) for n in range(16 - max(lengths))]
    expected = [forward_cached(toy, token, plain) for token in tokens]
    # All calls come first: a call must not overwrite what an earlier one returned.
    logits = [step(token) for token in tokens]
    assert torch.allclose(torch.stack(logits), torch.stack(expected), atol=1e-4)
    assert graphed.length == 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4], [5] * 16]])
def test_packed_text_is_the_plain_text(device, prompts):
    """With, on a GPU, a graph that is captured and then given up at the window's end."""
    plain = generate(make_toy(), prompts, 40, temperature=0)
    assert generate(pack(make_toy().to(device), torch.float32), prompts, 40, temperature=0) == plain


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_packed_is_autocast_made_ready(device):
    """In bf16: the same products, so the same logits; with a cache the same but for rounding."""
    plain, packed = make_toy().to(device), pack(make_toy().to(device), torch.bfloat16)
    x = ids(3, 16).to(device)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        expected = plain(x).float()
    exact = plain(x)
    assert torch.equal(packed(x).float(), expected)
    assert not torch.allclose(expected, exact, atol=1e-4)  # it was bf16
    cache = KVCache(16, dtype=torch.float32 if device == "cpu" else None)
    parts = [forward_cached(packed, part, cache) for part in x.split([9, 1, 1, 5], dim=1)]
    last = exact[:, [8, 9, 10, 15]]
    rounding = (expected - exact).abs().max().item()
    assert torch.allclose(torch.stack(parts, dim=1).float(), last, atol=3 * rounding)
    assert cache.layers[0][0].dtype == (cache.dtype or torch.bfloat16)
    assert next(stream(packed, [[1]], 1)).logits.dtype == torch.float32


def test_draws_are_distributed_as_the_softmax_says():
    """Draws spread evenly over [0, 1) must hit each token in proportion to its probability, to
    within one draw.
    """
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).expand(5000, 20)
    draws = (torch.arange(5000) + 0.5) / 5000
    cases = [
        (1.0, {}),
        (0.5, {}),
        (1.0, dict(top_k=4)),
        (2.0, dict(top_k=1)),
        (3.0, dict(top_p=0.6, min_p=0.4)),
    ]
    for temperature, options in cases:
        kept = restrict(logits[:1] / temperature, **options)[0]
        counts = sample(logits, draws, temperature, **options).bincount(minlength=20)
        assert (counts - 5000 * kept.softmax(0)).abs().max() <= 1.01


@settings(max_examples=200)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0, 1, 3, 50, 500]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    st.sampled_from([1.0, 1.3, 0.8]),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_the_tokens_left_are_those_of_transformers(seed, top_k, top_p, min_p, penalty, temperature):
    """Penalty, temperature, top-k, top-p and min-p in this order, against the same of
    transformers.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 300, generator=generator) * 3
    seen = ids(2, 7, vocab_size=300, seed=seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits)
    theirs = TemperatureLogitsWarper(temperature)(seen, theirs)
    theirs = TopKLogitsWarper(top_k)(seen, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(seen, theirs)
    theirs = MinPLogitsWarper(min_p)(seen, theirs)
    mask = torch.zeros(2, 300, dtype=torch.bool).scatter(1, seen, True)
    ours = restrict(penalize(logits, mask, penalty) / temperature, top_k, top_p, min_p)
    assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-6)


@settings(max_examples=200)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=2, max_size=60),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0, 10),
    st.integers(0, 70),
)
def test_only_tokens_that_may_be_drawn_are_drawn(logits, draw, temperature, top_k):
    """Also at the edges: a draw of 0, of nearly 1, and logits so far apart that most probabilities
    round to 0.
    """
    logits = torch.tensor([logits])
    token = sample(logits, torch.tensor([draw]), temperature, top_k=top_k).item()
    scaled = (logits / max(temperature, 1e-6))[0]
    assert scaled.softmax(-1)[token] > 0
    assert not top_k or (scaled > scaled[token]).sum() < top_k
    assert temperature >= 1e-6 or logits[0, token] == logits.max()


def test_no_id_of_the_padding_is_ever_sampled():
    """Weights so large in the padding that it would win every time."""
    model = make_toy()
    model.transformer.wte.weight.data[257:] = 100.0
    for temperature in (0, 100.0):
        for text in generate(model, [[1], [2]], 200, temperature=temperature):
            assert max(text) < 257


# ---- Another model.py ----------------------------------------------------------------------------


class TokenShift(Block):
    """Each token also gets a share of the one before it, which no cache keeps."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.share = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x, layout):
        return super().forward(x + self.share * F.pad(x, (0, 0, 1, -1)), layout)


class BiasedAttention(CausalSelfAttention):
    """Attention with a bias on its scores, by the indices of queries and keys in their tensors."""

    def bias(self, query, key):
        """(T, 1) and (keys) int64 -> a number to add to each score, -inf for what is hidden."""
        raise NotImplementedError

    def forward(self, x, layout):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, 2)
        )
        if layout.cache is not None:
            k, v = layout.cache.update(self.layer, k, v)
            q = q.to(k.dtype)
        query, key = torch.arange(T)[:, None], torch.arange(k.size(2))
        allowed = layout.mask
        if allowed is None:
            allowed = key <= query + k.size(2) - T
        scores = torch.where(allowed, self.bias(query, key), float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores.to(q.dtype))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class KeyBias(BiasedAttention):
    """ALiBi by the key's index: softmax does not see a constant, so this is right with a cache."""

    def bias(self, query, key):
        return 0.3 * key


class DistanceBias(BiasedAttention):
    def bias(self, query, key):
        return -0.3 * (query - key).abs()


class Window(BiasedAttention):
    """The last four keys only; behind a cache, a single token is taken for the first."""

    def bias(self, query, key):
        return torch.where(query - key < 4, 0.0, float("-inf"))


class LongWindow(CausalSelfAttention):
    """A window of 600 tokens that is forgotten behind a cache."""

    def forward(self, x, layout):
        if layout.mask is None and layout.cache is None:
            T = x.size(1)
            mask = torch.ones(T, T, dtype=torch.bool).tril().triu(-599)
            layout = layout._replace(mask=mask)
        return super().forward(x, layout)


class Bare(GPT):
    """It reads whole texts only."""

    def hidden(self, idx):
        return super().hidden(idx)


class NoMaskForOne(CausalSelfAttention):
    """A single token sees all keys, which is wrong where some columns of the cache are empty."""

    def forward(self, x, layout):
        if x.size(1) == 1:
            layout = layout._replace(mask=None)
        return super().forward(x, layout)


def forget_trials() -> None:
    """Answers are kept by class and config, and here the classes that they are made of change."""
    for question in (choose_method, computes_gpt2, compare_with_gpt2, make_standin):
        question.cache_clear()


@pytest.fixture(autouse=True)
def fresh_trials():
    forget_trials()
    yield
    forget_trials()


def make_changed(monkeypatch, change: type, **shape: int) -> GPT:
    """A toy in whose model.py this class is the network, the block or the attention."""
    [name] = {"GPT", "Block", "CausalSelfAttention"} & {base.__name__ for base in change.__mro__}
    monkeypatch.setattr(f"model.{name}", change)
    toy = make_toy(**shape)
    if name == "GPT":
        toy.__class__ = change
    return toy


CACHED = Method(cache=True, pads=False, graph=False)
CACHED_TOGETHER = Method(cache=True, pads=True, graph=False)
REREAD_TOGETHER = Method(cache=False, pads=True, graph=False)

# A change -> the methods for one prompt and for prompts of several lengths.
CHANGES = {
    KeyBias: (CACHED, CACHED_TOGETHER),
    TokenShift: (PLAIN, PLAIN),
    DistanceBias: (PLAIN, REREAD_TOGETHER),
    Window: (PLAIN, REREAD_TOGETHER),
    Bare: (PLAIN, PLAIN),
    NoMaskForOne: (CACHED, REREAD_TOGETHER),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_samples_what_it_computes(change, monkeypatch, capsys):
    """With one prompt, with several lengths, and past the window; a line says what is slower."""
    model = make_changed(monkeypatch, change)
    prompts = [ids(n, seed=n).tolist() for n in (3, 7, 5)]
    expected = [generate_plainly(model, prompt, 25, seed) for seed, prompt in enumerate(prompts)]
    assert generate(model, prompts[:1], 25) == expected[:1]
    assert generate(model, prompts, 25) == expected
    cls, config = type(model), model.config
    methods = tuple(choose_method(cls, config, pads, False) for pads in (False, True))
    assert methods == CHANGES[change]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == sum(not method.cache for method in methods)
    reason = "raises TypeError (" if change is Bare else "gives other logits"
    for line in lines:
        assert line.startswith(f"this model.py {reason}") and " with the KV cache" in line
    assert generate(model, prompts, 2) and not capsys.readouterr().err  # it is said once


def test_a_change_that_does_nothing_yet_is_seen(monkeypatch, capsys):
    """A layer that starts as the identity is no identity in the stand-in."""
    model = make_changed(monkeypatch, TokenShift)
    for block in model.transformer.h:
        block.share.data.zero_()
    assert choose_method(GPT, model.config, False, False) == PLAIN
    assert capsys.readouterr().err.count("\n") == 1


def test_a_window_that_is_longer_than_most_trials_is_seen(monkeypatch, capsys):
    model = make_changed(monkeypatch, LongWindow, block_size=1024)
    assert choose_method(GPT, model.config, False, False) == PLAIN
    assert "gives other logits with the KV cache" in capsys.readouterr().err


def test_a_graph_that_reads_empty_columns_is_refused(monkeypatch, capsys):
    model = make_changed(monkeypatch, NoMaskForOne)
    assert choose_method(GPT, model.config, False, graph=True) == CACHED
    line = "this model.py gives other logits in a CUDA graph: sampling without it, slower\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_the_unchanged_model_takes_the_fastest_method(pads, graph, dtype, packed, capsys):
    """Whatever its precision. The comparison draws nothing from torch's generator."""
    model = make_toy(n_layer=6)
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32 and not packed)
    if packed:
        pack(model, dtype)
    state = torch.get_rng_state()
    with autocast:
        method = choose_method(GPT, model.config, pads, graph)
    assert method == Method(cache=True, pads=pads, graph=graph)
    assert torch.equal(torch.get_rng_state(), state)
    assert not capsys.readouterr().err


def test_a_token_computes_one_token(toy, monkeypatch):
    """Behind the comparison: a prompt, and then a column for each new token, where the model
    computes it and not decode.c.
    """
    monkeypatch.setattr(decode, "load_functions", lambda: None)
    generate(toy, [[1, 2, 3]], 1)
    shapes = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT,
        "hidden",
        lambda self, idx, **rest: shapes.append(idx.shape) or hidden(self, idx, **rest),
    )
    generate(toy, [[1, 2, 3]] * 2, 4)
    assert shapes == [(2, 3), (2, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_a_context_too_short_to_compare(block_size):
    model = make_toy(block_size=block_size)
    assert generate(model, [[1], [2] * block_size], 9) == [
        generate_plainly(model, [1], 9, 0),
        generate_plainly(model, [2] * block_size, 9, 1),
    ]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 3e38])
def test_damaged_weights_are_said_to_be_damaged(toy, capsys, weight):
    toy.transformer.wte.weight.data[3] = weight
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(toy, [[1, 2]], 3)
    assert not capsys.readouterr().err


def test_the_first_keys_come_back_as_they_are():
    """Unless the values have another dtype: attention takes one only."""
    keys = torch.randn(1, 2, 3, 4).bfloat16()
    for values in (torch.randn(1, 2, 3, 4).bfloat16(), torch.randn(1, 2, 3, 4)):
        cache = KVCache(capacity=5, dtype=torch.float32)
        k, v = cache.update(0, keys, values)
        expected = torch.bfloat16 if values.dtype == keys.dtype else torch.float32
        assert k.dtype == v.dtype == expected
        assert torch.equal(k.float(), keys.float()) and torch.equal(v.float(), values.float())
        assert torch.equal(cache.layers[0][0][:, :, :3], keys.float())


def test_a_cache_of_unlike_layers():
    """Of three layers one keeps nothing, and the others have other heads, also for their values."""
    cache = KVCache(capacity=5, dtype=torch.float64)
    k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 6)
    for layer, (keys, values) in {0: (k, v), 2: (v, k)}.items():
        cache.update(layer, keys[:, :, :3], values[:, :, :3])
    cache.length = 3
    for layer, (keys, values) in {0: (k, v), 2: (v, k)}.items():
        got = cache.update(layer, keys[:, :, 3:], values[:, :, 3:])
        assert torch.equal(got[0], keys.double()) and torch.equal(got[1], values.double())
