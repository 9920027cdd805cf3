"""bench.py runs what people run, and prints what it measured. No test looks at what it measures."""

import dataclasses
import functools
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench
import train
from model import GPT, SIZES, GPTConfig

import pytest
import torch

ROOT = Path(bench.__file__).parent
TINY = "--batch_size 1 --block_size 8 --steps 1 --dtype fp32".split()


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    """A GPT-2 of one block, one process, and no matmul of 17 GFLOP."""
    shape = dict(n_layer=1, n_head=2, n_embd=64)
    measure_rate = bench.measure_rate

    def skip_matmul(n, machine, work, *arguments, **options):
        if work is torch.matmul:
            return n
        return measure_rate(n, machine, work, *arguments, **options)

    monkeypatch.setitem(bench.SHAPES, "gpt2", shape)
    monkeypatch.setattr(bench, "GPTConfig", functools.partial(bench.GPTConfig, **shape))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    monkeypatch.setattr(bench, "measure_rate", skip_matmul)


def run(capsys, *argv: str) -> dict:
    bench.main([*argv, "--json", "--rounds", "1", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


# ---- What is measured ----------------------------------------------------------------------------


def test_the_ladder_ends_at_the_defaults():
    """Each rung changes a setting. At the top only the number of micro-steps is not the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(train.TrainConfig)}
    settings = {}
    for changes in bench.LADDER.values():
        assert settings | changes != settings
        settings = settings | changes
    assert settings.pop("accumulate") == 4
    for name, value in settings.items():
        assert defaults[name] in (value, "auto"), name


@pytest.mark.torture
def test_a_step_against_transformers(capsys):
    result = run(capsys, "train", *TINY)
    ours = result["rows"]["ours"]
    saving = result["rows"]["ours, saving"]
    theirs = result["rows"]["transformers"]
    assert ours["tokens/s"] == pytest.approx(8000 / ours["ms"])
    assert 0 < ours["% of matmul"] < 100
    assert result["ratios"]["ours"] == pytest.approx(ours["tokens/s"] / theirs["tokens/s"])
    for row in (ours, saving):
        assert 0 <= row["wait ms"] <= row["max wait ms"]
    assert result["settings"]["size"] == "gpt2"
    assert result["settings"]["dtype"] == "fp32"


def test_a_failed_run_is_null_and_spoils_no_other(capsys, monkeypatch, tmp_path):
    def measure_train(arguments, accumulate=1, dtype="", **settings):
        if accumulate > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens/s": 200.0 if dtype == "bf16" else 100.0}

    monkeypatch.setattr(bench, "measure_train", measure_train)
    result = run(capsys, "ladder", *TINY)
    rungs = [name for name in bench.LADDER if name != "TF32"]  # which is for GPUs
    assert list(result["rows"]) == [*rungs, "a large matmul"]
    assert [name for name, row in result["rows"].items() if row is None] == ["4 micro-steps"]
    assert result["ratios"]["torch.compile"] == 2
    assert "4 micro-steps" not in result["ratios"]

    (tmp_path / "ladder.json").write_text(json.dumps(result))
    bench.main(["show", str(tmp_path / "ladder.json")])
    [line] = re.findall("^4 micro-steps.*", capsys.readouterr().out, re.MULTILINE)
    assert set(line.removeprefix("4 micro-steps").split()) == {"-"}


def test_medians_of_rounds(capsys):
    """The ratio is the median of the rounds' ratios, not the ratio of the medians."""
    ours = iter([8.0, 1.0, 6.0])
    theirs = iter([2.0, 1.0, 3.0])
    runs = {"ours": lambda: {"MB/s": next(ours)}, "theirs": lambda: {"MB/s": next(theirs)}}
    assert bench.measure_in_rounds(runs, 3, "theirs") == {
        "rows": {"ours": {"MB/s": 6}, "theirs": {"MB/s": 2}},
        "ratios": {"ours": 2, "theirs": 1},
    }
    with pytest.raises(ValueError, match="nothing could be measured: StopIteration"):
        bench.measure_in_rounds(runs, 1, "theirs")


def test_what_auto_chooses_is_the_baseline(capsys, monkeypatch):
    def measure_train(arguments, dtype, **settings):
        return {"tokens/s": 2.0 if dtype == "bf16" else 1.0}

    monkeypatch.setattr(bench, "measure_train", measure_train)
    result = run(capsys, "choices", *TINY, "--size", "quickstart")
    assert len(result["rows"]) == 4
    assert result["settings"]["dtype"] == "fp32"
    assert sorted(result["ratios"].values()) == [1, 1, 2, 2]


def test_generation_against_transformers(capsys):
    result = run(capsys, "sample", "--max_tokens", "2", "--dtype", "fp32")
    assert result["ratios"]["ours"] > 0
    assert result["ratios"]["transformers"] == 1


def test_the_score_against_one_task_at_a_time(capsys, tmp_path):
    task = dict(
        ind=1,
        ctx="A man",
        endings=["sits.", "is a dog.", "eats", "runs away."],
        label=0,
        split_type="x",
    )
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    result = run(capsys, "hellaswag", "--data", str(tmp_path / "tasks.jsonl"))
    assert result["ratios"]["in batches"] > 0


def test_tokens_of_files_against_tiktoken(capsys, text_file):
    bench.main(["tokenize", str(text_file), "--workers", "1", "--rounds", "1"])
    assert "tiktoken alone, 1 process " in capsys.readouterr().out


# ---- memory --------------------------------------------------------------------------------------

GPT2 = dict(n_layer=12, n_head=12, n_embd=768)


# GB, as MemTracker counts them in a step of fake CUDA tensors with all blocks. The figure that is
# taken off is what slices of GPU_ROWS logits save instead of ROWS, by the storages of the fake GPU.
@pytest.mark.parametrize(
    "shape, B, options, peak",
    [
        (GPT2, 64, {}, 28.99 - 2.68),
        (GPT2, 64, dict(theirs=True), 94.8),
        (dict(n_layer=48, n_head=25, n_embd=1600, recompute=True), 8, {}, 34.8 - 2.68),
    ],
)
def test_memory_is_that_of_a_gpu(shape, B, options, peak):
    counted = bench.count_peak_memory(shape, 1024, B, **options)
    assert counted == pytest.approx(peak * 1e9, rel=0.01)


def test_the_largest_batch_that_fits():
    assert bench.find_largest_batch(10, lambda B: 11 * B) == 0
    assert bench.find_largest_batch(10, lambda B: 10 * B) == 1
    assert bench.find_largest_batch(80, lambda B: 10 * B) == 8
    assert bench.find_largest_batch(1e6, lambda B: 10 * B) == 256


def test_gpus_that_share_the_state_out_keep_a_part_of_it():
    """Of AdamW's 8 bytes a parameter: nothing is elsewhere with one GPU; with eight, nearly seven
    eighths of gpt2-xl's.
    """
    shape = bench.SIZES["gpt2-xl"]
    assert bench.count_state_elsewhere(shape, 1) == 0
    all_bytes = 8 * 1_557_686_400
    assert 0.86 * all_bytes < bench.count_state_elsewhere(shape, 8) < 0.876 * all_bytes


def test_the_table_of_memory(capsys, monkeypatch):
    def count_peak_memory(shape, T, B, theirs):
        return B * (3e9 if theirs else 1e9)

    monkeypatch.setattr(bench, "SIZES", {"gpt2": GPT2})
    monkeypatch.setattr(bench, "count_peak_memory", count_peak_memory)
    bench.main(["memory"])
    header, *rows = capsys.readouterr().out.splitlines()[1:]
    assert re.split(" {2,}", header.strip()) == [
        *("GB for B=16", "16 GB", "24 GB", "40 GB", "80 GB", "141 GB")
    ]
    assert [re.split(" {2,}", row) for row in rows] == [
        ["gpt2", "16", "8", "16", "32", "64", "64"],
        ["gpt2, recompute", "16", "8", "16", "32", "64", "64"],
        ["transformers' gpt2", "48", "4", "4", "8", "16", "32"],
    ]


# ---- plan ----------------------------------------------------------------------------------------


def plan_step(
    gpu: str,
    n_gpus: int,
    size: str = "gpt2",
    recompute: bool = False,
    batch_tokens=524_288,
    batch_size=64,
    **options,
) -> tuple[float, dict]:
    """A step on machines of eight GPUs."""
    with torch.device("meta"):
        model = GPT(GPTConfig(recompute=recompute, **SIZES[size]))
    return bench.plan_step(
        model,
        gpu,
        n_gpus=n_gpus,
        per_node=8,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        **options,
    )


# Tokens/s of a GPU. The first four are from llm.c's run_gpt2_124M.sh, run_gpt2_350M.sh,
# run_gpt2_774M.sh and run_gpt2_1558M.sh; then llm.c, build-nanogpt, the last rung of the lecture's
# ladder, and the best of several.
@pytest.mark.parametrize(
    "gpu, n_gpus, options, reported",
    [
        ("A100", 8, {}, 524_288 / 0.30 / 8),
        ("A100", 8, dict(size="gpt2-medium"), 524_288 / 0.82 / 8),
        ("A100", 8, dict(size="gpt2-large", batch_size=32), 524_288 / 1.7 / 8),
        ("H100", 8, dict(size="gpt2-xl", batch_size=8, batch_tokens=2**20), 2**20 / 2.8 / 8),
        ("H100", 8, {}, 460e3),
        ("A100", 8, {}, 185e3),
        ("A100", 1, dict(batch_size=16, batch_tokens=16 * 1024), 16 * 1024 / 0.090),
        ("RTX 4090", 1, dict(batch_size=32), 106e3),
    ],
)
def test_the_plan_is_what_others_report(gpu, n_gpus, options, reported):
    seconds, _ = plan_step(gpu, n_gpus, **options)
    batch_tokens = options.get("batch_tokens", 524_288)
    assert batch_tokens / seconds / n_gpus == pytest.approx(reported, rel=0.15)


def test_a_shared_optimizer_updates_less_and_sends_weights():
    """By hand, for two A100s that have half of the weights each: AdamW moves 14 bytes a weight less
    on each, and 4 bytes a weight go over the link.
    """
    whole, _ = plan_step("A100", 2)
    shared, _ = plan_step("A100", 2, shard_optimizer=True)
    n = 124_439_808
    expected = 4 * n / (0.8 * 300e9) + 6 * 5e-6 - 14 * n / (0.8 * 2.04e12)
    assert shared - whole == pytest.approx(expected, abs=3e-5)
    alone, _ = plan_step("A100", 1)
    assert plan_step("A100", 1, shard_optimizer=True)[0] == alone


def test_a_shared_optimizer_fits_where_a_whole_one_does_not(capsys, monkeypatch):
    """28 GB into 24: without the other seven's state, AdamW's 8 bytes a weight, 17 are left."""
    monkeypatch.setattr(bench, "count_peak_memory", lambda shape, T, B: 28e9 * B)
    options = ["--model", "gpt2-xl", "--gpu", "RTX 4090"]
    rows = plan(capsys, *options, "--shard_optimizer")["rows"]
    assert list(rows) == ["1 x 8"]
    kept = 28e9 - 8 * 1_557_611_200 * 7 / 8
    assert rows["1 x 8"]["% memory"] == pytest.approx(100 * kept / (0.9 * 24e9), rel=0.01)
    rows = plan(capsys, *options, "--card_gb", "40")["rows"]
    assert list(rows) == ["1 x 1", "1 x 8"]


def test_recomputing_takes_a_third_more_of_the_blocks():
    fast, _ = plan_step("H100", 1)
    slow, _ = plan_step("H100", 1, recompute=True)
    assert 1.2 < slow / fast < 1.3  # the head, a quarter of 124M's work, is not computed again


def plan(capsys, *argv: str) -> dict:
    bench.main(["plan", "--json", *argv])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def quick_count(monkeypatch):
    """About the bytes that are counted for gpt2, without counting."""
    monkeypatch.setattr(bench, "count_peak_memory", lambda shape, T, B: 2.7e9 + 0.37e9 * B)


@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_hours_are_those_of_the_recipe(capsys, quick_count, gpu):
    recipe = (ROOT / "config" / "gpt2_124M.py").read_text()
    hours = dict(re.findall(rf"(\d) x {gpu}  [^\n]*? ([\d.]+) hours?\b(?=   |\n)", recipe))
    hours |= dict(re.findall(rf"(1) x {gpu} +(\d+) hours", recipe))
    rows = plan(capsys, "--gpu", gpu)["rows"]
    assert set(hours) == {"1", "8"}
    for n_gpus, recipe_hours in hours.items():
        planned = rows[f"1 x {n_gpus}"]["hours"]
        assert planned == pytest.approx(float(recipe_hours), rel=0.15)
    dollars = 8 * bench.GPUS[gpu].dollars * rows["1 x 8"]["hours"]
    assert rows["1 x 8"]["dollars"] == pytest.approx(dollars)


def test_an_all_reduce_by_hand():
    """400 MB on 8 GPUs of 100 GB/s: 14 messages of 50 MB take 0.5 ms each, and each of 4 buckets
    takes 14 x 5 us more.
    """
    assert bench.time_all_reduce(400e6, 8, 100e9) == pytest.approx(7e-3 + 4 * 14 * 5e-6)
    assert bench.time_all_reduce(400e6, 1, 100e9) == 0


def test_buckets_are_as_large_as_those_of_train():
    assert f"bucket_cap_mb={bench.BUCKET / 2**20:.0f}" in inspect.getsource(train)


def test_what_a_step_waits_for():
    """The last backward pass hides all of the exchange but the embedding's; on a slow network, as
    much as the pass is long.
    """
    embedding = 4 * 50304 * 768
    all_gradients = 4 * 124_439_808
    eight, uses = plan_step("H100", 8)
    one, uses_of_one = plan_step("H100", 1, batch_tokens=524_288 // 8)
    assert eight - one == pytest.approx(bench.time_all_reduce(embedding, 8, 0.8 * 450e9))
    assert uses["all-reduce"] < 1
    assert uses_of_one["all-reduce"] == 0

    fast, _ = plan_step("H100", 64, batch_size=8)
    slow, uses = plan_step("H100", 64, batch_size=8, network=1e9)
    exchange = bench.time_all_reduce(all_gradients, 64, 1e9)
    backward = exchange / uses["all-reduce"]
    waits = exchange - backward - bench.time_all_reduce(embedding, 64, 0.8 * 400e9)
    assert uses["all-reduce"] > 1
    assert slow - fast == pytest.approx(waits)


def test_what_the_disk_does_in_a_step():
    """A thousandth of a checkpoint, which has three float32 for each parameter, and two bytes for
    each token.
    """
    seconds, uses = plan_step("H100", 8)
    assert uses["disk"] * seconds * 1e9 == pytest.approx(12 * 124_439_808 / 1000 + 2 * 524_288)


def test_few_sequences_take_as_long_as_those_that_fill_the_gpu():
    def plan_one_micro_step(n: int) -> tuple[float, dict]:
        return plan_step("H100", 1, batch_tokens=1024 * n, batch_size=n)

    one, uses = plan_one_micro_step(1)
    two, _ = plan_one_micro_step(2)
    sixteen, _ = plan_one_micro_step(16)
    thirty_two, _ = plan_one_micro_step(32)
    assert one == two
    assert thirty_two > 1.7 * sixteen
    assert uses["sequences"] == pytest.approx(5632 / 1024)


def test_a_plan_names_what_is_full_next(capsys, quick_count, tmp_path):
    """Rows are one GPU, one machine, two machines, and all, where they divide the step evenly."""
    result = plan(capsys, "--gpus", "64")
    assert list(result["rows"]) == ["1 x 1", "1 x 8", "2 x 8", "8 x 8"]
    assert result["rows"]["8 x 8"]["next"] == "sequences"
    assert result["device"] == "paper, H100"
    slow_network = plan(capsys, "--gpus", "16", "--network", "1")
    assert slow_network["rows"]["2 x 8"]["next"] == "all-reduce"
    three_machines = plan(capsys, "--gpus", "24", "--batch_tokens", str(24 * 1024))
    assert list(three_machines["rows"]) == ["1 x 1", "1 x 8", "3 x 8"]

    (tmp_path / "plan.json").write_text(json.dumps(result))
    bench.main(["show", str(tmp_path / "plan.json")])
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "sequences"


SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
# The options of a plan, and the table below it.
PLANS = re.findall(
    r"^python bench.py plan (.*)\n```\n```text\n((?:[^`\n]+\n)+)```$", SCALE, re.MULTILINE
)
assert len(PLANS) == 3, "docs/scale.md has three plans"


@pytest.mark.parametrize("options, shown", PLANS, ids=["gpt2", "gpt2-xl", "gpt2-xl on small GPUs"])
def test_the_page_shows_what_the_plan_prints(capsys, monkeypatch, options, shown):
    """Memory is a straight line through the bytes of one sequence and of those that fit an H100."""

    def count_peak_memory(shape, T, B):
        if shape["n_layer"] == 12:
            return 3.1e9 + 0.4e9 * (B - 1)
        if shape["recompute"]:
            return 25.89e9 + 0.63e9 * (B - 1)
        return 27.86e9 + 3.5e9 * (B - 1)

    monkeypatch.setattr(bench, "count_peak_memory", count_peak_memory)
    bench.main(["plan", *shlex.split(options)])
    _, table = capsys.readouterr().out.split("\n", 1)
    assert table == shown


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
        ("--card_gb -1", "no negatives"),
        ("--block_size 0", "block_size is 0"),
        (
            "--model gpt2-xl --gpu=RTX_4090",
            "gpt2-xl: a sequence takes 28 GB, too much for an RTX 4090; try --recompute",
        ),
    ],
)
def test_an_impossible_plan_is_one_line(capsys, monkeypatch, argv, reason):
    monkeypatch.setattr(bench, "count_peak_memory", lambda shape, T, B: 28e9 * B)
    words = [word.replace("_4090", " 4090") for word in argv.split()]
    with pytest.raises(SystemExit) as ended:
        bench.main(["plan", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("bench.py: ")
    assert error.count("\n") == 1
    assert reason in error


# ---- show, and results/ --------------------------------------------------------------------------

RESULTS = [
    path for path in sorted((ROOT / "results").glob("*/*.json")) if path.parent.name != "scaling"
]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_committed_results_are_shown(capsys, file):
    bench.main(["show", str(file)])
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize(
    "content", ["[]", "x", '{"bench": "train"}', '{"bench": "train", "rows": {"ours": 1}}']
)
def test_a_file_that_is_not_a_whole_result_is_one_line(capsys, tmp_path, content):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        bench.main(["show", str(tmp_path / "odd.json")])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"bench.py: {tmp_path}/odd.json: ")
    assert error.count("\n") == 1


STAND_IN_FOR_PYTHON = """#!/bin/bash
case "$*" in
    *"on_gpu.py table"*) exec {python} "$@";;
    *"on_gpu.py needs"*) [ -z "${{MISSES:-}}" ] || {{ echo "MISSING: a GPU"; exit 2; }};;
    *"bench.py train"*) echo -n '{{"ro'; echo "no memory" >&2; exit 2;;
    *"on_gpu.py rates"*) echo '{{"TFLOP/s: 8192 cubed": 700.5}}'; kill -9 $$;;
    *"on_gpu.py attention"*) echo '{{"ms: forward": 3.5}}'; sleep 60;;
    *"on_gpu.py optimizers"*) trap "" TERM; sleep 60;;
    *) echo '{{"ms": 1234.5}}'; echo "$*" >> {calls};;
esac
"""


@pytest.fixture
def measure(tmp_path):
    """Run results/measure.sh with a stand-in for Python: it is killed in the part `rates`, hangs in
    `attention`, hangs in `optimizers` and does not end when told to, and fails in `train`, in the
    middle of its output.
    """
    python = tmp_path / "python"
    calls = tmp_path / "calls"
    calls.touch()
    python.write_text(STAND_IN_FOR_PYTHON.format(python=sys.executable, calls=calls))
    python.chmod(0o755)

    def run(**environment: str) -> tuple[subprocess.CompletedProcess, Path, int]:
        calls.write_text("")
        done = subprocess.run(
            ["bash", "results/measure.sh", "try", str(tmp_path / "results")],
            cwd=ROOT,
            env=os.environ
            | dict(PYTHON=str(python), WORK=str(tmp_path / "work"), MOST="3", GRACE="1")
            | environment,
            capture_output=True,
            text=True,
        )
        return done, tmp_path / "results", len(calls.read_text().splitlines())

    return run


@pytest.mark.torture
@pytest.mark.skipif(sys.platform != "linux", reason="timeout, and GNU's sed")
def test_a_failed_part_of_measure_sh_spoils_no_other(measure):
    """Each part leaves what it had, the table has all of it, and the same command does the rest."""
    done, out, n_calls = measure()
    assert done.returncode == 1
    assert done.stderr.endswith("== failed: rates attention optimizers train \n")
    exits = {}
    for line in (out / "parts.jsonl").read_text().splitlines():
        part = json.loads(line)
        exits[part["name"]] = part["exit"]
    failed = {name: code for name, code in exits.items() if code}
    assert failed == dict(rates=137, attention=124, optimizers=124, train=2)
    assert {"tests", "step", "adamw", "ranks_sharded", "muon", "ladder"} < exits.keys()
    table = (out / "table.md").read_text()
    assert table in done.stdout
    for row in (
        "| step | ms | 1,234 |",
        "| rates | TFLOP/s: 8192 cubed | 700.5 |",
        "| attention | ms: forward | 3.5 |",
    ):
        assert row in table
    assert "| attention | FAILED | cut off after" in table
    assert re.search(r"\| train \| FAILED \| exit 2 after \d+ s: no memory \|", table)

    _, _, n_repeated = measure()
    assert n_calls > 10 and n_repeated == 0
    assert (out / "parts.jsonl").read_text().count('"attention"') == 1


@pytest.mark.skipif(sys.platform != "linux", reason="timeout, and GNU's sed")
def test_measure_sh_says_what_is_missing_and_when_time_is_up(measure):
    done, _, n_calls = measure(MISSES="yes")
    assert (done.returncode, n_calls) == (2, 0)
    assert "MISSING: a GPU" in done.stdout
    done, _, n_calls = measure(MINUTES="0")
    assert n_calls == 0
    assert "== ladder: no time left" in done.stdout


@pytest.mark.torture
@pytest.mark.skipif(sys.platform != "linux", reason="timeout, and GNU's sed")
def test_all_parts_of_measure_sh_run_on_a_cpu(tmp_path):
    """Small, and five minutes in all. A slow machine may cut a part off; none fails in another
    way.
    """
    environment = os.environ | dict(PYTHON=sys.executable, WORK=str(tmp_path / "work"))
    environment |= dict(MINUTES="5", MOST="60")
    done = subprocess.run(
        ["bash", "results/measure.sh", "try", str(tmp_path / "results")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    exits = []
    for line in (tmp_path / "results" / "parts.jsonl").read_text().splitlines():
        exits.append(json.loads(line)["exit"])
    assert len(exits) >= 6, done.stdout + done.stderr
    assert set(exits) <= {0, 124} and 0 in exits, done.stdout + done.stderr
    table = (tmp_path / "results" / "table.md").read_text()
    assert "compilations (should be 1) |" not in table or "(should be 1) | 1 |" in table
