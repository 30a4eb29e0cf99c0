"""What a training step gives a method and gets back: the batch's fields, the losses by the names of the papers' code.
Knows no method and no data set."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = 255


class Losses(NamedTuple):
    """``total`` is what a step minimises; ``parts`` are its terms before weighting: main, and aux (PFENet) or aux1,
    aux2 (BAM). Scalars."""

    total: Tensor
    parts: dict[str, Tensor]


class TrainingBatch(Protocol):
    """B episodes of K shots: images float32, labels int64 (1 the episode's class, 255 void)."""

    @property
    def query_images(self) -> Tensor:
        """[B, 3, S, S]."""

    @property
    def query_labels(self) -> Tensor:
        """[B, S, S]."""

    @property
    def support_images(self) -> Tensor:
        """[B, K, 3, S, S]."""

    @property
    def support_labels(self) -> Tensor:
        """[B, K, S, S]."""

    @property
    def base_labels(self) -> Tensor | None:
        """[B, S, S]: the query's base classes 1 … N, 0 all else, 255 void. Only BAM asks for it."""

    @property
    def categories(self) -> Tensor | None:
        """[B]: position (from 0) of each episode's class among the fold's base classes. Only BAM asks for it."""


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels of the whole batch that are not void: logits [B, C, S, S], label [B, S, S]
    int64. 0, with a gradient of zeros, where all are void."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # under autocast a GPU does this by itself, a CPU does not
    mean = F.cross_entropy(logits, label, ignore_index=IGNORED_LABEL)
    # The mean of no pixel is NaN, its gradient zeros. Chosen on the device, without waiting for it.
    return torch.where((label != IGNORED_LABEL).any(), mean, 0.0)
