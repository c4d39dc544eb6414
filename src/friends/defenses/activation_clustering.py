"""Activation Clustering: each class is cut in two clusters, and the one that looks like poison is removed.

Bryant Chen, Wilka Carvalho, Nathalie Baracaldo, Heiko Ludwig, Benjamin Edwards, Taesung Lee, Ian Molloy, Biplav
Srivastava: *Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering*, SafeAI workshop at AAAI 2019,
arXiv 1811.03728. In every class, with phi the penultimate features of an undefended probe, independent components
analysis reduces phi to 10 dimensions, k-means finds two clusters S and L with ``|S| < |L|``, and S is poison if the
class passes one of the paper's tests::

    relative:     |S| / (|S| + |L|)  <  0.35
    silhouette:   mean over the class of (b_i - a_i) / max(a_i, b_i)  >  0.10

where a_i is the mean distance of row i to the other rows of its own cluster and b_i to those of the other one.

Departures. The defaults are the variant of the benchmark behind the tables of the FRIENDS paper: no reduction, and S is
removed in *every* class unconditionally (``decide="smaller"``). It finds poisons, and throws away a large part of the
clean images; ``ORIGINAL`` is the method as published. Principal components (``"pca"``) are a third choice. The paper's
exclusionary reclassification, which trains one more model, is left out. Two clusters of equal size are both kept, as is
a class of one image or of identical images.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from friends.data.images import LabeledImages
from friends.defenses.filtering import probe_features, remove
from friends.training.defense import About, Defense, Run

Reduction = Literal["none", "ica", "pca"]
"""Of the features, before clustering: independent components (unit variance each), principal components, neither."""

Decide = Literal["smaller", "relative", "silhouette"]
"""When the smaller cluster is poison: always; if it is a small share; if the two are well apart."""

ENTRIES = 2**26
"""Distances that are held at once: 256 MiB."""

SAMPLE = 10_000
"""Rows over which a silhouette is averaged at most; each is compared with the whole class."""


def reduced(
    features: Float[Tensor, "n d"], reduction: Reduction, dims: int, generator: torch.Generator
) -> Float[Tensor, "n r"]:
    """The features of one class in at most ``dims`` dimensions, fewer where they span fewer; ``"none"`` leaves them.

    Args:
        features: at least one row.
        reduction: independent components are those of the first principal components.
        dims: at least 1.
        generator: where independent components analysis starts from.
    """
    if reduction == "none":
        return features
    left, scale, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    rounding = scale[0] * max(features.shape) * torch.finfo(features.dtype).eps
    r = min(dims, int((scale > rounding).sum()))
    scores = left[:, :r] * scale[:r]
    return scores if reduction == "pca" or r == 0 else _independent(scores, generator)


def smaller_cluster(features: Float[Tensor, "n r"], generator: torch.Generator) -> Bool[Tensor, " n"]:
    """The smaller of two clusters, by k-means from ten starts; no row if there are not two, or of equal size."""
    from sklearn.cluster import KMeans  # imported late: it takes a second, and importing the package should not

    nothing = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    if len(features) < 2 or bool((features == features[0]).all()):
        return nothing
    kmeans = KMeans(2, n_init=10, random_state=_seed(generator))  # pyright: ignore[reportArgumentType]
    kmeans.fit(features.cpu().numpy())
    second = torch.from_numpy(kmeans.labels_ == 1).to(features.device)
    size = int(second.sum())
    if 2 * size == len(features):
        return nothing
    return second if 2 * size < len(features) else ~second


def silhouette(features: Float[Tensor, "n r"], small: Bool[Tensor, " n"], generator: torch.Generator) -> float:
    """The mean silhouette of two clusters, in [-1, 1]: how much nearer rows are to their own than to the other one.

    Args:
        features: of one class.
        small: the rows of one cluster; neither may be empty. A cluster of one row has the silhouette 0.
        generator: of the rows that it is averaged over, where there are more than ``SAMPLE``.
    """
    centred, member = features - features.mean(0), torch.stack([~small, small], 1)
    size, own = member.sum(0), small.long()
    order = torch.randperm(len(features), generator=generator, device=generator.device)[:SAMPLE].to(features.device)
    total = features.new_zeros(())
    for rows in order.split(max(1, ENTRIES // len(features))):
        distances = torch.cdist(centred[rows], centred) @ member.to(features)
        mine, other = own[rows, None], 1 - own[rows, None]
        a = distances.gather(1, mine)[:, 0] / (size[mine[:, 0]] - 1).clamp(min=1)
        b = distances.gather(1, other)[:, 0] / size[other[:, 0]]
        score = (b - a) / torch.maximum(a, b).clamp(min=torch.finfo(a.dtype).tiny)
        total += torch.where(size[mine[:, 0]] > 1, score, 0.0).sum()
    return float(total) / len(order)


def _independent(scores: Float[Tensor, "n r"], generator: torch.Generator) -> Float[Tensor, "n r"]:
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    analysis = FastICA(whiten="unit-variance", random_state=_seed(generator))
    with warnings.catch_warnings():
        # of Gaussian directions there is no best rotation; any one will do, since k-means sees distances alone
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torch.from_numpy(analysis.fit_transform(scores.cpu().numpy())).to(scores)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device))


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(Defense):
    """Train without the smaller of two clusters of each class, where it looks like poison.

    Args:
        reduction: of the features before clustering: ``"none"``, ``"ica"`` or ``"pca"``.
        dims: to how many dimensions.
        decide: the smaller cluster is removed always (``"smaller"``), if it is less than ``share`` of its class
            (``"relative"``), or if the silhouette of the two is above ``separation`` (``"silhouette"``).
        share: read by ``decide="relative"``, in [0, 0.5]; 0 removes nothing.
        separation: read by ``decide="silhouette"``, in [-1, 1].

    Raises:
        ValueError: an unknown reduction or decision, no dimensions, a number out of its range.
    """

    reduction: Reduction = "none"
    dims: int = 10
    decide: Decide = "smaller"
    share: float = 0.35
    separation: float = 0.1

    about: ClassVar[About] = About(
        title="Activation Clustering",
        paper="Chen et al.: Detecting Backdoor Attacks by Activation Clustering, SafeAI@AAAI 2019, arXiv 1811.03728",
    )

    def __post_init__(self) -> None:
        for name, value, known in (("reduction", self.reduction, Reduction), ("decide", self.decide, Decide)):
            if value not in get_args(known):
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(get_args(known))}")
        if self.dims < 1:
            raise ValueError(f"at least one dimension is needed, not dims = {self.dims}")
        if not 0 <= self.share <= 0.5:
            raise ValueError(f"share is that of the smaller of two clusters, in [0, 0.5], not {self.share}")
        if not -1 <= self.separation <= 1:
            raise ValueError(f"separation is a silhouette, in [-1, 1], not {self.separation}")

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Train the probe and judge its features class by class."""
        if self.decide == "relative" and self.share == 0:
            return
        features, generator = probe_features(run), run.generator(self, "clusters")
        judged = torch.zeros_like(run.keep)
        for c in data.y.unique().tolist():
            rows = (data.y == c).nonzero().flatten()
            judged[rows] = self.judge(features[rows], generator)
        remove(run, judged, self.about.title)

    def judge(self, features: Float[Tensor, "n d"], generator: torch.Generator) -> Bool[Tensor, " n"]:
        """The rows of one class that are taken for poisons."""
        points = reduced(features, self.reduction, self.dims, generator)
        small = smaller_cluster(points, generator)
        return small if self._is_poison(points, small, generator) else torch.zeros_like(small)

    def _is_poison(self, points: Float[Tensor, "n r"], small: Bool[Tensor, " n"], generator: torch.Generator) -> bool:
        if self.decide == "relative":
            return int(small.sum()) < self.share * len(small)
        if self.decide == "silhouette":
            return bool(small.any()) and silhouette(points, small, generator) > self.separation
        return True


ORIGINAL = ActivationClustering(reduction="ica", decide="silhouette")
"""As published: ten independent components, and a class is touched only if its two clusters are well apart."""
