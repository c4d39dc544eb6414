"""The machine that reads strangers' pickles: honest ones come out, hostile ones are refused and do nothing."""

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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
from friends.data.recorded import RecordedImage, RecordedNumbers
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
    for array in (
        values,
        np.asfortranarray(values),
        values[::2, 1:, ::-1],
        values[0, 0, :1],
        values.astype(">" + code),
    ):
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


def torch_file(others: dict[int, bytes] | None = None) -> bytes:
    """The file of torch's that is the storage of a pickled tensor; some of its five pickles may be others."""
    out = read(pickle.dumps(torch.arange(4), 4))
    assert isinstance(out, RecordedTensor) and isinstance(out.args[0], RecordedStorage)
    whole = out.args[0].args[0]
    assert isinstance(whole, bytes)
    stream, parts = io.BytesIO(whole), list[bytes]()
    for _ in range(5):
        start = stream.tell()
        assert list(pickletools.genops(stream))
        parts.append(whole[start : stream.tell()])
    return b"".join((others or {}).get(i, part) for i, part in enumerate(parts)) + whole[stream.tell() :]


def tensor(file: bytes, offset: int = 0, sides: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85") -> bytes:
    """A pickled tensor upon the bytes of a file of torch's."""
    held = name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(file)) + file + b"\x85R"
    numbers = b"J" + struct.pack("<i", offset) + sides + strides + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"\x80\x04" + name("torch._utils", "_rebuild_tensor_v2") + b"(" + held + numbers + b"tR."


def zipped() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": TOUCH}, stream)
    return stream.getvalue()


def dumps(value: object, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol)


def image(state: object) -> bytes:
    return b"\x80\x04cPIL.Image\nImage\n)\x81" + dumps(state)[2:-1] + b"b."


class Old:
    """Pickles as an instance with slots."""

    def __init__(self) -> None:
        self.a = 1


HOSTILE: dict[str, tuple[bytes, str]] = {
    # calls of what Python has at hand
    "os.system": (dumps(TOUCH), r"asks for (posix|nt)\.system"),
    "os.system of protocol 0": (dumps(TOUCH, 0), r"asks for (posix|nt)\.system"),
    "subprocess.Popen": (dumps(Call(subprocess.Popen, ["touch", CANARY])), r"asks for subprocess\.Popen"),
    "builtins.eval": (dumps(Call(eval, f"open({CANARY!r}, 'w')")), r"asks for builtins\.eval"),
    "builtins.exec of Python 2": (b"c__builtin__\nexec\n(S\"open('touched','w')\"\ntR.", r"asks for __builtin__\.exec"),
    "builtins.open": (dumps(Call(open, CANARY, "w")), r"asks for (_?io|builtins)\.open"),
    "builtins.getattr": (dumps(Call(getattr, "text", "upper")), r"asks for builtins\.getattr"),
    "builtins.__import__": (dumps(Call(__import__, "antigravity")), r"asks for builtins\.__import__"),
    "importlib.import_module": (dumps(Call(importlib.import_module, "antigravity")), r"asks for importlib\.import"),
    "a module that is not imported": (ask("antigravity", "webbrowser"), r"asks for antigravity\.webbrowser"),
    "operator.methodcaller": (dumps(operator.methodcaller("unlink")), r"asks for operator\.methodcaller"),
    "operator.attrgetter": (dumps(operator.attrgetter("system")), r"asks for operator\.attrgetter"),
    "functools.partial": (dumps(functools.partial(os.system, "true")), r"asks for functools\.partial"),
    "marshal.loads": (dumps(Call(marshal.loads, b"code")), r"asks for marshal\.loads"),
    "types.FunctionType": (ask("types", "FunctionType"), r"asks for types\.FunctionType"),
    "pickle.loads": (dumps(Call(pickle.loads, dumps(TOUCH))), r"asks for _?pickle\.loads"),
    "shutil.rmtree": (dumps(Call(shutil.rmtree, ".")), r"asks for shutil\.rmtree"),
    "builtins.object": (ask("builtins", "object", b")\x81"), r"asks for builtins\.object"),
    "builtins.dict.update": (ask("builtins", "dict.update"), r"asks for builtins\.dict\.update"),
    "__main__": (ask("__main__", "CANARY"), r"asks for __main__\.CANARY"),
    "our own code": (ask("friends.data.files", "write_text"), r"asks for friends\.data\.files\.write_text"),
    "our own recorder": (ask("friends.data.recorded", "RecordedArray"), r"asks for friends\.data\.recorded"),
    # chains of __reduce__
    "a chain that ends in a shell": (dumps(Call(list, Call(map, os.system, ["true"]))), r"asks for builtins"),
    "a list iterator": (dumps(Call(bytes, [1], state={"a": TOUCH})), r"asks for builtins\.bytes"),
    "copyreg._reconstructor": (dumps(Old(), 0), r"asks for copy_?reg\._reconstructor"),
    "copyreg.__newobj__": (ask("copyreg", "__newobj__"), r"asks for copyreg\.__newobj__"),
    "copyreg.add_extension": (ask("copyreg", "add_extension"), r"asks for copyreg\.add_extension"),
    "an instance of a class": (dumps(Old()), r"asks for .*\.Old"),
    # names that dots or odd text lead away from the ones that are known
    "PIL.Image.Image.save": (ask("PIL.Image", "Image.save"), r"asks for PIL\.Image\.Image\.save"),
    "PIL.Image.Image.__init__.__globals__": (ask("PIL.Image", "Image.__init__.__globals__"), r"asks for PIL\.Image"),
    "numpy.ndarray.tofile": (ask("numpy", "ndarray.tofile"), r"asks for numpy\.ndarray\.tofile"),
    "numpy.ndarray.__subclasses__": (ask("numpy", "ndarray.__subclasses__"), r"asks for numpy\.ndarray\.__sub"),
    "a name that is no text": (b"\x80\x04K\x01K\x02\x93.", r"asks for a name that is no text"),
    "a name of control characters": (ask("\x1b[2J\n\ud7ff", "a\0"), r"asks for \\x1b\[2J\\n\\ud7ff\.a\\x00,"),
    "a name without end": (ask("a" * 10**6, "b"), r"asks for a{120}\.\.\.,"),
    # what Pillow, numpy and torch have at hand
    "PIL.Image.open": (ask("PIL.Image", "open", text("/etc/passwd") + b"\x85R"), r"asks for PIL\.Image\.open"),
    "PIL.ImageFile": (ask("PIL.ImageFile", "ImageFile"), r"asks for PIL\.ImageFile\.ImageFile"),
    "PIL.EpsImagePlugin": (ask("PIL.EpsImagePlugin", "EpsImageFile"), r"asks for PIL\.EpsImagePlugin"),
    "PIL.ImageMath.eval": (ask("PIL.ImageMath", "unsafe_eval"), r"asks for PIL\.ImageMath\.unsafe_eval"),
    "numpy.load": (b"\x80\x02cnumpy\nload\n(X\x07\x00\x00\x00touchedtR.", r"asks for numpy\.load"),
    "numpy.memmap": (ask("numpy", "memmap", text(CANARY) + b"\x85\x81"), r"asks for numpy\.memmap"),
    "numpy's runstring": (ask("numpy.testing._private.utils", "runstring"), r"asks for numpy\.testing"),
    "an array of a subtype": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x00\x85C\x01btR.",
        r"asks for an array of a class of its own",
    ),
    "numpy.matrix": (dumps(np.array([[1]]).view(np.matrix), 2), r"asks for numpy(\.matrixlib\.defmatrix)?\.matrix"),
    "torch.load": (ask("torch", "load", text(CANARY) + b"\x85R"), r"asks for torch\.load"),
    "torch.hub.load": (ask("torch.hub", "load"), r"asks for torch\.hub\.load"),
    "torch.storage.torch.load": (ask("torch.storage", "torch.load"), r"asks for torch\.storage\.torch\.load"),
    "a storage that holds a shell": (tensor(dumps(TOUCH, 2)), r"asks for (posix|nt)\.system"),
    "a storage that is a zip file": (tensor(zipped()), r"torn"),
    **{f"a storage whose pickle {i} is a shell": (tensor(torch_file({i: dumps(TOUCH)})), r"asks for (posix|nt)\.sys")
       for i in range(5)},
    "a storage of another class": (
        tensor(torch_file({3: b"(" + text("storage") + b"ctorch\nload\n" + text("0") + text("cpu") + b"K\x04NtQ."})),
        r"asks for torch\.load",
    ),
    "hooks of a tensor": (
        b"\x80\x04ccollections\nOrderedDict\n)R" + text("a") + b"K\x01s.", r"sets an item of a RecordedHooks",
    ),
    "hooks that are called": (b"\x80\x04ccollections\nOrderedDict\n(K\x01tR.", r"torn"),
    "a codec that unpacks": (dumps(Call(codecs.encode, "x", "zlib_codec")), r"asks for the codec 'zlib_codec'"),
    "a codec that is looked up": (dumps(Call(codecs.encode, "x", "antigravity")), r"asks for the codec"),
    "a codec that is no text": (ask("_codecs", "encode", text("a") + b"](K\x01e\x86R"), r"asks for the codec 'list'"),
    # steps of the machine that no honest file takes
    "INST": (b"(S'touch touched'\nios\nsystem\n.", r"asks for os\.system"),
    "INST of a known name": (b"(iPIL.Image\nImage\n.", r"asks for an instance of PIL\.Image Image"),
    "OBJ": (b"\x80\x02(cPIL.Image\nImage\no.", r"asks for the step OBJ"),
    "NEWOBJ_EX": (b"\x80\x04cPIL.Image\nImage\n)}\x92.", r"asks for the step NEWOBJ_EX"),
    "NEWOBJ_EX by copyreg": (dumps(New(), 2), r"asks for (functools\.partial|copyreg\.__newobj_ex__)"),
    "EXT1": (b"\x80\x02\x82\xf0.", r"asks for the step EXT1"),
    "EXT4": (b"\x80\x02\x84\xf0\x00\x00\x00.", r"asks for the step EXT4"),
    "PERSID": (b"P../../etc/passwd\n.", r"asks for the step PERSID"),
    "BINPERSID": (b"\x80\x02X\x01\x00\x00\x00aQ.", r"asks for a persistent id"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", r"asks for the step NEXT_BUFFER"),
    "a set of what can be hashed": (dumps({1, 2}), r"asks for the step EMPTY_SET"),
    "a call of a value": (b"\x80\x02X\x01\x00\x00\x00a)R.", r"asks for a call of str"),
    "a call of a record": (b"\x80\x02" + ARRAY + b")R.", r"asks for a call of RecordedArray"),
    "a call of a name that may only be mentioned": (b"\x80\x02cnumpy\nndarray\n)R.", r"asks for a call of numpy\.nd"),
    "a call without a tuple": (b"\x80\x02cPIL.Image\nImage\n]R.", r"asks for a call of PIL\.Image\.Image"),
    "a call of a torch class": (b"\x80\x02ctorch\nLongStorage\n)R.", r"asks for torch\.LongStorage"),
    "attributes of a name": (b"\x80\x02cPIL.Image\nImage\n}X\x04\x00\x00\x00openNsb.", r"sets the state of PIL\.Image"),
    "attributes of a list": (b"\x80\x02]}X\x06\x00\x00\x00appendNsb.", r"sets the state of list"),
    "attributes of text": (b"\x80\x02X\x01\x00\x00\x00a}b.", r"sets the state of str"),
    "items of a record": (b"\x80\x02" + ARRAY + b"K\x00K\x01s.", r"sets an item of a RecordedArray"),
    "items appended to a record": (b"\x80\x02" + ARRAY + b"K\x00a.", r"appends to a RecordedArray"),
    "a key that is a tuple": (b"\x80\x02}K\x01\x85K\x02s.", r"a key of a dict is a tuple"),
    "a key that is a number": (b"\x80\x02}K\x01K\x02s.", r"a key of a dict is a int"),
    "two pickles in one": (dumps(1) + dumps(TOUCH), r"bytes follow its end"),
    # contents that are not what they say
    "an array of objects": (dumps(np.array([{"a": 1}, None], dtype=object)), r"of objects, perhaps"),
    "an array of a structure": (dumps(np.zeros(2, "u1,u1")), r"holds an array of 'V2', not of numbers"),
    "an array of text": (dumps(np.array(["ab"])), r"holds an array of 'U2', not of numbers"),
    "an array of dates": (dumps(np.zeros(1, "M8[s]")), r"holds an array of 'M8', not of numbers"),
    "an array of arrays": (
        b"\x80\x02" + ARRAY + b"(K\x01K\x01\x85" + DTYPE + b"(X\x02\x00\x00\x00u1K\x00K\x01tR(K\x03U\x01|"
        + DTYPE + text("u1") + b"\x85RK\x02\x85\x86NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C\x01atb.",
        r"not of numbers",
    ),
    "axes that are no order": (
        dumps(np.zeros((2, 3, 4)).transpose(2, 0, 1), 5).replace(b"K\x02K\x00K\x01", b"K\x02K\x00K\x02"),
        r"an array whose axes are in no order",
    ),
    "an image without contents": (b"\x80\x04cPIL.Image\nImage\n)\x81.", r"an image without contents"),
    "an image whose mode is a list": (image([{}, ["RGB"], (1, 1), None, b"abc"]), r"an image of mode"),
    "an image of another class in its state": (image([{"a": TOUCH}, "RGB", (1, 1), None, b"abc"]), r"asks for"),
}  # fmt: skip
assert len(HOSTILE) >= 80

_events: list[str] | None = None


def _watch(event: str, _: object) -> None:
    if _events is not None:
        _events.append(event)


sys.addaudithook(_watch)  # every import, open, exec, socket, process and unpickled name is announced to it


Quiet = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Quiet:
    """A block in which nothing may be opened, imported, run or changed."""
    monkeypatch.chdir(tmp_path)
    machine.printable("\ud800\n")  # codecs are imported at their first use
    read(dumps([1.5, "\u00e9\n", (1, 2), "a"], 0))
    parts = [c for part in (machine, recorded, recorded_torch) for c in vars(part).values() if isinstance(c, type)]
    classes = [c for c in parts if issubclass(c, (Recorded, Name, Persistent))]
    assert len(classes) > 8

    def state() -> list[object]:
        return [dict(os.environ), set(sys.modules), sorted(os.listdir()), os.getcwd(), [dict(vars(c)) for c in classes]]

    @contextmanager
    def block() -> Iterator[None]:
        global _events
        before = state()
        _events = []
        try:
            yield
        finally:
            happened, _events = _events, None
            assert set(happened) <= {"builtins.id"}  # that is built()
            assert state() == before

    return block


@pytest.mark.parametrize("trick", HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_happens(trick: str, quietly: Quiet) -> None:
    raw, words = HOSTILE[trick]
    with pytest.raises(ValueError, match=words) as refusal, quietly():
        built(read(raw))
    assert str(refusal.value).startswith("here ") and len(str(refusal.value)) < 400
    asks = "asks for" in words
    assert isinstance(refusal.value, UnsafePickleError) == asks
    assert not asks or str(refusal.value).endswith(", and nothing was run")


def test_the_watch_sees_what_pickle_would_have_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could not fail."""
    global _events
    monkeypatch.chdir(tmp_path)
    _events = []
    pickle.loads(HOSTILE["os.system"][0])  # noqa: S301
    events, _events = _events, None
    assert {"pickle.find_class", "os.system"} <= set(events) and (tmp_path / CANARY).exists()


def test_extension_codes_are_refused_though_python_has_them_cached(quietly: Quiet) -> None:
    """Python's machine takes what it has loaded once from a cache, past every restriction."""
    copyreg.add_extension("os", "system", 0xF0)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system  # noqa: S301
        with pytest.raises(UnsafePickleError, match="asks for the step EXT1"), quietly():
            read(HOSTILE["EXT1"][0])
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


# -- bombs ----------------------------------------------------------------------------------------------------

DEEP = 100_000
STEPS = 50_000
TWICE = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(100))
"""A tuple of the last tuple twice, a hundred times over: 300 bytes that a hash or a comparison never gets through."""
ENDLESS = b"()\x94" + TWICE + b"t"
STORED = torch_file()


BOMBS: dict[str, tuple[bytes, str]] = {
    "bytes of a giant length": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.", "torn"),
    "bytes of 30 GB": (b"\x80\x04\x8e" + struct.pack("<Q", 30 << 30) + b"abc.", "torn"),
    "bytes of more than 2 ** 63": (b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.", "torn"),
    "text of a giant length": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.", "torn"),
    "a bytearray of 30 GB": (b"\x80\x05\x96" + struct.pack("<Q", 30 << 30) + b"abc.", "torn"),
    "a number of a giant length": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.", "torn"),
    "a number of a negative length": (b"\x80\x02\x8b" + struct.pack("<i", -1) + b"abc.", "torn"),
    "a number of a million bits": (b"\x80\x02\x8b" + struct.pack("<i", 125_000) + b"\x7f" * 125_000 + b".", "of 999"),
    "a number of a million digits": (b"I" + b"9" * 10**6 + b"\n.", "torn"),
    "a memo at 2 ** 32 - 1": (b"\x80\x02]r\xff\xff\xff\xff.", "numbered out of range"),
    "a memo at -1": (b"]p-1\n.", "numbered out of range"),
    "a memo whose numbers collide": (b"]p%d\n." % (2**61 - 1), "numbered out of range"),
    "lists without end": (b"\x80\x02" + b"]" * STEPS + b".", f"more than {STEPS} steps"),
    "marks without end": (b"(" * (STEPS - 1) + b".", "does not end with one value"),
    "a hash that never ends": (b"\x80\x04}" + ENDLESS + b"K\x01s.", "a key of a dict is a tuple"),
    "text that never ends": (
        b"\x80\x04" + name("_codecs", "encode") + text("a") + ENDLESS + b"\x86R.", "asks for the codec 'tuple'",
    ),
    "an error that never ends": (b"\x80\x04" + name("_codecs", "encode") + ENDLESS + b"R.", "torn"),
    "a comparison that never ends": (
        tensor(torch_file({3: b"(" + text("storage") + b"ctorch\nLongStorage\n" + ENDLESS + text("cpu") + b"K\x04NtQ.",
                           4: b"\x80\x04]" + ENDLESS + b"a."})), "no plain storage",
    ),
    "bytes made again and again": (
        b"\x80\x02](c_codecs\nencode\nq\x00" + text("x" * 10**5) + text("latin1") + b"\x86q\x01R"
        + b"h\x00h\x01R" * 50_000 + b"e.", "uses more bytes than it has",
    ),
    "files within the file, again and again": (
        b"\x80\x02](ctorch.storage\n_load_from_bytes\nq\x00" + b"B" + struct.pack("<I", 10**5) + b"x" * 10**5
        + b"\x85q\x01R" + b"h\x00h\x01R" * 1000 + b"e.", "uses more bytes than it has",
    ),
    "an image of a giant size": (image([{}, "RGB", (10**5, 10**5), None, b"abc"]), "claims 100000x100000 pixels"),
    "an image of a size of 10 ** 38": (image([{}, "RGB", (10**30, 10**8), None, b"abc"]), "claims 1000"),
    "an image of a negative size": (image([{}, "RGB", (-1, -1), None, b"abc"]), "claims -1x-1 pixels"),
    "an image of a size in another form": (image([{}, "RGB", 3, None, b"abc"]), "without a size"),
    "a tensor that repeats one number": (
        tensor(STORED, 0, b"J\x00\x00\x00\x7f\x85", b"K\x00\x85"), "of 2130706432 numbers",
    ),
    "a tensor of 2 ** 120 numbers": (
        tensor(STORED, 0, (b"\x8a\x05" + b"\x00" * 4 + b"\x40") + b"\x85", b"K\x00\x85"), "of 274877906944 numbers",
    ),
    "a tensor beyond its storage": (tensor(STORED, 1), "up to number 4 of the 4"),
    "a tensor before its storage": (tensor(STORED, -1), "without a storage, offset, shape or strides"),
    "a tensor of negative strides": (tensor(STORED, 3, strides=b"J\xff\xff\xff\xff\x85"), "without a storage"),
    "a tensor of more sides than strides": (tensor(STORED, sides=b"K\x02K\x02\x86"), "without a storage"),
    "a tensor of fractional sides": (tensor(STORED, sides=b"G" + struct.pack(">d", 4) + b"\x85"), "without a storage"),
    "a storage that claims more than it has": (tensor(STORED[:-32]), "0 bytes for 4 numbers"),
    "a storage of 2 ** 62 numbers": (
        tensor(STORED[:-40] + struct.pack("<Q", 2**62) + STORED[-32:]), "32 bytes for 4611686018427387904 numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_take_memory(bomb: str, quietly: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, words = BOMBS[bomb]
    monkeypatch.setattr(machine, "MAX_STEPS", STEPS)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words) as refusal, quietly():
            built(read(raw))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(refusal.value)) < 400
    assert peak < max(16 << 20, 200 * len(raw))


def test_the_longest_file_that_is_read_is_no_bomb() -> None:
    """CIFAR-100's training file: two labels and a name, which Python 2 also numbers, for each of 50,000 rows."""
    n = 50_000
    labels = b"](" + b"K\x07" * n + b"e"
    names = b"](" + b"".join(b"U\x03abcr" + struct.pack("<i", i) for i in range(n)) + b"e"
    raw = b"\x80\x02(" + labels + labels + names + b"t."
    steps = sum(1 for _ in pickletools.genops(raw))
    assert 4 * n < steps < MAX_STEPS / 4
    assert isinstance(out := read(raw), tuple) and [len(part) for part in out] == [n, n, n]


NESTS: dict[str, bytes] = {
    "tuples": b"\x80\x02]" + b"\x85" * DEEP + b".",
    "lists": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "dicts": b"\x80\x02}" + (text("a") + b"}") * (DEEP // 3) + b"s" * (DEEP // 3) + b".",
    "marked lists": b"\x80\x02" + b"](" * (DEEP // 2) + b"e" * (DEEP // 2) + b".",
    "records": (
        b"\x80\x04"
        + name("PIL.Image", "Image")
        + b"\x94"
        + b"h\x00" * (DEEP // 3)
        + b")R"
        + b"\x85R" * (DEEP // 3)
        + b"."
    ),
    "states": b"\x80\x04" + b"cPIL.Image\nImage\n)R" * (DEEP // 10) + b"b" * (DEEP // 10 - 1) + b".",
}


@pytest.mark.parametrize("nest", NESTS)
def test_deep_nesting_neither_recurses_nor_crashes(nest: str, quietly: Quiet) -> None:
    with quietly():
        value = read(NESTS[nest])
    if nest in ("records", "states"):
        with pytest.raises(ValueError, match="an image without contents"):
            built(value)
    else:
        assert built(value) == 0


# -- damaged pickles ------------------------------------------------------------------------------------------


def honest() -> list[bytes]:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)) for _ in range(2)]
    values: list[object] = [
        [(picture, label) for label, picture in enumerate(pictures)],
        (pictures[0], 1, torch.rand(3, 2, 2), [1, 2]),
        torch.tensor([3, 1, 2]),
        rng.integers(0, 99, 5),
        {"target class": 1, "target index": np.int64(3), "base indices": np.arange(3)},
        {b"data": np.zeros((2, 3), np.uint8), b"labels": [1, 2]},
    ]
    return [pickle.dumps(value, protocol) for value in values for protocol in (2, 4, 5)]


def damaged(raw: bytes, others: list[bytes], rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, end = sorted((rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)))
        other = rng.choice(others)
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[rng.randrange(len(out))] = rng.randrange(256)
        elif kind == 1 and out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at:at] = out[at : min(end, at + 64)]
        elif kind == 3:
            del out[at : min(end, at + rng.choice((1, 4, 64)))]
        elif kind == 4:
            start = rng.randrange(len(other))
            out[at : at + rng.choice((0, 8))] = other[start : start + rng.randrange(40)]
        else:
            out[at:at] = rng.choice((b"\xff" * 8, b"\x00" * 4, b"\x7f\xff\xff\xff", struct.pack("<i", -1)))
    return bytes(out)


def outcome(raw: bytes) -> str:
    try:
        built(read(raw))
    except UnsafePickleError:
        return "unsafe"
    except ValueError as error:
        assert str(error)
        return "refused"
    return "value"


NAMES = [b"%s\n%s\n" % (m.encode(), n.encode()) for m, n in [*KNOWN, ("os", "system"), ("builtins", "eval")]]


def scribbled(rng: random.Random) -> bytes:
    """Random steps of the machine with arguments that look right."""
    out = bytearray(b"\x80\x04" if rng.random() < 0.5 else b"")
    for _ in range(rng.randrange(1, 40)):
        opcode = rng.choice(pickletools.opcodes)
        out += opcode.code.encode("latin-1")
        kind = opcode.arg
        if kind is None:
            continue
        if kind.name == "stringnl_noescape_pair":
            out += rng.choice(NAMES)
        elif "nl" in kind.name:
            out += rng.choice((b"1\n", b"01\n", b"-7L\n", b"'a'\n", b"0.5\n", b"\\u00e9\n", b"latin1\n"))
        else:
            size = {"uint1": 1, "uint2": 2, "float8": 8, "uint8": 8}.get(kind.name, 4)
            length = rng.randrange(6)
            if kind.name[-1] in "148" and kind.n != size:  # counted: the count, then as many bytes
                size = {"1": 1, "4": 4, "8": 8}[kind.name[-1]]
                out += length.to_bytes(size, "little") + rng.choice((b"latin1", b"u1|<RGB", b"\x01" * 6))[:length]
            else:
                out += rng.randrange(8).to_bytes(size, "little")
    return bytes(out + b".")


@pytest.mark.parametrize("kind", ["damaged", "scribbled"])
def test_whatever_the_bytes_say_the_outcome_is_a_value_or_a_value_error(kind: str, quietly: Quiet) -> None:
    rng, samples = random.Random(0), honest()
    cases = [damaged(rng.choice(samples), samples, rng) if kind == "damaged" else scribbled(rng) for _ in range(5000)]
    tracemalloc.start()
    try:
        with quietly():
            outcomes = Counter(map(outcome, cases))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(outcomes) == 3 and min(outcomes.values()) > 20, outcomes
    assert peak < 8 << 20


@pytest.mark.parametrize("cut", range(0, 100, 7))
def test_a_torn_pickle_is_no_value(cut: int) -> None:
    for raw in honest():
        with pytest.raises(ValueError, match=r"^here is torn or not a pickle of ours: "):
            read(raw[: len(raw) * cut // 100])
