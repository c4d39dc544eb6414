"""Images with their friendly noise in them, read back by our own readers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_helpers import byte_images, small_net
from PIL import Image

from friends.data.images import LabeledImages
from friends.data.sources import load
from friends.noise import baked, baked_formats
from friends.noise.friendly import RELEASED
from friends.noise.store import NoiseStore
from interrupting import Stop, stop_at_call

N, CLASSES = 23, ("blue", "cat", "red")
KINDS = ("png", "parquet", "npz")
LEVELS = {"int8": RELEASED, "bits": RELEASED, "flips": replace(RELEASED, method="flips", steps=2)}


def images(n: int, channels: int, seed: int = 0) -> LabeledImages:
    return LabeledImages(byte_images(n, (channels, 8, 6), seed).x, torch.arange(n) % 3, CLASSES)


def write_npz(file: Path, train: LabeledImages, test: LabeledImages | None) -> str:
    arrays = {"x_train": train.x.permute(0, 2, 3, 1).numpy(), "y_train": train.y.numpy(), "classes": train.classes}
    if test is not None:
        arrays |= {"x_test": test.x.permute(0, 2, 3, 1).numpy(), "y_test": test.y.numpy()}
    np.savez(file, **arrays)
    return str(file)


def make_store(folder: Path, train: LabeledImages, coding: str = "int8") -> NoiseStore:
    chosen = replace(LEVELS[coding], steps=2)
    return NoiseStore.generate(small_net(train.shape[0]), train, folder, settings=chosen, seed=5, proxy="small",
                               coding=coding, shard_rows=10)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, NoiseStore]:
    """An npz file of coloured images, and the noise of its training part."""
    train, test = images(N, 3), images(7, 3, seed=1)
    return write_npz(tmp_path / "data.npz", train, test), make_store(tmp_path / "noise", train)


def expected(train: LabeledImages, store: NoiseStore) -> torch.Tensor:
    noisy = train.x.int() + store.tensor().int()
    return torch.where(noisy < 0, 0, torch.where(noisy > 255, 255, noisy)).to(torch.uint8)


def by_class(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """In the order in which an image folder is read."""
    return x[torch.argsort(y, stable=True)]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def export(data: tuple[str, NoiseStore], out: Path, kind: str = "png") -> None:
    baked.bake(baked.prepare(data[0], data[1].path, out, kind=kind))


def refused(
    data: tuple[str, NoiseStore], out: Path, message: str, kind: str = "png", store: Path | None = None
) -> None:
    before = everything(out)
    with pytest.raises((ValueError, OSError), match=message):
        baked.bake(baked.prepare(data[0], store or data[1].path, out, kind=kind))
    assert everything(out) == before


@pytest.mark.parametrize("coding", ["int8", "bits", "flips"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_is_image_plus_noise(tmp_path: Path, kind: str, channels: int, coding: str) -> None:
    train, test = images(N, channels), images(7, channels, seed=1)
    store = make_store(tmp_path / "noise", train, coding)
    export((write_npz(tmp_path / "data.npz", train, test), store), tmp_path / "out", kind)
    found, found_test = load(tmp_path / "out" / ("images.npz" if kind == "npz" else ""))
    noisy = expected(train, store)
    assert (noisy != train.x).float().mean() > 0.3
    if kind == "png":
        noisy, test = by_class(noisy, train.y), test.rows(torch.argsort(test.y, stable=True).tolist())
        train = train.rows(torch.argsort(train.y, stable=True).tolist())
    assert torch.equal(found.x, noisy) and torch.equal(found.y, train.y) and found.classes == CLASSES
    assert torch.equal(found_test.x, test.x) and torch.equal(found_test.y, test.y)


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_a_test_part_are_written_without_one(tmp_path: Path, kind: str) -> None:
    train = images(N, 3)
    store = make_store(tmp_path / "noise", train)
    export((write_npz(tmp_path / "data.npz", train, None), store), tmp_path / "out", kind)
    found, none = load(tmp_path / "out" / ("images.npz" if kind == "npz" else ""), lone=True)
    noisy = expected(train, store)
    assert torch.equal(found.x, by_class(noisy, train.y) if kind == "png" else noisy)
    assert len(none) == 0
    assert "There are no test images" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_was_killed_ends_with_the_same_bytes(
    tmp_path: Path, data: tuple[str, NoiseStore], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baked_formats, "AT_ONCE", 4)
    monkeypatch.setattr(baked_formats, "FILE_ROWS", 10)
    export(data, tmp_path / "whole", kind)
    for step in (1, 2, 5):
        out = tmp_path / f"killed-{step}"
        with pytest.raises(Stop):
            baked.bake(baked.prepare(data[0], data[1].path, out, kind=kind), progress=stop_at_call(step))
        assert (out / "export.json").is_file() and not (out / "README.md").exists()
        (out / ".half.png.123.tmp").write_bytes(b"torn")
        there = {name: (out / name).stat().st_mtime_ns for name in everything(out) if not name.endswith(".tmp")}
        export(data, out, kind)
        assert everything(out) == everything(tmp_path / "whole")
        assert all((out / name).stat().st_mtime_ns == time for name, time in there.items())  # not written twice


def picture_folder(root: Path, suffix: str = ".bmp") -> LabeledImages:
    """Two classes in train/ and test/, some files in folders of their own; as our reader reads it."""
    x = images(12, 3).x.permute(0, 2, 3, 1).numpy()
    for row, pixels in enumerate(x):
        part, name = ("train", f"deep/{row}") if row < 4 else ("train" if row < 8 else "test", str(row))
        file = root / part / ("cat" if row % 2 else "dog") / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return load(root)[0]


def test_an_image_folder_keeps_its_names(tmp_path: Path) -> None:
    train = picture_folder(tmp_path / "mine")
    store = make_store(tmp_path / "noise", train)
    export((str(tmp_path / "mine"), store), tmp_path / "out")
    theirs = {str(file.relative_to(tmp_path / "mine")) for file in (tmp_path / "mine").rglob("*.bmp")}
    assert {name.replace(".png", ".bmp") for name in everything(tmp_path / "out") if name.endswith(".png")} == theirs
    found, test = load(tmp_path / "out")
    assert torch.equal(found.x, expected(train, store)) and torch.equal(test.x, load(tmp_path / "mine")[1].x)


def test_names_that_differ_in_their_suffix_alone_keep_it(tmp_path: Path) -> None:
    picture_folder(tmp_path / "mine")
    Image.fromarray(np.full((8, 6, 3), 9, np.uint8)).save(tmp_path / "mine" / "train" / "dog" / "4.png")
    train = load(tmp_path / "mine")[0]
    store = make_store(tmp_path / "noise", train)
    export((str(tmp_path / "mine"), store), tmp_path / "out")
    assert {"4.bmp.png", "4.png.png", "6.bmp.png"} <= {file.name for file in (tmp_path / "out/train/dog").iterdir()}
    assert torch.equal(load(tmp_path / "out")[0].x, expected(train, store))


def test_a_folder_without_test_part_is_divided_as_its_store_was(tmp_path: Path) -> None:
    picture_folder(tmp_path / "mine")
    root = tmp_path / "mine" / "train"
    parts = {"divided": load(root), "whole": load(root, lone=True)}
    for name, (train, test) in parts.items():
        store = make_store(tmp_path / f"noise-{name}", train)
        export((str(root), store), tmp_path / name)
        found, found_test = load(tmp_path / name, lone=True)
        assert torch.equal(found.x, expected(train, store)) and torch.equal(found_test.x, test.x)
    assert len(parts["divided"][0]) < len(parts["whole"][0]) == 8


def test_the_readme_says_what_was_done_and_what_is_missing(tmp_path: Path, data: tuple[str, NoiseStore]) -> None:
    export(data, tmp_path / "out", "parquet")
    text = (tmp_path / "out" / "README.md").read_text()
    wanted = ("at most 16/255", "steps 2", "| seed | 5 |", data[1].fingerprint, "NOT in these images", "JPEG", "small",
              "7 test images are as they were")  # fmt: skip
    for words in wanted:
        assert words in text
    pixels = load(tmp_path / "out")[0].x.numpy() / 255
    for line in [line for line in text.splitlines() if line.startswith("x = ")]:
        here = {"x": pixels, "mu": 16 / 255, "rng": np.random.default_rng(0)}
        exec(line, here)
        assert 0.3 * 16 / 255 < np.abs(here["x"] - pixels).mean() < 1.1 * 16 / 255


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_near_what_is_written(tmp_path: Path, data: tuple[str, NoiseStore], kind: str) -> None:
    prepared = baked.prepare(*(data[0], data[1].path, tmp_path / "out"), kind=kind)
    said = prepared.bytes(prepared.left)
    assert not (tmp_path / "out").exists()
    baked.bake(prepared)
    sizes = [file.stat().st_size for file in (prepared.out / piece.path for piece in prepared.pieces)]
    blocks = sum(-(-size // 4096) * 4096 for size in sizes)
    assert 0.5 * blocks <= said <= 1.6 * blocks + 4096
    assert prepared.left == [] and prepared.bytes(prepared.left) == 0


def test_folders_that_hold_anything_else_are_refused(tmp_path: Path, data: tuple[str, NoiseStore]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(data, tmp_path / "mine", "is not empty and no export .it has 'letter.txt'.")
    (tmp_path / "mine" / "export.json").write_text("[]")
    refused(data, tmp_path / "mine", "is not empty and no export")
    refused(data, data[1].path, "is not empty and no export")
    (tmp_path / "file").write_text("")
    refused(data, tmp_path / "file", "is a file: choose a folder")
    export(data, tmp_path / "done")
    refused(data, tmp_path / "done", "holds a finished export")


def test_an_unfinished_export_of_something_else_is_refused(tmp_path: Path, data: tuple[str, NoiseStore]) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        baked.bake(baked.prepare(data[0], data[1].path, out), progress=stop_at_call(3))
    refused(data, out, "an unfinished export with another kind", kind="parquet")
    other = make_store(tmp_path / "other", images(N, 3), "bits")
    refused(data, out, "an unfinished export with another noise store", store=other.path)
    file = write_npz(tmp_path / "data.npz", images(N, 3), images(8, 3, seed=1))
    refused((file, data[1]), out, "an unfinished export with another test images")


def test_noise_of_other_images_is_refused_with_the_first_difference(
    tmp_path: Path, data: tuple[str, NoiseStore]
) -> None:
    train, test, out = images(N, 3), images(7, 3, seed=1), tmp_path / "out"
    train.x[11, 0, 0, 0] ^= 1
    write_npz(tmp_path / "data.npz", train, test)
    refused(data, out, "row 11: these are not the pixels")
    write_npz(tmp_path / "data.npz", images(N - 1, 3), test)
    refused(data, out, f"holds the noise of {N} images, the data set has {N - 1}")
    write_npz(tmp_path / "data.npz", images(N - 1, 3), None)
    refused(data, out, f"holds the noise of {N} images, the data set has {N - 1}")
    write_npz(tmp_path / "data.npz", images(N, 1), images(7, 1))
    refused(data, out, r"noise for images of \(3, 8, 6\), these are \(1, 8, 6\)")


def test_other_mistakes_are_named(
    tmp_path: Path, data: tuple[str, NoiseStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, train, test = tmp_path / "out", images(N, 3), images(7, 3, seed=1)
    refused(data, out, "unknown format 'jpeg'; choose one of png, parquet, npz", kind="jpeg")
    refused((str(tmp_path / "nowhere"), data[1]), out, "no file or folder")
    refused(data, out, "nowhere", store=tmp_path / "nowhere")
    write_npz(tmp_path / "data.npz", replace(train, classes=("a", "b/c", "d")), test)
    refused(data, out, "class 'b/c' cannot be the name of a folder: choose --format parquet or npz")
    write_npz(tmp_path / "data.npz", replace(train, classes=("a", "b", "a")), test)
    refused(data, out, "two classes have the same name")
    write_npz(tmp_path / "data.npz", train, test.rows([0, 1, 3]))
    refused(data, out, "class 'red' has no test image")
    write_npz(tmp_path / "data.npz", train, test)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    for kind in KINDS:
        refused(data, out, "needs about .* MB more, only 0.0 MB are free", kind=kind)
    assert not out.exists()


def test_damage_in_the_store_is_found_before_anything_is_written(tmp_path: Path, data: tuple[str, NoiseStore]) -> None:
    shard = data[1].path / "shard-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    refused(data, tmp_path / "out", "shard-00001")
    shard.unlink()
    refused(data, tmp_path / "out", "shard-00001|not complete")
    assert not (tmp_path / "out").exists()


def test_an_export_among_the_data_is_refused(tmp_path: Path) -> None:
    train = picture_folder(tmp_path / "mine")
    store = make_store(tmp_path / "noise", train)
    refused((str(tmp_path / "mine"), store), tmp_path / "mine" / "noisy", "lies in the data")


def test_four_channels_go_into_npz_alone(tmp_path: Path) -> None:
    train, test = images(N, 4), images(7, 4, seed=1)
    data = write_npz(tmp_path / "data.npz", train, test), make_store(tmp_path / "noise", train)
    refused(data, tmp_path / "out", "has 4 channels; parquet keeps grey and RGB", kind="parquet")
    export(data, tmp_path / "out", "npz")
    assert torch.equal(load(tmp_path / "out" / "images.npz")[0].x, expected(train, data[1]))
