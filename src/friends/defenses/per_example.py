"""Gradients of single examples, and what they cost in privacy: the part of DP-SGD that needs Opacus.

Opacus (Yousefpour et al., arXiv 2109.12298) is not installed with friends: ``pip install 'friends[dp]'``. Nothing of it
is loaded before a training asks for it, and it stays attached to a network only from the forward pass of a step to its
gradients, so whatever else differentiates the network between steps is not disturbed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

HANDLES = "autograd_grad_sample_hooks"
"""Where Opacus leaves the handles of its hooks, on the network."""


def require_opacus() -> None:
    """Raise ``ImportError``, with what to install, if Opacus is missing."""
    try:
        import opacus  # pyright: ignore[reportUnusedImport] # noqa: F401
    except ImportError as error:
        raise ImportError(
            "gradients of single examples need Opacus: pip install 'friends[dp]', or use DPSGD(scope=\"batch\")"
        ) from error


def without_batchnorm(model: nn.Module) -> nn.Module:
    """A copy whose trainable batch normalisation is group normalisation, which does not mix the images of a batch.

    Of ``gcd(32, channels)`` groups, with scale 1 and shift 0: what a pretrained network has learned there is lost.

    Raises:
        ValueError: a frozen batch normalisation would still take the statistics of the batch.
    """
    from opacus.validators import ModuleValidator

    model.train()
    fixed = ModuleValidator.fix(model)
    fixed.train()
    for name, module in fixed.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:  # pyright: ignore[reportPrivateUsage]
            raise ValueError(
                f"the batch normalisation {name!r} is frozen but takes statistics of the batch, so no gradient belongs "
                'to a single image: hold it in eval mode (transfer(..., bn="running"))'
            )
    ModuleValidator.validate(fixed, strict=True)
    return fixed


def attach(model: nn.Module) -> None:
    """Have the next forward and backward pass of a mean loss leave ``(b, ...)`` gradients in ``.grad_sample``."""
    from opacus import GradSampleModule

    detach(model)
    GradSampleModule(model, loss_reduction="mean")  # its hooks are on the layers of the model, which stays unwrapped
    handles = cast("list[Any]", getattr(model, HANDLES))
    handles += [m.register_forward_pre_hook(_in_order) for m in model.modules() if isinstance(m, nn.Conv2d)]


def _in_order(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Opacus reads the memory of a convolution's input as if it were contiguous: in channels_last, without an error,
    it would give wrong gradients."""
    return tuple(x.contiguous() for x in inputs)


def detach(model: nn.Module) -> None:
    """Take off what :func:`attach` put on."""
    for handle in cast("list[Any]", getattr(model, HANDLES, [])):
        handle.remove()
    if hasattr(model, HANDLES):
        delattr(model, HANDLES)
    for module in model.modules():
        for name in ("activations", "max_batch_len", "ft_compute_sample_grad"):
            if name in module.__dict__:
                delattr(module, name)
    for parameter in model.parameters():
        for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
            if hasattr(parameter, name):
                delattr(parameter, name)


def per_example_gradients(model: nn.Module) -> list[Float[Tensor, "b ..."]]:
    """After the backward pass: the gradient of each example's own loss, per trainable parameter.

    Raises:
        ValueError: a parameter got none, or one that is no gradient of one pass.
    """
    found: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sample = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, Tensor):
                raise ValueError(
                    f"parameter {name!r} has no per-example gradients of one pass: is it unused, or did another "
                    "defense send the batch through the network as well?"
                )
            found.append(sample)
    return found


def orders() -> list[float]:
    """The Rényi orders at which privacy is accounted for."""
    from opacus.accountants import RDPAccountant

    return [float(order) for order in RDPAccountant.DEFAULT_ALPHAS]


def renyi(*, noise_multiplier: float, rate: float, steps: int) -> Float[Tensor, " a"]:
    """Rényi divergence spent by so many steps, per order, if each took every image with probability ``rate``."""
    from opacus.accountants.analysis import rdp

    spent = rdp.compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=steps, orders=orders())
    return torch.tensor([float(value) for value in cast("Sequence[float]", spent)], dtype=torch.float64)


def epsilon(spent: Float[Tensor, " a"], delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy that a Rényi divergence per order amounts to."""
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest known: the bound holds, if not tightly
        value, _ = rdp.get_privacy_spent(orders=orders(), rdp=spent.tolist(), delta=delta)
    return float(value) if math.isfinite(value) else math.inf
