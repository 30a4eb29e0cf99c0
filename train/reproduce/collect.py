"""Outcomes of runs, put where the paper's table has its figures: means over folds and seeds, differences, ranks, and in words what is
missing. Per cent from here on. Opens nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from svf_fast.train.reproduce.manifest import FOLDS, Metric, Published, Row, Table
from svf_fast.train.reproduce.outcomes import Outcome
from svf_fast.train.reproduce.resolve import Case, PlannedRun


@dataclass(frozen=True)
class RowRun:
    """One run of a row: its plan and its outcome, or in ``obstacle`` why it does not apply."""

    case: Case
    run: PlannedRun
    outcome: Outcome
    obstacle: str | None = None


@dataclass(frozen=True)
class Cell:
    """``value`` where there is one, with its ``spread`` over seeds (sample standard deviation); ``status`` says what is missing,
    nothing where the cell is whole."""

    value: float | None = None
    spread: float | None = None
    status: str = ""

    @property
    def is_whole(self) -> bool:
        return self.value is not None and not self.status


@dataclass(frozen=True)
class CollectedRow:
    """``paper`` is the printed figure that ``mean`` stands beside: over the folds asked for, where it can be told; on other data than
    the paper's over all. Ranks count from 1, among the rows that have both figures."""

    key: str
    labels: tuple[str, ...]
    published: Published
    paper: float | None
    mean: Cell
    folds: tuple[Cell, ...]
    runs: tuple[RowRun, ...]
    quoted: str | None = None
    paper_rank: int | None = None
    rank: int | None = None
    gain: float | None = None  # over the row that the paper's printed difference is to

    @property
    def difference(self) -> float | None:
        """Ours less the paper's; None where one is missing or its row is not certain."""
        if self.paper is None or self.mean.value is None or not self.mean.is_whole or not self.published.is_certain:
            return None
        return self.mean.value - self.paper


@dataclass(frozen=True)
class Block:
    """The part of a table for one number of shots."""

    shots: int
    rows: tuple[CollectedRow, ...]


@dataclass(frozen=True)
class CollectedTable:
    """A table of the paper beside what came out here."""

    number: str
    table: Table
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    blocks: tuple[Block, ...] = field(default=())

    @property
    def missing(self) -> list[str]:
        """Sentences about runs that are not finished and have a reason, each reason once."""
        reasons: dict[str, None] = {}
        for block in self.blocks:
            for row in block.rows:
                for each in row.runs:
                    label = " ".join(part for part in row.labels if part not in ("", "-"))
                    if each.obstacle is not None:
                        reasons[f"{label}, {block.shots}-shot: does not apply: {each.obstacle}"] = None
                    elif each.outcome.state == "failed":
                        reasons[f"{each.run.name}: failed: {each.outcome.reason}"] = None
        return list(reasons)


def collect(
    number: str,
    table: Table,
    runs: Callable[[str, Row, Case], RowRun],
    *,
    rows: Sequence[str],
    shots: Sequence[int],
    folds: Sequence[int],
    seeds: Sequence[int],
    is_of_paper: bool,
) -> CollectedTable:
    """The table of the rows asked for; ``runs(key, row, case)`` is a row's run. ``is_of_paper``: on the paper's data."""
    blocks = []
    for each in shots:
        collected = []
        for key in rows:
            row = table.rows[key]
            own = () if row.quoted else tuple(
                runs(key, row, Case(each, fold, seed)) for fold in folds for seed in seeds
            )  # fmt: skip
            published = row.published[each]
            beside = _paper(published, folds) if is_of_paper else published.mean
            collected.append(_row(key, row, published, beside, own, table.metric, tuple(folds), tuple(seeds)))
        blocks.append(Block(each, tuple(_with_gains(_ranked(collected), table))))
    return CollectedTable(number, table, tuple(folds), tuple(seeds), tuple(blocks))


def _row(
    key: str,
    row: Row,
    published: Published,
    paper: float | None,
    runs: tuple[RowRun, ...],
    metric: Metric,
    folds: tuple[int, ...],
    seeds: tuple[int, ...],
) -> CollectedRow:
    by_case = {(each.case.fold, each.case.seed): each for each in runs}
    if row.quoted:
        cells, mean = tuple(Cell(status="quoted") for _ in folds), Cell(status="quoted")
    else:
        cells = tuple(_fold_cell([by_case[fold, seed] for seed in seeds], metric) for fold in folds)
        mean = _mean_cell(by_case, cells, metric, folds, seeds)
    return CollectedRow(
        key=key,
        labels=row.labels,
        published=published,
        paper=paper,
        mean=mean,
        folds=cells,
        runs=runs,
        quoted=row.quoted,
    )


def _paper(published: Published, folds: Sequence[int]) -> float | None:
    """The printed mean over the folds; None where that of these folds cannot be told."""
    if sorted(folds) == list(FOLDS):
        return published.mean
    return None if published.folds is None else statistics.fmean(published.folds[fold] for fold in folds)


def _score(run: RowRun, metric: Metric) -> float | None:
    score = run.outcome.score
    if score is None or run.obstacle is not None:
        return None
    value = score.miou if metric == "miou" else score.fb_iou
    return None if value is None else 100 * value


def _fold_cell(runs: Sequence[RowRun], metric: Metric) -> Cell:
    """Of one fold, over the seeds."""
    found = [value for value in (_score(run, metric) for run in runs) if value is not None]
    if not found:
        return Cell(status=_why(runs))
    status = "" if len(found) == len(runs) else f"{len(found)} of {len(runs)} seeds"
    return Cell(statistics.fmean(found), _spread(found), status)


def _mean_cell(
    by_case: Mapping[tuple[int, int], RowRun],
    cells: Sequence[Cell],
    metric: Metric,
    folds: tuple[int, ...],
    seeds: tuple[int, ...],
) -> Cell:
    """Over the folds for each seed, then over the seeds; else over the folds that there are, and which are not."""
    whole = []
    for seed in seeds:
        scores = [_score(by_case[fold, seed], metric) for fold in folds]
        if all(score is not None for score in scores):
            whole.append(statistics.fmean(score for score in scores if score is not None))
    if whole:
        status = "" if len(whole) == len(seeds) else f"{len(whole)} of {len(seeds)} seeds"
        return Cell(statistics.fmean(whole), _spread(whole), status)
    there = [cell.value for cell in cells if cell.value is not None]
    if not there:
        return Cell(status=_why(list(by_case.values())))
    lacking = [str(fold) for fold, cell in zip(folds, cells, strict=True) if cell.value is None]
    reasons = [f"without fold{'s' * (len(lacking) > 1)} {', '.join(lacking)}"] if lacking else []
    if any(cell.value is not None and not cell.is_whole for cell in cells):
        reasons.append("not every seed in every fold")
    return Cell(statistics.fmean(there), status=f"partial: {', '.join(reasons)}")


def _why(runs: Sequence[RowRun]) -> str:
    """Why there is no figure: of several reasons the one that tells most."""
    if any(run.obstacle is not None for run in runs):
        return "does not apply"
    outcomes = [run.outcome for run in runs]
    if any(outcome.state == "failed" for outcome in outcomes):
        return "failed"
    begun = [outcome for outcome in outcomes if outcome.state == "unfinished"]
    if not begun:
        return "not run"
    furthest = max(begun, key=lambda outcome: outcome.step)
    of = "" if furthest.steps is None else f" of {furthest.steps:,}"
    return f"step {furthest.step:,}{of}"


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _with_gains(rows: Sequence[CollectedRow], table: Table) -> list[CollectedRow]:
    """What each row has more than the one that it is printed against, where both means are whole."""
    means = {row.key: row.mean.value for row in rows if row.mean.is_whole}
    found = []
    for row in rows:
        own, other = means.get(row.key), means.get(str(table.rows[row.key].against))
        found.append(row if own is None or other is None else replace(row, gain=own - other))
    return found


def _ranked(rows: Sequence[CollectedRow]) -> list[CollectedRow]:
    """Ranks among the rows whose both figures are there; equal figures share a rank."""
    both = [row for row in rows if row.mean.is_whole and row.paper is not None and row.published.is_certain]
    ours = sorted((row.mean.value for row in both if row.mean.value is not None), reverse=True)
    theirs = sorted((row.paper for row in both if row.paper is not None), reverse=True)
    return [
        row
        if row not in both
        else CollectedRow(
            **{**vars(row), "rank": 1 + ours.index(row.mean.value), "paper_rank": 1 + theirs.index(row.paper)}  # type: ignore[arg-type]
        )
        for row in rows
    ]
