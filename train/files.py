"""Files that are there whole or not at all, what tells one from another, and folders that one process has to itself. On the
lowest floor of training: knows neither data nor runs."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, flush: bool = True) -> None:
    """Call ``write`` with a binary file that takes the place of ``path`` only when everything is on the disk.

    Without ``flush`` the disk may still be at it, for a caller that writes thousands of files and flushes them at once.
    """
    part = path.with_name(f".{path.name}.part")  # one name a target: what a crash leaves is overwritten, never piled up
    try:
        with part.open("wb") as file:
            write(file)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if flush:
        flush_folder(path.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Inside, no other process is: a lock of the system, which ends with the process, or with the last one that was given the
    descriptor this yields. Only POSIX has it for folders. BlockingIOError when another process is there."""
    if os.name != "posix":
        yield None
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another call is at work in {folder}; wait for it") from None
        except OSError:
            pass  # a disk without locks
        yield descriptor
    finally:
        os.close(descriptor)
