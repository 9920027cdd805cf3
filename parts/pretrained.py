"""Models as files: Hugging Face folders and the hub, a run's checkpoints, and those of nanoGPT and
llm.c.

`read` gives a shape and tensors, `write` takes them; neither knows the network. Inside this project
a tensor has the name of its parameter in model.py, such as transformer.h.0.attn.c_attn.weight, and
nn.Linear's orientation (out, in). GPT-2's files hold those matrices as (in, out): its authors wrote
the layers as one-dimensional convolutions.
"""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

# The sizes of a model: GPTConfig's names -> config.json's
SHAPE = dict(
    vocab_size="vocab_size",
    block_size="n_positions",
    n_layer="n_layer",
    n_head="n_head",
    n_embd="n_embd",
)

# What config.json may say otherwise and model.py does not do.
ONLY = {
    "model_type": "gpt2",
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
GELU = {
    "gelu_new": False,
    "gelu": True,
}  # config.json's activation_function -> GPTConfig's exact_gelu


def is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))


# ---- Names -> folders ----------------------------------------------------------------------------


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run's folder (step_0000100, step_0000200, ...), oldest first; empty if
    there are none.
    """
    folders = [
        path for path in Path(run).glob("step_*") if path.is_dir() and path.name[5:].isdecimal()
    ]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def resolve(name: str | Path) -> str | Path:
    """A run's folder -> its newest checkpoint; any other name of a model stays as it is."""
    return checkpoints(name)[-1] if checkpoints(name) else name


def locate(name: str | Path) -> Path:
    """The folder or file behind a name; a hub id is fetched into the hub's cache. ValueError if
    there is none.
    """
    path = Path(resolve(name))
    if path.exists():
        return path
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", str(name)):
        return fetch(f"openai-community/{name}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.parent.is_dir():
        return fetch(str(name))
    runs = (
        ", ".join(str(run) for run in sorted(Path("out").glob("*")) if checkpoints(run))
        or "no runs"
    )
    raise ValueError(
        f"{name}: no such model; name gpt2, gpt2-medium, ..., a hub id or a folder (here are {runs})"
    )


def fetch(repo: str, timeout: float = 10) -> Path:
    """A model of the hub as a folder in the hub's cache: its safetensors or, where it has none, its
    pickled weights.
    """
    from huggingface_hub import HfApi, snapshot_download

    options, why = dict(ignore_patterns="*/*"), None
    try:
        HfApi().model_info(
            repo, revision="main", timeout=timeout
        )  # snapshot_download might wait for ever
    except Exception as error:  # of many types; the cache may have the model
        options["local_files_only"], why = True, error
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            wanted = ["config.json", "tokenizer.json", weights]
            folder = Path(snapshot_download(repo, allow_patterns=wanted, **options))
            if any(folder.glob(weights)):
                break
        return folder
    except Exception as error:
        reason = f"{type(why or error).__name__}: {str(why or error).strip()}".splitlines()[0]
        raise ValueError(
            f"{repo}: not a folder here, and not fetched from the Hugging Face hub ({reason})"
        ) from None


# ---- Reading -------------------------------------------------------------------------------------


def read(name: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Shape (fields of GPTConfig) and tensors of a model, before it is built. ValueError if they
    are not a GPT-2's.
    """
    path = locate(name)
    is_folder = path.is_dir()
    if is_folder:
        shape = read_config(path / "config.json")
        # A large model comes in parts, such as model-00001-of-00004.safetensors.
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(
                f"{path}: no model.safetensors in this folder; a checkpoint has it beside config.json"
            )
        state = {name: tensor for file in files for name, tensor in read_file(file).items()}
    else:
        shape, state = read_llmc(path) if is_llmc(path) else read_nanogpt(path)
    if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items()):
        raise ValueError(f"{path}: not a table of names and tensors")

    # Some files have names without "transformer.", attention's triangle of ones as a buffer, or the
    # tied head again.
    state = {
        ("" if n.startswith(("transformer.", "lm_head.")) else "transformer.") + n: t
        for n, t in state.items()
    }
    state = {n: t for n, t in state.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    head, embedding = state.pop("lm_head.weight", None), state.get("transformer.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{path}: lm_head differs from the token embedding; GPT-2 shares one matrix for both"
        )
    if is_folder:
        state = {n: t.t() if is_conv1d(n) else t for n, t in state.items()}
    check(shape, state, path)
    return shape, state


def check(shape: dict, state: dict[str, torch.Tensor], path: Path) -> None:
    """ValueError unless the tensors are those of a GPT-2 of this shape. Zero biases may be left
    over without bias.
    """
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    if len(layers) != shape["n_layer"]:
        raise ValueError(
            f"{path}: n_layer is {shape['n_layer']}, but the file has the tensors of {len(layers)} layers"
        )
    expected = parameter_shapes(shape)
    for name, size in expected.items():
        found = tuple(state[name].shape) if name in state else "missing"
        if found != size:
            raise ValueError(
                f"{path}: {name} is {found}, but a GPT-2 of this config has it with the shape {size}"
            )
    extra = [
        n
        for n, t in state.items()
        if n not in expected and (shape["bias"] or not n.endswith("bias") or t.any())
    ]
    if extra:
        raise ValueError(f"{path}: {extra[0]} has no place in a GPT-2 ({len(extra)} such tensors)")


def parameter_shapes(shape: dict) -> dict[str, tuple[int, ...]]:
    """Every parameter's name -> its shape in nn.Linear's orientation."""
    V, T, n_layer, _, C = (shape[name] for name in SHAPE)
    shapes = {"transformer.ln_f.weight": (C,)}
    for layer in range(n_layer):
        block = f"transformer.h.{layer}."
        shapes |= {f"{block}{norm}.weight": (C,) for norm in ("ln_1", "ln_2")}
        shapes |= {f"{block}attn.c_attn.weight": (3 * C, C), f"{block}attn.c_proj.weight": (C, C)}
        shapes |= {f"{block}mlp.c_fc.weight": (4 * C, C), f"{block}mlp.c_proj.weight": (C, 4 * C)}
    if shape["bias"]:
        shapes |= {name.removesuffix("weight") + "bias": size[:1] for name, size in shapes.items()}
    return shapes | {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}


def read_config(file: Path) -> dict:
    """config.json -> shape. ValueError for what GPT-2 can be told to do differently and model.py
    does not do.
    """
    try:
        hf = json.loads(file.read_text())
        shape = {name: hf[theirs] for name, theirs in SHAPE.items()}
        if not all(type(size) is int and size > 0 for size in shape.values()):
            raise TypeError(f"sizes are not positive integers: {shape}")
    except FileNotFoundError:
        raise ValueError(
            f"{file.parent}: no config.json in this folder; a checkpoint has one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: not the config.json of a GPT-2 ({type(error).__name__}: {error})"
        ) from None
    for name, value in ONLY.items():
        # n_inner may be spelled out: None means four times the width.
        if hf.get(name, value) != value and (name, hf[name]) != ("n_inner", 4 * hf["n_embd"]):
            raise ValueError(
                f"{file}: {name} is {hf[name]!r}; this model is GPT-2 with {value!r} only"
            )
    activation = str(hf.get("activation_function", "gelu_new"))
    if activation not in GELU:
        raise ValueError(
            f"{file}: activation_function is {activation!r}; this model has {' or '.join(GELU)}"
        )
    return shape | dict(bias=bool(hf.get("bias", True)), exact_gelu=GELU[activation])


def read_file(file: Path) -> dict:
    """The content of a .safetensors or pickled file. Nothing in a pickle is executed."""
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # build-nanogpt pickles an object of its class GPTConfig; a namespace stands in for it.
        with torch.serialization.safe_globals([(SimpleNamespace, "__main__.GPTConfig")]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        needs = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"{needs[1]} in it could run code"
            if needs
            else f"damaged, or half copied: {type(error).__name__}"
        )
        raise ValueError(f"{file}: not a file of weights ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: holds a {type(content).__name__}, not a table of names and tensors"
        )
    return content


def read_nanogpt(file: Path) -> tuple[dict, dict]:
    """Shape and tensors of nanoGPT's ckpt.pt or build-nanogpt's model_*.pt."""
    content = read_file(file)
    try:
        options = dict(
            content["model_args"] if "model_args" in content else vars(content["config"])
        )
        shape = {name: options[name] for name in SHAPE} | dict(bias=bool(options.get("bias", True)))
        # nanoGPT took the exact GELU in June 2023, months after its option `bias`. build-nanogpt
        # has GPT-2's.
        shape["exact_gelu"] = "model_args" in content and "bias" in options
        state = {
            str(name).removeprefix("_orig_mod."): tensor
            for name, tensor in content["model"].items()
        }
        if shape["vocab_size"] == 50304:  # GPT-2's 50257, rounded up for the matmul
            shape["vocab_size"] = 50257
            state |= {
                name: state[name][:50257] for name in ("transformer.wte.weight", "lm_head.weight")
            }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not nanoGPT's ckpt.pt ({error!r}); for weights alone, name their folder"
        ) from None
    return shape, state


LLMC_MAGIC, LLMC_DTYPES = (
    20240326,
    {3: torch.float32, 5: torch.bfloat16},
)  # a file's first number; version -> dtype
LLMC_HEADER = 1024  # bytes: 256 int32


def is_llmc(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == LLMC_MAGIC.to_bytes(4, "little")


def read_llmc(file: Path) -> tuple[dict, dict]:
    """Shape and tensors of llm.c's gpt2_124M.bin or model_*.bin, mapped into memory (write_model in
    its train_gpt2.py).

    Behind the header stand the numbers alone: both embeddings; then, one kind of parameter after
    the other, that of every layer; then the last LayerNorm. The token embedding has rows of zeros
    up to a multiple of 128.
    """
    size = file.stat().st_size
    if size < LLMC_HEADER:
        raise ValueError(f"{file}: damaged, or half copied: it ends within llm.c's header")
    _, version, T, V, n_layer, n_head, C, rows = torch.from_file(
        str(file), size=8, dtype=torch.int32
    ).tolist()
    if version not in LLMC_DTYPES:
        raise ValueError(
            f"{file}: version {version} of llm.c's format; this reads 3 (float32) and 5 (bfloat16)"
        )
    dtype = LLMC_DTYPES[version]
    expected = LLMC_HEADER + dtype.itemsize * (
        (rows + T) * C + n_layer * (12 * C * C + 13 * C) + 2 * C
    )
    if min(T, V, n_layer, n_head, C) < 1 or rows < V or size != expected:
        raise ValueError(
            f"{file}: damaged, or half copied: it has {size:,} bytes, but its header says {expected:,}"
        )
    shape = dict(vocab_size=V, block_size=T, n_layer=n_layer, n_head=n_head, n_embd=C, bias=True)
    sizes = parameter_shapes(shape | dict(vocab_size=rows))
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{layer}.{part}.{kind}" for layer in range(n_layer)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    content = torch.from_file(str(file), size=expected // dtype.itemsize, dtype=dtype)
    parts = content[LLMC_HEADER // dtype.itemsize :].split(
        [math.prod(sizes[name]) for name in names]
    )
    state = {name: part.view(sizes[name]) for name, part in zip(names, parts)}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:V]
    return shape, state


# ---- Writing -------------------------------------------------------------------------------------


def write(folder: str | Path, config, weights: dict[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors as transformers' GPT2LMHeadModel does. `config` is a
    GPTConfig.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.t().contiguous() if is_conv1d(name) else value
        for name, value in weights.items()
    }
    shapes = parameter_shapes(
        vars(config) | dict(bias=True)
    )  # transformers' GPT-2 always has biases
    state |= {name: torch.zeros(size) for name, size in shapes.items() if name not in state}
    hf = ONLY | dict(architectures=["GPT2LMHeadModel"], dtype="float32", initializer_range=0.02)
    hf["activation_function"] = "gelu" if config.exact_gelu else "gelu_new"
    hf |= {theirs: getattr(config, name) for name, theirs in SHAPE.items()} | dict(
        n_ctx=config.block_size
    )
    hf |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    # End of text is the last id in every tokenizer of this project, as in GPT-2's.
    hf |= dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1)
    hf["bias"] = (
        config.bias
    )  # this project's own: False means that the biases in the file are all zero
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(
        folder / "config.json", folder / "model.safetensors"
    )  # safetensors gives access to the owner only
