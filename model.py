"""GPT-2, whole: the network, its initialisation, the KV cache, generation, and Hugging Face folders in and out.

The network is the decoder of "Attention Is All You Need" (Vaswani et al. 2017) with the changes of "Language Models
are Unsupervised Multitask Learners" (Radford et al. 2019): LayerNorm moved in front of each sub-block, one more after
the last block, learned positions, tanh-GELU, and residual projections initialised smaller the deeper the network is.

Letters in shape comments:
    B  sequences in the batch      T  tokens in a sequence     V  vocabulary, PV  vocabulary padded for the matmul
    C  width of the model (n_embd) nh heads (n_head)           hs width of one head (C / nh)
"""

import difflib
import json
import math
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# OpenAI's four releases. All have 50257 tokens and 1024 positions; heads are 64 wide.
SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


# Where Hugging Face folders have their weights, the best first: whole, in parts, and the same as pickles.
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M."""

    vocab_size: int = 50257  # 50,000 merges + 256 bytes + end of text
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has
    flash: bool = True  # fused attention; False spells it out, to see what it costs
    pad_vocab: bool = True  # round the embedding's rows up to a multiple of 64: 50257 -> 50304
    recompute: bool = False  # in training, compute a block again for its gradient instead of keeping all of it

    def mistakes(self) -> list[str]:
        """What is wrong with this shape, one sentence each; empty when it can be built."""
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        wrong = [
            f"{name} is {getattr(self, name)!r}, not an int" for name in sizes if type(getattr(self, name)) is not int
        ]
        if wrong:
            return wrong
        wrong = [f"{name} is {getattr(self, name)}: it must be at least 1" for name in sizes if getattr(self, name) < 1]
        if not wrong and self.n_embd % self.n_head:
            heads = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            fitting = sorted(sorted(heads, key=lambda n: abs(n - self.n_head))[:3])
            wrong.append(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: n_head could be "
                + ", ".join(map(str, fitting))
            )
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        return wrong

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / 64) * 64 if self.pad_vocab else self.vocab_size


# ----------------------------------------------------------------------------------------------------------------------
# The network


class KVCache:
    """Keys and values of all tokens seen so far, so that generating a token costs one token's work.

    Room for `capacity` tokens is taken at the first use of each layer, in `dtype` or else the one the layer computes
    in. Prompts of different lengths are aligned at their right ends: `pad[b]` says how many columns at the left of row
    b hold nothing.
    """

    def __init__(self, n_layer: int, capacity: int, pad: torch.Tensor | None = None, dtype: torch.dtype | None = None):
        self.capacity = capacity
        self.dtype = dtype
        self.length = 0  # columns filled; the same in every layer between two forward passes
        self.pad = pad  # (B,) int64, or None when all rows start at column 0
        self.layers = [None] * n_layer  # each (2, B, nh, capacity, hs): keys and values
        self.column = None  # (1,) int64 on the device: see OneToken

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k and v (B, nh, T, hs) behind the filled columns; return all the layer has (B, nh, past + T, hs)."""
        B, nh, T, hs = k.shape
        if self.layers[layer] is None:
            # Zeros, because behind a mask, too, 0 x NaN would be NaN.
            self.layers[layer] = k.new_zeros(2, B, nh, self.capacity, hs, dtype=self.dtype)
        if self.column is not None:
            self.layers[layer][0].index_copy_(2, self.column, k)
            self.layers[layer][1].index_copy_(2, self.column, v)
            return self.layers[layer][0], self.layers[layer][1]
        stored = self.layers[layer][:, :, :, : self.length + T]  # a view
        stored[0, :, :, self.length :] = k
        stored[1, :, :, self.length :] = v
        return stored[0], stored[1]

    def positions(self, T: int, device: torch.device) -> torch.Tensor:
        """Positions of the next T tokens: (T) when all rows are aligned at the left, else (B, T)."""
        column = torch.arange(self.length, self.length + T, device=device)
        return column if self.pad is None else (column - self.pad[:, None]).clamp(min=0)

    def mask(self, T: int, device: torch.device) -> torch.Tensor | None:
        """Which columns each of the next T tokens may look at, (B or 1, 1, T, past + T) bool; None if plain causal."""
        if self.pad is None and (self.length == 0 or T == 1):
            return None
        query = torch.arange(self.length, self.length + T, device=device)[:, None]
        key = torch.arange(self.length + T, device=device)[None, :]
        mask = (key <= query)[None]
        if self.pad is not None:
            # An empty column must see something, or its softmax is 0/0 and the NaN spreads: it may see itself.
            mask = mask & (key >= self.pad[:, None, None]) | (key == query)
        return mask[:, None]


class OneToken:
    """The forward pass of one token for each row, behind a filled cache, as a CUDA graph.

    A small model's token is some 200 kernels that take less time to run than Python takes to launch them; a graph
    launches them all at once. It does the same work on the same memory each time, so it computes over the whole
    capacity of the cache, with a mask over what is not filled, and reads from a tensor which column is next.
    """

    def __init__(self, model: "GPT", cache: KVCache, B: int):
        device = model.transformer.wte.weight.device
        self.model, self.cache, self.graph = model, cache, None
        self.idx = torch.zeros(B, 1, dtype=torch.int64, device=device)
        cache.column = torch.zeros(1, dtype=torch.int64, device=device)

    def forward(self) -> torch.Tensor:
        """self.idx (B, 1) at cache.column -> logits (B, PV). As often as one likes: it writes the same column again."""
        column, pad = self.cache.column, self.cache.pad
        key = torch.arange(self.cache.capacity, device=column.device)
        position, mask = column[None], (key <= column)[None]  # (1, 1), (1, capacity)
        if pad is not None:
            position, mask = column - pad[:, None], mask & (key >= pad[:, None])  # (B, 1), (B, capacity)
        return self.model.padded_logits(
            self.model.hidden(self.idx, self.cache, layout=(position, mask[:, None, None]))[:, -1]
        )

    def capture(self) -> None:
        # What kernels set up at their first calls must not be recorded, hence some calls before, on a stream of theirs.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.forward()

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """The next token of each row (B, 1) -> logits (B, PV)."""
        self.idx.copy_(idx)
        self.cache.column.fill_(self.cache.length)
        self.cache.length += 1
        if not self.idx.is_cuda:  # nothing to capture, but the same arithmetic
            return self.forward()
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self.logits.clone()  # as the next call overwrites them


# Fewer tokens than this are done before a graph is captured.
GRAPH_FROM = 32


@dataclass(frozen=True)
class Step:
    """One new token for each row of a batch."""

    tokens: list[int | None]  # None where a row has ended
    logits: torch.Tensor  # (B, V) float32, from which they were chosen: before penalty, temperature and the rest


class Linear(nn.Linear):
    """Without initial weights: `init_weights` draws GPT-2's, and drawing torch's first would take as long again."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self) -> None:
        pass


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer  # this attention's place in the cache
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.flash = config.flash
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None, mask: torch.Tensor | None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, nh, past + T, hs)
            q = q.to(k.dtype)

        # `is_causal` aligns queries with the first keys. That is right for an empty cache only: behind a filled one, a
        # single token may see everything and several come with a mask.
        is_causal = mask is None and T == k.size(2)
        attention = F.scaled_dot_product_attention if self.flash else attention_spelled_out
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


def attention_spelled_out(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(hs)) v with the (T, T) matrix in memory: what the fused kernel computes without it."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, past + T)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1).to(v.dtype), dropout_p) @ v


class PackedLinear(nn.Module):
    """nn.Linear for inference only: weights in the dtype of the product, and on a CPU in the order oneDNN reads them.

    F.linear gets them row by row and has to rearrange all of them for each product, which for the few rows of a
    token costs as much as the product. oneDNN's way in is one that torch.compile uses, as torch has no other.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.blocked = weight.device.type == "cpu" and dtype == torch.bfloat16 and onednn_multiplies_bf16()
        weight = weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.blocked else weight
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype)
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def onednn_multiplies_bf16() -> bool:
    ops = torch.ops.mkldnn
    has_ops = all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    )
    return torch.backends.mkldnn.is_available() and has_ops and ops._is_mkldnn_bf16_supported()


class MLP(nn.Module):
    """Each token on its own: out to four times the width, tanh-GELU (the form GPT-2 was trained with), and back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Tokens talk to each other, then think for themselves; both are added to a residual stream kept clean of norms."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """The head's matmul and the mean cross entropy behind it, in nats: F.cross_entropy(x Wᵀ + b, targets).

    Logits are the largest tensor of all: GPT-2's for 64 x 1024 tokens take 13 GB in float32, and autograd would keep
    several such. But the gradient of the loss with respect to them, softmax(logits) - one_hot(targets), is known as
    soon as they are. So some rows at a time are turned into it in place, multiplied on, and forgotten.
    """

    ROWS = 8192  # of logits at once, 0.8 GB in bf16
    IN_CACHE = 6_500_000  # bytes of them in float32 at once, on a CPU: 32 rows of GPT-2's

    @staticmethod
    def forward(ctx, x, weight, bias, targets) -> torch.Tensor:
        """x (N, C), weight (PV, C), bias (PV) or None, targets (N) -> the mean loss, float32."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):  # the dtypes are all said here
            low, w, b = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            total = torch.zeros((), device=x.device)
            with_grad = any(ctx.needs_input_grad)
            grad_x, grad_w = torch.empty_like(low), None
            for first in range(0, len(low), HeadLoss.ROWS):
                rows = slice(first, first + HeadLoss.ROWS)
                logits = F.linear(low[rows], w, b)  # (rows, PV)
                total = total + summed_loss(logits, targets[rows])  # which makes their gradient of them
                if with_grad:
                    grad_x[rows] = logits @ w
                    piece = logits.t() @ low[rows]
                    grad_w = piece.float() if grad_w is None else grad_w.add_(piece)
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w)
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad_loss / len(grad_x)
        return grad_x.float() * scale, grad_w * scale, None, None


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropies of logits (N, PV), float32; the logits are overwritten by its gradient."""
    in_slices = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, HeadLoss.IN_CACHE // (4 * logits.size(1))) if in_slices else len(logits)
    total = torch.zeros((), device=logits.device)
    for some, target in zip(logits.split(rows), targets[:, None].split(rows)):
        log_p = F.log_softmax(some, dim=-1, dtype=torch.float32)
        total = total - log_p.gather(1, target).sum()
        some.copy_(log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32)))
    return total


class GPT(nn.Module):
    """The language model. `model(idx)` gives logits, `model(idx, targets)` the mean loss in nats a token."""

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
        self.lm_head.weight = self.transformer.wte.weight  # what reads a token in also predicts it: one tensor

        # Rows that only round the vocabulary up get a logit of -inf here, added inside the matmul: softmax gives them
        # nothing, so they take no part in the loss, have no gradient and are never sampled.
        padding = torch.zeros(config.padded_vocab_size)
        padding[config.vocab_size :] = float("-inf")
        self.register_buffer("padding", padding if config.pad_vocab else None, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), zero biases, projections into the residual stream divided by sqrt(2 n_layer).

        Each block adds two branches to the stream; that division keeps the variance of their sum independent of depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("wte.weight"):
                parameter[: self.config.vocab_size].normal_(std=0.02)  # padding or not, the same draws
                parameter[self.config.vocab_size :] = 0.0
            elif name.endswith("c_proj.weight"):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)  # LayerNorm's scale

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None, layout=None) -> torch.Tensor:
        """Token ids (B, T) -> the final LayerNorm's output (B, T, C). With a cache, idx continues what it holds.

        A row need not be one text: layout = (position (B, T), mask (B, 1, T, T) bool) says where each token stands and
        which tokens it may see.
        """
        T = idx.size(1)
        past = cache.length if cache else 0
        if layout:
            position, mask = layout
        else:
            assert past + T <= self.config.block_size, f"{past + T} tokens, but {self.config.block_size} positions"
            position = cache.positions(T, idx.device) if cache else torch.arange(T, device=idx.device)
            mask = cache.mask(T, idx.device) if cache else None

        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.config.recompute and self.training:
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        if cache and not layout:
            cache.length += T
        return self.transformer.ln_f(x)

    def padded_logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., PV): dot product of each vector with every token's embedding; -inf in the padding."""
        if self.is_packed:
            return self.lm_head(x)
        return F.linear(x, self.lm_head.weight, self.padding)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean cross entropy in nats a token."""
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.padded_logits(x)[..., : self.config.vocab_size]
        if self.is_packed:  # to evaluate, as it learns no more
            return F.cross_entropy(self.padded_logits(x).flatten(0, 1).float(), targets.flatten())
        return HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, self.padding, targets.flatten())

    # ------------------------------------------------------------------------------------------------------------------
    # Arithmetic

    def num_params(self) -> int:
        """Parameters as papers count them: positions included, the tied head once, padding rows not at all."""
        padding_rows = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding_rows * self.config.n_embd

    def flops_per_token(self, T: int) -> int:
        """FLOPs to train on one token in sequences of T: forward and backward, 6 for each parameter that multiplies.

        Positions are only added, so they do not count. Attention's two (T, T) products add 12 n_layer n_embd T, as if
        nothing were masked: the convention of PaLM (Chowdhery et al. 2022, appendix B) and of most reported MFUs.
        """
        multiplying = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * multiplying + 12 * self.config.n_layer * self.config.n_embd * T

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Two groups for the optimizer: matrices and embeddings decay, biases and LayerNorms do not."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        return [dict(params=decay, weight_decay=weight_decay), dict(params=no_decay, weight_decay=0.0)]

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    def pack(self, dtype: torch.dtype) -> "GPT":
        """Make this a model for inference only, with its matrix products in dtype, as under autocast but ready-made.

        Returns itself. It can be moved, trained and saved no more.
        """
        for block in self.transformer.h:
            for part in (block.attn, block.mlp):
                for name, linear in part.named_children():
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, PackedLinear(linear.weight, linear.bias, dtype))
        self.lm_head = PackedLinear(self.lm_head.weight, self.padding, dtype)
        return self

    @property
    def is_packed(self) -> bool:
        return isinstance(self.lm_head, PackedLinear)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, seeds=None, stop_token=None, repetition_penalty=1.0, **sampling):
        """Continue each prompt (a list of token ids); yield a Step for each new token.

        seeds                one for each prompt: a row's text depends on its own, not on the rows beside it (but in
                             bf16 a batch of another shape rounds otherwise, and near ties fall otherwise)
        stop_token           a row ends with this id (end of text, usually)
        repetition_penalty   see `penalize`; 1 is none
        sampling             temperature, top_k, top_p, min_p: see `sample`

        The context of a token is the block_size tokens before it. A prompt that is empty or longer is a ValueError, and
        so are weights that give no numbers.
        """
        block_size, device = self.config.block_size, self.transformer.wte.weight.device
        for prompt in prompts:
            if not 0 < len(prompt) <= block_size:
                raise ValueError(f"a prompt of {len(prompt)} tokens: this model takes 1 to {block_size}; shorten it")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]  # always the CPU's

        rows, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
        seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool)  # (B, V)
        seen = torch.stack([mask.index_fill(0, torch.tensor(row), True) for mask, row in zip(seen, rows)]).to(device)
        cache, step, was_training = None, None, self.training
        as_graph = self.is_packed and device.type == "cuda" and max_new_tokens >= GRAPH_FROM
        self.eval()
        try:
            for _ in range(max_new_tokens):
                # 1. Compute what the cache lacks: the last tokens, or, at first and when it is full, all that is seen.
                # Positions are learned, so once the window slides every cached key stands at a wrong one.
                if cache is None or cache.length == block_size:
                    idx, pad = align_right([row[-block_size:] for row in rows])
                    cache = self.new_cache(idx.size(1) + max_new_tokens, pad.to(device))
                    logits = self.padded_logits(self.hidden(idx.to(device), cache)[:, -1])  # (B, PV)
                    step = OneToken(self, cache, len(rows)) if as_graph else None  # new memory, new graph
                else:
                    idx = torch.tensor([row[-1:] for row in rows]).to(device)
                    logits = step(idx) if step else self.padded_logits(self.hidden(idx, cache)[:, -1])  # (B, PV)

                # 2. Choose, 3. remember, 4. hand over.
                draws = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(device)  # (B)
                logits = numbers(logits[:, : self.config.vocab_size].float())
                chosen = sample(penalize(logits, seen, repetition_penalty), draws, **sampling)  # (B)
                seen.scatter_(1, chosen[:, None], True)
                chosen = chosen.tolist()
                for row, token in zip(rows, chosen):
                    row.append(token)
                yield Step([None if done else token for done, token in zip(ended, chosen)], logits)
                ended = [done or token == stop_token for done, token in zip(ended, chosen)]
                if all(ended):
                    return
        finally:
            self.train(was_training)

    def new_cache(self, capacity: int, pad: torch.Tensor) -> KVCache:
        # A CPU's fused attention takes a single query three times as long over keys in bf16 as in float32. (Under
        # autocast it would cast all of them at each token.)
        dtype = torch.float32 if self.is_packed and pad.device.type == "cpu" else None
        capacity = min(self.config.block_size, capacity)
        return KVCache(self.config.n_layer, capacity, pad if pad.any() else None, dtype)

    def generate(self, prompts, max_new_tokens, **options) -> list[list[int]]:
        """The continuations that `stream` yields, whole: one list of new token ids for each prompt."""
        steps = [step.tokens for step in self.stream(prompts, max_new_tokens, **options)]
        return [[tokens[b] for tokens in steps if tokens[b] is not None] for b in range(len(prompts))]

    # ------------------------------------------------------------------------------------------------------------------
    # Hugging Face folders

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings) -> "GPT":
        """A model from a folder or, where no such folder exists, from the Hugging Face hub ("gpt2", "user/model").

        Any GPT2LMHeadModel will do, and nanoGPT's ckpt.pt. `settings` are GPTConfig fields that do not change the
        function: dropout, flash, pad_vocab, recompute. Raises ValueError when the files cannot be had or do not fit.
        """
        name = resolve(name)
        if Path(name).is_file():
            return cls.from_nanogpt(Path(name), **settings)
        config_file, weights_file = locate(name, "config.json"), locate(name, *WEIGHTS_FILES)
        model = cls(read_config(config_file, **settings))
        if weights_file.suffix == ".json":  # large models come in parts, with a list of which tensor is where
            try:
                parts = sorted(set(json.loads(weights_file.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{weights_file}: not a list of parts ({type(error).__name__}: {error})") from None
            state = {name_: tensor for part in parts for name_, tensor in read_weights(locate(name, part)).items()}
        else:
            state = read_weights(weights_file)
        model.load_hf_state(state, source=weights_file)
        return model

    @classmethod
    def from_nanogpt(cls, file: Path, **settings) -> "GPT":
        """A model from nanoGPT's ckpt.pt. (nanoGPT computes the exact GELU where GPT-2, and so this, has tanh's.)"""
        checkpoint = read_weights(file)
        try:
            shape, state = dict(checkpoint["model_args"]), dict(checkpoint["model"])
            shape = {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")} | {
                "bias": shape.get("bias", True)
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: not a checkpoint of nanoGPT ({type(error).__name__}: {error}); a file of weights alone wants "
                "its folder, with config.json"
            ) from None
        if shape["vocab_size"] == 50304:  # GPT-2's, rounded up
            shape["vocab_size"] = 50257
        model = cls(GPTConfig(**shape, **settings))
        state = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        state.pop("lm_head.weight", None)  # the same tensor as the embedding
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                tensor = tensor[: shape["vocab_size"]] if name.endswith("wte.weight") else tensor
                state[name] = tensor.t() if is_conv1d(name) else tensor
        model.load_hf_state(state, source=file)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float32) as transformers' GPT2LMHeadModel does."""
        self.write_pretrained(folder, self.config, self.hf_state())

    @staticmethod
    def write_pretrained(folder: str | Path, config: GPTConfig, state: dict[str, torch.Tensor]) -> None:
        """The same from an `hf_state` taken earlier."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets nobody else read it

    def hf_state(self) -> dict[str, torch.Tensor]:
        """Copies of our parameters, on the CPU, with transformers' names and orientation; biases we lack are zeros."""
        state = {}
        for name, parameter in self.named_parameters():  # the tied head stands once, as wte
            value = parameter.detach().to("cpu", torch.float32, copy=True)
            if name.endswith("wte.weight"):
                value = value[: self.config.vocab_size]
            state[name] = (value.t() if is_conv1d(name) else value).contiguous()
            if not self.config.bias and not name.endswith(("wte.weight", "wpe.weight")):
                out_features = parameter.size(0)
                state[name.removesuffix("weight") + "bias"] = torch.zeros(out_features)
        return state

    @torch.no_grad()
    def load_hf_state(self, state: dict[str, torch.Tensor], source: str | Path = "the state") -> None:
        """The inverse of `hf_state`; also takes the hub's names without the leading "transformer."."""
        tensors = isinstance(state, dict) and all(
            isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items()
        )
        if not tensors:
            raise ValueError(f"{source}: not a table of names and tensors; is it a whole GPT-2 checkpoint?")
        state = {
            ("" if n.startswith(("transformer.", "lm_head.")) else "transformer.") + n: t for n, t in state.items()
        }
        # Old files carry attention's triangle of ones as buffers, and some the tied head a second time.
        state = {n: t for n, t in state.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
        head, embedding = state.pop("lm_head.weight", None), state.get("transformer.wte.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise ValueError(f"{source}: lm_head differs from the token embedding; GPT-2 shares one matrix for both")

        for name, parameter in self.named_parameters():
            if name not in state:
                raise ValueError(f"{source}: the tensor {name} is missing; is it a whole GPT-2 checkpoint?")
            value = state.pop(name)
            value = value.t() if is_conv1d(name) else value
            own = parameter[: self.config.vocab_size] if name.endswith("wte.weight") else parameter
            if value.shape != own.shape:
                raise ValueError(
                    f"{source}: {name} has the shape {tuple(value.shape)}, but config.json makes it {tuple(own.shape)}"
                )
            own.copy_(value)
        leftover = [n for n, t in state.items() if self.config.bias or not n.endswith("bias") or t.any()]
        if leftover:
            raise ValueError(f"{source}: {leftover[0]} has no place in this model ({len(leftover)} such tensors)")


# ----------------------------------------------------------------------------------------------------------------------
# Pure functions of the parts above


def align_right(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> (B, longest) with zeros at the left of the shorter ones, and how many zeros each row has."""
    longest = max(map(len, rows))
    idx = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return idx, torch.tensor([longest - len(row) for row in rows])


def numbers(logits: torch.Tensor) -> torch.Tensor:
    if logits.isnan().any():
        raise ValueError("the model's logits are not numbers: it is damaged, or its training diverged")
    return logits


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that stand in the text already less likely (CTRL, Keskar et al. 2019, section 4.1).

    logits (B, V), seen (B, V) bool -> (B, V): divided by the penalty where positive, else multiplied by it.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def restrict(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Logits (B, V) with -inf for all tokens but those that each of the three keeps, one after the other.

    top_k   the k likeliest; 0 keeps all
    top_p   the fewest that together have this probability (the nucleus of Holtzman et al. 2019); 1 keeps all
    min_p   those with at least this share of the likeliest one's probability (Nguyen et al. 2024); 0 keeps all
    """
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        p = F.softmax(sorted_logits, dim=-1)
        out = p.cumsum(dim=-1) - p >= top_p  # those that likelier ones make up top_p without
        out[:, 0] = False  # the likeliest stays, whatever top_p
        logits = logits.masked_fill(out.gather(1, order.argsort(dim=-1)), float("-inf"))
    if min_p > 0:
        least = logits.max(dim=-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits


def sample(
    logits: torch.Tensor, draw: torch.Tensor, temperature: float = 1.0, top_k=0, top_p=1.0, min_p=0.0
) -> torch.Tensor:
    """One token for each row: logits (B, V) and one uniform number in [0, 1) for each row (B,) -> ids (B,).

    temperature divides the logits, and 0 takes the likeliest always; for the others see `restrict`. The draw is turned
    into a token by inverting the cumulative distribution, so a row's token depends on nothing but its own logits and
    its own number.
    """
    if temperature < 1e-6:  # so close to 0 that only the likeliest is left
        return logits.argmax(dim=-1)
    logits = restrict(logits / temperature, top_k, top_p, min_p)
    cdf = F.softmax(logits, dim=-1).cumsum(dim=-1)  # (B, V), rising only at tokens with some probability
    # The first token whose cumulative probability exceeds the draw's share of the total (rounded, it need not be 1).
    return torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True).squeeze(-1)


def is_conv1d(name: str) -> bool:
    """GPT-2's linear layers were written as Conv1D: their files hold (in, out) where nn.Linear has (out, in)."""
    return name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))


def hf_config(config: GPTConfig) -> dict:
    """GPTConfig -> what transformers expects in config.json."""
    end_of_text = config.vocab_size - 1  # in both of our tokenizers, as in GPT-2's
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "bias": config.bias,  # ours: False means that the file's biases are all zero
    }


def read_config(file: Path, **settings) -> GPTConfig:
    """config.json -> GPTConfig. What GPT-2 can be told to do differently and we do not is a ValueError."""
    try:
        hf = json.loads(Path(file).read_text())
        shape = dict(vocab_size=hf["vocab_size"], block_size=hf["n_positions"])
        shape |= {name: hf[name] for name in ("n_layer", "n_head", "n_embd")}
        if not all(type(size) is int for size in shape.values()):
            raise TypeError(f"sizes are not integers: {shape}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the config.json of a GPT-2 ({type(error).__name__}: {error})") from None
    expected = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for name, value in expected.items():
        if hf.get(name, value) not in (value, 4 * hf["n_embd"] if name == "n_inner" else value):
            raise ValueError(f"{file}: {name} is {hf[name]!r}; this model is GPT-2 with {value!r} only")
    config = GPTConfig(**shape, bias=hf.get("bias", True), **settings)
    if wrong := config.mistakes():
        raise ValueError(f"{file}: " + "; ".join(wrong))
    return config


def read_weights(file: Path) -> dict:
    """The tensors of a .safetensors file, or the content of a pickled one, of which nothing is executed."""
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if not needs:
            raise ValueError(f"{file}: not a file of weights, or damaged") from None
        hint = ""
        if needs[1] == "__main__.GPTConfig":  # build-nanogpt's
            hint = (
                ". If you trust it, this makes plain.pt of it, which can be read: python -c 'import torch; GPTConfig = "
                f'type("GPTConfig", (), {{}}); c = torch.load("{file}", weights_only=False); '
                'torch.save(dict(model=c["model"], model_args=vars(c["config"])), "plain.pt")\''
            )
        raise ValueError(
            f"{file}: needs the pickled object {needs[1]}; unpickling could run code, so it is refused{hint}"
        ) from None
    except Exception as error:  # torch raises half a dozen types for a file that is damaged
        raise ValueError(
            f"{file}: damaged or only half copied ({type(error).__name__}: {error}); copy or download it again"
        ) from None


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run's folder (step_0000100, step_0000200, ...), oldest first; empty if there are none."""
    folders = [path for path in Path(run).glob("step_*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def resolve(name: str | Path) -> str | Path:
    """A run's folder -> its newest checkpoint; any other name of a model stays as it is."""
    return checkpoints(name)[-1] if checkpoints(name) else name


def locate(name: str | Path, *files: str) -> Path:
    """The first of these files that a model has: in its folder, or in the hub's cache, to which it is fetched."""
    if Path(name).is_dir():
        for file in files:
            if (Path(name) / file).is_file():
                return Path(name) / file
        raise ValueError(f"{name}: no {files[0]} in this folder; a checkpoint has config.json and model.safetensors")
    if Path(name).parent != Path() and Path(name).parent.is_dir():
        there = ", ".join(sorted(p.name for p in Path(name).parent.iterdir() if p.is_dir())) or "no folders"
        raise ValueError(f"{name}: no such folder; in {Path(name).parent} there are {there}")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    repo = f"openai-community/{name}" if name in SIZES else str(name)
    try:
        for file in files:
            try:
                return Path(hf_hub_download(repo, file))
            except EntryNotFoundError as error:
                if file == files[-1] or isinstance(error, LocalEntryNotFoundError):  # the latter: no connection
                    raise
    except (OSError, HFValidationError) as error:
        close = difflib.get_close_matches(str(name), SIZES, n=1)
        hint = f"; did you mean {close[0]}?" if close and name not in SIZES else ""
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is neither a folder here nor a model that could be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}){hint}"
        ) from None
