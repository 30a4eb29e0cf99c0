"""How a few-shot prediction is scored: at the query's original size, per class, as the field does it.

Works on logits or predictions of any method; knows nothing of how they were made or of where episodes come from.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from svf_fast.train.label_metrics import LabelCounts, Total, count_labels, summed_by_key

_LABELS = 2  # background and the episode's class
_LONG = 2  # a longer side of more than so many shorter ones


def logits_at_original_size(logits: Tensor, original_label: Tensor) -> Tensor:
    """Logits float32 [C, H, W] from logits [C, S, S] for a query whose original label is [H, W].

    The test transform wrote the picture into the top-left corner of a square, so the logits (not the prediction) are
    resized to a square of the longer side, bilinear with aligned corners, and what lies outside [H, W] is cut off.
    """
    if logits.dim() != 3 or logits.shape[1] != logits.shape[2]:
        raise ValueError(f"logits have the shape {list(logits.shape)}; expected [C, S, S]")
    height, width = _require_label(original_label)
    side = max(height, width)
    logits = logits.detach().float()
    # a batch of one whose strides still say channels_last: with [None] a resize of 61 labels takes five times as long
    resized = logits.as_strided((1, *logits.shape), (logits.numel(), *logits.stride()))
    if side > _LONG * min(height, width):
        # Most of a long picture's square would be cut off, and at some length it fills the memory. So the shorter side
        # is resized and cut first, then the longer: the same up to rounding.
        if height < width:
            resized = _stretch(resized, (side, resized.shape[3]))[:, :, :height]
        else:
            resized = _stretch(resized, (resized.shape[2], side))[..., :width]
        return _stretch(resized, (height, width))[0]
    return _stretch(resized, (side, side))[0, :, :height, :width]


def prediction_at_original_size(logits: Tensor, original_label: Tensor) -> Tensor:
    """Labels uint8 [H, W] (0 or 1) from logits [2, S, S], as :func:`logits_at_original_size` resizes them."""
    if logits.dim() != 3 or logits.shape[0] != _LABELS or logits.shape[1] != logits.shape[2]:
        raise ValueError(f"logits have the shape {list(logits.shape)}; expected [2, S, S]")
    background, foreground = logits_at_original_size(logits, original_label)
    # the argmax of two, a tie being background; torch.argmax over a leading dimension takes a hundred times as long
    return (foreground > background).to(torch.uint8)


def count(prediction: Tensor, label: Tensor) -> LabelCounts:
    """Counts of a prediction [H, W] (0 or 1) against a label [H, W] (0, 1, or 255, which is ignored)."""
    _require_label(label)
    return count_labels(prediction, label, _LABELS)


class FewShotMetrics:
    """mIoU and FB-IoU of episodes over the classes `class_ids`; all figures are fractions between 0 and 1."""

    def __init__(self, class_ids: Iterable[int]) -> None:
        ids = tuple(class_ids)
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"class_ids is {ids}; expected at least one class id, each once")
        self.counts: dict[int, LabelCounts] = {class_id: LabelCounts(_LABELS) for class_id in ids}
        self.episodes: dict[int, int] = dict.fromkeys(ids, 0)

    def update(self, logits_or_prediction: Tensor, original_label: Tensor, class_id: int) -> None:
        """Adds one episode: logits [2, S, S], or a prediction [H, W] at the size of `original_label` [H, W]."""
        if class_id not in self.counts:
            raise ValueError(f"class_id is {class_id}; expected one of {list(self.counts)}")
        prediction = logits_or_prediction
        if prediction.dim() == 3:
            prediction = prediction_at_original_size(prediction, original_label)
        self.counts[class_id].add(count(prediction, original_label))
        self.episodes[class_id] += 1

    def sum_over(self, total: Total) -> None:
        """As :meth:`LabelCounts.sum_over`: the metrics of the episodes of all processes."""
        for counts in self.counts.values():
            counts.sum_over(total)
        self.episodes = summed_by_key(self.episodes, total)

    @property
    def total(self) -> LabelCounts:
        """Sums over the episodes of all classes."""
        total = LabelCounts(_LABELS)
        for counts in self.counts.values():
            total.add(counts)
        return total

    @property
    def class_iou(self) -> dict[int, float]:
        """IoU of each class, from sums over its episodes; 0 for a class that was never met."""
        return {class_id: float(counts.iou[1]) for class_id, counts in self.counts.items()}

    @property
    def miou(self) -> float:
        """Mean of `class_iou` over all classes asked for, whether met or not."""
        return sum(self.class_iou.values()) / len(self.counts)

    @property
    def foreground_iou(self) -> float:
        """IoU of the classes asked for, from sums over all episodes: the "pIoU" of BAM's code."""
        return float(self.total.iou[1])

    @property
    def fb_iou(self) -> float:
        """Mean of background and foreground IoU, both from sums over all episodes (not a mean of per-class values)."""
        return float(self.total.iou.mean())


def _stretch(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(logits, size, mode="bilinear", align_corners=True)


def _require_label(label: Tensor) -> tuple[int, int]:
    if label.dim() != 2:
        raise ValueError(f"original_label has the shape {list(label.shape)}; expected [H, W]")
    return int(label.shape[0]), int(label.shape[1])
