"""What was computed once is found from then on: files under a name that follows from everything they are made of.

An artifact is a folder of files that depends on nothing but its *identity*: settings, seed, fingerprints of data, a
digest of the code. Its key is a hash of them. Processes that share a cache make an artifact once between them: one
makes it while the others wait. It is made in a folder of its own and moved to its place whole, so that it is there or
not, never half; a process that is killed leaves the folder to whoever makes the artifact next, with whatever
checkpoints are in it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from friends.data.artifact_lock import is_locked, locked
from friends.data.artifact_remote import MANIFEST, Remote
from friends.data.files import sha256_of, write_json
from friends.types import Progress, silent

FORMAT = "friends-artifact-1"
MARKER = "friends-cache.json"
HALF = "half"
"""A folder in an artifact that is being made, for checkpoints; it is not part of what is made."""
NAME = re.compile(r"[a-z][a-z0-9-]*")
RESERVED = ("work", "locks")
_IDLE = 600.0
"""Seconds without a change after which an unlocked folder in the making counts as left behind."""


class DamagedError(ValueError):
    """A file of an artifact is missing or is not as it was written."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact.

    Args:
        folder: where its files are.
        kind: what it is, such as ``"poison"``.
        key: hash of kind and identity.
        identity: everything that it is made of, as plain values.
        facts: what its maker had to say of it.
        title: in words.
        size: bytes of its files.
        made: when, UTC.
        hashes: SHA-256 by name of file.
    """

    folder: Path
    kind: str
    key: str
    identity: dict[str, object]
    facts: dict[str, object]
    title: str = ""
    size: int = 0
    made: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def file(self, name: str) -> Path:
        """The path of one of its files, after a look whether it is as it was written.

        Raises:
            KeyError: the artifact has no such file.
            DamagedError: the file has changed; the message says how to have it made anew.
        """
        problem = _problem(self.folder / name, self.hashes[name])
        if problem:
            raise DamagedError(f"{self.folder / name} {problem}: remove the folder {self.folder}, and it is made anew")
        return self.folder / name

    @property
    def used(self) -> float:
        """When it was last made or found, in seconds since 1970."""
        return (self.folder / MANIFEST).stat().st_mtime


@dataclass(frozen=True)
class Unfinished:
    """What a process has begun to make: it still does (``busy``), or was killed and left it to the next.

    Args:
        folder: where it lies.
        size: bytes.
        used: when something in it last changed, in seconds since 1970.
        busy: whether a process makes it just now, or did so in the last minutes.
    """

    folder: Path
    size: int
    used: float
    busy: bool


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written."""

    artifact: Artifact
    name: str
    problem: str


class Artifacts:
    """A folder of artifacts that any number of processes use at once.

    Args:
        root: the folder; it is made when the first artifact is.
        remote: a URL for ``fsspec`` where artifacts are looked for when they are not here, and copied to when they
            are made here: for machines without a common disk. Nothing is locked there: two machines may make the same
            artifact at the same time, and the first to be there is kept.

    Raises:
        ValueError: the folder holds other things, or the URL is of an unknown kind.
    """

    def __init__(self, root: Path, *, remote: str | None = None) -> None:
        self.root, self.url = Path(root), remote
        self._remote = None if remote is None else Remote(remote)
        marker = self.root / MARKER
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is a file; a cache is a folder")
        if not marker.exists() and self.root.exists() and any(self.root.iterdir()) and not self._looks_like_one():
            raise ValueError(f"{self.root} holds other things and is no cache: choose a folder that is new or empty")

    def _looks_like_one(self) -> bool:
        """A cache whose first process was killed before it could leave the marker."""
        return all(path.name in RESERVED or path.name.startswith(f".{MARKER}") for path in self.root.iterdir())

    def key(self, kind: str, identity: Mapping[str, object]) -> str:
        """The key that follows from kind and identity: 32 hexadecimal digits.

        Raises:
            ValueError: the kind is no plain word, or the identity is no plain value that JSON can spell.
        """
        if not NAME.fullmatch(kind) or kind in RESERVED:
            raise ValueError(f"the kind of an artifact is a word in small letters, not {kind!r}")
        try:
            text = json.dumps([kind, identity], sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the identity of a {kind} has something in it that is no plain value: {error}") from None
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def has(self, kind: str, identity: Mapping[str, object]) -> bool:
        """Whether an artifact is there, here or at the URL; nothing is copied."""
        key = self.key(kind, identity)
        if (self.root / kind / key / MANIFEST).exists():
            return True
        return self._remote is not None and self._remote.manifest(kind, key) is not None

    def find(self, kind: str, identity: Mapping[str, object]) -> Artifact | None:
        """An artifact that is there; ``None`` if it is not."""
        return self.by_key(kind, self.key(kind, identity))

    def by_key(self, kind: str, key: str) -> Artifact | None:
        """An artifact that is there, by its key; from the URL it is copied here."""
        found = self._here(kind, key)
        if found is None and self._remote is not None:
            self._fetch(self._remote, kind, key)
            found = self._here(kind, key)
        if found is not None:
            _touch(found.folder / MANIFEST)
        return found

    def obtain(
        self,
        kind: str,
        identity: Mapping[str, object],
        make: Callable[[Path], Mapping[str, object] | None],
        *,
        title: str = "",
        progress: Progress = silent,
    ) -> Artifact:
        """Find an artifact, or make it while other processes that need it wait.

        Args:
            kind, identity: what it is called by.
            make: writes its files into the given folder and returns facts about it. The folder may hold what a
                killed process left there; what it keeps in ``half/`` is removed in the end.
            title: in words, for lists.
            progress: told when another process is waited for.

        Raises:
            RuntimeError: ``make`` asks for the artifact that it is making.
        """
        found = self.find(kind, identity)
        if found is not None:
            return found
        key = self.key(kind, identity)

        wait, waited = f"waiting for another process's {kind}", False

        def waiting(seconds: float) -> None:
            nonlocal waited
            waited = True
            progress(wait, 0, 1, f"{seconds:.0f} s")

        with locked(self._lock(kind, key), waiting) as alone:
            if waited:
                progress(wait, 1, 1)
            found = self.find(kind, identity)
            if found is None:
                self._mark()
                # Without locks two processes must not share a folder: each makes its own, the first is kept.
                own = "" if alone else f"-{uuid.uuid4().hex[:8]}"
                work = self.root / "work" / f"{kind}-{key}{own}"
                work.mkdir(parents=True, exist_ok=True)
                self._make(kind, key, identity, make, title, work)
                found = self._here(kind, key)
        if found is None:
            raise RuntimeError(f"{kind} {key} was removed from {self.root} as soon as it was made")
        return found

    def _make(
        self,
        kind: str,
        key: str,
        identity: Mapping[str, object],
        make: Callable[[Path], Mapping[str, object] | None],
        title: str,
        work: Path,
    ) -> None:
        begun = time.monotonic()
        facts = dict(make(work) or {})
        shutil.rmtree(work / HALF, ignore_errors=True)
        names = sorted(str(file.relative_to(work).as_posix()) for file in work.rglob("*") if file.is_file())
        names = [name for name in names if name != MANIFEST]
        files = {name: {"sha256": sha256_of(work / name), "bytes": (work / name).stat().st_size} for name in names}
        made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        write_json(
            work / MANIFEST,
            {
                "format": FORMAT,
                "kind": kind,
                "key": key,
                "title": title,
                "identity": identity,
                "facts": facts,
                "made": made,
                "took": round(time.monotonic() - begun, 3),
                "files": files,
            },
        )
        self._place(work, kind, key)
        if self._remote is not None:
            placed = self._here(kind, key)
            if placed is not None:
                self._remote.upload(placed.folder, kind, key, placed.hashes)

    def _place(self, work: Path, kind: str, key: str) -> None:
        """Move a finished folder to its place; if another is there already, that one stays."""
        target = self.root / kind / key
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(work, target)
        except OSError:
            if not (target / MANIFEST).exists():
                raise
            shutil.rmtree(work, ignore_errors=True)

    def _here(self, kind: str, key: str) -> Artifact | None:
        folder = self.root / kind / key
        try:
            value = cast("dict[str, object]", json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise DamagedError(f"{folder / MANIFEST} is no JSON ({error}): remove the folder {folder}") from None
        if value.get("format") != FORMAT:
            raise DamagedError(f"{folder / MANIFEST} is not of this version ({FORMAT}): remove the folder {folder}")
        files = cast("dict[str, dict[str, object]]", value["files"])
        return Artifact(
            folder=folder,
            kind=kind,
            key=key,
            identity=cast("dict[str, object]", value["identity"]),
            facts=cast("dict[str, object]", value["facts"]),
            title=str(value["title"]),
            size=sum(int(str(of["bytes"])) for of in files.values()),
            made=str(value["made"]),
            hashes={name: str(of["sha256"]) for name, of in files.items()},
        )

    def _fetch(self, remote: Remote, kind: str, key: str) -> None:
        """Copy an artifact from the URL, compare its files with their hashes, and put it in place."""
        manifest = remote.manifest(kind, key)
        if manifest is None:
            return
        self._mark()
        work = self.root / "work" / f"{kind}-{key}-copy-{uuid.uuid4().hex[:8]}"
        work.mkdir(parents=True)
        try:
            for name, of in cast("dict[str, dict[str, str]]", manifest["files"]).items():
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DamagedError(f"{kind} {key} at {remote.url} names a file outside itself: {name!r}")
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                remote.download(kind, key, name, of["sha256"], work / name)
                problem = _problem(work / name, of["sha256"])
                if problem:
                    raise DamagedError(f"{name} of {kind} {key} at {remote.url} {problem}: remove it there")
            write_json(work / MANIFEST, manifest)
            self._place(work, kind, key)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _mark(self) -> None:
        if not (self.root / MARKER).exists():
            write_json(self.root / MARKER, {"format": FORMAT})

    def _lock(self, kind: str, key: str) -> Path:
        return self.root / "locks" / f"{kind}-{key}"

    # Looking after it

    def list(self, kinds: Sequence[str] = ()) -> list[Artifact]:
        """All finished artifacts here, by kind and time of making."""
        found: list[Artifact] = []
        for folder in sorted(path for path in self.root.glob("*") if path.is_dir() and path.name not in RESERVED):
            if kinds and folder.name not in kinds:
                continue
            some = [self._here(folder.name, path.parent.name) for path in folder.glob(f"*/{MANIFEST}")]
            found += sorted((artifact for artifact in some if artifact is not None), key=lambda a: (a.made, a.key))
        return found

    def unfinished(self) -> list[Unfinished]:
        """What was begun and is not finished, oldest first."""
        found: list[Unfinished] = []
        for folder in (self.root / "work").glob("*"):
            files = [file.stat() for file in folder.rglob("*") if file.is_file()]
            used = max([folder.stat().st_mtime, *(file.st_mtime for file in files)])
            busy = time.time() - used < _IDLE or is_locked(self.root / "locks" / folder.name)
            found.append(Unfinished(folder, sum(file.st_size for file in files), used, busy))
        return sorted(found, key=lambda unfinished: unfinished.used)

    def check(self, *, progress: Progress = silent) -> list[Damage]:
        """Compare every file with its hash; what is damaged is only told, not removed."""
        artifacts, found = self.list(), list[Damage]()
        for done, artifact in enumerate(artifacts):
            progress("checking", done, len(artifacts), artifact.title)
            for name, sha256 in artifact.hashes.items():
                problem = _problem(artifact.folder / name, sha256)
                if problem:
                    found.append(Damage(artifact, name, problem))
        progress("checking", len(artifacts), len(artifacts))
        return found

    def discard(self, folder: Path) -> None:
        """Remove an artifact or something unfinished: out of its place at once, then from the disk."""
        trash = self.root / "work" / f"trash-{uuid.uuid4().hex[:8]}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def prune(
        self,
        *,
        kinds: Sequence[str] = (),
        older_than_days: float | None = None,
        keep_bytes: int | None = None,
        unfinished: bool = False,
        dry_run: bool = False,
    ) -> list[Artifact | Unfinished]:
        """Remove what has not been used for long, here; nothing is removed at the URL.

        Args:
            kinds: only these; all by default.
            older_than_days: only what was last used longer ago.
            keep_bytes: stop once no more than this is left (of these kinds), longest unused first.
            unfinished: also what killed processes left; what is being made just now is never removed.
            dry_run: only say what would go.

        Returns:
            What was removed, longest unused first.
        """
        limit = None if older_than_days is None else time.time() - older_than_days * 86400
        artifacts = sorted(self.list(kinds), key=lambda artifact: artifact.used)
        left = sum(artifact.size for artifact in artifacts)
        gone: list[Artifact | Unfinished] = []
        for artifact in artifacts:
            if keep_bytes is not None and left <= keep_bytes:
                break
            if limit is None or artifact.used < limit:
                gone.append(artifact)
                left -= artifact.size
        if unfinished:
            idle = [part for part in self.unfinished() if not part.busy]
            gone += [part for part in idle if limit is None or part.used < limit]
        for part in () if dry_run else gone:
            self.discard(part.folder)
        return gone


def _problem(path: Path, sha256: str) -> str:
    """What is wrong with a file; empty if it is as it was written."""
    if not path.is_file():
        return "is missing"
    return "" if sha256_of(path) == sha256 else "has changed since it was written"


def _touch(path: Path) -> None:
    """Note that an artifact was used; a cache that may only be read stays as it is."""
    try:
        os.utime(path)
    except OSError:
        return
