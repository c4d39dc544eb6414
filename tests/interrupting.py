"""A stand-in for a kill: progress that stops the work at a chosen step."""

from __future__ import annotations

from friends.types import Progress


class Stop(Exception):  # noqa: N818
    """Raised where the process would have been killed."""


def stop_at(step: int, what: str = "training") -> Progress:
    """Progress that raises :class:`Stop` when ``what`` has done ``step`` steps."""

    def progress(name: str, done: int, total: int, note: str = "", /) -> None:
        if name == what and done == step:
            raise Stop

    return progress


def stop_at_call(count: int) -> Progress:
    """Progress that raises :class:`Stop` when it is told something for the ``count``-th time."""
    calls = 0

    def progress(name: str, done: int, total: int, note: str = "", /) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Stop

    return progress
