"""Small networks and byte images for the tests of noise."""

from __future__ import annotations

import torch
from torch import nn

from friends.data.images import LabeledImages


def small_net(channels: int = 3, classes: int = 5, seed: int = 0) -> nn.Module:
    """Any image size; batch norm with statistics that are not the initial ones; dropout that would show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(24, classes),
        )
        with torch.no_grad():
            net[-1].weight.mul_(8)  # logits that depend on the image
            net.train()(torch.rand(32, channels, 8, 8))
    return net


def byte_images(n: int, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0) -> LabeledImages:
    """Random images with many pixels at both ends, labelled by their own row."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, *shape, generator=g) * 1.4 - 0.2).clamp(0, 1).mul(255).to(torch.uint8)
    return LabeledImages(x, torch.arange(n), tuple(f"row {i}" for i in range(n)))
