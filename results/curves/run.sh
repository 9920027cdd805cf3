#!/bin/bash
# One curve by three programs: 300 steps in float32 from the same weights on the same batches.
#
#     bash results/curves/run.sh NANOGPT
#
# NANOGPT is a clone of github.com/karpathy/nanoGPT. The text is in shards/books.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
small="--n_layer=4 --n_embd=64 --block_size=128 --batch_size=8 --total_batch_size=1024
--max_steps=300 --warmup_steps=30 --dtype=fp32 --pad_vocab=False --compile=False --resume=never
--log_every=1 --eval_every=0 --hellaswag_every=0 --sample_every=0 --checkpoint_every=0
--report=False"
adamw="--optimizer=adamw --learning_rate=1e-3"
out=out/curves

$python train.py config/books.py $small --out_dir=$out/muon/ours
$python tests/reference.py $out/muon/ours $out/muon/transformers | tail -1
$python train.py config/books.py $small $adamw --out_dir=$out/adamw/ours
$python tests/reference.py $out/adamw/ours $out/adamw/transformers | tail -1
$python results/curves/nanogpt.py "$1" $out/adamw/ours $out/adamw/nanoGPT
# What still differs is nanoGPT's exact GELU, which a run from its checkpoint has too.
$python train.py config/books.py $small $adamw \
	--init_from=$out/adamw/nanoGPT/ckpt.pt --out_dir=$out/exact/ours
$python - $out/exact/ours $out/adamw/nanoGPT <<'END'
import sys
from pathlib import Path

from parts.metrics import read_metrics, select

ours, theirs = (select(read_metrics(Path(run, "metrics.jsonl")), "train") for run in sys.argv[1:])
differences = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)]
print(f"with the exact GELU in both: {max(differences):.2e}")
END
$python plot.py $out/adamw/* --out $out
