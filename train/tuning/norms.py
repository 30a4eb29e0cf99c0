"""Tuning BatchNorm (SVF paper, table 4) and its bias terms alone (table 10). Running statistics stay as they are; the
paper is silent about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from svf_fast.train.methods import MetaLearner
from svf_fast.train.tuning.base import ALL_STAGES, StageName, StageStrategy


@dataclass(frozen=True)
class BatchNormTuning(StageStrategy):
    """BatchNorm's affine. Together with the singular values: ``batch_norm`` of the strategy svf."""

    name = "bn"

    @property
    def trains(self) -> str:
        return f"the BatchNorm weights and biases of {self.layers}"

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        for norm in batch_norms(method, stages):
            norm.requires_grad_(True)


@dataclass(frozen=True)
class BiasTuning(StageStrategy):
    """The bias terms of all BatchNorm layers; a ResNet has no others."""

    stages: tuple[StageName, ...] = ALL_STAGES

    name = "bias"

    @property
    def trains(self) -> str:
        return f"the BatchNorm biases of {self.layers}"

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        for norm in batch_norms(method, stages):
            norm.bias.requires_grad_(True)


def batch_norms(method: MetaLearner, stages: Sequence[str]) -> Iterator[nn.BatchNorm2d]:
    for stage in stages:
        for module in method.get_submodule(stage).modules():
            if isinstance(module, nn.BatchNorm2d):
                yield module
