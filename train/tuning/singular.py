"""Singular value fine-tuning (SVF paper, section 3.2): W = U S Vᵀ by stage (table 8), any of the three subspaces (table
7), with BatchNorm (table 4), and as S = S_frozen · S_trainable (section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import svf_fast
from svf_fast.train.methods import MetaLearner
from svf_fast.train.tuning.base import StageStrategy, require_subset
from svf_fast.train.tuning.lean import keep_less
from svf_fast.train.tuning.norms import batch_norms

Save = Literal["exact", "int8", "recompute"]
Subspace = Literal["U", "S", "V"]
Parametrization = Literal["direct", "scale"]


@dataclass(frozen=True)
class SVF(StageStrategy):
    """Singular value fine-tuning of ``stages``; ``save`` and ``parametrization`` as in :func:`svf_fast.convert`.

    ``subspaces`` other than S alone, and ``batch_norm``, are the paper's ablations; where U or V trains, the layers run
    and keep for backward as in its Algorithm 1.
    """

    subspaces: tuple[Subspace, ...] = ("S",)
    parametrization: Parametrization = "direct"
    batch_norm: bool = False
    save: Save = "exact"

    name = "svf"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_subset("subspaces", self.subspaces, get_args(Subspace))
        if self.parametrization == "scale" and "S" not in self.subspaces:
            raise ValueError(f"parametrization is 'scale', but subspaces is {self.subspaces!r}: expected S among them")
        if self.save != "exact" and self.subspaces != ("S",):
            raise ValueError(f"save is {self.save!r}, but subspaces is {self.subspaces!r}: expected S alone")

    @property
    def trains(self) -> str:
        if self.subspaces != ("S",):
            values = f"{' and '.join(self.subspaces)} of U S Vᵀ in {self.layers}"
        elif self.parametrization == "scale":
            values = f"S_trainable of S = S_frozen · S_trainable in {self.layers}"
        else:
            values = f"the singular values of {self.layers}"
        return f"{values} and the BatchNorm weights and biases there" if self.batch_norm else values

    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        # a BatchNorm that trains cannot be part of the fused op, which knows it as constants
        svf_fast.convert(
            method, list(stages), save=self.save, fuse=not self.batch_norm, parametrization=self.parametrization
        )
        for layer in converted_layers(method):
            layer.u.requires_grad_("U" in self.subspaces)
            layer.s.requires_grad_("S" in self.subspaces)
            layer.v.requires_grad_("V" in self.subspaces)
        if self.batch_norm:
            for norm in batch_norms(method, stages):
                norm.requires_grad_(True)
            for stage in stages:
                keep_less(method.get_submodule(stage))


def converted_layers(method: MetaLearner) -> list[svf_fast.SVFConv2d]:
    """The layers that ``svf_fast.convert`` made, in the model's order."""
    return [module for module in method.modules() if isinstance(module, svf_fast.SVFConv2d)]
