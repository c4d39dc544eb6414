"""What was computed once is found from then on, by any number of processes, and is never half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from friends.data.artifact_lock import is_locked, locked
from friends.data.artifacts import MARKER, Artifact, Artifacts, DamagedError

IDENTITY = {"seed": 1, "xi": 16}


def writes(text: str, calls: list[str] | None = None) -> Callable[[Path], dict[str, object]]:
    def make(folder: Path) -> dict[str, object]:
        if calls is not None:
            calls.append(text)
        (folder / "out.txt").write_text(text)
        return {"letters": len(text)}

    return make


def aged(artifact: Artifact, days: float) -> None:
    moment = time.time() - days * 86400
    os.utime(artifact.folder / "artifact.json", (moment, moment))


def test_it_is_made_once_and_found_by_its_identity(tmp_path: Path) -> None:
    calls: list[str] = []
    made = Artifacts(tmp_path).obtain("poison", IDENTITY, writes("abc", calls), title="poisons")
    found = Artifacts(tmp_path).obtain("poison", {"xi": 16, "seed": 1}, writes("xyz", calls))
    assert calls == ["abc"]
    assert found == made
    assert found.file("out.txt").read_text() == "abc"
    assert (found.facts, found.identity, found.title, found.size) == ({"letters": 3}, IDENTITY, "poisons", 3)
    assert Artifacts(tmp_path).find("poison", {**IDENTITY, "seed": 2}) is None
    assert Artifacts(tmp_path).find("victim", IDENTITY) is None
    assert not (tmp_path / "locks").exists() or not list((tmp_path / "locks").iterdir())


def test_an_identity_that_could_be_spelt_twice_is_refused(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path)
    for wrong in ({"x": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}):
        with pytest.raises(ValueError, match="no plain value"):
            cache.key("poison", wrong)
    for kind in ("../up", "Poison", "work", "locks", ""):
        with pytest.raises(ValueError, match="kind of an artifact"):
            cache.key(kind, IDENTITY)


def test_what_fails_is_not_there_and_its_checkpoints_wait_for_the_next(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").mkdir()
        (folder / "half" / "step").write_text("7")
        raise RuntimeError("no power")

    def goes_on(folder: Path) -> dict[str, object]:
        (folder / "out.txt").write_text("done")
        return {"from": (folder / "half" / "step").read_text()}

    cache = Artifacts(tmp_path)
    with pytest.raises(RuntimeError, match="no power"):
        cache.obtain("poison", IDENTITY, fails)
    assert cache.find("poison", IDENTITY) is None
    made = cache.obtain("poison", IDENTITY, goes_on)
    assert made.facts == {"from": "7"}
    assert sorted(path.name for path in made.folder.iterdir()) == ["artifact.json", "out.txt"]
    assert cache.unfinished() == []


def test_an_artifact_that_needs_itself_is_an_error_not_a_standstill(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path)

    def make(folder: Path) -> None:
        cache.obtain("poison", IDENTITY, writes("inner"))

    with pytest.raises(RuntimeError, match="part of itself"):
        cache.obtain("poison", IDENTITY, make)
    assert cache.obtain("poison", IDENTITY, writes("after")).file("out.txt").read_text() == "after"


SLOW = """
import sys, time
from pathlib import Path
from friends.data.artifacts import Artifacts
root, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def make(folder):
    with open(log, "a") as file:
        file.write("made\\n")
    begun = (folder / "half" / "begun").exists()
    (folder / "half").mkdir(exist_ok=True)
    (folder / "half" / "begun").write_text("")
    for letter in "friends":
        with open(folder / "out.txt", "a" if letter != "f" else "w") as file:
            file.write(letter)
        time.sleep(seconds / 7)
    return {"begun": begun}
told = []
found = Artifacts(root).obtain("poison", {"seed": 1}, make, progress=lambda *words: told.append(words[0]))
print(found.file("out.txt").read_text(), found.facts["begun"], bool(told))
"""


def process(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    call = [sys.executable, "-c", SLOW, str(tmp_path / "cache"), str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, text=True)


def begun(tmp_path: Path) -> None:
    """Wait until somebody makes the artifact."""
    limit = time.monotonic() + 60
    while not (tmp_path / "log").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_of_two_processes_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    pair = [process(tmp_path, 2.0) for _ in range(2)]
    said = sorted(one.communicate(timeout=60)[0].split() for one in pair)
    assert (tmp_path / "log").read_text() == "made\n"
    assert said == [["friends", "False", "False"], ["friends", "False", "True"]]


def test_a_process_that_is_killed_leaves_its_work_to_the_next(tmp_path: Path) -> None:
    first = process(tmp_path, 60.0)
    begun(tmp_path)
    second = process(tmp_path, 0.1)
    time.sleep(0.5)
    cache = Artifacts(tmp_path / "cache")
    assert [part.busy for part in cache.unfinished()] == [True]
    assert cache.list() == []
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=60)[0].split()[:2] == ["friends", "True"]
    assert (tmp_path / "log").read_text() == "made\nmade\n"
    assert cache.check() == []


def test_a_flipped_byte_is_noticed_and_named(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path)
    made = cache.obtain("poison", IDENTITY, writes("abc"))
    other = cache.obtain("poison", {"seed": 9}, writes("other"))
    (made.folder / "out.txt").write_text("abd")
    (other.folder / "out.txt").unlink()
    with pytest.raises(DamagedError, match=r"out\.txt has changed since it was written: remove the folder"):
        made.file("out.txt")
    found = {(damage.artifact.key, damage.name, damage.problem) for damage in cache.check()}
    assert found == {
        (made.key, "out.txt", "has changed since it was written"),
        (other.key, "out.txt", "is missing"),
    }
    cache.discard(made.folder)
    assert cache.obtain("poison", IDENTITY, writes("abc")).file("out.txt").read_text() == "abc"


def test_pruning_takes_what_was_unused_for_longest(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path)
    some = [cache.obtain("poison", {"seed": seed}, writes("x" * 100)) for seed in range(4)]
    victim = cache.obtain("victim", {"seed": 0}, writes("y" * 100))
    for artifact, days in zip([*some, victim], (4, 3, 2, 1, 9), strict=True):
        aged(artifact, days)
    assert cache.find("poison", {"seed": 0}) is not None  # used just now
    would = cache.prune(kinds=["poison"], keep_bytes=200, dry_run=True)
    assert [part.folder for part in would] == [some[1].folder, some[2].folder]
    assert len(cache.list()) == 5
    assert len(cache.prune(kinds=["poison"], keep_bytes=200)) == 2
    assert [artifact.identity["seed"] for artifact in cache.list(["poison"])] == [0, 3]
    assert [part.folder for part in cache.prune(older_than_days=5)] == [victim.folder]
    assert len(cache.list()) == 2


def test_pruning_spares_what_is_being_made(tmp_path: Path) -> None:
    cache = Artifacts(tmp_path)
    names = ("locked", "fresh", "left")
    for name in names:
        (tmp_path / "work" / name / "half").mkdir(parents=True)
        file = tmp_path / "work" / name / "half" / "step"
        file.write_text("7")
        if name != "fresh":
            old = time.time() - 7200
            os.utime(file, (old, old))
            for folder in (file.parent, file.parent.parent):
                os.utime(folder, (old, old))
    with locked(tmp_path / "locks" / "locked", lambda seconds: None):
        gone = cache.prune(unfinished=True, keep_bytes=10**9)
        assert [part.folder.name for part in gone] == ["left"]
    assert sorted(part.folder.name for part in cache.unfinished()) == ["fresh", "locked"]


def test_a_lock_ends_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "one"
    with locked(path, lambda seconds: None) as alone:
        assert alone
        assert is_locked(path)
    assert not is_locked(path)
    assert list(path.parent.iterdir()) == []


def test_without_locks_the_first_to_finish_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("friends.data.artifact_lock._try", lambda path: -1)
    cache = Artifacts(tmp_path)

    def slow(folder: Path) -> dict[str, object]:
        # Another worker, that no lock holds off, makes the same one meanwhile.
        other = threading.Thread(target=Artifacts(tmp_path).obtain, args=("poison", IDENTITY, writes("first")))
        other.start()
        other.join()
        return writes("second")(folder)

    assert cache.obtain("poison", IDENTITY, slow).file("out.txt").read_text() == "first"
    assert list((tmp_path / "work").iterdir()) == []


def test_a_folder_with_other_things_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other things and is no cache"):
        Artifacts(tmp_path)
    with pytest.raises(ValueError, match="is a file; a cache is a folder"):
        Artifacts(tmp_path / "thesis.tex")


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_machines_share_artifacts_through_a_url(tmp_path: Path, scheme: str) -> None:
    url = (tmp_path / "store").as_uri() if scheme == "file" else f"memory://{tmp_path.name}"
    calls: list[str] = []
    here = Artifacts(tmp_path / "here", remote=url)
    here.obtain("poison", IDENTITY, writes("abc", calls))
    there = Artifacts(tmp_path / "there", remote=url)
    assert there.has("poison", IDENTITY)
    assert not (tmp_path / "there").exists()  # a look copies nothing
    assert there.obtain("poison", IDENTITY, writes("xyz", calls)).file("out.txt").read_text() == "abc"
    assert calls == ["abc"]
    assert [artifact.kind for artifact in Artifacts(tmp_path / "there").list()] == ["poison"]


def test_what_is_half_at_the_url_is_not_there_and_what_is_damaged_is_not_taken(tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = Artifacts(tmp_path / "here", remote=store.as_uri()).obtain("poison", IDENTITY, writes("abc"))
    there = Artifacts(tmp_path / "there", remote=store.as_uri())
    (there_is,) = (store / "poison" / made.key).glob("out.txt.*")
    there_is.write_text("abd")
    with pytest.raises(DamagedError, match="has changed since it was written: remove it there"):
        there.find("poison", IDENTITY)
    assert there.list() == []
    (store / "poison" / made.key / "artifact.json").unlink()
    assert there.find("poison", IDENTITY) is None


def test_a_manifest_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = Artifacts(tmp_path / "here", remote=store.as_uri()).obtain("poison", IDENTITY, writes("abc"))
    manifest = store / "poison" / made.key / "artifact.json"
    value = json.loads(manifest.read_text())
    value["files"] = {"../../../evil.txt": value["files"]["out.txt"]}
    manifest.write_text(json.dumps(value))
    with pytest.raises(DamagedError, match="names a file outside itself"):
        Artifacts(tmp_path / "there", remote=store.as_uri()).find("poison", IDENTITY)
    assert not list(tmp_path.rglob("evil.txt"))


def test_two_machines_that_make_the_same_leave_a_whole_one(tmp_path: Path) -> None:
    """No lock reaches a URL: their files may differ, and whichever list is there last finds its own."""
    store = (tmp_path / "store").as_uri()
    machines = [Artifacts(tmp_path / name, remote=store) for name in "ab"]

    def both(folder: Path) -> dict[str, object]:
        machines[1].obtain("poison", IDENTITY, writes("from b"))  # begins later, and is done first
        return writes("from a")(folder)

    machines[0].obtain("poison", IDENTITY, both)
    third = Artifacts(tmp_path / "c", remote=store).obtain("poison", IDENTITY, writes("from c"))
    assert third.file("out.txt").read_text() == "from b"
    other = Artifacts(tmp_path / "d").obtain("poison", IDENTITY, writes("from d"))  # uploads between the other's steps
    remote = machines[0]._remote
    assert remote is not None
    (tmp_path / "store" / "poison" / other.key / "artifact.json").unlink()
    remote.upload(other.folder, "poison", other.key, other.hashes)
    assert (
        Artifacts(tmp_path / "e", remote=store).obtain("poison", IDENTITY, writes("")).file("out.txt").read_text()
        == "from d"
    )


def test_an_unknown_url_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot keep artifacts at 'nowhere://x'"):
        Artifacts(tmp_path, remote="nowhere://x")


def test_the_marker_says_that_it_is_a_cache(tmp_path: Path) -> None:
    Artifacts(tmp_path).obtain("poison", IDENTITY, writes("abc"))
    assert (tmp_path / MARKER).is_file()
    (tmp_path / "notes.txt").write_text("mine")
    assert len(Artifacts(tmp_path).list()) == 1
