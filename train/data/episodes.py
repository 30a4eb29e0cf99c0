"""Few-shot episodes drawn from a split: one query, K supports of the same class, as tensors.

Every episode has a generator of its own, seeded from (seed, pass, index), so that neither the number of workers nor an
interruption changes what is drawn. Knows nothing of models, optimisers or metrics.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from svf_fast.train.data import VOID
from svf_fast.train.data.cache import PairCache
from svf_fast.train.data.reading import Bytes
from svf_fast.train.data.transforms import Augmentation, augment, fit, to_tensors
from svf_fast.train.data.voc import Split


@dataclass(frozen=True)
class Episode:
    """One query and its supports; in every label 1 is the episode's class, 255 void, 0 all else."""

    query_image: Tensor  # [3, S, S] float32, normalised
    query_label: Tensor  # [S, S] int64
    support_images: Tensor  # [K, 3, S, S] float32, normalised
    support_labels: Tensor  # [K, S, S] int64
    class_id: int  # 1-based, of the data set
    query_name: str  # the picture as the list file writes it
    support_names: tuple[str, ...]
    original_label: Tensor  # [H, W] uint8, the query's label before any transform, for evaluation


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes stacked; original labels differ in size and stay a tuple."""

    query_images: Tensor  # [B, 3, S, S] float32
    query_labels: Tensor  # [B, S, S] int64
    support_images: Tensor  # [B, K, 3, S, S] float32
    support_labels: Tensor  # [B, K, S, S] int64
    class_ids: tuple[int, ...]
    query_names: tuple[str, ...]
    support_names: tuple[tuple[str, ...], ...]
    original_labels: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.class_ids)

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The batch with the four stacked tensors on `device`; original labels stay where they are."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("query_images", "query_labels", "support_images", "support_labels")
        }
        return replace(self, **moved)


def collate(episodes: Sequence[Episode]) -> EpisodeBatch:
    """Stacks episodes of one size and one number of shots."""
    if not episodes:
        raise ValueError("episodes is empty; expected at least one episode")
    shapes = {tuple(episode.support_images.shape) for episode in episodes}
    if len(shapes) > 1:
        raise ValueError(f"episodes have supports of different shapes {sorted(shapes)}; expected one [K, 3, S, S]")
    return EpisodeBatch(
        query_images=torch.stack([episode.query_image for episode in episodes]),
        query_labels=torch.stack([episode.query_label for episode in episodes]),
        support_images=torch.stack([episode.support_images for episode in episodes]),
        support_labels=torch.stack([episode.support_labels for episode in episodes]),
        class_ids=tuple(episode.class_id for episode in episodes),
        query_names=tuple(episode.query_name for episode in episodes),
        support_names=tuple(episode.support_names for episode in episodes),
        original_labels=tuple(episode.original_label for episode in episodes),
    )


class EpisodeSampler:
    """Episodes of `split`, each a pure function of (seed, pass, index).

    With `augmentation` pictures go through the training transforms, without one through the test transform. Up to
    `cache_bytes` of decoded pictures are kept; a process that gets a copy of the sampler starts with an empty cache.
    Raises ValueError naming the class if some query could not be given `shots` supports.
    """

    def __init__(
        self,
        split: Split,
        shots: int = 1,
        size: int = 473,
        seed: int = 321,
        augmentation: Augmentation | None = None,
        *,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        if shots < 1:
            raise ValueError(f"shots is {shots}; expected at least 1")
        if size < 8:
            raise ValueError(f"size is {size}; expected a side of at least 8 pixels")
        self.split = split
        self.shots = shots
        self.size = size
        self.seed = seed
        self.augmentation = augmentation
        self._cache = PairCache(cache_bytes)
        _require_enough_supports(split, shots)

    def __len__(self) -> int:
        """Number of query pictures; a pass meets each once."""
        return len(self.split)

    def episode(self, pass_index: int, index: int) -> Episode:
        """The episode whose query is entry `index` of the split, as pass `pass_index` over the split draws it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; the split has {len(self)} query pictures")
        source = _generator("episode", self.seed, pass_index, index)
        query = self.split.entries[index]
        class_id = query.present_classes[source.randint(0, len(query.present_classes) - 1)]
        supports = self._draw_supports(class_id, index, source)

        original_image, original_label = self._load(index, class_id)
        query_image, query_label = self._transform(original_image, original_label, source)
        transformed = [self._transform(*self._load(support, class_id), source) for support in supports]
        return Episode(
            query_image=query_image,
            query_label=query_label,
            support_images=torch.stack([image for image, _ in transformed]),
            support_labels=torch.stack([label for _, label in transformed]),
            class_id=class_id,
            query_name=query.image,
            support_names=tuple(self.split.entries[support].image for support in supports),
            original_label=torch.from_numpy(original_label),
        )

    def training_order(self, epoch: int, seed: int) -> list[int]:
        """Every query index once, in the order of that epoch."""
        return _permutation(len(self), _generator("training order", seed, epoch))

    def validation_indices(
        self, count: int, seed: int, order: Literal["permuted", "list"] = "permuted"
    ) -> list[tuple[int, int]]:
        """`count` pairs (pass, index), going over the split as many times as needed.

        `permuted` gives each pass a seeded order of its own, so that fewer episodes than pictures still spread over the
        whole list; `list` keeps the list's order, as the field's code does.
        """
        if count < 1:
            raise ValueError(f"count is {count}; expected at least 1 episode")
        if order not in ("permuted", "list"):
            raise ValueError(f"order is {order!r}; expected 'permuted' or 'list'")
        pairs: list[tuple[int, int]] = []
        for pass_index in range(-(-count // len(self))):
            if order == "permuted":
                indices: Iterable[int] = _permutation(len(self), _generator("validation order", seed, pass_index))
            else:
                indices = range(len(self))
            pairs.extend((pass_index, index) for index in indices)
        return pairs[:count]

    def _draw_supports(self, class_id: int, query_index: int, source: random.Random) -> list[int]:
        """Distinct pictures of the class, never the query: uniform draws, repeated until they fit."""
        files = self.split.files_of_class[class_id]
        supports: list[int] = []
        while len(supports) < self.shots:
            drawn = files[source.randint(0, len(files) - 1)]
            if drawn != query_index and drawn not in supports:
                supports.append(drawn)
        return supports

    def _load(self, index: int, class_id: int) -> tuple[Bytes, Bytes]:
        """Picture and episode label (1 the class, 255 void, 0 all else) of an entry, at their original size."""
        entry = self.split.entries[index]
        image, label = self._cache.pair(self.split.root / entry.image, self.split.root / entry.label)
        values = np.zeros(256, np.uint8)
        values[class_id], values[VOID] = 1, VOID
        return image, np.asarray(cv2.LUT(label, values), np.uint8)

    def _transform(self, image: Bytes, label: Bytes, source: random.Random) -> tuple[Tensor, Tensor]:
        picture = image.astype(np.float32)
        if self.augmentation is None:
            return to_tensors(*fit(picture, label, self.size))
        return to_tensors(*augment(picture, label, self.size, self.augmentation, source))


def _require_enough_supports(split: Split, shots: int) -> None:
    files_of_class = {class_id: set(files) for class_id, files in split.files_of_class.items()}
    for index, entry in enumerate(split.entries):
        for class_id in entry.present_classes:
            files = files_of_class[class_id]
            if len(files) - (index in files) < shots:
                raise ValueError(
                    f"class {class_id} ({split.class_names[class_id]}) has {len(files)} usable pictures in "
                    f"{split.list_file}; {shots}-shot episodes need {shots} besides the query {entry.image}"
                )


def _generator(purpose: str, *numbers: int) -> random.Random:
    """A generator of its own for each purpose and numbers: the same on every platform and Python version."""
    text = "|".join([purpose, *map(str, numbers)])
    return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))


def _permutation(length: int, source: random.Random) -> list[int]:
    """A uniform permutation. `random()` alone is drawn: of Python's generator, only its stream is promised to stay."""
    keys = [source.random() for _ in range(length)]
    return sorted(range(length), key=keys.__getitem__)
