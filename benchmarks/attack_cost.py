"""What crafting costs in time, beside what the attacks say of it: is a forward pass an honest unit?

Every attack counts the images that it sends through a surrogate, and weighs those that are differentiated
(``Attack.cost``, ``GRADIENT``, ``SECOND``). Here the time of a crafting is divided by the time of a forward pass of one
image through the same surrogate, measured in turns with it. Surrogates are not trained: no cost depends on weights.

    python benchmarks/attack_cost.py > benchmarks/attack_cost.md

prints a table per network for all attacks, with the settings of the table-driven tests and more poisons.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from friends.attacks import ATTACKS
from friends.attacks.base import Cost, Sizes, poison_count
from friends.attacks.catalogue import amount
from friends.bench.provenance import commit, device_name, versions
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import build
from friends.types import Streams

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from test_every_attack import SMALL, goal_for

NETWORKS = {"tiny": 32, "resnet18": 16}
"""Name and width."""

IMAGES, BUDGET, WANTED = 240, 0.1, 2
"""Training images of three classes, the share that is poisoned, and the class that the goals want."""


def images() -> LabeledImages:
    """Noise of CIFAR-10's shape: no cost depends on what is seen."""
    x = torch.randint(256, (IMAGES, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return LabeledImages(x, torch.arange(IMAGES) % 3, ("a", "b", "c"), "noise")


def sizes(data: LabeledImages, goal: Goal) -> Sizes:
    return Sizes(
        train=len(data),
        wanted=int((data.y == WANTED).sum()),
        source=sum(int((data.y == label).sum()) for label in goal.y_true.unique()),
        goal=len(goal),
        poisons=poison_count(BUDGET, len(data)),
    )


class Untrained:
    """A surrogate per index, built before the clock starts."""

    def __init__(self, name: str, data: LabeledImages) -> None:
        self.name, self.data, self.models = name, data, dict[int, nn.Module]()

    def __call__(self, data: LabeledImages, *, index: int = 0, start: nn.Module | None = None, **_: Any) -> nn.Module:
        if index not in self.models:
            generator = torch.Generator().manual_seed(index)
            self.models[index] = build(
                self.name, shape=self.data.shape, classes=3, moments=self.data.moments, width=NETWORKS[self.name],
                generator=generator,
            )  # fmt: skip
        return self.models[index]


def forward_seconds(model: nn.Module, x: torch.Tensor) -> float:
    """Of one image in a batch as large as the poisons'."""
    model.eval()
    with torch.no_grad():
        clock = time.perf_counter()
        for _ in range(3):
            model(x)
    return (time.perf_counter() - clock) / 3 / len(x)


def measured(name: str, network: str, data: LabeledImages, repeats: int) -> tuple[list[float], list[float], Cost]:
    """Crafting in forward passes, once per repeat; seconds of the crafting; and what the attack says it costs."""
    attack: Any = replace(SMALL[name], budget=BUDGET)  # type: ignore[type-var]
    goal, surrogate = goal_for(name, data, WANTED), Untrained(network, data)
    x = data.pixels(slice(0, poison_count(BUDGET, len(data))))
    attack(data, goal, surrogate=surrogate, streams=Streams(0))  # builds the surrogates, warms up
    ratios: list[float] = []
    seconds: list[float] = []
    for _ in range(repeats):
        before = forward_seconds(surrogate(data), x)
        clock = time.perf_counter()
        attack(data, goal, surrogate=surrogate, streams=Streams(0))
        seconds.append(time.perf_counter() - clock)
        ratios.append(seconds[-1] / statistics.mean((before, forward_seconds(surrogate(data), x))))
    return ratios, seconds, attack.cost(sizes(data, goal))


def settings(name: str) -> str:
    """What of the attack's settings is not its default."""
    small: Any = replace(SMALL[name], budget=BUDGET)  # type: ignore[type-var]
    usual = type(small)()
    changed = [f.name for f in fields(small) if getattr(small, f.name) != getattr(usual, f.name)]
    told = {field: getattr(small, field) for field in changed}
    return ", ".join(f"{field}={255 * value:g}/255" if field == "xi" else f"{field}={value}"
                     for field, value in told.items())  # fmt: skip


def table(network: str, names: Sequence[str], repeats: int) -> list[str]:
    data = images()
    lines = [f"## `{network}`, width {NETWORKS[network]}", "",
             "| attack | settings | counted | measured | lowest–highest | measured / counted | seconds |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        ratios, seconds, cost = measured(name, network, data, repeats)
        middle, counted = statistics.median(ratios), cost.forwards
        share = f"{middle / counted:.2f}" if counted else "–"
        spread = f"{amount(min(ratios))}–{amount(max(ratios))}"
        lines.append(f"| {name} | {settings(name)} | {amount(counted)} | {amount(middle)} | {spread} | {share} | "
                     f"{statistics.median(seconds):.3g} |")  # fmt: skip
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    clock = time.perf_counter()
    tables = [table(network, given.only, given.repeats) for network in given.networks]
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    threads = f"{given.threads} thread{'s' * (given.threads > 1)}"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"# What crafting costs\n\n"
          f"{device_name('cpu')}, {threads}; {libraries}; commit {commit() or '-'}; {today}. "
          f"{IMAGES} images of 3x32x32, {poison_count(BUDGET, IMAGES)} poisons, {given.repeats} repeats, each "
          "in turns with a forward pass.\n\n*Counted*: what `cost()` says, in forward passes of one image. *Measured*: "
          "time of the crafting divided by that of such a pass, the median of the repeats, trainings not included.\n\n"
          "    python benchmarks/attack_cost.py > benchmarks/attack_cost.md\n")  # fmt: skip
    print("\n".join(line for lines in tables for line in lines))
    print(f"All of it took {time.perf_counter() - clock:.0f} seconds.")


if __name__ == "__main__":
    main()
