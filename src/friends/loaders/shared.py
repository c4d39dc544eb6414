"""What a training tells its data set, in memory that worker processes share: the epoch, a pause, where the noise is.

Workers get a copy of the data set when they start, and persistent workers start once. An attribute that is set later
would never reach them; numbers in shared memory do, whatever the start method.
"""

from __future__ import annotations

import torch

EPOCH, PAUSED, CHANGES, RANK = range(4)
LONGEST = 4096
"""Bytes that the path of a store may have."""


class Shared:
    """The numbers that all processes of one training see."""

    def __init__(self) -> None:
        self._numbers = torch.tensor([-1, 0, 0, 0]).share_memory_()
        self._path = torch.zeros(LONGEST, dtype=torch.uint8).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch in training; -1 outside of epochs."""
        return int(self._numbers[EPOCH])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._numbers[EPOCH] = value

    @property
    def paused(self) -> int:
        """How many pauses are open."""
        return int(self._numbers[PAUSED])

    @paused.setter
    def paused(self, value: int) -> None:
        self._numbers[PAUSED] = value

    @property
    def rank(self) -> int:
        """This process's place in distributed training."""
        return int(self._numbers[RANK])

    @rank.setter
    def rank(self, value: int) -> None:
        self._numbers[RANK] = value

    @property
    def changes(self) -> int:
        """How often :attr:`path` has changed."""
        return int(self._numbers[CHANGES])

    @property
    def path(self) -> str:
        """The folder of the store in use; empty as long as there is no friendly noise."""
        return bytes(self._path.numpy()).rstrip(b"\0").decode()

    def use_store(self, path: str) -> None:
        """From now on, friendly noise comes from this folder; with an empty path, there is none."""
        raw = path.encode()
        if len(raw) > LONGEST:
            raise ValueError(f"the path of the noise has {len(raw)} bytes; at most {LONGEST} are possible: {path}")
        self._path.zero_()
        self._path[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        self._numbers[CHANGES] += 1  # last: whoever sees the number finds the path
