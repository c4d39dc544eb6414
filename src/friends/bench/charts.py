"""Small charts as inline SVG: the page's own fonts and colours, light or dark, without a script or a request.

Every chart is drawn for a width of 360 units, so that its text stays readable on a phone; a page shows several side
by side. Colours are classes (``arm-0``, ``arm-1``, ...) that the page's style sheet fills in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int64
from markupsafe import Markup
from torch import Tensor

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 40


@dataclass(frozen=True)
class Line:
    """A curve: its points in data units, the class of its colour, and whether it is one of many or stands out."""

    points: tuple[tuple[float, float], ...]
    colour: str
    thin: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its range, the places of its ticks, and what is written there."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str

    def place(self, value: float, start: float, end: float) -> float:
        """Where ``value`` lies between the drawing's ``start`` and ``end``; values outside the range at its end."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return start + min(1.0, max(0.0, share)) * (end - start)


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, alt: str) -> Markup:
    """Curves over two axes. Thin lines are drawn first, so that the mean lies on top."""
    parts = [_frame(x, y)]
    parts += [_curve(line, x, y) for line in sorted(lines, key=lambda line: not line.thin)]
    return _svg(parts, alt)


def histogram_chart(counts: Int64[Tensor, " levels"], alt: str) -> Markup:
    """Shares of the grey levels -255..255, cut to the levels that occur. Raises ``ValueError`` if none does."""
    levels = counts.nonzero().flatten()
    if len(levels) == 0:
        raise ValueError("a histogram without counts")
    middle = len(counts) // 2
    reach = max(4, int((levels - middle).abs().max()))
    shares = (counts[middle - reach : middle + reach + 1].double() / counts.sum()).tolist()
    x = Axis(-reach - 0.5, reach + 0.5, _grey_ticks(reach), "friendly noise of a pixel value")
    y = percent_axis(max(shares), "share of values")
    parts = [_frame(x, y)]
    for level, share in zip(range(-reach, reach + 1), shares, strict=True):
        left, right = (x.place(level + d, LEFT, WIDTH - RIGHT) for d in (-0.45, 0.45))
        top, bottom = y.place(share, HEIGHT - BOTTOM, TOP), HEIGHT - BOTTOM
        bar = Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>')
        title = f"{level:+d}/255: {share:.2%}"
        parts.append(bar.format(_f(left), _f(top), _f(right - left), _f(bottom - top), title))
    return _svg(parts, alt)


def interval_bar(rate: float, low: float, high: float, colour: str, alt: str) -> Markup:
    """A bar from 0 to ``rate`` on a track from 0 to 1, with a whisker from ``low`` to ``high``."""
    return Markup(
        '<svg class="interval" viewBox="0 0 124 18" role="img" aria-label="{alt}">'
        '<rect class="track" x="2" y="3" width="120" height="12" rx="2"/>'
        '<rect class="{colour} fill" x="2" y="3" width="{bar}" height="12" rx="2"/>'
        '<path class="halo" d="{whisker}"/><path class="whisker" d="{whisker}"/></svg>'
    ).format(
        alt=alt,
        colour=colour,
        bar=_f(120 * rate),
        whisker=f"M{_f(2 + 120 * low)} 5v8m0-4H{_f(2 + 120 * high)}m0-4v8",
    )


def epoch_axis(last: float) -> Axis:
    """Epochs from 1 to ``last``, with at most six ticks at round numbers."""
    step = _round_step(last, 6)
    ticks = sorted({1, *range(step, int(last) + 1, step)})
    if len(ticks) > 1 and ticks[1] - ticks[0] < step / 2:
        ticks = ticks[1:]
    return Axis(1, max(2.0, last), tuple((tick, f"{tick}") for tick in ticks), "epoch")


def percent_axis(high: float, title: str, low: float = 0.0) -> Axis:
    """Shares from ``low`` to at least ``high``, with ticks in round percents."""
    step = _round_step(max(1.0, 100 * (high - low)), 5)
    first, last = math.floor(100 * low / step + 1e-9), math.ceil(100 * high / step - 1e-9)
    ticks = tuple((i * step / 100, f"{i * step}\u202f%") for i in range(first, max(last, first + 1) + 1))
    return Axis(ticks[0][0], ticks[-1][0], ticks, title)


def _round_step(span: float, pieces: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that divides ``span`` into at most ``pieces``."""
    steps = (m * 10**e for e in range(12) for m in (1, 2, 5))
    return next(step for step in steps if span <= step * pieces)


def _grey_ticks(reach: int) -> tuple[tuple[float, str], ...]:
    return tuple((level, f"{level:+d}/255".replace("-", "−") if level else "0") for level in (-reach, 0, reach))


def _frame(x: Axis, y: Axis) -> Markup:
    """Grid lines, tick labels and titles of both axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[Markup] = []
    for value, text in y.ticks:
        at = y.place(value, bottom, TOP)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, _f(at), right))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, _f(at + 4), text))
    for value, text in x.ticks:
        at = x.place(value, LEFT, right)
        anchor = "end" if at > right - 12 else "start" if at < LEFT + 12 and len(text) > 3 else "middle"
        parts.append(Markup('<path class="tick" d="M{} {}v4"/>').format(_f(at), bottom))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(_f(at), bottom + 17, anchor, text))
    middle = (LEFT + right) / 2
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(_f(middle), HEIGHT - 6, x.title))
    return Markup("").join(parts)


def _curve(line: Line, x: Axis, y: Axis) -> Markup:
    """One curve; a single point is a dot, since a line through it would be invisible."""
    places = [(x.place(a, LEFT, WIDTH - RIGHT), y.place(b, HEIGHT - BOTTOM, TOP)) for a, b in line.points]
    kind = "thin" if line.thin else "mean"
    if len(places) == 1:
        (a, b) = places[0]
        dot = Markup('<circle class="{} {} dot" cx="{}" cy="{}" r="{}"/>')
        return dot.format(line.colour, kind, _f(a), _f(b), 2 if line.thin else 3.5)
    path = "M" + "L".join(f"{_f(a)} {_f(b)}" for a, b in places) if places else ""
    return Markup('<path class="{} {}" d="{}"/>').format(line.colour, kind, path)


def _svg(parts: Sequence[Markup], alt: str) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, alt)
    return head + Markup("").join(parts) + Markup("</svg>")


def _f(value: float) -> str:
    """A coordinate: a tenth of a unit is finer than any screen shows."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
