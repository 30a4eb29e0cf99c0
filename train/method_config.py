"""What a configuration says of the method, few-shot or base learner. Which options a method has is known here; what they do
is the method's business."""

from dataclasses import dataclass
from typing import Literal

from svf_fast.train.methods.bam import FinalLoss, TrainingBaseMap
from svf_fast.train.methods.baseline import ShotReduction
from svf_fast.train.methods.meta_learner import BNMode, PriorLayer, PriorMasking, Recompute
from svf_fast.train.methods.pfenet import BINS_IN_WORDS, is_bin
from svf_fast.train.schema import require

BASE_LEARNER = "pspnet"  # the one method.name of a base learner

BackboneInit = Literal["imagenet", "base_learner"]
METHODS_WITH_OPTION = {
    "backbone_init": ("baseline", "pfenet"),
    "shot_reduction": ("baseline",),
    "train_down_query": ("baseline",),
    "bins": ("pfenet",),
    "kshot_trans_dim": ("bam",),
    "base_dropout": ("bam",),
    "final_loss": ("bam",),
    "training_base_map": ("bam",),
}
# of these, the ones that a method's constructor takes as they are
METHOD_OPTIONS = tuple(name for name in METHODS_WITH_OPTION if name != "backbone_init")


@dataclass(frozen=True)
class MethodConfig:
    """The few-shot method on top of the backbone. Options below ``base_learner`` belong to some methods only; null is
    the method's own default."""

    name: Literal["baseline", "pfenet", "bam"] = "baseline"
    head_width: int = 256  # channels
    prior_layer: PriorLayer = "layer4"
    recompute: Recompute = "none"
    bn_mode: BNMode = "eval"  # train: batch statistics in the backbone, as in PFENet's own repository
    prior_masking: PriorMasking = "twice"  # once: layer 4's output is not masked again
    base_learner: str | None = None  # checkpoint of svf-fast train-base, or of BAM's code
    backbone_init: BackboneInit | None = None  # baseline, pfenet; bam's backbone is always the base learner's
    shot_reduction: ShotReduction | None = None  # baseline: the released code sums, the default is the mean
    train_down_query: bool | None = None  # baseline: the released code's optimiser leaves it out
    bins: tuple[float, ...] | None = None  # pfenet: sides of its pyramid, or up to 1 shares of the map's side
    kshot_trans_dim: int | None = None  # bam: hidden width of the shots' weighting, 0 weighs them alike at first
    base_dropout: bool | None = None  # bam: whether dropout stays active in the frozen base learner (yes)
    final_loss: FinalLoss | None = None  # bam: what the final map is to cross-entropy (logits)
    training_base_map: TrainingBaseMap | None = None  # bam: base classes that it shows in training (the others)

    def __post_init__(self) -> None:
        require(self, "head_width", self.head_width > 0, "1 or more")
        for option, methods in METHODS_WITH_OPTION.items():
            if getattr(self, option) is not None and self.name not in methods:
                raise ValueError(
                    f"{option} is {getattr(self, option)!r}, but name is {self.name!r}: "
                    f"only {' and '.join(methods)} {'have' if len(methods) > 1 else 'has'} it"
                )
        require(
            self,
            "bins",
            self.bins is None or (len(self.bins) > 0 and all(map(is_bin, self.bins))),
            BINS_IN_WORDS,
        )
        require(
            self, "kshot_trans_dim", self.kshot_trans_dim is None or self.kshot_trans_dim >= 0, "0 or more, or null"
        )
        if self.bn_mode == "train" and self.recompute != "none":
            raise ValueError(
                f"recompute is {self.recompute!r} with bn_mode 'train': what is rebuilt would move the running "
                "statistics twice, use recompute=none"
            )
        if self.backbone_init == "base_learner" and self.base_learner is None:
            raise ValueError("base_learner is not set, but backbone_init is 'base_learner': give its checkpoint")
        if self.base_learner is not None and not self.takes_base_learner:
            raise ValueError(
                f"base_learner is set, but {self.name} starts from backbone.weights: add backbone_init=base_learner"
            )

    @property
    def takes_base_learner(self) -> bool:
        """Whether the backbone's weights come from ``base_learner``."""
        return self.name == "bam" or self.backbone_init == "base_learner"


@dataclass(frozen=True)
class BaseLearnerConfig:
    """The base learner of BAM. The one value of ``name`` tells its configurations from those of few-shot methods."""

    name: Literal["pspnet"]
