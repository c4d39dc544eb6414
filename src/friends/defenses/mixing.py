"""Augmentations of whole batches that mix images, cut into them or repeat them, as functions of tensors.

With x_i the pixels of a batch, y_i its labels as probability vectors, pi_j random permutations and M a mask::

    mixup    x'_i = sum_j w_j x_pi_j(i),             y'_i = sum_j w_j y_pi_j(i),      w ~ Dirichlet(alpha, ..., alpha)
    cutmix   x'_i = (1 - M) x_i + M x_pi(i),         y'_i = (1 - |M|) y_i + |M| y_pi(i),   |M| the share of pixels in M
    cutout   x'_i = (1 - M_i) x_i + M_i colour,      y'_i = y_i

All of them are linear in the labels, so cross-entropy with soft labels is the same weighted sum of cross-entropies
that the papers write. Every draw is made on the device of its generator, which must be that of the batch; nothing is
changed in place. Papers and departures are named in :mod:`friends.defenses.strong_augmentation`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def soft_labels(y: Tensor, classes: int) -> Float[Tensor, "b k"]:
    """Class ids ``(b,)`` as one-hot rows ``(b, classes)``; labels that are soft already are returned as they are.

    Raises:
        ValueError: soft labels of another number of classes.
    """
    if y.ndim == 1:
        return F.one_hot(y, classes).float()
    if y.shape[1] != classes:
        raise ValueError(f"soft labels of {classes} classes expected, not {tuple(y.shape)}")
    return y


def dirichlet(alpha: float, k: int, generator: torch.Generator) -> Float[Tensor, " k"]:
    """One draw from the symmetric Dirichlet distribution, float64: ``k`` weights that sum to 1.

    Gamma(alpha) is Gamma(alpha + 1) times U^(1 / alpha), and only ratios count, so all is done with logarithms: with
    a small alpha every single Gamma draw would be rounded to 0.
    """
    one = torch.ones(k, dtype=torch.float64, device=generator.device)
    gamma = torch._standard_gamma((alpha + 1) * one, generator=generator)  # pyright: ignore[reportPrivateUsage]
    uniform = 1 - torch.rand(k, generator=generator, dtype=torch.float64, device=generator.device)  # never 0
    return (gamma.log() + uniform.log() / alpha).softmax(0)


def mixup_batch(
    x: Float[Tensor, "b c h w"], y: Float[Tensor, "b k"], generator: torch.Generator, *, ways: int, alpha: float
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """Each image becomes a weighted mean of ``ways`` images of the batch, and its label that of their labels.

    One weight vector for the whole batch. All the permutations are random, so an image may be mixed with itself, and
    row i of the result has in general nothing of row i.

    Args:
        x: pixels.
        y: soft labels.
        ways: how many images are mixed, at least 1.
        alpha: of the Dirichlet distribution: small ones make one image dominate, large ones all equal.
    """
    weights = dirichlet(alpha, ways, generator)
    images, labels = torch.zeros_like(x), torch.zeros_like(y)
    for weight in weights:  # one after the other: ways copies of a batch of large images need not fit
        order = _permutation(len(x), generator)
        images = images + weight.to(x.dtype) * x[order]
        labels = labels + weight.to(y.dtype) * y[order]
    return images, labels


def boxes(shares: Float[Tensor, " n"], h: int, w: int, generator: torch.Generator) -> Bool[Tensor, "n 1 h w"]:
    """Boxes at random places, as masks.

    The centre is uniform over the pixels and what reaches over an edge is cut off, so a box may be smaller than asked.

    Args:
        shares: per box its sides as a share of the image's sides, in [0, 1], on the device of the generator.
    """
    place = torch.rand(2, len(shares), generator=generator, device=shares.device)
    inside: list[Tensor] = []
    for size, at in zip((h, w), place, strict=True):
        side = (shares * size + 1e-4).floor()  # 9/16 of 32 is 18 also where a float is a little less
        first = (at * size).floor() - (side / 2).floor()
        pixel = torch.arange(size, device=shares.device)[None]
        inside.append((pixel >= first[:, None]) & (pixel < (first + side)[:, None]))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def cutmix_batch(
    x: Float[Tensor, "b c h w"], y: Float[Tensor, "b k"], generator: torch.Generator, *, p: float, alpha: float
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """With probability ``p``, a box of every image is filled from another image, and the labels are mixed by area.

    One box and one permutation for the whole batch. The label's weight is the share of pixels that the box really has
    after rounding and clipping, not the share that was drawn.

    Args:
        x: pixels.
        y: soft labels.
        p: probability that the batch is cut at all.
        alpha: the share of pixels kept is drawn from Beta(alpha, alpha).
    """
    chance = torch.rand(1, generator=generator, device=generator.device)
    replaced = 1 - dirichlet(alpha, 2, generator)[:1].float()
    share = torch.where(chance < p, replaced.sqrt(), torch.zeros_like(replaced))  # a box without pixels: no cut
    mask = boxes(share, x.shape[2], x.shape[3], generator)
    order = _permutation(len(x), generator)
    area = mask.float().mean().to(y.dtype)
    return torch.where(mask, x[order], x), (1 - area) * y + area * y[order]


def cutout_batch(
    x: Float[Tensor, "b c h w"], generator: torch.Generator, *, size: float, fill: tuple[float, ...], each: bool
) -> Float[Tensor, "b c h w"]:
    """A box of every image is filled with one colour.

    Args:
        x: pixels.
        size: sides of the box as a share of the image's sides, in [0, 1].
        fill: per channel the colour, in [0, 1]; the mean colour of the data is zero after normalisation.
        each: whether every image has a box of its own, or the batch has one.

    Raises:
        ValueError: ``fill`` has not one value per channel.
    """
    if len(fill) != x.shape[1]:
        raise ValueError(f"{len(fill)} fill values for {x.shape[1]} channels")
    shares = torch.full((len(x) if each else 1,), size, device=x.device)
    mask = boxes(shares, x.shape[2], x.shape[3], generator)
    return torch.where(mask, torch.tensor(fill, device=x.device, dtype=x.dtype).view(1, -1, 1, 1), x)


def laplacian(x: Float[Tensor, "b c h w"], scale: float, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Noise of the shape of ``x``, independent per pixel and channel, Laplacian of the given scale in pixel units.

    The difference of two exponential draws: its mean is 0, its mean magnitude the scale, its deviation sqrt(2) scales.
    """
    first, second = (torch.empty_like(x).exponential_(generator=generator) for _ in range(2))
    return scale * (first - second)


def repeated(x: Tensor, copies: int) -> Tensor:
    """A batch ``(b, ...)`` one copy after the other, ``(copies * b, ...)``: row i of copy j is row ``j * b + i``."""
    return x.repeat(copies, *[1] * (x.ndim - 1))


def per_sample_max(losses: Float[Tensor, " mb"], copies: int) -> Float[Tensor, " b"]:
    """The largest loss among the copies of each image, for a batch in the order of :func:`repeated`.

    Raises:
        ValueError: the losses are not ``copies`` times so many.
    """
    if len(losses) % copies:
        raise ValueError(f"{len(losses)} losses cannot be of {copies} copies of every image: something after the "
                         "copies were made has changed the size of the batch")  # fmt: skip
    return losses.view(copies, -1).amax(0)


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device)
