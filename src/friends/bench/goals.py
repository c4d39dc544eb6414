"""Choosing what the attacker wants: single test images, drawn with the trial's seed."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from friends.bench.trial import GoalSpec
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.types import Streams


def choose_goals(
    spec: GoalSpec, test: LabeledImages, streams: Streams, right: Bool[Tensor, " n"] | None = None
) -> list[Goal]:
    """Draw targets as the standard protocol does: true class, wanted class, then an image, all uniformly.

    Args:
        spec: how many, and which classes if not any.
        test: where targets are taken from, every image once at most.
        streams: goal g depends on ``("goal", g)`` alone, but for images that are taken already.
        right: the only images to choose from, for an attacker who wants targets that models classify rightly.

    Raises:
        ValueError: no image is left for a target.
    """
    eligible = torch.ones(len(test), dtype=torch.bool) if right is None else right.cpu().clone()
    y, classes = test.y.cpu(), test.classes
    goals: list[Goal] = []
    for g in range(spec.count):
        generator = streams("goal", g)
        true, wanted = _classes_of(spec, classes, generator)
        rows = ((y == true) & eligible).nonzero().flatten()
        if len(rows) == 0:
            kind = "" if right is None else "rightly classified "
            raise ValueError(f"no {kind}test image of class {classes[true]!r} is left for target {g}")
        row = int(rows[torch.randint(len(rows), (1,), generator=generator)])
        eligible[row] = False
        name = f"test image {row}: {classes[true]} \u2192 {classes[wanted]}"
        x = test.pixels(torch.tensor([row], device=test.device)).cpu()
        goals.append(Goal(x, torch.tensor([true]), torch.tensor([wanted]), name=name))
    return goals


def _classes_of(spec: GoalSpec, classes: tuple[str, ...], generator: torch.Generator) -> tuple[int, int]:
    """True and wanted class of a target, as set or drawn; never the same."""
    true = int(torch.randint(len(classes), (1,), generator=generator))
    other = int(torch.randint(len(classes) - 1, (1,), generator=generator))  # which of the other classes
    if spec.true_class is not None:
        true = classes.index(spec.true_class)
    if spec.wanted_class is None:
        return true, other + (other >= true)
    wanted = classes.index(spec.wanted_class)
    if spec.true_class is None and true == wanted:
        true = other + (other >= wanted)
    return true, wanted
