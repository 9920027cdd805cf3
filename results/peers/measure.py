"""What GPT-2 (124M) costs here and in other programs, side by side on one CPU.

    pip install accelerate==1.12.0  # for transformers' Trainer
    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/karpathy/build-nanogpt
    python results/peers/measure.py nanoGPT build-nanogpt documents.parquet hellaswag_val.jsonl \
        > results/peers/cpu.json
    python bench.py show results/peers/cpu.json

Each program runs in processes of its own. A round runs all of them in turn. The table has the
medians of the rounds; `spread` in the file has the lowest and the highest figures.

The others run in copies of their folders, changed where EDITS says: sizes that are constants there,
evaluations (and with them build-nanogpt's save), files instead of downloads, and in one row the
precision. transformers is its Trainer with defaults. docs/speed.md lists what differs.

Columns: a step of 1,024 tokens; seconds from the start of the process to the end of its first step,
new and from a checkpoint; the most memory in training; greedy generation of 64 tokens after 16;
HellaSwag; from text to token files.
"""

import copy
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
from parts import data, runtime

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

B = 1  # sequences of 1,024 tokens in a step
STEPS = 4
ROUNDS = 3
NEW = 64  # tokens that are generated
TASKS = 40  # of HellaSwag

# ---- What is changed in the other programs: program -> file -> text -> its replacement -----------

# Our copy of GPT-2's vocabulary, because tiktoken would download its own.
VOCABULARY = {
    'tiktoken.get_encoding("gpt2")': (
        '__import__("parts.tokenizer").tokenizer.get_tokenizer("gpt2").encoding'
    )
}
PARQUET = '"parquet", data_files=os.environ["TEXT"], '

EDITS = {
    "nanoGPT": {
        "train.py": {"if iter_num % eval_interval": "if iter_num and iter_num % eval_interval"},
        "data/openwebtext/prepare.py": VOCABULARY | {'"openwebtext", ': PARQUET, "= 1024": "= 1"},
    },
    "build-nanogpt": {
        "train_gpt2.py": VOCABULARY
        | {
            "= 524288": f"= {B * 1024}",
            "B = 64 ": f"B = {B} ",
            "max_steps = 19073": f"max_steps = {STEPS}",
            "step % 250 == 0": "False",
            "or last_step": "",
        },
        "hellaswag.py": VOCABULARY,
        "fineweb.py": VOCABULARY | {'"HuggingFaceFW/fineweb-edu", name=remote_name, ': PARQUET},
    },
}
EDITS["nanoGPT, bf16"] = copy.deepcopy(EDITS["nanoGPT"])
EDITS["nanoGPT, bf16"]["train.py"]["nullcontext() if device_type == 'cpu' else "] = ""

# ---- What is timed besides training and tokenising: the code behind the mark ---------------------

MARK = "# timed\n"

GENERATE = {
    "ours": f"""
from model import GPT, GPTConfig
from parts import inference, runtime
from parts.auto import prepare_for_inference

model = GPT(GPTConfig()).eval()
prepared = prepare_for_inference(model, runtime.start("cpu"), "auto", rows=1)
# timed
inference.generate(prepared.model, [list(range(16))], {NEW}, temperature=0)
""",
    "nanoGPT": f"""
import torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(bias=True)).eval()
# timed
model.generate(torch.arange(16)[None], {NEW}, top_k=1)
""",
    "transformers": f"""
import torch
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config()).to(torch.bfloat16).eval()
# timed
model.generate(
    torch.arange(16)[None],
    max_new_tokens={NEW},
    min_new_tokens={NEW},
    do_sample=False,
    pad_token_id=0,
    eos_token_id=None,
)
""",
}

SCORE = {
    "ours": f"""
import os
import hellaswag
from model import GPT, GPTConfig
from parts import runtime
from parts.auto import prepare_for_inference
from parts.tokenizer import get_tokenizer

machine = runtime.start("cpu")
tokenizer = get_tokenizer("gpt2")
tasks = hellaswag.examples(os.environ["TASKS"], {TASKS})
model = GPT(GPTConfig()).eval()
prepared = prepare_for_inference(model, machine, "auto", rows=1024)
# timed
hellaswag.evaluate(prepared.model, tokenizer, machine, tasks, dtype=prepared.dtype)
""",
    "build-nanogpt": f"""
import json, os
import torch
from gpt import *
model = GPT(GPTConfig(vocab_size=50304)).eval()
lines = open(os.environ["TASKS"]).readlines()[:{TASKS}]
# timed
for line in lines:
    _, tokens, mask, label = render_example(json.loads(line))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(tokens)
    get_most_likely_row(tokens, mask, logits)
""",
}


# ---- Running a program ---------------------------------------------------------------------------


class Watched(NamedTuple):
    """What was seen of a process."""

    ms: list[float]  # the times that it printed
    first: float  # seconds from its start to the first of them
    seconds: float  # from its start to its end
    gb: float  # the most memory


def copy_program(name: str, source: Path, folder: Path) -> Path:
    """Copy a program's folder and edit it. ValueError if a text to replace is not there."""
    program = folder / name
    shutil.copytree(source, program, ignore=shutil.ignore_patterns(".git"))
    for file, edits in EDITS[name].items():
        text = (program / file).read_text()
        for old, new in edits.items():
            if old not in text:
                raise ValueError(f"{source / file}: no {old!r}; is it another version?")
            text = text.replace(old, new)
        (program / file).write_text(text)
    return program


def watch(command: list, folder: Path, pattern: str = "took ([0-9.]+) ms") -> Watched:
    """Run `python COMMAND` in this folder. pattern: what it prints with a time in ms. ValueError,
    with the last line that it printed, if it fails.
    """
    ms = []
    first = 0.0
    line = ""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *(str(word) for word in command)],
        cwd=folder,
        env=os.environ
        | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", HF_HOME=str(folder / "hf")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        match = re.search(pattern, line)
        if match:
            if not ms:
                first = time.perf_counter() - begin
            ms.append(float(match[1].replace(",", "")))
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise ValueError(f"{command[0]} ended with {status}: {line}")
    return Watched(ms, first, seconds, gb=usage.ru_maxrss * 1024 / 1e9)


def time_code(code: str, folder: Path) -> float:
    """Seconds of the code behind the mark."""
    setup, work = code.split(MARK)
    timed = f"""{setup}
import time
begin = time.perf_counter()
{work}
print("took", 1000 * (time.perf_counter() - begin), "ms")
"""
    return watch(["-c", timed], folder).ms[0] / 1000


def measure_training(start: list, resume: list | None, folder: Path, pattern: str) -> dict:
    """Columns of a training run. resume: the command that continues it by a step, or None."""
    run = watch(start, folder, pattern)
    row = {"ms a step": statistics.median(run.ms[1:STEPS]), "start s": run.first, "GB": run.gb}
    if resume is not None:
        row["resume s"] = watch(resume, folder, pattern).first
    return row


# ---- Training ------------------------------------------------------------------------------------


def train_ours(folder: Path) -> dict:
    command = [
        ROOT / "train.py",
        "--data_dir=shards",
        "--out_dir=out",
        f"--batch_size={B}",
        f"--total_batch_size={B * 1024}",
        "--warmup_steps=1",
        "--report=False",
        "--eval_every=0",
        "--hellaswag_every=0",
        "--sample_every=0",
    ]
    start = [*command, f"--max_steps={STEPS}"]
    resume = [
        *command,
        f"--max_steps={STEPS + 1}",
        "--checkpoint_every=0",
        "--resume_anyway=True",
    ]
    return measure_training(start, resume, folder, r"^step \d+/.* ([\d,]+) ms ")


def train_nanogpt(folder: Path) -> dict:
    command = [
        "train.py",
        "--dataset=random",
        "--device=cpu",
        "--compile=False",
        "--bias=True",
        "--dtype=bfloat16",
        f"--batch_size={B}",
        "--gradient_accumulation_steps=1",
        "--eval_iters=1",
        f"--max_iters={STEPS}",
    ]
    start = [*command, f"--eval_interval={STEPS}"]
    resume = [*command, "--eval_interval=1000", "--init_from=resume"]
    return measure_training(start, resume, folder, r"^iter \d+: .* time ([\d.]+)ms")


def train_build_nanogpt(folder: Path) -> dict:
    return measure_training(["train_gpt2.py"], None, folder, r"dt: ([\d.]+)ms")


def train_transformers(folder: Path) -> dict:
    command = [HERE / "trainer.py", "out", B]
    start = [*command, STEPS]
    resume = [*command, STEPS + 1, "resume"]
    return measure_training(start, resume, folder, r"took ([\d.]+) ms")


# ---- A round, and the medians of all -------------------------------------------------------------


def prepare_folders(peers: dict[str, Path], folder: Path) -> dict[str, Path]:
    """A folder for each program, with random tokens to train on."""
    tokens = np.random.default_rng(0).integers(0, 50257, B * 1024 * (STEPS + 3), dtype=np.uint16)
    folders = {"ours": folder / "ours", "transformers": folder / "transformers"}
    for path in folders.values():
        path.mkdir()
    for name in EDITS:
        repository = name.split(",")[0]
        folders[name] = copy_program(name, peers[repository], folder)

    shards = folders["ours"] / "shards"
    shards.mkdir()
    data.write_shard(shards / "random_train_000001.bin", tokens)
    (shards / "meta.json").write_text('{"tokenizer": "gpt2"}')

    for name in ("nanoGPT", "nanoGPT, bf16"):
        dataset = folders[name] / "data" / "random"
        dataset.mkdir()
        tokens.tofile(dataset / "train.bin")
        tokens.tofile(dataset / "val.bin")

    # The definitions of its script, to import.
    build_nanogpt = folders["build-nanogpt"]
    definitions, _ = (build_nanogpt / "train_gpt2.py").read_text().split("# simple launch:", 1)
    (build_nanogpt / "gpt.py").write_text(definitions)
    dataset = build_nanogpt / "edu_fineweb10B"
    dataset.mkdir()
    np.save(dataset / "train.npy", tokens)
    np.save(dataset / "val.npy", tokens)
    return folders


def measure_round(peers: dict[str, Path], megabytes: float, folder: Path) -> dict[str, dict]:
    """Run every program once. Return {name: {column: figure}}."""
    folders = prepare_folders(peers, folder)
    rows = {
        "ours": train_ours(folders["ours"]),
        "nanoGPT": train_nanogpt(folders["nanoGPT"]),
        "nanoGPT, bf16": train_nanogpt(folders["nanoGPT, bf16"]),
        "build-nanogpt": train_build_nanogpt(folders["build-nanogpt"]),
        "transformers": train_transformers(folders["transformers"]),
    }
    for name, code in GENERATE.items():
        rows[name]["tokens/s"] = NEW / time_code(code, folders[name])
    for name, code in SCORE.items():
        rows[name]["tasks/s"] = TASKS / time_code(code, folders[name])
    tokenise = {
        "ours": [ROOT / "prepare.py", os.environ["TEXT"], "--out", "text"],
        "nanoGPT": ["data/openwebtext/prepare.py"],
        "build-nanogpt": ["fineweb.py"],
    }
    for name, command in tokenise.items():
        rows[name]["MB/s"] = megabytes / watch(command, folders[name]).seconds
    return rows


def main(nanogpt: str, build_nanogpt: str, text: str, tasks: str) -> None:
    peers = {"nanoGPT": Path(nanogpt), "build-nanogpt": Path(build_nanogpt)}
    # Programs read these, in whatever folder they run.
    os.environ["TEXT"] = str(Path(text).resolve())
    os.environ["TASKS"] = str(Path(tasks).resolve())
    texts = bench.read_texts([Path(text)])
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rounds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure_round(peers, megabytes, Path(folder)))
        print(json.dumps(rounds[-1]), file=sys.stderr)

    rows = {}
    spread = {}
    for name, columns in rounds[0].items():
        rows[name] = {}
        spread[name] = {}
        for column in columns:
            figures = [figures_of_round[name][column] for figures_of_round in rounds]
            rows[name][column] = statistics.median(figures)
            spread[name][column] = [min(figures), max(figures)]

    settings = dict(
        batch=B,
        steps=STEPS,
        rounds=ROUNDS,
        new_tokens=NEW,
        tasks=TASKS,
        megabytes=round(megabytes, 1),
    )
    for name, path in peers.items():
        settings[name] = subprocess.getoutput(f"git -C {path} rev-parse --short HEAD")
    result = dict(
        bench="peers",
        device=runtime.start("cpu").device_name(),
        torch=torch.__version__,
        settings=settings,
        rows=rows,
        ratios={},
        spread=spread,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
