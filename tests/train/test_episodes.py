"""Episodes: a pure function of (seed, pass, index), with distinct supports of the query's class."""

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from voc_folders import draw, write_folder, write_label

from svf_fast.train.data.episodes import Episode, EpisodeSampler, collate
from svf_fast.train.data.reading import read_label
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Augmentation
from svf_fast.train.data.voc import VOCFolder

SIZES = [(80, 90), (91, 75), (74, 128), (120, 65), (77, 77)]


def labels() -> dict[str, np.ndarray]:
    """Ten pictures: all with a large class 1, half with a large class 2, some with void or a speck of class 3."""
    made = {}
    for i in range(10):
        height, width = SIZES[i % len(SIZES)]
        rectangles = [(1, 3, 1, 34, 62)]
        if i % 2:
            rectangles.append((2, height - 36, 2, 36, 60))
        if i % 3 == 0:
            rectangles.append((255, 0, 0, 2, width))
        if i % 5 == 0:
            rectangles.append((3, height - 1, width - 1, 1, 1))
        made[f"picture_{i}"] = draw(height, width, rectangles)
    return made


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    root = write_folder(tmp_path_factory.mktemp("voc"), labels())
    return VOCFolder(root).split("list.txt", (1, 2))


def assert_same(first: Episode, second: Episode) -> None:
    for name in ("query_image", "query_label", "support_images", "support_labels", "original_label"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert (first.class_id, first.query_name, first.support_names) == (
        second.class_id,
        second.query_name,
        second.support_names,
    )


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
@pytest.mark.parametrize("shots", [1, 3])
def test_episodes_have_the_documented_shapes_and_values(
    split: Split, shots: int, augmentation: Augmentation | None
) -> None:
    sampler = EpisodeSampler(split, shots, 73, augmentation=augmentation)
    assert len(sampler) == 10
    for index in range(len(sampler)):
        episode = sampler.episode(0, index)
        assert episode.query_image.shape == (3, 73, 73)
        assert episode.query_label.shape == (73, 73)
        assert episode.support_images.shape == (shots, 3, 73, 73)
        assert episode.support_labels.shape == (shots, 73, 73)
        assert episode.query_image.dtype == episode.support_images.dtype == torch.float32
        assert episode.query_label.dtype == episode.support_labels.dtype == torch.int64
        assert episode.original_label.dtype == torch.uint8
        assert episode.query_name == f"JPEGImages/picture_{index}.jpg"
        raw = read_label(split.root / split.entries[index].label)
        expected = np.where(raw == 255, 255, raw == episode.class_id)
        np.testing.assert_array_equal(episode.original_label.numpy(), expected)
        assert set(episode.support_labels.unique().tolist()) <= {0, 1, 255}
        assert all((label == 1).any() for label in episode.support_labels)


@pytest.mark.parametrize("shots", [1, 3, 4])
def test_supports_are_distinct_show_the_class_and_are_never_the_query(split: Split, shots: int) -> None:
    sampler = EpisodeSampler(split, shots, 33)
    names = [entry.image for entry in split.entries]
    for pass_index in range(5):
        for index in range(len(sampler)):
            episode = sampler.episode(pass_index, index)
            assert len(set(episode.support_names)) == shots
            assert episode.query_name not in episode.support_names
            files = split.files_of_class[episode.class_id]
            assert {names.index(name) for name in episode.support_names} <= set(files)


def test_all_classes_and_all_supports_are_drawn_about_equally_often(split: Split) -> None:
    sampler = EpisodeSampler(split, 1, 33)
    episodes = [sampler.episode(pass_index, 1) for pass_index in range(600)]
    classes = Counter(episode.class_id for episode in episodes)
    assert 240 < classes[1] < 360
    supports = Counter(episode.support_names for episode in episodes if episode.class_id == 1)
    assert len(supports) == 9  # all but the query
    assert min(supports.values()) > 12  # of about 33


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_an_episode_depends_on_seed_pass_and_index_only(split: Split, augmentation: Augmentation | None) -> None:
    fresh = EpisodeSampler(split, 2, 73, 5, augmentation, cache_bytes=0)
    used = EpisodeSampler(split, 2, 73, 5, augmentation)
    order = [7, 2, 2, 9, 0]
    for index in order:
        used.episode(3, index)
    for index in order:
        assert_same(used.episode(1, index), fresh.episode(1, index))


@pytest.mark.parametrize("shots", [1, 2])
def test_the_choice_of_class_and_supports_is_the_same_at_every_size_and_augmentation(split: Split, shots: int) -> None:
    samplers = [EpisodeSampler(split, shots, 33), EpisodeSampler(split, shots, 73, augmentation=Augmentation())]
    for index in range(len(split)):
        first, second = (sampler.episode(0, index) for sampler in samplers)
        assert (first.class_id, first.support_names) == (second.class_id, second.support_names)


def test_the_choice_is_the_recorded_one_on_every_platform(split: Split) -> None:
    sampler = EpisodeSampler(split, 2, 33, seed=321)
    drawn = [(e.class_id, *(int(n[-5]) for n in e.support_names)) for e in (sampler.episode(4, i) for i in range(5))]
    assert drawn == [(1, 1, 5), (2, 9, 5), (1, 0, 4), (1, 4, 2), (1, 8, 3)]
    assert sampler.training_order(2, 321) == [3, 9, 6, 1, 5, 7, 4, 8, 2, 0]


def test_threads_and_other_processes_get_the_same_episodes(split: Split) -> None:
    sampler = EpisodeSampler(split, 2, 73, augmentation=Augmentation(), cache_bytes=60_000)
    expected = [sampler.episode(0, index) for index in range(len(sampler))]
    with ThreadPoolExecutor(4) as pool:
        for first, second in zip(expected, pool.map(lambda index: sampler.episode(0, index), range(10)), strict=True):
            assert_same(first, second)
    copied = pickle.loads(pickle.dumps(sampler))
    assert_same(copied.episode(0, 3), expected[3])


def test_passes_and_seeds_differ(split: Split) -> None:
    first, other_pass = (EpisodeSampler(split, 1, 73, 1, Augmentation()).episode(p, 0) for p in (0, 1))
    other_seed = EpisodeSampler(split, 1, 73, 2, Augmentation()).episode(0, 0)
    assert not torch.equal(first.query_image, other_pass.query_image)
    assert not torch.equal(first.query_image, other_seed.query_image)


def test_a_speck_of_a_class_can_be_the_query_but_not_a_support(tmp_path: Path) -> None:
    made = {f"large_{i}": draw(80, 90, [(1, 0, 0, 40, 60)]) for i in range(2)}
    made["speck"] = draw(80, 90, [(1, 79, 89, 1, 1), (2, 0, 0, 40, 60)])
    made["other"] = draw(80, 90, [(2, 0, 0, 40, 60)])
    split = VOCFolder(write_folder(tmp_path, made)).split("list.txt", (1, 2))
    sampler = EpisodeSampler(split, 1, 33)
    episodes = [sampler.episode(pass_index, 2) for pass_index in range(40)]
    assert {episode.class_id for episode in episodes} == {1, 2}
    supports = {name for episode in episodes if episode.class_id == 1 for name in episode.support_names}
    assert supports == {"JPEGImages/large_0.jpg", "JPEGImages/large_1.jpg"}


@pytest.mark.parametrize(
    ("shots", "message"), [(5, r"class 2 \(two\) has 5 usable pictures"), (10, r"class 1 \(one\)")]
)
def test_a_class_with_too_few_pictures_is_named_before_anything_is_drawn(
    split: Split, shots: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(split, shots, 73)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path, labels())
    split = VOCFolder(root).split("list.txt", (1,))
    (root / "JPEGImages/picture_4.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"picture_4\.jpg does not exist"):
        EpisodeSampler(split, 1, 73).episode(0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shots": 0}, "shots is 0"), ({"size": 7}, "size is 7"), ({"cache_bytes": -1}, "limit_bytes is -1")],
)
def test_impossible_samplers_are_refused(split: Split, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(split, **arguments)


@pytest.mark.parametrize("index", [-1, 10])
def test_there_is_an_episode_for_every_query_only(split: Split, index: int) -> None:
    with pytest.raises(IndexError, match=f"index is {index}; the split has 10 query pictures"):
        EpisodeSampler(split).episode(0, index)


def test_training_meets_every_query_once_an_epoch_in_another_order(split: Split) -> None:
    sampler = EpisodeSampler(split)
    orders = [sampler.training_order(epoch, seed) for epoch in range(3) for seed in (1, 2)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert sampler.training_order(1, 1) == orders[2]


@pytest.mark.parametrize("order", ["permuted", "list"])
@pytest.mark.parametrize("count", [1, 9, 10, 27])
def test_validation_takes_as_many_passes_as_it_needs(split: Split, count: int, order: str) -> None:
    pairs = EpisodeSampler(split).validation_indices(count, 321, order)
    assert len(pairs) == len(set(pairs)) == count
    times = Counter(index for _, index in pairs)
    assert max(times.values()) - min(times.get(index, 0) for index in range(10)) <= 1
    assert [pass_index for pass_index, _ in pairs] == [n // 10 for n in range(count)]
    if order == "list":
        assert [index for _, index in pairs] == [n % 10 for n in range(count)]


def test_validation_orders_are_refused_when_unknown_or_empty(split: Split) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        EpisodeSampler(split).validation_indices(0, 321)
    with pytest.raises(ValueError, match="order is 'random'; expected 'permuted' or 'list'"):
        EpisodeSampler(split).validation_indices(5, 321, "random")


def test_a_batch_stacks_episodes_and_keeps_labels_of_different_sizes(split: Split) -> None:
    sampler = EpisodeSampler(split, 2, 73)
    episodes = [sampler.episode(0, index) for index in range(3)]
    batch = collate(episodes).to("cpu")
    assert len(batch) == 3
    assert batch.query_images.shape == (3, 3, 73, 73)
    assert batch.query_labels.shape == (3, 73, 73)
    assert batch.support_images.shape == (3, 2, 3, 73, 73)
    assert batch.support_labels.shape == (3, 2, 73, 73)
    assert [tuple(label.shape) for label in batch.original_labels] == SIZES[:3]
    for b, episode in enumerate(episodes):
        assert torch.equal(batch.support_labels[b], episode.support_labels)
        assert batch.class_ids[b] == episode.class_id
        assert batch.support_names[b] == episode.support_names


def test_batches_of_nothing_or_of_different_shapes_are_refused(split: Split) -> None:
    with pytest.raises(ValueError, match="episodes is empty"):
        collate([])
    with pytest.raises(ValueError, match="supports of different shapes"):
        collate([EpisodeSampler(split, shots, 33).episode(0, 0) for shots in (1, 2)])


def test_a_label_that_no_longer_shows_its_class_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path, labels())
    sampler = EpisodeSampler(VOCFolder(root).split("list.txt", (1,)), 1, 73)
    for path in (root / "SegmentationClass").glob("*.png"):
        write_label(path, np.zeros_like(read_label(path)))
    with pytest.raises(ValueError, match=r"picture_\d\.png shows no pixel of class 1, but the census or fold index of"):
        sampler.episode(0, 0)
