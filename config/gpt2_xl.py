"""GPT-2 XL (1558M), the model of the GPT-2 paper, from scratch, on 30B tokens.

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_xl.py

Shards: as for config/gpt2_medium.py.

The arithmetic:
    8 sequences x 1024 tokens x 8 GPUs x 16 micro-steps = 1,048,576 tokens a step, GPT-3's 1M
    28,610 steps x 1,048,576 tokens                     = 30.0B tokens
    10.3 GFLOPs a token x 30B tokens                    = 3.1e20 FLOPs
    At 50 % of an H100's 989 TFLOP/s: 48k tokens/s each, 22 hours on 8 (estimated, not measured).
"""

data_dir = "shards/fineweb_edu_30B"
out_dir = "out/gpt2_xl"

n_layer = 48
n_head = 25
n_embd = 1600
batch_size = "auto"  # the sequences that fit into a GPU's memory
total_batch_size = 1_048_576

# GPT-3's learning rate for this size. The warm-up has as many tokens as at the other sizes.
learning_rate = 2e-4
min_lr = learning_rate / 10
warmup_steps = 358
max_steps = 28_610
checkpoint_every = 500  # 19 GB each; up to four exist at a time
