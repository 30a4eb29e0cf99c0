"""What a validation asks for, that a batch changes no count, and what BAM's says of its branches, against the same
figures put together by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from method_cases import InDouble
from torch import Tensor
from torch.nn import functional
from voc_folders import draw, write_folder

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.batches import EpisodeSource
from svf_fast.train.data.episodes import Episode, EpisodeSampler, collate
from svf_fast.train.data.memory import SampleMemory
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.distributed import ALONE, Processes
from svf_fast.train.evaluation import FewShotMetrics
from svf_fast.train.methods import BAM
from svf_fast.train.methods.bam import BAMOutputs
from svf_fast.train.validation import FIVE_SEEDS, EpisodePlan, Scores, ValidationStopped, validate

BASE, NOVEL = (1, 3), (2, 4)
PLAN = EpisodePlan(episodes=6, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> VOCFolder:
    made = {
        f"picture_{i}": draw(
            90, 100 + 9 * i, [(2 + 2 * (i % 2), 1, 1, 50, 60), (1, 60, 5 * i, 20, 40), (255, 88, 0, 2, 90)]
        )
        for i in range(6)
    }
    return VOCFolder(write_folder(tmp_path_factory.mktemp("voc"), made))


class Guesses(BAM):
    """Answers with noise that belongs to the query, so that every figure is other than 0."""

    def outputs(
        self, query_image: Tensor, support_images: Tensor, support_labels: Tensor, *, categories: Tensor | None = None
    ) -> BAMOutputs:
        assert not self.training
        generators = [torch.Generator().manual_seed(int(picture.abs().sum())) for picture in query_image]
        maps = [
            torch.stack([torch.randn(labels, 7, 7, generator=generator) for generator in generators])
            for labels in (2, 2, 3)
        ]
        return BAMOutputs(*(functional.interpolate(guess, query_image.shape[-2:]) for guess in maps))


@pytest.fixture(scope="module")
def method() -> BAM:
    backbone = build_backbone(BackboneConfig(width=4, blocks=(1, 1, 1, 1)))
    return Guesses(backbone, base_classes=2, shots=1, head_width=8)


@pytest.fixture(scope="module")
def sampler(folder: VOCFolder) -> EpisodeSampler:
    return EpisodeSampler(folder.split("list.txt", NOVEL), 1, 49, 1, base_classes=BASE)


def scores_of(
    method: BAM,
    source: EpisodeSource,
    plan: EpisodePlan = PLAN,
    *,
    workers: int = 0,
    watch: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> Scores:
    device = torch.device("cpu")
    return validate(method, source, NOVEL, plan, workers=workers, device=device, watch=watch, processes=processes)


def test_branches_are_scored_at_the_original_size_against_their_own_labels(
    sampler: EpisodeSampler, method: BAM
) -> None:
    scores = scores_of(method, sampler)
    final, meta = FewShotMetrics(NOVEL), FewShotMetrics(NOVEL)
    found, either, shown = [0, 0], [0, 0], [0, 0]
    method.eval()
    for key in sampler.validation_indices(6, 1):
        episode = sampler.episode(*key)
        batch = collate([episode])
        with torch.no_grad():
            outputs = method.outputs(batch.query_images, batch.support_images, batch.support_labels)
        final.update(outputs.final[0], episode.original_label, episode.class_id)
        meta.update(outputs.meta[0], episode.original_label, episode.class_id)
        label = episode.original_base_label
        assert label is not None
        side = max(label.shape)
        resized = functional.interpolate(outputs.base, (side, side), mode="bilinear", align_corners=True)
        prediction = resized[0].argmax(dim=0)[: label.shape[0], : label.shape[1]]
        for position in (0, 1):
            predicted, target = (prediction == position + 1) & (label != 255), label == position + 1
            found[position] += int((predicted & target).sum())
            either[position] += int((predicted | target).sum())
            shown[position] += int(target.sum())
    assert (scores.miou, scores.fb_iou) == (final.miou, final.fb_iou)
    assert scores.branches is not None
    assert (scores.branches.meta_miou, scores.branches.meta_fb_iou) == (meta.miou, meta.fb_iou)
    # class 3 is in no picture: it does not count
    assert shown[1] == 0
    assert scores.branches.base_miou == pytest.approx(found[0] / either[0])
    assert min(scores.miou, scores.branches.meta_miou, scores.branches.base_miou) > 0
    assert scores.miou != scores.branches.meta_miou


def test_a_source_without_base_labels_is_refused(folder: VOCFolder, method: BAM) -> None:
    with pytest.raises(ValueError, match="the episodes hold no base labels, which BAM needs"):
        scores_of(method, EpisodeSampler(folder.split("list.txt", NOVEL), 1, 49))


@pytest.mark.parametrize("batch", [2, 4, 9])
def test_a_batch_changes_no_count(sampler: EpisodeSampler, method: BAM, batch: int) -> None:
    one_by_one = scores_of(method, sampler)
    together = scores_of(method, sampler, EpisodePlan(6, 1, batch=batch), workers=2)
    assert together == one_by_one


def test_a_methods_forward_is_that_of_each_episode(folder: VOCFolder) -> None:
    backbone = build_backbone(BackboneConfig(width=4, blocks=(1, 1, 1, 1)))
    method = InDouble(backbone, base_classes=2, shots=2, head_width=8).double()
    source = EpisodeSampler(folder.split("list.txt", NOVEL), 2, 49, 1, base_classes=BASE)
    found = [scores_of(method, source, EpisodePlan(6, 1, batch=batch)) for batch in (1, 4)]
    assert found[0] == found[1]
    assert 0 < found[0].fb_iou < 1


def test_progress_is_told_after_every_batch_and_may_stop_the_validation(sampler: EpisodeSampler, method: BAM) -> None:
    seen: list[tuple[int, int]] = []

    def stop_at_4(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise ValidationStopped

    with pytest.raises(ValidationStopped):
        scores_of(method.train(), sampler, EpisodePlan(7, 1, batch=2), workers=2, watch=stop_at_4)
    assert seen == [(2, 7), (4, 7)]
    assert method.training
    scores_of(method, sampler, EpisodePlan(7, 1, batch=2), watch=lambda done, total: seen.append((done, total)))
    assert seen[2:] == [(2, 7), (4, 7), (6, 7), (7, 7)]


class Recorded(EpisodeSampler):
    """Remembers which episodes it was asked for."""

    asked: list[tuple[str, int, tuple[str, ...]]]

    def episode(self, pass_index: int, index: int, memory: SampleMemory | None = None) -> Episode:
        found = super().episode(pass_index, index)
        self.asked.append((found.query_name, found.class_id, found.support_names))
        return found


def asked_of(folder: VOCFolder, method: BAM, plan: EpisodePlan) -> list[tuple[str, int, tuple[str, ...]]]:
    source = Recorded(folder.split("list.txt", NOVEL), 1, 49, plan.seed, base_classes=BASE)
    source.asked = []
    scores_of(method, source, plan)
    return source.asked


def test_list_order_goes_over_the_list_again_and_again_whatever_the_seed(folder: VOCFolder, method: BAM) -> None:
    first, second = (asked_of(folder, method, EpisodePlan(13, seed, "list", batch=3)) for seed in (1, 2))
    names = [f"JPEGImages/picture_{i}.jpg" for i in range(6)]
    assert [query for query, _, _ in first] == (names * 3)[:13]
    # a seed draws the supports, and every pass draws anew
    assert [query for query, _, _ in second] == [query for query, _, _ in first]
    assert first != second
    assert first[:6] != first[6:12]


def test_permuted_order_belongs_to_the_seed(folder: VOCFolder, method: BAM) -> None:
    orders = [[query for query, _, _ in asked_of(folder, method, EpisodePlan(6, seed))] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_the_five_seeds_are_those_of_numpys_legacy_generator() -> None:
    assert list(FIVE_SEEDS) == np.random.RandomState(123).randint(0, 1000, 5).tolist()


class InThreads(Processes):
    """Processes whose place threads take: what they add up meets in ``shared``."""

    def __init__(self, rank: int, size: int, shared: list[np.ndarray], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        self.__dict__.update(shared=shared, barrier=barrier)

    def total(self, values: np.ndarray) -> np.ndarray:
        self.barrier.wait(30)
        self.shared[self.rank] = values
        self.barrier.wait(30)
        return np.sum(self.shared, axis=0)


def in_threads(size: int, work: Callable[[Processes], object]) -> list[object]:
    shared, barrier = [np.zeros(0)] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(InThreads(rank, size, shared, barrier)), range(size)))


@pytest.mark.parametrize(("size", "batch"), [(2, 1), (2, 2), (3, 2), (4, 3)])
def test_processes_that_divide_a_validation_all_get_the_scores_of_one(
    sampler: EpisodeSampler, method: BAM, size: int, batch: int
) -> None:
    plan = EpisodePlan(9, 1, batch=batch)
    found = in_threads(size, lambda processes: scores_of(deepcopy(method), sampler, plan, processes=processes))
    assert found == [scores_of(method, sampler, plan)] * size


def test_processes_may_agree_on_a_stop_after_every_round(sampler: EpisodeSampler, method: BAM) -> None:
    """Seven batches of one over three: the last round is not everybody's."""

    def until(asked: int | None, processes: Processes) -> list[int]:
        seen: list[int] = []

        def watch(done: int, total: int) -> None:
            seen.append(done)
            if processes.any(processes.rank == 1 and done == asked):
                raise ValidationStopped

        with nullcontext() if asked is None else pytest.raises(ValidationStopped):
            scores_of(deepcopy(method), sampler, EpisodePlan(7, 1), watch=watch, processes=processes)
        return seen

    assert in_threads(3, lambda processes: until(None, processes)) == [[3, 6]] * 3
    assert in_threads(3, lambda processes: until(3, processes)) == [[3]] * 3
