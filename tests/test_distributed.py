"""Several processes under torchrun, over gloo on this machine's CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import clean_environment, flags, losses, metrics
from test_train import weights

ROOT = Path(__file__).parent.parent


def torchrun(n: int, config) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py"]
    return subprocess.run(
        command + flags(config), cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=300
    )


def test_two_ranks_equal_one(config, tmp_path):
    """Law 2 over processes: losses, validation, weights; and law 3 when the number of ranks changes from 2 to 1."""
    settings = dict(batch_size=1, eval_every=6, eval_tokens=500, sample_every=6, checkpoint_every=6, keep_checkpoints=0)
    alone = config(out_dir=str(tmp_path / "alone"), **settings)
    expected = losses(alone)
    pair = config(out_dir=str(tmp_path / "pair"), **settings)
    run = torchrun(2, pair)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("done: 12 steps") == 1  # rank 0 speaks alone
    assert [record["loss"] for record in metrics(pair.out_dir)] == pytest.approx(expected, abs=1e-5)
    for one, two in zip(metrics(alone.out_dir, "val"), metrics(pair.out_dir, "val"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)

    import shutil

    shutil.rmtree(tmp_path / "pair" / "step_0000012")
    assert losses(pair) == pytest.approx(expected, abs=1e-5)
    one, two = weights(alone.out_dir), weights(pair.out_dir)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_a_mistake_is_said_once(config):
    run = torchrun(2, config(n_head=5))
    assert run.returncode != 0
    assert run.stderr.count("n_embd 32 is not divisible by n_head 5") == 1
