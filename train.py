"""Train a GPT-2: one run, told from top to bottom by `train`.

    python train.py config/quickstart.py                            one process: CPU, one GPU, or a Mac
    python train.py config/shakespeare.py --max_steps=100           any setting from the command line
    torchrun --standalone --nproc_per_node=8 train.py               eight GPUs, the 124M reproduction
    python train.py --help                                          every setting, its default and meaning

The same command resumes a stopped run, and says so when the run is finished.
"""

import os

# Before torch loads OpenMP: threads that wait for each other go to sleep soon, and do not spin
# against other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import dataclasses
import math
import re
import signal
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import configurator
import hellaswag
import plot
from model import GPT, GPTConfig
from parts import auto, checkpoint, data, inference, runtime
from parts.checkpoint import make_room
from parts.console import Console, StopSignal, command, print_lines, printable, profiler
from parts.files import lock
from parts.metrics import Log, facts
from parts.optimizer import build_optimizer, describe
from parts.pretrained import locate
from parts.runtime import Runtime
from parts.tokenizer import Tokenizer, of_folder


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    # The run
    data_dir: str = "shards/fineweb_edu_10B"  # folder of *_train_*.bin and *_val_*.bin shards
    out_dir: str = "out/gpt2_124M"  # where checkpoints and metrics.jsonl go
    init_from: str = (
        "scratch"  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, a checkpoint folder
    )
    resume: str = "auto"  # auto: from out_dir's newest checkpoint; never: move out_dir aside; or a checkpoint's folder
    resume_anyway: bool = (
        False  # resume even if settings that change the losses differ from the checkpoint's
    )
    seed: int = 1337  # of the initial weights, the order of the data, dropout and samples

    # The model (with init_from, n_layer, n_head, n_embd and bias come from the checkpoint)
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width, divisible by n_head
    block_size: int = (
        1024  # tokens in a training sequence; from scratch also the model's longest context
    )
    dropout: float = 0.0  # 0 for pretraining, 0.1 or 0.2 where the text is seen many times
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has
    flash: Literal["auto", True, False] = (
        "auto"  # fused attention; False writes the (T, T) matrix to memory
    )
    pad_vocab: bool = (
        True  # round the vocabulary up to a multiple of 64 inside the model: faster on GPUs
    )
    recompute: bool = (
        False  # recompute blocks in the backward pass: much less memory, a third more time
    )

    # The batch
    batch_size: int | Literal["auto"] = (
        64  # most sequences in a forward pass of a process; auto: what fits
    )
    total_batch_size: int = (
        524_288  # tokens in a step, over all processes and gradient accumulation
    )

    # The optimizer
    optimizer: Literal["adamw", "muon", "sgd"] = (
        "adamw"  # muon: for the blocks' matrices; sgd's momentum is beta1
    )
    learning_rate: float = 6e-4  # peak learning rate, reached after the warm-up
    min_lr: float = 6e-5  # where the cosine ends
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_steps: int = 715  # linear, from 0
    max_steps: int = 19_073  # 10B tokens at 524,288 a step
    weight_decay: float = 0.1  # on matrices and embeddings only
    beta1: float = 0.9  # decay of the running mean of the gradient
    beta2: float = 0.95  # decay of the running mean of its square
    muon_learning_rate: float = (
        6e-4  # of the blocks' matrices, with the same schedule; the rest has learning_rate
    )
    muon_momentum: float = 0.95  # decay of the running mean of a matrix's gradient
    grad_clip: float = 1.0  # largest norm of the gradient over all parameters; 0 turns clipping off
    fused: bool = True  # all parameters updated in one kernel

    # Watching (*_every: in steps, 0 is off; also done after the last step)
    log_every: int = 1  # a line, or the progress bar on a terminal
    eval_every: int = 250  # validation loss
    eval_tokens: int = 10_485_760  # validation tokens, always the same ones
    hellaswag_every: int = (
        250  # HellaSwag's score, see hellaswag.py; 0 for non-GPT-2 tokenizers or non-English text
    )
    hellaswag_limit: int = 0  # only the first so many tasks; 0 is all 10,042
    hellaswag_style: Literal["completion", "harness"] = (
        "completion"  # harness: as lm-evaluation-harness scores
    )
    hellaswag_data: str = (
        ""  # a copy of hellaswag_val.jsonl; if empty, it is fetched once to shards/hellaswag
    )
    sample_every: int = 1_000  # a sample of text
    sample_prompt: str = "Hello, I'm a language model,"  # what it continues
    sample_tokens: int = 64  # how long it is
    checkpoint_every: int = (
        1_000  # a checkpoint; a multiple of eval_every gives each its validation loss
    )
    keep_checkpoints: int = (
        2  # how many of the newest to keep, besides the best by validation loss; 0 keeps all
    )
    report: bool = True  # at the end, write report.md and pictures of the curves to out_dir
    wandb: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project: str = "reproduce-gpt2"  # the run's name there is out_dir's
    tensorboard: bool = False  # also log to out_dir for TensorBoard (pip install tensorboard)

    # The machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matrix products; weights stay fp32
    compile: Literal["auto", True, False] = (
        "auto"  # auto: if there is a compiler and the run is long enough to pay
    )
    tf32: bool = True  # on NVIDIA: products of float32 matrices with a 10-bit mantissa
    timeout: int = (
        120  # seconds that ranks wait for a slow one before the run ends (after the first step)
    )
    profile: int = (
        0  # profile this many steps, from the third on, to out_dir/profile.txt and trace.json
    )

    def mistakes(self) -> list[str]:
        """One sentence for each impossible value. `sequences_per_process` checks what depends on
        the machine.
        """
        positive = ("batch_size", "total_batch_size", "eval_tokens", "sample_tokens", "timeout")
        wrong = []
        for name, value in vars(self).items():
            low, high = (
                int(name in positive),
                1 if name in ("beta1", "beta2", "muon_momentum") else 2**63,
            )
            if type(value) in (int, float) and not low <= value < high:
                wrong.append(f"{name} is {value}: it must be at least {low} and below {high}")
        if self.profile and self.profile + 2 > self.max_steps:
            wrong.append(
                f"profile {self.profile} starts at the third step, but max_steps is {self.max_steps}"
            )
        if self.lr_schedule != "constant" and self.min_lr > self.learning_rate:
            wrong.append(
                f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}; set both"
            )
        if self.optimizer == "muon" and not self.learning_rate:
            wrong.append("with muon, learning_rate must be above 0")
        return wrong + model_config(self, vocab_size=1).mistakes()


# One gradient that is not finite is bad luck, and normal when fp16 starts. This many in a row: the
# weights are damaged.
MAX_SKIPPED = 10


def train(config: TrainConfig) -> dict:
    """Run until max_steps or a signal; returns {"step", "val_loss", "stopped": signal number or
    None}.

    Raises ValueError for what a person, a file or the machine got wrong, and when training
    diverges.
    """
    # ---- 1. The machine --------------------------------------------------------------------------
    machine = runtime.start(config.device, config.tf32)
    say = print_lines if machine.is_main else lambda *_: None
    out_dir = Path(config.out_dir)

    # ---- 2. Where are we: at the start, on the way, or done? -------------------------------------
    restarts = machine.max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    found = machine.broadcast(checkpoint.choose(config, restarts) if machine.is_main else None)
    if found and not found.is_dir():
        raise ValueError(
            f"{found}: not visible on this machine; out_dir must be on a disk that all machines share"
        )
    state = checkpoint.read_state(found) if found else dict(step=0)
    start_step = state["step"]
    if found and start_step >= config.max_steps:
        say(checkpoint.finished_message(out_dir, start_step, config.max_steps))
        machine.close()
        return dict(step=start_step, val_loss=state["val_loss"], stopped=None)

    # ---- 3. The data -----------------------------------------------------------------------------
    sequences = sequences_per_process(config, machine.world_size)
    tokenizer = of_folder(config.data_dir, data.read_meta(config.data_dir).get("tokenizer", "gpt2"))
    windows = data.Windows(
        data.open_shards(config.data_dir, "train"), config.block_size, tokenizer.vocab_size
    )
    val_windows, val_places, val_bits = None, [], 0.0  # bits a byte for a loss of one nat a token
    if config.eval_every:
        val_windows = data.Windows(
            data.open_shards(config.data_dir, "val"), config.block_size, tokenizer.vocab_size
        )
        val_places = val_windows.first(config.eval_tokens)
        val_bits = val_windows.bits_per_byte(val_places, tokenizer)
    say(
        f"data: {config.data_dir}, {windows.n_tokens:,} training tokens, seen "
        f"{config.max_steps * config.total_batch_size / windows.n_tokens:.2f} times; "
        f"{len(val_places) * config.block_size:,} validation tokens\n"
        f"vocabulary: {tokenizer.name}, {tokenizer.vocab_size:,} tokens"
    )
    tasks = machine.broadcast(
        load_tasks(config, say) if machine.is_main and config.hellaswag_every else []
    )

    # ---- 4. The model, and how this machine computes it ------------------------------------------
    raw_model = build_model(config, found, tokenizer).to(machine.device)
    shape = raw_model.config
    say(
        f"model: {found or config.init_from}; {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, "
        f"{raw_model.num_params():,} parameters"
    )
    choice = (
        auto.choose(config, raw_model, machine, state.get("chosen", {}))
        if machine.is_main
        else None
    )
    chosen, why = machine.broadcast(choice)
    auto.apply(chosen, raw_model)
    say(f"{machine.note}\n{why}")
    machine = machine.computing_in(chosen["dtype"])

    # ---- 5. The optimizer, with its state if we resume -------------------------------------------
    optimizer = build_optimizer(raw_model, config, machine.dtype)
    say(f"optimizer: {describe(optimizer)}")
    # For fp16 only: its smallest number is 6e-8, so gradients are scaled up before they are rounded
    # to it.
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if found:
        say(checkpoint.resume(found, config, windows.n_tokens, optimizer, scaler))

    # ---- 6. Compile, then wrap. Only raw_model is evaluated, sampled and saved: it shares the parameters, its names
    # ----    have no prefix, and the shapes of evaluation do not recompile the training step. -----
    # Threads of compiled code add up the gradients of embeddings in the order in which they come,
    # unless told not to.
    torch.use_deterministic_algorithms(chosen["compile"] and machine.device.type == "cpu")
    model = torch.compile(raw_model) if chosen["compile"] else raw_model
    if machine.world_size > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        # Buckets of 100 MB instead of 25: torch.compile makes a graph of each.
        model = DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, bucket_cap_mb=100
        )

    # ---- 7. The batch: the recipe fixes its size in tokens, the machine the number of pieces it is
    batch_size = auto.batch_size(
        config.batch_size, sequences, raw_model, config.block_size, machine
    )
    n_accumulate = sequences // batch_size
    say(
        f"batch: {batch_size} (sequences) x {config.block_size} (tokens) x {machine.world_size} (processes) x "
        f"{n_accumulate} (micro-steps) = {config.total_batch_size:,} tokens a step; x {config.max_steps:,} (steps) = "
        f"{config.max_steps * config.total_batch_size:,} tokens"
    )
    batches = data.Batches(
        windows, batch_size, sequences * machine.world_size, machine.world_size, config.seed
    )
    if machine.device.type == "cuda":  # too little memory shows now, not after the first evaluation
        auto.try_step(model, batch_size, config.block_size, machine, moments=0 if found else 2)
        optimizer.zero_grad(set_to_none=machine.world_size == 1)

    # ---- 8. The loop. It goes one past the last update, to evaluate and save the result too ------
    if machine.is_main:
        make_room(out_dir, found, start_step)
        if config.checkpoint_every:
            checkpoint.check_space(out_dir, raw_model)
    log = Log(config, start_step, machine)
    log(
        "run",
        start_step,
        **facts(config, machine, raw_model, chosen["compile"], tokenizer, windows.n_tokens),
    )
    micro_steps = (
        (s, k, machine.rank)
        for s in range(start_step, config.max_steps)
        for k in range(n_accumulate)
    )
    coming = data.prefetch(batches.batch, micro_steps, machine.device)
    flops_per_step = raw_model.flops_per_token(config.block_size) * config.total_batch_size
    val_loss, skipped, skipped_in_a_row = None, 0, 0
    train_seconds, waited, steps_timed = (
        0.0,
        0.0,
        0,
    )  # since the last log line; waited: for data, log and checkpoints

    def due(every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == config.max_steps)

    with (
        contextlib.closing(log),
        contextlib.closing(coming),
        Console(config.max_steps, start_step, config.log_every, machine.is_main) as console,
        StopSignal(machine.is_main) as stop,  # until all is written: torchrun sends a signal twice
        checkpoint.Saver(out_dir, config.keep_checkpoints, console.line) as saver,
        profiler(out_dir, config.profile, machine) as profile,
    ):
        for step in range(start_step, config.max_steps + 1):
            # A checkpoint's own step was evaluated before it was saved.
            fresh = not found or step > start_step
            evaluated = fresh and due(config.eval_every, step)
            if evaluated:
                console.bar.set_postfix_str("validation")
                val_loss = evaluate(raw_model, val_windows, val_places, batch_size, machine)
                log("val", step, loss=val_loss, val_bpb=val_loss * val_bits)
                console.line(
                    f"step {step:,} | val loss {val_loss:.4f} ({val_loss * val_bits:.4f} bits a byte)"
                )

            untrained = (
                step == 0 and config.init_from == "scratch"
            )  # it guesses, and its text is noise
            if fresh and tasks and due(config.hellaswag_every, step) and not untrained:
                console.bar.set_postfix_str("HellaSwag")
                score = hellaswag.evaluate(raw_model, tokenizer, machine, tasks)
                log("hellaswag", step, **score)
                console.line(f"step {step:,} | hellaswag {score['acc_norm']:.4f} of {score['n']:,}")

            if fresh and due(config.sample_every, step) and machine.is_main and not untrained:
                text = sample_text(raw_model, tokenizer, config, machine)
                log("sample", step, text=text)
                console.line(f"step {step:,} | sample:\n{printable(text)}\n")

            stopping = machine.max(stop.received)
            if step > start_step and (due(config.checkpoint_every, step) or stopping):
                log(
                    "checkpoint", step
                )  # before saving: a resume cuts the line if the folder never came
                if machine.is_main:
                    state = dict(
                        step=step,
                        val_loss=val_loss if evaluated else None,
                        train_tokens=windows.n_tokens,
                    )
                    state |= dict(settings=dataclasses.asdict(config), chosen=chosen)
                    t0 = time.perf_counter()
                    saver.save(raw_model, tokenizer, optimizer, scaler, state)
                    waited += time.perf_counter() - t0
            if saver.writing.done():
                saver.wait()  # raises the error of a write that has failed
            if stopping or step == config.max_steps:
                break

            # ======== TRAINING: all else is watching ========
            t0 = time.perf_counter()
            lr = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]

            # The gradient of the whole batch, piece by piece. A piece's loss is a mean, so 1/k of
            # each adds up to one.
            loss = torch.zeros((), device=machine.device)
            for k in range(n_accumulate):
                if config.dropout:
                    seed_dropout(config.seed, step, k, machine.rank)
                t1 = time.perf_counter()
                x, y = next(coming)  # (B, T) each
                waited += time.perf_counter() - t1
                # Ranks average their gradients once, with the last piece.
                alone = machine.world_size > 1 and k < n_accumulate - 1
                with model.no_sync() if alone else contextlib.nullcontext():
                    with machine.autocast():
                        piece = model(x, y) / n_accumulate
                    scaler.scale(piece).backward()
                loss += piece.detach()

            # Clip the norm over all parameters. Every rank has the same average, so all decide
            # alike whether it is finite; if it is not, it never reaches the weights.
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(
                raw_model.parameters(), config.grad_clip or math.inf
            ).item()
            if math.isfinite(grad_norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(
                set_to_none=machine.world_size == 1
            )  # with several, gradients stay in DDP's buckets
            logging = config.log_every and (
                step % config.log_every == 0 or step == config.max_steps - 1
            )
            if logging:
                machine.synchronize()  # the optimizer's kernels are part of the step
            train_seconds, steps_timed = train_seconds + time.perf_counter() - t0, steps_timed + 1
            # ======== END OF TRAINING ========

            console.bar.update()
            if profile:
                profile.step()
            skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
            if skipped_in_a_row:
                skipped += 1
                console.line(
                    f"step {step:,} | the gradient is not finite: step skipped, weights unchanged"
                )
            if skipped_in_a_row == MAX_SKIPPED:
                advice = "resume with --resume_anyway=True and --dtype=fp32, more warmup_steps or a lower learning_rate"
                raise ValueError(
                    f"step {step:,}: the gradient was not finite {MAX_SKIPPED} times in a row; {advice}"
                )
            if logging:
                seconds, t0 = train_seconds / steps_timed, time.perf_counter()
                record = dict(
                    loss=machine.sum(loss).item()
                    / machine.world_size,  # nats a token, over all pieces and ranks
                    lr=lr,
                    grad_norm=grad_norm,
                    skipped=skipped,  # steps since this process started
                    tokens_per_s=config.total_batch_size / seconds,
                    mfu=machine.mfu(flops_per_step / seconds),
                    ms=1000 * seconds,
                    waited_ms=1000 * waited / steps_timed,
                    memory_gb=machine.peak_memory(),
                )
                log("train", step, **record)
                console.step(step, record)
                train_seconds, waited, steps_timed = 0.0, time.perf_counter() - t0, 0
            if step == start_step:  # compilation is done; from here on a slow rank is an error
                machine.wait_at_most(config.timeout)

        # No rank leaves before the main one has written: torchrun would take that for a failure and
        # stop the others.
        machine.wait_at_most(3600)
        saver.wait()
        machine.max(0)  # waits for all ranks

    # ---- 9. The summary --------------------------------------------------------------------------
    machine.close()
    if stopping:
        command = "the same command" + (
            f" without --resume={config.resume}" if config.resume != "auto" else ""
        )
        say(
            f"stopped by {signal.Signals(stopping).name} after {step:,} steps; {command} resumes it"
        )
    else:
        if config.report and machine.is_main:
            plot.write_report(out_dir)
        val = f", val loss {val_loss:.4f}" if val_loss is not None else ""
        say(
            f"done: {step:,} steps{val}{checkpoint.best_note(out_dir)}; metrics in {out_dir}/metrics.jsonl"
        )
    return dict(step=step, val_loss=val_loss, stopped=stopping or None)


def sequences_per_process(config: TrainConfig, world_size: int) -> int:
    """The sequences of a step that each process computes, in one or several micro-steps."""
    unit = config.block_size * world_size
    sequences, rest = divmod(config.total_batch_size, unit)
    if rest or not sequences:
        nearest = max(1, round(config.total_batch_size / unit)) * unit
        wrong = f"total_batch_size {config.total_batch_size} is not a multiple of block_size {config.block_size} x "
        raise ValueError(f"{wrong}{world_size} (processes); the nearest that is: {nearest}")
    return sequences


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of the update that follows `step` updates."""
    # 1. Linear warm-up: the optimizer's averages know nothing yet.
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    # 2. At the peak to the end, if so set.
    if config.lr_schedule == "constant":
        return config.learning_rate
    # 3. Down along half a wave of a cosine.
    height = 0.5 * (
        1 - math.cos(math.pi * (config.max_steps - step) / (config.max_steps - config.warmup_steps))
    )
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def seed_dropout(*numbers: int) -> None:
    """Seed torch from (seed, step, micro-step, rank): dropout has no state that a resume could
    lose.
    """
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


# ---- Data and model ------------------------------------------------------------------------------


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {
        "vocab_size",
        "flash",
        "exact_gelu",
    }
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in names})


def build_model(config: TrainConfig, found: Path | None, tokenizer: Tokenizer) -> GPT:
    """The model the run starts with: the checkpoint's, init_from's, or a new one; float32, on the
    CPU.
    """
    if found is None and config.init_from == "scratch":
        torch.manual_seed(config.seed)
        return GPT(model_config(config, tokenizer.vocab_size))
    source = found or config.init_from
    folder = locate(source)
    settings = {name: getattr(config, name) for name in ("dropout", "pad_vocab", "recompute")}
    model = GPT.from_pretrained(folder, **settings)
    V, T = model.config.vocab_size, model.config.block_size
    if V != tokenizer.vocab_size or of_folder(folder, V).name != tokenizer.name:
        shards = (
            f"the shards in {config.data_dir} are {tokenizer.name}'s with {tokenizer.vocab_size}"
        )
        other = "other " * (V == tokenizer.vocab_size)
        raise ValueError(
            f"{source} has {V} {other}tokens, but {shards}; make them with the model's tokenizer"
        )
    if T < config.block_size:
        raise ValueError(
            f"block_size {config.block_size} is beyond {source}'s context; set --block_size={T}"
        )
    return model


# ---- Watching: none of it changes what training computes -----------------------------------------


@torch.no_grad()
def evaluate(
    model: GPT, windows: data.Windows, places: np.ndarray, batch_size: int, machine: Runtime
) -> float:
    """Mean loss in nats a token over the windows at `places`; each rank takes its share, all get
    the result.
    """
    model.eval()
    total = torch.zeros((), device=machine.device)
    mine = places[machine.rank :: machine.world_size]
    for first in range(0, len(mine), batch_size):
        batch = torch.from_numpy(windows.read(mine[first : first + batch_size])).to(machine.device)
        with machine.autocast():
            total += model(batch[:, :-1], batch[:, 1:]) * len(batch)
    model.train()
    return machine.sum(total).item() / len(places)


def load_tasks(config: TrainConfig, say) -> list[hellaswag.Example]:
    """HellaSwag's tasks. If they cannot be fetched, one line says why and the run continues without
    them.
    """
    try:
        return hellaswag.examples(
            config.hellaswag_data, config.hellaswag_limit, config.hellaswag_style
        )
    except (ValueError, OSError) as error:
        if config.hellaswag_data:
            raise
        say(f"hellaswag: off. {error}, or set hellaswag_data")
        return []


def sample_text(model: GPT, tokenizer: Tokenizer, config: TrainConfig, machine: Runtime) -> str:
    """sample_prompt and its continuation, drawn from a generator of its own: training's is not
    touched.
    """
    prompt = tokenizer.encode(config.sample_prompt).tolist() or [tokenizer.end_of_text]
    prompt = prompt[-model.config.block_size :]
    options = dict(top_k=50, seeds=[config.seed], stop_token=tokenizer.end_of_text)
    with machine.autocast():
        return tokenizer.decode(
            prompt + inference.generate(model, [prompt], config.sample_tokens, **options)[0]
        )


@command("train.py")
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__ + configurator.help_text(TrainConfig))
        return
    config = configurator.configure(TrainConfig, argv)
    try:
        is_main = os.environ.get("RANK", "0") == "0"
        busy = f"out_dir {config.out_dir}: another run is writing to it; wait for it, or stop it"
        with lock(Path(config.out_dir) / ".lock", busy) if is_main else contextlib.nullcontext():
            result = train(config)
    except torch.OutOfMemoryError:
        hint = "set --batch_size=auto, a smaller one, or --recompute=True; the result is the same"
        raise ValueError(f"out of memory with batch_size {config.batch_size}: {hint}") from None
    except RuntimeError as error:  # torch.distributed raises several types
        if not re.search("gloo|nccl|connection|timed out", str(error), re.IGNORECASE):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"another process is gone or hangs (see --timeout): {reason}") from None
    except KeyboardInterrupt:
        os._exit(130)  # at once, even while a thread writes a checkpoint
    if result["stopped"]:
        sys.exit(128 + result["stopped"])


if __name__ == "__main__":
    main()
