"""Pictures of runs, and of what a model has learned about positions and tokens.

python plot.py out/quickstart                         its curves, from metrics.jsonl, also while the run is going
python plot.py out/gpt2_124M out/mine --out pictures  several runs in the same pictures
python plot.py --report out/quickstart                its curves and report.md
python plot.py --weights out/quickstart               the embeddings of its newest checkpoint; also: gpt2
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model import GPT
from parts.console import command
from parts.metrics import (
    GPT2_LOSS,
    GPT3_HELLASWAG,
    LLMC_LOSSES,
    PUBLISHED,
    of_kind,
    read_metrics,
    tokens_seen,
    updates,
)
from parts.pretrained import resolve
from parts.report import report

HOW_TO_READ = "Trained: smooth curves, a band along the diagonal, groups of tokens. Untrained: noise, a bare diagonal."

# Four colours of the Okabe-Ito palette, which is safe for colour-blind readers. Their contrast with
# white and with GitHub's dark page is at least 3; the grey, for text, has 4.3 with both.
COLOURS, GREY = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), "#737b86"
LOOKS = [
    dict(color=colour, ls=style, lw=1.4) for style in ("-", "--", ":") for colour in COLOURS
]  # of twelve runs
STYLE = {
    **{
        f"{what}color": GREY
        for what in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.", "grid.")
    },
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(
        ("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False
    ),
    **dict.fromkeys(("axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.2,
    "svg.hashsalt": "plot.py",  # the same element ids each time
}


class Run(NamedTuple):
    name: str
    look: dict  # of its lines
    records: list[dict]
    fineweb: (
        bool  # its loss can be compared with published ones: GPT-2's tokens, and FineWeb's text
    )
    bits: float | None = None  # draw losses in bits a byte: how many a nat a token is

    def curve(self, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen (n) and values (n), without nulls."""
        records = of_kind(self.records, kind, key)
        tokens = tokens_seen(self.records, np.array([updates(record) for record in records]))
        values = np.array([record[key] for record in records], dtype=float)
        return tokens, values * self.bits if self.bits and key == "loss" else values


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders; ValueError if one has nothing to draw."""
    runs = []
    for folder, look in zip(folders, itertools.cycle(LOOKS)):
        records = read_metrics(folder / "metrics.jsonl")
        if not (of_kind(records, "run") and of_kind(records, "train", "loss")):
            raise ValueError(
                f"{folder}: no training loss in a metrics.jsonl here; name a run, as in out/quickstart"
            )
        started = of_kind(records, "run")[-1]
        text = f"{started['settings']['data_dir']} {started['data']}".lower()
        name = str(folder) if len(folders) > 1 else folder.resolve().name
        runs.append(Run(name, look, records, started["tokenizer"] == "gpt2" and "fineweb" in text))
    # Runs with different vocabularies can be compared in bits a byte only.
    known = [of_kind(run.records, "val", "loss", "val_bpb") for run in runs]
    if len({of_kind(run.records, "run")[-1]["tokenizer"] for run in runs}) > 1 and all(known):
        bits = [val[-1]["val_bpb"] / val[-1]["loss"] for val in known]
        return [run._replace(bits=each, fineweb=False) for run, each in zip(runs, bits)]
    return runs


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours (n): 1 % of all, at least 5, on both sides."""
    n, index = len(values), np.arange(len(values))
    reach = np.minimum(
        max(5, n // 100), index // 4
    )  # at the beginning, a wide mean of a falling loss is too high
    first, end, sums = index - reach, np.minimum(index + reach + 1, n), np.cumsum([0, *values])
    return (sums[end] - sums[first]) / (end - first)


def loss_figure(runs: list[Run]):
    """Training and validation loss against tokens, and HellaSwag below if a run has it."""
    from matplotlib.figure import Figure

    scored = any(of_kind(run.records, "hellaswag") for run in runs)
    figure = Figure(figsize=(8, 6.2 if scored else 4.2), layout="constrained")
    top, *below = figure.subplots(
        1 + scored, sharex=True, squeeze=False, height_ratios=[5, 3][: 1 + scored]
    )[:, 0]
    for run in runs:
        draw_noisy(top, run, "loss", f"{run.name}: training (smoothed)")
        tokens, losses = run.curve("val", "loss")
        if len(losses):
            # Circles without a line: a line from before the first step would cut across the fall of
            # the loss.
            circles = run.look | dict(ls="none", marker="o", ms=5, mfc="none")
            top.plot(
                tokens, losses, **circles, label=f"{run.name}: validation, last {losses[-1]:.3f}"
            )
    if any(run.fineweb for run in runs):
        draw_reference(top, GPT2_LOSS, "GPT-2 124M")
        top.plot(*LLMC_LOSSES, color=GREY, ls="--", lw=1, label="llm.c's GPT-2 124M: validation")
    top.set_ylabel("loss, bits per byte" if runs[0].bits else "loss, nats per token")
    tokens, losses = np.concatenate(
        [run.curve(kind, "loss") for run in runs for kind in ("train", "val")], axis=1
    )
    later = 1.02 * losses[tokens >= 0.05 * tokens.max()].max()
    if (
        len(losses) >= 50 and losses.max() > later
    ):  # the first losses of a long run would squash the rest
        top.set(
            ylim=(None, later), title=f"Initial losses, up to {losses.max():.1f}, are not shown."
        )
    for axes in below:
        for run in runs:
            axes.plot(*run.curve("hellaswag", "acc_norm"), **run.look, marker="o", ms=4, mfc="none")
        axes.set_ylabel("HellaSwag, acc_norm")
        styles = {
            score.get("style", "completion")
            for run in runs
            for score in of_kind(run.records, "hellaswag")
        }
        for style in sorted(styles):
            draw_reference(axes, PUBLISHED[style]["gpt2"][1], "GPT-2 124M")
        draw_reference(axes, GPT3_HELLASWAG, "GPT-3 124M")
    finish(figure, runs)
    return figure


def training_figure(runs: list[Run]):
    """Learning rate, gradient norm and tokens/s against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    panels = dict(lr="learning rate", grad_norm="gradient norm", tokens_per_s="tokens/s")
    figure = Figure(figsize=(8, 1.6 * len(panels)), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(len(panels), sharex=True), panels.items()):
        for run in runs:
            draw_noisy(axes, run, key, run.name if key == "lr" else None)
        axes.set_ylabel(label)
        if key == "grad_norm":
            axes.set_yscale("log")
            axes.yaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter()
            )
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(in_words)
    finish(figure, runs)
    return figure


def draw_noisy(axes, run: Run, key: str, label: str | None) -> None:
    """A quantity of training as pale dots, with its running mean (of the learning rate: itself) in
    front.
    """
    tokens, values = run.curve("train", key)
    # Pixels also in an .svg: ten thousand shapes would take megabytes.
    dots = dict(
        color=run.look["color"],
        alpha=min(0.6, 12 / math.sqrt(len(values) + 1)),
        zorder=1.5,
        rasterized=True,
    )
    axes.plot(tokens, values, "o", ms=2.2, mew=0, **dots)
    axes.plot(tokens, values if key == "lr" else smooth(values), **run.look, label=label)


def draw_reference(axes, value: float, name: str) -> None:
    """A dashed line with its name in the right margin, where no curve is."""
    axes.axhline(value, color=GREY, ls="--", lw=1)
    axes.annotate(
        f"{name}\n{value}",
        (1.01, value),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
    )


def finish(figure, runs: list[Run]) -> None:
    """Label the axis of tokens, and put a legend above, in two columns if the names are short."""
    last = max(run.curve("train", "loss")[0][-1] for run in runs)
    figure.axes[-1].set(xlabel="tokens seen", xlim=(0, 1.01 * last))
    figure.axes[-1].xaxis.set_major_formatter(in_words)
    figure.legend(
        loc="outside upper left", ncols=2 if max(len(run.name) for run in runs) < 20 else 1
    )


def in_words(number: float, _=None) -> str:
    """2,500,000,000 -> 2.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def draw_curves(folders: list[Path], out: Path) -> list[Path]:
    """Draw the runs in these folders into out/loss and out/training, .svg and .png each; return the
    files.
    """
    import matplotlib

    runs = read_runs(folders)
    with matplotlib.rc_context(STYLE):
        figures = dict(loss=loss_figure(runs), training=training_figure(runs))
        return [
            save(figure, out / f"{name}.{kind}")
            for name, figure in figures.items()
            for kind in ("svg", "png")
        ]


def write_report(run: Path) -> None:
    """Draw a run's curves and write report.md beside them. What fails is said, and ends no run."""
    for write in (lambda: draw_curves([run], run), lambda: print(f"report: {report(run)}")):
        try:
            write()
        except Exception as error:
            print(f"NOTE: the report of {run} is not whole ({type(error).__name__}: {error})")


def draw_weights(name: str, out: Path | None) -> list[Path]:
    """Draw the embeddings of a model, named as for sample.py, into weights.png in `out` or beside
    the model.
    """
    import matplotlib
    from matplotlib.figure import Figure

    source = Path(resolve(name))
    weights = GPT.from_pretrained(source).weights()  # without padding rows
    positions, tokens = (weights[f"transformer.{kind}.weight"].numpy() for kind in ("wpe", "wte"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 7.6), layout="constrained")
        top, left, right = figure.subplot_mosaic("aa;bc", height_ratios=[3, 5]).values()
        # The lecture draws channels 150, 200 and 250 of GPT-2's 768; other widths have them at the
        # same fraction.
        for channel, colour in zip(
            (positions.shape[1] * n // 768 for n in (150, 200, 250)), COLOURS
        ):
            top.plot(positions[:, channel], color=colour, lw=1, label=f"channel {channel}")
        top.set(
            title="Position embeddings", xlabel="position", xlim=(0, max(1, len(positions) - 1))
        )
        top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
        for axes, rows, title in (
            (left, positions, "Positions"),
            (right, tokens[:256], "The first 256 tokens"),
        ):
            unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            # Rounded, for a small file.
            shown = axes.imshow(
                (unit @ unit.T).round(1), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
            )
            axes.set_title(title)
            axes.grid(False)
        figure.colorbar(
            shown,
            ax=[left, right],
            location="bottom",
            label="cosine similarity",
            shrink=0.6,
            aspect=50,
        )
        figure.suptitle(
            f"{'/'.join(source.parts[-2:])}\n{HOW_TO_READ}", fontsize=9, x=0.01, ha="left"
        )
        return [
            save(figure, (out or (source.parent if source.exists() else Path())) / "weights.png")
        ]


def save(figure, path: Path) -> Path:
    """Write a picture without the date: the same input gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        path, dpi=200, metadata=dict(Date=None, Creator=None) if path.suffix == ".svg" else None
    )
    return path


@command("plot.py")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="plot.py", description="Draw runs, or the embeddings of a model."
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="out/RUN",
        help="folders of runs: draw loss and training",
    )
    parser.add_argument(
        "--weights",
        metavar="MODEL",
        help="instead: gpt2 ... gpt2-xl, a hub id, a run or a checkpoint",
    )
    parser.add_argument(
        "--report", action="store_true", help="also write report.md into the folder of each run"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for pictures (default: beside what is drawn)"
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.runs) == bool(arguments.weights) or (arguments.weights and arguments.report):
        raise ValueError(
            "say what to draw: python plot.py [--report] out/RUN ..., or plot.py --weights MODEL"
        )
    if arguments.weights:
        written = draw_weights(arguments.weights, arguments.out)
    else:
        first = arguments.runs[0]
        written = draw_curves(
            arguments.runs, arguments.out or (first.parent if arguments.runs[1:] else first)
        )
    print(*written, sep="\n")
    for run in arguments.runs if arguments.report else ():
        write_report(run)


if __name__ == "__main__":
    main()
