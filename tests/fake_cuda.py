"""A CUDA or Apple GPU that computes nothing: its tensors have shapes, dtypes and devices as on a
real one, but no values.

CPU tensors are real, and so are a run's files, tokenizers and logs. Every operation on a tensor of
the GPU goes to torch's FakeTensorMode, which refuses to mix devices as the GPU does. Each value
that the CPU reads from a tensor is noted, because the CPU waits for the GPU there. `main` does
whole runs this way and prints what happened, as JSON.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from model import GPT
from parts import auto, data, inference
from parts.metrics import Log

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.cpp_extension import include_paths, library_paths

PROJECT = Path(__file__).parent.parent

# The backward pass of a GPU's tensors asks for the device's guard and hooks, which a CPU build of
# torch lacks. These do nothing. They must be loaded before torch. For Apple's GPU, the word CUDA is
# replaced by MPS.
SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

const c10::Device GPU(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, GPU);
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  ONLY
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
"""

# What only one of them has.
ONLY = {
    "cuda": "explicit CUDAHooks(CUDAHooksArgs) {}",
    "mps": "bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }",
}


def build(folder: Path, kind: str) -> Path:
    """Compile the shim for "cuda" or "mps". OSError with the reason where that is impossible."""
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        raise OSError("the fake GPU is for CPU builds of torch on Linux")
    if not shutil.which("g++"):
        raise OSError("no g++ to compile the fake GPU's shim")
    source = folder / f"{kind}.cpp"
    shim = folder / f"{kind}.so"
    source.write_text(SHIM.replace("CUDA", kind.upper()).replace("ONLY", ONLY[kind]))
    [libraries] = library_paths()
    includes = [f"-I{path}" for path in include_paths()]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", *includes, source, "-o", shim]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"the fake GPU's shim does not compile: {done.stderr[:300]}")
    return shim


class FakeGPU(TorchDispatchMode):
    """While active, tensors of this kind ("cuda", "mps") can be made. `reads` has the line of each
    read of a value.

    A single number is read as 0, and a tensor that is copied to the CPU is full of ones: no NaN, no
    division by zero.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.fake = FakeTensorMode()
        self.reads: list[str] = []
        # Whether a CUDA graph is being captured. It can neither hand out values nor use the CPU's.
        self.capturing = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        has_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        has_real = any(not isinstance(tensor, FakeTensor) for tensor in tensors)
        device = kwargs.get("device")
        if not has_fake and not (device and device.type == self.kind):
            return func(*args, **kwargs)  # on the CPU alone
        if self.capturing and has_real:
            raise RuntimeError(f"{func} uses a CPU tensor while a CUDA graph is captured")

        # The CPU reads a number, copies a tensor to the CPU, or copies it into one of the CPU's.
        if has_fake and func is torch.ops.aten._local_scalar_dense.default:
            self.note_read(func)
            return torch.zeros((), dtype=args[0].dtype).item()
        to_cpu = device and device.type == "cpu"
        if has_fake and func is torch.ops.aten._to_copy.default and to_cpu:
            self.note_read(func)
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func._schema.is_mutable and has_real and not isinstance(args[0], (FakeTensor, list)):
            if func is not torch.ops.aten.copy_.default:
                raise RuntimeError(f"{func} writes from the GPU into a CPU tensor")
            self.note_read(func)
            return args[0].fill_(1)

        args, kwargs = tree_map(self.as_fake, (args, kwargs))
        with self.fake:
            out = func(*args, **kwargs)
        if self.kind == "mps":
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                    raise TypeError(f"{func}: MPS has no float64")
        return out

    def as_fake(self, value):
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return self.fake.from_tensor(value.detach())
        return value

    def note_read(self, func) -> None:
        """Note the innermost line of the project that is running."""
        if self.capturing:
            raise RuntimeError(f"{func} reads a value while a CUDA graph is captured")
        for file, line in frames():
            if Path(file).parent in (PROJECT, PROJECT / "parts"):
                self.reads.append(f"{Path(file).name}:{line}")
                return
        self.reads.append(str(func))

    @contextlib.contextmanager
    def capture(self, graph, stream=None):
        """In place of torch.cuda.graph."""
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


def frames():
    """(file, line) of each running call, the innermost first."""
    frame = sys._getframe()
    while frame:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def move(module: torch.nn.Module, device) -> torch.nn.Module:
    """In place of Module.to, which sets .data to keep weights tied. A fake tensor cannot be set
    there, so tied weights are moved once here.
    """
    moved = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in moved:
                moved[parameter] = torch.nn.Parameter(parameter.detach().to(device))
            part._parameters[name] = moved.get(parameter)
    return module


def pretend(gpu: FakeGPU, bf16: bool = True) -> contextlib.ExitStack:
    """A context in which torch says that it has this GPU: an H100 with bf16, or a T4 without."""
    if gpu.kind == "cuda":
        changes = pretend_cuda(gpu, bf16)
    else:
        changes = pretend_mps()
    changes.append((torch.nn.Module, "to", move))
    changes.append((FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()))
    stack = contextlib.ExitStack()
    for target, name, value in changes:
        stack.enter_context(mock.patch.object(target, name, value))
    # torch.tensor(..., device="cuda") shall make a CPU tensor and copy it, so that FakeGPU sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    stack.callback(torch._C._set_only_lift_cpu_tensors, False)
    stack.enter_context(gpu)
    return stack


def pretend_cuda(gpu: FakeGPU, bf16: bool) -> list[tuple]:
    """(object, name, value) of each change."""
    functions = dict(
        is_available=lambda: True,
        is_bf16_supported=lambda including_emulation=True: bf16,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_capability=lambda device=None: (9, 0) if bf16 else (7, 5),
        get_arch_list=lambda: ["sm_75", "sm_90"],
        get_device_name=lambda device=None: "NVIDIA H100 80GB HBM3" if bf16 else "Tesla T4",
        mem_get_info=lambda device=None: (80 * 10**9, 80 * 10**9),
        empty_cache=lambda: None,
        max_memory_allocated=lambda device=None: 10**9,
        synchronize=lambda device=None: None,
        _lazy_init=lambda: None,
        Stream=mock.MagicMock(),
        current_stream=mock.MagicMock(),
        stream=lambda stream: contextlib.nullcontext(),
        device_of=lambda tensor: contextlib.nullcontext(),
        CUDAGraph=mock.MagicMock(),
        graph=gpu.capture,
    )
    changes = [(torch.cuda, name, value) for name, value in functions.items()]
    changes.append((torch.Tensor, "pin_memory", lambda tensor: tensor))
    return changes


def pretend_mps() -> list[tuple]:
    """(object, name, value) of each change."""

    def attention(*args, **options):
        # The fused kernel exists in builds for macOS only.
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(*args, **options)
        return out

    return [
        (torch.backends.mps, "is_available", lambda: True),
        (torch.mps, "synchronize", lambda: None),
        (F, "scaled_dot_product_attention", attention),
    ]


# ---- The runs ------------------------------------------------------------------------------------


def watch(run, bf16: bool = True, kind: str = "cuda") -> dict:
    """Do one run on a GPU of its own. Return what was seen:

    error         the traceback of what ended it, else None
    reads         [step, the lines of the reads since the step before] for each training step
    reads_after   how many reads came after the last step
    replays       how often a CUDA graph was replayed
    cudnn         [whether shapes were those of training, whether cuDNN's attention was allowed] of
                  the forward passes on the GPU
    out           what was printed
    """
    gpu = FakeGPU(kind)
    log = Log.__call__
    reads = []
    error = None
    out = io.StringIO()
    hidden = GPT.hidden
    cudnn = set()

    def hidden_and_note_cudnn(self, idx, position=None, mask=None, cache=None):
        if idx.device.type == kind:
            cudnn.add((position is None, torch.backends.cuda.cudnn_sdp_enabled()))
        return hidden(self, idx, position=position, mask=mask, cache=cache)

    def log_and_note_reads(self, kind, step, **values):
        if kind == "train":
            reads.append((step, gpu.reads))
            gpu.reads = []
        return log(self, kind, step, **values)

    with (
        pretend(gpu, bf16),
        mock.patch.object(Log, "__call__", log_and_note_reads),
        mock.patch.object(GPT, "hidden", hidden_and_note_cudnn),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            run()
        except (Exception, SystemExit) as raised:
            error = f"{''.join(traceback.format_tb(raised.__traceback__))}{raised!r}"
        replays = 0
        if kind == "cuda":
            replays = torch.cuda.CUDAGraph().replay.call_count
    return dict(
        error=error,
        reads=reads,
        reads_after=len(gpu.reads),
        replays=replays,
        cudnn=sorted(cudnn),
        out=out.getvalue(),
    )


class Runs:
    """The runs of a kind of GPU, on these shards and HellaSwag tasks, into this folder."""

    def __init__(self, kind: str, shards: Path, tasks: Path, folder: Path):
        self.kind = kind
        self.shards = shards
        self.tasks = tasks
        self.folder = folder
        self.command = ["--model", f"{folder}/bf16", "--device", kind]

    def train(self, name: str, **settings) -> Callable:
        import train

        from conftest import toy_config

        defaults = dict(
            device=self.kind,
            n_layer=1,
            max_steps=3,
            total_batch_size=256,
            checkpoint_every=2,
            eval_every=3,
            eval_tokens=256,
            sample_every=3,
            sample_tokens=8,
            hellaswag_every=3,
            hellaswag_data=str(self.tasks),
        )
        config = toy_config(self.shards, self.folder / name, **(defaults | settings))
        return functools.partial(train.train, config)

    def sample(self, *options: str) -> Callable:
        import sample

        return functools.partial(sample.main, [*self.command, "-m", "40", *options])

    def sample_two_prompts(self) -> Callable:
        prompts = ["-p", "the quick", "-p", "brown fox jumps"]
        return self.sample("--json", *prompts, "--top_p", "0.9", "--repetition_penalty", "1.1")

    def sample_one_prompt(self) -> Callable:
        return self.sample("-p", "the quick", "--temperature", "0")

    def score(self) -> Callable:
        import hellaswag

        return functools.partial(
            hellaswag.main, [*self.command, "--data", str(self.tasks), "--json"]
        )


def do_mps_runs(runs: Runs) -> dict[str, dict]:
    watch_mps = functools.partial(watch, kind="mps")
    chosen = dict(device="auto", dtype="auto", batch_size="auto", compile="auto")
    return {
        "bf16": watch_mps(runs.train("bf16", dtype="bf16", dropout=0.1, recompute=True)),
        "fp32": watch_mps(runs.train("fp32", **chosen)),
        "sample": watch_mps(runs.sample_two_prompts()),
        "hellaswag": watch_mps(runs.score()),
        "float64": watch_mps(functools.partial(torch.ones, 2, dtype=torch.float64, device="mps")),
    }


def do_cuda_runs(runs: Runs) -> dict[str, dict]:
    import train

    fp16 = runs.train("fp16", dtype="auto", optimizer="muon")
    results = {
        "bf16": watch(runs.train("bf16", dtype="auto", dropout=0.1, recompute=True)),
        "fp16": watch(fp16, bf16=False),
        "fp32": watch(runs.train("fp32", flash=False, pad_vocab=False)),
        "muon": watch(runs.train("muon", dtype="auto", optimizer="muon")),
    }
    # fp16 resumed: the optimizer's and the scaler's state go to the GPU.
    shutil.rmtree(runs.folder / "fp16" / "step_0000003", ignore_errors=True)
    results["resumed"] = watch(fp16, bf16=False)

    results["sample"] = watch(runs.sample_two_prompts())
    results["one prompt"] = watch(runs.sample_one_prompt())
    results["hellaswag"] = watch(runs.score())

    # A run must see that memory is too small before its first evaluation, which takes minutes.
    full = mock.patch.object(auto, "try_step", side_effect=torch.OutOfMemoryError("full"))
    with full, mock.patch.object(train, "evaluate", side_effect=AssertionError("evaluated")):
        results["full"] = watch(runs.train("full", checkpoint_every=0))
    return results


def do_broken_cuda_runs(runs: Runs) -> dict[str, dict]:
    """Runs that are broken on purpose."""
    batch = data.BatchLoader.batch
    hidden = GPT.hidden
    forward_cached = inference.forward_cached

    def batch_with_targets_on_cpu(self, step, micro_step):
        x, y = batch(self, step, micro_step)
        return x, torch.zeros(y.shape, dtype=y.dtype)

    def hidden_with_positions_on_cpu(self, idx, **options):
        return hidden(self, idx, position=torch.arange(idx.size(1)))

    def forward_and_read(model, idx, cache):
        return forward_cached(model, idx, cache) * idx.max().item()

    short = runs.train("broken", checkpoint_every=0)
    results = {}
    with mock.patch.object(data.BatchLoader, "batch", batch_with_targets_on_cpu):
        results["targets on the CPU"] = watch(short)
    with mock.patch.object(GPT, "hidden", hidden_with_positions_on_cpu):
        results["positions on the CPU"] = watch(short)
    with mock.patch.object(inference, "forward_cached", forward_and_read):
        results["read in a graph"] = watch(runs.sample_one_prompt())
    return results


def main(kind: str, shards: str, tasks: str, folder: str) -> None:
    """Do all runs into the folder. The last line printed is a JSON object of the results."""
    runs = Runs(kind, Path(shards), Path(tasks), Path(folder))
    if kind == "mps":
        results = do_mps_runs(runs)
    else:
        results = do_cuda_runs(runs) | do_broken_cuda_runs(runs)
    print(json.dumps(results))
    sys.stdout.flush()
    # At a normal exit, autograd's thread for the GPU would abort the process.
    os._exit(0)
