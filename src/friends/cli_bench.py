"""``friends bench``: grids of attacks and defenses, from their plan to their tables, figures and pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from friends.terminal import (
    Bars,
    Device,
    Download,
    Threads,
    console,
    errors,
    escape,
    guarded,
    pick_device,
    print_plain,
    rough_time,
)

if TYPE_CHECKING:
    from friends.bench.grid.record import Record
    from friends.bench.grid.run import Outlook
    from friends.bench.grid.spec import Grid
    from friends.bench.grid.stages import Workbench
    from friends.bench.grid.table import Table as MadeTable
    from friends.bench.grid.tasks import Done, Engine
    from friends.data.artifacts import Artifacts

CACHE = Path("bench/cache")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help=(
        "Remake the tables and figures of the paper from real runs, or run a grid of your own.\n\n"
        "`friends bench list` shows the grids; `friends bench run table1 --preset smoke` runs one in a minute; "
        "`friends bench report` makes pages of all that were run. docs/benchmark.md says more."
    ),
)
cache = typer.Typer(name="cache", no_args_is_help=True, help="What was computed and is found from then on.")
bench.add_typer(cache)

Preset = Annotated[str, typer.Option(help="smoke (a minute), small (an hour or two) or paper (a GPU).")]
Data = Annotated[str | None, typer.Option(help="Where the data are, e.g. a folder of CIFAR-10 parquet files.")]
Cache = Annotated[Path, typer.Option(help="Folder of what is computed once for all grids.")]
CacheUrl = Annotated[str | None, typer.Option(help="URL that machines without a common disk share, e.g. s3://...")]
_PART, _WHERE = "Which part of the grid", "Where it runs"


@bench.command("list")
def list_grids() -> None:
    """Show the built-in grids, with their number of cells."""
    from rich.table import Table

    from friends.bench.grid.spec import PRESETS, built_in, read_grid

    table = Table("grid", "what", *(f"{preset}" for preset in PRESETS), caption="models that are trained, by preset")
    for column in table.columns[2:]:
        column.justify = "right"
    for name in built_in("paper"):
        grids = [read_grid(name, preset) for preset in PRESETS]
        table.add_row(name, escape(grids[-1].title), *(f"{len(grid.cells()):,}" for grid in grids))
    console.print(table)
    print_plain("Run one: friends bench run NAME --preset smoke\nYour own: docs/benchmark.md")


@bench.command("run")
def run(
    what: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A built-in grid, or a TOML file of your own.")],
    preset: Preset = "small",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the records [default: bench/NAME-PRESET]."),
    ] = None,
    data: Data = None,
    cache: Cache = CACHE,
    cache_url: CacheUrl = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the cells, what is cached, and what the rest will take.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Do the most valuable cells that fit into this time, then stop.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this row; may be repeated.", rich_help_panel=_PART)
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(help="Only this point, AXIS=LABEL; may be repeated.", rich_help_panel=_PART),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many (8), or which (0,3,5 or 3,).", rich_help_panel=_PART)
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="inline, workers (processes here) or ray (a cluster).", rich_help_panel=_WHERE),
    ] = "inline",
    workers: Annotated[
        int,
        typer.Option(help="How many workers [default: one a core, or share of a GPU].", rich_help_panel=_WHERE),
    ] = 0,
    memory: Annotated[
        str | None, typer.Option(help="What all workers may use together, e.g. 16GB.", rich_help_panel=_WHERE)
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="Share of a GPU that one task takes, e.g. 0.25.", rich_help_panel=_WHERE)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster, e.g. auto [default: start one here].", rich_help_panel=_WHERE),
    ] = None,
    aside: Annotated[
        bool, typer.Option("--set-aside", help="Move records of older code or settings in OUT out of the way.")
    ] = False,
    download: Download = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Run a grid, or go on with one: attack x defense x seed, one line of `records.jsonl` a trained model.

    Look first: `friends bench run table1 --preset small --dry-run`

    Run: `friends bench run table1 --preset small --data path/to/cifar-10`

    Whenever it is stopped, the same command goes on where it was. At the end, and whenever it is stopped, the folder
    has tables and figures of what there is.
    """

    def work() -> None:
        from friends.bench.grid.run import check_disk, look_ahead
        from friends.bench.grid.spec import read_grid

        if minutes is not None and not minutes > 0:
            raise ValueError(f"--minutes is a number > 0, not {minutes:g}")
        whole = chosen = read_grid(what, preset)
        if data is not None:
            # Workers may have another folder: a path must hold there, too.
            chosen = whole.with_source(str(Path(data).absolute()) if Path(data).exists() else data)
        folder = out or Path("bench") / f"{whole.name}-{whole.preset}".rstrip("-")
        place = pick_device(device, threads)
        store = _artifacts(cache, cache_url)
        from friends.bench.grid.stages import Workbench

        with Bars() as bars:
            table = Workbench(store, str(place), download=download, progress=bars)
            part = chosen.narrowed(only=only or (), seeds=_seeds(seeds), at=_points(at or ()))
            outlook = look_ahead(chosen, part, table, folder, aside=aside and not dry_run)
        _show_outlook(outlook, folder)
        if dry_run:
            return
        check_disk(outlook, cache)
        payload = {"cache": str(cache.absolute()), "device": str(place), "download": download, "remote": cache_url}
        share = (1.0 if place.type == "cuda" else 0.0) if gpus is None else gpus
        chosen_engine = _engine(engine, workers, _bytes(memory), share, address, str(place))
        try:
            _work(whole, outlook, folder, chosen_engine, payload, minutes, share)
        except BaseException:
            _pages_after_failure(chosen, folder, table)
            raise
        _make_pages(chosen, folder, table)

    guarded(work)


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds is how many, such as 8, or which, such as 0,3,5; not {text!r}") from None
    if not numbers or ("," not in text and numbers[0] < 1):
        raise ValueError(f"--seeds is a number >= 1, or a list of seeds, not {text!r}")
    return tuple(numbers) if "," in text else tuple(range(numbers[0]))


def _points(some: list[str] | tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in some:
        axis, equals, label = text.partition("=")
        if not equals:
            raise ValueError(f"--at is AXIS=LABEL, such as attack=metapoison, not {text!r}")
        found.setdefault(axis.strip(), []).append(label.strip())
    return found


def _bytes(text: str | None) -> int | None:
    """``"16GB"`` -> 16e9."""
    if text is None:
        return None
    number = text.strip().rstrip("BKMGTbkmgti ")
    unit = text.strip()[len(number) :].strip().upper().replace("I", "")
    unit = unit if unit in UNITS else f"{unit}B"
    try:
        value = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"a size is a number with a unit, such as 16GB, not {text!r}") from None
    if value <= 0:
        raise ValueError(f"a size is more than nothing, not {text!r}")
    return int(value)


def _artifacts(folder: Path, url: str | None) -> Artifacts:
    from friends.data.artifacts import Artifacts

    return Artifacts(folder, remote=url)


def _engine(name: str, workers: int, memory: int | None, share: float, address: str | None, device: str) -> Engine:
    """The engine of a name; nothing is started before all of it is known to be right."""
    if workers < 0:
        raise ValueError(f"--workers is a number >= 1, not {workers}")
    if not 0 <= share <= 8:
        raise ValueError(f"--gpus is the share of a GPU that one task takes, such as 0.25, not {share}")
    if name == "inline":
        from friends.bench.grid.engines import Inline

        return Inline()
    if name == "workers":
        from friends.bench.grid.engines import local_workers

        return local_workers(workers, memory=memory, share=share, device=device)
    if name == "ray":
        from friends.bench.grid.ray_engine import RayEngine

        return RayEngine(address)
    raise ValueError(f"unknown engine {name!r}; choose inline, workers or ray")


def _show_outlook(outlook: Outlook, folder: Path) -> None:
    """What there is, what is left, and what it will take."""
    from rich.table import Table

    plan = outlook.plan
    rows: dict[tuple[str, str], list[float]] = {}
    for planned in plan.cells:
        place = (" ".join(planned.cell.labels.values()), planned.cell.row.name)
        counts = rows.setdefault(place, [0, 0, 0, 0])
        recorded = outlook.has(planned)
        counts[0] += 1
        counts[1] += recorded
        counts[2] += planned.done and not recorded
        counts[3] += 0 if recorded else planned.seconds
    axes = bool(plan.grid.axes)
    head = [*(["where"] if axes else []), "row", "cells", "recorded", "cached", "left, about"]
    table = Table(*head, title=escape(plan.grid.title))
    for column in table.columns[-4:]:
        column.justify = "right"
    for (where, row), (count, recorded, cached, seconds) in sorted(rows.items(), key=lambda item: item[0][0]):
        place = [escape(where)] if axes else []
        table.add_row(*place, escape(row), f"{count:.0f}", f"{recorded:.0f}", f"{cached:.0f}", rough_time(seconds))
    console.print(table)
    for labels, row, why in plan.grid.undefined():
        print_plain(f"n/a: {row} at {' '.join(labels.values()) or 'the trial'}: {why}", style="dim")
    if plan.grid.scaled_down or any(planned.cell.scaled_down for planned in plan.cells):
        texts = {planned.cell.scaled_down for planned in plan.cells}
        print_plain(f"scaled down: {'; '.join(sorted(texts))}")
    how = "from earlier runs of the same rows where there are some" if plan.measured else "by size; no run to go by yet"
    print_plain(
        f"{len(plan.cells)} models, {len(outlook.left)} to do, {len(outlook.poisons)} poison sets to craft: about "
        f"{rough_time(outlook.seconds)} on one worker ({how}), {outlook.bytes / 1e9:.2g} GB of cache; into {folder}"
    )


def _pages_after_failure(grid: Grid, folder: Path, table: Workbench) -> None:
    """What there is, shown; what goes wrong with that must not hide what went wrong before."""
    try:
        _make_pages(grid, folder, table)
    except Exception as error:
        print_plain(f"no tables: {error}", to=errors)


def _work(
    whole: Grid,
    outlook: Outlook,
    folder: Path,
    engine: Engine,
    payload: dict[str, Any],
    minutes: float | None,
    share: float,
) -> None:
    """Run what is left, with a line for every cell."""
    from friends.bench.grid.run import run_grid

    if not outlook.left:
        print_plain("everything is done already", style="dim")
        return

    def finished(record: Record) -> None:
        where = " ".join([*record.labels.values(), record.defense])
        print_plain(
            f"{where}, seed {record.seed}: {record.hits} of {record.images}, accuracy {100 * record.accuracy:.1f} %, "
            f"{rough_time(record.seconds['training'])}"
        )

    def failed(done: Done) -> None:
        print_plain(f"failed: {done.task.name}\n{done.error}", to=errors, style="red")

    with engine, Bars() as bars:
        driven = run_grid(
            outlook, folder, engine, payload, grid=whole, minutes=minutes, gpus=share, finished=finished, failed=failed,
            progress=bars,
        )  # fmt: skip
    if driven.stopped:
        print_plain(f"stopped: {driven.stopped}. To go on, give the same command again.")
    if driven.failed:
        raise ValueError(f"{len(driven.failed)} of the tasks failed (see above); the others are recorded")


def _make_pages(grid: Grid, folder: Path, table: Workbench | None) -> None:
    """Tables, figures and pages of what is in a folder."""
    from friends.bench.grid.figures import MissingError, draw, figures_of
    from friends.bench.grid.gallery import write_pictures
    from friends.bench.grid.record import read
    from friends.bench.grid.run import RECORDS
    from friends.bench.grid.site import write_site
    from friends.bench.grid.summary import summarise
    from friends.bench.grid.tabulate import tables, write

    records = read(folder / RECORDS)
    if not records:
        return
    made = tables(grid, summarise(records))
    write(made, folder / "tables")
    wanted = [name for name in figures_of(grid) if table is not None or not name.startswith("figure")]
    with Bars() as bars:
        try:
            draw(grid, records, table, folder, only=wanted, progress=bars) if wanted else None
        except MissingError as error:
            print_plain(f"no figure yet: {error}")
        if table is not None:
            write_pictures(grid, records, table, folder, progress=bars)
    index = write_site([folder], folder / "site")
    for one in made:
        _show_table(one)
    print_plain(f"records  {folder / RECORDS}\ntables   {folder / 'tables'}\npages    {index}")


def _show_table(made: MadeTable) -> None:
    from rich.table import Table

    table = Table(title=escape(made.title), caption=escape("\n".join(made.notes)), caption_justify="left")
    for column in made.head:
        head = f"{column.group}\n{column.title}" if column.group else column.title
        table.add_column(escape(head), justify="right" if column.number else "left")
    for row in made.rows:
        table.add_row(*(escape(entry.text) + ("*" if entry.mark else "") for entry in row))
    console.print(table)


@bench.command("report")
def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of grids [default: all in bench/].")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pages.")] = Path("bench/site"),
    title: Annotated[str, typer.Option(help="Of the pages.")] = "friends: attacks and defenses, measured",
) -> None:
    """Make static pages of all grids: tables to sort and filter, every row opening to its runs.

    They need no server and no network: open `index.html`, or copy the folder to any web space.
    """

    def work() -> None:
        from friends.bench.grid.site import write_site

        found = folders or sorted(path.parent for path in Path("bench").glob("*/records.jsonl"))
        if not found:
            raise ValueError("there is no bench/*/records.jsonl here: run a grid first, or name folders of grids")
        index = write_site(found, out, title=title)
        print_plain(f"{len(found)} grids: {index}")

    guarded(work)


@bench.command("tables")
def tables_again(folders: Annotated[list[Path], typer.Argument(help="Folders of grids.")]) -> None:
    """Make the tables and those figures that need no models anew from the records of folders."""

    def work() -> None:
        from friends.bench.grid.run import RECORDS
        from friends.bench.grid.spec import grid_of

        for folder in folders:
            if not (folder / RECORDS).is_file():
                raise FileNotFoundError(f"{folder} has no {RECORDS}: run the grid first")
            _make_pages(grid_of(folder), folder, None)

    guarded(work)


@bench.command("merge")
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Folders of the same grid, or files of records.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the merged grid.")],
) -> None:
    """Join the records of a grid that several machines ran; each cell once.

    Records that contradict each other, or were made by other code, are refused, never mixed.
    """

    def work() -> None:
        from friends.bench.grid.run import merge_folders

        count = merge_folders(parts, out)
        print_plain(f"{count} records in {out}")

    guarded(work)


@cache.command("list")
def cache_list(cache: Cache = CACHE) -> None:
    """What is in the cache, by kind, and what was begun."""

    def work() -> None:
        from rich.table import Table

        from friends.bench.grid.site_words import size_text

        store = _artifacts(cache, None)
        table = Table("kind", "number", "size", "last used", title=escape(str(cache)))
        artifacts = store.list()
        for kind in sorted({artifact.kind for artifact in artifacts}):
            some = [artifact for artifact in artifacts if artifact.kind == kind]
            used = max(artifact.used for artifact in some)
            table.add_row(kind, f"{len(some):,}", size_text(sum(a.size for a in some)), _moment(used))
        for part in store.unfinished():
            name = f"in the making: {part.folder.name.split('-')[0]}"
            table.add_row(name, "busy" if part.busy else "left", size_text(part.size), _moment(part.used))
        console.print(table)

    guarded(work)


def _moment(seconds: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="minutes")[:16]


@cache.command("check")
def cache_check(
    cache: Cache = CACHE,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged; it is made anew.")] = False,
) -> None:
    """Compare every file of the cache with its hash."""

    def work() -> None:
        store = _artifacts(cache, None)
        with Bars() as bars:
            damages = store.check(progress=bars)
        for damage in damages:
            print_plain(f"{damage.artifact.folder / damage.name} {damage.problem}", to=errors)
        if not damages:
            print_plain(f"{len(store.list())} artifacts are as they were written")
        elif repair:
            for folder in {damage.artifact.folder for damage in damages}:
                store.discard(folder)
            print_plain(f"{len({d.artifact.folder for d in damages})} removed; they are made anew when needed")
        else:
            raise ValueError(f"{len(damages)} files are damaged; --repair removes what they belong to")

    guarded(work)


@cache.command("prune")
def cache_prune(
    cache: Cache = CACHE,
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind; may be repeated.")] = None,
    unused_days: Annotated[float | None, typer.Option(help="Only what was not used for so many days.")] = None,
    keep: Annotated[str | None, typer.Option(help="Remove the longest unused until this is left, e.g. 20GB.")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also what stopped runs left behind.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what was not used for long. Records and tables stay; what is needed again is made again."""

    def work() -> None:
        from friends.bench.grid.site_words import size_text

        if unused_days is None and keep is None and not kind and not unfinished:
            raise ValueError("say what shall go: --unused-days, --keep, --kind or --unfinished")
        store = _artifacts(cache, None)
        chosen = {"older_than_days": unused_days, "keep_bytes": _bytes(keep)}
        if unfinished and unused_days is None and keep is None and not kind:
            chosen["keep_bytes"] = 1 << 62  # nothing that is finished
        gone = store.prune(kinds=kind or (), unfinished=unfinished, dry_run=dry_run, **chosen)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        verb = "would go" if dry_run else "removed"
        print_plain(f"{len(gone)} {verb}, {size_text(sum(part.size for part in gone))}")

    guarded(work)
