"""What one cell of a grid leaves behind: a line of JSON in a file that is only ever appended to.

A cell is one model: trained on the poisons of one goal in one way (or on clean data: the control), and judged. Cells
that share poisons, seed and victim number form a pair (:attr:`Record.pair`): their initial weights, batch order and
augmentation are the same, so what differs is the defense.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import cast

from friends.bench.record import CLEAN, UNDEFENDED

FORMAT = "friends-cell-1"
PASSING = ("seconds", "joules", "started", "threads", "device", "versions", "commit")
"""Fields that say how a cell was run, not what came out: two runs of the same cell may differ in them."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell: what was done, with what, and what came out.

    Args:
        grid: name of the grid, such as ``"table1"``.
        preset: ``"smoke"``, ``"small"``, ``"paper"``, or empty for a grid of the user's own.
        cell: key of the cell: a hash of all its settings and of the fingerprints of its data.
        labels: where the cell lies on the axes of the grid, by axis: ``{"attack": "gradient-matching"}``.
        defense: the row: ``"undefended"``, ``"friends-b"``, ...; ``"clean"`` is the control, a model trained on the
            data before the attack and judged on the same goal.
        defenses: the reprs of the defenses in force.
        told: what the defenses are told about the attack, in words; empty for nothing.
        seed, goal, victim: the trial's seed, which of its goals, which of the models trained on its poisons.
        settings: all settings, as plain values.
        scaled_down: how the cell is smaller than the published setting; empty if it is not.
        goal_name, y_true, y_wanted: what the attacker wants, in words.
        code: digest of the code that can change the outcome; see :mod:`friends.bench.grid.code`.
        keys: the artifacts that it is made of, by kind: ``{"poison": ..., "victim": ...}``.
        hits: images of the goal classified as the attacker wants, of ``images``.
        images: how many images the goal has: 1 for a target, many for a backdoor.
        confidence: mean softmax probability of the wanted class over the images.
        accuracy: clean test accuracy in [0, 1]; an abstention is wrong.
        selective: clean accuracy among the images that were answered.
        abstained: clean test images that were not answered.
        refused: images of the goal that were not answered; such a one is no success.
        removed: training rows judged to be poison, of them poison, and poisons in all; empty where nothing is removed.
        poisons: poisoned training images; 0 for the control.
        parameters: of the network.
        train: training images.
        history: one mapping per epoch: ``loss``, ``lr``, ``confidence``, for some ``accuracy``.
        seconds: by stage: ``"surrogates"``, ``"crafting"`` (of the poisons that the cell shares with others),
            ``"training"`` (this model alone, defenses included) and ``"shared"`` (the part of ``training`` that was
            not spent again since a probe was there already).
        joules: energy by stage, where the device reports it.
        versions, commit, device, threads, started: as in :class:`friends.bench.record.Report`.

    Raises:
        ValueError: the numbers contradict each other.
    """

    grid: str
    preset: str
    cell: str
    labels: dict[str, str]
    defense: str
    defenses: tuple[str, ...] = ()
    told: str = ""
    seed: int
    goal: int
    victim: int = 0
    settings: dict[str, object]
    scaled_down: str = ""
    goal_name: str
    y_true: str
    y_wanted: str
    code: str
    keys: dict[str, str] = field(default_factory=dict[str, str])
    hits: int
    images: int
    confidence: float
    accuracy: float
    selective: float
    abstained: int = 0
    refused: int = 0
    removed: tuple[int, ...] = ()
    poisons: int
    parameters: int
    train: int
    history: tuple[dict[str, float], ...] = ()
    seconds: dict[str, float]
    joules: dict[str, float] = field(default_factory=dict[str, float])
    versions: dict[str, str]
    commit: str
    device: str
    threads: int
    started: str

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.images or self.images < 1:
            raise ValueError(f"cell {self.cell}: {self.hits} hits of {self.images} images")
        for name in ("confidence", "accuracy", "selective"):
            if not 0 <= getattr(self, name) <= 1:  # also false for NaN
                raise ValueError(f"cell {self.cell}: {name} is in [0, 1], not {getattr(self, name)}")
        if len(self.removed) not in (0, 3):
            raise ValueError(f"cell {self.cell}: removed is (rows, poisons among them, poisons), not {self.removed}")

    @property
    def rate(self) -> float:
        """The share of the goal's images that the attack won."""
        return self.hits / self.images

    @property
    def row(self) -> tuple[tuple[tuple[str, str], ...], str]:
        """What is averaged over seeds and goals: the place on the axes, and the defense."""
        return tuple(sorted(self.labels.items())), self.defense

    @property
    def pair(self) -> tuple[int, int, int]:
        """What cells of two rows must share to be compared in pairs: seed, goal, victim."""
        return self.seed, self.goal, self.victim

    @property
    def is_control(self) -> bool:
        """Whether this is a model trained on clean data."""
        return self.defense == CLEAN

    @property
    def is_undefended(self) -> bool:
        """Whether this is a model trained on the poisons without a defense."""
        return self.defense == UNDEFENDED

    def essence(self) -> dict[str, object]:
        """Everything but what may differ between two runs of the same cell: times, energy, machine."""
        plain = {name: value for name, value in asdict(self).items() if name not in PASSING}
        history = [{k: v for k, v in line.items() if "seconds" not in k} for line in self.history]
        return cast("dict[str, object]", json.loads(json.dumps({**plain, "history": history})))

    def as_line(self) -> str:
        """One line of JSON, without the line's end."""
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_line(cls, line: str, where: str = "record") -> Record:
        """The record that :meth:`as_line` wrote. Raises ``ValueError`` that names what is wrong and where."""
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(value, dict) or cast("dict[str, object]", value).get("format") != FORMAT:
            raise ValueError(f"{where} is no record of a cell ({FORMAT})")
        content = cast("dict[str, object]", value)
        known = {f.name for f in fields(cls)}
        foreign = sorted(content.keys() - known - {"format"})
        if foreign:
            raise ValueError(f"{where} has unknown fields {', '.join(foreign)}: it is of another version of friends")
        for name in ("defenses", "removed", "history"):
            if isinstance(content.get(name), list):
                content[name] = tuple(cast("list[object]", content[name]))
        try:
            return cls(**{name: item for name, item in content.items() if name != "format"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            raise ValueError(f"{where}: {str(error).replace('Record.__init__() ', '')}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def read(path: Path) -> list[Record]:
    """The records of a file, in its order; none if there is no file.

    A last line without its end was being written when the process was killed: it is left out, as :func:`append` will
    cut it off.

    Raises:
        ValueError: any other line is no record.
    """
    if not path.exists():
        return []
    whole = path.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1].decode("utf-8").splitlines()
    return [Record.from_line(line, f"{path}, line {i + 1}") for i, line in enumerate(lines)]


def append(path: Path, records: Iterable[Record]) -> None:
    """Write records behind those of a file, synced, by one process at a time; a torn last line is cut off first."""
    text = "".join(record.as_line() + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file, _locked(file.fileno()):
        file.seek(0)
        whole = file.read()
        if whole and not whole.endswith(b"\n"):
            file.truncate(whole.rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(handle: int) -> Generator[None]:
    """Hold a file's lock, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with contextlib.suppress(OSError):  # some network file systems cannot lock
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield  # closing the file ends the lock


def merge(parts: Sequence[Sequence[Record]]) -> list[Record]:
    """Records of several machines as one list, each cell once.

    The same cell may come twice where it came out the same; its first record is kept.

    Raises:
        ValueError: a cell comes with two outcomes, or the records of a row are of other code, other settings than the
            seed, or another size. The message names the cell and its part.
    """
    found: dict[tuple[object, ...], Record] = {}
    models: dict[tuple[object, ...], Record] = {}
    for number, part in enumerate(parts):
        for record in part:
            where = f"cell {record.cell} ({record.defense}, seed {record.seed}) of part {number + 1}"
            model = models.setdefault((record.grid, record.preset, record.row), record)
            if model.code != record.code:
                raise ValueError(
                    f"{where} was made by other code ({record.code} instead of {model.code}): merge runs of one version"
                )
            if _but_seed(model) != _but_seed(record):
                raise ValueError(f"{where} was made with other settings than cell {model.cell} of the same row")
            first = found.setdefault((record.grid, record.preset, record.cell, record.row), record)
            if first is not record and first.essence() != record.essence():
                raise ValueError(
                    f"{where} came out otherwise than in an earlier part: look at both before choosing one"
                )
    return list(found.values())


def _but_seed(record: Record) -> tuple[object, ...]:
    settings = {name: value for name, value in record.settings.items() if name != "seed"}
    return json.dumps(settings, sort_keys=True), record.scaled_down


def rows(records: Iterable[Record]) -> Mapping[tuple[tuple[tuple[str, str], ...], str], list[Record]]:
    """The records by row, each row in the order of its pairs."""
    found: dict[tuple[tuple[tuple[str, str], ...], str], list[Record]] = {}
    for record in records:
        found.setdefault(record.row, []).append(record)
    return {row: sorted(some, key=lambda r: r.pair) for row, some in found.items()}
