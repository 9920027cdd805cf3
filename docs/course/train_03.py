"""GPT-2's initial weights."""

import math
from pathlib import Path
from statistics import mean

import torch
from gpt import GPT
from torch import nn
from torch.nn import functional as F

batch_size = 16  # sequences in a step
block_size = 32  # tokens in a sequence
max_steps = 100
learning_rate = 0.2

torch.manual_seed(1337)
text = (Path(__file__).parent / "alice.txt").read_bytes()
tokens = torch.tensor(list(text))  # a token is a byte here
model = GPT(vocab_size=257, n_positions=block_size, n_layer=2, n_head=2, n_embd=64)
for name, parameter in model.named_parameters():
    if name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif "ln_" not in name:  # norms stay as they are: all ones
        std = 0.02 / math.sqrt(2 * len(model.h)) if "c_proj" in name else 0.02
        nn.init.normal_(parameter, std=std)

losses = []
for step in range(max_steps):
    starts = torch.randint(len(tokens) - block_size, (batch_size,))
    windows = torch.stack([tokens[start : start + block_size + 1] for start in starts])
    x = windows[:, :-1]  # what the model reads
    y = windows[:, 1:]  # what comes next, at each place
    logits = model(x)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= learning_rate * parameter.grad
    losses.append(loss.item())
    if step % 25 == 0 or step == max_steps - 1:
        print(f"step {step:3} | loss {mean(losses[-25:]):.3f}")  # of the last 25 steps
