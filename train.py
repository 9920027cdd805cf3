"""Train a GPT-2: one run, told from top to bottom by `train`.

    python train.py config/quickstart.py                 # one process: CPU, one GPU, or a Mac
    python train.py config/shakespeare.py --max_steps=100    # any setting from the command line
    torchrun --standalone --nproc_per_node=8 train.py    # eight GPUs, the 124M reproduction
    python train.py --help                               # every setting, its default and meaning

The same command resumes a stopped run, and says so when the run is finished.
"""

import os

# Before torch loads OpenMP: threads that wait for each other go to sleep soon, and do not spin
# against other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# MKL would keep the buffers of products in float32: 0.1 GB, also where a run is in bf16.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")

import contextlib
import dataclasses
import math
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import configurator
import hellaswag
import plot
from configurator import FIXED, FREE, setting
from model import GPT, GPTConfig, open_model
from parts import auto, checkpoint, data, dial, inference, pretrained, runtime, standin
from parts.checkpoint import ResumePoint, RunState, Saver
from parts.console import Console, StopSignal, command, print_lines, printable, profiler
from parts.embedding import rows_added_last
from parts.files import lock
from parts.metrics import Log, command_line, describe_run
from parts.optimizer import build_optimizer, clip_gradients, describe
from parts.report import is_reported
from parts.runtime import Runtime
from parts.tokenizer import Tokenizer
from parts.zero import OptimizerShare

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel


@dataclasses.dataclass(frozen=True)
class TrainConfig(GPTConfig):
    """The settings of a run: those of the model, and these.

    A setting changes the losses, so that a resume refuses another value, unless it says otherwise.
    The model's own settings, which are not declared here, are fixed.
    """

    # ---- The run ----
    # Folder of the shards.
    data_dir: str = setting("shards/fineweb_edu_10B", resume=FREE, is_path=True)
    # For checkpoints and metrics.jsonl.
    out_dir: str = setting("out/gpt2_124M", resume=FREE, is_path=True)
    # scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, a run or a checkpoint's folder; its
    # shape comes from there.
    init_from: str = setting("scratch", resume=FREE, is_path=True)
    # auto: from out_dir's newest checkpoint; never: move out_dir aside; or a checkpoint's folder.
    resume: str = setting("auto", resume=FREE, is_path=True)
    # Resume even if settings that change the losses differ from the checkpoint's.
    resume_anyway: bool = setting(False, resume=FREE)
    seed: int = 1337  # of the initial weights, the order of the data, dropout and samples
    # How long training may take. The law of docs/scaling.md then chooses the model's size, the
    # batch, the rates and the steps; 0: they are as they are set.
    hours: float = setting(0.0, resume=FIXED)

    # ---- The model ----
    vocab_size: int = dataclasses.field(init=False, default=50257)  # the tokenizer's
    # Tokens in a training sequence; from scratch also the model's longest context.
    block_size: int = setting(1024, at_least=1)
    dropout: float = 0.0  # 0 for pretraining, 0.1 or 0.2 where the text is seen many times
    # Fused attention; False writes the (T, T) matrix to memory.
    flash: Literal["auto", True, False] = setting("auto", resume=FREE)  # type: ignore[assignment]
    # Recompute blocks in the backward pass: much less memory, a third more time.
    recompute: bool = setting(False, resume=FREE)

    # ---- The batch ----
    # The most sequences in a forward pass of a process; auto: what fits.
    batch_size: int | Literal["auto"] = setting("auto", resume=FREE, at_least=1)
    # Tokens in a step, over all processes and gradient accumulation.
    total_batch_size: int = setting(524_288, at_least=1)

    # ---- The optimizer ----
    # muon: for the blocks' matrices; sgd's momentum is beta1.
    optimizer: Literal["adamw", "muon", "sgd"] = setting("adamw", resume=FIXED)
    learning_rate: float = 6e-4  # peak learning rate, reached after the warm-up
    min_lr: float = 6e-5  # where the cosine ends
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_steps: int = 715  # linear, from 0
    max_steps: int = 19_073  # 10B tokens at 524,288 a step
    weight_decay: float = 0.1  # on matrices and embeddings only
    beta1: float = setting(0.9, below=1)  # decay of the running mean of the gradient
    beta2: float = setting(0.95, below=1)  # decay of the running mean of its square
    # Of the blocks' matrices, with the same schedule; the rest has learning_rate.
    muon_learning_rate: float = 6e-4
    # Decay of the running mean of a matrix's gradient.
    muon_momentum: float = setting(0.95, below=1)
    # Largest norm of the gradient over all parameters; 0 turns clipping off.
    grad_clip: float = 1.0
    fused: bool = setting(True, resume=FREE)  # all parameters updated in one kernel
    # Each process keeps the state of a part of the parameters and updates these (ZeRO-1): less
    # memory where there are several.
    shard_optimizer: bool = setting(False, resume=FREE)

    # ---- Watching (*_every: in steps, 0 is off; also done after the last step) ----
    log_every: int = setting(1, resume=FREE)  # a line, or the progress bar on a terminal
    eval_every: int = setting(250, resume=FREE)  # validation loss
    # Validation tokens, always the same ones.
    eval_tokens: int = setting(10_485_760, resume=FREE, at_least=1)
    # HellaSwag's score, see hellaswag.py; 0 for text that is not English.
    hellaswag_every: int = setting(500, resume=FREE)
    # Only the first so many tasks; 0 is all 10,042.
    hellaswag_limit: int = setting(0, resume=FREE)
    # harness: as lm-evaluation-harness scores.
    hellaswag_style: Literal["completion", "harness"] = setting("completion", resume=FREE)
    # A copy of hellaswag_val.jsonl; if empty, it is fetched once to shards/hellaswag.
    hellaswag_data: str = setting("", resume=FREE, is_path=True)
    sample_every: int = setting(1_000, resume=FREE)  # a sample of text
    # What the sample continues.
    sample_prompt: str = setting("Hello, I'm a language model,", resume=FREE)
    sample_tokens: int = setting(64, resume=FREE, at_least=1)  # how long it is
    # A checkpoint; a multiple of eval_every gives each its validation loss.
    checkpoint_every: int = setting(1_000, resume=FREE)
    # Also the model before its first step, as step_0000000: the page can show where it began.
    checkpoint_first: bool = setting(False, resume=FREE)
    # How many of the newest to keep, besides the best by validation loss; 0 keeps all.
    keep_checkpoints: int = setting(2, resume=FREE)
    # At the end, write report.md and pictures of the curves to out_dir.
    report: bool = setting(True, resume=FREE)
    wandb: bool = setting(False, resume=FREE)  # also log to Weights & Biases (pip install wandb)
    wandb_project: str = setting("reproduce-gpt2", resume=FREE)  # the run's name there is out_dir's
    # Also log to out_dir for TensorBoard (pip install tensorboard).
    tensorboard: bool = setting(False, resume=FREE)

    # ---- The machine ----
    device: str = setting("auto", resume=FREE)  # auto, cpu, cuda, cuda:1, mps
    # Of matrix products; weights stay fp32.
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # auto: if there is a compiler and the run is long enough to pay.
    compile: Literal["auto", True, False] = setting("auto", resume=FREE)
    # On NVIDIA: products of float32 matrices with a 10-bit mantissa.
    tf32: bool = setting(True, resume=FREE)
    # Seconds that ranks wait for a slow one before the run ends (after the first step).
    timeout: int = setting(120, resume=FREE, at_least=1, below=10**9)
    # Profile this many steps, from the third on, to out_dir/profile.txt and trace.json.
    profile: int = setting(0, resume=FREE)

    def mistakes(self) -> list[str]:
        """One sentence for each impossible value.

        `sequences_per_process` checks what depends on the number of processes.
        """
        # What they have in common is said once.
        mistakes = super().mistakes()
        wrong = {sentence.split()[0] for sentence in mistakes}
        for sentence in configurator.out_of_bounds(self):
            if sentence.split()[0] not in wrong:
                mistakes.append(sentence)
        if mistakes:
            return mistakes
        if self.profile and self.profile + 2 > self.max_steps:
            mistakes.append(
                f"profile {self.profile} starts at the third step, "
                f"but max_steps is {self.max_steps}"
            )
        if self.lr_schedule != "constant" and self.min_lr > self.learning_rate:
            mistakes.append(
                f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}; set both"
            )
        if self.optimizer == "muon" and not self.learning_rate:
            mistakes.append("with muon, learning_rate must be above 0")
        if self.hours and self.init_from != "scratch":
            mistakes.append("hours is for a model from scratch; init_from has a size already")
        return mistakes


# Steps: a virtual machine may take as long as a few of them to lend its memory in large pages.
LARGE_PAGES_PAY = 50
# A single gradient that is not finite is harmless (fp16 has some at the start). So many in a row
# mean that training has diverged.
MAX_SKIPPED = 10


def train(config: TrainConfig) -> dict:
    """Run until max_steps or a signal.

    Returns {"step", "val_loss", "stopped": signal number or None}. Raises ValueError for a mistake
    of a person, a file or the machine, and when training diverges.
    """
    # ---- 1. The machine --------------------------------------------------------------------------
    is_long = config.max_steps >= LARGE_PAGES_PAY
    machine = runtime.start(config.device, config.tf32, large_pages=is_long)
    say = print_lines if machine.is_main else lambda text: None
    out_dir = Path(config.out_dir)

    if config.hours:
        config = machine.broadcast(settings_by_hours(config, machine, say))

    # ---- 2. New, resumed or finished? ------------------------------------------------------------
    restarts = machine.max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    resume_point = None
    if machine.is_main:
        rules = configurator.resume_rules(TrainConfig)
        resume_point = checkpoint.find_resume_point(config, rules, restarts)
    resume_point = machine.broadcast(resume_point)
    start_step = 0
    if resume_point is not None:
        start_step = resume_point.state.step
        if not resume_point.folder.is_dir():
            raise ValueError(
                f"{resume_point.folder}: not visible on this machine; "
                "out_dir must be on a disk that all machines share"
            )
        if start_step >= config.max_steps:
            if machine.is_main:
                finish(config, resume_point)
            command_now = command_line(machine)
            say(checkpoint.finished_message(out_dir, start_step, config.max_steps, command_now))
            machine.close()
            return dict(step=start_step, val_loss=resume_point.state.val_loss, stopped=None)

    # ---- 3. The data -----------------------------------------------------------------------------
    sequences = sequences_per_process(config, machine.world_size)
    tokenizer = data.tokenizer_of_shards(config.data_dir)
    shards = data.open_shards(config.data_dir, "train")
    windows = data.TokenWindows(shards, config.block_size, tokenizer.vocab_size)
    text_digest = data.digest_of_shards(config.data_dir)
    if resume_point is not None:
        checkpoint.check_text(resume_point, config, windows.n_tokens, text_digest)
    windows.check_enough(sequences * machine.world_size)
    validation = Validation(config, tokenizer)
    epochs = config.max_steps * config.total_batch_size / windows.n_tokens
    say(
        f"data: {config.data_dir}, {windows.n_tokens:,} training tokens, seen {epochs:.2f} times; "
        f"{validation.n_tokens:,} validation tokens\n"
        f"vocabulary: {tokenizer.name}, {tokenizer.vocab_size:,} tokens"
    )
    check_sample_prompt(config, tokenizer)
    for sentence in doubtful_settings(config):
        say(f"NOTE: {sentence}")
    tasks = []
    if machine.is_main and config.hellaswag_every:
        tasks = load_tasks(config, tokenizer, say)
    tasks = machine.broadcast(tasks)

    # ---- 4. The model, and how this machine computes it ------------------------------------------
    raw_model = build_model(config, resume_point, tokenizer)
    shape = raw_model.config
    say(
        f"model: {resume_point.folder if resume_point else config.init_from}; "
        f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, "
        f"{raw_model.num_params():,} parameters"
    )
    departure = pretrained.departure_from_gpt2(raw_model) if machine.is_main else ""
    departure = machine.broadcast(departure)
    if departure and resume_point is not None and not config.resume_anyway:
        if pretrained.is_gpt2_folder(resume_point.folder):
            raise ValueError(
                f"{resume_point.folder} is a GPT-2, and model.py is not one any more "
                f"({departure}): restore it, or use another out_dir; "
                "--resume_anyway=True continues with the new one"
            )
    cls: Any = type(raw_model)
    if not standin.loss_is_cross_entropy(cls, raw_model.config):
        say(
            "NOTE: in evaluation, model.py's loss is not the cross entropy of its logits: "
            "validation reports the loss; HellaSwag and samples use the logits"
        )
    if departure:
        say(
            f"model.py is not GPT-2 any more ({departure}): checkpoints hold its own tensors and "
            "model.py, which everything here opens, and transformers and its like do not"
        )
    raw_model.to(machine.device)

    choice = None
    if machine.is_main:
        saved = {}
        if resume_point is not None:
            saved = dict(exact_norm=False) | resume_point.state.chosen
        choice = auto.choose_arithmetic(config, raw_model, machine, saved)
    arithmetic, why = machine.broadcast(choice)
    auto.apply(arithmetic, raw_model)
    dtype = arithmetic.torch_dtype
    say(f"{machine.note}\n{why}")

    # ---- 5. The optimizer, with its state if we resume -------------------------------------------
    optimizer = build_optimizer(raw_model, config, dtype)
    parameter_names = checkpoint.parameter_names(raw_model, optimizer)
    share = OptimizerShare(optimizer, machine, config.shard_optimizer)
    say(f"optimizer: {describe(optimizer)}{share.note()}")
    # For fp16 only: its smallest number is 6e-8, so gradients are scaled up before they are
    # rounded to it.
    scaler = torch.amp.GradScaler(machine.device.type, enabled=dtype == torch.float16)
    if resume_point is not None:
        say(checkpoint.restore(resume_point, config, parameter_names, share, scaler))

    # ---- 6. Compile, then wrap -------------------------------------------------------------------
    # Only raw_model is evaluated, sampled and saved: it shares the parameters, its names have no
    # prefix, and the shapes of evaluation do not recompile the training step.
    #
    # Compiled CPU code adds up the gradients of embeddings with atomics, in a different order each
    # time, unless this is set. (To set it, even to what it is, imports all of torch.compile.)
    deterministic = arithmetic.compile and machine.device.type == "cpu"
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    model: Any = torch.compile(raw_model) if arithmetic.compile else raw_model
    if machine.world_size > 1:
        gpu = [machine.device.index] if machine.device.type == "cuda" else None
        # Buckets of 100 MB instead of 25: torch.compile makes a graph of each.
        model = DistributedDataParallel(
            model, device_ids=gpu, gradient_as_bucket_view=True, bucket_cap_mb=100
        )
    # With several processes, gradients stay in DDP's buckets.
    set_to_none = machine.world_size == 1

    def around_micro_step(is_last: bool) -> AbstractContextManager:
        """How the gradients of a micro-step, which may be the last of its step, come together."""
        if machine.world_size > 1:
            # Ranks average their gradients once.
            return contextlib.nullcontext() if is_last else model.no_sync()
        if machine.device.type == "cpu" and not arithmetic.compile:
            return rows_added_last(raw_model.transformer.wte)
        return contextlib.nullcontext()

    # ---- 7. The batch ----------------------------------------------------------------------------
    # The recipe fixes its size in tokens; the machine decides in how many micro-steps.
    # A resumed run has the optimizer's state in memory by now.
    state_bytes = 0 if resume_point else share.state_bytes()
    batch_size = auto.batch_size(
        config.batch_size, sequences, raw_model, config.block_size, machine, dtype, state_bytes
    )
    n_accumulate = sequences // batch_size
    say(
        f"batch: {batch_size} (sequences) x {config.block_size} (tokens) x "
        f"{machine.world_size} (processes) x {n_accumulate} (micro-steps) = "
        f"{config.total_batch_size:,} tokens a step; x {config.max_steps:,} (steps) = "
        f"{config.max_steps * config.total_batch_size:,} tokens"
    )
    batches = data.Batches(
        windows,
        batch_size=batch_size,
        windows_per_step=sequences * machine.world_size,
        world_size=machine.world_size,
        seed=config.seed,
    )
    if machine.device.type == "cuda":  # too little memory shows now, not after the first evaluation
        auto.try_step(model, batch_size, config.block_size, machine, dtype, state_bytes)
        optimizer.zero_grad(set_to_none)

    # ---- 8. The run's folder ---------------------------------------------------------------------
    if machine.is_main:
        checkpoint.make_room(out_dir, resume_point)
        if config.checkpoint_every:
            checkpoint.check_space(out_dir, raw_model)
    log = Log(config, start_step, machine)
    facts = describe_run(
        config,
        machine,
        raw_model,
        tokenizer,
        dtype=dtype,
        compiled=arithmetic.compile,
        train_tokens=windows.n_tokens,
    )
    if config.hours:
        facts["expected_bpb"] = dial.expect(config, raw_model, tokenizer)
        say(f"expected: {facts['expected_bpb']} bits a byte of the validation text")
    log("run", start_step, **facts)
    clock = StepClock()
    loader = data.BatchLoader(
        batches,
        rank=machine.rank,
        n_micro_steps=n_accumulate,
        first_step=start_step,
        end_step=config.max_steps,
        device=machine.device,
    )

    # ---- 9. The loop. It goes one past the last update, to evaluate and save the result ----------
    # A checkpoint is written from the tensors themselves where they are on the CPU.
    live = machine.device.type == "cpu" and not share.shared
    flops_per_step = raw_model.flops_per_token(config.block_size) * config.total_batch_size
    val_loss = None
    skipped = 0  # steps whose gradient was not finite, since this process started
    skipped_in_a_row = 0
    with (
        contextlib.closing(log),
        contextlib.closing(loader),
        Console(config.max_steps, start_step, config.log_every, machine.is_main) as console,
        # Until all is written: torchrun sends a signal twice.
        StopSignal(machine.is_main) as stop,
        Saver(out_dir, config.keep_checkpoints, departure, console.line) as saver,
        profiler(out_dir, config.profile, machine) as profile,
    ):
        # What is done besides training. None of it changes what training computes.
        def due(every: int, step: int) -> bool:
            if resume_point is not None and step == start_step:
                return False  # done before the checkpoint was saved
            return every > 0 and (step % every == 0 or step == config.max_steps)

        def validate(step: int) -> float:
            console.bar.set_postfix_str("validation")
            loss = evaluate(raw_model, validation, batch_size, machine, dtype)
            bits = loss * validation.bits_per_nat
            log("val", step, loss=loss, val_bpb=bits)
            console.line(f"step {step:,} | val loss {loss:.4f} ({bits:.4f} bits a byte)")
            return loss

        def score(step: int) -> None:
            console.bar.set_postfix_str("HellaSwag")
            result = hellaswag.evaluate(raw_model, tokenizer, machine, tasks, dtype=dtype)
            log("hellaswag", step, **result)
            console.line(f"step {step:,} | hellaswag {result['acc_norm']:.4f} of {result['n']:,}")

        def write_sample(step: int) -> None:
            with machine.autocast(dtype):
                text = sample_text(raw_model, tokenizer, config)
            log("sample", step, text=text)
            console.line(f"step {step:,} | sample:\n{printable(text)}\n")

        def save(step: int, val_loss: float | None) -> None:
            # Before saving: a resume cuts the line if the folder never came.
            log("checkpoint", step)
            if val_loss is not None and not math.isfinite(val_loss):
                val_loss = None
            state = RunState(
                step=step,
                val_loss=val_loss,
                settings=vars(config),
                train_tokens=windows.n_tokens,
                train_sha256=text_digest,
                chosen=dataclasses.asdict(arithmetic),
            )
            with clock.waiting():
                saver.wait()  # for the checkpoint before
                train_state = dict(
                    optimizer=share.collect(live),
                    parameters=parameter_names,
                    scaler=scaler.state_dict(),
                )
                if machine.is_main:
                    saver.save(raw_model, tokenizer, train_state, state, live)

        for step in range(start_step, config.max_steps + 1):
            # At step 0 a model from scratch is at chance: nothing to score or to sample.
            at_chance = step == 0 and config.init_from == "scratch"
            evaluated = due(config.eval_every, step)
            if evaluated:
                val_loss = validate(step)
            if tasks and due(config.hellaswag_every, step) and not at_chance:
                score(step)
            if machine.is_main and due(config.sample_every, step) and not at_chance:
                write_sample(step)
            if log.failure is not None:
                stop.received = signal.SIGTERM
            stopping = machine.max(stop.received)
            is_first = step == 0 and resume_point is None
            wanted = config.checkpoint_first if is_first else due(config.checkpoint_every, step)
            if wanted or (stopping and step > start_step):
                save(step, val_loss if evaluated else None)
            saver.check()
            if stopping or step == config.max_steps:
                break

            # ======== One training step ========
            clock.start()
            lr = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]

            # The gradient of the whole batch, a micro-step at a time. The loss of a micro-step is a
            # mean, so 1/k of each adds up to the mean of all.
            loss = torch.zeros((), device=machine.device)
            for k in range(n_accumulate):
                seed_step(config.seed, step, k, machine.rank)
                with clock.waiting():
                    x, y = loader.batch(step, k)  # (B, T) each
                with around_micro_step(is_last=k == n_accumulate - 1):
                    with machine.autocast(dtype):
                        micro_loss = model(x, y) / n_accumulate
                    scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()

            # Every rank has the same average gradient, so all decide alike whether it is finite. If
            # it is not, it never reaches the weights.
            scaler.unscale_(optimizer)
            max_norm = config.grad_clip or math.inf
            parameters = list(raw_model.parameters())
            grad_norm = clip_gradients(parameters, max_norm, arithmetic.exact_norm).item()
            if math.isfinite(grad_norm):
                with clock.waiting():
                    saver.preserve()  # of the last checkpoint what is not written yet
                share.step(scaler)
            scaler.update()
            if step == start_step:
                check_gradients(raw_model, machine, console.line)
            optimizer.zero_grad(set_to_none)
            log_now = is_log_step(step, config)
            if log_now:
                machine.synchronize()  # the optimizer's kernels are part of the step
            clock.stop()
            # ======== End of the training step ========

            console.bar.update()
            if profile:
                profile.step()
            if math.isfinite(grad_norm):
                skipped_in_a_row = 0
            else:
                skipped += 1
                skipped_in_a_row += 1
                console.line(
                    f"step {step:,} | the gradient is not finite: step skipped, weights unchanged"
                )
            if skipped_in_a_row == MAX_SKIPPED:
                raise ValueError(
                    f"step {step:,}: the gradient was not finite {MAX_SKIPPED} times in a row; "
                    "resume with --resume_anyway=True and --dtype=fp32, more warmup_steps or a "
                    "lower learning_rate"
                )
            if log_now:
                seconds, waited = clock.read()
                with clock.waiting():
                    record = dict(
                        # nats a token, over all micro-steps and ranks
                        loss=machine.sum(loss).item() / machine.world_size,
                        lr=lr,
                        grad_norm=grad_norm,
                        skipped=skipped,
                        tokens_per_s=config.total_batch_size / seconds,
                        mfu=machine.mfu(flops_per_step / seconds),
                        ms=1000 * seconds,
                        waited_ms=1000 * waited,
                        memory_gb=machine.peak_memory(),
                    )
                    log("train", step, **record)
                    console.step(step, record)
            if step == start_step:  # compilation is done; from here on a slow rank is an error
                machine.wait_at_most(config.timeout)

        # All ranks wait for rank 0 to finish writing. If one exited first, torchrun would take that
        # for a failure and stop the others.
        machine.wait_at_most(3600)
        saver.wait()
        machine.barrier()

    # ---- 10. The summary -------------------------------------------------------------------------
    machine.close()
    if log.failure is not None:
        say(f"the log could not be written: saved after {step:,} steps, as far as there is room")
        raise log.failure
    if stopping:
        name = signal.Signals(stopping).name
        same = "the same command"
        if config.resume != "auto":
            same += f" without --resume={config.resume}"
        say(f"stopped by {name} after {step:,} steps; {same} resumes it")
        # Who stopped it wants to see how far it came. All that counts is saved by now.
        if config.report and machine.is_main:
            plot.write_report(out_dir)
    else:
        if config.report and machine.is_main:
            plot.write_report(out_dir)
        result = f"done: {step:,} steps"
        if val_loss is not None:
            result += f", val loss {val_loss:.4f}"
        say(f"{result}{checkpoint.best_note(out_dir)}; metrics in {out_dir}/metrics.jsonl")
        if config.hours and val_loss is not None:
            bits = val_loss * validation.bits_per_nat
            say(f"hours: expected {facts['expected_bpb']} bits a byte, came to {bits:.3f}")
    return dict(step=step, val_loss=val_loss, stopped=stopping or None)


def finish(config: TrainConfig, point: ResumePoint) -> None:
    """Do what a run that ended right after its last checkpoint has left undone: leftovers, old
    checkpoints, and the report.
    """
    out_dir = Path(config.out_dir)
    if not checkpoint.is_in(out_dir, point):
        return
    checkpoint.delete_unfinished(out_dir)
    # Only as the run itself would have: another command deletes nothing here.
    if point.state.settings.get("keep_checkpoints") == config.keep_checkpoints:
        checkpoint.prune(out_dir, config.keep_checkpoints, print_lines)
    if config.report and not is_reported(out_dir):
        plot.write_report(out_dir)


def check_gradients(model: GPT, machine: Runtime, say: Callable[[str], None]) -> None:
    """One line if parameters had no part in the loss of a step: it did not change them.

    ValueError with several processes, which wait for each other's gradient of every parameter.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if not missing:
        return
    names = ", ".join(missing[:3])
    if len(missing) > 3:
        names += f" and {len(missing) - 3} more"
    if machine.world_size > 1:
        raise ValueError(
            f"no gradient for {names}: with several processes the loss of each step must depend on "
            "every parameter; add 0 * parameter.sum() to it"
        )
    say(f"NOTE: no gradient for {names}: the loss of the first step did not depend on it")


class StepClock:
    """The time of the steps since it was last read, and how much of it was spent waiting.

    Waiting is for data, within a step, and for the log and checkpoints, between two steps.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.train_seconds = 0.0
        self.waited_seconds = 0.0
        self.n_steps = 0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.train_seconds += time.perf_counter() - self.started
        self.n_steps += 1

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited_seconds += time.perf_counter() - start

    def read(self) -> tuple[float, float]:
        """Seconds a step, and seconds a step of waiting; then it starts anew."""
        per_step = self.train_seconds / self.n_steps, self.waited_seconds / self.n_steps
        self.reset()
        return per_step


def settings_by_hours(
    config: TrainConfig, machine: Runtime, say: Callable[[str], None]
) -> TrainConfig:
    """The settings that config.hours stands for: a resumed run's own, or the law's.

    ValueError if some of them were set by hand too, or the time is too short.
    """
    typed = dial.typed(config)
    saved = checkpoint.saved_settings(config)
    if saved.get("hours"):
        kept = {name: saved[name] for name in dial.CHOSEN if name not in typed}
        return dataclasses.replace(config, **kept)
    if typed:
        raise ValueError(dial.describe_conflict(typed))
    if machine.world_size > 1:
        raise ValueError("hours is for one process: its law was measured with small models")
    tokenizer = data.tokenizer_of_shards(config.data_dir)
    text = dial.study_text(config.data_dir, tokenizer)

    def build(config: TrainConfig) -> GPT:
        return GPT(model_config(config, tokenizer.vocab_size))

    config = dial.choose(config, machine, text, build, say)
    say(f"hours: the same by hand: {dial.as_command(config)}")
    return config


def sequences_per_process(config: TrainConfig, world_size: int) -> int:
    """The sequences of a step that each process computes, in one or several micro-steps."""
    unit = config.block_size * world_size
    sequences, rest = divmod(config.total_batch_size, unit)
    if rest or not sequences:
        nearest = max(1, round(config.total_batch_size / unit)) * unit
        raise ValueError(
            f"total_batch_size {config.total_batch_size} is not a multiple of "
            f"block_size {config.block_size} x {world_size} (processes); "
            f"the nearest that is: {nearest}"
        )
    return sequences


def doubtful_settings(config: TrainConfig) -> list[str]:
    """One sentence for each setting that is possible, but makes a run learn little or nothing."""
    sentences = []
    warmup_steps = config.warmup_steps
    if warmup_steps >= config.max_steps and config.learning_rate:
        last = learning_rate_at(config.max_steps - 1, config)
        sentences.append(
            f"warmup_steps {warmup_steps} is not below max_steps {config.max_steps}: the learning "
            f"rate ends at {last:.1e}, before it has reached {config.learning_rate:.1e}"
        )
    if not config.learning_rate:
        sentences.append("learning_rate is 0: the weights do not change")
    return sentences


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of the update that follows `step` updates."""
    # 1. Linear warm-up: the optimizer's averages know nothing yet.
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    # 2. At the peak to the end, if so set.
    if config.lr_schedule == "constant":
        return config.learning_rate
    # 3. Down along half a wave of a cosine.
    left = (config.max_steps - step) / (config.max_steps - config.warmup_steps)  # 1 to 0
    height = 0.5 * (1 - math.cos(math.pi * left))
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def seed_step(*numbers: int) -> None:
    """Seed torch from (seed, step, micro-step, rank).

    So dropout, and whatever else a model draws in training, has no state that a resume could lose.
    """
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed >> 1))


def is_log_step(step: int, config: TrainConfig) -> bool:
    if not config.log_every:
        return False
    return step % config.log_every == 0 or step == config.max_steps - 1


# ---- The model -----------------------------------------------------------------------------------


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The model's part of the settings."""
    return GPTConfig(vocab_size=vocab_size, **model_settings(config))


def model_settings(config: TrainConfig) -> dict:
    settings = {}
    for field in dataclasses.fields(GPTConfig):
        if field.name not in ("vocab_size", "flash"):  # the tokenizer's, and auto's
            settings[field.name] = getattr(config, field.name)
    return settings


def build_model(config: TrainConfig, resume_point: ResumePoint | None, tokenizer: Tokenizer) -> GPT:
    """The model the run starts with: the checkpoint's, init_from's, or a new one.

    float32, on the CPU. ValueError if it does not fit the shards.
    """
    if resume_point is None and config.init_from == "scratch":
        check_size(config)
        torch.manual_seed(config.seed)
        return GPT(model_config(config, tokenizer.vocab_size))
    source = resume_point.folder if resume_point else config.init_from
    torch.manual_seed(config.seed)  # of what model.py has and a GPT-2 has not
    model, own_tokenizer, _ = open_model(source, **model_settings(config))
    V = model.config.vocab_size
    if V != tokenizer.vocab_size or own_tokenizer.name != tokenizer.name:
        others = "other tokens" if V == tokenizer.vocab_size else "tokens"
        raise ValueError(
            f"{source} has {V} {others}, but the shards in {config.data_dir} are "
            f"{tokenizer.name}'s with {tokenizer.vocab_size}; make them with the model's tokenizer"
        )
    longest = model.config.block_size
    if longest < config.block_size:
        raise ValueError(
            f"block_size {config.block_size} is beyond {source}'s context; "
            f"set --block_size={longest}"
        )
    return model


def check_size(config: TrainConfig) -> None:
    """ValueError if a new model is far beyond this machine: a system that lends more memory than it
    has would end the process without a word, after minutes.
    """
    available = runtime.physical_memory()
    n_bytes = 4 * 12 * config.n_layer * config.n_embd**2  # the matrices of GPT-2's blocks
    if available is not None and n_bytes > 4 * available:
        raise ValueError(
            f"n_layer {config.n_layer:,} of n_embd {config.n_embd:,} take {n_bytes / 1e9:,.0f} GB, "
            f"and this machine has {available / 1e9:,.0f} GB; choose a smaller model"
        )


# ---- Watching ------------------------------------------------------------------------------------


class Validation:
    """The validation text: always the same windows, in order."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer):
        self.n_tokens = 0
        if not config.eval_every:
            return
        shards = data.open_shards(config.data_dir, "val")
        self.windows = data.TokenWindows(shards, config.block_size, tokenizer.vocab_size)
        self.starts = self.windows.select_first(config.eval_tokens)
        self.n_tokens = len(self.starts) * config.block_size
        # The bits a byte of a loss of one nat a token.
        self.bits_per_nat = self.windows.bits_per_byte(self.starts, tokenizer)


@torch.no_grad()
def evaluate(
    model: GPT, validation: Validation, batch_size: int, machine: Runtime, dtype: torch.dtype
) -> float:
    """The mean loss in nats a token. Each rank takes its share; all get the result."""
    model.eval()
    total = torch.zeros((), device=machine.device)
    own = validation.starts[machine.rank :: machine.world_size]
    for first in range(0, len(own), batch_size):
        tokens = validation.windows.read(own[first : first + batch_size])  # (B, T + 1)
        batch = torch.from_numpy(tokens).to(machine.device)
        with machine.autocast(dtype):
            total += model(batch[:, :-1], batch[:, 1:]) * len(batch)
    model.train()
    return machine.sum(total).item() / len(validation.starts)


def load_tasks(
    config: TrainConfig, tokenizer: Tokenizer, say: Callable[[str], None]
) -> list[hellaswag.Example]:
    """HellaSwag's tasks.

    If they cannot be fetched, or the tokenizer has not all their characters, one line says why and
    the run goes on.
    """
    try:
        tasks = hellaswag.examples(
            config.hellaswag_data, config.hellaswag_limit, config.hellaswag_style
        )
        if tokenizer.end_of_text is None:
            for task in tasks:
                tokenizer.encode(" ".join([task.context, *task.endings]))
        return tasks
    except (ValueError, OSError) as error:
        if config.hellaswag_data:
            raise
        say(f"hellaswag: off. {error}, or set hellaswag_data")
        return []


def check_sample_prompt(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """ValueError if the tokenizer has not all characters of the prompt of the run's samples."""
    if not config.sample_every:
        return
    try:
        tokenizer.encode(config.sample_prompt)
    except ValueError as error:
        raise ValueError(
            f"sample_prompt {config.sample_prompt!r}: {error}; set --sample_prompt to a text of "
            "its characters, or --sample_every=0"
        ) from None


def sample_text(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> str:
    """sample_prompt and its continuation, drawn from a generator of its own."""
    prompt = tokenizer.encode(config.sample_prompt).tolist() or [tokenizer.start]
    prompt = prompt[-model.config.block_size :]
    [continuation] = inference.generate(
        model,
        [prompt],
        config.sample_tokens,
        top_k=50,
        seeds=[config.seed],
        stop_token=tokenizer.end_of_text,
    )
    return tokenizer.decode(prompt + continuation)


# ---- The command ---------------------------------------------------------------------------------


SAVE_MEMORY = (
    "set --batch_size=auto, a smaller one, or --recompute=True (the result is the same), "
    "or a smaller model"
)


@command("train.py", SAVE_MEMORY)
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(__doc__ + configurator.help_text(TrainConfig))
        return
    config = configurator.configure(TrainConfig, argv)
    if config.hours:
        _, typed = configurator.split_arguments(argv, configurator.settings_of(TrainConfig))
        dial.check_flags(config, [flag.name for flag in typed])
    own_folder: AbstractContextManager = contextlib.nullcontext()
    if os.environ.get("RANK", "0") == "0":
        busy = f"out_dir {config.out_dir}: another run is writing to it; wait for it, or stop it"
        own_folder = lock(Path(config.out_dir) / ".lock", busy)
    try:
        with own_folder:
            result = train(config)
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
