"""The defects of the released SVF code, each as a statement that holds here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from error_ratio import error_ratio
from torch import nn

import svf_fast
from svf_fast import SVFConv2d, SVFLinear


def forward_error(original: nn.Module, x: torch.Tensor) -> float:
    converted = svf_fast.convert(copy.deepcopy(original))
    with_graph = error_ratio(converted(x), original(x))
    with torch.no_grad():
        return max(with_graph, error_ratio(converted(x), original(x)))


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 7, 21, 22, 23])
def test_the_rank_is_never_rounded_to_a_multiple_of_four(channels: int) -> None:
    """Released: 21 output channels lose 11.6 % of the output."""
    conv = nn.Conv2d(64, channels, 1)
    assert SVFConv2d.from_conv(conv).rank == channels
    assert forward_error(conv, torch.randn(2, 64, 5, 5)) < 1e-5


@pytest.mark.parametrize("sizes", [(10, 4), (4, 10), (7, 7), (5, 1)], ids=str)
def test_linear_factors_are_the_weights(sizes: tuple[int, int]) -> None:
    """Released: the Linear factors stay random, 101 % error."""
    linear = nn.Linear(*sizes)
    assert SVFLinear.from_linear(linear).rank == min(sizes)
    assert forward_error(linear, torch.randn(3, sizes[0])) < 1e-5


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups_are_honoured(groups: int) -> None:
    """Released: groups=4 is treated as dense, 124 % error."""
    assert forward_error(nn.Conv2d(8, 16, 3, groups=groups, padding=1), torch.randn(2, 8, 6, 6)) < 1e-5


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_are_honoured(mode: Any) -> None:
    """Released: reflect padding is dropped, 37 % error."""
    assert forward_error(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), torch.randn(2, 4, 6, 6)) < 1e-5


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1)], ids=str)
def test_a_one_channel_convolution_is_converted(shape: tuple[int, int]) -> None:
    """Released: silently skipped."""
    conv = nn.Sequential(nn.Conv2d(*shape, 3), nn.ReLU())
    assert list(svf_fast.singular_values(svf_fast.convert(copy.deepcopy(conv)))) == ["0"]
    assert forward_error(conv, torch.randn(2, shape[0], 5, 5)) < 1e-5


@pytest.mark.parametrize("root", [nn.Conv2d(3, 4, 3), nn.Linear(5, 4)], ids=("conv", "linear"))
def test_a_bare_root_is_converted(root: nn.Module) -> None:
    """Released: silently skipped."""
    converted = svf_fast.convert(copy.deepcopy(root))
    assert [p.requires_grad for n, p in converted.named_parameters() if n == "s"] == [True]


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        svf_fast.convert(nn.Sequential(nn.ReLU()))


def test_stride_dilation_and_bias_are_honoured() -> None:
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 1), bias=True)
    assert forward_error(conv, torch.randn(2, 4, 9, 8)) < 1e-5


def test_biases_survive_the_round_trip() -> None:
    conv = nn.Conv2d(4, 6, 3)
    assert conv.bias is not None
    merged: Any = svf_fast.merge(svf_fast.convert(copy.deepcopy(conv)))
    assert torch.equal(merged.bias, conv.bias)


def test_frozen_factors_are_parameters_and_not_buffers() -> None:
    """DDP broadcasts buffers at every step."""
    layer = SVFConv2d.from_conv(nn.Conv2d(64, 64, 3))
    assert {"u", "v"} <= {n for n, _ in layer.named_parameters()}
    broadcast = sum(b.nbytes for b in layer.buffers())
    assert broadcast <= 64 * 4 + 32


def test_a_cosine_schedule_over_singular_values_anneals() -> None:
    """Released: the scheduler is built anew at every step, so the rate never falls."""
    model = svf_fast.convert(nn.Conv2d(3, 4, 3))
    optimiser = torch.optim.SGD(svf_fast.singular_values(model).values(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10)
    for _ in range(10):
        model(torch.randn(1, 3, 5, 5)).sum().backward()
        optimiser.step()
        schedule.step()
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0)


def test_singular_values_never_load_onto_other_weights(tmp_path: Any) -> None:
    svf_fast.save_singular_values(svf_fast.convert(nn.Conv2d(3, 4, 3)), tmp_path / "s")
    with pytest.raises(ValueError, match="made for other base weights"):
        svf_fast.load_singular_values(svf_fast.convert(nn.Conv2d(3, 4, 3)), tmp_path / "s")
