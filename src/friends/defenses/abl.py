"""ABL: isolate what is learned first and best, train on the rest, then unlearn what was isolated.

Yige Li, Xixiang Lyu, Nodens Koren, Lingjuan Lyu, Bo Li, Xingjun Ma: *Anti-Backdoor Learning: Training Clean Models on
Poisoned Data*, NeurIPS 2021, arXiv 2110.11571. With L the mean cross-entropy of a batch and l_i that of image i::

    1. isolation, without augmentation:  minimise sign(L - gamma) L             (local gradient ascent, "lga")
                                         or       |L - gamma| + gamma           ("flooding")
       then D_b = the images with the lowest l_i, a share `isolate` of the data
    2. training on the rest D \\ D_b, with augmentation:   minimise L
    3. unlearning on D_b:                                 maximise L

Poisons with a trigger are learned in the first epochs; gamma keeps the loss of the others from getting as low.

Departures from the paper and its authors' code:

- Phases are 20, 60 and 5 epochs, those that add up to the 85 that FRIENDS compares with; for a recipe other than 80
  epochs they are stretched in proportion unless given. All epochs train: the script's first epoch of unlearning only
  evaluates, so its 5 are our 4.
- Weight decay, momentum and batch size are the recipe's (the script: decay 1e-4 and batches of 64), and so is the
  learning rate by default. It falls to a tenth after 2/3 of phase 2, as in the script. The order is shuffled also in
  phase 1, where the script's is not. Every later phase starts an optimizer with fresh momentum, like the script.
- Images whose loss is above `cap` in phase 3 are not pushed on, and the norm of the gradient is at most `clip`: the
  loss of an ascent grows exponentially, and with more steps than the script's few the model is lost for all images,
  then its weights overflow. The script has neither. Phase 3 shows the images unaugmented.
- In phase 3 batch normalisation goes on with the statistics of phase 2. Batches of D_b alone, as in the script, would
  replace them with those of a few images of one class, which ruins the model for all others, poisoned or not.
- Phase 1 is local gradient ascent by default, as in the paper; the script's default is flooding.
- Ranking takes one pass over the whole data in eval mode, in batches: l_i is never a training batch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.modules import logits_of
from friends.training.defense import About, Defense, Run
from friends.training.recipe import sgd

Method = Literal["lga", "flooding"]
"""How the loss is kept near gamma."""

BATCH = 1000


def gated_loss(mean: Float[Tensor, ""], gamma: float, method: Method) -> Float[Tensor, ""]:
    """What phase 1 minimises: descends while the mean loss of the batch is above gamma, and ascends below."""
    if method == "lga":
        return torch.sign(mean.detach() - gamma) * mean
    return (mean - gamma).abs() + gamma


def ascent_loss(losses: Float[Tensor, " b"], cap: float) -> Float[Tensor, ""]:
    """What phase 3 minimises: minus the mean loss, in which an image beyond ``cap`` counts as ``cap``."""
    return -losses.clamp(max=cap).mean()


def scale_gradients(gradients: Sequence[Tensor], norm: float, exactly: bool) -> None:
    """Scale gradients in place so that their common norm is at most ``norm``, or exactly; those of 0 stay 0."""
    now = torch.stack([g.norm() for g in gradients]).norm()
    factor = norm / now.clamp(min=1e-30)
    for gradient in gradients:
        gradient.mul_(factor if exactly else factor.clamp(max=1))


def per_image_loss(model: nn.Module, data: LabeledImages, batch: int = BATCH) -> Float[Tensor, " n"]:
    """The cross-entropy of every image as it is, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [
                F.cross_entropy(logits_of(model, data.pixels(rows)).float(), data.y[rows], reduction="none")
                for rows in torch.arange(len(data), device=data.device).split(batch)
            ]
    finally:
        model.train(was_training)
    return torch.cat(parts)


def lowest(losses: Float[Tensor, " n"], keep: Bool[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """The rows of lowest loss among those kept: a share of all the kept, at least one if the share is not 0."""
    count = min(int(keep.sum()), max(1, round(share * int(keep.sum())))) if share > 0 else 0
    ranked = losses.masked_fill(~keep, float("inf")).argsort(stable=True)
    chosen = torch.zeros_like(keep)
    chosen[ranked[:count]] = True
    return chosen


@dataclass(frozen=True, kw_only=True)
class ABL(Defense):
    """Anti-Backdoor Learning. It sets the length of the training and its learning rates.

    Args:
        isolate: share of the data that is isolated and unlearned, as if the defender knew roughly how many poisons
            there are; the paper has 0.01 and finds that fewer than there are suffice.
        turning_epoch: epochs of phase 1; None is 1/4 of the recipe's, 20 of 80.
        finetune_epochs: epochs of phase 2; None is 3/4 of the recipe's, 60 of 80.
        unlearn_epochs: epochs of phase 3; None is 1/16 of the recipe's, 5 of 80, and at least 1.
        method: ``"lga"`` or ``"flooding"``.
        gamma: the loss near which phase 1 keeps the mean of every batch, in nats.
        lr: learning rate of phase 1, and of phase 2 to begin with; None is the recipe's. The authors have 0.1.
        unlearn_lr: learning rate of phase 3.
        cap: images whose loss is larger are not unlearned further, in nats; None is the logarithm of the number of
            classes, where the model finds the label no likelier than chance.
        clip: norm that the gradient has at most in phase 3.
        normalise: give it exactly this norm. Poisons that were learned by heart have a gradient of nearly 0, from
            which the authors' ascent hardly gets away; with this it does, in steps of one length. Ours, not theirs.

    With ``isolate=0`` and ``turning_epoch=0`` it does nothing. With ``isolate=0`` alone there is no phase 3.

    Raises:
        ValueError: a setting out of range; rows to isolate, but no epoch that could tell them apart.
    """

    isolate: float = 0.01
    turning_epoch: int | None = None
    finetune_epochs: int | None = None
    unlearn_epochs: int | None = None
    method: Method = "lga"
    gamma: float = 0.5
    lr: float | None = None
    unlearn_lr: float = 5e-4
    cap: float | None = None
    clip: float = 1.0
    normalise: bool = False

    about: ClassVar[About] = About(
        title="ABL",
        paper="Li et al.: Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571",
        told=("isolate",),
        traits=frozenset({"phases"}),
        clashes={
            "mixes": "ABL tells poisons by the loss of single images, and images that are mixed have none of their own",
            "repeats": "both replace the loss, and the largest loss among copies is not the one that gamma bounds",
            "drops": "phase 3 of ABL trains on the isolated rows alone: a defense that drops rows as training goes "
            "on would take them for its own, or leave none",
            "phases": "each sets the length, the rows and the loss of the whole training",
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.isolate < 1:
            raise ValueError(f"isolate is a share of the data in [0, 1), not {self.isolate}")
        for name in ("turning_epoch", "finetune_epochs", "unlearn_epochs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is a number of epochs or None, not {value}")
        if self.turning_epoch == 0 and self.isolate > 0:
            raise ValueError(f"an untrained model cannot tell which {self.isolate:.2%} to isolate: raise "
                             "turning_epoch, or set isolate=0")  # fmt: skip
        if self.method not in get_args(Method):
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(get_args(Method))}")
        for name in ("gamma", "lr", "unlearn_lr", "cap", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is positive and finite, not {value}")

    def lengths(self, epochs: int) -> tuple[int, int, int]:
        """Epochs of the three phases for a recipe of so many."""
        if self._idle or epochs == 0:
            return 0, epochs, 0
        parts = (self.turning_epoch, 1 / 4), (self.finetune_epochs, 3 / 4), (self.unlearn_epochs, 1 / 16)
        one, two, three = (max(1, round(share * epochs)) if given is None else given for given, share in parts)
        return one, two, three if self.isolate > 0 else 0

    @property
    def _idle(self) -> bool:
        return self.isolate == 0 and self.turning_epoch == 0

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Set the length of the training, and begin phase 1 without augmentation."""
        if self._idle:
            return
        run.epochs = sum(self.lengths(run.recipe.epochs))
        run.augment = False
        self.resume(run)

    def resume(self, run: Run) -> None:
        """Set the learning rates of the three phases; the optimizer is the recipe's SGD in each."""
        if not self._idle:
            run.schedule = lambda epoch: self.lr_at(epoch, run)

    def lr_at(self, epoch: int, run: Run) -> float:
        """The learning rate of an epoch, counted from 0 over all phases."""
        lr = run.recipe.lr if self.lr is None else self.lr
        one, two, _ = self.lengths(run.recipe.epochs)
        if epoch >= one + two:
            return self.unlearn_lr
        return lr if epoch < one + round(two * 2 / 3) else lr / 10

    def phase(self, run: Run) -> int:
        """1, 2 or 3."""
        one, two, _ = self.lengths(run.recipe.epochs)
        return 1 + (run.epoch >= one) + (run.epoch >= one + two)

    def start_epoch(self, run: Run) -> None:
        """Change phase: rows, optimizer and augmentation."""
        one, two, _ = self.lengths(run.recipe.epochs)
        if self._idle or run.epoch not in (one, one + two):
            return
        if run.epoch == one:
            self._isolate(run)
            run.keep = run.keep & ~run.memory(self)["isolated"]
            run.augment = run.recipe.augment is not None
        if run.epoch == one + two:
            run.keep = run.memory(self)["isolated"].clone()
            run.augment = False
        run.optimizer = sgd(run.model, run.recipe)

    def _isolate(self, run: Run) -> None:
        """Remember the isolated rows; those that a filter took away before are not among them, but stay removed."""
        isolated = lowest(per_image_loss(run.model, run.data), run.keep, self.isolate)
        kept = run.memory(self)
        kept["isolated"], kept["removed"] = isolated, isolated | ~run.keep

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """The batch as it is; while unlearning, batch normalisation is held at its statistics."""
        if self.phase(run) == 3:
            for module in run.model.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                    module.eval()
        return x, y

    def loss(self, logits: Float[Tensor, "b k"], y: Tensor, run: Run) -> Float[Tensor, ""]:
        """The loss of the phase."""
        phase = self.phase(run)
        if phase == 3:
            cap = math.log(max(2, len(run.data.classes))) if self.cap is None else self.cap
            return ascent_loss(F.cross_entropy(logits, y, reduction="none"), cap)
        mean = F.cross_entropy(logits, y)
        return gated_loss(mean, self.gamma, self.method) if phase == 1 else mean

    def gradients(self, run: Run) -> None:
        """Bound the steps of the ascent, or make them of one length."""
        if self.phase(run) == 3:
            scale_gradients([p.grad for p in run.model.parameters() if p.grad is not None], self.clip, self.normalise)
