"""Random signs that anybody can make again, for any row without the others: Philox4x32-10, many rows at once.

John Salmon, Mark Moraes, Ron Dror, David Shaw: *Parallel random numbers: as easy as 1, 2, 3*, SC 2011. A counter-based
generator has no state: it is a bijection of 128-bit counters, chosen by a 64-bit key. One round maps the words
(x0, x1, x2, x3) of the counter, with the key (k0, k1), to::

    (high(m1 x2) ^ x1 ^ k0,  low(m1 x2),  high(m0 x0) ^ x3 ^ k1,  low(m0 x0))

and the key grows by a constant; there are ten rounds.

The signs are part of a storage format, so their bits may never change; :func:`sign_bits` defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int8, Int64
from numpy.typing import NDArray
from torch import Tensor

UInt64s = NDArray[np.uint64]
Keys = Int64[Tensor, " b"] | NDArray[np.int64] | Sequence[int]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
GROWTH = (0x9E3779B9, 0xBB67AE85)

_LANES = 1 << 13
"""Counters worked on at once: 48 bytes each in six arrays, which should stay in the second-level cache."""

_VALUES = 1 << 17
"""Values unpacked at once."""

_WORD = (1 << 64) - 1
_M0, _M1, _LOW, _HALF = (np.array(number, np.uint64) for number in (*MULTIPLIERS, 0xFFFFFFFF, 32))
"""As arrays without dimensions: numpy would convert a number at every use."""


def philox4x32(counter: Sequence[UInt64s], key: tuple[int, int]) -> list[UInt64s]:
    """Four random words for each counter.

    Args:
        counter: x0, x1, x2 and x3, 32-bit words in 64-bit lanes because they are multiplied, in arrays that are
            broadcast.
        key: k0 and k1.

    Returns:
        The four words, 32 bits in 64-bit lanes.
    """
    x0, x1, x2, x3 = counter
    for k0, k1 in _grown(key):
        a, b = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (b >> _HALF) ^ x1 ^ k0, b & _LOW, (a >> _HALF) ^ x3 ^ k1, a & _LOW
    return [x0, x1, x2, x3]


@lru_cache(maxsize=16)
def _grown(key: tuple[int, int]) -> list[tuple[UInt64s, UInt64s]]:
    """The key of every round."""
    k0, k1 = (np.array([(k + turn * step) % 2**32 for turn in range(ROUNDS)], np.uint64) for k, step in
              zip(key, GROWTH, strict=True))  # fmt: skip
    return [(k0[turn, ...], k1[turn, ...]) for turn in range(ROUNDS)]


def sign_bits(keys: Keys, values: int, seed: int) -> NDArray[np.uint8]:
    """A packed random bit for each of ``values`` values of each row, a function of ``seed`` and the row's key alone.

    The definition, which stored noise relies on: with ``seed`` and the row's key taken modulo 2^64, block ``i`` of a
    row is Philox4x32-10 of the counter ``(i, 0, key mod 2^32, key div 2^32)`` under the key ``(seed mod 2^32, seed div
    2^32)``. Its four words, each as four bytes, the least significant first, are bytes ``16 i`` to ``16 i + 15`` of the
    row. The bit of value ``v`` is bit ``v mod 8`` of byte ``v div 8``, bit 0 being the least significant; bits of the
    last byte beyond ``values`` are 0.

    Args:
        keys: 64-bit integers, one per row.
        values: how many bits a row has.
        seed: any integer.

    Returns:
        ``(b, ceil(values / 8))`` uint8; the same on every platform.
    """
    row_keys = np.asarray(keys.cpu() if isinstance(keys, Tensor) else keys, dtype=np.int64).view(np.uint64)
    blocks, size = -(-values // 128), -(-values // 8)
    bits = np.empty((len(row_keys), size), np.uint8)
    step = max(1, _LANES // max(1, blocks))
    for start in range(0, len(row_keys), step):
        bits[start : start + step] = _blocks(row_keys[start : start + step], blocks, seed & _WORD)[:, :size]
    if values % 8:
        bits[:, -1] &= (1 << values % 8) - 1
    return bits


def _blocks(keys: UInt64s, blocks: int, seed: int) -> NDArray[np.uint8]:
    """The bytes of all blocks of some rows: ``(b, 16 * blocks)``."""
    zero, low, high = np.zeros((1, 1), np.uint64), (keys & _LOW)[:, None], (keys >> _HALF)[:, None]
    counter = [np.arange(blocks, dtype=np.uint64)[None], zero, low, high]
    words = np.empty((len(keys), blocks, 4), np.dtype("<u4"))
    for place, word in enumerate(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))):
        words[:, :, place] = word
    return words.view(np.uint8).reshape(len(keys), 16 * blocks)


def corners(keys: Keys, shape: tuple[int, int, int], level: int, seed: int) -> Int8[Tensor, "b c h w"]:
    """Noise of which every value is +level or -level: plus where :func:`sign_bits` has a 1, in row-major order.

    Args:
        keys: 64-bit integers, one per row.
        shape: ``(c, h, w)``.
        level: whole grey levels, 0 to 127.
        seed: any integer.

    Returns:
        int8 on the CPU; the same bits on every platform.

    Raises:
        ValueError: ``level`` does not fit in a signed byte.
    """
    if not 0 <= level <= 127:
        raise ValueError(f"noise of {level} grey levels does not fit in a signed byte: 0 to 127 do")
    values = int(np.prod(shape))
    return torch.from_numpy(signed(sign_bits(keys, values, seed), values, level)).reshape(-1, *shape)


def signed(
    bits: NDArray[np.uint8], values: int, level: int | NDArray[np.uint8], out: NDArray[np.int8] | None = None
) -> NDArray[np.int8]:
    """Packed bits ``(b, ceil(values / 8))`` as noise ``(b, values)``: +level for a 1 and -level for a 0.

    Args:
        bits: bit ``v mod 8`` of byte ``v div 8`` belongs to value ``v``.
        values: how many values a row has.
        level: grey levels, at most 127; of all rows, or ``(b, 1)`` uint8, one for each.
        out: where to write the noise; by default a new array.
    """
    out = np.empty((len(bits), values), np.int8) if out is None else out
    step = max(1, _VALUES // max(1, values))
    for start in range(0, len(bits), step):
        some = slice(start, start + step)
        if isinstance(level, int) and values % 8 == 0:
            np.take(_eights(level), bits[some], out=out[some].view(np.int64), mode="clip")
            continue
        one = level if isinstance(level, int) else level[some]
        grey = np.unpackbits(bits[some], axis=1, count=values, bitorder="little")
        np.multiply(grey, 2 * one, grey)
        np.subtract(grey, one, out[some].view(np.uint8))  # modulo 256: 0 - level is the byte of -level
    return out


@lru_cache(maxsize=16)
def _eights(level: int) -> NDArray[np.int64]:
    """The noise of eight values for every byte of bits: eight bytes, taken for one number so that they move at once."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.int8(level), np.int8(-level)).view(np.int64)[:, 0]
