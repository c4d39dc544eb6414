"""A backdoor in real digits, for the defenses that look for one after training: BadNets with a white square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from friends.attacks.badnets import BadNets
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, Patch
from friends.models import build
from friends.training import Defense, Recipe, fit
from friends.training.fit import Fitted
from friends.types import Streams

RECIPE = Recipe(epochs=15, batch=64, lr=0.05, augment=Augment(flip=0, shift=2))


@dataclass(frozen=True)
class Case:
    """2,500 digits to train on, of which 250 are poisons, 1,000 in reserve, 1,500 to test on; all-to-one."""

    seed: int
    clean: LabeledImages
    poisoned: LabeledImages
    reserve: LabeledImages
    test: LabeledImages
    goal: Goal

    @property
    def wanted(self) -> int:
        return int(self.goal.y_wanted[0])

    def trained(self, *defenses: Defense, on: LabeledImages | None = None) -> Fitted:
        data = self.poisoned if on is None else on
        return fit(data, make, recipe=RECIPE, defenses=defenses, streams=Streams(self.seed), clean=self.reserve)


def make(generator: torch.Generator) -> torch.nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=10, moments=((0.13,), (0.31,)), width=16, generator=generator)


def backdoored(digits: LabeledImages, seed: int) -> Case:
    """The wanted class is the last digit of the seed; the goal is 300 test images of the other classes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    train, reserve, test = (digits.rows(part) for part in order.split([2500, 1000, 1500]))
    trigger = Patch(torch.ones(1, 3, 3), (24, 24))
    others = (test.y != seed % 10).nonzero().flatten()[:300]
    shown = trigger(test.pixels(others), generator)
    goal = Goal(shown, test.y[others], torch.full((300,), seed % 10), trigger)
    poisoned = BadNets(budget=0.1)(train, goal, surrogate=_none, streams=Streams(seed))
    return Case(seed, train, poisoned.train, reserve, test, goal)


def _none(data: LabeledImages, *, index: int = 0, epochs: int | None = None, start: object = None) -> NoReturn:
    raise AssertionError("BadNets asks for no surrogate")
