"""``friends export``: images with their friendly noise in them, for those who do not train with PyTorch.

While an export is under way its folder holds ``export.json``, which says of what, and the files that are whole.
``README.md`` is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

import numpy as np

from friends.data import sources
from friends.data.files import owned, sha256_of, write_json, write_text
from friends.data.images import LabeledImages
from friends.noise.baked_formats import AT_ONCE, FILE_ROWS, Format, Part, Piece, pieces, png, write
from friends.noise.baked_names import names_of
from friends.noise.baked_text import readme
from friends.noise.manifest import NAME
from friends.noise.rows import spread
from friends.noise.store import NoiseStore
from friends.types import Progress, silent

JOB, README = "export.json", "README.md"
FORMAT = "friends-export-1"
SAMPLE = 64
"""Images of a part that are encoded to see how large the files will be."""
BLOCK = 4096
"""What a small file takes on most disks is a multiple of this."""
ROOM = 1.05
"""How much more than the estimate has to be free."""


@dataclass(frozen=True)
class Export:
    """An export that has passed all checks; made by :func:`prepare`.

    Args:
        out: its folder.
        kind: the format.
        parts: training images with noise, then test images without, where there are any.
        store: the noise.
    """

    out: Path
    kind: Format
    parts: tuple[Part, ...]
    store: NoiseStore

    @cached_property
    def pieces(self) -> list[Piece]:
        """All files, README.md and export.json apart."""
        return pieces(self.kind, self.parts)

    @property
    def left(self) -> list[Piece]:
        """The files that are not there yet."""
        return [piece for piece in self.pieces if not (self.out / piece.path).is_file()]

    @cached_property
    def job(self) -> dict[str, object]:
        """Everything that the files follow from."""
        about: dict[str, object] = {"format": FORMAT, "kind": self.kind}
        about |= {f"{part.name} images": part.images.fingerprint for part in self.parts}
        about |= {"noise store": sha256_of(self.store.path / NAME), "rows of a file": [FILE_ROWS, AT_ONCE]}
        return about | {f"{part.name} names": _digest(part.names) for part in self.parts}

    def bytes(self, some: Sequence[Piece]) -> int:
        """About how many bytes some of the files take on a disk: a sample of their images is encoded."""
        if not some:
            return 0
        if self.kind == "npz":
            return sum(part.images.x.numel() + part.images.y.numel() * 8 for part in self.parts) + BLOCK
        total = 0.0
        for part in self.parts:
            mine = [piece for piece in some if piece.part is part]
            rows = spread(len(part.images), SAMPLE).tolist()
            sizes = [len(png(pixels)) for pixels in part.pixels(rows)] if mine else [0]
            if self.kind == "png":
                sizes = [-(-size // BLOCK) * BLOCK for size in sizes]
            total += float(np.mean(sizes)) * sum(len(piece.rows) for piece in mine)
        return int(total) + BLOCK * len(some) * (self.kind == "parquet")


def prepare(
    source: str,
    store: str | Path,
    out: Path,
    *,
    kind: str = "png",
    size: int | None = None,
    download: bool = False,
    progress: Progress = silent,
) -> Export:
    """Read data and noise, and raise for everything that can be known to be wrong; nothing is written.

    Args:
        source: the data, as ``friends.data.sources.load`` takes them.
        store: folder of the noise of their training images.
        out: the folder to write to: not there, empty, or an unfinished export of the same.
        kind: ``"png"``, ``"parquet"`` or ``"npz"``.
        size: side to which images of mixed sizes are resized, as when the noise was made.
        download: whether CIFAR may be fetched.
        progress: how far reading is.

    Raises:
        FileNotFoundError: there are no such data, or no such store.
        ValueError: the data or the store are damaged, the noise is of other images (the first difference is named),
            the format cannot hold them, or ``out`` holds anything else.
    """
    if kind not in get_args(Format):
        raise ValueError(f"unknown format {kind!r}; choose one of {', '.join(get_args(Format))}")
    _refuse_overlap(source, out)
    _theirs(out)
    noise = NoiseStore.load(store)
    train, test = _read(source, noise, size, download, progress)
    noise.check(train)
    if kind != "npz" and train.shape[0] not in (1, 3):
        raise ValueError(f"{train.name} has {train.shape[0]} channels; {kind} keeps grey and RGB: choose --format npz")
    names = names_of(source, train, test) if kind == "png" else ([], [])
    parts = [Part("train", train, noise, names[0]), Part("test", test, None, names[1])]
    export = Export(out, cast(Format, kind), tuple(part for part in parts if len(part.images)), noise)
    _refuse_other(export)
    return export


def check_space(export: Export) -> None:
    """Raise ``OSError`` if what is left to write does not fit on the disk."""
    there = next(folder for folder in (export.out.absolute(), *export.out.absolute().parents) if folder.exists())
    needed, free = int(ROOM * export.bytes(export.left)), shutil.disk_usage(there).free
    if needed > free:
        raise OSError(f"{export.out} needs about {needed / 1e6:,.1f} MB more, only {free / 1e6:,.1f} MB are free there")


def bake(export: Export, *, progress: Progress = silent) -> None:
    """Write the files that are not there yet.

    It may be killed at any moment: the same export goes on at the first file that is missing, and ends with the same
    bytes. Besides the images themselves, memory holds a few hundred of them at a time (npz: all of them once more).

    Raises:
        ValueError: the folder holds something else.
        OSError: the disk is too small.
        BlockingIOError: another process works in the folder.
    """
    check_space(export)
    export.out.mkdir(parents=True, exist_ok=True)
    with owned(export.out):
        _refuse_other(export)
        if not (export.out / JOB).is_file():
            write_json(export.out / JOB, export.job)
        write(export.kind, export.out, export.left, export.parts, progress)
        write_text(export.out / README, readme(export.kind, export.parts, export.store))


def _read(
    source: str, store: NoiseStore, size: int | None, download: bool, progress: Progress
) -> tuple[LabeledImages, LabeledImages]:
    """The data in the way in which the store's were read: whole, or without the fifth that is kept for testing."""
    whole = sources.load(source, size=size, download=download, lone=True, progress=progress)
    if len(whole[0]) == store.n or len(whole[1]):
        return whole
    with contextlib.suppress(ValueError):  # no test part, and none can be made: the store's check says what differs
        return sources.load(source, size=size, download=download, progress=progress)
    return whole


def _refuse_overlap(source: str, out: Path) -> None:
    """Raise ``ValueError`` if the export would lie among the data: it would be read as a part of them."""
    data = Path(source).expanduser()
    if source not in sources.NAMES and data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"{out} lies in the data, {source}: choose another folder with --out")


def _theirs(out: Path) -> Mapping[str, object] | None:
    """What an export that a folder holds is of; None for a folder that is empty or not there.

    Raises:
        ValueError: it holds something else, or an export that is finished.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder with --out")
    entries = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if not [name for name in entries if not name.endswith(".tmp")]:
        return None
    try:
        job = json.loads((out / JOB).read_text(encoding="utf-8"))
        ours = job["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours, job = False, {}
    if not ours:
        raise ValueError(f"{out} is not empty and no export (it has {entries[0]!r}): choose another folder with --out")
    if (out / README).is_file():
        raise ValueError(f"{out} holds a finished export: choose another folder with --out")
    return cast("Mapping[str, object]", job)


def _refuse_other(export: Export) -> None:
    """Raise ``ValueError`` if the folder holds an export of anything else, naming the first difference."""
    theirs = _theirs(export.out)
    if theirs is None:
        return
    for name in [*export.job, *theirs]:
        if export.job.get(name) != theirs.get(name):
            raise ValueError(f"{export.out} holds an unfinished export with another {name}: choose another folder with "
                             "--out, or delete that one")  # fmt: skip


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
