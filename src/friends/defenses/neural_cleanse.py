"""Neural Cleanse: a class that a tiny patch turns every image into has a backdoor; find the patch, and unlearn it.

Bolun Wang, Yuanshun Yao, Shawn Shan, Huiying Li, Bimal Viswanath, Haitao Zheng, Ben Y. Zhao: *Neural Cleanse:
Identifying and Mitigating Backdoor Attacks in Neural Networks*, IEEE S&P 2019. In three steps, with L_t the l1 norm
of the smallest mask that turns images of all classes into class t (``reversal.py``)::

    a_t = |L_t - median L| / (1.4826 median_s |L_s - median L|)       the anomaly index
    flag t where L_t < median L and a_t > 2
    if a class is flagged, train on clean images, a share of them with its reversed trigger and their own labels

If none is flagged the model is returned as it is. The search is the authors' (dynamic cost, their Adam, all images of
all classes); its cost is not: the authors make up to 1,000 passes over 1,000 images for every class, in updates of
32, and ours end after 200 passes. Set ``steps=1000`` for theirs.

Departures: the classes are searched for side by side. A search that never reached its share counts with the whole
image as its mask, which the paper leaves open. Where more than half of the masks are equally large, so that the
median deviation is 0, 1.2533 times the mean deviation takes its place (Iglewicz and Hoaglin, 1993). Unlearning goes
over the clean reserve, where the paper has an epoch over 10 % of the training data with the trigger on 20 % of it;
if several classes are flagged, each stamped image shows one of their triggers, drawn evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses.reversal import IMAGES, Reversed, Search, reverse, stamped
from friends.modules import logits_of, still
from friends.training.defense import About, Defense, Predictor, Run
from friends.training.recipe import sgd

MAD, MEAN_AD = 1.4826, 1.2533
"""What makes a median, or mean, absolute deviation of a normal distribution its standard deviation."""


def anomaly_index(norms: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """How many robust standard deviations each norm is from their median; 0 for all if they are all equal.

    Two norms are equally far from their median: their index is 1/1.4826 whatever they are.
    """
    norms = norms.double()
    deviation = (norms - norms.quantile(0.5)).abs()
    scale = MAD * deviation.quantile(0.5)
    if float(scale) == 0:
        scale = MEAN_AD * deviation.mean()
    return (deviation / scale if float(scale) > 0 else deviation).float()


def flags(norms: Float[Tensor, " k"], anomaly: float) -> Bool[Tensor, " k"]:
    """The classes whose norm is below the median with an index above ``anomaly``."""
    return (norms.double() < norms.double().quantile(0.5)) & (anomaly_index(norms) > anomaly)


def trusted(reached: Bool[Tensor, " k"]) -> Bool[Tensor, " k"]:
    """The classes that may be flagged: those whose search succeeded, if most searches did.

    A search that failed counts with the whole image. If most did, the few that succeeded would look odd for that alone.
    """
    return reached & (2 * reached.sum() > len(reached))


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Defense):
    """Reverse a trigger for each class after training; unlearn those of classes whose trigger is oddly small.

    The median is taken over the classes: with three it says little, and ten are what it was made for.

    Args:
        steps: passes over ``samples`` images per class, at most (1,000 in the authors' code).
        samples: images of the clean reserve that a pass goes over; all, if there are fewer.
        per_update: images per update.
        cost: what a mask costs per pixel at first.
        reach: share of images that a trigger must bring to its class.
        patience: passes in a row that a trigger must work, or fail, before the cost changes.
        grow: factor by which the cost rises.
        anomaly: the index above which a class is flagged; infinity flags none.
        epochs: passes over the clean reserve that unlearn; 0 only looks for backdoors.
        lr: learning rate of unlearning, by the recipe's optimizer.
        share: of the reserve that is stamped while unlearning.

    Raises:
        ValueError: a setting is out of range; before training, fewer than three classes, or a clean reserve of
            another shape or other classes than the training data.
    """

    steps: int = 200
    samples: int = 1000
    per_update: int = 32
    cost: float = 1e-3
    reach: float = 0.99
    patience: int = 5
    grow: float = 2.0
    anomaly: float = 2.0
    epochs: int = 10
    lr: float = 0.01
    share: float = 0.2

    about: ClassVar[About] = About(
        title="Neural Cleanse",
        paper="Wang et al.: Neural Cleanse: Identifying and Mitigating Backdoor Attacks, IEEE S&P 2019",
        aims=("backdoor",),
        clean=True,
        classes=3,
        not_after={"abstains": "the threshold would be that of the model before it was mended; list STRIP last"},
    )

    def __post_init__(self) -> None:
        _ = self.search
        if not self.anomaly >= 0:
            raise ValueError(f"anomaly is an index >= 0 above which a class is flagged, not {self.anomaly}")
        if self.epochs < 0 or not 0 < self.lr < float("inf"):
            raise ValueError(f"epochs >= 0 and lr > 0 of unlearning expected, not {self.epochs} and {self.lr}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is the part of the reserve that is stamped, in (0, 1], not {self.share}")

    @property
    def search(self) -> Search:
        """How triggers are searched for."""
        return Search(
            steps=self.steps,
            samples=self.samples,
            per_update=self.per_update,
            cost=self.cost,
            reach=self.reach,
            patience=self.patience,
            grow=self.grow,
        )

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Refuse what could not work before any time is spent."""
        if len(data.classes) < 3:
            raise ValueError(f"Neural Cleanse compares the masks of classes, and {len(data.classes)} are too few: "
                             "two are equally far from their median; it needs three, better ten")  # fmt: skip
        if run.clean is not None and (run.clean.shape, run.clean.classes) != (data.shape, data.classes):
            raise ValueError(f"the clean reserve is {run.clean!r}, but the training data {data!r}: shape and classes "
                             "must be the same")  # fmt: skip

    def after_training(self, run: Run) -> Predictor:
        """Look for a backdoor, and mend the model in place if there is one. What was found is kept: ``masks``,
        ``patterns``, ``reached``, ``norms`` (in pixels), ``index`` and ``flagged``, of every class."""
        if run.clean is None:
            return run.predictor
        clean = run.clean.to(run.device)
        found = self._reverse(run, clean)
        flagged = flags(found.norms, self.anomaly) & trusted(found.reached)
        kept = run.memory(self)
        kept |= {"masks": found.masks, "patterns": found.patterns, "reached": found.reached}
        kept |= {"norms": found.norms, "index": anomaly_index(found.norms), "flagged": flagged}
        if self.epochs > 0 and bool(flagged.any()):
            self._unlearn(run, clean, found.masks[flagged], found.patterns[flagged])
        return run.predictor

    def _reverse(self, run: Run, clean: LabeledImages) -> Reversed:
        """A trigger for every class, some classes at a time."""
        classes, together = range(len(clean.classes)), max(1, IMAGES // self.per_update)
        groups = [classes[start : start + together] for start in range(0, len(classes), together)]
        found: list[Reversed] = []
        with still([run.model], freeze=True, device=run.device):
            for place, group in enumerate(groups):
                generator = run.generator(self, "reversal", place)
                found.append(reverse(run.model, clean.pixels(), group, self.search, generator, run.progress))
        return Reversed(
            torch.cat([part.masks for part in found]),
            torch.cat([part.patterns for part in found]),
            torch.cat([part.reached for part in found]),
        )

    def _unlearn(
        self, run: Run, clean: LabeledImages, masks: Float[Tensor, "f 1 h w"], patterns: Float[Tensor, "f c h w"]
    ) -> None:
        """Train on the reserve, a share of it with a reversed trigger and all of it with its own labels."""
        optimizer = sgd(run.model, run.recipe, self.lr)
        run.model.train()
        for epoch in range(self.epochs):
            generator = run.generator(self, "unlearning", epoch)
            order = torch.randperm(len(clean), generator=generator, device=run.device)
            for rows in order.split(run.recipe.batch):
                x = clean.pixels(rows)
                if run.recipe.augment is not None:  # before the stamp, which stays where it is
                    x = run.recipe.augment(x, generator, run.data.moments[0])
                x = self._some_stamped(x, masks, patterns, generator)
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(logits_of(run.model, x).float(), clean.y[rows]).backward()
                optimizer.step()
            run.progress("unlearning triggers", epoch + 1, self.epochs)
        optimizer.zero_grad(set_to_none=True)
        run.model.eval()

    def _some_stamped(
        self, x: Float[Tensor, "b c h w"], masks: Tensor, patterns: Tensor, generator: torch.Generator
    ) -> Float[Tensor, "b c h w"]:
        """A batch in which each image is stamped with probability ``share``, with one of the triggers."""
        draw = torch.rand(len(x), generator=generator, device=x.device) < self.share
        which = torch.randint(len(masks), (len(x),), generator=generator, device=x.device)
        return torch.where(draw[:, None, None, None], stamped(x, masks[which], patterns[which]), x)
