"""The folded network says what the original says, in any module, or the original is used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from friends.models import MODELS, build
from friends.modules import logits_of, still
from friends.noise import lean as module
from friends.noise.lean import lean


def used(net: nn.Module, size: int = 16, channels: int = 3) -> nn.Module:
    """A network in double precision whose batch normalisations have seen something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias)
        net.train()(torch.rand(32, channels, size, size))
    return net.double().eval()


def images(n: int = 6, size: int = 16, channels: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, channels, size, size, generator=g, dtype=torch.float64)


def slope(f, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = f(x)
    (gradient,) = torch.autograd.grad(out.log_softmax(1)[:, 0].sum(), x)
    return gradient


class Counting(TorchDispatchMode):
    """Which operations ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def norms(f, x: Tensor) -> int:
    """How many batch normalisations were computed."""
    with Counting() as counting, torch.no_grad():
        f(x)
    return sum("batch_norm" in name for name in counting.names)


def same(net: nn.Module, x: Tensor, f=None) -> None:
    with still([net], freeze=True):
        f = f or lean(net, x)
        torch.testing.assert_close(f(x), logits_of(net, x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(slope(f, x), slope(net, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_all_our_networks_lose_every_normalisation(name):
    size = 32 if name in ("alexnet", "lenet") else 16
    g = torch.Generator().manual_seed(0)
    moments = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    net = used(build(name, shape=(3, size, size), classes=7, moments=moments, generator=g, width=8), size)
    x = images(size=size)
    same(net, x)
    with still([net], freeze=True):
        f = lean(net, x)
        assert norms(f, x) == 0
        with Counting() as counting, torch.no_grad():
            f(x)
    divisions = [name for name in counting.names if name.startswith("div")]
    assert not divisions  # the standard deviation went into the first convolution


def conv(inputs: int = 3, outputs: int = 6, **more) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


class Net(nn.Module):
    """A convolution, a normalisation, and a way of using them that a subclass says."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = conv(), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.relu(self.middle(x)).mean((2, 3)))

    def middle(self, x):
        return self.norm(self.conv(x))


class Twice(Net):
    """What the convolution makes is used beside the normalisation."""

    def middle(self, x):
        out = self.conv(x)
        return self.norm(out) + out


class ReadInPlace(Net):
    """A view of what the convolution makes is used."""

    def middle(self, x):
        out = self.conv(x)
        return self.norm(out) * out[:, :1].detach()


class Shared(Net):
    """One convolution before two normalisations."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(6)

    def middle(self, x):
        return self.norm(self.conv(x)) + self.other(self.conv(x.flip(3)))


class Between(Net):
    """Something happens between the two."""

    def middle(self, x):
        return self.norm(self.conv(x) * 2)


class Functional(Net):
    """The normalisation is computed without its module."""

    def middle(self, x):
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)


class Hooked(Net):
    """A hook changes what the convolution makes."""

    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda m, i, out: out * 3)


class OwnConvolution(Net):
    """Not torch's convolution, though it is one."""

    def __init__(self):
        super().__init__()

        class Scaled(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x)

        self.conv = Scaled(3, 6, 3, padding=1)


class WeightNormed(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(conv())


UNSAFE = [Twice, ReadInPlace, Shared, Between, Functional, Hooked, OwnConvolution, WeightNormed]


@pytest.mark.parametrize("kind", UNSAFE)
def test_layers_that_only_seem_to_belong_together_are_left(kind):
    net, x = used(kind()), images()
    same(net, x)
    with still([net], freeze=True):
        assert norms(lean(net, x), x) == norms(net, x) > 0


class Tied(Net):
    """Two convolutions with one weight, of which one has no normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 3), conv(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def middle(self, x):
        return self.norm(self.first(x)) + self.second(x)


def test_a_shared_weight_is_not_folded_for_its_other_user():
    net, x = used(Tied()), images()
    same(net, x)
    with still([net], freeze=True):
        assert norms(lean(net, x), x) == 0


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, eps=0.5), nn.BatchNorm2d(6, momentum=None)],
    ids=["no affine", "large eps", "cumulative"],
)
@pytest.mark.parametrize("more", [{"bias": False}, {"bias": True}, {"groups": 3}, {"padding_mode": "reflect"}])
def test_all_forms_of_the_two_layers(norm, more):
    net = Net()
    net.conv, net.norm = conv(**more), copy.deepcopy(norm)
    net = used(net)
    same(net, images())
    with still([net], freeze=True):
        assert norms(lean(net, images()), images()) == 0


def test_a_normalisation_without_running_statistics_is_left():
    net = Net()
    net.norm = nn.BatchNorm2d(6, track_running_stats=False)
    net = used(net)
    with still([net], freeze=True):
        assert norms(lean(net, images()), images()) == 1


class Fickle(Net):
    """Bright images are not normalised, and dark ones twice."""

    def middle(self, x):
        out = self.conv(x)
        if x.mean() > 0.7:
            return out
        out = self.norm(out)
        return self.norm(out) if x.mean() < 0.3 else out


@pytest.mark.parametrize("factor", [0.1, 1.9])
def test_another_path_for_other_images_is_noticed(factor):
    net, x = used(Fickle()), images()
    other = x * 0.1 if factor < 1 else 1 - x * 0.1
    with still([net], freeze=True):
        f = lean(net, x)
        assert norms(f, x) == 0
        torch.testing.assert_close(f(x), net(x))
        torch.testing.assert_close(f(other), net(other))
        torch.testing.assert_close(f(x), net(x))


def test_a_fold_that_says_something_else_is_not_used(monkeypatch):
    fold = module._fold_behind

    def wrong(layer, norm):
        fold(layer, norm)
        layer.bias.data += 0.01

    monkeypatch.setattr(module, "_fold_behind", wrong)
    net, x = used(Net()), images()
    same(net, x)
    with still([net], freeze=True):
        assert norms(lean(net, x), x) == 1


def test_a_module_that_cannot_be_copied_is_used_as_it_is():
    class Uncopied(Net):
        def __deepcopy__(self, memo):
            raise TypeError("no")

    net, x = used(Uncopied()), images()
    same(net, x)


def test_the_model_is_left_as_it_was():
    net = used(Net())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with still([net], freeze=True):
        lean(net, images())(images())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for part in net.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert "forward" not in vars(part)


def test_padding_is_with_the_mean_colour_and_not_with_black():
    """The mean may not be folded into a convolution that pads with zeros."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.2, 0.3, 0.1]).view(1, 3, 1, 1))

        def forward(self, x):
            return (x - self.mean) / self.std

    net = used(nn.Sequential(Normalised(), conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)))
    same(net, images())


def test_a_layer_that_only_has_a_mean_and_a_std_is_left():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.std = torch.zeros(3), torch.ones(3) * 2

        def forward(self, x):
            return x**2

    net = used(nn.Sequential(Odd(), conv(), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)))
    same(net, images())


def test_bfloat16_is_near_and_comes_back_as_float32():
    net, x = used(Net()).float(), images().float()
    with still([net], freeze=True):
        exact, half = lean(net, x)(x), lean(net, x, "bfloat16")(x)
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)


def test_automatic_precision_asks_the_processor(monkeypatch):
    net, x = used(Net()).float(), images().float()
    found = []
    with still([net], freeze=True):
        for able in (True, False):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"amx_bf16": able}, raising=False)
            found.append(torch.equal(lean(net, x, "auto")(x), lean(net, x)(x)))
    assert found == [False, True]
