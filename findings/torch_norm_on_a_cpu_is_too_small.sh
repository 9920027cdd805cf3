#!/bin/sh
# torch's norm of a large float32 tensor is too small on a CPU: it adds up tens of millions of
# squares in float32. For the 38.6 million numbers of GPT-2's token embedding, and so for their
# gradient, 0.27 %. clip_grad_norm_ then clips by another factor than on a GPU. The norm of the norms
# of the rows is right.
# Exits non-zero if the behaviour has changed.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" torch==2.13.0
PYTHONPATH=$site "$PYTHON" - <<'END'
import torch

torch.manual_seed(0)
gradient = torch.randn(50304, 768) * 1e-4
right = gradient.double().norm().item()
parameter = torch.nn.Parameter(torch.empty(50304, 768))
parameter.grad = gradient
norms = {
    "vector_norm": torch.linalg.vector_norm(gradient).item(),
    "clip_grad_norm_": torch.nn.utils.clip_grad_norm_([parameter], 1e9).item(),
    "of the norms of the rows": torch.linalg.vector_norm(
        torch.linalg.vector_norm(gradient, dim=-1)
    ).item(),
}
errors = {name: norm / right - 1 for name, norm in norms.items()}
print(torch.__version__, {name: f"{100 * error:.5f} %" for name, error in errors.items()})
assert errors["vector_norm"] < -0.002 and errors["clip_grad_norm_"] < -0.002
assert abs(errors["of the norms of the rows"]) < 1e-5
END
