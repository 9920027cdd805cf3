"""Checkpoints that are written while training goes on hold the numbers of one step."""

import io
import threading
import time
from pathlib import Path

import train
from parts import checkpoint
from parts.snapshot import Snapshot, tensors_in

import pytest
import torch
from safetensors.torch import save_file


def make_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        "large": torch.randn(60, 50),
        "transposed": torch.randn(30, 70).t(),
        "rows": torch.randn(9, 4)[:7],
        "half": torch.randn(3).half(),
        "number": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
    }
    whole = torch.randn(2, 100)
    tensors["first half"], tensors["second half"] = whole[0], whole[1]
    return tensors


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("parts.snapshot.PIECE_BYTES", 600)


def test_safetensors_are_those_of_save_file_byte_for_byte(tmp_path, small_pieces):
    tensors = make_tensors()
    Snapshot().write_safetensors(tensors, tmp_path / "own")
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(copies, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_state_is_what_torch_save_writes(tmp_path, small_pieces):
    content = dict(optimizer={0: make_tensors(), 1: dict(momentum_buffer=None)}, scaler=dict(a=1.5))
    Snapshot().write_pt(content, tmp_path / "state_1")
    torch.save(content, tmp_path / "state_2")
    own = torch.load(tmp_path / "state_1", weights_only=True)
    theirs = torch.load(tmp_path / "state_2", weights_only=True)
    assert own["scaler"] == theirs["scaler"] and own["optimizer"][1] == theirs["optimizer"][1]
    for name, tensor in theirs["optimizer"][0].items():
        assert torch.equal(own["optimizer"][0][name], tensor), name
    assert (tmp_path / "state_1").stat().st_size == (tmp_path / "state_2").stat().st_size


@pytest.mark.parametrize("n_pieces", [0, 1, 7, 20, 40, 10_000])
def test_what_is_changed_after_any_piece_is_written_as_it_was(small_pieces, n_pieces):
    """`preserve` and the change come from another thread, after so many pieces."""
    tensors = make_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    snapshot = Snapshot(tensors.values())

    class Disk(io.BytesIO):
        pieces = 0

        def write(self, content):
            self.pieces += 1
            if self.pieces == n_pieces:
                change.start()
                time.sleep(0.05)  # `preserve` has to wait for this piece
            return super().write(content)

    def preserve_and_change() -> None:
        snapshot.preserve()
        for tensor in tensors.values():
            tensor.zero_()

    change = threading.Thread(target=preserve_and_change)
    if n_pieces == 0:
        preserve_and_change()
    disk = Disk()
    for tensor in tensors.values():
        snapshot.write(tensor, disk)
    if change.ident:
        change.join()
    expected = io.BytesIO()
    for tensor in before.values():
        Snapshot().write(tensor, expected)
    assert disk.getvalue() == expected.getvalue()
    assert not snapshot.live and not snapshot.copies  # and no memory is held


def test_a_change_without_preserve_is_noticed():
    weight = torch.zeros(3)
    snapshot = Snapshot([weight])
    weight += 1
    with pytest.raises(ValueError, match="outside of the optimizer's step"):
        snapshot.preserve()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_slow_disk_gets_the_numbers_of_the_step(config, monkeypatch, tmp_path, optimizer, fused):
    """The next update comes while the files of step 4 are being written."""
    if optimizer == "muon" and not fused:
        pytest.skip("its matrices are updated the same way")
    settings = dict(checkpoint_every=4, max_steps=8, optimizer=optimizer, fused=fused)
    quick = config(**settings, keep_checkpoints=0, out_dir=str(tmp_path / "quick"))
    train.train(quick)

    write, preserve, preserved = Snapshot.write, Snapshot.preserve, threading.Event()
    n_copied = []

    def slow(self, tensor, file):
        # Half of the weights are read from where they are, the rest after the update.
        slow.n_tensors += 1
        if slow.n_tensors == 10:
            assert preserved.wait(60)
            time.sleep(0.2)
        write(self, tensor, file)

    def watched(self):
        n_copied.append(len(self.live))
        preserve(self)
        preserved.set()

    slow.n_tensors = 0
    monkeypatch.setattr(Snapshot, "write", slow)
    monkeypatch.setattr(Snapshot, "preserve", watched)
    run = config(**settings, keep_checkpoints=0, out_dir=str(tmp_path / "slow"))
    train.train(run)

    assert n_copied and n_copied[0] > 10
    for name in ("step_0000004", "step_0000008"):
        one, two = Path(quick.out_dir) / name, Path(run.out_dir) / name
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        states = [checkpoint.load_train_state(folder)["optimizer"] for folder in (one, two)]
        pairs = list(zip(tensors_in(states[0]), tensors_in(states[1])))
        assert pairs and all(torch.equal(first, second) for first, second in pairs)
        assert checkpoint.verify(two).step == int(name[5:])
