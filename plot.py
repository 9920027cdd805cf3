"""Pictures of runs, and of what a model has learned about positions and tokens.

# The curves of a run, from its metrics.jsonl; also while it is still training.
python plot.py out/quickstart
# Several runs in the same pictures.
python plot.py out/gpt2_124M out/mine --out pictures
# The curves and report.md.
python plot.py --report out/quickstart
# The embeddings of the run's newest checkpoint. Another name is possible too, such as gpt2.
python plot.py --weights out/quickstart
"""

import io
import itertools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from model import GPT
from parts.console import OptionParser, command, path_option, print_lines, printable
from parts.files import write_whole
from parts.metrics import (
    GPT2_LOSS,
    GPT3_HELLASWAG,
    LLMC_LOSSES,
    LLMC_TOKENS,
    published_score,
    read_metrics,
    select,
    tokens_seen,
    updates_done,
)
from parts.pretrained import resolve
from parts.report import write_markdown
from parts.tokenizer import tokenizer_of_model

import numpy as np

# HellaSwag's score of one who guesses: each task has four endings.
CHANCE = 0.25
HOW_TO_READ = (
    "Trained: smooth curves, a band along the diagonal, groups of tokens. "
    "Untrained: noise, a bare diagonal."
)

# Four colours of the Okabe-Ito palette, which is safe for colour-blind readers. Their contrast with
# white and with GitHub's dark page is at least 3; the grey, for text, has 4.3 with both.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
GREY = "#737b86"
STYLE: Any = {
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.2,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    # A $ in the name of a run is no formula.
    "text.parse_math": False,
    # The same input gives the same ids of elements.
    "svg.hashsalt": "plot.py",
}


# ---- Runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    name: str
    # matplotlib's properties of its lines.
    look: dict
    records: list[dict]
    # Its loss can be compared with the published ones: GPT-2's tokens, and FineWeb's text.
    is_fineweb: bool
    # Losses are drawn in bits a byte: this many for each nat a token. None: in nats a token.
    bits_per_nat: float | None = None

    def curve(self, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen (n) and values (n), without nulls."""
        records = select(self.records, kind, key)
        n_updates = np.array([updates_done(record) for record in records])
        values = np.array([record[key] for record in records], dtype=float)
        if self.bits_per_nat and key == "loss":
            values = values * self.bits_per_nat
        return tokens_seen(self.records, n_updates), values


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders; ValueError if one has nothing to draw."""
    # Enough for twelve runs; then the looks repeat.
    looks = []
    for line_style in ("-", "--", ":"):
        for colour in COLOURS:
            looks.append(dict(color=colour, ls=line_style, lw=1.4))
    runs = []
    for folder, look in zip(folders, itertools.cycle(looks)):
        records = read_metrics(folder / "metrics.jsonl")
        started = select(records, "run")
        if not started or not select(records, "train", "loss"):
            raise ValueError(
                f"{folder}: no training loss in a metrics.jsonl here; "
                "name a run, as in out/quickstart"
            )
        facts = started[-1]
        text = f"{facts['settings'].get('data_dir')} {facts.get('data')}".lower()
        is_fineweb = facts.get("tokenizer") == "gpt2" and "fineweb" in text
        name = str(folder) if len(folders) > 1 else folder.resolve().name
        runs.append(Run(name, look, records, is_fineweb))
    return compare_in_bits(runs)


def compare_in_bits(runs: list[Run]) -> list[Run]:
    """The same runs, with losses in bits a byte if their tokenizers differ: losses a token cannot
    be compared then. ValueError if a run has not recorded its bits a byte.
    """
    tokenizers = {select(run.records, "run")[-1].get("tokenizer") for run in runs}
    if len(tokenizers) == 1:
        return runs
    converted = []
    for run in runs:
        val = select(run.records, "val", "loss", "val_bpb")
        if not val or val[-1]["loss"] == 0:
            raise ValueError(
                f"{run.name}: its tokens are not those of the others, and it has recorded no bits "
                "a byte, so their losses cannot be compared: draw it alone"
            )
        bits_per_nat = val[-1]["val_bpb"] / val[-1]["loss"]
        converted.append(run._replace(bits_per_nat=bits_per_nat, is_fineweb=False))
    return converted


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours (n): 1 % of all, at least 5, on both sides."""
    n = len(values)
    index = np.arange(n)
    # Fewer at the beginning: a wide mean of a falling loss would be too high there.
    reach = np.minimum(max(5, n // 100), index // 4)
    first = index - reach
    end = np.minimum(index + reach + 1, n)
    sums = np.cumsum([0, *values])
    return (sums[end] - sums[first]) / (end - first)


# ---- Curves --------------------------------------------------------------------------------------


def draw_curves(folders: list[Path], out: Path) -> list[Path]:
    """Draw the runs in these folders into out/loss and out/training, .svg and .png each; return the
    files.
    """
    import matplotlib

    runs = read_runs(folders)
    files = []
    with matplotlib.rc_context(STYLE):
        figures = dict(loss=draw_losses(runs), training=draw_training(runs))
        for name, figure in figures.items():
            files.append(save(figure, out / f"{name}.svg"))
            files.append(save(figure, out / f"{name}.png"))
    return files


def draw_losses(runs: list[Run]):
    """A figure of the training and validation loss against tokens, and of HellaSwag below if a run
    has been scored.
    """
    from matplotlib.figure import Figure

    if any(select(run.records, "hellaswag") for run in runs):
        figure = Figure(figsize=(8, 6.2), layout="constrained")
        top, bottom = figure.subplots(2, sharex=True, height_ratios=[5, 3])
    else:
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        top = figure.subplots()
        bottom = None

    for run in runs:
        draw_noisy(top, run, "loss", f"{run.name}: training (smoothed)")
        tokens, losses = run.curve("val", "loss")
        if len(losses):
            # Circles without a line, which would cut across the fall of the loss from the value
            # before the first step.
            circles = run.look | dict(ls="none", marker="o", ms=5, mfc="none")
            label = f"{run.name}: validation, last {losses[-1]:.3f}"
            top.plot(tokens, losses, **circles, label=label)
    if any(run.is_fineweb for run in runs):
        draw_reference(top, GPT2_LOSS, "GPT-2 124M")
        dashes = dict(color=GREY, ls="--", lw=1)
        top.plot(LLMC_TOKENS, LLMC_LOSSES, **dashes, label="llm.c's GPT-2 124M: validation")
    unit = "nats per token"
    if runs[0].bits_per_nat:
        unit = "bits per byte"
    top.set_ylabel(f"loss, {unit}")
    cut_off_start(top, runs)

    if bottom is not None:
        for run in runs:
            tokens, scores = run.curve("hellaswag", "acc_norm")
            bottom.plot(tokens, scores, **run.look, marker="o", ms=4, mfc="none")
        bottom.set_ylabel("HellaSwag, acc_norm")
        published = set()
        for run in runs:
            for record in select(run.records, "hellaswag"):
                published.add(published_score(record))
        for acc_norm in sorted(published):
            draw_reference(bottom, acc_norm, "GPT-2 124M")
        draw_reference(bottom, GPT3_HELLASWAG, "GPT-3 124M")
        draw_reference(bottom, CHANCE, "guessing")
    finish(figure, runs)
    return figure


def cut_off_start(axes, runs: list[Run]) -> None:
    """End the axis of losses at the largest one behind the first 5 % of a long run, and say so in
    the title: the first losses would squash all others.
    """
    curves = [run.curve(kind, "loss") for run in runs for kind in ("train", "val")]
    tokens, losses = np.concatenate(curves, axis=1)
    if len(losses) < 50:
        return
    later = losses[tokens >= 0.05 * tokens.max()]
    top = 1.02 * later.max()
    if losses.max() > top:
        axes.set_ylim(None, top)
        axes.set_title(f"Initial losses, up to {losses.max():.1f}, are not shown.")


def draw_training(runs: list[Run]):
    """A figure of the learning rate, the gradient norm and tokens/s against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 3 * 1.6), layout="constrained")
    rate, norm, speed = figure.subplots(3, sharex=True)
    for run in runs:
        draw_noisy(rate, run, "lr", run.name)
        draw_muon_rate(rate, run)
        draw_noisy(norm, run, "grad_norm")
        draw_noisy(speed, run, "tokens_per_s")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    norm.set_ylabel("gradient norm")
    norm.set_yscale("log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_minor_formatter(NullFormatter())
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    for axes in (rate, norm, speed):
        axes.yaxis.set_major_formatter(short_number)
    finish(figure, runs)
    return figure


def draw_noisy(axes, run: Run, key: str, label: str | None = None) -> None:
    """A quantity of training as pale dots, with its running mean in front. The learning rate has no
    noise: it is drawn itself.
    """
    tokens, values = run.curve("train", key)
    colour = run.look["color"]
    # The more dots, the paler. Pixels also in an .svg: ten thousand shapes would take megabytes.
    alpha = min(0.6, 12 / math.sqrt(len(values) + 1))
    dots = dict(color=colour, alpha=alpha, zorder=1.5, rasterized=True)
    axes.plot(tokens, values, "o", ms=2.2, mew=0, **dots)
    line = values if key == "lr" else smooth(values)
    axes.plot(tokens, line, **run.look, label=label)


def draw_muon_rate(axes, run: Run) -> None:
    """The learning rate of the blocks' matrices, if Muon updates them: it has the same schedule."""
    settings = select(run.records, "run")[-1]["settings"]
    own_rate = settings.get("muon_learning_rate")
    base_rate = settings.get("learning_rate")
    tokens, rates = run.curve("train", "lr")
    if settings.get("optimizer") != "muon" or not own_rate or not base_rate or not len(rates):
        return
    look = run.look | dict(lw=2.4, alpha=0.5)
    axes.plot(
        tokens, rates * own_rate / base_rate, **look, label=f"{run.name}: Muon's, of matrices"
    )


def draw_reference(axes, value: float, name: str) -> None:
    """A dashed line with its name in the right margin, where no curve is."""
    axes.axhline(value, color=GREY, ls="--", lw=1)
    margin = dict(xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.annotate(f"{name}\n{value}", (1.01, value), **margin)


def finish(figure, runs: list[Run]) -> None:
    """Label the axis of tokens, and put a legend above, in two columns if the names are short."""
    last = 0
    for run in runs:
        tokens, _ = run.curve("train", "loss")
        last = max(last, tokens[-1])
    bottom = figure.axes[-1]
    bottom.set(xlabel="tokens seen", xlim=(0, 1.01 * last))
    bottom.xaxis.set_major_formatter(short_number)
    longest_name = max(len(run.name) for run in runs)
    figure.legend(loc="outside upper left", ncols=2 if longest_name < 20 else 1)


def short_number(number: float, _=None) -> str:
    """2,500,000,000 -> 2.5B. Can be a formatter of matplotlib, which passes a tick's index too."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def save(figure, path: Path) -> Path:
    """Write a picture, whole or not at all. The same input gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # matplotlib puts the date and its own version into an .svg, unless told not to.
    metadata: dict | None = None
    if path.suffix == ".svg":
        metadata = dict(Date=None, Creator=None)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), dpi=200, metadata=metadata)
    write_whole(path, picture.getvalue())
    return path


def write_report(run: Path) -> None:
    """Draw the curves of a run and write report.md beside them.

    An error in either is printed as a note, so it cannot make the run fail. The same command then
    tries again.
    """
    is_whole = True
    try:
        draw_curves([run], run)
    except Exception as error:
        is_whole = False
        print_lines(describe_failure(run, error))
    try:
        report = write_markdown(run)
        if not is_whole:
            # Older than the records: see report.is_reported.
            os.utime(report, (0, 0))
        print_lines(f"report: {report}")
    except Exception as error:
        print_lines(describe_failure(run, error))


def describe_failure(run: Path, error: Exception) -> str:
    return f"NOTE: the report of {run} is not whole ({type(error).__name__}: {error})"


# ---- Weights -------------------------------------------------------------------------------------


def draw_weights(name: str, out: Path | None) -> list[Path]:
    """Draw the embeddings of a model, named as for sample.py, into weights.png in `out` or beside
    the model; return the file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Not open_model: a picture needs no tokenizer, and a folder may have none.
    source = Path(resolve(name))
    model = GPT.from_pretrained(source)
    if "wpe" not in model.transformer:
        raise ValueError(f"{source}: this model has no position embeddings to draw")
    positions = model.transformer.wpe.weight.detach().numpy()
    tokens = model.transformer.wte.weight.detach().numpy()[: model.config.vocab_size]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 7.6), layout="constrained")
        axes = figure.subplot_mosaic("aa;bc", height_ratios=[3, 5])
        draw_channels(axes["a"], positions)
        draw_similarity(axes["b"], positions, "Positions")
        image = draw_similarity(axes["c"], tokens[:256], "The first 256 tokens")
        label_tokens(axes["c"], source, model.config.vocab_size)
        figure.colorbar(
            image,
            ax=[axes["b"], axes["c"]],
            location="bottom",
            label="cosine similarity",
            shrink=0.6,
            aspect=50,
        )
        title = f"{'/'.join(source.parts[-2:])}\n{HOW_TO_READ}"
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        if out is None:
            # A name on the hub has no folder here.
            out = source.parent if source.exists() else Path()
        return [save(figure, out / "weights.png")]


def draw_channels(axes, positions: np.ndarray) -> None:
    """Three channels of the position embeddings (T, C) along the positions.

    The lecture draws channels 150, 200 and 250 of GPT-2's 768; other widths have them at the same
    fraction.
    """
    T, C = positions.shape
    for n, colour in zip((150, 200, 250), COLOURS):
        channel = C * n // 768
        axes.plot(positions[:, channel], color=colour, lw=1, label=f"channel {channel}")
    axes.set(title="Position embeddings", xlabel="position", xlim=(0, max(1, T - 1)))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)


def draw_similarity(axes, rows: np.ndarray, title: str):
    """The cosine similarity of each row (n, C) with each other, as an image (n, n); returns it."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.maximum(norms, 1e-12)
    # Rounded, for a small file.
    similarity = (unit @ unit.T).round(1)
    image = axes.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.grid(False)
    return image


def label_tokens(axes, source: Path, vocab_size: int) -> None:
    """Name the groups that the first 256 tokens have along the axes, if the model's tokenizer lies
    beside it and they are single bytes, as in GPT-2 and in vocabularies learned here.
    """
    try:
        tokenizer = tokenizer_of_model(source, vocab_size)
    except (OSError, ValueError):
        return
    groups: list[list[int]] = []  # ids in a row
    names: list[str] = []  # of the groups
    for token in range(min(256, vocab_size)):
        name = name_byte(tokenizer.decode_bytes([token]))
        if not names or names[-1] != name:
            names.append(name)
            groups.append([])
        groups[-1].append(token)
    named = [(group, name) for group, name in zip(groups, names) if name and len(group) >= 8]
    middles = [sum(group) / len(group) for group, _ in named]
    labels = [name for _, name in named]
    if not named:
        return
    axes.set_xticks([])
    axes.set_yticks(middles, labels)
    axes.tick_params(length=0, labelsize=7)


def name_byte(content: bytes) -> str:
    """The kind of character that a token of one byte is; empty for any other, and for signs."""
    if len(content) != 1:
        return ""
    byte = content[0]
    if content.isdigit():
        return "0 to 9"
    if content.isupper():
        return "A to Z"
    if content.islower():
        return "a to z"
    if byte >= 0xF5 or byte in (0xC0, 0xC1):
        return "never seen"  # no UTF-8 has them
    if byte >= 0x80:
        return "parts of characters"
    if byte < 0x20 or byte == 0x7F:
        return "control"
    return ""


@command("plot.py")
def main(argv: list[str] | None = None) -> None:
    parser = OptionParser(prog="plot.py", description="Draw runs, or the embeddings of a model.")
    add = parser.add_argument
    runs_help = "folders of runs: draw loss and training"
    add("runs", nargs="*", type=path_option, metavar="out/RUN", help=runs_help)
    weights_help = "instead: gpt2 ... gpt2-xl, a hub id, a run or a checkpoint"
    add("--weights", type=path_option, metavar="MODEL", help=weights_help)
    report_help = "also write report.md into the folder of each run"
    add("--report", action="store_true", help=report_help)
    out_help = "for pictures (default: beside what is drawn)"
    add("--out", type=path_option, metavar="FOLDER", help=out_help)
    arguments = parser.parse_args(argv)
    runs = [Path(run) for run in arguments.runs]
    out = Path(arguments.out) if arguments.out else None
    if bool(runs) == bool(arguments.weights) or (arguments.weights and arguments.report):
        raise ValueError(
            "say what to draw: python plot.py [--report] out/RUN ..., or plot.py --weights MODEL"
        )
    if arguments.weights:
        files = draw_weights(arguments.weights, out)
    else:
        beside = runs[0] if len(runs) == 1 else runs[0].parent
        files = draw_curves(runs, out or beside)
    print(printable("\n".join(map(str, files))))
    if arguments.report:
        for run in runs:
            write_report(run)


if __name__ == "__main__":
    main()
