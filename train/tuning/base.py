"""What every tuning strategy does: freeze the backbone, make trainable what the strategy says, name the optimiser's
groups. Knows the library's public names and a method's stages; no head by name, no data and no optimiser."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict

from torch import nn

import svf_fast
from svf_fast.train.methods import MetaLearner
from svf_fast.train.tuning.lean import keep_less, keep_less_of_pools

StageName = Literal["layer0", "layer1", "layer2", "layer3", "layer4"]
ALL_STAGES: tuple[StageName, ...] = ("layer0", "layer1", "layer2", "layer3", "layer4")
# stem and layer 1 stay frozen in the paper's setting (section 4.1)
TUNED_STAGES: tuple[StageName, ...] = ("layer2", "layer3", "layer4")


class ParameterGroup(TypedDict):
    """An optimiser's group: its rate is the run's times ``lr_scale``."""

    name: str
    params: list[nn.Parameter]
    lr_scale: float


@dataclass(frozen=True)
class Strategy(ABC):
    """Trains the whole head, and of the backbone what a subclass says."""

    name: ClassVar[str]
    # whether BatchNorm may go on moving its running statistics (the method's bn_mode="train")
    takes_moving_statistics: ClassVar[bool] = False

    @property
    @abstractmethod
    def trains(self) -> str:
        """For reports: what of the backbone trains."""

    @abstractmethod
    def tuned_stages(self, method: MetaLearner) -> list[str]:
        """Names of the stages whose function changes, first to last."""

    @abstractmethod
    def apply_to_backbone(self, method: MetaLearner, stages: Sequence[str]) -> None:
        """Make trainable what is to train in ``stages``; every backbone parameter arrives frozen."""

    def singular_values(self, method: MetaLearner) -> Iterable[nn.Parameter]:
        """Parameters that have the singular values' rate: S, and factors in their place."""
        return svf_fast.singular_values(method).values()

    def apply(self, method: MetaLearner) -> None:
        """Make exactly the right parameters trainable, converting modules in place where the strategy needs it. One
        strategy a method; load backbone weights before, build optimisers after. ValueError where the strategy does not
        fit the method or another one is applied already, before anything is changed, and where a weight is not finite
        (then the method is of no more use)."""
        if method.tuned_by is not None:
            raise ValueError(
                f"tuning strategy {method.tuned_by!r} is applied already, expected an untuned method for {self.name!r}"
            )
        if method.bn_mode == "train" and not self.takes_moving_statistics:
            raise ValueError(
                f"bn_mode is 'train', expected 'eval': tuning strategy {self.name!r} keeps BatchNorm on its running statistics"
            )
        stages = self.tuned_stages(method)
        method.tuned_by = self.name
        method.prepare_tuning(stages)
        for stage in method.stages:
            method.get_submodule(stage).requires_grad_(False)
        if stages:
            self.apply_to_backbone(method, stages)
            if method.bn_mode == "eval":
                _keep_less_from(stages[0], method)
        for _, parameter in method.head_parameters():
            parameter.requires_grad_(True)
        method.train(method.training)

    def parameter_groups(
        self, method: MetaLearner, *, backbone_lr_scale: float, svf_lr_scale: float
    ) -> list[ParameterGroup]:
        """Groups "head" (scale 1) and, where anything there trains, "backbone" (weights, biases, U, V, BatchNorm,
        adapters: ``backbone_lr_scale``) and "singular_values" (S and S': ``svf_lr_scale``). Call after ``apply``."""
        head = dict(method.head_parameters())
        singular_values = {id(parameter) for parameter in self.singular_values(method)}
        groups = [
            ParameterGroup(name="head", params=[], lr_scale=1.0),
            ParameterGroup(name="backbone", params=[], lr_scale=backbone_lr_scale),
            ParameterGroup(name="singular_values", params=[], lr_scale=svf_lr_scale),
        ]
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                group = 0 if name in head else 2 if id(parameter) in singular_values else 1
                groups[group]["params"].append(parameter)
        return [group for group in groups if group["params"] or group["name"] == "head"]


@dataclass(frozen=True)
class StageStrategy(Strategy):
    """A strategy for some of the backbone's stages; those that the backbone does not have are left out."""

    stages: tuple[StageName, ...] = TUNED_STAGES

    def __post_init__(self) -> None:
        require_subset("stages", self.stages, ALL_STAGES)

    @property
    def layers(self) -> str:
        """The stages in words: "layers 2-4", "layers 1 and 3", "layer 4"."""
        numbers = sorted(int(stage.removeprefix("layer")) for stage in self.stages)
        if len(numbers) == 1:
            return f"layer {numbers[0]}"
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"layers {numbers[0]}-{numbers[-1]}"
        return f"layers {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"

    def tuned_stages(self, method: MetaLearner) -> list[str]:
        present = [stage for stage in method.stages if stage in self.stages]
        if not present:
            raise ValueError(f"stages is {self.stages!r}, but the method's backbone ends with {method.stages[-1]}")
        return present


def convolutions(method: MetaLearner, stages: Sequence[str]) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions of some stages by their full names, in the model's order."""
    for stage in stages:
        for name, module in method.get_submodule(stage).named_modules(prefix=stage):
            if isinstance(module, nn.Conv2d):
                yield name, module


def require_subset(name: str, found: tuple[str, ...], known: tuple[str, ...]) -> None:
    """ValueError unless ``found`` holds one or more of ``known``, each once."""
    if not found or not set(found) <= set(known) or len(set(found)) < len(found):
        raise ValueError(f"{name} is {found!r}, expected one or more of {', '.join(known)}, each once")


def _keep_less_from(first: str, method: MetaLearner) -> None:
    """A gradient passes every stage from the first tuned one on. Converted ones keep less already."""
    for stage in method.stages[method.stages.index(first) :]:
        module = method.get_submodule(stage)
        if svf_fast.singular_values(module):
            keep_less_of_pools(module)
        else:
            keep_less(module)
