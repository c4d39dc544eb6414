"""One run, from settings to record and page; interrupted, foreign, finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from friends.bench.record import Report
from friends.bench.run import run_trial
from friends.bench.trial import Trial, parse_trial
from friends.models.saved import load

TABLE = {
    "name": "small",
    "scenario": "transfer",
    "controls": 1,
    "data": {"source": "digits", "classes": ["3", "5"], "train": 120, "test": 100},
    "model": {"name": "tiny", "width": 8},
    "goals": {"count": 2},
    "attack": {"name": "bullseye-polytope", "xi": "64/255", "budget": 0.1, "steps": 10, "augment": False},
    "pretraining": {"epochs": 12, "lr": 0.05, "batch": 32, "augment": False},
    "recipe": {"epochs": 4, "batch": 32, "augment": False},
    "arms": [
        {"name": "friends-b", "defenses": [{"name": "friends", "def_epoch": 1}]},
        {"name": "noise-only", "defenses": [{"name": "friends", "zeta": 0, "random": "gaussian"}]},
    ],
}


@pytest.fixture(scope="module")
def trial() -> Trial:
    return parse_trial(TABLE)


def timeless(folder: Path) -> dict[str, object]:
    """A record without what differs from run to run by nature."""
    record = json.loads((folder / "record.json").read_text())
    for name in ("started", "seconds"):
        del record[name]
    for arm in record["arms"]:
        del arm["seconds"]
        for history in arm["history"]:
            for line in history:
                del line["seconds"]
                line.pop("friendly noise seconds", None)
    return record


@pytest.fixture(scope="module")
def finished(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    run_trial(trial, folder)
    return folder


def test_the_record_holds_what_a_reader_needs(finished: Path, trial: Trial) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == ["undefended", "friends-b", "noise-only", "clean"]
    for arm in record["arms"]:
        assert arm["n"] == 2
        assert 0 <= arm["successes"] <= 2
        assert arm["accuracy"] > 0.6
        assert arm["seconds"] > 0
    for key in ("seed", "key", "versions", "device", "seconds", "trial", "data"):
        assert record[key] or record[key] == 0, key
    assert record["key"] == trial.key()
    assert record["attack"]["poisons"] == 12
    assert Report.read(finished / "record.json").arms[0].name == "undefended"


def test_the_folder_holds_report_models_and_poisons_and_no_leftovers(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "FRIENDS" in page
    model, name = load(finished / "models" / "undefended.safetensors")
    assert name == "tiny"
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 2)
    assert len(list((finished / "poisons").iterdir())) == 2
    assert not (finished / "work").exists()
    assert not [p for p in finished.rglob("*") if p.name.endswith(".tmp")]


def test_a_run_interrupted_anywhere_resumes_to_the_same_record(trial: Trial, finished: Path, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    folder = tmp_path / "small"
    for moment in (2, 30, 60, 40, 20):
        calls = 0

        def stop(what: str, done: int, total: int, note: str = "", /, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Stop

        with pytest.raises(Stop):
            run_trial(trial, folder, progress=stop)
    run_trial(trial, folder)
    assert timeless(folder) == timeless(finished)
    for file in (finished / "poisons").iterdir():
        assert file.read_bytes() == (folder / "poisons" / file.name).read_bytes()


def test_a_finished_run_is_not_run_again(trial: Trial, finished: Path) -> None:
    before = (finished / "record.json").read_bytes()

    def boom(*_: object) -> None:
        raise AssertionError("something ran")

    run_trial(trial, finished, progress=boom)
    assert (finished / "record.json").read_bytes() == before


def test_another_trial_in_the_folder_is_refused_by_its_first_difference(trial: Trial, finished: Path) -> None:
    with pytest.raises(ValueError, match="its seed is 0, not 1"):
        run_trial(replace(trial, seed=1), finished)
    with pytest.raises(ValueError, match=r"its recipe.lr is 0.1, not 0.05"):
        run_trial(replace(trial, recipe=replace(trial.recipe, lr=0.05)), finished)


def test_a_folder_of_something_else_is_refused(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="holds something else"):
        run_trial(trial, tmp_path)


def test_settings_that_do_not_fit_the_data_are_refused_before_training(tmp_path: Path) -> None:
    bad = {
        "goals name class 'cat'": {"goals": {"count": 2, "true_class": "cat"}},
        "def_epoch|made at epoch 9": {"arms": [{"name": "a", "defenses": [{"name": "friends", "def_epoch": 9}]}]},
        "at least two classes": {"data": {**TABLE["data"], "classes": ["3"]}},
        "unknown model 'tyni'": {"model": {"name": "tyni"}},
    }
    for i, (message, change) in enumerate(bad.items()):
        seen: list[str] = []

        def note(what: str, *_: object, seen: list[str] = seen) -> None:
            seen.append(what)

        with pytest.raises(ValueError, match=message):
            run_trial(parse_trial({**TABLE, **change}), tmp_path / str(i), progress=note)
        assert set(seen) <= {"data"}
        assert not list((tmp_path / str(i)).iterdir())  # free for the mended trial


@pytest.mark.parametrize(("scenario", "name"), [("scratch", "gradient-matching"), ("finetune", "bullseye-polytope")])
def test_the_other_scenarios_run(scenario: str, name: str, tmp_path: Path) -> None:
    attack = {"name": name, "xi": "64/255", "budget": 0.1, "steps": 3, "restarts": 1, "surrogates": 2,
              "augment": False}  # fmt: skip
    table = {**TABLE, "scenario": scenario, "attack": attack, "goals": {"count": 1}, "own_surrogates": True}
    result = run_trial(parse_trial(table), tmp_path / scenario)
    assert result.scenario == scenario
    assert result.arms[0].n == 1


def test_controls_are_asked_in_turn_and_put_back_in_order() -> None:
    from friends.bench.run import _control_arm

    def row(goals: list[int]) -> dict[str, object]:
        return {
            "hits": [g % 2 for g in goals],
            "images": [1 for _ in goals],
            "confidence": [g / 10 for g in goals],
            "accuracy": 0.5,
            "abstained": 0,
            "seconds": 1.0,
            "history": [],
        }

    arm = _control_arm([row([0, 3, 6]), row([1, 4]), row([2, 5])], 7)
    assert arm.confidence == tuple(g / 10 for g in range(7))
    assert arm.succeeded == tuple(g % 2 == 1 for g in range(7))


def test_a_folder_in_which_another_process_runs_is_refused(trial: Trial, finished: Path) -> None:
    from friends.data.files import owned

    with owned(finished), pytest.raises(BlockingIOError, match="another process is working in"):
        run_trial(trial, finished)


def test_a_kill_during_the_very_first_write_leaves_a_usable_folder(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / ".trial.json.4711.tmp").write_text("half")

    class Stop(Exception):  # noqa: N818
        pass

    def stop(what: str, *_: object) -> None:
        if what != "data":
            raise Stop

    with pytest.raises(Stop):
        run_trial(trial, tmp_path, progress=stop)
    assert (tmp_path / "trial.json").exists()
    assert not (tmp_path / ".trial.json.4711.tmp").exists()


def test_budgets_and_stores_that_cannot_be_are_refused_before_training(tmp_path: Path) -> None:
    store = {"name": "friends", "store": "noise/"}
    bad = {
        "budget is 72 poisons, but class '3' has only 60": {"attack": {**TABLE["attack"], "budget": 0.6}},
        "a trial makes its poisoned images itself": {"arms": [{"name": "a", "defenses": [store]}]},
    }
    for i, (message, change) in enumerate(bad.items()):
        with pytest.raises(ValueError, match=message):
            run_trial(parse_trial({**TABLE, **change}), tmp_path / str(i))
        assert not (tmp_path / str(i) / "work").exists()


def test_images_that_have_no_picture_still_have_a_report(tmp_path: Path) -> None:
    import numpy as np

    g = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = (g.integers(0, 100, (80, 12, 12, 4)) + 100 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "four.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    table = {**TABLE, "data": {"source": str(tmp_path / "four.npz")}, "goals": {"count": 1}, "arms": TABLE["arms"][:1]}
    result = run_trial(parse_trial(table), tmp_path / "run")
    assert result.data["shape"] == [4, 12, 12]
    assert not (tmp_path / "run" / "exhibit.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_an_attack_outside_its_scenario_runs_with_a_warning(tmp_path: Path) -> None:
    attack = {"name": "bullseye-polytope", "xi": "64/255", "budget": 0.1, "steps": 3, "restarts": 1, "augment": False}
    table = {**TABLE, "scenario": "scratch", "attack": attack, "goals": {"count": 1}, "own_surrogates": False}
    with pytest.warns(UserWarning, match="meant for transfer and finetune, not scratch"):
        run_trial(parse_trial(table), tmp_path / "run")


def test_several_victims_of_a_goal_are_one_goal(tmp_path: Path) -> None:
    """Each draws its own weights; the goal's rate is their mean."""
    attack = {"name": "bullseye-polytope", "xi": "64/255", "budget": 0.1, "steps": 20, "restarts": 1, "augment": False}
    table = {**TABLE, "attack": attack, "goals": {"count": 2}, "victims": 3}
    undefended = run_trial(parse_trial(table), tmp_path / "run").arm("undefended")
    assert undefended is not None
    assert (undefended.n, len(undefended.rates), len(undefended.accuracies)) == (6, 2, 6)
    assert sum(undefended.rates) * 3 == pytest.approx(undefended.successes)
    assert len({p for row in undefended.history for line in row for p in line.values()}) > 2
