"""DP-SGD: norms after clipping, the noise that is measured, and what a single image may do."""

from __future__ import annotations

import builtins
import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dp_sgd_slow import clipped_step_slow
from torch import nn

from friends.data.images import LabeledImages
from friends.defenses import per_example
from friends.defenses.dp_sgd import DPSGD, add_gaussian, clip_norm, sum_of_clipped
from friends.models import build
from friends.training import Defense, Recipe, Run, fit
from friends.training.defense import check_composition
from friends.types import Streams
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=3, batch=64, lr=0.05)


def make(generator: torch.Generator, name: str = "tiny", width: int = 8) -> nn.Module:
    return build(name, shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=width, generator=generator)


def make_convnet(generator: torch.Generator) -> nn.Module:
    return make(generator, "convnet", 4)


class Look(Defense):
    """Keeps what gradients a training steps along, step by step, the norm of all of them, and the batches."""

    def __init__(self) -> None:
        self.flat: list[torch.Tensor] = []
        self.batches: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []

    def __repr__(self) -> str:
        return "Look()"

    def batch(self, x: torch.Tensor, y: torch.Tensor, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        self.batches.append((x.detach().clone(), y.clone(), weights))
        return x, y

    def gradients(self, run: Run) -> None:
        self.flat.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).clone())


def steps(data: LabeledImages, *defenses: Defense, recipe: Recipe = RECIPE, make_model: object = make) -> Look:
    look = Look()
    fit(data, make_model, recipe=recipe, defenses=[*defenses, look], streams=Streams(0))  # type: ignore[arg-type]
    return look


def test_clipping_bounds_the_common_norm_and_keeps_the_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 3, generator=generator), torch.randn(7, generator=generator)]
    flat = torch.cat([g.flatten() for g in gradients])
    clipped = torch.cat([g.flatten() for g in clip_norm(gradients, 0.5)])
    assert math.isclose(float(clipped.norm()), 0.5, rel_tol=1e-6)
    assert torch.allclose(clipped, flat * (0.5 / flat.norm()))
    for clip in (100.0, math.inf):
        assert all(torch.equal(a, b) for a, b in zip(clip_norm(gradients, clip), gradients, strict=True))
    assert all(torch.equal(g, torch.zeros(3)) for g in clip_norm([torch.zeros(3)], 1.0))


def test_each_example_is_clipped_by_its_norm_over_all_parameters() -> None:
    """One small example and one huge one: the huge one weighs as much as its bound, the small one what it weighs."""
    small, huge = torch.tensor([0.3, 0.0]), torch.tensor([0.0, 3000.0])
    a, b = torch.stack([small, huge]), torch.tensor([[0.4], [4000.0]])
    got = torch.cat(sum_of_clipped([a, b], 1.0))
    assert torch.allclose(got, torch.tensor([0.3, 0.6, 0.4 + 0.8]))


def test_noise_has_the_promised_spread_on_every_coordinate() -> None:
    zeros = [torch.zeros(2, 3), torch.zeros(5)]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([torch.cat([g.flatten() for g in add_gaussian(zeros, 0.02, generator)]) for _ in range(4000)])
    assert torch.allclose(draws.std(0), torch.full((11,), 0.02), rtol=0.06)
    assert float(draws.mean(0).abs().max()) < 0.02 / 4000**0.5 * 5
    assert float(torch.corrcoef(draws.T).fill_diagonal_(0).abs().max()) < 0.08


def test_every_step_is_clipped_and_noised_as_told(few_digits: LabeledImages) -> None:
    plain = steps(few_digits, DPSGD(clip=math.inf, sigma=0))
    clipped = steps(few_digits, DPSGD(clip=0.3, sigma=0))
    noised = steps(few_digits, DPSGD(clip=0.3, sigma=0.05))
    assert max(float(g.norm()) for g in clipped.flat) <= 0.3 * (1 + 1e-5)
    assert max(float(g.norm()) for g in plain.flat) > 0.6
    assert torch.allclose(clipped.flat[0], plain.flat[0] * min(1.0, 0.3 / float(plain.flat[0].norm())), atol=1e-7)
    noise = noised.flat[0] - clipped.flat[0]
    assert math.isclose(float(noise.std()), 0.3 * 0.05, rel_tol=0.05)
    second = noised.flat[1] - clipped.flat[1]  # another model by now, but its clipped gradient is lost in the noise
    assert abs(float(torch.corrcoef(torch.stack([noise, second]))[0, 1])) < 0.1


def test_batch_scope_leaves_the_network_as_it_is(few_digits: LabeledImages) -> None:
    model = fit(few_digits, make_convnet, recipe=RECIPE, defenses=[DPSGD()], streams=Streams(0)).model
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip": 0.0}, "not 0.0 and 0.01"),
        ({"clip": float("nan")}, "not nan"),
        ({"sigma": -1.0}, "not 1.0 and -1.0"),
        ({"sigma": math.inf}, "not 1.0 and inf"),
        ({"clip": math.inf}, "in units of clip, which is inf"),
        ({"scope": "sample"}, "unknown scope 'sample'; choose one of batch, example"),
        ({"delta": 0.0}, "not 0.0"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPSGD(**wrong)  # type: ignore[arg-type]


def test_without_opacus_it_says_what_to_install(few_digits: LabeledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: object, **more: object) -> object:
        if name.split(".")[0] == "opacus":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'friends\[dp\]'.*scope=\"batch\""):
        fit(few_digits, make, recipe=RECIPE, defenses=[DPSGD(scope="example")], streams=Streams(0))
    fit(few_digits, make, recipe=RECIPE.first(1), defenses=[DPSGD()], streams=Streams(0))  # needs none


@pytest.mark.parametrize("trait", ["mixes", "repeats", "crafts", "phases", "private"])
def test_only_the_private_scope_refuses_what_it_does_not_compose_with(trait: str) -> None:
    class Other(Defense):
        about = replace(Defense.about, title="another", traits=frozenset({trait}))

    check_composition([DPSGD(), Other()])
    for order in ([DPSGD(scope="example"), Other()], [Other(), DPSGD(scope="example")]):
        with pytest.raises(ValueError, match="DP-SGD per example and another do not compose"):
            check_composition(order)
    assert "private" in DPSGD(scope="example").about.traits
    assert "private" not in DPSGD().about.traits
    assert replace(DPSGD(scope="example"), scope="batch").about is DPSGD.about


def test_private_zero_is_no_defense_bit_for_bit(few_digits: LabeledImages) -> None:
    off = DPSGD(clip=math.inf, sigma=0, scope="example")
    a, b = (fit(few_digits, make_convnet, recipe=RECIPE, defenses=d, streams=Streams(0)).model for d in ([off], []))
    assert all(torch.equal(a.state_dict()[name], value) for name, value in b.state_dict().items())


@pytest.mark.parametrize("name", ["tiny", "lenet", "convnet", "resnet18"])
def test_private_steps_are_those_of_a_loop_over_images(few_digits: LabeledImages, name: str) -> None:
    """Without noise, on every architecture, also for the last short batch, which is divided by the full size."""
    pytest.importorskip("opacus")
    data = few_digits.rows(torch.arange(20))

    def make_model(generator: torch.Generator) -> nn.Module:
        return make(generator, name, 4)

    recipe = replace(RECIPE, epochs=1, batch=16, augment=None)
    look = steps(data, DPSGD(clip=0.7, sigma=0, scope="example"), recipe=recipe, make_model=make_model)
    assert [len(x) for x, _, _ in look.batches] == [16, 4]
    model = per_example.without_batchnorm(make_model(torch.Generator()))
    for (x, y, weights), got in zip(look.batches, look.flat, strict=True):
        model.load_state_dict(weights)
        want = torch.cat([g.flatten() for g in clipped_step_slow(model, x, y, 0.7, 16)])
        assert float((got - want).norm()) < 1e-4 * float(want.norm())
    assert float(look.flat[0].norm()) <= 0.7 * (1 + 1e-5)


def test_one_image_moves_a_private_step_by_no_more_than_the_bound(few_digits: LabeledImages) -> None:
    """The point of it: another image and label in place of one, and a step changes by 2 C / B at most."""
    pytest.importorskip("opacus")
    data = few_digits.rows(torch.arange(32))
    recipe = Recipe(epochs=1, batch=32, lr=0.05, augment=None)
    x, y = data.x.clone(), data.y.clone()
    x[5], y[5] = 255 - x[5], (y[5] + 1) % 3
    other = LabeledImages(x, y, data.classes)
    for scope, bounded in (("example", True), ("batch", False)):
        defense = DPSGD(clip=0.1, sigma=0, scope=scope)  # type: ignore[arg-type]
        a, b = (steps(each, defense, recipe=recipe, make_model=make_convnet).flat[0] for each in (data, other))
        assert bool(float((a - b).norm()) <= 2 * 0.1 / 32 * 1.001) == bounded
        assert float((a - b).norm()) > 0


def test_private_training_replaces_batchnorm_keeps_learning_and_leaves_nothing_behind(
    few_digits: LabeledImages,
) -> None:
    pytest.importorskip("opacus")
    recipe = Recipe(epochs=8, batch=32, lr=0.2, augment=None)
    defense = DPSGD(clip=1.0, sigma=0.002, scope="example")
    fitted = fit(few_digits, make_convnet, recipe=recipe, defenses=[defense], streams=Streams(0))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fitted.model.modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in fitted.model.modules()) == 4
    right = (fitted.predictor(few_digits.pixels()) == few_digits.y).float().mean()
    assert float(right) > 0.8  # of three classes
    assert not hasattr(fitted.model, per_example.HANDLES)
    assert not any(hasattr(p, "grad_sample") for p in fitted.model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in fitted.model.modules())
    copy.deepcopy(fitted.model)(few_digits.pixels(slice(0, 2))).sum().backward()


def test_privacy_spent_is_reported_and_adds_up(few_digits: LabeledImages) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    defense = DPSGD(sigma=0.02, scope="example", delta=1e-3)
    fitted = fit(few_digits, make, recipe=RECIPE, defenses=[defense], streams=Streams(0))
    spent = [line["epsilon"] for line in fitted.history]
    accountant = accountants.RDPAccountant()
    for epoch in range(3):
        for _ in range(5):  # steps an epoch: 300 images, 64 a step
            accountant.step(noise_multiplier=0.02 * 64, sample_rate=64 / 300)
        assert math.isclose(spent[epoch], accountant.get_epsilon(1e-3), rel_tol=1e-9)
    assert float(fitted.memory[0]["epsilon"]) == spent[-1] > spent[0] > 0


def test_without_noise_no_privacy_is_claimed(few_digits: LabeledImages) -> None:
    pytest.importorskip("opacus")
    recipe = RECIPE.first(1)
    fitted = fit(few_digits, make, recipe=recipe, defenses=[DPSGD(sigma=0, scope="example")], streams=Streams(0))
    assert "epsilon" not in fitted.history[0]


@pytest.mark.parametrize("at", [2, 6, 11])
def test_private_training_resumes_to_the_same_bytes(few_digits: LabeledImages, tmp_path: Path, at: int) -> None:
    pytest.importorskip("opacus")
    defense = DPSGD(scope="example")

    def train(**more: object) -> object:
        return fit(few_digits, make_convnet, recipe=RECIPE, defenses=[defense], streams=Streams(0), **more)  # type: ignore[arg-type]

    with pytest.raises(Stop):
        train(checkpoint=tmp_path, checkpoint_seconds=0, progress=stop_at(at))
    state = torch.get_rng_state()
    resumed, whole = train(checkpoint=tmp_path, checkpoint_seconds=0), train()
    assert torch.equal(torch.get_rng_state(), state)
    weights = whole.model.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())  # type: ignore[attr-defined]
    assert [line["epsilon"] for line in resumed.history] == [line["epsilon"] for line in whole.history]  # type: ignore[attr-defined]


def test_private_training_composes_with_friends(few_digits: LabeledImages) -> None:
    """Friendly noise differentiates the network between steps, when nothing of Opacus may be attached to it."""
    pytest.importorskip("opacus")
    from friends.defenses import Friends

    defenses = [DPSGD(scope="example", sigma=0.001), Friends(def_epoch=1)]
    fitted = fit(few_digits, make_convnet, recipe=RECIPE, defenses=defenses, streams=Streams(0))
    assert int(fitted.memory[1]["friendly"].abs().max()) > 0


def test_a_frozen_batchnorm_that_still_mixes_images_is_refused(few_digits: LabeledImages) -> None:
    pytest.importorskip("opacus")
    from friends.models.classifier import transfer

    def make_transfer(bn: str) -> object:
        return lambda generator: transfer(make_convnet(generator), generator=generator, bn=bn)  # type: ignore[arg-type]

    private = [DPSGD(scope="example")]
    with pytest.raises(ValueError, match=r"'body\.1' is frozen but takes statistics of the batch"):
        fit(few_digits, make_transfer("batch"), recipe=RECIPE, defenses=private, streams=Streams(0))  # type: ignore[arg-type]
    fit(few_digits, make_transfer("running"), recipe=RECIPE, defenses=private, streams=Streams(0))  # type: ignore[arg-type]
