#!/bin/sh
# A program that never compiles imports all of torch.compile, 800 modules and 75 MB, when it makes
# an optimizer: torch keeps the optimizer's methods out of compiled code, and imports the compiler
# to do so when they are first called. Three other calls do the same, among them one that switches
# determinism off where it is off.
# Exits non-zero if the behaviour has changed.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" torch==2.13.0
try() {
    PYTHONPATH=$site "$PYTHON" - "$1" <<'END'
import sys
import time

import torch

weight = torch.nn.Parameter(torch.ones(2))


def backward():
    (weight * weight).sum().backward()


def optimizer():
    torch.optim.AdamW([weight])


def no_determinism():
    torch.use_deterministic_algorithms(False)


def gradient_of_a_vector():
    torch.autograd.grad(weight * weight, weight, torch.ones(2))


def own_operation():
    @torch.library.custom_op("finding::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double(weight.detach())


def resident_mb():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 1e6


what = sys.argv[1]
modules, memory, start = len(sys.modules), resident_mb(), time.perf_counter()
globals()[what]()
seconds = time.perf_counter() - start
more = len(sys.modules) - modules
print(
    f"torch {torch.__version__}, {what}: {more} modules more, "
    f"{resident_mb() - memory:.0f} MB, {seconds:.2f} s"
)
assert more == 0 if what == "backward" else more > 400
END
}
for call in backward optimizer no_determinism gradient_of_a_vector own_operation; do
    try $call
done
