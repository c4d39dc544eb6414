"""A place in a data set's items where noise is added, and what a user says or is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from friends.loaders.images import Canonical, Moments, as_floats, raw_image, read, with_raw_image
from friends.loaders.visit import Cut, Visit


@dataclass(frozen=True)
class Blocker:
    """A reason why a loader cannot be protected, and the way out."""

    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.what}. {self.way_out}."


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user says of a loader because it cannot be seen.

    Args:
        normalize: mean and standard deviation of each channel by which the loader's images are normalised on their way
            into the model.
        canonical_size: bring images of any size to squares of this one, first of all.
        image: the field of items that holds the image.
    """

    normalize: Moments | None = None
    canonical_size: int | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        if self.canonical_size is not None:
            Canonical(self.canonical_size)
        if self.normalize is not None:
            mean, std = self.normalize
            if len(mean) != len(std) or not mean or min(std) <= 0:
                raise ValueError(f"normalize is (means, standard deviations) of the channels, not {self.normalize}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the noise goes.

    Args:
        cuts: where in which transform.
        on_items: on the images of the finished items, of rows that pass no transform.
        moments: what images at the place are normalised with; None for pixels.
        options: what the user said.
        bytes_because: why noise is added to bytes, in some rows at least; empty if it is not.
    """

    cuts: Mapping[str, Cut]
    on_items: bool
    moments: Moments | None
    options: Options
    bytes_because: str

    def visit(self, change: Callable[[object, bool], object]) -> Visit:
        """A visit that does this at the place."""
        size = self.options.canonical_size
        return Visit(self.cuts, change, None if size is None else Canonical(size), self.options.image)

    def read(self, dataset: Any, row: int, change: Callable[[object, bool], object]) -> object:
        """The item of a row, with its image changed at the place.

        Raises:
            RuntimeError: the image did not come by the place, or more than one did.
        """
        visit = self.visit(change)
        with visit.here():
            item = dataset[row]
        if self.on_items and not visit.trace:
            image = raw_image(item, self.options.image)
            image = image if visit.first is None else visit.first(image)
            return with_raw_image(item, self.options.image, visit.use(image, False))
        if visit.uses != 1:
            raise RuntimeError(wrong_uses(row, visit.uses))
        return item

    def clean(self, dataset: Any, row: int) -> object:
        """The item of a row without noise, from the data set's own transforms, of the canonical size if any."""
        if self.options.canonical_size is None:
            return dataset[row]
        cuts = {name: Cut(cut.at, False) for name, cut in self.cuts.items() if cut.at is not None}
        return replace(self, cuts=cuts).read(dataset, row, lambda image, _: image)

    def pixels(self, dataset: Any, row: int) -> Tensor:
        """The pixels of a row at the place, ``(c, h, w)`` in [0, 1]. The rest of the pipeline is run, too."""
        seen: list[Tensor] = []

        def look(image: object, floats: bool) -> object:
            x, _ = read(image, self.moments)
            seen.append(x)
            return as_floats(x, image) if floats else image

        self.read(dataset, row, look)
        return seen[0]


def wrong_uses(row: int, uses: int) -> str:
    """What to say of a row whose images came by the place not once but so many times."""
    if uses:
        return (f"row {row} passes the place of the noise {uses} times: an item that mixes several images cannot be "
                "protected. Mix batches instead, after the loader")  # fmt: skip
    return (f"row {row} came without noise: a transform was replaced since the loader was protected, or it is another "
            "one in this process. Protect the loader after everything else, and once more after a change")  # fmt: skip
