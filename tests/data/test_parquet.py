from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from friends.data.sources import load

NAMES = ["airplane", "boat"]


def png(colour: int, size: tuple[int, int] = (4, 3), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 9)).convert(mode).save(buffer, "png")
    return buffer.getvalue()


def write(
    path: Path,
    images: list[bytes | None],
    labels: list[int | None],
    *,
    columns: tuple[str, str] = ("image", "label"),
    struct: bool = True,
    names: list[str] | None = None,
    metadata: Any = None,
) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    cells = [{"bytes": data, "path": "x.png"} for data in images] if struct else images
    table = pa.table(
        {"id": list(range(len(images))), columns[0]: pa.array(cells, kind), columns[1]: pa.array(labels, pa.int64())}
    )
    if names is not None:
        features = {columns[1]: {"names": names, "_type": "ClassLabel"}, columns[0]: {"_type": "Image"}}
        metadata = json.dumps({"info": {"features": features}})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "planes"
    write(root / "train.parquet", [png(c) for c in (10, 20, 30, 40, 50)], [0, 1, 0, 1, 1], names=NAMES)
    write(root / "test.parquet", [png(c) for c in (60, 70)], [1, 0], names=NAMES)
    return root


def test_pixels_labels_names_and_order(root: Path) -> None:
    train, test = load(root)
    assert train.classes == test.classes == ("airplane", "boat") and train.name == "planes"
    assert train.shape == (3, 3, 4) and train.x[:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50]
    assert train.y.tolist() == [0, 1, 0, 1, 1] and test.y.tolist() == [1, 0]
    assert test.x[0, :, 1, 1].tolist() == [60, 0, 9]


@pytest.mark.parametrize("columns", [("img", "labels"), ("image", "fine_label"), ("img", "label")])
@pytest.mark.parametrize("struct", [True, False])
def test_other_columns(tmp_path: Path, columns: tuple[str, str], struct: bool) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [png(1), png(2)], [0, 1], columns=columns, struct=struct)
    train, _ = load(tmp_path)
    assert train.x[:, 0, 0, 0].tolist() == [1, 2] and train.classes == ("0", "1")


@pytest.mark.parametrize("folder", ["data", "plain_text"])
@pytest.mark.parametrize("test", ["test", "validation", "val"])
def test_shards_in_sub_folders(tmp_path: Path, folder: str, test: str) -> None:
    write(tmp_path / folder / "train-00001-of-00002.parquet", [png(3)], [1], names=NAMES)
    write(tmp_path / folder / "train-00000-of-00002.parquet", [png(1), png(2)], [0, 1], names=NAMES)
    write(tmp_path / folder / f"{test}-00000-of-00001.parquet", [png(4)], [1], names=NAMES)
    train, held_out = load(tmp_path)
    assert train.x[:, 0, 0, 0].tolist() == [1, 2, 3] and held_out.x[:, 0, 0, 0].tolist() == [4]


def test_many_row_groups_keep_rows_and_labels_together(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).permutation(250).tolist()
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [png(c, (1, 1)) for c in colours], [c % 7 for c in colours])
    train, _ = load(tmp_path)
    assert train.x[:, 0, 0, 0].tolist() == colours and train.y.tolist() == [c % 7 for c in colours]


def test_several_configurations_must_be_chosen_from(tmp_path: Path) -> None:
    for name in ("big", "small"):
        write(tmp_path / name / "train.parquet", [png(1)], [0])
    with pytest.raises(ValueError, match="has several: big, small; name one of them"):
        load(tmp_path)


def test_missing_splits(root: Path) -> None:
    (root / "test.parquet").unlink()
    with pytest.raises(ValueError, match=r"no test split: neither test\*\.parquet nor val\*\.parquet"):
        load(root)
    (root / "train.parquet").rename(root / "test.parquet")
    with pytest.raises(ValueError, match=r"should have one folder with train\*\.parquet, but has none"):
        load(root)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        ([png(1), b"no image"], [0, 1], r"train\.parquet, row 1 is not a readable image"),
        ([png(1), png(2)[:45]], [0, 1], r"train\.parquet, row 1 is not a readable image"),
        ([png(1), None], [0, 1], r"train\.parquet, row 1 has no image bytes"),
        ([png(1), png(2, (5, 5))], [0, 1], r"row 0 is 3x4, .*row 1 is 5x5 .*pass size="),
        ([png(1), png(2)], [0, 2], r"row 1: label 2 is out of range: it should be in 0 \.\.\. 1"),
        ([png(1), png(2)], [-1, 0], "row 0: label -1 is out of range"),
        ([png(1), png(2)], [0, None], "row 1: label None is out of range"),
        ([], [], "have no row"),
        ([png(1), png(2)], [0, 0], r"class 'boat' \(label 1\) of planes has no training image"),
    ],
)
def test_bad_rows_are_named(root: Path, images: list[bytes | None], labels: list[int | None], words: str) -> None:
    write(root / "train.parquet", images, labels, names=NAMES)
    with pytest.raises(ValueError, match=words):
        load(root)


def test_labels_without_names_come_from_the_training_split(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [png(1), png(2)], [0, 1])
    write(tmp_path / "test.parquet", [png(1)], [2])
    with pytest.raises(ValueError, match=r"test\.parquet, row 0: label 2 is out of range"):
        load(tmp_path)
    write(tmp_path / "train.parquet", [png(1), png(2)], [0, 10**12])
    with pytest.raises(ValueError, match="label 1000000000000 is out of range"):
        load(tmp_path)


def test_size_and_grey(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [png(9, (4, 3), "L"), png(9, (8, 8), "L")], [0, 1])
    assert load(tmp_path, size=6)[0].shape == (1, 6, 6)


def test_columns_that_are_missing_or_of_another_type(root: Path) -> None:
    write(root / "train.parquet", [png(1)], [0], columns=("photo", "label"))
    with pytest.raises(ValueError, match=r"no column of encoded images \(image or img\); .* photo: struct"):
        load(root)
    write(root / "train.parquet", [png(1)], [0], columns=("image", "kind"))
    with pytest.raises(ValueError, match=r"no column of labels .*kind: int64"):
        load(root)
    table = pa.table({"image": pa.array([[1, 2]]), "label": [0]})
    pq.write_table(table, root / "train.parquet")
    with pytest.raises(ValueError, match="no column of encoded images"):
        load(root)


@pytest.mark.parametrize("metadata", ["{", "[]", '{"info": {"features": {"other": {}}}}'])
def test_odd_metadata_are_refused(root: Path, metadata: str) -> None:
    write(root / "train.parquet", [png(1)], [0], metadata=metadata)
    with pytest.raises(ValueError, match="metadata that do not describe column 'label'"):
        load(root)


def test_torn_files_are_refused(root: Path) -> None:
    path = root / "train.parquet"
    raw = path.read_bytes()
    for torn in (b"", b"PAR1", raw[:-1], raw[: len(raw) // 2]):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match=r"train\.parquet is torn or not a parquet file"):
            load(root)
    path.write_bytes(raw[:4] + bytes(len(raw) // 3) + raw[4 + len(raw) // 3 :])  # whole footer, zeroed pages
    with pytest.raises(ValueError, match=r"train\.parquet"):
        load(root)
