"""Inference: a model continues token ids, with a KV cache, packed weights, and the step of one
token as a whole: a CUDA graph, or on a CPU a function in C.
"""

if __name__ == "__main__":
    raise SystemExit("parts/inference.py is no command: README.md lists the commands")

import codecs
import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from parts import GPT, GPTConfig, decode, matvec
from parts.console import print_note
from parts.pretrained import compare_with_gpt2
from parts.runtime import changing_shapes
from parts.standin import differ, exact_arithmetic, make_standin, random_ids
from parts.tokenizer import Tokenizer

import torch
import torch.nn as nn
import torch.nn.functional as F

# New tokens; for fewer, capturing a CUDA graph does not pay.
GRAPH_FROM = 32


# ---- The KV cache --------------------------------------------------------------------------------


class KVCache:
    """Keys and values of all tokens so far, so that a new token costs the work of one token.

    Prompts of different lengths are aligned at their right ends: the first `pad[b]` columns of row
    b are empty. Layers may differ in their heads and head sizes, and some may not use the cache.
    """

    def __init__(
        self, capacity: int, pad: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ):
        """Room for `capacity` columns, allocated at each layer's first use.

        pad     (B,) int64, or None when all rows start at column 0
        dtype   of keys and values; None is what the layer computes in
        """
        self.capacity = capacity
        self.pad = pad
        self.dtype = dtype
        # Columns filled; the same in every layer between two forward passes.
        self.length = 0
        # Layer -> its keys and values, (B, nh, capacity, hs) each.
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # In a CUDA graph, which always reads all columns: where the next token goes, (1,) int64.
        self.column: torch.Tensor | None = None

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k and v (B, nh, T, hs); return the layer's keys and values so far.

        These are (B, nh, past + T, hs) each, or (B, nh, capacity, hs) in a CUDA graph. The first
        ones come back as they are, not in the cache's dtype.
        """
        if layer not in self.layers:
            self.layers[layer] = (self.allocate(k), self.allocate(v))
        keys, values = self.layers[layer]
        if self.column is not None:
            # Indexing by a tensor converts no dtypes.
            keys[:, :, self.column] = k.to(keys.dtype)
            values[:, :, self.column] = v.to(values.dtype)
            return keys, values
        end = self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        if self.length == 0 and k.dtype == v.dtype:
            # There are no others, and in their own dtype attention is faster.
            return k, v
        return keys[:, :, :end], values[:, :, :end]

    def allocate(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros for all columns: a mask hides what is not filled, but 0 x NaN would be NaN."""
        B, nh, _, hs = x.shape
        return x.new_zeros(B, nh, self.capacity, hs, dtype=self.dtype)

    def positions_and_mask(
        self, T: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the next T tokens stand, and which keys they may see.

        The positions are (T) or (B, T) int64. The mask is (B or 1, 1, T, keys) bool, or None where
        attention is plainly causal.
        """
        if self.column is None:
            column = torch.arange(self.length, self.length + T, device=device)
            key = torch.arange(self.length + T, device=device)
        else:
            column = self.column
            key = torch.arange(self.capacity, device=device)
        mask = key <= column[:, None]  # (T, keys)
        if self.pad is not None:
            position = (column - self.pad[:, None]).clamp(min=0)  # (B, T)
            # An empty column sees itself: a softmax over nothing is 0/0, and its NaN would spread.
            itself = key == column[:, None]
            mask = mask & (key >= self.pad[:, None, None]) | itself  # (B, T, keys)
            return position, mask[:, None]
        if self.column is None and (self.length == 0 or T == 1):
            return column, None
        return column, mask[None, None]


def forward_cached(model: GPT, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Token ids (B, T) that continue the cache -> logits (B, V) of the last one."""
    position, mask = cache.positions_and_mask(idx.size(1), idx.device)
    with changing_shapes(idx.device):
        x = model.hidden(idx, position=position, mask=mask, cache=cache)
    if cache.column is None:
        cache.length += idx.size(1)
    return model.logits(x[:, -1])


def prefill(model: GPT, rows: list[list[int]], max_new_tokens: int) -> tuple[KVCache, torch.Tensor]:
    """Fill a new cache with rows of token ids, aligned at their right ends.

    Returns the cache, with room for the new tokens, and the logits (B, V) behind the rows.
    """
    idx, pad = align_right(rows, device_of(model))
    capacity = min(model.config.block_size, idx.size(1) + max_new_tokens)
    dtype = None
    if idx.device.type == "cpu" and is_packed(model):
        # With a single query in bf16, a CPU's fused attention takes three times as long over bf16
        # keys as over float32.
        dtype = torch.float32
    cache = KVCache(capacity, pad, dtype)
    return cache, forward_cached(model, idx, cache)


def recompute(model: GPT, rows: list[list[int]], pads: bool) -> torch.Tensor:
    """The logits (B, V) behind rows of token ids, without a cache.

    Rows of different lengths become one padded batch, or with pads=False one batch each.
    """
    if is_ragged(rows) and not pads:
        return torch.cat([recompute(model, [row], pads) for row in rows])
    idx, pad = align_right(rows, device_of(model))
    if pad is None:
        return model.logits(model.hidden(idx)[:, -1])
    layout = KVCache(idx.size(1), pad)
    position, mask = layout.positions_and_mask(idx.size(1), idx.device)
    return model.logits(model.hidden(idx, position=position, mask=mask)[:, -1])


def align_right(
    rows: list[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of token ids -> (B, longest) int64 with zeros on the left, and how many of them, (B,).

    The latter is None when all rows have the same length.
    """
    longest = max(map(len, rows))
    pads = []
    padded_rows = []
    for row in rows:
        pad = longest - len(row)
        pads.append(pad)
        padded_rows.append([0] * pad + row)
    idx = torch.tensor(padded_rows, device=device)
    if not any(pads):
        return idx, None
    return idx, torch.tensor(pads, device=device)


def is_ragged(rows: list[list[int]]) -> bool:
    """Whether the rows differ in length."""
    return len({len(row) for row in rows}) > 1


def device_of(model: GPT) -> torch.device:
    return next(model.parameters()).device


# ---- A token as a CUDA graph ---------------------------------------------------------------------


class TokenGraph:
    """The forward pass of one token a row, behind a filled cache, as a CUDA graph.

    In a small model, one token is some 200 kernels that run faster than Python launches them; a
    graph launches all of them at once. A graph repeats the same work on the same memory, so it
    attends over the whole capacity of the cache, with a mask over what is not filled, and reads the
    next column from a tensor.
    """

    def __init__(self, model: GPT, cache: KVCache, captures: bool = True):
        """captures=False launches the kernels one by one instead, as always on a CPU."""
        self.model = model
        self.cache = cache
        self.captures = captures
        self.graph: torch.cuda.CUDAGraph | None = None
        self.idx: torch.Tensor | None = None
        self.column = torch.zeros(1, dtype=torch.int64, device=device_of(model))
        cache.column = self.column

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """The next token of each row (B, 1) -> logits (B, V)."""
        if self.idx is None:
            self.idx = torch.zeros_like(idx)
        self.idx.copy_(idx)
        self.column.fill_(self.cache.length)
        self.cache.length += 1
        if not (self.captures and idx.is_cuda):
            return forward_cached(self.model, self.idx, self.cache)
        # A thread's current device, and so its streams, may be another GPU.
        with torch.cuda.device_of(self.idx):
            if self.graph is None:
                self.graph = self.capture(self.idx)
            self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them

    def capture(self, idx: torch.Tensor) -> torch.cuda.CUDAGraph:
        """Record the step, which reads its tokens from idx and leaves its logits in self.logits."""
        # Kernels set things up at their first calls, which must not be recorded: so they warm up
        # on the side stream first.
        side = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):  # the same column each time
                forward_cached(self.model, idx, self.cache)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Without a stream, torch takes its own, which is on the GPU of the process's first graph.
        with torch.cuda.graph(graph, stream=side):
            self.logits = forward_cached(self.model, idx, self.cache)
        return graph


# ---- Packed weights ------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """nn.Linear for inference: weights in the dtype of the product, in the layout that is read
    fastest.

    On a CPU in bf16 there are two. For a few vectors, and wherever parts/decode.c takes the tokens,
    the rows as they are, by the kernel of parts/matvec.py. For more, oneDNN's blocks: F.linear gets
    row-major weights and reorders all of them for each product, which for some vectors costs as
    much as the product. The ops are private: torch has no public equivalent.

    int8 is a size of weights only: each row has a scale, and products are in float32.
    """

    def __init__(
        self,
        linear: nn.Linear,
        dtype: torch.dtype,
        kernel: matvec.Kernel | None,
        room: matvec.Room | None,
    ):
        """kernel: to be used for a few vectors, or None. room: where its matrix shall lie."""
        super().__init__()
        weight = linear.weight.detach().contiguous()
        bias = None if linear.bias is None else linear.bias.detach()
        self.scale = None
        self.kernel = kernel
        self.blocked = False
        if dtype == torch.int8:
            weight, self.scale = matvec.quantise(weight)
            if kernel is None:  # the same numbers, and no slower than they need be
                weight = matvec.dequantise(weight, self.scale)
                self.scale = None
        elif kernel is None:
            weight = weight.to(dtype)
            if bias is not None:
                bias = bias.to(dtype)
            if dtype == torch.bfloat16 and weight.device.type == "cpu":
                self.blocked = has_bf16_ops()
        if room is not None:
            weight = room.store(weight, dtype)
        if self.blocked:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.weight = weight
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is not None:
            most = matvec.MOST_VECTORS
            if self.scale is not None:
                most = matvec.MOST_VECTORS_INT8
            if x.numel() <= most * x.size(-1):
                return self.kernel.multiply(x, self.weight, self.scale, self.bias)
            return self.multiply_many(x)
        x = x.to(self.weight.dtype)
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def multiply_many(self, x: torch.Tensor) -> torch.Tensor:
        """The kernel's product for many vectors, such as a prompt's: in float32 or, where the CPU
        is fast at it, in bf16.
        """
        if self.scale is not None:
            weight = matvec.dequantise(self.weight, self.scale)
        elif has_bf16_ops():
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            return F.linear(x.to(torch.bfloat16), self.weight, bias)
        else:
            weight = self.weight.float()
        return F.linear(x.float(), weight, self.bias)


def has_bf16_ops() -> bool:
    """Whether this build of torch and this CPU multiply bf16 matrices with oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(module: nn.Module, dtype: torch.dtype, for_c: bool = False) -> nn.Module:
    """Replace each Linear layer by a PackedLinear, in place, and return the module.

    A packed module has no dropout, and cannot be moved, trained or saved. for_c: on a CPU it will
    compute a few tokens at a time, or as many as parts/decode.c takes, so a matrix's rows lie as
    the functions in C read them.
    """
    linears = []
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Linear):
                linears.append((part, name, child))
    kernel = None
    room = None
    if for_c and dtype in (torch.bfloat16, torch.int8):
        kernel = matvec.load_kernel()
    if kernel is not None:
        room = matvec.Room([child.weight.numel() * dtype.itemsize for _, _, child in linears])
    for part, name, child in linears:
        setattr(part, name, PackedLinear(child, dtype, kernel, room))
    return module.eval()


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


# ---- Does a shortcut compute what the model computes? --------------------------------------------
# A changed model.py may mix tokens in ways that a cache, or a padded batch, knows nothing of. So
# each shortcut is tried on a stand-in of the model, and one that gives other logits is not taken.


class Method(NamedTuple):
    """How the logits of a new token are computed.

    Without any of the three, the model reads the whole context of each row again for every token.
    """

    cache: bool  # the keys and values of earlier tokens are kept
    pads: bool  # rows of different lengths are one batch
    graph: bool  # the step of one token is a CUDA graph


PLAIN = Method(cache=False, pads=False, graph=False)


@functools.cache
def choose_method(cls: Any, config: GPTConfig, pads: bool, graph: bool) -> Method:
    """The fastest method that gives the logits of models of this class and config.

    pads    the rows have different lengths
    graph   a CUDA graph would pay

    A line on stderr says once what cannot be used.
    """
    if config.block_size < 4:
        return PLAIN  # nothing to gain, and too little to compare
    wanted = Method(cache=True, pads=pads, graph=graph)
    candidates = [wanted]
    if graph:
        candidates.append(wanted._replace(graph=False))
    if pads:
        candidates.append(Method(cache=False, pads=True, graph=False))
    method = PLAIN
    objections = []
    model = make_standin(cls, config)
    # What is no GPT-2 may have a window of any length.
    is_gpt2 = not compare_with_gpt2(cls, config, n_tokens=1024)
    n_tokens = 512 if is_gpt2 else 2048
    for candidate in candidates:
        objection = compare(model, candidate, n_tokens)
        if not objection:
            method = candidate
            break
        objections.append(objection)
    if objections:
        print_note(describe_fallback(wanted, method, objections[0]))
    return method


def describe_fallback(wanted: Method, method: Method, objection: str) -> str:
    if method.cache:
        return f"this model.py {objection} in a CUDA graph: sampling without it, slower"
    shortcut = "with the KV cache"
    if wanted.pads:
        shortcut += " and prompts of different lengths"
    return f"this model.py {objection} {shortcut}: sampling without it, slower"


def compare(model: GPT, method: Method, n_tokens: int) -> str:
    """What speaks against the method, as the predicate of "this model.py"; empty if nothing does.

    A stand-in's logits are compared with the plain ones on a random text of so many tokens and, if
    the method pads, on two shorter ones beside it.
    """
    text = random_ids(model, min(model.config.block_size, n_tokens)).tolist()
    rows = [text]
    if method.pads:
        # The shortest one shows what a padding token does to the first real token behind it.
        rows += [text[: max(3, len(text) // 2)], text[:3]]
    with exact_arithmetic():
        expected = follow(model, rows, PLAIN)
        try:
            logits = follow(model, rows, method)
        except Exception as error:  # a model.py that knows nothing of a cache may raise anything
            reason = str(error).partition("\n")[0]
            return f"raises {type(error).__name__} ({reason})"
    return "gives other logits" if differ(logits, expected) else ""


def follow(model: GPT, rows: list[list[int]], method: Method) -> torch.Tensor:
    """The logits (3, B, V) behind all but two tokens of each row, all but one, and all."""
    beginnings = [row[:-2] for row in rows]
    if not method.cache:
        first = recompute(model, beginnings, method.pads)
        second = recompute(model, [row[:-1] for row in rows], method.pads)
        return torch.stack([first, second, recompute(model, rows, method.pads)])
    cache, first = prefill(model, beginnings, max_new_tokens=2)
    step: Callable[[torch.Tensor], torch.Tensor]
    step = functools.partial(forward_cached, model, cache=cache)
    if method.graph:
        step = TokenGraph(model, cache, captures=False)
    tokens = torch.tensor([row[-2:] for row in rows], device=first.device)  # (B, 2)
    return torch.stack([first, step(tokens[:, :1]), step(tokens[:, 1:])])


# ---- A token in C --------------------------------------------------------------------------------
# parts/decode.c computes a GPT-2, and model.py may compute something else. Numbers decide here too.


def make_decoder(model: GPT, cache: KVCache) -> decode.Decoder | None:
    """The step of one token a row in C behind this cache; None where the model has to do it."""
    functions = decode.load_functions()
    if functions is None or not is_as_made(model):
        return None
    try:
        return decode.Decoder(functions, model.config, decode.collect_tensors(model), cache)
    except ValueError:  # these are not the tensors of a GPT-2
        return None


def is_as_made(model: GPT) -> bool:
    """Whether the model has the modules that its class makes, packed or not: nothing was put in
    their places, and nothing listens to them.
    """
    cls: Any = type(model)
    expected = {}
    for name, module in make_standin(cls, model.config).named_modules():
        expected[without_numbers(name)] = type(module)
    for name, module in model.named_modules():
        kind = expected.get(without_numbers(name), nn.Module)
        is_the_same = type(module) is kind
        is_packed_one = isinstance(module, PackedLinear) and issubclass(kind, nn.Linear)
        if not is_the_same and not is_packed_one:
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    return True


def without_numbers(name: str) -> str:
    """A module's name without that of its block: a stand-in has fewer of them."""
    return re.sub(r"\d+", "", name)


@functools.cache
def computes_gpt2(cls: Any, config: GPTConfig, weights: torch.dtype) -> bool:
    """Whether models of this class and config are GPT-2s, in parts/decode.c too.

    The first is asked in float64 and without a cache. Then a stand-in in float32, with its matrices
    in the dtype `weights`, goes through decode.c: with empty columns and onto a prompt.
    """
    if config.block_size < 4 or compare_with_gpt2(cls, config, n_tokens=1024):
        return False
    model = copy.deepcopy(make_standin(cls, config)).float()
    if weights != torch.float32:
        pack(model, weights, for_c=True)
    T = min(config.block_size, 64)
    first, second = random_ids(model, 2, T)
    rows = [first[:-1].tolist(), second[: T // 2].tolist()]
    next_tokens = torch.stack([first[-1:], second[T // 2 :][:1]])  # (B, 1)
    with exact_arithmetic():
        cache, _ = prefill(model, rows, max_new_tokens=1)
        expected = forward_cached(model, next_tokens, cache)
        cache, _ = prefill(model, rows, max_new_tokens=1)
        decoder = make_decoder(model, cache)
        if decoder is None:
            return False
        return not differ(decoder(next_tokens), expected, tolerance=1e-4)


def may_decode(model: GPT, n_rows: int) -> bool:
    """Whether new tokens of so many rows may be computed in C."""
    weight = model.lm_head.weight
    if model.training or torch.is_autocast_enabled("cpu") or weight.device.type != "cpu":
        return False
    cls: Any = type(model)
    fits = decode.takes(n_rows, weight.dtype, model.config.n_embd)
    return fits and computes_gpt2(cls, model.config, weight.dtype)


def decodes_many(model: GPT, n_rows: int) -> bool:
    """Whether new tokens of so many rows will be computed in C as products of matrices, once the
    model is packed in bf16 for them.
    """
    if n_rows <= matvec.MOST_VECTORS:
        return False
    if not decode.takes(n_rows, torch.bfloat16, model.config.n_embd):
        return False
    cls: Any = type(model)
    return matvec.load_kernel() is not None and computes_gpt2(cls, model.config, torch.bfloat16)


class Predictor:
    """The logits of the next token of each row, as fast as this model allows."""

    def __init__(self, model: GPT, rows: list[list[int]], max_new_tokens: int):
        """rows: the prompts, as token ids."""
        self.model = model
        self.max_new_tokens = max_new_tokens
        graph = False
        if device_of(model).type == "cuda" and max_new_tokens >= GRAPH_FROM:
            graph = is_packed(model)
        cls: Any = type(model)
        self.method = choose_method(cls, model.config, is_ragged(rows), graph)
        self.cache: KVCache | None = None
        self.decodes = self.method.cache and may_decode(model, len(rows))
        self.step: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, rows: list[list[int]]) -> torch.Tensor:
        """Rows of token ids, each with one token more than at the last call -> logits (B, V).

        The model reads the last block_size tokens of each.
        """
        block_size = self.model.config.block_size
        # Positions are learned, so once the window slides every cached key stands at a wrong
        # position: then the cache is filled anew.
        if self.cache is not None and self.cache.length < block_size:
            idx = torch.tensor([row[-1:] for row in rows], device=device_of(self.model))
            if self.step is not None:
                return self.step(idx)
            return forward_cached(self.model, idx, self.cache)
        windows = [row[-block_size:] for row in rows]
        if not self.method.cache:
            with changing_shapes(device_of(self.model)):
                return recompute(self.model, windows, self.method.pads)
        self.cache, logits = prefill(self.model, windows, self.max_new_tokens)
        if self.method.graph:
            self.step = TokenGraph(self.model, self.cache)
        elif self.decodes and self.cache.length < block_size:
            self.step = make_decoder(self.model, self.cache)
        return logits


# ---- Choosing a token ----------------------------------------------------------------------------


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that are already in the text less likely (CTRL, Keskar et al. 2019, section 4.1).

    logits (B, V), seen (B, V) bool -> (B, V): divided by the penalty where positive, else
    multiplied by it.
    """
    if penalty == 1:
        return logits  # not three passes over them
    less_likely = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, less_likely, logits)


def restrict(
    logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Logits (B, V) with -inf for every token that one of the three filters removes.

    They apply in this order:

    top_k   keeps the k most likely tokens; 0 keeps all
    top_p   keeps the fewest tokens that together have this probability; 1 keeps all
            (nucleus sampling, Holtzman et al. 2019)
    min_p   keeps tokens with at least this share of the top token's probability; 0 keeps all
            (Nguyen et al. 2024)
    """
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        p = F.softmax(sorted_logits, dim=-1)
        # The more likely tokens already reach top_p without this one. The top token always stays.
        is_removed = p.cumsum(dim=-1) - p >= top_p
        is_removed[:, 0] = False
        rank = order.argsort(dim=-1)
        logits = logits.masked_fill(is_removed.gather(1, rank), float("-inf"))
    if min_p > 0:
        least = logits.max(dim=-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits


def sample(
    logits: torch.Tensor, draw: torch.Tensor, temperature: float = 1.0, **filters
) -> torch.Tensor:
    """One token for each row: logits (B, V) and uniform numbers in [0, 1) (B,) -> ids (B,) int64.

    temperature divides the logits, and 0 always takes the most likely token; for the filters see
    `restrict`. The draw becomes a token by inverting the cumulative distribution, so that a row's
    token depends on its own logits and number only.
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    p = F.softmax(restrict(logits / temperature, **filters), dim=-1)
    cdf = p.cumsum(dim=-1)  # (B, V)
    # The first token whose cumulative probability exceeds the draw's share of the total, which is
    # not exactly 1 because of rounding.
    return torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True).squeeze(-1)


class Step(NamedTuple):
    """One new token for each row of a batch."""

    tokens: list[int | None]  # None where a row has ended
    logits: torch.Tensor  # (B, V) float32, before penalty, temperature and filters


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    stop_token: int | None = None,
    repetition_penalty: float = 1.0,
    **sampling,
) -> Iterator[Step]:
    """Continue each prompt, a list of token ids, and yield a Step for each new token.

    model                in eval mode
    seeds                one for each prompt, by default 0, 1, ...; a row's text depends on its own
                         seed, not on the rows beside it (in bf16, a batch of another shape rounds
                         differently, and near ties may fall differently)
    stop_token           a row ends with this id (usually end of text)
    repetition_penalty   see `penalize`; 1 is none
    sampling             temperature, top_k, top_p, min_p: see `sample`

    The context of a token is the block_size tokens before it. Raises ValueError for a prompt that
    is empty or longer than block_size, and for weights that give NaN.
    """
    block_size = model.config.block_size
    for prompt in prompts:
        if not 0 < len(prompt) <= block_size:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens: this model takes 1 to {block_size}; shorten it"
            )
    if seeds is None:
        seeds = range(len(prompts))
    device = device_of(model)
    # Always on the CPU, so that a seed gives the same numbers on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    rows = [list(prompt) for prompt in prompts]
    has_ended = [False] * len(rows)
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
    for seen_by_row, row in zip(seen, rows):
        seen_by_row[row] = True
    predict = Predictor(model, rows, max_new_tokens)
    for _ in range(max_new_tokens):
        logits = predict(rows).float()  # (B, V)
        # The largest one of a row is NaN if any is.
        if (~logits.amax(dim=-1).isfinite()).any():
            raise ValueError(
                "the model's logits are not finite: it is damaged, or its training diverged"
            )

        draws = torch.stack([torch.rand((), generator=generator) for generator in generators])
        penalized = penalize(logits, seen, repetition_penalty)
        chosen = sample(penalized, draws.to(device), **sampling)  # (B)
        seen.scatter_(1, chosen[:, None], True)

        tokens: list[int | None] = []
        for b, token in enumerate(chosen.tolist()):
            rows[b].append(token)
            tokens.append(None if has_ended[b] else token)
            has_ended[b] = has_ended[b] or token == stop_token
        yield Step(tokens, logits)
        if all(has_ended):
            return


def generate(
    model: GPT, prompts: Sequence[list[int]], max_new_tokens: int, **options
) -> list[list[int]]:
    """The continuations that `stream` yields, whole: a list of new token ids for each prompt.

    The model may be in training mode, and is again afterwards.
    """
    was_training = model.training
    model.eval()
    continuations: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, **options):
        for continuation, token in zip(continuations, step.tokens):
            if token is not None:
                continuation.append(token)
    model.train(was_training)
    return continuations


# ---- Texts ---------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A setting of sampling. Its type is the default's."""

    default: int | float
    low: float
    high: float
    about: str


ANY = 2**62

SETTINGS = {
    "max_tokens": Setting(100, 1, ANY, "new tokens for each sample"),
    "temperature": Setting(1.0, 0, ANY, "0 always takes the most likely token"),
    "top_k": Setting(50, 0, ANY, "draw from the k most likely tokens; 0 is all"),
    "top_p": Setting(
        1.0, 0, 1, "draw from the fewest tokens that together have this probability; 1 is all"
    ),
    "min_p": Setting(
        0.0, 0, 1, "draw from the tokens with this share of the top token's probability; 0 is all"
    ),
    "repetition_penalty": Setting(
        1.0, 0.01, 100, "above 1: tokens that are in the text become less likely"
    ),
    "seed": Setting(1337, 0, ANY, "sample number i draws from seed + i"),
}


def check_settings(values: dict) -> dict:
    """The settings of sampling among these values.

    Raises ValueError if one is missing, not a number, or out of range.
    """
    for name, setting in SETTINGS.items():
        value: Any = values.get(name)
        if type(setting.default) is int and type(value) is not int:
            raise ValueError(f"{name} must be a whole number")
        if type(value) not in (int, float):
            raise ValueError(f"{name} must be a number")
        if value > setting.high:
            raise ValueError(f"{name} must be at most {setting.high}")
        if not value >= setting.low:  # NaN is not
            raise ValueError(f"{name} must be {setting.low} or more")
    return {name: values[name] for name in SETTINGS}


class Candidate(NamedTuple):
    """A token that could stand in a place of a text."""

    text: str
    logprob: float  # nats
    id: int


class Record(NamedTuple):
    """A token of a text, and the five most likely ones in its place."""

    token: Candidate
    likely: list[Candidate]


class Text:
    """A prompt's continuation, token by token.

    It shows neither a part of a character nor a part of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, seed: int, stops: list[str]):
        """stops: texts that end it, and are not shown; "\\n" in them is a newline."""
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.seed = seed
        self.ids = tokenizer.encode(prompt).tolist() or [tokenizer.start]  # the prompt's
        self.stops = [stop.replace("\\n", "\n") for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""  # what was shown
        self.held = ""  # what is not shown yet, because it may become a stop text
        self.done = False
        self.record: list[Record] = []  # of each token, if log-probabilities were given

    def add(self, token: int | None, logprobs: torch.Tensor | None = None) -> str:
        """Append a token and return what is ready to show; None ends the text.

        logprobs (V): those of all tokens in this place, for the record.
        """
        if token is not None and logprobs is not None:
            self.record.append(self.make_record(token, logprobs))
        if token is None or token == self.tokenizer.end_of_text:
            is_last = True
            self.held += self.decoder.decode(b"", final=True)
        else:
            is_last = False
            self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        end = len(self.held)
        first_stop = find_first(self.held, self.stops)
        if first_stop is not None:
            end = first_stop
        elif not is_last:
            end -= count_held_back(self.held, self.stops)
        self.done = is_last or first_stop is not None
        shown = self.held[:end]
        self.held = self.held[end:]
        self.text += shown
        return shown

    def make_record(self, token: int, logprobs: torch.Tensor) -> Record:
        values, ids = logprobs.topk(min(5, len(logprobs)))
        likely = []
        for i, value in zip(ids.tolist(), values.tolist()):
            likely.append(Candidate(self.tokenizer.decode([i]), value, i))
        own = Candidate(self.tokenizer.decode([token]), logprobs[token].item(), token)
        return Record(own, likely)

    def append_given(self, tokens: list[int]) -> list[str]:
        """Append tokens that are part of the text already; return what each of them shows.

        Neither a stop text nor end of text ends the text here.
        """
        stops = self.stops
        self.stops = []
        shown = [self.add(token) for token in tokens]
        self.stops = stops
        self.ids = self.ids + tokens
        self.done = False
        return shown


def find_first(text: str, stops: list[str]) -> int | None:
    """Where the first stop text begins; None if there is none."""
    starts = [text.find(stop) for stop in stops if stop in text]
    return min(starts, default=None)


def count_held_back(text: str, stops: list[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop text."""
    longest = 0
    for stop in stops:
        # From the longest, which is never longer than the text: a stop text may be a whole page.
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest


def count_cut(n_ids: int, block_size: int, max_tokens: int) -> int:
    """How many tokens of a long prompt are cut from its left end, so that new ones have space."""
    longest = max(block_size - max_tokens, block_size // 2)
    return max(0, n_ids - longest)


def complete(
    model: GPT, texts: list[Text], settings: dict, logprobs: bool = False, cut: bool = False
) -> Iterator[list[str]]:
    """Continue the texts as one batch; after each token, yield what each of them can show.

    logprobs   keep a record of the log-probabilities in each text
    cut        truncate long prompts on the left to leave space for new tokens, because generation
               past the window is slow
    """
    max_tokens = settings["max_tokens"]
    sampling = {name: settings[name] for name in settings if name not in ("max_tokens", "seed")}
    prompts = [text.ids for text in texts]
    if cut:
        block_size = model.config.block_size
        prompts = [ids[count_cut(len(ids), block_size, max_tokens) :] for ids in prompts]
    seeds = [text.seed for text in texts]
    stop_token = texts[0].tokenizer.end_of_text
    for step in stream(model, prompts, max_tokens, seeds, stop_token, **sampling):
        if logprobs:
            step_logprobs = step.logits.log_softmax(dim=-1)
        shown = [""] * len(texts)
        for i, text in enumerate(texts):
            if text.done:
                continue
            if logprobs:
                shown[i] = text.add(step.tokens[i], step_logprobs[i])
            else:
                shown[i] = text.add(step.tokens[i])
        yield shown
        if all(text.done for text in texts):
            return
    yield ["" if text.done else text.add(None) for text in texts]
