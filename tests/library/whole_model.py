"""A small model with every kind of part that a conversion meets, for the tests of convert and merge."""

from __future__ import annotations

from typing import Any

import torch
from networks import CHANNELS, conv, forward_of, settle
from torch import Tensor, nn


def block(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def model_with_everything() -> nn.Module:
    """Convolutions, norms of two kinds, a linear layer, a parameter of its own; one of the parameters already frozen."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(conv(3, CHANNELS), nn.BatchNorm2d(CHANNELS), nn.ReLU())
            self.body = nn.Sequential(*(forward_of(block) for _ in range(2)))
            self.norm = nn.GroupNorm(2, CHANNELS)
            self.head = nn.Linear(CHANNELS, 4)
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.body(self.stem(x))).mean((2, 3))) * self.gain

    model: Any = settle(Whole())
    model.body[0].bn1.weight.requires_grad_(False)
    return model
