"""The paper's tables and figures as data: what is printed, and which composition of configuration parts each row is. Checked when
it is read; knows no run and no data set on a disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from svf_fast.train.schema import ConfigError, from_plain

MANIFEST = Path(__file__).resolve().parent / "paper.yaml"

Metric = Literal["miou", "fb_iou"]
FOLDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Published:
    """What the paper prints of a row for one number of shots, per cent. ``is_certain=False``: the row it belongs to is not certain
    from the paper's text."""

    mean: float
    folds: tuple[float, float, float, float] | None = None
    difference: float | None = None
    is_certain: bool = True


@dataclass(frozen=True)
class RowFacts:
    """``labels`` by the table's columns; ``parts`` compose the row's runs, none where the row is ``quoted`` from somewhere;
    ``against`` is the row that the printed difference is to."""

    labels: tuple[str, ...]
    parts: tuple[str, ...] = ()
    quoted: str | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        if bool(self.parts) == (self.quoted is not None):
            raise ValueError("parts: expected, or else quoted, not both")


@dataclass(frozen=True)
class Row(RowFacts):
    """A row of a table. ``published`` by shots."""

    published: Mapping[int, Published] = field(default_factory=dict)


@dataclass(frozen=True)
class Slip:
    """A printed figure that does not follow from the others."""

    row: str
    shots: int
    what: Literal["mean", "difference"]
    note: str


@dataclass(frozen=True)
class TableFacts:
    """``data`` is the part of the table's data set, ``columns`` name what the rows' labels are."""

    title: str
    metric: Metric
    data: str
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()
    slips: tuple[Slip, ...] = ()


@dataclass(frozen=True)
class Table(TableFacts):
    """A table of the paper; ``rows`` by their keys, in its order."""

    rows: Mapping[str, Row] = field(default_factory=dict)

    @property
    def shots(self) -> tuple[int, ...]:
        """Numbers of shots that it has columns for."""
        return tuple(dict.fromkeys(shots for row in self.rows.values() for shots in row.published))


@dataclass(frozen=True)
class FigureFacts:
    """``has_curves``: its runs are judged on training episodes too."""

    title: str
    data: str
    has_curves: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure(FigureFacts):
    """A figure of the paper; ``runs`` are the parts of each run by its label, in the order of the panels."""

    runs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    tables: Mapping[str, Table]
    figures: Mapping[str, Figure]


@cache
def paper() -> Manifest:
    """The shipped manifest. ConfigError, one sentence that names the key, on anything wrong in it."""
    return read_manifest(MANIFEST)


def read_manifest(path: Path) -> Manifest:
    """A manifest from YAML; errors as of :func:`paper`."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Manifest(
        tables={number: _table(table, f"tables.{number}") for number, table in content["tables"].items()},
        figures={name: _figure(figure, f"figures.{name}") for name, figure in content["figures"].items()},
    )


def _table(data: dict[str, Any], key: str) -> Table:
    facts = from_plain(TableFacts, _without(data, "rows", "slips"), key)
    rows = {name: _row(row, f"{key}.rows.{name}") for name, row in data["rows"].items()}
    for name, row in rows.items():
        if len(row.labels) != len(facts.columns):
            raise ConfigError(f"{key}.rows.{name}.labels has {len(row.labels)} values, expected {len(facts.columns)}")
        if row.against is not None and row.against not in rows:
            raise ConfigError(f"{key}.rows.{name}.against is {row.against!r}, which is no row of the table")
    slips = tuple(from_plain(Slip, slip, f"{key}.slips") for slip in data.get("slips", []))
    for slip in slips:
        if slip.row not in rows:
            raise ConfigError(f"{key}.slips names the row {slip.row!r}, which is no row of the table")
    return Table(**{**vars(facts), "slips": slips}, rows=rows)


def _row(data: dict[str, Any], key: str) -> Row:
    facts = from_plain(RowFacts, _without(data, "published"), key)
    published = {
        shots: from_plain(Published, values, f"{key}.published.{shots}") for shots, values in data["published"].items()
    }
    return Row(**vars(facts), published=published)


def _figure(data: dict[str, Any], key: str) -> Figure:
    facts = from_plain(FigureFacts, _without(data, "runs"), key)
    return Figure(**vars(facts), runs={label: tuple(parts) for label, parts in data["runs"].items()})


def _without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names}
