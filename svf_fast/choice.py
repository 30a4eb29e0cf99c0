"""Choosing the fastest of several exact ways by measurement on first use, remembered in memory and on disk. Knows callables
and a file, no kernel."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

# A way has to beat the baseline by more than the noise of a measurement to be taken instead.
_MARGIN = 0.98


def cache_folder() -> Path:
    """Where choices are kept: SVF_FAST_CACHE_DIR, or svf_fast under the user's cache folder."""
    given = os.environ.get("SVF_FAST_CACHE_DIR")
    try:
        return (
            Path(given).expanduser()
            if given
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svf_fast"
        )
    except RuntimeError:
        # a user without a home, as in some containers: remembered for this process
        return Path(tempfile.mkdtemp(prefix="svf_fast_"))


class Chooser:
    """Which way to take for each key (device, dtype and shapes), by the seconds that `measure` finds.

    `environment` names what the choices depend on beyond the key (device, versions): the file's name and first entry. A file
    that cannot be read or written costs a warning and a measurement, never a result. A way that raises one of `unfit` (too
    much shared memory, say) is left out.
    """

    def __init__(
        self, environment: str, measure: Callable[[Callable[[], object]], list[float]],
        unfit: tuple[type[Exception], ...] = (),
    ) -> None:  # fmt: skip
        self._measure = measure
        self._unfit = unfit
        self._environment = environment
        safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in environment)
        self.path = cache_folder() / f"choices-{safe}.json"
        self._known: dict[Hashable, str] = {}
        self._stored: dict[str, str] | None = None

    def known(self, key: Hashable) -> str | None:
        """The choice made before, in this process or one that wrote the file."""
        choice = self._known.get(key)
        if choice is None:
            if self._stored is None:
                self._stored = self._read()
            choice = self._stored.get(repr(key))
            if choice is not None:
                self._known[key] = choice
        return choice

    def choose(
        self, key: Hashable, ways: Mapping[str, Callable[[], object]], baseline: str, *, is_lasting: bool = True
    ) -> str:
        """The fastest of `ways`; `baseline` unless another is faster. Only what `is_lasting` goes to disk."""
        best = self._fastest(ways, baseline) if len(ways) > 1 else baseline
        self._known[key] = best
        if is_lasting:
            self._write(repr(key), best)
        return best

    def _fastest(self, ways: Mapping[str, Callable[[], object]], baseline: str) -> str:
        best, best_seconds = baseline, statistics.median(self._measure(ways[baseline])) * _MARGIN
        for name, way in ways.items():
            if name == baseline:
                continue
            try:
                seconds = statistics.median(self._measure(way))
            except self._unfit:
                continue
            if seconds < best_seconds:
                best, best_seconds = name, seconds
        return best

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            choices = content["choices"]
            if content["environment"] != self._environment or not isinstance(choices, dict):
                raise ValueError("it is of another environment")
            return {str(key): str(choice) for key, choice in choices.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{self.path} cannot be read ({error}): ways are measured anew", stacklevel=2)
            return {}

    def _write(self, key: str, choice: str) -> None:
        # what other processes wrote meanwhile is kept
        self._stored = {**self._read(), key: choice}
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(
                json.dumps({"environment": self._environment, "choices": self._stored}, indent=1), encoding="utf-8"
            )
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            warnings.warn(f"{self.path} cannot be written ({error}): ways are measured anew next time", stacklevel=2)
