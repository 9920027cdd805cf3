"""Pictures: what is drawn, where, and in which figure; damaged and growing metrics; mistakes."""

import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plot
from model import GPT, GPTConfig

pytest.importorskip("matplotlib")


def begun(step: int = 0, batch: int = 1000, hellaswag_every: int = 0, data_dir="shards/fineweb", **facts) -> dict:
    settings = dict(total_batch_size=batch, hellaswag_every=hellaswag_every, data_dir=data_dir)
    return dict(step=step, kind="run", settings=settings) | facts


def trained(step: int, loss: float | None = 2.0, **values) -> dict:
    usual = dict(loss=loss, lr=1e-3, grad_norm=1.0, tokens_per_s=5e4, mfu=None)
    return dict(step=step, kind="train") | usual | values


def validated(step: int, loss: float | None = 2.0) -> dict:
    return dict(step=step, kind="val", loss=loss)


def scored(step: int, acc_norm: float = 0.28) -> dict:
    return dict(step=step, kind="hellaswag", acc=0.27, acc_norm=acc_norm, n=10042)


def write(folder: Path, *records: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def read(*folders: Path) -> list[plot.Run]:
    return [plot.read_run(folder, name) for folder, name in zip(folders, plot.names_of(list(folders)))]


def losses(*folders: Path):
    """The axes of the losses."""
    return plot.loss_figure(read(*folders)).axes[0]


def line(axes, start: str) -> np.ndarray:
    """The one line whose label begins so: (n, 2)."""
    [found] = [line for line in axes.lines if str(line.get_label()).startswith(start)]
    return found.get_xydata()


def dots(axes, run: int = 0) -> np.ndarray:
    """The raw values of a run: (n, 2)."""
    return [line for line in axes.lines if line.get_linestyle() == "None"][run].get_xydata()


def levels(axes) -> set[float]:
    """At what heights there are horizontal lines through the whole picture."""
    return {line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]}


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


# ----------------------------------------------------------------------------------------------------------------------
# From records to curves


def test_losses_stand_at_the_tokens_seen_by_then(tmp_path):
    """Step 5's training record comes after its update, the sixth; its validation loss before."""
    run = write(tmp_path / "run", begun(), validated(0, 2.5), trained(0, 2.4), trained(5, 2.2), validated(5, 2.3))
    axes = losses(run)
    assert dots(axes).tolist() == [[1000, 2.4], [6000, 2.2]]
    assert line(axes, "run: training").tolist() == [[1000, 2.4], [6000, 2.2]]
    drawn = line(axes, "run: validation, last 2.300")
    assert drawn[[0, 2]].tolist() == [[0, 2.5], [5000, 2.3]] and np.isnan(drawn[1]).all()


@pytest.mark.parametrize(
    ("second", "expected"), [(3000, [1000, 10_000, 13_000, 40_000]), (1000, [1e3, 1e4, 11e3, 2e4])]
)
def test_a_resumed_run_counts_each_step_with_its_batch(tmp_path, second, expected):
    steps = [trained(step) for step in (0, 9, 10, 19)]
    run = write(tmp_path / "run", begun(), *steps[:2], validated(10), begun(10, second), *steps[2:], validated(20))
    axes = losses(run)
    assert dots(axes)[:, 0].tolist() == expected
    assert line(axes, "run: validation")[:, 0].tolist() == [10_000, expected[-1]]


def test_a_run_from_anothers_checkpoint_begins_where_that_was(tmp_path):
    run = write(tmp_path / "run", begun(100), trained(100), validated(101))
    assert dots(losses(run))[:, 0].tolist() == line(losses(run), "run: validation")[:, 0].tolist() == [101_000]


def test_of_two_starts_at_one_step_the_later_holds(tmp_path):
    run = write(tmp_path / "run", begun(), trained(0), begun(1, 2000), begun(1, 5000), trained(1))
    assert dots(losses(run))[:, 0].tolist() == [1000, 6000]


def test_damaged_metrics_lose_what_is_damaged_only(tmp_path):
    run = tmp_path / "run"
    write(run, begun(), trained(3, 2.3), trained(0, 2.0), trained(1, None), trained(2, 2.2), begun(3), trained(3, 2.4))
    damaged = (
        '{"step": 4, "kind": "train", "lr": 0.1}',  # no loss
        '{"step": 5, "kind": "train", "loss": "2.0"}',
        '{"step": 6, "kind": "train", "loss": [2.0]}',
        '{"step": "7", "kind": "train", "loss": 2.0}',
        '{"step": -1, "kind": "train", "loss": 2.0}',
        '{"step": 8, "kind": "train", "loss": Infinity}',
        '{"step": 9, "kind": "run", "settings": null}',
        '{"step": 9, "kind": "run", "settings": {"total_batch_size": "many"}}',
        '{"step": 9, "kind": ["val"], "loss": 2.0}',
        '[1, "two"]',
        '{"step": 10, "kind": "train", "lo',
    )
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\x00\xff\xfe{garbage\n" + "\n".join(damaged).encode())
    axes = losses(run)
    expected = [[1000, 2.0], [2000, math.nan], [3000, 2.2], [4000, 2.4]]
    np.testing.assert_array_equal(dots(axes), expected)
    np.testing.assert_array_equal(line(axes, "run: training")[:, 0], [1000, 2000, 3000, 4000])
    assert np.isnan(line(axes, "run: training")[:, 1]).tolist() == [False, True, False, False]
    assert len(plot.draw_curves([run], tmp_path)) == 4


def test_the_last_validation_loss_is_the_last_that_is_a_number(tmp_path):
    run = write(tmp_path / "run", begun(), trained(0), validated(0, 2.5), validated(1, 2.4), validated(2, None))
    assert line(losses(run), "run: validation, last 2.400").shape == (4, 2)
    never = write(tmp_path / "never", begun(), trained(0), validated(0, None))
    assert not [drawn for drawn in losses(never).lines if "validation" in str(drawn.get_label())]


def test_a_run_that_is_going_is_drawn_as_far_as_it_is(tmp_path):
    run = write(tmp_path / "run", begun(), *(trained(step) for step in range(3)))
    before = [path.read_bytes() for path in plot.draw_curves([run], tmp_path / "before")]
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(trained(3))[:-10])
    assert [path.read_bytes() for path in plot.draw_curves([run], tmp_path / "after")] == before
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(trained(3))[-10:])
    assert len(dots(losses(run))) == 4


# ----------------------------------------------------------------------------------------------------------------------
# The running mean


def naive_smooth(values: list[float]) -> list[float]:
    reach = max(5, len(values) // 100)
    means = []
    for i, value in enumerate(values):
        near = min(reach, i // 4)
        kept = [v for v in values[i - near : i + near + 1] if not math.isnan(v)]
        means.append(math.nan if math.isnan(value) else math.fsum(kept) / len(kept))
    return means


GAPPED = st.lists(st.one_of(st.floats(0, 20), st.floats(0, 20), st.floats(0, 20), st.just(math.nan)), max_size=80)


@given(GAPPED)
def test_smoothing_is_the_mean_of_the_neighbours(values):
    line = plot.smooth(np.array(values, dtype=float))
    np.testing.assert_allclose(line, naive_smooth(values), rtol=1e-12)


def test_a_long_run_is_smoothed_over_one_percent_to_either_side(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.uniform(2, 3, 2000)
    run = write(tmp_path / "run", begun(), *(trained(step, value) for step, value in enumerate(values)))
    axes = losses(run)
    drawn = line(axes, "run: training (smoothed)")
    np.testing.assert_allclose(drawn[:, 1], naive_smooth(values.tolist()))
    np.testing.assert_array_equal(dots(axes)[:, 1], values)  # nothing is left out of what was measured


# ----------------------------------------------------------------------------------------------------------------------
# What is in the picture


@pytest.mark.parametrize(
    ("facts", "comparable"),
    [
        (dict(tokenizer="gpt2"), True),
        (dict(tokenizer="bytes"), False),
        (dict(tokenizer="bytes", hellaswag_every=250), False),
        (dict(tokenizer=None, hellaswag_every=250), False),
        (dict(hellaswag_every=250), True),  # a run from before the tokenizer was recorded
        (dict(), False),
    ],
)
def test_what_others_report_is_shown_beside_gpt2s_tokens_only(tmp_path, facts, comparable):
    run = write(tmp_path / "run", begun(**facts), *(trained(step, 4.0) for step in range(9)), scored(9))
    figure = plot.loss_figure(read(run))
    axes, scores = figure.axes
    assert levels(axes) == ({3.292} if comparable else set())
    assert levels(scores) == ({0.2955, 0.337} if comparable else set())
    named = {"GPT-2 124M\n3.292", "GPT-2 124M\n0.2955", "GPT-3 124M\n0.337", "llm.c's GPT-2 124M: validation"}
    assert named & set(texts(figure)) == (named if comparable else set())
    if comparable:
        assert axes.get_ylim()[0] < 3.292
        published = line(axes, "llm.c's")
        assert published[[0, -1]].tolist() == [[250 * 524_288, 6.171], [19_560 * 524_288, 3.272]]
        assert axes.get_xlim() == (0, 1.01 * 9000)  # as far as the run is, not llm.c's


def test_among_several_runs_one_of_gpt2s_tokens_is_enough(tmp_path):
    runs = [write(tmp_path / name, begun(tokenizer=name), trained(0)) for name in ("bytes", "gpt2")]
    assert levels(losses(*runs)) == {3.292}
    assert not levels(losses(runs[0]))


@pytest.mark.parametrize(
    "facts",
    [dict(data_dir="shards/x", data=dict(source=dict(dataset="HuggingFaceFW/fineweb"))), dict(data_dir="books")],
)
def test_others_losses_are_shown_beside_their_text_only(tmp_path, facts):
    run = write(tmp_path / "run", begun(tokenizer="gpt2", **facts), trained(0), scored(0))
    losses_axes, scores = plot.loss_figure(read(run)).axes
    assert levels(losses_axes) == ({3.292} if "data" in facts else set())
    assert levels(scores) == {0.2955, 0.337}


def test_hellaswag_has_a_panel_where_a_run_was_scored(tmp_path):
    plain = write(tmp_path / "plain", begun(), trained(0))
    other = write(tmp_path / "other", begun(), trained(0), scored(250, 0.26), scored(500, 0.27))
    assert len(plot.loss_figure(read(plain)).axes) == 1
    _, scores = plot.loss_figure(read(plain, other)).axes
    assert scores.lines[1].get_xydata().tolist() == [[250_000, 0.26], [500_000, 0.27]]
    assert not len(scores.lines[0].get_xydata())


def falling(n: int, first: float = 10.9, last: float = 3.0) -> list[dict]:
    """Training that falls fast, then slowly, with a validation loss every tenth of it."""
    values = last + (first - last) / (1 + np.arange(n + 1)) ** 0.5
    every = [[validated(s, v)] if s % (n // 10) == 0 else [] for s, v in enumerate(values)]
    return [*itertools.chain(*every), *(trained(s, v) for s, v in enumerate(values[:n]))]


def test_the_first_losses_do_not_squash_the_others(tmp_path):
    axes = losses(write(tmp_path / "run", begun(), *falling(400)))
    low, high = axes.get_ylim()
    assert 2.9 < low < 3.4 and 4.5 < high < 5.2
    assert "initial losses up to 10.9 not shown" in axes.get_title("left") + axes.get_title()


def test_where_all_losses_are_in_the_picture_nothing_is_said_of_others(tmp_path):
    axes = losses(write(tmp_path / "run", begun(), *(trained(step, 3 - step / 100) for step in range(50))))
    assert axes.get_ylim()[0] < 2.51 and axes.get_ylim()[1] > 3
    assert "not shown" not in axes.get_title("left") + axes.get_title()


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    folders = [write(tmp_path / name, begun(), trained(0)) for name in ("a/gpt2", "b/gpt2", "a/wsd", "_$x$_")]
    assert plot.names_of(folders) == ["a/gpt2", "b/gpt2", "wsd", " _$x$_"]
    with plot.style():
        figure = plot.loss_figure(read(*folders))
        names = [text.get_text().partition(":")[0] for text in figure.legends[0].get_texts()]
    assert names == ["a/gpt2", "b/gpt2", "wsd", " _$x$_"]
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())  # $x$ is no formula


def test_a_run_named_twice_is_drawn_once(tmp_path, monkeypatch):
    run = write(tmp_path / "run", begun(), trained(0))
    drawn = []
    monkeypatch.setattr(plot, "loss_figure", lambda runs: drawn.append(runs) or plot.training_figure(runs))
    plot.draw_curves([run, run / ".." / "run"], tmp_path)
    assert [run.name for run in drawn[0]] == ["run"]


def test_training_has_a_panel_for_each_quantity(tmp_path):
    values = [dict(lr=1e-3 / (s + 1), grad_norm=9.0 / (s + 1), tokens_per_s=1e5 + s, mfu=None) for s in range(5)]
    run = write(tmp_path / "cpu", begun(), *(trained(step, **each) for step, each in enumerate(values)))
    rows = plot.training_figure(read(run)).axes
    assert [axes.get_ylabel() for axes in rows] == ["learning rate", "gradient norm", "tokens/s"]
    assert rows[0].lines[0].get_xydata().tolist() == [[1000 * (s + 1), 1e-3 / (s + 1)] for s in range(5)]
    for axes, key in zip(rows[1:], ("grad_norm", "tokens_per_s")):
        assert dots(axes)[:, 1].tolist() == [each[key] for each in values]
    assert [axes.get_yscale() for axes in rows] == ["linear"] * 3
    assert [axes.get_ylim()[0] for axes in rows] == [0, 0, 0]

    known = write(tmp_path / "gpu", begun(), trained(0, mfu=0.4, grad_norm=30.0), trained(1, mfu=0.5, grad_norm=0.3))
    rows = plot.training_figure(read(run, known)).axes
    assert rows[3].get_ylabel() == "MFU" and dots(rows[3], 1)[:, 1].tolist() == [0.4, 0.5]
    assert rows[3].yaxis.get_major_formatter()(0.4) == "40%"


def test_tokens_in_words():
    assert [plot.in_words(n) for n in (0, 0.0005, 500, 2_500_000, 10e9)] == ["0", "0.0005", "500", "2.5M", "10B"]


# ----------------------------------------------------------------------------------------------------------------------
# The picture itself


def luminance(colour: str) -> float:
    """WCAG 2's."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def test_colours_hold_on_white_and_on_githubs_dark_page():
    dark = luminance("#0d1117")
    for colour, least in (*((colour, 3) for colour in plot.COLOURS), (plot.GREY, 4.2)):
        assert 1.05 / (luminance(colour) + 0.05) > least
        assert (luminance(colour) + 0.05) / (dark + 0.05) > least


def test_twelve_runs_look_different():
    looks = [str(plot.look(i)) for i in range(12)]
    assert len(set(looks)) == 12


def test_pictures_are_transparent_and_the_same_each_time(tmp_path):
    from matplotlib.image import imread

    run = write(tmp_path / "run", begun(tokenizer="gpt2"), *falling(50), scored(50))
    first, second = (plot.draw_curves([run], tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["loss.svg", "loss.png", "training.svg", "training.png"]
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()
    for path in first:
        if path.suffix == ".svg":
            text = path.read_text()
            assert "<dc:date>" not in text and "matplotlib.org" not in text and "<text" not in text
        else:
            pixels = imread(path)
            assert pixels.shape[1] == 1600 and pixels[0, 0, 3] == 0 and pixels[..., 3].max() == 1


@pytest.mark.parametrize(
    "name", ["run", "a_name_of_19_letter", "a_name_that_is_so_long_that_it_needs_a_line_of_its_own"]
)
def test_text_is_legible_and_inside_the_picture(tmp_path, name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folders = [write(tmp_path / f"{i}{name[1:]}", begun(tokenizer="gpt2"), *falling(50), scored(50)) for i in range(3)]
    rng = np.random.default_rng(0)
    with plot.style():
        figures = [plot.loss_figure(read(*folders)), plot.training_figure(read(*folders))]
        figures += [plot.weights_figure(rng.normal(size=(64, 16)), rng.normal(size=(99, 16)), name)]
        for figure in figures:
            assert figure.get_figwidth() == 8
            FigureCanvasAgg(figure).draw()
            boxes = [child for axes in figure.axes for child in (*axes.texts, axes.title, axes._left_title)]
            boxes += [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)]
            boxes += [text for legend in figure.legends for text in legend.get_texts()]
            boxes += [figure._suptitle] if figure._suptitle else []
            boxes = [text for text in boxes if text.get_text()]
            assert boxes
            for text in boxes:
                assert text.get_fontsize() >= 9
                box, page = text.get_window_extent(), figure.bbox
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1, text.get_text()


# ----------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.fixture
def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=64))


def weights_drawn(model_folder: Path, out: Path, monkeypatch):
    """The figure that `--weights` saves."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure) or path)
    assert plot.draw_weights(str(model_folder), out) == [out / "weights.png"]
    return figures[0]


def test_untrained_weights_are_noise_and_smooth_ones_a_band(tiny, tmp_path, monkeypatch):
    positions = tiny.transformer.wpe.weight
    for name in ("noise", "smooth"):
        if name == "smooth":
            waves = torch.outer(torch.arange(48) / 48, torch.arange(64) / 8) + torch.arange(64)
            positions.data = torch.sin(waves)
        tiny.save_pretrained(tmp_path / name)
        figure = weights_drawn(tmp_path / name, tmp_path, monkeypatch)
        curves, alike, tokens = figure.axes[:3]
        image = np.asarray(alike.images[0].get_array())
        near = float(alike.get_title().split()[1] if alike.get_title() else alike.get_title("left").split()[1])
        assert image.shape == (48, 48) and np.allclose(np.diagonal(image), 1, atol=1e-5)
        assert near == pytest.approx(np.diagonal(image, 1).mean(), abs=0.03)  # which is in steps of 0.1
        assert near > 0.98 if name == "smooth" else abs(near) < 0.1
        wanted = torch.nn.functional.cosine_similarity(positions[3], positions[40], dim=0).item()
        assert image[3, 40] == pytest.approx(wanted, abs=0.05001)
        assert [drawn.get_label() for drawn in curves.lines] == ["channel 12", "channel 16", "channel 20"]
        for drawn, channel in zip(curves.lines, (12, 16, 20)):
            np.testing.assert_array_equal(drawn.get_ydata(), positions[:, channel].detach())
        assert np.asarray(tokens.images[0].get_array()).shape == (256, 256)
        assert plot.HOW_TO_READ in figure.get_suptitle() and name in figure.get_suptitle()


def test_gpt2s_channels_are_the_lectures_and_padding_is_no_token():
    rng = np.random.default_rng(0)
    figure = plot.weights_figure(rng.normal(size=(8, 768)), rng.normal(size=(100, 768)), "gpt2")
    assert [drawn.get_label() for drawn in figure.axes[0].lines] == ["channel 150", "channel 200", "channel 250"]
    assert np.asarray(figure.axes[2].images[0].get_array()).shape == (100, 100)


def test_only_real_tokens_are_drawn(tmp_path, monkeypatch):
    """A vocabulary of 100 has 28 rows more inside the model; they are no tokens."""
    GPT(GPTConfig(vocab_size=100, block_size=8, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path)
    figure = weights_drawn(tmp_path, tmp_path, monkeypatch)
    assert np.asarray(figure.axes[2].images[0].get_array()).shape == (100, 100)


def test_weights_from_the_command_line(tiny, tmp_path, capsys):
    """Of a run its newest checkpoint, into the run's folder; how to read the picture is said."""
    (tmp_path / "run" / "step_0000001").mkdir(parents=True)  # not a model: must not be read
    tiny.save_pretrained(tmp_path / "run" / "step_0000002")
    plot.main(["--weights", str(tmp_path / "run")])
    assert capsys.readouterr().out.splitlines() == [plot.HOW_TO_READ, str(tmp_path / "run" / "weights.png")]
    plot.main(["--weights", str(tmp_path / "run" / "step_0000002")])  # beside a checkpoint, not into it
    assert capsys.readouterr().out.splitlines()[1] == str(tmp_path / "run" / "weights.png")
    first = (tmp_path / "run" / "weights.png").read_bytes()
    plot.main(["--weights", str(tmp_path / "run" / "step_0000002"), "--out", str(tmp_path / "new" / "folder")])
    assert (tmp_path / "new" / "folder" / "weights.png").read_bytes() == first


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_pictures_go_to_the_runs_folder_or_out(tmp_path, capsys):
    runs = [write(tmp_path / name, begun(), trained(0)) for name in ("one", "two")]
    plot.main([str(runs[0])])
    names = ("loss.svg", "loss.png", "training.svg", "training.png")
    assert capsys.readouterr().out.splitlines() == [str(runs[0] / name) for name in names]
    plot.main([*map(str, runs)])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    plot.main([*map(str, runs), "--out", str(tmp_path / "new" / "folder")])
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    assert [path.name for path in runs[1].iterdir()] == ["metrics.jsonl"]


def test_a_report_stands_beside_the_pictures(tmp_path, capsys):
    runs = [write(tmp_path / name, begun(), trained(0, ms=1.0)) for name in ("one", "two")]
    plot.main(["--report", *map(str, runs), "--out", str(tmp_path / "both")])
    assert capsys.readouterr().out.splitlines()[-2:] == [str(run / "report.md") for run in runs]
    assert "![loss](loss.svg)" in (runs[1] / "report.md").read_text()


def test_a_report_is_written_where_nothing_can_be_drawn(tmp_path):
    told = []
    run = write(tmp_path / "run", begun(), validated(0, 3.5))
    assert "| 0 | 3.5000 |" in plot.write_report(run, told.append).read_text()
    assert len(told) == 1 and "no training step was logged" in told[0]


MISTAKES = {
    "nothing": (
        ["out/nothing"],
        "out/nothing: no metrics.jsonl here; .* --out_dir=out/nothing writes one; there is one in out/b",
    ),
    "runs above": (["out"], "out: no metrics.jsonl here; .* is one in out/begun, out/empty, out/good, out/h"),
    "no step yet": (["out/begun"], r"out/begun: no training step was logged"),
    "empty": (["out/good", "out/empty", "--out", "x"], "out/empty: no training step was logged"),
    "only nulls": (["out/nulls"], "out/nulls: no training step was logged"),
    "no first line": (["out/headless"], "out/headless/metrics.jsonl: no record of kind run"),
    "nothing named": ([], "nothing to draw.*python plot.py out/RUN"),
    "both": (["out/good", "--weights", "gpt2"], "nothing to draw"),
    "a report of weights": (["--weights", "gpt2", "--report"], "nothing to draw"),
    "no such model": (["--weights", "out/nope"], "out/nope: no such model"),
    "no model": (["--weights", "out/begun"], "out/begun: no config.json in this folder"),
    "a file": (["out/good", "--out", "file"], "file/loss.svg cannot be written .*--out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out" / "begun", begun(), validated(0))
    write(tmp_path / "out" / "empty")
    write(tmp_path / "out" / "good", begun(), trained(0))
    write(tmp_path / "out" / "headless", trained(0))
    write(tmp_path / "out" / "nulls", begun(), trained(0, None))
    (tmp_path / "file").write_text("")
    arguments, message = MISTAKES[name]
    with pytest.raises(SystemExit) as ended:
        plot.main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert re.match(f"plot.py: {message}", err), err
    assert not list(tmp_path.glob("**/*.png"))


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write(tmp_path / "run", begun(), trained(0))
    with pytest.raises(SystemExit) as ended:
        plot.main([str(run)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("plot.py: pictures need matplotlib")
