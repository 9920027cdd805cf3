"""The system Windows, as far as Linux can play it: what it lacks is missing, and what it refuses is
refused.

    python tests/fake_windows.py '[["prepare", "tale.txt", ...], ["train", ...]]'

runs the main of each script in turn. sys.platform and os.name stay as they are for the libraries,
which would break. So filelock's locks on Windows are not tested.
"""

import ctypes
import errno
import fcntl
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

PROJECT = Path(__file__).parent.parent

MODULES = "fcntl resource readline termios tty pty pwd grp".split()
OS_NAMES = """
    fork forkpty getuid geteuid getgid getpgid killpg setsid sched_getaffinity nice
""".split()
SIGNAL_NAMES = """
    SIGUSR1 SIGUSR2 SIGHUP SIGKILL SIGQUIT SIGALRM SIGCHLD SIGPIPE SIGSTOP
    pthread_sigmask pthread_kill sigwait alarm setitimer
""".split()
F_GETFL = 3  # of fcntl: returns how a file was opened


class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        super().__init__(name, *args, **kwargs)


def in_use(path) -> bool:
    """Whether this process has the file, or a file in the folder, open or mapped into memory."""
    path = os.path.realpath(path)
    names = set()
    for number in os.listdir("/proc/self/fd"):
        if os.path.islink(f"/proc/self/fd/{number}"):
            names.add(os.readlink(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            names.add(line.rstrip("\n").split(maxsplit=5)[-1])
    return any(name == path or name.startswith(path + os.sep) for name in names)


def refuse_files_in_use(function, replaces: bool = True):
    """Wrap os.unlink, os.rename or os.replace: it fails for files in use.

    With replaces=False, it also fails if the second path exists.
    """

    def wrapped(*paths, **kwargs):
        for path in paths:
            if not str(path).startswith("/dev/") and in_use(path):
                raise PermissionError(errno.EACCES, "the file is in use", str(path))
        if not replaces and os.path.lexists(paths[1]):
            raise FileExistsError(errno.EEXIST, "there is one", str(paths[1]))
        return function(*paths, **kwargs)

    return wrapped


def install() -> None:
    """Change os, signal and ctypes, and take the modules away. Call it before other imports."""
    get_flags = fcntl.fcntl
    for module in MODULES:
        sys.modules[module] = None
    for name in OS_NAMES:
        delattr(os, name)
    for name in SIGNAL_NAMES:
        delattr(signal, name)

    open_file = os.open
    fsync = os.fsync

    def open_no_folder(path, *args, **kwargs):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    def fsync_what_is_writable(descriptor):
        if get_flags(descriptor, F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    os.open = open_no_folder
    os.fsync = fsync_what_is_writable
    os.cpu_count = lambda: 128
    os.unlink = refuse_files_in_use(os.unlink)
    os.replace = refuse_files_in_use(os.replace)
    os.rename = refuse_files_in_use(os.rename, replaces=False)
    ctypes.CDLL = CDLL


def main(commands: list[list[str]]) -> None:
    names = [path.stem for path in PROJECT.glob("*.py")]
    names += [f"parts.{path.stem}" for path in PROJECT.glob("parts/*.py")]
    modules = [importlib.import_module(name) for name in names]
    # Only the project's own modules see the name of Windows.
    windows_os = SimpleNamespace(**vars(os))
    windows_os.name = "nt"
    for module in modules:
        if hasattr(module, "os"):
            module.os = windows_os
    for script, *arguments in commands:
        print(f"== {script}", flush=True)
        sys.modules[script].main(arguments)


if __name__ == "__main__":
    assert not {"shutil", "torch", "numpy"} & set(sys.modules), "they keep functions of os"
    install()
    main(json.loads(sys.argv[1]))
