"""Several runs of one trial, pooled: result files of one JSON line a run, and the table made from them.

``python -m friends.bench.tables runs/a-0 runs/a-1 -o results/a`` writes ``results/a.jsonl`` and ``results/a.md``, and
``python -m friends.bench.tables results/a.jsonl results/b.jsonl -o results/both`` a table of one row a trial.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import cast

from friends.bench.record import CLEAN, UNDEFENDED, Report
from friends.bench.statistics import paired_p, wilson
from friends.data.files import write_text

SEED_FREE = ("seed",)


def poolable(reports: Sequence[Report]) -> None:
    """Raise ``ValueError`` unless these runs differ in their seed alone."""
    if not reports:
        raise ValueError("no run to make a table of")
    first = _but_seed(reports[0])
    for report in reports[1:]:
        if _but_seed(report) != first:
            raise ValueError(f"runs {reports[0].name!r} and {report.name!r} differ in more than the seed: not pooled")
    seeds = [report.seed for report in reports]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"a seed comes twice in {seeds}: its runs are not independent")


def _but_seed(report: Report) -> dict[str, object]:
    return {name: value for name, value in report.trial.items() if name not in SEED_FREE}


def pooled_table(reports: Sequence[Report]) -> str:
    """A Markdown table of all arms over all runs, the undefended one first.

    Success is counted over the goals of all runs, with Wilson's 95 % interval; a backdoor's many images count as one
    goal there. p is the exact paired test against the undefended arm on the same goals; accuracy is the mean over
    models, with its standard deviation over runs; confidence is the mean probability of the wanted class; seconds are
    those of training one model.

    Raises:
        ValueError: the runs differ in more than the seed.
    """
    poolable(reports)
    names = [arm.name for arm in reports[0].arms]
    lines = [
        "| arm | success | 95 % interval | p, paired | accuracy | sd over runs | confidence | seconds | models |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(name, reports) for name in sorted(names, key=lambda n: (n != UNDEFENDED, n == CLEAN))]
    return "\n".join(lines) + "\n"


def _row(name: str, reports: Sequence[Report]) -> str:
    arms = [arm for report in reports for arm in report.arms if arm.name == name]
    base = [arm for report in reports for arm in report.arms if arm.name == UNDEFENDED]
    k, n = sum(arm.successes for arm in arms), sum(arm.n for arm in arms)
    rates = [rate for arm in arms for rate in arm.rates]
    low, high = wilson(math.fsum(rates), len(rates))
    others = [rate for arm in base for rate in arm.rates]
    p = "" if name == UNDEFENDED else f"{paired_p(others, rates):.2g}"
    means = [arm.accuracy for arm in arms]
    mean = sum(means) / len(means)
    confidence = [c for arm in arms for c in arm.confidence]
    models = sum(len(arm.accuracies) for arm in arms)
    seconds = sum(arm.seconds for arm in arms) / models
    return (
        f"| {name} | {success_text(k, n, rates)} | {100 * low:.0f}\u2013{100 * high:.0f} % | {p} | "
        f"{100 * mean:.1f} % | {spread_text(means)} | {sum(confidence) / len(confidence):.2f} | "
        f"{seconds:.1f} | {models} |"
    )


def success_text(k: int, n: int, rates: Sequence[float]) -> str:
    """Such as 7/8, or for goals of many images the mean over the goals: 71.3 % of 8 x 500."""
    if n == len(rates):
        return f"{k}/{n}"
    each = f"{n // len(rates)}" if n % len(rates) == 0 else f"about {n / len(rates):.0f}"
    return f"{100 * math.fsum(rates) / len(rates):.1f} % of {len(rates)} \u00d7 {each}"


def spread_text(means: Sequence[float]) -> str:
    """The standard deviation of the runs' means in percent; empty for a single run, which has none."""
    if len(means) < 2:
        return ""
    mean = sum(means) / len(means)
    return f"{100 * (sum((m - mean) ** 2 for m in means) / (len(means) - 1)) ** 0.5:.1f}"


def page(reports: Sequence[Report], table: str | None = None) -> str:
    """A table of runs (by default that of all arms) with what a reader must know of the runs behind it."""
    first = reports[0]
    attack = first.attack
    xi = "unbounded" if attack["xi"] is None else _bound(first)
    lines = [
        f"# {attack['name']}, {first.scenario}, {first.data['name']}",
        "",
        f"{len(reports)} seeds ({', '.join(str(r.seed) for r in reports)}), {len(first.goals)} {_what(first)} each; "
        f"{first.model['name']} with {int(str(first.model['parameters'])):,} parameters; "
        f"{int(str(first.data['train'])):,} training images of {len(list(_texts(first.data['classes'])))} classes "
        f"({', '.join(_texts(first.data['classes']))}); xi = {xi}, "
        f"{attack['poisons']} poisons.",
        *([f"\nScaled down: {first.scaled_down}."] if first.scaled_down else []),
        "",
        pooled_table(reports) if table is None else table,
        f"Device: {first.device}, {first.threads} thread(s); torch {first.versions.get('torch', '?')}; "
        f"commits {', '.join(sorted({r.commit for r in reports}))}. "
        "`clean` is the control: models trained on clean data, asked about the same targets.",
        "",
    ]
    return "\n".join(lines)


def overview(trials: Sequence[Sequence[Report]]) -> str:
    """One Markdown table of several trials, a row each: what every arm lets through, the undefended one first.

    Args:
        trials: the pooled runs of each trial. Arms that are not in every trial get a column all the same.

    Raises:
        ValueError: the runs of a trial differ in more than their seed.
    """
    names: list[str] = []
    for reports in trials:
        poolable(reports)
        names += [arm.name for arm in reports[0].arms if arm.name not in names]
    names.sort(key=lambda name: (name != UNDEFENDED, name == CLEAN))
    head = ["trial", "scenario", "xi", "poisons", *(f"{name}, 95 % interval" for name in names), "accuracy"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(_overview_row(reports, names) for reports in trials)]) + "\n"


def _overview_row(reports: Sequence[Report], names: Sequence[str]) -> str:
    first = reports[0]
    cells = [_trial_name(first), first.scenario, _bound(first), f"{first.attack['poisons']}"]
    means: list[str] = []
    for name in names:
        arms = [arm for report in reports for arm in report.arms if arm.name == name]
        if not arms:
            cells.append("")
            continue
        rates = [rate for arm in arms for rate in arm.rates]
        low, high = wilson(math.fsum(rates), len(rates))
        text = success_text(sum(arm.successes for arm in arms), sum(arm.n for arm in arms), rates)
        cells.append(f"{text}, {100 * low:.0f}\u2013{100 * high:.0f} %")
        if name != CLEAN:
            means.append(f"{100 * sum(arm.accuracy for arm in arms) / len(arms):.1f}")
    cells.append(" \u2192 ".join(means) + " %")
    return f"| {' | '.join(cells)} |"


def _trial_name(report: Report) -> str:
    """The name of a trial without the seed that a run's name ends with."""
    return report.name.removesuffix(f"-{report.seed}")


def _bound(report: Report) -> str:
    xi = report.attack["xi"]
    return "\u2013" if xi is None else f"{float(str(xi)) * 255:g}/255"


def portable(report: Report) -> Report:
    """The record without what only concerns the machine it was made on: where on its disk the data were.

    Name, counts and fingerprint of the data stay; the key remains that of the run as it was started.
    """
    data = dict(cast("dict[str, object]", report.trial.get("data") or {}))
    source = str(data.get("source", ""))
    if not PurePath(source).is_absolute():
        return report
    return replace(report, trial={**report.trial, "data": {**data, "source": PurePath(source).name}})


def read_records(path: Path) -> list[Report]:
    """The runs in a result file of one JSON line each. Raises ``ValueError`` where a line is no report."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Report.from_text(line, f"{path}, line {i + 1}") for i, line in enumerate(lines)]


def _what(report: Report) -> str:
    """What the goals of a run are called."""
    many = report.arms[0].n > len(report.goals)
    return ("goals" if many else "targets")[: -1 if len(report.goals) == 1 else None]


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []  # pyright: ignore[reportUnknownArgumentType]


def main() -> None:
    """Pool the runs named on the command line."""
    parser = argparse.ArgumentParser(description="Pool runs that differ in their seed alone.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, or result files (.jsonl)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="result files to write, without the ending")
    given = parser.parse_args()
    if all(run.suffix == ".jsonl" for run in given.runs):
        text = overview([read_records(run) for run in given.runs])
        write_text(given.out.with_suffix(".md"), text)
        print(text)  # noqa: T201
        return
    reports = read_or_exit(given.runs)
    publish(reports, page(reports), given.out)


def read_runs(folders: Sequence[Path]) -> list[Report]:
    """The records of some run folders, in the order of their seeds, without paths of this machine.

    Raises:
        FileNotFoundError: a folder holds no finished run.
    """
    unfinished = [folder for folder in folders if not (folder / "record.json").is_file()]
    if unfinished:
        raise FileNotFoundError(
            f"no finished run in {unfinished[0]}: there is no record.json; run the trial to its end"
        )
    return sorted((portable(Report.read(folder / "record.json")) for folder in folders), key=lambda r: r.seed)


def read_or_exit(folders: Sequence[Path]) -> list[Report]:
    """:func:`read_runs` for a command line: what is wrong is one line."""
    try:
        return read_runs(folders)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def publish(reports: Sequence[Report], text: str, out: Path) -> None:
    """Write records and page of some runs, and print the page."""
    write_text(out.with_suffix(".jsonl"), "".join(report.as_line() + "\n" for report in reports))
    write_text(out.with_suffix(".md"), text)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
