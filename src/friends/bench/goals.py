"""Choosing what the attacker wants, with the trial's seed: single test images, or images with a trigger."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from friends.bench.trial import GoalSpec, TriggerSpec
from friends.data.images import LabeledImages
from friends.data.keys import STANDARD_KEYS, goal_of_key
from friends.data.poisoned import Goal
from friends.data.triggers import Additive, Patch, Trigger, checkerboard, clean_label_pattern, colour_grid, corner_stamp
from friends.types import Streams

BACKDOOR_IMAGES = 1000
"""How many test images get a trigger, as in Sleeper Agent's protocol: all of one class of CIFAR-10."""


def choose_goals(
    spec: GoalSpec, test: LabeledImages, streams: Streams, right: Bool[Tensor, " n"] | None = None
) -> list[Goal]:
    """Draw goals as the standard protocol does: true class, wanted class, then the images, all uniformly.

    Args:
        spec: how many, and which classes if not any.
        test: where images are taken from; every image is a target once at most.
        streams: goal g depends on ``("goal", g)`` and ``("trigger", g)`` alone, but for targets taken already.
        right: the only images to choose from, for an attacker who wants targets that models classify rightly.

    Raises:
        ValueError: no image is left for a goal, or the trigger does not fit the images.
    """
    eligible = torch.ones(len(test), dtype=torch.bool) if right is None else right.cpu().clone()
    goals: list[Goal] = []
    for g in range(spec.count):
        generator = streams("goal", g)
        true, wanted = _classes_of(spec, test.classes, generator)
        if spec.trigger is not None:
            goals.append(_backdoor(spec, spec.trigger, test, (true, wanted), generator, streams("trigger", g)))
            continue
        rows = _draw(spec, ((test.y.cpu() == true) & eligible).nonzero().flatten(), generator)
        if len(rows) < (spec.images or 1):
            kind = "" if right is None else "rightly classified "
            raise ValueError(f"no {kind}test image of class {test.classes[true]!r} is left for target {g}")
        eligible[rows] = False
        what = f"test image {int(rows[0])}" if len(rows) == 1 else f"test images {', '.join(map(str, rows.tolist()))}"
        name = f"{what}: {test.classes[true]} \u2192 {test.classes[wanted]}"
        goals.append(Goal(_pixels(test, rows), torch.full_like(rows, true), torch.full_like(rows, wanted), name=name))
    return goals


def standard_goals(count: int, train: LabeledImages, test: LabeledImages, budget: float) -> list[Goal]:
    """The goals of the first standard keys, which say which images are poisoned too.

    Raises:
        ValueError: the data are not CIFAR-10 in full.
    """
    return [goal_of_key(key, train, test, budget) for key in list(STANDARD_KEYS)[:count]]


def _draw(spec: GoalSpec, rows: Int64[Tensor, " k"], generator: torch.Generator) -> Int64[Tensor, " m"]:
    """Some of the rows: one, unless more are asked for."""
    if len(rows) == 0:
        return rows
    if spec.images is None:
        return rows[torch.randint(len(rows), (1,), generator=generator)]
    return rows[torch.randperm(len(rows), generator=generator)[: spec.images]]


def _backdoor(
    spec: GoalSpec,
    how: TriggerSpec,
    test: LabeledImages,
    pair: tuple[int, int],
    generator: torch.Generator,
    place: torch.Generator,
) -> Goal:
    """Test images of the true class, or of every class but the wanted one, with the trigger."""
    true, wanted = pair
    y = test.y.cpu()
    rows = (y == true if spec.sources == "class" else y != wanted).nonzero().flatten()
    if len(rows) == 0:
        raise ValueError(f"no test image of class {test.classes[true]!r} could get a trigger")
    rows = rows[torch.randperm(len(rows), generator=generator)[: spec.images or BACKDOOR_IMAGES]].sort().values
    trigger = make_trigger(how, test.shape)
    source = test.classes[true] if spec.sources == "class" else "any class"
    name = f"{len(rows)} images with a trigger: {source} \u2192 {test.classes[wanted]}"
    x = trigger(_pixels(test, rows), place)
    return Goal(x, y[rows], torch.full_like(rows, wanted), trigger, name)


def make_trigger(spec: TriggerSpec, shape: tuple[int, int, int]) -> Trigger:
    """The trigger for images of ``shape`` ``(c, h, w)``. Raises ``ValueError`` where it does not fit."""
    c, h, w = shape
    if spec.kind == "made":
        return Additive(torch.zeros(shape))
    if spec.size > min(h, w):
        raise ValueError(f"a trigger of {spec.size} pixels a side does not fit images of {h}x{w}")
    patch = _pattern(spec, c)
    if spec.place == "random":
        return Patch(patch)
    if spec.place == "corner":
        return Patch(patch, (h - spec.size, w - spec.size))
    return corner_stamp(patch, shape, corners="all")


def _pattern(spec: TriggerSpec, channels: int) -> Tensor:
    if spec.kind == "colours":
        return colour_grid(spec.size, 3 if channels == 3 else 1).expand(channels, -1, -1).clone()
    if spec.kind == "clean-label":
        return clean_label_pattern(channels)
    return (
        checkerboard(spec.size, channels) if spec.kind == "checkerboard" else torch.ones(channels, spec.size, spec.size)
    )


def _pixels(test: LabeledImages, rows: Int64[Tensor, " m"]) -> Tensor:
    return test.pixels(rows.to(test.device)).cpu()


def _classes_of(spec: GoalSpec, classes: tuple[str, ...], generator: torch.Generator) -> tuple[int, int]:
    """True and wanted class of a goal, as set or drawn; never the same."""
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
