"""What is said below a table: how sure its numbers are, what the paper's numbers are, and what is too little."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from friends.bench.grid.estimates import few_text
from friends.bench.grid.paper import TRIALS
from friends.bench.grid.summary import Summary
from friends.bench.grid.table import MARK
from friends.bench.grid.table_lines import Line
from friends.bench.record import CLEAN


def notes_of(lines: Sequence[Line], *, seconds: bool = True) -> tuple[str, ...]:
    """What a reader must know of a table: its intervals and tests, what the paper's numbers are, what is too little.

    Args:
        lines: of the table.
        seconds: whether times stand in it.
    """
    some = [line.summary for line in lines if line.summary is not None]
    notes = [_method(some, seconds), _test(some), _told(some), *_paper(lines), *_too_few(lines)]
    for reason, some_lines in _by_text((line.reason, line) for line in lines).items():
        notes.append(f"n/a: {_whose(some_lines, lines)}: {reason}.")
    measured = [line for line in lines if line.summary]
    partial = [line for line in measured if line.summary and line.summary.trials < line.planned]
    if partial:
        notes.append(f"{_whose(partial, measured)}: not complete.")
    return tuple(note for note in notes if note)


def _method(summaries: Sequence[Summary], seconds: bool) -> str:
    """What is counted, and how sure it is."""
    kinds = list({s.success.kind.split(" over ")[0]: None for s in summaries if not s.success.is_open})
    if not summaries:
        return ""
    names = " or ".join("Student's t" if kind == "t" else kind for kind in kinds)
    text = f"n counts goals of the attack{f'; intervals: {names}' if names else ''}."
    if any(s.trials > s.success.n or s.images > s.trials for s in summaries):
        text += " A goal with several models or images counts once, by the mean of its rates."
    if any(len({(r.seed, r.goal) for r in s.records}) > len({r.seed for r in s.records}) for s in summaries):
        text += " Goals of one seed share data and surrogates, but count as independent."
    return text + (" Seconds are the median of one model, its defense included." if seconds else "")


def _test(summaries: Sequence[Summary]) -> str:
    tests = list({s.versus.test: None for s in summaries if s.versus})
    if not tests:
        return ""
    return (f"p: two-sided {' or '.join(tests)} against the undefended models of the same seeds and goals, adjusted by "
            "Holm over the defenses of a point.")  # fmt: skip


def _told(summaries: Sequence[Summary]) -> str:
    told: dict[str, list[str]] = {}
    for summary in summaries:
        if summary.told and summary.defense not in told.setdefault(summary.told, []):
            told[summary.told].append(summary.defense)
    text = "; ".join(f"{', '.join(names)}: {what}" for what, names in told.items())
    return f"Told about the attack: {text}." if told else ""


def _paper(lines: Sequence[Line]) -> list[str]:
    """Which of the paper's numbers can be compared, and what is to doubt in them."""
    beside = [line for line in lines if line.paper]
    notes: list[str] = []
    for down, some in _by_text((line.unlike, line) for line in beside).items():
        whose = _whose(some, beside)
        notes.append(f"{whose}: sizes differ from the paper's ({down}), whose numbers are shown, but not compared.")
    if any(line.comparable for line in beside):
        trials = TRIALS.get(beside[0].paper.table) if beside[0].paper else None
        own = f", themselves means over {trials} trials," if trials else ""
        notes.append(f"Difference: our success minus the paper's, percentage points. The paper's numbers{own} are not "
                     "of the same poisons.")  # fmt: skip
    if any(line.outside for line in lines):
        notes.append(f"{MARK} The paper's success rate lies outside our 95 % interval.")
    doubts = _by_text((doubt, line) for line in beside if line.paper for doubt in line.paper.doubts)
    return notes + [f"The paper's {_whose(some, lines)}: {doubt}." for doubt, some in doubts.items()]


def _too_few(lines: Sequence[Line]) -> list[str]:
    """Rows with as many goals as each other together, whatever each would need."""
    some = [line for line in lines if line.summary and line.defense != CLEAN]
    notes: list[str] = []
    for n in sorted({line.summary.success.n for line in some if line.summary and line.summary.few}, reverse=True):
        few = [line for line in some if line.summary and line.summary.few and line.summary.success.n == n]
        text = few_text(n, *(line.summary.needed for line in few if line.summary))
        notes.append(f"{_whose(few, some)}: {text}.")
    return notes


def _whose(some: Sequence[Line], lines: Sequence[Line]) -> str:
    """Which lines these are; points in whole where all of their lines are meant."""
    if len(some) == len(lines):
        return "All rows"
    names: list[str] = []
    for line in some:
        mine, at_point = ([other for other in part if other.labels == line.labels] for part in (some, lines))
        whole = line.labels and len(mine) == len(at_point) > 1
        names.append(", ".join(line.labels.values() if whole else (*line.labels.values(), line.defense)))
    return "; ".join(dict.fromkeys(names))


def _by_text(pairs: Iterable[tuple[str, Line]]) -> dict[str, list[Line]]:
    """The lines of which the same is to be said; nothing of those without a text."""
    found: dict[str, list[Line]] = {}
    for text, line in pairs:
        if text:
            found.setdefault(text, []).append(line)
    return found
