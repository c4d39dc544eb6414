"""Poisons under an additive perturbation and a smooth change of their colours, and the Adams that move both.

Source: MetaPoison (Huang et al., NeurIPS 2020) and its authors' code::

    p_i = clip(x_i + recolour(t_i, x_i) + delta_i);   |delta_i| <= xi, and t_i in its own ball

Departure: the clip to [0, 1], which theirs have at the start only. Gradients pass it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from friends.attacks.halfway import State
from friends.attacks.pixels import PixelAdam, initial_delta
from friends.attacks.recolour import Recolour


class Perturbed:
    """The poisons of one goal.

    Args:
        base: clean pixels in [0, 1].
        xi: l_inf bound of the additive perturbation, in the same units.
        recolour: the change of colours; None for none.
        unit: standard deviation of each channel, for Adam on the signs of gradients in normalised units and a normal
            start; None for plain Adam in pixel units and a uniform start.
        generator: the start is drawn from it, on the CPU.
    """

    def __init__(
        self,
        base: Float[Tensor, "p c h w"],
        *,
        xi: float,
        recolour: Recolour | None,
        unit: Float[Tensor, "1 c 1 1"] | None,
        generator: torch.Generator,
    ) -> None:
        self.base, self.xi, self.recolour = base, xi, recolour
        signed = unit is not None
        if signed:
            self.delta = initial_delta(base, xi, "randn", generator)
        else:
            self.delta = (2 * torch.rand(base.shape, generator=generator) - 1).to(base) * xi
        one = unit if unit is not None else base.new_ones(1, base.shape[1], 1, 1)
        self.table = None if recolour is None else recolour.start(base)
        self.adam = PixelAdam(one, signed=signed)
        self.table_adam = PixelAdam(one.mean().view(1, 1, 1, 1), signed=signed)

    def pixels(self) -> Float[Tensor, "p c h w"]:
        """The poisons in [0, 1]."""
        seen = self.base + self.delta
        if self.recolour is not None and self.table is not None:
            seen = seen + self.recolour.change(self.table, self.base)
        return seen.clamp(0, 1)

    def move(self, gradient: Float[Tensor, "p c h w"], weight: float, rate: float) -> None:
        """Make one step of Adam with both.

        Args:
            gradient: of the objective, with respect to the pixels.
            weight: how often the roughness of the colours counts in it.
            rate: step size, in the units of Adam.
        """
        self.delta = self.adam.step(self.delta, gradient, rate).clamp(-self.xi, self.xi)
        if self.recolour is not None and self.table is not None:
            table = self.table.detach().requires_grad_()
            rough = weight * self.recolour.smoothness * self.recolour.roughness(table)
            change = self.recolour.change(table, self.base)
            slope = torch.autograd.grad([change, rough], table, [gradient, None])[0]
            self.table = self.recolour.project(self.table_adam.step(table.detach(), slope, rate))

    def state(self) -> State:
        """Everything that :meth:`restore` needs."""
        tensors, steps = self.adam.state()
        tensors = {"delta": self.delta, **tensors}
        if self.table is not None:
            of_table, _ = self.table_adam.state()
            tensors |= {"table": self.table, **{f"table_{name}": tensor for name, tensor in of_table.items()}}
        return tensors, {"adam_steps": steps}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, object]) -> None:
        """Go on where :meth:`state` was taken."""
        steps = cast(int, numbers["adam_steps"])
        self.delta = tensors["delta"]
        self.adam.restore(tensors, steps)
        if self.table is not None:
            self.table = tensors["table"]
            self.table_adam.restore({name: tensors[f"table_{name}"] for name in ("adam_mean", "adam_square")}, steps)
