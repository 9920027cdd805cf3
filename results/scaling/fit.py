"""The law of the scaling study, from runs.jsonl and texts.json alone.

    python results/scaling/fit.py      # prints the tables, writes law.json and the pictures

The last validation loss of a run with N parameters that has read D bytes of text is fitted by the
form of Hoffmann and others (2022, arXiv 2203.15556),

    L(N, D) = E + A / N^alpha + B / D^beta

in bits a byte, to Muon's runs of the learned vocabulary whose loss is near the best of their
budget, by least squares in log L, with L-BFGS from many starts.

Errors are the 10th and the 90th percentile of where a run may end: of 50 fits to runs drawn with
replacement, each with all errors by which a fit misses the run that was left out of it.
"""

import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from draw import NAMES, draw_frontier, draw_parabolas
from grid import (
    BLOCK_SIZE,
    CODE,
    SIZES,
    VOCABULARIES,
    Run,
    Size,
    between_runs,
    code_runs,
    grid_runs,
    last_run,
    repeated_pieces_runs,
    repeated_runs,
    ten_times_runs,
)

HERE = Path(__file__).parent
# Of the Huber loss of a difference in log L. Hoffmann and others take 1e-3. Where runs scatter by
# 1 %, as here, that is to add up absolute differences, and the curve goes through five of the runs
# and ignores the others; leaving out one run at a time tells which is better (`compare_fits`).
HOFFMANN = 1e-3
LEAST_SQUARES = 1.0  # no difference is as large
N_BOOTSTRAPS = 50
# A run that ends with more than so many times the best loss of its budget is no part of the fit.
# The largest models of a budget take so few steps that these are what limits them, and no term of
# the form has the number of steps.
NEAR = 1.05
# Of text that repeats, the fit is to runs of so many epochs, and others test it.
MOST_EPOCHS = 4


# ---- The runs ------------------------------------------------------------------------------------


class Point(NamedTuple):
    """What a run gives the law."""

    width: int
    budget: float  # FLOPs
    seed: int
    blocks: float  # parameters in the blocks, as Kaplan counts
    parameters: float  # with the embeddings, without the positions, as train.py's FLOPs count them
    tokens: float
    n_bytes: float  # of text
    bits: float  # a byte


def read_records(file: Path = HERE / "runs.jsonl") -> dict[str, dict]:
    """The runs by name."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["name"]: record for record in records}


TEXTS = json.loads((HERE / "texts.json").read_text())


def make_point(record: dict) -> Point:
    size = Size(record["n_layer"], record["n_head"], record["n_embd"])
    _, _, bits = record["validations"][-1]
    embeddings = record["embedding_rows"] * size.n_embd + 2 * size.n_embd
    return Point(
        width=size.n_embd,
        budget=record["budget"],
        seed=record["seed"],
        blocks=size.block_parameters,
        parameters=size.block_parameters + embeddings,
        tokens=record["tokens"],
        n_bytes=record["tokens"] * TEXTS[record["vocabulary"]]["bytes_per_token"],
        bits=bits,
    )


def grid_points(records: dict[str, dict], optimizer: str, vocabulary: str = "") -> list[Point]:
    """The runs of the grid with this optimizer, and this vocabulary if one is given. The last run,
    which the law predicts, is not in the grid.
    """
    points = []
    for run in grid_runs():
        wanted = run.optimizer == optimizer and vocabulary in ("", run.vocabulary)
        if wanted and run.name in records:
            points.append(make_point(records[run.name]))
    return points


def law_points(records: dict[str, dict]) -> list[Point]:
    """The runs that the law is fitted to."""
    points = grid_points(records, "muon", "books_4096")
    best: dict[float, float] = {}
    for point in points:
        best[point.budget] = min(point.bits, best.get(point.budget, math.inf))
    return [point for point in points if point.bits < NEAR * best[point.budget]]


# ---- The form ------------------------------------------------------------------------------------


class Law(NamedTuple):
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def bits(self, parameters, n_bytes):
        """Bits a byte; for numbers or arrays."""
        return self.E + self.A / parameters**self.alpha + self.B / n_bytes**self.beta


def fit_law(
    points: list[Point], starts: list[Law] | None = None, delta: float = LEAST_SQUARES
) -> Law:
    """The law with the smallest Huber loss, from the best of many starts."""
    sizes = torch.tensor([point.parameters for point in points], dtype=torch.float64)
    n_bytes = torch.tensor([point.n_bytes for point in points], dtype=torch.float64)
    targets = torch.tensor([point.bits for point in points], dtype=torch.float64).log()
    if starts is None:
        starts = []
        for floor, exponent, at_once in itertools.product(
            (0.1, 0.5, 1.5), (0.1, 0.3, 0.6), (0.5, 2)
        ):
            A = at_once * 1e6**exponent
            starts.append(Law(floor, A, exponent, A, exponent))

    def objective(free: torch.Tensor) -> torch.Tensor:
        log_E, log_A, log_B, log_alpha, log_beta = free
        alpha, beta = log_alpha.exp(), log_beta.exp()  # positive
        terms = [
            log_E.expand_as(sizes),
            log_A - alpha * sizes.log(),
            log_B - beta * n_bytes.log(),
        ]
        difference = torch.logsumexp(torch.stack(terms), 0) - targets
        zeros = torch.zeros_like(difference)
        loss = F.huber_loss(difference, zeros, delta=delta, reduction="sum")
        return loss / min(delta, 1e-2) ** 2  # of the size of 1, for the search's tolerances

    best = math.inf
    law = starts[0]
    for start in starts:
        numbers = [start.E, start.A, start.B, start.alpha, start.beta]
        free = torch.tensor(numbers, dtype=torch.float64).log()
        minimise(objective, free)
        reached = objective(free).item()
        if reached < best:
            best = reached
            E, A, B, alpha, beta = free.exp().tolist()
            law = Law(E, A, alpha, B, beta)
    return law


def minimise(objective: Callable[[torch.Tensor], torch.Tensor], free: torch.Tensor) -> None:
    """Move the free numbers to a minimum of the objective near them, by L-BFGS."""
    free.requires_grad_(True)
    search = torch.optim.LBFGS(
        [free],
        max_iter=300,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = objective(free)
        loss.backward()
        return loss

    search.step(closure)
    free.requires_grad_(False)


def bootstrap(points: list[Point], law: Law, n: int = N_BOOTSTRAPS) -> list[Law]:
    """The laws of runs drawn with replacement."""
    draw = np.random.default_rng(1337)
    laws = []
    for _ in range(n):
        drawn = [points[i] for i in draw.integers(len(points), size=len(points))]
        laws.append(fit_law(drawn, starts=[law]))
    return laws


def leave_one_out(points: list[Point], law: Law, delta: float = LEAST_SQUARES) -> np.ndarray:
    """By how much log L of each run differs from a fit to the others."""
    errors = []
    for left_out in points:
        others = [point for point in points if point != left_out]
        fit = fit_law(others, starts=[law], delta=delta)
        expected = fit.bits(left_out.parameters, left_out.n_bytes)
        errors.append(math.log(left_out.bits / expected))
    return np.array(errors)


def spread(values, digits: int = 3) -> str:
    """The 10th to the 90th percentile."""
    low, high = np.percentile(values, [10, 90])
    return f"{low:.{digits}g} to {high:.{digits}g}"


class Fit(NamedTuple):
    """The law and what is known of its errors."""

    law: Law
    others: list[Law]  # of runs drawn with replacement
    errors: np.ndarray  # in log L, of runs that a fit has not seen

    def ends(self, expected: list[float]) -> np.ndarray:
        """Where a run may end that each of the others expects so much of."""
        return np.outer(expected, np.exp(self.errors)).ravel()


# ---- The frontier --------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A model between those of the grid: its width is not rounded."""

    width: float
    parameters: float
    blocks: float
    flops_per_byte: float


def make_shapes(vocabulary: str) -> list[Shape]:
    """The grid's family of shapes in steps of 1 % of the width, from 12 to 1,024."""
    known_widths = np.log(list(SIZES))
    known_layers = np.log([size.n_layer for size in SIZES.values()])
    slope = (known_layers[-1] - known_layers[1]) / (known_widths[-1] - known_widths[1])
    shapes = []
    for log_width in np.arange(math.log(12), math.log(1_024), 0.01):
        log_layers = np.interp(log_width, known_widths, known_layers)
        if log_width > known_widths[-1]:
            log_layers = known_layers[-1] + slope * (log_width - known_widths[-1])
        width = math.exp(log_width)
        layers = math.exp(log_layers)
        blocks = layers * (12 * width**2 + 13 * width)
        parameters = blocks + 2 * width + VOCABULARIES[vocabulary] * width
        flops_per_token = 6 * parameters + 12 * layers * width * BLOCK_SIZE
        flops_per_byte = flops_per_token / TEXTS[vocabulary]["bytes_per_token"]
        shapes.append(Shape(width, parameters, blocks, flops_per_byte))
    return shapes


def best_shape(law: Law, shapes: list[Shape], budget: float) -> tuple[Shape, float]:
    """The shape with the smallest loss for so many FLOPs, and that loss."""
    losses = [law.bits(shape.parameters, budget / shape.flops_per_byte) for shape in shapes]
    best = int(np.argmin(losses))
    return shapes[best], losses[best]


def parabola(points: list[Point], x: str) -> float | None:
    """The size with the smallest loss among runs of one budget, by a parabola over the logarithm of
    the size; None if they do not enclose a minimum.
    """
    if len(points) < 3:
        return None
    logs = np.log([getattr(point, x) for point in points])
    losses = [point.bits for point in points]
    a, b, _ = np.polyfit(logs, losses, 2)
    vertex = -b / (2 * a)
    if a <= 0 or not logs.min() < vertex < logs.max():
        return None
    return math.exp(vertex)


# ---- Muon against AdamW --------------------------------------------------------------------------


def shares_of_tokens(adamw: list[Point], muon: list[Point]) -> dict[int, list[tuple[float, float]]]:
    """Width -> (budget, share): of the tokens of the longest AdamW run of that width, the share
    after which Muon would have reached its loss.

    The losses of Muon's runs of this width, joined by straight lines over the logarithm of the
    tokens, are crossed with AdamW's loss at each budget that lies between them.
    """
    shares = defaultdict(list)
    for width in SIZES:
        line = sorted((point.tokens, point.bits) for point in muon if point.width == width)
        if len(line) < 2:
            continue
        log_tokens = np.log([tokens for tokens, _ in line])
        losses = np.array([loss for _, loss in line])
        for point in sorted(adamw, key=lambda point: point.budget):
            if point.width == width and losses.min() <= point.bits <= losses.max():
                crossing = np.interp(-point.bits, -losses, log_tokens)
                shares[width].append((point.budget, math.exp(crossing) / point.tokens))
    return dict(shares)


# ---- All of it -----------------------------------------------------------------------------------


def print_row(*cells) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def root_mean_square(errors) -> str:
    return f"{100 * math.sqrt(np.mean(np.square(errors))):.2f} %"


def compare_fits(points: list[Point]) -> None:
    """Print the law by both ways to weigh differences, and which predicts a run better that it has
    not seen.
    """
    print("\n### Two ways to weigh the differences\n")
    print_row("", *Law._fields, "best width at 1e13, 1e14, 1e15", "RMS", "RMS of runs left out")
    print("|" + "---|" * 9)
    shapes = make_shapes("books_4096")
    for name, delta in (("least squares", LEAST_SQUARES), ("Huber, delta 1e-3", HOFFMANN)):
        law = fit_law(points, delta=delta)
        widths = [best_shape(law, shapes, budget)[0].width for budget in (1e13, 1e14, 1e15)]
        errors = [math.log(p.bits / law.bits(p.parameters, p.n_bytes)) for p in points]
        print_row(
            name,
            *(f"{value:.3g}" for value in law),
            ", ".join(f"{width:.0f}" for width in widths),
            root_mean_square(errors),
            root_mean_square(leave_one_out(points, law, delta)),
        )


def report_law(records: dict[str, dict]) -> Fit:
    """Print Muon's law, how far the runs lie from it, and its frontier."""
    points = law_points(records)
    compare_fits(points)
    law = fit_law(points)
    others = bootstrap(points, law)
    fit = Fit(law, others, leave_one_out(points, law))
    errors = [math.log(point.bits / law.bits(point.parameters, point.n_bytes)) for point in points]
    print(f"\n### Muon's law, from {len(points)} runs\n")
    print_row("", *Law._fields)
    print("|" + "---|" * 6)
    print_row("fit", *(f"{value:.3g}" for value in law))
    percentiles = []
    for field in Law._fields:
        percentiles.append(spread([getattr(other, field) for other in others]))
    print_row("10 % to 90 %", *percentiles)
    print(f"\nThe runs lie {root_mean_square(errors)} (root mean square) from it.\n")

    shapes = make_shapes("books_4096")
    bytes_per_token = TEXTS["books_4096"]["bytes_per_token"]
    print_row(
        "FLOPs", "width", "10-90 %", "in blocks", "in all", "tokens", "a parameter", "bits a byte"
    )
    print("|" + "---|" * 8)
    for budget in (3e12, 1e13, 3e13, 1e14, 3e14, 1e15, 3e15):
        shape, bits = best_shape(law, shapes, budget)
        tokens = budget / shape.flops_per_byte / bytes_per_token
        best = [best_shape(other, shapes, budget) for other in others]
        print_row(
            f"{budget:.0e}",
            f"{shape.width:.0f}",
            spread([shape.width for shape, _ in best]),
            f"{shape.blocks / 1e6:.2f}M",
            f"{shape.parameters / 1e6:.2f}M",
            f"{tokens / 1e6:.1f}M",
            f"{tokens / shape.parameters:.0f}",
            f"{bits:.4f} ({spread(fit.ends([bits for _, bits in best]))})",
        )
    return fit


def report_minima(records: dict[str, dict], optimizer: str) -> None:
    """The best sizes by parabolas, without the law, counted in both ways."""
    points = grid_points(records, optimizer, "books_4096")
    for x, who in (("blocks", "Kaplan"), ("parameters", "Hoffmann")):
        minima = []
        for budget in sorted({point.budget for point in points}):
            size = parabola([point for point in points if point.budget == budget], x)
            if size:
                minima.append((budget, size))
        sizes = ", ".join(f"{size / 1e6:.2f}M at {budget:.0e}" for budget, size in minima)
        line = f"\n{NAMES[optimizer]}, minima of the parabolas, counted as {who} does: {sizes}"
        if len(minima) >= 2:
            logs = np.log(minima)
            slope = np.polyfit(logs[:, 0], logs[:, 1], 1)[0]
            line += f"; N grows as C^{slope:.2f}"
        print(line)


def report_muon(records: dict[str, dict]) -> None:
    adamw = grid_points(records, "adamw", "books_4096")
    muon = grid_points(records, "muon", "books_4096")
    print("\n### Of AdamW's tokens, Muon needs for the same loss\n")
    print_row("width", "FLOPs of AdamW: share")
    print("|---|---|")
    for width, row in shares_of_tokens(adamw, muon).items():
        print_row(width, ", ".join(f"{budget:.0e}: {share:.2f}" for budget, share in row))
    print("\n### The losses of both, bits a byte\n")
    print_row("FLOPs", "width", "Muon", "AdamW")
    print("|" + "---|" * 4)
    for point in sorted(adamw, key=lambda point: (point.budget, point.width)):
        for other in muon:
            if (other.budget, other.width) == (point.budget, point.width):
                bits = (f"{other.bits:.3f}", f"{point.bits:.3f}")
                print_row(f"{point.budget:.0e}", point.width, *bits)


def report_ten_times(records: dict[str, dict]) -> None:
    """Muon with half of AdamW's tokens, and with all of them, at ten times results/muon's size."""
    print("\n### 23.5M parameters, GPT-2's vocabulary\n")
    print_row("optimizer", "learning rate", "FLOPs", "tokens", "nats a token", "bits a byte")
    print("|" + "---|" * 6)
    for run in ten_times_runs():
        if run.name in records:
            record = records[run.name]
            _, nats, bits = record["validations"][-1]
            tokens = f"{record['tokens'] / 1e6:.2f}M"
            rate = run.muon_learning_rate or run.learning_rate
            cells = (f"{rate:.2g}", f"{run.flops:.2g}", tokens, f"{nats:.3f}", f"{bits:.3f}")
            print_row(NAMES[run.optimizer], *cells)


def useful(epoch: float, epochs: int, R: float) -> float:
    """How much new text would teach as much as this text, read so many times.

    The form is that of Muennighoff and others (2023, arXiv 2305.16264): each repetition is worth
    less than the one before, and after R of them 37 % of what they can teach is still to come.
    """
    return epoch * (1 + R * (1 - math.exp(-(epochs - 1) / R)))


class Repeated(NamedTuple):
    """A run that has read a text several times, beside one that has read as much new text."""

    run: Run
    once: Point
    point: Point

    @property
    def parameters_per_token(self) -> float:
        return self.once.parameters / self.run.epoch_tokens

    def expected(self, law: Law, R: float) -> float:
        """Bits a byte by the law, times what makes it right for the run that has read new text."""
        factor = self.once.bits / law.bits(self.once.parameters, self.once.n_bytes)
        n_bytes = useful(self.once.n_bytes / self.run.epochs, self.run.epochs, R)
        return factor * law.bits(self.once.parameters, n_bytes)

    def error(self, law: Law, R: float) -> float:
        """In log L."""
        return math.log(self.point.bits / self.expected(law, R))


def repeated_points(records: dict[str, dict]) -> list[Repeated]:
    """The runs of several epochs. Where the run of new text was not made in fp32, that in bf16 is
    taken: the one that was made in both ends within 0.001 bits.
    """
    found = []
    for run in [*repeated_runs(), *repeated_pieces_runs()]:
        if run.epochs == 1 or run.name not in records:
            continue
        once = replace(run, epochs=1, in_pieces=False)
        if once.name not in records:
            once = replace(once, dtype="bf16")
        found.append(Repeated(run, make_point(records[once.name]), make_point(records[run.name])))
    return found


def fit_repeats(law: Law, repeated: list[Repeated]) -> float:
    """The R with which the law comes nearest to these runs, by least squares."""

    def squares(R: float) -> float:
        return float(np.sum(np.square([each.error(law, R) for each in repeated])))

    return min(np.geomspace(0.05, 300, 1000).tolist(), key=squares)


def report_repeats(law: Law, records: dict[str, dict]) -> float:
    """Text that repeats. R is fitted to the runs of four epochs whose text is pieces of the books,
    because the beginning of the books is few of them. Those of more epochs test it.
    """
    repeated = repeated_points(records)
    fitted = [each for each in repeated if each.run.in_pieces and each.run.epochs <= MOST_EPOCHS]
    best = fit_repeats(law, fitted)
    print("\n### Text that repeats\n")
    print_row(
        "width",
        "the text",
        "tokens of it",
        "parameters a token",
        "epochs",
        "bits a byte",
        "of new text",
        "the law",
        "R of this run",
    )
    print("|" + "---|" * 9)
    for each in sorted(repeated, key=lambda each: (each.run.in_pieces, each.parameters_per_token)):
        run = each.run
        print_row(
            run.width,
            "pieces" if run.in_pieces else "beginning",
            f"{run.epoch_tokens / 1e6:.2f}M",
            f"{each.parameters_per_token:.2g}",
            run.epochs,
            f"{each.point.bits:.3f}",
            f"{each.once.bits:.3f}",
            f"{each.expected(law, best):.3f}",
            f"{fit_repeats(law, [each]):.2g}",
        )
    without = []
    for left_out in fitted:
        without.append(fit_repeats(law, [each for each in fitted if each is not left_out]))
    print(f"\nR = {best:.2f}; without one of the runs {min(without):.2f} to {max(without):.2f}")
    return best


def draw(records: dict[str, dict], fit: Fit) -> None:
    """The pictures, of the vocabulary that was learned from the books."""
    law = fit.law
    shapes = make_shapes("books_4096")
    points_of = {name: grid_points(records, name, "books_4096") for name in NAMES}
    lines = functools.partial(line_of_budget, law, shapes, points_of["muon"])
    draw_parabolas(points_of, dict(muon=lines), law_points(records))

    budgets = np.geomspace(2e12, 3e15, 40)
    bits = [best_shape(law, shapes, budget)[1] for budget in budgets]
    low, high = [], []
    for budget in budgets:
        expected = [best_shape(other, shapes, budget)[1] for other in fit.others]
        ends = np.percentile(fit.ends(expected), [10, 90])
        low.append(ends[0])
        high.append(ends[1])
    lowest = {}
    for optimizer, points in points_of.items():
        known = sorted({point.budget for point in points})
        best = [min(point.bits for point in points if point.budget == budget) for budget in known]
        lowest[optimizer] = (known, best)
    last = None
    if last_run().name in records:
        last = (last_run().flops, make_point(records[last_run().name]).bits)
    draw_frontier((budgets, bits, low, high), lowest, last)


def report_code(records: dict[str, dict], law: Law) -> None:
    """Another kind of text than the law's, beside the same run on the books."""
    hardness = TEXTS[CODE]["xz_bits"]["1000000"] / TEXTS["books_4096"]["xz_bits"]["1000000"]
    print(f"\n### Code, for which xz needs {hardness:.3f} times as many bits as for the books\n")
    print_row("width", "FLOPs", "steps", "the law, times that", "came", "books", "came / books")
    print("|" + "---|" * 7)
    for run in code_runs():
        if run.name not in records:
            continue
        point = make_point(records[run.name])
        of_books = replace(run, vocabulary="books_4096", dtype="bf16")
        books = make_point(records[of_books.name])
        print_row(
            run.width,
            f"{run.flops:.0e}",
            f"{run.steps:,}",
            f"{hardness * law.bits(point.parameters, point.n_bytes):.3f}",
            f"{point.bits:.3f}",
            f"{books.bits:.3f}",
            f"{point.bits / books.bits:.3f}",
        )


def line_of_budget(law: Law, shapes: list[Shape], points: list[Point], budget: float):
    """Parameters and the law's bits a byte over the sizes of a budget's runs, and a little more."""
    sizes = [point.parameters for point in points if point.budget == budget]
    xs, ys = [], []
    for shape in shapes:
        if min(sizes) / 1.3 < shape.parameters < max(sizes) * 1.3:
            xs.append(shape.parameters)
            ys.append(law.bits(shape.parameters, budget / shape.flops_per_byte))
    return xs, ys


def report_expected(name: str, fit: Fit, parameters: float, n_bytes: float):
    """What the law says of a run that it was not fitted to."""
    ends = spread(fit.ends([other.bits(parameters, n_bytes) for other in fit.others]), digits=4)
    print(f"\n{name}: {fit.law.bits(parameters, n_bytes):.3f} bits a byte ({ends}).")


def report_outside(records: dict[str, dict], fit: Fit) -> None:
    """Runs that the law was not fitted to."""
    print("\n### Not in the fit\n")
    print_row("run", "the law", "came")
    print("|" + "---|" * 3)
    fitted = law_points(records)
    for run in grid_runs():
        if run.optimizer == "muon" and run.name in records:
            point = make_point(records[run.name])
            if point not in fitted:
                expected = fit.law.bits(point.parameters, point.n_bytes)
                print_row(run.name, f"{expected:.3f}", f"{point.bits:.3f}")
    for run in [*between_runs(), last_run()]:
        parameters = run.size.block_parameters + (VOCABULARIES[run.vocabulary] + 2) * run.width
        tokens = run.steps * run.tokens_a_step
        n_bytes = tokens * TEXTS[run.vocabulary]["bytes_per_token"]
        report_expected(run.name, fit, parameters, n_bytes)
        if run.name in records:
            print(f"It came to {make_point(records[run.name]).bits:.3f}.")

    # The run of config/books.py, made before: its last validation.
    for line in (HERE.parent / "books" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "val":
            books = record["val_bpb"]
    size = SIZES[256]
    parameters = size.block_parameters + (VOCABULARIES["books"] + 2) * size.n_embd
    n_bytes = 3_000 * 4_096 * TEXTS["books"]["bytes_per_token"]
    report_expected("results/books, 1.4e15 FLOPs", fit, parameters, n_bytes)
    print(f"It came to {books:.3f}.")

    parameters = 12 * (12 * 768**2 + 13 * 768) + (50_304 + 2) * 768
    n_bytes = 1e10 * TEXTS["books"]["bytes_per_token"]
    report_expected("124M parameters on 10B tokens of such books", fit, parameters, n_bytes)


def main() -> None:
    torch.set_num_threads(1)  # for a dozen numbers at a time
    records = read_records()
    fit = report_law(records)
    for optimizer in NAMES:
        report_minima(records, optimizer)
    report_muon(records)
    report_ten_times(records)
    dial = dict(law=fit.law._asdict(), useful_repeats=report_repeats(fit.law, records))
    dial["xz_bits"] = TEXTS["books_4096"]["xz_bits"]
    report_outside(records, fit)
    report_code(records, fit.law)
    stored = dict(dial=dial, bootstraps=[list(other) for other in fit.others])
    (HERE / "law.json").write_text(json.dumps(stored, indent=1) + "\n")
    draw(records, fit)


if __name__ == "__main__":
    main()
