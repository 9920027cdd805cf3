"""A run's metrics.jsonl, read and shown: report.md, and the model card of a checkpoint.

Each record has a step and a kind: `run` (how the run was started), `train`, `val`, `hellaswag`, `sample`, `note` or
`checkpoint`. A report leaves out whatever an old or damaged record lacks.
"""

import contextlib
import json
import math
import re
from pathlib import Path

import numpy as np

import data

GPT2_HELLASWAG = 0.2955  # acc_norm of OpenAI's GPT-2 124M


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl, without damaged lines; empty if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and {"step", "kind"} <= record.keys() and type(record["step"]) is int:
                records.append(record)
    return records


def of_kind(records: list[dict], kind: str, *names: str) -> list[dict]:
    """The records of this kind in which none of these values is missing or null (a NaN is logged as null)."""
    return [r for r in records if r["kind"] == kind and all(r.get(name) is not None for name in names)]


def last_run(records: list[dict]) -> dict:
    """How the run was started or resumed the last time; empty if no record says so."""
    return (of_kind(records, "run", "settings") or [{}])[-1]


def tokens_seen(records: list[dict], updates):
    """Tokens after this many updates (an int or an array); --resume_anyway may have changed the batch on the way."""
    batches = {r["step"]: r["settings"].get("total_batch_size", 0) for r in of_kind(records, "run", "settings")}
    starts = [0, *sorted(batches)[1:]]  # steps before the first record, of another run, count with its batch
    sizes = [batches[step] for step in sorted(batches)]
    return sum(n * np.clip(updates - a, 0, b - a) for n, a, b in zip(sizes, starts, [*starts[1:], math.inf]))


def summary(records: list[dict], n_steps: int) -> list[str]:
    """The table of results after n_steps, as lines of Markdown (like all sections below)."""
    run, tokens = last_run(records), int(tokens_seen(records, n_steps))
    settings = run.get("settings", {})
    rows = {name: f"`{settings[name]}`" for name in ("data_dir", "init_from") if name in settings}
    if "parameters" in run:
        rows["parameters"] = f"{run['parameters']:,}"
    rows |= {"steps": f"{n_steps:,} of {settings.get('max_steps', n_steps):,}", "tokens": f"{tokens:,}"}
    if train := of_kind(records, "train", "loss"):
        rows["training loss"] = f"{train[-1]['loss']:.4f} (step {train[-1]['step']:,})"
    if val := of_kind(records, "val", "loss"):
        best = min(val, key=lambda record: record["loss"])
        rows["validation loss"] = f"{val[-1]['loss']:.4f} (best: {best['loss']:.4f} at step {best['step']:,})"
    if scores := of_kind(records, "hellaswag", "acc_norm"):
        rows["HellaSwag (acc_norm)"] = f"{scores[-1]['acc_norm']:.4f} (GPT-2 124M: {GPT2_HELLASWAG})"
    if timed := of_kind(records, "train", "ms"):  # ms is the mean of the steps since the last record
        first = min((record["step"] for record in of_kind(records, "run")), default=0)
        n_timed = np.diff([record["step"] for record in timed], prepend=first - 1)
        device = f"{run.get('world_size', 1)} x {str(run.get('device')).removeprefix('cuda:0, ')}"
        rows["training time"] = f"{duration(n_timed @ [record['ms'] / 1000 for record in timed])} on {device}"
    for name, label, form in (("tokens_per_s", "tokens/s", ",.0f"), ("mfu", "MFU", ".1%")):
        if values := [record[name] for record in of_kind(records, "train", name)]:
            rows[f"{label} (median)"] = format(np.median(values), form)
    if "flops_per_token" in run:
        rows["compute"] = f"{run['flops_per_token'] * tokens:.3g} FLOPs"
    return table(("", ""), rows.items())


def duration(seconds: float) -> str:
    unit, size = ("hours", 3600) if seconds >= 7200 else ("minutes", 60) if seconds >= 120 else ("seconds", 1)
    return f"{seconds / size:,.1f} {unit}"


def curve_table(records: list[dict]) -> list[str]:
    """Validation loss and HellaSwag at twelve steps, from the first to the last."""
    val = {record["step"]: record["loss"] for record in of_kind(records, "val", "loss")}
    scores = {record["step"]: record["acc_norm"] for record in of_kind(records, "hellaswag", "acc_norm")}
    columns = {name: found for name, found in (("validation loss", val), ("HellaSwag", scores)) if found}
    steps = evenly(sorted({*val, *scores}), 12)
    rows = [[f"{s:,}", *(f"{c[s]:.4f}" if s in c else "" for c in columns.values())] for s in steps]
    return ["", "## Validation", *table(("step", *columns), rows)] if rows else []


def samples(records: list[dict]) -> list[str]:
    lines = []
    for record in evenly(of_kind(records, "sample", "text"), 4):
        lines += ["", f"After {record['step']:,} steps:", "", *fenced(data.printable(record["text"]))]
    return ["", "## Samples", *lines] if lines else []


def reproduce(run: dict) -> list[str]:
    """The command, what is known of code, machine and data, and all settings in the form of a config file."""
    shown_elsewhere = ("step", "kind", "settings", "command")
    facts = {name: str(value) for name, value in run.items() if name not in shown_elsewhere and value is not None}
    settings = "\n".join(f"{name} = {value!r}" for name, value in run.get("settings", {}).items())
    lines = ["", *fenced(run.get("command", "")), *table(("", ""), facts.items())]
    lines += ["", "<details><summary>All settings</summary>", "", *fenced(settings), "", "</details>"]
    return ["", "## Reproduce", *lines] if run else []


def evenly(items: list, n: int) -> list:
    """At most n of the items, evenly spaced, with the first and the last."""
    return [items[i] for i in sorted({round(k * (len(items) - 1) / (n - 1)) for k in range(n)})] if items else []


def table(head: tuple[str, ...], rows) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)]


def fenced(text: str, language: str = "text") -> list[str]:
    """A code block with a fence longer than any row of backquotes in the text."""
    fence = "`" * max(3, *(len(quotes) + 1 for quotes in re.findall("`+", text)), 0)
    return [fence + language, text, fence]


def write(run: Path) -> Path:
    """Write report.md into a run's folder, with the pictures that exist there; return its path. OSError if it fails."""
    records = read_metrics(run / "metrics.jsonl")
    # A train record follows the update of its step; all other records come before it.
    n_steps = max((record["step"] + (record["kind"] == "train") for record in records), default=0)
    lines = [f"# {run.resolve().name}", *summary(records, n_steps)]
    for name in ("loss", "training"):
        lines += ["", f"![{name}]({name}.svg)"] if (run / f"{name}.svg").exists() else []
    notes = [f"* step {record['step']:,}: {record['text']}" for record in of_kind(records, "note", "text")]
    lines += [*curve_table(records), *samples(records), *(["", "## Notes", "", *notes] if notes else [])]
    lines += [*reproduce(last_run(records)), ""]
    (run / "report.md").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    return run / "report.md"


def card(run: Path, step: int) -> str:
    """The README.md of the checkpoint of this step: the report up to there, below the header that the hub reads."""
    records = read_metrics(run / "metrics.jsonl")
    records = [r for r in records if r["step"] < step or (r["step"] == step and r["kind"] != "train")]
    started, name = last_run(records), run.resolve().name
    prompt = started.get("settings", {}).get("sample_prompt", "Hello")
    use = f"""\
from transformers import pipeline

generate = pipeline("text-generation", model=".")  # this folder
print(generate({prompt!r}, max_new_tokens=50)[0]["generated_text"])"""
    lines = ["---", card_data(records, name), "---", "", f"# {name}", *summary(records, step)]
    lines += ["", *fenced(use, "python"), *curve_table(records), *samples(records), *reproduce(started), ""]
    return "\n".join(lines)


def card_data(records: list[dict], name: str) -> str:
    """The card's metadata in YAML: https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import EvalResult, ModelCardData

    facts = dict(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"])
    if dataset := last_run(records).get("data", {}).get("source", {}).get("dataset"):
        facts["datasets"] = [dataset]
    if (origin := str(last_run(records).get("settings", {}).get("init_from"))).startswith("gpt2"):
        facts["base_model"] = f"openai-community/{origin}"
    if scores := of_kind(records, "hellaswag", "acc_norm"):
        facts["model_name"], score = name, scores[-1]["acc_norm"]
        facts["eval_results"] = [EvalResult("text-generation", "hellaswag", "HellaSwag", "acc_norm", score)]
    return ModelCardData(**facts).to_yaml()
