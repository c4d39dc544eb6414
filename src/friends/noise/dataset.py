"""Both noises on the images of any map-style data set, before its augmentation: the drop-in form of FRIENDS.

For images in memory on a device, :class:`DeviceNoise` does the same to a batch.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import SupportsIndex, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset, Subset

from friends.data.convert import to_pixels
from friends.noise.making import SAMPLE
from friends.noise.random import RandomNoise, add_noise, check_random
from friends.noise.rows import Int64s, Key, MapDataset, Rows, content_of, image_of, spread, with_image
from friends.noise.store import NoiseStore
from friends.types import Streams


class NoisyDataset(Dataset[object]):
    """A data set with friendly and random noise on its images; everything else in its items is untouched.

    An item is an image (PIL, numpy or tensor), a tuple or list that starts with one, or a dict with one under
    ``"image"`` or ``"img"``. The same kind of item comes back, its image a float32 tensor ``(c, h, w)``::

        transform(clip(image + friendly noise of this image, 0, 1) + new random noise)

    The inner data set must not augment: friendly noise belongs to the stored pixels. Give the augmentation, and the
    normalisation, as ``transform``. Every image's bytes are compared with those that its noise was made for, so a
    sampler, a ``Subset`` inside or outside, or a changed folder cannot bring the wrong noise to an image.

    Random noise comes from a generator of its own in every worker process. It follows from ``torch.initial_seed()``
    (and the environment variable RANK of distributed training), so workers and epochs differ, ``torch.manual_seed``
    makes it repeatable, and the global random state is never touched.

    Args:
        dataset: any map-style data set, not augmented.
        store: the friendly noise of its images; None for random noise alone.
        random: ``"bernoulli"``, ``"uniform"`` or ``"gaussian"``.
        mu: strength of the random noise in [0, 1] pixel units; 0 for friendly noise alone.
        transform: what is done to the noisy image: augmentation, then normalisation.
        friendly: whether friendly noise is on; see :attr:`friendly`.
        keys: the key of each row of ``dataset`` in the store. By default the store was made for this data set, row by
            row, or for the one that it is a ``Subset`` of.
        check: compare images with the store: some at once, and each when it is emitted. Without it, noise reaches the
            images by position alone.

    Raises:
        TypeError: the data set cannot be indexed.
        ValueError: the store does not fit the data set (the first difference is named), ``mu`` or ``random`` are out
            of range, or the data set is noisy already.
    """

    def __init__(
        self,
        dataset: MapDataset,
        store: NoiseStore | None,
        *,
        random: RandomNoise = "bernoulli",
        mu: float = 16 / 255,
        transform: Callable[[Tensor], object] | None = None,
        friendly: bool = True,
        keys: Sequence[Key] | Tensor | None = None,
        check: bool = True,
    ) -> None:
        check_random(random, mu)
        if not hasattr(dataset, "__getitem__"):
            raise TypeError(f"{type(dataset).__name__} has no items; for images in memory use DeviceNoise")
        if any(isinstance(level, NoisyDataset) for level, _ in _levels(dataset)):
            raise ValueError("the data set is a NoisyDataset already: noise would be added twice")
        self.dataset, self.store = dataset, store
        self.random: RandomNoise = random
        self.mu, self.transform, self.check = mu, transform, check
        self._friendly = torch.tensor([friendly]).share_memory_()
        self._positions = None if store is None else _positions(dataset, store, keys, check)
        self._generator, self._seeded = torch.Generator(), (0, 0)

    @property
    def friendly(self) -> bool:
        """Whether friendly noise is on. May be switched between epochs; persistent workers see it too."""
        return bool(self._friendly[0])

    @friendly.setter
    def friendly(self, on: bool) -> None:
        self._friendly[0] = on

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"NoisyDataset({self.dataset!r}, {self.store!r}, random={self.random!r}, mu={self.mu * 255:g}/255)"

    def __getitem__(self, index: SupportsIndex) -> object:
        row = operator.index(index)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(f"row {operator.index(index)} of a data set of {len(self)}")
        item = self.dataset[row]
        x = to_pixels(image_of(item))
        noise = self._friendly_of(row, x) if self.friendly else None
        noisy = add_noise(x[None], noise, random=self.random, mu=self.mu, generator=self._stream())[0]
        return with_image(item, cast(Tensor, self.transform(noisy) if self.transform else noisy))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_generator"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _generator=torch.Generator(), _seeded=(0, 0))

    def _friendly_of(self, row: int, x: Float[Tensor, "c h w"]) -> Float[Tensor, "1 c h w"] | None:
        if self.store is None or self._positions is None:
            return None
        position = int(self._positions[row])
        if tuple(x.shape) != self.store.shape:
            raise ValueError(f"row {row} is {tuple(x.shape)}, its noise is {self.store.shape}: the noise was made for "
                             "other images, or the data set resizes or crops at random")  # fmt: skip
        if self.check:
            content = content_of((x * 255).round().to(torch.uint8).cpu())
            if content != self.store.content(position):
                raise ValueError(self.store.mismatch(row, content))
        return self.store.rows([position]).to(x.device)

    def _stream(self) -> torch.Generator:
        """This process's generator; seeded anew in a new process and when the process was given another seed."""
        here = (os.getpid(), torch.initial_seed())
        if self._seeded != here:
            self._generator.manual_seed(Streams(here[1]).integer("random noise", os.environ.get("RANK", "0")))
            self._seeded = here
        return self._generator


class DeviceNoise:
    """Both noises for a batch of images that live on a device, by position.

    Make sure once, with ``store.check(data)``, that the store is of these images: a batch is not compared with it.

    Args:
        store: the friendly noise of all images, copied to the device as bytes; None for random noise alone.
        device: where the images are.
        random: ``"bernoulli"``, ``"uniform"`` or ``"gaussian"``.
        mu: strength of the random noise in [0, 1] pixel units; 0 for friendly noise alone.
    """

    def __init__(
        self,
        store: NoiseStore | None,
        device: torch.device | str,
        *,
        random: RandomNoise = "bernoulli",
        mu: float = 16 / 255,
    ) -> None:
        check_random(random, mu)
        self.random: RandomNoise = random
        self.mu = mu
        self._grey = None if store is None else store.tensor(device)

    def __call__(
        self, x: Float[Tensor, "b c h w"], idx: Int64[Tensor, " b"], generator: torch.Generator
    ) -> Float[Tensor, "b c h w"]:
        """The noisy batch.

        Args:
            x: pixels in [0, 1], not augmented.
            idx: the position of each image in the store.
            generator: on the device; random noise is drawn from it.

        Raises:
            ValueError: the images are not of the store's size, or not one position each.
        """
        if self._grey is None:
            return add_noise(x, None, random=self.random, mu=self.mu, generator=generator)
        if x.shape != (len(idx), *self._grey.shape[1:]):
            raise ValueError(f"images {tuple(x.shape)} at {len(idx)} positions do not fit noise of "
                             f"{tuple(self._grey.shape)}")  # fmt: skip
        return add_noise(x, self._grey[idx], random=self.random, mu=self.mu, generator=generator)


def _levels(dataset: MapDataset) -> list[tuple[object, Int64s]]:
    """The data set and everything that it is a ``Subset`` of, each with the position in it of each of its rows."""
    rows = spread(len(dataset), None)
    levels: list[tuple[object, Int64s]] = [(dataset, rows)]
    inner: object = dataset
    while isinstance(inner, Subset):
        rows = torch.as_tensor(inner.indices).numpy()[rows]
        inner = cast(object, inner.dataset)
        levels.append((inner, rows))
    return levels


def _positions(dataset: MapDataset, store: NoiseStore, keys: Sequence[Key] | Tensor | None, check: bool) -> Int64s:
    """Where in the store the noise of each row is.

    The store may have been made for the data set itself or for one that it is a subset of. Lengths tell which; if
    they leave a choice, as with a shuffling ``Subset``, the pixels decide.

    Raises:
        ValueError: nothing fits.
    """
    if keys is not None:
        candidates = [store.positions(len(dataset), keys)]
    else:
        levels = _levels(dataset)
        candidates = [rows for level, rows in levels if len(cast(MapDataset, level)) == store.n]
        if not candidates:
            return store.positions(len(levels[-1][1]))  # raises, naming both lengths
    if not check:
        return candidates[-1]
    problems = [_problem(dataset, store, rows) for rows in reversed(candidates)]
    for rows, problem in zip(reversed(candidates), problems, strict=True):
        if problem is None:
            return rows
    raise cast(ValueError, problems[0])


def _problem(dataset: MapDataset, store: NoiseStore, rows: Int64s) -> ValueError | None:
    """Why the store's rows are not those of the data set, as far as a sample tells."""
    try:
        store.check_rows(Rows(dataset), rows, SAMPLE)
    except ValueError as error:
        return error
    return None
