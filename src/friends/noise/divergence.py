"""How much noise changes what a model says about each image: the KL divergence, and its gradient to the pixels."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from friends.noise.lean import Logits

Direction = Literal["noisy||clean", "clean||noisy"]


def divergence(
    noisy: Float[Tensor, "b k"], clean: Float[Tensor, "b k"], direction: Direction
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b k"]]:
    """The KL divergence of each row in nats, and its gradient with respect to the noisy images' logits.

    Args:
        noisy: log-probabilities of the noisy images.
        clean: those of the images as they are.
        direction: ``"noisy||clean"`` is KL(f(x+e) || f(x)), as Equation 3 has it.
    """
    p = noisy.exp()
    if direction == "clean||noisy":
        q = clean.exp()
        return (q * (clean - noisy)).sum(1), p - q
    kl = (p * (noisy - clean)).sum(1)
    return kl, p * (noisy - clean - kl[:, None])


def pull(
    f: Logits, images: Float[Tensor, "b c h w"], clean: Float[Tensor, "b k"], direction: Direction
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b c h w"]]:
    """The divergence of each noisy image, and its gradient with respect to that image: one pass there and back.

    Args:
        f: the network.
        images: with their noise.
        clean: log-probabilities of the images without.
        direction: as :func:`divergence` takes it.

    Returns:
        The gradient is the caller's to write over, and channels-last.
    """
    images = images.detach().requires_grad_()
    logits = f(images)
    kl, slope = divergence(torch.log_softmax(logits.detach(), 1), clean, direction)
    (gradient,) = torch.autograd.grad(logits, images, slope)
    return kl, gradient.contiguous(memory_format=torch.channels_last)
