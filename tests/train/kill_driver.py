"""Kills a run ten times and lets it end: `python kill_driver.py ARGUMENT ...`, the arguments of svf-fast. It imports what a run needs once
and forks one process a life, so that ten lives cost ten runs and not ten starts of Python. Prints how each life ended."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from svf_fast.train.cli import main

LIVES = 10


def begin(arguments: list[str]) -> int:
    """A process that runs svf-fast; its number."""
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
        os._exit(main([*arguments, "--resume"]))
    return child


def steps(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_bytes().count(b'"kind": "step"') if log.is_file() else 0


def live_and_die(arguments: list[str], folder: Path, moments: random.Random, *, while_writing: bool) -> str:
    """Kill -9 at a random moment after a step or two, or as soon as a checkpoint is being written."""
    child = begin(arguments)
    wanted = steps(folder) + moments.randint(1, 3)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if steps(folder) < wanted:
            time.sleep(0.001)
            continue
        if while_writing and not (folder / ".last.pt.part").exists():
            continue
        if not while_writing:
            time.sleep(moments.random() * 0.03)
        is_writing = (folder / ".last.pt.part").exists()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"killed at step {steps(folder)}" + (" while it wrote" if is_writing else "")
    return "ended"


if __name__ == "__main__":
    given = sys.argv[1:]
    place = Path(next(each for each in given if each.startswith("run.dir=")).partition("=")[2])
    chance = random.Random(20221)
    for life in range(LIVES):
        print(live_and_die(given, place, chance, while_writing=life % 2 == 0), flush=True)
    _, status = os.waitpid(begin(given), 0)
    print("finished" if status == 0 else f"failed with {status}")
