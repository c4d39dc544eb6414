"""Coded rows, picked out of the files of a store in any order, a cacheful at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friends.noise.rows import Int64s

Parts = Mapping[str, NDArray[Any]]
"""The tensors of a shard, by name."""

_CHUNK = 1 << 20
"""Values decoded at once: few enough for the second-level cache, enough for the calls to cost little."""


@dataclass(frozen=True)
class Coded:
    """The coded noise of some rows, and the file that it is in."""

    path: Path
    parts: Parts


class Picked:
    """Some rows of some shards, in any order.

    Args:
        shards: all that there are.
        shard: ``(b,)`` in which of them each row is.
        row: ``(b,)`` where it is in there.

    ``order`` are the same rows again, as places in ``shard`` and ``row``, shard by shard; ``groups`` are the tensors of
    every shard that is needed, and the part of ``order`` that its rows are.
    """

    def __init__(self, shards: Sequence[Coded], shard: Int64s, row: Int64s) -> None:
        self.shards, self.shard, self.row = shards, shard, row
        self.order = np.argsort(shard, kind="stable")
        shard_of = shard[self.order]
        starts = [0, *((shard_of[1:] != shard_of[:-1]).nonzero()[0] + 1).tolist()] if len(shard) else []
        self.groups = [(shards[number].parts, slice(start, stop)) for number, (start, stop) in
                       zip(shard_of[starts].tolist(), pairwise((*starts, len(shard))), strict=True)]  # fmt: skip

    def __len__(self) -> int:
        return len(self.row)

    def name(self, place: int) -> str:
        """What to call one of the rows in an error."""
        return f"{self.shards[int(self.shard[place])].path}: row {self.row[place]}"


def chunks(rows: int, values: int) -> Iterator[slice]:
    """The rows in parts of about as many values as the cache takes."""
    step = max(1, _CHUNK // values)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
