"""An attacker who knows of FRIENDS, and crafts poisons that are to survive it.

Tian Yu Liu, Yu Yang, Baharan Mirzasoleiman: *Friendly Noise against Adversarial Noise*, NeurIPS 2022, section 4.2.2 and
Table 5. What a victim will do to a poison is done to it while it is crafted::

    x_hat = clip(x + delta + f) + b        then augmented, and seen by the surrogate

with b the random noise, drawn anew for every image and step, and f the friendly noise of each base image, made once by
an earlier run. ``zeta=0`` leaves out f: the table's first row. The paper gives no code for either.

Beyond the paper, and labelled as ours: several draws of the noise and of the augmentation a step, of which the gradient
is the mean (``draws``); a clip that lets gradients through (``straight_through``); and every attack that uses the outer
loop can be made adaptive, not Sleeper Agent alone. With few steps several draws are needed: on digits, noise of
128/255 and four poisons, the matching loss under fresh noise was .425 without adaptation, .461 with one draw and .387
with eight after 60 steps; .442, .366 and .359 after 250.

Departures and choices: the surrogate is trained with the random noise too, as it is part of the victim's recipe that a
gray-box attacker knows (``surrogates``). The earlier run is one on the clean data, of another seed than any victim's;
its friendly noise is made at ``def_epoch``, as the defense makes it. The goal's own gradient or feature is taken
without noise: a victim is asked about the goal as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from friends.attacks.surrogate import Surrogate
from friends.data.images import LabeledImages
from friends.noise.friendly import RELEASED, FriendlySettings, friendly_noise
from friends.noise.random import RandomNoise, check_random, check_strength, random_noise
from friends.types import Streams

EARLIER_RUN = 9000
"""The index of the surrogate that makes the friendly noise: one that no attack uses for anything else."""

BATCH = 128
"""Images whose friendly noise is made at once; none depends on the others."""


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """What the attacker does to his poisons because he expects FRIENDS.

    Args:
        random: distribution of the random noise that the victim is expected to use.
        mu: its strength in [0, 1] pixel units.
        zeta: bound of the friendly noise of an earlier run, in [0, 1] pixel units; 0 for none.
        draws: how often noise and augmentation are drawn in every step; the gradients are averaged.
        straight_through: let gradients pass the clip to [0, 1] after the friendly noise; else they stop there.
        surrogates: whether surrogates are trained with the random noise.
        def_epoch: epochs after which the earlier run made its friendly noise.
        settings: how the friendly noise was made; ``zeta`` is that above.

    Raises:
        ValueError: a setting is out of range.
    """

    random: RandomNoise = "bernoulli"
    mu: float = 16 / 255
    zeta: float = 0.0
    draws: int = 1
    straight_through: bool = False
    surrogates: bool = True
    def_epoch: int = 5
    settings: FriendlySettings = field(default_factory=lambda: RELEASED)

    def __post_init__(self) -> None:
        check_random(self.random, self.mu)
        check_strength("zeta", self.zeta)
        if self.draws < 1 or self.def_epoch < 0:
            raise ValueError(f"draws >= 1 and def_epoch >= 0 expected, not {self.draws} and {self.def_epoch}")

    def informed(self, surrogate: Surrogate) -> Surrogate:
        """The same surrogates, but trained with the random noise that the victim is expected to use."""
        if not self.surrogates or self.mu == 0:
            return surrogate

        def noisy(
            data: LabeledImages,
            *,
            index: int = 0,
            epochs: int | None = None,
            start: nn.Module | None = None,
            noise: tuple[RandomNoise, float] | None = None,
        ) -> nn.Module:
            wanted = (self.random, self.mu) if noise is None else noise
            return surrogate(data, index=index, epochs=epochs, start=start, noise=wanted)

        return noisy

    def friendly(
        self, train: LabeledImages, rows: Int64[Tensor, " p"], *, surrogate: Surrogate, streams: Streams
    ) -> Float[Tensor, "p c h w"] | None:
        """The friendly noise of some images by a run of the attacker's own; None where ``zeta`` is 0."""
        if self.zeta == 0:
            return None
        noise = (self.random, self.mu) if self.mu else None
        model = surrogate(train, index=EARLIER_RUN, epochs=self.def_epoch, noise=noise)
        generator = streams("friendly", device=train.device)
        noises = [
            friendly_noise(model, train.pixels(part), self.settings, zeta=self.zeta, generator=generator)
            for part in rows.to(train.device).split(BATCH)
        ]
        return torch.cat(noises)

    def passes(self, poisons: int) -> tuple[int, int]:
        """Images that enter the earlier run's model to make friendly noise: only looked at, and differentiated.

        The handful with which that model is looked at beforehand (:mod:`friends.noise.lean`) is not counted.
        """
        return (poisons, poisons * self.settings.steps) if self.zeta else (0, 0)

    def disturbed(
        self,
        x: Float[Tensor, "p c h w"],
        fixed: Float[Tensor, "p c h w"] | None,
        generator: torch.Generator,
    ) -> Float[Tensor, "p c h w"]:
        """The poisons as the victim's augmentation will see them, differentiable.

        Args:
            x: pixels of the poisons.
            fixed: their friendly noise, or None. Without it nothing is clipped, and the sum with random noise never is.
            generator: where the random noise is drawn from; at ``mu`` 0 nothing is drawn.
        """
        if fixed is not None:
            moved = x + fixed.to(x)
            clipped = moved.clamp(0, 1)
            x = moved + (clipped - moved).detach() if self.straight_through else clipped
        return x + random_noise(x, self.random, self.mu, generator) if self.mu else x
