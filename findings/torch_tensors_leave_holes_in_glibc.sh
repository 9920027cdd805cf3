#!/bin/sh
# A tensor that is freed between two others leaves a hole that no tensor of its size can use, on a
# CPU with glibc 2.36: torch asks for addresses that are multiples of 64, and for these glibc takes
# a block that is larger than the tensor and gives the ends back. So the hole, which is as large as
# the tensor, is too small for the next one. numpy's arrays have no such wish, and use every hole.
# A training step of GPT-2 124M has 0.4 GB of such gaps.
# Needs Linux with glibc 2.36. Exits non-zero if the behaviour has changed, or with another glibc.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" torch==2.13.0 numpy==2.4.6
PYTHONPATH=$site "$PYTHON" - <<'END'
import platform

import numpy as np
import torch

ROUNDS = 20


def share_of_holes_used(make, address, n_bytes):
    used = 0
    for _ in range(ROUNDS):
        blocks = [make(n_bytes) for _ in range(9)]
        holes = {address(blocks[i]) for i in (1, 3, 5, 7)}
        blocks = blocks[::2]
        new = [make(n_bytes) for _ in range(4)]
        used += sum(address(block) in holes for block in new)
        del new, blocks
    return used / (4 * ROUNDS)


first = torch.empty(30 << 20, dtype=torch.uint8)
del first  # from now on, glibc takes blocks of this size from the heap instead of mapping them
libc, version = platform.libc_ver()
print(f"torch {torch.__version__}, numpy {np.__version__}, {libc} {version}")
for n_bytes in (1 << 20, 5 << 20, 20 << 20):
    tensors = share_of_holes_used(
        lambda n: torch.empty(n, dtype=torch.uint8), torch.Tensor.data_ptr, n_bytes
    )
    arrays = share_of_holes_used(
        lambda n: np.empty(n, np.uint8), lambda array: array.ctypes.data, n_bytes
    )
    print(f"{n_bytes:10,} bytes: of the holes, tensors use {tensors:.3f}, arrays {arrays:.3f}")
    assert tensors < 0.2 and arrays > 0.8
assert (libc, version) == ("glibc", "2.36"), "shown with glibc 2.36 only"
END
