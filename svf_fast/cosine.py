"""max over support positions of the cosine to each query position (PFENet's prior mask), streamed: the
Hs·Ws × Hq·Wq matrix never exists. Backward needs the winner of each query position and the support rows that won."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svf_fast.contract import check, memory_format_of
from svf_fast.ops import refuse_double_backward

# Elements of one tile of cosines: 16 MiB of float32, small beside the features, large enough for a full-speed GEMM.
_TILE_ELEMENTS = 4 * 1024 * 1024
_CHUNK_COLUMNS = 1024


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


def _accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


@torch.library.custom_op(
    "svf_fast::max_cosine",
    mutates_args=(),
    schema="(Tensor query, Tensor support, Tensor? mask, float eps) -> (Tensor, Tensor)",
)
def max_cosine_op(query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The largest cosine [B, Hq·Wq] and the support position [B, Hq·Wq] (int32) that has it."""
    batch, _, height, width = query.shape
    values = query.new_empty(batch, height * width)
    winners = torch.empty(batch, height * width, dtype=torch.int32, device=query.device)
    for b in range(batch):
        values[b], winners[b] = _stream(
            query[b].flatten(1), support[b].flatten(1), None if mask is None else mask[b].flatten(), eps
        )
    return values, winners


def _stream(q: Tensor, a: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """One picture: q [C, Nq], a [C, Ns], weight [Ns] → largest cosine [Nq] and its position [Nq]."""
    precise = _accumulation_dtype(q)
    q = q.to(precise)
    q_norm = torch.linalg.vector_norm(q, dim=0, dtype=precise)
    best = q.new_full((q.shape[1],), -torch.inf, dtype=precise)
    winner = torch.zeros(q.shape[1], dtype=torch.int64, device=q.device)
    positions = None
    if weight is not None and q.device.type == "cpu":
        # positions of weight 0 have cosine 0: one stands for all (on a GPU the selection would cost a synchronisation)
        positions = weight.nonzero().flatten()
        if len(positions) < len(weight):
            best.zero_()
            winner.fill_(int((weight == 0).to(torch.uint8).argmax()))
    count = a.shape[1] if positions is None else len(positions)
    tile = max(_TILE_ELEMENTS // q.shape[1], 1)
    for start in range(0, count, tile):
        chosen = slice(start, start + tile) if positions is None else positions[start : start + tile]
        rows = a[:, chosen].mT.to(precise)  # [t, C]
        if weight is not None:
            rows = rows * weight[chosen].unsqueeze(1)
        cosine = rows @ q
        norms = torch.outer(torch.linalg.vector_norm(rows, dim=1, dtype=precise), q_norm)
        value, position = cosine.div_(norms.add_(eps)).max(0)
        position = position + start if positions is None else positions[start + position]
        # NaN wins, as it does in torch.max
        wins = (value > best) | value.isnan()
        best = torch.where(wins, value, best)
        winner = torch.where(wins, position, winner)
    return best.to(a.dtype), winner.to(torch.int32)


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
    batch, channels, height, width = size
    dquery = torch.zeros_like(query, memory_format=memory_format_of(query)) if need_query else query.new_empty(0)
    dsupport = query.new_zeros(batch, height * width, channels) if need_support else query.new_empty(0)
    taken = 0
    for b in range(batch):
        positions, slot = winners[b].unique(return_inverse=True)
        if is_gathered:
            rows = source[taken : taken + len(positions)]
            taken += len(positions)
        else:
            rows = source[b].flatten(1)[:, positions.long()].mT
        weight = None if mask is None else mask[b].flatten()[positions.long()]
        drows = _backward_one(
            dvalue[b], query[b].flatten(1), rows, weight, slot, eps, dquery[b].flatten(1) if need_query else None
        )
        if need_support:
            dsupport[b].index_copy_(0, positions.long(), drows if weight is None else drows * weight.unsqueeze(1))
    if need_support:
        dsupport = dsupport.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return dquery, dsupport


def _backward_one(
    dvalue: Tensor, q: Tensor, rows: Tensor, weight: Tensor | None, slot: Tensor, eps: float, dq: Tensor | None
) -> Tensor:
    """One picture: writes dq [C, Nq] and returns the gradient [T, C] of the weighted rows a = rows ⊙ weight.

    cos = ⟨a, q⟩ / n with n = ‖a‖‖q‖ + eps, so d⟨a, q⟩ = g / n and dn = -g · cos / n; the norm of a zero vector has gradient 0.
    """
    precise = _accumulation_dtype(q)
    a = rows.to(precise) if weight is None else rows.to(precise) * weight.to(precise).unsqueeze(1)
    a_norm = torch.linalg.vector_norm(a, dim=1)
    a_unit = torch.where(a_norm > 0, 1 / a_norm, 0).unsqueeze(1) * a
    drows = torch.zeros_like(a)
    dnorm = torch.zeros_like(a_norm)
    for start in range(0, q.shape[1], _CHUNK_COLUMNS):
        part = slice(start, start + _CHUNK_COLUMNS)
        columns = q[:, part].to(precise).mT.contiguous()  # [n, C]
        winner = slot[part]
        a_won = a[winner]
        q_norm = torch.linalg.vector_norm(columns, dim=1)
        n = a_norm[winner] * q_norm + eps
        ddot = dvalue[part].to(precise) / n
        dn = -ddot * (a_won * columns).sum(1) / n
        if dq is not None:
            q_unit = torch.where(q_norm > 0, 1 / q_norm, 0) * dn * a_norm[winner]
            dq[:, part] = (ddot.unsqueeze(1) * a_won + q_unit.unsqueeze(1) * columns).mT.to(dq.dtype)
        _add_rows(drows, winner, ddot.unsqueeze(1) * columns)
        _add_rows(dnorm, winner, dn * q_norm)
    return (drows + dnorm.unsqueeze(1) * a_unit).to(rows.dtype)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, deterministic on each device: index_add_ is so on CPU, sorted index_put_ on CUDA."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)


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
