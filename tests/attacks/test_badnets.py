from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from badnets_slow import badnets
from torch import nn

from friends.attacks.badnets import BadNets, dirty_bases
from friends.attacks.base import Sizes
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.data.triggers import Patch, Trigger, checkerboard, corner_stamp
from friends.types import Streams

CLASSES = ("cat", "dog", "frog", "ship")
SHAPE = (3, 10, 8)
CORNER = corner_stamp(checkerboard(3), SHAPE)


def images(n: int = 80) -> LabeledImages:
    x = torch.randint(256, (n, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return LabeledImages(x, torch.arange(n) % 4, CLASSES)


def goal(sources: list[int], trigger: Trigger | None = CORNER, wanted: int = 2) -> Goal:
    y = torch.tensor(sources)
    x = torch.rand(len(y), *SHAPE, generator=torch.Generator().manual_seed(1))
    if trigger is not None:
        x = trigger(x, torch.Generator().manual_seed(2))
    return Goal(x, y, torch.full_like(y, wanted), trigger, "triggered")


def never(*_: Any, **__: Any) -> nn.Module:
    raise AssertionError("BadNets trains no surrogate")


@pytest.mark.parametrize("budget", [0.0125, 0.1, 0.75])
def test_it_is_the_slow_one(budget: float) -> None:
    train, wanted = images(), goal([0, 1, 3])
    made = BadNets(budget=budget)(train, wanted, surrogate=never, streams=Streams(3))
    rows = made.poison_idx.tolist()
    expected = badnets(train, rows, lambda image: CORNER(image[None], torch.Generator())[0], 2)
    assert made.train.fingerprint == expected.fingerprint
    assert len(rows) == round(budget * 80) == len(set(rows))
    assert rows == sorted(rows)
    made.check(train, xi=None, budget=len(rows), clean_label=False)


def test_poisons_come_from_the_classes_of_the_goal_and_never_from_the_wanted_one() -> None:
    train = images()
    for sources in ([1], [0, 3], [0, 1, 3]):
        made = BadNets(budget=0.2)(train, goal(sources), surrogate=never, streams=Streams(0))
        assert train.y[made.poison_idx].unique().tolist() == sources
        assert bool((made.train.y[made.poison_idx] == 2).all())
    both_ways = Goal(torch.rand(2, *SHAPE), torch.tensor([0, 2]), torch.tensor([2, 0]), CORNER)
    with pytest.raises(ValueError, match="split the goal"):
        BadNets()(train, both_ways, surrogate=never, streams=Streams(0))


def test_poisons_replace_their_bases() -> None:
    """Clean copies left in the training set, with their own labels, would teach against the trigger."""
    train = images()
    made = BadNets(budget=0.1)(train, goal([0]), surrogate=never, streams=Streams(0))
    assert len(made.train) == len(train)
    others = torch.ones(len(train), dtype=torch.bool)
    others[made.poison_idx] = False
    assert torch.equal(made.train.x[others], train.x[others])
    assert torch.equal(made.train.y[others], train.y[others])


def test_the_trigger_in_training_is_that_of_the_test_images_byte_for_byte() -> None:
    train, shown = images(), goal([0, 1, 3])
    made = BadNets(budget=0.1)(train, shown, surrogate=never, streams=Streams(0))
    at_test = (shown.x[0, :, 7:, 5:] * 255).round().to(torch.uint8)
    assert at_test.unique().tolist() == [0, 255]
    for poison in made.train.x[made.poison_idx]:
        assert torch.equal(poison[:, 7:, 5:], at_test)
    assert made.goal is shown


def test_a_trigger_of_no_place_goes_to_many_places_in_training_too() -> None:
    trigger = Patch(torch.ones(3, 3, 3))
    train = replace(images(), x=torch.zeros(80, *SHAPE, dtype=torch.uint8))
    made = BadNets(budget=0.5)(train, goal([0, 1, 3], trigger), surrogate=never, streams=Streams(0))
    poisons = made.train.x[made.poison_idx]
    places = {(int(p[0].amax(1).argmax()), int(p[0].amax(0).argmax())) for p in poisons}
    assert bool((poisons.flatten(1).count_nonzero(1) == 27).all())
    assert len(places) > 15  # of 48


def test_bases_are_random_and_follow_the_stream() -> None:
    train, shown = images(), goal([0, 1, 3])
    runs = [BadNets(budget=0.1)(train, shown, surrogate=never, streams=Streams(s)).poison_idx for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    counts = torch.zeros(80)
    for seed in range(200):
        counts[dirty_bases(train, shown, 2, 0.1, torch.Generator().manual_seed(seed))] += 1
    assert int(counts[2::4].max()) == 0
    assert float(counts[torch.arange(80) % 4 != 2].min()) > 10  # each of the 60 is expected 27 times


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_done_is_said_with_the_way_out() -> None:
    train = images()

    def attack(shown: Goal, budget: float = 0.1) -> object:
        return BadNets(budget=budget)(train, shown, surrogate=never, streams=Streams(0))

    with pytest.raises(ValueError, match="the goal 'triggered' has no trigger, which BadNets needs"):
        attack(goal([0], trigger=None))
    with pytest.raises(ValueError, match=r"asks for 40 poisons, but there are only 20 images of 'cat' in images: the "
                                         r"budget can be at most 0\.25"):  # fmt: skip
        attack(goal([0]), budget=0.5)
    for bases, words in [
        ([0, 1], "prescribes 2 bases, but the budget is 8 poisons: a budget of 0.025"),
        ([0, 1, 3, 4, 5, 7, 8, 10], "prescribes row 10 as a base, which is of the wanted class already"),
        ([0, 1, 3, 4, 5, 7, 8, 99], "prescribes row 99, but there are 80 training images"),
    ]:
        with pytest.raises(ValueError, match=words):
            attack(replace(goal([0]), bases=torch.tensor(bases)))
    with pytest.raises(ValueError, match=r"not 5; did you mean 0\.05"):
        BadNets(budget=5)


def test_prescribed_bases_may_be_of_any_other_class() -> None:
    bases = torch.tensor([7, 4, 0, 1, 3, 5, 8, 9])
    made = BadNets(budget=0.1)(images(), replace(goal([0]), bases=bases), surrogate=never, streams=Streams(0))
    assert made.poison_idx.tolist() == [0, 1, 3, 4, 5, 7, 8, 9]


@pytest.mark.parametrize("shape", [(1, 9, 14), (3, 14, 9)])
def test_grey_and_oblong_images(shape: tuple[int, int, int]) -> None:
    train = LabeledImages(torch.full((9, *shape), 100, dtype=torch.uint8), torch.arange(9) % 3, ("a", "b", "c"))
    stamp = corner_stamp(checkerboard(3, shape[0]), shape, corners="all")
    shown = Goal(stamp(torch.rand(1, *shape), torch.Generator()), torch.tensor([0]), torch.tensor([1]), stamp)
    made = BadNets(budget=0.01)(train, shown, surrogate=never, streams=Streams(0))
    assert len(made.poison_idx) == 1
    assert int((made.train.x[made.poison_idx] != 100).sum()) == shape[0] * 36


def test_it_costs_nothing() -> None:
    cost = BadNets().cost(Sizes(train=100, wanted=10, source=10, goal=5, poisons=5))
    assert cost.passes == 0 and cost.trainings == 0
