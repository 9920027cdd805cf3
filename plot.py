"""Draw the curves of runs, and the embeddings of a model.

    python plot.py out/quickstart                        curves from metrics.jsonl, also while the run is going
    python plot.py out/gpt2_124M out/wsd --out pictures  several runs in the same pictures
    python plot.py --report out/quickstart               the same, and report.md beside them
    python plot.py --weights out/quickstart              embeddings of the newest checkpoint
    python plot.py --weights gpt2                        embeddings of OpenAI's GPT-2

The pictures are readable on white and on GitHub's dark page. Curves are written as .svg and .png, embeddings as .png.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import report

# Published results with GPT-2's tokenizer. A loss with another tokenizer cannot be compared with them.
GPT2_LOSS = 3.292  # OpenAI's 124M on FineWeb-Edu's validation tokens, as measured by build-nanogpt
GPT3_HELLASWAG = 0.337  # acc_norm of the 124M model, from the GPT-3 paper
# llm.c's 124M on FineWeb, 524,288 tokens a step: validation loss by step.
LLMC_BATCH, LLMC_STEPS = 524_288, (250, 500, 1000, 2000, 4000, 8000, 12000, 16000, 19560)
LLMC_LOSSES = (6.171, 5.374, 4.317, 3.859, 3.618, 3.443, 3.351, 3.288, 3.272)

# The lecture draws channels 150, 200 and 250 of GPT-2's 768. For other widths they are scaled.
CHANNELS, CHANNELS_OF = (150, 200, 250), 768
FIRST_TOKENS = 256  # single bytes in the gpt2 and the bytes tokenizer
HOW_TO_READ = "Trained: smooth curves, a band along the diagonal, tokens in groups. Untrained: noise, a bare diagonal."

# Okabe and Ito's colours that have a contrast of 3 with white and with GitHub's dark page; GREY has 4.3 with both.
COLOURS, DASHES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), ("-", "--", ":")
GREY, DASHED = "#737b86", (0, (6, 2))
STYLE = {
    **{f"{what}color": GREY for what in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.", "grid.")},
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.2,
    "svg.fonttype": "path",  # shapes instead of fonts, which a reader may not have
    "svg.hashsalt": "plot.py",  # the same ids in the file each time
}


# ----------------------------------------------------------------------------------------------------------------------
# From metrics.jsonl to curves

# What is drawn of each kind of record.
KEYS = dict(train=("loss", "lr", "grad_norm", "tokens_per_s", "mfu"), val=("loss",), hellaswag=("acc_norm",))


class Run(NamedTuple):
    name: str
    gpt2_tokens: bool  # HellaSwag can be compared with published scores
    fineweb: bool  # losses can be compared with published losses
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # "train loss" -> tokens seen (n), values (n)


def read_run(folder: Path, name: str) -> Run:
    """A run's curves; ValueError if there is nothing to draw."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        found = sorted(str(near.parent) for at in (folder, folder.parent) for near in at.glob("*/metrics.jsonl"))
        near = f"; there is one in {', '.join(found)}" if found else ""
        raise ValueError(f"{folder}: no metrics.jsonl here; train.py --out_dir={folder} writes one{near}")
    records = [record for record in report.read_metrics(file) if 0 <= record["step"] < 2**53]
    curves = {f"{kind} {key}": series(records, kind, key) for kind, keys in KEYS.items() for key in keys}
    if not np.isfinite(curves["train loss"][1]).any():
        raise ValueError(f"{folder}: no training step was logged yet (see log_every in train.py)")

    begun, batches = report.of_kind(records, "run", "settings"), report.batch_sizes(records)
    if not batches:
        raise ValueError(f"{file}: no record of kind run gives the tokens of a step; is the first line lost?")
    # Training records are written after the update of their step, all others before it.
    curves = {
        at: (report.tokens_seen(batches, n + at.startswith("train")), values) for at, (n, values) in curves.items()
    }
    # Older runs do not record the tokenizer; they had HellaSwag only with GPT-2's.
    unsaid = "gpt2" if begun[-1]["settings"].get("hellaswag_every") else "bytes"
    gpt2_tokens = begun[-1].get("tokenizer", unsaid) == "gpt2"
    text = f"{begun[-1]['settings'].get('data_dir')} {begun[-1].get('data')}".lower()
    return Run(name, gpt2_tokens, gpt2_tokens and "fineweb" in text, curves)


def series(records: list[dict], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n), sorted, and values (n). A null becomes NaN, a gap in the line. The last record of a step wins.

    Records without the key, or with a value that is not a number, are damaged and left out.
    """
    found = {r["step"]: r[key] for r in records if r["kind"] == kind and key in r}
    found = {step: math.nan if value is None else value for step, value in sorted(found.items())}
    found = {step: value for step, value in found.items() if type(value) in (int, float) and not abs(value) > 1e300}
    return np.array(list(found), dtype=float), np.array(list(found.values()), dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value (n) and its neighbours, 1 % of all values (at least 5) on each side. NaN stays NaN.

    NaN neighbours are skipped. There are fewer neighbours near the start, where the loss falls fast.
    """
    line, reach = np.full(len(values), math.nan), max(5, len(values) // 100)
    for i in np.flatnonzero(np.isfinite(values)):
        near = min(reach, i // 4)
        line[i] = np.nanmean(values[i - near : i + near + 1])
    return line


def names_of(folders: list[Path]) -> list[str]:
    """Names of the folders, with as much of the path as makes them different."""
    paths = [folder.resolve().parts for folder in folders]
    lengths = [next(n for n in range(1, len(p) + 1) if sum(q[-n:] == p[-n:] for q in paths) == 1) for p in paths]
    names = ["/".join(p[-n:]) for p, n in zip(paths, lengths)]
    return [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides labels that begin with _


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def loss_figure(runs: list[Run]):
    """Training and validation loss against tokens; below it HellaSwag, if a run has scores."""
    from matplotlib.figure import Figure

    scored = any(len(run.curves["hellaswag acc_norm"][1]) for run in runs)
    figure = Figure(figsize=(8, 6.2 if scored else 4.2), layout="constrained")
    rows = figure.subplots(1 + scored, sharex=True, squeeze=False, height_ratios=[5, 3][: 1 + scored])[:, 0]
    draw_losses(rows[0], runs)
    for axes in rows[1:]:
        for i, run in enumerate(runs):
            draw_marked(axes, *run.curves["hellaswag acc_norm"], i, None)
        axes.set_ylabel("HellaSwag, acc_norm")
        if any(run.gpt2_tokens for run in runs):
            draw_reference(axes, report.GPT2_HELLASWAG, "GPT-2 124M")
            draw_reference(axes, GPT3_HELLASWAG, "GPT-3 124M")
    finish(figure, runs)
    return figure


def draw_losses(axes, runs: list[Run]) -> None:
    for i, run in enumerate(runs):
        draw_noisy(axes, *run.curves["train loss"], i, f"{run.name}: training (smoothed)")
        tokens, losses = run.curves["val loss"]
        if len(finite := losses[np.isfinite(losses)]):
            # No line from before the first step: it would lie above the real, steep fall.
            first = np.flatnonzero(tokens == 0) + 1
            tokens, losses = np.insert(tokens, first, math.nan), np.insert(losses, first, math.nan)
            draw_marked(axes, tokens, losses, i, f"{run.name}: validation, last {finite[-1]:.3f}")
    low, high, highest = span(runs)
    if any(run.fineweb for run in runs):
        low = min(low, GPT2_LOSS)
        draw_reference(axes, GPT2_LOSS, "GPT-2 124M")
        tokens = LLMC_BATCH * np.array(LLMC_STEPS)
        axes.plot(tokens, LLMC_LOSSES, color=GREY, ls=DASHED, lw=1, label="llm.c's GPT-2 124M: validation")
    high = highest if highest - low < 3 * (high - low) else high
    margin = 0.04 * (high - low) or 0.1
    if highest > high + margin:
        axes.set_title(f"initial losses up to {highest:.1f} not shown")
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss, nats per token")


def span(runs: list[Run]) -> tuple[float, float, float]:
    """The lowest loss, the highest loss after the first 5 % of each run, and the highest of all."""
    lowest, later, highest = [], [], []
    for run in runs:
        both = np.concatenate([run.curves["train loss"], run.curves["val loss"]], axis=1)  # tokens, losses: (2, n)
        tokens, losses = both[:, np.isfinite(both[1])]
        lowest.append(losses.min())
        later.append(losses[tokens >= 0.05 * tokens.max()].max())
        highest.append(losses.max())
    return min(lowest), max(later), max(highest)


def training_figure(runs: list[Run]):
    """Learning rate, gradient norm, tokens/s and, if a run has it, MFU; against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    known = any(np.isfinite(run.curves["train mfu"][1]).any() for run in runs)
    figure = Figure(figsize=(8, 6.2 if known else 5), layout="constrained")
    rows = figure.subplots(3 + known, sharex=True)
    for i, run in enumerate(runs):
        rows[0].plot(*run.curves["train lr"], **look(i))
        draw_noisy(rows[1], *run.curves["train grad_norm"], i, run.name)
        for axes, key in zip(rows[2:], ("tokens_per_s", "mfu")):
            draw_noisy(axes, *run.curves[f"train {key}"], i, None)
    for axes, title in zip(rows, ("learning rate", "gradient norm", "tokens/s", "MFU")):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0) if title == "MFU" else in_words)
        axes.set_ylabel(title)
    figure.align_ylabels()
    finish(figure, runs)
    return figure


def look(i: int) -> dict:
    """Colour and dashes of run i. Both change from run to run, so that colour is not needed to tell runs apart."""
    return dict(color=COLOURS[i % len(COLOURS)], ls=DASHES[i % len(DASHES)], lw=1.4)


def draw_noisy(axes, tokens: np.ndarray, values: np.ndarray, i: int, label: str | None) -> None:
    """The values of run i as pale dots, and their running mean as a line."""
    # The dots are pixels in an .svg too: ten thousand shapes would be megabytes.
    dots = dict(color=look(i)["color"], alpha=min(0.6, 12 / math.sqrt(len(values) + 1)), zorder=1.5)
    axes.plot(tokens, values, "o", ms=2.2, mew=0, rasterized=True, **dots)
    axes.plot(tokens, smooth(values), label=label, **look(i))


def draw_marked(axes, tokens: np.ndarray, values: np.ndarray, i: int, label: str | None) -> None:
    """The values of run i as hollow circles on a thin line."""
    axes.plot(tokens, values, color=look(i)["color"], marker="o", ms=4, mew=0.9, mfc="none", lw=0.8, label=label)


def draw_reference(axes, value: float, name: str) -> None:
    """A dashed horizontal line with its name in the right margin."""
    axes.axhline(value, color=GREY, ls=DASHED, lw=1)
    at = dict(xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.annotate(f"{name}\n{value}", (1.01, value), **at)


def finish(figure, runs: list[Run]) -> None:
    """The axis of tokens, and a legend above the picture, in two columns if they fit."""
    bottom = figure.axes[-1]
    bottom.set_xlim(0, 1.01 * max(run.curves["train loss"][0].max() for run in runs))
    bottom.set_xlabel("tokens seen")
    bottom.xaxis.set_major_formatter(in_words)
    n = sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes)
    columns = 2 if max(len(run.name) for run in runs) < 20 else 1
    figure.legend(loc="outside upper left", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(n / columns))


def in_words(number: float, _=None) -> str:
    """2,500,000,000 -> 2.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def draw_curves(runs: list[Path], out: Path) -> list[Path]:
    """Draw the runs in these folders into out/loss and out/training, .svg and .png each; returns the files."""
    with style():
        folders = list({folder.resolve(): folder for folder in runs}.values())  # each run once
        read = [read_run(folder, name) for folder, name in zip(folders, names_of(folders))]
        figures = dict(loss=loss_figure(read), training=training_figure(read))
        return [save(figure, out / f"{name}.{kind}") for name, figure in figures.items() for kind in ("svg", "png")]


def write_report(run: Path, say=print) -> Path:
    """Draw the curves of a run, if it has any, and write report.md; returns its path."""
    try:
        draw_curves([run], run)
    except ValueError as error:
        say(f"NOTE: no curves: {error}")
    return report.write(run)


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def weights_figure(positions: np.ndarray, tokens: np.ndarray, name: str):
    """Embeddings of positions (T, C) and tokens (V, C): three channels, and the cosine similarity of all rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.6), layout="constrained")
    top, left, right = figure.subplot_mosaic("aa;bc", height_ratios=[3, 5]).values()
    channels = sorted({positions.shape[1] * channel // CHANNELS_OF for channel in CHANNELS})
    for channel, colour in zip(channels, COLOURS):
        top.plot(positions[:, channel], color=colour, lw=1, label=f"channel {channel}")
    top.set(title="Embeddings of positions", xlabel="position", xlim=(0, max(1, len(positions) - 1)))
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)

    alike, tokens = cosines(positions), tokens[:FIRST_TOKENS]
    neighbours = np.diagonal(alike, 1).mean().round(2) + 0.0  # never -0.00
    for axes, image, title, label in (
        (left, alike, f"Positions: {neighbours:.2f} between neighbours", "position"),
        (right, cosines(tokens), f"The first {len(tokens)} tokens", "token"),
    ):
        # Steps of 0.1 and hard edges make the file half as large.
        shown = axes.imshow(image.round(1), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set(title=title, xlabel=label)
        axes.grid(False)
    figure.colorbar(shown, ax=[left, right], location="bottom", label="cosine similarity", shrink=0.6, aspect=50)
    figure.suptitle(f"{name}\n{HOW_TO_READ}", fontsize=9, x=0.01, ha="left")
    return figure


def cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine similarity of each two rows: (n, C) -> (n, n)."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def draw_weights(name: str, out: Path) -> list[Path]:
    """Draw the embeddings of a model (a name as in sample.py) into out/weights.png; returns [that file]."""
    from model import GPT
    from pretrained import resolve

    with style():
        source = resolve(name)
        model = GPT.from_pretrained(source)
        embeddings = model.transformer.requires_grad_(False)
        tokens = embeddings.wte.weight[: model.config.vocab_size]  # without the padding
        figure = weights_figure(embeddings.wpe.weight.numpy(), tokens.numpy(), "/".join(Path(source).parts[-2:]))
        return [save(figure, out / "weights.png")]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def style():
    """A context in which figures have our style. ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib, which is not installed here: pip install matplotlib") from None
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})  # without the user's own settings


def save(figure, path: Path) -> Path:
    """Write a figure without date and version, so that the same input gives the same bytes."""
    unsaid = dict(Date=None, Creator=None) if path.suffix == ".svg" else dict(Software=None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, metadata=unsaid)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another folder with --out") from None
    return path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plot.py", description="Draw runs, or the embeddings of a model.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="out/RUN", help="folders of runs: loss and training")
    about_weights = "instead: gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder"
    parser.add_argument("--weights", metavar="MODEL", help=about_weights)
    parser.add_argument("--report", action="store_true", help="also write report.md, into the folder of each run")
    about_out = "where the pictures go (default: the run's or model's folder; of several runs, the one above)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=about_out)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        if bool(arguments.runs) == bool(arguments.weights) or (arguments.weights and arguments.report):
            raise ValueError("nothing to draw: python plot.py out/RUN ..., or python plot.py --weights MODEL")
        if arguments.weights:
            here = Path(arguments.weights)
            # Checkpoint folders are not changed.
            beside = here.parent if here.name.startswith("step_") else here
            written = draw_weights(arguments.weights, arguments.out or (beside if here.is_dir() else Path()))
            print(HOW_TO_READ)
        else:
            # Pictures of several runs go into the folder above them.
            first = arguments.runs[0]
            written = draw_curves(
                arguments.runs, arguments.out or (first if len(arguments.runs) == 1 else first.parent)
            )
            written += [write_report(run) for run in arguments.runs] if arguments.report else []
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
