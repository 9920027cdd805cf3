"""How large a GPT, and for how many steps: a run's settings from the hours that it may take.

    python train.py config/hours.py --hours=2 --data_dir=shards/mine

docs/scaling.md measures how many bits a byte GPT-2s need for English books, by their size and by
how much they have read. From that law, from the speed of this machine at each size, and from how
well a compressor does on this text come the size with the lowest loss and that loss.
"""

if __name__ == "__main__":
    raise SystemExit("parts/dial.py is no command: README.md lists the commands")

import lzma
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from parts import GPT, auto, data
from parts.optimizer import build_optimizer, clip_gradients
from parts.runtime import Runtime
from parts.tokenizer import Tokenizer

import numpy as np
import torch


class Law(NamedTuple):
    """Bits a byte of English books: E + A / parameters^alpha + B / bytes^beta, by the form of
    Hoffmann and others (2022). results/scaling/fit.py finds the numbers.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def bits(self, parameters: float, n_bytes: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / n_bytes**self.beta


LAW = Law(E=0.8186, A=5.728, alpha=0.1795, B=12.98, beta=0.1846)
# Text that is read again is worth less each time: see `Text.useful`.
USEFUL_REPEATS = 0.7
# More than so many times teach nothing new, and after 16 a model knows it by heart and is worse.
MOST_EPOCHS = 4
# Bytes -> the bits a byte that xz needs for as much of the law's text: more repeats itself more.
LAW_XZ_BITS = {10_000: 3.798, 30_000: 3.315, 100_000: 3.058, 300_000: 2.706, 1_000_000: 2.47}
# How far texts may lie from what the law expects of them, as a share: see docs/scaling.md.
RELATIVE_ERROR = 0.2

# (n_layer, n_head, n_embd), each two to three times as large as the one before.
SHAPES = (
    (2, 2, 64),
    (3, 2, 96),
    (4, 2, 128),
    (5, 3, 192),
    (6, 4, 256),
    (7, 6, 384),
    (10, 8, 512),
)
BLOCK_SIZE = 256
MEGABYTE = 1_000_000
SEQUENCES = 16  # a step
# Of the time, what is left for evaluations, samples and checkpoints.
TRAINING_SHARE = 0.85
FEWEST_STEPS = 30
# A larger model that the time allows fewer steps is left out: the law's own runs have no fewer, and
# shorter ones ended up to a quarter above it.
STEPS_OF_LAW = 250
# The settings that the hours choose.
CHOSEN = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "batch_size",
    "total_batch_size",
    "optimizer",
    "learning_rate",
    "min_lr",
    "muon_learning_rate",
    "muon_momentum",
    "warmup_steps",
    "max_steps",
    "eval_every",
    "eval_tokens",
    "sample_every",
    "checkpoint_every",
)


@dataclass(frozen=True)
class Text:
    """What the dial wants to know about the shards."""

    train_tokens: int
    bytes_per_token: float
    hardness: float  # times the bits a byte of the law's books

    def useful(self, tokens: float) -> float:
        """How many tokens that are new would teach as much as these, of which some repeat.

        The form is that of Muennighoff and others (2023, arXiv 2305.16264).
        """
        if tokens <= self.train_tokens:
            return tokens
        repeats = tokens / self.train_tokens - 1
        worth = USEFUL_REPEATS * (1 - math.exp(-repeats / USEFUL_REPEATS))
        return self.train_tokens * (1 + worth)


class Option(NamedTuple):
    """A size, what the time is enough for, and what the law expects of it."""

    config: Any  # train.py's settings
    parameters: int
    seconds_per_step: float
    bits: float  # a byte


def typed(config: Any) -> list[str]:
    """The settings that the hours choose and that somebody has set."""
    defaults = type(config)()
    return [name for name in CHOSEN if getattr(config, name) != getattr(defaults, name)]


def study_text(data_dir: str, tokenizer: Tokenizer) -> Text:
    """Look at the first megabyte of the training text. ValueError if there is none."""
    windows = data.TokenWindows(
        data.open_shards(data_dir, "train"), BLOCK_SIZE, tokenizer.vocab_size
    )
    starts = windows.select_first(MEGABYTE)
    bits_per_nat = windows.bits_per_byte(starts, tokenizer)
    ids = windows.read(starts)[:, 1:].reshape(-1)
    text = tokenizer.decode(ids.tolist()).encode()[:MEGABYTE]
    if not text:
        raise ValueError(f"{data_dir}: its first tokens are only ends of documents")
    return Text(
        train_tokens=windows.n_tokens,
        bytes_per_token=1 / (bits_per_nat * math.log(2)),
        hardness=xz_bits(text) / law_xz_bits(len(text)),
    )


def xz_bits(text: bytes) -> float:
    """The bits a byte that xz needs."""
    return 8 * len(lzma.compress(text)) / len(text)


def law_xz_bits(n_bytes: int) -> float:
    """The same for as much of the law's text."""
    sizes = np.log(list(LAW_XZ_BITS))
    return float(np.interp(math.log(n_bytes), sizes, list(LAW_XZ_BITS.values())))


def expected_bits(parameters: float, tokens: float, text: Text) -> float:
    """Bits a byte of this text after so many tokens of it."""
    n_bytes = text.useful(tokens) * text.bytes_per_token
    return LAW.bits(parameters, n_bytes) * text.hardness


def expect(config: Any, model: GPT, tokenizer: Tokenizer) -> str:
    """Bits a byte after a run's last step, with their error, in words."""
    text = study_text(config.data_dir, tokenizer)
    tokens = config.max_steps * config.total_batch_size
    bits = expected_bits(model.num_params(), tokens, text)
    low = bits * (1 - RELATIVE_ERROR)
    high = bits * (1 + RELATIVE_ERROR)
    return f"{bits:.2f} ({low:.2f} to {high:.2f})"


def choose(
    config: Any,
    machine: Runtime,
    text: Text,
    build: Callable[[Any], GPT],
    say: Callable[[str], None],
) -> Any:
    """The settings with the lowest expected loss.

    Sizes are timed from the smallest on, until the expected loss rises. build: settings -> a new
    model. ValueError if the time is too short for any.
    """
    best: Option | None = None
    for option in options(config, machine, text, build):
        say(
            f"hours: {option.parameters:,} parameters, "
            f"{1000 * option.seconds_per_step:,.0f} ms a step, {option.config.max_steps:,} steps: "
            f"{option.bits:.3f} bits a byte expected"
        )
        if best is not None and option.bits > best.bits:
            break
        best = option
    if best is None:
        raise ValueError(
            f"hours={config.hours}, or the text of {text.train_tokens:,} tokens, is too short for "
            f"{FEWEST_STEPS} steps of the smallest model"
        )
    if best.config.max_steps == most_steps(best.config, text):
        minutes = best.seconds_per_step * best.config.max_steps / 60
        say(
            f"hours: the run ends early, after about {minutes:,.1f} minutes: it has read the text "
            f"{MOST_EPOCHS} times, and more of it would make the model worse"
        )
    if best.config.n_embd == SHAPES[-1][2]:
        say(
            "hours: this is the largest size that the law is used for, and a larger one would "
            "learn more in the time; config/gpt2_124M.py is the next"
        )
    return best.config


def most_steps(config: Any, text: Text) -> int:
    return MOST_EPOCHS * text.train_tokens // config.total_batch_size


def options(
    config: Any, machine: Runtime, text: Text, build: Callable[[Any], GPT]
) -> Iterator[Option]:
    """The sizes that the time is enough for, from the smallest on."""
    for n_layer, n_head, n_embd in SHAPES:
        shaped = replace(
            config,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            block_size=BLOCK_SIZE,
            batch_size=SEQUENCES,
            total_batch_size=SEQUENCES * BLOCK_SIZE,
            optimizer="muon",
            learning_rate=2e-2,  # of embeddings, biases and norms
            min_lr=0.0,
            muon_learning_rate=min(2e-2, 2e-2 * (96 / n_embd) ** 0.5),
            muon_momentum=0.9,
        )
        model = build(shaped)
        seconds = time_step(shaped, model, machine)
        steps = int(config.hours * 3600 * TRAINING_SHARE / seconds)
        time_is_short = steps < most_steps(shaped, text)
        steps = min(steps, most_steps(shaped, text))
        is_smallest = n_embd == SHAPES[0][2]
        if steps < FEWEST_STEPS or (time_is_short and steps < STEPS_OF_LAW and not is_smallest):
            return
        settings = replace(shaped, **settings_of_length(steps))
        parameters = model.num_params()
        bits = expected_bits(parameters, steps * settings.total_batch_size, text)
        yield Option(settings, parameters, seconds, bits)


def settings_of_length(steps: int) -> dict:
    """What goes with the number of steps. Evaluations take a twentieth of a run's time, and more of
    a run of few minutes, because fewer tokens would say too little.
    """
    tokens = steps * SEQUENCES * BLOCK_SIZE
    return dict(
        warmup_steps=max(5, steps // 20),
        max_steps=steps,
        eval_every=max(1, steps // 4),
        eval_tokens=min(1_048_576, max(131_072, tokens // 40)),
        sample_every=max(1, steps // 5),
        checkpoint_every=max(1, steps // 4),
    )


def time_step(config: Any, model: GPT, machine: Runtime) -> float:
    """Seconds of a training step, as train.py would do it."""
    model.to(machine.device)
    arithmetic, _ = auto.choose_arithmetic(config, model, machine, {})
    auto.apply(arithmetic, model)
    optimizer = build_optimizer(model, config, arithmetic.torch_dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    batch = torch.zeros(SEQUENCES, BLOCK_SIZE + 1, dtype=torch.int64, device=machine.device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with machine.autocast(arithmetic.torch_dtype):
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        clip_gradients(list(model.parameters()), config.grad_clip or math.inf, exact=True)
        optimizer.step()
        optimizer.zero_grad()
        machine.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def as_command(config: Any) -> str:
    """The settings as they could have been typed."""
    flags = [f"--data_dir={config.data_dir}", f"--out_dir={config.out_dir}"]
    flags += [f"--{name}={getattr(config, name)}" for name in CHOSEN]
    return shlex.join(["python", "train.py", *flags])
