"""STUB for the moment, to be replaced by its owner."""
from __future__ import annotations
import hashlib, json, os, shutil, fcntl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from friends.types import Progress, silent

@dataclass(frozen=True)
class Artifact:
    folder: Path
    kind: str
    key: str
    identity: dict[str, object]
    facts: dict[str, object]
    title: str = ""
    size: int = 0
    def file(self, name: str) -> Path:
        return self.folder / name

class Artifacts:
    def __init__(self, root: Path, *, remote: str | None = None) -> None:
        self.root = root
    def key(self, kind: str, identity: Mapping[str, object]) -> str:
        return hashlib.sha256(json.dumps([kind, identity], sort_keys=True).encode()).hexdigest()[:32]
    def _read(self, kind, key):
        f = self.root / kind / key
        if not (f / "artifact.json").exists():
            return None
        v = json.loads((f / "artifact.json").read_text())
        return Artifact(f, kind, key, v["identity"], v["facts"], v["title"])
    def find(self, kind: str, identity: Mapping[str, object]) -> Artifact | None:
        return self._read(kind, self.key(kind, identity))
    def has(self, kind: str, identity: Mapping[str, object]) -> bool:
        return self.find(kind, identity) is not None
    def obtain(self, kind: str, identity: Mapping[str, object], make: Callable[[Path], Mapping[str, object] | None], *, title: str = "", progress: Progress = silent) -> Artifact:
        key = self.key(kind, identity)
        got = self._read(kind, key)
        if got is not None:
            return got
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        with open(self.root / "locks" / f"{kind}-{key}", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            got = self._read(kind, key)
            if got is not None:
                return got
            work = self.root / "work" / f"{kind}-{key}"
            work.mkdir(parents=True, exist_ok=True)
            facts = dict(make(work) or {})
            shutil.rmtree(work / "half", ignore_errors=True)
            (work / "artifact.json").write_text(json.dumps({"identity": identity, "facts": facts, "title": title}))
            (self.root / kind).mkdir(exist_ok=True)
            os.rename(work, self.root / kind / key)
        return self._read(kind, key)
