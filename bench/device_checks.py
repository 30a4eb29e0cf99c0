"""Correctness of the kernels on this device against float64: every way of every layer kernel, the prior, repeated bits, graphs
and compilation. No speed is reported for what fails here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import svf_fast
from svf_fast import backends, functional, reference
from svf_fast.backends import cuda_kernels
from svf_fast.backends.by_ways import WaysBackend
from svf_fast.backends.ways import COMPOSED, Way
from svf_fast.bench.clock import CudaClock, set_tf32
from svf_fast.bench.equality import INT8_DS_LIMIT, Case, ratio
from svf_fast.cosine import max_cosine_op
from svf_fast.decompose import decompose

# ‖out − ref‖ / ‖ref‖ that each dtype may have; the second for TF32. int8 z adds to ds.
LIMITS = {torch.float32: (1e-5, 2e-3), torch.bfloat16: (1e-2, 1e-2), torch.float16: (1e-2, 1e-2)}
# Beside its limit, an error may be this many times that of stock operations in the same dtype.
_TIMES_STOCK = {"y": 2.0, "dx": 3.0, "ds": 3.0, "dresidual": 3.0}

# odd sizes on both sides of every tile, mask words and mask bytes, ranks that fit on the chip and ranks that do not
CASES = (
    Case(2, 96, 160, 1, 1, 0, 1, 1, 17, 23),
    Case(1, 256, 128, 1, 1, 0, 1, 1, 33, 31),
    Case(2, 200, 288, 1, 1, 0, 1, 1, 19, 21),
    Case(1, 135, 70, 1, 1, 0, 1, 1, 21, 13),
    Case(1, 64, 96, 1, 2, 0, 1, 1, 19, 15),
    Case(1, 512, 640, 1, 1, 0, 1, 1, 13, 15),
    Case(2, 64, 64, 3, 1, 2, 2, 1, 16, 21),
    Case(1, 32, 45, 3, 2, 1, 1, 1, 23, 18),
    Case(2, 32, 64, 3, 1, 1, 1, 4, 12, 13),
)


class Task(NamedTuple):
    """One way of one dtype on every case: the `offer`-th of a path of a set of kernels."""

    kernels: str
    path: str
    offer: int
    dtype: torch.dtype
    tf32: bool


TASKS = tuple(
    Task("triton", path, index, dtype, tf32)
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float16, False))
    for path, offers in (("fused", 2), ("project", 3), ("epilogue", 1), ("merged", 1))
    for index in range(offers)
    # what configs.py offers; float16 takes the kernels of bfloat16
    if not (path == "fused" and dtype == torch.float32 and (index or not tf32))
    and not (path == "project" and index == 2 and not tf32)
    and not (dtype == torch.float16 and index)
)
TASKS += tuple(
    Task("cuda", path, index, dtype, tf32)
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float16, False))
    for path, offers in (("fused", 2), ("project", 2), ("epilogue", 1), ("merged", 1))
    for index in range(offers)
)


def check_way(device: str, task: Task, cases: tuple[Case, ...] = CASES) -> dict[str, Any] | None:
    """Largest error of y, dx, ds and dresidual over cases, layouts and save modes; None where nothing is on offer."""
    if task.kernels == "cuda" and cuda_kernels.why_unusable() is not None:
        return None
    set_tf32(task.tf32)
    entry, taken = backends._entries["triton"], set[str]()
    largest: dict[str, dict[str, float]] = {}
    is_within, where = True, ""
    try:
        backends.register("triton", lambda device: _forced(task, taken), lambda device: None)
        for case, layout in itertools.product(cases, (torch.channels_last, torch.contiguous_format)):
            problem, linear = _problem(case, task.dtype, layout, device)
            for save in functional.SAVES:
                with svf_fast.backend("torch"):
                    yardstick = _errors(problem, linear, save)
                with svf_fast.backend("triton"):
                    found = _errors(problem, linear, save)
                for name, error in found.items():
                    most = largest.setdefault(save, {})
                    # NaN stays
                    most[name] = error if not error <= most.get(name, 0.0) else most.get(name, 0.0)
                    limit = LIMITS[task.dtype][task.tf32] + INT8_DS_LIMIT * (save == "int8" and name == "ds")
                    # NaN compares false
                    if not error <= max(limit, _TIMES_STOCK[name] * yardstick[name]):
                        is_within, where = False, f"{tuple(case)} {layout} {save} {name} {error:.2e}"
    finally:
        backends.register("triton", *entry)
    if not taken:
        return None
    return {
        **task._asdict(), "dtype": str(task.dtype), "ways": sorted(taken), "largest": largest, "is_within": is_within,
        "where": where,
    }  # fmt: skip


def _forced(task: Task, taken: set[str]) -> Any:
    """A backend that takes the task's offer, else stock operations, and notes in `taken` what it took."""

    def pick(key: Hashable, offer: Callable[[], list[Way]], run: Callable[[Way], object]) -> Way:
        offers = [way for way in offer() if way.path == task.path][task.offer : task.offer + 1]
        taken.update(map(str, offers))
        return offers[0] if offers else COMPOSED

    if task.kernels == "cuda":
        return WaysBackend(cuda_kernels.native_kernel_set(), pick)
    from svf_fast.kernels.backend import TRITON

    return WaysBackend(TRITON, pick)


def _problem(case: Case, dtype: torch.dtype, layout: Any, device: str) -> tuple[dict[str, Any], Tensor]:
    """A random fused layer, x sliced out of a larger tensor, and its linear part in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = decompose(random(case.outputs, case.inputs // case.groups, case.kernel, case.kernel), groups=case.groups)
    wide = random(case.batch, case.inputs + 3, case.height, case.width + 2).to(device, dtype)
    geometry: dict[str, Any] = {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }
    problem: dict[str, Any] = {
        "x": wide.contiguous(memory_format=layout)[:, 2:-1, :, 1:-1],
        "v": factors.v.to(device, dtype), "s": factors.s.to(device, torch.float32), "u": factors.u.to(device, dtype),
        "scale": (random(case.outputs).abs() + 0.5).to(device, torch.float32),
        "shift": random(case.outputs).to(device, torch.float32), **geometry,
    }  # fmt: skip
    doubled: dict[str, Any] = {n: t.double() if isinstance(t, Tensor) else t for n, t in problem.items()}
    linear = reference.svf_conv2d(**doubled)
    problem["residual"] = random(*linear.shape).to(device, dtype).contiguous(memory_format=layout)
    problem["dy"] = random(*linear.shape).to(device, dtype)
    return problem, linear + problem["residual"].double()


def _errors(problem: dict[str, Any], linear: Tensor, save: str) -> dict[str, float]:
    """Error ratios of one call; the ReLU's decisions are the op's own on both sides."""
    keywords = {n: t for n, t in problem.items() if n not in ("x", "s", "residual", "dy")}
    x, s, residual = (problem[n].detach().requires_grad_() for n in ("x", "s", "residual"))
    y = functional.svf_conv2d(x, s=s, residual=residual, activation="relu", save=save, **keywords)
    found = torch.autograd.grad(y, (x, s, residual), problem["dy"])
    x64, s64 = (problem[n].detach().double().requires_grad_() for n in ("x", "s"))
    d = problem["dy"].double() * (y != 0)
    dx, ds = torch.autograd.grad(reference.svf_conv2d(x64, s=s64, **_doubled(keywords)), (x64, s64), d)
    return {
        "y": worst_ratio(y.detach(), linear.clamp_min(0)),
        "dx": worst_ratio(found[0], dx), "ds": ratio(found[1], ds),
        # bit for bit, which also proves the mask
        "dresidual": float((found[2] != problem["dy"] * (y != 0)).any()),
    }  # fmt: skip


def worst_ratio(found: Tensor, exact: Tensor) -> float:
    """The larger of ‖found − exact‖ / ‖exact‖ and a quarter of the same of the largest elements, which a wrong tile or tail does
    not pass."""
    off = (found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-300)
    return max(ratio(found, exact), float(off) / 4)


def _doubled(keywords: dict[str, Any]) -> Any:
    return {name: t.double() if isinstance(t, Tensor) else t for name, t in keywords.items()}


def check_prior(device: str, channels: int, side: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The prior's value against the whole matrix in float64, and its gradients at the winners that it chose itself: where two
    cosines are equal to rounding, either may win."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for kind, layout in itertools.product(("none", "binary"), (torch.channels_last, torch.contiguous_format)):
        query, support = (
            torch.randn(2, channels, side, side, generator=generator).to(device, dtype).contiguous(memory_format=layout)
            for _ in range(2)
        )
        mask = None
        if kind == "binary":
            mask = (torch.rand(2, 1, side, side, generator=generator) > 0.6).to(device, dtype)
        dvalue = torch.randn(2, side * side, generator=generator).to(device, dtype)
        inputs = [t.detach().requires_grad_() for t in (query, support)]
        value, winners = max_cosine_op(*inputs, mask, 1e-7)
        found = torch.autograd.grad(value, inputs, dvalue)
        doubles = [t.detach().double().requires_grad_() for t in (query, support)]
        weighted = doubles[1] if mask is None else doubles[1] * mask.double()
        q, a = doubles[0].flatten(2), weighted.flatten(2)
        won = a.gather(2, winners.long()[:, None].expand(-1, channels, -1))
        exact = (won * q).sum(1) / (won.norm(dim=1) * q.norm(dim=1) + 1e-7)
        exact_found = torch.autograd.grad(exact, doubles, dvalue.double())
        matrix = reference.max_cosine_matrix(
            query.double(), support.double(), None if mask is None else mask.double()
        )  # fmt: skip
        errors = {
            "value": worst_ratio(value.detach(), matrix), "dquery": worst_ratio(found[0], exact_found[0]),
            "dsupport": worst_ratio(found[1], exact_found[1]),
        }  # fmt: skip
        limit = LIMITS[dtype][torch.backends.cuda.matmul.allow_tf32]
        rows.append({
            "what": f"prior {channels}x{side}x{side} {str(dtype)[6:]} {kind} {str(layout)[6:]}", "difference": max(errors.values()),
            "errors": errors, "limit": limit, "is_within": all(e <= limit for e in errors.values()),
        })  # fmt: skip
    return rows


def check_interplay(device: str) -> list[dict[str, Any]]:
    """Repeated runs give the same bits; a captured graph and torch.compile give what eager mode gives; autocast computes in bf16."""
    set_tf32(False)
    problem, _ = _problem(CASES[0], torch.float32, torch.channels_last, device)
    keywords = {n: t for n, t in problem.items() if n not in ("x", "s", "residual", "dy")}
    inputs = [problem[n].detach().clone().requires_grad_() for n in ("x", "s", "residual")]

    def layer(x: Tensor, s: Tensor, residual: Tensor) -> Tensor:
        return functional.svf_conv2d(x, s=s, residual=residual, activation="relu", **keywords)

    def step(form: Callable[..., Tensor] = layer) -> list[Tensor]:
        y = form(*inputs)
        # without its graph: a graph that is alive ties later captures to the stream that it was made on
        return [y.detach(), *torch.autograd.grad(y, inputs, problem["dy"])]

    def differences(found: list[Tensor]) -> float:
        return max(ratio(a.detach(), b.detach()) for a, b in zip(found, eager, strict=True))

    # the first run may measure, and later ones take what it found
    step()
    eager = step()
    results = {
        "same bits": differences(step()),
        "torch.compile": differences(step(torch.compile(layer, fullgraph=True))),
    }
    if device == "cuda":
        captured: list[Tensor] = []

        def work() -> None:
            captured[:] = step()

        replay = CudaClock().graphed(work)
        for t in captured:
            t.detach().fill_(float("nan"))
        replay()
        results["CUDA graph"] = differences(captured)
    with torch.autocast(device, torch.bfloat16):
        found = step()
    halves = {n: t.bfloat16() if n in ("v", "u") else t for n, t in keywords.items()}
    eager = step(
        lambda x, s, residual: functional.svf_conv2d(
            x.bfloat16(), s=s, residual=residual.bfloat16(), activation="relu", **halves
        )
    )
    results["autocast"] = differences(found)
    limits = {"same bits": 0.0, "torch.compile": 1e-5, "CUDA graph": 0.0, "autocast": 1e-3}
    return [
        {"what": what, "difference": value, "limit": limits[what], "is_within": value <= limits[what]}
        for what, value in results.items()
    ]
