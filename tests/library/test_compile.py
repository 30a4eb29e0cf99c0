"""torch.compile and torch.export of converted models."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from error_ratio import assert_close, error_ratio
from networks import CHANNELS, NETWORKS, picture, run, settle
from torch import Tensor

import svf_fast
from svf_fast.functional import max_cosine

SAVES = ("exact", "int8", "recompute")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "save"),
    [("bottlenecks", "exact"), ("inline downsample", "recompute"), ("heads", "int8"), ("vgg", "recompute")],
)
def test_a_compiled_model_is_the_same(name: str, save: str) -> None:
    model = svf_fast.convert(settle(NETWORKS[name]()), save=save)
    x = picture(2, CHANNELS, 9, 8)
    expected = run(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    for value in svf_fast.singular_values(model).values():
        value.grad = None
    out = compiled(leaf)
    outs = list(out.values()) if isinstance(out, dict) else [out]
    total = sum((t * torch.arange(t.numel(), dtype=t.dtype).view(t.shape).cos()).sum() for t in outs)
    assert isinstance(total, Tensor)
    total.backward()
    assert leaf.grad is not None
    result = {f"out{i}": t.detach() for i, t in enumerate(outs)} | {"dx": leaf.grad}
    result |= {f"ds of {n}": v.grad for n, v in svf_fast.singular_values(model).items() if v.grad is not None}
    assert_close(result, expected, torch.float64)
    with torch.no_grad():
        first = compiled(x)
        first = next(iter(first.values())) if isinstance(first, dict) else first
        assert error_ratio(first, expected["out0"]) < 1e-12


def test_a_compiled_model_follows_training() -> None:
    model = svf_fast.convert(settle(NETWORKS["basic blocks"]()))
    compiled = torch.compile(model, backend="aot_eager")
    x = picture()
    for _ in range(3):
        with torch.no_grad():
            assert error_ratio(compiled(x), model(x)) < 1e-12
        with torch.no_grad():
            for value in svf_fast.singular_values(model).values():
                value.mul_(1.3)
        assert error_ratio(compiled(x), model(x)) < 1e-12


def test_compiling_with_dynamic_shapes() -> None:
    model = svf_fast.convert(settle(NETWORKS["inline downsample"]()))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for size in ((2, CHANNELS, 9, 8), (3, CHANNELS, 11, 7)):
        x = picture(*size).requires_grad_()
        y = compiled(x)
        y.sum().backward()
        assert error_ratio(y, model(x.detach())) < 1e-12


def test_compiling_the_prior() -> None:
    query, support = (picture(1, 5, 6, 6, seed=n).requires_grad_() for n in (0, 1))
    compiled = torch.compile(lambda q, a: max_cosine(q, a).square().sum(), backend="aot_eager", fullgraph=True)
    gradients = [
        torch.autograd.grad(f(query, support), (query, support))
        for f in (compiled, lambda q, a: max_cosine(q, a).square().sum())
    ]
    for ours, expected in zip(*gradients, strict=True):
        assert error_ratio(ours, expected) < 1e-12


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++ on PATH")
@pytest.mark.slow
def test_a_model_compiled_by_inductor_is_the_same() -> None:
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()).float())
    x = picture(2, CHANNELS, 9, 8, dtype=torch.float32)
    expected = run(model, x)
    compiled: Any = torch.compile(model)
    out = run(compiled, x)
    assert_close({k.replace("_orig_mod.", ""): v for k, v in out.items()}, expected, torch.float32)


def test_export() -> None:
    model = svf_fast.convert(settle(NETWORKS["basic blocks"]()))
    x = picture()
    exported = torch.export.export(model, (x,)).module()
    assert error_ratio(exported(x), model(x)) < 1e-12
