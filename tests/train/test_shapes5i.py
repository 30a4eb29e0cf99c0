"""What Shapes-5i promises: a VOC layout, lists that keep novel classes apart, the same masks everywhere, nothing half-written."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svf_fast.train.data import shapes5i
from svf_fast.train.data.folds import fold_of
from svf_fast.train.data.reading import read_image, read_label
from svf_fast.train.data.shapes5i import CLASS_NAMES, FOLDS, generate
from svf_fast.train.data.voc import VOCFolder

IMAGES, SIZE = 250, 152


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data") / "shapes5i", seed=7, images=IMAGES, size=SIZE)


def _labels(root: Path) -> list[np.ndarray]:
    return [read_label(path) for path in sorted((root / "SegmentationClass").iterdir())]


def _listed(root: Path, fold: int, part: str) -> list[list[str]]:
    return [line.split() for line in (root / "lists" / f"fold{fold}_{part}.txt").read_text().splitlines()]


def _classes(label: np.ndarray) -> set[int]:
    return {int(value) for value in np.unique(label)} - {0, 255}


def test_every_picture_has_a_mask_of_its_size_with_voc_colours(root: Path) -> None:
    images = sorted((root / "JPEGImages").iterdir())
    assert len(images) == IMAGES
    for path in images[:20]:
        mask_path = root / "SegmentationClass" / f"{path.stem}.png"
        height, width = read_image(path).shape[:2]
        assert read_label(mask_path).shape == (height, width)
        assert max(height, width) == SIZE
        assert 0.74 * SIZE <= min(height, width) <= SIZE
        with Image.open(mask_path) as mask:
            palette = mask.getpalette()
        assert mask.mode == "P"
        assert palette is not None
        assert [tuple(palette[3 * i : 3 * i + 3]) for i in (0, 1, 2, 20, 255)] == [
            (0, 0, 0),
            (128, 0, 0),
            (0, 128, 0),
            (0, 64, 128),
            (224, 224, 192),
        ]


def test_labels_hold_class_ids_and_void_only_and_every_class_is_there(root: Path) -> None:
    shown = set().union(*(_classes(label) for label in _labels(root)))
    assert shown == set(range(1, 21))
    assert len(CLASS_NAMES) == 20
    assert VOCFolder(root).classes == dict(enumerate(CLASS_NAMES, start=1))


def test_void_lies_between_any_two_labels(root: Path) -> None:
    for label in _labels(root)[:60]:
        for first, second in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            differ = (first != second) & (first != 255) & (second != 255)
            assert not differ.any()


@pytest.mark.parametrize("fold", range(FOLDS))
def test_training_pictures_show_no_novel_class_and_validation_pictures_show_one(root: Path, fold: int) -> None:
    novel = set(fold_of("pascal", fold).novel)
    training, validation = _listed(root, fold, "train"), _listed(root, fold, "val")
    assert training
    assert validation
    assert all(not _classes(read_label(root / mask)) & novel for _, mask in training)
    assert all(_classes(read_label(root / mask)) & novel for _, mask in validation)
    assert not {image for image, _ in training} & {image for image, _ in validation}


def test_two_lists_hold_every_picture_of_their_part(root: Path) -> None:
    for part, count in (("train", IMAGES - IMAGES // 5), ("val", IMAGES // 5)):
        images = [line.split()[0] for line in (root / "lists" / f"{part}.txt").read_text().splitlines()]
        stems = (root / "ImageSets" / "Segmentation" / f"{part}.txt").read_text().splitlines()
        assert images == [f"JPEGImages/{stem}.jpg" for stem in stems]
        assert len(images) == count


@pytest.mark.parametrize("fold", range(FOLDS))
def test_the_reader_of_voc_folders_finds_episodes_in_every_fold(root: Path, fold: int) -> None:
    classes = fold_of("pascal", fold)
    training = VOCFolder(root).split(f"lists/fold{fold}_train.txt", classes.base, drop_images_with=classes.novel)
    validation = VOCFolder(root).split(f"lists/fold{fold}_val.txt", classes.novel)
    assert len(training) > 40
    assert all(len(files) >= 2 for files in training.files_of_class.values())
    assert len(validation) > 10


def test_masks_are_the_same_on_every_machine(tmp_path: Path) -> None:
    generate(tmp_path / "data", seed=321, images=12, size=SIZE)
    checksum = 0
    for label in _labels(tmp_path / "data"):
        checksum = zlib.crc32(label.tobytes(), checksum)
    assert checksum == 1316309877


def test_a_picture_does_not_depend_on_how_many_are_drawn(root: Path, tmp_path: Path) -> None:
    few = generate(tmp_path / "few", seed=7, images=5, size=SIZE)
    for path in sorted((few / "JPEGImages").iterdir()):
        assert path.read_bytes() == (root / "JPEGImages" / path.name).read_bytes()
        mask = f"SegmentationClass/{path.stem}.png"
        assert (few / mask).read_bytes() == (root / mask).read_bytes()


def test_another_seed_draws_other_pictures(root: Path, tmp_path: Path) -> None:
    other = generate(tmp_path / "other", seed=8, images=5, size=SIZE)
    name = "JPEGImages/shapes_000000.jpg"
    assert (other / name).read_bytes() != (root / name).read_bytes()


def test_the_same_request_draws_nothing_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes5i, "draw", None)
    assert generate(root, seed=7, images=IMAGES, size=SIZE) == root


def test_a_folder_with_something_else_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="does not hold Shapes-5i with seed 9"):
        generate(root, seed=9, images=IMAGES, size=SIZE)
    (tmp_path / "photographs").mkdir()
    with pytest.raises(FileExistsError, match="photographs"):
        generate(tmp_path / "photographs", images=10, size=SIZE)


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == 10
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "data", images=10, size=SIZE, on_picture=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"seed": -1}, "seed: found -1"),
        ({"images": 4}, "images: found 4, expected at least 5"),
        ({"size": 20}, "size: found 20 pixels, expected at least 64"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        generate(tmp_path / "data", **settings)
    assert list(tmp_path.iterdir()) == []
