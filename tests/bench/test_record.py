"""Records are checked where they are made and where they are read; intervals agree with textbooks and with scipy."""

from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from friends.bench import provenance
from friends.bench.record import (
    Arm,
    Exhibit,
    Report,
    clopper_pearson,
    commit,
    device_name,
    mcnemar_exact,
    versions,
    wilson,
)
from friends.bench.statistics import paired_p, standard_error, variance_over_root_n
from friends.data.files import write_tensors
from friends.data.images import LabeledImages

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def changed(place: list[str | int], value: object) -> dict[str, Any]:
    """The sample report's JSON with one value replaced."""
    content = json.loads(samples.report().as_line())
    at = content
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    return content


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score, without continuity correction)
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_has_the_published_values(successes: int, n: int, expected: tuple[float, float]) -> None:
    assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    # the same table, method 5 (Clopper-Pearson)
    [(81, 263, (0.2527, 0.3676)), (15, 148, (0.0578, 0.1617)), (0, 20, (0.0, 0.1684)), (1, 29, (0.0009, 0.1776))],
)
def test_clopper_pearson_has_the_published_values(successes: int, n: int, expected: tuple[float, float]) -> None:
    assert clopper_pearson(successes, n) == pytest.approx(expected, abs=5e-5)


@settings(deadline=None, max_examples=60)
@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_intervals_agree_with_scipy(count: tuple[int, int], level: float) -> None:
    successes, n = count
    test = binomtest(successes, n)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = test.proportion_ci(level, method=method)
        low, high = ours(successes, n, level)
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
def test_intervals_refuse_impossible_counts(interval: Any) -> None:
    for successes, n in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match=f"{successes} successes of {n} trials"):
            interval(successes, n)
    with pytest.raises(ValueError, match=r"level is in \(0, 1\), not 95"):
        interval(1, 2, 95)


def pairs(only_a: int, only_b: int, both: int = 3, neither: int = 4) -> tuple[list[bool], list[bool]]:
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return a, b


def test_mcnemar_counts_only_the_goals_on_which_the_arms_differ() -> None:
    assert mcnemar_exact(*pairs(5, 0)) == pytest.approx(2 / 32)  # 5 coins fall the same way
    assert mcnemar_exact(*pairs(6, 0)) == pytest.approx(2 / 64)
    assert mcnemar_exact(*pairs(4, 4)) == 1
    assert mcnemar_exact(*pairs(0, 0)) == 1
    assert mcnemar_exact(*pairs(9, 2, both=0)) == mcnemar_exact(*pairs(2, 9, neither=90))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_a_sign_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(*pairs(only_a, only_b)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_refuses_arms_with_other_goals() -> None:
    with pytest.raises(ValueError, match="same goals in both arms, not 1 and 2"):
        mcnemar_exact([True], [True, False])


# ------------------------------------------------------------------------------------------- arms, reports


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = samples.report()
    report.write(tmp_path / "record.json")
    assert Report.read(tmp_path / "record.json") == report


def test_a_report_is_one_line(tmp_path: Path) -> None:
    report = samples.report(name="two\nlines\u2028and a half")
    line = report.as_line()
    assert len(line.splitlines()) == 1
    assert Report.from_text(line) == report


def test_an_arm_survives_json_and_its_defaults_may_be_missing() -> None:
    arm = samples.ARMS[1]
    content = json.loads(json.dumps(arm.to_json()))
    assert Arm.from_json(content) == arm
    for name in ("abstained", "notes"):
        del content[name]
    assert Arm.from_json(content) == replace(arm, abstained=0, notes="")


def test_tuples_in_settings_become_lists_at_once() -> None:
    report = samples.report(trial={"crop": (4, 4)})
    assert report.trial == {"crop": [4, 4]}
    assert Report.from_text(report.as_line()) == report


@pytest.mark.parametrize("name", [field.name for field in fields(Report)])
def test_a_missing_field_is_named(name: str) -> None:
    content = samples.report().to_json()
    del content[name]
    with pytest.raises(ValueError, match=rf"lacks \[{name}\]"):
        Report.from_json(content)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["colour"], "red", r"report has unknown fields \[colour\]"),
        (["format"], "other-1", "is no report of ours"),
        (["seed"], 1.5, r"report\.seed must be int, not 1\.5"),
        (["seed"], True, r"report\.seed must be int, not True"),
        (["arms"], {}, r"report\.arms must be a list"),
        (["arms"], [], "needs goals and arms, not 8 and 0: nothing ran"),
        (["goals"], [], "nothing ran"),
        (["arms", 0, "colour"], 1, r"report\.arms\[0\] has unknown fields \[colour\]"),
        (["arms", 0, "accuracy"], "high", r"report\.arms\[0\]\.accuracy must be float, not 'high'"),
        (["arms", 0, "succeeded", 2], 1, r"report\.arms\[0\]\.succeeded\[2\] must be bool, not 1"),
        (["arms", 0, "history", 1, 0, "loss"], None, r"history\[1\]\[0\]\.loss must be float, not None"),
        (["arms", 1, "n"], 9, "arm 'friends-b' was judged on 8 goals with 9 images"),
        (["arms", 1, "successes"], 7, "7 successes, but 2 goals succeeded"),
        (["arms", 1, "name"], "undefended", "two arms have the same name"),
        (["arms", 2, "confidence"], [0.5], "1 confidences for 8 goals"),
        (["goals", 3], {"name": "g"}, r"goals\[3\] lacks y_true, y_wanted"),
        (["data"], {"train": 3}, "data lacks name"),
        (["scenario"], "scrath", "unknown scenario 'scrath'; choose one of scratch, transfer, finetune"),
        (["started"], "yesterday", "ISO 8601, not 'yesterday'"),
        (["started"], "2022-11-28T09:00:00+01:00", "in UTC"),
        (["started"], "2022-11-28T09:00:00", "in UTC"),
    ],
)
def test_a_wrong_field_is_named(place: list[str | int], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_json(changed(place, value))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(number: str) -> None:
    line = json.dumps(changed(["seconds"], {"training": 12345.5})).replace("12345.5", number)
    with pytest.raises(ValueError, match=number):
        Report.from_text(line)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"format": "friends-report-1"', "[" * 100_000])
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"foreign\.json"):
        Report.read(path)


def test_a_report_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"trial\.net\[1\] is nan"):
        samples.report(trial={"net": [1, float("nan")]})
    with pytest.raises(ValueError, match=r"data\.x is tensor"):
        samples.report(data={"name": "d", "x": torch.zeros(1)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"succeeded": (), "confidence": (), "successes": 0, "n": 0, "history": ()}, "at least one goal"),
        ({"successes": 9}, "9 successes of 8 images"),
        ({"accuracy": 0.5}, "accuracy 0.5 is not the mean"),
        ({"accuracies": ()}, "is not the mean"),
        ({"confidence": (float("nan"),) * 8}, r"confidence must be in \[0, 1\]"),
        ({"seconds": -1.0}, "not negative"),
        ({"seconds": float("inf")}, "must be finite"),
        ({"history": (({"loss": float("inf")},),)}, "history holds a number that is not finite"),
        ({"history": ((),) * 9}, "9 histories for 8 goals"),
        ({"selective": (0.9,)}, "1 selective accuracies for 8 models"),
        ({"refused": (0.5,) * 3}, "3 refusals for 8 models and 8 goals"),
        ({"refused": (1.5,) * 8}, r"refused must be in \[0, 1\]"),
        ({"removed": (3,) * 8, "caught": (4,) * 8}, "caught"),
        ({"removed": (3,) * 8, "caught": (1,) * 7}, "7 caught poisons"),
        ({"shared": 99.0}, "99.0 shared seconds"),
    ],
)
def test_an_arm_refuses_numbers_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(samples.ARMS[0], **changes)


def test_a_backdoor_arm_counts_images_and_goals_apart() -> None:
    rates = tuple(0.9 if hit else 0.1 for hit in samples.ARMS[0].succeeded)
    arm = replace(samples.ARMS[0], successes=650, n=800, history=(), rates=rates)
    assert arm.rate == pytest.approx(sum(rates) / 8)
    assert arm.interval == wilson(sum(rates), 8)  # as wide as eight trials make it, not eight hundred
    with pytest.raises(ValueError, match="which goals they belong to is unknown"):
        replace(samples.ARMS[0], successes=650, n=800, history=(), rates=())
    with pytest.raises(ValueError, match="are not those of 8 goals"):
        replace(arm, rates=rates[::-1])


def test_controls_may_be_fewer_than_victims_but_other_arms_may_not() -> None:
    bare, clean = samples.ARMS[0], next(arm for arm in samples.ARMS if arm.name == "clean")
    several = replace(bare, n=24, successes=3 * bare.successes, history=())
    assert samples.report((several, clean)).arms[1].n == 8
    with pytest.raises(ValueError, match="was judged on 8 goals with 8 images"):
        samples.report((several, replace(clean, name="other")))


# ---------------------------------------------------------------------------------------------- provenance


def test_versions_name_what_numbers_depend_on() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert found.keys() >= {"friends", "python", "numpy", "scipy"}
    assert all(found.values())


def test_the_processor_is_named_by_its_model(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\n\nprocessor\t: 1\nmodel name\t: Other\n")
    assert provenance._cpu_model(file) == "Some CPU @ 2.0GHz"
    assert provenance._cpu_model(tmp_path / "absent") == ""
    assert device_name("cpu")


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "friends"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "README").write_text("")
    assert commit(package) == ""  # no repository
    git(tmp_path, "init")
    git(tmp_path, "add", "README")
    git(tmp_path, "commit", "-m", "readme")
    assert commit(package) == ""  # somebody else's repository
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-m", "package")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a hook
    clean = commit(package)
    assert len(clean) == 10
    assert int(clean, 16) >= 0
    (tmp_path / "README").write_text("not the package")
    assert commit(package) == clean
    (package / "new.py").write_text("")
    assert commit(package) == clean + "-dirty"


# ------------------------------------------------------------------------------------------------ exhibits


def test_an_exhibit_survives_its_file(tmp_path: Path, digits: LabeledImages) -> None:
    made = samples.exhibit(digits, goal=3)
    made.save(tmp_path / "exhibit.safetensors")
    read = Exhibit.load(tmp_path / "exhibit.safetensors")
    for field in fields(Exhibit):
        a, b = getattr(made, field.name), getattr(read, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_an_exhibit_without_noise_survives_its_file(tmp_path: Path, digits: LabeledImages) -> None:
    Exhibit(digits.x[0], digits.x[1:4], digits.x[1:4]).save(tmp_path / "e.safetensors")
    read = Exhibit.load(tmp_path / "e.safetensors")
    assert (read.friendly, read.random, read.histogram, read.zeta) == (None, None, None, 0.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"poisons": torch.zeros(6, 3, 28, 28, dtype=torch.uint8)}, ValueError, r"poisons \(3, 28, 28\) and target"),
        ({"poisons": torch.zeros(0, 1, 28, 28, dtype=torch.uint8)}, ValueError, "at least one poison"),
        ({"bases": torch.zeros(5, 1, 28, 28, dtype=torch.uint8)}, ValueError, "bases must have shape"),
        ({"target": torch.zeros(1, 28, 28)}, TypeError, r"target must be torch\.uint8, not torch\.float32"),
        ({"histogram": torch.zeros(510, dtype=torch.int64)}, ValueError, r"histogram must have shape \(511,\)"),
        ({"zeta": 16.0}, ValueError, r"zeta and mu are in \[0, 1\]"),
        ({"zeta": 16 / 255}, ValueError, "friendly noise of 32/255 is stronger than zeta = 16/255"),
    ],
)
def test_an_exhibit_refuses_what_does_not_fit(
    digits: LabeledImages, unchecked: None, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        samples.exhibit(digits, **changes)


def test_a_foreign_exhibit_is_refused_by_name(tmp_path: Path, unchecked: None) -> None:
    path = tmp_path / "e.safetensors"
    for tensors, header, message in (
        ({}, {}, "not an exhibit of ours"),
        ({}, {"format": "friends-exhibit-1"}, "lacks zeta, mu or goal"),
        ({"odd": torch.zeros(1)}, {"format": "friends-exhibit-1", "zeta": 0, "mu": 0, "goal": 0}, "holds no exhibit"),
    ):
        write_tensors(path, tensors, header)
        with pytest.raises(ValueError, match=rf"e\.safetensors.* {message}"):
            Exhibit.load(path)


# ---------------------------------------------------------------------------------------------- paired rates


def test_the_paired_test_of_rates_is_the_sign_flip_test_and_mcnemar_where_goals_are_won_or_lost() -> None:
    a, b = [0.9, 0.8, 0.7, 1.0, 0.6], [0.1, 0.2, 0.8, 0.3, 0.6]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    signs = list(itertools.product((-1, 1), repeat=5))
    extreme = [
        abs(sum(s * d for s, d in zip(sign, differences, strict=True))) >= abs(sum(differences)) - 1e-12
        for sign in signs
    ]
    assert paired_p(a, b) == pytest.approx(sum(extreme) / 32)
    assert paired_p([1, 1, 1, 0], [0, 0, 1, 0]) == mcnemar_exact([True, True, True, False], [False, False, True, False])
    assert paired_p([0.5, 0.2], [0.5, 0.2]) == 1
    assert 0 < paired_p([0.9] * 40, [0.1] * 40) < 1e-4  # sampled: as small as can be said, and no smaller
    with pytest.raises(ValueError, match="the same goals"):
        paired_p([0.5], [0.5, 0.1])


@pytest.mark.parametrize(
    ("rate", "printed"),
    [(0.75, 4.19), (0.60, 5.37), (0.45, 5.53), (0.5, 5.59), (0.15, 2.85), (0.10, 2.01), (0.05, 1.06)],
)
def test_the_plus_minus_of_the_papers_first_table_is_no_standard_error(rate: float, printed: float) -> None:
    assert 100 * variance_over_root_n(rate, 20) == pytest.approx(printed, abs=0.01)
    assert standard_error(rate, 20) >= 2 * variance_over_root_n(rate, 20)


def test_the_binomial_standard_error() -> None:
    assert 100 * standard_error(0.75, 20) == pytest.approx(9.68, abs=0.01)
    assert 100 * standard_error(0.2152, 24) == pytest.approx(8.39, abs=0.01)
    for bad in ((1.1, 20), (0.5, 0)):
        with pytest.raises(ValueError, match="a rate in"):
            standard_error(*bad)
