"""A plan's runs as jobs: the processes of ``svf-fast train`` and ``train-base``, and of pre-training, with the files that they read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from svf_fast.train.config import BaseConfig, StageConfig
from svf_fast.train.engine import LOG
from svf_fast.train.files import write_atomically
from svf_fast.train.reproduce.estimate import training_steps
from svf_fast.train.reproduce.execute import Job
from svf_fast.train.reproduce.outcomes import is_finished, last_line, read_outcome
from svf_fast.train.reproduce.resolve import Plan, PlannedRun
from svf_fast.train.schema import to_plain
from svf_fast.train.shapes_backbone import Pretraining


def jobs_of(plan: Plan, runs: Iterable[str], *, at_once: int) -> list[Job]:
    """Jobs of the named runs and of all that they need, what is needed first."""
    jobs: dict[str, Job] = {}

    def add(name: str) -> None:
        if name in jobs:
            return
        if name in plan.pretrainings:
            jobs[name] = _pretraining_job(name, plan.pretrainings[name])
            return
        for need in plan.runs[name].needs:
            add(need)
        jobs[name] = _run_job(plan.runs[name], at_once)

    for name in runs:
        add(name)
    # the small ones, on which many wait, in front
    return sorted(jobs.values(), key=lambda job: job.name not in plan.pretrainings)


def _run_job(run: PlannedRun, at_once: int) -> Job:
    command = "train-base" if isinstance(run.config, BaseConfig) else "train"
    return Job(
        name=run.name,
        command=(sys.executable, "-m", "svf_fast.train", command, str(run.settings_file), "--resume"),
        output_file=run.output_file,
        note_file=run.note_file,
        prepare=lambda place: _write_yaml(run.settings_file, _placed(run.config, place, at_once)),
        is_done=lambda: is_finished(run.folder),
        steps=training_steps(run.config) or 1,
        steps_done=lambda: _steps_done(run),
        told=lambda: _told(run),
        needs=run.needs,
    )


def _pretraining_job(name: str, pretraining: Pretraining) -> Job:
    weights = Path(pretraining.weights)
    settings_file = weights.with_suffix(".yaml")
    return Job(
        name=name,
        command=(sys.executable, "-m", "svf_fast.train.shapes_backbone", str(settings_file)),
        output_file=weights.with_suffix(".log"),
        note_file=weights.with_suffix(".note.json"),
        prepare=lambda _: _write_yaml(settings_file, pretraining),
        is_done=lambda: pretraining.is_done,
        steps=pretraining.settings.steps,
        steps_done=lambda: 0,
        told=lambda: "pre-trained",
    )


def _placed(config: StageConfig, place: int, at_once: int) -> StageConfig:
    """Runs at a time share what there is: a GPU for each in turn, or the CPU's cores."""
    run = config.run
    if run.device == "auto" and torch.cuda.device_count() > 1:
        run = replace(run, device=f"cuda:{place % torch.cuda.device_count()}")
    elif run.threads is None and not (run.device.startswith("cuda") or torch.cuda.is_available()):
        run = replace(run, threads=max(1, (os.cpu_count() or 1) // at_once))
    return replace(config, run=run)


def _write_yaml(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_plain(content), sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def _steps_done(run: PlannedRun) -> int:
    last = last_line(run.folder / LOG)
    return 0 if last is None else int(last["iteration"])


def _told(run: PlannedRun) -> str:
    score = read_outcome(run.folder, run.note_file).score
    return "finished" if score is None else f"mIoU {100 * score.miou:.2f} after step {score.step}"
