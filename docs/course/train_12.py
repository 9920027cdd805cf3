"""The loss on text that the model has not seen."""

import contextlib
import math
import os
import sys
from pathlib import Path
from statistics import mean

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where model.py lies
from model import GPT, GPTConfig
from parts.data import Batches, Shard, TokenWindows

import numpy as np
import torch
from torch import distributed as dist

total_batch_size = 512  # tokens in a step
batch_size = 8  # sequences in a forward pass
block_size = 32  # tokens in a sequence
max_steps = 100
learning_rate = 2e-3  # the highest
min_lr = 2e-4  # the last
warmup_steps = 10
weight_decay = 0.1
eval_every = 50  # steps
eval_tokens = 4096
compile = False  # True pays on a GPU, and in long runs on a CPU


def learning_rate_at(step):
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    left = (max_steps - step) / (max_steps - warmup_steps)  # 1 to 0
    height = 0.5 * (1 - math.cos(math.pi * left))  # half a wave
    return min_lr + height * (learning_rate - min_lr)


@torch.no_grad()
def evaluate():
    raw_model.eval()
    starts = val_windows.select_first(eval_tokens)
    batch = torch.from_numpy(val_windows.read(starts))
    with torch.autocast("cpu", torch.bfloat16):
        loss = raw_model(batch[:, :-1], batch[:, 1:])
    raw_model.train()
    return loss.item()


torch.manual_seed(1337)
text = (Path(__file__).parent / "alice.txt").read_bytes()
tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)  # a token is a byte here
shape = dict(block_size=block_size, n_layer=2, n_head=2, n_embd=64)
raw_model = GPT(GPTConfig(vocab_size=257, **shape, flash=True, pad_vocab=True))
model = torch.compile(raw_model) if compile else raw_model
rank = int(os.environ.get("RANK", 0))  # torchrun sets both
world_size = int(os.environ.get("WORLD_SIZE", 1))
if world_size > 1:
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(model)
groups = [
    dict(params=[p for p in raw_model.parameters() if p.dim() >= 2], weight_decay=weight_decay),
    dict(params=[p for p in raw_model.parameters() if p.dim() < 2], weight_decay=0.0),
]
optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True)

n_accumulate = total_batch_size // (batch_size * block_size * world_size)
n_train = len(tokens) * 9 // 10
shard = Shard(Path("the book"), tokens[:n_train])
val_shard = Shard(Path("its last tenth"), tokens[n_train:])
windows = TokenWindows([shard], block_size, vocab_size=257)
val_windows = TokenWindows([val_shard], block_size, vocab_size=257)
batches = Batches(
    windows,
    batch_size=batch_size,
    windows_per_step=batch_size * n_accumulate * world_size,
    world_size=world_size,
    seed=1337,
)
losses = []
val_losses = []
for step in range(max_steps + 1):
    if step % eval_every == 0 or step == max_steps:
        val_losses.append(evaluate())
        if rank == 0:
            print(f"step {step:3} | val loss {val_losses[-1]:.3f}")
    if step == max_steps:
        break
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step)
    loss = torch.zeros(())
    for k in range(n_accumulate):
        batch = torch.from_numpy(batches.batch(step, k, rank))  # (B, T + 1)
        x = batch[:, :-1]  # what the model reads
        y = batch[:, 1:]  # what comes next, at each place
        synced = world_size == 1 or k == n_accumulate - 1
        with contextlib.nullcontext() if synced else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16):
                micro_loss = model(x, y) / n_accumulate
            micro_loss.backward()
        loss += micro_loss.detach()
    if world_size > 1:
        dist.all_reduce(loss)
        loss /= world_size
    torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if rank == 0 and (step % 25 == 0 or step == max_steps - 1):
        print(f"step {step:3} | loss {mean(losses[-25:]):.3f}")  # of the last 25 steps
