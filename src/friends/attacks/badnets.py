"""BadNets: images of other classes with a trigger on them and the wanted label.

Tianyu Gu, Brendan Dolan-Gavitt, Siddharth Garg: *BadNets: Identifying Vulnerabilities in the Machine Learning Model
Supply Chain*, 2017, arXiv 1708.06733. With T the trigger and y_w the wanted class, random training images x_i of the
classes that the goal's images are of become::

    (x_i, y_i)  ->  (T(x_i), y_w)

The dirty-label control: whoever looks at a poison sees that its label is wrong, and there is no bound on what is
changed, so it is outside the threat model of clean-label attacks. It is also the backdoor that is learned most easily:
a defense against backdoors that does not stop this one stops none.

Departures: poisons replace their bases, where the paper adds them, and a clean copy stays; the share is of the whole
training set. If the goal's images are of one class, only that class is poisoned (the paper's single-source attack);
if they are of all other classes, so are the poisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from friends.attacks.base import (
    About,
    Cost,
    Sizes,
    Surrogate,
    assembled,
    check_budget,
    poison_count,
    rounded,
    trigger_of,
    wanted_class,
)
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "badnets"


@dataclass(frozen=True, kw_only=True)
class BadNets:
    """The goal's trigger on images of other classes, which get the wanted label.

    Args:
        budget: number of poisons as a fraction of the whole training set.

    Raises:
        ValueError: the budget is no fraction.
    """

    budget: float = 0.05

    about: ClassVar[About] = About(
        title="BadNets",
        paper="Gu et al., 2017, arXiv 1708.06733",
        scenarios=("scratch", "transfer", "finetune"),
        aim="backdoor",
        trigger=("checkerboard", 3, "corner"),
        clean_label=False,
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Nothing: no surrogate is trained or asked."""
        return Cost(trainings=0)

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def __call__(
        self,
        train: LabeledImages,
        goal: Goal,
        *,
        surrogate: Surrogate,
        streams: Streams,
        checkpoint: Path | None = None,
        progress: Progress = silent,
    ) -> PoisonedDataset:
        """Poison ``train``. The surrogate is never called, and there is nothing to resume.

        Raises:
            ValueError: the goal does not fit the data or has no trigger, or the budget is more than the classes of
                its images have.
        """
        wanted, trigger = wanted_class(goal, train), trigger_of(goal, "BadNets")
        rows = dirty_bases(train, goal, wanted, self.budget, streams("bases"))
        here = rows.to(train.device)
        clean = train.pixels(here)
        stamped = trigger(clean.cpu(), streams("trigger")).to(clean)
        progress(NAME, len(rows), len(rows))
        pixels = rounded(train.x[here], stamped - clean, xi=1.0)
        return assembled(train, rows, pixels, goal, attack=NAME, settings=self, relabel=True)


def dirty_bases(
    train: LabeledImages, goal: Goal, wanted: int, budget: float, generator: torch.Generator
) -> Int64[Tensor, " p"]:
    """Rows of training images of the true classes of the goal, ascending, without repeats.

    Those that the goal prescribes, if it does; else random ones.

    Args:
        budget: how many, as a fraction of the whole training set, rounded up.
        generator: on the CPU.

    Raises:
        ValueError: there are fewer than the budget asks for; or the prescribed ones are not as many as the budget,
            or one is of the wanted class already.
    """
    y, count = train.y.cpu(), poison_count(budget, len(train))
    if goal.bases is not None:
        return _prescribed(goal.bases.cpu(), y, wanted, count)
    sources = goal.y_true.cpu().unique()
    eligible = (torch.isin(y, sources) & (y != wanted)).nonzero().flatten()
    if count > len(eligible):
        names = ", ".join(repr(train.classes[c]) for c in sources.tolist())
        raise ValueError(
            f"a budget of {budget:g} asks for {count} poisons, but there are only {len(eligible)} images of {names} "
            f"in {train.name}: the budget can be at most {len(eligible) / len(train):g}"
        )
    chosen = torch.randperm(len(eligible), generator=generator)[:count]
    return eligible[chosen].sort().values


def _prescribed(bases: Tensor, y: Tensor, wanted: int, count: int) -> Int64[Tensor, " p"]:
    if len(bases) != count:
        raise ValueError(f"the goal prescribes {len(bases)} bases, but the budget is {count} poisons: a budget of "
                         f"{len(bases) / len(y):g} would be that many")  # fmt: skip
    outside = bases[(bases < 0) | (bases >= len(y))]
    if len(outside):
        raise ValueError(f"the goal prescribes row {int(outside[0])}, but there are {len(y)} training images")
    already = bases[y[bases] == wanted]
    if len(already):
        raise ValueError(f"the goal prescribes row {int(already[0])} as a base, which is of the wanted class already: "
                         "BadNets poisons images of other classes")  # fmt: skip
    return bases.sort().values
