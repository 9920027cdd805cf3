"""Repeat a run with independent code: transformers' GPT-2 and torch's optimizers in a plain loop.

    python train.py config/books.py --dtype=fp32 --log_every=1 --max_steps=300 --out_dir=out/ours
    python tests/reference.py out/ours out/reference

The run must be one process that starts from scratch. It gives its settings, initial weights and
batches. The model is transformers', AdamW and clipping are torch's; schedule and Muon are written
again here. Prints the largest difference between the losses of a step; exit code 1 if it is above
2e-3.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts import data
from train import TrainConfig, build_model

import torch
from transformers import GPT2LMHeadModel


class Muon:
    """Muon for (in, out) matrices, as transformers has them: Nesterov momentum, five Newton-Schulz
    iterations, the scale of Liu and others (2025). Queries, keys and values are three matrices.
    """

    def __init__(self, weights: dict[str, torch.Tensor], config: TrainConfig):
        self.weights = weights
        self.averages = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.momentum = config.muon_momentum
        self.weight_decay = config.weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        m = self.momentum
        for name, weight in self.weights.items():
            average = self.averages[name]
            average.copy_(m * average + (1 - m) * weight.grad)
            direction = m * average + (1 - m) * weight.grad
            matrices = [direction]
            if name.endswith("c_attn.weight"):
                matrices = direction.chunk(3, dim=1)
            updates = []
            for matrix in matrices:
                scale = 0.2 * math.sqrt(max(matrix.shape))
                updates.append(scale * self.orthogonalize(matrix))
            update = torch.cat(updates, dim=1)
            weight.copy_(weight - rate * (self.weight_decay * weight + update))

    @staticmethod
    def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
        x = matrix / (matrix.norm() + 1e-7)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        return x


def repeat(config: TrainConfig, n_steps: int) -> tuple[GPT2LMHeadModel, list[float]]:
    """Repeat n_steps of a run in float32. Return the model and the loss of each step."""
    if config.dropout or not config.grad_clip:
        raise ValueError("only runs without dropout and with clipping can be repeated")
    batches, tokenizer = open_batches(config)
    with tempfile.TemporaryDirectory() as folder:
        build_model(config, None, tokenizer).save_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(
            folder, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
        )

    # The matrices of the blocks are Muon's. Of the rest, those with two dimensions decay.
    weights_of_muon = {}
    decayed = []
    not_decayed = []
    for name, parameter in model.named_parameters():
        if config.optimizer == "muon" and ".h." in name and parameter.dim() == 2:
            weights_of_muon[name] = parameter
        elif parameter.dim() == 2:
            decayed.append(parameter)
        else:
            not_decayed.append(parameter)
    muon = Muon(weights_of_muon, config)
    groups = [
        dict(params=decayed, weight_decay=config.weight_decay),
        dict(params=not_decayed, weight_decay=0.0),
    ]
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.beta1, foreach=False)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), foreach=False)

    losses = []
    for step in range(n_steps):
        idx = torch.from_numpy(batches.batch(step))  # (B, T + 1)
        logits = model(idx[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        share = share_of_peak_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = share * config.learning_rate
        optimizer.step()
        muon.step(share * config.muon_learning_rate)
        losses.append(loss.item())
    return model, losses


def open_batches(config: TrainConfig):
    """The run's batches, each a whole step, and its tokenizer."""
    tokenizer = data.tokenizer_of_shards(config.data_dir)
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
    return batches, tokenizer


def share_of_peak_rate(step: int, config: TrainConfig) -> float:
    """The learning rate as a share of its peak: a linear warm-up, then a cosine or a constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule != "cosine":
        return 1.0
    lowest = config.min_lr / config.learning_rate
    done = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def main(run: Path, out: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    run_records = [record for record in records if record["kind"] == "run"]
    ours = [record for record in records if record["kind"] == "train"]
    every_step = [record["step"] for record in ours] == list(range(len(ours)))
    if len(run_records) > 1 or not every_step:
        raise ValueError(f"{run}: set log_every=1, and do not resume")
    facts = run_records[0]
    _, losses = repeat(TrainConfig(**facts["settings"]), len(ours))

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "metrics.jsonl", "w") as file:
        print(json.dumps(facts), file=file)
        for step, loss in enumerate(losses):
            print(json.dumps(dict(step=step, kind="train", loss=loss)), file=file)
    differences = [abs(record["loss"] - loss) for record, loss in zip(ours, losses)]
    largest = max(differences)
    step = differences.index(largest)
    print(f"largest difference of {len(ours)} steps: {largest:.2e} at step {step}")
    if largest > 2e-3:
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
