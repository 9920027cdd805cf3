"""A run's report and a checkpoint's card say what metrics.jsonl says, and the command in them makes the same run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import metrics
from huggingface_hub import ModelCard

import plot
import report
import train
from pretrained import checkpoints

RESULTS = [file.parent for file in (Path(__file__).parent.parent / "results").glob("*/metrics.jsonl")]

RUN = dict(
    step=0,
    kind="run",
    settings=dict(data_dir="shards/tale", total_batch_size=1000, max_steps=30, sample_prompt="Once"),
    parameters=1234,
    flops_per_token=2,
    tokenizer="gpt2",
    data=dict(train_tokens=5000, source=dict(dataset="someone/tales")),
    device="cuda:0, NVIDIA H200",
    dtype="bfloat16",
    compiled=True,
    world_size=2,
    commit="abc",
    command="python train.py --max_steps=30",
    versions=dict(torch="2.13.0"),
)


def a_run(folder: Path, *records: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def steps(*losses: float, every: int = 10) -> list[dict]:
    """A record at step 0 and at every so many steps, each step an hour long."""
    values = dict(ms=3.6e6, tokens_per_s=100.0, mfu=0.5)
    return [dict(step=every * i, kind="train", loss=loss, **values) for i, loss in enumerate(losses)]


def test_a_report_says_what_the_metrics_say(tmp_path):
    vals = [dict(step=step, kind="val", loss=loss) for step, loss in ((0, 9.0), (10, 3.25), (20, 3.5))]
    others = [dict(step=20, kind="hellaswag", acc_norm=0.2612, n=10042), dict(step=7, kind="note", text="it jumped")]
    text = report.write(a_run(tmp_path / "tale", RUN, *steps(9, 4, 3.4321), *vals, *others)).read_text()
    assert text.startswith("# tale\n\nA GPT of 1,234 parameters, trained on shards/tale (gpt2 tokens).\n")
    for line in (
        "| steps | 21 of 30 |",
        "| tokens | 21,000 |",
        "| training loss | 3.4321 (step 20) |",
        "| validation loss | 3.5000 (step 20), best 3.2500 (step 10) |",
        "| HellaSwag | 0.2612 of 10,042 (acc_norm; GPT-2: 0.2955) |",
        "| compute | 4.2e+04 FLOPs |",
        "| 10 | 3.2500 |  |",
        "| 20 | 3.5000 | 0.2612 |",
        "* step 7: it jumped",
        "python train.py --max_steps=30",
        "| machine | 2 x NVIDIA H200 |",
        "| precision | bfloat16, compiled |",
        "| text | train_tokens: 5000, dataset: someone/tales |",
        "total_batch_size = 1000",
    ):
        assert f"\n{line}\n" in text
    # 21 steps of an hour, on two devices at 3 dollars.
    hours = "21.0 hours of training (without evaluation) on 2 x NVIDIA H200, 100 tokens/s, MFU 50.0%;"
    assert hours in text and "about $126.00 at $3.00 an hour for each device" in text
    assert "![" not in text  # no picture was drawn


def test_hours_and_tokens_are_those_of_each_start(tmp_path):
    """From another's step 100 on two devices, then, with half the batch, on one; the first step of each is slow."""
    settings = RUN["settings"] | dict(total_batch_size=500)
    again = RUN | dict(step=110, world_size=1, settings=settings)
    slow, fast = dict(loss=1.0, ms=3.6e6, kind="train"), dict(loss=1.0, ms=3.6e5, kind="train")
    records = [RUN | dict(step=100), dict(step=100) | slow, dict(step=109) | fast, again]
    records += [dict(step=110) | slow, dict(step=119) | fast]
    text = report.write(a_run(tmp_path, *records)).read_text()
    # Each start: an hour, and nine steps of a tenth; on two devices, then one.
    assert "\n3.8 hours of training" in text and f"about ${3 * 3 * 1.9:.2f} at" in text
    assert f"| tokens | {110 * 1000 + 10 * 500:,} |" in text


def test_a_fine_tuned_model_says_from_what(tmp_path):
    settings = RUN["settings"] | dict(init_from="gpt2-medium")
    card = ModelCard(report.card(a_run(tmp_path, RUN | dict(settings=settings), *steps(1.0)), 1))
    assert (
        card.data.base_model == "openai-community/gpt2-medium"
        and "initialised from gpt2-medium, trained on" in card.text
    )


@pytest.mark.parametrize("damage", [dict(ms="5"), dict(loss=[1]), dict(loss=True), dict(mfu="x", tokens_per_s={})])
def test_values_of_the_wrong_type_are_left_out(tmp_path, damage):
    records = [RUN, *steps(3.0), steps(2.0)[0] | dict(step=1) | damage]
    records += [dict(step=1, kind="val", loss="2.3"), dict(step=1, kind="sample", text=5)]
    records += [dict(step=1, kind="hellaswag", acc_norm=[1]), dict(step=1, kind="note", text=None)]
    assert "3.6" not in report.card(a_run(tmp_path, *records), 2).split("## How to")[0].replace("3.6e", "")


def test_pictures_that_are_there_are_shown(tmp_path):
    (a_run(tmp_path, RUN, *steps(1.0)) / "loss.svg").write_text("<svg/>")
    assert re.findall(r"!\[.*\]\((.*)\)", report.write(tmp_path).read_text()) == ["loss.svg"]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [dict(step=0, kind="run")],
        [dict(step=0, kind="run", settings={}), *steps(1.0)],
        [dict(step=3, kind="train", loss=None, ms=1.0), dict(step=3, kind="val"), dict(step=4, kind="sample")],
        [RUN, dict(step=0, kind="train", loss=1.0, ms=1.0), dict(step=1, kind="hellaswag", acc_norm=0.3)],
    ],
)
def test_what_is_lacking_is_left_out(tmp_path, records):
    text = report.write(a_run(tmp_path / "run", *records)).read_text()
    assert text.startswith("# run\n") and "None" not in text.split("<details>")[0]
    assert ModelCard(report.card(tmp_path / "run", 5)).data.library_name == "transformers"


def test_long_curves_are_thinned_but_keep_their_ends_and_the_best(tmp_path):
    vals = [dict(step=step, kind="val", loss=1.0 if step == 137 else 2.0) for step in range(500)]
    text = report.write(a_run(tmp_path, RUN, *steps(1.0), *vals)).read_text()
    shown = [int(step) for step in re.findall(r"^\| (\d+) \| [12]\.0000", text, re.MULTILINE)]
    assert {0, 137, 499} <= set(shown) and len(shown) == report.ROWS + 1 and shown == sorted(shown)


def test_any_text_stands_in_its_block(tmp_path):
    text = "```python\n| x |\n````"
    shown = report.write(a_run(tmp_path, RUN, dict(step=1, kind="sample", text=text + "\x1b\udce9"))).read_text()
    assert f"\n`````text\n{text}\ufffd?\n`````\n" in shown


def test_a_card_is_the_hub_s(tmp_path):
    """huggingface_hub reads its header; it tells of nothing after its checkpoint."""
    scores = [dict(step=step, kind="hellaswag", acc_norm=score, n=4) for step, score in ((10, 0.25), (20, 0.5))]
    card = ModelCard(report.card(a_run(tmp_path / "tale", RUN, *steps(9, 4, 3), *scores), 10))
    assert card.data.datasets == ["someone/tales"] and card.data.pipeline_tag == "text-generation"
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("hellaswag", "acc_norm", 0.25)
    assert (
        "| steps | 10 of 30 |" in card.text
        and "| tokens | 10,000 |" in card.text
        and "0.5000" not in card.text
        and "write('Once'," in card.text
    )


@pytest.mark.parametrize("run", RESULTS, ids=lambda run: run.name)
def test_committed_reports_are_those_of_their_metrics(tmp_path, run):
    copy = shutil.copytree(run, tmp_path / run.name)
    assert report.write(copy).read_text() == (run / "report.md").read_text()
    assert all((run / f"{name}.svg").exists() for name in ("loss", "training"))


def test_a_run_ends_with_its_report(config, capsys):
    c = config(report=True, eval_every=4, sample_every=6, checkpoint_every=4, keep_checkpoints=0, log_every=5)
    train.train(c)
    out_dir = Path(c.out_dir)
    assert f"report: {out_dir}/report.md" in capsys.readouterr().out
    text = (out_dir / "report.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(shown) == 2 and all((out_dir / picture).stat().st_size > 1000 for picture in shown)
    last = metrics(c.out_dir, "val")[-1]["loss"]
    assert f"{last:.4f} (step 12)" in text and "After 6 steps:" in text
    for folder, n_steps in zip(checkpoints(out_dir), (4, 8, 12)):
        assert f"| steps | {n_steps} of 12 |" in (folder / "README.md").read_text()


def test_a_report_that_fails_fails_no_run(config, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no LaTeX")

    monkeypatch.setattr(plot, "draw_curves", broken)
    c = config(report=True)
    assert train.train(c)["step"] == 12
    said = capsys.readouterr().out
    assert f"report: none (RuntimeError: no LaTeX); try python plot.py --report {c.out_dir}\ndone: 12 steps" in said


def test_a_card_that_fails_fails_no_checkpoint(config, monkeypatch):
    monkeypatch.setattr(report, "summary", lambda *_: 1 / 0)
    c = config(checkpoint_every=12)
    train.train(c)
    assert (
        (checkpoints(c.out_dir)[-1] / "README.md").read_text().startswith("Step 12. The card could not be made: Zero")
    )
