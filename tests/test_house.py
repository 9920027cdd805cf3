"""The house: who imports whom, what an import does, and how long things may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import clean_environment

ROOT = Path(__file__).parent.parent

# What each room may import of the project. Parts stand below the top and import no command.
TOP = {
    "configurator": set(),
    "model": {"loss", "pretrained"},
    "prepare": {"console", "documents", "files", "sharding", "tokenizer"},
    "fineweb": {"console", "data", "documents", "files", "sharding", "tokenizer"},
    "hellaswag": {
        "model",
        "auto",
        "console",
        "files",
        "metrics",
        "pretrained",
        "runtime",
        "tokenizer",
    },
    "sample": {
        "configurator",
        "model",
        "auto",
        "console",
        "inference",
        "page",
        "pretrained",
        "runtime",
        "tokenizer",
    },
    "plot": {"model", "console", "metrics", "pretrained", "report"},
    "train": {
        "configurator",
        "model",
        "hellaswag",
        "plot",
        "auto",
        "checkpoint",
        "console",
        "data",
        "files",
    }
    | {"inference", "metrics", "optimizer", "pretrained", "runtime", "tokenizer"},
    "bench": {
        "model",
        "train",
        "hellaswag",
        "auto",
        "console",
        "data",
        "documents",
        "inference",
        "loss",
        "metrics",
    }
    | {"runtime", "sharding", "tokenizer"},
}
PARTS = {
    "files": set(),
    "tokenizer": {"files"},
    "documents": set(),
    "data": {"files", "tokenizer"},
    "sharding": {"files", "tokenizer", "documents", "data"},
    "loss": set(),
    "optimizer": set(),
    "runtime": set(),
    "inference": {"tokenizer"},
    "auto": {"runtime", "inference"},
    "pretrained": set(),
    "metrics": {"files", "tokenizer", "data", "runtime"},
    "console": set(),
    "report": {"metrics", "console"},
    "checkpoint": {"files", "tokenizer", "pretrained", "metrics", "report"},
    "page": {"tokenizer", "runtime", "inference", "pretrained", "metrics"},
}
HOUSE = TOP | {f"parts.{name}": below for name, below in PARTS.items()}
SCRIPTS = {"prepare", "fineweb", "train", "sample", "hellaswag", "plot", "bench"}
HEAVY = {
    "tiktoken",
    "transformers",
    "datasets",
    "matplotlib",
    "safetensors",
    "huggingface_hub",
    "wandb",
    "tensorboard",
}
HEAVY |= {"tokenizers", "pyarrow", "flask", "werkzeug"}


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())


def imported(nodes) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("parts.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "parts":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.removeprefix("parts."))
    return names


def test_every_file_is_in_the_table():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)
    assert {path.stem for path in ROOT.glob("parts/*.py")} == {"__init__", *PARTS}


@pytest.mark.parametrize("name", HOUSE)
def test_imports_only_go_down(name):
    assert imported(ast.walk(tree(name))) & {*TOP, *PARTS} <= HOUSE[name]


@pytest.mark.parametrize("room", PARTS)
def test_no_part_imports_what_stands_at_the_top(room):
    assert not imported(ast.walk(tree(f"parts.{room}"))) & set(TOP)


def test_importing_has_no_side_effects(tmp_path):
    """In a new process: no socket is made, no file opened for writing, no process started, nothing
    heavy loaded.
    """
    script = f"""
import importlib, sys
import torch, numpy, concurrent.futures, torch.nn.parallel, torch.distributed  # their own effects are not ours
import torch.utils.checkpoint
from typing import Literal
def watch(event, arguments):
    writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writing or event.startswith(("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename")):
        raise SystemExit(f"import of {{name}}: {{event}} {{arguments}}")
sys.dont_write_bytecode = True
sys.addaudithook(watch)
for name in {list(HOUSE)!r}:
    importlib.import_module(name)
    if heavy := {HEAVY!r} & set(sys.modules):
        raise SystemExit(f"import of {{name}} loads {{heavy}}")
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HOUSE)
def test_nothing_but_definitions_at_the_top_level(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    for node in tree(name).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        environment = name == "train" and ast.unparse(node).startswith("os.environ.setdefault(")
        assert docstring or guard or environment or isinstance(node, allowed), node.lineno


@pytest.mark.parametrize("name", HOUSE)
def test_functions_are_short_and_scripts_have_a_main(name):
    functions = [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        if (name, function.name) != ("train", "train"):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            assert not body or function.end_lineno - body[0].lineno < 40, f"{name}.{function.name}"
    if name in SCRIPTS:
        assert "main" in {function.name for function in functions}


def test_the_quickstart_is_what_readme_promises():
    """`make -n` reads the Makefile without doing anything."""
    run = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True)
    for command in (
        "prepare.py",
        "train.py config/quickstart.py",
        "sample.py --model out/quickstart",
    ):
        assert command in run.stdout
