"""Deep k-NN written from its definition, slowly: every row is compared with every other, one at a time."""

from __future__ import annotations

from collections import Counter

from torch import Tensor


def outvoted(features: Tensor, y: Tensor, k: int, vote: str) -> list[bool]:
    """For each row whether its label loses among its k nearest other rows."""
    points, labels = features.double(), y.tolist()
    judged: list[bool] = []
    for i, label in enumerate(labels):
        distances = (points - points[i]).norm(dim=1).tolist()
        others = sorted((j for j in range(len(labels)) if j != i), key=distances.__getitem__)
        votes = Counter(labels[j] for j in others[:k])
        rivals = [count for other, count in votes.items() if other != label]
        needed = sum(rivals) if vote == "majority" else max(rivals, default=0)
        judged.append(votes[label] < needed)
    return judged
