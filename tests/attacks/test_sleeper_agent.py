from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sleeper_slow import longest, sleeper_agent
from torch import Tensor, nn
from torch.nn import functional as F

from friends.attacks import halfway
from friends.attacks import sleeper_agent as module
from friends.attacks.base import Adaptive, Sizes
from friends.attacks.pixels import initial_delta
from friends.attacks.sleeper_agent import SleeperAgent, triggered_sources
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import Patch, checkerboard
from friends.models import Classifier, build
from friends.noise.lean import PROBE
from friends.types import Streams
from interrupting import Stop, stop_at

XI = 64 / 255
QUICK = SleeperAgent(xi=XI, budget=0.1, steps=6, retrainings=2)
Digits = tuple[LabeledImages, LabeledImages]


class Trained:
    """A surrogate function that trains in a moment, and remembers what it was asked and what it gave."""

    def __init__(self, *, steps: int = 5, stop_at_index: int | None = None) -> None:
        self.steps, self.stop_at_index = steps, stop_at_index
        self.asked: list[tuple[LabeledImages, int, tuple[str, float] | None]] = []
        self.given: list[nn.Module] = []

    def __call__(
        self,
        data: LabeledImages,
        *,
        index: int = 0,
        epochs: int | None = None,
        start: nn.Module | None = None,
        noise: tuple[str, float] | None = None,
    ) -> nn.Module:
        if index == self.stop_at_index:
            raise Stop
        self.asked.append((data, index, noise))
        generator = torch.Generator().manual_seed(index)
        made = build("tiny", shape=data.shape, classes=len(data.classes), moments=data.moments, width=4,
                     generator=generator).double()  # fmt: skip
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                F.cross_entropy(made(data.pixels().double()), data.y).backward()
                optimizer.step()
        made.zero_grad(set_to_none=True)
        self.given.append(made)
        return made

    @property
    def indices(self) -> list[int]:
        return [index for _, index, _ in self.asked]


@pytest.fixture(scope="module")
def small(digits: Digits) -> Digits:
    """120 of the digits to train on, and all others."""
    return digits[0].rows(torch.arange(120)), digits[1]


@pytest.fixture(scope="module")
def backdoor(small: Digits) -> Goal:
    """Twenty test images of a 3 with a patch somewhere, to be taken for a 5."""
    test, trigger = small[1], Patch(checkerboard(6, 1))
    rows = (test.y == 0).nonzero().flatten()[:20]
    x = trigger(test.pixels(rows), torch.Generator().manual_seed(1))
    return Goal(x, test.y[rows], 1 - test.y[rows], trigger, "threes with a patch")


def made(train: LabeledImages, goal: Goal, attack: SleeperAgent = QUICK, **changes: Any) -> PoisonedDataset:
    given = {"surrogate": Trained(), "streams": Streams(5), **changes}
    return attack(train, goal, **given)


@pytest.fixture(scope="module")
def whole(small: Digits, backdoor: Goal) -> PoisonedDataset:
    """What the quick attack makes undisturbed; nobody may change it."""
    return made(small[0], backdoor)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """What gradients of source images were asked for: the model, the images and their labels."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    real: Callable[..., Any] = module.mean_gradient

    def spy(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> list[Tensor]:
        seen.append((model, x, y))
        return real(model, x, y, batch)

    monkeypatch.setattr(module, "mean_gradient", spy)
    return seen


# --- the attack against the slow one ---


@pytest.mark.parametrize("augment", [None, Augment()])
def test_the_attack_is_the_slow_one_retraining_and_all(augment: Augment | None, small: Digits, backdoor: Goal) -> None:
    train, streams, surrogate = small[0], Streams(5), Trained()
    ours = made(train, backdoor, replace(QUICK, augment=augment), surrogate=surrogate)
    of_class = (train.y == 1).nonzero().flatten().tolist()
    rows = torch.tensor(longest(Trained()(train, index=0), train.pixels().double(), of_class, 1, 12))
    assert torch.equal(ours.poison_idx, rows)
    base = train.pixels(rows).double()
    mean, std = (torch.tensor(m, dtype=torch.float64).view(1, -1, 1, 1) for m in train.moments)

    def train_on(poisons: Tensor, before: int) -> nn.Module:
        x = train.x.clone()
        x[rows] = (poisons * 255).round().to(torch.uint8)
        return Trained()(LabeledImages(x, train.y, train.classes), index=before)

    def augmented(pixels: Tensor, step: int) -> Tensor:
        return pixels if augment is None else augment(pixels, streams("augment", 0, step), train.moments[0])

    sources = train.pixels((train.y == 0).nonzero().flatten())
    assert backdoor.trigger is not None
    sources = backdoor.trigger(sources, streams("sources")).double()
    start = initial_delta(base, XI, "randn", streams("init", 0))
    delta = sleeper_agent(base, start, sources, 1, train_on=train_on, augment=augmented, mean=mean, std=std, xi=XI,
                          steps=6, retrainings=2)  # fmt: skip
    assert torch.equal(ours.train.x[rows], ((base + delta) * 255).round().to(torch.uint8))
    assert surrogate.indices == [0, 1, 2]


# --- what makes it silently weak ---


def test_surrogates_are_trained_anew_on_the_poisons_of_that_moment(small: Digits, backdoor: Goal) -> None:
    train, surrogate = small[0], Trained()
    ours = made(train, backdoor, surrogate=surrogate)
    assert surrogate.asked[0][0] is train
    differing: list[set[int]] = []
    for data, _, _ in surrogate.asked[1:]:
        differing.append(set((data.x != train.x).flatten(1).any(1).nonzero().flatten().tolist()))
        assert torch.equal(data.y, train.y)
        assert int((data.x.short() - train.x.short()).abs().max()) <= 64  # bytes, and within the bound
    assert differing == [set(ours.poison_idx.tolist())] * 2
    assert len({data.fingerprint for data, _, _ in surrogate.asked} | {ours.train.fingerprint}) == 4
    never = made(train, backdoor, replace(QUICK, retrainings=0))
    assert torch.equal(never.poison_idx, ours.poison_idx)
    assert not torch.equal(never.train.x, ours.train.x)


def test_no_surrogate_has_the_seed_of_another(small: Digits, backdoor: Goal) -> None:
    surrogate = Trained()
    made(small[0], backdoor, replace(QUICK, surrogates=2, restarts=2), surrogate=surrogate)
    assert sorted(surrogate.indices) == list(range(2 + 2 * 2 * 2))


def test_the_source_gradient_is_taken_anew_for_every_surrogate(
    small: Digits, backdoor: Goal, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, surrogate = recorded(monkeypatch), Trained()
    made(small[0], backdoor, surrogate=surrogate)
    assert [id(model) for model, _, _ in seen] == [id(model) for model in surrogate.given]
    assert all(bool((y == 1).all()) for _, _, y in seen)  # wanted, not true


def test_the_longest_gradients_are_poisoned_and_not_any(small: Digits, backdoor: Goal) -> None:
    train = small[0]
    of_class = (train.y == 1).nonzero().flatten().tolist()
    expected = longest(Trained()(train, index=0), train.pixels().double(), of_class, 1, 12)
    rows = [made(train, backdoor, streams=Streams(seed)).poison_idx.tolist() for seed in (5, 6)]
    assert rows == [expected, expected]
    attack = replace(QUICK, selection="random")
    random = [made(train, backdoor, attack, streams=Streams(seed)).poison_idx.tolist() for seed in (5, 6)]
    assert random[0] != random[1]
    assert expected not in random


def test_prescribed_bases_go_before_the_longest_gradients(small: Digits, backdoor: Goal) -> None:
    bases = (small[0].y == 1).nonzero().flatten()[3:15]
    ours = made(small[0], replace(backdoor, bases=bases))
    assert torch.equal(ours.poison_idx, bases)


def test_every_source_image_has_the_trigger_at_a_place_of_its_own_drawn_once(
    small: Digits, backdoor: Goal, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, seen = small[0], recorded(monkeypatch)
    made(train, backdoor)
    of_class = train.pixels((train.y == 0).nonzero().flatten())
    assert len(seen) == 3
    for _, x, _ in seen:
        assert x is seen[0][1]
        assert len(x) == len(of_class)  # all of them, none of the goal's own
    changed = (seen[0][1] != of_class).any(1)  # what the patch covers, but for pixels that it leaves as they were
    corners = {(int(m.any(1).nonzero()[0]), int(m.any(0).nonzero()[0])) for m in changed}
    assert len(corners) > len(of_class) / 2
    assert torch.equal(triggered_sources(train, backdoor, Streams(5)("sources")), seen[0][1])


def test_gradients_that_a_model_has_do_not_matter_and_stay(
    small: Digits, backdoor: Goal, whole: PoisonedDataset
) -> None:
    """A loop that reads and clears ``.grad`` fails where clearing leaves None, and else leaves it changed."""

    class Dirty(Trained):
        def __call__(self, data: LabeledImages, **settings: Any) -> nn.Module:
            model = super().__call__(data, **settings)
            for p in model.parameters():
                p.grad = torch.full_like(p, 3.0)
            return model

    surrogate = Dirty()
    again = made(small[0], backdoor, surrogate=surrogate)
    assert torch.equal(again.train.x, whole.train.x)
    assert all(bool((p.grad == 3).all()) for model in surrogate.given for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for model in surrogate.given for p in model.parameters())


def test_poisons_and_trigger_survive_a_file(
    small: Digits, backdoor: Goal, whole: PoisonedDataset, tmp_path: Path
) -> None:
    whole.save(tmp_path / "poisons.safetensors")
    back = PoisonedDataset.load(tmp_path / "poisons.safetensors", small[0])
    assert torch.equal(back.train.x, whole.train.x)
    assert torch.equal(back.goal.x, backdoor.x)
    assert isinstance(back.goal.trigger, Patch)
    assert back.goal.trigger.corner is None
    assert torch.equal(back.goal.trigger.pixels, checkerboard(6, 1))
    model = Trained()(whole.train)
    assert torch.equal(model(back.goal.x.double()), model(backdoor.x.double()))


def test_a_backdoor_can_be_told_from_images_that_are_misclassified_anyway(
    small: Digits, backdoor: Goal, whole: PoisonedDataset
) -> None:
    """The goal of the result asks a model that saw no poison the same question: that is its control."""
    assert whole.goal is backdoor
    clean = Trained(steps=60)(small[0])
    assert float((clean(whole.goal.x.double()).argmax(1) == whole.goal.y_wanted).float().mean()) < 0.5


# --- the rest of the loop ---


def test_an_ensemble_divides_the_step_by_its_size_and_retrains_every_member(small: Digits, backdoor: Goal) -> None:
    class Same(Trained):
        def __call__(self, data: LabeledImages, *, index: int = 0, **settings: Any) -> nn.Module:
            self.asked.append((data, index, None))
            return Trained()(data, index=0)

    twins, one = Same(), Same()
    both = made(small[0], backdoor, replace(QUICK, surrogates=2), surrogate=twins)
    half = made(small[0], backdoor, replace(QUICK, tau=0.05), surrogate=one)
    assert torch.equal(both.train.x, half.train.x)
    assert twins.indices == [0, 1, 2, 3, 4, 5]
    assert one.indices == [0, 1, 2]


def test_parts_are_equal_and_the_first_needs_no_training() -> None:
    assert SleeperAgent().retrained_at == [50, 100, 150, 200]
    assert SleeperAgent(retrainings=0).retrained_at == []
    assert SleeperAgent(steps=10, retrainings=3).retrained_at == [2, 5, 7]
    assert SleeperAgent(steps=3, retrainings=2).retrained_at == [1, 2]


def test_each_restart_begins_with_the_clean_surrogate(small: Digits, backdoor: Goal) -> None:
    surrogate = Trained()
    attack = replace(QUICK, restarts=2, augment=None)
    two = made(small[0], backdoor, attack, surrogate=surrogate)
    assert len(two.recipe["score_last"]) == 2  # type: ignore[arg-type]
    assert surrogate.indices == [0, 1, 2, 3, 4]
    one = made(small[0], backdoor, replace(attack, restarts=1))
    assert one.recipe["score_last"][0] == two.recipe["score_last"][0]  # type: ignore[index]


def test_the_surrogates_are_left_as_they_were(bn_net: Classifier, small: Digits, backdoor: Goal) -> None:
    models = [copy.deepcopy(bn_net).train() for _ in range(3)]
    for model in models:
        model.head.bias.requires_grad_(False)
    before = copy.deepcopy(models[0].state_dict())
    made(small[0], backdoor, surrogate=lambda data, *, index=0, **_: models[index])
    for model in models:
        assert all(m.training for m in model.modules())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]


def test_it_makes_the_poisons_gradient_that_of_triggered_images(
    ten_digits: tuple[LabeledImages, LabeledImages, Classifier], given_models: type
) -> None:
    train, test, model = ten_digits
    trigger = Patch(checkerboard(7, 1))
    rows = (test.y == 1).nonzero().flatten()[:10]
    goal = Goal(trigger(test.pixels(rows), torch.Generator().manual_seed(0)), test.y[rows], torch.full_like(rows, 8),
                trigger)  # fmt: skip
    attack = SleeperAgent(xi=XI, budget=0.05, steps=40, retrainings=0, augment=Augment(flip=0, shift=1))
    ours = attack(train, goal, surrogate=given_models(model), streams=Streams(0))
    ours.check(train, xi=XI, budget=50)
    assert ours.recipe["score"] < ours.recipe["score_first"][0] / 2  # type: ignore[index, operator]


# --- an attacker who knows of the defense ---


def test_surrogates_of_an_adaptive_attacker_are_trained_with_the_noise_retrained_ones_too(
    small: Digits, backdoor: Goal, whole: PoisonedDataset
) -> None:
    surrogate = Trained()
    attack = replace(QUICK, adapt=Adaptive(mu=8 / 255))
    noisy = made(small[0], backdoor, attack, surrogate=surrogate)
    assert [noise for _, _, noise in surrogate.asked] == [("bernoulli", 8 / 255)] * 3
    assert not torch.equal(noisy.train.x, whole.train.x)
    alone = Trained()
    made(small[0], backdoor, replace(QUICK, adapt=Adaptive(mu=8 / 255, surrogates=False)), surrogate=alone)
    assert [noise for _, _, noise in alone.asked] == [None] * 3


def test_friendly_noise_of_an_earlier_run_and_several_draws_change_the_poisons(small: Digits, backdoor: Goal) -> None:
    surrogate = Trained()
    attacks = [Adaptive(), Adaptive(zeta=16 / 255), Adaptive(draws=2), Adaptive(zeta=16 / 255, straight_through=True)]
    results = [made(small[0], backdoor, replace(QUICK, adapt=adapt), surrogate=surrogate) for adapt in attacks]
    assert len({result.train.fingerprint for result in results}) == 4
    assert surrogate.indices == [0, 1, 2, 0, 9000, 1, 2, 0, 1, 2, 0, 9000, 1, 2]
    assert len({tuple(result.poison_idx.tolist()) for result in results}) == 1


# --- killed and gone on with ---


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_kill_anywhere_ends_with_the_same_poisons(
    at: int, small: Digits, backdoor: Goal, whole: PoisonedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    surrogate = Trained()
    with pytest.raises(Stop):
        made(small[0], backdoor, checkpoint=tmp_path, progress=stop_at(at, "sleeper agent"))
    again = made(small[0], backdoor, checkpoint=tmp_path, surrogate=surrogate)
    assert torch.equal(again.train.x, whole.train.x)
    assert again.recipe == whole.recipe
    # the state is offered after progress is told, so ``at - 1`` steps are kept: models of parts behind are not trained
    assert surrogate.indices == [0, *[part for part in (1, 2) if at - 1 < 2 * (part + 1)]]


def test_a_kill_while_a_surrogate_is_trained_ends_with_the_same_poisons(
    small: Digits, backdoor: Goal, whole: PoisonedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    for index in (1, 2):
        with pytest.raises(Stop):
            made(small[0], backdoor, checkpoint=tmp_path, surrogate=Trained(stop_at_index=index))
    assert torch.equal(made(small[0], backdoor, checkpoint=tmp_path).train.x, whole.train.x)


def test_state_that_is_written_seldom_goes_back_before_a_retraining(
    small: Digits, backdoor: Goal, whole: PoisonedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 1e9)
    with pytest.raises(Stop):
        made(small[0], backdoor, checkpoint=tmp_path, progress=stop_at(5, "sleeper agent"))
    assert {file.name for file in tmp_path.iterdir()} == {
        "bases.safetensors", "retrained-0-1.safetensors", "retrained-0-2.safetensors"}  # fmt: skip
    assert torch.equal(made(small[0], backdoor, checkpoint=tmp_path).train.x, whole.train.x)


def test_bases_stay_chosen_and_missing_or_foreign_state_is_refused(
    small: Digits, backdoor: Goal, whole: PoisonedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    with pytest.raises(Stop):
        made(small[0], backdoor, checkpoint=tmp_path, progress=stop_at(4, "sleeper agent"))
    other = Trained(steps=0)  # which would choose other bases
    assert torch.equal(made(small[0], backdoor, checkpoint=tmp_path, surrogate=other).poison_idx, whole.poison_idx)
    untouched = Trained()
    with pytest.raises(ValueError, match="holds another crafting"):
        made(small[0], backdoor, replace(QUICK, tau=0.2), checkpoint=tmp_path, surrogate=untouched)
    assert untouched.asked == []


def test_lost_poisons_of_a_retraining_are_an_error(
    small: Digits, backdoor: Goal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    with pytest.raises(Stop):
        made(small[0], backdoor, checkpoint=tmp_path, progress=stop_at(4, "sleeper agent"))
    (tmp_path / "retrained-0-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"retrained-0-1.safetensors is missing, so step 3"):
        made(small[0], backdoor, checkpoint=tmp_path)


# --- cost, edges, bad input ---


@pytest.mark.parametrize("adapt", [None, Adaptive(draws=3), Adaptive(zeta=16 / 255)])
def test_the_cost_is_what_enters_the_surrogates(adapt: Adaptive | None, small: Digits, backdoor: Goal) -> None:
    train, counts = small[0], [0]

    class Counted(Trained):
        def __call__(self, data: LabeledImages, **settings: Any) -> nn.Module:
            model = super().__call__(data, **settings)
            model.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
            return model

    surrogate = Counted()
    attack = replace(QUICK, selection="random", surrogates=2, restarts=2, adapt=adapt)
    made(train, backdoor, attack, surrogate=surrogate)
    source, wanted = (int((train.y == c).sum()) for c in (0, 1))
    sizes = Sizes(train=len(train), wanted=wanted, source=source, goal=len(backdoor), poisons=12)
    cost = attack.cost(sizes)
    looked = 2 * PROBE if adapt and adapt.zeta else 0  # the images with which the network is looked at
    assert 0 <= sum(counts) - cost.passes <= looked
    assert len(surrogate.asked) == cost.trainings
    chosen = replace(attack, selection="max-gradient").cost(sizes)
    assert chosen.gradient - cost.gradient == 2 * wanted  # both surrogates look at every candidate


def test_a_goal_of_several_classes_has_sources_of_all_of_them(
    ten_digits: tuple[LabeledImages, LabeledImages, Classifier],
) -> None:
    train, trigger = ten_digits[0], Patch(checkerboard(4, 1))
    goal = Goal(torch.zeros(2, 1, 28, 28), torch.tensor([3, 7]), torch.tensor([1, 1]), trigger)
    sources = triggered_sources(train, goal, torch.Generator().manual_seed(0))
    assert len(sources) == int((train.y == 3).sum() + (train.y == 7).sum())


@pytest.mark.parametrize("shape", [(1, 20, 28), (3, 24, 16)])
def test_one_poison_of_odd_images_and_a_batch_of_one(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    data = LabeledImages(
        torch.randint(256, (40, *shape), generator=generator, dtype=torch.uint8), torch.arange(40) % 2, ("a", "b")
    )
    trigger = Patch(checkerboard(4, shape[0]))
    goal = Goal(trigger(data.pixels(slice(0, 1)), generator), torch.tensor([0]), torch.tensor([1]), trigger)
    one = made(data, goal, replace(QUICK, budget=1e-6))
    one.check(data, xi=XI, budget=1)
    made(data, goal, replace(QUICK, budget=0.1, batch=1, source_batch=3)).check(data, xi=XI, budget=4)


def test_how_sources_are_batched_changes_nothing(small: Digits, backdoor: Goal, whole: PoisonedDataset) -> None:
    parts = made(small[0], backdoor, replace(QUICK, source_batch=7))
    assert torch.equal(parts.train.x, whole.train.x)


def test_what_cannot_work_is_refused_before_any_training(small: Digits, backdoor: Goal) -> None:
    train, surrogate = small[0], Trained()
    fives = train.rows((train.y == 1).nonzero().flatten())
    for data, goal, attack, message in [
        (train, replace(backdoor, trigger=None), QUICK, "has no trigger, which a backdoor needs"),
        (fives, backdoor, QUICK, "class '3' has no image"),
        (train, backdoor, replace(QUICK, budget=0.9), "the budget can be at most"),
        (train, replace(backdoor, bases=torch.tensor([0, 1])), QUICK, "the goal prescribes 2 bases"),
    ]:
        with pytest.raises(ValueError, match=message):
            made(data, goal, attack, surrogate=surrogate)
    assert surrogate.asked == []


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_when_they_are_written() -> None:
    for settings, message in [
        ({"xi": 16}, "did you mean 16/255"),
        ({"budget": 0}, "budget is a fraction"),
        ({"surrogates": 0}, "surrogates >= 1"),
        ({"source_batch": 0}, "source_batch >= 1"),
        ({"steps": 4, "retrainings": 4}, "less than steps, not 4 of 4 steps"),
        ({"retrainings": -1}, "retrainings is a number from 0"),
        ({"selection": "shortest"}, "unknown selection 'shortest'"),
        ({"init": "uniform"}, "unknown start 'uniform'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SleeperAgent(**settings)
