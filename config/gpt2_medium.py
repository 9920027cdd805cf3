"""GPT-2 medium (355M) from scratch, on 30B tokens.

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium.py

Shards, enough that no token is seen twice:

    python fineweb.py --pretokenized --max_tokens 30_000_000_000 --out shards/fineweb_edu_30B

The arithmetic:
    32 sequences x 1024 tokens x 8 GPUs x 2 micro-steps = 524,288 tokens a step
    57,220 steps x 524,288 tokens                       = 30.0B tokens
    2.42 GFLOPs a token x 30B tokens                    = 7.3e19 FLOPs
    At 50 % of an H100's 989 TFLOP/s: 204k tokens/s each, 5 hours on 8 (estimated, not measured).
"""

data_dir = "shards/fineweb_edu_30B"
out_dir = "out/gpt2_medium"

n_layer = 24
n_head = 16
n_embd = 1024
batch_size = "auto"  # the sequences that fit into a GPU's memory

# GPT-3's learning rate for this size; the rest is train.py's default.
learning_rate = 3e-4
min_lr = learning_rate / 10
max_steps = 57_220
