"""Published poison files: what others wrote is read, and what is written here is what their programs read."""

from __future__ import annotations

import os
import pickle
import pickletools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import legacy_readers as others
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image
from torch import Tensor

with install_import_hook("friends.data.legacy", "typecheck.tower"):
    from friends.data.legacy import (
        UnsafePickleError,
        by_class,
        export,
        read_folder,
        read_metapoison,
        read_setups,
        write_folder,
    )

from friends.data import recorded_torch
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, Patch, PoisonedDataset
from friends.data.triggers import Stamp, colour_grid

CLASSES = tuple("abcdefghij")
FILES = ("poisons.pickle", "base_indices.pickle", "target.pickle")


def data(n: int = 60, shape: tuple[int, int, int] = (3, 12, 12), classes: int = 3, seed: int = 0) -> LabeledImages:
    """Random images, of all bytes from 0 to 255; labels in turn."""
    x = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return LabeledImages(x, torch.arange(n) % classes, CLASSES[:classes], "clean")


def poison(clean: LabeledImages, rows: list[int], goal: Goal, by: int = 16, seed: int = 1) -> PoisonedDataset:
    """Rows moved by at most ``by`` grey levels, at least one of them by exactly that."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(-by, by + 1, (len(rows), *clean.shape), generator=generator)
    step[:, 0, 0, 0] = torch.where(clean.x[rows, 0, 0, 0] > 127, -by, by)
    x = clean.x.clone()
    x[rows] = (x[rows].int() + step).clamp(0, 255).to(torch.uint8)
    poisoned = PoisonedDataset(replace(clean, x=x), torch.tensor(rows), goal)
    poisoned.check(clean, xi=by / 255)
    return poisoned


def target(clean: LabeledImages, true: int = 0, wanted: int = 1, m: int = 1, seed: int = 2) -> Goal:
    shown = data(m, clean.shape, seed=seed).pixels()
    return Goal(shown, torch.full((m,), true), torch.full((m,), wanted))


def patched(clean: LabeledImages, trigger: Patch | Stamp, m: int) -> Goal:
    generator = torch.Generator().manual_seed(3)
    return replace(g := target(clean, m=m), x=trigger(g.x, generator), trigger=trigger)


def pil(x: Tensor) -> Image.Image:
    pixels = x.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


def pairs(part: LabeledImages) -> list[others.Pair]:
    return [(pil(x), int(y)) for x, y in zip(part.x, part.y, strict=True)]


def as_bytes(x: Tensor) -> Tensor:
    """Images of the other programs, in [0, 1], as the bytes that they were made of."""
    assert torch.equal(x, (x * 255).round() / 255)
    return (x * 255).round().to(torch.uint8)


def same(a: PoisonedDataset, b: PoisonedDataset) -> bool:
    tensors = [(p.train.x, p.train.y, p.poison_idx, p.goal.x, p.goal.y_true, p.goal.y_wanted) for p in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True)) and a.train.classes == b.train.classes


def shuffled(p: int) -> list[int]:
    """Rows of class 1 among 600 of ten classes."""
    return (torch.randperm(60, generator=torch.Generator().manual_seed(0))[:p] * 10 + 1).tolist()


CORNER = Patch((colour_grid(5) * 255).round() / 255, (7, 4))
ROWS = [1, 58, 4, 7, 31]


def folder(path: Path, **change: Any) -> Path:
    """A folder that anybody's program may have written; a file may be other than it should, or None."""
    clean = data()
    poisoned = poison(clean, ROWS, target(clean))
    files: dict[str, Any] = {
        "poisons": pairs(poisoned.train.rows(ROWS)),
        "base_indices": np.array(ROWS),
        "target": (pil(as_bytes(poisoned.goal.x[0])), 0),
    } | change  # fmt: skip
    path.mkdir(exist_ok=True)
    for name, value in files.items():
        if value is not None:
            raw = value if isinstance(value, bytes) else pickle.dumps(value, 4)
            (path / f"{name}.pickle").write_bytes(raw)
    return path


# -- what is written here, read by others ---------------------------------------------------------------------


def test_the_friends_authors_train_on_exactly_what_was_poisoned(tmp_path: Path) -> None:
    clean = data(600, (3, 32, 32), 10)
    poisoned = poison(clean, shuffled(60), target(clean), by=16)
    write_folder(poisoned, tmp_path / "out")
    seen = others.as_friends(tmp_path / "out", pairs(clean))
    assert torch.equal(torch.stack([as_bytes(x) for x, _, _ in seen.train]), poisoned.train.x)
    assert [label for _, label, _ in seen.train] == poisoned.train.y.tolist()
    listed = [row for row, (_, _, poisonous) in enumerate(seen.train) if poisonous]
    assert listed == sorted(poisoned.poison_idx.tolist())
    assert torch.equal(torch.stack(seen.targets), poisoned.goal.x)
    assert (seen.target_class, seen.poisoned_label) == (0, 1)


def test_the_benchmark_trains_on_exactly_what_was_poisoned(tmp_path: Path) -> None:
    clean = data(600, (3, 32, 32), 10)
    poisoned = poison(clean, shuffled(25), target(clean), by=16)
    write_folder(poisoned, tmp_path / "out")
    seen = others.as_benchmark(tmp_path / "out", pairs(clean), size=500)
    assert len(seen.train) == 500 and not set(seen.clean_rows) & set(poisoned.poison_idx.tolist())
    for (x, label, poisonous), row in zip(seen.train, seen.clean_rows + poisoned.poison_idx.tolist(), strict=True):
        assert torch.equal(as_bytes(x), poisoned.train.x[row]) and label == int(poisoned.train.y[row])
        assert poisonous == (row in poisoned.poison_idx)
    assert max(seen.norms) == pytest.approx(16 / 255, abs=1e-6)
    assert torch.equal(seen.target[None], poisoned.goal.x)
    assert (seen.target_class, seen.poisoned_label) == (0, 1)


@pytest.mark.parametrize("trigger", [CORNER, Patch(CORNER.pixels, None), Patch(colour_grid(5), (0, 7))])
def test_both_programs_see_the_triggered_images(tmp_path: Path, trigger: Patch) -> None:
    clean = data()
    goal = patched(clean, trigger, 20)
    write_folder(poison(clean, ROWS, goal), tmp_path / "out")
    rounded = (goal.x * 255).round() / 255
    friends = others.as_friends(tmp_path / "out", pairs(clean), backdoor=True)
    assert torch.equal(torch.stack(friends.targets), rounded)
    assert (friends.target_class, friends.poisoned_label) == (0, 1)
    for image in (
        others.as_friends(tmp_path / "out", pairs(clean)).targets[0],
        others.as_benchmark(tmp_path / "out", pairs(clean), size=30).target,
    ):
        assert torch.equal(image, rounded[0])
    entry = others.load(tmp_path / "out" / "target.pickle")
    assert len(entry) == (2 if trigger.corner is None else 4)
    if trigger.corner is not None:
        assert entry[2].dtype == np.float32 and entry[3] == [trigger.corner[1], trigger.corner[0]]


def test_no_byte_of_a_patch_is_cut_down_by_their_loaders() -> None:
    """They multiply by 255 and cut off: 255 * (k / 255) must not be less than k in float32."""
    k = torch.arange(256)
    assert torch.equal((k.float() / 255).mul(255).byte().long(), k)
    assert not torch.equal(((k.float() - 0.01).clamp(0) / 255).mul(255).byte().long(), k)


def test_written_pickles_depend_on_no_version(tmp_path: Path) -> None:
    """Protocol 3, and names and states that Pillow, numpy 1 and numpy 2 all have."""
    clean = data()
    write_folder(poison(clean, ROWS, patched(clean, CORNER, 3)), tmp_path)
    for path in tmp_path.iterdir():
        names: set[str] = set()
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            assert opcode.proto <= 3, opcode.name
            names |= {str(argument)} if opcode.name == "GLOBAL" else set()
        assert names <= {
            "PIL.Image Image", "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype",
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            others.load(path)
    labels = [label for _, label in others.load(tmp_path / "poisons.pickle")]
    assert all(type(label) is int for label in labels)
    bases = others.load(tmp_path / "base_indices.pickle")
    assert bases.dtype == np.int64 and bases.tolist() == ROWS and bases.flags.writeable


def test_equal_sets_give_equal_files(tmp_path: Path) -> None:
    clean = data()
    for name in "ab":
        write_folder(poison(clean, ROWS, target(clean)), tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# -- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 12, 12), (3, 12, 7), (1, 5, 16)])
def test_a_target_comes_back_bit_for_bit(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    clean = data(shape=shape)
    poisoned = poison(clean, ROWS, target(clean))
    write_folder(poisoned, tmp_path / "out")
    back = read_folder(tmp_path / "out", clean, xi=16 / 255)
    back.check(clean, xi=16 / 255, budget=5)
    assert same(back, poisoned) and back.goal.targeted and back.train.name == clean.name
    assert back.recipe == {"attack": "published", "folder": "out", "largest perturbation": "16/255"}
    assert back.goal.name == "published target: a \u2192 b"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert others.load(tmp_path / "out" / "poisons.pickle")[0][0].mode == ("RGB" if shape[0] == 3 else "L")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_backdoor_comes_back_bit_for_bit(tmp_path: Path, channels: int) -> None:
    clean = data(shape=(channels, 12, 12))
    fixed = Patch(CORNER.pixels[:1], (2, 0))
    poisoned = poison(clean, ROWS, patched(clean, fixed, 9))
    write_folder(poisoned, tmp_path)
    back = read_folder(tmp_path, clean)
    trigger = back.goal.trigger
    assert same(back, poisoned) and isinstance(trigger, Patch) and trigger.corner == (2, 0)
    assert torch.equal(trigger.pixels, fixed.pixels.expand(channels, 5, 5))
    assert back.goal.name == "9 published sources: a \u2192 b"
    with pytest.raises(ValueError, match=r"target\.pickle holds a patch: leave out trigger="):
        read_folder(tmp_path, clean, trigger=fixed)


@pytest.mark.parametrize(
    "trigger", [Patch(CORNER.pixels, None), Stamp(torch.ones(3, 12, 12), torch.eye(12))], ids=["random", "stamp"]
)
def test_a_trigger_that_the_files_cannot_hold_is_an_argument(tmp_path: Path, trigger: Patch | Stamp) -> None:
    clean = data()
    poisoned = poison(clean, ROWS, patched(clean, trigger, 9))
    write_folder(poisoned, tmp_path)
    assert same(read_folder(tmp_path, clean), poisoned) and read_folder(tmp_path, clean).goal.trigger is None
    back = read_folder(tmp_path, clean, trigger=trigger)
    assert same(back, poisoned) and back.goal.trigger is trigger


def test_goals_between_bytes_are_rounded_once(tmp_path: Path) -> None:
    clean = data()
    goal = replace(target(clean), x=torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
    write_folder(poison(clean, ROWS, goal), tmp_path / "a")
    once = read_folder(tmp_path / "a", clean)
    assert 0 < float((once.goal.x - goal.x).abs().max()) <= 0.5 / 255 + 1e-6
    write_folder(once, tmp_path / "b")
    assert same(read_folder(tmp_path / "b", clean), once)


def test_relabelled_poisons_come_back(tmp_path: Path) -> None:
    clean = data()
    poisoned = poison(clean, ROWS, target(clean))
    rows = torch.tensor([0, 2, 5, 58])
    y = clean.y.clone()
    y[rows] = 1
    dirty = PoisonedDataset(replace(clean, y=y), rows, poisoned.goal)
    write_folder(dirty, tmp_path)
    assert same(read_folder(tmp_path, clean, clean_label=False), dirty)
    with pytest.raises(ValueError, match=r"3 of 4 poisons have not the label of their base, first: entry 0 is 'b', row "
                                         r"0 of clean is 'a'.* pass order=.*clean_label=False"):  # fmt: skip
        read_folder(tmp_path, clean)


def test_a_set_of_the_size_that_the_paper_uses(tmp_path: Path) -> None:
    """500 poisons, and 1000 images with a trigger at random places."""
    clean = data(5000, (3, 32, 32), 10)
    trigger = Patch((colour_grid(8) * 255).round() / 255)
    poisoned = poison(clean, list(range(1, 5000, 10)), patched(clean, trigger, 1000))
    write_folder(poisoned, tmp_path)
    back = read_folder(tmp_path, clean, xi=16 / 255, trigger=trigger)
    assert same(back, poisoned) and len(back.goal) == 1000 and len(back.poison_idx) == 500


# -- what others write ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "bases",
    [ROWS, tuple(ROWS), np.array(ROWS), np.array(ROWS, np.int32), np.array(ROWS, np.uint16), torch.tensor(ROWS),
     torch.tensor(ROWS, dtype=torch.int32), [np.int64(row) for row in ROWS], [torch.tensor(row) for row in ROWS]],
    ids=["list", "tuple", "int64", "int32", "uint16", "LongTensor", "IntTensor", "scalars", "0-d tensors"],
)  # fmt: skip
def test_base_indices_in_every_form(tmp_path: Path, bases: Any, protocol: int) -> None:
    clean = data()
    expected = read_folder(folder(tmp_path / "a"), clean)
    back = read_folder(folder(tmp_path / "b", base_indices=pickle.dumps(bases, protocol)), clean)
    assert same(back, expected) and back.poison_idx.tolist() == ROWS


def test_a_tensor_that_many_labels_share_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    parse = recorded_torch._storage
    monkeypatch.setattr(recorded_torch, "_storage", lambda raw: calls.append(raw) or parse(raw))
    label, clean = torch.tensor(1), data()
    images = [image for image, _ in pairs(read_folder(folder(tmp_path / "a"), clean).train.rows(ROWS))]
    read_folder(folder(tmp_path / "b", poisons=[(image, label) for image in images]), clean)
    assert len(calls) == 1


@pytest.mark.parametrize("label", [1, np.int64(1), np.uint8(1), np.array(1), np.array([1]), torch.tensor(1)])
def test_labels_in_every_form(tmp_path: Path, label: Any) -> None:
    clean = data()
    expected = read_folder(folder(tmp_path / "a"), clean)
    images = [image for image, _ in pairs(expected.train.rows(ROWS))]
    back = read_folder(folder(tmp_path / "b", poisons=[[image, label] for image in images]), clean)
    assert same(back, expected)


def test_images_that_were_opened_from_files(tmp_path: Path) -> None:
    clean = data()
    expected = read_folder(folder(tmp_path / "a"), clean)
    opened: list[Any] = []
    for i, (image, label) in enumerate(pairs(expected.train.rows(ROWS))):
        image.save(tmp_path / f"{i}.png")
        opened.append((Image.open(tmp_path / f"{i}.png"), label))
    assert same(read_folder(folder(tmp_path / "b", poisons=opened), clean), expected)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "tensor", "double tensor", "column order"])
def test_a_patch_is_pasted_as_their_programs_do(tmp_path: Path, kind: str) -> None:
    """Also one that is not whole bytes: they cut it down, so the model is shown less than was published."""
    clean = data()
    patch: Any = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(5)).numpy()
    forms = {"tensor": torch.tensor(patch), "double tensor": torch.tensor(patch).double(),
             "column order": np.asfortranarray(patch)}  # fmt: skip
    patch = forms[kind] if kind in forms else patch.astype(kind)
    path = folder(tmp_path, target=(pil(clean.x[0]), 0, patch, [np.int64(6), 2]))
    back = read_folder(path, clean)
    theirs = others.as_friends(path, pairs(clean)).targets[0]
    assert torch.equal(back.goal.x[0], theirs)
    assert not torch.equal(back.goal.x[0, :, 2:7, 6:11], torch.as_tensor(patch).float())
    trigger = back.goal.trigger
    assert isinstance(trigger, Patch) and trigger.corner == (2, 6)
    assert torch.equal(trigger(clean.pixels()[:1], torch.Generator()), back.goal.x)


@pytest.mark.parametrize("single", [True, False])
def test_sources_as_sleeper_agent_and_as_friends_write_them(tmp_path: Path, single: bool) -> None:
    clean = data()
    entries = pairs(data(4, seed=9).rows([0, 3]))
    path = folder(tmp_path, target=None, source=entries[0] if single else entries)
    back = read_folder(path, clean)
    shown = data(4, seed=9).rows([0] if single else [0, 3])
    assert torch.equal(back.goal.x, shown.pixels()) and torch.equal(back.goal.y_true, shown.y)
    assert set(back.goal.y_wanted.tolist()) == {1}
    if not single:
        theirs = others.as_friends(path, pairs(clean), backdoor=True)
        assert torch.equal(torch.stack(theirs.targets), back.goal.x)


def test_a_target_without_a_label(tmp_path: Path) -> None:
    """The benchmark's first example was published so."""
    clean = data()
    path = folder(tmp_path, target=pil(clean.x[0]))
    with pytest.raises(ValueError, match=r"target\.pickle holds an image without its label: pass y_true="):
        read_folder(path, clean)
    assert read_folder(path, clean, y_true=2).goal.y_true.tolist() == [2]
    with pytest.raises(ValueError, match=r"target\.pickle says that the target is of class 0, not 2"):
        read_folder(folder(tmp_path), clean, y_true=2)


def test_bases_that_are_named_twice(tmp_path: Path) -> None:
    clean = data()
    twice = [1, 58, 4, 58, 31]
    path = folder(tmp_path, base_indices=np.array(twice))
    with pytest.raises(ValueError, match=r"base_indices\.pickle lists 1 base indices more than once: 58\. Two .*"
                                         r"duplicates='first' or 'last'"):  # fmt: skip
        read_folder(path, clean)
    images = folder_images(path)
    first, last = (read_folder(path, clean, duplicates=keep) for keep in ("first", "last"))
    assert first.poison_idx.tolist() == [1, 58, 4, 31] and last.poison_idx.tolist() == [1, 4, 58, 31]
    assert torch.equal(first.train.x[58], images[1]) and torch.equal(last.train.x[58], images[3])
    for back in (first, last):
        assert torch.equal(back.train.x[[1, 4, 31]], images[[0, 2, 4]])
    theirs = others.as_friends(path, pairs(clean))
    assert torch.equal(torch.stack([as_bytes(x) for x, _, _ in theirs.train]), last.train.x)


def folder_images(path: Path) -> Tensor:
    return torch.stack([as_bytes(others.to_tensor(image)) for image, _ in others.load(path / "poisons.pickle")])


def test_the_exporter_of_gradient_matching_leaves_out_what_is_named_twice(tmp_path: Path) -> None:
    """Its poisons are listed by distinct base, its indices as they were chosen."""
    clean = data()
    path = folder(tmp_path, base_indices=torch.tensor([1, 58, 4, 58, 7, 31]))
    with pytest.raises(ValueError, match="58"):
        read_folder(path, clean)
    back = read_folder(path, clean, duplicates="first")
    assert back.poison_idx.tolist() == [1, 58, 4, 7, 31]
    assert torch.equal(back.train.x[back.poison_idx], folder_images(path))


def test_another_order_of_the_data(tmp_path: Path) -> None:
    clean = data()
    expected = read_folder(folder(tmp_path), clean)
    sorted_rows = torch.argsort(clean.y, stable=True)
    copy = clean.rows(sorted_rows)
    order = by_class(clean.y)
    assert torch.equal(copy.x[order], clean.x) and torch.equal(copy.y[order], clean.y)
    back = read_folder(tmp_path, copy, order=order, xi=16 / 255)
    assert torch.equal(back.train.x[order], expected.train.x)
    assert torch.equal(back.poison_idx, order[expected.poison_idx])
    with pytest.raises(ValueError, match=r"poisons have not the label of their base.*pass order="):
        read_folder(tmp_path, copy)


def test_a_part_of_the_data(tmp_path: Path) -> None:
    clean = data()
    path = folder(tmp_path)
    some = clean.rows([*range(10), 31, 58])
    order = torch.full((60,), -1)
    order[[*range(10), 31, 58]] = torch.arange(12)
    assert read_folder(path, some, order=order).poison_idx.tolist() == [1, 11, 4, 7, 10]
    order[31] = -1
    with pytest.raises(ValueError, match="lists base index 31, an image that clean lacks: order maps it to -1"):
        read_folder(path, some, order=order)
    for wrong in (torch.zeros(60, dtype=torch.int64), torch.arange(60)):
        with pytest.raises(ValueError, match="order maps two rows to one, or a row beyond the 12 of clean"):
            read_folder(path, some, order=wrong)
    with pytest.raises(ValueError, match="lists base index 58, but there are 12 training images"):
        read_folder(path, some)


def test_a_lossy_copy_is_told_from_a_broken_promise(tmp_path: Path) -> None:
    clean = data()
    path = folder(tmp_path)
    noise = torch.randint(-40, 41, clean.x.shape, generator=torch.Generator().manual_seed(0))
    lossy = replace(clean, x=(clean.x.int() + noise).clamp(0, 255).to(torch.uint8))
    with pytest.raises(ValueError, match=r"poisons\.pickle, entry \d differs from its base, row \d+ of clean, by \d\d/"
                                         r"255, more than xi = 16/255.*lossy copy \(JPEG\).*pass xi=None"):  # fmt: skip
        read_folder(path, lossy, xi=16 / 255)
    largest = str(read_folder(path, lossy).recipe["largest perturbation"])
    assert 40 < int(largest.removesuffix("/255")) <= 56
    with pytest.raises(ValueError, match=r"by 16/255, more than xi = 8/255"):
        read_folder(path, clean, xi=8 / 255)


# -- what does not fit ----------------------------------------------------------------------------------------

GOOD = pil(data().x[1])
FOUR = pairs(data().rows([1, 4, 7, 31]))
SORTED = data().rows(torch.argsort(data().y, stable=True))
PATCH = np.full((3, 5, 5), 0.5, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"poisons": []}, "lists 5 base indices, 5 of them distinct, for 0 poisons"),
        ({"poisons": FOUR}, "for 4 poisons: every poison replaces one base"),
        ({"poisons": {"a": 1}}, r"poisons\.pickle is a dict, not a list"),
        ({"poisons": FOUR[0]}, r"poisons\.pickle, entry 0 is not a pair of image and label"),
        ({"poisons": [(GOOD, 1), (1, GOOD)]}, r"poisons\.pickle, entry 1 holds a int where an image should be"),
        ({"poisons": [(GOOD, 1), (GOOD, 1.0)]}, r"entry 1 holds a float where one whole number should be"),
        ({"poisons": [(GOOD, True)]}, r"entry 0 holds a bool where one whole number should be"),
        ({"poisons": [(GOOD, 3)]}, r"poisons\.pickle, entry 0 has label 3, but clean has 3 classes"),
        ({"poisons": [(GOOD, -1)]}, r"entry 0 has label -1"),
        ({"poisons": [(GOOD.resize((6, 4)), 1)]}, r"entry 0 is an image of \(3, 4, 6\), .* of clean are \(3, 12, 12\)"),
        ({"poisons": [(GOOD.convert("L"), 1)]}, r"entry 0 is an image of \(1, 12, 12\)"),
        ({"poisons": [(GOOD.convert("RGBA"), 1)]}, r"entry 0 holds an image of mode 'RGBA', not 'L' or 'RGB'"),
        ({"poisons": [(GOOD, 1)] * 10_000}, r"claims 10000 images of 432 bytes in a file of \d+"),
        ({"base_indices": [1, 58, 4, 7]}, "lists 4 base indices, 4 of them distinct, for 5 poisons"),
        ({"base_indices": [1, 58, 4, 7, 60]}, r"base_indices\.pickle lists base index 60, but there are 60"),
        ({"base_indices": [1, 58, 4, 7, -1]}, r"lists base index -1, but there are 60"),
        ({"base_indices": [1, 58, 4, 7, 2**100]}, r"holds the index 1267650600228229401496703205376"),
        ({"base_indices": [1, 58, 4, 7, 30]}, "1 of 5 poisons have not the label of their base, first: entry 4 is 'b'"),
        ({"base_indices": [1, 58, 4, 7, None]}, r"base_indices\.pickle, entry 4 holds a NoneType where one whole"),
        ({"base_indices": np.array(ROWS) * 1.0}, r"holds float64 numbers of shape \(5,\), not a vector of indices"),
        ({"base_indices": np.array([ROWS])}, r"holds int64 numbers of shape \(1, 5\), not a vector of indices"),
        ({"base_indices": 5}, r"base_indices\.pickle is a int, not a list"),
        ({"target": 5}, r"target\.pickle is a int, not a list"),
        ({"target": (GOOD,)}, r"target\.pickle holds 1 entries: not image and label"),
        ({"target": (GOOD, 0, PATCH)}, r"target\.pickle holds 3 entries"),
        ({"target": (GOOD, 1)}, "goal image 0 is wanted as its own class 1"),
        ({"target": (GOOD, 9)}, r"target\.pickle has label 9, but clean has 3 classes"),
        ({"target": (0, GOOD)}, r"target\.pickle holds a int where an image should be"),
        ({"target": (GOOD, 0, PATCH, [8, 0])}, r"patch of \(3, 5, 5\) that does not fit at \[x, y\] = \[8, 0\]"),
        ({"target": (GOOD, 0, PATCH, [0, -1])}, r"does not fit at \[x, y\] = \[0, -1\]"),
        ({"target": (GOOD, 0, PATCH, [0])}, r"does not fit at \[x, y\] = \[0\]"),
        ({"target": (GOOD, 0, PATCH, 7)}, r"target\.pickle, corner is a int, not a list"),
        ({"target": (GOOD, 0, PATCH, [0.5, 0])}, r"corner holds a float where one whole number should be"),
        ({"target": (GOOD, 0, PATCH + 1, [0, 0])}, r"holds a patch whose pixels are not in \[0, 1\]"),
        ({"target": (GOOD, 0, PATCH * np.nan, [0, 0])}, r"holds a patch whose pixels are not in \[0, 1\]"),
        ({"target": (GOOD, 0, PATCH[:1], [0, 0])}, r"a patch of \(1, 5, 5\) for images of \(3, 12, 12\)"),
        ({"target": (GOOD, 0, np.zeros((3, 13, 2)), [0, 0])}, r"a patch of \(3, 13, 2\) for images"),
        ({"target": (GOOD, 0, PATCH[:, :0], [0, 0])}, r"a patch of \(3, 0, 5\) for images"),
        ({"target": (GOOD, 0, PATCH.tolist(), [0, 0])}, r"holds a list where a patch should be: no array"),
        ({"source": []}, r"source\.pickle holds no image"),
        ({"source": [(GOOD, 0), GOOD]}, r"source\.pickle, entry 1 is not a pair of image and label"),
        ({"source": (GOOD, 1)}, "goal image 0 is wanted as its own class 1"),
        ({"source": [(GOOD, 0)] * 10_000}, r"source\.pickle claims 10000 images of 432 bytes"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        read_folder(folder(tmp_path, **change), data())
    assert str(tmp_path) in str(refusal.value)


def test_poisons_of_several_classes_want_nothing_in_particular(tmp_path: Path) -> None:
    clean = data()
    images = pairs(clean.rows([1, 58, 5, 7, 31]))
    path = folder(tmp_path, poisons=images, base_indices=[1, 58, 5, 7, 31])
    with pytest.raises(ValueError, match=r"entry 2 has label 2, but the first poison, whose label .* wants, has 1"):
        read_folder(path, clean)


def test_poisons_that_are_their_bases_are_none(tmp_path: Path) -> None:
    clean = data()
    with pytest.raises(ValueError, match=r"none of the 5 poisons in .*poisons\.pickle differs from its base image"):
        read_folder(folder(tmp_path, poisons=pairs(clean.rows(ROWS))), clean)


def test_missing_files_are_named(tmp_path: Path) -> None:
    clean = data()
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        read_folder(tmp_path / "nowhere", clean)
    with pytest.raises(FileNotFoundError, match=r"lacks poisons\.pickle, base_indices\.pickle, target\.pickle or s"):
        read_folder(tmp_path, clean)
    with pytest.raises(FileNotFoundError, match=r"no whole folder of poisons: it lacks target\.pickle or source\.p"):
        read_folder(folder(tmp_path, target=None), clean)
    with pytest.raises(ValueError, match=r"poisons\.pickle is a file: MetaPoison's single files are read by"):
        read_folder(tmp_path / "poisons.pickle", clean)
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        read_setups(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        read_metapoison(tmp_path / "nowhere", clean)


@pytest.mark.parametrize("name", [*FILES, "source.pickle"])
@pytest.mark.parametrize("cut", [0, 1, 100, -40, -1])
def test_torn_files_are_named(tmp_path: Path, name: str, cut: int) -> None:
    path = folder(tmp_path, source=pairs(data(3, seed=9))[:1])
    (path / name).write_bytes((path / name).read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"{name} is torn or not a pickle of images and numbers: "):
        read_folder(path, data())


class Shell:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("name", ["poisons", "base_indices", "target", "source"])
def test_code_in_a_folder_is_refused_and_not_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = folder(tmp_path / "in", **{"source": pairs(data(3, seed=9))[:1], name: [(GOOD, Shell())]})
    with pytest.raises(UnsafePickleError, match=rf"{name}\.pickle .* asks for (posix|nt)\.system, and nothing was run"):
        read_folder(path, data())
    for read in (read_setups, lambda file: read_metapoison(file, data())):
        with pytest.raises(UnsafePickleError, match=r"asks for (posix|nt)\.system"):
            read(path / f"{name}.pickle")
    assert not (tmp_path / "canary").exists()


def test_implausibly_large_files_are_not_read(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with (path / "poisons.pickle").open("r+b") as file:
        file.truncate(10**12)  # sparse: it takes no room
    with pytest.raises(ValueError, match=r"poisons\.pickle has 1000000000000 bytes, more than"):
        read_folder(path, data())


@pytest.mark.usefixtures("unchecked")
def test_misspelt_choices_are_refused(tmp_path: Path) -> None:
    wrong: Any = "both"
    with pytest.raises(ValueError, match="duplicates is 'refuse', 'first' or 'last', not 'both'"):
        read_folder(folder(tmp_path), data(), duplicates=wrong)


def test_the_clean_set_is_left_as_it_is(tmp_path: Path) -> None:
    clean, untouched = data(), data()
    read_folder(folder(tmp_path), clean)
    assert clean.fingerprint == untouched.fingerprint


# -- what a folder cannot hold --------------------------------------------------------------------------------


def test_goals_that_a_folder_cannot_hold_are_refused(tmp_path: Path) -> None:
    clean = data()
    several = poison(clean, ROWS, target(clean, m=2))
    with pytest.raises(ValueError, match=r"a folder holds one target, this goal has 2: .*PoisonedDataset\.save"):
        write_folder(several, tmp_path)
    classes = replace(patched(clean, CORNER, 2), y_true=torch.tensor([0, 0]), y_wanted=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"goal wants \[1, 2\] and the poisons are labelled \[1\]"):
        write_folder(poison(clean, ROWS, classes), tmp_path)
    relabelled = replace(poison(clean, ROWS, target(clean)), goal=target(clean, wanted=2))
    with pytest.raises(ValueError, match=r"goal wants \[2\] and the poisons are labelled \[1\]"):
        write_folder(relabelled, tmp_path)
    other = replace(patched(clean, CORNER, 2), trigger=Patch(CORNER.pixels, (0, 0)))
    with pytest.raises(ValueError, match=r"goal image 0 does not show the goal's patch at \(0, 0\)"):
        write_folder(poison(clean, ROWS, other), tmp_path)
    four = data(shape=(4, 12, 12))
    with pytest.raises(ValueError, match=r"5 poisons of \(4, 12, 12\): there must be some, of 1 or 3 channels"):
        write_folder(poison(four, ROWS, target(four)), tmp_path)
    none = replace(several, poison_idx=torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"no folder can be made of 0 poisons"):
        write_folder(none, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    clean = data()
    poisoned = poison(clean, ROWS, target(clean))
    write_folder(poisoned, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds poisons\.pickle already: name another folder"):
        write_folder(poison(clean, [1], target(clean)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_export_is_not_whole_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = data()
    backdoor, targeted = poison(clean, ROWS, patched(clean, CORNER, 2)), poison(clean, ROWS, target(clean))
    calls: list[Path] = []

    def stop_before_poisons(path: Path) -> Any:
        calls.append(path)
        if path.name == "poisons.pickle":
            raise KeyboardInterrupt
        return export_replacing(path)

    export_replacing = export.replacing
    monkeypatch.setattr(export, "replacing", stop_before_poisons)
    with pytest.raises(KeyboardInterrupt):
        write_folder(backdoor, tmp_path)
    assert calls[-1].name == "poisons.pickle" and len(calls) == 4
    with pytest.raises(FileNotFoundError, match=r"lacks poisons\.pickle"):
        read_folder(tmp_path, clean)
    monkeypatch.undo()
    write_folder(targeted, tmp_path)
    assert same(read_folder(tmp_path, clean), targeted) and not (tmp_path / "source.pickle").exists()


# -- the benchmark's tasks ------------------------------------------------------------------------------------


def tasks(n: int = 100, p: int = 25) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "target class": i % 5,
            "target index": np.int64(rng.integers(10_000)),
            "base class": 5 + i % 5,
            "base indices": rng.choice(50_000, p, replace=False),
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_setups_are_read(tmp_path: Path, protocol: int) -> None:
    published = tasks()
    published[78]["base indices"][[3, 20]] = 5259
    (tmp_path / "setups.pickle").write_bytes(pickle.dumps(published, protocol))
    setups = read_setups(tmp_path / "setups.pickle")
    assert len(setups) == 100
    for setup, task in zip(setups, published, strict=True):
        numbers = (setup.target_class, setup.target_index, setup.base_class)
        assert numbers == (task["target class"], task["target index"], task["base class"])
        assert all(type(number) is int for number in numbers)
        assert setup.base_indices.dtype == torch.int64 and setup.base_indices.tolist() == task["base indices"].tolist()
        assert setup.distinct.tolist() == list(dict.fromkeys(task["base indices"].tolist()))
    assert [i for i, setup in enumerate(setups) if len(setup.distinct) < 25] == [78]
    assert len(setups[78].distinct) == 24


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "holds no setup"),
        (tasks()[0], "is a dict, not a list"),
        ([tasks()[0], 5], "setup 1 lacks 'target class', 'target index', 'base class', 'base indices'"),
        ([{k: v for k, v in tasks()[0].items() if k != "base class"}], "setup 0 lacks 'base class'"),
        ([tasks()[0] | {"target index": 1.5}], "setup 0, target index holds a float where one whole number"),
        ([tasks()[0] | {"target index": -1}], "setup 0 lists no base indices, a negative number"),
        ([tasks()[0] | {"base class": 0}], "one class for target and bases"),
        ([tasks()[0] | {"base indices": []}], "setup 0 lists no base indices"),
        ([tasks()[0] | {"base indices": [1, "2"]}], "setup 0, base indices, entry 1 holds a str"),
        ([tasks(1, 30_000)[0]] * 1000, r"claims \d+ base indices of 1 bytes in a file of"),
    ],
)
def test_setups_that_do_not_fit_are_named(tmp_path: Path, value: Any, words: str) -> None:
    path = tmp_path / "setups.pickle"
    path.write_bytes(pickle.dumps(value, 4))
    with pytest.raises(ValueError, match=words) as refusal:
        read_setups(path)
    assert str(path) in str(refusal.value)


# -- MetaPoison -----------------------------------------------------------------------------------------------


def metapoison(path: Path, protocol: int = 4, **change: Any) -> tuple[Path, LabeledImages, list[int]]:
    """A file as MetaPoison writes it: of data sorted by class, poisons first in theirs and not quite in 0..255."""
    clean = data().rows(torch.argsort(data().y, stable=True))
    x = clean.x.permute(0, 2, 3, 1).float().numpy().copy()
    rows = list(range(20, 25))
    x[rows] += np.random.default_rng(0).uniform(-8, 8, (5, 12, 12, 3)).astype(np.float32)
    x[20, 0, 0] = (-0.4, -3.7, 0.4)
    x[20, 0, 1] = (255.3, 257.9, 254.6)
    shown = data(1, seed=4)
    files: dict[str, Any] = {
        "xtrain": x, "ytrain": clean.y.numpy(), "xtarget": shown.x.permute(0, 2, 3, 1).float().numpy(),
        "ytarget": [0], "ytargetadv": np.array([1]), "xvalid": x[:3], "yvalid": clean.y.numpy()[:3],
    } | change  # fmt: skip
    path.write_bytes(pickle.dumps({key: value for key, value in files.items() if value is not None}, protocol))
    return path, clean, rows


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metapoison_files_are_clipped_and_rounded(tmp_path: Path, protocol: int) -> None:
    path, clean, rows = metapoison(tmp_path / "a.pkl", protocol)
    back = read_metapoison(path, clean)
    back.check(clean, xi=None)
    assert back.poison_idx.tolist() == rows and back.goal.targeted
    x = others.load(path)["xtrain"]
    expected = torch.tensor(np.floor(np.clip(x, 0, 255) + 0.5)).to(torch.uint8).permute(0, 3, 1, 2)
    assert torch.equal(back.train.x, expected) and torch.equal(back.train.y, clean.y)
    assert back.train.x[20, :, 0, 0].tolist() == [0, 0, 0] and back.train.x[20, :, 0, 1].tolist() == [255, 255, 255]
    assert torch.equal(back.goal.x, data(1, seed=4).pixels())
    assert (back.goal.y_true.tolist(), back.goal.y_wanted.tolist()) == ([0], [1])
    wrapped, labels, wanted = others.metapoison_as_friends(path)
    assert wrapped[20, 0, 0].tolist() == [0, 253, 0] and wrapped[20, 0, 1].tolist() == [255, 1, 254]
    assert (labels, wanted) == (back.train.y.tolist(), 1)


def test_metapoison_in_the_original_order(tmp_path: Path) -> None:
    path, clean, _ = metapoison(tmp_path / "a.pkl")
    expected = read_metapoison(path, clean)
    order = torch.argsort(data().y, stable=True)  # sorted row -> original row
    back = read_metapoison(path, data(), order=order)
    assert torch.equal(back.train.x[order], expected.train.x) and torch.equal(back.train.y, data().y)
    assert torch.equal(back.poison_idx, order[expected.poison_idx])
    with pytest.raises(ValueError, match=r"a\.pkl has label 0 in row 1, row 1 of clean has 1: .*order="):
        read_metapoison(path, data())


def test_metapoison_on_a_lossy_copy(tmp_path: Path) -> None:
    path, clean, rows = metapoison(tmp_path / "a.pkl")
    lossy = replace(clean, x=clean.x ^ 1)
    with pytest.raises(ValueError, match=r"60 of 60 rows differ from clean, and row 0 is of another class .*count="):
        read_metapoison(path, lossy)
    back = read_metapoison(path, lossy, count=5)
    assert back.poison_idx.tolist() == rows
    assert torch.equal(back.train.x[rows], read_metapoison(path, clean).train.x[rows])
    assert torch.equal(back.train.x[:20], lossy.x[:20])
    for count in (0, 21, -1):
        with pytest.raises(ValueError, match=rf"has 20 images of class 1, so count cannot be {count}"):
            read_metapoison(path, clean, count=count)
    with pytest.raises(ValueError, match=r"more than xi = 4/255"):
        read_metapoison(path, clean, xi=4 / 255)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"xtrain": None, "ytargetadv": None}, "is not MetaPoison's: it lacks xtrain, ytargetadv"),
        ({"xtrain": np.zeros((60, 3, 12, 12))}, r"xtrain holds \(60, 3, 12, 12\) numbers, not \(n, 12, 12, 3\)"),
        ({"xtrain": [1, 2]}, r"xtrain holds \(0,\) numbers"),
        ({"xtrain": np.full((60, 12, 12, 3), np.nan)}, "xtrain holds pixels that are not finite, from row 0 on"),
        ({"xtrain": SORTED.x.permute(0, 2, 3, 1).numpy()}, "holds no poison"),
        ({"ytrain": np.zeros(59, int)}, "holds 59 training images, where clean or order= has 60"),
        ({"ytargetadv": [5]}, "ytargetadv has label 5, but clean has 3 classes"),
        ({"ytargetadv": [0]}, "goal image 0 is wanted as its own class 0"),
        ({"ytargetadv": [2]}, "5 of 60 rows differ from clean, and row 20 is of another class"),
        ({"ytarget": [0, 0]}, "a goal needs x"),
        ({"ytarget": []}, "a goal needs x"),
        ({"xtarget": np.zeros((2, 12, 12, 3)), "ytarget": [0, 0], "ytargetadv": [1, 2]}, r"several classes: \[1, 2\]"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_metapoison_files_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path, clean, _ = metapoison(tmp_path / "a.pkl", **change)
    with pytest.raises(ValueError, match=words) as refusal:
        read_metapoison(path, clean)
    assert str(path) in str(refusal.value)
