"""A run's results in Markdown: report.md, and the card in each checkpoint."""

if __name__ == "__main__":
    raise SystemExit("parts/report.py is no command: README.md lists the commands")

import datetime
import json
from pathlib import Path
from textwrap import indent

from parts.console import printable
from parts.files import write_whole
from parts.metrics import (
    is_count,
    pick_evenly,
    published_score,
    read_metrics,
    select,
    tokens_seen,
    updates_done,
)

import numpy as np

# Indented text is shown as it is: unlike a fence, nothing in the text can end the block.
VERBATIM = " " * 4


def write_markdown(folder: Path) -> Path:
    """Write report.md into the folder of a run, with the pictures that are there; return its path.

    ValueError if there is no record of a run.
    """
    records = read_metrics(folder / "metrics.jsonl")
    if not select(records, "run"):
        raise ValueError(f"{folder}: no run in a metrics.jsonl here")
    n_steps = max(updates_done(record) for record in records)
    pictures = []
    for name in ("loss", "training"):
        if (folder / f"{name}.svg").exists():
            pictures.append(f"\n![{name}]({name}.svg)")
    text = format_run(folder.resolve().name, records, n_steps, below_table="\n".join(pictures))
    path = folder / "report.md"
    write_whole(path, text.encode("utf-8", errors="replace"))
    return path


def is_reported(folder: Path) -> bool:
    """Whether report.md was written after the last record. A report that its reader has edited
    since then counts too, and so does a folder without records: there is nothing to report. One
    whose pictures could not be drawn has an old date.
    """
    metrics = folder / "metrics.jsonl"
    report = folder / "report.md"
    if not metrics.exists():
        return True
    return report.exists() and report.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def make_card(folder: Path, step: int, departure: str = "") -> str:
    """The README.md of a run's checkpoint of this step: the header that the hub reads, and below it
    the report up to this step.

    departure: how the model differs from a GPT-2, in words; then only this project opens it.
    """
    from huggingface_hub import ModelCardData

    records = read_metrics(folder / "metrics.jsonl")
    records = [record for record in records if updates_done(record) <= step]
    run = select(records, "run")[-1]
    header: dict = dict(pipeline_tag="text-generation")
    if not departure:
        header.update(library_name="transformers", tags=["gpt2"])
    source = (run.get("data") or {}).get("source") or {}
    if source.get("dataset"):
        header["datasets"] = [source["dataset"]]
    init_from = str(run["settings"].get("init_from"))
    if init_from.startswith("gpt2"):
        header["base_model"] = f"openai-community/{init_from}"
    prompt = run["settings"].get("sample_prompt", "")
    code = f'transformers.pipeline("text-generation", model=".")({prompt!r})'
    usage = f"\nIn Python, in this folder:\n\n{VERBATIM}{code}"
    if departure:
        usage = f"\nThis is not a GPT-2: {departure}. Its model.py is in this folder."
    body = format_run(folder.resolve().name, records, step, below_table=usage)
    return f"---\n{ModelCardData(**header).to_yaml()}\n---\n\n{body}"


def format_run(name: str, records: list[dict], n_steps: int, below_table: str) -> str:
    """The results of a run after n_steps in Markdown."""
    run = select(records, "run")[-1]
    lines = [f"# {name}", "", "|  |  |", "| --- | --- |"]
    for left, right in summarize(records, n_steps).items():
        lines.append(f"| {left} | {right} |")
    lines.append(below_table)
    lines += format_history("Validation loss", select(records, "val", "loss"), "loss")
    lines += format_history(
        "HellaSwag, acc_norm", select(records, "hellaswag", "acc_norm"), "acc_norm"
    )
    for record in pick_evenly(select(records, "sample", "text"), 4):
        text = indent(printable(record["text"]), VERBATIM)
        lines += ["", f"## Sample after {record['step']:,} steps", "", text]
    lines += ["", "## Reproduce", "", indent(run.get("command") or "unknown", VERBATIM), ""]
    lines += ["<details><summary>Machine, versions, data and all settings</summary>", ""]
    lines += [indent(json.dumps(run, indent=2), VERBATIM), "", "</details>", ""]
    return "\n".join(lines)


def format_history(title: str, records: list[dict], key: str) -> list[str]:
    """A section with at most twelve values of the key; no lines if there are no records."""
    if not records:
        return []
    lines = ["", f"## {title}", ""]
    for record in pick_evenly(records, 12):
        lines.append(f"* step {record['step']:,}: {record[key]:.4f}")
    return lines


def summarize(records: list[dict], n_steps: int) -> dict[str, str]:
    """The rows of the table of results after n_steps."""
    run = select(records, "run")[-1]
    settings = run["settings"]
    tokens = int(tokens_seen(records, n_steps))
    rows = {}
    for name in ("data_dir", "init_from"):
        if name in settings:
            rows[name] = f"`{settings[name]}`"
    if run.get("parameters") is not None:
        rows["parameters"] = f"{run['parameters']:,}"
    rows["steps"] = f"{n_steps:,}"
    if is_count(settings.get("max_steps")):
        rows["steps"] += f" of {settings['max_steps']:,}"
    rows["tokens"] = f"{tokens:,}"
    if run.get("flops_per_token") is not None:
        rows["compute"] = f"{run['flops_per_token'] * tokens:.3g} FLOPs"

    train = select(records, "train", "loss")
    if train:
        rows["training loss"] = f"{train[-1]['loss']:.4f} (step {train[-1]['step']:,})"
    timed = select(records, "train", "loss", "ms", "tokens_per_s")
    if timed:
        # The ms of a record is the mean over the steps since the record before.
        n_timed = np.diff([record["step"] for record in timed], prepend=records[0]["step"] - 1)
        seconds = n_timed @ [record["ms"] / 1000 for record in timed]
        time = datetime.timedelta(seconds=round(seconds))
        device = (run.get("device") or "unknown").removeprefix("cuda:0, ")
        rows["training time (h:mm:ss)"] = f"{time} on {run.get('world_size') or 1} x {device}"
        speed = np.median([record["tokens_per_s"] for record in timed])
        rows["tokens/s (median)"] = f"{speed:,.0f}"

    val = select(records, "val", "loss")
    if val:
        best = min(val, key=lambda record: record["loss"])
        rows["validation loss"] = (
            f"{val[-1]['loss']:.4f} (best: {best['loss']:.4f} at step {best['step']:,})"
        )
    val = select(records, "val", "val_bpb")
    if val:
        rows["validation, bits a byte"] = f"{val[-1]['val_bpb']:.4f} ({run.get('tokenizer')})"

    if run.get("expected_bpb"):
        rows["expected, bits a byte"] = f"{run['expected_bpb']} (docs/scaling.md)"

    scores = select(records, "hellaswag", "acc_norm")
    if scores:
        published = published_score(scores[-1])
        rows["HellaSwag (acc_norm)"] = f"{scores[-1]['acc_norm']:.4f} (GPT-2 124M: {published})"

    mfu = [record["mfu"] for record in select(records, "train", "mfu")]
    if mfu:
        rows["MFU (median)"] = f"{np.median(mfu):.1%}"
    return rows
