"""A run's results in Markdown: report.md, and the card in each checkpoint."""

import datetime
import json
from pathlib import Path
from textwrap import indent

import numpy as np

from parts.console import printable
from parts.metrics import PUBLISHED, evenly, of_kind, read_metrics, tokens_seen, updates


def report(folder: Path) -> Path:
    """Write report.md into a run's folder, with the pictures that exist there; return its path."""
    records, path = read_metrics(folder / "metrics.jsonl"), folder / "report.md"
    shown = "\n".join(
        f"\n![{name}]({name}.svg)"
        for name in ("loss", "training")
        if (folder / f"{name}.svg").exists()
    )
    text = sections(folder.resolve().name, records, max(map(updates, records)), shown)
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def card(folder: Path, step: int) -> str:
    """The README.md of a run's checkpoint of this step: the report up to there, below the header
    that the hub reads.
    """
    from huggingface_hub import ModelCardData

    records = [
        record for record in read_metrics(folder / "metrics.jsonl") if updates(record) <= step
    ]
    started, name = of_kind(records, "run")[-1], folder.resolve().name
    origin, dataset = started["settings"]["init_from"], started["data"]["source"].get("dataset")
    facts = dict(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"])
    facts["datasets"] = [dataset] if dataset else None
    facts["base_model"] = f"openai-community/{origin}" if origin.startswith("gpt2") else None
    use = f'transformers.pipeline("text-generation", model=".")({started["settings"]["sample_prompt"]!r})'
    body = sections(name, records, step, f"\nIn Python, in this folder:\n\n    {use}")
    return f"---\n{ModelCardData(**facts).to_yaml()}\n---\n\n{body}"


def sections(name: str, records: list[dict], n_steps: int, more: str) -> str:
    """A run's results after n_steps in Markdown, with `more` below the table."""
    started = of_kind(records, "run")[-1]
    table = [("", ""), ("---", "---"), *results(records, n_steps).items()]
    lines = [f"# {name}", "", *(f"| {left} | {right} |" for left, right in table), more]
    for title, kind, key in (
        ("Validation loss", "val", "loss"),
        ("HellaSwag, acc_norm", "hellaswag", "acc_norm"),
    ):
        if scored := of_kind(records, kind, key):
            lines += ["", f"## {title}", ""]
            lines += [
                f"* step {record['step']:,}: {record[key]:.4f}" for record in evenly(scored, 12)
            ]
    # Indented text is shown as it is: unlike a fence, nothing in it can end the block.
    for record in evenly(of_kind(records, "sample"), 4):
        lines += [
            "",
            f"## Sample after {record['step']:,} steps",
            "",
            indent(printable(record["text"]), " " * 4),
        ]
    lines += ["", "## Reproduce", "", indent(started["command"], " " * 4), ""]
    lines += ["<details><summary>Machine, versions, data and all settings</summary>", ""]
    return "\n".join([*lines, indent(json.dumps(started, indent=2), " " * 4), "", "</details>", ""])


def results(records: list[dict], n_steps: int) -> dict[str, str]:
    """The rows of the table of results after n_steps."""
    started, tokens = of_kind(records, "run")[-1], int(tokens_seen(records, n_steps))
    settings = started["settings"]
    rows = {name: f"`{settings[name]}`" for name in ("data_dir", "init_from")}
    rows |= {
        "parameters": f"{started['parameters']:,}",
        "steps": f"{n_steps:,} of {settings['max_steps']:,}",
    }
    rows |= {"tokens": f"{tokens:,}", "compute": f"{started['flops_per_token'] * tokens:.3g} FLOPs"}
    if train := of_kind(records, "train", "loss"):
        rows["training loss"] = f"{train[-1]['loss']:.4f} (step {train[-1]['step']:,})"
        # ms is the mean of the steps since the record before.
        n_timed = np.diff([record["step"] for record in train], prepend=records[0]["step"] - 1)
        time = datetime.timedelta(
            seconds=round(n_timed @ [record["ms"] / 1000 for record in train])
        )
        device = started["device"].removeprefix("cuda:0, ")
        rows["training time (h:mm:ss)"] = f"{time} on {started['world_size']} x {device}"
        rows["tokens/s (median)"] = (
            f"{np.median([record['tokens_per_s'] for record in train]):,.0f}"
        )
    if val := of_kind(records, "val", "loss"):
        best = min(val, key=lambda record: record["loss"])
        rows["validation loss"] = (
            f"{val[-1]['loss']:.4f} (best: {best['loss']:.4f} at step {best['step']:,})"
        )
    if val := of_kind(records, "val", "val_bpb"):
        rows["validation, bits a byte"] = f"{val[-1]['val_bpb']:.4f} ({started['tokenizer']})"
    if scores := of_kind(records, "hellaswag"):
        _, published = PUBLISHED[scores[-1].get("style", "completion")]["gpt2"]
        rows["HellaSwag (acc_norm)"] = f"{scores[-1]['acc_norm']:.4f} (GPT-2 124M: {published})"
    if mfu := [record["mfu"] for record in of_kind(records, "train", "mfu")]:
        rows["MFU (median)"] = f"{np.median(mfu):.1%}"
    return rows
