"""The lines of a table: what each defense at each point of a grid should have, has, and has in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from friends.bench.grid.paper import CLASSES, TRAIN, Published, published
from friends.bench.grid.spec import PRESETS, Cell, Grid
from friends.bench.grid.summary import Estimate, Summary
from friends.bench.record import CLEAN, UNDEFENDED

Place = tuple[tuple[tuple[str, str], ...], str]
Value = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One defense at one point: what was measured, if it was, and what the paper has.

    Args:
        labels, defense: the place.
        planned: how many models the grid has here; 0 where that is not known.
        smaller: how the grid is smaller than the paper's here; empty if it is not, or that is not known.
        reason: why the row is not defined here; empty if it is.
        summary: of the records; none where nothing was run.
        paper: the paper's row; none if it has none.
    """

    labels: Mapping[str, str]
    defense: str
    planned: int = 0
    smaller: str = ""
    reason: str = ""
    summary: Summary | None = None
    paper: Published | None = None

    @property
    def unlike(self) -> str:
        """Why what is measured is not of the size that the paper's number is of; empty if it is."""
        if self.summary is None or self.smaller:
            return self.smaller
        if self.summary.scaled_down or self.summary.preset != "paper":
            return self.summary.scaled_down or _preset(self.summary.preset)
        others = any(r.train < TRAIN or r.y_wanted not in CLASSES for r in self.summary.records)
        return "other data than the 50,000 training images of CIFAR-10" if others else ""

    @property
    def comparable(self) -> bool:
        """Whether what was measured can stand beside the paper's number."""
        return self.summary is not None and self.paper is not None and not self.unlike

    @property
    def difference(self) -> float | None:
        """Our success minus the paper's, percentage points; none where sizes differ."""
        if self.summary is None or self.paper is None or self.unlike:
            return None
        return 100 * self.summary.success.mean - self.paper.success

    @property
    def outside(self) -> bool:
        """Whether the paper's success lies outside our interval; never where sizes differ."""
        if self.summary is None or self.paper is None or self.unlike:
            return False
        success = self.summary.success
        return not success.low - 5e-5 <= self.paper.success / 100 <= success.high + 5e-5  # printed with two digits


def line_of(summary: Summary) -> Line:
    """What was measured, beside what the paper has."""
    paper = published(summary.grid, summary.labels, summary.defense) if summary.preset in PRESETS else None
    return Line(labels=summary.labels, defense=summary.defense, summary=summary, paper=paper)


def clean_last(summaries: Sequence[Summary]) -> list[Summary]:
    """Point by point, the control at the end of each."""
    points = {s.point: i for i, s in reversed(list(enumerate(summaries)))}
    return sorted(summaries, key=lambda s: (points[s.point], s.defense == CLEAN))


def planned_lines(grid: Grid, summaries: Sequence[Summary]) -> list[Line]:
    """The lines of a grid in its own order, and behind them what was run beside it."""
    cells: dict[Place, list[Cell]] = {}
    for cell in grid.cells():
        cells.setdefault(_place(cell.labels, cell.row.name), []).append(cell)
    reasons = {_place(labels, name): reason for labels, name, reason in grid.undefined()}
    done = {_place(s.labels, s.defense): s for s in summaries}
    lines: list[Line] = []
    for labels, _ in grid.points():
        names = [UNDEFENDED, *(row.name for row in grid.rows if row.stands_at(labels)), *([CLEAN] * grid.control)]
        for name in names:
            place = _place(labels, name)
            some, others = cells.get(place, []), cells[_place(labels, UNDEFENDED)]
            lines.append(
                Line(
                    labels=labels,
                    defense=name,
                    planned=len(some),
                    smaller=(some or others)[0].scaled_down or _preset(grid.preset),
                    reason=reasons.get(place, ""),
                    summary=done.pop(place, None),
                    paper=published(grid.name, labels, name) if grid.preset in PRESETS else None,
                )
            )
    return lines + [line_of(summary) for summary in done.values()]


def _preset(preset: str) -> str:
    return "" if preset in ("", "paper") else f"preset {preset}"


def _place(labels: Mapping[str, str], defense: str) -> Place:
    return tuple(sorted(labels.items())), defense


def data_of(line: Line, axes: Sequence[str]) -> dict[str, Value]:
    """A line of the CSV: shares in [0, 1] in full precision, the paper's numbers in percent as printed."""
    status = "run" if line.summary else "n/a" if line.reason else "not run"
    place: dict[str, Value] = {f"axis {axis}": line.labels.get(axis) for axis in axes}
    place |= {"defense": line.defense, "status": status, "reason": line.reason, "planned": line.planned or None}
    return {**place, **_measured(line.summary), **_compared(line.summary), **_printed(line)}


def _measured(summary: Summary | None) -> dict[str, Value]:
    """What came out of the row itself."""
    if summary is None:
        return {}
    first = summary.records[0]
    removed = dict(zip(("removed", "removed_poisons", "poisons"), summary.removed, strict=False))
    control = summary.control
    return {
        "grid": summary.grid,
        "preset": summary.preset,
        "n": summary.success.n,
        "models": summary.trials,
        "images": summary.images,
        "hits": summary.hits,
        **_estimate("success", summary.success),
        "interval": summary.success.kind,
        "confidence": summary.confidence,
        **_estimate("accuracy", summary.accuracy),
        "selective": summary.selective.mean,
        "abstained": summary.abstained,
        "refused": summary.refused,
        **(_estimate("control", control) if control else {}),
        **{f"seconds_{stage}": value for stage, value in summary.seconds.items()},
        **{f"joules_{stage.replace(', ', '_')}": value for stage, value in summary.joules.items()},
        **removed,
        "told": summary.told,
        "scaled_down": summary.scaled_down,
        "few": summary.few,
        "code": first.code,
    }


def _estimate(name: str, estimate: Estimate) -> dict[str, Value]:
    """Mean, interval and spread; no interval where there is none."""
    low, high = (None, None) if estimate.is_open else (estimate.low, estimate.high)
    return {name: estimate.mean, f"{name}_low": low, f"{name}_high": high, f"{name}_std": estimate.std}


def _compared(summary: Summary | None) -> dict[str, Value]:
    """What the row is beside the undefended one."""
    versus = summary.versus if summary else None
    if versus is None:
        return {}
    numbers = {"difference": versus.difference, "difference_low": versus.low, "difference_high": versus.high}
    return {"pairs": versus.pairs, **numbers, "p": versus.p, "p_holm": versus.p_holm, "test": versus.test}


def _printed(line: Line) -> dict[str, Value]:
    """What the paper has, and how far it is from ours where that can be said."""
    paper = line.paper
    if paper is None:
        return {}
    return {
        "paper_name": paper.name,
        "paper_success_percent": paper.success,
        "paper_success_spread": paper.success_spread,
        "paper_spread_is": paper.spread,
        "paper_accuracy_percent": paper.accuracy,
        "paper_accuracy_spread": paper.accuracy_spread,
        "paper_minutes": paper.minutes,
        "paper_doubts": "; ".join(paper.doubts),
        "minus_paper_points": line.difference,
        "paper_outside": str(line.outside).lower() if line.difference is not None else None,
    }
