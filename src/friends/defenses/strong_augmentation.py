"""Strong augmentation: batches are mixed, cut or repeated so strongly that poisons are not learned as they are.

Eitan Borgnia et al.: *Strong Data Augmentation Sanitizes Poisoning and Backdoor Attacks Without an Accuracy
Tradeoff*, ICASSP 2021, arXiv 2011.09527, and *DP-InstaHide: Provably Defusing Poisoning and Backdoor Attacks with
Differentially Private Data Augmentations*, 2021, arXiv 2103.02079. What they use as defenses (with x_i, y_i, masks M,
weights w and permutations pi as in :mod:`friends.defenses.mixing`)::

    Mixup          x'_i = sum_j w_j x_pi_j(i)                    Zhang et al., ICLR 2018, arXiv 1710.09412
    CutMix         x'_i = (1 - M) x_i + M x_pi(i)                Yun et al., ICCV 2019, arXiv 1905.04899
    Cutout         x'_i = (1 - M) x_i + M colour                 DeVries and Taylor, 2017, arXiv 1708.04552
    MaxUp          min over theta of mean_i max_{j <= m} l(theta; A_j(x_i), y_i)      Gong et al., CVPR 2021, 2002.09024
    DP-InstaHide   x'_i = sum_j w_j x_pi_j(i) + noise            noise ~ Laplace(0, scale) per pixel

All act after the usual flip and shift, where the training loop calls ``batch``, on pixels that the model normalises.

Departures from the code of the first two, as it lives on in public poisoning benchmarks:

- Their MaxUp takes the mean over the copies, and its copies share the boxes of all of them, because cutout works in
  place. Here the maximum of Gong et al. is taken, per image, over copies that are augmented independently.
- Their strength is 0 unless set, which crashes mixup; here alpha = 1 is the default, which is what setting it gives.
- Boxes have as many pixels as their side says (theirs lose one where it is odd). They are cut off at the edges, like
  theirs, and CutMix weighs labels by the pixels that remain.
- The noise of DP-InstaHide is not clamped to [0, 1], which would change its distribution. The papers' privacy
  guarantee is for a data set that is mixed once; like their experiments we draw anew at every step and claim none.
- Two ways of mixup, four ways of DP-InstaHide and its noise of 8/255 are choices of ours: nobody knows which are
  behind the tables of FRIENDS.
- The share of a box's side is a setting, 9/16: 18 of 32 pixels, so that other image sizes are cut as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.defenses.mixing import (
    cutmix_batch,
    cutout_batch,
    laplacian,
    mixup_batch,
    per_sample_max,
    repeated,
    soft_labels,
)
from friends.training.defense import About, Defense, Run

Copies = Literal["cutout", "shift"]
"""What makes the copies of MaxUp differ."""


def check_mixing(ways: int, alpha: float) -> None:
    """Raise ``ValueError`` unless these are settings of a mixup."""
    if ways < 1:
        raise ValueError(f"ways is how many images are mixed, at least 1, not {ways}")
    _check_alpha(alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is positive and finite, not {alpha}; to switch mixing off use ways=1 or p=0")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is in [0, 1], not {value}")


@dataclass(frozen=True, kw_only=True)
class Mixup(Defense):
    """Train on weighted means of images of the batch, with the same means of their labels.

    Args:
        ways: how many images are mixed into one; 1 leaves batches as they are.
        alpha: weights are drawn from Dirichlet(alpha, ..., alpha), once per batch; 1 is uniform.

    Raises:
        ValueError: ``ways`` below 1 or ``alpha`` not positive.
    """

    ways: int = 2
    alpha: float = 1.0

    about: ClassVar[About] = About(
        title="mixup",
        paper="Zhang et al., ICLR 2018, arXiv 1710.09412; as a defense Borgnia et al., ICASSP 2021, arXiv 2011.09527",
        traits=frozenset({"mixes"}),
    )

    def __post_init__(self) -> None:
        check_mixing(self.ways, self.alpha)

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Mix the batch; its labels become soft."""
        if self.ways == 1:
            return x, y
        generator = run.generator(self, "mix", run.epoch, run.step)
        soft = soft_labels(y, len(run.data.classes))
        return mixup_batch(x, soft, generator, ways=self.ways, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class CutMix(Defense):
    """Train on images with a box of another image in them, and labels mixed by area.

    Args:
        p: probability that a batch is cut; 0 leaves batches as they are.
        alpha: the share of an image that is kept is drawn from Beta(alpha, alpha), once per batch; 1 is uniform.

    Raises:
        ValueError: ``p`` is no probability or ``alpha`` not positive.
    """

    p: float = 0.5
    alpha: float = 1.0

    about: ClassVar[About] = About(
        title="CutMix",
        paper="Yun et al., ICCV 2019, arXiv 1905.04899; as a defense Borgnia et al., ICASSP 2021, arXiv 2011.09527",
        traits=frozenset({"mixes"}),
    )

    def __post_init__(self) -> None:
        _check_share("the probability p", self.p)
        _check_alpha(self.alpha)

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Cut the batch, or not; its labels become soft."""
        if self.p == 0:
            return x, y
        generator = run.generator(self, "cut", run.epoch, run.step)
        return cutmix_batch(x, soft_labels(y, len(run.data.classes)), generator, p=self.p, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class Cutout(Defense):
    """Train on images with a box of the mean colour of the data, which normalisation makes zero, in them.

    Args:
        size: sides of the box as a share of the image's sides; 0 leaves images as they are.
        each: whether every image has a box of its own, as in DeVries and Taylor, or the batch has one, as in the
            code of Borgnia et al.

    Raises:
        ValueError: ``size`` is not in [0, 1].
    """

    size: float = 9 / 16
    each: bool = False

    about: ClassVar[About] = About(
        title="cutout",
        paper="DeVries and Taylor, 2017, arXiv 1708.04552; as a defense Borgnia et al., ICASSP 2021, arXiv 2011.09527",
    )

    def __post_init__(self) -> None:
        _check_share("the size of the box", self.size)

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Cut the boxes."""
        if self.size == 0:
            return x, y
        generator = run.generator(self, "box", run.epoch, run.step)
        return cutout_batch(x, generator, size=self.size, fill=run.data.moments[0], each=self.each), y


@dataclass(frozen=True, kw_only=True)
class MaxUp(Defense):
    """Augment every image several times and minimise the largest loss among its copies.

    A step costs as many forward and backward passes as there are copies.

    Args:
        copies: how many; 1 leaves nothing to maximise over, and batches as they are.
        augment: ``"cutout"``, a box of its own in each copy, or ``"shift"``, another random flip and shift of each.
        size: sides of the boxes as a share of the image's sides.
        warmup: epochs at the start without copies, while losses say little.

    Raises:
        ValueError: fewer than one copy, an unknown augmentation, ``size`` not in [0, 1], a negative ``warmup``; at
            the start of training, a ``warmup`` that outlasts it.
    """

    copies: int = 4
    augment: Copies = "cutout"
    size: float = 9 / 16
    warmup: int = 5

    about: ClassVar[About] = About(
        title="MaxUp",
        paper="Gong et al., CVPR 2021, arXiv 2002.09024; as a defense Borgnia et al., ICASSP 2021, arXiv 2011.09527",
        traits=frozenset({"repeats"}),
    )

    def __post_init__(self) -> None:
        if self.copies < 1 or self.warmup < 0:
            raise ValueError(f"copies >= 1 and warmup >= 0 expected, not {self.copies}, {self.warmup}")
        if self.augment not in get_args(Copies):
            raise ValueError(f"unknown augment {self.augment!r}; choose one of {', '.join(get_args(Copies))}")
        _check_share("the size of the box", self.size)
        if self.copies > 1 and self.augment == "cutout" and self.size == 0:
            raise ValueError("copies with a box of size 0 are all alike: raise size, or set copies=1 for no defense")

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Refuse a training in which no copy would ever be made."""
        if self.copies > 1 and self.warmup >= run.epochs > 0:
            raise ValueError(f"copies would be made from epoch {self.warmup} on, but training ends after {run.epochs}: "
                             "lower warmup")  # fmt: skip

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """All copies of the batch, one after the other, and their labels."""
        if self._waits(run):
            return x, y
        generator, colour = run.generator(self, "copies", run.epoch, run.step), run.data.moments[0]
        many = repeated(x, self.copies)
        if self.augment == "shift":
            return Augment()(many, generator, colour), repeated(y, self.copies)
        return cutout_batch(many, generator, size=self.size, fill=colour, each=True), repeated(y, self.copies)

    def loss(self, logits: Float[Tensor, "b k"], y: Tensor, run: Run) -> Float[Tensor, ""]:
        """The mean over images of the largest cross-entropy among the copies of each."""
        if self._waits(run):
            return F.cross_entropy(logits, y)
        return per_sample_max(F.cross_entropy(logits, y, reduction="none"), self.copies).mean()

    def _waits(self, run: Run) -> bool:
        return self.copies == 1 or run.epoch < self.warmup


@dataclass(frozen=True, kw_only=True)
class DPInstaHide(Defense):
    """Mixup, and Laplacian noise on top.

    Args:
        ways: how many images are mixed into one; 1 leaves only the noise.
        alpha: weights are drawn from Dirichlet(alpha, ..., alpha), once per batch.
        scale: of the noise, its mean magnitude in [0, 1] pixel units; 0 leaves only the mixing.

    Raises:
        ValueError: ``ways`` below 1, ``alpha`` not positive, or ``scale`` negative or above 1.
    """

    ways: int = 4
    alpha: float = 1.0
    scale: float = 8 / 255

    about: ClassVar[About] = About(
        title="DP-InstaHide",
        paper="Borgnia et al.: DP-InstaHide, 2021, arXiv 2103.02079",
        traits=frozenset({"mixes"}),
    )

    def __post_init__(self) -> None:
        check_mixing(self.ways, self.alpha)
        _check_share("the scale of the noise", self.scale)

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Mix the batch, then add the noise."""
        if self.ways > 1:
            generator = run.generator(self, "mix", run.epoch, run.step)
            soft = soft_labels(y, len(run.data.classes))
            x, y = mixup_batch(x, soft, generator, ways=self.ways, alpha=self.alpha)
        if self.scale > 0:
            x = x + laplacian(x, self.scale, run.generator(self, "noise", run.epoch, run.step))
        return x, y
