#!/bin/sh
# tokenizers 0.19 (transformers 4.44) does not read merges written as ["a", "b"], as versions from
# 0.20 on write them. All versions read "a b".
# Exits non-zero if the behaviour has changed.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" tokenizers==0.19.1
PYTHONPATH=$site "$PYTHON" - <<'END'
import json

import tokenizers

found = {}
for merge in ("a b", ["a", "b"]):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [merge]}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model}))
        found[str(merge)] = str(tokenizer.encode("ab").ids)
    except Exception as error:
        found[str(merge)] = type(error).__name__
print(tokenizers.__version__, found)
assert found == {"a b": "[2]", "['a', 'b']": "Exception"}
END
