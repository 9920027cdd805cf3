"""What happens to runs: kills, full disks, damaged files, lost processes. Real processes, and
nothing may be lost.
"""

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import train
from parts import checkpoint
from parts.pretrained import checkpoints

import pytest
import torch
from conftest import clean_environment, flags, losses, metrics, toy_config, weights

ROOT = Path(__file__).parent.parent

# 150 steps, all features on, a checkpoint every third step: a kill at a random moment often hits
# one being written.
BUSY = dict(
    max_steps=150,
    dropout=0.1,
    batch_size=2,
    checkpoint_every=3,
    eval_every=6,
    sample_every=30,
    log_every=1,
)
THREE = dict(checkpoint_every=4, keep_checkpoints=0)  # checkpoints: at 4, 8 and 12
PAIR = ("--standalone", "--nproc_per_node=2")


def start(config, *torchrun: str, **options) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    environment = clean_environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")
    command = [sys.executable, *launcher, "train.py", *flags(config)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)


def take_ctrl_c() -> None:
    """A background job, such as pytest's, ignores Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> object:
    """The condition's value once it is true; an error if the process ends before."""
    while not (value := condition()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return value


def assert_equal_runs(straight, other) -> None:
    one, two = weights(straight), weights(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for kind in ("train", "val"):
        curves = [
            [(r["step"], r["loss"]) for r in metrics(folder, kind)] for folder in (straight, other)
        ]
        assert curves[0] == curves[1]
    assert not list(Path(other).glob(".step_*"))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """Gives the folder of a busy run that nothing happened to, of one process or a pair."""

    @functools.cache
    def make(*torchrun: str) -> str:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        code, _, err = end(start(toy_config(shards, folder, **BUSY), *torchrun))
        assert code == 0, err
        return str(folder)

    return make


def kill_and_go_on(run, straight: str, length: float, kills: int, draw: random.Random) -> None:
    """kill -9 at random moments, then the same command. Runs that come to their end in spite of it
    are begun anew.
    """
    finished = 0
    while kills:
        process = start(run)
        try:
            process.communicate(timeout=draw.uniform(0.3, 1.0) * length)
            assert process.returncode == 0
            assert_equal_runs(straight, run.out_dir)
            shutil.rmtree(run.out_dir)
            finished += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills -= 1
        assert finished < 10  # the kills come too late
    code, _, err = end(start(run))
    assert code == 0, err
    assert_equal_runs(straight, run.out_dir)


@pytest.mark.torture
def test_killed_at_twenty_random_moments(config, undisturbed, tmp_path):
    straight = undisturbed()
    began = time.monotonic()
    end(start(config(**BUSY, out_dir=str(tmp_path / "timed"))))
    length = time.monotonic() - began
    with ThreadPoolExecutor(2) as pool:
        runs = [config(**BUSY, out_dir=str(tmp_path / name)) for name in ("a", "b")]
        ends = [
            pool.submit(kill_and_go_on, run, straight, length, 10, random.Random(run.out_dir[-1]))
            for run in runs
        ]
    for each in ends:
        each.result()


def test_too_little_room_is_seen_before_training(config, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    with pytest.raises(OSError, match=r"a checkpoint takes 0.00 GB, but 0.00 GB are free"):
        train.train(config(checkpoint_every=6))
    assert train.train(config(checkpoint_every=0))["step"] == 12  # which needs none


@pytest.mark.torture
def test_a_second_process_is_refused_until_the_first_is_gone(config, tmp_path):
    run = config(**BUSY | dict(max_steps=100_000))
    first = start(run)
    wait_until(lambda: checkpoints(run.out_dir), first)
    for resume in ("auto", "never"):
        code, _, err = end(start(config(**BUSY, resume=resume)))
        assert code == 2 and f"out_dir {run.out_dir}: another run is writing to it" in err
    assert first.poll() is None
    first.kill()
    first.communicate()
    code, _, err = end(start(config(**BUSY, resume="never", data_dir="nowhere")))
    assert code == 2 and "no train shards" in err  # the lock is free; the run has another mistake
    assert checkpoints(run.out_dir)


# ---- Damaged checkpoints -------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip_a_byte),
        ("train_state.pt", lambda path: path.write_bytes(path.read_bytes()[:-7])),
        ("config.json", lambda path: path.unlink()),
        *(("settings.json", lambda path, text=text: path.write_text(text)) for text in ("{}", "{")),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(config, tmp_path, capsys, name, damage):
    run = config(**THREE)
    train.train(run)
    straight = shutil.copytree(run.out_dir, tmp_path / "straight")
    shutil.rmtree(checkpoints(run.out_dir)[-1])
    damage(Path(run.out_dir) / "step_0000008" / name)
    os.utime(
        Path(run.out_dir) / "step_0000008", (0, 0)
    )  # newest is by number: a clock set back says nothing
    capsys.readouterr()
    train.train(run)
    out = capsys.readouterr().out
    assert re.search(f"WARNING: a damaged checkpoint: .*step_0000008.*{name}", out)
    assert f"resume: {run.out_dir}/step_0000004" in out
    assert (tmp_path / "run.old1" / "step_0000008").is_dir()
    assert_equal_runs(straight, run.out_dir)


def test_an_older_damaged_checkpoint_ends_no_run_but_when_none_is_whole_nothing_is_begun(config):
    run = config(**THREE, eval_every=4)
    train.train(run)
    shutil.rmtree(checkpoints(run.out_dir)[-1])
    (Path(run.out_dir) / "step_0000004" / "settings.json").write_text("{")
    assert train.train(run)["step"] == 12
    for folder in checkpoints(run.out_dir):
        (folder / "train_state.pt").unlink()
    before = sorted(os.listdir(run.out_dir))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="no checkpoint is whole; start over with --resume=never"
        ):
            train.train(run)
    assert sorted(os.listdir(run.out_dir)) == before


def test_a_signal_while_the_last_checkpoint_is_written(config, monkeypatch):
    """The loop has ended then; torchrun sends its signals twice, and neither may break off the
    writing.
    """
    run, write = config(checkpoint_every=12), checkpoint.Saver.write

    def slow(*arguments):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(checkpoint.Saver, "write", slow)
    train.train(run)
    assert [folder.name for folder in checkpoints(run.out_dir)] == ["step_0000012"]


def test_a_reader_that_is_gone_costs_no_step(config):
    """Ctrl-C ends the `tee` of `train.py 2>&1 | tee log` too."""
    run = config(max_steps=100_000)
    process = start(run, preexec_fn=take_ctrl_c)
    wait_until(lambda: (Path(run.out_dir) / "metrics.jsonl").exists(), process)
    time.sleep(0.3)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (130, 2, 120)
    (last,) = checkpoints(run.out_dir)
    assert int(last.name[5:]) == metrics(run.out_dir)[-1]["step"] + 1


def test_one_checkpoint_is_written_at_a_time_and_room_is_looked_for_before_each(
    config, monkeypatch
):
    write, inside, most, asked = checkpoint.Saver.write, [], [], []

    def slow(*arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        write(*arguments)
        inside.pop()

    monkeypatch.setattr(checkpoint.Saver, "write", slow)
    monkeypatch.setattr(checkpoint, "check_space", lambda *_: asked.append(1))
    train.train(config(checkpoint_every=1, max_steps=4, keep_checkpoints=0))
    assert most == [1] * 4 and len(asked) == 5  # once at the start


def test_all_is_synced_and_the_folder_after_its_name(config, monkeypatch):
    synced, fsync = [], checkpoint.fsync
    monkeypatch.setattr(checkpoint, "fsync", lambda path: synced.append(path.name) or fsync(path))
    train.train(config(checkpoint_every=12))
    assert set(checkpoint.FIRST_FILES) <= set(synced) and synced[-2:] == [
        ".step_0000012.tmp",
        "run",
    ]


@pytest.mark.parametrize(("error", "waits"), [(KeyboardInterrupt, False), (ValueError, True)])
def test_only_ctrl_c_twice_does_not_wait_for_a_checkpoint(tmp_path, error, waits):
    written, go_on = [], threading.Event()
    with pytest.raises(error), checkpoint.Saver(tmp_path, 2, "", print) as saver:
        saver.writing = saver.thread.submit(lambda: go_on.wait(0.3) or written.append(1))
        raise error
    assert bool(written) == waits
    go_on.set()


# ---- Going on from a checkpoint by name ----------------------------------------------------------


def test_going_on_from_an_older_checkpoint(config, tmp_path):
    """What came after it is moved aside; the same numbers come again."""
    run = config(**THREE)
    train.train(run)
    straight = shutil.copytree(run.out_dir, tmp_path / "straight")
    train.train(config(**THREE, resume=f"{run.out_dir}/step_0000004"))
    assert_equal_runs(straight, run.out_dir)
    assert (tmp_path / "run.old1" / "step_0000008").is_dir()


def test_going_on_from_another_runs_checkpoint(config, tmp_path):
    """The metrics of a run that was there before, and left no checkpoint, are moved aside."""
    expected = losses(config(**THREE, out_dir=str(tmp_path / "first")))
    train.train(config(max_steps=3))
    branch = config(**THREE, resume=str(tmp_path / "first" / "step_0000008"))
    assert losses(branch) == expected[8:]
    assert len((tmp_path / "run.old1" / "metrics.jsonl").read_text().splitlines()) > 3
    with pytest.raises(ValueError, match="has a run of its own; choose another --out_dir"):
        train.train(branch)
    with pytest.raises(ValueError, match="nowhere: settings"):
        train.train(config(**THREE, resume=str(tmp_path / "nowhere")))


# ---- Several processes ---------------------------------------------------------------------------


def start_pair(run, *options: str) -> subprocess.Popen:
    """Two processes under torchrun, which have written two checkpoints."""
    process = start(run, *PAIR, *options)
    wait_until(lambda: len(checkpoints(run.out_dir)) > 1, process)
    return process


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started and that train.py runs in."""
    run = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    return [
        int(pid)
        for pid, parent, *args in rows
        if int(parent) == process.pid and " train.py " in args[0]
    ]


@pytest.mark.torture
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_torchrun_replaces_a_lost_process(config, undisturbed, tmp_path, resume):
    """kill -9 on one of two: torchrun starts both anew, and they go on from the last checkpoint.
    With resume=never too: that was meant for the first start."""
    run = config(**BUSY, resume=resume)
    process = start_pair(run, "--max-restarts=2")
    os.kill(workers(process)[-1], signal.SIGKILL)
    code, out, err = end(process)
    assert code == 0, err
    assert "resume: " in out
    assert_equal_runs(undisturbed(*PAIR), run.out_dir)


@pytest.mark.torture
def test_a_signal_to_one_process_of_two(config, tmp_path):
    """Both stop, and neither leaves before all is written: torchrun would end the other."""
    run = config(**BUSY | dict(max_steps=100_000))
    process = start_pair(run)
    os.kill(workers(process)[-1], signal.SIGUSR1)
    _, out, _ = end(process)
    step = int(out.rsplit("stopped by SIGUSR1 after ", 1)[1].split()[0].replace(",", ""))
    assert checkpoints(run.out_dir)[-1].name == f"step_{step:07d}"


@pytest.mark.torture
def test_a_process_that_hangs_is_an_error_and_no_wait_for_ever(config, tmp_path):
    run = config(**BUSY | dict(max_steps=100_000), timeout=3)
    process = start_pair(run)
    alive, stopped = workers(process)
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: alive not in workers(process), process)
    os.kill(stopped, signal.SIGKILL)  # as torchrun does after half a minute
    code, _, err = end(process)
    assert code != 0 and "another process is gone or hangs" in err
    assert checkpoint.newest_whole(Path(run.out_dir))


@pytest.mark.torture
def test_two_machines(config, undisturbed, tmp_path):
    """Two torchruns that meet on loopback, one process each: the same numbers as two processes of
    one torchrun.
    """
    port = random.SystemRandom().randint(20_000, 60_000)
    meeting = (
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=test",
        "--local_addr=127.0.0.1",
    )
    run = config(**BUSY)
    processes = [start(run, "--nnodes=2", "--nproc_per_node=1", *meeting) for _ in range(2)]
    for process in processes:
        code, _, err = end(process)
        assert code == 0, err
    assert_equal_runs(undisturbed(*PAIR), run.out_dir)
