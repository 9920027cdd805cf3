"""GPT-2: the network, its initial weights and its loss.

The decoder of "Attention Is All You Need" (Vaswani et al. 2017) with the changes of "Language
Models are Unsupervised Multitask Learners" (Radford et al. 2019): LayerNorm before each sub-block
and once more after the last block, learned positions, tanh-GELU, and residual projections that are
initialised smaller in deeper networks.

Letters in shape comments:
    B  sequences in the batch      T  tokens in a sequence     V  vocabulary, PV  padded vocabulary
    C  width of the model (n_embd) nh heads (n_head)           hs width of one head (C / nh)

Change it: docs/hacking.md has a dozen ideas as diffs of this file.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from parts.attention import fused_attention
from parts.loss import head_loss

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# More than these would keep any machine busy without end, or take more memory than any has.
LARGEST = dict(vocab_size=2**31, block_size=2**31, n_layer=10_000, n_head=2**20, n_embd=2**20)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M. Each field is a setting of train.py."""

    # ---- The model ----
    vocab_size: int = 50257  # 50,000 merges + 256 bytes + end of text
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width, divisible by n_head
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2
    exact_gelu: bool = False  # x Φ(x), as nanoGPT has it, instead of GPT-2's tanh form of it
    flash: bool = True  # fused attention; False writes the (T, T) matrix to memory
    pad_vocab: bool = True  # round the vocabulary up to a multiple of 64 inside: faster on GPUs
    # Recompute blocks in the backward pass: much less memory, a third more time.
    recompute: bool = False

    def mistakes(self) -> list[str]:
        """One sentence for each impossible value."""
        mistakes = []
        for name in LARGEST:
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= LARGEST[name]:
                mistakes.append(
                    f"{name} is {size!r}: it must be an int from 1 to {LARGEST[name]:,}"
                )
        if not mistakes and self.n_embd % self.n_head != 0:
            mistakes.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            mistakes.append(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        return mistakes

    @property
    def padded_vocab_size(self) -> int:
        if not self.pad_vocab:
            return self.vocab_size
        return math.ceil(self.vocab_size / 64) * 64


# OpenAI's four releases. All have 50257 tokens and 1024 positions; heads are 64 wide.
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


class Linear(nn.Linear):
    """y = x Wᵀ + b. Its initial weights come from GPT.init_weights.

    splits: W is several matrices one below the other, with so many rows each. Muon updates them
    apart.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool, splits: tuple[int, ...] = ()):
        super().__init__(n_in, n_out, bias=bias)
        self.splits = splits or (n_out,)

    def reset_parameters(self) -> None:
        """Not torch's, which GPT.init_weights would overwrite."""


class Embedding(nn.Embedding):
    """A vector for each id. Its initial weights come from GPT.init_weights."""

    def reset_parameters(self) -> None:
        """Not torch's, which GPT.init_weights would overwrite."""


class Layout(NamedTuple):
    """How the tokens of a batch are laid out, for the layers that mix them."""

    position: torch.Tensor  # (T) or (B, T) int64: where each token stands in its text
    mask: torch.Tensor | None = None  # (B or 1, 1, T, keys) bool: what each sees; None: causal
    cache: Any = None  # keys and values of the tokens before these (parts.inference.KVCache)


class CausalSelfAttention(nn.Module):
    """Multi-head attention: each token attends to itself and to the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.layer = layer  # index of this layer in the KV cache
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.flash = config.flash
        # Queries, keys and values in one product.
        self.c_attn = Linear(C, 3 * C, bias=config.bias, splits=(C, C, C))
        self.c_proj = Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if layout.cache is not None:
            k, v = layout.cache.update(self.layer, k, v)  # (B, nh, past + T, hs)
            q = q.to(k.dtype)

        # `is_causal` aligns the first query with the first key, so it is right only while the cache
        # is empty. Behind a filled cache, one token may see all keys (no mask), and several tokens
        # bring a mask.
        is_causal = layout.mask is None and (layout.cache is None or T == k.size(2))
        attention = fused_attention if self.flash else attention_spelled_out
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, attn_mask=layout.mask, dropout_p=dropout, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


def attention_spelled_out(
    q, k, v, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(hs)) v with the (T, T) matrix in memory.

    The fused kernel computes the same without it. (B, nh, T, hs) -> (B, nh, T, hs).
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, past + T)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask  # a bias of one's own, such as ALiBi's
    weights = F.softmax(scores, dim=-1).to(v.dtype)
    return F.dropout(weights, dropout_p) @ v


class MLP(nn.Module):
    """Each token on its own: out to four times the width, GELU, and back.

    GPT-2 was trained with GELU's tanh form.
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
    """Attention mixes tokens, the MLP transforms each one. Both add to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), layout)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The language model.

    `model(idx)` gives logits, `model(idx, targets)` the mean loss in nats a token.
    """

    transformer: Any  # a ModuleDict, whose entries are attributes

    def __init__(self, config: GPTConfig, initialise: bool = True):
        """initialise: False leaves the weights as memory holds them, for `pretrained.load`."""
        super().__init__()
        mistakes = config.mistakes()
        if mistakes:
            raise ValueError("; ".join(mistakes))
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
        # Weight tying: one matrix reads tokens in and predicts them.
        self.lm_head.weight = self.transformer.wte.weight
        if initialise:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), zero biases, smaller projections into the residual stream.

        Each block adds two branches to the stream. Dividing their projections by sqrt(2 n_layer)
        keeps the variance of the sum independent of depth. All else, LayerNorms and parameters of
        one's own, stays as it was made.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                # The same draws with and without padding.
                real_rows = module.weight[: self.config.vocab_size]
                real_rows.normal_(std=0.02)
                module.weight[len(real_rows) :] = 0.0
            elif isinstance(module, nn.Linear) and module.weight is not self.transformer.wte.weight:
                std = 0.02
                if name.endswith("c_proj"):
                    std /= math.sqrt(2 * self.config.n_layer)
                module.weight.normal_(std=std)
                if module.bias is not None:
                    module.bias.zero_()

    def hidden(
        self,
        idx: torch.Tensor,
        position: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        """Token ids (B, T) int64 -> the output of the final LayerNorm (B, T, C).

        Rows are plain text from position 0 unless told otherwise: see Layout.
        """
        if position is None:
            T = idx.size(1)
            assert T <= self.config.block_size, f"{T} tokens, {self.config.block_size} positions"
            position = torch.arange(T, device=idx.device)
        layout = Layout(position, mask, cache)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.config.recompute and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
        return self.transformer.ln_f(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V): the dot product of each vector with every token's embedding."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, T) int64 -> logits (B, T, V).

        With targets (B, T) int64, the mean cross entropy in nats a token instead.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        # F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten()), in less memory
        return head_loss(x, self.lm_head.weight, targets, self.config.vocab_size)

    # ---- Arithmetic ------------------------------------------------------------------------------

    def use_flash(self, flash: bool) -> None:
        """Fused attention, or the (T, T) matrix in memory, in all blocks from now on."""
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                module.flash = flash

    def num_params(self) -> int:
        """Parameters as papers count them: with positions, the tied head once, without padding."""
        padding_rows = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding_rows * self.config.n_embd

    def flops_per_token(self, T: int) -> int:
        """FLOPs to train on one token in sequences of T: forward and backward pass.

        6 for each parameter that multiplies, which embeddings do only where they are the head.
        Attention's two (T, T) products add 12 n_layer n_embd T, as if nothing were masked: the
        convention of PaLM (Chowdhery et al. 2022, appendix B) and of most reported MFUs.
        """
        multiplying = self.num_params()
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.weight is not self.lm_head.weight:
                multiplying -= module.weight.numel()
        return 6 * multiplying + 12 * self.config.n_layer * self.config.n_embd * T

    # ---- Files: parts/pretrained.py knows their formats ------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings) -> "GPT":
        """A model from a checkpoint, a GPT-2 folder, a file of nanoGPT or llm.c, or the hub.

        `settings` are fields of GPTConfig that the files do not decide, such as dropout. Raises
        ValueError when the files cannot be had or do not fit.
        """
        from parts import pretrained

        stored = pretrained.read(name)
        model = cls(pretrained.make_config(GPTConfig, stored, settings), initialise=False)
        pretrained.load(model, stored)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face GPT-2, or with its own tensors if it is not a GPT-2."""
        from parts import pretrained

        departure = pretrained.departure_from_gpt2(self)
        # The last id, as in GPT-2's tokenizer.
        end_of_text = self.config.vocab_size - 1
        pretrained.write(Path(folder), pretrained.copy_state(self, departure), end_of_text)


class OpenedModel(NamedTuple):
    model: GPT  # float32, on the CPU
    tokenizer: Any  # parts.tokenizer.Tokenizer
    source: Path  # what was opened: of a run, its newest checkpoint


def open_model(name: str | Path, **settings) -> OpenedModel:
    """A model of any name, see GPT.from_pretrained, with the tokenizer that lies beside it."""
    from parts import pretrained
    from parts.tokenizer import tokenizer_of_model

    source = pretrained.resolve(name)
    stored = pretrained.read(source)
    vocab_size = stored.config["vocab_size"]
    tokenizer = tokenizer_of_model(stored.path, vocab_size, stored.tokenizer_folders)
    if tokenizer.vocab_size < vocab_size:
        stored = pretrained.drop_rows(stored, tokenizer.vocab_size)
    model = GPT(pretrained.make_config(GPTConfig, stored, settings), initialise=False)
    pretrained.load(model, stored)
    return OpenedModel(model, tokenizer, Path(source))


if __name__ == "__main__":
    raise SystemExit("model.py is no command: README.md lists the commands")
