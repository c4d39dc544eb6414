from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from friends.data.files import read_tensors, write_tensors
from friends.data.images import LabeledImages
from friends.data.poisoned import Additive, Goal, Patch, PoisonedDataset, Stamp, Trigger, differing_rows, seal

N, CLASSES = 20, ("cat", "dog", "frog")
ROWS = (5, 11, 8)
"""Poisons: frogs, as the goal wants."""


def toy() -> LabeledImages:
    x = torch.randint(60, 190, (N, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return LabeledImages(x, torch.arange(N) % 3, CLASSES, "toy")


@pytest.fixture
def clean() -> LabeledImages:
    return toy()


def goal(trigger: Trigger | None = None) -> Goal:
    x = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    return Goal(x, torch.tensor([0, 1]), torch.tensor([2, 2]), trigger, "two images -> frog")


def poison(clean: LabeledImages, by: int = 16, rows: tuple[int, ...] = ROWS, **kwargs: Goal) -> PoisonedDataset:
    x = clean.x.clone()
    x[list(rows)] += by
    train = replace(clean, x=x)
    return PoisonedDataset(train, torch.tensor(rows), kwargs.get("goal", goal()), {"attack": "plus", "by": by})


# -- goals and patches ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.rand(0, 3, 6, 5)}, "without images"),
        ({"x": torch.rand(2, 6, 5)}, r"not \(2, 6, 5\)"),
        ({"y_true": torch.tensor([0])}, r"\(1,\)"),
        ({"y_wanted": torch.tensor([2, 2, 2])}, r"\(3,\)"),
        ({"x": torch.full((2, 3, 6, 5), 1.01)}, r"in \[0, 1\]"),
        ({"x": torch.full((2, 3, 6, 5), -0.01)}, r"in \[0, 1\]"),
        ({"x": torch.full((2, 3, 6, 5), float("nan"))}, r"in \[0, 1\]"),
        ({"y_wanted": torch.tensor([2, 1])}, "goal image 1 is wanted as its own class 1"),
    ],
)
def test_impossible_goals_are_refused(change: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(goal(), **change)


def test_a_trigger_makes_a_backdoor() -> None:
    assert goal().targeted and len(goal()) == 2
    assert not goal(Patch(torch.zeros(1, 2, 2))).targeted


def test_patch_is_pasted_at_its_corner_and_nowhere_else() -> None:
    pixels = torch.rand(3, 2, 4)
    x = torch.rand(2, 3, 6, 5)
    out = Patch(pixels, (3, 1))(x, torch.Generator())
    assert torch.equal(out[:, :, 3:5, 1:5], pixels.expand(2, 3, 2, 4))
    out[:, :, 3:5, 1:5] = x[:, :, 3:5, 1:5]
    assert torch.equal(out, x)


def test_patch_without_a_corner_goes_everywhere_equally() -> None:
    x = torch.zeros(2000, 1, 5, 4)
    state = torch.get_rng_state()
    out = Patch(torch.ones(1, 3, 3))(x, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state()) and not x.any()
    assert bool((out.sum((1, 2, 3)) == 9).all())
    corners = [(int(im[0].sum(1).nonzero()[0]), int(im[0].sum(0).nonzero()[0])) for im in out]
    count = {corner: corners.count(corner) for corner in set(corners)}
    assert count.keys() == {(r, q) for r in range(3) for q in range(2)}  # the last places included
    assert min(count.values()) > 270  # of 333 expected


@pytest.mark.parametrize(
    ("patch", "corner"),
    [((3, 7, 2), None), ((3, 2, 6), None), ((2, 2, 2), None), ((3, 2, 2), (5, 0)), ((3, 2, 2), (0, -1))],
)
def test_patch_that_does_not_fit_is_refused(patch: tuple[int, int, int], corner: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Patch(torch.rand(patch), corner)(torch.rand(2, 3, 6, 5), torch.Generator())


# -- check ----------------------------------------------------------------------------------------------------


def test_an_honest_set_passes(clean: LabeledImages) -> None:
    poison(clean).check(clean, xi=16 / 255, budget=3)
    assert poison(clean).largest_change(clean) == 16
    poison(clean, by=60).check(clean, xi=None)


@pytest.mark.parametrize(("by", "xi"), [(17, 16 / 255), (16, 15.99 / 255), (9, 8.6 / 255), (1, 0.0)])
def test_the_bound_holds_on_rounded_bytes(clean: LabeledImages, by: int, xi: float) -> None:
    with pytest.raises(ValueError, match=rf"poison 5 differs from its base image by {by}/255"):
        poison(clean, by=by).check(clean, xi=xi)


def test_the_bound_holds_downwards_and_in_a_single_pixel(clean: LabeledImages) -> None:
    poisoned = poison(clean, by=0)
    poisoned.train.x[8, 2, 5, 4] -= 17
    with pytest.raises(ValueError, match=r"poison 8 .* by 17/255, more than xi = 16/255"):
        poisoned.check(clean, xi=16 / 255)


def test_every_whole_level_is_allowed_by_its_own_bound(clean: LabeledImages) -> None:
    for level in range(1, 61):
        poison(clean, by=level).check(clean, xi=level / 255)


def test_too_many_poisons(clean: LabeledImages) -> None:
    with pytest.raises(ValueError, match="3 poisons, but the budget is 2"):
        poison(clean).check(clean, xi=None, budget=2)


def test_images_changed_in_secret(clean: LabeledImages) -> None:
    poisoned = replace(poison(clean), poison_idx=torch.tensor([5]))
    with pytest.raises(ValueError, match="2 images changed that are not listed as poisons, first: 8"):
        poisoned.check(clean, xi=None)


def test_labels_of_clean_label_poisons(clean: LabeledImages) -> None:
    y = clean.y.clone()
    y[4] = 2
    poisoned = poison(clean, rows=(4, 5))
    poisoned = replace(poisoned, train=replace(poisoned.train, y=y))
    poisoned.check(clean, xi=16 / 255, clean_label=False)
    with pytest.raises(ValueError, match="row 4 has label 2, but it was 1: a clean-label attack keeps labels"):
        poisoned.check(clean, xi=16 / 255)


@pytest.mark.parametrize("clean_label", [True, False])
def test_labels_of_rows_that_are_no_poisons(clean: LabeledImages, clean_label: bool) -> None:
    y = clean.y.clone()
    y[6] = 2
    poisoned = poison(clean)
    with pytest.raises(ValueError, match="row 6 has label 2, but it was 0: it is no poison"):
        replace(poisoned, train=replace(poisoned.train, y=y)).check(clean, xi=None, clean_label=clean_label)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("idx", "words"),
    [
        (torch.tensor([], dtype=torch.int64), "empty poison set"),
        (torch.tensor([5, 11, 8], dtype=torch.int32), "vector of int64"),
        (torch.tensor([[5, 11, 8]]), "vector of int64"),
        (torch.tensor([5, 11, 20]), "poison index 20 is out of range: there are 20"),
        (torch.tensor([5, -1, 8]), "poison index -1 is out of range"),
        (torch.tensor([5, 11, 8, 5, 8]), "2 poison indices are listed twice"),
    ],
)
def test_indices_that_mean_nothing(clean: LabeledImages, idx: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(poison(clean), poison_idx=idx).check(clean, xi=None)


def test_sets_that_do_not_belong_together(clean: LabeledImages) -> None:
    poisoned = poison(clean)
    for other in (clean.rows(range(19)), replace(clean, classes=("cat", "dog", "bird"))):
        with pytest.raises(ValueError, match="differ in shape or classes"):
            poisoned.check(other, xi=None)
    wrong = Goal(torch.rand(1, 3, 5, 5), torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"goal images are \(3, 5, 5\)"):
        poison(clean, goal=wrong).check(clean, xi=None)


@pytest.mark.parametrize("field", ["y_true", "y_wanted"])
def test_goals_of_classes_that_are_not_there(clean: LabeledImages, field: str) -> None:
    wrong = replace(goal(), **{field: torch.tensor([5, 3])})
    with pytest.raises(ValueError, match="class 5 of the goal is out of range: there are 3 classes"):
        poison(clean, goal=wrong).check(clean, xi=None)


def test_poisons_that_change_nothing_are_no_poisons(clean: LabeledImages) -> None:
    with pytest.raises(ValueError, match="none of the 3 poisons differs from its base image"):
        poison(clean, by=0).check(clean, xi=16 / 255)
    poisoned, y = poison(clean, by=0, rows=(3, 4)), clean.y.clone()
    y[[3, 4]] = 2
    poisoned = replace(poisoned, train=replace(poisoned.train, y=y))
    poisoned.check(clean, xi=0, clean_label=False)  # other labels are enough, and one changed poison is
    one = poison(clean, by=0)
    one.train.x[5, 0, 0, 0] += 1
    one.check(clean, xi=1 / 255)


def test_poisons_of_a_class_that_the_goal_does_not_want(clean: LabeledImages) -> None:
    with pytest.raises(ValueError, match="poison 4 is of class 'dog', which the goal does not want"):
        poison(clean, rows=(5, 4, 8)).check(clean, xi=16 / 255)
    other = Goal(goal().x, torch.tensor([0, 0]), torch.tensor([2, 1]))
    poison(clean, rows=(5, 4, 8), goal=other).check(clean, xi=16 / 255)  # a goal may want several classes


def test_poisons_other_than_the_prescribed_bases(clean: LabeledImages) -> None:
    poison(clean, goal=replace(goal(), bases=torch.tensor([11, 5, 8]))).check(clean, xi=16 / 255)
    with pytest.raises(ValueError, match="poison 8 is not among the bases that the goal prescribes"):
        poison(clean, goal=replace(goal(), bases=torch.tensor([5, 11, 14]))).check(clean, xi=16 / 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_goals_and_triggers_that_are_not_finite(clean: LabeledImages, value: float) -> None:
    poisoned = poison(clean)
    poisoned.goal.x[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"goal's pixels must be in \[0, 1\]"):
        poisoned.check(clean, xi=16 / 255)
    poisoned = poison(clean, goal=goal(Additive(torch.full((3, 6, 5), value))))
    with pytest.raises(ValueError, match="trigger has pixels that are not finite"):
        poisoned.check(clean, xi=16 / 255)


Corruption = Callable[[PoisonedDataset, int, int], PoisonedDataset]
"""An honest set, a row and a pixel to spoil it at; it may be changed in place."""


def with_rows(poisoned: PoisonedDataset, rows: list[int]) -> PoisonedDataset:
    return replace(poisoned, poison_idx=torch.tensor(rows, dtype=torch.int64))


def a_pixel_of_a_clean_image(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    others = [r for r in range(N) if r not in poisoned.poison_idx.tolist()]
    poisoned.train.x[others[row % len(others)]].view(-1)[pixel] ^= 1
    return poisoned


def a_pixel_of_a_poison(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    rows = poisoned.poison_idx.tolist()
    poisoned.train.x[rows[row % len(rows)]].view(-1)[pixel] += 24  # 1 to 16 away: up to 33 too far, or just too far
    return poisoned


def a_label(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    poisoned.train.y[row] = (poisoned.train.y[row] + 1 + pixel % 2) % 3
    return poisoned


def a_label_that_is_none(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    poisoned.train.y[row] = 3 if pixel % 2 else -1
    return poisoned


def a_poison_not_listed(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    rows = poisoned.poison_idx.tolist()
    del rows[row % len(rows)]
    return with_rows(poisoned, rows)


def a_poison_listed_twice(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    rows = poisoned.poison_idx.tolist()
    rows[row % len(rows)] = rows[(row + 1) % len(rows)]
    return with_rows(poisoned, rows)


def a_row_that_is_not_there(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    rows = poisoned.poison_idx.tolist()
    return with_rows(poisoned, [*rows[1:], N + row if pixel % 2 else -1 - row])


def one_poison_too_many(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    others = [r for r in range(2, N, 3) if r not in poisoned.poison_idx.tolist()]
    poisoned.train.x[others[row % len(others)]].view(-1)[pixel] ^= 1
    return with_rows(poisoned, [*poisoned.poison_idx.tolist(), others[row % len(others)]])


def nothing_changed(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    return replace(poisoned, train=toy())


def a_goal_pixel(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    poisoned.goal.x.view(-1)[pixel] = (float("nan"), float("inf"), -0.1, 1.1)[row % 4]
    return poisoned


def a_goal_of_another_class(poisoned: PoisonedDataset, row: int, pixel: int) -> PoisonedDataset:
    poisoned.goal.y_wanted[:] = (-1, 3, 1, 0)[row % 4]  # not there, not there, its own class, not that of the poisons
    return poisoned


CORRUPTIONS: tuple[Corruption, ...] = (
    a_pixel_of_a_clean_image, a_pixel_of_a_poison, a_label, a_label_that_is_none, a_poison_not_listed,
    a_poison_listed_twice, a_row_that_is_not_there, one_poison_too_many, nothing_changed, a_goal_pixel,
    a_goal_of_another_class,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(CORRUPTIONS), st.integers(0, N - 1), st.integers(0, 89), st.integers(2, 5), st.integers(0, 2**31)
)
def test_every_single_corruption_of_an_honest_set_is_caught(
    spoil: Corruption, row: int, pixel: int, count: int, seed: int
) -> None:
    """Honest sets of any poisons and perturbations pass; whatever one thing is then wrong with them, they do not."""
    clean, generator = toy(), torch.Generator().manual_seed(seed)
    rows = torch.arange(2, N, 3)[torch.randperm(6, generator=generator)[:count]]
    delta = torch.randint(1, 17, (count, 3, 6, 5), generator=generator, dtype=torch.int16)
    x = clean.x.clone()
    x[rows] = (x[rows].short() + delta).to(torch.uint8)
    honest = PoisonedDataset(replace(clean, x=x, y=clean.y.clone()), rows, goal())
    honest.check(clean, xi=16 / 255, budget=count)
    with pytest.raises(ValueError):
        spoil(honest, row, pixel).check(clean, xi=16 / 255, budget=count)


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 9000])
def test_rows_that_differ_are_found_in_every_part(n: int) -> None:
    a = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    b, rows = a.clone(), torch.arange(0, n, 1365)
    b[rows, 0, 1, 1] = 1
    assert differing_rows(a, b).nonzero().flatten().tolist() == rows.tolist()


# -- save and load --------------------------------------------------------------------------------------------


TRIGGERS: dict[str, Trigger | None] = {
    "none": None,
    "patch": Patch(torch.rand(3, 2, 2)),
    "patch at a corner": Patch(torch.rand(1, 2, 2), (4, 0)),
    "stamp": Stamp(torch.rand(3, 6, 5), torch.rand(6, 5)),
    "additive": Additive(torch.rand(3, 6, 5) - 0.5),
}


@pytest.mark.parametrize("kind", TRIGGERS)
@pytest.mark.parametrize("known", [True, False])
def test_save_and_load(tmp_path: Path, clean: LabeledImages, kind: str, known: bool) -> None:
    trigger = TRIGGERS[kind]
    path, before = tmp_path / "poisons.safetensors", poison(clean, goal=goal(trigger))
    before.save(path, clean=clean if known else None, key="abc")
    after = PoisonedDataset.load(path, clean)
    assert after.train.fingerprint == before.train.fingerprint
    assert torch.equal(after.poison_idx, before.poison_idx) and after.recipe == before.recipe
    assert torch.equal(after.goal.x, before.goal.x) and after.goal.name == before.goal.name
    assert torch.equal(after.goal.y_true, before.goal.y_true)
    assert torch.equal(after.goal.y_wanted, before.goal.y_wanted)
    after.check(clean, xi=16 / 255)
    assert type(after.goal.trigger) is type(trigger)
    if trigger is not None and after.goal.trigger is not None:
        x = torch.rand(4, 3, 6, 5)
        shown = [t(x, torch.Generator().manual_seed(0)) for t in (trigger, after.goal.trigger)]
        assert torch.equal(*shown) and not torch.equal(shown[0], x)


def test_the_file_says_what_it_is(tmp_path: Path, clean: LabeledImages) -> None:
    poisoned = poison(clean)
    poisoned.save(tmp_path / "a", clean=clean, key="abc")
    poisoned.save(tmp_path / "b", clean=clean, key="abc")
    assert hashlib.sha256((tmp_path / "a").read_bytes()).digest() == hashlib.sha256(
        (tmp_path / "b").read_bytes()).digest()  # fmt: skip
    _, header = read_tensors(tmp_path / "a")
    assert header["attack"] == "plus" and header["recipe"] == {"attack": "plus", "by": 16}
    assert header["key"] == "abc" and header["goal"] == "two images -> frog"
    assert header["clean"] == clean.fingerprint and header["poisoned"] == poisoned.train.fingerprint


def test_only_the_poisons_are_stored_and_the_clean_set_is_left_alone(tmp_path: Path, clean: LabeledImages) -> None:
    print_before = clean.fingerprint
    poison(clean).save(tmp_path / "p")
    tensors, _ = read_tensors(tmp_path / "p")
    assert len(tensors["poison_x"]) == 3
    PoisonedDataset.load(tmp_path / "p", clean)
    assert replace(clean).fingerprint == print_before


def test_other_clean_data_are_refused(tmp_path: Path, clean: LabeledImages) -> None:
    poison(clean).save(tmp_path / "p")
    poison(clean).save(tmp_path / "known", clean=clean)
    x, xp = clean.x.clone(), clean.x.clone()
    x[0, 0, 0, 0] ^= 1
    xp[5, 0, 0, 0] ^= 1  # the base of a poison: the poisoned set is the same all the same
    for other in (x, xp):
        with pytest.raises(ValueError, match=r"known was made for other training data than LabeledImages\(toy"):
            PoisonedDataset.load(tmp_path / "known", replace(clean, x=other))
    with pytest.raises(ValueError, match="was made for other training data"):
        PoisonedDataset.load(tmp_path / "p", replace(clean, x=x))
    with pytest.raises(ValueError, match="poisons row 11, but there are 8"):
        PoisonedDataset.load(tmp_path / "p", clean.rows(range(8)))
    with pytest.raises(ValueError, match=r"images of \(3, 6, 5\), not \(3, 5, 6\)"):
        PoisonedDataset.load(tmp_path / "p", replace(clean, x=clean.x.transpose(2, 3)))


@pytest.mark.parametrize("keep", [0, 8, 100, -1])
def test_torn_files_are_refused(tmp_path: Path, clean: LabeledImages, keep: int) -> None:
    path = tmp_path / "p"
    poison(clean).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="torn or not a safetensors file"):
        PoisonedDataset.load(path, clean)


def test_files_of_the_first_format_are_read(tmp_path: Path, clean: LabeledImages) -> None:
    poison(clean, goal=goal(Patch(torch.ones(3, 2, 2)))).save(tmp_path / "p")
    old: dict[str, object] = {"format": "friends-poisons-1"} | dict.fromkeys(("attack", "key", "clean", "sha256"), ...)
    path = tampered(tmp_path / "p", {}, old)
    assert read_tensors(path)[1].keys() == {"format", "recipe", "goal", "poisoned", "trigger", "corner"}
    after = PoisonedDataset.load(path, clean)
    assert after.train.fingerprint == poison(clean).train.fingerprint
    assert isinstance(after.goal.trigger, Patch)
    with pytest.raises(ValueError, match="was made for other training data"):
        PoisonedDataset.load(tampered(path, {"poison_x": torch.zeros(3, 3, 6, 5, dtype=torch.uint8)}, old), clean)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_file_that_was_changed_after_it_was_written_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any byte of the file: it is torn, of another format, or its seal is broken; never other poisons."""
    path, clean = tmp_path_factory.mktemp("changed") / "p", toy()
    poison(clean, goal=goal(Stamp(torch.rand(3, 6, 5), torch.rand(6, 5)))).save(path, clean=clean)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"torn|was changed after it was written|not a poison set|header"):
        PoisonedDataset.load(path, clean)


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({"goal_x": torch.zeros(2, 3, 6, 5)}, {}),
        ({"goal_y_wanted": torch.tensor([2, 0])}, {}),
        ({"poison_idx": torch.tensor([5, 8, 11])}, {}),
        ({"more": torch.zeros(1)}, {}),
        ({}, {"goal": "another"}),
        ({}, {"recipe": {"attack": "stronger"}}),
        ({}, {"sha256": None}),
    ],
)
def test_the_seal_holds_every_part(
    tmp_path: Path, clean: LabeledImages, tensors: dict[str, Tensor | None], header: dict[str, object]
) -> None:
    poison(clean).save(tmp_path / "p", clean=clean)
    with pytest.raises(ValueError, match="p was changed after it was written: its sha256 is not the one"):
        PoisonedDataset.load(tampered(tmp_path / "p", tensors, header, sealed=False), clean)


def tampered(path: Path, tensors: dict[str, Tensor | None], header: dict[str, object], *, sealed: bool = True) -> Path:
    """The same file with other parts, and with a new seal that fits them unless ``sealed`` is false."""
    old_tensors, old_header = read_tensors(path)
    merged = {name: tensor for name, tensor in (old_tensors | tensors).items() if tensor is not None}
    entries = {k: v for k, v in (old_header | header).items() if v is not ...}
    if sealed and "sha256" in entries:
        entries["sha256"] = seal(merged, entries)
    write_tensors(path, merged, entries)
    return path


@pytest.mark.parametrize(
    ("tensors", "header", "words"),
    [
        ({}, {"format": "friends-poisons-9"}, "not a poison set of ours: format 'friends-poisons-9'"),
        ({}, {"format": ...}, "format None"),
        ({"goal_x": None}, {}, "lacks 'goal_x'"),
        ({}, {"goal": ...}, "lacks 'goal'"),
        ({}, {"recipe": ...}, "lacks 'recipe'"),
        ({}, {"trigger": "patch"}, "lacks"),
        ({"patch": torch.zeros(3, 2, 2)}, {"trigger": "patch", "corner": "no"}, "corner is 'no'"),
        ({}, {"trigger": "other"}, "trigger that cannot be stored"),
        ({"poison_idx": torch.tensor([5, 11, -12])}, {}, "poisons row -12"),
        ({"poison_idx": torch.tensor([5, 11])}, {}, "3 images, 3 labels and 2 rows"),
        ({"poison_y": torch.tensor([1])}, {}, "3 images, 1 labels and 3 rows"),
        ({"poison_x": torch.zeros(3, 3, 6, 5)}, {}, "torch.float32"),
        ({"poison_idx": torch.tensor([5.0, 11.0, 8.0])}, {}, "torch.float32"),
        ({"poison_y": torch.tensor([1, 2, 9])}, {}, "label 9 of row 8"),
    ],
)
def test_foreign_and_tampered_files_are_refused(
    tmp_path: Path, clean: LabeledImages, tensors: dict[str, Tensor | None], header: dict[str, object], words: str
) -> None:
    poison(clean).save(tmp_path / "p")
    with pytest.raises(ValueError, match=words):
        PoisonedDataset.load(tampered(tmp_path / "p", tensors, header), clean)


def test_a_trigger_of_another_kind_is_saved_for_reports_but_not_loaded(tmp_path: Path, clean: LabeledImages) -> None:
    def brighter(x: Tensor, generator: torch.Generator) -> Tensor:
        return (x + 0.1).clamp(0, 1)

    poison(clean, goal=replace(goal(), trigger=brighter)).save(tmp_path / "p")
    with pytest.raises(ValueError, match="trigger that cannot be stored"):
        PoisonedDataset.load(tmp_path / "p", clean)


def test_missing_file(tmp_path: Path, clean: LabeledImages) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        PoisonedDataset.load(tmp_path / "p", clean)
