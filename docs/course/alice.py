"""The little GPT of docs/course: it has read one book, "Alice's Adventures in Wonderland".

python prepare.py docs/course/alice.txt --out shards/alice --tokenizer 512
python train.py docs/course/alice.py
"""

data_dir = "shards/alice"
out_dir = "out/alice"

n_layer = 2
n_head = 4
n_embd = 64
block_size = 128
dropout = 0.1  # the book is read many times

batch_size = 32
total_batch_size = batch_size * block_size

optimizer = "muon"
learning_rate = 1e-2  # of embeddings, biases and norms
muon_learning_rate = 2e-2
muon_momentum = 0.9
min_lr = 0.0
warmup_steps = 50
max_steps = 1000

dtype = "fp32"
compile = False
log_every = 10
eval_every = 100
eval_tokens = 1_000_000  # more than there are: all
hellaswag_every = 0
checkpoint_every = 500
keep_checkpoints = 1
sample_every = 500
sample_prompt = "Alice was"
