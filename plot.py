"""Pictures of runs, and of what a model has learned about positions and tokens.

    python plot.py out/quickstart                        its curves, from metrics.jsonl, also while the run is going
    python plot.py out/gpt2_124M out/wsd --out pictures  several runs in the same pictures
    python plot.py --report out/quickstart               its curves and report.md
    python plot.py --weights out/quickstart              the embeddings of its newest checkpoint; also: gpt2

Pictures are readable on white and on GitHub's dark page. Curves are written as .svg and .png, embeddings as .png.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

import configurator
import report

# Published results. Only losses over the same tokenizer and the same kind of text can be compared.
GPT2_LOSS = 3.292  # OpenAI's 124M on the FineWeb-Edu validation set, from build-nanogpt
GPT3_HELLASWAG = 0.337  # acc_norm of GPT-3 124M, from the GPT-3 paper
# Validation loss of llm.c's GPT-2 124M on FineWeb: tokens seen (524,288 a step) and losses
LLMC_STEPS = np.array([250, 500, 1000, 2000, 4000, 8000, 12000, 16000, 19560])
LLMC_LOSSES = LLMC_STEPS * 524_288, (6.171, 5.374, 4.317, 3.859, 3.618, 3.443, 3.351, 3.288, 3.272)
HOW_TO_READ = "Trained: smooth curves, a band along the diagonal, groups of tokens. Untrained: noise, a bare diagonal."

# Four colours of the Okabe-Ito palette, which is safe for colour-blind readers. Their contrast with white and with
# GitHub's dark page is at least 3; the grey, for text, has 4.3 with both.
COLOURS, LINE_STYLES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), ("-", "--", ":")
GREY = "#737b86"
STYLE = {
    **{f"{what}color": GREY for what in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.", "grid.")},
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.2,
    "svg.fonttype": "path",  # text as outlines: it looks the same with any fonts
    "svg.hashsalt": "plot.py",  # the same element ids each time
}


class Run(NamedTuple):
    name: str
    records: list[dict]
    gpt2_tokens: bool  # its HellaSwag score can be compared with published ones
    fineweb: bool  # its loss, too

    def curve(self, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen (n) and values (n), by rising step; NaN for null. The last record of a step counts."""
        values = {r["step"]: r[key] for r in self.records if r["kind"] == kind and key in r}
        steps = np.array(sorted(values), dtype=float)
        # A train record is written after the update of its step, the other records before it.
        tokens = report.tokens_seen(self.records, steps + (kind == "train"))
        return tokens, np.array([values[step] for step in steps], dtype=float)


def read_run(folder: Path, name: str) -> Run:
    """The run in this folder; ValueError if there is nothing to draw."""
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: no metrics.jsonl here; name the folder of a run, as in plot.py out/quickstart")
    records = report.read_metrics(folder / "metrics.jsonl")
    started = report.last_run(records)
    if not started:
        raise ValueError(f"{folder}/metrics.jsonl: no record of kind run, which has the batch size; is line 1 lost?")
    if not report.of_kind(records, "train", "loss"):
        raise ValueError(f"{folder}: no training loss was logged yet (--log_every of train.py sets how often it is)")
    gpt2_tokens = started.get("tokenizer") == "gpt2"
    text = f"{started['settings'].get('data_dir')} {started.get('data')}".lower()
    return Run(name, records, gpt2_tokens, gpt2_tokens and "fineweb" in text)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours without NaN (n): 1 %, at least 5, on both sides. NaN stays NaN.

    There are fewer neighbours at the beginning, where a wide mean of a falling loss would be too high.
    """
    n, finite, index = len(values), np.isfinite(values), np.arange(len(values))
    reach = np.minimum(max(5, n // 100), index // 4)
    first, end = index - reach, np.minimum(index + reach + 1, n)
    sums, counts = np.cumsum([0, *np.where(finite, values, 0)]), np.cumsum([0, *finite])
    return np.where(finite, (sums[end] - sums[first]) / np.maximum(counts[end] - counts[first], 1), math.nan)


def loss_figure(runs: list[Run]):
    """Training and validation loss against tokens, and HellaSwag below if a run has it."""
    from matplotlib.figure import Figure

    scored = any(report.of_kind(run.records, "hellaswag", "acc_norm") for run in runs)
    figure = Figure(figsize=(8, 6.2 if scored else 4.2), layout="constrained")
    rows = figure.subplots(1 + scored, sharex=True, squeeze=False, height_ratios=[5, 3][: 1 + scored])[:, 0]
    draw_losses(rows[0], runs)
    for axes in rows[1:]:
        for i, run in enumerate(runs):
            axes.plot(*run.curve("hellaswag", "acc_norm"), **look(i), marker="o", ms=4, mfc="none")
        axes.set_ylabel("HellaSwag, acc_norm")
        if any(run.gpt2_tokens for run in runs):
            draw_reference(axes, report.GPT2_HELLASWAG, "GPT-2 124M")
            draw_reference(axes, GPT3_HELLASWAG, "GPT-3 124M")
    finish(figure, runs)
    return figure


def draw_losses(axes, runs: list[Run]) -> None:
    tokens, losses = np.concatenate([run.curve(kind, "loss") for run in runs for kind in ("train", "val")], axis=1)
    tokens, losses = tokens[np.isfinite(losses)], losses[np.isfinite(losses)]
    # The first 5 % of a long run would squash the rest.
    later = losses[tokens >= 0.05 * tokens.max()] if len(losses) >= 50 else losses
    low, high = losses.min(), later.max()
    for i, run in enumerate(runs):
        draw_noisy(axes, *run.curve("train", "loss"), i, f"{run.name}: training (smoothed)")
    if any(run.fineweb for run in runs):
        low = min(low, GPT2_LOSS)
        draw_reference(axes, GPT2_LOSS, "GPT-2 124M")
        axes.plot(*LLMC_LOSSES, color=GREY, ls="--", lw=1, label="llm.c's GPT-2 124M: validation")
    for i, run in enumerate(runs):
        if val := report.of_kind(run.records, "val", "loss"):
            # Circles without a line: a line from before the first step would cut across the fall of the loss.
            circles = look(i) | dict(ls="none", marker="o", ms=5, mfc="none")
            axes.plot(*run.curve("val", "loss"), **circles, label=f"{run.name}: validation, last {val[-1]['loss']:.3f}")
    margin = 0.04 * (high - low) or 0.1
    axes.set(ylabel="loss, nats per token", ylim=(low - margin, high + margin))
    if losses.max() > high + margin:
        axes.set_title(f"Initial losses, up to {losses.max():.1f}, are not shown.")


def training_figure(runs: list[Run]):
    """Learning rate, gradient norm, tokens/s and, if the device's peak is known, MFU against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    panels = dict(lr="learning rate", grad_norm="gradient norm", tokens_per_s="tokens/s", mfu="MFU")
    if not any(report.of_kind(run.records, "train", "mfu") for run in runs):
        del panels["mfu"]
    figure = Figure(figsize=(8, 1.6 * len(panels)), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(len(panels), sharex=True), panels.items()):
        for i, run in enumerate(runs):
            if key == "lr":
                axes.plot(*run.curve("train", "lr"), **look(i), label=run.name)
            else:
                draw_noisy(axes, *run.curve("train", key), i)
        axes.set_ylabel(label)
        if key == "grad_norm":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0) if key == "mfu" else in_words)
    figure.align_ylabels()
    finish(figure, runs)
    return figure


def look(i: int) -> dict:
    """How the lines of run i look: twelve runs differ in colour or style."""
    return dict(color=COLOURS[i % 4], ls=LINE_STYLES[i // 4 % 3], lw=1.4)


def draw_noisy(axes, tokens: np.ndarray, values: np.ndarray, i: int, label: str | None = None) -> None:
    """The values of run i as pale dots, with their running mean in front."""
    dots = dict(color=look(i)["color"], alpha=min(0.6, 12 / math.sqrt(len(values) + 1)), zorder=1.5)
    # Pixels also in an .svg: ten thousand shapes would take megabytes.
    axes.plot(tokens, values, "o", ms=2.2, mew=0, rasterized=True, **dots)
    axes.plot(tokens, smooth(values), **look(i), label=label)


def draw_reference(axes, value: float, name: str) -> None:
    """A dashed line with its name in the right margin, where no curve is."""
    axes.axhline(value, color=GREY, ls="--", lw=1)
    axes.annotate(f"{name}\n{value}", (1.01, value), xycoords=("axes fraction", "data"), va="center", fontsize=9)


def finish(figure, runs: list[Run]) -> None:
    """Label the axis of tokens, and put a legend above, in two columns if the names are short."""
    last = max(run.curve("train", "loss")[0][-1] for run in runs)
    figure.axes[-1].set(xlabel="tokens seen", xlim=(0, 1.01 * last))
    figure.axes[-1].xaxis.set_major_formatter(in_words)
    columns = 2 if max(len(run.name) for run in runs) < 20 else 1
    legend = figure.legend(loc="outside upper left", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(legend.get_texts()) / columns))


def in_words(number: float, _=None) -> str:
    """2,500,000,000 -> 2.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def draw_curves(folders: list[Path], out: Path) -> list[Path]:
    """Draw the runs in these folders into out/loss and out/training, .svg and .png each; return the files."""
    folders = list({folder.resolve(): folder for folder in folders}.values())  # a run that is named twice is one run
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    with style():
        runs = [read_run(folder, name) for folder, name in zip(folders, names)]
        figures = dict(loss=loss_figure(runs), training=training_figure(runs))
        return [save(figure, out / f"{name}.{kind}") for name, figure in figures.items() for kind in ("svg", "png")]


def write_report(run: Path, say=print) -> Path:
    """Draw a run's curves, if there are any, and write report.md beside them; return its path."""
    try:
        draw_curves([run], run)
    except (ValueError, ImportError) as error:
        say(f"NOTE: no curves are drawn: {error}")
    return report.write(run)


def weights_figure(positions: np.ndarray, tokens: np.ndarray, name: str):
    """Embeddings of positions (T, C) and tokens (V, C): three channels, and cosine similarities between rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.6), layout="constrained")
    top, left, right = figure.subplot_mosaic("aa;bc", height_ratios=[3, 5]).values()
    # The lecture draws channels 150, 200 and 250 of GPT-2's 768; other widths have them at the same fraction.
    channels = sorted({positions.shape[1] * channel // 768 for channel in (150, 200, 250)})
    for channel, colour in zip(channels, COLOURS):
        top.plot(positions[:, channel], color=colour, lw=1, label=f"channel {channel}")
    top.set(title="Position embeddings", xlabel="position", xlim=(0, max(1, len(positions) - 1)))
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)

    for axes, rows, title in ((left, positions, "Positions"), (right, tokens[:256], "The first 256 tokens")):
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        # Rounding to 0.1 halves the size of the file.
        shown = axes.imshow((unit @ unit.T).round(1), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.grid(False)
    figure.colorbar(shown, ax=[left, right], location="bottom", label="cosine similarity", shrink=0.6, aspect=50)
    figure.suptitle(f"{name}\n{HOW_TO_READ}", fontsize=9, x=0.01, ha="left")
    return figure


def draw_weights(name: str, out: Path) -> list[Path]:
    """Draw the embeddings of a model, named as for sample.py, into out/weights.png; return that file."""
    from model import GPT
    from pretrained import resolve

    with style():
        source = resolve(name)
        model = GPT.from_pretrained(source)
        embeddings = model.transformer.requires_grad_(False)
        tokens = embeddings.wte.weight[: model.config.vocab_size]  # without padding rows
        figure = weights_figure(embeddings.wpe.weight.numpy(), tokens.numpy(), "/".join(Path(source).parts[-2:]))
        return [save(figure, out / "weights.png")]


def style():
    """A context in which figures have our style, whatever matplotlibrc says."""
    import matplotlib

    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def save(figure, path: Path) -> Path:
    """Write a picture without date and version: the same input gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = dict(Date=None, Creator=None) if path.suffix == ".svg" else dict(Software=None)
    figure.savefig(path, dpi=200, metadata=metadata)
    return path


@configurator.command("plot.py")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description="Draw runs, or the embeddings of a model.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="out/RUN", help="folders of runs: draw loss and training")
    parser.add_argument("--weights", metavar="MODEL", help="instead: gpt2 ... gpt2-xl, a hub id, a run or a checkpoint")
    parser.add_argument("--report", action="store_true", help="also write report.md into the folder of each run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for pictures (default: beside what is drawn)")
    arguments = parser.parse_args(argv)
    if bool(arguments.runs) == bool(arguments.weights) or (arguments.weights and arguments.report):
        raise ValueError("say what to draw: python plot.py [--report] out/RUN ..., or plot.py --weights MODEL")
    if arguments.weights:
        folder = Path(arguments.weights)
        folder = folder.parent if folder.name.startswith("step_") else folder  # a checkpoint stays as it is
        written = draw_weights(arguments.weights, arguments.out or (folder if folder.is_dir() else Path()))
    else:
        first = arguments.runs[0]
        written = draw_curves(arguments.runs, arguments.out or (first.parent if arguments.runs[1:] else first))
        written += [write_report(run) for run in arguments.runs] if arguments.report else []
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
