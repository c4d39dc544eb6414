from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from friends.models import MODELS, Classifier, Normalize, build, finetune, transfer

GREY: tuple[tuple[float, ...], tuple[float, ...]] = ((0.13,), (0.31,))
COLOUR: tuple[tuple[float, ...], tuple[float, ...]] = ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
NARROW = {"resnet18": 4, "alexnet": 4, "lenet": 3, "convnet": 4, "tiny": 4}
"""Widths at which each network is quick."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(name: str, size: int = 32, channels: int = 3, seed: int = 0, **more: Any) -> Classifier:
    moments = GREY if channels == 1 else COLOUR
    return build(name, shape=(channels, size, size), classes=5, moments=moments, width=NARROW[name],
                 generator=generator(seed), **more)  # fmt: skip


def images(count: int = 4, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=generator(seed))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_network_is_tested_here() -> None:
    assert NARROW.keys() == MODELS.keys()


# --- what they are ---


def test_resnet18_is_the_one_of_the_poisoning_literature() -> None:
    model = build("resnet18", shape=(3, 32, 32), classes=10, moments=COLOUR, generator=generator())
    assert parameters(model) == 11_173_962
    assert len(list(model.parameters())) == 62
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.body.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:])))
    model.eval()(images(1))
    assert list(shapes.values()) == [
        *[(64, 32, 32)] * 5,
        *[(128, 16, 16)] * 2,
        *[(256, 8, 8)] * 2,
        *[(512, 4, 4)] * 2,
        (512, 1, 1),
        (512,),
    ]


def test_resnet18_starts_as_its_authors_start_it() -> None:
    model = build("resnet18", shape=(3, 32, 32), classes=10, moments=COLOUR, width=16, generator=generator())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            if module.weight.numel() > 4000:
                assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.08)
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        ("lenet", (3, 32, 32), 10, 62_006),
        ("lenet", (1, 28, 28), 10, 44_426),
        ("alexnet", (3, 32, 32), 10, 23_272_266),
        ("tiny", (3, 32, 32), 2, 21_442),
        ("convnet", (3, 32, 32), 10, 131_754),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, int, int], classes: int, count: int) -> None:
    moments = GREY if shape[0] == 1 else COLOUR
    assert parameters(build(name, shape=shape, classes=classes, moments=moments, generator=generator())) == count


def test_the_tiny_net_has_1024_features_of_a_32_by_32_image() -> None:
    model = build("tiny", shape=(3, 32, 32), classes=2, moments=COLOUR, generator=generator())
    assert model.features(images(2)).shape == (2, 1024)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (33, 1), (64, 3)])
def test_every_size_and_number_of_channels(name: str, size: int, channels: int) -> None:
    model = small(name, size, channels).eval()
    x = images(3, size, channels)
    out = model(x)
    assert out.shape == (3, 5)
    assert torch.equal(model.head(model.features(x)), out)
    assert model.features(x).shape == (3, model.head.in_features)
    assert out.std(0).min() > 0  # the image matters
    assert torch.allclose(model(x[1:2]), out[1:2], atol=1e-5)  # in eval mode, the other images do not


@pytest.mark.parametrize(("name", "least"), [("lenet", 16), ("alexnet", 15), ("convnet", 8), ("tiny", 7)])
def test_too_small_images_are_refused_with_the_smallest_size(name: str, least: int) -> None:
    x = images(2, least)
    assert small(name, least).eval()(x).isfinite().all()
    with pytest.raises(ValueError, match=f"{name} needs images of at least {least}x{least} pixels"):
        small(name, least - 1)
    with pytest.raises(ValueError, match=f"{name} needs images"):
        build(name, shape=(3, 40, 3), classes=2, moments=COLOUR, generator=generator())


# --- pixels in, logits out ---


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_the_first_layer(name: str) -> None:
    model, x = small(name).eval(), images()
    mean, std = (torch.tensor(m).view(1, 3, 1, 1) for m in COLOUR)
    assert torch.equal(model.features(x), model.body((x - mean) / std))
    bare = copy.deepcopy(model)
    bare.normalize = Normalize((0.0,) * 3, (1.0,) * 3)
    assert not torch.allclose(model(x), bare(x), atol=1e-3)
    assert torch.allclose(model(x), bare((x - mean) / std), atol=1e-5)


def test_normalisation_does_not_clamp_and_travels_with_the_weights() -> None:
    layer = Normalize((0.5,), (0.25,))
    assert layer(torch.tensor([-0.5, 1.5]).view(1, 1, 1, 2)).flatten().tolist() == [-4, 4]
    assert small("tiny").state_dict()["normalize.mean"].flatten().tolist() == pytest.approx(COLOUR[0])
    assert not any(p.requires_grad for p in layer.buffers())
    assert list(layer.parameters()) == []
    with pytest.raises(ValueError, match="a positive standard deviation per channel"):
        Normalize((0.5,), (0.0,))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MODELS)
def test_other_images_than_it_was_built_for_are_refused(name: str) -> None:
    model = small(name).eval()
    with pytest.raises(ValueError, match=r"with 3 channels, not \(4, 1, 32, 32\)"):
        model(images(channels=1))
    with pytest.raises(ValueError, match=r"with 3 channels, not \(3, 32, 32\)"):
        model(images()[0])
    if model.any_size:
        assert model(images(size=48)).shape == (4, 5)
    else:
        with pytest.raises(ValueError, match=r"built for 3 channels of 32x32 pixels, not \(4, 3, 48, 48\)"):
            model(images(size=48))


# --- weights and where they come from ---


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_weights_follow_from_the_generator_alone(name: str) -> None:
    state = torch.get_rng_state()
    first = small(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same(first, small(name, seed=1))
    other = small(name, seed=2)
    drawn = [k for k, p in first.named_parameters() if p.ndim > 1]
    assert not any(torch.equal(first.get_parameter(k), other.get_parameter(k)) for k in drawn)
    flowing = generator(1)
    twice = [build(name, shape=(3, 32, 32), classes=5, moments=COLOUR, width=NARROW[name], generator=flowing)
             for _ in range(2)]  # fmt: skip
    assert same(first, twice[0])
    assert not same(first, twice[1])


@pytest.mark.usefixtures("unchecked")
def test_unknown_names_and_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet-18'; did you mean 'resnet18'\?"):
        build("resnet-18", shape=(3, 32, 32), classes=2, moments=COLOUR, generator=generator())
    with pytest.raises(ValueError, match="unknown model 'xyz'; choose one of resnet18, alexnet"):
        build("xyz", shape=(3, 32, 32), classes=2, moments=COLOUR, generator=generator())
    with pytest.raises(ValueError, match="moments of 1 channels do not fit"):
        build("tiny", shape=(3, 32, 32), classes=2, moments=GREY, generator=generator())
    with pytest.raises(ValueError, match="not 0 and None"):
        build("tiny", shape=(3, 32, 32), classes=0, moments=COLOUR, generator=generator())
    with pytest.raises(ValueError, match="not 2 and 0"):
        build("tiny", shape=(3, 32, 32), classes=2, moments=COLOUR, width=0, generator=generator())
    with pytest.raises(ValueError, match="image shape"):
        build("tiny", shape=(3, 0, 32), classes=2, moments=COLOUR, generator=generator())


# --- gradients ---


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_gradients_are_right(name: str, mode: str) -> None:
    """A directional second derivative against a difference of first ones, in float64."""
    model = small(name).double().train(mode == "train")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    weights, y = [p for p in model.parameters() if p.ndim > 1], torch.tensor([0, 1, 2, 3])
    x = images().double()
    direction = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)

    def gradient(x: Tensor, create_graph: bool = False) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=create_graph))

    probe = [torch.randn(p.shape, generator=generator(i), dtype=p.dtype) for i, p in enumerate(weights)]
    leaf = x.clone().requires_grad_()
    product = sum((g * v).sum() for g, v in zip(gradient(leaf, create_graph=True), probe, strict=True))
    exact = float((torch.autograd.grad(product, leaf)[0] * direction).sum())
    step = 1e-8  # small enough that no ReLU changes sides
    up, down = gradient(x + step * direction), gradient(x - step * direction)
    numeric = sum(float(((a - b) * v).sum()) for a, b, v in zip(up, down, probe, strict=True)) / (2 * step)
    assert exact != 0
    assert exact == pytest.approx(numeric, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_done_in_place(name: str) -> None:
    assert not any(getattr(module, "inplace", False) for module in small(name).modules())


# --- transfer ---


def one_step(model: Classifier, lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    F.cross_entropy(model(images(8)), torch.arange(8) % 5).backward()
    optimizer.step()


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_transfer_trains_the_head_alone(name: str, bn: Any) -> None:
    model = small(name).train()
    before = copy.deepcopy(model)
    new = transfer(model, generator=generator(4), bn=bn)
    assert [k for k, p in new.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert not torch.equal(new.head.weight, model.head.weight)
    trained = copy.deepcopy(new).train()
    one_step(trained)
    assert not torch.equal(trained.head.weight, new.head.weight)
    for key, parameter in trained.body.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before.body.get_parameter(key))
    assert same(model, before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "convnet"])
def test_running_holds_the_features_and_batch_lets_them_drift(name: str) -> None:
    model, x = small(name).eval(), images(8)
    one_batch = model.features(x).detach()
    held = transfer(model, generator=generator(), bn="running").train()
    assert held.training
    assert held.head.training
    assert not any(m.training for m in held.body.modules())
    assert torch.equal(held.features(x), one_batch)
    one_step(held)
    assert torch.equal(held.eval().train().features(x), one_batch)
    assert torch.equal(copy.deepcopy(held).train().features(x), one_batch)

    loose = transfer(model, generator=generator(), bn="batch").train()
    assert not torch.allclose(loose.features(x), one_batch, atol=1e-3)  # statistics of this batch
    assert not torch.allclose(loose.eval().features(x), one_batch, atol=1e-4)  # and those that it kept have moved
    assert torch.equal(model.features(x), one_batch)


def test_held_dropout_stays_off() -> None:
    held = transfer(small("alexnet"), generator=generator()).train()
    x = images()
    assert torch.equal(held(x), held(x))
    free = finetune(held, generator=generator()).train()
    assert not torch.equal(free(x), free(x))


@pytest.mark.usefixtures("unchecked")
def test_the_new_head_follows_from_the_generator_and_may_have_other_classes() -> None:
    model, state = small("tiny").double(), torch.get_rng_state()
    a, b, c = (transfer(model, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(a, b)
    assert not torch.equal(a.head.weight, c.head.weight)
    assert a.head.weight.dtype == torch.float64
    wide = transfer(model, generator=generator(), classes=7)
    assert wide(images().double()).shape == (4, 7)
    with pytest.raises(ValueError, match="unknown bn 'frozen'; choose one of running, batch"):
        transfer(model, generator=generator(), bn="frozen")  # type: ignore[arg-type]


def test_finetune_trains_everything_even_of_a_frozen_network() -> None:
    frozen = transfer(small("convnet"), generator=generator())
    new = finetune(frozen, generator=generator(5))
    assert all(p.requires_grad for p in new.parameters())
    assert all(torch.equal(p, new.body.get_parameter(k)) for k, p in frozen.body.named_parameters())
    assert not torch.equal(new.head.weight, frozen.head.weight)
    before = copy.deepcopy(new.body)
    new.train()
    assert all(m.training for m in new.modules())
    one_step(new)
    assert not any(torch.equal(p, before.get_parameter(k)) for k, p in new.body.named_parameters() if p.ndim > 1)
    assert not any(p.requires_grad for p in frozen.body.parameters())


def test_the_mode_of_the_original_is_kept() -> None:
    for mode in (True, False):
        model = small("convnet").train(mode)
        assert transfer(model, generator=generator()).training is mode
        assert finetune(model, generator=generator()).training is mode


def test_gradients_left_in_the_original_are_not_copied() -> None:
    model = small("tiny")
    model(images()).sum().backward()
    assert all(p.grad is None for p in transfer(model, generator=generator()).parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_building_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in MODELS:
            small(name)
