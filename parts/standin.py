"""A small model of the same class: it shows by numbers what a model.py computes.

People change model.py. What is built around it (files for other programs, the KV cache, padded
batches, HellaSwag's shared rows) is right only for a model that mixes tokens as GPT-2 does. So
these are tried on a stand-in first: small, in float64, with random weights. Random, because a new
layer may do nothing at first; in float64, so that any difference is one of the model and not of
rounding; small, so that the trial takes a moment.

A long text goes through a shallow one. A deep one, with as many layers as the model, has small and
large values in each layer: it shows what only a late block does, or only to large values.
"""

if __name__ == "__main__":
    raise SystemExit("parts/standin.py is no command: README.md lists the commands")

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

from parts import GPT, GPTConfig

import torch
import torch.nn.functional as F

# Two ways to compute the same differ by less than this share of the largest value, in float64.
TOLERANCE = 1e-6
MOST_LAYERS = 4  # of a shallow one
LARGEST_ROW = 30  # of a deep one: times what keeps values at 1
HEAD_SIZE = 4
VOCAB_SIZE = 64


@functools.lru_cache(maxsize=8)
def make_standin(cls: Any, config: GPTConfig, deep: bool = False) -> GPT:
    """A model of this class and config, but small, with random weights: float64, on the CPU.

    Torch's random numbers go on as if nothing had been drawn. Nobody may change the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = cls(shrink(config, deep))
        except Exception:  # a changed model.py may want a width or a depth of its own
            model = cls(config)
        model = model.double().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1 / math.sqrt(parameter.size(-1)))
                if deep:
                    largest = math.log(LARGEST_ROW)
                    rows = parameter.new_empty(len(parameter)).uniform_(-1, largest).exp()
                    parameter.mul_(rows.view(-1, *[1] * (parameter.dim() - 1)))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.transformer.wte.weight[model.config.vocab_size :] = 0.0
    return model


def shrink(config: GPTConfig, deep: bool) -> GPTConfig:
    """The same config with fewer layers unless deep, narrow heads and few tokens."""
    head_size = min(HEAD_SIZE, config.n_embd // config.n_head)
    return dataclasses.replace(
        config,
        n_layer=config.n_layer if deep else min(MOST_LAYERS, config.n_layer),
        n_embd=config.n_head * head_size,
        vocab_size=min(VOCAB_SIZE, config.vocab_size),
    )


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """For a trial of a stand-in: no gradients, and no autocast of whoever asks."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def random_ids(model: GPT, *shape: int) -> torch.Tensor:
    """Token ids of this shape, the same each time: int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def differ(values: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors, of float64 by default, are more than rounding apart, or of unlike
    shapes.
    """
    if values.shape != expected.shape:
        return True
    error = (values - expected).abs().max()
    return not bool(error <= tolerance * expected.abs().max())  # also if one of them is NaN


@functools.lru_cache(maxsize=8)
def loss_is_cross_entropy(cls: Any, config: GPTConfig) -> bool:
    """Whether a model's loss, when it is not training, is the cross entropy of its logits."""
    model = make_standin(cls, config)
    ids = random_ids(model, 1, min(config.block_size, 64) + 1)
    x = ids[:, :-1]
    y = ids[:, 1:]
    with exact_arithmetic():
        loss = model(x, y)
        expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    # The loss itself may be computed in float32.
    return math.isclose(loss.item(), expected.item(), rel_tol=1e-4)
