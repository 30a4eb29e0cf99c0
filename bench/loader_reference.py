"""The field's loader written straightforwardly from its description (the methods' specification, sections 6.4 to 6.6): what
`loader.py` measures against. Every file is read for every use, one step after the other makes new arrays, label arithmetic is
NumPy's. The random numbers are this project's, so that both loaders make the same episodes."""

from __future__ import annotations

import random
from collections.abc import Iterable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from svf_fast.train.data import BACKGROUND, VOID
from svf_fast.train.data.chance import generator_of
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import MEAN, STD, Augmentation

Sample = tuple[Tensor, Tensor, Tensor, Tensor]  # query image, query label, support images, support labels


class ReferenceLoader:
    """Episodes as `EpisodeSampler` draws them for the same `seed`."""

    def __init__(self, split: Split, shots: int, size: int, seed: int, augmentation: Augmentation | None) -> None:
        self.split = split
        self.shots = shots
        self.size = size
        self.seed = seed
        self.augmentation = augmentation

    def episode(self, pass_index: int, index: int) -> Sample:
        """Images float32, normalised; labels int64."""
        source = generator_of("episode", self.seed, pass_index, index)
        image, label = self._read(index)
        # the reference looks the classes up in the query's label, and takes those that the split is for
        present = [int(value) for value in np.unique(label) if value not in (BACKGROUND, VOID)]
        candidates = [class_id for class_id in present if class_id in self.split.class_ids]
        class_id = candidates[source.randint(0, len(candidates) - 1)]
        files = self.split.files_of_class[class_id]
        chosen: list[int] = []
        while len(chosen) < self.shots:
            drawn = files[source.randint(0, len(files) - 1)]
            if drawn != index and drawn not in chosen:
                chosen.append(drawn)
        supports = [self._read(support) for support in chosen]
        query_image, query_label = self._transform(image, _binary(label, class_id), source)
        transformed = [self._transform(image, _binary(label, class_id), source) for image, label in supports]
        support_images, support_labels = zip(*transformed, strict=True)
        return query_image, query_label, torch.stack(support_images), torch.stack(support_labels)

    def batch(self, keys: Iterable[tuple[int, int]]) -> list[Tensor]:
        """Episodes stacked, as a DataLoader's default does."""
        return [torch.stack(parts) for parts in zip(*(self.episode(*key) for key in keys), strict=True)]

    def _read(self, index: int) -> tuple[NDArray, NDArray]:
        entry = self.split.entries[index]
        decoded = cv2.imread(str(self.split.root / entry.image), cv2.IMREAD_COLOR)
        if decoded is None:
            raise ValueError(f"{entry.image} cannot be decoded")
        image = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.float32)
        with Image.open(self.split.root / entry.label) as opened:
            return image, np.array(opened)

    def _transform(self, image: NDArray, label: NDArray, source: random.Random) -> tuple[Tensor, Tensor]:
        if self.augmentation is None:
            image, label = _resized_for_test(image, label, self.size)
        else:
            image, label = _augmented(image, label, self.size, self.augmentation, source)
        tensor = torch.from_numpy(image.transpose(2, 0, 1)).float()
        for channel, mean, std in zip(tensor, MEAN, STD, strict=True):
            channel.sub_(mean).div_(std)
        return tensor, torch.from_numpy(label).long()


def _binary(label: NDArray, class_id: int) -> NDArray:
    chosen, void = np.where(label == class_id), np.where(label == VOID)
    made = np.zeros_like(label)
    made[chosen[0], chosen[1]] = 1
    made[void[0], void[1]] = VOID
    return made


def _augmented(
    image: NDArray, label: NDArray, size: int, ranges: Augmentation, source: random.Random
) -> tuple[NDArray, NDArray]:
    low, high = ranges.scale_range
    factor = low + (high - low) * source.random()
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    if source.random() < ranges.rotation_probability:
        low, high = ranges.rotation_range_degrees
        height, width = label.shape
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), low + (high - low) * source.random(), 1)
        image = cv2.warpAffine(
            image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=MEAN
        )
        label = cv2.warpAffine(
            label, matrix, (width, height), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=VOID
        )
    if source.random() < ranges.blur_probability:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if source.random() < ranges.flip_probability:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    return _cropped(image, label, size, source)


def _cropped(image: NDArray, label: NDArray, size: int, source: random.Random) -> tuple[NDArray, NDArray]:
    height, width = label.shape
    rows, columns = max(size - height, 0), max(size - width, 0)
    if rows or columns:
        borders = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
        image = cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=MEAN)
        label = cv2.copyMakeBorder(label, *borders, cv2.BORDER_CONSTANT, value=VOID)
    height, width = label.shape
    wanted = 0.85 * np.sum(label == 1)
    for _ in range(32):
        top, left = source.randint(0, height - size), source.randint(0, width - size)
        window = label[top : top + size, left : left + size]
        if np.sum(window == 1) >= wanted:
            break
    return image[top : top + size, left : left + size], window


def _resized_for_test(image: NDArray, label: NDArray, size: int) -> tuple[NDArray, NDArray]:
    height, width = label.shape
    ratio = size / max(height, width)
    new_height = (size if height >= width else int(height * ratio)) // 8 * 8
    new_width = (size if width >= height else int(width * ratio)) // 8 * 8
    image = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, (new_width, new_height), interpolation=cv2.INTER_NEAREST)
    whole_image = np.zeros((size, size, 3), np.float32)
    whole_image[:new_height, :new_width] = image
    whole_label = np.full((size, size), VOID, np.uint8)
    whole_label[:new_height, :new_width] = label
    return whole_image, whole_label
