"""GPT-2: the network, its initial weights and its loss.

The decoder of "Attention Is All You Need" (Vaswani et al. 2017) with the changes of "Language
Models are Unsupervised Multitask Learners" (Radford et al. 2019): LayerNorm before each sub-block
and once more after the last block, learned positions, tanh-GELU, and residual projections that are
initialised smaller in deeper networks.

Letters in shape comments:
    B  sequences in the batch      T  tokens in a sequence     V  vocabulary, PV  vocabulary padded for the matmul
    C  width of the model (n_embd) nh heads (n_head)           hs width of one head (C / nh)
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from parts.loss import HeadLoss


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M."""

    vocab_size: int = 50257  # 50,000 merges + 256 bytes + end of text
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2
    exact_gelu: bool = False  # x Φ(x), as nanoGPT has it, instead of GPT-2's tanh form of it
    flash: bool = True  # fused attention; False writes the (T, T) matrix to memory
    pad_vocab: bool = True  # round the rows of the embedding up to a multiple of 64: 50257 -> 50304
    recompute: bool = False  # in training, recompute each block in the backward pass instead of keeping its activations

    def mistakes(self) -> list[str]:
        """One sentence for each impossible value."""
        sizes = {
            name: getattr(self, name)
            for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        }
        bad = {name: n for name, n in sizes.items() if type(n) is not int or n < 1}
        wrong = [f"{name} is {n!r}: it must be an int of at least 1" for name, n in bad.items()]
        if not wrong and self.n_embd % self.n_head:
            wrong.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        return wrong

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / 64) * 64 if self.pad_vocab else self.vocab_size


class Linear(nn.Linear):
    """nn.Linear without torch's default initial weights, which init_weights would overwrite."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding without torch's default initial weights."""

    def reset_parameters(self) -> None:
        pass


class CausalSelfAttention(nn.Module):
    """Multi-head attention: each token attends to itself and to the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer  # index of this layer in the KV cache
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.flash = config.flash
        self.c_attn = Linear(
            config.n_embd, 3 * config.n_embd, bias=config.bias
        )  # queries, keys and values in one
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, cache=None
    ) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (
            self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        )  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, nh, past + T, hs)
            q = q.to(k.dtype)

        # `is_causal` aligns the first query with the first key, so it is right only while the cache
        # is empty. Behind a filled cache, one token may see all keys (no mask), and several tokens
        # bring a mask.
        is_causal = mask is None and T == k.size(2)
        attention = F.scaled_dot_product_attention if self.flash else attention_spelled_out
        dropout = self.dropout if self.training else 0.0
        y = attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


def attention_spelled_out(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(hs)) v with the (T, T) matrix in memory. The fused kernel computes the
    same without it.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, past + T)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1).to(v.dtype), dropout_p) @ v


class MLP(nn.Module):
    """Each token on its own: out to four times the width, GELU, and back. GPT-2 was trained with
    GELU's tanh form.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.gelu = nn.GELU("none" if config.exact_gelu else "tanh")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention mixes tokens, the MLP transforms each one; both add to a residual stream that no
    norm touches.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, cache=None
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


# OpenAI's four releases. All have 50257 tokens and 1024 positions; heads are 64 wide.
SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


class GPT(nn.Module):
    """The language model. `model(idx)` gives logits, `model(idx, targets)` the mean loss in nats a
    token.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if wrong := config.mistakes():
            raise ValueError("; ".join(wrong))
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=Embedding(config.padded_vocab_size, config.n_embd),
                wpe=Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = (
            self.transformer.wte.weight
        )  # weight tying: one tensor reads tokens in and predicts them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), zero biases, projections into the residual stream divided by
        sqrt(2 n_layer).

        Each block adds two branches to the stream; the division keeps the variance of their sum
        independent of depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("wte.weight"):
                parameter[: self.config.vocab_size].normal_(
                    std=0.02
                )  # the same draws with and without padding
                parameter[self.config.vocab_size :] = 0.0
            elif name.endswith("c_proj.weight"):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)  # LayerNorm's scale

    def hidden(
        self, idx: torch.Tensor, position: torch.Tensor | None = None, mask=None, cache=None
    ) -> torch.Tensor:
        """Token ids (B, T) int64 -> the output of the final LayerNorm (B, T, C).

        Rows are plain text from position 0 unless told otherwise: position (T) or (B, T) says where
        each token stands, mask (B or 1, 1, T, keys) bool which keys it may see, and cache holds the
        keys and values of earlier tokens (inference.KVCache).
        """
        if position is None:
            assert idx.size(1) <= self.config.block_size, (
                f"{idx.size(1)} tokens, {self.config.block_size} positions"
            )
            position = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.config.recompute and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.transformer.ln_f(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V): the dot product of each vector with the embedding of every
        token.
        """
        return self.lm_head(x)[..., : self.config.vocab_size]

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean cross entropy
        in nats a token.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        # autograd.Function.forward always runs without grad mode, so it has to be told whether a
        # backward will follow.
        with_grad = torch.is_grad_enabled()
        return HeadLoss.apply(
            x.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            self.config.vocab_size,
            with_grad,
        )

    # ---- Arithmetic ------------------------------------------------------------------------------

    def num_params(self) -> int:
        """Parameters as papers count them: with positions, the tied head once, without padding
        rows.
        """
        padding_rows = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding_rows * self.config.n_embd

    def flops_per_token(self, T: int) -> int:
        """FLOPs to train on one token in sequences of T: forward and backward, 6 for each parameter
        that multiplies.

        Positions are only added, so they do not count. Attention's two (T, T) products add 12
        n_layer n_embd T, as if nothing were masked: the convention of PaLM (Chowdhery et al. 2022,
        appendix B) and of most reported MFUs.
        """
        multiplying = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * multiplying + 12 * self.config.n_layer * self.config.n_embd * T

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Two groups for the optimizer: matrices and embeddings decay, biases and LayerNorms do
        not.
        """
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        return [
            dict(params=decay, weight_decay=weight_decay),
            dict(params=no_decay, weight_decay=0.0),
        ]

    # ---- Files: pretrained.py knows their formats ------------------------------------------------

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, name: str | Path, **settings) -> "GPT":
        """A model from a run, a GPT-2 folder, a file of nanoGPT or llm.c, or the hub ("gpt2",
        "user/model").

        `settings` are the GPTConfig fields that do not change the function: dropout, flash,
        pad_vocab, recompute. Raises ValueError when the files cannot be had or do not fit.
        """
        from parts import pretrained

        shape, weights = pretrained.read(name)
        model = cls(GPTConfig(**shape, **settings))
        for parameter_name, parameter in model.named_parameters():
            value = weights[parameter_name]
            parameter[: len(value)].copy_(value)  # rows that pad the vocabulary stay zero
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float32) as transformers' GPT2LMHeadModel
        does.
        """
        from parts import pretrained

        pretrained.write(folder, self.config, self.weights())

    def weights(self) -> dict[str, torch.Tensor]:
        """Float32 copies of the parameters on the CPU, without the rows that pad the vocabulary."""
        own = {
            name: parameter.detach() for name, parameter in self.named_parameters()
        }  # the tied head once, as wte
        own["transformer.wte.weight"] = own["transformer.wte.weight"][: self.config.vocab_size]
        return {name: value.to("cpu", torch.float32, copy=True) for name, value in own.items()}


# --------------------------------------------------------------------------------------------------
# The loss. Logits are the largest tensor of all: for 64 x 1,024 tokens of GPT-2 they take 13 GB in
# float32, and autograd would keep several tensors of that size.
