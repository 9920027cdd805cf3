"""What happens to runs: kills, full disks, damaged files, lost processes. Real processes, and
nothing may be lost.
"""

import functools
import json
import os
import pickle
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
from parts import checkpoint, data, files
from parts.pretrained import checkpoints

import pytest
import torch
from conftest import ODD_LINES, clean_environment, flags, losses, metrics, toy_config, weights

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
    with pytest.raises(OSError, match=r"a checkpoint takes \S+ GB, but only 1e-06 GB are free"):
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


@pytest.fixture(scope="module")
def three_checkpoints(shards, tmp_path_factory) -> Path:
    """A run's folder with checkpoints at 4, 8 and 12; not to be changed."""
    folder = tmp_path_factory.mktemp("three") / "run"
    train.train(toy_config(shards, folder, **THREE, eval_every=4))
    return folder


@pytest.fixture
def stopped(three_checkpoints, tmp_path) -> Path:
    """A copy of it as after step 8."""
    folder = shutil.copytree(three_checkpoints, tmp_path / "run")
    shutil.rmtree(folder / "step_0000012")
    return folder


def flip_a_digit(text: str) -> str:
    assert '"step": 8' in text
    return text.replace('"step": 8', '"step": 0')


def rename_the_checksum(text: str) -> str:
    return text.replace('"checksum"', '"chacksum"')


@pytest.mark.parametrize("damage", [flip_a_digit, rename_the_checksum])
def test_a_flipped_digit_in_settings_is_damage(stopped, damage):
    path = stopped / "step_0000008" / "settings.json"
    path.write_text(damage(path.read_text()))
    assert checkpoint.newest_whole(stopped).folder.name == "step_0000004"


def test_every_byte_of_settings_counts(stopped):
    """Whatever single byte is flipped: the checkpoint is damaged, or it says what it said."""
    path = stopped / "step_0000008" / "settings.json"
    state = checkpoint.read_state(path.parent)
    content = path.read_bytes()
    n_damaged = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x01
        path.write_bytes(flipped)
        try:
            assert checkpoint.read_state(path.parent) == state  # white space
        except ValueError as error:
            assert f"{path.parent}: settings.json cannot be read" in str(error)
            n_damaged += 1
    assert n_damaged > 0.7 * len(content)


# What settings.json of an early version, which has no checksum, can be changed into.
WRONG_KINDS = {
    "step": ["x", None, -1, 8.5, True, [], float("inf"), 0],
    "val_loss": ["x", [], {}, True],
    "settings": [None, [], 5, "x"],
    "train_tokens": ["x", -1, [], 1e99],
    "sha256": [None, [], "x", {"../../x": "0"}, {"config.json": 5}, {"nothing.bin": "0"}],
    "chosen": [
        *(None, [], "x", {"dtype": "fp99"}, {"dtype": []}, {"threads": "x"}, {"threads": -3}),
        *({"threads": 10**9}, {"flash": "x"}, {"compile": 5}, {"exact_norm": 1}),
        {"attention_kernel": 1},
    ],
}


def test_wrong_kinds_in_settings_are_damage_and_end_no_run(stopped, capsys):
    path = stopped / "step_0000008" / "settings.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    del content["train_sha256"]
    path.write_text(json.dumps(content))
    assert checkpoint.newest_whole(stopped).folder.name == "step_0000008"
    texts = ["[" * 100_000, '{"step": ' * 50_000, "[]", "5", "9" * 5000, "", "\0"]
    for name, values in WRONG_KINDS.items():
        texts += [json.dumps(content | {name: value}) for value in values]
        if name in ("step", "val_loss", "settings"):
            texts.append(json.dumps({key: content[key] for key in content if key != name}))
    for text in texts:
        path.write_text(text)
        capsys.readouterr()
        assert checkpoint.newest_whole(stopped).folder.name == "step_0000004", text[:200]
        assert "WARNING: a damaged checkpoint: " in capsys.readouterr().out
        # What a run does when it deletes old checkpoints: this one must not end it.
        assert "sha256" in text or checkpoint.best(stopped).folder.name == "step_0000004", text[
            :200
        ]


def test_an_early_checkpoint_without_sums_is_damaged_if_its_state_cannot_be_read(stopped):
    """Its settings.json lists no files, so nothing but reading them shows it."""
    folder = stopped / "step_0000008"
    content = json.loads((folder / "settings.json").read_text())
    early = {name: content[name] for name in ("step", "val_loss", "settings")}
    (folder / "settings.json").write_text(json.dumps(early))
    assert checkpoint.newest_whole(stopped).folder == folder
    state = (folder / "train_state.pt").read_bytes()
    for damaged in (b"", b"x", state[:-7], state[: len(state) // 2], pickle.dumps([1], protocol=2)):
        (folder / "train_state.pt").write_bytes(damaged)
        assert checkpoint.newest_whole(stopped).folder.name == "step_0000004"
    for damaged in ([], {}, {"optimizer": {}}, {"optimizer": [], "scaler": {}}, 5):
        torch.save(damaged, folder / "train_state.pt")
        assert checkpoint.newest_whole(stopped).folder.name == "step_0000004"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with names")
@pytest.mark.parametrize("name", ["settings.json", "train_state.pt"])
def test_a_pipe_in_a_checkpoint_is_no_wait_for_ever(stopped, name):
    path = stopped / "step_0000008" / name
    path.unlink()
    os.mkfifo(path)
    assert checkpoint.newest_whole(stopped).folder.name == "step_0000004"


def test_lost_metrics_and_a_damaged_checkpoint_do_not_end_a_runs_life(config, stopped, tmp_path):
    (stopped / "metrics.jsonl").unlink()
    (stopped / "step_0000008" / "train_state.pt").unlink()
    train.train(config(**THREE, eval_every=4))
    assert [record["step"] for record in metrics(stopped)] == list(range(4, 12))
    assert [path.name for path in tmp_path.glob("run.old*")] == ["run.old1"]
    assert [path.name for path in (tmp_path / "run.old1").iterdir()] == ["step_0000008"]


def test_a_move_that_fails_leaves_no_folder_behind(config, stopped, tmp_path, monkeypatch):
    (stopped / "step_0000008" / "train_state.pt").unlink()
    rename = Path.rename

    def refuse(self, target):
        if "run.old" in str(target):
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    for _ in range(2):
        with pytest.raises(PermissionError):
            train.train(config(**THREE, eval_every=4))
    assert not list(tmp_path.glob("run.old*"))
    monkeypatch.undo()
    assert train.train(config(**THREE, eval_every=4))["step"] == 12


def test_no_odd_line_of_metrics_blocks_a_resume(config, three_checkpoints, stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write("\n".join(ODD_LINES) + "\n")
    train.train(config(**THREE, eval_every=4))
    last_losses = []
    for folder in (three_checkpoints, stopped):
        last_losses.append([r["loss"] for r in metrics(folder) if r["step"] >= 8])
    assert len(last_losses[0]) == 4 and last_losses[0] == last_losses[1]


# ---- Other text ----------------------------------------------------------------------------------


def test_other_text_of_the_same_length_is_named(config, stopped, shards, tmp_path, capsys):
    """The length of the text is not enough: the same files in another order have it too."""
    other = shutil.copytree(shards, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    first, second = meta["shards"]["train"][:2]
    first["sha256"], second["sha256"] = second["sha256"], first["sha256"]
    a, b = (other / row["file"] for row in (first, second))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    (other / "meta.json").write_text(json.dumps(meta))
    settings = dict(**THREE, eval_every=4, data_dir=str(other))
    with pytest.raises(ValueError, match=r"other training text than .*step_0000008 was trained on"):
        train.train(config(**settings))
    assert train.train(config(**settings, resume_anyway=True))["step"] == 12
    # The folder's name does not count, and neither do the names of its files.
    shutil.rmtree(stopped / "step_0000012")
    same = shutil.copytree(shards, tmp_path / "same")
    assert checkpoint.newest_whole(stopped).state.train_sha256 == data.digest_of_shards(same)


# ---- Killed after the last checkpoint ------------------------------------------------------------


def test_the_same_command_finishes_what_a_kill_after_the_last_checkpoint_left(
    config, tmp_path, capsys
):
    """Its leftovers, its old checkpoints, and its report; and then nothing more."""
    run = config(checkpoint_every=4, keep_checkpoints=1, report=True)
    train.train(run)
    folder = Path(run.out_dir)
    whole = sorted(path.name for path in folder.iterdir())
    assert "report.md" in whole and "step_0000008" not in whole
    report = (folder / "report.md").read_text()
    shutil.copytree(folder / "step_0000012", folder / ".step_0000004.gone")
    for name in (".step_0000016.tmp", "metrics.jsonl.0123abcd.tmp", "loss.svg.0123abcd.tmp"):
        (folder / name).write_text("")
    content = json.loads((folder / "step_0000012" / "settings.json").read_text())
    shutil.copytree(folder / "step_0000012", folder / "step_0000008")
    content["step"] = 8
    content["checksum"] = checkpoint.checksum(content)
    (folder / "step_0000008" / "settings.json").write_text(json.dumps(content))
    for name in ("report.md", "loss.svg", "training.png"):
        (folder / name).unlink()
    capsys.readouterr()
    train.train(config(checkpoint_every=4, keep_checkpoints=0))  # another command: nothing is lost
    assert (folder / "step_0000008").exists() and not (folder / "report.md").exists()

    train.train(run)
    out = capsys.readouterr().out
    assert f"report: {folder}/report.md" in out and "is finished: it has 12 steps" in out
    assert sorted(path.name for path in folder.iterdir()) == whole
    assert (folder / "report.md").read_text() == report
    (folder / "report.md").write_text("my own notes")
    train.train(run)
    assert (folder / "report.md").read_text() == "my own notes"
    assert "report: " not in capsys.readouterr().out


def test_a_resumed_run_deletes_what_killed_ones_left(config, stopped, tmp_path):
    """Links among it are deleted, and not what they lead to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("")
    (stopped / ".step_0000012.tmp").symlink_to(precious)
    (stopped / "metrics.jsonl.0123abcd.tmp").write_text("x")
    (stopped / "metrics.jsonl.mine.tmp").write_text("the user's own")
    train.train(config(**THREE, eval_every=4))
    left = sorted(path.name for path in stopped.iterdir() if not path.name.startswith("step_"))
    assert left == ["metrics.jsonl", "metrics.jsonl.mine.tmp"] and (precious / "file").exists()


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(config, monkeypatch, capsys):
    rename = Path.rename

    def refuse(self, target):
        if str(target).endswith(".gone"):
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    run = config(checkpoint_every=4, keep_checkpoints=1)
    assert train.train(run)["step"] == 12
    assert "NOTE: an old checkpoint could not be deleted" in capsys.readouterr().out
    monkeypatch.undo()
    train.train(run)
    assert [folder.name for folder in checkpoints(run.out_dir)] == ["step_0000012"]


# ---- A foreign optimizer's state -----------------------------------------------------------------


def replaced(name: str, make: Callable[[torch.Tensor], object]) -> Callable[[dict], None]:
    """A damage: what the optimizer has of its first parameter becomes make(the right tensor)."""

    def damage(state: dict) -> None:
        state[0][name] = make(state[0]["exp_avg"])

    return damage


FOREIGN = {
    "another shape": (replaced("exp_avg", lambda _: torch.zeros(3, 3)), "exp_avg is .* but the"),
    "a scalar": (replaced("exp_avg_sq", lambda _: torch.zeros(())), "exp_avg_sq is .* but the"),
    "another type": (replaced("exp_avg", torch.Tensor.double), "exp_avg is torch.float64 "),
    "a number": (replaced("exp_avg", lambda _: 0.0), "exp_avg is no plain tensor"),
    "sparse": (replaced("exp_avg", torch.Tensor.to_sparse), "exp_avg is no plain tensor"),
    "no data": (replaced("exp_avg", lambda good: good.to("meta")), "exp_avg is no plain tensor"),
    "a step for each": (replaced("step", lambda good: good), "step is .* but the"),
    "another name": (replaced("momentum", lambda good: good), "is no state of adamw"),
    "a name less": (lambda state: state[0].pop("exp_avg"), "is no state of adamw"),
    "no table": (lambda state: state.update({0: 5}), "is no table"),
    "a parameter more": (lambda state: state.update({99: {}}), "state of another model"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_optimizers_state_is_compared_with_the_model(stopped, config, case):
    """The sums protect from accidents only: here they are right."""
    damage, message = FOREIGN[case]
    change_state(stopped / "step_0000008", damage)
    with pytest.raises(ValueError, match=rf"train_state\.pt: .*{message}"):
        train.train(config(**THREE, eval_every=4))


def change_state(folder: Path, damage: Callable[[dict], object]) -> None:
    saved = torch.load(folder / "train_state.pt", weights_only=True)
    damage(saved["optimizer"])
    torch.save(saved, folder / "train_state.pt")
    content = json.loads((folder / "settings.json").read_text())
    content["sha256"]["train_state.pt"] = files.sha256(folder / "train_state.pt")
    content["checksum"] = checkpoint.checksum(content)
    (folder / "settings.json").write_text(json.dumps(content))


def test_numbers_that_are_not_finite_are_named_and_can_be_taken_anyway(stopped, config):
    def overflow(state: dict) -> None:
        state[1]["exp_avg_sq"].fill_(float("inf"))

    change_state(stopped / "step_0000008", overflow)
    with pytest.raises(ValueError, match="exp_avg_sq is not finite; --resume_anyway=True"):
        train.train(config(**THREE, eval_every=4))
    assert train.train(config(**THREE, eval_every=4, resume_anyway=True))["step"] == 12


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
    with pytest.raises(ValueError, match="nowhere: no such checkpoint"):
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
