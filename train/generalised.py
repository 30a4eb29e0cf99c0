"""Generalised few-shot segmentation (Lang et al. 2022, BAM): base classes and a novel one are told apart in the same picture.
Scores of BAM by that protocol; which episodes there are is `data/generalised.py`'s business."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svf_fast.train.batches import in_batches, load_ahead
from svf_fast.train.data.episodes import collate
from svf_fast.train.data.generalised import GeneralisedSampler
from svf_fast.train.distributed import ALONE, Processes
from svf_fast.train.evaluation import logits_at_original_size
from svf_fast.train.label_metrics import EPSILON, LabelCounts, Total, count_labels, summed_by_key
from svf_fast.train.methods import BAM
from svf_fast.train.methods.bam import GeneralisedRule, predict_generalised
from svf_fast.train.tasks import Watch
from svf_fast.train.validation import EpisodePlan, base_labels_of, evaluating


@dataclass(frozen=True)
class GeneralisedScores:
    """Fractions between 0 and 1: mIoU over the novel, the base and all classes (background in none of them), FB-IoU,
    ``class_iou`` by class id. A class never met counts 0."""

    novel_miou: float
    base_miou: float
    miou: float
    fb_iou: float
    class_iou: dict[int, float]
    class_episodes: dict[int, int]  # of the novel classes: how often each was asked for
    episodes: int
    seed: int


class GeneralisedMetrics:
    """Counts over episodes; labels are 0 background, 1 … N the base classes in ascending order, N + 1 the novel class
    asked for, whose pixels are credited to it."""

    def __init__(self, base: tuple[int, ...], novel: tuple[int, ...]) -> None:
        if set(base) & set(novel):
            raise ValueError(f"base classes {base} and novel classes {novel} overlap, expected none in both")
        self.base, self.novel = tuple(sorted(base)), tuple(sorted(novel))
        self.episodes = dict.fromkeys(self.novel, 0)
        # one column for each: background, the base classes, the novel classes
        self._counts = LabelCounts(1 + len(self.base) + len(self.novel))

    def update(self, prediction: Tensor, label: Tensor, class_id: int) -> None:
        """Adds one episode: prediction [H, W] of 0 … N + 1, label [H, W] of the same or 255."""
        if class_id not in self.episodes:
            raise ValueError(f"class_id is {class_id}; expected one of {list(self.novel)}")
        labels = len(self.base) + 2
        counts = count_labels(prediction, label, labels)
        columns = [*range(labels - 1), labels - 1 + self.novel.index(class_id)]
        for name in ("intersection", "union", "target"):
            getattr(self._counts, name)[columns] += getattr(counts, name)
        self.episodes[class_id] += 1

    def sum_over(self, total: Total) -> None:
        """As :meth:`LabelCounts.sum_over`: the metrics of the episodes of all processes."""
        self._counts.sum_over(total)
        self.episodes = summed_by_key(self.episodes, total)

    def scores(self, seed: int) -> GeneralisedScores:
        """What the counts so far say; ``seed`` is for the record."""
        iou = self._counts.iou
        foreground = self._counts.intersection[1:].sum() / (self._counts.union[1:].sum() + EPSILON)
        return GeneralisedScores(
            novel_miou=float(np.mean(iou[1 + len(self.base) :])),
            base_miou=float(np.mean(iou[1 : 1 + len(self.base)])),
            miou=float(np.mean(iou[1:])),
            fb_iou=float(iou[0] + foreground) / 2,
            class_iou={class_id: float(value) for class_id, value in zip(self.base + self.novel, iou[1:], strict=True)},
            class_episodes=dict(self.episodes),
            episodes=sum(self.episodes.values()),
            seed=seed,
        )


def generalised_label(base_label: Tensor, episode_label: Tensor, base_classes: int) -> Tensor:
    """Label uint8 [H, W]: the base label, and N + 1 where the episode's label [H, W] shows the class asked for."""
    return base_label.masked_fill(episode_label == 1, base_classes + 1)


def validate_generalised(
    method: BAM,
    source: GeneralisedSampler,
    plan: EpisodePlan,
    *,
    tau: float,
    rule: GeneralisedRule,
    workers: int,
    device: torch.device,
    watch: Watch,
    processes: Processes = ALONE,
) -> GeneralisedScores:
    """Scores over the episodes of ``plan`` (the protocol's follow the list's order), at their original size. ``tau`` and
    ``rule`` as in :func:`predict_generalised`; ``watch`` and ``processes`` as in :func:`validate`. The method comes back in the mode it
    was in."""
    base = source.base_classes
    metrics = GeneralisedMetrics(base, source.split.class_ids)
    keys = in_batches(source.validation_indices(plan.episodes, plan.seed, plan.order), plan.batch)
    own = processes.share(keys)
    with evaluating(method), closing(load_ahead(source.episode, collate, own, workers=workers)) as batches:
        for number, batch in enumerate(batches, start=1):
            on_device = batch.to(device)
            outputs = method.outputs(on_device.query_images, on_device.support_images, on_device.support_labels)
            labels = zip(base_labels_of(batch), batch.original_labels, strict=True)
            for *logits, (base_label, label), class_id in zip(
                outputs.final, outputs.base, labels, batch.class_ids, strict=True
            ):
                truth = generalised_label(base_label, label, len(base))
                resized = (logits_at_original_size(each, truth)[None] for each in logits)
                metrics.update(predict_generalised(*resized, tau=tau, rule=rule)[0], truth, class_id)
            if number <= processes.rounds(keys):
                watch(min(number * processes.size * plan.batch, plan.episodes), plan.episodes)
    metrics.sum_over(processes.total)
    return metrics.scores(plan.seed)
