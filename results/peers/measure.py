"""What GPT-2 (124M) costs here and in other programs, side by side on one CPU.

    pip install accelerate==1.12.0                                   for transformers' Trainer
    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/karpathy/build-nanogpt
    python results/peers/measure.py nanoGPT build-nanogpt documents.parquet hellaswag_val.jsonl > results/peers/cpu.json
    python bench.py show results/peers/cpu.json

Each program runs in processes of its own. A round has all of them in turn. The table has the
medians of the rounds; `spread` in the file has the lowest and the highest.

The others run in copies of their folders, changed where EDITS says: sizes that are constants there,
evaluations (and with them build-nanogpt's save), files instead of downloads, and in one row the
precision. transformers is its Trainer with defaults. docs/speed.md lists what differs.

Columns: a step of 1,024 tokens; seconds from the start of the process to the end of its first step,
new and from a checkpoint; the most memory in training; greedy generation of 64 tokens after 16;
HellaSwag; from text to token files.
"""

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

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

import bench
from parts import data, runtime

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
B, STEPS, ROUNDS, NEW, TASKS = 1, 4, 3, 64, 40
VOCABULARY = {
    'tiktoken.get_encoding("gpt2")': '__import__("parts.tokenizer").tokenizer.get_tokenizer("gpt2").encoding'
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
        }
        | {"step % 250 == 0": "False", "or last_step": ""},
        "hellaswag.py": VOCABULARY,
        "fineweb.py": VOCABULARY | {'"HuggingFaceFW/fineweb-edu", name=remote_name, ': PARQUET},
    },
}
BF16 = {
    "train.py": EDITS["nanoGPT"]["train.py"] | {"nullcontext() if device_type == 'cpu' else ": ""}
}
EDITS["nanoGPT, bf16"] = EDITS["nanoGPT"] | BF16

# What is timed besides training and tokenising: set-up, then the code that counts.
OURS = "import hellaswag; from parts import inference, runtime; from parts.auto import prepare_for_inference; "
OURS += "from parts.tokenizer import get_tokenizer; from model import GPT, GPTConfig; import os, torch\n"
OURS += "model, machine, _ = prepare_for_inference(GPT(GPTConfig()).eval(), runtime.start('cpu'), 'auto', rows={rows})\n"
GENERATE = {
    "ours": OURS.format(rows=1)
    + f"# timed\ninference.generate(model, [list(range(16))], {NEW}, temperature=0)",
    "nanoGPT": "import torch; from model import GPT, GPTConfig; model = GPT(GPTConfig(bias=True)).eval()"
    f"\n# timed\nmodel.generate(torch.arange(16)[None], {NEW}, top_k=1)",
    "transformers": "import torch; from transformers import GPT2Config, GPT2LMHeadModel\n"
    "model = GPT2LMHeadModel(GPT2Config()).to(torch.bfloat16).eval()\n"
    f"options = dict(max_new_tokens={NEW}, min_new_tokens={NEW}, do_sample=False, pad_token_id=0, eos_token_id=None)"
    "\n# timed\nmodel.generate(torch.arange(16)[None], **options)",
}
SCORE = {
    "ours": OURS.format(rows=1024) + f"tasks = hellaswag.examples(os.environ['TASKS'], {TASKS})"
    "\n# timed\nhellaswag.evaluate(model, get_tokenizer('gpt2'), machine, tasks)",
    "build-nanogpt": f"""
import json, os; from gpt import *
model, lines = GPT(GPTConfig(vocab_size=50304)).eval(), open(os.environ['TASKS']).readlines()[:{TASKS}]
# timed
for line in lines:
    _, tokens, mask, label = render_example(json.loads(line))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(tokens)
    get_most_likely_row(tokens, mask, logits)
""",
}


def copied(name: str, source: Path, folder: Path) -> Path:
    """A copy of a program's folder with its edits. ValueError if a text to replace is not there."""
    copy = shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(".git"))
    for file, edits in EDITS[name].items():
        text = (copy / file).read_text()
        for old, new in edits.items():
            if old not in text:
                raise ValueError(f"{source / file}: no {old!r}; is it another version?")
            text = text.replace(old, new)
        (copy / file).write_text(text)
    return copy


def watch(command: list, folder: Path, line: str = "took ([0-9.]+) ms") -> dict:
    """Run Python in this folder: the ms in lines that match, seconds to the first of them and in
    all, GB at most.
    """
    ms, first, said, begin = [], 0.0, "", time.perf_counter()
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", HF_HOME=str(folder / "hf")
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, **pipes
    )
    for said in process.stdout:
        if found := re.search(line, said):
            first = first or time.perf_counter() - begin
            ms.append(float(found[1].replace(",", "")))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{command[0]} ended with {status}: {said}")
    return dict(
        ms=ms, first=first, seconds=time.perf_counter() - begin, gb=usage.ru_maxrss * 1024 / 1e9
    )


def timed(code: str, folder: Path) -> float:
    """Seconds of the part after the mark."""
    setup, work = code.split("# timed\n")
    lines = [setup, "import time", "begin = time.perf_counter()", work]
    lines.append("print('took', 1000 * (time.perf_counter() - begin), 'ms')")
    return watch(["-c", "\n".join(lines)], folder)["ms"][0] / 1000


def training(start: list, resume: list, folder: Path, line: str) -> dict:
    run = watch(start, folder, line)
    row = {
        "ms a step": statistics.median(run["ms"][1:STEPS]),
        "start s": run["first"],
        "GB": run["gb"],
    }
    return row | ({"resume s": watch(resume, folder, line)["first"]} if resume else {})


def ours(folder: Path) -> dict:
    command = [
        ROOT / "train.py",
        "--data_dir=shards",
        "--out_dir=out",
        f"--batch_size={B}",
        "--warmup_steps=1",
    ]
    command += [f"--total_batch_size={B * 1024}", "--report=False"]
    command += ["--eval_every=0", "--hellaswag_every=0", "--sample_every=0"]
    longer = [*command, f"--max_steps={STEPS + 1}", "--checkpoint_every=0", "--resume_anyway=True"]
    return training(
        [*command, f"--max_steps={STEPS}"], longer, folder, r"^step \d+/.* ([\d,]+) ms "
    )


def nanogpt(folder: Path) -> dict:
    command = [
        "train.py",
        "--dataset=random",
        "--device=cpu",
        "--compile=False",
        f"--batch_size={B}",
        "--bias=True",
    ]
    command += [
        "--gradient_accumulation_steps=1",
        "--eval_iters=1",
        f"--max_iters={STEPS}",
        "--dtype=bfloat16",
    ]
    resume = [*command, "--init_from=resume", "--eval_interval=1000"]
    return training(
        [*command, f"--eval_interval={STEPS}"], resume, folder, r"^iter \d+: .* time ([\d.]+)ms"
    )


def trainer(folder: Path) -> dict:
    command = [HERE / "trainer.py", "out", B]
    return training([*command, STEPS], [*command, STEPS + 1, "resume"], folder, r"took ([\d.]+) ms")


def round_of(peers: dict[str, Path], megabytes: float, folder: Path) -> dict[str, dict]:
    """Every program once: {name: {column: figure}}."""
    tokens = np.random.default_rng(0).integers(0, 50257, B * 1024 * (STEPS + 3), dtype=np.uint16)
    copies = {name: copied(name, peers[name.split(",")[0]], folder) for name in EDITS}
    places = {"ours": folder / "ours", "transformers": folder / "transformers"} | copies
    for name in ("ours", "transformers"):
        places[name].mkdir()
    (places["ours"] / "shards").mkdir()
    data.write_shard(places["ours"] / "shards/random_train_000001.bin", tokens)
    (places["ours"] / "shards/meta.json").write_text('{"tokenizer": "gpt2"}')
    for name in ("nanoGPT", "nanoGPT, bf16"):
        (places[name] / "data/random").mkdir()
        for split in ("train", "val"):
            tokens.tofile(places[name] / f"data/random/{split}.bin")
    build = places["build-nanogpt"]
    (build / "gpt.py").write_text(
        (build / "train_gpt2.py").read_text().split("# simple launch:")[0]
    )
    (build / "edu_fineweb10B").mkdir()
    for split in ("train", "val"):
        np.save(build / f"edu_fineweb10B/{split}.npy", tokens)

    rows = {
        "ours": ours(places["ours"]),
        "nanoGPT": nanogpt(places["nanoGPT"]),
        "nanoGPT, bf16": nanogpt(places["nanoGPT, bf16"]),
        "build-nanogpt": training(["train_gpt2.py"], [], build, r"dt: ([\d.]+)ms"),
        "transformers": trainer(places["transformers"]),
    }
    for name, code in GENERATE.items():
        rows[name]["tokens/s"] = NEW / timed(code, places[name])
    for name, code in SCORE.items():
        rows[name]["tasks/s"] = TASKS / timed(code, places[name])
    commands = {"ours": [ROOT / "prepare.py", os.environ["TEXT"], "--out", "text"]}
    commands |= {"nanoGPT": ["data/openwebtext/prepare.py"], "build-nanogpt": ["fineweb.py"]}
    for name, command in commands.items():
        rows[name]["MB/s"] = megabytes / watch(command, places[name])["seconds"]
    return rows


def main(nanogpt: str, build_nanogpt: str, text: str, tasks: str) -> None:
    peers = {"nanoGPT": Path(nanogpt), "build-nanogpt": Path(build_nanogpt)}
    os.environ |= dict(TEXT=str(Path(text).resolve()), TASKS=str(Path(tasks).resolve()))
    megabytes = sum(len(text.encode()) for text in bench.texts_of([Path(text)])) / 1e6
    rounds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(round_of(peers, megabytes, Path(folder)))
        print(json.dumps(rounds[-1]), file=sys.stderr)
    each = {name: {c: [r[name][c] for r in rounds] for c in row} for name, row in rounds[0].items()}
    rows = {
        name: {c: statistics.median(v) for c, v in columns.items()}
        for name, columns in each.items()
    }
    spread = {
        name: {c: [min(v), max(v)] for c, v in columns.items()} for name, columns in each.items()
    }
    commits = {
        name: subprocess.getoutput(f"git -C {path} rev-parse --short HEAD")
        for name, path in peers.items()
    }
    settings = dict(
        batch=B,
        steps=STEPS,
        rounds=ROUNDS,
        new_tokens=NEW,
        tasks=TASKS,
        megabytes=round(megabytes, 1),
    )
    result = dict(bench="peers", device=runtime.start("cpu").device_name(), torch=torch.__version__)
    print(
        json.dumps(result | dict(settings=settings | commits, rows=rows, ratios={}, spread=spread))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
