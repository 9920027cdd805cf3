"""The model and the batch of the study of Muon, for train.py; run.sh has the commands.

A GPT-2 of 2.7M parameters in six blocks and 0.8M in the embeddings, a share like GPT-2's own, on
English books.
"""

data_dir = "shards/books_4096"

n_layer = 6
n_head = 3
n_embd = 192
block_size = 256

batch_size = 16
total_batch_size = batch_size * block_size

max_steps = 1_000
warmup_steps = 100
min_lr = 0.0
compile = False

log_every = 10
eval_every = 50
eval_tokens = 65_536
hellaswag_every = 0
sample_every = 0
checkpoint_every = 0
report = False
