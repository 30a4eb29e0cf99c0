"""From tables and figures to runs: each run is one configuration, told from others by what decides its result, so that rows that
share a run share its folder. Knows the shipped parts and scales; starts nothing and writes nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from svf_fast.train.backbones import RESNET_ONLY, BackboneConfig
from svf_fast.train.composition import names_within
from svf_fast.train.config import (
    BaseConfig,
    CadenceConfig,
    Config,
    ScheduleConfig,
    ValidationConfig,
    config_from_plain,
    load_base_config,
    load_config,
)
from svf_fast.train.engine import BEST
from svf_fast.train.method_config import BASE_LEARNER, METHODS_WITH_OPTION, BaseLearnerConfig
from svf_fast.train.reproduce.assignments import Assignments
from svf_fast.train.reproduce.scale import SHAPES, Dataset, scale
from svf_fast.train.runs import FREE_ON_RESUME
from svf_fast.train.schema import flatten, override
from svf_fast.train.shapes_backbone import Pretraining
from svf_fast.train.tuning import option_names

Schema = type[Config] | type[BaseConfig]

BACKBONE_PARTS = ("resnet50", "vgg16")
FIVE_SHOT = "five_shot"
BASE_LEARNER_PARTS = {"pascal": "base_learner", "coco": "base_learner_coco"}

_SCHEDULE, _CADENCE = ScheduleConfig(iterations=1), ValidationConfig(every_iterations=1)  # have no defaults
_DEFAULTS: dict[Schema, dict[str, Any]] = {
    Config: flatten(Config(schedule=_SCHEDULE, validation=_CADENCE).to_plain()),
    BaseConfig: flatten(
        BaseConfig(
            schedule=_SCHEDULE, validation=CadenceConfig(every_iterations=1), method=BaseLearnerConfig(BASE_LEARNER)
        ).to_plain()
    ),
}


@dataclass(frozen=True)
class Case:
    """Which of a row's runs."""

    shots: int
    fold: int
    seed: int


@dataclass(frozen=True)
class PlannedRun:
    """``needs`` are names of what has to be done before it. ``changed`` are the keys set on top of the composition, as
    ``key=value``."""

    name: str
    composition: str
    changed: tuple[str, ...]
    config: Config | BaseConfig
    needs: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(str(self.config.run.dir))

    @property
    def settings_file(self) -> Path:
        return self._beside("yaml")

    @property
    def output_file(self) -> Path:
        return self._beside("log")

    @property
    def note_file(self) -> Path:
        return self._beside("json")

    @property
    def starts_from_random_weights(self) -> bool:
        takes_base_learner = isinstance(self.config, Config) and self.config.method.takes_base_learner
        return self.config.backbone.weights is None and not takes_base_learner

    def _beside(self, ending: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")


@dataclass
class Plan:
    """All runs by name, what a run needs before it; and the pre-trainings of small backbones."""

    runs: dict[str, PlannedRun] = field(default_factory=dict)
    pretrainings: dict[str, Pretraining] = field(default_factory=dict)


class Planner:
    """Adds runs to ``plan``, each once."""

    def __init__(self, dataset: Dataset, out: Path, assignments: Assignments) -> None:
        self.plan = Plan()
        self.dataset = dataset
        self.out = out
        self.assignments = assignments
        self._scale = scale(dataset.scale)

    @property
    def shapes(self) -> Path:
        return self.out / "shapes5i"

    def few_shot(self, data: str, parts: Sequence[str], case: Case, *, has_curves: bool = False) -> PlannedRun:
        """The run of ``parts`` on the data set ``data``, and its base learner. ConfigError, one sentence, where an argument of
        the user's does not fit it."""
        data = self._scale.data or data
        parts = (data, *parts, *((FIVE_SHOT,) if case.shots == 5 else ()))
        plain, before = self._settings(parts, Config, case.fold, case.seed, has_curves=has_curves)
        needs: list[str] = []
        method = plain["method"]
        if method["name"] == "bam" or method["backbone_init"] == "base_learner":
            plain["backbone"]["weights"] = None
            if method["base_learner"] is None:
                base = self.base_learner(data, parts, case)
                method["base_learner"] = str(base.folder / BEST)
                needs.append(base.name)
            else:
                method["base_learner"] = method["base_learner"].replace("{fold}", str(case.fold))
        suffix = [*(["curves"] if has_curves else []), f"fold{case.fold}", f"{case.shots}shot", f"seed{case.seed}"]
        return self._add(Config, plain, parts, suffix, before, needs)

    def base_learner(self, data: str, parts: Sequence[str], case: Case) -> PlannedRun:
        """BAM's first stage for a run of ``parts``: one for all of the same data set, backbone, fold and seed."""
        backbone = next(part for part in parts if part in BACKBONE_PARTS)
        own_parts = (data, backbone, BASE_LEARNER_PARTS[data])
        plain, before = self._settings(own_parts, BaseConfig, case.fold, case.seed)
        return self._add(BaseConfig, plain, own_parts, [f"fold{case.fold}", f"seed{case.seed}"], before, [])

    def _settings(
        self, parts: Sequence[str], schema: Schema, fold: int, seed: int, *, has_curves: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Plain settings, and as dotted keys what they were by the parts alone."""
        plain = _composed("+".join(parts), schema)
        before = flatten(plain)
        reached = sorted(names_within(parts))
        for key, value in self._scale.settings_of(reached, has_curves=has_curves):
            if takes(schema, plain, key):
                _set(plain, key, copy.deepcopy(value))
        if self.dataset.root is not None:
            plain["data"]["root"] = str(self.dataset.root)
        if self.dataset.scale == SHAPES:
            plain["data"]["root"] = str(self.shapes.absolute())
        plain["data"]["fold"], plain["run"]["seed"] = fold, seed
        for assignment in self.assignments.of(reached, schema):
            if takes(schema, plain, assignment.key):
                override(schema, plain, assignment.text)
                self.assignments.took(assignment)
        return plain, before

    def _add(
        self,
        schema: Schema,
        plain: dict[str, Any],
        parts: Sequence[str],
        suffix: Sequence[str],
        before: Mapping[str, Any],
        needs: list[str],
    ) -> PlannedRun:
        has_weights = plain["backbone"]["weights"] is not None or plain["method"].get("base_learner") is not None
        if self.dataset.scale == SHAPES and not has_weights:
            pretraining = self._pretraining(plain)
            plain["backbone"]["weights"] = pretraining.weights
            needs = [*needs, Path(pretraining.weights).stem]
        after = flatten(plain)
        changed = tuple(f"{key}={_shown(after[key])}" for key in after if after[key] != before.get(key))
        config = config_from_plain(plain, (), schema)
        name = "-".join([*(part for part in parts if part != FIVE_SHOT), *suffix, identity(config, needs)])
        if name not in self.plan.runs:
            config = replace(config, run=replace(config.run, dir=str(self.out.absolute() / "runs" / name)))
            self.plan.runs[name] = PlannedRun(name, "+".join(parts), changed, config, tuple(needs))
        return self.plan.runs[name]

    def _pretraining(self, plain: Mapping[str, Any]) -> Pretraining:
        options = {name: value for name, value in plain["backbone"].items() if name != "weights"}
        backbone, fold = BackboneConfig(**options), plain["data"]["fold"]
        name = f"{backbone.architecture}-fold{fold}-{_digest(options)}"
        pretraining = Pretraining(
            data=str(self.shapes.absolute()),
            weights=str(self.out.absolute() / "backbones" / f"{name}.safetensors"),
            fold=fold,
            backbone=backbone,
            threads=plain["run"]["threads"],
        )
        return self.plan.pretrainings.setdefault(name, pretraining)


def takes(schema: Schema, plain: Mapping[str, Any], key: str) -> bool:
    """Whether a run has the key: its schema does, and its method, strategy or backbone has the option."""
    if key not in _DEFAULTS[schema]:
        return False
    section, _, name = key.partition(".")
    if section == "method" and name in METHODS_WITH_OPTION:
        return plain["method"]["name"] in METHODS_WITH_OPTION[name]
    if section == "method" and name == "base_learner":
        return plain["method"]["name"] == "bam" or plain["method"]["backbone_init"] == "base_learner"
    if section == "tuning" and name != "strategy":
        return name in option_names(plain["tuning"]["strategy"])
    if section == "backbone" and name in RESNET_ONLY:
        return plain["backbone"]["architecture"] == "resnet"
    return True


def identity(config: Config | BaseConfig, needs: Iterable[str]) -> str:
    """A short hash of all that decides a run's result: not of where things lie, but of the weights' file name and of what it
    rests on. Keys at their defaults are left out, so that a version with one key more still knows its runs."""
    defaults = _DEFAULTS[type(config)]
    flat = {
        key: value
        for key, value in flatten(config.to_plain()).items()
        if key not in FREE_ON_RESUME and value != defaults[key]
    }
    named = {"weights": config.backbone.weights}
    if isinstance(config, Config) and not needs:
        named["base_learner"] = config.method.base_learner
    files = {key: None if place is None else Path(place).name for key, place in named.items()}
    return _digest({**flat, **files, "needs": sorted(needs)})


def _composed(name: str, schema: Schema) -> dict[str, Any]:
    return copy.deepcopy(_loaded(name, issubclass(schema, BaseConfig)))


@cache
def _loaded(name: str, is_base: bool) -> dict[str, Any]:
    return (load_base_config if is_base else load_config)(name).to_plain()


def _set(plain: dict[str, Any], key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    plain[section][name] = value


def _shown(value: object) -> str:
    """As it is written on a command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_shown, value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _digest(content: object) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=3).hexdigest()
