"""Classification pre-training of a narrow backbone on crops of a fold's base classes: the demo's stand-in for ImageNet weights.

Stands beside the few-shot engine and knows nothing of episodes; it never opens a picture that is not in the list it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from svf_fast.train.backbones import Backbone, BackboneConfig, build_backbone
from svf_fast.train.data.reading import read_pair
from svf_fast.train.data.transforms import MEAN, STD
from svf_fast.train.seeding import seeded_initialisation

_OBJECT, _GROUND, _OTHER = 255, 0, 128
_CONTEXT = 1.5  # side of a stored crop over the object's longer side; training windows are cut from it
_SMALLEST_WINDOW = 0.75  # of the stored crop's side
_LEAST_PIXELS = 300  # of a connected piece, at the label's size: less says little about the form
_HELD_OUT_EVERY = 10  # one picture in ten tells how good the classifier is, and is not trained on
_GROUND_SHARE = 0.5  # weight of the ground's loss: figure and ground have to come apart, the classes matter more
_STATISTICS_BATCHES = 16


@dataclass(frozen=True)
class PretrainConfig:
    """AdamW with a cosine rate (in so few steps from scratch it got further than SGD).

    `crop` is the side in pixels that the network sees.
    """

    steps: int = 600
    batch: int = 16
    crop: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 321

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 2), ("crop", 32)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class Pretrained:
    """Weights in the backbone's own key layout, and how the classifier did on crops of pictures it was not trained on."""

    backbone: dict[str, Tensor]
    crops: int
    held_out_crops: int
    held_out_accuracy: float
    final_loss: float


@dataclass(frozen=True)
class _Crops:
    """`patches` [N, side, side, 4] uint8: RGB, and 255 on the object, 0 on the ground, 128 on anything else; `labels` [N]."""

    patches: NDArray[np.uint8]
    labels: NDArray[np.int64]


class _Classifier(nn.Module):
    """The backbone with one linear layer at every position, so that features say what is where and not only what is there."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Conv2d(
            backbone.channels[f"layer{backbone.depth}"], classes + 1, 1
        )  # the last one is the ground

    def forward(self, images: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S], regions [B, 2, S, S] of zeros and ones (object, ground) -> log-probabilities
        [B, classes + 1, h, w] and the regions' shares [B, 2, h, w] of every position."""
        log_probabilities = F.log_softmax(self.linear(self.backbone(images)), dim=1)
        return log_probabilities, F.interpolate(regions, log_probabilities.shape[-2:], mode="area")


def _loss(log_probabilities: Tensor, shares: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the object's positions against `labels` [B] and of the ground's against the ground, each a mean."""
    objects, ground = shares[:, 0], shares[:, 1]
    of_class = log_probabilities[torch.arange(len(labels)), labels]
    on_objects = -(of_class * objects).sum() / objects.sum().clamp_min(1.0)
    on_ground = -(log_probabilities[:, -1] * ground).sum() / ground.sum().clamp_min(1.0)
    return on_objects + _GROUND_SHARE * on_ground


def pretrain(
    root: Path,
    list_file: Path,
    classes: Sequence[int],
    backbone_config: BackboneConfig,
    config: PretrainConfig,
    *,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Pretrained:
    """Train a classifier of `classes` on object crops from the pictures of `list_file` (`image label` a line, relative to `root`).

    A crop is one object with its surroundings. Every position of the feature map is classified: on the object as its class, on
    what belongs to no object as an extra class, "ground". The weights returned are those of the backbone alone, its
    BatchNorm statistics estimated anew for them. The same settings give the same weights on one machine and thread count.
    `on_step(done, all, loss)` is called after every step.

    Raises ValueError when a class has no crop to learn from, or none is left to test on.
    """
    kept, held_out = _collect(root, list_file, classes, config.crop)
    backbone = build_backbone(backbone_config, seed=config.seed)
    with seeded_initialisation(config.seed):
        model = _Classifier(backbone, len(classes))
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, 1])))
    loss = _train(model, kept, config, rng, on_step)
    _estimate_statistics(model, kept, config, rng)
    accuracy = _accuracy(model, held_out, config)
    return Pretrained(backbone.state_dict(), len(kept.labels), len(held_out.labels), accuracy, loss)


def _collect(root: Path, list_file: Path, classes: Sequence[int], crop: int) -> tuple[_Crops, _Crops]:
    """Cut every connected piece of a class with its surroundings, and put every tenth picture aside."""
    side = round(crop / math.sqrt(_SMALLEST_WINDOW))
    parts: tuple[list[tuple[NDArray[np.uint8], int]], ...] = ([], [])
    for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines()):
        image_name, label_name = line.split()
        image, label = read_pair(root / image_name, root / label_name)
        target = parts[number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1]
        for position, class_id in enumerate(classes):
            target.extend((patch, position) for patch in _patches(image, label, class_id, side))
    missing = set(range(len(classes))) - {position for _, position in parts[0]}
    if missing:
        named = ", ".join(str(classes[position]) for position in sorted(missing))
        raise ValueError(f"{list_file}: no object crop to train on for class id {named}; more pictures are needed")
    if not parts[1]:
        raise ValueError(f"{list_file}: no object crop is left to test on; more pictures are needed")
    kept, held_out = (
        _Crops(np.stack([patch for patch, _ in part]), np.array([position for _, position in part], dtype=np.int64))
        for part in parts
    )
    return kept, held_out


def _patches(image: NDArray[np.uint8], label: NDArray[np.uint8], class_id: int, side: int) -> list[NDArray[np.uint8]]:
    """Square patches [side, side, 4] around the connected pieces of a class; what lies beyond the picture is of mean colour."""
    inside = label == class_id
    if not inside.any():
        return []
    count, pieces, boxes, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8), connectivity=8)
    margin = max(label.shape)
    colours = cv2.copyMakeBorder(image, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=MEAN)
    patches: list[NDArray[np.uint8]] = []
    for piece in range(1, count):
        left, top, width, height, pixels = (int(value) for value in boxes[piece])
        if pixels < _LEAST_PIXELS:
            continue
        window = min(round(max(width, height) * _CONTEXT), margin)
        x, y = left + (width - window) // 2 + margin, top + (height - window) // 2 + margin
        roles = np.where(pieces == piece, _OBJECT, np.where(label == 0, _GROUND, _OTHER)).astype(np.uint8)
        roles = np.pad(roles, margin, constant_values=_OTHER)
        cut = (slice(y, y + window), slice(x, x + window))
        patches.append(_resized(np.dstack([colours[cut], roles[cut]]), side))
    return patches


def _resized(patch: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """[h, h, 4] -> [side, side, 4]: colours bilinear, roles by the nearest pixel."""
    colours = cv2.resize(np.ascontiguousarray(patch[..., :3]), (side, side), interpolation=cv2.INTER_LINEAR)
    roles = cv2.resize(np.ascontiguousarray(patch[..., 3]), (side, side), interpolation=cv2.INTER_NEAREST)
    return np.dstack([colours, roles])


def _train(
    model: _Classifier,
    crops: _Crops,
    config: PretrainConfig,
    rng: np.random.Generator,
    on_step: Callable[[int, int, float], None] | None,
) -> float:
    """Train the model in place; returns the mean loss of the last tenth of the steps."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    warm_up_steps = max(1, config.steps // 20)
    losses: list[float] = []
    for step in range(config.steps):
        decay = min(1.0, (step + 1) / warm_up_steps) * (1.0 + math.cos(math.pi * step / config.steps)) / 2.0
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * decay
        patches, labels = _draw_batch(crops, config, rng)
        log_probabilities, shares = model(*_tensors(patches))
        loss = _loss(log_probabilities, shares, labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, config.steps, losses[-1])
    tail = losses[-max(1, config.steps // 10) :]
    return sum(tail) / len(tail)


def _draw_batch(crops: _Crops, config: PretrainConfig, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Tensor]:
    chosen = rng.integers(len(crops.labels), size=config.batch)
    patches = np.stack([_augment(crops.patches[index], config.crop, rng) for index in chosen])
    return patches, torch.from_numpy(crops.labels[chosen])


def _augment(patch: NDArray[np.uint8], crop: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random window of the patch at the network's size, mirrored half of the time, its colours exchanged."""
    side = patch.shape[0]
    window = round(side * (_SMALLEST_WINDOW + (1.0 - _SMALLEST_WINDOW) * float(rng.random())))
    top, left = rng.integers(side - window + 1, size=2)
    cut = _resized(patch[top : top + window, left : left + window], crop)
    if rng.random() < 0.5:
        cut = cut[:, ::-1]
    return cut[..., [*rng.permutation(3), 3]]


def _tensors(patches: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """uint8 [B, H, W, 4] -> images float32 [B, 3, H, W], in the scale that few-shot data have, and regions [B, 2, H, W]."""
    colours = (torch.from_numpy(patches[..., :3].copy()).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    roles = torch.from_numpy(patches[..., 3].copy())
    regions = torch.stack([roles == _OBJECT, roles == _GROUND], dim=1).float()
    return colours.permute(0, 3, 1, 2).contiguous(), regions


@torch.no_grad()
def _accuracy(model: _Classifier, crops: _Crops, config: PretrainConfig) -> float:
    """Share of crops whose object gets its own class by the vote of its positions; each is cut in the middle."""
    model.eval()
    margin = (crops.patches.shape[1] - config.crop) // 2
    middle = slice(margin, margin + config.crop)
    correct = 0
    for start in range(0, len(crops.labels), config.batch):
        these = slice(start, start + config.batch)
        log_probabilities, shares = model(*_tensors(crops.patches[these, middle, middle]))
        votes = (log_probabilities * shares[:, :1]).sum(dim=(2, 3))
        correct += int((votes.argmax(dim=1).numpy() == crops.labels[these]).sum())
    return correct / len(crops.labels)


@torch.no_grad()
def _estimate_statistics(model: _Classifier, crops: _Crops, config: PretrainConfig, rng: np.random.Generator) -> None:
    """Set every BatchNorm's running statistics to plain means over fresh batches: the moving averages lag behind the weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    model.train()
    for _ in range(_STATISTICS_BATCHES):
        patches, _ = _draw_batch(crops, config, rng)
        model(*_tensors(patches))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    model.eval()
