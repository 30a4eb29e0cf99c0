"""What is kept for backward: one bit an element of a ReLU's output, and z as int8 with unbiased rounding."""

from __future__ import annotations

import pytest
import torch
from conv_cases import ConvCase, make_problem
from error_ratio import error_ratio
from torch import Tensor

from svf_fast.bits import keep_masked, pack_nonzero, packed_bytes
from svf_fast.quantize import quantize

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 4099])
def test_a_packed_mask_keeps_exactly_the_non_zero_elements(count: int, dtype: torch.dtype) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).relu().to(dtype)
    mask = pack_nonzero(values)
    assert mask.dtype == torch.uint8
    assert mask.numel() == packed_bytes(count) == -(-count // 8)
    gradient = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(keep_masked(gradient, mask), torch.where(values != 0, gradient, 0))


def test_bits_lie_lowest_first_and_the_rest_of_the_last_byte_is_zero() -> None:
    values = torch.tensor([1.0, 0, 0, 2, 0, 0, 0, 3, 0, 1, 1])
    assert pack_nonzero(values).tolist() == [0b10001001, 0b00000110]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    special = [float("nan"), float("inf"), 0.0, -0.0, torch.finfo(dtype).smallest_normal, 1.0]
    values = torch.tensor(special, dtype=dtype)
    gradient = torch.tensor([1.0, 2.0, float("nan"), float("inf"), 3.0, float("nan")], dtype=dtype)
    kept = keep_masked(gradient, pack_nonzero(values))
    assert kept[:2].tolist() == [1.0, 2.0]
    assert kept[2:4].tolist() == [0.0, 0.0]
    assert kept[4] == 3
    assert kept[5].isnan()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_within_one_level_and_in_zs_layout(dtype: torch.dtype, layout: torch.memory_format) -> None:
    z = torch.randn(3, 5, 17, 9, generator=torch.Generator().manual_seed(0)).to(dtype).contiguous(memory_format=layout)
    q, scale = quantize(z)
    assert (q.dtype, scale.dtype, list(scale.shape)) == (torch.int8, torch.float32, [1, 5])
    assert q.stride() == z.stride()
    assert q.int().abs().max() <= 127
    level = scale.view(1, -1, 1, 1)
    assert ((q * level - z.float()).abs() <= level * (1 + 1e-5)).all()
    largest = z.float().abs().amax((0, 2, 3))
    assert torch.allclose(scale[0] * 127, largest)


def test_int8_rounding_is_unbiased() -> None:
    """The same values at many places of the noise table: their mean is the value, within five standard errors."""
    copies = 4096
    one = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    q, scale = quantize(one.expand(copies, -1, -1, -1).contiguous())
    level = scale.view(1, -1, 1, 1)
    bias = (q.double() * level).mean(0, keepdim=True) - one
    assert (bias.abs() <= 5 * 0.5 * level / copies**0.5).all()


def test_int8_gives_an_unbiased_gradient() -> None:
    """ds of many inputs that differ by a shift of the picture only: the mean error vanishes as 1 / √n."""
    case = ConvCase(batch=1, channels=(6, 5), kernel=(1, 1), padding=(0, 0), size=(16, 16))
    problem = make_problem(case, torch.float64, {}, memory_format=torch.contiguous_format)
    x, dy = problem.x, problem.dy
    exact = problem.run("exact")["ds"]
    errors = []
    for shift in range(256):
        problem.x, problem.dy = (t.roll((shift // 16, shift % 16), (2, 3)) for t in (x, dy))
        errors.append(problem.run("int8")["ds"] - exact)
    error = torch.stack(errors)
    deviation = error.std(0)
    assert (deviation > 0).all()
    assert (error.mean(0).abs() <= 5 * deviation / 16).all()


def test_int8_noise_is_no_larger_than_stochastic_rounding_has_it() -> None:
    """Against a gradient without any direction: Σ δ ⊙ g with δ of variance level² / 6."""
    case = ConvCase(channels=(16, 24), size=(41, 39))
    problem = make_problem(case, torch.float64, {}, memory_format=torch.channels_last)
    error = problem.run("int8")["ds"] - problem.run("exact")["ds"]
    z = torch.nn.functional.conv2d(problem.x, problem.v, padding=1)
    g = torch.einsum("nohw,or->nrhw", problem.dy, problem.u)
    level = z.abs().amax((0, 2, 3)) / 127
    expected = level / 6**0.5 * g.square().sum((0, 2, 3)).sqrt()
    assert error.norm() <= 1.5 * expected.norm()


def test_two_channels_with_equal_values_get_different_noise() -> None:
    z = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(3)).expand(1, 2, 64, 64).contiguous()
    q, _ = quantize(z)
    assert not torch.equal(q[:, 0], q[:, 1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_elements_than_the_noise_table_holds(layout: torch.memory_format) -> None:
    z = torch.randn(1, 4, 600, 500, generator=torch.Generator().manual_seed(4)).contiguous(memory_format=layout)
    q, scale = quantize(z)
    assert error_ratio(q * scale.view(1, -1, 1, 1), z) < 0.02


def test_a_zero_channel_stays_zero() -> None:
    z = torch.randn(2, 3, 4, 4)
    z[:, 1] = 0
    q, scale = quantize(z)
    assert q[:, 1].eq(0).all()
    assert scale[0, 1] == 0


@pytest.mark.parametrize("value", [1e-39, 1e-30, 3e38, 65504.0])
def test_extreme_channels_keep_their_size(value: float) -> None:
    z = torch.full((1, 2, 4, 4), value)
    z[:, 1] *= -1
    z[0, :, 0, 0] = 0
    q, scale = quantize(z)
    assert error_ratio(q.double() * scale.double().view(1, -1, 1, 1), z) < 0.02


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_has_no_finite_gradient(poison: float) -> None:
    """An int8 z must not hide a NaN from a loss scaler."""
    problem = make_problem(ConvCase(), torch.float32, {}, memory_format=torch.contiguous_format)
    problem.x[0, 0, 4, 4] = poison
    assert not problem.run("int8")["ds"].isfinite().any()


def test_quantizing_nothing() -> None:
    q, scale = quantize(torch.empty(0, 3, 4, 4))
    assert q.shape == (0, 3, 4, 4)
    assert torch.equal(scale, torch.zeros(1, 3))


def test_quantize_does_not_write_into_z() -> None:
    z: Tensor = torch.randn(2, 3, 4, 5)
    before = z.clone()
    quantize(z)
    assert torch.equal(z, before)
