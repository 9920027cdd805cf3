"""bench.py runs what people run, and prints what it measured. (What it measures is no test's
business.)
"""

import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bench
import model as gpt
import train

TINY = "--batch_size 1 --block_size 8 --steps 1 --dtype fp32".split()


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    """A GPT-2 of one block, one process, and no matmul of 17 GFLOP."""
    shape, rate = dict(n_layer=1, n_head=2, n_embd=64), bench.rate
    monkeypatch.setitem(bench.SHAPES, "gpt2", shape)
    monkeypatch.setattr(bench, "GPTConfig", functools.partial(bench.GPTConfig, **shape))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    monkeypatch.setattr(
        bench, "rate", lambda n, _, f, *a, **k: n if f is torch.matmul else rate(n, _, f, *a, **k)
    )


def run(capsys, *argv: str) -> dict:
    bench.main([*argv, "--json", "--rounds", "1", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


def test_the_ladder_ends_at_the_defaults():
    """Nothing but the number of micro-steps is left to change at the top, and each rung changes
    something.
    """
    fields = {field.name: field.default for field in dataclasses.fields(train.TrainConfig)}
    top = {}
    for changed in bench.LADDER.values():
        assert any(top.get(name) != value for name, value in changed.items())
        top |= changed
    assert top.pop("accumulate") == 4 and set(top) <= set(fields)
    assert {name: value for name, value in top.items() if fields[name] not in (value, "auto")} == {}


def test_a_step_against_transformers(capsys):
    result = run(capsys, "train", *TINY)
    ours, theirs = result["rows"]["ours"], result["rows"]["transformers"]
    assert ours["tokens/s"] == pytest.approx(8000 / ours["ms"]) and 0 < ours["% of matmul"] < 100
    assert result["ratios"]["ours"] == pytest.approx(ours["tokens/s"] / theirs["tokens/s"])
    assert (
        0 <= ours["wait ms"] <= ours["max wait ms"] < result["rows"]["ours, saving"]["max wait ms"]
    )
    assert result["settings"]["size"] == "gpt2" and result["settings"]["dtype"] == "fp32"


def test_a_run_that_fails_is_null_and_costs_no_other_its_figures(capsys, monkeypatch, tmp_path):
    def steps(arguments, accumulate=1, dtype="", **settings):
        if accumulate > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens/s": 200.0 if dtype == "bf16" else 100.0}

    monkeypatch.setattr(bench, "steps_of_train", steps)
    result = run(capsys, "ladder", *TINY)
    assert list(result["rows"]) == [
        *(n for n in bench.LADDER if n != "TF32"),
        "a large matmul",
    ]  # TF32 is for GPUs
    assert [name for name, row in result["rows"].items() if row is None] == ["4 micro-steps"]
    assert result["ratios"]["torch.compile"] == 2 and "4 micro-steps" not in result["ratios"]
    (tmp_path / "ladder.json").write_text(json.dumps(result))
    bench.main(["show", str(tmp_path / "ladder.json")])
    assert "4 micro-steps" in capsys.readouterr().out


def test_medians_of_rounds_and_one_line_if_nothing_could_be_measured(capsys):
    """The median of the ratios, not the ratio of the medians."""
    ours, theirs = iter([8.0, 1.0, 6.0]), iter([2.0, 1.0, 3.0])
    runs = {"ours": lambda: {"MB/s": next(ours)}, "theirs": lambda: {"MB/s": next(theirs)}}
    result = bench.interleaved(runs, 3, "theirs")
    assert result == dict(
        rows={"ours": {"MB/s": 6}, "theirs": {"MB/s": 2}}, ratios={"ours": 2, "theirs": 1}
    )
    with pytest.raises(ValueError, match="nothing could be measured: StopIteration"):
        bench.interleaved(runs, 1, "theirs")


def test_what_auto_chooses_is_the_baseline(capsys, monkeypatch):
    monkeypatch.setattr(
        bench, "steps_of_train", lambda _, **way: {"tokens/s": 1.0 + (way["dtype"] == "bf16")}
    )
    result = run(capsys, "choices", *TINY, "--size", "quickstart")
    assert len(result["rows"]) == 4 and result["settings"]["dtype"] == "fp32"
    assert sorted(result["ratios"].values()) == [1, 1, 2, 2]


def test_generation_against_transformers(capsys):
    result = run(capsys, "sample", "--max_tokens", "2", "--dtype", "fp32")
    assert result["ratios"]["ours"] > 0 and result["ratios"]["transformers"] == 1


def test_the_score_against_one_task_at_a_time(capsys, tmp_path):
    task = dict(
        ind=1,
        ctx="A man",
        endings=["sits.", "is a dog.", "eats", "runs away."],
        label=0,
        split_type="x",
    )
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    assert (
        run(capsys, "hellaswag", "--data", str(tmp_path / "tasks.jsonl"))["ratios"]["in batches"]
        > 0
    )


def test_tokens_of_files_against_tiktoken(capsys, text_file):
    bench.main(["tokenize", str(text_file), "--workers", "1", "--rounds", "1"])
    assert "tiktoken alone, 1 process " in capsys.readouterr().out


GPT2 = dict(n_layer=12, n_head=12, n_embd=768)


@pytest.mark.parametrize(
    "shape, B, options, peak",  # in GB, as MemTracker counts a step of fake CUDA tensors with all blocks. The second
    [  # figures are what slices of GPU_ROWS logits instead of ROWS save, by the storages of the fake GPU.
        (GPT2, 64, {}, 28.99 - 2.68),
        (GPT2, 64, dict(theirs=True), 94.8),
        (dict(n_layer=48, n_head=25, n_embd=1600, recompute=True), 8, {}, 34.8 - 2.68),
    ],
)
def test_memory_is_that_of_a_gpu(shape, B, options, peak):
    assert bench.peak_memory(shape, 1024, B, **options) == pytest.approx(peak * 1e9, rel=0.01)


def test_the_table_of_memory(capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {"gpt2": GPT2})
    monkeypatch.setattr(
        bench, "peak_memory", lambda shape, T, B, theirs: B * (3e9 if theirs else 1e9)
    )
    assert (
        bench.largest_batch(10, lambda B: 11 * B) == 0
        and bench.largest_batch(10, lambda B: 10 * B) == 1
    )
    bench.main(["memory"])
    head, *rows = (line.split("  ") for line in capsys.readouterr().out.splitlines()[1:])
    assert [row[0] for row in rows] == ["gpt2", "gpt2, recompute", "transformers' gpt2"]
    assert (
        rows[0][1:] != rows[2][1:]
        and "8" in " ".join(rows[0]).split()
        and "16 GB" in " ".join(head)
    )


# ---- plan: a run on paper ------------------------------------------------------------------------


def on_paper(
    gpu: str, n: int, size: str = "gpt2", batch: int = 524_288, at_once: int = 64, **options
):
    with torch.device("meta"):
        return bench.plan(
            gpt.GPT(gpt.GPTConfig(**gpt.SIZES[size])), gpu, n, 8, batch, at_once, **options
        )


@pytest.mark.parametrize(
    "gpu, n, options, reported",  # tokens/s of a GPU
    [
        ("A100", 8, {}, 524_288 / 0.30 / 8),  # llm.c's run_gpt2_124M.sh
        ("A100", 8, dict(size="gpt2-medium"), 524_288 / 0.82 / 8),  # run_gpt2_350M.sh
        ("A100", 8, dict(size="gpt2-large", at_once=32), 524_288 / 1.7 / 8),  # run_gpt2_774M.sh
        (
            "H100",
            8,
            dict(size="gpt2-xl", at_once=8, batch=2**20),
            2**20 / 2.8 / 8,
        ),  # run_gpt2_1558M.sh
        ("H100", 8, {}, 460e3),  # llm.c
        ("A100", 8, {}, 185e3),  # build-nanogpt
        (
            "A100",
            1,
            dict(at_once=16, batch=16 * 1024),
            16 * 1024 / 0.090,
        ),  # the last rung of the lecture's ladder
        ("RTX 4090", 1, dict(at_once=32), 106e3),  # the best of several
    ],
)
def test_the_plan_is_what_others_report(gpu, n, options, reported):
    seconds, _ = on_paper(gpu, n, **options)
    assert options.get("batch", 524_288) / seconds / n == pytest.approx(reported, rel=0.15)


def planned(capsys, *argv: str) -> dict:
    bench.main(["plan", "--json", *argv])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def counted(monkeypatch):
    """Bytes of a step about as they are counted for gpt2, at once."""
    monkeypatch.setattr(bench, "peak_memory", lambda shape, T, B: 2.7e9 + 0.37e9 * B)


@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_hours_are_those_of_the_recipe(capsys, counted, gpu):
    text = (Path(bench.__file__).parent / "config" / "gpt2_124M.py").read_text()
    hours = {
        n: float(h)
        for n, h in re.findall(rf"(\d) x {gpu}  [^\n]*? ([\d.]+) hours?\b(?=   |\n)", text)
    }
    hours |= {n: float(h) for n, h in re.findall(rf"(1) x {gpu} +(\d+) hours", text)}
    rows = planned(capsys, "--gpu", gpu)["rows"]
    assert set(hours) == {"1", "8"}
    assert {n: rows[f"1 x {n}"]["hours"] for n in hours} == pytest.approx(hours, rel=0.15)
    assert rows["1 x 8"]["dollars"] == pytest.approx(
        8 * bench.GPUS[gpu].dollars * rows["1 x 8"]["hours"]
    )


def test_an_all_reduce_by_hand():
    """400 MB on 8 GPUs, 100 GB/s each: 14 messages of 50 MB take 0.5 ms each, and each of 4 buckets
    14 x 5 us more.
    """
    assert bench.all_reduce(400e6, 8, 100e9) == pytest.approx(7e-3 + 4 * 14 * 5e-6)
    assert bench.all_reduce(400e6, 1, 100e9) == 0
    assert f"bucket_cap_mb={bench.BUCKET / 2**20:.0f})" in inspect.getsource(train.train)


def test_what_of_the_exchange_a_step_waits_for():
    """Behind the last backward pass all is hidden but the embedding; on a slow network, as much as
    the pass is long.
    """
    embedding, all_of_it = 4 * 50304 * 768, 4 * 124_439_808
    fast, uses = on_paper("H100", 8)
    alone, none = on_paper("H100", 1, batch=524_288 // 8)
    assert fast - alone == pytest.approx(bench.all_reduce(embedding, 8, 0.8 * 450e9))
    assert none["all-reduce"] == 0 and uses["all-reduce"] < 1

    fast, _ = on_paper("H100", 64, at_once=8)
    slow, uses = on_paper("H100", 64, at_once=8, network=1e9)
    exchange = bench.all_reduce(all_of_it, 64, 1e9)
    backward = exchange / uses["all-reduce"]
    waits = exchange - backward - bench.all_reduce(embedding, 64, 0.8 * 400e9)
    assert uses["all-reduce"] > 1 and slow - fast == pytest.approx(waits)


def test_what_the_disk_does_in_a_step():
    """A thousandth of a checkpoint, three float32 for each parameter; two bytes a token."""
    seconds, uses = on_paper("H100", 8)
    assert uses["disk"] * seconds * 1e9 == pytest.approx(12 * 124_439_808 / 1000 + 2 * 524_288)


def test_few_sequences_take_as_long_as_those_that_fill_the_gpu():
    times = {n: on_paper("H100", 1, batch=1024 * n, at_once=n)[0] for n in (1, 2, 16, 32)}
    assert times[1] == times[2] and times[32] > 1.7 * times[16]
    assert on_paper("H100", 1, batch=1024, at_once=1)[1]["sequences"] == pytest.approx(5632 / 1024)


def test_a_plan_names_what_is_full_next(capsys, counted, tmp_path):
    """One machine, two, and all, if all have equal parts of a step; the result is shown like any
    other.
    """
    result = planned(capsys, "--gpus", "64")
    assert list(result["rows"]) == ["1 x 1", "1 x 8", "2 x 8", "8 x 8"]
    assert result["rows"]["8 x 8"]["next"] == "sequences" and result["device"] == "paper, H100"
    assert (
        planned(capsys, "--gpus", "16", "--network", "1")["rows"]["2 x 8"]["next"] == "all-reduce"
    )
    assert list(planned(capsys, "--gpus", "24", "--batch_tokens", str(24 * 1024))["rows"]) == [
        "1 x 1",
        "1 x 8",
        "3 x 8",
    ]
    (tmp_path / "plan.json").write_text(json.dumps(result))
    bench.main(["show", str(tmp_path / "plan.json")])
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "sequences"


SCALE = (Path(bench.__file__).parent / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "argv, shown",
    re.findall(r"^\$ python bench.py (plan.*)\n((?: +t|\d x).*\n(?:\d x.*\n)+)", SCALE, re.M),
)
def test_the_page_shows_what_the_plan_prints(capsys, monkeypatch, argv, shown):
    """Memory is stood in for by straight lines through a sequence, as counted, and what fits an
    H100.
    """
    lines = {12: lambda B: 3.1e9 + 0.4e9 * (B - 1), 48: lambda B: 27.86e9 + 3.5e9 * (B - 1)}
    monkeypatch.setattr(bench, "peak_memory", lambda shape, T, B: lines[shape["n_layer"]](B))
    bench.main(argv.split())
    assert capsys.readouterr().out.split("\n", 1)[1] == shown


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("--gpus 12 --batch_tokens 12288", "12 GPUs must be machines of 8 and divide 12 sequences"),
        ("--gpus 48", "48 GPUs must be machines of 8 and divide 512 sequences"),
        ("--gpus 0", "0 GPUs"),
        ("--gpus_per_node -1", "no negatives"),
        ("--tokens -1", "no negatives"),
        ("--batch_tokens 0", "divide 0 sequences"),
        ("--network -1", "no negatives"),
        ("--block_size 0", "block_size is 0"),
        (
            "--model gpt2-xl --gpu=RTX_4090",
            "gpt2-xl: a sequence takes 28 GB, too much for an RTX 4090",
        ),
    ],
)
def test_an_impossible_plan_is_one_line(capsys, monkeypatch, argv, reason):
    monkeypatch.setattr(bench, "peak_memory", lambda shape, T, B: 28e9 * B)
    with pytest.raises(SystemExit) as exit_:
        bench.main(["plan", *(word.replace("_4090", " 4090") for word in argv.split())])
    error = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and error.startswith("bench.py: ")
        and error.count("\n") == 1
        and reason in error
    )


RESULTS = sorted((Path(bench.__file__).parent / "results").glob("*/*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_committed_results_are_shown(capsys, file):
    bench.main(["show", str(file)])
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize(
    "content", ["[]", "x", '{"bench": "train"}', '{"bench": "train", "rows": {"ours": 1}}']
)
def test_a_file_that_is_no_whole_result_is_one_line(capsys, tmp_path, content):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        bench.main(["show", str(tmp_path / "odd.json")])
    error = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and error.startswith(f"bench.py: {tmp_path}/odd.json: ")
        and error.count("\n") == 1
    )


def test_a_failed_measurement_costs_measure_sh_no_other(tmp_path):
    """With a stand-in for python that fails in the middle of what `train` writes, and is killed in
    `sample --batch`.
    """
    python, out = tmp_path / "python", tmp_path / "out"
    kinds = (
        '*"bench.py train"*) echo -n "{\\"ro"; exit 2;; *"--batch 32"*) kill -9 $$;; *) echo "{}";;'
    )
    python.write_text(f'#!/bin/bash\ncase "$*" in {kinds} esac\n')
    python.chmod(0o755)
    script = [*"bash results/measure.sh".split(), str(out), "tasks.jsonl", "shards"]
    root = Path(bench.__file__).parent
    done = subprocess.run(
        script, cwd=root, env=os.environ | dict(PYTHON=str(python)), capture_output=True, text=True
    )
    whole = "hellaswag.json ladder.json ladder_4.json memory.json sample_1.json tests.txt train.txt".split()
    assert sorted(path.name for path in out.iterdir() if path.read_text() == "{}\n") == whole
    assert f"failed (see {out}/log.txt): sample_32.json train.json train_64.json\n" in done.stderr
