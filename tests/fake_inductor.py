"""What Inductor, torch.compile's compiler, would run on an H100, and in which order.

Nothing is generated or computed: the tensors are fake_cuda's, and Inductor stops once it has
decided which operations become one kernel and in which order kernels run. It reads internals of
torch 2.13.
"""

import contextlib
import types
from unittest import mock

from parts import loss

import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import scheduler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

H100 = types.SimpleNamespace(
    name="H100",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 10**9,
    L2_cache_size=50 * 2**20,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152,
)


def pretend_h100(fake: FakeTensorMode) -> contextlib.ExitStack:
    """A context in which Inductor believes that it compiles for an H100, with Triton installed."""
    stack = contextlib.ExitStack()
    for target, name, value in [
        (torch.utils._triton, "has_triton", lambda *_: True),
        (scheduler, "has_triton", lambda *_: True),
        (torch.cuda, "get_device_properties", lambda *_: H100),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: H100)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
        (CudaInterface, "Worker", mock.MagicMock()),
        (torch.compiler, "is_compiling", lambda: True),
    ]:
        stack.enter_context(mock.patch.object(target, name, value, create=True))
    stack.enter_context(fake)
    stack.enter_context(V.set_fake_mode(fake))
    stack.enter_context(tracing(TracingContext(fake)))
    return stack


def count_alive(graph: GraphLowering, numel: int) -> int:
    """The most buffers of at least so many numbers that are in memory at once."""
    sizes = {}
    for buffer in graph.buffers:
        shape = [int(length) for length in buffer.get_size()]
        sizes[buffer.get_name()] = torch.Size(shape).numel()

    first_use: dict[str, int] = {}
    last_use = {}
    for i, kernel in enumerate(graph.scheduler.nodes):
        for dependency in kernel.read_writes.reads_and_writes():
            # What overwrites a buffer has a name of its own.
            name = graph.scheduler.mutation_real_name.get(dependency.name, dependency.name)
            if sizes.get(name, 0) >= numel:
                first_use.setdefault(name, i)
                last_use[name] = i

    most = 0
    for i in range(len(graph.scheduler.nodes)):
        alive = [name for name in first_use if first_use[name] <= i <= last_use[name]]
        most = max(most, len(alive))
    return most


def count_logits_alive(n_chunks: int = 8) -> int:
    """In the head's loss of GPT-2 124M: how many chunks of logits are in memory at once.

    The tokens are n_chunks x 8,192 (loss.ROWS).
    """
    alive = []

    def look(graph_module, inputs):
        post_grad_passes(graph_module, is_inference=False)
        graph = GraphLowering(graph_module, inputs)
        with V.set_graph_handler(graph), V.set_debug_handler(mock.MagicMock()):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            alive.append(count_alive(graph, loss.ROWS * 50304))
        return graph_module

    def head(x, weight, targets):
        return loss.head_loss(x, weight, targets, 50257)

    fake = FakeTensorMode()
    with pretend_h100(fake):
        n_tokens = n_chunks * loss.ROWS
        x = torch.empty(n_tokens, 768, dtype=torch.bfloat16, device="cuda:0", requires_grad=True)
        weight = torch.empty(50304, 768, device="cuda:0", requires_grad=True)
        targets = torch.empty(n_tokens, dtype=torch.int64, device="cuda:0")
        compiled = aot_function(
            head,
            fw_compiler=look,
            bw_compiler=lambda graph_module, inputs: graph_module,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        compiled(x, weight, targets)
    return alive[0]
