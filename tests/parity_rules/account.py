"""A golden file, read strictly, and the account of what has been compared with it: every array and every entry has to
appear there."""

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

# dictionaries of a JSON that are one quantity each; lists always are
WHOLE_ENTRIES = ("state_dict",)
NUMBER_KINDS = "biuf"  # of a dtype: bool, integers, floating point

Measure = Literal["largest", "norm", "each", "absolute"]


class GoldenError(ValueError):
    """One sentence on what is wrong with a golden file, or with what it is compared with."""


@dataclass(frozen=True)
class Golden:
    """``settings``: the JSON. ``expected``: its leaves by path (``losses/fixbn/main``) and the npz's arrays by name."""

    name: str
    settings: dict[str, Any]
    expected: dict[str, Any]

    def with_prefix(self, prefix: str) -> list[str]:
        """What follows ``prefix`` in the names of the expected quantities that start with it."""
        return [name.removeprefix(prefix) for name in self.expected if name.startswith(prefix)]


@dataclass(frozen=True)
class Comparison:
    """``deviation`` may be up to ``limit``; both relative to what the limit is about. Where nothing may differ at all,
    ``difference`` says in words what does. ``reference_noise``: how far the reference's own run in float32 was from its
    run in float64, measured likewise."""

    label: str
    deviation: float
    limit: float
    difference: str = ""
    reference_noise: float | None = None

    @property
    def within(self) -> bool:
        return self.deviation <= self.limit  # false for NaN

    @property
    def share(self) -> float:
        """Of its limit; infinite where nothing may deviate, or NaN did."""
        if self.within and self.limit == 0:
            return 0.0
        return self.deviation / self.limit if self.limit and np.isfinite(self.deviation) else float("inf")

    @property
    def on_the_reference(self) -> str:
        """For a miss: whether the golden file itself is that exact."""
        if self.reference_noise is None:
            return ""
        return f"; the reference's own run in float32 deviates from its run in float64 by {self.reference_noise:.1e}"

    def __str__(self) -> str:
        return f"{self.label} ({self.difference or f'{self.deviation:.1e} of {self.limit:.0e}'})"


@dataclass
class Account:
    """Of one golden file: comparisons made, and complaints (sentences) on what could not be compared."""

    golden: Golden
    comparisons: list[Comparison] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    absent: list[str] = field(default_factory=list)

    def require(self, *prefixes: str) -> None:
        """Complains about each of ``prefixes`` with which no expected quantity starts."""
        lacking = [prefix for prefix in prefixes if not self.golden.with_prefix(prefix)]
        if lacking:
            self.complaints.append(f"the file holds nothing of {', '.join(lacking)}")

    def note_absent(self, *names: str) -> None:
        """Remembers, for people, which of ``names`` the file might hold and does not; one that ends with a slash stands
        for all that start so."""
        self.absent += [
            name
            for name in names
            if name not in self.golden.expected and not (name.endswith("/") and self.golden.with_prefix(name))
        ]

    def equal(self, name: str, actual: object) -> None:
        """``actual`` against the expected entry of that name, which may differ in nothing."""
        difference = _difference(actual, self._expected(name))
        self.comparisons.append(Comparison(name, float("inf") if difference else 0.0, 0.0, difference))

    def close(
        self,
        name: str,
        actual: object,
        limit: float,
        *,
        to: Measure = "largest",
        floor: float = 0.0,
        how: str = "",
        reference_noise: float | None = None,
    ) -> None:
        """``actual`` against the expected quantity of that name. ``to`` says what the deviation is measured by: the
        "largest" difference relative to the largest magnitude, the "norm" (L2) of the difference relative to that of
        what is expected, "each" element's relative to itself, or "absolute". What it is relative to is at least
        ``floor``. ``how`` tells two comparisons with the same quantity apart."""
        expected, found = _array(self._expected(name)), _array(actual)
        if found.shape != expected.shape:
            self.complaints.append(f"{name}{how} has the shape {list(found.shape)}, expected {list(expected.shape)}")
            return
        difference, size = np.abs(found - expected), np.abs(expected)
        if to == "norm":
            deviation, size = np.linalg.norm(difference), np.linalg.norm(size)
        elif to == "each":
            deviation = difference
        else:
            deviation, size = difference.max(), np.ones(()) if to == "absolute" else size.max()
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(deviation == 0, 0.0, deviation / np.maximum(size, floor)).max()
        self.comparisons.append(Comparison(name + how, float(relative), limit, reference_noise=reference_noise))

    def describes_the_reference(self, *names: str) -> None:
        """Entries that say how the file was made, not what the model should give."""
        self.seen.update(names)

    def same_names(self, what: str, actual: Iterable[str], expected: Iterable[str]) -> None:
        difference = _difference(sorted(actual), sorted(expected))
        if difference:
            self.complaints.append(f"{what}: {difference}")

    def close_books(self) -> None:
        """Complains about every expected quantity that nothing was compared with."""
        left = [name for name in self.golden.expected if name not in self.seen]
        if left:
            self.complaints.append(f"not compared: {', '.join(left)}")

    @property
    def misses(self) -> list[str]:
        """A line for each quantity over its limit, then the complaints."""
        over = [comparison for comparison in self.comparisons if not comparison.within]
        return [f"{comparison}{comparison.on_the_reference}" for comparison in over] + self.complaints

    def _expected(self, name: str) -> Any:
        self.seen.add(name)
        if name not in self.golden.expected:
            raise GoldenError(f"{name} is not in the golden file")
        return self.golden.expected[name]


def read_golden(json_path: Path) -> Golden:
    """The JSON and the npz beside it. GoldenError where either is missing, unreadable or not finite."""
    arrays_path = json_path.with_suffix(".npz")
    for path in (json_path, arrays_path):
        if not path.is_file():
            raise GoldenError(f"{path.name} is missing: a golden file is a .json with a .npz beside it")
    try:
        settings = json.loads(json_path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise GoldenError(f"{json_path.name} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise GoldenError(f"{json_path.name} holds a {type(settings).__name__}, expected a dictionary")
    try:
        with np.load(arrays_path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise GoldenError(f"{arrays_path.name} cannot be read: {error or type(error).__name__}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in NUMBER_KINDS:
            raise GoldenError(f"{arrays_path.name} holds {array.dtype} in {name}, expected numbers")
        if not np.isfinite(array).all():
            raise GoldenError(f"{arrays_path.name} holds values that are not finite in {name}")
    expected = dict(_leaves(settings, ""))
    clash = sorted(set(expected) & set(arrays))
    if clash:
        raise GoldenError(f"{clash[0]} is both an entry of {json_path.name} and an array of {arrays_path.name}")
    return Golden(json_path.stem, settings, {**expected, **arrays})


def _leaves(entries: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, dict) and key not in WHOLE_ENTRIES:
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _difference(actual: object, expected: object) -> str:
    """In words, shortly; nothing where they are equal."""
    if isinstance(expected, dict | list) and type(actual) is type(expected):
        lacking = [key for key in expected if key not in actual]
        superfluous = [key for key in actual if key not in expected]
        parts = [f"lacks {_some(lacking)}"] * bool(lacking) + [f"has besides {_some(superfluous)}"] * bool(superfluous)
        if parts:
            return " and ".join(parts)
        if isinstance(expected, dict):
            other = [
                f"{key}: {actual[key]}, expected {value}" for key, value in expected.items() if actual[key] != value
            ]
            if other:
                return _some(other)
        if list(actual) != list(expected):
            return "has the right entries in another order"
        return ""
    return "" if actual == expected else f"is {actual!r}, expected {expected!r}"


def _some(names: list[object], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def _array(value: object) -> NDArray[np.float64]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"it holds {constant}")
