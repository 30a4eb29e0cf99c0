"""How far a run is and what came out of it, from what it leaves on the disk: its log, and the note about its process beside it.
Reads only, apart from that note."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from svf_fast.train.engine import LOG
from svf_fast.train.files import write_atomically

State = Literal["not run", "unfinished", "finished", "failed"]
_TAIL_BYTES = 1 << 16  # a log's last lines, a validation over 80 classes included


@dataclass(frozen=True)
class Score:
    """Fractions, of the best validation: the field's model selection, which looks at the novel classes themselves. A base learner
    has no FB-IoU."""

    miou: float
    fb_iou: float | None
    step: int


@dataclass(frozen=True)
class Outcome:
    """``step`` of ``steps`` are done; ``score`` is there when it is finished, ``reason`` when it failed; ``seconds`` is what its
    processes took."""

    state: State
    step: int = 0
    steps: int | None = None
    score: Score | None = None
    reason: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Note:
    """What is remembered of a run's processes: the seconds that all of them took, and why the last one failed."""

    seconds: float = 0.0
    failure: str | None = None


def read_note(path: Path) -> Note:
    """An empty note where there is none that can be read."""
    try:
        return Note(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Note()


def write_note(path: Path, note: Note) -> None:
    """Whole or not at all."""
    text = json.dumps(asdict(note)) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), flush=False)


def read_outcome(folder: Path, note_file: Path) -> Outcome:
    """The outcome of the run in ``folder``."""
    log, note = folder / LOG, read_note(note_file)
    last = last_line(log)
    if last is None:
        return Outcome("failed" if note.failure else "not run", reason=note.failure, seconds=note.seconds)
    if last["kind"] == "finished":
        return Outcome("finished", last["iteration"], last["iteration"], _best(log), seconds=note.seconds)
    state: State = "failed" if note.failure else "unfinished"
    return Outcome(state, last["iteration"], _total(log), reason=note.failure, seconds=note.seconds)


def is_finished(folder: Path) -> bool:
    last = last_line(folder / LOG)
    return last is not None and last["kind"] == "finished"


def last_line(log: Path) -> dict[str, Any] | None:
    """The last complete line of a log, looked at from its end; None where there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return None
    lines = tail[: tail.rfind(b"\n")].splitlines() if b"\n" in tail else []
    if not lines or (len(lines) == 1 and size > _TAIL_BYTES):
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _lines(log: Path, kind: str) -> list[dict[str, Any]]:
    """The log's lines of one kind; the steps, nearly all of a long log, are not read as JSON."""
    mark = f'"kind": "{kind}"'
    with log.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if mark in line and line.endswith("\n")]


def _total(log: Path) -> int | None:
    """Steps of the whole run, from the log's first line."""
    with log.open(encoding="utf-8") as file:
        first = json.loads(file.readline())
    return int(first["iterations"]) if first["kind"] == "start" else None


def _best(log: Path) -> Score | None:
    validations = _lines(log, "validation")
    if not validations:
        return None
    best = max(validations, key=lambda line: float(line["miou"]))
    return Score(best["miou"], best.get("fb_iou"), best["iteration"])
