"""Other systems than Linux: Windows, Macs, and the oldest Python. (tests/test_gpu.py has whole runs
on mps.)
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fineweb
from parts import data, runtime
from parts.pretrained import checkpoints
from parts.sharding import available_cpus

import fake_windows
import numpy as np
import pytest
import torch
from conftest import clean_environment, flags, metrics, toy_config

PROJECT = Path(__file__).parent.parent
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="which files are in use, /proc tells")


@on_linux
def test_windows(tmp_path):
    """From text to a report: a run, its resume, its end, and a new start. Texts without a named
    encoding are ASCII.
    """
    text = tmp_path / "tale.txt"
    text.write_text("Der süße Fuchs jumps over the lazy dog\n" * 2000, encoding="utf-8")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(dict(ctx="Der", endings=["süße", "b", "c", "d"], label=3)))
    shards = tmp_path / "shards"
    run = tmp_path / "run"
    config = toy_config(
        shards,
        run,
        checkpoint_every=3,
        keep_checkpoints=1,
        eval_every=3,
        sample_prompt="Für ",
        sample_every=6,
        hellaswag_every=6,
        hellaswag_data=str(tasks),
        log_every=3,
    )
    prepare = ["prepare", str(text), "--out", str(shards)]
    prepare += ["--tokenizer=bytes", "--shard_tokens=20000", "--workers=2"]
    train = ["train", *flags(config)]
    commands = [
        prepare,
        [*train, "--max_steps=6"],
        [*train, "--resume_anyway=True"],
        train,
        ["sample", "--model", str(run), "-m", "8"],
        ["hellaswag", "--model", str(run), "--data", str(tasks)],
        [*train, "--max_steps=3", "--resume=never"],
        ["plot", "--report", str(run)],
    ]
    done = subprocess.run(
        [sys.executable, fake_windows.__file__, json.dumps(commands)],
        env=clean_environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "is finished: it has 12 steps" in done.stdout
    # The first run kept one checkpoint: its last is also its best.
    assert [folder.name for folder in checkpoints(tmp_path / "run.old1")] == ["step_0000012"]
    assert [folder.name for folder in checkpoints(run)] == ["step_0000003"]
    assert metrics(run)[-1]["memory_gb"] is None
    assert (run / "report.md").exists()
    assert (run / "loss.png").exists()


@on_linux
def test_no_mapped_file_is_moved(tmp_path, monkeypatch):
    downloaded = tmp_path / "downloaded_train_000001.bin"
    data.write_shard(downloaded, np.arange(100, dtype=np.uint16))
    monkeypatch.setattr(os, "replace", fake_windows.refuse_files_in_use(os.replace))
    monkeypatch.setattr(fineweb, "download_file", lambda *_: downloaded)
    files = [dict(path="a/x_train_000001.bin", size=downloaded.stat().st_size, sha256=None)]
    [row] = fineweb.take_ready_made(SimpleNamespace(out="out"), tmp_path, "", files)
    assert row["tokens"] == 100
    assert not downloaded.exists()


def test_a_pool_on_windows_has_at_most_61_processes(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert available_cpus() == 61


def test_a_mac_with_several_processes_takes_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.choose_device("auto")[0].type == runtime.choose_device("mps")[0].type == "mps"
    assert runtime.choose_device("auto", world_size=2)[0].type == "cpu"
    with pytest.raises(ValueError, match=r"device=mps: .* several processes; use --device=cpu"):
        runtime.choose_device("mps", world_size=2)


def test_every_file_is_python_3_10():
    for folder in ("", "parts/", "config/", "tests/"):
        for path in PROJECT.glob(f"{folder}*.py"):
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
