"""What a run was and what came of it, read from its metrics.jsonl: the records."""

import contextlib
import json
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl, without a line that is not whole; none if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and {"step", "kind"} <= record.keys():
                records.append(record)
    return records
