"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in the four forms that their author publishes, packed or unpacked.

Of the "python" form, which is pickles, see :mod:`friends.data.cifar_pickle`: nothing in it can run.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from friends.data.cifar_pickle import RecordedArray, text_of, unpickle
from friends.data.images import LabeledImages

PIXELS = 3 * 32 * 32
MAX_BYTES = 256 << 20
"""No file of theirs is larger than 154 MB."""


@dataclass(frozen=True)
class Form:
    """One of the published forms of one of the data sets.

    Args:
        name: what reports call the data.
        folder: what the archive unpacks to.
        archive: what the archive is called.
        md5: its published checksum.
        train: the files of training images, in order.
        test: the file of test images.
        names: the file of class names.
        label_bytes: bytes before the pixels of a binary record, of which the last is the (fine) label.
        labels: the key of the (fine) labels in a pickle.
        label_names: the key of their names.
    """

    name: str
    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int
    labels: str
    label_names: str

    @property
    def binary(self) -> bool:
        """Whether the files are plain records, not pickles."""
        return self.names.endswith(".txt")

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return (*self.train, self.test, self.names)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BATCHES_BIN = tuple(f"{name}.bin" for name in _BATCHES)
FORMS = (  # binary before python: it can hold nothing but pixels
    Form("cifar10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
         _BATCHES_BIN, "test_batch.bin", "batches.meta.txt", 1, "labels", "label_names"),
    Form("cifar100", "cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
         ("train.bin",), "test.bin", "fine_label_names.txt", 2, "fine_labels", "fine_label_names"),
    Form("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
         _BATCHES, "test_batch", "batches.meta", 1, "labels", "label_names"),
    Form("cifar100", "cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
         ("train",), "test", "meta", 2, "fine_labels", "fine_label_names"),
)  # fmt: skip


def read(path: Path) -> tuple[LabeledImages, LabeledImages]:
    """The training and test images of a published archive (read as it is) or of the folder it unpacks to.

    Raises:
        ValueError: it is no such thing, a file of it is missing or torn, or a label is out of range.
        friends.data.cifar_pickle.UnsafePickleError: a pickle asks for more than arrays of bytes.
    """
    if path.is_dir():
        form = form_of([file.name for file in path.iterdir()], str(path))
        files = {name: _read_capped(path / name) for name in form.files}
    else:
        files = _unpack(path)
        form = form_of(files, str(path))
    parse = _binary if form.binary else _pickled
    classes = _class_names(files[form.names], form, f"{path}, {form.names}")
    train = [parse(files[name], form, f"{path}, {name}") for name in form.train]
    test = [parse(files[form.test], form, f"{path}, {form.test}")]
    return _labeled(train, classes, form, f"{path}, training"), _labeled(test, classes, form, f"{path}, test")


def locate(name: str, folders: Iterable[Path]) -> Path | None:
    """The first folder or archive of the data set ``name`` in one of ``folders``, the binary form preferred."""
    tried = [form for form in FORMS if form.name == name]
    found = (folder / called for folder in folders for form in tried for called in (form.folder, form.archive))
    return next((path for path in found if path.exists()), None)


def form_of(names: Collection[str], where: str) -> Form:
    """The form whose files are all among ``names``.

    Raises:
        ValueError: there is none; says what the one that comes closest lacks.
    """
    lacking = {form: [file for file in form.files if file not in names] for form in FORMS}
    form = min(FORMS, key=lambda form: len(lacking[form]) / len(form.files))
    if not lacking[form]:
        return form
    if len(lacking[form]) == len(form.files):
        raise ValueError(f"{where} holds no file of CIFAR-10 or CIFAR-100")
    raise ValueError(f"{where} is not a whole {form.archive}: it lacks {', '.join(lacking[form])}")


def _read_capped(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any file of CIFAR")
    return path.read_bytes()


def _unpack(path: Path) -> dict[str, bytes]:
    """The files that some form needs, by their last name, from the archive's stream; nothing is written to disk."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            files = _members(path, stream)
            while stream.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is torn or not a tar archive: {error}") from error
    return files


def _members(path: Path, stream: gzip.GzipFile | BufferedReader) -> dict[str, bytes]:
    wanted = {name for form in FORMS for name in form.files}
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            if name not in wanted or not member.isfile():
                continue
            if member.size > MAX_BYTES or name in files:
                raise ValueError(f"{path} holds {name} twice, or larger than any file of CIFAR")
            files[name] = cast("Any", archive.extractfile(member)).read()
    return files


def _binary(
    raw: bytes, form: Form, where: str
) -> tuple[np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[Any]]]:
    record = form.label_bytes + PIXELS
    if not raw or len(raw) % record:
        raise ValueError(f"{where} is torn: {len(raw)} bytes are no whole number of {record}-byte records")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return rows[:, form.label_bytes :], rows[:, form.label_bytes - 1].astype(np.int64)


def _pickled(
    raw: bytes, form: Form, where: str
) -> tuple[np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[Any]]]:
    batch = unpickle(raw, where)
    data, labels = batch.get("data"), batch.get(form.labels)
    if not isinstance(data, RecordedArray) or not _integers(labels):
        raise ValueError(f"{where} lacks an array 'data' or a list of whole numbers {form.labels!r}")
    x, y = data.to_bytes(where), np.array(labels, dtype=np.int64)
    if x.ndim != 2 or x.shape[1] != PIXELS or len(x) != len(y) or not len(y):
        raise ValueError(f"{where} has data of {x.shape} for {len(y)} labels, not (n, {PIXELS})")
    return x, y


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and abs(item) < 1 << 31 for item in cast("Any", value))


def _class_names(raw: bytes, form: Form, where: str) -> tuple[str, ...]:
    if form.binary:
        names: Sequence[object] = raw.decode("utf-8", "replace").split()
    else:
        names = cast("Sequence[object]", unpickle(raw, where).get(form.label_names))
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where} lists no class names")
    return tuple(text_of(name) for name in names)


def _labeled(
    parts: list[tuple[np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[Any]]]],
    classes: tuple[str, ...],
    form: Form,
    where: str,
) -> LabeledImages:
    x = torch.from_numpy(np.concatenate([x for x, _ in parts]).reshape(-1, 3, 32, 32))
    y = torch.from_numpy(np.concatenate([y for _, y in parts]))
    try:
        return LabeledImages(x, y, classes, form.name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
