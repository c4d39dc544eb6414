"""Friendly noise: the largest perturbation of each image that does not change what the model says about it.

Tian Yu Liu, Yu Yang, Baharan Mirzasoleiman: *Friendly Noise against Adversarial Noise: A Powerful Defense against
Data Poisoning Attacks*, NeurIPS 2022, arXiv 2208.10224. Equation 3, for one image x::

    minimise over |e|_inf <= zeta    KL(f(x + e) || f(x)) - penalty * |e|_2

by a few steps of SGD (momentum 0.9, Nesterov, constant learning rate) from e ~ U(-init, init).

The printed equation and the code that its authors released are different regimes. Both are here:

====================  ==========================================  ==========================================
                      ``PAPER``                                   ``RELEASED``
====================  ==========================================  ==========================================
direction             KL(f(x+e) || f(x))                          KL(f(x) || f(x+e))
size term             penalty * |e|_2 of each image               penalty * mean(e^2) over all its values
bound                 e is projected after every step             e is free; the loss sees it clipped, with no
                                                                  gradient where it is clipped; clipped at the end
result                nearly every value ends at +-zeta           some values at +-zeta, the rest small
====================  ==========================================  ==========================================

Departures, in both: the objective is a sum over images, and ``lr`` is scaled by 1/128, which is what a batch mean
over the paper's 128 images does. So a row's noise depends neither on the batch it shares nor on a short last batch
(where the released code takes larger steps). Parameter gradients, which the released code computes and discards, are
not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.modules import logits_of, still
from friends.noise.random import check_strength

Norm = Literal["l2", "l1", "linf", "msq"]
Direction = Literal["noisy||clean", "clean||noisy"]
Bound = Literal["project", "clip"]

PAPER_BATCH = 128
MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class FriendlySettings:
    """How friendly noise is optimised. :data:`PAPER` and :data:`RELEASED` are the two that matter.

    Args:
        zeta: bound on every value of the noise, in [0, 1] pixel units.
        norm: what is made large: ``"l2"`` (Eq. 3), ``"l1"`` or ``"linf"`` (Table 7), or ``"msq"``, the mean square.
        penalty: weight of the size term (lambda in the paper). Its scale depends on the norm: the gradient per value
            is about penalty/sqrt(chw) for l2, penalty for l1, penalty on one value for linf, 2*e*penalty/chw for msq.
        steps: SGD steps. The paper says 20, the released code's default is 30.
        lr: learning rate, as in the paper for batch means of 128: a row moves by lr/128 times its own gradient.
        init: half width of the uniform start.
        direction: which way round the KL divergence is.
        bound: ``"project"`` clips the noise after every step; ``"clip"`` clips only what the loss sees.
    """

    zeta: float = 16 / 255
    norm: Norm = "msq"
    penalty: float = 1.0
    steps: int = 20
    lr: float = 100.0
    init: float = 8 / 255
    direction: Direction = "clean||noisy"
    bound: Bound = "clip"

    def __post_init__(self) -> None:
        check_strength("zeta", self.zeta)
        check_strength("init", self.init)
        for name, value, known in (
            ("norm", self.norm, get_args(Norm)),
            ("direction", self.direction, get_args(Direction)),
            ("bound", self.bound, get_args(Bound)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
        if self.steps < 0 or self.lr <= 0 or self.penalty < 0:
            raise ValueError(
                f"steps >= 0, lr > 0 and penalty >= 0 expected, not {self.steps}, {self.lr}, {self.penalty}"
            )


RELEASED = FriendlySettings()
"""What the released code does, with the paper's 20 steps. The default."""

PAPER = FriendlySettings(norm="l2", penalty=1.0, lr=10.0, direction="noisy||clean", bound="project")
"""The printed Equation 3, at the smallest step and weight of the paper's search grid."""

_BY_NORM: dict[Norm, FriendlySettings] = {
    "msq": RELEASED,
    "l2": PAPER,
    "l1": replace(PAPER, norm="l1", penalty=1 / 55),  # the per-value gradient of l2 on 32x32x3
    "linf": replace(PAPER, norm="linf"),
}


def friendly_noise(
    model: nn.Module,
    x: Float[Tensor, "b c h w"],
    settings: FriendlySettings | None = None,
    *,
    zeta: float | None = None,
    norm: Norm | None = None,
    penalty: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    init: float | None = None,
    direction: Direction | None = None,
    generator: torch.Generator | None = None,
    initial: Float[Tensor, "b c h w"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """The friendly noise of a batch of images (Algorithm 1 of the paper).

    Args:
        model: any module that takes pixels in [0, 1] and returns logits ``(b, k)``, or an object with ``.logits``.
            It is put in eval mode and back, its parameters get no gradient, and nothing about it changes, even
            if an error is raised. If it expects normalised input, put the normalisation in front of it.
        x: ``(b, c, h, w)`` float pixels in [0, 1], not augmented. Any size, any number of channels, b may be 0.
        settings: :data:`RELEASED` (the default), :data:`PAPER`, or your own. If only ``norm`` is given, the
            defaults are those in which that norm works: ``PAPER`` for l2, l1 (penalty 1/55) and linf.
        zeta, norm, penalty, steps, lr, init, direction: override single settings; see :class:`FriendlySettings`.
        generator: where the start is drawn from; on the device of ``x``. By default one seeded with 0.
        initial: the start itself, instead of a draw.

    Returns:
        Noise like ``x``, float32 (float64 if ``x`` is), with ``|noise| <= zeta`` and ``0 <= x + noise <= 1``. The
        noise of a row does not depend on the other rows of the batch (up to rounding). It is computed in full
        precision also under autocast, and the global random state is as before.

    Raises:
        ValueError: ``x`` is not in [0, 1] or not finite, a setting is out of range, or the model's output is not
            logits ``(b, k)`` or not finite.
        TypeError: ``x`` is not floating point, or the model's parameters are of lower precision than float32.
    """
    given = {"zeta": zeta, "norm": norm, "penalty": penalty, "steps": steps, "lr": lr, "init": init,
             "direction": direction}  # fmt: skip
    base = settings or (_BY_NORM.get(norm, RELEASED) if norm is not None else RELEASED)
    chosen = replace(base, **{name: value for name, value in given.items() if value is not None})
    _check_images(x)
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if initial is None:
        generator = generator or torch.Generator(device=x.device).manual_seed(0)
        initial = (2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1) * chosen.init
    elif initial.shape != x.shape:
        raise ValueError(f"initial noise is {tuple(initial.shape)}, the images are {tuple(x.shape)}")
    if len(x) == 0 or chosen.zeta == 0:
        return torch.zeros_like(x)
    with still([model], freeze=True, device=x.device):
        return _optimise(lambda z: logits_of(model, z), x, initial.to(x), chosen)


def _optimise(
    f: Callable[[Tensor], Tensor], x: Tensor, initial: Tensor, settings: FriendlySettings
) -> Float[Tensor, "b c h w"]:
    """The SGD of Algorithm 1, every row on its own objective."""
    zeta, rate = settings.zeta, settings.lr / PAPER_BATCH
    low, high = (-x).clamp_(min=-zeta), (1 - x).clamp_(max=zeta)  # |e| <= zeta and x + e in [0, 1]
    with torch.no_grad():
        clean = torch.log_softmax(f(x), 1)
    if not bool(torch.isfinite(clean).all()):
        raise ValueError("the model's output on the clean images is not finite")
    e, velocity = initial.clone(), torch.zeros_like(x)
    if settings.bound == "project":
        e = torch.minimum(torch.maximum(e, low), high)
    for step in range(settings.steps):
        e.requires_grad_()
        seen = e if settings.bound == "project" else e.clamp(-zeta, zeta)  # clamps pass no gradient where active
        noisy = torch.log_softmax(f((x + seen).clamp(0, 1)), 1)
        objective = _divergence(noisy, clean, settings.direction) - settings.penalty * _size(seen, settings.norm)
        (gradient,) = torch.autograd.grad(objective.sum(), e)
        # torch's SGD: the first step takes the gradient itself as momentum, and Nesterov looks one step ahead
        velocity = gradient if step == 0 else MOMENTUM * velocity + gradient
        e = e.detach() - rate * (gradient + MOMENTUM * velocity)
        if settings.bound == "project":
            e = torch.minimum(torch.maximum(e, low), high)
    result = torch.minimum(torch.maximum(e.detach(), low), high)
    if not bool(torch.isfinite(result).all()):
        raise ValueError("friendly noise became NaN: the model's gradients are not finite, or lr is far too large")
    return result


def _divergence(noisy: Tensor, clean: Tensor, direction: Direction) -> Float[Tensor, " b"]:
    """KL divergence of each row, from log-probabilities."""
    if direction == "noisy||clean":
        return (noisy.exp() * (noisy - clean)).sum(1)
    return (clean.exp() * (clean - noisy)).sum(1)


def _size(e: Tensor, norm: Norm) -> Float[Tensor, " b"]:
    """The size of each row's noise. The l2 norm has no gradient at 0; there it is taken as 0."""
    flat = e.flatten(1)
    if norm == "msq":
        return flat.square().mean(1)
    if norm == "l1":
        return flat.abs().sum(1)
    if norm == "linf":
        return flat.abs().amax(1)
    return torch.linalg.vector_norm(flat, dim=1)


def _check_images(x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"images (b, c, h, w) expected, not {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"pixels are floats in [0, 1], not {x.dtype}: divide bytes by 255")
    if x.numel() == 0:
        return
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ValueError(
            f"pixels must be in [0, 1], these are in [{low:g}, {high:g}]: divide bytes by 255; if the images are "
            "normalised already, pass them before normalisation, with the normalisation as the model's first layer"
        )
