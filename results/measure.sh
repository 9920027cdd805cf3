#!/bin/bash
# Everything worth measuring on a machine with a GPU:
#
#     bash results/measure.sh results/h200 [hellaswag_val.jsonl] [folder of GPT-2 shards]
#
# JSON files, pictures, and, with shards, 150 steps of the 124M recipe with their report go into that folder.
# `python bench.py show FILE` makes tables of the JSON files. Written for some ten minutes on one H200, where nobody has
# run it yet.
set -u
cd "$(dirname "$0")/.."
out=$1 tasks=${2:-} shards=${3:-}
mkdir -p "$out"

python -m pytest -q tests/test_model.py -k cuda | tee "$out/tests.txt"
python bench.py sample --json > "$out/sample_1.json"
python bench.py sample --batch 32 --json > "$out/sample_32.json"
python bench.py train --batch_size 64 --steps 10 --rounds 1 --compile --json > "$out/train.json"
python bench.py ladder --batch_size 16 --steps 5 --rounds 1 --json --chart "$out/ladder.svg" > "$out/ladder.json"
python bench.py memory --json > "$out/memory.json"
if [ -n "$tasks" ]; then
	python bench.py hellaswag --data "$tasks" --limit 0 --rounds 1 --json > "$out/hellaswag.json"
fi
if [ -n "$shards" ]; then
	python train.py --data_dir="$shards" --out_dir="$out/124M" --max_steps=150 --warmup_steps=30 --eval_every=50 \
		--eval_tokens=1048576 --hellaswag_every=0 --sample_every=50 --checkpoint_every=0
fi
