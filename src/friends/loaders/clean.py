"""The images of a protected data set as those see them who make, check or look up its friendly noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from friends.loaders.protected import Protected
from friends.noise.making import SAMPLE
from friends.noise.rows import Int64s, Key, Rows
from friends.noise.store import NoiseStore


class Clean:
    """The bytes that noise is made for, as a data set of images."""

    def __init__(self, data: Protected) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._data.pixels(index)


def positions_in(store: NoiseStore, data: Protected, keys: Sequence[Key] | Tensor | None) -> Int64s:
    """Where in a store made before the noise of each row is: by key, or row by row of the data set, or of the one that
    it is a ``Subset`` of. Pixels are compared; what fits is taken.

    Raises:
        ValueError: nothing fits.
    """
    n = len(data)
    candidates = [] if keys is None else [store.positions(n, keys)]
    level, rows = data.inner, np.arange(n)
    while keys is None:
        if len(level) == store.n:
            candidates.append(rows)
        if not isinstance(level, Subset):
            break
        subset = cast("Subset[Any]", level)
        level, rows = cast(Any, subset.dataset), torch.as_tensor(subset.indices).numpy()[rows]
    candidates = candidates or [store.positions(n)]  # which raises, naming both lengths
    problems = [_problem(store, data, candidate) for candidate in candidates]
    if None in problems:
        return candidates[problems.index(None)]
    raise cast(ValueError, problems[0])


def _problem(store: NoiseStore, data: Protected, candidate: Int64s) -> ValueError | None:
    """Why the store's rows are not those of the data set, as far as a sample tells."""
    try:
        store.check_rows(Rows(Clean(data)), candidate, SAMPLE)
    except ValueError as error:
        return error
    return None
