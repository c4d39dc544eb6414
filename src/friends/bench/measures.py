"""How good a classifier is on images that it was not trained on: accuracy, classes, confusions and calibration.

Calibration is the expected calibration error of Guo, Pleiss, Sun, Weinberger: *On Calibration of Modern Neural
Networks*, ICML 2017, arXiv 1706.04599: answers are sorted by their probability into bins ((m-1)/M, m/M], and
``ECE = sum_m n_m / n * |accuracy_m - confidence_m|``. The paper has M = 15.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from friends.bench.statistics import wilson

BINS = 15


@dataclass(frozen=True)
class OfClass:
    """One class: its images, how often it is the answer, and how often that is right.

    Args:
        name: of the class.
        images: how many images are of it.
        answers: how many images were said to be of it.
        precision: the share of these answers that is right; None if it was never the answer.
        recall: the share of its images that were recognised; None if it has none.
        f1: the harmonic mean of both; None where precision or recall is.
    """

    name: str
    images: int
    answers: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Bin:
    """The answers whose probability is in (low, high]: their number, mean probability, and the share that is right."""

    low: float
    high: float
    answers: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Measures:
    """All that is measured.

    Args:
        images: how many were shown.
        right: how many were classified rightly.
        accuracy: their share, and ``interval`` Wilson's 95 % interval for it.
        loss: mean negative log-likelihood, in nats.
        ece: expected calibration error.
        bins: those that have an answer, from low to high.
        classes: in the order of their ids.
        confusion: a row for each true class, a column for each answer.
    """

    images: int
    right: int
    accuracy: float
    interval: tuple[float, float]
    loss: float
    ece: float
    bins: tuple[Bin, ...]
    classes: tuple[OfClass, ...]
    confusion: tuple[tuple[int, ...], ...]


def measure(probabilities: Float64[Tensor, "n k"], y: Int64[Tensor, " n"], classes: Sequence[str]) -> Measures:
    """Measure answers, given as probabilities, against the true classes.

    Raises:
        ValueError: there is no image.
    """
    if len(y) == 0:
        raise ValueError("nothing can be measured on no image")
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # a second to import

    confidence, answers = probabilities.max(1)
    labels = list(range(len(classes)))
    scores = precision_recall_fscore_support(
        y.numpy(), answers.numpy(), labels=labels, zero_division=cast(Any, math.nan)
    )
    right = int((answers == y).sum())
    bins = reliability(confidence, answers == y)
    of_truth = probabilities.gather(1, y[:, None])[:, 0]
    return Measures(
        images=len(y),
        right=right,
        accuracy=right / len(y),
        interval=wilson(right, len(y)),
        loss=float(-of_truth.clamp_min(torch.finfo(torch.float64).tiny).log().mean()),
        ece=sum(one.answers * abs(one.accuracy - one.confidence) for one in bins) / len(y),
        bins=bins,
        classes=_of_classes(classes, np.stack([np.asarray(score) for score in scores]), answers),
        confusion=tuple(tuple(map(int, row)) for row in confusion_matrix(y.numpy(), answers.numpy(), labels=labels)),
    )


def reliability(confidence: Float64[Tensor, " n"], right: Tensor, bins: int = BINS) -> tuple[Bin, ...]:
    """Answers sorted into equal bins by their probability; bins without answers are left out."""
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found: list[Bin] = []
    for m in range(bins):
        inside = place == m
        n = int(inside.sum())
        if n:
            mean, share = float(confidence[inside].mean()), float(right[inside].double().mean())
            found.append(Bin(m / bins, (m + 1) / bins, n, mean, share))
    return tuple(found)


def _of_classes(
    classes: Sequence[str], scores: np.ndarray[tuple[int, ...], np.dtype[np.float64]], answers: Tensor
) -> tuple[OfClass, ...]:
    """``scores``: a row each of precision, recall, F1 and images, with NaN where one is not defined."""
    counts = torch.bincount(answers, minlength=len(classes)).tolist()
    found: list[OfClass] = []
    for name, count, (precision, recall, _, images) in zip(classes, counts, scores.T.tolist(), strict=True):
        p, r = (None if math.isnan(value) else float(value) for value in (precision, recall))
        f1 = None if p is None or r is None else 2 * p * r / (p + r) if p + r else 0.0
        found.append(OfClass(name, int(images), count, p, r, f1))
    return tuple(found)
