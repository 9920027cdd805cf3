"""parts/look.py: what a model saw in a place of a text."""

import math

from model import Block, attention_spelled_out
from parts import page
from parts.inference import pack
from parts.look import NO_ATTENTION, NO_BLOCKS, look, rate
from parts.tokenizer import get_tokenizer

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ids, make_toy


def attention_by_hand(model, tokens: list[int]) -> list[torch.Tensor]:
    """The weights (nh, T) of the last token in each layer, from the layers' inputs."""
    x = model.transformer.wte(torch.tensor(tokens)) + model.transformer.wpe.weight[: len(tokens)]
    x = x[None]
    layers = []
    for block in model.transformer.h:
        q, k, _ = block.attn.c_attn(block.ln_1(x)).split(model.config.n_embd, dim=2)
        heads = []
        for one_q, one_k in zip(q[0].chunk(2, dim=1), k[0].chunk(2, dim=1)):
            heads.append(torch.softmax(one_q[-1] @ one_k.T / math.sqrt(one_k.size(1)), dim=0))
        layers.append(torch.stack(heads))
        # The block's own output, from a plain causal layout.
        x = block(x, type("Layout", (), dict(position=None, mask=None, cache=None)))
    return layers


@torch.no_grad()
@pytest.mark.parametrize("flash", [True, False])
def test_attention_is_that_of_the_last_token_in_each_layer_and_head(flash):
    model = make_toy(flash=flash)
    tokens = ids(11).tolist()
    sight = look(model, tokens)
    assert not sight.missing
    for weights, expected in zip(sight.attention, attention_by_hand(model, tokens), strict=True):
        assert torch.allclose(weights, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_shows_the_same(dtype):
    expected = look(make_toy(), ids(11).tolist())
    sight = look(pack(make_toy(), dtype), ids(11).tolist())
    assert not sight.missing
    for weights, others in zip(sight.attention, expected.attention, strict=True):
        assert torch.allclose(weights, others, atol=0.05)


@torch.no_grad()
def test_a_guess_after_each_block_and_the_last_is_what_the_model_says():
    model = make_toy(n_layer=3)
    tokens = ids(9).tolist()
    sight = look(model, tokens)
    probabilities = model(torch.tensor([tokens]))[0, -1].softmax(dim=-1)
    assert len(sight.guesses) == 3
    assert sight.guesses[-1].id == probabilities.argmax()
    assert sight.guesses[-1].p == pytest.approx(probabilities.max().item(), rel=1e-4)
    shallow = model.transformer.h[:1]
    model.transformer.h = shallow
    probabilities = model(torch.tensor([tokens]))[0, -1].softmax(dim=-1)
    assert sight.guesses[0].id == probabilities.argmax()


class PassingBlock(Block):
    """It hands on what it was given, beside the residual stream."""

    def forward(self, x, layout):
        x = x[0] if isinstance(x, tuple) else x
        return super().forward(x, layout), x


@torch.no_grad()
def test_blocks_that_hand_on_more_than_the_stream_are_read(monkeypatch):
    expected = look(make_toy(), ids(9).tolist())
    monkeypatch.setattr("model.Block", PassingBlock)
    model = make_toy()
    norm = model.transformer.ln_f.forward
    model.transformer.ln_f.forward = lambda x: norm(x[0] if isinstance(x, tuple) else x)
    sight = look(model, ids(9).tolist())
    assert (sight.guesses, sight.missing) == (expected.guesses, [])


@torch.no_grad()
def test_what_a_changed_model_hides_is_said():
    model = make_toy()
    tokens = ids(9).tolist()

    class Mean(nn.Module):
        """Mixes tokens without attention."""

        def forward(self, x, layout):
            return x.cumsum(dim=1) / 10

    for block in model.transformer.h:
        block.attn = Mean()
    sight = look(model, tokens)
    assert (sight.attention, sight.missing) == ([], [NO_ATTENTION]) and sight.guesses

    model = make_toy()
    model.hidden = lambda idx, hidden=model.hidden: 1 + hidden(idx)  # something behind the blocks
    sight = look(model, tokens)
    assert (sight.guesses, sight.missing) == ([], [NO_BLOCKS]) and sight.attention

    model = make_toy()
    for block in model.transformer.h:  # the difference of two attentions
        block.forward = lambda x, layout, block=block: (
            x + block.attn(block.ln_1(x), layout) - 0.5 * block.attn(block.ln_2(x), layout)
        )
    sight = look(model, tokens)
    assert (sight.attention, sight.missing) == ([], [NO_ATTENTION]) and sight.guesses

    model = make_toy()
    model.transformer.h = nn.ModuleDict({"a": model.transformer.h[0], "b": model.transformer.h[1]})
    model.hidden = lambda idx: model.transformer.wte(idx)
    assert look(model, tokens).missing == [NO_ATTENTION, NO_BLOCKS]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["grouped", "masked", "biased", "scaled"])
def test_every_kind_of_fused_attention_is_read(kind):
    from parts.look import AttentionRecorder

    q, k, v = torch.randn(3, 1, 4, 7, 8).unbind()
    options: dict = dict(is_causal=True)
    if kind == "grouped":
        k, v = k[:, :2], v[:, :2]
        options["enable_gqa"] = True
    elif kind == "masked":
        window = torch.ones(7, 7, dtype=torch.bool).tril().triu(-2)
        options = dict(attn_mask=window)
    elif kind == "biased":
        options = dict(attn_mask=torch.randn(4, 7, 7).tril())
    else:
        options["scale"] = 0.5
    with AttentionRecorder(7) as recorder:
        y = F.scaled_dot_product_attention(q, k, v, **options)
    [weights] = recorder.layers
    v = v.repeat_interleave(4 // v.size(1), dim=1)
    assert recorder.is_whole
    assert torch.allclose(torch.einsum("hk,hkc->hc", weights, v[0]), y[0, :, -1], atol=1e-5)
    with AttentionRecorder(7) as recorder:  # spelled out, the same
        attention_spelled_out(q, q, q, is_causal=True)
    assert recorder.layers[0].shape == (4, 7)


@torch.no_grad()
def test_rating_a_text_gives_the_models_log_probabilities():
    model = make_toy()
    tokens = ids(14).tolist()
    expected = model(torch.tensor([tokens])).log_softmax(dim=-1)[0, :-1]
    assert torch.allclose(torch.stack(rate(model, tokens)), expected, atol=1e-4)
    assert rate(model, tokens[:1]) == []


# ---- What the page asks --------------------------------------------------------------------------


class OneModel:
    """In place of a page.Shelf."""

    def __init__(self, model):
        self.model = model

    def load(self, name: str):
        return self.model


def test_the_page_is_told_what_the_model_saw_in_a_place():
    model = make_toy()
    tokenizer = get_tokenizer("bytes")
    place = dict(prompt="The quick brown fox", checkpoint="", taken=[65, 66], start=0, end=20)
    [event] = page.look_at(OneModel(model), tokenizer, place)
    sight = look(model, [*b"The quick brown fox", 65][-16:])
    assert len(event["attention"]) == 2 and len(event["attention"][0][0]) == 16
    for weights, thousandths in zip(sight.attention, event["attention"], strict=True):
        assert torch.allclose(weights, torch.tensor(thousandths) / 1000, atol=1e-3)
    assert [guess["id"] for guess in event["guesses"]] == [guess.id for guess in sight.guesses]
    [event] = page.look_at(OneModel(model), tokenizer, place | dict(start=18))
    assert len(event["attention"][0][0]) == 2  # no more was read


def test_the_page_is_told_how_likely_given_tokens_were():
    model = make_toy()
    tokenizer = get_tokenizer("bytes")
    place = dict(prompt="The fox", checkpoint="", taken=[65, 66], start=2, end=9)
    [event] = page.read_tokens(OneModel(model), tokenizer, place)
    tokens = [*b"e fox", 65, 66]
    assert [token["id"] for token in event["tokens"]] == tokens[1:]
    for token, logprobs in zip(event["tokens"], rate(model, tokens), strict=True):
        assert token["p"] == pytest.approx(logprobs[token["id"]].exp().item())
        assert len(token["likely"]) == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(start=9), "the text has no tokens from number 9 to 9"),
        (dict(end=99), "the text has no tokens from number 0 to 99"),
        (dict(taken=[300]), "taken must be the ids of tokens"),
    ],
)
def test_a_place_that_is_not_there(changes, message):
    place = dict(prompt="The fox", checkpoint="", taken=[65, 66], start=0, end=9) | changes
    for answer in (page.look_at, page.read_tokens):
        with pytest.raises(ValueError, match=message):
            list(answer(OneModel(make_toy()), get_tokenizer("bytes"), place))
