"""Train a GPT-2: one run, told from top to bottom by `train`.

    python train.py config/quickstart.py                            one process: CPU, one GPU, or a Mac
    python train.py config/shakespeare.py --max_steps=100           any setting from the command line
    torchrun --standalone --nproc_per_node=8 train.py               eight GPUs, the 124M reproduction
    python train.py --help                                          every setting, its default and meaning

The same command goes on where a stopped run left off, and says so when there is nothing left to do.
"""

import collections
import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import configurator
import data
import generate
import hellaswag
import plot
import report
import runtime
from model import GPT, GPTConfig
from pretrained import checkpoints
from runtime import Runtime


@dataclass(frozen=True)
class TrainConfig:
    # The run
    data_dir: str = "shards/fineweb_edu_10B"  # folder of *_train_*.bin and *_val_*.bin shards
    out_dir: str = "out/gpt2_124M"  # where checkpoints and metrics.jsonl go
    init_from: str = "scratch"  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, a checkpoint folder
    resume: str = "auto"  # auto: from out_dir's newest checkpoint; never: move out_dir aside; or a checkpoint's folder
    resume_anyway: bool = False  # also where settings that change the curve are not the checkpoint's
    seed: int = 1337  # of the initial weights, the order of the data, dropout and samples

    # The model (init_from a checkpoint brings its own n_layer, n_head, n_embd and bias; the others hold)
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width, divisible by n_head
    block_size: int = 1024  # tokens in a training sequence; from scratch also the model's longest context
    dropout: float = 0.0  # 0 for pretraining, 0.1 or 0.2 where the text is seen many times
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has
    flash: bool = True  # fused attention; False writes the (T, T) matrix out
    pad_vocab: bool = True  # round the vocabulary up to a multiple of 64 inside the model, which GPUs multiply faster
    recompute: bool = False  # less memory, a third more time: blocks are computed again for their gradients, not kept

    # The batch
    batch_size: int = 64  # sequences a process works on at once, as memory allows; but for dropout, the same result
    total_batch_size: int = 524_288  # tokens in a step, over all processes; what a process cannot hold it accumulates

    # The optimizer
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd uses beta1 as its momentum
    learning_rate: float = 6e-4  # peak learning rate, reached after the warm-up
    min_lr: float = 6e-5  # where cosine and wsd end
    lr_schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # wsd: constant, then a straight line down
    warmup_steps: int = 715  # straight line up from 0
    cooldown_steps: int = 3_800  # the line down of wsd
    max_steps: int = 19_073  # 10B tokens at 524,288 a step
    weight_decay: float = 0.1  # on matrices and embeddings only
    beta1: float = 0.9  # decay of the running mean of the gradient
    beta2: float = 0.95  # decay of the running mean of its square
    grad_clip: float = 1.0  # largest norm of the gradient over all parameters; 0 turns clipping off
    fused: bool = True  # the optimizer's step in one kernel

    # Watching (*_every: in steps, 0 is off; the last step is always due)
    log_every: int = 1  # a line, or the progress bar on a terminal
    eval_every: int = 250  # validation loss
    eval_tokens: int = 10_485_760  # validation tokens, always the same ones
    hellaswag_every: int = 250  # HellaSwag's score, see hellaswag.py; 0 for a vocabulary or a text it says nothing of
    hellaswag_limit: int = 0  # only its first so many tasks; 0 is all 10,042
    hellaswag_data: str = ""  # a copy of hellaswag_val.jsonl; without, it is fetched once, to shards/hellaswag
    sample_every: int = 1_000  # a sample of text
    sample_prompt: str = "Hello, I'm a language model,"  # what it continues
    sample_tokens: int = 64  # how long it is
    checkpoint_every: int = 1_000  # a checkpoint; best a multiple of eval_every, so that each has its validation loss
    keep_checkpoints: int = 2  # how many of the newest to keep, besides the best by validation loss; 0 keeps all
    report: bool = True  # at the end, report.md and pictures of the curves in out_dir; plot.py draws them at any time
    wandb: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project: str = "reproduce-gpt2"  # the run's name there is out_dir's
    tensorboard: bool = False  # also log to out_dir for TensorBoard (pip install tensorboard)

    # The machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matrix products; weights stay fp32
    compile: Literal["auto", True, False] = "auto"  # auto: where a compiler is and the run is long enough to pay
    tf32: bool = True  # on NVIDIA: products of float32 matrices with a 10-bit mantissa
    timeout: int = 120  # seconds that processes wait for one of them, after the first step, before the run ends
    profile: int = 0  # this many steps, from the third on, through torch's profiler: out_dir/profile.txt and trace.json

    def mistakes(self) -> list[str]:
        """What is wrong with these values, one sentence each. `accumulation` finds what depends on the machine."""
        at_least = dict(batch_size=1, total_batch_size=1, keep_checkpoints=0, eval_tokens=1, sample_tokens=1, timeout=1)
        at_least |= dict(hellaswag_limit=0, profile=0)
        at_least |= dict.fromkeys(("warmup_steps", "cooldown_steps", "max_steps", "seed"), 0)
        at_least |= {field.name: 0 for field in dataclasses.fields(self) if field.name.endswith("_every")}
        at_least |= dict.fromkeys(("learning_rate", "min_lr", "weight_decay", "grad_clip"), 0)
        wrong = [
            f"{name} is {getattr(self, name)}: it must be at least {least}, and below 2^63"
            for name, least in at_least.items()
            if not least <= getattr(self, name) < 2**63
        ]
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if self.lr_schedule == "wsd" and self.warmup_steps + self.cooldown_steps > self.max_steps:
            wrong.append(
                f"warmup_steps {self.warmup_steps} and cooldown_steps {self.cooldown_steps} are together more than "
                f"max_steps {self.max_steps}"
            )
        if self.lr_schedule != "constant" and self.min_lr > self.learning_rate:
            wrong.append(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}; set both")
        return wrong + model_config(self, vocab_size=1).mistakes()


# What may not change between a checkpoint and the run that goes on from it: its tensors would not fit.
FIXED_BY_CHECKPOINT = ("n_layer", "n_head", "n_embd", "bias", "pad_vocab", "optimizer")

# What may not change unasked: the losses would not be those of the run that was begun. (What a process computes at
# once, and on what device, changes roundings only; where things lie and how often one looks changes nothing.)
CURVE = (
    *("seed", "dtype", "block_size", "dropout", "total_batch_size", "weight_decay", "beta1", "beta2", "grad_clip"),
    *("learning_rate", "min_lr", "lr_schedule", "warmup_steps", "cooldown_steps", "max_steps"),
)

# A gradient is not finite once in a long while by bad luck (and a few times at first under fp16, whose scale starts too
# high). So many steps in a row mean that the weights themselves have gone wrong.
MAX_SKIPPED = 10

# A loss is called a spike when it is so many standard deviations above the mean of so many before it.
SPIKE, SPIKE_WINDOW = 6, 100


def train(config: TrainConfig) -> dict:
    """Run until max_steps or until told to stop; returns {"step", "val_loss", "stopped": signal number or None}.

    Raises ValueError for what a person, a file or the machine got wrong, and when training diverges.
    """
    # ---- 1. The machine ----------------------------------------------------------------------------------------------
    machine = runtime.start(config.device, config.dtype, config.tf32)
    say = print if machine.is_main else lambda *_: None
    out_dir = Path(config.out_dir)

    # ---- 2. Where are we: at the start, on the way, or done? ---------------------------------------------------------
    # Of several machines, only that which lost a process counts a restart.
    if machine.sum(torch.tensor(int(restarted(config)), device=machine.device)):
        config = dataclasses.replace(config, resume="auto")
    check_packages(config)
    found = agree(find_checkpoint(config, say) if machine.is_main else None, config, machine)
    state = checkpoint.read_state(found) if found else dict(step=0)
    start_step = state["step"]
    if found and start_step >= config.max_steps:
        say(finished_message(start_step, config))
        machine.close()
        return dict(step=start_step, val_loss=state["val_loss"], stopped=None)

    # ---- 3. The batch: its size in tokens is the recipe's, the number of pieces it is computed in is the machine's ---
    n_accumulate = accumulation(config, machine.world_size)
    say(
        f"batch: {config.batch_size} sequences x {config.block_size} tokens x {machine.world_size} processes x "
        f"{n_accumulate} micro-steps = {config.total_batch_size:,} tokens a step; {config.max_steps:,} steps = "
        f"{config.max_steps * config.total_batch_size:,} tokens"
    )

    # ---- 4. The data -------------------------------------------------------------------------------------------------
    tokenizer = data.get_tokenizer(data.read_meta(config.data_dir).get("tokenizer", "gpt2"))  # published: no meta.json
    windows = open_windows(config, "train", tokenizer)
    val_windows = open_windows(config, "val", tokenizer) if config.eval_every else None  # (n, T + 1) tokens
    val_places = val_windows.first(config.eval_tokens) if config.eval_every else []
    batches = data.Batches(
        windows, config.batch_size, config.total_batch_size // config.block_size, machine.world_size, config.seed
    )
    say(
        f"data: {config.data_dir}, {windows.n_tokens:,} training tokens ({tokenizer.name}), seen "
        f"{config.max_steps * config.total_batch_size / windows.n_tokens:.2f} times; "
        f"{len(val_places) * config.block_size:,} validation tokens"
    )
    if found:
        check_same_text(found, windows.n_tokens, config)
    for shard in windows.shards:
        if shard.note:
            say(f"NOTE: {shard.note}; read as {tokenizer.name}")
    tasks = load_tasks(config, machine, say)  # of HellaSwag

    # ---- 5. The model ------------------------------------------------------------------------------------------------
    raw_model = build_model(config, found, tokenizer).to(machine.device)
    shape = raw_model.config
    say(
        f"model: {found or config.init_from}; {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, "
        f"{raw_model.num_params():,} parameters"
    )
    flops_per_step = raw_model.flops_per_token(config.block_size) * config.total_batch_size

    # ---- 6. The optimizer, with its memory if we go on ---------------------------------------------------------------
    optimizer = build_optimizer(raw_model, config)
    # For fp16 only: its smallest number is 6e-8, so gradients are scaled up before they are rounded to it.
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if found:
        checkpoint.load_train_state(found, optimizer, scaler)
        changed = changes(state["settings"], config, [name for name in vars(config) if not name.startswith("resume")])
        changed = "; changed since then: " + ", ".join(changed) if changed else ""
        say(f"resume: {found}, after {start_step:,} steps{changed}")

    # ---- 7. Compile, then wrap. Only raw_model is evaluated, sampled and saved: it has the same parameters, its names
    # ----    carry no prefix, and shapes that differ from training's do not make the compiled one compile again. ------
    # Whether compiling pays is decided by the whole run, not by what is left: a resumed run computes as before.
    seconds = runtime.expected_seconds(flops_per_step * config.max_steps, machine)
    compiled, compile_note = runtime.choose_compile(config.compile, machine.device, seconds)
    model = torch.compile(raw_model) if compiled else raw_model
    if machine.world_size > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    for note in (*machine.notes, f"compile: {compile_note}"):
        say(note)

    # ---- 8. The loop. It goes one past the last update, so that what came of it is evaluated and saved too -----------
    if machine.is_main:
        checkpoint.make_room(out_dir, found, config.resume == "never")
        if config.checkpoint_every:
            checkpoint.check_space(out_dir, checkpoint.bytes_needed(raw_model))
    log = Log(config, start_step, machine)
    log("run", start_step, **run_facts(config, machine, raw_model, compiled), **text_facts(config, tokenizer, windows))
    micro_steps = ((s, k, machine.rank) for s in range(start_step, config.max_steps) for k in range(n_accumulate))
    coming = data.prefetch(batches.batch, micro_steps, machine.device)
    val_loss, train_seconds, steps_timed = None, 0.0, 0
    waiting = Stopwatch()  # for data, the log and checkpoints: what a step should not notice
    skipped, skipped_in_a_row = 0, 0
    recent = collections.deque(maxlen=SPIKE_WINDOW)  # losses

    def due(every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == config.max_steps)

    with (
        contextlib.closing(log),
        contextlib.closing(coming),
        Console(config, start_step, machine.is_main) as console,
        StopSignal(machine.is_main) as stop,  # until all is written: torchrun and others send a signal twice
        checkpoint.Saver(out_dir, config.keep_checkpoints, console.saved) as saver,
        profiler(config, machine, start_step) as profile,
    ):
        for step in range(start_step, config.max_steps + 1):
            # What was due at a checkpoint's step was done before it was saved: it is not done twice.
            fresh = not found or step > start_step
            evaluated = fresh and due(config.eval_every, step)
            if evaluated:
                val_loss = evaluate(raw_model, val_windows, val_places, config.batch_size, machine)
                log("val", step, loss=val_loss)
                console.score(step, "val loss", val_loss)

            untrained = step == 0 and config.init_from == "scratch"  # it guesses, and its text is a screen of noise
            if fresh and tasks and due(config.hellaswag_every, step) and not untrained:
                score = hellaswag.evaluate(raw_model, tokenizer, machine, tasks)
                log("hellaswag", step, **score)
                console.score(step, "hellaswag", score["acc_norm"], f" of {score['n']:,}")

            if fresh and due(config.sample_every, step) and machine.is_main and not untrained:
                text = sample_text(raw_model, tokenizer, config, machine)
                log("sample", step, text=text)
                console.line(f"step {step:,} | sample:\n{data.printable(text)}\n")

            stopping = stop.agreed(machine)
            if step > start_step and (due(config.checkpoint_every, step) or stopping):
                log("checkpoint", step)  # first: a resume cuts the line if the folder never came
                if machine.is_main:
                    state = dict(step=step, val_loss=val_loss if evaluated else None, train_tokens=windows.n_tokens)
                    state |= dict(settings=dataclasses.asdict(config))
                    with waiting:
                        saver.save(raw_model, tokenizer, optimizer, scaler, state)
            saver.check()
            if stopping or step == config.max_steps:
                break

            # ======== TRAINING: all else is watching ========
            t0 = time.perf_counter()
            lr = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # The gradient of the whole batch, piece by piece. A piece's loss is a mean, so 1/k of each adds up to one.
            loss = torch.zeros((), device=machine.device)
            for k in range(n_accumulate):
                if config.dropout:
                    seed_dropout(config.seed, step, k, machine.rank)
                with waiting:
                    x, y = next(coming)  # (B, T) each
                # Ranks average their gradients once, with the last piece.
                alone = machine.world_size > 1 and k < n_accumulate - 1
                with model.no_sync() if alone else contextlib.nullcontext():
                    with machine.autocast():
                        piece = model(x, y) / n_accumulate
                    scaler.scale(piece).backward()
                loss += piece.detach()

            # Its length over all parameters, limited. Every rank has the same average, so all decide alike whether it
            # is finite; if it is not, it never reaches the weights.
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf).item()
            if math.isfinite(grad_norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            train_seconds, steps_timed = train_seconds + time.perf_counter() - t0, steps_timed + 1
            # ======== END OF TRAINING ========

            console.tick()
            if profile:
                profile.step()
            skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
            if skipped_in_a_row:
                skipped += 1
                console.line(f"step {step:,} | gradient not finite: step skipped, the weights are as before")
            if skipped_in_a_row == MAX_SKIPPED:
                raise ValueError(diverged_message(step, config))
            if due(config.log_every, step) or (config.log_every and step == config.max_steps - 1):
                seconds = train_seconds / steps_timed
                record = dict(
                    loss=machine.sum(loss).item() / machine.world_size,  # nats a token, over all pieces and ranks
                    lr=lr,
                    grad_norm=grad_norm,
                    skipped=skipped,  # steps since the start of this process
                    tokens_per_s=config.total_batch_size / seconds,
                    mfu=share_of_peak(flops_per_step / seconds, machine),
                    ms=1000 * seconds,
                    waited_ms=1000 * waiting.lap() / steps_timed,  # a step, since the last record
                    memory_gb=machine.peak_memory(),
                )
                with waiting:
                    log("train", step, **record)
                    console.step(step, record)
                if jump := spike(record["loss"], recent):
                    log("note", step, text=jump)
                    console.line(f"step {step:,} | NOTE: {jump}")
                recent.append(record["loss"])
                train_seconds, steps_timed = 0.0, 0
            if step == start_step:  # all are in step now: nothing that takes minutes is to come, such as compiling
                machine.wait_at_most(config.timeout)

        # Nobody leaves before the main process has written: torchrun would take it for a failure, and stop the others.
        machine.wait_at_most(3600)
        saver.wait()
        machine.barrier()

    # ---- 9. What came of it ------------------------------------------------------------------------------------------
    machine.close()
    if config.report and machine.is_main and not stopping:
        say(f"report: {report_of(out_dir, say)}")
    say(stopped_message(stopping, step, config) if stopping else closing_message(config, val_loss))
    return dict(step=step, val_loss=val_loss, stopped=stopping or None)


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


def accumulation(config: TrainConfig, world_size: int) -> int:
    """Micro-steps a step: total_batch_size / (batch_size x block_size x processes); ValueError if not an integer."""
    per_micro_step = config.batch_size * config.block_size * world_size
    if config.total_batch_size % per_micro_step == 0:
        return config.total_batch_size // per_micro_step
    fitting = fitting_batches(config, world_size)
    nearest = sorted(sorted(fitting, key=lambda b: abs(b - config.batch_size))[:3])
    multiple = max(1, round(config.total_batch_size / per_micro_step)) * per_micro_step
    raise ValueError(
        f"total_batch_size {config.total_batch_size} is not a multiple of batch_size {config.batch_size} x block_size "
        f"{config.block_size} x {world_size} processes = {per_micro_step}. These fit: "
        + (f"batch_size {', '.join(map(str, nearest))}; or " if nearest else "")
        + f"total_batch_size {multiple}"
    )


def fitting_batches(config: TrainConfig, world_size: int) -> list[int]:
    """Every batch_size of which a whole number of micro-steps makes total_batch_size."""
    sequences = config.total_batch_size / config.block_size / world_size  # what each process has to do in a step
    return [
        b for b in range(1, int(sequences) + 1) if config.total_batch_size % (b * config.block_size * world_size) == 0
    ]


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of the update that follows `step` updates."""
    # 1. Up in a straight line: the optimizer's averages know nothing yet.
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    # 2. At the peak: for good, or, with wsd, until the cooldown begins.
    steps_left = config.max_steps - step
    if config.lr_schedule == "constant" or (config.lr_schedule == "wsd" and steps_left >= config.cooldown_steps):
        return config.learning_rate
    # 3. Down: wsd in a straight line, cosine along half a wave from the end of the warm-up.
    if config.lr_schedule == "wsd":
        height = steps_left / config.cooldown_steps
    else:
        height = 0.5 * (1 - math.cos(math.pi * steps_left / (config.max_steps - config.warmup_steps)))
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def seed_dropout(*numbers: int) -> None:
    """Seed torch from (seed, step, micro-step, rank), so that dropout has no state that a resume could lose."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def spike(loss: float, recent) -> str:
    """In words, that a loss is far above the recent ones; nothing while there are few of them, or if it is not."""
    recent = [value for value in recent if math.isfinite(value)]
    if len(recent) < SPIKE_WINDOW // 2 or not loss > statistics.mean(recent) + SPIKE * statistics.pstdev(recent):
        return ""
    return f"the loss jumped to {loss:.4f} from about {statistics.mean(recent):.4f}"


def share_of_peak(flops_per_s: float, machine: Runtime) -> float | None:
    """Model FLOPs utilisation (PaLM, appendix B), 0 to 1; None where the device's peak is unknown."""
    peak = machine.peak_flops()
    return flops_per_s / (peak * machine.world_size) if peak else None


# ----------------------------------------------------------------------------------------------------------------------
# Data, model and optimizer


def open_windows(config: TrainConfig, split: str, tokenizer: data.Tokenizer) -> data.Windows:
    return data.Windows(data.open_shards(config.data_dir, split), config.block_size, tokenizer.vocab_size)


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    names = [field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size"]
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in names})


def build_model(config: TrainConfig, found: Path | None, tokenizer: data.Tokenizer) -> GPT:
    """The model the run starts with: the checkpoint's, init_from's, or a new one; float32, on the CPU."""
    if found is None and config.init_from == "scratch":
        torch.manual_seed(config.seed)
        return GPT(model_config(config, tokenizer.vocab_size))
    source = found or config.init_from
    settings = {name: getattr(config, name) for name in ("dropout", "flash", "pad_vocab", "recompute")}
    model = GPT.from_pretrained(source, **settings)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{source} has a vocabulary of {model.config.vocab_size}, but the shards in {config.data_dir} are "
            f"{tokenizer.name}'s with {tokenizer.vocab_size}; make them with the model's tokenizer"
        )
    if model.config.block_size < config.block_size:
        raise ValueError(
            f"block_size {config.block_size} is beyond {source}'s context; set --block_size={model.config.block_size}"
        )
    return model


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    groups = model.param_groups(config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.beta1, fused=config.fused)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=1e-8, fused=config.fused)


# ----------------------------------------------------------------------------------------------------------------------
# Watching: none of it touches what training computes


@torch.no_grad()
def evaluate(model: GPT, windows: data.Windows, places: np.ndarray, batch_size: int, machine: Runtime) -> float:
    """Mean loss in nats a token over the windows at `places`; each rank takes its share, all get the result."""
    model.eval()
    total = torch.zeros((), device=machine.device)
    mine = places[machine.rank :: machine.world_size]
    for first in range(0, len(mine), batch_size):
        batch = torch.from_numpy(windows.read(mine[first : first + batch_size])).to(machine.device)
        with machine.autocast():
            total += model(batch[:, :-1], batch[:, 1:]) * len(batch)
    model.train()
    return machine.sum(total).item() / len(places)


def load_tasks(config: TrainConfig, machine: Runtime, say) -> list[hellaswag.Example]:
    """HellaSwag's tasks; none, with one line that says why, if they cannot be fetched: the run goes on without."""
    if not config.hellaswag_every:
        return []
    trouble = ""
    if machine.is_main and not config.hellaswag_data:
        try:
            hellaswag.fetch()
        except (ValueError, OSError) as error:
            trouble = f"hellaswag: off. {error}, or set hellaswag_data"
    if machine.sum(torch.tensor(float(bool(trouble)), device=machine.device)):
        say(trouble)
        return []
    return hellaswag.examples(config.hellaswag_data, config.hellaswag_limit)


def sample_text(model: GPT, tokenizer: data.Tokenizer, config: TrainConfig, machine: Runtime) -> str:
    """sample_prompt and what the model makes of it, with numbers of its own: training's are not drawn from."""
    prompt = tokenizer.encode(config.sample_prompt).tolist() or [tokenizer.end_of_text]
    prompt = prompt[-model.config.block_size :]
    options = dict(top_k=50, seeds=[config.seed], stop_token=tokenizer.end_of_text)
    with machine.autocast():
        return tokenizer.decode(prompt + generate.generate(model, [prompt], config.sample_tokens, **options)[0])


class Stopwatch:
    """`with watch:` adds the time its block takes; `watch.lap()` returns the sum, in seconds, and starts anew."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds += time.perf_counter() - self.start

    def lap(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def profiler(config: TrainConfig, machine: Runtime, start_step: int) -> contextlib.AbstractContextManager:
    """torch's profiler for the steps that `profile` asks for, else nothing; the first two only warm up.

    It writes profile.txt, the operators by the time they took, and trace.json, for ui.perfetto.dev, into out_dir.
    ValueError if so many steps are not to come.
    """
    steps_left = config.max_steps - start_step
    if config.profile and config.profile + 2 > steps_left:
        raise ValueError(f"profile {config.profile} begins with the third step, but {steps_left} are left to be done")
    if not (config.profile and machine.is_main):
        return contextlib.nullcontext()
    order = "self_device_time_total" if machine.device.type == "cuda" else "self_cpu_time_total"

    def write(found: torch.profiler.profile) -> None:
        table = found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=50)
        (Path(config.out_dir) / "profile.txt").write_text(table)
        found.export_chrome_trace(str(Path(config.out_dir) / "trace.json"))

    steps = torch.profiler.schedule(wait=1, warmup=1, active=config.profile, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=write)


class Console:
    """What a person sees: a progress bar on a terminal, plain lines in a file; nothing from ranks above 0."""

    def __init__(self, config: TrainConfig, start_step: int, is_main: bool):
        from tqdm import tqdm

        self.max_steps, self.is_main = config.max_steps, is_main
        self.on_terminal = sys.stdout.isatty() and config.log_every > 0
        hidden = not (is_main and self.on_terminal)
        self.latest, self.scores = [], {}  # what the bar tells: of the last step, and of the last evaluations
        form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=config.max_steps, initial=start_step, bar_format=form, dynamic_ncols=True, disable=hidden)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def line(self, text: str) -> None:
        if self.is_main:
            try:
                self.bar.write(text) if self.on_terminal else print(text, flush=True)
            except BrokenPipeError:  # Ctrl-C has ended the tee behind us too; there is yet a checkpoint to be saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def score(self, step: int, name: str, value: float, more: str = "") -> None:
        """What an evaluation found: a line, and from then on a part of the bar."""
        self.scores[name] = f"{name} {value:.4f}"
        self.show_parts()
        self.line(f"step {step:,} | {self.scores[name]}{more}")

    def show_parts(self) -> None:
        self.bar.set_postfix_str(" | ".join([*self.latest, *self.scores.values()]), refresh=False)

    def saved(self, step: int, folder: Path) -> None:
        self.line(f"step {step:,} | saved {folder}")

    def tick(self) -> None:
        """One step is done."""
        self.bar.update()

    def step(self, step: int, record: dict) -> None:
        """Show one training record (the dict that goes to metrics.jsonl)."""
        speed = f"{record['tokens_per_s']:,.0f} tok/s" + (f" | mfu {record['mfu']:.1%}" if record["mfu"] else "")
        if self.on_terminal:
            self.latest = [f"loss {record['loss']:.4f}", speed]
            self.show_parts()
        else:
            minutes_left = (self.max_steps - 1 - step) * record["ms"] / 60_000
            self.line(
                f"step {step:,}/{self.max_steps:,} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | norm "
                f"{record['grad_norm']:.2f} | {record['ms']:,.0f} ms | {speed} | {minutes_left:.1f} min left"
            )


class Log:
    """`log(kind, step, **values)`: to metrics.jsonl, W&B and TensorBoard as wanted; to nothing on ranks above 0."""

    def __init__(self, config: TrainConfig, start_step: int, machine: Runtime):
        self.file = self.wandb = self.tensorboard = None
        if not machine.is_main:
            return
        out_dir = Path(config.out_dir)
        cut_metrics(out_dir / "metrics.jsonl", start_step)
        self.file = open(out_dir / "metrics.jsonl", "a", encoding="utf-8")
        if config.wandb:
            import wandb

            id_file = out_dir / "wandb_id"  # by which a resumed run goes on in the same curve
            if start_step == 0 or not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:8])
            names = dict(project=config.wandb_project, name=out_dir.name, id=id_file.read_text())
            self.wandb = wandb.init(**names, resume="allow", config=dataclasses.asdict(config))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out_dir / "tensorboard", purge_step=start_step and start_step + 1)

    def __call__(self, kind: str, step: int, **values) -> None:
        if self.file:
            # JSON has no NaN: a number that is none becomes null.
            finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
            print(json.dumps(dict(step=step, kind=kind) | finite), file=self.file, flush=True)
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)}
        if self.wandb and numbers:
            self.wandb.log(numbers, step=step)
        for name, value in numbers.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        for writer in (self.file, self.tensorboard):
            if writer:
                writer.close()
        if self.wandb:
            self.wandb.finish()


def cut_metrics(path: Path, step: int) -> None:
    """Drop from metrics.jsonl what a run going on from `step` will write again, and a line that a kill cut short."""
    # At the checkpoint's own step all was done but the training.
    kept = [
        record
        for record in report.read_metrics(path)
        if record["step"] < step or (record["step"] == step and record["kind"] not in ("train", "note"))
    ]
    data.write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def report_of(out_dir: Path, say) -> Path | str:
    """Where the report is. Whatever keeps it from being made, the run itself is done."""
    try:
        return plot.write_report(out_dir, say)
    except Exception as error:
        return f"none ({type(error).__name__}: {error}); try python plot.py --report {out_dir}"


def check_packages(config: TrainConfig) -> None:
    """Find out now whether the loggers that are wanted, which requirements.txt does not install, are there."""
    for package in ("wandb", "tensorboard"):
        if getattr(config, package):
            try:
                importlib.import_module(package)
            except ImportError:
                raise ValueError(
                    f"{package}=True needs a package that is not installed: pip install {package}"
                ) from None


def run_facts(config: TrainConfig, machine: Runtime, model: GPT, compiled: bool) -> dict:
    """All that is needed to understand, or to repeat, a run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return dict(
        settings=dataclasses.asdict(config),
        parameters=model.num_params(),
        flops_per_token=model.flops_per_token(config.block_size),
        device=machine.device_name(),
        dtype=str(machine.dtype).removeprefix("torch."),
        command=command_of(config, machine.world_size),
        compiled=compiled,
        world_size=machine.world_size,
        job=os.environ.get("TORCHELASTIC_RUN_ID"),
        commit=commit,
        versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__),
    )


def text_facts(config: TrainConfig, tokenizer: data.Tokenizer, windows: data.Windows) -> dict:
    """What the run reads, and what it was made of."""
    meta = data.read_meta(config.data_dir)
    source = {name: value for name, value in meta.get("source", {}).items() if not isinstance(value, (dict, list))}
    facts = dict(train_tokens=windows.n_tokens, documents=meta.get("documents"), source=source)
    return dict(tokenizer=tokenizer.name, data=facts)


def command_of(config: TrainConfig, world_size: int) -> str:
    """The command that runs this again, without the files of settings it may have come from."""
    defaults, of_one_start = TrainConfig(), {"resume_anyway"}
    if config.resume == "never" or Path(config.resume).resolve().parent == Path(config.out_dir).resolve():
        of_one_start.add("resume")
    changed = [name for name, value in vars(config).items() if value != getattr(defaults, name)]
    settings = [shlex.quote(f"--{name}={getattr(config, name)}") for name in changed if name not in of_one_start]
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place = f"--nnodes={world_size // local_size} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    place = "--standalone" if world_size == local_size else place
    launcher = "python" if world_size == 1 else f"torchrun {place} --nproc_per_node={local_size}"
    return " ".join([launcher, "train.py", *settings])


# ----------------------------------------------------------------------------------------------------------------------
# Going on from a checkpoint


def find_checkpoint(config: TrainConfig, say) -> Path | None:
    """The checkpoint to go on from, or None. ValueError if it does not fit, or would go on along another curve."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = checkpoint.newest_whole(Path(config.out_dir), say)
    else:
        found = named_checkpoint(Path(config.resume), Path(config.out_dir))
    if found:
        before = checkpoint.read_state(found)["settings"]
        for name in FIXED_BY_CHECKPOINT:
            if before.get(name) != getattr(config, name):
                raise ValueError(
                    f"{found} was trained with {name}={before.get(name)}, but {name}={getattr(config, name)} is set: "
                    "use another out_dir, or --resume=never to start over"
                )
        changed = changes(before, config, CURVE)
        if changed and not config.resume_anyway:
            raise ValueError(
                f"{found} was trained with other settings ({', '.join(changed)}): it would not be the same run. Set "
                "them back, or add --resume_anyway=True to go on with the new ones, or use another out_dir"
            )
    return found


def named_checkpoint(found: Path, out_dir: Path) -> Path:
    """resume=PATH, checked."""
    if wrong := checkpoint.damage(found):
        raise ValueError(f"resume={found}: not a whole checkpoint ({wrong}); name a folder such as step_0001000")
    own = found.resolve().parent == out_dir.resolve()
    if own and (wrong := checkpoint.mislabelled(found)):
        raise ValueError(f"resume={found}: {wrong}; rename the folder, and move aside the one that has its name")
    if not own and checkpoints(out_dir):
        raise ValueError(
            f"resume={found}: out_dir {out_dir} has a run of its own; choose another --out_dir, or go on with that run "
            "without --resume"
        )
    return found


def agree(found: Path | None, config: TrainConfig, machine: Runtime) -> Path | None:
    """The checkpoint that the main process has found, on all of them."""
    step = checkpoint.read_state(found)["step"] if found else -1
    step = int(machine.sum(torch.tensor(step if machine.is_main else 0, device=machine.device)))
    if step < 0:
        return None
    named = Path(config.resume) if config.resume != "auto" else Path(config.out_dir) / f"step_{step:07d}"
    if not named.is_dir():
        raise ValueError(f"{named}: not to be seen from this machine; out_dir must be on a disk that all share")
    return named


def changes(before: dict, config: TrainConfig, names) -> list[str]:
    """In words, which of these settings are not what they were."""
    now = dataclasses.asdict(config)
    return [f"{name} {before.get(name)} -> {now[name]}" for name in names if before.get(name, now[name]) != now[name]]


def check_same_text(found: Path, n_tokens: int, config: TrainConfig) -> None:
    before = checkpoint.read_state(found)["train_tokens"]
    if before not in (None, n_tokens) and not config.resume_anyway:
        raise ValueError(
            f"data_dir {config.data_dir} has {n_tokens:,} training tokens, but {found} was trained on {before:,}: that "
            "is another text. Set data_dir back, or add --resume_anyway=True to go on with this one"
        )


def restarted(config: TrainConfig) -> bool:
    """Whether torchrun has started this process anew after one has failed, and the run had got somewhere by then.

    It goes on from there, whatever --resume says: that was for the first start.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    runs = [record for record in report.read_metrics(Path(config.out_dir) / "metrics.jsonl") if record["kind"] == "run"]
    began = bool(runs) and runs[-1].get("job") == os.environ.get("TORCHELASTIC_RUN_ID")
    return began and (config.resume == "never" or bool(checkpoints(config.out_dir)))


# ----------------------------------------------------------------------------------------------------------------------
# Starting, stopping, and what to say then


class StopSignal:
    """While in use, a first signal asks the run to stop after its step; a second Ctrl-C stops it at once.

    SIGINT is Ctrl-C's, SIGTERM torchrun's and most systems', SIGUSR1 what SLURM can send before the time is up.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self.received = 0  # the signal's number

    def __enter__(self) -> "StopSignal":
        self.before = {s: signal.signal(s, self.receive) for s in self.NUMBERS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.is_main:
            # Not print: it may have been interrupted in a write of its own, and who reads it may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, then saving; Ctrl-C again stops at once, unsaved\n")

    def agreed(self, machine: Runtime) -> int:
        """The signal any rank has received, the same on all ranks; 0 if none."""
        if machine.world_size == 1:
            return self.received
        numbers = torch.zeros(machine.world_size, device=machine.device)
        numbers[machine.rank] = self.received
        return int(machine.sum(numbers).max())


def finished_message(step: int, config: TrainConfig) -> str:
    return (
        f"{config.out_dir} is finished: it has {step:,} steps, max_steps is {config.max_steps:,}{best_note(config)}.\n"
        f"  to sample from it:  python sample.py --model {config.out_dir}\n"
        f"  to look at it:      python plot.py --report {config.out_dir}\n"
        f"  to train on:        the same command with --max_steps={2 * step} --resume_anyway=True\n"
        f"  to start over:      the same command with --resume=never"
    )


def closing_message(config: TrainConfig, val_loss: float | None) -> str:
    val = f", val loss {val_loss:.4f}" if val_loss is not None else ""
    return f"done: {config.max_steps:,} steps{val}{best_note(config)}; metrics in {config.out_dir}/metrics.jsonl"


def best_note(config: TrainConfig) -> str:
    best = checkpoint.best(Path(config.out_dir))
    return f"; best {best} (val loss {checkpoint.read_state(best)['val_loss']:.4f})" if best else ""


def stopped_message(number: int, step: int, config: TrainConfig) -> str:
    command = "the same command" + (f" without --resume={config.resume}" if config.resume != "auto" else "")
    return f"stopped by {signal.Signals(number).name} after {step:,} steps; {command} goes on from there"


def out_of_memory_message(config: TrainConfig) -> str:
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    fitting = [b for b in fitting_batches(config, world_size) if b <= config.batch_size / 2]
    smaller = f"--batch_size={fitting[-1]} (now {config.batch_size}) gives the same result" if fitting else ""
    return "out of memory: " + (smaller or "a single sequence is too much; --recompute=True takes less memory")


def diverged_message(step: int, config: TrainConfig) -> str:
    saved = "are good: go on from the last" if checkpoints(config.out_dir) else "are none yet: start again"
    return (
        f"the gradient was not finite {MAX_SKIPPED} steps in a row, up to step {step:,}. The checkpoints in "
        f"{config.out_dir} {saved} with --resume_anyway=True and a lower learning_rate (now "
        f"{config.learning_rate:g}), more warmup_steps, or --dtype=fp32"
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    rank = int(os.environ.get("RANK", 0))
    if {"-h", "--help"} & set(argv):
        print(__doc__ + configurator.help_text(TrainConfig))
        return
    sys.stdout.reconfigure(errors="replace")  # a sample that the terminal has no letters for must not end the run
    try:
        config = configurator.configure(TrainConfig, argv)
    except ValueError as error:  # the same on every rank
        fail(str(error) if rank == 0 else "")
    try:
        with checkpoint.held(Path(config.out_dir)) if rank == 0 else contextlib.nullcontext():
            result = train(config)
    except (ValueError, OSError) as error:
        fail(f"{error}" if rank == 0 else f"(rank {rank}) {error}")
    except torch.OutOfMemoryError:
        fail(out_of_memory_message(config))
    except RuntimeError as error:  # of half a dozen kinds
        if not re.search("gloo|nccl|connection|timed out", str(error), re.IGNORECASE):
            raise
        reason = str(error).strip().splitlines()[0]
        fail(f"(rank {rank}) another process is gone or hangs (--timeout is how long one waits): {reason}")
    except KeyboardInterrupt:
        sys.exit(130)
    if result["stopped"]:
        sys.exit(128 + result["stopped"])


def fail(message: str) -> None:
    """End with exit code 2 and the message, each of its lines behind the program's name."""
    print("\n".join(f"train.py: {line}" for line in message.splitlines()), file=sys.stderr, end="\n" if message else "")
    sys.exit(2)


if __name__ == "__main__":
    main()
