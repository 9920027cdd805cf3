"""The GPU's path on machines without a GPU: whole runs on fake CUDA tensors, and what torch's
compilers make of a step.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from parts import auto, data
from parts import loss as head_loss
from parts.runtime import Runtime

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from conftest import clean_environment, ids, make_toy, metrics
from torch._dynamo.testing import CompileCounter
from torch._inductor.graph import GraphLowering

# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def results(shards, folder) -> dict[str, dict]:
    return do_runs("cuda", shards, folder)


def do_runs(kind: str, shards: Path, folder: Path) -> dict[str, dict]:
    """Do the runs of fake_cuda.main in a process of their own. Return what was seen of each."""
    shim = build_shim(folder, kind)
    task = dict(ctx="the quick", endings=["brown fox", "jumps", "over", "a lazy dog"], label=3)
    tasks = folder / "tasks.jsonl"
    tasks.write_text(json.dumps(task) + "\n")
    script = f"""
import fake_cuda
fake_cuda.main({kind!r}, {str(shards)!r}, {str(tasks)!r}, {str(folder)!r})
"""
    return run_with_shim(script, shim)


def build_shim(folder: Path, kind: str) -> Path:
    try:
        return fake_cuda.build(folder, kind)
    except OSError as error:
        pytest.skip(str(error))


def run_with_shim(script: str, shim: Path):
    """Run the script in a process of its own. Return the last line that it prints, read as JSON."""
    prologue = f"""
import ctypes, sys
ctypes.CDLL({str(shim)!r}, ctypes.RTLD_GLOBAL)  # before torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", prologue + script],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "run", ["bf16", "fp16", "fp32", "muon", "resumed", "sample", "one prompt", "hellaswag"]
)
def test_no_run_mixes_devices(results, run):
    """Training, watching, checkpoints, resuming, and the commands."""
    assert results[run]["error"] is None, results[run]["error"]


@pytest.mark.parametrize(
    "run, error",
    [
        ("targets on the CPU", "FakeTensorDeviceMismatchError"),
        ("positions on the CPU", "FakeTensorDeviceMismatchError"),
        ("read in a graph", "reads a value while a CUDA graph is captured"),
        ("full", "OutOfMemoryError('full')"),
    ],
)
def test_what_is_broken_on_purpose_is_seen(results, run, error):
    assert error in results[run]["error"]


@pytest.mark.parametrize("run", ["bf16", "fp16", "fp32", "muon"])
def test_a_step_reads_two_values(results, run):
    """The norm of the gradient and the loss. At each read the CPU waits until the GPU has finished
    all its work.
    """
    reads_of_step = dict(results[run]["reads"])
    after_no_evaluation = reads_of_step[1]
    assert len(after_no_evaluation) <= 2, after_no_evaluation


def test_a_token_takes_one_graph_and_two_reads(results):
    """40 tokens behind 9, in a context of 32: a prefill, 23 from the graph, and then a prefill
    each.
    """
    assert results["one prompt"]["replays"] == 23
    assert results["one prompt"]["reads_after"] <= 2 * 40


def test_cudnn_plans_attention_for_training_only(results):
    """It plans each new shape, for up to a second. Training and validation have one shape, the
    tasks of HellaSwag and the tokens of a sample one each.
    """
    for name in ("bf16", "muon"):
        assert results[name]["cudnn"] == [[False, False], [True, True]]
    for name in ("sample", "one prompt", "hellaswag"):
        assert results[name]["cudnn"] == [[False, False]]


@pytest.mark.parametrize(
    "run, dtype", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_metrics_of_a_run(results, folder, run, dtype):
    """What `auto` chose on a GPU with and without bf16, and a record of each thing."""
    starts = [0]
    if run == "fp16":
        starts.append(2)  # where it was resumed
    expected = dict(
        run=starts, train=[0, 1, 2], val=[0, 3], hellaswag=[3], sample=[3], checkpoint=[2, 3]
    )
    for kind, steps in expected.items():
        records = metrics(folder / run, kind)
        assert [record["step"] for record in records] == steps, kind
    assert metrics(folder / run, "run")[-1]["dtype"] == dtype


@pytest.mark.torture
def test_a_mac(shards, tmp_path):
    """Training, watching, checkpoints and the commands on mps, which has no float64, no pinned
    memory and no scaler.
    """
    results = do_runs("mps", shards, tmp_path)
    assert "MPS has no float64" in results.pop("float64")["error"]
    for name, result in results.items():
        assert result["error"] is None, f"{name}: {result['error']}"
    start = metrics(tmp_path / "fp32", "run")[0]
    assert (start["device"], start["dtype"], start["compiled"]) == ("mps", "float32", False)
    assert metrics(tmp_path / "fp32")[-1]["loss"] is not None


# ---- What the compilers make of a step -----------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_the_training_forward_is_one_graph(monkeypatch, recompute):
    """With the loss in several pieces. A break in the graph hands the rest of it to Python."""
    monkeypatch.setattr(head_loss, "ROWS", 50)
    model = make_toy(recompute=recompute).train()
    x = ids(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explained = torch._dynamo.explain(model)(x, x)
    assert (explained.graph_count, explained.break_reasons) == (1, [])


def test_the_compiled_loss_is_the_loss():
    """Compiled, the gradient of the logits is computed in another way."""
    model = make_toy()
    results = []
    for function in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = function(ids(2, 16), ids(2, 16, seed=1))
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([loss.detach(), *gradients])
    for plain, compiled in zip(*results):
        assert torch.allclose(plain, compiled, atol=1e-6)


def test_the_trial_step_and_training_share_one_compilation(shards):
    """torch.compile compiles again for inputs of other strides: a minute on a GPU."""
    counter = CompileCounter()
    model = torch.compile(make_toy().train(), backend=counter)
    machine = Runtime(torch.device("cpu"))
    auto.try_step(model, 4, 16, machine, torch.float32, held_bytes=0)
    assert counter.frame_count == 1

    windows = data.TokenWindows(data.open_shards(shards, "train"), 16, 257)
    batches = data.Batches(windows, batch_size=4, windows_per_step=8, world_size=1, seed=0)
    loader = data.BatchLoader(
        batches, rank=0, n_micro_steps=2, first_step=0, end_step=1, device=machine.device
    )
    with contextlib.closing(loader):
        for k in range(2):
            x, y = loader.batch(0, k)
            model(x, y).backward()
    assert counter.frame_count == 1


@pytest.mark.torture
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="reads torch 2.13's internals")
def test_the_compiled_head_keeps_two_chunks_of_logits(tmp_path):
    """Of eight chunks, 0.8 GB each, by Inductor's plan for an H100: one is used while the next is
    made.
    """
    script = """
import fake_inductor
print(fake_inductor.count_logits_alive())
"""
    assert run_with_shim(script, build_shim(tmp_path, "cuda")) <= 2


@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_the_compiled_head_moves_no_more_bytes_than_cross_entropy(monkeypatch):
    """By Inductor's count for forward and backward, products and all. Nothing is built or
    computed.
    """
    moved = []

    def count_bytes(graph: GraphLowering):
        """In place of building the graph: count, and return a module that gives zeros."""
        graph.init_wrapper_code()
        graph._update_scheduler()
        moved.append(graph.count_bytes()[0])
        zeros = []
        for node in graph.module.graph.output_node().args[0]:
            value = node.meta["val"] if node else None
            if value is not None:
                value = torch.zeros(value.shape, dtype=value.dtype)
            zeros.append(value)
        return SimpleNamespace(call=lambda inputs: zeros, __file__="", key="")

    def ours(x, weight, targets):
        return head_loss.head_loss(x, weight, targets, 1000)

    def plain(x, weight, targets):
        return F.cross_entropy(F.linear(x, weight)[:, :1000].float(), targets)

    monkeypatch.setattr(GraphLowering, "compile_to_module", count_bytes)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    x = torch.randn(512, 16, requires_grad=True)
    weight = torch.randn(1024, 16, requires_grad=True)
    totals = []
    for head in (ours, plain):
        moved.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.compile(head)(x, weight, ids(512))
        loss.backward()
        totals.append(sum(moved))
    assert 0 < totals[0] <= totals[1]
