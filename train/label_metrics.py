"""Scores of predictions with any number of labels: per label intersections and unions, void left out. Knows no model and no episode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svf_fast.train.data import VOID

Total = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # sums over processes

EPSILON = 1e-10  # in the field's denominators: a label that was never met has IoU 0
_BYTES = 256


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

    def sum_over(self, total: Total) -> None:
        """Replace every count by its sum over processes, which ``total`` makes."""
        self.intersection, self.union, self.target = total(np.stack([self.intersection, self.union, self.target]))

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each label, between 0 and 1."""
        return np.asarray(self.intersection / (self.union + EPSILON), np.float64)


def confusion(prediction: Tensor, label: Tensor, labels: int) -> NDArray[np.int64]:
    """Pixels by label (rows) and prediction (columns), int64 [`labels`, `labels`], of a prediction (0 … `labels` - 1)
    against a label of the same shape (the same, or 255, which is ignored)."""
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction has the shape {list(prediction.shape)}; expected that of the label, {list(label.shape)}"
        )
    # Every pair of bytes is counted in one pass, and void and wrong values are looked for in the table: several times
    # as fast as passes over the pixels. On the CPU: one transfer instead of a wait for the device at every check.
    pairs = _bytes("label", label, labels).astype(np.uint16) * _BYTES + _bytes("prediction", prediction, labels)
    table = np.bincount(pairs.ravel(), minlength=_BYTES**2).reshape(_BYTES, _BYTES)
    table[VOID] = 0
    for name, axis in (("prediction", 0), ("label", 1)):
        values = np.flatnonzero(table.sum(axis=axis))
        if values.size and values[-1] >= labels:
            raise ValueError(_out_of_range(name, int(values[0]), int(values[-1]), labels))
    return table[:labels, :labels]


def count_labels(prediction: Tensor, label: Tensor, labels: int) -> LabelCounts:
    """Counts of what :func:`confusion` takes."""
    table = confusion(prediction, label, labels)
    counts = LabelCounts(labels)
    counts.intersection += np.diagonal(table)
    counts.target += table.sum(axis=1)
    counts.union += table.sum(axis=1) + table.sum(axis=0) - np.diagonal(table)
    return counts


def summed_by_key(counts: dict[int, int], total: Total) -> dict[int, int]:
    """Each count's sum over processes, which ``total`` makes; all have the same keys in the same order."""
    return dict(zip(counts, total(np.array(list(counts.values()), np.int64)).tolist(), strict=True))


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


def _bytes(name: str, values: Tensor, labels: int) -> NDArray[np.uint8]:
    """On the CPU; ValueError for values that are no bytes."""
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise ValueError(f"{name} is {values.dtype}; expected whole numbers")
    if values.dtype != torch.uint8:
        if values.numel():
            lowest, highest = (float(value) for value in torch.aminmax(values))
            if not 0 <= lowest <= highest < _BYTES:
                raise ValueError(_out_of_range(name, lowest, highest, labels))
        values = values.to(torch.uint8)
    return np.asarray(values.cpu().numpy(), np.uint8)


def _out_of_range(name: str, lowest: float, highest: float, labels: int) -> str:
    return f"{name} holds values from {lowest:g} to {highest:g}; expected 0 to {labels - 1}"
