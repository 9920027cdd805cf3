"""A token through a whole GPT-2 on a CPU, by one function in C.

Behind a KV cache, a token's work is to read all weights once. Done as some hundred operations of
torch, a third of the time goes to starting them and to waking threads for each. parts/decode.c does
all of it at once; parts/inference.py finds out whether a model is one that it may be used for.
"""

if __name__ == "__main__":
    raise SystemExit("parts/decode.py is no command: README.md lists the commands")

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

from parts import GPT, GPTConfig, matvec
from parts.compiler import load_library
from parts.pretrained import gpt2_logits, is_conv1d, parameter_shapes

import torch

# In the order of decode.c's `enum type`.
TYPES = [torch.float32, torch.bfloat16, torch.int8]
MOST_ROWS = 64  # as decode.c has it

# ---- The structures of decode.c, where they are explained ----------------------------------------


class Norm(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_double),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("ln_1", Norm),
        ("c_attn", Matrix),
        ("attn_proj", Matrix),
        ("ln_2", Norm),
        ("c_fc", Matrix),
        ("mlp_proj", Matrix),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_long),
        ("exact_gelu", ctypes.c_long),
        ("n_layer", ctypes.c_long),
        ("n_head", ctypes.c_long),
        ("n_embd", ctypes.c_long),
        ("vocab_size", ctypes.c_long),
        ("wte", ctypes.c_void_p),
        ("wpe", ctypes.c_void_p),
        ("ln_f", Norm),
        ("lm_head", Matrix),
        ("layers", ctypes.POINTER(Layer)),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("model", ctypes.POINTER(Model)),
        ("n_rows", ctypes.c_long),
        ("column", ctypes.c_long),
        ("capacity", ctypes.c_long),
        ("ids", ctypes.c_void_p),
        ("pads", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("branch", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_size", ctypes.c_long),
        ("stages", ctypes.c_void_p),
    ]


STAGE_BYTES = 64
EPS = 1e-5  # of GPT-2's LayerNorms


# ---- A token -------------------------------------------------------------------------------------


class Decoder:
    """The forward pass of one token a row, behind a filled cache.

    Rows do not change each other's logits, nor does the number of threads, not by a bit; but with
    more than four, what bf16 weights are multiplied with is rounded to bf16 too.
    """

    def __init__(self, functions: ctypes.CDLL, config: GPTConfig, tensors: dict, cache: Any):
        """tensors: as `collect_tensors` gives them. cache: an inference.KVCache behind a prompt.

        ValueError for tensors that decode.c does not take.
        """
        self.functions = functions
        self.config = config
        self.cache = cache
        # C has their addresses only.
        self.tensors = check_tensors(config, tensors)
        self.layers = (Layer * config.n_layer)()
        for layer, content in enumerate(self.layers):
            self.fill_layer(content, layer)
        dtype = tensors["lm_head.weight"].dtype
        self.model = Model(
            type=TYPES.index(dtype),
            exact_gelu=config.exact_gelu,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            wte=self.point("transformer.wte.weight"),
            wpe=self.point("transformer.wpe.weight"),
            ln_f=self.norm("transformer.ln_f"),
            lm_head=self.matrix("lm_head"),
            layers=self.layers,
        )
        keys, _ = cache.layers[0]
        self.n_rows = len(keys)
        self.make_step()

    def point(self, name: str) -> int | None:
        """The address of a tensor, None if there is none of this name."""
        tensor = self.tensors.get(name)
        return None if tensor is None else tensor.data_ptr()

    def norm(self, name: str) -> Norm:
        return Norm(self.point(f"{name}.weight"), self.point(f"{name}.bias"), EPS)

    def matrix(self, name: str) -> Matrix:
        addresses = [self.point(f"{name}.{part}") for part in ("weight", "scale", "bias")]
        return Matrix(*addresses)

    def fill_layer(self, content: Layer, layer: int) -> None:
        block = f"transformer.h.{layer}"
        content.ln_1 = self.norm(f"{block}.ln_1")
        content.c_attn = self.matrix(f"{block}.attn.c_attn")
        content.attn_proj = self.matrix(f"{block}.attn.c_proj")
        content.ln_2 = self.norm(f"{block}.ln_2")
        content.c_fc = self.matrix(f"{block}.mlp.c_fc")
        content.mlp_proj = self.matrix(f"{block}.mlp.c_proj")
        keys, values = self.cache.layers[layer]
        for x in (keys, values):
            if x.dtype != torch.float32 or not x.is_contiguous():
                raise ValueError("the cache is not in float32")
        content.keys = keys.data_ptr()
        content.values = values.data_ptr()

    def make_step(self) -> None:
        """What every token needs, once."""
        B = self.n_rows
        C = self.config.n_embd
        self.n_threads = torch.get_num_threads()
        if B > matvec.MOST_VECTORS:
            # A thread more would find no rows of the smaller matrices.
            self.n_threads = min(self.n_threads, max(1, C // 32))
        self.ids = torch.zeros(B, dtype=torch.int64)
        self.pads = self.cache.pad
        if self.pads is None:
            self.pads = torch.zeros(B, dtype=torch.int64)
        self.step = Step(
            model=ctypes.pointer(self.model),
            n_rows=B,
            capacity=self.cache.capacity,
            ids=self.ids.data_ptr(),
            pads=self.pads.data_ptr(),
        )
        self.buffers = []
        widths = dict(x=C, qkv=3 * C, y=C, hidden=4 * C, branch=C)
        for name, width in widths.items():
            buffer = torch.empty(B, width)
            setattr(self.step, name, buffer.data_ptr())
            self.buffers.append(buffer)
        size = self.functions.scratch_size(B, C, self.cache.capacity)
        scratch = torch.empty(self.n_threads, size)
        stages = torch.empty(5 * self.config.n_layer + 1, STAGE_BYTES, dtype=torch.uint8)
        self.step.scratch = scratch.data_ptr()
        self.step.scratch_size = size
        self.step.stages = stages.data_ptr()
        self.buffers += [scratch, stages]

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """The next token of each row (B, 1) int64 -> logits (B, V) float32."""
        assert self.cache.length < self.cache.capacity
        assert 0 <= idx.min() and idx.max() < self.config.vocab_size
        self.ids.copy_(idx[:, 0])
        logits = torch.empty(self.n_rows, self.config.vocab_size)
        self.step.logits = logits.data_ptr()
        self.step.column = self.cache.length
        self.functions.take_step(ctypes.byref(self.step), self.n_threads)
        self.cache.length += 1
        return logits


def collect_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """The weights, scales and biases of all modules, packed or not, by their names."""
    tensors = {}
    for name, module in model.named_modules():
        for part in ("weight", "scale", "bias"):
            tensor = getattr(module, part, None)
            if isinstance(tensor, torch.Tensor):
                tensors[f"{name}.{part}"] = tensor.detach()
    return tensors


def check_tensors(config: GPTConfig, tensors: dict) -> dict[str, torch.Tensor]:
    """The tensors, if they are those of a GPT-2 and decode.c can read them; else ValueError.

    More rows may follow, such as those that pad the vocabulary.
    """
    shapes = parameter_shapes(dict(vars(config)))
    shapes["lm_head.weight"] = shapes["transformer.wte.weight"]
    matrix_type = tensors["lm_head.weight"].dtype
    dtypes = dict.fromkeys(shapes, torch.float32)
    for name, shape in list(shapes.items()):
        if is_matrix(name):
            dtypes[name] = matrix_type
            if matrix_type == torch.int8:
                scale = name.replace(".weight", ".scale")
                shapes[scale] = shape[:1]
                dtypes[scale] = torch.float32
    if set(tensors) != set(shapes) or matrix_type not in TYPES:
        raise ValueError("not the tensors of a GPT-2")
    for name, tensor in tensors.items():
        fits = tensor.shape[1:] == shapes[name][1:] and len(tensor) >= shapes[name][0]
        if not fits or tensor.dtype != dtypes[name] or tensor.device.type != "cpu":
            raise ValueError(f"{name} is of another shape, type or device")
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise ValueError(f"{name} does not lie in memory row by row")
    return tensors


def is_matrix(name: str) -> bool:
    """Whether this tensor is multiplied, and not only read or added."""
    return is_conv1d(name) or name == "lm_head.weight"


# ---- The function --------------------------------------------------------------------------------


@functools.cache
def load_functions() -> ctypes.CDLL | None:
    """decode.c, compiled for this CPU if it was not yet; None where it cannot be had."""
    functions = load_library("decode")
    if functions is None:
        return None
    functions.take_step.argtypes = [ctypes.c_void_p, ctypes.c_long]
    functions.take_step.restype = None
    functions.most_rows.argtypes = [ctypes.c_long] * 2
    functions.most_rows.restype = ctypes.c_long
    functions.scratch_size.argtypes = [ctypes.c_long] * 3
    functions.scratch_size.restype = ctypes.c_long
    set_up(functions)
    return functions if is_right(functions) else None


def set_up(functions: ctypes.CDLL, use_amx: bool = True) -> None:
    """Choose what multiplies matrices of bf16, where the CPU has a choice."""
    if hasattr(functions, "set_up"):  # it has AVX512_BF16
        functions.set_up(use_amx)


def takes(n_rows: int, dtype: torch.dtype, width: int) -> bool:
    """Whether a step may have so many rows with weights of this type, in a model of this width."""
    if n_rows > MOST_ROWS or dtype not in TYPES:
        return False
    functions = load_functions()
    return functions is not None and n_rows <= functions.most_rows(TYPES.index(dtype), width)


def is_right(functions: ctypes.CDLL) -> bool:
    """Whether small GPT-2s with random weights give the logits that torch computes, in each type
    of weights. The widths of the first are no multiples of what the CPU computes at once.
    """
    config: Any = SimpleNamespace(
        n_layer=2, n_head=2, n_embd=140, vocab_size=33, block_size=6, bias=True, exact_gelu=False
    )
    if not all(is_right_for(functions, config, 2, dtype, tolerance=1e-4) for dtype in TYPES):
        return False
    # With many rows, what a matrix is multiplied with is in bf16 too.
    config.n_embd = 96
    config.vocab_size = 75
    n_rows = functions.most_rows(TYPES.index(torch.bfloat16), config.n_embd) // 2 + 3
    for config.exact_gelu in (False, True):
        if not is_right_for(functions, config, n_rows, torch.bfloat16, tolerance=0.01):
            return False
    return True


def is_right_for(
    functions: ctypes.CDLL, config: Any, n_rows: int, dtype: torch.dtype, tolerance: float
) -> bool:
    """The same for one shape and one type."""
    draw = torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (n_rows, config.block_size), generator=draw)
    plain = {}
    tensors = {}
    for name, shape in parameter_shapes(vars(config)).items():
        tensor = torch.randn(shape, generator=draw) / shape[-1] ** 0.5
        tensors[name] = tensor
        if is_matrix(name):
            tensors |= store(name, tensor, dtype)
            tensor = restore(name, tensors)
        plain[name] = tensor
    # Torch's function has a tied head, so the numbers that are read in are the stored ones too.
    tensors |= store("lm_head.weight", plain["transformer.wte.weight"], dtype)
    plain["transformer.wte.weight"] = restore("lm_head.weight", tensors)
    tensors["transformer.wte.weight"] = plain["transformer.wte.weight"]
    for name in plain:
        if is_conv1d(name):
            plain[name] = plain[name].t()
    activation = "gelu" if config.exact_gelu else "gelu_new"
    hf = dict(vars(config), activation_function=activation)
    expected = gpt2_logits(hf, plain, idx)
    logits = decode_all(functions, config, tensors, idx)
    return bool((logits - expected).norm() < tolerance * expected.norm())


def store(name: str, matrix: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix as inference packs it: by its name, and the scale of its rows if it has one."""
    if dtype != torch.int8:
        return {name: matrix.to(dtype)}
    whole, scale = matvec.quantise(matrix)
    return {name: whole, name.replace(".weight", ".scale"): scale}


def restore(name: str, tensors: dict) -> torch.Tensor:
    """The matrix that is stored, in float32."""
    scale = tensors.get(name.replace(".weight", ".scale"))
    if scale is None:
        return tensors[name].float()
    return matvec.dequantise(tensors[name], scale)


def decode_all(
    functions: ctypes.CDLL, config: Any, tensors: dict, idx: torch.Tensor
) -> torch.Tensor:
    """Token ids (B, T) -> logits (B, T, V), token by token from an empty cache."""
    B, T = idx.shape
    shape = (B, config.n_head, T, config.n_embd // config.n_head)
    layers = {}
    for layer in range(config.n_layer):
        layers[layer] = (torch.zeros(shape), torch.zeros(shape))
    cache = SimpleNamespace(layers=layers, length=0, capacity=T, pad=None)
    step = Decoder(functions, config, tensors, cache)
    return torch.stack([step(token) for token in idx.split(1, dim=1)], dim=1)
