"""What the released code of the FRIENDS paper does, step by step, written anew from a description of it.

It is what the library is compared with, so it is as plain and as wasteful as the description says, and shares nothing
with the library but networks and images. Per step of the noise: every image is normalised by itself, with mean and
standard deviation copied to the device and a look at whether the latter is zero, for which the host waits; weight
gradients are computed and never used; the loss is read out. Per image of the training: a PIL image becomes a tensor,
gets its noises, is normalised, flipped and shifted, one after the other.

Left out: a schedule of learning rates that is built and never stepped (with fewer than four steps, building it would
divide the learning rate by ten, and a comparison over few steps would compare something else), and printing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from friends.data.images import LabeledImages
from friends.models import Classifier

BATCH = 128
SHIFT = 8 / 31
"""Of the grid from -1 to 1 that a 32-pixel image is sampled on: 4 pixels."""


class Moments(NamedTuple):
    """Per-channel mean and standard deviation."""

    mean: list[float]
    std: list[float]


class Network(nn.Module):
    """A copy of one of our classifiers without its first layer: it takes normalised images, as the released ones do."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.body, self.head = copy.deepcopy(model.body), copy.deepcopy(model.head)
        self.moments = Moments(model.normalize.mean.flatten().tolist(), model.normalize.std.flatten().tolist())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def normalised(image: Tensor, moments: Moments) -> Tensor:
    """One image, normalised."""
    image = image.clone()
    mean = torch.as_tensor(moments.mean, dtype=image.dtype, device=image.device)
    std = torch.as_tensor(moments.std, dtype=image.dtype, device=image.device)
    if (std == 0).any():  # the host waits for the device here
        raise ValueError("a standard deviation is zero")
    return image.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def all_normalised(images: Tensor, moments: Moments) -> Tensor:
    """A batch, normalised image by image."""
    return torch.stack([normalised(image, moments) for image in images])


def friendly_noise(
    network: Network,
    images: Tensor,
    *,
    steps: int = 20,
    lr: float = 100.0,
    mu: float = 1.0,
    zeta: float = 16 / 255,
    initial: Tensor | None = None,
) -> Tensor:
    """The friendly noise of one batch of pixels in [0, 1].

    Both terms of the loss are means over the batch: the KL divergence over its images, the size over all its values.
    A step of the optimiser therefore moves an image by lr/b times its own gradient, b being the size of the batch.
    """
    network.eval()
    clean = F.log_softmax(network(all_normalised(images, network.moments)), dim=1).detach()
    start = (torch.rand_like(images) * 2 - 1) * 8 / 255 if initial is None else initial.clone()
    noise = nn.Parameter(start)
    optimiser = torch.optim.SGD([noise], lr=lr, momentum=0.9, nesterov=True)
    divergence = nn.KLDivLoss(reduction="batchmean", log_target=True)
    for _ in range(steps):
        bounded = torch.clamp(noise, -zeta, zeta)
        seen = torch.clamp(images + bounded, 0, 1)
        output = F.log_softmax(network(all_normalised(seen, network.moments)), dim=1)
        loss = divergence(output, clean) - mu * torch.mean(bounded**2)
        optimiser.zero_grad()
        loss.backward()  # into the weights as well
        optimiser.step()
        loss.item()
    network.zero_grad()
    return torch.clamp(noise.detach(), -zeta, zeta)


def friendly_noise_of_all(network: Network, images: Tensor, **settings: float) -> Tensor:
    """The friendly noise of many images, a batch of :data:`BATCH` after the other, kept in full precision."""
    return torch.cat([friendly_noise(network, batch, **settings) for batch in images.split(BATCH)])  # type: ignore[arg-type]


def pil_images(data: LabeledImages) -> list[Image.Image]:
    """The images as the released data set holds them."""
    return [Image.fromarray(x.permute(1, 2, 0).squeeze(2).numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy())
            for x in data.x]  # fmt: skip


class Images(Dataset[tuple[Tensor, int, int]]):
    """The training images, one at a time: to a tensor, friendly noise, random noise, normalised, augmented.

    Args:
        images: PIL images.
        labels: their class ids.
        moments: to normalise with.
        friendly: the friendly noise of every image, if there is any yet.
        mu: strength of the Bernoulli noise; none at 0.
        augmented: whether images are flipped and shifted.
    """

    def __init__(
        self,
        images: Sequence[Image.Image],
        labels: Sequence[int],
        moments: Moments,
        *,
        friendly: Tensor | None = None,
        mu: float = 16 / 255,
        augmented: bool = True,
    ) -> None:
        self.images, self.labels, self.moments = images, labels, moments
        self.friendly, self.mu, self.augmented = friendly, mu, augmented

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        x = to_tensor(self.images[index])
        if self.friendly is not None:
            x = torch.clamp(x + self.friendly[index], 0, 1)
        if self.mu:
            x = x + bernoulli(x, self.mu)
        x = normalised(x, self.moments)
        return (shifted(x) if self.augmented else x), self.labels[index], index


def to_tensor(image: Image.Image) -> Tensor:
    """``(c, h, w)`` float pixels in [0, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True))
    pixels = pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255)


def bernoulli(x: Tensor, mu: float) -> Tensor:
    """-mu or +mu for every value."""
    return (2 * torch.bernoulli(torch.full_like(x, 0.5)) - 1) * mu


def shifted(x: Tensor) -> Tensor:
    """One image, flipped with probability 1/2 and shifted by up to 4 pixels, by bilinear sampling with zeros around."""
    _, h, w = x.shape
    across, down = torch.linspace(-1, 1, w), torch.linspace(-1, 1, h)
    grid = torch.stack([across.expand(h, w), down.view(h, 1).expand(h, w)], dim=-1)
    grid = grid + (torch.rand(2) * 2 - 1) * SHIFT
    if torch.rand(1).item() < 0.5:
        grid = grid * torch.tensor([-1.0, 1.0])
    return F.grid_sample(x[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def loader(images: Images, *, shuffle: bool = True) -> DataLoader[tuple[Tensor, int, int]]:
    """Batches of :data:`BATCH`, made in this process: on one core, workers only take turns."""
    return DataLoader(images, batch_size=BATCH, shuffle=shuffle, num_workers=0)


def optimiser_for(network: Network, lr: float = 0.1) -> torch.optim.SGD:
    """SGD with Nesterov momentum; no weight decay on what is called a bias or a batch normalisation."""
    free = [p for name, p in network.named_parameters() if "bias" in name or "bn" in name]
    ids = {id(p) for p in free}
    held = [p for p in network.parameters() if id(p) not in ids]
    groups = [{"params": held, "weight_decay": 5e-4}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def training_steps(
    network: Network, batches: DataLoader[tuple[Tensor, int, int]], optimiser: torch.optim.Optimizer
) -> Iterator[float]:
    """One epoch of training; yields the loss after every step."""
    network.train()
    for x, y, _ in batches:
        loss = F.cross_entropy(network(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()
