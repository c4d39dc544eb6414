"""A trial with rivals: what filters removed, what a predictor refused, what was told and shared, is on the record."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from friends.bench.comparison import comparison
from friends.bench.lab import Lab
from friends.bench.record import Report
from friends.bench.run import run_trial, told
from friends.bench.trial import parse_trial
from friends.defenses import DeepKNN, Friends, Strip

TABLE: dict[str, Any] = {
    "name": "rivals",
    "data": {"source": "digits", "classes": ["1", "3", "7"], "train": 300, "test": 120, "reserve": 90},
    "model": {"name": "tiny", "width": 8},
    "goals": {"count": 1, "images": 40, "trigger": {"kind": "white", "size": 4, "place": "corner"}, "sources": "all"},
    "attack": {"name": "badnets", "budget": 0.1},
    "recipe": {"epochs": 8, "lr": 0.05, "batch": 32, "augment": False},
    "arms": [
        {"name": "deep-knn", "defenses": [{"name": "deep-knn", "budget": 0.1}]},
        {"name": "spectral", "defenses": [{"name": "spectral-signatures", "budget": 0.1}]},
        {"name": "strip", "defenses": [{"name": "strip", "overlays": 20, "frr": 0.1}]},
    ],
}


def trial(**changes: Any) -> Any:
    return parse_trial({**copy.deepcopy(TABLE), **changes})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_trial(trial(), tmp_path_factory.mktemp("rivals") / "run")


def test_removed_rows_are_counted_against_the_poisons(report: Report) -> None:
    for name in ("deep-knn", "spectral"):
        arm = report.arm(name)
        assert arm is not None
        assert arm.removed[0] > arm.caught[0] >= 15  # of 30
        assert arm.told == "budget 0.1"
    bare = report.arm("undefended")
    assert bare is not None
    assert bare.removed == bare.refused == bare.selective == ()
    assert bare.told == ""


def test_the_second_filter_finds_the_probe_of_the_first(report: Report) -> None:
    first, second = report.arm("deep-knn"), report.arm("spectral")
    assert first is not None
    assert second is not None
    assert first.shared == 0
    assert 0 < second.shared < second.seconds
    assert second.shared < first.seconds


def test_refusals_are_no_success_and_count_as_wrong_on_clean_images(report: Report) -> None:
    strip, bare = report.arm("strip"), report.arm("undefended")
    assert strip is not None
    assert bare is not None
    assert strip.told == "clean images"
    assert strip.abstained > 0
    assert strip.selective[0] > strip.accuracy
    assert strip.accuracy == pytest.approx(strip.selective[0] * (1 - strip.abstained / 120))
    assert strip.refused[0] > 0
    assert strip.successes < bare.successes  # the same model: what it refuses is no success
    assert strip.successes <= 40 - round(strip.refused[0] * 40)


def test_the_record_and_the_table_survive_a_file(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "record.json")
    again = Report.read(tmp_path / "record.json")
    assert again == report
    assert "precision" in comparison([again])
    assert "of those answered" in comparison([again])
    assert json.loads((tmp_path / "record.json").read_text())["arms"][1]["caught"] == list(report.arms[1].caught)


def test_the_reserve_is_apart_from_all_other_images(tmp_path: Path) -> None:
    lab = Lab(trial(), tmp_path, torch.device("cpu"))
    train, test, _ = lab.data
    reserve = lab.reserve_for([Strip()])
    assert reserve is not None
    assert (len(train), len(test), len(reserve)) == (300, 120, 90)
    seen = {bytes(image.flatten().tolist()) for image in test.x}
    assert not any(bytes(image.flatten().tolist()) in seen for image in reserve.x)
    assert lab.reserve_for([Friends(), DeepKNN()]) is None  # nobody else sees it
    without = Lab(trial(data={**TABLE["data"], "reserve": False}, arms=[]), tmp_path, torch.device("cpu"))
    assert without.reserve_for([Strip()]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {**TABLE["data"], "reserve": False}}, "'strip': STRIP needs clean images: set reserve"),
        ({"data": {**TABLE["data"], "reserve": 0}}, "a reserve has at least one image, not 0"),
        (
            {"attack": {"name": "gradient-matching", "budget": 0.1}, "goals": {"count": 1}},
            "'strip': STRIP is defined for a backdoor, not for a target.*n/a",
        ),
        (
            {"arms": [{"name": "both", "defenses": [{"name": "mixup"}, {"name": "abl"}]}]},
            "'both': ABL and mixup do not compose",
        ),
        (
            {"arms": [{"name": "late", "defenses": [{"name": "mixup"}, {"name": "adversarial-poisoning"}]}]},
            "'late': Adversarial Poisoning and mixup do not compose in this order",
        ),
    ],
)
def test_arms_that_cannot_be_are_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trial(**changes)


def test_a_defense_for_more_classes_is_refused_before_training(tmp_path: Path) -> None:
    two = {**TABLE["data"], "classes": ["1", "7"], "train": 100, "test": 60, "reserve": 40}
    arms = [{"name": "cleanse", "defenses": [{"name": "neural-cleanse"}]}]
    with pytest.raises(ValueError, match="'cleanse': Neural Cleanse is defined for 3 classes or more, and the data"):
        run_trial(trial(data=two, arms=arms), tmp_path / "run")
    assert not (tmp_path / "run" / "victims").exists()


def test_a_reserve_of_all_test_images_is_refused(tmp_path: Path) -> None:
    lab = Lab(trial(data={"source": "digits", "classes": ["1", "7"], "reserve": 5000}), tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match="a reserve of 5000 leaves none of the"):
        _ = lab.data


def test_an_unknown_proxy_is_refused_before_training(tmp_path: Path) -> None:
    arms = [{"name": "p", "defenses": [{"name": "friends", "def_epoch": 1, "proxy": "lenett"}]}]
    with pytest.raises(ValueError, match="unknown proxy 'lenett'; choose one of resnet18"):
        run_trial(trial(arms=arms), tmp_path / "run")


def test_what_is_told_is_printed_as_in_papers() -> None:
    from friends.defenses import AdversarialPoisoning

    assert told([AdversarialPoisoning(eps=16 / 255), DeepKNN(budget=0.2)]) == "eps 16/255; budget 0.2"
    assert told([DeepKNN(budget=0.2, k=9)]) == "k 9"
    assert told([Friends()]) == ""
