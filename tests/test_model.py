"""The network against references: transformers' GPT-2, spelled-out loops, and arithmetic done another way."""

import json
import math
import shlex
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import clean_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import (
    GPT,
    SIZES,
    GPTConfig,
    HeadLoss,
    KVCache,
    OneToken,
    align_right,
    checkpoints,
    is_conv1d,
    locate,
    onednn_multiplies_bf16,
    penalize,
    resolve,
    restrict,
    sample,
)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")),
]

TOY = dict(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def toy() -> GPT:
    return make_toy()


def make_toy(**changes) -> GPT:
    """A toy whose weights are larger than GPT-2's at init, so that mistakes show and no two logits nearly tie."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(TOY | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("wte.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.transformer.wte.weight[: model.config.vocab_size].mul_(10)
    return model.eval()


def ids(*shape: int, vocab_size: int = 257, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- Law 1: equal to transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flash", [True, False])
def test_logits_and_gradients_equal_transformers(tmp_path, bias, flash):
    """The erf-GELU, a forgotten transpose, a wrong scale: all of them show here and nowhere else so clearly."""
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


def test_loads_what_transformers_saves(tmp_path):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=24, n_embd=48, n_layer=3, n_head=4)).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    assert ours.config == GPTConfig(vocab_size=100, block_size=24, n_embd=48, n_layer=3, n_head=4)
    assert torch.allclose(ours(ids(2, 24, vocab_size=100)), theirs(ids(2, 24, vocab_size=100)).logits, atol=1e-5)


def test_save_and_load_is_exact(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path, dropout=0.25)
    assert again.config.dropout == 0.25
    for (name, one), two in zip(toy.named_parameters(), again.parameters()):
        assert torch.equal(one, two), name


def test_loads_the_hubs_old_names(toy):
    """The hub's gpt2 has no leading "transformer." and carries attention's triangle of ones as a buffer."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in toy.hf_state().items()}
    state["h.0.attn.bias"], state["h.0.attn.masked_bias"] = torch.ones(1, 1, 16, 16).tril(), torch.tensor(-1e4)
    state["lm_head.weight"] = state["wte.weight"].clone()
    again = GPT(toy.config)
    again.load_hf_state(state)
    assert torch.equal(again.eval()(ids(1, 16)), toy(ids(1, 16)))


# ---- The initial weights, and the counts -----------------------------------------------------------------------------


def test_loss_at_initialisation_is_that_of_knowing_nothing():
    """At GPT-2's shape. A final norm of length sqrt(C) against rows of N(0, 0.02) gives logits of variance 0.0004 C,
    and those cost half their variance above ln V: 10.825 + 0.154."""
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
    """Loss and all gradients, against cross_entropy over the whole logits; pieces that do not divide the rows."""
    monkeypatch.setattr(HeadLoss, "ROWS", 10)
    model = make_toy(pad_vocab=pad_vocab).to(device)
    monkeypatch.setattr(HeadLoss, "IN_CACHE", 3 * 4 * model.config.padded_vocab_size)
    x, y = ids(2, 16).to(device), ids(2, 16, seed=1).to(device)
    found = []
    for in_pieces in (True, False):
        model.zero_grad()
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(x, y) if in_pieces else F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
        (loss / 3).backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (loss, grads), (expected, expected_grads) = found
    assert torch.allclose(loss, expected, atol=1e-5)
    for grad, reference in zip(grads, expected_grads):
        rounding = 1e-5 if dtype == torch.float32 else 0.02
        assert (grad - reference).norm() < rounding * reference.norm()
    with torch.no_grad():
        assert torch.equal(model(x, y), loss) or dtype != torch.float32


def test_building_a_model_does_not_load_the_compiler():
    """Whose import takes longer than a small model's first sample."""
    script = "import sys, model; model.GPT(model.GPTConfig(n_layer=1)); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=clean_environment()).returncode == 0


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
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameters_of_the_four_sizes(name, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig(**SIZES[name])).num_params() == parameters


def test_flops_per_token_is_what_torch_counts():
    """Counted by torch over forward and backward; our 6N has norms and biases, which are no products: 3 % here."""
    model = make_toy(block_size=64, n_embd=64, flash=False, pad_vocab=False)
    with FlopCounterMode(display=False) as counter:
        model(ids(2, 64), ids(2, 64)).backward()
    assert model.flops_per_token(64) * 2 * 64 == pytest.approx(counter.get_total_flops(), rel=0.03)


# ---- Law 9, law 7's sister, and the padding --------------------------------------------------------------------------


def test_every_parameter_is_in_one_group_and_has_a_gradient(toy):
    groups = toy.param_groups(weight_decay=0.1)
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
    """257 tokens become 320 rows: the same initial weights, loss and gradients, and nothing flows into the padding."""
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


# ---- Law 5: cached generation equals uncached ------------------------------------------------------------------------


@torch.no_grad()
def generate_plainly(
    model: GPT, prompt: list[int], n: int, seed: int, stop_token=None, repetition_penalty=1.0, **options
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
    """Prompts of several lengths in one batch, one as long as the context, and 40 tokens: far past the window of 16."""
    model = make_toy(flash=flash)
    prompts = [ids(n, seed=n).tolist() for n in (1, 3, 3, 16, 9)]
    together = model.generate(prompts, 40, seeds=[5, 6, 7, 8, 9], **options)
    for prompt, seed, completion in zip(prompts, (5, 6, 7, 8, 9), together):
        assert completion == generate_plainly(model, prompt, 40, seed, **options)
        assert model.generate([prompt], 40, seeds=[seed], **options) == [completion]


def test_rows_end_at_the_stop_token_each_on_its_own(toy):
    prompts = [ids(3, seed=n).tolist() for n in range(6)]
    free = toy.generate(prompts, 12, seeds=range(6))
    stop = free[0][4]
    for completion, row in zip(toy.generate(prompts, 12, seeds=range(6), stop_token=stop), free):
        assert completion == (row[: row.index(stop) + 1] if stop in row else row)
    assert len(list(toy.stream(prompts[:1], 12, seeds=[0], stop_token=stop))) == 5  # and nothing is computed after it


def test_stream_is_generate_in_pieces_and_leaves_the_mode_alone():
    toy = make_toy(dropout=0.5).train()
    steps = list(toy.stream([[1, 2], [3]], 5, seeds=[0, 1]))
    rows = [list(row) for row in zip(*(step.tokens for step in steps))]
    assert rows == toy.generate([[1, 2], [3]], 5)  # the seeds are 0, 1, ... where none are given
    assert toy.training
    # The logits that come with a token are the model's own.
    expected = toy.eval()(torch.tensor([[1, 2, *rows[0]]]))[0, 1:-1]
    assert torch.allclose(torch.stack([step.logits[0] for step in steps]), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_text_equals_transformers(tmp_path, toy, penalty):
    toy.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = ids(1, 4)
    expected = theirs.generate(
        prompt, max_new_tokens=12, do_sample=False, repetition_penalty=penalty, pad_token_id=0, eos_token_id=None
    )
    assert toy.generate(prompt.tolist(), 12, temperature=0, repetition_penalty=penalty) == expected[:, 4:].tolist()


@torch.no_grad()
def test_greedy_text_equals_transformers_at_gpt2s_size(tmp_path):
    """64 tokens of a random GPT-2 124M."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig())
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = ids(1, 8, vocab_size=50257)
    expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert ours.generate(prompt.tolist(), 64, temperature=0) == expected[:, 8:].tolist()


@pytest.mark.parametrize("length", [0, 17])
def test_a_prompt_must_fit_the_context(toy, length):
    with pytest.raises(ValueError, match=rf"{length} tokens: this model takes 1 to 16; shorten it"):
        toy.generate([[0] * length], 1)


def test_several_tokens_onto_a_filled_cache(toy):
    """`is_causal` with more keys than queries lets the first query see the first key only: a mask is needed there."""
    x = ids(2, 16)
    cache = KVCache(toy.config.n_layer, capacity=16)
    parts = [toy.hidden(part, cache) for part in x.split([5, 1, 7, 3], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), toy.hidden(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(5, 5), (2, 7, 4)])
def test_a_token_as_a_graph_is_that_token(device, lengths):
    """The full capacity behind a mask against the filled part alone; on a GPU really captured and replayed."""
    toy = make_toy().to(device).pack(torch.float32)
    idx, pad = align_right([ids(n, seed=n).tolist() for n in lengths])
    idx, pad = idx.to(device), pad.to(device) if pad.any() else None
    plain, graphed = (KVCache(toy.config.n_layer, 16, pad) for _ in range(2))
    for cache in (plain, graphed):
        toy.hidden(idx, cache)
    step = OneToken(toy, graphed, len(lengths))
    tokens = [ids(len(lengths), 1, seed=n).to(device) for n in range(16 - idx.size(1))]
    expected = [toy.padded_logits(toy.hidden(token, plain)[:, -1]) for token in tokens]
    # All before the first is looked at: a call must not overwrite what an earlier one returned.
    assert torch.allclose(torch.stack([step(token) for token in tokens]), torch.stack(expected), atol=1e-4)
    assert graphed.length == 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4], [5] * 16]])
def test_packed_text_is_the_plain_text(device, prompts):
    """With, on a GPU, a graph that is captured and then given up at the window's end."""
    plain = make_toy().generate(prompts, 40, temperature=0)
    assert make_toy().to(device).pack(torch.float32).generate(prompts, 40, temperature=0) == plain


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_packed_is_autocast_made_ready(device):
    """In bf16: the same products, so the same logits; with a cache the same but for rounding."""
    plain, packed = make_toy().to(device), make_toy().to(device).pack(torch.bfloat16)
    x = ids(3, 16).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = plain(x).float()
    exact = plain(x)
    assert torch.equal(packed(x).float(), expected)
    assert not torch.allclose(expected, exact, atol=1e-4)  # it was bf16
    cache = KVCache(packed.config.n_layer, 16, dtype=torch.float32 if device == "cpu" else None)
    parts = [packed.padded_logits(packed.hidden(part, cache))[..., :257] for part in x.split([9, 1, 1, 5], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1).float(), exact, atol=3 * (expected - exact).abs().max().item())
    assert cache.layers[0].dtype == (cache.dtype or torch.bfloat16)
    assert next(packed.stream([[1]], 1)).logits.dtype == torch.float32
    # The padding takes no part in the loss.
    assert packed(x, x).item() == pytest.approx(F.cross_entropy(expected.flatten(0, 1), x.flatten()).item(), abs=1e-4)


def test_a_new_cache_takes_no_more_than_it_needs():
    """Room, a mask and a dtype change no text, only what it costs."""
    toy, aligned, ragged = make_toy(), torch.tensor([0, 0]), torch.tensor([0, 3])
    assert toy.new_cache(5, aligned).capacity == 5 and toy.new_cache(99, aligned).capacity == 16
    assert toy.new_cache(5, aligned).pad is None and toy.new_cache(5, ragged).pad is ragged
    assert toy.new_cache(5, aligned).dtype is None
    assert toy.pack(torch.bfloat16).new_cache(5, aligned).dtype == torch.float32


def test_on_a_cpu_bf16_and_nothing_else_is_in_onednns_order():
    packed = {dtype: make_toy().pack(dtype).lm_head for dtype in (torch.bfloat16, torch.float32)}
    assert packed[torch.bfloat16].blocked == onednn_multiplies_bf16() and not packed[torch.float32].blocked


# ---- Law 6: sampling -------------------------------------------------------------------------------------------------


def test_draws_are_distributed_as_the_softmax_says():
    """Draws spread evenly over [0, 1) must hit each token in proportion to its probability, to within one draw."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).expand(5000, 20)
    draws = (torch.arange(5000) + 0.5) / 5000
    for temperature, options in (
        (1.0, dict()),
        (0.5, dict()),
        (1.0, dict(top_k=4)),
        (2.0, dict(top_k=1)),
        (3.0, dict(top_p=0.6)),
        (3.0, dict(min_p=0.4)),
    ):
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
    """Penalty, temperature, top-k, top-p and min-p in this order, against the same of transformers."""
    generator = torch.Generator().manual_seed(seed)
    logits, seen = torch.randn(2, 300, generator=generator) * 3, ids(2, 7, vocab_size=300, seed=seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits)
    theirs = TemperatureLogitsWarper(temperature)(seen, theirs)
    theirs = TopKLogitsWarper(top_k)(seen, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(seen, theirs)
    theirs = MinPLogitsWarper(min_p)(seen, theirs)
    mask = torch.zeros(2, 300, dtype=torch.bool).scatter(1, seen, True)
    ours = restrict(penalize(logits, mask, penalty) / temperature, top_k, top_p, min_p)
    assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-6)


def test_the_edges_of_top_p():
    kept = {top_p: restrict(torch.zeros(1, 4), top_p=top_p).exp().sum().item() for top_p in (0, 0.25, 0.5, 0.6, 1)}
    assert kept == {0: 1, 0.25: 1, 0.5: 2, 0.6: 3, 1: 4}
    unlikely = torch.tensor([[0.0, -40.0]])  # the first's probability rounds to 1
    assert torch.equal(restrict(unlikely), unlikely)


@settings(max_examples=200)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=2, max_size=60),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0, 10),
    st.integers(0, 70),
)
def test_only_tokens_that_may_be_drawn_are_drawn(logits, draw, temperature, top_k):
    """Also at the edges: a draw of 0, of nearly 1, and logits so far apart that most probabilities round to 0."""
    logits = torch.tensor([logits])
    token = sample(logits, torch.tensor([draw]), temperature, top_k).item()
    if temperature < 1e-6:
        assert logits[0, token] == logits.max()
        return
    scaled = (logits / temperature)[0]
    assert scaled.softmax(-1)[token] > 0
    if top_k:
        assert (scaled > scaled[token]).sum() < top_k


def test_no_id_of_the_padding_is_ever_sampled():
    """Weights so large in the padding that it would win every time."""
    model = make_toy()
    with torch.no_grad():
        model.transformer.wte.weight[257:] = 100.0
    for options in (dict(temperature=0), dict(temperature=100.0)):
        assert max(max(row) for row in model.generate([[1], [2]], 200, **options)) < 257


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_embd=30, n_head=4), "n_head could be 2, 3, 5"),
        (dict(n_layer=0), "n_layer is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**(TOY | changes)))


def damage(folder, change) -> None:
    """Apply `change` to config.json's dict or, if it takes a path, to the weights file."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="llama"), "model_type is 'llama'"),
        (dict(activation_function="relu"), "activation_function is 'relu'"),
        (dict(n_inner=100), "n_inner is 100"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (dict(scale_attn_weights=False), "scale_attn_weights is False"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
        (dict(n_head=5), "config.json: n_embd 32 is not divisible by n_head 5"),
        (dict(n_embd=64), "has the shape .* but config.json makes it"),
        (dict(n_layer=3), "h.2.ln_1.weight is missing"),
        (dict(n_layer=1), "has no place in this model"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, toy, change, message):
    toy.save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_biases_are_as_config_json_says(tmp_path, toy):
    make_toy(bias=False).save_pretrained(tmp_path)
    assert not GPT.from_pretrained(tmp_path).config.bias
    toy.save_pretrained(tmp_path)
    damage(tmp_path, dict(n_inner=4 * 32))  # what None means, spelled out
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(ids(1, 16)), toy(ids(1, 16)))
    damage(tmp_path, dict(bias=False))  # but those of the file are not zeros
    with pytest.raises(ValueError, match="bias has no place in this model"):
        GPT.from_pretrained(tmp_path)


def test_half_copied_folders(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or only half copied"):
        GPT.from_pretrained(tmp_path)
    for text in ("{", "[]", '{"vocab_size": null}', (tmp_path / "config.json").read_text().replace("32", '"32"')):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json: not the config.json of a GPT-2"):
            GPT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors in this folder"):
        GPT.from_pretrained(tmp_path)


# ---- Other people's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "parts", "bin"])
def test_folders_of_all_forms_are_read(tmp_path, form, dtype):
    """distilgpt2's shape in small: six layers, other contexts and vocabularies; in one file, in parts, as a pickle."""
    torch.manual_seed(1)
    theirs = (
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=24, n_embd=32, n_layer=6, n_head=4)).to(dtype).eval()
    )
    theirs.save_pretrained(tmp_path, max_shard_size="50KB" if form == "parts" else "5GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        triangles = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(6)}  # of old files
        torch.save(theirs.state_dict() | triangles, tmp_path / "pytorch_model.bin")
    if form == "parts":
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours = GPT.from_pretrained(tmp_path).eval()
    x = ids(2, 24, vocab_size=300)
    assert torch.allclose(ours(x), theirs.float()(x).logits, atol=1e-5)


def nanogpt(model: GPT, path, prefix="", vocab_size=None, **more):
    """The model as nanoGPT's train.py saves it: PyTorch's orientation, the tied head twice, padded rows included."""
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    if vocab_size:
        rows = torch.zeros(vocab_size, model.config.n_embd)
        rows[: model.config.vocab_size] = state["transformer.wte.weight"][: model.config.vocab_size]
        state["transformer.wte.weight"] = rows
    else:
        state["transformer.wte.weight"] = state["transformer.wte.weight"][: model.config.vocab_size]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    shape |= dict(vocab_size=vocab_size or model.config.vocab_size, dropout=0.0)
    state = {prefix + name: value for name, value in state.items()}
    torch.save(dict(model=state, model_args=shape, iter_num=5, best_val_loss=torch.tensor(1.0)) | more, path)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoints_are_read(tmp_path, bias):
    ours = make_toy(bias=bias)
    nanogpt(ours, tmp_path / "ckpt.pt", prefix="_orig_mod.")
    again = GPT.from_pretrained(tmp_path / "ckpt.pt", dropout=0.25).eval()
    assert again.config.dropout == 0.25
    assert torch.equal(again(ids(2, 16)), ours(ids(2, 16))) and again.config.bias == bias
    old = torch.load(tmp_path / "ckpt.pt")
    if old["model_args"].pop("bias"):  # before nanoGPT could leave them out, all models had them
        torch.save(old, tmp_path / "old.pt")
        assert torch.equal(GPT.from_pretrained(tmp_path / "old.pt").eval()(ids(2, 16)), ours(ids(2, 16)))
    padded = make_toy(vocab_size=50257)
    nanogpt(padded, tmp_path / "padded.pt", vocab_size=50304)
    again = GPT.from_pretrained(tmp_path / "padded.pt").eval()
    assert again.config.vocab_size == 50257 and torch.equal(again(ids(1, 8)), padded(ids(1, 8)))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_pickles_that_run_code_are_refused_and_not_run(tmp_path, toy, name):
    toy.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(dict(model={}, model_args=Malicious(tmp_path / "executed")), tmp_path / name)
    where = tmp_path / name if name == "ckpt.pt" else tmp_path
    with pytest.raises(ValueError, match=rf"{name}: needs the pickled object \w*.?open; unpickling could run code"):
        GPT.from_pretrained(where)
    assert not (tmp_path / "executed").exists()


def test_build_nanogpts_checkpoint_is_refused_with_what_converts_it(tmp_path, toy):
    """The command in the message is run, and what it makes is read."""
    nanogpt(toy, tmp_path / "plain.pt")
    save = (
        "import torch; GPTConfig = type('GPTConfig', (), {}); c = torch.load('plain.pt'); config = GPTConfig(); "
        "config.__dict__ = c['model_args']; torch.save(dict(model=c['model'], config=config, step=9), 'model_00009.pt')"
    )
    subprocess.run([sys.executable, "-c", save], cwd=tmp_path, check=True)
    (tmp_path / "plain.pt").unlink()
    with pytest.raises(ValueError, match=r"needs the pickled object __main__.GPTConfig") as error:
        GPT.from_pretrained(tmp_path / "model_00009.pt")
    command = shlex.split(str(error.value).partition("can be read: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert torch.equal(GPT.from_pretrained(tmp_path / "plain.pt").eval()(ids(1, 9)), toy(ids(1, 9)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02junk", b"text"])
def test_files_that_are_no_checkpoints(tmp_path, toy, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"ckpt.pt: (damaged|not a file of weights)"):
        GPT.from_pretrained(tmp_path / "ckpt.pt")
    torch.save(toy.hf_state(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt: not a checkpoint of nanoGPT .*wants its folder"):
        GPT.from_pretrained(tmp_path / "weights.pt")
    toy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors: not a checkpoint of nanoGPT"):
        GPT.from_pretrained(tmp_path / "model.safetensors")


def test_tables_that_hold_no_tensors_are_refused(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for content in ([1, 2], {1: torch.zeros(1)}, {"wte.weight": "text"}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model.bin: not a table of names and tensors"):
            GPT.from_pretrained(tmp_path)
    for text in ("{}", "{", "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index.json: not a list of parts"):
            GPT.from_pretrained(tmp_path)
    torch.save(
        dict(model={}, model_args=dict(n_layer="2", n_head=1, n_embd=8, block_size=4, vocab_size=9)), tmp_path / "c.pt"
    )
    with pytest.raises(ValueError, match="n_layer is '2', not an int"):
        GPT.from_pretrained(tmp_path / "c.pt")


class NotThere(huggingface_hub.errors.EntryNotFoundError, OSError):
    """As huggingface_hub's RemoteEntryNotFoundError, which wants the hub's whole answer."""


@pytest.mark.parametrize(
    "error, asked", [(NotThere, ["a", "b"]), (huggingface_hub.errors.LocalEntryNotFoundError, ["a"])]
)
def test_each_file_is_asked_of_the_hub_but_only_while_it_answers(monkeypatch, error, asked):
    names = []

    def download(_repo, name):
        names.append(name)
        raise error("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=rf"'nobody/nothing' is neither .*{error.__name__}: no such file"):
        locate("nobody/nothing", "a", "b")
    assert names == asked


def test_untied_heads_are_refused(toy):
    state = toy.hf_state()
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match="shares one matrix"):
        GPT(toy.config).load_hf_state(state)


def test_the_newest_checkpoint_of_a_run_is_found(tmp_path, toy):
    for step in (5, 20, 100):
        toy.save_pretrained(tmp_path / f"step_{step:07d}")
    (tmp_path / ".step_0000200.tmp").mkdir()
    (tmp_path / "step_20000000").touch()
    for name in ("step_10000000", "step_9000000"):
        (tmp_path / name).mkdir()
    names = [folder.name for folder in checkpoints(tmp_path)]
    assert names == ["step_0000005", "step_0000020", "step_0000100", "step_9000000", "step_10000000"]
    for name in names[-2:]:
        (tmp_path / name).rmdir()
    assert resolve(tmp_path).name == "step_0000100" and resolve("gpt2") == "gpt2"
    assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, toy.lm_head.weight)
