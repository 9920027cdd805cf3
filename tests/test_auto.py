"""What "auto" means: each choice follows what was measured or found, and comes with its reason."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import train
from parts import auto, checkpoint, runtime
from parts.auto import (
    Arithmetic,
    batch_size,
    compilation,
    fastest,
    precisions,
    prepare_for_inference,
)
from parts.runtime import Runtime

import pytest
import torch
from conftest import make_toy, metrics

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def long_run(monkeypatch):
    """Toy runs count as long enough for a race, and the CPU as one with bf16."""
    monkeypatch.setattr(auto, "RACE_PAYS", -1)
    monkeypatch.setattr(
        auto,
        "precisions",
        lambda setting, device: ["fp32", "bf16"] if setting == "auto" else [setting],
    )


@pytest.fixture
def race_is_won_by(monkeypatch):
    """The candidate of this name is twice as fast as the others."""

    def rig(winner: str) -> None:
        monkeypatch.setattr(
            auto,
            "race",
            lambda runs, **_: {one: 1.0 if str(one) == winner else 2.0 for one in runs},
        )

    return rig


def test_precisions_to_choose_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert precisions("auto", CUDA) == ["bf16"]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert precisions("auto", CUDA) == ["fp16"]
    assert precisions("auto", torch.device("mps")) == ["fp32"]
    assert precisions("bf16", CPU) == ["bf16"]
    with pytest.raises(ValueError, match="fp16 is for CUDA"):
        precisions("fp16", CPU)


def test_a_race_is_won_by_the_faster_and_a_near_tie_by_the_first():
    x = torch.randn(300, 300)
    times = auto.race(
        {"much": lambda: [x @ x for _ in range(20)], "little": lambda: x @ x}, seconds=0.01
    )
    assert fastest(times) == "little"
    assert fastest({"first": 1.0, "second": 0.99}) == "first"
    assert fastest({"first": 1.0, "second": 0.99}, margin=1.001) == "second"


@pytest.mark.parametrize("winner", ["bf16, spelled-out attention", "fp32, fused attention"])
def test_a_run_computes_as_the_race_says_and_its_resume_as_it_began(
    config, tmp_path, capsys, long_run, race_is_won_by, winner
):
    """A resume on a machine where another candidate wins goes on as before, bit by bit, and says
    so.
    """
    free = dict(dtype="auto", flash="auto", checkpoint_every=6)
    race_is_won_by(winner)
    train.train(config(**free))
    straight = metrics(tmp_path / "run")
    assert metrics(tmp_path / "run", "run")[0]["dtype"] == (
        "bfloat16" if "bf16" in winner else "float32"
    )
    assert f"arithmetic: {winner} (ms a block: " in capsys.readouterr().out

    race_is_won_by("fp32, spelled-out attention")
    train.train(config(**free, resume=str(tmp_path / "run" / "step_0000006")))
    assert [r["loss"] for r in metrics(tmp_path / "run")] == [r["loss"] for r in straight]
    assert (
        "kept from the checkpoint, this machine would take fp32, spelled-out attention"
        in capsys.readouterr().out
    )


def test_runs_of_earlier_versions_keep_torchs_norm(config, monkeypatch):
    """What a checkpoint says holds; one that does not say, is of a version without the choice."""
    exact = []

    def clip(parameters, max_norm, exact_norm):
        exact.append(exact_norm)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    monkeypatch.setattr(train, "clip_gradients", clip)
    train.train(config(max_steps=2, checkpoint_every=1, keep_checkpoints=0))
    train.train(config(max_steps=3, checkpoint_every=1, keep_checkpoints=0, resume_anyway=True))
    assert exact == [True, True, True]

    folder = Path(config().out_dir) / "step_0000003"
    content = json.loads((folder / "settings.json").read_text())
    del content["chosen"]["exact_norm"]
    content["checksum"] = checkpoint.checksum(content)
    (folder / "settings.json").write_text(json.dumps(content))
    train.train(config(max_steps=4, checkpoint_every=4, resume_anyway=True))
    train.train(config(max_steps=5, resume_anyway=True))
    assert exact == [True, True, True, False, False]


def test_the_race_leaves_no_gradients_and_a_short_run_has_none(config, monkeypatch):
    model = make_toy()
    machine = Runtime(CPU)
    free = config(dtype="auto", flash="auto")
    chosen, why = auto.choose_arithmetic(free, model, machine, saved={})
    assert chosen == Arithmetic("fp32", flash=True, threads=None, compile=False, exact_norm=True)
    assert why == "arithmetic: fp32, fused attention\ncompile: off (as set)"
    monkeypatch.setattr(auto, "RACE_PAYS", -1)
    chosen, why = auto.choose_arithmetic(free, model, machine, saved={})
    assert chosen.dtype in ("fp32", "bf16") and "ms a block" in why
    assert all(parameter.grad is None for parameter in model.parameters())


def test_threads_race_where_nobody_has_set_them(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    assert auto.race_threads(lambda: None, ms=1.0) == {}
    monkeypatch.delenv("OMP_NUM_THREADS")
    seen = set()
    assert (
        set(auto.race_threads(lambda: seen.add(torch.get_num_threads()), ms=1.0)) == {2, 1} == seen
    )
    assert torch.get_num_threads() == 2 and auto.race_threads(lambda: None, ms=1000.0) == {}
    torch.set_num_threads(before)


@pytest.mark.parametrize("winner", ["fp32", "bf16"])
def test_inference_has_a_race_of_its_own(monkeypatch, race_is_won_by, winner):
    """A model of some size takes what wins for so many rows; a toy needs no race."""
    race_is_won_by(winner)
    monkeypatch.setattr(auto, "precisions", lambda *_: ["fp32", "bf16"])
    prepared = prepare_for_inference(make_toy(), Runtime(CPU), "auto", rows=10_000)
    assert prepared.packing.dtype == prepared.model.lm_head.weight.dtype == runtime.DTYPES[winner]
    assert "ms a block" in prepared.note
    toy = prepare_for_inference(make_toy(), Runtime(CPU), "auto", rows=1)
    assert toy.note == "dtype: fp32 (a small model: one thread)"


def test_compiling_must_pay(monkeypatch):
    monkeypatch.setattr(auto, "missing_for_compile", lambda device: "")
    wanted = (False, "compiling would not pay in a run of about 1.7 minutes on cpu")
    assert compilation("auto", CPU, seconds=100, n_layer=12) == wanted
    assert compilation("auto", CPU, seconds=5000, n_layer=12)[0]
    assert compilation("auto", torch.device("mps"), seconds=5000, n_layer=12)[0] is False
    assert compilation(True, CPU, seconds=0, n_layer=12)[0]
    assert not compilation(False, CPU, seconds=5000, n_layer=12)[0]
    assert compilation("auto", CUDA, seconds=200, n_layer=12)[0]
    assert not compilation("auto", CUDA, seconds=200, n_layer=48)[0]
    _, why = compilation("auto", CUDA, seconds=500, n_layer=48)
    assert why == "the first step takes up to 4 minutes longer, the others less"
    monkeypatch.setattr(auto, "missing_for_compile", lambda device: "no C++ compiler found")
    assert compilation("auto", CPU, seconds=5000, n_layer=12) == (False, "no C++ compiler found")
    with pytest.raises(ValueError, match="compile=True: no C"):
        compilation(True, CPU, seconds=0, n_layer=12)


def test_a_machine_without_a_compiler_is_noticed(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler found\nSet TORCH_LOGS for more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert auto.missing_for_compile(CPU) == "a trial failed: No working C++ compiler found"


@pytest.mark.parametrize(
    "world_size, expected", [(1, 64), (2, 64), (4, 64), (8, 64), (16, 32), (32, 16), (64, 8)]
)
def test_the_recipe_runs_on_any_number_of_gpus(world_size, expected):
    """524,288 tokens in 2 x 8 processes were refused: 64 sequences do not divide a process's 32."""
    recipe = train.TrainConfig()
    sequences = train.sequences_per_process(recipe, world_size)
    size = batch_size(64, sequences, None, 1024, Runtime(CPU, 0, world_size), torch.float32)
    assert size == expected and sequences % size == 0
    assert recipe.batch_size == "auto"
    size = batch_size("auto", sequences, None, 1024, Runtime(CPU, 0, world_size), torch.float32)
    assert size == 8


def test_batch_size_auto_is_the_largest_that_fits_on_every_rank(monkeypatch):
    """A GPU with memory for 5 sequences, beside a rank with memory for 2: of 12 sequences, 2 at
    once.
    """
    room = dict(here=5, there=2)

    def try_step(model, size, T, machine, dtype, held_bytes):
        assert held_bytes == 1000 + 8 * 10**9  # the optimizer's state, and a tenth of the card
        if size > room["here"]:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(auto, "try_step", try_step)
    machine = SimpleNamespace(device=CUDA, max=lambda failed: failed)
    machine.total_memory = lambda: 80 * 10**9
    batch_size = functools.partial(auto.batch_size, held_bytes=1000)
    assert batch_size("auto", 12, make_toy(), 32, machine, torch.float32) == 4
    assert batch_size(5, 12, make_toy(), 32, machine, torch.float32) == 4  # without trying
    tried = iter([12, 6, 4, 3, 2])
    machine.max = lambda failed: max(failed, next(tried) > room["there"])
    assert batch_size("auto", 12, make_toy(), 32, machine, torch.float32) == 2
    room["here"], machine.max = 0, lambda failed: failed
    with pytest.raises(torch.OutOfMemoryError):
        batch_size("auto", 12, make_toy(), 32, machine, torch.float32)
