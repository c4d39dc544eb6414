"""A data set whose images carry both noises, for a loader that stays as it was: the items are of the same kind."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from friends.loaders.images import as_floats, read, to_grey
from friends.loaders.place import Place
from friends.loaders.shared import Shared
from friends.noise.random import RandomNoise, add_noise
from friends.noise.rows import Int64s, content_of
from friends.noise.store import NoiseStore
from friends.types import Streams

_OWN = frozenset(("inner", "place", "noises", "shared", "bare", "positions", "_opened", "_drawn"))


@dataclass(frozen=True)
class Noises:
    """What is drawn: the random noise and its seed, and whether a sampler may draw a row twice in an epoch."""

    random: RandomNoise
    mu: float
    seed: int
    repeats: bool


class Protected(Dataset[object]):
    """A data set with friendly and random noise on its images, read by whoever iterates a protected loader.

    Row ``i`` gets the noise of row ``i``, whatever samplers, subsets and concatenations are between; what it is added
    to is compared with the image that the noise was made for. Random noise follows from the seed, the epoch, the rank,
    the row and how often it was drawn before in this epoch and process. If a sampler may draw a row twice, the number
    of the worker counts, too: two workers do not know of each other.

    Other attributes are those of the data set inside, to be read and to be set.
    """

    def __init__(self, inner: Any, place: Place, noises: Noises, shared: Shared, bare: list[object]) -> None:
        self.inner, self.place, self.noises, self.shared, self.bare = inner, place, noises, shared, bare
        self.positions: Int64s | None = None
        self._opened: tuple[int, NoiseStore | None] | None = None
        self._drawn: tuple[int, NDArray[np.int32]] | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        # also of the batched __getitems__, which would go around the noise
        if name in _OWN or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None, "_drawn": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"Protected({self.inner!r})"

    def __getitem__(self, index: SupportsIndex) -> object:
        row = self._row(index)
        if self.shared.paused:
            return self.place.clean(self.inner, row)
        epoch = self.shared.epoch
        if epoch < 0:
            raise RuntimeError("a protected loader is iterated outside of its training: loop with `for epoch in "
                               "defense.epochs(model, n)`; for clean images, use `with defense.paused()`")  # fmt: skip
        if self.noises.mu == 0 and self._store() is None:
            return self.place.clean(self.inner, row)
        return self._read(row, partial(self._noisy, row, epoch))

    def pixels(self, row: int) -> Tensor:
        """The bytes ``(c, h, w)`` that the noise of a row is made for."""
        return to_grey(self.place.pixels(self.inner, row))

    def _row(self, index: SupportsIndex) -> int:
        row = operator.index(index)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(f"row {operator.index(index)} of a data set of {len(self)}")
        return row

    def _read(self, row: int, change: Callable[[object, bool], object]) -> object:
        for holder in self.bare:
            if callable(getattr(holder, "transform", None)):
                raise RuntimeError(f"{type(holder).__name__} was given a transform after its loader was protected, so "
                                   "noise would come too late: protect the loader after that")  # fmt: skip
        return self.place.read(self.inner, row, change)

    def _noisy(self, row: int, epoch: int, image: object, floats: bool) -> object:
        x, back = read(image, self.place.moments)
        friendly = self._friendly(row, x)
        generator = self._stream(row, epoch)
        noisy = add_noise(x[None], friendly, random=self.noises.random, mu=self.noises.mu, generator=generator)[0]
        return as_floats(noisy, image) if floats else back(noisy)

    def _friendly(self, row: int, x: Tensor) -> Tensor | None:
        store = self._store()
        if store is None:
            return None
        position = row if self.positions is None else int(self.positions[row])
        content = content_of(to_grey(x).cpu())
        if content != store.content(position):
            raise ValueError(store.mismatch(row, content))
        return store.grey([position]).to(x.device)

    def _store(self) -> NoiseStore | None:
        """The store in use, mapped into this process."""
        changes = self.shared.changes
        if self._opened is None or self._opened[0] != changes:
            path = self.shared.path
            self._opened = changes, NoiseStore.load(path, verify=False) if path else None
        return self._opened[1]

    def _stream(self, row: int, epoch: int) -> torch.Generator:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, np.zeros(len(self), np.int32)
        times = int(self._drawn[1][row])
        self._drawn[1][row] += 1
        worker = get_worker_info()
        number = 0 if worker is None or not self.noises.repeats else worker.id
        return Streams(self.noises.seed)("random noise", epoch, self.shared.rank, row, times, number)
