"""The one class of all our networks: normalisation, then a body that makes features, then a linear head.

Because the normalisation is the first layer, everything outside speaks pixels in [0, 1]: noise, poisons and their
bounds never depend on the mean and standard deviation of a data set.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

BatchNorm = Literal["running", "batch"]
"""What the batch normalisation of a frozen body uses during training: running statistics, or those of the batch."""


class Body(NamedTuple):
    """What a builder makes: the layers between normalisation and head.

    Args:
        layers: maps normalised images ``(b, c, h, w)`` to features ``(b, d)``.
        features: d.
        any_size: whether images of any height and width will do, not only those it was built for.
    """

    layers: nn.Module
    features: int
    any_size: bool


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    Args:
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation in the same unit.

    Raises:
        ValueError: the two differ in length, are empty, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"a mean and a positive standard deviation per channel expected, not {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalised images. Nothing is clamped: noisy images may leave [0, 1]."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """The numbers, for ``print(model)``."""
        mean, std = ([round(v, 4) for v in t.flatten().tolist()] for t in (self.mean, self.std))
        return f"mean={mean}, std={std}"


class Classifier(nn.Module):
    """``head(body(normalize(x)))``: pixels in [0, 1] to logits.

    Args:
        body: the feature extractor and the length of its features.
        shape: ``(c, h, w)`` of the images it is built for.
        classes: how many logits the head has.
        moments: per-channel mean and standard deviation of the training pixels in [0, 1].

    Attributes:
        hold_body: the body stays in eval mode even in training: its batch normalisation keeps its running
            statistics and its dropout is off. Set by :func:`transfer`.
    """

    def __init__(
        self,
        body: Body,
        *,
        shape: tuple[int, int, int],
        classes: int,
        moments: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__()
        if len(moments[0]) != shape[0]:
            raise ValueError(f"moments of {len(moments[0])} channels do not fit images of shape {shape}")
        self.normalize = Normalize(*moments)
        self.body = body.layers
        self.head = nn.Linear(body.features, classes)
        self.shape = shape
        self.any_size = body.any_size
        self.hold_body = False

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The penultimate features of pixels in [0, 1]: what the head sees.

        Raises:
            ValueError: the images have other channels, or another size where size matters, than it was built for.
        """
        c, h, w = self.shape
        if x.ndim != 4 or x.shape[1] != c:
            raise ValueError(f"this network takes images (b, {c}, h, w) with {c} channels, not {tuple(x.shape)}")
        if not self.any_size and x.shape[2:] != (h, w):
            raise ValueError(f"this network was built for {c} channels of {h}x{w} pixels, not {tuple(x.shape)}")
        return self.body(self.normalize(x))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of pixels in [0, 1]."""
        return self.head(self.features(x))

    def train(self, mode: bool = True) -> Classifier:
        """As any module, except that a held body stays in eval mode."""
        super().train(mode)
        if self.hold_body:
            self.body.eval()
        return self


def transfer(
    model: Classifier, *, generator: torch.Generator, bn: BatchNorm = "running", classes: int | None = None
) -> Classifier:
    """A copy whose body is frozen and whose head is new: transfer learning of the last layer.

    Args:
        model: the pretrained network; it is left as it is.
        generator: where the new head is drawn from.
        bn: ``"running"``: the body stays in eval mode, its features are a fixed function of the pixels.
            ``"batch"``: frozen weights, but in training the batch normalisation uses the statistics of the batch and
            its running statistics drift, so the features are *not* fixed. The trainer of the FRIENDS paper does this.
        classes: how many the new head tells apart; as many as the old one by default.

    Raises:
        ValueError: unknown ``bn``.
    """
    if bn not in get_args(BatchNorm):
        raise ValueError(f"unknown bn {bn!r}; choose one of {', '.join(get_args(BatchNorm))}")
    new = _with_new_head(model, generator, classes)
    for parameter in new.body.parameters():
        parameter.requires_grad_(False)
    new.hold_body = bn == "running"
    return new.train(model.training)


def finetune(model: Classifier, *, generator: torch.Generator, classes: int | None = None) -> Classifier:
    """A copy with a new head of which every layer is trained. Arguments are those of :func:`transfer`."""
    new = _with_new_head(model, generator, classes)
    for parameter in new.parameters():
        parameter.requires_grad_(True)
    new.hold_body = False
    return new.train(model.training)


def _with_new_head(model: Classifier, generator: torch.Generator, classes: int | None) -> Classifier:
    new = copy.deepcopy(model)
    old = new.head
    with drawing_from(generator):
        head = nn.Linear(old.in_features, old.out_features if classes is None else classes)
    new.head = head.to(old.weight)
    return new


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Generator[None, None, None]:
    """Let layers that are built here, on the CPU, draw their initial weights from ``generator``.

    torch's layers know only the global generator; it is reseeded here and put back afterwards. One number is drawn
    from ``generator``.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # not torch.manual_seed, which would reseed the accelerators as well
        torch.default_generator.manual_seed(seed)
        yield
