"""STRIP written from its paper, slowly: one image, one overlay and one class after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def strip_entropy(model: nn.Module, image: Tensor, overlays: Tensor) -> float:
    """H(x), in bits, of one image."""
    total = 0.0
    for overlay in overlays:
        with torch.no_grad():
            logits = model((image + overlay)[None])[0].double()
        for p in (logits.exp() / logits.exp().sum()).tolist():
            total -= p * math.log2(p) if p > 0 else 0.0
    return total / len(overlays)
