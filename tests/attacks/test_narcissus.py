from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from narcissus_slow import make_trigger
from torch import Tensor, nn
from torch.nn import functional as F

from friends.attacks import halfway
from friends.attacks.base import Sizes
from friends.attacks.narcissus import Narcissus, loss_of_trigger, views_of_class, whole_levels
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import Additive, Patch
from friends.models import Classifier, build
from friends.types import Streams
from interrupting import Stop, stop_at

XI = 48 / 255
QUICK = Narcissus(xi=XI, budget=0.03, rounds=4, tau=0.05, batch=64)
Digits = tuple[LabeledImages, LabeledImages]


@pytest.fixture
def goal_to_make(digits: Digits) -> Goal:
    """Twenty clean test images of a 3, to be taken for a 5 with a trigger that is yet to be made."""
    test = digits[1]
    rows = (test.y == 0).nonzero().flatten()[:20]
    zeros = Additive(torch.zeros(test.shape))
    return Goal(test.pixels(rows), test.y[rows], 1 - test.y[rows], zeros, "threes")


def made(
    train: LabeledImages, goal: Goal, *models: nn.Module, attack: Narcissus = QUICK, **rest: Any
) -> PoisonedDataset:
    return attack(train, goal, surrogate=lambda data, index=0, **_: models[index], streams=Streams(5), **rest)


def trigger_of(poisoned: PoisonedDataset, attack: Narcissus = QUICK) -> Tensor:
    """What is added in training."""
    assert isinstance(poisoned.goal.trigger, Additive)
    return poisoned.goal.trigger.pixels / attack.amplify


# --- making the trigger ---


@pytest.mark.parametrize("augment", [None, Augment(flip=0.5, shift=2)])
@pytest.mark.parametrize("count", [1, 2])
def test_the_trigger_is_the_slow_one(
    augment: Augment | None, count: int, tiny_net: Classifier, bn_net: Classifier, digits: Digits, goal_to_make: Goal
) -> None:
    train, streams = digits[0], Streams(5)
    models = [copy.deepcopy(net).double() for net in (tiny_net, bn_net)][:count]
    attack = replace(QUICK, rounds=2, augment=augment, surrogates=count)
    poisoned = made(train, goal_to_make, *models, attack=attack)
    images = train.pixels(train.y == 1).double()
    orders = [torch.randperm(len(images), generator=streams("order", r)).split(64) for r in range(2)]
    batches = [part.tolist() for parts in orders for part in parts]
    generators = [streams("augment", r) for r in range(2)]

    def augmented(x: Tensor, step: int) -> Tensor:
        return x if augment is None else augment(x, generators[step // len(orders[0])], train.moments[0])

    expected = make_trigger(models, images, 1, batches, augmented, xi=XI, tau=attack.tau)
    got = trigger_of(poisoned) * 255
    assert torch.allclose(got, got.round(), atol=1e-4)  # whole grey levels
    assert float((got - expected * 255).abs().max()) < 0.51


def test_the_gradient_is_that_of_the_mean_loss(tiny_net: Classifier, digits: Digits) -> None:
    model, x = copy.deepcopy(tiny_net).double(), digits[0].pixels(torch.arange(6)).double()
    y = torch.ones(6, dtype=torch.int64)
    trigger = (torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) / 5
    loss, gradient = loss_of_trigger([model], x, trigger, y, lambda shown: shown)
    leaf = trigger.clone().requires_grad_()
    losses = [F.cross_entropy(model((one[None] + leaf).clamp(0, 1)), y[:1]) for one in x]
    (sum(losses) / 6).backward()  # type: ignore[union-attr]
    assert loss == pytest.approx(float((sum(losses) / 6).detach()))  # type: ignore[union-attr]
    assert leaf.grad is not None and torch.allclose(gradient, leaf.grad, atol=1e-12)


def test_the_trigger_makes_images_of_the_class_look_more_like_it_and_others_too(
    ten_digits: tuple[LabeledImages, LabeledImages, Classifier],
) -> None:
    train, test, model = ten_digits
    rows = (test.y != 8).nonzero().flatten()[:300]
    goal = Goal(test.pixels(rows), test.y[rows], torch.full_like(rows, 8), Additive(torch.zeros(train.shape)))
    attack = Narcissus(xi=XI, budget=0.01, rounds=40, tau=0.02, amplify=2.0, augment=Augment(flip=0, shift=1))
    poisoned = made(train, goal, model, attack=attack)
    first, last = (poisoned.recipe[name][0] for name in ("score_first", "score_last"))  # type: ignore[index]
    assert last < first / 5
    with torch.no_grad():
        before, after = ((model(x).argmax(1) == 8).float().mean() for x in (goal.x, poisoned.goal.x))
    assert float(before) < 0.1 and float(after) > 0.6


def test_only_images_of_the_wanted_class_make_it(tiny_net: Classifier, digits: Digits, goal_to_make: Goal) -> None:
    """What the paper's attacker has: the rest of the training set is known to the surrogate alone."""
    train = digits[0]
    x = train.x.clone()
    x[train.y != 1] = 255 - x[train.y != 1]
    other = replace(train, x=x)
    plain = replace(QUICK, augment=None)  # the colour that a shift brings in is that of the whole data
    ours, theirs = (made(data, goal_to_make, tiny_net, attack=plain) for data in (train, other))
    assert torch.equal(trigger_of(ours), trigger_of(theirs))


def test_an_attacker_who_knows_the_class_trains_on_nothing_else(
    tiny_net: Classifier, digits: Digits, goal_to_make: Goal
) -> None:
    train = digits[0]
    asked: list[LabeledImages] = []

    def surrogate(data: LabeledImages, **_: Any) -> nn.Module:
        asked.append(data)
        return tiny_net

    replace(QUICK, knows="class")(train, goal_to_make, surrogate=surrogate, streams=Streams(5))
    x = train.x.clone()
    x[train.y != 1] = 0
    replace(QUICK, knows="class")(replace(train, x=x), goal_to_make, surrogate=surrogate, streams=Streams(5))
    assert asked[0].fingerprint == asked[1].fingerprint
    assert torch.equal(asked[0].x[asked[0].y == 1], train.x[train.y == 1])


def test_views_are_one_combination_of_changes_for_every_other_class() -> None:
    x = torch.randint(256, (2, 1, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = LabeledImages(x, torch.tensor([3, 3]), tuple("abcdefghijklmnopqr"))
    views = views_of_class(data, torch.arange(2), 3)
    assert torch.bincount(views.y).tolist() == [2] * 18
    assert torch.equal(views.x[views.y == 3], x)
    assert torch.equal(views.x[views.y == 4], x.flip(2))
    assert torch.equal(views.x[views.y == 5], 255 - x)
    assert torch.equal(views.x[views.y == 7], torch.cat([x[..., 3:], x[..., :3]], 3))
    assert torch.equal(views.x[views.y == 11], torch.cat([x[:, :, 2:], x[:, :, :2]], 2))
    seen = {view.numpy().tobytes() for label, view in zip(views.y, views.x, strict=True) if label != 3}
    assert len(seen) == 30  # 15 combinations of two images: two classes share
    assert all(image.numpy().tobytes() not in seen for image in x)


# --- putting it on ---


def test_one_trigger_on_every_poison_and_amplified_on_the_goal(
    tiny_net: Classifier, digits: Digits, goal_to_make: Goal
) -> None:
    train, attack = digits[0], replace(QUICK, amplify=2.5)
    poisoned = made(train, goal_to_make, tiny_net, attack=attack)
    rows, t = poisoned.poison_idx, trigger_of(poisoned, attack)
    assert torch.equal(poisoned.train.x[rows], ((train.pixels(rows) + t).clamp(0, 1) * 255).round().to(torch.uint8))
    assert torch.allclose(poisoned.goal.x, (goal_to_make.x + 2.5 * t).clamp(0, 1), atol=1e-6)
    assert float(t.abs().max()) == pytest.approx(XI)
    assert float((goal_to_make.x - poisoned.goal.x).abs().max()) > 2 * XI
    assert torch.equal(poisoned.goal.y_wanted, goal_to_make.y_wanted)
    assert poisoned.goal.name == "threes"
    twice = made(train, goal_to_make, tiny_net, attack=replace(attack, amplify=1.0))
    assert twice.train.fingerprint == poisoned.train.fingerprint  # test time does not reach into training


@pytest.mark.parametrize("xi", [48 / 255, 48.9 / 255])
def test_the_bound_holds_in_bytes_and_labels_stay(
    xi: float, tiny_net: Classifier, digits: Digits, goal_to_make: Goal
) -> None:
    poisoned = made(digits[0], goal_to_make, tiny_net, attack=replace(QUICK, xi=xi))
    poisoned.check(digits[0], xi=48 / 255, budget=12, clean_label=True)
    assert bool((digits[0].y[poisoned.poison_idx] == 1).all())
    assert len(poisoned.train) == len(digits[0])


def test_levels_are_whole_and_within_the_bound() -> None:
    t = torch.tensor([[[0.4, 1.6, -48.7, 48.9]]]) / 255
    assert (whole_levels(t, 48.9 / 255) * 255).flatten().tolist() == pytest.approx([0, 2, -48, 48])


def test_poisons_are_a_random_share_of_the_class(tiny_net: Classifier, digits: Digits, goal_to_make: Goal) -> None:
    quick = replace(QUICK, rounds=1)
    rows = [
        quick(digits[0], goal_to_make, surrogate=lambda *_, **__: tiny_net, streams=Streams(s)).poison_idx.tolist()
        for s in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 12


# --- the rest of the contract ---


def test_the_surrogate_is_held_still(
    bn_net: Classifier, digits: Digits, goal_to_make: Goal, given_models: type
) -> None:
    """Running statistics too, which images with a trigger would move."""
    model = copy.deepcopy(bn_net).train()
    before = copy.deepcopy(model.state_dict())
    surrogate = given_models(model, model)
    replace(QUICK, surrogates=2)(digits[0], goal_to_make, surrogate=surrogate, streams=Streams(0))
    assert [(data is digits[0], index) for data, index, _ in surrogate.asked] == [(True, 0), (True, 1)]
    for used in surrogate.handed_out:
        assert all(m.training for m in used.modules())
        assert all(torch.equal(before[name], value) for name, value in used.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in used.parameters())


@pytest.mark.parametrize("at", [1, 2, 4])
def test_killed_in_any_round_it_goes_on_to_the_same_poisons(
    at: int, tiny_net: Classifier, digits: Digits, goal_to_make: Goal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    whole = made(digits[0], goal_to_make, tiny_net)
    with pytest.raises(Stop):
        made(digits[0], goal_to_make, tiny_net, checkpoint=tmp_path, progress=stop_at(at, "narcissus"))
    told: list[int] = []
    again = made(digits[0], goal_to_make, tiny_net, checkpoint=tmp_path,
                 progress=lambda what, done, total, note="": told.append(done))  # fmt: skip
    assert again.train.fingerprint == whole.train.fingerprint
    assert again.recipe == whole.recipe
    assert torch.equal(again.goal.x, whole.goal.x)
    assert told == list(range(at, 5))

    def never(*_: Any, **__: Any) -> nn.Module:
        raise AssertionError("trained before the checks")

    with pytest.raises(ValueError, match="holds another crafting"):
        replace(QUICK, tau=0.01)(digits[0], goal_to_make, surrogate=never, streams=Streams(5), checkpoint=tmp_path)


def test_the_cost_is_what_enters_the_surrogates(tiny_net: Classifier, digits: Digits, goal_to_make: Goal) -> None:
    model, counts = copy.deepcopy(tiny_net), list[int]()
    model.normalize.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))  # type: ignore[operator, union-attr]
    wanted = int((digits[0].y == 1).sum())
    sizes = Sizes(train=400, wanted=wanted, source=400 - wanted, goal=20, poisons=12)
    for attack in (QUICK, replace(QUICK, rounds=1, surrogates=2, batch=7)):
        counts.clear()
        made(digits[0], goal_to_make, model, model, attack=attack)
        assert sum(counts) == attack.cost(sizes).passes > 0
        assert attack.cost(sizes).trainings == attack.surrogates


@pytest.mark.parametrize("shape", [(1, 20, 28), (3, 24, 16)])
def test_one_poison_of_grey_and_of_oblong_images(shape: tuple[int, int, int]) -> None:
    x = torch.randint(256, (30, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = LabeledImages(x, torch.arange(30) % 3, ("a", "b", "c"))
    model = build("convnet", shape=shape, classes=3, moments=data.moments, width=4, generator=torch.Generator())
    goal = Goal(torch.rand(2, *shape), torch.tensor([0, 2]), torch.tensor([1, 1]), Additive(torch.zeros(shape)))
    poisoned = made(data, goal, model, attack=replace(QUICK, budget=1e-6))
    poisoned.check(data, xi=XI, budget=1)
    assert len(poisoned.goal) == 2


@pytest.mark.usefixtures("unchecked")
def test_a_goal_with_another_trigger_is_refused_before_a_surrogate_is_trained(
    digits: Digits, goal_to_make: Goal
) -> None:
    for trigger in (None, Patch(torch.ones(1, 3, 3)), Additive(torch.full((1, 28, 28), 0.1))):
        with pytest.raises(ValueError, match="Narcissus makes its own trigger, but the goal 'threes' has one or none"):
            made(digits[0], replace(goal_to_make, trigger=trigger))


def test_a_surrogate_that_is_not_finite_is_an_error(tiny_net: Classifier, digits: Digits, goal_to_make: Goal) -> None:
    model = copy.deepcopy(tiny_net)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="became nan: the surrogate is not finite"):
        made(digits[0], goal_to_make, model)


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_when_they_are_written() -> None:
    for settings_, message in [
        ({"xi": 16}, "did you mean 16/255"),
        ({"budget": 5}, r"did you mean 0\.05"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"surrogates": 0}, "surrogates must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"knows": "nothing"}, "unknown knows 'nothing'; choose one of all, class"),
        ({"tau": 0.0}, "tau is a positive number, not 0"),
        ({"amplify": -3.0}, r"amplify is a positive number, not -3\.0"),
        ({"amplify": float("nan")}, "amplify is a positive number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Narcissus(**settings_)  # type: ignore[arg-type]
