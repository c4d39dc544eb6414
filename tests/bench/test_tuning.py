"""The search of settings: halving on planted scores, then a real one on digits, killed, resumed and cut short."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from friends.bench import tuning, tuning_ground, tuning_plan, tuning_report
from friends.bench.trial import ModelSpec, parse_trial, read_table
from friends.bench.tuning import tune
from friends.bench.tuning_attack import Mock, hold_out
from friends.bench.tuning_grid import Candidate, Row, Rung, draw, noise_epoch, plan_rungs
from friends.bench.tuning_ground import Ground, strata
from friends.bench.tuning_plan import plan
from friends.bench.tuning_report import interval, plain, python_line, toml_arm, verdict
from friends.bench.tuning_search import OutOfTimeError, Score, areas, best, halve, pareto
from friends.bench.tuning_settings import Tuned, Tuning
from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.defenses import Friends
from friends.noise.friendly import FriendlySettings
from friends.training.fit import fit
from friends.training.recipe import Recipe
from friends.types import Streams
from interrupting import Stop

STAMP = Mock(kind="stamp", xi=128, share=0.6)
FAINT = Mock(kind="stamp", xi=1, share=0.05)
GRID: dict[str, Any] = {
    "zeta": (8, 16, 32),
    "mu": (8, 16, 32),
    "kinds": ("bernoulli", "uniform", "gaussian"),
    "lr": (10.0, 20.0, 50.0, 100.0),
    "penalty": (1.0, 10.0),
}


def score(accuracy: float, success: float, repeats: int = 1) -> Score:
    return Score(accuracy=(accuracy,) * repeats, success=(success,) * repeats, images=100, shown=(50,) * repeats)


class Planted:
    """Scores with an optimum off the grid at zeta 22, mu 27, that cheap rungs see through noise."""

    def __init__(self, *, works: bool = True, stop_after: float = math.inf) -> None:
        self.works, self.stop_after = works, stop_after
        self.asked: list[tuple[Row, Rung]] = []

    def __call__(self, row: Row, rung: Rung) -> Score:
        if len(self.asked) >= self.stop_after:
            raise OutOfTimeError("over")
        self.asked.append((row, rung))
        if row == "clean":
            return score(0.95, 0.02)
        if isinstance(row, str):
            return score(0.95, 0.9 if self.works else 0.05)
        noise = torch.rand(2, generator=Streams(0)(repr((row, rung)))) * 0.5 / rung.epochs
        off = abs(math.log2(row.zeta / 22)) + abs(math.log2(row.mu / 27)) + abs(math.log10(row.penalty)) / 2
        loss = 0.004 * max(0.0, row.zeta - 22) + 0.003 * max(0.0, row.mu - 27)
        return score(0.945 - loss + float(noise[0]), min(0.9, 0.05 + 0.3 * off) + float(noise[1]))


def rungs() -> list[Rung]:
    return plan_rungs(candidates=27, images=90, epochs=32, seeds=3, rungs=3)


def test_halving_finds_what_was_planted_between_the_points_of_the_grid() -> None:
    first = draw(27, 0, **GRID)
    rounds = halve(first, rungs(), Planted(), drop=0.02)
    found = best(rounds[-1], 0.02)
    assert [len(r.scores) for r in rounds] == [27, 9, 3]
    assert found is not None
    assert found not in first  # only refinement gets there
    assert 16 <= found.zeta <= 32
    assert 22 <= found.mu <= 32
    assert found.penalty == 1
    on_grid = halve(first, rungs(), Planted(), drop=0.02, refine=False)[-1]
    assert set(on_grid.scores) <= set(first)
    assert rounds[-1].scores[found].mean_success < min(s.mean_success for s in on_grid.scores.values())


def test_an_attack_that_fails_undefended_leaves_accuracy_as_the_only_aim() -> None:
    last = halve(draw(27, 0, **GRID), rungs(), Planted(works=False), drop=0.02, refine=False)[-1]
    assert not last.works
    assert best(last, 0.0) == max(last.scores, key=lambda c: last.scores[c].mean_accuracy)
    assert next(iter(last.scores)) == best(last, 0.0)


def test_halving_stops_when_time_is_over_and_names_what_is_unfinished() -> None:
    first = draw(9, 0, **GRID)
    rounds = halve(first, plan_rungs(candidates=9, images=9, epochs=8, seeds=1, rungs=2), Planted(stop_after=7), drop=0)
    assert len(rounds) == 1
    assert rounds[0].unfinished == tuple(first[5:])
    assert set(rounds[0].scores) == set(first[:5])
    nothing = halve(first, rungs(), Planted(stop_after=1), drop=0.02)
    assert nothing[0].clean is None and not nothing[0].works and len(nothing[0].unfinished) == 9


def test_the_front_is_what_nothing_beats_and_areas_tell_its_members_apart() -> None:
    a, b, c, d = (Candidate(mu=mu) for mu in (1, 2, 3, 4))
    points = {a: (0.9, 0.5), b: (0.8, 0.2), c: (0.8, 0.3), d: (0.7, 0.2)}
    assert set(pareto(points)) == {a, b}
    assert set(pareto({a: (0.9, 0.5), b: (0.9, 0.5)})) == {a, b}  # equals do not beat each other
    gain = areas({a: (0.9, 0.5), b: (0.8, 0.2)}, 0.6)
    assert gain[a] == pytest.approx(0.1 * 0.5)
    assert gain[b] == pytest.approx(0.2 * 0.3)
    assert areas({d: (0.5, 0.0)}, 0.6)[d] == 0  # too inaccurate to be worth a place


def test_the_choice_keeps_the_accuracy_first_and_then_has_the_least_success() -> None:
    a, b, c = (Candidate(mu=mu) for mu in (1, 2, 3))
    table = {a: score(0.94, 0.6), b: score(0.935, 0.3), c: score(0.8, 0.0)}

    def judge(row: Row, rung: Rung) -> Score:
        return table[row] if isinstance(row, Candidate) else score(0.95, 0.9 if row == "undefended" else 0.0)

    last = halve([a, b, c], [Rung(candidates=3, images=1, epochs=1, repeats=1)], judge, drop=0.02)[0]
    assert best(last, 0.02) == b
    assert best(last, 0.2) == c
    assert best(last, 0.001) is None


def test_candidates_that_train_the_same_model_are_the_same() -> None:
    assert Candidate(zeta=0, lr=10, penalty=10) == Candidate(zeta=0)
    assert Candidate(mu=0, random="gaussian") == Candidate(mu=0)
    grid: dict[str, Any] = GRID | {"zeta": (0, 16), "mu": (0, 16)}
    drawn = draw(1000, 0, **grid)
    assert len(drawn) == len(set(drawn)) == 3 + 8 + 24  # mu alone, zeta alone, both; never neither
    assert drawn[0] == Candidate()
    pairs = [(c.zeta, c.mu) for c in draw(18, 3, **GRID)]
    assert max(pairs.count(pair) for pair in pairs) <= 3
    assert len(set(pairs)) == 9
    assert draw(18, 3, **GRID) == draw(18, 3, **GRID) != draw(18, 4, **GRID)
    with pytest.raises(ValueError, match="0 to 127 grey levels"):
        Candidate(zeta=128)
    grid |= {"zeta": (0,), "mu": (0,)}
    with pytest.raises(ValueError, match="no candidate"):
        draw(3, 0, **grid)


def test_rungs_grow_to_the_whole() -> None:
    made = plan_rungs(candidates=24, images=45_000, epochs=40, seeds=3, rungs=3)
    assert [(r.candidates, r.images, r.epochs, r.repeats) for r in made] == [
        (24, 5000, 10, 1),
        (8, 15000, 20, 2),
        (3, 45000, 40, 3),
    ]
    assert all(0 < noise_epoch(r.epochs) < r.epochs for r in made)
    assert noise_epoch(80) == noise_epoch(40) == 5
    with pytest.raises(ValueError, match="seeds is a number >= 1, not 0"):
        plan_rungs(candidates=1, images=1, epochs=1, seeds=0, rungs=1)


def test_a_part_has_the_shares_of_the_whole() -> None:
    kind = torch.tensor([0] * 600 + [1] * 300 + [2] * 9)
    rows = strata(kind, 303, torch.Generator().manual_seed(0))
    assert torch.bincount(kind[rows]).tolist() == [200, 100, 3]
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, rows.sort().values)


def test_held_out_images_are_of_every_class_and_not_trained_on(few_digits: LabeledImages) -> None:
    train, held = hold_out(few_digits, 0.2, 0)
    assert torch.bincount(held.y).tolist() == [20, 20, 20]
    assert len(train) == 240
    seen = {bytes(image.numpy()) for image in train.x}
    assert sum(bytes(image.numpy()) in seen for image in held.x) == 0
    assert hold_out(few_digits, 0.2, 1)[1].fingerprint != held.fingerprint
    one = few_digits.only_classes(["3"])
    with pytest.raises(ValueError, match="one class, 3: an attack needs two"):
        hold_out(one, 0.2, 0)
    with pytest.raises(ValueError, match="has 10 training images: tuning needs 20"):
        hold_out(few_digits.sample(30, torch.Generator()), 0.2, 0)


def test_intervals_of_equal_rates_are_not_points() -> None:
    low, high = interval([0.0, 0.0, 0.0], [20, 20, 20])
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 60))
    wide = interval([0.0, 1.0], [1000, 1000])
    assert wide == (0.0, 1.0)


@pytest.mark.parametrize(
    "candidate",
    [Candidate(zeta=11, mu=23, random="uniform", lr=35.4, penalty=3.16), Candidate(zeta=0), Candidate(mu=0)],
)
def test_what_is_printed_is_the_defense(candidate: Candidate, tmp_path: Path) -> None:
    wanted = candidate.defense(noise_epoch(40))
    text = f'[data]\nsource = "digits"\n[attack]\nname = "gradient-matching"\n{toml_arm(candidate, 40)}'
    file = tmp_path / "trial.toml"
    file.write_text(text)
    (arm,) = parse_trial(read_table(file)).arms
    defense = arm.defenses[0]
    assert isinstance(defense, Friends)
    if candidate.zeta == 0:
        wanted = replace(wanted, def_epoch=defense.def_epoch, settings=defense.settings)
    assert replace(defense, random=wanted.random if candidate.mu == 0 else defense.random) == wanted
    line = python_line(candidate, 40)
    assert line.startswith("Friends(") and line.endswith(")")
    names = {"Friends": Friends, "FriendlySettings": FriendlySettings}
    compiled = compile(line, "line", "eval")
    assert set(compiled.co_names) <= set(names)


# The real thing, on digits


@pytest.fixture(scope="module")
def settings(few_digits: LabeledImages, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    """Two candidates, two rungs, one seed, a few hundred digits: seconds."""
    file = tmp_path_factory.mktemp("data") / "few.npz"
    test = few_digits.rows(list(range(0, 300, 10)))
    x_train, y_train, x_test, y_test = (part.numpy() for part in (few_digits.x, few_digits.y, test.x, test.y))
    np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return Tuning(
        source=str(file),
        model=ModelSpec(name="tiny", width=8),
        recipe=Recipe(epochs=8, lr=0.05, batch=32, augment=None),
        zeta=(0,),
        mu=(8, 64),
        kinds=("bernoulli",),
        candidates=2,
        rungs=2,
        seeds=1,
        accuracy_drop=0.2,
        confirm=False,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the quickest attack, which works on digits."""
    monkeypatch.setattr(tuning, "LADDER", (STAMP,))


@pytest.fixture(scope="module")
def whole(settings: Tuning, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Path]:
    """An undisturbed tuning, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "LADDER", (STAMP,))
        return tune(settings, out), out


def timeless(found: Tuned) -> dict[str, Any]:
    """Everything but how long it took."""
    return json.loads(json.dumps(plain(found)), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


def test_a_tuning_on_digits_attacks_in_earnest(whole: tuple[Tuned, Path]) -> None:
    found, out = whole
    assert found.tried[0].works
    assert found.judged is not None
    assert found.judged is found.rounds[-1]
    assert found.judged.works
    assert found.chosen in found.judged.scores
    assert not found.out_of_time
    assert json.loads((out / "tuning.json").read_text())["verdict"] == verdict(found)
    assert (out / "tuning.md").read_text().count("undefended") >= 2


def test_a_killed_tuning_goes_on_where_it_was(
    settings: Tuning, whole: tuple[Tuned, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings, real = 0, Ground.result

    def killed(self: Ground, *args: Any) -> dict[str, Any]:
        nonlocal trainings
        trainings += 1
        if trainings in (1, 4, 7):  # a while into three attempts
            raise Stop
        return real(self, *args)

    monkeypatch.setattr(Ground, "result", killed)
    attempts = 0
    found: Tuned | None = None
    while found is None:
        attempts += 1
        try:
            found = tune(settings, tmp_path / "killed")
        except Stop:
            assert not (tmp_path / "killed" / "tuning.json").exists()
    assert attempts == 4
    assert timeless(found) == timeless(whole[0])


def test_a_training_that_is_cut_short_in_the_middle_ends_as_if_it_had_not_been(
    settings: Tuning, whole: tuple[Tuned, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time runs out after an epoch of some training: a clean end, and the same command finishes the rest."""
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        now[0] += 60.0 if what == "training" else 0.0

    first = tune(settings, tmp_path / "run", minutes=199.5, progress=progress)
    assert first.out_of_time
    assert first.rounds and first.rounds[-1].unfinished
    assert first.judged is not None and first.chosen is not None
    said = verdict(first)[0]
    assert said.startswith("Time ran out") and "1 candidate unfinished" in said
    assert "unfinished" in (tmp_path / "run" / "tuning.md").read_text()
    second = tune(settings, tmp_path / "run")
    assert not second.out_of_time
    assert timeless(second) == timeless(whole[0])


def test_no_minutes_no_claim(settings: Tuning, tmp_path: Path) -> None:
    found = tune(settings, tmp_path / "run", minutes=1e-9)
    assert found.judged is None and found.chosen is None and found.out_of_time
    assert "before any settings were judged" in verdict(found)[0]
    assert json.loads((tmp_path / "run" / "tuning.json").read_text())["chosen"] is None


def test_an_attack_that_fails_is_said_to_and_nothing_is_claimed(
    settings: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "LADDER", (FAINT,))
    monkeypatch.setattr(tuning_plan, "AGAIN", 1)
    found = tune(replace(settings, rungs=1, confirm=True, recipe=replace(settings.recipe, epochs=4)), tmp_path / "run")
    judged = found.judged
    assert judged is not None
    assert not found.tried[0].works
    assert not judged.works
    assert found.chosen == max(judged.scores, key=lambda c: judged.scores[c].mean_accuracy)
    text = " ".join(verdict(found))
    assert "does not succeed on these data without a defense" in text
    assert "no claim of protection" in text
    assert "Recommended" not in text


@pytest.fixture
def ground(few_digits: LabeledImages, tmp_path: Path) -> Ground:
    train, held = hold_out(few_digits, 0.2, 0)
    recipe = Recipe(epochs=2, lr=0.05, batch=32, augment=None)
    model = ModelSpec(name="tiny", width=4)
    made = Ground(train, held, model=model, recipe=recipe, repeats=2, seed=0, artifacts=Artifacts(tmp_path / "cache"))
    made.mock = STAMP
    return made


def test_a_cheap_rung_trains_on_a_part_with_its_share_of_poisons(ground: Ground) -> None:
    rung = Rung(candidates=1, images=120, epochs=2, repeats=2)
    poisoned = ground.poisoned(0)
    part, clean = (ground.part(poisoned, rung, 0, clean=clean) for clean in (False, True))
    assert torch.bincount(part.y).tolist() == [40, 40, 40]
    assert torch.equal(part.y, clean.y)
    assert int((part.x != clean.x).flatten(1).any(1).sum()) == len(poisoned.poison_idx) // 2 == 24
    assert not torch.equal(part.x, ground.part(ground.poisoned(1), rung, 1, clean=False).x)
    assert ground.result(Candidate(zeta=0), rung, 0)["right"] > 0


def test_settings_that_break_a_training_lose_and_an_undefended_one_that_breaks_is_an_error(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(*args: Any, defenses: tuple[Friends, ...] = (), **rest: Any) -> Any:
        if not defenses or defenses[0].mu > 0.2:
            raise FloatingPointError("the loss is nan")
        return fit(*args, defenses=defenses, **rest)

    monkeypatch.setattr(tuning_ground, "fit", breaking)
    rung = Rung(candidates=1, images=240, epochs=2, repeats=1)
    assert ground.result(Candidate(zeta=0, mu=64), rung, 0)["diverged"] == "the loss is nan"
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        ground.result("undefended", rung, 0)


def test_protection_is_claimed_only_beyond_chance(settings: Tuning) -> None:
    """Planted scores: the verdict follows the interval of the paired falls."""
    chosen, rung = Candidate(), Rung(candidates=1, images=100, epochs=8, repeats=5)

    def judge(success: tuple[float, ...]) -> Callable[[Row, Rung], Score]:
        rates = {"undefended": (0.9, 0.8, 0.95, 1.0, 0.85), "clean": (0.0,) * 5}

        def judged(row: Row, rung: Rung) -> Score:
            success_of = rates[row] if isinstance(row, str) else success
            return Score(accuracy=(0.9,) * 5, success=success_of, images=100, shown=(60,) * 5)

        return judged

    def said(success: tuple[float, ...]) -> str:
        rounds = halve([chosen], [rung], judge(success), drop=0.02)
        found = Tuned(
            settings=settings, data={}, tried=(), mock=STAMP, rounds=tuple(rounds), judged=rounds[0], chosen=chosen,
            confirmed=rounds[0], out_of_time=False,
        )  # fmt: skip
        return verdict(found)[-1]

    assert said((0.1, 0.0, 0.2, 0.1, 0.0)).startswith("Recommended")
    assert "chance could" in said((0.9, 0.1, 1.0, 0.9, 0.9))
    assert "not shown to protect" in said((0.9, 0.1, 1.0, 0.9, 0.9))


def test_a_plan_trains_almost_nothing_and_leaves_nothing(
    settings: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = plan(settings)
    assert planned.candidates == tuple(settings.first())
    assert [rung.images for rung in planned.rungs] == [240, 240]
    assert 0 < planned.seconds < 600
    assert planned.bytes > 240 * 28 * 28
    assert not any(tmp_path.iterdir())


def test_mistakes_are_said_before_any_training(
    settings: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ground, "result", None)  # nobody may get that far
    with pytest.raises(ValueError, match="unknown model 'tinny'; did you mean 'tiny'"):
        tune(replace(settings, model=ModelSpec(name="tinny")), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*missing\.npz"):
        tune(replace(settings, source=str(tmp_path / "missing.npz")), tmp_path / "b")
    with pytest.raises(ValueError, match="minutes is a number > 0, not 0"):
        tune(settings, tmp_path / "c", minutes=0)
    with pytest.raises(ValueError, match=r"accuracy_drop is a fraction in \[0, 1\), not 2; did you mean 0.02"):
        replace(settings, accuracy_drop=2)
    with pytest.raises(ValueError, match="at least 2 epochs"):
        replace(settings, recipe=Recipe(epochs=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else"):
        tune(settings, tmp_path / "full")
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tuning.shutil, "disk_usage", lambda _: real._replace(free=1000))  # pyright: ignore
    with pytest.raises(OSError, match=r"needs about .* GB .* but only 0.00 GB are free"):
        tune(settings, tmp_path / "d")
    assert tuning_report.NAME not in {path.name for path in tmp_path.iterdir()}
