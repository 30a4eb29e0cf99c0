"""What a run is made of: one frozen dataclass a section, read from YAML plus ``key=value`` overrides and checked here,
so that everything behind this border works with valid, typed values. Knows no model and opens no data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from svf_fast.train.backbones import BackboneConfig
from svf_fast.train.methods.baseline import ShotReduction
from svf_fast.train.methods.meta_learner import PriorLayer, Recompute
from svf_fast.train.schedule import Schedule
from svf_fast.train.schema import ConfigError, PlainData, from_plain, nearest, override, to_plain
from svf_fast.train.tuning import Save

__all__ = ["Config", "ConfigError", "config_from_plain", "load_config", "shipped_configs"]

SHIPPED_FOLDER = Path(__file__).resolve().parent / "configs"

Strategy = Literal["freeze", "full", "svf"]


@dataclass(frozen=True)
class DataConfig:
    """A folder in Pascal-VOC layout and how episodes are drawn from it; list files are relative to ``root``, ``{fold}``
    in their names stands for the fold."""

    root: str | None = None
    fold: int = 0
    train_list: str = "lists/fold{fold}_train.txt"
    val_list: str = "lists/fold{fold}_val.txt"
    drop_novel_images: bool = True  # the papers' † rows: no training image shows a novel class
    size: int = 473  # side of the square input, pixels
    shots: int = 1
    batch: int = 8  # episodes a step
    scale_range: tuple[float, float] = (0.9, 1.1)  # of the random rescaling in training
    workers: int = 2  # threads that load ahead; results do not depend on it

    def __post_init__(self) -> None:
        _require(self, "fold", self.fold in range(4), "0 to 3")
        _require(self, "size", self.size > 8 and (self.size - 1) % 8 == 0, "a multiple of 8 plus 1, such as 161 or 473")
        _require(self, "shots", self.shots > 0, "1 or more")
        _require(self, "batch", self.batch > 0, "1 or more")
        low, high = self.scale_range
        _require(self, "scale_range", 0 < low <= high < math.inf, "two numbers above 0, the smaller first")
        _require(self, "workers", self.workers >= 0, "0 or more")


@dataclass(frozen=True)
class BackboneSection(BackboneConfig):
    """:class:`BackboneConfig` and the file its pre-trained weights come from; None leaves random weights."""

    weights: str | None = None


@dataclass(frozen=True)
class MethodConfig:
    """The few-shot method on top of the backbone; its options are the method's own."""

    name: Literal["baseline"] = "baseline"
    head_width: int = 256  # channels
    prior_layer: PriorLayer = "layer4"
    shot_reduction: ShotReduction = "mean"  # the released code sums
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        _require(self, "head_width", self.head_width > 0, "1 or more")


@dataclass(frozen=True)
class TuningConfig:
    """Which parameters of the backbone train; ``save`` is what SVF layers keep for backward."""

    strategy: Strategy = "svf"
    save: Save = "exact"

    def __post_init__(self) -> None:
        if self.save != "exact" and self.strategy != "svf":
            raise ValueError(f"save is {self.save!r}, but strategy is {self.strategy!r}: only svf layers have it")


@dataclass(frozen=True)
class OptimiserConfig:
    """SGD. Rates in effect: ``base_lr · lr_scale`` for the heads; that times ``svf_lr_scale`` for singular values, or
    times ``backbone_lr_scale`` for backbone weights under full fine-tuning."""

    base_lr: float = 0.015
    lr_scale: float = 1.0
    svf_lr_scale: float = 0.1
    backbone_lr_scale: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("base_lr", "lr_scale", "svf_lr_scale", "backbone_lr_scale", "weight_decay"):
            value = getattr(self, name)
            _require(self, name, math.isfinite(value) and value >= 0, "a number, 0 or more")
        _require(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long a run is (in steps, or in epochs: passes over the training images) and how its rates fall."""

    name: Schedule = "cosine"
    iterations: int | None = None
    epochs: int | None = None
    patience: int | None = None  # stop when the best validation is this many validations old

    def __post_init__(self) -> None:
        _require_one_of(self, "iterations", "epochs")
        _require(self, "patience", self.patience is None or self.patience > 0, "1 or more, or null")


@dataclass(frozen=True)
class ValidationConfig:
    """How often and how the novel classes are evaluated while training. Model selection looks at the test fold itself,
    as in the published code."""

    every_iterations: int | None = None
    every_epochs: float | None = None  # 0.5: also at the middle of each epoch
    episodes: int = 1000
    seed: int = 321
    shots: int | None = None  # null: as in training

    def __post_init__(self) -> None:
        _require_one_of(self, "every_iterations", "every_epochs")
        _require(self, "episodes", self.episodes > 0, "1 or more")
        _require(self, "seed", 0 <= self.seed < 2**63, "0 or more, below 2^63")
        _require(self, "shots", self.shots is None or self.shots > 0, "1 or more, or null")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and on what it runs."""

    dir: str | None = None
    seed: int = 321
    device: str = "auto"  # "auto": the first GPU if there is one; "cpu", "cuda", "cuda:1"
    threads: int | None = None  # CPU threads; sums, and so the last bits, can depend on it
    checkpoint_every: int = 100  # iterations

    def __post_init__(self) -> None:
        _require(self, "seed", 0 <= self.seed < 2**63, "0 or more, below 2^63")
        kind, _, index = self.device.partition(":")
        _require(
            self,
            "device",
            self.device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal() and int(index) < 128),
            "auto, cpu, cuda or cuda:N",
        )
        _require(self, "threads", self.threads is None or self.threads > 0, "1 or more, or null")
        _require(self, "checkpoint_every", self.checkpoint_every > 0, "1 or more")


@dataclass(frozen=True)
class Config:
    """One run. ``schedule`` and ``validation`` have no usable defaults: their length is the reader's to choose."""

    schedule: ScheduleConfig
    validation: ValidationConfig
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    method: MethodConfig = field(default_factory=MethodConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.method.prior_layer == "layer4" and self.backbone.depth == 3:
            raise ValueError(
                "method.prior_layer is 'layer4', but backbone.depth=3 has none: set method.prior_layer=layer3"
            )

    def to_plain(self) -> PlainData:
        """Nested dictionaries and lists, as YAML and checkpoints hold them."""
        return to_plain(self)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a YAML file or the bare name of a shipped one, with ``section.key=value`` overrides on top.

    Raises FileNotFoundError when there is no such file, ConfigError (one sentence that names the key) on anything wrong
    in it.
    """
    path = _find(str(name))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no sections; expected {', '.join(f.name for f in fields(Config))}")
    return config_from_plain(data, overrides)


def config_from_plain(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A configuration from nested plain data (a YAML file's, a checkpoint's); errors as in :func:`load_config`."""
    merged: PlainData = {
        name: dict(section) if isinstance(section, dict) else section for name, section in data.items()
    }
    for assignment in overrides:
        override(Config, merged, assignment)
    return from_plain(Config, merged)


def shipped_configs() -> list[str]:
    """Names that :func:`load_config` takes without a path."""
    return sorted(path.stem for path in SHIPPED_FOLDER.glob("*.yaml"))


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    known = shipped_configs()
    if name in known:
        return SHIPPED_FOLDER / f"{name}.yaml"
    suggestion = nearest(name, known)
    hint = f"did you mean {suggestion}?" if suggestion else f"shipped ones are {', '.join(known)}"
    raise FileNotFoundError(f"no configuration file {name}, and no shipped one of that name: {hint}")


def _require(section: object, name: str, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ValueError(f"{name} is {getattr(section, name)!r}, expected {expected}")


def _require_one_of(section: object, first: str, second: str) -> None:
    values = getattr(section, first), getattr(section, second)
    if all(value is None for value in values):
        raise ValueError(f"{first} is not set: give it, or {second}")
    if all(value is not None for value in values):
        raise ValueError(f"{first} is set, and so is {second}: leave one out, on the command line with =null")
    for name in (first, second):
        value = getattr(section, name)
        _require(section, name, value is None or value > 0, "more than 0")
