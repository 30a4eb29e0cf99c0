"""The golden data's episodes, base labels and photos (specification, sections 10.2 and 10.3): all made from names."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parity_rules.filling import stream

VOID = 255
VOID_ROWS = 6  # at the bottom of every label
QUERY_SHOT = 7  # the query's label is drawn as a seventh support's would be


@dataclass(frozen=True)
class Episodes:
    """A batch as a method's ``losses`` takes it: pictures [B, (K,) 3, S, S], labels [B, (K,) S, S] int64, the base
    classes' label [B, S, S] and each episode's class as its position in the base list [B]."""

    query_images: Tensor
    query_labels: Tensor
    support_images: Tensor
    support_labels: Tensor
    base_labels: Tensor
    categories: Tensor


def make_episodes(size: int, batch: int, shots: int, base_classes: int, seed: int) -> Episodes:
    """``shots`` may be 0 (a base learner has none)."""
    samples = range(batch)
    queries = np.stack([picture(f"{seed}|x|{b}", size, 1.0) for b in samples])
    support_pictures = np.empty((batch, shots, 3, size, size))
    support_masks = np.empty((batch, shots, size, size), np.int64)
    for b in samples:
        for k in range(shots):
            support_pictures[b, k] = picture(f"{seed}|s_x|{b}|{k}", size, 0.6 + 0.35 * k)
            support_masks[b, k] = object_label(size, b, k)
    return Episodes(
        query_images=torch.from_numpy(queries).float(),
        query_labels=torch.from_numpy(np.stack([object_label(size, b, QUERY_SHOT) for b in samples])),
        support_images=torch.from_numpy(support_pictures).float(),
        support_labels=torch.from_numpy(support_masks),
        base_labels=torch.from_numpy(np.stack([base_label(f"{seed}|y_b|{b}", size, base_classes) for b in samples])),
        categories=torch.tensor([(4 * b + 2) % base_classes for b in samples]),
    )


def picture(name: str, size: int, amplitude: float) -> NDArray[np.float64]:
    """Normalised picture [3, S, S]: cells of 8 pixels, fine noise and a shift for each channel."""
    cells = _cells(size, 8)
    coarse = _enlarge(stream(f"{name}|coarse", 3, cells, cells), 8, (size, size))
    fine = stream(f"{name}|fine", 3, size, size)
    return amplitude * (1.5 * coarse + 0.5 * fine) + 0.4 * stream(f"{name}|shift", 3, 1, 1)


def object_label(size: int, sample: int, shot: int) -> NDArray[np.int64]:
    """[S, S]: a rectangle of the class under a strip of void, whose place depends on sample and shot."""
    step, half = size // 8, size // 2
    top = step + (3 * sample + 2 * shot) % step
    left = size // 6 + (2 * sample + 5 * shot) % step
    columns = slice(left, left + half + shot)
    label = np.zeros((size, size), np.int64)
    label[top - 3 : top, columns] = VOID
    label[top : top + half, columns] = 1
    label[size - VOID_ROWS :] = VOID
    return label


def base_label(name: str, size: int, base_classes: int) -> NDArray[np.int64]:
    """[S, S]: cells of 12 pixels, each background or a base class (1 … ``base_classes``)."""
    cells = _cells(size, 12)
    position = (stream(name, cells, cells) + 1) / 2  # in [0, 1)
    label = _enlarge(np.floor(position * (base_classes + 1)).astype(np.int64), 12, (size, size)).copy()
    label[size - VOID_ROWS :] = VOID
    return label


def make_photo(height: int, width: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An RGB picture of whole numbers 0–255 [H, W, 3] and its label [H, W] with 0, 1, 2 and void."""
    name = f"{seed}|photo|{height}|{width}"
    coarse = stream(f"{name}|coarse", _cells(height, 10), _cells(width, 10), 3)
    coarse = _enlarge(coarse.transpose(2, 0, 1), 10, (height, width)).transpose(1, 2, 0)
    photo = np.floor(128 + 96 * coarse + 31 * stream(f"{name}|fine", height, width, 3))
    label = np.zeros((height, width), np.uint8)
    label[height // 5 : 4 * height // 5, width // 4 : 3 * width // 4] = 1
    label[height // 3 : height // 2, width // 3 : width // 2] = 2
    label[height // 5 - 2 : height // 5] = VOID
    return photo.astype(np.float32), label


def _cells(side: int, cell: int) -> int:
    return -(-side // cell)


def _enlarge(grid: NDArray[Any], cell: int, size: tuple[int, int]) -> NDArray[Any]:
    """[..., n, m] -> [..., H, W]: every entry becomes ``cell`` × ``cell`` pixels, then what is too much is cut."""
    height, width = size
    return grid.repeat(cell, axis=-2).repeat(cell, axis=-1)[..., :height, :width]
