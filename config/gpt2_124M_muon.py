"""GPT-2 (124M) with Muon, on half the tokens of config/gpt2_124M.py. Nobody has run it yet.

    python fineweb.py --pretokenized --max_tokens 5_100_000_000
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124M_muon.py

The settings come from a study of a small model (results/muon, 2 CPU cores): a GPT-2 of 3.5M
parameters and width 192 on 4.1M tokens of English books, in steps of 4,096 tokens. With half of the
tokens and its own schedule, Muon ended 0.08 nats below AdamW with all of them (three seeds). Both
were tuned with five runs. How the settings were carried over to 124M:

    tokens          half, as in the study. At 23.5M parameters with GPT-2's vocabulary, Muon with
                    half of the tokens again ended below AdamW with all of them, by 0.10 nats, but
                    these were only 2M tokens (docs/scaling.md). It need not hold here.
    learning_rate   twice AdamW's 6e-4: in the study, the parameters that stay with AdamW did best
                    at twice AdamW's rate.
    muon's rate     five times AdamW's, as in the study. The update's factor 0.2 sqrt(max(A, B))
                    takes care of the width (Liu and others 2025). The rule of docs/scaling.md, for
                    widths of 32 to 320 and runs of up to 25M tokens, would say 2e-2 and 7e-3; steps
                    of half a million tokens were not tried, so the lower rates stay.
    momentum        0.95, the usual value. The study's best was 0.9, in runs of only 1,000 steps.
    cost of a step  1.63 TFLOP and 12 GB of memory traffic more on each GPU, some 6 ms on an H100:
                    4 % of a step with 8 GPUs, 0.5 % with one (calculated).
"""

data_dir = "shards/fineweb_edu_10B"
out_dir = "out/gpt2_124M_muon"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = "auto"
total_batch_size = 524_288

optimizer = "muon"
learning_rate = 1.2e-3  # of embeddings, biases and norms
muon_learning_rate = 3e-3  # of the blocks' matrices
muon_momentum = 0.95
min_lr = learning_rate / 10
warmup_steps = 360
max_steps = 9_537  # 5.0B tokens
weight_decay = 0.1
