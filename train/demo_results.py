"""What the demo found, as plain data between those who measure it and those who show it. Knows neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from svf_fast.train.figures import PredictionRow
from svf_fast.train.spectra import MovedValue, Spectrum


@dataclass(frozen=True)
class ValidationPoint:
    """Scores on the novel classes after `step` steps; fractions."""

    step: int
    miou: float
    fb_iou: float
    class_iou: dict[str, float]


@dataclass(frozen=True)
class StrategyResult:
    """One tuning strategy's run. `curve` has at least one point; rates are before the schedule (None: nothing tuned)."""

    name: str
    trains: str
    head_parameters: int
    backbone_parameters: int
    head_rate: float
    backbone_rate: float | None
    kept_bytes: int  # for backward, one episode
    step_ms: float  # median
    training_s: float
    validation_s: float
    losses: list[float]  # one a step
    curve: list[ValidationPoint]

    @property
    def final(self) -> ValidationPoint:
        return self.curve[-1]

    @property
    def best(self) -> ValidationPoint:
        return max(self.curve, key=lambda point: point.miou)


@dataclass(frozen=True)
class DemoResults:
    """All that the report tells. `notes` are sentences about how it was measured; `settings` and `machine` are shown as they are."""

    strategies: list[StrategyResult]
    algorithm1_kept_bytes: int
    spectra: list[Spectrum]
    moved: list[MovedValue]
    seed: int
    class_names: list[str]
    validation_episodes: int
    settings: dict[str, Any]
    machine: dict[str, str]
    pretraining: dict[str, Any]
    notes: list[str]
    examples: list[PredictionRow] = field(default_factory=list)
