"""Settings of FRIENDS for data of one's own: searched against an attack on these very data, by successive halving.

First the attack is made to work without a defense, else no defense could be told from another; then the rungs of
:mod:`friends.bench.tuning_search`; at last the chosen settings once more, with new seeds and new goals of the attacker,
since the best of many looks better than it is. Accuracy is measured on training images that were held out; the test
set is never looked at.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from friends.bench.tuning_attack import LADDER, Mock
from friends.bench.tuning_grid import Row, Rung
from friends.bench.tuning_ground import Ground
from friends.bench.tuning_plan import again, most_trainings, prepare, room
from friends.bench.tuning_report import NAME, write
from friends.bench.tuning_search import OutOfTimeError, Round, Score, best, halve, play
from friends.bench.tuning_settings import Tried, Tuned, Tuning
from friends.data.artifacts import Artifacts
from friends.data.files import owned
from friends.types import Progress, silent

CACHE = "cache"


def tune(
    settings: Tuning,
    out: Path,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    download: bool = False,
    progress: Progress = silent,
) -> Tuned:
    """Search settings of FRIENDS for some data, in a folder that a killed search goes on in.

    Args:
        settings: what is searched.
        out: the folder: results of single trainings are kept in ``cache/`` below it, and found by other tunings.
        device: ``"cpu"``, ``"cuda"``, ...
        minutes: stop after about so long, with the best so far; None for no limit. The time of loading data counts.
        download: whether a public data set that is not here may be fetched from its home.
        progress: told how far every step is.

    Raises:
        ValueError: the data, the model or the folder do not fit; raised before any training.
        BlockingIOError: another process works in the folder.
        OSError: there is not enough room on the disk.
    """
    started = time.monotonic()
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes is a number > 0, not {minutes:g}")
    _refuse_foreign(out)

    def check_time() -> None:
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            raise OutOfTimeError(f"{minutes:g} minutes are over")

    def timed(what: str, done: int, total: int, note: str = "", /) -> None:
        progress(what, done, total, note)
        check_time()  # leaves crafting or training as Ctrl-C does: what was saved last is gone on with

    ground = prepare(settings, Artifacts(out / CACHE), device, download=download, progress=progress)
    ground.progress = timed
    _refuse_full_disk(out, room(settings, ground))
    out.mkdir(parents=True, exist_ok=True)
    with owned(out):
        found = _Search(settings, ground, check_time, progress).run()
        write(found, out)
    return found


class _Search:
    """One tuning under way."""

    def __init__(self, settings: Tuning, ground: Ground, check_time: Callable[[], None], progress: Progress) -> None:
        self.settings, self.ground, self.check_time, self.progress = settings, ground, check_time, progress
        self.rungs = settings.ladder(len(ground.train))
        self.tried: list[Tried] = []
        self.done, self.most = 0, most_trainings(settings, self.rungs)

    def run(self) -> Tuned:
        """All of it, or what there is time for."""
        rounds, confirmed = list[Round](), None
        drop = self.settings.accuracy_drop
        try:
            self.ground.mock = self._mock()
        except OutOfTimeError:
            return self._tuned(rounds, None)
        rounds = halve(self.settings.first(), self.rungs, self._judge, drop=drop, refine=self.settings.refine)
        chosen = best(rounds[-1], drop) if _finished(rounds, len(self.rungs)) else None
        if chosen is not None and self.settings.confirm:
            fresh = again(self.settings, self.rungs)
            confirmed = play([chosen], fresh, self._judge, drop)
        return self._tuned(rounds, confirmed)

    def _mock(self) -> Mock:
        """The faintest attack that works; if none does, the one that comes closest."""
        rung = replace(self.rungs[0], repeats=min(2, self.settings.seeds))
        for mock in LADDER:
            self.ground.mock = mock
            tried = Tried(mock=mock, undefended=self._judge("undefended", rung), clean=self._judge("clean", rung))
            self.tried.append(tried)
            if tried.works:
                return mock
        return max(self.tried, key=lambda t: t.undefended.mean_success - t.clean.mean_success).mock

    def _judge(self, row: Row, rung: Rung) -> Score:
        """All trainings of a row at a rung."""
        found: list[dict[str, Any]] = []
        for repeat in rung.numbers:
            self.check_time()
            found.append(self.ground.result(row, rung, repeat))
            self.done += 1
            self.progress("trainings", min(self.done, self.most), self.most, str(row))
        held = len(self.ground.held_out)
        diverged = any("diverged" in one for one in found)
        return Score(
            accuracy=tuple(one.get("right", 0) / held for one in found),
            success=tuple(one["hits"] / one["shown"] if "hits" in one else 1.0 for one in found),
            images=held,
            shown=tuple(int(one.get("shown", 1)) for one in found),
            seconds=sum(one["seconds"] for one in found),
            diverged=diverged,
        )

    def _tuned(self, rounds: list[Round], confirmed: Round | None) -> Tuned:
        train, held_out = self.ground.train, self.ground.held_out
        judged = next((r for r in reversed(rounds) if r.scores and r.clean is not None), None)
        done = _finished(rounds, len(self.rungs))
        chosen = None if judged is None else best(judged, self.settings.accuracy_drop)
        wanted = self.settings.confirm and chosen is not None
        if confirmed is not None and not confirmed.scores:
            confirmed = None
        return Tuned(
            settings=self.settings,
            data={
                "name": train.name,
                "classes": list(train.classes),
                "shape": list(train.shape),
                "train": len(train),
                "held out": len(held_out),
                "train fingerprint": train.fingerprint,
                "held out fingerprint": held_out.fingerprint,
            },
            tried=tuple(self.tried),
            mock=self.ground.mock if self.tried and rounds else None,
            rounds=tuple(rounds),
            judged=judged,
            chosen=chosen,
            confirmed=confirmed,
            out_of_time=not done or (wanted and confirmed is None),
        )


def _finished(rounds: list[Round], rungs: int) -> bool:
    """Whether every rung was judged to its end."""
    return len(rounds) == rungs and not rounds[-1].unfinished and rounds[-1].clean is not None


def _refuse_foreign(out: Path) -> None:
    """Raise ``ValueError`` for a folder that holds something else than tunings."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder with --out")
    if any(out.iterdir()) and not (out / NAME).exists() and not (out / CACHE).is_dir():
        raise ValueError(f"{out} holds something else: choose another folder with --out")


def _refuse_full_disk(out: Path, needed: int) -> None:
    """Raise ``OSError`` if the disk of a folder has less room than is needed."""
    there = out.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"tuning needs about {needed / 1e9:.2f} GB in {out}, but only {free / 1e9:.2f} GB are free: make "
                      "room, or choose a folder on another disk with --out")  # fmt: skip
