"""Files that survive a crash: written whole, synced to the disk, locked, and hashed."""

if __name__ == "__main__":
    raise SystemExit("parts/files.py is no command: README.md lists the commands")

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, *content: bytes | memoryview) -> None:
    """Write a file atomically. A symbolic link of that name is replaced, not followed.

    After a kill or a crash, `path` holds its old content or all of the new content, never a part.
    OSError with the file's name if the disk is full.
    """
    # The temporary name is random, because two processes may write the same file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # The error of a full disk does not name the file, so it gets the name here.
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_is_file(path: Path) -> None:
    """ValueError for a folder, or for a pipe or device, which one might wait for without end."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a pipe or a device, not a file; copy its content into a file")


def delete_leftovers(path: Path) -> None:
    """Delete what killed processes have left of their attempts to write this file whole.

    Call it only where no other process can be writing the file, as under a lock.
    """
    for leftover in path.parent.glob(f"{path.name}.{'[0-9a-f]' * 8}.tmp"):
        delete(leftover)


def delete(path: Path) -> None:
    """Delete a file, a symbolic link (not its target), or a folder with all that is in it.

    What cannot be deleted stays, without an error.
    """
    try:
        path.unlink()
    except OSError:
        # A folder cannot be unlinked. rmtree leaves links and files alone.
        shutil.rmtree(path, ignore_errors=True)


def allow_open_files(n: int) -> None:
    """Let this process open `n` files more than usual, as far as the system's hard limit allows.

    The soft limit is often 1,024 (on a Mac 256), and a mapped file counts as an open one.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # a Mac has a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def fsync(path: Path) -> None:
    """Wait until the disk holds a file's content, or a folder's list of names."""
    is_file = path.is_file()
    if os.name == "nt" and not is_file:
        return  # Windows cannot sync a folder.
    # Windows syncs a file only through a descriptor that may write.
    descriptor = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. ValueError if it is no file."""
    check_is_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def lock(path: Path, message: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` inside a `with` block; the system releases it if the process dies.

    If another process holds the lock, raise ValueError(message), or wait if there is no message.
    """
    from filelock import FileLock, Timeout

    wait_forever = -1
    try:
        with FileLock(path, timeout=0 if message else wait_forever):
            yield
    except Timeout:
        raise ValueError(message) from None
