"""Small runs and a small tokenising that are killed at each call that changes the disk, or whose
calls fail one by one: tests/sweep.py does it, and says what it is.

Here five of the eight sweeps take a sample of the calls: of each kind, on each kind of file, the
first and the last. With REPRODUCE_SWEEP=all, all eight take every single one, in half an hour on
two cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
from conftest import clean_environment

SWEEP_ALL = os.environ.get("REPRODUCE_SWEEP") == "all"


@pytest.mark.torture
@pytest.mark.parametrize("how", ["kill", "fail"])
@pytest.mark.parametrize("work", ["train", "prepare", "resume", "anew"])
def test_every_call_that_changes_the_disk(work, how):
    command = [sys.executable, str(Path(sweep.__file__)), work, how]
    if SWEEP_ALL:
        command.append("--all")
    elif (work, how) in (("resume", "fail"), ("anew", "kill"), ("anew", "fail")):
        pytest.skip("these take minutes each: REPRODUCE_SWEEP=all")
    run = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    if run.returncode == sweep.CANNOT:
        pytest.skip(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["problems"] == 0 and result["trials"] >= 30


def test_a_sample_has_each_kind_of_call_first_and_last():
    calls = [sweep.Call("write", f"run/.step_{step}.tmp/x", n) for step in (2, 4) for n in (1, 2)]
    calls.append(sweep.Call("fsync", "run/.step_2.tmp/x", 1))
    assert sweep.choose(calls) == [calls[0], calls[2], calls[1], calls[3], calls[4]]
    assert {sweep.choose_error(calls[0], number) for number in range(9)} == set(
        sweep.ERRORS["write"]
    )
