"""Pictures: what is drawn, where, and in which figure; damaged and growing metrics; mistakes."""

import json
import re
from pathlib import Path

import plot
from model import GPT, GPTConfig
from parts.tokenizer import get_tokenizer, save_tokenizer

import numpy as np
import pytest
import torch
from conftest import ODD_LINES
from hypothesis import given
from hypothesis import strategies as st

matplotlib = pytest.importorskip("matplotlib")


def started(step: int = 0, batch: int = 1000, data_dir="shards/fineweb", **facts) -> dict:
    settings = dict(total_batch_size=batch, data_dir=data_dir, init_from="scratch", max_steps=9)
    usual = dict(
        tokenizer="bytes",
        data={},
        parameters=1,
        flops_per_token=1,
        device="cpu",
        world_size=1,
        command="",
    )
    return dict(step=step, kind="run", settings=settings) | usual | facts


def test_runs_with_other_vocabularies_are_compared_in_bits_per_byte(tmp_path):
    records = [trained(0, 3.0), validated(1, 2.0)]
    one = write(
        tmp_path / "a", started(tokenizer="gpt2"), *records, validated(2, 1.5) | dict(val_bpb=0.75)
    )
    two = write(tmp_path / "b", started(), *records, validated(2, 1.0) | dict(val_bpb=1.25))
    [axes] = loss_axes(one, two)
    assert axes.get_ylabel() == "loss, bits per byte"
    assert line(axes, f"{one}: training")[:, 1].tolist() == [1.5] and line(
        axes, f"{two}: training"
    )[:, 1] == [3.75]
    assert line(axes, f"{one}: validation, last 0.750")[:, 1].tolist() == [1.0, 0.75]
    assert line(axes, f"{two}: validation, last 1.250")[:, 1].tolist() == [2.5, 1.25]
    unknown = write(tmp_path / "c", started(tokenizer="gpt2"), *records)  # an older run
    for folders in ((one,), (one, one), (unknown,)):
        assert loss_axes(*folders)[0].get_ylabel() == "loss, nats per token"
    with pytest.raises(ValueError, match=r"c: its tokens are not those of .* draw it alone"):
        loss_axes(unknown, two)


def trained(step: int, loss: float | None = 2.0, **values) -> dict:
    usual = dict(loss=loss, lr=1e-3, grad_norm=1.0, tokens_per_s=5e4, mfu=None, ms=1.0)
    return dict(step=step, kind="train") | usual | values


def validated(step: int, loss: float | None = 2.0) -> dict:
    return dict(step=step, kind="val", loss=loss)


def scored(step: int, acc_norm: float = 0.28) -> dict:
    return dict(step=step, kind="hellaswag", acc_norm=acc_norm, n=10042)


def write(folder: Path, *records: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def loss_axes(*folders: Path) -> list:
    """The axes of the losses and, if a run has scores, those of HellaSwag."""
    return plot.draw_losses(plot.read_runs(list(folders))).axes


def line(axes, label: str) -> np.ndarray:
    """The one line with a label that starts like this: (n, 2)."""
    [match] = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return match.get_xydata()


def dots(axes) -> np.ndarray:
    """The training values of the one run: (n, 2)."""
    [dots] = [
        line for line in axes.lines if line.get_linestyle() == "None" and line.get_mfc() != "none"
    ]
    return dots.get_xydata()


# ---- From records to curves ----------------------------------------------------------------------


def test_each_loss_is_at_the_tokens_seen_before_it(tmp_path):
    """Step 9's train record comes after its update, the tenth; its validation loss before. Then the
    batch grows.
    """
    records = [
        validated(0, 2.5),
        trained(0),
        trained(9),
        validated(10),
        started(10, 3000),
        trained(10),
        trained(19),
    ]
    [axes] = loss_axes(write(tmp_path / "run", started(), *records, validated(20, 2.3)))
    assert dots(axes).tolist() == [[1000, 2], [10_000, 2], [13_000, 2], [40_000, 2]]
    assert line(axes, "run: training (smoothed)").tolist() == dots(axes).tolist()
    assert line(axes, "run: validation, last 2.300").tolist() == [
        [0, 2.5],
        [10_000, 2],
        [40_000, 2.3],
    ]


def test_cut_lines_and_nulls_are_left_out(tmp_path):
    run = write(
        tmp_path / "run", started(), trained(0), trained(1, None), trained(2), validated(2, None)
    )
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(
            b'\x00\xff\xfe{garbage\n{"step": 10, "kind": "train", "lo'
        )  # a kill, or a run that is still going
    axes = loss_axes(run)[0]
    assert dots(axes).tolist() == line(axes, "run: training").tolist() == [[1000, 2], [3000, 2]]
    assert not any("validation" in str(drawn.get_label()) for drawn in axes.lines)


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_an_odd_line_costs_no_curve(tmp_path, line):
    run = write(tmp_path / "run", started(), trained(0), scored(0), trained(2))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    runs = plot.read_runs([run])
    assert plot.draw_training(runs) and plot.draw_losses(runs)
    _, losses = runs[0].curve("train", "loss")
    assert set(losses) == {2.0} and len(losses) >= 2


@given(st.lists(st.floats(0, 20), max_size=80))
def test_smoothing_is_the_mean_of_the_neighbours(values):
    reach = [min(5, i // 4) for i in range(len(values))]
    means = [np.mean(values[i - near : i + near + 1]) for i, near in enumerate(reach)]
    np.testing.assert_allclose(plot.smooth(np.array(values)), means, rtol=1e-12, atol=1e-12)
    assert plot.smooth(np.arange(2000.0) ** 2)[1000] == pytest.approx(
        (np.arange(980.0, 1021) ** 2).mean()
    )  # 1 %


# ---- What is in the picture ----------------------------------------------------------------------

COMPARABLE = (
    dict(tokenizer="gpt2"),
    dict(tokenizer="gpt2", data_dir="x", data=dict(source=dict(dataset="a/fineweb"))),
)


@pytest.mark.parametrize(
    "facts", [*COMPARABLE, dict(tokenizer="gpt2", data_dir="books"), dict(tokenizer="bytes")]
)
def test_published_losses_are_drawn_only_where_they_can_be_compared(tmp_path, facts):
    comparable = facts in COMPARABLE
    records = [*(trained(step, 4.0) for step in range(9)), scored(9, 0.26)]
    axes = loss_axes(write(tmp_path / "run", started(**facts), *records))
    assert axes[1].lines[0].get_xydata().tolist() == [[9000, 0.26]]
    levels = [
        [line.get_ydata()[0] for line in each.lines if list(line.get_xdata()) == [0, 1]]
        for each in axes
    ]
    assert levels == [
        [3.292] * comparable,
        [0.2955, 0.337, 0.25],  # and one who guesses
    ]  # horizontal lines through the whole picture
    assert [text.get_text() for text in axes[0].texts] == ["GPT-2 124M\n3.292"] * comparable
    assert any("llm.c" in str(drawn.get_label()) for drawn in axes[0].lines) == comparable
    if comparable:
        assert axes[0].get_ylim()[0] < 3.292 and axes[0].get_xlim() == (0, 1.01 * 9000)
        assert line(axes[0], "llm.c")[[0, -1]].tolist() == [
            [250 * 524_288, 6.171],
            [19_560 * 524_288, 3.272],
        ]


def test_a_score_stands_beside_the_published_one_of_its_style(tmp_path):
    records = [*(trained(step, 4.0) for step in range(9)), scored(9, 0.26) | dict(style="harness")]
    _, axes = loss_axes(write(tmp_path / "run", started(), *records))
    assert axes.texts[0].get_text() == "GPT-2 124M\n0.3114"


def falling(n: int) -> list[dict]:
    """Training that falls fast from 10.9, then slowly to 3, with five validation losses."""
    losses = 3 + 7.9 / (1 + np.arange(n)) ** 0.5
    return [
        record(step, losses[step])
        for step in range(n)
        for record in (validated, trained)[step % (n // 5) > 0 :]
    ]


def test_the_first_losses_of_a_long_run_are_cut_off_and_the_title_says_so(tmp_path):
    axes = loss_axes(write(tmp_path / "long", started(), *falling(400)))[0]
    assert 2.9 < axes.get_ylim()[0] < 3.4 and 4.5 < axes.get_ylim()[1] < 5
    assert axes.get_title("left") + axes.get_title() == "Initial losses, up to 10.9, are not shown."
    diverged = (trained(step, None) for step in range(20, 1000))
    for rest in ([], diverged):
        axes = loss_axes(write(tmp_path / "short", started(), *falling(20), *rest))[0]
        assert axes.get_ylim()[1] > 10.9 and not axes.get_title("left") + axes.get_title()


def test_training_has_a_panel_for_each_quantity(tmp_path):
    values = [
        dict(lr=1e-3 / (s + 1), grad_norm=9.0 / (s + 1), tokens_per_s=1e5 + s) for s in range(5)
    ]
    cpu = write(
        tmp_path / "cpu", started(), *(trained(step, **each) for step, each in enumerate(values))
    )
    rows = plot.draw_training(plot.read_runs([cpu])).axes
    assert [axes.get_ylabel() for axes in rows] == ["learning rate", "gradient norm", "tokens/s"]
    assert [plot.short_number(n) for n in (0, 0.0005, 500, 2_500_000, 10e9)] == [
        "0",
        "0.0005",
        "500",
        "2.5M",
        "10B",
    ]
    for axes, key in zip(rows, values[0]):
        assert dots(axes).tolist() == [
            [1000 * (step + 1), each[key]] for step, each in enumerate(values)
        ]


def test_muons_rate_is_drawn_beside_adamws(tmp_path):
    rates = dict(learning_rate=1e-2, muon_learning_rate=3e-2)
    records = [trained(step, lr=1e-2 / (step + 1)) for step in range(5)]
    for optimizer in ("muon", "adamw"):
        start = started()
        start["settings"] |= dict(optimizer=optimizer, **rates)
        folder = write(tmp_path / optimizer, start, *records)
        axes = plot.draw_training(plot.read_runs([folder])).axes[0]
        drawn = [each for each in axes.lines if "Muon's" in str(each.get_label())]
        assert len(drawn) == (optimizer == "muon")
        for each in drawn:
            expected = [3e-2 / (step + 1) for step in range(5)]
            assert each.get_ydata().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["gpt2", "bytes"])
def test_the_first_tokens_have_names(tmp_path, kind):
    """GPT-2's first 256 tokens are its bytes, those that can be printed first."""
    from matplotlib.figure import Figure

    tokenizer = get_tokenizer(kind)
    save_tokenizer(tokenizer, tmp_path, 32)
    axes = Figure().subplots()
    plot.label_tokens(axes, tmp_path, tokenizer.vocab_size)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    places = dict(zip(labels, axes.get_yticks()))
    for name, first in (("0 to 9", "0"), ("A to Z", "A"), ("a to z", "a")):
        [first_id] = tokenizer.encode(first).tolist()
        length = 10 if first == "0" else 26
        assert places[name] == first_id + (length - 1) / 2
    assert {"never seen", "control", "parts of characters"} <= set(labels)
    plot.label_tokens(Figure().subplots(), tmp_path / "nothing", 300)  # no labels


def test_pictures_are_transparent_and_the_same_input_gives_the_same_bytes(tmp_path, capsys):
    from matplotlib.image import imread

    run = write(tmp_path / "run", started(tokenizer="gpt2"), *falling(50), scored(49))
    paths = plot.draw_curves([run], run)
    assert [path.name for path in paths] == ["loss.svg", "loss.png", "training.svg", "training.png"]
    for svg, png in (paths[:2], paths[2:]):
        assert not re.search("<dc:date>|matplotlib.org|<text", svg.read_text())
        pixels = imread(png)
        assert pixels.shape[1] == 1600 and pixels[0, 0, 3] == 0 and pixels[..., 3].max() == 1
    plot.main([str(run), "--out", str(tmp_path / "new" / "folder")])
    written = [Path(name) for name in capsys.readouterr().out.splitlines()]
    assert written == [tmp_path / "new" / "folder" / path.name for path in paths]
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in paths]


def assert_legible(figure) -> None:
    """No text is too small, or outside the picture."""
    figure.draw_without_rendering()
    numbers = [
        text for axes in figure.axes for text in axes.get_xticklabels() + axes.get_yticklabels()
    ]
    texts = [
        text
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_text() and text not in numbers
    ]
    assert texts
    for text in texts:
        box, page = text.get_window_extent(), figure.bbox
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
        assert text.get_fontsize() >= 9 and inside, text.get_text()


@pytest.mark.parametrize(
    "name", ["a_name_of_19_letter", "a_name_that_is_so_long_that_it_needs_a_line_of_its_own"]
)
def test_text_is_legible_and_inside_the_picture(tmp_path, name):
    run = write(tmp_path / "run", started(tokenizer="gpt2"), *falling(50), scored(49))
    with matplotlib.rc_context(plot.STYLE):
        runs = [
            each._replace(name=f"{i}{name[1:]}") for i, each in enumerate(plot.read_runs([run] * 3))
        ]
        for figure in (plot.draw_losses(runs), plot.draw_training(runs)):
            assert_legible(figure)


def test_weights_are_those_of_the_newest_checkpoint(tmp_path, monkeypatch, capsys):
    """Untrained positions are noise, smooth ones a band along the diagonal; padding rows are not
    drawn.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=100, block_size=48, n_layer=1, n_head=2, n_embd=64))
    positions = model.transformer.wpe.weight
    figures = []
    monkeypatch.setattr(
        plot, "save", lambda figure, path: assert_legible(figure) or figures.append(figure) or path
    )
    for step in (1, 2):
        model.save_pretrained(tmp_path / f"step_{step:07}")
        positions.data = torch.sin(
            torch.outer(torch.arange(48) / 48, torch.arange(64) / 8) + torch.arange(64)
        )
    for name in ("step_0000001", ""):
        plot.main(["--weights", str(tmp_path / name)])
    assert capsys.readouterr().out.splitlines() == 2 * [
        str(tmp_path / "weights.png")
    ]  # beside a checkpoint
    images = [np.asarray(figure.axes[1].images[0].get_array()) for figure in figures]
    assert abs(np.diagonal(images[0], 1).mean()) < 0.1 and np.diagonal(images[1], 1).mean() > 0.98
    wanted = torch.nn.functional.cosine_similarity(positions[3], positions[40], dim=0).item()
    assert images[1].shape == (48, 48) and images[1][3, 40] == pytest.approx(wanted, abs=0.05001)
    assert np.asarray(figures[1].axes[2].images[0].get_array()).shape == (100, 100)
    for drawn, channel in zip(figures[1].axes[0].lines, (12, 16, 20), strict=True):
        assert drawn.get_label() == f"channel {channel}"
        np.testing.assert_array_equal(drawn.get_ydata(), positions[:, channel].detach())
    assert (
        plot.HOW_TO_READ in figures[1].get_suptitle()
        and "step_0000002" in figures[1].get_suptitle()
    )


# ---- The command ---------------------------------------------------------------------------------


def test_pictures_of_several_runs_go_beside_them_and_reports_into_them(
    tmp_path, capsys, monkeypatch
):
    """Runs of the same name are told apart by their folders."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure) or path)
    monkeypatch.chdir(tmp_path)
    runs = [str(write(Path(folder) / "run", started(), trained(0))) for folder in ("a", "b")]
    plot.main(["--report", *runs])
    pictures = [f"a/{name}" for name in ("loss.svg", "loss.png", "training.svg", "training.png")]
    assert capsys.readouterr().out.splitlines() == [
        *pictures,
        *(f"report: {run}/report.md" for run in runs),
    ]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [f"{run}: training (smoothed)" for run in runs]


def test_a_report_is_written_even_if_nothing_can_be_drawn(tmp_path, capsys):
    run = write(tmp_path / "run", started(), validated(0, 3.5))
    plot.write_report(run)
    assert "* step 0: 3.5000" in (run / "report.md").read_text()
    assert "is not whole (ValueError: " in capsys.readouterr().out


MISTAKES = {
    "out/nothing": "out/nothing: no training loss in a metrics.jsonl here; name a run",
    "out/good out/begun --out x": "out/begun: no training loss",
    "": "say what to draw: python plot.py",
    "--weights out/nope": "out/nope: no such model",
    "out/good --out file": ".*'file'",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out" / "begun", started(), validated(0), trained(0, None))
    write(tmp_path / "out" / "good", started(), trained(0))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        plot.main(arguments.split())
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and len(err.splitlines()) == 1
    assert re.match(f"plot.py: {MISTAKES[arguments]}", err), err
    assert not list(tmp_path.glob("**/*.png"))
