from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attacks_slow import descend, loss_gradient, matching_gradient_jvp, matching_score
from torch import Tensor, nn

from friends.attacks import GradientMatching
from friends.attacks.base import still
from friends.attacks.crafting import initial_delta
from friends.attacks.gradient_matching import matching_loss, matching_objective
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import Classifier
from friends.types import Streams

XI = 64 / 255
QUICK = GradientMatching(xi=XI, budget=0.03, steps=8, restarts=1)
Digits = tuple[LabeledImages, LabeledImages]


def bases(digits: Digits, count: int = 6) -> Tensor:
    return digits[0].pixels((digits[0].y == 1).nonzero().flatten()[:count])


def gradient_of(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    x = x.detach().clone().requires_grad_()
    score = objective(x)
    return float(score.detach()), torch.autograd.grad(score, x)[0]


# --- the objective ---


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # in torch.func.jvp itself
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("net", ["tiny_net", "bn_net"])
def test_the_double_backward_gradient_is_that_of_the_form_without_one(
    net: str, dtype: torch.dtype, tolerance: float, digits: Digits, goal: Goal, request: pytest.FixtureRequest
) -> None:
    model = copy.deepcopy(request.getfixturevalue(net)).to(dtype)
    x = bases(digits).to(dtype)
    _, ours = gradient_of(matching_objective(model, goal, 1), x)
    slow = matching_gradient_jvp(model, x, 1, goal.x.to(dtype))
    assert slow.norm() > 0
    assert (ours - slow).norm() / slow.norm() < tolerance


@pytest.mark.parametrize("net", ["tiny_net", "bn_net"])
def test_the_cosine_is_one_over_all_parameters_biases_and_normalisations_too(
    net: str, digits: Digits, goal: Goal, request: pytest.FixtureRequest
) -> None:
    model = copy.deepcopy(request.getfixturevalue(net)).double()
    x = bases(digits).double()
    score, gradient = gradient_of(matching_objective(model, goal, 1), x)
    slow, slow_gradient = gradient_of(lambda p: matching_score(model, p, 1, goal.x.double()), x)
    assert score == pytest.approx(slow, rel=1e-9)
    assert torch.allclose(gradient, slow_gradient, rtol=1e-6, atol=1e-12)
    a, b = ([torch.rand(3), torch.rand(2, 2)] for _ in range(2))
    layers = sum(
        1 - nn.functional.cosine_similarity(p.flatten(), q.flatten(), dim=0) for p, q in zip(a, b, strict=True)
    )
    assert float(matching_loss(a, b)) != pytest.approx(float(layers) / 2, rel=1e-3)


def test_the_goals_gradient_is_for_the_wanted_class_not_augmented_and_in_eval_mode(
    bn_net: Classifier, digits: Digits, goal: Goal
) -> None:
    model = copy.deepcopy(bn_net).double().train()
    x, poisons = goal.x.double(), bases(digits).double()
    with still([model], freeze=False):
        towards_wanted = matching_objective(model, goal, 1)
        score = float(towards_wanted(poisons).detach())
        # the goal's own image with the wanted label has the goal's gradient, so nothing is left to match
        assert float(towards_wanted(x).detach()) == pytest.approx(0, abs=1e-12)
    model.eval()
    poison = loss_gradient(model, poisons, torch.ones(len(poisons), dtype=torch.int64))
    for label, alike in ((1, True), (0, False)):
        target = loss_gradient(model, x, torch.tensor([label]))
        cosine = float(nn.functional.cosine_similarity(target, poison, dim=0, eps=0))
        assert (score == pytest.approx(1 - cosine, rel=1e-9)) is alike


def test_several_goal_images_are_wanted_by_their_mean_loss(tiny_net: Classifier, digits: Digits) -> None:
    model, test = copy.deepcopy(tiny_net).double(), digits[1]
    rows = (test.y == 0).nonzero().flatten()[:3]
    many = Goal(test.pixels(rows), test.y[rows], 1 - test.y[rows])
    x = bases(digits).double()
    score, _ = gradient_of(matching_objective(model, many, 1), x)
    target = sum(loss_gradient(model, one[None].double(), torch.tensor([1])) for one in many.x) / 3
    poison = loss_gradient(model, x, torch.ones(len(x), dtype=torch.int64))
    assert score == pytest.approx(1 - float(nn.functional.cosine_similarity(target, poison, dim=0, eps=0)), rel=1e-9)


def test_only_parameters_that_require_a_gradient_are_matched(tiny_net: Classifier, digits: Digits, goal: Goal) -> None:
    model = copy.deepcopy(tiny_net).double()
    everything, _ = gradient_of(matching_objective(model, goal, 1), bases(digits).double())
    model.body.requires_grad_(False)
    x = bases(digits).double()
    score, gradient = gradient_of(matching_objective(model, goal, 1), x)
    assert score == pytest.approx(float(matching_score(model, x, 1, goal.x.double()).detach()), rel=1e-9)
    assert score != pytest.approx(everything, rel=1e-3)
    assert gradient.abs().max() > 0
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the surrogate requires a gradient"):
        matching_objective(model, goal, 1)


def test_a_goal_that_is_reached_already_is_an_error(tiny_net: Classifier, goal: Goal) -> None:
    model = copy.deepcopy(tiny_net)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([-500.0, 500.0]))
    with pytest.raises(ValueError, match=r"gradient has length 0\.0: the surrogate already answers the wanted class"):
        matching_objective(model, goal, 1)


# --- the attack ---


def test_the_attack_is_the_slow_one(tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type) -> None:
    model, train, streams = copy.deepcopy(tiny_net).double(), digits[0], Streams(5)
    attack = replace(QUICK, steps=4)
    made = attack(train, goal, surrogate=given_models(model), streams=streams)
    base = train.pixels(made.poison_idx).double()
    mean, std = (torch.tensor(m, dtype=torch.float64).view(1, -1, 1, 1) for m in train.moments)

    def score(pixels: Tensor, step: int) -> Tensor:
        augmented = Augment()(pixels, streams("augment", 0, step), train.moments[0])
        return matching_score(model, augmented, 1, goal.x.double())

    start = initial_delta(base, XI, "randn", streams("init", 0))
    delta = descend(score, base, start, mean=mean, std=std, xi=XI, tau=0.1, steps=4, signed=True)
    expected = ((base + delta) * 255).round().to(torch.uint8)
    assert torch.equal(made.train.x[made.poison_idx], expected)


def test_it_matches_the_gradient_on_real_images(
    ten_digits: tuple[LabeledImages, LabeledImages, Classifier], given_models: type
) -> None:
    train, test, model = ten_digits
    with torch.no_grad():
        ones = ((test.y == 1) & (model(test.pixels()).argmax(1) == 1)).nonzero()[0]
    goal = Goal(test.pixels(ones), test.y[ones], torch.tensor([8]))
    attack = GradientMatching(xi=XI, budget=0.04, steps=60, restarts=2, augment=Augment(flip=0, shift=1))
    made = attack(train, goal, surrogate=given_models(model), streams=Streams(0))
    made.check(train, xi=XI, budget=40)
    first, last = made.recipe["score_first"], made.recipe["score_last"]
    assert min(first) > 0.75
    assert max(last) < 0.3
    # what counts are the bytes, which are not what the last score was measured on
    clean, poisoned = ((data.pixels(made.poison_idx)) for data in (train, made.train))
    objective = matching_objective(model, goal, 8)
    assert float(objective(poisoned).detach()) < 0.3 < 0.6 < float(objective(clean).detach())


def test_bases_are_replaced_in_place_with_their_labels(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train = digits[0]
    made = QUICK(train, goal, surrogate=given_models(tiny_net), streams=Streams(0))
    changed = (made.train.x != train.x).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, made.poison_idx)
    assert len(changed) == 12  # 3 % of 400
    assert torch.equal(made.train.y, train.y)
    assert bool((train.y[made.poison_idx] == 1).all())
    assert len(made.train) == len(train)


def test_the_surrogate_is_trained_on_the_clean_set_once_each_and_left_as_it_was(
    bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    model = copy.deepcopy(bn_net).train()
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    surrogate = given_models(model, model)
    replace(QUICK, surrogates=2)(digits[0], goal, surrogate=surrogate, streams=Streams(0))
    assert [(data is digits[0], index, epochs) for data, index, epochs in surrogate.asked] == [
        (True, 0, None), (True, 1, None)]  # fmt: skip
    for used in surrogate.handed_out:
        assert all(m.training for m in used.modules())
        assert all(torch.equal(before[name], value) for name, value in used.state_dict().items())  # BN statistics too
        assert all(p.grad is None for p in used.parameters())
        assert [p.requires_grad for p in used.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_surrogate_in_training_mode_is_attacked_in_eval_mode(
    bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    made = [
        QUICK(digits[0], goal, surrogate=given_models(model), streams=Streams(0)).train.fingerprint
        for model in (copy.deepcopy(bn_net).train(), copy.deepcopy(bn_net).eval())
    ]
    assert made[0] == made[1]


def test_an_ensemble_divides_the_step_by_its_size(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    twins = replace(QUICK, surrogates=2)(
        digits[0], goal, surrogate=given_models(tiny_net, tiny_net), streams=Streams(0)
    )
    half = replace(QUICK, tau=0.05)(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(0))
    assert twins.train.fingerprint == half.train.fingerprint
    assert twins.recipe["score"] == pytest.approx(half.recipe["score"])


def test_more_poisons_than_a_batch_are_matched_batch_by_batch(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    attack = replace(QUICK, augment=None, steps=20)
    whole, parts = (
        replace(attack, batch=batch)(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(0))
        for batch in (12, 5)
    )
    assert torch.equal(whole.poison_idx, parts.poison_idx)
    assert whole.train.fingerprint != parts.train.fingerprint
    objective = matching_objective(tiny_net, goal, 1)
    for part in (parts.poison_idx[:5], parts.poison_idx[5:10], parts.poison_idx[10:]):
        before, after = (float(objective(data.pixels(part)).detach()) for data in (digits[0], parts.train))
        assert after < before


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_when_they_are_written() -> None:
    for settings, message in [
        ({"xi": 16}, "did you mean 16/255"),
        ({"budget": 0}, "budget is a fraction"),
        ({"surrogates": 0}, "at least one surrogate"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"init": "uniform"}, "unknown start 'uniform'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GradientMatching(**settings)
