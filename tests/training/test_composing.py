"""What defenses may ask of a training beside its data: companions that fit, clean images, and shared probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.models import build
from friends.training import About, Defense, Recipe, Run, fit
from friends.training.defense import check_composition
from friends.types import Streams
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=3, batch=64, lr=0.05, augment=None)


def make(generator: torch.Generator) -> nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def another(name: str, generator: torch.Generator) -> nn.Module:
    return build(name, shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), generator=generator)


@dataclass(frozen=True)
class Mixer(Defense):
    about: ClassVar[About] = About(title="Mixer", paper="", traits=frozenset({"mixes"}))


@dataclass(frozen=True)
class Private(Defense):
    about: ClassVar[About] = About(title="Private", paper="", clashes={"mixes": "an image would act on two gradients"})


@dataclass(frozen=True)
class Crafter(Defense):
    about: ClassVar[About] = About(title="Crafter", paper="", not_after={"mixes": "its labels are soft by then"})


@dataclass(frozen=True)
class Needy(Defense):
    budget: float = 0.02
    about: ClassVar[About] = About(title="Needy", paper="", clean=True, told=("budget",))


def test_a_clash_is_refused_in_either_order_with_its_reason() -> None:
    for both in ([Mixer(), Private()], [Private(), Mixer()]):
        with pytest.raises(ValueError, match="Private and Mixer do not compose: an image would act on two gradients"):
            check_composition(both)


def test_an_order_may_be_refused_where_the_other_one_is_fine() -> None:
    check_composition([Crafter(), Mixer()])
    with pytest.raises(ValueError, match="Crafter and Mixer do not compose in this order: its labels are soft"):
        check_composition([Mixer(), Crafter()])


def test_a_clash_is_told_before_anything_is_trained(few_digits: LabeledImages) -> None:
    def never(generator: torch.Generator) -> nn.Module:
        raise AssertionError("a model was made")

    with pytest.raises(ValueError, match="do not compose"):
        fit(few_digits, never, recipe=RECIPE, defenses=[Mixer(), Private()], streams=Streams(0))
    with pytest.raises(ValueError, match="Needy needs clean images"):
        fit(few_digits, never, recipe=RECIPE, defenses=[Needy()], streams=Streams(0))
    with pytest.raises(ValueError, match="Needy needs clean images"):
        fit(few_digits, never, recipe=RECIPE, defenses=[Needy()], streams=Streams(0), clean=few_digits.rows([]))


def test_a_defense_tells_what_it_is_told() -> None:
    assert Needy(budget=0.1).told() == {"budget": 0.1}
    assert Mixer().told() == {}


@dataclass(frozen=True)
class Filter(Defense):
    """Removes the rows that its probe is least sure of."""

    count: int = 20

    def before_training(self, data: LabeledImages, run: Run) -> None:
        with torch.no_grad():
            loss = nn.functional.cross_entropy(run.probe()(data.pixels()), data.y, reduction="none")
        run.keep[loss.argsort()[-self.count :]] = False


def test_filters_share_a_probe_and_remove_what_they_would_have_alone(few_digits: LabeledImages, tmp_path: Path) -> None:
    alone = fit(few_digits, make, recipe=RECIPE, defenses=[Filter()], streams=Streams(0))
    first = fit(few_digits, make, recipe=RECIPE, defenses=[Filter()], streams=Streams(0), artifacts=Artifacts(tmp_path))
    trained: list[str] = []

    def listen(what: str, done: int, total: int, note: str = "", /) -> None:
        trained.append(what)

    second = fit(
        few_digits,
        make,
        recipe=RECIPE,
        defenses=[Filter(30)],
        streams=Streams(0),
        artifacts=Artifacts(tmp_path),
        progress=listen,
    )
    assert "probe" not in trained
    assert first.shared_seconds == 0
    assert second.shared_seconds > 0
    assert torch.equal(alone.keep, first.keep)
    assert bool((~second.keep)[~first.keep].all())  # the same probe ranks the same rows last
    assert int((~second.keep).sum()) == 30
    assert len(Artifacts(tmp_path).list()) == 1


def test_a_probe_of_other_data_recipe_or_seed_is_another_one(few_digits: LabeledImages, tmp_path: Path) -> None:
    fit(few_digits, make, recipe=RECIPE, defenses=[Filter()], streams=Streams(0), artifacts=Artifacts(tmp_path))
    fit(
        few_digits.rows(range(200)),
        make,
        recipe=RECIPE,
        defenses=[Filter()],
        streams=Streams(0),
        artifacts=Artifacts(tmp_path),
    )
    fit(few_digits, make, recipe=RECIPE, defenses=[Filter()], streams=Streams(1), artifacts=Artifacts(tmp_path))
    longer = Recipe(epochs=4, batch=64, lr=0.05, augment=None)
    fit(few_digits, make, recipe=longer, defenses=[Filter()], streams=Streams(0), artifacts=Artifacts(tmp_path))
    assert len(Artifacts(tmp_path).list()) == 4


def test_a_probe_that_starts_from_other_weights_is_another_one(few_digits: LabeledImages, tmp_path: Path) -> None:
    """As in transfer learning, where the network is pretrained and the random streams do not say how."""

    def pretrained(generator: torch.Generator) -> nn.Module:
        model = make(generator)
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        return model

    alone = fit(few_digits, pretrained, recipe=RECIPE, defenses=[Filter()], streams=Streams(0))
    fit(few_digits, make, recipe=RECIPE, defenses=[Filter()], streams=Streams(0), artifacts=Artifacts(tmp_path))
    other = fit(
        few_digits, pretrained, recipe=RECIPE, defenses=[Filter()], streams=Streams(0), artifacts=Artifacts(tmp_path)
    )
    assert other.shared_seconds == 0
    assert torch.equal(other.keep, alone.keep)


def test_what_a_shared_probe_cost_survives_a_kill(few_digits: LabeledImages, tmp_path: Path) -> None:
    given = {"recipe": RECIPE, "streams": Streams(0), "artifacts": Artifacts(tmp_path / "shared")}
    first = fit(few_digits, make, defenses=[Filter()], **given)  # type: ignore[arg-type]
    with pytest.raises(Stop):
        fit(few_digits, make, defenses=[Filter(30)], checkpoint=tmp_path / "c", checkpoint_seconds=0,
            progress=stop_at(7), **given)  # type: ignore[arg-type] # fmt: skip
    resumed = fit(few_digits, make, defenses=[Filter(30)], checkpoint=tmp_path / "c", **given)  # type: ignore[arg-type]
    assert first.seconds > resumed.shared_seconds > 0


def test_a_damaged_probe_is_refused_by_name(few_digits: LabeledImages, tmp_path: Path) -> None:
    fit(few_digits, make, recipe=RECIPE, defenses=[Filter()], streams=Streams(0), artifacts=Artifacts(tmp_path))
    (probe,) = Artifacts(tmp_path).list()
    file = probe.file("model.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=file.name):
        fit(few_digits, make, recipe=RECIPE, defenses=[Filter(30)], streams=Streams(0), artifacts=Artifacts(tmp_path))


class Proxied(Defense):
    """Asks for a proxy of another architecture."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __repr__(self) -> str:
        return "Proxied()"

    def before_training(self, data: LabeledImages, run: Run) -> None:
        proxy = run.probe(name="proxy", architecture="lenet", epochs=1, lr=0.02)
        self.seen.append(type(getattr(proxy, "body", proxy)).__name__)
        assert sum(p.numel() for p in proxy.parameters()) != sum(p.numel() for p in run.model.parameters())


def test_a_proxy_of_another_architecture(few_digits: LabeledImages) -> None:
    defense = Proxied()
    fit(few_digits, make, recipe=RECIPE, defenses=[defense], streams=Streams(0), architectures=another)
    assert len(defense.seen) == 1
    with pytest.raises(ValueError, match="architectures"):
        fit(few_digits, make, recipe=RECIPE, defenses=[Proxied()], streams=Streams(0))


def test_removed_rows_may_be_told_apart_from_rows_not_trained_on(few_digits: LabeledImages) -> None:
    class Unlearner(Defense):
        """Like ABL: in the end it trains on what it isolated, and on nothing else."""

        def start_epoch(self, run: Run) -> None:
            if run.epoch == 2:
                run.keep = torch.arange(len(run.data)) < 10
                run.memory(self)["removed"] = run.keep.clone()

    fitted = fit(few_digits, make, recipe=RECIPE, defenses=[Unlearner()], streams=Streams(0))
    assert fitted.removed.nonzero().flatten().tolist() == list(range(10))
    plain = fit(few_digits, make, recipe=RECIPE, defenses=[Filter()], streams=Streams(0))
    assert torch.equal(plain.removed, ~plain.keep)
