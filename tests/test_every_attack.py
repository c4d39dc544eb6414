"""What every attack must keep, whatever it does: taken up by name, so a new row is tested unasked."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from friends.attacks import (
    ATTACKS,
    Attack,
    BadNets,
    BullseyePolytope,
    CleanLabelBackdoor,
    ConvexPolytope,
    GradientMatching,
    HiddenTrigger,
    MetaPoison,
    Narcissus,
    PoisonFrogs,
    SleeperAgent,
    halfway,
)
from friends.attacks.base import Sizes, bound_of
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import Additive, Patch, Trigger
from friends.models import build
from friends.noise.random import RandomNoise
from friends.types import Streams
from interrupting import Stop, stop_at_call

XI, BUDGET, COUNT = 24 / 255, 0.03, 9  # 9 = 3 % of 300

SMALL: dict[str, Attack] = {
    "gradient-matching": GradientMatching(xi=XI, budget=BUDGET, steps=3, restarts=2),
    "bullseye-polytope": BullseyePolytope(xi=XI, budget=BUDGET, steps=3, restarts=2),
    "poison-frogs": PoisonFrogs(xi=XI, budget=BUDGET, steps=3, restarts=2),
    "convex-polytope": ConvexPolytope(xi=XI, budget=BUDGET, steps=3, restarts=2, signed=True, tau=0.1, tol=1e-4),
    "sleeper-agent": SleeperAgent(xi=XI, budget=BUDGET, steps=3, restarts=2, retrainings=1),
    "hidden-trigger": HiddenTrigger(xi=XI, budget=BUDGET, steps=3, rate=100, enough=0),
    "badnets": BadNets(budget=BUDGET),
    "clean-label-backdoor": CleanLabelBackdoor(xi=XI, budget=BUDGET, norm="linf", eps=16 / 255, steps=3),
    "narcissus": Narcissus(xi=XI, budget=BUDGET, rounds=8, tau=0.02),
    "metapoison": MetaPoison(xi=XI, budget=BUDGET, steps=2, surrogates=2, batch=150, recolour=None),
}
"""Each attack with settings that take a moment, bound XI (if it has one) and budget BUDGET."""


@pytest.fixture(scope="module")
def few_digits(few_digits: LabeledImages) -> LabeledImages:
    """The digits at half their size: contracts do not depend on it, and attacks take a quarter of the time."""
    x = F.avg_pool2d(few_digits.x.float(), 2).round().to(torch.uint8)
    return LabeledImages(x, few_digits.y, few_digits.classes, few_digits.name)


def surrogate(
    data: LabeledImages,
    *,
    index: int = 0,
    epochs: int | None = None,
    start: nn.Module | None = None,
    noise: tuple[RandomNoise, float] | None = None,
) -> nn.Module:
    """An untrained network; it has gradients and features, which is all that contracts need."""
    generator = torch.Generator().manual_seed(index)
    classes = len(data.classes)
    return build("convnet", shape=data.shape, classes=classes, moments=data.moments, width=4, generator=generator)


def goal_for(name: str, data: LabeledImages, wanted: int = 2) -> Goal:
    """A goal of the attack's kind: one image, or a few with a trigger, which the attack may have yet to make."""
    about = ATTACKS[name].about
    if about.aim == "target":
        row = (data.y != wanted).nonzero()[0]
        return Goal(data.pixels(row), data.y[row], torch.tensor([wanted]), name="a digit")
    rows = (data.y == int(data.y[(data.y != wanted).nonzero()[0]])).nonzero().flatten()[:5]
    c, h, w = data.shape
    trigger: Trigger = Additive(torch.zeros(c, h, w)) if about.makes_trigger else Patch(torch.ones(c, 4, 4))
    x = trigger(data.pixels(rows), torch.Generator().manual_seed(0))
    return Goal(x, data.y[rows], torch.full_like(data.y[rows], wanted), trigger, name="some digits")


def bound(attack: Attack | None) -> float | None:
    """The l_inf bound that an attack claims; None if it claims none."""
    return None if attack is None else bound_of(attack)


def made(
    name: str, data: LabeledImages, seed: int = 0, checkpoint: Path | None = None, **changes: Any
) -> PoisonedDataset:
    attack: Any = dataclasses.replace(SMALL[name], **changes)  # type: ignore[type-var]
    return attack(data, goal_for(name, data), surrogate=surrogate, streams=Streams(seed), checkpoint=checkpoint)


KEPT: dict[str, PoisonedDataset] = {}


def plain(name: str, data: LabeledImages) -> PoisonedDataset:
    """What ``made`` gives with nothing else said, made once for all tests; nobody may change it."""
    if name not in KEPT:
        KEPT[name] = made(name, data)
    return KEPT[name]


def test_every_attack_is_here() -> None:
    assert SMALL.keys() == ATTACKS.keys()
    assert all(type(SMALL[name]) is ATTACKS[name] for name in ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_same_streams_same_bytes_other_streams_other_bytes(few_digits: LabeledImages, name: str) -> None:
    first, again, other = plain(name, few_digits), made(name, few_digits), made(name, few_digits, seed=1)
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.train.y, again.train.y)
    assert torch.equal(first.poison_idx, again.poison_idx)
    assert not torch.equal(first.train.x, other.train.x)
    assert first.recipe == again.recipe


@pytest.mark.parametrize("name", ATTACKS)
def test_it_keeps_its_promises_in_bytes(few_digits: LabeledImages, name: str) -> None:
    poisoned, about = plain(name, few_digits), ATTACKS[name].about
    poisoned.check(few_digits, xi=bound(SMALL[name]), budget=COUNT, clean_label=about.clean_label)
    difference = (poisoned.train.x.short() - few_digits.x.short()).abs().flatten(1).amax(1)
    assert torch.equal(difference.nonzero().flatten(), poisoned.poison_idx.sort().values)
    assert len(poisoned.poison_idx) == COUNT
    if bound(SMALL[name]) is not None:
        assert int(difference.max()) == 24  # the bound is used, not only kept
    assert bool((poisoned.train.y[poisoned.poison_idx] == 2).all())
    assert about.clean_label == torch.equal(poisoned.train.y, few_digits.y)


@pytest.mark.parametrize("name", [name for name in ATTACKS if bound(SMALL.get(name)) is not None])
def test_a_bound_that_is_no_whole_number_of_grey_levels_is_kept_in_bytes(few_digits: LabeledImages, name: str) -> None:
    poisoned = made(name, few_digits, xi=24.9 / 255)
    poisoned.check(few_digits, xi=24.9 / 255)
    assert int((poisoned.train.x.short() - few_digits.x.short()).abs().max()) == 24


@pytest.mark.parametrize("name", ATTACKS)
def test_global_generator_and_inputs_are_untouched(few_digits: LabeledImages, name: str) -> None:
    goal = goal_for(name, few_digits)
    state, x, y, target = torch.get_rng_state(), few_digits.x.clone(), few_digits.y.clone(), goal.x.clone()
    model = surrogate(few_digits)
    before = copy.deepcopy(model.state_dict())
    poisoned = SMALL[name](few_digits, goal, surrogate=lambda data, **_: model, streams=Streams(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few_digits.x, x)
    assert torch.equal(few_digits.y, y)
    assert torch.equal(goal.x, target)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    poisoned.train.x.zero_()
    poisoned.train.y.zero_()
    assert torch.equal(few_digits.x, x)  # nothing is shared with the result
    assert torch.equal(few_digits.y, y)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_goal_is_that_of_the_call_or_its_images_with_the_trigger_that_was_made(
    few_digits: LabeledImages, name: str
) -> None:
    goal = goal_for(name, few_digits)
    poisoned = SMALL[name](few_digits, goal, surrogate=surrogate, streams=Streams(0))
    if not ATTACKS[name].about.makes_trigger:
        assert poisoned.goal is goal
        return
    made_goal = poisoned.goal
    assert made_goal.trigger is not None
    assert torch.equal(made_goal.x, made_goal.trigger(goal.x, torch.Generator()))
    assert not torch.equal(made_goal.x, goal.x)
    assert torch.equal(made_goal.y_true, goal.y_true)
    assert torch.equal(made_goal.y_wanted, goal.y_wanted)
    assert made_goal.name == goal.name


@pytest.mark.parametrize("name", ATTACKS)
def test_the_callers_grad_mode_and_autocast_do_not_matter(few_digits: LabeledImages, name: str) -> None:
    expected = plain(name, few_digits).train.x
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(name, few_digits).train.x, expected)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_killed_crafting_goes_on_to_the_same_poisons(
    few_digits: LabeledImages, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second step again and again, with its state written whenever it is offered."""
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    whole, kills, finished = plain(name, few_digits), 0, False
    while not finished and kills < 100:
        try:
            SMALL[name](few_digits, goal_for(name, few_digits), surrogate=surrogate, streams=Streams(0),
                        checkpoint=tmp_path, progress=stop_at_call(2))  # fmt: skip
            finished = True
        except Stop:  # noqa: PERF203
            kills += 1
    assert finished, "it begins anew after every kill"
    again = made(name, few_digits, checkpoint=tmp_path)
    assert torch.equal(again.train.x, whole.train.x)
    assert again.recipe == whole.recipe


@pytest.mark.parametrize("name", ATTACKS)
def test_the_recipe_is_plain_and_complete_and_survives_a_file(
    few_digits: LabeledImages, name: str, tmp_path: Path
) -> None:
    poisoned = plain(name, few_digits)
    recipe = json.loads(json.dumps(dict(poisoned.recipe), allow_nan=False))
    assert recipe == poisoned.recipe
    assert recipe["attack"] == name
    assert recipe["poisons"] == COUNT
    assert recipe["wanted"] == few_digits.classes[2]
    for field in dataclasses.fields(SMALL[name]):  # type: ignore[arg-type]
        assert field.name in recipe
    if "score" in recipe:
        assert recipe["score"] == min(recipe["score_last"])
        assert len(recipe["score_first"]) == len(recipe["score_last"])
    poisoned.save(tmp_path / "poisons.safetensors")
    back = PoisonedDataset.load(tmp_path / "poisons.safetensors", few_digits)
    assert back.train.fingerprint == poisoned.train.fingerprint
    assert back.recipe == poisoned.recipe
    assert torch.equal(back.goal.x, poisoned.goal.x)
    assert type(back.goal.trigger) is type(poisoned.goal.trigger)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_empty_class_and_an_impossible_budget_are_errors(few_digits: LabeledImages, name: str) -> None:
    called: list[int] = []

    def costly(data: LabeledImages, *, index: int = 0, **_: Any) -> nn.Module:
        called.append(index)
        return surrogate(data)

    goal = goal_for(name, few_digits)
    if ATTACKS[name].about.clean_label:
        missing = few_digits.rows((few_digits.y != 2).nonzero().flatten())
        with pytest.raises(ValueError, match="class '7' has no image"):
            SMALL[name](missing, goal, surrogate=costly, streams=Streams(0))
    attack: Any = dataclasses.replace(SMALL[name], budget=0.99)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="the budget can be at most"):
        attack(few_digits, goal, surrogate=costly, streams=Streams(0))
    large = Goal(torch.rand(1, 1, 30, 30), torch.tensor([0]), torch.tensor([2]), goal.trigger)
    with pytest.raises(ValueError, match="goal images are"):
        SMALL[name](few_digits, large, surrogate=costly, streams=Streams(0))
    assert called == []  # long work comes after the checks


@pytest.mark.parametrize("name", ATTACKS)
def test_one_poison_is_enough_and_a_whole_class_may_be_poisoned(few_digits: LabeledImages, name: str) -> None:
    assert len(made(name, few_digits, budget=1e-6).poison_idx) == 1
    if ATTACKS[name].about.clean_label:
        share = int((few_digits.y == 2).sum()) / len(few_digits)
        assert len(made(name, few_digits, budget=share).poison_idx) == int((few_digits.y == 2).sum())


@pytest.mark.parametrize("name", ATTACKS)
def test_prescribed_bases_are_the_poisons(few_digits: LabeledImages, name: str) -> None:
    about = ATTACKS[name].about
    bases = (few_digits.y == (2 if about.clean_label else 0)).nonzero().flatten()[5 : 5 + COUNT]
    goal = dataclasses.replace(goal_for(name, few_digits), bases=bases)
    poisoned = SMALL[name](few_digits, goal, surrogate=surrogate, streams=Streams(0))
    assert torch.equal(poisoned.poison_idx.sort().values, bases)


@pytest.mark.parametrize("name", ATTACKS)
def test_colour_images_that_are_not_square_are_poisoned_too(name: str) -> None:
    x = torch.randint(256, (60, 3, 24, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = LabeledImages(x, torch.arange(60) % 3, ("a", "b", "c"))
    poisoned = made(name, data, budget=0.1)
    poisoned.check(data, xi=bound(SMALL[name]), budget=6, clean_label=ATTACKS[name].about.clean_label)
    assert not torch.equal(poisoned.train.x, data.x)


@pytest.mark.parametrize("name", [name for name in ATTACKS if hasattr(SMALL.get(name), "augment")])
def test_what_augmentation_is_assumed_matters(few_digits: LabeledImages, name: str) -> None:
    results = {made(name, few_digits, augment=a).train.fingerprint for a in (None, Augment(), Augment(shift=2))}
    assert len(results) == 3


@pytest.mark.parametrize("name", ATTACKS)
def test_settings_are_frozen_and_their_repr_makes_them_again(name: str) -> None:
    attack: Any = SMALL[name]
    scope = {type(attack).__name__: type(attack), "Augment": Augment}
    assert eval(repr(attack), scope) == attack  # noqa: S307
    assert hash(attack) == hash(eval(repr(attack), scope))  # noqa: S307
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.budget = 1.0
    with pytest.raises(TypeError):
        type(attack)(8 / 255)


@pytest.mark.parametrize("name", ATTACKS)
def test_progress_ends_at_its_total(few_digits: LabeledImages, name: str) -> None:
    told: list[tuple[int, int]] = []
    SMALL[name](few_digits, goal_for(name, few_digits), surrogate=surrogate, streams=Streams(0),
                progress=lambda what, done, total, note="": told.append((done, total)))  # fmt: skip
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_it_is_and_what_it_costs_is_said(few_digits: LabeledImages, name: str) -> None:
    about = ATTACKS[name].about
    assert about.title
    assert "20" in about.paper
    assert set(about.scenarios) <= {"scratch", "transfer", "finetune"} and about.scenarios
    sizes = Sizes(train=300, wanted=100, source=100, goal=1, poisons=9)
    cost = SMALL[name].cost(sizes)
    assert cost.forwards >= cost.passes >= 0
    more = SMALL[name].cost(dataclasses.replace(sizes, poisons=18))
    assert more.passes >= cost.passes
