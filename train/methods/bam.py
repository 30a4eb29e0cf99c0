"""BAM (Lang et al. 2022): the meta learner's map is corrected by what a base learner, trained on the base classes,
recognises, and by how alike query and supports look. State-dict keys are those of the authors' code."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.aspp_learner import ASPPLearner
from svf_fast.train.methods.layers import resize
from svf_fast.train.methods.losses import Losses, TrainingBatch, segmentation_loss
from svf_fast.train.methods.meta_learner import (
    BNMode,
    Features,
    PriorLayer,
    PriorMasking,
    Recompute,
    keep_running_statistics,
    require_choice,
    require_episode,
)
from svf_fast.train.methods.prior import CosineForm
from svf_fast.train.methods.pspnet import base_head, load_base_learner
from svf_fast.train.seeding import seeded_initialisation

GeneralisedRule = Literal["final", "base"]
FinalLoss = Literal["as_logits", "as_probabilities"]
TrainingBaseMap = Literal["others", "all"]
EPSILON = 1e-7


class BAMOutputs(NamedTuple):
    """At the pictures' size: ``final`` and ``meta`` [B, 2, S, S], ``base`` [B, N + 1, S, S]. ``final`` is made of
    probabilities, which the authors' code uses as logits."""

    final: Tensor
    meta: Tensor
    base: Tensor


class BAMSegmentation(NamedTuple):
    """``BAMOutputs`` at the feature map's size, and what they were made of: the query's middle features [B, width, h,
    w], the combined prototype [B, width, 1, 1] and prior [B, 1, h, w], each shot's adjustment factor and weight [B, K,
    1, 1], and the base map [B, 1, h, w]."""

    final: Tensor
    meta: Tensor
    base: Tensor
    query: Tensor
    prototype: Tensor
    prior: Tensor
    factors: Tensor
    weights: Tensor
    base_map: Tensor


class BAM(ASPPLearner):
    """BAM on any backbone, for ``base_classes`` base classes N and ``shots`` supports an episode.

    The base learner (``learner_base``) is frozen and starts at random: fill it, and the backbone, with
    :meth:`load_base_learner`. Its branch sees the query through the backbone as it was before tuning
    (:meth:`prepare_tuning`), so that base logits never move (with ``bn_mode="train"`` BatchNorm's statistics still do, as
    in the released code).

    ``kshot_trans_dim`` is the width inside ``kshot_rw``, which weighs the shots of K > 1; 0 starts it as their mean
    and without a hidden layer. Habits of the released code that may be left out, in training alone: dropout stays
    active in the frozen base learner (``base_dropout``); the final map, made of probabilities, goes into cross-entropy
    as logits (``final_loss``; "as_probabilities": normalised, their negative logarithm); the base map leaves out the
    episode's own class (``training_base_map``). For the other options see :class:`Baseline` and :class:`MetaLearner`.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        base_classes: int,
        shots: int,
        kshot_trans_dim: int = 2,
        head_width: int = 256,
        aspp_dilations: Sequence[int] = (6, 12, 18),
        prior_layer: PriorLayer = "layer4",
        recompute: Recompute = "none",
        cosine: CosineForm = "streaming",
        bn_mode: BNMode = "eval",
        prior_masking: PriorMasking = "twice",
        base_dropout: bool = True,
        final_loss: FinalLoss = "as_logits",
        training_base_map: TrainingBaseMap = "others",
        seed: int = 0,
    ) -> None:
        if base_classes < 1 or shots < 1:
            raise ValueError(f"base_classes is {base_classes} and shots is {shots}, expected at least 1 of each")
        if kshot_trans_dim < 0:
            raise ValueError(f"kshot_trans_dim is {kshot_trans_dim}, expected a width, or 0 for no hidden layer")
        require_choice("final_loss", final_loss, get_args(FinalLoss))
        require_choice("training_base_map", training_base_map, get_args(TrainingBaseMap))
        super().__init__(
            backbone,
            prior_layer=prior_layer,
            recompute=recompute,
            cosine=cosine,
            bn_mode=bn_mode,
            prior_masking=prior_masking,
        )
        self.shots = shots
        self.base_classes = base_classes
        self.base_dropout = base_dropout
        self.final_loss = final_loss
        self.training_base_map = training_base_map
        with seeded_initialisation(seed):
            self.learner_base = nn.Sequential(*base_head(backbone.channels[prior_layer], base_classes))
            self.learner_base.requires_grad_(False)
            self.build_head(head_width, aspp_dilations)
            self.gram_merge = Merge()
            self.cls_merge = Merge()
            if shots > 1:
                self.kshot_rw = _shot_reweighting(shots, kshot_trans_dim)
        self.train(self.training)

    def forward(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        low = self.segment(query_image, support_images, support_labels)
        return resize(low.final, query_image.shape[-2:])

    def outputs(
        self,
        query_image: Tensor,
        support_images: Tensor,
        support_labels: Tensor,
        *,
        categories: Tensor | None = None,
    ) -> BAMOutputs:
        """Of ``forward``'s arguments, the ensemble's map and those of its two learners; ``categories`` as of
        :meth:`segment`."""
        low = self.segment(query_image, support_images, support_labels, categories=categories)
        return BAMOutputs(*(resize(logits, query_image.shape[-2:]) for logits in (low.final, low.meta, low.base)))

    def losses(self, batch: TrainingBatch) -> Losses:
        """main on the final map, aux1 on the meta learner's, aux2 on the base learner's, which is a constant; total is
        their sum. ValueError without ``base_labels`` or ``categories``."""
        if batch.base_labels is None or batch.categories is None:
            missing = "base_labels" if batch.base_labels is None else "categories"
            raise ValueError(f"batch.{missing} is None, but BAM's losses need the labels of the base classes")
        _require_categories(batch.categories, len(batch.query_images), self.base_classes)
        size = batch.query_images.shape[-2:]
        left_out = batch.categories if self.training_base_map == "others" else None
        low = self.segment(batch.query_images, batch.support_images, batch.support_labels, categories=left_out)
        final = resize(low.final, size)
        if self.final_loss == "as_probabilities":
            final = final.clamp_min(EPSILON).log()
        main = segmentation_loss(final, batch.query_labels)
        aux1 = segmentation_loss(resize(low.meta, size), batch.query_labels)
        aux2 = segmentation_loss(resize(low.base, size), batch.base_labels)
        return Losses(main + aux1 + aux2, {"main": main, "aux1": aux1, "aux2": aux2})

    def segment(
        self,
        query_image: Tensor,
        support_images: Tensor,
        support_labels: Tensor,
        *,
        categories: Tensor | None = None,
    ) -> BAMSegmentation:
        """As ``outputs``, before the last resize and with what the decision rests on. With ``categories`` [B] int64
        the base map leaves out the base class at that position (training); without, it holds all (evaluation)."""
        require_episode(query_image, support_images, support_labels, shots=self.shots)
        features = self.query_features(query_image, tap=self._stage_before_copies())
        base = self._base_logits(query_image if features.tapped is None else features.tapped, features)
        query = self.query_middle(features)
        shots = self.support_shots(support_images, support_labels, features)

        # the adjustment factor: how far the supports' style is from the query's
        (support_cosines,) = shots.others
        factors = adjustment_factor(channel_cosines(features.layer2), support_cosines)  # [K, B]
        factors = factors.mT[:, :, None, None]
        weights = self._shot_weights(factors)
        prototype, prior = (
            (weights.transpose(0, 1)[..., None] * per_shot).sum(dim=0) for per_shot in (shots.prototypes, shots.priors)
        )
        meta = self.decide(query, prototype, prior)

        factor = (weights * factors).sum(dim=1, keepdim=True)
        base_map = base_foreground(base, categories)
        background, foreground = meta.softmax(dim=1).split(1, dim=1)
        background, foreground = self.gram_merge(background, factor), self.gram_merge(foreground, factor)
        final = torch.cat([self.cls_merge(background, base_map), foreground], dim=1)
        return BAMSegmentation(final, meta, base, query, prototype, prior, factors, weights, base_map)

    def describe(self, support: Features, mask: Tensor, query_high: Tensor) -> tuple[Tensor, ...]:
        """Adds the supports' channel cosines [N, C, C], of unmasked features."""
        return *super().describe(support, mask, query_high), channel_cosines(support.layer2)

    def prepare_tuning(self, stages: Sequence[str]) -> None:
        """Keep the stages from the first of ``stages`` on as they are now, for the base branch: frozen copies
        ``layer2p`` …, as the authors' code names them."""
        changed = [stage in stages for stage in self.stages]
        if not any(changed):
            return
        for stage in self.stages[changed.index(True) :]:
            if not hasattr(self, f"{stage}p"):
                copied = deepcopy(self.get_submodule(stage)).requires_grad_(False)
                self.add_module(f"{stage}p", copied)
        self.train(self.training)

    def load_base_learner(self, source: Mapping[str, Tensor] | str | Path) -> None:
        """Fill backbone and base learner from a trained PSPNet, see :func:`pspnet.load_base_learner`. ValueError after
        ``prepare_tuning``, when the backbone is no longer that of the base branch."""
        if self._copied_stages():
            raise ValueError(
                "load_base_learner comes before tuning is prepared: the base branch has its copies already"
            )
        view = nn.Module()
        for stage in self.stages:
            view.add_module(stage, self.get_submodule(stage))
        view.ppm, view.cls = self.learner_base
        load_base_learner(view, source)

    def train(self, mode: bool = True) -> "BAM":
        """As MetaLearner's; the copies stay on their running statistics in any case."""
        super().train(mode)
        for stage in self._copied_stages():
            keep_running_statistics(self.get_submodule(f"{stage}p"))
        if not self.base_dropout:
            for module in self.learner_base.modules():
                if isinstance(module, nn.Dropout2d):
                    module.eval()
        return self

    def frozen_modules(self) -> tuple[str, ...]:
        return ("learner_base", *(f"{stage}p" for stage in self._copied_stages()))

    def _copied_stages(self) -> tuple[str, ...]:
        return tuple(stage for stage in self.stages if hasattr(self, f"{stage}p"))

    def _stage_before_copies(self) -> str | None:
        """Where the base branch leaves the query's; None where it does not, or where they share no stage."""
        shared = len(self.stages) - len(self._copied_stages())
        return self.stages[shared - 1] if 0 < shared < len(self.stages) else None

    @torch.no_grad()
    def _base_logits(self, shared: Tensor, query: Features) -> Tensor:
        """``shared`` is what goes into the first copied stage; with no copies the query's high features serve."""
        copies = self._copied_stages()
        features = shared if copies else query.high
        for stage in copies:
            features = self.get_submodule(f"{stage}p")(features)
        return self.learner_base(features)

    def _shot_weights(self, factors: Tensor) -> Tensor:
        """Weights that sum to 1 over the shots (the paper's K-shot setting), from their adjustment factors in ascending
        order; both [B, K, 1, 1]."""
        if self.shots == 1:
            return torch.ones_like(factors)
        ascending, order = factors.sort(dim=1)
        scores = self.kshot_rw(ascending).gather(1, order.argsort(dim=1))
        return scores.softmax(dim=1)


class Merge(nn.Conv2d):
    """Weighted sum of two maps, one of which may be a single value a picture; starts as the first alone. Key
    ``weight`` [1, 2, 1, 1]."""

    def __init__(self) -> None:
        super().__init__(2, 1, 1, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        """[B, 1, h, w] and [B, 1, h, w] or [B, 1, 1, 1] -> [B, 1, h, w]."""
        return self.weight[:, :1] * first + self.weight[:, 1:] * second


def channel_cosines(features: Tensor) -> Tensor:
    """The paper's Gram matrix, normalised as in the authors' code: cosine between channels over positions, [N, C, h,
    w] -> [N, C, C]. A channel of zeros has cosine 0; its gradient, up to 1/eps, ends at the ReLU that made it zero."""
    channels = features.flatten(2)
    # squares summed over thousands of positions do not fit into fp16
    with torch.autocast(features.device.type, enabled=False):
        channels = channels if channels.dtype == torch.float64 else channels.float()
        norms = torch.linalg.vector_norm(channels, dim=2)
        return channels @ channels.mT / (norms[:, :, None] * norms[:, None, :] + EPSILON)


def adjustment_factor(query: Tensor, support: Tensor) -> Tensor:
    """Frobenius distance of channel cosines [..., C, C] over C -> [...]: 0 for pictures that look alike."""
    return torch.linalg.vector_norm(query - support, dim=(-2, -1)) / query.shape[-1]


def base_foreground(base: Tensor, categories: Tensor | None = None) -> Tensor:
    """Base map: base logits [B, N + 1, h, w] -> probability of any base class [B, 1, h, w], but for the one at position
    ``categories`` [B] of each picture."""
    probabilities = base.softmax(dim=1)
    if categories is not None:
        own = (categories + 1).view(-1, 1, 1, 1).expand(-1, 1, *base.shape[-2:])
        probabilities = probabilities.scatter(1, own, 0.0)
    return probabilities[:, 1:].sum(dim=1, keepdim=True)


def predict_generalised(final: Tensor, base: Tensor, *, tau: float = 0.9, rule: GeneralisedRule = "final") -> Tensor:
    """Generalised few-shot segmentation, as the paper extends BAM to it: final [B, 2, S, S], base [B, N + 1, S, S] ->
    labels [B, S, S] int64, 0 background, 1 … N base, N + 1 the episode's class.

    The episode's class is where its softmax exceeds ``tau``; rule "final" puts it above the base learner's classes,
    "base" below them.
    """
    require_choice("rule", rule, get_args(GeneralisedRule))
    is_novel = final.softmax(dim=1)[:, 1] > tau
    label = base.max(dim=1).indices  # the argmax, two to five times as fast as torch.argmax over a leading dimension
    if rule == "base":
        is_novel = is_novel & (label == 0)
    return label.masked_fill(is_novel, base.shape[1])


def _require_categories(categories: Tensor, batch: int, base_classes: int) -> None:
    if list(categories.shape) != [batch] or categories.dtype != torch.int64:
        raise ValueError(f"categories is {categories.dtype} {list(categories.shape)}, expected torch.int64 [{batch}]")
    lowest, highest = (int(value) for value in torch.aminmax(categories))
    if lowest < 0 or highest >= base_classes:
        raise ValueError(
            f"categories holds {lowest} to {highest}, expected positions among {base_classes} base classes"
        )


def _shot_reweighting(shots: int, hidden: int) -> nn.Module:
    if hidden:
        return nn.Sequential(nn.Conv2d(shots, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, shots, 1))
    mean = nn.Conv2d(shots, shots, 1, bias=False)
    nn.init.constant_(mean.weight, 1.0 / shots)
    return mean
