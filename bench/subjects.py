"""What is measured: the trunk (layers 2-4 of ResNet-50) in each form that can be trained, and who its peers are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import svf_fast
from svf_fast import reference
from svf_fast.train.backbones import Backbone, BackboneConfig, build_backbone

STAGES = ("layer2", "layer3", "layer4")


class Trunk(nn.Module):
    """Layers 2-4 with or without their graph rebuilt stage by stage in backward."""

    def __init__(self, backbone: Backbone, *, is_checkpointed: bool = False) -> None:
        super().__init__()
        for stage in STAGES:
            self.add_module(stage, backbone.stage(stage))
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Layer-1 features [N, 256, h, w] → the maps of layers 2, 3 and 4."""
        outputs = []
        for stage in STAGES:
            module = self.get_submodule(stage)
            x = checkpoint(module, x, use_reentrant=False) if self.is_checkpointed else module(x)
            outputs.append(x)
        return tuple(outputs)


class Form(NamedTuple):
    """One way to run the trunk."""

    label: str
    # turns a plain trunk, in place, into this form
    prepare: Callable[[Trunk], nn.Module]


def _algorithm_1(trunk: Trunk) -> nn.Module:
    return reference.convert_naive(trunk, STAGES)


def _full(trunk: Trunk) -> nn.Module:
    return trunk.requires_grad_(True).eval()


def _convolutions(trunk: Trunk) -> nn.Module:
    trunk.requires_grad_(False)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(True)
    return trunk.eval()


def _frozen(trunk: Trunk) -> nn.Module:
    return trunk.requires_grad_(False).eval()


def _ours(save: str, *, is_checkpointed: bool = False) -> Callable[[Trunk], nn.Module]:
    def prepare(trunk: Trunk) -> nn.Module:
        trunk.is_checkpointed = is_checkpointed
        return svf_fast.convert(trunk, save=save)

    return prepare


FORMS = {
    "algorithm 1": Form("Algorithm 1, three modules", _algorithm_1),
    "full": Form("full fine-tuning", _full),
    "convolutions": Form("full fine-tuning of the convolutions only", _convolutions),
    "frozen": Form("frozen", _frozen),
    "exact": Form('svf_fast, save="exact"', _ours("exact")),
    "int8": Form('svf_fast, save="int8"', _ours("int8")),
    "recompute": Form('svf_fast, save="recompute" (blocks)', _ours("recompute")),
    "stages": Form('svf_fast, save="recompute", stages checkpointed', _ours("recompute", is_checkpointed=True)),
}


def build_backbone_with_statistics(config: BackboneConfig, seed: int) -> Backbone:
    """A backbone with random weights and BatchNorm statistics that are not the identity's, in eval mode."""
    backbone = build_backbone(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, low in (("weight", 0.5), ("running_var", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
                    tensor = getattr(module, name)
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return backbone


def build_trunk(form: str, backbone: Backbone) -> nn.Module:
    """The trunk of a copy of `backbone` in the form of that name (a key of FORMS)."""
    return FORMS[form].prepare(Trunk(copy.deepcopy(backbone)))
