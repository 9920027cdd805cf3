"""The figures of the study of Muon, from its runs' metrics: python results/muon/summary.py

A run's folder is named by optimizer, what was tried, and seed.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent


def curve(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and validation losses."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    pairs = [(record["step"], record["loss"]) for record in records if record["kind"] == "val"]
    return [step for step, _ in pairs], [loss for _, loss in pairs]


def crossing(steps, losses, target: float) -> float:
    """The step at which the losses, joined by straight lines, first reach the target."""
    for i in range(1, len(steps)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return float("nan")


def main():
    print("| run | steps | final validation loss |\n|---|---|---|")
    for folder in sorted(path.parent for path in HERE.glob("*/metrics.jsonl")):
        steps, losses = curve(folder)
        print(f"| {folder.name} | {steps[-1]:,} | {losses[-1]:.4f} |")
