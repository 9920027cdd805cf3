"""What a model saw at a place of a text: where its attention went, what it would have said after
each block, and how likely it found the tokens that were there already.

model.py may have been changed. So nothing here knows how it computes: attention is read from the
calls that compute it, the blocks' outputs are read behind the blocks, and both are compared with
what the model made of them. What does not fit is not shown.
"""

if __name__ == "__main__":
    raise SystemExit("parts/look.py is no command: README.md lists the commands")

import math
from typing import Any, NamedTuple

from parts import GPT
from parts.inference import device_of
from parts.runtime import changing_shapes

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Rows of logits at a time: those of a whole context would be 200 MB with GPT-2's vocabulary.
ROWS = 64

NO_ATTENTION = "this model.py computes attention in a way that the page cannot read"
NO_BLOCKS = "the head of this model.py does not read what its blocks write, so nothing is shown"


class Guess(NamedTuple):
    """The likeliest token after a block."""

    id: int
    p: float


class Sight(NamedTuple):
    """What a model saw before it wrote a token."""

    attention: list[torch.Tensor]  # of each layer, (nh, T): the weights of the T tokens before
    guesses: list[Guess]  # after each block; the last one is what the model says
    missing: list[str]  # a sentence for each of the two that cannot be shown


@torch.no_grad()
def look(model: GPT, ids: list[int]) -> Sight:
    """What the model saw when it predicted the token behind these: at least one, at most its
    context.
    """
    idx = torch.tensor([ids], device=device_of(model))
    blocks = find_blocks(model)
    outputs: list[Any] = []
    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_hook(lambda _, inputs, output: outputs.append(output)))
    recorder = AttentionRecorder(len(ids))
    try:
        with changing_shapes(idx.device), recorder:
            x = model.hidden(idx)
    finally:
        for hook in hooks:
            hook.remove()
    missing = []
    attention = recorder.layers
    # Of a layer that mixes two attentions, neither is where it looked.
    is_one_a_block = len(attention) == len(blocks) or not blocks
    if not attention or not recorder.is_whole or not is_one_a_block:
        attention = []
        missing.append(NO_ATTENTION)
    guesses = guess_after_blocks(model, outputs, model.logits(x[:, -1]))
    if not guesses:
        missing.append(NO_BLOCKS)
    return Sight(attention, guesses, missing)


def find_blocks(model: GPT) -> list[torch.nn.Module]:
    """The blocks in their order; none if the model has no `transformer.h` and no `ln_f`."""
    transformer = getattr(model, "transformer", None)
    blocks = getattr(transformer, "h", None)
    if not isinstance(blocks, torch.nn.ModuleList) or not hasattr(transformer, "ln_f"):
        return []
    return list(blocks)


def guess_after_blocks(model: GPT, outputs: list[Any], logits: torch.Tensor) -> list[Guess]:
    """What the head makes of each block's output (1, T, C) at its last token: the "logit lens"
    (nostalgebraist, 2020).

    logits (1, V): the model's own. The last block must give the same; none are returned otherwise.
    """
    guesses = []
    last = None
    for output in outputs:
        # A block may hand on more than the residual stream.
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            return []
        last = model.logits(model.transformer.ln_f(x[:, -1]))
        p, best = last.float().softmax(dim=-1).max(dim=-1)
        guesses.append(Guess(int(best), float(p)))
    if last is None or not is_close(last, logits):
        return []
    return guesses


@torch.no_grad()
def rate(model: GPT, ids: list[int]) -> list[torch.Tensor]:
    """The log-probabilities (V), in nats, from which each token of a text but the first was chosen.

    The text has at most as many tokens as the model's context.
    """
    idx = torch.tensor([ids], device=device_of(model))
    with changing_shapes(idx.device):
        x = model.hidden(idx)[0, :-1]  # (T - 1, C)
    rows: list[torch.Tensor] = []
    for part in x.split(ROWS):
        rows += model.logits(part).float().log_softmax(dim=-1)
    return rows


# ---- Attention -----------------------------------------------------------------------------------


class AttentionRecorder(TorchFunctionMode):
    """Within it, each layer's attention weights of the last token are kept in `layers`.

    They come from the queries and keys of torch's fused attention, or from the softmax over a
    (T, T) matrix where attention is spelled out.
    """

    def __init__(self, n_tokens: int):
        super().__init__()
        self.n_tokens = n_tokens
        self.layers: list[torch.Tensor] = []  # (nh, T) each
        self.is_whole = True  # no layer's weights differ from what it computed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # In here, the mode is off.
        if func is F.scaled_dot_product_attention:
            self.record_fused(result, *args, **kwargs)
        elif getattr(func, "__name__", "") == "softmax":
            self.record_spelled_out(result)
        return result

    def record_fused(
        self,
        result: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """The weights that F.scaled_dot_product_attention has not kept, computed once more for the
        last query: it may see all keys, unless a mask says otherwise.
        """
        n_heads = query.size(-3)
        if enable_gqa:
            key = key.repeat_interleave(n_heads // key.size(-3), dim=-3)
            value = value.repeat_interleave(n_heads // value.size(-3), dim=-3)
        if scale is None:
            scale = 1 / math.sqrt(query.size(-1))
        scores = scale * query[..., -1:, :].float() @ key.float().transpose(-2, -1)  # (1, nh, 1, T)
        if attn_mask is not None:
            last = attn_mask[..., -1:, :]
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~last, float("-inf"))
            else:
                scores = scores + last
        weights = scores.softmax(dim=-1)
        self.is_whole &= is_close(weights @ value.float(), result[..., -1:, :])
        self.append(weights)

    def record_spelled_out(self, weights: torch.Tensor) -> None:
        if weights.dim() == 4 and weights.shape[-2:] == (self.n_tokens, self.n_tokens):
            self.append(weights[..., -1:, :])

    def append(self, weights: torch.Tensor) -> None:
        """weights: (1, nh, 1, T)."""
        if weights.shape[-1] != self.n_tokens or weights.dim() != 4:
            self.is_whole = False
            return
        self.layers.append(weights[0, :, 0].float().cpu())


def is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are equal but for the rounding of the coarser dtype."""
    if a.shape != b.shape:
        return False
    tolerance = 1e-3 if a.dtype == b.dtype == torch.float32 else 5e-2
    scale = b.float().abs().max().item() + 1e-9
    return bool(((a.float() - b.float()).abs() <= tolerance * scale).all())
