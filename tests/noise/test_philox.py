"""The random signs: the published generator, the bits that stored noise relies on, and no pattern in them."""

from __future__ import annotations

import numpy as np
import philox_slow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from friends.noise import philox
from friends.noise.philox import corners, philox4x32, sign_bits, signed

INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_published_answers_are_given(counter, key, words):
    """The known answers that the authors' library Random123 is tested with."""
    x, k, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert [word.tolist() for word in philox4x32([np.array([word], np.uint64) for word in x], tuple(k))] == [
        [word] for word in expected
    ]
    assert philox_slow.philox4x32(x, tuple(k)) == expected


@given(
    counter=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), min_size=4, max_size=4),
    key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_many_counters_at_once_are_as_one_by_one(counter, key):
    words = philox4x32([np.array(word, np.uint64) for word in counter], key)
    for one, found in zip(zip(*counter, strict=True), zip(*words, strict=True), strict=True):
        assert list(found) == philox_slow.philox4x32(list(one), key)


@settings(max_examples=30, deadline=None)
@given(keys=st.lists(INT64, max_size=4), values=st.integers(0, 300), seed=st.integers(-(2**70), 2**70))
def test_signs_are_as_they_are_defined(keys, values, seed):
    expected = np.array([philox_slow.signs(key, values, seed) for key in keys]).reshape(len(keys), values)
    bits = sign_bits(keys, values, seed)
    assert bits.shape == (len(keys), -(-values // 8))
    assert (signed(bits, values, 1) == expected).all()
    assert sum(int(byte).bit_count() for byte in bits.flat) == int((expected == 1).sum())  # none beyond the last value


def test_the_bits_are_frozen():
    """Stored noise would be other noise if one of these changed."""
    assert sign_bits([0], 128, 0).tobytes().hex() == "d5e827668dc569e14cac57bcd8db009b"  # the first published answer
    assert sign_bits([5, -1], 141, 2**40 + 3).tobytes().hex() == (
        "b355db02da3929adb7b97b4948af47854307" + "f33ee9f7d6f2ba297a22de801eb7f2317f04"
    )


def test_a_row_depends_on_seed_and_key_alone(monkeypatch):
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50)
    bits = sign_bits(keys, 1000, 7)
    assert (sign_bits(torch.from_numpy(keys[[40, 3]]), 1000, 7) == bits[[40, 3]]).all()
    assert (sign_bits(keys.tolist(), 1000, 7 + 2**64) == bits).all()
    assert not (sign_bits(keys, 1000, 8) == bits).all(1).any()
    monkeypatch.setattr(philox, "_LANES", 24)  # three rows at a time
    assert (sign_bits(keys, 1000, 7) == bits).all()


def test_a_row_is_the_beginning_of_a_longer_one():
    assert (sign_bits([1, 2], 400, 0) == sign_bits([1, 2], 4000, 0)[:, :50]).all()


def test_signs_have_no_pattern():
    """Counts within five standard deviations: of all, of every place, of neighbours, of rows with nearby keys."""
    signs = signed(sign_bits(np.arange(2000), 3072, 0), 3072, 1).astype(np.int32)
    assert abs(signs.sum()) < 5 * signs.size**0.5
    assert np.abs(signs.sum(0)).max() < 5 * 2000**0.5
    assert np.abs(signs.sum(1)).max() < 5 * 3072**0.5
    assert abs((signs[:, 1:] * signs[:, :-1]).sum()) < 5 * signs.size**0.5
    assert abs((signs[1:] * signs[:-1]).sum()) < 5 * signs.size**0.5


@pytest.mark.parametrize("level", [0, 1, 16, 127])
def test_corners_are_signs_times_the_level(level):
    noise = corners(torch.tensor([3, -9]), (3, 5, 7), level, seed=2)
    expected = torch.tensor([philox_slow.signs(key, 105, 2) for key in (3, -9)]).reshape(2, 3, 5, 7)
    assert noise.dtype == torch.int8
    assert torch.equal(noise.int(), expected.int() * level)
    assert corners([], (3, 5, 7), level, seed=2).shape == (0, 3, 5, 7)


def test_a_level_that_no_signed_byte_holds_is_refused():
    with pytest.raises(ValueError, match="noise of 128 grey levels does not fit"):
        corners([1], (1, 2, 2), 128, seed=0)


def test_every_row_may_have_its_own_level():
    assert signed(np.array([[0b01], [0b10]], np.uint8), 2, np.array([[3], [127]], np.uint8)).tolist() == [
        [3, -3],
        [-127, 127],
    ]
