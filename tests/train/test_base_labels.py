"""Base labels: their values, in episodes under the very draws of the episode's label, and pictures under them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from voc_folders import draw, write_folder

from svf_fast.train.data.base_labels import BasePictures, base_label_values, stack
from svf_fast.train.data.episodes import Episode, EpisodeSampler, collate
from svf_fast.train.data.generalised import GeneralisedSampler
from svf_fast.train.data.reading import read_label, read_pair
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Augmentation, CropKeep, augment, crop, fit
from svf_fast.train.data.voc import VOCFolder

BASE = (2, 4)
SIZE = 73


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> VOCFolder:
    """Six pictures: the base classes 2 and 4 large, 1 and 3 (novel) and void beside them."""
    made = {}
    for i in range(6):
        own = [(2, 2, 3, 40, 56), (4, 45, 60, 46, 50), (1, 5, 70, 20, 20), (3, 60, 5, 9, 30), (255, 0, 0, 2, 120)]
        made[f"picture_{i}"] = np.roll(draw(96 + i, 120, own), i, axis=1)
    made["novel_only"] = draw(80, 90, [(1, 0, 0, 60, 60)])
    return VOCFolder(write_folder(tmp_path_factory.mktemp("voc"), made))


@pytest.fixture(scope="module")
def split(folder: VOCFolder) -> Split:
    return folder.split("list.txt", BASE)


class Replay:
    """The numbers that a recorded random source gave; of the crop's offsets, which it may draw again and again, the
    last ones, each time."""

    def __init__(self, recorded: Recorder) -> None:
        self.uniform = iter(recorded.uniform)
        self.offsets = recorded.offsets[-2:]
        self.drawn = 0

    def random(self) -> float:
        return next(self.uniform)

    def randint(self, a: int, b: int, /) -> int:
        self.drawn += 1
        return self.offsets[(self.drawn - 1) % 2]


class Recorder:
    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.uniform: list[float] = []
        self.offsets: list[int] = []

    def random(self) -> float:
        self.uniform.append(self.source.random())
        return self.uniform[-1]

    def randint(self, a: int, b: int, /) -> int:
        self.offsets.append(self.source.randint(a, b))
        return self.offsets[-1]


def test_a_base_class_has_its_position_plus_one_void_stays_all_else_is_background() -> None:
    values = base_label_values((9, 3, 20))
    assert [values[c] for c in (3, 9, 20, 255)] == [1, 2, 3, 255]
    assert values.sum() == 1 + 2 + 3 + 255


@pytest.mark.parametrize("augmentation", [None, Augmentation(), Augmentation(scale_range=(0.5, 2.0))])
def test_base_labels_change_nothing_else_in_an_episode(split: Split, augmentation: Augmentation | None) -> None:
    plain = EpisodeSampler(split, 2, SIZE, 5, augmentation)
    with_base = EpisodeSampler(split, 2, SIZE, 5, augmentation, base_classes=BASE)
    for index in range(len(split)):
        first, second = plain.episode(3, index), with_base.episode(3, index)
        for name in ("query_image", "query_label", "support_images", "support_labels", "original_label"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert (first.base_label, first.original_base_label, first.category) == (None, None, None)


def test_the_base_label_went_through_the_episode_labels_draws(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the base label transformed on its own by the same numbers."""
    recorders: list[Recorder] = []

    def recorded(picture, label, size, augmentation, source):
        recorders.append(Recorder(source.randint(0, 2**30)))
        return augment(picture, label, size, augmentation, recorders[-1])

    monkeypatch.setattr("svf_fast.train.data.episodes.augment", recorded)
    augmentation = Augmentation(scale_range=(0.6, 1.6))
    sampler = EpisodeSampler(split, 1, SIZE, 5, augmentation, base_classes=BASE)
    seen = set()
    for pass_index in range(6):
        for index, entry in enumerate(split.entries):
            recorders.clear()
            episode = sampler.episode(pass_index, index)
            image, classes = read_pair(split.root / entry.image, split.root / entry.label)
            alone = base_label_values(BASE)[classes]
            expected = augment(image.astype(np.float32), alone, SIZE, augmentation, Replay(recorders[0]))[1]
            assert episode.base_label is not None
            np.testing.assert_array_equal(episode.base_label.numpy(), expected)
            require_consistent(episode)
            seen |= set(episode.base_label.unique().tolist())
    assert seen == {0, 1, 2, 255}


def require_consistent(episode: Episode) -> None:
    """The episode's class has one place in both labels; void is void in both."""
    assert episode.base_label is not None
    assert episode.category == BASE.index(episode.class_id)
    assert torch.equal(episode.base_label == episode.category + 1, episode.query_label == 1)
    assert torch.equal(episode.base_label == 255, episode.query_label == 255)
    assert episode.base_label.dtype == torch.int64


def test_a_novel_episode_has_a_base_label_and_no_category(folder: VOCFolder) -> None:
    sampler = GeneralisedSampler(folder.whole("list.txt", (1, 3)), BASE, 1, SIZE, 0)
    episode = sampler.episode(0, 0)
    entry = sampler.split.entries[0]
    classes = read_label(folder.root / entry.label)
    assert episode.category is None
    assert episode.original_base_label is not None
    assert episode.base_label is not None
    np.testing.assert_array_equal(episode.original_base_label.numpy(), base_label_values(BASE)[classes])
    image = np.zeros((*classes.shape, 3), np.float32)
    np.testing.assert_array_equal(episode.base_label.numpy(), fit(image, base_label_values(BASE)[classes], SIZE)[1])


def test_a_batch_stacks_base_labels_and_categories_or_has_none(split: Split) -> None:
    episodes = [EpisodeSampler(split, 1, SIZE, base_classes=BASE).episode(0, index) for index in range(3)]
    batch = collate(episodes).to("cpu")
    assert batch.base_labels is not None
    assert batch.categories is not None
    assert batch.original_base_labels is not None
    assert batch.base_labels.shape == (3, SIZE, SIZE)
    assert (batch.categories.dtype, batch.categories.tolist()) == (torch.int64, [e.category for e in episodes])
    assert len(batch.original_base_labels) == 3
    plain = collate([EpisodeSampler(split, 1, SIZE).episode(0, 0)])
    assert (plain.base_labels, plain.categories, plain.original_base_labels) == (None, None, None)


def test_a_whole_list_leaves_nothing_out(folder: VOCFolder) -> None:
    whole = folder.whole("list.txt", BASE)
    assert len(whole) == 7
    assert whole.entries[0].present_classes == (1, 2, 3, 4)
    assert whole.entries[6].present_classes == (1,)
    assert whole.files_of_class == {2: tuple(range(6)), 4: tuple(range(6))}
    assert folder.whole("list.txt", (3,)).files_of_class == {3: tuple(range(6))}  # too small for split()
    with pytest.raises(ValueError, match=r"class_ids holds \[9\]"):
        folder.whole("list.txt", (9,))


def test_base_pictures_depend_on_seed_pass_and_index_only(folder: VOCFolder) -> None:
    whole = folder.whole("list.txt", BASE)
    fresh = BasePictures(whole, BASE, SIZE, 3, Augmentation(), cache_bytes=0)
    used = BasePictures(whole, BASE, SIZE, 3, Augmentation())
    for index in (5, 1, 1, 6):
        used.picture(0, index)
    first, second = fresh.picture(2, 4), used.picture(2, 4)
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.label, second.label)
    assert not torch.equal(first.image, fresh.picture(1, 4).image)
    assert not torch.equal(first.image, BasePictures(whole, BASE, SIZE, 4, Augmentation()).picture(2, 4).image)
    assert sorted(used.training_order(0, 1)) == list(range(7))
    assert used.training_order(0, 1) != used.training_order(1, 1)


def test_tested_pictures_are_fitted_and_stacked(folder: VOCFolder) -> None:
    pictures = BasePictures(folder.whole("list.txt", BASE), BASE, SIZE, 3)
    batch = stack([pictures.picture(0, index) for index in (0, 6)]).to("cpu")
    assert batch.images.shape == (2, 3, SIZE, SIZE)
    assert (batch.labels.shape, batch.labels.dtype) == ((2, SIZE, SIZE), torch.int64)
    assert set(batch.labels[0].unique().tolist()) == {0, 1, 2, 255}
    assert set(batch.labels[1].unique().tolist()) == {0, 255}  # a novel class is background here


def test_a_crop_may_keep_every_class_instead_of_the_first_alone() -> None:
    picture = np.zeros((100, 100, 3), np.float32)
    second = draw(100, 100, [(255, 0, 0, 100, 4), (2, 20, 20, 20, 20)])

    def kept(label: np.ndarray, keep: CropKeep) -> list[np.ndarray]:
        return [crop(picture, label, SIZE, random.Random(seed), keep=keep)[1] for seed in range(40)]

    shares = {keep: [np.count_nonzero(label == 2) / 400 for label in kept(second, keep)] for keep in ("ref", "any")}
    assert min(shares["any"]) >= 0.85
    assert min(shares["ref"]) < 0.85
    first = np.where(second == 2, 1, second).astype(np.uint8)
    assert np.array_equal(kept(first, "any"), kept(first, "ref"))
    # what only void and background fill is taken at the first draw by both
    empty = draw(100, 100, [(255, 0, 0, 50, 100)])
    assert np.array_equal(kept(empty, "any"), kept(empty, "ref"))


def test_base_pictures_crop_as_the_augmentation_says(folder: VOCFolder) -> None:
    whole = folder.whole("list.txt", BASE)
    ref, every = (
        BasePictures(whole, BASE, SIZE, 3, Augmentation(scale_range=(0.8, 0.8), crop_keep=keep))
        for keep in ("ref", "any")
    )
    kept = [[int((p.picture(i, 0).label % 255 > 0).sum()) for i in range(12)] for p in (ref, every)]
    assert sum(kept[1]) > sum(kept[0])


def test_pictures_with_a_dropped_class_are_left_out_of_a_whole_list(folder: VOCFolder) -> None:
    assert len(folder.whole("list.txt", BASE, drop_images_with=())) == 7
    with pytest.raises(ValueError, match=r"list\.txt leaves no picture without a class of \[1\]$"):
        folder.whole("list.txt", BASE, drop_images_with=(1,))


def test_a_sampler_under_another_seed_is_as_a_new_one_and_reads_nothing_again(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = EpisodeSampler(split, 2, SIZE, 5, Augmentation(), base_classes=BASE)
    expected = [EpisodeSampler(split, 2, SIZE, 6, Augmentation(), base_classes=BASE).episode(0, i) for i in range(6)]
    before = [first.episode(0, index) for index in range(6)]
    monkeypatch.setattr("svf_fast.train.data.cache.read_pair", None)
    other = first.with_seed(6)
    for index in range(6):
        for sampler, wanted in ((other, expected[index]), (first, before[index])):
            found = sampler.episode(0, index)
            assert found.support_names == wanted.support_names
            assert torch.equal(found.query_image, wanted.query_image)
    assert (first.seed, other.seed) == (5, 6)
