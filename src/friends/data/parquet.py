"""Parquet files of encoded images and labels, as the Hugging Face ``datasets`` library writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from friends.data.decode import Encoded, decode_all
from friends.data.images import LabeledImages
from friends.types import Progress, silent

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")
TEST_NAMES = ("test", "val")
BATCH = 512


@dataclass(frozen=True)
class Part:
    """One file: which of its columns are the image and the label, how many rows, and the class names if stated."""

    path: Path
    image: str
    label: str
    rows: int
    names: tuple[str, ...] | None


def looks_like(root: Path) -> bool:
    """Whether there are parquet files in ``root`` or directly below it."""
    return any(root.glob("*.parquet")) or any(root.glob("*/*.parquet"))


def read(
    root: Path,
    *,
    size: int | None = None,
    lone: bool = False,
    skipped: list[str] | None = None,
    progress: Progress = silent,
) -> tuple[LabeledImages, LabeledImages]:
    """The training and test images of a folder with ``train*.parquet`` and ``test*.parquet`` (or ``val*.parquet``).

    The files lie in the folder, or in ``data`` or the only other sub-folder that has them. Each holds a column
    ``image`` or ``img``, of encoded bytes or of structs with such a field ``bytes``, and a whole-number column
    ``label``, ``labels`` or ``fine_label``. Class names come from the schema's ``huggingface`` metadata, else they
    are "0", "1", ... Files are streamed; the encoded data are never in memory at once.

    Args:
        size: height and width to bring all images to; None demands that they are equal already.
        lone: without a test split the test part has no image, instead of that being an error.
        skipped: takes up what is wrong with images that cannot be read, which are then left out.

    Raises:
        ValueError: a split or column is missing, a file is torn, an image corrupt, a label out of range, or sizes
            differ and ``size`` is None; the file and row are named.
    """
    root = root.resolve()
    folder = _folder(root)
    train = [_part(path) for path in sorted(folder.glob("train*.parquet"))]
    test = next((found for name in TEST_NAMES if (found := sorted(folder.glob(f"{name}*.parquet")))), None)
    if test is None and not lone:
        raise ValueError(f"{folder} has train*.parquet but no test split: neither test*.parquet nor val*.parquet")
    first = _load(train, train[0].names, root.name, "read train", size, skipped, progress)
    if test is None:
        return first, first.rows([])
    return first, _load([_part(path) for path in test], first.classes, root.name, "read test", size, skipped, progress)


def _folder(root: Path) -> Path:
    for folder in (root, root / "data"):
        if any(folder.glob("train*.parquet")):
            return folder
    below = sorted({path.parent for path in root.glob("*/train*.parquet")})
    if len(below) != 1:
        which = f"several: {', '.join(path.name for path in below)}; name one of them" if below else "none"
        raise ValueError(f"{root} should have one folder with train*.parquet, but has {which}")
    return below[0]


def _part(path: Path) -> Part:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is torn or not a parquet file: {error}") from error
    image = next((name for name in IMAGES if name in schema.names and _holds_images(schema.field(name).type)), None)
    label = next((n for n in LABELS if n in schema.names and pa.types.is_integer(schema.field(n).type)), None)
    if image is None or label is None:
        missing = f"encoded images ({' or '.join(IMAGES)})" if image is None else f"labels ({', '.join(LABELS)})"
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(f"{path} has no column of {missing}; its columns are {columns}")
    return Part(path, image, label, rows, _class_names(path, schema, label))


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(path: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        names = json.loads(raw)["info"]["features"][label].get("names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has 'huggingface' metadata that do not describe column {label!r}") from error
    return tuple(str(name) for name in names) if names else None


def _load(
    parts: list[Part],
    classes: tuple[str, ...] | None,
    name: str,
    what: str,
    size: int | None,
    skipped: list[str] | None,
    progress: Progress,
) -> LabeledImages:
    labels: list[int] = []
    rows = sum(part.rows for part in parts)
    if rows == 0:
        raise ValueError(f"{parts[0].path} and what belongs to it have no row")
    top = len(classes) if classes else rows  # without names there are at most as many classes as rows
    images = (image for part in parts for image in _stream(part, top, labels))
    broken = None if skipped is None else dict[int, str]()
    x = decode_all(images, rows, size=size, skipped=broken, progress=progress, what=what)
    classes = classes or tuple(str(label) for label in range(max(labels) + 1))
    if skipped is not None:
        skipped += (broken or {}).values()
    y = torch.tensor([label for row, label in enumerate(labels) if not broken or row not in broken])
    return LabeledImages(x, y, classes, name)


def _stream(part: Part, top: int, labels: list[int]) -> Iterator[Encoded]:
    """Yield the images of one file; their labels are checked and appended to ``labels``."""
    row = 0
    try:
        with pq.ParquetFile(part.path) as file:
            for batch in file.iter_batches(BATCH, columns=[part.image, part.label]):
                column = batch.column(part.image)
                encoded = column.field("bytes") if pa.types.is_struct(column.type) else column
                for data, label in zip(encoded.to_pylist(), batch.column(part.label).to_pylist(), strict=True):
                    where = f"{part.path}, row {row}"
                    if data is None:
                        raise ValueError(f"{where} has no image bytes, at most a path to them")
                    if label is None or not 0 <= label < top:
                        raise ValueError(f"{where}: label {label} is out of range: it should be in 0 ... {top - 1}")
                    labels.append(label)
                    row += 1
                    yield Encoded(where, data)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{part.path} is torn: {error}") from error
