#!/bin/bash
# One curve by three programs: 300 steps in float32 from the same weights on the same batches.
#
#     bash results/curves/run.sh NANOGPT          a clone of github.com/karpathy/nanoGPT; shards of text in shards/books
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
small="--n_layer=4 --n_embd=64 --block_size=128 --batch_size=8 --total_batch_size=1024 --max_steps=300 --warmup_steps=30
--dtype=fp32 --pad_vocab=False --log_every=1 --eval_every=0 --hellaswag_every=0 --sample_every=0 --checkpoint_every=0
--compile=False --resume=never --report=False"
adamw="--optimizer=adamw --learning_rate=1e-3"
out=out/curves

$python train.py config/books.py $small --out_dir=$out/muon/ours
$python tests/reference.py $out/muon/ours $out/muon/transformers | tail -1
$python train.py config/books.py $small $adamw --out_dir=$out/adamw/ours
$python tests/reference.py $out/adamw/ours $out/adamw/transformers | tail -1
$python results/curves/nanogpt.py "$1" $out/adamw/ours $out/adamw/nanoGPT
# The difference that is left is nanoGPT's exact GELU: the same run from its checkpoint has it too.
$python train.py config/books.py $small $adamw --init_from=$out/adamw/nanoGPT/ckpt.pt --out_dir=$out/exact/ours
$python - $out/exact/ours $out/adamw/nanoGPT <<'END'
import json, sys
ours, theirs = ([json.loads(line).get("loss") for line in open(f"{run}/metrics.jsonl") if '"kind": "train"' in line] for run in sys.argv[1:])
print(f"with the exact GELU in both: {max(abs(a - b) for a, b in zip(ours, theirs)):.2e}")
END
$python plot.py $out/adamw/* --out $out
