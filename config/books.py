r"""A GPT-2 of 18M parameters from English books, in about two hours on 2 CPU cores.

    python prepare.py books/ --out shards/books
    python train.py config/books.py
    python sample.py --model out/books -p "It was a dark night, and"

books/ is a folder of text, parquet or JSON lines, which prepare.py turns into GPT-2's tokens.
Instead of a folder of your own, the hub has Project Gutenberg's English books as 58,653 rows, the
text in the column "context". This takes the first of them, and downloads no more files than it
needs (of 12.9 GB in all; docs/status.md says that nobody has run it yet):

    python fineweb.py --dataset incredible45/Gutenberg-BookCorpus-Cleaned-Data-English \
        --text_column context --max_tokens 90_000_000 --out shards/books

results/books is this run on 874 books of Project Gutenberg: 85M training tokens, of which it saw a
seventh.
"""

data_dir = "shards/books"
out_dir = "out/books"

n_layer = 6
n_head = 4
n_embd = 256
block_size = 256

batch_size = 16
total_batch_size = batch_size * block_size

optimizer = "muon"
learning_rate = 4e-3  # of embeddings, biases and norms
muon_learning_rate = 1e-2
muon_momentum = 0.9  # the run is short: average over fewer steps than 0.95 does
min_lr = 0.0
warmup_steps = 100
max_steps = 3_000

log_every = 10
eval_every = 250
eval_tokens = 262_144
hellaswag_every = 1_000
hellaswag_limit = 1_000
checkpoint_every = 250
sample_every = 600
sample_prompt = "It was a dark night, and"
sample_tokens = 100
