"""On what data and how large the paper's runs are repeated: as they are, or small. Reads scales.yaml; knows no row of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from svf_fast.train.config import load_config
from svf_fast.train.schema import flatten, nearest

SCALES = Path(__file__).resolve().parent / "scales.yaml"
PAPER, SHAPES, FOLDER = "paper", "shapes5i", "voc_folder"

# What a scale takes over from the configuration that it is `like`: sizes, lengths and rates, not what tells rows and runs apart.
_TAKEN_SECTIONS = ("data", "backbone", "optimiser", "schedule", "validation", "run")
_TAKEN_OF_METHOD = ("method.head_width", "method.prior_layer")
_NOT_TAKEN = (
    "data.root",
    "data.fold",
    "data.shots",
    "data.drop_novel_images",
    "backbone.architecture",
    "backbone.weights",
    "run.dir",
    "run.seed",
)


@dataclass(frozen=True)
class Dataset:
    """What ``--dataset`` names: a scale, and the folder of one's own."""

    scale: str
    root: Path | None = None

    @classmethod
    def read(cls, text: str) -> Dataset:
        """``paper``, ``shapes5i`` or ``voc_folder:PATH``. ValueError on anything else, FileNotFoundError without the folder."""
        kind, colon, path = text.partition(":")
        if kind == FOLDER:
            if not path:
                raise ValueError(f"--dataset is {text!r}, expected {FOLDER}:PATH")
            if not Path(path).is_dir():
                raise FileNotFoundError(f"--dataset {text}: there is no folder {path}")
            return cls(FOLDER, Path(path).resolve())
        if colon or kind not in (PAPER, SHAPES):
            near = nearest(kind, [PAPER, SHAPES, FOLDER])
            hint = f"; did you mean {near}?" if near and near != kind else ""
            raise ValueError(f"--dataset is {text!r}, expected {PAPER}, {SHAPES} or {FOLDER}:PATH{hint}")
        return cls(kind)

    def __str__(self) -> str:
        return self.scale if self.root is None else f"{self.scale}:{self.root}"

    @property
    def is_of_paper(self) -> bool:
        """Whether figures can be compared with the printed ones."""
        return self.scale == PAPER


@dataclass(frozen=True)
class Scale:
    """Dotted keys and their values; see scales.yaml."""

    data: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    of_part: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: Mapping[str, Any] = field(default_factory=dict)

    def settings_of(self, parts: Sequence[str], *, has_curves: bool) -> Iterator[tuple[str, Any]]:
        """Keys and values of a run that is composed from ``parts``, later ones over earlier."""
        yield from self.settings.items()
        for part, settings in self.of_part.items():
            if part in parts:
                yield from settings.items()
        if has_curves:
            yield from self.curves.items()


@cache
def scale(name: str) -> Scale:
    """A scale of scales.yaml."""
    entry = dict(yaml.safe_load(SCALES.read_text(encoding="utf-8"))[name])
    like = entry.pop("like", None)
    settings = {} if like is None else _taken_over(like)
    return Scale(**{**entry, "settings": {**settings, **entry.get("settings", {})}})


def _taken_over(configuration: str) -> dict[str, Any]:
    flat = flatten(load_config(configuration).to_plain())
    return {
        key: value
        for key, value in flat.items()
        if (key.partition(".")[0] in _TAKEN_SECTIONS or key in _TAKEN_OF_METHOD) and key not in _NOT_TAKEN
    }
