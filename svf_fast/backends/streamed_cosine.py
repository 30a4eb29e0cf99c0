"""What surrounds a kernel that streams the max-cosine prior: how the support is split among programs, and which queries each
support position won. Stock operations alone, and nothing waits for the device. Knows tensors, no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast.backends.kernel_set import blocks

# Programs to aim at, some for each multiprocessor: few query positions are made up for by splitting the support.
_PROGRAMS = 512


class Search(NamedTuple):
    """One search for the largest cosines: features with channels adjacent, their norms, and a best and a winner of each split of
    the support [B, splits, queries] to fill."""

    query: Tensor
    support: Tensor
    weight: Tensor | None
    query_norm: Tensor
    support_norm: Tensor
    per_split: int
    best: Tensor
    winner: Tensor

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Value and winner [B, queries] over all splits, the first of equals."""
        value, split = self.best.max(1)
        # fresh tensors: a view as an op's output could not be modified in place by users
        return value.to(dtype), torch.take_along_dim(self.winner, split[:, None], 1).squeeze(1).clone()


def search(query: Tensor, support: Tensor, mask: Tensor | None, query_tile: int, support_tile: int) -> Search:
    """Prepares features [B, C, H, W] for a kernel whose programs take `query_tile` positions and walk over tiles of the
    support."""
    q, a = rows(query), rows(support)
    batch, _, queries = q.shape
    supports = a.shape[2]
    shares = max(1, _PROGRAMS // (blocks(queries, query_tile) * batch))
    per_split = blocks(blocks(supports, shares), support_tile) * support_tile
    shape = batch, blocks(supports, per_split), queries
    query_norm, support_norm = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float32) for t in (q, a))
    best = torch.empty(shape, dtype=torch.float32, device=q.device)
    winner = torch.empty(shape, dtype=torch.int32, device=q.device)
    weight = None if mask is None else mask.flatten(1).contiguous()
    return Search(q, a, weight, query_norm, support_norm, per_split, best, winner)


def cosine_at(query: Tensor, support: Tensor, mask: Tensor | None, eps: float, winner: Tensor) -> Tensor:
    """The cosines [B, queries] to the support positions that `winner` names, NaN where there is no such position."""
    precise = torch.promote_types(query.dtype, torch.float32)
    q, a = query.flatten(2).to(precise), support.flatten(2)
    exists = (winner >= 0) & (winner < a.shape[2])
    position = torch.where(exists, winner, 0).long()
    won = torch.take_along_dim(a, position.unsqueeze(1), 2).to(precise)
    if mask is not None:
        won = won * torch.take_along_dim(mask.flatten(1), position, 1).to(precise).unsqueeze(1)
    norms = torch.linalg.vector_norm(won, dim=1) * torch.linalg.vector_norm(q, dim=1)
    return torch.where(exists, (q * won).sum(1) / (norms + eps), torch.nan)


class Won(NamedTuple):
    """Which queries each support position won: order[first_of[i]] to order[first_of[i + 1] - 1] those of position i, and where its
    row lies in `source`, in elements [B, supports]."""

    order: Tensor
    first_of: Tensor
    source: Tensor
    row_of: Tensor
    channel_stride: int


def won(winners: Tensor, source: Tensor, size: Sequence[int], is_gathered: bool) -> Won:
    """Sorts the winners [B, queries] of a support of `size`; `source` is the support or, when `is_gathered`, its winning rows."""
    batch, _, height, width = size
    supports = height * width
    by_position, order = winners.sort(dim=1, stable=True)
    positions = torch.arange(supports + 1, dtype=winners.dtype, device=winners.device).repeat(batch, 1)
    first_of = torch.searchsorted(by_position, positions)
    if is_gathered:
        # rows that won, picture after picture, positions ascending
        has_won = (first_of.diff(dim=1) > 0).flatten()
        row_of = (has_won.cumsum(0) - 1).view(batch, supports) * source.stride(0)
        return Won(order, first_of, source, row_of, source.stride(1))
    source = rows(source)
    pictures = torch.arange(batch, device=source.device).unsqueeze(1) * source.stride(0)
    row_of = pictures + torch.arange(supports, device=source.device) * source.stride(2)
    return Won(order, first_of, source, row_of, source.stride(1))


def rows(features: Tensor) -> Tensor:
    """[B, C, H, W] as [B, C, H·W] with channels adjacent: a copy is small beside what reads it many times."""
    flat = features.flatten(2)
    return flat if flat.stride(1) == 1 else flat.mT.contiguous().mT
