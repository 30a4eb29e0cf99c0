"""Largest errors of y, dx, ds and the residual's gradient against float64, per dtype and save mode, over a grid of shapes, strides,
dilations, groups, layouts and sliced inputs. The same grid on every device that this machine has.

python -m svf_fast.bench.equality [--out DIR]"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast import functional, reference
from svf_fast.bench import results
from svf_fast.decompose import decompose

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# independent z and g are its worst case: 0.8 % expected, more where a handful of singular values share the ratio
INT8_DS_LIMIT = 1.5e-2


class Case(NamedTuple):
    """One convolution: N, Ci, Co, K, stride, padding, dilation, groups, height, width."""

    batch: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    height: int
    width: int


CASES = (
    Case(2, 64, 48, 1, 1, 0, 1, 1, 17, 23),
    Case(1, 32, 96, 1, 2, 0, 1, 1, 19, 15),
    Case(2, 32, 32, 3, 1, 1, 1, 1, 16, 21),
    Case(1, 24, 40, 3, 2, 1, 1, 1, 23, 18),
    Case(1, 32, 32, 3, 1, 4, 4, 1, 19, 19),
    Case(2, 32, 64, 3, 2, 2, 2, 4, 17, 16),
    Case(2, 32, 32, 3, 1, 1, 1, 32, 12, 13),
    Case(1, 21, 5, 5, 3, 2, 1, 1, 22, 31),
    Case(3, 3, 7, 7, 2, 3, 1, 1, 25, 24),
    Case(1, 64, 64, 1, 1, 0, 1, 1, 1, 1),
    Case(2, 48, 80, 1, 1, 0, 1, 1, 33, 37),
)


def ratio(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


def errors(
    case: Case, dtype: torch.dtype, save: str, layout: torch.memory_format, seed: int, device: str
) -> dict[str, float]:
    """Error ratios of y, dx, ds and dresidual; inputs are rounded to `dtype` first, then both sides see the same numbers.

    The ReLU's mask is the op's own on both sides: where rounding decides a sign, either is right.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = decompose(random(case.outputs, case.inputs // case.groups, case.kernel, case.kernel), groups=case.groups)
    # sliced out of a larger tensor
    wide = random(case.batch, case.inputs + 3, case.height, case.width + 2).to(device, dtype)
    x = wide.contiguous(memory_format=layout)[:, 2:-1, :, 1:-1].detach().requires_grad_()
    u, v = factors.u.to(device, dtype), factors.v.to(device, dtype)
    s = factors.s.to(device, dtype).requires_grad_()
    scale, shift = (random(case.outputs).abs().to(device, dtype) + 0.5, random(case.outputs).to(device, dtype))
    geometry: dict[str, Any] = {
        "stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups,
    }  # fmt: skip
    exact_x, exact_s = x.detach().double().requires_grad_(), s.detach().double().requires_grad_()
    linear = reference.svf_conv2d(
        exact_x, v.double(), exact_s, u.double(), scale=scale.double(), shift=shift.double(), **geometry
    )
    residual = random(*linear.shape).to(device, dtype).requires_grad_()
    exact_residual = residual.detach().double().requires_grad_()
    y = functional.svf_conv2d(
        x, v, s, u, scale=scale, shift=shift, residual=residual, activation="relu", save=save, **geometry
    )
    exact_y = (linear + exact_residual) * (y.detach() > 0)
    dy = random(*linear.shape).to(device, dtype)
    found = torch.autograd.grad(y, (x, s, residual), dy)
    exact = torch.autograd.grad(exact_y, (exact_x, exact_s, exact_residual), dy.double())
    names = ("dx", "ds", "dresidual")
    return {
        "y": ratio(y.detach(), exact_y.detach()),
        **{n: ratio(f, e) for n, f, e in zip(names, found, exact, strict=True)},
    }


def main() -> None:
    options = results.arguments(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    # float32 rows mean float32: TF32 has errors of its own
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    is_within = True
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"{device}: largest error ratio over {len(CASES)} convolutions × 2 layouts, against float64")
        print(f"{'dtype':<16} {'save':<10} {'y':>9} {'dx':>9} {'ds':>9} {'dresidual':>10}")
        for dtype, save in itertools.product(DTYPES, functional.SAVES):
            worst: dict[str, float] = {}
            for case, layout in itertools.product(CASES, (torch.contiguous_format, torch.channels_last)):
                for name, value in errors(case, dtype, save, layout, options.seed, device).items():
                    worst[name] = max(worst.get(name, 0.0), value)
            limits = dict.fromkeys(worst, LIMITS[dtype])
            if save == "int8":
                limits["ds"] += INT8_DS_LIMIT
            is_within &= all(worst[n] <= limits[n] for n in worst)
            print(f"{dtype!s:<16} {save:<10} " + " ".join(f"{worst[n]:>9.1e}" for n in ("y", "dx", "ds", "dresidual")))
            rows.append({"device": device, "dtype": str(dtype), "save": save, "largest": worst, "limits": limits})
    results.write(options.out, "equality", {"seed": options.seed, "cases": [c._asdict() for c in CASES]}, rows)
    if not is_within:
        raise SystemExit("some error is over its limit")


if __name__ == "__main__":
    main()
