from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from friends.data.files import read_tensors, write_tensors
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, Patch, PoisonedDataset

N, CLASSES = 20, ("cat", "dog", "frog")


@pytest.fixture
def clean() -> LabeledImages:
    x = torch.randint(60, 190, (N, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return LabeledImages(x, torch.arange(N) % 3, CLASSES, "toy")


def goal(trigger: Patch | None = None) -> Goal:
    x = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    return Goal(x, torch.tensor([0, 1]), torch.tensor([2, 2]), trigger, "two images -> frog")


def poison(clean: LabeledImages, by: int = 16, rows: tuple[int, ...] = (4, 11, 7), **kwargs: Goal) -> PoisonedDataset:
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
    poison(clean, by=0).check(clean, xi=0, budget=3)
    poison(clean, by=60).check(clean, xi=None)


@pytest.mark.parametrize(("by", "xi"), [(17, 16 / 255), (16, 15.99 / 255), (9, 8.6 / 255), (1, 0.0)])
def test_the_bound_holds_on_rounded_bytes(clean: LabeledImages, by: int, xi: float) -> None:
    with pytest.raises(ValueError, match=rf"poison 4 differs from its base image by {by}/255"):
        poison(clean, by=by).check(clean, xi=xi)


def test_the_bound_holds_downwards_and_in_a_single_pixel(clean: LabeledImages) -> None:
    poisoned = poison(clean, by=0)
    poisoned.train.x[7, 2, 5, 4] -= 17
    with pytest.raises(ValueError, match=r"poison 7 .* by 17/255, more than xi = 16/255"):
        poisoned.check(clean, xi=16 / 255)


def test_every_whole_level_is_allowed_by_its_own_bound(clean: LabeledImages) -> None:
    for level in range(1, 61):
        poison(clean, by=level).check(clean, xi=level / 255)


def test_too_many_poisons(clean: LabeledImages) -> None:
    with pytest.raises(ValueError, match="3 poisons, but the budget is 2"):
        poison(clean).check(clean, xi=None, budget=2)


def test_images_changed_in_secret(clean: LabeledImages) -> None:
    poisoned = replace(poison(clean), poison_idx=torch.tensor([4]))
    with pytest.raises(ValueError, match="2 images changed that are not listed as poisons, first: 7"):
        poisoned.check(clean, xi=None)


def test_labels_of_clean_label_poisons(clean: LabeledImages) -> None:
    y = clean.y.clone()
    y[4] = (y[4] + 1) % 3
    poisoned = poison(clean)
    poisoned = replace(poisoned, train=replace(poisoned.train, y=y))
    poisoned.check(clean, xi=16 / 255, clean_label=False)
    with pytest.raises(ValueError, match="row 4 has label 2, but it was 1: a clean-label attack keeps labels"):
        poisoned.check(clean, xi=16 / 255)


@pytest.mark.parametrize("clean_label", [True, False])
def test_labels_of_rows_that_are_no_poisons(clean: LabeledImages, clean_label: bool) -> None:
    y = clean.y.clone()
    y[5] = 0
    poisoned = poison(clean)
    with pytest.raises(ValueError, match="row 5 has label 0, but it was 2"):
        replace(poisoned, train=replace(poisoned.train, y=y)).check(clean, xi=None, clean_label=clean_label)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("idx", "words"),
    [
        (torch.tensor([], dtype=torch.int64), "empty poison set"),
        (torch.tensor([4, 11, 7], dtype=torch.int32), "vector of int64"),
        (torch.tensor([[4, 11, 7]]), "vector of int64"),
        (torch.tensor([4, 11, 20]), "poison index 20 is out of range: there are 20"),
        (torch.tensor([4, -1, 7]), "poison index -1 is out of range"),
        (torch.tensor([4, 11, 7, 4, 7]), "2 poison indices are listed twice"),
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


# -- save and load --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", [None, Patch(torch.rand(3, 2, 2)), Patch(torch.rand(1, 2, 2), (4, 0))])
def test_save_and_load(tmp_path: Path, clean: LabeledImages, trigger: Patch | None) -> None:
    path, before = tmp_path / "poisons.safetensors", poison(clean, goal=goal(trigger))
    before.save(path)
    after = PoisonedDataset.load(path, clean)
    assert after.train.fingerprint == before.train.fingerprint
    assert torch.equal(after.poison_idx, before.poison_idx) and after.recipe == before.recipe
    assert torch.equal(after.goal.x, before.goal.x) and after.goal.name == before.goal.name
    assert torch.equal(after.goal.y_true, before.goal.y_true)
    assert torch.equal(after.goal.y_wanted, before.goal.y_wanted)
    after.check(clean, xi=16 / 255)
    if trigger is None:
        assert after.goal.trigger is None
    else:
        assert isinstance(after.goal.trigger, Patch) and after.goal.trigger.corner == trigger.corner
        assert torch.equal(after.goal.trigger.pixels, trigger.pixels)


def test_only_the_poisons_are_stored_and_the_clean_set_is_left_alone(tmp_path: Path, clean: LabeledImages) -> None:
    print_before = clean.fingerprint
    poison(clean).save(tmp_path / "p")
    tensors, _ = read_tensors(tmp_path / "p")
    assert len(tensors["poison_x"]) == 3
    PoisonedDataset.load(tmp_path / "p", clean)
    assert replace(clean).fingerprint == print_before


def test_other_clean_data_are_refused(tmp_path: Path, clean: LabeledImages) -> None:
    poison(clean).save(tmp_path / "p")
    x = clean.x.clone()
    x[0, 0, 0, 0] ^= 1
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


def tampered(path: Path, tensors: dict[str, Tensor | None], header: dict[str, object]) -> Path:
    old_tensors, old_header = read_tensors(path)
    merged = {name: tensor for name, tensor in (old_tensors | tensors).items() if tensor is not None}
    write_tensors(path, merged, {k: v for k, v in (old_header | header).items() if v is not ...})
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
        ({"poison_idx": torch.tensor([4, 11, -13])}, {}, "poisons row -13"),
        ({"poison_idx": torch.tensor([4, 11])}, {}, "3 images, 3 labels and 2 rows"),
        ({"poison_y": torch.tensor([1])}, {}, "3 images, 1 labels and 3 rows"),
        ({"poison_x": torch.zeros(3, 3, 6, 5)}, {}, "torch.float32"),
        ({"poison_idx": torch.tensor([4.0, 11.0, 7.0])}, {}, "torch.float32"),
        ({"poison_y": torch.tensor([1, 2, 9])}, {}, "label 9 of row 7"),
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
