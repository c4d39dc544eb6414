"""Spectral Signatures: images that stand out along the direction in which their class varies most.

Brandon Tran, Jerry Li, Aleksander Madry: *Spectral Signatures in Backdoor Attacks*, NeurIPS 2018, arXiv 1811.00636. In
every class c, with phi the penultimate features of an undefended probe and v_c the first right singular vector of the
matrix M whose rows are ``phi(x_i) - mean of phi over the class``::

    score of row i = (M v_c)_i^2;   the excess * budget * n rows of highest score are removed from the class

with ``excess = 1.5``, since some clean rows score higher than some poisons.

Departures. The authors' code, and several others, take v_c from centred features but score the features as they are; it
fails as soon as the mean of the class is not orthogonal to v_c. Here, as in the paper, the score is centred. The paper
removes 1.5 times the expected poisons of the class. Nobody knows which class is poisoned, so the benchmark behind the
tables of the FRIENDS paper removes 1.5 times *all* expected poisons from *every* class: with 1 % poisons, 15 % of a
balanced ten-class training set. That is ``budget_of="all"``; the paper's reading is ``budget_of="class"``. No more than
half of a class is ever removed: beyond that its poisons would be the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from friends.data.images import LabeledImages
from friends.defenses.filtering import check_budget, expected_poisons, probe_features, remove
from friends.training.defense import About, Defense, Run

BudgetOf = Literal["all", "class"]
"""What the budget is a fraction of: the training set, all poisons being in one unknown class, or each class."""


def spectral_scores(features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The squared deviation of each row from the mean, along the direction in which the rows vary most.

    Args:
        features: of the images of one class, at least one.
    """
    centred = features - features.mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return (centred @ direction) ** 2


def outliers(features: Float[Tensor, "n d"], y: Int64[Tensor, " n"], counts: dict[int, int]) -> Bool[Tensor, " n"]:
    """The rows of highest score in each class.

    Args:
        features: of all rows.
        y: their labels.
        counts: by class, how many; of a class with fewer than twice as many rows, half.
    """
    judged = torch.zeros_like(y, dtype=torch.bool)
    for c, wanted in counts.items():
        rows = (y == c).nonzero().flatten()
        count = min(wanted, len(rows) // 2)
        if count > 0:
            judged[rows[spectral_scores(features[rows]).topk(count).indices]] = True
    return judged


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(Defense):
    """Train without the images of highest spectral score in each class.

    Args:
        budget: expected number of poisons as a fraction; 0 removes nothing.
        excess: how many images are removed for each expected poison.
        budget_of: ``"all"``: the budget is a fraction of the training set, and every class loses as many images as if
            all the poisons were in it; ``"class"``: it is a fraction of each class.

    Raises:
        ValueError: a budget outside [0, 1), an ``excess`` that is not positive and finite, an unknown ``budget_of``.
    """

    budget: float = 0.01
    excess: float = 1.5
    budget_of: BudgetOf = "all"

    about: ClassVar[About] = About(
        title="Spectral Signatures",
        paper="Tran, Li, Madry: Spectral Signatures in Backdoor Attacks, NeurIPS 2018, arXiv 1811.00636",
        told=("budget",),
    )

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not 0 < self.excess < math.inf:
            raise ValueError(f"excess is the images removed per expected poison, above 0, not {self.excess}")
        if self.budget_of not in get_args(BudgetOf):
            raise ValueError(f"unknown budget_of {self.budget_of!r}; choose one of {', '.join(get_args(BudgetOf))}")

    def counts(self, y: Int64[Tensor, " n"]) -> dict[int, int]:
        """How many images are to be removed from each class that occurs in some labels."""
        classes, sizes = (part.tolist() for part in y.unique(return_counts=True))
        whole = [len(y)] * len(classes) if self.budget_of == "all" else sizes
        removed = (math.floor(self.excess * expected_poisons(self.budget, n) + 1e-9) for n in whole)
        return dict(zip(classes, removed, strict=True))

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Train the probe, score its features class by class, and clear the highest rows."""
        if self.budget > 0:
            remove(run, outliers(probe_features(run), data.y, self.counts(data.y)), self.about.title)
