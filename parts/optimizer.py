"""From gradients to new weights: AdamW, SGD, or Muon for the matrices of the blocks."""

if __name__ == "__main__":
    raise SystemExit("parts/optimizer.py is no command: README.md lists the commands")

import inspect
from collections import Counter, defaultdict
from typing import NamedTuple, TypeVar, cast

from parts import GPT

import torch
import torch.nn as nn

T = TypeVar("T", bound=torch.optim.Optimizer)

# Muon (K. Jordan and others, 2024, kellerjordan.github.io/posts/muon): the coefficients of its
# polynomial.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Numbers that a GPU updates together: 134 MB of each temporary tensor in bf16.
NUMBERS_AT_ONCE = 2**26
# The norm of so many numbers is right to four digits on a CPU.
EXACT_NUMBERS = 2**20


def without_compiler(optimizer: type[T]) -> type[T]:
    """A class of torch.optim, without its import of torch.compile.

    torch keeps some methods of an optimizer out of compiled code. For that their first call imports
    all that compiles: 800 modules, which take a second or two and 75 MB. Only the model is compiled
    here, so the methods without torch's wrappers do the same.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        setattr(optimizer, name, inspect.unwrap(getattr(optimizer, name)))
    optimizer.step = torch.no_grad()(inspect.unwrap(optimizer.step))  # type: ignore[method-assign]
    return optimizer


@without_compiler
class SGD(torch.optim.SGD):
    """torch's."""


@without_compiler
class AdamW(torch.optim.AdamW):
    """torch's."""


def build_optimizer(model: GPT, config, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

    A group's learning rate is the schedule's times its `lr_ratio`. dtype: of matrix products on
    this machine.
    """
    lr = config.learning_rate
    betas = (config.beta1, config.beta2)
    if config.optimizer == "sgd":
        groups = make_groups(model, "sgd", lr, config.weight_decay)
        return SGD(groups, lr=lr, momentum=config.beta1, fused=config.fused)
    adamw = make_groups(model, "adamw", lr, config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(adamw, lr=lr, betas=betas, eps=1e-8, fused=config.fused)

    matrices = hidden_matrices(model)
    muon = dict(
        params=list(matrices),
        rule="muon",
        weight_decay=config.weight_decay,
        lr=config.muon_learning_rate,
        lr_ratio=config.muon_learning_rate / lr,
    )
    for group in adamw:
        group["params"] = [p for p in group["params"] if p not in matrices]
    return Muon(
        [muon, *adamw],
        splits=matrices,
        momentum=config.muon_momentum,
        dtype=dtype,
        lr=lr,
        betas=betas,
        eps=1e-8,
        fused=config.fused,
    )


def make_groups(model: GPT, rule: str, lr: float, weight_decay: float) -> list[dict]:
    """Two groups of all parameters: matrices and embeddings decay, biases and norms do not."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    shared = dict(rule=rule, lr=lr, lr_ratio=1.0)
    return [
        dict(params=decay, weight_decay=weight_decay, **shared),
        dict(params=no_decay, weight_decay=0.0, **shared),
    ]


def hidden_matrices(model: GPT) -> dict[nn.Parameter, tuple[int, ...]]:
    """The matrices that Muon updates: those of the linear layers in the blocks.

    For each, the rows of the matrices it consists of, which the model states where it makes the
    layer (model.Linear's `splits`).
    """
    matrices: dict[nn.Parameter, tuple[int, ...]] = {}
    for layer in model.transformer.h.modules():
        if isinstance(layer, nn.Linear):
            matrices[cast(nn.Parameter, layer.weight)] = getattr(
                layer, "splits", (layer.out_features,)
            )
    return matrices


def clip_gradients(
    parameters: list[nn.Parameter], max_norm: float, exact: bool = True
) -> torch.Tensor:
    """Scale all gradients down together if their norm is above max_norm. Returns the norm before.

    On a CPU, torch's norm of a large tensor is too small (by 0.27 % for GPT-2's token embedding),
    because it adds up tens of millions of squares in float32. The norm of the norms of the rows is
    right to seven digits. exact: take that one.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not exact or not gradients or gradients[0].device.type != "cpu":
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    norms = []
    for gradient in gradients:
        if gradient.numel() > EXACT_NUMBERS:
            gradient = torch.linalg.vector_norm(gradient, dim=-1)
        norms.append(torch.linalg.vector_norm(gradient))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if norm + 1e-6 > max_norm:  # torch adds so much; below, it would multiply by one
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def describe(optimizer: torch.optim.Optimizer) -> str:
    """The rules of a new optimizer in a line, with their parameters and peak learning rates."""
    sizes: Counter = Counter()
    for group in optimizer.param_groups:
        n_parameters = sum(parameter.numel() for parameter in group["params"])
        sizes[group["rule"], group["lr"]] += n_parameters
    rules = []
    for (rule, lr), size in sizes.items():
        rules.append(f"{rule} for {size:,} parameters, learning rate up to {lr:g}")
    return "; ".join(rules)


class Muon(AdamW):
    """Muon for the groups whose rule is "muon", AdamW for the others.

    To checkpoints and to GradScaler it is one optimizer. A matrix's update is its momentum with all
    singular values made about equal: the steepest descent for the change that a matrix can make to
    any input. An update of A x B is scaled by 0.2 sqrt(max(A, B)), which gives its elements the
    root mean square of AdamW's (Liu and others 2025, arXiv 2502.16982), so that one rate fits
    matrices of every shape.

    torch.optim.Muon does the same in bfloat16 only, which some CPUs compute slowly, and takes
    queries, keys and values for one matrix.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        splits: dict[nn.Parameter, tuple[int, ...]],
        momentum: float,
        dtype: torch.dtype,
        **adamw,
    ):
        """splits: for each of Muon's parameters, the rows of the matrices it consists of."""
        super().__init__(groups, **adamw)
        self.splits = splits
        self.momentum = momentum
        # On a GPU a kernel for many matrices takes little longer than one for a single matrix. On a
        # CPU each matrix is updated alone, while it is in the cache, and with the roundings of this
        # project's first versions: their runs stay the same to the last bit.
        self.stacked = any(parameter.device.type != "cpu" for parameter in splits)
        # A Gram matrix's elements are too small for fp16.
        self.dtype = torch.float32 if dtype == torch.float16 else dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        adamw_groups = []
        for group in self.param_groups:
            if group["rule"] != "muon":
                adamw_groups.append(group)
                continue
            for matrices in self.stacks(group["params"]):
                self.update(matrices, group["lr"], group["weight_decay"])
        all_groups = self.param_groups
        self.param_groups = adamw_groups
        try:
            super().step()
        finally:
            self.param_groups = all_groups

    def stacks(self, parameters: list[nn.Parameter]) -> list[list["Matrix"]]:
        """The matrices of these parameters, in lists of equal shapes that are updated together."""
        same_shape = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue  # the loss does not depend on it
            splits = self.splits[parameter]
            weights = parameter.split(splits)
            gradients = parameter.grad.split(splits)
            momenta = self.momentum_of(parameter).split(splits)
            for weight, gradient, momentum in zip(weights, gradients, momenta):
                same_shape[weight.shape].append(Matrix(weight, gradient, momentum))

        stacks = []
        for shape, matrices in same_shape.items():
            at_once = 1
            if self.stacked:
                at_once = max(1, NUMBERS_AT_ONCE // shape.numel())
            for first in range(0, len(matrices), at_once):
                stacks.append(matrices[first : first + at_once])
        return stacks

    def momentum_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The running mean of a parameter's gradient, zeros at first."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]

    def update(self, matrices: list["Matrix"], lr: float, weight_decay: float) -> None:
        """One step of matrices of one shape."""
        weights = [matrix.weight for matrix in matrices]
        gradients = [matrix.gradient for matrix in matrices]
        momenta = [matrix.momentum for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        # Nesterov: as if the next momentum were known.
        directions = torch._foreach_lerp(gradients, momenta, self.momentum)
        updates = orthogonalise(torch.stack(directions), self.dtype, fused=self.stacked)
        # Contiguous float32, as the weights are: torch adds such lists in one kernel.
        updates = updates.to(weights[0].dtype).contiguous()
        scale = 0.2 * max(weights[0].shape) ** 0.5
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates.unbind(), alpha=-lr * scale)


class Matrix(NamedTuple):
    """A matrix that Muon updates: views of a parameter, its gradient and its momentum."""

    weight: torch.Tensor
    gradient: torch.Tensor
    momentum: torch.Tensor


def orthogonalise(
    matrices: torch.Tensor, dtype: torch.dtype = torch.float32, fused: bool = False
) -> torch.Tensor:
    """U S Vᵀ -> about U Vᵀ, for matrices of shape (..., A, B): singular values become 0.7 to 1.2.

    Five Newton-Schulz iterations, products only. Each applies a s + b s^3 + c s^5 to every singular
    value s, with a steep slope at zero. Values below a thousandth of the matrix's norm stay
    smaller.

    fused: with the sums as part of the products, which halves the number of kernels; for (N, A, B).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT  # the Gram matrix of the shorter side is the smaller one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above 1 now
    for _ in range(5):
        gram = x @ x.mT
        if fused:
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        else:
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
