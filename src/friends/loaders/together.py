"""Work that one process of a distributed training does for all of them.

The simplest way that is right: rank 0 makes the whole noise, the others wait for it and open the same folder. Waiting
in a barrier would end in a timeout when the noise takes long, so rank 0 says every few seconds that it is still at
it, and, if it fails, why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from friends.types import Progress

EVERY = 10.0
"""Seconds between two signs of life."""


def rank() -> int:
    """This process's place among those that train together; 0 if it is alone."""
    return dist.get_rank() if _in_group() else 0


def by_one(work: Callable[[Progress], Any], progress: Progress) -> Any:
    """What ``work`` returns in rank 0, in every rank. All of them must call this.

    Args:
        work: called in rank 0 with a progress to report to; what it returns must be plain values.
        progress: of the caller, told in rank 0.

    Raises:
        RuntimeError: in the other ranks, if rank 0 failed.
    """
    if not _in_group():
        return work(progress)
    if dist.get_rank() == 0:
        try:
            value = work(_Alive(progress))
        except BaseException as error:
            _say("failed", f"{type(error).__name__}: {error}")
            raise
        _say("done", value)
        return value
    while True:
        word, value = _hear()
        if word == "failed":
            raise RuntimeError(f"rank 0 could not make the friendly noise: {value}")
        if word == "done":
            return value


class _Alive:
    """A progress that also tells the other ranks, from time to time, to go on waiting."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._last = progress, time.monotonic()

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        self._progress(what, done, total, note)
        if time.monotonic() - self._last > EVERY:
            _say("working", None)
            self._last = time.monotonic()


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _say(word: str, value: Any) -> None:
    dist.broadcast_object_list([word, value], src=0)


def _hear() -> tuple[str, Any]:
    heard: list[Any] = [None, None]
    dist.broadcast_object_list(heard, src=0)
    return heard[0], heard[1]
