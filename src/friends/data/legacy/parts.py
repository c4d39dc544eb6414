"""What the published forms of poisons are made of: a pickle in a file, images with labels, whole numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.recorded import IMAGES, NUMBERS, Array, RecordedImage, RecordedNumbers
from friends.data.recorded_torch import TENSORS
from friends.data.unpickle import record

KNOWN = {**NUMBERS, **IMAGES, **TENSORS}
MAX_BYTES = 512 << 20
"""500 poisons of 32x32 take 1.5 MB, of 224x224 take 75 MB."""


@dataclass(frozen=True)
class Part:
    """One file of a published set, read but not yet understood.

    Args:
        where: the file, for errors.
        value: what its pickle says.
        size: its bytes.
    """

    where: str
    value: object
    size: int

    def expect(self, count: int, each: int, what: str) -> None:
        """Raise if ``count`` things of ``each`` bytes are more than the file holds: it names one thing many times."""
        if count * each > self.size:
            raise ValueError(f"{self.where} claims {count} {what} of {each} bytes in a file of {self.size}")


def read_part(path: Path, max_bytes: int = MAX_BYTES) -> Part:
    """Read one pickle; nothing that it says is run.

    Raises:
        FileNotFoundError: there is no such file.
        friends.data.unpickle.UnsafePickleError: it asks for more than images, arrays, tensors and plain values.
        ValueError: it is torn, or larger than ``max_bytes``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {max_bytes} that it may have")
    raw = path.read_bytes()
    return Part(str(path), record(raw, str(path), "a pickle of images and numbers", KNOWN), len(raw))


def sequence(value: object, where: str) -> Sequence[object]:
    """A list or tuple, as it is. Raises ``ValueError`` that begins with ``where``."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is a {type(value).__name__}, not a list")
    return cast("Sequence[object]", value)


def labelled(part: Part, items: Sequence[object], like: LabeledImages) -> LabeledImages:
    """A list of pairs ``(image, label)``, in order, as images of the kind that ``like`` holds.

    Raises:
        ValueError: one is no such pair, of another size or mode, or of an unknown class; it is named.
    """
    views: list[Array] = []
    y: list[int] = []
    for i, item in enumerate(items):
        where = f"{part.where}, entry {i}"
        if not isinstance(item, (list, tuple)) or len(cast("Any", item)) != 2:
            raise ValueError(f"{where} is not a pair of image and label")
        image, label = cast("Sequence[object]", item)
        views.append(pixels(image, where, like))
        y.append(class_id(label, where, like))
    part.expect(len(views), math.prod(like.shape), "images")
    return LabeledImages(stacked(views, like), torch.tensor(y, dtype=torch.int64), like.classes, part.where)


def pixels(image: object, where: str, like: LabeledImages) -> Array:
    """Bytes ``(h, w, c)`` of a recorded image, read-only, if it is of the size and mode of the images of ``like``."""
    if not isinstance(image, RecordedImage):
        raise ValueError(f"{where} holds a {type(image).__name__} where an image should be")
    found = image.pixels(where)
    h, w, c = found.shape
    if (c, h, w) != like.shape:
        raise ValueError(f"{where} is an image of {(c, h, w)}, but those of {like.name} are {like.shape}")
    return found


def stacked(views: Sequence[Array], like: LabeledImages) -> UInt8[Tensor, "n c h w"]:
    """A copy of images ``(h, w, c)`` that lie elsewhere."""
    c, h, w = like.shape
    x = np.stack(views) if views else np.empty((0, h, w, c), np.uint8)
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def class_id(value: object, where: str, like: LabeledImages) -> int:
    """A whole number, Python's, numpy's or torch's, that is a class of ``like``."""
    found = whole(value, where)
    if not 0 <= found < len(like.classes):
        raise ValueError(f"{where} has label {found}, but {like.name} has {len(like.classes)} classes")
    return found


def whole(value: object, where: str) -> int:
    """A whole number, Python's, numpy's or torch's. Raises ``ValueError`` that begins with ``where``."""
    if type(value) is int:
        return value
    if isinstance(value, RecordedNumbers):
        array = value.array(where)
        if array.size == 1 and array.dtype.kind in "iu":
            return int(array.reshape(-1)[0])
    raise ValueError(f"{where} holds a {type(value).__name__} where one whole number should be")


def indices(value: object, where: str) -> Int64[Tensor, " n"]:
    """A list, tuple, array or tensor of whole numbers. Raises ``ValueError`` that begins with ``where``."""
    if isinstance(value, RecordedNumbers):
        array = value.array(where)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{where} holds {array.dtype} numbers of shape {array.shape}, not a vector of indices")
        return as_tensor(array).to(torch.int64)
    numbers = [whole(item, f"{where}, entry {i}") for i, item in enumerate(sequence(value, where))]
    outside = [number for number in numbers if not -(1 << 62) < number < 1 << 62]
    if outside:
        raise ValueError(f"{where} holds the index {outside[0]}")
    return torch.tensor(numbers, dtype=torch.int64)


def as_tensor(array: Array) -> Tensor:
    """A copy of a read-only array of either byte order; unsigned numbers that torch lacks become int64."""
    native = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(native.astype(np.int64) if native.dtype.kind == "u" and native.itemsize > 1 else native)


def to_rows(
    published: Int64[Tensor, " p"], order: Int64[Tensor, " n"] | None, clean: LabeledImages, where: str
) -> Int64[Tensor, " p"]:
    """The rows of ``clean`` that published indices mean; see :func:`~friends.data.legacy.read_folder`.

    Raises:
        ValueError: ``order`` is no such map, or an index means no row of ``clean``; it is named.
    """
    if order is None:
        order = torch.arange(len(clean))
    present = order[order >= 0]
    if len(present) != len(present.unique()) or bool((order >= len(clean)).any()):
        raise ValueError(f"order maps two rows to one, or a row beyond the {len(clean)} of {clean.name}")
    outside = published[(published < 0) | (published >= len(order))]
    if len(outside):
        raise ValueError(f"{where} lists base index {int(outside[0])}, but there are {len(order)} training images")
    absent = published[order[published] < 0]
    if len(absent):
        raise ValueError(f"{where} lists base index {int(absent[0])}, an image that {clean.name} lacks: order maps it "
                         f"to {int(order[absent[0]])}")  # fmt: skip
    return order[published]


def compare(
    poisons: LabeledImages, idx: Int64[Tensor, " p"], clean: LabeledImages, xi: float | None, clean_label: bool
) -> int:
    """Hold the poisons against their bases, and give the largest distance in grey levels.

    Raises:
        ValueError: a label or a distance is not as claimed, or nothing was perturbed; says what the reason may be.
    """
    base_x, base_y = clean.x[idx.to(clean.device)].cpu(), clean.y[idx.to(clean.y.device)].cpu()
    relabelled = (poisons.y != base_y).nonzero().flatten()
    if clean_label and len(relabelled):
        i = int(relabelled[0])
        names = [clean.classes[int(y[i])] for y in (poisons.y, base_y)]
        raise ValueError(f"{len(relabelled)} of {len(poisons)} poisons have not the label of their base, first: entry "
                         f"{i} is {names[0]!r}, row {int(idx[i])} of {clean.name} is {names[1]!r}. If the base indices "
                         "count another order of the data, pass order=; if the attack relabels, clean_label=False. "
                         f"({poisons.name})")  # fmt: skip
    distance = (poisons.x.short() - base_x.short()).abs().flatten(1).amax(1)
    largest = int(distance.max())
    if largest == 0 and not len(relabelled):
        raise ValueError(f"none of the {len(poisons)} poisons in {poisons.name} differs from its base image")
    if xi is not None and largest > math.floor(xi * 255 + 1e-6):
        i = int(distance.argmax())
        raise ValueError(f"{poisons.name}, entry {i} differs from its base, row {int(idx[i])} of {clean.name}, by "
                         f"{largest}/255, more than xi = {math.floor(xi * 255 + 1e-6)}/255. If {clean.name} is a lossy "
                         "copy (JPEG) of what was poisoned, its bases are others: pass xi=None")  # fmt: skip
    return largest


def replaced(
    poisons: LabeledImages,
    idx: Int64[Tensor, " p"],
    clean: LabeledImages,
    goal: Goal,
    recipe: Mapping[str, object],
) -> PoisonedDataset:
    """``clean`` with the poisons in its rows ``idx``, and what they are meant to achieve."""
    x, y = clean.x.clone(), clean.y.clone()
    x[idx.to(x.device)], y[idx.to(y.device)] = poisons.x.to(x.device), poisons.y.to(y.device)
    return PoisonedDataset(LabeledImages(x, y, clean.classes, clean.name), idx, goal, recipe)
