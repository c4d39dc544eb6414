"""What is searched: settings of FRIENDS as candidates, a draw of a grid of them, their neighbours, and the rungs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from friends.defenses.friends import Friends
from friends.noise.friendly import FriendlySettings
from friends.noise.random import RandomNoise

STRONGEST = 127
"""The strongest friendly noise, and the strongest random noise that is searched, in grey levels."""


@dataclass(frozen=True, kw_only=True, order=True)
class Candidate:
    """Settings of FRIENDS; two of them are equal if they train the same model.

    Args:
        zeta: bound of the friendly noise, in grey levels of 255; without it ``lr`` and ``penalty`` mean nothing.
        mu: strength of the random noise, in grey levels; without it ``random`` means nothing.
        random: how it is distributed.
        lr: step of the friendly noise's optimiser.
        penalty: weight of the friendly noise's size, lambda in the paper.

    Raises:
        ValueError: a strength is outside 0 to 127 grey levels, or both are 0.
    """

    zeta: int = 16
    mu: int = 16
    random: RandomNoise = "bernoulli"
    lr: float = 100.0
    penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("zeta", self.zeta), ("mu", self.mu)):
            if not 0 <= value <= STRONGEST:
                raise ValueError(f"{name} is 0 to {STRONGEST} grey levels (of 255), not {value}")
        if self.zeta == self.mu == 0:
            raise ValueError("zeta and mu are both 0: that is no defense, and is judged anyway")
        if self.zeta == 0:
            object.__setattr__(self, "lr", 100.0)
            object.__setattr__(self, "penalty", 1.0)
        if self.mu == 0:
            object.__setattr__(self, "random", "bernoulli")

    def __str__(self) -> str:
        friendly = f"zeta {self.zeta}/255 (lr {self.lr:g}, penalty {self.penalty:g})" if self.zeta else "zeta 0"
        return f"{friendly}, mu {self.mu}/255" + (f" {self.random}" if self.mu else "")

    def defense(self, def_epoch: int) -> Friends:
        """The defense with these settings, whose friendly noise is made at an epoch."""
        settings = FriendlySettings(lr=self.lr, penalty=self.penalty)
        zeta, mu = self.zeta / 255, self.mu / 255
        return Friends(zeta=zeta, mu=mu, random=self.random, def_epoch=def_epoch, settings=settings)


Row = Candidate | Literal["undefended", "clean"]
"""What is judged: settings of FRIENDS, no defense, or no defense and no poison either (the control)."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """How dearly candidates are judged.

    Args:
        candidates: how many there are.
        images: training images of each training.
        epochs: of each training.
        repeats: trainings of each candidate, which differ in their seed and in what the attacker wants.
        first: the number of the first repeat.
    """

    candidates: int
    images: int
    epochs: int
    repeats: int
    first: int = 0

    @property
    def numbers(self) -> range:
        """The numbers of the repeats."""
        return range(self.first, self.first + self.repeats)


def draw(
    count: int,
    seed: int,
    *,
    zeta: Sequence[int],
    mu: Sequence[int],
    kinds: Sequence[RandomNoise],
    lr: Sequence[float],
    penalty: Sequence[float],
) -> list[Candidate]:
    """So many candidates of a grid: each pair of strengths about as often as any other, the rest at random.

    The paper's strengths with the released settings come first, if the grid has them. All, if there are no more.

    Raises:
        ValueError: the grid has no candidate.
    """
    chance = random.Random(seed)  # its own generator; the global one is left alone
    cells: list[list[Candidate]] = []
    for z, m in itertools.product(sorted(set(zeta)), sorted(set(mu))):
        if z == m == 0:
            continue
        rest = itertools.product(kinds, lr, penalty)
        made = {Candidate(zeta=z, mu=m, random=k, lr=r, penalty=p): None for k, r, p in rest}
        cells.append(chance.sample(list(made), len(made)))
    chance.shuffle(cells)
    mixed = [c for some in itertools.zip_longest(*cells) for c in some if c is not None]
    if not mixed:
        raise ValueError("the grid has no candidate: give at least one zeta or mu that is not 0")
    usual = Candidate()
    if usual in mixed:
        mixed = [usual, *(candidate for candidate in mixed if candidate != usual)]
    return mixed[:count]


def around(candidate: Candidate, level: int, *, stronger: bool) -> list[Candidate]:
    """Its neighbours on one axis each: half-way to the next point of the paper's grid, then a quarter, ..."""
    share = 0.5 ** (level + 1)
    signs = (1, -1) if stronger else (-1, 1)
    near: list[Candidate] = []
    for sign in signs:
        for axis in ("mu", "zeta"):
            value: int = getattr(candidate, axis)
            moved = round(value * 2 ** (sign * share))
            moved = moved + sign if moved == value else moved
            if value and 1 <= moved <= STRONGEST:
                near.append(replace(candidate, **{axis: moved}))
    if candidate.zeta:
        for sign in signs:
            near.append(replace(candidate, lr=float(f"{candidate.lr * 2 ** (sign * share):.3g}")))
            near.append(replace(candidate, penalty=float(f"{candidate.penalty * 10 ** (sign * share):.3g}")))
    return near


def plan_rungs(*, candidates: int, images: int, epochs: int, seeds: int, rungs: int, least: int = 4000) -> list[Rung]:
    """Rungs that grow to all images, epochs and seeds: thrice the images, twice the epochs, a third of the field.

    Args:
        least: a rung has so many images or more, if there are as many: with fewer the rank says too little.

    Raises:
        ValueError: a number is less than 1.
    """
    numbers = {"candidates": candidates, "images": images, "epochs": epochs, "seeds": seeds, "rungs": rungs}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is a number >= 1, not {value}")
    made: list[Rung] = []
    for k in range(rungs):
        up = rungs - 1 - k
        made.append(
            Rung(
                candidates=min(candidates, max(3, math.ceil(candidates / 3**k))),
                images=min(images, max(least, round(images / 3**up))),
                epochs=min(epochs, max(8, round(epochs / 2**up))),
                repeats=max(1, round(seeds * (k + 1) / rungs)),
            )
        )
    return made


def noise_epoch(epochs: int) -> int:
    """When friendly noise is made in a training of so many epochs: at the paper's 5, earlier in a short one."""
    return min(5, epochs // 8, epochs - 1) if epochs >= 16 else min(1, epochs - 1)
