"""Files that survive a crash: written whole, synced to the disk, locked against a second process,
and hashed.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def write_whole(path: Path, *content: bytes | np.ndarray) -> None:
    """Write a file atomically: after a kill or a crash, `path` has the old content or the new,
    never a part of it.
    """
    temporary = path.with_name(
        f"{path.name}.{secrets.token_hex(4)}.tmp"
    )  # a random name: two processes may write
    try:
        with open(temporary, "wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # the error of a full disk does not name the file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def fsync(path: Path) -> None:
    """Make the disk hold what was written to a file, or a folder's list of names."""
    if os.name != "nt" or path.is_file():  # Windows cannot sync a folder
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def lock(path: Path, message: str = "") -> Iterator[None]:
    """Hold the lock file `path`, which a killed process releases. If another process holds it:
    ValueError(message), or wait for it where there is no message."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0 if message else -1):
            yield
    except Timeout:
        raise ValueError(message) from None
