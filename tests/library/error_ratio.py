"""The one measure of error of the library's tests, ‖out − ref‖ / ‖ref‖ against a float64 reference, its tolerances, and the
largest ratios seen in a run. Knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
INT8_DS_TOLERANCE = 1e-2
# (dtype, what) -> largest ratio within its tolerance that a test of this run measured; conftest prints it
LARGEST: dict[tuple[str, str], float] = {}
_REPORTED = ("y", "dx", "ds", "dresidual", "value", "dquery", "dsupport")


def error_ratio(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; 0 when both are zero or empty, infinity when only the reference is zero."""
    assert out.shape == reference.shape, f"shape {list(out.shape)}, expected {list(reference.shape)}"
    out64, reference64 = out.detach().double().cpu(), reference.detach().double().cpu()
    size, difference = reference64.norm().item(), (out64 - reference64).norm().item()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def assert_close(
    out: dict[str, Tensor],
    reference: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    tolerance: dict[str, float] | None = None,
) -> None:
    """Every entry of `out` is within the dtype's tolerance of the reference, or within its own entry in `tolerance`."""
    assert out.keys() == reference.keys(), f"{sorted(out)} against {sorted(reference)}"
    failures = []
    for name, value in out.items():
        ratio = error_ratio(value, reference[name])
        own = (tolerance or {}).get(name)
        limit = TOLERANCE[dtype] if own is None else own
        if not ratio <= limit:
            failures.append(f"{name}: error ratio {ratio:.3g} above {limit:g}")
        elif name in _REPORTED:
            label = (str(dtype).removeprefix("torch."), name if own is None else f"{name} (own limit)")
            LARGEST[label] = max(LARGEST.get(label, 0.0), ratio)
    assert not failures, "; ".join(failures)
