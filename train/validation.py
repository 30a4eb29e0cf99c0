"""Scores of a method on the novel classes, by the field's protocol. Draws nothing from any generator that training
uses."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn

from svf_fast.train.batches import EpisodeSource, load_ahead
from svf_fast.train.evaluation import FewShotMetrics


class ValidationStopped(Exception):
    """Raised by a ``watch`` to leave a validation before its end."""


@dataclass(frozen=True)
class Scores:
    """Fractions between 0 and 1; ``class_iou`` by class id; ``class_episodes`` says how many episodes each rests on."""

    miou: float
    fb_iou: float
    class_iou: dict[int, float]
    class_episodes: dict[int, int]
    episodes: int
    seed: int


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
    keys = [(key,) for key in source.validation_indices(episodes, seed)]
    was_training = method.training
    method.eval()
    try:
        with torch.no_grad(), closing(load_ahead(source, keys, workers=workers)) as batches:
            for done, batch in enumerate(batches, start=1):
                on_device = batch.to(device)
                logits = method(on_device.query_images, on_device.support_images, on_device.support_labels)
                metrics.update(logits[0], batch.original_labels[0], batch.class_ids[0])
                watch(done, episodes)
    finally:
        method.train(was_training)
    return Scores(metrics.miou, metrics.fb_iou, metrics.class_iou, dict(metrics.episodes), episodes, seed)
