"""What all pictures share: colours that colour-blind readers tell apart, fonts, captions, files that are always equal.

Nothing of matplotlib's global state is used or changed: no pyplot, and the style holds within :func:`styled` only.
Axes are typed ``Any``, as matplotlib's own types are partial.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from friends.bench.grid.figures.sheet import Sheet
from friends.data.files import replacing

BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#000000",
)
"""Okabe and Ito's colours, which all readers tell apart."""
COLOURS = (RED, BLUE, GREEN, ORANGE, PINK, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", "-", "--", "-.")
MAP = "viridis"
GREY = "#5f5f5f"
DPI = 150
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "friends",
    "svg.fonttype": "path",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_LINE = 0.165
"""Height of a line of the caption in inches."""


@contextlib.contextmanager
def styled() -> Generator[None]:
    """Our style, on top of matplotlib's defaults and not of the user's; the user's is back afterwards."""
    from matplotlib import rc_context, rcParamsDefault

    rc: Any = {n: value for n, value in rcParamsDefault.items() if not n.startswith(("backend", "webagg"))} | _STYLE
    with rc_context(rc):
        yield


@dataclass(frozen=True)
class Page:
    """A figure with its title above and its caption below; what is between them is placed in inches.

    No layout is computed: a solver's last digits would differ from one process to the next.
    """

    figure: Any
    width: float
    height: float
    total: float
    below: float

    def axes(self, left: float, bottom: float, width: float, height: float, **more: Any) -> Any:
        """Axes at a place, in inches from the lower left corner of the area between title and caption."""
        place = (left / self.width, (self.below + bottom) / self.total, width / self.width, height / self.total)
        return self.figure.add_axes(place, **more)

    def panels(self, lines: int, columns: int, *, right: float = 0.15, bottom: float = 0.0) -> list[Any]:
        """Equal panels, row by row, with room for their labels; ``right`` and ``bottom`` inches are left free."""
        wide, high = (self.width - right) / columns, (self.height - bottom) / lines
        places = [(x * wide, bottom + (lines - 1 - y) * high) for y in range(lines) for x in range(columns)]
        return [self.axes(x + 0.88, y + 0.55, wide - 1.02, high - 0.9) for x, y in places]

    def legend(self, left: float, bottom: float, handles: Sequence[Any], names: Sequence[str], **more: Any) -> None:
        """A legend whose anchor (``loc``) is at a place in inches, as in :meth:`axes`."""
        at = (left / self.width, (self.below + bottom) / self.total)
        self.figure.legend(handles, names, bbox_to_anchor=at, borderaxespad=0, **more)


def page(sheet: Sheet, width: float, height: float) -> Page:
    """A new page with an area of ``width`` x ``height`` inches between title and caption."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _wrapped(sheet, width)
    above, below = 0.42, _LINE * len(lines) + 0.22
    total = above + height + below
    figure: Any = Figure(figsize=(width, total), dpi=DPI)
    FigureCanvasAgg(figure)
    left = 0.12 / width
    figure.text(left, 1 - 0.24 / total, sheet.title, size=12, weight="bold", va="center")
    for number, (text, strong) in enumerate(lines):
        y = (below - 0.12 - _LINE * (number + 0.5)) / total
        figure.text(left, y, text, size=8, va="center", color=RED if strong else GREY)
    return Page(figure, width, height, total, below)


def _wrapped(sheet: Sheet, width: float) -> list[tuple[str, bool]]:
    """The caption's lines, and whether each is a warning."""
    columns = int((width - 0.24) * 16.6)
    lines = [(line, False) for line in textwrap.wrap(sheet.caption, columns)]
    warnings = [f"Scaled down: {sheet.scaled_down}."] if sheet.scaled_down else []
    warnings += [f"Missing: {part} ({why})." for part, why in sheet.missing.items()]
    return lines + [(line, True) for text in warnings for line in textwrap.wrap(text, columns)]


def counted(number: int, what: str) -> str:
    """A number of things: ``1 goal``, ``12 goals``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def absent(axes: Any, why: str) -> None:
    """Say in a panel's place why it is empty."""
    axes.set_axis_off()
    text = "\n".join(textwrap.wrap(why, 34))
    axes.text(0.5, 0.5, text, ha="center", va="center", color=RED, transform=axes.transAxes)


def grey_levels(axis: Any, values: Sequence[float]) -> None:
    """Label places on an axis, given in grey levels, as ``n/255``."""
    texts = ["0" if value == 0 else f"{value:+g}/255".replace("-", "\N{MINUS SIGN}") for value in values]
    axis.set_ticks(list(values), [text if min(values) < 0 else text.lstrip("+") for text in texts])


def whole_numbers(axis: Any) -> None:
    """Label only whole numbers, as epochs are."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))


def percent(axis: Any) -> None:
    """Write shares on an axis as percents."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(_percent_text))


def _percent_text(value: float, _: int) -> str:
    return f"{100 * value:g}\u202f%"


def _number_text(value: float, _: int) -> str:
    return f"{value:g}"


def seconds(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times powers of ten, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_number_text))
    axis.set_minor_formatter(NullFormatter())


def bars(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Any:
    """Lengths of error bars for matplotlib, ``(2, n)``; never negative by rounding."""
    middle = np.asarray(values)
    return np.maximum(np.stack([middle - np.asarray(low), np.asarray(high) - middle]), 0)


def handle(colour: str, marker: str, size: float = 7) -> Any:
    """A marker for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", marker=marker, markersize=size, color=colour)


def save(figure: Any, sheet: Sheet, folder: Path) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all, without dates: equal figures are equal bytes."""
    about = {"Title": sheet.title, "Description": sheet.alt}
    written: list[Path] = []
    for kind, metadata in (("png", {**about, "Software": None}), ("svg", {**about, "Date": None, "Creator": None})):
        buffer = io.BytesIO()
        with styled():  # for the salt of the SVG's ids
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        path = folder / f"{sheet.name}.{kind}"
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
        written.append(path)
    return written
