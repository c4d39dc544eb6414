"""A few steps of SGD as a differentiable function of the pixels of some training images.

Source: MetaPoison (Huang et al., NeurIPS 2020) and its authors' code. With X_k the k-th minibatch, the poisons p in all
of them, theta_0 the present weights, and x_t the goal::

    theta_{k+1} = theta_k - lr grad_theta CE(f(X_k; theta_k))
    margin_k    = max_{c != wanted} f(x_t; theta_k)_c - f(x_t; theta_k)_wanted,  at least -100
    meta(p)     = mean of margin_k over k = 1..K

Where no image of a minibatch influences the logits of another, only the poisons' own part of the first step depends on
their pixels, and the rest of it is differentiated once: the same numbers in two thirds of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from friends.modules import logits_of

FLOOR = -100.0
"""A margin that is better than this is good enough."""

Through = Literal["first", "all"]
"""In which of the unrolled steps the poisons' pixels are differentiated; they are in the minibatches of all."""

Weights = dict[str, Tensor]

Minibatch = tuple[Tensor, Tensor]
"""Pixels ``(b, c, h, w)`` and labels ``(b,)``."""


class Functional:
    """A model as a function of its trainable weights. It is kept in eval mode but for its batch normalisation.

    Args:
        model: changes its modes, and in :meth:`learning` the running statistics of its batch normalisation.
        batch_statistics: whether :meth:`at` normalises by the statistics of the batch, not by the running ones.

    Attributes:
        mixes: whether the images of a batch influence each other in :meth:`at`.

    Raises:
        ValueError: the model has no trainable weight.
    """

    def __init__(self, model: nn.Module, *, batch_statistics: bool) -> None:
        self.model = model.eval()
        self._net = _Logits(model)
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
        self.mixes = batch_statistics and bool(self._norms)
        if not self.weights:
            raise ValueError("no parameter of the surrogate requires a gradient: there is nothing to train")

    @property
    def weights(self) -> Weights:
        """The present weights, which are leaves: where an unrolling starts, and what learning changes."""
        return {name: p for name, p in self._net.named_parameters() if p.requires_grad}

    def learning(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """The logits with the present weights, as in training: batch statistics, and the running ones move."""
        self._normalise_by(batch=True)
        return self._net(x)

    def at(self, weights: Weights, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """The logits with other weights; the model's own, and its running statistics, stay as they are."""
        self._normalise_by(batch=self.mixes)
        spared = {name: buffer.clone() for name, buffer in self._net.named_buffers()} if self.mixes else {}
        return functional_call(self._net, {**weights, **spared}, (x,))

    def _normalise_by(self, *, batch: bool) -> None:
        for norm in self._norms:
            norm.training = batch


class _Logits(nn.Module):
    """``logits_of`` as a module, which is what can be called with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return logits_of(self.model, x)


def margin(logits: Float[Tensor, "m k"], wanted: Int64[Tensor, " m"], floor: float = FLOOR) -> Float[Tensor, ""]:
    """By how much another class is ahead of the wanted one, the mean over images; below 0 where none is."""
    own = logits.gather(1, wanted[:, None])
    others = logits.scatter(1, wanted[:, None], -torch.inf).amax(1, keepdim=True)
    return (others - own).clamp(min=floor).mean()


def unrolled_margin(
    net: Functional,
    poisons: Float[Tensor, "p c h w"],
    label: int,
    beside: Sequence[Minibatch],
    goal: Minibatch,
    *,
    lr: float,
    through: Through = "first",
) -> Float[Tensor, ""]:
    """The mean of the goal's margins after each of K steps of SGD from the present weights, differentiable.

    Args:
        label: class of the poisons.
        beside: what is in the minibatches beside the poisons, K + 1 times. The last is not learnt; where the statistics
            of a batch count, the goal is asked about in it.
        goal: pixels of the goal's images, and the classes that they are wanted as.
        lr: learning rate of the steps.
    """
    labels = torch.full((len(poisons),), label, device=poisons.device)
    steps = [
        ((poisons if k == 0 or through == "all" else poisons.detach(), labels), clean) for k, clean in enumerate(beside)
    ]
    return torch.stack((_mixing if net.mixes else _separate)(net, steps, goal, lr)).mean()


def _mixing(net: Functional, steps: Sequence[tuple[Minibatch, Minibatch]], goal: Minibatch, lr: float) -> list[Tensor]:
    """The margins where the goal is in the minibatches, though not learnt, as in the authors' code."""
    weights, margins = net.weights, list[Tensor]()
    for k, (poisoned, clean) in enumerate(steps):
        x, y = _joined(poisoned, clean)
        logits, asked = net.at(weights, torch.cat([x, goal[0]])).split([len(y), len(goal[1])])
        if k > 0:
            margins.append(margin(asked, goal[1]))
        if k < len(steps) - 1:
            weights = descended(weights, F.cross_entropy(logits, y), lr)
    return margins


def _separate(
    net: Functional, steps: Sequence[tuple[Minibatch, Minibatch]], goal: Minibatch, lr: float
) -> list[Tensor]:
    """The margins where the images of a minibatch do not influence each other."""
    weights, margins = net.weights, list[Tensor]()
    for k, (poisoned, clean) in enumerate(steps[:-1]):
        if k == 0:
            weights = _first_step(net, weights, poisoned, clean, lr)
        else:
            x, y = _joined(poisoned, clean)
            weights = descended(weights, F.cross_entropy(net.at(weights, x), y), lr)
        margins.append(margin(net.at(weights, goal[0]), goal[1]))
    return margins


def _first_step(net: Functional, weights: Weights, poisoned: Minibatch, clean: Minibatch, lr: float) -> Weights:
    """:func:`descended` by the mean loss of all images, of which the clean ones need no graph."""
    share = len(poisoned[1]) / (len(poisoned[1]) + len(clean[1]))
    after = descended(weights, share * F.cross_entropy(net.at(weights, poisoned[0]), poisoned[1]), lr)
    if len(clean[1]) == 0:
        return after
    loss = (1 - share) * F.cross_entropy(net.at(weights, clean[0]), clean[1])
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {name: w - lr * g for (name, w), g in zip(after.items(), gradients, strict=True)}


def descended(weights: Weights, loss: Float[Tensor, ""], lr: float) -> Weights:
    """The weights after one step of SGD, differentiable."""
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
    return {name: w - lr * g for (name, w), g in zip(weights.items(), gradients, strict=True)}


def _joined(a: Minibatch, b: Minibatch) -> Minibatch:
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])
