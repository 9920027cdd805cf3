r"""Train a small GPT from scratch on Shakespeare, one token a byte.

    curl -o tinyshakespeare.txt https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python prepare.py tinyshakespeare.txt --out shards/shakespeare --tokenizer bytes \
        --val_fraction 0.1
    python train.py config/shakespeare.py
    python sample.py --model out/shakespeare -p "ROMEO:" -m 300

Any other text file works too. The run sees each of Tiny Shakespeare's 1.1 MB five times, takes 15
minutes on 2 CPU cores, and ends at a validation loss of 1.63 nats a byte
(results/shakespeare). The checkpoint with the lowest validation loss is kept.
"""

data_dir = "shards/shakespeare"
out_dir = "out/shakespeare"

n_layer = 6
n_head = 3
n_embd = 192
block_size = 128
dropout = 0.1

batch_size = 8
total_batch_size = batch_size * block_size

learning_rate = 2e-3
min_lr = 0.0
warmup_steps = 300
max_steps = 5_000
beta2 = 0.99  # small batches are noisy: average over more steps

log_every = 50
eval_every = 500
hellaswag_every = 0
eval_tokens = 1_000_000  # more than the text has, so all of them
checkpoint_every = 500
sample_every = 1_000
sample_prompt = "ROMEO:"
sample_tokens = 200
