"""A CSV of paths and labels, data without a test part, and images that cannot be read and are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from friends.data.decode import BrokenImageError
from friends.data.sources import load

SHADES = {"cat": 40, "dog": 200}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shade in SHADES.items():
        for i in range(5):
            file = tmp_path / "images" / f"{name}{i}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("L", (6, 5), shade + i).save(file)
    return tmp_path


def table(folder: Path, *lines: str, name: str = "list.csv") -> Path:
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def all_of(folder: Path) -> list[str]:
    return [f"images/{name}{i}.png,{name}" for name in ("dog", "cat") for i in range(5)]


def test_paths_are_relative_to_the_list_and_classes_in_alphabetical_order(folder: Path) -> None:
    train, test = load(table(folder, "path,label", *all_of(folder)), lone=True)
    assert train.classes == ("cat", "dog")
    assert train.x[:, 0, 0, 0].tolist() == [40, 41, 42, 43, 44, 200, 201, 202, 203, 204]
    assert train.y.tolist() == [0] * 5 + [1] * 5
    assert len(test) == 0 and test.shape == train.shape


def test_without_a_split_a_fifth_is_for_testing_wherever_the_list_lies(folder: Path, tmp_path: Path) -> None:
    file = table(folder, "path,label", *all_of(folder))
    train, test = load(file)
    assert (len(train), len(test)) == (8, 2) and sorted(test.y.tolist()) == [0, 1]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (folder / "images").rename(moved / "images")
    assert load(file.rename(moved / "list.csv"))[1].fingerprint == test.fingerprint


def test_a_column_says_what_is_for_testing(folder: Path) -> None:
    lines = [f"{line},{'Val' if line.startswith('images/dog3') else 'train'}" for line in all_of(folder)]
    train, test = load(table(folder, "label_source, File ,Label,split", *(f"x,{line}" for line in lines)))
    assert len(train) == 9 and test.x[:, 0, 0, 0].tolist() == [203] and test.y.tolist() == [1]


def test_tabs_quotes_and_whole_numbers_in_order_of_size(folder: Path) -> None:
    file = table(folder, "path\tlabel", "images/cat0.png\t10", '"images/cat1.png"\t9', "", name="list.tsv")
    assert load(file, lone=True)[0].classes == ("9", "10")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label"], "lists no image"),
        (["images/cat0.png,cat"], "first line should name one column path or file"),
        (["path,file,label", "a,b,c"], "it has two such columns, path and file"),
        (["path,label", "images/cat0.png,"], "line 2: no label"),
        (["path,label", ",cat"], "line 2: no path"),
        (
            ["path,label", "images/cat0.png,cat", "images/cat0.png,dog"],
            r"is on line 2 \(cat\) and again on line 3 \(dog",
        ),
        (["path,label,split", "images/cat0.png,cat,tset"], "line 2: a part is train.*not 'tset'"),
        (["path,label,split", "images/cat0.png,cat,test"], "lists no training image"),
        (["path,label,split", "images/cat0.png,cat,train"], "lists no test image"),
        (["path,label,split", "images/cat0.png,cat,train", "images/dog0.png,dog,val"], "'dog' has test images, but no"),
        (["path,label", "images/cat0.png,cat"], "'cat' .* has 1 image"),
        (["path,label", '"images/cat0.png,cat'], "not a table in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(table(folder, *lines))


def test_a_listed_file_that_is_missing_is_an_error_or_left_out(folder: Path) -> None:
    file = table(folder, "path,label", *all_of(folder), "images/cat9.png,cat")
    with pytest.raises(BrokenImageError, match=r"line 12: there is no file images.cat9\.png"):
        load(file, lone=True)
    skipped: list[str] = []
    assert len(load(file, lone=True, skipped=skipped)[0]) == 10
    assert len(skipped) == 1 and "cat9.png is not there" in skipped[0]


def test_broken_files_of_a_folder_are_left_out_and_named_with_the_labels_of_the_rest_in_place(tmp_path: Path) -> None:
    for name, shade in SHADES.items():
        for i in range(5):
            (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (6, 5), shade + i).save(tmp_path / "in" / name / f"{i}.png")
    whole = (tmp_path / "in" / "cat" / "1.png").read_bytes()
    (tmp_path / "in" / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(BrokenImageError, match=r"cat.1\.png is not a readable image"):
        load(tmp_path / "in")
    skipped: list[str] = []
    train, test = load(tmp_path / "in", lone=True, skipped=skipped)
    assert train.x[:, 0, 0, 0].tolist() == [40, 42, 43, 44, 201, 202, 203, 204] and len(test) == 0
    assert train.y.tolist() == [0] * 4 + [1] * 4
    assert len(skipped) == 2 and "1.png" in skipped[0] and "0.png" in skipped[1]
    for file in (tmp_path / "in").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 10 images can be read; the first: "):
        load(tmp_path / "in", lone=True, skipped=[])


def test_parquet_without_a_test_split_and_with_a_broken_row(folder: Path) -> None:
    images = [(folder / "images" / f"{name}0.png").read_bytes() for name in SHADES]
    rows = {"image": [images[0], b"torn", images[1]], "label": [0, 1, 1]}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    skipped: list[str] = []
    train, test = load(folder, lone=True, skipped=skipped)
    assert train.y.tolist() == [0, 1] and train.x[:, 0, 0, 0].tolist() == [40, 200] and len(test) == 0
    assert "row 1" in skipped[0]
    with pytest.raises(ValueError, match="no test split"):
        load(folder)


def test_an_npz_without_a_test_split(tmp_path: Path) -> None:
    x = np.arange(2 * 5 * 6, dtype=np.uint8).reshape(2, 5, 6)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.array([0, 1]))
    train, test = load(tmp_path / "a.npz", lone=True)
    assert (len(train), len(test)) == (2, 0)
    with pytest.raises(ValueError, match="no test split"):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "half.npz", x_train=x, y_train=np.array([0, 1]), x_test=x)
    with pytest.raises(ValueError, match="no test split"):
        load(tmp_path / "half.npz", lone=True)
