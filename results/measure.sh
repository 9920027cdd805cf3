#!/bin/bash
# Everything worth measuring on a machine with a GPU, in some eight minutes:  bash results/measure.sh results/h200
#
# Its JSON files and the ladder's picture go into that folder; `python bench.py show FILE` makes tables of them.
set -u
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"

python -m pytest -q tests/test_model.py -k cuda | tee "$out/tests.txt"
python bench.py sample --json > "$out/sample_1.json"
python bench.py sample --batch 32 --json > "$out/sample_32.json"
python bench.py train --batch_size 64 --steps 10 --rounds 1 --compile --json > "$out/train.json"
python bench.py ladder --batch_size 16 --steps 10 --rounds 1 --json --chart "$out/ladder.svg" > "$out/ladder.json"
