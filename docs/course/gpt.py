"""A whole GPT-2 in 60 lines: its network, its weights, and text from it.

python docs/course/gpt.py docs/course/alice "Alice was"    # any folder with a GPT-2 in it
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")


class Attention(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(C, 3 * C)  # queries, keys and values in one product
        self.c_proj = nn.Linear(C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_head)  # (B, heads, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = F.softmax(scores.masked_fill(future, -math.inf), dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.ln_1 = nn.LayerNorm(C)
        self.attn = Attention(C, n_head)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C), c_proj=nn.Linear(4 * C, C)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocab_size, n_positions, n_layer, n_head, n_embd):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(n_positions, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)

    def forward(self, idx):  # token ids (B, T) -> logits (B, T, V)
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T  # the embedding is the head, too


def load(folder):
    config = json.loads((Path(folder) / "config.json").read_text())
    model = GPT(*[config[name] for name in SIZES])
    tensors = load_file(Path(folder) / "model.safetensors")
    for name, parameter in model.named_parameters():
        tensor = tensors.get(name, tensors.get(f"transformer.{name}"))
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            tensor = tensor.T  # stored as (in, out)
        parameter.data = tensor.float()
    return model


@torch.no_grad()
def generate(model, ids, n_tokens):  # ids (B, T) -> (B, T + n_tokens)
    for _ in range(n_tokens):
        logits, tokens = model(ids[:, -model.wpe.num_embeddings :])[:, -1].topk(50)
        drawn = tokens.gather(1, torch.multinomial(F.softmax(logits, dim=-1), 1))
        ids = torch.cat([ids, drawn], dim=1)
    return ids


if __name__ == "__main__":
    folder, prompt = sys.argv[1:]
    torch.manual_seed(42)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = torch.tensor([tokenizer.encode(prompt).ids] * 5)
    for row in generate(load(folder), ids, 30).tolist():
        print(">", tokenizer.decode(row))
