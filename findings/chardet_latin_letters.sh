#!/usr/bin/env bash
# chardet takes short texts in cp1252 for encodings of Hebrew, DOS or Macintosh. Its confidence
# says so: it is below 0.1 for these, and above for the texts that it knows.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --target "$folder" chardet==7.7.0
PYTHONPATH=$folder "${PYTHON:-python3}" - <<'PYTHON'
import sys

import chardet

TEXTS = [
    "Les élèves étaient là; n° 5, à côté\n",
    "a temperature of 25° and 20 £\n",
    "plain “quoted” text – it’s fine\n",
    "über Größe, Maß und Fluß\n",
]
print("chardet", chardet.__version__)
n_wrong = 0
for text in TEXTS:
    block = text.encode("cp1252") * 50
    guess = chardet.detect(block)
    decoded = block.decode(guess["encoding"], errors="replace")[: len(text)]
    n_wrong += decoded != text
    print(f"{guess['encoding']:14} {guess['confidence']:.3f} {decoded!r}")
    if guess["confidence"] >= 0.1:
        sys.exit("more confident than it was")
sys.exit(0 if n_wrong >= 2 else "fewer texts are wrong than there were")
PYTHON
