"""Pictures of runs, and of what a model has learned about positions and tokens.

    python plot.py out/quickstart                        its curves, from metrics.jsonl, also while the run is going
    python plot.py out/gpt2_124M out/wsd --out pictures  several runs in the same pictures
    python plot.py --report out/quickstart               the same, and report.md beside them
    python plot.py --weights out/quickstart              the embeddings of its newest checkpoint
    python plot.py --weights gpt2                        those of OpenAI's

All can be read on white and on GitHub's dark page. Curves come as .svg and as .png, embeddings as .png only.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import report

# What others report, a token of GPT-2's vocabulary: a loss on any other vocabulary cannot be compared with it.
GPT2_LOSS = 3.292  # OpenAI's 124M on FineWeb-Edu's validation tokens, as build-nanogpt has it
GPT3_HELLASWAG = 0.337  # acc_norm of its 124M, from the paper on GPT-3
# llm.c's 124M on FineWeb, 524,288 tokens a step: its validation loss after so many steps.
LLMC_BATCH, LLMC_STEPS = 524_288, (250, 500, 1000, 2000, 4000, 8000, 12000, 16000, 19560)
LLMC_LOSSES = (6.171, 5.374, 4.317, 3.859, 3.618, 3.443, 3.351, 3.288, 3.272)

# The lecture draws channels 150, 200 and 250 of GPT-2's 768; another width has them at the same shares of it.
CHANNELS, CHANNELS_OF = (150, 200, 250), 768
FIRST_TOKENS = 256  # in both of our vocabularies the single bytes
HOW_TO_READ = "Trained: smooth curves, a band along the diagonal, tokens in groups. Untrained: noise, a bare diagonal."

# Of Okabe and Ito's colours, which all eyes tell apart, the four that have a contrast of 3 with white and with GitHub's
# dark page; a grey has 4.3 with both at best, as this one does. With three kinds of line, twelve runs look different.
COLOURS, DASHES, MARKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), ("-", (0, (4, 1.5)), (0, (1, 1))), "os^Dv"
GREY, DASHED = "#737b86", (0, (6, 2))
STYLE = {
    **{f"{what}color": GREY for what in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.", "grid.")},
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.2,
    "svg.fonttype": "path",  # the letters' shapes: they look and fit the same, whatever fonts a reader has
    "svg.hashsalt": "plot.py",  # the same names inside the file each time
}


# ----------------------------------------------------------------------------------------------------------------------
# From metrics.jsonl to curves

# What is drawn of each kind of record.
KEYS = dict(train=("loss", "lr", "grad_norm", "tokens_per_s", "mfu"), val=("loss",), hellaswag=("acc_norm",))


class Run(NamedTuple):
    name: str
    gpt2_tokens: bool  # so that others' HellaSwag can stand beside it
    fineweb: bool  # and so can others' losses
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # "train loss" -> tokens seen (n), values (n)


def read_run(folder: Path, name: str) -> Run:
    """A run's curves; ValueError if there is nothing to draw."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        places = [folder.parent / "metrics.jsonl"]  # of a checkpoint, or of the file itself
        places += [found for at in (folder, folder.parent) for found in at.glob("*/metrics.jsonl")]
        near = ", ".join(sorted({str(place.parent) for place in places if place.is_file()}))
        near = f"; there is one in {near}" if near else ""
        raise ValueError(
            f"{folder}: no metrics.jsonl here; train.py writes one: python train.py ... --out_dir={folder}{near}"
        )
    records = [record for record in report.read_metrics(file) if 0 <= record["step"] < 2**53]
    curves = {f"{kind} {key}": series(records, kind, key) for kind, keys in KEYS.items() for key in keys}
    if not np.isfinite(curves["train loss"][1]).any():
        raise ValueError(f"{folder}: no step was logged (train.py's log_every says when one is)")

    begun, batches = report.of_kind(records, "run", "settings"), report.batch_sizes(records)
    if not batches:
        raise ValueError(f"{file}: no record of kind run says how many tokens a step has; is its first line lost?")
    # A training record is written after the update of its step, the others before.
    curves = {
        at: (report.tokens_seen(batches, n + at.startswith("train")), values) for at, (n, values) in curves.items()
    }
    # Older runs do not say which tokenizer they had; HellaSwag was on with GPT-2's only.
    unsaid = "gpt2" if begun[-1]["settings"].get("hellaswag_every") else "bytes"
    gpt2_tokens = begun[-1].get("tokenizer", unsaid) == "gpt2"
    text = f"{begun[-1]['settings'].get('data_dir')} {begun[-1].get('data')}".lower()
    return Run(name, gpt2_tokens, gpt2_tokens and "fineweb" in text, curves)


def series(records: list[dict], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n), rising, and values (n): NaN, a gap in the line, for a null. Where a step stands twice, the last holds.

    A record without the key, or with something there that is no number, is damaged and left out.
    """
    found = {r["step"]: r[key] for r in records if r["kind"] == kind and key in r}
    found = {step: math.nan if value is None else value for step, value in sorted(found.items())}
    found = {step: value for step, value in found.items() if type(value) in (int, float) and not abs(value) > 1e300}
    return np.array(list(found), dtype=float), np.array(list(found.values()), dtype=float)


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Each value's mean with its neighbours (n), and how many values are in such a mean at most.

    They are 1 % of all, at least 5, on either side; fewer near the beginning, where a loss falls so fast that a wide
    mean would lie above it, and none from beyond the end or a gap (NaN, which stays one).
    """
    line, reach = np.full(len(values), math.nan), max(5, len(values) // 100)
    gaps = np.flatnonzero(~np.isfinite(np.concatenate([[math.nan], values, [math.nan]]))) - 1
    for before, after in itertools.pairwise(gaps):
        for i in range(before + 1, after):
            near = min(reach, i // 4)
            line[i] = values[max(i - near, before + 1) : min(i + near + 1, after)].mean()
    return line, min(2 * reach + 1, len(values))


def names_of(folders: list[Path]) -> list[str]:
    """The folders' names, each with as much of its path as tells it from the others."""
    paths = [folder.resolve().parts for folder in folders]
    lengths = [next(n for n in range(1, len(p) + 1) if sum(q[-n:] == p[-n:] for q in paths) == 1) for p in paths]
    names = ["/".join(p[-n:]) for p, n in zip(paths, lengths)]
    return [f" {name}" if name.startswith("_") else name for name in names]  # a legend leaves out what begins with _


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def loss_figure(runs: list[Run]):
    """Training and validation loss against tokens, and below HellaSwag if any run was scored."""
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
        draw_noisy(axes, *run.curves["train loss"], i, f"{run.name}: training")
    low, high, highest = span(runs)
    if any(run.fineweb for run in runs):
        low = min(low, GPT2_LOSS)
        draw_reference(axes, GPT2_LOSS, "GPT-2 124M")
        tokens = LLMC_BATCH * np.array(LLMC_STEPS)
        axes.plot(tokens, LLMC_LOSSES, color=GREY, ls=DASHED, lw=1, label="llm.c's GPT-2 124M: validation")
    # With the first losses in the picture, the others may lie on its floor.
    high = highest if highest - low < 1.5 * (high - low) else high
    margin = 0.04 * (high - low) or 0.1
    for i, run in enumerate(runs):
        tokens, losses = run.curves["val loss"]
        if len(finite := losses[np.isfinite(losses)]):
            # No line leads from before the first step: the fall that it would cut across was not measured.
            gap = np.flatnonzero(tokens == 0) + 1
            tokens, losses = np.insert(tokens, gap, math.nan), np.insert(losses, gap, math.nan)
            draw_marked(axes, tokens, losses, i, f"{run.name}: validation, last {finite[-1]:.3f}")
    above = f" The first losses, up to {highest:.1f}, lie above." if highest > high + margin else ""
    axes.set_title(f"A line is the mean of the dots around it, of fewer at its ends.{above}")
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss, nats a token")


def span(runs: list[Run]) -> tuple[float, float, float]:
    """Of the losses the lowest, the highest after 5 % of the longest run (half of a shorter one), and the highest."""
    lowest, later, highest = [], [], []
    longest = max(run.curves["train loss"][0].max() for run in runs)
    for run in runs:
        both = np.concatenate([run.curves["train loss"], run.curves["val loss"]], axis=1)  # tokens, losses: (2, n)
        tokens, losses = both[:, np.isfinite(both[1])]
        lowest.append(losses.min())
        later.append(losses[tokens >= min(0.05 * longest, 0.5 * tokens.max())].max())
        highest.append(losses.max())
    return min(lowest), max(later), max(highest)


def training_figure(runs: list[Run]):
    """Learning rate, gradient norm, tokens/s and, where the device's peak is known, MFU; against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    known = any(np.isfinite(run.curves["train mfu"][1]).any() for run in runs)
    figure = Figure(figsize=(8, 6.2 if known else 5), layout="constrained")
    rows = figure.subplots(3 + known, sharex=True)
    for i, run in enumerate(runs):
        rows[0].plot(*run.curves["train lr"], **look(i))
        draw_noisy(rows[1], *run.curves["train grad_norm"], i, run.name)
        for axes, key in zip(rows[2:], ("tokens_per_s", "mfu")):
            draw_noisy(axes, *run.curves[f"train {key}"], i, None)
    norms = np.concatenate([run.curves["train grad_norm"][1] for run in runs])
    norms = norms[norms > 0]
    for axes, title in zip(rows, ("learning rate", "gradient norm", "tokens/s", "MFU")):
        if title == "gradient norm" and norms.max(initial=0) > 10 * norms.min(initial=math.inf):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0) if title == "MFU" else in_words)
        axes.set_ylabel(title)
    figure.align_ylabels()
    finish(figure, runs)
    return figure


def look(i: int) -> dict:
    """Of run i's lines."""
    return dict(color=COLOURS[i % len(COLOURS)], ls=DASHES[i % len(DASHES)], lw=1.4)


def draw_noisy(axes, tokens: np.ndarray, values: np.ndarray, i: int, label: str | None) -> None:
    """Run i's values as pale dots, and their running mean in front of them."""
    line, most = smooth(values)
    # The more dots there are, the paler. They are pixels in an .svg too: ten thousand shapes would be megabytes.
    dots = dict(color=look(i)["color"], alpha=min(0.6, 12 / math.sqrt(len(values) + 1)), zorder=1.5)
    axes.plot(tokens, values, "o", ms=2.2, mew=0, rasterized=True, **dots)
    axes.plot(tokens, line, label=label and f"{label}, mean of {most} dots", **look(i))


def draw_marked(axes, tokens: np.ndarray, values: np.ndarray, i: int, label: str | None) -> None:
    """Run i's values as hollow marks, through which other lines can be seen, and a thin line."""
    marks = dict(color=look(i)["color"], marker=MARKERS[i % len(MARKERS)], ms=4, mew=0.9, mfc="none")
    axes.plot(tokens, values, lw=0.8, label=label, **marks)


def draw_reference(axes, value: float, name: str) -> None:
    """A dashed line, with its name in the right margin, where no curve is."""
    axes.axhline(value, color=GREY, ls=DASHED, lw=1)
    at = dict(xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.annotate(f"{name}\n{value}", (1.01, value), **at)


def finish(figure, runs: list[Run]) -> None:
    """What all curves have: the tokens seen, and a legend above, in two columns where they fit.

    Tokens are in logarithms only where a run would be a stroke at the left of another, twenty times as long: the first
    hundredth of a run takes half of such a picture.
    """
    bottom, ends = figure.axes[-1], [run.curves["train loss"][0].max() for run in runs]
    if max(ends) > 20 * min(ends):
        bottom.set_xscale("log", nonpositive="mask")
        bottom.set_xlim(min(ends) / 5, 1.05 * max(ends))
    else:
        bottom.set_xlim(0, 1.01 * max(ends))
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
        folders = list({folder.resolve(): folder for folder in runs}.values())  # named twice, it is still one run
        read = [read_run(folder, name) for folder, name in zip(folders, names_of(folders))]
        figures = dict(loss=loss_figure(read), training=training_figure(read))
        return [save(figure, out / f"{name}.{kind}") for name, figure in figures.items() for kind in ("svg", "png")]


def write_report(run: Path, say=print) -> Path:
    """A run's curves, as far as they can be drawn, and report.md with them; returns its path."""
    try:
        draw_curves([run], run)
    except ValueError as error:
        say(f"NOTE: no curves are drawn: {error}")
    return report.write(run)


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def weights_figure(positions: np.ndarray, tokens: np.ndarray, name: str):
    """Of the embeddings of positions (T, C) and tokens (V, C): three channels, and which rows are like which."""
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
    """Of the angle between each two rows: (n, C) -> (n, n)."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def draw_weights(name: str, out: Path) -> list[Path]:
    """Draw the embeddings of a model, named as for sample.py, into out/weights.png; returns that file."""
    from model import GPT
    from pretrained import resolve

    with style():
        source = resolve(name)
        model = GPT.from_pretrained(source)
        embeddings = model.transformer.requires_grad_(False)
        tokens = embeddings.wte.weight[: model.config.vocab_size]  # without rows that only pad
        figure = weights_figure(embeddings.wpe.weight.numpy(), tokens.numpy(), "/".join(Path(source).parts[-2:]))
        return [save(figure, out / "weights.png")]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def style():
    """Within it, figures look like ours. ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib, which is not installed here: pip install matplotlib") from None
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})  # whatever a user has set for other pictures


def save(figure, path: Path) -> Path:
    """Write a picture that is the same, byte for byte, as long as what it shows is: without date and version."""
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
            raise ValueError("what is to be drawn? python plot.py out/RUN ..., or python plot.py --weights MODEL")
        if arguments.weights:
            here = Path(arguments.weights)
            # Not into a checkpoint, which is whole as it is.
            beside = here.parent if here.name.startswith("step_") else here
            written = draw_weights(arguments.weights, arguments.out or (beside if here.is_dir() else Path()))
            print(HOW_TO_READ)
        else:
            # Of several runs, beside them all: the pictures in a run's folder are its own.
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
