"""Figure 1: poisoned images, what the attacker added, and the two noises of FRIENDS, as rows of pictures."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from friends.bench.grid.figures.canvas import page, styled
from friends.bench.grid.figures.sheet import Sheet, levels, packed, unpacked
from friends.bench.grid.figures.source import MissingError, Source, attempt
from friends.bench.grid.spec import Cell
from friends.defenses.friends import Friends
from friends.noise.random import random_noise

SHOWN = 8
"""Poisons in a row of pictures."""


def compute(source: Source) -> Sheet:
    """The first poisons of the first goal, with the friendly noise that the defended victim was trained with.

    Raises:
        MissingError: no row with FRIENDS was run, or what it left behind is not in the cache.
    """
    cell, defense = friends_cell(source)
    poisoned = source.poisoned(cell)
    idx = poisoned.poison_idx.cpu()[:SHOWN]
    clean = source.lab(cell).data[0].x.cpu()[idx]
    poison = poisoned.train.x[idx.to(poisoned.train.device)].cpu()
    if clean.shape[1] not in (1, 3):
        raise MissingError(f"images of {clean.shape[1]} channels cannot be shown: there is no picture of them")
    added = (poison.short() - clean.short()).clamp(-128, 127).to(torch.int8)
    friendly = source.friendly(cell)[idx].cpu()
    draw = random_noise(poison.float() / 255, defense.random, defense.mu, source.streams("random"))
    random = (255 * draw).round().clamp(-127, 127).to(torch.int8)
    seen = ((poison.short() + friendly).clamp(0, 255) + random).clamp(0, 255).to(torch.uint8)
    xi = int(added.abs().max())
    scales = {"poison": xi, "friendly": round(255 * defense.zeta), "random": _reach(defense)}
    shares = {name: _size(part) for name, part in (("poison", added), ("friendly", friendly), ("random", random))}
    strong = round(100 * float((friendly.abs() == friendly.abs().max()).float().mean()))
    return Sheet(
        name="figure1",
        title="Poisons, what the attacker added, and the noises of FRIENDS",
        caption=f"The first {len(idx)} of {len(poisoned.poison_idx)} poisons ({poisoned.goal.name}). Noise is "
        f"shown in each channel around grey, which is none, up to white and down to black at the strength beside the "
        f"row; its magnitude also from black, which is none. Friendly noise was made once, before epoch "
        f"{defense.def_epoch + 1}; random noise ({defense.random}) is new at every step, here one draw. The "
        "last row is what the defended network trains on, cut to [0, 1] for the eye.",
        alt=f"Rows of {len(idx)} pictures: images, their perturbation of at most {xi}/255, poisons, friendly noise of "
        f"at most {levels(defense.zeta)} (mean magnitude {shares['friendly']:.1f}/255; {strong} % of values at its "
        f"maximum), one draw of {defense.random} noise of strength {levels(defense.mu)}, and their sum.",
        scaled_down=source.scaled_down,
        n={"pictures": len(idx), "poisons": len(poisoned.poison_idx)},
        settings={"row": cell.row.name, "defense": repr(defense), "seed": cell.seed, "goal": poisoned.goal.name,
                  "rows of the training set": idx.tolist(), "scales in grey levels": scales},
        numbers={
            "mean magnitude in grey levels": shares,
            **{name: packed(part) for name, part in (("images", clean), ("perturbations", added), ("poisons", poison),
                                                     ("friendly", friendly), ("random", random), ("seen", seen))},
        },
    )  # fmt: skip


def friends_cell(source: Source) -> tuple[Cell, Friends]:
    """The first row that was run with both noises of FRIENDS; one with friendly noise if there is no such row.

    Raises:
        MissingError: there is none.
    """
    found: list[tuple[Cell, Friends]] = []
    for row in source.rows:
        cell = attempt(lambda row=row: source.cell(row), {}, row)
        if cell is not None:
            found += [(cell, d) for d in cell.arm.defenses if isinstance(d, Friends) and d.zeta > 0]
    if not found:
        raise MissingError(f"no row of grid {source.grid.name!r} with friendly noise was run")
    return next((pair for pair in found if pair[1].mu > 0), found[0])


def _reach(defense: Friends) -> int:
    """The strength that is shown at full brightness; Gaussian noise has no bound, so two standard deviations."""
    return max(1, round(255 * defense.mu * (2 if defense.random == "gaussian" else 1)))


def _size(noise: Tensor) -> float:
    return float(f"{float(noise.float().abs().mean()):.4g}")


def paint(sheet: Sheet) -> Any:
    """Draw it."""
    pictures = {name: unpacked(part) for name, part in sheet.numbers.items() if "base64" in part}
    scales = cast("dict[str, int]", sheet.settings["scales in grey levels"])
    rows = (
        ("image", _shown(pictures["images"]), ""),
        (
            "perturbation",
            _shown(pictures["perturbations"], scales["poison"]),
            _told("\N{PLUS-MINUS SIGN}", scales["poison"]),
        ),
        ("poison", _shown(pictures["poisons"]), ""),
        (
            "friendly noise",
            _shown(pictures["friendly"], scales["friendly"]),
            _told("\N{PLUS-MINUS SIGN}", scales["friendly"]),
        ),
        ("its magnitude", np.abs(pictures["friendly"] / scales["friendly"]), _told("0 to ", scales["friendly"])),
        ("random noise", _shown(pictures["random"], scales["random"]), _told("\N{PLUS-MINUS SIGN}", scales["random"])),
        ("trained on", _shown(pictures["seen"]), ""),
    )
    with styled():
        sheet_page = page(sheet, 8.4, 0.93 * len(rows))
        for place, (name, images, scale) in enumerate(reversed(rows)):
            axes = sheet_page.axes(1.3, 0.93 * place, 6.98, 0.88)
            axes.imshow(side_by_side(images), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_ylabel(name + scale, rotation=0, ha="right", va="center", labelpad=8)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            axes.spines[:].set_visible(False)
        return sheet_page.figure


def _shown(images: np.ndarray[Any, Any], scale: int = 0) -> np.ndarray[Any, Any]:
    """Images as brightness in [0, 1]; noise around a half, up to ``scale`` grey levels either way."""
    return images / 255 if scale == 0 else np.clip(0.5 + images / (2 * scale), 0, 1)


def _told(between: str, scale: int) -> str:
    """How much a row of noise is magnified."""
    return f"\n{between}{scale}/255\n(\N{MULTIPLICATION SIGN}{255 / scale:.3g})"


def side_by_side(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Brightnesses ``(n, c, h, w)`` as one picture, with white between the images."""
    gap = max(1, images.shape[3] // 10)
    padded = np.pad(np.clip(images, 0, 1), ((0, 0), (0, 0), (0, 0), (0, gap)), constant_values=1)
    row = np.concatenate(list(padded.transpose(0, 2, 3, 1)), axis=1)[:, :-gap]
    return row if row.shape[2] == 3 else row[..., 0]
