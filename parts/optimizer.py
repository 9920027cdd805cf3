"""From gradients to new weights: AdamW, SGD, or Muon for the matrices of the blocks."""

from collections import Counter

import torch

from parts import GPT

# Muon (K. Jordan and others, 2024, kellerjordan.github.io/posts/muon): the coefficients of its
# polynomial.
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def build_optimizer(model: GPT, config, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer that the settings name. A group's learning rate is the schedule's times its
    `lr_ratio`.

    dtype: of matrix products on this machine.
    """
    decay, no_decay = model.param_groups(config.weight_decay)
    groups, lr, betas = [decay, no_decay], config.learning_rate, (config.beta1, config.beta2)
    for group in groups:
        group |= dict(rule="sgd" if config.optimizer == "sgd" else "adamw", lr=lr, lr_ratio=1.0)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.beta1, fused=config.fused)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=config.fused)
    muon = decay | dict(
        rule="muon", lr=config.muon_learning_rate, lr_ratio=config.muon_learning_rate / lr
    )
    muon["params"] = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    matrices = set(muon["params"])
    decay["params"] = [p for p in decay["params"] if p not in matrices]
    return Muon(
        [muon, *groups],
        config.muon_momentum,
        dtype,
        lr=lr,
        betas=betas,
        eps=1e-8,
        fused=config.fused,
    )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """The rules of a new optimizer, with the number of their parameters and the peak learning rate,
    in a line.
    """
    sizes = Counter()
    for group in optimizer.param_groups:
        sizes[group["rule"], group["lr"]] += sum(parameter.numel() for parameter in group["params"])
    words = [
        f"{rule} for {size:,} parameters, learning rate up to {lr:g}"
        for (rule, lr), size in sizes.items()
    ]
    return "; ".join(words)


class Muon(torch.optim.AdamW):
    """Muon for the groups whose rule is "muon", AdamW for the others: to checkpoints and GradScaler
    one optimizer.

    A matrix's update is its momentum with all singular values made about equal: the steepest
    descent for the change that a matrix can make to any input. An update of A x B is scaled by 0.2
    sqrt(max(A, B)), which gives its elements the root mean square of AdamW's (Liu and others 2025,
    arXiv 2502.16982), so a rate fits matrices of every shape.

    torch.optim.Muon does the same in bfloat16 only, which some CPUs compute slowly, and takes
    queries, keys and values for one matrix.
    """

    def __init__(self, groups: list[dict], momentum: float, dtype: torch.dtype, **adamw):
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self.dtype = (
            torch.float32 if dtype == torch.float16 else dtype
        )  # a Gram matrix's elements are too small there

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"] if group["rule"] == "muon" else ():
                self.update(parameter, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if group["rule"] != "muon"]
        super().step()
        self.param_groups = groups

    def update(self, parameter: torch.Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            # AdamW looks for "step" in every state that it loads.
            state |= dict(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
        average = state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        ahead = parameter.grad.lerp(
            average, self.momentum
        )  # Nesterov: as if the next average were known
        rows, columns = parameter.shape
        if rows == 3 * columns:  # queries, keys and values: three matrices in one
            ahead = ahead.view(3, columns, columns)
        update = orthogonalise(ahead, self.dtype)
        scale = 0.2 * max(update.shape[-2:]) ** 0.5
        parameter.mul_(1 - lr * weight_decay).add_(update.reshape(rows, columns), alpha=-lr * scale)


def orthogonalise(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """U S V^T -> about U V^T, for matrices of shape (..., A, B): the singular values become 0.7 to
    1.2.

    Five Newton-Schulz iterations, products only. Each applies a s + b s^3 + c s^5 to every singular
    value s, with a steep slope at zero. Values below a thousandth of the matrix's norm stay
    smaller.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # the Gram matrix of the shorter side is the smaller one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above 1 now
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
