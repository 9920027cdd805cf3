"""The figures of the study of Muon, from its runs' metrics: python results/muon/summary.py

The runs final_OPTIMIZER_STEPS_SEED are those that count. The others are the search for their rates.
"""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Run(NamedTuple):
    settings: dict
    steps: list[int]  # of the validations
    losses: list[float]  # validation losses at these steps
    ms: float  # the median time of a step


def read_run(file: Path) -> Run:
    steps = []
    losses = []
    times = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "run":
            settings = record["settings"]
        elif record["kind"] == "val":
            steps.append(record["step"])
            losses.append(record["loss"])
        elif record["kind"] == "train":
            times.append(record["ms"])
    return Run(settings, steps, losses, ms=statistics.median(times))


def find_crossing(run: Run, target: float) -> float:
    """The step at which the losses, joined by straight lines, first reach the target; NaN if they
    do not.
    """
    for i in range(1, len(run.steps)):
        if run.losses[i] <= target:
            share = (run.losses[i - 1] - target) / (run.losses[i - 1] - run.losses[i])
            return run.steps[i - 1] + share * (run.steps[i] - run.steps[i - 1])
    return math.nan


def print_row(*cells) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def print_runs(runs: dict[str, Run]) -> None:
    print(
        "| run | learning rate | Muon's | momentum | beta2 | seed | steps "
        "| validation loss | ms a step |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        settings = run.settings
        muon_rate = ""
        momentum = ""
        if settings["optimizer"] == "muon":
            muon_rate = settings["muon_learning_rate"]
            momentum = settings["muon_momentum"]
        print_row(
            name,
            settings["learning_rate"],
            muon_rate,
            momentum,
            settings["beta2"],
            settings["seed"],
            run.steps[-1],
            f"{run.losses[-1]:.4f}",
            f"{run.ms:.0f}",
        )


def print_comparison(runs: dict[str, Run]) -> None:
    """For each seed, the steps that Muon takes to AdamW's last loss."""
    print(
        "\n| seed | AdamW's last loss | at step | Muon is there at | of the steps "
        "| Muon with half the steps ends at |"
    )
    print("|---|---|---|---|---|---|")
    shares = []
    for seed in (1, 2, 3):
        adamw = runs.get(f"final_adamw_1000_{seed}")
        muon = runs.get(f"final_muon_1000_{seed}")
        half = runs.get(f"final_muon_500_{seed}")
        if adamw is None or muon is None:
            continue
        target = adamw.losses[-1]
        crossing = find_crossing(muon, target)
        share = crossing / adamw.steps[-1]
        shares.append(share)
        print_row(
            seed,
            f"{target:.4f}",
            adamw.steps[-1],
            f"{crossing:.0f}",
            f"{share:.3f}",
            f"{half.losses[-1]:.4f}" if half else "",
        )
    if shares:
        print(
            f"\nMuon needs {statistics.mean(shares):.3f} of the tokens, "
            f"from {min(shares):.3f} to {max(shares):.3f}."
        )


def main() -> None:
    runs = {}
    for file in sorted(HERE.glob("*/metrics.jsonl")):
        runs[file.parent.name] = read_run(file)
    print_runs(runs)
    print_comparison(runs)


if __name__ == "__main__":
    main()
