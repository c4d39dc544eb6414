"""ResNet-18 in the form that is usual for small images.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: *Deep Residual Learning for Image Recognition*, CVPR 2016,
arXiv 1512.03385. Blocks ``relu(F(x) + x)``, F being two 3x3 convolutions with batch normalisation.

Departure, as in all of the poisoning literature on CIFAR: the stem is one 3x3 convolution of stride 1 without
max-pooling. It is the same for 64x64 images, which therefore cost four times as much as 32x32 ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.models.classifier import Body

BLOCKS = (2, 2, 2, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is led; a 1x1 convolution where its size changes.

    Nothing is done in place, so gradients of gradients and per-example gradients can be taken.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The block's output, at least 0."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + self.shortcut(x))


def resnet18(shape: tuple[int, int, int], width: int = 64) -> Body:
    """The body of ResNet-18: stem, four stages of widths w, 2w, 4w, 8w, global average pooling.

    Args:
        shape: ``(c, h, w)`` of the images; only the channels matter.
        width: channels of the first stage. With 64, and a head of 10 classes, 11,173,962 parameters.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for stage, blocks in enumerate(BLOCKS):
        outputs = width * 2**stage
        for block in range(blocks):
            layers.append(BasicBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Body(body, inputs, any_size=True)
