"""The max-cosine prior against its matrix form: bytes kept for backward, equality with float64, time and peak memory of forward and
backward. On a CUDA device where there is one.

python -m svf_fast.bench.prior [--channels 2048] [--side 81] [--out DIR]"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svf_fast import functional, reference
from svf_fast.backends.kernel_set import product_precision
from svf_fast.bench import clock as clocks
from svf_fast.bench import results
from svf_fast.bench.clock import Clock, interleaved
from svf_fast.bench.equality import ratio
from svf_fast.memory import kept_bytes

# ‖out − ref‖ / ‖ref‖ of a product by TF32
TF32_LIMIT = 2e-3


def time_prior(channels: int, side: int, dtype: torch.dtype, clock: Clock, rounds: int) -> dict[str, Any]:
    """The prior of one support: bytes kept, largest difference and time against the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    query, support = (
        torch.randn(1, channels, side, side, generator=generator).to(clock.device, dtype).requires_grad_()
        for _ in range(2)
    )
    mask = (torch.rand(1, 1, side, side, generator=generator) > 0.7).to(clock.device, dtype)
    dvalue = torch.randn(1, side * side, generator=generator).to(clock.device, dtype)
    forms: dict[str, Callable[[], Tensor]] = {
        "matrix": lambda: reference.max_cosine_matrix(query, support, mask),
        "streamed": lambda: functional.max_cosine(query, support, mask=mask),
    }
    exact = reference.max_cosine_matrix(query.detach().double(), support.detach().double(), mask.double())
    result: dict[str, Any] = {"channels": channels, "side": side, "dtype": str(dtype)}
    result["error"] = {name: ratio(form().detach(), exact) for name, form in forms.items()}
    # the streamed form accumulates in float32 whatever the features are; TF32 rounds operands, and how differs between kernels
    limit = TF32_LIMIT if product_precision(dtype) == "tf32" and clock.device == "cuda" else 2e-5
    result["is_equal"] = result["error"]["streamed"] <= max(2 * result["error"]["matrix"], limit)
    result["kept_bytes"] = {name: kept_bytes(form, owned=[query, support, mask]) for name, form in forms.items()}
    if result["is_equal"]:
        steps = {n: partial(_gradients, form, (query, support), dvalue) for n, form in forms.items()}
        result["ms"] = {
            name: 1e3 * statistics.median(seconds) for name, seconds in interleaved(clock, steps, rounds).items()
        }
        result["peak_bytes"] = {name: clock.peak(work) for name, work in steps.items()}
    return result


def _gradients(form: Callable[[], Tensor], inputs: tuple[Tensor, ...], dvalue: Tensor) -> object:
    return torch.autograd.grad(form(), inputs, dvalue)


def main() -> None:
    parser = results.arguments(__doc__ or "")
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--side", type=int, default=81, help="side of the feature maps, positions")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock: Clock = clocks.CudaClock() if torch.cuda.is_available() else clocks.RehearsalClock()
    row = time_prior(options.channels, options.side, torch.float32, clock, rounds=3)
    if not row["is_equal"]:
        raise SystemExit(f"the streamed prior is not equal to the matrix form: {row['error']}")
    print(f"{options.channels} channels, {options.side}² positions each, float32, {clock.device}")
    print(f"{'form':<10} {'kept MB':>9} {'error to float64':>17} {'ms':>9} {'peak MB':>9}")
    for name in ("matrix", "streamed"):
        print(
            f"{name:<10} {row['kept_bytes'][name] / 1e6:>9.1f} {row['error'][name]:>17.1e} {row['ms'][name]:>9.1f}"
            f" {row['peak_bytes'][name] / 1e6:>9.1f}"
        )
    results.write(options.out, f"prior_{options.side}_{clock.device}", vars(options) | {"out": None}, [row])


if __name__ == "__main__":
    main()
