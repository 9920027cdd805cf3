"""Models as files: Hugging Face folders and the hub, checkpoints, and files of nanoGPT and llm.c.

Inside this project a tensor has the name of its parameter in model.py, such as
transformer.h.0.attn.c_attn.weight, and nn.Linear's orientation (out, in). GPT-2's files hold those
matrices as (in, out): its authors wrote the layers as one-dimensional convolutions.

Files follow the model. A model that computes what GPT-2 computes is written as a Hugging Face GPT-2
(config.json, model.safetensors), which many programs open. Where model.py was changed so that it
computes something else, its folder has names of its own (gpt.json, gpt.safetensors, and the
model.py that made them), so that no other program takes it for a GPT-2.
"""

if __name__ == "__main__":
    raise SystemExit("parts/pretrained.py is no command: README.md lists the commands")

import dataclasses
import functools
import inspect
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from parts import GPT, GPTConfig, hub
from parts.console import print_note
from parts.json_files import parse_json
from parts.snapshot import Snapshot
from parts.standin import TOLERANCE, exact_arithmetic, make_standin

import torch
import torch.nn.functional as F

# The sizes of a model: GPTConfig's names -> config.json's
SHAPE = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}

# What config.json may say otherwise and GPT-2 does not do. (An untied head is compared instead.)
ONLY = {
    "model_type": "gpt2",
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}

# config.json's activation_function -> exact_gelu. transformers has several names for each form.
GELU = {
    "gelu_new": False,
    "gelu_fast": False,
    "gelu_pytorch_tanh": False,
    "gelu_python_tanh": False,
    "gelu_accurate": False,
    "gelu": True,
    "gelu_python": True,
}

# What torch.compile, DataParallel, FSDP, Lightning, TRL and others put into the names of tensors.
# No part of a GPT-2's own names is one of these.
WRAPPERS = {
    "_orig_mod",
    "module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "pretrained_model",
    "model",
}

# Heads beside the language model's, of reward models, classifiers and multiple choice.
OTHER_HEADS = ("v_head", "score", "multiple_choice_head", "classifier", "value_head", "summary")

# The files of a model that is not a GPT-2. transformers looks for config.json and finds none.
OWN_CONFIG = "gpt.json"
OWN_WEIGHTS = "gpt.safetensors"
OWN_MODEL = "model.py"
OWN_FORMAT = 1

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
GENERATION_CONFIG = "generation_config.json"  # of transformers: how `generate` stops

# The file that makes a folder a model's.
FIRST_FILES = ("config.json", OWN_CONFIG, ADAPTER_CONFIG)

# The small files of the hub that are needed beside the weights.
HUB_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    ADAPTER_CONFIG,
)

# A deep stand-in reads so many: each takes longer there.
TOKENS_OF_DEEP = 32

# Fields of GPTConfig that do not change what a model computes once it is trained: they can differ
# from those it was saved with.
RUNTIME_FIELDS = ("dropout", "flash", "pad_vocab", "recompute")
# Fields that the files decide.
FIELDS_OF_GPT2 = (*SHAPE, "bias", "exact_gelu")


class Stored(NamedTuple):
    """A model as its files have it."""

    path: Path
    config: dict  # the fields of GPTConfig that the files decide
    weights: dict[str, torch.Tensor]
    is_gpt2: bool
    probe: dict | None = None  # of a model that is not a GPT-2: see `make_probe`
    tokenizer_folders: tuple[Path, ...] = ()  # where its tokenizer may lie, the likeliest first


class ModelState(NamedTuple):
    """A model, ready to be written."""

    config: GPTConfig
    # float32, on the CPU, without the rows that pad the vocabulary.
    weights: dict[str, torch.Tensor]
    departure: str  # empty for a GPT-2, else how it differs from one
    source: str  # of a model that is not a GPT-2: the text of its model.py
    probe: dict | None


def is_conv1d(name: str) -> bool:
    """Whether GPT-2's files hold this matrix as (in, out)."""
    return name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))


# ---- Names -> folders ----------------------------------------------------------------------------


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run's folder (step_0000100, ...), oldest first; empty if none."""
    folders = []
    for path in Path(run).glob("step_*"):
        if path.is_dir() and path.name.removeprefix("step_").isdecimal():
            folders.append(path)
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """step_0000100 -> 100."""
    return int(checkpoint.name.removeprefix("step_"))


def resolve(name: str | Path) -> str | Path:
    """The folder of a run -> its newest checkpoint; any other name of a model stays as it is.

    A run may be this project's, or one of transformers' Trainer (checkpoint-500) or of nanoGPT
    (ckpt.pt).
    """
    folders = checkpoints(name)
    if folders:
        return folders[-1]
    folder = Path(name)
    if not folder.is_dir() or any((folder / file).exists() for file in FIRST_FILES):
        return name
    numbered = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and path.is_dir():
            numbered[int(number)] = path
    if numbered:
        return numbered[max(numbered)]
    if (folder / "ckpt.pt").is_file():
        return folder / "ckpt.pt"
    return name


def locate(name: str | Path) -> Path:
    """The folder or file behind a name. A hub id is fetched into the hub's cache.

    ValueError if there is none.
    """
    path = Path(resolve(name))
    if path.exists():
        return path
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", str(name)):
        return fetch(f"openai-community/{name}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.parent.is_dir():
        return fetch(str(name))
    runs = [str(folder) for folder in sorted(Path("out").glob("*")) if checkpoints(folder)]
    known = ", ".join(runs) or "no runs"
    raise ValueError(
        f"{name}: no such model; "
        f"name gpt2, gpt2-medium, ..., a hub id or a folder (here are {known})"
    )


def fetch(repo: str, timeout: float = 10) -> Path:
    """A model of the hub as a folder in the hub's cache.

    Its safetensors or, where it has none, its pickled weights. ValueError if it cannot be had.
    """
    from huggingface_hub import HfApi, snapshot_download

    hub.limit_waits()
    options: dict[str, Any] = dict(ignore_patterns="*/*")
    unreachable = None
    try:
        # Without a network, snapshot_download would try several times.
        HfApi().model_info(repo, revision="main", timeout=timeout)
    except Exception as error:  # of many types; the cache may have the model
        options["local_files_only"] = True
        unreachable = error
    try:
        for weights in ("*model*.safetensors", "pytorch_model*.bin"):
            wanted = [*HUB_FILES, weights]
            folder = Path(snapshot_download(repo, allow_patterns=wanted, **options))
            if any(folder.glob(weights)):
                break
        return folder
    except Exception as error:
        cause = unreachable or error
        reason = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0]
        problem = "not a folder here, and not fetched from the Hugging Face hub"
        raise ValueError(f"{repo}: {problem} ({reason})") from None


def is_gpt2_folder(folder: Path) -> bool:
    """Whether a model's folder is a Hugging Face GPT-2, and not a changed model's."""
    return not (folder / OWN_CONFIG).exists()


# ---- Reading -------------------------------------------------------------------------------------


def read(name: str | Path) -> Stored:
    """A model's settings and tensors, before it is built. ValueError if they are no model's."""
    path = locate(name)
    if path.is_dir() and not is_gpt2_folder(path):
        return read_own(path)

    tokenizer_folders: tuple[Path, ...] = (path,)
    if path.is_dir() and (path / ADAPTER_CONFIG).exists():
        config, tensors, base = read_adapter(path)
        tokenizer_folders = (path, base)
    elif path.is_dir():
        config = read_config(path / "config.json")
        tensors = read_folder(path)
    elif is_llmc(path):
        config, tensors = read_llmc(path)
    else:
        content = read_file(path)
        config, tensors = read_nanogpt(path, content)
        tokenizer_folders = find_nanogpt_data(path, content)

    weights = name_as_here(tensors, path)
    check_layers(config, weights, path)  # before anything is as large as config.json says
    # transformers finds the one matrix under either name.
    head = weights.pop("lm_head.weight", None)
    embedding = weights.get("transformer.wte.weight", head)
    if embedding is None:
        raise ValueError(f"{path}: transformer.wte.weight is missing")
    weights["transformer.wte.weight"] = embedding
    if head is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{path}: lm_head differs from the token embedding; GPT-2 shares one matrix for both"
        )
    if path.is_dir():
        if head is None and not config.pop("tied"):
            raise ValueError(f"{path}: tie_word_embeddings is False, but lm_head.weight is missing")
        config.pop("tied", None)
        for key in weights:
            if is_conv1d(key):
                if weights[key].dim() != 2:
                    raise ValueError(f"{path}: {key} is {tuple(weights[key].shape)}, no matrix")
                weights[key] = weights[key].t()
    # Trained further in transformers, where a GPT-2 always has biases.
    if any(tensor.any() for key, tensor in weights.items() if key.endswith("bias")):
        config["bias"] = True
    weights = drop_extras(weights, config, path)
    check(config, weights, path)
    return Stored(path, config, weights, is_gpt2=True, tokenizer_folders=tokenizer_folders)


def read_folder(folder: Path) -> dict:
    """The tensors of a Hugging Face folder, under the names that they have there."""
    # A large model comes in parts, such as model-00001-of-00004.safetensors.
    files = sorted(folder.glob("model*.safetensors"))
    files = files or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(
            f"{folder}: no model.safetensors in this folder; a checkpoint has it beside config.json"
        )
    tensors: dict = {}
    for file in files:
        tensors.update(read_file(file))
    return tensors


def name_as_here(tensors: dict, path: Path) -> dict[str, torch.Tensor]:
    """The tensors with model.py's names: without wrappers' prefixes, and with "transformer."."""
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: not a table of names and tensors")
        if ".lora_A." in key or ".base_layer." in key:
            raise ValueError(
                f"{path}: {key} is part of a PEFT adapter that is not merged; "
                "save the model after merge_and_unload()"
            )
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        if parts[0] not in ("transformer", "lm_head", *OTHER_HEADS):
            parts.insert(0, "transformer")
        name = ".".join(parts)
        if name in weights and not torch.equal(weights[name], tensor):
            raise ValueError(f"{path}: {key} is there twice, with different numbers")
        weights[name] = tensor
    return weights


def drop_extras(
    weights: dict[str, torch.Tensor], config: dict, path: Path
) -> dict[str, torch.Tensor]:
    """Without what no language model needs: buffers of constants, and other heads (with a line)."""
    expected = parameter_shapes(config | dict(bias=True))
    kept = {}
    other_heads = []
    for name, tensor in weights.items():
        if name.split(".")[0] in OTHER_HEADS:
            other_heads.append(name)
        elif name in expected or not is_constant(name, tensor):
            kept[name] = tensor
    if other_heads and os.environ.get("RANK", "0") == "0":
        print_note(
            f"NOTE: {path}: {other_heads[0]} is no part of the language model; "
            f"left out ({len(other_heads)} such tensors)"
        )
    return kept


def is_constant(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a buffer that any program can make anew.

    It is attention's triangle of ones (a mask, whatever its name), the positions 0, 1, 2, ..., or a
    single number.
    """
    if name.endswith((".attn.bias", ".attn.masked_bias")) or tensor.numel() == 1:
        return True
    T = tensor.shape[-1]
    if tensor.numel() == T:
        return torch.equal(tensor.flatten().long(), torch.arange(T))
    if tensor.numel() != T * T:
        return False
    square = tensor.reshape(T, T)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    # As ones and zeros, as the opposite, or as zeros and -inf to be added.
    return any(torch.equal(square.bool(), mask) for mask in (seen, ~seen))


def drop_rows(stored: Stored, n_tokens: int) -> Stored:
    """The model with its first n_tokens tokens only: those behind are never predicted."""
    name = "transformer.wte.weight"
    weights = stored.weights | {name: stored.weights[name][:n_tokens]}
    return stored._replace(config=stored.config | dict(vocab_size=n_tokens), weights=weights)


def read_adapter(folder: Path) -> tuple[dict, dict, Path]:
    """Config, tensors and base folder of a PEFT adapter, which `peft` merges into its base.

    ValueError if there is no `peft` here, or if it cannot.
    """
    file = folder / ADAPTER_CONFIG
    try:
        base_name = parse_json(file.read_bytes(), allow_nan=True)["base_model_name_or_path"]
        base = locate(base_name)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: a PEFT adapter, and the model it belongs to is not here ({error})"
        ) from None
    config = read_config(base / "config.json")
    try:
        from peft import PeftModel  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            f"{folder}: a PEFT adapter of {base_name}, not a model; pip install peft, "
            "or save the model after merge_and_unload()"
        ) from None
    from transformers import GPT2LMHeadModel

    try:
        plain = GPT2LMHeadModel.from_pretrained(base, torch_dtype=torch.float32)
        merged = PeftModel.from_pretrained(plain, folder).merge_and_unload()
    except Exception as error:  # of many types: tensors that do not fit, a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{folder}: peft cannot merge this adapter ({reason})") from None
    return config, merged.state_dict(), base


def check_layers(config: dict, weights: dict[str, torch.Tensor], path: Path) -> None:
    """ValueError unless there are tensors of as many layers as the config says."""
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(layers) != config["n_layer"]:
        raise ValueError(
            f"{path}: n_layer is {config['n_layer']}, "
            f"but the file has the tensors of {len(layers)} layers"
        )


def check(config: dict, weights: dict[str, torch.Tensor], path: Path) -> None:
    """ValueError unless the tensors are those of a GPT-2 of this shape.

    Biases of zeros may be left over in a model without bias.
    """
    expected = parameter_shapes(config)
    for name, shape in expected.items():
        stored_shape = tuple(weights[name].shape) if name in weights else "missing"
        if stored_shape != shape:
            raise ValueError(
                f"{path}: {name} is {stored_shape}, "
                f"but a GPT-2 of this config has it with the shape {shape}"
            )
    extra = []
    for name, tensor in weights.items():
        left_over = not config["bias"] and name.endswith("bias") and not tensor.any()
        if name not in expected and not left_over:
            extra.append(name)
    if extra:
        raise ValueError(f"{path}: {extra[0]} has no place in a GPT-2 ({len(extra)} such tensors)")


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every parameter of a GPT-2 -> its shape, in nn.Linear's orientation."""
    V = config["vocab_size"]
    T = config["block_size"]
    C = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.ln_f.weight": (C,)}
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        shapes[f"{block}.ln_1.weight"] = (C,)
        shapes[f"{block}.ln_2.weight"] = (C,)
        shapes[f"{block}.attn.c_attn.weight"] = (3 * C, C)
        shapes[f"{block}.attn.c_proj.weight"] = (C, C)
        shapes[f"{block}.mlp.c_fc.weight"] = (4 * C, C)
        shapes[f"{block}.mlp.c_proj.weight"] = (C, 4 * C)
    if config["bias"]:
        for name, shape in list(shapes.items()):
            shapes[name.removesuffix("weight") + "bias"] = shape[:1]
    shapes["transformer.wte.weight"] = (V, C)
    shapes["transformer.wpe.weight"] = (T, C)
    return shapes


def read_config(file: Path) -> dict:
    """config.json -> fields of GPTConfig.

    ValueError for what GPT-2 can be told to do differently and model.py does not do.
    """
    try:
        hf = parse_json(file.read_bytes(), allow_nan=True)
        config = {name: hf[theirs] for name, theirs in SHAPE.items()}
        for size in config.values():
            if type(size) is not int or size < 1:
                raise TypeError(f"sizes are not positive integers: {config}")
    except FileNotFoundError:
        raise ValueError(
            f"{file.parent}: no config.json in this folder; a checkpoint has one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: not the config.json of a GPT-2 ({reason})") from None

    if hf.get("n_inner") == 4 * config["n_embd"]:
        hf["n_inner"] = None  # the same, spelled out
    for name, value in ONLY.items():
        if hf.get(name, value) != value:
            raise ValueError(
                f"{file}: {name} is {hf[name]!r}; this model is GPT-2 with {value!r} only"
            )
    activation = str(hf.get("activation_function", "gelu_new"))
    if activation not in GELU:
        raise ValueError(
            f"{file}: activation_function is {activation!r}; this model has gelu_new or gelu"
        )
    config["bias"] = bool(hf.get("bias", True))
    config["exact_gelu"] = GELU[activation]
    config["tied"] = bool(hf.get("tie_word_embeddings", True))
    return config


# What stands beside the weights in people's checkpoints and is not needed: a loss of numpy's, a
# path, torch's version.
IGNORED = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Float16", "Int64", "Int32")),
    "_codecs.encode",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "torch.torch_version.TorchVersion",
)


class Ignored:
    """Stands in a pickle for what is not needed. It does nothing with what it is given."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def read_file(file: Path) -> dict:
    """The content of a .safetensors or pickled file. Nothing in a pickle is executed."""
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # build-nanogpt pickles an object of its class GPTConfig; a namespace stands in for it.
        stand_ins: list = [(SimpleNamespace, "__main__.GPTConfig")]
        stand_ins += [(Ignored, name) for name in IGNORED]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs:
            reason = f"{needs[1]} in it could run code"
        else:
            reason = f"damaged, or half copied: {type(error).__name__}"
        raise ValueError(f"{file}: not a file of weights ({reason})") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{file}: holds a {kind}, not a table of names and tensors")
    return content


def read_nanogpt(file: Path, content: dict) -> tuple[dict, dict]:
    """Config and tensors of nanoGPT's ckpt.pt or build-nanogpt's model_*.pt."""
    try:
        from_nanogpt = "model_args" in content
        options = dict(content["model_args"] if from_nanogpt else vars(content["config"]))
        config = {name: options[name] for name in SHAPE}
        config["bias"] = bool(options.get("bias", True))
        # nanoGPT took the exact GELU in June 2023, months after its option `bias`. build-nanogpt
        # has GPT-2's.
        config["exact_gelu"] = from_nanogpt and "bias" in options
        tensors = dict(content["model"].items())
        if config["vocab_size"] == 50304:  # GPT-2's 50257, rounded up for the matmul
            config["vocab_size"] = 50257
            for name in tensors:
                if str(name).endswith(("wte.weight", "lm_head.weight")):
                    tensors[name] = tensors[name][:50257]
        return config, tensors
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not nanoGPT's ckpt.pt ({error!r}); for weights alone, name their folder"
        ) from None


def find_nanogpt_data(file: Path, content: dict) -> tuple[Path, ...]:
    """Where the meta.pkl of a ckpt.pt may lie: beside it, or where nanoGPT's sample.py looks."""
    folders = [file.parent]
    config = content.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    if isinstance(dataset, str):
        name = Path(dataset).name
        folders.append(file.absolute().parent.parent / "data" / name)
        folders.append(Path("data") / name)
    return tuple(folders)


LLMC_MAGIC = 20240326  # a file's first number
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # version of the format -> dtype
LLMC_HEADER = 1024  # bytes: 256 int32


def is_llmc(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == LLMC_MAGIC.to_bytes(4, "little")


def read_llmc(file: Path) -> tuple[dict, dict]:
    """Config and tensors of llm.c's gpt2_124M.bin or model_*.bin.

    See write_model in llm.c's train_gpt2.py. Behind the header are the numbers alone: both
    embeddings; then, one kind of parameter after the other, that of every layer; then the last
    LayerNorm. The token embedding has rows of zeros up to a multiple of 128.
    """
    size = file.stat().st_size
    if size < LLMC_HEADER:
        raise ValueError(f"{file}: damaged, or half copied: it ends within llm.c's header")
    header = read_numbers(file, 0, 8, torch.int32).tolist()
    _, version, T, V, n_layer, n_head, C, rows = header
    if version not in LLMC_DTYPES:
        raise ValueError(
            f"{file}: version {version} of llm.c's format; this reads 3 (float32) and 5 (bfloat16)"
        )
    dtype = LLMC_DTYPES[version]
    n_numbers = (rows + T) * C + n_layer * (12 * C * C + 13 * C) + 2 * C
    expected = LLMC_HEADER + dtype.itemsize * n_numbers
    if min(T, V, n_layer, n_head, C) < 1 or rows < V or size != expected:
        raise ValueError(
            f"{file}: damaged, or half copied: "
            f"it has {size:,} bytes, but its header says {expected:,}"
        )

    config = dict(vocab_size=V, block_size=T, n_layer=n_layer, n_head=n_head, n_embd=C, bias=True)
    shapes = parameter_shapes(config | dict(vocab_size=rows))
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            for layer in range(n_layer):
                names.append(f"transformer.h.{layer}.{part}.{kind}")
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    numbers = read_numbers(file, LLMC_HEADER, n_numbers, dtype)
    tensors = {}
    for name, flat in zip(names, numbers.split([math.prod(shapes[name]) for name in names])):
        tensors[name] = flat.view(shapes[name])
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V]
    return config, tensors


def read_numbers(file: Path, start: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """The n numbers that begin at byte `start`. ValueError if the file ends before them.

    They are read, not mapped: if another program cut a mapped file, the next look at what is gone
    would end this process without a word.
    """
    numbers = torch.empty(n, dtype=dtype)
    with file.open("rb") as stream:
        stream.seek(start)
        n_bytes = stream.readinto(numbers.view(torch.uint8).numpy().data)
    if n_bytes != n * dtype.itemsize:
        raise ValueError(f"{file}: was cut while it was read")
    return numbers


def read_own(folder: Path) -> Stored:
    """A model that is not a GPT-2, as `write` has written it."""
    file = folder / OWN_CONFIG
    try:
        content = parse_json(file.read_bytes(), allow_nan=True)
        if content["format"] != OWN_FORMAT:
            raise ValueError(f"format {content['format']}; this reads {OWN_FORMAT}")
        config = dict(content["config"])
        probe = dict(content["probe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    if not (folder / OWN_WEIGHTS).exists():
        raise ValueError(f"{folder}: no {OWN_WEIGHTS} beside {OWN_CONFIG}; copy the folder whole")
    weights = read_file(folder / OWN_WEIGHTS)
    return Stored(folder, config, weights, is_gpt2=False, probe=probe)


# ---- From files to a model -----------------------------------------------------------------------


def make_config(cls: type, stored: Stored, settings: dict) -> GPTConfig:
    """The GPTConfig of a stored model: its files decide the shape, `settings` the rest.

    A field that somebody added to GPTConfig is the file's too, unless `settings` has it with
    another value than its default: then it was set by hand. ValueError if the files have settings
    that this model.py does not know.
    """
    config = settings | stored.config
    for field in dataclasses.fields(cls):
        name = field.name
        if name not in settings:
            continue
        is_own = name not in FIELDS_OF_GPT2 and settings[name] != field.default
        if name in RUNTIME_FIELDS or is_own:
            config[name] = settings[name]
    unknown = config.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{stored.path}: model.py has no setting {names}; {own_model(stored)}")
    return cls(**config)


@torch.no_grad()
def load(model: GPT, stored: Stored) -> None:
    """Copy the stored tensors into a model, which need not be initialised. ValueError if they do
    not fit.

    Where model.py has been changed, tensors of a GPT-2 that it has no place for are left out, and
    what it has beyond a GPT-2 keeps its initial values: one line on stderr says so.
    """
    parameters = own_tensors(model)
    missing = sorted(parameters.keys() - stored.weights.keys())
    extra = sorted(stored.weights.keys() - parameters.keys())
    if stored.is_gpt2 and not stored.config["bias"]:
        extra = [name for name in extra if not name.endswith("bias")]  # zeros
    if not stored.is_gpt2 and (missing or extra):
        different = f"model.py has no {extra[0]}" if extra else f"{missing[0]} is not in it"
        raise ValueError(f"{stored.path}: {different}; {own_model(stored)}")

    if missing:
        model.init_weights()
    for name, parameter in parameters.items():
        if name not in stored.weights:
            continue
        value = stored.weights[name]
        rows = parameter
        if name == "transformer.wte.weight":
            rows = parameter[: len(value)]
            parameter[len(value) :] = 0.0  # these pad the vocabulary
        if rows.shape != value.shape:
            raise ValueError(
                f"{stored.path}: {name} is {tuple(value.shape)}, "
                f"in model.py it is {tuple(rows.shape)}; {own_model(stored)}"
            )
        # A buffer may hold whole numbers or truth values; weights come in any precision.
        if not value.is_floating_point() and value.dtype != rows.dtype:
            raise ValueError(
                f"{stored.path}: {name} holds {value.dtype}, in model.py it holds {rows.dtype}"
            )
        rows.copy_(value)

    if not stored.is_gpt2:
        compare_with_probe(model, stored)
        return
    cls: Any = type(model)
    departure = compare_with_gpt2(cls, model.config, n_tokens=64)
    if departure and os.environ.get("RANK", "0") == "0":
        left_out = f"; {len(extra)} of its tensors are left out" if extra else ""
        new = f"; {missing[0]} and the like keep their initial values" if missing else ""
        print_note(
            f"NOTE: {stored.path} is a GPT-2, and model.py is not one ({departure}): "
            f"it computes something else with these weights{left_out}{new}"
        )


def own_model(stored: Stored) -> str:
    """What to do about a checkpoint that this model.py does not fit."""
    if stored.is_gpt2:
        return "this model.py is not GPT-2's any more; train it from scratch"
    saved = stored.path / OWN_MODEL
    return f"the model.py that made it is {saved}; copy it over model.py (keep yours) to use it"


def compare_with_probe(model: GPT, stored: Stored) -> None:
    """ValueError unless the model computes what the one that was saved computed.

    One whose settings were changed by hand may compute something else. If only what model.py
    imports can have changed, a line on stderr says so.
    """
    assert stored.probe is not None
    for name, value in stored.config.items():
        if name not in RUNTIME_FIELDS and getattr(model.config, name) != value:
            return
    expected = torch.tensor(stored.probe["logits"])
    logits = torch.tensor(make_probe(model)["logits"])
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
        saved_source = stored.path / OWN_MODEL
        if saved_source.exists() and saved_source.read_text(encoding="utf-8") == source_of(model):
            if os.environ.get("RANK", "0") == "0":
                print_note(
                    f"NOTE: {stored.path}: model.py is the one that made it, but computes "
                    "something else now: a file that it imports has changed, or it draws random "
                    "numbers in evaluation"
                )
            return
        raise ValueError(
            f"{stored.path}: model.py has the same tensors but computes something else with them; "
            f"{own_model(stored)}"
        )


# ---- Is it a GPT-2? ------------------------------------------------------------------------------


def departure_from_gpt2(model: GPT) -> str:
    """Empty if the model, with the weights it has, is a GPT-2 to all other programs.

    Otherwise how it differs, in words. Numbers decide: the weights as they would be exported, put
    through a plain GPT-2, must give the model's own logits.
    """
    cls: Any = type(model)
    departure = compare_with_gpt2(cls, model.config, n_tokens=1024)
    if departure:
        return departure
    return compare_logits(model, n_tokens=32, tolerance=1e-3)


@functools.cache
def compare_with_gpt2(cls: Any, config: GPTConfig, n_tokens: int) -> str:
    """The same for any weights: by stand-ins of this class and config."""
    with exact_arithmetic():
        departure = compare_logits(make_standin(cls, config), n_tokens, TOLERANCE)
        if not departure:
            deep = make_standin(cls, config, deep=True)
            departure = compare_logits(deep, min(n_tokens, TOKENS_OF_DEEP), TOLERANCE)
    return departure


@torch.no_grad()
def compare_logits(model: GPT, n_tokens: int, tolerance: float) -> str:
    """Empty if a plain GPT-2 gives the model's logits; else the difference, in words."""
    tensors = own_tensors(model)
    config = vars(model.config)
    expected = parameter_shapes(config | dict(bias=True))
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name == "transformer.wte.weight":
            shape = (model.config.vocab_size, *shape[1:])
        if name not in expected:
            return f"{name} has no place in it"
        if shape != expected[name]:
            return f"{name} is {shape} instead of {expected[name]}"
    for name in expected:
        if name not in tensors and not name.endswith("bias"):
            return f"it has no {name}"

    hf_config, hf_tensors = export(model.config, tensors, end_of_text=None)
    T = min(n_tokens, model.config.block_size)
    idx = probe_ids(model, T)
    was_training = model.training
    model.eval()
    logits = model(idx)
    model.train(was_training)
    plain = gpt2_logits(hf_config, hf_tensors, idx)
    difference = (logits - plain).abs().max().item()
    if difference <= tolerance * plain.abs().max().item():
        return ""
    return f"its logits differ from a GPT-2's by up to {difference:.2g}"


def gpt2_logits(config: dict, tensors: dict[str, torch.Tensor], idx: torch.Tensor) -> torch.Tensor:
    """GPT-2 (Radford et al. 2019) as a function of config.json and of model.safetensors' tensors.

    Token ids (B, T) -> logits (B, T, V).
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = tensors[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, tensors[f"{name}.bias"], 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    B, T = idx.shape
    C = config["n_embd"]
    heads = config["n_head"]
    approximate = "none" if config["activation_function"] == "gelu" else "tanh"
    x = tensors["transformer.wte.weight"][idx] + tensors["transformer.wpe.weight"][:T]
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = qkv.view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + linear(y, f"{block}.attn.c_proj")
        y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(F.gelu(y, approximate=approximate), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ tensors["transformer.wte.weight"].t()


# ---- From a model to files -----------------------------------------------------------------------


def own_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """The model's parameters and persistent buffers, each once: the tied head counts as wte."""
    tensors = {}
    known = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known.add(id(tensor))
            tensors[name] = tensor
    return tensors


def copy_state(model: GPT, departure: str, live: bool = False) -> ModelState:
    """A copy of the model in memory, as `write` takes it. departure: see `departure_from_gpt2`.

    live: of what the optimizer updates, the parameters themselves if they are on the CPU.
    """
    weights = {}
    for name, tensor in own_tensors(model).items():
        copy = not (live and isinstance(tensor, torch.nn.Parameter))
        if name == "transformer.wte.weight":
            tensor = tensor[: model.config.vocab_size]
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        weights[name] = tensor.detach().to("cpu", dtype, copy=copy)
    if not departure:
        return ModelState(model.config, weights, "", "", None)
    return ModelState(model.config, weights, departure, source_of(model), make_probe(model))


def source_of(model: GPT) -> str:
    """The text of the model.py that the model comes from."""
    file = inspect.getsourcefile(type(model))
    assert file is not None
    return Path(file).read_text(encoding="utf-8")


def probe_ids(model: GPT, T: int) -> torch.Tensor:
    """The same (1, T) ids each time, spread over the vocabulary."""
    device = next(model.parameters()).device
    return (torch.arange(T, device=device) * 7919 % model.config.vocab_size)[None]


@torch.no_grad()
def make_probe(model: GPT) -> dict:
    """Some logits by which another model.py can be told from the one that made a checkpoint."""
    T = min(64, model.config.block_size)
    precision = torch.get_float32_matmul_precision()
    was_training = model.training
    model.eval()
    torch.set_float32_matmul_precision("highest")
    logits = model(probe_ids(model, T))[0, [0, T // 2, T - 1], :32]
    torch.set_float32_matmul_precision(precision)
    model.train(was_training)
    return dict(n_tokens=T, logits=logits.float().tolist())


def export(
    config: GPTConfig, weights: dict[str, torch.Tensor], end_of_text: int | None
) -> tuple[dict, dict]:
    """config.json and the tensors of model.safetensors, as transformers' GPT-2 has them."""
    tensors = {}
    for name, value in weights.items():
        if name == "transformer.wte.weight":
            value = value[: config.vocab_size]
        tensors[name] = value.t() if is_conv1d(name) else value
    # transformers' GPT-2 always has biases.
    for name, shape in parameter_shapes(vars(config) | dict(bias=True)).items():
        if name not in tensors:
            like = weights["transformer.wte.weight"]
            tensors[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)

    hf: dict[str, Any] = dict(ONLY)
    hf.update(architectures=["GPT2LMHeadModel"], dtype="float32", initializer_range=0.02)
    hf["activation_function"] = "gelu" if config.exact_gelu else "gelu_new"
    for name, theirs in SHAPE.items():
        hf[theirs] = getattr(config, name)
    hf["n_ctx"] = config.block_size
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        hf[name] = config.dropout
    hf["tie_word_embeddings"] = True
    hf["bos_token_id"] = end_of_text
    hf["eos_token_id"] = end_of_text
    # This project's own: False means that the biases in the file are all zero.
    hf["bias"] = config.bias
    return hf, tensors


def write(
    folder: Path, state: ModelState, end_of_text: int | None, snapshot: Snapshot | None = None
) -> list[str]:
    """Write a model into a folder; returns the names of the files.

    end_of_text: the tokenizer's id for it, at which other programs stop; None if it has none.
    snapshot: of the weights, if training changes them meanwhile.
    """
    snapshot = snapshot or Snapshot()
    folder.mkdir(parents=True, exist_ok=True)
    if state.departure:
        content = dict(
            format=OWN_FORMAT,
            not_a_gpt2=state.departure,
            config=vars(state.config),
            probe=state.probe,
        )
        (folder / OWN_MODEL).write_text(state.source, encoding="utf-8")
        tensors = state.weights
        config_file, weights_file = OWN_CONFIG, OWN_WEIGHTS
    else:
        content, tensors = export(state.config, state.weights, end_of_text)
        # Without it, transformers' pipeline writes 256 tokens, past a small model's context.
        generation = dict(
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            max_length=state.config.block_size,
        )
        text = json.dumps(generation, indent=2) + "\n"
        (folder / GENERATION_CONFIG).write_text(text)
        config_file, weights_file = "config.json", "model.safetensors"

    (folder / config_file).write_text(json.dumps(content, indent=2) + "\n")
    snapshot.write_safetensors(tensors, folder / weights_file)
    return [config_file, weights_file] + ([OWN_MODEL] if state.departure else [])
