"""Figure 5: when poisons take effect, when networks generalise, and how much the output varies around images.

(a) of how many poisoned data sets the target is classified as the attacker wants, after every epoch; (b) test error
after every epoch; (c, d) with z_1, ..., z_10 random points in the l_inf ball of radius r around an image, and a noise e
that is fixed for the image, the standard deviation over j of ``KL(f(z_j) || f(z_j + e))``, in the mean over images.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from friends.bench.grid.figures.canvas import (
    COLOURS,
    LINES,
    MARKERS,
    absent,
    grey_levels,
    page,
    percent,
    styled,
    whole_numbers,
)
from friends.bench.grid.figures.figure1 import friends_cell
from friends.bench.grid.figures.sheet import Sheet, levels, plain
from friends.bench.grid.figures.source import MissingError, Source, attempt
from friends.bench.grid.figures.spread import POINTS, divergence_spread, in_ball
from friends.bench.grid.record import Record
from friends.bench.record import CLEAN, UNDEFENDED
from friends.bench.statistics import clopper_pearson
from friends.noise.random import RANDOM, random_noise

IMAGES = 256
"""Clean training images that (c) is averaged over, and at most so many poisons for (d)."""
RADII = (0, 2, 4, 8, 12, 16, 24, 32)
"""Of the balls, in grey levels."""
SPREAD = "the standard deviation of KL"


def compute(source: Source) -> Sheet:
    """All panels; (c) and (d) need the models, and say so where they are not there."""
    missing: dict[str, str] = {}
    curves = {row: success_by_epoch(source.of(row)) for row in source.rows if row != CLEAN and source.of(row)}
    if not curves:
        raise MissingError(f"figure 5: no poisoned model of grid {source.grid.name!r} was run")
    error = error_by_epoch(source.of(UNDEFENDED))
    if error is None:
        missing["test error"] = "no undefended model was run"
    spreads = attempt(lambda: _spreads(source), missing, SPREAD) or {}
    missing |= source.gaps()
    last = {row: curve["share"][-1] for row, curve in curves.items()}
    sets = {row: curve["n"] for row, curve in curves.items()}
    return Sheet(
        name="figure5",
        title="When poisons take effect, and how much the output varies",
        caption=_caption(sets, spreads),
        alt="Success by epoch, test error by epoch, and the standard deviation of KL divergences. After the last epoch "
        + "; ".join(f"{share:.0%} of {sets[row]} poisoned data sets succeed ({row})" for row, share in last.items())
        + (f"; test error {error['mean'][-1]:.1%} (undefended)" if error else "") + _spread_text(spreads) + ".",
        scaled_down=source.scaled_down,
        n={**{f"data sets, {row}": n for row, n in sets.items()},
           **{f"images, {part}": of["images"] for part, of in spreads.get("parts", {}).items()}},
        settings={"interval": "Clopper-Pearson, 95 %, for each epoch by itself", "points in a ball": POINTS,
                  **spreads.get("settings", {})},
        missing=missing,
        numbers={"success": curves, "error": error, "spread": spreads.get("parts", {}), "radii": list(RADII)},
    )  # fmt: skip


def success_by_epoch(records: list[Record]) -> dict[str, Any]:
    """Of how many data sets the attack stands after every epoch, with an exact interval for each.

    A data set counts if half of its goal's images or more are classified as the attacker wants; a target is one image.
    """
    table = _by_epoch(records, "success")
    wins = (table >= 0.5).sum(0).tolist()
    spans = [clopper_pearson(won, len(table)) for won in wins]
    return {
        "epochs": list(range(1, table.shape[1] + 1)),
        "share": plain((table >= 0.5).double().mean(0)),
        "low": [round(low, 6) for low, _ in spans],
        "high": [round(high, 6) for _, high in spans],
        "n": len(table),
    }


def error_by_epoch(records: list[Record]) -> dict[str, Any] | None:
    """The test error after every epoch, of the models whose accuracy was written down; None if there are none."""
    told = [r for r in records if r.history and all("accuracy" in line for line in r.history)]
    if not told:
        return None
    table = 1 - _by_epoch(told, "accuracy")
    return {
        "epochs": list(range(1, table.shape[1] + 1)),
        "mean": plain(table.mean(0)),
        "lowest": plain(table.amin(0)),
        "highest": plain(table.amax(0)),
        "n": len(table),
    }


def _by_epoch(records: list[Record], what: str) -> Tensor:
    """A number of each epoch of each record, ``(records, epochs)``; as many epochs as all of them have."""
    lines = [[line[what] for line in r.history if what in line] for r in records]
    epochs = min(len(line) for line in lines)
    if epochs == 0:
        raise MissingError(f"figure 5: a record of {records[0].defense} has no {what} by epoch")
    return torch.tensor([line[:epochs] for line in lines], dtype=torch.float64)


def _spreads(source: Source) -> dict[str, Any]:
    """The lines of (c) and (d): the undefended victim on clean training images, and on poisons."""
    cell, (theirs, defense) = source.cell(UNDEFENDED), friends_cell(source)
    model, poisoned, friendly = source.model(cell), source.poisoned(cell), source.friendly(theirs).cpu()
    poisons = poisoned.poison_idx.cpu()
    clean = torch.ones(len(poisoned.train), dtype=torch.bool)
    clean[poisons] = False
    strength, streams, parts = defense.mu or defense.zeta, source.streams, dict[str, Any]()
    for part, rows in (("clean training images", clean.nonzero()[:, 0]), ("poisons", poisons)):
        chosen = rows[torch.randperm(len(rows), generator=streams(part))[:IMAGES]].sort().values
        x = poisoned.train.pixels(chosen.to(poisoned.train.device)).cpu()
        noises = {f"friendly {levels(defense.zeta)}": friendly[chosen].float() / 255}
        for kind in RANDOM:
            noises[f"{kind} {levels(strength)}"] = random_noise(x, kind, strength, streams(part, kind))
        offsets, all_noises = in_ball(x, streams(part, "ball")), torch.stack(list(noises.values()))
        found = torch.zeros(len(RADII), *all_noises.shape[:2])
        for number, radius in enumerate(RADII):
            source.progress(f"figure 5, {part}", number, len(RADII))
            found[number] = divergence_spread(model, x, all_noises, offsets, radius / 255)
        error = found.std(2) / len(x) ** 0.5 if len(x) > 1 else torch.zeros_like(found[..., 0])
        lines = {name: {"mean": plain(found.mean(2)[:, k]), "standard error": plain(error[:, k])}
                 for k, name in enumerate(noises)}  # fmt: skip
        parts[part] = {"images": len(x), "lines": lines}
    settings = {"seed": cell.seed, "goal": poisoned.goal.name, "defense": repr(defense), "row": theirs.row.name}
    return {"parts": parts, "settings": settings}


def _caption(sets: dict[str, int], spreads: dict[str, Any]) -> str:
    counts = " and ".join(f"{n} ({row})" for row, n in sets.items())
    text = (
        f"(a) Share of poisoned data sets whose target is classified as the attacker wants, after every epoch, of "
        f"{counts}; bands: exact 95 % intervals of each epoch by itself. (b) Test error of the undefended models, "
        "mean and range."
    )
    if spreads:
        text += (
            f" (c, d) Standard deviation, over {POINTS} random points in the l_inf ball of a radius around an image, "
            "of the KL divergence between the outputs before and after one fixed noise is added; mean over images and "
            "twice its standard error. The network is one undefended victim after its last epoch; the friendly noise "
            f"is that of {spreads['settings']['row']} on the same data."
        )
    return text


def _spread_text(spreads: dict[str, Any]) -> str:
    texts = (
        f"; at radius {RADII[-1]}/255 on {part}: "
        + ", ".join(f"{name} {line['mean'][-1]:.2g}" for name, line in of["lines"].items())
        for part, of in spreads.get("parts", {}).items()
    )
    return "".join(texts)


def paint(sheet: Sheet) -> Any:
    """Draw it."""
    with styled():
        drawn = page(sheet, 9.6, 6.6)
        a, b, c, d = drawn.panels(2, 2)
        _success(a, sheet.numbers["success"])
        _error(b, sheet.numbers["error"])
        spread = cast("dict[str, Any]", sheet.numbers["spread"])
        top = max((mean + 2 * error for of in spread.values() for line in of["lines"].values()
                   for mean, error in zip(line["mean"], line["standard error"], strict=True)), default=1.0)  # fmt: skip
        for axes, letter, part in ((c, "c", "clean training images"), (d, "d", "poisons")):
            axes.set_title(f"({letter}) variation of the output around {part}", fontsize=9.5)
            if part in spread:
                _spread(axes, sheet.numbers["radii"], spread[part], 1.05 * top or 1.0)
            else:
                absent(axes, sheet.missing[SPREAD])
        return drawn.figure


def _success(axes: Any, curves: dict[str, Any]) -> None:
    for number, (row, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.fill_between(curve["epochs"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
        axes.plot(curve["epochs"], curve["share"], color=colour, linestyle=LINES[number % len(LINES)],
                  marker=MARKERS[number % len(MARKERS)], markersize=3.5, label=f"{row} (n = {curve['n']})")  # fmt: skip
    axes.set_ylim(-0.03, 1.03)
    percent(axes.yaxis)
    whole_numbers(axes.xaxis)
    axes.set_title("(a) poisoned data sets that succeed")
    axes.set_xlabel("epoch")
    axes.set_ylabel("share of data sets")
    axes.legend(loc="best")


def _error(axes: Any, error: dict[str, Any] | None) -> None:
    axes.set_title("(b) test error, undefended")
    if error is None:
        absent(axes, "no accuracy by epoch was written down")
        return
    axes.fill_between(error["epochs"], error["lowest"], error["highest"], color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(error["epochs"], error["mean"], color=COLOURS[0], marker="o", markersize=3.5, label=f"n = {error['n']}")
    axes.set_ylim(bottom=0)
    percent(axes.yaxis)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test error")
    axes.legend(loc="best")


def _spread(axes: Any, radii: list[float], part: dict[str, Any], top: float) -> None:
    for number, (name, line) in enumerate(part["lines"].items()):
        error = [2 * value for value in line["standard error"]]
        axes.errorbar(radii, line["mean"], yerr=error, color=COLOURS[number], linestyle=LINES[number],
                      marker=MARKERS[number], markersize=4, capsize=2, elinewidth=0.9, label=name)  # fmt: skip
    axes.set_ylim(-0.03 * top, top)
    grey_levels(axes.xaxis, [0, 8, 16, 24, 32])
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_xlabel("radius of the ball")
    axes.set_ylabel("standard deviation of KL (nats)")
    axes.legend(loc="best", title=f"{part['images']} images", fontsize=8)
