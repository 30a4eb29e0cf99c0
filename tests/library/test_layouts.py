"""Memory formats around SVFConv2d: what keeps which, and pictures whose strides read as either."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from error_ratio import assert_close
from implementations import IMPLEMENTATIONS
from networks import picture
from torch import nn

from svf_fast import SVFConv2d, reference

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def test_right_factors_and_merged_weight_keep_the_memory_format_of_the_weight() -> None:
    conv = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    layer = SVFConv2d.from_conv(conv)
    for weight in (layer.v, layer.merged().weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    x = picture(2, 6, 9, 8, dtype=torch.float32)
    assert_close({"y": layer(x)}, {"y": conv(x)}, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_wide_padding_without_a_graph(layout: torch.memory_format) -> None:
    conv = nn.Conv2d(6, 8, 3, padding=4, dilation=4)
    x = picture(2, 6, 9, 8, dtype=torch.float32).contiguous(memory_format=layout)
    with torch.no_grad():
        y, expected = SVFConv2d.from_conv(conv)(x), conv(x)
    assert_close({"y": y}, {"y": expected}, torch.float32)
    assert y.stride() == expected.stride()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [(1, 4), (6, 1), (1, 1)])
def test_grey_pictures_whose_strides_read_as_either_format(channels: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # one singular value's gradient is one sum of either sign: drawn anew each time, it may cancel
    torch.manual_seed(2)
    try:
        for x_layout, dy_layout in product(LAYOUTS, LAYOUTS):
            layer = SVFConv2d.from_conv(nn.Conv2d(*channels, 1, bias=False))
            x = torch.randn(2, channels[0], 32, 33).to(memory_format=x_layout).requires_grad_()
            residual, dy = (torch.randn(2, channels[1], 32, 33).to(memory_format=dy_layout) for _ in range(2))
            found = _gradients(
                layer(x, residual=residual.requires_grad_(), activation="relu"), (x, layer.s, residual), dy
            )
            x64, v, s, u, residual64 = (
                t.detach().double() for t in (x, layer.v, layer.s, layer.u, residual)
            )  # fmt: skip
            inputs = (x64.requires_grad_(), s.requires_grad_(), residual64.requires_grad_())
            y = reference.svf_conv2d(x64, v, s, u, residual=residual64, activation="relu")
            assert_close(found, _gradients(y, inputs, dy.double()), torch.float32)
    finally:
        torch.set_num_threads(before)


def _gradients(y: torch.Tensor, inputs: tuple[torch.Tensor, ...], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    names = ("dx", "ds", "dresidual")
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, inputs, dy), strict=True))}
