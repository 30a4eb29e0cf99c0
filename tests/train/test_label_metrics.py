"""Scores over many labels against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svf_fast.train.label_metrics import BaseMetrics, count_labels


def random_labels(labels: int, seed: int, *, void: bool) -> torch.Tensor:
    values = [*range(labels), 255] if void else list(range(labels))
    return torch.from_numpy(np.random.default_rng(seed).choice(np.array(values, np.uint8), (31, 17)))


@pytest.mark.parametrize("labels", [2, 5, 16])
def test_counts_are_those_of_a_slow_count(labels: int) -> None:
    prediction, label = random_labels(labels, 1, void=False), random_labels(labels, 2, void=True)
    counts = count_labels(prediction, label, labels)
    kept = label != 255
    for value in range(labels):
        predicted, target = (prediction == value) & kept, label == value
        assert counts.intersection[value] == int((predicted & target).sum())
        assert counts.union[value] == int((predicted | target).sum())
        assert counts.target[value] == int(target.sum())


def test_base_miou_leaves_background_out_and_counts_or_leaves_out_what_was_never_met() -> None:
    metrics = BaseMetrics(3)
    label = torch.tensor([[0, 1, 1, 255], [0, 2, 2, 2]])
    metrics.update(torch.tensor([[0, 1, 0, 3], [1, 2, 2, 3]]), label)
    # class 1: 1 of {(0,1), (0,2), (1,0)}; class 2: 2 of 3; class 3 was predicted once and never shown
    assert metrics.class_iou == pytest.approx([1 / 3, 2 / 3, 0])
    assert metrics.miou == pytest.approx(1 / 3)
    assert metrics.miou_of_met == pytest.approx(1 / 2)


def test_pictures_add_up_before_the_division() -> None:
    one, two = BaseMetrics(4), BaseMetrics(4)
    pairs = [(random_labels(5, 3 + i, void=False), random_labels(5, 13 + i, void=True)) for i in range(3)]
    for prediction, label in pairs:
        one.update(prediction, label)
    two.update(torch.cat([prediction for prediction, _ in pairs]), torch.cat([label for _, label in pairs]))
    assert one.class_iou == two.class_iou


def test_nothing_met_is_zero() -> None:
    metrics = BaseMetrics(2)
    assert (metrics.miou, metrics.miou_of_met) == (0, 0)


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([[0, 3]], [[0, 1]], "prediction holds values from 0 to 3; expected 0 to 2"),
        ([[0, 1]], [[0, 4]], "label holds values from 0 to 4; expected 0 to 2"),
        ([[0, 256]], [[0, 1]], "prediction holds values from 0 to 256; expected 0 to 2"),
        ([[0, 1]], [[0, -1]], "label holds values from -1 to 0; expected 0 to 2"),
        ([[0, 1]], [[0]], r"prediction has the shape \[1, 2\]; expected that of the label, \[1, 1\]"),
    ],
)
def test_what_cannot_be_counted_is_refused(prediction: list, label: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_labels(torch.tensor(prediction), torch.tensor(label), 3)
