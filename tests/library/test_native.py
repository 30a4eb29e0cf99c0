"""The compiled kernels where the small cases of test_functional.py do not reach: channels wider than a panel, a block or a group of
columns, Winograd's patches, several tiles and threads; and what is kept of packed weights."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import pytest
import torch
from conv_cases import EXTRAS, ConvCase, make_problem
from error_ratio import INT8_DS_TOLERANCE, TOLERANCE, assert_close
from implementations import NATIVE, running_on
from poison import poison_fresh_tensors
from torch import Tensor, nn

import svf_fast
from svf_fast import backends, functional
from svf_fast.backends import native

pytestmark = pytest.mark.skipif(not NATIVE, reason=f"no compiled kernels: {native.why_unusable('cpu')}")

SAVES = ("exact", "int8", "recompute")
POINTWISE = {"kernel": (1, 1), "padding": (0, 0)}
CASES = (
    # Winograd's patches: odd and even extents, dilations, padding from none to more than the taps reach
    ConvCase(channels=(40, 48), size=(9, 7)),
    ConvCase(channels=(33, 40), size=(10, 12), padding=(0, 0)),
    ConvCase(channels=(64, 32), size=(11, 13), dilation=(2, 2), padding=(2, 2)),
    ConvCase(channels=(32, 72), size=(13, 9), dilation=(4, 1), padding=(4, 1), batch=1),
    ConvCase(channels=(48, 33), size=(6, 5), dilation=(3, 2), padding=(5, 4)),
    ConvCase(channels=(36, 36), size=(3, 3), padding=(0, 0), batch=3),
    ConvCase(channels=(36, 36), size=(2, 41), dilation=(1, 9), padding=(1, 9)),
    # more patches than a tile has, and more input channels than a block
    ConvCase(channels=(280, 40), size=(23, 25)),
    # tap by tap: strides, unequal taps, more than one block of channels
    ConvCase(channels=(40, 33), size=(11, 12), stride=(2, 2)),
    ConvCase(channels=(270, 40), size=(7, 9), kernel=(2, 3), stride=(1, 2)),
    ConvCase(channels=(35, 40), size=(9, 9), kernel=(5, 1), padding=(2, 0), dilation=(2, 1)),
    ConvCase(channels=(33, 47), size=(5, 6), stride=(3, 3), padding=(3, 3)),
    # 1x1: wider than a group of columns, ranks that are no multiple of a vector, several tiles of pixels
    ConvCase(channels=(70, 300), size=(9, 11), **POINTWISE),
    ConvCase(channels=(530, 70), size=(5, 7), **POINTWISE),
    ConvCase(channels=(37, 65), size=(24, 23), rank=21, **POINTWISE),
    ConvCase(channels=(96, 64), size=(13, 12), stride=(2, 2), **POINTWISE),
    ConvCase(channels=(32, 64), size=(3, 3), kernel=(1, 1), padding=(1, 1)),
)


LARGE = ConvCase(channels=(40, 48), size=(23, 25))


@pytest.fixture(params=NATIVE, autouse=True)
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with running_on(request.param):
        poison_fresh_tensors(monkeypatch)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wide_layers(case: ConvCase, dtype: torch.dtype) -> None:
    extras = cycle(EXTRAS)
    for _ in range(CASES.index(case)):
        next(extras)
    for save in SAVES:
        problem = make_problem(case, dtype, next(extras), memory_format=torch.channels_last, seed=len(save))
        out = problem.run(save)
        own = {}
        if save == "int8":
            # few pixels average the noise out less
            pixels = problem.dy.numel() / problem.dy.shape[1]
            own["ds"] = max(1.5, 12 / pixels**0.5) * INT8_DS_TOLERANCE + TOLERANCE[dtype]
        assert_close(out, problem.reference(out["y"]), dtype, tolerance=own)
        assert out["y"].is_contiguous(memory_format=torch.channels_last)
        assert out["dx"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_on_any_number_of_threads(case: ConvCase, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype, EXTRAS[5], memory_format=torch.channels_last)
    for save in SAVES:
        one = problem.run(save)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            several = problem.run(save)
            torch.set_num_threads(1)
            for name, value in one.items():
                assert torch.equal(value, several[name]), f"{name}, {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_rebuilt_has_the_bits_of_what_is_kept(case: ConvCase, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype, EXTRAS[5], memory_format=torch.channels_last)
    kept, rebuilt = problem.run("exact"), problem.run("recompute")
    for name, value in kept.items():
        assert torch.equal(value, rebuilt[name]), name


@pytest.mark.parametrize("case", [CASES[2], CASES[8], CASES[12]], ids=str)
def test_slices_of_larger_tensors(case: ConvCase) -> None:
    """Channels, rows and columns out of the middle: read where they are."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(case, dtype, EXTRAS[5], memory_format=torch.channels_last)
        expected = problem.run()
        for field in ("x", "residual", "dy"):
            t: Tensor = getattr(problem, field)
            n, c, h, w = t.shape
            large = t.new_full((n + 1, c + 5, h, 2 * w + 1), float("nan")).contiguous(memory_format=torch.channels_last)
            view = large[1:, 3 : c + 3, :, 1 : 2 * w + 1 : 2]
            view.copy_(t)
            setattr(problem, field, view)
        out = problem.run()
        for name, value in expected.items():
            assert torch.equal(value, out[name]), name


def test_merged_convolutions_in_evaluation() -> None:
    """One convolution with shift, residual and ReLU in the same pass; s that changed is noticed."""
    for case in (CASES[0], CASES[3], CASES[8], CASES[12]):
        taps = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        conv = nn.Conv2d(*case.channels, case.kernel, **taps)
        layer = svf_fast.SVFConv2d.from_conv(copy.deepcopy(conv))
        x = torch.randn(2, case.channels[0], *case.size).contiguous(memory_format=torch.channels_last)
        residual = torch.randn_like(conv(x))
        with torch.no_grad():
            for _ in range(2):
                y = layer(x, residual=residual, activation="relu")
                exact = torch.relu(copy.deepcopy(conv).double()(x.double()) + residual)
                assert_close({"y": y}, {"y": exact}, torch.float32)
                layer.s.mul_(1.5)
                conv.weight.mul_(1.5)


def make_layer() -> tuple[svf_fast.SVFConv2d, Tensor]:
    """A layer whose factors are packed for Winograd's products, and a picture."""
    layer = svf_fast.SVFConv2d.from_conv(nn.Conv2d(40, 48, 3, padding=1, bias=False))
    return layer, torch.randn(1, 40, 9, 7).contiguous(memory_format=torch.channels_last)


def stock(layer: nn.Module, x: Tensor) -> Tensor:
    with svf_fast.backend("torch"):
        return layer(x)


def test_packed_weights_follow_their_sources() -> None:
    """In-place changes, state dicts, replaced data, another instruction set: never a stale weight."""
    layer, x = make_layer()
    layer(x)
    with torch.no_grad():
        layer.v.mul_(0.5)
    assert_close({"y": layer(x)}, {"y": stock(layer, x)}, torch.float32)
    layer.load_state_dict(make_layer()[0].state_dict())
    assert_close({"y": layer(x)}, {"y": stock(layer, x)}, torch.float32)
    layer.u.data = torch.randn_like(layer.u)
    assert_close({"y": layer(x)}, {"y": stock(layer, x)}, torch.float32)
    for name in NATIVE:
        with running_on(name):
            assert_close({"y": layer(x)}, {"y": stock(layer, x)}, torch.float32)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["training", "merged"])
def test_writes_through_data_are_noticed_at_the_next_train_or_eval(mode: Any) -> None:
    layer, x = make_layer()
    with mode():
        layer(x)
        # rows that change places, signs that turn: sums would stay
        layer.u.data[[0, 1]] = layer.u.data[[1, 0]]
        layer.v.data[:24].neg_()
        # whichever backend is chosen then
        with svf_fast.backend("torch"):
            layer.train()
        assert_close({"y": layer(x)}, {"y": stock(layer, x)}, torch.float32)


@pytest.mark.parametrize("save", SAVES)
def test_factors_that_no_module_owns_run_on_stock_operations(save: str) -> None:
    """Nobody says when their values change; int8 has the groups that the op's fake kernel promises."""
    problem = make_problem(LARGE, torch.float32, EXTRAS[5], memory_format=torch.channels_last)
    problem.u, problem.v = problem.u.detach().clone(), problem.v.detach().clone()
    for _ in range(2):
        out = problem.run(save)
        own = {"ds": 2 * INT8_DS_TOLERANCE} if save == "int8" else {}
        assert_close(out, problem.reference(out["y"]), torch.float32, tolerance=own)
        problem.u.data.mul_(2)
        problem.vectors["scale"].data.add_(0.25)


def test_linear_layers_run_on_views_of_their_factors() -> None:
    layer = svf_fast.SVFLinear.from_linear(nn.Linear(70, 130))
    x = torch.randn(3, 50, 70)
    y, expected = layer(x), stock(layer, x)
    assert_close({"y": y}, {"y": expected}, torch.float32)
    backend = backends.select(torch.device("cpu"))
    assert isinstance(backend, native.NativeBackend)
    assert layer.v in backend._weights._derived._of


def test_packed_weights_go_with_their_model() -> None:
    backend = backends.select(torch.device("cpu"))
    assert isinstance(backend, native.NativeBackend)
    kept = backend._weights._derived._of
    before = len(kept)
    layer, x = make_layer()
    held = backend.packed_bytes()
    layer(x).sum().backward()
    # forward: Winograd's 16 positions of V, and U; backward: U
    assert len(kept) == before + 2
    assert backend.packed_bytes() - held >= 4 * 40 * 48 * 16
    del layer
    gc.collect()
    assert len(kept) == before


def test_threads_share_a_model() -> None:
    """Several at once, on packed weights that are not there yet."""
    layer, x = make_layer()
    expected = stock(layer, x)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: layer(x), range(16)):
            assert_close({"y": y}, {"y": expected}, torch.float32)


def test_what_looks_at_the_operations_sees_stock_ones() -> None:
    """Forward-mode derivatives and traces of the evaluation path."""
    layer, x = make_layer()
    layer.requires_grad_(False).eval()
    tangent = torch.randn_like(x)
    y, dy = torch.func.jvp(layer, (x,), (tangent,))
    assert_close({"y": dy}, {"y": layer(tangent)}, torch.float32)
    traced = torch.jit.trace(layer, x)
    assert_close({"y": traced(x)}, {"y": y}, torch.float32)


@pytest.mark.parametrize("pixel", [0, 31, 62])
@pytest.mark.parametrize("case", [CASES[0], CASES[12]], ids=str)
def test_int8_keeps_what_is_not_a_number(case: ConvCase, pixel: int) -> None:
    problem = make_problem(case, torch.float32, {}, memory_format=torch.channels_last)
    problem.x[0, :, pixel // case.size[1], pixel % case.size[1]] = float("nan")
    assert problem.run("int8")["ds"].isnan().all()


def test_a_relu_stops_what_is_not_finite() -> None:
    for case in (CASES[0], CASES[12]):
        problem = make_problem(case, torch.float32, EXTRAS[5], memory_format=torch.channels_last)
        closed = problem.run()["y"] == 0
        problem.dy = torch.where(closed, torch.full_like(problem.dy, float("inf")), problem.dy)
        assert all(problem.run()[k].isfinite().all() for k in ("dx", "ds", "dresidual"))
        problem.x[0, 3, 2, 2] = float("nan")
        assert problem.run()["y"][0, :, 2, 2].isnan().all()


def test_the_prior_in_several_tiles() -> None:
    generator = torch.Generator().manual_seed(0)
    query, support = (torch.randn(2, 70, 23, n, generator=generator) for n in (19, 58))
    mask = (torch.rand(2, 1, 23, 58, generator=generator) > 0.3).float()
    exact = functional.max_cosine(query.double(), support.double(), mask=mask.double())
    one = functional.max_cosine(query, support, mask=mask)
    assert_close({"value": one}, {"value": exact}, torch.float32)
    torch.set_num_threads(2)
    assert torch.equal(one, functional.max_cosine(query, support, mask=mask))
    support[1, :, 4, 4] = float("nan")
    assert functional.max_cosine(query, support)[1].isnan().all()


def test_a_weight_packed_for_another_layer_is_refused() -> None:
    ops = torch.ops.svf_fast_cpp
    packed = ops.pack(torch.randn(1, 8, 40), False)
    x, y = (torch.zeros(1, c, 3, 3).contiguous(memory_format=torch.channels_last) for c in (40, 100))
    with pytest.raises(RuntimeError, match="right was packed for another layer or instruction set"):
        ops.forward(x, packed, False, None, None, None, None, y, None, None, None, False, [1, 1, 1, 1, 0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="extents do not fit"):
        ops.forward(x, packed, False, None, None, None, None, y, None, None, None, False, [3, 3, 1, 1, 0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="geometry must be eight integers"):
        ops.data_gradient(y, packed, x, [])
    with pytest.raises(RuntimeError, match=r"z must be \[1, 100, 3, 3\]"):
        ops.forward(
            x, packed, False, None, None, None, None, y, y[:, :, :2], None, None, False, [1, 1, 1, 1, 0, 0, 1, 1]
        )
