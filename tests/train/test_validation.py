"""What BAM's validation says of its branches, against the same figures put together by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from voc_folders import draw, write_folder

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.data.episodes import EpisodeSampler, collate
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.evaluation import FewShotMetrics
from svf_fast.train.methods import BAM
from svf_fast.train.methods.bam import BAMOutputs
from svf_fast.train.validation import Scores, validate

BASE, NOVEL = (1, 3), (2, 4)


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

    def outputs(self, query_image: Tensor, support_images: Tensor, support_labels: Tensor) -> BAMOutputs:
        assert not self.training
        generator = torch.Generator().manual_seed(int(query_image.abs().sum()))
        maps = [torch.randn(1, labels, 7, 7, generator=generator) for labels in (2, 2, 3)]
        return BAMOutputs(*(functional.interpolate(guess, query_image.shape[-2:]) for guess in maps))


@pytest.fixture(scope="module")
def method() -> BAM:
    backbone = build_backbone(BackboneConfig(width=4, blocks=(1, 1, 1, 1)))
    return Guesses(backbone, base_classes=2, shots=1, head_width=8)


def scores_of(method: BAM, sampler: EpisodeSampler, episodes: int = 6) -> Scores:
    return validate(
        method,
        sampler,
        NOVEL,
        episodes=episodes,
        seed=1,
        workers=0,
        device=torch.device("cpu"),
        watch=lambda done, total: None,
    )


def test_branches_are_scored_at_the_original_size_against_their_own_labels(folder: VOCFolder, method: BAM) -> None:
    sampler = EpisodeSampler(folder.split("list.txt", NOVEL), 1, 49, 1, base_classes=BASE)
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
