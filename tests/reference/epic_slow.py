"""EPIC from its definition: every gain of every candidate in every round, one similarity at a time."""

from __future__ import annotations

import math

import numpy as np


def similarity_slow(points: np.ndarray, scale: float) -> np.ndarray:
    """exp(-distance / scale), pair by pair."""
    n = len(points)
    return np.array([[math.exp(-math.dist(points[i], points[j]) / scale) for j in range(n)] for i in range(n)])


def greedy_slow(similarity: np.ndarray, k: int) -> list[int]:
    """Greedy facility location without any memory of earlier rounds; the first of equal gains."""
    n = len(similarity)
    chosen: list[int] = []
    for _ in range(k):
        values = [
            -1.0 if j in chosen else math.fsum(max(float(similarity[i, a]) for a in [*chosen, j]) for i in range(n))
            for j in range(n)
        ]
        chosen.append(values.index(max(values)))
    return chosen


def isolated_slow(gradients: np.ndarray, y: list[int], classes: int, medoids: int) -> list[int]:
    """The rows, sorted, that are the only ones of their medoid, class by class."""
    dropped: list[int] = []
    for label in range(classes):
        rows = [i for i, each in enumerate(y) if each == label]
        budget = math.ceil(len(rows) * medoids / len(y))
        if not 0 < budget < len(rows):
            continue
        similarity = similarity_slow(gradients[rows], classes)
        chosen = greedy_slow(similarity, budget)
        nearest = [max(chosen, key=lambda a, i=i: similarity[i, a]) for i in range(len(rows))]
        dropped += [rows[i] for i, a in enumerate(nearest) if nearest.count(a) == 1]
    return sorted(dropped)
