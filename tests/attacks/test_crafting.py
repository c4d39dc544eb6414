"""The outer loop, against a slow one: one goal or several, killed anywhere, and with an adaptive attacker's noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attacks_slow import descend
from torch import Tensor

from friends.attacks import halfway
from friends.attacks.adaptive import Adaptive
from friends.attacks.crafting import Crafted, Job, Loop, craft, craft_many, poison_gradient
from friends.attacks.halfway import Halfway
from friends.attacks.pixels import PixelAdam, initial_delta, project
from friends.data.augment import Augment
from friends.types import Progress, Streams, silent
from interrupting import Stop, stop_at

XI = 16 / 255
MOMENTS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
STD = torch.tensor(MOMENTS[1], dtype=torch.float64).view(1, 3, 1, 1)
MEAN = torch.tensor(MOMENTS[0], dtype=torch.float64).view(1, 3, 1, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def loop(**changes: object) -> Loop:
    plain = {"xi": XI, "steps": 8, "restarts": 1, "tau": 0.1, "augment": None, "start": "randn"}
    return Loop(**{**plain, **changes})  # type: ignore[arg-type]


# --- the loop ---


def curved(x: Tensor) -> Tensor:
    """A smooth objective with a gradient of its own for every pixel."""
    weight = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    return ((x * weight).sum((1, 2, 3)) ** 2).mean() + (x * weight.flip(2)).sin().mean()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("augment", [None, Augment()])
def test_the_loop_is_the_slow_one(signed: bool, augment: Augment | None) -> None:
    base, streams = random(3, 3, 8, 8), Streams(1)
    settings = loop(steps=8, augment=augment, signed=signed, start="randn" if signed else "clean")

    def score(pixels: Tensor, step: int) -> Tensor:
        if augment is not None:
            pixels = augment(pixels, streams("augment", 0, step), MOMENTS[0])
        return curved(pixels)

    start = initial_delta(base, XI, settings.start, streams("init", 0))
    slow = descend(score, base, start, mean=MEAN, std=STD, xi=XI, tau=0.1, steps=8, signed=signed)
    ours = craft(base, [curved], settings, moments=MOMENTS, streams=streams).delta
    assert (ours - start).abs().max() > 0.5 * XI
    assert torch.allclose(ours, slow, atol=1e-7)


def test_the_gradient_flows_through_the_augmentation() -> None:
    base, delta = random(2, 3, 8, 8), 0.1 * (random(2, 3, 8, 8, seed=1) - 0.5)

    def whole(d: Tensor) -> Tensor:
        return curved(Augment()(base + d, Streams(7)("augment", 0, 0), MOMENTS[0]))

    score, gradient = poison_gradient(base, delta, [curved], loop(augment=Augment()), Streams(7), MOMENTS[0])
    assert score == pytest.approx(float(whole(delta)))
    for place in [(0, 0, 4, 4), (1, 2, 3, 5), (1, 1, 0, 0)]:
        step = torch.zeros_like(delta)
        step[place] = 1e-5
        numeric = float(whole(delta + step) - whole(delta - step)) / 2e-5
        assert float(gradient[place]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_augmentation_is_fresh_for_each_image_step_and_restart() -> None:
    seen: list[Tensor] = []

    def watching(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.sum() * 0

    base = random(1, 3, 8, 8).expand(3, 3, 8, 8)
    craft(base, [watching], loop(steps=2, restarts=2, augment=Augment(), start="clean", xi=1 / 255),
          moments=MOMENTS, streams=Streams(0))  # fmt: skip
    views = torch.cat(seen)
    assert len(views) == 12
    for i in range(12):
        for j in range(i):
            assert (views[i] - views[j]).abs().max() > 0.05


def test_what_is_shifted_in_is_the_mean_colour() -> None:
    corners: list[Tensor] = []

    def watching(x: Tensor) -> Tensor:
        corners.append(x.detach()[:, :, ::7, ::7])
        return x.sum() * 0

    craft(torch.ones(64, 3, 8, 8, dtype=torch.float64), [watching], loop(steps=1, augment=Augment(), start="clean"),
          moments=MOMENTS, streams=Streams(0))  # fmt: skip
    darkest = torch.cat(corners).amin((0, 2, 3))
    assert torch.allclose(darkest, torch.tensor(MOMENTS[0], dtype=torch.float64), atol=1e-6)


def test_surrogates_see_the_same_poisons_their_gradients_add_and_their_scores_average() -> None:
    base, delta, seen = random(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.float64), list[Tensor]()

    def other(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return 3 * (x**2).sum()

    def third(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return curved(x)

    both = poison_gradient(base, delta, [other, third], loop(augment=Augment()), Streams(0), MOMENTS[0])
    alone = [poison_gradient(base, delta, [f], loop(augment=Augment()), Streams(0), MOMENTS[0]) for f in (other, third)]
    assert torch.equal(seen[0], seen[1])
    assert both[0] == pytest.approx((alone[0][0] + alone[1][0]) / 2)
    assert torch.allclose(both[1], alone[0][1] + alone[1][1])


def test_more_poisons_than_a_batch_are_done_in_turn_before_one_step() -> None:
    base = random(5, 3, 8, 8)
    score, gradient = poison_gradient(base, torch.zeros_like(base), [curved], loop(batch=2), Streams(0), MOMENTS[0])
    parts = [poison_gradient(part, torch.zeros_like(part), [curved], loop(), Streams(0), MOMENTS[0])
             for part in base.split(2)]  # fmt: skip
    assert score == pytest.approx(sum(part[0] for part in parts) / 3)
    assert torch.allclose(gradient, torch.cat([part[1] for part in parts]))


def test_the_restart_with_the_lowest_last_score_is_kept() -> None:
    base, streams, settings = random(2, 3, 8, 8), Streams(3), loop(steps=1, restarts=5)

    def score(x: Tensor) -> Tensor:
        return (x - base).mean()

    result = craft(base, [score], settings, moments=MOMENTS, streams=streams)
    starts = [initial_delta(base, XI, "randn", streams("init", restart)) for restart in range(5)]
    assert result.last == pytest.approx([float(start.mean()) for start in starts])
    best = min(range(5), key=lambda i: result.last[i])
    step = PixelAdam(STD, signed=True).step(starts[best], torch.full_like(base, 1 / base.numel()), 0.1)
    assert torch.allclose(result.delta, project(step, base, XI), atol=1e-7)


def test_every_restart_begins_anew() -> None:
    base, settings = random(2, 3, 8, 8), loop(steps=6, restarts=2)
    for seed in range(9):
        streams = Streams(seed)
        result = craft(base, [curved], settings, moments=MOMENTS, streams=streams)
        if result.last[1] < result.last[0]:  # the second restart was kept
            break
    start = initial_delta(base, XI, "randn", streams("init", 1))
    slow = descend(lambda x, _: curved(x), base, start, mean=MEAN, std=STD, xi=XI, tau=0.1, steps=6, signed=True)
    assert torch.allclose(result.delta, slow, atol=1e-7)


def test_progress_counts_every_step_of_every_restart() -> None:
    told: list[tuple[str, int, int]] = []
    craft(random(1, 3, 8, 8), [curved], loop(steps=3, restarts=2), moments=MOMENTS, streams=Streams(0),
          progress=lambda what, done, total, note="": told.append((what, done, total)), what="test")  # fmt: skip
    assert told == [("test", done, 6) for done in range(1, 7)]


def test_a_score_that_is_not_finite_stops_the_attack() -> None:
    with pytest.raises(ValueError, match="the objective became nan"):
        craft(random(1, 3, 8, 8), [lambda x: x.sum() * math.nan], loop(), moments=MOMENTS, streams=Streams(0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("xi", 16, r"xi is in \[1/255, 1\] pixel units, not 16; did you mean 16/255"),
        ("xi", 0.001, "xi is in"),
        ("steps", 0, "steps must be at least 1, not 0"),
        ("restarts", 0, "restarts must be at least 1"),
        ("batch", 0, "batch must be at least 1"),
        ("tau", 0.0, "tau, the step size, must be positive"),
        ("start", "zero", "unknown start 'zero'; choose one of randn, clean"),
        ("tau", float("nan"), "tau, the step size, must be positive"),
    ],
)
def test_impossible_settings_are_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**{setting: value})


@pytest.mark.usefixtures("unchecked")
def test_nothing_to_craft_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to craft"):
        craft_many([], [], loop(), moments=MOMENTS)
    with pytest.raises(ValueError, match="nothing to craft"):
        craft(random(0, 3, 8, 8), [curved], loop(), moments=MOMENTS, streams=Streams(0))


# --- several goals at once ---


def joint(*objectives: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """Every goal's own objective, for its own poisons."""
    return lambda poisons: torch.stack([f(x) for f, x in zip(objectives, poisons, strict=True)])


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: factor * curved(x) - (1 - factor) * (x**3).mean()


@pytest.mark.parametrize("batch", [512, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("adapt", [None, Adaptive(mu=8 / 255, draws=2)], ids=["plain", "adaptive"])
def test_goals_crafted_together_are_what_each_is_alone(batch: int, signed: bool, adapt: Adaptive | None) -> None:
    own = [scaled(factor) for factor in (0.2, 0.9, -0.5)]
    jobs = [Job(random(3, 3, 8, 8, seed=g), Streams(g)) for g in range(3)]
    start = "randn" if signed else "clean"
    settings = loop(restarts=2, augment=Augment(), batch=batch, signed=signed, start=start, adapt=adapt)
    together = craft_many(jobs, [joint(*own), joint(*own[::-1])], settings, moments=MOMENTS)
    for g, job in enumerate(jobs):
        alone = craft(job.base, [own[g], own[2 - g]], settings, moments=MOMENTS, streams=job.streams)
        assert torch.allclose(together[g].delta, alone.delta, atol=1e-9)
        assert together[g].first == pytest.approx(alone.first)
        assert together[g].last == pytest.approx(alone.last)
        assert alone.delta.abs().max() > XI / 2


def test_every_goal_keeps_its_own_best_restart() -> None:
    bases = [random(2, 3, 8, 8, seed=g) for g in range(4)]
    jobs = [Job(base, Streams(g)) for g, base in enumerate(bases)]
    own = [(lambda x, base=base: (x - base).mean()) for base in bases]
    found = craft_many(jobs, [joint(*own)], loop(steps=1, restarts=4), moments=MOMENTS)
    kept = [min(range(4), key=one.last.__getitem__) for one in found]
    assert len(set(kept)) > 1
    for g, one in enumerate(found):
        start = initial_delta(bases[g], XI, "randn", Streams(g)("init", kept[g]))
        step = PixelAdam(STD, signed=True).step(start, torch.ones_like(start), 0.1)
        assert torch.allclose(one.delta, project(step, bases[g], XI), atol=1e-7)


def test_goals_of_different_sizes_are_refused() -> None:
    jobs = [Job(random(n, 3, 8, 8), Streams(0)) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"need equally many poisons, not \[2, 3\]"):
        craft_many(jobs, [joint(curved, curved)], loop(), moments=MOMENTS)


def test_no_more_poisons_of_a_goal_than_a_batch_are_seen_at_once() -> None:
    seen: list[list[int]] = []

    def watching(poisons: list[Tensor]) -> Tensor:
        seen.append([len(x) for x in poisons])
        return torch.stack([curved(x) for x in poisons])

    jobs = [Job(random(7, 3, 8, 8, seed=g), Streams(g)) for g in range(2)]
    adapt = Adaptive(mu=0.1, draws=2)
    craft_many(jobs, [watching], loop(steps=1, batch=3, adapt=adapt), moments=MOMENTS)
    assert seen == [[3, 3]] * 4 + [[1, 1]] * 2


# --- surrogates that change on the way ---


def test_objectives_may_change_before_a_step_and_stay_changed() -> None:
    base, asked = random(2, 3, 8, 8), list[tuple[int, int]]()

    def before_step(place: tuple[int, int], delta: Tensor) -> list[Callable[[Tensor], Tensor]] | None:
        assert delta.shape == base.shape
        asked.append(place)
        return {(0, 0): [lambda x: x.sum() * 0 + 1], (0, 2): [lambda x: x.sum() * 0 + 2]}.get(place)

    settings = loop(steps=3, restarts=2, start="clean")
    found = craft(base, [], settings, moments=MOMENTS, streams=Streams(0), before_step=before_step)
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert found.first == [1, 2]
    assert found.last == [2, 2]


# --- killed ---


def kept(folder: Path | None, progress: Progress = silent, signed: bool = True) -> list[Crafted]:
    """A crafting of two goals, two restarts of four steps each, adaptive and augmented."""
    jobs = [Job(random(3, 3, 8, 8, seed=g), Streams(g), 0.05 * random(3, 3, 8, 8, seed=9)) for g in range(2)]
    settings = loop(steps=4, restarts=2, augment=Augment(), adapt=Adaptive(mu=0.05, draws=2), batch=2, signed=signed,
                    start="randn" if signed else "clean")  # fmt: skip
    where = Halfway(folder, "me") if folder else None
    own = joint(scaled(0.2), scaled(0.9))
    return craft_many(jobs, [own], settings, moments=MOMENTS, halfway=where, progress=progress, what="test")


def same(a: list[Crafted], b: list[Crafted]) -> bool:
    return all(
        torch.equal(x.delta, y.delta) and (x.first, x.last) == (y.first, y.last) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_crafting_killed_at_any_step_goes_on_to_the_same_bits(
    step: int, signed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    whole = kept(None, signed=signed)
    with pytest.raises(Stop):
        kept(tmp_path, stop_at(step, "test"), signed)
    told: list[int] = []
    again = kept(tmp_path, lambda what, done, total, note="", /: told.append(done), signed)
    assert same(again, whole)
    assert told == list(range(step, 9))  # what was written before the kill is not done again


def test_a_finished_crafting_is_read_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    whole = kept(tmp_path)
    assert same(kept(tmp_path, stop_at(1, "test")), whole)
    told: list[int] = []
    kept(tmp_path, lambda what, done, total, note="", /: told.append(done))
    assert told == []


def test_a_kill_while_the_state_is_written_costs_a_step_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    written, write = 0, halfway.write_tensors

    def killed(*args: object) -> None:
        nonlocal written
        written += 1
        if written == 6:
            raise Stop
        write(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(halfway, "write_tensors", killed)
        kept(tmp_path)
    told: list[int] = []
    assert same(kept(tmp_path, lambda what, done, total, note="", /: told.append(done)), kept(None))
    assert told == [6, 7, 8]


def test_writing_the_state_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    assert same(kept(tmp_path), kept(None))
