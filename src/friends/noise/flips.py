"""Noise of which every value is +-zeta, as the few places where it differs from noise that a seed makes.

The places of a row are kept as gaps, a byte each: a byte below 255 passes over so many values and marks the next one;
255 passes over 255 values and marks none. So a row without flips takes no byte, its last byte is never 255, and an
offset for each row lets any row be read without the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from friends.noise.philox import sign_bits, signed
from friends.noise.picked import Coded, Parts, Picked, chunks
from friends.noise.rows import Int64s

ESCAPE = 255

MOST = 2**31 - 1
"""Bytes of gaps in a shard, which offsets of 32 bits reach."""


class BadRowError(ValueError):
    """The bytes of a row mark no places in it."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}: its gaps pass beyond its last value, or end without a mark")
        self.row = row


def to_gaps(marked: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], Int64s]:
    """The marks of rows ``(b, values)`` as bytes, one row after the other, and how many bytes each row has."""
    row, place = np.nonzero(marked)
    before = np.roll(place, 1)
    before[np.flatnonzero(np.diff(row, prepend=-1))] = -1
    passed = place - before - 1
    size = passed // ESCAPE + 1
    gaps = np.full(int(size.sum()), ESCAPE, np.uint8)
    gaps[np.cumsum(size) - 1] = passed % ESCAPE
    return gaps, np.bincount(np.repeat(row, size), minlength=len(marked)).astype(np.int64)


def from_gaps(gaps: NDArray[np.uint8], sizes: Int64s, values: int, starts: Int64s) -> Int64s:
    """Where the marks of all rows are in an array in which row ``i`` begins at ``starts[i]``.

    Args:
        gaps: bytes of any origin, of all rows.
        sizes: how many of them each row has; their sum is ``len(gaps)``.
        values: how many values a row has.
        starts: of each row.

    Raises:
        BadRowError: the bytes of a row pass beyond its last value, or end without a mark.
    """
    marks = gaps != ESCAPE
    passed = np.zeros(len(gaps) + 1, np.int64)
    np.cumsum(gaps + marks.view(np.uint8), out=passed[1:])  # 254 and its mark are 255: no byte overflows
    ends = np.cumsum(sizes)
    before = passed[ends - sizes]
    filled = np.flatnonzero(sizes)
    last = ends[filled] - 1
    bad = filled[(passed[last + 1] - before[filled] > values) | ~marks[last]]
    if len(bad):
        raise BadRowError(int(bad[0]))
    places = np.repeat(starts - before - 1, sizes)
    places += passed[1:]
    return places[marks]


@dataclass(frozen=True)
class Flips:
    """The coding, for rows of so many values.

    Args:
        values: of each row.
        limit: the size of every value in grey levels.
        seed: of the signs that the noise is compared with.
    """

    values: int
    limit: int
    seed: int

    def layout(self, rows: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """See :class:`friends.noise.coding.Coder`."""
        return {"gaps": ("U8", (None,)), "offsets": ("I32", (rows + 1,))}

    def encode(self, noise: NDArray[np.int8], keys: Int64s) -> Parts:
        """The noise of rows as gaps and offsets. Raises ``ValueError`` where a value is not +-limit."""
        gaps: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)]
        sizes: list[Int64s] = [np.zeros(1, np.int64)]
        for some in chunks(len(noise), self.values):
            inside = np.flatnonzero((np.abs(noise[some]) != self.limit).any(1))
            if len(inside):
                raise ValueError(f"row {some.start + inside[0]} has noise that is not +-{self.limit}/255: the coding "
                                 "'flips' is for noise of which every value is at its bound")  # fmt: skip
            some_gaps, some_sizes = to_gaps(noise[some] != self._start(keys[some]))
            gaps.append(some_gaps)
            sizes.append(some_sizes)
        offsets = np.cumsum(np.concatenate(sizes))
        if offsets[-1] > MOST:
            raise ValueError(f"{offsets[-1]} bytes of flips in a shard of {len(noise)} rows: make shards of fewer rows")
        return {"gaps": np.concatenate(gaps), "offsets": offsets.astype(np.int32)}

    def check(self, coded: Coded) -> None:
        """Raise ``ValueError`` unless the offsets cut the gaps into rows, none longer than a row can be."""
        offsets, total = coded.parts["offsets"].astype(np.int64), len(coded.parts["gaps"])
        sizes = np.diff(offsets)
        longest = self.values + self.values // ESCAPE  # a mark on every value, and all the escapes there is room for
        bad = np.flatnonzero((sizes < 0) | (sizes > longest) | (offsets[:-1] < 0) | (offsets[1:] > total))
        if len(bad):
            first, last = offsets[bad[0]], offsets[bad[0] + 1]
            raise ValueError(f"{coded.path}: row {bad[0]} is damaged: its gaps are said to be bytes {first} to {last} "
                             f"of {total}")  # fmt: skip
        if offsets[0] != 0 or offsets[-1] != total:
            raise ValueError(f"{coded.path} is damaged: its rows are said to be bytes {offsets[0]} to {offsets[-1]} of "
                             f"{total}")  # fmt: skip

    def decode(self, picked: Picked, keys: Int64s, out: NDArray[np.int8]) -> None:
        """Write the noise of rows ``(b, values)`` into ``out``. Raises ``ValueError`` naming a damaged row's file."""
        self._start(keys, out)
        gaps, sizes = _gather(picked)
        try:
            flips = from_gaps(gaps, sizes, self.values, picked.order * self.values)
        except BadRowError as error:
            name = picked.name(int(picked.order[error.row]))
            raise ValueError(f"{name} is damaged: its gaps pass beyond its last value, or end without a mark") from None
        flat = out.reshape(-1)
        flat[flips] = -flat[flips]

    def _start(self, keys: Int64s, out: NDArray[np.int8] | None = None) -> NDArray[np.int8]:
        return signed(sign_bits(keys, self.values, self.seed), self.values, self.limit, out)


def _gather(picked: Picked) -> tuple[NDArray[np.uint8], Int64s]:
    """The gaps of the rows, in the order of their shards, and how many each has."""
    bounds = picked.row[picked.order] + np.array([[0], [1]])
    for parts, part in picked.groups:
        bounds[:, part] = parts["offsets"][bounds[:, part]]
    starts, sizes = bounds[0], bounds[1] - bounds[0]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    index = np.repeat(starts - ends[:-1], sizes)
    index += np.arange(len(index))
    gaps = np.empty(len(index), np.uint8)
    cuts = ends.tolist()
    for parts, part in picked.groups:
        span = slice(cuts[part.start], cuts[part.stop])
        parts["gaps"].take(index[span], out=gaps[span], mode="clip")
    return gaps, sizes
