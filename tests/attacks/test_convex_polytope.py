from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attacks_slow import descend
from features_slow import polytope_score, stages
from torch import Tensor

from friends.attacks import halfway
from friends.attacks.convex_polytope import ConvexPolytope, Polytope
from friends.attacks.pixels import initial_delta
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import Classifier, build
from friends.types import Streams
from interrupting import Stop, stop_at

XI = 64 / 255
OURS = ConvexPolytope(xi=XI, budget=0.02, steps=4)  # 8 poisons
SIGNED = replace(OURS, signed=True, tau=0.1, augment=Augment())
Digits = tuple[LabeledImages, LabeledImages]


@pytest.fixture(scope="module")
def many(digits: Digits) -> Goal:
    """Three images of one goal."""
    test = digits[1]
    rows = (test.y == 0).nonzero().flatten()[:3]
    return Goal(test.pixels(rows), test.y[rows], 1 - test.y[rows])


def score(model: Classifier, data: LabeledImages, rows: Tensor, goal: Goal) -> float:
    return float(Polytope(model, [goal], "penultimate", 1e-9)([data.pixels(rows)])[0].detach())


@pytest.mark.parametrize("layers", ["penultimate", "last-two", "all"])
def test_the_distance_is_the_slow_one(
    layers: str, tiny_net: Classifier, bn_net: Classifier, digits: Digits, goal: Goal, many: Goal
) -> None:
    """To one goal image and to several, each with coefficients of its own; for two goals at once."""
    for net in (tiny_net, bn_net):
        model = copy.deepcopy(net).double()
        x = [digits[0].pixels(part).double() for part in (slice(0, 7), slice(7, 14))]
        keep = {"penultimate": -1, "last-two": -2, "all": 0}[layers]
        ours = Polytope(model, [goal, many], layers, 1e-10)(x)  # type: ignore[arg-type]
        slow = [polytope_score(stages(model, poisons)[keep:], stages(model, one.x.double())[keep:])
                for poisons, one in zip(x, (goal, many), strict=True)]  # fmt: skip
        assert torch.allclose(ours, torch.stack(slow), rtol=1e-6)


def test_the_distance_to_a_goal_among_the_poisons_is_nothing(tiny_net: Classifier, many: Goal, digits: Digits) -> None:
    x = torch.cat([digits[0].pixels(slice(0, 4)), many.x])
    assert float(Polytope(tiny_net, [many], "penultimate", 1e-9)([x])[0].detach()) < 1e-6


@pytest.mark.parametrize("attack", [OURS, SIGNED], ids=["adam", "signed"])
def test_the_attack_is_the_slow_one(
    attack: ConvexPolytope, tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    model, train, streams = copy.deepcopy(tiny_net).double(), digits[0], Streams(5)
    made = replace(attack, tol=1e-10)(train, goal, surrogate=given_models(model), streams=streams)
    base = train.pixels(made.poison_idx).double()
    mean, std = (torch.tensor(m, dtype=torch.float64).view(1, -1, 1, 1) for m in train.moments)

    def slow(pixels: Tensor, step: int) -> Tensor:
        if attack.augment is not None:
            pixels = attack.augment(pixels, streams("augment", 0, step), train.moments[0])
        return polytope_score([model.features(pixels)], [model.features(goal.x.double())])

    start = initial_delta(base, XI, "randn" if attack.signed else "clean", streams("init", 0))
    delta = descend(slow, base, start, mean=mean, std=std, xi=XI, tau=attack.tau, steps=4, signed=attack.signed)
    bytes_ = ((base + delta) * 255).round().to(torch.uint8)
    assert float((made.train.x[made.poison_idx] != bytes_).float().mean()) < 2e-3  # two solvers' coefficients


@pytest.mark.parametrize("attack", [OURS, replace(SIGNED, augment=None)], ids=["adam", "signed"])
@pytest.mark.parametrize("layers", ["penultimate", "all"])
def test_the_polytope_of_the_bytes_comes_to_the_goal(
    attack: ConvexPolytope, layers: str, bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train = digits[0]
    attack = replace(attack, steps=60, tol=1e-4, layers=layers)  # type: ignore[arg-type]
    made = attack(train, goal, surrogate=given_models(bn_net), streams=Streams(0))
    made.check(train, xi=XI, budget=8)
    before, after = (score(bn_net, data, made.poison_idx, goal) for data in (train, made.train))
    assert after < before / (8 if layers == "penultimate" else 2)


def test_several_extractors_have_coefficients_of_their_own(
    tiny_net: Classifier, bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    both = replace(OURS, surrogates=2, steps=60, tol=1e-4)
    made = both(digits[0], goal, surrogate=given_models(tiny_net, bn_net), streams=Streams(0))
    for model in (tiny_net, bn_net):
        before, after = (score(model, data, made.poison_idx, goal) for data in (digits[0], made.train))
        assert after < 0.6 * before
    polytopes = [Polytope(model, [goal], "penultimate", 1e-4) for model in (tiny_net, bn_net)]
    for polytope in polytopes:
        polytope([digits[0].pixels(made.poison_idx)])
    first, second = (polytope.coefficients for polytope in polytopes)
    assert not torch.allclose(first["0-0"], second["0-0"], atol=0.05)


def test_coefficients_are_remembered_from_step_to_step_and_forgotten_at_a_restart(
    tiny_net: Classifier, digits: Digits, goal: Goal
) -> None:
    x, polytope = [digits[0].pixels(slice(0, 8))], Polytope(tiny_net, [goal], "penultimate", 0.5)
    scores: list[float] = []
    for _ in range(4):  # so coarse a tolerance that every look goes on where the last one ended
        polytope.begin(anew=False)
        scores.append(float(polytope(x)[0].detach()))
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < scores[0]
    polytope.begin(anew=True)
    assert float(polytope(x)[0].detach()) == scores[0]


def test_batches_and_draws_have_coefficients_of_their_own(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    attack = replace(OURS, batch=3, steps=40, tol=1e-4)
    made = attack(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(0))
    for part in made.poison_idx.split(3):
        assert score(tiny_net, made.train, part, goal) < 0.9 * score(tiny_net, digits[0], part, goal)


@pytest.mark.parametrize("attack", [OURS, replace(SIGNED, restarts=2)], ids=["adam", "signed"])
def test_a_kill_does_not_lose_the_coefficients(
    attack: ConvexPolytope, tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a coarse tolerance the poisons depend on where each search began."""
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    train, surrogate = digits[0], given_models(tiny_net)
    attack = replace(attack, tol=0.3, batch=5)
    whole = attack(train, goal, surrogate=surrogate, streams=Streams(0))
    for step in (2, 3):
        with pytest.raises(Stop):
            attack(train, goal, surrogate=surrogate, streams=Streams(0), checkpoint=tmp_path,
                   progress=stop_at(step, "convex polytope"))  # fmt: skip
    again = attack(train, goal, surrogate=surrogate, streams=Streams(0), checkpoint=tmp_path)
    assert again.train.fingerprint == whole.train.fingerprint
    assert again.recipe == whole.recipe
    with pytest.raises(ValueError, match="holds another crafting"):
        attack(train, goal, surrogate=surrogate, streams=Streams(1), checkpoint=tmp_path)


@pytest.mark.parametrize("shape", [(3, 24, 16), (1, 16, 20)])
def test_other_images_a_single_poison_and_several_goal_images_do_as_well(
    shape: tuple[int, int, int], given_models: type
) -> None:
    generator = torch.Generator().manual_seed(0)
    data = LabeledImages(torch.randint(256, (60, *shape), generator=generator, dtype=torch.uint8),
                         torch.arange(60) % 3, ("a", "b", "c"))  # fmt: skip
    model = build("tiny", shape=shape, classes=3, moments=data.moments, width=4, generator=generator)
    goal = Goal(data.pixels(torch.tensor([0, 3])), data.y[[0, 3]], torch.tensor([2, 2]))
    for budget, count in ((1e-6, 1), (0.1, 6)):
        attack = replace(OURS, xi=8 / 255, budget=budget)
        made = attack(data, goal, surrogate=given_models(model), streams=Streams(0))
        made.check(data, xi=8 / 255, budget=count)
        assert len(made.poison_idx) == count


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_when_they_are_written(tiny_net: Classifier, goal: Goal) -> None:
    with pytest.raises(ValueError, match="its 8 restarts would be alike: pass restarts=1 or signed=True"):
        ConvexPolytope(restarts=8)
    assert ConvexPolytope(restarts=8, signed=True).restarts == 8
    for tol in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"tol is a relative change in \(0, 1\), not "):
            ConvexPolytope(tol=tol)
    dead = copy.deepcopy(tiny_net)
    for parameter in dead.body.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="the goal's feature is 0 everywhere"):
        Polytope(dead, [goal], "penultimate", 1e-6)
