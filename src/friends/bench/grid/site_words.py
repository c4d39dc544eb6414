"""What the pages of a site are called, what they say, and the command that makes a row again."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from friends.bench.charts import Axis, Line, epoch_axis, line_chart
from friends.bench.grid.estimates import Estimate
from friends.bench.grid.record import Record
from friends.bench.record import CLEAN, UNDEFENDED

SLUG = 60
"""The most letters of a file's readable part: with folders and hash it stays far below every system's limit."""
POINTS = 160
"""The most points of a drawn curve; more epochs are thinned out, the last one stays."""
ROLES = {UNDEFENDED: "undefended", CLEAN: "clean"}


def slug(text: str) -> str:
    """Any text as a part of a file's name: letters a to z, digits and hyphens, never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG].strip("-") or "x"


def page_name(labels: Mapping[str, str], defense: str) -> str:
    """The name of a row's page, the same from run to run: readable, and a hash that tells like ones apart."""
    exact = json.dumps([sorted(labels.items()), defense])
    readable = slug("-".join([defense, *(label for _, label in sorted(labels.items()))]))
    return f"{readable}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def role(defense: str) -> str:
    """The style class of a row."""
    ours = defense == "friends" or defense.startswith("friends-")
    return ROLES.get(defense, "ours" if ours else "other")


def command(record: Record, seeds: Iterable[int]) -> str:
    """What to type to make a row again, or its part with these seeds; the undefended models are made with it."""
    grid = [record.grid, "--preset", record.preset] if record.preset else [f"{record.grid}.toml"]
    at = [word for axis, label in record.labels.items() for word in ("--at", f"{axis}={label}")]
    words = ["friends", "bench", "run", *grid, "--only", record.defense, *at, "--seeds", seeds_text(seeds)]
    return shlex.join(words)


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds as ``--seeds`` takes them: how many from 0, or a list; a comma makes a list of a single one."""
    some = sorted(set(seeds))
    if some == list(range(len(some))):
        return str(len(some))
    return ",".join(str(seed) for seed in some) + ("," if len(some) == 1 else "")


def success_text(estimate: Estimate) -> str:
    """A share in percent, with a decimal only where there are trials enough to mean it."""
    return f"{100 * estimate.mean:.{0 if estimate.n < 100 else 1}f}\u202f%"


def interval_text(estimate: Estimate) -> str:
    """Such as ``"12–43 %"``, or a dash where one value has no interval."""
    return "–" if estimate.is_open else f"{100 * estimate.low:.0f}–{100 * estimate.high:.0f}\u202f%"


def p_text(p: float, least: float = 0.001) -> str:
    """A p-value with two digits; below ``least`` only that it is."""
    return f"< {least:g}" if p < least else f"{p:.2g}"


def times_text(times: float) -> str:
    """A cost beside that of no defense."""
    return "–" if math.isnan(times) else f"{times:.1f}\u202f×" if times < 100 else f"{times:,.0f}\u202f×"


def size_text(size: int) -> str:
    """The size of a file or of many, in the unit that suits it."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 0.9995 * 10**power:  # what rounds to 1,000 of the unit below
            return f"{size / 10**power:.3g} {unit}"
    return f"{size} B"


def success_bar(estimate: Estimate, kind: str, undefended: float | None) -> Markup:
    """A dot and its interval on a line from 0 to 100 %, and a mark where the undefended models are."""
    places = [6 + 112 * value for value in (estimate.low, estimate.high, estimate.mean)]
    low, high, mean = (f"{place:.0f}" for place in places)
    mark = "" if undefended is None else Markup('<path class="u" d="M{} 1v14"/>').format(f"{6 + 112 * undefended:.0f}")
    whisker = (
        "" if estimate.is_open else Markup('<path class="w" d="M{} 8H{}M{} 5v6M{} 5v6"/>').format(low, high, low, high)
    )
    head = Markup(
        '<svg class="i {}" viewBox="0 0 124 16" aria-hidden="true"><path class="t" d="M6 8h112M6 4v8M118 4v8"/>'
    )
    dot = Markup('<circle cx="{}" cy="8" r="4.5"/></svg>').format(mean)
    return head.format(kind) + mark + whisker + dot


def curve(history: Sequence[Mapping[str, float]], key: str) -> tuple[tuple[float, float], ...]:
    """The epochs at which something was recorded, and its finite values."""
    points = [(line.get("epoch", i + 1.0), line[key]) for i, line in enumerate(history) if key in line]
    points = [point for point in points if math.isfinite(point[1])]
    step = math.ceil(len(points) / POINTS) if points else 1
    return tuple(point for i, point in enumerate(points) if (len(points) - 1 - i) % step == 0)


def confidence_chart(records: Sequence[Record], colour: str) -> Markup | None:
    """The confidence in the wanted class over the epochs: a thin line a model, and their mean."""
    curves = [found for record in records if (found := curve(record.history, "confidence"))]
    if not curves:
        return None
    y = Axis(0, 1, ((0, "0"), (0.5, "0.5"), (1, "1")), "confidence")
    mean = _mean(curves)
    lines = [Line(found, colour, thin=True) for found in curves] if len(curves) > 1 else []
    what = f"mean of {len(curves)} models" if len(curves) > 1 else "one model"
    alt = f"Confidence in the wanted class, {what}: from {mean[0][1]:.2f} to {mean[-1][1]:.2f}"
    return line_chart([*lines, Line(mean, colour)], epoch_axis(mean[-1][0]), y, alt)


def loss_chart(records: Sequence[Record], colour: str) -> Markup | None:
    """The training loss over the epochs: a thin line a model, and their mean."""
    curves = [found for record in records if (found := curve(record.history, "loss"))]
    if not curves:
        return None
    mean = _mean(curves)
    lines = [Line(found, colour, thin=True) for found in curves] if len(curves) > 1 else []
    alt = f"Training loss: from {mean[0][1]:.3g} to {mean[-1][1]:.3g}"
    y = _loss_axis(max(value for found in curves for _, value in found))
    return line_chart([*lines, Line(mean, colour)], epoch_axis(mean[-1][0]), y, alt)


def _loss_axis(high: float) -> Axis:
    """From 0 to at least the highest loss, with three to six ticks at round numbers."""
    high = high if high > 0 else 1.0
    magnitude = 10.0 ** math.floor(math.log10(high))
    step = next(m * magnitude for m in (0.2, 0.5, 1.0, 2.0) if high <= 5 * m * magnitude)
    count = max(2, math.ceil(high / step - 1e-9))
    return Axis(0, count * step, tuple((i * step, f"{i * step:.3g}") for i in range(count + 1)), "loss")


def _mean(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[tuple[float, float], ...]:
    at: dict[float, list[float]] = {}
    for x, y in (point for found in curves for point in found):
        at.setdefault(x, []).append(y)
    return tuple((x, math.fsum(ys) / len(ys)) for x, ys in sorted(at.items()))


def settings_groups(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The settings but the seed as JSON, each with the models that have it: one group unless rows were mixed."""
    found: dict[str, list[Record]] = {}
    for record in records:
        settings = {name: value for name, value in record.settings.items() if name != "seed"}
        found.setdefault(json.dumps(settings, indent=2, ensure_ascii=False), []).append(record)
    return [
        ("all models" if len(found) == 1 else ", ".join(f"seed {r.seed} goal {r.goal + 1}" for r in some), text)
        for text, some in found.items()
    ]


def plain_facts(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Names and values as text; numbers with six digits."""
    return [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in values.items()]
