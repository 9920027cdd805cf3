"""Reports made from metrics.jsonl: report.md of a run, and the model card of a checkpoint.

Each record has a step and a kind: `run` (a start or resume), `train`, `val`, `hellaswag`, `sample`, `note` or
`checkpoint`. The report omits values that an old or damaged record does not have.
"""

import contextlib
import json
import math
import re
from pathlib import Path

import numpy as np

import data

# Dollars for an hour of one device. This is a guess at the rent: put in your own price.
DOLLARS_PER_HOUR = {"cuda": 3.0, "cpu": 0.1}

# The acc_norm of OpenAI's GPT-2 124M.
GPT2_HELLASWAG = 0.2955

# Rows in the table of the validation losses, at most (the best is added).
ROWS = 12

# Expected types of the fields that are not numbers.
TYPES = {"settings": (dict,), "text": (str,)}


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl, without damaged lines. An empty list if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and {"step", "kind"} <= record.keys() and type(record["step"]) is int:
                records.append(record)
    return records


def of_kind(records: list[dict], kind: str, *names: str) -> list[dict]:
    """The records of this kind that have all these fields with the right type: a number, or what TYPES says."""

    def whole(record: dict) -> bool:
        return all(type(record.get(name)) in TYPES.get(name, (int, float)) for name in names)

    return [record for record in records if record["kind"] == kind and whole(record)]


def batch_sizes(records: list[dict]) -> dict[int, int]:
    """Tokens a step, by the step at which a run was started or went on. (A batch may change with --resume_anyway.)"""
    found = {r["step"]: r["settings"].get("total_batch_size") for r in of_kind(records, "run", "settings")}
    return {step: tokens for step, tokens in found.items() if type(tokens) is int and 0 < tokens < 2**53}


def tokens_seen(batches: dict[int, int], updates):
    """Tokens after so many updates (an int or an array), by `batch_sizes`; before the first start, with its batch."""
    starts = [0, *sorted(batches)[1:]]
    sizes = [batches[step] for step in sorted(batches)]
    return sum(n * np.clip(updates - a, 0, b - a) for n, a, b in zip(sizes, starts, [*starts[1:], math.inf]))


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a report. Each is a list of Markdown lines, empty if there is nothing to report.


def summary(records: list[dict], run: dict, n_steps: int) -> list[str]:
    """One sentence about the model, and a table of the results after n_steps."""
    settings, steps = run.get("settings", {}), of_kind(records, "train", "loss")
    tokens = int(tokens_seen(batch_sizes(records), n_steps))
    rows = {"steps": f"{n_steps:,} of {settings.get('max_steps', n_steps):,}", "tokens": f"{tokens:,}"}
    if steps:
        rows["training loss"] = f"{steps[-1]['loss']:.4f} (step {steps[-1]['step']:,})"
    if vals := of_kind(records, "val", "loss"):
        best = min(vals, key=lambda record: record["loss"])
        rows["validation loss"] = f"{vals[-1]['loss']:.4f} (step {vals[-1]['step']:,})"
        rows["validation loss"] += f", best {best['loss']:.4f} (step {best['step']:,})" if best != vals[-1] else ""
    if scores := of_kind(records, "hellaswag", "acc_norm"):
        of = f" of {scores[-1]['n']:,}" if "n" in scores[-1] else ""
        rows["HellaSwag"] = f"{scores[-1]['acc_norm']:.4f}{of} (acc_norm; GPT-2: {GPT2_HELLASWAG})"
    if "flops_per_token" in run:
        rows["compute"] = f"{run['flops_per_token'] * tokens:.3g} FLOPs"
    text = f"A GPT of {run['parameters']:,} parameters" if "parameters" in run else "A GPT"
    if (begun := settings.get("init_from", "scratch")) != "scratch":
        text += f", initialised from {begun}"
    text += f", trained on {settings.get('data_dir', 'some text')}"
    text += f" ({run['tokenizer']} tokens)." if "tokenizer" in run else "."
    return [text, *table(("", ""), rows.items()), *cost(records, run)]


def cost(records: list[dict], run: dict) -> list[str]:
    """Time of training, speed, and what the devices may have cost."""
    seconds = device_seconds = 0.0
    last, devices = -1, 1
    for record in records:
        if record["kind"] == "run":  # a start or a resume
            last, devices = record["step"] - 1, record.get("world_size", 1)
        elif of_kind([record], "train", "ms"):  # the mean of the steps since the record before
            spent = record["ms"] * (record["step"] - last) / 1000
            seconds, device_seconds, last = seconds + spent, device_seconds + devices * spent, record["step"]
    if not seconds:
        return []
    size, unit = (3600, "hours") if seconds >= 7200 else (60, "minutes") if seconds >= 120 else (1, "seconds")
    text = f"{seconds / size:.1f} {unit} of training (without evaluation) on {machine(run)}"
    for name, words in (("tokens_per_s", "{:,.0f} tokens/s"), ("mfu", "MFU {:.1%}")):
        if values := sorted(record[name] for record in of_kind(records, "train", name)):
            text += ", " + words.format(values[len(values) // 2])
    price = DOLLARS_PER_HOUR.get(re.split("[:,]", str(run.get("device")))[0], 0)
    if (paid := device_seconds / 3600 * price) >= 0.01:
        text += f"; about ${paid:,.2f} at ${price:.2f} an hour for each device"
    return ["", text + "."]


def machine(run: dict) -> str:
    name = re.sub(r"^\w+:\d+, ", "", str(run.get("device", "an unknown device")))  # without "cuda:0, "
    return f"{run.get('world_size', 1)} x {name}"


def curve_table(records: list[dict]) -> list[str]:
    """Validation loss and HellaSwag by step: the first, the last, the best, and some between."""
    vals = {record["step"]: record["loss"] for record in of_kind(records, "val", "loss")}
    scores = {record["step"]: record["acc_norm"] for record in of_kind(records, "hellaswag", "acc_norm")}
    columns = {name: found for name, found in (("validation loss", vals), ("HellaSwag", scores)) if found}
    if not columns:
        return []
    steps = sorted({*vals, *scores})
    evenly = {steps[round(i * (len(steps) - 1) / (ROWS - 1))] for i in range(ROWS)}
    shown = sorted(evenly | ({min(vals, key=vals.get)} if vals else set()))
    rows = [
        [f"{step:,}", *(f"{found[step]:.4f}" if step in found else "" for found in columns.values())] for step in shown
    ]
    return ["", "## Validation", *table(("step", *columns), rows)]


def samples(records: list[dict]) -> list[str]:
    """Text that the model wrote during training: the first, the last, and two between."""
    found = of_kind(records, "sample", "text")
    chosen = [found[i] for i in sorted({round(i * (len(found) - 1) / 3) for i in range(4)})] if found else []
    lines = ["", "## Samples"] if chosen else []
    for record in chosen:
        lines += ["", f"After {record['step']:,} steps:", "", *fenced(data.printable(record["text"]))]
    return lines


def notes(records: list[dict]) -> list[str]:
    found = of_kind(records, "note", "text")
    return ["", "## Notes", "", *(f"* step {record['step']:,}: {record['text']}" for record in found)] if found else []


def how(run: dict) -> list[str]:
    """The command, the machine, and every setting."""
    facts = {
        "commit": run.get("commit"),
        "machine": machine(run) if "device" in run else None,
        "precision": f"{run['dtype']}{', compiled' if run.get('compiled') else ''}" if "dtype" in run else None,
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
        "text": ", ".join(f"{name}: {value}" for name, value in flat(run.get("data", {})).items()),
    }
    lines = ["", "## How to reproduce"] if run else []
    lines += ["", *fenced(run["command"])] if "command" in run else []
    lines += table(("", ""), ((name, fact) for name, fact in facts.items() if fact)) if any(facts.values()) else []
    if settings := "\n".join(f"{name} = {value!r}" for name, value in run.get("settings", {}).items()):
        lines += ["", "<details><summary>All settings</summary>", "", *fenced(settings), "", "</details>"]
    return lines


def flat(facts: dict) -> dict:
    """{a: 1, b: {c: 2}} -> {a: 1, c: 2}, without what is null."""
    inner = [flat(value) if isinstance(value, dict) else {name: value} for name, value in facts.items()]
    return {name: value for part in inner for name, value in part.items() if value is not None}


# ----------------------------------------------------------------------------------------------------------------------
# The documents


def write(run: Path) -> Path:
    """Write report.md into a run's folder, with the pictures found there; returns its path. OSError if it cannot."""
    records = read_metrics(run / "metrics.jsonl")
    started = last_run(records)
    # Training records are written after the update of their step, all others before it.
    n_steps = max((record["step"] + (record["kind"] == "train") for record in records), default=0)
    lines = [f"# {run.resolve().name}", "", *summary(records, started, n_steps)]
    for name in ("loss", "training"):
        lines += ["", f"![{name}]({name}.svg)"] if (run / f"{name}.svg").exists() else []
    lines += [*curve_table(records), *samples(records), *notes(records), *how(started)]
    (run / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    return run / "report.md"


USE = """\
from transformers import pipeline

write = pipeline("text-generation", model=".")  # this folder
print(write({prompt!r}, max_new_tokens=50)[0]["generated_text"])"""


def card(run: Path, step: int) -> str:
    """The model card (README.md) of the checkpoint at this step: metadata for the hub, and the report up to there."""
    records = [
        record
        for record in read_metrics(run / "metrics.jsonl")
        if record["step"] < step or (record["step"] == step and record["kind"] != "train")
    ]
    started, name = last_run(records), run.resolve().name
    prompt = started.get("settings", {}).get("sample_prompt", "Hello")
    lines = [*header(records, name, started), "", f"# {name}", "", *summary(records, started, step)]
    lines += ["", *fenced(USE.format(prompt=prompt), "python")]
    return "\n".join([*lines, *curve_table(records), *samples(records), *how(started)]) + "\n"


def header(records: list[dict], name: str, run: dict) -> list[str]:
    """The metadata at the top of a model card: https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import EvalResult, ModelCardData

    content = dict(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"])
    if dataset := run.get("data", {}).get("source", {}).get("dataset"):
        content["datasets"] = [dataset]
    if (begun := str(run.get("settings", {}).get("init_from"))).startswith("gpt2"):
        content["base_model"] = f"openai-community/{begun}"
    if scores := of_kind(records, "hellaswag", "acc_norm"):
        score = round(scores[-1]["acc_norm"], 4)
        result = EvalResult("text-generation", "hellaswag", "HellaSwag", metric_type="acc_norm", metric_value=score)
        content |= dict(model_name=name, eval_results=[result])
    return ["---", ModelCardData(**content).to_yaml(), "---"]


def last_run(records: list[dict]) -> dict:
    """The record of the last start or resume; {} if there is none."""
    runs = of_kind(records, "run", "settings")
    return runs[-1] if runs else {}


def table(head: tuple[str, ...], rows) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)]


def fenced(text: str, language: str = "text") -> list[str]:
    """A code block. Its fence is longer than any run of backquotes in the text."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, text, fence]
