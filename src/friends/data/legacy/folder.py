"""The folder of the public benchmark, read; see :mod:`friends.data.legacy`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from friends.data.images import LabeledImages
from friends.data.legacy.export import BASES, POISONS
from friends.data.legacy.goal import SOURCE, TARGET, read_goal
from friends.data.legacy.parts import compare, indices, labelled, read_part, replaced, sequence, to_rows
from friends.data.poisoned import PoisonedDataset, Trigger


def read_folder(
    path: Path,
    clean: LabeledImages,
    *,
    order: Int64[Tensor, " n"] | None = None,
    xi: float | None = None,
    clean_label: bool = True,
    duplicates: Literal["refuse", "first", "last"] = "refuse",
    trigger: Trigger | None = None,
    y_true: int | None = None,
) -> PoisonedDataset:
    """Put a published folder of poisons into the training set that it was made for.

    Args:
        path: the folder.
        clean: the training set before the attack.
        order: the row of ``clean`` for each row that the folder counts, -1 for rows that ``clean`` lacks; see
            :func:`by_class`. None: ``clean`` is in the original order.
        xi: largest perturbation to accept, in [0, 1] pixel units; None accepts any. Give None if ``clean`` is a lossy
            copy (JPEG): its bases are not those that the poisons were made from. The benchmark's own poisons of
            8/255 may be 9/255 away, for they were cut down to bytes.
        clean_label: whether every poison must have the label of its base.
        duplicates: which poison counts if several replace one base.
        trigger: what made the images of ``source.pickle``, if the folder does not tell.
        y_true: the true label of a target that was published without one.

    Returns:
        The poisoned set. Its ``recipe`` says how far a poison is from its base at most.

    Raises:
        FileNotFoundError: the folder, or a file of it, is missing.
        UnsafePickleError: a file asks for code to be run.
        ValueError: a file is torn or does not fit the others or ``clean``; the first entry that does not is named.
    """
    _refuse_missing(path)
    part = read_part(path / POISONS)
    poisons = labelled(part, sequence(part.value, part.where), clean)
    base = read_part(path / BASES)
    pairs = _pairs(indices(base.value, base.where).tolist(), len(poisons), base.where, duplicates)
    poisons = poisons.rows([poison for _, poison in pairs])
    idx = to_rows(torch.tensor([index for index, _ in pairs]), order, clean, base.where)
    wanted = _one_label(poisons)
    largest = compare(poisons, idx, clean, xi, clean_label)
    goal = read_goal(path, clean, wanted, trigger, y_true)
    recipe = {"attack": "published", "folder": path.name, "largest perturbation": f"{largest}/255"}
    return replaced(poisons, idx, clean, goal, recipe)


def _refuse_missing(path: Path) -> None:
    """Raise unless the files that every such folder has are there."""
    if path.is_file():
        raise ValueError(f"{path} is a file: MetaPoison's single files are read by read_metapoison")
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    lacking = [name for name in (POISONS, BASES) if not (path / name).is_file()]
    if not any((path / name).is_file() for name in (TARGET, SOURCE)):
        lacking.append(f"{TARGET} or {SOURCE}")
    if lacking:
        raise FileNotFoundError(f"{path} is no whole folder of poisons: it lacks {', '.join(lacking)}")


def _pairs(published: list[int], count: int, where: str, duplicates: str) -> list[tuple[int, int]]:
    """Base index and number of the poison that replaces it, each index once, in the order of the poisons."""
    if duplicates not in ("refuse", "first", "last"):
        raise ValueError(f"duplicates is 'refuse', 'first' or 'last', not {duplicates!r}")
    distinct = list(dict.fromkeys(published))
    if count == 0 or count not in (len(published), len(distinct)):
        raise ValueError(f"{where} lists {len(published)} base indices, {len(distinct)} of them distinct, for {count} "
                         "poisons: every poison replaces one base")  # fmt: skip
    if len(distinct) == len(published):
        return list(zip(published, range(count), strict=True))
    if duplicates == "refuse":
        twice = [str(index) for index, times in Counter(published).items() if times > 1]
        raise ValueError(f"{where} lists {len(twice)} base indices more than once: {', '.join(twice[:3])}"
                         f"{', ...' if len(twice) > 3 else ''}. Two poisons cannot replace one image: pass "
                         "duplicates='first' or 'last' to keep one of them")  # fmt: skip
    if count == len(distinct):  # the exporter of gradient matching: poisons by distinct base, indices as they were
        return list(zip(distinct, range(count), strict=True))
    entries = list(enumerate(published))
    chosen = {index: poison for poison, index in (entries if duplicates == "last" else reversed(entries))}
    return sorted(chosen.items(), key=lambda pair: pair[1])


def _one_label(poisons: LabeledImages) -> int:
    """The label of the first poison, which is what the goal is wanted as, if all poisons have it."""
    other = (poisons.y != poisons.y[0]).nonzero().flatten()
    if len(other):
        raise ValueError(f"{poisons.name}, entry {int(other[0])} has label {int(poisons.y[other[0]])}, but the first "
                         f"poison, whose label is what the attacker wants, has {int(poisons.y[0])}")  # fmt: skip
    return int(poisons.y[0])
