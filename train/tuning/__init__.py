"""Tuning strategies: which parameters of a few-shot method train, and in which optimiser groups. One small class each,
found by name; a new one is a class in its family's file and its name below."""

from dataclasses import fields
from typing import Any, Literal

from svf_fast.train.methods import MetaLearner
from svf_fast.train.tuning.adapter import AdapterTuning
from svf_fast.train.tuning.base import TUNED_STAGES, ParameterGroup, StageName, Strategy
from svf_fast.train.tuning.expressions import LeftScaling, RightScaling, RotatedScaling, RotatedSVF
from svf_fast.train.tuning.norms import BatchNormTuning, BiasTuning
from svf_fast.train.tuning.singular import SVF, Parametrization, Save, Subspace
from svf_fast.train.tuning.stages import Freeze, Full, Kernel

__all__ = [
    "STRATEGIES",
    "TUNED_STAGES",
    "Kernel",
    "ParameterGroup",
    "Parametrization",
    "Save",
    "StageName",
    "Strategy",
    "StrategyName",
    "Subspace",
    "build_strategy",
    "option_names",
    "trainable_counts",
]

StrategyName = Literal[
    "freeze",
    "full",
    "svf",
    "bn",
    "bias",
    "left_scaling",
    "right_scaling",
    "rotated_scaling",
    "rotated_svf",
    "adapter",
]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        Freeze,
        Full,
        SVF,
        BatchNormTuning,
        BiasTuning,
        LeftScaling,
        RightScaling,
        RotatedScaling,
        RotatedSVF,
        AdapterTuning,
    )
}


def build_strategy(name: str, **options: Any) -> Strategy:
    """The strategy of that name; ``options`` are its fields. ValueError on an unknown one."""
    if name not in STRATEGIES:
        raise ValueError(f"tuning strategy is {name!r}, expected one of {', '.join(STRATEGIES)}")
    known = option_names(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"tuning strategy {name!r} has no option {unknown[0]!r}; {has}")
    return STRATEGIES[name](**options)


def option_names(name: str) -> list[str]:
    """The options that the strategy of that name has."""
    return [field.name for field in fields(STRATEGIES[name])]


def trainable_counts(method: MetaLearner) -> dict[str, int]:
    """Numbers of trainable parameters: {"head": ..., "backbone": ...}."""
    head = sum(parameter.numel() for _, parameter in method.head_parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    return {"head": head, "backbone": total - head}
