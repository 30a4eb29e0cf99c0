"""Adapters (Houlsby et al. 2019) in a convolutional backbone, after its stages (SVF paper, section 4.3 and table 10)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from svf_fast.train.methods import MetaLearner
from svf_fast.train.seeding import seeded_initialisation
from svf_fast.train.tuning.base import StageName, StageStrategy, convolutions


class Adapter(nn.Module):
    """x + up(relu(down(x))), 1x1 convolutions to ``channels // reduction`` (at least 1) and back.

    ``down`` starts as Houlsby et al. have it: normal with deviation 0.01, truncated at two deviations, biases 0; ``up``
    starts at 0 rather than near it, so that a run begins with the pre-trained function exactly.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        width = max(1, channels // reduction)
        self.down = nn.Conv2d(channels, width, 1)
        self.up = nn.Conv2d(width, channels, 1)
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            assert tensor is not None
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> the same shape."""
        return x + self.up(F.relu(self.down(x), inplace=True))


@dataclass(frozen=True)
class AdapterTuning(StageStrategy):
    """Adapters after ``stages``, whose own weights stay frozen. ``reduction`` 16 is that of Houlsby et al. (64 of
    BERT's 1024 features); the paper does not give its own. Random weights depend on ``seed``."""

    stages: tuple[StageName, ...] = ("layer1", "layer2", "layer3", "layer4")
    reduction: int = 16
    seed: int = 0

    name = "adapter"
    takes_moving_statistics = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1:
            raise ValueError(f"reduction is {self.reduction!r}, expected 1 or more")

    @property
    def trains(self) -> str:
        return f"adapters (1x1 convolutions, reduction {self.reduction}) after {self.layers}"

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        with seeded_initialisation(self.seed):
            for stage in stages:
                *_, (_, last) = convolutions(method, [stage])
                # a stage is a Sequential: what is added to it runs last, and the published keys stay
                adapter = Adapter(last.out_channels, self.reduction)
                method.get_submodule(stage).add_module("adapter", adapter.to(last.weight))
