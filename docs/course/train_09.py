"""Weight decay for what multiplies."""

import math
import sys
from pathlib import Path
from statistics import mean

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where model.py lies
from model import GPT, GPTConfig

import torch

batch_size = 16  # sequences in a step
block_size = 32  # tokens in a sequence
max_steps = 100
learning_rate = 2e-3  # the highest
min_lr = 2e-4  # the last
warmup_steps = 10
weight_decay = 0.1
compile = False  # True pays on a GPU, and in long runs on a CPU


def learning_rate_at(step):
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    left = (max_steps - step) / (max_steps - warmup_steps)  # 1 to 0
    height = 0.5 * (1 - math.cos(math.pi * left))  # half a wave
    return min_lr + height * (learning_rate - min_lr)


torch.manual_seed(1337)
text = (Path(__file__).parent / "alice.txt").read_bytes()
tokens = torch.tensor(list(text))  # a token is a byte here
shape = dict(block_size=block_size, n_layer=2, n_head=2, n_embd=64)
raw_model = GPT(GPTConfig(vocab_size=257, **shape, flash=True, pad_vocab=True))
model = torch.compile(raw_model) if compile else raw_model
groups = [
    dict(params=[p for p in raw_model.parameters() if p.dim() >= 2], weight_decay=weight_decay),
    dict(params=[p for p in raw_model.parameters() if p.dim() < 2], weight_decay=0.0),
]
optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True)

losses = []
for step in range(max_steps):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step)
    starts = torch.randint(len(tokens) - block_size, (batch_size,))
    windows = torch.stack([tokens[start : start + block_size + 1] for start in starts])
    x = windows[:, :-1]  # what the model reads
    y = windows[:, 1:]  # what comes next, at each place
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 25 == 0 or step == max_steps - 1:
        print(f"step {step:3} | loss {mean(losses[-25:]):.3f}")  # of the last 25 steps
