"""What the baseline, PFENet and BAM have in common: an episode's pictures go through the backbone, and each support
comes out as a prototype and a prior mask (PFENet, section 3). Knows no head and no tuning strategy: which stages keep
a graph follows from which parameters are trainable."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.layers import ConcatConvReLU, masked_average, resize, support_mask
from svf_fast.train.methods.prior import CosineForm, prior_mask

PriorLayer = Literal["layer4", "layer3"]
Recompute = Literal["none", "supports", "stages"]


class Features(NamedTuple):
    """Of N pictures: ``layer3`` and ``layer2`` at layer 3's size (together the "middle" features), ``high`` for the
    prior."""

    layer3: Tensor
    layer2: Tensor
    high: Tensor


class Shots(NamedTuple):
    """What K supports say about B queries: prototypes [K, B, width, 1, 1] and priors [K, B, 1, h, w]."""

    prototypes: Tensor
    priors: Tensor


class MetaLearner(nn.Module):
    """Backbone stages (registered as ``layer0`` …, the published keys), ``down_query`` and ``down_supp``.

    ``prior_layer="layer3"`` is for backbones without a layer 4 (a layer 4 that is there is left out of the model): the
    prior then compares the layer-3 features of the query with those of the support times its mask.

    ``recompute`` trades time for memory, with the same results up to rounding: ``"supports"`` keeps of a support only
    its picture and mask and rebuilds its branch in backward, one shot of the batch after the other; ``"stages"`` also
    rebuilds each of the query's stages from its input.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        head_width: int,
        prior_layer: PriorLayer,
        recompute: Recompute,
        cosine: CosineForm,
    ) -> None:
        super().__init__()
        require_choice("prior_layer", prior_layer, get_args(PriorLayer))
        require_choice("recompute", recompute, get_args(Recompute))
        require_choice("cosine", cosine, get_args(CosineForm))
        if prior_layer not in backbone.channels:
            raise ValueError(f"prior_layer is {prior_layer!r}, but the backbone ends with layer{backbone.depth}")
        self.stages = tuple(stage for stage in backbone.channels if stage <= prior_layer)
        for stage in self.stages:
            self.add_module(stage, backbone.stage(stage))
        self.recompute = recompute
        self.cosine = cosine
        middle_channels = backbone.channels["layer3"] + backbone.channels["layer2"]
        self.down_query = ConcatConvReLU(middle_channels, head_width)
        self.down_supp = ConcatConvReLU(middle_channels, head_width)
        self.middle_dropout = nn.Dropout2d(0.5)

    def train(self, mode: bool = True) -> "MetaLearner":
        """As nn.Module's, but the backbone's BatchNorm stays on its running statistics for good."""
        super().train(mode)
        for stage in self.stages:
            for module in self.get_submodule(stage).modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters outside the backbone."""
        backbone = tuple(f"{stage}." for stage in self.stages)
        return ((name, parameter) for name, parameter in self.named_parameters() if not name.startswith(backbone))

    def query_features(self, image: Tensor) -> Features:
        """[B, 3, S, S] -> features."""
        return self._features(image, mask=None, recompute_stages=self.recompute == "stages")

    def query_middle(self, query: Features) -> Tensor:
        """[B, width, h, w]."""
        return self.middle_dropout(self.down_query(query.layer3, query.layer2))

    def support_shots(self, images: Tensor, labels: Tensor, query: Features) -> Shots:
        """images [B, K, 3, S, S], labels [B, K, S, S] (1 the episode's class) -> a prototype and a prior for each
        shot.

        All supports of the batch are one batch for the backbone, unless they are recomputed.
        """
        require_episode(images, labels, query.high.shape[0])
        images = images.transpose(0, 1)  # [K, B, 3, S, S]: a shot's results lie together
        masks = support_mask(labels.transpose(0, 1), images.dtype)  # [K, B, 1, S, S]
        if self.recompute == "none" or not torch.is_grad_enabled():
            shots = self._shots(images, masks, query.high)
        else:
            rebuilt = [
                checkpoint(self._shots, *shot, query.high, use_reentrant=False)
                for shot in zip(images.split(1), masks.split(1), strict=True)
            ]
            shots = Shots(*(torch.cat(per_shot) for per_shot in zip(*rebuilt, strict=True)))
        # Dropout2d drops whole channels, so dropping them before or after the pooling is the same function; after it,
        # the draw is one for all supports whichever way they were computed, and outside anything that is recomputed
        dropped = self.middle_dropout(shots.prototypes.flatten(0, 1)).view_as(shots.prototypes)
        return Shots(dropped, shots.priors)

    def _shots(self, images: Tensor, masks: Tensor, query_high: Tensor) -> Shots:
        """images [K, B, 3, S, S], masks [K, B, 1, S, S], query_high [B, C, h, w] -> shots, before dropout."""
        count, batch = images.shape[:2]
        mask = masks.flatten(0, 1)
        support = self._features(images.flatten(0, 1), mask=mask, recompute_stages=False)
        middle = self.down_supp(support.layer3, support.layer2)  # of the unmasked features
        prototypes = masked_average(middle, resize(mask, middle.shape[-2:]))
        # layer 4 has seen masked features already; the released code masks what comes out of it once more
        high_mask = resize(mask, support.high.shape[-2:])
        priors = [
            resize(prior_mask(query_high, high, shot_mask, cosine=self.cosine), middle.shape[-2:])
            for high, shot_mask in zip(support.high.split(batch), high_mask.split(batch), strict=True)
        ]
        return Shots(prototypes.unflatten(0, (count, batch)), torch.stack(priors))

    def _features(self, image: Tensor, *, mask: Tensor | None, recompute_stages: bool) -> Features:
        """image [N, 3, S, S]; with a mask [N, 1, S, S], layer 4 sees layer 3's features times the mask."""

        def run(stage: str, features: Tensor) -> Tensor:
            module = self.get_submodule(stage)
            needs_graph = features.requires_grad or any(p.requires_grad for p in module.parameters())
            if recompute_stages and needs_graph and torch.is_grad_enabled():
                return checkpoint(module, features, use_reentrant=False)
            return module(features)

        layer1 = self.get_submodule("layer1")(self.get_submodule("layer0")(image))
        layer2 = run("layer2", layer1)
        layer3 = run("layer3", layer2)
        high = layer3
        if "layer4" in self.stages:
            high = run("layer4", layer3 if mask is None else layer3 * resize(mask, layer3.shape[-2:]))
        return Features(layer3, resize(layer2, layer3.shape[-2:]), high)


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def require_episode(images: Tensor, labels: Tensor, batch: int) -> None:
    """ValueError unless these are the supports of ``batch`` queries."""
    if images.dim() != 5 or images.shape[0] != batch or images.shape[1] == 0 or images.shape[2] != 3:
        raise ValueError(
            f"support_images is {list(images.shape)}, expected [{batch}, K, 3, S, S] with at least one shot"
        )
    expected = [*images.shape[:2], *images.shape[3:]]
    if list(labels.shape) != expected:
        raise ValueError(f"support_labels is {list(labels.shape)}, expected {expected} to match support_images")
