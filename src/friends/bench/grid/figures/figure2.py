"""Figure 2: the matching loss and the training loss around one poison.

With theta a surrogate on which the poisons were made, x_t the goal and y_w the wanted class, around the poison
x_i + delta_i of label y_i::

    matching loss    1 - cos(grad CE(f(x_t), y_w), grad CE(f(x), y_i))     as the attack minimises it
    training loss    CE(f(x), y_i)

both averaged over the surrogates. The poison is the one of lowest matching loss: the most effective by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from friends.attacks.base import Surrogate, wanted_class
from friends.attacks.gradient_matching import GradientMatching, matching_objective, staggered
from friends.bench.grid.figures.canvas import BLUE, MAP, RED, Page, counted, grey_levels, page, styled
from friends.bench.grid.figures.landscape import along, over_plane, random_plane, roughness, training_loss
from friends.bench.grid.figures.sheet import Sheet, levels, plain
from friends.bench.grid.figures.source import MissingError, Source, attempt
from friends.bench.grid.spec import Cell
from friends.bench.record import UNDEFENDED
from friends.data.images import LabeledImages
from friends.data.poisoned import PoisonedDataset
from friends.modules import still

POINTS = 31
SHARES = tuple(i / 10 for i in range(-10, 21))
"""Where between the clean image (0) and the poison (1), and beyond, the losses are taken."""
Span = tuple[float, float]
Loss = Callable[[Float[Tensor, "b c h w"]], Tensor]


@dataclass(frozen=True)
class Subject:
    """One poison with everything that its losses need."""

    clean: Float[Tensor, "1 c h w"]
    poison: Float[Tensor, "1 c h w"]
    label: Int64[Tensor, " 1"]
    row: int
    matching: Loss
    training: Loss


def compute(source: Source) -> Sheet:
    """Both losses on a plane around the poison, and on the line from the clean image through it.

    Raises:
        MissingError: the undefended cell was not run, or its attack does not match gradients.
    """
    cell = source.cell(UNDEFENDED)
    attack, subject, poisoned = _subject(source, cell)
    streams = source.streams
    plane = random_plane(poisoned.train.shape, attack.xi, POINTS, streams("plane"))
    surfaces = {
        name: over_plane(loss, subject.poison, plane, what=f"figure 2, {name} loss", progress=source.progress)
        for name, loss in (("matching", subject.matching), ("training", subject.training))
    }
    way = subject.poison - subject.clean
    lines = {name: along(loss, subject.clean, way, SHARES)
             for name, loss in (("matching", subject.matching), ("training", subject.training))}  # fmt: skip
    missing: dict[str, str] = {}
    victim = attempt(lambda: source.model(cell), missing, "the training loss under the victim")
    if victim is not None:
        lines["victim"] = along(lambda x: training_loss(victim, x, subject.label), subject.clean, way, SHARES)
    rough = {name: roughness(surface) for name, surface in surfaces.items()}
    return Sheet(
        name="figure2",
        title="Matching loss and training loss around one poison",
        caption=_caption(attack, poisoned, subject, rough),
        alt=_alt(rough, {name: line[SHARES.index(0.0)].item() for name, line in lines.items()}),
        scaled_down=source.scaled_down,
        n={"poisons": 1, "poisons to choose from": len(poisoned.poison_idx), "surrogates": attack.surrogates,
           "places": POINTS**2},
        settings={"seed": cell.seed, "goal": poisoned.goal.name, "row of the training set": subject.row,
                  "xi": attack.xi, "attack": repr(attack)},
        missing=missing,
        numbers={
            "steps in grey levels": plain(255 * plane.steps),
            "shares of the perturbation": list(SHARES),
            **{f"{name} loss on the plane": plain(surface) for name, surface in surfaces.items()},
            **{f"{name} loss on the line": plain(line) for name, line in lines.items()},
            "roughness": rough,
        },
    )  # fmt: skip


def _subject(source: Source, cell: Cell) -> tuple[GradientMatching, Subject, PoisonedDataset]:
    attack = cell.trial.attack
    if not isinstance(attack, GradientMatching):
        raise MissingError(f"the figure of matching losses is of gradient matching, not of {attack.about.title}")
    poisoned = source.poisoned(cell)
    lab = source.lab(cell)
    train, goal = lab.data[0], poisoned.goal
    wanted = wanted_class(goal, train)
    models = surrogates(attack, train, lab.surrogate_of(cell.goal))
    with still(models, freeze=False):
        objectives = [matching_objective(model, goal, wanted, attack.criterion) for model in models]

    def matching(x: Tensor) -> Tensor:
        with still(models, freeze=False):
            return torch.stack([objective(x.to(train.device)).detach() for objective in objectives]).mean()

    idx = poisoned.poison_idx.cpu()
    found = poisoned.train.pixels(idx.to(train.device)).cpu()
    best = int(torch.stack([matching(one[None]) for one in found]).argmin())
    label = torch.tensor([wanted])
    clean = train.pixels(idx[best : best + 1].to(train.device)).cpu()

    def training(x: Tensor) -> Tensor:
        return torch.stack([training_loss(model, x, label) for model in models]).mean()

    return attack, Subject(clean, found[best : best + 1], label, int(idx[best]), matching, training), poisoned


def surrogates(attack: GradientMatching, train: LabeledImages, surrogate: Surrogate) -> list[nn.Module]:
    """The networks that the poisons were made on, from the cache or trained again."""
    informed = attack.adapt.informed(surrogate) if attack.adapt else surrogate
    if attack.stagger is None:
        return [informed(train, index=k) for k in range(attack.surrogates)]
    lengths = staggered(attack.stagger, attack.surrogates, attack.epochs)
    return [informed(train, index=k, epochs=epochs) for k, epochs in enumerate(lengths)]


def _caption(attack: GradientMatching, poisoned: PoisonedDataset, subject: Subject, rough: dict[str, Any]) -> str:
    return (
        f"Around the poison of lowest matching loss among {len(poisoned.poison_idx)} ({poisoned.goal.name}; training "
        f"row {subject.row}), which lies in the middle (star). (a, b, c) Every pixel value moves by +a or -a along the "
        "first random direction and by +b or -b along the second, which is orthogonal to it; a and b reach "
        f"xi = {levels(attack.xi)}. (a) Matching loss 1 - cos of the gradients of goal and poison, mean over "
        f"{counted(attack.surrogates, 'surrogate')}, without augmentation; (b) its contours; "
        "(c) training loss of the same example under the same networks, which have not seen poisons. (d) "
        "Losses from the clean image (0) to the poison (1) and beyond, there also under the undefended victim after "
        f"its last epoch. Over the plane the matching loss ranges from {rough['matching']['lowest']:.3g} to "
        f"{rough['matching']['highest']:.3g}; at the poison it is {rough['matching']['centre']:.3g}."
    )


def _alt(rough: dict[str, dict[str, float]], clean: dict[str, float]) -> str:
    parts = (
        f"{name} loss: {clean[name]:.3g} at the clean image, {found['centre']:.3g} at the poison, "
        f"{found['lowest']:.3g} to {found['highest']:.3g} (mean {found['mean']:.3g}) on the plane around it"
        for name, found in rough.items()
    )
    return "Surface, contours and lines of losses around one poison. " + "; ".join(parts) + "."


def paint(sheet: Sheet) -> Any:
    """Draw it."""
    steps = sheet.numbers["steps in grey levels"]
    matching, training = (np.asarray(sheet.numbers[f"{name} loss on the plane"]) for name in ("matching", "training"))
    with styled():
        drawn = page(sheet, 10.4, 7.8)
        for bottom, heights, title in ((4.0, matching, "(a) matching loss"),
                                       (0.1, training, "(c) training loss of the example")):  # fmt: skip
            above = drawn.axes(0.0, bottom, 4.7, 3.4, projection="3d")
            surface(above, steps, heights, title.partition(") ")[2].removesuffix(" of the example"))
            above.set_title(title, loc="center")
        panel = drawn.axes(6.0, 4.5, 2.8, 2.8)
        filled = contours(panel, steps, matching)
        panel.set_title("(b) contours of (a)")
        scale(drawn, (9.15, 4.6, 0.14, 2.6), filled, "matching loss")
        _line(drawn, sheet)
        return drawn.figure


def surface(
    axes: Any, steps: Sequence[float], heights: np.ndarray[Any, Any], name: str, span: Span | None = None
) -> None:
    """A landscape in perspective, with a star in its middle; ``span``: the range of heights, where panels share it."""
    low, high = span or (float(heights.min()), float(heights.max()))
    across, up = np.meshgrid(steps, steps)
    axes.plot_surface(across, up, heights, cmap=MAP, vmin=low, vmax=high, rstride=1, cstride=1, linewidth=0.15,
                      edgecolor="#ffffff40", antialiased=True, alpha=0.92)  # fmt: skip
    middle = len(steps) // 2
    axes.plot([0], [0], [heights[middle, middle]], marker="*", color=RED, markersize=13, zorder=10, clip_on=False)
    axes.set_zlim(low, high if high > low else low + 1)
    half = steps[-1] / 2  # labels at the ends would run into each other
    for axis, title in ((axes.xaxis, "first direction"), (axes.yaxis, "second direction")):
        grey_levels(axis, (-half, 0, half))
        axis.set_label_text(title)
        axis.set_tick_params(pad=0, labelsize=8)
    axes.zaxis.set_tick_params(pad=2, labelsize=8)
    axes.locator_params(axis="z", nbins=5)
    axes.set_zlabel(name)
    axes.view_init(elev=30, azim=-52)
    axes.set_box_aspect((1, 1, 0.72), zoom=0.98)
    axes.set_facecolor("none")  # else it covers the labels of its neighbour


def contours(axes: Any, steps: Sequence[float], heights: np.ndarray[Any, Any], span: Span | None = None) -> Any:
    """A landscape from above; returns what its scale needs."""
    from matplotlib.ticker import MaxNLocator

    low, high = span or (float(heights.min()), float(heights.max()))
    places = MaxNLocator(11).tick_values(low, high if high > low else low + 1)
    filled = axes.contourf(steps, steps, heights, places, cmap=MAP, extend="neither")
    axes.contour(steps, steps, heights, places, colors="white", linewidths=0.4, alpha=0.7)
    axes.plot([0], [0], marker="*", color=RED, markeredgecolor="white", markersize=15, clip_on=False)
    for axis, label in ((axes.xaxis, "first direction"), (axes.yaxis, "second direction")):
        grey_levels(axis, (steps[0], 0, steps[-1]))
        axis.set_label_text(label)
    axes.set_aspect("equal")
    axes.grid(False)
    return filled


def scale(drawn: Page, place: tuple[float, float, float, float], filled: Any, name: str) -> None:
    """The scale of contours, at a place of the page."""
    axes = drawn.axes(*place)
    axes.grid(False)
    drawn.figure.colorbar(filled, cax=axes, label=name, format="%.3g")


def _line(drawn: Page, sheet: Sheet) -> None:
    """The losses from the clean image through the poison, with an axis for each kind."""
    shares = sheet.numbers["shares of the perturbation"]
    axes = drawn.axes(6.0, 1.2, 3.4, 2.5)
    other = axes.twinx()
    other.spines["right"].set_visible(True)
    other.grid(False)
    lines = [axes.plot(shares, sheet.numbers["matching loss on the line"], color=BLUE, label="matching loss")[0]]
    for name, label, style in (
        ("training", "training loss, surrogate", "--"),
        ("victim", "training loss, victim", ":"),
    ):
        values = cast("list[float] | None", sheet.numbers.get(f"{name} loss on the line"))
        if values is not None:
            lines += other.plot(shares, values, color=RED, linestyle=style, label=label)
    for share in (0, 1):
        axes.axvline(share, color="#999999", linewidth=0.8, zorder=0)
    axes.set_title("(d) from the clean image through the poison")
    axes.set_xticks([-1, 0, 1, 2], ["\N{MINUS SIGN}1", "0\nclean image", "1\npoison", "2"])
    axes.set_xlabel("share of the perturbation")
    axes.set_ylabel("matching loss", color=BLUE)
    other.set_ylabel("training loss", color=RED)
    other.set_ylim(bottom=0)
    drawn.legend(7.7, 0.2, lines, [line.get_label() for line in lines], loc="lower center", ncols=3, columnspacing=1.2)
