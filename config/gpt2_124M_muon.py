"""GPT-2 (124M) with Muon: half the tokens of config/gpt2_124M.py. Nobody has run it yet.

    python fineweb.py --pretokenized --max_tokens 5_100_000_000
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124M_muon.py

Measured (results/muon, 2 CPU cores): a GPT-2 of 3.5M parameters, width 192, on 4.1M tokens of
English books, steps of 4,096 tokens. With half of the tokens and its own schedule, Muon ended 0.08
nats below AdamW with all of them (three seeds). Both were tuned with five runs.

Extrapolated, from there to this size:
    tokens          half, as there. A ratio at a thousandth of the size need not hold here.
    learning_rate   twice AdamW's 6e-4: in the small model, the parameters that stay with AdamW wanted twice the rate
    muon's rate     five times AdamW's, as there. The factor 0.2 sqrt(max(A, B)) of its update takes care of the width
                    (Liu and others 2025); the steps are then about those of modded-nanogpt at this
                    width
    momentum        0.95, the usual one. The small model wanted 0.9, but its runs had 1,000 steps
    cost of a step  1.63 TFLOP more on each GPU: 3 % with 8, 0.4 % with one
"""

data_dir = "shards/fineweb_edu_10B"
out_dir = "out/gpt2_124M_muon"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 64
total_batch_size = 524_288

optimizer = "muon"
learning_rate = 1.2e-3  # of embeddings, biases and norms
muon_learning_rate = 3e-3  # of the blocks' matrices
muon_momentum = 0.95
min_lr = learning_rate / 10
warmup_steps = 360
max_steps = 9_537  # 5.0B tokens
weight_decay = 0.1
