"""Fusion when what a forward reads changes after the conversion: flags, tensors, children, containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import (
    CHANNELS,
    Bottleneck,
    ListOfLayers,
    TwoConvs,
    add_its_own_input,
    assert_same_network,
    conv,
    forward_of,
    notes,
    picture,
    settle,
)
from torch import Tensor, nn

SAVES = ("exact", "recompute")


class Switch(nn.Module):
    """A child with a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class Configurable(TwoConvs):
    class_flag = True

    def __init__(self) -> None:
        super().__init__()
        self.flag, self._private = True, True
        self.options = {"skip": True}
        self.choices = [True]
        self.switch = Switch()
        self.register_buffer("buffer_flag", torch.ones(()))

    @property
    def derived(self) -> bool:
        return self._private


def set_flag(m: Any) -> None:
    m.flag = False


def set_private(m: Any) -> None:
    m._private = False


def set_class_flag(m: Any) -> None:
    m.class_flag = False


def set_option(m: Any) -> None:
    m.options["skip"] = False


def set_choice(m: Any) -> None:
    m.choices[0] = False


def set_switch(m: Any) -> None:
    m.switch.is_on = False


def set_child_mode(m: Any) -> None:
    m.switch.training = True


READS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], None]]] = {
    "attribute": (lambda m: m.flag, set_flag),
    "private attribute": (lambda m: m._private, set_private),
    "property": (lambda m: m.derived, set_private),
    "class attribute": (lambda m: m.class_flag, set_class_flag),
    "dictionary": (lambda m: m.options["skip"], set_option),
    "list": (lambda m: m.choices[0], set_choice),
    "a child's attribute": (lambda m: m.switch.is_on, set_switch),
    "a child's mode": (lambda m: not m.switch.training, set_child_mode),
    "getattr": (lambda m: getattr(m, "flag", False), set_flag),
}


@pytest.mark.parametrize("is_changed", [False, True])
@pytest.mark.parametrize("kind", READS)
def test_flags_read_by_the_forward(kind: str, is_changed: bool) -> None:
    read, change = READS[kind]

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        if read(self):
            out = out + x
        return self.relu(out)

    assert_same_network(forward_of(forward, Configurable), change=change if is_changed else None)


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_reads_the_mode(training: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return self.relu(out) if self.training else self.relu(out + x)

    model = assert_same_network(forward_of(forward), training=training)
    assert all(n.startswith("fused") or n.startswith("alone: followed by") or not n for n in notes(model).values())


def test_a_tensor_that_is_a_plain_attribute() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)) * self.gains)

    original = forward_of(forward)
    original.gains = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64).view(1, -1, 1, 1)
    assert_same_network(original)


def test_a_child_is_replaced_after_the_conversion() -> None:
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda m: setattr(m, "relu", nn.LeakyReLU()),
        lambda m: setattr(m, "bn1", nn.Identity()),
        lambda m: setattr(m, "conv1", settle(conv()).requires_grad_(False)),
        lambda m: m.add_module("relu", nn.Sigmoid()),
        lambda m: m.register_module("relu", nn.Sigmoid()),
        lambda m: m.set_submodule("relu", nn.Tanh()),
        lambda m: m._modules.__setitem__("relu", nn.Tanh()),
    )
    for save in SAVES:
        for change in changes:
            assert_same_network(forward_of(add_its_own_input), change=change, save=save)


SEQUENTIAL_CHANGES: dict[str, Callable[[Any], Any]] = {
    "item": lambda m: m.__setitem__(2, nn.LeakyReLU()),
    "append": lambda m: m.append(nn.LeakyReLU()),
    "insert": lambda m: m.insert(2, nn.Softplus()),
    "extend": lambda m: m.extend([nn.Tanh()]),
    "delete the last": lambda m: m.__delitem__(-1),
    "delete inside": lambda m: m.__delitem__(2),
    "pop": lambda m: m.pop(-1),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("change", SEQUENTIAL_CHANGES)
def test_a_sequential_changes_after_the_conversion(change: str, save: str) -> None:
    layers = [conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    assert_same_network(settle(nn.Sequential(*layers)), change=SEQUENTIAL_CHANGES[change], save=save)


LIST_CHANGES: dict[str, Callable[[Any], Any]] = {
    "activation": lambda m: m.blocks.__setitem__(2, nn.LeakyReLU()),
    "norm": lambda m: m.blocks.__setitem__(1, nn.Identity()),
    "convolution": lambda m: m.blocks.__setitem__(0, settle(conv()).requires_grad_(False)),
    "append": lambda m: m.blocks.append(nn.LeakyReLU()),
    "insert": lambda m: m.blocks.insert(1, nn.Tanh()),
    "delete": lambda m: m.blocks.__delitem__(2),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("change", LIST_CHANGES)
def test_a_module_list_changes_after_the_conversion(change: str, save: str) -> None:
    assert_same_network(settle(ListOfLayers()), change=LIST_CHANGES[change], save=save)


def test_a_bottleneck_loses_its_downsample() -> None:
    block = Bottleneck(16, 4, 1, nn.Sequential(conv(16, 16, 1), nn.BatchNorm2d(16)))
    assert_same_network(settle(block), picture(2, 16, 5, 5), change=lambda m: setattr(m, "downsample", None))
