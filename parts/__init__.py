"""What the commands at the top are made of, a part a job. A part imports only parts above it.

files         what survives a crash: whole writes, locks, SHA-256
json_files    JSON that others have written: one reader, which refuses what would fail later
console       what a terminal shows, which signals it sends, and how a command ends
hub           the Hugging Face hub: requests to it end
loss          the head's loss without keeping the logits
embedding     the token embedding's gradient without a second matrix
optimizer     AdamW, SGD, Muon; which parameter has which rule
runtime       the machine: device, ranks, collectives
zero          ZeRO-1: the optimizer's state shared out among the ranks
compiler      functions in C, compiled where they are first needed
matvec        a matrix times a few vectors on a CPU, by a kernel in C (matvec.c)
attention     fused attention for training; its backward pass in C (attention.c)
standin       a small model of the same class: what does this model.py compute?
snapshot      tensors of one step, written while training goes on
pretrained    models as files: Hugging Face, nanoGPT, llm.c, our own; is it a GPT-2?
decode        a token through a whole GPT-2 on a CPU, by a function in C (decode.c)
encoding      text in any encoding -> UTF-8, and what of it cannot be decoded
tokenizer     GPT-2's, bytes, and byte-level BPEs learned from text
documents     files of any kind -> documents
data          shards, windows, batches, and their loader
sharding      documents -> tokens -> shards, on all cores
overlap       how much of the validation text stands in the training text too
inference     KV cache, packed weights, the one-token step as a whole, sampling
auto          what "auto" means on this machine, for training and for inference
dial          a run's settings from the hours it may take
metrics       a run's records, and the published figures they are compared with
report        report.md and model cards
checkpoint    a run's folder and its checkpoints: chosen, written, checked, pruned
look          what a model saw: attention, guesses after each block, probabilities
page          the page of sample.py --web
peers         other programs beside ours, each in processes of its own
"""

import importlib.util
import sys
from typing import Any

# The network stands above the parts, which know it by what they call: for them it has any type.
GPT = Any  # model.GPT
GPTConfig = Any  # model.GPTConfig


def check_environment() -> None:
    """End the program with a line where the packages are not installed, as in a new terminal."""
    missing = [
        name for name in ("numpy", "torch", "tiktoken") if not importlib.util.find_spec(name)
    ]
    if missing:
        print(
            f"no {missing[0]} here: source .venv/bin/activate, or make install if there is none",
            file=sys.stderr,
        )
        raise SystemExit(2)


check_environment()
