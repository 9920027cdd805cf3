"""What a run's validation loss consists of: text that training has too, and text that is new.

    python results/scaling/copies.py out/hours/step_0003037 shards/stdlib

All is in bits a byte, over the validation tokens that parts/overlap.py looks at, in windows of the
model's block size.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import open_model
from parts.data import open_shards
from parts.overlap import MOST_VALIDATION_TOKENS, find_copies, first_tokens

import numpy as np
import torch
import torch.nn.functional as F

WINDOWS_AT_ONCE = 8


def token_losses(model, tokens: np.ndarray) -> np.ndarray:
    """The loss of each token but the first, in nats; a last part of a window is left out."""
    T = model.config.block_size
    n_windows = (len(tokens) - 1) // T
    ids = torch.from_numpy(tokens.astype(np.int64))
    inputs = ids[: n_windows * T].view(n_windows, T)
    targets = ids[1 : n_windows * T + 1].view(n_windows, T)
    losses = []
    with torch.inference_mode():
        for x, y in zip(inputs.split(WINDOWS_AT_ONCE), targets.split(WINDOWS_AT_ONCE)):
            logits = model.logits(model.hidden(x)).float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none"))
    return torch.cat(losses).numpy()


def main() -> None:
    checkpoint, data_dir = sys.argv[1:]
    opened = open_model(checkpoint)
    is_copy = find_copies(data_dir, opened.tokenizer)
    validation = first_tokens(open_shards(data_dir, "val"), MOST_VALIDATION_TOKENS)
    tokens = np.concatenate(validation)
    losses = token_losses(opened.model.eval(), tokens)

    targets = tokens[1 : len(losses) + 1]
    is_copy = is_copy[1 : len(losses) + 1]
    n_bytes = opened.tokenizer.byte_counts()  # 0 for an end of text, as in train.py's val_bpb
    for name, chosen in (("all", is_copy | ~is_copy), ("copies", is_copy), ("new", ~is_copy)):
        total = n_bytes[targets[chosen]].sum()
        if total == 0:
            print(f"{name:8} none")
            continue
        bits = losses[chosen].sum() / math.log(2) / total
        print(f"{name:8} {chosen.mean():6.1%} of the tokens  {bits:.3f} bits a byte")


if __name__ == "__main__":
    main()
