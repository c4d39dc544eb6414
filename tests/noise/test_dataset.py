"""The right noise reaches the right image, whatever stands between the store and the training loop."""

from __future__ import annotations

import multiprocessing
from collections import namedtuple
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_helpers import byte_images, small_net
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from friends.data.convert import to_pixels
from friends.noise.dataset import DeviceNoise, NoisyDataset
from friends.noise.friendly import RELEASED
from friends.noise.store import NoiseStore

N, MU = 24, 16 / 255
DATA = byte_images(N)
PLAIN = TensorDataset(DATA.x, DATA.y)  # an item is (bytes, its own row)
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> NoiseStore:
    folder = tmp_path_factory.mktemp("noise") / "store"
    quick = replace(RELEASED, steps=3)
    return NoiseStore.generate(small_net(), DATA, folder, settings=quick, shard_rows=7)


def random_part(x: torch.Tensor, row: torch.Tensor | int, store: NoiseStore | None) -> torch.Tensor:
    """What is left of emitted images without their clean twins and the friendly noise of their rows."""
    rows = torch.as_tensor(row).reshape(-1)
    friendly = 0 if store is None else store.rows(rows)
    return x.reshape(len(rows), 3, 8, 8) - DATA.pixels(rows) - friendly


def assert_right(batches: Iterable, store: NoiseStore) -> list[int]:
    """Every image carries its own friendly noise and nothing else. Returns the rows in the order they came."""
    rows: list[int] = []
    for x, row in batches:
        assert random_part(x, row, store).abs().max() < 1e-6
        rows += torch.as_tensor(row).reshape(-1).tolist()
    return rows


def shuffled(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the right noise


def test_rows_differ_so_that_a_swap_would_show(store):
    grey = store.tensor().float()
    assert (grey[1:] - grey[:-1]).abs().mean() > 1


def test_one_by_one(store):
    noisy = NoisyDataset(PLAIN, store, mu=0)
    assert len(noisy) == N
    assert assert_right([noisy[i] for i in ORDER], store) == ORDER
    assert torch.equal(noisy[-1][0], noisy[N - 1][0])
    for outside in (N, -N - 1):
        with pytest.raises(IndexError, match=f"row {outside} of a data set of {N}"):
            noisy[outside]


def test_through_samplers_and_subsets(store):
    noisy = NoisyDataset(PLAIN, store, mu=0)
    weights = WeightedRandomSampler(torch.arange(1.0, N + 1), 40, generator=shuffled())
    loaders = {
        "shuffle": DataLoader(noisy, 5, shuffle=True, generator=shuffled()),
        "drop last": DataLoader(noisy, 5, shuffle=True, drop_last=True, generator=shuffled()),
        "weighted": DataLoader(noisy, 5, sampler=weights),
        "subset of it": DataLoader(Subset(noisy, ORDER[:10]), 4),
        "subset in it": DataLoader(NoisyDataset(Subset(PLAIN, ORDER[:10]), store, mu=0), 4),
        "permutation in it": DataLoader(NoisyDataset(Subset(PLAIN, ORDER), store, mu=0), 4),
        "subsets in it": DataLoader(NoisyDataset(Subset(Subset(PLAIN, ORDER[:12]), range(11, 3, -1)), store, mu=0), 4),
        "by key": DataLoader(
            NoisyDataset(TensorDataset(DATA.x[ORDER[:9]], DATA.y[ORDER[:9]]), store, mu=0, keys=ORDER[:9]), 4
        ),
    }
    rows = {name: assert_right(loader, store) for name, loader in loaders.items()}
    assert sorted(rows["shuffle"]) == list(range(N)) != rows["shuffle"]
    assert len(set(rows["drop last"])) == 20
    assert len(rows["weighted"]) == 40 > len(set(rows["weighted"]))
    assert rows["subset of it"] == rows["subset in it"] == ORDER[:10]
    assert rows["permutation in it"] == ORDER
    assert rows["subsets in it"] == [ORDER[i] for i in range(11, 3, -1)]
    assert rows["by key"] == ORDER[:9]


def test_a_store_made_for_the_subset_itself(tmp_path):
    part = Subset(PLAIN, ORDER)  # as long as the whole, so that lengths cannot tell
    store = NoiseStore.generate(small_net(), part, tmp_path / "s", settings=replace(RELEASED, steps=1))
    noisy = NoisyDataset(part, store, mu=0)
    for place in (0, 5, N - 1):
        x, row = noisy[place]
        assert row == ORDER[place]
        assert torch.allclose(x - DATA.pixels()[row], store.rows([place])[0], atol=1e-6)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_through_persistent_workers(store, method):
    """Two epochs: without random noise and then, switched in shared memory, without friendly noise too."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    noisy = NoisyDataset(Subset(PLAIN, range(N)), store, mu=0)
    loader = DataLoader(noisy, 4, shuffle=True, num_workers=2, persistent_workers=True, generator=shuffled(),
                        multiprocessing_context=method)  # fmt: skip
    first, second = assert_right(loader, store), assert_right(loader, store)
    assert sorted(first) == sorted(second) == list(range(N)) and first != second
    noisy.friendly = False
    for x, row in loader:
        assert torch.equal(x, DATA.pixels(row))


Pair = namedtuple("Pair", "img label")
KINDS = {
    "bytes": lambda x: x,
    "floats": lambda x: x.float() / 255,
    "tuple": lambda x: (x.permute(1, 2, 0).numpy(), "label", 5),
    "list": lambda x: [Image.fromarray(x.permute(1, 2, 0).numpy()), {"a": 1}],
    "namedtuple": lambda x: Pair(x, 3),
    "image": lambda x: {"label": 1, "image": x, "id": "z"},
    "img": lambda x: {"img": x.double() / 255, "label": 2},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_item_comes_back_as_it_was(store, kind):
    items = [KINDS[kind](x) for x in DATA.x]
    noisy = NoisyDataset(items, store, mu=0)[7]
    assert type(noisy) is (torch.Tensor if kind in ("bytes", "floats") else type(items[7]))
    if isinstance(noisy, dict):
        assert list(noisy) == list(items[7])
        assert all(noisy[name] is items[7][name] for name in noisy if name != kind)
        image = noisy[kind]
    elif isinstance(noisy, torch.Tensor):
        image = noisy
    else:
        assert all(a is b for a, b in zip(noisy[1:], items[7][1:], strict=True)) and len(noisy) == len(items[7])
        image = noisy[0]
    assert image.dtype == torch.float32 and random_part(image, 7, store).abs().max() < 1e-6
    assert torch.equal((image * 255).round().long(), DATA.x[7] + store.grey([7])[0].long())


# ---- nothing else changes


@pytest.mark.parametrize("kind", list(KINDS))
def test_without_noise_the_image_is_the_same_bit_for_bit(kind):
    items = [KINDS[kind](x) for x in DATA.x]
    for off in (NoisyDataset(items, None, mu=0), NoisyDataset(items, None, mu=0, friendly=False)):
        found = off[3]
        image = found[kind] if isinstance(found, dict) else found if isinstance(found, torch.Tensor) else found[0]
        original = items[3][kind] if isinstance(found, dict) else items[3] if image is found else items[3][0]
        assert torch.equal(image, to_pixels(original))


def test_an_image_that_is_not_on_the_byte_lattice_keeps_its_fractions(store):
    x = (DATA.x.float() + 0.3).clamp(max=255) / 255  # rounds to the same bytes
    noisy = NoisyDataset([*x], store, mu=0)
    expected = (x + store.tensor().float() / 255).clamp(0, 1)
    torch.testing.assert_close(torch.stack([noisy[i] for i in range(N)]), expected, rtol=0, atol=1e-6)


def test_the_transform_sees_both_noises_and_has_the_last_word(store):
    noisy = NoisyDataset(PLAIN, store, mu=0, transform=lambda x: ("seen", x.flip(2)))
    (word, x), row = noisy[4]
    assert word == "seen" and row == 4 and random_part(x.flip(2), 4, store).abs().max() < 1e-6


# ---- random noise


@pytest.mark.parametrize("kind", ["bernoulli", "uniform", "gaussian"])
def test_random_noise_comes_on_top_and_is_not_clamped(store, kind):
    noisy = NoisyDataset(PLAIN, store, random=kind, mu=MU)
    x = torch.stack([noisy[i][0] for i in range(N)])
    left = random_part(x, torch.arange(N), store)
    rms = {"bernoulli": MU, "uniform": MU / 3**0.5, "gaussian": MU}[kind]
    assert abs(float(left.square().mean().sqrt()) - rms) < 0.05 * MU
    assert x.min() < -0.01 and x.max() > 1.01
    if kind == "bernoulli":
        torch.testing.assert_close(left.abs(), torch.full_like(left, MU), rtol=0, atol=1e-6)


def test_random_noise_differs_between_images_and_epochs_and_leaves_the_global_state(store):
    noisy = NoisyDataset(PLAIN, store)
    rng = torch.get_rng_state()
    epochs = torch.stack([torch.stack([noisy[i][0] for i in range(N)]) for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), rng)
    left = torch.cat([random_part(x, torch.arange(N), store) for x in epochs])
    assert len({x.numpy().tobytes() for x in (left > 0)}) == 2 * N


def test_random_noise_follows_from_the_seed_of_torch():
    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        noisy = NoisyDataset(PLAIN, None)
        return torch.stack([noisy[i][0] for i in range(N)])

    with torch.random.fork_rng(devices=[]):
        first, again, other = epoch(1), epoch(1), epoch(2)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_ranks_of_distributed_training_draw_different_noise(monkeypatch):
    def rank(number: str) -> torch.Tensor:
        monkeypatch.setenv("RANK", number)
        return NoisyDataset(PLAIN, None)[0][0]

    assert torch.equal(rank("0"), rank("0")) and not torch.equal(rank("0"), rank("1"))


def test_random_noise_differs_between_workers_and_epochs(store):
    noisy = NoisyDataset(Subset(PLAIN, [5] * N), store)  # the same image again and again
    noisy[0]  # the generator of this process is in use when the workers are forked
    loader = DataLoader(noisy, 4, num_workers=2, persistent_workers=True, generator=shuffled())
    left = torch.cat([random_part(x, row, store) for _ in range(2) for x, row in loader])
    torch.testing.assert_close(left.abs(), torch.full_like(left, MU), rtol=0, atol=1e-6)
    assert len({x.numpy().tobytes() for x in (left > 0)}) == 2 * N


def test_friendly_noise_can_wait(store):
    noisy = NoisyDataset(PLAIN, store, mu=0, friendly=False)
    assert torch.equal(noisy[2][0], DATA.pixels()[2]) and not noisy.friendly
    noisy.friendly = True
    assert_right([noisy[2]], store)


# ---- the wrong noise


def test_an_augmenting_data_set_is_refused_whenever_it_strikes(store):
    class Flips(list):
        flip = True

        def __getitem__(self, i):
            x = super().__getitem__(i)
            return x.flip(2) if self.flip else x

    with pytest.raises(ValueError, match=r"row 0: these are not the pixels.*augmentation as transform="):
        NoisyDataset(Flips(DATA.x), store)
    quiet = Flips(DATA.x)
    quiet.flip = False
    noisy = NoisyDataset(quiet, store, mu=0)
    noisy[6]
    quiet.flip = True
    with pytest.raises(ValueError, match=r"row 6: these are not the pixels.*augmentation as transform="):
        noisy[6]
    noisy.friendly = False
    noisy[6]  # random noise alone does not care


def test_a_reordered_data_set_is_refused(store):
    moved = [DATA.x[i] for i in ORDER]
    with pytest.raises(
        ValueError, match=rf"row 0: .*belong to position {ORDER[0]}: the data were re-ordered; pass the key"
    ):
        NoisyDataset(moved, store)
    assert torch.equal(NoisyDataset(moved, store, mu=0, keys=ORDER)[0], NoisyDataset(PLAIN, store, mu=0)[ORDER[0]][0])


def test_unchecked_noise_goes_by_position(store):
    """For the control experiment in which every image gets the friendly noise of another."""
    moved = [DATA.x[i] for i in ORDER]
    x = NoisyDataset(moved, store, mu=0, check=False)[0]
    expected = (DATA.pixels()[ORDER[0]] + store.rows([0])[0]).clamp(0, 1)
    assert torch.equal(x, expected)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused_at_once(store):
    noisy = NoisyDataset(PLAIN, store)
    wide = byte_images(N, (3, 8, 9))
    for dataset, options, words in (
        (TensorDataset(DATA.x[:20]), {}, "noise of 24 images, the data set has 20: pass the key"),
        (Subset(TensorDataset(DATA.x[:20]), range(10)), {}, "noise of 24 images, the data set has 10"),
        (TensorDataset(wide.x), {}, r"images of \(3, 8, 8\), these are \(3, 8, 9\)"),
        (PLAIN, {"keys": [*range(N - 1), 77]}, "row 23: .*no noise for its key 77"),
        (PLAIN, {"keys": ["a"] * N}, "rows 0 and 1 have the same key 'a'"),
        (PLAIN, {"keys": [0]}, "1 keys for 24 images"),
        (PLAIN, {"mu": 16}, "did you mean 16/255"),
        (PLAIN, {"random": "salt"}, "unknown random noise 'salt'"),
        (noisy, {}, "noise would be added twice"),
        (Subset(noisy, range(N)), {}, "noise would be added twice"),
    ):
        with pytest.raises(ValueError, match=words):
            NoisyDataset(dataset, store, **options)
    with pytest.raises(TypeError, match=r"LabeledImages has no items; .* DeviceNoise"):
        NoisyDataset(DATA, store)


def test_an_image_of_another_size_is_refused(store):
    items = [*DATA.x]
    noisy = NoisyDataset(items, store)
    items[3] = items[3][:, :6]
    with pytest.raises(ValueError, match=r"row 3 is \(3, 6, 8\), its noise is \(3, 8, 8\).*crops at random"):
        noisy[3]


def test_the_repr_says_what_is_added(store):
    assert repr(NoisyDataset([*range(3)], None)) == "NoisyDataset([0, 1, 2], None, random='bernoulli', mu=16/255)"


# ---- on a device


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_device_noise_is_the_same_noise(store, device):
    idx = torch.tensor([3, 23, 3, 0], device=device)
    x = DATA.pixels()[idx.cpu()].to(device)
    g = torch.Generator(device).manual_seed(0)
    kept = x.clone()
    quiet = DeviceNoise(store, device, mu=0)(x, idx, g)
    assert quiet.device == x.device and torch.equal(x, kept)
    assert random_part(quiet.cpu(), idx.cpu(), store).abs().max() < 1e-6
    loud = DeviceNoise(store, device, mu=MU)
    left = [random_part(loud(x, idx, g).cpu(), idx.cpu(), store) for _ in range(2)]
    torch.testing.assert_close(left[0].abs(), torch.full_like(left[0], MU), rtol=0, atol=1e-6)
    assert not torch.equal(left[0] > 0, left[1] > 0)
    alone = DeviceNoise(None, device, mu=MU)(x, idx, g).cpu()
    torch.testing.assert_close((alone - x.cpu()).abs(), torch.full((4, 3, 8, 8), MU), rtol=0, atol=1e-6)


def test_device_noise_without_any_noise_is_the_same_tensor():
    x = DATA.pixels()
    assert DeviceNoise(None, "cpu", mu=0)(x, torch.arange(N), torch.Generator()) is x


@pytest.mark.usefixtures("unchecked")
def test_device_noise_refuses_what_does_not_fit(store):
    noise, g = DeviceNoise(store, "cpu"), torch.Generator()
    with pytest.raises(ValueError, match=r"images \(2, 3, 8, 8\) at 3 positions do not fit"):
        noise(DATA.pixels()[:2], torch.arange(3), g)
    with pytest.raises(ValueError, match="do not fit"):
        noise(DATA.pixels()[:2, :, :7], torch.arange(2), g)
    with pytest.raises(ValueError, match="did you mean 16/255"):
        DeviceNoise(store, "cpu", mu=16)


def test_noise_on_a_read_only_store(store, tmp_path: Path):
    """Nothing is written where noise is read."""
    before = {file: file.stat().st_mtime_ns for file in store.path.iterdir()}
    NoiseStore.load(store.path).check(PLAIN)
    assert np.all([before[file] == file.stat().st_mtime_ns for file in store.path.iterdir()])
