"""A grid: a trial, axes along which some of its settings change, the defenses to compare, and seeds; from TOML.

::

    title = "Two attacks on two networks"
    seeds = 8

    [trial]                                  # as in a trial file, without arms
    scenario = "scratch"
    data = { source = "cifar10" }
    recipe = { epochs = 80 }

    [axes.model]                             # an axis: named partial trials, merged over [trial]
    resnet18 = { model = { name = "resnet18" } }
    slim = { model = { name = "resnet18", width = 16 } }

    [axes.attack]
    gm = { attack = { name = "gradient-matching", xi = "16/255" } }
    sa = { include = "sleeper-agent.toml" }  # a partial trial from a file beside this one

    [axes.mu]                                # an axis may change a setting of a row, too
    "16/255" = { defenses = { friends-b = { mu = "16/255" } } }
    "32/255" = { defenses = { friends-b = { mu = "32/255" } } }

    [defenses]                               # a row of the table: one defense, or a list of them
    friends-b = { name = "friends", zeta = "16/255", mu = "16/255" }
    abl = { defenses = [{ name = "abl" }], recipe = { epochs = 85 }, only = { attack = ["sa"] } }

    [compare]                                # a second table: pairs of rows, goal by goal
    friends-b = ["abl"]

The grid is the product of its axes, each point with every defense that is defined there, ``undefended`` and the
control ``clean``, for every seed and every goal of the trial.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

from friends.bench.record import CLEAN, UNDEFENDED
from friends.bench.trial import ArmSpec, Trial, parse_trial, read_table
from friends.data.files import write_json
from friends.training.recipe import Recipe

Table = dict[str, Any]
PRESETS = ("smoke", "small", "paper")
SETTINGS = (
    "title",
    "seeds",
    "victims",
    "control",
    "keep_models",
    "scaled_down",
    "include",
    "trial",
    "axes",
    "defenses",
    "compare",
)
AIMS = {"target": "targeted attack", "backdoor": "backdoor"}
UNDEFENDED_ROWS = (UNDEFENDED, CLEAN)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train: a row of the table.

    Args:
        name: of the row.
        defenses: as trial files spell them.
        recipe: settings of the victim's training that this row has otherwise than the others.
        only: where on the axes it stands, by axis; everywhere by default.
    """

    name: str
    defenses: tuple[Table, ...] = ()
    recipe: Table = field(default_factory=dict[str, Any])
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def stands_at(self, labels: Mapping[str, str]) -> bool:
        """Whether the row is part of the grid at a point of its axes."""
        return all(labels.get(axis) in some for axis, some in self.only.items())


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a grid: where it lies, and everything that it is made of.

    Args:
        grid, preset: which grid.
        labels: the place on each axis.
        seed, goal, victim: of the trial; which of its goals; which of the models trained on its poisons.
        row: how it is trained.
        table: the trial as its file would spell it, without arms.
        scaled_down: how it is smaller than the published setting; empty if it is not.
    """

    grid: str
    preset: str
    labels: Mapping[str, str]
    seed: int
    goal: int
    victim: int
    row: Row
    table: Table
    scaled_down: str = ""

    @cached_property
    def trial(self) -> Trial:
        """The trial, with this cell's defenses as its only arm."""
        arms = [] if self.row.name in UNDEFENDED_ROWS else [{"name": self.row.name, "defenses": self.row.defenses}]
        table = {**self.table, "arms": arms, "seed": self.seed, "scaled_down": self.scaled_down}
        return parse_trial(table, default_name=self.grid)

    @property
    def arm(self) -> ArmSpec:
        """The defenses in force."""
        arms = self.trial.arms
        return arms[0] if arms else ArmSpec(name=self.row.name)

    @cached_property
    def recipe(self) -> Recipe:
        """How this victim is trained; surrogates are always trained by the trial's own recipe."""
        if not self.row.recipe:
            return self.trial.recipe
        return parse_trial({**self.table, "recipe": merged(self.table.get("recipe", {}), self.row.recipe)}).recipe

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` takes back."""
        row = {"name": self.row.name, "defenses": list(self.row.defenses), "recipe": self.row.recipe}
        return {
            "grid": self.grid,
            "preset": self.preset,
            "labels": dict(self.labels),
            "seed": self.seed,
            "goal": self.goal,
            "victim": self.victim,
            "row": row,
            "table": self.table,
            "scaled_down": self.scaled_down,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cell:
        """The cell that :meth:`to_json` described."""
        row = cast("Mapping[str, Any]", value["row"])
        made = Row(name=row["name"], defenses=tuple(row["defenses"]), recipe=row["recipe"])
        rest = {name: part for name, part in value.items() if name != "row"}
        return cls(row=made, **rest)

    def __str__(self) -> str:
        place = " ".join(f"{axis}={label}" for axis, label in self.labels.items())
        return f"{place} {self.row.name}, seed {self.seed}, goal {self.goal + 1}".strip()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells to run and compare; see the head of this file for the form.

    Args:
        name: of the grid; names its folder and stands in every record.
        preset: ``"smoke"``, ``"small"`` or ``"paper"`` for the built-in ones; empty for a user's own.
        title: what its page is called.
        trial, axes: partial trials as trial files spell them.
        rows: the defenses, without ``undefended`` and the control.
        seeds: of the trials.
        victims: models trained on the poisons of each goal in each way.
        control: whether the control is run.
        keep_models: whether the weights of victims are kept among the artifacts: figures need them.
        scaled_down: how it is smaller than the published setting.
        compare: rows that are compared with others than ``undefended``, and with which.
    """

    name: str
    preset: str = ""
    title: str = ""
    trial: Table
    axes: Mapping[str, Mapping[str, Table]] = field(default_factory=dict[str, Mapping[str, Table]])
    rows: tuple[Row, ...] = ()
    seeds: tuple[int, ...] = (0,)
    victims: int = 1
    control: bool = True
    keep_models: bool = False
    scaled_down: str = ""
    compare: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"grid {self.name!r} needs seeds, each once, not {list(self.seeds)}")
        if self.victims < 1:
            raise ValueError(f"grid {self.name!r}: victims is a number >= 1, not {self.victims}")
        for axis, points in self.axes.items():
            if not points:
                raise ValueError(f"grid {self.name!r}: axis {axis!r} has no point")
        for row in self.rows:
            for axis, some in row.only.items():
                wrong = [label for label in some if label not in self.axes.get(axis, {})]
                if wrong or axis not in self.axes:
                    raise ValueError(f"row {row.name!r} is only for {axis} = {', '.join(some)}, which is no point of "
                                     f"the grid: its axes are {_axes_text(self.axes)}")  # fmt: skip
        names = (*UNDEFENDED_ROWS, *(row.name for row in self.rows))
        for name in itertools.chain(self.compare, *self.compare.values()):
            if name not in names:
                raise ValueError(f"grid {self.name!r} compares row {name!r}, which it does not have; it has "
                                 f"{', '.join(names)}")  # fmt: skip

    def points(self) -> Iterator[tuple[dict[str, str], Table]]:
        """Every point of the product of the axes: its labels, and its trial without arms."""
        for choice in itertools.product(*(points.items() for points in self.axes.values())):
            table = self.trial
            for _, partial in choice:
                table = merged(table, partial)
            yield dict(zip(self.axes, (label for label, _ in choice), strict=True)), table

    def rows_at(self, labels: Mapping[str, str], table: Table) -> list[Row]:
        """The rows of a point, with what the point changes in their settings (``defenses`` of its partial trial)."""
        changes = _table(table.get("defenses", {}), "defenses of an axis")
        unknown = [name for name in changes if name not in {row.name for row in self.rows}]
        if unknown:
            raise ValueError(f"an axis changes the row {unknown[0]!r}, which the grid does not have")
        rows = [row for row in self.rows if row.stands_at(labels)]
        return [_changed(row, changes[row.name]) if row.name in changes else row for row in rows]

    @cached_property
    def _parts(self) -> tuple[list[Cell], list[tuple[dict[str, str], str, str]]]:
        cells: list[Cell] = []
        missing: list[tuple[dict[str, str], str, str]] = []
        always = [Row(name=UNDEFENDED), *([Row(name=CLEAN)] if self.control else [])]
        for labels, point in self.points():
            table = point
            where = ", ".join(f"{axis} = {label}" for axis, label in labels.items()) or "the trial"
            rows = self.rows_at(labels, table)
            table = {name: value for name, value in table.items() if name != "defenses"}
            for row in (*always, *rows):
                first = self._cell(labels, table, row, self.seeds[0], 0, 0)
                try:
                    goals = _checked(first).goals.count
                except NotDefinedError as error:
                    missing.append((labels, row.name, str(error)))
                    continue
                except (ValueError, TypeError) as error:
                    raise ValueError(f"grid {self.name!r}, {where}: {error}") from None
                of_row = itertools.product(self.seeds, range(goals), range(self.victims))
                cells += [self._cell(labels, table, row, *place) for place in of_row]
        return cells, missing

    def _cell(self, labels: dict[str, str], table: Table, row: Row, seed: int, goal: int, victim: int) -> Cell:
        down = str(table.get("scaled_down") or self.scaled_down)
        return Cell(
            grid=self.name,
            preset=self.preset,
            labels=labels,
            seed=seed,
            goal=goal,
            victim=victim,
            row=row,
            table={name: value for name, value in table.items() if name != "scaled_down"},
            scaled_down=down,
        )

    def cells(self) -> list[Cell]:
        """All cells, point by point and row by row.

        Raises:
            ValueError: a point of the axes is no valid trial; it says which and why.
        """
        return self._parts[0]

    def cell_at(self, labels: Mapping[str, str], row: str, seed: int, goal: int, victim: int) -> Cell | None:
        """The cell at a place, of whatever seed; ``None`` where the grid has no such point or row."""
        point = self._by_labels.get(_place(labels))
        if point is None:
            return None
        at, table = point
        rows = (*(Row(name=name) for name in UNDEFENDED_ROWS), *self.rows_at(at, table))
        found = next((r for r in rows if r.name == row), None)
        rest = {name: value for name, value in table.items() if name != "defenses"}
        return None if found is None else self._cell(at, rest, found, seed, goal, victim)

    @cached_property
    def _by_labels(self) -> dict[str, tuple[dict[str, str], Table]]:
        return {_place(labels): (labels, table) for labels, table in self.points()}

    def undefined(self) -> list[tuple[dict[str, str], str, str]]:
        """Rows that a point cannot have: labels, row, and why."""
        return self._parts[1]

    def narrowed(
        self, *, only: Sequence[str] = (), seeds: Sequence[int] = (), at: Mapping[str, Sequence[str]] | None = None
    ) -> Grid:
        """A part of the grid: some rows (``undefended`` and the control stay), seeds, or points of its axes.

        Raises:
            ValueError: the grid has no such row, axis or point.
        """
        names = [row.name for row in self.rows]
        unknown = [name for name in only if name not in (*names, *UNDEFENDED_ROWS)]
        if unknown:
            raise ValueError(f"grid {self.name!r} has no row {unknown[0]!r}; it has {', '.join(names)}")
        axes = {axis: dict(points) for axis, points in self.axes.items()}
        for axis, some in (at or {}).items():
            wrong = [label for label in some if label not in axes.get(axis, {})]
            if axis not in axes or wrong:
                raise ValueError(f"no point {axis} = {', '.join(wrong or some)}; the axes are {_axes_text(self.axes)}")
            axes[axis] = {label: axes[axis][label] for label in some}
        rows = tuple(row for row in self.rows if not only or row.name in only)
        names = [row.name for row in rows]
        axes = {
            axis: {label: _only_rows(part, names) for label, part in points.items()} for axis, points in axes.items()
        }
        kept = tuple(
            replace(row, only={axis: tuple(x for x in some if x in axes[axis]) for axis, some in row.only.items()})
            for row in rows
        )
        there = (*UNDEFENDED_ROWS, *names)
        pairs = {row: tuple(o for o in others if o in there) for row, others in self.compare.items() if row in there}
        return replace(
            self, rows=kept, seeds=tuple(seeds) or self.seeds, axes=axes, trial=_only_rows(self.trial, names),
            compare=pairs,
        )  # fmt: skip

    def with_source(self, source: str, name: str | None = None) -> Grid:
        """The same grid on data from elsewhere: those called ``name``, or all of them."""

        def moved(table: Table) -> Table:
            data = table.get("data")
            if not isinstance(data, dict) or "source" not in data or (name is not None and data["source"] != name):
                return table
            return {**table, "data": {**cast("Table", data), "source": source}}

        axes = {axis: {label: moved(part) for label, part in points.items()} for axis, points in self.axes.items()}
        return replace(self, trial=moved(self.trial), axes=axes)

    def to_json(self) -> dict[str, Any]:
        """The grid as plain values, for its folder."""
        rows = {
            row.name: {"defenses": list(row.defenses), "recipe": row.recipe, "only": dict(row.only)}
            for row in self.rows
        }
        return {
            "name": self.name,
            "preset": self.preset,
            "title": self.title,
            "scaled_down": self.scaled_down,
            "seeds": list(self.seeds),
            "victims": self.victims,
            "control": self.control,
            "keep_models": self.keep_models,
            "trial": self.trial,
            "axes": {axis: dict(points) for axis, points in self.axes.items()},
            "defenses": rows,
            **({"compare": {row: list(others) for row, others in self.compare.items()}} if self.compare else {}),
        }

    def write(self, out: Path) -> None:
        """Write ``grid.json`` into its folder; of data by path only the last part of the path."""
        write_json(out / "grid.json", json.loads(json.dumps(_without_paths(self.to_json()))))


class NotDefinedError(ValueError):
    """A defense that does not exist for an attack: its result is n/a, which is no mistake of the grid."""


def _without_paths(value: object) -> object:
    if not isinstance(value, dict):
        return value
    table = {name: _without_paths(part) for name, part in cast("Table", value).items()}
    return {
        name: Path(part).name if name == "source" and isinstance(part, str) else part for name, part in table.items()
    }


def _only_rows(part: Table, names: Sequence[str]) -> Table:
    """A point of an axis without what it changes in rows that are left out."""
    if "defenses" not in part:
        return part
    changes = _table(part["defenses"], "defenses of an axis")
    return {**part, "defenses": {name: change for name, change in changes.items() if name in names}}


def _changed(row: Row, change: object) -> Row:
    """A row of one defense with some of its settings changed."""
    if len(row.defenses) != 1:
        raise ValueError(f"an axis changes settings of row {row.name!r}, which has {len(row.defenses)} defenses: only "
                         "rows of one can be changed")  # fmt: skip
    return replace(row, defenses=(merged(row.defenses[0], _table(change, f"defenses of an axis: {row.name}")),))


def _checked(cell: Cell) -> Trial:
    """The trial of a cell, checked; :class:`NotDefinedError` where its defense is not defined for its attack."""
    undefended = replace(cell, row=Row(name=UNDEFENDED)).trial
    aim, classes = undefended.attack.about.aim, len(undefended.data.classes)
    try:
        trial = cell.trial
    except ValueError as error:
        if "would be n/a" in str(error):
            raise NotDefinedError(f"not defined for a {AIMS[aim]}") from None
        raise
    for defense in cell.arm.defenses:
        if 0 < classes < defense.about.classes:
            raise NotDefinedError(f"for {defense.about.classes} classes or more")
    _ = cell.recipe
    return trial


def _place(labels: Mapping[str, str]) -> str:
    """A key for labels in whatever order; those of a record may come from a bad file and be no strings at all."""
    return json.dumps(dict(labels), sort_keys=True)


def _axes_text(axes: Mapping[str, Mapping[str, Table]]) -> str:
    return "; ".join(f"{axis}: {', '.join(points)}" for axis, points in axes.items()) or "none"


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """``over`` laid over ``base``, table by table; a table that names another method replaces the old one."""
    result = dict(base)
    for name, value in over.items():
        old = result.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            theirs, ours = cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", value)
            another = "name" in ours and ours["name"] != theirs.get("name")
            result[name] = dict(ours) if another else merged(theirs, ours)
        else:
            result[name] = value
    return result


def parse_grid(table: Mapping[str, Any], name: str, *, preset: str = "", folder: Path | None = None) -> Grid:
    """The grid that nested plain values describe.

    Args:
        folder: where ``include`` finds its files.

    Raises:
        ValueError: an unknown setting, or one of the wrong kind.
        FileNotFoundError: a file to include is not there.
    """
    top = dict(table)
    if "include" in top:
        top = merged(_included(str(top.pop("include")), folder), top)
    unknown = [key for key in top if key not in SETTINGS]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} of a grid; it has {', '.join(SETTINGS)}")
    trial = _partial(top.get("trial", {}), folder, "[trial]")
    axes = {
        axis: {label: _partial(part, folder, f"axis {axis}: {label}") for label, part in _table(points, axis).items()}
        for axis, points in _table(top.get("axes", {}), "[axes]").items()
    }
    rows = tuple(_row(key, value) for key, value in _table(top.get("defenses", {}), "[defenses]").items())
    return Grid(
        name=name,
        preset=preset,
        title=str(top.get("title", name)),
        trial=trial,
        axes=axes,
        rows=rows,
        seeds=_seeds(top.get("seeds", 1)),
        victims=int(top.get("victims", 1)),
        control=bool(top.get("control", True)),
        keep_models=bool(top.get("keep_models", False)),
        scaled_down=str(top.get("scaled_down", "")),
        compare={row: _names(others, row) for row, others in _table(top.get("compare", {}), "[compare]").items()},
    )


def _names(value: object, row: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in cast("list[object]", value)):
        raise ValueError(f"[compare] has a list of rows to compare {row!r} with, not {value!r}")
    return tuple(cast("list[str]", value))


def _seeds(value: object) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return tuple(range(value))
    if isinstance(value, list) and all(isinstance(seed, int) for seed in cast("list[object]", value)):
        return tuple(cast("list[int]", value))
    raise ValueError(f"seeds is how many, or a list of them, not {value!r}")


def _partial(value: object, folder: Path | None, where: str) -> Table:
    """A partial trial, with the file that it includes below it."""
    table = _table(value, where)
    if "include" not in table:
        return table
    rest = {key: item for key, item in table.items() if key != "include"}
    return merged(_included(str(table["include"]), folder), rest)


def _included(name: str, folder: Path | None) -> Table:
    if folder is None or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"include names a file beside the grid's, not {name!r}")
    return _partial(read_table(folder / name), folder, name)


def _row(name: str, value: object) -> Row:
    if isinstance(value, list):
        return Row(name=name, defenses=tuple(cast("list[Table]", value)))
    table = _table(value, f"defense {name!r}")
    if "defenses" not in table:
        return Row(name=name, defenses=(table,))
    unknown = [key for key in table if key not in ("defenses", "recipe", "only")]
    if unknown:
        raise ValueError(f"row {name!r}: unknown setting {unknown[0]!r}; it has defenses, recipe and only")
    only = {axis: tuple(some) for axis, some in _table(table.get("only", {}), f"only of {name!r}").items()}
    return Row(name=name, defenses=tuple(table["defenses"]), recipe=table.get("recipe", {}), only=only)


def _table(value: object, where: str) -> Table:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a table, not {value!r}")
    return cast("Table", value)


def built_in(preset: str) -> list[str]:
    """The names of the built-in grids of a preset."""
    folder = files("friends.bench.grid") / "builtin" / preset
    names = (file.name for file in folder.iterdir() if file.name.endswith(".toml"))
    return sorted(name.removesuffix(".toml") for name in names if not name.startswith("_"))


def read_grid(what: str, preset: str = "small") -> Grid:
    """A built-in grid by its name, or one from a TOML file.

    Raises:
        ValueError: no built-in grid has the name, or the file is no grid; the message says what there is.
        FileNotFoundError: there is no such file.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if what in built_in(preset):
        with as_file(files("friends.bench.grid") / "builtin" / preset) as folder:
            return _read(Path(folder) / f"{what}.toml", preset)
    if not what.endswith(".toml"):
        raise ValueError(f"no built-in grid {what!r} of preset {preset}; there are {', '.join(built_in(preset))}; or "
                         "name a TOML file")  # fmt: skip
    return _read(Path(what), "")


def grid_of(folder: Path) -> Grid:
    """The grid whose folder it is, from the ``grid.json`` in it.

    Raises:
        FileNotFoundError: it is no folder of a grid.
        ValueError: the file is of another version.
    """
    path = folder / "grid.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of a grid: it has no grid.json")
    try:
        table = _table(json.loads(path.read_text(encoding="utf-8")), "grid.json")
        name, preset = str(table.pop("name")), str(table.pop("preset"))
        return parse_grid(table, name, preset=preset)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, preset: str) -> Grid:
    table = read_table(path)
    try:
        return parse_grid(table, path.stem, preset=preset, folder=path.parent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name}: {error}") from error
