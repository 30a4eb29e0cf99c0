"""Fusion where a forward writes in place: nothing is read after it was overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    TwoConvs,
    assert_same_network,
    forward_of,
)
from torch import Tensor, nn

SAVES = ("exact", "recompute")


class DoubleInPlace(nn.Module):
    """A user's own module that says nowhere that it writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class WithOwnModule(TwoConvs):
    def __init__(self) -> None:
        super().__init__()
        self.double_in_place = DoubleInPlace()


def identity_branch_relu(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    identity = self.relu(x)
    return torch.relu(self.bn1(out) + identity)


def identity_branch_relu_first(self: Any, x: Tensor) -> Tensor:
    identity = self.relu(x)
    return torch.relu(self.bn1(self.conv1(x)) + identity)


def identity_branch_relu_between_layers(self: Any, x: Tensor) -> Tensor:
    h = torch.relu(self.bn1(self.conv1(x)))
    identity = self.relu(x)
    return torch.relu(self.bn2(self.conv2(h)) + identity)


def write_between_layers(self: Any, x: Tensor) -> Tensor:
    h = torch.relu(self.bn1(self.conv1(x)))
    x.mul_(2)
    return torch.relu(self.bn2(self.conv2(h)) + x)


def write_by_a_module_of_its_own(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    identity = self.double_in_place(x)
    return torch.relu(self.bn1(out) + identity)


def write_between_layers_by_a_module_of_its_own(self: Any, x: Tensor) -> Tensor:
    h = torch.relu(self.bn1(self.conv1(x)))
    identity = self.double_in_place(x)
    return torch.relu(self.bn2(self.conv2(h)) + identity)


def write_by_an_aten_op(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    torch.ops.aten.mul_.Scalar(x, 3)
    return torch.relu(self.bn1(out) + x)


def write_by_a_positional_in_place_flag(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    F.leaky_relu(x, 0.3, True)
    return torch.relu(self.bn1(out) + x)


def write_by_an_out_argument(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    torch.mul(x, 3, out=x)
    return torch.relu(self.bn1(out) + x)


def write_by_item_assignment(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    x[:, 0] = 0
    return torch.relu(self.bn1(out) + x)


def write_by_augmented_assignment(self: Any, x: Tensor) -> Tensor:
    out, alias = self.conv1(x), x
    x *= 3
    return torch.relu(self.bn1(out) + alias)


def write_by_a_power(self: Any, x: Tensor) -> Tensor:
    out, alias = self.conv1(x), x
    x **= 2
    return torch.relu(self.bn1(out) + alias)


def write_into_a_view(self: Any, x: Tensor) -> Tensor:
    view = x[:, :2]
    out = self.conv1(x)
    view.zero_()
    return torch.relu(self.bn1(out) + x)


WRITES = (
    identity_branch_relu, identity_branch_relu_first, identity_branch_relu_between_layers, write_between_layers,
    write_by_a_module_of_its_own, write_between_layers_by_a_module_of_its_own, write_by_an_aten_op,
    write_by_a_positional_in_place_flag, write_by_an_out_argument, write_by_item_assignment, write_by_augmented_assignment,
    write_by_a_power, write_into_a_view,
)  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_nothing_is_read_after_it_was_overwritten(forward: Callable[..., Any], save: str) -> None:
    """A frozen network without a gradient of x may overwrite x: so may the converted one, or it says that it cannot."""
    original = forward_of(forward, WithOwnModule)
    try:
        assert_same_network(original, save=save, needs_dx=False)
    except RuntimeError as error:
        # save="recompute" on a lone layer keeps x by reference: autograd notices the write
        if save != "recompute" or "modified by an inplace operation" not in str(error):
            raise
