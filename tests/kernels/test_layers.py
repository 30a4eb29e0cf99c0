"""Every kernel of the layer against float64, through the op and each of its ways: outputs, all gradients by name, odd sizes,
both memory formats, sliced inputs, every tile configuration on offer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, product
from typing import Any

import pytest
import torch
from conv_cases import CASES, EXTRAS, ConvCase, Problem, make_problem
from device import DEVICE
from error_ratio import INT8_DS_TOLERANCE, TOLERANCE, assert_close, error_ratio
from torch import Tensor
from ways import Forced, on_device, path

import svf_fast
from svf_fast import functional
from svf_fast.backends import cuda_kernels
from svf_fast.backends.by_ways import WaysBackend
from svf_fast.backends.kernel_set import KernelSet
from svf_fast.backends.ways import Way, first_offer
from svf_fast.kernels import configs
from svf_fast.quantize import GROUP_PIXELS, quantize

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SAVES = ("exact", "int8", "recompute")
PATHS = ("fused", "project", "epilogue", "merged")
# tf32 has ten bits of mantissa
TF32_TOLERANCE = 2e-3


def check(problem: Problem, save: str, dtype: torch.dtype, tolerance: float | None = None) -> dict[str, Tensor]:
    """Runs the problem in the backend in force and compares with float64."""
    out = problem.run(save)
    reference = problem.reference(out["y"])
    own = {} if tolerance is None else dict.fromkeys(out, tolerance)
    if save == "int8":
        # few pixels average the noise out less
        pixels = problem.dy.numel() / problem.dy.shape[1]
        own["ds"] = max(1.5, 12 / pixels**0.5) * INT8_DS_TOLERANCE + (
            TOLERANCE[dtype] if tolerance is None else tolerance
        )
    assert_close(out, reference, dtype, tolerance=own)
    return out


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_way_on_each_geometry(case: ConvCase, name: str, kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """Layouts, save modes, dtypes and what surrounds the layer take turns, another phase for each geometry."""
    turn = CASES.index(case)
    dtypes = cycle((torch.float32, torch.bfloat16, torch.float16))
    extras = cycle(EXTRAS)
    for _ in range(turn):
        next(dtypes), next(extras)
    # programs of the interpreter are slow: a third of the combinations for each geometry, another third for the next
    combinations = [(LAYOUTS[(turn + i) % 2], save) for i, save in enumerate(SAVES)]
    if name == "merged":
        combinations = [(layout, "recompute") for layout in LAYOUTS]
    for layout, save in combinations:
        dtype = next(dtypes)
        problem = on_device(make_problem(case, dtype, next(extras), memory_format=layout, seed=turn), DEVICE)
        with within(path(kernels, name)):
            out = check(problem, save, dtype)
        assert out["y"].is_contiguous(memory_format=layout)
        assert out["dx"].is_contiguous(memory_format=layout)


SAVED = ("exact", "int8")
PRECISIONS = ("ieee", "tf32", "tf32x3")
RANKS = (100, 200)
OFFERS = {"triton": configs, "cuda": cuda_kernels.Offers(has_wgmma=True)}
FORWARD_OFFERS = [
    (kernels, save, precision, "fused", config)
    for (kernels, offers), save, precision, rank in product(OFFERS.items(), SAVED, PRECISIONS, RANKS)
    for config in offers.back_to_back_forward(rank, precision, save == "int8", save == "exact")
]
FORWARD_OFFERS += [
    (kernels, save, precision, "project", config)
    for (kernels, offers), save, precision in product(OFFERS.items(), SAVED, PRECISIONS)
    for config in offers.projection_forward(precision)
]
BACKWARD_OFFERS = [
    (kernels, save, precision, name, config)
    for (kernels, offers), save, precision, rank in product(OFFERS.items(), SAVED, PRECISIONS, RANKS)
    for name, found in (
        ("fused", offers.back_to_back_backward(rank, precision, False)),
        ("project", offers.projection_backward(rank, precision)),
    )
    for config in found
]
CONFIGURATION = ("kernels", "save", "precision", "name", "config")


@pytest.mark.parametrize(CONFIGURATION, list(dict.fromkeys(FORWARD_OFFERS)), ids=str, indirect=["kernels"])
def test_every_forward_configuration(
    kernels: KernelSet, save: str, precision: str, name: str, config: Any, within: Callable[[Any], Any]
) -> None:  # fmt: skip
    """Several tiles each way, none of them whole; masks beside products where channels come in whole words."""
    _check_configuration(kernels, save, precision, name, config, within)


@pytest.mark.parametrize(CONFIGURATION, list(dict.fromkeys(BACKWARD_OFFERS)), ids=str, indirect=["kernels"])
def test_every_backward_configuration(
    kernels: KernelSet, save: str, precision: str, name: str, config: Any, within: Callable[[Any], Any]
) -> None:  # fmt: skip
    _check_configuration(kernels, save, precision, name, config, within)


def _check_configuration(
    kernels: KernelSet, save: str, precision: str, name: str, config: Any, within: Callable[[Any], Any]
) -> None:  # fmt: skip
    # conftest puts it back
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype = torch.bfloat16 if precision == "ieee" else torch.float32
    rank = 200 if config.BR > 128 else 100
    wanted = Forced(kernels, lambda way: way == Way(name, config))
    # more blocks of columns than a ring has slots, where that does not take minutes
    wide = 352 if kernels.name == "cuda" else 160
    for channels in ((rank, wide), (135, rank)):
        case = ConvCase(
            batch=2, channels=channels, kernel=(1, 1), padding=(0, 0), size=(9, 11), rank=min(rank, *channels)
        )
        problem = on_device(make_problem(case, dtype, EXTRAS[5], memory_format=torch.channels_last), DEVICE)
        with within(wanted.backend):
            check(problem, save, dtype, TF32_TOLERANCE if precision == "tf32" else None)
    assert wanted.taken


@pytest.mark.parametrize("name", ["fused", "project"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sliced_and_expanded_inputs(
    name: str, dtype: torch.dtype, kernels: KernelSet, within: Callable[[Any], Any]
) -> None:
    """Read where they are: x, the residual and dy sliced out of larger tensors, at multiples of 16 bytes and not, dy one value
    expanded, then transposed."""
    case = ConvCase(channels=(36, 32), kernel=(1, 1), padding=(0, 0), size=(9, 7))

    def cut(t: Tensor, before: int, layout: torch.memory_format) -> Tensor:
        channels = t.shape[1]
        after = -channels % 8 if before % 8 == 0 else 1
        # before 8: channels alone are cut off, and pixels stay equally far apart
        size = (9, 7) if before == 8 else (12, 17)
        large = torch.randn(3, before + channels + after, *size).to(dtype).contiguous(memory_format=layout)
        cut_out = large[1:, before : before + channels]
        return cut_out if before == 8 else cut_out[:, :, 2:11, 1:15:2]

    for layout, before in ((LAYOUTS[0], 2), (LAYOUTS[1], 2), (LAYOUTS[1], 8), (LAYOUTS[1], 16)):
        problem = make_problem(case, dtype, EXTRAS[5], memory_format=layout)
        assert problem.residual is not None
        problem.x, problem.residual = (cut(t, before, layout) for t in (problem.x, problem.residual))
        other = problem.dy.mT.contiguous().mT if before == 2 else torch.ones((), dtype=dtype).expand(problem.dy.shape)
        for dy in (other, cut(problem.dy, before, layout)):
            problem.dy = dy
            with within(path(kernels, name)):
                check(on_device(problem, DEVICE), "exact", dtype)


@pytest.mark.parametrize("name", PATHS)
def test_factors_and_vectors_of_any_strides(name: str, kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """Transposed factors, as a QR or SVD returns them, and every second value of a vector."""
    for case in (CASES[1], ConvCase(channels=(8, 8))):
        problem = make_problem(case, torch.float32, EXTRAS[5], memory_format=torch.channels_last)
        problem.u, problem.v = problem.u.mT.contiguous().mT, problem.v.transpose(0, 1).contiguous().transpose(0, 1)
        problem.s = problem.s.repeat_interleave(2)[::2]
        problem.vectors = {n: t.repeat_interleave(2)[::2] for n, t in problem.vectors.items()}
        for save in ("exact", "recompute"):
            with within(path(kernels, name)):
                check(on_device(problem, DEVICE), save, torch.float32)


@pytest.mark.parametrize("save", SAVES)
def test_only_what_is_asked_for(save: str, kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """Each subset of x, s and residual: the same gradients as when all are asked for, and none else."""
    case = ConvCase(channels=(24, 32), kernel=(1, 1), padding=(0, 0))
    problem = on_device(make_problem(case, torch.float32, EXTRAS[5], memory_format=torch.channels_last), DEVICE)
    for name in ("fused", "project"):
        with within(path(kernels, name)):
            full = problem.run(save)
            for asked in product((True, False), repeat=3):
                if not any(asked):
                    continue
                tensors = [
                    t.detach().requires_grad_(needed)
                    for t, needed in zip((problem.x, problem.s, problem.residual), asked, strict=True)
                ]
                x, s, residual = tensors
                y = functional.svf_conv2d(
                    x, problem.v, s, problem.u, residual=residual, **problem.vectors, **problem.keywords, save=save
                )
                y.backward(problem.dy)
                for t, needed, gradient in zip(tensors, asked, ("dx", "ds", "dresidual"), strict=True):
                    assert (t.grad is not None) == needed
                    if t.grad is not None:
                        # another kernel may compute it
                        assert torch.allclose(t.grad, full[gradient], rtol=1e-4, atol=1e-4)


def test_the_relu_stops_what_is_not_finite(kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """Zero where the ReLU was closed even under an infinite or NaN dy; NaN in x reaches y."""
    case = ConvCase(channels=(24, 32), kernel=(1, 1), padding=(0, 0))
    for name in ("fused", "project"):
        problem = on_device(make_problem(case, torch.float32, EXTRAS[5], memory_format=torch.channels_last), DEVICE)
        with within(path(kernels, name)):
            closed = problem.run()["y"] == 0
            problem.dy = torch.where(closed, torch.full_like(problem.dy, float("inf")), problem.dy)
            out = problem.run()
            assert all(out[k].isfinite().all() for k in ("dx", "ds", "dresidual"))
            problem.x[0, 3, 2, 2] = float("nan")
            assert problem.run()["y"][0, :, 2, 2].isnan().all()


@pytest.mark.parametrize("name", ["fused", "project", "epilogue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_z_of_one_backend_is_read_by_the_other(
    dtype: torch.dtype, name: str, kernels: KernelSet, within: Callable[[Any], Any]
) -> None:
    """Forward in one backend and backward in the other: one scale a channel for all pixels here, for each 64 pixels in N·H·W
    order there."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    case = ConvCase(channels=(40, 32), kernel=(1, 1), padding=(0, 0), size=(9, 11))
    for layout, is_ours_first in product(LAYOUTS, (True, False)):
        problem = on_device(make_problem(case, dtype, EXTRAS[5], memory_format=layout), DEVICE)
        s = problem.s.detach().requires_grad_()
        with within(path(kernels, name)) if is_ours_first else svf_fast.backend("torch"):
            y = functional.svf_conv2d(
                problem.x, problem.v, s, problem.u, residual=problem.residual, **problem.vectors, **problem.keywords,
                save="int8",
            )  # fmt: skip
            groups = -(-2 * 9 * 11 // GROUP_PIXELS) if is_ours_first else 1
            assert (groups, 32) in [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None]
        with svf_fast.backend("torch") if is_ours_first else within(path(kernels, name)):
            y.backward(problem.dy)
        assert s.grad is not None
        expected = problem.reference(y.detach())["ds"]
        assert_close({"ds": s.grad}, {"ds": expected}, dtype, tolerance={"ds": 2 * INT8_DS_TOLERANCE})


@pytest.mark.parametrize("name", PATHS)
def test_float16_overflows_no_sooner_than_stock_operations(
    name: str, kernels: KernelSet, within: Callable[[Any], Any]
) -> None:
    """Singular values of hundreds between factors of hundredths: s ⊙ z and s ⊙ g are beyond 65504, y and dx are not."""
    x, v = torch.full((1, 16, 4, 4), 160.0), torch.full((16, 16, 1, 1), 0.25)
    u, scale = torch.full((32, 16), 0.01), torch.full((32,), 1e-3)
    dy = torch.full((1, 32, 4, 4), 200.0)
    layer = {"save": "recompute" if name == "merged" else "exact"}
    x, v, u, dy = (
        t.half().contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.half() for t in (x, v, u, dy)
    )
    found = []
    for context in (nullcontext(), within(path(kernels, name))):
        with context:
            inputs = x.to(DEVICE).requires_grad_(), torch.full((16,), 200.0, device=DEVICE, requires_grad=True)
            y = functional.svf_conv2d(inputs[0], v.to(DEVICE), inputs[1], u.to(DEVICE), scale=scale.to(DEVICE), **layer)
            # past the frozen scale: as large as the gradient of a scaled loss
            (dx,) = torch.autograd.grad(y, inputs[0], (dy / 1e-3 / 4).clamp(max=60000).to(DEVICE))
            found.append((y.detach(), dx))
    for stock, ours in zip(*found, strict=True):
        assert stock.isfinite().all()
        assert torch.allclose(stock, ours, rtol=2e-2)


@pytest.mark.parametrize("name", ["fused", "project"])
def test_a_chain_rebuilds_its_layers_in_backward(name: str, kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """save="recompute" on a bottleneck of modules: the same gradients as with every z kept."""
    from networks import Bottleneck  # type: ignore[attr-defined]

    torch.manual_seed(0)
    block = Bottleneck(64, 16).eval()
    results = []
    for save in ("exact", "recompute"):
        converted = svf_fast.convert(copy.deepcopy(block), save=save).to(DEVICE)
        x = torch.randn(1, 64, 7, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        with within(path(kernels, name)):
            y = converted(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *svf_fast.singular_values(converted).values()])
        results.append([y.detach(), *gradients])
    for a, b in zip(*results, strict=True):
        assert error_ratio(a, b) < 1e-5


@pytest.mark.parametrize("name", ["fused", "project"])
def test_float32_over_a_long_contraction(name: str, kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """What tensor cores truncate must not add up: 2048 products a sum, in forward (fused) and backward."""
    case = ConvCase(batch=1, channels=(2048, 2048), kernel=(1, 1), padding=(0, 0), size=(3, 3), rank=16)
    problem = on_device(make_problem(case, torch.float32, {}, memory_format=torch.channels_last), DEVICE)
    with within(path(kernels, name)):
        check(problem, "exact", torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_by_the_kernel_is_int8_by_stock_operations(dtype: torch.dtype, kernels: KernelSet) -> None:
    """Level by level; on a device the compiler may round once where stock operations round twice."""
    for layout, rank in product(LAYOUTS, (5, 72)):
        z = torch.randn(3, rank, 7, 9, generator=torch.Generator().manual_seed(rank)).to(dtype)
        z[0, 1] = 0
        z = z.contiguous(memory_format=layout).to(DEVICE)
        expected, expected_scale = quantize(z, GROUP_PIXELS)
        q, q_scale = torch.empty_like(expected), torch.empty_like(expected_scale)
        kernels.elementwise.quantize(z, q, q_scale)
        off = (q.int() - expected.int()).abs()
        assert q.stride() == z.stride() == expected.stride()
        assert off.max() <= (DEVICE == "cuda")
        assert off.float().mean() < 1e-3
        assert torch.allclose(q_scale, expected_scale, rtol=1e-6)


def test_the_same_bits_run_to_run(kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    case = ConvCase(channels=(40, 32), kernel=(1, 1), padding=(0, 0), size=(9, 11))
    problem = on_device(make_problem(case, torch.bfloat16, EXTRAS[5], memory_format=torch.channels_last), DEVICE)
    for name, save in product(("fused", "project"), SAVES):
        with within(path(kernels, name)):
            first, second = problem.run(save), problem.run(save)
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_what_the_kernels_do_not_take_is_composed(kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """float64, an empty batch, groups: the same results through the plain composition."""
    with within(WaysBackend(kernels, first_offer)):
        for save in SAVES:
            problem = on_device(make_problem(ConvCase(), torch.float64, EXTRAS[5], memory_format=LAYOUTS[1]), DEVICE)
            check(problem, save, torch.float64)
            check(
                on_device(make_problem(CASES[10], torch.float32, EXTRAS[5], memory_format=LAYOUTS[1]), DEVICE),
                save, torch.float32,
            )  # fmt: skip
            problem.x, problem.dy = problem.x[:0], problem.dy[:0]
            problem.residual = None
            assert problem.run(save)["ds"].eq(0).all()
