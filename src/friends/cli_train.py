"""``friends train`` and ``friends predict``: a protected classifier of one's own images, and its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from friends.terminal import Bars, Device, Download, Threads, console, errors, guarded, pick_device, print_plain
from friends.terminal import rough_time as time_of

if TYPE_CHECKING:
    from friends.bench.predicting import Prediction
    from friends.bench.training_plan import Outlook
    from friends.bench.training_settings import Prepared, Training
    from friends.defenses.friends import Friends

_DATA, _DEFENSE, _LOOP = "Which images", "The defense", "How the model is trained"
SHOWN = 5


def train(
    data: Annotated[
        str, typer.Argument(help="Data set: name, archive, parquet or image folder, npz, or csv of paths and labels.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model; a stopped training goes on.")] = Path(
        "runs/train"
    ),
    model: Annotated[
        str,
        typer.Option(help="Network: ours, torchvision:NAME, timm:NAME, or package.module:function of your own."),
    ] = "resnet18",
    width: Annotated[int | None, typer.Option(help="Width, of ours [default: as its authors have it].")] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Other data to judge on [default: the test part of DATA].", rich_help_panel=_DATA),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Judge on this share, not trained on [default: 0.2 if no test part].", rich_help_panel=_DATA),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side to which images of mixed sizes are resized.", rich_help_panel=_DATA)
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.", rich_help_panel=_DATA)
    ] = False,
    download: Download = False,
    zeta: Annotated[
        str, typer.Option(help="Bound of the friendly noise, e.g. 16/255; 0 for none.", rich_help_panel=_DEFENSE)
    ] = "16/255",
    mu: Annotated[
        str, typer.Option(help="Strength of the random noise; 0 for none.", rich_help_panel=_DEFENSE)
    ] = "16/255",
    random: Annotated[
        str, typer.Option(help="Its kind: bernoulli, uniform or gaussian.", rich_help_panel=_DEFENSE)
    ] = "bernoulli",
    def_epoch: Annotated[
        int | None,
        typer.Option(
            help="Epoch, from 0, at whose start friendly noise is made [default: 5, earlier in short trainings].",
            rich_help_panel=_DEFENSE,
        ),
    ] = None,
    settings: Annotated[
        str,
        typer.Option(help="How friendly noise is made: released, paper or fast.", rich_help_panel=_DEFENSE),
    ] = "released",
    undefended: Annotated[
        bool, typer.Option("--undefended", help="No defense, for comparison.", rich_help_panel=_DEFENSE)
    ] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the data.", rich_help_panel=_LOOP)] = 40,
    lr: Annotated[
        float, typer.Option(help="Learning rate; small plain nets want 0.05 or less.", rich_help_panel=_LOOP)
    ] = 0.1,
    batch: Annotated[int, typer.Option(help="Images per step.", rich_help_panel=_LOOP)] = 128,
    no_augment: Annotated[
        bool, typer.Option("--no-augment", help="No flips and shifts.", rich_help_panel=_LOOP)
    ] = False,
    precision: Annotated[
        str,
        typer.Option(help="auto, float32, or bfloat16 (mixed); auto mixes on GPUs.", rich_help_panel=_LOOP),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do, and for how long.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, deleting what is in the folder.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train a classifier of your images, protected by FRIENDS.

    Example: `friends train path/to/images --size 64 -o run/`

    Then: `friends predict run/ some.png more/`

    Leaves `model.safetensors`, `model.json`, `metrics.json` and `report.html` in the folder. A training that was
    stopped, at whatever moment, goes on when the same command is given again. docs/train.md says more.
    """

    def work() -> None:
        from friends.bench.training_settings import Training
        from friends.bench.trial import ModelSpec, construct
        from friends.data.augment import Augment
        from friends.training.recipe import Recipe

        recipe = {"epochs": epochs, "lr": lr, "batch": batch, "precision": precision}
        strengths = {"zeta": zeta, "mu": mu, "random": random, "settings": settings}
        chosen = Training(
            source=data,
            test=test,
            held_out=held_out,
            size=size,
            skip_broken=skip_broken,
            model=ModelSpec(name=model, width=width),
            recipe=construct(Recipe, {**recipe, "augment": None if no_augment else Augment()}, "friends train"),
            defense=None if undefended else _defense(strengths, def_epoch, epochs),
            seed=seed,
        )
        _train(chosen, out, device, threads, download=download, dry_run=dry_run, fresh=fresh)

    guarded(work)


def _defense(strengths: dict[str, str], def_epoch: int | None, epochs: int) -> Friends:
    """FRIENDS with strengths as they were written."""
    from friends.bench.trial import construct
    from friends.bench.tuning_grid import noise_epoch
    from friends.defenses.friends import Friends

    epoch = max(0, noise_epoch(epochs)) if def_epoch is None else def_epoch
    return construct(Friends, {**strengths, "def_epoch": epoch}, "friends train")


def _train(
    training: Training, out: Path, device: str, threads: int, *, download: bool, dry_run: bool, fresh: bool
) -> None:
    """Say what is going to be done, do it, and say what came out."""
    from friends.bench import training_run
    from friends.bench.training_plan import look_ahead
    from friends.bench.training_settings import prepare

    where = pick_device(device, threads)
    training_run.check(training, out, fresh=fresh)
    found = None if dry_run or fresh else training_run.finished(out)
    if found is not None:
        print_plain(f"{out} is finished; --fresh trains it again.", style="dim", soft_wrap=True)
    else:
        with Bars() as bars:
            prepared = prepare(training, download=download, progress=bars)
            outlook = look_ahead(training, prepared, where)
        _show_plan(training, prepared, outlook, 0 if fresh else training_run.epochs_done(out))
        if dry_run:
            print_plain("nothing was started")
            return
        if fresh:
            training_run.forget(out)
        with Bars() as bars:
            found = training_run.train(training, prepared, out, device=where, progress=bars)
    _show(found, out)


def _show_plan(training: Training, prepared: Prepared, outlook: Outlook, done: int) -> None:
    """Print what is going to be done."""
    train, recipe, defense = prepared.train, training.recipe, training.defense
    c, h, w = train.shape
    kind = {1: "grey", 3: "RGB"}[c]
    lines = [
        f"data      {len(train):,} images of {_shown(train.name)}, {kind}, {h}x{w}, {len(train.classes)} classes",
        f"judged on {len(prepared.held_out):,} images: {prepared.judged_on}",
        f"model     {training.model.name}, {outlook.parameters:,} parameters",
        f"training  {recipe.epochs} epochs, batch {recipe.batch}, lr {recipe.lr:g}, {recipe.precision} precision",
    ]
    if defense is None:
        lines.append("defense   none: --undefended")
    else:
        strengths = f"zeta {255 * defense.zeta:g}/255, mu {255 * defense.mu:g}/255 {defense.random}"
        when = f", friendly noise at the start of epoch {defense.def_epoch}" if defense.zeta else ""
        lines.append(f"defense   FRIENDS, {strengths}{when}")
    memory = f"{outlook.bytes / 1e9:.2g} GB" if outlook.bytes >= 1e8 else f"{outlook.bytes / 1e6:.2g} MB"
    left = f", {done} epochs of it done" if done else ""
    lines.append(f"time      about {time_of(outlook.seconds(done))} on this device{left}; {memory} of images and noise")
    print_plain("\n".join(lines), soft_wrap=True)
    _warn_skipped(prepared.skipped)


def _warn_skipped(skipped: tuple[str, ...]) -> None:
    if skipped:
        more = f"\n  and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        files = "".join(f"\n  {_shown(what)}" for what in skipped[:SHOWN])
        count = f"{len(skipped):,} {'image' if len(skipped) == 1 else 'images'}"
        print_plain(f"skipped   {count} that cannot be read:{files}{more}", style="yellow", soft_wrap=True)


def _show(found: dict[str, Any], out: Path) -> None:
    """Print what came out."""
    from rich.table import Table

    from friends.bench.training_report import headline, summary

    measures = found["measures"]
    console.print()
    print_plain(headline(found))
    print_plain(summary(found).replace("\u202f", " "))
    if len(measures["classes"]) <= 20:
        table = Table("class", "images", "precision", "recall")
        for one in measures["classes"]:
            shares = ("–" if one[name] is None else f"{100 * one[name]:.1f} %" for name in ("precision", "recall"))
            table.add_row(_plain_text(one["name"]), str(one["images"]), *shares)
        console.print(table)
    low, high = measures["interval"]
    print_plain(
        f"accuracy {100 * measures['accuracy']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}), calibration "
        f"error {100 * measures['ece']:.1f} %\n\nreport  {out / 'report.html'}\nmodel   {out / 'model.safetensors'}\n"
        f"use     friends predict {out} IMAGES...",
        soft_wrap=True,
    )


def predict(
    run: Annotated[Path, typer.Argument(help="Folder that friends train has made.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of them.")],
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a table here, too.")] = None,
    top: Annotated[int, typer.Option(help="How many classes to name for each image.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(help="The import path of the model, if it has one: says that its code may run."),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Say of images what a trained model takes them for, and with which probability.

    Example: `friends predict run/ some.png more/ --csv answers.csv --top 3`

    Files that cannot be read are named at the end and make the exit status 1; the others are answered.
    """

    def work() -> bool:
        from friends.bench import predicting
        from friends.bench.model_folder import read

        saved = read(run, model=model)
        files = predicting.files_of(images)
        where = pick_device(device, threads)
        broken: list[Prediction] = []
        said = _printed(predicting.predict(saved, files, top=top, device=where), broken)
        if csv is None:
            for _ in said:
                pass
        else:
            predicting.write_csv(said, csv, top)
        for one in broken:
            print_plain(f"not read: {_shown(one.error)}", to=errors, style="yellow", soft_wrap=True)
        return bool(broken)

    if guarded(work):
        raise typer.Exit(1)


def _printed(predictions: Iterable[Prediction], broken: list[Prediction]) -> Iterator[Prediction]:
    """The same predictions, each printed on its way; those of files that cannot be read are in ``broken``, too."""
    for one in predictions:
        if one.error:
            broken.append(one)
        else:
            answers = "  ".join(f"{_shown(name)} {100 * p:.1f} %" for name, p in one.answers)
            print_plain(f"{_shown(str(one.path))}  {answers}", soft_wrap=True)
        yield one


def _shown(text: str) -> str:
    """A name from a file or folder as it may be printed: a terminal obeys control characters."""
    return text if text.isprintable() else ascii(text)


def _plain_text(text: str) -> Any:
    """A cell of a table that is no markup."""
    from rich.text import Text

    return Text(_shown(text))
