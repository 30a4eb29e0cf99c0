"""The max-cosine prior of the `torch` backend: tiles of the cosine matrix from stock operations; cosine.py has the formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svf_fast.contract import memory_format_of

# Elements of one tile of cosines: 16 MiB of float32, small beside the features, large enough for a full-speed GEMM.
_TILE_ELEMENTS = 4 * 1024 * 1024
_CHUNK_COLUMNS = 1024


# search(q [C, Nq], rows, count, eps, best [Nq], winner [Nq]): raises `best` to the largest cosine of each column of q to any of
# `count` support rows, and says in `winner` (int32) which; rows(start, end) are some of them, [t, C].
Search = Callable[[Tensor, Callable[[int, int], Tensor], int, float, Tensor, Tensor], None]


def max_cosine(
    query: Tensor, support: Tensor, mask: Tensor | None, eps: float, search: Search | None = None
) -> tuple[Tensor, Tensor]:
    """The largest cosine [B, Hq·Wq] and the support position [B, Hq·Wq] (int32) that has it."""
    batch, _, height, width = query.shape
    values = query.new_empty(batch, height * width)
    winners = torch.empty(batch, height * width, dtype=torch.int32, device=query.device)
    for b in range(batch):
        values[b], winners[b] = _stream(
            query[b].flatten(1), support[b].flatten(1), None if mask is None else mask[b].flatten(), eps,
            search or _search,
        )  # fmt: skip
    return values, winners


def max_cosine_backward(
    dvalue: Tensor, query: Tensor, source: Tensor, winners: Tensor, mask: Tensor | None, eps: float,
    size: Sequence[int], is_gathered: bool, need_query: bool, need_support: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dquery and dsupport (empty where not needed) of `max_cosine`."""
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
            # weighted before it is rounded: in half precision what the weight cancels may be infinite
            drows = drows if weight is None else drows * weight.unsqueeze(1)
            dsupport[b].index_copy_(0, positions.long(), drows.to(dsupport.dtype))
    if need_support:
        dsupport = dsupport.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return dquery, dsupport


def _stream(
    q: Tensor, a: Tensor, weight: Tensor | None, eps: float, search: Search
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One picture: q [C, Nq], a [C, Ns], weight [Ns] → largest cosine [Nq] and its position [Nq]."""
    precise = _accumulation_dtype(q)
    best = q.new_full((q.shape[1],), -torch.inf, dtype=precise)
    winner = torch.zeros(q.shape[1], dtype=torch.int32, device=q.device)
    positions = None
    if weight is not None and q.device.type == "cpu":
        # positions of weight 0 have cosine 0: one stands for all (on a GPU the selection would cost a synchronisation)
        positions = weight.nonzero().flatten()
        if len(positions) < len(weight):
            best.zero_()
            winner.fill_(-1)
    count = a.shape[1] if positions is None else len(positions)

    def rows(start: int, end: int) -> Tensor:
        chosen = slice(start, min(end, count))
        if positions is None:
            part = a[:, chosen].mT.to(precise)
            return part if weight is None else part * weight[chosen].unsqueeze(1)
        assert weight is not None
        return a[:, positions[chosen]].mT.to(precise) * weight[positions[chosen]].unsqueeze(1)

    if count:
        search(q.to(precise), rows, count, eps, best, winner)
    if weight is not None and positions is not None and len(positions) < len(weight):
        # -1, the position of weight 0, stands last
        first_zero = weight.eq(0).to(torch.uint8).argmax().view(1)
        winner = torch.cat((positions, first_zero))[winner.long()]
    return best.to(a.dtype), winner.to(torch.int32)


def _search(
    q: Tensor, rows: Callable[[int, int], Tensor], count: int, eps: float, best: Tensor, winner: Tensor
) -> None:  # fmt: skip
    q_norm = torch.linalg.vector_norm(q, dim=0)
    tile = max(_TILE_ELEMENTS // q.shape[1], 1)
    for start in range(0, count, tile):
        part = rows(start, start + tile)  # [t, C]
        cosine = part @ q
        norms = torch.outer(torch.linalg.vector_norm(part, dim=1), q_norm)
        value, position = cosine.div_(norms.add_(eps)).max(0)
        # NaN wins, as it does in torch.max
        wins = (value > best) | value.isnan()
        best.copy_(torch.where(wins, value, best))
        winner.copy_(torch.where(wins, position + start, winner))


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
    return drows + dnorm.unsqueeze(1) * a_unit


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, deterministic on each device: index_add_ is so on CPU, sorted index_put_ on CUDA."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)


def _accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
