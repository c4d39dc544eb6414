"""Several runs of one trial, pooled: result files of one JSON line a run, and the table made from them.

``python -m friends.bench.tables runs/a-0 runs/a-1 -o results/a`` writes ``results/a.jsonl`` and ``results/a.md``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

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
    sd = (sum((m - mean) ** 2 for m in means) / (len(means) - 1)) ** 0.5 if len(means) > 1 else None
    spread = "" if sd is None else f"{100 * sd:.1f}"
    confidence = [c for arm in arms for c in arm.confidence]
    models = sum(len(arm.accuracies) for arm in arms)
    seconds = sum(arm.seconds for arm in arms) / models
    return (
        f"| {name} | {_success(k, n, rates)} | {100 * low:.0f}\u2013{100 * high:.0f} % | {p} | {100 * mean:.1f} % | "
        f"{spread} | {sum(confidence) / len(confidence):.2f} | {seconds:.1f} | {models} |"
    )


def _success(k: int, n: int, rates: Sequence[float]) -> str:
    """Such as 7/8, or for goals of many images the mean over the goals: 71.3 % of 8 x 500."""
    if n == len(rates):
        return f"{k}/{n}"
    each = f"{n // len(rates)}" if n % len(rates) == 0 else f"about {n / len(rates):.0f}"
    return f"{100 * math.fsum(rates) / len(rates):.1f} % of {len(rates)} \u00d7 {each}"


def page(reports: Sequence[Report]) -> str:
    """The table with what a reader must know of the runs behind it."""
    first = reports[0]
    attack = first.attack
    xi = "unbounded" if attack["xi"] is None else f"{float(str(attack['xi'])) * 255:g}/255"
    lines = [
        f"# {attack['name']}, {first.scenario}, {first.data['name']}",
        "",
        f"{len(reports)} seeds ({', '.join(str(r.seed) for r in reports)}), {len(first.goals)} targets each; "
        f"{first.model['name']} with {int(str(first.model['parameters'])):,} parameters; "
        f"{int(str(first.data['train'])):,} training images of {len(list(_texts(first.data['classes'])))} classes "
        f"({', '.join(_texts(first.data['classes']))}); xi = {xi}, "
        f"{attack['poisons']} poisons.",
        *([f"\nScaled down: {first.scaled_down}."] if first.scaled_down else []),
        "",
        pooled_table(reports),
        f"Device: {first.device}, {first.threads} thread(s); torch {first.versions.get('torch', '?')}; "
        f"commits {', '.join(sorted({r.commit for r in reports}))}. "
        "`clean` is the control: models trained on clean data, asked about the same targets.",
        "",
    ]
    return "\n".join(lines)


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []  # pyright: ignore[reportUnknownArgumentType]


def main() -> None:
    """Pool the runs named on the command line."""
    parser = argparse.ArgumentParser(description="Pool runs that differ in their seed alone.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("-o", "--out", type=Path, required=True, help="result files to write, without the ending")
    given = parser.parse_args()
    reports = sorted((Report.read(folder / "record.json") for folder in given.runs), key=lambda r: r.seed)
    text = page(reports)
    write_text(given.out.with_suffix(".jsonl"), "".join(report.as_line() + "\n" for report in reports))
    write_text(given.out.with_suffix(".md"), text)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
