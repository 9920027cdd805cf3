"""A small GPT learns to write Python on a laptop's CPU.

    make quickstart

installs the requirements, learns a vocabulary from the source of Python's standard library, and
makes the shards (the Makefile has the command). Then it runs

    python train.py config/quickstart.py
    python sample.py --model out/quickstart -p "def main(" -p "class Queue:" -m 200 --top_p 0.9
"""

data_dir = "shards/stdlib"
out_dir = "out/quickstart"

n_layer = 3
n_head = 2
n_embd = 128
block_size = 128

batch_size = 32
total_batch_size = batch_size * block_size

optimizer = "muon"
learning_rate = 1e-2  # of embeddings, biases and norms
muon_learning_rate = 2e-2
muon_momentum = 0.9  # the run is short: average over fewer steps than 0.95 does
min_lr = 0.0
warmup_steps = 50
max_steps = 800

log_every = 10
eval_every = 80
hellaswag_every = 0
eval_tokens = 1_000_000  # more than the text has, so all of them
checkpoint_every = 80
checkpoint_first = True  # the untrained model, where the film of that page begins
keep_checkpoints = 0  # keep all: the page of sample.py --web shows how the model learned
sample_every = 160
sample_prompt = "def main("
sample_tokens = 60
