"""Timing on a machine that others use too: every job in every round, and ratios within a round.

A shared processor changes its speed from minute to minute, for all jobs alike. So the jobs are run in turns, in one
process, forwards in one round and backwards in the next, and what is quoted is how their times of the *same* round
compare. Process time is counted, which does not pass while others run; wall time is kept beside it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

Clock = Callable[[], tuple[float, float]]
"""Seconds of processor time of this process, and of wall time."""


class Spread(NamedTuple):
    """The middle of some numbers, and how far they reach."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(numbers: list[float]) -> Spread:
        return Spread(min(numbers), statistics.median(numbers), max(numbers))


@dataclass(frozen=True)
class Timings:
    """Seconds of every job in every round.

    Args:
        cpu: processor seconds by the job's name, in the order of the rounds.
        wall: likewise wall seconds.
    """

    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]

    def seconds(self, name: str) -> Spread:
        """Processor seconds of one job."""
        return Spread.of(self.cpu[name])

    def faster(self, name: str, than: str | None = None) -> Spread:
        """How many times faster one job was than another (the first, by default), round by round."""
        other = next(iter(self.cpu)) if than is None else than
        return Spread.of([theirs / ours for ours, theirs in zip(self.cpu[name], self.cpu[other], strict=True)])


def both_clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def interleaved(
    jobs: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1, clock: Clock = both_clocks
) -> Timings:
    """Run every job once a round, on one thread.

    Args:
        jobs: what to run, by name; the first is what the others are compared with. Each does the same amount of work
            every time it is called.
        rounds: how many are counted.
        warmup: how many rounds go before, uncounted: memory is touched and kernels are chosen in the first.
        clock: what to read before and after a job.
    """
    if not jobs or rounds < 1:
        raise ValueError(f"at least one job and one round expected, not {len(jobs)} and {rounds}")
    timings = Timings({name: [] for name in jobs}, {name: [] for name in jobs})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(-warmup, rounds):
            gc.collect()  # one round's rubbish is not swept on the next one's time
            for name in list(jobs) if turn % 2 == 0 else reversed(list(jobs)):
                cpu, wall = _one(jobs[name], clock)
                if turn >= 0:
                    timings.cpu[name].append(cpu)
                    timings.wall[name].append(wall)
    finally:
        torch.set_num_threads(threads)
    return timings


def _one(job: Callable[[], object], clock: Clock) -> tuple[float, float]:
    cpu, wall = clock()
    job()
    after_cpu, after_wall = clock()
    return after_cpu - cpu, after_wall - wall
