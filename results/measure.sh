#!/bin/bash
# Test this project on a machine with NVIDIA GPUs, and measure all that is worth it.
#
#     bash results/measure.sh twelve results/h200    # twelve minutes of one GPU; needs no network
#     bash results/measure.sh hour results/h200      # an hour, on one GPU or on several
#     bash results/measure.sh try out/try            # all parts on a CPU, small: does the script run?
#
# The folder gets, for each part, NAME.out with its figures and NAME.log with the rest, and table.md:
# one table of all figures, renewed after each part. A part that fails or takes too long is named
# there and stops no other. The same command again does what is missing. Nobody has run it on a GPU
# yet; the seconds in brackets are estimates.
#
# In the environment: PYTHON (python3), SHARDS (a folder of GPT-2 shards) and TASKS (HellaSwag's
# hellaswag_val.jsonl) in place of those made up here, MINUTES in all, MOST seconds of a part, GRACE
# (20), the seconds that a part has to end in when its time is over, and WORK (out/measure), where
# shards and checkpoints go: some 10 GB.
set -u
mode=${1:-}
out=${2:-}
case $mode in
twelve) minutes=12 ;;
hour) minutes=60 ;;
try) minutes=20 ;;
*) out= ;;
esac
if [ -z "$out" ]; then
	echo "usage: bash results/measure.sh twelve|hour|try FOLDER" >&2
	exit 2
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
mkdir -p "${WORK:=out/measure}"
work=$(cd "$WORK" && pwd)
deadline=$((SECONDS + 60 * ${MINUTES:-$minutes}))
small=
[ "$mode" = try ] && small=--small
export PYTHONUNBUFFERED=1
# What one part has compiled, the next ones find.
export TORCHINDUCTOR_CACHE_DIR=$work/inductor

# last_line FILE   what it says last, fit for a string of JSON
last_line() {
	grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr -cd '[:print:]' | tr -d '\042\134' | cut -c 1-160
}
# part NAME SECONDS COMMAND...   runs it for at most so long
part() {
	local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) code last
	shift 2
	if grep -qs "\"name\": \"$name\", \"exit\": 0" "$out/parts.jsonl"; then
		return 0
	fi
	if [ "$left" -lt 15 ]; then
		echo "== $name: no time left"
		return 1
	fi
	[ "$limit" -lt "$left" ] || limit=$left
	[ "$limit" -lt "${MOST:-$limit}" ] || limit=${MOST:-$limit}
	echo "== $name (at most $limit s)"
	timeout -k "${GRACE:-20}" "$limit" "$@" > "$out/$name.out" 2> "$out/$name.log"
	code=$?
	# timeout's code for a part that did not end when told to. In less time, somebody else killed it.
	if [ "$code" = 137 ] && [ $((SECONDS - begin)) -ge "$limit" ]; then
		code=124
	fi
	last=$(last_line "$out/$name.log")
	[ -n "$last" ] || last=$(last_line "$out/$name.out")
	[ -s "$out/parts.jsonl" ] && sed -i "/\"name\": \"$name\"/d" "$out/parts.jsonl"
	echo "{\"name\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - begin)), \"last\": \"$last\"}" >> "$out/parts.jsonl"
	[ "$code" = 0 ] || echo "== $name: exit $code (124: cut off); $last"
	"$python" results/on_gpu.py table "$out" > "$out/table.new" 2>> "$out/$name.log" && mv "$out/table.new" "$out/table.md"
	return $code
}
# measure NAME SECONDS ARGUMENTS...   a part of results/on_gpu.py
measure() {
	local name=$1 limit=$2
	shift 2
	part "$name" "$limit" "$python" results/on_gpu.py "$name" "$@" $small
}
# bench NAME SECONDS ARGUMENTS...   bench.py, whose JSON comes at its end
bench() {
	local name=$1 limit=$2
	shift 2
	part "$name" "$limit" "$python" bench.py "$@" --json
}
# run NAME SECONDS SETTINGS...   a run of train.py; its log and its report come here
run() {
	local name=$1 limit=$2
	shift 2
	# The signal at the time limit is for train.py, which then saves and ends.
	# shellcheck disable=SC2016,SC2086 # the inner shell expands; settings in variables are words
	part "$name" "$limit" bash -c '
		trap : TERM
		folder=$1 log=$2; shift 2
		"$@" --out_dir="$folder" >&2; code=$?
		cat "$folder/metrics.jsonl"
		cp "$folder"/report.md "$folder"/*.svg "$folder"/profile.txt "$log" 2> /dev/null
		exit $code' run "$work/$name" "$out" $launcher train.py --data_dir="$shards" $shape "$@"
}

echo "== needs"
if ! "$python" results/on_gpu.py needs $small 2>&1 | tee "$out/needs.out" || grep -q MISSING "$out/needs.out"; then
	echo "Nothing was measured: something is missing, see above." >&2
	exit 2
fi

# Sizes. In `try` all are small, and everything runs on the CPU.
shape=
quiet="--eval_every=0 --hellaswag_every=0 --sample_every=0 --checkpoint_every=0 --report=False --warmup_steps=0"
tokens=262144
gpus=1
if [ "$mode" = try ]; then
	shape="--device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --eval_tokens=256"
	tokens=128
	export GPU_TESTS_DEVICE=cpu OMP_NUM_THREADS=1
	sizes="--size quickstart --batch_size 1 --block_size 32 --steps 1 --device cpu"
	generation="--max_tokens 2 --device cpu"
	ladder=$sizes
else
	gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
	# transformers needs 13 GB for 8 sequences.
	sizes="--batch_size 8 --steps 8"
	generation=
	ladder="--batch_size 16 --steps 5"  # the batch of "Let's reproduce GPT-2 (124M)"
fi
launcher=$python
measure shards 60 "$work/shards"  # [15]
made_up=$work/shards
shards=${SHARDS:-$made_up}
export TASKS=${TASKS:-$made_up/tasks.jsonl}
steps="--total_batch_size=$tokens --max_steps=60 --warmup_steps=10 --min_lr=0"
watched="--eval_every=20 --eval_tokens=1048576 --hellaswag_every=60 --hellaswag_data=$TASKS --sample_every=60
	--sample_tokens=24 --checkpoint_every=60 --keep_checkpoints=1 --log_every=5"
compiled=--compile=True # auto finds that compiling cannot pay in so short a run
if [ "$mode" = try ]; then
	watched="${watched/1048576/256} --hellaswag_limit=4"
	compiled=--compile=False
fi

# shellcheck disable=SC2086 # what follows has settings in variables, a word each
{
	# Is it right? Logits, gradients, compiled code, graphs, kills, two GPUs if there are two. [100]
	part tests 200 "$python" -m pytest -v -p no:cacheprovider -m gpu tests/test_on_gpu.py tests/test_model.py tests/test_inference.py
	# The step of the recipe, and GPT-2 124M learning for 60 of them. [80, 90]
	measure step 150
	run adamw 180 $steps $watched $compiled
	# What the card can do, and what watching costs. [20, 30]
	measure rates 60
	measure watching 90 "$made_up"
	# The kernels that take the time. [40]
	run profile 90 $quiet --total_batch_size=$((tokens / 4)) --max_steps=8 --profile=3 $compiled
	measure attention 60 # [15]
	measure new_shapes 60 # [20]
	measure optimizers 60 # [10]
	if [ "$gpus" -gt 1 ] || [ "$mode" = try ]; then
		launcher="$python -m torch.distributed.run --standalone --nproc_per_node=$((gpus > 1 ? gpus : 2))"
		ranks="$quiet --total_batch_size=$((2 * tokens)) --max_steps=12"
		run ranks 120 $ranks $compiled
		run ranks_sharded 120 $ranks $compiled --shard_optimizer=True
		launcher=$python
	fi
	run muon 150 $steps $watched $compiled --optimizer=muon --learning_rate=1.2e-3 --muon_learning_rate=3e-3 # [70]
	bench train 150 train $sizes --rounds 1 --compile # [90]
	# transformers' cache grows by a token at a time, and cuDNN would plan each length.
	export TORCH_CUDNN_SDPA_DEPRIORITIZED=1
	bench sample_1 90 sample --rounds 1 $generation # [20]
	bench sample_32 90 sample --rounds 1 --batch 32 $generation
	[ "$mode" = try ] || bench hellaswag 90 hellaswag --data "$TASKS" --limit 0 --rounds 1
	unset TORCH_CUDNN_SDPA_DEPRIORITIZED

	if [ "$mode" = hour ]; then
		bench train_64 300 train --batch_size 64 --steps 10 --rounds 1 --compile
		for size in medium large xl; do
			few="$quiet --total_batch_size=65536 --max_steps=5 --compile=True"
			run "$size" 300 config/gpt2_$size.py $few --recompute=True
			if [ "$gpus" -gt 1 ]; then
				launcher="$python -m torch.distributed.run --standalone --nproc_per_node=$gpus"
				run "${size}_sharded" 300 config/gpt2_$size.py $few --recompute=True --shard_optimizer=True
				launcher=$python
			fi
		done
		# With a network: OpenAI's weights should give acc 0.2859 and acc_norm 0.2955.
		part openai 300 "$python" hellaswag.py --model gpt2 --json
		if [ -n "${SHARDS:-}" ]; then
			run recipe 900 --max_steps=500 --warmup_steps=100 --hellaswag_every=0 --checkpoint_every=0
		fi
		bench ladder_4 400 ladder --steps 5 --rounds 1
	fi
	# The lecture's ladder has what time is left; its rungs are in ladder.log as they come. [200]
	limit=600
	[ "$mode" = try ] && limit=30
	bench ladder $limit ladder $ladder --rounds 1
}

echo
cat "$out/table.md"
echo
echo "== the table is in $out/table.md"
if grep -q '"exit": [^0]' "$out/parts.jsonl"; then
	echo "== failed: $(grep '"exit": [^0]' "$out/parts.jsonl" | sed 's/{"name": "\([^"]*\)".*/\1/' | tr '\n' ' ')" >&2
	exit 1
fi
