"""MetaPoison's single files (Huang et al., NeurIPS 2020, arXiv:2004.00225): one pickled dict with all of CIFAR-10.

``xtrain`` are the training images with the poisons in place, float32 ``(n, h, w, c)`` in 0..255, sorted by class;
``ytrain`` their labels; ``xtarget``, ``ytarget`` the targets and their classes; ``ytargetadv`` what they are wanted as.
``xvalid`` and ``yvalid``, the test images, are left alone.

Departures from the FRIENDS authors' reader of these files: MetaPoison does not clip its poisons to 0..255, and a cast
to bytes would turn 256.3 into 0; here they are clipped, then rounded to the nearest byte. And poisons are the rows
that differ from the clean set, not the rows ``5000 * class`` and the 499 after it, unless ``count`` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from friends.data.images import LabeledImages
from friends.data.legacy.parts import class_id, compare, indices, read_part, replaced, to_rows
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.recorded import RecordedNumbers

MAX_BYTES = 2 << 30
"""The published files have 740 MB: 60,000 images in float32."""
KEYS = ("xtrain", "ytrain", "xtarget", "ytarget", "ytargetadv")
CHUNK = 5000


def read_metapoison(
    path: Path,
    clean: LabeledImages,
    *,
    order: Int64[Tensor, " n"] | None = None,
    count: int | None = None,
    xi: float | None = None,
) -> PoisonedDataset:
    """Put the poisons of a MetaPoison file into the training set that they were made for.

    Args:
        path: the file.
        clean: the training set before the attack.
        order: the row of ``clean`` for each row of the file; None: ``clean`` is sorted by class, as the file is.
        count: take the first ``count`` rows of the wanted class for the poisons, as MetaPoison chooses them. Needed
            if ``clean`` is a lossy copy (JPEG), where every row differs. None: the rows that differ.
        xi: largest perturbation to accept, in [0, 1] pixel units; None accepts any, as MetaPoison's colour shifts need.

    Returns:
        The poisoned set, in the order of ``clean``. Its ``recipe`` says how far a poison is from its base at most.

    Raises:
        FileNotFoundError: there is no such file.
        friends.data.unpickle.UnsafePickleError: it asks for code to be run.
        ValueError: it is torn, lacks something, or is of other data than ``clean``.
    """
    part = read_part(path, MAX_BYTES)
    entries = cast("dict[object, object]", part.value) if isinstance(part.value, dict) else {}
    lacking = [key for key in KEYS if key not in entries]
    if lacking:
        raise ValueError(f"{path} is not MetaPoison's: it lacks {', '.join(lacking)}")
    y = indices(entries["ytrain"], f"{path}, ytrain")
    x = _pixels(entries["xtrain"], f"{path}, xtrain", clean)
    goal = _goal(entries, path, clean)
    rows = _rows(y, order, clean, path)
    wanted = int(goal.y_wanted[0])
    if bool((goal.y_wanted != wanted).any()):
        raise ValueError(f"{path} wants its targets as several classes: {goal.y_wanted.tolist()}")
    at = _differing(x, y, rows, clean, wanted, path) if count is None else _first(y, wanted, count, path)
    poisons = LabeledImages(x[at], y[at], clean.classes, str(path))
    largest = compare(poisons, rows[at], clean, xi, clean_label=True)
    recipe = {"attack": "published", "file": path.name, "largest perturbation": f"{largest}/255"}
    return replaced(poisons, rows[at], clean, goal, recipe)


def _pixels(value: object, where: str, like: LabeledImages) -> UInt8[Tensor, "n c h w"]:
    """Numbers ``(n, h, w, c)`` in 0..255 as bytes: clipped, then rounded."""
    array = value.array(where) if isinstance(value, RecordedNumbers) else np.empty(0)
    c, h, w = like.shape
    if array.ndim != 4 or array.shape[1:] != (h, w, c):
        raise ValueError(f"{where} holds {array.shape} numbers, not (n, {h}, {w}, {c}) as {like.name}")
    out = np.empty((len(array), c, h, w), dtype=np.uint8)
    for start in range(0, len(array), CHUNK):
        chunk = array[start : start + CHUNK].astype(np.float32)
        if not bool(np.isfinite(chunk).all()):
            raise ValueError(f"{where} holds pixels that are not finite, from row {start} on")
        out[start : start + CHUNK] = np.rint(chunk.clip(0, 255)).astype(np.uint8).transpose(0, 3, 1, 2)
    return torch.from_numpy(out)


def _goal(entries: dict[object, object], path: Path, like: LabeledImages) -> Goal:
    x = _pixels(entries["xtarget"], f"{path}, xtarget", like)
    y_true, y_wanted = _classes(entries, "ytarget", path, like), _classes(entries, "ytargetadv", path, like)
    names = [like.classes[int(y[0])] for y in (y_true, y_wanted)] if len(y_true) * len(y_wanted) else ["", ""]
    try:
        return Goal(x.float() / 255, y_true, y_wanted, name=f"published target: {names[0]} \u2192 {names[1]}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _classes(entries: dict[object, object], key: str, path: Path, like: LabeledImages) -> Int64[Tensor, " m"]:
    where = f"{path}, {key}"
    found = indices(entries[key], where)
    for label in found.tolist():
        class_id(label, where, like)
    return found


def _rows(
    y: Int64[Tensor, " n"], order: Int64[Tensor, " n"] | None, clean: LabeledImages, path: Path
) -> Int64[Tensor, " n"]:
    """The row of ``clean`` for each row of the file, all labels being equal."""
    if len(y) != (len(clean) if order is None else len(order)):
        raise ValueError(f"{path} holds {len(y)} training images, where {clean.name} or order= has "
                         f"{len(clean) if order is None else len(order)}")  # fmt: skip
    rows = to_rows(torch.arange(len(y)), order, clean, str(path))
    other = (y != clean.y.cpu()[rows]).nonzero().flatten()
    if len(other):
        row = int(other[0])
        raise ValueError(f"{path} has label {int(y[row])} in row {row}, row {int(rows[row])} of {clean.name} has "
                         f"{int(clean.y[rows[row]])}: MetaPoison sorts by class, map its rows with order=")  # fmt: skip
    return rows


def _first(y: Int64[Tensor, " n"], wanted: int, count: int, path: Path) -> Int64[Tensor, " p"]:
    at = (y == wanted).nonzero().flatten()
    if not 1 <= count <= len(at):
        raise ValueError(f"{path} has {len(at)} images of class {wanted}, so count cannot be {count}")
    return at[:count]


def _differing(
    x: UInt8[Tensor, "n c h w"],
    y: Int64[Tensor, " n"],
    rows: Int64[Tensor, " n"],
    clean: LabeledImages,
    wanted: int,
    path: Path,
) -> Int64[Tensor, " p"]:
    """The rows of the file that are not as in ``clean``, which must all be of the wanted class."""
    at = (x != clean.x.cpu()[rows]).flatten(1).any(1).nonzero().flatten()
    if len(at) == 0:
        raise ValueError(f"{path} holds no poison: every row is as in {clean.name}")
    other = at[y[at] != wanted]
    if len(other):
        raise ValueError(f"{path}: {len(at)} of {len(x)} rows differ from {clean.name}, and row {int(other[0])} is of "
                         "another class than the poisons. If it is a lossy copy (JPEG) or sorted otherwise within a "
                         "class, pass count= or order=")  # fmt: skip
    return at
