"""The C files of parts/, compiled where they are first needed, and kept in the user's cache.

They do what torch has no fast operation for. Where there is no GCC, there are no such functions,
and torch does the work.
"""

if __name__ == "__main__":
    raise SystemExit("parts/compiler.py is no command: README.md lists the commands")

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent

COMPILE = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-c"]
# Without -fopenmp: the functions' threads are then those of the OpenMP that torch has loaded, and
# not of a second one beside it.
LINK = ["-shared", "-nostartfiles", "-lm"]


def load_library(name: str) -> ctypes.CDLL | None:
    """The functions of parts/NAME.c, compiled for this CPU if they were not yet.

    None where they cannot be had.
    """
    compiler = shutil.which("gcc")
    # Elsewhere torch has another OpenMP.
    if sys.platform != "linux" or compiler is None:
        return None
    try:
        library = cache_folder() / f"{name}-{fingerprint(name)}.so"
        if not library.exists():
            compile_library(compiler, name, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # Path.home() may not be known
        return None


def cache_folder() -> Path:
    """Where the user's programs keep what they can make again."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "reproduce-gpt2"


def fingerprint(name: str) -> str:
    """What the library depends on: its source, how it is compiled, and the CPU, because several
    machines may share a home folder.
    """
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features", "model name")):
            cpu += line
        if not line:
            break  # the first CPU is described
    facts = [cpu, *COMPILE, *LINK]
    for source in (SOURCES / f"{name}.c", *sorted(SOURCES.glob("*.h"))):
        facts.append(source.read_text())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def compile_library(compiler: str, name: str, library: Path) -> None:
    """Compile the library, which takes a second. OSError or SubprocessError if it fails."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        object_file = Path(folder) / "object.o"
        linked = Path(folder) / "library.so"
        commands = [
            [compiler, *COMPILE, str(SOURCES / f"{name}.c"), "-o", str(object_file)],
            [compiler, str(object_file), *LINK, "-o", str(linked)],
        ]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        os.replace(linked, library)  # two programs may compile it at once
