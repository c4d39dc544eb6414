"""What other libraries bring to a loader, in miniature: the same protocols, nothing installed.

Transforms follow torchvision (``ToTensor`` refuses tensors, random ones draw from torch's global generator), columns
follow Hugging Face's ``datasets`` (``format``, ``set_transform``), the prefetcher follows timm (``dataset.transform``
is assigned after the fact, batches are bytes, normalised behind the loader).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import friends
from friends.data.images import LabeledImages

N = 18
DATA = LabeledImages(
    (torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2).clamp(0, 1).mul(255).byte(),
    torch.arange(N),
    tuple(f"row {row}" for row in range(N)),
)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


def net(seed: int = 0) -> nn.Module:
    """Takes images of any size, normalised or not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip


def pil(row: int) -> Image.Image:
    return Image.fromarray(DATA.x[row].permute(1, 2, 0).numpy())


# ---- torchvision


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    def __call__(self, image):
        if isinstance(image, torch.Tensor):
            raise TypeError(f"pic should be PIL Image or ndarray. Got {type(image)}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean=MEAN, std=STD):
        self.mean, self.std = mean, std

    def __call__(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"img should be Tensor Image. Got {type(x)}")
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


class RandomHorizontalFlip:
    def __call__(self, image):
        if torch.rand(1) >= 0.5:
            return image
        if isinstance(image, torch.Tensor):
            return image.flip(-1)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class RandomCrop:
    """One pixel of padding, as large as before."""

    def __call__(self, image):
        top, left = torch.randint(0, 3, (2,)).tolist()
        if isinstance(image, torch.Tensor):
            h, w = image.shape[-2:]
            return nn.functional.pad(image, (1, 1, 1, 1))[..., top : top + h, left : left + w]
        w, h = image.size
        padded = Image.new(image.mode, (w + 2, h + 2))
        padded.paste(image, (1, 1))
        return padded.crop((left, top, left + w, top + h))


class Resize:
    def __init__(self, h, w):
        self.h, self.w = h, w

    def __call__(self, image):
        if isinstance(image, torch.Tensor):
            return nn.functional.interpolate(image[None], (self.h, self.w), mode="bilinear", antialias=True)[0]
        return image.resize((self.w, self.h), Image.Resampling.BILINEAR)


class ToRGB:
    def __call__(self, image):
        return image.convert("RGB")


class PILOnly:
    """A step that tensors do not have: mirrors, as PIL does."""

    def __call__(self, image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image.copy()


class ToBytes:
    """timm's ToNumpy: channels first, whole grey levels."""

    def __call__(self, image):
        return np.array(image, dtype=np.uint8).transpose(2, 0, 1)


def augmented() -> Compose:
    return Compose([RandomCrop(), RandomHorizontalFlip(), ToTensor(), Normalize()])


class Pictures(Dataset):
    """As torchvision's data sets: PIL images in, ``transform``, an index for a label."""

    def __init__(self, rows=range(N), transform=None):
        self.rows, self.transform = list(rows), transform

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image, label = pil(self.rows[index]), self.rows[index]
        return (image if self.transform is None else self.transform(image)), label


class Handmade(Dataset):
    """Everything in __getitem__, the place of the noise marked by hand."""

    def __init__(self, rows=range(N), marked=True):
        self.rows, self.marked = list(rows), marked

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        x = DATA.x[self.rows[index]].float() / 255
        if self.marked:
            x = friends.NoiseHere()(x)
        return Normalize()(RandomHorizontalFlip()(RandomCrop()(x))), self.rows[index]


class Wrapped(Dataset):
    """The usual way to give a part of a data set its own transform."""

    def __init__(self, base, transform):
        self.base, self.transform = base, transform

    def __len__(self):
        return len(self.base)

    def __getitem__(self, index):
        x, y = self.base[index]
        return self.transform(x), y


# ---- Hugging Face


class Columns:
    """``datasets.Dataset`` as far as loaders see it."""

    def __init__(self, rows=range(N)):
        self._rows, self._format, self._columns = list(rows), None, None

    column_names = ("image", "label")

    def __len__(self):
        return len(self._rows)

    @property
    def format(self):
        kind = None if self._format is None else "custom"
        kwargs = {} if self._format is None else {"transform": self._format}
        return {"type": kind, "format_kwargs": kwargs, "columns": self._columns or list(self.column_names),
                "output_all_columns": False}  # fmt: skip

    def set_transform(self, transform, columns=None, output_all_columns=False):
        self._format, self._columns = transform, columns

    def with_transform(self, transform):
        other = copy.copy(self)
        other.set_transform(transform)
        return other

    def __getitem__(self, index):
        rows = self._rows[index : index + 1] if isinstance(index, int) else [self._rows[i] for i in index]
        if isinstance(index, int) and not rows:
            raise IndexError(index)
        batch = {"image": [pil(row) for row in rows], "label": rows}
        batch = batch if self._format is None else self._format(batch)
        return {k: v[0] for k, v in batch.items()} if isinstance(index, int) else batch

    def __getitems__(self, indices):
        batch = self[indices]
        return [{k: v[place] for k, v in batch.items()} for place in range(len(indices))]


class Columnar:
    """A function for ``with_transform``, as the guides write it."""

    def __init__(self, transform):
        self.pixels = transform

    def __call__(self, batch):
        return {
            "pixel_values": [self.pixels(image.convert("RGB")) for image in batch["image"]],
            "label": batch["label"],
        }


def marked() -> Compose:
    return Compose([ToTensor(), friends.NoiseHere(), RandomCrop(), RandomHorizontalFlip(), Normalize()])


def collate_columns(items):
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["label"] for item in items])


# ---- timm


class PrefetchLoader:
    def __init__(self, loader, mean, std):
        self.loader = loader
        self.mean, self.std = (torch.tensor(v).mul(255).view(1, 3, 1, 1) for v in (mean, std))

    def __iter__(self):
        for x, y in self.loader:  # exactly two
            yield (x.float() - self.mean) / self.std, y

    def __len__(self):
        return len(self.loader)

    @property
    def dataset(self):
        return self.loader.dataset


def fast_collate(items):
    assert all(isinstance(x, np.ndarray) and x.dtype == np.uint8 for x, _ in items)
    return torch.stack([torch.from_numpy(x) for x, _ in items]), torch.tensor([y for _, y in items])


def create_loader(dataset, batch_size, **options):
    dataset.transform = Compose([RandomCrop(), RandomHorizontalFlip(), ToBytes()])
    return PrefetchLoader(DataLoader(dataset, batch_size, collate_fn=fast_collate, **options), MEAN, STD)
