"""Train a small GPT from scratch on any text, in any language or script: prose, code, DNA.

    python prepare.py my_texts/ --out shards/anytext --tokenizer 2048
    python train.py config/anytext.py
    python sample.py --model out/anytext -p "Once upon a time"

prepare.py learns the vocabulary from the text, so a token is several bytes long in every script.
2,048 tokens suit a megabyte or two of text; use more for more text. The checkpoint with the lowest
validation loss is kept. To compare runs with different vocabularies, use bits a byte (val_bpb).
"""

data_dir = "shards/anytext"
out_dir = "out/anytext"

n_layer = 6
n_head = 3
n_embd = 192
block_size = 128  # tokens: some 400 bytes
dropout = 0.1

batch_size = 16
total_batch_size = batch_size * block_size

optimizer = "muon"
learning_rate = 4e-3  # of embeddings, biases and norms
muon_learning_rate = 1e-2
muon_momentum = 0.9  # the run is short: average over fewer steps than 0.95 does
min_lr = 0.0
warmup_steps = 50
max_steps = 800  # 1.6M tokens, about 5 MB of text

log_every = 20
eval_every = 100
hellaswag_every = 0
eval_tokens = 1_000_000
checkpoint_every = 100
sample_every = 200
sample_prompt = ""  # begins a document
sample_tokens = 100
