"""Time of each converted convolution of ResNet-50 on this device: Algorithm 1 in eager mode against ours, with and without the
time to launch, and the floors that bytes and FLOP set."""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import svf_fast
from svf_fast import backends, functional, reference
from svf_fast.bench import clock as clocks
from svf_fast.bench.clock import Clock, interleaved
from svf_fast.bench.device_checks import worst_ratio
from svf_fast.bench.equality import INT8_DS_LIMIT
from svf_fast.bench.layers import LayerShape

# y, dx and ds of a layer at full size, in the dtype that is timed; the residual's gradient is exact
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 2e-3}


class LayerProblem:
    """One layer with its BatchNorm, residual and ReLU on random data; `naive` and `ours` are its two forms."""

    def __init__(self, shape: LayerShape, batch: int, picture: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def orthonormal(rows: int, columns: int) -> Tensor:
            return torch.linalg.qr(random(rows, columns))[0]

        before, after = shape.sides(picture)
        taps, rank = shape.taps, shape.rank
        v = orthonormal(shape.inputs * taps**2, rank).mT.reshape(rank, shape.inputs, taps, taps)
        self.v = v.to(dtype).contiguous(memory_format=torch.channels_last)
        # dense, as a converted module has it
        self.u = orthonormal(shape.outputs, rank).to(dtype).contiguous()
        self.s = (random(rank).abs() + 0.1).requires_grad_()
        self.mean, self.bias = random(shape.outputs), random(shape.outputs)
        self.variance, self.weight = random(shape.outputs).abs() + 0.5, random(shape.outputs).abs() + 0.5
        self.shape = shape

        def activation(channels: int, side: int) -> Tensor:
            return random(batch, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)

        self.x = activation(shape.inputs, before).requires_grad_()
        self.residual = activation(shape.outputs, after).requires_grad_() if shape.has_residual else None
        self.dy = activation(shape.outputs, after)
        self.inputs = [t for t in (self.x, self.s, self.residual) if t is not None]

    def naive(self) -> Tensor:
        """Algorithm 1, BatchNorm on its running statistics, residual and in-place ReLU, as separate operations."""
        z = F.conv2d(self.x, self.v, None, *self.shape.geometry)
        y = F.conv2d(z * self.s.view(1, -1, 1, 1).to(z.dtype), self.u[:, :, None, None])
        y = F.batch_norm(y, self.mean, self.variance, self.weight, self.bias, training=False)
        if self.residual is not None:
            y = y + self.residual
        return F.relu_(y) if self.shape.has_relu else y

    def ours(self, save: str = "exact") -> Tensor:
        """The fused layer as a converted module calls it, its arguments checked before."""
        scale, shift = self.affine()
        return functional.fused_conv2d(
            self.x, self.v, self.s, self.u, bias=None, scale=scale, shift=shift, residual=self.residual,
            activation="relu" if self.shape.has_relu else None, geometry=self.shape.geometry, save=save,
        )  # fmt: skip

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the BatchNorm; a converted model has them at hand."""
        if not hasattr(self, "_affine"):
            scale = self.weight / torch.sqrt(self.variance + 1e-5)
            self._affine = scale, self.bias - self.mean * scale
        return self._affine

    def step(self, form: Callable[[], Tensor]) -> Callable[[], object]:
        """Forward and backward of a form."""
        return lambda: torch.autograd.grad(form(), self.inputs, self.dy)

    def errors(self, save: str = "exact") -> dict[str, float]:
        """Error ratios of ours to float64, the ReLU's decisions being our own; dresidual bit for bit."""
        y = self.ours(save)
        found = torch.autograd.grad(y, self.inputs, self.dy)
        scale, shift = (t.double() for t in self.affine())
        x, s = (t.detach().double().requires_grad_() for t in (self.x, self.s))
        linear = reference.svf_conv2d(
            x, self.v.double(), s, self.u.double(), scale=scale, shift=shift, **self.shape.geometry._asdict()
        )
        d = self.dy.double()
        exact_y = linear.detach() if self.residual is None else linear.detach() + self.residual.detach().double()
        if self.shape.has_relu:
            d, exact_y = d * (y != 0), exact_y.clamp_min(0)
        exact = torch.autograd.grad(linear, (x, s), d)
        named = {"y": (y.detach(), exact_y), "dx": (found[0], exact[0]), "ds": (found[1], exact[1])}
        if self.residual is not None:
            is_equal = torch.equal(found[2], self.dy * (y != 0) if self.shape.has_relu else self.dy)
            return {**{name: worst_ratio(*pair) for name, pair in named.items()}, "dresidual": float(not is_equal)}
        return {name: worst_ratio(*pair) for name, pair in named.items()}


def time_layer(
    shape: LayerShape, batch: int, picture: int, dtype: torch.dtype, clock: Clock, rates: dict[str, float], rounds: int
) -> dict[str, Any]:
    """One row: errors, microseconds with and without launches, floors and ratios. No times where an error is over its limit."""
    problem = LayerProblem(shape, batch, picture, dtype, clock.device)
    row: dict[str, Any] = {
        "layer": shape.name,
        "times": shape.times,
        "batch": batch,
        "picture": picture,
        "dtype": str(dtype),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row["errors"] = problem.errors()
        int8 = {f"{name} int8": error for name, error in problem.errors("int8").items()}
    row["warnings"] = [str(w.message) for w in caught]
    # NaN compares false
    row["is_equal"] = all(error <= LIMITS[dtype] for error in row["errors"].values()) and all(
        error <= LIMITS[dtype] + INT8_DS_LIMIT * (name == "ds int8") for name, error in int8.items()
    )
    row["errors"] |= int8
    has_cpp = backends.why_unusable("cpp", clock.device) is None
    if has_cpp:
        with svf_fast.backend("cpp"):
            compiled = problem.errors()
        row["errors"] |= {f"{name} cpp": error for name, error in compiled.items()}
        row["is_equal"] &= all(error <= LIMITS[dtype] for error in compiled.values())
    if not row["is_equal"]:
        return row
    steps = {"naive": problem.step(problem.naive), "ours": problem.step(problem.ours)}
    steps["ours int8"] = problem.step(lambda: problem.ours("int8"))
    if has_cpp:
        steps["ours cpp"] = in_cpp(steps["ours"])
    graphs = {f"{name} graphed": clock.graphed(step) for name, step in steps.items()}
    forward = {"forward naive graphed": problem.naive, "forward ours graphed": problem.ours}
    # the output without its graph, which would tie what runs later to the stream of the capture
    graphs |= {name: clock.graphed(partial(_detached, form)) for name, form in forward.items()}
    times = interleaved(clock, {**steps, **graphs}, rounds)
    row["host_us"] = {name: 1e6 * clock.host_seconds(step) for name, step in steps.items()}
    row["us"] = {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}
    width = dtype.itemsize
    flop_rate = rates["bf16_flops_per_s" if dtype == torch.bfloat16 else "tf32_flops_per_s"]
    floors = [
        max(least / rates["copy_bytes_per_s"], shape.flops(batch, picture) / flop_rate) * 1e6
        for least in shape.least_bytes(batch, picture, width)
    ]
    row["floor_us"] = {"forward": floors[0], "backward": floors[1]}
    row["bound_by_bytes"] = [
        least / rates["copy_bytes_per_s"] > shape.flops(batch, picture) / flop_rate
        for least in shape.least_bytes(batch, picture, width)
    ]
    row["ratio_to_floor"] = row["us"]["ours graphed"] / sum(floors)
    row["speedup"] = row["us"]["naive"] / row["us"]["ours"]
    row["speedup_graphed"] = row["us"]["naive graphed"] / row["us"]["ours graphed"]
    return row


def in_cpp(work: Callable[[], object]) -> Callable[[], object]:
    """The same work by the C++/CUDA kernels, backward included."""

    def run() -> object:
        with svf_fast.backend("cpp"):
            return work()

    return run


def _detached(form: Callable[[], Tensor]) -> Tensor:
    return form().detach()


def compile_ways(shape: LayerShape, dtype: torch.dtype, tf32: bool, device: str) -> None:
    """Runs everything on offer for a layer once on a small picture, so that Triton's cache on disk holds it."""
    from svf_fast.backends.by_ways import WaysBackend
    from svf_fast.backends.ways import COMPOSED, Way
    from svf_fast.kernels.backend import TRITON, UNFIT

    def pick(key: Hashable, offer: Callable[[], list[Way]], run: Callable[[Way], object]) -> Way:
        for way in offer():
            with contextlib.suppress(*UNFIT):
                run(way)
        return COMPOSED

    clocks.set_tf32(tf32)
    backend = WaysBackend(TRITON, pick)
    entry = backends._entries["triton"]
    backends.register("triton", lambda device: backend, lambda device: None)
    try:
        with svf_fast.backend("triton"):
            problem = LayerProblem(shape, 1, 97, dtype, device)
            for save in ("exact", "int8", "recompute"):
                problem.step(partial(problem.ours, save))()
            with torch.no_grad():
                problem.ours()
            # the first layers need no dx
            problem.x = problem.x.detach()
            torch.autograd.grad(problem.ours(), problem.s, problem.dy)
    finally:
        backends.register("triton", *entry)
