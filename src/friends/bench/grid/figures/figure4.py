"""Figure 4: how the values of the noises are distributed that training images get."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from friends.bench.grid.figures.canvas import BLUE, ORANGE, absent, grey_levels, page, percent, styled
from friends.bench.grid.figures.sheet import Sheet, levels
from friends.bench.grid.figures.source import MissingError, Source, attempt
from friends.defenses.friends import Friends
from friends.noise.random import RandomNoise, random_noise
from friends.types import Streams

REACH = 127
"""Values are counted from -127 to 127 grey levels; what lies beyond is counted at the end."""
PART = 4096


def compute(source: Source) -> Sheet:
    """Counts of the values of friendly noise, and of its sum with one draw of random noise, over the training set.

    Raises:
        MissingError: no row has friendly noise that is in the cache.
    """
    rows = [row for row in source.grid.rows if any(d.get("name") == "friends" for d in row.defenses)]
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for row in rows:
        counts = attempt(lambda row=row: _counts(source, row.name), missing, row.name)
        if counts is not None:
            found[row.name] = counts
    if not found:
        raise MissingError(f"figure 4: {'; '.join(missing.values()) or 'the grid has no row with friendly noise'}")
    images = max(part["images"] for part in found.values())
    sizes = {row: part["mean magnitude in grey levels"] for row, part in found.items()}
    return Sheet(
        name="figure4",
        title="How the noises are distributed",
        caption=f"Values of the noise of {images} training images, each channel of each pixel counted, in whole grey "
        "levels; the scale of the shares is logarithmic. Filled: what a training image gets at a step, "
        "that is its friendly noise plus one draw of random noise. Line: "
        "the friendly noise alone, made once. Gaussian noise has no bound: mu is its standard deviation.",
        alt="Histograms of noise values. Mean magnitudes: "
        + "; ".join(f"{row} {size['sum']:.1f}/255, friendly noise alone {size['friendly']:.1f}/255"
                    for row, size in sizes.items()) + ".",
        scaled_down=source.scaled_down,
        n={"images": images, "values": sum(next(iter(found.values()))["sum"])},
        settings={"seed": source.cell(next(iter(found))).seed, "panels": {
            row: {key: part[key] for key in ("zeta", "mu", "random")} for row, part in found.items()}},
        missing=missing,
        numbers={"from grey level": -REACH, "to grey level": REACH, "panels": [row.name for row in rows],
                 "noises": found},
    )  # fmt: skip


def _counts(source: Source, row: str) -> dict[str, Any]:
    """The counts of one panel."""
    cell = source.cell(row)
    noise = source.friendly(cell)
    defense = next(d for d in cell.arm.defenses if isinstance(d, Friends))
    total = histogram(noise, defense.random, defense.mu, source.streams.child(row))
    alone = histogram(noise, defense.random, 0.0, source.streams)
    sizes = {"friendly": magnitude(alone), "sum": magnitude(total)}
    return {"images": len(noise), "zeta": defense.zeta, "mu": defense.mu, "random": defense.random,
            "friendly": alone.tolist(), "sum": total.tolist(), "mean magnitude in grey levels": sizes}  # fmt: skip


def histogram(noise: Tensor, random: RandomNoise, mu: float, streams: Streams) -> Int64[Tensor, " levels"]:
    """How often each grey level from -127 to 127 occurs in friendly noise plus one draw of random noise.

    Args:
        noise: ``(n, c, h, w)`` int8 in grey levels.
        random, mu: the random noise; strength 0 is none.
        streams: where the draws of each part of the images come from.
    """
    counts = torch.zeros(2 * REACH + 1, dtype=torch.int64)
    for number, part in enumerate(noise.cpu().split(PART)):
        values = part.float()
        if mu > 0:
            values = values + 255 * random_noise(values, random, mu, streams("part", number))
        grey = values.round().clamp(-REACH, REACH).long() + REACH
        counts += torch.bincount(grey.flatten(), minlength=len(counts))
    return counts


def magnitude(counts: Int64[Tensor, " levels"]) -> float:
    """The mean magnitude of the values that were counted, in grey levels."""
    away = (torch.arange(len(counts)) - len(counts) // 2).abs()
    return float(f"{float((counts * away).sum() / counts.sum()):.6g}")


def paint(sheet: Sheet) -> Any:
    """Draw it."""
    rows = sheet.numbers["panels"]
    grey = np.arange(sheet.numbers["from grey level"], sheet.numbers["to grey level"] + 1)
    noises = sheet.numbers["noises"]
    reach = max(_reach(grey, part) for part in noises.values())
    with styled():
        lines = (len(rows) + 1) // 2
        drawn = page(sheet, 9.6, 2.9 * lines + 0.2)
        panels = drawn.panels(lines, 2, bottom=0.2)
        for axes in panels[len(rows) :]:
            axes.set_axis_off()
        named: dict[str, Any] = {}
        for place, (axes, row) in enumerate(zip(panels, rows, strict=False)):
            axes.set_title(f"({'abcdefgh'[place]}) {row}" + _strengths(noises.get(row)))
            if row in noises:
                _panel(axes, grey, noises[row], reach)
                named |= {name: each for each, name in zip(*axes.get_legend_handles_labels(), strict=True)}
            else:
                absent(axes, sheet.missing[row])
        drawn.legend(4.8, 0.1, list(named.values()), list(named), loc="lower center", ncols=2)
        return drawn.figure


def _panel(axes: Any, grey: Any, part: dict[str, Any], reach: int) -> None:
    total, alone = (np.asarray(part[key]) / sum(part[key]) for key in ("sum", "friendly"))
    edges = np.append(grey, grey[-1] + 1) - 0.5
    if part["mu"] > 0:
        axes.stairs(total, edges, fill=True, color=BLUE, label="friendly and random noise")
        axes.stairs(alone, edges, color=ORANGE, linewidth=1.6, label="friendly noise alone")
    else:
        axes.stairs(alone, edges, fill=True, color=ORANGE, label="friendly noise alone")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-5, top=1)
    percent(axes.yaxis)
    axes.set_xlim(-reach - 1, reach + 1)
    grey_levels(axes.xaxis, _ticks(reach))
    axes.set_xlabel("noise of a pixel value")
    axes.set_ylabel("share of values")


def _strengths(part: dict[str, Any] | None) -> str:
    """What a panel's noise is made of."""
    if part is None:
        return ""
    return f": friendly {levels(part['zeta'])}" + (f" + {part['random']} {levels(part['mu'])}" if part["mu"] else "")


def _ticks(reach: int) -> list[int]:
    """Round grey levels up to ``reach`` either way, at most four each way."""
    step = next(s for s in (4, 8, 16, 32, 64) if reach / s < 4.5)
    return list(range(-(reach // step) * step, reach + 1, step))


def _reach(grey: Any, part: dict[str, Any]) -> int:
    """The grey level within which nearly all values lie."""
    share = np.asarray(part["sum"]) / sum(part["sum"])
    return int(np.abs(grey[share > 1e-5]).max())
