"""Scores of predictions with many labels: per label intersections and unions, void left out. Knows no model and no episode."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svf_fast.train.data import VOID

_EPSILON = 1e-10  # in the field's denominators: a label that was never met has IoU 0


class LabelCounts:
    """Pixels for the labels 0 … `labels` - 1, int64 [labels]: `target` is labelled so, `union` labelled or predicted so."""

    def __init__(self, labels: int) -> None:
        self.intersection: NDArray[np.int64] = np.zeros(labels, np.int64)
        self.union: NDArray[np.int64] = np.zeros(labels, np.int64)
        self.target: NDArray[np.int64] = np.zeros(labels, np.int64)

    def add(self, other: LabelCounts) -> None:
        self.intersection += other.intersection
        self.union += other.union
        self.target += other.target

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each label, between 0 and 1."""
        return np.asarray(self.intersection / (self.union + _EPSILON), np.float64)


def count_labels(prediction: Tensor, label: Tensor, labels: int) -> LabelCounts:
    """Counts of a prediction (0 … `labels` - 1) against a label of the same shape (the same, or 255, which is ignored)."""
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction has the shape {list(prediction.shape)}; expected that of the label, {list(label.shape)}"
        )
    prediction, label = prediction.cpu().long(), label.cpu().long()
    kept = label != VOID
    prediction, label = prediction[kept], label[kept]
    for name, values in (("prediction", prediction), ("label", label)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < labels:
            raise ValueError(
                f"{name} holds values from {int(values.min())} to {int(values.max())}; expected 0 to {labels - 1}"
            )
    table = torch.bincount(labels * label + prediction, minlength=labels**2).view(labels, labels).numpy()
    counts = LabelCounts(labels)
    counts.intersection += np.diagonal(table)
    counts.target += table.sum(axis=1)
    counts.union += table.sum(axis=1) + table.sum(axis=0) - np.diagonal(table)
    return counts


class BaseMetrics:
    """mIoU over `classes` base classes, labels 1 … `classes`; background (0) is counted and left out of the mean."""

    def __init__(self, classes: int) -> None:
        self.counts = LabelCounts(1 + classes)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds pictures: prediction and label of one shape, labels 0 … `classes`, 255 ignored in the label."""
        self.counts.add(count_labels(prediction, label, len(self.counts.union)))

    @property
    def class_iou(self) -> list[float]:
        """IoU of each base class, in order; 0 for one that was never met."""
        return [float(iou) for iou in self.counts.iou[1:]]

    @property
    def miou(self) -> float:
        """Mean over all base classes, whether met or not: what the base learner is selected by."""
        return float(np.mean(self.class_iou))

    @property
    def miou_of_met(self) -> float:
        """Mean over the base classes that some label shows, as BAM reports its base branch; 0 when there are none."""
        is_met = self.counts.target[1:] > 0
        return float(self.counts.iou[1:][is_met].mean()) if is_met.any() else 0.0
