"""The command line: a thin skin over the library, with progress, and with every mistake said in one line."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
import webbrowser
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from friends._version import __version__

if TYPE_CHECKING:
    import torch

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
        "Start with `friends demo`. Then `friends noise --help`, to protect a training of your own, or "
        "`friends run --help`, to measure an attack and a defense on data of your choice."
    ),
)
console = Console()
errors = Console(stderr=True)

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME].")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Download = Annotated[bool, typer.Option(help="Fetch CIFAR-10 or CIFAR-100 from its home if it is not here.")]
Threads = Annotated[int, typer.Option(help="Processor threads; 0 keeps torch's choice. Tiny nets are fastest with 1.")]


class Bars:
    """Progress bars: one for the whole trial, one for the step that is under way, each with an estimate."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        now = time.monotonic()
        if done < total and what in self._tasks and what != "trial" and now - self._last.get(what, 0) < 0.1:
            return
        self._last[what] = now
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(what))


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
    result = _guarded(lambda: _run(trial, out, device, threads, fresh=fresh, download=False))
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

    _guarded(work)


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
        str, typer.Option(help="released (the published code) or paper (the printed Eq. 3).")
    ] = "released",
    steps: Annotated[int, typer.Option(help="SGD steps per image.")] = 20,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side to which images of mixed sizes are resized.")] = None,
    download: Download = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Make the friendly noise of a data set, as a store on disk for any training loop; or describe a store.

    Make: `friends noise path/to/images -o noise/ --model resnet18`

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

        strengths = {"zeta": zeta, "mu": mu, "settings": {"base": settings, "steps": steps}, "def_epoch": 0}
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
        )
        where = _device(device, threads)
        with Bars() as bars:
            make_store(job, out, device=where, download=download, progress=bars)
        _describe(out)

    _guarded(work)


def _describe(folder: Path) -> None:
    """Say what a store holds, and how it is used."""
    from rich.table import Table

    from friends.noise.store import NoiseStore

    table = Table(title=str(folder), show_header=False)
    store = NoiseStore.load(folder)
    chosen = store.settings
    facts = store.info() | {
        "settings": f"{chosen.norm}, penalty {chosen.penalty:g}, {chosen.steps} steps, lr {chosen.lr:g}, "
        f"init {255 * chosen.init:g}/255, {chosen.direction}, {chosen.bound}",
    }
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
        where = str(_device(device, threads))
        result = run_trial(trial, folder, device=where, download=download, progress=bars)
    _show(result, folder)
    return (folder / "report.html").resolve()


def _show(result: Report, folder: Path) -> None:
    from friends.bench.report import headline, summary_table

    console.print()
    console.print(headline(result), highlight=False, markup=False)
    console.print(summary_table(result))
    console.print(f"record  {folder / 'record.json'}\nreport  {folder / 'report.html'}", highlight=False)


def _device(name: str, threads: int) -> torch.device:
    import torch

    if threads < 0:
        raise ValueError(f"threads is a number >= 0, not {threads}")
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _again() -> str:
    """The command that goes on with what was stopped: the same, without starting afresh."""
    return shlex.join(["friends", *(argument for argument in sys.argv[1:] if argument != "--fresh")])


def _guarded(work: Callable[[], T]) -> T:
    """Run a command's work. What the user can mend is one line on stderr; Ctrl-C says how to go on."""
    again = f"\nstopped; everything finished is kept. To go on: {_again()}"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return work()
    except KeyboardInterrupt:
        errors.print(again, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        _say("error", "red", error)
        raise typer.Exit(2) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _say("error", "red", f"the device's memory is full: choose a smaller batch or network ({error})")
        raise typer.Exit(2) from None


def _warn(message: Warning | str, *_where: object) -> None:
    _say("warning", "yellow", message)


def _say(kind: str, colour: str, what: object) -> None:
    errors.print(f"[{colour}]{kind}:[/] {_escape(str(what))}", highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """What the console script calls."""
    app()
