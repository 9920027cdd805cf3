"""What several tests share: a toy model's shape, toy shards, and short runs. No network, no GPU."""

import functools
import getpass
import json
import os
import random
import tempfile
from pathlib import Path

import prepare
import train
from model import GPT, GPTConfig
from parts.pretrained import checkpoints

import hypothesis
import pytest
import torch
from safetensors.torch import load_file

# The same examples each time: a test that fails here fails elsewhere too.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Two threads sum in another order than one: bit-identical means with the same number of them.
torch.set_num_threads(1)

# What is compiled once is kept here, and not in the user's folder.
os.environ["XDG_CACHE_HOME"] = str(
    Path(tempfile.gettempdir()) / f"reproduce-gpt2-tests-{getpass.getuser()}"
)

TOY_MODEL = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)
TOY = TOY_MODEL | dict(vocab_size=257, block_size=16)


def make_toy(**changes) -> GPT:
    """A toy whose weights are larger than GPT-2's at init, so that mistakes show and no two logits
    nearly tie.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(TOY | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("wte.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.transformer.wte.weight[: model.config.vocab_size].mul_(10)
    return model.eval()


@pytest.fixture
def toy() -> GPT:
    return make_toy()


def ids(*shape: int, vocab_size: int = 257, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """60 kB of sentences made from a few words: learnable, and the same on every machine."""
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew potions"
    words = f"{words} in old stone towers".split()
    sentences = (
        " ".join(rng.choices(words, k=rng.randint(4, 10))).capitalize() + ".\n" for _ in range(1500)
    )
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text("".join(sentences))
    return path


@pytest.fixture(scope="session")
def shards(text_file, tmp_path_factory) -> Path:
    """Byte shards of that text, several small ones, so that windows come from more than one
    file.
    """
    out = tmp_path_factory.mktemp("shards") / "tale"
    prepare.main(
        [str(text_file), "--out", str(out), "--tokenizer", "bytes", "--shard_tokens", "20000"]
    )
    return out


def toy_config(data_dir: Path, out_dir: Path, **settings) -> train.TrainConfig:
    """TrainConfig of a run that takes a second: 12 steps of 4 x 32 tokens on the CPU in fp32."""
    toy = dict(
        **TOY_MODEL,
        data_dir=str(data_dir),
        out_dir=str(out_dir),
        device="cpu",
        dtype="fp32",
        compile=False,
    )
    toy |= dict(
        batch_size=4,
        total_batch_size=128,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_steps=2,
        max_steps=12,
    )
    toy |= dict(
        eval_every=0,
        hellaswag_every=0,
        sample_every=0,
        checkpoint_every=0,
        eval_tokens=512,
        report=False,
    )
    return train.TrainConfig(**(toy | settings))


@pytest.fixture
def config(shards, tmp_path):
    """Such configs, of runs in a folder of the test's own."""
    return functools.partial(toy_config, data_dir=shards, out_dir=tmp_path / "run")


# Lines of metrics.jsonl that are no records, or whose values are of kinds that no run writes.
ODD_LINES = [
    *("[]", "5", "null", '"x"', "{}", "", "[" * 100_000, '{"a":' * 100_000, "9" * 5000),
    *('{"step": 1}', '{"kind": "train"}', '{"step": null, "kind": "train"}'),
    *(
        '{"step": "x", "kind": "val"}',
        '{"step": 1.5, "kind": "val"}',
        '{"step": true, "kind": "val"}',
    ),
    *(
        '{"step": -1, "kind": "train"}',
        '{"step": 1e999, "kind": "train"}',
        '{"step": 1, "kind": 5}',
    ),
    *('{"step": 1' + "0" * 400 + ', "kind": "train"}', '{"step": 1, "kind": "tra'),
    *('{"step": 1, "kind": "run"}', '{"step": 1, "kind": "run", "settings": []}'),
    '{"step": 1, "kind": "run", "settings": {"total_batch_size": "x"}}',
    '{"step": 1, "kind": "run", "settings": {"total_batch_size": 128}}',
    '{"step": 1, "kind": "run", "settings": {"total_batch_size": 128}, "data": 5, "command": []}',
    '{"step": 1, "kind": "train", "loss": "x", "ms": [], "lr": {}, "grad_norm": true}',
    '{"step": 1, "kind": "train", "loss": NaN, "tokens_per_s": 1e999}',
    '{"step": 1, "kind": "train", "loss": 2.0}',
    '{"step": 1, "kind": "val", "loss": [1]}',
    '{"step": 1, "kind": "hellaswag", "style": "x"}',
    '{"step": 1, "kind": "hellaswag", "acc_norm": 0.5, "style": []}',
    '{"step": 1, "kind": "sample", "text": 5}',
    '{"step": 1, "kind": "sample"}',
]


def metrics(out_dir: str | Path, kind: str = "train") -> list[dict]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(out_dir: str | Path) -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint."""
    return load_file(checkpoints(out_dir)[-1] / "model.safetensors")


def losses(config: train.TrainConfig) -> list[float]:
    """Run it and return the training loss of each step."""
    train.train(config)
    return [record["loss"] for record in metrics(config.out_dir)]


def flags(config: train.TrainConfig) -> list[str]:
    """The settings as the command line has them."""
    return [f"--{name}={value}" for name, value in vars(config).items()]


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment for a child process: without what torchrun or a person may have set."""
    dropped = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "HF_HOME",
        "HF_ENDPOINT",
    )
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)} | extra
