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
from dataclasses import dataclass, fields, replace
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


LAW = Law(E=0.8491, A=11.52, alpha=0.2458, B=11.13, beta=0.1699)
# R of `Text.useful`: what text that is read again is worth.
USEFUL_REPEATS = 2.5
# A text is read so many times at most.
MOST_EPOCHS = 4
# Bytes -> the bits a byte that xz needs for as much of the law's text, by `sample_text`: more
# repeats itself more.
LAW_XZ_BITS = {10_000: 3.907, 30_000: 3.557, 100_000: 3.251, 300_000: 3.018, 1_000_000: 2.829}
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
# Tokens whose bytes are counted; no more of them are shown to the compressor.
STUDIED_TOKENS = 1_000_000
# What the compressor is shown of a text: windows far apart, as those of the law's text are.
SAMPLED_SHARE = 1 / 16
SEQUENCES = 16  # a step
# A text that would be read in too few steps is read in smaller ones.
FEWEST_SEQUENCES = 4
# Where the text is read to its end, a larger model learned at most 1 % more.
MOST_PARAMETERS_PER_TOKEN = 20
# Of the time; the rest is for evaluations, samples and checkpoints.
TRAINING_SHARE = 0.85
# Shorter runs are evaluated at their beginning and their end only.
STEPS_WITH_QUARTERS = 1000
FEWEST_STEPS = 30
# A larger model that the time allows fewer steps is left out. The study's runs of so many end
# within 2 % of the law; most of those with fewer end 3 to 6 % above it.
STEPS_OF_LAW = 900
# Where the text ends before the time does, so many are enough.
STEPS_OF_SHORT_TEXT = 250
# A size whose expected loss is at most so many times the lowest is as good: the law is not known
# better than that, and a smaller model samples faster.
AS_GOOD = 1.01
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
        repetitions = tokens / self.train_tokens - 1
        worth = USEFUL_REPEATS * (1 - math.exp(-repetitions / USEFUL_REPEATS))
        return self.train_tokens * (1 + worth)


class Option(NamedTuple):
    """A size, what the time is enough for, and what the law expects of it."""

    config: Any  # train.py's settings
    parameters: int
    seconds_per_step: float
    text_ends: bool  # before the time does
    bits: float  # a byte


def typed(config: Any) -> list[str]:
    """The settings that the hours choose and that have another value than the default."""
    chosen = set(CHOSEN)
    return [name for name in changed_settings(config) if name in chosen]


def changed_settings(config: Any) -> list[str]:
    """The settings that have another value than the default."""
    defaults = type(config)()
    names = [field.name for field in fields(config) if field.init]
    return [name for name in names if getattr(config, name) != getattr(defaults, name)]


def check_flags(config: Any, names: list[str]) -> None:
    """ValueError for a flag among these that the hours would override in silence: `typed` does not
    see one whose value is the default.
    """
    unseen = [name for name in CHOSEN if name in names and name not in typed(config)]
    if unseen:
        raise ValueError(describe_conflict(unseen))


def describe_conflict(names: list[str]) -> str:
    return f"hours chooses {', '.join(names)}: leave them out, or hours, and set all by hand"


def study_text(data_dir: str, tokenizer: Tokenizer) -> Text:
    """Look at the training text. ValueError if it is too short."""
    shards = data.open_shards(data_dir, "train")
    n_tokens = sum(len(shard.tokens) for shard in shards)
    needed = FEWEST_STEPS * FEWEST_SEQUENCES * BLOCK_SIZE // MOST_EPOCHS
    if n_tokens < needed:
        raise ValueError(
            f"{data_dir}: {n_tokens:,} training tokens are too few to choose a model by the hours; "
            f"take more text, {needed:,} tokens at least"
        )
    windows = data.TokenWindows(shards, BLOCK_SIZE, tokenizer.vocab_size)
    starts = windows.select_spread(STUDIED_TOKENS)
    bits_per_nat = windows.bits_per_byte(starts, tokenizer)
    bytes_per_token = 1 / (bits_per_nat * math.log(2))
    sample_bytes = size_of_sample(n_tokens * bytes_per_token)
    sample = sample_text(windows, tokenizer, round(sample_bytes / bytes_per_token))
    if not sample:
        raise ValueError(f"{data_dir}: its tokens are only ends of documents")
    return Text(
        train_tokens=windows.n_tokens,
        bytes_per_token=bytes_per_token,
        hardness=xz_bits(sample) / law_xz_bits(len(sample)),
    )


def size_of_sample(text_bytes: float) -> float:
    """How many bytes of a text the compressor is shown: as many as it was shown of the law's."""
    return float(np.clip(SAMPLED_SHARE * text_bytes, min(LAW_XZ_BITS), max(LAW_XZ_BITS)))


def sample_text(windows: data.TokenWindows, tokenizer: Tokenizer, tokens: int) -> bytes:
    """About so many tokens of the text, in pieces from all over it that are as long as a model's
    window: a compressor shall see no more at once of a document than the model does.
    """
    starts = windows.select_spread(min(tokens, STUDIED_TOKENS))
    ids = windows.read(starts)[:, 1:].reshape(-1)
    return tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text].tolist())


def xz_bits(text: bytes) -> float:
    """The bits a byte that xz needs."""
    return 8 * len(lzma.compress(text)) / len(text)


def law_xz_bits(n_bytes: int) -> float:
    """The same for as much of the law's text."""
    sizes = np.log(list(LAW_XZ_BITS))
    return float(np.interp(math.log(n_bytes), sizes, list(LAW_XZ_BITS.values())))


def law_size(config: Any, model: GPT) -> int:
    """Parameters as the law counts them: without positions."""
    return model.num_params() - config.block_size * config.n_embd


def expected_bits(parameters: float, tokens: float, text: Text) -> float:
    """Bits a byte of this text after so many tokens of it."""
    n_bytes = text.useful(tokens) * text.bytes_per_token
    return LAW.bits(parameters, n_bytes) * text.hardness


def expect(config: Any, model: GPT, tokenizer: Tokenizer) -> str:
    """Bits a byte after a run's last step, with their error, in words."""
    text = study_text(config.data_dir, tokenizer)
    tokens = config.max_steps * config.total_batch_size
    bits = expected_bits(law_size(config, model), tokens, text)
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
    """The settings of the smallest model whose expected loss is as good as the lowest.

    Sizes are timed from the smallest on, until the expected loss rises. build: settings -> a new
    model. ValueError if the time is too short for any.
    """
    considered: list[Option] = []
    lowest = math.inf
    for option in options(config, machine, text, build):
        say(
            f"hours: {option.parameters:,} parameters, "
            f"{1000 * option.seconds_per_step:,.0f} ms a step, {option.config.max_steps:,} steps: "
            f"{option.bits:.3f} bits a byte expected"
        )
        considered.append(option)
        if option.bits > lowest:
            break
        lowest = option.bits
    if not considered:
        raise ValueError(
            f"hours={config.hours} is too short for {FEWEST_STEPS} steps of the smallest model; "
            "set more"
        )
    best = next(option for option in considered if option.bits <= AS_GOOD * lowest)
    last = considered[-1]
    if best.text_ends:
        minutes = best.seconds_per_step * best.config.max_steps / 60
        say(
            f"hours: the run ends early, after about {minutes:,.1f} minutes: it has read the text "
            f"{MOST_EPOCHS} times, and each time it learns less"
        )
    if best.config.max_steps < STEPS_OF_LAW:
        say(
            f"hours: {best.config.max_steps:,} steps are few, and the law is of {STEPS_OF_LAW} and "
            "more; expect a higher loss"
        )
    elif last.config.n_embd == SHAPES[-1][2] and last.bits == lowest and not best.text_ends:
        say(
            f"hours: the law is used for no larger size than width {last.config.n_embd}, and one "
            "would learn more in the time; config/gpt2_124M.py is the next"
        )
    return best.config


def most_steps(config: Any, text: Text) -> int:
    return MOST_EPOCHS * text.train_tokens // config.total_batch_size


def sequences_per_step(text: Text) -> int:
    """As in the law's runs, or fewer: then a short text is read in enough steps."""
    sequences = SEQUENCES
    enough_tokens = STEPS_OF_SHORT_TEXT * BLOCK_SIZE
    while sequences > FEWEST_SEQUENCES and (
        MOST_EPOCHS * text.train_tokens < sequences * enough_tokens
    ):
        sequences //= 2
    return sequences


def options(
    config: Any, machine: Runtime, text: Text, build: Callable[[Any], GPT]
) -> Iterator[Option]:
    """The sizes that the time is enough for, from the smallest on."""
    sequences = sequences_per_step(text)
    for n_layer, n_head, n_embd in SHAPES:
        shaped = replace(
            config,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            block_size=BLOCK_SIZE,
            batch_size=sequences,
            total_batch_size=sequences * BLOCK_SIZE,
            optimizer="muon",
            learning_rate=2e-2,  # of embeddings, biases and norms
            min_lr=0.0,
            muon_learning_rate=min(2e-2, 2e-2 * (96 / n_embd) ** 0.5),
            muon_momentum=0.9,
        )
        model = build(shaped)
        seconds = time_step(shaped, model, machine)
        steps_of_text = most_steps(shaped, text)
        steps_of_time = int(config.hours * 3600 * TRAINING_SHARE / seconds)
        text_ends = steps_of_text <= steps_of_time
        steps = min(steps_of_text, steps_of_time)
        if steps < FEWEST_STEPS:
            return
        is_smallest = n_embd == SHAPES[0][2]
        if text_ends:
            is_too_large = model.num_params() > MOST_PARAMETERS_PER_TOKEN * text.train_tokens
        else:
            is_too_large = steps < STEPS_OF_LAW
        if is_too_large and not is_smallest:
            return
        settings = replace(shaped, **settings_of_length(steps, shaped.total_batch_size))
        tokens = steps * settings.total_batch_size
        bits = expected_bits(law_size(settings, model), tokens, text)
        yield Option(settings, model.num_params(), seconds, text_ends, bits)


def settings_of_length(steps: int, tokens_per_step: int) -> dict:
    """What goes with the number of steps. Evaluations take a twentieth of a run's time, and up to a
    seventh of a run of few minutes, because fewer tokens would say too little.
    """
    tokens = steps * tokens_per_step
    # A token is evaluated in a third of the time that it takes in training, and twice in a run.
    affordable = max(tokens_per_step, tokens // 5)
    eval_every = steps
    if steps >= STEPS_WITH_QUARTERS:
        eval_every = math.ceil(steps / 4)
    return dict(
        warmup_steps=max(5, steps // 20),
        max_steps=steps,
        eval_every=eval_every,
        eval_tokens=min(1_048_576, max(131_072, tokens // 40), affordable),
        sample_every=math.ceil(steps / 5),
        checkpoint_every=math.ceil(steps / 4),
    )


def time_step(config: Any, model: GPT, machine: Runtime) -> float:
    """Seconds of a training step, as a run of about so many hours would do it, but not compiled.

    The race of a small model may take fewer threads; the next size begins with all of them again.
    """
    model.to(machine.device)
    flops = model.flops_per_token(config.block_size) * config.total_batch_size
    steps = 3600 * config.hours / auto.expected_seconds(flops, machine)
    config = replace(config, max_steps=max(1, int(steps)))
    threads = torch.get_num_threads()
    try:
        arithmetic, _ = auto.choose_arithmetic(config, model, machine, {})
        auto.apply(arithmetic, model)
        return time_updates(config, model, machine, arithmetic.torch_dtype)
    finally:
        torch.set_num_threads(threads)


def time_updates(config: Any, model: GPT, machine: Runtime, dtype: torch.dtype) -> float:
    """Seconds of an update, the median of three, with a rate of zero."""
    optimizer = build_optimizer(model, config, dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    size = (config.batch_size, config.block_size + 1)
    batch = torch.zeros(size, dtype=torch.int64, device=machine.device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with machine.autocast(dtype):
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        clip_gradients(list(model.parameters()), config.grad_clip or math.inf, exact=True)
        optimizer.step()
        optimizer.zero_grad()
        machine.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def as_command(config: Any) -> str:
    """The same run in another folder, with all of its settings typed."""
    by_hand = replace(config, hours=0.0, out_dir=f"{config.out_dir}_by_hand", resume="auto")
    flags = [f"--{name}={getattr(by_hand, name)}" for name in changed_settings(by_hand)]
    return shlex.join(["python", "train.py", *flags])
