"""The device, the group of processes, and the memory."""

import ctypes
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from parts import runtime
from parts.runtime import choose_device

import pytest
import torch
from conftest import clean_environment

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


# ---- The device ----------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this machine has GPUs: how many, their name and their compute capability. Its
    PyTorch has kernels from the T4 (7.5) on.
    """

    def pretend(count: int, name: str = "NVIDIA A100-SXM4-80GB", capability=(8, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(
            torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"]
        )

    return pretend


def test_a_gpu_is_taken_where_there_is_one(gpus):
    gpus(0)
    assert choose_device("auto")[0] == CPU
    gpus(2)
    second = torch.device("cuda", 1)
    assert choose_device("auto", world_size=2, local_rank=1, local_size=2)[0] == second
    assert choose_device("cuda:1")[0] == second
    assert choose_device("cpu")[0] == CPU


def test_devices_that_are_not_there(gpus):
    gpus(0)
    for setting, message in (
        ("cuda", "sees no CUDA GPU here; use --device=cpu"),
        ("gpu", "not a device; use auto, cpu, cuda, cuda:1 or mps"),
        ("meta", "not a device"),
        ("cpu:3", "not a device"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_device(setting)
    gpus(1)
    with pytest.raises(ValueError, match="device=cuda:1: GPUs on this machine, counted from 0: 1"):
        choose_device("cuda:1")
    for rank in (0, 1):
        with pytest.raises(
            ValueError, match="2 processes, but GPUs on this machine: 1; use --nproc_per_node=1"
        ):
            choose_device("auto", world_size=2, local_rank=rank, local_size=2)


def test_a_gpu_that_pytorch_cannot_use_is_an_error_and_not_a_slow_run(gpus, monkeypatch):
    """If the driver is too old, `auto` would train on the CPU. If the GPU is too old, its first
    kernel would fail.
    """
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(runtime.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    with pytest.raises(
        ValueError, match=r"for CUDA 13.0 cannot use this GPU; install a newer driver"
    ):
        choose_device("auto")
    assert choose_device("cpu")[0] == CPU
    gpus(1, "Tesla V100-SXM2-16GB", capability=(7, 0))
    with pytest.raises(ValueError, match=r"V100.* has compute capability 7.0, .* from 7.5 on"):
        choose_device("auto")
    gpus(1, "Tesla T4", capability=(7, 5))
    assert choose_device("auto")[0] == CUDA


def test_peak_flops_by_name(gpus):
    gpus(1)
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
    ):
        gpus(1, name)
        assert runtime.Runtime(CUDA).peak_flops() == peak
    assert runtime.Runtime(CPU).peak_flops() is None


# ---- Computing, and the group --------------------------------------------------------------------


def test_products_are_computed_in_the_dtype_of_autocast():
    machine = runtime.Runtime(CPU)
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with machine.autocast(dtype):
            assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_a_process_alone_waits_for_nobody():
    """Nothing of torch.distributed is set up, and nothing is asked of it."""
    machine = runtime.start("cpu")
    assert machine.is_main
    assert machine.max(3) == 3
    assert machine.broadcast("text") == "text"
    machine.barrier()
    machine.wait_at_most(1)
    machine.close()


def test_restarts_over_several_machines_need_a_store_for_each(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(runtime, "rendezvous", lambda url: iter([(store, 0, 1)]))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(
        ValueError, match="put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
    ):
        runtime.meeting_place(world_size=4, local_size=2)
    assert isinstance(runtime.meeting_place(2, 2), torch.distributed.PrefixStore)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert isinstance(runtime.meeting_place(4, 2), torch.distributed.HashStore)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert isinstance(runtime.meeting_place(4, 2), torch.distributed.HashStore)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_glibc_is_told_to_keep_what_is_freed(monkeypatch):
    """Nothing is to be mapped or trimmed. glibc answers 1 to what it accepts."""
    mallopt = ctypes.CDLL(None).mallopt
    told = {}

    def spy(name: int, value: int) -> None:
        answer = mallopt(name, value)
        told[name] = (value, answer)

    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=spy))
    runtime.start("cpu")
    assert told == {-4: (0, 1), -1: (-1, 1)}

    # Another C library has no such function.
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: SimpleNamespace())
    runtime.start("cpu")


LARGE_PAGES = """
import resource, sys
import torch
from parts import runtime
if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
runtime.start("cpu", large_pages=True)
tensors = [torch.ones(2**20) for _ in range(32)]
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("AnonHugePages"):
        print(line.split()[1])
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    or platform.libc_ver()[0] != "glibc",
    reason="no large pages here",
)
def test_tensors_lie_in_large_pages():
    """128 MB of tensors, except where addresses are limited."""
    environment = clean_environment()
    kilobytes = []
    for arguments in ([], ["limited"]):
        command = [sys.executable, "-c", LARGE_PAGES, *arguments]
        output = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        kilobytes.append(int(output))
    if "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        kilobytes[1] = 0  # they come unasked
    assert kilobytes[0] > 100_000 and kilobytes[1] < 10_000


@pytest.mark.parametrize(
    "limit, overcommit, counted", [(-1, "0", False), (10, "0", True), (-1, "2", True)]
)
def test_where_addresses_are_counted(limit, overcommit, counted, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(runtime.Path, "read_text", lambda path: overcommit)
    assert runtime.addresses_are_counted() == counted


def test_a_sandbox_without_proc_sys_trains_as_well(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(runtime.Path, "read_text", missing)
    assert runtime.start("cpu", large_pages=True).device == CPU


def test_a_left_over_world_size_is_said_within_seconds(monkeypatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with runtime.say_if_waiting(rank=0, world_size=2, seconds=0.01):
        time.sleep(0.3)
    line = capfd.readouterr().err
    assert "rank 0 waits at 10.0.0.1:29500 for the others of WORLD_SIZE=2 processes" in line
    assert "to run alone: unset WORLD_SIZE RANK" in line
    with runtime.say_if_waiting(rank=0, world_size=2, seconds=60):
        pass
    assert capfd.readouterr().err == ""
