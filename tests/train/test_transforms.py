"""Every transform against recorded results of the field's code, and on pictures too small, too thin or void."""

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from svf_fast.train.data import transforms
from svf_fast.train.data.transforms import (
    MEAN,
    STD,
    Augmentation,
    Placed,
    augment,
    crop,
    fit,
    flip,
    normalise,
    rotate,
    scale,
)

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
needs_golden = pytest.mark.skipif(not (GOLDEN / "data.npz").is_file(), reason="the golden parity data are not here")

NOTHING_RANDOM = Augmentation((1.0, 1.0), (0.0, 0.0), 0, 0, 0)


class Scripted:
    """A random source that gives what it is told: numbers for random(), offsets for randint()."""

    def __init__(self, numbers: list[float] | None = None, offsets: list[int] | None = None) -> None:
        self.numbers, self.offsets = numbers or [], offsets or []
        self.ranges: list[tuple[int, int]] = []

    def random(self) -> float:
        return self.numbers.pop(0)

    def randint(self, a: int, b: int, /) -> int:
        self.ranges.append((a, b))
        return self.offsets.pop(0) if self.offsets else a


def noise(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.float32)
    return image, rng.choice(np.array([0, 1, 255], np.uint8), (height, width))


def filled(placed: Placed, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole canvas as one picture, and the label."""
    canvas = np.full((*label.shape, 3), placed.border, np.float32)
    height, width = placed.picture.shape[:2]
    canvas[placed.top : placed.top + height, placed.left : placed.left + width] = placed.picture
    return canvas, label


def normalised(placed: Placed, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    planes = np.full((3, *label.shape), np.nan, np.float32)
    normalise(placed, planes)
    return planes, label


@pytest.fixture(scope="module")
def fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_golden(name: str, image: np.ndarray, label: np.ndarray) -> None:
    with np.load(GOLDEN / "data.npz") as golden:
        np.testing.assert_array_equal(label, golden[f"{name}/label"])
        np.testing.assert_allclose(image, golden[f"{name}/image"], rtol=0, atol=1e-3)


@needs_golden
@pytest.mark.parametrize(("height", "width"), [(100, 131), (131, 100), (60, 60)])
def test_fit_agrees_with_the_field(fill: ModuleType, height: int, width: int) -> None:
    assert_golden(f"resize_{height}x{width}", *normalised(*fit(*fill.make_photo(height, width), 73)))


@needs_golden
def test_single_steps_agree_with_the_field(fill: ModuleType) -> None:
    image, label = fill.make_photo(100, 131)
    assert_golden("scale_0.93", *scale(image, label, 0.93))
    assert_golden("rotate_7", *rotate(image, label, 7.0))
    assert_golden("blur", transforms.blur(image), label)


@needs_golden
def test_cropping_with_padding_agrees_with_the_field(fill: ModuleType) -> None:
    source = Scripted(offsets=[0, 42] + 31 * [0, 30])
    assert_golden("crop_pad", *filled(*crop(*fill.make_photo(60, 131), 73, source)))


@needs_golden
@pytest.mark.parametrize("seed", range(4))
def test_the_whole_pipeline_agrees_with_the_field_and_draws_as_many_numbers(fill: ModuleType, seed: int) -> None:
    source = random.Random(seed)
    augmented = augment(*fill.make_photo(100, 131), 73, Augmentation(), source)
    assert_golden(f"pipeline_seed{seed}", *normalised(*augmented))
    recorded = json.loads((GOLDEN / "data.json").read_text())["items"][f"pipeline_seed{seed}"]
    assert source.random() == recorded["next_random"]


def plain_training(image, label, size: int, source: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Every step on whole arrays, the padding filled in before the crop, the channels gathered last."""
    image, label = scale(image, label, 0.9 + (1.1 - 0.9) * source.random())
    if source.random() < 0.5:
        image, label = rotate(image, label, -10 + 20 * source.random())
    if source.random() < 0.5:
        image = transforms.blur(image)
    if source.random() < 0.5:
        image, label = flip(image), flip(label)
    rows, columns = (max(0, size - side) for side in label.shape)
    borders = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
    image = cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=MEAN)
    label = cv2.copyMakeBorder(label, *borders, cv2.BORDER_CONSTANT, value=255)
    wanted = 0.85 * (label == 1).sum()
    for _ in range(32):
        top, left = (source.randint(0, side - size) for side in label.shape)
        window = (slice(top, top + size), slice(left, left + size))
        if (label[window] == 1).sum() >= wanted:
            break
    return plain_normalised(image[window]), label[window]


def plain_normalised(image: np.ndarray) -> np.ndarray:
    return ((image - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (40, 30), (60, 131), (131, 60), (73, 73), (150, 170)])
def test_training_pictures_are_those_of_the_plain_order_bit_for_bit(height: int, width: int) -> None:
    image, label = noise(height, width)
    label[height // 3 : height // 2, width // 4 : width // 2] = 1
    for seed in range(12):
        sources = random.Random(seed), random.Random(seed)
        planes, cropped_label = normalised(*augment(image, label, 73, Augmentation(), sources[0]))
        expected, expected_label = plain_training(image, label, 73, sources[1])
        np.testing.assert_array_equal(planes, expected)
        np.testing.assert_array_equal(cropped_label, expected_label)
        assert sources[0].random() == sources[1].random()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (60, 131), (131, 60), (73, 73), (1, 300)])
def test_a_placed_picture_is_normalised_as_the_whole_canvas_bit_for_bit(height: int, width: int) -> None:
    placed, label = fit(*noise(height, width), 73)
    np.testing.assert_array_equal(normalised(placed, label)[0], plain_normalised(filled(placed, label)[0]))


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_opencv_threads_changes_nothing(threads: int) -> None:
    image, label = noise(300, 400)
    before = cv2.getNumThreads()
    made = []
    try:
        for count in (before, threads):
            cv2.setNumThreads(count)
            made.append([normalised(*augment(image, label, 73, Augmentation(), random.Random(n)))[0] for n in range(6)])
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (9, 1), (33, 50), (200, 31)])
def test_planes_are_normalised(height: int, width: int) -> None:
    image, label = noise(height, width)
    planes, _ = normalised(Placed(image, 0, 0, MEAN), label)
    expected = ((image.astype(np.float64) - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(planes, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_of_another_type_is_refused() -> None:
    image, label = noise(9, 9)
    with pytest.raises(TypeError, match="the picture is uint8; expected float32"):
        normalised(Placed(image.astype(np.uint8), 0, 0, MEAN), label)


@pytest.mark.parametrize("size", [8, 33, 73])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (2, 3), (57, 41), (41, 57), (73, 73), (1, 300), (300, 1), (299, 300), (7, 100)]
)
def test_fit_fills_the_top_left_corner_and_nothing_else(height: int, width: int, size: int) -> None:
    image, label = noise(height, width)
    image, label = image + 1, np.ones_like(label)  # 0 and void only come from the canvas
    fitted_image, fitted_label = filled(*fit(image, label, size))
    assert fitted_image.shape == (size, size, 3)
    assert fitted_label.shape == (size, size)
    longer, shorter = size // 8 * 8, max(8, int(min(height, width) * (size / max(height, width))) // 8 * 8)
    if height == width:
        shorter = longer
    rows, columns = (longer, shorter) if height >= width else (shorter, longer)
    inside = np.zeros((size, size), bool)
    inside[:rows, :columns] = True
    np.testing.assert_array_equal(fitted_label, np.where(inside, 1, 255))
    np.testing.assert_array_equal((fitted_image > 0).all(axis=2), inside)


def test_a_size_too_small_to_fit_into_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 7; expected at least 8"):
        fit(*noise(20, 20), 7)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (31, 17), (73, 73), (74, 200), (500, 375)])
@pytest.mark.parametrize("scale_range", [(0.9, 1.1), (0.3, 0.4), (0.5, 2.0)])
def test_augmented_pictures_have_the_size_asked_for_and_no_new_labels(
    height: int, width: int, scale_range: tuple[float, float]
) -> None:
    image, label = noise(height, width)
    source = random.Random(height * width)
    for _ in range(3):
        cropped, cropped_label = filled(*augment(image, label, 73, Augmentation(scale_range=scale_range), source))
        assert cropped.shape == (73, 73, 3)
        assert cropped_label.shape == (73, 73)
        assert cropped_label.dtype == np.uint8
        assert set(np.unique(cropped_label)) <= {0, 1, 255}
        assert cropped.min() >= 0
        assert cropped.max() <= 255


def test_the_inputs_are_left_as_they_were() -> None:
    image, label = noise(90, 80)
    before = image.copy(), label.copy()
    for array in (image, label):
        array.setflags(write=False)
    for seed in range(5):
        augment(image, label, 73, Augmentation(), random.Random(seed))
    fit(image, label, 73)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])


def test_without_random_steps_a_picture_of_the_right_size_comes_through_unchanged() -> None:
    image, label = noise(73, 73)
    same, same_label = filled(*augment(image, label, 73, NOTHING_RANDOM, random.Random(0)))
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(same_label, label)


@pytest.mark.parametrize(
    ("numbers", "augmentation"),
    [
        # scale, rotation, blur, flip; a rotation takes one more for its angle
        ([0.5, 0.5, 0.5, 0.5], Augmentation()),
        ([0.5, 0.49, 0.5, 0.5, 0.5], Augmentation()),
        ([0.5, 0.0, 0.0, 0.0], NOTHING_RANDOM),
        ([0.5, 0.99, 0.1, 0.99, 0.99], Augmentation(rotation_probability=1, blur_probability=1, flip_probability=1)),
    ],
)
def test_each_step_takes_its_number_whether_or_not_it_happens(numbers: list[float], augmentation: Augmentation) -> None:
    source = Scripted(numbers)
    augment(*noise(80, 80), 73, augmentation, source)
    assert source.numbers == []


def test_flipping_moves_picture_and_label_together() -> None:
    image, label = noise(73, 73)
    flips = Augmentation((1, 1), (0, 0), 0, 0, 1)
    flipped, flipped_label = filled(*augment(image, label, 73, flips, random.Random(0)))
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    np.testing.assert_array_equal(flipped_label, label[:, ::-1])


def test_rotation_brings_in_mean_and_void() -> None:
    image, label = rotate(np.full((60, 60, 3), 7, np.float32), np.ones((60, 60), np.uint8), 10.0)
    assert label[0, 0] == 255
    np.testing.assert_allclose(image[0, 0], MEAN, rtol=1e-6)
    assert label[30, 30] == 1


@pytest.mark.parametrize("degrees", [90.0, -90.0])
def test_positive_angles_turn_counter_clockwise(degrees: float) -> None:
    label = np.zeros((41, 41), np.uint8)
    label[20, 35] = 1  # right of the centre
    _, turned = rotate(np.zeros((41, 41, 3), np.float32), label, degrees)
    row, column = np.argwhere(turned == 1)[0]
    assert abs(column - 20) <= 1
    assert (row < 20) == (degrees > 0)


def test_padding_is_even_with_the_odd_pixel_below_and_right() -> None:
    image, label = np.full((10, 20, 3), 7, np.float32), np.ones((10, 20), np.uint8)
    source = Scripted()
    padded, padded_label = filled(*crop(image, label, 73, source))
    assert source.ranges == [(0, 0), (0, 0)]
    rows, columns = np.nonzero(padded_label == 1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (31, 40, 26, 45)
    np.testing.assert_allclose(padded[padded_label == 255], np.broadcast_to(MEAN, (73 * 73 - 200, 3)), rtol=1e-6)


def test_offsets_are_drawn_row_first_over_all_positions() -> None:
    source = Scripted(offsets=[4, 9])
    label = np.zeros((80, 90), np.uint8)
    label[4, 9] = 1
    _, window = crop(np.zeros((80, 90, 3), np.float32), label, 73, source)
    assert source.ranges == [(0, 7), (0, 17)]
    assert window[0, 0] == 1


@pytest.mark.parametrize(
    ("kept_rows", "draws"),
    [
        (17, 1),
        (16, 32),
    ],  # of 20 rows of foreground: 85 % is enough, less is not, and after 31 retries the last one stands
)
def test_a_crop_that_loses_the_object_is_drawn_again(kept_rows: int, draws: int) -> None:
    label = np.zeros((100, 73), np.uint8)
    label[73 - kept_rows : 93 - kept_rows] = 1
    source = Scripted()  # always offset 0
    _, window = crop(np.zeros((100, 73, 3), np.float32), label, 73, source)
    assert len(source.ranges) == 2 * draws
    assert (window == 1).sum() == kept_rows * 73


def test_a_label_without_the_class_takes_the_first_crop() -> None:
    source = Scripted()
    crop(np.zeros((100, 100, 3), np.float32), np.full((100, 100), 255, np.uint8), 73, source)
    assert len(source.ranges) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_range": (0.0, 1.0)}, "scale_range is"),
        ({"scale_range": (1.1, 0.9)}, "scale_range is"),
        ({"rotation_range_degrees": (5.0, -5.0)}, "rotation_range_degrees is"),
        ({"blur_probability": 1.5}, "blur_probability is 1.5; expected a probability"),
        ({"flip_probability": -0.1}, "flip_probability is -0.1"),
    ],
)
def test_impossible_augmentations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**changes)
