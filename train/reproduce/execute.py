"""Processes in the order of what they need, some at a time: started, watched, stopped together, gone on with by the next call. Knows
a job by its command and its files; what it trains is not looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console

from svf_fast.train.interruption import StopRequest
from svf_fast.train.progress import WorkProgress, clock
from svf_fast.train.reproduce.outcomes import Note, read_note, write_note

_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Job:
    """``command`` does it, or goes on with it; ``prepare`` writes what it reads, for the place (0, 1, …) that it runs in. It has about
    ``steps`` steps, of which ``steps_done`` counts those behind it; ``told`` is what is to be said when it is done."""

    name: str
    command: tuple[str, ...]
    output_file: Path
    note_file: Path
    prepare: Callable[[int], None]
    is_done: Callable[[], bool]
    steps: int
    steps_done: Callable[[], int]
    told: Callable[[], str]
    needs: tuple[str, ...] = ()


@dataclass
class Executed:
    """How a call of :func:`execute` ended: names, and the signal that stopped it."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    kept_waiting: list[str] = field(default_factory=list)  # what they need failed
    stopped_by: str | None = None


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    place: int
    started_s: float
    output: IO[bytes]


class Execution:
    """One call's work on ``jobs``, at most ``at_once`` of them at a time. ``lock`` is a descriptor that the processes hold too, so that
    a folder stays locked while any of them lives."""

    def __init__(self, jobs: Sequence[Job], *, at_once: int, lock: int | None, console: Console) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._at_once = at_once
        self._lock = lock
        self._console = console
        self._result = Executed(done=[job.name for job in jobs if job.is_done()])
        self._pending = [job for job in jobs if job.name not in self._result.done]
        self._running: list[_Running] = []
        self._steps_done = {job.name: job.steps for job in jobs} | {job.name: job.steps_done() for job in self._pending}
        self._all_steps = sum(job.steps for job in jobs)

    def run(self) -> Executed:
        """Work until all is done or has failed, or until SIGINT or SIGTERM, which is passed on; a second one ends the processes
        as it would end this one."""
        with StopRequest() as stop, WorkProgress(self._console) as progress:
            self._progress = progress
            progress.begin("steps", sum(self._steps_done.values()), self._all_steps)
            try:
                while (self._pending and not stop) or self._running:
                    if stop and self._result.stopped_by is None:
                        self._result.stopped_by = stop.signal_name
                        self._pass_on(signal.SIGTERM)
                    self._reap()
                    if not stop:
                        self._start_ready()
                    self._show()
                    time.sleep(_LOOK_EVERY_S)
            finally:
                self._pass_on(signal.SIGTERM)
                for running in self._running:
                    running.process.wait()
                    running.output.close()
        return self._result

    def _start_ready(self) -> None:
        failed = {*self._result.failed, *self._result.kept_waiting}
        for job in list(self._pending):
            if any(need in failed for need in job.needs):
                self._pending.remove(job)
                self._result.kept_waiting.append(job.name)
                failed.add(job.name)
            elif len(self._running) < self._at_once and all(need in self._result.done for need in job.needs):
                self._pending.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        place = next(i for i in range(self._at_once) if all(running.place != i for running in self._running))
        job.output_file.parent.mkdir(parents=True, exist_ok=True)
        job.prepare(place)
        write_note(job.note_file, Note(seconds=read_note(job.note_file).seconds))
        output = job.output_file.open("ab")
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # a Ctrl-C of the terminal comes here alone, and is passed on once
            start_new_session=True,
            pass_fds=() if self._lock is None else (self._lock,),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._running.append(_Running(job, process, place, time.monotonic(), output))

    def _reap(self) -> None:
        for running in list(self._running):
            status = running.process.poll()
            if status is None:
                continue
            self._running.remove(running)
            running.output.close()
            job, seconds = running.job, time.monotonic() - running.started_s
            # whatever it exited with: a stop can come between a run's last line and its end
            is_done = job.is_done()
            failure = None if is_done or self._result.stopped_by else _reason(status, job.output_file)
            write_note(job.note_file, Note(read_note(job.note_file).seconds + seconds, failure))
            if is_done:
                self._result.done.append(job.name)
                self._steps_done[job.name] = job.steps
                self._progress.note(f"{job.name}: {job.told()} ({clock(seconds)})")
            elif failure is not None:
                self._result.failed[job.name] = failure
                self._progress.note(f"{job.name}: failed: {failure} (see {job.output_file})")

    def _show(self) -> None:
        self._steps_done |= {running.job.name: running.job.steps_done() for running in self._running}
        running = ", ".join(f"{each.job.name} at {self._steps_done[each.job.name]:,}" for each in self._running)
        ended = len(self._jobs) - len(self._pending) - len(self._running)
        values = f"{ended} of {len(self._jobs)} runs; {running}".removesuffix("; ")
        self._progress.show("steps", sum(self._steps_done.values()), self._all_steps, values)

    def _pass_on(self, number: signal.Signals) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.process.send_signal(number)


def _reason(status: int, output_file: Path) -> str:
    """Why a process failed: its last line, or the signal that ended it."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = output_file.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("svf-fast: ") or f"exit status {status}, without a word"
