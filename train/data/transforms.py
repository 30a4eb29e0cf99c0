"""The field's transforms of a picture and its label, exactly as PFENet, BAM and the SVF paper's code apply them.

Picture and label are arrays (float32 RGB 0–255 [H, W, 3] and uint8 [H, W]) until `normalise`. OpenCV does every resize
and warp, because its interpolation is part of the field's numbers. Random numbers come from a source that is passed in;
nothing here reads files or knows of episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from svf_fast.train.data import BACKGROUND, VOID

# OpenCV's type stubs know no dtypes, so these two can only be told apart by name
Picture = NDArray[Any]  # float32 [H, W, 3]
Label = NDArray[Any]  # uint8 [H, W]

# Which label values are the foreground that a random crop must not lose: `ref` 1 alone, as the field's code has it even
# for labels of many classes; `any` every class.
CropKeep = Literal["ref", "any"]

# ImageNet statistics, RGB, for values 0–255
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

_BLACK = (0.0, 0.0, 0.0)
_BLUR_KERNEL_PIXELS = (5, 5)
_CROP_KEEPS_SHARE = 0.85  # of the foreground pixels; a crop with fewer is drawn again
_CROP_RETRIES = 31
_SIDE_MULTIPLE = 8


class RandomSource(Protocol):
    """What the transforms draw from; a `random.Random` is one."""

    def random(self) -> float:
        """Uniform in [0, 1)."""

    def randint(self, a: int, b: int, /) -> int:
        """Uniform among the integers a … b, both included."""


@dataclass(frozen=True)
class Placed:
    """A picture on a square canvas of one colour that is not filled in: most of it would only be copied and dropped."""

    picture: Picture
    top: int  # rows of the canvas above the picture
    left: int  # columns before it
    border: tuple[float, float, float]  # what the canvas is around it


@dataclass(frozen=True)
class Augmentation:
    """What training draws for a picture. The defaults are Pascal-5i's; COCO-20i has `scale_range=(0.8, 1.25)`."""

    scale_range: tuple[float, float] = (0.9, 1.1)
    rotation_range_degrees: tuple[float, float] = (-10.0, 10.0)
    rotation_probability: float = 0.5
    blur_probability: float = 0.5
    flip_probability: float = 0.5
    crop_keep: CropKeep = "ref"

    def __post_init__(self) -> None:
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range is {self.scale_range}; expected (low, high) with 0 < low <= high")
        if self.rotation_range_degrees[0] > self.rotation_range_degrees[1]:
            raise ValueError(
                f"rotation_range_degrees is {self.rotation_range_degrees}; expected (low, high), low <= high"
            )
        for name in ("rotation_probability", "blur_probability", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a probability between 0 and 1")


def augment(
    image: Picture, label: Label, size: int, augmentation: Augmentation, source: RandomSource
) -> tuple[Placed, Label]:
    """The training transforms, in the field's order: scale, rotate, blur, flip, crop to `size` × `size`.

    One number of `source` decides each of scale, rotation, blur and flip, whether or not the step then happens (a
    rotation takes a second one), so that a probability of 0 leaves the rest of the stream where it was.
    """
    image, label = scale(image, label, _between(augmentation.scale_range, source.random()))
    if source.random() < augmentation.rotation_probability:
        image, label = rotate(image, label, _between(augmentation.rotation_range_degrees, source.random()))
    if source.random() < augmentation.blur_probability:
        image = blur(image)
    if source.random() < augmentation.flip_probability:
        image, label = flip(image), flip(label)
    return crop(image, label, size, source, keep=augmentation.crop_keep)


def fit(image: Picture, label: Label, size: int) -> tuple[Placed, Label]:
    """The test transform: the whole picture, resized into the top-left corner of a `size` × `size` canvas.

    The longer side becomes `size`; then each side is rounded down to a multiple of 8. The canvas is 0 in the picture
    (before normalisation, unlike the mean that `crop` pads with) and void in the label.
    """
    if size < _SIDE_MULTIPLE:
        raise ValueError(f"size is {size}; expected at least {_SIDE_MULTIPLE}")
    height, width = label.shape
    ratio = size / max(height, width)
    # the longer side is `size` by definition: `int(long * ratio)` could fall one short
    new_height = _fitted_side(size if height >= width else int(height * ratio))
    new_width = _fitted_side(size if width >= height else int(width * ratio))
    fitted = (new_width, new_height)
    canvas = np.full((size, size), VOID, np.uint8)
    canvas[:new_height, :new_width] = cv2.resize(label, fitted, interpolation=cv2.INTER_NEAREST)
    return Placed(cv2.resize(image, fitted, interpolation=cv2.INTER_LINEAR), 0, 0, _BLACK), canvas


def normalise(placed: Placed, planes: NDArray[np.float32]) -> None:
    """Writes the canvas, with ImageNet's mean taken off and divided by its deviation, into `planes` [3, S, S]."""
    if placed.picture.dtype != np.float32:  # OpenCV would split it into arrays of its own
        raise TypeError(f"the picture is {placed.picture.dtype}; expected float32")
    height, width = placed.picture.shape[:2]
    rows, columns = slice(placed.top, placed.top + height), slice(placed.left, placed.left + width)
    inside = list(planes[:, rows, columns])
    # NumPy takes ten times as long to gather every third number as OpenCV to split, and then to work on whole planes
    cv2.split(placed.picture, inside)
    for channel, (plane, part) in enumerate(zip(planes, inside, strict=True)):
        mean, std = np.float32(MEAN[channel]), np.float32(STD[channel])
        part -= mean
        part /= std
        around = (np.float32(placed.border[channel]) - mean) / std
        plane[: rows.start] = plane[rows.stop :] = around
        plane[rows, : columns.start] = plane[rows, columns.stop :] = around


def scale(image: Picture, label: Label, factor: float) -> tuple[Picture, Label]:
    """Both resized by `factor`, the picture bilinear, the label nearest; no side becomes shorter than a pixel."""
    factor = max(factor, 1 / min(label.shape))
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    return image, cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)


def rotate(image: Picture, label: Label, degrees: float) -> tuple[Picture, Label]:
    """Both turned counter-clockwise about the centre on the same canvas; mean and void come in from outside."""
    height, width = label.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    canvas = (width, height)
    image = cv2.warpAffine(image, matrix, canvas, flags=cv2.INTER_LINEAR, borderValue=MEAN)
    return image, cv2.warpAffine(label, matrix, canvas, flags=cv2.INTER_NEAREST, borderValue=VOID)


def blur(image: Picture) -> Picture:
    """A 5 × 5 Gaussian; OpenCV derives its sigma (1.1 pixels) from the kernel."""
    return cv2.GaussianBlur(image, _BLUR_KERNEL_PIXELS, 0)


def flip(array: NDArray[Any]) -> NDArray[Any]:
    """Left and right exchanged."""
    return cv2.flip(array, 1)


def crop(
    image: Picture, label: Label, size: int, source: RandomSource, *, keep: CropKeep = "ref"
) -> tuple[Placed, Label]:
    """A random `size` × `size` window; a smaller picture is padded evenly with mean and void.

    A window that keeps less than 85 % of the label's foreground (by `keep` the value 1 or every class) is drawn again, at
    most 31 times; the last one stands.
    """
    rows_above, columns_before = max(0, size - label.shape[0]) // 2, max(0, size - label.shape[1]) // 2
    label = _padded(label, size)
    height, width = label.shape
    foreground = label == 1 if keep == "ref" else (label != BACKGROUND) & (label != VOID)
    wanted = _CROP_KEEPS_SHARE * np.count_nonzero(foreground)
    for _ in range(1 + _CROP_RETRIES):
        top, left = source.randint(0, height - size), source.randint(0, width - size)
        window = (slice(top, top + size), slice(left, left + size))
        if np.count_nonzero(foreground[window]) >= wanted:
            break
    # a side that is padded has one position only, so that no window cuts into the padding
    return Placed(image[window], rows_above, columns_before, MEAN), label[window]


def _between(limits: tuple[float, float], position: float) -> float:
    low, high = limits
    return low + (high - low) * position


def _fitted_side(side: int) -> int:
    """Rounded down to a multiple of 8; a picture so narrow that nothing would be left keeps 8 pixels."""
    return max(_SIDE_MULTIPLE, side // _SIDE_MULTIPLE * _SIDE_MULTIPLE)


def _padded(label: Label, size: int) -> Label:
    height, width = label.shape
    missing_rows, missing_columns = max(0, size - height), max(0, size - width)
    top, left = missing_rows // 2, missing_columns // 2
    borders = (top, missing_rows - top, left, missing_columns - left)
    return cv2.copyMakeBorder(label, *borders, cv2.BORDER_CONSTANT, value=VOID)
