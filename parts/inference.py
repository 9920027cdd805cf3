"""Inference: a model continues token ids, with a KV cache, packed weights, and a CUDA graph for the
one-token step.
"""

import codecs
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts import GPT
from parts.tokenizer import Tokenizer

GRAPH_FROM = 32  # new tokens; for fewer, capturing a CUDA graph does not pay


class KVCache:
    """Keys and values of all tokens so far, so that a new token costs the work of one token.

    Prompts of different lengths are aligned at their right ends: the first `pad[b]` columns of row
    b are empty.
    """

    def __init__(
        self,
        n_layer: int,
        capacity: int,
        pad: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.capacity = capacity  # columns that are allocated at each layer's first use
        self.dtype = dtype  # of keys and values; None: what the layer computes in
        self.length = 0  # columns filled; the same in every layer between two forward passes
        self.pad = pad  # (B,) int64, or None when all rows start at column 0
        self.layers = [None] * n_layer  # each (2, B, nh, capacity, hs): keys and values
        self.column = None  # for a CUDA graph, which always reads all columns: where the next token goes, (1,) int64

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k and v (B, nh, T, hs); returns the layer's keys and values so far, (B, nh, past +
        T, hs) each.
        """
        B, nh, T, hs = k.shape
        if self.layers[layer] is None:
            # Zeros, because 0 x NaN is NaN behind a mask too.
            self.layers[layer] = k.new_zeros(2, B, nh, self.capacity, hs, dtype=self.dtype)
        keys, values = self.layers[layer][0], self.layers[layer][1]
        if self.column is not None:
            keys[:, :, self.column], values[:, :, self.column] = k, v
            return keys, values
        end = self.length + T
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def places(self, T: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions of the next T tokens, (T) or (B, T), and their mask, (B or 1, 1, T, keys); None
        if plain causal.
        """
        if self.column is None:
            column = torch.arange(self.length, self.length + T, device=device)
            key = torch.arange(self.length + T, device=device)
        else:
            column, key = self.column, torch.arange(self.capacity, device=device)
        mask = key <= column[:, None]  # (T, keys)
        if self.pad is not None:
            # An empty column sees itself: a softmax over nothing is 0/0, and its NaN would spread.
            mask = mask & (key >= self.pad[:, None, None]) | (
                key == column[:, None]
            )  # (B, T, keys)
            return (column - self.pad[:, None]).clamp(min=0), mask[:, None]
        is_plain = self.column is None and (self.length == 0 or T == 1)
        return column, None if is_plain else mask[None, None]


def forward_cached(model: GPT, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Token ids (B, T) that continue the cache -> logits (B, V) of the last one."""
    x = model.hidden(idx, *cache.places(idx.size(1), idx.device), cache)
    if cache.column is None:
        cache.length += idx.size(1)
    return model.logits(x[:, -1])


class TokenGraph:
    """The forward pass of one token a row, behind a filled cache, as a CUDA graph.

    In a small model, one token is some 200 kernels that run faster than Python launches them; a
    graph launches all of them at once. A graph repeats the same work on the same memory, so it
    attends over the whole capacity of the cache, with a mask over what is not filled, and reads the
    next column from a tensor.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, None
        B, device = cache.layers[0].size(1), cache.layers[0].device
        self.idx = torch.zeros(B, 1, dtype=torch.int64, device=device)
        cache.column = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """The next token of each row (B, 1) -> logits (B, V)."""
        self.idx.copy_(idx)
        self.cache.column.fill_(self.cache.length)
        self.cache.length += 1
        if not self.idx.is_cuda:  # nothing to capture, but the same arithmetic
            return forward_cached(self.model, self.idx, self.cache)
        with torch.cuda.device_of(
            self.idx
        ):  # a thread's current device, and so its streams, may be another GPU
            if self.graph is None:
                self.capture()
            self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them

    def capture(self) -> None:
        # Kernels set things up at their first calls, which must not be recorded: warm up on the
        # side stream first.
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):  # the same column each time
                forward_cached(self.model, self.idx, self.cache)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self.graph, stream=side
        ):  # torch's own is on the GPU of the process's first graph
            self.logits = forward_cached(self.model, self.idx, self.cache)


class PackedLinear(nn.Module):
    """nn.Linear for inference: weights in the dtype of the product and, on a CPU in bf16, in
    oneDNN's blocked layout.

    F.linear gets row-major weights and reorders all of them for each product; for the few rows of
    one token that costs as much as the product. The ops are private: torch has no public
    equivalent.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight = linear.weight.detach().to(dtype)
        on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.blocked = (
            on_cpu and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.blocked else weight
        )
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype)
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def pack(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace each Linear layer by PackedLinear, in place; returns the module. It cannot be moved,
    trained or saved.
    """
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Linear):
                setattr(part, name, PackedLinear(child, dtype))
    return module


# ---- Choosing a token ----------------------------------------------------------------------------


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that are already in the text less likely (CTRL, Keskar et al. 2019, section 4.1).

    logits (B, V), seen (B, V) bool -> (B, V): divided by the penalty where positive, else
    multiplied by it.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def restrict(
    logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Logits (B, V) with -inf for every token that one of the three filters removes; they apply in
    this order.

    top_k   keeps the k most likely tokens; 0 keeps all
    top_p   keeps the fewest tokens that together have this probability (nucleus, Holtzman et al. 2019); 1 keeps all
    min_p   keeps tokens with at least this share of the top token's probability (Nguyen et al. 2024); 0 keeps all
    """
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        p = F.softmax(sorted_logits, dim=-1)
        out = (
            p.cumsum(dim=-1) - p >= top_p
        )  # the more likely tokens already reach top_p without this one
        out[:, 0] = False  # the top token always stays
        logits = logits.masked_fill(out.gather(1, order.argsort(dim=-1)), float("-inf"))
    if min_p > 0:
        least = logits.max(dim=-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits


def sample(
    logits: torch.Tensor, draw: torch.Tensor, temperature: float = 1.0, **filters
) -> torch.Tensor:
    """One token for each row: logits (B, V) and uniform numbers in [0, 1) (B,) -> ids (B,) int64.

    temperature divides the logits, and 0 always takes the most likely token; for the filters see
    `restrict`. The draw becomes a token by inverting the cumulative distribution: a row's token
    depends on its own logits and number only.
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    cdf = F.softmax(restrict(logits / temperature, **filters), dim=-1).cumsum(dim=-1)  # (B, V)
    # The first token whose cumulative probability exceeds the draw's share of the total (rounded,
    # it need not be 1).
    return torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True).squeeze(-1)


class Step(NamedTuple):
    """One new token for each row of a batch."""

    tokens: list[int | None]  # None where a row has ended
    logits: torch.Tensor  # (B, V) float32, before penalty, temperature and filters


@torch.no_grad()
def stream(
    model: GPT,
    prompts,
    max_new_tokens,
    seeds=None,
    stop_token=None,
    repetition_penalty=1.0,
    **sampling,
) -> Iterator[Step]:
    """Continue each prompt (a list of token ids); yield a Step for each new token. The model is in
    eval mode.

    seeds                one for each prompt: a row's text depends on its own seed, not on the rows beside it (in bf16,
                         a batch of another shape rounds differently, and near ties may fall
                         differently)
    stop_token           a row ends with this id (usually end of text)
    repetition_penalty   see `penalize`; 1 is none
    sampling             temperature, top_k, top_p, min_p: see `sample`

    The context of a token is the block_size tokens before it. Raises ValueError for a prompt that
    is empty or longer than block_size, and for weights that give NaN.
    """
    block_size, device = model.config.block_size, model.transformer.wte.weight.device
    for prompt in prompts:
        if not 0 < len(prompt) <= block_size:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens: this model takes 1 to {block_size}; shorten it"
            )
    generators = [
        torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))
    ]  # always on the CPU

    rows, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    seen = torch.zeros(
        len(rows), model.config.vocab_size, dtype=torch.bool, device=device
    )  # (B, V)
    for mask, row in zip(seen, rows):
        mask[row] = True
    graphed = (
        isinstance(model.lm_head, PackedLinear)
        and device.type == "cuda"
        and max_new_tokens >= GRAPH_FROM
    )
    cache = None
    for _ in range(max_new_tokens):
        # 1. Compute what the cache lacks: the last token, or everything at first and whenever the cache is full.
        # Positions are learned, so once the window slides every cached key stands at a wrong position.
        if cache is None or cache.length == block_size:
            cache, logits = prefill(model, [row[-block_size:] for row in rows], max_new_tokens)
            graph = TokenGraph(model, cache) if graphed else None
        else:
            idx = torch.tensor([row[-1:] for row in rows], device=device)
            logits = graph(idx) if graph else forward_cached(model, idx, cache)  # (B, V)
        logits = logits.float()
        if logits.isnan().any():
            raise ValueError("the model's logits are NaN: it is damaged, or its training diverged")

        # 2. Choose, 3. remember, 4. hand over.
        draws = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(
            device
        )  # (B)
        chosen = sample(penalize(logits, seen, repetition_penalty), draws, **sampling)  # (B)
        seen.scatter_(1, chosen[:, None], True)
        chosen = chosen.tolist()
        for row, token in zip(rows, chosen):
            row.append(token)
        yield Step([None if done else token for done, token in zip(ended, chosen)], logits)
        ended = [done or token == stop_token for done, token in zip(ended, chosen)]
        if all(ended):
            return


def prefill(model: GPT, rows: list[list[int]], max_new_tokens: int) -> tuple[KVCache, torch.Tensor]:
    """A cache filled with the rows, aligned at their right ends, and the logits (B, V) behind
    them.
    """
    device, longest = model.transformer.wte.weight.device, max(map(len, rows))
    idx = torch.tensor(
        [[0] * (longest - len(row)) + row for row in rows], device=device
    )  # (B, longest)
    pad = torch.tensor([longest - len(row) for row in rows])
    # With a single query in bf16, a CPU's fused attention takes three times as long over bf16 keys
    # as over float32.
    dtype = (
        torch.float32 if isinstance(model.lm_head, PackedLinear) and device.type == "cpu" else None
    )
    capacity = min(model.config.block_size, longest + max_new_tokens)
    cache = KVCache(model.config.n_layer, capacity, pad.to(device) if pad.any() else None, dtype)
    return cache, forward_cached(model, idx, cache)


def generate(model: GPT, prompts, max_new_tokens: int, **options) -> list[list[int]]:
    """The continuations that `stream` yields, whole: one list of new token ids for each prompt. The
    mode may be any.
    """
    was_training = model.training
    model.eval()
    steps = [step.tokens for step in stream(model, prompts, max_new_tokens, **options)]
    model.train(was_training)
    return [[tokens[b] for tokens in steps if tokens[b] is not None] for b in range(len(prompts))]


# ---- Texts ---------------------------------------------------------------------------------------


# Name: default, smallest and largest value, meaning. The default's type is the setting's.
SETTINGS = {
    "max_tokens": (100, 1, 2**62, "new tokens for each sample"),
    "temperature": (1.0, 0, 2**62, "0 always takes the most likely token"),
    "top_k": (50, 0, 2**62, "draw from the k most likely tokens; 0 is all"),
    "top_p": (
        1.0,
        0,
        1,
        "draw from the fewest tokens that together have this probability; 1 is all",
    ),
    "min_p": (
        0.0,
        0,
        1,
        "draw from the tokens with this share of the top token's probability; 0 is all",
    ),
    "repetition_penalty": (
        1.0,
        0.01,
        100,
        "above 1: tokens that are in the text become less likely",
    ),
    "seed": (1337, 0, 2**62, "sample number i draws from seed + i"),
}


def checked(values: dict) -> dict:
    """The settings among these values. ValueError if one is missing, not a number, or out of
    range.
    """
    for name, (default, low, high, _) in SETTINGS.items():
        value = values.get(name)
        if type(value) not in (int, type(default)):
            raise ValueError(f"{name} must be a {'whole ' if type(default) is int else ''}number")
        if not low <= value <= high:
            raise ValueError(
                f"{name} must be {f'at most {high}' if value > high else f'{low} or more'}"
            )
    return {name: values[name] for name in SETTINGS}


class Text:
    """A prompt's continuation, token by token. It shows no incomplete characters and no part of a
    stop text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, seed: int, stops: list[str]):
        self.tokenizer, self.prompt, self.seed = tokenizer, prompt, seed
        self.ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]  # of the prompt
        self.stops = [stop.replace("\\n", "\n") for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held, self.done = (
            "",
            "",
            False,
        )  # shown; held back, as it may become a stop text; complete
        # If wanted, for each token: its text, log-probability and id, and those of the five most
        # likely in its place.
        self.record: list[tuple[str, float, int, list[tuple[str, float, int]]]] = []

    def add(self, token: int | None, logprobs: torch.Tensor | None = None) -> str:
        """Append a token (None: no more come) and return what is ready to show; logprobs (V) are
        those of its place.
        """
        if logprobs is not None:
            values, ids = logprobs.topk(min(5, len(logprobs)))
            likely = [
                (self.tokenizer.decode([i]), value, i)
                for i, value in zip(ids.tolist(), values.tolist())
            ]
            self.record.append(
                (self.tokenizer.decode([token]), logprobs[token].item(), token, likely)
            )
        last = token in (None, self.tokenizer.end_of_text)
        self.held += self.decoder.decode(
            b"" if last else self.tokenizer.decode_bytes([token]), final=last
        )
        ends = [at for at in map(self.held.find, self.stops) if at >= 0]
        starts = [
            n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])
        ]
        self.done = last or bool(ends)
        end = min(ends) if ends else len(self.held) - (0 if last else max(starts, default=0))
        shown, self.held = self.held[:end], self.held[end:]
        self.text += shown
        return shown

    def take(self, tokens: list[int]) -> list[str]:
        """Append tokens that stand already; returns what each of them shows. Neither stop text nor
        id ends the text.
        """
        stops, self.stops = self.stops, []
        shown = [self.add(token) for token in tokens]
        self.ids, self.stops, self.done = self.ids + tokens, stops, False
        return shown


def complete(
    model: GPT, texts: list[Text], settings: dict, logprobs=False, cut=False
) -> Iterator[list[str]]:
    """Continue the texts as one batch; after each token, yield what each of them can show.

    cut: of a long prompt, the model reads the end. New tokens get room, because generation past the
    window is slow.
    """
    max_tokens, block_size = settings["max_tokens"], model.config.block_size
    longest = max(block_size - max_tokens, block_size // 2)
    prompts, seeds = (
        [text.ids[-longest:] if cut else text.ids for text in texts],
        [text.seed for text in texts],
    )
    sampling = {
        name: value for name, value in settings.items() if name not in ("max_tokens", "seed")
    }
    for step in stream(
        model, prompts, max_tokens, seeds, texts[0].tokenizer.end_of_text, **sampling
    ):
        rows = step.logits.log_softmax(dim=-1) if logprobs else [None] * len(texts)
        yield [
            "" if text.done else text.add(token, row)
            for text, token, row in zip(texts, step.tokens, rows)
        ]
        if all(text.done for text in texts):
            return
    yield ["" if text.done else text.add(None) for text in texts]
