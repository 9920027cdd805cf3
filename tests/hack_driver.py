"""What tests/test_hacks.py runs inside a copy of the project with a changed model.py or train.py.

    python tests/hack_driver.py SHARDS TASKS

With AdamW and with Muon: trains, kills a run and resumes it, evaluates, scores HellaSwag and
samples. It prints a JSON object of what came out, and stops at the first thing that is wrong.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import hellaswag
import train
from model import open_model
from parts import inference, runtime
from parts.look import look
from parts.metrics import Log

import torch
import torch.nn.functional as F

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)
BATCH = dict(batch_size=4, total_batch_size=128, max_steps=8, warmup_steps=2)
WATCHING = dict(eval_every=4, eval_tokens=512, hellaswag_every=4, sample_every=4, sample_tokens=8)
MACHINE = dict(device="cpu", dtype="fp32", compile=False)


def make_config(shards: str, tasks: str, name: str, optimizer: str) -> train.TrainConfig:
    return train.TrainConfig(
        **SHAPE,
        **BATCH,
        **WATCHING,
        **MACHINE,
        data_dir=shards,
        out_dir=f"out/{name}",
        hellaswag_data=tasks,
        optimizer=optimizer,
        learning_rate=1e-2,
        muon_learning_rate=1e-2,
        min_lr=1e-3,
        checkpoint_every=4,
        keep_checkpoints=0,
        dropout=0.1,
        report=False,
    )


def train_and_be_killed(config: train.TrainConfig) -> None:
    """In a child process, which ends with SIGKILL after six steps and a checkpoint of four."""
    child = os.fork()
    if child == 0:
        write_record = Log.__call__

        def kill(self, kind, step, **values):
            write_record(self, kind, step, **values)
            if kind == "train" and step == 5:
                while not (Path(config.out_dir) / "step_0000004").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

        Log.__call__ = kill
        train.train(config)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def read_records(out_dir: str, kind: str) -> list[dict]:
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def check_sampling(model, tokenizer) -> None:
    """With the cache the greedy text is that of plain recomputation, past the window and in a batch
    of unequal prompts.
    """
    prompts = [tokenizer.encode(text).tolist() for text in ("The quick brown", "A")]
    generated = inference.generate(model, prompts, 40, temperature=0)
    model.eval()
    for prompt, continuation in zip(prompts, generated):
        ids = list(prompt)
        with torch.no_grad():
            for token in continuation:
                window = torch.tensor([ids[-model.config.block_size :]])
                logits = model(window)[0, -1]
                # A near tie may fall either way.
                assert logits[token] >= logits.max() - 1e-3 * logits.abs().max(), "cache"
                ids.append(token)


def check_looking(model) -> None:
    """The page can show what the changed model saw: all it says was compared with the model."""
    sight = look(model.eval(), list(range(20)))
    assert not sight.missing, sight.missing
    assert len(sight.guesses) == model.config.n_layer == len(sight.attention)
    for weights in sight.attention:
        assert torch.allclose(weights.sum(dim=-1), torch.ones(len(weights)), atol=1e-4)


def check_hellaswag(model, tokenizer, tasks: str) -> None:
    """The score is that of one ending at a time, through `model(idx)`."""
    examples = hellaswag.examples(tasks)
    machine = runtime.start("cpu")
    result = hellaswag.evaluate(model, tokenizer, machine, examples)
    right = 0
    for example in examples:
        rendered = hellaswag.render(example, tokenizer, model.config.block_size)
        sums = []
        for ending in rendered.endings:
            ids = torch.tensor([*rendered.context.tolist(), *ending.tolist()])
            with torch.no_grad():
                logits = model.eval()(ids[None, :-1])[0, -len(ending) :]
            sums.append(F.cross_entropy(logits, ids[-len(ending) :], reduction="sum").item())
        right += sums.index(min(sums)) == example.label
    assert math.isclose(result["acc"], right / len(examples)), "HellaSwag"


def main(shards: str, tasks: str) -> None:
    result: dict = {}
    for optimizer in ("adamw", "muon"):
        straight = make_config(shards, tasks, f"{optimizer}_straight", optimizer)
        killed = make_config(shards, tasks, f"{optimizer}_killed", optimizer)
        train_and_be_killed(killed)
        train.train(straight)
        train.train(killed)  # resumes

        losses = [record["loss"] for record in read_records(straight.out_dir, "train")]
        assert losses == [record["loss"] for record in read_records(killed.out_dir, "train")]
        assert losses[-1] < losses[0], losses
        folder = Path(straight.out_dir) / "step_0000008"
        for name in ("model.safetensors", "gpt.safetensors", "train_state.pt"):
            if (folder / name).exists():
                other = Path(killed.out_dir) / "step_0000008" / name
                assert (folder / name).read_bytes() == other.read_bytes(), name
        assert read_records(straight.out_dir, "val") and read_records(straight.out_dir, "sample")
        assert read_records(straight.out_dir, "hellaswag")

        opened = open_model(straight.out_dir)
        check_sampling(opened.model, opened.tokenizer)
        check_looking(opened.model)
        check_hellaswag(opened.model, opened.tokenizer, tasks)
        result["files"] = sorted(path.name for path in folder.iterdir())
        result[optimizer] = losses[-1]
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
