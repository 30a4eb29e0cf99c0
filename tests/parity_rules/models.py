"""The models that golden files describe, built from the files' own settings: which class, which inputs, and under which
names of the specification (section 10.3) their results stand."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from parity_rules.account import Golden
from parity_rules.filling import filled_state
from parity_rules.inputs import Episodes, make_episodes
from svf_fast.train.backbones import STAGES, Backbone, BackboneConfig, build_backbone
from svf_fast.train.methods import Losses, PSPNet, build_method
from svf_fast.train.tuning import build_strategy

TrainingMode = Literal["fixbn", "bntrain"]

ARCHITECTURES = {"resnet50": "resnet", "vgg16": "vgg16"}
# of the variant out_ratio_bins: VGG's map is too small for an eighth at the golden data's sizes
RATIO_BINS = {"resnet50": (1.0, 0.5, 0.25, 0.125), "vgg16": (1.0, 0.6, 0.4, 0.2)}


@dataclass
class Model(ABC):
    """Of one golden file: builds the model, filled, in the memory format given, as often as is asked."""

    golden: Golden
    memory_format: torch.memory_format
    _filled: dict[str, Tensor] = field(default_factory=dict, init=False)

    @abstractmethod
    def construct(self, backbone: Backbone, **options: Any) -> nn.Module:
        """The model with whatever weights."""

    @abstractmethod
    def outputs(self, module: nn.Module) -> dict[str, Tensor]:
        """Results and intermediates of a module in eval mode, by the specification's names."""

    @abstractmethod
    def for_training(self, mode: TrainingMode) -> nn.Module:
        """As the method trains it without tuning of the backbone, but for dropout: BatchNorm in eval mode ("fixbn") or
        in train mode ("bntrain")."""

    @abstractmethod
    def losses(self, module: nn.Module) -> Losses:
        """Of the file's batch."""

    @cached_property
    def episodes(self) -> Episodes:
        settings = self.golden.settings
        return make_episodes(
            settings["size"], settings["batch"], settings["shot"] or 0, settings["n_base"], settings["input_seed"]
        )

    def with_aliases(self, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
        """The shapes of our state dict with those entries that the reference's has twice."""
        return shapes

    def build(self, *, dilation: str = "uniform", **options: Any) -> nn.Module:
        """In eval mode, as ``train/assembly.py`` builds it."""
        settings = self.golden.settings
        backbone = build_backbone(BackboneConfig(ARCHITECTURES[settings["backbone"]], dilation=dilation))
        module = self.construct(backbone, **options).to(memory_format=self.memory_format)
        if not self._filled:
            self._filled = filled_state(module, settings["param_seed"])
        module.load_state_dict(self._filled)
        return module.eval()

    def variants(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Outputs of the same weights under other options: name -> which output, and what ``build`` takes."""
        return {}


class FewShotModel(Model):
    """Baseline, PFENet or BAM."""

    def construct(self, backbone: Backbone, **options: Any) -> nn.Module:
        return build_method(self.golden.settings["model"], backbone, **options)

    def outputs(self, module: nn.Module) -> dict[str, Tensor]:
        low = module.segment(*self._inputs)
        return {"query_feat": low.query, "prior": low.prior, "proto": low.prototype, **self.decisions(module, low)}

    def decisions(self, module: nn.Module, low: Any) -> dict[str, Tensor]:
        """What a method gives beyond the common intermediates."""
        return {"out": module(*self._inputs), "out_low": low.logits}

    def for_training(self, mode: TrainingMode) -> nn.Module:
        return self.tuned("freeze", bn_mode="train" if mode == "bntrain" else "eval")

    def tuned(self, strategy: str, **options: Any) -> nn.Module:
        """With that tuning strategy applied, in train mode but for dropout."""
        module = self.build(**options)
        build_strategy(strategy).apply(module)
        return to_training_without_dropout(module)

    def losses(self, module: nn.Module) -> Losses:
        return module.losses(self.episodes)

    @property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        episodes = self.episodes
        return episodes.query_images, episodes.support_images, episodes.support_labels


class BaselineModel(FewShotModel):
    def variants(self) -> dict[str, tuple[str, dict[str, Any]]]:
        return {"out_tv_dilation": ("out", {"dilation": "torchvision"})}


class PFENetModel(FewShotModel):
    def decisions(self, module: nn.Module, low: Any) -> dict[str, Tensor]:
        inner = {f"inner_low/{number}": logits for number, logits in enumerate(low.inner)}
        return {**super().decisions(module, low), **inner}

    def variants(self) -> dict[str, tuple[str, dict[str, Any]]]:
        return {"out_ratio_bins": ("out", {"bins": RATIO_BINS[self.golden.settings["backbone"]]})}


class BAMModel(FewShotModel):
    def construct(self, backbone: Backbone, **options: Any) -> nn.Module:
        settings = self.golden.settings
        return super().construct(backbone, base_classes=settings["n_base"], shots=settings["shot"], **options)

    def decisions(self, module: nn.Module, low: Any) -> dict[str, Tensor]:
        outputs = module.outputs(*self._inputs)
        return {
            "final_out": outputs.final,
            "meta_out": outputs.meta,
            "base_out_first": outputs.base[:1],
            "final_low": low.final,
            "meta_low": low.meta,
            "base_low": low.base,
            "est_val_total": low.factors,
            "weight_soft": low.weights,
            "base_map": low.base_map,
        }


class BaseLearner(Model):
    """PSPNet: one picture, all of it trained."""

    def construct(self, backbone: Backbone) -> nn.Module:
        return PSPNet(backbone, classes=self.golden.settings["n_base"])

    def with_aliases(self, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
        # the reference registers the backbone a second time, between its stages and its own head
        backbone = {key: shape for key, shape in shapes.items() if key.partition(".")[0] in STAGES}
        encoder = {f"encoder.{key.removeprefix('layer')}": shape for key, shape in backbone.items()}
        return {**backbone, **encoder, **shapes}

    def outputs(self, module: nn.Module) -> dict[str, Tensor]:
        images = self.episodes.query_images
        return {"out": module(images), "out_low": module.segment(images)}

    def for_training(self, mode: TrainingMode) -> nn.Module:
        module = to_training_without_dropout(self.build())
        if mode == "fixbn":  # which its own training knows not
            for child in module.modules():
                if isinstance(child, _BatchNorm):
                    child.eval()
        return module

    def losses(self, module: nn.Module) -> Losses:
        return module.losses(self.episodes.query_images, self.episodes.base_labels)


def to_training_without_dropout(module: nn.Module) -> nn.Module:
    module.train()
    for child in module.modules():
        if isinstance(child, _DropoutNd):
            child.eval()
    return module


MODELS: dict[str, type[Model]] = {
    "baseline": BaselineModel,
    "pfenet": PFENetModel,
    "bam": BAMModel,
    "pspnet": BaseLearner,
}
