"""Pickles of strangers, read by a machine that can remember and nothing else.

A pickle is a program for a stack machine that imports names and calls them. This is another machine for the same
programs: a name that its reader knows becomes an inert :class:`Recorded` of ours, every other name is refused, and
what the program wants called or set is written down on the record. Arrays and images are built afterwards, from the
record (:mod:`friends.data.recorded`). Python's own machine is not used, not even restricted: it allocates what a file
claims before reading it, keeps a cache of extension codes that no restriction sees, and hashes whatever a file makes
a key. ``pickletools`` of the standard library only splits the file into steps; it runs none of them.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, cast

MAX_STEPS = 1_000_000
"""More steps than this are taken for a bomb: 50,000 rows with two labels and a file name take about 200,000."""
MAX_BITS = 128
"""Longer whole numbers are refused: the longest in these files is torch's magic number, of 80 bits."""


class UnsafePickleError(ValueError):
    """A pickle asks for something that no file of its kind needs. Nothing of it was carried out."""


class Recorded:
    """What a pickle says of an object: the arguments of its making and its state, remembered and not carried out."""

    __slots__ = ("args", "state")

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class Name:
    """A name that a pickle asks for and its reader knows. ``makes`` is what stands for the result of calling it."""

    __slots__ = ("called", "makes")

    def __init__(self, called: tuple[str, str], makes: Callable[..., object] | None) -> None:
        self.called = called
        self.makes = makes


class Persistent:
    """A persistent id, as torch writes its storages."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


Known = Mapping[tuple[str, str], "Callable[..., object] | None"]
"""Module and name to what records its call; None for names that may only be mentioned."""


def record(raw: bytes, where: str, what: str, known: Known) -> object:
    """What the pickle ``raw`` describes: plain values, and :class:`Recorded` for all that is not plain.

    Args:
        raw: the whole pickle; nothing may follow it.
        where: what errors call it.
        what: what it should be, for errors: "a CIFAR pickle".
        known: the names that such a pickle needs.

    Raises:
        UnsafePickleError: it asks for anything else.
        ValueError: it is torn, a bomb, or no pickle.
    """
    stream = io.BytesIO(raw)
    try:
        value = record_next(stream, known)
        if stream.tell() != len(raw):
            raise ValueError(f"{len(raw) - stream.tell()} bytes follow its end")
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{where} is not {what}: it {error}, and nothing was run") from None
    except Exception as error:  # damaged pickles raise whatever their bytes lead to
        raise ValueError(f"{where} is torn or not {what}: {type(error).__name__}: {printable(str(error))}") from error
    return value


def record_next(stream: io.BytesIO, known: Known, *, persistent: bool = False) -> object:
    """The next pickle of a stream, which is left behind its end; see :func:`record`, but errors name no file."""
    machine = _Machine(known, persistent, stream.getbuffer().nbytes)
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if step >= MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")
        machine.step(opcode.name, argument)
    return machine.result()


def printable(text: str, longest: int = 120) -> str:
    """What a stranger's file says, short and without control characters."""
    plain = text[:longest].encode("unicode_escape").decode("ascii")
    return plain if len(text) <= longest else plain + "..."


_PLAIN = {
    "BINFLOAT", "FLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_WHOLE = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_PYTHON2 = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SILENT = {"PROTO", "FRAME", "STOP"}  # a frame's length is not believed, only what is there is read


class _Machine:
    """The stack, the memo, and the steps that plain data and recorded objects take."""

    def __init__(self, known: Known, persistent: bool, size: int) -> None:
        self.known = known
        self.size = size
        self.taken = self.made = 0  # bytes that calls take and make: an honest file holds all of them
        self.persistent = persistent
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # what lies below each mark
        self.memo: dict[int, object] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _PLAIN:
            self.stack.append(argument)
        elif name in _WHOLE:
            if argument.bit_length() > MAX_BITS:
                raise ValueError(f"it holds a whole number of {argument.bit_length()} bits")
            self.stack.append(argument)
        elif name in _PYTHON2:
            self.stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in _SILENT:
            raise UnsafePickleError(f"asks for the step {name}")

    def result(self) -> object:
        """The one value that is left at the end."""
        if self.below or len(self.stack) != 1:
            raise ValueError("it does not end with one value")
        return self.stack[0]

    def to_mark(self) -> list[object]:
        """What lies above the last mark, taken off the stack with it."""
        above = self.stack
        self.stack = self.below.pop()
        return above

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def bytearray8(self, argument: bytearray) -> None:
        self.stack.append(bytes(argument))

    def get(self, index: int | str) -> None:
        self.stack.append(self.memo[int(index)])

    def put(self, index: int | str) -> None:
        at = int(index)
        if not 0 <= at < MAX_STEPS:  # honest files count from 0; numbers chosen to collide would take for ever
            raise ValueError("its memo is numbered out of range")
        self.memo[at] = self.stack[-1]

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def tuple_of(self, n: int) -> None:
        if len(self.stack) < n:
            raise ValueError("it takes more off the stack than there is")
        self.stack[-n:] = [tuple(self.stack[-n:])]

    def append(self, _: object) -> None:
        item = self.stack.pop()
        self.extend([item])

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"it appends to a {type(target).__name__}")
        cast("list[object]", target).extend(items)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise ValueError(f"it sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes)):  # their hashes are cheap and cannot be made to collide
                raise ValueError(f"a key of a dict is a {type(key).__name__}")
            cast("dict[str | bytes, object]", target)[key] = value

    def dict_of_marked(self, _: object) -> None:
        items = self.to_mark()
        self.stack.append({})
        self.update(items)

    def find(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.find_name(module, name)

    def find_on_stack(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnsafePickleError("asks for a name that is no text")
        self.find_name(module, name)

    def find_name(self, module: str, name: str) -> None:
        called = (module, name)
        if called not in self.known:
            raise UnsafePickleError(f"asks for {printable(f'{module}.{name}')}")
        self.stack.append(Name(called, self.known[called]))

    def old_instance(self, argument: str) -> None:
        self.find(argument)
        raise UnsafePickleError(f"asks for an instance of {printable(argument)} in the form of Python 2")

    def call(self, _: object) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Name) or called.makes is None or not isinstance(args, tuple):
            what = ".".join(called.called) if isinstance(called, Name) else type(called).__name__
            raise UnsafePickleError(f"asks for a call of {what}")
        given = cast("tuple[object, ...]", args)
        made = called.makes(*given)
        self.taken += sum(len(arg) for arg in given if isinstance(arg, bytes))
        self.made += len(made) if isinstance(made, bytes) else 0
        if max(self.taken, self.made) > self.size:
            raise ValueError("it uses more bytes than it has")
        self.stack.append(made)

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Recorded):
            what = ".".join(target.called) if isinstance(target, Name) else type(target).__name__
            raise ValueError(f"it sets the state of {what}")
        target.__setstate__(state)

    def persist(self, _: object) -> None:
        if not self.persistent:
            raise UnsafePickleError("asks for a persistent id")
        self.stack.append(Persistent(self.stack.pop()))


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BYTEARRAY8": _Machine.bytearray8,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "LIST": lambda machine, _: _push(machine, list),
    "TUPLE": lambda machine, _: _push(machine, tuple),
    "DICT": _Machine.dict_of_marked,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.update(machine.to_mark()),
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.find_on_stack,
    "INST": _Machine.old_instance,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persist,
}


def _push(machine: _Machine, make: Callable[[list[object]], object]) -> None:
    items = machine.to_mark()
    machine.stack.append(make(items))
