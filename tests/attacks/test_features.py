from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from features_slow import stages
from torch import Tensor, nn

from friends.attacks import features as shared
from friends.attacks import halfway
from friends.attacks.adaptive import Adaptive
from friends.attacks.base import ManyGoals, Sizes
from friends.attacks.bullseye_polytope import AUTHORS, BullseyePolytope
from friends.attacks.convex_polytope import ConvexPolytope
from friends.attacks.features import centres, features, lengths, nearest_bases, stage_ends
from friends.attacks.poison_frogs import BENCHMARK, ORIGINAL, PoisonFrogs
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.models import MODELS, Classifier, build
from friends.noise.friendly import RELEASED
from friends.types import Streams
from interrupting import Stop, stop_at

XI = 64 / 255
KEPT = {"xi": XI, "budget": 0.05, "steps": 6}
ATTACKS: dict[str, Any] = {
    "bullseye": BullseyePolytope(**KEPT, restarts=2),
    "bullseye-authors": replace(AUTHORS, **KEPT, layers="last-two"),
    "frogs": PoisonFrogs(**KEPT, restarts=2),
    "frogs-mean-square": PoisonFrogs(**KEPT, form="mean-square"),
    "frogs-original": replace(ORIGINAL, budget=0.05, steps=6),
    "frogs-benchmark": replace(BENCHMARK, **KEPT, tau=0.1),
    "polytope": ConvexPolytope(**KEPT, tol=1e-3),
    "polytope-signed": ConvexPolytope(**KEPT, signed=True, tau=0.1, tol=1e-3, layers="all"),
}
Digits = tuple[LabeledImages, LabeledImages]


@pytest.fixture(scope="module")
def four(digits: Digits) -> list[Goal]:
    """Two threes that are to be fives, and two fives that are to be threes; the first has two images."""
    test = digits[1]
    by_label = [(test.y == label).nonzero().flatten()[:3] for label in (0, 1)]
    return [
        Goal(test.pixels(some), test.y[some], 1 - test.y[some], name=f"digits {some.tolist()}")
        for rows in by_label
        for some in (rows[:2], rows[2:])
    ]


# --- stages ---


@pytest.mark.parametrize("name", MODELS)
def test_the_stages_are_what_the_layers_make(name: str) -> None:
    model = build(name, shape=(3, 32, 32), classes=3, moments=((0.5,) * 3, (0.2,) * 3), width=4,
                  generator=torch.Generator().manual_seed(0)).eval()  # fmt: skip
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    slow = stages(model, x)
    every, two, last = (features(model, x, layers) for layers in ("all", "last-two", "penultimate"))
    assert len(every) == len(slow) == {"resnet18": 9, "alexnet": 7, "lenet": 4, "convnet": 4, "tiny": 2}[name]
    for ours, theirs in zip([*every, *two, *last], [*slow, *slow[-2:], *slow[-1:]], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(last[0], model.features(x))
    assert not any(module._forward_hooks for module in model.modules())  # nothing is left behind


class Foreign(nn.Module):
    """A network of somebody else: nested stages, a flattening that is no module, no ``features()``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), nn.Conv2d(4, 5, 3))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer1(self.bn1(self.conv1(x)))).flatten(1))


def test_a_foreign_network_has_stages_too() -> None:
    model, x = Foreign().eval(), torch.rand(2, 3, 12, 12)
    assert stage_ends(model) == [model.bn1, model.layer1[0][1], model.pool]
    first, second, last = features(model, x, "all")
    assert torch.equal(first, model.bn1(model.conv1(x)).flatten(1))
    assert torch.equal(second, model.layer1[0](model.bn1(model.conv1(x))).flatten(1))
    assert torch.equal(model.fc(last), model(x))


def test_a_network_without_earlier_stages_is_refused_where_they_are_wanted() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    assert features(model, torch.rand(2, 3, 2, 2), "penultimate")[0].shape == (2, 4)
    with pytest.raises(ValueError, match="Sequential shows no stage before its last: use layers = 'penultimate'"):
        features(model, torch.rand(2, 3, 2, 2), "all")


def test_the_goals_feature_is_the_mean_of_its_images_as_they_are(tiny_net: Classifier, four: list[Goal]) -> None:
    slow = [torch.stack([f.mean(0) for f in own]) for own in zip(*(stages(tiny_net, g.x) for g in four), strict=True)]
    for layers, theirs in (("all", slow), ("penultimate", slow[-1:])):
        for ours, stage in zip(centres(tiny_net, four, layers), theirs, strict=True):
            assert torch.allclose(ours, stage, atol=1e-6)
    with pytest.raises(ValueError, match="the goal's feature is 0 everywhere"):
        lengths(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


# --- bases ---


def test_the_nearest_bases_are_the_nearest_ones(
    tiny_net: Classifier, bn_net: Classifier, digits: Digits, four: list[Goal]
) -> None:
    train, goal = digits[0], four[0]
    away: dict[int, float] = {}
    for row in (train.y == 1).nonzero().flatten().tolist():
        distances = []
        for model in (tiny_net, bn_net):
            with torch.no_grad():
                wanted = model.features(goal.x).mean(0)
                distances.append(
                    float((model.features(train.pixels(slice(row, row + 1)))[0] - wanted).norm() / wanted.norm())
                )
        away[row] = sum(distances)
    chosen = nearest_bases([tiny_net, bn_net], train, goal, 0.03)
    assert chosen.tolist() == sorted(sorted(away, key=away.__getitem__)[:12])


@pytest.mark.parametrize("name", ["bullseye", "frogs", "frogs-original", "polytope"])
def test_bases_may_be_the_nearest_unless_they_are_prescribed(
    name: str, tiny_net: Classifier, digits: Digits, goal: Goal, given_models: type
) -> None:
    train, attack = digits[0], replace(ATTACKS[name], bases="nearest")
    made = attack(train, goal, surrogate=given_models(tiny_net), streams=Streams(0))
    assert torch.equal(made.poison_idx, nearest_bases([tiny_net], train, goal, 0.05))
    given = given_models(tiny_net)
    prescribed = replace(goal, bases=(train.y == 1).nonzero().flatten()[:20])
    with pytest.raises(ValueError, match="the goal prescribes its bases: bases = 'nearest' cannot choose others"):
        attack(train, prescribed, surrogate=given, streams=Streams(0))
    assert given.asked == []
    made = ATTACKS[name](train, prescribed, surrogate=given, streams=Streams(0))
    assert torch.equal(made.poison_idx, prescribed.bases)


# --- many goals at once ---


def alone(
    attack: Any, train: LabeledImages, goals: Sequence[Goal], surrogate: Any, seeds: Sequence[int]
) -> list[PoisonedDataset]:
    return [attack(train, goal, surrogate=surrogate, streams=Streams(seed))
            for goal, seed in zip(goals, seeds, strict=True)]  # fmt: skip


def differing(one: PoisonedDataset, other: PoisonedDataset) -> float:
    """The share of the poisons' bytes that differ."""
    rows = one.poison_idx
    assert torch.equal(rows, other.poison_idx)
    return float((one.train.x[rows] != other.train.x[rows]).float().mean())


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("together", [512, 40])
def test_many_goals_are_one_goal_after_the_other(
    name: str, together: int, tiny_net: Classifier, digits: Digits, four: list[Goal], given_models: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whether all four go together or two by two. Networks round differently in batches of another size."""
    monkeypatch.setattr(shared, "TOGETHER", together)
    train, attack, seeds = digits[0], ATTACKS[name], [3, 1, 4, 1]
    model = copy.deepcopy(tiny_net).double()  # in float32 the rounding would be seen in single bytes
    single = alone(attack, train, four, given_models(model), seeds)
    given = given_models(model)
    assert isinstance(attack, ManyGoals)
    many = attack.many(train, four, surrogate=given, streams=[Streams(seed) for seed in seeds])
    assert len(given.asked) == 1  # the surrogate is trained once for all
    for one, other, goal in zip(single, many, four, strict=True):
        assert other.goal is goal
        assert torch.equal(one.train.x, other.train.x)
        assert other.recipe.keys() == one.recipe.keys()
        assert other.recipe["score"] == pytest.approx(one.recipe["score"], rel=1e-6)
    assert len({one.train.fingerprint for one in many}) == 4


@pytest.mark.parametrize("name", ATTACKS)
def test_in_single_precision_many_goals_differ_from_one_by_rounding_alone(
    name: str, tiny_net: Classifier, digits: Digits, four: list[Goal], given_models: type
) -> None:
    surrogate = given_models(tiny_net)
    single = alone(ATTACKS[name], digits[0], four, surrogate, [0, 1, 2, 3])
    many = ATTACKS[name].many(digits[0], four, surrogate=surrogate, streams=[Streams(seed) for seed in range(4)])
    assert max(differing(one, other) for one, other in zip(single, many, strict=True)) < 1e-3


def test_each_goal_has_its_own_streams(
    tiny_net: Classifier, digits: Digits, four: list[Goal], given_models: type
) -> None:
    attack, surrogate = ATTACKS["bullseye"], given_models(tiny_net)
    same, other = (attack.many(digits[0], four[:2], surrogate=surrogate, streams=[Streams(0), Streams(seed)])
                   for seed in (0, 9))  # fmt: skip
    assert torch.equal(same[0].poison_idx, same[1].poison_idx)  # one class, one seed
    assert same[0].train.fingerprint == other[0].train.fingerprint
    assert not torch.equal(same[1].poison_idx, other[1].poison_idx)


def test_more_poisons_than_a_batch_are_batches_of_each_goal(
    tiny_net: Classifier, digits: Digits, four: list[Goal], given_models: type
) -> None:
    model = copy.deepcopy(tiny_net).double()
    for name in ("bullseye", "polytope", "frogs-benchmark"):
        attack = replace(ATTACKS[name], batch=8)
        single = alone(attack, digits[0], four, given_models(model), [0, 1, 2, 3])
        many = attack.many(digits[0], four, surrogate=given_models(model), streams=[Streams(s) for s in range(4)])
        assert [m.train.fingerprint for m in many] == [s.train.fingerprint for s in single]


@pytest.mark.parametrize("name", ["bullseye", "frogs-original", "polytope-signed"])
def test_a_killed_crafting_of_many_goals_goes_on_to_the_same_poisons(
    name: str, tiny_net: Classifier, digits: Digits, four: list[Goal], given_models: type, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    monkeypatch.setattr(shared, "TOGETHER", 40)  # two groups of two
    attack, surrogate, told = ATTACKS[name], given_models(tiny_net), list[tuple[int, int]]()
    streams = [Streams(seed) for seed in range(4)]
    whole = attack.many(digits[0], four, surrogate=surrogate, streams=streams,
                        progress=lambda what, done, total, note="": told.append((done, total)))  # fmt: skip
    total = told[-1][1]
    assert told == [(done, total) for done in range(1, total + 1)]
    what = "poison frogs" if "frogs" in name else ("convex polytope" if "polytope" in name else "bullseye polytope")
    for step in (2, total // 2 - 1, total // 2, total // 2 + 1, total - 1):
        with pytest.raises(Stop):
            attack.many(digits[0], four, surrogate=surrogate, streams=streams, checkpoint=tmp_path,
                        progress=stop_at(step, what))  # fmt: skip
    again = attack.many(digits[0], four, surrogate=surrogate, streams=streams, checkpoint=tmp_path)
    assert [a.train.fingerprint for a in again] == [w.train.fingerprint for w in whole]
    assert [a.recipe for a in again] == [w.recipe for w in whole]
    with pytest.raises(ValueError, match="holds another crafting"):
        attack.many(digits[0], four, surrogate=surrogate, streams=streams[::-1], checkpoint=tmp_path)


def test_goals_that_do_not_fit_are_refused_before_anything_is_trained(
    tiny_net: Classifier, digits: Digits, four: list[Goal], given_models: type
) -> None:
    given, attack = given_models(tiny_net), ATTACKS["frogs"]
    with pytest.raises(ValueError, match="one family of streams for each goal expected, not 1 for 2 goals"):
        attack.many(digits[0], four[:2], surrogate=given, streams=[Streams(0)])
    with pytest.raises(ValueError, match="not 0 for 0 goals"):
        attack.many(digits[0], [], surrogate=given, streams=[])
    bad = replace(four[1], y_wanted=torch.tensor([5]))
    with pytest.raises(ValueError, match="the goal wants class 5"):
        attack.many(digits[0], [four[0], bad], surrogate=given, streams=[Streams(0)] * 2)
    assert given.asked == []


# --- what they cost, and what they leave alone ---


class Counting:
    """A surrogate function whose networks count the images that enter them."""

    def __init__(self, model: Classifier) -> None:
        self.model, self.images = model, 0

    def __call__(self, data: LabeledImages, **_: Any) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.normalize.register_forward_pre_hook(self.count)
        return model

    def count(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images += len(inputs[0])


ADAPT = Adaptive(zeta=8 / 255, draws=2, settings=replace(RELEASED, steps=3))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in ATTACKS),
        ("bullseye", {"surrogates": 2, "layers": "all", "batch": 8}),
        ("bullseye", {"adapt": ADAPT}),
        ("frogs", {"bases": "nearest", "surrogates": 2}),
        ("frogs", {"adapt": ADAPT}),
        ("frogs-benchmark", {"bases": "nearest", "batch": 8, "surrogates": 3}),
        ("polytope-signed", {"restarts": 2, "batch": 8}),
        ("polytope-signed", {"adapt": ADAPT, "surrogates": 2}),
    ],
)
def test_the_cost_is_what_is_counted(
    name: str, changes: dict[str, Any], tiny_net: Classifier, digits: Digits, four: list[Goal]
) -> None:
    attack, surrogate = replace(ATTACKS[name], **changes), Counting(tiny_net)
    made = attack(digits[0], four[0], surrogate=surrogate, streams=Streams(0))
    wanted = int((digits[0].y == 1).sum())
    sizes = Sizes(train=400, wanted=wanted, source=400 - wanted, goal=2, poisons=20)
    assert len(made.poison_idx) == 20
    assert surrogate.images == attack.cost(sizes).passes > 0
    assert attack.cost(sizes).trainings == attack.surrogates + ("adapt" in changes)


@pytest.mark.parametrize("name", ATTACKS)
def test_normalisation_dropout_and_weights_stay_as_they_are(
    name: str, digits: Digits, goal: Goal, given_models: type
) -> None:
    """Surrogates come in training mode; their features are nonetheless those of evaluation, and nothing drifts."""
    train = digits[0]
    model = build("convnet", shape=train.shape, classes=2, moments=train.moments, width=4,
                  generator=torch.Generator().manual_seed(0)).train()  # fmt: skip
    model.body.insert(4, nn.Dropout(0.5))  # type: ignore[union-attr, operator]
    before, surrogate = copy.deepcopy(model.state_dict()), given_models(model)
    first, again = (ATTACKS[name](train, goal, surrogate=surrogate, streams=Streams(0)) for _ in range(2))
    assert first.train.fingerprint == again.train.fingerprint  # no dropout was drawn
    quiet = copy.deepcopy(model).eval()
    assert ATTACKS[name](train, goal, surrogate=given_models(quiet), streams=Streams(0)).train.fingerprint == (
        first.train.fingerprint
    )
    for used in surrogate.handed_out:
        assert all(torch.equal(before[key], value) for key, value in used.state_dict().items())
        assert used.training
        assert all(p.requires_grad and p.grad is None for p in used.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in used.modules())


@pytest.mark.parametrize("name", ["bullseye", "frogs", "polytope-signed"])
def test_an_attacker_who_knows_of_the_defense_crafts_other_poisons(
    name: str, tiny_net: Classifier, digits: Digits, goal: Goal
) -> None:
    asked: list[object] = []

    def surrogate(data: LabeledImages, *, noise: object = None, **_: Any) -> nn.Module:
        asked.append(noise)
        return tiny_net

    plain, adaptive = replace(ATTACKS[name], steps=3), replace(ATTACKS[name], steps=3, adapt=Adaptive(mu=32 / 255))
    made = [attack(digits[0], goal, surrogate=surrogate, streams=Streams(0)) for attack in (plain, adaptive)]
    assert asked == [None, ("bernoulli", 32 / 255)]
    assert differing(*made) > 0.05
    made[1].check(digits[0], xi=XI, budget=20)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [BullseyePolytope, PoisonFrogs, ConvexPolytope])
def test_impossible_settings_that_all_share_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="at least one surrogate is needed, not 0"):
        kind(surrogates=0)
    with pytest.raises(ValueError, match="unknown bases 'near'; choose one of random, nearest"):
        kind(bases="near")
    with pytest.raises(ValueError, match=r"did you mean 0\.05"):
        kind(budget=5)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        kind(batch=0)
    with pytest.raises(ValueError, match="did you mean 16/255"):
        kind(xi=16)
    if kind is not PoisonFrogs:
        with pytest.raises(ValueError, match="unknown layers 'first'; choose one of penultimate, last-two, all"):
            kind(layers="first")
