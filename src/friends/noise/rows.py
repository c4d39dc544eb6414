"""The rows of any data set: which part of an item is the image, what its bytes are, and what names it."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from friends.data.convert import to_bytes
from friends.data.images import LabeledImages

Key = int | str
"""What names a row: a 64-bit integer, or a string (a path, an id), which is hashed to one."""

Int64s = NDArray[np.int64]

IMAGE_FIELDS = ("image", "img")


@runtime_checkable
class MapDataset(Protocol):
    """Any map-style data set: torch's ``Dataset``, a list of images, a Hugging Face dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def image_of(item: object) -> object:
    """The image in an item: the item itself, the first element of a tuple or list, or its field image or img.

    Raises:
        TypeError: an empty tuple, or a mapping without such a field.
    """
    if isinstance(item, Mapping):
        return cast("Mapping[str, object]", item)[_field(cast("Mapping[str, object]", item))]
    if isinstance(item, tuple | list):
        if not item:
            raise TypeError("an item of the data set is an empty tuple: there is no image in it")
        return cast("Sequence[object]", item)[0]
    return item


def with_image(item: object, image: object) -> object:
    """The same kind of item with another image; every other field is the very same object."""
    if isinstance(item, Mapping):
        fields = cast("Mapping[str, object]", item)
        return {**fields, _field(fields): image}
    if isinstance(item, tuple):
        rest = cast("tuple[object, ...]", item)[1:]
        named = getattr(cast(object, item), "_make", None)  # a namedtuple takes its fields as one iterable
        return named((image, *rest)) if named else (image, *rest)
    if isinstance(item, list):
        return [image, *cast("list[object]", item)[1:]]
    return image


def _field(item: Mapping[str, object]) -> str:
    for name in IMAGE_FIELDS:
        if name in item:
            return name
    raise TypeError(f"an item of the data set has the fields {', '.join(map(repr, item))}: none is 'image' or 'img'")


def key_number(key: Key | SupportsIndex) -> int:
    """The signed 64-bit integer of a key: itself, or the blake2b hash of a string.

    Raises:
        TypeError: neither an integer nor a string.
        ValueError: an integer beyond 64 bits.
    """
    if isinstance(key, str):
        return _hash64(key.encode())
    try:
        number = operator.index(key)
    except TypeError:
        raise TypeError(f"a key is an integer or a string, not {type(key).__name__} {key!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"key {number} does not fit in 64 bits; pass str({number})")
    return number


def key_numbers(keys: Sequence[Key] | Tensor | None, n: int) -> Int64s:
    """The numbers of ``n`` keys; by default the positions 0 to n-1.

    Raises:
        ValueError: not ``n`` keys, or a key is there twice (both its rows are named).
    """
    if keys is None:
        return np.arange(n, dtype=np.int64)
    if len(keys) != n:
        raise ValueError(f"{len(keys)} keys for {n} images: one each is needed")
    given = keys.tolist() if isinstance(keys, Tensor) else keys
    numbers = np.fromiter((key_number(key) for key in given), np.int64, n)
    order = np.argsort(numbers, kind="stable")
    twice = np.flatnonzero(np.diff(numbers[order]) == 0)
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        raise ValueError(f"rows {first} and {second} have the same key {given[int(first)]!r}")
    return numbers


def content_of(x: UInt8[Tensor, "c h w"]) -> int:
    """A signed 64-bit hash of an image's bytes."""
    return _hash64(x.contiguous().numpy().data)


def contents(x: UInt8[Tensor, "b c h w"]) -> Int64s:
    """:func:`content_of` of every row."""
    here = x.cpu()
    return np.fromiter((content_of(image) for image in here), np.int64, len(here))


def _hash64(data: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class Rows:
    """The images of a ``LabeledImages`` or of any map-style data set, as bytes, read only when asked for.

    Raises:
        TypeError: the data set has no length or no index (an ``IterableDataset``).
        ValueError: there is no image in it.
    """

    def __init__(self, data: LabeledImages | MapDataset) -> None:
        if not isinstance(cast(object, data), LabeledImages | MapDataset):
            raise TypeError(f"{type(data).__name__} is not a map-style data set: it needs len(data) and data[i]")
        self._data = data
        if not len(data):
            raise ValueError("there is no image in the data set")

    def __len__(self) -> int:
        return len(self._data)

    @property
    def in_memory(self) -> bool:
        """Whether all rows are bytes in memory already, so that reading them costs nothing."""
        return isinstance(self._data, LabeledImages)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of row 0."""
        c, h, w = self._data.x.shape[1:] if isinstance(self._data, LabeledImages) else self._one(0).shape
        return c, h, w

    def bytes(self, rows: Sequence[int] | Int64s, shape: tuple[int, int, int]) -> UInt8[Tensor, "b c h w"]:
        """The given rows as bytes.

        Raises:
            ValueError: an image is not of this shape; its row is named.
        """
        if isinstance(self._data, LabeledImages):
            if self._data.shape != shape:
                raise ValueError(f"the images are {self._data.shape}, not {shape}")
            return self._data.x[torch.as_tensor(np.asarray(rows), device=self._data.device)]
        x = torch.empty((len(rows), *shape), dtype=torch.uint8)
        for place, row in enumerate(rows):
            image = self._one(int(row))
            if tuple(image.shape) != shape:
                raise ValueError(
                    f"row {row} is {tuple(image.shape)}, not {shape}: friendly noise lives on the pixels of one size; "
                    "resize or crop the images, the same way every time, before the noise is made"
                )
            x[place] = image
        return x

    def _one(self, row: int) -> UInt8[Tensor, "c h w"]:
        assert not isinstance(self._data, LabeledImages)
        try:
            return to_bytes(image_of(self._data[row])).cpu()
        except (TypeError, ValueError) as error:
            raise type(error)(f"row {row} of the data set: {error}") from error

    def refuse_unsteady(self) -> None:
        """Raise ``ValueError`` if the data set gives other pixels when asked again: it augments at random."""
        if self.in_memory:
            return
        for row in range(min(4, len(self))):
            if not torch.equal(self._one(row), self._one(row)):
                raise ValueError(
                    f"row {row} has other pixels when it is read again: take random augmentation out of the data set; "
                    "friendly noise belongs to the stored image and is added before augmentation"
                )


def spread(n: int, count: int | None) -> Int64s:
    """``count`` row numbers evenly spread over ``n`` rows with both ends, or all of them."""
    if count is None or count >= n:
        return np.arange(n)
    return np.unique(np.linspace(0, n - 1, max(count, 1)).astype(np.int64))
