"""How noise is kept on disk: a byte a value, a bit a value, or what it differs in from noise that a seed makes.

=========  ====================================================  ==============================================
``int8``   grey levels                                           any noise, exactly
``bits``   the sign of each value, times one level an image      any noise; its signs and its mean size are kept
``flips``  see :mod:`friends.noise.flips`                        noise of which every value is +-zeta, exactly
=========  ====================================================  ==============================================

In ``bits``, 0 counts as negative, and the level is the rounded mean of ``|noise|``. There and in ``flips``, image plus
noise may leave [0, 255]; it is clipped where it is used, in :func:`friends.noise.add_noise`.

Stored bytes may come from anywhere. Lengths and offsets are checked when a shard is opened, gaps and levels whenever
they are read, so nothing outside of a row is ever touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from friends.noise.flips import Flips
from friends.noise.philox import signed
from friends.noise.picked import Coded, Parts, Picked, chunks
from friends.noise.rows import Int64s

Coding = Literal["int8", "bits", "flips"]


@runtime_checkable
class Coder(Protocol):
    """One coding, for noise of one shape, bound and seed."""

    @property
    def values(self) -> int:
        """How many values a row has."""
        ...

    def layout(self, rows: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """Type (as safetensors calls it) and shape of each tensor of a shard; None for a length that may be any."""
        ...

    def encode(self, noise: NDArray[np.int8], keys: Int64s) -> Parts:
        """The noise of rows, ``(b, values)``, as the tensors of a shard."""
        ...

    def check(self, coded: Coded) -> None:
        """Raise ``ValueError`` unless any row can be read from tensors that have the right layout."""
        ...

    def decode(self, picked: Picked, keys: Int64s, out: NDArray[np.int8]) -> None:
        """Write the noise of rows into ``out``, ``(b, values)``. Raises ``ValueError`` naming file and row."""
        ...


def coder(coding: Coding, shape: tuple[int, int, int], limit: int, seed: int) -> Coder:
    """The coder for noise of up to ``limit`` grey levels, from starts of this seed, on images ``(c, h, w)``."""
    values = int(np.prod(shape))
    if coding == "flips":
        return Flips(values, limit, seed)
    return Bits(values, limit) if coding == "bits" else Int8(shape)


def coding_named(name: str) -> Coding:
    """The coding of this name. Raises ``ValueError`` if there is none."""
    if name not in get_args(Coding):
        raise ValueError(f"unknown coding {name!r} of noise; choose one of {', '.join(get_args(Coding))}")
    return cast(Coding, name)


def check_coding(coding: str, method: str) -> None:
    """Raise ``ValueError`` unless the coding is known and noise of this method can be kept in it."""
    if coding_named(coding) == "flips" and method != "flips":
        raise ValueError(f"the coding 'flips' keeps noise of the method 'flips' only, this is of {method!r}; use "
                         "'bits' or 'int8'")  # fmt: skip


def decode(coder: Coder, shards: Sequence[Coded], shard: Int64s, row: Int64s, keys: Int64s) -> NDArray[np.int8]:
    """The noise ``(b, values)`` of any rows: the i-th is ``row[i]`` of ``shards[shard[i]]``, with the key ``keys[i]``.

    Raises:
        ValueError: a row's bytes are no noise; its file is named.
    """
    out = np.empty((len(row), coder.values), np.int8)
    for some in chunks(len(row), coder.values):
        coder.decode(Picked(shards, shard[some], row[some]), keys[some], out[some])
    return out


@dataclass(frozen=True)
class Int8:
    """Grey levels, a byte each."""

    shape: tuple[int, int, int]

    @property
    def values(self) -> int:
        """How many values a row has."""
        return int(np.prod(self.shape))

    def layout(self, rows: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """See :class:`Coder`."""
        return {"noise": ("I8", (rows, *self.shape))}

    def encode(self, noise: NDArray[np.int8], keys: Int64s) -> Parts:
        """The noise as it is."""
        return {"noise": noise.reshape(-1, *self.shape)}

    def check(self, coded: Coded) -> None:
        """Any tensor of the right layout will do."""

    def decode(self, picked: Picked, keys: Int64s, out: NDArray[np.int8]) -> None:
        """Copy the rows into ``out``."""
        images = out.reshape(-1, *self.shape)
        for parts, part in picked.groups:
            places = picked.order[part]
            images[places] = parts["noise"][picked.row[places]]


@dataclass(frozen=True)
class Bits:
    """Signs, a bit each, and one level for each image of at most ``limit``."""

    values: int
    limit: int

    def layout(self, rows: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """See :class:`Coder`."""
        return {"signs": ("U8", (rows, -(-self.values // 8))), "level": ("U8", (rows,))}

    def encode(self, noise: NDArray[np.int8], keys: Int64s) -> Parts:
        """The signs of the noise, bit ``v mod 8`` of byte ``v div 8`` for value ``v``, and its mean size."""
        level = np.rint(np.abs(noise).mean(1, dtype=np.float64)).astype(np.uint8)
        return {"signs": np.packbits(noise > 0, axis=1, bitorder="little"), "level": level}

    def check(self, coded: Coded) -> None:
        """Any tensors of the right layout will do; levels are looked at when they are used."""

    def decode(self, picked: Picked, keys: Int64s, out: NDArray[np.int8]) -> None:
        """Write level times sign into ``out``. Raises ``ValueError`` where a level is beyond the limit."""
        signs = np.empty((len(picked), -(-self.values // 8)), np.uint8)
        level = np.empty((len(picked), 1), np.uint8)
        for parts, part in picked.groups:
            places = picked.order[part]
            row = picked.row[places]
            signs[places], level[places, 0] = parts["signs"][row], parts["level"][row]
        loud = np.flatnonzero(level > self.limit)
        if len(loud):
            raise ValueError(f"{picked.name(int(loud[0]))} holds noise of {level[loud[0], 0]}/255, beyond its zeta of "
                             f"{self.limit}/255")  # fmt: skip
        signed(signs, self.values, level, out)
