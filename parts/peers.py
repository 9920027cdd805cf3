"""Other programs beside ours: what each of them runs, in processes of its own, and what it takes.

A program is a folder, as nanoGPT and build-nanogpt are, or a package. Folders are copied, and EDITS
says what is changed in the copies: sizes that are constants there, evaluations (and with them
build-nanogpt's save), files instead of downloads, and in one row the precision.
"""

if __name__ == "__main__":
    raise SystemExit("parts/peers.py is no command: README.md lists the commands")

import copy
import functools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from parts import data
from parts.console import print_note
from parts.sharding import available_cpus

import numpy as np

ROOT = Path(__file__).parents[1]
KINDS = ("train", "resume", "generate", "hellaswag", "tokenize")  # what is measured
OUTPUT = "took ([0-9.]+) ms"  # what our own code prints


class Workload(NamedTuple):
    """How much each program has to do."""

    shape: dict[str, int]  # n_layer, n_head, n_embd
    block_size: int = 1024  # a training step is one sequence of so many tokens
    steps: int = 4
    new_tokens: int = 64
    tasks: int = 40  # of HellaSwag


class Sources(NamedTuple):
    """Where the programs are. An empty name is a program that is left out."""

    nanogpt: str  # folder
    build_nanogpt: str  # folder
    gguf: str  # a GPT-2 of the workload's shape as llama.cpp reads it
    python: str  # of an environment with packages that this one lacks


# ---- What is changed in the copies: program -> file -> text -> its replacement -------------------

# Our copy of GPT-2's vocabulary, because tiktoken would download its own.
VOCABULARY = {
    'tiktoken.get_encoding("gpt2")': (
        '__import__("parts.tokenizer").tokenizer.get_tokenizer("gpt2").encoding'
    )
}
PARQUET = '"parquet", data_files=os.environ["TEXT"], '

EDITS: dict[str, dict[str, dict[str, str]]] = {
    "nanoGPT": {
        "train.py": {"if iter_num % eval_interval": "if iter_num and iter_num % eval_interval"},
        "data/openwebtext/prepare.py": VOCABULARY | {'"openwebtext", ': PARQUET, "= 1024": "= 1"},
    },
    "build-nanogpt": {
        "train_gpt2.py": VOCABULARY
        | {
            "= 524288": "= {block_size}",
            "B = 64 ": "B = 1 ",
            "T = 1024 ": "T = {block_size} ",
            "n_layer: int = 12": "n_layer: int = {n_layer}",
            "n_head: int = 12": "n_head: int = {n_head}",
            "n_embd: int = 768": "n_embd: int = {n_embd}",
            "max_steps = 19073": "max_steps = {steps}",
            "step % 250 == 0": "False",
            "or last_step": "",
        },
        "hellaswag.py": VOCABULARY,
        "fineweb.py": VOCABULARY | {'"HuggingFaceFW/fineweb-edu", name=remote_name, ': PARQUET},
    },
}
EDITS["nanoGPT, bf16"] = copy.deepcopy(EDITS["nanoGPT"])
EDITS["nanoGPT, bf16"]["train.py"]["nullcontext() if device_type == 'cpu' else "] = ""

# ---- Code that is run, behind the lines of Peers.definitions -------------------------------------

WRITE_MODEL = """
from pathlib import Path
import torch
from model import GPT, GPTConfig
from parts.tokenizer import get_tokenizer, save_tokenizer
torch.manual_seed(0)
GPT(GPTConfig(block_size=BLOCK_SIZE, **SHAPE)).save_pretrained(OUT)
save_tokenizer(get_tokenizer("gpt2"), Path(OUT), BLOCK_SIZE)
"""

# transformers' Trainer with its defaults.
TRAINER = """
import sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        print(f"took {1000 * (time.perf_counter() - self.begin):.2f} ms", flush=True)

more = "resume" in sys.argv
tokens = torch.randint(50257, (STEPS + 3, BLOCK_SIZE))
config = GPT2Config(
    n_positions=BLOCK_SIZE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SHAPE
)
trainer = Trainer(
    GPT2LMHeadModel(config),
    TrainingArguments(
        "out",
        per_device_train_batch_size=1,
        max_steps=STEPS + more,
        save_steps=STEPS,
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=[dict(input_ids=row, labels=row) for row in tokens],
    callbacks=[Clock()],
)
trainer.train(resume_from_checkpoint=more)
"""

# What transformers and optimum call generate(), of a model that is still to be loaded.
GENERATE = """
import torch
{load}
def work(n):
    model.generate(
        input_ids=torch.arange(16)[None],
        attention_mask=torch.ones(1, 16, dtype=torch.int64),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
"""
# What train.py sets for its own process, and so for the one that measures. Each program has its
# defaults.
SET_BY_TRAIN = ("GOMP_SPINCOUNT", "MKL_DISABLE_FAST_MM")

OURS = """
import sample  # which says how threads wait, before torch is there
from model import open_model
from parts import inference, runtime
from parts.auto import prepare_for_inference
prepared = prepare_for_inference(open_model(MODEL).model, runtime.start("cpu"), {dtype!r}, rows=1)
def work(n):
    inference.generate(prepared.model, [list(range(16))], n, temperature=0)
"""
CTRANSLATE2 = """
import ctranslate2
generator = ctranslate2.Generator("model", compute_type={dtype!r}, intra_threads=THREADS)
def work(n):
    generator.generate_batch(
        [["a"] * 16], max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False
    )
"""
LLAMA = """
from itertools import islice
from llama_cpp import Llama
model = Llama(GGUF, n_ctx=BLOCK_SIZE, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
def work(n):
    model.reset()
    for token in islice(model.generate(list(range(16)), top_k=1, temp=0.0), n):
        pass
"""
NANOGPT = """
import torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(bias=True, block_size=BLOCK_SIZE, **SHAPE)).eval()
def work(n):
    model.generate(torch.arange(16)[None], n, top_k=1)
"""

OUR_SCORE = """
import hellaswag
from model import open_model
from parts import runtime
from parts.auto import prepare_for_inference
from parts.tokenizer import get_tokenizer
machine = runtime.start("cpu")
tokenizer = get_tokenizer("gpt2")
prepared = prepare_for_inference(open_model(MODEL).model, machine, "auto", rows=1024)
def work(n):
    tasks = hellaswag.examples(TASKS, n)
    hellaswag.evaluate(prepared.model, tokenizer, machine, tasks, dtype=prepared.packing.dtype)
"""
BUILD_NANOGPT_SCORE = """
import json
import torch
from gpt import *
model = GPT(GPTConfig(vocab_size=50304)).eval()
def work(n):
    for line in open(TASKS).readlines()[:n]:
        _, tokens, mask, label = render_example(json.loads(line))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = model(tokens)
        get_most_likely_row(tokens, mask, logits)
"""

# Each program's setup, which is not timed, from the model's folder.
CONVERT_CTRANSLATE2 = """
from ctranslate2.converters import TransformersConverter
TransformersConverter(MODEL).convert(OUT)
"""
CONVERT_ONNX = """
from optimum.onnxruntime import ORTModelForCausalLM
ORTModelForCausalLM.from_pretrained(MODEL, export=True).save_pretrained(OUT)
"""
CONVERT_OPENVINO = """
from optimum.intel import OVModelForCausalLM
OVModelForCausalLM.from_pretrained(MODEL, export=True, load_in_8bit=False).save_pretrained(OUT)
"""
LOAD_TRANSFORMERS = """from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained(MODEL).to(torch.bfloat16).eval()"""
LOAD_ONNX = """from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained("model")"""
LOAD_OPENVINO = """from optimum.intel import OVModelForCausalLM
model = OVModelForCausalLM.from_pretrained("model")"""


class Package(NamedTuple):
    """A program that is installed."""

    module: str  # that must be there
    distribution: str  # whose version is named
    generate: str  # code
    convert: str = ""  # code that writes OUT, from which `generate` loads "model"


PACKAGES = {
    "transformers": Package(
        "transformers", "transformers", GENERATE.format(load=LOAD_TRANSFORMERS)
    ),
    "llama.cpp": Package("llama_cpp", "llama_cpp_python", LLAMA),
    "CTranslate2": Package(
        "ctranslate2", "ctranslate2", CTRANSLATE2.format(dtype="float32"), CONVERT_CTRANSLATE2
    ),
    "CTranslate2, int8": Package(
        "ctranslate2", "ctranslate2", CTRANSLATE2.format(dtype="int8"), CONVERT_CTRANSLATE2
    ),
    "ONNX Runtime": Package(
        "optimum.onnxruntime", "onnxruntime", GENERATE.format(load=LOAD_ONNX), CONVERT_ONNX
    ),
    "OpenVINO": Package(
        "optimum.intel", "openvino", GENERATE.format(load=LOAD_OPENVINO), CONVERT_OPENVINO
    ),
}

# ---- Running a program ---------------------------------------------------------------------------


class Watched(NamedTuple):
    """What was seen of a process."""

    ms: list[float]  # the times that it printed
    first: float  # seconds from its start to the first of them
    seconds: float  # from its start to its end
    gb: float  # the most memory; never less than ours when the process began


def watch(
    command: list,
    folder: Path,
    pattern: str = OUTPUT,
    environment: Mapping[str, str] | None = None,
) -> Watched:
    """Run a command in this folder. pattern: what it prints with a time in ms. ValueError, with the
    last line that it printed, if it fails.
    """
    ms: list[float] = []
    first = 0.0
    last_line = ""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = dict(PYTHONPATH=path, PYTHONUNBUFFERED="1", HF_HOME=str(folder / "hf"))
    inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_TRAIN}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env={**inherited, **settings, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout or ():
        last_line = line.strip() or last_line
        match = re.search(pattern, line)
        if match:
            if not ms:
                first = time.perf_counter() - begin
            ms.append(float(match[1].replace(",", "")))
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"it ended with {process.returncode}: {last_line}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Watched(ms, first, seconds, gb=usage.ru_maxrss * unit / 1e9)


def copy_program(name: str, source: Path, folder: Path, sizes: Mapping[str, int]) -> None:
    """Copy a program's folder and edit it. ValueError if a text to replace is not there."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git"))
    for file, edits in EDITS[name].items():
        if not (folder / file).is_file():
            raise ValueError(f"{source}: no {file} in it; is it {name.split(',')[0]}?")
        text = (folder / file).read_text()
        for old, new in edits.items():
            if old not in text:
                raise ValueError(f"{source / file}: no {old!r} in it; is it another version?")
            text = text.replace(old, new.format(**sizes) if "{" in new else new)
        (folder / file).write_text(text)


# ---- The programs and what they run --------------------------------------------------------------


class Peers:
    """Programs in one folder, which is kept: what was prepared or measured once stays."""

    def __init__(self, folder: Path, sources: Sources, workload: Workload, text: str, tasks: str):
        """text: a .parquet file with a column "text"; tasks: HellaSwag's. Empty: made here."""
        self.folder = folder
        self.sources = sources
        self.workload = workload
        self.text = Path(text).resolve() if text else folder / "text.parquet"
        self.tasks = Path(tasks).resolve() if tasks else folder / "tasks.jsonl"
        self.model = folder / "model"
        # Program -> kind -> a function that measures it and returns {column: figure}.
        self.runs: dict[str, dict[str, Callable[[], dict]]] = {}
        self.left_out: dict[str, str] = {}  # program, or a kind of it -> what is missing
        self.versions: dict[str, str] = {}

    def prepare(self) -> None:
        """Write what all programs need, and find out which there are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.text.is_file():
            write_texts(self.text)
        if not self.tasks.is_file():
            write_tasks(self.tasks)
        if not self.model.is_dir():
            self.convert(WRITE_MODEL, self.model, sys.executable)
        self.add_ours()
        self.add_nanogpt()
        self.add_build_nanogpt()
        self.add_packages()

    def definitions(self) -> str:
        """The first lines of code that is run."""
        workload = self.workload
        gguf = str(Path(self.sources.gguf).resolve())
        return (
            f"MODEL, TASKS, GGUF = {str(self.model)!r}, {str(self.tasks)!r}, {gguf!r}\n"
            f"THREADS, SHAPE = {available_cpus()}, {workload.shape!r}\n"
            f"STEPS, BLOCK_SIZE = {workload.steps}, {workload.block_size}\n"
        )

    def convert(self, code: str, out: Path, python: str) -> None:
        """Run code that writes a folder OUT. It exists when it is whole."""
        unfinished = out.with_name(f"{out.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        script = f"{self.definitions()}OUT = {str(unfinished)!r}\n{code}"
        watch([python, "-c", script], self.folder)
        unfinished.rename(out)

    def make_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def random_tokens(self) -> np.ndarray:
        n_tokens = self.workload.block_size * (self.workload.steps + 3)
        return np.random.default_rng(0).integers(0, 50257, n_tokens, dtype=np.uint16)

    def add_ours(self) -> None:
        folder = self.make_folder("ours")
        shards = folder / "shards"
        if not shards.is_dir():
            shards.mkdir()
            data.write_shard(shards / "random_train_000001.bin", self.random_tokens())
            (shards / "meta.json").write_text('{"tokenizer": "gpt2"}')
        workload = self.workload
        command = [sys.executable, ROOT / "train.py", "--data_dir=shards", "--out_dir=out"]
        settings = workload.shape | dict(
            block_size=workload.block_size,
            batch_size=1,
            total_batch_size=workload.block_size,
            warmup_steps=1,
            eval_every=0,
            hellaswag_every=0,
            sample_every=0,
        )
        command += [f"--{name}={value}" for name, value in settings.items()]
        command += ["--device=cpu", "--report=False"]
        more = [f"--max_steps={workload.steps + 1}", "--checkpoint_every=0", "--resume_anyway=True"]
        tokenise = [sys.executable, ROOT / "prepare.py", self.text, "--out", "text"]
        pattern = r"^step \d+/.* ([\d,]+) ms "
        self.runs["ours"] = {
            "train": self.training(folder, [*command, f"--max_steps={workload.steps}"], pattern),
            "resume": self.resuming(folder, [*command, *more], pattern),
            "generate": self.generating(folder, OURS.format(dtype="auto")),
            "hellaswag": self.scoring(folder, OUR_SCORE),
            "tokenize": self.tokenising(folder, tokenise, outputs=["text"]),
        }
        int8 = self.generating(folder, OURS.format(dtype="int8"))
        self.runs["ours, int8"] = {"generate": int8}

    def add_nanogpt(self) -> None:
        if not self.sources.nanogpt:
            self.left_out["nanoGPT"] = "no folder (--nanogpt)"
            return
        self.versions["nanoGPT"] = commit_of(self.sources.nanogpt)
        workload = self.workload
        for name in ("nanoGPT", "nanoGPT, bf16"):
            folder = self.copy(name, self.sources.nanogpt)
            dataset = folder / "data" / "random"
            if not dataset.is_dir():
                dataset.mkdir()
                for file in ("train.bin", "val.bin"):
                    self.random_tokens().tofile(dataset / file)
            settings = workload.shape | dict(
                dataset="random",
                device="cpu",
                compile=False,
                bias=True,
                dtype="bfloat16",
                block_size=workload.block_size,
                batch_size=1,
                gradient_accumulation_steps=1,
                eval_iters=1,
                max_iters=workload.steps,
            )
            command = [sys.executable, "train.py"]
            command += [f"--{setting}={value}" for setting, value in settings.items()]
            start = [*command, f"--eval_interval={workload.steps}"]
            more = [*command, "--eval_interval=1000", "--init_from=resume"]
            pattern = r"^iter \d+: .* time ([\d.]+)ms"
            self.runs[name] = {
                "train": self.training(folder, start, pattern),
                "resume": self.resuming(folder, more, pattern),
            }
        folder = self.folder / "nanoGPT"
        tokenise = [sys.executable, "data/openwebtext/prepare.py"]
        outputs = ["hf", "data/openwebtext/train.bin", "data/openwebtext/val.bin"]
        self.runs["nanoGPT"] |= {
            "generate": self.generating(folder, NANOGPT),
            "tokenize": self.tokenising(folder, tokenise, outputs),
        }

    def add_build_nanogpt(self) -> None:
        name = "build-nanogpt"
        if not self.sources.build_nanogpt:
            self.left_out[name] = "no folder (--build_nanogpt)"
            return
        self.versions[name] = commit_of(self.sources.build_nanogpt)
        folder = self.copy(name, self.sources.build_nanogpt)
        dataset = folder / "edu_fineweb10B"
        if not dataset.is_dir():
            # The definitions of its script, to import.
            definitions, _ = (folder / "train_gpt2.py").read_text().split("# simple launch:", 1)
            (folder / "gpt.py").write_text(definitions)
            dataset.mkdir()
            for split in ("train", "val"):
                np.save(dataset / f"{split}.npy", self.random_tokens())
        start = [sys.executable, "train_gpt2.py"]
        self.runs[name] = {
            "train": self.training(folder, start, r"dt: ([\d.]+)ms"),
            "hellaswag": self.scoring(folder, BUILD_NANOGPT_SCORE),
            "tokenize": self.tokenising(folder, [sys.executable, "fineweb.py"], outputs=["hf"]),
        }

    def add_packages(self) -> None:
        """Each runs in the first of two environments that has it: this one, and --python's."""
        distributions = {package.module: package.distribution for package in PACKAGES.values()}
        distributions["accelerate"] = "accelerate"
        pythons: dict[str, str] = {}
        for python in filter(None, [sys.executable, self.sources.python]):
            for module, version in find_packages(python, distributions).items():
                if module not in pythons:
                    pythons[module] = python
                    self.versions[distributions[module]] = version

        for name, package in PACKAGES.items():
            if package.module not in pythons:
                self.left_out[name] = f"no {package.module} here, nor in --python"
                continue
            if name == "llama.cpp" and not self.sources.gguf:
                self.left_out[name] = "no model (--gguf)"
                continue
            folder = self.make_folder(name.replace(", ", "_"))
            python = pythons[package.module]
            try:
                if package.convert and not (folder / "model").is_dir():
                    self.convert(package.convert, folder / "model", python)
            except ValueError as error:
                self.left_out[name] = f"it does not convert the model: {error}"
                continue
            self.runs[name] = {"generate": self.generating(folder, package.generate, python)}

        if "accelerate" not in pythons or "transformers" not in self.runs:
            self.left_out["transformers' Trainer"] = "no accelerate here, nor in --python"
            return
        folder = self.folder / "transformers"
        start = [pythons["accelerate"], "-c", self.definitions() + TRAINER]
        self.runs["transformers"] |= {
            "train": self.training(folder, start, OUTPUT),
            "resume": self.resuming(folder, [*start, "resume"], OUTPUT),
        }

    def copy(self, name: str, source: str) -> Path:
        """The program's copy, made once."""
        folder = self.folder / name.replace(", ", "_")
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            sizes = self.workload.shape | self.workload._asdict()
            copy_program(name, Path(source), unfinished, sizes)
            unfinished.rename(folder)
        return folder

    # The functions that measure.

    def training(self, folder: Path, command: list, pattern: str) -> Callable[[], dict]:
        def measure() -> dict:
            shutil.rmtree(folder / "out", ignore_errors=True)
            run = watch(command, folder, pattern)
            step = statistics.median(run.ms[1 : self.workload.steps])
            return {"ms a step": step, "start s": run.first, "GB": run.gb}

        return measure

    def resuming(self, folder: Path, command: list, pattern: str) -> Callable[[], dict]:
        """The first step after the checkpoint that the training before has left."""
        return lambda: {"resume s": watch(command, folder, pattern).first}

    def generating(self, folder: Path, code: str, python: str = "") -> Callable[[], dict]:
        return functools.partial(
            self.measure_code, folder, code, "tokens/s", self.workload.new_tokens, python
        )

    def scoring(self, folder: Path, code: str) -> Callable[[], dict]:
        return functools.partial(self.measure_code, folder, code, "tasks/s", self.workload.tasks)

    def measure_code(
        self, folder: Path, code: str, column: str, n: int, python: str = ""
    ) -> dict[str, float]:
        """How many a second, of n, after four to warm up. code: defines work(n)."""
        script = f"""{self.definitions()}{code}
import time
work(min(4, {n}))
begin = time.perf_counter()
work({n})
print("took", 1000 * (time.perf_counter() - begin), "ms")
"""
        [ms] = watch([python or sys.executable, "-c", script], folder).ms
        return {column: 1000 * n / ms}

    def tokenising(self, folder: Path, command: list, outputs: list[str]) -> Callable[[], dict]:
        """From the file of text to token files, which are deleted before."""

        def measure() -> dict:
            for output in outputs:
                path = folder / output
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
            seconds = watch(command, folder, environment={"TEXT": str(self.text)}).seconds
            return {"MB/s": megabytes_of(self.text) / seconds}

        return measure

    # A round after the other.

    def measure(self, kinds: list[str], rounds: int) -> dict[str, Any]:
        """Run each kind in each program, in turn. Return the medians {program: {column: figure}} as
        "rows", and the lowest and highest figures as "spread".

        Each figure is kept in measured.jsonl, and is not measured again.
        """
        log = self.folder / "measured.jsonl"
        records = []
        if log.is_file():
            for line in log.read_text().splitlines():
                record = json.loads(line)
                if record["round"] <= rounds:
                    records.append(record)
        known = {(record["round"], record["kind"], record["name"]) for record in records}
        for number in range(1, rounds + 1):
            for kind in kinds:
                for name, runs in self.runs.items():
                    if kind not in runs or (number, kind, name) in known:
                        continue
                    try:
                        figures = runs[kind]()
                    except (ValueError, OSError, statistics.StatisticsError) as error:
                        print_note(f"{name}, {kind}: {error}")
                        continue
                    record = dict(round=number, kind=kind, name=name, figures=figures)
                    records.append(record)
                    with log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    shown = "  ".join(f"{name} {value:,.2f}" for name, value in figures.items())
                    print_note(f"round {number}  {name:20} {shown}")
        asked = [name for name, runs in self.runs.items() if runs.keys() & set(kinds)]
        return summarise(records, asked)


def summarise(records: list[dict], names: list[str]) -> dict[str, Any]:
    """{"rows": medians, "spread": lowest and highest}. A program of which nothing was measured has
    the row null.
    """
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for record in records:
        columns = figures.setdefault(record["name"], {})
        for column, value in record["figures"].items():
            columns.setdefault(column, []).append(value)
    rows: dict[str, dict | None] = {}
    spread = {}
    for name, columns in figures.items():
        rows[name] = {column: statistics.median(values) for column, values in columns.items()}
        spread[name] = {column: [min(values), max(values)] for column, values in columns.items()}
        if not columns:
            rows[name] = None
            del spread[name]
    if not any(rows.values()):
        raise ValueError("peers: nothing could be measured; the lines above say why")
    return {"rows": rows, "spread": spread}


# ---- What is read and found ----------------------------------------------------------------------


def write_texts(path: Path) -> None:
    """A .parquet file whose documents are the files of Python's own library."""
    import pyarrow
    import pyarrow.parquet

    texts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in file.parts:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


@functools.cache
def megabytes_of(path: Path) -> float:
    """Of the text in a .parquet file."""
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return sum(len(text.encode()) for text in texts) / 1e6


def write_tasks(path: Path) -> None:
    """As many tasks as programs score, of random words."""
    words = "the of and a man water then house runs small door open light under hand".split()
    draw = random.Random(0)

    def sentence(shortest: int, longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(shortest, longest)))

    lines = []
    for _ in range(Workload({}).tasks):
        endings = [sentence(5, 30) for _ in range(4)]
        task = dict(ctx=sentence(10, 70), endings=endings, label=draw.randrange(4))
        lines.append(json.dumps(task) + "\n")
    path.write_text("".join(lines))


def commit_of(folder: str) -> str:
    """The commit of a program's folder."""
    return subprocess.getoutput(f"git -C {folder} rev-parse --short HEAD")


def find_packages(python: str, distributions: dict[str, str]) -> dict[str, str]:
    """Module -> the version of its distribution, of those that this interpreter can import.
    ValueError if it cannot be run.
    """
    code = """
import importlib.metadata, importlib.util, json, sys
found = {}
for module, distribution in json.loads(sys.argv[1]).items():
    try:
        if importlib.util.find_spec(module):
            found[module] = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found[module] = getattr(importlib.import_module(module), "__version__", "?")
    except ImportError:
        pass
print(json.dumps(found))
"""
    command = [python, "-c", code, json.dumps(distributions)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(run.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ValueError(f"--python {python}: cannot run it ({error})") from None
