"""Deep k-NN: images whose nearest neighbours have other labels are taken for poisons.

Neehar Peri, Neal Gupta, W. Ronny Huang, Liam Fowl, Chen Zhu, Soheil Feizi, Tom Goldstein, John P. Dickerson: *Deep
k-NN Defense against Clean-label Data Poisoning Attacks*, ECCV 2020 Workshops, arXiv 1909.13374. With phi the
penultimate features of an undefended probe and N_k(i) the k rows j != i of smallest ``||phi(x_i) - phi(x_j)||``::

    keep row i   iff   #{j in N_k(i): y_j = y_i}  >=  #{j in N_k(i): y_j != y_i}

The paper advises k of about twice the number of poisons, so that they cannot be a majority among themselves.

Departures. The vote above, a majority with ties kept, is that of the benchmark behind the tables of the FRIENDS paper,
and stricter than the authors' plurality vote, which is the setting ``vote="plurality"``. The authors count a row
among its own neighbours; here it has no vote on itself (by its index: a duplicate of it does vote), so their k is our
k + 1, and a plurality that is shared by the row's own label keeps it. The authors' optional repetition of rare classes
is left out. A class of which no image wins its vote is kept whole, with a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from friends.data.images import LabeledImages
from friends.defenses.filtering import check_budget, expected_poisons, probe_features, remove
from friends.modules import still
from friends.training.defense import About, Defense, Run

Vote = Literal["majority", "plurality"]
"""What a label must win among the neighbours: as many as all other labels together, or as many as any other one."""

ENTRIES = 2**26
"""Distances that are held at once: 256 MiB."""


def outvoted(
    features: Float[Tensor, "n d"], y: Int64[Tensor, " n"], *, k: int, vote: Vote = "majority"
) -> Bool[Tensor, " n"]:
    """The rows whose label loses the vote of their k nearest other rows; none for ``k = 0``.

    Args:
        features: of all rows.
        y: their labels.
        k: how many neighbours vote; where distances are equal, which of them is not specified.
        vote: what the label must win; ties keep the row.

    Raises:
        ValueError: k is negative, or not smaller than the number of rows.
    """
    check_neighbours(k, len(y))
    judged = torch.zeros_like(y, dtype=torch.bool)
    if k == 0:
        return judged
    centred = features - features.mean(0)  # changes no distance, and loses fewer digits in cdist
    with still([], freeze=False, device=features.device):  # in float32, also where TensorFloat-32 is on
        for rows in torch.arange(len(y), device=y.device).split(max(1, ENTRIES // len(y))):
            judged[rows] = _loses(y[neighbours(centred, rows, k)], y[rows], vote)
    return judged


def neighbours(features: Float[Tensor, "n d"], rows: Int64[Tensor, " b"], k: int) -> Int64[Tensor, "b k"]:
    """The k nearest other rows of some rows, in no particular order."""
    distance = torch.cdist(features[rows], features)
    distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    return distance.topk(k, largest=False, sorted=False).indices


def check_neighbours(k: int, n: int) -> None:
    """Raise ``ValueError`` unless n rows have k neighbours each."""
    if not 0 <= k < n:
        raise ValueError(f"{n} images cannot have k = {k} neighbours each: lower k, or the budget that it comes from")


def _loses(votes: Int64[Tensor, "b k"], label: Int64[Tensor, " b"], vote: Vote) -> Bool[Tensor, " b"]:
    own = (votes == label[:, None]).sum(1)
    if vote == "majority":
        return 2 * own < votes.shape[1]
    count = votes.new_zeros(len(votes), int(votes.max()) + 1)
    return own < count.scatter_add_(1, votes, torch.ones_like(votes)).amax(1)


@dataclass(frozen=True, kw_only=True)
class DeepKNN(Defense):
    """Train on the images that agree with their nearest neighbours in feature space.

    Args:
        budget: expected number of poisons, as a fraction of the training set; read only where k is None.
        k: how many neighbours vote; None is twice the expected number of poisons, 0 removes nothing.
        vote: ``"majority"``, the label must have at least half of the neighbours, or ``"plurality"``, no other label
            may have more.

    Raises:
        ValueError: a budget outside [0, 1), a negative k, an unknown vote; at the start of training, before a probe is
            trained, as many neighbours as there are images.
    """

    budget: float = 0.01
    k: int | None = None
    vote: Vote = "majority"

    about: ClassVar[About] = About(
        title="Deep k-NN",
        paper="Peri et al.: Deep k-NN Defense against Clean-label Data Poisoning Attacks, ECCVW 2020, arXiv 1909.13374",
        told=("budget", "k"),
    )

    def told(self) -> dict[str, object]:
        """The budget, or ``k`` where it is given, which is then what counts."""
        return {"budget": self.budget} if self.k is None else {"k": self.k}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.k is not None and self.k < 0:
            raise ValueError(f"k is a number of neighbours, not {self.k}")
        if self.vote not in get_args(Vote):
            raise ValueError(f"unknown vote {self.vote!r}; choose one of {', '.join(get_args(Vote))}")

    def neighbours(self, n: int) -> int:
        """How many neighbours vote in a training set of ``n`` images."""
        return 2 * expected_poisons(self.budget, n) if self.k is None else self.k

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Train the probe and let its neighbourhoods vote."""
        k = self.neighbours(len(data))
        check_neighbours(k, len(data))
        if k > 0:
            remove(run, outvoted(probe_features(run), data.y, k=k, vote=self.vote), self.about.title)
