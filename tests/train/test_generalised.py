"""Generalised evaluation: which class a picture asks for, how its label reads, and scores against counts by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from method_cases import InDouble
from torch import Tensor, nn
from voc_folders import draw, write_folder

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.data.generalised import GeneralisedSampler
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.generalised import GeneralisedMetrics, generalised_label, validate_generalised
from svf_fast.train.methods.bam import BAMOutputs
from svf_fast.train.validation import EpisodePlan

BASE, NOVEL = (1, 3), (2, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = {
        "base": draw(60, 70, [(1, 0, 0, 20, 20)]),
        "novel_2": draw(60, 70, [(2, 0, 0, 30, 30)]),
        "novel_both": draw(60, 70, [(2, 0, 0, 3, 3), (4, 40, 40, 9, 9)]),
        "mixed": draw(60, 70, [(3, 0, 0, 9, 9), (4, 30, 30, 20, 20), (255, 50, 0, 4, 70)]),
        "empty": draw(60, 70, []),
    }
    return write_folder(tmp_path_factory.mktemp("voc"), made)


@pytest.fixture(scope="module")
def sampler(root: Path) -> GeneralisedSampler:
    return GeneralisedSampler(VOCFolder(root).whole("list.txt", NOVEL), BASE, 1, 33, 7)


def test_a_picture_without_a_base_class_asks_for_one_of_its_own(sampler: GeneralisedSampler) -> None:
    assert [sampler.candidate_classes(index) for index in range(5)] == [(2, 4), (2,), (2, 4), (2, 4), (2, 4)]
    asked = Counter(sampler.episode(pass_index, 0).class_id for pass_index in range(200))
    assert set(asked) == {2, 4}
    assert 60 < asked[2] < 140


def test_supports_need_one_pixel_and_are_never_the_query(sampler: GeneralisedSampler) -> None:
    supports = {2: set(), 4: set()}
    for pass_index in range(60):
        for index in range(5):
            episode = sampler.episode(pass_index, index)
            assert episode.query_name not in episode.support_names
            supports[episode.class_id] |= set(episode.support_names)
    assert supports[2] == {"JPEGImages/novel_2.jpg", "JPEGImages/novel_both.jpg"}
    assert supports[4] == {"JPEGImages/novel_both.jpg", "JPEGImages/mixed.jpg"}


def test_counts_of_several_processes_are_added(sampler: GeneralisedSampler) -> None:
    metrics, label = GeneralisedMetrics(BASE, NOVEL), torch.tensor([[0, 1, 2, 3]])
    metrics.update(torch.tensor([[0, 1, 1, 3]]), label, 4)
    before = metrics.scores(7)
    metrics.sum_over(lambda counts: 3 * counts)
    after = metrics.scores(7)
    assert (after.episodes, after.class_episodes) == (3, {2: 0, 4: 3})
    assert after.class_iou == pytest.approx(before.class_iou)
    assert after.fb_iou == pytest.approx(before.fb_iou)


def test_a_class_with_too_few_pictures_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"class 2 \(two\) has 2 usable pictures.*2-shot episodes need 2"):
        GeneralisedSampler(VOCFolder(root).whole("list.txt", NOVEL), BASE, 2, 33, 7)


def test_labels_are_the_base_classes_then_the_class_asked_for(sampler: GeneralisedSampler, root: Path) -> None:
    episodes = [sampler.episode(pass_index, 3) for pass_index in range(20)]
    for class_id in NOVEL:
        episode = next(episode for episode in episodes if episode.class_id == class_id)
        assert episode.original_base_label is not None
        label = generalised_label(episode.original_base_label, episode.original_label, len(BASE)).numpy()
        # of the picture's classes 3 is the second base class; 4 is novel, background unless it was asked for
        expected = draw(60, 70, [(2, 0, 0, 9, 9), (3 * (class_id == 4), 30, 30, 20, 20), (255, 50, 0, 4, 70)])
        np.testing.assert_array_equal(label, expected)


def test_the_novel_column_is_credited_to_the_class_asked_for() -> None:
    metrics = GeneralisedMetrics(BASE, NOVEL)
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(6):
        prediction = torch.from_numpy(rng.integers(0, 4, (20, 30)))
        label = torch.from_numpy(rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (20, 30)))
        episodes.append((prediction, label, NOVEL[number % 3 == 0]))
        metrics.update(*episodes[-1])

    def pixels(value: int, chosen: list[tuple[Tensor, Tensor, int]]) -> tuple[int, int]:
        found, either = 0, 0
        for prediction, label, _ in chosen:
            kept = label != 255
            predicted, target = (prediction == value) & kept, (label == value) & kept
            found += int((predicted & target).sum())
            either += int((predicted | target).sum())
        return found, either

    counted = {1: pixels(1, episodes), 3: pixels(2, episodes)}
    for class_id in NOVEL:
        counted[class_id] = pixels(3, [episode for episode in episodes if episode[2] == class_id])
    iou = {class_id: found / either for class_id, (found, either) in counted.items()}
    background = pixels(0, episodes)
    scores = metrics.scores(seed=5)
    assert scores.class_iou == pytest.approx(iou)
    assert scores.base_miou == pytest.approx((iou[1] + iou[3]) / 2)
    assert scores.novel_miou == pytest.approx((iou[2] + iou[4]) / 2)
    assert scores.miou == pytest.approx(sum(iou.values()) / 4)
    foreground = sum(found for found, _ in counted.values()) / sum(either for _, either in counted.values())
    assert scores.fb_iou == pytest.approx((background[0] / background[1] + foreground) / 2)
    assert scores.class_episodes == {2: 4, 4: 2}
    assert (scores.episodes, scores.seed) == (6, 5)


def test_metrics_refuse_unknown_classes_and_classes_on_both_sides() -> None:
    with pytest.raises(ValueError, match="class_id is 1; expected one of"):
        GeneralisedMetrics(BASE, NOVEL).update(torch.zeros(2, 2), torch.zeros(2, 2), 1)
    with pytest.raises(ValueError, match="overlap"):
        GeneralisedMetrics((1, 2), NOVEL)


class Stubborn(nn.Module):
    """Answers every pixel alike: the class asked for with one probability, and the first base class."""

    def __init__(self, novel_logit: float) -> None:
        super().__init__()
        self.novel_logit = novel_logit

    def outputs(self, query: Tensor, supports: Tensor, support_labels: Tensor) -> BAMOutputs:
        assert not self.training
        size = query.shape[-2:]
        final = torch.zeros(1, 2, *size)
        final[:, 1] = self.novel_logit
        base = torch.zeros(1, 3, *size)
        base[:, 1] = 1.0
        return BAMOutputs(final, final, base)


@pytest.mark.parametrize(
    ("rule", "tau", "expected_is_novel"), [("final", 0.9, False), ("final", 0.5, True), ("base", 0.5, False)]
)
def test_rules_and_tau_decide_between_the_branches(
    sampler: GeneralisedSampler, rule: str, tau: float, expected_is_novel: bool
) -> None:
    method = Stubborn(novel_logit=1.0).train()  # a probability of 0.73
    seen: list[tuple[int, int]] = []
    scores = validate_generalised(
        method,  # type: ignore[arg-type]
        sampler,
        EpisodePlan(7, sampler.seed, "list"),
        tau=tau,
        rule=rule,  # type: ignore[arg-type]
        workers=0,
        device=torch.device("cpu"),
        watch=lambda done, total: seen.append((done, total)),
    )
    assert method.training
    assert seen == [(done, 7) for done in range(1, 8)]
    assert scores.episodes == 7  # five pictures in the list's order, then the first two again
    assert (scores.novel_miou > 0, scores.base_miou > 0) == (expected_is_novel, not expected_is_novel)


def test_scores_depend_neither_on_the_workers_nor_on_the_batch(sampler: GeneralisedSampler) -> None:
    backbone = build_backbone(BackboneConfig(width=4, blocks=(1, 1, 1, 1)))
    method = InDouble(backbone, base_classes=2, shots=1, head_width=8).double()
    found = [
        validate_generalised(
            method,
            sampler,
            EpisodePlan(5, sampler.seed, "list", batch=batch),
            tau=0.4,
            rule="final",
            workers=workers,
            device=torch.device("cpu"),
            watch=lambda done, total: None,
        )
        for workers, batch in ((0, 1), (2, 1), (2, 2))
    ]
    assert found[0] == found[1] == found[2]
    assert 0 < found[0].fb_iou < 1
