"""What all commands share: the terminal, progress bars, the device, and mistakes said in one line."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

console = Console()
errors = Console(stderr=True)
UNITS_OF_TIME = ((86400, "days"), (3600, "h"), (60, "min"))

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Download = Annotated[bool, typer.Option(help="Fetch CIFAR-10 or CIFAR-100 from its home if it is not here.")]
Threads = Annotated[int, typer.Option(help="Processor threads; 0 keeps torch's choice. Tiny nets are fastest with 1.")]


def print_plain(text: str, *, to: Console = console, style: str | None = None, soft_wrap: bool | None = None) -> None:
    """Print a text as it is: names and paths in it are no markup, and its numbers get no colours."""
    to.print(text, markup=False, highlight=False, style=style, soft_wrap=soft_wrap)


def rough_time(seconds: float) -> str:
    """A time to two figures, in the unit that suits it; a dash for none."""
    if seconds <= 0:
        return "–"
    size, unit = next((each for each in UNITS_OF_TIME if seconds >= 1.5 * each[0]), (1, "s"))
    number = seconds / size
    return f"{number:.2g} {unit}" if number < 10 else f"{number:,.0f} {unit}"


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
        soon = now - self._last.get(what, 0) < 0.1 and what not in ("trial", "goals")
        if done < total and what in self._tasks and soon:
            return
        self._last[what] = now
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(what))


def pick_device(name: str, threads: int) -> torch.device:
    """The device of that name, tried out; ``threads`` processor threads, 0 for torch's own choice.

    Raises:
        ValueError: there is no such device here, or it does not work.
    """
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


def again() -> str:
    """The command that goes on with what was stopped: the same, without starting afresh."""
    return shlex.join(["friends", *(argument for argument in sys.argv[1:] if argument != "--fresh")])


def guarded(work: Callable[[], T]) -> T:
    """Run a command's work. What the user can mend is one line on stderr; Ctrl-C says how to go on."""
    stopped = f"\nstopped; everything finished is kept. To go on: {again()}"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return work()
    except KeyboardInterrupt:
        print_plain(stopped, to=errors, soft_wrap=True)
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
    errors.print(f"[{colour}]{kind}:[/] {escape(str(what))}", highlight=False, soft_wrap=True)
