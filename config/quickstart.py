"""A small GPT learns to write Python on a laptop's CPU.

    make quickstart

makes the shards (the Makefile has the command), and then runs

    python train.py config/quickstart.py
    python sample.py --model out/quickstart -p "def " -p "class " -p "import " -m 200 --temperature 0.8
"""

data_dir = "shards/stdlib"
out_dir = "out/quickstart"

n_layer = 3
n_head = 2
n_embd = 128
block_size = 128

batch_size = 16
total_batch_size = batch_size * block_size

learning_rate = 5.5e-3
min_lr = 0.0
warmup_steps = 200
max_steps = 2_300
beta2 = 0.99  # small batches are noisy: average over more steps

log_every = 25
eval_every = 575
hellaswag_every = 0
eval_tokens = 1_000_000  # more than there are: all
checkpoint_every = 1_150
sample_every = 1_150
sample_prompt = "def "
sample_tokens = 120
