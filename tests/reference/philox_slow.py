"""Philox4x32-10 one counter at a time, and the signs drawn from it bit by bit, from the paper's description.

Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
"""

from __future__ import annotations

WORD = 2**32 - 1


def philox4x32(counter: list[int], key: tuple[int, int]) -> list[int]:
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b & WORD, (a >> 32) ^ x3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [x0, x1, x2, x3]


def signs(key: int, values: int, seed: int) -> list[int]:
    """+1 or -1 for each value of the row with this key."""
    key, seed = key % 2**64, seed % 2**64
    found: list[int] = []
    for v in range(values):
        block, place = divmod(v, 128)
        words = philox4x32([block, 0, key & WORD, key >> 32], (seed & WORD, seed >> 32))
        found.append(1 if words[place // 32] >> (place % 32) & 1 else -1)
    return found
