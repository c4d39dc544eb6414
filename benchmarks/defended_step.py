"""What FRIENDS adds to a training step: the same training with and without it, epoch by epoch in turns.

Both are real trainings with :func:`friends.training.fit`. Only one runs at a time; after each epoch it hands over to
the other, so that an epoch with the defense has one without it beside it. The first epoch, in which friendly noise is
made, is not counted: what that costs is in :mod:`generation`. Here it is noise that nobody optimised, which takes as
long to add.

    python benchmarks/defended_step.py
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from generation import Rows, row
from interleaved import Spread
from networks import NETWORKS, images
from torch import nn

from friends import Friends
from friends.data.images import LabeledImages
from friends.models import build
from friends.training import Recipe, fit
from friends.training.defense import Defense
from friends.types import Streams

TARGET = {"convnet": "", "resnet18": "<= 1.01"}
"""The ConvNet's own step takes less than a tenth of a ResNet's: what is added is the same, its share is not."""


class Turns:
    """Threads of which one runs at a time, in order."""

    def __init__(self, players: int) -> None:
        self.locks = [threading.Semaphore(0) for _ in range(players)]

    def wait(self, player: int) -> None:
        self.locks[player].acquire()

    def hand_over(self, player: int) -> None:
        self.locks[(player + 1) % len(self.locks)].release()


def in_turns(trainings: Sequence[Sequence[Defense]], data: LabeledImages, name: str, epochs: int) -> list[list[float]]:
    """Processor seconds of every epoch of every training.

    Args:
        trainings: the defenses of each.
        data: what all of them train on.
        name: of the network.
        epochs: how many of each.
    """
    turns, seconds = Turns(len(trainings)), [list[float]() for _ in trainings]
    started = [0.0] * len(trainings)
    failures: list[Exception] = []

    def make(generator: torch.Generator) -> nn.Module:
        return build(name, shape=data.shape, classes=len(data.classes), moments=data.moments, width=NETWORKS[name],
                     generator=generator)  # fmt: skip

    def train(player: int) -> None:
        torch.set_num_threads(1)

        def watch(_: nn.Module, __: int) -> dict[str, float]:
            seconds[player].append(time.process_time() - started[player])
            turns.hand_over(player)
            turns.wait(player)
            if failures:
                raise RuntimeError("the other training failed")
            started[player] = time.process_time()
            return {}

        turns.wait(player)
        started[player] = time.process_time()
        try:
            fit(data, make, recipe=Recipe(epochs=epochs, lr=0.01, compile=False), defenses=trainings[player],
                streams=Streams(0), watch=watch)  # fmt: skip
        except Exception as error:  # told by the main thread
            failures.append(error)
        turns.hand_over(player)

    threads = [threading.Thread(target=train, args=(player,), daemon=True) for player in range(len(trainings))]
    for thread in threads:
        thread.start()
    turns.hand_over(len(trainings) - 1)  # the first one's turn
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return seconds


def measure(quick: bool = False, data: str | Path | None = None, networks: Sequence[str] = tuple(NETWORKS)) -> Rows:
    """Every number; two minutes."""
    train, _ = images(data)
    few, epochs = train.rows(torch.arange(128 if quick else 512)), 3 if quick else 10
    rows: Rows = []
    for name in networks:
        plain, defended = in_turns([[], [Friends(def_epoch=0, held="random")]], few, name, epochs)
        each = [Spread.of([1e6 * s / len(few) for s in times[1:]]) for times in (plain, defended)]
        ratio = Spread.of([ours / theirs for theirs, ours in zip(plain[1:], defended[1:], strict=True)])
        rows += [
            row(f"{name}: undefended step, CPU time per image", each[0], "us"),
            row(f"{name}: step with FRIENDS, CPU time per image", each[1], "us"),
            row(f"{name}: a step with FRIENDS over an undefended one", ratio, "x", TARGET[name]),
        ]
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in measure():
        print(f"{found['name']:60} {found['value']:10.4g} ({found['low']:.4g}-{found['high']:.4g}) {found['unit']:6} "
              f"{found['target']}")  # fmt: skip
