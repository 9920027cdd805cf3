"""notebooks/colab.ipynb runs from top to bottom, on a CPU with small settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_toy

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository of the files as they are here, committed or not."""
    if not shutil.which("git"):
        pytest.skip("no git")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not in a git repository")
    folder = tmp_path / "source"
    for name in filter(None, listed.stdout.split("\0")):
        is_code = name.endswith((".py", ".html")) and not name.startswith(("tests/", "results/"))
        if is_code and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    as_someone = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*as_someone, *command], check=True)
    return folder


@pytest.mark.torture
def test_the_notebook_runs_from_top_to_bottom(repository, text_file, tmp_path, monkeypatch):
    """With its cells as they stand, except for the values of the first one: the clone comes from
    here, the model is a toy with GPT-2's vocabulary, and a training step is small.
    """
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    toy = tmp_path / "toy"
    make_toy(vocab_size=50257, block_size=64).save_pretrained(toy)
    values = dict(
        REPOSITORY=repository.as_uri(),
        MODEL=str(toy),
        TEXT=str(text_file),
        PROMPT="The quick",
        SETTINGS="--max_steps=2 --block_size=64 --total_batch_size=256 --eval_tokens=512 "
        "--sample_every=0 --warmup_steps=1 --compile=False --device=cpu",
    )
    book = nbformat.read(NOTEBOOK, as_version=4)
    settings, *others = [cell for cell in book.cells if cell.cell_type == "code"]
    names = [line.split(" = ")[0] for line in settings.source.splitlines()]
    assert names == list(values)
    settings.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())

    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = nbclient.NotebookClient(
        book, timeout=240, resources={"metadata": {"path": str(workplace)}}
    )
    client.execute()

    printed = []
    pictures = 0
    for cell in others:
        for output in cell.outputs:
            printed.append(output.get("text", ""))
            pictures += "image/svg+xml" in output.get("data", {})
    text = "".join(printed)
    assert "done: 2 steps" in text, text
    assert text.count("The quick") == 3
    assert pictures == 2
    checkpoint = workplace / "reproduce-gpt2" / "out" / "finetune" / "step_0000002"
    assert (checkpoint / "model.safetensors").is_file()


def test_the_notebook_has_no_outputs(notebook):
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


def test_its_cells_name_commands_and_settings_that_exist(notebook, monkeypatch):
    """As test_docs.py does with the documents."""
    test_docs = pytest.importorskip("test_docs")
    monkeypatch.chdir(ROOT)
    commands = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        for line in source(cell).splitlines():
            line = line.strip().replace("{MODEL}", "gpt2").replace("{SETTINGS}", "--max_steps=60")
            if line.startswith("!python "):
                commands.append(line.replace("{text}", "tale.txt").replace("{PROMPT}", "ROMEO:"))
    assert len(commands) == 3
    assert list(test_docs.wrong_commands("\n".join(commands))) == []
