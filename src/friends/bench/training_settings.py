"""What ``friends train`` is asked for, and the images that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from friends.bench.trial import ModelSpec
from friends.data import sources
from friends.data.decode import BrokenImageError
from friends.data.images import LabeledImages
from friends.defenses.friends import Friends
from friends.training.recipe import Recipe
from friends.types import Progress, Streams, silent

HELD_OUT = 0.2


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that decides which model comes out.

    Args:
        source: the data set, as ``friends.data.sources.load`` takes it.
        test: another one to judge on: its test part, or all of it if it has none.
        held_out: the share of the training images that is judged on and not trained on. None judges on ``test``, or on
            the test part of the data; a fifth is held out if there is neither.
        size: height and width that images are brought to; None demands that they are equal.
        skip_broken: whether images that cannot be read are left out.
        model: a name as ``friends.models.named.network`` takes it.
        recipe: how it is trained.
        defense: FRIENDS with its settings; None trains undefended.
        seed: everything random follows from it.

    Raises:
        ValueError: a setting is out of range, or two contradict each other.
    """

    source: str
    test: str | None = None
    held_out: float | None = None
    size: int | None = None
    skip_broken: bool = False
    model: ModelSpec = field(default_factory=ModelSpec)
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=40))
    defense: Friends | None = field(default_factory=Friends)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.held_out is not None and not 0 < self.held_out < 1:
            hint = f"; did you mean {self.held_out / 100:g}?" if 1 < self.held_out < 100 else ""
            raise ValueError(f"--held-out is a share between 0 and 1, not {self.held_out:g}{hint}")
        if self.held_out is not None and self.test is not None:
            raise ValueError("--held-out and --test contradict each other: name one of them")
        if self.size is not None and self.size < 1:
            raise ValueError(f"--size is a number of pixels >= 1, not {self.size}")
        if self.recipe.epochs < 1:
            raise ValueError(f"--epochs is a number >= 1, not {self.recipe.epochs}")
        if self.defense is not None:
            if self.defense.zeta == 0 and self.defense.mu == 0:
                raise ValueError("zeta and mu are both 0, which is no defense: say --undefended if that is meant")
            self.defense.refuse_length(self.recipe.epochs)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The images of a training.

    Args:
        train: what is trained on.
        held_out: what is judged on.
        judged_on: what that is, in words.
        skipped: what is wrong with each image that could not be read.
    """

    train: LabeledImages
    held_out: LabeledImages
    judged_on: str
    skipped: tuple[str, ...]


def prepare(training: Training, *, download: bool = False, progress: Progress = silent) -> Prepared:
    """Read the data and say what is judged on.

    Raises:
        ValueError: the data do not fit; the file, class or size is named, and the option that helps.
        FileNotFoundError: they are not there.
    """
    skipped: list[str] | None = [] if training.skip_broken else None

    def read(source: str) -> tuple[LabeledImages, LabeledImages]:
        return sources.load(
            source, size=training.size, download=download, lone=True, skipped=skipped, progress=progress
        )

    try:
        train, own = read(training.source)
        other = None if training.test is None else read(training.test)
    except BrokenImageError as error:
        raise ValueError(
            f"{error}. Mend it or take it away, or leave out all broken images with --skip-broken"
        ) from error
    if len(train.classes) < 2:
        raise ValueError(
            f"{training.source} has one class, {', '.join(train.classes)!r}: there is nothing to tell apart"
        )
    if other is not None:
        part = renumbered(other[1] if len(other[1]) else other[0], train.classes)
        train, held_out = sources.matched(train, part)
        judged_on = f"the {'test part' if len(other[1]) else 'images'} of {training.test}"
    elif training.held_out is None and len(own):
        held_out, judged_on = own, "the test part of the data"
    else:
        share = training.held_out or HELD_OUT
        train, held_out = divide(train, share, training.seed)
        judged_on = f"{100 * share:g} % of the training images, held out"
    return Prepared(train, held_out, judged_on, tuple(skipped or ()))


def divide(data: LabeledImages, share: float, seed: int) -> tuple[LabeledImages, LabeledImages]:
    """What is trained on, and what is held out: a draw with the same share of every class, at least one image of each.

    Raises:
        ValueError: a class has too few images.
    """
    apart = torch.zeros(len(data), dtype=torch.bool)
    for c, name in enumerate(data.classes):
        rows = (data.y.cpu() == c).nonzero().flatten()
        if len(rows) < 2:
            raise ValueError(f"class {name!r} of {data.name} has {len(rows)} image: two are needed, to train on one "
                             "and hold out the other; add images, or name images to judge on with --test")  # fmt: skip
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        apart[rows[torch.randperm(len(rows), generator=Streams(seed)("held out", c))[:count]]] = True
    return data.rows((~apart).nonzero().flatten()), data.rows(apart.nonzero().flatten(), f"{data.name}, held out")


def renumbered(data: LabeledImages, classes: Sequence[str]) -> LabeledImages:
    """The same images with the numbers that their classes have elsewhere.

    Raises:
        ValueError: one of its classes is not among ``classes``.
    """
    for name in data.classes:
        if name not in classes:
            raise ValueError(f"class {name!r} of {data.name} is none of those that are trained: {', '.join(classes)}")
    place = torch.tensor([classes.index(name) for name in data.classes], device=data.device)
    return LabeledImages(data.x, place[data.y], tuple(classes), data.name)
