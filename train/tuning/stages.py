"""Traditional fine-tuning (SVF paper, section 4.3): nothing, or the convolutions themselves, by stage (table 5) and by
kernel size (table 6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from svf_fast.train.methods import MetaLearner
from svf_fast.train.tuning.base import StageStrategy, Strategy, convolutions

Kernel = Literal["all", "1x1", "3x3"]


@dataclass(frozen=True)
class Freeze(Strategy):
    """The original methods' setting: the backbone needs no graph at all."""

    name = "freeze"
    takes_moving_statistics = True

    @property
    def trains(self) -> str:
        return "nothing"

    def tuned_stages(self, method: MetaLearner) -> list[str]:
        return []

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        pass


@dataclass(frozen=True)
class Full(StageStrategy):
    """Fully tuned convolutions of ``stages`` with their biases, or those of one ``kernel`` size; BatchNorm's affine is
    frozen."""

    kernel: Kernel = "all"

    name = "full"
    takes_moving_statistics = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel not in get_args(Kernel):
            raise ValueError(f"kernel is {self.kernel!r}, expected one of {', '.join(map(repr, get_args(Kernel)))}")

    @property
    def trains(self) -> str:
        return f"{'all' if self.kernel == 'all' else f'the {self.kernel}'} convolutions of {self.layers}"

    def tuned_stages(self, method: MetaLearner) -> list[str]:
        present = super().tuned_stages(method)
        tuned = {
            name.partition(".")[0]
            for name, convolution in convolutions(method, present)
            if self.kernel in ("all", "x".join(map(str, convolution.kernel_size)))
        }
        if not tuned:
            raise ValueError(f"kernel is {self.kernel!r}, but {self.layers} of this backbone have no such convolution")
        return [stage for stage in present if stage in tuned]

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        for _, convolution in convolutions(method, stages):
            if self.kernel in ("all", "x".join(map(str, convolution.kernel_size))):
                convolution.requires_grad_(True)
