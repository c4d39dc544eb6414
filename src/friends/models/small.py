"""Small networks: AlexNet and LeNet, from which the paper transfers noise, and the fast nets of demo and tests.

None works in place, so gradients of gradients can be taken. Sizes are computed from the image shape.
"""

from __future__ import annotations

from torch import nn

from friends.models.classifier import Body


def alexnet(shape: tuple[int, int, int], width: int = 64) -> Body:
    """AlexNet in its form for 32x32 images: five 3x3 convolutions, the first of stride 2, and two hidden layers.

    Alex Krizhevsky, Ilya Sutskever, Geoffrey Hinton: *ImageNet Classification with Deep Convolutional Neural
    Networks*, NeurIPS 2012. Departures for small images: 3x3 kernels, 2x2 pooling, no response normalisation.

    Args:
        shape: ``(c, h, w)`` of the images, at least 15x15.
        width: channels of the first convolution; the others are 3, 6, 4 and 4 times, the hidden layers 64 times it.
    """
    h, w = (_halved(size, 4) for size in shape[1:])
    _check_size("alexnet", shape, h, w, least=15)
    hidden = 64 * width
    layers = nn.Sequential(
        *_convolution(shape[0], width, stride=2),
        nn.MaxPool2d(2),
        *_convolution(width, 3 * width),
        nn.MaxPool2d(2),
        *_convolution(3 * width, 6 * width),
        *_convolution(6 * width, 4 * width),
        *_convolution(4 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4 * width * h * w, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
    )
    return Body(layers, hidden, any_size=False)


def lenet(shape: tuple[int, int, int], width: int = 6) -> Body:
    """LeNet-5: two 5x5 convolutions and two hidden layers. 62,006 parameters on 3x32x32 images of 10 classes.

    Yann LeCun, Léon Bottou, Yoshua Bengio, Patrick Haffner: *Gradient-Based Learning Applied to Document
    Recognition*, Proceedings of the IEEE 1998. Departures, by now usual: ReLU and max-pooling.

    Args:
        shape: ``(c, h, w)`` of the images, at least 16x16.
        width: channels of the first convolution, 6 in the original; the other layers grow in proportion.
    """
    h, w = (((size - 4) // 2 - 4) // 2 for size in shape[1:])
    _check_size("lenet", shape, h, w, least=16)
    second, hidden, features = 8 * width // 3, 20 * width, 14 * width
    layers = nn.Sequential(
        nn.Conv2d(shape[0], width, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * h * w, hidden),
        nn.ReLU(),
        nn.Linear(hidden, features),
        nn.ReLU(),
    )
    return Body(layers, features, any_size=False)


def convnet(shape: tuple[int, int, int], width: int = 32) -> Body:
    """Four 3x3 convolutions with batch normalisation, of widths w, 2w, 2w, 4w: the smallest net that has all parts.

    Args:
        shape: ``(c, h, w)`` of the images, at least 8x8; other sizes may be shown to it later.
        width: channels of the first convolution.
    """
    _check_size("convnet", shape, shape[1] // 8, shape[2] // 8, least=8)
    layers: list[nn.Module] = []
    inputs = shape[0]
    for place, outputs in enumerate((width, 2 * width, 2 * width, 4 * width)):
        if place:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return Body(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs, any_size=True)


def tiny(shape: tuple[int, int, int], width: int = 32) -> Body:
    """Two 3x3 convolutions, the first of stride 2, and many features: seconds to train on one processor core.

    The features are a flattened map, not an average: 1,024 for 32x32 images. A wide linear head memorises single
    images, which is what lets poisons work on so small a net.

    Args:
        shape: ``(c, h, w)`` of the images, at least 7x7.
        width: channels of the first convolution; the second has twice as many.
    """
    h, w = (_halved(size, 3) for size in shape[1:])
    _check_size("tiny", shape, h, w, least=7)
    layers = nn.Sequential(
        *_convolution(shape[0], width, stride=2),
        nn.MaxPool2d(2),
        *_convolution(width, 2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return Body(layers, 2 * width * h * w, any_size=False)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]


def _halved(size: int, times: int) -> int:
    """A side after a padded 3x3 convolution of stride 2, which rounds up, and poolings, which round down."""
    size = (size + 1) // 2
    for _ in range(times - 1):
        size //= 2
    return size


def _check_size(name: str, shape: tuple[int, int, int], h: int, w: int, least: int) -> None:
    if h < 1 or w < 1:
        raise ValueError(f"{name} needs images of at least {least}x{least} pixels, not {shape[1]}x{shape[2]}")
