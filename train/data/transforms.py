"""The field's transforms of a picture and its label, exactly as PFENet, BAM and the SVF paper's code apply them.

Picture and label are arrays (float32 RGB 0–255 [H, W, 3] and uint8 [H, W]) until `to_tensors`. OpenCV does every resize
and warp, because its interpolation is part of the field's numbers. Random numbers come from a source that is passed in;
nothing here reads files or knows of episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svf_fast.train.data import VOID

# OpenCV's type stubs know no dtypes, so these two can only be told apart by name
Picture = NDArray[Any]  # float32 [H, W, 3]
Label = NDArray[Any]  # uint8 [H, W]

# ImageNet statistics, RGB, for values 0–255
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

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
class Augmentation:
    """What training draws for a picture. The defaults are Pascal-5i's; COCO-20i has `scale_range=(0.8, 1.25)`."""

    scale_range: tuple[float, float] = (0.9, 1.1)
    rotation_range_degrees: tuple[float, float] = (-10.0, 10.0)
    rotation_probability: float = 0.5
    blur_probability: float = 0.5
    flip_probability: float = 0.5

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
) -> tuple[Picture, Label]:
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
    return crop(image, label, size, source)


def fit(image: Picture, label: Label, size: int) -> tuple[Picture, Label]:
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
    image_canvas = np.zeros((size, size, 3), np.float32)
    label_canvas = np.full((size, size), VOID, np.uint8)
    image_canvas[:new_height, :new_width] = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    label_canvas[:new_height, :new_width] = cv2.resize(label, (new_width, new_height), interpolation=cv2.INTER_NEAREST)
    return image_canvas, label_canvas


def to_tensors(image: Picture, label: Label) -> tuple[Tensor, Tensor]:
    """Normalised float32 [3, H, W] and int64 [H, W]."""
    planes = np.empty((3, *image.shape[:2]), np.float32)
    # plane by plane: arithmetic along a last axis of 3 takes NumPy sixteen times as long
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        np.subtract(image[:, :, channel], np.float32(mean), out=planes[channel])
        planes[channel] /= np.float32(std)
    return torch.from_numpy(planes), torch.from_numpy(label.astype(np.int64))


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


def crop(image: Picture, label: Label, size: int, source: RandomSource) -> tuple[Picture, Label]:
    """A random `size` × `size` window; a smaller picture is first padded evenly with mean and void.

    A window that keeps less than 85 % of the label's foreground (value 1) is drawn again, at most 31 times; the last
    one stands.
    """
    image, label = _pad(image, label, size)
    height, width = label.shape
    foreground = label == 1
    wanted = _CROP_KEEPS_SHARE * np.count_nonzero(foreground)
    for _ in range(1 + _CROP_RETRIES):
        top, left = source.randint(0, height - size), source.randint(0, width - size)
        window = (slice(top, top + size), slice(left, left + size))
        if np.count_nonzero(foreground[window]) >= wanted:
            break
    return image[window], label[window]


def _between(limits: tuple[float, float], position: float) -> float:
    low, high = limits
    return low + (high - low) * position


def _fitted_side(side: int) -> int:
    """Rounded down to a multiple of 8; a picture so narrow that nothing would be left keeps 8 pixels."""
    return max(_SIDE_MULTIPLE, side // _SIDE_MULTIPLE * _SIDE_MULTIPLE)


def _pad(image: Picture, label: Label, size: int) -> tuple[Picture, Label]:
    height, width = label.shape
    missing_rows, missing_columns = max(0, size - height), max(0, size - width)
    if not (missing_rows or missing_columns):
        return image, label
    top, left = missing_rows // 2, missing_columns // 2
    borders = (top, missing_rows - top, left, missing_columns - left)
    return (
        cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=MEAN),
        cv2.copyMakeBorder(label, *borders, cv2.BORDER_CONSTANT, value=VOID),
    )
