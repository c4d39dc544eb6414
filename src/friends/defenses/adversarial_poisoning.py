"""Adversarial Poisoning: every batch is poisoned against itself while the network trains, so that it grows immune.

Jonas Geiping, Liam Fowl, Gowthami Somepalli, Micah Goldblum, Michael Moeller, Tom Goldstein: *What Doesn't Kill You
Makes You Robust(er): How to Adversarially Train against Data Poisoning*, 2021, arXiv 2102.13624; the rows AP-0.25,
AP-0.5 and AP-0.75 of the FRIENDS paper. A batch is cut into poisons ``(x_P, y_P)``, a share ``fraction`` of it, and
targets ``x_T``. With theta the network's weights and y_fake the most frequent label in y_P::

    g_T        = grad_theta mean CE(f(x_T), y_fake)          # what an attacker would like them to be
    g_P(delta) = grad_theta mean CE(f(x_P + delta), y_P)     # what the poisons teach
    delta      ~ argmax cos(g_P(delta), g_T)  with  |delta| <= eps  and  0 <= x_P + delta <= 1
    then a usual training step on (x_P + delta, y_P) and (x_T, y_T) together

Gradient Matching is the attack that it copies: ``steps`` steps of Adam on the sign of the gradient, in eval mode, from
N(0, 1) * eps clipped to the ball.

Departures from the authors' code, of which only the last two change what comes out:

- g_T does not depend on delta and the network does not change meanwhile: it is computed once per batch, not per step.
- They perturb normalised images. We perturb pixels, and a step of ``tau`` normalised units is ``tau * std`` of the
  channel: 0.1 is about 6/255 on CIFAR-10. One unit is the standard deviation of the training data, which is also what
  our networks divide by, except for one that was pretrained on other data.
- Pixels that random noise had taken out of [0, 1] are not dragged back into it, which could take more than eps; and
  the start is projected like every later perturbation.
- Where g_P vanishes the cosine is taken as 0 instead of dividing by 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses.ball import check_share, check_steps, project, share
from friends.modules import logits_of, still
from friends.noise.random import check_strength
from friends.training.defense import About, Defense, Run

SHORT = 1e-12
"""Gradients shorter than this count as zero."""


def poison_batch(
    model: nn.Module,
    x: Float[Tensor, "b c h w"],
    y: Int64[Tensor, " b"],
    *,
    fraction: float,
    eps: float,
    steps: int,
    tau: float,
    std: Float[Tensor, "1 c 1 1"],
    generator: torch.Generator,
) -> Float[Tensor, "b c h w"]:
    """A batch whose first ``fraction`` (rounded down) is poisoned against the rest; the order stays.

    Args:
        model: left as it is, running statistics of batch normalisation and ``.grad`` included; only its trainable
            parameters count.
        x: pixels in [0, 1] units; noise may have taken them out of it.
        y: true labels.
        std: per-channel standard deviation of the pixels: one normalised unit, in which ``tau`` is measured.
        generator: where the start is drawn from, on the device of ``x``.

    Returns:
        A new tensor; ``x`` itself where there would be no poison or no target.
    """
    count = share(len(x), fraction)
    if eps == 0 or count in (0, len(x)):
        return x
    with still([model], freeze=False, device=x.device):
        wanted = unit(gradient_of(model, x[count:], most_frequent(y[:count]).expand(len(x) - count)))
        poisons, labels = x[:count], y[:count]
        delta = align(model, poisons, labels, wanted, eps=eps, steps=steps, tau=tau, std=std, generator=generator)
    return torch.cat([poisons + delta, x[count:]])


def align(
    model: nn.Module,
    x: Float[Tensor, "p c h w"],
    y: Int64[Tensor, " p"],
    wanted: Sequence[Tensor],
    *,
    eps: float,
    steps: int,
    tau: float,
    std: Float[Tensor, "1 c 1 1"],
    generator: torch.Generator,
) -> Float[Tensor, "p c h w"]:
    """The perturbation in pixels whose gradient points where ``wanted`` does, as far as ``steps`` steps get.

    Args:
        model: in eval mode.
        wanted: a direction in the space of the trainable parameters, of length 1.
    """
    delta = project(torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) * eps, x, eps)
    mean = square = torch.zeros_like(delta)
    for step in range(1, steps + 1):
        leaf = delta.requires_grad_()
        cosine = dot(unit(gradient_of(model, x + leaf, y, create_graph=True)), wanted)
        sign = torch.autograd.grad(cosine, leaf)[0].sign()  # of pixels and of normalised pixels: std is positive
        mean = 0.9 * mean + 0.1 * sign
        square = 0.999 * square + 0.001 * sign * sign
        adam = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        delta = project(delta.detach() + tau * std * adam, x, eps)
    return delta


def most_frequent(y: Int64[Tensor, " p"]) -> Int64[Tensor, ""]:
    """The label that most images have; the lowest of those that tie."""
    return torch.bincount(y).argmax()


def gradient_of(
    model: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradient of the mean cross-entropy, one tensor per trainable parameter; ``.grad`` is not touched."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = F.cross_entropy(logits_of(model, x), y)
    return torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)


def unit(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors, taken as one long vector, scaled to length 1; to nearly nothing if they are shorter than ``SHORT``."""
    length = dot(parts, parts).clamp_min(SHORT**2).sqrt()
    return [part / length for part in parts]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The inner product of two lists of tensors, each taken as one long vector."""
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()


@dataclass(frozen=True, kw_only=True)
class AdversarialPoisoning(Defense):
    """Adversarial Poisoning: part of every batch is poisoned against the rest of it.

    Args:
        fraction: the share of a batch that is poisoned, rounded down, in [0, 1); the paper's rows are 0.25, 0.5 and
            0.75, its authors' default is 0.5. 0 switches the defense off.
        eps: bound of the perturbation in [0, 1] pixel units; the authors set it to the attack's bound. 0 switches the
            defense off.
        steps: gradient steps per batch; each costs about three passes over the poisons.
        tau: size of a step in normalised units, that is in standard deviations of a channel.

    Raises:
        ValueError: a fraction outside [0, 1), a bound outside [0, 1], no step, or a step size that is not positive.
    """

    fraction: float = 0.5
    eps: float = 16 / 255
    steps: int = 5
    tau: float = 0.1

    about: ClassVar[About] = About(
        title="Adversarial Poisoning",
        paper="Geiping, Fowl, Somepalli, Goldblum, Moeller, Goldstein: What Doesn't Kill You Makes You Robust(er), "
        "2021, arXiv 2102.13624",
        told=("eps",),
        traits=frozenset({"crafts"}),
        clashes={
            "private": "poisons are crafted with the gradients of a whole batch, so clipping an image's own gradient "
            "no longer bounds what the image does"
        },
        not_after={
            "mixes": "its poisons and their fake label need one hard label per image; list it before the mixing",
            "repeats": "copies of one image would be poisons and targets at once; list it before the repeating",
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction is in [0, 1), not {self.fraction}: poisons need targets in the same batch")
        check_strength("eps", self.eps)
        check_steps(self.steps, tau=self.tau)

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Refuse a share that is no image of any batch, which would look like a defense and be none."""
        if self.eps > 0 and self.fraction > 0:
            check_share(min(run.recipe.batch, len(data)), self.fraction)

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Poison the first part of the batch; labels and order stay."""
        if self.eps == 0 or self.fraction == 0:
            return x, y
        poisoned = poison_batch(
            run.model,
            x,
            y,
            fraction=self.fraction,
            eps=self.eps,
            steps=self.steps,
            tau=self.tau,
            std=x.new_tensor(run.data.moments[1]).view(1, -1, 1, 1),
            generator=run.generator(self, "start", run.epoch, run.step),
        )
        return poisoned, y
