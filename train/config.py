"""What a run is made of: one frozen dataclass a section, from composed YAML plus ``key=value`` overrides, checked here so that
everything behind this border works with valid, typed values. Knows no model and opens no data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, overload

from svf_fast.train.backbones import BackboneConfig
from svf_fast.train.composition import layers_of, merged
from svf_fast.train.data.episodes import Order
from svf_fast.train.data.folds import FOLD_RULES
from svf_fast.train.data.transforms import CropKeep
from svf_fast.train.method_config import BASE_LEARNER, BaseLearnerConfig, MethodConfig
from svf_fast.train.precision import Precision
from svf_fast.train.schedule import Schedule
from svf_fast.train.schema import (
    ConfigError,
    PlainData,
    from_plain,
    override,
    require,
    require_fit,
    require_one_of,
    require_rate,
    to_plain,
)
from svf_fast.train.tuning import (
    Kernel,
    Parametrization,
    Save,
    StageName,
    StrategyName,
    Subspace,
    build_strategy,
    option_names,
)

__all__ = [
    "BASE_LEARNER",
    "BaseConfig",
    "Config",
    "ConfigError",
    "MethodConfig",
    "StageConfig",
    "config_from_plain",
    "load_any_config",
    "load_base_config",
    "load_config",
]

Stage = TypeVar("Stage", bound="StageConfig")

MOST_EPISODES = 1_000_000  # a validation: their keys are made at once


@dataclass(frozen=True)
class PicturesConfig:
    """A folder in Pascal-VOC layout and how pictures are drawn from it; files are relative to ``root``, ``{fold}`` in the
    names of lists stands for the fold. A list may be a fold index (.json)."""

    root: str | None = None
    folds: str = "pascal"  # a rule of FOLD_RULES, or a JSON file of own folds
    fold: int = 0
    train_list: str = "lists/fold{fold}_train.txt"
    val_list: str = "lists/fold{fold}_val.txt"
    size: int = 473  # side of the square input, pixels
    batch: int = 8  # samples a step
    scale_range: tuple[float, float] = (0.9, 1.1)  # of the random rescaling in training
    workers: int = 2  # threads that load ahead; results do not depend on it
    # MiB of decoded pictures that are kept, of each list: 512 hold Pascal's validation lists, 4,300 its whole training list
    cache_mb: int = 512

    def __post_init__(self) -> None:
        is_rule = self.folds in FOLD_RULES
        known = ", ".join(FOLD_RULES)
        require(self, "folds", is_rule or self.folds.endswith(".json"), f"{known}, or a .json file of own folds")
        # how many folds a file has is known when it is read
        last = FOLD_RULES[self.folds].folds - 1 if is_rule else math.inf
        require(self, "fold", 0 <= self.fold <= last, f"0 to {last}" if is_rule else "0 or more")
        require(self, "size", self.size > 8 and (self.size - 1) % 8 == 0, "a multiple of 8 plus 1, such as 161 or 473")
        require(self, "batch", self.batch > 0, "1 or more")
        low, high = self.scale_range
        require(self, "scale_range", 0 < low <= high < math.inf, "two numbers above 0, the smaller first")
        require(self, "workers", self.workers >= 0, "0 or more")
        require(self, "cache_mb", self.cache_mb >= 0, "0 (keep nothing) or more")

    @property
    def cache_bytes(self) -> int:
        """``cache_mb`` in bytes."""
        return self.cache_mb * 2**20


@dataclass(frozen=True)
class DataConfig(PicturesConfig):
    """Episodes of ``shots`` supports."""

    shots: int = 1
    drop_novel_images: bool = True  # the papers' † rows: no training image shows a novel class

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "shots", self.shots > 0, "1 or more")


@dataclass(frozen=True)
class BasePicturesConfig(PicturesConfig):
    """Whole pictures under base labels."""

    crop_keep: CropKeep = "ref"  # which pixels a random crop must keep: of the first base class; any: of every class
    base_filter: bool = False  # true: no training image shows a novel class, which is background otherwise


@dataclass(frozen=True)
class BackboneSection(BackboneConfig):
    """:class:`BackboneConfig` and the file its pre-trained weights come from; None leaves random weights."""

    weights: str | None = None


@dataclass(frozen=True)
class TuningConfig:
    """Which parameters of the backbone train. The options below ``strategy`` belong to some strategies only; null is
    the strategy's own default."""

    strategy: StrategyName = "svf"
    save: Save | None = None  # svf: what its layers keep for backward
    stages: tuple[StageName, ...] | None = None  # every strategy but freeze: where it tunes
    kernel: Kernel | None = None  # full: only convolutions of this size
    subspaces: tuple[Subspace, ...] | None = None  # svf: which of U, S, V train
    parametrization: Parametrization | None = None  # svf: scale is S = S_frozen · S_trainable
    batch_norm: bool | None = None  # svf: BatchNorm's weights and biases train as well
    train_s: bool | None = None  # rotated_svf: false leaves the rotated weights as they are
    reduction: int | None = None  # adapter: channels to those of its bottleneck
    seed: int | None = None  # rotated_scaling and rotated_svf: of the rotations; adapter: of its start

    def __post_init__(self) -> None:
        known = option_names(self.strategy)
        for name, value in self.options.items():
            if name not in known:
                raise ValueError(
                    f"{name} is {value!r}, but strategy is {self.strategy!r}, which has {', '.join(known) or 'no options'}"
                )
        build_strategy(self.strategy, **self.options)

    @property
    def options(self) -> PlainData:
        """What is set of the strategy's options."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "strategy"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class SGDConfig:
    """SGD. Rates in effect: ``base_lr · lr_scale`` for the heads; that times ``backbone_lr_scale`` for backbone weights
    that train."""

    base_lr: float = 0.015
    lr_scale: float = 1.0
    backbone_lr_scale: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("base_lr", "lr_scale", "backbone_lr_scale", "weight_decay"):
            require_rate(self, name)
        require(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class OptimiserConfig(SGDConfig):
    """As :class:`SGDConfig`; singular values, and the factors that stand in their place in other expressions of a weight,
    have ``svf_lr_scale`` in the place of ``backbone_lr_scale``."""

    svf_lr_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rate(self, "svf_lr_scale")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long a run is (in steps, or in epochs: passes over the training images) and how its rates fall."""

    name: Schedule = "cosine"
    iterations: int | None = None
    epochs: int | None = None
    patience: int | None = None  # stop when the best validation is this many validations old

    def __post_init__(self) -> None:
        require_one_of(self, "iterations", "epochs")
        require(self, "patience", self.patience is None or self.patience > 0, "1 or more, or null")


@dataclass(frozen=True)
class CadenceConfig:
    """How often the model is validated while training."""

    every_iterations: int | None = None
    every_epochs: float | None = None  # 0.5: also at the middle of each epoch

    def __post_init__(self) -> None:
        require_one_of(self, "every_iterations", "every_epochs")


@dataclass(frozen=True)
class ValidationConfig(CadenceConfig):
    """How the novel classes are evaluated. Model selection looks at the test fold itself, as in the published code."""

    episodes: int = 1000
    seed: int = 321
    shots: int | None = None  # null: as in training
    order: Order = "permuted"  # list: the list file's, as the field has it; the seed then draws class and supports only
    batch: int = 1  # episodes in one forward; each is scored for itself
    training_episodes: int = 0  # so many episodes of the base classes are judged as well, and decide nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "episodes", 0 < self.episodes <= MOST_EPISODES, f"1 to {MOST_EPISODES:,}")
        is_possible = 0 <= self.training_episodes <= MOST_EPISODES
        require(self, "training_episodes", is_possible, f"0 to {MOST_EPISODES:,}")
        require(self, "seed", 0 <= self.seed < 2**63, "0 or more, below 2^63")
        require(self, "shots", self.shots is None or self.shots > 0, "1 or more, or null")
        require(self, "batch", self.batch > 0, "1 or more")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and on what it runs."""

    dir: str | None = None
    seed: int = 321
    device: str = "auto"  # "auto": the first GPU if there is one; "cpu", "cuda", "cuda:1"
    threads: int | None = None  # CPU threads; sums, and so the last bits, can depend on it
    precision: Precision = "float32"  # bf16, fp16: automatic mixed precision, in training and in evaluation
    accumulate: int = 1  # forwards that a step's batch is divided into: less memory, the same step up to rounding
    compile: bool = False  # the losses of a training step under torch.compile
    tensorboard: bool = False  # curves in DIR/tensorboard beside the log
    checkpoint_every: int = 100  # iterations

    def __post_init__(self) -> None:
        require(self, "seed", 0 <= self.seed < 2**63, "0 or more, below 2^63")
        kind, _, index = self.device.partition(":")
        require(
            self,
            "device",
            self.device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal() and int(index) < 128),
            "auto, cpu, cuda or cuda:N",
        )
        require(self, "threads", self.threads is None or self.threads > 0, "1 or more, or null")
        require(self, "accumulate", self.accumulate > 0, "1 or more")
        require(self, "checkpoint_every", self.checkpoint_every > 0, "1 or more")


@dataclass(frozen=True)
class StageConfig:
    """What every run has. ``schedule`` and ``validation`` have no usable defaults: their length is the reader's to
    choose."""

    schedule: ScheduleConfig
    validation: CadenceConfig
    data: PicturesConfig = field(default_factory=PicturesConfig)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    optimiser: SGDConfig = field(default_factory=SGDConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_plain(self) -> PlainData:
        """Nested dictionaries and lists, as YAML and checkpoints hold them."""
        plain: PlainData = to_plain(self)
        return plain


@dataclass(frozen=True)
class Config(StageConfig):
    """One run of a few-shot method: meta-training, BAM's second stage."""

    validation: ValidationConfig
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        method = self.method
        if method.prior_layer == "layer4" and self.backbone.depth == 3:
            raise ValueError(
                "method.prior_layer is 'layer4', but backbone.depth=3 has none: set method.prior_layer=layer3"
            )
        if method.takes_base_learner and self.backbone.weights is not None:
            raise ValueError("backbone.weights is set, but the backbone comes from method.base_learner: leave one out")
        if method.name == "bam" and self.validation.shots not in (None, self.data.shots):
            raise ValueError(
                f"validation.shots is {self.validation.shots}, expected {self.data.shots} as in data.shots: "
                "BAM learns one weight a shot"
            )


@dataclass(frozen=True)
class BaseConfig(StageConfig):
    """One run of BAM's first stage: the base learner, trained on whole pictures of all base classes."""

    data: BasePicturesConfig = field(default_factory=BasePicturesConfig)
    method: BaseLearnerConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.data.batch < 2:
            raise ValueError(
                "data.batch is 1, expected 2 or more: BatchNorm of a pooled pixel needs more than one value"
            )


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A few-shot run's configuration from a YAML file, the name of a shipped one, or several names of parts joined with
    ``+``, of which later ones win; ``section.key=value`` overrides lie on top.

    Raises FileNotFoundError when there is nothing of that name, ConfigError (one sentence that names the key, and the
    place if it is written in a file) on anything wrong.
    """
    return config_from_plain(_read(name, Config), overrides)


def load_base_config(name: str | Path, overrides: Sequence[str] = ()) -> BaseConfig:
    """As :func:`load_config`, for a run of the base learner."""
    return config_from_plain(_read(name, BaseConfig), overrides, BaseConfig)


def load_any_config(name: str | Path, overrides: Sequence[str] = ()) -> Config | BaseConfig:
    """As :func:`load_config`, of either kind: a base learner's where ``method.name`` says so."""
    schema = _stage_of(merged(layers_of(name))) or Config
    return config_from_plain(_read(name, schema), overrides, schema)


@overload
def config_from_plain(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config: ...


@overload
def config_from_plain(data: Mapping[str, Any], overrides: Sequence[str], schema: type[Stage]) -> Stage: ...


def config_from_plain(
    data: Mapping[str, Any], overrides: Sequence[str] = (), schema: type[StageConfig] = Config
) -> StageConfig:
    """A configuration from nested plain data (a YAML file's, a checkpoint's); errors as in :func:`load_config`."""
    merged: PlainData = {
        name: dict(section) if isinstance(section, dict) else section for name, section in data.items()
    }
    for assignment in overrides:
        override(schema, merged, assignment)
    return from_plain(schema, merged)


def _read(name: str | Path, schema: type[StageConfig]) -> PlainData:
    layers = layers_of(name)
    data = merged(layers)
    stage = _stage_of(data)
    if stage not in (None, schema):
        command = "train-base" if stage is BaseConfig else "train"
        raise ConfigError(
            f"{name} is a configuration for svf-fast {command}: its method.name is {data['method']['name']!r}"
        )
    for layer in layers:
        try:
            require_fit(schema, layer.sections)
        except ConfigError as error:
            raise ConfigError(f"{layer.origin}: {error}") from error
    return data


def _stage_of(data: PlainData) -> type[Config] | type[BaseConfig] | None:
    """Whose configuration it is by its method's name; None where it has none."""
    method = data.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if name is None:
        return None
    return BaseConfig if name == BASE_LEARNER else Config
