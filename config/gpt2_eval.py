"""Evaluate OpenAI's GPT-2 weights; nothing is trained.

    python train.py config/gpt2_eval.py                           # 124M: 0.5 GB from the hub
    python train.py config/gpt2_eval.py --init_from=gpt2-xl       # or a checkpoint's folder
    python train.py config/gpt2_eval.py --data_dir=shards/mine    # on your own text
    python train.py config/gpt2_eval.py --block_size=128          # a model with a shorter context
    python train.py config/gpt2_eval.py --eval_tokens=50_000      # a quick estimate, on a CPU

Expected on FineWeb-Edu's validation shard: 3.292 nats a token for the 124M model, as others report.
"""

data_dir = "shards/fineweb_edu_10B"
out_dir = "out/gpt2_eval"
init_from = "gpt2"

max_steps = 0  # evaluate once, then end
batch_size = 8
total_batch_size = batch_size * block_size
hellaswag_every = 1
sample_every = 1
checkpoint_every = 0
