"""EPIC: drop, while training, the images whose gradients stand alone.

Yu Yang, Tian Yu Liu, Baharan Mirzasoleiman: *Not All Poisons are Created Equal: Robust Training against Data
Poisoning*, ICML 2022, arXiv 2210.09671. Effective poisons lie far from all others in gradient space. In our symbols, in
every round::

    g_i = softmax(z_i) - onehot(y_i)                 the loss's gradient with respect to the logits z_i of image i
    A_c = greedy medoids of {g_i : y_i = c}          by facility location, exp(-|g_i - g_j| / classes), |A_c| =
                                                     ceil(n_c / n * floor(share * n))
    drop every i that is the only one for which its medoid is the most similar

A round looks at *all* images, as they are (not augmented), dropped ones too, through the model in eval mode. What it
drops stays dropped. The rest is not re-weighted, and the model goes on from where it is.

When rounds take place can be read in two ways. The FRIENDS paper has T = 1, K = 5 in its Table 1 and T = 2, K = 5 in
Table 2, and does not say which is the interval. ``READING_A``: K is the first epoch and T the interval. ``READING_B``:
T is the first epoch and K the interval, as in the commands that EPIC's authors published. Rounds are at multiples of
the interval, counted from epoch 0, and end with the last drop of the learning rate (epoch 70 of 80).

Departures: a class with at most as many images as medoids is left alone, where the authors' code would drop all of it;
ties go to the image that comes first.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses.medoids import alone, facility_location, similarities
from friends.modules import logits_of, still
from friends.training.defense import About, Defense, Run

BATCH = 1000


def isolated(gradients: Float[Tensor, "n k"], y: Int64[Tensor, " n"], classes: int, medoids: int) -> Bool[Tensor, " n"]:
    """The images that are, within their class, the only ones of their medoid.

    Args:
        gradients: of the loss with respect to the logits.
        y: labels.
        classes: how many classes there are; also the scale of distances.
        medoids: for all classes together; each gets its share by size, rounded up.
    """
    found = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for label in range(classes):
        rows = (y == label).nonzero().flatten()
        budget = -(-len(rows) * medoids // len(y))
        if 0 < budget < len(rows):
            similarity = similarities(gradients[rows], float(classes))
            found[rows] = alone(similarity, facility_location(similarity, budget))
    return found


def logit_gradients(model: nn.Module, data: LabeledImages, *, bias: bool) -> Float[Tensor, "n k"]:
    """``softmax(z) - onehot(y)`` of every image, not augmented, with the model in eval mode.

    Args:
        model: takes pixels in [0, 1], returns logits.
        data: the images and labels.
        bias: whether the logits have the bias of the last layer. Without it, z is ``W @ features``. A model whose
            logits are not the output of an ``nn.Linear`` keeps it, with a warning.
    """
    parts: list[Tensor] = []
    with still([model], freeze=False, device=data.device), torch.no_grad():
        for start in range(0, len(data), BATCH):
            rows = slice(start, start + BATCH)
            z = (logits_of if bias else _logits_without_bias)(model, data.pixels(rows)).float()
            parts.append(z.softmax(1) - F.one_hot(data.y[rows], z.shape[1]))
    return torch.cat(parts)


def _logits_without_bias(model: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
    """Logits less the bias of the linear layer that made them."""
    last: list[tuple[nn.Linear, Tensor]] = []

    def remember(layer: nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> None:
        last[:] = [(layer, output)]

    hooks = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        logits = logits_of(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    if not last or not torch.equal(last[0][1], logits):
        warnings.warn(
            f"the logits of {type(model).__name__} are not the output of an nn.Linear: EPIC takes them with their bias",
            stacklevel=2,
        )
        return logits
    bias = last[0][0].bias
    return logits if bias is None else logits - bias  # pyright: ignore[reportUnnecessaryComparison]


@dataclass(frozen=True, kw_only=True)
class Epic(Defense):
    """Effective poisons identification: medoids of the gradients, and away with whoever has one for himself.

    Args:
        share: medoids per image of the data, the 0.1 of EPIC-0.1; more medoids drop more images. 0 switches it off.
        start: no round before this epoch, counted from 0.
        interval: rounds are at the epochs that are multiples of it.
        stop: no round after this fraction of the training; 7/8 is the last drop of the paper's learning rate.
        bias: whether the gradients come from logits with the last layer's bias. The authors leave it out against
            targeted attacks and keep it against backdoors.

    Raises:
        ValueError: a setting out of its range; at the start of training, if no round would ever take place.
    """

    share: float = 0.1
    start: int = 1
    interval: int = 5
    stop: float = 7 / 8
    bias: bool = False

    about: ClassVar[About] = About(
        title="EPIC",
        paper="Yang, Liu, Mirzasoleiman: Not All Poisons are Created Equal: Robust Training against Data Poisoning, "
        "ICML 2022, arXiv 2210.09671",
        traits=frozenset({"drops"}),
        clashes={"phases": "both decide, epoch by epoch, which images are trained on"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share is in [0, 1), medoids per image, not {self.share}")
        if self.start < 0 or self.interval < 1:
            raise ValueError(f"start >= 0 and interval >= 1 expected, in epochs, not {self.start} and {self.interval}")
        if not 0 < self.stop <= 1:
            raise ValueError(f"stop is a fraction of the training in (0, 1], not {self.stop}")

    def rounds(self, epochs: int) -> list[int]:
        """The epochs, from 0, at whose start images are dropped in a training of so many epochs."""
        last = min(round(self.stop * epochs), epochs - 1)
        return [e for e in range(self.start, last + 1) if e % self.interval == 0] if self.share > 0 else []

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Refuse a training without a round or a medoid, which would look like a defense and be none."""
        if self.share > 0 and int(self.share * len(data)) == 0:
            raise ValueError(f"share = {self.share:g} of {len(data)} images is no medoid: raise it, or set it to 0")
        if run.epochs > 0 and self.share > 0 and not self.rounds(run.epochs):
            raise ValueError(
                f"EPIC would never look: in {run.epochs} epochs no multiple of interval = {self.interval} lies between "
                f"start = {self.start} and epoch {round(self.stop * run.epochs)}; lower start or interval"
            )

    def start_epoch(self, run: Run) -> None:
        """In a round, look at all images and drop those that stand alone."""
        if run.epoch not in self.rounds(run.epochs):
            return
        clock = time.perf_counter()
        gradients = logit_gradients(run.model, run.data, bias=self.bias)
        medoids = int(self.share * len(run.data))
        dropped = run.keep & isolated(gradients, run.data.y, gradients.shape[1], medoids)
        run.keep = run.keep & ~dropped
        run.remarks["dropped"] = float(dropped.sum())
        run.remarks["epic seconds"] = time.perf_counter() - clock


READING_A = Epic(start=5, interval=1)
"""T is the interval and K the first epoch: every epoch from 5, 66 rounds of 80 epochs. Table 2: ``interval=2``."""

READING_B = Epic(start=1, interval=5)
"""T is the first epoch and K the interval: 14 rounds of 80 epochs. Table 2: ``start=2``, which changes no round."""
