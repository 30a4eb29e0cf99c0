"""The functional layer: checks, autocast and the choice of what to keep around the ops. Knows tensors, no module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svf_fast import ops, reference
from svf_fast.contract import Geometry, check
from svf_fast.cosine import max_cosine

__all__ = ["max_cosine", "svf_conv2d", "svf_linear"]

SAVES = ("exact", "int8", "recompute")
ACTIVATIONS = (None, "relu")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KEEP_Z = {"exact": "exact", "int8": "int8", "recompute": "input"}


def svf_conv2d(
    x: Tensor,
    v: Tensor,
    s: Tensor,
    u: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    save: str = "exact",
) -> Tensor:
    """Fused singular-value convolution: act(scale ⊙ (u·(s ⊙ conv2d(x, v)) + bias) + shift + residual).

    SVF paper, Algorithm 1, with the frozen affine (a folded BatchNorm), the residual and the ReLU that follow.

    Args:
        x: [N, Ci, H, W], float16 | bfloat16 | float32 | float64, contiguous, channels_last or any strides.
        v: [R, Ci/groups, Kh, Kw] frozen right factors in x's dtype; R = groups · rank of a group.
        s: [R] singular values, in x's dtype or float32.
        u: [Co, R/groups] frozen left factors in x's dtype.
        bias, scale, shift: [Co] frozen, in x's dtype or float32.
        residual: [N, Co, Ho, Wo] in x's dtype, added before the activation.
        activation: None or "relu".
        stride, padding, dilation: one integer or (height, width); padding is with zeros.
        save: what is kept for backward besides one bit an element of a ReLU's output: "exact" keeps z = conv2d(x, v);
            "int8" keeps z as int8 (ds unbiased, relative error below 1 %, everything else exact); "recompute" keeps x
            by reference and rebuilds z.

    Returns y [N, Co, Ho, Wo] in x's dtype and memory format. Gradients flow to x, s and residual, each computed only
    where asked for. If u, v, bias, scale or shift requires a gradient, the plain composition runs and the memory saving
    is lost. The compiled CPU kernels take v and u that are nn.Parameters (or views of them),
    packed once; other tensors run on stock operations.
    Under autocast x and residual are cast to its dtype, and the op computes in it. Raises ValueError or TypeError naming the
    argument. Double backward raises RuntimeError.
    """
    for name, needed in (("x", x), ("v", v), ("s", s), ("u", u)):
        check(isinstance(needed, Tensor), f"{name} must be a tensor, got {type(needed).__name__}", TypeError)
    for name, given in (("bias", bias), ("scale", scale), ("shift", shift), ("residual", residual)):
        check(
            given is None or isinstance(given, Tensor),
            f"{name} must be a tensor, got {type(given).__name__}",
            TypeError,
        )
    autocast = autocast_dtype(x)
    if autocast is not None:
        # v and u are cast inside the op: a copy made here would be kept for backward
        x, residual = x.to(autocast), None if residual is None else residual.to(autocast)
    geometry = _checked_geometry(stride, padding, dilation, groups)
    _check_tensors(x, v, s, u, {"bias": bias, "scale": scale, "shift": shift}, residual, geometry, autocast is not None)
    check(activation in ACTIVATIONS, f"activation must be None or 'relu', got {activation!r}")
    check(save in SAVES, f"save must be one of {', '.join(SAVES)}, got {save!r}")
    return fused_conv2d(
        x, v, s, u, bias=bias, scale=scale, shift=shift, residual=residual, activation=activation, geometry=geometry,
        save=save,
    )  # fmt: skip


def fused_conv2d(
    x: Tensor,
    v: Tensor,
    s: Tensor,
    u: Tensor,
    *,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    geometry: Geometry,
    save: str,
) -> Tensor:
    """`svf_conv2d` for callers that have checked the arguments, and cast x and residual for autocast, themselves."""
    records = torch.is_grad_enabled()
    if records and any(t is not None and t.requires_grad for t in (v, u, bias, scale, shift)):
        return reference.svf_conv2d(
            x, v.to(x.dtype), s, u.to(x.dtype), bias=bias, scale=scale, shift=shift, residual=residual,
            activation=activation, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation,
            groups=geometry.groups,
        )  # fmt: skip
    if bias is not None:
        bias = bias if scale is None else bias * scale
        shift = bias if shift is None else shift + bias
    needs_graph = records and any(t is not None and t.requires_grad for t in (x, s, residual))
    return ops.call_conv2d(
        x, v, s, u, scale, shift, residual, activation == "relu", geometry,
        _KEEP_Z[save] if needs_graph and s.requires_grad else "none",
        needs_graph and activation == "relu", needs_graph,
    )  # fmt: skip


def svf_linear(
    x: Tensor,
    v: Tensor,
    s: Tensor,
    u: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    save: str = "exact",
) -> Tensor:
    """Fused singular-value linear layer: act(u·(s ⊙ (v·x)) + bias).

    x [..., In], v [R, In], s [R], u [Out, R], bias [Out] → y [..., Out] in x's dtype; the other arguments, errors and
    what is kept are those of `svf_conv2d`.
    """
    for name, t in (("x", x), ("v", v)):
        check(isinstance(t, Tensor), f"{name} must be a tensor, got {type(t).__name__}", TypeError)
    check(x.ndim >= 1, "x must have at least one dimension, got a scalar")
    check(v.ndim == 2, f"v must be [R, In], got shape {list(v.shape)}")
    check(x.shape[-1] == v.shape[1], f"x has {x.shape[-1]} features, v expects {v.shape[1]}")
    rows = x.numel() // max(x.shape[-1], 1)
    if rows == 0:
        y = F.linear(F.linear(x, v) * s, u, bias)
        return torch.relu(y) if activation == "relu" else y
    # rows of features are the pixels of a channels_last picture
    pixels = x.reshape(1, rows, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = svf_conv2d(pixels, v[:, :, None, None], s, u, bias=bias, activation=activation, save=save)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], u.shape[0])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where x is, or None when it is off or x is float64 (which autocast leaves alone)."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _checked_geometry(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int], groups: int
) -> Geometry:
    check(isinstance(groups, int) and groups >= 1, f"groups must be a positive integer, got {groups!r}")
    return Geometry(
        _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1), groups
    )  # fmt: skip


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    check(
        len(pair) == 2 and all(isinstance(n, int) and n >= least for n in pair),
        f"{name} must be one integer or two of at least {least}, got {value!r}",
    )
    return pair[0], pair[1]


def _check_tensors(
    x: Tensor, v: Tensor, s: Tensor, u: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None,
    geometry: Geometry, is_autocast: bool,
) -> None:  # fmt: skip
    check(x.dtype in _DTYPES, f"x must be float16, bfloat16, float32 or float64, got {x.dtype}", TypeError)
    check(x.ndim == 4, f"x must be [N, Ci, H, W], got shape {list(x.shape)}")
    check(v.ndim == 4, f"v must be [R, Ci/groups, Kh, Kw], got shape {list(v.shape)}")
    check(u.ndim == 2, f"u must be [Co, R/groups], got shape {list(u.shape)}")
    groups, rank, channels = geometry.groups, v.shape[0], u.shape[0]
    check(
        x.shape[1] == v.shape[1] * groups,
        f"x has {x.shape[1]} channels, v with groups={groups} expects {v.shape[1] * groups}",
    )
    check(rank % groups == 0, f"v has {rank} factors, not a multiple of groups={groups}")
    check(channels % groups == 0, f"u has {channels} output channels, not a multiple of groups={groups}")
    check(
        u.shape[1] * groups == rank,
        f"u has {u.shape[1]} factors a group, v with groups={groups} expects {rank // groups}",
    )
    check(list(s.shape) == [rank], f"s must be [{rank}], one value a right factor, got shape {list(s.shape)}")
    size = geometry.output_size(x.shape[2:], v.shape[2:])
    check(
        min(size) >= 1,
        f"x of height and width {list(x.shape[2:])} is smaller than the kernel {list(v.shape[2:])} with this padding and dilation",
    )
    for name, t in (("v", v), ("u", u), ("residual", residual)):
        is_right = t is None or t.dtype == x.dtype or (is_autocast and t.dtype == torch.float32)
        check(is_right, f"{name} must have x's dtype {x.dtype}, got {t.dtype if t is not None else None}", TypeError)
    for name, t in (("s", s), *vectors.items()):
        if t is None:
            continue
        check(
            t.dtype in (x.dtype, torch.float32),
            f"{name} must be {x.dtype} (as x) or torch.float32, got {t.dtype}",
            TypeError,
        )
        check(
            name == "s" or list(t.shape) == [channels],
            f"{name} must be [{channels}], one value an output channel, got shape {list(t.shape)}",
        )
    if residual is not None:
        expected = [x.shape[0], channels, *size]
        check(
            list(residual.shape) == expected,
            f"residual must be {expected} like the output, got shape {list(residual.shape)}",
        )
    for name, t in (("v", v), ("s", s), ("u", u), ("residual", residual), *vectors.items()):
        check(t is None or t.device == x.device, f"{name} is on {t.device if t is not None else None}, x on {x.device}")
