"""Training: against a loop written with transformers and torch alone, against itself stopped and
resumed, and against what people and machines do to it."""

import dataclasses
import functools
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import prepare
import train
from model import GPT, Block, GPTConfig
from parts import attention, auto, checkpoint, data
from parts.optimizer import make_groups
from parts.pretrained import checkpoints
from parts.runtime import Runtime
from parts.tokenizer import get_tokenizer, save_tokenizer

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import TOY_MODEL, clean_environment, flags, losses, make_toy, metrics, weights
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

ROOT = Path(train.__file__).parent
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"
)


def assert_same_weights(one, two) -> None:
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys() and not [
        name for name in one if not torch.equal(one[name], two[name])
    ]


# ---- Against references --------------------------------------------------------------------------


OPTIMIZERS = [("adamw", "cosine"), ("sgd", "constant"), ("muon", "cosine")]


@pytest.mark.parametrize(("optimizer", "lr_schedule"), OPTIMIZERS)
def test_trajectory_equals_transformers_and_torch(config, optimizer, lr_schedule):
    """20 steps with accumulation, clipping, decay groups and a warm-up, against transformers' model
    and plain torch.
    """
    settings = dict(
        max_steps=20, total_batch_size=256, grad_clip=0.5, weight_decay=0.3, checkpoint_every=20
    )
    muon = dict(muon_learning_rate=5e-3, muon_momentum=0.9)
    ours = config(**settings, **muon, optimizer=optimizer, lr_schedule=lr_schedule)
    theirs, expected = reference.repeat(ours, 20)
    assert losses(ours) == pytest.approx(expected, abs=1e-4)
    for name, value in weights(ours.out_dir).items():
        # The first gradients of queries and keys are hardly more than rounding, which Muon makes as
        # large as the rest.
        atol = 1e-3 if optimizer == "muon" and "c_attn" in name else 1e-4
        assert torch.allclose(value, theirs.state_dict()[name], atol=atol), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_equal_one_large_batch(config, tmp_path, optimizer):
    """Law 2 of CONTRIBUTING.md. Forgetting the 1/k, or logging only the last micro-batch's loss,
    would show here.
    """
    settings = dict(checkpoint_every=12, optimizer=optimizer)
    small = losses(config(batch_size=1, out_dir=str(tmp_path / "small"), **settings))
    large = losses(config(batch_size=4, out_dir=str(tmp_path / "large"), **settings))
    assert small == pytest.approx(large, abs=1e-5)
    one, two = weights(tmp_path / "small"), weights(tmp_path / "large")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_recomputed_blocks_are_those_not_kept(config, tmp_path, monkeypatch):
    """To the last bit, dropout included; each block runs twice a step then."""
    settings = dict(dropout=0.2, checkpoint_every=12)
    forward = Block.forward
    calls = []

    def counted(self, *inputs):
        if self.training:
            calls.append(1)
        return forward(self, *inputs)

    monkeypatch.setattr(Block, "forward", counted)
    kept = losses(config(out_dir=str(tmp_path / "kept"), **settings))
    once = len(calls)
    assert losses(config(out_dir=str(tmp_path / "again"), recompute=True, **settings)) == kept
    assert len(calls) - once == 2 * once
    assert_same_weights(tmp_path / "kept", tmp_path / "again")


def test_the_loss_falls_and_every_line_is_logged(config):
    run = config(max_steps=60, eval_every=20, sample_every=30, checkpoint_every=30)
    result = train.train(run)
    curve = metrics(run.out_dir)
    assert [record["step"] for record in curve] == list(range(60))
    assert abs(curve[0]["loss"] - math.log(257)) < 0.1 and curve[-1]["loss"] < 3.6
    assert set(curve[0]) == set(
        "step kind loss lr grad_norm skipped tokens_per_s mfu ms waited_ms memory_gb".split()
    )
    for kind, steps in dict(val=[0, 20, 40, 60], sample=[30, 60], checkpoint=[30, 60]).items():
        assert [record["step"] for record in metrics(run.out_dir, kind)] == steps
    assert result == dict(step=60, val_loss=metrics(run.out_dir, "val")[-1]["loss"], stopped=None)
    facts = metrics(run.out_dir, "run")[0]
    assert (
        facts["settings"]["learning_rate"] == 1e-2
        and facts["versions"]["torch"] == torch.__version__
    )


def test_validation_loss_is_the_mean_over_its_windows(config):
    """Against one forward pass for each window; 500 tokens are 15 windows, which batches of 4 do
    not divide.
    """
    run = config(max_steps=0, eval_every=1, eval_tokens=500)
    torch.manual_seed(run.seed)
    model = GPT(GPTConfig(vocab_size=257, **TOY_MODEL))
    tokens = torch.tensor(
        data.open_shards(run.data_dir, "val")[0].tokens[: 15 * 32 + 1].astype("int64")
    )
    each = [
        model(tokens[None, i : i + 32], tokens[None, i + 1 : i + 33]).item()
        for i in range(0, 480, 32)
    ]
    assert train.train(run)["val_loss"] == pytest.approx(sum(each) / 15, abs=1e-5)


@pytest.mark.torture
@needs_compiler
def test_torch_compile_trains_alike(config, tmp_path):
    eager = losses(config(out_dir=str(tmp_path / "eager"), max_steps=4))
    compiled = config(
        out_dir=str(tmp_path / "compiled"), max_steps=4, compile=True, eval_every=2, sample_every=2
    )
    assert losses(compiled) == pytest.approx(eager, abs=1e-4)


def test_bf16_trains_nearly_alike(config, tmp_path):
    slow = dict(max_steps=30, learning_rate=1e-3, min_lr=1e-4)
    exact = losses(config(out_dir=str(tmp_path / "fp32"), **slow))
    rounded = losses(config(out_dir=str(tmp_path / "bf16"), dtype="bf16", **slow))
    assert rounded == pytest.approx(exact, abs=0.02) and rounded != exact


# ---- Laws 3, 4, 8: nothing disturbs training -----------------------------------------------------

EVERYTHING = dict(
    dropout=0.2, batch_size=2, eval_every=2, sample_every=3, checkpoint_every=4, keep_checkpoints=0
)


def test_watching_does_not_change_training(config, tmp_path):
    """Law 4 of CONTRIBUTING.md: evaluation, samples, checkpoints and logging on or off, with
    dropout, which a random generator that has moved would change.
    """
    plain = losses(config(out_dir=str(tmp_path / "plain"), dropout=0.2, batch_size=2))
    assert losses(config(out_dir=str(tmp_path / "watched"), **EVERYTHING)) == plain
    sparse = losses(
        config(out_dir=str(tmp_path / "sparse"), dropout=0.2, batch_size=2, log_every=5)
    )
    assert sparse == [plain[0], plain[5], plain[10], plain[11]]


def without_times(out_dir, *but: str) -> list[dict]:
    """metrics.jsonl without what differs between two equal runs, and without records of these
    kinds.
    """
    records = [
        json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    dropped = {"ms", "waited_ms", "tokens_per_s", "mfu", "memory_gb"}
    return [
        {k: v for k, v in r.items() if k not in dropped}
        for r in records
        if r["kind"] not in ("run", *but)
    ]


def straight_and_resumed(config, tmp_path, **settings) -> tuple[Path, Path]:
    """The folders of a run, and of one that a kill ended in step 10, two after a checkpoint, while
    a line and a checkpoint were being written, and that was then resumed: the weights are equal."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.train(config(out_dir=str(straight), **settings))
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "step_0000012")
    (resumed / ".step_0000012.tmp").mkdir()
    (resumed / ".step_0000012.tmp" / "model.safetensors").write_text("half")
    lines = [
        line
        for line in (straight / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] <= 10
    ]
    (resumed / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10, "ki')
    train.train(config(out_dir=str(resumed), **settings))
    assert_same_weights(straight, resumed)
    return straight, resumed


def test_the_profiler_writes_its_table_and_trace(config):
    assert (
        "profile 5 starts at the third step, but max_steps is 6"
        in config(profile=5, max_steps=6).mistakes()
    )
    c = config(max_steps=6, profile=2)
    train.train(c)
    trace = json.loads((Path(c.out_dir) / "trace.json").read_text())["traceEvents"]
    assert {"ProfilerStep#2", "ProfilerStep#3"} == {
        e["name"] for e in trace if e["name"].startswith("ProfilerStep")
    }
    assert "aten::mm" in (Path(c.out_dir) / "profile.txt").read_text()


def test_waiting_is_all_but_the_computing(config, monkeypatch):
    """On a clock that ticks when it is read, a second each: two batches, what a checkpoint still
    needs of the weights, the log, and a checkpoint.
    """
    ticks = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    c = config(max_steps=4, batch_size=2, checkpoint_every=2)
    train.train(c)
    assert [record["waited_ms"] for record in metrics(c.out_dir)] == [3000, 4000, 5000, 4000]


compiled = functools.partial(pytest.param, marks=[pytest.mark.torture, needs_compiler])


@pytest.mark.parametrize(
    ("optimizer", "compile"), [("adamw", False), ("muon", False), compiled("adamw", True)]
)
def test_resumed_equals_straight(config, tmp_path, optimizer, compile):
    """Law 3 of CONTRIBUTING.md, bit for bit, and no step is in the metrics twice."""
    straight, resumed = straight_and_resumed(
        config, tmp_path, optimizer=optimizer, compile=compile, **EVERYTHING
    )
    assert without_times(straight) == without_times(resumed)
    assert [record["step"] for record in metrics(resumed, "run")] == [0, 8]
    assert not list(resumed.glob(".*"))


def test_the_time_of_a_step_ends_after_the_optimizer(config, monkeypatch):
    """A GPU runs the optimizer's kernels after Python has launched them: the clock is read when
    they are done.
    """
    seen = []
    hook = register_optimizer_step_post_hook(lambda *_: seen.append("optimizer"))
    monkeypatch.setattr(Runtime, "synchronize", lambda self: seen.append("wait"))
    train.train(config(max_steps=4, log_every=2))
    hook.remove()
    assert seen == "optimizer wait optimizer optimizer wait optimizer wait".split()


@pytest.mark.torture
@pytest.mark.parametrize("compile", [False, compiled(True)])
def test_the_same_bits_on_a_busy_machine(config, tmp_path, compile):
    """Two threads, in the arithmetic that this CPU has, of a size at which every product is shared;
    another program takes one of the cores.
    """
    dtype = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    size = dict(
        n_layer=2, n_embd=128, block_size=128, batch_size=16, total_batch_size=2048, max_steps=40
    )

    def run(name: str) -> list[tuple]:
        settings = config(
            out_dir=str(tmp_path / name), dtype=dtype, flash=False, compile=compile, **size
        )
        command = [sys.executable, "train.py", *flags(settings)]
        subprocess.run(
            command,
            cwd=ROOT,
            env=clean_environment(OMP_NUM_THREADS="2"),
            check=True,
            capture_output=True,
        )
        return [(record["loss"], record["grad_norm"]) for record in metrics(tmp_path / name)]

    quiet = run("quiet")
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert run("busy") == quiet
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_skips_and_scales_and_resumes(config, tmp_path, monkeypatch, optimizer):
    """The scale begins so high that the first gradients overflow: those steps are skipped until it
    fits. From then on losses and gradient norms are fp32's, and a resumed run goes on with the
    scale it had."""
    settings = dict(
        checkpoint_every=8,
        keep_checkpoints=0,
        warmup_steps=0,
        lr_schedule="constant",
        optimizer=optimizer,
    )
    train.train(config(out_dir=str(tmp_path / "fp32"), **settings))
    monkeypatch.setattr(auto, "precisions", lambda *_: ["fp16"])  # as on an old GPU
    monkeypatch.setattr(
        torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**20)
    )
    straight, _ = straight_and_resumed(config, tmp_path, **settings)

    curve, exact = metrics(straight), metrics(tmp_path / "fp32")
    scale = torch.load(checkpoints(straight)[-1] / "train_state.pt", weights_only=True)["scaler"][
        "scale"
    ]
    assert curve[-1]["skipped"] == 20 - math.log2(scale) > 0
    first = next(n for n, record in enumerate(curve) if record["grad_norm"] is not None)
    # Skipped steps left the weights alone, so the first that counts has the loss and gradient of
    # the initial ones.
    assert curve[first]["loss"] == pytest.approx(exact[0]["loss"], abs=0.05)
    assert curve[first]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.1)


STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture
def usual_signals():
    """Ctrl-C and SIGHUP as in a terminal: pytest may run in the background, or under nohup."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_the_step_saves_and_leads_on(
    config, tmp_path, monkeypatch, capsys, usual_signals, number
):
    """At step 6, which has no checkpoint of its own. The exit code is the shell's for that
    signal.
    """
    straight, stopped = (config(out_dir=str(tmp_path / name), **EVERYTHING) for name in "ab")
    train.train(straight)
    clip, calls = train.clip_gradients, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 6:
            signal.raise_signal(number)
        return clip(*arguments)

    monkeypatch.setattr(train, "clip_gradients", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        train.main(flags(stopped))
    assert exit_.value.code == 128 + number and signal.getsignal(number) == before
    assert "after 6 steps" in capsys.readouterr().out
    assert checkpoints(stopped.out_dir)[-1].name == "step_0000006"
    train.train(stopped)
    assert_same_weights(straight.out_dir, stopped.out_dir)
    assert without_times(stopped.out_dir, "checkpoint") == without_times(
        straight.out_dir, "checkpoint"
    )


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_is_ignored_stops_nothing(config, monkeypatch, usual_signals, number):
    """As SIGHUP is under nohup."""
    signal.signal(number, signal.SIG_IGN)
    clip = train.clip_gradients

    def interrupted(*arguments):
        signal.raise_signal(number)
        return clip(*arguments)

    monkeypatch.setattr(train, "clip_gradients", interrupted)
    assert train.train(config(max_steps=2)) == dict(step=2, val_loss=None, stopped=None)


def test_a_stopped_run_leaves_its_report_and_the_next_command_stands_there(
    config, monkeypatch, capsys, usual_signals
):
    run = config(report=True, log_every=1, checkpoint_every=12)
    log = train.Log.__call__

    def interrupted(self, kind, step, **values):
        log(self, kind, step, **values)
        if kind == "train" and step == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Log, "__call__", interrupted)
    assert train.train(run)["stopped"] == signal.SIGTERM
    assert "5 of 12" in (Path(run.out_dir) / "report.md").read_text()
    assert (Path(run.out_dir) / "loss.png").exists()
    monkeypatch.undo()
    train.train(run)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "config/mine.py", "--name=a b"])
    train.train(run)
    command = "python train.py config/mine.py '--name=a b'"
    said = capsys.readouterr().out
    assert f"to train longer:    {command} --max_steps=24 --resume_anyway=True" in said
    assert f"to start over:      {command} --resume=never" in said


def test_a_finished_run_says_so_goes_on_or_is_moved_aside(config, tmp_path, capsys):
    run = config(checkpoint_every=6, eval_every=6)
    train.train(run)
    files = {path: path.stat().st_mtime_ns for path in Path(run.out_dir).rglob("*")}
    capsys.readouterr()
    assert train.train(run)["step"] == 12
    said = capsys.readouterr().out
    assert "is finished: it has 12 steps, max_steps is 12; best" in said
    assert (
        f"sample.py --model {run.out_dir}" in said
        and "--max_steps=24" in said
        and "--resume=never" in said
    )
    assert files == {path: path.stat().st_mtime_ns for path in Path(run.out_dir).rglob("*")}
    train.train(config(checkpoint_every=6, eval_every=6, max_steps=24, resume_anyway=True))
    assert "changed since then: max_steps 12 -> 24" in capsys.readouterr().out
    assert [record["step"] for record in metrics(run.out_dir)] == list(range(24))
    before = [folder.name for folder in checkpoints(run.out_dir)]
    (Path(run.out_dir) / "training.log").write_text("the user's own")
    train.train(config(checkpoint_every=6, resume="never", max_steps=6))
    assert (Path(run.out_dir) / "training.log").exists()
    assert [folder.name for folder in checkpoints(run.out_dir)] == ["step_0000006"]
    assert [folder.name for folder in checkpoints(tmp_path / "run.old1")] == before


def test_the_newest_and_the_best_checkpoints_are_kept(config, monkeypatch):
    scores = iter(
        [9.0, math.nan, 1.0, 2.0, 4.0, 5.0, 6.0]
    )  # at steps 0, 2, 4 ...: the best is step 4's
    monkeypatch.setattr(train, "evaluate", lambda *_: next(scores))
    run = config(eval_every=2, checkpoint_every=2, keep_checkpoints=2)
    train.train(run)
    assert [folder.name for folder in checkpoints(run.out_dir)] == [
        "step_0000004",
        "step_0000010",
        "step_0000012",
    ]


# ---- Checkpoints and starting points -------------------------------------------------------------


def test_a_checkpoint_is_a_hugging_face_model(config):
    run = config(checkpoint_every=12, bias=False)
    train.train(run)
    folder = checkpoints(run.out_dir)[-1]
    ours, theirs = GPT.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("The quick brown")["input_ids"]
    assert ids == list(b"The quick brown")
    assert torch.allclose(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-5)


def test_fine_tuning_starts_from_a_checkpoint_with_its_shape(config, tmp_path, capsys):
    """A run folder will do; windows may be shorter than the model's context; settings of the shape
    give way.
    """
    train.train(config(checkpoint_every=12))
    settings = dict(init_from=str(tmp_path / "run"), n_layer=7, block_size=16, checkpoint_every=12)
    tuned = config(out_dir=str(tmp_path / "tuned"), **settings)
    capsys.readouterr()
    curve = losses(tuned)
    assert "2 layers, 2 heads, width 32" in capsys.readouterr().out
    assert curve[0] < 4.5  # it knows something already
    assert GPT.from_pretrained(tuned.out_dir).config.block_size == 32
    assert train.train(tuned)["step"] == 12  # and goes on from its own checkpoint


def test_optional_settings_of_the_optimizer_hold_after_a_resume(config, monkeypatch):
    """The optimizer's state holds its settings of then; the run's settings of now must win."""
    built, build = [], train.build_optimizer
    monkeypatch.setattr(
        train, "build_optimizer", lambda *arguments: built.append(build(*arguments)) or built[-1]
    )
    train.train(config(checkpoint_every=6, max_steps=6, weight_decay=0.0))
    train.train(
        config(checkpoint_every=6, max_steps=12, weight_decay=0.5, beta2=0.9, resume_anyway=True)
    )
    group = built[-1].param_groups[0]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.9, 0.9)


# ---- Guards --------------------------------------------------------------------------------------


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        train.main(list(argv))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ")
    return line.removeprefix("train.py: ")


def poison(monkeypatch, *bad_steps: int) -> None:
    """Make the gradient of these forward passes NaN."""
    forward, calls = GPT.forward, itertools.count()

    def poisoned(self, *inputs):
        bad = self.training and next(calls) in bad_steps
        return forward(self, *inputs) * (math.nan if bad else 1)

    monkeypatch.setattr(GPT, "forward", poisoned)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    config, monkeypatch, tmp_path, capsys
):
    run = config(max_steps=5, checkpoint_every=1, keep_checkpoints=0)
    poison(monkeypatch, 3)
    train.train(run)
    before, after = (load_file(checkpoints(run.out_dir)[i] / "model.safetensors") for i in (2, 3))
    assert all(
        torch.equal(before[name], after[name]) for name in before
    )  # after 3 and after 4 steps
    final = weights(run.out_dir)
    assert all(value.isfinite().all() for value in final.values())
    assert any(not torch.equal(after[name], final[name]) for name in final)
    assert "step 3 | the gradient is not finite" in capsys.readouterr().out
    assert [record["skipped"] for record in metrics(run.out_dir)] == [0, 0, 0, 1, 1]
    assert (
        metrics(run.out_dir)[3]["loss"] is None
        and "NaN" not in (Path(run.out_dir) / "metrics.jsonl").read_text()
    )


def test_a_run_that_diverges_stops_with_advice(config, monkeypatch, capsys):
    run = config(max_steps=40, checkpoint_every=4)
    poison(monkeypatch, *range(5, 100))
    line = fails(capsys, *flags(run))
    assert "not finite 10 times in a row" in line and "lower learning_rate" in line
    assert all(value.isfinite().all() for value in weights(run.out_dir).values())


# ---- Bad input: one line, exit code 2 ------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data_dir="nowhere"), "python prepare.py TEXT --out nowhere"),
        (dict(total_batch_size=100), "the nearest that is: 96"),
        (dict(n_head=5), "n_embd 32 is not divisible by n_head 5"),
        (dict(init_from="no-such/model"), "no-such/model: not a folder here"),
        (dict(weight_decay=-1.0), "weight_decay is -1.0: it must be at least 0"),
        (dict(max_steps=-1), "max_steps is -1: it must be at least 0"),
        (dict(min_lr=1.0), "min_lr 1.0 is above learning_rate 0.01"),
        (
            dict(optimizer="muon", learning_rate=0.0, min_lr=0.0),
            "with muon, learning_rate must be above 0",
        ),
        (dict(dtype="fp16"), "fp16 is for CUDA"),
        (dict(device="cuda"), "sees no CUDA GPU here; use --device=cpu"),
        (dict(wandb=True), "wandb"),
        (dict(seed=2**70), "seed is 1180591620717411303424: it must be below"),
        (dict(total_batch_size=128 * 1000), "too few for a step of 4000"),
    ],
)
def test_bad_settings(config, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(train.sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in fails(capsys, *flags(config(**changes)))


def test_several_mistakes_are_reported_together(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--stepss=3", "--n_layer=many", "nowhere.py"])
    assert exit_.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    "error, amount",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            " (2.00 GiB at",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 "
                "bytes."
            ),
            " (4.00 GB at",
        ),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), ""),
        (MemoryError(), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_out_of_memory_says_what_fits(config, capsys, monkeypatch, error, amount):
    monkeypatch.setattr(GPT, "forward", Mock(side_effect=error))
    line = fails(capsys, *flags(config()))
    assert f"out of memory{amount}" in line
    assert "set --batch_size=auto, a smaller one, or --recompute=True" in line


def test_checkpoints_that_do_not_fit(config, capsys, text_file, tmp_path):
    other_text = str(tmp_path / "other")
    prepare.main(
        [str(text_file), "--out", other_text, "--tokenizer", "bytes", "--val_fraction", "0.3"]
    )
    run = config(checkpoint_every=6, keep_checkpoints=0)
    train.train(run)
    capsys.readouterr()
    line = fails(capsys, *flags(config(n_layer=3)))
    assert (
        "has other settings (n_layer 2 -> 3): restore them, or use another out_dir; --resume=never"
        in line
    )
    assert "(optimizer adamw -> muon): restore them" in fails(
        capsys, *flags(config(optimizer="muon"))
    )
    line = fails(capsys, *flags(config(learning_rate=0.02, grad_clip=0.0, eval_every=1)))
    assert (
        "other settings (learning_rate 0.01 -> 0.02, grad_clip 1.0 -> 0.0): restore them" in line
        and "--resume_anyway=True" in line
    )
    shutil.rmtree(checkpoints(run.out_dir)[-1])
    assert "training tokens, but" in fails(capsys, *flags(config(data_dir=other_text)))
    anyway = config(
        batch_size=2, log_every=3, checkpoint_every=6, data_dir=other_text, resume_anyway=True
    )
    assert train.train(anyway)["step"] == 12


class ScaledGPT(GPT):
    """The tensors of a GPT-2, and other logits."""

    def logits(self, x):
        return 2 * super().logits(x)


def test_a_model_py_that_changed_under_a_run_is_noticed(config, capsys, monkeypatch):
    run = config(checkpoint_every=6, keep_checkpoints=0)
    train.train(run)
    shutil.rmtree(checkpoints(run.out_dir)[-1])
    monkeypatch.setattr("model.GPT", ScaledGPT)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"is a GPT-2, and model.py is not one any more .*logits"):
        train.train(run)
    train.train(config(checkpoint_every=6, keep_checkpoints=0, resume_anyway=True))
    assert "model.py is not GPT-2 any more (its logits differ" in capsys.readouterr().out
    assert (checkpoints(run.out_dir)[-1] / "gpt.json").exists()


def test_other_tokenizers_and_contexts(config, capsys, tmp_path):
    GPT(GPTConfig(vocab_size=100, **TOY_MODEL)).save_pretrained(tmp_path / "other")
    GPT(GPTConfig(vocab_size=257, **TOY_MODEL)).save_pretrained(tmp_path / "bytes")
    line = fails(capsys, *flags(config(init_from=str(tmp_path / "other"))))
    assert "other: 100 tokens, and no tokenizer beside it says which" in line
    save_tokenizer(get_tokenizer("bytes"), tmp_path / "bytes", 32)
    long = config(init_from=str(tmp_path / "bytes"), block_size=64, batch_size=1)
    assert "context; set --block_size=32" in fails(capsys, *flags(long))


def test_an_out_dir_that_cannot_be_written(config, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f": '{out_dir}'" in fails(capsys, *flags(config(out_dir=str(out_dir))))


def test_a_full_disk_while_saving(config, capsys, monkeypatch):
    """As torch.save reports it: the second checkpoint's fails, the first stays whole, nothing is
    left over.
    """
    run, save, calls = config(checkpoint_every=6, max_steps=18), torch.save, itertools.count(1)

    def full(state, path):
        save(state, path)
        if next(calls) == 2:
            raise RuntimeError("[enforce fail at inline_container.cc] . file write failed")

    monkeypatch.setattr(torch, "save", full)
    line = fails(capsys, *flags(run))
    assert (
        "step_0000012 could not be written" in line and "disk full? Earlier ones are good" in line
    )
    assert [path.name for path in Path(run.out_dir).iterdir() if path.is_dir()] == ["step_0000006"]
    monkeypatch.setattr(torch, "save", save)
    assert train.train(run)["step"] == 18


def test_an_error_without_a_text_is_named(config, capsys, monkeypatch):
    monkeypatch.setattr(torch, "save", Mock(side_effect=AssertionError))
    line = fails(capsys, *flags(config(checkpoint_every=6)))
    assert "step_0000006 could not be written (AssertionError); disk full?" in line


# ---- Optional loggers ----------------------------------------------------------------------------


def test_wandb_gets_the_numbers_and_goes_on_in_the_same_run(config, monkeypatch):
    """A stand-in for the package, which is not a requirement."""
    inits, logged = [], []
    run = SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None
    )
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **settings: inits.append(settings) or run)
    )
    train.train(config(wandb=True, max_steps=6, checkpoint_every=6, eval_every=6))
    train.train(
        config(wandb=True, max_steps=8, checkpoint_every=6, eval_every=6, resume_anyway=True)
    )
    train.train(config(wandb=True, max_steps=1, resume="never"))
    train.train(
        config(wandb=True, max_steps=1)
    )  # the one before left no checkpoint: this is no continuation
    ids = [settings["id"] for settings in inits]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert [step for step, numbers in logged if "train/loss" in numbers] == [*range(8), 0, 0]
    assert [step for step, numbers in logged if "val/loss" in numbers] == [0, 6, 8]


def test_evaluation_off_needs_no_validation_shards(config, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("*_val_*"))
    assert len(losses(config(data_dir=str(copy), max_steps=2))) == 2


def test_a_checkpoint_made_by_the_format_s_description_is_resumed(config, tmp_path, capsys):
    """Written by hand as version 94d11fd described it, so that checkpoints of earlier versions stay
    readable.
    """
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    )
    folder = tmp_path / "run" / "step_0000005"
    theirs.save_pretrained(folder)
    parameters = make_groups(GPT.from_pretrained(folder), "adamw", 1e-2, 0.1)
    numbered = enumerate(parameter for group in parameters for parameter in group["params"])
    moments = {
        i: dict(step=torch.tensor(5.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.ones_like(p))
        for i, p in numbered
    }
    torch.save(dict(optimizer=moments, scaler={}), folder / "train_state.pt")
    c = config(max_steps=7, log_every=1)
    settings = {
        name: value for name, value in vars(c).items() if name != "profile"
    }  # a setting that came later
    (folder / "settings.json").write_text(
        json.dumps(dict(step=5, val_loss=None, settings=settings))
    )
    found = losses(c)
    assert "under no checksum" in capsys.readouterr().out
    windows = data.TokenWindows(data.open_shards(c.data_dir, "train"), 32, 257)
    batches = data.Batches(windows, batch_size=4, windows_per_step=4, world_size=1, seed=c.seed)
    batch = torch.from_numpy(batches.batch(5))
    expected = F.cross_entropy(
        theirs.eval()(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()
    )
    assert len(found) == 2 and found[0] == pytest.approx(expected.item(), abs=1e-5)


# ---- Changed models ------------------------------------------------------------------------------


class NoisyGPT(GPT):
    """It draws in training, though its dropout is 0."""

    def hidden(self, idx, **layout):
        x = super().hidden(idx, **layout)
        return x + 0.1 * torch.randn_like(x) if self.training else x


def test_what_a_model_draws_in_training_is_repeated_by_a_resume(config, tmp_path, monkeypatch):
    monkeypatch.setattr("model.GPT", NoisyGPT)
    monkeypatch.setattr(train, "GPT", NoisyGPT)
    straight = losses(config(out_dir=str(tmp_path / "straight")))
    run = config(checkpoint_every=6, keep_checkpoints=0)
    train.train(run)
    shutil.rmtree(checkpoints(run.out_dir)[-1])
    assert losses(run) == straight


class OtherOrder(Block):
    """The same modules, defined in another order."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self._modules = dict(reversed(self._modules.items()))


def test_moments_find_their_parameters_in_a_model_py_with_lines_exchanged(
    config, tmp_path, monkeypatch
):
    """An optimizer knows parameters by their place, and ln_1's and ln_2's have the same shape."""
    straight = losses(config(out_dir=str(tmp_path / "straight"), beta2=0.99))
    run = config(checkpoint_every=6, keep_checkpoints=0, beta2=0.99)
    train.train(run)
    shutil.rmtree(checkpoints(run.out_dir)[-1])
    monkeypatch.setattr("model.Block", OtherOrder)
    assert losses(run)[6:] == pytest.approx(straight[6:], rel=1e-6)


def test_moments_of_other_parameters_are_refused():
    names = ["a", "b"]
    with pytest.raises(ValueError, match="another model: its parameters have other names"):
        checkpoint.in_order_of(names, ["a", "c"], {})
    with pytest.raises(ValueError, match="parameter 2 has no name among 2"):
        checkpoint.in_order_of(names, ["b", "a"], {2: {}})
    assert checkpoint.in_order_of(names, ["b", "a"], {0: {"step": 5}}) == {1: {"step": 5}}


class BiasedHeadGPT(GPT):
    """Its loss leaves out what its logits have."""

    def __init__(self, config):
        super().__init__(config)
        self.lift = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, x):
        return super().logits(x) + self.lift


def test_a_loss_that_is_not_that_of_the_logits_is_said(config, monkeypatch, capsys):
    monkeypatch.setattr(train, "GPT", BiasedHeadGPT)
    train.train(config(max_steps=1))
    out = capsys.readouterr().out
    assert "model.py's loss is not the cross entropy of its logits" in out
    assert "NOTE: no gradient for lift: the loss of the first step did not depend on it" in out


def test_several_processes_need_every_gradient():
    """Torch would say so a step later, in a traceback."""
    model = make_toy()
    machine = SimpleNamespace(world_size=2)
    for parameter in model.parameters():
        parameter.grad = parameter.detach()
    train.check_gradients(model, machine, print)
    for parameter in model.transformer.h.parameters():
        parameter.grad = None
    with pytest.raises(ValueError, match=r"h\.0\.ln_1\.weight, .* and 21 more: with several"):
        train.check_gradients(model, machine, print)


def test_a_setting_that_came_after_the_checkpoint_is_no_silent_change(config):
    """Somebody adds it to model.py in the middle of a run. exact_gelu came with this project."""
    saved = dict(vars(config()))
    del saved["exact_gelu"]
    assert checkpoint.compare_settings(saved, config()) == {}
    del saved["dropout"]
    assert checkpoint.compare_settings(saved, config()) == dict(dropout="dropout is new: 0.0")


def test_settings_that_make_a_run_learn_nothing_are_said(config):
    def doubts(**settings) -> str:
        return "; ".join(train.doubtful_settings(config(**settings)))

    assert doubts() == ""
    line = doubts(warmup_steps=715)
    assert "warmup_steps 715 is not below max_steps 12: the learning rate ends at 1.7e-04" in line
    assert "learning_rate is 0" in doubts(learning_rate=0.0, min_lr=0.0)


def test_the_untrained_model_is_kept_and_changes_nothing(config):
    """Nor does a run that goes on from it."""
    run = config().out_dir
    expected = losses(config(out_dir=f"{run}_plain", eval_every=4))
    first = config(checkpoint_first=True, eval_every=4, checkpoint_every=4, keep_checkpoints=0)
    assert losses(first) == expected
    names = [folder.name for folder in checkpoints(first.out_dir)]
    assert names == ["step_0000000", "step_0000004", "step_0000008", "step_0000012"]
    folder = Path(first.out_dir) / "step_0000000"
    state = checkpoint.read_state(folder)
    assert state.val_loss == metrics(first.out_dir, "val")[0]["loss"]
    untrained = train.build_model(first, None, get_tokenizer("bytes"))
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["transformer.wte.weight"], untrained.transformer.wte.weight[:257])
    resumed = config(resume=str(folder), out_dir=f"{run}_resumed", eval_every=4)
    assert losses(resumed) == expected
    # One that is killed right behind it goes on from there, and does not save it twice.
    again = config(checkpoint_first=True, resume=str(folder), out_dir=f"{run}_again")
    again = dataclasses.replace(again, checkpoint_every=12)
    train.train(again)
    assert [folder.name for folder in checkpoints(again.out_dir)] == ["step_0000012"]


def test_a_run_that_is_not_compiled_does_not_load_the_compiler(config, tmp_path):
    """Whose import takes longer than a small model's first steps, and 75 MB."""
    script = ["import sys, train"]
    for optimizer, _ in OPTIMIZERS:
        settings = dict(max_steps=2, checkpoint_every=2, total_batch_size=256)
        if attention.load_kernel() is not None:
            settings |= dict(dtype="bf16", n_embd=64)  # 32 to a head, as the kernel wants them
        ours = config(**settings, optimizer=optimizer, out_dir=str(tmp_path / optimizer))
        script.append(f"train.main({flags(ours)})")
    resumed = dataclasses.replace(ours, max_steps=4, resume_anyway=True)
    script.append(f"train.main({flags(resumed)})")
    # sympy alone comes with some calls of torch.
    script.append("sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)")
    command = [sys.executable, "-c", "\n".join(script)]
    run = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert metrics(resumed.out_dir)[-1]["step"] == 3
