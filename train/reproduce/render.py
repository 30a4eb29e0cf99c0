"""A collected table as text, Markdown, HTML and JSON: one grid of cells, written out four ways. Decides what is said, not what is so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import IO, Any

from svf_fast.train.files import write_atomically
from svf_fast.train.html_page import bullets, facts, page, section
from svf_fast.train.html_page import table as html_table
from svf_fast.train.reproduce.collect import Block, Cell, CollectedRow, CollectedTable
from svf_fast.train.reproduce.manifest import FOLDS

PROTOCOL = (
    "A run's figure is that of its best validation, by mIoU, and the FB-IoU is that of the same validation. Model selection so looks at "
    "the novel classes themselves: the field's protocol, and the paper's."
)
OTHER_DATA = (
    "The columns cannot be compared: the paper's figures are of other pictures, other sizes and far longer runs. What can be looked at "
    "is the order of the rows, by the paper and here, among the rows that have both figures; small differences here are within the noise "
    "of a run."
)


@dataclass(frozen=True)
class Circumstances:
    """How the runs were made: ``is_of_paper`` says whether the printed figures are of the same data."""

    is_of_paper: bool
    settings: Mapping[str, object]
    machine: Mapping[str, str]


@dataclass(frozen=True)
class _Grid:
    heading: str
    head: list[str]
    rows: list[list[str]]


def write_table(folder: Path, collected: CollectedTable, about: Circumstances) -> list[Path]:
    """``table<number>.md``, ``.html`` and ``.json`` in ``folder``, each whole or not at all; their paths."""
    contents = {"md": markdown(collected, about), "html": html(collected, about), "json": as_json(collected, about)}
    paths = []
    for ending, content in contents.items():
        path = folder / f"table{collected.number}.{ending}"
        write_atomically(path, partial(_write, content.encode()))
        paths.append(path)
    return paths


def text(collected: CollectedTable, about: Circumstances) -> str:
    """For a terminal: columns of equal width."""
    lines = [_title(collected)]
    for grid in _grids(collected, about):
        widths = [max(len(row[i]) for row in (grid.head, *grid.rows)) for i in range(len(grid.head))]
        lines += ["", grid.heading]
        for row in (grid.head, *grid.rows):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join([*lines, "", *_remarks(collected, about)])


def markdown(collected: CollectedTable, about: Circumstances) -> str:
    lines = [f"# {_title(collected)}", ""]
    for grid in _grids(collected, about):
        lines += [f"## {grid.heading}", "", _pipes(grid.head), _pipes(["---"] * len(grid.head))]
        lines += [*map(_pipes, grid.rows), ""]
    lines += [*(f"- {remark}" for remark in _remarks(collected, about)), ""]
    for title, values in (("Settings", about.settings), ("Machine", about.machine)):
        lines += [f"## {title}", "", *(f"- {key}: {value}" for key, value in values.items()), ""]
    return "\n".join(lines)


def html(collected: CollectedTable, about: Circumstances) -> str:
    sections = [
        section(grid.heading, html_table(list(map(escape, grid.head)), [list(map(escape, row)) for row in grid.rows]))
        for grid in _grids(collected, about)
    ]
    sections.append(section("How to read it", bullets(_remarks(collected, about))))
    sections.append(section("Settings and machine", facts("Settings", about.settings), facts("Machine", about.machine)))
    lead = PROTOCOL if about.is_of_paper else OTHER_DATA
    return page(f"svf-fast reproduce, table {collected.number}", _title(collected), lead, sections)


def as_json(collected: CollectedTable, about: Circumstances) -> str:
    """Every figure, and every run with its state."""
    content: dict[str, Any] = {
        "table": collected.number,
        "title": collected.table.title,
        "metric": collected.table.metric,
        "is_of_papers_data": about.is_of_paper,
        "folds": collected.folds,
        "seeds": collected.seeds,
        "blocks": [
            {"shots": block.shots, "rows": [_plain_row(row) for row in block.rows]} for block in collected.blocks
        ],
        "remarks": _remarks(collected, about),
        "settings": dict(about.settings),
        "machine": dict(about.machine),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _plain_row(row: CollectedRow) -> dict[str, Any]:
    return {
        "row": row.key,
        "labels": row.labels,
        "published": asdict(row.published),
        "paper": row.paper,
        "mean": asdict(row.mean),
        "difference": row.difference,
        "gain": row.gain,
        "paper_rank": row.paper_rank,
        "rank": row.rank,
        "folds": [asdict(cell) for cell in row.folds],
        "runs": [
            {
                "run": each.run.name,
                "composition": each.run.composition,
                "changed": each.run.changed,
                **asdict(each.case),
                **asdict(each.outcome),
                "obstacle": each.obstacle,
            }
            for each in row.runs
        ],
    }


def _title(collected: CollectedTable) -> str:
    return f"Table {collected.number} of the SVF paper: {collected.table.title}"


def _grids(collected: CollectedTable, about: Circumstances) -> list[_Grid]:
    return [_grid(collected, block, about) for block in collected.blocks]


def _grid(collected: CollectedTable, block: Block, about: Circumstances) -> _Grid:
    name = "mIoU" if collected.table.metric == "miou" else "FB-IoU"
    middle = ["difference"] if about.is_of_paper else ["rank, paper", "rank, here"]
    has_gains = any(collected.table.rows[row.key].against for row in block.rows)
    gains = ["gain, paper", "gain, here"] if has_gains else []
    head = [*collected.table.columns, "paper", "here", *middle, *gains, *(f"fold {fold}" for fold in collected.folds)]
    rows = []
    for row in block.rows:
        compared = [_signed(row.difference)] if about.is_of_paper else [_rank(row.paper_rank), _rank(row.rank)]
        folds = [
            _with_paper(cell, row, fold) if about.is_of_paper else _shown(cell)
            for fold, cell in zip(collected.folds, row.folds, strict=True)
        ]
        if has_gains:
            # the printed one is of all four folds
            printed = row.published.difference if sorted(collected.folds) == list(FOLDS) else None
            compared += [_signed(printed), _signed(row.gain)]
        rows.append([*row.labels, _printed(row), _shown(row.mean), *compared, *folds])
    return _Grid(f"{block.shots}-shot, {name}, %", head, rows)


def _printed(row: CollectedRow) -> str:
    if row.paper is None:
        return "–"
    return f"{row.paper:.2f}" + ("" if row.published.is_certain else " ?")


def _with_paper(cell: Cell, row: CollectedRow, fold: int) -> str:
    printed = row.published.folds
    return _shown(cell) + ("" if printed is None else f" ({printed[fold]:.2f})")


def _shown(cell: Cell) -> str:
    if cell.value is None:
        return cell.status
    value = f"{cell.value:.2f}" + ("" if cell.spread is None else f" ± {cell.spread:.2f}")
    return f"{value} [{cell.status}]" if cell.status else value


def _signed(difference: float | None) -> str:
    return "–" if difference is None else f"{difference:+.2f}".replace("-", "−")


def _rank(rank: int | None) -> str:
    return "–" if rank is None else str(rank)


def _remarks(collected: CollectedTable, about: Circumstances) -> list[str]:
    table, rows = collected.table, {row.key for block in collected.blocks for row in block.rows}
    shots = {block.shots for block in collected.blocks}
    remarks = [PROTOCOL] if about.is_of_paper else [OTHER_DATA, PROTOCOL]
    if len(collected.seeds) > 1:
        remarks.append(f"Seeds {', '.join(map(str, collected.seeds))}: mean ± sample standard deviation.")
    else:
        remarks.append(f"One seed ({collected.seeds[0]}): no spread is known.")
    if sorted(collected.folds) != list(FOLDS):
        beside = ": the paper's means beside them are of these folds, where it prints them" if about.is_of_paper else ""
        remarks.append(f"Only the folds {', '.join(map(str, collected.folds))}{beside}.")
    if about.is_of_paper and any(row.published.folds for block in collected.blocks for row in block.rows):
        remarks.append("In brackets: the paper's figure of the fold.")
    if any(row.against for row in table.rows.values()):
        remarks.append("Gain: over the row that the paper prints its difference to.")
    remarks += table.notes
    for slip in table.slips:
        if slip.row in rows and slip.shots in shots:
            labels = " ".join(table.rows[slip.row].labels)
            remarks.append(
                f"A slip of the paper's, kept as printed: {labels}, {slip.shots}-shot, {slip.what}: {slip.note}."
            )
    return [*remarks, *collected.missing]


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
