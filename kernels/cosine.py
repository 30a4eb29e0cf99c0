"""The max-cosine prior, streamed: a program holds some query positions, walks over the support and keeps the largest cosine
and where it was. The matrix of cosines never leaves the chip.

cos(i, j) = w_i ⟨a_i, q_j⟩ / (|w_i| ‖a_i‖ ‖q_j‖ + eps), value_j = max_i cos(i, j)        (PFENet's prior mask; w the support mask)
backward, i the winner of j:  dq_j = α_j a_i w_i + β_j q_j,  da_i = Σ_j α_j q_j + Σ_j γ_j a_i w_i / ‖a_i w_i‖,
α = dvalue / n, n = ‖a_i w_i‖ ‖q_j‖ + eps, β = δ ‖a_i w_i‖ / ‖q_j‖, γ = δ ‖q_j‖, δ = −α cos

Nothing waits for the device: the winners are sorted there, and each support position sums its queries in their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.backends.kernel_set import blocks, product_precision
from svf_fast.backends.streamed_cosine import rows, search, won
from svf_fast.contract import memory_format_of
from svf_fast.kernels.configs import COSINE, COSINE_BACKWARD


@triton.jit(do_not_specialize=("queries", "supports", "per_split"))
def forward_kernel(
    query, support, weight, query_norm, support_norm, best, winner, eps,
    channels, queries, supports, per_split, query_strides, support_strides,
    PRECISION: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    j = tl.program_id(0) * BQ + tl.arange(0, BQ)
    query_rows = query + batch * query_strides[0] + j.to(tl.int64)[:, None] * query_strides[1]
    q_norm = tl.load(query_norm + batch * queries + j, mask=j < queries, other=1.0)
    largest = tl.full((BQ,), float("-inf"), tl.float32)
    position = tl.zeros((BQ,), tl.int32)
    end = tl.minimum((split + 1) * per_split, supports)
    for start in range(split * per_split, end, BS):
        i = start + tl.arange(0, BS)
        support_rows = support + batch * support_strides[0] + i.to(tl.int64)[None, :] * support_strides[1]
        dot = tl.zeros((BQ, BS), tl.float32)
        for first in range(0, channels, BC):
            c = first + tl.arange(0, BC)
            q_tile = tl.load(
                query_rows + c.to(tl.int64)[None, :] * query_strides[2],
                mask=(j < queries)[:, None] & (c < channels)[None, :],
                other=0.0,
            )
            a_tile = tl.load(
                support_rows + c.to(tl.int64)[:, None] * support_strides[2],
                mask=(c < channels)[:, None] & (i < end)[None, :],
                other=0.0,
            )
            dot = tl.dot(q_tile, a_tile, dot, input_precision=PRECISION)
        norm = tl.load(support_norm + batch * supports + i, mask=i < end, other=1.0)
        if weight is not None:
            w = tl.load(weight + batch * supports + i, mask=i < end, other=0.0).to(tl.float32)
            dot = dot * w[None, :]
            norm = norm * tl.abs(w)
        cosine = dot / (norm[None, :] * q_norm[:, None] + eps)
        # NaN wins, as in torch.max: it counts as the largest, and is one again at the end
        cosine = tl.where(cosine == cosine, cosine, float("inf"))
        cosine = tl.where((i < end)[None, :], cosine, float("-inf"))
        value, place = tl.max(cosine, 1, return_indices=True)
        position = tl.where(value > largest, start + place, position)
        largest = tl.maximum(value, largest)
    out = (batch * tl.num_programs(1) + split) * queries + j
    largest = tl.where(largest == float("inf"), float("nan"), largest)
    tl.store(best + out, largest, mask=j < queries)
    tl.store(winner + out, position, mask=j < queries)


@triton.jit(do_not_specialize=("queries", "supports"))
def backward_query_kernel(
    dvalue, query, source, weight, row_of, winner, coefficients, dquery, eps,
    channels, queries, supports, query_strides, source_stride_c, dquery_strides,
    BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BQ + tl.arange(0, BQ)
    ok = j < queries
    i = tl.load(winner + batch * queries + j, mask=ok, other=0)
    source_rows = source + tl.load(row_of + batch * supports + i, mask=ok, other=0)
    query_rows = query + batch * query_strides[0] + j.to(tl.int64) * query_strides[1]
    dot = tl.zeros((BQ,), tl.float32)
    q_square = tl.zeros((BQ,), tl.float32)
    a_square = tl.zeros((BQ,), tl.float32)
    for first in range(0, channels, BC):
        c = (first + tl.arange(0, BC)).to(tl.int64)[None, :]
        inside = ok[:, None] & (c < channels)
        q = tl.load(query_rows[:, None] + c * query_strides[2], mask=inside, other=0.0).to(tl.float32)
        a = tl.load(source_rows[:, None] + c * source_stride_c, mask=inside, other=0.0).to(tl.float32)
        dot += tl.sum(q * a, 1)
        q_square += tl.sum(q * q, 1)
        a_square += tl.sum(a * a, 1)
    w = tl.full((BQ,), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + batch * supports + i, mask=ok, other=0.0).to(tl.float32)
    q_norm, a_norm = tl.sqrt(q_square), tl.sqrt(a_square) * tl.abs(w)
    n = a_norm * q_norm + eps
    alpha = tl.load(dvalue + batch * queries + j, mask=ok, other=0.0).to(tl.float32) / n
    delta = -alpha * dot * w / n
    # the norm of a zero vector has gradient 0
    beta = tl.where(q_norm > 0, delta * a_norm / q_norm, 0.0)
    out = coefficients + (batch * queries + j) * 3
    tl.store(out, alpha, mask=ok)
    tl.store(out + 1, delta * q_norm, mask=ok)
    tl.store(out + 2, tl.sqrt(a_square), mask=ok)
    if dquery is not None:
        dquery_rows = dquery + batch * dquery_strides[0] + j.to(tl.int64) * dquery_strides[1]
        for first in range(0, channels, BC):
            c = (first + tl.arange(0, BC)).to(tl.int64)[None, :]
            inside = ok[:, None] & (c < channels)
            q = tl.load(query_rows[:, None] + c * query_strides[2], mask=inside, other=0.0).to(tl.float32)
            a = tl.load(source_rows[:, None] + c * source_stride_c, mask=inside, other=0.0).to(tl.float32)
            gradient = (alpha * w)[:, None] * a + beta[:, None] * q
            tl.store(dquery_rows[:, None] + c * dquery_strides[2], gradient.to(dquery.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("queries", "supports"))
def backward_support_kernel(
    query, source, weight, row_of, order, first_of, coefficients, dsupport,
    channels, queries, supports, query_strides, source_stride_c,
    BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0)
    c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    first = tl.load(first_of + batch * (supports + 1) + i)
    last = tl.load(first_of + batch * (supports + 1) + i + 1)
    total = tl.zeros((BC,), tl.float32)
    gamma = 0.0
    for start in range(first, last, BQ):
        place = start + tl.arange(0, BQ)
        j = tl.load(order + batch * queries + place, mask=place < last, other=0)
        triple = coefficients + (batch * queries + j) * 3
        alpha = tl.load(triple, mask=place < last, other=0.0)
        gamma += tl.sum(tl.load(triple + 1, mask=place < last, other=0.0), 0)
        q = tl.load(
            query
            + batch * query_strides[0]
            + j.to(tl.int64)[:, None] * query_strides[1]
            + c[None, :] * query_strides[2],
            mask=(place < last)[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        total += tl.sum(alpha[:, None] * q.to(tl.float32), 0)
    if first < last:
        a = tl.load(
            source + tl.load(row_of + batch * supports + i) + c * source_stride_c, mask=c < channels, other=0.0
        ).to(tl.float32)
        # any of its queries knows the row's norm
        norm = tl.load(coefficients + (batch * queries + tl.load(order + batch * queries + first)) * 3 + 2)
        w = 1.0
        if weight is not None:
            w = tl.load(weight + batch * supports + i).to(tl.float32)
        # d‖w a‖/da = |w| a / ‖a‖, whatever w's sign
        total = w * total + tl.where(norm > 0, gamma * tl.abs(w) / norm, 0.0) * a
    tl.store(dsupport + (batch * supports + i) * channels + c, total.to(dsupport.dtype.element_ty), mask=c < channels)


def max_cosine(query: Tensor, support: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The largest cosine [B, Hq·Wq] in query's dtype and the support position [B, Hq·Wq] (int32) that has it, the first of
    equals."""
    products = product_precision(query.dtype)
    config = COSINE[products]
    task = search(query, support, mask, config.BM, config.BN)
    batch, channels, queries = task.query.shape
    forward_kernel[(blocks(queries, config.BM), task.best.shape[1], batch)](
        task.query, task.support, task.weight, task.query_norm, task.support_norm, task.best, task.winner, eps,
        channels, queries, task.support.shape[2], task.per_split, _strides(task.query), _strides(task.support),
        products, config.BM, config.BN, config.BK, **config.options(),
    )  # fmt: skip
    return task.results(query.dtype)


def max_cosine_backward(
    dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float,
    size: Sequence[int], is_gathered: bool, need_query: bool, need_support: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dquery and dsupport (empty where not needed) of `max_cosine`."""
    batch, channels, height, width = size
    supports, queries = height * width, winners.shape[1]
    q = rows(query)
    weight = None if mask is None else mask.flatten(1).contiguous()
    order, first_of, source, row_of, channel_stride = won(winners, source, size, is_gathered)
    coefficients = torch.empty(batch, queries, 3, dtype=torch.float32, device=q.device)
    dquery = torch.empty_like(query, memory_format=memory_format_of(query)) if need_query else None
    config = COSINE_BACKWARD
    backward_query_kernel[(blocks(queries, config.BM), batch)](
        dvalue.contiguous(), q, source, weight, row_of, winners, coefficients, dquery, eps,
        channels, queries, supports, _strides(q), channel_stride,
        _strides(q if dquery is None else dquery.flatten(2)), config.BM, config.BK, **config.options(),
    )  # fmt: skip
    nothing = query.new_empty(0)
    if not need_support:
        return nothing if dquery is None else dquery, query.new_empty(0)
    dsupport = query.new_empty(batch, supports, channels)
    backward_support_kernel[(supports, blocks(channels, config.BK), batch)](
        q, source, weight, row_of, order, first_of, coefficients, dsupport,
        channels, queries, supports, _strides(q), channel_stride, config.BM, config.BK, **config.options(),
    )  # fmt: skip
    return nothing if dquery is None else dquery, dsupport.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Strides (picture, position, channel) of t [B, C, positions]."""
    return t.stride(0), t.stride(2), t.stride(1)
