"""Repeat a run with nanoGPT's own train.py.

    python results/curves/nanogpt.py NANOGPT out/RUN out/NEW

NANOGPT is a clone of github.com/karpathy/nanoGPT. It gets the run's initial weights as its ckpt.pt,
which stays in out/NEW, and the run's batches. The run must train with AdamW in float32, from
scratch and with pad_vocab=False.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import GPT
from parts import data
from parts.metrics import read_metrics, select
from parts.tokenizer import Tokenizer
from train import TrainConfig, build_model

import numpy as np
import torch

# What is replaced in nanoGPT's train.py. In order: its batches; the optimizer's state, which the
# checkpoint of a first step does not have; the first evaluation; the warm-up, which here is
# build-nanogpt's; and the digits of the losses that it prints.
EDITS = {
    "def get_batch(split):": """FEED = iter(np.load("batches.npy"))
def get_batch(split):
    batch = torch.from_numpy(next(FEED))
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
def random_batch(split):""",
    "optimizer.load_state_dict(checkpoint['optimizer'])": "pass",
    "if iter_num % eval_interval": "if iter_num and iter_num % eval_interval",
    "/ (warmup_iters + 1)": "/ warmup_iters",
    "{lossf:.4f}": "{lossf:.7f}",
}


def main(nanogpt: Path, run: Path, out: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")
    facts = select(records, "run")[0]
    ours = select(records, "train")
    config = TrainConfig(**facts["settings"])
    tokenizer = data.tokenizer_of_shards(config.data_dir)
    model = build_model(config, None, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(model, config, tokenizer, out / "ckpt.pt")

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "nanoGPT")
        shutil.copytree(nanogpt, copy)
        edit(copy / "train.py")
        np.save(copy / "batches.npy", read_batches(config, tokenizer))
        settings = translate_settings(config, out)
        flags = [f"--{name}={value}" for name, value in settings.items()]
        done = subprocess.run(
            [sys.executable, "train.py", *flags],
            cwd=copy,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )

    printed = re.findall(r"^iter \d+: loss ([\d.]+)", done.stdout, re.MULTILINE)
    losses = [float(loss) for loss in printed]
    with open(out / "metrics.jsonl", "w") as file:
        print(json.dumps(facts), file=file)
        for step, loss in enumerate(losses):
            print(json.dumps(dict(step=step, kind="train", loss=loss)), file=file)
    pairs = zip(ours, losses, strict=True)
    differences = [abs(record["loss"] - loss) for record, loss in pairs]
    largest = max(differences)
    step = ours[differences.index(largest)]["step"]
    print(f"largest difference of {len(losses)} steps: {largest:.2e} at step {step}")


def write_checkpoint(model: GPT, config: TrainConfig, tokenizer: Tokenizer, path: Path) -> None:
    """Write what nanoGPT resumes from. Its names of tensors are ours."""
    checkpoint = dict(
        model=model.state_dict(),
        model_args=dict(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            block_size=config.block_size,
            bias=config.bias,
            vocab_size=tokenizer.vocab_size,
            dropout=0.0,
        ),
        iter_num=0,
        best_val_loss=9.9,
        config={},
    )
    torch.save(checkpoint, path)


def edit(file: Path) -> None:
    source = file.read_text()
    for old, new in EDITS.items():
        assert old in source, f"{file}: another version? No {old!r}"
        source = source.replace(old, new)
    file.write_text(source)


def read_batches(config: TrainConfig, tokenizer: Tokenizer) -> np.ndarray:
    """The batches of all steps and one more, which nanoGPT reads ahead: (steps + 1, B, T + 1)."""
    shards = data.open_shards(config.data_dir, "train")
    windows = data.TokenWindows(shards, config.block_size, tokenizer.vocab_size)
    sequences = config.total_batch_size // config.block_size
    batches = data.Batches(
        windows,
        batch_size=sequences,
        windows_per_step=sequences,
        world_size=1,
        seed=config.seed,
    )
    return np.stack([batches.batch(step) for step in range(config.max_steps + 1)])


def translate_settings(config: TrainConfig, out: Path) -> dict:
    """The run's settings under nanoGPT's names. It ends behind max_iters, so one earlier."""
    return dict(
        init_from="resume",
        out_dir=out.resolve(),
        device="cpu",
        dtype="float32",
        compile=False,
        batch_size=config.total_batch_size // config.block_size,
        block_size=config.block_size,
        gradient_accumulation_steps=1,
        eval_interval=10**9,
        max_iters=config.max_steps - 1,
        lr_decay_iters=config.max_steps,
        warmup_iters=config.warmup_steps,
        learning_rate=config.learning_rate,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
