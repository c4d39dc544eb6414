"""A training in a loop of one's own: the same as by hand, resumed exactly, refused early, shared between ranks."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from loader_stand_ins import DATA, Compose, N, Normalize, Pictures, RandomHorizontalFlip, ToTensor, augmented, net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

import friends
from friends.data.images import LabeledImages
from friends.loaders import together
from friends.loaders.saved import remove
from friends.loaders.session import session_of
from friends.noise.grey import grey_noise
from friends.noise.store import NoiseStore
from friends.types import Streams

QUICK = friends.FriendlySettings(steps=2)
MU = 16 / 255


def digit_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip


class Digits(Dataset):
    def __init__(self, data: LabeledImages, transform=None):
        self.data, self.transform = data, transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x = self.data.x[index].float() / 255
        return (x if self.transform is None else self.transform(x)), int(self.data.y[index])


def step(model: nn.Module, sgd: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    sgd.step()


def test_a_protected_loop_is_the_loop_that_adds_the_noise_by_hand(few_digits):
    few_digits = few_digits.rows(range(0, 300, 3))
    half = Normalize((0.5,), (0.25,))

    def order(epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(epoch)

    defense = friends.Friends(def_epoch=1, settings=QUICK, mu=MU)
    generator = torch.Generator()
    loader = DataLoader(Digits(few_digits, half), 25, shuffle=True, generator=generator)
    protected = defense.protect(loader, seed=7)
    model = digit_net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches: list[list[int]] = []
    for epoch in defense.epochs(model, 3):
        generator.set_state(order(epoch).get_state())
        for x, y in protected:
            step(model, sgd, x, y)
    for epoch in range(3):  # the same order, from a loader that emits rows
        generator.set_state(order(epoch).get_state())
        rows = DataLoader(TensorDataset(torch.arange(len(few_digits))), 25, shuffle=True, generator=generator)
        batches.append([row.tolist() for (row,) in rows])

    by_hand = digit_net()
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    pixels, friendly = few_digits.pixels(), torch.zeros_like(few_digits.pixels())
    for epoch in range(3):
        if epoch == 1:
            seed = Streams(7).integer("friendly")
            normalised = nn.Sequential(Affine(), by_hand)
            friendly = grey_noise(normalised, few_digits.x, range(len(pixels)), QUICK, seed=seed).float() / 255
        for rows in batches[epoch]:
            noisy = []
            for row in rows:
                stream = Streams(7)("random noise", epoch, 0, row, 0, 0)
                sign = friends.random_noise(torch.zeros(1, 1, 28, 28), "bernoulli", MU, stream)[0]
                noisy.append(half((pixels[row] + friendly[row]).clamp(0, 1) + sign))
            step(by_hand, sgd, torch.stack(noisy), few_digits.y[rows])
    assert friendly.abs().mean() > 1 / 255
    for (name, a), b in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


class Affine(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


# ---- resuming


class Loop:
    """A training that can be stopped after any epoch: what a user's script does."""

    def __init__(self, folder: Path | None = None, **options):
        self.model = net()
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.defense = friends.Friends(**{"def_epoch": 1, "settings": QUICK, **options})
        data = Pictures(transform=Compose([ToTensor(), Normalize()]))
        self.loader = self.defense.protect(DataLoader(data, 6, num_workers=0), folder=folder, seed=3)

    def run(self, epochs: int, stop: int | None = None, progress=friends.types.silent) -> Loop:
        for epoch in self.defense.epochs(self.model, epochs, progress=progress):
            for x, y in self.loader:
                step(self.model, self.sgd, x, y % 5)
            if epoch == stop:
                break
        return self

    def save(self, file: Path) -> None:
        torch.save({"model": self.model.state_dict(), "sgd": self.sgd.state_dict(),
                    "friends": self.defense.state_dict()}, file)  # fmt: skip

    def load(self, file: Path) -> Loop:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.sgd.load_state_dict(state["sgd"])
        self.defense.load_state_dict(state["friends"])
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.fixture(scope="module")
def uninterrupted() -> list[Tensor]:
    return Loop().run(4).weights()


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
@pytest.mark.parametrize("folder", [False, True])
def test_a_training_that_is_resumed_ends_with_the_same_weights(uninterrupted, tmp_path, stop, folder):
    where = tmp_path / "noise" if folder else None
    first = Loop(where).run(4, stop)
    first.save(tmp_path / "state.pt")
    del first
    gc.collect()
    second = Loop(where).load(tmp_path / "state.pt").run(4)
    for a, b in zip(uninterrupted, second.weights(), strict=True):
        assert torch.equal(a, b)


def test_a_state_is_small_if_the_noise_has_a_folder_of_its_own(tmp_path):
    loop = Loop(tmp_path / "noise").run(2)
    state = loop.defense.state_dict()
    assert state["store"]["files"] == {} and state["store"]["path"] == str(tmp_path / "noise")
    assert set(Loop().run(2).defense.state_dict()["store"]["files"]) == {"manifest.json", "shard-00000.safetensors"}


def test_noise_that_was_interrupted_is_continued(uninterrupted, tmp_path):
    first = Loop(tmp_path / "noise").run(4, 0)
    first.save(tmp_path / "state.pt")

    def stop(what: str, done: int, total: int, note: str = "", /) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(4, progress=stop)
    assert (tmp_path / "noise" / "manifest.json").exists()
    second = Loop(tmp_path / "noise").load(tmp_path / "state.pt").run(4)
    for a, b in zip(uninterrupted, second.weights(), strict=True):
        assert torch.equal(a, b)


def test_a_state_goes_back_to_before_the_noise(uninterrupted, tmp_path):
    loop = Loop().run(4, 0)
    loop.save(tmp_path / "early.pt")
    loop.run(4)
    again = Loop().run(4)
    again.load(tmp_path / "early.pt")
    assert session_of(again.defense).store is None


@pytest.mark.usefixtures("unchecked")
def test_a_state_of_something_else_is_refused(tmp_path):
    state = Loop().run(2).defense.state_dict()
    for other, words in (
        ({}, "no state of Friends"),
        ({**state, "settings": {**state["settings"], "mu": 0.1}}, "saved with mu=0.1, this Friends has"),
        (
            {**state, "store": {**state["store"], "files": {"../x": torch.zeros(3, dtype=torch.uint8)}}},
            "no file '../x'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            Loop().defense.load_state_dict(other)
    other = friends.Friends(def_epoch=1, settings=QUICK)
    other.protect(DataLoader(Subset(Pictures(transform=ToTensor()), range(1, N)), 6))
    with pytest.raises(ValueError, match="noise of 18 images, the data set has 17"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="lower def_epoch"):
        Loop(def_epoch=2).run(2)


# ---- folders


def test_the_noise_without_a_folder_goes_with_the_defense():
    loop = Loop().run(2)
    path = session_of(loop.defense).store.path
    assert path.is_dir()
    del loop
    gc.collect()
    assert not path.exists()


def test_a_process_that_did_not_make_a_folder_does_not_remove_it(tmp_path):
    remove(str(tmp_path), os.getpid() + 1)
    assert tmp_path.is_dir()
    remove(str(tmp_path), os.getpid())
    assert not tmp_path.exists()


def test_the_noise_of_another_training_is_refused_before_the_first_epoch(tmp_path):
    Loop(tmp_path / "noise").run(2)
    with pytest.raises(ValueError, match=r"is not empty.*load the state.*store=.*another folder"):
        Loop(tmp_path / "noise").run(2)


# ---- noise from a store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> NoiseStore:
    return NoiseStore.generate(net(), DATA, tmp_path_factory.mktemp("made") / "store", settings=QUICK)


@pytest.mark.parametrize("data", [
    Pictures(transform=ToTensor()),
    Subset(Pictures(transform=ToTensor()), [4, 2, 11]),
], ids=["the same rows", "a subset"])  # fmt: skip
def test_noise_from_a_store_comes_at_its_epoch(store, data):
    defense = friends.Friends(def_epoch=1, store=str(store.path), mu=0)
    loader = defense.protect(DataLoader(data, 2))
    for epoch in defense.epochs(net(), 2):
        for x, rows in loader:
            noise = store.rows(rows) if epoch else 0
            torch.testing.assert_close(x, (DATA.pixels(rows) + noise).clamp(0, 1), rtol=0, atol=1e-6)


def test_noise_from_a_store_by_key(store):
    rows = [7, 3, 9]
    defense = friends.Friends(def_epoch=0, store=str(store.path), mu=0)
    loader = defense.protect(DataLoader(Pictures(rows, ToTensor()), 3), keys=rows)
    for _ in defense.epochs(net(), 1):
        ((x, _),) = loader
    assert torch.allclose(x, (DATA.pixels(torch.tensor(rows)) + store.rows(rows)).clamp(0, 1), atol=1e-6)


def test_a_store_of_other_images_or_another_bound_is_refused_at_once(store):
    with pytest.raises(ValueError, match="row 0: these are not the pixels"):
        friends.Friends(store=str(store.path)).protect(DataLoader(Pictures([*range(1, N), 0], ToTensor())))
    with pytest.raises(ValueError, match="noise of 18 images, the data set has 3"):
        friends.Friends(store=str(store.path)).protect(DataLoader(Pictures(range(3), ToTensor())))
    with pytest.raises(ValueError, match="made for zeta 16/255, not 8/255"):
        friends.Friends(store=str(store.path), zeta=8 / 255).protect(DataLoader(Pictures(transform=ToTensor())))


# ---- what cannot work is said at once


def test_what_cannot_work_is_refused_before_the_first_epoch(tmp_path):
    with pytest.raises(RuntimeError, match="protect a loader first"):
        friends.Friends().epochs(net(), 10)
    with pytest.raises(ValueError, match="make a store with any model"):
        friends.Friends(proxy="lenet").protect(DataLoader(Pictures(transform=augmented())))
    with pytest.raises(ValueError, match="control for experiments"):
        friends.Friends(held="random").protect(DataLoader(Pictures(transform=augmented())))
    defense = friends.Friends(def_epoch=5)
    defense.protect(DataLoader(Pictures(transform=augmented())))
    for epochs, words in ((0, "at least one epoch"), (5, "made at epoch 5, but training ends after 5")):
        with pytest.raises(ValueError, match=words):
            defense.epochs(net(), epochs)
    with pytest.raises(ValueError, match="has trained its 2 epochs"):
        Loop().run(2).run(2)


def test_equal_defenses_have_sessions_of_their_own():
    one, two = friends.Friends(), friends.Friends()
    assert one == two and session_of(one) is not session_of(two) and session_of(one) is session_of(one)
    assert session_of(replace(one)) is not session_of(one)


def test_one_bit_a_value_is_kept():
    loop = Loop(kept="bits").run(2)
    store = session_of(loop.defense).store
    assert store.coding == "bits" and len(store.tensor()[0].abs().unique()) == 1


# ---- several processes


def one_of_two(rank: int, folder: str) -> None:
    together.EVERY = 0.0  # a sign of life after every batch
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    data = Pictures(transform=Compose([ToTensor(), RandomHorizontalFlip()]))
    sampler = DistributedSampler(data, shuffle=False)
    defense = friends.Friends(def_epoch=1, settings=QUICK)
    loader = defense.protect(DataLoader(data, 3, sampler=sampler))
    model = nn.parallel.DistributedDataParallel(net())
    for _ in defense.epochs(model, 2):
        x = torch.cat([x for x, _ in loader])
        y = torch.cat([y for _, y in loader])
    store = session_of(defense).store
    grey = store.tensor()
    torch.save(
        {"grey": grey, "x": x, "y": y, "path": str(store.path), "rank": session_of(defense)._shared.rank},
        f"{folder}/{rank}.pt",
    )
    torch.distributed.barrier()

    def fails(what: str, done: int, total: int, note: str = "", /) -> None:
        raise OSError("no space left")

    other = friends.Friends(def_epoch=0, settings=QUICK)
    other.protect(DataLoader(data, 3))
    try:
        list(other.epochs(model, 1, progress=fails))
    except (OSError, RuntimeError) as error:
        Path(f"{folder}/{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


def test_ranks_share_one_noise_and_one_failure(tmp_path):
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["grey"], second["grey"]) and first["path"] == second["path"]
    assert first["grey"].abs().float().mean() > 1 and (first["rank"], second["rank"]) == (0, 1)
    assert sorted(first["y"].tolist() + second["y"].tolist()) == list(range(N))
    assert (tmp_path / "0.txt").read_text() == "OSError: no space left"
    assert (tmp_path / "1.txt").read_text() == (
        "RuntimeError: rank 0 could not make the friendly noise: OSError: no space left"
    )
