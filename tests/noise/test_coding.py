"""The codings of noise: what comes back, the bytes that they promise, and every wrong byte refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import philox_slow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from friends.noise import picked
from friends.noise.coding import check_coding, coder, decode
from friends.noise.flips import Flips, to_gaps
from friends.noise.philox import sign_bits, signed
from friends.noise.picked import Coded, chunks

SHAPES = st.sampled_from([(1, 1, 1), (1, 5, 7), (3, 4, 4), (3, 9, 11), (1, 28, 28), (3, 32, 32)])
SHARES = st.sampled_from([0.0, 0.001, 0.01, 0.5, 0.999, 1.0])
"""How many of the signs differ: none, few with gaps beyond 255, about half, all."""

SEED = 7


def flipped(keys: np.ndarray, shape: tuple[int, int, int], level: int, share: float, draw: int) -> np.ndarray:
    """Corner noise ``(b, values)`` in which this share of the seeded signs is turned."""
    values = int(np.prod(shape))
    start = signed(sign_bits(keys, values, SEED), values, level)
    return np.where(np.random.default_rng(draw).random(start.shape) < share, -start, start)


def one_file(parts, name: str = "shard-00003.safetensors") -> list[Coded]:
    return [Coded(Path(name), parts)]


def all_rows(how, shards: list[Coded], keys: np.ndarray) -> np.ndarray:
    how.check(shards[0])
    return decode(how, shards, np.zeros(len(keys), np.int64), np.arange(len(keys)), keys)


def keys_of(b: int) -> np.ndarray:
    return np.random.default_rng(b).integers(-(2**63), 2**63 - 1, b)


# ---- what comes back


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, b=st.integers(1, 5), share=SHARES, level=st.integers(1, 127), draw=st.integers(0, 99))
def test_flips_come_back_exactly(shape, b, share, level, draw):
    keys, how = keys_of(b), coder("flips", shape, level, SEED)
    noise = flipped(keys, shape, level, share, draw)
    parts = how.encode(noise, keys)
    assert (all_rows(how, one_file(parts), keys) == noise).all()
    turned = int((noise != flipped(keys, shape, level, 0, 0)).sum())
    assert turned <= len(parts["gaps"]) <= turned + noise.size // 255  # a byte each, and the escapes there is room for


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, b=st.integers(1, 5), level=st.integers(1, 127), draw=st.integers(0, 99))
def test_int8_comes_back_exactly(shape, b, level, draw):
    noise = np.random.default_rng(draw).integers(-level, level, (b, int(np.prod(shape))), np.int8, endpoint=True)
    how = coder("int8", shape, level, SEED)
    assert (all_rows(how, one_file(how.encode(noise, keys_of(b))), keys_of(b)) == noise).all()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, b=st.integers(1, 5), level=st.integers(1, 127), draw=st.integers(0, 99))
def test_bits_come_back_as_signs_times_the_mean_size(shape, b, level, draw):
    noise = np.random.default_rng(draw).integers(-level, level, (b, int(np.prod(shape))), np.int8, endpoint=True)
    how = coder("bits", shape, level, SEED)
    parts = how.encode(noise, keys_of(b))
    found = all_rows(how, one_file(parts), keys_of(b))
    for row, back in zip(noise.tolist(), found.tolist(), strict=True):
        size = round(sum(map(abs, row)) / len(row))
        assert back == [size if value > 0 else -size for value in row]
    assert parts["signs"].nbytes + parts["level"].nbytes == b * (-(-noise.shape[1] // 8) + 1)


@pytest.mark.parametrize(
    ("marks", "gaps"),
    [
        ([], []),
        ([0], [0]),
        ([254], [254]),
        ([255], [255, 0]),
        ([0, 1, 255], [0, 0, 253]),
        ([0, 256], [0, 255, 0]),
        ([510, 765], [255, 255, 0, 254]),
        ([765], [255, 255, 255, 0]),
    ],
)
def test_gaps_are_written_as_they_are_defined(marks, gaps):
    """The bytes are a format: these may never change."""
    marked = np.zeros((2, 766), bool)
    marked[1, marks] = True
    found, sizes = to_gaps(marked)
    assert found.tolist() == gaps
    assert sizes.tolist() == [0, len(gaps)]


def test_the_bytes_of_the_codings_are_frozen():
    signs = np.array([philox_slow.signs(key, 300, SEED) for key in (4, -5)], np.int8)
    signs[0, [0, 299]] *= -1
    signs[1, 280] *= -1
    keys = np.array([4, -5])
    parts = coder("flips", (1, 15, 20), 9, SEED).encode(signs * np.int8(9), keys)
    assert parts["gaps"].tobytes().hex() == "00ff2b" + "ff19"
    assert parts["offsets"].astype("<i4").tobytes().hex() == "00000000" + "03000000" + "05000000"
    bits = coder("bits", (1, 1, 10), 9, SEED).encode(np.array([[9, -8, 7, 0, 0, 0, 0, 0, 1, -1]], np.int8), keys[:1])
    assert (bits["signs"].tobytes().hex(), bits["level"].tobytes().hex()) == ("0501", "03")


def test_an_image_of_cifar_takes_at_most_48_bytes():
    keys = np.arange(4096)
    noise = flipped(keys, (3, 32, 32), 16, 35 / 3072, 0)
    parts = coder("flips", (3, 32, 32), 16, SEED).encode(noise, keys)
    assert sum(part.nbytes for part in parts.values()) / 4096 < 48


@pytest.mark.parametrize("coding", ["int8", "bits", "flips"])
def test_any_rows_of_any_shards_are_those_of_all(coding, monkeypatch):
    keys, sizes = keys_of(23), [9, 9, 5]
    how, noise = coder(coding, (3, 8, 8), 16, SEED), flipped(keys, (3, 8, 8), 16, 0.02, 3)
    noise[11] = flipped(keys[11:12], (3, 8, 8), 16, 0, 0)  # a row without flips
    parts = [
        how.encode(noise[start : start + size], keys[start:]) for start, size in zip((0, 9, 18), sizes, strict=True)
    ]
    shards = [Coded(Path(f"shard-{number}"), part) for number, part in enumerate(parts)]
    wanted = np.random.default_rng(0).integers(0, 23, 200)
    for cache in (1 << 20, 500):
        monkeypatch.setattr(picked, "_CHUNK", cache)
        assert (decode(how, shards, wanted // 9, wanted % 9, keys[wanted]) == noise[wanted]).all()
    nothing = np.zeros(0, np.int64)
    assert decode(how, shards, nothing, nothing, nothing).shape == (0, 192)


def test_encoding_does_not_depend_on_the_chunks(monkeypatch):
    keys, noise = keys_of(50), flipped(keys_of(50), (1, 9, 9), 5, 0.3, 1)
    how = coder("flips", (1, 9, 9), 5, SEED)
    parts = how.encode(noise, keys)
    monkeypatch.setattr(picked, "_CHUNK", 300)
    assert len(list(chunks(50, 81))) == 17
    again = how.encode(noise, keys)
    assert all((parts[name] == again[name]).all() for name in parts)


# ---- noise that a coding is not for


def test_flips_refuse_noise_that_is_not_at_its_bound():
    noise = flipped(keys_of(3), (1, 5, 5), 16, 0.1, 0)
    noise[1, 3] = 15
    with pytest.raises(ValueError, match=r"row 1 has noise that is not \+-16/255"):
        coder("flips", (1, 5, 5), 16, SEED).encode(noise, keys_of(3))


def test_more_flips_than_offsets_reach_are_refused(monkeypatch):
    monkeypatch.setattr("friends.noise.flips.MOST", 1000)
    keys = keys_of(3)
    with pytest.raises(ValueError, match="bytes of flips in a shard of 3 rows: make shards of fewer rows"):
        coder("flips", (3, 32, 32), 16, SEED).encode(flipped(keys, (3, 32, 32), 16, 0.5, 0), keys)


def test_a_coding_that_does_not_fit_is_refused():
    for coding in ("int8", "bits", "flips"):
        check_coding(coding, "flips")
    with pytest.raises(ValueError, match="unknown coding 'bit' of noise; choose one of int8, bits, flips"):
        check_coding("bit", "flips")
    with pytest.raises(ValueError, match="'flips' keeps noise of the method 'flips' only, this is of 'polyak'"):
        check_coding("flips", "polyak")


# ---- bytes of any origin


def damaged(gaps: list[int], offsets: list[int]) -> tuple[Flips, list[Coded]]:
    how = Flips(values=600, limit=16, seed=SEED)
    parts = {"gaps": np.array(gaps, np.uint8), "offsets": np.array(offsets, np.int32)}
    return how, one_file(parts)


@pytest.mark.parametrize(
    ("gaps", "offsets", "words"),
    [
        ([1, 2, 3], [0, 2, 4], "row 1 is damaged: its gaps are said to be bytes 2 to 4 of 3"),
        ([1, 2, 3], [0, 5, 3], "row 0 is damaged: .* bytes 0 to 5 of 3"),
        ([1, 2, 3], [0, 2, 1], "row 1 is damaged: .* bytes 2 to 1 of 3"),
        ([1, 2, 3], [0, -1, 3], "row 0 is damaged: .* bytes 0 to -1 of 3"),
        ([1, 2, 3], [-1, 2, 3], "row 0 is damaged: .* bytes -1 to 2 of 3"),
        ([1, 2, 3], [1, 2, 3], "rows are said to be bytes 1 to 3 of 3"),
        ([1, 2, 3], [0, 2, 2], "rows are said to be bytes 0 to 2 of 3"),
        ([1, 2, 3], [0, 2**31 - 1, 3], "row 0 is damaged"),
        ([0] * 700, [0, 10, 700], "row 1 is damaged: .* bytes 10 to 700 of 700"),  # more than a row can have
    ],
)
def test_offsets_that_are_none_are_refused(gaps, offsets, words):
    how, shards = damaged(gaps, offsets)
    with pytest.raises(ValueError, match=f"shard-00003.safetensors.*{words}"):
        how.check(shards[0])


@pytest.mark.parametrize(
    "gaps",
    [[255], [3, 255], [255, 255, 90], [255, 255, 255, 0], [0] * 599 + [1], [200, 200, 198], [255] * 602],
    ids=["only an escape", "ends with one", "one too far", "escapes too far", "many", "few", "all escapes"],
)
def test_gaps_that_leave_their_row_are_refused(gaps):
    good = [0] * 5
    how, shards = damaged([*good, *gaps, *good], [0, 5, 5 + len(gaps), 10 + len(gaps)])
    how.check(shards[0])
    keys, rows = keys_of(3), np.array([2, 0, 1])
    with pytest.raises(ValueError, match=r"shard-00003.safetensors: row 1 is damaged: its gaps pass beyond"):
        decode(how, shards, np.zeros(3, np.int64), rows, keys[rows])
    others = np.array([2, 0])
    decode(how, shards, np.zeros(2, np.int64), others, keys[others])  # no other row is touched


def test_gaps_that_reach_the_last_value_are_none_too_many():
    how, shards = damaged([255, 255, 89, *[0] * 600], [0, 3, 603])
    keys = keys_of(2)
    start = signed(sign_bits(keys, 600, SEED), 600, 16)
    found = all_rows(how, shards, keys)
    assert np.flatnonzero(found[0] != start[0]).tolist() == [599]
    assert (found[1] == -start[1]).all()


def test_a_level_beyond_zeta_is_refused():
    how = coder("bits", (1, 2, 4), 16, SEED)
    shards = one_file({"signs": np.zeros((3, 1), np.uint8), "level": np.array([16, 200, 17], np.uint8)})
    with pytest.raises(ValueError, match=r"shard-00003.safetensors: row 2 holds noise of 17/255, beyond its zeta"):
        decode(how, shards, np.zeros(2, np.int64), np.array([0, 2]), keys_of(2))


@settings(max_examples=200, deadline=None)
@given(gaps=st.lists(st.integers(0, 255), max_size=40), cut=st.integers(0, 40), values=st.integers(1, 300))
def test_whatever_the_bytes_are_rows_come_back_or_are_refused(gaps, cut, values):
    """As a plain loop reads them; nothing else raises, and nothing outside of a row changes."""
    cut = min(cut, len(gaps))
    how = Flips(values=values, limit=3, seed=SEED)
    parts = {"gaps": np.array(gaps, np.uint8), "offsets": np.array([0, cut, len(gaps)], np.int32)}
    keys = keys_of(2)
    expected = [read_slowly(row, values) for row in (gaps[:cut], gaps[cut:])]
    if None in expected:
        with pytest.raises(ValueError, match=r"shard-00003.safetensors: row [01] is damaged"):
            all_rows(how, one_file(parts), keys)
        return
    found = all_rows(how, one_file(parts), keys)
    start = signed(sign_bits(keys, values, SEED), values, 3)
    for row in (0, 1):
        assert np.flatnonzero(found[row] != start[row]).tolist() == expected[row]
        assert (np.abs(found[row]) == 3).all()


def read_slowly(gaps: list[int], values: int) -> list[int] | None:
    """The places that a row's bytes mark; None if they are no row."""
    place, marks = 0, []
    for gap in gaps:
        place += gap
        if gap < 255:
            marks.append(place)
            place += 1
    ends_with_a_mark = not gaps or gaps[-1] < 255
    return marks if ends_with_a_mark and place <= values else None
