"""Several processes under torchrun, over gloo on this machine's CPU."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import train
from parts import data

import pytest
import torch
from conftest import clean_environment, flags, losses, metrics, weights

ROOT = Path(__file__).parent.parent


# train.py that says before each forward pass whether gradients of the step before are still in
# memory.
SPY = """
import os
import sys
import torch
import train

def look(module, _):
    if isinstance(module, train.GPT) and module.training:
        sys.stderr.write(f"gradient: {module.lm_head.weight.grad is not None}\\n")

torch.nn.modules.module.register_module_forward_pre_hook(look)
train.main()
sys.stdout.flush()
os._exit(0)  # gloo's destructors may abort a process whose work is done
"""


# train.py that says how many numbers its optimizer keeps, and ends like a process whose machine has
# lost its power once it is at step 10 and the folder in KILLED_AFTER exists.
SHARED = """
import os
import signal
import sys
import time
import train
from torch.optim.optimizer import register_optimizer_step_post_hook

def count(optimizer, *_):
    numbers = 0
    for values in optimizer.state.values():
        numbers += sum(value.numel() for value in values.values() if value.dim())
    sys.stderr.write(f"numbers: {numbers}\\n")

schedule = train.learning_rate_at

def learning_rate_at(step, config):
    checkpoint = os.environ.get("KILLED_AFTER")
    while checkpoint and step == 10:
        if os.path.isdir(checkpoint):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
    return schedule(step, config)

train.learning_rate_at = learning_rate_at
register_optimizer_step_post_hook(count)
train.main()
sys.stdout.flush()
os._exit(0)  # gloo's destructors may abort a process whose work is done
"""


def torchrun(
    n: int, config, program: str | Path = "train.py", **environment: str
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={n}",
        str(program),
    ]
    return subprocess.run(
        command + flags(config),
        cwd=ROOT,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


# Muon's run has AdamW's groups too.
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.torture), "muon"])
def test_two_ranks_equal_one(config, tmp_path, optimizer):
    """Law 2 of CONTRIBUTING.md, over processes: losses, validation and weights are equal. And law
    3: the number of ranks changes from 2 to 1.
    """
    settings = dict(
        optimizer=optimizer,
        batch_size=1,
        eval_every=6,
        eval_tokens=500,
        sample_every=6,
        checkpoint_every=6,
        keep_checkpoints=0,
    )
    alone = config(out_dir=str(tmp_path / "alone"), **settings)
    expected = losses(alone)
    pair = config(out_dir=str(tmp_path / "pair"), **settings)
    (tmp_path / "spy.py").write_text(SPY)
    run = torchrun(2, pair, tmp_path / "spy.py")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("done: 12 steps") == 1  # rank 0 speaks alone
    # Gradients are zeroed inside DDP's buckets. Freed ones would be allocated a second time,
    # outside. (Two processes share the pipe, so a line may be torn; the first pass of each has no
    # gradient yet.)
    assert run.stderr.count("gradient: False") <= 2 and run.stderr.count("gradient: True") > 36
    assert [record["loss"] for record in metrics(pair.out_dir)] == pytest.approx(expected, abs=1e-5)
    for one, two in zip(metrics(alone.out_dir, "val"), metrics(pair.out_dir, "val"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)

    shutil.rmtree(tmp_path / "pair" / "step_0000012")
    assert losses(pair) == pytest.approx(expected, abs=1e-5)
    one, two = weights(alone.out_dir), weights(pair.out_dir)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


# Muon updates some of its parameters by AdamW's rule, so it shows both.
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.torture), "muon"])
def test_a_shared_optimizer_equals_a_whole_one(config, tmp_path, optimizer):
    """ZeRO-1, from one rank to three that are killed, to two, and back to one without it. The
    checkpoints in between are the same ones.
    """
    settings = dict(
        optimizer=optimizer,
        batch_size=1,
        total_batch_size=6 * 32,
        checkpoint_every=4,
        keep_checkpoints=0,
        grad_clip=0.5,
    )
    expected = losses(config(out_dir=str(tmp_path / "alone"), **settings))
    whole = torch.load(tmp_path / "alone" / "step_0000012" / "train_state.pt", weights_only=True)
    run = config(out_dir=str(tmp_path / "run"), shard_optimizer=True, **settings)
    train.train(run)  # one process: nothing to share
    shutil.rmtree(tmp_path / "run" / "step_0000008")
    shutil.rmtree(tmp_path / "run" / "step_0000012")

    (tmp_path / "shared.py").write_text(SHARED)
    eighth = tmp_path / "run" / "step_0000008"
    killed = torchrun(3, run, tmp_path / "shared.py", KILLED_AFTER=str(eighth))
    assert killed.returncode != 0 and eighth.is_dir(), killed.stderr
    all_numbers = 0
    for values in whole["optimizer"].values():
        all_numbers += sum(value.numel() for value in values.values() if value.dim())
    # Two processes share the pipe, so a line may be torn.
    kept = {int(number) for number in re.findall(r"^numbers: (\d+)$", killed.stderr, re.M)}
    assert kept and max(kept) < 0.6 * all_numbers

    pair = torchrun(2, run, tmp_path / "shared.py")
    assert pair.returncode == 0, pair.stderr
    assert "its state is shared out among 2 processes" in pair.stdout
    assert [record["loss"] for record in metrics(run.out_dir)] == pytest.approx(expected, abs=1e-5)
    collected = torch.load(tmp_path / "run" / "step_0000012" / "train_state.pt", weights_only=True)
    assert collected["optimizer"].keys() == whole["optimizer"].keys()
    for index, values in whole["optimizer"].items():
        assert collected["optimizer"][index].keys() == values.keys()
        for name, value in values.items():
            assert torch.allclose(collected["optimizer"][index][name], value, atol=1e-4)

    shutil.rmtree(tmp_path / "run" / "step_0000012")
    assert losses(dataclasses.replace(run, shard_optimizer=False)) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.torture
def test_two_compiled_ranks_equal_an_eager_one(config, tmp_path):
    """DDP splits what it compiles where its buckets end."""
    settings = dict(batch_size=1, max_steps=4, block_size=16, total_batch_size=64)
    expected = losses(config(out_dir=str(tmp_path / "alone"), **settings))
    pair = config(out_dir=str(tmp_path / "pair"), compile=True, **settings)
    run = torchrun(2, pair)
    assert run.returncode == 0, run.stderr
    assert metrics(pair.out_dir, "run")[0]["compiled"]
    assert [record["loss"] for record in metrics(pair.out_dir)] == pytest.approx(expected, abs=1e-5)


def test_a_mistake_is_said_once(config):
    """By the main rank, and again where torchrun's own report ends."""
    run = torchrun(2, config(total_batch_size=96))
    said = [line for line in run.stderr.splitlines() if "total_batch_size" in line]
    assert run.returncode != 0 and said == [said[0], f"  traceback : {said[0]}"]
    assert said[0].endswith(
        "96 is not a multiple of block_size 32 x 2 (processes); the nearest that is: 128"
    )


@pytest.mark.torture
def test_what_only_one_rank_sees_is_said_too(config, shards, tmp_path):
    """Rank 1's part of the first step has an id beyond the vocabulary; rank 0 cannot know why its
    partner is gone.
    """
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    bad = config(data_dir=str(copy), batch_size=2, total_batch_size=128)
    source = data.TokenWindows(data.open_shards(copy, "train"), 32, 257)
    batches = data.Batches(source, batch_size=2, windows_per_step=4, world_size=2, seed=bad.seed)
    shard, first = batches.find_starts(0, 0, rank=1)[0].tolist()
    path = source.shards[shard].path
    content = bytearray(path.read_bytes())
    content[1024 + 2 * first + 1] = 0xFF
    path.write_bytes(content)
    run = torchrun(2, bad)
    assert run.returncode != 0
    assert f"train.py: (rank 1) {path}: holds the token id" in run.stderr
