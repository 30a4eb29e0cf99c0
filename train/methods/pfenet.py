"""PFENet (Tian et al. 2020): prior guided feature enrichment. The query, the prototype and the prior meet at several
scales, information flows from the finest to the coarsest, and each scale has a loss of its own. State-dict keys are
those of the authors' code."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.layers import ConcatConvReLU, classifier, residual_pair, resize
from svf_fast.train.methods.losses import Losses, TrainingBatch, segmentation_loss
from svf_fast.train.methods.meta_learner import (
    BNMode,
    MetaLearner,
    PriorLayer,
    PriorMasking,
    Recompute,
    require_episode,
    require_width,
)
from svf_fast.train.methods.prior import CosineForm
from svf_fast.train.seeding import seeded_initialisation

BINS_IN_WORDS = "one or more sides above 1 as whole numbers, or ratios in (0, 1]"


class PFENetSegmentation(NamedTuple):
    """Logits [B, 2, h, w] at the feature map's size, those of each scale [B, 2, bin, bin], and what they were made of:
    the query's middle features [B, width, h, w], the combined prototype [B, width, 1, 1] and prior [B, 1, h, w]."""

    logits: Tensor
    inner: tuple[Tensor, ...]
    query: Tensor
    prototype: Tensor
    prior: Tensor


def is_bin(value: float) -> bool:
    """Whether a pyramid's scale may be given so."""
    return 0 < value <= 1 or (value > 1 and float(value).is_integer())


class PFENet(MetaLearner):
    """PFENet on any backbone; the stages become part of the model as they are (not copied).

    ``bins`` are the sides of the scales, finest first; a value up to 1 is a ratio of the feature map's height,
    rounded down. Default: the published sides for Pascal. Scales may be larger than the map. ``head_width`` (256) is
    the published size. For the other options see :class:`MetaLearner`. The head's random weights depend on ``seed``
    only; dropout draws from PyTorch's global generator, as its layers do.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        head_width: int = 256,
        bins: Sequence[float] = (60, 30, 15, 8),
        prior_layer: PriorLayer = "layer4",
        recompute: Recompute = "none",
        cosine: CosineForm = "streaming",
        bn_mode: BNMode = "eval",
        prior_masking: PriorMasking = "twice",
        seed: int = 0,
    ) -> None:
        if not bins or not all(is_bin(value) for value in bins):
            raise ValueError(f"bins is {list(bins)}, expected {BINS_IN_WORDS}")
        require_width(head_width)
        super().__init__(
            backbone,
            prior_layer=prior_layer,
            recompute=recompute,
            cosine=cosine,
            bn_mode=bn_mode,
            prior_masking=prior_masking,
        )
        self.bins = tuple(bins)
        scales = range(len(self.bins))
        width = head_width
        with seeded_initialisation(seed):
            self.cls = classifier(width)
            self.down_query = ConcatConvReLU(self.middle_channels, width)
            self.down_supp = ConcatConvReLU(self.middle_channels, width)
            self.init_merge = nn.ModuleList(ConcatConvReLU(2 * width + 1, width) for _ in scales)
            self.beta_conv = nn.ModuleList(residual_pair(width) for _ in scales)
            self.inner_cls = nn.ModuleList(classifier(width) for _ in scales)
            self.res1 = ConcatConvReLU(len(scales) * width, width)
            self.res2 = residual_pair(width)
            self.alpha_conv = nn.ModuleList(ConcatConvReLU(2 * width, width) for _ in scales[1:])
        self.train(self.training)

    def forward(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        query, prototype, prior = self._match(query_image, support_images, support_labels)
        logits = self._decide(self._enrich(query, prototype, prior), query.shape[-2:])
        return resize(logits, query_image.shape[-2:])

    def losses(self, batch: TrainingBatch) -> Losses:
        """main, on the final map, and aux, the mean over the scales; total = main + aux."""
        low = self.segment(batch.query_images, batch.support_images, batch.support_labels)
        size = batch.query_images.shape[-2:]
        main = segmentation_loss(resize(low.logits, size), batch.query_labels)
        inner = [segmentation_loss(resize(logits, size), batch.query_labels) for logits in low.inner]
        aux = torch.stack(inner).mean()
        return Losses(main + aux, {"main": main, "aux": aux})

    def segment(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> PFENetSegmentation:
        """As ``forward``, before the last resize, with the scales' own logits and what the decision rests on."""
        query, prototype, prior = self._match(query_image, support_images, support_labels)
        scales = self._enrich(query, prototype, prior)
        inner = tuple(decide(scale) for decide, scale in zip(self.inner_cls, scales, strict=True))
        return PFENetSegmentation(self._decide(scales, query.shape[-2:]), inner, query, prototype, prior)

    def _match(
        self, query_image: Tensor, support_images: Tensor, support_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The query's middle features, prototype and prior, these two averaged over the shots."""
        require_episode(query_image, support_images, support_labels)
        features = self.query_features(query_image)
        query = self.query_middle(features)
        shots = self.support_shots(support_images, support_labels, features)
        return query, shots.prototypes.mean(dim=0), shots.priors.mean(dim=0)

    def _enrich(self, query: Tensor, prototype: Tensor, prior: Tensor) -> list[Tensor]:
        """The feature enrichment module of the paper: a map [B, width, bin, bin] for each scale."""
        map_size = query.shape[-2:]
        scales: list[Tensor] = []
        for number, side in enumerate(self._sides(map_size[0])):
            size = (side, side)
            pooled = query if map_size == size else F.adaptive_avg_pool2d(query, size)
            scale = self.init_merge[number](pooled, prototype, resize(prior, size))
            if scales:
                # the released code has resized the finer scale to the map before
                finer = resize(resize(scales[-1], map_size), size)
                scale = scale + self.alpha_conv[number - 1](scale, finer)
            scales.append(scale + self.beta_conv[number](scale))
        return scales

    def _decide(self, scales: Sequence[Tensor], map_size: Sequence[int]) -> Tensor:
        """The scales, each resized to the map -> logits [B, 2, h, w]."""
        merged = self.res1(*scales, size=map_size)
        return self.cls(merged + self.res2(merged))

    def _sides(self, height: int) -> list[int]:
        sides = [int(height * value) if value <= 1 else int(value) for value in self.bins]
        if 0 in sides:
            raise ValueError(f"bins is {list(self.bins)}, too small ratios for features {height} positions high")
        return sides
