"""A small GPT from scratch on the works of Shakespeare, a token for each byte.

    python data.py tinyshakespeare.txt --out shards/shakespeare --tokenizer bytes --val_fraction 0.1
    python train.py config/shakespeare.py
    python sample.py --model out/shakespeare -p "ROMEO:" -m 300

Any text file will do; the one everybody uses is char-rnn's tinyshakespeare.txt, 1.1 MB. On it, with 6 layers of width
192, the text is seen 37 times: dropout keeps the model from learning it by heart, and the checkpoint with the best
validation loss is kept.
"""

data_dir = "shards/shakespeare"
out_dir = "out/shakespeare"

n_layer = 6
n_head = 6
n_embd = 192
block_size = 256
dropout = 0.2

batch_size = 16
total_batch_size = 32 * block_size

learning_rate = 2e-3
min_lr = 2e-4
warmup_steps = 100
max_steps = 4_500
beta2 = 0.99  # small batches are noisy: remember longer

log_every = 10
eval_every = 250
eval_tokens = 110_000
checkpoint_every = 250
sample_every = 500
sample_prompt = "ROMEO:"
sample_tokens = 200
