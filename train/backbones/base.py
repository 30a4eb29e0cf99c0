"""What every backbone offers to the methods on top: stages ``layer0`` … ``layer4`` and their channel counts. Knows no
architecture and no method."""

from torch import Tensor, nn

STAGES = ("layer0", "layer1", "layer2", "layer3", "layer4")


class Backbone(nn.Module):
    """Stages ``layer0`` (the stem) … ``layer<depth>``, each a module that takes the output of the one before.

    ``channels`` maps a stage's name to its number of output channels. Few-shot methods call the stages one by one;
    ``forward`` runs them all and is what classification pre-training uses.
    """

    def __init__(self, stages: dict[str, nn.Module], channels: dict[str, int]) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.channels = dict(channels)

    @property
    def depth(self) -> int:
        """Number of the last stage: 3 or 4."""
        return len(self.channels) - 1

    def stage(self, name: str) -> nn.Module:
        return self.get_submodule(name)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> the last stage's features [B, channels, h, w]."""
        features = image
        for name in self.channels:
            features = self.stage(name)(features)
        return features


def initialise_like_torchvision(backbone: nn.Module) -> None:
    """He et al. 2015, fan-out, for convolutions (zero bias); BatchNorm starts as the identity."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
