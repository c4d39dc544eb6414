"""DP-SGD: bound every gradient, and bury it in Gaussian noise.

Sanghyun Hong, Varun Chandrasekaran, Yiğitcan Kaya, Tudor Dumitraş, Nicolas Papernot: *On the Effectiveness of
Mitigating Data Poisoning Attacks with Gradient Shaping*, 2020, arXiv 2002.11497; the algorithm is that of Martín Abadi
et al.: *Deep Learning with Differential Privacy*, CCS 2016, arXiv 1607.00133. With g_i the gradient of image i,
``clip(g, C) = g * min(1, C / |g|)`` with the norm over all parameters, B the batch size and b <= B the images at hand::

    scope="example"    g = 1/B * sum over i of clip(g_i, C)  +  N(0, (sigma * C)^2) per coordinate
    scope="batch"      g = clip(1/b * sum over i of g_i, C)  +  N(0, (sigma * C)^2) per coordinate

Only the first is differentially private. The second bounds the mean of a batch, leaves batch normalisation as it is and
promises nothing about a single image. With C = 1 and sigma = 0.01 it is in the code of Witches' Brew and Sleeper Agent,
most likely where the figures under this name in the FRIENDS paper's tables come from.

In both, ``sigma`` is the noise on the *mean* gradient, in units of C. What DP libraries call the noise multiplier is
that on the sum: ``sigma * B``, 1.28 for the defaults and B = 128.

Departures of ``scope="example"`` from Abadi et al.: batches are not drawn afresh with a probability per image, but
come from a shuffle of all images once an epoch, B at a time. The reported epsilon is that of Opacus's Rényi accountant,
which assumes the former; for shuffled batches it is customary and *not proven*. It leaves out what other defenses
learned from all of the data, such as the rows that a filter dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from friends.data.images import LabeledImages
from friends.defenses import per_example
from friends.training.defense import About, Defense, Run
from friends.training.recipe import sgd

Scope = Literal["batch", "example"]


def clip_norm(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
    """Gradients scaled down, all by one factor, to a common norm of at most ``clip``; as they are if it is less."""
    norm = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]).norm()
    factor = (clip / norm).clamp(max=1)
    return [g * factor.to(g.dtype) for g in gradients]


def sum_of_clipped(gradients: Sequence[Float[Tensor, "b ..."]], clip: float) -> list[Tensor]:
    """Per parameter, the sum over examples of their gradients, each example's scaled down to a norm of ``clip``.

    Args:
        gradients: one tensor per parameter; row i of all of them is the gradient of example i.
        clip: bound of an example's norm over all parameters.
    """
    norms = torch.stack([g.flatten(1).float().norm(dim=1) for g in gradients], 1).norm(dim=1)
    factor = (clip / norms).clamp(max=1)
    return [torch.tensordot(factor.to(g.dtype), g, dims=1) for g in gradients]


def add_gaussian(gradients: Sequence[Tensor], std: float, generator: torch.Generator) -> list[Tensor]:
    """Gradients plus independent Gaussian noise of standard deviation ``std`` on every coordinate."""
    return [
        g + std * torch.randn(g.shape, generator=generator, device=generator.device, dtype=g.dtype) for g in gradients
    ]


@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Clipped and noised gradients.

    Args:
        clip: bound C of a gradient's norm over all parameters. ``inf`` clips nothing and needs ``sigma=0``; the two
            together switch the defense off.
        sigma: standard deviation of the noise on a coordinate of the mean gradient, in units of ``clip``.
        scope: ``"batch"`` treats the mean gradient of a batch, ``"example"`` that of each image, which needs Opacus
            (``pip install 'friends[dp]'``), memory for one gradient per image of a batch, and a network without batch
            normalisation: it is replaced by group normalisation. It trains in float32, not compiled.
        delta: with ``scope="example"``, the delta at which epsilon is reported, epoch by epoch, in the history.

    Raises:
        ValueError: a setting out of its range; at the start of training, a network in which images of a batch still
            mix.
        ImportError: at the start of training, ``scope="example"`` without Opacus.
    """

    clip: float = 1.0
    sigma: float = 0.01
    scope: Scope = "batch"
    delta: float = 1e-5

    about: ClassVar[About] = About(
        title="DP-SGD",
        paper="Hong, Chandrasekaran, Kaya, Dumitras, Papernot: On the Effectiveness of Mitigating Data Poisoning "
        "Attacks with Gradient Shaping, arXiv 2002.11497",
    )

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"unknown scope {self.scope!r}; choose one of {', '.join(get_args(Scope))}")
        if not self.clip > 0 or not 0 <= self.sigma < math.inf:
            raise ValueError(f"clip > 0 and a finite sigma >= 0 expected, not {self.clip} and {self.sigma}")
        if self.sigma > 0 and math.isinf(self.clip):
            raise ValueError(f"sigma = {self.sigma:g} is in units of clip, which is inf: choose a clip, or sigma=0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is a probability in (0, 1), not {self.delta}")
        if self.scope == "example":  # what does not compose depends on the scope
            object.__setattr__(self, "about", PRIVATE)

    @property
    def off(self) -> bool:
        """Whether nothing is clipped and no noise is added."""
        return math.isinf(self.clip) and self.sigma == 0

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """With ``scope="example"``, take a network in which no image sees another."""
        if self.scope == "example" and not self.off:
            per_example.require_opacus()
            run.model = per_example.without_batchnorm(run.model)
            self._settle(run)

    def resume(self, run: Run) -> None:
        """The same network again; its weights come from the checkpoint."""
        self.before_training(run.data, run)

    def _settle(self, run: Run) -> None:
        run.optimizer = sgd(run.model, run.recipe)
        run.recipe = replace(run.recipe, compile=False, precision="float32")

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """With ``scope="example"``, ask for the gradient of each image."""
        if self.scope == "example" and not self.off:
            per_example.attach(run.model)
            x = x.detach().requires_grad_()  # torch warns of hooks on a first layer whose input needs no gradient
        return x, y

    def gradients(self, run: Run) -> None:
        """Clip, and add noise."""
        if self.off:
            return
        parameters = [p for p in run.model.parameters() if p.grad is not None]
        if self.scope == "example":
            shaped = self._private(run)
        else:
            shaped = clip_norm([p.grad for p in parameters if p.grad is not None], self.clip)
        if self.sigma > 0:
            generator = run.generator(self, "noise", run.epoch, run.step)
            shaped = add_gaussian(shaped, self.sigma * self.clip, generator)
        for parameter, gradient in zip(parameters, shaped, strict=True):
            parameter.grad = gradient

    def _private(self, run: Run) -> list[Tensor]:
        """The clipped gradients of all images of a batch over the batch size, which a short batch has as well."""
        if run.step == 0:
            self._account(run)
        try:
            sums = sum_of_clipped(per_example.per_example_gradients(run.model), self.clip)
        finally:
            per_example.detach(run.model)
        return [total / run.recipe.batch for total in sums]

    def _account(self, run: Run) -> None:
        """Add what this epoch spends, with the rows that it trains on, and report epsilon; without noise it is inf."""
        if self.sigma == 0:
            return
        rows, batch = int(run.keep.sum()), run.recipe.batch
        kept = run.memory(self)
        spent = per_example.renyi(
            noise_multiplier=self.sigma * batch, rate=min(1.0, batch / rows), steps=math.ceil(rows / batch)
        )
        kept["renyi"] = spent + kept["renyi"].cpu() if "renyi" in kept else spent
        run.remarks["epsilon"] = per_example.epsilon(kept["renyi"], self.delta)
        kept["epsilon"] = torch.tensor(run.remarks["epsilon"], dtype=torch.float64)


PRIVATE = replace(
    DPSGD.about,
    title="DP-SGD per example",
    traits=frozenset({"private"}),
    clashes={
        "mixes": "a mixed image carries several, so bounding its gradient bounds what none of them can do",
        "repeats": "an image that is repeated in a batch has several bounded gradients there, not one",
        "crafts": "its perturbations depend on other images of the batch, or on passes that are not clipped",
        "phases": "another loss or optimizer in mid-training is not what the privacy is accounted for",
        "private": "each image's gradient is bounded once",
    },
)
"""What is to be known of ``scope="example"``."""
