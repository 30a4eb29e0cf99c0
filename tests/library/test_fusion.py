"""Fusion: whatever a forward computes, the fused network is the same function with the same gradients as the written one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    CHANNELS,
    NETWORKS,
    add_its_own_input,
    add_operator,
    assert_same_network,
    forward_of,
    notes,
    picture,
    settle,
)
from torch import Tensor

import svf_fast

SAVES = ("exact", "recompute")


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, save: str, layout: torch.memory_format, needs_dx: bool) -> None:
    x = picture(2, CHANNELS, 9, 8).contiguous(memory_format=layout)
    assert_same_network(settle(NETWORKS[name]()), x, save=save, needs_dx=needs_dx)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_training_mode(name: str, save: str) -> None:
    assert_same_network(settle(NETWORKS[name]()), save=save, training=True)


def test_the_whole_bottleneck_fuses() -> None:
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()))
    for name, note in notes(model).items():
        expected = {
            "conv3": "fused: conv → norm → residual → relu",
            "0": "fused: conv → norm",
        }.get(name.rpartition(".")[2], "fused: conv → norm → relu")
        assert note == expected, name


@pytest.mark.parametrize("name", ["basic blocks", "vgg", "inline downsample", "module list", "module dict"])
def test_every_layer_of_an_ordinary_network_fuses(name: str) -> None:
    model = svf_fast.convert(settle(NETWORKS[name]()))
    assert all(note.startswith("fused: conv → ") for note in notes(model).values()), notes(model)


def add_reversed(self: Any, x: Tensor) -> Tensor:
    return self.relu(x + self.bn1(self.conv1(x)))


def add_in_place(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    out += x
    return self.relu(out)


def add_into_the_other(self: Any, x: Tensor) -> Tensor:
    other = x * 2
    other += self.bn1(self.conv1(x))
    return torch.relu(other) + other


def add_method_into_the_other(self: Any, x: Tensor) -> Tensor:
    other = x * 2
    other.add_(self.bn1(self.conv1(x)))
    return torch.relu(other) + other


def add_function(self: Any, x: Tensor) -> Tensor:
    return self.relu(torch.add(self.bn1(self.conv1(x)), x))


def add_with_alpha(self: Any, x: Tensor) -> Tensor:
    return self.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=2))


def add_method_with_alpha(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)).add(x, alpha=-3))


def add_itself(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    return self.relu(out + out)


def add_broadcast(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


def add_that_grows_the_batch(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x[:1])) + x)


def add_that_grows_the_rank(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.unsqueeze(0))


def add_another_dtype(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.float())


def add_number(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + 0.5)


def add_size(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.size(0))


def add_shape(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.shape[-1] / 7)


def add_parameter(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + self.bn2.bias.view(1, -1, 1, 1))


def add_two_convolutions(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


def add_to_the_convolution(self: Any, x: Tensor) -> Tensor:
    return self.bn1(self.conv1(x) + x)


def subtract(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) - x)


def add_detached(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.detach())


ADDITIONS = (
    add_operator, add_reversed, add_in_place, add_into_the_other, add_method_into_the_other, add_function, add_with_alpha,
    add_method_with_alpha, add_itself, add_broadcast, add_that_grows_the_batch, add_that_grows_the_rank, add_another_dtype,
    add_number, add_size, add_shape, add_parameter, add_two_convolutions, add_its_own_input, add_to_the_convolution,
    subtract, add_detached,
)  # fmt: skip


def relu_used_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def convolution_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(self.relu(self.bn1(self.conv1(x))))))


def norm_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def functional_relus(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).relu()


def relu_without_norm(self: Any, x: Tensor) -> Tensor:
    return self.conv2(self.conv1(x).relu_())


def value_before_the_relu_is_used(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    return torch.relu(out) + out.sigmoid()


def value_before_the_norm_is_used(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    return self.relu(self.bn1(out)) + out


def in_place_relu_whose_result_is_ignored(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    self.relu(out)
    return out + x


def in_place_relu_on_a_view(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    out.view(-1).relu_()
    return out


def alias_of_an_in_place_sum(self: Any, x: Tensor) -> Tensor:
    out = before = self.bn1(self.conv1(x))
    out += x
    return torch.relu(out) + before


def collected_before_an_in_place_sum(self: Any, x: Tensor) -> list[Tensor]:
    out = self.bn1(self.conv1(x))
    features = [out]
    out += x
    features.append(torch.relu(out))
    return features


def in_place_product_of_an_alias(self: Any, x: Tensor) -> Tensor:
    out = before = self.bn1(self.conv1(x))
    out *= 2
    return before + self.conv2(out)


def two_outputs(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.relu(self.bn1(self.conv1(x)))
    return h, self.bn2(self.conv2(h))


def leaky(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(self.bn1(self.conv1(x)), 0.3)


def relu6(self: Any, x: Tensor) -> Tensor:
    return F.relu6(self.bn1(self.conv1(x)))


def clamp(self: Any, x: Tensor) -> Tensor:
    return self.bn1(self.conv1(x)).clamp(min=0)


def detached_between(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))).detach())) + x)


def part_of_the_batch(self: Any, x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat([self.relu(self.bn1(self.conv1(first))), self.relu(self.bn2(self.conv2(second)))])


OTHER_USES = (
    relu_used_twice, convolution_called_twice, norm_called_twice, functional_relus, relu_without_norm,
    value_before_the_relu_is_used, value_before_the_norm_is_used, in_place_relu_whose_result_is_ignored,
    in_place_relu_on_a_view, alias_of_an_in_place_sum, collected_before_an_in_place_sum, in_place_product_of_an_alias,
    two_outputs, leaky, relu6, clamp, detached_between, part_of_the_batch,
)  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("forward", [*ADDITIONS, *OTHER_USES], ids=lambda f: f.__name__)
def test_forwards(forward: Callable[..., Any], save: str) -> None:
    assert_same_network(forward_of(forward), save=save)
