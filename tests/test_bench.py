"""bench.py runs what people run, and prints what it measured. (What it measures is no test's business.)"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest
import torch

import bench
import train


def run(capsys, *argv: str) -> dict:
    bench.main([*argv, "--json", "--rounds", "1", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


TINY = (
    "--n_layer",
    "1",
    "--n_embd",
    "64",
    "--n_head",
    "2",
    "--batch_size",
    "1",
    "--block_size",
    "8",
    "--steps",
    "1",
    "--dtype",
    "fp32",
)


def test_the_ladder_ends_at_the_defaults():
    """Nothing but the number of micro-steps is left to change at the top, and each rung changes something."""
    fields = {field.name: field.default for field in dataclasses.fields(train.TrainConfig)}
    top = {}
    for changed in bench.LADDER.values():
        assert any(top.get(name) != value for name, value in changed.items())
        top |= changed
    assert top.pop("accumulate") == 4 and set(top) <= set(fields)
    assert {name: value for name, value in top.items() if fields[name] not in (value, "auto")} == {}


def test_a_step_against_transformers(capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda machine: 1e12)
    monkeypatch.setattr(bench, "in_a_process_of_its_own", lambda function, *arguments: function(*arguments))
    result = run(capsys, "train", *TINY)
    assert set(result["rows"]) == {"ours", "transformers"} and result["matmul_flops"] > 0
    ours = result["rows"]["ours"]
    assert ours["tokens_per_s"] == pytest.approx(8000 / ours["ms"]) and 0 < ours["of_matmul"] < 2
    bench.show_train(result)
    shown = capsys.readouterr().out
    assert "1 x 8 tokens" in shown and "waiting for a checkpoint" in shown
    assert 0 <= ours["waited_ms"] <= ours["longest_wait_ms"] < result["checkpoint_wait_ms"]


def test_a_killed_process_counts_as_out_of_memory():
    with pytest.raises(torch.OutOfMemoryError, match=r"a process was killed.*smaller --batch_size"):
        bench.in_a_process_of_its_own(os._exit, 9)


def fake_step(arguments, folder, dtype, **settings):
    if settings.get("accumulate"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return dict(ms=10.0, tokens_per_s=800.0, flops=1e9, mfu=None, memory_gb=None)


def test_out_of_memory_is_null_and_loses_no_other_measurement(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "steps_of_train", fake_step)
    monkeypatch.setattr(bench, "matmul_rate", lambda machine: 1e12)
    result = run(capsys, "ladder", *TINY, "--chart", str(tmp_path / "ladder.svg"))
    assert list(result["rows"]) == [name for name in bench.LADDER if name != "TF32"]  # TF32 is for GPUs
    assert [name for name, row in result["rows"].items() if row is None] == ["4 micro-steps"]
    (tmp_path / "ladder.json").write_text(json.dumps(result))
    bench.main(["show", str(tmp_path / "ladder.json")])
    assert "out of memory" in capsys.readouterr().out
    assert "bf16 autocast" in (tmp_path / "ladder.svg").read_text()


def test_generation_against_transformers(capsys, monkeypatch):
    tiny = functools.partial(bench.GPTConfig, n_layer=1, n_head=2, n_embd=64, block_size=32)
    monkeypatch.setattr(bench, "GPTConfig", tiny)
    result = run(capsys, "sample", "--max_tokens", "2", "--prompt_tokens", "2", "--dtype", "fp32")
    assert result["ratio"] > 0


def test_what_autograd_keeps_is_counted_to_the_byte():
    """A linear layer keeps its input, once though seen twice, and its parameters are not counted."""
    linear = torch.nn.Linear(8, 4, bias=False).to(torch.bfloat16)
    x = torch.randn(16, 8, dtype=torch.bfloat16)
    assert bench.bytes_kept(linear, lambda model, x: (model(x) + model(x)).sum(), x) == 2 * x.numel()


def test_memory_counts_no_logits(capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {"gpt2": dict(n_layer=3, n_head=2, n_embd=16)})
    bench.main(["memory", "--block_size", "8", "--json"])
    result = json.loads(capsys.readouterr().out)
    row = result["rows"]["gpt2"]
    assert row["recomputed"] < row["kept"] < 8 * 50257 < result["transformers"]
    assert row["batches"]["kept"]["24"] == bench.largest_batch(0.9 * 24e9 - row["fixed"], row["kept"])
    bench.show_memory(result)
    assert "recompute" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", sorted((Path(bench.__file__).parent / "results").glob("*/*.json")), ids=lambda f: f.name
)
def test_committed_results_are_shown(capsys, file):
    bench.main(["show", str(file)])
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize("content", ["[]", "x", '{"bench": "foo"}', '{"bench": "train"}', '{"bench": "memory"}'])
def test_a_file_that_is_no_whole_result_is_one_line(capsys, tmp_path, content):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        bench.main(["show", str(tmp_path / "odd.json")])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith(f"bench.py: {tmp_path}/odd.json: ") and error.count("\n") == 1
