"""What EPIC's choice of medoids costs: plain greedy, which computes every gain in every round, and lazy greedy.

    python benchmarks/epic_selection.py > benchmarks/epic_selection.md

prints a table for one class of 2,000 and one of 5,000 images, a tenth of them medoids. The points are made up, like
gradients of logits of a model that is right about most images. The ways take turns; medians are over the repeats.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from friends.bench.provenance import commit, device_name, versions
from friends.defenses.medoids import lazy_greedy, plain_greedy, similarities

CLASSES, SHARE = 10, 0.1

WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {"plain": plain_greedy, "lazy": lazy_greedy}


def gradients(n: int) -> Tensor:
    """``(n, 10)`` gradients of logits of one class."""
    z = 2 * torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(0))
    z[:, 0] += 4
    return z.softmax(1) - torch.nn.functional.one_hot(torch.zeros(n, dtype=torch.int64), CLASSES)


def row(n: int, repeats: int) -> str:
    points, k = gradients(n), int(SHARE * n)
    seconds: dict[str, list[float]] = {"similarity": [], **{name: [] for name in WAYS}}
    chosen: dict[str, Tensor] = {}
    for _ in range(repeats):
        clock = time.perf_counter()
        similarity = similarities(points, CLASSES)
        seconds["similarity"].append(time.perf_counter() - clock)
        for name, way in WAYS.items():
            clock = time.perf_counter()
            chosen[name] = way(similarity, k)
            seconds[name].append(time.perf_counter() - clock)
    same = "yes" if torch.equal(chosen["plain"], chosen["lazy"]) else "NO"
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    cells = [f"{middle[name]:.3g}" for name in seconds]
    return f"| {n} | {k} | {' | '.join(cells)} | {middle['plain'] / middle['lazy']:.1f} | {same} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--points", nargs="+", type=int, default=[2000, 5000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    today = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"# What EPIC's choice of medoids costs\n\n{device_name('cpu')}, {given.threads} thread"
          f"{'s' * (given.threads > 1)}; {libraries}; commit {commit() or '-'}; {today}. One class, {given.repeats} "
          "repeats in turns, medians in seconds.\n\n"
          "    python benchmarks/epic_selection.py > benchmarks/epic_selection.md\n\n"
          "| points | medoids | similarities | plain greedy | lazy greedy | plain / lazy | same medoids, same order |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for n in given.points:
        print(row(n, given.repeats))


if __name__ == "__main__":
    main()
