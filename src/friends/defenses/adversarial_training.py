"""Adversarial Training: the network learns the images that it would get wrong, not those that it is given.

Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu: *Towards Deep Learning Models
Resistant to Adversarial Attacks*, ICLR 2018, arXiv 1706.06083. In every batch, with theta the weights::

    min_theta mean_i max_{|delta_i| <= eps} CE(f(x_i + delta_i), y_i)

    PGD:  delta ~ U[-eps, eps];  steps times  delta <- project(delta + step_size * sign(grad_delta CE))

It was made against attacks at test time. Against poisons the FRIENDS paper counts it among the rivals (Table 1), but
does not say with what bound or on how many images of a batch; its clean accuracy of 92 % is out of reach of these
defaults, which are Madry's for CIFAR-10 (8/255, 7 steps of 2/255, all images).

Departures, the same as or next to what later implementations do:

- The network is in eval mode while it is attacked: with batch statistics, an image's perturbation would depend on the
  other images, and every step of the attack would move the running statistics.
- ``fraction``: only the first part of a shuffled batch may be attacked, the rest enters as it is. The released
  framework of the FRIENDS paper's rivals can do that, and it trades robustness for clean accuracy and time.
- Pixels that random noise had taken out of [0, 1] are not dragged back into it, which could take more than eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses.ball import check_share, check_steps, project, share
from friends.modules import logits_of, still
from friends.noise.random import check_strength
from friends.training.defense import About, Defense, Run


def pgd(
    model: nn.Module,
    x: Float[Tensor, "b c h w"],
    y: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
) -> Float[Tensor, "b c h w"]:
    """Projected gradient ascent of the cross-entropy: a perturbation in pixels for each image by itself.

    Args:
        model: attacked in eval mode and float32; left as it is, running statistics of batch normalisation and
            ``.grad`` included.
        x: pixels in [0, 1] units; noise may have taken them out of it.
        y: labels ``(b,)``, or soft ones ``(b, k)``.
        eps: bound in the units of ``x``.
        generator: where the start is drawn from, on the device of ``x``.
    """
    uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    delta = project((2 * uniform - 1) * eps, x, eps)
    with still([model], freeze=True, device=x.device):
        for _ in range(steps):
            leaf = delta.requires_grad_()
            # summed, so that a gradient does not shrink with the number of other images
            loss = F.cross_entropy(logits_of(model, x + leaf), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            delta = project(delta.detach() + step_size * gradient.sign(), x, eps)
    return delta


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Defense):
    """Adversarial Training with projected gradient descent.

    Args:
        eps: bound of the perturbation in [0, 1] pixel units; 0 switches the defense off.
        steps: gradient steps per batch; each costs one pass over the attacked images.
        step_size: how far a step moves every pixel.
        fraction: the share of a batch that is attacked, rounded down, in [0, 1]; 0 switches the defense off.

    Raises:
        ValueError: a bound or fraction outside [0, 1], no step, or a step size that is not positive.
    """

    eps: float = 8 / 255
    steps: int = 7
    step_size: float = 2 / 255
    fraction: float = 1.0

    about: ClassVar[About] = About(
        title="Adversarial Training",
        paper="Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to Adversarial "
        "Attacks, ICLR 2018, arXiv 1706.06083",
        traits=frozenset({"crafts"}),
    )

    def __post_init__(self) -> None:
        check_strength("eps", self.eps)
        check_steps(self.steps, step_size=self.step_size)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is in [0, 1], not {self.fraction}")

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Refuse a share that is no image of any batch, which would look like a defense and be none."""
        if self.eps > 0 and self.fraction > 0:
            check_share(min(run.recipe.batch, len(data)), self.fraction)

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Attack the first part of the batch; labels and order stay."""
        count = share(len(x), self.fraction)
        if self.eps == 0 or count == 0:
            return x, y
        delta = pgd(
            run.model,
            x[:count],
            y[:count],
            eps=self.eps,
            steps=self.steps,
            step_size=self.step_size,
            generator=run.generator(self, "start", run.epoch, run.step),
        )
        return torch.cat([x[:count] + delta, x[count:]]), y
