"""What a data set is made of: the data sets inside it, their transforms, and rows that stand for each of its parts."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from friends.loaders.visit import Stage

PER_PART = 4
"""How many rows of each part are looked at."""

PARTS = 16
"""How many parts of a concatenation are looked at."""

LONGEST = 1000
"""A list with more in it is one of images, not of data sets."""


def data_sets(outer: object) -> Iterator[object]:
    """A data set and all data sets that it holds in its attributes, however deep; each once."""
    seen: set[int] = set()
    todo = [outer]
    while todo:
        here = todo.pop()
        if id(here) in seen or not _is_data_set(here):
            continue
        seen.add(id(here))
        yield here
        for value in cast("dict[str, object]", getattr(here, "__dict__", {})).values():
            several = isinstance(value, list | tuple) and len(cast("list[object]", value)) <= LONGEST
            todo += list(cast("list[object]", value)) if several else [value]


def _is_data_set(thing: object) -> bool:
    plain = isinstance(thing, Tensor | np.ndarray | str | bytes | list | tuple | dict | torch.nn.Module | type)
    return not plain and hasattr(thing, "__getitem__") and hasattr(thing, "__len__")


def hugging_face_transform(dataset: object) -> object | None:
    """The function given to ``set_transform`` or ``with_transform`` of a Hugging Face data set."""
    form = getattr(dataset, "format", None)
    if not hasattr(dataset, "set_transform") or not isinstance(form, Mapping):
        return None
    fields = cast("Mapping[str, Any]", form)
    return fields.get("format_kwargs", {}).get("transform") if fields.get("type") == "custom" else None


class Opened:
    """The transforms of a data set, each replaced by a :class:`Stage`; :meth:`close` puts back what was new.

    What has been opened for another loader is used as it is: a stage does nothing of its own.
    """

    def __init__(self, dataset: object) -> None:
        self.stages: dict[str, Stage] = {}
        self.bare: list[object] = []
        self._undo: list[tuple[object, str, Any]] = []
        for inner in data_sets(dataset):
            self._open(inner)

    def close(self) -> None:
        """Undo what was done to the data set."""
        for holder, name, value in reversed(self._undo):
            if name == "set_transform":
                _set_hugging_face(holder, value)
            else:
                setattr(holder, name, value)
        self._undo.clear()

    def _open(self, holder: object) -> None:
        function = hugging_face_transform(holder)
        if function is not None:
            if not isinstance(function, Stage):
                self._undo.append((holder, "set_transform", function))
                function = Stage(cast(Any, function), _fresh_name(), batched=True)
                _set_hugging_face(holder, function)
            self.stages[function.name] = function
        transform = getattr(holder, "transform", None)
        if "transform" not in getattr(holder, "__dict__", {}):
            return
        if not callable(transform):
            self.bare.append(holder)
            return
        stage = transform if isinstance(transform, Stage) else Stage(transform, _fresh_name())
        self.stages[stage.name] = stage
        if stage is not transform:
            self._put(holder, "transform", stage)
        both = getattr(holder, "transforms", None)  # torchvision keeps a second reference, next to the target's
        if getattr(both, "transform", None) is stage.original:
            self._put(both, "transform", stage)

    def _put(self, holder: object, name: str, value: object) -> None:
        self._undo.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)


_names = iter(range(2**62))


def _fresh_name() -> str:
    return f"transform {next(_names)}"


def _set_hugging_face(dataset: Any, function: object) -> None:
    form = dataset.format
    columns = form.get("columns")
    every = columns is None or list(columns) == list(getattr(dataset, "column_names", columns))
    dataset.set_transform(function, columns=None if every else columns,
                          output_all_columns=bool(form.get("output_all_columns", False)))  # fmt: skip


def probe_rows(dataset: Any) -> list[int]:
    """Some rows of every part of the data set, the first and the last of each among them."""
    part = _parts(dataset, np.arange(len(dataset)))
    found: list[int] = []
    for number in np.unique(part)[:PARTS]:
        rows = np.flatnonzero(part == number)
        found += [int(rows[place]) for place in np.unique(np.linspace(0, len(rows) - 1, PER_PART).astype(int))]
    return sorted(set(found))


def _parts(dataset: object, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the number of the innermost data set that it comes from, as far as torch's own wrappers tell."""
    if isinstance(dataset, Subset):
        subset = cast("Subset[object]", dataset)
        return _parts(subset.dataset, np.asarray(subset.indices, dtype=np.int64)[rows])
    if not isinstance(dataset, ConcatDataset):
        return np.zeros(len(rows), np.int64)
    concat = cast("ConcatDataset[object]", dataset)
    ends = np.asarray(concat.cumulative_sizes)
    which = np.searchsorted(ends, rows, side="right")
    part = np.zeros(len(rows), np.int64)
    for number in np.unique(which):
        mine = which == number
        inside = _parts(concat.datasets[number], rows[mine] - (ends[number - 1] if number else 0))
        part[mine] = part.max(initial=0) + 1 + inside
    return part


@contextmanager
def randomness(seed: int | None = None) -> Generator[None]:
    """The random states of torch (CPU), numpy and Python are what they were, afterwards; inside, they may be seeded."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
