"""Folders of image files, one sub-folder a class, as torchvision's ``ImageFolder`` has them; Tiny-ImageNet too."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
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


def read(root: Path, *, size: int | None = None, progress: Progress = silent) -> tuple[LabeledImages, LabeledImages]:
    """The training and test images of a folder; classes are its sub-folders in alphabetical order.

    With ``train/CLASS/...`` and ``test/CLASS/...`` (or ``val``) the split is as the folders say; Tiny-ImageNet's
    ``val_annotations.txt`` is understood. With ``CLASS/...`` alone a fifth of each class, at least one image, is
    for testing: those whose relative paths have the smallest hashes, so it is the same wherever the folder lies.

    Args:
        root: the folder. Hidden files and files that are no images by their suffix are passed over.
        size: height and width to bring all images to; None demands that they are equal already.

    Raises:
        ValueError: a class has no image or is in only one split, there is no test split, an image is corrupt, or
            sizes differ and ``size`` is None; the class or file is named.
    """
    root = root.resolve()
    train, test = _splits(root)
    classes = tuple(train)
    decoded = [
        _decoded(root, files, classes, f"read {split}", size, progress)
        for split, files in (("train", train), ("test", test))
    ]
    return decoded[0], decoded[1]


def _splits(root: Path) -> tuple[ByClass, ByClass]:
    if not (root / "train").is_dir():
        return _hashed(root, _by_class(root))
    folder = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
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
    return {folder.name: _images_below(folder) for folder in folders}


def _images_below(folder: Path) -> list[Path]:
    """Links to folders are not followed: they may lead in circles."""
    found = [
        Path(where) / name
        for where, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
    ]
    return sorted(found)


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


def _hashed(root: Path, by_class: ByClass) -> tuple[ByClass, ByClass]:
    _check_classes(root, by_class, least=2)

    def key(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")).digest()

    train: ByClass = {}
    test: ByClass = {}
    for name, files in by_class.items():
        chosen = set(sorted(files, key=key)[: max(1, round(TEST_SHARE * len(files)))])
        test[name] = [file for file in files if file in chosen]
        train[name] = [file for file in files if file not in chosen]
    return train, test


def _decoded(
    root: Path, by_class: ByClass, classes: Sequence[str], what: str, size: int | None, progress: Progress
) -> LabeledImages:
    images = [Encoded(str(file), file) for name in classes for file in by_class[name]]
    x = decode_all(images, len(images), size=size, progress=progress, what=what)
    y = torch.tensor([label for label, name in enumerate(classes) for _ in by_class[name]])
    return LabeledImages(x, y, tuple(classes), root.name)
