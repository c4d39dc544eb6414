"""The noise store: the right bytes, resumable, and every wrong pairing or damaged file refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_helpers import byte_images, small_net
from PIL import Image
from safetensors.torch import load_file, save_file

from friends.data.files import owned
from friends.noise.friendly import PAPER, RELEASED, FriendlySettings, friendly_noise
from friends.noise.store import NoiseStore, grey_noise, initial_noise

QUICK = replace(RELEASED, steps=3)
N = 23


def make(path: Path, **changes: object) -> NoiseStore:
    options = {"settings": QUICK, "seed": 4, "batch_size": 4, "shard_rows": 6, "proxy": "tiny", **changes}
    model, data = options.pop("model", None) or small_net(), options.pop("data", None) or byte_images(N)
    return NoiseStore.generate(model, data, path, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> NoiseStore:
    """A store that no test writes to."""
    return make(tmp_path_factory.mktemp("noise") / "store")


@pytest.fixture
def store(tmp_path: Path) -> NoiseStore:
    """A store to damage."""
    return make(tmp_path / "store")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def adopt(folder: Path, shard: int = 0) -> None:
    """Make the manifest believe in a shard as it is now, as somebody who forges a store would."""
    raw = (folder / f"shard-{shard:05d}.safetensors").read_bytes()
    record = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "images": ""}
    edit_manifest(folder, lambda value: value["shards"].__setitem__(shard, record))


# ---- the start of each row


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 of the counter (counter, 0, 0, 0), from the paper's description."""
    word = 2**64 - 1
    x, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k0, b & word, (a >> 64) ^ x[3] ^ k1, a & word]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return x


@pytest.mark.parametrize(("seed", "key"), [(0, 0), (7, -1), (-3, 2**63 - 1), (2**70 + 5, -(2**63))])
def test_the_bits_of_the_start_are_frozen(seed, key):
    words = [w for counter in (1, 2, 3) for w in philox(counter, (seed % 2**64, key % 2**64))]
    halves = [half for w in words for half in (w & 0xFFFFFFFF, w >> 32)][:21]
    expected = [(2 * (half >> 8) - 2**24) / 2**24 * 0.25 for half in halves]
    assert initial_noise([key], (3, 7, 1), 0.25, seed).flatten().tolist() == expected


def test_a_start_depends_on_seed_and_key_alone():
    start = initial_noise([5, 6, 7], (3, 4, 4), 0.1, seed=1)
    assert torch.equal(initial_noise(torch.tensor([7, 5]), (3, 4, 4), 0.1, seed=1), start[[2, 0]])
    assert not torch.equal(start[0], start[1])
    assert not torch.equal(initial_noise([5], (3, 4, 4), 0.1, seed=2)[0], start[0])
    assert initial_noise([], (3, 4, 4), 0.1, seed=1).shape == (0, 3, 4, 4)


def test_the_start_is_uniform():
    start = initial_noise(range(50), (3, 16, 16), 0.5, seed=0)
    assert -0.5 <= start.min() < -0.499 and 0.499 < start.max() < 0.5
    found = start.flatten().quantile(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(found, torch.tensor([-0.4, 0.0, 0.4]), rtol=0, atol=0.01)
    assert abs(float((start[1:] * start[:-1]).mean())) < 0.002  # rows are unrelated


# ---- grey levels


@pytest.mark.parametrize("chosen", [RELEASED, PAPER, replace(RELEASED, zeta=5.5 / 255)])
def test_grey_noise_is_friendly_noise_in_whole_levels(chosen):
    x, keys = byte_images(9).x, torch.arange(100, 109)
    grey = grey_noise(small_net(), x, keys, chosen, seed=3, batch_size=4).to(torch.int16)
    exact = friendly_noise(small_net(), x.float() / 255, chosen, initial=initial_noise(keys, (3, 8, 8), chosen.init, 3))
    assert (x + grey).min() >= 0 and (x + grey).max() <= 255
    assert grey.abs().max() == int(chosen.zeta * 255 + 1e-6)
    off = (grey - exact * 255).abs()
    assert 0.4 < off.max() < 0.51  # rounded to the nearest level; 5.5/255 leaves levels up to 5


def test_grey_noise_goes_to_127_and_no_further():
    x = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    loud = replace(PAPER, zeta=127 / 255, lr=1e4, steps=2)
    assert grey_noise(small_net(), x, [0, 1], loud, seed=0).abs().max() == 127
    with pytest.raises(ValueError, match="at most 127/255, not 128/255"):
        grey_noise(small_net(), x, [0, 1], replace(loud, zeta=128 / 255), seed=0)


@pytest.mark.usefixtures("unchecked")
def test_grey_noise_refuses_floats_and_missing_keys():
    x = byte_images(3).x
    with pytest.raises(TypeError, match=r"uint8 images .* not torch\.float32"):
        grey_noise(small_net(), x / 255, [0, 1, 2], seed=0)
    with pytest.raises(ValueError, match="2 keys for 3 images"):
        grey_noise(small_net(), x, [0, 1], seed=0)


def test_progress_counts_images():
    told: list[tuple[str, int, int]] = []
    grey_noise(small_net(), byte_images(9).x, range(9), QUICK, seed=0, batch_size=4,
               progress=lambda what, done, total, note="": told.append((what, done, total)))  # fmt: skip
    assert told == [("friendly noise", done, 9) for done in (4, 8, 9)]


# ---- making a store


def test_a_store_holds_the_noise_of_its_images(made):
    data = byte_images(N)
    parts = [
        grey_noise(small_net(), data.x[rows], rows, QUICK, seed=4, batch_size=4) for rows in torch.arange(N).split(6)
    ]
    grey = torch.cat(parts)
    assert torch.equal(made.tensor(), grey) and grey.any()
    order = torch.tensor([22, 0, 7, 7, 13])
    assert torch.equal(made.grey(order), grey[order])
    assert torch.equal(made.rows(order), grey[order].float() / 255)
    assert torch.equal(made[13], grey[13].float() / 255) and torch.equal(made[[22, 0]], made.rows([22, 0]))
    assert torch.equal(made.keys, torch.arange(N)) and len(made) == made.n == N
    assert (made.shape, made.zeta, made.settings, made.seed, made.proxy) == ((3, 8, 8), 16 / 255, QUICK, 4, "tiny")
    assert made.grey([]).shape == (0, 3, 8, 8)
    with pytest.raises(IndexError, match="position 23 is not in a store of 23 images"):
        made.rows([0, 23])
    with pytest.raises(IndexError, match="position -1"):
        made.rows([-1])


Pair = namedtuple("Pair", "img label")


@pytest.mark.parametrize(
    "item",
    [
        lambda x: x,
        lambda x: x.float() / 255,
        lambda x: (x.permute(1, 2, 0).numpy(), 1),
        lambda x: [Image.fromarray(x.permute(1, 2, 0).numpy()), "label"],
        lambda x: Pair(x, 3),
        lambda x: {"label": 1, "image": x},
        lambda x: {"img": x.double() / 255},
    ],
    ids=["bytes", "floats", "array in tuple", "PIL in list", "namedtuple", "image field", "img field"],
)
def test_every_kind_of_data_set_gives_the_same_bytes(made, tmp_path, item):
    again = make(tmp_path / "s", data=[item(x) for x in byte_images(N).x])
    assert files(again.path) == files(made.path)


def test_info(tmp_path):
    store = make(tmp_path / "s", settings=replace(QUICK, zeta=6 / 255))  # less than the start: many at the bound
    info = json.loads(json.dumps(store.info()))
    grey = store.tensor().float().abs()
    assert (info["n"], info["shape"], info["zeta"], info["proxy"], info["shards"]) == (N, [3, 8, 8], "6/255", "tiny", 4)
    assert info["settings"]["steps"] == 3
    assert info["mean_abs"] == f"{grey.mean():.2f}/255"
    assert info["share_at_bound"] == pytest.approx(float((grey == 6).float().mean()), abs=1e-4)
    assert info["share_at_bound"] > 0.05
    assert info["bytes"] == sum(file.stat().st_size for file in store.path.glob("shard-*"))


def test_the_world_is_as_before(tmp_path):
    net = small_net().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    rng, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 that it is not touched
    data = byte_images(N)
    kept = data.x.clone()
    make(tmp_path / "s", model=net, data=data)
    assert torch.equal(torch.get_rng_state(), rng) and (np.random.get_state()[1] == legacy).all()  # noqa: NPY002
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(data.x, kept)


def test_stops_anywhere_and_continues_to_the_same_bytes(made, tmp_path):
    class StopError(Exception):
        pass

    done: list[int] = []

    def stop_after(images: int):
        def progress(what: str, now: int, total: int, note: str = "", /) -> None:
            done.append(now)
            if now >= images:
                raise StopError

        return progress

    folder = tmp_path / "s"
    for images in (4, 10, 20):
        with pytest.raises(StopError):
            make(folder, progress=stop_after(images))
        with pytest.raises(ValueError, match=rf"{4 - images // 6} of 4 shards are missing.*continues where it stopped"):
            NoiseStore.load(folder)
    done.clear()
    make(folder, progress=stop_after(10**9))
    assert done == [22, 23]  # only the last shard was left
    assert files(folder) == files(made.path)
    done.clear()
    make(folder, progress=stop_after(10**9))
    assert done == []  # a complete store is opened at once


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_torn_shard_is_refused_and_redone(made, store, damage):
    path = store.path / "shard-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw if damage == "flip" else raw[:-3])
    if damage == "delete":
        path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is (torn|missing)"):
        NoiseStore.load(store.path)
    make(store.path)
    assert files(store.path) == files(made.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, "its seed is 4, here it is 5"),
        ({"settings": replace(QUICK, steps=4)}, "its settings.steps is 3, here it is 4"),
        ({"settings": replace(QUICK, zeta=8 / 255)}, "settings.zeta"),
        ({"batch_size": 5}, "batch_size is 4, here it is 5"),
        ({"shard_rows": 7}, "shard_rows is 6, here it is 7"),
        ({"proxy": "other"}, "proxy is 'tiny', here it is 'other'"),
        ({"model": small_net(seed=1)}, "its model is"),
        ({"data": byte_images(N - 1)}, "its n is 23, here it is 22"),
        ({"data": byte_images(N, (3, 8, 9))}, "its shape is"),
        ({"keys": [f"{i}.png" for i in range(N)]}, "its keys is"),
        ({"data": byte_images(N, seed=1)}, "begun with other images: row 0 differs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_plan_is_refused_and_nothing_is_lost(made, store, change, words):
    with pytest.raises(ValueError, match=words):
        make(store.path, **change)
    assert files(store.path) == files(made.path)


def test_a_model_differs_in_its_statistics_too(store):
    net = small_net()
    net[1].running_mean.add_(0.1)
    with pytest.raises(ValueError, match="its model is"):
        make(store.path, model=net)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not empty and no noise store \(it has 'thesis.tex'\)"):
        make(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        make(tmp_path / "thesis.tex")
    assert files(tmp_path) == {"thesis.tex": b"precious"}


def test_what_killed_writers_left_is_removed(made, store):
    for name in (".manifest.json.4711.tmp", ".shard-00002.safetensors.4711.tmp"):
        (store.path / name).write_bytes(b"half")
    make(store.path)
    assert files(store.path) == files(made.path)


def test_two_processes_cannot_make_one_store(tmp_path):
    pytest.importorskip("fcntl", reason="no file locks on this system")
    (tmp_path / "s").mkdir()
    with owned(tmp_path / "s"), pytest.raises(BlockingIOError, match="another process"):
        make(tmp_path / "s")
    make(tmp_path / "s")


@pytest.mark.usefixtures("unchecked")
def test_data_that_cannot_have_noise_are_refused(tmp_path):
    x = list(byte_images(5).x)
    draws = torch.Generator().manual_seed(0)

    class Augmented(list):
        def __getitem__(self, i):
            return x[i].roll(int(torch.randint(8, (), generator=draws)), 2)

    cases = [
        (Augmented(x), ValueError, "other pixels when it is read again: take random augmentation out"),
        ([*x[:3], x[3][:, :7]], ValueError, r"row 3 is \(3, 7, 8\), not \(3, 8, 8\).*resize or crop"),
        ([*x[:2], {"pixels": x[2]}], TypeError, "row 2 of the data set: .*'pixels': none is 'image' or 'img'"),
        ([*x[:2], ()], TypeError, "row 2 .*empty tuple"),
        ([*x[:2], x[2].float()], ValueError, "row 2 .*divide by 255"),
        ([], ValueError, "no image"),
        (iter(x), TypeError, "not a map-style data set"),
    ]
    for number, (data, error, words) in enumerate(cases):
        with pytest.raises(error, match=words):
            NoiseStore.generate(small_net(), data, tmp_path / str(number), settings=QUICK)


def test_settings_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path):
    for zeta, words in ((128 / 255, "at most 127/255"), (0.0, "no noise"), (0.9 / 255, "less than one grey level")):
        with pytest.raises(ValueError, match=words):
            make(tmp_path / "s", settings=replace(QUICK, zeta=zeta))
    with pytest.raises(ValueError, match="must be positive"):
        make(tmp_path / "s", shard_rows=0)
    assert not (tmp_path / "s").exists()


# ---- keys


def test_rows_are_found_by_key(tmp_path):
    names = [f"dogs/{i:03d}.png" for i in range(N)]
    store = make(tmp_path / "s", keys=names)
    assert [store.position(name) for name in names] == list(range(N))
    assert torch.equal(store["dogs/007.png"], store.rows([7])[0])
    assert torch.equal(store[names[3:5]], store.rows([3, 4]))
    with pytest.raises(KeyError, match=r"no noise for the key 'cats/000.png'"):
        store["cats/000.png"]
    with pytest.raises(KeyError, match="no noise for the key 3"):
        store[3]
    assert len(set(store.keys.tolist())) == N


def test_noise_follows_the_key_not_the_position(made, tmp_path):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    moved = make(tmp_path / "s", data=byte_images(N).rows(order), keys=order)
    differ = (moved[list(range(N))] - made.rows(range(N))).abs()
    assert differ.mean() < 0.02 / 255  # up to the rounding of a float


@pytest.mark.usefixtures("unchecked")
def test_keys_must_be_unique_and_fit(tmp_path):
    for keys, error, words in (
        (["a", "b", "a", *"cdefghijklmnopqrstuv"], ValueError, "rows 0 and 2 have the same key 'a'"),
        (range(N - 1), ValueError, "22 keys for 23 images"),
        ([2**63, *range(N - 1)], ValueError, "does not fit in 64 bits"),
        ([1.5, *range(N - 1)], TypeError, "an integer or a string, not float 1.5"),
    ):
        with pytest.raises(error, match=words):
            make(tmp_path / "s", keys=keys)


# ---- the wrong pairing


def test_the_right_images_pass(made):
    data = byte_images(N)
    made.check(data)
    made.check([(x.float() / 255, 0) for x in data.x], rows=N)
    made.check(data.rows([4, 2, 9]), keys=[4, 2, 9])
    made.check_zeta(16 / 255)


def test_the_wrong_images_are_refused(made):
    data = byte_images(N)
    other = replace(data, x=data.x.clone())
    other.x[17, 0, 0, 0] ^= 1  # one grey level of one pixel
    swapped = data.rows([*range(5), 6, 5, *range(7, N)])
    for wrong, options, words in (
        (data.rows(range(N - 1)), {}, "noise of 23 images, the data set has 22: pass the key"),
        (byte_images(N, (3, 8, 9)), {}, r"images of \(3, 8, 8\), these are \(3, 8, 9\)"),
        (other, {}, "row 17: these are not the pixels that the noise .* was made for.*augments"),
        (swapped, {}, "row 5: .*belong to position 6: the data were re-ordered"),
        (data, {"keys": [*range(N - 1), 99]}, "row 22: .*no noise for its key 99"),
        (data, {"keys": [1, 0, *range(2, N)]}, "row 0: these are not the pixels"),
        (list(other.x), {"rows": N}, "row 17: these are not"),
    ):
        with pytest.raises(ValueError, match=words):
            made.check(wrong, **options)
    with pytest.raises(ValueError, match="made for zeta 16/255, not 8/255"):
        made.check_zeta(8 / 255)


def test_data_on_disk_are_sampled_evenly(made):
    read: list[int] = []

    class Lazy(list):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    made.check(Lazy(byte_images(N).x), rows=5)
    assert sorted(set(read)) == [0, 5, 11, 16, 22]


# ---- hostile and damaged files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="friends noise 3"), "not a noise store of this version: format 'friends noise 3'"),
        (lambda m: m["plan"].pop("n"), "damaged: KeyError: 'n'"),
        (lambda m: m["plan"].update(extra=1), "damaged: TypeError"),
        (lambda m: m["plan"].update(n="23"), "damaged: TypeError"),
        (lambda m: m["plan"].update(n=-1), "damaged: ValueError.*must be positive"),
        (lambda m: m["plan"].update(n=10**12), "damaged: it lists 4 shards, the plan has"),
        (lambda m: m["plan"].update(shape=[3, 8]), "damaged: ValueError"),
        (lambda m: m["plan"].update(shape=[3, 8, 9]), "noise is I8 .*, not I8"),
        (lambda m: m["plan"].update(keys="0" * 64), "the keys in its shards are not those"),
        (lambda m: m["plan"]["settings"].update(zeta=0.9), "damaged: ValueError.*at most 127/255"),
        (lambda m: m["plan"]["settings"].update(zeta=2 / 255), r"holds noise of \d+/255, beyond its zeta of 2/255"),
        (lambda m: m["shards"].pop(), "lists 3 shards, the plan has 4"),
        (lambda m: m["shards"].__setitem__(0, {"bytes": "a"}), "damaged: "),
        (lambda m: m["shards"].__setitem__(2, None), "1 of 4 shards are missing"),
        (lambda m: m["shards"].reverse(), "is torn"),
    ],
)
def test_a_lying_manifest_is_refused(store, change, words):
    edit_manifest(store.path, change)
    with pytest.raises(ValueError, match=words):
        NoiseStore.load(store.path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"x"', b"[" * 5000, b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(store, raw):
    (store.path / "manifest.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"torn or no JSON|not a noise store"):
        NoiseStore.load(store.path)


def test_no_store_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no noise store at"):
        NoiseStore.load(tmp_path)


def tensors_of(store: NoiseStore) -> tuple[Path, dict[str, torch.Tensor]]:
    path = store.path / "shard-00000.safetensors"
    return path, load_file(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["noise"][2, 0, 0].fill_(17), "noise of 17/255, beyond its zeta of 16/255"),
        (lambda t: t["noise"][2, 0, 0].fill_(-128), "noise of 128/255, beyond its zeta of 16/255"),
        (lambda t: t["keys"].add_(1), "the keys in its shards are not those"),
        (
            lambda t: t.update(noise=t["noise"].reshape(6, 3, 4, 16)),
            r"noise is I8 \(6, 3, 4, 16\), not I8 \(6, 3, 8, 8\)",
        ),
        (lambda t: t.update(noise=t["noise"].view(torch.uint8)), "noise is U8"),
        (lambda t: t.update(noise=t["noise"].float()), "noise is F32"),
        (lambda t: t.update(more=torch.zeros(3)), "holds the tensors content, keys, more, noise"),
        (lambda t: t.pop("content"), "holds the tensors keys, noise"),
    ],
)
def test_a_forged_shard_is_refused(store, change, words):
    path, tensors = tensors_of(store)
    change(tensors)
    save_file(tensors, path)
    adopt(store.path)
    with pytest.raises(ValueError, match=words):
        NoiseStore.load(store.path)


@pytest.mark.parametrize(
    "header",
    [
        (1 << 40).to_bytes(8, "little"),
        (70_000).to_bytes(8, "little") + b" " * 70_000,
        (9).to_bytes(8, "little") + b'{"noise":',
        (2).to_bytes(8, "little") + b"[]",
        b"\x80\x04pickle",
        b"",
    ],
    ids=["claims a terabyte", "too large", "half", "no object", "a pickle", "empty"],
)
def test_a_shard_with_a_bad_header_is_refused(store, header):
    path, _ = tensors_of(store)
    path.write_bytes(header)
    adopt(store.path)
    with pytest.raises(ValueError, match=r"claims a header|torn or not a safetensors file|not a safetensors"):
        NoiseStore.load(store.path)


def test_offsets_beyond_the_file_are_refused(store):
    path, _ = tensors_of(store)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["noise"]["data_offsets"][1] += 10**6
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    adopt(store.path)
    with pytest.raises(ValueError, match="torn or not a safetensors file"):
        NoiseStore.load(store.path)


def test_every_single_flipped_byte_of_a_shard_is_noticed(store):
    path, _ = tensors_of(store)
    raw = path.read_bytes()
    for place in range(0, len(raw), len(raw) // 40):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x41]) + raw[place + 1 :])
        with pytest.raises(ValueError, match=r"shard-00000"):
            NoiseStore.load(store.path)


# ---- other processes, memory


def test_a_pickled_store_is_opened_again_and_must_be_the_same(store):
    sent = pickle.dumps(store)
    assert len(sent) < 1000  # by path: no noise travels
    assert torch.equal(pickle.loads(sent).tensor(), store.tensor())  # noqa: S301 our own bytes
    for file in store.path.iterdir():
        file.unlink()
    make(store.path, seed=5)
    with pytest.raises(ValueError, match="replaced by another one"):
        pickle.loads(sent)  # noqa: S301


MEMORY = """
import resource, sys, tempfile, torch
from dataclasses import replace
from torch import nn
from friends.noise.friendly import RELEASED
from friends.noise.store import NoiseStore

class Images:
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((3, 64, 64), i % 256, dtype=torch.uint8), 0

torch.set_num_threads(1)
coding = sys.argv[1]

def peak(n, folder):
    net = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(48, 3))
    quick = replace(RELEASED, steps=1, method="flips" if coding == "flips" else "sgd")
    NoiseStore.generate(net, Images(n), folder, settings=quick, coding=coding, batch_size=64, shard_rows=64)
    NoiseStore.load(folder).check(Images(n))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)

with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
    print(peak(192, a), peak(2048, b))
"""


@pytest.mark.parametrize("coding", ["int8", "bits", "flips"])
def test_memory_does_not_grow_with_the_images(coding):
    pytest.importorskip("resource", reason="peak memory is not known on this system")
    done = subprocess.run([sys.executable, "-c", MEMORY, coding], capture_output=True, text=True, check=True)
    few, many = map(float, done.stdout.split())
    assert many - few < 10, (few, many)  # 1,856 more images are 23 MB as bytes, as much noise, and 91 MB as floats


def test_a_finished_store_is_not_handed_out_for_images_of_which_few_differ(tmp_path, digits, digit_net):
    """One poisoned image in two hundred is enough, where the images are in memory."""
    data = digits.sample(200, torch.Generator().manual_seed(0))
    NoiseStore.generate(digit_net, data, tmp_path / "s", settings=FriendlySettings(steps=1), shard_rows=64)
    x = data.x.clone()
    x[137, 0, 5, 5] += 1
    changed = type(data)(x, data.y, data.classes)
    with pytest.raises(ValueError, match="row 137 differs"):
        NoiseStore.generate(digit_net, changed, tmp_path / "s", settings=FriendlySettings(steps=1), shard_rows=64)


def test_the_fingerprint_follows_the_images_and_not_the_noise(tmp_path, digits, digit_net):
    data = digits.sample(50, torch.Generator().manual_seed(0))
    other = digits.sample(50, torch.Generator().manual_seed(1))

    def made(name, images, steps):
        settings = FriendlySettings(steps=steps)
        return NoiseStore.generate(digit_net, images, tmp_path / name, settings=settings, shard_rows=16)

    a, b, c = made("a", data, 1), made("b", data, 2), made("c", other, 1)
    assert not torch.equal(a.tensor(), b.tensor())
    assert a.fingerprint == b.fingerprint == a.info()["images"]
    assert a.fingerprint != c.fingerprint
