"""How a model is trained, as a value: the recipes of the paper, their learning rates, and their optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import nn

from friends.data.augment import Augment

Decay = Literal["all", "weights"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained: SGD with a step schedule. The defaults are the paper's from-scratch recipe.

    Args:
        epochs: passes over the data.
        lr: learning rate at the start.
        momentum: with Nesterov's form when ``nesterov`` is set.
        weight_decay: on all parameters, or without those of normalisation layers and biases (``decay="weights"``).
        batch: images per step; a last short batch is kept.
        drops: the learning rate is multiplied by ``factor`` at these fractions of the epochs: 3/8, 5/8 and 7/8 are
            30/50/70 of 80 and 15/25/35 of 40, as printed in the paper (its code: 29/49/70 and 14/24/35).
        augment: random flip and shift of every batch, or None.
        precision: ``"auto"`` is bfloat16 autocast on a GPU that has it, float32 elsewhere.
        compile: whether to use ``torch.compile``; None means on a GPU only.
    """

    epochs: int = 80
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay: Decay = "all"
    batch: int = 128
    drops: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8)
    factor: float = 0.1
    augment: Augment | None = field(default_factory=Augment)
    precision: Precision = "auto"
    compile: bool | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or not 0 < self.lr < float("inf"):
            raise ValueError(f"epochs >= 0, batch >= 1 and lr > 0 expected, not {self.epochs}, {self.batch}, {self.lr}")
        if not all(0 < drop <= 1 for drop in self.drops):
            raise ValueError(f"drops are fractions of the epochs in (0, 1], not {self.drops}")
        for name, value, known in (("decay", self.decay, Decay), ("precision", self.precision, Precision)):
            if value not in get_args(known):
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(get_args(known))}")

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr * self.factor ** sum(epoch >= round(drop * self.epochs) for drop in self.drops)

    def first(self, epochs: int | None) -> Recipe:
        """The first so many epochs of this recipe, at the learning rates that they have in it; all of them if None."""
        if epochs is None or epochs == self.epochs:
            return self
        drops = [drop * self.epochs / epochs for drop in self.drops] if epochs else []
        return replace(self, epochs=epochs, drops=tuple(drop for drop in drops if drop <= 1))


RECIPES: dict[str, Recipe] = {
    "scratch": Recipe(),
    "transfer": Recipe(epochs=40),
    "finetune": Recipe(epochs=40, lr=0.01),
}
"""The paper's recipes by scenario; fine-tuning, which the paper has no numbers for, uses a tenth of the step."""


def sgd(model: nn.Module, recipe: Recipe, lr: float | None = None) -> torch.optim.SGD:
    """The recipe's optimizer over the trainable parameters of a model, with fresh momentum."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        normalises = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))  # pyright: ignore[reportPrivateUsage]
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                exempt = recipe.decay == "weights" and (normalises or name == "bias")
                (free if exempt else decayed).append(parameter)
    if not decayed and not free:
        raise ValueError("the model has no trainable parameter")
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=lr or recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )
