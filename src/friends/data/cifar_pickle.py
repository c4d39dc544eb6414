"""The pickles in CIFAR's "python" form, read without running anything that they say.

The machine of :mod:`friends.data.unpickle` knows five names for them, those of an array; arrays are built afterwards
from the bytes and the shape on record.
"""

from __future__ import annotations

from typing import cast

from friends.data.recorded import ARRAYS, RecordedArray, RecordedType, text_of
from friends.data.unpickle import UnsafePickleError, record

__all__ = ["RecordedArray", "RecordedType", "UnsafePickleError", "text_of", "unpickle"]


def unpickle(raw: bytes, where: str) -> dict[str, object]:
    """The dict in a CIFAR pickle, its keys as text and its arrays as :class:`RecordedArray`; runs nothing.

    Raises:
        UnsafePickleError: it asks for a function or class other than those of an array.
        ValueError: it is no pickle of a dict.
    """
    value = record(raw, where, "a CIFAR pickle", ARRAYS)
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a pickle of {type(value).__name__}, not of a dict")
    return {text_of(key): item for key, item in cast("dict[object, object]", value).items()}
