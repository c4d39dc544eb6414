"""What the model is shown for the pixels at the place of the noise: how the rest of the pipeline normalises them.

Friendly noise asks a model about pixels, but the model in training takes what the loader emits. Augmentation is left
out, normalisation is not: it is found by sending images of one grey level through the whole pipeline. Flips, crops,
padding and erasing leave most of such an image as it is, so the medians of what comes out tell scale and offset.

Where a transform changes the size of images behind the place (``RandomResizedCrop``), the model is shown the whole
image at the size that it is trained on: a crop of it would leave noise that nobody has asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from friends.loaders.finding import Found
from friends.loaders.images import Moments, as_floats, emitted_image, is_bytes, read
from friends.loaders.place import Blocker, Place
from friends.loaders.structure import Opened, randomness
from friends.modules import logits_of, still
from friends.noise.grey import device_of

LEVELS = (64 / 255, 128 / 255, 192 / 255)
"""Grey levels that bytes hold exactly, evenly spaced."""

SEEDS = 8

_SAY = ("Pass normalize=(means, standard deviations) of what your loop hands to the model; ((0,), (1,)) for pixels in "
        "[0, 1]")  # fmt: skip


@dataclass(frozen=True)
class View:
    """What the model is shown.

    Args:
        moments: by which its images are normalised.
        size: their height and width; None if it is that of the images at the place of the noise.
    """

    moments: Moments
    size: tuple[int, int] | None


class Prepared(nn.Module):
    """A model of what a loader emits as a model of pixels in [0, 1] at the place of the noise."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, view: View) -> None:
        super().__init__()
        self.model, self.size = model, view.size
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in view.moments)
        device = device_of(model, torch.device("cpu"))
        self.register_buffer("mean", mean.to(device))
        self.register_buffer("std", std.to(device))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Any:
        """The logits, or whatever the model returns."""
        if self.size is not None:
            x = nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True)
        return self.model((x - self.mean) / self.std)


def bare(model: nn.Module) -> nn.Module:
    """The model inside data parallelism: its forward would wait for other processes."""
    return model.module if isinstance(model, DataParallel | DistributedDataParallel) else model


def size_of(dataset: Any, found: Found) -> tuple[int, int] | None:
    """The height and width of finished images, if they are others than at the place of the noise."""
    assert found.place is not None

    def as_it_is(image: object, floats: bool) -> object:
        return as_floats(read(image)[0], image) if floats else image

    with randomness(0):
        image = emitted_image(found.place.read(dataset, found.rows[0], as_it_is), found.place.options.image)
    here = found.pixels[0].shape[1:]
    shape = image.shape[-2:] if isinstance(image, Tensor) else () if image is None else read(image)[0].shape[1:]
    return None if len(shape) != 2 or shape == here else (shape[0], shape[1])


def moments_of(dataset: Any, found: Found, opened: Opened) -> Moments | Blocker:
    """How the finished images are normalised, or why it cannot be told."""
    assert found.place is not None
    if found.place.options.normalize is not None:
        return found.place.options.normalize
    seen = [_medians(dataset, found.place, found.rows[0], level) for level in LEVELS]
    if any(isinstance(one, str) for one in seen):
        known = _named(found.place, opened)
        return known or Blocker(next(one for one in seen if isinstance(one, str)), _SAY)
    low, middle, high = (one for one in seen if not isinstance(one, str))
    scale = (high - low) / (LEVELS[2] - LEVELS[0])
    if scale.min() <= 0 or np.abs(low + high - 2 * middle).max() > 1e-3 * np.abs(high - low).max():
        return Blocker("what the transforms do to grey levels is no normalisation", _SAY)
    offset = low - scale * LEVELS[0]
    return tuple((-offset / scale).tolist()), tuple((1 / scale).tolist())


def _medians(dataset: Any, place: Place, row: int, level: float) -> NDArray[np.float64] | str:
    """What becomes of a grey level in each channel, or why there is no saying."""

    def flat(image: object, floats: bool) -> object:
        x, back = read(image, place.moments)
        grey = torch.full_like(x, level)
        return as_floats(grey, image) if floats else back(grey)

    found: list[NDArray[np.float64]] = []
    for seed in range(SEEDS):
        with randomness(seed):
            image = emitted_image(place.read(dataset, row, flat), place.options.image)
        if image is None or is_bytes(image):
            return "the loader emits bytes, so it cannot be seen how the model's input is made of them"
        values = np.asarray(image, dtype=np.float64)
        channels = read(torch.zeros(values.shape))[0].shape[0] if values.ndim == 2 else values.shape[0]
        found.append(np.median(values.reshape(channels, -1), axis=1))
    middle = np.median(found, axis=0)
    agree = sum(np.abs(one - middle).max() <= 1e-3 * max(1.0, float(np.abs(middle).max())) for one in found)
    return middle if agree == SEEDS else "transforms change the brightness or the colours at random"


def _named(place: Place, opened: Opened) -> Moments | None:
    """The numbers of the only step that is called Normalize, if there is one, and it has such numbers."""
    steps = [step for name in place.cuts if name in opened.stages for step in opened.stages[name].steps]
    named = [step for step in steps if type(step).__name__ == "Normalize"]
    if len(named) != 1 or not hasattr(named[0], "mean") or not hasattr(named[0], "std"):
        return None
    mean, std = (np.asarray(getattr(named[0], name), dtype=np.float64).reshape(-1) for name in ("mean", "std"))
    return tuple(mean.tolist()), tuple(std.tolist())


def refusal(model: nn.Module, pixels: list[Tensor], view: View) -> Blocker | None:
    """Why this model cannot be asked about such images; None if it can."""
    inner, x = bare(model), torch.stack([pixels[0], pixels[-1]])
    if "FullyShardedDataParallel" in {type(module).__name__ for module in inner.modules()}:
        return Blocker("a model that is sharded over processes (FSDP) cannot make friendly noise",
                       "Make it beforehand with any cheap model, friends.NoiseStore.generate, and pass its folder "
                       "as store=")  # fmt: skip
    if len(view.moments[0]) not in (1, x.shape[1]):
        return Blocker(
            f"normalize has {len(view.moments[0])} channels, the images have {x.shape[1]}", "Pass one number for each"
        )
    try:
        device = device_of(inner, torch.device("cpu"))
        with still([inner], freeze=True), torch.no_grad():
            logits = logits_of(Prepared(inner, view), x.to(device))
    except Exception as error:
        shape = (x.shape[1], *(view.size or x.shape[2:]))
        return Blocker(f"the model does not take images of {shape}, as the loader emits them: {type(error).__name__}: "
                       f"{error}", "Bring images to the model's size in the transform (Resize, CenterCrop), or pass "
                       "canonical_size=")  # fmt: skip
    if not bool(torch.isfinite(logits).all()):
        return Blocker("the model's output is not finite", "Look for NaN in its weights")
    return None
