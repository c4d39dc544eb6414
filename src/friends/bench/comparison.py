"""Many defenses against one attack, a row each: the form of the paper's Tables 1 and 2, from our own records.

``python -m friends.bench.comparison runs/a-0 runs/a-1 -o results/a`` writes ``results/a.jsonl`` and ``results/a.md``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from friends.attacks import ATTACKS
from friends.bench.record import CLEAN, UNDEFENDED, Arm, Report
from friends.bench.statistics import paired_p, wilson
from friends.bench.tables import page, poolable, publish, read_or_exit, spread_text, success_text
from friends.defenses import DEFENSES

HEAD = (
    "defense", "told", "attack success", "95 % interval", "p, paired", "test accuracy", "sd over runs", "removed",
    "seconds", "relative cost",
)  # fmt: skip


def comparison(reports: Sequence[Report]) -> str:
    """A Markdown table of all defenses over all runs of a trial, the undefended row first, the control last.

    Success counts goals, with Wilson's 95 % interval; p is the exact paired test against the undefended models of the
    same goals. An image that a pipeline refuses to answer is no success of the attack and, where it is clean, a wrong
    answer; in brackets is the accuracy among the answers given. What is removed has its precision and recall. Seconds
    are those of one model with everything that the defense does, probes included also where they were shared; the
    relative cost is their ratio to the undefended training. Defenses that are not defined for the attack are n/a.

    Raises:
        ValueError: the runs differ in more than the seed.
    """
    poolable(reports)
    names = [arm.name for arm in reports[0].arms]
    names.sort(key=lambda name: (name != UNDEFENDED, name == CLEAN))
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    lines += [_row(name, reports) for name in names if name != CLEAN]
    lines += [f"| {name} | {reason} |{' |' * (len(HEAD) - 2)}" for name, reason in undefined(reports[0])]
    lines += [_row(name, reports) for name in names if name == CLEAN]
    return "\n".join(lines) + "\n"


def undefined(report: Report) -> list[tuple[str, str]]:
    """The defenses that are not defined for the attack of a run, and why."""
    kinds = {attack.__name__: attack.about.aim for attack in ATTACKS.values()}
    aim = kinds.get(str(report.attack["name"]), "")
    found: list[tuple[str, str]] = []
    classes = report.data.get("classes")
    count = len(cast("list[object]", classes)) if isinstance(classes, list) else 0
    for name, defense in DEFENSES.items():
        about = defense.about
        if aim and aim not in about.aims:
            found.append((name, f"n/a: for {' and '.join(about.aims)}s only"))
        elif 0 < count < about.classes:
            found.append((name, f"n/a: for {about.classes} classes or more"))
    return found


def saving(reports: Sequence[Report]) -> str:
    """What sharing one probe among the filters of a poisoned set saved, in a sentence; empty for nothing."""
    arms = [arm for report in reports for arm in report.arms if arm.shared]
    if not arms:
        return ""
    shared = sum(arm.shared for arm in arms)
    spent = sum(arm.seconds - arm.shared for report in reports for arm in report.arms)
    return (
        f"Defenses that look through a probe shared one per poisoned set: {shared:.0f} s of training were saved, "
        f"{100 * shared / (shared + spent):.0f} % of what all rows would have taken alone."
    )


def _row(name: str, reports: Sequence[Report]) -> str:
    arms = [arm for report in reports for arm in report.arms if arm.name == name]
    base = [arm for report in reports for arm in report.arms if arm.name == UNDEFENDED]
    rates, others = ([rate for arm in some for rate in arm.rates] for some in (arms, base))
    low, high = wilson(math.fsum(rates), len(rates))
    seconds, undefended = _seconds(arms), _seconds(base)
    cells = (
        name,
        arms[0].told or "\u2013",
        success_text(sum(arm.successes for arm in arms), sum(arm.n for arm in arms), rates),
        f"{100 * low:.0f}\u2013{100 * high:.0f} %",
        "" if name == UNDEFENDED else f"{paired_p(others, rates):.2g}",
        _accuracy(arms),
        spread_text([arm.accuracy for arm in arms]),
        _removed(arms, reports),
        f"{seconds:.1f}",
        f"{seconds / undefended:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _seconds(arms: Sequence[Arm]) -> float:
    return sum(arm.seconds for arm in arms) / sum(len(arm.accuracies) for arm in arms)


def _accuracy(arms: Sequence[Arm]) -> str:
    """Such as 91.5 %, or with abstentions 90.1 % (91.2 % of those answered)."""
    strict = [value for arm in arms for value in arm.accuracies]
    text = f"{100 * math.fsum(strict) / len(strict):.1f} %"
    if not any(arm.selective for arm in arms):
        return text
    among = [value for arm in arms for value in arm.selective or arm.accuracies]
    return f"{text} ({100 * math.fsum(among) / len(among):.1f} % of those answered)"


def _removed(arms: Sequence[Arm], reports: Sequence[Report]) -> str:
    """Such as 150 of 1000 (precision 60 %, recall 90 %), a model."""
    if not any(arm.removed for arm in arms):
        return "\u2013"
    models = sum(len(arm.accuracies) for arm in arms)  # where nothing was removed counts as well, with 0
    removed, caught = sum(sum(arm.removed) for arm in arms), sum(sum(arm.caught) for arm in arms)
    poisons = sum(int(str(r.attack["poisons"])) * len(a.accuracies) for r, a in zip(reports, arms, strict=True))
    total = int(str(reports[0].data["train"]))
    exact = f"precision {100 * caught / removed:.0f} %" if removed else "nothing removed"
    return f"{removed / models:.0f} of {total} ({exact}, recall {100 * caught / poisons:.0f} %)"


def main() -> None:
    """Compare the defenses of the runs named on the command line."""
    parser = argparse.ArgumentParser(description="A table of defenses from runs that differ in their seed alone.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("-o", "--out", type=Path, required=True, help="result files to write, without the ending")
    given = parser.parse_args()
    reports = read_or_exit(given.runs)
    publish(reports, comparison_page(reports), given.out)


def comparison_page(reports: Sequence[Report]) -> str:
    """The table, with what a reader must know of the runs behind it."""
    said = saving(reports)
    return page(reports, comparison(reports) + (f"\n{said}\n" if said else ""))


if __name__ == "__main__":
    main()
