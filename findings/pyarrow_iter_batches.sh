#!/usr/bin/env bash
# pyarrow's ParquetFile.iter_batches(1000) spans row groups for strings, but ends a batch at each row group for
# dictionary columns (pandas' categories). Who counts batches counts other things.
set -e
site=$(mktemp -d); trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install -q --target "$site" pyarrow==26.0.1
cd "$site" && PYTHONPATH="$site" "${PYTHON:-python3}" - <<'PY'
import pyarrow as pa
import pyarrow.parquet as pq

texts = pa.array([f"text {i}" for i in range(3000)])
sizes = {}
for name, column in {"string": texts, "dictionary": texts.dictionary_encode()}.items():
    pq.write_table(pa.table({"text": column}), "a.parquet", row_group_size=700)
    sizes[name] = [batch.num_rows for batch in pq.ParquetFile("a.parquet").iter_batches(1000)]
print(f"pyarrow {pa.__version__}: {sizes}")
raise SystemExit(0 if sizes["string"][0] == 1000 and sizes["dictionary"][0] == 700 else 1)
PY
