"""Bad input: each is answered by exit code 2 and a line that says what and where, never by a
traceback or by waiting.
"""

import subprocess
import sys
from pathlib import Path

from conftest import clean_environment

ROOT = Path(__file__).parent.parent


# ---- A machine that gives too little -------------------------------------------------------------


def run(command: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """A line of shell in which $PY is Python and $ROOT this project."""
    environment = clean_environment(PY=sys.executable, ROOT=str(ROOT))
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_worker_that_cannot_start_ends_those_that_have(tmp_path):
    """With 20 open files, the first worker starts and the second one cannot."""
    (tmp_path / "t.txt").write_text("word " * 1000)
    ended = run("ulimit -n 20; $PY $ROOT/prepare.py t.txt --out x --workers 2", tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "Too many open files" in ended.stderr and "Traceback" not in ended.stderr
