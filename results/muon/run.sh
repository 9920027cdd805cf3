#!/bin/bash
# The study of Muon: rates for AdamW and for Muon with the same number of runs, then three seeds of the two best.
#
#     bash results/muon/run.sh FOLDER_OF_TEXT_OR_PARQUET...
#
# Each run's metrics.jsonl is copied to results/muon/NAME; a run that is there already is not repeated.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
[ -d shards/books_4096 ] || $python prepare.py "$@" --out shards/books_4096 --tokenizer 4096

run() { # run NAME SETTINGS...
	local name=$1
	shift
	[ -e "results/muon/$name/metrics.jsonl" ] && return
	$python train.py results/muon/study.py --out_dir="out/muon/$name" --resume=never "$@"
	mkdir -p "results/muon/$name"
	cp "out/muon/$name/metrics.jsonl" "results/muon/$name/"
}
