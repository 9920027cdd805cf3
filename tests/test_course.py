"""docs/course: every block runs and prints what stands below it, and its last loop is train.py's.

OMP_NUM_THREADS=1 python tests/test_course.py      # writes outputs and diffs into the chapters
"""

import ast
import contextlib
import difflib
import io
import json
import math
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from model import GPT, open_model
from parts import attention
from parts.data import write_shard

import pytest
import torch
from conftest import clean_environment, ids, make_toy, metrics, toy_config

ROOT = Path(__file__).parents[1]
COURSE = ROOT / "docs" / "course"
CHAPTERS = sorted(COURSE.glob("*.md"))
ALICE = COURSE / "alice"
LARGE_BATCHES = COURSE / "09-large-batches.md"

# A block that runs, Python or one command of the course, and the block below it: what it prints.
RUNS = re.compile(
    r"^```(python|bash)\n((?:(?!```).*\n)+)```\n\n?```(?:text)?\n((?:(?!```).*\n)*)```$",
    re.MULTILINE,
)
DIFF = re.compile(r"^```diff\n--- (train_\d+\.py)\n\+\+\+ (train_\d+\.py)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?:e[+-]\d+)?")


def strip_lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def what_it_prints(language: str, source: str) -> str:
    """Run a block in the project's folder, in this process."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(ROOT)
        patch.syspath_prepend(str(COURSE))
        with contextlib.redirect_stdout(out):
            if language == "python":
                exec(compile(source, "block", "exec"), {"__name__": "block"})
                return out.getvalue()
            for command in source.splitlines():
                python, script, *arguments = shlex.split(command, comments=True)
                assert python == "python"
                patch.setattr(sys, "argv", [script, *arguments])
                runpy.run_path(script, run_name="__main__")
    return out.getvalue()


def diff(old: str, new: str) -> str:
    """What changed from one script of the course to the next, without its docstring."""
    lines = []
    for name in (old, new):
        text = read(COURSE / name)
        lines.append(text.partition('"""\n\n')[2].splitlines(keepends=True))
    return "".join(list(difflib.unified_diff(*lines, n=1))[2:])


def same(printed: str, shown: str) -> bool:
    """The same text, with decimal numbers to within 3 %: other processors sum in other orders. A
    hundred steps at a high rate make more of it: the losses of a training, to within 10 %. Other
    seeds end 6 % apart.
    """
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    for our_line, their_line in zip(printed.splitlines(), shown.splitlines()):
        tolerance = 0.1 if our_line.startswith("step ") else 0.03
        for ours, theirs in zip(NUMBER.findall(our_line), NUMBER.findall(their_line)):
            if not math.isclose(float(ours), float(theirs), rel_tol=tolerance, abs_tol=0.02):
                return False
    return True


def all_runs():
    for chapter in CHAPTERS:
        for number, (language, source, shown) in enumerate(RUNS.findall(read(chapter)), 1):
            yield pytest.param(language, source, shown, id=f"{chapter.stem}, block {number}")


@pytest.mark.parametrize("language, source, shown", list(all_runs()))
def test_blocks_print_what_stands_below_them(language, source, shown):
    printed = what_it_prints(language, source)
    assert same(printed, shown), printed


def test_other_python_is_shown_with_its_output_or_stands_in_the_code():
    code = ""
    for path in (ROOT / "model.py", *COURSE.glob("*.py")):
        code += strip_lines(read(path))
    for chapter in CHAPTERS:
        text = RUNS.sub("", read(chapter))
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
            assert strip_lines(block) in code, f"{chapter.name}: {block}"


def test_each_chapter_of_the_loop_is_the_diff_it_shows():
    shown = {}
    for chapter in CHAPTERS:
        for old, new, text in DIFF.findall(read(chapter)):
            assert text == diff(old, new), f"{new}: run python tests/test_course.py"
            shown[new] = old
    scripts = sorted(path.name for path in COURSE.glob("train_*.py"))
    assert shown == dict(zip(scripts[1:], scripts))


def test_the_first_loop_has_thirty_lines_and_the_gpt_sixty():
    loop = read(COURSE / "train_01.py").splitlines()
    assert len(loop) <= 31
    body = ast.parse(read(COURSE / "gpt.py")).body[1:]  # without the docstring
    n_lines = 0
    for statement in body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            code = ast.get_source_segment(read(COURSE / "gpt.py"), statement)
            n_lines += len(re.findall(r"^ *\S", code, re.MULTILINE))
            n_lines += len(getattr(statement, "decorator_list", []))  # not in the segment
    assert n_lines == 60


@pytest.mark.parametrize("vocab_size, n_head", [(257, 2), (50257, 4)])
def test_sixty_lines_compute_what_model_py_computes(tmp_path, vocab_size, n_head):
    course = runpy.run_path(str(COURSE / "gpt.py"))
    model = make_toy(vocab_size=vocab_size, n_head=n_head)
    model.save_pretrained(tmp_path)
    idx = ids(3, 16)
    with torch.no_grad():
        expected = model(idx)
        logits = course["load"](tmp_path)(idx)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_sixty_lines_load_the_checkpoint_of_the_course():
    course = runpy.run_path(str(COURSE / "gpt.py"))
    model: GPT
    model, tokenizer, _ = open_model(ALICE)
    idx = torch.from_numpy(tokenizer.encode("Alice was not a bit hurt").astype("int64"))[None]
    with torch.no_grad():
        assert torch.allclose(course["load"](ALICE)(idx), model.eval()(idx), atol=1e-4)


def test_the_last_loop_is_train_py_s(tmp_path, monkeypatch):
    """The same settings and tokens: the same losses, bit for bit, where both have torch's backward
    pass of attention.
    """
    monkeypatch.setattr(attention, "load_kernel", lambda: None)
    source = read(COURSE / "train_12.py")
    for name, longer, shorter in (("max_steps", 100, 20), ("eval_every", 50, 10)):
        assert source.count(f"\n{name} = {longer}") == 1
        source = source.replace(f"\n{name} = {longer}", f"\n{name} = {shorter}")
    last = {"__file__": str(COURSE / "train_12.py")}
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        exec(compile(source, "train_12.py", "exec"), last)

    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "alice_train_000001.bin", last["shard"].tokens)
    write_shard(shards / "alice_val_000001.bin", last["val_shard"].tokens)
    (shards / "meta.json").write_text(json.dumps({"tokenizer": "bytes"}))
    settings = {}
    for name in ("batch_size", "total_batch_size", "block_size", "max_steps", "weight_decay"):
        settings[name] = last[name]
    for name in ("learning_rate", "min_lr", "warmup_steps"):
        settings[name] = last[name]
    shape = {name: last["shape"][name] for name in ("n_layer", "n_head", "n_embd")}
    config = toy_config(
        shards,
        tmp_path / "run",
        **settings,
        **shape,
        dtype="bf16",
        flash=True,
        eval_every=last["eval_every"],
        eval_tokens=last["eval_tokens"],
    )
    train.train(config)
    assert [record["loss"] for record in metrics(config.out_dir)] == last["losses"]
    val_losses = [record["loss"] for record in metrics(config.out_dir, "val")]
    assert val_losses == pytest.approx(last["val_losses"], abs=1e-3)
    assert len(val_losses) == 3


@pytest.mark.torture
def test_two_processes_print_the_losses_of_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(COURSE / "train_11.py")]
    environment = clean_environment()
    two = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    runs = RUNS.findall(read(LARGE_BATCHES))
    [shown] = [output for _, source, output in runs if "train_10.py" in source]
    assert same(two.stdout, shown), two.stdout


def main() -> None:
    """Write what blocks print below them, and the scripts' diffs into their blocks."""
    names = sys.argv[1:]
    for chapter in CHAPTERS:
        if names and not any(chapter.name.startswith(name) for name in names):
            continue

        def run(block: re.Match) -> str:
            language, source, _ = block.groups()
            printed = what_it_prints(language, source)
            start = block.start(3) - block.start()
            return f"{block[0][:start]}{printed}```"

        def write_diff(block: re.Match) -> str:
            old, new, _ = block.groups()
            return f"```diff\n--- {old}\n+++ {new}\n{diff(old, new)}```"

        text = DIFF.sub(write_diff, read(chapter))
        chapter.write_text(RUNS.sub(run, text), encoding="utf-8")
        print(chapter.name, "written", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
