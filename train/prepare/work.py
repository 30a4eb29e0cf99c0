"""Many small jobs on all cores: results in order, problems collected, a bounded number in flight. Knows nothing of data sets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import islice
from typing import TypeVar

from svf_fast.train.prepare.problems import Problems

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_JOBS_IN_FLIGHT_PER_WORKER = 4


def run_jobs(
    function: Callable[[_Job], _Result],
    jobs: Iterable[_Job],
    *,
    workers: int,
    problems: Problems,
    progress: Callable[[int], object] | None = None,
) -> list[_Result | None]:
    """`function` of every job, in the order of `jobs`; `progress(done)` is called after each.

    A job that raises ValueError or FileNotFoundError gives None, and its sentence goes to `problems`; anything else ends the work, after
    the jobs that run. `jobs` is read only so far that every worker has a few ahead, so it may make large ones as it goes. With `workers`
    processes (spawned: `function` and the jobs are pickled); 0 or 1 does it all in this process. `default_workers()` is one a core.
    """
    results: list[_Result | None] = []
    try:
        with closing(_outcomes(function, iter(jobs), workers)) as outcomes:
            for outcome in outcomes:
                try:
                    results.append(outcome())
                except (ValueError, FileNotFoundError) as error:
                    problems.add(error)
                    results.append(None)
                if progress is not None:
                    progress(len(results))
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed, perhaps for memory; try fewer with --workers") from None
    return results


def default_workers() -> int:
    """One a core that this process may use; 0 where that is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 else 0


def _outcomes(
    function: Callable[[_Job], _Result], jobs: Iterator[_Job], workers: int
) -> Generator[Callable[[], _Result], None, None]:
    """For every job, in order, what returns its result or raises its error."""
    if workers <= 1:
        for job in jobs:
            yield lambda job=job: function(job)  # type: ignore[misc]
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        running: deque[Future[_Result]] = deque()
        for job in islice(jobs, workers * _JOBS_IN_FLIGHT_PER_WORKER):
            running.append(pool.submit(function, job))
        while running:
            yield running.popleft().result
            for job in islice(jobs, 1):
                running.append(pool.submit(function, job))
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    # an interrupt from the keyboard reaches all processes of a terminal: the parent's business
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # and a parent that was killed cannot end its workers: they would wait for jobs for ever
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
