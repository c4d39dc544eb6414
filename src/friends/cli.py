"""The command line: a thin skin over the library, with progress, and with every mistake said in one line."""

from __future__ import annotations

import textwrap
import webbrowser
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from friends._version import __version__
from friends.cli_bench import bench
from friends.cli_export import export as export_images
from friends.cli_train import predict, train
from friends.cli_tune import tune
from friends.terminal import Bars, Device, Download, Threads, console, escape, guarded, pick_device

if TYPE_CHECKING:
    from friends.bench.poison_folder import Manifest
    from friends.bench.record import Report
    from friends.bench.trial import Trial

T = TypeVar("T")

app = typer.Typer(
    name="friends",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Train image classifiers on data you cannot trust.\n\n"
        "A poisoning attack hides small perturbations in a few training images, so that the trained model fails on "
        "inputs of the attacker's choice. FRIENDS breaks such attacks with two noises added to the training images.\n\n"
        "Start with `friends demo`. Then `friends train --help`, to train on images of your own, protected; "
        "`friends noise --help`, to protect a training loop of your own; "
        "`friends attack`, to see the attacks and craft poisons; `friends run --help`, to measure an attack and a "
        "defense on data of your choice; or `friends bench --help`, to remake the tables of the paper."
    ),
)
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME].")]

app.add_typer(bench)
app.command()(tune)
app.command()(train)
app.command()(predict)
app.command("export")(export_images)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"friends {__version__}")
        raise typer.Exit


@app.callback()
def _main(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def demo(
    out: Out = None,
    seed: Annotated[int | None, typer.Option(help="Another seed: other targets, networks and poisons.")] = None,
    fresh: Annotated[bool, typer.Option(help="Run again, even if the demo has been run before.")] = False,
    device: Device = "cpu",
    threads: Threads = 1,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> None:
    """Poison real images, train on them undefended and with FRIENDS, and show what happened.

    Needs no download: it uses handwritten digits that come inside a Python package. It takes a few minutes on a
    laptop, prints what it measured, and leaves `runs/demo/report.html`.
    """
    from dataclasses import replace

    from friends.bench.trial import read_trial

    with as_file(files("friends.bench") / "demo.toml") as file:
        trial = read_trial(Path(file))
    if seed is not None:
        trial = replace(trial, seed=seed, name=f"demo-{seed}")
    result = guarded(lambda: _run(trial, out, device, threads, fresh=fresh, download=False))
    if open_report:
        webbrowser.open(result.as_uri())


@app.command()
def run(
    trial: Annotated[Path, typer.Argument(help="TOML file with the trial's settings; see docs/trials.md.")],
    out: Out = None,
    data: Annotated[str | None, typer.Option(help="Replaces the data source of the file, e.g. your folder.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Replaces the seed of the file; the folder becomes NAME-SEED.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Start over, deleting what an earlier run of it left.")] = False,
    download: Download = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Run one trial: an attack on some data, undefended and defended.

    Example: `friends run examples/cifar10-transfer-small.toml --data path/to/cifar-10`

    A run that was stopped, at whatever moment, goes on where it was when the same command is given again.
    """
    from dataclasses import replace

    from friends.bench.trial import read_trial

    def work() -> Path:
        chosen = read_trial(trial)
        if data is not None:
            chosen = replace(chosen, data=replace(chosen.data, source=data))
        if seed is not None:
            chosen = replace(chosen, seed=seed, name=f"{chosen.name}-{seed}")
        return _run(chosen, out, device, threads, fresh=fresh, download=download)

    guarded(work)


@app.command()
def noise(
    data: Annotated[str, typer.Argument(help="Data set (name, archive, parquet or image folder, npz), or a store.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the store to make.")] = None,
    model: Annotated[str, typer.Option(help="Proxy network that the noise is made with.")] = "resnet18",
    width: Annotated[int | None, typer.Option(help="Its width [default: as its authors have it].")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs that the proxy is trained for first, with random noise.")] = 5,
    lr: Annotated[float, typer.Option(help="Its learning rate; the small plain nets want 0.02 or so.")] = 0.1,
    weights: Annotated[
        Path | None, typer.Option(help="A model that a run saved, as the proxy instead of training one.")
    ] = None,
    zeta: Annotated[str, typer.Option(help="Bound of the noise, e.g. 16/255.")] = "16/255",
    mu: Annotated[str, typer.Option(help="Random noise while the proxy is trained.")] = "16/255",
    settings: Annotated[
        str, typer.Option(help="released (the published code), paper (the printed Eq. 3) or fast (Eq. 3 in 4 passes).")
    ] = "released",
    method: Annotated[
        str | None,
        typer.Option(help="How it is optimised: sgd, or our polyak or flips [default: as the settings say]."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps per image [default: as the settings say].")] = None,
    coding: Annotated[
        str, typer.Option(help="How it is kept: int8 (8 bits a value), bits (1), flips (0.1; needs --method flips).")
    ] = "int8",
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side to which images of mixed sizes are resized.")] = None,
    download: Download = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Make the friendly noise of a data set, as a store on disk for any training loop; or describe a store.

    Make: `friends noise path/to/images -o noise/ --model resnet18`

    Fast and small: `friends noise path/to/images -o noise/ --method flips --steps 4 --coding flips`

    Describe: `friends noise noise/`

    Generation is sharded: when it was stopped, the same command goes on at the first unfinished shard.
    """

    def work() -> None:
        if (Path(data) / "manifest.json").is_file() and out is None:
            _describe(Path(data))
            return
        if (Path(data) / "manifest.json").is_file():
            raise ValueError(f"{data} is a store already; name a data set")
        if out is None:
            raise ValueError("say where the store shall be made: friends noise DATA -o STORE")
        from friends.bench.proxy import StoreJob, make_store
        from friends.bench.trial import construct
        from friends.defenses.friends import Friends
        from friends.noise.coding import coding_named

        chosen = {"base": settings, "method": method, "steps": steps}
        given = {name: value for name, value in chosen.items() if value is not None}
        strengths = {"zeta": zeta, "mu": mu, "settings": given, "def_epoch": 0}
        job = StoreJob(
            source=data,
            defense=construct(Friends, strengths, "friends noise"),
            model=model,
            width=width,
            epochs=epochs,
            lr=lr,
            weights=weights,
            seed=seed,
            size=size,
            coding=coding_named(coding),
        )
        where = pick_device(device, threads)
        with Bars() as bars:
            make_store(job, out, device=where, download=download, progress=bars)
        _describe(out)

    guarded(work)


def _describe(folder: Path) -> None:
    """Say what a store holds, and how it is used."""
    from rich.table import Table

    from friends.noise.store import NoiseStore

    table = Table(title=str(folder), show_header=False)
    store = NoiseStore.load(folder)
    chosen = store.settings
    only_sgd = (
        f"{chosen.norm}, penalty {chosen.penalty:g}, lr {chosen.lr:g}, init {255 * chosen.init:g}/255, {chosen.bound}"
    )
    settings = [
        chosen.method,
        f"{chosen.steps} steps",
        chosen.direction,
        *([only_sgd] if chosen.method == "sgd" else []),
    ]
    facts = store.info() | {"settings": ", ".join(settings)}
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    console.print(
        "Use it in any PyTorch loop:\n\n"
        f"    store = friends.NoiseStore.load({str(folder)!r})\n"
        "    train = friends.NoisyDataset(train, store, transform=augment)\n",
        highlight=False,
        markup=False,
    )


_DATA, _GOALS, _SURROGATE = "Which images", "What the attacker wants", "How surrogates are trained"


@app.command()
def attack(
    what: Annotated[
        str | None, typer.Argument(help="An attack's name, a trial file (TOML), or a folder of poisons.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the poisons to craft.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the attack, e.g. xi=16/255; may be repeated.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="scratch, transfer or finetune [default: what the attack is for].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it [default: 0].")] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set: name, archive, parquet or image folder, npz.", rich_help_panel=_DATA)
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Only these, e.g. deer,horse [default: all].", rich_help_panel=_DATA)
    ] = None,
    train: Annotated[
        int | None, typer.Option(help="Training images, a balanced draw [default: all].", rich_help_panel=_DATA)
    ] = None,
    test: Annotated[
        int | None, typer.Option(help="Test images, for goals [default: all].", rich_help_panel=_DATA)
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side to which images of mixed sizes are resized.", rich_help_panel=_DATA)
    ] = None,
    goals: Annotated[
        int | None, typer.Option(help="How many; each gets poisons of its own [default: 1].", rich_help_panel=_GOALS)
    ] = None,
    true_class: Annotated[
        str | None, typer.Option(help="Class of the images [default: drawn].", rich_help_panel=_GOALS)
    ] = None,
    wanted_class: Annotated[
        str | None, typer.Option(help="Class that they are to be taken for [default: drawn].", rich_help_panel=_GOALS)
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Images of a goal [default: 1, or 1000 with a trigger].", rich_help_panel=_GOALS)
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="standard: the published keys say target and bases (CIFAR-10).", rich_help_panel=_GOALS),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="Of a backdoor: colours, checkerboard, white, ...", rich_help_panel=_GOALS)
    ] = None,
    trigger_size: Annotated[int | None, typer.Option(help="Its side in pixels.", rich_help_panel=_GOALS)] = None,
    trigger_place: Annotated[
        str | None, typer.Option(help="random, corner or corners.", rich_help_panel=_GOALS)
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="Who gets the trigger: class, or all others.", rich_help_panel=_GOALS)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Network [default: resnet18].", rich_help_panel=_SURROGATE)] = None,
    width: Annotated[
        int | None, typer.Option(help="Its width [default: as its authors have it].", rich_help_panel=_SURROGATE)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs [default: 80].", rich_help_panel=_SURROGATE)] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per step [default: 128].", rich_help_panel=_SURROGATE)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate [default: 0.1].", rich_help_panel=_SURROGATE)] = None,
    no_augment: Annotated[
        bool,
        typer.Option("--no-augment", help="The victim does not augment, nor do they.", rich_help_panel=_SURROGATE),
    ] = False,
    own_surrogates: Annotated[
        bool, typer.Option("--own-surrogates", help="New ones for every goal.", rich_help_panel=_SURROGATE)
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the catalogue of attacks.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write them here too, as the pickles that published code reads.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Start over, deleting what is in the folder of poisons.")] = False,
    download: Download = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Craft poisons; or show the attacks there are; or check a folder of poisons.

    The catalogue: `friends attack`

    One attack and its settings: `friends attack gradient-matching`

    Craft: `friends attack gradient-matching --data path/to/cifar-10 -o poisons/ --goals 4 --set steps=100`

    The poisons of a trial, without its victims: `friends attack examples/cifar10-scratch-small.toml -o poisons/`

    Check: `friends attack poisons/`, and against the data that they are for: `friends attack poisons/ --data DATA`

    What was stopped goes on when the same command is given again. What is in the folder and how it is used is in
    docs/attacks.md.
    """
    options = {
        "": {"scenario": scenario, "seed": seed, "own_surrogates": own_surrogates or None},
        "data": {
            "source": data,
            "classes": None if classes is None else [name.strip() for name in classes.split(",")],
            "train": train,
            "test": test,
            "size": size,
        },
        "goals": {
            "count": goals,
            "true_class": true_class,
            "wanted_class": wanted_class,
            "images": images,
            "keys": keys,
            "sources": sources,
        },
        "trigger": {"kind": trigger, "size": trigger_size, "place": trigger_place},
        "model": {"name": model, "width": width},
        "recipe": {"epochs": epochs, "batch": batch, "lr": lr, "augment": False if no_augment else None},
    }

    def work() -> None:
        from friends.attacks import ATTACKS

        if what is None or list_:
            _show_catalogue()
        elif what not in ATTACKS and Path(what).is_dir():
            _check_poisons(Path(what), out, data, export, download=download)
        elif what in ATTACKS and out is None and data is None:
            _show_attack(what)
        else:
            from friends.bench.attacking import attack_trial

            trial = attack_trial(what, options, settings or ())
            _attack(trial, out, export, device, threads, fresh=fresh, download=download)

    guarded(work)


def _attack(
    trial: Trial, out: Path | None, export: Path | None, device: str, threads: int, *, fresh: bool, download: bool
) -> None:
    """Craft with bars, and print what was crafted."""
    import shutil

    from friends.bench.attacking import craft_folder
    from friends.bench.poison_folder import MANIFEST, Manifest
    from friends.data.files import owned

    if out is None:
        raise ValueError("say where the poisons shall be saved: friends attack ... -o FOLDER")
    found = Manifest.read(out) if (out / MANIFEST).exists() else None
    if found is not None and fresh:
        with owned(out):
            shutil.rmtree(out)
    elif found is not None and not found.finished:
        console.print(f"[dim]resuming {escape(str(out))}[/]")
    with Bars() as bars:
        where = str(pick_device(device, threads))
        manifest = craft_folder(trial, out, device=where, download=download, export_to=export, progress=bars)
    if found is not None and found.finished and not fresh:
        console.print(f"[dim]{escape(str(out))} was finished; --fresh crafts it again.[/]")
    _show_poisons(manifest, out)


def _check_poisons(folder: Path, out: Path | None, data: str | None, export: Path | None, *, download: bool) -> None:
    """Describe a folder of poisons and check its files, and what they claim if the data are given."""
    from friends.bench import poison_folder

    if out is not None:
        raise ValueError(f"{folder} is a folder of poisons; to craft, name an attack or a trial file")
    if export is not None and data is None:
        raise ValueError("to export poisons, say for which data they are: --data DATA")
    manifest = poison_folder.verify(folder)
    said = "every file is as it was written: sizes and sha256 agree"
    if data is not None:
        with Bars() as bars:
            clean = poison_folder.clean_data(folder, source=data, download=download, progress=bars)
            count = sum(1 for _ in poison_folder.read_poisons(folder, clean))
        said += f"\n{count} poisoned sets keep bound, budget and labels on {clean!r}"
        if export is not None:
            poison_folder.export(folder, clean, export)
    _show_poisons(manifest, folder)
    console.print(said, highlight=False, markup=False)


def _show_poisons(manifest: Manifest, folder: Path) -> None:
    """Say what a folder of poisons holds."""
    from rich.table import Table

    table = Table(title=f"{manifest.attack}: {len(manifest.goals)} of {manifest.planned} goals in {folder}")
    for name in ("goal", "poisons", "largest change", "objective", "seconds"):
        table.add_column(name, justify="left" if name == "goal" else "right", no_wrap=name == "objective")
    for entry in manifest.goals:
        scores = "" if entry.score_first is None else f"{entry.score_first:.3g} → {entry.score_last:.3g}"
        table.add_row(
            escape(entry.goal), str(entry.poisons), f"{entry.largest_change}/255", scores, f"{entry.seconds:.3g}"
        )
    console.print(table)
    data = manifest.data
    console.print(
        f"made for {data['train']} images of {data['name']}, fingerprint {data['fingerprint'][:16]}",
        highlight=False,
        markup=False,
    )
    if not manifest.finished:
        console.print("not finished: the command that began it goes on with it", highlight=False)


def _show_catalogue() -> None:
    from rich.table import Table

    from friends.attacks import ATTACKS
    from friends.attacks.catalogue import HEADER, catalogue

    caption = "cost of one goal on CIFAR-10 in full: passes of an image through a surrogate, and surrogates trained"
    table = Table(caption=caption, show_lines=True)
    table.add_column("attack", no_wrap=True)
    for name in HEADER[2:]:
        table.add_column(name, justify="right" if name in HEADER[-2:] else "left")
    for entry in catalogue(ATTACKS):
        name, title, *rest = entry.cells
        folded = textwrap.fill(title, max(20, len(name)))
        table.add_row(f"[bold]{name}[/]\n{escape(folded)}", *(cell.replace(", ", "\n") for cell in rest))
    console.print(table)
    console.print("One of them: friends attack NAME\nCraft: friends attack NAME --data DATA -o FOLDER", highlight=False)


def _show_attack(name: str) -> None:
    """Say what an attack is, and what can be set of it."""
    from rich.table import Table

    from friends.attacks import ATTACKS
    from friends.attacks.catalogue import amount, catalogue

    entry = catalogue({name: ATTACKS[name]})[0]
    about, cost = entry.about, entry.cost
    console.print(f"[bold]{escape(about.title)}[/], {escape(about.paper)}", highlight=False)
    console.print(
        f"{entry.aim}; {' or '.join(about.scenarios)}; labels {'kept' if about.clean_label else 'changed'}\n"
        f"for one goal on CIFAR-10 in full: {amount(cost.forwards)} passes of an image through a surrogate; surrogates "
        f"trained: {cost.trainings:.3g}",
        highlight=False,
    )
    table = Table("--set", "default", "meaning")
    for setting in entry.settings:
        table.add_row(*map(escape, setting))
    console.print(table)
    console.print(f"Craft: friends attack {name} --data DATA -o FOLDER", highlight=False)


def _run(trial: Trial, out: Path | None, device: str, threads: int, *, fresh: bool, download: bool) -> Path:
    """Run a trial with bars; print its table; return the path of its report."""
    import shutil

    from friends.bench.run import run_folder, run_trial
    from friends.data.files import owned

    folder = run_folder(trial.name, out)
    if fresh and (folder / "trial.json").exists():
        with owned(folder):
            shutil.rmtree(folder)
    if (folder / "record.json").exists():
        console.print(f"[dim]{folder} is finished; --fresh runs it again.[/]")
    elif (folder / "trial.json").exists():
        console.print(f"[dim]resuming {folder}[/]")
    with Bars() as bars:
        where = str(pick_device(device, threads))
        result = run_trial(trial, folder, device=where, download=download, progress=bars)
    _show(result, folder)
    return (folder / "report.html").resolve()


def _show(result: Report, folder: Path) -> None:
    from friends.bench.report import headline, summary_table

    console.print()
    console.print(headline(result), highlight=False, markup=False)
    console.print(summary_table(result))
    console.print(f"record  {folder / 'record.json'}\nreport  {folder / 'report.html'}", highlight=False)


def main() -> None:
    """What the console script calls."""
    app()
