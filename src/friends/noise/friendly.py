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

Both take twenty forward and backward passes and a learning rate. A third, ``FAST``, reaches the printed equation's
value in four passes without one; it is in :mod:`friends.noise.quick`, with another that only flips signs.

Departures, in both: the objective is a sum over images, and ``lr`` is scaled by 1/128, which is what a batch mean
over the paper's 128 images does. So a row's noise depends neither on the batch it shares nor on a short last batch
(where the released code takes larger steps). Parameter gradients, which the released code computes and discards, are
not computed; the gradients of the divergence with respect to the logits and of the size are written out, so that the
network (:mod:`friends.noise.lean`) is all that is left to differentiate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.modules import still
from friends.noise.divergence import Direction, pull
from friends.noise.lean import Logits, Precision, lean
from friends.noise.quick import Method, box, flips, polyak
from friends.noise.random import check_strength

Norm = Literal["l2", "l1", "linf", "msq"]
Bound = Literal["project", "clip"]

PAPER_BATCH = 128
MOMENTUM = 0.9
ROWS = 16
"""How many images are updated at a time on a processor: what is added to them stays in its cache meanwhile."""


@dataclass(frozen=True, kw_only=True)
class FriendlySettings:
    """How friendly noise is optimised. :data:`PAPER`, :data:`RELEASED` and :data:`FAST` are the three that matter.

    Args:
        zeta: bound on every value of the noise, in [0, 1] pixel units.
        method: ``"sgd"``, the paper's; ``"polyak"`` or ``"flips"``, ours, of which only zeta, steps, direction and
            precision are settings.
        norm: what is made large: ``"l2"`` (Eq. 3), ``"l1"`` or ``"linf"`` (Table 7), or ``"msq"``, the mean square.
        penalty: weight of the size term (lambda in the paper). Its scale depends on the norm: the gradient per value
            is about penalty/sqrt(chw) for l2, penalty for l1, penalty on one value for linf, 2*e*penalty/chw for msq.
        steps: SGD steps. The paper says 20, the released code's default is 30.
        lr: learning rate, as in the paper for batch means of 128: a row moves by lr/128 times its own gradient.
        init: half width of the uniform start.
        direction: which way round the KL divergence is.
        bound: ``"project"`` clips the noise after every step; ``"clip"`` clips only what the loss sees.
        precision: of the network: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the device multiplies it
            faster. What comes out is no less friendly, but not the same to the last grey level.
    """

    zeta: float = 16 / 255
    method: Method = "sgd"
    norm: Norm = "msq"
    penalty: float = 1.0
    steps: int = 20
    lr: float = 100.0
    init: float = 8 / 255
    direction: Direction = "clean||noisy"
    bound: Bound = "clip"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_strength("zeta", self.zeta)
        check_strength("init", self.init)
        for name, value, known in (
            ("method", self.method, get_args(Method)),
            ("norm", self.norm, get_args(Norm)),
            ("direction", self.direction, get_args(Direction)),
            ("bound", self.bound, get_args(Bound)),
            ("precision", self.precision, get_args(Precision)),
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

FAST = replace(PAPER, method="polyak", steps=4, precision="auto")
"""The value of Equation 3 in four passes; see :mod:`friends.noise.quick`."""

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
        initial = _start(x, chosen, generator or torch.Generator(device=x.device).manual_seed(0))
    elif initial.shape != x.shape:
        raise ValueError(f"initial noise is {tuple(initial.shape)}, the images are {tuple(x.shape)}")
    if len(x) == 0:
        return torch.zeros_like(x)
    with still([model], freeze=True, device=x.device):
        return optimised(lean(model, x, chosen.precision), x, initial.to(x), chosen)


def _start(x: Tensor, settings: FriendlySettings, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Uniform in the inner box, or a random corner of the outer one."""
    if settings.method == "sgd":
        return (2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1) * settings.init
    signs = torch.randint(2, x.shape, generator=generator, device=x.device, dtype=torch.int8)
    return (2 * signs - 1).to(x) * settings.zeta


def optimised(
    f: Logits, x: Float[Tensor, "b c h w"], initial: Float[Tensor, "b c h w"], settings: FriendlySettings
) -> Float[Tensor, "b c h w"]:
    """:func:`friendly_noise` for a network that is held still and made lean already, as it is for many batches.

    Args:
        f: from :func:`friends.noise.lean.lean`.
        x: pixels in [0, 1].
        initial: where each row starts.
        settings: how.

    Raises:
        ValueError: the model's output or its gradients are not finite.
    """
    if settings.zeta == 0:
        return torch.zeros_like(x)
    # one memory order for everything that is added: that of the images inside the network
    x, e = (t.contiguous(memory_format=torch.channels_last) for t in (x, initial))
    with torch.no_grad():
        clean = torch.log_softmax(f(x), 1)
    if not bool(torch.isfinite(clean).all()):
        raise ValueError("the model's output on the clean images is not finite")
    if settings.method == "sgd":
        e = _sgd(f, x, e, clean, settings)
    else:
        quick = polyak if settings.method == "polyak" else flips
        e = quick(f, x, e, clean, zeta=settings.zeta, steps=settings.steps, direction=settings.direction)
    if not bool(torch.isfinite(e).all()):
        raise ValueError("friendly noise became NaN: the model's gradients are not finite, or lr is far too large")
    return e.contiguous()


class _Rows(NamedTuple):
    """What is known of some images in the midst of it; all are written to in place but ``x`` and the box."""

    x: Tensor
    e: Tensor
    velocity: Tensor
    image: Tensor  # what the loss sees
    low: Tensor
    high: Tensor

    def split(self, size: int) -> list[_Rows]:
        return [_Rows(*part) for part in zip(*(t.split(size) for t in self), strict=True)]


def _sgd(f: Logits, x: Tensor, e: Tensor, clean: Tensor, settings: FriendlySettings) -> Float[Tensor, "b c h w"]:
    """The SGD of Algorithm 1, every row on its own objective."""
    low, high = box(x, settings.zeta)
    e = e.clone() if settings.bound == "clip" else torch.clamp(e, low, high)
    rows = _Rows(x, e, torch.zeros_like(e), torch.empty_like(e), low, high)
    size = ROWS if e.device.type == "cpu" else len(e)
    parts = rows.split(size)
    for part in parts:
        _show(part, settings)
    for _ in range(settings.steps):
        _, gradient = pull(f, rows.image, clean, settings.direction)
        for part, g in zip(parts, gradient.split(size), strict=True):
            _step(part, g, settings)
    return torch.clamp(e, low, high)


def _show(rows: _Rows, settings: FriendlySettings) -> None:
    """Write what the loss sees: image and noise."""
    x, e, image = rows.x, rows.e, rows.image
    if settings.bound == "clip":
        torch.add(x, e.clamp(-settings.zeta, settings.zeta), out=image).clamp_(0, 1)
    else:
        torch.add(x, e, out=image)


def _step(rows: _Rows, gradient: Float[Tensor, "r c h w"], settings: FriendlySettings) -> None:
    """From the gradient of the divergence to the next image; ``gradient`` is written over.

    Where the loss sees noise clipped, what is outside has no gradient. So inside alone need be right, and there the
    clipped noise is the noise itself.
    """
    e, velocity = rows.e, rows.velocity
    zeta, rate, clip = settings.zeta, settings.lr / PAPER_BATCH, settings.bound == "clip"
    if clip:
        _cut(gradient, rows.x + e, 0, 1)
    if settings.norm == "msq":
        gradient.add_(e, alpha=-settings.penalty * 2 / e[0].numel())
    else:
        gradient.sub_(_growth(e.clamp(-zeta, zeta) if clip else e, settings.norm), alpha=settings.penalty)
    if clip:
        _cut(gradient, e, -zeta, zeta)
    # torch's SGD: the first step takes the gradient itself as momentum, and Nesterov looks one step ahead
    torch.add(gradient, velocity, alpha=MOMENTUM, out=velocity)
    e.add_(gradient, alpha=-rate).add_(velocity, alpha=-rate * MOMENTUM)
    if not clip:
        torch.clamp(e, rows.low, rows.high, out=e)
    _show(rows, settings)


def _cut(gradient: Tensor, values: Tensor, low: float, high: float) -> None:
    """Set a gradient to 0 where values are outside [low, high], as a clamp of them does; in place, in one pass."""
    outward = torch.tensor([-torch.inf, torch.inf], dtype=values.dtype)
    beyond = torch.nextafter(torch.tensor([low, high], dtype=values.dtype), outward).tolist()
    below = min(beyond[0], -torch.finfo(values.dtype).tiny)  # the float below 0 may count as 0
    torch.ops.aten.hardtanh_backward.grad_input(gradient, values, below, beyond[1], grad_input=gradient)


def _growth(e: Float[Tensor, "b c h w"], norm: Norm) -> Float[Tensor, "b c h w"]:
    """The gradient of the size of each row's noise. The l2 norm has none at 0; there it is taken as 0."""
    if norm == "l1":
        return e.sign()
    if norm == "linf":
        largest = e.abs() == e.abs().amax((1, 2, 3), keepdim=True)
        return e.sign() * largest / largest.sum((1, 2, 3), keepdim=True)  # shared by equals, as torch does
    length = e.square().sum((1, 2, 3), keepdim=True).sqrt()
    return e / length.clamp(min=torch.finfo(e.dtype).tiny)


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
