"""STRIP: an input whose prediction survives being overlaid with other images carries a trigger.

Yansong Gao, Chang Xu, Derui Wang, Shiping Chen, Damith C. Ranasinghe, Surya Nepal: *STRIP: A Defence Against Trojan
Attacks on Deep Neural Networks*, ACSAC 2019, arXiv 1902.06531. With o_1, ..., o_N clean images and p(c | .) the
model's softmax::

    H(x) = -1/N sum_n sum_c p(c | x + o_n) log2 p(c | x + o_n)      bits, in [0, log2 k]
    answer with ABSTAIN where H(x) < t

A clean image is drowned by what is laid over it, and the model wavers; a trigger that wins over everything wins over
the overlay too, and the entropy stays low. The threshold t is the ``frr`` quantile of H on clean images that are no
overlays, so that about a share ``frr`` of clean images is refused (false rejection rate).

As in the authors' code the two images are summed, not averaged, in pixel space, and the sum, up to 2, is not clamped:
both change the entropies. The network's own first layer normalises afterwards. Departures: the overlays are drawn
once and kept, where the authors draw anew for every input, so that the same image always gets the same answer; both
overlays and calibration images come from a clean reserve outside the training data, and no image is in both parts.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from friends.data.images import LabeledImages
from friends.modules import logits_of, still
from friends.training.defense import ABSTAIN, About, Defense, Predictor, Run

Fit = Literal["normal", "quantile"]

LEAST = 20
"""Images that a threshold is fitted to, at least."""

PART = 512
"""Overlays that enter the network at a time."""


def entropy(logits: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """The entropy of each row's softmax over the classes, in bits."""
    return torch.special.entr(logits.float().softmax(1)).sum(1) / math.log(2)


def overlaid_entropy(
    model: nn.Module, x: Float[Tensor, "b c h w"], overlays: Float[Tensor, "n c h w"]
) -> Float[Tensor, " b"]:
    """H(x): the mean entropy, in bits, of the model's answers to each image with every overlay added to it.

    Every image has forward passes of its own, of always the same shape: its entropy does not depend, not even by
    rounding, on the images beside it, and memory not on how many they are.

    Args:
        model: in eval mode.
        x: pixels in [0, 1].
        overlays: clean pixels in [0, 1].
    """
    parts = overlays.split(PART)
    scores = [torch.cat([entropy(logits_of(model, image + part)) for part in parts]).mean() for image in x]
    return torch.stack(scores) if scores else x.new_zeros(0)


def threshold_of(entropies: Float[Tensor, " n"], frr: float, fit: Fit) -> Float[Tensor, ""]:
    """The entropy that a share ``frr`` of clean images is below.

    Args:
        entropies: H of clean images.
        frr: false rejection rate, in (0, 1).
        fit: the quantile of the normal distribution of largest likelihood, or of the entropies themselves.
    """
    if fit == "quantile":
        return entropies.quantile(frr)
    z = torch.special.ndtri(torch.tensor(frr, dtype=torch.float64)).to(entropies)
    return entropies.mean() + z * entropies.std(correction=0)


@dataclass(frozen=True, kw_only=True)
class Strip(Defense):
    """Refuse to answer where overlays hardly change the prediction.

    It leaves the training alone: only what the finished pipeline says is changed, to ``ABSTAIN``. A pipeline that
    already abstains (an earlier defense) goes on doing so. A defense that mends the model belongs before this one:
    the threshold is that of the model as it is when calibrated.

    Args:
        overlays: N, images of the clean reserve that are laid over every input; each costs a forward pass.
        frr: share of clean images that may be refused; 0 never abstains.
        fit: ``"normal"`` as in the paper, which supposes that the entropies of clean images are normally distributed,
            or ``"quantile"``, which supposes nothing but needs at least 1/frr images.
        calibration: at most so many images of the rest of the reserve are used to set the threshold.

    Raises:
        ValueError: a setting is out of range; before training, a clean reserve that is too small, or of another shape
            than the training images.
    """

    overlays: int = 100
    frr: float = 0.01
    fit: Fit = "normal"
    calibration: int = 2000

    about: ClassVar[About] = About(
        title="STRIP",
        paper="Gao et al.: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019, arXiv 1902.06531",
        aims=("backdoor",),
        clean=True,
        traits=frozenset({"abstains"}),
    )

    def __post_init__(self) -> None:
        if self.overlays < 1:
            raise ValueError(f"at least one overlay is needed, not {self.overlays}")
        if not 0 <= self.frr < 1:
            raise ValueError(f"frr is the share of clean images that may be refused, in [0, 1), not {self.frr}")
        if self.fit not in get_args(Fit):
            raise ValueError(f"unknown fit {self.fit!r}; choose one of {', '.join(get_args(Fit))}")
        if self.calibration < self._least:
            raise ValueError(f"a threshold for frr = {self.frr:g} by fit = {self.fit!r} needs calibration >= "
                             f"{self._least} images, not {self.calibration}")  # fmt: skip

    @property
    def _least(self) -> int:
        """Images that the threshold needs: of fewer than 1/frr none is below the quantile."""
        return max(LEAST, math.ceil(1 / self.frr)) if self.fit == "quantile" and self.frr > 0 else LEAST

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Refuse a clean reserve that will not do before any time is spent."""
        clean = run.clean
        if self.frr == 0 or clean is None:
            return
        if clean.shape != data.shape:
            raise ValueError(f"the clean reserve is of {clean.shape} images, the training data of {data.shape}")
        if len(clean) < self.overlays + self._least:
            raise ValueError(
                f"the clean reserve has {len(clean)} images; {self.overlays} overlays and {self._least} others to set "
                f"the threshold are {self.overlays + self._least}: enlarge it, or use fewer overlays"
            )

    def after_training(self, run: Run) -> Predictor:
        """Calibrate on the reserve; what was found is kept as ``threshold``, ``mean``, ``std`` and ``entropies``, in
        bits, and the rows of the reserve as ``overlays`` and ``calibration``."""
        if self.frr == 0 or run.clean is None:
            return run.predictor
        kept = run.memory(self)
        kept["overlays"], kept["calibration"] = self._split(run, len(run.clean))
        clean = run.clean.to(run.device)
        overlays = clean.pixels(kept["overlays"])
        entropies = self._calibrate(run, clean.rows(kept["calibration"]), overlays)
        threshold = threshold_of(entropies, self.frr, self.fit)
        kept |= {"entropies": entropies, "mean": entropies.mean(), "std": entropies.std(correction=0)}
        kept["threshold"] = threshold
        if float(threshold) <= 0:
            warnings.warn(f"STRIP will refuse nothing: clean images have entropies of {float(kept['mean']):.3g} +- "
                          f"{float(kept['std']):.3g} bits, so the threshold is {float(threshold):.3g}, and none is "
                          "below 0; try fit='quantile' or a larger frr", stacklevel=2)  # fmt: skip
        return _abstaining(run.predictor, run.model, overlays, threshold)

    def _split(self, run: Run, n: int) -> tuple[Int64[Tensor, " o"], Int64[Tensor, " k"]]:
        """Rows of the reserve that are overlays, and others that the threshold is set by."""
        order = torch.randperm(n, generator=run.generator(self, "split"), device=run.device)
        return order[: self.overlays], order[self.overlays :][: self.calibration]

    def _calibrate(self, run: Run, data: LabeledImages, overlays: Float[Tensor, "n c h w"]) -> Float[Tensor, " k"]:
        """H of the calibration images."""
        parts: list[Tensor] = []
        with still([run.model], freeze=False, device=run.device), torch.no_grad():
            for rows in torch.arange(len(data), device=run.device).split(50):
                parts.append(overlaid_entropy(run.model, data.pixels(rows), overlays))
                run.progress("calibrating STRIP", int(rows[-1]) + 1, len(data))
        return torch.cat(parts)


def _abstaining(
    inner: Predictor, model: nn.Module, overlays: Float[Tensor, "n c h w"], threshold: Float[Tensor, ""]
) -> Predictor:
    """The answers of a pipeline, but for images of lower entropy than the threshold."""

    def predict(x: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
        answers = inner(x)
        with still([model], freeze=False, device=x.device), torch.no_grad():
            sure = overlaid_entropy(model, x, overlays.to(x)) < threshold.to(x.device)
        return torch.where(sure.to(answers.device), ABSTAIN, answers)

    return predict
