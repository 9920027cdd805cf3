"""A CUDA or Apple GPU that computes nothing: shapes, dtypes and devices are as on a real one,
values are not there.

CPU tensors stay real, and all else of a run too: files, tokenizers, logs. Every operation on a
GPU's tensor goes to torch's FakeTensorMode, which refuses a mixture of devices as the GPU does.
Whatever the CPU reads from a tensor is noted, because each such read makes it wait for the GPU.
`main` does whole runs that way and prints what happened, as JSON.
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
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.cpp_extension import include_paths, library_paths

from parts import auto, data, inference
from parts.metrics import Log

PROJECT = Path(__file__).parent.parent

# A CPU build of torch has no place to run the backward pass of a GPU's tensors: autograd asks for
# the device's guard and hooks. These do nothing. They have to be in the process before torch is.
# For Apple's GPU, CUDA is replaced by MPS.
SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

const c10::Device GPU(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
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


ONLY = {
    "cuda": "explicit CUDAHooks(CUDAHooksArgs) {}",
    "mps": "bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }",
}


def build(folder: Path, kind: str) -> Path:
    """Compile the shim for "cuda" or "mps". Raises OSError with the reason where that is
    impossible.
    """
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        raise OSError("the fake GPU is for CPU builds of torch on Linux")
    if not (compiler := shutil.which("g++")):
        raise OSError("no g++ to compile the fake GPU's shim")
    source, shim = folder / f"{kind}.cpp", folder / f"{kind}.so"
    source.write_text(SHIM.replace("CUDA", kind.upper()).replace("ONLY", ONLY[kind]))
    [libraries] = library_paths()
    flags = ["-std=c++20", "-shared", "-fPIC", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    command = [
        compiler,
        *flags,
        *(f"-I{path}" for path in include_paths()),
        source,
        "-o",
        shim,
        "-lc10",
        "-ltorch_cpu",
    ]
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
        self.kind, self.fake = kind, FakeTensorMode()
        self.reads: list[str] = []
        self.capturing = (
            False  # a CUDA graph, which can neither hand out values nor wait for the CPU's
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        real = any(
            isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) for leaf in leaves
        )
        to = kwargs.get("device")
        if not fake and not (to and to.type == self.kind):
            return func(*args, **kwargs)  # the CPU's own business
        if self.capturing and real:
            raise RuntimeError(f"{func} uses a CPU tensor while a CUDA graph is captured")

        if fake and func is torch.ops.aten._local_scalar_dense.default:
            self.note_read(func)
            return torch.zeros((), dtype=args[0].dtype).item()
        if fake and func is torch.ops.aten._to_copy.default and to and to.type == "cpu":
            self.note_read(func)
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func._schema.is_mutable and real and not isinstance(args[0], (FakeTensor, list)):
            if func is not torch.ops.aten.copy_.default:
                raise RuntimeError(f"{func} writes from the GPU into a CPU tensor")
            self.note_read(func)
            return args[0].fill_(1)
        args, kwargs = tree_map(self.as_fake, (args, kwargs))
        with self.fake:
            out = func(*args, **kwargs)
        if self.kind == "mps" and any(
            getattr(leaf, "dtype", None) == torch.float64 for leaf in tree_leaves(out)
        ):
            raise TypeError(f"{func}: MPS has no float64")
        return out

    def as_fake(self, value):
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value.detach()) if is_real else value

    def note_read(self, func) -> None:
        if self.capturing:
            raise RuntimeError(f"{func} reads a value while a CUDA graph is captured")
        ours = [
            f"{Path(file).name}:{line}"
            for file, line in frames()
            if Path(file).parent in (PROJECT, PROJECT / "parts")
        ]
        self.reads.append(ours[0] if ours else str(func))

    @contextlib.contextmanager
    def capture(self, graph, stream=None):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


def frames():
    """(file, line) of each call that is under way, the innermost first."""
    frame = sys._getframe()
    while frame:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def move(module: torch.nn.Module, device) -> torch.nn.Module:
    """In place of Module.to, which ties weights again only where .data can be set, and a fake
    cannot be set there.
    """
    moved = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in moved:
                moved[parameter] = torch.nn.Parameter(parameter.detach().to(device))
            part._parameters[name] = moved.get(parameter)
    return module


def pretend(gpu: FakeGPU, bf16: bool = True) -> contextlib.ExitStack:
    """A context in which torch says that it has this GPU."""
    stack = contextlib.ExitStack()
    cuda = dict(
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
    changes = [(torch.cuda, name, value) for name, value in cuda.items()]
    changes.append((torch.Tensor, "pin_memory", lambda tensor: tensor))
    if gpu.kind == "mps":
        changes = [
            (torch.backends.mps, "is_available", lambda: True),
            (torch.mps, "synchronize", lambda: None),
        ]
        math = (
            torch.ops.aten._scaled_dot_product_attention_math
        )  # the fused kernel is in builds for macOS only
        changes.append(
            (F, "scaled_dot_product_attention", lambda *args, **options: math(*args, **options)[0])
        )
    for change in [*changes, (torch.nn.Module, "to", move)]:
        stack.enter_context(mock.patch.object(*change))
    stack.enter_context(
        mock.patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())
    )
    # torch.tensor(..., device="cuda") shall make a CPU tensor and copy it, so that the copy passes
    # by here.
    torch._C._set_only_lift_cpu_tensors(True)
    stack.callback(torch._C._set_only_lift_cpu_tensors, False)
    stack.enter_context(gpu)
    return stack


# --------------------------------------------------------------------------------------------------
# The runs


def do(run, bf16: bool = True, kind: str = "cuda") -> dict:
    """Do one run on a GPU of its own. What is found:

    error         the traceback of what ended it, else None
    reads         [step, the lines of the reads since the step before] for each training step
    reads_after   how many reads came after the last step
    replays       how often a CUDA graph was replayed
    out           what was printed
    """

    gpu, reads, log, error, out = FakeGPU(kind), [], Log.__call__, None, io.StringIO()

    def noting(self, kind, step, **values):
        if kind == "train":
            reads.append((step, gpu.reads))
            gpu.reads = []
        return log(self, kind, step, **values)

    watched = mock.patch.object(Log, "__call__", noting)
    with (
        pretend(gpu, bf16),
        watched,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            run()
        except (Exception, SystemExit) as caught:
            error = f"{''.join(traceback.format_tb(caught.__traceback__))}{caught!r}"
        replays = torch.cuda.CUDAGraph().replay.call_count if kind == "cuda" else 0
    return dict(
        error=error, reads=reads, out=out.getvalue(), replays=replays, reads_after=len(gpu.reads)
    )


def main(kind: str, shards: str, tasks: str, folder: str) -> None:
    """Do all of its runs into the folder; the last line of the output is a JSON object of their
    results.
    """
    from conftest import toy_config

    import hellaswag
    import model
    import sample
    import train

    def training(name, **settings):
        watching = dict(
            eval_every=3, sample_every=3, sample_tokens=8, hellaswag_every=3, hellaswag_data=tasks
        )
        small = dict(
            n_layer=1, max_steps=3, checkpoint_every=2, total_batch_size=256, eval_tokens=256
        )
        config = toy_config(
            Path(shards), Path(folder) / name, **dict(device=kind) | watching | small | settings
        )
        return functools.partial(train.train, config)

    command = ["--model", f"{folder}/bf16", "--device", kind]
    prompts = [
        "-p",
        "the quick",
        "-p",
        "brown fox jumps",
        "--top_p",
        "0.9",
        "--repetition_penalty",
        "1.1",
    ]
    sampling = functools.partial(sample.main, [*command, "-m", "40", "--json", *prompts])
    scoring = functools.partial(hellaswag.main, [*command, "--data", tasks, "--json"])
    if kind == "mps":
        chosen = dict(device="auto", dtype="auto", batch_size="auto", compile="auto")
        runs = dict(
            bf16=training("bf16", dtype="bf16", dropout=0.1, recompute=True),
            fp32=training("fp32", **chosen),
        )
        results = {
            name: do(run, kind=kind)
            for name, run in dict(**runs, sample=sampling, hellaswag=scoring).items()
        }
        in_float64 = functools.partial(torch.ones, 2, dtype=torch.float64, device=kind)
        print(json.dumps(results | dict(float64=do(in_float64, kind=kind))))
        sys.stdout.flush()
        os._exit(0)

    results = {
        "bf16": do(training("bf16", dtype="auto", dropout=0.1, recompute=True)),
        "fp16": do(training("fp16", dtype="auto", optimizer="muon"), bf16=False),
        "fp32": do(training("fp32", flash=False, pad_vocab=False)),
        "muon": do(training("muon", dtype="auto", optimizer="muon")),
    }
    # fp16 resumed: the optimizer's and the scaler's state go to the GPU.
    shutil.rmtree(Path(folder) / "fp16" / "step_0000003", ignore_errors=True)
    results["resumed"] = do(training("fp16", dtype="auto", optimizer="muon"), bf16=False)

    results["sample"] = do(sampling)
    one_prompt = functools.partial(
        sample.main, [*command, "-m", "40", "-p", "the quick", "--temperature", "0"]
    )
    results["one prompt"] = do(one_prompt)
    results["hellaswag"] = do(scoring)

    # Too little memory is known before the first evaluation, which takes minutes.
    full = mock.patch.object(auto, "try_step", side_effect=torch.OutOfMemoryError("full"))
    with full, mock.patch.object(train, "evaluate", side_effect=AssertionError("evaluated")):
        results["full"] = do(training("full", checkpoint_every=0))

    # Broken on purpose.
    hidden, prefetch, step = model.GPT.hidden, data.prefetch, inference.forward_cached

    def with_targets_on_cpu(*args):
        return ((x, torch.zeros(y.shape, dtype=y.dtype)) for x, y in prefetch(*args))

    short = training("broken", checkpoint_every=0)
    with mock.patch.object(data, "prefetch", with_targets_on_cpu):
        results["targets on the CPU"] = do(short)
    with mock.patch.object(
        model.GPT, "hidden", lambda self, idx, *_: hidden(self, idx, torch.arange(idx.size(1)))
    ):
        results["positions on the CPU"] = do(short)
    with mock.patch.object(
        inference, "forward_cached", lambda *args: step(*args) * args[1].max().item()
    ):
        results["read in a graph"] = do(one_prompt)
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the GPU would abort the process at its end
