"""The SVF paper's baseline: PFENet with its feature enrichment replaced by an ASPP, which is BAM's meta learner alone.
One loss, on the final map. State-dict keys are those of the authors' code."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.aspp_learner import ASPPLearner
from svf_fast.train.methods.layers import resize
from svf_fast.train.methods.losses import Losses, TrainingBatch, segmentation_loss
from svf_fast.train.methods.meta_learner import (
    BNMode,
    PriorLayer,
    PriorMasking,
    Recompute,
    require_choice,
    require_episode,
)
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


class Baseline(ASPPLearner):
    """The SVF paper's baseline on any backbone; the stages become part of the model as they are (not copied).

    ``shot_reduction="sum"`` repeats the released code, which adds the shots' prototypes and priors where PFENet
    averages them, and ``train_down_query=False`` its optimiser, which leaves ``down_query`` at its random start.
    ``head_width`` (256) and ``aspp_dilations`` are the published sizes. For the other options see
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
        train_down_query: bool = True,
        recompute: Recompute = "none",
        cosine: CosineForm = "streaming",
        bn_mode: BNMode = "eval",
        prior_masking: PriorMasking = "twice",
        seed: int = 0,
    ) -> None:
        require_choice("shot_reduction", shot_reduction, get_args(ShotReduction))
        super().__init__(
            backbone,
            prior_layer=prior_layer,
            recompute=recompute,
            cosine=cosine,
            bn_mode=bn_mode,
            prior_masking=prior_masking,
        )
        with seeded_initialisation(seed):
            self.build_head(head_width, aspp_dilations)
        self.shot_reduction = shot_reduction
        self.down_query.requires_grad_(train_down_query)
        self.train_down_query = train_down_query
        self.train(self.training)

    def forward(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        low = self.segment(query_image, support_images, support_labels)
        return resize(low.logits, query_image.shape[-2:])

    def losses(self, batch: TrainingBatch) -> Losses:
        """main alone."""
        logits = self(batch.query_images, batch.support_images, batch.support_labels)
        main = segmentation_loss(logits, batch.query_labels)
        return Losses(main, {"main": main})

    def segment(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Segmentation:
        """As ``forward``, before the last resize and with what the decision rests on."""
        require_episode(query_image, support_images, support_labels)
        features = self.query_features(query_image)
        query = self.query_middle(features)
        shots = self.support_shots(support_images, support_labels, features)
        prototype = self._over_shots(shots.prototypes)
        prior = self._over_shots(shots.priors)
        return Segmentation(self.decide(query, prototype, prior), query, prototype, prior)

    def frozen_modules(self) -> tuple[str, ...]:
        return () if self.train_down_query else ("down_query",)

    def _over_shots(self, per_shot: Tensor) -> Tensor:
        """[K, B, ...] -> [B, ...]."""
        return per_shot.mean(dim=0) if self.shot_reduction == "mean" else per_shot.sum(dim=0)
