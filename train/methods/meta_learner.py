"""What the baseline, PFENet and BAM have in common: an episode's pictures go through the backbone, and each support
comes out as a prototype and a prior mask (PFENet, section 3). Knows no head and no tuning strategy: which stages keep
a graph follows from which parameters are trainable."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.dropout import Dropout2d
from svf_fast.train.methods.layers import ConcatConvReLU, masked_average, resize, support_mask
from svf_fast.train.methods.losses import Losses, TrainingBatch
from svf_fast.train.methods.prior import CosineForm, prior_mask

PriorLayer = Literal["layer4", "layer3"]
Recompute = Literal["none", "supports", "stages"]
BNMode = Literal["eval", "train"]
PriorMasking = Literal["twice", "once"]


class Features(NamedTuple):
    """Of N pictures: ``layer3`` and ``layer2`` at layer 3's size (together the "middle" features), ``high`` for the
    prior, and the output of one more stage where it was asked for."""

    layer3: Tensor
    layer2: Tensor
    high: Tensor
    tapped: Tensor | None = None


class Shots(NamedTuple):
    """What K supports say about B queries: prototypes [K, B, width, 1, 1], priors [K, B, 1, h, w], and what else a
    method asks of them, [K, B, ...] each."""

    prototypes: Tensor
    priors: Tensor
    others: tuple[Tensor, ...] = ()


class MetaLearner(nn.Module, ABC):
    """Backbone stages (registered as ``layer0`` …, the published keys); a subclass adds ``down_query``, ``down_supp``
    and what decides.

    ``prior_layer="layer3"`` is for backbones without a layer 4 (a layer 4 that is there is left out of the model): the
    prior then compares the layer-3 features of the query with those of the support times its mask.

    ``recompute`` trades time for memory, with the same results up to rounding: ``"supports"`` keeps of a support only
    its picture and mask and rebuilds its branch in backward, one shot of the batch after the other; ``"stages"`` also
    rebuilds each of the query's stages from its input.

    ``bn_mode="eval"`` keeps every BatchNorm on its running statistics for good; ``"train"`` lets it follow
    ``train()``, as PFENet's own repository does: statistics of the batch, first of the queries, then of each shot,
    and running statistics that move.

    ``prior_masking="twice"`` masks a support's high features although layer 4 has seen masked features already, as
    the released code does; ``"once"`` leaves that out.
    """

    down_query: ConcatConvReLU
    down_supp: ConcatConvReLU

    def __init__(
        self,
        backbone: Backbone,
        *,
        prior_layer: PriorLayer,
        recompute: Recompute,
        cosine: CosineForm,
        bn_mode: BNMode,
        prior_masking: PriorMasking,
    ) -> None:
        super().__init__()
        require_choice("prior_layer", prior_layer, get_args(PriorLayer))
        require_choice("recompute", recompute, get_args(Recompute))
        require_choice("cosine", cosine, get_args(CosineForm))
        require_choice("bn_mode", bn_mode, get_args(BNMode))
        require_choice("prior_masking", prior_masking, get_args(PriorMasking))
        if prior_layer not in backbone.channels:
            raise ValueError(f"prior_layer is {prior_layer!r}, but the backbone ends with layer{backbone.depth}")
        if bn_mode == "train" and recompute != "none":
            raise ValueError(
                f"recompute is {recompute!r} with bn_mode='train', expected 'none': what is rebuilt in backward would "
                "move the running statistics twice"
            )
        self.stages = tuple(stage for stage in backbone.channels if stage <= prior_layer)
        for stage in self.stages:
            self.add_module(stage, backbone.stage(stage))
        self.middle_channels = backbone.channels["layer3"] + backbone.channels["layer2"]
        self.recompute = recompute
        self.cosine = cosine
        self.bn_mode = bn_mode
        self.prior_masking = prior_masking
        self.middle_dropout = Dropout2d(0.5, inplace=True)
        # name of the tuning strategy that has been applied
        self.tuned_by: str | None = None

    @abstractmethod
    def forward(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """query_image [B, 3, S, S], support_images [B, K, 3, S, S], support_labels [B, K, S, S] int64 (1 the episode's
        class) -> logits [B, 2, S, S]: background, the episode's class. ValueError where the supports do not fit the
        queries."""

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> Losses:
        """The method's training losses, of the images at their full size."""

    def prepare_tuning(self, stages: Sequence[str]) -> None:
        """A tuning strategy calls this before it changes anything, with the stages whose function will change."""

    def train(self, mode: bool = True) -> "MetaLearner":
        """As nn.Module's, but BatchNorm stays on its running statistics unless ``bn_mode`` is "train"."""
        super().train(mode)
        if self.bn_mode == "eval":
            keep_running_statistics(self)
        return self

    def frozen_modules(self) -> tuple[str, ...]:
        """Names of modules beside the backbone that no strategy may train."""
        return ()

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that every strategy trains: those outside the backbone and outside what is frozen."""
        others = tuple(f"{module}." for module in (*self.stages, *self.frozen_modules()))
        return ((name, parameter) for name, parameter in self.named_parameters() if not name.startswith(others))

    def query_features(self, image: Tensor, *, tap: str | None = None) -> Features:
        """[B, 3, S, S] -> features, and the output of the stage ``tap``."""
        return self._features(image, mask=None, recompute_stages=self.recompute == "stages", tap=tap)

    def query_middle(self, query: Features) -> Tensor:
        """[B, width, h, w]."""
        # Dropout2d's factors are not negative: before the ReLU it is the same function, and one map less is kept
        return self.down_query(query.layer3, query.layer2, before_relu=self.middle_dropout)

    def support_shots(self, images: Tensor, labels: Tensor, query: Features) -> Shots:
        """images [B, K, 3, S, S], labels [B, K, S, S] (1 the episode's class) -> a prototype and a prior for each
        shot.

        All supports of the batch are one batch for the backbone, unless they are recomputed or their statistics are
        BatchNorm's.
        """
        images = images.transpose(0, 1)  # [K, B, 3, S, S]: a shot's results lie together
        masks = support_mask(labels.transpose(0, 1), images.dtype)  # [K, B, 1, S, S]
        rebuild = self.recompute != "none" and torch.is_grad_enabled()
        if rebuild or (self.bn_mode == "train" and self.training):
            shots = [
                checkpoint(self._shots, *shot, query.high, use_reentrant=False)
                if rebuild
                else self._shots(*shot, query.high)
                for shot in zip(images.split(1), masks.split(1), strict=True)
            ]
            prototypes, priors, *others = (torch.cat(per_shot) for per_shot in zip(*shots, strict=True))
        else:
            prototypes, priors, *others = self._shots(images, masks, query.high)
        # Dropout2d drops whole channels, so dropping them before or after the pooling is the same function; after it,
        # the draw is one for all supports whichever way they were computed, and outside anything that is recomputed
        dropped = self.middle_dropout(prototypes.flatten(0, 1), len(prototypes)).view_as(prototypes)
        return Shots(dropped, priors, tuple(others))

    def describe(self, support: Features, mask: Tensor, query_high: Tensor) -> tuple[Tensor, ...]:
        """N = K·B supports, a shot's lying together, with masks [N, 1, S, S], and the B queries' high features ->
        prototypes (before dropout) [N, width, 1, 1], priors [N, 1, h, w], and what a subclass adds, [N, ...]."""
        middle = self.down_supp(support.layer3, support.layer2)  # of the unmasked features
        prototypes = masked_average(middle, resize(mask, middle.shape[-2:]))
        high_mask = resize(mask, support.high.shape[-2:])
        if self.prior_masking == "once" and "layer4" in self.stages:
            high_mask = torch.ones_like(high_mask)
        batch = query_high.shape[0]
        priors = [
            resize(prior_mask(query_high, high, shot_mask, cosine=self.cosine), middle.shape[-2:])
            for high, shot_mask in zip(support.high.split(batch), high_mask.split(batch), strict=True)
        ]
        return prototypes, torch.cat(priors)

    def _shots(self, images: Tensor, masks: Tensor, query_high: Tensor) -> tuple[Tensor, ...]:
        """images [K, B, 3, S, S], masks [K, B, 1, S, S] -> what ``describe`` says, [K, B, ...] each."""
        mask = masks.flatten(0, 1)
        support = self._features(images.flatten(0, 1), mask=mask, recompute_stages=False)
        return tuple(each.unflatten(0, images.shape[:2]) for each in self.describe(support, mask, query_high))

    def _features(
        self, image: Tensor, *, mask: Tensor | None, recompute_stages: bool, tap: str | None = None
    ) -> Features:
        """image [N, 3, S, S]; with a mask [N, 1, S, S], layer 4 sees layer 3's features times the mask."""

        def run(stage: str, features: Tensor) -> Tensor:
            module = self.get_submodule(stage)
            needs_graph = features.requires_grad or any(p.requires_grad for p in module.parameters())
            if recompute_stages and needs_graph and torch.is_grad_enabled():
                output = checkpoint(module, features, use_reentrant=False)
            else:
                output = module(features)
            if stage == tap:
                tapped.append(output)
            return output

        tapped: list[Tensor] = []
        layer2 = run("layer2", run("layer1", run("layer0", image)))
        layer3 = run("layer3", layer2)
        high = layer3
        if "layer4" in self.stages:
            high = run("layer4", layer3 if mask is None else layer3 * resize(mask, layer3.shape[-2:]))
        return Features(layer3, resize(layer2, layer3.shape[-2:]), high, tapped[0] if tapped else None)


def keep_running_statistics(module: nn.Module) -> None:
    """Every BatchNorm in ``module`` into eval mode."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def require_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"head_width is {width}, expected 1 or more channels")


def require_episode(query: Tensor, images: Tensor, labels: Tensor, *, shots: int | None = None) -> None:
    """ValueError unless query [B, 3, H, W] are pictures and these their supports, ``shots`` each where that is given."""
    if query.dim() != 4 or query.shape[1] != 3:
        raise ValueError(f"query_image is {list(query.shape)}, expected [B, 3, S, S]")
    batch, _, *size = query.shape
    if images.dim() != 5 or list(images.shape) != [batch, images.shape[1], 3, *size] or images.shape[1] == 0:
        sides = ", ".join(map(str, size))
        raise ValueError(
            f"support_images is {list(images.shape)}, expected [{batch}, K, 3, {sides}] with at least one shot"
        )
    if shots is not None and images.shape[1] != shots:
        raise ValueError(f"support_images has {images.shape[1]} shots, expected {shots}")
    expected = [*images.shape[:2], *size]
    if list(labels.shape) != expected:
        raise ValueError(f"support_labels is {list(labels.shape)}, expected {expected} to match support_images")
