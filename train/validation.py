"""Scores of a method on the novel classes, by the field's protocol. Draws nothing from any generator that training
uses, and knows no configuration and no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svf_fast.train.batches import EpisodeSource, in_batches, load_ahead
from svf_fast.train.data.episodes import EpisodeBatch, Order, collate
from svf_fast.train.distributed import ALONE, Processes
from svf_fast.train.evaluation import FewShotMetrics, logits_at_original_size
from svf_fast.train.label_metrics import BaseMetrics, Total
from svf_fast.train.methods import BAM

# of BAM's test script: five whole numbers below 1000 from NumPy's legacy generator under seed 123
FIVE_SEEDS = (510, 365, 382, 322, 988)


class ValidationStopped(Exception):
    """Raised by a ``watch`` to leave a validation before its end."""


@dataclass(frozen=True)
class EpisodePlan:
    """Which episodes a validation looks at: how many, their queries in an ``order`` that ``seed`` permutes or in the
    list's own, and ``batch`` of them in one forward."""

    episodes: int
    seed: int
    order: Order = "permuted"
    batch: int = 1


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
        """The ensemble's logits [B, 2, S, S]."""
        # of a base class the base map leaves out its own, as in training; a novel one has no category
        left_out = batch.categories if self.method.training_base_map == "others" else None
        found = self.method.outputs(batch.query_images, batch.support_images, batch.support_labels, categories=left_out)
        for logits, label, class_id in zip(found.meta, batch.original_labels, batch.class_ids, strict=True):
            self.meta.update(logits, label, class_id)
        for logits, base_label in zip(found.base, base_labels_of(batch), strict=True):
            # the argmax, two to five times as fast as torch.argmax over a leading dimension
            prediction = logits_at_original_size(logits, base_label).max(dim=0).indices
            self.base.update(prediction, base_label)
        return found.final

    def sum_over(self, total: Total) -> None:
        self.meta.sum_over(total)
        self.base.counts.sum_over(total)

    @property
    def scores(self) -> BranchScores:
        return BranchScores(self.meta.miou, self.meta.fb_iou, self.base.miou_of_met)


def base_labels_of(batch: EpisodeBatch) -> tuple[Tensor, ...]:
    """The original base labels [H, W] of a batch; ValueError when its source was not asked for any."""
    if batch.original_base_labels is None:
        raise ValueError("the episodes hold no base labels, which BAM needs: build their sampler with base_classes")
    return batch.original_base_labels


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
    plan: EpisodePlan,
    *,
    workers: int,
    device: torch.device,
    watch: Callable[[int, int], None],
    processes: Processes = ALONE,
) -> Scores:
    """mIoU and FB-IoU over the episodes of ``plan``; the method comes back in the mode it was in.

    A batch shares the forward alone: each query is scored at its own original size, so that the counts are those of one
    episode at a time, up to the forward's rounding. After every batch ``watch`` is told how many episodes of how many
    are done; what it raises ends the validation. Several ``processes`` divide the batches, and ``watch`` is told in all of
    them after each round; each gets the same scores, from exactly the counts that one process would have.
    """
    metrics = FewShotMetrics(class_ids)
    branches = _Branches(method, class_ids) if isinstance(method, BAM) else None
    keys = in_batches(source.validation_indices(plan.episodes, plan.seed, plan.order), plan.batch)
    own = processes.share(keys)
    with evaluating(method), closing(load_ahead(source.episode, collate, own, workers=workers)) as batches:
        for number, batch in enumerate(batches, start=1):
            on_device = batch.to(device)
            if branches is None:
                logits = method(on_device.query_images, on_device.support_images, on_device.support_labels)
            else:
                logits = branches.final_logits(on_device)
            for logit, label, class_id in zip(logits, batch.original_labels, batch.class_ids, strict=True):
                metrics.update(logit, label, class_id)
            if number <= processes.rounds(keys):
                watch(min(number * processes.size * plan.batch, plan.episodes), plan.episodes)
    metrics.sum_over(processes.total)
    if branches is not None:
        branches.sum_over(processes.total)
    branch_scores = None if branches is None else branches.scores
    return Scores(
        miou=metrics.miou,
        fb_iou=metrics.fb_iou,
        foreground_iou=metrics.foreground_iou,
        class_iou=metrics.class_iou,
        class_episodes=dict(metrics.episodes),
        episodes=plan.episodes,
        seed=plan.seed,
        branches=branch_scores,
    )
