"""The benchmark's tasks, which its attackers are given, and the order in which they count images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor

from friends.data.legacy.parts import indices, read_part, sequence, whole


@dataclass(frozen=True, eq=False)
class Setup:
    """One of the benchmark's hundred tasks: which test image is attacked, and which training images may be poisoned.

    Args:
        target_class: true label of the target.
        target_index: its row in the test set, original order.
        base_class: label of the bases, which the target is wanted as.
        base_indices: rows of the training set, original order, as published: setups 78 and 84 of the transfer list
            name one twice.
    """

    target_class: int
    target_index: int
    base_class: int
    base_indices: Int64[Tensor, " p"]

    @property
    def distinct(self) -> Int64[Tensor, " q"]:
        """The base indices, each once, in the order of their first mention."""
        return torch.tensor(list(dict.fromkeys(self.base_indices.tolist())), dtype=torch.int64)


def read_setups(path: Path) -> list[Setup]:
    """The tasks in one of the benchmark's files ``poison_setups/*.pickle``.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafePickleError: it asks for code to be run.
        ValueError: it is torn, or a setup lacks something; the setup is named.
    """
    part = read_part(path)
    setups: list[Setup] = []
    total = 0
    for i, item in enumerate(sequence(part.value, part.where)):
        setups.append(_setup(item, f"{part.where}, setup {i}"))
        total += len(setups[-1].base_indices)
        part.expect(total, 1, "base indices")
    if not setups:
        raise ValueError(f"{path} holds no setup")
    return setups


def _setup(item: object, where: str) -> Setup:
    entries = cast("dict[object, object]", item) if isinstance(item, dict) else {}
    lacking = [key for key in ("target class", "target index", "base class", "base indices") if key not in entries]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(map(repr, lacking))}")
    numbers = [whole(entries[key], f"{where}, {key}") for key in ("target class", "target index", "base class")]
    base = indices(entries["base indices"], f"{where}, base indices")
    target_class, target_index, base_class = numbers
    if len(base) == 0 or min(*numbers, int(base.min())) < 0 or target_class == base_class:
        raise ValueError(f"{where} lists no base indices, a negative number, or one class for target and bases")
    return Setup(target_class, target_index, base_class, base)


def by_class(labels: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The ``order`` for a copy of a data set that is sorted by class, in the original order within each class.

    Args:
        labels: the label of each row in the original order.

    Returns:
        The row in the sorted copy of each original row.
    """
    return torch.argsort(torch.argsort(labels, stable=True))
