"""What only a GPU can show. results/measure.sh runs these tests; without a GPU they are skipped.

GPU_TESTS_DEVICE=cpu python -m pytest tests/test_on_gpu.py     # the same tests on the CPU
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from model import GPT, SIZES, GPTConfig
from parts import auto, inference, runtime
from parts import loss as head_loss
from parts.pretrained import checkpoints
from parts.runtime import Runtime

import pytest
import torch
import torch.nn.functional as F
from conftest import clean_environment, flags, ids, losses, make_toy, metrics, toy_config
from torch._dynamo.testing import CompileCounterWithBackend

DEVICE = os.environ.get("GPU_TESTS_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
ON_GPU = DEVICE == "cuda"
ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICE, reason="no CUDA GPU here"),
    pytest.mark.filterwarnings("ignore:.*TF32"),
]

two_ranks = pytest.mark.skipif(
    ON_GPU and torch.cuda.device_count() < 2, reason="one GPU: two ranks need two"
)


@pytest.fixture(scope="module")
def machine() -> Runtime:
    # Float32 products are exact here, as a reference must be.
    return runtime.start(DEVICE, tf32=False)


@pytest.fixture(scope="module")
def dtype(machine) -> torch.dtype:
    """The precision of training on this device: bf16, or fp16 on a T4."""
    return runtime.DTYPES[auto.precisions("auto", machine.device)[-1]]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """The folder of an untrained GPT-2: of 124M's shape on a GPU, a toy on a CPU."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = make_toy()
    if ON_GPU:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES["gpt2"]))
    model.save_pretrained(folder)
    return folder


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    return ((values.double() - reference).norm() / reference.norm()).item()


def draw_tokens(model: GPT, machine: Runtime, n_rows: int, seed: int) -> torch.Tensor:
    T = min(model.config.block_size, 256)
    return ids(n_rows, T, vocab_size=model.config.vocab_size, seed=seed).to(machine.device)


# ---- The model against transformers and float64 --------------------------------------------------


def test_logits_and_gradients_equal_transformers(gpt2, machine, dtype):
    """Both in low precision, against transformers in float64. Ours may not be further away."""
    from transformers import AutoModelForCausalLM

    ours = GPT.from_pretrained(gpt2).to(machine.device).eval()
    theirs = AutoModelForCausalLM.from_pretrained(gpt2).to(machine.device).eval()
    x = draw_tokens(ours, machine, 2, seed=0)
    y = draw_tokens(ours, machine, 2, seed=1)

    def compute(model, in_dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, and the gradient of the embedding, which all layers have part in."""
        model.zero_grad()
        with torch.autocast(DEVICE, dtype=in_dtype, enabled=in_dtype is not None):
            output = model(x)
            logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = F.cross_entropy(logits.flatten(0, 1).to(torch.float64), y.flatten())
        loss.backward()
        gradient = model.get_parameter("transformer.wte.weight").grad
        return logits.detach(), gradient[: ours.config.vocab_size].clone()

    in_float32 = compute(ours, None)
    ours_low = compute(ours, dtype)
    theirs_low = compute(theirs, dtype)
    reference = compute(theirs.double(), None)
    for exact, low, other, expected in zip(in_float32, ours_low, theirs_low, reference):
        assert relative_error(exact, expected) < 1e-4
        assert relative_error(low, expected) < 0.03
        assert relative_error(low, expected) < 1.5 * relative_error(other, expected)


def test_compiled_equals_eager_and_is_compiled_once(monkeypatch, gpt2, machine, dtype):
    """Loss and gradient, the head in several pieces; and the trial step's code serves training."""
    monkeypatch.setattr(head_loss, "ROWS", 100)
    torch._dynamo.reset()
    raw_model = GPT.from_pretrained(gpt2)
    raw_model.transformer.h = raw_model.transformer.h[:2]
    raw_model.to(machine.device).train()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(raw_model, backend=counter)
    T = min(raw_model.config.block_size, 256)
    auto.try_step(compiled, 2, T - 1, machine, dtype, held_bytes=0)

    batch = draw_tokens(raw_model, machine, 2, seed=0)

    def compute(model, in_dtype: torch.dtype | None) -> tuple[float, torch.Tensor]:
        raw_model.zero_grad()
        with torch.autocast(DEVICE, dtype=in_dtype, enabled=in_dtype is not None):
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in raw_model.parameters()]
        return loss.item(), torch.cat(gradients)

    loss, gradient = compute(compiled, dtype)
    eager_loss, eager_gradient = compute(raw_model, dtype)
    exact_loss, exact_gradient = compute(raw_model, None)
    assert counter.frame_count == 1
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    assert eager_loss == pytest.approx(exact_loss, rel=5e-3)
    exact_gradient = exact_gradient.double()
    error = relative_error(gradient, exact_gradient)
    assert error < 0.05
    assert error < 1.5 * relative_error(eager_gradient, exact_gradient)


# ---- Generation ----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_graphs_text_is_the_plain_text(monkeypatch, machine):
    """Greedy, by a captured CUDA graph and by one kernel after another, and on the CPU."""
    prompts = [ids(5).tolist(), ids(9, seed=1).tolist()]
    expected = inference.generate(make_toy(block_size=64), prompts, 48, temperature=0)
    replayed = []
    replay = torch.cuda.CUDAGraph.replay

    def replay_and_note(graph) -> None:
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay_and_note)
    for graph_from, captured in ((32, ON_GPU), (10**9, False)):
        monkeypatch.setattr(inference, "GRAPH_FROM", graph_from)
        replayed.clear()
        prepared = auto.prepare_for_inference(make_toy(block_size=64), machine, "fp32", rows=2)
        assert inference.generate(prepared.model, prompts, 48, temperature=0) == expected
        assert bool(replayed) == captured


@torch.no_grad()
def test_the_graphs_logits_are_the_plain_logits(machine, dtype):
    """In low precision, where texts may part at near ties: for the same tokens. Captured, its
    kernels one by one, and without it.
    """
    model = auto.prepare_for_inference(make_toy(block_size=64), machine, "auto", rows=2).model
    rows = [ids(5).tolist(), ids(9, seed=1).tolist()]
    tokens = [ids(2, 1, seed=n).to(machine.device) for n in range(40)]
    cache, _ = inference.prefill(model, rows, 40)
    plain = [inference.forward_cached(model, token, cache) for token in tokens]
    expected = torch.stack(plain).double()
    for captures in (True, False):
        cache, _ = inference.prefill(model, rows, 40)
        step = inference.TokenGraph(model, cache, captures)
        logits = torch.stack([step(token) for token in tokens]).double()
        assert relative_error(logits, expected) < 0.02


# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def config(shards, tmp_path):
    """Configs of runs of 30 steps, on this device, in exact float32."""
    settings = dict(
        device=DEVICE, tf32=False, max_steps=30, checkpoint_every=10, keep_checkpoints=0
    )
    return lambda name, **changes: toy_config(shards, tmp_path / name, **(settings | changes))


def command(settings, n_ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if n_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    return [*launcher, str(ROOT / "train.py"), *flags(settings)]


def run(settings, n_ranks: int = 1) -> list[float]:
    """The training losses of a run, of several ranks in processes of their own."""
    if n_ranks == 1:
        return losses(settings)
    done = subprocess.run(
        command(settings, n_ranks),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [record["loss"] for record in metrics(settings.out_dir)]


def kill_after_checkpoint(settings, step: int, n_ranks: int = 1) -> None:
    """Start the run, and kill all its processes once the checkpoint of that step is whole."""
    folder = Path(settings.out_dir, f"step_{step:07}")
    process = subprocess.Popen(
        command(settings, n_ranks),
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not folder.is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_ends_like_one_that_was_not(config):
    """kill -9 after the checkpoint of step 10. A GPU adds up in another order each time, so losses
    are equal to rounding. Muon updates some parameters by AdamW's rule, so it shows both.
    """
    straight = run(config("straight", optimizer="muon"))
    killed = config("killed", optimizer="muon")
    kill_after_checkpoint(killed, 10)
    for folder in checkpoints(killed.out_dir):
        if folder.name != "step_0000010":
            shutil.rmtree(folder)  # where the kill came late
    assert run(killed) == pytest.approx(straight, abs=2e-3)
    assert straight[-1] < straight[0] - 0.5


def test_low_precision_learns_as_float32_does(config):
    """What auto chooses; validation, a sample and a checkpoint at the end, as in any run."""
    exact = run(config("exact"))
    watched = dict(eval_every=10, sample_every=30, sample_tokens=40)
    low = config("low", dtype="auto", batch_size="auto", **watched)
    assert run(low) == pytest.approx(exact, abs=0.1)
    assert len(metrics(low.out_dir, "val")) == 4
    assert metrics(low.out_dir, "sample")[-1]["text"]


@pytest.mark.skipif(not ON_GPU, reason="fp16 is for CUDA GPUs; test_train.py has it for a CPU")
def test_fp16_scales_and_resumes(config):
    """The scale begins too high, so the first steps are skipped; a resumed run keeps its scale."""
    settings = dict(dtype="fp16", warmup_steps=0, lr_schedule="constant")
    straight = config("straight", **settings)
    expected = run(straight)
    resumed = config("resumed", **settings)
    kill_after_checkpoint(resumed, 10)
    assert run(resumed) == pytest.approx(expected, abs=0.05)
    scales = []
    for settings in (straight, resumed):
        state = torch.load(checkpoints(settings.out_dir)[-1] / "train_state.pt", weights_only=True)
        scales.append(state["scaler"]["scale"])
    assert scales[0] == scales[1] <= 65536
    assert expected[-1] < expected[0] - 0.5


def test_the_batch_is_what_fits(config, machine, dtype):
    """Less memory, a smaller batch, and the same losses; what was tried is given back."""
    choose = functools.partial(auto.batch_size, "auto", 64, T=512, machine=machine, dtype=dtype)
    model = make_toy(block_size=512, n_embd=256, vocab_size=50257).to(machine.device)
    sizes = [choose(model=model)]
    if ON_GPU:
        before = torch.cuda.memory_allocated()
        free, _ = torch.cuda.mem_get_info()
        held = free - round(0.1 * machine.total_memory()) - 3 * 10**9
        sizes.append(choose(model=model, held_bytes=held))
        assert torch.cuda.memory_allocated() == before
        assert 1 <= sizes[1] < sizes[0]
    assert 64 % sizes[0] == 0
    expected = run(config("small", batch_size=1))
    assert run(config("auto", batch_size="auto")) == pytest.approx(expected, abs=1e-3)


# ---- Two GPUs ------------------------------------------------------------------------------------


@two_ranks
@pytest.mark.parametrize("optimizer, shared", [("adamw", False), ("muon", True)])
def test_two_ranks_equal_one(config, optimizer, shared):
    """The optimizer's state whole on each rank, and shared out. Killed on two, resumed on one."""
    alone = run(config("alone", optimizer=optimizer, batch_size=1))
    pair = config("pair", optimizer=optimizer, batch_size=1, shard_optimizer=shared)
    kill_after_checkpoint(pair, 10, n_ranks=2)
    assert run(pair, n_ranks=2) == pytest.approx(alone, abs=2e-3)
    shutil.rmtree(Path(pair.out_dir, "step_0000030"))
    assert run(dataclasses.replace(pair, shard_optimizer=False)) == pytest.approx(alone, abs=2e-3)


@two_ranks
def test_two_compiled_ranks_equal_an_eager_one(config):
    alone = run(config("alone", batch_size=1, max_steps=12))
    pair = config("pair", batch_size=1, max_steps=12, compile=True)
    assert run(pair, n_ranks=2) == pytest.approx(alone, abs=2e-3)


@two_ranks
def test_two_ranks_watch_as_one(config, tmp_path):
    """Validation and HellaSwag, of which each rank has a share."""
    task = dict(ctx="the quick", endings=["brown fox", "jumps", "over", "a lazy dog"], label=3)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text((json.dumps(task) + "\n") * 7)
    watched = dict(eval_every=15, hellaswag_every=15, hellaswag_data=str(tasks), batch_size=1)
    results = []
    for n_ranks in (1, 2):
        settings = config(f"on {n_ranks}", **watched)
        run(settings, n_ranks)
        val = [record["loss"] for record in metrics(settings.out_dir, "val")]
        scores = [record["n"] for record in metrics(settings.out_dir, "hellaswag")]
        results.append((val, scores))
    assert results[1][0] == pytest.approx(results[0][0], abs=2e-3)
    assert results[1][1] == results[0][1] == [7, 7]
