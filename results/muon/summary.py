"""The figures of the study of Muon, from its runs' metrics: python results/muon/summary.py

final_OPTIMIZER_STEPS_SEED are the runs that count, the others the search for their rates.
"""

import json
import math
import statistics
from pathlib import Path

HERE = Path(__file__).parent


def read(folder: Path) -> dict:
    """Settings, steps and validation losses, and the median time of a step in ms."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    val = [record for record in records if record["kind"] == "val"]
    ms = statistics.median(record["ms"] for record in records if record["kind"] == "train")
    settings = next(record["settings"] for record in records if record["kind"] == "run")
    return dict(
        settings=settings, steps=[r["step"] for r in val], losses=[r["loss"] for r in val], ms=ms
    )


def crossing(steps: list[int], losses: list[float], target: float) -> float:
    """The step at which the losses, joined by straight lines, first reach the target; NaN if they
    do not.
    """
    for i in range(1, len(steps)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return math.nan


def main() -> None:
    runs = {path.parent.name: read(path.parent) for path in sorted(HERE.glob("*/metrics.jsonl"))}
    print(
        "| run | learning rate | Muon's | momentum | beta2 | seed | steps | validation loss | ms a step |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        settings, muon = run["settings"], run["settings"]["optimizer"] == "muon"
        rates = [
            settings["learning_rate"],
            *(settings[f"muon_{what}"] if muon else "" for what in ("learning_rate", "momentum")),
        ]
        row = [name, *rates, settings["beta2"], settings["seed"], run["steps"][-1]]
        print("| " + " | ".join(map(str, row)) + f" | {run['losses'][-1]:.4f} | {run['ms']:.0f} |")

    print(
        "\n| seed | AdamW's last loss | at step | Muon is there at | of the steps | Muon with half the steps ends at |"
    )
    print("|---|---|---|---|---|---|")
    shares = []
    for seed in (1, 2, 3):
        adamw, muon, half = (
            runs.get(f"final_{run}_{seed}") for run in ("adamw_1000", "muon_1000", "muon_500")
        )
        if adamw and muon:
            steps, target = adamw["steps"][-1], adamw["losses"][-1]
            there = crossing(muon["steps"], muon["losses"], target)
            shares.append(there / steps)
            last = f"{half['losses'][-1]:.4f}" if half else ""
            print(
                f"| {seed} | {target:.4f} | {steps} | {there:.0f} | {there / steps:.3f} | {last} |"
            )
    if shares:
        print(
            f"\nMuon needs {statistics.mean(shares):.3f} of the tokens, from {min(shares):.3f} to {max(shares):.3f}."
        )


if __name__ == "__main__":
    main()
