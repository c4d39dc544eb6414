"""What is written beside exported images: what was done to them, and what is still to be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from friends.noise.baked_formats import NPZ, Format, Part
from friends.noise.grey import grey_limit
from friends.noise.store import NoiseStore

_LAID_OUT: dict[Format, str] = {
    "png": "`train/CLASS/NAME.png`, and `test/CLASS/NAME.png` if there are test images. Labels are the classes in "
    "alphabetical order.",
    "parquet": "`data/train-*.parquet`, and `data/test-*.parquet` if there are test images, in the layout of Hugging "
    "Face: a column `image` of PNG bytes, a column `label`, and the class names in the schema's metadata.",
    "npz": f"`{NPZ}`: `x_train` (n, h, w, c) and `y_train`, `x_test` and `y_test` if there are test images, and "
    "`classes`, the names of the labels. All are bytes and whole numbers, nothing is pickled.",
}


def readme(kind: Format, parts: Sequence[Part], store: NoiseStore) -> str:
    """The README.md of an export."""
    train, limit = parts[0].images, grey_limit(store.zeta)
    c, h, w = train.shape
    test = f"{len(parts[1].images):,} test images are as they were, without noise" if len(parts) > 1 else (
        "There are no test images")  # fmt: skip
    settings = ", ".join(f"{name} {value}" for name, value in asdict(store.settings).items())
    return f"""# Images with friendly noise

{len(train):,} training images of {_shown(train.name)} ({c} x {h} x {w}, {len(train.classes)} classes), each with its
friendly noise added and clipped: clip(image + noise, 0, 255), in whole grey levels, exactly. {test}.

{_LAID_OUT[kind]}

| | |
| --- | --- |
| strength | at most {limit}/255 |
| settings | {settings} |
| seed | {store.seed} |
| coding | {store.coding} |
| proxy | {_shown(store.proxy) or "unnamed"} |
| fingerprint | {store.fingerprint} |

## Random noise is NOT in these images

The defense is two noises. The other one, random noise, has to be drawn anew at every step of the training, with the
same mu at each of them; without it only half of the defense is there. With `x` a batch of pixels in [0, 1], before any
augmentation and normalisation, `mu = 16 / 255` (the paper's) and `rng = numpy.random.default_rng()`, it is one of

```python
x = x + mu * rng.choice([-1, 1], x.shape)  # Bernoulli
x = x + rng.uniform(-mu, mu, x.shape)  # uniform
x = x + rng.normal(0, mu, x.shape)  # Gaussian
```

The sum is not clipped. Test images get no noise.

## Do not save them as JPEG

JPEG rounds away what the eye does not see, and that is what friendly noise is: saving these images as JPEG, or in any
other format with losses, would destroy it. Nor may they be resized before training: the noise belongs to these pixels.
"""


def _shown(text: str) -> str:
    """A name from a file or folder as one line."""
    return text if text.isprintable() else ascii(text)
