"""A run's log, one JSON object a line, that never tells the same iteration twice. Knows nothing of what it records but
the ``kind`` and ``iteration`` of a line."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from svf_fast.train.checkpoint import RunState
from svf_fast.train.files import write_atomically


class Journal:
    """Appends to ``path``. A resumed run first forgets what was written after its checkpoint: those steps come
    again."""

    def __init__(self, path: Path, resumed_at: RunState | None) -> None:
        """``resumed_at=None`` starts an empty log."""
        kept = [] if resumed_at is None else [line for line in read_journal(path) if _is_before(line, resumed_at)]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda file: file.write(text.encode()))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, iteration: int, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "iteration": iteration, **values}) + "\n")

    def sync(self) -> None:
        """Put every line on the disk; called before a checkpoint, which must not know more than the log."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class SilentJournal(Journal):
    """Of a process that leaves writing to another one."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, iteration: int, **values: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a last line cut short by a crash is left out, a missing file is an empty log."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was never finished


def _is_before(line: dict[str, Any], state: RunState) -> bool:
    if line["kind"] == "finished":
        return False  # a finished run that is resumed says so once more
    reached = state.validated if line["kind"] == "validation" else state.iteration
    return line["iteration"] <= reached
