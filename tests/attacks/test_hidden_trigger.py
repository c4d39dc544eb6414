from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hidden_trigger_slow import greedy_matching, hidden_trigger
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from friends.attacks import halfway
from friends.attacks.base import Sizes
from friends.attacks.hidden_trigger import (
    AUTHORS,
    BENCHMARK,
    HiddenTrigger,
    nearest_pairs,
    pulled,
    triggered_images,
)
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import Patch, checkerboard
from friends.models import Classifier, build
from friends.types import Streams
from interrupting import Stop, stop_at

XI = 64 / 255
QUICK = HiddenTrigger(xi=XI, budget=0.03, steps=4, rate=0.01, every=3, enough=0)
Digits = tuple[LabeledImages, LabeledImages]


@pytest.fixture
def backdoor(digits: Digits) -> Goal:
    """Twenty test images of a 3 with a patch somewhere, to be taken for a 5."""
    test, trigger = digits[1], Patch(checkerboard(6, 1))
    rows = (test.y == 0).nonzero().flatten()[:20]
    x = trigger(test.pixels(rows), torch.Generator().manual_seed(1))
    return Goal(x, test.y[rows], 1 - test.y[rows], trigger, "threes with a patch")


@pytest.fixture
def model(tiny_net: Classifier) -> nn.Module:
    return copy.deepcopy(tiny_net).double()


def made(
    train: LabeledImages, goal: Goal, model: nn.Module, attack: HiddenTrigger = QUICK, **changes: Any
) -> PoisonedDataset:
    return attack(train, goal, surrogate=lambda data, **_: model, streams=Streams(5), **changes)


# --- the matching ---


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_the_matching_is_the_greedy_one_without_replacement_also_with_ties(n: int, seed: int, ties: bool) -> None:
    distances = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    if ties:
        distances = (distances * 3).floor()
    rows = nearest_pairs(distances).tolist()
    assert rows == greedy_matching(distances.tolist())
    assert sorted(rows) == list(range(n))


def test_the_nearest_pair_goes_first_even_if_the_sum_becomes_larger() -> None:
    distances = torch.tensor([[1.0, 2.0], [2.0, 100.0]])
    assert nearest_pairs(distances).tolist() == [0, 1]  # 101 in sum, where the other matching has 4
    assert nearest_pairs(torch.tensor([[5.0, 1.0, 2.0], [1.5, 0.5, 9.0], [3.0, 4.0, 7.0]])).tolist() == [2, 1, 0]


def test_the_matching_is_found_anew_at_every_step() -> None:
    """Two poisons that pass each other: a matching that is kept would pull them back."""
    wide = nn.Flatten()
    targets = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    poisons = torch.tensor([0.6, 0.4], dtype=torch.float64).view(2, 1, 1, 1)
    distances, gradient = pulled(wide, poisons, targets)
    assert distances.tolist() == pytest.approx([0.16, 0.16])
    assert gradient.flatten().tolist() == pytest.approx([-0.8, 0.8])  # to 1 and to 0, not across
    crossed, _ = pulled(wide, poisons.flip(0), targets)
    assert crossed.tolist() == pytest.approx([0.16, 0.16])


def test_features_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="a distance between features is not finite"):
        pulled(nn.Flatten(), torch.full((2, 1, 1, 1), torch.nan), torch.zeros(2, 1))


# --- the attack against the slow one ---


@pytest.mark.parametrize(("enough_of", "early"), [("each", False), ("each", True), ("all", True)])
def test_the_attack_is_the_slow_one(
    enough_of: str, early: bool, model: nn.Module, digits: Digits, backdoor: Goal
) -> None:
    train, features = digits[0], model.features
    size: Callable[[list[float]], float] = max if enough_of == "each" else sum
    rows = made(train, backdoor, model).poison_idx
    triggered = triggered_images(train, backdoor, 12, Streams(5)("sources")).double()

    def slow(part: slice, stop: Callable[[list[float]], bool]) -> tuple[Tensor, int]:
        return hidden_trigger(
            features, train.pixels(rows[part]).double(), triggered[part],  # type: ignore[arg-type]
            xi=XI, steps=20, rate=0.01, factor=0.5, every=8, stop=stop)  # fmt: skip

    sizes: list[float] = []
    slow(slice(0, 8), lambda losses: bool(sizes.append(size(losses))))  # type: ignore[func-returns-value]
    enough = 1.0001 * min(sizes[:12]) if early else 0.0
    poisons, counts = zip(*(slow(p, lambda x: size(x) < enough) for p in (slice(0, 8), slice(8, 12))), strict=True)
    assert (min(counts) < 20) is early
    attack = replace(QUICK, steps=20, every=8, enough=enough, enough_of=enough_of, batch=8)
    ours = made(train, backdoor, model, attack)
    assert torch.equal(ours.train.x[rows], (torch.cat(poisons) * 255).round().to(torch.uint8))


def test_poisons_come_to_have_the_features_of_triggered_images(
    tiny_net: Classifier, digits: Digits, backdoor: Goal
) -> None:
    train = digits[0]
    ours = made(train, backdoor, tiny_net, replace(QUICK, steps=100, every=50, rate=0.02))
    ours.check(train, xi=XI, budget=12)
    assert ours.recipe["score"] < ours.recipe["score_first"][0] / 3  # type: ignore[index, operator]
    triggered = tiny_net.features(triggered_images(train, backdoor, 12, Streams(5)("sources")))
    clean, poisons = (tiny_net.features(data.pixels(ours.poison_idx)) for data in (train, ours.train))
    assert torch.cdist(poisons, triggered).amin(1).mean() < 0.6 * torch.cdist(clean, triggered).amin(1).mean()
    assert torch.cdist(poisons, triggered).amin(0).mean() < 0.6 * torch.cdist(clean, triggered).amin(0).mean()


def test_every_triggered_image_is_another_training_image_with_the_trigger_at_its_own_place(
    digits: Digits, backdoor: Goal
) -> None:
    train = digits[0]
    shown = triggered_images(train, backdoor, 40, Streams(5)("sources"))
    bare = train.pixels((train.y == 0).nonzero().flatten())
    differing = (shown[:, None] != bare[None]).flatten(2).sum(2)
    assert len(set(differing.argmin(1).tolist())) == 40
    assert int(differing.amin(1).max()) <= 36  # a patch of 6x6
    covered = (shown != bare[differing.argmin(1)]).any(1)
    assert len({(int(m.any(1).nonzero()[0]), int(m.any(0).nonzero()[0])) for m in covered}) > 20


def test_few_source_images_are_used_again_at_other_places(digits: Digits, backdoor: Goal) -> None:
    few = digits[0].rows(
        torch.cat([(digits[0].y == 0).nonzero().flatten()[:3], (digits[0].y == 1).nonzero().flatten()])
    )
    shown = triggered_images(few, backdoor, 8, torch.Generator().manual_seed(0))
    assert len(shown) == 8
    assert len(shown.flatten(1).unique(dim=0)) == 8


def test_of_several_candidates_the_nearest_become_poisons(model: nn.Module, digits: Digits, backdoor: Goal) -> None:
    train = digits[0]
    one, many = made(train, backdoor, model), made(train, backdoor, model, replace(QUICK, candidates=5))
    assert len(many.poison_idx) == len(one.poison_idx) == 12
    assert many.recipe["score"] < one.recipe["score"]  # type: ignore[operator]
    many.check(train, xi=XI, budget=12)
    whole = replace(QUICK, candidates=1000)
    assert len(made(train, backdoor, model, whole).poison_idx) == 12  # not more than the class has are crafted
    bases = (train.y == 1).nonzero().flatten()[3:15]
    prescribed = made(train, replace(backdoor, bases=bases), model, replace(QUICK, candidates=5))
    assert torch.equal(prescribed.poison_idx, bases)


def test_the_two_forms_are_those_of_authors_and_benchmark() -> None:
    assert replace(HiddenTrigger(), enough=10) == AUTHORS
    assert [AUTHORS.rate_at(step) for step in (0, 999, 1000, 4999)] == [0.01, 0.01, 0.005, 0.000625]
    assert [BENCHMARK.rate_at(step) for step in (0, 1999, 2000)] == [0.001, 0.001, pytest.approx(0.00095)]
    distances = torch.tensor([9.0, 9.5])
    assert AUTHORS.finished(distances)
    assert not BENCHMARK.finished(distances)
    assert BENCHMARK.finished(distances / 2)
    assert not replace(AUTHORS, enough=0).finished(torch.zeros(2))


# --- killed and gone on with, cost, edges, bad input ---


@pytest.mark.parametrize("at", [1, 4, 5, 8])
def test_a_kill_anywhere_ends_with_the_same_poisons(
    at: int, model: nn.Module, digits: Digits, backdoor: Goal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    attack = replace(QUICK, batch=7, candidates=1)
    whole = made(digits[0], backdoor, model, attack)
    told: list[int] = []
    with pytest.raises(Stop):
        made(digits[0], backdoor, model, attack, checkpoint=tmp_path, progress=stop_at(at, "hidden trigger"))
    again = made(digits[0], backdoor, model, attack, checkpoint=tmp_path,
                 progress=lambda what, done, total, note="": told.append(done))  # fmt: skip
    assert torch.equal(again.train.x, whole.train.x)
    assert again.recipe == whole.recipe
    assert told == list(range(at, 9))  # two batches of four steps; the step that was stopped at was not kept
    with pytest.raises(ValueError, match="holds another crafting"):
        made(digits[0], backdoor, model, replace(attack, rate=0.02), checkpoint=tmp_path)


def test_the_cost_is_what_enters_the_surrogate(model: nn.Module, digits: Digits, backdoor: Goal) -> None:
    counts: list[int] = []
    model.normalize.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))  # type: ignore[operator, union-attr]
    train = digits[0]
    source, wanted = (int((train.y == c).sum()) for c in (0, 1))
    sizes = Sizes(train=len(train), wanted=wanted, source=source, goal=len(backdoor), poisons=12)
    for attack in (QUICK, replace(QUICK, candidates=2, batch=5), replace(QUICK, candidates=100)):
        counts.clear()
        made(train, backdoor, model, attack)
        assert sum(counts) == attack.cost(sizes).passes


@pytest.mark.parametrize("shape", [(1, 20, 28), (3, 24, 16)])
def test_one_poison_of_odd_images(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, *shape), generator=generator, dtype=torch.uint8)
    data = LabeledImages(x, torch.arange(40) % 2, ("a", "b"))
    trigger = Patch(checkerboard(4, shape[0]))
    goal = Goal(trigger(data.pixels(slice(0, 1)), generator), torch.tensor([0]), torch.tensor([1]), trigger)
    net = build("tiny", shape=shape, classes=2, moments=data.moments, width=4, generator=generator)
    made(data, goal, net, replace(QUICK, budget=1e-6)).check(data, xi=XI, budget=1)
    made(data, goal, net, replace(QUICK, budget=0.1, batch=1)).check(data, xi=XI, budget=4)


def test_what_cannot_work_is_refused_before_any_training(digits: Digits, backdoor: Goal) -> None:
    def costly(data: LabeledImages, **_: Any) -> nn.Module:
        raise AssertionError("a surrogate was trained")

    train = digits[0]
    fives = train.rows((train.y == 1).nonzero().flatten())
    for data, goal, attack, message in [
        (train, replace(backdoor, trigger=None), QUICK, "has no trigger, which a backdoor needs"),
        (fives, backdoor, QUICK, "class '3' has no image"),
        (train, backdoor, replace(QUICK, budget=0.9), "the budget can be at most"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(data, goal, surrogate=costly, streams=Streams(0))


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_when_they_are_written() -> None:
    for settings_, message in [
        ({"xi": 16}, "did you mean 16/255"),
        ({"budget": 0}, "budget is a fraction"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"rate": 0}, "rate > 0"),
        ({"factor": 1.5}, "factor in"),
        ({"enough": -1}, "enough >= 0"),
        ({"enough_of": "most"}, "unknown enough_of 'most'"),
    ]:
        with pytest.raises(ValueError, match=message):
            HiddenTrigger(**settings_)
