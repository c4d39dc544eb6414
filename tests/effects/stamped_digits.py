"""Digits of five classes, a twentieth of them stamped and called by the wanted class (BadNets), and their victims.

Filters rest on what a probe has learned, and a stamp on digits is learned well enough in seconds to stand out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from friends.attacks import BadNets
from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import Patch, checkerboard
from friends.models import build
from friends.training import Defense, Recipe, fit
from friends.training.evaluate import Removal, accuracy, removal, success
from friends.types import Streams

BUDGET = 0.05
POISONS = 75
RECIPE = Recipe(epochs=20, batch=64, lr=0.05, augment=None)


@dataclass(frozen=True)
class Victim:
    """What the judge finds: shares of stamped images taken for the wanted class, and of test images seen right."""

    success: float
    accuracy: float
    removal: Removal


@dataclass(frozen=True)
class Stamped:
    """One poisoned training set of 1,500 digits with its test set of 500."""

    poisoned: PoisonedDataset
    test: LabeledImages
    seed: int

    def victim(self, *defenses: Defense, artifacts: Artifacts | None = None) -> Victim:
        def make(generator: torch.Generator) -> nn.Module:
            return build("tiny", shape=(1, 28, 28), classes=5, moments=((0.13,), (0.31,)), width=8, generator=generator)

        data, streams = self.poisoned.train, Streams(self.seed)
        fitted = fit(data, make, recipe=RECIPE, defenses=defenses, streams=streams, artifacts=artifacts)
        return Victim(
            float(success(fitted.predictor, self.poisoned.goal).float().mean()),
            accuracy(fitted.predictor, self.test).strict,
            removal(fitted.removed, self.poisoned.poison_idx),
        )


def stamped(digits: LabeledImages, seed: int) -> Stamped:
    """The poisons of a seed; its wanted class is one of the five."""
    data = digits.only_classes(["0", "1", "3", "4", "7"])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    train, test = data.rows(order[:1500]), data.rows(order[1500:2000])
    trigger, wanted = Patch(checkerboard(3, 1), corner=(25, 25)), seed % 5
    others = test.rows((test.y != wanted).nonzero().flatten())
    goal = Goal(trigger(others.pixels(), torch.Generator()), others.y, torch.full_like(others.y, wanted), trigger)
    poisoned = BadNets(budget=BUDGET)(train, goal, surrogate=no_surrogate, streams=Streams(seed))
    assert len(poisoned.poison_idx) == POISONS
    return Stamped(poisoned, test, seed)


def no_surrogate(*_: object, **__: object) -> nn.Module:
    raise AssertionError("BadNets needs no surrogate")
