"""The house: who imports whom, what an import does, and what is no command."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import parts

import pytest
from conftest import clean_environment

ROOT = Path(__file__).parent.parent

# What each file may import of the project. The top stands on the parts; a part imports only parts
# that are listed above it.
TOP = {
    "configurator": "",
    "model": "attention loss pretrained tokenizer",
    "prepare": "console documents encoding files overlap sharding tokenizer",
    "fineweb": "console data documents encoding files hub sharding tokenizer",
    "hellaswag": "model auto console files hub json_files metrics runtime standin tokenizer",
    "sample": "configurator model auto console encoding files inference json_files page "
    "pretrained runtime tokenizer",
    "plot": "model console files metrics pretrained report tokenizer",
    "train": "configurator model hellaswag plot auto checkpoint console data dial embedding files "
    "inference metrics optimizer pretrained report runtime standin tokenizer zero",
    "bench": "model train hellaswag auto console data documents files inference json_files loss "
    "metrics peers runtime sharding tokenizer zero",
}
PARTS = {
    "files": "",
    "json_files": "files",
    "console": "",
    "hub": "",
    "loss": "",
    "embedding": "",
    "optimizer": "",
    "runtime": "",
    "zero": "runtime",
    "compiler": "",
    "matvec": "compiler",
    "attention": "compiler",
    "standin": "",
    "snapshot": "",
    "pretrained": "console hub json_files snapshot standin",
    "decode": "compiler matvec pretrained",
    "encoding": "",
    "tokenizer": "console encoding files json_files",
    "documents": "encoding tokenizer",
    "data": "files json_files tokenizer",
    "sharding": "console encoding files tokenizer documents data",
    "overlap": "data tokenizer",
    "inference": "decode matvec pretrained standin tokenizer console runtime",
    "auto": "attention matvec console runtime inference",
    "dial": "auto data optimizer runtime tokenizer",
    "metrics": "files json_files tokenizer data runtime",
    "report": "console files metrics",
    "checkpoint": "console files json_files runtime zero snapshot pretrained tokenizer metrics "
    "report",
    "look": "inference runtime",
    "page": "json_files tokenizer runtime pretrained inference look metrics",
    "peers": "console data sharding",
}
HOUSE = TOP | {f"parts.{name}": allowed for name, allowed in PARTS.items()}
COMMANDS = ("prepare", "fineweb", "train", "sample", "hellaswag", "plot", "bench")
HEAVY = {
    *("tiktoken", "tokenizers", "transformers", "datasets", "matplotlib", "safetensors"),
    *("huggingface_hub", "wandb", "tensorboard", "pyarrow", "flask", "werkzeug"),
}


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imported(name: str) -> set[str]:
    """The modules that a file imports anywhere; parts.x counts as x."""
    names = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("parts.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "parts":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").removeprefix("parts."))
    return names


def test_every_file_is_in_the_table_and_every_part_on_the_map():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)
    assert {path.stem for path in ROOT.glob("parts/*.py")} == {"__init__", *PARTS}
    for name in PARTS:
        assert re.search(rf"^ *{name}  ", parts.__doc__ or "", re.M), name


@pytest.mark.parametrize("name", HOUSE)
def test_a_file_imports_what_the_table_allows(name):
    assert imported(name) & {*TOP, *PARTS} <= set(HOUSE[name].split())


@pytest.mark.parametrize("name", PARTS)
def test_a_part_imports_parts_above_it_in_the_table_and_nothing_from_the_top(name):
    listed = list(PARTS)
    above = set(listed[: listed.index(name)])
    assert imported(f"parts.{name}") & set(PARTS) <= above
    assert not imported(f"parts.{name}") & set(TOP)


def test_importing_has_no_side_effects(tmp_path):
    """In a new process: no socket is made, no file opened for writing, no process started, nothing
    heavy loaded.
    """
    script = f"""
import importlib, sys
import torch, numpy, concurrent.futures, torch.nn.parallel, torch.distributed  # have effects
import torch.utils.checkpoint
from typing import Literal
def watch(event, arguments):
    writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writing or event.startswith(("socket.", "subprocess.", "os.mkdir", "os.re")):
        raise SystemExit(f"import of {{name}}: {{event}} {{arguments}}")
sys.dont_write_bytecode = True
sys.addaudithook(watch)
for name in {list(HOUSE)!r}:
    importlib.import_module(name)
    heavy = {HEAVY!r} & set(sys.modules)
    if heavy:
        raise SystemExit(f"import of {{name}} loads {{heavy}}")
"""
    command = [sys.executable, "-c", script]
    environment = clean_environment()
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HOUSE)
def test_nothing_but_definitions_at_the_top_level(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in parse(name).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        environment = ast.unparse(node).startswith("os.environ.setdefault(")
        environment = environment and name in ("train", "sample")
        assert docstring or guard or environment or isinstance(node, allowed), node.lineno


@pytest.mark.parametrize("name", HOUSE)
def test_commands_have_a_main_and_nothing_else_has(name):
    functions = {node.name for node in parse(name).body if isinstance(node, ast.FunctionDef)}
    assert ("main" in functions) == (name in COMMANDS)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_run_says_that_it_is_no_command(name):
    command = [sys.executable, str(ROOT / "parts" / f"{name}.py")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == f"parts/{name}.py is no command: README.md lists the commands\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_without_the_environment_a_command_is_one_line(name):
    """Python's -S hides installed packages, as a terminal does where .venv is not active."""
    command = [sys.executable, "-S", str(ROOT / f"{name}.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    [line] = run.stderr.splitlines()
    assert "source .venv/bin/activate" in line and "make install" in line


def test_the_quickstart_is_what_readme_promises():
    """`make -n` reads the Makefile without doing anything."""
    run = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True)
    for command in ("prepare.py", "train.py config/quickstart.py", "sample.py --model out/quickst"):
        assert command in run.stdout
