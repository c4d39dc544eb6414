"""The goal of a published folder: ``target.pickle``, one image, or ``source.pickle``, triggered images.

A patch that comes beside its image is pasted as the benchmark and the FRIENDS authors paste it: ``[x, y]`` is the
column and row of its upper left pixel, and the sum is cut down to bytes, ``floor(255 * patch)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from friends.data.images import LabeledImages
from friends.data.legacy.parts import as_tensor, class_id, labelled, pixels, read_part, sequence, stacked, whole
from friends.data.poisoned import Goal, Patch, Trigger
from friends.data.recorded import RecordedImage, RecordedNumbers

TARGET, SOURCE = "target.pickle", "source.pickle"


def read_goal(path: Path, like: LabeledImages, wanted: int, trigger: Trigger | None, y_true: int | None) -> Goal:
    """What the poisons of the folder ``path`` are for; see :func:`~friends.data.legacy.read_folder`."""
    has_sources = (path / SOURCE).is_file()
    target, patch = _target(path / TARGET, like, y_true) if (path / TARGET).is_file() else (None, None)
    shown = _sources(path / SOURCE, like) if has_sources else target
    if shown is None:
        raise FileNotFoundError(f"{path} holds neither {TARGET} nor {SOURCE}")
    if patch is not None and trigger is not None:
        raise ValueError(f"{path / TARGET} holds a patch: leave out trigger=")
    m = len(shown)
    names = [like.classes[label] for label in (int(shown.y[0]), wanted)]
    name = f"{f'{m} published sources' if has_sources else 'published target'}: {names[0]} \u2192 {names[1]}"
    try:
        return Goal(shown.pixels(), shown.y, torch.full((m,), wanted), patch or trigger, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sources(path: Path, like: LabeledImages) -> LabeledImages:
    """The triggered images: a list of pairs, or a single pair."""
    part = read_part(path)
    items = sequence(part.value, part.where)
    shown = labelled(part, [items] if _is_pair(items) else items, like)
    if len(shown) == 0:
        raise ValueError(f"{path} holds no image")
    return shown


def _is_pair(items: Sequence[object]) -> bool:
    return len(items) == 2 and isinstance(items[0], RecordedImage)


def _target(path: Path, like: LabeledImages, y_true: int | None) -> tuple[LabeledImages, Patch | None]:
    """The one target as it is shown to the model, and the patch that was pasted into it."""
    part = read_part(path)
    bare = isinstance(part.value, RecordedImage)
    items = [part.value, y_true] if bare else [*sequence(part.value, part.where)]
    if bare and y_true is None:
        raise ValueError(f"{path} holds an image without its label: pass y_true=")
    if len(items) not in (2, 4):
        raise ValueError(f"{path} holds {len(items)} entries: not image and label, nor image, label, patch and corner")
    x = stacked([pixels(items[0], part.where, like)], like)
    label = class_id(items[1], part.where, like)
    if y_true is not None and label != y_true:
        raise ValueError(f"{path} says that the target is of class {label}, not {y_true}")
    patch = _patch(items[2], items[3], part.where, like) if len(items) == 4 else None
    if patch is not None:
        x = _paste(x, patch)
    return LabeledImages(x, torch.tensor([label]), like.classes, part.where), patch


def _patch(values: object, corner: object, where: str, like: LabeledImages) -> Patch:
    """The patch, cut down to whole bytes, at its place."""
    if not isinstance(values, RecordedNumbers):
        raise ValueError(f"{where} holds a {type(values).__name__} where a patch should be: no array and no tensor")
    array = values.array(where)
    c, h, w = like.shape
    if array.ndim != 3 or array.shape[0] != c or array.size == 0 or array.shape[1] > h or array.shape[2] > w:
        raise ValueError(f"{where} holds a patch of {array.shape} for images of {like.shape}")
    if not bool(np.isfinite(array).all()) or array.min() < 0 or array.max() > 1:
        raise ValueError(f"{where} holds a patch whose pixels are not in [0, 1]")
    places = [whole(part, f"{where}, corner") for part in sequence(corner, f"{where}, corner")]
    if len(places) != 2 or not (0 <= places[0] <= w - array.shape[2] and 0 <= places[1] <= h - array.shape[1]):
        raise ValueError(f"{where} has a patch of {array.shape} that does not fit at [x, y] = {places}")
    cut = as_tensor(array).float().mul(255).to(torch.uint8)
    return Patch(cut.float() / 255, (places[1], places[0]))


def _paste(x: UInt8[Tensor, "b c h w"], patch: Patch) -> UInt8[Tensor, "b c h w"]:
    """A copy of images with a patch of whole bytes in its place."""
    row, column = cast("tuple[int, int]", patch.corner)
    ph, pw = patch.pixels.shape[1:]
    out = x.clone()
    out[:, :, row : row + ph, column : column + pw] = to_bytes(patch.pixels)
    return out


def to_bytes(x: Tensor) -> Tensor:
    """Pixels in [0, 1] as the nearest bytes."""
    return x.detach().cpu().mul(255).round().clamp(0, 255).to(torch.uint8)
