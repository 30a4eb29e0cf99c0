"""Tuning strategies: which parameters of a few-shot method train, and in which optimiser groups. One small class each,
found by name. Knows the library's public names and a method's stages; no head by name, no data and no optimiser."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict

from torch import nn

import svf_fast
from svf_fast.train.methods import MetaLearner

Save = Literal["exact", "int8", "recompute"]
TUNED_STAGES = ("layer2", "layer3", "layer4")  # stem and layer 1 stay frozen in the paper's best setting (its table 8)


class ParameterGroup(TypedDict):
    """An optimiser's group: its rate is the run's times ``lr_scale``."""

    name: str
    params: list[nn.Parameter]
    lr_scale: float


@dataclass(frozen=True)
class Strategy(ABC):
    """Trains the whole head, and of the backbone what a subclass says."""

    name: ClassVar[str]
    trains: ClassVar[str]  # for reports: what of the backbone trains

    @abstractmethod
    def apply_to_backbone(self, method: MetaLearner) -> None:
        """Make trainable what is to train; every backbone parameter arrives frozen."""

    def apply(self, method: MetaLearner) -> None:
        """Make exactly the right parameters trainable, converting modules in place where the strategy needs it. Load
        backbone weights before, optimisers build after."""
        for name in method.stages:
            method.get_submodule(name).requires_grad_(False)
        self.apply_to_backbone(method)
        for _, parameter in method.head_parameters():
            parameter.requires_grad_(True)
        method.train(method.training)

    def parameter_groups(self, method: MetaLearner, *, backbone_lr_scale: float) -> list[ParameterGroup]:
        """Groups "head" (scale 1) and, if anything there trains, "backbone" (``backbone_lr_scale``). Call after
        ``apply``."""
        head = dict(method.head_parameters())
        groups = [ParameterGroup(name="head", params=_trainable(head.values()), lr_scale=1.0)]
        backbone = _trainable(parameter for name, parameter in method.named_parameters() if name not in head)
        if backbone:
            groups.append(ParameterGroup(name="backbone", params=backbone, lr_scale=backbone_lr_scale))
        return groups


@dataclass(frozen=True)
class Freeze(Strategy):
    """The original methods' setting: the backbone needs no graph at all."""

    name = "freeze"
    trains = "nothing"

    def apply_to_backbone(self, method: MetaLearner) -> None:
        pass


@dataclass(frozen=True)
class Full(Strategy):
    """Fully tuned convolutions of ``stages``, BatchNorm frozen (the paper's figure 3b)."""

    stages: tuple[str, ...] = TUNED_STAGES

    name = "full"
    trains = "all convolutions of layers 2-4"

    def apply_to_backbone(self, method: MetaLearner) -> None:
        for stage in _present(self.stages, method):
            for module in method.get_submodule(stage).modules():
                if isinstance(module, nn.Conv2d):
                    module.requires_grad_(True)


@dataclass(frozen=True)
class SVF(Strategy):
    """Singular value fine-tuning of ``stages``; ``save`` and ``fuse`` as in :func:`svf_fast.convert`."""

    stages: tuple[str, ...] = TUNED_STAGES
    save: Save = "exact"
    fuse: bool = True

    name = "svf"
    trains = "the singular values of layers 2-4"

    def apply_to_backbone(self, method: MetaLearner) -> None:
        svf_fast.convert(method, list(_present(self.stages, method)), save=self.save, fuse=self.fuse)


STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (Freeze, Full, SVF)}


def build_strategy(name: str, **options: Any) -> Strategy:
    """The strategy of that name; ``options`` are its fields. ValueError on an unknown one."""
    if name not in STRATEGIES:
        raise ValueError(f"tuning strategy is {name!r}, expected one of {', '.join(STRATEGIES)}")
    known = [field.name for field in fields(STRATEGIES[name])]
    unknown = [option for option in options if option not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"tuning strategy {name!r} has no option {unknown[0]!r}; {has}")
    return STRATEGIES[name](**options)


def trainable_counts(method: MetaLearner) -> dict[str, int]:
    """Numbers of trainable parameters: {"head": ..., "backbone": ...}."""
    head = sum(parameter.numel() for _, parameter in method.head_parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    return {"head": head, "backbone": total - head}


def _present(stages: tuple[str, ...], method: MetaLearner) -> list[str]:
    return [stage for stage in stages if stage in method.stages]


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
