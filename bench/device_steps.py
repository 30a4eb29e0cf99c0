"""On this device: one step of layers 2-4 of ResNet-50 in every form, time and peak memory."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import svf_fast
from svf_fast import backends, reference
from svf_fast.bench.clock import Clock, interleaved
from svf_fast.bench.device_layers import in_cpp
from svf_fast.bench.speed import largest_error, step
from svf_fast.bench.subjects import Trunk, build_trunk
from svf_fast.train.backbones import Backbone

FORMS = ("algorithm 1", "exact", "recompute", "full", "frozen")
# the largest error over maps and ds may be this many times Algorithm 1's own in the same dtype, plus a little
TIMES_NAIVE = 2.0
ALLOWANCE = {"exact": 1e-4, "int8": 1e-2, "recompute": 1e-4, "exact cpp": 1e-4}


def build_trunks(backbone: Backbone) -> dict[str, nn.Module]:
    """Every form of the trunk on the CPU, in float32; converting takes the time of the decompositions."""
    trunks = {name: build_trunk(name, backbone) for name in FORMS}
    trunks["int8"] = copy.deepcopy(trunks["exact"])
    for module in trunks["int8"].modules():
        if hasattr(module, "save"):
            module.save = "int8"
    trunks["original"] = Trunk(copy.deepcopy(backbone)).eval()
    return trunks


def time_steps(
    trunks: dict[str, nn.Module],
    batch: int,
    side: int,
    channels: int,
    dtype: torch.dtype,
    clock: Clock,
    rounds: int,
    compiles: bool,
) -> dict[str, Any]:
    """Milliseconds of forward + backward (frozen: forward) and peak bytes above the level before, of each form; layer-1
    features of `side`² pixels. No times where a form's error is over its limit."""
    generator = torch.Generator().manual_seed(0)
    device = clock.device
    features = torch.randn(batch, channels, side, side, generator=generator).relu()
    features = features.to(device, dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps = _placed(trunks["original"], device, dtype)(features)
    gradients = [
        torch.randn(m.shape, generator=generator).to(device, dtype).contiguous(memory_format=torch.channels_last)
        for m in maps
    ]
    del maps
    placed = {
        name: _placed(trunk, device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, trunk in trunks.items()
    }
    precise = copy.deepcopy(trunks["algorithm 1"]).to(device, torch.float64)
    exact = step(precise, features.double(), [g.double() for g in gradients])
    del precise
    errors = {
        name: largest_error([t.double() for t in step(placed[name], features, gradients)], exact)
        for name in ("algorithm 1", "exact", "int8", "recompute")
    }  # fmt: skip
    has_cpp = backends.why_unusable("cpp", device) is None
    if has_cpp:
        with svf_fast.backend("cpp"):
            found = step(placed["exact"], features, gradients)
        errors["exact cpp"] = largest_error([t.double() for t in found], exact)
        del found
    del exact
    result: dict[str, Any] = {"batch": batch, "side": side, "dtype": str(dtype), "errors": errors}
    result["is_equal"] = all(
        errors[name] <= TIMES_NAIVE * errors["algorithm 1"] + allowance
        for name, allowance in ALLOWANCE.items()
        if name in errors
    )
    if not result["is_equal"]:
        return result
    works: dict[str, Callable[[], object]] = {
        name: partial(step, trunk, features, gradients) for name, trunk in placed.items() if name != "original"
    }
    if has_cpp:
        works["exact cpp"] = in_cpp(works["exact"])
    if compiles:
        torch._dynamo.reset()
        works["algorithm 1 compiled"] = partial(step, torch.compile(placed["algorithm 1"]), features, gradients)
    for work in works.values():
        work()
    result["peak_bytes"] = {name: clock.peak(work) for name, work in works.items()}
    graphed = ("algorithm 1", "exact", "exact cpp", "int8", "frozen")
    graphs = {f"{name} graphed": clock.graphed(works[name]) for name in graphed if name in works}
    times = interleaved(clock, {**works, **graphs}, rounds)
    result["ms"] = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    ms, peak = result["ms"], result["peak_bytes"]
    result["host_ms"] = {name: 1e3 * clock.host_seconds(works[name], 5) for name in ("algorithm 1", "exact")}
    result["ratios"] = {
        "naive / ours": ms["algorithm 1"] / ms["exact"],
        "naive / ours, both graphed": ms["algorithm 1 graphed"] / ms["exact graphed"],
        "naive / ours graphed": ms["algorithm 1"] / ms["exact graphed"],
        "full / ours": ms["full"] / ms["exact"],
        "ours / frozen forward": ms["exact"] / ms["frozen"],
        "naive peak / ours": peak["algorithm 1"] / peak["exact"],
    }
    if compiles:
        result["ratios"]["compiled naive / ours"] = ms["algorithm 1 compiled"] / ms["exact"]
    return result


def _placed(trunk: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """A copy on the device whose factors and weights are of `dtype`; our singular values and BatchNorm stay float32."""
    trunk = copy.deepcopy(trunk).to(device)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
        elif isinstance(module, svf_fast.SVFConv2d):
            module.u.data, module.v.data = module.u.data.to(dtype), module.v.data.to(dtype)
        elif isinstance(module, reference.NaiveSVFConv2d):
            # Algorithm 1 multiplies by it as it is: float32 would make all that follows float32
            module.vector_S.data = module.vector_S.data.to(dtype)
    return trunk
