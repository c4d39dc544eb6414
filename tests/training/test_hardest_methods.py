"""The contracts carry the hardest methods: each is played here in small, by a stand-in with the same demands.

Sleeper Agent retrains its surrogate on its own poisons, MetaPoison unrolls staggered surrogates, adversarial
poisoning crafts inside the step, EPIC drops rows for good, ABL changes phase, STRIP abstains, filters train a probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from friends.attacks.base import Surrogate
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, Patch, PoisonedDataset
from friends.models import build
from friends.training import ABSTAIN, Defense, Recipe, Run, accuracy, fit, success
from friends.training.defense import Predictor
from friends.training.recipe import sgd
from friends.types import Progress, Streams, silent
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=4, batch=64, lr=0.05, augment=None)


def make(generator: torch.Generator) -> nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def weights_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def resumes_to_the_same_bytes(data: LabeledImages, defense: Defense, tmp_path: Path, at: int, recipe: Recipe) -> None:
    """Interrupt at every step of a training, resume, and compare with one that ran through."""
    whole = fit(data, make, recipe=recipe, defenses=[defense], streams=Streams(0))

    with pytest.raises(Stop):
        fit(
            data,
            make,
            recipe=recipe,
            defenses=[defense],
            streams=Streams(0),
            checkpoint=tmp_path,
            checkpoint_seconds=0,
            progress=stop_at(at),
        )
    resumed = fit(
        data, make, recipe=recipe, defenses=[defense], streams=Streams(0), checkpoint=tmp_path, checkpoint_seconds=0
    )
    assert weights_equal(whole.model, resumed.model)
    assert torch.equal(whole.keep, resumed.keep)
    assert len(whole.history) == len(resumed.history)


@dataclass(frozen=True)
class PhaseChange(Defense):
    """Like ABL: another loss and no augmentation first, then isolate rows, take a new optimizer, and finally ascend."""

    turn: int = 2
    ascend: int = 3

    def before_training(self, data: LabeledImages, run: Run) -> None:
        run.augment = False
        run.epochs = 5  # one more than the recipe has

    def start_epoch(self, run: Run) -> None:
        if run.epoch == self.turn:
            run.model.eval()
            with torch.no_grad():
                losses = F.cross_entropy(run.model(run.data.pixels()), run.data.y, reduction="none")
            run.memory(self)["isolated"] = losses.argsort()[:10]
            run.keep = torch.ones_like(run.keep)
            run.keep[run.memory(self)["isolated"]] = False
            run.augment = True
            self.resume(run)

    def resume(self, run: Run) -> None:
        if "isolated" in run.memory(self):
            run.optimizer = torch.optim.Adam(run.model.parameters())
            run.schedule = lambda epoch: 1e-3

    def loss(self, logits: torch.Tensor, y: torch.Tensor, run: Run) -> torch.Tensor:
        loss = F.cross_entropy(logits, y)
        if run.epoch < self.turn:
            return (loss - 0.5).abs() + 0.5
        return -0.01 * loss if run.epoch >= self.ascend else loss


@pytest.mark.parametrize("at", [1, 8, 12, 17, 23])
def test_a_defense_with_phases_resumes_in_its_phase(few_digits: LabeledImages, tmp_path: Path, at: int) -> None:
    resumes_to_the_same_bytes(few_digits, PhaseChange(), tmp_path, at, Recipe(epochs=4, batch=64, lr=0.05))


def test_a_phase_changes_rows_length_optimizer_and_augmentation(few_digits: LabeledImages) -> None:
    fitted = fit(few_digits, make, recipe=RECIPE, defenses=[PhaseChange()], streams=Streams(0))
    assert [line["kept"] for line in fitted.history] == [300, 300, 290, 290, 290]
    assert fitted.history[-1]["lr"] == 1e-3
    assert sorted(fitted.memory[0]["isolated"].tolist()) == (~fitted.keep).nonzero().flatten().tolist()


class Dropper(Defense):
    """Like EPIC: every epoch drops the rows of largest loss, for good."""

    def start_epoch(self, run: Run) -> None:
        run.model.eval()
        with torch.no_grad():
            losses = F.cross_entropy(run.model(run.data.pixels()), run.data.y, reduction="none")
        run.keep &= losses < losses.sort().values[-5]


def test_dropped_rows_never_return_also_after_a_resume(few_digits: LabeledImages, tmp_path: Path) -> None:
    kept = [
        line["kept"] for line in fit(few_digits, make, recipe=RECIPE, defenses=[Dropper()], streams=Streams(0)).history
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0] < 300
    resumes_to_the_same_bytes(few_digits, Dropper(), tmp_path, 13, RECIPE)


class Crafter(Defense):
    """Like adversarial poisoning: a double backward through the model in eval mode, inside the step."""

    def batch(self, x: torch.Tensor, y: torch.Tensor, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        run.model.eval()
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        half = len(x) // 2
        delta = torch.zeros_like(x[:half]).requires_grad_()
        ours = torch.autograd.grad(
            F.cross_entropy(run.model(x[:half] + delta), y[:half]), parameters, create_graph=True
        )
        theirs = torch.autograd.grad(F.cross_entropy(run.model(x[half:]), y[half:]), parameters)
        match = sum((a * b).sum() for a, b in zip(ours, theirs, strict=True))
        (gradient,) = torch.autograd.grad(match, delta)
        run.model.train()
        assert float(gradient.abs().max()) > 0
        soft = F.one_hot(y, 3).float()  # soft labels, and a batch of another size
        return torch.cat([x[:half] + gradient.sign() / 255, x[half:], x[:1]]), torch.cat([soft, soft[:1]])


def test_crafting_inside_the_step_and_soft_labels(few_digits: LabeledImages) -> None:
    fitted = fit(few_digits, make, recipe=RECIPE, defenses=[Crafter()], streams=Streams(0))
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]


@dataclass(frozen=True)
class Doubter(Defense):
    """Like STRIP: calibrates on clean data after training, and refuses to answer when unsure."""

    rate: float = 0.1

    def after_training(self, run: Run) -> Predictor:
        assert run.clean is not None
        model = run.model.eval()
        with torch.no_grad():
            threshold = model(run.clean.pixels()).softmax(1).amax(1).quantile(self.rate)

        def predict(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                p = model(x).softmax(1)
            return torch.where(p.amax(1) < threshold, ABSTAIN, p.argmax(1))

        return predict


def test_an_abstention_is_neither_right_nor_a_success(few_digits: LabeledImages) -> None:
    recipe = Recipe(epochs=4, batch=64, lr=0.05, augment=None)
    fitted = fit(few_digits, make, recipe=recipe, defenses=[Doubter()], streams=Streams(0), clean=few_digits)
    judged = accuracy(fitted.predictor, few_digits)
    assert judged.abstained == pytest.approx(30, abs=3)
    assert judged.strict < judged.selective
    assert judged.strict <= 0.91
    refused = few_digits.pixels()[fitted.predictor(few_digits.pixels()) == ABSTAIN]
    answer = fitted.model(refused).argmax(1)
    goal = Goal(refused, (answer + 1) % 3, answer)
    assert not bool(success(fitted.predictor, goal).any())


class ProbeFilter(Defense):
    """Like every filter: trains a model on the poisoned data, drops what it finds odd, trains anew."""

    def before_training(self, data: LabeledImages, run: Run) -> None:
        probe = run.probe(epochs=1)
        with torch.no_grad():
            losses = F.cross_entropy(probe(data.pixels()), data.y, reduction="none")
        run.keep[losses.argsort()[-30:]] = False


def test_a_filter_trains_a_probe_of_its_own(few_digits: LabeledImages, tmp_path: Path) -> None:
    start = make(Streams(0)("weights"))
    seen: list[bool] = []

    class Spy(ProbeFilter):
        def start_epoch(self, run: Run) -> None:
            if run.epoch == 0:
                seen.append(weights_equal(run.model, start))

    fitted = fit(few_digits, make, recipe=RECIPE, defenses=[Spy()], streams=Streams(0))
    assert seen == [True]  # the probe did not touch the victim's own start
    assert int(fitted.keep.sum()) == 270
    resumes_to_the_same_bytes(few_digits, ProbeFilter(), tmp_path, 9, RECIPE)


def surrogate_of(data: LabeledImages, log: list[tuple[int, int | None, bool]]) -> Surrogate:
    def train(
        data: LabeledImages, *, index: int = 0, epochs: int | None = None, start: nn.Module | None = None
    ) -> nn.Module:
        log.append((index, epochs, start is not None))
        recipe = Recipe(epochs=1 if epochs is None else epochs, batch=64, lr=0.05, augment=None)
        return fit(data, make, recipe=recipe, streams=Streams(99).child(index)).model

    return train


@dataclass(frozen=True)
class SleeperLike:
    """Selects poisons by gradient norm, patches the source images, and retrains its surrogate on its own poisons."""

    poisons: int = 5

    def __call__(
        self, train: LabeledImages, goal: Goal, *, surrogate: Surrogate, streams: Streams, progress: Progress = silent
    ) -> PoisonedDataset:
        assert goal.trigger is not None
        source, wanted = int(goal.y_true[0]), int(goal.y_wanted[0])
        model = surrogate(train)
        rows = (train.y == wanted).nonzero().flatten()
        norms = torch.stack([self._norm(model, train.pixels(r[None]), train.y[r[None]]) for r in rows[:40]])
        chosen = rows[norms.argsort(descending=True)[: self.poisons]]
        patched = goal.trigger(train.pixels(train.y == source), streams("patch"))
        assert not torch.equal(patched, train.pixels(train.y == source))
        x = train.x.clone()
        for phase in range(2):
            x[chosen] = (x[chosen].short() + 4).clamp(0, 255).to(torch.uint8)
            model = surrogate(LabeledImages(x, train.y, train.classes), index=phase + 1)
        return PoisonedDataset(LabeledImages(x, train.y, train.classes, train.name), chosen, goal)

    @staticmethod
    def _norm(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads]).norm()


def test_an_attack_may_retrain_its_surrogate_on_its_poisons(few_digits: LabeledImages) -> None:
    clean = few_digits.pixels(few_digits.y == 0)[:20]
    trigger = Patch(torch.ones(1, 4, 4))
    m = len(clean)
    goal = Goal(
        trigger(clean, torch.Generator().manual_seed(0)),
        torch.zeros(m, dtype=torch.int64),
        torch.ones(m, dtype=torch.int64),
        trigger,
    )
    log: list[tuple[int, int | None, bool]] = []
    poisoned = SleeperLike()(few_digits, goal, surrogate=surrogate_of(few_digits, log), streams=Streams(0))
    poisoned.check(few_digits, xi=8 / 255, budget=5)
    assert [entry[0] for entry in log] == [0, 1, 2]


def test_an_attack_may_unroll_staggered_surrogates(few_digits: LabeledImages) -> None:
    """Like MetaPoison: models of different ages, and the gradient of a loss after K steps of training."""
    log: list[tuple[int, int | None, bool]] = []
    surrogate = surrogate_of(few_digits, log)
    ages = [surrogate(few_digits, index=m, epochs=m) for m in range(3)]
    assert [entry[:2] for entry in log] == [(0, 0), (1, 1), (2, 2)]
    delta = torch.zeros(8, 1, 28, 28, requires_grad=True)
    x, y = few_digits.pixels(slice(0, 8)), few_digits.y[:8]
    total = torch.zeros(())
    for model in ages:
        weights = dict(model.named_parameters())
        for _ in range(2):
            loss = F.cross_entropy(functional_call(model, weights, (x + delta,)), y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        total = total + F.cross_entropy(functional_call(model, weights, (x[:1],)), 1 - y[:1].clamp(max=1))
    (gradient,) = torch.autograd.grad(total, delta)
    assert float(gradient.abs().max()) > 0


def test_a_probe_may_be_defended_and_partial(few_digits: LabeledImages, tmp_path: Path) -> None:
    sizes: list[int] = []

    class Half(Defense):
        def before_training(self, data: LabeledImages, run: Run) -> None:
            keep = torch.arange(len(data)) % 2 == 0

            class Count(Defense):
                def before_training(self, data: LabeledImages, run: Run) -> None:
                    sizes.append(len(data))

            run.probe(keep=keep, epochs=1, defenses=[Count()])
            run.probe(keep=~keep, epochs=1, defenses=[Count()])
            run.probe(epochs=2, defenses=[Count()])

    fit(few_digits, make, recipe=RECIPE, defenses=[Half()], streams=Streams(0), checkpoint=tmp_path)
    assert sizes == [150, 150, 300]


def test_a_defense_cannot_see_poisons_or_goal() -> None:
    """The threat model is in the types: neither the hooks nor ``fit`` have a place for what only the attacker knows."""
    import inspect

    surfaces: Sequence[object] = [fit, Run, *(f for n, f in vars(Defense).items() if callable(f) and n != "__init__")]
    for surface in surfaces:
        signature = inspect.signature(surface)
        for parameter in signature.parameters.values():
            words = f"{parameter.name} {parameter.annotation}".lower()
            assert "poison" not in words, (surface, parameter)
            assert "goal" not in words, (surface, parameter)


def test_sgd_refuses_a_model_without_trainable_parameters() -> None:
    model = make(torch.Generator().manual_seed(0)).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        sgd(model, RECIPE)
