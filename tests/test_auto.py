"""What "auto" means: each choice follows what was measured or found, and comes with its reason."""

import functools
import hashlib
import itertools
import json
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import train
from model import GPT
from parts import auto, checkpoint, runtime
from parts.auto import (
    Arithmetic,
    Race,
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
        def race(candidates, patience=0.0):
            names = {one: getattr(one, "name", str(one)) for one in candidates}
            return Race({one: 1.0 if names[one] == winner else 2.0 for one in names}, busy=False)

        monkeypatch.setattr(auto, "race", race)

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


class PretendedMachine:
    """Two cores, whose clock moves only when a candidate runs. Until `busy_until`, in seconds,
    another program has one of them: all threads then take three times as long as alone, and one
    waits for its core.
    """

    def __init__(self, monkeypatch, busy_until: float):
        self.now = 0.0
        self.waited = 0.0
        self.busy_until = busy_until
        monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(auto, "waits_for_cores", lambda: {"7": 0.0, "8": self.waited})
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        self.threads = 2

    def work(self, ms: float, slower: float = 3.0) -> None:
        """Work of so many ms for two threads, and twice as many for one."""
        seconds = ms / 1000 * (3 - self.threads)
        if self.now < self.busy_until and self.threads == 2:
            seconds *= slower
            self.waited += seconds / 2
        self.now += seconds


def test_a_race_is_won_by_the_faster_and_a_near_tie_by_the_first(monkeypatch):
    machine = PretendedMachine(monkeypatch, busy_until=0)
    much, little = [functools.partial(machine.work, ms) for ms in (20, 2)]
    times, busy = auto.race({"much": much, "little": little}, patience=10)
    assert times == pytest.approx({"much": 20, "little": 2}) and not busy
    assert machine.now < 0.25  # who is not disturbed needs no patience
    assert fastest(times) == "little"
    assert fastest({"first": 1.0, "second": 0.99}) == "first"
    assert fastest({"first": 1.0, "second": 0.99}, margin=1.001) == "second"


def test_what_disturbs_a_few_turns_does_not_decide(monkeypatch):
    """Half of the turns of one candidate take ten times as long, without any wait for a core."""
    machine = PretendedMachine(monkeypatch, busy_until=0)
    ms = itertools.cycle([20, 2])
    times, _ = auto.race({"fast": lambda: machine.work(next(ms)), "slow": lambda: machine.work(4)})
    assert fastest(times) == "fast"


def test_a_busy_moment_does_not_decide(monkeypatch):
    """Beside another program, one thread is faster. The race waits for the program's end."""
    machine = PretendedMachine(monkeypatch, busy_until=2.0)
    pick = auto.pick_fastest({"only": functools.partial(machine.work, 10)}, patience=10)
    assert pick.threads == 2 and pick.note == " (ms a block: 10.0, 2 threads 10.0, 1 thread 20.0)"
    assert 2.0 < machine.now < 3.0


@pytest.mark.parametrize("slower, threads", [(2.5, 2), (4.0, 1)])
def test_on_a_machine_that_stays_busy_all_threads_stay_unless_fewer_are_much_faster(
    monkeypatch, slower, threads
):
    machine = PretendedMachine(monkeypatch, busy_until=math.inf)
    work = functools.partial(machine.work, 10, slower)
    pick = auto.pick_fastest({"only": work}, patience=3)
    assert pick.threads == threads and pick.note.endswith(", beside other programs)")
    assert 3.0 < machine.now < 4.0  # the second race does not wait again
    machine.now = 0.0
    assert auto.pick_fastest({"only": work}).threads == threads and machine.now < 0.6


@pytest.mark.skipif(not runtime.waits_for_cores(), reason="this system does not count waits")
def test_a_thread_that_shares_its_core_is_seen_to_wait():
    """Two threads on one core: each works while the other waits."""
    begun = threading.Barrier(2)
    seen = []

    def work() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread alone
        begun.wait()
        for _ in range(20):
            hashlib.sha256(bytes(4_000_000)).digest()  # without Python's lock
        seen.append(runtime.waits_for_cores()[str(threading.get_native_id())])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) > 0.01


def test_the_longest_wait_is_that_of_one_thread():
    """Of a thread that is new, all of its wait counts; one that has ended does not."""
    assert auto.longest_wait({"1": 1.0, "2": 5.0}, {"1": 1.5, "3": 0.2}) == 0.5
    assert auto.longest_wait({}, {}) == 0.0


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


def test_the_race_is_a_thin_model_with_its_share_of_the_head(monkeypatch):
    """It reads a micro-step's tokens where these are few, and fewer where the model is large."""
    seen = []
    forward = GPT.forward

    def record(model, idx, targets):
        seen.append((model.config.n_layer, model.config.vocab_size, *idx.shape))
        return forward(model, idx, targets)

    monkeypatch.setattr(GPT, "forward", record)
    way = Arithmetic("fp32", flash=True, threads=None, compile=False)
    for model, T, tokens in [(make_toy(), 16, 64), (make_toy(n_embd=256, block_size=64), 64, 8192)]:
        auto.block_passes([way], model, T, tokens)[way]()
    assert seen[0] == (1, 128, 4, 16)
    assert seen[1][:2] == (1, 128) and seen[1][3] == 64 and 900 < 64 * seen[1][2] < 1000


def test_threads_race_where_nobody_has_set_them(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    assert auto.race_threads(lambda: None, ms=1.0).times == {}
    monkeypatch.delenv("OMP_NUM_THREADS")
    seen = set()
    result = auto.race_threads(lambda: seen.add(torch.get_num_threads()), ms=1.0)
    assert set(result.times) == {2, 1} == seen
    assert torch.get_num_threads() == 2
    assert auto.race_threads(lambda: None, ms=1000.0).times == {}
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


def test_a_models_threads_race_in_all_its_blocks(monkeypatch, race_is_won_by):
    """A block alone stays in a cache that the whole model does not fit into."""
    race_is_won_by("fp32")
    monkeypatch.setattr(auto, "precisions", lambda *_: ["fp32"])
    model = make_toy()
    seen = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))

    def race_threads(run, ms, patience):
        assert run().shape == (10_000, 1, 32)
        assert ms == 2 * 1.0 and patience == auto.PATIENCE
        return Race({2: 8.0, 1: 6.0}, busy=False)

    monkeypatch.setattr(auto, "race_threads", race_threads)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    prepared = prepare_for_inference(model, Runtime(CPU), "auto", rows=10_000)
    assert seen == [False, False] and torch.get_num_threads() == 1
    assert prepared.note == "dtype: fp32 (ms a block: 1.0, 2 threads 4.0, 1 thread 3.0)"
    torch.set_num_threads(before)


def test_a_resumed_run_keeps_its_threads_and_says_what_would_be_faster(monkeypatch, config):
    """Two threads add up in another order than one, so that another number is another run."""

    def pick_fastest(candidates, patience):
        assert patience == 0.0  # a toy's run is no hundredth of a second
        return auto.Pick(next(iter(candidates)), 2, {}, "")

    monkeypatch.setattr(auto, "RACE_PAYS", -1)
    monkeypatch.setattr(auto, "pick_fastest", pick_fastest)
    monkeypatch.setattr(auto, "expected_seconds", lambda *_: 0.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choose = functools.partial(auto.choose_arithmetic, config(), make_toy(), Runtime(CPU))
    assert choose(saved={})[0].threads == 2
    assert choose(saved={"threads": 2})[0].threads == 2

    chosen, why = choose(saved={"threads": 1})
    assert chosen.threads == 1
    assert (
        "; 1 thread as the checkpoint says, this machine would take 2 now: OMP_NUM_THREADS sets"
        in why
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # as torch reads it at its start
    assert choose(saved={"threads": 1})[0].threads == 3


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
