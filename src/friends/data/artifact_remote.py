"""Artifacts behind a URL: an object store or a file system that machines without a common disk share.

The list of files, ``artifact.json``, is written last and read first, so an artifact that is half there is not there.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

MANIFEST = "artifact.json"


class Remote:
    """A folder behind any URL that ``fsspec`` knows: ``s3://...``, ``gs://...``, ``file:///...``.

    Raises:
        ValueError: the URL's kind is unknown or its driver is not installed; the message says which package has it.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise ValueError("artifacts behind a URL need fsspec: pip install fsspec") from None
        try:
            system, root = cast("tuple[Any, str]", fsspec.core.url_to_fs(url))  # pyright: ignore[reportUnknownMemberType]
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot keep artifacts at {url!r}: {error}") from None
        self.url, self._system, self._root = url, system, root.rstrip("/")

    def manifest(self, kind: str, key: str) -> dict[str, Any] | None:
        """What an artifact consists of; ``None`` if it is not there."""
        try:
            text = self._system.cat_file(self._path(kind, key, MANIFEST))
        except FileNotFoundError:
            return None
        try:
            value = json.loads(text)
        except ValueError:  # cut off by a store that does not replace files at once
            return None
        return cast("dict[str, Any]", value) if isinstance(value, dict) else None

    def download(self, kind: str, key: str, name: str, sha256: str, to: Path) -> None:
        """Copy one file of an artifact here."""
        self._system.get_file(self._path(kind, key, _stored(name, sha256)), str(to))

    def upload(self, folder: Path, kind: str, key: str, hashes: Mapping[str, str]) -> None:
        """Copy a finished artifact there, its list of files last. One that is there already is left as it is."""
        if self.manifest(kind, key) is not None:
            return
        with contextlib.suppress(FileExistsError):
            self._system.makedirs(posixpath.join(self._root, kind, key), exist_ok=True)
        for name, sha256 in hashes.items():
            self._system.put_file(str(folder / name), self._path(kind, key, _stored(name, sha256)))
        self._system.put_file(str(folder / MANIFEST), self._path(kind, key, MANIFEST))

    def _path(self, kind: str, key: str, name: str) -> str:
        return posixpath.join(self._root, kind, key, name)


def _stored(name: str, sha256: str) -> str:
    """What a file is called there: two machines may upload at once, and every list must find its own files."""
    return f"{name}.{sha256[:16]}"
