"""The law of the scaling study, from runs.jsonl alone.

    python results/scaling/fit.py      # prints the tables, writes law.json and the pictures

For each vocabulary and optimizer, the last validation loss L of a run with N parameters and D
tokens is fitted by the form of Hoffmann and others (2022, arXiv 2203.15556),

    L(N, D) = E + A / N^alpha + B / D^beta

in nats a token, by minimising the Huber loss (delta 1e-3) of the difference in log L with L-BFGS
from many starts, as they do. Errors are the 10th and the 90th percentile of 100 fits to runs drawn
with replacement.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from grid import BLOCK_SIZE, SIZES, VOCABULARIES, Size, grid_runs

HERE = Path(__file__).parent
HUBER_DELTA = 1e-3
N_BOOTSTRAPS = 100
PUBLISHED = {
    "Kaplan 2020": "N grows as C^0.73 (without embeddings)",
    "Hoffmann 2022": "N grows as C^0.50, about 20 tokens a parameter (with embeddings)",
}


# ---- The runs ------------------------------------------------------------------------------------


class Point(NamedTuple):
    """What a run gives the law."""

    width: int
    budget: float  # FLOPs
    seed: int
    blocks: float  # parameters in the blocks, as Kaplan counts
    parameters: float  # with the embeddings, without the positions, as train.py's FLOPs count them
    tokens: float
    loss: float  # nats a token
    bits_per_byte: float


def read_records(file: Path = HERE / "runs.jsonl") -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def make_point(record: dict) -> Point:
    size = Size(record["n_layer"], record["n_head"], record["n_embd"])
    _, loss, bits_per_byte = record["validations"][-1]
    embeddings = record["embedding_rows"] * size.n_embd + 2 * size.n_embd
    return Point(
        width=size.n_embd,
        budget=record["budget"],
        seed=record["seed"],
        blocks=size.block_parameters,
        parameters=size.block_parameters + embeddings,
        tokens=record["tokens"],
        loss=loss,
        bits_per_byte=bits_per_byte,
    )


def group_points(records: list[dict]) -> dict[tuple[str, str], list[Point]]:
    """The runs of the grid by (vocabulary, optimizer)."""
    names = {run.name for run in grid_runs()}
    points = defaultdict(list)
    for record in records:
        if record["name"] in names:
            points[record["vocabulary"], record["optimizer"]].append(make_point(record))
    return dict(points)


# ---- The form ------------------------------------------------------------------------------------


class Law(NamedTuple):
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters, tokens):
        """Nats a token; for numbers or arrays."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


def fit_law(points: list[Point], starts: list[Law] | None = None) -> Law:
    """The law with the smallest Huber loss, from the best of many starts."""
    sizes = torch.tensor([point.parameters for point in points], dtype=torch.float64)
    tokens = torch.tensor([point.tokens for point in points], dtype=torch.float64)
    targets = torch.tensor([point.loss for point in points], dtype=torch.float64).log()
    if starts is None:
        starts = []
        for floor, exponent, at_once in itertools.product((0.5, 1.5, 2.5), (0.3, 0.6), (2, 6)):
            A = at_once * 1e6**exponent
            starts.append(Law(floor, A, exponent, A, exponent))

    def objective(free: torch.Tensor) -> torch.Tensor:
        log_E, log_A, log_B, alpha, beta = free
        terms = [
            log_E.expand_as(sizes),
            log_A - alpha * sizes.log(),
            log_B - beta * tokens.log(),
        ]
        difference = torch.logsumexp(torch.stack(terms), 0) - targets
        zeros = torch.zeros_like(difference)
        loss = F.huber_loss(difference, zeros, delta=HUBER_DELTA, reduction="sum")
        return loss / HUBER_DELTA**2  # of the size of 1, for the search's tolerances

    best = math.inf
    law = starts[0]
    for start in starts:
        logs = [math.log(start.E), math.log(start.A), math.log(start.B)]
        free = torch.tensor([*logs, start.alpha, start.beta], dtype=torch.float64)
        minimise(objective, free)
        reached = objective(free).item()
        if reached < best:
            best = reached
            log_E, log_A, log_B, alpha, beta = free.tolist()
            law = Law(math.exp(log_E), math.exp(log_A), alpha, math.exp(log_B), beta)
    return law


def minimise(objective: Callable[[torch.Tensor], torch.Tensor], free: torch.Tensor) -> None:
    """Move the free numbers to a minimum of the objective near them, by L-BFGS."""
    free.requires_grad_(True)
    search = torch.optim.LBFGS(
        [free],
        max_iter=2_000,
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


def spread(values: list[float]) -> str:
    """The 10th to the 90th percentile."""
    low, high = np.percentile(values, [10, 90])
    return f"{low:.3g} to {high:.3g}"


# ---- The frontier --------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A model between those of the grid: its width is not rounded."""

    width: float
    parameters: float
    blocks: float
    flops_per_token: float


def make_shapes(rows: int) -> list[Shape]:
    """The grid's family of shapes in steps of 1 % of the width, from 48 to 1,024."""
    known_widths = np.log(list(SIZES))
    known_layers = np.log([size.n_layer for size in SIZES.values()])
    slope = (known_layers[-1] - known_layers[0]) / (known_widths[-1] - known_widths[0])
    shapes = []
    for log_width in np.arange(math.log(48), math.log(1_024), 0.01):
        log_layers = np.interp(log_width, known_widths, known_layers)
        if log_width > known_widths[-1]:
            log_layers = known_layers[-1] + slope * (log_width - known_widths[-1])
        width = math.exp(log_width)
        layers = math.exp(log_layers)
        blocks = layers * (12 * width**2 + 13 * width)
        parameters = blocks + 2 * width + rows * width
        attention = 12 * layers * width * BLOCK_SIZE
        shapes.append(Shape(width, parameters, blocks, 6 * parameters + attention))
    return shapes


def best_shape(law: Law, shapes: list[Shape], budget: float) -> tuple[Shape, float]:
    """The shape with the smallest loss for so many FLOPs, and that loss."""
    losses = [law.loss(shape.parameters, budget / shape.flops_per_token) for shape in shapes]
    best = int(np.argmin(losses))
    return shapes[best], losses[best]


def parabola(points: list[Point], x: str) -> tuple[float, float] | None:
    """The size with the smallest loss among runs of one budget, and that loss, by a parabola over
    the logarithm of the size; None if they do not enclose a minimum.
    """
    if len(points) < 3:
        return None
    logs = np.log([getattr(point, x) for point in points])
    losses = [point.loss for point in points]
    a, b, c = np.polyfit(logs, losses, 2)
    vertex = -b / (2 * a)
    if a <= 0 or not logs.min() < vertex < logs.max():
        return None
    return math.exp(vertex), c - b**2 / (4 * a)


# ---- Muon against AdamW --------------------------------------------------------------------------


def shares_of_tokens(adamw: list[Point], muon: list[Point]) -> dict[int, list[tuple[float, float]]]:
    """Width -> (budget, share): of the tokens of the longest AdamW run of that width, the share
    after which Muon would have reached its loss.

    The losses of Muon's runs of this width, joined by straight lines over the logarithm of the
    tokens, are crossed with AdamW's loss at each budget that lies between them.
    """
    shares = defaultdict(list)
    for width in SIZES:
        line = sorted((point.tokens, point.loss) for point in muon if point.width == width)
        if len(line) < 2:
            continue
        log_tokens = np.log([tokens for tokens, _ in line])
        losses = np.array([loss for _, loss in line])
        for point in sorted(adamw, key=lambda point: point.budget):
            if point.width == width and losses.min() <= point.loss <= losses.max():
                crossing = np.interp(-point.loss, -losses, log_tokens)
                shares[width].append((point.budget, math.exp(crossing) / point.tokens))
    return dict(shares)


# ---- All of it -----------------------------------------------------------------------------------


def print_row(*cells) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def report_law(vocabulary: str, optimizer: str, points: list[Point]) -> dict:
    """Print a law and its frontier; what law.json keeps of it."""
    law = fit_law(points)
    laws = bootstrap(points, law)
    errors = [law.loss(point.parameters, point.tokens) - point.loss for point in points]
    rms = math.sqrt(sum(error**2 for error in errors) / len(errors))
    print(f"\n### {vocabulary}, {optimizer}: {len(points)} runs\n")
    print_row("", *Law._fields)
    print("|" + "---|" * 6)
    print_row("fit", *(f"{value:.4g}" for value in law))
    percentiles = []
    for field in Law._fields:
        percentiles.append(spread([getattr(other, field) for other in laws]))
    print_row("10 % to 90 %", *percentiles)
    print(f"\nThe runs lie {rms:.3f} nats (root mean square) from it.\n")

    shapes = make_shapes(VOCABULARIES[vocabulary])
    print_row("FLOPs", "width", "parameters in blocks", "in all", "tokens", "a parameter", "loss")
    print("|" + "---|" * 7)
    budgets = (3e12, 1e13, 3e13, 1e14, 3e14, 1e15, 3e15)
    for budget in budgets:
        shape, loss = best_shape(law, shapes, budget)
        tokens = budget / shape.flops_per_token
        others = [best_shape(other, shapes, budget)[1] for other in laws]
        print_row(
            f"{budget:.0e}",
            f"{shape.width:.0f}",
            f"{shape.blocks / 1e6:.2f}M",
            f"{shape.parameters / 1e6:.2f}M",
            f"{tokens / 1e6:.1f}M",
            f"{tokens / shape.parameters:.0f}",
            f"{loss:.3f} ({spread(others)})",
        )
    for x, who in (("blocks", "Kaplan"), ("parameters", "Hoffmann")):
        minima = []
        for budget in sorted({point.budget for point in points}):
            minimum = parabola([point for point in points if point.budget == budget], x)
            if minimum:
                minima.append((budget, minimum[0]))
        if len(minima) >= 2:
            logs = np.log(minima)
            slope = np.polyfit(logs[:, 0], logs[:, 1], 1)[0]
            sizes = ", ".join(f"{size / 1e6:.2f}M at {budget:.0e}" for budget, size in minima)
            print(
                f"\nMinima of the parabolas, counted as {who}: {sizes}; N grows as C^{slope:.2f}."
            )
    return dict(
        vocabulary=vocabulary,
        optimizer=optimizer,
        runs=len(points),
        **law._asdict(),
        rms_nats=rms,
        bootstraps=[list(other) for other in laws],
    )


def report_muon(points: dict[tuple[str, str], list[Point]]) -> None:
    for vocabulary in VOCABULARIES:
        adamw = points.get((vocabulary, "adamw"), [])
        muon = points.get((vocabulary, "muon"), [])
        shares = shares_of_tokens(adamw, muon)
        if not shares:
            continue
        print(f"\n### {vocabulary}: of AdamW's tokens, Muon needs for the same loss\n")
        print_row("width", "FLOPs of AdamW: share")
        print("|---|---|")
        for width, row in shares.items():
            cells = ", ".join(f"{budget:.0e}: {share:.2f}" for budget, share in row)
            print_row(width, cells)


def main() -> None:
    points = group_points(read_records())
    laws = []
    for (vocabulary, optimizer), runs in sorted(points.items()):
        if len(runs) >= 8:
            laws.append(report_law(vocabulary, optimizer, runs))
    report_muon(points)
    (HERE / "law.json").write_text(json.dumps(laws, indent=1) + "\n")


if __name__ == "__main__":
    main()
