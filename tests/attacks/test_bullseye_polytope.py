from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from attacks_slow import bullseye_score, descend
from features_slow import bullseye_stages, stages
from torch import Tensor
from torch.nn import functional as F

from friends.attacks import BullseyePolytope
from friends.attacks.bullseye_polytope import AUTHORS, distance_objective
from friends.attacks.crafting import initial_delta
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import Classifier, transfer
from friends.types import Streams

XI = 64 / 255
OURS = BullseyePolytope(xi=XI, budget=0.05, steps=5)
ORIGINAL = replace(AUTHORS, xi=XI, budget=0.05, steps=5)
Digits = tuple[LabeledImages, LabeledImages]


def distance(model: Classifier, goal: Goal, form: str, x: Tensor, layers: str = "penultimate") -> float:
    """What the objective says of the poisons ``x`` of one goal."""
    return float(distance_objective(model, [goal], form, layers)([x]).detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["mean-square", "authors"])
def test_the_distances_are_the_slow_ones(form: str, tiny_net: Classifier, digits: Digits) -> None:
    model, (train, test) = copy.deepcopy(tiny_net).double(), digits
    rows = (test.y == 0).nonzero().flatten()[:3]
    many = Goal(test.pixels(rows), test.y[rows], 1 - test.y[rows])
    x = train.pixels(slice(0, 7)).double()
    slow = bullseye_score(model.features, x, many.x.double(), form)
    assert distance(model, many, form, x) == pytest.approx(float(slow.detach()), rel=1e-9)
    assert distance(model, many, form, many.x.double()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", ["mean-square", "authors"])
@pytest.mark.parametrize(("layers", "keep"), [("last-two", -2), ("all", 0)])
def test_the_distances_over_several_stages_are_the_slow_ones(
    form: str, layers: str, keep: int, bn_net: Classifier, digits: Digits, goal: Goal
) -> None:
    model = copy.deepcopy(bn_net).double()
    x = digits[0].pixels(slice(0, 7)).double()
    slow = bullseye_stages(stages(model, x)[keep:], stages(model, goal.x.double())[keep:], form)
    assert distance(model, goal, form, x, layers) == pytest.approx(float(slow.detach()), rel=1e-9)


def test_every_stage_moves_where_all_are_held(
    bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    """A victim that trains the whole network does not keep the last features alone."""
    apart: dict[str, list[float]] = {}
    for layers in ("penultimate", "all"):
        attack = replace(OURS, steps=60, augment=None, layers=layers)  # type: ignore[arg-type]
        made = attack(digits[0], goal, surrogate=given_models(bn_net), streams=Streams(0))
        with torch.no_grad():
            pairs = zip(*(stages(bn_net, x) for x in (made.train.pixels(made.poison_idx), goal.x)), strict=True)
            apart[layers] = [float((p.mean(0) - g[0]).norm() / g[0].norm()) for p, g in pairs]
    assert all(held < free for held, free in zip(apart["all"][:-1], apart["penultimate"][:-1], strict=True))
    assert apart["penultimate"][-1] < apart["all"][-1]


@pytest.mark.parametrize("attack", [OURS, ORIGINAL], ids=["mean-square", "authors"])
def test_the_attack_is_the_slow_one(
    attack: BullseyePolytope, tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    model, train, streams = copy.deepcopy(tiny_net).double(), digits[0], Streams(5)
    made = attack(train, goal, surrogate=given_models(model), streams=streams)
    base = train.pixels(made.poison_idx).double()
    mean, std = (torch.tensor(m, dtype=torch.float64).view(1, -1, 1, 1) for m in train.moments)
    ours = attack.form == "mean-square"

    def score(pixels: Tensor, step: int) -> Tensor:
        if ours:
            pixels = Augment()(pixels, streams("augment", 0, step), train.moments[0])
        return bullseye_score(model.features, pixels, goal.x.double(), attack.form)

    start = initial_delta(base, XI, "randn" if ours else "clean", streams("init", 0))
    delta = descend(
        score, base, start, mean=mean, std=std, xi=XI, tau=0.1 if ours else 0.04, steps=5, signed=ours
    )  # fmt: skip
    assert torch.equal(made.train.x[made.poison_idx], ((base + delta) * 255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("attack", "fall"),
    [
        (replace(OURS, steps=100, augment=Augment(flip=0, shift=1)), 4),
        (replace(OURS, steps=100, augment=None), 20),
        (replace(ORIGINAL, steps=100), 5),
    ],
    ids=["augmented", "plain", "authors"],
)
def test_the_mean_feature_of_the_bytes_moves_to_the_goals(
    attack: BullseyePolytope, fall: float, bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train = digits[0]
    made = attack(train, goal, surrogate=given_models(bn_net), streams=Streams(0))
    made.check(train, xi=XI, budget=20)
    before, after = (distance(bn_net, goal, attack.form, d.pixels(made.poison_idx)) for d in (train, made.train))
    assert after < before / fall
    centre = bn_net.features(goal.x).mean(0)
    single = (bn_net.features(made.train.pixels(made.poison_idx)) - centre).norm(dim=1).mean()
    mean = (bn_net.features(made.train.pixels(made.poison_idx)).mean(0) - centre).norm()
    assert mean < 0.8 * single  # the goal is amid the poisons; it is not that each has moved there


def train_head(model: Classifier, data: LabeledImages) -> Classifier:
    """Transfer learning as a victim does it: the body frozen, a new head, plain SGD."""
    victim = transfer(model, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        features = victim.features(data.pixels())
    optimizer = torch.optim.SGD(victim.head.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    order = torch.Generator().manual_seed(9)
    for _ in range(30):
        for rows in torch.randperm(len(data), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(victim.head(features[rows]), data.y[rows]).backward()
            optimizer.step()
    return victim.eval()


def test_a_new_head_takes_the_goal_for_the_wanted_class(
    tiny_net: Classifier, digits: Digits, given_models: type
) -> None:
    train, test = digits
    clean = train_head(tiny_net, train)
    rows = ((test.y == 0) & (clean(test.pixels()).argmax(1) == 0)).nonzero().flatten()[:4]
    attack = replace(OURS, budget=0.1, steps=120, augment=None)
    wanted: list[tuple[float, float]] = []
    for row in rows:
        goal = Goal(test.pixels(row[None]), test.y[row][None], 1 - test.y[row][None])
        made = attack(train, goal, surrogate=given_models(tiny_net), streams=Streams(int(row)))
        victim = train_head(tiny_net, made.train)
        wanted.append(tuple(float(m(goal.x).softmax(1)[0, 1].detach()) for m in (clean, victim)))  # type: ignore[arg-type]
        accuracy = (victim(test.pixels()).argmax(1) == test.y).float().mean()
        assert accuracy > 0.9
    assert max(before for before, _ in wanted) < 0.5
    assert sum(after > 0.5 for _, after in wanted) >= 3


def test_the_extractor_is_asked_for_once_and_left_as_it_was(
    bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    frozen = transfer(bn_net, generator=torch.Generator().manual_seed(0)).train()
    before, surrogate = copy.deepcopy(frozen.state_dict()), given_models(frozen)
    OURS(digits[0], goal, surrogate=surrogate, streams=Streams(0))
    (used,) = surrogate.handed_out
    assert [(data is digits[0], index) for data, index, _ in surrogate.asked] == [(True, 0)]
    assert all(torch.equal(before[name], value) for name, value in used.state_dict().items())
    assert [m.training for m in used.modules()] == [m.training for m in frozen.modules()]
    assert [p.requires_grad for p in used.parameters()] == [p.requires_grad for p in frozen.parameters()]
    assert all(p.grad is None for p in used.parameters())


def test_the_head_does_not_matter_only_the_features_before_it(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    made = [
        OURS(digits[0], goal, surrogate=given_models(model), streams=Streams(0)).train.fingerprint
        for model in (tiny_net, transfer(tiny_net, generator=torch.Generator().manual_seed(3)))
    ]
    assert made[0] == made[1]


def test_several_extractors_are_attacked_at_once(
    tiny_net: Classifier, bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    for attack in (replace(OURS, augment=None, steps=60), replace(ORIGINAL, steps=60)):
        both = replace(attack, surrogates=2)
        made = both(digits[0], goal, surrogate=given_models(tiny_net, bn_net), streams=Streams(0))
        for model in (tiny_net, bn_net):
            before, after = (
                distance(model, goal, attack.form, d.pixels(made.poison_idx)) for d in (digits[0], made.train)
            )
            assert after < 0.7 * before


def test_several_extractors_divide_the_step_of_the_signed_optimizer_by_their_number(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    twins = given_models(tiny_net, tiny_net)
    for attack, tau in ((OURS, 0.05), (ORIGINAL, 0.04)):
        both = replace(attack, surrogates=2)(digits[0], goal, surrogate=twins, streams=Streams(0))
        one = replace(attack, tau=tau)(digits[0], goal, surrogate=twins, streams=Streams(0))
        differ = (both.train.x != one.train.x).float().mean()
        assert differ < 2e-3  # plain Adam forgets the scale of the doubled gradient but for its epsilon


def test_more_poisons_than_a_batch_move_each_batchs_own_mean(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    attack = replace(OURS, augment=None, steps=60, batch=8)
    made = attack(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(0))
    whole = replace(attack, batch=20)(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(0))

    def distances(data: LabeledImages) -> list[float]:
        return [distance(tiny_net, goal, "mean-square", data.pixels(part)) for part in made.poison_idx.split(8)]

    assert len(made.poison_idx) == 20
    for own, common, clean in zip(distances(made.train), distances(whole.train), distances(digits[0]), strict=True):
        assert own < common < clean / 2


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_when_they_are_written(tiny_net: Classifier, goal: Goal) -> None:
    with pytest.raises(ValueError, match="unknown form 'original'; choose one of mean-square, authors"):
        BullseyePolytope(form="original")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its 8 restarts would be alike: pass restarts=1"):
        BullseyePolytope(form="authors", restarts=8)
    with pytest.raises(ValueError, match="at least one surrogate"):
        BullseyePolytope(surrogates=0)
    with pytest.raises(ValueError, match="did you mean 16/255"):
        BullseyePolytope(xi=16)
    dead = copy.deepcopy(tiny_net)
    for parameter in dead.body.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="the goal's feature is 0 everywhere"):
        distance_objective(dead, [goal], "authors")
