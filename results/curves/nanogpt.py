"""A run once more by nanoGPT's own train.py: python results/curves/nanogpt.py NANOGPT out/RUN
out/NEW

NANOGPT is a clone of github.com/karpathy/nanoGPT. It gets the run's initial weights as its ckpt.pt,
which stays in out/NEW, and the run's batches. The run must be one of AdamW in float32, from
scratch, with pad_vocab=False.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from parts import data
from parts.metrics import read_metrics, select
from train import TrainConfig, build_model

EDITS = {
    "def get_batch(split):": """FEED = iter(np.load("batches.npy"))
def get_batch(split):
    batch = torch.from_numpy(next(FEED))
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
def random_batch(split):""",
    "optimizer.load_state_dict(checkpoint['optimizer'])": "pass",  # the first step: there is none
    "if iter_num % eval_interval": "if iter_num and iter_num % eval_interval",  # no evaluation
    "/ (warmup_iters + 1)": "/ warmup_iters",  # build-nanogpt's schedule, which is ours
    "{lossf:.4f}": "{lossf:.7f}",
}


def main(nanogpt: Path, run: Path, out: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")
    facts, ours = select(records, "run")[0], select(records, "train")
    config = TrainConfig(**facts["settings"])
    tokenizer = data.tokenizer_of_shards(config.data_dir)
    windows = data.TokenWindows(
        data.open_shards(config.data_dir, "train"), config.block_size, tokenizer.vocab_size
    )
    n = config.total_batch_size // config.block_size
    batches = data.Batches(
        windows, batch_size=n, windows_per_step=n, world_size=1, seed=config.seed
    )
    shape = {
        name: getattr(config, name)
        for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")
    }
    model = build_model(config, None, tokenizer)
    start = dict(
        model=model.state_dict(),
        model_args=shape | dict(vocab_size=tokenizer.vocab_size, dropout=0.0),
    )
    out.mkdir(parents=True, exist_ok=True)
    torch.save(start | dict(iter_num=0, best_val_loss=9.9, config={}), out / "ckpt.pt")

    settings = dict(
        init_from="resume", out_dir=out.resolve(), device="cpu", dtype="float32", compile=False
    )
    settings |= dict(
        batch_size=n,
        block_size=config.block_size,
        gradient_accumulation_steps=1,
        eval_interval=10**9,
    )
    settings |= dict(
        max_iters=config.max_steps - 1,
        lr_decay_iters=config.max_steps,
        warmup_iters=config.warmup_steps,
    )
    settings |= {
        name: getattr(config, name)
        for name in ("learning_rate", "min_lr", "weight_decay", "beta1", "beta2")
    }
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(nanogpt, Path(folder, "nanoGPT")))
        source = (copy / "train.py").read_text()
        for old, new in EDITS.items():
            assert old in source, f"{nanogpt}: another version? No {old!r}"
            source = source.replace(old, new)
        (copy / "train.py").write_text(source)
        np.save(
            copy / "batches.npy",
            np.stack([batches.batch(step) for step in range(config.max_steps + 1)]),
        )
        command = [
            sys.executable,
            "train.py",
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        printed = subprocess.run(
            command, cwd=copy, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    losses = [
        float(found[1]) for found in re.finditer(r"^iter \d+: loss ([\d.]+)", printed, re.MULTILINE)
    ]
    lines = [facts, *(dict(step=step, kind="train", loss=loss) for step, loss in enumerate(losses))]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    worst, step = max(
        (abs(record["loss"] - loss), record["step"])
        for record, loss in zip(ours, losses, strict=True)
    )
    print(f"largest difference of {len(losses)} steps: {worst:.2e} at step {step}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
