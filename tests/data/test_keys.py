"""The standard keys, against the authors' recipe written out with the generator that it uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from friends.data.images import LabeledImages
from friends.data.keys import CLASSES, STANDARD_KEYS, goal_of_key, standard_key

KEYS = list(STANDARD_KEYS)


def numbered(per_class: int, classes: int = 10, *, order: str = "sorted") -> LabeledImages:
    """Images of 1x2x2 pixels whose first three bytes tell class and rank; classes sorted, or in turn."""
    y = torch.arange(classes).repeat_interleave(per_class)
    rank = torch.arange(per_class).repeat(classes)
    if order == "mixed":
        places = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        y = y[places]
        rank = torch.zeros_like(y)
        for c in range(classes):
            rank[y == c] = torch.arange(per_class)
    x = torch.stack([y, rank // 256, rank % 256, torch.zeros_like(y)], 1).to(torch.uint8).view(-1, 1, 2, 2)
    return LabeledImages(x, y, tuple(f"class {c}" for c in range(classes)), "numbered")


def told(x: torch.Tensor) -> tuple[int, int]:
    """Class and rank of a numbered image."""
    c, high, low, _ = x.flatten().tolist()
    return int(c), int(high) * 256 + int(low)


def test_there_are_twenty_keys_and_each_is_what_the_table_says() -> None:
    assert len(KEYS) == 20
    for key, row in STANDARD_KEYS.items():
        found = standard_key(key)
        assert (found.target_class, found.wanted_class, found.target_rank) == row
        assert found.key == key
        assert len(found.base_ranks.unique()) == 500
        assert 0 <= int(found.base_ranks.min()) <= int(found.base_ranks.max()) < 5000
    assert standard_key(KEYS[0]).base_ranks[:3].tolist() == [1997, 1682, 1863]
    assert len({tuple(standard_key(key).base_ranks.tolist()) for key in KEYS}) == 20


@pytest.mark.parametrize("key", [2000000000, 3111111111, 0, 2**32 - 5])
def test_the_recipe_is_the_authors(key: int) -> None:
    generator = np.random.RandomState(key + 4)
    target_class = generator.randint(10)
    others = list(range(10))
    others.remove(target_class)
    wanted = generator.choice(others)
    bases = generator.choice(list(range(5000)), size=500, replace=False)
    rank = generator.choice(list(range(1000)), size=1, replace=False)
    found = standard_key(key)
    assert (found.target_class, found.wanted_class, found.target_rank) == (target_class, wanted, rank[0])
    assert found.base_ranks.tolist() == bases.tolist()


def test_fewer_bases_are_the_first_of_more_and_leave_the_target() -> None:
    many, few = standard_key(KEYS[3], 500), standard_key(KEYS[3], 50)
    assert torch.equal(many.base_ranks[:50], few.base_ranks)
    assert many.target_rank == few.target_rank


def test_numpys_global_generator_is_left_alone() -> None:
    before = np.random.get_state()  # noqa: NPY002
    standard_key(KEYS[0])
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("order", ["sorted", "mixed"])
@pytest.mark.parametrize("key", [KEYS[0], KEYS[7], KEYS[19]])
def test_a_goal_names_images_by_rank_whatever_the_order_of_the_classes(key: int, order: str) -> None:
    train, test = numbered(5000, order=order), numbered(1000, order=order)
    goal = goal_of_key(key, train, test)
    expected = standard_key(key)
    assert told(goal.x * 255) == (expected.target_class, expected.target_rank)
    assert (int(goal.y_true), int(goal.y_wanted)) == (expected.target_class, expected.wanted_class)
    assert goal.bases is not None
    assert [told(train.x[row]) for row in goal.bases] == [
        (expected.wanted_class, rank) for rank in expected.base_ranks.tolist()
    ]
    assert goal.name.startswith(f"key {key}, test image ")
    assert f"class {expected.target_class} → class {expected.wanted_class}" in goal.name


def test_the_budget_is_the_number_of_bases_rounded_up() -> None:
    train, test = numbered(5000), numbered(1000)
    assert [len(goal_of_key(KEYS[0], train, test, budget).bases) for budget in (0.01, 0.0001, 0.00011, 0.1)] == [
        500, 5, 6, 5000]  # fmt: skip
    with pytest.raises(ValueError, match="cannot draw 5500 of 5000 training images"):
        goal_of_key(KEYS[0], train, test, 0.11)


def test_other_data_is_refused_unless_it_is_asked_for() -> None:
    train, test = numbered(5000), numbered(1000)
    few = numbered(50)
    with pytest.raises(
        ValueError, match=r"need 5000 images of every class, numbered has 50 of 'class 0': pass subset="
    ):
        goal_of_key(KEYS[0], few, test)
    with pytest.raises(ValueError, match=r"need 1000 images of every class, numbered has 50 of 'class 0'"):
        goal_of_key(KEYS[0], train, few)
    with pytest.raises(ValueError, match=rf"for the {CLASSES} classes of CIFAR-10, numbered has 3"):
        goal_of_key(KEYS[0], numbered(5000, 3), numbered(1000, 3))


@pytest.mark.parametrize("key", KEYS)
def test_a_subset_keeps_the_class_pair_and_draws_the_rest_from_what_there_is(key: int) -> None:
    goal = goal_of_key(key, numbered(50), numbered(20), subset=True)
    assert (int(goal.y_true), int(goal.y_wanted)) == STANDARD_KEYS[key][:2]
    expected = standard_key(key, 5, train_per_class=50, test_per_class=20)
    assert told(goal.x * 255) == (expected.target_class, expected.target_rank)
    assert goal.bases is not None
    assert [told(numbered(50).x[row])[1] for row in goal.bases] == expected.base_ranks.tolist()


@pytest.mark.usefixtures("unchecked")
def test_impossible_numbers_are_refused() -> None:
    for key in (-1, 2**32 - 4):
        with pytest.raises(ValueError, match=f"a key is a whole number in .*, not {key}"):
            standard_key(key)
    with pytest.raises(ValueError, match="cannot draw 0 of 5000"):
        standard_key(0, 0)
    with pytest.raises(ValueError, match="two classes and one test image are needed, not 1 and 1000"):
        standard_key(0, classes=1)
    with pytest.raises(ValueError, match="not 10 and 0"):
        standard_key(0, test_per_class=0)


def test_the_keys_fit_the_real_data(cifar10_labels: tuple[LabeledImages, LabeledImages]) -> None:
    train, test = cifar10_labels
    for key in KEYS:
        goal = goal_of_key(key, train, test)
        assert goal.bases is not None
        assert bool((train.y[goal.bases] == goal.y_wanted).all())
        assert len(goal.bases) == 500


@pytest.fixture(scope="module")
def cifar10_labels(cifar10: object) -> tuple[LabeledImages, LabeledImages]:
    """The real labels of CIFAR-10 in file order, with a pixel each instead of the photographs."""
    import pyarrow.parquet as pq

    found: list[LabeledImages] = []
    for split in ("train", "test"):
        table = pq.read_table(f"{cifar10}/{split}.parquet")
        column = next(name for name in table.column_names if name in ("label", "labels", "fine_label"))
        y = torch.tensor(table[column].to_pylist(), dtype=torch.int64)
        found.append(LabeledImages(torch.zeros(len(y), 1, 1, 1, dtype=torch.uint8), y, tuple(map(str, range(10)))))
    return found[0], found[1]
