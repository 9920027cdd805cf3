"""Windows as far as Linux can play it: what is missing there is missing, what is refused there is
refused.

    python tests/fake_windows.py '[["prepare", "tale.txt", ...], ["train", ...]]'

runs the main of each script in turn. The libraries see what is missing, but no other sys.platform
or os.name, which they could not stand. So filelock's locks on Windows are not tested.
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

MODULES = ("fcntl", "resource", "readline", "termios", "tty", "pty", "pwd", "grp")
OS = (
    "fork",
    "forkpty",
    "getuid",
    "geteuid",
    "getgid",
    "getpgid",
    "killpg",
    "setsid",
    "sched_getaffinity",
    "nice",
)
SIGNALS = (
    "SIGUSR1",
    "SIGUSR2",
    "SIGHUP",
    "SIGKILL",
    "SIGQUIT",
    "SIGALRM",
    "SIGCHLD",
    "SIGPIPE",
    "SIGSTOP",
)
SIGNALS = (*SIGNALS, "pthread_sigmask", "pthread_kill", "sigwait", "alarm", "setitimer")


class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        super().__init__(name, *args, **kwargs)


def in_use(path) -> bool:
    """Whether this process has the file, or a file in the folder, open or mapped into its
    memory.
    """
    path, names = os.path.realpath(path), set()
    for number in os.listdir("/proc/self/fd"):
        if os.path.islink(f"/proc/self/fd/{number}"):
            names.add(os.readlink(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        names |= {line.rstrip("\n").split(maxsplit=5)[-1] for line in maps}
    return any(name == path or name.startswith(path + os.sep) for name in names)


def refusing(function, there_is_none=False):
    """os.unlink, os.rename or os.replace, which fail for files in use. os.rename replaces
    nothing.
    """

    def wrapped(*paths, **kwargs):
        for path in paths:
            if not str(path).startswith("/dev/") and in_use(path):
                raise PermissionError(errno.EACCES, "the file is in use", str(path))
        if there_is_none and os.path.lexists(paths[1]):
            raise FileExistsError(errno.EEXIST, "there is one", str(paths[1]))
        return function(*paths, **kwargs)

    return wrapped


def install() -> None:
    flags_of, open_file, fsync = fcntl.fcntl, os.open, os.fsync
    sys.modules.update(dict.fromkeys(MODULES))
    for module, names in ((os, OS), (signal, SIGNALS)):
        for name in names:
            delattr(module, name)

    def open_no_folder(path, *args, **kwargs):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    def fsync_what_is_writable(descriptor):
        if flags_of(descriptor, 3) & os.O_ACCMODE == os.O_RDONLY:  # 3: F_GETFL
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    os.open, os.fsync, os.cpu_count, ctypes.CDLL = (
        open_no_folder,
        fsync_what_is_writable,
        lambda: 128,
        CDLL,
    )
    os.unlink, os.replace, os.rename = (
        refusing(os.unlink),
        refusing(os.replace),
        refusing(os.rename, True),
    )


def main(commands: list[list[str]]) -> None:
    names = [path.stem for path in PROJECT.glob("*.py")] + [
        f"parts.{path.stem}" for path in PROJECT.glob("parts/*.py")
    ]
    for name in names:
        importlib.import_module(name)
    windows_os = SimpleNamespace(**vars(os) | dict(name="nt"))
    for name in names:
        if hasattr(module := sys.modules[name], "os"):
            module.os = windows_os
    for script, *arguments in commands:
        print(f"== {script}", flush=True)
        sys.modules[script].main(arguments)


if __name__ == "__main__":
    assert not {"shutil", "torch", "numpy"} & set(sys.modules), "they keep functions of os"
    install()
    main(json.loads(sys.argv[1]))
