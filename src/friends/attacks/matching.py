"""Matching of gradients, for all attacks that do it: what the poisons teach a network should be what a goal needs.

With theta the weights of a surrogate, g the gradient that the attacker would like to see, and y_w the class of the
poisons p_i::

    1 - cos(g, grad_theta mean_i CE(f(p_i), y_w))

one cosine over all parameters at once, biases and normalisations too. Source: Gradient Matching (Geiping et al., ICLR
2021) and, for the g of a whole class of triggered images, Sleeper Agent (Souri et al., NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from friends.attacks.crafting import Objective
from friends.attacks.halfway import Halfway
from friends.data.images import LabeledImages
from friends.modules import logits_of, still


def matching_loss(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """1 - the cosine of two lists of tensors, each taken as one long vector."""
    return 1 - _dot(a, b) / (_dot(a, a) * _dot(b, b)).sqrt()


def mean_gradient(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int64[Tensor, " n"], batch: int = 512
) -> list[Tensor]:
    """The gradient of the mean cross-entropy of all images, one tensor per trainable parameter.

    Args:
        model: in eval mode, where images do not influence each other; so ``batch`` changes nothing but memory.
        x: pixels in [0, 1], as the model is to see them; wherever they are.
        batch: images per forward pass.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    parameters = trainable(model)
    total = [torch.zeros_like(p) for p in parameters]
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        logits = logits_of(model, images.to(parameters[0]))
        loss = F.cross_entropy(logits, labels.to(parameters[0].device), reduction="sum") / len(x)
        part = torch.autograd.grad(loss, parameters, materialize_grads=True)
        total = [a + b for a, b in zip(total, part, strict=True)]
    return total


def objective_for(model: nn.Module, target: Sequence[Tensor], wanted: int) -> Objective:
    """:func:`matching_loss` between ``target`` and the gradient of the poisons it is called with, labelled ``wanted``.

    Args:
        model: in eval mode.
        target: what :func:`mean_gradient` gave for this model.

    Raises:
        ValueError: no parameter requires a gradient, or ``target`` is 0 or not finite.
    """
    parameters = trainable(model)
    size = float(_length(target))
    if not 0 < size < float("inf"):
        raise ValueError(
            f"the goal's gradient has length {size}: the surrogate already answers the wanted class with certainty, "
            "or its weights are not finite"
        )

    def objective(poisons: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        labels = torch.full((len(poisons),), wanted, device=poisons.device)
        loss = F.cross_entropy(logits_of(model, poisons), labels)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        return matching_loss(target, gradient)

    return objective


def gradient_lengths(model: nn.Module, x: Float[Tensor, "n c h w"], y: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The Euclidean length of every image's own gradient, over all trainable parameters at once.

    Computed for many images in one pass where the model lets :func:`torch.func.vmap` through, else one by one.

    Args:
        model: in eval mode.
        x: pixels in [0, 1], not augmented; wherever they are.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    parameters = trainable(model)
    at_once = max(1, min(256, VALUES // sum(p.numel() for p in parameters)))
    x, y = x.to(parameters[0]), y.to(parameters[0].device)
    try:
        return torch.cat([_lengths(model, *part) for part in zip(x.split(at_once), y.split(at_once), strict=True)])
    except torch.OutOfMemoryError:
        raise  # one by one would take an hour and say nothing
    except RuntimeError:  # control flow that depends on values, an operation that vmap does not know
        parts = zip(x.split(1), y.split(1), strict=True)
        return torch.stack([_length(mean_gradient(model, image, label)) for image, label in parts])


def longest_gradients(
    models: Sequence[nn.Module], train: LabeledImages, wanted: int, count: int, halfway: Halfway | None = None
) -> Int64[Tensor, " count"]:
    """Rows of the ``count`` images of a class whose own gradients are longest, ascending; the lower row wins a tie.

    Args:
        models: trained on ``train``; with several, the mean of the lengths counts.
        halfway: where the rows are kept: the perturbations of a crafting that goes on belong to them.
    """
    state = halfway.load() if halfway else None
    if state is not None:
        return state[0]["rows"]
    of_class = (train.y.cpu() == wanted).nonzero().flatten()
    here = of_class.to(train.device)
    with still(models, freeze=False):
        lengths = torch.stack([gradient_lengths(model, train.pixels(here), train.y[here]).cpu() for model in models])
    rows = of_class[lengths.mean(0).sort(descending=True, stable=True).indices[:count]].sort().values
    if halfway:
        halfway.offer(lambda: ({"rows": rows}, {}), force=True)
    return rows


VALUES = 2**28
"""How many gradient values :func:`gradient_lengths` holds at a time: a gigabyte."""


def _lengths(model: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, " b"]:
    """The lengths of the gradients of a few images in one pass."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def length(image: Tensor, label: Tensor) -> Tensor:
        def loss(at: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(model, at, (image[None],))
            return F.cross_entropy(getattr(out, "logits", out), label[None])

        return _length(list(torch.func.grad(loss)(values).values()))

    return torch.func.vmap(length)(x, y)


def _length(parts: Sequence[Tensor]) -> Float[Tensor, ""]:
    return _dot(parts, parts).sqrt()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient. Raises ``ValueError`` if there are none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the surrogate requires a gradient: there is nothing to match")
    return parameters


def _dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()
