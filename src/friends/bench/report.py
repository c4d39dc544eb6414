"""A report as one page of HTML that needs nothing else, and as a table for the terminal.

Whatever comes out is said in words and numbers first: also that an attack failed, that a defense did nothing, or that
there were too few trials to tell. The page runs no script and asks for no other file, and its content policy forbids
both, because class names come from data that nobody can trust.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from markupsafe import Markup
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from friends.bench.charts import Axis, Line, epoch_axis, histogram_chart, interval_bar, line_chart, percent_axis
from friends.bench.exhibit import GREY_LEVELS, Exhibit
from friends.bench.pictures import Strip, strips, target_picture
from friends.bench.record import CLEAN, UNDEFENDED, Arm, Report
from friends.bench.statistics import paired_p
from friends.bench.templates import template
from friends.data.files import write_text

FEW = 20
"""Below this many target images, a page says that its intervals are wide."""
COLOURS = 8
"""Colours in the style sheet: the undefended arm, the control, and six for the others in turn."""
STRENGTHS = frozenset({"xi", "zeta", "mu", "eps", "epsilon", "init"})
"""Settings in [0, 1] pixel units, which everybody quotes in 255ths."""


def render(report: Report, exhibit: Exhibit | None, path: Path) -> Path:
    """Write the report as one self-contained HTML page, atomically.

    Args:
        report: what to show.
        exhibit: the pictures; without them, the page has none.
        path: where to.

    Returns:
        ``path``.

    Raises:
        ValueError: the exhibit shows a goal that the report does not have.
    """
    if exhibit is not None and exhibit.goal >= len(report.goals):
        raise ValueError(f"the exhibit shows goal {exhibit.goal}, but the report has {len(report.goals)}, from 0")
    page = template("report.html.jinja").render(
        report=report,
        headline=headline(report),
        summary=summary(report),
        caveats=caveats(report),
        rows=_rows(report),
        goals=_goal_rows(report),
        gallery=None if exhibit is None else _gallery(report, exhibit),
        curves=_confidence_charts(report),
        accuracy=_accuracy_chart(report),
        sections=_settings(report),
    )
    # a lone surrogate is legal in JSON, but no file can hold it
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def headline(report: Report) -> str:
    """What came out, in one sentence with its numbers, whether or not it is welcome."""
    bare, defended, clean = report.arm(UNDEFENDED), _principal(report), report.arm(CLEAN)
    if bare is None:
        arm = defended or report.arms[0]
        how = "Trained on clean data" if arm.name == CLEAN else f"With {label(arm.name)}"
        return f"{how}, the attack took over {_count(report, arm)}; there is no undefended arm to compare."
    if bare.successes == 0:
        return f"The attack failed: with no defense it took over {_count(report, bare)}."
    if clean is not None and bare.rate <= clean.rate:
        return (
            f"The attack did no better than no attack: it took over {_count(report, bare)}, "
            f"and clean training gets {_of(clean)} equally wrong."
        )
    if defended is None:
        return f"Undefended, the attack took over {_count(report, bare)}."
    if defended.successes == bare.successes:
        return f"{label(defended.name)} made no difference: the attack took over {_count(report, bare)} either way."
    rise = "" if defended.successes < bare.successes else ", more than before"
    rest = f"with {label(defended.name)}, {_of(defended)}{rise}."
    return f"Undefended, the attack took over {_count(report, bare)}; {rest}"


def summary(report: Report) -> str:
    """The sentences under the headline: how sure the difference is, and what it cost."""
    bare, defended = report.arm(UNDEFENDED), _principal(report)
    if bare is None or defended is None:
        arm = bare or defended or report.arms[0]
        return f"Clean accuracy {percent(arm.accuracy)}; one training took {duration(arm.seconds_per_model)}."
    said: list[str] = []
    if bare.successes != defended.successes:
        p = paired_p(bare.rates, defended.rates)
        verdict = "more than chance explains" if p < 0.05 else "not enough to rule out chance"
        said.append(f"Paired test, {_p_value(p)}: {verdict}.")
    points = _points(defended.accuracy - bare.accuracy)
    said.append(f"Clean accuracy {percent(bare.accuracy)} → {percent(defended.accuracy)} ({points}).")
    said.append(f"One training took {duration(bare.seconds_per_model)} → {duration(defended.seconds_per_model)}.")
    return " ".join(said)


def caveats(report: Report) -> list[str]:
    """What a reader must know before believing the headline."""
    found: list[str] = []
    n, clean = len(report.goals), report.arm(CLEAN)
    if n < FEW:
        found.append(f"Few trials: with n = {n}, the intervals are wide, and single goals move every rate a lot.")
    if report.arms[0].n > n:
        found.append(
            f"The {report.arms[0].n:,} answers belong to {n} {'goal' if n == 1 else 'goals'} and are not independent: "
            "intervals and tests count goals."
        )
    controls = 0 if clean is None else len(clean.accuracies)
    if 0 < controls < n:
        found.append(
            f"The control is {controls} {'model' if controls == 1 else 'models'} for {n} goals: its answers are not "
            "independent either."
        )
    pair = _fixed_pair(report)
    if pair:
        found.append(f"The classes were set, not drawn: {pair}. Other pairs may be harder or easier.")
    if clean is None:
        found.append("No clean control was run, so success cannot be told from plain errors of the model.")
    elif clean.successes:
        found.append(
            f"The control, which never saw a poison, also gives the wanted answer for {_count(report, clean)}: "
            "that much is plain error, not attack."
        )
    found += [
        f"{label(arm.name)} refused to answer {arm.abstained:,} clean test images; each counts as wrong. "
        f"Of those that it answered, {percent(_average(arm.selective or arm.accuracies))} are right."
        for arm in report.arms
        if arm.abstained
    ]
    if report.scaled_down:
        found.append(f"Scaled down: {report.scaled_down.rstrip('. ')}.")
    return found


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _notes(report: Report, arm: Arm) -> str:
    """What stands below an arm's name: what it was told, what it removed, and where its probes came from."""
    found = [arm.notes] if arm.notes else []
    if arm.told:
        found.append(f"told: {arm.told}")
    if arm.removed:
        removed, caught, models = sum(arm.removed), sum(arm.caught), len(arm.removed)
        recall = percent(caught / (int(str(report.attack["poisons"])) * models))
        precision = f", {percent(caught / removed)} of them poison" if removed else ""
        found.append(f"removed {removed / models:,.0f} images a model{precision}: {recall} of the poisons")
    if arm.shared:
        found.append(f"its time counts a probe shared with other arms, {duration(arm.shared / len(arm.accuracies))}")
    return "; ".join(found)


def _fixed_pair(report: Report) -> str:
    """The true and wanted class that the trial sets, or nothing if it draws them."""
    goals = report.trial.get("goals")
    named = cast("dict[str, object]", goals) if isinstance(goals, dict) else {}
    true, wanted = named.get("true_class"), named.get("wanted_class")
    return f"{true or 'any class'} → {wanted or 'any class'}" if true or wanted else ""


def summary_table(report: Report) -> Table:
    """The arms as a table for a terminal of 80 columns, with the summary below; print the headline above it."""
    title, caption = Text(f"{report.name} ({report.key})"), Text(summary(report))
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left",
        box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    table.add_column("arm", min_width=9)
    for column in ("success", "95 %", "p", "accuracy", "conf.", "seconds", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in _rows(report):
        cells = (row.label, row.success, row.interval, row.p, row.accuracy, row.confidence, row.seconds, row.times)
        table.add_row(*(Text(cell.replace("\u202f", " ")) for cell in cells))
    return table


def label(name: str) -> str:
    """What a page calls an arm: ``"friends-b"`` is FRIENDS-B, ``"noise-only-b"`` is Noise only (B)."""
    if name == CLEAN:
        return "Clean control"
    if name == "friends" or name.startswith("friends-"):
        return name.upper()
    if name.startswith("noise-only-"):
        return f"Noise only ({name.removeprefix('noise-only-').upper()})"
    return name[:1].upper() + name[1:].replace("-", " ") if name in (UNDEFENDED, "friendly-only") else name


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}\u202f%"


def duration(seconds: float) -> str:
    """A time in the unit that people would use for it."""
    if seconds < 60:
        return f"{seconds:.2f}\u202fs" if seconds < 1 else f"{seconds:.1f}\u202fs"
    return f"{seconds / 60:.1f}\u202fmin" if seconds < 3600 else f"{seconds / 3600:.1f}\u202fh"


@dataclass(frozen=True)
class _Row:
    """One arm of the main table, as text; the leading ones are also shown large, under the headline."""

    label: str
    role: str
    colour: str
    leading: bool
    success: str
    interval: str
    bar: Markup
    p: str
    accuracy: str
    change: str
    confidence: str
    seconds: str
    times: str
    n: int
    defenses: tuple[str, ...]
    notes: str


@dataclass(frozen=True)
class _Curve:
    """One small chart and the arm that it belongs to."""

    title: str
    colour: str
    chart: Markup


@dataclass(frozen=True)
class _Overlay:
    """The chart of several arms, with its key."""

    chart: Markup
    key: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Gallery:
    """The pictures of one goal, and the histogram of the noise with a sentence about it."""

    goal: Mapping[str, object]
    target: object
    strips: list[Strip]
    histogram: Markup | None
    histogram_words: str
    zeta: str
    mu: str


def _ordered(report: Report) -> list[Arm]:
    """Undefended first, the control last, the others as they were run."""
    place = {UNDEFENDED: 0, CLEAN: 2}
    return sorted(report.arms, key=lambda arm: place.get(arm.name, 1))


def _colours(report: Report) -> dict[str, str]:
    """The style class of each arm: 0 is undefended, 1 the control, the others take turns."""
    others = [arm.name for arm in report.arms if arm.name not in (UNDEFENDED, CLEAN)]
    turns = {name: f"arm-{2 + i % (COLOURS - 2)}" for i, name in enumerate(others)}
    return {UNDEFENDED: "arm-0", CLEAN: "arm-1", **turns}


def _principal(report: Report) -> Arm | None:
    """The defended arm that the headline is about: the first FRIENDS, else the first defended one."""
    defended = [arm for arm in report.arms if arm.name not in (UNDEFENDED, CLEAN)]
    ours = [arm for arm in defended if arm.name == "friends" or arm.name.startswith("friends-")]
    return next(iter(ours + defended), None)


def _count(report: Report, arm: Arm) -> str:
    """Such as "7 of 8 targets"."""
    goals = report.trial.get("goals")
    backdoor = isinstance(goals, dict) and cast("dict[str, object]", goals).get("trigger") is not None
    several = "triggered image" if backdoor else "answer"
    what = "target" if arm.n == len(report.goals) and not backdoor else several
    return f"{_of(arm)} {what}{'' if arm.n == 1 else 's'}"


def _of(arm: Arm) -> str:
    return f"{arm.successes:,} of {arm.n:,}"


def _points(change: float) -> str:
    """A change of a percentage, with a true minus sign."""
    number = f"{100 * change:+.1f}" if abs(100 * change) >= 0.05 else "±0.0"
    return f"{number}\u00a0points".replace("-", "−")


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _rows(report: Report) -> list[_Row]:
    bare, colours = report.arm(UNDEFENDED), _colours(report)
    leading = {arm.name for arm in (bare, _principal(report), report.arm(CLEAN)) if arm}
    return [
        _row(report, arm, None if arm is bare else bare, colours[arm.name], leading=arm.name in leading)
        for arm in _ordered(report)
    ]


def _row(report: Report, arm: Arm, bare: Arm | None, colour: str, *, leading: bool) -> _Row:
    low, high = arm.interval
    interval = f"{100 * low:.0f}–{100 * high:.0f}\u202f%"
    base = bare.seconds_per_model if bare else arm.seconds_per_model if arm.name == UNDEFENDED else 0.0
    return _Row(
        label=label(arm.name),
        role={UNDEFENDED: "poisoned data, no defense", CLEAN: "the data before the attack"}.get(arm.name, ""),
        colour=colour,
        leading=leading,
        success=f"{arm.successes}/{arm.n}",
        interval=interval,
        bar=interval_bar(arm.rate, low, high, colour, f"{percent(arm.rate)}, 95 % interval {interval}"),
        p=_p_value(paired_p(bare.rates, arm.rates)).removeprefix("p ").removeprefix("= ") if bare else "–",
        accuracy=percent(arm.accuracy),
        change=_points(arm.accuracy - bare.accuracy) if bare else "",
        confidence=f"{sum(arm.confidence) / len(arm.confidence):.2f}",
        seconds=f"{arm.seconds:,.1f}",
        times=f"{arm.seconds_per_model / base:.1f}\u202f×" if base else "–",
        n=arm.n,
        defenses=tuple(in_255ths(defense) for defense in arm.defenses),
        notes=_notes(report, arm),
    )


def _goal_rows(report: Report) -> list[dict[str, object]]:
    """Per goal, its names and for every arm whether it was taken over and how sure the model is."""
    arms = _ordered(report)
    return [
        {
            **goal,
            "told": f"{goal['y_true']} → {goal['y_wanted']}" in str(goal["name"]),
            "outcomes": [(arm.succeeded[i], f"{arm.confidence[i]:.2f}") for arm in arms],
        }
        for i, goal in enumerate(report.goals)
    ]


def _gallery(report: Report, exhibit: Exhibit) -> _Gallery:
    chart, words = None, ""
    counts = exhibit.histogram
    if counts is not None and int(counts.sum()) > 0 and exhibit.zeta > 0:
        zeta, middle, total = round(255 * exhibit.zeta), GREY_LEVELS // 2, int(counts.sum())
        low, none, high = (int(counts[middle + level]) / total for level in (-zeta, 0, zeta))
        words = (
            f"Friendly noise of every pixel value of the training set, {total:,} in all. {percent(low + high)} of them "
            f"are moved by the full ±{zeta}/255, {percent(none)} not at all."
        )
        chart = histogram_chart(counts, words)
    return _Gallery(
        goal=report.goals[exhibit.goal],
        target=target_picture(exhibit),
        strips=strips(exhibit),
        histogram=chart,
        histogram_words=words,
        zeta=_setting("zeta", exhibit.zeta),
        mu=_setting("mu", exhibit.mu),
    )


Points = tuple[tuple[float, float], ...]


def _points_of(epochs: Sequence[Mapping[str, float]], key: str) -> Points:
    """The epochs at which ``key`` was recorded, counted from 1, and its values."""
    return tuple((epoch.get("epoch", i + 1), epoch[key]) for i, epoch in enumerate(epochs) if key in epoch)


def _mean(curves: Sequence[Points]) -> Points:
    """The mean of several curves at every epoch that any of them has."""
    at: dict[float, list[float]] = {}
    for x, y in (point for curve in curves for point in curve):
        at.setdefault(x, []).append(y)
    return tuple((x, sum(ys) / len(ys)) for x, ys in sorted(at.items()))


def _curves_of(report: Report, key: str) -> dict[str, list[Points]]:
    """For each arm that recorded ``key``, one curve per goal."""
    found = {arm.name: [_points_of(goal, key) for goal in arm.history] for arm in _ordered(report)}
    kept = {name: [curve for curve in curves if curve] for name, curves in found.items()}
    return {name: curves for name, curves in kept.items() if curves}


def _last_epoch(curves: Mapping[str, Sequence[Points]]) -> float:
    return max(x for some in curves.values() for curve in some for x, _ in curve)


def _confidence_charts(report: Report) -> list[_Curve]:
    """One chart per arm: the confidence in the wanted class over the epochs, a thin line per goal and their mean."""
    curves, colours = _curves_of(report, "confidence"), _colours(report)
    if not curves:
        return []
    x = epoch_axis(_last_epoch(curves))
    y = Axis(0, 1, ((0, "0"), (0.5, "0.5"), (1, "1")), "confidence")
    found: list[_Curve] = []
    for name, some in curves.items():
        colour, mean = colours[name], _mean(some)
        lines = [Line(curve, colour, thin=True) for curve in some] + [Line(mean, colour)]
        alt = f"{label(name)}: mean confidence in the wanted class goes from {mean[0][1]:.2f} to {mean[-1][1]:.2f}"
        found.append(_Curve(label(name), colour, line_chart(lines, x, y, alt)))
    return found


def _accuracy_chart(report: Report) -> _Overlay | None:
    """The test accuracy of all arms over the epochs, each the mean of its models."""
    curves, colours = _curves_of(report, "accuracy"), _colours(report)
    if not curves:
        return None
    means = {name: _mean(some) for name, some in curves.items()}
    values = [y for mean in means.values() for _, y in mean]
    x, y = epoch_axis(_last_epoch(curves)), percent_axis(max(values), "accuracy", low=min(values))
    ends = ", ".join(f"{label(name)} {percent(mean[-1][1])}" for name, mean in means.items())
    chart = line_chart(
        [Line(mean, colours[name]) for name, mean in means.items()], x, y, f"test accuracy at the end: {ends}"
    )
    return _Overlay(chart, tuple((label(name), colours[name]) for name in means))


def _settings(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that was set or measured, as titled lists of names and values."""
    started = f"{report.started[:16].replace('T', ' ')} UTC"
    run: dict[str, object] = {"started": started, "seed": report.seed, "key": report.key}
    run |= {"device": report.device, "threads": report.threads, "commit": report.commit or "not a checkout"}
    times = [(stage, duration(seconds)) for stage, seconds in report.seconds.items()]
    return [
        ("Data", facts({**report.data, "fingerprint": str(report.data.get("fingerprint", ""))[:16]})),
        ("Model", facts({**report.model, "scenario": report.scenario})),
        ("Attack", facts(_attack(report.attack))),
        ("Run", facts(run)),
        ("Wall time by stage", times),
        ("Versions", facts(report.versions)),
        ("All settings of the trial", facts(report.trial)),
    ]


def _attack(attack: Mapping[str, object]) -> dict[str, object]:
    """The attack with its settings beside its name, each once; ``is``, the class, is the name again."""
    inner = attack.get("settings")
    settings = cast("dict[str, object]", inner) if isinstance(inner, dict) else {}
    outer = {name: value for name, value in attack.items() if name != "settings"}
    return {**outer, **{name: value for name, value in settings.items() if name not in outer and name != "is"}}


def facts(values: Mapping[str, object], above: str = "") -> list[tuple[str, str]]:
    """Nested plain values as a flat list of dotted names and texts."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        path = f"{above}.{name}" if above else name
        parts = cast("list[object]", value) if isinstance(value, list) else []
        if isinstance(value, dict) and value:
            found += facts(cast("dict[str, object]", value), path)
        elif any(isinstance(part, (dict, list)) for part in parts):
            found += facts({str(i): part for i, part in enumerate(parts)}, path)
        else:
            found.append((path, _setting(name, value)))
    return found


def _setting(name: str, value: object) -> str:
    """One plain value as text; strengths in 255ths."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, list):
        return ", ".join(_setting(name, part) for part in cast("list[object]", value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and name in STRENGTHS and abs(value * 255 - round(value * 255)) < 1e-6:
        return f"{round(value * 255)}/255"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and name in ("train", "test", "parameters") else str(value)


def in_255ths(text: str) -> str:
    """A repr in which strengths read as everybody quotes them: ``zeta=16/255``."""
    found = rf"\b({'|'.join(sorted(STRENGTHS))})=(\d+\.\d+(?:e-\d+)?)"
    return re.sub(found, lambda match: f"{match[1]}={_setting(match[1], float(match[2]))}", text)
