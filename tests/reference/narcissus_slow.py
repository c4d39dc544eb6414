"""Narcissus written from its paper, slowly: torch's own Adam, one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def make_trigger(
    models: Sequence[nn.Module],
    images: Tensor,
    wanted: int,
    batches: list[list[int]],
    augmented: Callable[[Tensor, int], Tensor],
    *,
    xi: float,
    tau: float,
) -> Tensor:
    """The trigger after a step for each of the batches.

    Args:
        images: all images of the wanted class, pixels in [0, 1].
        batches: which of them each step sees.
        augmented: what becomes of the triggered images of a batch, given its number.
    """
    trigger = torch.zeros_like(images[0]).requires_grad_()
    optimizer = torch.optim.Adam([trigger], lr=tau)
    for step, batch in enumerate(batches):
        shown = augmented(torch.stack([(images[i] + trigger).clamp(0, 1) for i in batch]), step)
        losses = [F.cross_entropy(model(one[None]), torch.tensor([wanted])) for model in models for one in shown]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        with torch.no_grad():
            trigger.clamp_(-xi, xi)
    return trigger.detach()
