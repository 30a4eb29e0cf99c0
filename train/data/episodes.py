"""Few-shot episodes drawn from a split: one query, K supports of the same class, as tensors.

Every episode has a generator of its own, seeded from (seed, pass, index), so that neither the number of workers nor an
interruption changes what is drawn. Knows nothing of models, optimisers or metrics.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from svf_fast.train.data import VOID
from svf_fast.train.data.base_labels import base_label_values
from svf_fast.train.data.cache import DEFAULT_CACHE_BYTES, PairCache
from svf_fast.train.data.chance import generator_of, permutation
from svf_fast.train.data.memory import SampleMemory, fresh_memory, stacked
from svf_fast.train.data.reading import Bytes
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Augmentation, augment, fit, normalise

Value = TypeVar("Value")
Sampler = TypeVar("Sampler", bound="EpisodeSampler")
Order = Literal["permuted", "list"]  # of the queries in a validation


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
    base_label: Tensor | None = None  # [S, S] int64, the query's: position among the base classes + 1, void, 0 all else
    original_base_label: Tensor | None = None  # [H, W] uint8, the same before any transform
    category: int | None = None  # position of the episode's class among the base classes; None for a novel class


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
    base_labels: Tensor | None = None  # [B, S, S] int64
    original_base_labels: tuple[Tensor, ...] | None = None
    categories: Tensor | None = None  # [B] int64

    def __len__(self) -> int:
        return len(self.class_ids)

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The batch with its stacked tensors on `device`; original labels stay where they are."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def collate(episodes: Sequence[Episode]) -> EpisodeBatch:
    """Stacks episodes of one size and one number of shots."""
    if not episodes:
        raise ValueError("episodes is empty; expected at least one episode")
    shapes = {tuple(episode.support_images.shape) for episode in episodes}
    if len(shapes) > 1:
        raise ValueError(f"episodes have supports of different shapes {sorted(shapes)}; expected one [K, 3, S, S]")
    base_labels = _of_all(episode.base_label for episode in episodes)
    categories = _of_all(episode.category for episode in episodes)
    return EpisodeBatch(
        query_images=stacked([episode.query_image for episode in episodes]),
        query_labels=stacked([episode.query_label for episode in episodes]),
        support_images=stacked([episode.support_images for episode in episodes]),
        support_labels=stacked([episode.support_labels for episode in episodes]),
        class_ids=tuple(episode.class_id for episode in episodes),
        query_names=tuple(episode.query_name for episode in episodes),
        support_names=tuple(episode.support_names for episode in episodes),
        original_labels=tuple(episode.original_label for episode in episodes),
        base_labels=None if base_labels is None else stacked(base_labels),
        original_base_labels=_of_all(episode.original_base_label for episode in episodes),
        categories=None if categories is None else torch.tensor(categories),
    )


def _of_all(values: Iterable[Value | None]) -> tuple[Value, ...] | None:
    """The values if every episode has one, else None."""
    found = tuple(values)
    present = tuple(value for value in found if value is not None)
    return present if len(present) == len(found) else None


class EpisodeSampler:
    """Episodes of `split`, each a pure function of (seed, pass, index).

    With `augmentation` pictures go through the training transforms, without one through the test transform. Up to
    `cache_bytes` of decoded pictures are kept; a process that gets a copy of the sampler starts with an empty cache.
    With `base_classes` (BAM) an episode also holds its query's base label, under the same random numbers, and its
    category; nothing else changes. Raises ValueError naming the class if some query could not be given `shots` supports.
    """

    def __init__(
        self,
        split: Split,
        shots: int = 1,
        size: int = 473,
        seed: int = 321,
        augmentation: Augmentation | None = None,
        *,
        base_classes: Sequence[int] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
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
        self.base_classes = None if base_classes is None else tuple(sorted(base_classes))
        self._cache = PairCache(cache_bytes)
        self._require_enough_supports()

    def __len__(self) -> int:
        """Number of query pictures; a pass meets each once."""
        return len(self.split)

    def with_seed(self: Sampler, seed: int) -> Sampler:
        """The same pictures under another seed; both keep their decoded pictures in one cache."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def episode(self, pass_index: int, index: int, memory: SampleMemory = fresh_memory) -> Episode:
        """The episode whose query is entry `index` of the split, as pass `pass_index` over the split draws it, written
        into `memory`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; the split has {len(self)} query pictures")
        source = generator_of("episode", self.seed, pass_index, index)
        candidates = self.candidate_classes(index)
        class_id = candidates[source.randint(0, len(candidates) - 1)]
        supports = self._draw_supports(class_id, index, source)

        canvas = (self.size, self.size)
        query_image = memory("query_image", (3, *canvas), torch.float32)
        query_label = memory("query_label", canvas, torch.int64)
        support_images = memory("support_images", (self.shots, 3, *canvas), torch.float32)
        support_labels = memory("support_labels", (self.shots, *canvas), torch.int64)
        original_image, original_classes = self._load(index, class_id)
        query_classes = self._transform(original_image, original_classes, source, query_image)
        query_label.numpy()[...] = _episode_label(query_classes)
        for support, image, label in zip(supports, support_images, support_labels, strict=True):
            label.numpy()[...] = _episode_label(self._transform(*self._load(support, class_id), source, image))
        base_label, original_base_label, category = None, None, None
        if self.base_classes is not None:
            values = base_label_values(self.base_classes)[_class_first(class_id)]
            base_label = memory("base_label", canvas, torch.int64)
            base_label.numpy()[...] = cv2.LUT(query_classes, values)
            original_base_label = torch.from_numpy(cv2.LUT(original_classes, values))
            category = self.base_classes.index(class_id) if class_id in self.base_classes else None
        return Episode(
            query_image=query_image,
            query_label=query_label,
            support_images=support_images,
            support_labels=support_labels,
            class_id=class_id,
            query_name=self.split.entries[index].image,
            support_names=tuple(self.split.entries[support].image for support in supports),
            original_label=torch.from_numpy(_episode_label(original_classes)),
            base_label=base_label,
            original_base_label=original_base_label,
            category=category,
        )

    def candidate_classes(self, index: int) -> tuple[int, ...]:
        """The classes of which an episode with query `index` draws one."""
        return self.split.entries[index].present_classes

    def training_order(self, epoch: int, seed: int) -> list[int]:
        """Every query index once, in the order of that epoch."""
        return permutation(len(self), generator_of("training order", seed, epoch))

    def validation_indices(self, count: int, seed: int, order: Order = "permuted") -> list[tuple[int, int]]:
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
                indices: Iterable[int] = permutation(len(self), generator_of("validation order", seed, pass_index))
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
        """Picture and class ids of an entry at their original size, `class_id` standing as 1 (and 1 as `class_id`).

        The transforms look at value 1 alone and move the others with it, so that every label of one picture can be
        read from what comes out.
        """
        entry = self.split.entries[index]
        image, label = self._cache.pair(self.split.root / entry.image, self.split.root / entry.label)
        classes = np.asarray(cv2.LUT(label, _class_first(class_id)), np.uint8)
        if class_id in entry.present_classes and not (classes == 1).any():
            raise ValueError(
                f"{self.split.root / entry.label} shows no pixel of class {class_id}, but the census or fold index of "
                f"{self.split.list_file} has it there: the label was changed, remove that file to have labels read again"
            )
        return image, classes

    def _transform(self, image: Bytes, label: Bytes, source: random.Random, target: Tensor) -> Bytes:
        """Writes the transformed picture into `target` [3, S, S]; returns the transformed label [S, S]."""
        picture = image.astype(np.float32)
        if self.augmentation is None:
            picture, label = fit(picture, label, self.size)
        else:
            picture, label = augment(picture, label, self.size, self.augmentation, source)
        normalise(picture, target.numpy())
        return label

    def _require_enough_supports(self) -> None:
        split = self.split
        files_of_class = {class_id: set(files) for class_id, files in split.files_of_class.items()}
        for index, entry in enumerate(split.entries):
            for class_id in self.candidate_classes(index):
                files = files_of_class[class_id]
                if len(files) - (index in files) < self.shots:
                    raise ValueError(
                        f"class {class_id} ({split.class_names[class_id]}) has {len(files)} usable pictures in "
                        f"{split.list_file}; {self.shots}-shot episodes need {self.shots} besides the query {entry.image}"
                    )


def _class_first(class_id: int) -> Bytes:
    """Table that exchanges the values `class_id` and 1, its own inverse."""
    values = np.arange(256, dtype=np.uint8)
    values[[1, class_id]] = class_id, 1
    return values


def _episode_label(classes: Bytes) -> Bytes:
    """1 the episode's class (which stands as 1 already), 255 void, 0 all else."""
    values = np.zeros(256, np.uint8)
    values[1], values[VOID] = 1, VOID
    return np.asarray(cv2.LUT(classes, values), np.uint8)
