from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_label_slow import harden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from friends.attacks import halfway
from friends.attacks.base import Sizes
from friends.attacks.clean_label import CleanLabelBackdoor, ascent, uphill, within
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import checkerboard, corner_stamp
from friends.models import Classifier, build
from friends.types import Streams
from interrupting import Stop, stop_at

QUICK = CleanLabelBackdoor(budget=0.03, norm="linf", eps=32 / 255, steps=5)
STAMP = corner_stamp(checkerboard(3, 1), (1, 28, 28))
Digits = tuple[LabeledImages, LabeledImages]


@pytest.fixture
def backdoor(digits: Digits) -> Goal:
    """Twenty test images of a 3 with a stamp, to be taken for a 5."""
    test = digits[1]
    rows = (test.y == 0).nonzero().flatten()[:20]
    return Goal(STAMP(test.pixels(rows), torch.Generator()), test.y[rows], 1 - test.y[rows], STAMP, "stamped threes")


def made(
    train: LabeledImages, goal: Goal, *models: nn.Module, attack: CleanLabelBackdoor = QUICK, **rest: Any
) -> PoisonedDataset:
    return attack(train, goal, surrogate=lambda data, index=0, **_: models[index], streams=Streams(5), **rest)


def hardened(
    train: LabeledImages, poisoned: PoisonedDataset, models: list[nn.Module], attack: CleanLabelBackdoor
) -> Tensor:
    """Bytes of the poisons of :func:`made` before the stamp, by the slow reference."""
    base = train.pixels(poisoned.poison_idx).double()
    start = (2 * torch.rand(base.shape, generator=Streams(5)("init")).double() - 1) * attack.eps
    how: dict[str, Any] = {"norm": attack.norm, "eps": attack.eps, "steps": attack.steps}
    hard = [harden(models, image, s, 1, **how) for image, s in zip(base, start, strict=True)]
    return (torch.stack(hard) * 255).round().to(torch.uint8)


# --- the parts ---


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["linf", "l2"]), st.floats(0, 2), st.integers(0, 1000))
def test_what_is_within_stays_within_the_ball_and_the_pixels(norm: Any, eps: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    clean = torch.rand(3, 2, 4, 5, generator=g, dtype=torch.float64)
    delta = torch.randn(clean.shape, generator=g, dtype=torch.float64)
    out = within(delta, clean, eps, norm)
    size = out.abs().amax((1, 2, 3)) if norm == "linf" else out.flatten(1).norm(dim=1)
    assert float(size.max()) <= eps + 1e-9
    assert float((clean + out).min()) >= 0 and float((clean + out).max()) <= 1
    assert torch.allclose(within(out, clean, eps, norm), out, atol=1e-12)  # what is inside is not moved


def test_an_image_without_a_gradient_is_left_where_it_is() -> None:
    gradient = torch.zeros(2, 1, 2, 2)
    gradient[1, 0, 0] = torch.tensor([3.0, -4.0])
    assert torch.allclose(uphill(gradient, "l2")[1, 0], torch.tensor([[0.6, -0.8], [0.0, 0.0]]))
    assert not uphill(gradient, "l2")[0].any()
    assert uphill(gradient, "linf")[1, 0].tolist() == [[1, -1], [0, 0]]


def test_the_gradient_of_an_image_does_not_depend_on_its_batch(tiny_net: Classifier, digits: Digits) -> None:
    """A mean over a batch would make the step of each image smaller the more there are."""
    model, x = copy.deepcopy(tiny_net).double(), digits[0].pixels(torch.arange(7)).double()
    y = torch.zeros(7, dtype=torch.int64)
    whole_loss, whole = ascent([model], x, y, 100)
    parts_loss, parts = ascent([model], x, y, 3)
    alone = torch.cat([ascent([model], one[None], y[:1], 3)[1] for one in x])
    assert torch.allclose(whole, parts, atol=1e-12) and torch.allclose(whole, alone, atol=1e-12)
    assert whole_loss == pytest.approx(parts_loss) == pytest.approx(float(F.cross_entropy(model(x), y).detach()))


# --- the attack ---


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_attack_is_the_slow_one(
    norm: Any, count: int, tiny_net: Classifier, bn_net: Classifier, digits: Digits, backdoor: Goal
) -> None:
    models = [copy.deepcopy(net).double() for net in (tiny_net, bn_net)][:count]
    attack = replace(QUICK, norm=norm, eps=32 / 255 if norm == "linf" else 2.0, surrogates=count, batch=5)
    poisoned = made(digits[0], backdoor, *models, attack=attack)
    expected = hardened(digits[0], poisoned, models, attack)
    expected[:, :, 25:, 25:] = (checkerboard(3, 1) * 255).to(torch.uint8)
    got = poisoned.train.x[poisoned.poison_idx]
    assert (
        float((got != expected).float().mean()) < 5e-3
    )  # where a gradient is nothing but rounding, its sign may differ


def test_the_trigger_is_put_on_after_hardening_and_whole(tiny_net: Classifier, digits: Digits, backdoor: Goal) -> None:
    """A trigger that was hardened with the rest is another one in every poison, and not that of the test images."""
    poisoned = made(digits[0], backdoor, tiny_net)
    stamped = poisoned.train.x[poisoned.poison_idx][:, :, 25:, 25:]
    at_test = (backdoor.x[:1, :, 25:, 25:] * 255).round().to(torch.uint8)
    assert torch.equal(stamped, at_test.expand_as(stamped))


def test_outside_the_trigger_the_hardening_keeps_its_bound_in_bytes(
    tiny_net: Classifier, digits: Digits, backdoor: Goal
) -> None:
    for eps in (16 / 255, 16.9 / 255):
        poisoned = made(digits[0], backdoor, tiny_net, attack=replace(QUICK, eps=eps))
        rows = poisoned.poison_idx
        change = (poisoned.train.x[rows].short() - digits[0].x[rows].short()).abs()
        assert int(change[:, :, 25:, 25:].max()) > 200
        change[:, :, 25:, 25:] = 0
        assert int(change.max()) == 16
        poisoned.check(digits[0], xi=None, budget=12)
        with pytest.raises(ValueError, match="more than xi = 16/255"):  # the bound of the hardening is not xi
            poisoned.check(digits[0], xi=eps)


def test_an_l2_bound_holds_for_each_image_but_for_rounding(
    tiny_net: Classifier, digits: Digits, backdoor: Goal
) -> None:
    poisoned = made(digits[0], backdoor, tiny_net, attack=replace(QUICK, norm="l2", eps=1.5, steps=10))
    rows = poisoned.poison_idx
    change = poisoned.train.pixels(rows) - digits[0].pixels(rows)
    change[:, :, 25:, 25:] = 0
    length = change.flatten(1).norm(dim=1)
    assert float(length.max()) < 1.5 + 28 * 0.5 / 255
    assert float(length.min()) > 1.0  # the bound is used
    assert float(change.abs().max()) > 32 / 255  # where it matters, and not evenly


def test_xi_bounds_the_whole_change_trigger_included(tiny_net: Classifier, digits: Digits, backdoor: Goal) -> None:
    faint = replace(QUICK, xi=40 / 255)
    poisoned, full = made(digits[0], backdoor, tiny_net, attack=faint), made(digits[0], backdoor, tiny_net)
    poisoned.check(digits[0], xi=40 / 255)
    rows = poisoned.poison_idx
    base, got = digits[0].x[rows].short(), poisoned.train.x[rows].short()
    white, black = checkerboard(3, 1)[0] == 1, checkerboard(3, 1)[0] == 0
    corner, was = got[:, 0, 25:, 25:], base[:, 0, 25:, 25:]
    assert torch.equal(corner[:, white], (was[:, white] + 40).clamp(max=255))
    assert torch.equal(corner[:, black], (was[:, black] - 40).clamp(min=0))
    rest = got.clone()
    rest[:, :, 25:, 25:] = full.train.x[rows][:, :, 25:, 25:].short()
    assert torch.equal(rest, full.train.x[rows].short())  # the hardening is the same
    assert torch.equal(poisoned.goal.x, backdoor.x)  # and the trigger of the test images is not faint


def test_hardening_makes_images_hard_and_is_not_targeted(
    ten_digits: tuple[LabeledImages, LabeledImages, Classifier],
) -> None:
    """The loss of the true label goes up; where it leads to is not chosen: not the goal's true class, as a rule."""
    train, test, model = ten_digits
    stamp = corner_stamp(checkerboard(3, 1), train.shape)
    rows = (test.y == 3).nonzero().flatten()[:5]
    goal = Goal(stamp(test.pixels(rows), torch.Generator()), test.y[rows], torch.full((5,), 8), stamp)
    attack = CleanLabelBackdoor(budget=0.04, norm="linf", eps=48 / 255, steps=20)
    poisoned = made(train, goal, model, attack=attack)
    with torch.no_grad():
        clean, hard = (model(data.pixels(poisoned.poison_idx)).argmax(1) for data in (train, poisoned.train))
    assert float((clean == 8).float().mean()) > 0.8
    assert float((hard == 8).float().mean()) < 0.1
    assert len(hard.unique()) >= 3
    assert -poisoned.recipe["score_last"][0] > 3 - poisoned.recipe["score_first"][0]  # type: ignore[index]
    other = replace(goal, y_true=torch.full((5,), 1))
    assert made(train, other, model, attack=attack).train.fingerprint == poisoned.train.fingerprint


def test_labels_stay_and_poisons_replace_their_bases(tiny_net: Classifier, digits: Digits, backdoor: Goal) -> None:
    train = digits[0]
    poisoned = made(train, backdoor, tiny_net)
    poisoned.check(train, xi=None, budget=12, clean_label=True)
    assert torch.equal(poisoned.train.y, train.y)
    assert bool((train.y[poisoned.poison_idx] == 1).all())
    changed = (poisoned.train.x != train.x).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, poisoned.poison_idx) and len(changed) == 12


def test_without_hardening_it_is_the_trigger_alone(tiny_net: Classifier, digits: Digits, backdoor: Goal) -> None:
    for norm in ("linf", "l2"):
        poisoned = made(digits[0], backdoor, tiny_net, attack=replace(QUICK, norm=norm, eps=0.0))
        clean = digits[0].pixels(poisoned.poison_idx)
        assert torch.equal(poisoned.train.pixels(poisoned.poison_idx), STAMP(clean, torch.Generator()))


def test_surrogates_are_asked_for_once_each_on_the_clean_set_and_left_as_they_were(
    bn_net: Classifier, digits: Digits, backdoor: Goal, given_models: type
) -> None:
    model = copy.deepcopy(bn_net).train()
    before = copy.deepcopy(model.state_dict())
    surrogate = given_models(model, model)
    replace(QUICK, surrogates=2)(digits[0], backdoor, surrogate=surrogate, streams=Streams(0))
    assert [(data is digits[0], index) for data, index, _ in surrogate.asked] == [(True, 0), (True, 1)]
    for used in surrogate.handed_out:
        assert all(m.training for m in used.modules())
        assert all(torch.equal(before[name], value) for name, value in used.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in used.parameters())


@pytest.mark.parametrize("at", [1, 3, 5])
def test_killed_at_any_step_it_goes_on_to_the_same_poisons(
    at: int, tiny_net: Classifier, digits: Digits, backdoor: Goal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    whole = made(digits[0], backdoor, tiny_net)
    with pytest.raises(Stop):
        made(digits[0], backdoor, tiny_net, checkpoint=tmp_path, progress=stop_at(at, "hardening"))
    told: list[int] = []
    again = made(digits[0], backdoor, tiny_net, checkpoint=tmp_path,
                 progress=lambda what, done, total, note="": told.append(done))  # fmt: skip
    assert again.train.fingerprint == whole.train.fingerprint
    assert again.recipe == whole.recipe
    assert told == list(range(at, 6))
    asked: list[int] = []

    def surrogate(data: LabeledImages, index: int = 0, **_: Any) -> nn.Module:
        asked.append(index)
        return tiny_net

    with pytest.raises(ValueError, match="holds another crafting"):
        replace(QUICK, eps=0.1)(digits[0], backdoor, surrogate=surrogate, streams=Streams(5), checkpoint=tmp_path)
    assert asked == []  # before a surrogate is trained


def test_the_cost_is_what_enters_the_surrogates(tiny_net: Classifier, digits: Digits, backdoor: Goal) -> None:
    model, counts = copy.deepcopy(tiny_net), list[int]()
    model.normalize.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))  # type: ignore[operator, union-attr]
    sizes = Sizes(train=400, wanted=200, source=200, goal=20, poisons=12)
    for attack in (QUICK, replace(QUICK, steps=2, surrogates=2, batch=5)):
        counts.clear()
        made(digits[0], backdoor, model, model, attack=attack)
        assert sum(counts) == attack.cost(sizes).passes > 0
        assert attack.cost(sizes).trainings == attack.surrogates


@pytest.mark.parametrize("shape", [(1, 20, 28), (3, 24, 16)])
def test_one_poison_of_grey_and_of_oblong_images(shape: tuple[int, int, int]) -> None:
    x = torch.randint(256, (30, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = LabeledImages(x, torch.arange(30) % 3, ("a", "b", "c"))
    model = build("convnet", shape=shape, classes=3, moments=data.moments, width=4, generator=torch.Generator())
    stamp = corner_stamp(checkerboard(3, shape[0]), shape, corners="all")
    goal = Goal(stamp(data.pixels(torch.tensor([0, 2])), torch.Generator()), torch.tensor([0, 2]), torch.tensor([1, 1]),
                stamp)  # fmt: skip
    poisoned = made(data, goal, model, attack=replace(QUICK, budget=1e-6, xi=32 / 255))
    poisoned.check(data, xi=32 / 255, budget=1)


def test_a_surrogate_that_is_not_finite_is_an_error(tiny_net: Classifier, digits: Digits, backdoor: Goal) -> None:
    model = copy.deepcopy(tiny_net)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="became nan: the surrogate is not finite"):
        made(digits[0], backdoor, model)


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_when_they_are_written(digits: Digits, backdoor: Goal) -> None:
    for settings_, message in [
        ({"xi": 16}, "did you mean 16/255"),
        ({"budget": 0}, "budget is a fraction"),
        ({"norm": "l1"}, "unknown norm 'l1'; choose one of l2, linf"),
        ({"eps": -1.0}, "eps, the bound of the hardening"),
        ({"eps": float("nan")}, "eps, the bound of the hardening"),
        ({"norm": "linf", "eps": 16}, "did you mean 16/255"),
        ({"norm": "linf", "eps": 0.1, "xi": 0.05}, "xi = 0.05 bounds the whole change"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"surrogates": 0}, "surrogates must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            CleanLabelBackdoor(**settings_)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="the goal 'stamped threes' has no trigger, which a clean-label backdoor needs"
    ):
        made(digits[0], replace(backdoor, trigger=None))
