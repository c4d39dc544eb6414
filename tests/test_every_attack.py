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

from friends.attacks import ATTACKS, Attack, BullseyePolytope, GradientMatching
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.models import build
from friends.types import Streams

XI, BUDGET, COUNT = 24 / 255, 0.03, 9  # 9 = 3 % of 300

SMALL: dict[str, Attack] = {
    "gradient-matching": GradientMatching(xi=XI, budget=BUDGET, steps=3, restarts=2),
    "bullseye-polytope": BullseyePolytope(xi=XI, budget=BUDGET, steps=3, restarts=2),
}
"""Each attack with settings that take a moment, bound XI and budget BUDGET."""


def surrogate(
    data: LabeledImages, *, index: int = 0, epochs: int | None = None, start: nn.Module | None = None
) -> nn.Module:
    """An untrained network; it has gradients and features, which is all that contracts need."""
    generator = torch.Generator().manual_seed(index)
    return build("convnet", shape=data.shape, classes=3, moments=data.moments, width=4, generator=generator)


def goal_for(data: LabeledImages, wanted: int = 2) -> Goal:
    row = (data.y != wanted).nonzero()[0]
    return Goal(data.pixels(row), data.y[row], torch.tensor([wanted]), name="a digit")


def made(name: str, data: LabeledImages, seed: int = 0, **changes: Any) -> PoisonedDataset:
    attack: Any = dataclasses.replace(SMALL[name], **changes)  # type: ignore[type-var]
    return attack(data, goal_for(data), surrogate=surrogate, streams=Streams(seed))


def test_every_attack_is_here() -> None:
    assert SMALL.keys() == ATTACKS.keys()
    assert all(type(SMALL[name]) is ATTACKS[name] for name in ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_same_streams_same_bytes_other_streams_other_bytes(few_digits: LabeledImages, name: str) -> None:
    first, again, other = made(name, few_digits), made(name, few_digits), made(name, few_digits, seed=1)
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.poison_idx, again.poison_idx)
    assert not torch.equal(first.poison_idx, other.poison_idx)
    assert first.recipe == again.recipe


@pytest.mark.parametrize("name", ATTACKS)
def test_it_keeps_its_promises_in_bytes(few_digits: LabeledImages, name: str) -> None:
    poisoned = made(name, few_digits)
    poisoned.check(few_digits, xi=XI, budget=COUNT)
    difference = (poisoned.train.x.short() - few_digits.x.short()).abs().flatten(1).amax(1)
    assert torch.equal(difference.nonzero().flatten(), poisoned.poison_idx.sort().values)
    assert len(poisoned.poison_idx) == COUNT
    assert int(difference.max()) == 24  # the bound is used, not only kept
    assert bool((poisoned.train.y[poisoned.poison_idx] == 2).all())


@pytest.mark.parametrize("name", ATTACKS)
def test_a_bound_that_is_no_whole_number_of_grey_levels_is_kept_in_bytes(few_digits: LabeledImages, name: str) -> None:
    poisoned = made(name, few_digits, xi=24.9 / 255)
    poisoned.check(few_digits, xi=24.9 / 255)
    assert int((poisoned.train.x.short() - few_digits.x.short()).abs().max()) == 24


@pytest.mark.parametrize("name", ATTACKS)
def test_global_generator_and_inputs_are_untouched(few_digits: LabeledImages, name: str) -> None:
    goal = goal_for(few_digits)
    state, x, y, target = torch.get_rng_state(), few_digits.x.clone(), few_digits.y.clone(), goal.x.clone()
    model = surrogate(few_digits)
    before = copy.deepcopy(model.state_dict())
    poisoned = SMALL[name](
        few_digits, goal, surrogate=lambda data, *, index=0, epochs=None, start=None: model, streams=Streams(0)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few_digits.x, x)
    assert torch.equal(few_digits.y, y)
    assert torch.equal(goal.x, target)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert poisoned.goal is goal
    poisoned.train.x.zero_()
    poisoned.train.y.zero_()
    assert torch.equal(few_digits.x, x)  # nothing is shared with the result
    assert torch.equal(few_digits.y, y)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_callers_grad_mode_and_autocast_do_not_matter(few_digits: LabeledImages, name: str) -> None:
    plain = made(name, few_digits)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(name, few_digits).train.x, plain.train.x)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_recipe_is_plain_and_complete_and_survives_a_file(
    few_digits: LabeledImages, name: str, tmp_path: Path
) -> None:
    poisoned = made(name, few_digits)
    recipe = json.loads(json.dumps(dict(poisoned.recipe), allow_nan=False))
    assert recipe == poisoned.recipe
    assert recipe["attack"] == name
    assert recipe["poisons"] == COUNT
    assert recipe["wanted"] == few_digits.classes[2]
    for field in dataclasses.fields(SMALL[name]):  # type: ignore[arg-type]
        assert field.name in recipe
    assert recipe["augment"] == {"flip": 0.5, "shift": 4.0}
    assert recipe["score"] == min(recipe["score_last"])
    assert len(recipe["score_first"]) == len(recipe["score_last"]) == 2
    poisoned.save(tmp_path / "poisons.safetensors")
    back = PoisonedDataset.load(tmp_path / "poisons.safetensors", few_digits)
    assert back.train.fingerprint == poisoned.train.fingerprint
    assert back.recipe == poisoned.recipe


@pytest.mark.parametrize("name", ATTACKS)
def test_an_empty_class_and_an_impossible_budget_are_errors(few_digits: LabeledImages, name: str) -> None:
    called: list[int] = []

    def costly(data: LabeledImages, *, index: int = 0, epochs: int | None = None, start: Any = None) -> nn.Module:
        called.append(index)
        return surrogate(data)

    missing = few_digits.rows((few_digits.y != 2).nonzero().flatten())
    with pytest.raises(ValueError, match="class '7' has no image"):
        SMALL[name](missing, goal_for(few_digits), surrogate=costly, streams=Streams(0))
    attack: Any = dataclasses.replace(SMALL[name], budget=0.9)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="the budget can be at most"):
        attack(few_digits, goal_for(few_digits), surrogate=costly, streams=Streams(0))
    large = Goal(torch.rand(1, 1, 30, 30), torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="goal images are"):
        SMALL[name](few_digits, large, surrogate=costly, streams=Streams(0))
    assert called == []  # long work comes after the checks


@pytest.mark.parametrize("name", ATTACKS)
def test_every_image_of_a_class_may_be_poisoned_and_one_is_enough(few_digits: LabeledImages, name: str) -> None:
    share = int((few_digits.y == 2).sum()) / len(few_digits)
    assert len(made(name, few_digits, budget=share).poison_idx) == int((few_digits.y == 2).sum())
    assert len(made(name, few_digits, budget=1e-6).poison_idx) == 1


@pytest.mark.parametrize("name", ATTACKS)
def test_colour_images_that_are_not_square_are_poisoned_too(name: str) -> None:
    x = torch.randint(256, (60, 3, 24, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = LabeledImages(x, torch.arange(60) % 3, ("a", "b", "c"))
    poisoned = made(name, data, budget=0.1)
    poisoned.check(data, xi=XI, budget=6)
    assert not torch.equal(poisoned.train.x, data.x)


@pytest.mark.parametrize("name", ATTACKS)
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
        attack.xi = 1.0
    with pytest.raises(TypeError):
        type(attack)(8 / 255)


@pytest.mark.parametrize("name", ATTACKS)
def test_progress_ends_at_its_total(few_digits: LabeledImages, name: str) -> None:
    told: list[tuple[int, int]] = []
    SMALL[name](few_digits, goal_for(few_digits), surrogate=surrogate, streams=Streams(0),
                progress=lambda what, done, total, note="": told.append((done, total)))  # fmt: skip
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
