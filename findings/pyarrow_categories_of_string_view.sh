#!/usr/bin/env bash
# polars writes categories to Arrow as a dictionary of string_view, which pyarrow reads, but can
# neither cast to text or bytes nor write to Parquet. Casting the dictionary first works.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --target "$folder" polars==2.1.0 pyarrow==26.0.1
PYTHONPATH=$folder "${PYTHON:-python3}" - <<'PYTHON'
import io
import sys

import polars
import pyarrow
import pyarrow.ipc

file = io.BytesIO()
column = polars.Series("text", ["a", "b", "a", None], dtype=polars.Categorical)
polars.DataFrame(column).write_ipc(file)
array = pyarrow.ipc.open_file(file.getvalue()).get_batch(0).column(0)
print("polars", polars.__version__, "pyarrow", pyarrow.__version__, array.type)
for type_ in (pyarrow.string(), pyarrow.large_binary()):
    try:
        array.cast(type_)
    except pyarrow.ArrowNotImplementedError as error:
        print(f"cast to {type_}: {error}")
    else:
        sys.exit(f"cast to {type_}: works now")
texts = array.dictionary.cast(pyarrow.string()).take(array.indices)
print("the dictionary's cast, and take:", texts.to_pylist())
assert texts.to_pylist() == ["a", "b", "a", None]
PYTHON
