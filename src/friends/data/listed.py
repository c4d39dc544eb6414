"""A CSV file of paths and labels, and perhaps of the part of the data that each image belongs to."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from friends.data.decode import BrokenImageError
from friends.data.folders import ByClass, decoded, divided
from friends.data.images import LabeledImages
from friends.types import Progress, silent

PATHS = ("path", "file", "filename", "filepath", "image")
LABELS = ("label", "class", "target")
PARTS = ("split", "part", "subset")
TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """One line: its number, the path as it is written, its label, and whether it is for testing, if that is said."""

    line: int
    path: str
    label: str
    for_test: bool | None


def read(
    file: Path,
    *,
    size: int | None = None,
    lone: bool = False,
    skipped: list[str] | None = None,
    progress: Progress = silent,
) -> tuple[LabeledImages, LabeledImages]:
    """The training and test images that a CSV file lists; its first line names the columns.

    One column is ``path`` (or ``file``, ``filename``, ``filepath``, ``image``), relative to the CSV file's folder; one
    is ``label`` (or ``class``, ``target``), any text. A column ``split`` (or ``part``, ``subset``) may say ``train`` or
    ``test`` (or ``val``). Without it a fifth of each class is for testing: those whose paths, as written, have the
    smallest hashes. Classes are in alphabetical order, or in order of size where all of them are whole numbers.

    Args:
        file: ends in ``.csv`` (commas) or ``.tsv`` (tabs); UTF-8.
        size, lone, skipped, progress: as ``friends.data.sources.load`` takes them.

    Raises:
        BrokenImageError: an image is not there or corrupt; the line or file is named.
        ValueError: a column, path or label is missing, a file is listed twice, or a class is in one part only.
    """
    rows = list(_rows(file))
    if not rows:
        raise ValueError(f"{file} lists no image")
    _check_twice(file, rows)
    if skipped is None:
        _check_there(file, rows)
    parts = {row.for_test for row in rows}
    if None in parts:
        listed, here = _by_class(file, rows), f"{file.parent.as_posix()}/"
        train, test = (
            (listed, ByClass()) if lone else divided(file, listed, lambda path: path.as_posix().removeprefix(here))
        )
    else:
        train = _by_class(file, [row for row in rows if not row.for_test])
        test = _by_class(file, [row for row in rows if row.for_test])
        _check_parts(file, train, test, lone=lone)
    first = decoded(train, tuple(train), file.stem, "read train", size, skipped, progress)
    if not test:
        return first, first.rows([])
    return first, decoded(test, tuple(train), file.stem, "read test", size, skipped, progress)


def _rows(file: Path) -> Iterator[Row]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream, delimiter=DELIMITERS[file.suffix.lower()], restkey="", strict=True)
            names = [name.strip() for name in table.fieldnames or []]
            table.fieldnames = names
            path, label = (_column(file, names, wanted) for wanted in (PATHS, LABELS))
            part = next((name for name in names if name.lower() in PARTS), None)
            for values in table:
                where = f"{file}, line {table.line_num}"
                yield Row(table.line_num, _cell(values, path, where), _cell(values, label, where),
                          None if part is None else _for_test(_cell(values, part, where), where))  # fmt: skip
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a table in UTF-8: {error}") from error


def _column(file: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    found = [name for name in names if name.lower() in wanted]
    if len(found) != 1:
        what = (
            f"two such columns, {found[0]} and {found[1]}" if found else f"the columns {', '.join(names) or '(none)'}"
        )
        raise ValueError(f"{file}: its first line should name one column {' or '.join(wanted)}, but it has {what}")
    return found[0]


def _cell(values: Mapping[str, str | list[str] | None], name: str, where: str) -> str:
    value = values.get(name)
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"{where}: no {name}")
    return text


def _for_test(text: str, where: str) -> bool:
    if text.lower() not in (*TRAIN, *TEST):
        raise ValueError(f"{where}: a part is {', '.join((*TRAIN, *TEST))}, not {text!r}")
    return text.lower() in TEST


def _check_twice(file: Path, rows: list[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        if (other := seen.setdefault(row.path, row)) is not row:
            raise ValueError(f"{file}: {row.path} is on line {other.line} ({other.label}) and again on line {row.line} "
                             f"({row.label})")  # fmt: skip


def _check_there(file: Path, rows: list[Row]) -> None:
    for row in rows:
        if not (file.parent / row.path).is_file():
            raise BrokenImageError(f"{file}, line {row.line}: there is no file {row.path}")


def _check_parts(file: Path, train: ByClass, test: ByClass, *, lone: bool) -> None:
    if not train or not (test or lone):
        raise ValueError(f"{file} lists no {'test' if train else 'training'} image")
    for name in test:
        if name not in train:
            raise ValueError(f"{file}: class {name!r} has test images, but no training image")


def _by_class(file: Path, rows: list[Row]) -> ByClass:
    """The files of each class, in the order in which they are listed."""
    labels = {row.label for row in rows}
    whole = all(label.isdecimal() for label in labels)
    found: ByClass = {name: [] for name in sorted(labels, key=lambda name: (int(name) if whole else 0, name))}
    for row in rows:
        found[row.label].append(file.parent / row.path)
    return found
