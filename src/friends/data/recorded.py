"""Numbers, arrays and images, built from what a pickle says of them: its bytes, checked against the shape it claims.

Nothing of numpy or Pillow is called that a file could choose, and nothing is allocated that a file only claims: an
array is a view of the file's own bytes, and those must be exactly as many as its shape and type take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from friends.data.unpickle import Known, Name, Recorded, UnsafePickleError, printable

Array = np.ndarray[Any, np.dtype[Any]]

NUMERIC = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
ORDERS: Mapping[str, str] = {"<": "<", ">": ">", "|": "", "=": ""}
CHANNELS: Mapping[str, int] = {"L": 1, "RGB": 3}
"""The image modes that are read. Others do not hold one byte per channel of a plain picture."""


def text_of(value: object) -> str:
    """A string of Python 2, which is bytes, or one of Python 3, as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class RecordedType(Recorded):
    """What a pickle says of an array's type, its code and its byte order."""

    __slots__ = ("code",)

    def __init__(self, code: object = None, *args: object) -> None:
        super().__init__(*args)
        self.code = text_of(code) if isinstance(code, (str, bytes)) else ""

    def plain(self, where: str) -> np.dtype[Any]:
        """The type, which must be one of numbers. Raises ``ValueError`` that begins with ``where``."""
        state = cast("tuple[object, ...]", self.state) if isinstance(self.state, tuple) else (3, "<")
        parts: tuple[object, ...] = (*state, None, None)
        known = ORDERS.get(text_of(parts[1])) if isinstance(parts[1], (str, bytes)) else None
        if self.code not in NUMERIC or known is None or any(part is not None for part in parts[2:5]):
            raise ValueError(f"{where} holds an array of {printable(self.code)!r}, not of numbers")
        return np.dtype(known + self.code)


class RecordedNumbers(Recorded):
    """What a pickle says of numbers in some shape."""

    __slots__ = ()

    def array(self, where: str) -> Array:
        """The numbers, read-only. Raises ``ValueError`` that begins with ``where``."""
        raise NotImplementedError


class RecordedArray(RecordedNumbers):
    """What a pickle says of an array, by ``_reconstruct`` and a state."""

    __slots__ = ()

    def __init__(self, kind: object = None, *args: object) -> None:
        if kind is not None and not (isinstance(kind, Name) and kind.called == ("numpy", "ndarray")):
            raise UnsafePickleError("asks for an array of a class of its own")
        super().__init__(*args)

    def array(self, where: str) -> Array:
        """The array, read-only. Raises ``ValueError`` that begins with ``where``."""
        state = self.state
        if not isinstance(state, tuple) or len(cast("Any", state)) != 5:
            raise ValueError(f"{where} holds an array without contents")
        _, shape, kind, fortran, raw = cast("tuple[Any, ...]", state)
        return _shaped(raw, kind, shape, "F" if fortran is True else "C", where)

    def to_bytes(self, where: str) -> Array:
        """The array, which must be of bytes. Raises ``ValueError`` that begins with ``where``."""
        state = cast("Any", self.state)
        if not isinstance(state, tuple) or len(cast("Any", state)) != 5:
            raise ValueError(f"{where} holds an array that is not of uint8")
        kind, raw = cast("tuple[Any, ...]", state)[2::2]
        if not isinstance(kind, RecordedType) or kind.code != "u1" or not isinstance(raw, bytes):
            raise ValueError(f"{where} holds an array that is not of uint8")
        return self.array(where)


class RecordedBuffer(RecordedNumbers):
    """What a pickle of protocol 5 says of an array: a buffer, a type, a shape, an order, and perhaps the axes."""

    __slots__ = ()

    def array(self, where: str) -> Array:
        """The array, read-only. Raises ``ValueError`` that begins with ``where``."""
        raw, kind, shape, order, axes = (*self.args, None, None, None, None, None)[:5]
        found = _shaped(raw, kind, shape, "F" if order == "F" else "C", where)
        if order in ("C", "F"):
            return found
        if order != "K" or not _whole_numbers(axes) or sorted(cast("Any", axes)) != list(range(found.ndim)):
            raise ValueError(f"{where} holds an array whose axes are in no order")
        return found.transpose(cast("Any", axes))


class RecordedScalar(RecordedNumbers):
    """What a pickle says of a number of numpy's."""

    __slots__ = ()

    def array(self, where: str) -> Array:
        """The number, as an array without axes. Raises ``ValueError`` that begins with ``where``."""
        kind, raw = (*self.args, None, None)[:2]
        return _shaped(raw, kind, (), "C", where)


class RecordedText:
    """Python 3 writes the bytes of a protocol-2 pickle as latin-1 text to be encoded back: only that is done."""

    __slots__ = ()

    def __new__(cls, text: str, encoding: str) -> bytes:  # pyright: ignore[reportInconsistentConstructor]
        """The bytes of ``text``."""
        if encoding not in ("latin1", "latin-1"):
            name = encoding if type(encoding) is str else type(encoding).__name__  # text of a deep list has no end
            raise UnsafePickleError(f"asks for the codec {printable(name)!r}")
        return text.encode("latin-1")


class RecordedImage(Recorded):
    """What a pickle says of a Pillow image: a list of info, mode, size, palette, bytes, and more of files."""

    __slots__ = ()

    def pixels(self, where: str) -> Array:
        """Bytes ``(h, w, c)``, read-only. Raises ``ValueError`` that begins with ``where``."""
        state = self.state
        if not isinstance(state, (list, tuple)) or len(cast("Any", state)) < 5:
            raise ValueError(f"{where} holds an image without contents")
        _, mode, size, _, raw, *_ = cast("list[Any]", state)
        if not isinstance(mode, str) or mode not in CHANNELS:
            known = " or ".join(repr(name) for name in CHANNELS)
            raise ValueError(f"{where} holds an image of mode {printable(text_of(mode), 20)!r}, not {known}")
        if not _whole_numbers(size) or len(size) != 2 or not isinstance(raw, bytes):
            raise ValueError(f"{where} holds an image without a size or without bytes")
        w, h = size
        if min(w, h) < 1 or len(raw) != w * h * CHANNELS[mode]:
            raise ValueError(f"{where} holds an image that claims {w}x{h} pixels of {mode!r} and has {len(raw)} bytes")
        return np.frombuffer(raw, np.uint8).reshape(h, w, CHANNELS[mode])


ARRAYS: Known = {
    ("numpy.core.multiarray", "_reconstruct"): RecordedArray,
    ("numpy._core.multiarray", "_reconstruct"): RecordedArray,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): RecordedType,
    ("_codecs", "encode"): RecordedText,
}
"""Names in the pickle of an array, protocols 0 to 4."""

NUMBERS: Known = {
    **ARRAYS,
    ("numpy.core.multiarray", "scalar"): RecordedScalar,
    ("numpy._core.multiarray", "scalar"): RecordedScalar,
    ("numpy.core.numeric", "_frombuffer"): RecordedBuffer,
    ("numpy._core.numeric", "_frombuffer"): RecordedBuffer,
}
"""Those, and the names of single numbers and of arrays in protocol 5."""

IMAGES: Known = {
    ("_codecs", "encode"): RecordedText,
    ("PIL.Image", "Image"): RecordedImage,
    ("PIL.PngImagePlugin", "PngImageFile"): RecordedImage,
    ("PIL.JpegImagePlugin", "JpegImageFile"): RecordedImage,
}
"""Names in the pickle of a Pillow image, protocol 2 and later."""


def _whole_numbers(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(type(part) is int for part in cast("tuple[object, ...]", value))


def _shaped(raw: object, kind: object, shape: object, order: Any, where: str) -> Array:
    """The bytes ``raw`` as an array, if they are exactly as many as it takes."""
    if not isinstance(kind, RecordedType) or not isinstance(raw, bytes):
        raise ValueError(f"{where} holds an array without a type or without bytes: of objects, perhaps")
    plain = kind.plain(where)
    if not isinstance(shape, tuple) or not _whole_numbers(cast("Any", shape)):
        raise ValueError(f"{where} holds an array whose shape is no tuple of whole numbers")
    sides = cast("tuple[int, ...]", shape)
    if len(sides) > 8 or min(sides, default=0) < 0 or math.prod(sides) * plain.itemsize != len(raw):
        raise ValueError(f"{where} holds an array whose shape does not fit: {len(raw)} bytes for "
                         f"{printable(str(sides))} of {plain}")  # fmt: skip
    return np.frombuffer(raw, plain).reshape(sides, order=order)
