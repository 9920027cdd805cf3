"""Bad input, in tables: each row is answered by exit code 2 and one line that says what is wrong
and where; never by a traceback, by waiting, or by an answer as if nothing were.
"""

import json
import math
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import bench
import fineweb
import hellaswag
import plot
import prepare
import sample
import train
from parts import data, json_files, metrics, page
from parts.console import printable
from parts.tokenizer import get_tokenizer

import numpy as np
import pytest
import torch
from conftest import TOY_MODEL, clean_environment, flags, make_toy
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5_000
# What no reader of JSON here may take, and a part of the answer.
NO_JSON = {
    "empty": ("", "not JSON"),
    "text": ("hello", "not JSON"),
    "cut": ('{"a": 1', "not JSON"),
    "yaml": ("a: 1\nb: 2\n", "not JSON"),
    "two values": ("{} {}", "not JSON"),
    "deep": ('{"a": ' + DEEP + "}", "inside each other"),
    "deep enough": ('{"a": ' + "[" * 70 + "]" * 70 + "}", "inside each other"),
    "NaN": ('{"a": NaN}', "NaN is not a number"),
    "Infinity": ('{"a": Infinity}', "Infinity is not a number"),
    "-Infinity": ('{"a": -Infinity}', "-Infinity is not a number"),
    "1e999": ('{"a": 1e999}', "1e999 is not a number"),
    "digits": ('{"a": ' + DIGITS + "}", "is not a number that 64 bits"),
    "list": ("[]", "not an object"),
    "number": ("5", "not an object"),
    "null": ("null", "not an object"),
    "string": ('"a"', "not an object"),
    "true": ("true", "not an object"),
    "bytes": (b"\xff\xfe{}", "not UTF-8"),
}


def refuse(capsys, main: Callable, *arguments: object) -> str:
    """The one line with which a command ends; notes and warnings may stand above it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, lines
    program = main.__module__ + ".py: "
    said = [line for line in lines if line.startswith(program)]
    assert len(said) == 1, lines
    assert len(said[0]) < 700 and printable(said[0]) == said[0]
    assert "Traceback" not in "".join(lines)
    return said[0].removeprefix(program)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(table: dict, *first: object) -> list:
    """A table {name: (content, part of the line)} as parameters of a test."""
    return [pytest.param(*first, *row, id=name) for name, row in table.items()]


# ---- train.py: settings --------------------------------------------------------------------------


def bad_values() -> list:
    """For each setting of train.py, texts that it cannot have."""
    bad_for = {
        int: ["x", "1.5", "True", "", "-1", "None", DIGITS, "[" * 500, "{[]: 1}", "1e3", "2**3"],
        float: ["x", "True", "", "-1", "nan", "inf", "1e999", "None", DIGITS, "1,5"],
        bool: ["1", "yes", "", "None", "TRUE"],
    }
    parameters = []
    for name, kind in get_type_hints(train.TrainConfig).items():
        if name == "vocab_size":  # the tokenizer's
            continue
        for value in bad_for.get(kind, []):
            parameters.append(pytest.param(name, value, id=f"{name}={value[:12]}"))
    for name in ("flash", "compile", "optimizer", "lr_schedule", "dtype", "hellaswag_style"):
        for value in ("", "AUTO", "None", "1"):
            parameters.append(pytest.param(name, value, id=f"{name}={value}"))
    for value in ("AUTO", "", "None", "1.5", "True", "0", "-3"):
        parameters.append(pytest.param("batch_size", value, id=f"batch_size={value}"))
    for name in ("data_dir", "out_dir", "init_from", "resume"):
        parameters.append(pytest.param(name, "", id=f"{name}="))
        parameters.append(pytest.param(name, "~nobody_here/x", id=f"{name}=~nobody_here/x"))
    for name in TOY_MODEL:
        parameters.append(pytest.param(name, "0", id=f"{name}=0"))
        parameters.append(pytest.param(name, "1000000000000", id=f"{name}=10**12"))
    return parameters


@pytest.mark.parametrize(
    "name, value", [row for row in bad_values() if row.values[0] != "vocab_size"]
)
def test_values_that_a_setting_cannot_have(capsys, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    line = refuse(capsys, train.main, f"--{name}={value}")
    assert name in line
    assert not any(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    "flag",
    ["--", "--=", "--=3", "-", "--seed", "--no_such=1", "-x", "--seed 3", "--Seed=3", "---seed=3"],
)
def test_flags_that_are_none(capsys, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    assert flag.split("=")[0] in refuse(capsys, train.main, flag)


CONFIG_FILES = {
    "yaml": ("n_layer: 3\n", "line 1: sets nothing"),
    "yaml, later": ("n_layer = 3\nn_head: 2\n", "line 2: sets nothing"),
    "yaml, a list": ("- n_layer\n", "line 1"),
    "yaml, a document": ("---\nn_layer: 3\n", "SyntaxError"),
    "json": ('{"n_layer": 3}', "line 1: sets nothing"),
    "json with true": ('{"bias": true}', "line 1: sets nothing"),
    "toml": ("[model]\nn_layer = 3\n", "line 1: sets nothing"),
    "ini": ("[model]\nn_layer: 3\n", "line 1: sets nothing"),
    "a comparison": ("n_layer == 3\n", "line 1: sets nothing"),
    "a name": ("n_layer\n", "line 1: sets nothing"),
    "a number": ("3\n", "line 1: sets nothing"),
    "unknown": ("n_layers = 3\n", "did you mean n_layer"),
    "wrong kind": ("n_layer = 'three'\n", "takes an int"),
    "raises": ("n_layer = 1 / 0\n", "line 1: ZeroDivisionError"),
    "raises at length": ("raise ValueError('a' * 10_000)\n", "characters)"),
    "ends": ("raise SystemExit(0)\n", "line 1: SystemExit"),
    "deep": ("x = " + "(" * 2000 + ")" * 2000, "Error"),
    "NUL": (b"n_layer = 3\0", "null bytes"),
    "binary": (bytes(range(128, 256)), "Error"),
    "latin-1": ("sample_prompt = 'é'\n".encode("latin-1"), "Error"),
    "indented": ("  n_layer = 3\n", "IndentationError"),
    "no end": ("n_layer = '''3\n", "SyntaxError"),
    "imports": ("import no_such_module\n", "No module named"),
    "a large int": ("seed = 10**5000\n", "takes an int|below|int"),
    "itself": ("n_layer = []\nn_layer.append(n_layer)\n", "takes an int"),
    "empty path": ("out_dir = ''\n", "out_dir is empty"),
}


@pytest.mark.parametrize("content, part", rows(CONFIG_FILES))
def test_config_files_that_are_none(capsys, tmp_path, monkeypatch, content, part):
    monkeypatch.chdir(tmp_path)
    line = refuse(capsys, train.main, write(tmp_path / "mine.py", content))
    assert any(one in line for one in part.split("|")), line


@pytest.mark.parametrize("make", ["nowhere.py", "folder", "pipe", "", "a\x1b[2J\x07.py"])
def test_config_files_that_are_not_there(capsys, tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    if make == "folder":
        os.mkdir(make)
    if make == "pipe":
        os.mkfifo(make)
    assert "no such config file" in refuse(capsys, train.main, make)


@pytest.mark.parametrize(
    "environment, part",
    [
        (dict(RANK="1"), "RANK=1"),
        (dict(RANK="abc"), "RANK=abc"),
        (dict(RANK="-1"), "RANK=-1"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
        (dict(LOCAL_RANK="3"), "LOCAL_RANK=3"),
        (dict(LOCAL_RANK=""), "LOCAL_RANK="),
        (dict(LOCAL_WORLD_SIZE="4"), "LOCAL_WORLD_SIZE=4"),
    ],
    ids=str,
)
def test_an_environment_that_torchrun_did_not_make(
    capsys, tmp_path, monkeypatch, environment, part
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert part in refuse(capsys, train.main)


@pytest.mark.parametrize("resume", ["True", "nowhere", "/dev/null"])
def test_checkpoints_that_are_none(capsys, config, resume):
    line = refuse(capsys, train.main, *flags(config(resume=resume)))
    assert f"resume={resume}: no such checkpoint" in line


@pytest.mark.parametrize(
    "sizes", [dict(n_embd=2**20, n_head=1), dict(n_layer=10_000, n_embd=2**14, n_head=2)], ids=str
)
def test_models_that_no_machine_can_hold(capsys, config, sizes):
    line = refuse(capsys, train.main, *flags(config(**sizes)))
    assert "GB, and this machine has" in line and "n_embd" in line


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:99999999999999999999", "cuda:-1", "cuda:x", "CPU", ""]
)
def test_devices_that_are_none(capsys, config, device):
    assert "device" in refuse(capsys, train.main, *flags(config(device=device)))


# ---- train.py: shards ----------------------------------------------------------------------------

META = {
    "tokenizer null": ('{"tokenizer": null}', "tokenizer is not a str"),
    "tokenizer list": ('{"tokenizer": ["gpt2"]}', "tokenizer is not a str"),
    "source list": ('{"source": []}', "source is not a dict"),
    "complete 1": ('{"complete": 1}', "complete is not a bool"),
    "complete text": ('{"complete": "true"}', "complete is not a bool"),
    "shards list": ('{"shards": []}', "shards is not a dict"),
    "rows null": ('{"shards": {"train": null}}', "train has no rows"),
    "rows 5": ('{"shards": {"train": 5}}', "train has no rows"),
    "row text": ('{"shards": {"train": ["a"]}}', "train has no rows"),
    "row empty": ('{"shards": {"train": [{}]}}', "train has no rows"),
    "row null": ('{"shards": {"train": [null]}}', "train has no rows"),
    "file 5": ('{"shards": {"train": [{"file": 5, "tokens": 5}]}}', "train has no rows"),
    "tokens text": ('{"shards": {"train": [{"file": "a", "tokens": "5"}]}}', "train has no rows"),
    "tokens true": ('{"shards": {"train": [{"file": "a", "tokens": true}]}}', "train has no rows"),
    "tokens -1": ('{"shards": {"val": [{"file": "a", "tokens": -1}]}}', "val has no rows"),
    "incomplete": ('{"tokenizer": "bytes", "complete": false}', "still being written"),
    "another shard": (
        '{"tokenizer": "bytes", "shards": {"train": [{"file": "x", "tokens": 5}]}}',
        "no tokens here, 5 by meta.json|tokens here, none by meta.json",
    ),
    "an escape": ('{"tokenizer": "\\u001b[2J\\u0007"}', "tokenizer.json"),
}


@pytest.fixture
def own_shards(shards, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(shards, tmp_path / "tale"))


@pytest.mark.parametrize("content, part", rows(META) + rows(NO_JSON))
def test_a_meta_file_that_is_none(capsys, config, own_shards, content, part):
    write(own_shards / "meta.json", content)
    line = refuse(capsys, train.main, *flags(config(data_dir=str(own_shards))))
    assert any(one in line for one in part.split("|")), line
    assert str(own_shards) in line


def header(n_tokens: int, magic: int = data.MAGIC, version: int = data.VERSION) -> bytes:
    return struct.pack("<3i1012x", magic, version, n_tokens)


SHARDS = {
    "empty": (b"", "not a token shard"),
    "short": (b"abc", "not a token shard"),
    "text": (b"word " * 1000, "not a token shard"),
    "magic": (header(1, magic=5) + bytes(2), "not a token shard"),
    "version": (header(1, version=7) + bytes(2), "not a token shard"),
    "one token less": (header(10) + bytes(18), "promises 10 tokens (20 bytes)"),
    "one byte more": (header(10) + bytes(21), "the file holds 21 bytes"),
    "header only": (header(10), "the file holds 0 bytes"),
    "negative": (header(-10) + bytes(20), "promises -10 tokens"),
    "no token": (header(0), "0 training tokens"),
    "few": (header(20) + bytes(40), "20 training tokens"),
    "other ids": (header(5000) + b"\xff\xff" * 5000, "holds the token id 65535"),
}


@pytest.mark.parametrize("content, part", rows(SHARDS))
def test_a_shard_that_is_none(capsys, config, tmp_path, own_shards, content, part):
    (own_shards / "meta.json").write_text('{"tokenizer": "bytes"}')
    first, *others = sorted(own_shards.glob("*_train_*.bin"))
    for path in others:
        path.unlink()
    write(first, content)
    run = config(data_dir=str(own_shards))
    line = refuse(capsys, train.main, *flags(run))
    assert part in line and str(own_shards) in line


def npy(array: np.ndarray, path: Path) -> bytes:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=True)
    return path.read_bytes()


@pytest.mark.parametrize(
    "array, part",
    [
        (np.zeros(5000, dtype=np.int64), "holds int64"),
        (np.zeros((50, 100), dtype=np.uint16), "of shape (50, 100)"),
        (np.float32(3), "holds float32"),
        (np.array([{}], dtype=object), "not a whole .npy file"),
        (np.zeros(0, dtype=np.uint16), "not a whole .npy file|0 training tokens"),
        (None, "an archive (.npz)"),
        (b"\x93NUMPY", "not a whole .npy file"),
        (b"", "not a whole .npy file"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_numpy_shard_that_is_none(capsys, config, tmp_path, own_shards, array, part):
    for path in own_shards.glob("*"):
        path.unlink()
    for split in ("train", "val"):
        path = own_shards / f"x_{split}_000001.npy"
        if array is None:
            np.savez(path.with_suffix(".npz"), a=np.zeros(3))
            path.with_suffix(".npz").rename(path)
        elif isinstance(array, bytes):
            path.write_bytes(array)
        else:
            npy(array, path)
    line = refuse(capsys, train.main, *flags(config(data_dir=str(own_shards))))
    assert any(one in line for one in part.split("|")), line


@pytest.mark.parametrize("kind", ["nowhere", "file", "empty", "pipe", "folder"])
def test_shards_that_are_not_there(capsys, config, tmp_path, kind):
    folder = tmp_path / "made"
    if kind == "file":
        folder.write_text("x")
    elif kind != "nowhere":
        folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / "x_train_000001.bin")
    if kind == "folder":
        (folder / "x_train_000001.bin").mkdir()
    line = refuse(capsys, train.main, *flags(config(data_dir=str(folder))))
    assert str(folder) in line


def test_a_shard_that_is_cut_while_it_is_read(tmp_path):
    """To read it would be SIGBUS."""
    path = tmp_path / "x_train_000001.bin"
    data.write_shard(path, np.zeros(100_000, dtype=np.uint16))
    windows = data.TokenWindows([data.open_shard(path)], 8, 257)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match=r"x_train_000001.bin: was cut while it was read"):
        windows.read(np.array([(0, 90_000)]))


def test_more_shards_than_files_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    for number in range(300):
        data.write_shard(tmp_path / f"x_train_{number:06d}.bin", np.zeros(9, dtype=np.uint16))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert len(data.open_shards(tmp_path, "train")) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- sample.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "toy"
    make_toy().save_pretrained(folder)
    from parts.tokenizer import save_tokenizer

    save_tokenizer(get_tokenizer("bytes"), folder, 16)
    return folder


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--model", ""], "--model"),
        (["--model="], "--model"),
        (["--model", "nowhere"], "nowhere: no such model"),
        (["--model", "no/such/thing"], "no such model"),
        (["--model", "a\x1b[2J\x07"], "no such model"),
        (["--model", "/dev/null"], "/dev/null"),
        (["--file", ""], "--file"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["--file", "."], "a folder"),
        (["-n", "0"], "samples"),
        (["-n", "-1"], "samples"),
        (["-n", "x"], "--samples"),
        (["-n", "1.5"], "--samples"),
        (["-n", DIGITS], "--samples"),
        (["-m", "0"], "max_tokens"),
        (["-m", "-1"], "max_tokens"),
        (["-m", "many"], "--max_tokens"),
        (["-m", "9" * 30], "max_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "hot"], "--temperature"),
        (["--temperature", ""], "--temperature"),
        (["--top_k", "-1"], "top_k"),
        (["--top_k", "1.5"], "--top_k"),
        (["--top_p", "1.5"], "top_p"),
        (["--top_p", "-0.1"], "top_p"),
        (["--top_p", "nan"], "top_p"),
        (["--min_p", "2"], "min_p"),
        (["--min_p", "inf"], "min_p"),
        (["--repetition_penalty", "0"], "repetition_penalty"),
        (["--repetition_penalty", "-inf"], "repetition_penalty"),
        (["--repetition_penalty", "1e9"], "repetition_penalty"),
        (["--seed", "-1"], "seed"),
        (["--seed", "x"], "--seed"),
        (["--seed", "9" * 40], "seed"),
        (["--device", "gpu"], "device=gpu"),
        (["--device", ""], "device="),
        (["--device", "cuda:9999999999999999999999"], "device=cuda"),
        (["--dtype", "fp8"], "--dtype"),
        (["--port", "x"], "--port"),
        (["--no_such"], "--no_such"),
        (["--web", "-i"], "exclude each other"),
        (["--web", "--json"], "exclude each other"),
        (["-i", "-n", "2"], "exclude each other"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_options_of_sample(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert part in refuse(capsys, sample.main, *arguments)


PROMPTS = {
    "no prompt": ("{}", 'with a text as "prompt"'),
    "prompt 5": ('{"prompt": 5}', 'with a text as "prompt"'),
    "prompt null": ('{"prompt": null}', 'with a text as "prompt"'),
    "prompt list": ('{"prompt": ["a"]}', 'with a text as "prompt"'),
    "another name": ('{"text": "a"}', 'with a text as "prompt"'),
    "an escape": ('"\x1b[2J\x07"', "line 1"),
}


@pytest.mark.parametrize(
    "content, part", rows(PROMPTS) + rows({k: v for k, v in NO_JSON.items() if k != "empty"})
)
def test_files_of_prompts(capsys, tmp_path, content, part):
    file = write(tmp_path / "prompts.jsonl", content)
    line = refuse(capsys, sample.main, "--file", file)
    if isinstance(content, str) and "\n" not in content:
        assert part in line
    assert f"{file}, line 1: " in line


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "blank.txt"])
def test_files_without_a_prompt(capsys, tmp_path, name):
    file = write(tmp_path / name, "\n \n" if "blank" in name else "")
    assert f"{file}: no prompts in it" in refuse(capsys, sample.main, "--file", file)


def test_a_pipe_is_not_waited_for(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "a pipe or a device" in refuse(capsys, sample.main, "--file", tmp_path / "pipe.jsonl")
    assert "a pipe or a device" in refuse(capsys, hellaswag.main, "--data", tmp_path / "pipe.jsonl")
    assert "a pipe or a device" in refuse(capsys, bench.main, "show", tmp_path / "pipe.jsonl")


# ---- Folders of models ---------------------------------------------------------------------------

# Values of config.json that no GPT-2 has, or that the weights beside it contradict.
CONFIG_VALUES = {
    "n_layer": [0, -1, "2", 2.5, None, True, 10**9, [], 3],
    "n_head": [0, 3, "2", None, 10**9, -2],
    "n_embd": [0, 33, "x", None, 64, -32],
    "n_positions": [0, -5, "x", None, 10**12, 8],
    "vocab_size": [0, -1, "x", None, 256, 300, 10**12],
    "activation_function": ["relu", 5, []],
}


def wrong_configs() -> list:
    parameters = []
    for name, values in CONFIG_VALUES.items():
        for value in values:
            parameters.append(pytest.param(name, value, id=f"{name}={value!r}"))
    return parameters


@pytest.fixture
def own_model_folder(model_folder, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "spoiled"))


def sample_from(capsys, folder: Path) -> str:
    return refuse(capsys, sample.main, "--model", folder, "-p", "a", "-m", "2")


@pytest.mark.parametrize("name, value", wrong_configs())
def test_a_config_json_that_fits_no_gpt2(capsys, own_model_folder, name, value):
    file = own_model_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    line = sample_from(capsys, own_model_folder)
    assert str(own_model_folder) in line or "n_head" in line


@pytest.mark.parametrize("content", [content for content, _ in NO_JSON.values()], ids=NO_JSON)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.json"])
def test_json_in_a_models_folder_that_is_none(capsys, own_model_folder, name, content):
    if name == "tokenizer.json":
        (own_model_folder / "vocab.json").unlink()
        (own_model_folder / "merges.txt").unlink()
    write(own_model_folder / name, content)
    assert str(own_model_folder) in sample_from(capsys, own_model_folder)


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"a\n", b"a b c\n", b"#version\na a\na a\n"])
def test_merges_that_are_none(capsys, own_model_folder, content):
    write(own_model_folder / "merges.txt", content)
    assert str(own_model_folder) in sample_from(capsys, own_model_folder)


BYTES_OF_WEIGHTS = {
    "empty": lambda good: b"",
    "seven bytes": lambda good: good[:7],
    "the header": lambda good: good[:200],
    "an end missing": lambda good: good[:-100],
    "bytes too many": lambda good: good + b"x" * 1000,
    "a huge header": lambda good: struct.pack("<Q", 2**60) + b"{}",
    "a negative header": lambda good: b"\xff" * 8 + good[8:],
    "no JSON": lambda good: struct.pack("<Q", 4) + b"abcd",
    "deep JSON": lambda good: struct.pack("<Q", 20_000) + b"[" * 20_000,
    "text": lambda good: b"hello",
    "a program": lambda good: b"\x7fELF" * 100,
}


@pytest.mark.parametrize("damage", BYTES_OF_WEIGHTS.values(), ids=BYTES_OF_WEIGHTS)
def test_a_file_of_weights_that_is_none(capsys, own_model_folder, damage):
    file = own_model_folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert "model.safetensors" in sample_from(capsys, own_model_folder)


TENSORS = {
    "bytes": lambda tensor: tensor.to(torch.int8),
    "booleans": lambda tensor: tensor.bool(),
    "integers": lambda tensor: tensor.to(torch.int64),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "flat": lambda tensor: tensor.flatten(),
    "one number": lambda tensor: torch.zeros(()),
    "no number": lambda tensor: torch.zeros(0),
    "a dimension more": lambda tensor: tensor[None],
    "NaN": lambda tensor: torch.full_like(tensor, math.nan),
    "infinite": lambda tensor: torch.full_like(tensor, math.inf),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_no_weights(capsys, own_model_folder, change):
    file = own_model_folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: change(tensor).contiguous() for name, tensor in tensors.items()}, file)
    sample_from(capsys, own_model_folder)


# ---- Other names and numbers ---------------------------------------------------------------------

A_LONG_NAME = "x" * 5000
OTHER_ARGUMENTS = [
    *((sample, ["--model", name]) for name in ("a\0b", A_LONG_NAME, "/", "~nobody_here/x")),
    *((sample, ["--file", name]) for name in ("a\0b", A_LONG_NAME, "/dev/zero")),
    (sample, ["-n", 10**9]),
    (sample, ["--encoding", ""]),
    (sample, ["--encoding", "no-such"]),
    (sample, ["--temperature", "1e400"]),
    (sample, ["--seed", 2**64]),
    (sample, ["--repetition_penalty", "nan"]),
    *((hellaswag, ["--data", name]) for name in ("a\0b", A_LONG_NAME, "/dev/zero", "t.txt")),
    (hellaswag, ["--limit", "1e3"]),
    (hellaswag, ["--style", ""]),
    (hellaswag, ["--json=5"]),
    *((plot, [name]) for name in ("a\0b", A_LONG_NAME, "t.txt", "/dev/null")),
    *((plot, ["--weights", name]) for name in ("a\0b", "t.txt", "/")),
    (plot, ["--report"]),
    (plot, ["--out"]),
    *((bench, ["show", name]) for name in ("a\0b", A_LONG_NAME, "t.txt")),
    *((bench, ["tokenize", name]) for name in ("a\0b", "/dev/zero", "binary.txt")),
    *((bench, ["tokenize", "t.txt", "--workers", number]) for number in (-1, "x")),
    *((bench, ["tokenize", "t.txt", "--rounds", number]) for number in (0, -1, "x")),
    *((bench, ["train", "--rounds", number]) for number in (0, -1, "x")),
    *((bench, ["train", "--steps", number]) for number in (0, -1, "x")),
    *((bench, ["sample", "--max_tokens", number]) for number in (0, -1, "x")),
    *((bench, ["sample", "--batch", number]) for number in (0, -1, "x")),
    *((bench, ["hellaswag", "--limit", number]) for number in (-1, "x")),
    *((bench, ["memory", "--gpus", number]) for number in (0, -1, "x")),
    *((bench, ["plan", "--gpus", number]) for number in (0, -1, "x")),
    *((bench, ["plan", "--tokens", number]) for number in (0, -1, "x")),
    (bench, ["show", "--json"]),
    *((prepare, [name, "--out", "made"]) for name in ("a\0b", A_LONG_NAME, "/dev/zero")),
    *((prepare, ["t.txt", "--out", name]) for name in ("a\0b", A_LONG_NAME, "/dev/null", ".")),
    *((prepare, ["t.txt", "--out", "made", "--encoding", name]) for name in ("", "no", "base64")),
    *((prepare, ["t.txt", "--out", "made", "--separator", name]) for name in ("",)),
    *(
        (prepare, ["t.txt", "--out", "made", "--tokenizer", name])
        for name in ("a\0b", A_LONG_NAME, "-5", "257.5", "70000", "t.txt")
    ),
    *((fineweb, ["--part", part]) for part in ("1/0", "2/1", "-1/2", "1/2/3", "1/2 ")),
    *((fineweb, ["--out", name]) for name in ("a\0b", "t.txt")),
    (fineweb, ["--max_tokens", "1e9"]),
    (fineweb, ["--workers", -1]),
]


@pytest.mark.parametrize(
    "module, arguments",
    OTHER_ARGUMENTS,
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else value.__name__,
)
def test_other_names_and_numbers(capsys, tmp_path, monkeypatch, module, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(tmp_path / "t.txt", "word " * 1000)
    write(tmp_path / "binary.txt", b"\x7fELF\0\0" * 100)
    refuse(capsys, module.main, *arguments)


RAISED = [
    *("raise GeneratorExit", "raise BaseException('a\\nb\\x1b')", "raise Exception", "1 / 0"),
    *("def f(): return f()\nf()", "n_layer = n_layer.x", "import no.such", "assert False"),
    *("n_layer = 1 + 2j", "n_layer = float('nan')", "n_layer = 10**400", "learning_rate = 1e999"),
    *("n_layer = None", "n_layer = True", "out_dir = 5", "bias = 'True'", "n_layer, n_head = 1"),
    *("x = yield", "return", "await x", "n_layer = 3;;", "exec('n_layer=')", "open('/nowhere/x')"),
    *("sample_prompt = b'x'", "class A: pass\nn_layer = A()", "from train import nothing"),
]


@pytest.mark.parametrize("content", RAISED)
def test_config_files_that_raise(capsys, tmp_path, content):
    line = refuse(capsys, train.main, write(tmp_path / "mine.py", content + "\n"))
    assert any(name in line for name in ("mine.py", "n_layer", "learning_rate")), line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with names")
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_metrics_file_that_is_none(capsys, config, tmp_path, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "metrics.jsonl")
    assert "metrics.jsonl: a " in refuse(capsys, train.main, *flags(config()))
    assert "metrics.jsonl: a " in refuse(capsys, plot.main, tmp_path / "run")


# ---- hellaswag.py --------------------------------------------------------------------------------


def task(**changes: object) -> str:
    fields: dict = dict(ctx="A man", endings=["a", "b", "c", "d"], label=3, activity_label="x")
    fields |= dict(ctx_a="A man", ctx_b="he") | changes
    return json.dumps({name: value for name, value in fields.items() if value != "missing"})


TASKS = {
    "no ctx": (task(ctx="missing"), "ctx"),
    "ctx 5": (task(ctx=5), "ctx must be a string"),
    "ctx null": (task(ctx=None), "ctx must be a string"),
    "no endings": (task(endings="missing"), "endings"),
    "endings abcd": (task(endings="abcd"), "endings a list of four strings"),
    "endings object": (task(endings=dict(a=1, b=2, c=3, d=4)), "endings a list of four strings"),
    "three": (task(endings=["a", "b", "c"]), "endings a list of four strings"),
    "five": (task(endings=["a"] * 5), "endings a list of four strings"),
    "numbers": (task(endings=[1, 2, 3, 4]), "endings a list of four strings"),
    "nulls": (task(endings=[None] * 4), "endings a list of four strings"),
    "endings null": (task(endings=None), "endings a list of four strings"),
    "no label": (task(label="missing"), "label"),
    "label 4": (task(label=4), "label must be 0 to 3"),
    "label -1": (task(label=-1), "label must be 0 to 3"),
    "label '4'": (task(label="4"), "label must be 0 to 3"),
    "label ''": (task(label=""), "label must be 0 to 3"),
    "label 'x'": (task(label="x"), "label must be 0 to 3"),
    "label 1.9": (task(label=1.9), "label must be 0 to 3"),
    "label 1.0": (task(label=1.0), "label must be 0 to 3"),
    "label true": (task(label=True), "label must be 0 to 3"),
    "label null": (task(label=None), "label must be 0 to 3"),
    "label list": (task(label=[1]), "label must be 0 to 3"),
    "label Infinity": (task(label=math.inf), "Infinity is not a number"),
    "label NaN": (task(label=math.nan), "NaN is not a number"),
}


@pytest.mark.parametrize(
    "content, part", rows(TASKS) + rows({k: v for k, v in NO_JSON.items() if k != "empty"})
)
def test_tasks_that_are_none(capsys, tmp_path, content, part):
    if isinstance(content, bytes):
        part = "not JSON"  # bytes that are not UTF-8 are replaced, as in any text
    file = write(tmp_path / "tasks.jsonl", content)
    line = refuse(capsys, hellaswag.main, "--data", file)
    assert f"{file}, line 1: not a HellaSwag task" in line
    if "\n" not in str(content):
        assert part in line


@pytest.mark.parametrize(
    "changes", [dict(ctx_a=5), dict(ctx_b=None), dict(activity_label="missing"), dict(endings=[1])]
)
def test_tasks_of_the_other_style(capsys, tmp_path, changes):
    file = write(tmp_path / "tasks.jsonl", task(**changes))
    line = refuse(capsys, hellaswag.main, "--data", file, "--style", "harness")
    assert f"{file}, line 1: not a HellaSwag task" in line


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--data", ""], "--data"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "."], "a folder"),
        (["--data", "/dev/null"], "a pipe or a device"),
        (["--limit", "-1"], "--limit"),
        (["--limit", "x"], "--limit"),
        (["--limit", "1.5"], "--limit"),
        (["--style", "other"], "--style"),
        (["--dtype", "fp8"], "--dtype"),
        (["--device", "gpu"], "device=gpu"),
        (["--model", ""], "--model"),
        (["--no_such"], "--no_such"),
        (["extra"], "extra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_hellaswag(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert part in refuse(capsys, hellaswag.main, *arguments)


# ---- plot.py and bench.py ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "say what to draw"),
        ([""], "is empty"),
        (["nowhere"], "nowhere"),
        (["."], "no training loss"),
        (["--weights", ""], "--weights"),
        (["--weights", "nowhere"], "nowhere: no such model"),
        (["--weights", "x", "out/y"], "say what to draw"),
        (["--weights", "x", "--report"], "say what to draw"),
        (["--out", "", "x"], "--out"),
        (["--no_such"], "--no_such"),
        (["a\x1b[2J\x07"], "no training loss"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_plot(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert part in refuse(capsys, plot.main, *arguments)


RESULT: dict = dict(bench="b", device="d", torch="t", settings={}, rows={"a": {"x": 1}}, ratios={})


def result(**changes: object) -> str:
    return json.dumps(RESULT | changes)


RESULTS = {
    "no fields": ("{}", "not a result"),
    "rows list": (result(rows=[]), "not a result"),
    "rows empty": (result(rows={}), "not a result"),
    "row 5": (result(rows={"a": 5}), "not a result"),
    "row text": (result(rows={"a": "x"}), "not a result"),
    "figure null": (result(rows={"a": {"x": None}}), "not a result"),
    "figure list": (result(rows={"a": {"x": [1]}}), "not a result"),
    "settings list": (result(settings=[]), "not a result"),
    "settings null": (result(settings=None), "not a result"),
    "ratios 5": (result(ratios=5), "not a result"),
    "ratio null": (result(ratios={"a": None}), "not a result"),
    "metrics": ('{"step": 0, "kind": "run"}', "not a result"),
}


@pytest.mark.parametrize("content, part", rows(RESULTS) + rows(NO_JSON))
def test_results_that_are_none(capsys, tmp_path, content, part):
    file = write(tmp_path / "result.json", content)
    line = refuse(capsys, bench.main, "show", file)
    assert part in line and str(file) in line


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "bench"),
        (["no_such"], "no_such"),
        (["show"], "file"),
        (["show", ""], "is empty"),
        (["show", "nowhere"], "nowhere"),
        (["show", "."], "a folder"),
        (["tokenize", ""], "is empty"),
        (["tokenize", "nowhere"], "nowhere"),
        (["tokenize", "empty.txt"], "no text in it"),
        (["tokenize", "."], "a folder"),
        (["tokenize", "--workers", "x"], "--workers"),
        (["sample", "--batch", "x"], "--batch"),
        (["sample", "--dtype", "fp8"], "--dtype"),
        (["sample", "--device", "gpu"], "device=gpu"),
        (["train", "--size", "gpt9"], "--size"),
        (["plan", "--gpu", "H900"], "--gpu"),
        (["plan", "--model", "gpt9"], "--model"),
        (["plan", "--gpus", "many"], "--gpus"),
        (["hellaswag", "--data", ""], "--data"),
        (["hellaswag", "--data", "nowhere"], "nowhere"),
        (["memory", "--no_such"], "--no_such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_bench(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.txt", "")
    assert part in refuse(capsys, bench.main, *arguments)


# ---- The page ------------------------------------------------------------------------------------

SETTINGS: dict = dict(max_tokens=9, temperature=1.0, top_k=50, top_p=1.0, min_p=0.0)
SETTINGS |= dict(repetition_penalty=1.0, seed=1337)
REQUEST: dict = SETTINGS | dict(prompt="x", stop="", checkpoint="step_0000300", taken=[])


def bad_bodies() -> list:
    parameters = []
    for name in REQUEST:
        for value in (None, "", [], {}, "x", True, -1, 1.5, [None], ["1"], [1.5], [True]):
            kind = type(REQUEST[name])
            right = type(value) is kind and value != -1 and value not in ([None], ["1"], [1.5])
            right = right and value != [True]
            number = kind is float and value == 1.5 and name not in ("top_p", "min_p")
            whole = kind is int and value == 1.5
            if (right and not (kind is float and not number)) or number or (kind is str and right):
                continue
            assert whole or not right or kind is float
            body = json.dumps(REQUEST | {name: value})
            parameters.append(pytest.param(body, name, id=f"{name} {value!r}"))
        without = {key: value for key, value in REQUEST.items() if key != name}
        parameters.append(pytest.param(json.dumps(without), name, id=f"no {name}"))
    for name, size in page.LONGEST.items():
        body = json.dumps(REQUEST | {name: "a" * (size + 1)})
        parameters.append(pytest.param(body, f"{name} must have at most", id=f"a long {name}"))
    many = json.dumps(REQUEST | dict(taken=[1] * (page.MOST_TAKEN + 1)))
    parameters.append(pytest.param(many, "taken must have at most", id="many taken"))
    return parameters + rows(NO_JSON)


@pytest.fixture(scope="module")
def client():
    pytest.importorskip("flask")

    def answer(request: dict):
        pytest.fail("it was computed")
        yield {}

    return page.make_app(page.Desk(answer), dict, {}, "token").test_client()


@pytest.mark.parametrize("body, part", bad_bodies())
def test_requests_that_are_none(client, capsys, body, part):
    response = client.post("/answer?token=token", data=body)
    if not body:  # this client does not say the length of nothing
        assert response.status_code == 411
        return
    assert response.status_code == 400
    assert part in response.get_json(force=True)["error"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "method, path, length, status",
    [
        ("POST", "/answer", str(page.LONGEST_BODY + 1), 413),
        ("POST", "/answer", "9" * 30, 413),
        ("POST", "/answer", "chunked", 411),
        ("GET", "/answer", "", 405),
        ("POST", "/form", "0", 405),
        ("GET", "/../train.py", "", 404),
        ("GET", "/nowhere", "", 404),
    ],
)
def test_requests_that_are_refused_unread(client, method, path, length, status):
    class Unread:
        def read(self, *_):
            pytest.fail("it was read")

        readline = readlines = __iter__ = read

    response = client.open(
        path,
        method=method,
        query_string=dict(token="token"),
        environ_overrides={
            "CONTENT_LENGTH": "" if length == "chunked" else length,
            "HTTP_TRANSFER_ENCODING": "chunked" if length == "chunked" else "",
            "wsgi.input": Unread(),
        },
    )
    assert response.status_code == status
    assert response.get_json()["error"]


def test_a_long_stop_text_costs_no_time():
    from parts.inference import count_held_back

    assert count_held_back("ab", ["b" * 100_000]) == 1
    assert count_held_back("xaab", ["aabc", "b", "bcd"]) == 3
    assert count_held_back("x", ["x"]) == 0


# ---- prepare.py and fineweb.py -------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "PATH"),
        (["t.txt"], "--out"),
        (["", "--out", "x"], "is empty"),
        (["t.txt", "--out", ""], "--out"),
        (["nowhere", "--out", "x"], "nowhere: no such file"),
        (["t.txt", "--out", "x", "--tokenizer", ""], "--tokenizer"),
        (["t.txt", "--out", "x", "--tokenizer", "gpt3"], "--tokenizer gpt3"),
        (["t.txt", "--out", "x", "--tokenizer", "5"], "--tokenizer 5"),
        (["t.txt", "--out", "x", "--tokenizer", "99999999"], "--tokenizer 99999999"),
        (["t.txt", "--out", "x", "--shard_tokens", "0"], "--shard_tokens"),
        (["t.txt", "--out", "x", "--shard_tokens", "-5"], "--shard_tokens"),
        (["t.txt", "--out", "x", "--shard_tokens", "1e6"], "--shard_tokens"),
        (["t.txt", "--out", "x", "--shard_tokens", "9" * 20], "--shard_tokens"),
        (["t.txt", "--out", "x", "--workers", "0"], "--workers"),
        (["t.txt", "--out", "x", "--workers", "x"], "--workers"),
        (["t.txt", "--out", "x", "--workers", "1000000"], "--workers"),
        (["t.txt", "--out", "x", "--val_fraction", "1"], "--val_fraction"),
        (["t.txt", "--out", "x", "--val_fraction", "-0.1"], "--val_fraction"),
        (["t.txt", "--out", "x", "--val_fraction", "nan"], "--val_fraction"),
        (["t.txt", "--out", "x", "--val_fraction", "half"], "--val_fraction"),
        (["t.txt", "--out", "x", "--no_such"], "--no_such"),
        (["t.txt", "--out", "t.txt"], "t.txt"),
        (["empty.txt", "--out", "x"], "empty.txt"),
        (["binary.txt", "--out", "x"], "binary.txt"),
        (["bad.jsonl", "--out", "x"], "bad.jsonl: line 1"),
        (["bad.parquet", "--out", "x"], "bad.parquet"),
        (["bad.jsonl.gz", "--out", "x"], "bad.jsonl.gz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_and_files_of_prepare(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.txt", "word " * 1000)
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "binary.txt", b"a\0b")
    for name in ("bad.jsonl", "bad.parquet", "bad.jsonl.gz"):
        write(tmp_path / name, "\x1b[2J\x07 is no row")
    assert part in refuse(capsys, prepare.main, *arguments)


@pytest.mark.parametrize("name", NO_JSON)
def test_rows_that_are_none(capsys, tmp_path, name):
    content, _ = NO_JSON[name]
    if name in ("empty", "NaN", "Infinity", "-Infinity", "1e999", "digits"):
        content = str(content).replace("{", '{"text": null, ') or '{"b": 1}'
    if name in ("NaN", "Infinity", "-Infinity", "1e999", "digits", "deep enough"):
        content = '{"text": 5}'
    file = write(tmp_path / "rows.jsonl", content)
    line = refuse(capsys, prepare.main, file, "--out", tmp_path / "made")
    assert f"{file}: line 1: not a JSON object with text" in line


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--part", "0/4"], "--part"),
        (["--part", "5/4"], "--part"),
        (["--part", "x"], "--part"),
        (["--part", ""], "--part"),
        (["--max_tokens", "0"], "--max_tokens"),
        (["--max_tokens", "x"], "--max_tokens"),
        (["--max_tokens", "5", "--part", "1/2"], "--max_tokens"),
        (["--pretokenized", "--name", "x"], "--pretokenized"),
        (["--pretokenized", "--part", "1/2"], "--pretokenized"),
        (["--shard_tokens", "0"], "--shard_tokens"),
        (["--workers", "0"], "--workers"),
        (["--out", ""], "--out"),
        (["--no_such"], "--no_such"),
        (["extra"], "extra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_fineweb(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert part in refuse(capsys, fineweb.main, *arguments)


# ---- The reader of JSON itself -------------------------------------------------------------------


def test_json_that_is_right_is_read(tmp_path):
    text = '\ufeff{"a": [1, -2.5, null, true, "\\u00e9"], "b": ' + "[" * 60 + "]" * 60 + "}"
    value = json_files.read_json(write(tmp_path / "x.json", text))
    assert value["a"] == [1, -2.5, None, True, "é"]
    assert json_files.parse_json("[18446744073709551615]", list) == [2**64 - 1]


def test_a_json_file_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST_FILE", 1 << 20)
    file = write(tmp_path / "x.json", " " * (1 << 20) + "{}")
    with pytest.raises(ValueError, match=r"x.json: more than 1 MB"):
        json_files.read_json(file)


# ---- A machine that gives too little -------------------------------------------------------------


def run(command: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """A line of shell in which $PY is Python and $ROOT this project."""
    environment = clean_environment(PY=sys.executable, ROOT=str(ROOT))
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_worker_that_cannot_start_ends_those_that_have(tmp_path):
    """With 20 open files, the first worker starts and the second one cannot."""
    (tmp_path / "t.txt").write_text("word " * 1000)
    options = "--out x --workers 2 --tokenizer bytes"  # its workers are processes
    ended = run(f"ulimit -n 20; $PY $ROOT/prepare.py t.txt {options}", tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "Too many open files" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(tmp_path, closed):
    ended = run(f"$PY $ROOT/prepare.py nowhere --out x {closed}", tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "" if "2>" in closed else "nowhere: no such file" in ended.stderr


@pytest.mark.parametrize(
    "command",
    ["train.py --help", "sample.py --help", "bench.py show $ROOT/results/cpu/ladder.json"],
)
def test_a_full_disk_under_the_output(tmp_path, command):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    ended = run(f"$PY $ROOT/{command} > /dev/full", tmp_path)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.endswith(": [Errno 28] No space left on device: 'stdout'")


class FullDisk:
    """A file that takes three records."""

    name = "run/metrics.jsonl"
    written = 0

    def write(self, line: str) -> None:
        self.written += 1
        if self.written > 3:
            raise OSError(28, "No space left on device")

    def flush(self) -> None:
        pass

    close = flush


def test_a_run_saves_when_its_log_cannot_be_written(capsys, config, tmp_path, monkeypatch):
    begin = metrics.Log.__init__

    def begin_on_a_full_disk(log, *arguments):
        begin(log, *arguments)
        log.file = FullDisk()

    monkeypatch.setattr(metrics.Log, "__init__", begin_on_a_full_disk)
    line = refuse(capsys, train.main, *flags(config()))
    assert line == "[Errno 28] No space left on device: 'run/metrics.jsonl'"
    assert (tmp_path / "run" / "step_0000003" / "model.safetensors").exists()


def test_a_picture_on_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    figure_module = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*loss.svg"):
        plot.save(figure_module.Figure(), tmp_path / "loss.svg")
    assert not any(tmp_path.iterdir())


def test_a_run_goes_on_when_the_disk_under_its_log_is_full(config, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = shlex.join(flags(config(checkpoint_every=12)))
    ended = run(f"$PY $ROOT/train.py {command} > /dev/full", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("NOTE: stdout: No space left on device; the program goes on") == 1
    assert (tmp_path / "run" / "step_0000012" / "model.safetensors").exists()
