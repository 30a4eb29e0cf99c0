"""Scores of a method on the novel classes, by the field's protocol. Draws nothing from any generator that training
uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svf_fast.train.batches import EpisodeSource, load_ahead
from svf_fast.train.data.episodes import EpisodeBatch, collate
from svf_fast.train.evaluation import FewShotMetrics, logits_at_original_size
from svf_fast.train.label_metrics import BaseMetrics
from svf_fast.train.methods import BAM


class ValidationStopped(Exception):
    """Raised by a ``watch`` to leave a validation before its end."""


@dataclass(frozen=True)
class Scores:
    """Fractions between 0 and 1; ``class_iou`` by class id; ``class_episodes`` says how many episodes each rests on."""

    miou: float
    fb_iou: float
    foreground_iou: float
    class_iou: dict[int, float]
    class_episodes: dict[int, int]
    episodes: int
    seed: int
    branches: BranchScores | None = None


@dataclass(frozen=True)
class BranchScores:
    """What BAM also reports, as fractions: its meta branch on the novel classes, its base branch on the base classes that
    the queries show."""

    meta_miou: float
    meta_fb_iou: float
    base_miou: float


class _Branches:
    """Runs BAM and counts for its two branches what they say."""

    def __init__(self, method: BAM, class_ids: tuple[int, ...]) -> None:
        self.method = method
        self.meta = FewShotMetrics(class_ids)
        self.base = BaseMetrics(method.base_classes)

    def final_logits(self, batch: EpisodeBatch) -> Tensor:
        """The ensemble's logits [1, 2, S, S] for a batch of one."""
        found = self.method.outputs(batch.query_images, batch.support_images, batch.support_labels)
        base_label = base_label_of(batch)
        self.meta.update(found.meta[0], batch.original_labels[0], batch.class_ids[0])
        self.base.update(logits_at_original_size(found.base[0], base_label).argmax(dim=0), base_label)
        return found.final

    @property
    def scores(self) -> BranchScores:
        return BranchScores(self.meta.miou, self.meta.fb_iou, self.base.miou_of_met)


def base_label_of(batch: EpisodeBatch) -> Tensor:
    """The original base label [H, W] of a batch of one; ValueError when its source was not asked for any."""
    if batch.original_base_labels is None:
        raise ValueError("the episodes hold no base labels, which BAM needs: build their sampler with base_classes")
    return batch.original_base_labels[0]


@contextmanager
def evaluating(method: nn.Module) -> Iterator[None]:
    """Inside, ``method`` is in eval mode and builds no graph; afterwards it is in the mode it was in."""
    was_training = method.training
    method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        method.train(was_training)


def validate(
    method: nn.Module,
    source: EpisodeSource,
    class_ids: tuple[int, ...],
    *,
    episodes: int,
    seed: int,
    workers: int,
    device: torch.device,
    watch: Callable[[int, int], None],
) -> Scores:
    """mIoU and FB-IoU over ``episodes`` episodes, one at a time; the method comes back in the mode it was in.

    ``seed`` permutes the query images, so that fewer episodes than images still spread over the list. After every
    episode ``watch`` is told how many of how many are done; what it raises ends the validation.
    """
    metrics = FewShotMetrics(class_ids)
    branches = _Branches(method, class_ids) if isinstance(method, BAM) else None
    keys = [(key,) for key in source.validation_indices(episodes, seed)]
    with evaluating(method), closing(load_ahead(source.episode, collate, keys, workers=workers)) as batches:
        for done, batch in enumerate(batches, start=1):
            on_device = batch.to(device)
            if branches is None:
                logits = method(on_device.query_images, on_device.support_images, on_device.support_labels)
            else:
                logits = branches.final_logits(on_device)
            metrics.update(logits[0], batch.original_labels[0], batch.class_ids[0])
            watch(done, episodes)
    branch_scores = None if branches is None else branches.scores
    return Scores(
        miou=metrics.miou,
        fb_iou=metrics.fb_iou,
        foreground_iou=metrics.foreground_iou,
        class_iou=metrics.class_iou,
        class_episodes=dict(metrics.episodes),
        episodes=episodes,
        seed=seed,
        branches=branch_scores,
    )
