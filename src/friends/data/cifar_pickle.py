"""The pickles in CIFAR's "python" form, read without running anything that they say.

The unpickler knows four names, each of which stands for an inert recorder of ours. No function of numpy or of anyone
else is ever called, whatever the file asks for; arrays are built afterwards from the bytes and the shape on record.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from io import BytesIO
from typing import Any, cast

import numpy as np


class UnsafePickleError(ValueError):
    """A pickle asks for something that no CIFAR file needs. Nothing of it was carried out."""


def text_of(value: object) -> str:
    """A string of Python 2, which is bytes, or one of Python 3, as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class RecordedArray:
    """What a pickle says of an array, remembered and not carried out."""

    __slots__ = ("state",)

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_bytes(self, where: str) -> np.ndarray[Any, np.dtype[Any]]:
        """The array, which must be of bytes. Raises ``ValueError`` that begins with ``where``."""
        state = self.state
        if isinstance(state, tuple) and len(cast("Any", state)) == 5:
            _, shape, dtype, fortran, raw = cast("tuple[Any, ...]", state)
            one_byte = isinstance(dtype, RecordedType) and dtype.code == "u1"
            if one_byte and isinstance(raw, bytes) and isinstance(shape, tuple):
                try:
                    return np.frombuffer(raw, np.uint8).reshape(cast("Any", shape), order="F" if fortran else "C")
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{where} holds an array whose shape does not fit: {error}") from error
        raise ValueError(f"{where} holds an array that is not of uint8")


class RecordedType:
    """What a pickle says of an array's type."""

    __slots__ = ("code",)

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = text_of(code)

    def __setstate__(self, _: object) -> None:
        """Byte order and the like: one byte has none."""


class RecordedText:
    """Python 3 writes the bytes of a protocol-2 pickle as latin-1 text to be encoded back: only that is done."""

    __slots__ = ()

    def __new__(cls, text: str, encoding: str) -> bytes:  # pyright: ignore[reportInconsistentConstructor]
        """The bytes of ``text``."""
        if encoding not in ("latin1", "latin-1"):
            raise UnsafePickleError(f"asks for the codec {encoding!r}")
        return text.encode("latin-1")

    def __setstate__(self, _: object) -> None:
        """Pickles cannot set attributes of a class that has this method."""


_KNOWN: Mapping[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): RecordedArray,
    ("numpy._core.multiarray", "_reconstruct"): RecordedArray,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): RecordedType,
    ("_codecs", "encode"): RecordedText,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise UnsafePickleError(f"asks for {module}.{name}")
        return _KNOWN[module, name]


def unpickle(raw: bytes, where: str) -> dict[str, object]:
    """The dict in a CIFAR pickle, its keys as text and its arrays as :class:`RecordedArray`; runs nothing.

    Raises:
        UnsafePickleError: it asks for a function or class other than those of an array.
        ValueError: it is no pickle of a dict.
    """
    try:
        value = _Unpickler(BytesIO(raw), encoding="bytes").load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{where} is not a CIFAR pickle: it {error}, and nothing was run") from None
    except Exception as error:  # damaged pickles raise whatever their bytes lead to
        raise ValueError(f"{where} is torn or not a CIFAR pickle: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a pickle of {type(value).__name__}, not of a dict")
    return {text_of(key): item for key, item in cast("dict[object, object]", value).items()}
