"""One process at a time: a lock on a file, which ends with the process however that ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

_HELD: dict[Path, int] = {}
"""Locks that this process holds, and the threads that hold them."""


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[float], None], *, poll: float = 0.2) -> Generator[bool]:
    """Hold the lock of a file, which is removed afterwards; wait for whoever holds it.

    Args:
        path: the file; its folder is made.
        waiting: told for how many seconds it has been waited, every ``poll`` seconds.
        poll: seconds between two attempts.

    Yields:
        Whether there is a lock at all: some network file systems, and Windows, have none that ends with its process.

    Raises:
        RuntimeError: this thread holds the lock already and would wait for itself for ever.
    """
    path = path.absolute()
    if _HELD.get(path) == threading.get_ident():
        raise RuntimeError(f"{path.name} is being made already by this very thread: an artifact cannot be part of "
                           "itself")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    while (handle := _try(path)) is None:
        waiting(time.monotonic() - begun)
        time.sleep(poll)
    _HELD[path] = threading.get_ident()
    try:
        yield handle >= 0
    finally:
        _HELD.pop(path, None)
        if handle >= 0:
            path.unlink(missing_ok=True)  # while it is held: see _try
            os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock of a file just now."""
    if not path.exists():
        return False
    handle = _try(path)
    if handle is None:
        return True
    if handle >= 0:
        path.unlink(missing_ok=True)
        os.close(handle)
    return False


def _try(path: Path) -> int | None:
    """An open file with its lock; ``None`` if another holds it; -1 if there are no locks here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return -1
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have removed the file between the two lines: then the lock is one that nobody else sees.
        current = os.stat(path).st_ino == os.fstat(handle).st_ino
    except BlockingIOError:
        os.close(handle)
        return None
    except FileNotFoundError:
        current = False
    except OSError:  # a file system that cannot lock
        os.close(handle)
        return -1
    if current:
        return handle
    os.close(handle)
    return None
