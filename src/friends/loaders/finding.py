"""Where in a data set's items the noise belongs: found by trying, and taken only if it changes nothing else.

The place is behind the leading steps that give the same pixels every time (decoding, resizing, ``ToTensor``) and in
front of the first that is random, pads or normalises. Whatever was found is tried without noise: the items must come
out as they do without us. If the rest of a pipeline does not take float tensors, or cannot be looked into, the noise is
added to bytes at its start, where random noise is rounded and clipped at black and white.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from friends.data.convert import to_pixels
from friends.loaders.images import as_floats, emitted_image, is_bytes, is_image, raw_image, read, to_grey
from friends.loaders.place import Blocker, Options, Place, wrong_uses
from friends.loaders.structure import Opened, probe_rows, randomness
from friends.loaders.visit import HERE, Cut, Stage, Transform, Visit, name_of

TRIES = 5
"""How often a step, or a whole pipeline, is run to see whether it gives the same every time."""

AGREE = 0.03
"""How far, in the mean and relative to its spread, an image may be from its twin of another kind: resizing a PIL image
rounds, resizing a tensor does not. What is normalised or ordered otherwise is much further away."""

_RANDOM = ("Random", "ColorJitter", "AutoAugment", "RandAugment", "TrivialAugment", "AugMix", "Pad", "Normalize",
           "GaussianBlur", "Elastic", "ScaleJitter", "FiveCrop", "TenCrop", "Noise")  # fmt: skip
"""How the names of steps begin that are never in front of the noise, even if they happen to do nothing when tried."""


@dataclass
class Found:
    """A place, or what stands in the way, and the pixels of the rows that were looked at."""

    blockers: list[Blocker] = field(default_factory=list[Blocker])
    place: Place | None = None
    rows: list[int] = field(default_factory=list[int])
    pixels: list[Tensor] = field(default_factory=list[Tensor])


def find_place(dataset: Any, opened: Opened, options: Options) -> Found:
    """Where the noise of a data set belongs. The data set is read a few times; no random state is changed."""
    found = Found()
    try:
        found.rows = probe_rows(dataset)
        with randomness():
            routes = _routes(dataset, found.rows)
            found.place = _place(dataset, routes, opened, options)
            _look(dataset, found)
    except RefusedError as refused:
        found.blockers.append(refused.blocker)
    return found


class RefusedError(Exception):
    """There is a blocker, and no use to look further."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(what)
        self.blocker = Blocker(what, way_out)


_MARK = ("put friends.NoiseHere() into your pipeline, or call one in __getitem__, where the image is still the stored "
         "one: before anything random, behind ToTensor")  # fmt: skip


def _routes(dataset: Any, rows: Sequence[int]) -> dict[tuple[str, ...], list[int]]:
    """The transforms that rows pass, in order, with the rows that pass them."""
    routes: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        visit = Visit({}, lambda image, _: image)
        try:
            with visit.here():
                dataset[row]
        except Exception as error:
            raise RefusedError(f"row {row} of the data set cannot be read: {type(error).__name__}: {error}",
                          "Mend the data set") from error  # fmt: skip
        routes.setdefault(tuple(visit.trace), []).append(row)
    return routes


def _place(dataset: Any, routes: Mapping[tuple[str, ...], list[int]], opened: Opened, options: Options) -> Place:
    """The first way, among those that a route allows, that leaves its rows as they were."""
    cuts: dict[str, Cut] = {}
    because = ""
    for route, rows in routes.items():
        place = _place_on(dataset, route, rows, opened, options)
        for name, cut in place.cuts.items():
            if cuts.setdefault(name, cut) != cut:
                raise RefusedError("a transform is shared by data sets that need the noise at different places of it",
                              f"Give each its own, or {_MARK}")  # fmt: skip
        because = because or place.bytes_because
    moments = options.normalize if () in routes else None
    return Place(cuts=cuts, on_items=() in routes, moments=moments, options=options, bytes_because=because)


def _place_on(dataset: Any, route: tuple[str, ...], rows: list[int], opened: Opened, options: Options) -> Place:
    blank = Place(cuts={}, on_items=not route, moments=None if route else options.normalize, options=options,
                  bytes_because="")  # fmt: skip
    _refuse_no_image(dataset, rows[0], route, options)
    if not route or HERE in route:
        if route.count(HERE) > 1:
            raise RefusedError(wrong_uses(rows[0], route.count(HERE)), "Leave one friends.NoiseHere()")
        place = replace(blank, cuts={HERE: Cut(0, False)} if route else {})
        return replace(place, bytes_because=_bytes_at(dataset, rows[0], place) or "")
    stages = [opened.stages[name] for name in route]
    if len({*route}) < len(route):
        raise RefusedError(wrong_uses(rows[0], route.count(route[0])), _MARK)
    at = min(_steady_steps(stages[0], _entering(dataset, row, route[0], blank)) for row in rows)
    tries = [(at, True), (at, False), (0, False)]
    reason = ""
    for start, floats in dict.fromkeys(tries):
        later = {name: Cut(None, True) for name in route[1:]} if floats else {}
        place = replace(blank, cuts={route[0]: Cut(start, floats), **later})
        problem = _difference(dataset, rows, place)
        if problem is None:
            because = None if floats else _bytes_at(dataset, rows[0], place, reason)
            return replace(place, bytes_because=because or "")
        reason = reason or problem
    raise RefusedError(f"no place for the noise was found: {reason}", _MARK)


def _refuse_no_image(dataset: Any, row: int, route: tuple[str, ...], options: Options) -> None:
    """Raise if finished items are what noise is added to, and there is no telling where in them the image is."""
    try:
        raw = None if route else raw_image(dataset[row], options.image)
    except TypeError as error:
        raise RefusedError(str(error), "Name the field that holds the image with image=") from error
    if raw is not None and not is_image(raw):
        raise RefusedError(f"the first thing in row {row} is {type(raw).__name__}, not an image", _MARK)


def _bytes_at(dataset: Any, row: int, place: Place, reason: str = "") -> str | None:
    """Why noise is added to bytes at this place; None if the image is no bytes there, or they cannot be had."""
    seen: list[object] = []

    def look(image: object, _: bool) -> object:
        seen.append(image)
        return image

    place.read(dataset, row, look)
    if not is_bytes(seen[0]):
        return None
    return reason or "the loader's images are bytes where the noise is added"


def _entering(dataset: Any, row: int, name: str, blank: Place) -> object:
    """The image as it enters a transform."""
    seen: list[object] = []

    def look(image: object, _: bool) -> object:
        seen.append(copy.deepcopy(image))
        return image

    visit = replace(blank, cuts={name: Cut(0, False)}).visit(look)
    with visit.here():
        dataset[row]
    if visit.uses != 1:
        raise RefusedError(wrong_uses(row, visit.uses), _MARK)
    if not is_image(seen[0]):
        raise RefusedError(f"the transform of row {row} takes {type(seen[0]).__name__}, not an image", _MARK)
    return seen[0]


def _steady_steps(stage: Stage, image: object) -> int:
    """How many leading steps give the same pixels every time."""
    if stage.batched:
        return 0
    steps = stage.steps
    for number, step in enumerate(steps):
        after = _steady(step, image)
        if after is None:
            return number
        image = after
    return len(steps)


def _steady(step: Transform, image: object) -> object | None:
    """What a step makes of an image, if it is the same every time and still pixels; else None."""
    if name_of(step).startswith(_RANDOM):
        return None
    try:
        before = _pixels(image)
        after: list[object] = []
        for seed in range(TRIES):
            with randomness(seed):
                after.append(step(copy.deepcopy(image)))
        pixels = [_pixels(one) for one in after]
    except Exception:  # whatever a step of somebody else does not like, it is not in front of the noise
        return None
    if any(not torch.equal(one, pixels[0]) for one in pixels[1:]):
        return None
    if before.shape == pixels[0].shape and float((before - pixels[0]).abs().max()) > 1e-3:
        return None  # it normalises, blurs, ...: from here on they are not the stored pixels
    return after[0]


def _pixels(image: object) -> Tensor:
    if not is_image(image):
        raise TypeError("no image")
    return to_pixels(image)


def _difference(dataset: Any, rows: Sequence[int], place: Place) -> str | None:
    """What is different in the items when noise of nothing is added at a place; None if nothing is."""

    def nothing(image: object, floats: bool) -> object:
        x, back = read(image, place.moments)
        return as_floats(x, image) if floats else back(x)

    # several times: a step may choose at random among things that do, and do not, work on float tensors
    for row, seed in itertools.product(rows, range(TRIES)):
        visit = place.visit(nothing)
        with randomness(seed):
            clean = emitted_image(place.clean(dataset, row), place.options.image)
        with randomness(seed):
            again = emitted_image(place.clean(dataset, row), place.options.image)
        try:
            with randomness(seed), visit.here():
                image = emitted_image(dataset[row], place.options.image)
        except Exception as error:
            return f"its step {visit.step} does not take such an image ({type(error).__name__}: {error})"
        if visit.uses != 1:
            return wrong_uses(row, visit.uses)
        floats = any(cut.floats for cut in place.cuts.values())
        if floats and (clean is None or is_bytes(clean)):
            return "the loader's images are bytes"
        if floats and not _same(clean, again):
            return "its random numbers cannot be repeated, so it cannot be tried on float tensors"
        if _same(clean, again) and not _alike(clean, image):
            return "its images come out differently"
    return None


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))


def _alike(a: object, b: object) -> bool:
    """Whether two finished images are of one kind and say the same, up to another way of resizing."""
    if type(a) is not type(b) or getattr(a, "dtype", None) != getattr(b, "dtype", None):
        return False
    x, y = (np.asarray(image).astype(np.float64) for image in (a, b))
    if x.shape != y.shape:
        return False
    return bool(np.abs(x - y).mean() <= AGREE * max(float(np.ptp(x)), 1e-3))


def _look(dataset: Any, found: Found) -> None:
    """Read the pixels at the place, twice: they must be steady and of one size."""
    place = cast(Place, found.place)
    for row in found.rows:
        x, again = (_pixels_of(dataset, row, place) for _ in range(2))
        if x.shape != again.shape or not torch.equal(to_grey(x), to_grey(again)):
            raise RefusedError(f"row {row} has other pixels when read again, before any step that could be told apart: "
                          "its data set augments by itself", f"In it, {_MARK}")  # fmt: skip
        if found.pixels and x.shape != found.pixels[0].shape:
            raise RefusedError(f"row {found.rows[0]} is {tuple(found.pixels[0].shape)}, row {row} is {tuple(x.shape)}: "
                          "friendly noise lives on the pixels of one size", "Pass canonical_size=, or begin the "
                          "transform with Resize and CenterCrop")  # fmt: skip
        found.pixels.append(x)


def _pixels_of(dataset: Any, row: int, place: Place) -> Tensor:
    try:
        return place.pixels(dataset, row)
    except (TypeError, ValueError) as error:
        way = ("If they are normalised already, pass normalize=(means, standard deviations)" if place.on_items else
               _MARK[0].upper() + _MARK[1:])  # fmt: skip
        raise RefusedError(f"the images are no pixels where the noise is added: row {row}: {error}", way) from error
