"""Figure 3: the training loss around all poisons, under victims trained without a defense and with each noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from friends.attacks.base import bound_of
from friends.bench.grid.figures.canvas import absent, page, styled
from friends.bench.grid.figures.figure2 import contours, scale, surface
from friends.bench.grid.figures.landscape import over_plane, random_plane, roughness, training_loss
from friends.bench.grid.figures.sheet import Sheet, levels, plain
from friends.bench.grid.figures.source import MissingError, Source, attempt
from friends.bench.record import CLEAN

POINTS = 25
REACH = 2
"""How far the landscape is shown, in bounds of the poisons."""


def compute(source: Source) -> Sheet:
    """The mean training loss of all poisons on one plane, under the first victim of each row.

    Raises:
        MissingError: no row has a victim whose weights are there.
    """
    surfaces: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for row in (name for name in source.rows if name != CLEAN):
        found = attempt(lambda row=row: _around(source, row), missing, row)
        if found is not None:
            surfaces[row] = found
    if not surfaces:
        raise MissingError(f"figure 3: {'; '.join(missing.values())}")
    cell = source.cell(next(iter(surfaces)))
    poisoned, reach = source.poisoned(cell), _reach(source, next(iter(surfaces)))
    plane = random_plane(poisoned.train.shape, reach, POINTS, source.streams("plane"))
    rough = {row: roughness(found) for row, found in surfaces.items()}
    told = [f"{row} {r['centre']:.2g} and {r['mean']:.2g}" for row, r in rough.items()]
    return Sheet(
        name="figure3",
        title="Training loss around all poisons",
        caption=f"Mean training loss of all {len(poisoned.poison_idx)} poisons ({poisoned.goal.name}) as every pixel "
        "value of each moves by +a or -a along a first and by +b or -b along a second random direction, orthogonal to "
        f"it and the same in all panels; the poisons themselves are in the middle (star). The directions reach "
        f"{levels(reach)}, {REACH} times the bound of the poisons. All panels share one scale. One victim each, "
        "after its last epoch, of the same initial weights and batch order. Loss at the poisons, and its mean over the "
        f"plane: {'; '.join(told)}.",
        alt="Landscapes of the mean training loss around the poisons: "
        + "; ".join(f"{row} {r['centre']:.3g} at the poisons and {r['mean']:.3g} in the mean over the plane, rising to "
                    f"{r['highest']:.3g}" for row, r in rough.items()) + ".",
        scaled_down=source.scaled_down,
        n={"poisons": len(poisoned.poison_idx), "victims per panel": 1, "places": POINTS**2},
        settings={"seed": cell.seed, "goal": poisoned.goal.name, "reach": reach,
                  "rows": {row.name: list(map(repr, source.cell(row.name).arm.defenses)) for row in source.grid.rows
                           if row.name in surfaces}},
        missing=missing,
        numbers={"steps in grey levels": plain(255 * plane.steps), "rows": [*surfaces, *missing],
                 "surfaces": {row: plain(found) for row, found in surfaces.items()}, "roughness": rough},
    )  # fmt: skip


def _around(source: Source, row: str) -> Tensor:
    """The landscape of one row's victim."""
    cell = source.cell(row)
    model, poisoned = source.model(cell), source.poisoned(cell)
    idx = poisoned.poison_idx.to(poisoned.train.device)
    x, y = poisoned.train.pixels(idx), poisoned.train.y[idx]
    plane = random_plane(poisoned.train.shape, _reach(source, row), POINTS, source.streams("plane"))
    return over_plane(lambda z: training_loss(model, z, y), x, plane, what=f"figure 3, {row}", progress=source.progress)


def _reach(source: Source, row: str) -> float:
    attack = source.cell(row).trial.attack
    return min(1.0, REACH * float(bound_of(attack) or 16 / 255))


def paint(sheet: Sheet) -> Any:
    """Draw it."""
    steps, rows = sheet.numbers["steps in grey levels"], sheet.numbers["rows"]
    surfaces = {row: np.asarray(found) for row, found in sheet.numbers["surfaces"].items()}
    span = min(float(s.min()) for s in surfaces.values()), max(float(s.max()) for s in surfaces.values())
    side, pitch, first = 2.45, 3.2, 1.0  # in inches
    width = first + pitch * (len(rows) - 1) + side + 1.3
    with styled():
        drawn = page(sheet, width, 6.5)
        filled: Any = None
        for place, row in enumerate(rows):
            left, title = first + pitch * place, f"({'abcdefgh'[place]}) {row}"
            panel = drawn.axes(left, 0.55, side, side)
            if row not in surfaces:
                panel.set_title(title)
                absent(panel, sheet.missing[row])
                continue
            above = drawn.axes(left + side / 2 - 1.75, 3.2, 3.4, 3.1, projection="3d")
            last = place == len(rows) - 1
            surface(above, steps, surfaces[row], "training loss" if last else "", span)  # else under the next panel
            above.set_title(title, loc="center")
            filled = contours(panel, steps, surfaces[row], span)
            if place:
                panel.set_ylabel("")
        scale(drawn, (width - 0.95, 0.65, 0.14, side - 0.2), filled, "training loss (nats)")
        return drawn.figure
