"""Reproduce GPT-2 (124M) on FineWeb-Edu. These are train.py's defaults, spelled out.

    python fineweb.py --pretokenized        # or without it, to tokenise here
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124M.py

The arithmetic:
    64 sequences x 1024 tokens x 8 GPUs x 1 micro-step = 524,288 tokens a step (GPT-3's 0.5M)
    19,073 steps x 524,288 tokens                      = 10.0B tokens, one epoch of FineWeb-Edu 10B
    855 MFLOPs a token x 10.0B tokens                  = 8.6e18 FLOPs

Hours, computed from the throughput that others report for this model and recipe (not measured
here):
    8 x H100         460k tokens/s each            0.8 hours
    8 x A100         200k tokens/s each            1.7 hours
    1 x H100         460k tokens/s                   6 hours
    1 x A100         200k tokens/s                  14 hours
    1 x RTX 4090     60k to 106k tokens/s     26 to 46 hours

Expected, from others' runs: validation loss 3.03 to 3.09, HellaSwag 0.30 to 0.31. OpenAI's GPT-2
124M: 3.292, 0.2955.
"""

data_dir = "shards/fineweb_edu_10B"
out_dir = "out/gpt2_124M"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

# The sequences that fit into a GPU's memory, 64 on one with 80 GB (est.). The accumulation follows,
# and the result is the same.
batch_size = "auto"
total_batch_size = 524_288

# GPT-3's recipe for its 125M model, with 375M tokens of warm-up.
learning_rate = 6e-4
min_lr = learning_rate / 10
warmup_steps = 715
max_steps = 19_073
weight_decay = 0.1
