"""Draw the pictures of the course that come from runs: attention.png and losses.png.

OMP_NUM_THREADS=1 python docs/course/draw.py
"""

import contextlib
import io
import runpy
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where model.py lies
from model import open_model

import torch

COURSE = Path(__file__).resolve().parent
SENTENCE = "The Queen said to the King, said Alice to the Queen"
LOOPS = {
    "train_02.py": "new windows",
    "train_03.py": "initial weights",
    "train_07.py": "AdamW, clipping",
    "train_08.py": "schedule",
    "train_10.py": "accumulation",
}


def draw_attention(pyplot) -> None:
    """Who looks at whom: the four heads of the first block of the course's model."""
    model, tokenizer, _ = open_model(COURSE / "alice")
    ids = tokenizer.encode(SENTENCE).tolist()
    tokens = [tokenizer.decode([i]) for i in ids]
    block = model.transformer.h[0]
    with torch.no_grad():
        x = model.transformer.wte(torch.tensor(ids)) + model.transformer.wpe.weight[: len(ids)]
        q, k, _ = block.attn.c_attn(block.ln_1(x)).view(len(ids), 3, 4, 16).permute(1, 2, 0, 3)
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        scores = (q @ k.mT / 4).masked_fill(future, -torch.inf)
        weights = scores.softmax(dim=-1)
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.9), sharey=True)
    for head, axis in enumerate(axes):
        axis.imshow(weights[head], cmap="Blues", vmin=0, vmax=0.6)
        axis.set_title(f"head {head}")
        axis.set_xticks(range(len(ids)), tokens, rotation=90)
        axis.set_yticks(range(len(ids)), tokens)
    figure.supylabel("who looks")
    figure.supxlabel("at whom")
    figure.tight_layout()
    figure.savefig(COURSE / "attention.png", dpi=70)


def draw_losses(pyplot) -> None:
    """The loss of each step in some of the loops, as means over ten steps."""
    figure, axis = pyplot.subplots(figsize=(8, 4))
    for name, change in LOOPS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            losses = torch.tensor(runpy.run_path(str(COURSE / name))["losses"])
        axis.plot(range(5, 100, 10), losses.view(10, 10).mean(dim=1), label=f"{name}: {change}")
    axis.set_ylim(2.5, 6)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats a byte (mean of ten steps)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(COURSE / "losses.png", dpi=80)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw_attention(pyplot)
    sys.path.insert(0, str(COURSE))
    draw_losses(pyplot)


if __name__ == "__main__":
    main()
