#!/bin/bash
# Measure everything that is worth it on a machine with a GPU of 16 GB or more.
#
#     bash results/measure.sh results/h200 [hellaswag_val.jsonl] [folder of GPT-2 shards]
#
# That folder gets JSON files and pictures and, with shards, 150 steps of the 124M recipe with their
# report. `python bench.py show FILE` prints a JSON file as a table. A measurement that fails does
# not stop the others; it is named at the end and in log.txt. Written for some fifteen minutes on
# one H200, where nobody has run it yet.
set -u
cd "$(dirname "$0")/.."
out=$1
tasks=${2:-}
shards=${3:-}
python=${PYTHON:-python}
failed=
mkdir -p "$out"
exec 2> >(tee -a "$out/log.txt" >&2)

# keep NAME COMMAND...   writes the command's output to this file, which appears when it is complete
keep() {
	local name=$1
	shift
	if timeout 1800 "$@" > "$out/$name.part"; then
		mv "$out/$name.part" "$out/$name"
	else
		failed="$failed $name"
	fi
}
# bench NAME ARGUMENTS...
bench() {
	local name=$1
	shift
	keep "$name.json" "$python" bench.py "$@" --json
}

keep tests.txt "$python" -m pytest -q tests/test_model.py -k cuda
bench memory memory
bench sample_1 sample
bench sample_32 sample --batch 32
# transformers needs 13 GB for 8 sequences.
bench train train --batch_size 8 --steps 10 --rounds 1 --compile
bench train_64 train --batch_size 64 --steps 10 --rounds 1 --compile
bench ladder_4 ladder --steps 5 --rounds 1
# The batch of "Let's reproduce GPT-2 (124M)".
bench ladder ladder --batch_size 16 --steps 5 --rounds 1
[ -z "$tasks" ] || bench hellaswag hellaswag --data "$tasks" --limit 0
if [ -n "$shards" ]; then
	keep train.txt "$python" train.py --data_dir="$shards" --out_dir="$out/124M" --batch_size=auto \
		--max_steps=150 --warmup_steps=30 --eval_every=50 --eval_tokens=1048576 \
		--hellaswag_every=0 --sample_every=50 --checkpoint_every=0
fi
[ -z "$failed" ] || echo "failed (see $out/log.txt):$failed" >&2
