"""Autocast and GradScaler: dtypes of the original network, gradients of float32."""

from __future__ import annotations

import copy

import pytest
import torch
from conv_cases import EXTRAS, ConvCase, make_problem
from error_ratio import assert_close, error_ratio
from networks import CHANNELS, NETWORKS, picture, settle
from torch import Tensor

import svf_fast
from svf_fast.functional import svf_conv2d

SAVES = ("exact", "int8", "recompute")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(name: str, save: str) -> None:
    """Dtypes of the original network, and no further from float64 than twice its error (three times for gradients)."""
    original = settle(NETWORKS[name]()).float()
    model = svf_fast.convert(copy.deepcopy(original), save=save)
    # enough pictures that the few logits of each do not decide by luck
    x = picture(16, CHANNELS, 9, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = original(x)
        out = model(x)
        with torch.no_grad():
            plain = model(x)
    exact = copy.deepcopy(original).double()(x.double())
    if isinstance(expected, Tensor):
        expected, out, plain, exact = ({"y": t} for t in (expected, out, plain, exact))
    for key, value in expected.items():
        assert out[key].dtype == value.dtype, f"{key} in training"
        assert plain[key].dtype == value.dtype, f"{key} in evaluation"
        limit = 2 * error_ratio(value, exact[key])
        assert error_ratio(out[key], exact[key]) <= limit, key
        assert error_ratio(plain[key], exact[key]) <= limit, key
    sum(t.float().sum() for t in out.values()).backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in svf_fast.singular_values(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_the_functional_layer(dtype: torch.dtype) -> None:
    problem = make_problem(ConvCase(), torch.float32, EXTRAS[5], memory_format=torch.contiguous_format)
    with torch.autocast("cpu", dtype):
        s = problem.s.detach().requires_grad_()
        x = problem.x.detach().requires_grad_()
        y = svf_conv2d(x, problem.v, s, problem.u, residual=problem.residual, **problem.vectors, **problem.keywords)
    assert y.dtype == dtype
    y.backward(problem.dy.to(dtype))
    assert x.grad is not None
    assert s.grad is not None
    assert (x.grad.dtype, s.grad.dtype) == (torch.float32, torch.float32)
    expected = problem.reference(y)
    assert_close({"y": y, "dx": x.grad, "ds": s.grad}, {k: expected[k] for k in ("y", "dx", "ds")}, dtype)


def test_autocast_leaves_float64_alone() -> None:
    model = svf_fast.convert(settle(NETWORKS["vgg"]()))
    expected = model(picture())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(picture()), expected)
        with torch.no_grad():
            assert model(picture()).dtype == torch.float64


@pytest.mark.parametrize("save", SAVES)
def test_float16_with_a_gradient_scaler(save: str) -> None:
    """The scaled backward pass in float16 gives the gradients of float32, and steps are not skipped."""
    original = settle(NETWORKS["basic blocks"]()).float()
    x = picture(2, CHANNELS, 9, 8, dtype=torch.float32)
    reference = svf_fast.convert(copy.deepcopy(original))
    reference(x).square().mean().backward()
    for layout in LAYOUTS:
        model = svf_fast.convert(copy.deepcopy(original), save=save)
        values = svf_fast.singular_values(model)
        optimiser = torch.optim.SGD(values.values(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        with torch.autocast("cpu", torch.float16):
            loss = model(x.contiguous(memory_format=layout)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        tolerance = 5e-2 if save == "int8" else 1e-2
        for name, value in svf_fast.singular_values(reference).items():
            assert value.grad is not None
            gradient = values[name].grad
            assert gradient is not None
            assert error_ratio(gradient, value.grad) < tolerance, name
        before = {k: v.detach().clone() for k, v in values.items()}
        scaler.step(optimiser)
        scaler.update()
        assert all(not torch.equal(v, before[k]) for k, v in values.items())
