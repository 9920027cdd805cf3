#!/usr/bin/env bash
# datasets types all columns of JSON lines by the first 10 MB: a later row with one more key is an error, even
# where only another column is wanted.
set -e
site=$(mktemp -d); trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install -q --target "$site" datasets==5.2.0 pyarrow==26.0.1
cd "$site" && HF_HUB_OFFLINE=1 HF_HOME="$site" PYTHONPATH="$site" "${PYTHON:-python3}" - <<'PY'
import json
import datasets

rows = [{"text": "word " * 400, "n": i} for i in range(9000)]
rows[8000]["more"] = "one more key"
open("rows.json", "w").write("".join(json.dumps(row) + "\n" for row in rows))
stream = datasets.load_dataset("json", data_files="rows.json", split="train", streaming=True)
n = 0
try:
    for row in stream:
        n += 1
    error = ""
except Exception as caught:
    error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:100]}"
print(f"datasets {datasets.__version__}: {n} of 9000 rows, then {error or 'the end'}")
raise SystemExit(0 if error and n < 9000 else 1)
PY
