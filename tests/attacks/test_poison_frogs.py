from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attacks_slow import descend
from features_slow import algorithm_1, bounded_collision, collision
from torch import Tensor
from torch.nn import functional as F

from friends.attacks import halfway
from friends.attacks.bullseye_polytope import BullseyePolytope
from friends.attacks.pixels import initial_delta
from friends.attacks.poison_frogs import BENCHMARK, ORIGINAL, PoisonFrogs, collisions, mean_collisions
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.models import Classifier, build, transfer
from friends.types import Streams
from interrupting import Stop, stop_at

XI = 64 / 255
OURS = PoisonFrogs(xi=XI, budget=0.05, steps=5)
FREE = replace(ORIGINAL, budget=0.05, steps=12)
BOUND = replace(BENCHMARK, xi=XI, budget=0.05, steps=12, tau=0.02)
Digits = tuple[LabeledImages, LabeledImages]


def crafted(attack: PoisonFrogs, model: Classifier, digits: Digits, goal: Goal, given_models: type) -> PoisonedDataset:
    return attack(digits[0], goal, surrogate=given_models(model), streams=Streams(5))


def test_the_collision_is_the_slow_one_step_by_step(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    model, train, streams = copy.deepcopy(tiny_net).double(), digits[0], Streams(5)
    made = crafted(OURS, model, digits, goal, given_models)
    base = train.pixels(made.poison_idx).double()
    mean, std = (torch.tensor(m, dtype=torch.float64).view(1, -1, 1, 1) for m in train.moments)

    def score(pixels: Tensor, step: int) -> Tensor:
        seen = Augment()(pixels, streams("augment", 0, step), train.moments[0])
        return collision(model.features, seen, goal.x.double())

    start = initial_delta(base, XI, "randn", streams("init", 0))
    delta = descend(score, base, start, mean=mean, std=std, xi=XI, tau=0.1, steps=5, signed=True)
    assert torch.equal(made.train.x[made.poison_idx], ((base + delta) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("watermark", [0.0, 0.3])
def test_the_original_is_the_slow_one_poison_by_poison(
    watermark: float, tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    model, attack = copy.deepcopy(tiny_net).double(), replace(FREE, watermark=watermark, beta=0.5)
    made = crafted(attack, model, digits, goal, given_models)
    for row in made.poison_idx[:6]:
        base = digits[0].pixels(row[None])[0].double()
        slow = algorithm_1(model.features, base, goal.x[0].double(), watermark=watermark, beta=0.5, lam=1.0, steps=12)
        assert torch.equal(made.train.x[row], (slow * 255).round().to(torch.uint8))
        assert (slow - base).abs().max() > 0.1


def test_the_benchmarks_version_is_the_slow_one_poison_by_poison(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    model = copy.deepcopy(tiny_net).double()
    made = crafted(BOUND, model, digits, goal, given_models)
    for row in made.poison_idx[:6]:
        base = digits[0].pixels(row[None])[0].double()
        slow = bounded_collision(
            model.features, base, goal.x[0].double(), watermark=0.3, xi=XI, lam=0.02, steps=12
        )  # fmt: skip
        assert torch.equal(made.train.x[row], (slow * 255).round().to(torch.uint8))


@pytest.mark.parametrize("images", [1, 3])
def test_the_port_is_bullseye_polytope_byte_for_byte(
    images: int, tiny_net: Classifier, digits: Digits, given_models: type
) -> None:
    """Gradient Matching's authors gave both attacks one objective; several goal images count by their mean here."""
    test = digits[1]
    rows = (test.y == 0).nonzero().flatten()[:images]
    goal = Goal(test.pixels(rows), test.y[rows], 1 - test.y[rows])
    settings = {"xi": XI, "budget": 0.05, "steps": 20, "restarts": 2}
    frogs, bullseye = (
        attack(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(3))
        for attack in (PoisonFrogs(form="mean-square", **settings), BullseyePolytope(**settings))  # type: ignore[arg-type]
    )
    assert frogs.train.fingerprint == bullseye.train.fingerprint
    assert frogs.recipe["score_last"] == bullseye.recipe["score_last"]
    collided = PoisonFrogs(**settings)(digits[0], goal, surrogate=given_models(tiny_net), streams=Streams(3))  # type: ignore[arg-type]
    assert collided.train.fingerprint != frogs.train.fingerprint


def test_every_poison_goes_to_the_goal_itself_and_not_their_mean_alone(
    bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train = digits[0]
    made = {form: crafted(replace(OURS, form=form, steps=100, augment=None), bn_net, digits, goal, given_models)
            for form in ("collision", "mean-square")}  # fmt: skip
    wanted = bn_net.features(goal.x).detach()

    def distances(data: LabeledImages, rows: Tensor) -> Tensor:
        return (bn_net.features(data.pixels(rows)).detach() - wanted).norm(dim=1)

    rows = made["collision"].poison_idx
    clean, alone, mean = (distances(data, rows) for data in
                          (train, made["collision"].train, made["mean-square"].train))  # fmt: skip
    assert bool((alone < 0.6 * clean).all())
    assert bool((alone < mean).float().mean() > 0.9)
    assert float(collisions(bn_net, [goal])([made["collision"].train.pixels(rows)]).detach()) == pytest.approx(
        float(alone.square().mean()), rel=1e-4
    )
    means = [float(mean_collisions(bn_net, [goal])([one.train.pixels(rows)]).detach()) for one in made.values()]
    assert means[1] < means[0]


# --- the forms by splitting ---


def test_the_original_has_no_bound_and_says_how_far_it_went(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train = digits[0]
    made = crafted(replace(FREE, steps=60, beta=0.05), tiny_net, digits, goal, given_models)
    made.check(train, xi=None, budget=20)
    change = (made.train.x.short() - train.x.short())[made.poison_idx].float() / 255
    assert made.recipe["xi"] is None
    assert made.recipe["linf"] == pytest.approx(float(change.abs().max()), abs=1e-6)
    assert made.recipe["l2"] == pytest.approx(float(change.flatten(1).norm(dim=1).mean()), rel=1e-5)
    assert float(change.abs().max()) > 16 / 255
    with pytest.raises(ValueError, match="more than xi = 16/255"):
        made.check(train, xi=16 / 255)


def test_a_larger_beta_keeps_poisons_nearer_to_their_bases_and_farther_from_the_goal(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    made = [crafted(replace(FREE, steps=60, beta=beta), tiny_net, digits, goal, given_models)
            for beta in (0.05, 0.5, 5.0)]  # fmt: skip
    moved = [float(one.recipe["l2"]) for one in made]  # type: ignore[arg-type]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 1.5 * moved[2]
    away = [float(collisions(tiny_net, [goal])([one.train.pixels(one.poison_idx)]).detach()) for one in made]
    assert away == sorted(away)


def test_the_watermark_shows_the_goal_and_keeps_the_bound(
    tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train = digits[0]
    bound = crafted(BOUND, tiny_net, digits, goal, given_models)
    bound.check(train, xi=XI, budget=20)
    free = crafted(replace(FREE, watermark=0.3, beta=50.0), tiny_net, digits, goal, given_models)
    base = train.pixels(free.poison_idx)
    marked = 0.3 * goal.x + 0.7 * base
    assert (free.train.pixels(free.poison_idx) - marked).abs().mean() < 0.2 * (base - marked).abs().mean()


def test_the_objective_falls_and_the_bytes_are_as_close_as_it_says(
    bn_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    for attack in (replace(FREE, steps=60, beta=0.05), replace(BOUND, steps=60)):
        made = crafted(attack, bn_net, digits, goal, given_models)
        (first,), (last,) = made.recipe["score_first"], made.recipe["score_last"]  # type: ignore[misc]
        away = float(collisions(bn_net, [goal])([made.train.pixels(made.poison_idx)]).detach())
        assert last < 0.7 * first
        assert away == pytest.approx(last - attack.beta * float(made.recipe["l2"]) ** 2, rel=0.1, abs=0.2 * last)


@pytest.mark.parametrize("attack", [FREE, BOUND], ids=["original", "benchmark"])
def test_a_kill_does_not_change_the_poisons(
    attack: PoisonFrogs, tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    train, surrogate = digits[0], given_models(tiny_net)
    whole = attack(train, goal, surrogate=surrogate, streams=Streams(0))
    for step in (2, 5, 11):
        with pytest.raises(Stop):
            attack(train, goal, surrogate=surrogate, streams=Streams(0), checkpoint=tmp_path,
                   progress=stop_at(step, "poison frogs"))  # fmt: skip
    again = attack(train, goal, surrogate=surrogate, streams=Streams(0), checkpoint=tmp_path)
    assert again.train.fingerprint == whole.train.fingerprint
    assert again.recipe == whole.recipe
    with pytest.raises(ValueError, match="holds another crafting"):
        replace(attack, steps=13)(train, goal, surrogate=surrogate, streams=Streams(0), checkpoint=tmp_path)


@pytest.mark.parametrize("attack", [FREE, BOUND], ids=["original", "benchmark"])
@pytest.mark.parametrize("shape", [(3, 24, 16), (1, 16, 20)])
def test_other_images_and_a_single_poison_do_as_well(
    attack: PoisonFrogs, shape: tuple[int, int, int], given_models: type
) -> None:
    generator = torch.Generator().manual_seed(0)
    data = LabeledImages(torch.randint(256, (60, *shape), generator=generator, dtype=torch.uint8),
                         torch.arange(60) % 3, ("a", "b", "c"))  # fmt: skip
    model = build("tiny", shape=shape, classes=3, moments=data.moments, width=4, generator=generator)
    goal = Goal(data.pixels(slice(0, 1)), data.y[:1], torch.tensor([2]))
    one = replace(attack, budget=1e-6)
    if attack.xi is not None:
        one = replace(one, xi=8 / 255)
    made = one(data, goal, surrogate=given_models(model), streams=Streams(0))
    made.check(data, xi=one.xi, budget=1)
    assert len(made.poison_idx) == 1


# --- what it is for ---


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


@pytest.mark.parametrize(
    "attack",
    [
        replace(OURS, xi=0.4, budget=0.15, steps=60, augment=None),
        replace(FREE, budget=0.15, steps=60, beta=0.05),
        replace(BOUND, xi=0.4, budget=0.15, steps=60),
    ],
    ids=["collision", "original", "benchmark"],
)
def test_a_new_head_takes_the_goal_for_the_wanted_class(
    attack: PoisonFrogs, tiny_net: Classifier, digits: Digits, given_models: type
) -> None:
    train, test = digits
    clean = train_head(tiny_net, train)
    rows = ((test.y == 0) & (clean(test.pixels()).argmax(1) == 0)).nonzero().flatten()[:4]
    goals = [Goal(test.pixels(row[None]), test.y[row][None], 1 - test.y[row][None]) for row in rows]
    poisonings = attack.many(train, goals, surrogate=given_models(tiny_net), streams=[Streams(int(r)) for r in rows])
    victims = [train_head(tiny_net, made.train) for made in poisonings]
    wanted = [[float(m(goal.x).softmax(1)[0, 1].detach()) for m in (clean, victim)]
              for goal, victim in zip(goals, victims, strict=True)]  # fmt: skip
    assert max(before for before, _ in wanted) < 0.5
    assert sum(after > 0.5 for _, after in wanted) >= 3
    assert all((victim(test.pixels()).argmax(1) == test.y).float().mean() > 0.9 for victim in victims)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "dp"}, "unknown form 'dp'; choose one of collision, mean-square, original, benchmark"),
        ({"form": "original", "augment": None}, "form 'original' has no bound: pass xi=None"),
        ({"xi": None}, "form 'collision' has a bound: pass xi, e.g. 16/255"),
        ({"form": "benchmark"}, "must not be random: pass augment=None, adapt=None and restarts=1"),
        ({"form": "benchmark", "augment": None, "restarts": 2}, "has one start"),
        ({"watermark": 0.3}, "watermark is for form 'original' or 'benchmark', not 'collision'"),
        ({"form": "benchmark", "augment": None, "beta": 1.0}, "beta is for form 'original', not 'benchmark'"),
        ({"watermark": 1.0}, r"watermark is an opacity in \[0, 1\), not 1.0"),
        ({"beta": -1.0}, "beta is a weight of at least 0, not -1.0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"tau": 0.0}, "tau, the step size, must be positive"),
    ],
)
def test_impossible_settings_are_refused_when_they_are_written(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoisonFrogs(**changes)  # type: ignore[arg-type]
