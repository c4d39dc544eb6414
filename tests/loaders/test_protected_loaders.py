"""Every emitted image is its clean twin plus its row of friendly noise plus random noise, whatever the loader."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from loader_stand_ins import (
    DATA,
    MEAN,
    STD,
    Columnar,
    Columns,
    Handmade,
    N,
    Normalize,
    Pictures,
    ToTensor,
    Wrapped,
    augmented,
    collate_columns,
    create_loader,
    marked,
    net,
)
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import friends
from friends.loaders.session import session_of
from friends.noise.store import NoiseStore

MU = 16 / 255
QUICK = friends.FriendlySettings(steps=2)


def defended(**options) -> friends.Friends:
    return friends.Friends(**{"def_epoch": 0, "settings": QUICK, "mu": MU, **options})


# ---- the slow truth: every way to flip and crop, one of which must fit


def variants(x: Tensor) -> Tensor:
    """All images that one pixel of padding, a crop and a flip can make of an image."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    h, w = x.shape[-2:]
    crops = [padded[:, top : top + h, left : left + w] for top in range(3) for left in range(3)]
    return torch.stack([v for crop in crops for v in (crop, crop.flip(-1))])


def explained(image: Tensor, label: int, grey: Tensor, mu: float, *, clipped: bool = False) -> bool:
    """Whether an emitted image (in pixels) is some variant of (image + friendly noise) +- mu, and mu only there."""
    clean = ((DATA.x[label].float() + grey) / 255).clamp(0, 1)
    inside, base = variants(torch.ones_like(clean)), variants(clean)
    if not clipped:
        return bool(((image - base).abs() - mu * inside).abs().amax((1, 2, 3)).min() < 1e-5)
    low, high = (base - mu * inside).clamp(0, 1), (base + mu * inside).clamp(0, 1)
    off = torch.minimum((image - low).abs(), (image - high).abs())
    return bool(off.amax((1, 2, 3)).min() < 1e-5)


def assert_explained(
    batches: Iterable, noise: Tensor | None, rows: dict[int, int], mu: float = MU, *, clipped: bool = False
) -> list[int]:
    """Every image of normalised batches; ``rows`` gives the row of a label. Returns the labels in order."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    labels: list[int] = []
    for x, y in batches:
        for image, label in zip(x, y.tolist(), strict=True):
            grey = torch.zeros(3, 8, 8) if noise is None else noise[rows[label]].float()
            assert explained(image * std + mean, label, grey, mu, clipped=clipped), label
            labels.append(label)
    return labels


def trained(loader, data_set, *, epochs: int = 2, clipped: bool = False, **options) -> list[list[int]]:
    """Protect, and look at every image of an epoch without and one with friendly noise."""
    defense = defended(def_epoch=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if clipped else "error")
        protected = defense.protect(loader)
    with defense.paused():  # also tells the row of each label
        order = [protected_row(protected, row) for row in range(len(data_set))]
    rows = {label: row for row, label in enumerate(order)}
    seen: list[list[int]] = []
    for _ in defense.epochs(net(), epochs):
        store = session_of(defense).store
        noise = None if store is None else store.tensor()
        assert (noise is None) == (len(seen) == 0)
        seen.append(assert_explained(protected, noise, rows, options.get("mu", MU), clipped=clipped))
    return seen


def protected_row(protected, row: int) -> int:
    item = protected.dataset[row]
    return int(item["label"] if isinstance(item, dict) else item[1])


KINDS = {
    "torchvision": lambda: (Pictures(transform=augmented()), {}),
    "hand-written": lambda: (Handmade(), {}),
    "hugging face": lambda: (Columns().with_transform(Columnar(marked())), {"collate_fn": collate_columns}),
    "tensors": lambda: (Wrapped(TensorDataset(DATA.x.float() / 255, DATA.y), Normalize()), {}),
    "wrapped": lambda: (Wrapped(Pictures(transform=ToTensor()), RandomTail()), {}),
}


class RandomTail:
    """A function that cannot be looked into, for float tensors."""

    def __call__(self, x):
        return Normalize()(x.flip(-1) if torch.rand(1) < 0.5 else x)


def samplers() -> dict[str, dict]:
    generator = torch.Generator().manual_seed(1)
    return {
        "shuffle": {"batch_size": 5, "shuffle": True, "generator": generator},
        "weighted": {"batch_size": 5, "sampler": WeightedRandomSampler([1.0] * 9 + [3.0] * 9, 20, generator=generator)},
        "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(N), generator=generator), 4, True)},
        "distributed": {"batch_size": 5, "sampler": DistributedSampler(range(N), num_replicas=2, rank=1, seed=3)},
        "one by one": {"batch_size": 1, "sampler": SequentialSampler(range(N))},
    }


@pytest.mark.parametrize("sampler", list(samplers()))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_image_carries_its_own_noise(kind, sampler):
    data, options = KINDS[kind]()
    loader = DataLoader(data, **samplers()[sampler], **options)
    first, second = trained(loader, data)
    if sampler == "distributed":
        assert len(set(second)) == 9
    elif sampler == "weighted":
        assert len(second) == 20 > len(set(second))
    else:
        assert len(second) == len(set(second)) == (16 if sampler == "batch sampler" else N)
    assert (first == second) == (sampler in ("one by one", "distributed"))


def nested():
    first = Subset(Pictures(range(6), augmented()), [5, 0, 3])
    second = ConcatDataset(
        [Handmade(range(6, 9)), Subset(Subset(Pictures(range(9, 15), augmented()), [4, 2, 0]), [1, 2])]
    )
    return Subset(ConcatDataset([first, second]), [7, 2, 4, 0, 5, 1])


def test_through_subsets_and_concatenations_of_each_other():
    data = nested()
    labels = [data[i][1] for i in range(len(data))]
    _, seen = trained(DataLoader(data, 4), data)
    assert seen == labels and len(set(labels)) == 6


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_persistent_workers_see_noise_that_is_made_after_they_started(method):
    """The first epoch starts the workers; the noise is made before the second, which must not start them again."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    data = nested()
    loader = DataLoader(data, 2, shuffle=True, num_workers=2 if method == "fork" else 1, persistent_workers=True,
                        multiprocessing_context=method)  # fmt: skip
    first, second, third = trained(loader, data, epochs=3)
    assert sorted(first) == sorted(second) == sorted(third)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_pause_and_go_on(persistent):
    defense = defended()
    loader = defense.protect(DataLoader(Pictures(transform=Compose_plain()), 6, num_workers=2,
                                        persistent_workers=persistent))  # fmt: skip
    for _ in defense.epochs(net(), 1):
        noisy = torch.cat([x for x, _ in loader])
        with defense.paused():
            clean = torch.cat([x for x, _ in loader])
        again = torch.cat([x for x, _ in loader])
    assert torch.equal(clean, DATA.pixels())
    assert (noisy - clean).abs().amax((1, 2, 3)).min() > MU
    assert (again - clean).abs().amax((1, 2, 3)).min() > MU


def Compose_plain():  # noqa: N802
    return ToTensor()


def test_a_prefetcher_that_normalises_bytes_on_the_device():
    """timm: the transform is assigned when the loader is made, batches are bytes, exactly two things come out."""
    data = Pictures()
    loader = create_loader(data, 5, shuffle=True)
    _, seen = trained(loader, data, clipped=True)
    assert sorted(seen) == list(range(N))


@pytest.mark.parametrize("data", [
    Pictures(transform=augmented()),
    Columns().with_transform(Columnar(augmented())),
    create_loader(Pictures(), 5).dataset,
], ids=["torchvision", "hugging face", "bytes"])  # fmt: skip
def test_without_noise_a_batch_is_the_same_bit_for_bit(data):
    """Images, labels, types and the random numbers that are drawn."""
    loader = DataLoader(data, 5, shuffle=True, collate_fn=list)

    def epoch(some) -> list:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return [item for batch in some for item in batch]

    before = epoch(loader)
    defense = defended(zeta=0, mu=0)
    protected = defense.protect(loader, normalize=(MEAN, STD))
    for _ in defense.epochs(net(), 1):
        after = epoch(protected)
    with defense.paused():
        clean = epoch(protected)
    for a, b, c in zip(before, after, clean, strict=True):
        assert type(a) is type(b) is type(c)
        fields = a.keys() if isinstance(a, dict) else range(len(a))
        for name in fields:
            x, y, z = (torch.as_tensor(item[name]) for item in (a, b, c))
            assert x.dtype == y.dtype and torch.equal(x, y) and torch.equal(x, z)


def test_the_loader_that_was_passed_and_its_data_set_stay_as_they_were():
    data = Pictures(transform=ToTensor())
    loader = DataLoader(data, 6)
    defense = defended()
    protected = defense.protect(loader)
    assert type(protected) is DataLoader and protected.sampler is loader.sampler and loader.dataset is data
    for _ in defense.epochs(net(), 1):
        assert torch.equal(torch.cat([x for x, _ in loader]), DATA.pixels())
        assert not torch.equal(next(iter(protected))[0], DATA.pixels(slice(6)))
    assert protected.dataset.rows is data.rows  # attributes of the data set inside


def test_two_defenses_of_one_data_set_do_not_meet():
    data = Pictures(transform=augmented())
    for _ in range(2):
        assert len(trained(DataLoader(data, 5, shuffle=True), data)) == 2


def test_protecting_twice_is_refused():
    defense = defended()
    protected = defense.protect(DataLoader(Handmade()))
    again = DataLoader(Subset(protected.dataset, range(4)))
    by_hand = DataLoader(friends.NoisyDataset(TensorDataset(DATA.x, DATA.y), None))
    for loader in (protected, again, by_hand):
        with pytest.raises(ValueError, match="noise would be added twice"):
            friends.Friends().protect(loader)
    with pytest.raises(ValueError, match="protects a loader already"):
        defense.protect(DataLoader(Handmade()))


def test_images_outside_of_an_epoch_are_an_error_that_says_what_to_do():
    defense = defended()
    loader = defense.protect(DataLoader(Handmade()))
    with pytest.raises(RuntimeError, match=r"for epoch in defense.epochs.*with defense.paused"):
        next(iter(loader))
    for _ in defense.epochs(net(), 1):
        pass
    with pytest.raises(RuntimeError, match="outside of its training"):
        next(iter(loader))


def test_bytes_are_rounded_and_clipped_and_a_warning_says_how_not_to():
    loader = DataLoader(Columns().with_transform(Columnar(augmented())), 6, collate_fn=collate_columns)
    defense = defended()
    with pytest.warns(UserWarning, match=r"clipped at black and white: its step .*NoiseHere"):
        protected = defense.protect(loader, normalize=(MEAN, STD))
    for _ in defense.epochs(net(), 1):
        noise = NoiseStore.load(session_of(defense).store.path).tensor()
        assert_explained(protected, noise, {i: i for i in range(N)}, clipped=True)


# ---- random noise


def left(x: Tensor) -> Tensor:
    return (x - DATA.pixels()) > 0


def test_random_noise_differs_between_rows_epochs_and_passes_and_follows_the_seed():
    def run(seed: int) -> Tensor:
        defense = defended(zeta=0)
        loader = defense.protect(DataLoader(Pictures(transform=ToTensor()), N), seed=seed)
        return torch.stack([left(next(iter(loader))[0]) for _ in defense.epochs(net(), 2) for _ in range(2)])

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first, again)
    assert len({image.numpy().tobytes() for image in torch.cat([*first, *other])}) == 8 * N


def test_random_noise_is_that_of_a_row_whatever_the_order_and_the_workers():
    def run(**options) -> Tensor:
        defense = defended(zeta=0)
        loader = defense.protect(DataLoader(Pictures(transform=ToTensor()), 4, **options))
        found = torch.empty(N, 3, 8, 8)
        for _ in defense.epochs(net(), 1):
            for x, y in loader:
                found[y] = x
        return found

    assert torch.equal(run(), run(shuffle=True, num_workers=2))


def test_a_row_that_is_drawn_again_by_another_worker_gets_other_random_noise():
    defense = defended(zeta=0)
    sampler = WeightedRandomSampler([1.0] + [0.0] * (N - 1), 8)
    loader = defense.protect(DataLoader(Pictures(transform=ToTensor()), 2, sampler=sampler, num_workers=2))
    for _ in defense.epochs(net(), 1):
        x = torch.cat([x for x, _ in loader])
    assert len({image.numpy().tobytes() for image in x}) == 8


def test_ranks_draw_different_random_noise():
    def rank(number: int) -> Tensor:
        defense = defended(zeta=0)
        loader = defense.protect(DataLoader(Pictures(transform=ToTensor()), N))
        for _ in defense.epochs(net(), 1):
            session_of(defense)._shared.rank = number
            return next(iter(loader))[0]
        raise AssertionError

    assert torch.equal(rank(0), rank(0)) and not torch.equal(rank(0), rank(1))


def test_the_global_random_states_are_left_alone(tmp_path: Path):
    defense = defended()
    before = torch.get_rng_state()
    defense.protect(DataLoader(Pictures(transform=augmented()), 4), folder=tmp_path / "noise")
    for _ in defense.epochs(net(), 1):
        pass
    assert torch.equal(torch.get_rng_state(), before)
