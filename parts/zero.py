"""ZeRO-1: each rank keeps the optimizer's state of some parameters and updates these.

Rajbhandari and others 2020, arXiv 1910.02054: the first of their three stages. Every rank still has
all weights and, from DistributedDataParallel, the whole average gradient, so all clip by the same
norm and skip the same steps. Then each one updates the parameters it owns, and broadcasts them. A
checkpoint has the state of all of them, in the same format as ever.
"""

if __name__ == "__main__":
    raise SystemExit("parts/zero.py is no command: README.md lists the commands")

import contextlib
from collections.abc import Iterator

from parts.runtime import Runtime

import torch

# The numbers that a rule keeps for each weight, float32.
NUMBERS_PER_WEIGHT = {"adamw": 2, "muon": 1, "sgd": 1}


class OptimizerShare:
    """The part of the optimizer that this rank has: all of it, or what it owns of a shared one."""

    def __init__(self, optimizer: torch.optim.Optimizer, machine: Runtime, shared: bool):
        """shared: among the ranks of the group. A process alone has all of it."""
        self.optimizer = optimizer
        self.machine = machine
        self.shared = shared and machine.world_size > 1
        self.parameters: list[torch.Tensor] = []
        for group in optimizer.param_groups:
            self.parameters += group["params"]
        n_owners = machine.world_size if self.shared else 1
        self.owner = assign_owners(optimizer, n_owners)

    def owns(self, parameter: torch.Tensor) -> bool:
        return not self.shared or self.owner[parameter] == self.machine.rank

    def state_bytes(self) -> int:
        """What the state will take on this rank, in bytes."""
        n_numbers = 0
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if self.owns(parameter):
                    n_numbers += NUMBERS_PER_WEIGHT[group["rule"]] * parameter.numel()
        return 4 * n_numbers

    def note(self) -> str:
        """The end of a line: how the state is shared out; empty if it is not."""
        if not self.shared:
            return ""
        return f"; its state is shared out among {self.machine.world_size} processes"

    # ---- A step ----------------------------------------------------------------------------------

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update the weights from the gradients, the same on all ranks, which all call this."""
        with self.own_parameters():
            scaler.step(self.optimizer)
        if not self.shared:
            return
        for rank in range(self.machine.world_size):
            owned = [parameter for parameter in self.parameters if self.owner[parameter] == rank]
            self.machine.broadcast_tensors(owned, rank)

    @contextlib.contextmanager
    def own_parameters(self) -> Iterator[None]:
        """Within it, the optimizer's groups have only the parameters that this rank owns."""
        all_parameters = [group["params"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if self.owns(parameter)]
        try:
            yield
        finally:
            for group, parameters in zip(self.optimizer.param_groups, all_parameters):
                group["params"] = parameters

    # ---- Checkpoints -----------------------------------------------------------------------------

    def load(self, state: dict) -> None:
        """Take what this rank owns from the state of all parameters (index -> values)."""
        if self.shared:
            own_state = {}
            for index, parameter in enumerate(self.parameters):
                if self.owns(parameter) and index in state:
                    own_state[index] = copy_to_cpu(state[index])
            state = own_state
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(dict(state=state, param_groups=groups))

    def collect(self, live: bool = False) -> dict:
        """The state of all parameters, copied to the main rank's CPU; empty on the other ranks.

        All ranks call it. They send a tensor at a time, so that no GPU has more than its own state
        and one tensor of another's. live: the state itself, not a copy; only if it is not shared
        out, and on the CPU.
        """
        own_state = self.optimizer.state_dict()["state"]
        if live:
            assert not self.shared
            return own_state if self.machine.is_main else {}
        if not self.shared:
            if not self.machine.is_main:
                return {}
            return {index: copy_to_cpu(values) for index, values in own_state.items()}

        # What is small travels at once: numbers as they are, and of each tensor the shape.
        outline: dict[int, dict] = {}
        for index, values in own_state.items():
            outline[index] = {}
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    value = value.shape if value.dim() else value.cpu()
                outline[index][name] = value
        outlines = self.machine.gather(outline)
        if not self.machine.is_main:
            for index, values in outline.items():
                for name, value in values.items():
                    if isinstance(value, torch.Size):
                        self.machine.send(own_state[index][name])
            return {}

        collected = {}
        for rank, outline in enumerate(outlines):
            for index, values in outline.items():
                if rank == self.machine.rank:
                    collected[index] = copy_to_cpu(own_state[index])
                    continue
                for name, value in values.items():
                    if isinstance(value, torch.Size):
                        values[name] = self.machine.receive(value, rank).cpu()
                collected[index] = values
        return dict(sorted(collected.items()))


def assign_owners(optimizer: torch.optim.Optimizer, n_ranks: int) -> dict[torch.Tensor, int]:
    """The rank that owns each parameter, the same on all ranks.

    The largest state first, each to the rank that has the least so far.
    """
    sizes: dict[torch.Tensor, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            sizes[parameter] = NUMBERS_PER_WEIGHT[group["rule"]] * parameter.numel()
    owner = {}
    loads = [0] * n_ranks
    for parameter in sorted(sizes, key=lambda parameter: -sizes[parameter]):
        rank = loads.index(min(loads))
        owner[parameter] = rank
        loads[rank] += sizes[parameter]
    return owner


def copy_to_cpu(values: dict) -> dict:
    """The state of a parameter with its tensors copied to the CPU."""
    copies = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            value = value.to("cpu", copy=True)
        copies[name] = value
    return copies
