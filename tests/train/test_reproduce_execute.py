"""Processes in order: what needs what, what fails, what is done already, and a stop that is passed on. The jobs are one line each."""

import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from svf_fast.train.files import locked
from svf_fast.train.reproduce.execute import Executed, Execution, Job
from svf_fast.train.reproduce.outcomes import read_note

QUIET = Console(quiet=True)


def job(folder: Path, name: str, code: str = "", *, needs: tuple[str, ...] = ()) -> Job:
    """Appends its name to the file ``order`` and does ``code``; what it leaves says that it is done."""
    done = folder / f"{name}.done"
    program = f"open({str(folder / 'order')!r}, 'a').write('{name} '); {code or 'pass'}; open({str(done)!r}, 'w')"
    return Job(
        name=name,
        command=(sys.executable, "-S", "-c", f"import os, sys, time; {program}"),
        output_file=folder / f"{name}.log",
        note_file=folder / f"{name}.json",
        prepare=lambda place: None,
        is_done=done.exists,
        steps=10,
        steps_done=lambda: 0,
        told=lambda: "done",
        needs=needs,
    )


def execute(*jobs: Job, at_once: int = 2, lock: int | None = None) -> Executed:
    return Execution(jobs, at_once=at_once, lock=lock, console=QUIET).run()


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_what_is_needed_comes_first(tmp_path: Path) -> None:
    result = execute(job(tmp_path, "second", needs=("first",)), job(tmp_path, "first", "time.sleep(0.1)"))
    assert order(tmp_path) == ["first", "second"]
    assert result.done == ["first", "second"]
    assert read_note(tmp_path / "first.json").seconds > 0.1


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    jobs = job(tmp_path, "one"), job(tmp_path, "two", needs=("one",))
    execute(jobs[0])
    assert execute(*jobs).done == ["one", "two"]
    assert order(tmp_path) == ["one", "two"]


def test_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    failing = job(tmp_path, "bad", "print('words'); sys.exit('svf-fast: the loss is nan')")
    needing = job(tmp_path, "waits", needs=("bad",))
    result = execute(failing, needing, job(tmp_path, "waits longer", needs=("waits",)), job(tmp_path, "good"))
    assert (result.done, result.failed) == (["good"], {"bad": "the loss is nan"})
    assert result.kept_waiting == ["waits", "waits longer"]
    assert read_note(tmp_path / "bad.json").failure == "the loss is nan"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("sys.exit(3)", "exit status 3, without a word"),
        ("raise RuntimeError('a tensor')", "RuntimeError: a tensor"),
        ("os._exit(0)", "exit status 0, without a word"),  # says that it went well, and has left nothing
    ],
)
def test_a_failure_has_a_reason(tmp_path: Path, code: str, reason: str) -> None:
    assert execute(job(tmp_path, "bad", code)).failed == {"bad": reason}


def test_a_failed_job_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    execute(job(tmp_path, "one", "sys.exit(3)"))
    assert execute(job(tmp_path, "one")).done == ["one"]
    assert read_note(tmp_path / "one.json").failure is None


def test_a_stop_is_passed_on_and_is_no_failure(tmp_path: Path) -> None:
    stopping = f"time.sleep(0.2); os.kill({os.getpid()}, {int(signal.SIGINT)}); time.sleep(60)"
    result = execute(
        job(tmp_path, "stops", stopping), job(tmp_path, "sleeps", "time.sleep(60)"), job(tmp_path, "later")
    )
    assert (result.stopped_by, result.done, result.failed) == ("SIGINT", [], {})
    assert sorted(order(tmp_path)) == ["sleeps", "stops"]
    assert read_note(tmp_path / "sleeps.json").failure is None


def test_the_lock_outlives_a_call_whose_processes_go_on(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        assert lock is not None
        held = f"os.fstat({lock})"  # raises where the descriptor was not passed on
        assert execute(job(tmp_path, "holds", held), lock=lock).done == ["holds"]
        with pytest.raises(BlockingIOError, match="another call is at work"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
