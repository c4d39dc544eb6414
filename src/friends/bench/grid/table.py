"""A table and its four forms: Markdown and HTML to read, LaTeX to print, CSV to compute with."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

MARK = "*"
"""Stands behind a number that a note of the table explains."""
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\u2013": "--",
    "\u2212": "$-$",
    "\n": " ",
}
_MARKDOWN = {**{sign: f"\\{sign}" for sign in "\\`*_[]<>|"}, "\n": " "}


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Args:
        title: of the column.
        group: over it and its neighbours of the same group; empty for none.
        number: whether its entries are numbers, which stand to the right.
    """

    title: str
    group: str = ""
    number: bool = True


@dataclass(frozen=True)
class Entry:
    """What stands in one place: text, and whether it is marked."""

    text: str
    mark: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a head, with notes; the columns that are no numbers name the row.

    Args:
        name: of its files.
        title: its caption.
        head: of the columns.
        rows: an entry for every column.
        notes: sentences below.
        data: the rows of the CSV: all numbers in full precision, by column; ``None`` where there is none.

    Raises:
        ValueError: a row has more or fewer entries than there are columns.
    """

    name: str
    title: str
    head: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()
    data: tuple[dict[str, str | int | float | None], ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"table {self.name!r}: a row of {len(row)} entries under {len(self.head)} columns")

    def markdown(self) -> str:
        """A pipe table under its title; groups stand in the columns' titles."""
        titles = [_markdown(f"{c.group}: {c.title}" if c.group else c.title) for c in self.head]
        lines = [f"### {_markdown(self.title)}", "", _pipes(titles)]
        lines.append(_pipes(["---:" if column.number else "---" for column in self.head]))
        lines += [_pipes([_markdown(e.text) + (_markdown(MARK) if e.mark else "") for e in row]) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {_markdown(note)}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A ``table`` for the package booktabs."""
        columns = "".join("r" if column.number else "l" for column in self.head)
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            rf"\label{{tab:{_slug(self.name)}}}",
        ]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *self._latex_groups()]
        lines += [_ampersands([_latex(column.title) for column in self.head]), r"\midrule"]
        lines += [_ampersands([_latex(e.text) + ("$^{*}$" if e.mark else "") for e in row]) for row in self.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par{{\footnotesize {_latex(note)}}}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def _latex_groups(self) -> list[str]:
        if not any(column.group for column in self.head):
            return []
        cells: list[str] = []
        rules: list[str] = []
        start = 1
        for group, width in _groups(self.head):
            cells.append(rf"\multicolumn{{{width}}}{{c}}{{{_latex(group)}}}" if group else " & " * (width - 1))
            if group:
                rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
            start += width
        return [_ampersands(cells), "".join(rules)]

    def html(self) -> str:
        """A ``<table>`` with a caption, scopes for screen readers, and its notes in its foot."""
        lines = [f'<table id="table-{_slug(self.name)}">', f"<caption>{_html(self.title)}</caption>", "<thead>"]
        if any(column.group for column in self.head):
            lines.append(f"<tr>{''.join(_html_group(group, width) for group, width in _groups(self.head))}</tr>")
        heads = "".join(f'<th scope="col"{_right(column)}>{_html(column.title)}</th>' for column in self.head)
        lines += [f"<tr>{heads}</tr>", "</thead>", "<tbody>", *map(self._html_row, self.rows), "</tbody>"]
        if self.notes:
            notes = "".join(f"<li>{_html(note)}</li>" for note in self.notes)
            lines.append(f'<tfoot><tr><td colspan="{len(self.head)}"><ul>{notes}</ul></td></tr></tfoot>')
        return "\n".join([*lines, "</table>"]) + "\n"

    def _html_row(self, row: Sequence[Entry]) -> str:
        cells: list[str] = []
        for entry, column in zip(row, self.head, strict=True):
            text = _html(entry.text) + (f"<sup>{MARK}</sup>" if entry.mark else "")
            cells.append(f'<td class="number">{text}</td>' if column.number else f'<th scope="row">{text}</th>')
        return f"<tr>{''.join(cells)}</tr>"

    def csv(self) -> str:
        """The data: one line a row, floats as exact as they are, empty where there is no number."""
        out = io.StringIO()
        names = list({name: None for row in self.data for name in row})
        writer = csv.DictWriter(out, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.data)
        return out.getvalue()


def _groups(head: Sequence[Column]) -> list[tuple[str, int]]:
    """Neighbours of one group: its name and how many columns it spans."""
    return [(group, len(list(some))) for group, some in groupby(head, key=lambda column: column.group)]


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _markdown(text: str) -> str:
    return "".join(_MARKDOWN.get(sign, sign) for sign in text)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _html(text: str) -> str:
    return html.escape(text, quote=True)


def _html_group(group: str, width: int) -> str:
    if not group:
        return f'<td colspan="{width}"></td>'
    return f'<th scope="colgroup" colspan="{width}">{_html(group)}</th>'


def _slug(name: str) -> str:
    """A name that LaTeX and HTML can refer to."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)


def _right(column: Column) -> str:
    return ' class="number"' if column.number else ""
