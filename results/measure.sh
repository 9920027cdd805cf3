#!/bin/bash
# Everything worth measuring on a machine with a GPU of 16 GB or more:
#
#     bash results/measure.sh results/h200 [hellaswag_val.jsonl] [folder of GPT-2 shards]
#
# JSON files, pictures, and, with shards, 150 steps of the 124M recipe with their report go into that folder.
# `python bench.py show FILE` makes tables of the JSON files. A measurement that fails is named at the end and in log.txt;
# the others go on. Written for some fifteen minutes on one H200, where nobody has run it yet.
set -u
cd "$(dirname "$0")/.."
out=$1 tasks=${2:-} shards=${3:-} python=${PYTHON:-python} failed=
mkdir -p "$out"
exec 2> >(tee -a "$out/log.txt" >&2)

keep() { # keep NAME COMMAND...: the command's output as this file, which is there as soon as it is whole
	local name=$1
	shift
	if timeout 1800 "$@" > "$out/$name.part"; then
		mv "$out/$name.part" "$out/$name"
	else
		failed="$failed $name"
	fi
}
bench() { # bench NAME ARGUMENTS...
	local name=$1
	shift
	keep "$name.json" "$python" bench.py "$@" --json
}

keep tests.txt "$python" -m pytest -q tests/test_model.py -k cuda
bench memory memory
bench sample_1 sample
bench sample_32 sample --batch 32
bench train train --batch_size 8 --steps 10 --rounds 1 --compile # transformers needs 13 GB for it
bench train_64 train --batch_size 64 --steps 10 --rounds 1 --compile
bench ladder_4 ladder --steps 5 --rounds 1
bench ladder ladder --batch_size 16 --steps 5 --rounds 1 # the lecture's
[ -z "$tasks" ] || bench hellaswag hellaswag --data "$tasks" --limit 0
if [ -n "$shards" ]; then
	keep train.txt "$python" train.py --data_dir="$shards" --out_dir="$out/124M" --batch_size=auto \
		--max_steps=150 --warmup_steps=30 --eval_every=50 --eval_tokens=1048576 --hellaswag_every=0 --sample_every=50 \
		--checkpoint_every=0
fi
[ -z "$failed" ] || echo "failed (see $out/log.txt):$failed" >&2
