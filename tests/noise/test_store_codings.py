"""Stores in every coding: the same promises, and what info says they cost."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_helpers import byte_images, small_net
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from friends.noise.friendly import PAPER
from friends.noise.grey import grey_noise
from friends.noise.random import add_noise
from friends.noise.store import NoiseStore

N = 23
FLIPS = replace(PAPER, method="flips", steps=2)
CODINGS = ["int8", "bits", "flips"]
SMALL = ["bits", "flips"]


def make(path: Path, coding: str, **changes: object) -> NoiseStore:
    options = {"settings": FLIPS, "seed": 4, "batch_size": 4, "shard_rows": 6, "coding": coding, **changes}
    model, data = options.pop("model", None) or small_net(), options.pop("data", None) or byte_images(N)
    return NoiseStore.generate(model, data, path, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def forge(folder: Path, change, shard: int = 1) -> None:
    """Change the tensors of a shard, and make the manifest believe in it."""
    path = folder / f"shard-{shard:05d}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    raw = path.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][shard].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NoiseStore]:
    """Stores that no test writes to."""
    return {coding: make(tmp_path_factory.mktemp(coding) / "store", coding) for coding in CODINGS}


@pytest.mark.parametrize("coding", CODINGS)
def test_corner_noise_is_the_same_in_every_coding(made, coding):
    """Also after it was sent to another process, and in any order of rows."""
    data, store = byte_images(N), made[coding]
    parts = [
        grey_noise(small_net(), data.x[rows], rows, FLIPS, seed=4, batch_size=4) for rows in torch.arange(N).split(6)
    ]
    grey = torch.cat(parts)
    assert set(grey.unique().tolist()) == {-16, 16}
    assert torch.equal(store.tensor(), grey)
    order = torch.tensor([22, 0, 7, 7, 13, 6, 5])
    assert torch.equal(store.grey(order), grey[order])
    assert torch.equal(store.rows(order), grey[order].float() / 255)
    assert torch.equal(store[13], grey[13].float() / 255)
    assert store.grey([]).shape == (0, 3, 8, 8)
    assert store.coding == coding
    assert torch.equal(pickle.loads(pickle.dumps(store)).tensor(), grey)  # noqa: S301 our own bytes
    store.check(data)


def test_bits_keep_the_signs_and_the_mean_size_of_any_noise(tmp_path):
    exact = make(tmp_path / "int8", "int8", settings=PAPER).tensor().int()
    kept = make(tmp_path / "bits", "bits", settings=PAPER).tensor().int()
    size = exact.abs().double().mean((1, 2, 3)).round().int()
    assert torch.equal(kept.abs(), size[:, None, None, None].expand_as(kept))
    assert torch.equal(kept > 0, exact > 0)
    assert int((exact == 0).sum()) > 0 and len(size.unique()) > 1


def test_noise_that_leaves_the_range_of_pixels_is_clipped_where_it_is_used(made):
    x = byte_images(N).x
    noise = made["flips"].grey(range(N))
    assert (x.int() + noise).min() < 0 and (x.int() + noise).max() > 255
    noisy = add_noise(x.float() / 255, made["flips"].rows(range(N)), mu=0, generator=torch.Generator())
    assert noisy.min() == 0 and noisy.max() == 1


def test_another_seed_is_other_noise(tmp_path, made):
    other = make(tmp_path / "s", "flips", seed=5).tensor()
    assert 0.4 < (other != made["flips"].tensor()).float().mean() < 0.6


def test_keys_bring_the_right_flips(tmp_path, made):
    """The signs of a row follow from its key: rows in another order are the same rows."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    moved = make(tmp_path / "s", "flips", data=byte_images(N).rows(order), keys=order)
    differ = moved[list(range(N))] != made["flips"].rows(range(N))
    assert differ.float().mean() < 0.002  # up to the rounding of a float
    named = make(tmp_path / "named", "flips", keys=[f"{i}.png" for i in range(N)])
    assert (named["7.png"] != made["flips"][7]).float().mean() > 0.3


# ---- what it costs


@pytest.mark.parametrize("coding", CODINGS)
def test_info_tells_the_bytes_of_the_noise_and_of_the_files(made, coding):
    info = json.loads(json.dumps(made[coding].info()))
    of_noise = {"int8": {"noise"}, "bits": {"signs", "level"}, "flips": {"gaps", "offsets"}}[coding]
    total = {"noise": 0, "rest": 0}
    for file in made[coding].path.glob("shard-*"):
        for name, tensor in load_file(file).items():
            total["noise" if name in of_noise else "rest"] += tensor.nbytes
    assert info["coding"] == coding
    assert info["bytes_per_image"] == pytest.approx(total["noise"] / N, abs=0.01)
    assert info["bits_per_value"] == pytest.approx(8 * total["noise"] / N / 192, abs=1e-4)
    assert info["bytes_per_image_of_key_and_hash"] == total["rest"] / N == 16
    assert info["share_at_bound"] == 1


@pytest.mark.parametrize(("coding", "settings"), [("int8", PAPER), ("bits", PAPER), ("bits", FLIPS), ("flips", FLIPS)])
def test_info_tells_the_divergence_before_and_after_coding(tmp_path, coding, settings):
    """By a computation of its own, on all rows of shards with fewer than 64."""
    before = make(tmp_path / "before", "int8", settings=settings).tensor()
    store = make(tmp_path / "after", coding, settings=settings)
    info, x, net = store.info(), byte_images(N).x, small_net().eval()

    def kl(noise: torch.Tensor) -> float:
        noisy = ((x.int() + noise).clamp(0, 255) / 255).float()
        with torch.no_grad():
            p, q = net(noisy).double().softmax(1), net(x / 255).double().softmax(1)
        return float(F.kl_div(q.log(), p, reduction="none").sum(1).mean())

    assert info["rows_measured"] == N
    assert info["kl_before_coding"] == pytest.approx(kl(before), abs=2e-6)
    assert info["kl_after_coding"] == pytest.approx(kl(store.tensor()), abs=2e-6)
    assert info["mean_abs_before_coding"] == f"{before.double().abs().mean():.2f}/255"
    assert info["mean_abs_after_coding"] == f"{store.tensor().double().abs().mean():.2f}/255" == info["mean_abs"]
    assert (info["kl_before_coding"] == info["kl_after_coding"]) == (settings is FLIPS or coding == "int8")


def test_of_a_large_shard_64_rows_are_measured(tmp_path):
    data = byte_images(200)
    store = make(tmp_path / "s", "bits", settings=replace(PAPER, steps=1), data=data, shard_rows=150)
    costs = [shard["cost"] for shard in json.loads((store.path / "manifest.json").read_text())["shards"]]
    assert [cost["rows"] for cost in costs] == [64, 50]
    rows = np.unique(np.linspace(0, 149, 64).astype(int))
    assert costs[0]["mean_abs_decoded"] == pytest.approx(float(store.grey(rows).double().abs().mean()), abs=1e-6)
    pooled = (64 * costs[0]["kl_decoded"] + 50 * costs[1]["kl_decoded"]) / 114
    assert store.info()["kl_after_coding"] == pytest.approx(pooled, abs=1e-6)


# ---- resuming, other plans, the format before


@pytest.mark.parametrize("coding", SMALL)
def test_stops_anywhere_and_continues_to_the_same_bytes(made, tmp_path, coding):
    class StopError(Exception):
        pass

    def stop(what: str, now: int, total: int, note: str = "", /) -> None:
        if now >= 10:
            raise StopError

    with pytest.raises(StopError):
        make(tmp_path / "s", coding, progress=stop)
    assert (tmp_path / "s" / "shard-00000.safetensors").exists()
    make(tmp_path / "s", coding)
    assert files(tmp_path / "s") == files(made[coding].path)


def test_another_coding_is_another_plan(made, tmp_path):
    store = make(tmp_path / "s", "bits")
    with pytest.raises(ValueError, match="its coding is 'bits', here it is 'flips'"):
        make(store.path, "flips")
    assert files(store.path) == files(made["bits"].path)


@pytest.mark.usefixtures("unchecked")
def test_a_coding_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="'flips' keeps noise of the method 'flips' only, this is of 'sgd'"):
        make(tmp_path / "s", "flips", settings=PAPER)
    with pytest.raises(ValueError, match="unknown coding 'gif'"):
        make(tmp_path / "s", "gif")
    assert not (tmp_path / "s").exists()


def as_format_1(folder: Path) -> None:
    """The manifest as it was written before there were codings, methods and precisions."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format"] = "friends noise 1"
    del manifest["plan"]["coding"]
    for name in ("method", "precision"):
        del manifest["plan"]["settings"][name]
    for shard in manifest["shards"]:
        del shard["cost"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_store_of_the_first_format_opens_and_is_continued(tmp_path):
    settings = replace(PAPER, steps=1)
    store = make(tmp_path / "s", "int8", settings=settings)
    whole, noise = files(store.path), store.tensor()
    as_format_1(store.path)
    old = NoiseStore.load(store.path)
    assert (old.coding, old.settings) == ("int8", settings)
    assert torch.equal(old.tensor(), noise)
    assert "kl_after_coding" not in old.info()
    (store.path / "shard-00002.safetensors").unlink()
    again = make(store.path, "int8", settings=settings)
    assert torch.equal(again.tensor(), noise)
    assert again.info()["rows_measured"] == 6  # of the shard that was made anew
    assert files(store.path)["shard-00002.safetensors"] == whole["shard-00002.safetensors"]


# ---- damage


@pytest.mark.parametrize("coding", SMALL)
def test_every_single_flipped_byte_of_a_shard_is_noticed(tmp_path, coding):
    path = make(tmp_path / "s", coding).path / "shard-00000.safetensors"
    raw = path.read_bytes()
    for place in range(0, len(raw), 13):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x41]) + raw[place + 1 :])
        with pytest.raises(ValueError, match="shard-00000"):
            NoiseStore.load(path.parent)


@pytest.mark.parametrize("coding", SMALL)
@pytest.mark.parametrize("damage", ["truncate", "lengthen", "delete"])
def test_a_torn_shard_is_refused_and_redone(made, tmp_path, coding, damage):
    path = make(tmp_path / "s", coding).path / "shard-00001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-3] if damage == "truncate" else raw + b"\0")
    if damage == "delete":
        path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is (torn|missing)"):
        NoiseStore.load(path.parent, verify=False)
    make(path.parent, coding)
    assert files(path.parent) == files(made[coding].path)


def gaps(*rows: list[int], offsets: list[int] | None = None, kind: torch.dtype = torch.int32):
    """Other gaps in the shard: of as many rows as are given, the others being empty."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        sizes = [len(row) for row in rows] + [0] * (6 - len(rows))
        tensors["gaps"] = torch.tensor([gap for row in rows for gap in row], dtype=torch.uint8)
        tensors["offsets"] = torch.tensor(offsets or [0, *np.cumsum(sizes).tolist()], dtype=kind)

    return change


@pytest.mark.parametrize(
    ("coding", "change", "words"),
    [
        ("bits", lambda t: t["level"].__setitem__(2, 17), "row 2 holds noise of 17/255, beyond its zeta of 16/255"),
        ("bits", lambda t: t.update(signs=t["signs"][:, :-1].clone()), r"signs is U8 \(6, 23\), not U8 \(6, 24\)"),
        ("bits", lambda t: t.update(level=t["level"].view(torch.int8)), r"level is I8 \(6,\), not U8 \(6,\)"),
        ("bits", lambda t: t.pop("level"), "holds the tensors content, keys, signs, not content, keys, level, signs"),
        ("flips", lambda t: t["keys"].add_(1), "the keys in its shards are not those of the manifest"),
        ("flips", gaps([3], [], [7, 191]), "row 2 is damaged: its gaps pass beyond its last value"),
        ("flips", gaps([3], [2, 255]), "row 1 is damaged: its gaps pass beyond its last value, or end without a mark"),
        (
            "flips",
            gaps([3], offsets=[0, 1, 1, 1, 1, 1, 2]),
            "row 5 is damaged: its gaps are said to be bytes 1 to 2 of 1",
        ),
        ("flips", gaps([3], offsets=[0, -5, 1, 1, 1, 1, 1]), "row 0 is damaged: its gaps are said to be bytes 0 to -5"),
        ("flips", gaps([3], offsets=[0, 2**31 - 1, 1, 1, 1, 1, 1]), "row 0 is damaged: its gaps are said to be bytes"),
        ("flips", gaps([3], offsets=[1] * 7), "its rows are said to be bytes 1 to 1 of 1"),
        ("flips", gaps([3, 4], offsets=[0, 1, 1, 1, 1, 1, 1]), "its rows are said to be bytes 0 to 1 of 2"),
        ("flips", gaps([0] * 193), "row 0 is damaged: its gaps are said to be bytes 0 to 193"),
        ("flips", gaps([3], kind=torch.int64), r"offsets is I64 \(7,\), not I32 \(7,\)"),
        ("flips", gaps([3], offsets=[0, 1]), r"offsets is I32 \(2,\), not I32 \(7,\)"),
        ("flips", lambda t: t.update(gaps=t["gaps"][None].clone()), r"gaps is U8 \(1, \d+\), not U8 \(None,\)"),
        ("int8", lambda t: t["noise"][2, 0, 0].fill_(17), "row 2 holds noise of 17/255, beyond its zeta of 16/255"),
    ],
)
def test_a_forged_shard_is_refused(tmp_path, coding, change, words):
    store = make(tmp_path / "s", coding)
    forge(store.path, change)
    with pytest.raises(ValueError, match=words) as refusal:
        NoiseStore.load(store.path)
    assert "keys in its" in words or "shard-00001.safetensors" in str(refusal.value)


def test_a_forged_row_is_refused_when_it_is_read_without_having_been_verified(tmp_path):
    store = make(tmp_path / "s", "flips")
    forge(store.path, gaps([1], [2], [3], [4], [5], [6, 255]))
    opened = NoiseStore.load(store.path, verify=False)
    opened.grey([0, 6, 22])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: row 5 is damaged"):
        opened.grey([0, 11, 22])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["plan"].update(coding="gif"), "damaged: ValueError: unknown coding 'gif'"),
        (lambda m: m["plan"].update(coding=["flips"]), "damaged: "),
        (lambda m: m["plan"].pop("coding"), "damaged: TypeError"),
        (
            lambda m: m["plan"].update(coding="bits"),
            r"holds the tensors content, gaps, keys, offsets, not content, keys",
        ),
        (lambda m: m["plan"]["settings"].update(method="sgd"), "damaged: ValueError: the coding 'flips' keeps noise"),
        (lambda m: m["shards"][0]["cost"].pop("kl"), "damaged: TypeError"),
        (lambda m: m["shards"][0]["cost"].update(kl="0"), "damaged: TypeError"),
        (lambda m: m["shards"][0]["cost"].update(kl=float("nan")), "damaged: ValueError"),
        (lambda m: m["shards"][0]["cost"].update(rows=0), "damaged: ValueError"),
        (lambda m: m["shards"][0].update(cost=[1]), "damaged: TypeError"),
    ],
)
def test_a_lying_manifest_is_refused(tmp_path, change, words):
    folder = make(tmp_path / "s", "flips").path
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=words):
        NoiseStore.load(folder)
