"""bench.py peers: who is missing is said, what is measured is kept, and each program gets the work
that it is said to get. No test looks at what is measured.
"""

import json
import re
import sys
from pathlib import Path

import bench
import train
from model import GPT
from parts import peers

import numpy
import pytest
from conftest import TOY_MODEL

SHAPE = {name: TOY_MODEL[name] for name in ("n_layer", "n_head", "n_embd")}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "gpt2", SHAPE)
    small = dict(block_size=32, steps=2, new_tokens=2, tasks=2)
    workload = peers.Workload
    monkeypatch.setattr(peers, "Workload", lambda shape: workload(shape, **small))


@pytest.fixture
def installed(monkeypatch):
    """The only packages that count as installed, here and in --python's environment."""
    modules = {"transformers": "5.0"}
    monkeypatch.setattr(peers, "find_packages", lambda python, distributions: modules)
    return modules


@pytest.fixture
def watched(monkeypatch):
    """Nothing is run: the commands that would be, and what each would print."""
    commands = []

    def watch(command, folder, pattern=peers.OUTPUT, environment=None):
        commands.append([str(word) for word in command])
        code = command[2] if command[1] == "-c" else ""
        compile(code, "code", "exec")
        out = re.search("OUT = '(.+)'", code)
        if out:
            Path(out[1]).mkdir()
        n_times = 1 if "work(" in code else 3
        return peers.Watched(ms=[500.0] * n_times, first=3.0, seconds=2.0, gb=1.5)

    monkeypatch.setattr(peers, "watch", watch)
    return commands


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Options that name a small text, and where all is kept."""
    import pyarrow
    import pyarrow.parquet

    text = tmp_path / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1_500_000, "é" * 250_000]}), text)
    return ["--text", str(text), "--folder", str(tmp_path / "kept")]


def fake_program(name: str, folder: Path) -> Path:
    """A folder with the lines that EDITS changes."""
    for file, edits in peers.EDITS[name].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        lines = [*edits, "# simple launch:", "the rest", ""]
        (folder / file).write_text("\n".join(lines))
    (folder / "data").mkdir(exist_ok=True)
    return folder


def run(capsys, *argv: str) -> tuple[dict, list[str]]:
    """The JSON, and the lines beside it."""
    bench.main(["peers", "--json", *argv])
    out, err = capsys.readouterr()
    return json.loads(out), err.splitlines()


def test_who_is_missing_is_left_out_and_said_in_a_line(capsys, watched, installed, files):
    result, lines = run(capsys, *files, "--rounds", "1")
    assert [line for line in lines if "left out" in line] == [
        "nanoGPT: left out, no folder (--nanogpt)",
        "build-nanogpt: left out, no folder (--build_nanogpt)",
        "llama.cpp: left out, no llama_cpp here, nor in --python",
        "CTranslate2: left out, no ctranslate2 here, nor in --python",
        "CTranslate2, int8: left out, no ctranslate2 here, nor in --python",
        "ONNX Runtime: left out, no optimum.onnxruntime here, nor in --python",
        "OpenVINO: left out, no optimum.intel here, nor in --python",
        "transformers' Trainer: left out, no accelerate here, nor in --python",
    ]
    assert result["rows"] == {
        "ours": {
            "ms a step": 500.0,
            "start s": 3.0,
            "GB": 1.5,
            "resume s": 3.0,
            "tokens/s": 4.0,
            "tasks/s": 4.0,
            "MB/s": 1.0,
        },
        "ours, int8": {"tokens/s": 4.0},
        "transformers": {"tokens/s": 4.0},
    }
    assert result["spread"]["ours"]["tasks/s"] == [4.0, 4.0]
    assert result["settings"] == dict(
        block_size=32,
        steps=2,
        new_tokens=2,
        tasks=2,
        megabytes=2.0,
        transformers="5.0",
        rounds=1,
    )
    assert bench.format_table(result).splitlines()[2].startswith("ours ")


def test_all_programs_take_turns(capsys, watched, installed, files, tmp_path):
    """One kind after the other, each in all programs, with the workload's sizes."""
    for module in {package.module for package in peers.PACKAGES.values()} | {"accelerate"}:
        installed[module] = "1.0"
    nanogpt = fake_program("nanoGPT, bf16", fake_program("nanoGPT", tmp_path / "a"))
    build = fake_program("build-nanogpt", tmp_path / "b")
    given = ["--nanogpt", str(nanogpt), "--build-nanogpt", str(build), "--gguf", "x.gguf"]
    result, lines = run(capsys, *files, *given, "--rounds", "2")
    measured = [re.match(r"round (\d)  (.+?)  +(\S+)", line) for line in lines]
    turns = [match.groups()[:2] for match in measured if match]
    trained = ["ours", "nanoGPT", "nanoGPT, bf16", "build-nanogpt", "transformers"]
    assert turns[:5] == [("1", name) for name in trained]
    assert turns[len(turns) // 2 :][:5] == [("2", name) for name in trained]
    assert list(result["rows"]["build-nanogpt"]) == [
        "ms a step",
        "start s",
        "GB",
        *"tasks/s MB/s".split(),
    ]
    assert "resume s" in result["rows"]["transformers"]
    assert set(result["rows"]["llama.cpp"]) == {"tokens/s"} == set(result["rows"]["CTranslate2"])

    copied = (tmp_path / "kept" / "build-nanogpt" / "train_gpt2.py").read_text()
    for line in ("= 32\n", "B = 1 ", "T = 32 ", "n_layer: int = 2", "max_steps = 2", "False"):
        assert line in copied
    assert "the rest" not in (tmp_path / "kept" / "build-nanogpt" / "gpt.py").read_text()
    for command in watched:
        if command[1].endswith("train.py"):
            assert {"--n_layer=2", "--n_embd=32", "--block_size=32"} <= set(command)
        if command[1] == "-c" and "OUT" not in command[2]:
            assert "BLOCK_SIZE = 2, 32\n" in command[2]


def test_what_was_measured_is_kept(capsys, watched, installed, files):
    first, _ = run(capsys, *files, "--rounds", "2", "--only", "generate")
    n_commands = len(watched)
    again, lines = run(capsys, *files, "--rounds", "2", "--only", "generate")
    assert again == first and len(watched) == n_commands
    assert not [line for line in lines if line.startswith("round")]
    more, _ = run(capsys, *files, "--rounds", "2", "--only", "train")
    assert len(watched) == n_commands + 2 and "tokens/s" in more["rows"]["ours"]


def test_medians_and_the_lowest_and_highest():
    records = []
    for value in (3.0, 1.0, 8.0):
        records.append(dict(name="x", figures={"ms": value}))
    assert peers.summarise(records, ["x", "y"]) == {
        "rows": {"x": {"ms": 3.0}, "y": None},
        "spread": {"x": {"ms": [1.0, 8.0]}},
    }


def test_a_program_that_fails_spoils_no_other(capsys, monkeypatch, watched, installed, files):
    watch = peers.watch

    def fail(command, folder, *arguments, **options):
        if folder.name == "transformers":
            raise ValueError("it ended with 1: no such thing")
        return watch(command, folder, *arguments, **options)

    monkeypatch.setattr(peers, "watch", fail)
    result, lines = run(capsys, *files, "--rounds", "1", "--only", "generate")
    assert "transformers, generate: it ended with 1: no such thing" in lines
    assert result["rows"]["transformers"] is None and result["rows"]["ours"]


def test_a_model_that_cannot_be_converted_is_said(capsys, monkeypatch, watched, installed, files):
    installed["ctranslate2"] = "1.0"
    watch = peers.watch

    def fail(command, *arguments, **options):
        if "TransformersConverter" in command[2]:
            raise ValueError("it ended with 1: no")
        return watch(command, *arguments, **options)

    monkeypatch.setattr(peers, "watch", fail)
    result, lines = run(capsys, *files, "--rounds", "1", "--only", "generate")
    assert "CTranslate2: left out, it does not convert the model: it ended with 1: no" in lines
    assert "CTranslate2" not in result["rows"] and result["rows"]["ours"]


def one_line(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        bench.main(["peers", *argv])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_another_version_of_a_program_is_one_line(capsys, watched, installed, files, tmp_path):
    program = fake_program("nanoGPT", tmp_path / "a")
    line = one_line(capsys, *files, "--nanogpt", str(tmp_path / "b"))
    assert f"{tmp_path / 'b'}: no such folder" in line
    (program / "train.py").write_text("print(1)")
    line = one_line(capsys, *files, "--nanogpt", str(program))
    assert "train.py: no 'if iter_num % eval_interval' in it; is it another version?" in line
    (program / "train.py").unlink()
    line = one_line(capsys, *files, "--nanogpt", str(program))
    assert line.endswith(f"{program}: no train.py in it; is it nanoGPT?")


def test_an_interpreter_that_is_none_is_one_line(capsys, watched, files, tmp_path):
    line = one_line(capsys, *files, "--python", str(tmp_path / "python"))
    assert f"--python {tmp_path / 'python'}: cannot run it" in line


def test_packages_are_found_in_an_interpreter():
    wanted = {"json": "no_such", "numpy": "numpy", "no_such": "numpy", "no.such": "numpy"}
    found = peers.find_packages(sys.executable, wanted)
    assert found == {"json": json.__version__, "numpy": numpy.__version__}


def test_a_process_is_watched(tmp_path):
    code = "print('took 1,000.5 ms'); print('took 2 ms'); print('the end')"
    run = peers.watch([sys.executable, "-c", code], tmp_path, r"took ([\d.,]+) ms")
    assert run.ms == [1000.5, 2.0]
    assert 0 < run.first < run.seconds and run.gb > 0
    code = "print('first'); raise SystemExit('this is why')"
    with pytest.raises(ValueError, match="it ended with 1: this is why"):
        peers.watch([sys.executable, "-c", code], tmp_path)


def test_texts_and_tasks_made_here_are_real_ones(tmp_path):
    import hellaswag

    peers.write_tasks(tmp_path / "tasks.jsonl")
    assert len(hellaswag.examples(tmp_path / "tasks.jsonl")) == 2
    peers.write_texts(tmp_path / "text.parquet")
    assert peers.megabytes_of(tmp_path / "text.parquet") > 1


@pytest.mark.torture
def test_real_programs_on_a_tiny_model(capsys, files):
    """Training, its resume, generation, HellaSwag and tokenising, by all programs that are here."""
    result, lines = run(capsys, *files, "--rounds", "1")
    columns = {"ms a step", "start s", "GB", "resume s", "tokens/s", "tasks/s", "MB/s"}
    assert set(result["rows"]["ours"]) == columns
    for name in ("ours, int8", "transformers"):
        assert result["rows"][name]["tokens/s"] > 0
    assert not [line for line in lines if "ended with" in line]
    assert GPT.from_pretrained(Path(files[3]) / "model").config.n_embd == 32


def test_a_program_does_not_get_what_train_sets_for_itself(monkeypatch, tmp_path):
    for name in peers.SET_BY_TRAIN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = f"import os; print(7 - len(os.environ.keys() & {set(peers.SET_BY_TRAIN)}), 'ms')"
    ours = "import os; print(os.environ['OMP_NUM_THREADS'], 'ms')"
    for script, expected in ((code, 7), (ours, 1)):
        seen = peers.watch([sys.executable, "-c", script], tmp_path, r"(\d+) ms")
        assert seen.ms == [expected]


def test_the_list_of_what_train_sets_is_whole():
    source = Path(train.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'os.environ.setdefault\("(\w+)"', source)) == set(peers.SET_BY_TRAIN)
