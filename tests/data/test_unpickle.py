"""The machine that reads strangers' pickles: what honest ones say comes out, hostile ones are refused and do nothing."""

from __future__ import annotations

import codecs
import copyreg
import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import pickletools
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image

with install_import_hook("friends.data.legacy", "typecheck.tower"):
    from friends.data.legacy.parts import KNOWN

from friends.data import recorded, recorded_torch
from friends.data import unpickle as machine
from friends.data.recorded import RecordedArray, RecordedImage, RecordedNumbers
from friends.data.recorded_torch import RecordedStorage, RecordedTensor
from friends.data.unpickle import MAX_STEPS, Name, Persistent, Recorded, UnsafePickleError, record

PROTOCOLS = range(6)
CANARY = "touched"


def read(raw: bytes) -> object:
    return record(raw, "here", "a pickle of ours", KNOWN)


def built(value: object) -> int:
    """Build every array and image on record, however it is nested; how many there were."""
    seen: set[int] = set()
    waiting, found = [value], 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, RecordedImage):
            found += item.pixels("here").size > 0
        elif isinstance(item, RecordedNumbers):
            found += item.array("here").size >= 0
    return found


# -- what honest pickles say ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_out_as_python_reads_them(protocol: int) -> None:
    shared = ["x"]
    value = [
        0, 1, -1, 255, 256, 65536, -(2**31), 2**62, -(2**63), 2**80, True, False, None, 0.5, -1e300, float("inf"),
        "", "a", "two\nlines \\ \u00e9 \u2192 \U0001f600 \ud800", [], [[1], [2, [3]]], (), (1,), (1, 2), (1, 2, 3),
        (1, 2, 3, 4), {}, {"a": 1, "b": {"c": ()}}, shared, shared, "x" * 300,
    ]  # fmt: skip
    out = read(pickle.dumps(value, protocol))
    assert out == value and repr(out) == repr(value)
    assert isinstance(out, list) and out[-2] is out[-3]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bytes_come_out(protocol: int) -> None:
    raw = bytes(range(256))
    assert read(pickle.dumps([raw, {b"k" * 300: raw}], protocol)) == [raw, {b"k" * 300: raw}]
    assert protocol < 5 or read(pickle.dumps(bytearray(raw), protocol)) == raw


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("code", recorded.NUMERIC)
def test_arrays_of_every_kind_of_number(code: str, protocol: int) -> None:
    values = np.random.default_rng(0).integers(0, 120, (3, 4, 5)).astype(code)
    for array in (values, np.asfortranarray(values), values[::2, 1:, ::-1], values[0, 0, :1], values.astype(">" + code)):
        out = read(pickle.dumps(array, protocol))
        assert isinstance(out, RecordedNumbers)
        assert np.array_equal(out.array("here"), array)
    for number in (values[0, 0, 0], np.array(values[0, 0, 0])):
        out = read(pickle.dumps(number, protocol))
        assert isinstance(out, RecordedNumbers) and out.array("here") == number
    if protocol >= 3:  # before, Python writes empty bytes as a call of bytes
        out = read(pickle.dumps(values[:0], protocol))
        assert isinstance(out, RecordedNumbers) and out.array("here").shape == (0, 4, 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_of_every_kind(protocol: int) -> None:
    base = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 100
    views = [base, base.t(), base[2:, 1], base[:0], base[0, 0], base[:1].expand(5, 4), base.clone().requires_grad_()]
    kinds = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
    for tensor in [*views, *(base.to(getattr(torch, kind)) for kind in kinds)]:
        out = read(pickle.dumps(tensor, protocol))
        assert isinstance(out, RecordedTensor)
        assert np.array_equal(out.array("here"), tensor.detach().numpy())
        assert out.array("here").dtype == tensor.detach().numpy().dtype


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("file", [None, "PNG", "JPEG"])
def test_images_made_and_opened(mode: str, file: str | None, protocol: int) -> None:
    shape = (6, 5, 3) if mode == "RGB" else (6, 5)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    assert image.mode == mode
    if file:
        stream = io.BytesIO()
        image.save(stream, file)
        image = Image.open(stream, formats=[file])
    out = read(pickle.dumps((image, 3), protocol))
    assert isinstance(out, tuple) and isinstance(out[0], RecordedImage) and out[1] == 3
    assert np.array_equal(out[0].pixels("here").squeeze(), np.asarray(image))


def test_images_of_other_modes_are_named() -> None:
    for mode in ("1", "P", "RGBA", "CMYK", "I", "F", "LA", "YCbCr"):
        out = read(pickle.dumps(Image.new(mode, (4, 4)), 4))
        assert isinstance(out, RecordedImage)
        with pytest.raises(ValueError, match=rf"^it holds an image of mode '{mode}', not 'L' or 'RGB'"):
            out.pixels("it")


def test_a_cycle_is_read_and_does_not_loop() -> None:
    value: list[Any] = [1]
    value.append(value)
    out = read(pickle.dumps(value, 4))
    assert isinstance(out, list) and out[1] is out and built(out) == 0


# -- hostile pickles ------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *args: object, state: object = None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.call


class New:
    """Pickles as ``cls.__new__``, with keywords (NEWOBJ_EX)."""

    def __reduce__(self) -> Any:
        return copyreg.__newobj_ex__, (New, (), {"a": 1})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """A name by STACK_GLOBAL, which follows dots."""
    return text(module) + text(attribute) + b"\x93"


def ask(module: str, attribute: str, args: bytes = b"(tR") -> bytes:
    return b"\x80\x04" + name(module, attribute) + args + b"."


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
DTYPE = b"cnumpy\ndtype\n"
SHELL = text(f"touch {CANARY}") + b"\x85R"
TOUCH = Call(os.system, f"touch {CANARY}")


def torch_file(replace: int | None = None, by: bytes = b"") -> bytes:
    """A tensor's storage in torch's old format, one of its five pickles replaced."""
    stream = io.BytesIO()
    torch.save(torch.arange(4).untyped_storage(), stream, _use_new_zipfile_serialization=False)
    torch.save(torch.arange(4).storage()._typed_storage() if False else torch.arange(4), stream := io.BytesIO(),
               _use_new_zipfile_serialization=False)  # fmt: skip
    raw = recorded_storage_bytes()
    parts: list[bytes] = []
    rest = io.BytesIO(raw)
    for _ in range(5):
        start = rest.tell()
        for _ in pickletools.genops(rest):
            pass
        parts.append(raw[start : rest.tell()])
    parts.append(raw[rest.tell() :])
    if replace is not None:
        parts[replace] = by
    return b"".join(parts)
