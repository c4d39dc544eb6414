"""FRIENDS as a defense: what is added when, to which row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.defenses import Friends
from friends.models import build
from friends.noise.coding import coder, decode
from friends.noise.friendly import FAST, PAPER
from friends.noise.picked import Coded
from friends.noise.store import NoiseStore
from friends.training import Defense, Recipe, Run, fit
from friends.types import Streams

RECIPE = Recipe(epochs=4, batch=64, lr=0.05, augment=None)


def make(generator: torch.Generator) -> torch.nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


class Look(Defense):
    """Comes after FRIENDS and keeps what it added, by epoch and row."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __repr__(self) -> str:
        return "Look()"

    def start_epoch(self, run: Run) -> None:
        self.seen.append(torch.zeros(len(run.data), *run.data.shape))

    def pixels(self, x: torch.Tensor, idx: torch.Tensor, run: Run) -> torch.Tensor:
        self.seen[-1][idx] = x
        return x


def emitted(data: LabeledImages, defense: Friends, recipe: Recipe = RECIPE) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What entered the model in each epoch, row by row, and the friendly noise in grey levels."""
    look = Look()
    fitted = fit(data, make, recipe=recipe, defenses=[defense, look], streams=Streams(0))
    return look.seen, fitted.memory[0].get("friendly", torch.zeros(0))


def test_random_noise_alone_before_def_epoch_and_both_from_then_on(few_digits: LabeledImages) -> None:
    mu, zeta = 16 / 255, 32 / 255
    seen, friendly = emitted(few_digits, Friends(zeta=zeta, mu=mu, def_epoch=2))
    clean = few_digits.pixels()
    noised = (clean + friendly.float() / 255).clamp(0, 1)
    assert int(friendly.abs().max()) <= 32
    assert float(friendly.float().abs().mean()) > 2
    for epoch in range(4):
        base = noised if epoch >= 2 else clean
        residual = seen[epoch] - base
        assert torch.allclose(residual.abs(), torch.full_like(residual, mu), atol=1e-6)  # exactly +-mu, not clamped
        assert abs(float(residual.sign().mean())) < 0.02
    assert float(seen[0].min()) < 0
    assert float(seen[0].max()) > 1
    signs = [(seen[e] - (noised if e >= 2 else clean)).sign() for e in range(4)]
    for a, b in ((0, 1), (2, 3)):
        assert 0.45 < float((signs[a] == signs[b]).float().mean()) < 0.55  # drawn anew


def test_friendly_only_adds_the_same_noise_in_every_epoch(few_digits: LabeledImages) -> None:
    seen, friendly = emitted(few_digits, Friends(mu=0, def_epoch=1))
    assert torch.equal(seen[0], few_digits.pixels())
    expected = (few_digits.pixels() + friendly.float() / 255).clamp(0, 1)
    assert torch.equal(seen[1], expected)
    assert torch.equal(seen[3], expected)


def test_shuffled_noise_is_that_of_other_images(few_digits: LabeledImages) -> None:
    _, own = emitted(few_digits, Friends(mu=0, def_epoch=1))
    seen, shuffled = emitted(few_digits, Friends(mu=0, def_epoch=1, held="shuffled"))
    assert not torch.equal(own, shuffled)
    place = {row.numpy().tobytes(): i for i, row in enumerate(own)}
    assert sorted(place[row.numpy().tobytes()] for row in shuffled) == list(range(len(own)))
    same = (own == shuffled).flatten(1).all(1)
    assert same.float().mean() < 0.1
    assert torch.equal(seen[1], (few_digits.pixels() + shuffled.float() / 255).clamp(0, 1))


def test_random_noise_that_is_held_is_a_corner_that_nobody_optimised(few_digits: LabeledImages) -> None:
    seen, noise = emitted(few_digits, Friends(mu=0, zeta=24 / 255, def_epoch=1, held="random"))
    assert noise.unique().tolist() == [-24, 24]
    assert abs(float(noise.float().mean())) < 0.5
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(seen[1], seen[3])


def test_one_bit_keeps_signs_and_the_mean_size(few_digits: LabeledImages) -> None:
    chosen = Friends(mu=0, def_epoch=1, settings=FAST)
    _, noise = emitted(few_digits, chosen)
    _, bits = emitted(few_digits, replace(chosen, kept="bits"))
    assert all(len(row.unique()) == 2 for row in bits)
    assert torch.equal(bits > 0, noise > 0)
    means = noise.float().abs().mean((1, 2, 3))
    assert (bits[:, 0, 0, 0].abs() - means).abs().max() <= 0.5
    coded = coder("bits", few_digits.shape, 16, 0)
    keys = np.arange(len(noise))
    parts = coded.encode(noise.flatten(1).numpy(), keys)
    kept = decode(coded, [Coded(Path("a shard"), parts)], keys * 0, keys, keys)
    assert torch.equal(torch.from_numpy(kept), bits.flatten(1))  # as a store of one bit a value has it


def test_noise_only_never_makes_friendly_noise(few_digits: LabeledImages) -> None:
    seen, friendly = emitted(few_digits, Friends(zeta=0, mu=8 / 255, random="uniform"))
    assert friendly.numel() == 0
    residual = seen[3] - few_digits.pixels()
    assert float(residual.abs().max()) <= 8 / 255 + 1e-6
    assert float(residual.std()) == pytest.approx(8 / 255 / 3**0.5, rel=0.02)


def test_zero_strength_is_no_defense_bit_for_bit(few_digits: LabeledImages) -> None:
    recipe = replace(RECIPE, augment=Recipe().augment)
    plain = fit(few_digits, make, recipe=recipe, streams=Streams(0)).model.state_dict()
    zero = fit(few_digits, make, recipe=recipe, defenses=[Friends(zeta=0, mu=0)], streams=Streams(0)).model.state_dict()
    assert all(torch.equal(plain[name], zero[name]) for name in plain)


def test_friendly_noise_is_friendlier_than_random_noise_of_its_size(digits: LabeledImages) -> None:
    """The effect that the method is named for, on a net that has learned: predictions survive it better."""
    data = digits.only_classes(["3", "5", "8"]).sample(900, torch.Generator().manual_seed(0))
    settings = replace(PAPER, zeta=48 / 255)
    defense = Friends(zeta=48 / 255, mu=0, def_epoch=5, settings=settings)
    fitted = fit(data, make, recipe=replace(RECIPE, epochs=6), defenses=[defense], streams=Streams(0))
    # judged by the model that it was made with, which the first five epochs give again
    model = fit(data, make, recipe=replace(RECIPE, epochs=6), streams=Streams(0)).model
    friendly = fitted.memory[0]["friendly"].float() / 255
    signs = torch.randint(2, friendly.shape, generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    with torch.no_grad():
        clean = model(data.pixels()).log_softmax(1)

        def divergence(noise: torch.Tensor) -> float:
            noisy = model((data.pixels() + noise).clamp(0, 1)).log_softmax(1)
            return float((noisy.exp() * (noisy - clean)).sum(1).mean())

        assert divergence(friendly) < 0.5 * divergence(signs * friendly.abs())


def test_noise_from_a_store_is_used_as_it_is(few_digits: LabeledImages, tmp_path: Path) -> None:
    proxy = make(torch.Generator().manual_seed(5))
    store = NoiseStore.generate(proxy, few_digits, tmp_path / "store", seed=3)
    defense = Friends(mu=0, def_epoch=0, store=str(tmp_path / "store"))
    seen, friendly = emitted(few_digits, defense)
    assert torch.equal(friendly, store.tensor("cpu"))
    assert torch.equal(seen[0], (few_digits.pixels() + friendly.float() / 255).clamp(0, 1))
    other = few_digits.rows(list(reversed(range(len(few_digits)))))
    with pytest.raises(ValueError, match=r"row 0"):
        fit(other, make, recipe=RECIPE, defenses=[defense], streams=Streams(0))
    with pytest.raises(ValueError, match="zeta"):
        fit(few_digits, make, recipe=RECIPE, defenses=[replace(defense, zeta=8 / 255)], streams=Streams(0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 16}, r"16/255"),
        ({"zeta": -0.1}, "zeta is in"),
        ({"zeta": 0.9}, "at most 127/255"),
        ({"random": "bernouli"}, "choose one of bernoulli"),
        ({"def_epoch": -1}, "counted from 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Friends(**settings)  # type: ignore[arg-type]


def test_a_def_epoch_that_never_comes_is_refused_before_training(few_digits: LabeledImages) -> None:
    with pytest.raises(ValueError, match="lower def_epoch"):
        fit(few_digits, make, recipe=RECIPE, defenses=[Friends(def_epoch=9)], streams=Streams(0))


def test_a_defense_remembers_nothing_between_trainings(few_digits: LabeledImages) -> None:
    defense = Friends(def_epoch=1)
    first = fit(few_digits, make, recipe=RECIPE, defenses=[defense], streams=Streams(0))
    fit(few_digits, make, recipe=RECIPE, defenses=[defense], streams=Streams(1))
    again = fit(few_digits, make, recipe=RECIPE, defenses=[defense], streams=Streams(0))
    assert torch.equal(first.memory[0]["friendly"], again.memory[0]["friendly"])


def other(name: str, generator: torch.Generator) -> torch.nn.Module:
    return build(name, shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), generator=generator)


def test_noise_may_be_made_with_another_architecture(few_digits: LabeledImages, tmp_path: Path) -> None:
    proxied = Friends(zeta=32 / 255, def_epoch=2, proxy="lenet", proxy_epochs=3, proxy_lr=0.02)
    given = {"recipe": RECIPE, "streams": Streams(0), "architectures": other, "artifacts": Artifacts(tmp_path)}
    fitted = fit(few_digits, make, defenses=[proxied], **given)  # type: ignore[arg-type]
    own = fit(few_digits, make, defenses=[Friends(zeta=32 / 255, def_epoch=2)], **given)  # type: ignore[arg-type]
    theirs = fitted.memory[0]["friendly"]
    assert not torch.equal(theirs, own.memory[0]["friendly"])
    assert int(theirs.abs().max()) <= 32
    kinds = [artifact.kind for artifact in Artifacts(tmp_path).list()]
    assert sorted(kinds) == ["noise", "noise", "probe"]  # both made once
    again = fit(few_digits, make, defenses=[proxied], **given)  # type: ignore[arg-type]
    assert again.shared_seconds > 0
    assert torch.equal(again.memory[0]["friendly"], theirs)
    assert [artifact.kind for artifact in Artifacts(tmp_path).list()] == kinds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"store": "noise", "proxy": "lenet"}, "from a store or from a proxy, not from 'noise' and 'lenet'"),
        ({"proxy": "lenet", "proxy_epochs": 0}, "proxy_epochs >= 1"),
        ({"proxy": "lenet", "proxy_lr": 0.0}, "proxy_lr > 0 expected"),
    ],
)
def test_a_proxy_that_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Friends(**settings)  # type: ignore[arg-type]
