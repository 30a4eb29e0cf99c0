"""The SVF paper's baseline: PFENet with its feature enrichment replaced by an ASPP, which is BAM's meta learner alone.
One loss, on the final map. State-dict keys are those of the authors' code."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.layers import ASPP, ConcatConvReLU, resize, segmentation_loss
from svf_fast.train.methods.meta_learner import MetaLearner, PriorLayer, Recompute, require_choice
from svf_fast.train.methods.prior import CosineForm
from svf_fast.train.seeding import seeded_initialisation

ShotReduction = Literal["mean", "sum"]


class Segmentation(NamedTuple):
    """Logits [B, 2, h, w] at the feature map's size, and what they were made of: the query's middle features [B,
    width, h, w], the combined prototype [B, width, 1, 1] and prior mask [B, 1, h, w]."""

    logits: Tensor
    query: Tensor
    prototype: Tensor
    prior: Tensor


class Baseline(MetaLearner):
    """The SVF paper's baseline on any backbone; the stages become part of the model as they are (not copied).

    ``shot_reduction="sum"`` repeats the released code, which adds the shots' prototypes and priors where PFENet
    averages them. ``head_width`` (256) and ``aspp_dilations`` are the published sizes. For the other options see
    :class:`MetaLearner`. The head's random weights depend on ``seed`` only; dropout draws from PyTorch's global
    generator, as its layers do.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        head_width: int = 256,
        aspp_dilations: Sequence[int] = (6, 12, 18),
        prior_layer: PriorLayer = "layer4",
        shot_reduction: ShotReduction = "mean",
        recompute: Recompute = "none",
        cosine: CosineForm = "streaming",
        seed: int = 0,
    ) -> None:
        require_choice("shot_reduction", shot_reduction, get_args(ShotReduction))
        with seeded_initialisation(seed):
            super().__init__(
                backbone, head_width=head_width, prior_layer=prior_layer, recompute=recompute, cosine=cosine
            )
            self.init_merge = ConcatConvReLU(2 * head_width + 1, head_width)
            self.ASPP_meta = ASPP(head_width, aspp_dilations)
            self.res1_meta = ConcatConvReLU((2 + len(aspp_dilations)) * head_width, head_width)
            self.res2_meta = nn.Sequential(
                nn.Conv2d(head_width, head_width, 3, padding=1, bias=False),
                nn.ReLU(inplace=True),
                nn.Conv2d(head_width, head_width, 3, padding=1, bias=False),
                nn.ReLU(inplace=True),
            )
            self.cls_meta = nn.Sequential(
                nn.Conv2d(head_width, head_width, 3, padding=1, bias=False),
                nn.ReLU(inplace=True),
                nn.Dropout2d(0.1),
                nn.Conv2d(head_width, 2, 1),
            )
        self.shot_reduction = shot_reduction
        self.train(self.training)

    def forward(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """query_image [B, 3, S, S], support_images [B, K, 3, S, S], support_labels [B, K, S, S] int64 (1 the episode's
        class) -> logits [B, 2, S, S]: background, the episode's class."""
        low = self.segment(query_image, support_images, support_labels)
        return resize(low.logits, query_image.shape[-2:])

    def loss(self, logits: Tensor, query_label: Tensor) -> Tensor:
        """Cross-entropy of logits [B, 2, S, S] against query_label [B, S, S] int64 (255 void)."""
        return segmentation_loss(logits, query_label)

    def segment(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Segmentation:
        """As ``forward``, before the last resize and with what the decision rests on."""
        features = self.query_features(query_image)
        query = self.query_middle(features)
        shots = self.support_shots(support_images, support_labels, features)
        prototype = self._over_shots(shots.prototypes)
        prior = self._over_shots(shots.priors)

        merged = self.init_merge(query, prototype, prior)  # the prototype expanded over the map
        context = self.res1_meta(*self.ASPP_meta(merged))
        refined = context + self.res2_meta(context)
        return Segmentation(self.cls_meta(refined), query, prototype, prior)

    def _over_shots(self, per_shot: Tensor) -> Tensor:
        """[K, B, ...] -> [B, ...]."""
        return per_shot.mean(dim=0) if self.shot_reduction == "mean" else per_shot.sum(dim=0)
