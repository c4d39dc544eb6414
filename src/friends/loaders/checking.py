"""Before anything is trained: what stands in the way of protecting a loader, and how to get round it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from friends.loaders.finding import Found, find_place
from friends.loaders.images import Moments
from friends.loaders.loader import Loader, inner_loader, prefetched
from friends.loaders.place import Blocker, Options
from friends.loaders.structure import Opened, randomness
from friends.loaders.view import View, moments_of, refusal, size_of


def check(
    model: nn.Module,
    loader: Loader,
    *,
    normalize: Moments | None = None,
    canonical_size: int | None = None,
    image: str | None = None,
) -> list[Blocker]:
    """Everything that stands in the way of protecting a loader, each with the way out; empty if nothing does.

    Nothing is changed, neither the loader nor any random state. The arguments are those of ``Friends.protect``.
    """
    options = Options(normalize=normalize, canonical_size=canonical_size, image=image)
    try:
        opened = Opened(inner_loader(loader).dataset)
    except (TypeError, ValueError) as error:
        return [Blocker(str(error), "Protect a DataLoader over a map-style data set, once")]
    try:
        found, view = examine(loader, opened, options)
        if view is not None:
            blocker = refusal(model, found.pixels, view)
            found.blockers += [] if blocker is None else [blocker]
        return found.blockers
    finally:
        opened.close()


def examine(loader: Loader, opened: Opened, options: Options) -> tuple[Found, View | None]:
    """Where the noise belongs, and what the model is shown; the view is None if there are blockers."""
    dataset = inner_loader(loader).dataset
    found = find_place(dataset, opened, options)
    if found.blockers:
        return found, None
    behind = prefetched(loader) if options.normalize is None else None
    with randomness():
        moments = moments_of(dataset, found, opened) if behind is None else behind
        if isinstance(moments, Blocker):
            found.blockers.append(moments)
            return found, None
        return found, View(moments, size_of(dataset, found))


def refuse(blockers: Sequence[Blocker]) -> None:
    """Raise ``ValueError`` listing all blockers, if there are any."""
    if blockers:
        lines = [str(blocker) for blocker in blockers]
        raise ValueError("the loader cannot be protected: " + "\n".join(lines))
