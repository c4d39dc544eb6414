"""The attack that settings are tuned against: a real, cheap poisoning of the user's own training images.

It is a backdoor that keeps labels: Sleeper Agent, or a stamp on hardened images (the clean-label backdoor) where that
fails. Images held out from training get the trigger and should then be taken for another class. One training judges
many images, where a targeted attack has one, so that a few trainings tell settings apart. The attacker trains the
user's own model. It is one attack of many: what withstands it may fall to another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from friends.attacks import CleanLabelBackdoor, SleeperAgent
from friends.attacks.base import Attack
from friends.bench.trial import GoalSpec, TriggerSpec
from friends.data.images import LabeledImages
from friends.training.recipe import Recipe
from friends.types import Streams

FEW = 20
"""Every class needs so many training images: some are held out, some poisoned, and the rest must still be learnt."""
HELD_OUT = 5000
"""More images than that are not held out."""


@dataclass(frozen=True, kw_only=True)
class Mock:
    """The attack at one strength.

    Args:
        kind: ``"sleeper-agent"`` or ``"stamp"``.
        xi: l_inf bound of a poison, in grey levels of 255.
        share: poisons, as a share of the images of the smallest class.
    """

    kind: Literal["sleeper-agent", "stamp"]
    xi: int
    share: float

    def __str__(self) -> str:
        name = "Sleeper Agent" if self.kind == "sleeper-agent" else "clean-label backdoor"
        return f"{name}, xi {self.xi}/255, {100 * self.share:g} % of the smallest class poisoned"

    def attack(self, train: LabeledImages, recipe: Recipe) -> Attack:
        """It as an attack on some training set."""
        smallest = int(torch.bincount(train.y.cpu()).min())
        budget = max(1, round(self.share * smallest)) / len(train)
        xi = self.xi / 255
        if self.kind == "sleeper-agent":
            return SleeperAgent(budget=budget, xi=xi, steps=60, retrainings=1, augment=recipe.augment)
        return CleanLabelBackdoor(budget=budget, norm="linf", eps=min(xi, 32 / 255), xi=xi, steps=20)

    def goals(self, count: int, shape: tuple[int, int, int]) -> GoalSpec:
        """What its attacker wants, of images of a shape."""
        least = min(shape[1:])
        if self.kind == "sleeper-agent":
            trigger = TriggerSpec(kind="colours", size=math.ceil(least / 4), place="random")
            return GoalSpec(count=count, trigger=trigger, sources="class")
        pattern = "checkerboard" if shape[0] == 3 else "white"
        trigger = TriggerSpec(kind=pattern, size=math.ceil(least / 5), place="corners")
        return GoalSpec(count=count, trigger=trigger, sources="all")


LADDER = (
    Mock(kind="sleeper-agent", xi=16, share=0.5),
    Mock(kind="sleeper-agent", xi=32, share=0.5),
    Mock(kind="stamp", xi=76, share=0.6),
    Mock(kind="stamp", xi=128, share=0.6),
)
"""Tried in turn until one works without a defense: the faintest that does is what settings are tuned against."""


def hold_out(train: LabeledImages, share: float, seed: int) -> tuple[LabeledImages, LabeledImages]:
    """What is trained on, and what accuracy and success are measured on: a draw with the same share of every class.

    Raises:
        ValueError: fewer than two classes, too few images of one, or a share that leaves nothing on one side.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share that is held out is in (0, 1), not {share}")
    if len(train.classes) < 2:
        raise ValueError(f"{train.name} has one class, {', '.join(train.classes)}: an attack needs two or more")
    count = torch.bincount(train.y.cpu(), minlength=len(train.classes)).tolist()
    for name, size in zip(train.classes, count, strict=True):
        if size < FEW:
            raise ValueError(f"class {name!r} of {train.name} has {size} training images: tuning needs {FEW} of every "
                             "class, to hold some out and poison others; merge or leave out small classes")  # fmt: skip
    share = min(share, HELD_OUT / len(train))
    apart = torch.zeros(len(train), dtype=torch.bool)
    for c, size in enumerate(count):
        generator = Streams(seed)("held out", c)
        rows = (train.y.cpu() == c).nonzero().flatten()
        apart[rows[torch.randperm(size, generator=generator)[: max(1, round(share * size))]]] = True
    inside, outside = (~apart).nonzero().flatten(), apart.nonzero().flatten()
    return train.rows(inside), train.rows(outside, f"{train.name}, held out")
