from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friends.data.sources import load

Arrays = dict[str, Any]
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)  # n h w c
Y = np.array([0, 1, 2, 0, 1, 2])


def saved(path: Path, **change: Any) -> Path:
    arrays = {"x_train": X, "y_train": Y, "x_test": X[:3], "y_test": Y[:3]} | change
    np.savez(path / "toy.npz", **{key: value for key, value in arrays.items() if value is not None})
    return path / "toy.npz"


@pytest.mark.parametrize(
    "x",
    [
        X,
        X.transpose(0, 3, 1, 2),
        np.asfortranarray(X),
        (X / 255).astype(np.float64),
        (X / 255).astype(np.float32).transpose(0, 3, 1, 2),
        (X / 255).astype(">f4"),
    ],
)
def test_layouts_and_types_give_the_same_pixels(tmp_path: Path, x: np.ndarray[Any, Any]) -> None:
    train, test = load(saved(tmp_path, x_train=x, x_test=x[:3]))
    assert np.array_equal(train.x.numpy(), X.transpose(0, 3, 1, 2)) and train.y.tolist() == Y.tolist()
    assert np.array_equal(test.x.numpy(), X[:3].transpose(0, 3, 1, 2))
    assert (train.classes, train.name) == (("0", "1", "2"), "toy")


def test_grey_without_a_channel_axis(tmp_path: Path) -> None:
    train, _ = load(saved(tmp_path, x_train=X[..., 0], x_test=X[:3, ..., 0]))
    assert np.array_equal(train.x[:, 0].numpy(), X[..., 0])


def test_keys_of_medmnist_with_label_columns(tmp_path: Path) -> None:
    arrays = {f"{split}_images": X for split in ("train", "val", "test")}
    arrays |= {f"{split}_labels": Y[:, None].astype(np.uint8) for split in ("train", "val", "test")}
    np.savez(tmp_path / "bloodmnist.npz", **arrays)  # pyright: ignore[reportArgumentType]
    train, test = load(tmp_path / "bloodmnist.npz")
    assert train.y.tolist() == test.y.tolist() == Y.tolist() and train.name == "bloodmnist"


def test_class_names_may_be_given(tmp_path: Path) -> None:
    train, _ = load(saved(tmp_path, classes=np.array(["ant", "bee", "cow"])))
    assert train.classes == ("ant", "bee", "cow")
    with pytest.raises(ValueError, match="label 2 of train row 2 is out of range: 2 classes"):
        load(saved(tmp_path, classes=np.array(["ant", "bee"])))


def floats(change: float, row: int = 4) -> np.ndarray[Any, Any]:
    x = X.astype(np.float32) / 255
    x[row, 1, 1, 1] = change
    return x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": floats(np.nan)}, "x_train: image 4 has NaN pixels"),
        ({"x_train": floats(1.01)}, r"x_train: image 4 is outside \[0, 1\] \(from .* to 1.01\)"),
        ({"x_test": floats(-0.2, 2)[:3]}, r"x_test: image 2 is outside \[0, 1\] \(from -0.2"),
        ({"x_train": floats(np.inf)}, "image 4 is outside"),
        ({"x_train": X.astype(np.int64)}, "not int64"),
        ({"x_train": X[:5]}, "5 images in x_train, but 6 labels in y_train"),
        ({"x_train": X[0, 0]}, r"x_train: images are .* not \(7, 3\)"),
        ({"x_train": np.zeros((6, 5, 7, 9), np.uint8)}, r"x_train: no axis of \(6, 5, 7, 9\) is 1, 3 or 4"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "x_train: no pixels"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "label -1 of train row 5 is out of range: 3 classes"),
        ({"y_test": np.array([0, 3, 1])}, "label 3 of test row 1 is out of range: 3 classes"),
        ({"y_train": np.array([0, 1, 10**9, 0, 1, 2])}, "label 1000000000 of training row 2 is out of range"),
        ({"y_train": Y.astype(np.float64)}, "y_train: labels are .* not .* of float64"),
        ({"y_train": np.eye(3)[Y].astype(int)}, r"y_train: labels are .* not \(6, 3\)"),
        ({"y_train": None}, r"has no train split: it needs x_train and y_train or train_images and train_labels"),
        ({"x_test": None, "y_test": None}, "has no test split: .* but has x_train, y_train"),
        ({"y_train": np.array([0, 0, 2, 2, 0, 0])}, r"class '1' \(label 1\) of toy has no training image"),
        ({"x_train": np.array([X, None], dtype=object)}, "not a readable .npz file of plain arrays"),
    ],
)
def test_what_is_refused_and_how(tmp_path: Path, change: Arrays, words: str) -> None:
    path = saved(tmp_path, **change)
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    assert "toy" in str(error.value)


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 3] ^= 255
    for broken in (b"", b"hello", raw[:-30], raw[: len(raw) // 2], bytes(flipped), b"\x80\x04N."):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"toy\.npz is not a readable \.npz file"):
            load(path)
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match="it is a single array"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"not an array")
    with pytest.raises(ValueError, match=r"not a readable .*x_train is not an array"):
        load(path)
