from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from friends.data.augment import Augment
from friends.data.files import read_tensors, write_tensors
from friends.data.triggers import (
    Additive,
    Patch,
    Stamp,
    Trigger,
    checkerboard,
    clean_label_pattern,
    colour_grid,
    corner_stamp,
    trigger_from_file,
    trigger_to_file,
)

SHAPE = (3, 12, 10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 4, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=generator(7))


TRIGGERS: dict[str, Trigger] = {
    "patch": Patch(checkerboard(3), (9, 7)),
    "patch anywhere": Patch(checkerboard(3)),
    "grey patch": Patch(torch.full((1, 2, 2), 0.5)),
    "stamp": Stamp(torch.rand(SHAPE, generator=generator(1)), torch.rand(12, 10, generator=generator(2))),
    "four corners": corner_stamp(clean_label_pattern(), SHAPE, corners="all"),
    "additive": Additive(torch.rand(SHAPE, generator=generator(3)) - 0.5),
}


# --- what every trigger keeps ---


@pytest.mark.parametrize("name", TRIGGERS)
def test_triggered_pixels_are_pixels_and_the_input_stays(name: str) -> None:
    x, trigger = images(), TRIGGERS[name]
    before, state = x.clone(), torch.get_rng_state()
    out = trigger(x, generator())
    assert isinstance(trigger, Trigger)
    assert torch.equal(x, before) and out.data_ptr() != x.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    assert not torch.equal(out, x)
    assert torch.equal(out, trigger(x, generator()))
    assert trigger(x[:0], generator()).shape == (0, *SHAPE)
    assert trigger(x.double(), generator()).dtype == torch.float64


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_survives_a_file(name: str, tmp_path: Path) -> None:
    held, named = trigger_to_file(TRIGGERS[name])
    write_tensors(tmp_path / "t.safetensors", held, named)
    back = trigger_from_file("t", *read_tensors(tmp_path / "t.safetensors"))
    assert type(back) is type(TRIGGERS[name])
    assert back is not None
    assert torch.equal(back(images(), generator()), TRIGGERS[name](images(), generator()))


@pytest.mark.parametrize("name", ["patch", "stamp", "four corners", "additive"])
def test_a_trigger_of_one_place_is_at_the_same_place_in_training_and_at_test_time(name: str) -> None:
    x, trigger = images(), TRIGGERS[name]
    assert torch.equal(trigger(x, generator(0)), trigger(x, generator(1)))
    assert torch.equal(trigger(x, generator())[2:], trigger(x[2:], generator()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["stamp", "four corners", "additive"])
def test_images_of_another_shape_are_refused_not_broadcast(name: str) -> None:
    for shape in ((3, 10, 12), (1, 12, 10), (3, 12, 11)):
        with pytest.raises(ValueError, match=r"does not fit images of"):
            TRIGGERS[name](images(2, shape), generator())


# --- each kind ---


def test_a_stamp_is_blended_by_its_mask() -> None:
    pixels, mask = torch.rand(SHAPE, generator=generator(1)), torch.zeros(12, 10)
    mask[0, 0], mask[5, 3] = 1.0, 0.25
    x = images(2)
    out = Stamp(pixels, mask)(x, generator())
    expected = x.clone()
    for image in expected:
        for channel in range(3):
            image[channel, 0, 0] = pixels[channel, 0, 0]
            image[channel, 5, 3] = 0.75 * image[channel, 5, 3] + 0.25 * pixels[channel, 5, 3]
    assert torch.allclose(out, expected, atol=1e-7)


def test_what_is_added_is_clipped_to_pixels_afterwards() -> None:
    x = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1)
    assert Additive(torch.full((1, 1, 1), 0.3))(x, generator()).flatten().tolist() == pytest.approx([0.4, 1.0])
    assert Additive(torch.full((1, 1, 1), -0.3))(x, generator()).flatten().tolist() == pytest.approx([0.0, 0.6])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [1.01, -0.01, float("nan"), 255.0])
def test_patterns_that_are_no_pixels_are_refused_when_they_are_made(value: float) -> None:
    bad, good = torch.full((3, 2, 2), value), torch.ones(3, 2, 2)
    with pytest.raises(ValueError, match=r"a patch's pixels must be in \[0, 1\], not"):
        Patch(bad)
    with pytest.raises(ValueError, match=r"a stamp's pixels must be in \[0, 1\], not"):
        Stamp(bad, good[0])
    with pytest.raises(ValueError, match=r"a stamp's mask must be in \[0, 1\], not"):
        Stamp(good, bad[0])
    with pytest.raises(ValueError, match=r"cannot have a mask of \(3, 2\)"):
        Stamp(good, torch.ones(3, 2))


# --- patterns ---


def test_the_patterns_are_those_of_their_papers() -> None:
    assert checkerboard(3, 1)[0].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert clean_label_pattern(1)[0].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    for pattern in (checkerboard(4), clean_label_pattern()):
        assert all(torch.equal(pattern[0], channel) for channel in pattern)
        pattern[0] += 1  # the channels are no views of each other
        assert not torch.equal(pattern[0], pattern[1])


def test_the_colour_grid_keeps_its_colours_where_they_are() -> None:
    grid = colour_grid(80)
    places = {(10, 10): (1, 0, 0), (10, 30): (0, 1, 0), (10, 50): (0, 0, 1), (50, 10): (0, 0, 0), (70, 50): (1, 1, 0)}
    for (row, column), colour in places.items():
        assert grid[:, row, column].tolist() == pytest.approx(colour, abs=0.06)
    small = colour_grid(8)
    assert float((small - torch.nn.functional.avg_pool2d(grid, 10)).abs().max()) < 0.15
    assert torch.allclose(colour_grid(8, 1)[0], small.mean(0))
    for size, channels in ((0, 3), (8, 2)):
        with pytest.raises(ValueError, match="1 or 3 channels"):
            colour_grid(size, channels)


def test_a_corner_stamp_is_in_the_lower_right_corner_and_nowhere_else() -> None:
    x, pattern = images(), clean_label_pattern()
    out = corner_stamp(pattern, SHAPE)(x, generator())
    assert torch.equal(out[:, :, 9:, 7:], pattern.expand(4, -1, -1, -1))
    out[:, :, 9:, 7:] = x[:, :, 9:, 7:]
    assert torch.equal(out, x)
    inside = corner_stamp(pattern, SHAPE, margin=2)(x, generator())
    assert torch.equal(inside[:, :, 7:10, 5:8], pattern.expand(4, -1, -1, -1))
    patch = Patch(pattern, (9, 7))(x, generator())
    assert torch.equal(patch, corner_stamp(pattern, SHAPE)(x, generator()))


def test_four_corners_are_those_of_the_released_code() -> None:
    """Mirrored to the left, not upside down."""
    stamp = corner_stamp(clean_label_pattern(1), (1, 8, 9), corners="all")
    right, left = [[0, 0, 1], [0, 1, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert stamp.pixels[0, :3, :3].tolist() == stamp.pixels[0, 5:, :3].tolist() == left
    assert stamp.pixels[0, :3, 6:].tolist() == stamp.pixels[0, 5:, 6:].tolist() == right
    assert float(stamp.mask.sum()) == 36


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(0, 2), st.sampled_from([1, 3]), st.integers(12, 20), st.integers(12, 20))
def test_four_corners_are_the_same_in_the_mirror(size: int, margin: int, channels: int, h: int, w: int) -> None:
    pattern = torch.rand(channels, size, size, generator=generator(5))
    stamp = corner_stamp(pattern, (channels, h, w), corners="all", margin=margin)
    x = torch.rand(2, channels, h, w, generator=generator(6))
    assert torch.equal(stamp(x.flip(3), generator()).flip(3), stamp(x, generator()))
    assert float(stamp.mask.sum()) == 4 * size * size


@pytest.mark.usefixtures("unchecked")
def test_corners_that_do_not_fit_are_refused() -> None:
    for settings_ in ({"margin": 8}, {"corners": "all", "margin": 3}, {"margin": -1}):
        with pytest.raises(ValueError, match="does not fit the corners"):
            corner_stamp(checkerboard(3), SHAPE, **settings_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit the corners"):
        corner_stamp(checkerboard(3), (1, 12, 10))
    with pytest.raises(ValueError, match="unknown corners 'upper-left'; choose one of lower-right, all"):
        corner_stamp(checkerboard(3), SHAPE, corners="upper-left")  # type: ignore[arg-type]


def test_a_victim_that_shifts_its_images_loses_one_corner_but_never_all_four() -> None:
    """Why the label-consistent backdoor has four: what is pushed out of an image teaches nothing."""
    shape, white = (1, 32, 32), torch.ones(1, 3, 3)
    seen = {}
    for corners in ("lower-right", "all"):
        stamped = corner_stamp(white, shape, corners=corners)(torch.zeros(500, *shape), generator())
        after = Augment(flip=0.5, shift=4)(stamped, generator(1), (0.0,))
        seen[corners] = after.flatten(1).sum(1) / white.sum()  # how many whole stamps are left
    assert float((seen["lower-right"] < 0.05).float().mean()) > 0.15
    assert float((seen["lower-right"] > 0.95).float().mean()) < 0.5
    assert float(seen["all"].min()) > 0.95


# --- files ---


def test_no_trigger_and_one_of_another_kind() -> None:
    assert trigger_from_file("f", *trigger_to_file(None)) is None
    tensors, header = trigger_to_file(lambda x, generator: x)
    assert tensors == {}
    with pytest.raises(ValueError, match="f has a trigger that cannot be stored in a file"):
        trigger_from_file("f", tensors, header)


@pytest.mark.usefixtures("unchecked")
def test_torn_triggers_name_the_file() -> None:
    patch, mask = torch.ones(3, 2, 2), torch.ones(3, 3)
    for tensors, header, words in [
        ({"patch": patch}, {"trigger": "patch", "corner": [1]}, r"corner is \[1\], not a row and a column"),
        ({"patch": patch}, {"trigger": "patch", "corner": [1, True]}, "not a row and a column"),
        ({"patch": patch}, {"trigger": "patch", "corner": "here"}, "not a row and a column"),
        ({"patch": patch * 2}, {"trigger": "patch", "corner": None}, r"pixels must be in \[0, 1\], not 2"),
        ({"stamp": patch, "mask": mask}, {"trigger": "stamp"}, "cannot have a mask of"),
    ]:
        with pytest.raises(ValueError, match=rf"^f has a torn trigger: .*{words}"):
            trigger_from_file("f", tensors, header)
    with pytest.raises(KeyError):
        trigger_from_file("f", {}, {"trigger": "additive"})
