from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from metapoison_slow import margins_by_sgd, numeric_gradient, slow_attack, slow_meta
from torch import Tensor, nn
from torch.nn import functional as F

from friends.attacks import halfway
from friends.attacks.base import Sizes
from friends.attacks.metapoison import SIGNED, MetaPoison
from friends.attacks.perturbed import Perturbed
from friends.attacks.recolour import Recolour
from friends.attacks.staggered import Schooling, Staggered
from friends.attacks.unrolling import Functional, Minibatch, margin, unrolled_margin
from friends.data.files import read_tensors
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.models import Classifier, build
from friends.types import Streams
from interrupting import Stop, stop_at

XI = 24 / 255
QUICK = MetaPoison(xi=XI, budget=0.1, steps=3, surrogates=3, batch=20, recolour=None)
MODES = {"running": False, "batch": True}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 60, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0) -> LabeledImages:
    x = torch.randint(256, (n, *shape), generator=generator(seed), dtype=torch.uint8)
    return LabeledImages(x, torch.arange(n) % 3, ("a", "b", "c"))


def goal_of(data: LabeledImages, count: int = 1) -> Goal:
    x = torch.rand(count, *data.shape, generator=generator(9))
    return Goal(x, torch.zeros(count, dtype=torch.int64), torch.full((count,), 2))


class Networks:
    """A surrogate function that hands out untrained networks and remembers what it was asked."""

    def __init__(self, name: str = "tiny", *, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.dtype = name, dtype
        self.asked: list[tuple[int, int | None]] = []
        self.handed_out: list[Classifier] = []
        self.seen = 0

    def __call__(self, data: LabeledImages, *, index: int = 0, epochs: int | None = None, **_: Any) -> nn.Module:
        self.asked.append((index, epochs))
        model = build(self.name, shape=data.shape, classes=len(data.classes), moments=data.moments, width=4,
                      generator=generator(index)).to(self.dtype)  # fmt: skip
        model.register_forward_hook(lambda _m, inputs, _o: self._count(inputs[0]))
        self.handed_out.append(model)
        return model

    def _count(self, x: Tensor) -> None:
        self.seen += len(x)


def made(
    attack: MetaPoison = QUICK,
    data: LabeledImages | None = None,
    surrogate: Any = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    goal: Goal | None = None,
) -> PoisonedDataset:
    data = images() if data is None else data
    return attack(data, goal or goal_of(data), surrogate=surrogate or Networks(), streams=Streams(seed),
                  checkpoint=checkpoint)  # fmt: skip


def smooth_net(norm: bool, classes: int = 3) -> nn.Module:
    """Small, and smooth enough for finite differences of gradients: no kink anywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, stride=2)]
        if norm:
            layers.append(nn.BatchNorm2d(4))
        return nn.Sequential(*layers, nn.Softplus(), nn.Flatten(), nn.Linear(36, classes)).double().eval()


def batches(count: int, size: int = 5, poisons: int = 2) -> tuple[Tensor, list[Minibatch], Minibatch]:
    """Poisons, what is beside them in ``count`` minibatches of ``size`` images, and two images of a goal."""
    x = torch.rand(poisons + count * size, 3, 8, 8, generator=generator(3), dtype=torch.float64)
    y = torch.arange(count * size) % 3
    beside = [(a, b) for a, b in zip(x[poisons:].split(size), y.split(size), strict=True)]
    goal = torch.rand(2, 3, 8, 8, generator=generator(4), dtype=torch.float64), torch.tensor([2, 1])
    return x[:poisons], beside, goal


# --- the margin ---


def test_the_margin_is_how_far_another_class_is_ahead() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert float(margin(logits, torch.tensor([0]))) == 2
    assert float(margin(logits, torch.tensor([1]))) == -1
    both = margin(logits.expand(2, 3), torch.tensor([0, 1]))
    assert float(both) == 0.5
    # the wanted logit counts as that of no other class, and neither does 0
    assert float(margin(torch.tensor([[-5.0, -7.0]]), torch.tensor([1]))) == 2


def test_the_margin_has_a_floor_below_which_there_is_nothing_to_gain() -> None:
    logits = torch.tensor([[0.0, 150.0], [0.0, 50.0]], requires_grad=True)
    score = margin(logits, torch.tensor([1, 1]))
    assert float(score.detach()) == -75
    gradient = torch.autograd.grad(score, logits)[0]
    assert not gradient[0].any()
    assert gradient[1].tolist() == [0.5, -0.5]


# --- the unrolled steps ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_score_is_what_torchs_sgd_arrives_at(mode: str, steps: int) -> None:
    poisons, beside, goal = batches(steps + 1)
    model = smooth_net(norm=True)
    net = Functional(copy.deepcopy(model), batch_statistics=MODES[mode])
    score = float(unrolled_margin(net, poisons, 2, beside, goal, lr=0.3).detach())
    model.train(mode == "batch")
    minibatches = [(torch.cat([poisons, x]), torch.cat([torch.tensor([2, 2]), y])) for x, y in beside]
    slow = margins_by_sgd(model, minibatches, goal, 0.3, together=mode == "batch")
    assert score == pytest.approx(slow, rel=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("through", ["first", "all"])
def test_the_gradient_is_that_of_finite_differences_of_real_training(mode: str, steps: int, through: Any) -> None:
    poisons, beside, goal = batches(steps + 1)
    model = smooth_net(norm=True)
    net = Functional(copy.deepcopy(model), batch_statistics=MODES[mode])
    leaf = poisons.clone().requires_grad_()
    gradient = torch.autograd.grad(unrolled_margin(net, leaf, 2, beside, goal, lr=0.3, through=through), leaf)[0]
    model.train(mode == "batch")

    def trained(seen: Tensor) -> float:
        later = seen if through == "all" else poisons
        minibatches = [
            (torch.cat([later if k else seen, x]), torch.cat([torch.tensor([2, 2]), y]))
            for k, (x, y) in enumerate(beside)
        ]
        return margins_by_sgd(model, minibatches, goal, 0.3, together=mode == "batch")

    places = [(0, 0, 3, 3), (0, 2, 5, 1), (1, 1, 2, 6), (1, 0, 7, 7)]
    numeric = numeric_gradient(trained, poisons, places)
    assert max(map(abs, numeric)) > 1e-6
    assert [float(gradient[place]) for place in places] == pytest.approx(numeric, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("name", ["tiny", "convnet"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("through", ["first", "all"])
def test_the_quick_way_is_the_slow_one_where_every_image_is_in_the_graph(name: str, mode: str, through: Any) -> None:
    poisons, beside, goal = batches(4)
    model = build(name, shape=(3, 8, 8), classes=3, moments=((0.5,) * 3, (0.25,) * 3), width=4, generator=generator())
    model = model.double().eval()
    net, together = Functional(copy.deepcopy(model), batch_statistics=MODES[mode]), mode == "batch" and name != "tiny"
    leaf = poisons.clone().requires_grad_()
    score = unrolled_margin(net, leaf, 2, beside, goal, lr=0.1, through=through)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = together
    slow = slow_meta(model, leaf, 2, beside, goal, 0.1, together=together, through=through)
    assert float(score.detach()) == pytest.approx(float(slow.detach()), rel=1e-10)
    ours, theirs = torch.autograd.grad(score, leaf)[0], torch.autograd.grad(slow, leaf)[0]
    assert theirs.norm() > 0
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-13)


def test_one_step_of_a_linear_model_has_a_closed_form() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.rand(3, 3, 2, 2, generator=generator(1), dtype=torch.float64)
    poison, clean, target = x[:1].requires_grad_(), x[1:2], x[2:]
    beside = [(clean, torch.tensor([0])), (clean, torch.tensor([0]))]
    net, lr = Functional(model, batch_statistics=True), 0.7
    goal = (target, torch.tensor([1]))
    gradient = torch.autograd.grad(unrolled_margin(net, poison, 1, beside, goal, lr=lr), poison)[0].flatten()
    W, p, t = model[1].weight.detach(), poison.detach().flatten(), target.flatten()
    s = model(poison.detach())[0].softmax(0).detach()
    wrong = s - torch.tensor([0.0, 1.0])  # of the poison's logits
    alike = p @ t + 1  # 1 for the bias
    turned = s[0] * s[1] * (W[0] - W[1])  # d s_0 / d p; d s_1 is its opposite
    closed = -lr / 2 * (2 * turned * alike + (wrong[0] - wrong[1]) * t)
    assert torch.allclose(gradient, closed, rtol=1e-9)


def test_the_order_of_images_in_a_minibatch_does_not_matter() -> None:
    poisons, beside, goal = batches(3)
    for mode in (True, False):
        net = Functional(smooth_net(norm=True), batch_statistics=mode)
        turned = [(x.flip(0), y.flip(0)) for x, y in beside]
        results = []
        for seen, others in ((poisons, beside), (poisons.flip(0), turned)):
            leaf = seen.clone().requires_grad_()
            score = unrolled_margin(net, leaf, 2, others, goal, lr=0.3)
            results.append((float(score.detach()), torch.autograd.grad(score, leaf)[0]))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
        assert torch.allclose(results[0][1], results[1][1].flip(0), rtol=1e-9, atol=1e-14)


def test_poisons_are_in_the_later_steps_whether_or_not_they_are_differentiated_there() -> None:
    poisons, beside, goal = batches(3)
    net = Functional(smooth_net(norm=False), batch_statistics=True)
    leaf = poisons.clone().requires_grad_()
    first, everywhere = (unrolled_margin(net, leaf, 2, beside, goal, lr=0.3, through=t) for t in ("first", "all"))  # type: ignore[arg-type]
    assert float(first.detach()) == float(everywhere.detach())
    a, b = (torch.autograd.grad(score, leaf)[0] for score in (first, everywhere))
    assert (a - b).norm() > 1e-3 * a.norm()
    gone = beside[:1] + [(x[:0], y[:0]) for x, y in beside[1:]]  # a second step on poisons alone still is a step
    alone = unrolled_margin(net, leaf, 2, gone, goal, lr=0.3)
    assert float(alone.detach()) != float(first.detach())


@pytest.mark.parametrize("mode", MODES)
def test_unrolling_leaves_the_model_as_it_was_and_learning_does_not(mode: str) -> None:
    poisons, beside, goal = batches(3)
    model = smooth_net(norm=True)
    net, before = Functional(model, batch_statistics=MODES[mode]), copy.deepcopy(model.state_dict())
    unrolled_margin(net, poisons.requires_grad_(), 2, beside, goal, lr=0.3).backward(inputs=[poisons])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    net.learning(beside[0][0])
    assert not torch.equal(before["1.running_mean"], model.state_dict()["1.running_mean"])


def test_weights_that_are_not_trained_are_no_part_of_it() -> None:
    poisons, beside, goal = batches(2)
    model = smooth_net(norm=False)
    model[0].requires_grad_(False)
    net = Functional(model, batch_statistics=True)
    assert all(name.startswith("model.3") for name in net.weights)
    minibatches = [(torch.cat([poisons, x]), torch.cat([torch.tensor([2, 2]), y])) for x, y in beside]
    slow = margins_by_sgd(model, minibatches, goal, 0.3, together=False)
    assert float(unrolled_margin(net, poisons, 2, beside, goal, lr=0.3).detach()) == pytest.approx(slow, rel=1e-10)
    with pytest.raises(ValueError, match="no parameter of the surrogate requires a gradient"):
        Functional(model.requires_grad_(False), batch_statistics=True)


# --- the surrogates ---


def schooling(**changes: Any) -> Schooling:
    plain = {"surrogates": 3, "stagger": 2, "lr": 0.1, "warmup": 4, "batch": 25, "batch_statistics": True}
    return Schooling(**{**plain, **changes})


@pytest.mark.parametrize("name", ["tiny", "convnet"])
def test_a_surrogate_learns_as_torchs_sgd_does(name: str) -> None:
    data, networks = images(), Networks(name, dtype=torch.float64)
    staggered = Staggered(schooling(), data, networks, Streams(4))
    model = copy.deepcopy(networks.handed_out[0]).train()
    for age in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (age + 1) / 4)
        order = torch.randperm(60, generator=Streams(4)("order", 0, 0, age))
        assert [len(rows) for rows in staggered.minibatches(0)] == [25, 25, 10]
        for rows, expected in zip(staggered.minibatches(0), order.split(25), strict=True):
            assert torch.equal(rows, expected)
            optimizer.zero_grad()
            F.cross_entropy(model(data.pixels(rows).double()), data.y[rows]).backward()
            optimizer.step()
            staggered.learn(0, rows)
        staggered.grow(0)
    ours, theirs = staggered.nets[0].model.state_dict(), model.state_dict()
    assert all(torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-9) for name in theirs)
    assert not torch.equal(ours["head.weight"], networks.handed_out[0].head.weight)


def test_the_learning_rate_rises_in_the_first_epochs() -> None:
    assert [schooling(warmup=5).lr_at(age) for age in range(7)] == pytest.approx(
        [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1]
    )
    assert schooling(warmup=0).lr_at(0) == 0.1


def test_surrogates_are_staggered_and_begin_anew_with_new_weights_at_the_last_age(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Surrogate k is k * stagger + s epochs old in outer step s, up to the last age."""
    ages: list[tuple[int, int]] = []
    unrolled, networks = Staggered.lr, Networks()

    def watched(self: Staggered, k: int) -> float:
        ages.append((k, self.ages[k]))
        return unrolled(self, k)

    monkeypatch.setattr(Staggered, "lr", watched)
    attack = replace(QUICK, surrogates=3, stagger=2, steps=8, batch=60)  # one minibatch an epoch: one look, one step
    made(attack, surrogate=networks)
    grown = [(k, age) for k in range(3) for age in range(2 * k)]
    crafting = [(k, (2 * k + s) % 6) for s in range(8) for k in range(3) for _ in range(2)]
    assert ages == grown + crafting
    assert networks.asked == [(0, 0), (1, 0), (2, 0), (5, 0), (4, 0), (3, 0), (8, 0)]


def test_surrogates_learn_clean_data_whatever_the_poisons_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    kept = []
    for name, xi in (("a", 8 / 255), ("b", 64 / 255)):
        made(replace(QUICK, xi=xi), checkpoint=tmp_path / name)
        kept.append(read_tensors(tmp_path / name / "craft.safetensors")[0])
    weights = [name for name in kept[0] if name.startswith("surrogate-")]
    assert len(weights) >= 3 * 6
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in weights)
    assert not torch.equal(kept[0]["delta"], kept[1]["delta"])


@pytest.mark.parametrize("name", ["tiny", "convnet"])
def test_surrogates_that_were_handed_over_are_left_as_they_were(name: str) -> None:
    networks = Networks(name)
    made(surrogate=networks)
    for index, model in enumerate(networks.handed_out[:3]):
        fresh = Networks(name)(images(), index=index)
        assert all(torch.equal(fresh.state_dict()[key], value) for key, value in model.state_dict().items())
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- the outer loop ---


def test_the_attack_is_the_slow_one() -> None:
    data, networks, streams = images(), Networks(dtype=torch.float64), Streams(0)
    attack = replace(QUICK, steps=5, tau=0.02)
    poisoned = attack(data, goal_of(data), surrogate=networks, streams=streams)
    rows, goal = poisoned.poison_idx, goal_of(data)
    base = data.pixels(rows).double()
    start = (2 * torch.rand(base.shape, generator=streams("init")) - 1).double() * XI
    slow = slow_attack(
        lambda index: Networks(dtype=torch.float64)(data, index=index),  # type: ignore[arg-type]
        data.pixels().double(), data.y, rows, (goal.x.double(), goal.y_wanted),
        order=lambda k, g, age: torch.randperm(60, generator=streams("order", k, g, age)).split(20),
        start=start, xi=XI, steps=5, surrogates=3, unroll=2, lr_at=lambda age: 0.1 * (age + 1) / 5, rate=attack.rate,
    )  # fmt: skip
    assert (slow - (base + start).clamp(0, 1)).abs().max() > 0.02
    assert torch.equal(poisoned.train.x[rows], (slow * 255).round().to(torch.uint8))


def test_the_rate_is_the_authors_at_their_number_of_steps_and_in_proportion_at_others() -> None:
    rates = [MetaPoison().rate(step) * 255 for step in range(61)]
    assert rates[:6] == pytest.approx([8, 32, 72, 128, 200, 200])
    assert (rates[19], rates[20], rates[39], rates[40], rates[60]) == pytest.approx((200, 20, 20, 2, 2))
    few = [replace(QUICK, steps=10).rate(step) * 255 for step in range(10)]
    assert few == pytest.approx([200, 200, 200, 20, 20, 20, 20, 2, 2, 2])
    assert replace(QUICK, steps=1).rate(0) * 255 == pytest.approx(200)
    assert [SIGNED.rate(step) for step in (0, 92, 93, 156, 218)] == pytest.approx([0.1, 0.1, 0.01, 1e-3, 1e-4])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("signed", [False, True])
def test_poisons_move_by_torchs_adam_and_so_do_their_colours(signed: bool) -> None:
    base, how = random(2, 3, 6, 6), Recolour(grid=3, smoothness=2)
    std = torch.tensor([0.2, 0.25, 0.3], dtype=torch.float64).view(1, 3, 1, 1)
    poisons = Perturbed(base, xi=XI, recolour=how, unit=std if signed else None, generator=generator())
    start = poisons.delta.clone()
    assert start.abs().max() < XI + 1e-7
    assert bool((start.abs() == start.abs().max()).double().mean() > 0.2) is signed  # a clipped normal, or uniform
    unit, table_unit = (std, float(std.mean())) if signed else (torch.ones_like(std), 1.0)
    delta, table = (start / unit).requires_grad_(), how.start(base).requires_grad_()
    adam = torch.optim.Adam([delta, table], lr=1e-3)
    for step in range(4):
        gradient = random(2, 3, 6, 6, seed=step) - 0.4
        slope = torch.autograd.grad((how.change(table, base) * gradient).sum() + 3 * 2 * how.roughness(table), table)[0]
        delta.grad, table.grad = gradient * unit, slope * table_unit
        if signed:
            delta.grad, table.grad = delta.grad.sign(), table.grad.sign()
        before = table.detach().clone()
        adam.step()
        with torch.no_grad():
            delta.copy_((delta * unit).clamp(-XI, XI) / unit)
            table.copy_(how.project(before + (table - before) * table_unit))
        poisons.move(gradient, 3, 1e-3)
    assert poisons.table is not None
    assert torch.allclose(poisons.delta, delta.detach() * unit, atol=1e-9)
    assert torch.allclose(poisons.table, table.detach(), atol=1e-9)
    assert poisons.table.abs().max() > 1e-4


def test_it_moves_networks_that_it_has_never_seen(digits: tuple[LabeledImages, LabeledImages], goal: Goal) -> None:
    """What its own surrogates gain counts for nothing: new ones are trained, and asked after every epoch."""
    train, networks = digits[0], Networks()
    attack = MetaPoison(xi=64 / 255, budget=0.1, steps=8, surrogates=3, stagger=3, lr=0.2, batch=50, warmup=2,
                        recolour=None)  # fmt: skip
    poisoned = attack(train, goal, surrogate=networks, streams=Streams(0))

    def along(data: LabeledImages, index: int) -> float:
        model, total = Networks()(data, index=index), 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(9):
            for rows in torch.randperm(len(data), generator=generator(epoch)).split(25):
                optimizer.zero_grad()
                F.cross_entropy(model(data.pixels(rows)), data.y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                total += float(margin(model(goal.x), goal.y_wanted)) / 9
        return total

    clean, ours = (sum(along(data, index) for index in (998, 999)) for data in (train, poisoned.train))
    assert ours < clean - 0.7


# --- what is claimed ---


def test_the_bound_is_that_of_both_perturbations_and_the_additive_one_keeps_its_own() -> None:
    attack = replace(QUICK, recolour=Recolour(grid=4), steps=4)
    data = images()
    poisoned = made(attack, data)
    assert attack.bound == pytest.approx(XI + 3.0321 * 0.04, rel=1e-4)
    assert poisoned.recipe["bound"] == attack.bound
    poisoned.check(data, xi=attack.bound, budget=6)
    with pytest.raises(ValueError, match="more than xi = 24/255"):
        poisoned.check(data, xi=attack.xi)
    without = made(replace(attack, recolour=None), data)
    assert replace(attack, recolour=None).bound == XI
    without.check(data, xi=XI, budget=6)
    assert without.train.fingerprint != poisoned.train.fingerprint


def test_poisons_are_random_images_of_the_wanted_class_or_its_first_ones() -> None:
    data = images()
    first = made(replace(QUICK, bases="first"), data)
    assert first.poison_idx.tolist() == [2, 5, 8, 11, 14, 17]
    some = made(QUICK, data).poison_idx
    assert some.tolist() != first.poison_idx.tolist()
    assert bool((data.y[some] == 2).all())
    prescribed = replace(goal_of(data), bases=torch.tensor([59, 50, 44, 8, 5, 2]))
    assert made(replace(QUICK, bases="first"), data, goal=prescribed).poison_idx.tolist() == [2, 5, 8, 44, 50, 59]


@pytest.mark.parametrize("batchnorm", ["batch", "running"])
def test_the_cost_is_what_enters_the_networks(batchnorm: Any) -> None:
    networks = Networks("convnet")
    attack = replace(
        QUICK, batchnorm=batchnorm, stagger=2, budget=1 / 3, batch=15
    )  # 20 poisons: one in every minibatch
    made(attack, images(), networks, goal=goal_of(images(), 2))
    cost = attack.cost(Sizes(train=60, wanted=20, source=20, goal=2, poisons=20))
    assert cost.passes == pytest.approx(networks.seen, rel=1e-3)
    assert cost.trainings == 0  # or the benchmark would train them first


def test_the_cost_counts_only_minibatches_that_hold_a_poison() -> None:
    """Of one poison in 60 images, a quarter of four minibatches; exactly, whichever it is."""
    networks = Networks()
    attack = replace(QUICK, batchnorm="running", budget=1e-6, batch=15)
    made(attack, images(), networks)
    assert attack.cost(Sizes(train=60, wanted=20, source=20, goal=1, poisons=1)).passes == networks.seen


def test_what_normalises_and_what_is_differentiated_matters() -> None:
    changed = ({}, {"batchnorm": "running"}, {"through": "all"}, {"unroll": 1}, {"stagger": 2}, {"form": "signed"})
    attack, data = replace(QUICK, surrogates=2, steps=2), images(24)
    results = {
        made(replace(attack, **change), data, Networks("convnet")).train.fingerprint  # type: ignore[arg-type]
        for change in changed
    }
    assert len(results) == len(changed)


# --- kills ---


@pytest.mark.parametrize("recolour", [None, Recolour(grid=3)])
def test_a_killed_crafting_goes_on_to_the_same_poisons(
    recolour: Recolour | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while surrogates grow up, within an outer step and at its end."""
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    attack, data = replace(QUICK, recolour=recolour, steps=4), images()
    whole = made(attack, data, Networks("convnet"))
    for step in (2, 4, 8, 9, 13):
        with pytest.raises(Stop):
            attack(data, goal_of(data), surrogate=Networks("convnet"), streams=Streams(0), checkpoint=tmp_path,
                   progress=stop_at(step, "metapoison"))  # fmt: skip
        done = int(read_tensors(tmp_path / "craft.safetensors")[1]["numbers"]["at"])  # type: ignore[call-overload, index]
        assert done == step - 1
    again = made(attack, data, Networks("convnet"), checkpoint=tmp_path)
    assert again.train.fingerprint == whole.train.fingerprint
    assert again.recipe == whole.recipe
    with pytest.raises(ValueError, match="holds another crafting"):
        made(replace(attack, lr=0.2), data, Networks("convnet"), checkpoint=tmp_path)


# --- edges ---


@pytest.mark.parametrize("shape", [(1, 12, 8), (3, 8, 14)])
@pytest.mark.parametrize("recolour", [None, Recolour()])
def test_grey_images_others_that_are_not_square_one_poison_and_several_images_of_a_goal(
    shape: tuple[int, int, int], recolour: Recolour | None
) -> None:
    data = images(shape=shape)
    attack = replace(QUICK, budget=1e-6, recolour=recolour, batch=25)
    poisoned = made(attack, data, goal=goal_of(data, 3))
    poisoned.check(data, xi=attack.bound, budget=1)
    assert len(poisoned.poison_idx) == 1


def test_one_surrogate_and_a_minibatch_of_everything_are_enough() -> None:
    data = images()
    made(replace(QUICK, surrogates=1, batch=1000, unroll=1), data).check(data, xi=XI, budget=6)


def test_what_cannot_work_is_refused_before_surrogates_are_made() -> None:
    data, networks = images(shape=(2, 8, 8)), Networks()
    with pytest.raises(ValueError, match="pass recolour=None"):
        made(replace(QUICK, recolour=Recolour()), data, networks)
    with pytest.raises(ValueError, match="the budget can be at most"):
        made(replace(QUICK, budget=0.9, bases="first"), images(), networks)
    assert networks.asked == []


def test_a_surrogate_that_is_not_finite_stops_the_attack() -> None:
    def broken(data: LabeledImages, *, index: int = 0, **_: Any) -> nn.Module:
        model = Networks()(data, index=index)
        next(model.parameters()).data.fill_(float("nan"))
        return model

    with pytest.raises(
        ValueError, match=r"the objective became nan: a surrogate is not finite; try a lower lr than 0\.1"
    ):
        made(surrogate=broken)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("xi", 8, "did you mean 8/255"),
        ("budget", 0, "budget is a fraction"),
        ("steps", 0, "steps >= 1 and unroll >= 1 expected, not 0"),
        ("unroll", 0, "unroll >= 1"),
        ("surrogates", 0, "surrogates must be at least 1, not 0"),
        ("stagger", 0, "stagger must be at least 1"),
        ("batch", 0, "batch must be at least 1"),
        ("lr", 0, "lr > 0 and warmup >= 0 expected, not 0"),
        ("warmup", -1, "warmup >= 0"),
        ("tau", 0, "tau, the step size, must be positive"),
        ("form", "adam", "unknown form 'adam'; choose one of authors, signed"),
        ("through", "last", "unknown through 'last'; choose one of first, all"),
        ("batchnorm", "eval", "unknown batchnorm 'eval'; choose one of batch, running"),
        ("bases", "nearest", "unknown bases 'nearest'; choose one of random, first"),
    ],
)
def test_impossible_settings_are_refused_when_they_are_written(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaPoison(**{setting: value})
