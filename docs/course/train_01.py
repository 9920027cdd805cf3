"""Train on one batch, again and again, until the model knows it by heart."""

from pathlib import Path

import torch
from gpt import GPT
from torch.nn import functional as F

batch_size = 4  # sequences in a step
block_size = 32  # tokens in a sequence
max_steps = 100
learning_rate = 0.2

torch.manual_seed(1337)
text = (Path(__file__).parent / "alice.txt").read_bytes()
tokens = torch.tensor(list(text))  # a token is a byte here
model = GPT(vocab_size=257, n_positions=block_size, n_layer=2, n_head=2, n_embd=64)

window = tokens[: batch_size * block_size + 1]
x = window[:-1].view(batch_size, block_size)  # what the model reads
y = window[1:].view(batch_size, block_size)  # what comes next, at each place
for step in range(max_steps):
    logits = model(x)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= learning_rate * parameter.grad
    if step % 25 == 0 or step == max_steps - 1:
        print(f"step {step:3} | loss {loss.item():.3f}")
