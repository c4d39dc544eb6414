"""Folders of image files, one sub-folder a class, as torchvision's ``ImageFolder`` has them; Tiny-ImageNet too."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from friends.data.decode import Encoded, decode_all
from friends.data.images import LabeledImages
from friends.types import Progress, silent

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
TEST_NAMES = ("test", "val", "validation", "valid")
TEST_SHARE = 0.2
ANNOTATIONS = "val_annotations.txt"

ByClass = dict[str, list[Path]]


def looks_like(root: Path) -> bool:
    """Whether some sub-folder of ``root`` holds images, however deep."""
    return any(files for files in _by_class(root).values())


def read(
    root: Path,
    *,
    size: int | None = None,
    lone: bool = False,
    skipped: list[str] | None = None,
    progress: Progress = silent,
) -> tuple[LabeledImages, LabeledImages]:
    """The training and test images of a folder; classes are its sub-folders in alphabetical order.

    With ``train/CLASS/...`` and ``test/CLASS/...`` (or ``val``) the split is as the folders say; Tiny-ImageNet's
    ``val_annotations.txt`` is understood. With ``CLASS/...`` alone a fifth of each class, at least one image, is
    for testing: those whose relative paths have the smallest hashes, so it is the same wherever the folder lies.

    Args:
        root: the folder. Hidden files and files that are no images by their suffix are passed over.
        size: height and width to bring all images to; None demands that they are equal already.
        lone: without folders for testing all images are for training, and the test part has none.
        skipped: takes up what is wrong with images that cannot be read, which are then left out.

    Raises:
        ValueError: a class has no image or is in only one split, there is no test split, an image is corrupt, or
            sizes differ and ``size`` is None; the class or file is named.
    """
    root = root.resolve()
    train, test = _splits(root, lone=lone)
    first = decoded(train, tuple(train), root.name, "read train", size, skipped, progress)
    if not test:
        return first, first.rows([])
    return first, decoded(test, tuple(train), root.name, "read test", size, skipped, progress)


def files_of(root: Path, *, lone: bool = False) -> tuple[ByClass, ByClass]:
    """The files that :func:`read` reads for training and for testing, class by class, in its order.

    Raises:
        ValueError: as :func:`read`, without looking into any file.
    """
    return _splits(root.resolve(), lone=lone)


def _splits(root: Path, *, lone: bool) -> tuple[ByClass, ByClass]:
    if not (root / "train").is_dir():
        return _unsplit(root, lone=lone)
    folder = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
    if folder is None and lone:
        train = _by_class(root / "train")
        _check_classes(root / "train", train)
        return train, {}
    if folder is None:
        raise ValueError(f"{root} has train/ but no test split: none of {', '.join(TEST_NAMES)} is there")
    train = _by_class(root / "train")
    test = _annotated(folder) if (folder / ANNOTATIONS).exists() else _by_class(folder)
    _check_classes(root / "train", train)
    _check_classes(folder, test)
    odd = sorted(set(train) ^ set(test))
    if odd:
        only = "train" if odd[0] in train else folder.name
        raise ValueError(f"{root}: class {odd[0]!r} is in {only} only ({len(odd)} such classes)")
    return train, {name: test[name] for name in train}


def _by_class(root: Path) -> ByClass:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {folder.name: images_below(folder) for folder in folders}


def images_below(folder: Path) -> list[Path]:
    """Every image file in a folder, however deep, in alphabetical order.

    Links to folders are not followed: they may lead in circles."""
    found = [
        Path(where) / name
        for where, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
    ]
    return sorted(found)


def _unsplit(root: Path, *, lone: bool) -> tuple[ByClass, ByClass]:
    by_class = _by_class(root)
    if lone:
        _check_classes(root, by_class)
        return by_class, {}
    return divided(root, by_class, lambda path: path.relative_to(root).as_posix())


def _annotated(folder: Path) -> ByClass:
    """Tiny-ImageNet's validation split: the first two words of a line are an image's name and its class."""
    by_class: ByClass = {}
    for number, line in enumerate((folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) < 2 or Path(words[0]).name != words[0]:
            raise ValueError(f"{folder / ANNOTATIONS}, line {number}: an image and its class expected, not {line!r}")
        by_class.setdefault(words[1], []).append(folder / "images" / words[0])
    return by_class


def _check_classes(folder: Path, by_class: ByClass, least: int = 1) -> None:
    if not by_class:
        raise ValueError(f"{folder} has no class folders")
    for name, files in by_class.items():
        if len(files) < least:
            wanted = "no image" if least == 1 else f"{len(files)} image(s), too few to split into train and test"
            raise ValueError(f"class {name!r} of {folder} has {wanted} (suffixes {', '.join(sorted(SUFFIXES))})")


def divided(where: Path, by_class: ByClass, name: Callable[[Path], str]) -> tuple[ByClass, ByClass]:
    """A fifth of each class for testing: the files whose names, wherever they lie, have the smallest hashes.

    Raises:
        ValueError: a class has fewer than two images.
    """
    _check_classes(where, by_class, least=2)

    def key(path: Path) -> bytes:
        return hashlib.sha256(name(path).encode("utf-8", "surrogateescape")).digest()

    train: ByClass = {}
    test: ByClass = {}
    for label, files in by_class.items():
        chosen = set(sorted(files, key=key)[: max(1, round(TEST_SHARE * len(files)))])
        test[label] = [file for file in files if file in chosen]
        train[label] = [file for file in files if file not in chosen]
    return train, test


def decoded(
    by_class: ByClass,
    classes: Sequence[str],
    called: str,
    what: str,
    size: int | None,
    skipped: list[str] | None,
    progress: Progress,
) -> LabeledImages:
    """The images of all classes, those that cannot be read in ``skipped`` where that is a list.

    Raises:
        ValueError: as ``friends.data.decode.decode_all``.
    """
    files = [(label, file) for label, name in enumerate(classes) for file in by_class.get(name, [])]
    broken = None if skipped is None else dict[int, str]()
    images = [Encoded(str(file), file) for _, file in files]
    x = decode_all(images, len(images), size=size, skipped=broken, progress=progress, what=what)
    y = torch.tensor([label for place, (label, _) in enumerate(files) if not broken or place not in broken])
    if skipped is not None:
        skipped += (broken or {}).values()
    return LabeledImages(x, y, tuple(classes), called)
