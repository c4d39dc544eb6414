"""``friends tune``: settings of FRIENDS for data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from friends.terminal import Bars, Device, Threads, console, guarded, pick_device, print_plain, rough_time

if TYPE_CHECKING:
    from friends.bench.tuning_search import Round
    from friends.bench.tuning_settings import Plan, Tuned, Tuning

_SEARCH, _TRAINING = "What is searched", "How the model is trained"


def tune(
    data: Annotated[str, typer.Argument(help="Data set: name, archive, parquet or image folder, npz.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the search; a stopped one goes on.")] = Path(
        "runs/tune"
    ),
    model: Annotated[str, typer.Option(help="Network.", rich_help_panel=_TRAINING)] = "resnet18",
    width: Annotated[
        int | None, typer.Option(help="Its width [default: as its authors have it].", rich_help_panel=_TRAINING)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the training to come.", rich_help_panel=_TRAINING)] = 40,
    lr: Annotated[
        float, typer.Option(help="Its learning rate; small plain nets want 0.05 or less.", rich_help_panel=_TRAINING)
    ] = 0.1,
    batch: Annotated[int, typer.Option(help="Images per step.", rich_help_panel=_TRAINING)] = 128,
    no_augment: Annotated[
        bool, typer.Option("--no-augment", help="No flips and shifts.", rich_help_panel=_TRAINING)
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(help="Side to which images of mixed sizes are resized.", rich_help_panel=_TRAINING),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long, with the best so far.")] = None,
    accuracy_drop: Annotated[float, typer.Option(help="How much accuracy the defense may cost.")] = 0.02,
    seeds: Annotated[
        int, typer.Option(help="Trainings of each candidate at the last rung.", rich_help_panel=_SEARCH)
    ] = 3,
    candidates: Annotated[int, typer.Option(help="Candidates of the first rung.", rich_help_panel=_SEARCH)] = 24,
    rungs: Annotated[
        int, typer.Option(help="Rungs: each has fewer candidates, judged longer.", rich_help_panel=_SEARCH)
    ] = 3,
    zeta: Annotated[
        str, typer.Option(help="Friendly noise, n/255: a list, or 8:32 for 8,16,32.", rich_help_panel=_SEARCH)
    ] = "8:32",
    mu: Annotated[str, typer.Option(help="Random noise, likewise.", rich_help_panel=_SEARCH)] = "8:32",
    kinds: Annotated[
        str, typer.Option(help="Distributions of the random noise.", rich_help_panel=_SEARCH)
    ] = "bernoulli,uniform,gaussian",
    noise_lr: Annotated[
        str, typer.Option(help="Step of the friendly noise's optimiser.", rich_help_panel=_SEARCH)
    ] = "10,20,50,100",
    penalty: Annotated[str, typer.Option(help="Weight of its size (lambda).", rich_help_panel=_SEARCH)] = "1,10",
    no_refine: Annotated[
        bool, typer.Option("--no-refine", help="Only the grid, nothing finer.", rich_help_panel=_SEARCH)
    ] = False,
    no_confirm: Annotated[
        bool, typer.Option("--no-confirm", help="Do not train the best once more.", rich_help_panel=_SEARCH)
    ] = False,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the candidates, the rungs and the time.")] = False,
    download: Annotated[
        bool, typer.Option(help="Fetch CIFAR-10 or CIFAR-100 from its home if it is not here.")
    ] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Find settings of FRIENDS for your data: much protection for little accuracy.

    Example: `friends tune path/to/images --model resnet18 --minutes 60`

    Poisons a part of your training images, makes sure that this works without a defense, and searches settings that
    stop it and keep the accuracy on images held out from training. The test set is not looked at. What it finds is
    printed, and in `OUT/tuning.json` and `OUT/tuning.md`. The same command goes on after a stop, at whatever moment.
    """

    def work() -> None:
        from friends.bench.trial import ModelSpec
        from friends.bench.tuning import tune as search
        from friends.bench.tuning_plan import plan
        from friends.bench.tuning_settings import Tuning
        from friends.data.augment import Augment
        from friends.training.recipe import Recipe

        augment = None if no_augment else Augment()
        settings = Tuning(
            source=data,
            size=size,
            model=ModelSpec(name=model, width=width),
            recipe=Recipe(epochs=epochs, lr=lr, batch=batch, augment=augment),
            zeta=grey_levels("zeta", zeta),
            mu=grey_levels("mu", mu),
            kinds=_kinds(kinds),
            lr=numbers("noise-lr", noise_lr),
            penalty=numbers("penalty", penalty),
            candidates=candidates,
            rungs=rungs,
            seeds=seeds,
            refine=not no_refine,
            accuracy_drop=accuracy_drop,
            confirm=not no_confirm,
            seed=seed,
        )
        where = str(pick_device(device, threads))
        if dry_run:
            with Bars() as bars:
                planned = plan(settings, device=where, download=download, progress=bars)
            _show_plan(planned)
            return
        with Bars() as bars:
            found = search(settings, out, device=where, minutes=minutes, download=download, progress=bars)
        _show(found, settings, out)

    guarded(work)


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers above 0 from "10,20" or "8:32", which doubles from 8 to 32.

    Raises:
        ValueError: one of them is no number or not above 0, or the end of a range is below its start.
    """
    try:
        low, colon, high = text.partition(":")
        found = _doubling(name, float(low), float(high)) if colon else [float(part) for part in text.split(",")]
    except ValueError as error:
        if str(error).startswith("--"):
            raise
        raise ValueError(f"--{name} is a list such as 8,16,32 or a range such as 8:32, not {text!r}") from None
    if not all(0 < value < float("inf") for value in found):
        raise ValueError(f"--{name} has numbers above 0, not {text!r}")
    return tuple(found)


def grey_levels(name: str, text: str) -> tuple[int, ...]:
    """Whole grey levels from "8,16,32", "8:32" or "8/255,16/255"; 0 is none at all.

    Raises:
        ValueError: one of them is no whole number from 0 to 127, or the end of a range is below its start.
    """
    plain = text.replace("/255", "")
    parts = [part for part in plain.split(",") if part.strip() != "0"]
    none = (0,) if len(parts) < len(plain.split(",")) else ()
    found = numbers(name, ",".join(parts)) if parts else ()
    for value in found:
        if value != int(value) or value > 127:
            hint = f"; did you mean {255 * value:g}?" if value < 1 else ""
            raise ValueError(f"--{name} is in whole grey levels of 255, 0 to 127, not {value:g}{hint}")
    return (*none, *map(int, found))


def _doubling(name: str, low: float, high: float) -> list[float]:
    """``low``, twice that, and so on up to ``high``, which is in it."""
    if high < low:
        raise ValueError(f"--{name} {low:g}:{high:g} is reversed: write {high:g}:{low:g}")
    if not low > 0:
        raise ValueError(f"--{name} {low:g}:{high:g} cannot start at {low:g}: name 0 in a list, such as 0,8,16")
    found = [low]
    while found[-1] * 2 < high:
        found.append(found[-1] * 2)
    return found if found[-1] == high else [*found, high]


def _kinds(text: str) -> Any:
    """Distributions of the random noise. Raises ``ValueError`` for one that is unknown."""
    from friends.noise.random import check_random

    found = tuple(part.strip() for part in text.split(","))
    for kind in found:
        check_random(kind, 0.0)  # pyright: ignore[reportArgumentType]
    return found


def _show_plan(planned: Plan) -> None:
    """Print what is going to be done."""
    from rich.table import Table

    table = Table("rung", "candidates", "images", "epochs", "trainings each", title="Rungs")
    for k, rung in enumerate(planned.rungs):
        values = (k + 1, rung.candidates, rung.images, rung.epochs, rung.repeats)
        table.add_row(*map(str, values))
    print_plain("\n".join(["Candidates of the first rung:", *(f"  {c}" for c in planned.candidates)]))
    console.print(table)
    print_plain(
        f"at most {planned.trainings} trainings, about {rough_time(planned.seconds)} on this device, "
        f"{planned.bytes / 1e9:.2f} GB; nothing was started"
    )


def _show(found: Tuned, settings: Tuning, out: Path) -> None:
    """Print the trade-off, the verdict and how to use what was found."""
    from friends.bench.tuning_report import python_line, toml_arm, verdict

    if found.judged is not None:
        _table(found.judged, found, "Trade-off on held-out images")
    if found.confirmed is not None:
        _table(found.confirmed, found, "The same settings with new seeds and goals")
    for sentence in verdict(found):
        print_plain(f"\n{sentence}")
    if found.chosen is not None:
        epochs = settings.recipe.epochs
        use = f"\nIn Python:\n\n{python_line(found.chosen, epochs)}\n\nIn a trial file, for friends run:\n\n"
        print_plain(use + toml_arm(found.chosen, epochs), soft_wrap=True)
    print_plain(f"\nrecord  {out / 'tuning.json'}\nreport  {out / 'tuning.md'}", soft_wrap=True)


def _table(judged: Round, found: Tuned, title: str) -> None:
    """Print one round as a table: the front is marked."""
    from rich.table import Table

    from friends.bench.tuning_report import heading, rows_of

    table = Table("settings", "accuracy", "attack's success", "", title=title)
    table.caption = f"{heading(judged)}; means with 95 % intervals"
    for row in rows_of(judged, found.chosen):
        table.add_row(*row, style="bold" if "chosen" in row[-1] else None)
    console.print(table)
