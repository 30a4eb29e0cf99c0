"""max over support positions of the cosine to each query position (PFENet's prior mask), streamed: the
Hs·Ws × Hq·Wq matrix never exists. Backward needs the winner of each query position and the support rows that won."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svf_fast import backends
from svf_fast.contract import check, memory_format_of
from svf_fast.ops import refuse_double_backward


def max_cosine(query: Tensor, support: Tensor, *, mask: Tensor | None = None, eps: float = 1e-7) -> Tensor:
    """Largest cosine similarity of each query position to any support position.

    cos(i, j) = ⟨a_i, q_j⟩ / (‖a_i‖ ‖q_j‖ + eps), a = support ⊙ mask; the result is max over i, [B, Hq·Wq] in query's dtype.

    Args:
        query: [B, C, Hq, Wq] features. support: [B, C, Hs, Ws] features of the same dtype and device.
        mask: [B, 1, Hs, Ws] weights of the support positions (soft values stay soft; no gradient). A position of weight 0
            counts with cosine 0, as in PFENet.
        eps: added to the product of the norms.

    Differentiable in query and support through the winning position of each query position. Kept for backward: query by
    reference, one integer a query position, and the support rows that won somewhere.
    """
    for name, t in (("query", query), ("support", support), *((("mask", mask),) if mask is not None else ())):
        check(isinstance(t, Tensor), f"{name} must be a tensor, got {type(t).__name__}", TypeError)
    for name, t in (("query", query), ("support", support)):
        check(t.ndim == 4, f"{name} must be [B, C, H, W], got shape {list(t.shape)}")
        check(t.is_floating_point(), f"{name} must be floating point, got {t.dtype}", TypeError)
        check(t.numel() > 0, f"{name} is empty: shape {list(t.shape)}")
    check(
        query.shape[:2] == support.shape[:2],
        f"support must have query's batch and channels {list(query.shape[:2])}, got {list(support.shape[:2])}",
    )
    check(
        support.dtype == query.dtype, f"support must have query's dtype {query.dtype}, got {support.dtype}", TypeError
    )
    check(support.device == query.device, f"support is on {support.device}, query on {query.device}")
    if mask is not None:
        expected = [support.shape[0], 1, *support.shape[2:]]
        check(list(mask.shape) == expected, f"mask must be {expected}, got shape {list(mask.shape)}")
        check(not mask.requires_grad, "mask must not require a gradient: it is a label, detach it")
        check(mask.device == query.device, f"mask is on {mask.device}, query on {query.device}")
        mask = mask.to(query.dtype)
    return max_cosine_op(query, support, mask, eps)[0]


@torch.library.custom_op(
    "svf_fast::max_cosine",
    mutates_args=(),
    schema="(Tensor query, Tensor support, Tensor? mask, float eps) -> (Tensor, Tensor)",
)
def max_cosine_op(query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The largest cosine [B, Hq·Wq] and the support position [B, Hq·Wq] (int32) that has it."""
    return backends.select(query.device).max_cosine(query, support, mask, eps)


@max_cosine_op.register_fake
def _(query, support, mask, eps):
    shape = (query.shape[0], query.shape[2] * query.shape[3])
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op(
    "svf_fast::max_cosine_backward",
    mutates_args=(),
    schema="(Tensor dvalue, Tensor query, Tensor source, Tensor winners, Tensor? mask, float eps, SymInt[] size, "
    "bool is_gathered, bool need_query, bool need_support) -> (Tensor, Tensor)",
)
def max_cosine_backward(
    dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float, size: Any,
    is_gathered: bool, need_query: bool, need_support: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dquery and dsupport (empty where not needed); `source` is the support [B, C, Hs, Ws], or its winning rows [T, C]
    in the order of `_winning_rows` when `is_gathered`."""
    return backends.select(query.device).max_cosine_backward(
        dvalue, query, source, winners, mask, eps, size, is_gathered, need_query, need_support
    )


@max_cosine_backward.register_fake
def _(dvalue, query, source, winners, mask, eps, size, is_gathered, need_query, need_support):
    batch, channels, height, width = size
    dquery = torch.empty_like(query, memory_format=memory_format_of(query)) if need_query else query.new_empty(0)
    dsupport = query.new_empty(0)
    if need_support:
        dsupport = query.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return dquery, dsupport


def _winning_rows(support: Tensor, winners: Tensor) -> Tensor:
    """The support rows that won somewhere, picture after picture, positions ascending: [T, C]."""
    parts = [support[b].flatten(1)[:, winners[b].unique().long()].mT for b in range(len(support))]
    return torch.cat(parts).contiguous()


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, support, mask, eps = inputs
    _, winners = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(winners)
    # how many rows won is data: unknown to a tracer, which keeps the whole support by reference instead
    is_gathered = type(support) in (Tensor, torch.nn.Parameter) and type(winners) is Tensor and not support.is_meta
    # nor may a captured CUDA graph wait to learn it
    is_gathered = is_gathered and not (support.is_cuda and torch.cuda.is_current_stream_capturing())
    source = _winning_rows(support, winners) if is_gathered else support
    if is_gathered and source.numel() >= support.numel():
        source, is_gathered = support, False
    ctx.save_for_backward(query, source, winners, mask)
    ctx.eps, ctx.size, ctx.is_gathered = eps, support.shape, is_gathered


def _backward(ctx: Any, dvalue: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dvalue is None:
        return None, None, None, None
    query, source, winners, mask = ctx.saved_tensors
    need_query, need_support = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    dquery, dsupport = max_cosine_backward(
        dvalue, query, source, winners, mask, ctx.eps, ctx.size, ctx.is_gathered, need_query, need_support
    )
    return dquery if need_query else None, dsupport if need_support else None, None, None


max_cosine_op.register_autograd(_backward, setup_context=_save)
refuse_double_backward(max_cosine_backward)
