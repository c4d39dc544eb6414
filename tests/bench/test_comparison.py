"""The table of defenses: what every cell says, and what it does not hide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import report as sample_report

from friends.bench.comparison import comparison, comparison_page, main, saving, undefined
from friends.bench.record import Report
from friends.bench.tables import read_records


def cells(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def report() -> Report:
    """A report whose second arm was told a budget, removed rows and shared a probe, and whose third one abstained."""
    made = sample_report()
    bare, filtered, *rest = made.arms
    models, goals = len(filtered.accuracies), len(filtered.succeeded)
    filtered = replace(
        filtered, told="budget 0.01", removed=(30,) * models, caught=(6,) * models, seconds=bare.seconds * 2,
        shared=bare.seconds * 0.5,
    )  # fmt: skip
    unsure = rest[0]
    unsure = replace(
        unsure, abstained=5, selective=(0.75,) * len(unsure.accuracies), refused=(0.25,) * goals, told="clean images"
    )
    return replace(made, arms=(bare, filtered, unsure, *rest[1:]))


def test_the_undefended_row_is_first_and_the_control_last(report: Report) -> None:
    names = [line.split("|")[1].strip() for line in comparison([report]).splitlines()[2:]]
    assert names[0] == "undefended"
    assert names[-1] == "clean"


def test_knowledge_removals_and_cost_are_shown(report: Report) -> None:
    table = comparison([report])
    row = cells(table, report.arms[1].name)
    poisons = int(str(report.attack["poisons"]))
    assert row[1] == "budget 0.01"
    assert row[7] == f"30 of {report.data['train']} (precision 20 %, recall {100 * 6 / poisons:.0f} %)"
    assert float(row[9]) == pytest.approx(2, abs=0.01)
    assert cells(table, "undefended")[9] == "1.00"


def test_an_abstaining_row_has_both_accuracies(report: Report) -> None:
    row = cells(comparison([report]), report.arms[2].name)
    assert row[5].endswith("(75.0 % of those answered)")
    assert row[1] == "clean images"


def test_a_saving_is_a_share_of_all_the_work(report: Report) -> None:
    shared = report.arms[1].shared
    total = sum(arm.seconds for arm in report.arms)
    assert f"{shared:.0f} s" in saving([report])
    assert f"{100 * shared / total:.0f} %" in saving([report])
    assert saving([report]) in comparison_page([report])
    assert saving([sample_report()]) == ""


def test_defenses_that_are_not_defined_are_na_and_not_left_out(report: Report) -> None:
    targeted = replace(report, attack={**report.attack, "name": "GradientMatching"})
    reasons = dict(undefined(targeted))
    assert reasons["strip"] == reasons["neural-cleanse"] == "n/a: for backdoors only"
    assert cells(comparison([targeted]), "strip")[1] == "n/a: for backdoors only"
    backdoor = replace(report, attack={**report.attack, "name": "SleeperAgent"})
    assert dict(undefined(backdoor)) == {"neural-cleanse": "n/a: for 3 classes or more"}  # these data have two
    ten = replace(backdoor, data={**backdoor.data, "classes": list("0123456789")})
    assert undefined(ten) == []


def test_a_run_in_which_nothing_was_removed_counts_with_zero(report: Report) -> None:
    bare, filtered, *rest = report.arms
    idle = replace(report, seed=8, arms=(bare, replace(filtered, removed=(), caught=()), *rest))
    row = cells(comparison([report, idle]), filtered.name)
    poisons = int(str(report.attack["poisons"]))
    assert row[7] == f"15 of {report.data['train']} (precision 20 %, recall {100 * 3 / poisons:.0f} %)"


def test_runs_of_other_settings_are_not_mixed(report: Report) -> None:
    with pytest.raises(ValueError, match="differ in more than the seed"):
        comparison([report, replace(report, seed=1, trial={**report.trial, "victims": 7})])


def test_an_unfinished_run_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["comparison", str(tmp_path / "half"), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"error: no finished run in .*half: there is no record\.json"):
        main()
    assert not list(tmp_path.iterdir())


def test_the_command_writes_records_and_a_page_that_says_the_same(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 0):
        (tmp_path / f"run-{seed}").mkdir()
        replace(report, seed=seed).write(tmp_path / f"run-{seed}" / "record.json")
    runs = [str(tmp_path / f"run-{seed}") for seed in (1, 0)]
    monkeypatch.setattr("sys.argv", ["comparison", *runs, "-o", str(tmp_path / "out")])
    main()
    records = read_records(tmp_path / "out.jsonl")
    assert [record.seed for record in records] == [0, 1]
    page = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert page == comparison_page(records)
    assert page in capsys.readouterr().out
