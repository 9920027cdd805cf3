"""Models as files: Hugging Face folders in every form, other people's checkpoints, and files that
do not fit.
"""

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys

from model import GPT, MLP, GPTConfig, Linear, open_model
from parts import inference, pretrained
from parts.auto import prepare_for_inference
from parts.pretrained import checkpoints, departure_from_gpt2, resolve
from parts.runtime import Runtime
from parts.tokenizer import get_tokenizer, save_tokenizer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ids, make_toy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

WEIGHTS = "model.safetensors"
SHAPE = dict(n_layer=2, n_head=1, n_embd=8, block_size=4, vocab_size=9)


def test_save_and_load_is_exact(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path, dropout=0.25)
    assert again.config.dropout == 0.25
    for (name, one), two in zip(toy.named_parameters(), again.parameters()):
        assert torch.equal(one, two), name


def test_no_weights_are_drawn_for_what_is_loaded(tmp_path, monkeypatch):
    """Nothing of what memory held before stays either."""
    toy = make_toy(vocab_size=9)  # padded to 64 rows
    toy.save_pretrained(tmp_path)
    monkeypatch.setattr(GPT, "init_weights", lambda self: pytest.fail("weights were drawn"))
    stored = pretrained.read(tmp_path)
    model = GPT(pretrained.make_config(GPTConfig, stored, {}), initialise=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.fill_(float("nan"))
    pretrained.load(model, stored)
    for (name, one), two in zip(toy.named_parameters(), model.named_parameters()):
        assert torch.equal(one, two[1]), name
    idx = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(idx), toy.eval()(idx))


def test_loads_the_hubs_old_names(tmp_path, toy):
    """The hub's gpt2 has no leading "transformer." and carries attention's triangle of ones as a
    buffer.
    """
    toy.save_pretrained(tmp_path)
    state = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }
    state["h.0.attn.bias"], state["h.0.attn.masked_bias"] = (
        torch.ones(1, 1, 16, 16).tril(),
        torch.tensor(-1e4),
    )
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, tmp_path / WEIGHTS)
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(ids(1, 16)), toy(ids(1, 16)))
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="shares one matrix"):
        GPT.from_pretrained(tmp_path)


def reconfigure(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="llama"), "model_type is 'llama'"),
        (dict(n_inner=100), "n_inner is 100"),
        (
            dict(activation_function="relu"),
            "config.json: activation_function is 'relu'; this model has gelu_new or gelu",
        ),
        (dict(activation_function=["gelu"]), "activation_function is .*; this model has"),
        (
            dict(tie_word_embeddings=False),
            "tie_word_embeddings is False, but lm_head.weight is missing",
        ),
        (dict(n_head=5), "n_embd 32 is not divisible by n_head 5"),
        (
            dict(n_embd=64),
            "ln_f.weight is .32,., but a GPT-2 of this config has it with the shape .64,.",
        ),
        (dict(n_layer=10**9), "n_layer is 1000000000, but"),  # at once, before anything is built
    ],
)
def test_folders_that_do_not_fit(tmp_path, toy, change, message):
    toy.save_pretrained(tmp_path)
    reconfigure(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_biases_are_as_config_json_says(tmp_path, toy):
    make_toy(bias=False).save_pretrained(tmp_path)
    assert not GPT.from_pretrained(tmp_path).config.bias
    toy.save_pretrained(tmp_path)
    reconfigure(tmp_path, dict(n_inner=4 * 32))  # what None means, spelled out
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(ids(1, 16)), toy(ids(1, 16)))
    # Trained further in transformers: config.json still says so, but they are zeros no more.
    reconfigure(tmp_path, dict(bias=False))
    again = GPT.from_pretrained(tmp_path)
    assert again.config.bias
    assert torch.equal(again.eval()(ids(1, 16)), toy(ids(1, 16)))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_both_forms_of_gelu_are_read_written_and_computed(tmp_path, activation):
    """The two differ by 2e-4 at most; all ways to compute the model must have the form that
    config.json names.
    """
    torch.manual_seed(1)
    shape = GPT2Config(
        vocab_size=257,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        activation_function=activation,
    )
    theirs = GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, x = GPT.from_pretrained(tmp_path / "theirs").eval(), ids(2, 24)
    assert ours.config.exact_gelu == (activation == "gelu")
    with torch.no_grad():
        logits = theirs(x).logits
    assert torch.allclose(ours(x), logits, atol=2e-5)
    other = GPT(dataclasses.replace(ours.config, exact_gelu=activation == "gelu_new")).eval()
    other.load_state_dict(ours.state_dict())
    assert not torch.allclose(other(x), logits, atol=1e-4)

    ours.save_pretrained(tmp_path / "ours")
    assert (
        json.loads((tmp_path / "ours/config.json").read_text())["activation_function"] == activation
    )
    with torch.no_grad():
        assert torch.allclose(
            GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()(x).logits, logits, atol=2e-5
        )

    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert torch.allclose(ours(x[:, :-1], x[:, 1:]), loss, atol=2e-5)
    packed, _, _ = prepare_for_inference(
        ours, Runtime(torch.device("cpu"), torch.float32), "fp32", rows=2
    )
    for token_graph in (False, True):  # the graph's arithmetic, without a GPU to capture it
        cache, _ = inference.prefill(packed, x[:, :-1].tolist(), 2)
        step = inference.TokenGraph(packed, cache) if token_graph else None
        last = step(x[:, -1:]) if step else inference.forward_cached(packed, x[:, -1:], cache)
        assert torch.allclose(last, logits[:, -1], atol=2e-5)


def test_half_copied_folders(tmp_path, toy):
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)

    toy.save_pretrained(tmp_path)
    weights, state = tmp_path / WEIGHTS, load_file(tmp_path / WEIGHTS)
    save_file(
        {name: state[name] for name in state if "h.1.mlp.c_fc.weight" not in name}, weights
    )  # a part is missing
    refused(r"transformer.h.1.mlp.c_fc.weight is missing, but")
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(r"model.safetensors: not a file of weights \(damaged, or half copied")
    weights.unlink()
    refused(r"no model.safetensors in this folder")
    for content in ([1, 2], {1: torch.zeros(1)}, {"wte.weight": "text"}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        refused(r"not a table of names and tensors")
    for text in (
        "{",
        "[]",
        '{"vocab_size": null}',
        (tmp_path / "config.json").read_text().replace("32", '"32"'),
    ):
        (tmp_path / "config.json").write_text(text)
        refused(r"config.json: not the config.json of a GPT-2")
    (tmp_path / "config.json").unlink()
    refused(r"no config.json in this folder")


@pytest.mark.parametrize(
    "form, dtype", [("whole", torch.float32), ("parts", torch.bfloat16), ("bin", torch.float16)]
)
def test_folders_of_all_forms_are_read(tmp_path, form, dtype):
    """distilgpt2's shape in small: six layers, other contexts and vocabularies; in one file, in
    parts, as a pickle.
    """
    torch.manual_seed(1)
    shape = GPT2Config(vocab_size=300, n_positions=24, n_embd=32, n_layer=6, n_head=4)
    theirs = GPT2LMHeadModel(shape).to(dtype).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB" if form == "parts" else "5GB")
    if form == "bin":
        (tmp_path / WEIGHTS).unlink()
        triangles = {
            f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(6)
        }  # of old files
        torch.save(theirs.state_dict() | triangles, tmp_path / "pytorch_model.bin")
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (form == "parts")
    ours, x = GPT.from_pretrained(tmp_path).eval(), ids(2, 24, vocab_size=300)
    assert ours.config == GPTConfig(vocab_size=300, block_size=24, n_embd=32, n_layer=6, n_head=4)
    assert torch.allclose(ours(x), theirs.float()(x).logits, atol=1e-5)


def nanogpt(model: GPT, path, prefix="", vocab_size=257) -> None:
    """Save as nanoGPT's train.py does: PyTorch's orientation, the tied head twice, padded rows
    included.
    """
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = torch.zeros(vocab_size, model.config.n_embd)
    rows[: model.config.vocab_size] = state["transformer.wte.weight"][: model.config.vocab_size]
    state["transformer.wte.weight"] = state["lm_head.weight"] = rows
    shape = vars(model.config) | dict(vocab_size=vocab_size)
    shape = {
        name: shape[name]
        for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    }
    torch.save(
        dict(
            model={prefix + name: value for name, value in state.items()},
            model_args=shape,
            iter_num=5,
        ),
        path,
    )


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoints_are_read(tmp_path, bias):
    ours = make_toy(bias=bias, exact_gelu=True)
    nanogpt(ours, tmp_path / "ckpt.pt", prefix="_orig_mod.")
    again = GPT.from_pretrained(tmp_path / "ckpt.pt", dropout=0.25).eval()
    assert again.config.dropout == 0.25
    assert torch.equal(again(ids(2, 16)), ours(ids(2, 16))) and again.config.bias == bias
    old = torch.load(tmp_path / "ckpt.pt")
    if old["model_args"].pop(
        "bias"
    ):  # before nanoGPT could leave them out, all models had them, and the tanh form
        torch.save(old, tmp_path / "old.pt")
        assert torch.equal(
            GPT.from_pretrained(tmp_path / "old.pt").eval()(ids(2, 16)), make_toy()(ids(2, 16))
        )
    padded = make_toy(vocab_size=50257, exact_gelu=True)
    nanogpt(padded, tmp_path / "padded.pt", vocab_size=50304)
    again = GPT.from_pretrained(tmp_path / "padded.pt").eval()
    assert again.config.vocab_size == 50257 and torch.equal(again(ids(1, 8)), padded(ids(1, 8)))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_pickles_that_run_code_are_refused_and_not_run(tmp_path, toy, name):
    toy.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(dict(model={}, model_args=Malicious(tmp_path / "executed")), tmp_path / name)
    where = tmp_path / name if name == "ckpt.pt" else tmp_path
    with pytest.raises(
        ValueError, match=rf"{name}: not a file of weights \(\w*.?open in it could run code\)"
    ):
        GPT.from_pretrained(where)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"wte.weight": torch.zeros(9, 8)}, "not nanoGPT's ckpt.pt .*name their folder"),
        ([1, 2], "holds a list, not a table"),
        (
            dict(model={"lm_head.weight": None}, model_args=SHAPE | dict(vocab_size=50304)),
            "not nanoGPT's ckpt.pt",
        ),
        (dict(model={"wte.weight": "text"}, model_args=SHAPE), "not a table of names and tensors"),
        (dict(model={}, model_args=SHAPE | dict(n_layer="2")), "n_layer is 2, but the file has"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: " + message):
        GPT.from_pretrained(tmp_path / "c.pt")


def test_the_newest_checkpoint_of_a_run_is_found(tmp_path, toy):
    names = ["step_0000005", "step_0000020", "step_9000000", "step_10000000"]
    for name in (*names, ".step_0000200.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_20000000").touch()
    assert [folder.name for folder in checkpoints(tmp_path)] == names
    assert resolve(tmp_path).name == "step_10000000" and resolve("gpt2") == "gpt2"
    toy.save_pretrained(tmp_path / "step_10000000")
    assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, toy.lm_head.weight)


def test_build_nanogpts_checkpoint_is_read(tmp_path, toy):
    """It pickles an object of a class GPTConfig that was defined in the script."""
    nanogpt(toy, tmp_path / "plain.pt")
    save = (
        "import torch; GPTConfig = type('GPTConfig', (), {}); c = torch.load('plain.pt'); "
        "config = GPTConfig(); config.__dict__ = c['model_args']; "
        "torch.save(dict(model=c['model'], config=config, step=9), 'model_00009.pt')"
    )
    subprocess.run([sys.executable, "-c", save], cwd=tmp_path, check=True)
    assert torch.equal(
        GPT.from_pretrained(tmp_path / "model_00009.pt").eval()(ids(1, 9)), toy(ids(1, 9))
    )


def llmc(model: GPT, path, version: int, header=None, rows=384) -> None:
    """Save as llm.c does: 256 int32, then the parameters, each kind of all layers together, without
    names.
    """
    shape = model.config
    state = pretrained.copy_state(model, departure="").weights
    numbers = dict(
        enumerate(
            [20240326, version, shape.block_size, shape.vocab_size, shape.n_layer, shape.n_head]
        )
    )
    numbers |= {6: shape.n_embd, 7: rows} | (header or {})
    names = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
    kinds = "ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight"
    kinds += " attn.c_proj.bias ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias"
    kinds += " mlp.c_proj.weight mlp.c_proj.bias"
    names[2:2] = [f"h.{layer}.{kind}" for kind in kinds.split() for layer in range(shape.n_layer)]
    tensors = [state[f"transformer.{name}"] for name in names]
    tensors[0] = torch.nn.functional.pad(tensors[0], (0, 0, 0, rows - shape.vocab_size))
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    content = (
        whole.numpy().tobytes()
        if version == 3
        else whole.bfloat16().view(torch.int16).numpy().tobytes()
    )
    path.write_bytes(struct.pack("<256i", *(numbers.get(i, 0) for i in range(256))) + content)


@pytest.mark.parametrize("version", [3, 5])
def test_llmcs_checkpoints_are_read(tmp_path, version):
    ours, x = make_toy(n_layer=3), ids(2, 16)
    llmc(ours, tmp_path / "model_00019560.bin", version)
    again = GPT.from_pretrained(tmp_path / "model_00019560.bin", dropout=0.25).eval()
    assert again.config == dataclasses.replace(ours.config, dropout=0.25)
    if version == 5:
        ours = ours.bfloat16().float()
    assert torch.equal(again(x), ours(x))
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(GPT.from_pretrained(tmp_path / "copy").eval()(x), ours(x))


def test_an_llmc_file_that_is_cut_while_it_is_read(tmp_path, toy, monkeypatch):
    """Its numbers are read: a look into a mapped file that was cut would be SIGBUS."""
    file = tmp_path / "model.bin"
    llmc(toy, file, 3)
    shapes = pretrained.parameter_shapes

    def cut(config: dict) -> dict:
        os.truncate(file, 5000)
        return shapes(config)

    monkeypatch.setattr(pretrained, "parameter_shapes", cut)
    with pytest.raises(ValueError, match=r"model\.bin: was cut while it was read"):
        pretrained.read_llmc(file)


@pytest.mark.parametrize(
    "header, message",
    [
        ({1: 1}, "version 1 of llm.c's format; this reads 3"),
        ({2: 17}, "damaged, or half copied: it has .* bytes, but its header says"),
        ({4: 10**9}, "damaged, or half copied"),
        ({2: -1, 7: 401}, "damaged, or half copied"),  # the size is right
        ({3: 385}, "damaged, or half copied"),  # more tokens than rows
        ({5: 5}, "n_embd 32 is not divisible by n_head 5"),
        (
            {0: 20240520},
            r"not a file of weights \(damaged",
        ),  # a shard of tokens, and so not llm.c's model
    ],
)
def test_llmcs_files_that_do_not_fit(tmp_path, toy, header, message):
    llmc(toy, tmp_path / "model.bin", 3, header)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path / "model.bin")
    if header == {1: 1}:
        for size in (2, 100, 1024, -4):
            llmc(toy, tmp_path / "model.bin", 3)
            (tmp_path / "model.bin").write_bytes((tmp_path / "model.bin").read_bytes()[:size])
            with pytest.raises(ValueError, match=r"model.bin: .*damaged, or half copied"):
                GPT.from_pretrained(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["nothere", "out/nothere", "a/b/c"])
def test_a_name_of_nothing_is_refused_without_asking_the_hub(tmp_path, toy, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    toy.save_pretrained(tmp_path / "out" / "mine" / "step_0000001")
    with pytest.raises(ValueError, match=rf"{name}: no such model.*here are out/mine"):
        GPT.from_pretrained(name)


# ---- Models that are not GPT-2 -------------------------------------------------------------------


class ScaledGPT(GPT):
    """The tensors of a GPT-2, and other logits."""

    def logits(self, x):
        return 2 * super().logits(x)


class GPTWithNorms(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.ln_1 = torch.nn.RMSNorm(config.n_embd)


def test_transformers_refuses_what_is_not_a_gpt2(tmp_path):
    """It would open the tensors as a GPT-2's and compute something else."""
    for cls in (ScaledGPT, GPTWithNorms):
        folder = tmp_path / cls.__name__
        cls(make_toy().config).save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} == {
            "gpt.json",
            "gpt.safetensors",
            "model.py",
        }
        for opener in (GPT2LMHeadModel, AutoModelForCausalLM):
            with pytest.raises((OSError, ValueError)):
                opener.from_pretrained(folder)


def test_a_changed_model_is_opened_by_the_model_that_made_it_only(tmp_path, capsys):
    model = ScaledGPT(make_toy().config)
    model.save_pretrained(tmp_path / "scaled")
    assert torch.equal(
        ScaledGPT.from_pretrained(tmp_path / "scaled").eval()(ids(1, 9)), model.eval()(ids(1, 9))
    )
    # From the same file, as if only what it imports had changed.
    assert capsys.readouterr().err == ""
    GPTWithGain.from_pretrained(tmp_path / "scaled")
    assert "is the one that made it, but computes something else" in capsys.readouterr().err
    (tmp_path / "scaled" / "model.py").write_text("# another version\n")
    ScaledGPT.from_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match=r"same tensors but computes something else.*copy it over"):
        GPT.from_pretrained(tmp_path / "scaled")
    GPTWithNorms(make_toy().config).save_pretrained(tmp_path / "norms")
    with pytest.raises(ValueError, match=r"ln_1.bias is not in it.*model.py that made it is"):
        GPT.from_pretrained(tmp_path / "norms")


class LateMLP(MLP):
    """Another activation, in late blocks only."""

    def __init__(self, config, layer):
        super().__init__(config)
        self.is_late = layer >= 6

    def forward(self, x):
        h = self.c_fc(x)
        return self.c_proj(F.relu(h).square() if self.is_late else self.gelu(h))


class LateGPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        for layer, block in enumerate(self.transformer.h):
            block.mlp = LateMLP(config, layer)
        self.init_weights()


class ClampedLinear(Linear):
    """As "clip_qkv" of MPT and OLMo: it does nothing to small values."""

    def forward(self, x):
        return super().forward(x).clamp(-8, 8)


class ClampedGPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn.c_attn = ClampedLinear(config.n_embd, 3 * config.n_embd, bias=True)
        self.init_weights()


@pytest.mark.parametrize("cls", [LateGPT, ClampedGPT])
def test_what_only_late_blocks_or_large_values_show_is_seen_with_new_weights(tmp_path, cls):
    """Else a run would find out when it is too late: its checkpoints would be GPT-2s, or sampling
    would compute one.
    """
    shape = dict(n_layer=8, n_head=2, n_embd=16, block_size=8, vocab_size=40)
    assert departure_from_gpt2(GPT(GPTConfig(**shape))) == ""
    model = cls(GPTConfig(**shape))
    assert "differ" in departure_from_gpt2(model)
    assert not inference.computes_gpt2(cls, model.config, torch.float32)
    shallow = GPTConfig(**shape | dict(n_layer=6))
    assert bool(departure_from_gpt2(cls(shallow))) == (cls is ClampedGPT)


class BufferGPT(GPT):
    """Buffers of whole numbers and of truth values, which are kept with the weights."""

    def __init__(self, config, initialise=True):
        super().__init__(config, initialise)
        self.register_buffer("bucket", torch.arange(config.block_size) // 2)
        self.register_buffer("seen", torch.ones(3, dtype=torch.bool))


def test_buffers_of_any_type_come_back(tmp_path):
    model = BufferGPT(make_toy().config)
    model.bucket[3] = 100
    model.seen[1] = False
    model.save_pretrained(tmp_path)
    opened = BufferGPT.from_pretrained(tmp_path)
    assert torch.equal(opened.bucket, model.bucket) and torch.equal(opened.seen, model.seen)
    tensors = load_file(tmp_path / "gpt.safetensors")
    tensors["bucket"] = tensors["bucket"].int()
    save_file(tensors, tmp_path / "gpt.safetensors")
    with pytest.raises(ValueError, match=r"bucket holds torch.int32, in model.py .* torch.int64"):
        BufferGPT.from_pretrained(tmp_path)


@dataclasses.dataclass(frozen=True)
class ConfigWithGain(GPTConfig):
    gain: float = 1.0


class GPTWithGain(GPT):
    def logits(self, x):
        return getattr(self.config, "gain", 1) * super().logits(x)


def test_a_setting_of_ones_own_is_the_files_unless_it_is_set_by_hand(tmp_path):
    config = ConfigWithGain(**vars(make_toy().config), gain=2.0)
    GPTWithGain(config).save_pretrained(tmp_path)
    stored = pretrained.read(tmp_path)

    def open_with(**settings):
        opened = pretrained.make_config(ConfigWithGain, stored, settings)
        pretrained.load(GPTWithGain(opened), stored)
        return opened.gain

    assert open_with() == 2
    assert open_with(gain=1.0) == 2  # the default
    assert open_with(gain=3.0) == 3
    assert pretrained.make_config(ConfigWithGain, stored, dict(n_layer=5)).n_layer == 2


def test_a_gpt2_in_a_changed_model_is_said_to_be_one(tmp_path, toy, capsys):
    toy.save_pretrained(tmp_path / "gpt2")
    GPT.from_pretrained(tmp_path / "gpt2")
    assert capsys.readouterr().err == ""
    ScaledGPT.from_pretrained(tmp_path / "gpt2")
    assert "is a GPT-2, and model.py is not one (its logits differ" in capsys.readouterr().err


def test_settings_that_model_py_does_not_know_are_named(tmp_path):
    ScaledGPT(make_toy().config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "gpt.json").read_text())
    content["config"]["n_kv_head"] = 2
    (tmp_path / "gpt.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model.py has no setting n_kv_head"):
        GPT.from_pretrained(tmp_path)


# ---- The same model as other programs save it ----------------------------------------------------


def rewrite(folder, change) -> None:
    """Save a folder's tensors again, as `change` makes them."""
    state = load_file(folder / WEIGHTS)
    save_file({name: t.contiguous().clone() for name, t in change(state).items()}, folder / WEIGHTS)


def wrap_blocks(state: dict) -> dict:
    return {name.replace(".h.0.", ".h.0._orig_mod."): tensor for name, tensor in state.items()}


def only_head(state: dict) -> dict:
    """What safetensors' save_model keeps of two tied names."""
    return state | {"lm_head.weight": state.pop("transformer.wte.weight")}


def add_buffers(state: dict) -> dict:
    triangle = torch.ones(16, 16).tril()
    return state | {
        "transformer.h.0.attn.mask": triangle.view(1, 1, 16, 16),
        "transformer.h.1.attn.tril": triangle == 0,
        "transformer.position_ids": torch.arange(16)[None],
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"module._orig_mod.module.{name}": t for name, t in state.items()},
        wrap_blocks,
        only_head,
        add_buffers,
        lambda state: state | {"v_head.summary.weight": torch.ones(1, 32)},
    ],
    ids=["compiled", "wrapped twice", "compiled blocks", "head alone", "buffers", "value head"],
)
def test_folders_of_other_programs_are_the_same_model(tmp_path, toy, capsys, change):
    toy.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(ids(1, 16)), toy(ids(1, 16)))
    has_value_head = "v_head.summary.weight" in load_file(tmp_path / WEIGHTS)
    line = "v_head.summary.weight is no part of the language model; left out (1 such"
    assert (line in capsys.readouterr().err) == has_value_head


def test_an_untied_head_may_be_equal(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    reconfigure(tmp_path, dict(tie_word_embeddings=False))
    rewrite(tmp_path, lambda state: state | {"lm_head.weight": state["transformer.wte.weight"]})
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(ids(1, 16)), toy(ids(1, 16)))


@pytest.mark.parametrize("name, exact", pretrained.GELU.items())
def test_the_names_of_gelu_are_those_functions(name, exact):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001)
    expected = torch.nn.functional.gelu(x, approximate="none" if exact else "tanh")
    if name in ACT2FN:
        assert torch.allclose(ACT2FN[name](x), expected, atol=1e-6)


def test_folders_of_trainers_and_of_nanogpt(tmp_path, toy):
    for step in (500, 1000):
        toy.save_pretrained(tmp_path / "trainer" / f"checkpoint-{step}")
    assert resolve(tmp_path / "trainer").name == "checkpoint-1000"
    assert torch.equal(GPT.from_pretrained(tmp_path / "trainer").lm_head.weight, toy.lm_head.weight)
    toy.save_pretrained(tmp_path / "trainer")  # what trainer.save_model wrote at the end
    assert resolve(tmp_path / "trainer") == tmp_path / "trainer"
    (tmp_path / "out").mkdir()
    nanogpt(toy, tmp_path / "out" / "ckpt.pt", prefix="module._orig_mod.")
    assert GPT.from_pretrained(tmp_path / "out").config.exact_gelu


def test_numbers_of_numpy_and_paths_in_a_checkpoint_do_not_matter(tmp_path, toy):
    nanogpt(toy, tmp_path / "ckpt.pt")
    content = torch.load(tmp_path / "ckpt.pt")
    content |= dict(best_val_loss=np.float64(1.9), config=dict(out_dir=tmp_path), seed=np.int64(1))
    content["torch"] = torch.torch_version.TorchVersion("2.13.0")
    torch.save(content, tmp_path / "ckpt.pt")
    again = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert torch.equal(again.lm_head.weight, toy.lm_head.weight)


def test_nanogpts_characters_are_found_where_nanogpt_looks(tmp_path, toy):
    root = tmp_path / "nanoGPT"
    (root / "out").mkdir(parents=True)
    nanogpt(make_toy(vocab_size=3), root / "out" / "ckpt.pt", vocab_size=3)
    with pytest.raises(
        ValueError, match=r"ckpt.pt: 3 tokens, and no tokenizer .*nanoGPT: meta.pkl"
    ):
        open_model(root / "out")
    content = torch.load(root / "out" / "ckpt.pt")
    torch.save(content | dict(config=dict(dataset="abc_char")), root / "out" / "ckpt.pt")
    (root / "data" / "abc_char").mkdir(parents=True)
    meta = pickle.dumps(dict(stoi=dict(a=0, b=1, c=2)))
    (root / "data" / "abc_char" / "meta.pkl").write_bytes(meta)
    assert open_model(root / "out").tokenizer.encode("cab").tolist() == [2, 0, 1]


def test_rows_behind_the_tokenizers_are_dropped(tmp_path):
    toy = make_toy(vocab_size=260)
    toy.save_pretrained(tmp_path)
    save_tokenizer(get_tokenizer("bytes"), tmp_path, 16)
    opened = open_model(tmp_path)
    assert opened.model.config.vocab_size == 257
    assert torch.equal(opened.model.eval()(ids(1, 16)), toy(ids(1, 16))[..., :257])


def test_an_adapter_is_named_as_what_it_is(tmp_path, toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    toy.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = dict(base_model_name_or_path=str(tmp_path / "base"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"a PEFT adapter of .*base, not a model; pip install peft"
    ):
        GPT.from_pretrained(tmp_path / "adapter")
    rewrite(tmp_path / "base", lambda state: state | {"h.0.c.lora_A.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"PEFT adapter that is not merged; .*merge_and_unload"):
        GPT.from_pretrained(tmp_path / "base")
