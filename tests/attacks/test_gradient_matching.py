"""Gradient Matching against slow versions of its equation, and one test for every way to get it silently weak."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks_slow import descend, loss_gradient, matching_gradient_jvp, matching_score
from torch import Tensor, nn

from friends.attacks import GradientMatching, halfway
from friends.attacks.adaptive import Adaptive
from friends.attacks.base import Sizes, still
from friends.attacks.crafting import Loop, poison_gradient
from friends.attacks.gradient_matching import Stagger, margin_loss, matching_objective, staggered
from friends.attacks.matching import matching_loss
from friends.attacks.pixels import initial_delta
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import Classifier, build
from friends.noise.lean import PROBE
from friends.types import Streams
from interrupting import Stop, stop_at

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


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_the_gradient_of_an_ensemble_through_the_augmentation_is_that_of_the_form_without_double_backward(
    tiny_net: Classifier, bn_net: Classifier, digits: Digits, goal: Goal
) -> None:
    """In single precision, with batch normalisation."""
    models, base, streams = [copy.deepcopy(bn_net), copy.deepcopy(tiny_net)], bases(digits), Streams(3)
    start, mean = initial_delta(base, XI, "randn", streams("init", 0)), digits[0].moments[0]
    loop = Loop(xi=XI, steps=1, restarts=1, tau=0.1, augment=Augment(), start="randn")
    with still(models, freeze=False):
        objectives = [matching_objective(model, goal, 1) for model in models]
        _, ours = poison_gradient(base, start, objectives, loop, streams, mean, (0, 0))
    leaf = start.clone().requires_grad_()
    seen = Augment()(base + leaf, streams("augment", 0, 0), mean)
    at_entry = sum(matching_gradient_jvp(model, seen.detach(), 1, goal.x) for model in models)
    slow = torch.autograd.grad(seen, leaf, at_entry)[0]
    assert (ours - slow).norm() / slow.norm() < 1e-4
    assert float((ours.sign() == slow.sign()).float().mean()) > 0.999


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


def test_a_score_without_a_graph_would_be_noticed(tiny_net: Classifier, digits: Digits, goal: Goal) -> None:
    """The poisons' gradient must itself be differentiable, or they would move by its length alone, or not at all."""
    x = bases(digits).requires_grad_()
    score = matching_objective(copy.deepcopy(tiny_net), goal, 1)(x)
    (gradient,) = torch.autograd.grad(score, x)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
    moved = matching_objective(copy.deepcopy(tiny_net), goal, 1)(x - 0.01 * gradient.sign())
    assert float(moved.detach()) < float(score.detach())


def test_the_margin_criterion_is_the_best_other_logit_minus_the_wanted_one(
    tiny_net: Classifier, digits: Digits, goal: Goal
) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert float(margin_loss(logits, torch.tensor([1, 1]))) == pytest.approx(((3 - 1) + (4 - 5)) / 2)
    model, x = copy.deepcopy(tiny_net).double(), bases(digits).double()
    score, _ = gradient_of(matching_objective(model, goal, 1, "cw"), x)
    out = model(goal.x.double())[0]
    target = torch.autograd.grad(out[0] - out[1], list(model.parameters()))
    poison = loss_gradient(model, x, torch.ones(len(x), dtype=torch.int64))
    slow = nn.functional.cosine_similarity(torch.cat([g.flatten() for g in target]), poison, dim=0, eps=0)
    assert score == pytest.approx(1 - float(slow), rel=1e-9)


def test_the_margin_criterion_differs_where_there_are_several_goal_images(
    tiny_net: Classifier, digits: Digits, given_models: type
) -> None:
    """For one image and two classes both gradients point the same way; over several images they weigh differently."""
    test = digits[1]
    rows = (test.y == 0).nonzero().flatten()[:4]
    many = Goal(test.pixels(rows), test.y[rows], 1 - test.y[rows])
    made = [
        replace(QUICK, criterion=criterion)(digits[0], many, surrogate=given_models(tiny_net), streams=Streams(0))
        for criterion in ("cross-entropy", "cw")
    ]
    assert made[0].train.fingerprint != made[1].train.fingerprint
    assert made[1].recipe["criterion"] == "cw"


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


# --- staggered ensembles ---


@pytest.mark.parametrize("surrogates", range(1, 12))
@pytest.mark.parametrize("epochs", [12, 40, 80])
def test_surrogates_are_staggered_by_the_authors_rules(surrogates: int, epochs: int) -> None:
    """Theirs are evenly spaced floats, cut to whole epochs."""
    rules: dict[Stagger, list[int]] = {
        "firstn": list(range(surrogates)),
        "full": [int(e + 1e-9) for e in np.linspace(0, epochs, surrogates)],
        "inbetween": [int(e + 1e-9) for e in np.linspace(0, epochs, surrogates + 2)[1:-1]],
    }
    for rule, expected in rules.items():
        assert staggered(rule, surrogates, epochs) == expected


def test_every_surrogate_is_trained_as_far_as_its_rule_says(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    surrogate = given_models(tiny_net, tiny_net, tiny_net)
    attack = replace(QUICK, surrogates=3, stagger="inbetween", epochs=40, steps=1)
    made = attack(digits[0], goal, surrogate=surrogate, streams=Streams(0))
    assert [(index, epochs) for _, index, epochs in surrogate.asked] == [(0, 10), (1, 20), (2, 30)]
    assert (made.recipe["stagger"], made.recipe["epochs"]) == ("inbetween", 40)
    assert attack.cost(Sizes(train=400, wanted=200, source=200, goal=1, poisons=12)).trainings == 60 / 40


@pytest.mark.usefixtures("unchecked")
def test_a_stagger_that_cannot_be_is_refused() -> None:
    for settings, message in [
        ({"stagger": "full"}, "stagger = 'full' needs epochs, the length of the victim's recipe, not None"),
        ({"stagger": "fully", "epochs": 40}, "unknown stagger 'fully'; choose one of firstn, full, inbetween"),
        ({"stagger": "firstn", "epochs": 4, "surrogates": 6}, "6 surrogates cannot be staggered over .* 4 epochs"),
        ({"criterion": "hinge"}, "unknown criterion 'hinge'; choose one of cross-entropy, cw"),
        ({"selection": "best"}, "unknown selection 'best'; choose one of random, max-gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            GradientMatching(**settings)


# --- bases of long gradients ---


def own_lengths(models: list[nn.Module], train: LabeledImages, rows: Tensor) -> Tensor:
    """The length of every image's own gradient, one by one, in the mean over models."""
    return torch.tensor([
        sum(float(loss_gradient(model, train.pixels(row[None]), train.y[row][None]).norm()) for model in models)
        for row in rows
    ])  # fmt: skip


def test_bases_can_be_those_with_the_longest_gradients(
    tiny_net: Classifier, bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train, models = digits[0], [copy.deepcopy(tiny_net), copy.deepcopy(bn_net)]
    attack = replace(QUICK, surrogates=2, selection="max-gradient", steps=1)
    made = attack(train, goal, surrogate=given_models(*models), streams=Streams(0))
    of_class = (train.y == 1).nonzero().flatten()
    longest = of_class[own_lengths(models, train, of_class).argsort(descending=True)[:12]]
    assert torch.equal(made.poison_idx, longest.sort().values)
    random = replace(attack, selection="random")(train, goal, surrogate=given_models(*models), streams=Streams(0))
    assert not torch.equal(random.poison_idx, made.poison_idx)


def test_prescribed_bases_go_before_chosen_ones(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    bases = (digits[0].y == 1).nonzero().flatten()[3:15]
    attack = replace(QUICK, selection="max-gradient", steps=1)
    made = attack(digits[0], replace(goal, bases=bases), surrogate=given_models(tiny_net), streams=Streams(0))
    assert torch.equal(made.poison_idx, bases)


# --- killed, and what it costs ---


@pytest.mark.parametrize("step", [1, 3, 4, 6])
@pytest.mark.parametrize("adapt", [None, Adaptive(mu=0.1, zeta=0.1, draws=2)], ids=["plain", "adaptive"])
def test_a_killed_attack_goes_on_to_the_same_bytes(
    step: int,
    adapt: Adaptive | None,
    tiny_net: Classifier,
    digits: Digits,
    goal: Goal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    attack = replace(QUICK, steps=3, restarts=2, adapt=adapt, selection="max-gradient")
    given: dict[str, Any] = {"surrogate": lambda *_, **__: tiny_net, "streams": Streams(0)}
    whole = attack(digits[0], goal, **given)
    with pytest.raises(Stop):
        attack(digits[0], goal, checkpoint=tmp_path, progress=stop_at(step, "gradient matching"), **given)
    again = attack(digits[0], goal, checkpoint=tmp_path, **given)
    assert torch.equal(again.train.x, whole.train.x)
    assert again.recipe == whole.recipe


def test_the_bases_of_a_killed_attack_stay_even_if_its_surrogates_come_out_a_little_different(
    tiny_net: Classifier, bn_net: Classifier, digits: Digits, goal: Goal, tmp_path: Path
) -> None:
    attack = replace(QUICK, selection="max-gradient", steps=2)
    with pytest.raises(Stop):
        attack(digits[0], goal, surrogate=lambda *_, **__: tiny_net, streams=Streams(0), checkpoint=tmp_path,
               progress=stop_at(1, "gradient matching"))  # fmt: skip
    first = attack(digits[0], goal, surrogate=lambda *_, **__: tiny_net, streams=Streams(0))
    other = attack(digits[0], goal, surrogate=lambda *_, **__: bn_net, streams=Streams(0))
    again = attack(digits[0], goal, surrogate=lambda *_, **__: bn_net, streams=Streams(0), checkpoint=tmp_path)
    assert torch.equal(again.poison_idx, first.poison_idx)
    assert not torch.equal(again.poison_idx, other.poison_idx)


def test_the_checkpoint_of_another_crafting_is_refused_before_surrogates_are_trained(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    QUICK(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(0), checkpoint=tmp_path)
    surrogate = given_models(tiny_net)
    with pytest.raises(ValueError, match="holds another crafting"):
        QUICK(digits[0], goal, surrogate=surrogate, streams=Streams(1), checkpoint=tmp_path)
    assert surrogate.asked == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 3, "restarts": 2, "batch": 5},
        {"surrogates": 2, "selection": "max-gradient"},
        {"adapt": Adaptive(mu=0.1, zeta=0.1, draws=3)},
    ],
)
def test_the_cost_is_what_enters_the_surrogates(
    changes: dict[str, Any], tiny_net: Classifier, digits: Digits, goal: Goal
) -> None:
    entered: list[int] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        float(inputs[0].detach().sum())  # which keeps torch.func.vmap out, behind which images could not be counted
        entered.append(len(inputs[0]))

    def surrogate(*_: object, **__: object) -> nn.Module:
        model = copy.deepcopy(tiny_net)
        model.register_forward_hook(watch)
        return model

    attack = replace(QUICK, **{"steps": 2, **changes})
    attack(digits[0], goal, surrogate=surrogate, streams=Streams(0))
    wanted = int((digits[0].y == 1).sum())
    cost = attack.cost(Sizes(train=400, wanted=wanted, source=400 - wanted, goal=1, poisons=12))
    assert 0 <= sum(entered) - cost.passes <= (2 * PROBE if attack.adapt else 0)  # which looks at the network


def test_trainings_are_counted_whole_or_as_far_as_they_go() -> None:
    sizes = Sizes(train=400, wanted=200, source=200, goal=1, poisons=12)
    trainings = {
        1: GradientMatching(),
        3: GradientMatching(surrogates=3),
        1.5: GradientMatching(surrogates=3, stagger="full", epochs=40),
        2: GradientMatching(adapt=Adaptive(zeta=0.1)),
    }
    for expected, attack in trainings.items():
        assert attack.cost(sizes).trainings == expected
    assert GradientMatching().cost(replace(sizes, poisons=500)).second == 500 * 250 * 8


# --- edges ---


def test_one_poison_one_pixel_row_and_gray_images_that_are_not_square(given_models: type) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 1, 12, 20), generator=generator, dtype=torch.uint8)
    train = LabeledImages(x, torch.arange(40) % 2, ("a", "b"))
    net = build("convnet", shape=train.shape, classes=2, moments=train.moments, width=2, generator=generator)
    goal = Goal(torch.rand(3, 1, 12, 20, generator=generator), torch.zeros(3).long(), torch.ones(3).long())
    made = replace(QUICK, budget=1e-6, steps=2)(train, goal, surrogate=given_models(net), streams=Streams(0))
    made.check(train, xi=XI, budget=1)
    assert len(made.poison_idx) == 1


def test_crafting_leaves_the_running_statistics_of_a_model_in_training_mode(
    bn_net: Classifier, digits: Digits, goal: Goal
) -> None:
    model = copy.deepcopy(bn_net).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    QUICK(digits[0], goal, surrogate=lambda *_, **__: model, streams=Streams(0))
    assert before
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_dropout_is_off_while_crafting(digits: Digits, goal: Goal, given_models: type) -> None:
    """The authors leave it on; then two equal calls would differ, or the global generator would be drawn from."""
    train = digits[0]
    net = build("alexnet", shape=train.shape, classes=2, moments=train.moments, width=2,
                generator=torch.Generator().manual_seed(0)).train()  # fmt: skip
    attack, state = replace(QUICK, steps=2), torch.get_rng_state()
    made = [attack(train, goal, surrogate=given_models(net), streams=Streams(0)) for _ in range(2)]
    assert made[0].train.fingerprint == made[1].train.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
