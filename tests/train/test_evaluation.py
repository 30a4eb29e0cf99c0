"""Scores against a slow count by hand, against a second implementation, and against recorded counts of the field's code."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from svf_fast.train.evaluation import (
    FewShotMetrics,
    count,
    logits_at_original_size,
    prediction_at_original_size,
)
from svf_fast.train.label_metrics import LabelCounts

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
SHAPES = [(1, 1), (1, 7), (9, 1), (5, 3), (33, 50), (50, 33), (64, 64), (90, 4), (6, 100)]


def random_label(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).choice(np.array([0, 1, 255], np.uint8), shape))


def pixels(counts: LabelCounts) -> list[list[int]]:
    return [values.tolist() for values in (counts.intersection, counts.union, counts.target)]


def random_logits(side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not (GOLDEN / "data.json").is_file(), reason="the golden parity data are not here")
def test_counts_agree_with_the_field() -> None:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    noise = torch.from_numpy(fill.stream("0|eval_logits", 2 * 73 * 73).reshape(1, 2, 73, 73)).float()
    logits = functional.avg_pool2d(noise, 5, stride=1, padding=2)[0]
    label = torch.from_numpy(fill.make_photo(100, 131)[1])
    label[label == 2] = 0
    counts = count(prediction_at_original_size(logits, label), label)
    recorded = json.loads((GOLDEN / "data.json").read_text())["evaluation"]
    for name in ("intersection", "union", "target"):
        np.testing.assert_allclose(getattr(counts, name), recorded[name], atol=3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [9, 73])
def test_predictions_are_the_argmax_of_logits_resized_to_the_longer_sides_square(
    shape: tuple[int, int], side: int
) -> None:
    logits = random_logits(side)
    prediction = prediction_at_original_size(logits, torch.zeros(shape, dtype=torch.uint8))
    square = (max(shape), max(shape))
    resized = functional.interpolate(logits[None], square, mode="bilinear", align_corners=True)[0]
    assert prediction.shape == shape
    assert torch.equal(prediction.long(), resized.argmax(0)[: shape[0], : shape[1]])


def test_logits_in_low_precision_and_with_a_graph_are_taken() -> None:
    logits = random_logits(9).bfloat16().requires_grad_()
    prediction = prediction_at_original_size(logits, torch.zeros((20, 30), dtype=torch.uint8))
    assert not prediction.requires_grad
    expected = prediction_at_original_size(logits.detach().float(), torch.zeros((20, 30), dtype=torch.uint8))
    assert torch.equal(prediction, expected)


@pytest.mark.parametrize("shape", [(20, 31), (60, 7)])
def test_logits_may_lie_in_memory_in_any_order(shape: tuple[int, int]) -> None:
    batch, label = torch.randn(3, 16, 9, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(shape)
    expected = logits_at_original_size(batch[1], label)
    for given in (batch.to(memory_format=torch.channels_last)[1], batch[1].mT.contiguous().mT, batch.flip(0)[1]):
        torch.testing.assert_close(logits_at_original_size(given, label), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_a_loop_over_pixels(shape: tuple[int, int]) -> None:
    label = random_label(shape)
    prediction = random_label(shape, seed=1) % 2
    counts = count(prediction, label)
    pixels = [(p, t) for p, t in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True) if t != 255]
    for c in (0, 1):
        assert counts.intersection[c] == sum(p == c and t == c for p, t in pixels)
        assert counts.union[c] == sum(p == c or t == c for p, t in pixels)
        assert counts.target[c] == sum(t == c for _, t in pixels)


def test_a_void_label_counts_nothing() -> None:
    counts = count(torch.ones(5, 5, dtype=torch.uint8), torch.full((5, 5), 255, dtype=torch.uint8))
    assert pixels(counts) == [[0, 0]] * 3


@pytest.mark.parametrize("is_tall", [True, False])
def test_a_long_picture_needs_no_square_of_its_side(is_tall: bool) -> None:
    # whose logits would be 80 GB
    label = torch.zeros((100_000, 3), dtype=torch.uint8)
    logits = torch.stack([torch.zeros(9, 9), torch.linspace(-1, 0.5, 9)[:, None].expand(9, 9)])
    if not is_tall:
        label, logits = label.mT, logits.mT
    # of every column the last third
    assert int(prediction_at_original_size(logits, label).sum()) == pytest.approx(100_000, rel=1e-3)


def slow_scores(
    episodes: list[tuple[np.ndarray, np.ndarray, int]], classes: tuple[int, ...]
) -> tuple[dict[int, float], float, float]:
    """Class IoU, mIoU and FB-IoU by plain loops in double precision, from the specification's words alone."""
    found = {(class_id, value): [0, 0] for class_id in classes for value in (0, 1)}
    for logits, label, class_id in episodes:
        height, width = label.shape
        last = max(height, width) - 1
        for row in range(height):
            for column in range(width):
                if label[row, column] == 255:
                    continue
                y, x = (at * (logits.shape[1] - 1) / last if last else 0.0 for at in (row, column))
                top, left = min(int(y), logits.shape[1] - 2), min(int(x), logits.shape[1] - 2)
                corners = logits[:, top : top + 2, left : left + 2]
                heights, widths = np.array([top + 1 - y, y - top]), np.array([left + 1 - x, x - left])
                background, foreground = np.einsum("crs,r,s->c", corners, heights, widths)
                predicted, target = int(foreground > background), int(label[row, column])
                for value in (0, 1):
                    found[class_id, value][0] += predicted == value == target
                    found[class_id, value][1] += value in (predicted, target)
    iou = {class_id: found[class_id, 1][0] / (found[class_id, 1][1] + 1e-10) for class_id in classes}
    sums = [[sum(found[class_id, value][part] for class_id in classes) for part in (0, 1)] for value in (0, 1)]
    return iou, sum(iou.values()) / len(classes), sum(inner / (outer + 1e-10) for inner, outer in sums) / 2


def test_scores_are_those_of_a_second_implementation() -> None:
    classes = tuple(range(2, 78, 4))  # interleaved as COCO-20i's, and 19 of 20: the last is met by no episode
    rng = np.random.default_rng(0)
    metrics, episodes = FewShotMetrics((*classes, 78)), []
    for number, shape in enumerate(SHAPES * 3):
        logits = rng.standard_normal((2, 9, 9)).astype(np.float32)
        label = np.asarray(random_label(shape, seed=number))
        if number == 4:
            label = np.full_like(label, 255)
        if number == 5:
            logits[1] = -9  # nothing is found
        episodes.append((logits, label, classes[number % len(classes)]))
        metrics.update(torch.from_numpy(logits), torch.from_numpy(label), episodes[-1][2])
    iou, miou, fb_iou = slow_scores(episodes, (*classes, 78))
    assert metrics.class_iou == pytest.approx(iou, abs=1e-12)
    assert (metrics.miou, metrics.fb_iou) == pytest.approx((miou, fb_iou), abs=1e-12)
    assert metrics.class_iou[78] == 0
    assert metrics.episodes[78] == 0
    assert all(type(value) is float for value in (metrics.miou, metrics.fb_iou, *metrics.class_iou.values()))


def test_metrics_are_sums_per_class_and_over_all_classes() -> None:
    metrics = FewShotMetrics((6, 7, 8))
    ones, half = torch.ones(2, 4, dtype=torch.uint8), torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    metrics.update(ones, half.byte(), 6)  # foreground 4 of 8, background 0 of 4
    metrics.update(half, half.byte(), 6)  # foreground 4 of 4, background 4 of 4
    metrics.update(half, ones, 7)  # foreground 4 of 8, background 0 of 4
    assert metrics.class_iou == pytest.approx({6: 8 / 12, 7: 4 / 8, 8: 0.0})
    assert metrics.miou == pytest.approx((8 / 12 + 4 / 8 + 0) / 3)
    assert metrics.fb_iou == pytest.approx((12 / 20 + 4 / 12) / 2)
    assert metrics.episodes == {6: 2, 7: 1, 8: 0}


def test_metrics_without_an_episode_are_zero() -> None:
    metrics = FewShotMetrics((1, 2))
    assert (metrics.miou, metrics.fb_iou, metrics.class_iou) == (0, 0, {1: 0, 2: 0})


def test_logits_and_their_prediction_give_the_same_metrics() -> None:
    first, second = FewShotMetrics((1,)), FewShotMetrics((1,))
    for seed in range(3):
        logits, label = random_logits(33, seed), random_label((40, 31), seed)
        first.update(logits, label, 1)
        second.update(prediction_at_original_size(logits, label), label, 1)
    assert pixels(first.counts[1]) == pixels(second.counts[1])


@pytest.mark.parametrize(
    ("logits", "label", "message"),
    [
        (torch.zeros(3, 9, 9), torch.zeros(9, 9), r"logits have the shape \[3, 9, 9\]; expected \[2, S, S\]"),
        (torch.zeros(2, 9, 8), torch.zeros(9, 9), r"logits have the shape \[2, 9, 8\]"),
        (torch.zeros(2, 9, 9), torch.zeros(1, 9, 9), r"original_label has the shape \[1, 9, 9\]"),
        (
            torch.zeros(9, 8),
            torch.zeros(9, 9),
            r"prediction has the shape \[9, 8\]; expected that of the label, \[9, 9\]",
        ),
        (torch.full((9, 9), 0.7), torch.zeros(9, 9, dtype=torch.uint8), "prediction is torch.float32; expected whole"),
        (
            torch.zeros(9, 9, dtype=torch.complex64),
            torch.zeros(9, 9, dtype=torch.uint8),
            "torch.complex64; expected whole",
        ),
        (torch.full((9, 9), 2), torch.zeros(9, 9, dtype=torch.uint8), "prediction holds values from 2 to 2"),
        (torch.zeros(9, 9, dtype=torch.uint8), torch.full((9, 9), 7), "label holds values from 7 to 7"),
    ],
)
def test_wrong_shapes_and_values_are_refused(logits: torch.Tensor, label: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotMetrics((1,)).update(logits, label, 1)


def test_wrong_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class_id is 3; expected one of \[1, 2\]"):
        FewShotMetrics((1, 2)).update(torch.zeros(2, 2), torch.zeros(2, 2), 3)
    for class_ids in ((), (1, 1)):
        with pytest.raises(ValueError, match="class_ids is"):
            FewShotMetrics(class_ids)
