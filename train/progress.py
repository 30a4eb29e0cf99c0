"""What long work shows: live bars on a terminal, now and then a plain line anywhere else. Keeps no state that a result
depends on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

PLAIN_LINE_EVERY_S = 10.0


@dataclass
class _Work:
    """One counted piece of work: its bar, and where and when the count began."""

    task: TaskID
    first_done: int
    began_s: float


class WorkProgress:
    """Counts of named pieces of work ("training", "validation"), shown on ``console``; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._work: dict[str, _Work] = {}
        self._last_line_s = float("-inf")
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "WorkProgress":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` are behind us before any work; the time left is reckoned from here."""
        if name in self._work:
            self._live.remove_task(self._work[name].task)
        task = self._live.add_task(name, total=total, completed=done, values="")
        self._work[name] = _Work(task, done, time.monotonic())

    def show(self, name: str, done: int, total: int, values: str = "") -> None:
        """``done`` of ``total`` are done; ``values`` says something about the last one."""
        work = self._work[name]
        now_s = time.monotonic()
        left_s = (now_s - work.began_s) / max(done - work.first_done, 1) * (total - done)
        values = f"{values}  {clock(left_s)} left".strip()
        self._live.update(work.task, completed=done, values=values, visible=done < total)
        if not self._console.is_terminal and now_s - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_line_s = now_s
            self.note(f"{name} {done}/{total}  {values}")

    def counter(self, name: str, total: int, done: int = 0) -> Callable[[int], None]:
        """``begin``, and ``show`` as a function of how many are done."""
        self.begin(name, done, total)
        # the first of many small jobs brings the start of processes with it: nothing to reckon the time left from
        self._last_line_s = time.monotonic()
        return lambda done: self.show(name, done, total)

    def watch(self, name: str) -> Callable[[int, int], None]:
        """As ``counter``, for work that itself says how many there are: a function of how many of how many are done."""

        def report(done: int, total: int) -> None:
            if name not in self._work:
                self.counter(name, total, done)
            self.show(name, done, total)

        return report

    def note(self, sentence: str) -> None:
        """A line that stays."""
        self._console.print(Text(sentence), soft_wrap=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
