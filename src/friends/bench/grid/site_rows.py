"""What a page shows of the rows of a grid and of the runs of a row, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from friends.bench.grid.record import Record
from friends.bench.grid.site_words import (
    command,
    confidence_chart,
    interval_text,
    loss_chart,
    p_text,
    page_name,
    plain_facts,
    role,
    success_bar,
    success_text,
    times_text,
)
from friends.bench.grid.summary import Summary
from friends.bench.grid.table_lines import line_of
from friends.bench.record import UNDEFENDED
from friends.bench.report import duration, percent


@dataclass(frozen=True)
class Cell:
    """A cell of the leaderboard: its text, what stands small below it, and the number that it is sorted by."""

    text: str
    below: str = ""
    value: float | None = None

    @property
    def key(self) -> str:
        """The number for the page, as short as sorting allows; empty if there is none."""
        return "" if self.value is None or not math.isfinite(self.value) else f"{self.value:.6g}"


NONE = Cell("–")


@dataclass(frozen=True, kw_only=True)
class RowView:
    """One row of the leaderboard, and what its own page shows above the runs."""

    summary: Summary
    labels: tuple[str, ...]
    name: str
    page: str
    role: str
    bar: Markup
    success: Cell
    interval: str
    n: int
    control: Cell
    accuracy: Cell
    p: Cell
    cost: Cell
    paper: Cell
    command: str


def row_views(summaries: Sequence[Summary], axes: Sequence[str]) -> list[RowView]:
    """The rows in the order of the summaries; each knows the undefended row of its point."""
    bare = {summary.point: summary for summary in summaries if summary.defense == UNDEFENDED}
    return [_row(summary, bare.get(summary.point), axes) for summary in summaries]


def _row(summary: Summary, bare: Summary | None, axes: Sequence[str]) -> RowView:
    other = None if bare is None or bare is summary else bare
    success, first = summary.success, summary.records[0]
    hits = f"{summary.hits:,} of {summary.images:,}"
    return RowView(
        summary=summary,
        labels=tuple(summary.labels.get(axis, "") for axis in axes),
        name=summary.defense,
        page=page_name(summary.labels, summary.defense),
        role=role(summary.defense),
        bar=success_bar(success, role(summary.defense), None if other is None else other.success.mean),
        success=Cell(success_text(success), hits, success.mean),
        interval=interval_text(success),
        n=summary.trials,
        control=Cell(success_text(summary.control), "", summary.control.mean) if summary.control else NONE,
        accuracy=_accuracy(summary),
        p=_p(summary),
        cost=_cost(summary, bare),
        paper=_paper(summary),
        command=command(first, (record.seed for record in summary.records)),
    )


def _accuracy(summary: Summary) -> Cell:
    spread = f"± {100 * summary.accuracy.std:.1f}" if summary.accuracy.n > 1 else ""
    return Cell(percent(summary.accuracy.mean), spread, summary.accuracy.mean)


def _p(summary: Summary) -> Cell:
    if summary.versus is None:
        return NONE
    versus = summary.versus
    return Cell(p_text(versus.p_holm), f"alone {p_text(versus.p)}" if versus.p_holm != versus.p else "", versus.p_holm)


def _cost(summary: Summary, bare: Summary | None) -> Cell:
    seconds = summary.seconds_of_training
    base = math.nan if bare is None else bare.seconds_of_training
    times = seconds / base if base > 0 else math.nan
    return Cell(times_text(times), duration(seconds) if math.isfinite(seconds) else "", times)


def _paper(summary: Summary) -> Cell:
    """What the paper prints, and whether our interval has it; no verdict where sizes differ or there is no interval."""
    line = line_of(summary)
    if line.paper is None:
        return NONE
    verdict = "≠ outside interval" if line.outside else "≈ within interval"
    told = verdict if line.comparable and not summary.success.is_open else ""
    return Cell(f"{line.paper.success:.1f}\u202f%", told, line.paper.success)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One model of a row: a line of the table of runs, and its details."""

    record: Record
    id: str
    pair: str
    won: str
    removed: str
    training: str
    facts: list[tuple[str, str]]
    charts: list[tuple[str, Markup]]
    command: str


def run_views(summary: Summary) -> list[RunView]:
    """The models of a row, in the order of their seeds, goals and victims."""
    return [_run(record) for record in summary.records]


def _run(record: Record) -> RunView:
    colour, pair = role(record.defense), f"{record.y_true} → {record.y_wanted}"
    charts = [
        ("Confidence in the wanted class", confidence_chart([record], colour)),
        ("Training loss", loss_chart([record], colour)),
    ]
    return RunView(
        record=record,
        id=f"run-{record.seed}-{record.goal + 1}-{record.victim + 1}",
        pair="" if pair in record.goal_name else pair,
        won=_won(record),
        removed=_removed(record),
        training=duration(record.seconds["training"]) if "training" in record.seconds else "–",
        facts=_facts(record),
        charts=[(title, chart) for title, chart in charts if chart is not None],
        command=command(record, [record.seed]),
    )


def _won(record: Record) -> str:
    if record.images == 1:
        return "taken over" if record.hits else "held"
    return f"{record.hits:,} of {record.images:,} ({percent(record.rate)})"


def _removed(record: Record) -> str:
    if not record.removed:
        return ""
    rows, caught, poisons = record.removed
    return f"{rows:,} rows, {caught:,} of {poisons:,} poisons"


def _facts(record: Record) -> list[tuple[str, str]]:
    """Everything of a record that the table of runs has no room for."""
    found: list[tuple[str, str]] = [
        ("goal", record.goal_name),
        ("wanted", f"{record.y_true} → {record.y_wanted}"),
        ("hits", f"{record.hits:,} of {record.images:,} images"),
        ("confidence in the wanted class", f"{record.confidence:.4f}"),
        ("clean accuracy", percent(record.accuracy)),
        ("accuracy where it answered", percent(record.selective)),
        ("clean images not answered", f"{record.abstained:,}"),
        ("goal's images not answered", f"{record.refused:,}"),
        ("removed", _removed(record) or "nothing"),
        ("poisons", f"{record.poisons:,} of {record.train:,} training images"),
        ("parameters", f"{record.parameters:,}"),
        *((f"time: {stage}", duration(seconds)) for stage, seconds in record.seconds.items()),
        *((f"energy: {stage}", f"{joules:,.0f}\u202fJ") for stage, joules in record.joules.items()),
        ("device", f"{record.device}, {record.threads} {'thread' if record.threads == 1 else 'threads'}"),
        ("started", record.started[:16].replace("T", " ") + " UTC"),
        ("commit", record.commit or "not a checkout"),
        ("code", record.code),
        ("cell", record.cell),
        *((f"artifact: {kind}", key) for kind, key in record.keys.items()),
    ]
    return found + plain_facts({f"version: {name}": value for name, value in record.versions.items()})


def facts_of_row(summary: Summary) -> list[tuple[str, str]]:
    """What the whole row shares."""
    versus, found = summary.versus, [("trials", f"{summary.trials:,}")]
    found.append(
        ("success", f"{success_text(summary.success)}, {interval_text(summary.success)} ({summary.success.kind})")
    )
    if versus is not None:
        found += [
            ("difference to undefended", f"{100 * versus.difference:+.1f} points".replace("-", "−")),
            ("its 95 % interval", f"{100 * versus.low:+.1f} to {100 * versus.high:+.1f} points".replace("-", "−")),
            ("p", f"{p_text(versus.p)} alone, {p_text(versus.p_holm)} among all rows (Holm); {versus.test}"),
            ("goals won in both", f"{versus.both}"),
            ("more in the undefended model", f"{versus.only_a}"),
            ("more in the defended model", f"{versus.only_b}"),
            ("won in neither", f"{versus.neither}"),
        ]
    if summary.removed:
        rows, caught, poisons = summary.removed
        found.append(("removed, a model", f"{rows:,.1f} rows, {caught:,.1f} of {poisons:,.1f} poisons"))
    found += _paper_facts(summary)
    found.append(("told about the attack", summary.told or "nothing"))
    found += [(f"median time: {stage}", duration(seconds)) for stage, seconds in summary.seconds.items()]
    return found + [(f"median energy: {stage}", f"{joules:,.0f}\u202fJ") for stage, joules in summary.joules.items()]


def _paper_facts(summary: Summary) -> list[tuple[str, str]]:
    """What the paper says of the row, and what keeps it from being compared."""
    line = line_of(summary)
    if line.paper is None:
        return []
    paper = line.paper
    spread = "" if paper.success_spread is None else f" ± {paper.success_spread:g} ({paper.spread})"
    found = [(f"the paper's {paper.name}", f"success {paper.success:g} %{spread}, accuracy {paper.accuracy:g} %")]
    if line.unlike:
        found.append(("not comparable", line.unlike))
    return found + [("doubt about the paper's number", doubt) for doubt in paper.doubts]


def labels_text(labels: Mapping[str, str]) -> str:
    """The place on the axes in one line; empty where there is no axis."""
    return ", ".join(f"{axis} {label}" for axis, label in labels.items())
