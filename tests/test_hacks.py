"""docs/hacking.md: each of its diffs, applied to a copy of the project, trains, resumes to the bit
after a kill, is evaluated, scored and sampled, with AdamW and with Muon.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import clean_environment

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hacking.md").read_text(encoding="utf-8")
# Title, text and diff of each section that has a diff.
HACK = re.compile(r"^## ([^\n]+)\n((?:(?!^## )[^`]|`(?!``))*)```diff\n(.*?)^```", re.M | re.S)
HACKS = {title: (text, diff) for title, text, diff in HACK.findall(PAGE)}
TASK = {
    "activity_label": "Fox",
    "ctx_a": "The quick brown",
    "ctx_b": "",
    "ctx": "The quick brown",
    "endings": ["fox jumps over.", "towers.", "potions brew in old stone.", "lazy wizards."],
}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")


def copy_project(folder: Path) -> Path:
    for path in (*ROOT.glob("*.py"), *ROOT.glob("parts/*")):
        if path.is_file():
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return folder


def apply_diff(folder: Path, diff: str) -> None:
    """git apply, which takes no line that differs."""
    command = ["git", "apply", "--whitespace=error", "-"]
    run = subprocess.run(command, cwd=folder, input=diff, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr


def drive(folder: Path, shards: Path) -> dict:
    tasks = folder / "tasks.jsonl"
    lines = [json.dumps(TASK | dict(label=label)) for label in (0, 1, 2, 3, 1)]
    tasks.write_text("\n".join(lines))
    environment = clean_environment() | dict(PYTHONPATH=str(folder))
    command = [sys.executable, ROOT / "tests" / "hack_driver.py", shards, tasks]
    run = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    result["out"] = run.stdout
    return result


def test_the_page_has_its_diffs():
    assert len(HACKS) >= 12
    for title, (_, diff) in HACKS.items():
        files = re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)
        changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
        assert len(files) == 1 and len(changed) <= 22, title


@needs_fork
@pytest.mark.skipif(not shutil.which("git"), reason="git applies the diffs")
@pytest.mark.parametrize("title", HACKS)
def test_a_hack_trains_resumes_and_samples(title, tmp_path, shards):
    text, diff = HACKS[title]
    folder = copy_project(tmp_path)
    apply_diff(folder, diff)
    result = drive(folder, shards)
    is_own = "this is not a GPT-2" in text
    assert is_own == ("model.py is not GPT-2 any more" in result["out"])
    assert is_own == ("gpt.safetensors" in result["files"])
    assert is_own != ("model.safetensors" in result["files"])
    assert is_own != ("config.json" in result["files"])
