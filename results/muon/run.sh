#!/bin/bash
# The study of Muon: as many runs to tune AdamW as to tune Muon, then three seeds of the two best.
#
#     bash results/muon/run.sh FOLDER_OF_TEXT_OR_PARQUET...
#
# Each run's metrics.jsonl is copied to results/muon/NAME. A run whose copy exists is not repeated.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
[ -d shards/books_4096 ] || $python prepare.py "$@" --out shards/books_4096 --tokenizer 4096

# run NAME SETTINGS...
run() {
	local name=$1
	shift
	[ -e "results/muon/$name/metrics.jsonl" ] && return
	$python train.py results/muon/study.py --out_dir="out/muon/$name" --dtype=bf16 --flash=False "$@"
	mkdir -p "results/muon/$name"
	cp "out/muon/$name/metrics.jsonl" "results/muon/$name/"
}

# The search: five runs each of 300 steps.
short="--max_steps=300 --warmup_steps=30 --eval_every=100 --seed=1"
muon="--optimizer=muon --muon_learning_rate"
for rate in 1e-3 2e-3 3e-3 4e-3; do
	run "tune_adamw_$rate" $short --learning_rate=$rate
done
run tune_adamw_2e-3_0.99 $short --learning_rate=2e-3 --beta2=0.99
for rate in 2e-3 4e-3 8e-3; do
	run "tune_muon_1e-2_$rate" $short $muon=1e-2 --learning_rate=$rate
done
run tune_muon_2e-2_4e-3 $short $muon=2e-2 --learning_rate=4e-3
run tune_muon_1e-2_4e-3_0.9 $short $muon=1e-2 --learning_rate=4e-3 --muon_momentum=0.9

# The best of each, three seeds; and Muon with half the steps.
best="$muon=1e-2 --learning_rate=4e-3 --muon_momentum=0.9"
for seed in 1 2 3; do
	run "final_adamw_1000_$seed" --learning_rate=2e-3 --seed=$seed
	run "final_muon_500_$seed" $best --seed=$seed --max_steps=500 --warmup_steps=50
	run "final_muon_1000_$seed" $best --seed=$seed
done
$python results/muon/summary.py
