"""BAM's first stage (Lang et al. 2022, section 4.1): a base learner on whole pictures under base labels, as the engine's task;
and how its result is found again. Knows no episode."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from svf_fast.train.backbones import BackboneConfig
from svf_fast.train.backbones.weights import read_state, require_finite
from svf_fast.train.batches import SampleKey, in_batches, load_ahead
from svf_fast.train.checkpoint import CheckpointError, load_checkpoint
from svf_fast.train.config import BASE_LEARNER, BaseConfig, ConfigError, config_from_plain
from svf_fast.train.data.base_labels import BaseBatch, BasePictures, stack
from svf_fast.train.data.folds import Fold, fold_of
from svf_fast.train.distributed import ALONE, Processes
from svf_fast.train.label_metrics import BaseMetrics
from svf_fast.train.methods import Losses, PSPNet
from svf_fast.train.tasks import Judgement, Watch, count_scored
from svf_fast.train.validation import evaluating


@dataclass(frozen=True)
class BaseTask:
    """Segmentation of the base classes, judged on every validation picture once, at the input's size; ``batch``
    pictures at a time. ``class_names`` are those of the base classes, in the order of their labels."""

    training: BasePictures
    validation: BasePictures
    class_names: tuple[str, ...]
    batch: int

    @property
    def judged(self) -> int:
        return len(self.validation)

    def load(self, keys: Iterable[tuple[SampleKey, ...]], workers: int) -> Generator[BaseBatch, None, None]:
        return load_ahead(self.training.picture, stack, keys, workers=workers)

    def losses(self, method: PSPNet, batch: BaseBatch) -> Losses:
        return method.losses(batch.images, batch.labels)

    def scored_pixels(self, batch: BaseBatch) -> int:
        return count_scored(batch.labels)

    def judge(
        self, method: PSPNet, *, workers: int, device: torch.device, watch: Watch, processes: Processes = ALONE
    ) -> Judgement:
        """mIoU over all base classes, background left out; the method comes back in the mode it was in."""
        metrics = BaseMetrics(len(self.class_names))
        keys = in_batches([(0, index) for index in range(self.judged)], self.batch)
        loading = load_ahead(self.validation.picture, stack, processes.share(keys), workers=workers)
        with evaluating(method), closing(loading) as batches:
            for number, batch in enumerate(batches, start=1):
                # the argmax, two to five times as fast as torch.argmax over a leading dimension
                metrics.update(method(batch.images.to(device)).max(dim=1).indices, batch.labels)
                if number <= processes.rounds(keys):
                    watch(min(number * processes.size * self.batch, self.judged), self.judged)
        metrics.counts.sum_over(processes.total)
        return Judgement(
            metrics.miou,
            {
                "miou": metrics.miou,
                "class_iou": dict(zip(self.class_names, metrics.class_iou, strict=True)),
                "pictures": self.judged,
            },
            f"validation mIoU over {len(self.class_names)} base classes {metrics.miou:.4f}",
        )


def base_learner_state(path: str | Path, fold: Fold, backbone: BackboneConfig) -> dict[str, Tensor]:
    """The tensors of a base learner: from a checkpoint of ``svf-fast train-base``, or from a weight file of BAM's code.

    FileNotFoundError when there is none; ValueError when the file is neither, or was trained on another fold's base
    classes or another ``backbone``, as far as it tells.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_state(path)
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError:
        return read_state(path)
    try:
        name = checkpoint.config["method"]["name"]
        if name != BASE_LEARNER:
            raise CheckpointError(f"{path} is a checkpoint of the method {name!r}, expected one of svf-fast train-base")
        trained = config_from_plain(checkpoint.config, schema=BaseConfig)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds settings that this version does not know") from error
    # files of older versions do not hold their classes, but know the four folds of Pascal-5i only
    known = checkpoint.state.base or fold_of(trained.data.folds, trained.data.fold).base
    if known != fold.base:
        raise CheckpointError(
            f"{path} is a base learner of the classes {list(known)}, expected one of {list(fold.base)}: data.folds and "
            "data.fold must be those that it was trained with"
        )
    for option in fields(BackboneConfig):
        its, ours = (getattr(config, option.name) for config in (trained.backbone, backbone))
        if its != ours:
            raise CheckpointError(
                f"{path} is a base learner with backbone.{option.name}={its}, but here it is {ours}: they must be one backbone"
            )
    require_finite(checkpoint.method, str(path))
    return checkpoint.method
