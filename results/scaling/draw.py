"""The two pictures of the scaling study; fit.py draws them.

parabolas.svg   the loss by the number of parameters, a curve a budget, and the law's lines
frontier.svg    the lowest loss by the budget, the law's line with its error, and the last run
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COLOURS = {"muon": "#0072b2", "adamw": "#d55e00"}
NAMES = {"muon": "Muon", "adamw": "AdamW"}


def start():
    """matplotlib's pyplot, with files that are the same each time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "scaling", "font.size": 10})
    return pyplot


def draw_parabolas(points_of: dict[str, list], line_of: dict[str, Callable], fitted: list) -> None:
    """points_of: optimizer -> its runs; line_of: optimizer -> (budget) -> parameters and bits a
    byte of its law; fitted: the runs that a law was fitted to, drawn full.
    """
    pyplot = start()
    figure, panels = pyplot.subplots(1, len(points_of), figsize=(9.5, 4.2), sharey=True)
    for axes, (optimizer, points) in zip(np.atleast_1d(panels), points_of.items(), strict=True):
        budgets = sorted({point.budget for point in points})
        for shade, budget in zip(np.linspace(0.35, 1, len(budgets)), budgets, strict=True):
            runs = sorted(point for point in points if point.budget == budget)
            sizes = [run.parameters for run in runs]
            bits = [run.bits for run in runs]
            colour = COLOURS[optimizer]
            for run in runs:
                is_full = run in fitted or optimizer not in line_of
                face = colour if is_full else "none"
                axes.plot(run.parameters, run.bits, "o", color=colour, mfc=face, alpha=shade)
            if optimizer in line_of:
                axes.plot(*line_of[optimizer](budget), color=colour, alpha=shade, lw=1.2)
            label = f"{budget:.0e}".replace("+", "")
            axes.annotate(label, (sizes[-1], bits[-1]), (7, 3), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlim(1.2e5, 1.4e7)
        axes.set_xticks([2e5, 5e5, 1e6, 3e6, 6e6], ["0.2M", "0.5M", "1M", "3M", "6M"])
        axes.minorticks_off()
        note = "; lines: the law, rings: not in its fit" if optimizer in line_of else ""
        axes.set_title(NAMES[optimizer] + note)
        axes.set_xlabel("parameters, with the embeddings")
        axes.grid(alpha=0.3, which="both")
    np.atleast_1d(panels)[0].set_ylabel("bits a byte of the validation text")
    figure.tight_layout()
    save(figure, "parabolas.svg")


def draw_frontier(line: tuple, lowest: dict[str, tuple], last: tuple | None) -> None:
    """line: budgets, and the bits a byte of Muon's law with their error; lowest: optimizer ->
    budgets and the lowest bits a byte of a run; last: budget and bits of the predicted run.
    """
    pyplot = start()
    figure, axes = pyplot.subplots(figsize=(7.5, 4.4))
    budgets, bits, low, high = line
    axes.plot(budgets, bits, color=COLOURS["muon"], label="Muon: the law")
    axes.fill_between(budgets, low, high, color=COLOURS["muon"], alpha=0.15, lw=0)
    for optimizer, runs in lowest.items():
        label = f"{NAMES[optimizer]}: the best run of a budget"
        axes.plot(*runs, "o", color=COLOURS[optimizer], label=label)
    if last is not None:
        axes.plot(*last, "*", ms=13, color="black", label="the last run, predicted before it")
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs of training")
    axes.set_ylabel("bits a byte of the validation text")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    save(figure, "frontier.svg")


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None})
