from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from friends.data.convert import to_bytes, to_pixels

HWC = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
CHW = torch.from_numpy(HWC.transpose(2, 0, 1).copy())


@pytest.mark.parametrize(
    "same",
    [
        Image.fromarray(HWC),
        HWC,
        np.ascontiguousarray(HWC.transpose(2, 0, 1)),
        CHW,
        CHW.float() / 255,
        CHW.double() / 255,
        CHW.float().div(255).requires_grad_(),
        (HWC / 255).astype(np.float32),
        (HWC / 255).astype(">f8"),
        HWC[::-1][::-1],
    ],
)
def test_every_form_of_one_image_gives_the_same_pixels(same: object) -> None:
    assert torch.equal(to_bytes(same), CHW)
    pixels = to_pixels(same)
    assert pixels.dtype == torch.float32 and not pixels.requires_grad
    assert torch.allclose(pixels, CHW.float() / 255, atol=1e-7)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "YCbCr", "HSV"])
def test_pil_modes_become_grey_or_rgb(mode: str) -> None:
    image = Image.fromarray(HWC).convert(mode)
    grey = mode in ("L", "1", "LA")
    want = np.asarray(image.convert("L" if grey else "RGB"))
    want = want[None] if grey else want.transpose(2, 0, 1)
    assert to_bytes(image).tolist() == want.tolist()


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_pil_modes_without_a_fixed_white_are_refused(mode: str) -> None:
    with pytest.raises(TypeError, match=f"mode '{mode}' has no fixed white"):
        to_bytes(Image.new(mode, (4, 4)))


def test_grey_has_one_channel_in_every_form() -> None:
    grey = HWC[:, :, 0]
    want = torch.from_numpy(grey.copy())[None]
    for same in (Image.fromarray(grey), grey, grey[:, :, None], grey[None], want[0], want):
        assert torch.equal(to_bytes(same), want)


def test_layout_rule_for_arrays_and_tensors() -> None:
    both = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert to_bytes(both).shape == (3, 3, 5)  # both ends could be channels: an array is (h, w, c)
    assert torch.equal(to_bytes(torch.from_numpy(both)), torch.from_numpy(both))  # and a tensor (c, h, w)
    assert to_bytes(torch.zeros(2, 5, 7)).shape == (2, 5, 7)  # two channels are nobody's (h, w, c)


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    c=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
)
def test_bytes_survive_every_round_trip(h: int, w: int, c: int, seed: int) -> None:
    x = torch.randint(0, 256, (c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(to_bytes(to_pixels(x)), x)
    assert torch.equal(to_bytes(x.permute(1, 2, 0).numpy()), x)
    image = Image.fromarray(x[0].numpy() if c == 1 else x.permute(1, 2, 0).numpy())
    assert torch.equal(to_bytes(image), x)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1, width=32))
def test_rounding_goes_to_the_nearest_level(value: float) -> None:
    assert int(to_bytes(torch.full((1, 2, 2), value))[0, 0, 0]) == round(float(np.float32(value) * np.float32(255)))


def test_results_share_no_memory_with_arrays_and_warn_of_nothing() -> None:
    frozen = HWC.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = to_bytes(frozen)
    out.zero_()
    assert frozen.any()


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (torch.full((1, 2, 2), float("nan")), ValueError, "NaN"),
        (np.full((2, 2), np.nan), ValueError, "NaN"),
        (torch.full((1, 2, 2), float("inf")), ValueError, r"in \[inf, inf\]"),
        (torch.full((1, 2, 2), 200.0), ValueError, r"\[200, 200\]: divide by 255"),
        (torch.full((3, 2, 2), -1.5), ValueError, "before normalisation"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), TypeError, "torch.int64"),
        (np.zeros((2, 2), dtype=np.int32), TypeError, "int32"),
        (np.zeros((2, 2), dtype=bool), TypeError, "bool"),
        (np.zeros((2, 2), dtype=object), TypeError, "object"),
        (np.zeros((5, 6, 7), dtype=np.uint8), ValueError, r"unclear which axis .*\(5, 6, 7\)"),
        (torch.zeros(5, 7, 3), ValueError, r"looks like \(h, w, c\)"),
        (torch.zeros(1, 3, 4, 4), ValueError, "2 or 3 axes"),
        (np.zeros(4, dtype=np.uint8), ValueError, "2 or 3 axes"),
        (torch.zeros(3, 0, 4), ValueError, "no pixels"),
        ("cat.png", TypeError, "not str"),
        (None, TypeError, "not NoneType"),
    ],
)
def test_what_is_refused_and_how(image: object, error: type[Exception], words: str) -> None:
    for convert in (to_pixels, to_bytes):
        with pytest.raises(error, match=words):
            convert(image)


def test_float_overshoot_of_resizing_is_clamped() -> None:
    x = torch.tensor([[[-5e-5, 1 + 5e-5]]])
    assert to_pixels(x).tolist() == [[[0.0, 1.0]]]
