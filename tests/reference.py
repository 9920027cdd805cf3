"""A run once more by independent code: transformers' GPT-2 and torch's optimizers in a plain loop.

    python train.py CONFIG --dtype=fp32 --log_every=1 --max_steps=300 --out_dir=out/ours     one process, from scratch
    python tests/reference.py out/ours out/reference

The run gives its settings, initial weights and batches. The model is transformers', AdamW and
clipping are torch's, schedule and Muon are written anew. Prints the largest difference of a step's
losses, with exit code 1 above 2e-3.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import GPT2LMHeadModel

from parts import data
from parts.tokenizer import of_folder
from train import TrainConfig, build_model


def muon(weight: torch.Tensor, average: torch.Tensor, rate: float, config: TrainConfig) -> None:
    """Muon for one (in, out) matrix: Nesterov momentum, five Newton-Schulz iterations, the scale of
    Liu and others.
    """
    m, updates = config.muon_momentum, []
    average.copy_(m * average + (1 - m) * weight.grad)
    for part in (m * average + (1 - m) * weight.grad).chunk(
        3 if 3 * len(weight) == weight.size(1) else 1, dim=1
    ):
        x = part / (part.norm() + 1e-7)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        updates.append(0.2 * math.sqrt(max(part.shape)) * x)
    weight.copy_(weight - rate * (config.weight_decay * weight + torch.cat(updates, dim=1)))


def repeat(config: TrainConfig, n_steps: int) -> tuple[GPT2LMHeadModel, list[float]]:
    """The model after n_steps of a run of one process from scratch in float32, and the loss of each
    step.
    """
    if config.dropout or not config.grad_clip:
        raise ValueError("only runs without dropout and with clipping can be repeated")
    tokenizer = of_folder(config.data_dir, data.read_meta(config.data_dir)["tokenizer"])
    windows = data.Windows(
        data.open_shards(config.data_dir, "train"), config.block_size, tokenizer.vocab_size
    )
    sequences = config.total_batch_size // config.block_size
    batches = data.Batches(windows, sequences, sequences, 1, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        build_model(config, None, tokenizer).save_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(
            folder, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
        )

    of_muon = model.transformer.h.parameters() if config.optimizer == "muon" else ()
    averages = {
        parameter: torch.zeros_like(parameter) for parameter in of_muon if parameter.dim() == 2
    }
    rest = [parameter for parameter in model.parameters() if parameter not in averages]
    decays = ((2, config.weight_decay), (1, 0.0))
    groups = [
        dict(params=[p for p in rest if p.dim() == n], weight_decay=decay) for n, decay in decays
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), foreach=False)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.beta1, foreach=False)

    losses, low = [], config.min_lr / config.learning_rate
    for step in range(n_steps):
        idx = torch.from_numpy(batches.batch(step))  # (B, T + 1)
        logits = model(idx[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        # The learning rate as a share of its peak: a linear warm-up, then a cosine or nothing more.
        done = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
        cosine = (
            low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
            if config.lr_schedule == "cosine"
            else 1
        )
        share = cosine if done >= 0 else (step + 1) / config.warmup_steps
        for group in optimizer.param_groups:
            group["lr"] = share * config.learning_rate
        optimizer.step()
        with torch.no_grad():
            for parameter, average in averages.items():
                muon(parameter, average, share * config.muon_learning_rate, config)
        losses.append(loss.item())
    return model, losses


def main(run: Path, out: Path) -> None:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    facts, *ours = (record for record in records if record["kind"] in ("run", "train"))
    if [record["step"] for record in ours] != list(range(len(ours))):
        raise ValueError(f"{run}: set log_every=1, and do not resume")
    _, losses = repeat(TrainConfig(**facts["settings"]), len(ours))
    theirs = [dict(step=step, kind="train", loss=loss) for step, loss in enumerate(losses)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, [facts, *theirs])) + "\n")
    worst, step = max((abs(a["loss"] - b["loss"]), a["step"]) for a, b in zip(ours, theirs))
    print(f"largest difference of {len(ours)} steps: {worst:.2e} at step {step}")
    sys.exit(int(worst > 2e-3))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
