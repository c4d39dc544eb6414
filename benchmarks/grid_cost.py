"""What every built-in grid costs: full size by estimate, scaled down as recorded.

``python benchmarks/grid_cost.py --data path/to/cifar-10 [--small results/bench]``

The estimate for a GPU is images passed through the network times the seconds of one image, forward and backward, as
given (64 microseconds for ResNet-18 is an epoch of CIFAR-10 in 3.2 s, about 60 TFLOP/s), with the factors that
:mod:`friends.bench.grid.plan` has for defenses. It is not a measurement. Recorded cells count once, with the poisons
that they share.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from friends.bench.grid.plan import Speed, plan
from friends.bench.grid.record import read
from friends.bench.grid.spec import built_in, read_grid
from friends.bench.grid.stages import Workbench
from friends.data.artifacts import Artifacts


class Given(Speed):
    """A speed that is given, not measured: other networks in proportion to their parameters' work, roughly."""

    def __init__(self, seconds: float) -> None:
        super().__init__(torch.device("cpu"))
        self.seconds = seconds

    def per_image(self, name: str, width: int | None, shape: tuple[int, int, int], classes: int) -> float:
        share = {"resnet18": 1.0}.get(name, 0.1)
        return self.seconds * share * (1.0 if width is None else (width / 64) ** 2)


def estimated(name: str, bench: Workbench, source: str, seconds: float) -> tuple[int, float]:
    """Cells of a grid at full size, and the hours that they take."""
    import friends.bench.grid.plan as module

    before = module.Speed
    module.Speed = lambda device: Given(seconds)  # type: ignore[assignment, misc]
    try:
        whole = plan(read_grid(name, "paper").with_source(source, "cifar10"), bench)
    finally:
        module.Speed = before  # type: ignore[misc]
    return len(whole.cells), whole.seconds / 3600


def recorded(folder: Path) -> tuple[int, float]:
    """Cells that are recorded in a folder, and the hours that they took."""
    records = read(folder / "records.jsonl")
    poisons = {r.keys["poison"]: r.seconds["surrogates"] + r.seconds["crafting"] for r in records}
    own = sum(r.seconds["training"] - r.seconds.get("shared", 0.0) for r in records)
    return len(records), (own + sum(poisons.values())) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--small", type=Path)
    parser.add_argument("--seconds-per-image", type=float, default=3.2 / 50_000)
    chosen = parser.parse_args()
    print("| grid | cells, paper | hours, estimate | cells, small, recorded | hours, one core |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as cache:
        bench = Workbench(Artifacts(Path(cache)))
        for name in built_in("paper"):
            cells, hours = estimated(name, bench, chosen.data, chosen.seconds_per_image)
            folder = None if chosen.small is None else chosen.small / f"{name}-small"
            here = recorded(folder) if folder is not None and folder.is_dir() else (0, 0.0)
            print(f"| {name} | {cells} | {hours:.1f} | {here[0]} | {here[1]:.2f} |")


if __name__ == "__main__":
    main()
