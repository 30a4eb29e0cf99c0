"""``key=value`` arguments over many runs: for all that have the key, or behind the name of a part for the runs composed from it. To
base learners go those that both of BAM's stages share, and ``base.key=value``. Applies nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from svf_fast.train.config import BaseConfig, Config, ConfigError, StageConfig
from svf_fast.train.schema import leaf_hints, nearest
from svf_fast.train.two_stages import SHARED_KEYS, SHARED_SECTION

BASE = "base"  # stands for the base learner's part, whichever data set it is of

# what the command's own options say
OPTION_OF = {
    "data.fold": "--folds",
    "data.shots": "--shots",
    "run.seed": "--seeds",
    "run.dir": "--out",
}
# they decide which other keys a run has
_FIRST = ("method.name", "method.backbone_init", "tuning.strategy", "backbone.architecture")


@dataclass(frozen=True)
class Assignment:
    """``part`` is None for every run."""

    part: str | None
    key: str
    value: str

    @property
    def text(self) -> str:
        return f"{self.key}={self.value}"

    def __str__(self) -> str:
        return self.text if self.part is None else f"{self.part}.{self.text}"


class Assignments:
    """The user's assignments, those of a part after those of all runs. ConfigError, one sentence, on a key that no run can have,
    or that an option of the command stands for."""

    def __init__(self, arguments: Iterable[str], parts: Iterable[str]) -> None:
        self._parts = {BASE, *parts}
        read = [self._read(argument) for argument in arguments]
        self._all = sorted(read, key=lambda assignment: (assignment.part is not None, assignment.key not in _FIRST))
        self._taken: set[Assignment] = set()

    def of(self, parts: Sequence[str], schema: type[StageConfig]) -> Iterator[Assignment]:
        """Those for a run that is composed from ``parts``, directly or by way of other parts."""
        is_base = issubclass(schema, BaseConfig)
        names = {*parts, BASE} if is_base else set(parts)
        for assignment in self._all:
            reaches = not is_base or _is_shared(assignment.key) if assignment.part is None else assignment.part in names
            if reaches:
                yield assignment

    def took(self, assignment: Assignment) -> None:
        """A run has the key."""
        self._taken.add(assignment)

    def require_all_taken(self) -> None:
        """ConfigError where an assignment reached no run."""
        for assignment in self._all:
            if assignment not in self._taken:
                raise ConfigError(f"{assignment}: none of the runs asked for has this key")

    def _read(self, argument: str) -> Assignment:
        name, _, value = argument.partition("=")
        known = {key for schema in (Config, BaseConfig) for key, _ in leaf_hints(schema)}
        part, _, key = name.partition(".")
        assignment = Assignment(part, key, value) if part in self._parts else Assignment(None, name, value)
        if assignment.key not in known:
            suggestion = nearest(assignment.key, sorted(known)) or nearest(name, sorted(known))
            hint = f"did you mean {suggestion}?" if suggestion else "svf-fast config shows a run's keys"
            raise ConfigError(f"unknown key {name}: {hint}")
        if assignment.key in OPTION_OF:
            raise ConfigError(f"{name} is what {OPTION_OF[assignment.key]} says: use that")
        return assignment


def _is_shared(key: str) -> bool:
    """Whether a key that is given for all runs is a base learner's too."""
    is_few_shot = any(key == other for other, _ in leaf_hints(Config))
    return key in SHARED_KEYS or key.startswith(f"{SHARED_SECTION}.") or not is_few_shot
