"""W = U diag(s) Vᵀ of convolution and linear weights (SVF paper, Eq. 1), in float64, with factors that do not depend on
the SVD routine. Works on bare tensors; knows no module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Singular values closer than this (relative to the largest) share one invariant subspace: inside it an SVD routine may
# return any rotation, so a canonical basis is chosen. At 1e-11 the rotation that float64 rounding leaves between
# *separate* values is at most about 1e-5, and the basis change costs at most 1e-11 of the weight.
_CLUSTER_GAP = 1e-11
# Entries within this of the largest magnitude count as tied: the first of them decides.
_TIE = 1e-6


class Factors(NamedTuple):
    """u [Co, R/groups], s [R] (descending within a group), v [R, Ci/groups, *kernel]; R = groups · rank of a group."""

    u: Tensor
    s: Tensor
    v: Tensor


def full_rank(weight: Tensor, groups: int = 1) -> int:
    """Rank of one group's folded weight: exactly min(Co/groups, Ci/groups · kernel elements)."""
    return min(weight.shape[0] // groups, weight[0].numel())


def decompose(weight: Tensor, *, groups: int = 1, rank: int | None = None) -> Factors:
    """Singular value decomposition of `weight` [Co, Ci/groups, *kernel], group by group (SVF paper, Eq. 1).

    Computed in float64 on the weight's device and returned in float64. Signs are fixed (the largest entry of each left
    factor is positive) and the basis inside clusters of equal singular values is canonical, so that the same weight
    gives the same factors on every machine. `rank` keeps the largest `rank` singular values of every group; None keeps
    all of them. A weight on the meta device gives factors on the meta device: shapes to load a state dict into.

    Raises ValueError when the weight is empty or not finite, or when `rank` or `groups` does not fit it.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"weight must have at least two non-empty dimensions, got shape {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels, got {groups}")
    limit = full_rank(weight, groups)
    if rank is None:
        rank = limit
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must be between 1 and {limit} for a weight of shape {list(weight.shape)}, got {rank}")

    if weight.is_meta:
        u, s, v = ((weight.shape[0], rank), (groups * rank,), (groups * rank, *weight.shape[1:]))
        return Factors(*(weight.new_empty(shape, dtype=torch.float64) for shape in (u, s, v)))
    folded = weight.detach().to(torch.float64).reshape(groups, weight.shape[0] // groups, -1)
    if not torch.isfinite(folded).all():
        raise ValueError("weight holds values that are not finite")
    u, s, vt = torch.linalg.svd(folded, full_matrices=False)  # [g, Co/g, R], [g, R], [g, R, Ci/g·K²]
    for group in range(groups):
        _settle_clusters(u[group], s[group], vt[group])
    flip = _signs(u)  # [g, 1, R]
    u, vt = u * flip, vt * flip.mT
    u, s, vt = u[:, :, :rank], s[:, :rank], vt[:, :rank]
    return Factors(
        u.reshape(weight.shape[0], rank).contiguous(),
        s.reshape(-1).contiguous(),
        vt.reshape(groups * rank, *weight.shape[1:]).contiguous(),
    )


def recompose(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The weight [Co, Ci/groups, *kernel] of factors u [Co, R/groups], s [R], v [R, Ci/groups, *kernel], in their dtype."""
    groups = v.shape[0] // u.shape[1]
    left = u.reshape(groups, -1, u.shape[1]) * s.reshape(groups, 1, -1)
    return (left @ v.reshape(groups, u.shape[1], -1)).reshape(u.shape[0], *v.shape[1:])


def _signs(u: Tensor) -> Tensor:
    """±1 per column of u [g, m, R], as [g, 1, R]: the first entry of (nearly) the largest magnitude becomes positive."""
    magnitude = u.abs()
    leads = magnitude >= magnitude.amax(dim=1, keepdim=True) * (1 - _TIE)
    first = leads.to(torch.uint8).argmax(dim=1, keepdim=True)
    return torch.where(u.gather(1, first) < 0, -1.0, 1.0).to(u.dtype)


def _settle_clusters(u: Tensor, s: Tensor, vt: Tensor) -> None:
    """Replaces, in place, the arbitrary basis inside every cluster of equal singular values by a canonical one."""
    tolerance = float(s[0]) * _CLUSTER_GAP
    close = (s[:-1] - s[1:] <= tolerance).tolist()
    is_null = (s <= tolerance).tolist()
    start = 0
    for end in range(1, len(s) + 1):
        if end < len(s) and close[end - 1]:
            continue
        if is_null[start]:
            # no weight in these directions: left and right factors are arbitrary separately, anything orthogonal to the rest
            u[:, start:] = _orthogonal_basis(u[:, :start], len(s) - start)
            vt[start:] = _orthogonal_basis(vt[:start].mT, len(s) - start).mT
            return
        if end - start > 1:
            inside = u[:, start:end]
            basis = _pivoted_basis(inside.square().sum(1), lambda j, b=inside: b @ b[j], end - start)
            vt[start:end] = (basis.mT @ inside) @ vt[start:end]
            u[:, start:end] = basis
        start = end


def _orthogonal_basis(taken: Tensor, count: int) -> Tensor:
    """A canonical orthonormal basis [m, count] inside the complement of the columns of `taken` [m, n]."""

    def column(j: int) -> Tensor:
        residual = -(taken @ taken[j])
        residual[j] += 1
        # once more: what the first projection leaves behind is rounding, and it matters where the residual is short
        return residual - taken @ (taken.mT @ residual)

    return _pivoted_basis(1 - taken.square().sum(1), column, count)


def _pivoted_basis(diagonal: Tensor, column, count: int) -> Tensor:
    """Pivoted Gram-Schmidt over the columns of a projector: depends on the subspace only, not on the basis it came in.

    `diagonal` [m] is the projector's diagonal and `column(j)` its column j.
    """
    basis = diagonal.new_zeros(len(diagonal), count)
    weight = diagonal.clone()
    for k in range(count):
        leads = weight >= weight.max() * (1 - _TIE)
        vector = column(int(leads.to(torch.uint8).argmax()))
        for _ in range(2):
            vector = vector - basis[:, :k] @ (basis[:, :k].mT @ vector)
        basis[:, k] = vector / torch.linalg.vector_norm(vector)
        weight = weight - basis[:, k].square()
    return basis
