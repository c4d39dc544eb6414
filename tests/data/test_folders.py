from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from friends.data import folders
from friends.data.sources import load

SIZE = (6, 5)  # width, height


def paint(path: Path, colour: int, size: tuple[int, int] = SIZE, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (colour, 255 - colour, 7)) if mode != "L" else Image.new("L", size, colour)
    image.convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for label, name in enumerate(("dog", "ant", "cat")):
        for i in range(3):
            paint(root / "train" / name / f"{i}.png", 50 * label + i)
        paint(root / "test" / name / "0.png", 50 * label + 9)
    return root


def test_folders_are_classes_in_alphabetical_order(root: Path) -> None:
    train, test = load(root)
    assert train.classes == test.classes == ("ant", "cat", "dog") and train.name == "pets"
    assert train.shape == (3, 5, 6)
    assert train.x[:, 0, 2, 2].tolist() == [50, 51, 52, 100, 101, 102, 0, 1, 2]
    assert train.y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert test.x[:, 0, 0, 0].tolist() == [59, 109, 9] and test.x[0, :, 0, 0].tolist() == [59, 196, 7]


def test_folders_called_like_files_of_cifar_are_not_taken_for_them(root: Path) -> None:
    want = load(root)[0].fingerprint
    (root / "meta").mkdir()
    assert load(root)[0].fingerprint == want


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_other_names_of_the_test_split(root: Path, name: str) -> None:
    want = load(root)[1].fingerprint
    (root / "test").rename(root / name)
    assert load(root)[1].fingerprint == want


def test_only_images_count_and_deeper_folders_do_too(root: Path) -> None:
    want = load(root)[0].fingerprint
    (root / "train" / "cat" / "deeper").mkdir()
    (root / "train" / "cat" / "2.png").rename(root / "train" / "cat" / "deeper" / "2.png")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._0.png").write_bytes(b"left by another system")
    (root / "train" / ".hidden").mkdir()
    assert load(root)[0].fingerprint == want


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "ppm", "tif", "tiff", "webp", "jpg", "jpeg"])
def test_formats(root: Path, suffix: str) -> None:
    for path in sorted(root.rglob("*.png")):
        image = Image.open(path)
        path.unlink()
        image.save(path.with_suffix(f".{suffix}"))
    train, _ = load(root)
    lossy = 25 if suffix in ("jpg", "jpeg", "webp") else 0
    found = train.x[:, 0, 2, 2].int().numpy()
    assert np.abs(found - [50, 51, 52, 100, 101, 102, 0, 1, 2]).max() <= lossy


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_all_grey_stays_one_channel(root: Path, mode: str) -> None:
    for path in root.rglob("*.png"):
        paint(path, 255, mode=mode)
    train, test = load(root)
    assert train.shape == test.shape == (1, 5, 6)


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
def test_one_colour_image_makes_all_rgb(root: Path, mode: str) -> None:
    for path in root.rglob("*.png"):
        paint(path, 33, mode="L")
    paint(root / "train" / "dog" / "2.png", 200, mode=mode)
    train, test = load(root)
    assert train.shape == test.shape == (3, 5, 6)
    assert train.x[0, :, 0, 0].tolist() == [33] * 3 and abs(int(train.x[-1, 0, 0, 0]) - 200) < 10


def test_mixed_sizes_name_two_files_and_the_way_out(root: Path) -> None:
    paint(root / "train" / "dog" / "1.png", 9, size=(8, 9))
    with pytest.raises(ValueError, match=r"ant.0\.png is 5x6, .*dog.1\.png is 9x8 .*pass size=") as error:
        load(root)
    assert "\n" not in str(error.value)
    train, test = load(root, size=4)
    assert train.shape == test.shape == (3, 4, 4)
    assert train.x[:, 0, 2, 2].tolist() == [50, 51, 52, 100, 101, 102, 0, 9, 2]


def test_resizing_is_antialiased_and_keeps_the_centre(tmp_path: Path) -> None:
    board = np.indices((16, 40)).sum(0) % 2 * 255  # a chess board, whose mean is grey
    board[:, :12], board[:, 28:] = 255, 255
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(board.astype(np.uint8)).save(tmp_path / split / "a" / "x.png")
    small = load(tmp_path, size=4)[0].x
    assert int(small.min()) > 110 and int(small.max()) < 145


def test_corrupt_images_are_named(root: Path) -> None:
    path = root / "train" / "cat" / "1.png"
    raw = path.read_bytes()
    for broken in (b"", b"hello", raw[:50]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"cat.1\.png is not a readable image: "):
            load(root)


def test_formats_that_are_not_understood_are_not_tried(root: Path) -> None:
    Image.new("RGB", SIZE).save(root / "train" / "cat" / "1.png", format="GIF")
    with pytest.raises(ValueError, match=r"cat.1\.png is not a readable image"):
        load(root)


def test_decompression_bombs_are_refused_before_they_are_decoded(root: Path) -> None:
    path = root / "train" / "cat" / "1.png"
    for side, mode in ((7200, "1"), (10000, "1")):  # the second is one that PIL itself warns of
        Image.new(mode, (side, side)).save(path)
        with pytest.raises(ValueError, match=r"cat.1\.png is too large .*at most 50000000 pixels"):
            load(root, size=4)


def test_sixteen_bit_images_are_refused(root: Path) -> None:
    Image.fromarray(np.full(SIZE, 4000, np.uint16)).save(root / "train" / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"cat.1\.png .*mode 'I;16' has no fixed white"):
        load(root)


def test_empty_missing_and_odd_classes(root: Path) -> None:
    (root / "test" / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"class 'cat' of .*test has no image"):
        load(root)
    (root / "test" / "cat").rmdir()
    with pytest.raises(ValueError, match=r"class 'cat' is in train only \(1 such"):
        load(root)
    paint(root / "test" / "eel" / "0.png", 1)
    paint(root / "train" / "eel" / "0.png", 1)
    shutil.rmtree(root / "train" / "cat")
    shutil.rmtree(root / "train" / "dog")
    with pytest.raises(ValueError, match="class 'dog' is in test only"):
        load(root)
    shutil.rmtree(root / "test")
    with pytest.raises(ValueError, match="no test split: none of test, val, validation, valid"):
        load(root)
    (root / "test").mkdir()
    with pytest.raises(ValueError, match="test has no class folders"):
        load(root)


# -- no split given -------------------------------------------------------------------------------------------


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    root = tmp_path / "whole"
    for label, (name, count) in enumerate((("a", 20), ("b", 7), ("c", 2))):
        for i in range(count):
            paint(root / name / f"{i:02}.png", 60 * label + i)
    return root


def test_a_fifth_of_each_class_is_for_testing(unsplit: Path) -> None:
    train, test = load(unsplit)
    assert train.y.bincount().tolist() == [16, 6, 1] and test.y.bincount().tolist() == [4, 1, 1]
    colours = train.x[:, 0, 0, 0].tolist() + test.x[:, 0, 0, 0].tolist()
    assert sorted(colours) == [*range(20), *range(60, 67), 120, 121]  # every image once


def test_the_split_does_not_depend_on_where_the_folder_lies(unsplit: Path, tmp_path: Path) -> None:
    want = [data.fingerprint for data in load(unsplit)]
    moved = tmp_path / "elsewhere" / "other name"
    shutil.copytree(unsplit, moved)
    assert [data.fingerprint for data in load(moved)] == want


def test_one_image_cannot_be_split(unsplit: Path) -> None:
    (unsplit / "c" / "01.png").unlink()
    with pytest.raises(ValueError, match=r"class 'c' of .*whole has 1 image\(s\), too few to split"):
        load(unsplit)


# -- Tiny-ImageNet --------------------------------------------------------------------------------------------


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n02", "n01")):
        for i in range(2):
            paint(root / "train" / name / "images" / f"{name}_{i}.JPEG", 100 * label)
        (root / "train" / name / f"{name}_boxes.txt").write_text("x")
        paint(root / "val" / "images" / f"val_{label}.JPEG", 100 * label)
    lines = "val_1.JPEG\tn01\t0\t0\t62\t62\nval_0.JPEG\tn02\t0\t0\t62\t62\n"
    (root / "val" / "val_annotations.txt").write_text(lines)
    train, test = load(root)
    assert train.classes == ("n01", "n02") and train.y.tolist() == [0, 0, 1, 1]
    assert [abs(int(pixel) - want) < 4 for pixel, want in zip(test.x[:, 0, 0, 0], (100, 0), strict=True)] == [True] * 2
    (root / "val" / "val_annotations.txt").write_text(lines + "../../x.JPEG\tn01\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt, line 3: an image and its class expected"):
        load(root)
    (root / "val" / "val_annotations.txt").write_text(lines + "val_2.JPEG\tn01\n")
    with pytest.raises(FileNotFoundError, match=r"val_2\.JPEG"):
        load(root)


def test_progress_reaches_the_end(root: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        seen.append((what, done, total))

    folders.read(root, progress=progress)
    assert seen == [("read train", 9, 9), ("read test", 3, 3)]
