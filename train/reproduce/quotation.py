"""What a plan costs, in words: each run's name, composition, settings and estimate, and the totals. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from svf_fast.train.reproduce.estimate import BASIS, Cost, cost
from svf_fast.train.reproduce.outcomes import Outcome, read_outcome
from svf_fast.train.reproduce.resolve import Plan, PlannedRun


class Quotation:
    """Costs are reckoned when they are asked for, once for runs that differ in places, folds and seeds only."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._costs: dict[str, Cost | str] = {}

    def obstacle(self, name: str) -> str | None:
        """Why a run does not apply to its backbone."""
        found = self._cost(self._plan.runs[name])
        return found if isinstance(found, str) else None

    def text(self, *, in_full: bool) -> str:
        """The totals, and before them every run where it is ``in_full``."""
        lines = [line for run in self._plan.runs.values() for line in self._lines(run)] if in_full else []
        if in_full:
            lines += [f"{name}\n    pre-training of a small backbone" for name in self._plan.pretrainings]
        return "\n".join([*lines, *self._totals()])

    def _cost(self, run: PlannedRun) -> Cost | str:
        if run.name not in self._costs:
            try:
                self._costs[run.name] = cost(run.config)
            except ValueError as error:
                self._costs[run.name] = str(error)
        return self._costs[run.name]

    def _lines(self, run: PlannedRun) -> list[str]:
        found = self._cost(run)
        estimate = f"does not apply: {found}" if isinstance(found, str) else _estimate(found)
        needs = f"; needs {', '.join(run.needs)}" if run.needs else ""
        return [run.name, f"    {run.composition}  {' '.join(run.changed)}".rstrip(), f"    {estimate}{needs}"]

    def _totals(self) -> list[str]:
        runs = self._plan.runs.values()
        costs = {run.name: found for run in runs if isinstance(found := self._cost(run), Cost)}
        outcomes = {run.name: read_outcome(run.folder, run.note_file) for run in runs if run.name in costs}
        left = [name for name in costs if outcomes[name].state != "finished"]
        hours = [costs[name].gpu_hours for name in costs]
        known = sum(each for each in hours if each is not None)
        unknown = f" and {hours.count(None)} of unknown length" if None in hours else ""
        most = max((found.memory_bytes for found in costs.values()), default=0)
        apart = len(runs) - len(costs)
        lines = [
            f"{len(costs)} runs, {len(left)} of them not finished"
            + (f", and {apart} that do not apply" if apart else "")
            + f": {_hours(known)} GPU hours in all{unknown}, up to {most / 1e9:.1f} GB of GPU memory a run",
            BASIS,
        ]
        if not torch.cuda.is_available():
            lines.append("There is no GPU here: on this machine's CPU the runs take far longer than these hours.")
        return [*lines, *self._from_measured(costs, outcomes, left)]

    def _from_measured(
        self, costs: Mapping[str, Cost], outcomes: Mapping[str, Outcome], left: Sequence[str]
    ) -> list[str]:
        """What finished runs took here, and so what the others would: in the proportion of their estimates."""
        done = [name for name in costs if outcomes[name].state == "finished" and outcomes[name].seconds > 0]
        estimated = [costs[name].gpu_hours for name in (*done, *left)]
        if not done or None in estimated:
            return []
        hours = sum(outcomes[name].seconds for name in done) / 3600
        share = sum(costs[name].gpu_hours or 0 for name in left) / sum(costs[name].gpu_hours or 0 for name in done)
        return [
            f"Measured here: {len(done)} finished runs took {hours:.2f} hours, each by its own clock; by their estimates the "
            f"{len(left)} that are left would take {hours * share:.2f}, as many at a time."
        ]


def _estimate(found: Cost) -> str:
    memory = f"{found.memory_bytes / 1e9:.1f} GB"
    if found.steps is None or found.gpu_hours is None:
        return f"steps unknown until data.root is given, {memory}"
    return f"{found.steps:,} steps, {_hours(found.gpu_hours)} GPU hours, {memory}"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "under 0.01"
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2f}"
