"""Where the noise goes in somebody's pipeline, and what is said when it can go nowhere."""

from __future__ import annotations

import re

import pytest
import torch
from loader_stand_ins import (
    DATA,
    MEAN,
    STD,
    Columnar,
    Columns,
    Compose,
    Handmade,
    N,
    Normalize,
    Pictures,
    PILOnly,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
    ToBytes,
    ToRGB,
    ToTensor,
    Wrapped,
    augmented,
    create_loader,
    net,
    pil,
)
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, TensorDataset

import friends
from friends.data.convert import to_pixels
from friends.loaders.checking import examine
from friends.loaders.loader import inner_loader
from friends.loaders.place import Options, Place
from friends.loaders.session import session_of
from friends.loaders.structure import Opened

QUICK = friends.FriendlySettings(steps=1)


def found(data, **options) -> tuple[Place, tuple[int, ...], tuple]:
    """The place, the shape of images there, and how the model's input is normalised."""
    loader = data if hasattr(data, "loader") else DataLoader(data, collate_fn=list)
    looked, view = examine(loader, Opened(inner_loader(loader).dataset), Options(**options))
    assert looked.blockers == [] and looked.place is not None and view is not None
    return looked.place, tuple(looked.pixels[0].shape), view.moments


class AddOne:
    """Deterministic, and nothing that anybody knows."""

    def __call__(self, x):
        return x + 1


@pytest.mark.parametrize(
    ("steps", "at", "floats", "shape"),
    [
        ([RandomCrop(), RandomHorizontalFlip(), ToTensor(), Normalize()], 0, True, (3, 8, 8)),
        ([ToTensor(), RandomCrop(), Normalize()], 1, True, (3, 8, 8)),
        ([ToTensor(), Normalize(), RandomCrop()], 1, True, (3, 8, 8)),
        ([Resize(6, 12), RandomHorizontalFlip(), ToTensor(), Normalize()], 1, True, (3, 6, 12)),
        ([Compose([ToRGB(), Resize(5, 5)]), Compose([RandomCrop(), ToTensor()]), Normalize()], 2, True, (3, 5, 5)),
        ([ToTensor(), AddOne(), RandomCrop(), Normalize()], 1, True, (3, 8, 8)),
        ([ToTensor()], 1, True, (3, 8, 8)),
        ([ToRGB(), PILOnly(), ToTensor(), Normalize()], 1, False, (3, 8, 8)),
        ([RandomHorizontalFlip(), ToBytes()], 0, False, (3, 8, 8)),
    ],
    ids=lambda value: "-".join(type(step).__name__ for step in value) if isinstance(value, list) else None,
)
def test_noise_comes_after_what_is_steady_and_before_all_else(steps, at, floats, shape):
    place, there, moments = found(Pictures(transform=Compose(steps)), normalize=(MEAN, STD))
    (cut,) = place.cuts.values()
    assert (cut.at, cut.floats, there) == (at, floats, shape)
    assert moments == (MEAN, STD) and bool(place.bytes_because) == (not floats)


@pytest.mark.parametrize("data", [
    Pictures(transform=augmented()),
    Pictures(transform=Compose([ToTensor(), Normalize(), RandomCrop(), RandomHorizontalFlip()])),
    Wrapped(Pictures(transform=ToTensor()), Normalize()),
    Handmade(),
    Columns().with_transform(Columnar(Compose([ToTensor(), friends.NoiseHere(), RandomCrop(), Normalize()]))),
    create_loader(Pictures(), 4),
], ids=["crop, flip, normalise", "normalise, crop, flip", "wrapped", "by hand", "columns", "prefetcher"])  # fmt: skip
def test_how_the_models_input_is_normalised_is_seen_through_augmentation(data):
    _, _, (mean, std) = found(data)
    assert mean == pytest.approx(MEAN, abs=1e-4) and std == pytest.approx(STD, abs=1e-4)


def test_a_sequence_of_modules_is_a_pipeline_too():
    class Half(nn.Module):
        def forward(self, x):
            return (x - 0.5) / 0.5

    place, _, (mean, std) = found(Pictures(transform=nn.Sequential(AsModule(ToTensor()), Half())))
    assert [cut.at for cut in place.cuts.values()] == [1]
    assert mean == pytest.approx([0.5] * 3, abs=1e-5) and std == pytest.approx([0.5] * 3, abs=1e-5)


class AsModule(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step(x)


def test_the_numbers_of_a_normalize_step_are_taken_where_colours_are_random():
    class ColorJitter:
        def __call__(self, x):
            return x * (0.5 + torch.rand(1))

    data = Pictures(transform=Compose([ToTensor(), ColorJitter(), Normalize()]))
    assert found(data)[2] == (MEAN, STD)


def test_the_second_reference_to_a_transform_that_torchvision_keeps_is_opened_too():
    class Standard:
        def __init__(self, transform):
            self.transform = transform

        def __call__(self, image, target):
            return self.transform(image), target

    class Detection(Pictures):
        def __init__(self, transform):
            super().__init__(transform=transform)
            self.transforms = Standard(transform)

        def __getitem__(self, index):
            return self.transforms(pil(index), index)

    place, _, _ = found(Detection(augmented()))
    assert len(place.cuts) == 1


class Picture(torch.Tensor):
    """A class of tensors, as torchvision's second version has them."""


class ToImage:
    def __call__(self, image):
        x = image if isinstance(image, torch.Tensor) else (ToTensor()(image) * 255).byte()
        return x.as_subclass(Picture)


class ToFloat:
    def __call__(self, x):
        return x if x.is_floating_point() else x.float() / 255


@pytest.mark.parametrize("steps", [
    [ToImage(), RandomCrop(), RandomHorizontalFlip(), ToFloat(), Normalize()],
    [RandomCrop(), ToImage(), RandomHorizontalFlip(), ToFloat(), Normalize()],
    [ToImage(), ToFloat(), RandomCrop(), Normalize()],
])  # fmt: skip
def test_a_class_of_tensors_is_kept_and_so_is_noise_beyond_black_and_white(steps):
    defense = friends.Friends(def_epoch=0, settings=QUICK)
    loader = DataLoader(Pictures(transform=Compose(steps)), N, collate_fn=list)
    protected = defense.protect(loader)
    for _ in defense.epochs(net(), 1):
        (batch,) = protected
        assert {type(x) for x, _ in batch} == {Picture} == {type(x) for x, _ in next(iter(loader))}
        x = torch.stack([x.as_subclass(torch.Tensor) for x, _ in batch])
    assert (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).min() < -0.05


class SometimesForBytes:
    """As AutoAugment: what it does is random, and half of it cannot be done to floats."""

    def __call__(self, image):
        if torch.rand(1) < 0.5:
            return image
        if isinstance(image, torch.Tensor):
            raise TypeError("Only torch.uint8 image tensors are supported")
        return image.point(lambda value: 255 - value)


def test_a_step_that_only_sometimes_takes_floats_gets_bytes():
    data = Pictures(transform=Compose([SometimesForBytes(), ToTensor(), Normalize()]))
    defense = friends.Friends(def_epoch=0, settings=QUICK)
    with pytest.warns(UserWarning, match=r"its step SometimesForBytes .* Only torch.uint8"):
        loader = defense.protect(DataLoader(data, 4))
    for _ in defense.epochs(net(), 1):
        assert sum(len(x) for x, _ in loader) == N


class RandomResizedCrop(Resize):
    def __init__(self):
        super().__init__(12, 12)

    def __call__(self, image):
        return super().__call__(RandomCrop()(image))


def test_the_model_is_shown_images_as_large_as_those_that_it_is_trained_on():
    data = Pictures(transform=Compose([RandomResizedCrop(), ToTensor(), Normalize()]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 5))
    defense = friends.Friends(def_epoch=0, settings=QUICK)
    loader = defense.protect(DataLoader(data, 4))
    for _ in defense.epochs(model, 1):
        assert next(iter(loader))[0].shape == (4, 3, 12, 12)
        assert session_of(defense).store.shape == (3, 8, 8)


# ---- images of several sizes


class AnySize(Pictures):
    def __getitem__(self, index):
        image = pil(index).resize((8 + index % 3, 9))
        return (image if self.transform is None else self.transform(image)), index


def test_images_of_several_sizes_are_brought_to_a_canonical_one():
    loader = DataLoader(AnySize(transform=Compose([RandomCrop(), ToTensor()])), 3, collate_fn=list)
    (blocker,) = friends.check(net(), loader)
    assert "is (3, 9, 8), row 5 is (3, 9, 10)" in blocker.what and "Pass canonical_size=" in blocker.way_out
    defense = friends.Friends(def_epoch=0, settings=QUICK, mu=0)
    protected = defense.protect(loader, canonical_size=7)
    for _ in defense.epochs(net(), 1):
        assert {x.shape for batch in protected for x, _ in batch} == {(3, 7, 7)}
        assert session_of(defense).store.shape == (3, 7, 7)
    with defense.paused():
        assert {x.shape for batch in protected for x, _ in batch} == {(3, 7, 7)}
    assert {x.shape for batch in loader for x, _ in batch} == {(3, 9, w) for w in (8, 9, 10)}


def test_images_without_a_transform_are_brought_to_a_canonical_size_too():
    defense = friends.Friends(def_epoch=0, settings=QUICK, mu=0)
    protected = defense.protect(DataLoader(AnySize(), 3, collate_fn=list), canonical_size=8, normalize=((0.0,), (1.0,)))
    for _ in defense.epochs(net(), 1):
        noisy = [to_pixels(x) for batch in protected for x, _ in batch]
    with defense.paused():
        clean = [to_pixels(x) for batch in protected for x, _ in batch]
    noise = session_of(defense).store.tensor().float() / 255
    torch.testing.assert_close(torch.stack(noisy), torch.stack(clean) + noise, rtol=0, atol=1e-6)


# ---- what cannot be


class Stream(IterableDataset):
    def __iter__(self):
        yield DATA.x[0], 0


class Broken(Pictures):
    def __getitem__(self, index):
        raise OSError("the disk is gone")


class Mixed(Pictures):
    def __getitem__(self, index):
        return self.transform(pil(index)) + self.transform(pil(0)), index


class OnlyItsOwn(Dataset):
    """Augments by itself, and nobody can see where."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        x = DATA.x[index].float() / 255
        return x[:, :, torch.randperm(8)], index


class Photos(Pictures):
    def __getitem__(self, index):
        return {"photo": DATA.x[index].float() / 255, "label": index}


class Brighter:
    def __call__(self, image):
        return ToTensor()(image) * (0.5 + torch.rand(1))


def with_one_transform_at_two_places() -> Wrapped:
    shared = Compose([RandomHorizontalFlip(), ToTensorUnlessItIs(), Normalize()])
    return Wrapped(ConcatDataset([Pictures(range(3)), Pictures(range(3), ToTensor())]), shared)


class ToTensorUnlessItIs(ToTensor):
    def __call__(self, image):
        return image if isinstance(image, torch.Tensor) else super().__call__(image)


NORMALISED = TensorDataset(torch.stack([Normalize()(x) for x in DATA.pixels()]), DATA.y)
BLOCKED = {
    "a stream": (DataLoader(Stream()), {}, "Stream has no rows", "map-style"),
    "no loader": ([1, 2], {}, "not list", "DataLoader"),
    "nothing in it": (DataLoader(Pictures([]), sampler=[]), {}, "no image in the data set", "once"),
    "not readable": (DataLoader(Broken()), {}, "row 0 .*OSError: the disk is gone", "Mend"),
    "several images in one": (DataLoader(Mixed(transform=augmented())), {}, "2 times", "Mix batches"),
    "augments by itself": (DataLoader(OnlyItsOwn()), {}, "other pixels when read again", "NoiseHere.. into"),
    "normalised": (DataLoader(NORMALISED), {}, r"row 0: float pixels must be in \[0, 1\]", "normalize="),
    "no image": (DataLoader(Photos()), {}, "'photo', 'label': none is 'image'", "image="),
    "random brightness": (DataLoader(Pictures(transform=Brighter())), {}, "brightness .* at random", "normalize="),
    "bytes": (DataLoader(Pictures(transform=ToBytes())), {}, "emits bytes", "normalize="),
    "two marks": (DataLoader(Pictures(transform=Compose([friends.NoiseHere(), friends.NoiseHere(), ToTensor()]))), {},
                  "2 times", "Leave one"),
    "one transform, two places": (DataLoader(with_one_transform_at_two_places()), {}, "shared", "Give each its own"),
    "no image first": (DataLoader([("label", 3)]), {}, "row 0 is str, not an image", "NoiseHere.."),
    "channels": (DataLoader(Pictures(transform=augmented())), {"normalize": ((0.5, 0.5), (1.0, 1.0))},
                 "2 channels, the images have 3", "one number for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BLOCKED))
def test_every_blocker_is_named_with_its_way_out_and_nothing_is_touched(name):
    loader, options, what, way_out = BLOCKED[name]
    transform = getattr(getattr(loader, "dataset", None), "transform", None)
    before = torch.get_rng_state()
    (blocker,) = friends.check(net(), loader, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert re.search(what, blocker.what), blocker
    assert way_out.replace("..", "()") in str(blocker)
    assert getattr(getattr(loader, "dataset", None), "transform", None) is transform


@pytest.mark.parametrize(("model", "words"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), "does not take images of"),
    (nn.Conv2d(3, 4, 3), "must return logits"),
    (net().half(), "float32 is needed"),
    (nn.Sequential(nn.Flatten(), nn.Linear(192, 5), *[nn.Linear(5, 5)]), "not finite"),
])  # fmt: skip
def test_a_model_that_cannot_be_asked_is_a_blocker(model, words):
    if words == "not finite":
        nn.init.constant_(model[1].weight, float("nan"))
    loader = DataLoader(Pictures(transform=augmented()), 4)
    (blocker,) = friends.check(model, loader)
    assert words in str(blocker)
    defense = friends.Friends()
    defense.protect(loader)
    with pytest.raises(ValueError, match=words):
        defense.epochs(model, 80)


def test_nothing_stands_in_the_way_of_a_usual_loader():
    assert friends.check(net(), DataLoader(Pictures(transform=augmented()), 4)) == []


def test_all_blockers_are_in_the_error():
    with pytest.raises(ValueError, match=r"cannot be protected: .*brightness.*normalize="):
        friends.Friends().protect(DataLoader(Pictures(transform=Brighter())))


def test_what_is_said_about_a_loader_makes_up_for_what_cannot_be_seen():
    for loader, options in (
        (DataLoader(NORMALISED), {"normalize": (MEAN, STD)}),
        (DataLoader(Photos()), {"image": "photo"}),
        (DataLoader(Pictures(transform=Brighter())), {"normalize": ((0.0,), (1.0,))}),
    ):
        assert friends.check(net(), loader, **options) == []


def test_noise_on_normalised_images_is_noise_on_their_pixels():
    defense = friends.Friends(def_epoch=0, settings=QUICK, mu=0)
    loader = defense.protect(DataLoader(NORMALISED, N), normalize=(MEAN, STD))
    for _ in defense.epochs(net(), 1):
        ((x, y),) = loader
        pixels = x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        noise = session_of(defense).store.tensor().float() / 255
        torch.testing.assert_close(pixels, (DATA.pixels() + noise).clamp(0, 1), rtol=0, atol=1e-5)
        assert noise.abs().sum() > 0 and y.tolist() == list(range(N))


@pytest.mark.parametrize("options", [{"normalize": ((0.5,), (0.0,))}, {"normalize": ((), ())}, {"canonical_size": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=r"normalize is|canonical_size is"):
        friends.Friends().protect(DataLoader(Pictures(transform=augmented())), **options)


# ---- what changes after the loader was protected


def test_a_transform_that_is_assigned_later_is_an_error_and_not_lost_noise():
    for data in (Pictures(transform=augmented()), Bare()):
        defense = friends.Friends(def_epoch=0, settings=QUICK)
        loader = defense.protect(DataLoader(data, 4))
        loader.dataset.transform = Compose([RandomHorizontalFlip(), ToTensor()])
        assert isinstance(data.transform, Compose)  # what is set on the protected data set reaches the one inside
        with pytest.raises(RuntimeError, match=r"(?i)protect the loader after"):
            for _ in defense.epochs(net(), 1):
                next(iter(loader))


class Bare(Dataset):
    def __init__(self):
        self.transform = None

    def __len__(self):
        return N

    def __getitem__(self, index):
        return DATA.pixels()[index], index


def test_an_image_that_changed_after_the_noise_was_made_is_refused():
    x = DATA.pixels()
    defense = friends.Friends(def_epoch=0, settings=QUICK)
    loader = defense.protect(DataLoader(TensorDataset(x, DATA.y), 4))
    with pytest.raises(ValueError, match=r"row 3: these are not the pixels"):
        for _ in defense.epochs(net(), 1):
            x[3] = 1 - x[3]
            next(iter(loader))


def test_an_index_that_is_no_row_is_refused():
    defense = friends.Friends(def_epoch=0, zeta=0)
    data = defense.protect(DataLoader(Handmade(), 4)).dataset
    for _ in defense.epochs(net(), 1):
        with pytest.raises(IndexError, match=f"row {N} of a data set of {N}"):
            data[N]
        assert data[-1][1] == N - 1
