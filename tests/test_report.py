"""A run's report and a checkpoint's card say what metrics.jsonl says, and their command makes the
same run.
"""

import json
import re
import shutil
from pathlib import Path

import plot
import train
from parts import report as reports
from parts.console import Console, plural, print_lines
from parts.metrics import pick_evenly, read_metrics, select
from parts.pretrained import checkpoints
from parts.report import make_card, write_markdown

import pytest
from conftest import ODD_LINES, metrics
from huggingface_hub import ModelCard

RESULTS = [
    file.parent for file in (Path(__file__).parent.parent / "results").glob("*/metrics.jsonl")
]

SETTINGS = dict(
    data_dir="shards/tale",
    init_from="scratch",
    total_batch_size=1000,
    max_steps=30,
    sample_prompt="Once",
)
RUN = dict(
    step=0,
    kind="run",
    settings=SETTINGS,
    parameters=1234,
    flops_per_token=2,
    data=dict(train_tokens=5000, source=dict(dataset="someone/tales")),
    device="cuda:0, NVIDIA H200",
    world_size=2,
    command="python train.py --max_steps=30",
)


def trained(step: int, loss: float | None, seconds: float = 3600) -> dict:
    return dict(step=step, kind="train", loss=loss, ms=1000 * seconds, mfu=0.5, tokens_per_s=7)


TRAIN = [trained(10 * i, loss) for i, loss in enumerate((9, 4, 3.4321))]


def a_run(folder: Path, *records: dict) -> Path:
    """A folder with these metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_report_says_what_the_metrics_say(tmp_path):
    val = [
        dict(step=step, kind="val", loss=loss)
        for step, loss in ((0, 9.0), (10, 3.25), (20, 3.5), (21, None))
    ]
    score = dict(step=20, kind="hellaswag", acc_norm=0.2612)
    text = write_markdown(a_run(tmp_path / "tale", RUN, *TRAIN, *val, score)).read_text()
    for line in (
        "# tale",
        "| data_dir | `shards/tale` |",
        "| parameters | 1,234 |",
        "| steps | 21 of 30 |",
        "| tokens | 21,000 |",
        "| training loss | 3.4321 (step 20) |",
        "| validation loss | 3.5000 (best: 3.2500 at step 10) |",
        "| HellaSwag (acc_norm) | 0.2612 (GPT-2 124M: 0.2955) |",
        "| training time (h:mm:ss) | 21:00:00 on 2 x NVIDIA H200 |",
        "| MFU (median) | 50.0% |",
        "| compute | 4.2e+04 FLOPs |",
        "* step 20: 0.2612",
        "    python train.py --max_steps=30",
        '      "device": "cuda:0, NVIDIA H200",',
        '        "total_batch_size": 1000,',
    ):
        assert f"\n{line}\n" in f"\n{text}"
    assert "None" not in text and "![" not in text  # no picture was drawn


def test_each_record_stands_for_the_steps_since_the_last_one(tmp_path):
    """The run continues another's step 100; from step 110 the batch is half as large."""
    again = RUN | dict(step=110, settings=SETTINGS | dict(total_batch_size=500))
    steps = [
        trained(step, 1.0, seconds) for step, seconds in ((100, 60), (109, 6), (110, 60), (119, 6))
    ]
    folder = a_run(tmp_path, RUN | dict(step=100), *steps[:2], again, *steps[2:])
    text = write_markdown(folder).read_text()
    assert f"| tokens | {110 * 1000 + 10 * 500:,} |" in text and "| 0:03:48 on" in text


def test_a_run_of_which_little_is_known_has_a_report_and_a_card(tmp_path):
    folder = a_run(tmp_path / "run", RUN, trained(3, None))
    assert write_markdown(folder).read_text().startswith("# run\n")
    assert ModelCard(make_card(folder, 5)).data.library_name == "transformers"


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_an_odd_line_costs_neither_the_report_nor_the_card_nor_the_page(tmp_path, line):
    folder = a_run(tmp_path / "run", RUN, *TRAIN)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line + "\n" + json.dumps(dict(step=21, kind="val", loss=3.25)) + "\n")
    text = write_markdown(folder).read_text()
    assert "| validation loss | 3.2500 (best: 3.2500 at step 21) |" in text
    assert ModelCard(make_card(folder, 21)).data.library_name == "transformers"
    records = read_metrics(folder / "metrics.jsonl")
    json.dumps([record.get("loss") for record in records], allow_nan=False)
    assert [r["step"] for r in select(records, "train", "loss", "ms")] == [0, 10, 20]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no run in a metrics\.jsonl here"):
        write_markdown(a_run(tmp_path, TRAIN[0]))


def test_reports_and_pictures_replace_links_and_are_written_whole(tmp_path):
    """A folder from elsewhere may have links to anything: their targets stay as they are."""
    folder = a_run(tmp_path / "run", RUN, *(r | dict(lr=1.0, grad_norm=1.0) for r in TRAIN))
    target = tmp_path / "target"
    target.write_text("precious")
    names = ("report.md", "loss.svg", "loss.png", "training.svg", "training.png")
    for name in names:
        (folder / name).symlink_to(target)
    plot.write_report(folder)
    assert target.read_text() == "precious"
    assert not any((folder / name).is_symlink() for name in names)
    assert sorted(path.name for path in folder.iterdir()) == sorted(("metrics.jsonl", *names))


def test_long_lists_are_thinned_and_keep_both_ends():
    assert pick_evenly(list(range(500)), 4) == [0, 166, 333, 499] and pick_evenly([], 4) == []
    assert pick_evenly([1, 2], 4) == [1, 2]


def test_no_text_of_a_sample_ends_its_block(tmp_path):
    sample = dict(step=1, kind="sample", text="```\n# x\r``` \x1b\udce9")
    text = write_markdown(a_run(tmp_path, RUN, sample)).read_text()
    assert "\n    ```\n    # x\n    ``` \ufffd?\n" in text


def test_a_card_is_read_by_the_hub_and_ends_at_its_checkpoint(tmp_path):
    scores = [
        dict(step=step, kind="hellaswag", acc_norm=score) for step, score in ((10, 0.25), (20, 0.5))
    ]
    tuned = RUN | dict(settings=SETTINGS | dict(init_from="gpt2-medium"))
    read = ModelCard(make_card(a_run(tmp_path / "tale", tuned, *TRAIN, *scores), 10))
    assert (
        read.data.datasets == ["someone/tales"]
        and read.data.base_model == "openai-community/gpt2-medium"
    )
    for line in (
        "| steps | 10 of 30 |",
        "| tokens | 10,000 |",
        "| training loss | 9.0000 (step 0) |",
        "0.2500",
    ):
        assert line in read.text
    assert "0.5000" not in read.text and "('Once')" in read.text


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_reports_are_those_of_their_metrics(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert write_markdown(copy).read_text() == (folder / "report.md").read_text()
    assert all((folder / f"{name}.svg").exists() for name in ("loss", "training"))


def test_a_run_ends_with_its_report_and_its_checkpoints_have_cards(config, capsys):
    c = config(
        report=True,
        eval_every=4,
        sample_every=6,
        checkpoint_every=4,
        keep_checkpoints=0,
        log_every=5,
    )
    train.train(c)
    out_dir = Path(c.out_dir)
    assert f"report: {out_dir}/report.md" in capsys.readouterr().out
    text = (out_dir / "report.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(shown) == 2 and all((out_dir / picture).stat().st_size > 1000 for picture in shown)
    assert (
        f"* step 12: {metrics(c.out_dir, 'val')[-1]['loss']:.4f}" in text
        and "## Sample after 6 steps" in text
    )
    for folder, n_steps in zip(checkpoints(out_dir), (4, 8, 12)):
        assert f"| steps | {n_steps} of 12 |" in (folder / "README.md").read_text()


def test_a_report_or_card_that_fails_does_not_fail_the_run(config, monkeypatch, capsys):
    monkeypatch.setattr(plot, "draw_curves", lambda *_: 1 / 0)
    monkeypatch.setattr(reports, "summarize", lambda *_: 1 / 0)
    c = config(report=True, checkpoint_every=12)
    assert train.train(c)["step"] == 12
    out = capsys.readouterr().out
    assert "is not whole (ZeroDivisionError: division by zero)" in out
    assert "NOTE: " in out and "has no card (ZeroDivisionError: division by zero)" in out
    assert checkpoints(c.out_dir) and not (checkpoints(c.out_dir)[-1] / "README.md").exists()


def test_half_a_card_is_deleted_and_pictures_that_failed_are_drawn_by_the_same_command(
    config, monkeypatch, capsys
):
    """As on a disk that was full for a moment."""
    write_text = Path.write_text

    def write_half(path: Path, text: str, **options) -> int:
        if path.name == "README.md":
            write_text(path, text[:10])
            raise OSError(28, "No space left on device", str(path))
        return write_text(path, text, **options)

    def draw_nothing(*_):
        raise OSError(28, "No space left on device")

    c = config(report=True, checkpoint_every=12)
    folder = Path(c.out_dir)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        patch.setattr(plot, "draw_curves", draw_nothing)
        assert train.train(c)["step"] == 12
    assert (folder / "report.md").exists() and not (folder / "loss.svg").exists()
    assert not (folder / "step_0000012" / "README.md").exists()
    assert "NOTE: " in capsys.readouterr().out

    assert train.train(c)["step"] == 12
    assert (folder / "loss.svg").exists() and (folder / "training.png").exists()
    assert "loss.svg" in (folder / "report.md").read_text()
    (folder / "report.md").write_text("my own notes")
    train.train(c)
    assert (folder / "report.md").read_text() == "my own notes"


def test_the_bars_time_left_is_trainings(monkeypatch):
    """Validation of 100 s, beside steps of 1 s, counts neither in the time passed nor in the time
    left.
    """
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Console(10, 0, 1, is_main=True) as console:
        clock = [console.bar.start_t]
        console.bar._time = lambda: clock[0]
        for _ in range(3):
            console.bar.set_postfix_str("validation")
            assert str(console.bar).endswith(", validation]")
            clock[0] += 100
            console.line("val loss 1.0")
            clock[0] += 1
            console.bar.update()
        assert str(console.bar).endswith(" 3/10 [00:03<00:07]")


def test_a_terminal_gets_lines_broken_at_words(monkeypatch, capsys):
    text = (
        "batch: 16 (sequences) x 128 (tokens) x 1\n"
        "arithmetic: bf16 and as always spelled-out attention"
    )
    print_lines(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "39")
    print_lines(text)
    assert capsys.readouterr().out == re.sub(r" (1$|spelled)", r"\n  \1", text, flags=re.M) + "\n"


def test_one_is_singular():
    numbers = [plural(n, "thread") for n in (0, 1, 2, 1234)]
    assert numbers == ["0 threads", "1 thread", "2 threads", "1,234 threads"]
