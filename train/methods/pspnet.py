"""PSPNet (Zhao et al. 2017) on layer 4, BAM's base learner: it segments a fold's base classes. State-dict keys are
those of BAM's code, the backbone once. Knows no episode."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from svf_fast.train.backbones import Backbone
from svf_fast.train.backbones.weights import load_backbone_state, state_of
from svf_fast.train.methods.dropout import Dropout2d
from svf_fast.train.methods.layers import convolve_parts, resize
from svf_fast.train.methods.losses import Losses, segmentation_loss
from svf_fast.train.seeding import seeded_initialisation

BINS = (1, 2, 3, 6)
CLASSIFIER_WIDTH = 512
ALIAS = "encoder."  # under which BAM's code registers the backbone a second time: encoder.0 is layer0


class PSPNet(nn.Module):
    """Backbone stages (registered as ``layer0`` …), ``ppm`` and ``cls`` for ``classes`` base classes and background,
    all of it trainable, BatchNorm following ``train()``. The head's random weights depend on ``seed`` only."""

    def __init__(self, backbone: Backbone, *, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.stages = tuple(backbone.channels)
        for stage in self.stages:
            self.add_module(stage, backbone.stage(stage))
        with seeded_initialisation(seed):
            self.ppm, self.cls = base_head(backbone.channels[self.stages[-1]], classes)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> logits [B, classes + 1, S, S]."""
        return resize(self.segment(image), image.shape[-2:])

    def losses(self, image: Tensor, base_label: Tensor) -> Losses:
        """main alone: base_label [B, S, S] int64, 0 background, 1 … the base classes, 255 void."""
        main = segmentation_loss(self(image), base_label)
        return Losses(main, {"main": main})

    def segment(self, image: Tensor) -> Tensor:
        """As ``forward``, before the last resize."""
        features = image
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        return self.cls(self.ppm(features))


class PyramidPooling(nn.Module):
    """The map averaged over 1, 2², 3² and 6² fields, each reduced to a quarter of the channels. Keys
    ``features.<scale>.1.weight`` (convolution) and ``features.<scale>.2.*`` (BatchNorm)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = channels // len(BINS)
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(side),
                nn.Conv2d(channels, reduced, 1, bias=False),
                nn.BatchNorm2d(reduced),
                nn.ReLU(inplace=True),
            )
            for side in BINS
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, h, w] -> the features themselves, and the scales resized to them [B, C, h, w], finest last."""
        size = features.shape[-2:]
        return features, torch.cat([resize(scale(features), size) for scale in self.features], dim=1)


class PyramidClassifier(nn.Sequential):
    """3x3, BatchNorm, ReLU, Dropout2d, 1x1 of the concatenated features and scales, which is never built. Keys
    ``0.weight``, ``1.*``, ``4.weight``, ``4.bias``."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(2 * channels, CLASSIFIER_WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(CLASSIFIER_WIDTH),
            # before the ReLU it is the same function, its factors not being negative, and one map less is kept
            Dropout2d(0.1, inplace=True),
            nn.ReLU(inplace=True),
            nn.Conv2d(CLASSIFIER_WIDTH, classes + 1, 1),
        )

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts [B, C_i, h, w] -> logits [B, classes + 1, h, w]."""
        convolution, *rest = self
        output = convolve_parts(convolution, parts)
        for module in rest:
            output = module(output)
        return output


def base_head(channels: int, classes: int) -> tuple[PyramidPooling, PyramidClassifier]:
    """What follows a backbone whose last stage has ``channels``, for ``classes`` base classes."""
    if classes < 1:
        raise ValueError(f"classes is {classes}, expected the number of base classes, at least 1")
    return PyramidPooling(channels), PyramidClassifier(channels, classes)


def load_base_learner(base_learner: nn.Module, source: Mapping[str, Tensor] | str | Path) -> None:
    """Fill a module with the entries of :class:`PSPNet` from a state dict or a file, of this project or of BAM's code:
    ``module.`` prefixes and the second copy under ``encoder.`` are understood.

    Raises FileNotFoundError, or ValueError when the file cannot be read, or when keys or shapes are not exactly those
    of the module, which is then unchanged.
    """
    state, name = state_of(source)
    mapped = {key: tensor for key, tensor in state.items() if not key.startswith(ALIAS)}
    for alias, tensor in state.items():
        if alias.startswith(ALIAS):
            key = f"layer{alias.removeprefix(ALIAS)}"
            if not torch.equal(mapped.setdefault(key, tensor), tensor):
                raise ValueError(f"weights in {name} hold {key} and {alias}, two copies of one tensor, and they differ")
    load_backbone_state(base_learner, mapped, source=name, owner="base learner")
