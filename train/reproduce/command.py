"""``svf-fast reproduce``: what was asked for, planned, told, run, collected, drawn. Holds the order of these; each has its own file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from svf_fast.train.composition import shipped_parts
from svf_fast.train.config import ConfigError
from svf_fast.train.files import locked, write_atomically
from svf_fast.train.provenance import describe_machine
from svf_fast.train.reproduce.assignments import Assignments
from svf_fast.train.reproduce.collect import RowRun, collect
from svf_fast.train.reproduce.execute import Executed, Execution
from svf_fast.train.reproduce.jobs import jobs_of
from svf_fast.train.reproduce.manifest import FOLDS, Row, paper
from svf_fast.train.reproduce.outcomes import read_outcome
from svf_fast.train.reproduce.quotation import Quotation
from svf_fast.train.reproduce.render import Circumstances, text, write_table
from svf_fast.train.reproduce.resolve import Case, PlannedRun, Planner
from svf_fast.train.reproduce.scale import SHAPES, Dataset
from svf_fast.train.schema import nearest
from svf_fast.train.shapes_backbone import draw_shapes

SEED = 321  # the paper's
_CLAIM = "reproduce.json"


@dataclass(frozen=True)
class Request:
    """What was asked for. ``rows`` are of the tables' keys, all where it is empty; so are ``shots``."""

    tables: tuple[str, ...]
    figures: tuple[str, ...]
    rows: tuple[str, ...]
    shots: tuple[int, ...]
    folds: tuple[int, ...] | None
    seeds: tuple[int, ...]
    dataset: Dataset
    out: Path
    at_once: int
    overrides: tuple[str, ...]

    @property
    def table_folds(self) -> tuple[int, ...]:
        return self.folds or FOLDS

    @property
    def figure_folds(self) -> tuple[int, ...]:
        return self.folds or (0,)


def add_reproduce(commands: Any) -> None:
    """Add ``reproduce`` to the sub-commands of ``svf-fast`` (what ``add_subparsers`` returned)."""
    tables, figures = paper().tables, paper().figures
    parser = commands.add_parser(
        "reproduce",
        help="the paper's tables and figures: their runs, run, gone on with, collected",
        usage="svf-fast reproduce [--table N ...] [--figure N ...] [--rows R ...] [--shots K ...] [--folds F ...] [--seeds S ...] "
        "[--dataset D] [--out DIR] [--jobs J] [--dry-run | --no-run] [[PART.]key=value ...]",
    )
    parser.add_argument("--table", metavar="N", nargs="+", choices=list(tables), default=[], help="1 to 10")
    parser.add_argument("--figure", metavar="N", nargs="+", choices=list(figures), default=[], help=", ".join(figures))
    parser.add_argument("--rows", metavar="R", nargs="+", default=[], help="keys of a table's rows; default: all")
    parser.add_argument(
        "--shots", metavar="K", nargs="+", type=int, choices=(1, 5), default=[], help="default: the table's"
    )
    parser.add_argument(
        "--folds", metavar="F", nargs="+", type=int, choices=FOLDS, help="default: all four of a table, 0 of a figure"
    )
    parser.add_argument("--seeds", metavar="S", nargs="+", type=_whole, default=[SEED], help=f"default: {SEED}")
    parser.add_argument(
        "--dataset", metavar="D", default="paper", help="paper (default), shapes5i (small, drawn here), voc_folder:PATH"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: runs/reproduce_D")
    parser.add_argument("--jobs", metavar="J", type=_whole, default=1, help="runs at a time; default: 1")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print every run and what it costs; write nothing")
    how.add_argument("--no-run", action="store_true", help="collect what is there")
    parser.set_defaults(run=_reproduce, takes_overrides=True)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _reproduce(options: argparse.Namespace, overrides: list[str]) -> int:
    request = _request(options, overrides)
    reproduction = Reproduction(request, Console())
    if options.dry_run:
        reproduction.quote(in_full=True)
        return 0
    if options.no_run:
        reproduction.require_own_folder()
        reproduction.report()
        return 0
    return reproduction.run()


def _request(options: argparse.Namespace, overrides: Sequence[str]) -> Request:
    if not options.table and not options.figure:
        raise ValueError(
            f"--table or --figure is missing: give one of the paper's, such as --table {next(iter(paper().tables))}"
        )
    if options.jobs < 1:
        raise ValueError("--jobs is 0, expected 1 or more")
    known = list(dict.fromkeys(key for number in options.table for key in paper().tables[number].rows))
    for row in options.rows:
        if row not in known:
            near = nearest(row, known)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"--rows: no table asked for has a row {row}: {hint}")
    offered = {shots for number in options.table for shots in paper().tables[number].shots}
    if options.shots and not offered & set(options.shots):
        raise ValueError(
            f"--shots: none of the tables asked for has {' or '.join(map(str, options.shots))}-shot figures"
        )
    dataset = Dataset.read(options.dataset)
    return Request(
        tables=tuple(dict.fromkeys(options.table)),
        figures=tuple(dict.fromkeys(options.figure)),
        rows=tuple(dict.fromkeys(options.rows)),
        shots=tuple(dict.fromkeys(options.shots)),
        folds=None if options.folds is None else tuple(sorted(set(options.folds))),
        seeds=tuple(dict.fromkeys(options.seeds)),
        dataset=dataset,
        out=options.out or Path("runs") / f"reproduce_{dataset.scale}",
        at_once=options.jobs,
        overrides=tuple(overrides),
    )


class Reproduction:
    """One request with its plan. ConfigError, one sentence, when an argument does not fit it."""

    def __init__(self, request: Request, console: Console) -> None:
        self.request = request
        self.console = console
        assignments = Assignments(request.overrides, shipped_parts())
        self._planner = Planner(request.dataset, request.out, assignments)
        self.plan = self._planner.plan
        self._row_runs = {
            (number, key, case): self._planner.few_shot(table.data, table.rows[key].parts, case)
            for number in request.tables
            for table in (paper().tables[number],)
            for key in self._rows(number)
            if not table.rows[key].quoted
            for shots in self._shots(number)
            for case in self._cases(shots, request.table_folds)
        }
        self._figure_runs = {
            (name, case): [
                (label, self._planner.few_shot(figure.data, parts, case, has_curves=figure.has_curves))
                for label, parts in figure.runs.items()
            ]
            for name in request.figures
            for figure in (paper().figures[name],)
            for case in self._cases(1, request.figure_folds)
        }
        assignments.require_all_taken()
        self._quotation = Quotation(self.plan)

    def quote(self, *, in_full: bool) -> None:
        """Print what the runs cost: each of them, or the totals alone."""
        self.console.print(self._quotation.text(in_full=in_full), highlight=False, markup=False, soft_wrap=True)

    def run(self) -> int:
        """Run what is not finished, collect and draw; the exit status."""
        self._require_places()
        self.quote(in_full=False)
        random = [run.name for run in self.plan.runs.values() if run.starts_from_random_weights]
        if random:
            self._say(f"backbone.weights is not set for {len(random)} runs: their backbones start from random weights")
        self.request.out.mkdir(parents=True, exist_ok=True)
        with _sole(self.request.out) as lock:
            self._claim()
            if self.request.dataset.scale == SHAPES:
                draw_shapes(self._planner.shapes, self.console)
            names = [name for name in self.plan.runs if self._quotation.obstacle(name) is None]
            jobs = jobs_of(self.plan, names, at_once=self.request.at_once)
            executed = Execution(jobs, at_once=self.request.at_once, lock=lock, console=self.console).run()
            self.report()
        return self._told(executed, len(jobs))

    def report(self) -> None:
        """Write and print the tables, and draw the figures whose runs are finished."""
        about = Circumstances(
            is_of_paper=self.request.dataset.is_of_paper,
            settings={
                "data": str(self.request.dataset),
                "arguments": " ".join(self.request.overrides) or "none",
                "runs": f"in {self.request.out / 'runs'}",
            },
            machine=describe_machine(),
        )
        for number in self.request.tables:
            table = paper().tables[number]

            def run_of(key: str, row: Row, case: Case, number: str = number) -> RowRun:
                run = self._row_runs[number, key, case]
                return RowRun(case, run, read_outcome(run.folder, run.note_file), self._quotation.obstacle(run.name))

            collected = collect(
                number,
                table,
                run_of,
                rows=self._rows(number),
                shots=self._shots(number),
                folds=self.request.table_folds,
                seeds=self.request.seeds,
                is_of_paper=about.is_of_paper,
            )
            paths = write_table(self.request.out, collected, about)
            self._say(f"\n{text(collected, about)}\n{', '.join(map(str, paths))}")
        for (name, case), runs in self._figure_runs.items():
            self._draw(name, case, runs)

    def require_own_folder(self) -> None:
        """FileNotFoundError where nothing has been run, ValueError where something else lies there."""
        if not (self.request.out / _CLAIM).is_file():
            raise FileNotFoundError(f"--out: {self.request.out} holds no reproduction yet")
        self._claim()

    def _rows(self, number: str) -> list[str]:
        return [key for key in paper().tables[number].rows if not self.request.rows or key in self.request.rows]

    def _shots(self, number: str) -> list[int]:
        return [
            shots for shots in paper().tables[number].shots if not self.request.shots or shots in self.request.shots
        ]

    def _cases(self, shots: int, folds: Sequence[int]) -> list[Case]:
        return [Case(shots, fold, seed) for fold in folds for seed in self.request.seeds]

    def _require_places(self) -> None:
        for run in self.plan.runs.values():
            if run.config.data.root is None:
                raise ConfigError(
                    f"data.root is not set for {run.composition}: give the prepared folder as data.root=FOLDER, or as "
                    f"{run.composition.partition('+')[0]}.data.root=FOLDER where there are two data sets"
                )

            config = run.config
            if self.request.dataset.scale != SHAPES and not Path(str(config.data.root)).is_dir():
                raise FileNotFoundError(f"data.root={config.data.root} is not a folder")
            weights = config.backbone.weights
            if self.request.dataset.scale != SHAPES and weights is not None and not Path(weights).is_file():
                raise FileNotFoundError(f"backbone.weights={weights} is no file")

    def _claim(self) -> None:
        """The folder is of one data set, in one place: the names of its runs do not tell where their pictures lie."""
        path, dataset = self.request.out / _CLAIM, str(self.request.dataset)
        roots = {
            run.config.data.folds: str(Path(str(run.config.data.root)).absolute()) for run in self.plan.runs.values()
        }
        found: dict[str, Any] = {"dataset": dataset, "roots": {}}
        if path.is_file():
            try:
                found |= json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found["dataset"] = "something else"
        before = {folds: root for folds, root in found["roots"].items() if roots.get(folds, root) != root}
        if found["dataset"] != dataset or before:
            there, here = (before, {folds: roots[folds] for folds in before}) if before else (found["dataset"], dataset)
            raise ValueError(
                f"--out: {self.request.out} holds runs on {there}, expected {here}: give another folder, or the same data"
            )
        wanted = {"dataset": dataset, "roots": found["roots"] | roots}
        write_atomically(path, lambda file: file.write((json.dumps(wanted) + "\n").encode()))

    def _draw(self, name: str, case: Case, runs: Sequence[tuple[str, PlannedRun]]) -> None:
        from svf_fast.train.paper_figures import FIGURES, FinishedRun  # matplotlib comes with it

        title = f"figure {name}, fold {case.fold}, seed {case.seed}"
        lacking = [run.name for _, run in runs if read_outcome(run.folder, run.note_file).state != "finished"]
        if lacking:
            self._say(f"{title}: not drawn, not finished: {', '.join(lacking)}")
            return
        finished = [FinishedRun(label, run.config, run.folder) for label, run in runs]
        folder = self.request.out / "figures" / f"fold{case.fold}-seed{case.seed}"
        try:
            paths = FIGURES[name].draw(finished, folder, console=self.console)
        except (ValueError, FileNotFoundError) as error:
            self._say(f"{title}: not drawn: {error}")
            return
        notes = "".join(f"\n  {note}" for note in paper().figures[name].notes)
        self._say(f"{title}: {', '.join(map(str, paths))}{notes}")

    def _told(self, executed: Executed, jobs: int) -> int:
        if executed.stopped_by is not None:
            self._say(
                f"stopped by {executed.stopped_by}: {len(executed.done)} of {jobs} done; the same command goes on"
            )
        elif executed.failed:
            waiting = f", {len(executed.kept_waiting)} that need them not begun" if executed.kept_waiting else ""
            self._say(f"{len(executed.failed)} of {jobs} failed{waiting}; the same command tries them again")
        else:
            return 0
        return 1

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _sole(out: Path) -> Iterator[int | None]:
    try:
        with locked(out) as descriptor:
            yield descriptor
    except BlockingIOError:
        raise BlockingIOError(
            f"another svf-fast reproduce, or runs that one left behind when it was killed, are at work in {out}: wait for them"
        ) from None
