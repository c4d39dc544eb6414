from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from friends.data.images import LabeledImages


def some(n: int = 12, k: int = 3, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> LabeledImages:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=g)
    return LabeledImages(x, torch.arange(n) % k, tuple("abcdefgh"[:k]), "some")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), TypeError, "torch.float32"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32), TypeError, "torch.int32"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ValueError, r"\(2, 2, 2\)"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ValueError, r"\(3,\)"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 7]), ValueError, "label 7 of row 2 .* 2 cl"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, -1]), ValueError, "label -1 of row 1"),
    ],
)
def test_wrong_types_shapes_and_labels_are_refused(
    x: torch.Tensor, y: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        LabeledImages(x, y, ("a", "b"))


def test_what_it_says_of_itself() -> None:
    data = some()
    assert (len(data), data.shape, data.device.type) == (12, (3, 4, 5), "cpu")
    assert repr(data) == "LabeledImages(some: 12 of (3, 4, 5), 3 classes)"


def test_pixels_are_bytes_over_255() -> None:
    data = some()
    assert torch.equal((data.pixels() * 255).round().byte(), data.x)
    assert torch.equal(data.pixels(torch.tensor([5, 0])), data.x[[5, 0]].float() / 255)
    assert data.pixels().min() >= 0 and data.pixels().max() <= 1


def test_rows_keep_order_and_classes() -> None:
    data = some()
    part = data.rows([7, 2], "two")
    assert torch.equal(part.x, data.x[[7, 2]]) and part.y.tolist() == [1, 2]
    assert (part.classes, part.name, data.rows([0]).name) == (data.classes, "two", "some")


def test_only_classes_renumbers_in_the_order_given() -> None:
    data = some()
    part = data.only_classes(["c", 0])
    assert part.classes == ("c", "a")
    assert part.y.tolist() == [1, 0] * 4  # rows 0, 2, 3, 5, ... in file order
    assert torch.equal(part.x, data.x[(data.y == 2) | (data.y == 0)])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["z"], "unknown class 'z'; the classes are a, b, c"),
        ([3], "class 3 is out of range: there are 3"),
        ([-1], "class -1 is out of range"),
        (["a", 0], "named twice"),
    ],
)
def test_only_classes_refuses(wanted: list[str | int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        some().only_classes(wanted)


def test_only_classes_refuses_a_class_without_images() -> None:
    with pytest.raises(ValueError, match="class 'c' has no image in some"):
        some(n=2).only_classes(["c"])


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_sample_is_balanced_without_repeats_and_in_file_order(
    counts: list[int], seed: int, data: st.DataObject
) -> None:
    total = sum(counts)
    if total == 0:
        return
    n = data.draw(st.integers(1, total))
    y = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    y = y[torch.randperm(total, generator=torch.Generator().manual_seed(seed))]
    x = torch.arange(total, dtype=torch.uint8).view(-1, 1, 1, 1)  # each pixel is its row
    images = LabeledImages(x, y, tuple(map(str, range(len(counts)))))
    got = images.sample(n, torch.Generator().manual_seed(seed))
    rows = got.x.flatten().tolist()
    assert len(rows) == n and rows == sorted(set(rows)) and torch.equal(got.y, y[rows])
    taken = got.y.bincount(minlength=len(counts)).tolist()
    level = max(taken)  # a class that gave fewer than the most generous one gave all, up to one image
    assert all(t >= min(count, level - 1) for t, count in zip(taken, counts, strict=True))


def test_sample_depends_on_the_generator_alone() -> None:
    data = some(n=60)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (data.sample(12, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n", [0, -1, 13])
def test_sample_refuses_what_is_not_there(n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {n} of 12 images of some"):
        some().sample(n, torch.Generator())


def test_fingerprint_sees_every_part_but_the_name() -> None:
    data = some()
    same = LabeledImages(data.x.clone(), data.y.clone(), data.classes, "other name")
    assert data.fingerprint == same.fingerprint
    x, y = data.x.clone(), data.y.clone()
    x[-1, -1, -1, -1] ^= 1
    y[-1] = 0
    changed = [
        LabeledImages(x, data.y, data.classes),
        LabeledImages(data.x, y, data.classes),
        LabeledImages(data.x, data.y, ("a", "b", "x")),
        LabeledImages(data.x.transpose(2, 3).contiguous(), data.y, data.classes),
        LabeledImages(data.x.reshape(12, 3, 5, 4), data.y, data.classes),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in changed)}) == 1 + len(changed)


def test_fingerprint_does_not_depend_on_memory_layout() -> None:
    data = some()
    strided = LabeledImages(data.x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), data.y, data.classes)
    assert not strided.x.is_contiguous() and strided.fingerprint == data.fingerprint


def test_moments_equal_mean_and_population_deviation() -> None:
    data = some(n=50, shape=(3, 7, 5))
    pixels = data.pixels().double().transpose(0, 1).flatten(1)
    mean, std = data.moments
    assert torch.allclose(torch.tensor(mean).double(), pixels.mean(1), atol=1e-7)
    assert torch.allclose(torch.tensor(std).double(), pixels.std(1, correction=0), atol=1e-7)


def test_moments_of_flat_and_of_no_images() -> None:
    flat = LabeledImages(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("a",))
    (mean,), (std,) = flat.moments
    assert mean == pytest.approx(0.2) and std == pytest.approx(1 / 255)  # never divides by zero
    empty = LabeledImages(torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match="no image"):
        _ = empty.moments
