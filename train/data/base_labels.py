"""Base labels (Lang et al. 2022, BAM): which base class a pixel shows; and whole pictures under them, which the base learner trains on.
Knows nothing of episodes and networks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from svf_fast.train.data import VOID
from svf_fast.train.data.cache import DEFAULT_CACHE_BYTES, PairCache
from svf_fast.train.data.chance import generator_of, permutation
from svf_fast.train.data.memory import SampleMemory, fresh_memory, stacked
from svf_fast.train.data.reading import Bytes
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Augmentation, Label, Placed, augment, fit, normalise


def base_label_values(base_classes: Sequence[int]) -> Bytes:
    """Table uint8 [256] from class ids: a base class becomes its position in ascending order plus 1, void stays, all
    else is background."""
    values = np.zeros(256, np.uint8)
    values[sorted(base_classes)] = np.arange(1, len(base_classes) + 1, dtype=np.uint8)
    values[VOID] = VOID
    return values


@dataclass(frozen=True)
class BasePicture:
    """A picture and its base label."""

    image: Tensor  # [3, S, S] float32, normalised
    label: Tensor  # [S, S] int64


@dataclass(frozen=True)
class BaseBatch:
    """B pictures stacked."""

    images: Tensor  # [B, 3, S, S] float32
    labels: Tensor  # [B, S, S] int64

    def to(self, device: torch.device | str) -> BaseBatch:
        return BaseBatch(self.images.to(device), self.labels.to(device))


def stack(pictures: Sequence[BasePicture]) -> BaseBatch:
    """Pictures of one size as a batch."""
    return BaseBatch(
        images=stacked([picture.image for picture in pictures]),
        labels=stacked([picture.label for picture in pictures]),
    )


class BasePictures:
    """The pictures of `split` under the base labels of `base_classes`, each a pure function of (seed, pass, index).

    With `augmentation` they go through the training transforms, without one through the test transform. By default the
    crop rule then looks at the first base class alone, as in BAM's code. Up to `cache_bytes` of decoded pictures are kept.
    """

    def __init__(
        self,
        split: Split,
        base_classes: Sequence[int],
        size: int,
        seed: int,
        augmentation: Augmentation | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.split = split
        self.base_classes = tuple(sorted(base_classes))
        self.size = size
        self.seed = seed
        self.augmentation = augmentation
        self._values = base_label_values(self.base_classes)
        self._cache = PairCache(cache_bytes)

    def __len__(self) -> int:
        return len(self.split)

    def picture(self, pass_index: int, index: int, memory: SampleMemory = fresh_memory) -> BasePicture:
        """Entry `index` of the split, as pass `pass_index` over the split draws it, written into `memory`."""
        entry = self.split.entries[index]
        image, classes = self._cache.pair(self.split.root / entry.image, self.split.root / entry.label)
        label = np.asarray(cv2.LUT(classes, self._values), np.uint8)
        source = generator_of("base picture", self.seed, pass_index, index)
        picture, label = self._transform(image, label, source)
        target = memory("image", (3, self.size, self.size), torch.float32)
        normalise(picture, target.numpy())
        target_label = memory("label", (self.size, self.size), torch.int64)
        target_label.numpy()[...] = label
        return BasePicture(target, target_label)

    def training_order(self, epoch: int, seed: int) -> list[int]:
        """Every index once, in the order of that epoch."""
        return permutation(len(self), generator_of("training order", seed, epoch))

    def _transform(self, image: Bytes, label: Bytes, source: random.Random) -> tuple[Placed, Label]:
        picture = image.astype(np.float32)
        if self.augmentation is None:
            return fit(picture, label, self.size)
        return augment(picture, label, self.size, self.augmentation, source)
