"""Tensors in an ordinary pickle, built from what it says of them.

Pickled with Python's own pickle, a tensor is a call of ``_rebuild_tensor_v2`` upon a storage, and the storage is a
call of ``_load_from_bytes`` upon the bytes of a whole file in torch's old format: five pickles (magic number, version,
machine, storage, keys), then a count and the numbers. That file is read here by the same inert machine as the pickle
around it; ``torch.load`` is not involved, so neither a file from a GPU nor a hostile one makes a difference.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from friends.data.recorded import ARRAYS, Array, RecordedNumbers
from friends.data.unpickle import Known, Name, Persistent, Recorded, UnsafePickleError, record_next

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
SMALL = 1 << 16
"""A tensor may repeat the numbers of its storage (``expand``) up to this many."""

STORED: Mapping[str, str] = {
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
}
_STORAGES: Known = {("torch", name): None for name in STORED}


class RecordedStorage(Recorded):
    """What a pickle says of a tensor's memory: a file within the file."""

    __slots__ = ("found",)

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.found: Array | None = None

    def numbers(self, where: str) -> Array:
        """All numbers in it, read-only.

        Raises:
            UnsafePickleError: it asks for more than a storage.
            ValueError: it is torn. Both begin with ``where``.
        """
        if len(self.args) != 1 or not isinstance(self.args[0], bytes):
            raise ValueError(f"{where} holds a tensor without contents")
        if self.found is not None:
            return self.found
        try:
            self.found = _storage(self.args[0])
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{where} holds a tensor that {error}, and nothing was run") from None
        except Exception as error:  # damaged pickles raise whatever their bytes lead to
            raise ValueError(f"{where} holds a torn tensor: {type(error).__name__}: {error}") from error
        return self.found


class RecordedTensor(RecordedNumbers):
    """What a pickle says of a tensor: a storage, an offset, sides and strides; gradients and hooks are left out."""

    __slots__ = ()

    def array(self, where: str) -> Array:
        """A copy of its numbers. Raises ``ValueError`` that begins with ``where``."""
        storage, offset, sides, strides, *_ = (*self.args, None, None, None, None)
        if not isinstance(storage, RecordedStorage) or not _counts((offset,)) or not _counts(sides, strides):
            raise ValueError(f"{where} holds a tensor without a storage, offset, shape or strides")
        numbers, shape, steps = storage.numbers(where), cast("Any", sides), cast("Any", strides)
        total, last = 1, cast("int", offset)
        for side, step in zip(shape, steps, strict=True):
            total *= side
            last += (side - 1) * step
        if total == 0:
            return np.empty(shape, numbers.dtype)
        if total > max(len(numbers), SMALL) or last >= len(numbers):
            raise ValueError(f"{where} holds a tensor of {total} numbers, up to number {last} of the {len(numbers)} "
                             "that are stored")  # fmt: skip
        size = numbers.itemsize
        view = np.lib.stride_tricks.as_strided(
            numbers[cast("int", offset) :], shape, [step * size for step in steps], writeable=False
        )
        return view.copy()


class RecordedHooks(Recorded):
    """The hooks of a tensor, of which there must be none."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()


TENSORS: Known = {
    ("_codecs", "encode"): ARRAYS["_codecs", "encode"],
    ("torch._utils", "_rebuild_tensor"): RecordedTensor,
    ("torch._utils", "_rebuild_tensor_v2"): RecordedTensor,
    ("torch.storage", "_load_from_bytes"): RecordedStorage,
    ("collections", "OrderedDict"): RecordedHooks,
}
"""Names in the pickle of a tensor."""


def _counts(*vectors: object) -> bool:
    """Whether these are short tuples of one length, of whole numbers that are not negative."""
    parts = [cast("tuple[object, ...]", vector) for vector in vectors if isinstance(vector, tuple)]
    if len(parts) != len(vectors) or len({len(part) for part in parts}) != 1 or len(parts[0]) > 8:
        return False
    return all(type(number) is int and 0 <= number < 1 << 40 for part in parts for number in part)


def _storage(raw: bytes) -> Array:
    """The numbers in a file of torch's old format that holds one storage."""
    stream = io.BytesIO(raw)
    heading = [record_next(stream, {}) for _ in range(3)]
    machine = cast("dict[object, object]", heading[2]) if isinstance(heading[2], dict) else {}
    if heading[:2] != [MAGIC, VERSION] or machine.get("little_endian") is not True:
        raise ValueError("no file of torch's old format, written on a little-endian machine")
    root = record_next(stream, _STORAGES, persistent=True)
    claim = root.value if isinstance(root, Persistent) else None
    if not isinstance(claim, tuple) or len(cast("Any", claim)) not in (5, 6):
        raise ValueError("it holds no storage")
    tag, kind, key, _, count, *view = cast("tuple[Any, ...]", claim)
    plain = tag == "storage" and isinstance(kind, Name) and isinstance(key, str)
    if not plain or any(part is not None for part in view):
        raise ValueError("it holds no plain storage")
    if record_next(stream, {}) != [key]:  # a key that is text: comparing deep lists has no end
        raise ValueError("its keys are not those of its storage")
    dtype = np.dtype(STORED[kind.called[1]])
    numbers = raw[stream.tell() + 8 :]
    counted = int.from_bytes(raw[stream.tell() : stream.tell() + 8], "little")
    if type(count) is not int or counted != count or len(numbers) != count * dtype.itemsize:
        raise ValueError(f"it holds {len(numbers)} bytes for {counted} numbers of {dtype}")
    return np.frombuffer(numbers, dtype)
