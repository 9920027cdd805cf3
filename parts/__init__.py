"""What the commands at the top are made of. A room a job; arrows run down this list, and never up
to a command.

files         what survives a crash: whole writes, locks, SHA-256
tokenizer     GPT-2's, bytes, and learned ones
documents     files of any kind -> documents
data          shards, windows, batches
sharding      documents -> tokens -> shards, on all cores
loss          the head's loss without keeping the logits
optimizer     AdamW, SGD, Muon
runtime       the machine: device, ranks, collectives
inference     KV cache, packed weights, the one-token graph, sampling
auto          what "auto" means on this machine, for training and for inference
pretrained    models as files: Hugging Face, nanoGPT, llm.c, our own
metrics       a run's records, and the published figures they are compared with
console       what a terminal shows, and which signals it sends
report        report.md and model cards
checkpoint    a run's folder and its checkpoints: chosen, written, checked, pruned
page          the page of sample.py --web
"""

from typing import Any

# The network stands above the parts, which know it by what they call: in their signatures it has
# any type.
GPT = GPTConfig = Any  # of model.py
