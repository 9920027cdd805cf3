r"""Fine-tune the GPT-2 of config/books.py on Tiny Shakespeare, in six minutes on 2 CPU cores.

    curl -o tinyshakespeare.txt https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python prepare.py tinyshakespeare.txt --out shards/shakespeare_gpt2 --val_fraction 0.1
    python train.py config/finetune_books.py
    python sample.py --model out/finetune_books -p "ROMEO:"

results/finetune_books is this run. To see what the model had learned from the books, train the same
model from scratch on the same text, with the learning rates of config/books.py:

    python train.py config/finetune_books.py --init_from=scratch --out_dir=out/only_shakespeare \
        --learning_rate=4e-3 --muon_learning_rate=1e-2
"""

data_dir = "shards/shakespeare_gpt2"
out_dir = "out/finetune_books"
init_from = "out/books"

n_layer = 6  # these three are used only with --init_from=scratch
n_head = 4
n_embd = 256
block_size = 256
dropout = 0.1

batch_size = 16
total_batch_size = batch_size * block_size

optimizer = "muon"
learning_rate = 1e-3  # of embeddings, biases and norms: a quarter of the rate in config/books.py
muon_learning_rate = 2.5e-3
muon_momentum = 0.9
min_lr = 0.0
warmup_steps = 20
max_steps = 150  # 0.6M tokens: the text twice

log_every = 5
eval_every = 25
hellaswag_every = 0
eval_tokens = 50_000  # more than the text has, so all of them
checkpoint_every = 25
sample_every = 150
sample_prompt = "ROMEO:"
