"""The benchmarks measure what they say: the harness, the stand-in for the released code, and the records of runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from friends.data.images import LabeledImages
from friends.models import Classifier, build
from friends.noise.friendly import RELEASED, friendly_noise

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
RECORDS = [file for file in FILES if file.name != "scaling.json"]


class Clock:
    """Time that passes only when a job says so, and that an ever slower machine stretches."""

    def __init__(self, slowing: float = 1.0) -> None:
        self.now, self.pace, self.slowing, self.order = 0.0, 1.0, slowing, list[str]()

    def __call__(self) -> tuple[float, float]:
        return self.now, 2 * self.now

    def job(self, name: str, seconds: float) -> Any:
        def run() -> None:
            self.order.append(name)
            self.now += seconds * self.pace
            self.pace *= self.slowing

        return run


def network(name: str = "convnet", width: int = 4) -> Classifier:
    """A small network whose batch normalisation is not the identity."""
    generator = torch.Generator().manual_seed(0)
    model = build(name, shape=(3, 12, 12), classes=5, moments=((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), width=width,
                  generator=generator)  # fmt: skip
    model(torch.rand(64, 3, 12, 12, generator=generator))  # in training mode: running statistics
    return model.eval()


def test_ratios_are_those_of_the_clock() -> None:
    from interleaved import interleaved

    clock = Clock()
    timings = interleaved({"slow": clock.job("slow", 6.0), "fast": clock.job("fast", 1.5)}, clock=clock)
    assert timings.faster("fast") == (4, 4, 4)
    assert timings.faster("slow", "fast") == (0.25, 0.25, 0.25)
    assert timings.seconds("slow") == (6, 6, 6)
    assert timings.wall["slow"] == [12] * 5


def test_every_round_has_every_job_and_every_other_round_runs_backwards_after_a_warm_up() -> None:
    from interleaved import interleaved

    clock = Clock()
    jobs = {name: clock.job(name, 1.0) for name in "abc"}
    timings = interleaved(jobs, rounds=3, warmup=1, clock=clock)
    assert "".join(clock.order) == "cba" + "abc" + "cba" + "abc"
    assert [len(times) for times in timings.cpu.values()] == [3, 3, 3]


def test_a_machine_that_slows_down_hardly_moves_the_median_ratio() -> None:
    from interleaved import interleaved

    clock = Clock(slowing=1.1)  # six times slower at the end
    timings = interleaved({"slow": clock.job("slow", 4.0), "fast": clock.job("fast", 1.0)}, rounds=10, clock=clock)
    assert max(timings.cpu["slow"]) > 5 * min(timings.cpu["slow"])
    assert timings.faster("fast").median == pytest.approx(4.0, rel=0.01)
    assert timings.faster("fast").low == pytest.approx(4 / 1.1) and timings.faster("fast").high == pytest.approx(4.4)


def test_nothing_to_time_is_an_error_and_threads_are_put_back() -> None:
    from interleaved import interleaved

    with pytest.raises(ValueError, match="not 0 and 5"):
        interleaved({})
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        interleaved({"look": lambda: seen.append(torch.get_num_threads())}, rounds=1, warmup=0)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_stand_in_makes_the_noise_of_the_library_on_a_batch_of_128() -> None:
    """It takes the mean over the batch at rate lr, we a sum over images at rate lr/128: the same on 128 images."""
    import released

    model = network().double()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(128, 3, 12, 12, generator=generator, dtype=torch.float64)
    initial = (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1) * RELEASED.init
    theirs = released.friendly_noise(released.Network(model), x, steps=3, initial=initial)
    ours = friendly_noise(model, x, replace(RELEASED, steps=3), initial=initial)
    moved = float((ours - initial).abs().mean())
    assert moved > 1e-4  # else equality would say nothing
    # ours keeps x + e in [0, 1] as well
    assert float((ours - theirs.clamp(-x, 1 - x)).abs().mean()) < 1e-9


def test_the_stand_in_takes_larger_steps_on_a_short_batch() -> None:
    import released

    model = released.Network(network())
    x = torch.rand(32, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    initial = torch.zeros_like(x).add_(0.01)
    moved = [
        float((released.friendly_noise(model, part, steps=1, lr=1.0, mu=0.0, initial=initial[: len(part)])[0]
               - initial[0]).abs().mean())
        for part in (x, x[:8])
    ]  # fmt: skip
    assert moved[1] == pytest.approx(4 * moved[0], rel=1e-3)


def test_the_stand_in_normalises_an_image_as_the_network_does() -> None:
    import released

    model = network()
    x = torch.rand(4, 3, 12, 12)
    inner = released.Network(model)
    torch.testing.assert_close(released.all_normalised(x, inner.moments), model.normalize(x))
    torch.testing.assert_close(inner(model.normalize(x)), model(x))
    with pytest.raises(ValueError, match="zero"):
        released.normalised(x[0], released.Moments([0.0] * 3, [1.0, 0.0, 1.0]))


def test_the_stand_in_adds_both_noises_before_it_normalises() -> None:
    import released

    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    data = LabeledImages(x, torch.tensor([0, 1]), ("a", "b"))
    moments = released.Moments([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    friendly = torch.full((2, 3, 32, 32), 10 / 255)
    images = released.Images(released.pil_images(data), data.y.tolist(), moments, friendly=friendly, mu=16 / 255,
                             augmented=False)  # fmt: skip
    image, label, index = images[1]
    random = image * 0.25 + 0.5 - (x[1] / 255 + 10 / 255).clamp(0, 1)
    assert (label, index) == (1, 1)
    torch.testing.assert_close(random.abs(), torch.full_like(random, 16 / 255))
    assert 0.4 < float((random > 0).float().mean()) < 0.6


def test_the_stand_in_shifts_by_at_most_four_pixels() -> None:
    import released

    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.zeros(1, 32, 32)
        x[0, 16, 5] = 1.0
        rows = torch.arange(32.0)
        centres: list[tuple[float, float]] = []
        for _ in range(100):
            moved = released.shifted(x)[0]
            centres.append((float((moved.sum(1) * rows).sum()), float((moved.sum(0) * rows).sum())))
    down, across = zip(*centres, strict=True)
    assert 11.9 < min(down) < 13 and 19 < max(down) < 20.1
    flipped = [31 - a for a in across if a > 16.5]
    assert 20 < len(flipped) < 80
    assert all(0.9 < a < 9.1 for a in flipped) and all(0.9 < a < 9.1 for a in across if a <= 16.5)


def test_a_training_step_of_the_stand_in_learns_what_can_be_learned() -> None:
    import released

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 2
    x = (torch.rand(64, 3, 12, 12, generator=generator) * 60 + 120 * y.view(-1, 1, 1, 1)).to(torch.uint8)
    data = LabeledImages(x, y, ("dark", "bright", "c", "d", "e"))
    model = released.Network(network())
    images = released.Images(released.pil_images(data), y.tolist(), model.moments)
    optimiser = released.optimiser_for(model, lr=0.05)
    losses = [loss for _ in range(5) for loss in released.training_steps(model, released.loader(images), optimiser)]
    assert len(losses) == 5 and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_the_floor_runs_the_same_network_without_batch_normalisation(name: str) -> None:
    import generation

    model = network(name)
    bare = generation.bare(model)
    x = torch.rand(4, 3, 12, 12)
    torch.testing.assert_close(bare(model.normalize(x)), model(x), atol=1e-4, rtol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in bare.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())  # the model is as it was


def test_a_row_says_whether_its_target_is_reached() -> None:
    from run import reached

    def row(value: float, target: str) -> dict[str, Any]:
        return {"name": "n", "value": value, "target": target}

    assert reached(row(2.5, ">= 2.4")) and not reached(row(2.3, ">= 2.4"))
    assert reached(row(47, "<= 48 bytes")) and not reached(row(49, "<= 48 bytes"))
    assert reached(row(30_000, ">= 30,000")) and reached(row(1, "")) is None
    with pytest.raises(ValueError, match="not a comparison"):
        reached(row(1, "fast"))


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins for the parts: one that measures, one that breaks."""
    (tmp_path / "generation.py").write_text(
        "def measure(quick=False):\n"
        "    return [dict(name='ratio', value=2.0 + quick, low=1.5, high=3.5, unit='x', target='>= 2.5')]\n"
    )
    (tmp_path / "crafting.py").write_text("def measure():\n    raise RuntimeError('no poison')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {name: sys.modules.pop(name, None) for name in ("generation", "crafting")}
    yield tmp_path
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_a_run_is_recorded_with_its_targets_and_a_part_that_breaks_does_not_take_the_rest(
    parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from run import main

    results = parts / "results"
    assert main(["--only", "generation", "crafting"], folder=results) == 1
    assert main(["--only", "generation"], folder=results) == 0
    files = sorted(results.glob("*.json"))
    assert [file.stem[-2:] for file in files] == ["-1", "-2"]
    run = json.loads(files[0].read_text())
    assert run["parts"]["crafting"] == {"missing": "failed"}
    assert run["parts"]["generation"]["rows"][0]["value"] == 2.0
    assert {"python", "torch", "numpy"} <= set(run["versions"]) and run["threads"] == 1 and run["date"]
    page = files[0].with_suffix(".md").read_text()
    assert "| ratio | 2.00 x | 1.50–3.50 | >= 2.5 | not reached |" in page and "Failed." in page
    assert "no poison" in capsys.readouterr().err


def test_a_quick_run_is_shown_and_not_recorded(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from run import main

    assert main(["--only", "generation", "--quick"], folder=parts / "results") == 0
    assert "| ratio | 3.00 x | 1.50–3.50 | >= 2.5 | reached |" in capsys.readouterr().out
    assert not (parts / "results").exists()


def test_a_part_that_is_not_written_yet_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import run

    assert run.part("no_such_benchmark", quick=True, data=None) == {"missing": "not there yet"}


def misquoted(page: str, records: list[dict[str, Any]]) -> list[str]:
    """Rows ``| what | value |`` of a page whose name is that of a benchmark, with a value that no run recorded."""
    from run import shown

    known: dict[str, set[str]] = {}
    for record in records:
        for part in record["parts"].values():
            for row in part.get("rows", ()):
                known.setdefault(row["name"], set()).add(shown(row))
    cells = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", page, flags=re.MULTILINE)
    return [name for name, value in cells if name in known and value.strip() not in known[name]]


def test_a_wrong_quotation_is_found() -> None:
    row = {"name": "exact", "value": 2.5, "low": 2, "high": 3, "unit": "x", "target": ""}
    records = [{"parts": {"generation": {"rows": [row]}, "crafting": {"missing": "failed"}}}]
    assert misquoted("| what | now |\n| --- | --- |\n| exact | 2.50 x |\n", records) == []
    assert misquoted("| exact | 2.60 x |\n", records) == ["exact"]


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_speeds_that_are_quoted_were_measured(page: str) -> None:
    records = [json.loads(file.read_text(encoding="utf-8")) for file in RECORDS]
    assert misquoted((ROOT / page).read_text(encoding="utf-8"), records) == []


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_a_committed_record_is_whole_and_its_page_is_made_from_it(file: Path) -> None:
    from run import FORMAT, table

    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["format"] == FORMAT and record["commit"] and not record["quick"]
    assert table(record) == file.with_suffix(".md").read_text(encoding="utf-8")


def test_the_documentation_quotes_the_latest_record_and_the_readme_the_documentation() -> None:
    from run import targets

    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert targets(json.loads(RECORDS[-1].read_text(encoding="utf-8"))) in page
    assert f"benchmarks/results/{RECORDS[-1].stem}.md" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| .* \| (?:not )?reached \|$", readme, flags=re.MULTILINE)
    assert len(quoted) >= 5
    assert all(line in page for line in quoted)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_record_names_no_path_of_a_machine(file: Path) -> None:
    assert not re.search(r'"/(home|root|tmp|work)/', file.read_text(encoding="utf-8"))


def test_operations_are_counted_as_published_for_resnet50_and_resnet18() -> None:
    import scaling

    forward, both = scaling.flops(scaling.resnet50(), scaling.IMAGENET_SHAPE)
    assert forward / 2e9 == pytest.approx(4.09, abs=0.005)  # multiplications with addition, He et al. round to 3.8-4.1
    assert both == pytest.approx(2 * forward)
    resnet18 = build("resnet18", shape=(3, 32, 32), classes=10, moments=((0.5,) * 3, (0.25,) * 3),
                     generator=torch.Generator())  # fmt: skip
    assert scaling.flops(resnet18, (3, 32, 32))[0] / 2e9 == pytest.approx(0.5554, abs=1e-4)


def test_a_curve_varies_one_thing() -> None:
    import scaling

    points = scaling.jobs(scaling.CURVES["size"])
    assert [point["size"] for point in points] == [16, 24, 32, 48, 64, 96]
    assert {point["n"] for point in points} == {1000} and {point["steps"] for point in points} == {4}
    assert scaling.jobs(scaling.CURVES["images"], shrink=50)[-1]["n"] == 1000


def test_rolled_images_all_differ_and_are_the_same_when_read_again() -> None:
    import scaling

    images = scaling.Rolled(3 * scaling.POOL, 8)
    seen = {images[index].tobytes() for index in range(len(images))}
    assert len(seen) == len(images)
    assert images[300].tobytes() == images[300].tobytes() and images[0].shape == (8, 8, 3)


def test_a_point_of_a_curve_is_measured_in_its_own_process() -> None:
    import scaling

    point = scaling.apart(scaling.USUAL | {"kind": "noise", "n": 32, "size": 8, "steps": 1})
    assert point["seconds"] > 0 and point["peak"] >= point["before"] > 1e8
    assert point["bytes"] > 32 * 3 * 8 * 8 and point["n"] == 32
    with pytest.raises(RuntimeError, match="size"):
        scaling.apart(scaling.USUAL | {"kind": "noise", "n": 32, "size": 4})


@pytest.mark.parametrize("name", ["images", "training from disk, FRIENDS"])
def test_committed_curves_say_that_memory_does_not_grow_with_the_images(name: str) -> None:
    file = ROOT / "benchmarks" / "results" / "scaling.json"
    curve = json.loads(file.read_text(encoding="utf-8"))["curves"][name]
    peaks = [point["peak"] for point in curve]
    assert curve[-1]["n"] == 10 * curve[0]["n"]
    assert max(peaks) < 1.05 * min(peaks)
    assert file.with_suffix(".svg").is_file()


@pytest.fixture
def small_digits(few_digits: LabeledImages) -> LabeledImages:
    return few_digits.rows(torch.arange(128))


def test_trainings_take_turns_epoch_by_epoch(monkeypatch: pytest.MonkeyPatch, small_digits: LabeledImages) -> None:
    import defended_step

    from friends.training.defense import Defense, Run

    order: list[int] = []

    class Noted(Defense):
        def __init__(self, player: int) -> None:
            self.player = player

        def start_epoch(self, run: Run) -> None:
            order.append(self.player)

    monkeypatch.setitem(defended_step.NETWORKS, "tiny", 4)
    seconds = defended_step.in_turns([[Noted(0)], [Noted(1)]], small_digits, "tiny", 3)
    assert order == [0, 1, 0, 1, 0, 1]
    assert [len(times) for times in seconds] == [3, 3] and min(map(min, seconds)) > 0


def test_a_training_that_fails_is_told_and_the_other_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, small_digits: LabeledImages
) -> None:
    import defended_step

    from friends import Friends

    monkeypatch.setitem(defended_step.NETWORKS, "tiny", 4)
    with pytest.raises(ValueError, match="lower def_epoch"):
        defended_step.in_turns([[], [Friends(def_epoch=5)]], small_digits, "tiny", 3)


def test_the_input_pipeline_that_is_timed_makes_the_batches_of_a_training(
    monkeypatch: pytest.MonkeyPatch, small_digits: LabeledImages
) -> None:
    import input_pipeline

    from friends import Friends
    from friends.training import Recipe, fit
    from friends.types import Streams

    data, seen, timed = small_digits, list[torch.Tensor](), list[torch.Tensor]()

    def make(_: torch.Generator) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(data.x[0].numel(), 10))
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        return model

    fitted = fit(data, make, recipe=Recipe(epochs=1, batch=input_pipeline.BATCH), streams=Streams(0),
                 defenses=[Friends(def_epoch=0, held="random")])  # fmt: skip
    batches = input_pipeline.Batches(data, fitted.memory[0]["friendly"])
    batches.order = torch.randperm(len(data), generator=Streams(0)("order", 0))
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **how: timed.append(x.clone()) or contiguous(x, **how))
    batches(defended=True)
    assert torch.equal(timed[0], seen[0])
