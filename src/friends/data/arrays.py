"""Images and labels from one ``.npz`` file, in the names of Keras or of MedMNIST. Nothing pickled is read."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from friends.data.convert import CHANNELS
from friends.data.images import LabeledImages

KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}

Arrays = Mapping[str, "np.ndarray[Any, np.dtype[Any]]"]


def read(path: Path, *, lone: bool = False) -> tuple[LabeledImages, LabeledImages]:
    """The training and test images of an ``.npz`` file.

    Its arrays are ``x_train, y_train, x_test, y_test`` (or ``train_images, train_labels, test_images,
    test_labels``): images ``(n, h, w)``, ``(n, h, w, c)`` or ``(n, c, h, w)`` of uint8 or of floats in [0, 1];
    labels ``(n,)`` or ``(n, 1)``, whole numbers 0, 1, ... An array ``classes`` of strings may name them.

    Args:
        path: the file.
        lone: without arrays for testing the test part has no image, instead of that being an error.

    Raises:
        ValueError: the file is torn, or an array is missing or not like that; the array and the row are named.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            wanted = {key for pairs in KEYS.values() for pair in pairs for key in pair} | {"classes"}
            arrays: dict[str, Any] = {key: archive[key] for key in archive.files if key in wanted}
        for key, array in arrays.items():
            if not isinstance(array, np.ndarray):  # numpy hands out members without its header as they are
                raise ValueError(f"{key} is not an array")
    except (OSError, EOFError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file of plain arrays: {error}") from error
    train_x, train_y = _split(path, arrays, "train")
    classes = _classes(path, arrays, train_y)
    train = LabeledImages(train_x, _in_range(path, "train", train_y, len(classes)), classes, path.stem)
    if lone and not any(key in arrays for pair in KEYS["test"] for key in pair):
        return train, train.rows([])
    test_x, test_y = _split(path, arrays, "test")
    return train, LabeledImages(test_x, _in_range(path, "test", test_y, len(classes)), classes, path.stem)


def _split(path: Path, arrays: Arrays, split: str) -> tuple[Tensor, Tensor]:
    for x_key, y_key in KEYS[split]:
        if x_key in arrays and y_key in arrays:
            x, y = images_of(arrays[x_key], f"{path}, {x_key}"), labels_of(arrays[y_key], f"{path}, {y_key}")
            if len(x) != len(y):
                raise ValueError(f"{path}: {len(x)} images in {x_key}, but {len(y)} labels in {y_key}")
            return x, y
    named = " or ".join(" and ".join(pair) for pair in KEYS[split])
    raise ValueError(f"{path} has no {split} split: it needs {named}, but has {', '.join(arrays) or 'none of ours'}")


def images_of(array: np.ndarray[Any, np.dtype[Any]], where: str) -> UInt8[Tensor, "n c h w"]:
    """Bytes, channels first, of a stack of images. Raises ``ValueError`` that begins with ``where``."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim != 4:
        raise ValueError(f"{where}: images are (n, h, w), (n, h, w, c) or (n, c, h, w), not {array.shape}")
    elif array.shape[1] not in CHANNELS or array.shape[3] in CHANNELS:
        if array.shape[3] not in CHANNELS:
            raise ValueError(f"{where}: no axis of {array.shape} is 1, 3 or 4 channels")
        array = array.transpose(0, 3, 1, 2)
    if array.size == 0:
        raise ValueError(f"{where}: no pixels in an array of shape {array.shape}")
    if array.dtype.kind == "f":
        return _bytes_of_floats(array, where)
    if array.dtype != np.uint8:
        raise ValueError(f"{where}: pixels are uint8, or floats in [0, 1], not {array.dtype}")
    return torch.from_numpy(np.array(array, order="C"))


def _bytes_of_floats(array: np.ndarray[Any, np.dtype[Any]], where: str) -> Tensor:
    flat = array.reshape(len(array), -1)
    low, high = flat.min(1), flat.max(1)  # NaN where any pixel of the row is
    for bad, what in ((np.isnan(low), "has NaN pixels"), ((low < 0) | (high > 1), "is outside [0, 1]")):
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"{where}: image {row} {what} (from {low[row]:g} to {high[row]:g})")
    return torch.from_numpy(np.ascontiguousarray(np.rint(array.astype(np.float32) * 255).astype(np.uint8)))


def labels_of(array: np.ndarray[Any, np.dtype[Any]], where: str) -> Int64[Tensor, " n"]:
    """Whole-number labels as a vector. Raises ``ValueError`` that begins with ``where``."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels are (n,) or (n, 1) whole numbers, not {array.shape} of {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _classes(path: Path, arrays: Arrays, train_y: Tensor) -> tuple[str, ...]:
    if "classes" in arrays:
        return tuple(str(name) for name in arrays["classes"].flatten())
    highest, row = (int(value) for value in train_y.max(0))
    if highest >= len(train_y):
        raise ValueError(f"{path}: label {highest} of training row {row} is out of range: labels are 0, 1, ..., "
                         f"and {len(train_y)} images cannot fill {highest + 1} classes")  # fmt: skip
    return tuple(str(label) for label in range(highest + 1))


def _in_range(path: Path, split: str, y: Tensor, classes: int) -> Tensor:
    bad = ((y < 0) | (y >= classes)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"{path}: label {int(y[row])} of {split} row {row} is out of range: {classes} classes")
    return y
