"""What a run was and what came of it, told from its metrics.jsonl: report.md, and the model card of a checkpoint.

A run's records have a step and a kind each: `run` (how it was started), `train`, `val`, `hellaswag`, `sample`, `note`
and `checkpoint`. What a record lacks, because it is old or damaged, the report leaves out.
"""

import contextlib
import json
from pathlib import Path

# What an hour of one device costs, in dollars: a guess at what one pays for renting it, to be replaced by your own.
DOLLARS_PER_HOUR = {"cuda": 3.0, "cpu": 0.1}

# The acc_norm of OpenAI's GPT-2 124M.
GPT2_HELLASWAG = 0.2955

# So many rows a table of a report has at most.
ROWS = 12


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl, without a line that is not whole; none if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and {"step", "kind"} <= record.keys() and type(record["step"]) is int:
                records.append(record)
    return records


def of_kind(records: list[dict], kind: str, *names: str) -> list[dict]:
    """The records of that kind in which these values are there, and not null."""
    return [record for record in records if record["kind"] == kind and all(record.get(n) is not None for n in names)]


# ----------------------------------------------------------------------------------------------------------------------
# The parts: each a list of lines of Markdown, none where there is nothing to say


def summary(records: list[dict], run: dict) -> list[str]:
    """One sentence, and a table of what came of it."""
    settings, steps = run.get("settings", {}), of_kind(records, "train", "loss", "ms")
    if not steps:
        return ["No step was logged."]
    n_steps = steps[-1]["step"] + 1
    tokens = n_steps * settings.get("total_batch_size", 0)
    rows = {"steps": f"{n_steps:,} of {settings.get('max_steps', n_steps):,}", "tokens": f"{tokens:,}"}
    rows["training loss"] = f"{steps[-1]['loss']:.4f} at the last step"
    if vals := of_kind(records, "val", "loss"):
        best = min(vals, key=lambda record: record["loss"])
        rows["validation loss"] = (
            f"{vals[-1]['loss']:.4f} at the last, {best['loss']:.4f} at best (step {best['step']:,})"
        )
    if scores := of_kind(records, "hellaswag", "acc_norm"):
        last = scores[-1]
        rows["HellaSwag"] = f"{last['acc_norm']:.4f} of {last.get('n', 0):,} (acc_norm; GPT-2: {GPT2_HELLASWAG})"
    if "flops_per_token" in run:
        rows["computed"] = f"{run['flops_per_token'] * tokens:.3g} FLOPs"
    what = f"A GPT of {run['parameters']:,} parameters" if "parameters" in run else "A GPT"
    text = f"{what}, trained on {settings.get('data_dir', 'some text')} ({run.get('tokenizer', 'gpt2')} tokens)."
    return [text, *table(("", ""), rows.items()), *cost(steps, run)]


def cost(steps: list[dict], run: dict) -> list[str]:
    """Hours of training and of devices, and what those may have cost."""
    # Each record has the mean of the steps since the one before.
    before = [-1, *(record["step"] for record in steps[:-1])]
    hours = sum(record["ms"] * (record["step"] - last) for record, last in zip(steps, before)) / 3.6e6
    devices, kind = run.get("world_size", 1), str(run.get("device", "")).split(":")[0].split(",")[0]
    speed = sorted(record["tokens_per_s"] for record in of_kind(steps, "train", "tokens_per_s"))
    where = f"{devices} x {run.get('device', 'an unknown device')}"
    text = f"{hours:.2f} hours of training (evaluation not counted) on {where}"
    text += f", {speed[len(speed) // 2]:,.0f} tokens/s" if speed else ""
    if mfu := [record["mfu"] for record in of_kind(steps, "train", "mfu")]:
        text += f", {sorted(mfu)[len(mfu) // 2]:.1%} of the data sheet's FLOP/s"
    if kind in DOLLARS_PER_HOUR:
        price = DOLLARS_PER_HOUR[kind]
        dollars = hours * devices * price
        paid = f"about ${dollars:,.2f}" if dollars >= 0.01 else "less than a cent"
        text += f"; {paid} if one costs ${price:.2f} an hour"
    return ["", text + "."]


def curve_table(records: list[dict]) -> list[str]:
    """Validation loss and HellaSwag by step: the first, the last, the best, and some between."""
    found = {}
    for kind, name in (("val", "loss"), ("hellaswag", "acc_norm")):
        for record in of_kind(records, kind, name):
            found.setdefault(record["step"], {})[kind] = record[name]
    if not found:
        return []
    steps = sorted(found)
    evenly = {steps[round(i * (len(steps) - 1) / (ROWS - 1))] for i in range(ROWS)}
    vals = {step: row["val"] for step, row in found.items() if "val" in row}
    shown = sorted(evenly | ({min(vals, key=vals.get)} if vals else set()))
    rows = [
        [f"{step:,}", *(f"{found[step][k]:.4f}" if k in found[step] else "" for k in ("val", "hellaswag"))]
        for step in shown
    ]
    return ["", "## Validation", *table(("step", "validation loss", "HellaSwag"), rows)]


def samples(records: list[dict]) -> list[str]:
    """What it wrote on the way: the first, the last, and some between."""
    found = of_kind(records, "sample", "text")
    chosen = [found[i] for i in sorted({round(i * (len(found) - 1) / 3) for i in range(4)})] if found else []
    lines = ["", "## Samples"] if chosen else []
    for record in chosen:
        lines += ["", f"After {record['step']:,} steps:", "", *fenced(record["text"])]
    return lines


def notes(records: list[dict]) -> list[str]:
    found = of_kind(records, "note", "text")
    return ["", "## Noted", "", *(f"* step {record['step']:,}: {record['text']}" for record in found)] if found else []


def how(run: dict) -> list[str]:
    """The command, what it ran on, and every setting."""
    facts = {
        "commit": run.get("commit"),
        "machine": f"{run.get('world_size', 1)} x {run['device']}" if "device" in run else None,
        "precision": f"{run['dtype']}{', compiled' if run.get('compiled') else ''}" if "dtype" in run else None,
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
        "text": ", ".join(f"{name}: {value}" for name, value in flat(run.get("data", {})).items()),
    }
    lines = ["", "## To do it again"] if run else []
    lines += ["", *fenced(run["command"])] if "command" in run else []
    lines += table(("", ""), ((name, fact) for name, fact in facts.items() if fact)) if any(facts.values()) else []
    if settings := "\n".join(f"{name} = {value!r}" for name, value in run.get("settings", {}).items()):
        lines += ["", "<details><summary>All settings</summary>", "", *fenced(settings, "python"), "", "</details>"]
    return lines


def flat(facts: dict) -> dict:
    """{a: 1, b: {c: 2}} -> {a: 1, c: 2}, without what is null."""
    inner = [flat(value) if isinstance(value, dict) else {name: value} for name, value in facts.items()]
    return {name: value for part in inner for name, value in part.items() if value is not None}


# ----------------------------------------------------------------------------------------------------------------------
# The documents


def write(run: Path) -> Path:
    """report.md in a run's folder, with the pictures that are there; returns its path. OSError if it cannot."""
    records = read_metrics(run / "metrics.jsonl")
    started = last_run(records)
    pictures = [f"![{name}]({name}.svg)" for name in ("loss", "training") if (run / f"{name}.svg").exists()]
    lines = [f"# {run.resolve().name}", "", *summary(records, started)]
    for picture in pictures:
        lines += ["", picture]
    lines += [*curve_table(records), *samples(records), *notes(records), *how(started)]
    (run / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run / "report.md"


USE = """\
from transformers import pipeline

write = pipeline("text-generation", model=".")  # this folder
print(write({prompt!r}, max_new_tokens=50)[0]["generated_text"])"""


def card(run: Path, step: int) -> str:
    """README.md for the checkpoint of that step: the same, up to there, behind the header that the hub reads."""
    # The loss of a step is that of the update which follows it.
    records = [
        record
        for record in read_metrics(run / "metrics.jsonl")
        if record["step"] < step or (record["step"] == step and record["kind"] != "train")
    ]
    started, name = last_run(records), run.resolve().name
    prompt = started.get("settings", {}).get("sample_prompt", "Hello")
    lines = [*header(records, name, started.get("data", {}).get("source", {})), "", f"# {name}", ""]
    lines += [*summary(records, started), "", *fenced(USE.format(prompt=prompt), "python")]
    return "\n".join([*lines, *curve_table(records), *samples(records), *how(started)]) + "\n"


def header(records: list[dict], name: str, source: dict) -> list[str]:
    """The card's data in YAML (JSON is YAML too): https://huggingface.co/docs/hub/model-cards."""
    content = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2"]}
    if "dataset" in source:
        content["datasets"] = [source["dataset"]]
    if scores := of_kind(records, "hellaswag", "acc_norm"):
        content["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "hellaswag", "name": "HellaSwag"},
                        "metrics": [{"type": "acc_norm", "value": round(scores[-1]["acc_norm"], 4)}],
                    }
                ],
            }
        ]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in content.items()), "---"]


def last_run(records: list[dict]) -> dict:
    """How the run was started, the last time; nothing where that is not told."""
    runs = of_kind(records, "run", "settings")
    return runs[-1] if runs else {}


def table(head: tuple[str, ...], rows) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)]


def fenced(text: str, language: str = "text") -> list[str]:
    """A block of code, whatever backquotes are in it."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, text, fence]
