"""GPT-2 large (774M) from scratch, on 30B tokens.

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_large.py

Shards: as for config/gpt2_medium.py.

The arithmetic:
    16 sequences x 1024 tokens x 8 GPUs x 4 micro-steps = 524,288 tokens a step
    57,220 steps x 524,288 tokens                       = 30.0B tokens
    5.20 GFLOPs a token x 30B tokens                    = 1.6e20 FLOPs
    At 50 % of an H100's 989 TFLOP/s: 95k tokens/s each, 11 hours on 8 (estimated, not measured).
"""

data_dir = "shards/fineweb_edu_30B"
out_dir = "out/gpt2_large"

n_layer = 36
n_head = 20
n_embd = 1280
batch_size = "auto"  # the sequences that fit into a GPU's memory

# GPT-3's learning rate for this size; the rest is train.py's default.
learning_rate = 2.5e-4
min_lr = learning_rate / 10
max_steps = 57_220
