"""What the files of an exported image folder are called: as in the folder that the images are from, else their rows."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from friends.data import folders, parquet
from friends.data.images import LabeledImages


def names_of(source: str, train: LabeledImages, test: LabeledImages) -> tuple[list[str], list[str]]:
    """``CLASS/NAME.png`` for every row of both parts.

    In a folder of images a file keeps its path, with another suffix; where two would then be the same, all files keep
    their old suffixes before the new one. Images from anything else are called by their rows.

    Raises:
        ValueError: a class has a name that no folder can have, or no test image where others have: such an image
            folder could not be read back.
    """
    _check_classes(train, test)
    kept = _kept(Path(source).expanduser(), train, test)
    return kept or (_numbered(train), _numbered(test))


def _check_classes(train: LabeledImages, test: LabeledImages) -> None:
    for name in train.classes:
        plain = name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")
        if not plain or not name or len(name.encode()) > 200:
            raise ValueError(f"class {name!r} cannot be the name of a folder: choose --format parquet or npz")
    if len(set(train.classes)) < len(train.classes):
        raise ValueError("two classes have the same name, so one folder: choose --format parquet or npz")
    missing = set(range(len(train.classes))) - set(test.y.tolist())
    if len(test) and missing:
        raise ValueError(f"class {train.classes[min(missing)]!r} has no test image, which an image folder has to have: "
                         "choose --format parquet or npz")  # fmt: skip


def _numbered(images: LabeledImages) -> list[str]:
    digits = len(str(max(len(images) - 1, 0)))
    return [f"{images.classes[label]}/{row:0{digits}d}.png" for row, label in enumerate(images.y.tolist())]


def _kept(root: Path, train: LabeledImages, test: LabeledImages) -> tuple[list[str], list[str]] | None:
    """The names of a folder of images, None for anything else."""
    if not root.is_dir() or parquet.looks_like(root) or not folders.looks_like(root):
        return None
    both = folders.files_of(root, lone=not len(test))
    root = root.resolve()
    parts: list[list[PurePosixPath]] = []
    for by_class, images in zip(both, (train, test), strict=True):
        files = [(name, file) for name in images.classes for file in by_class.get(name, [])]
        if len(files) != len(images):  # CIFAR, in a folder that has images beside it
            return None
        parts.append([_below(root, name, file) for name, file in files])
    for keep in (False, True):
        named = [[str(_as_png(path, keep_suffix=keep)) for path in part] for part in parts]
        if all(len(set(names)) == len(names) for names in named):
            return named[0], named[1]
    return None


def _as_png(path: PurePosixPath, *, keep_suffix: bool) -> PurePosixPath:
    return path.with_name(f"{path.name}.png") if keep_suffix else path.with_suffix(".png")


def _below(root: Path, label: str, file: Path) -> PurePosixPath:
    """``CLASS/...`` of a file; Tiny-ImageNet's validation images are in no folder of their class."""
    for part in ("train", *folders.TEST_NAMES, "."):
        if file.is_relative_to(root / part / label):
            return PurePosixPath(label, file.relative_to(root / part / label).as_posix())
    return PurePosixPath(label, file.name)
