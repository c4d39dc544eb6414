"""What the cells of a grid say together: one summary a row, over seeds, goals and victims.

What may not be averaged is refused: see :func:`summarise`. How is in :mod:`friends.bench.grid.estimates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from friends.bench.grid.estimates import (
    Comparison,
    Estimate,
    by_goal,
    compare,
    estimate,
    few_text,
    goals_needed,
    success_of,
)
from friends.bench.grid.record import Record
from friends.bench.record import CLEAN, UNDEFENDED
from friends.bench.statistics import holm

Point = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One row of a table.

    Args:
        grid, preset: which grid.
        labels, defense, defenses, told, scaled_down: as in every record of the row.
        records: of the row, in the order of their seeds, goals and victims.
        trials: how many models were judged.
        images: on how many images of the attack's goals; a goal's images count for each of its models.
        hits: how many of them were classified as the attacker wants.
        success: share of hits, goals weighted equally.
        accuracy: clean test accuracy, an abstention being wrong.
        selective: clean test accuracy among the images that were answered.
        confidence: mean probability of the wanted class.
        seconds: medians over the models, by stage.
        joules: medians over the models that have them, by stage and counter.
        removed: training rows judged to be poison, poisons among them, and poisons in all: means over the models;
            empty where no model removed any.
        abstained: clean test images that were not answered, a model.
        refused: images of goals that were not answered, in all.
        versus: beside the undefended models; none for these and the control, or without a common goal.
        control: success on the same goals of models trained on clean data; none if there are no such models.
        needed: how many goals would tell 20 % from 50 %.
        few: a sentence if there are fewer.
    """

    grid: str
    preset: str
    labels: dict[str, str]
    defense: str
    defenses: tuple[str, ...]
    told: str
    scaled_down: str
    records: tuple[Record, ...]
    trials: int
    images: int
    hits: int
    success: Estimate
    accuracy: Estimate
    selective: Estimate
    confidence: float
    seconds: dict[str, float]
    joules: dict[str, float] = field(default_factory=dict[str, float])
    removed: tuple[float, ...] = ()
    abstained: float = 0.0
    refused: int = 0
    versus: Comparison | None = None
    control: Estimate | None = None
    needed: int = 0
    few: str = ""

    @property
    def point(self) -> Point:
        """The grid, and the place on its axes."""
        return self.grid, tuple(sorted(self.labels.items()))

    @property
    def seconds_of_training(self) -> float:
        """The median time of one model with everything that its defense does."""
        return self.seconds.get("training", math.nan)


def summarise(records: Sequence[Record], *, mix: bool = False) -> list[Summary]:
    """One summary a row: point by point as they first come, in each ``undefended``, ``clean``, then first come.

    A record that comes twice with the same outcome counts once.

    Args:
        records: of one grid or several.
        mix: average also what was made by different code or with different settings.

    Raises:
        ValueError: unless ``mix``, records of one row differ in code, settings (but the seed) or size, or paired
            rows in their poisons; in any case, one cell has two outcomes. The message names both cells.
    """
    points: dict[Point, dict[str, list[Record]]] = {}
    for record in _once(records):
        point = record.grid, tuple(sorted(record.labels.items()))
        points.setdefault(point, {}).setdefault(record.defense, []).append(record)
    found: list[Summary] = []
    for rows in points.values():
        order = sorted(rows, key=lambda name: (name != UNDEFENDED, name != CLEAN))
        if not mix:
            for name in order:
                _check_alike(rows[name])
            _check_poisons([record for name in order for record in rows[name]])
        found += _adjusted([_summary(rows[name], rows) for name in order])
    return found


def _once(records: Iterable[Record]) -> list[Record]:
    """The records, each cell of a row once."""
    found: dict[tuple[object, ...], Record] = {}
    for record in records:
        first = found.setdefault((record.grid, record.preset, record.row, record.cell, record.code), record)
        if first is not record and first.essence() != record.essence():
            raise ValueError(f"{_name(record)} comes twice and came out differently ({_outcome(first)}, then "
                             f"{_outcome(record)}): look at both before choosing one")  # fmt: skip
    return list(found.values())


def _check_alike(records: Sequence[Record]) -> None:
    """Raise ``ValueError`` if records of a row were not made in the same way, or two for the same place."""
    places: dict[tuple[int, int, int], Record] = {}
    first = records[0]
    for record in records:
        differs = _difference(first, record)
        if differs:
            raise ValueError(f"{_name(first)} and {_name(record)} are of one row but differ in {differs}: "
                             "run the row anew, or mix them if you must (mix=True)")  # fmt: skip
        other = places.setdefault(record.pair, record)
        if other is not record:
            raise ValueError(f"{_name(other)} and {_name(record)} are the same seed, goal and victim of one row")


def _difference(a: Record, b: Record) -> str:
    """In what two records of a row differ that should not; empty for nothing."""
    if a.code != b.code:
        return f"their code ({a.code} and {b.code})"
    if (a.preset, a.scaled_down) != (b.preset, b.scaled_down):
        return (
            f"their size ({a.preset} {a.scaled_down or 'full size'!r} and {b.preset} {b.scaled_down or 'full size'!r})"
        )
    if a.defenses != b.defenses:
        return f"their defenses ({', '.join(a.defenses)} and {', '.join(b.defenses)})"
    names = [name for name in {**a.settings, **b.settings} if name != "seed" and _at(a, name) != _at(b, name)]
    return f"the setting {names[0]} ({_at(a, names[0])} and {_at(b, names[0])})" if names else ""


def _at(record: Record, name: str) -> object:
    return record.settings.get(name)


def _check_poisons(records: Iterable[Record]) -> None:
    """Raise ``ValueError`` if models of the same seed and goal were trained on different poisons."""
    poisons: dict[tuple[int, int], Record] = {}
    for record in records:
        if "poison" not in record.keys:
            continue
        first = poisons.setdefault((record.seed, record.goal), record)
        if first.keys["poison"] != record.keys["poison"]:
            raise ValueError(f"{_name(first)} and {_name(record)} were trained on different poisons: they are no pair")


def _name(record: Record) -> str:
    place = "".join(f" {axis} = {label}," for axis, label in record.labels.items())
    return f"cell {record.cell} ({record.grid},{place} {record.defense}, seed {record.seed}, goal {record.goal + 1})"


def _outcome(record: Record) -> str:
    return f"{record.hits} of {record.images} images, accuracy {100 * record.accuracy:.2f} %"


def _summary(records: Sequence[Record], rows: Mapping[str, Sequence[Record]]) -> Summary:
    """A row among the rows of its point."""
    records = sorted(records, key=lambda record: record.pair)
    first, success = records[0], success_of(records)
    needed = goals_needed(success, one_image=all(record.images == 1 for record in records))
    mine = {(record.seed, record.goal) for record in records}
    control = [record for record in rows.get(CLEAN, ()) if (record.seed, record.goal) in mine]
    return Summary(
        grid=first.grid,
        preset=first.preset,
        labels=dict(first.labels),
        defense=first.defense,
        defenses=first.defenses,
        told=first.told,
        scaled_down=first.scaled_down,
        records=tuple(records),
        trials=len(records),
        images=sum(record.images for record in records),
        hits=sum(record.hits for record in records),
        success=success,
        accuracy=estimate(by_goal(records, "accuracy")),
        selective=estimate(by_goal(records, "selective")),
        confidence=math.fsum(record.confidence for record in records) / len(records),
        seconds=_medians([record.seconds for record in records]),
        joules=_medians([record.joules for record in records]),
        removed=_removed(records),
        abstained=sum(record.abstained for record in records) / len(records),
        refused=sum(record.refused for record in records),
        versus=None if first.is_undefended or first.is_control else compare(rows.get(UNDEFENDED, ()), records),
        control=success_of(control) if control and not first.is_control else None,
        needed=needed,
        few=few_text(success.n, needed),
    )


def _medians(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name: None for table in tables for name in table}
    return {name: float(median(table[name] for table in tables if name in table)) for name in names}


def _removed(records: Sequence[Record]) -> tuple[float, ...]:
    """What a filter removed from a training set, on average; a model without such a record removed nothing."""
    if not any(record.removed for record in records):
        return ()
    all_three = [record.removed or (0, 0, record.poisons) for record in records]
    return tuple(sum(part) / len(records) for part in zip(*all_three, strict=True))


def _adjusted(summaries: Sequence[Summary]) -> list[Summary]:
    """The rows of a point, with their p-values adjusted together."""
    adjusted = iter(holm([s.versus.p for s in summaries if s.versus]))
    return [s if s.versus is None else replace(s, versus=replace(s.versus, p_holm=next(adjusted))) for s in summaries]
