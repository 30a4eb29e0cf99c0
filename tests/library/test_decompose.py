"""W = U diag(s) Vᵀ: exact, per group, full rank never rounded, and the same factors whatever SVD routine found them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from error_ratio import error_ratio
from torch import Tensor

from svf_fast.decompose import Factors, decompose, full_rank, recompose

SHAPES = (
    ((8, 4, 3, 3), 1), ((21, 64, 1, 1), 1), ((64, 3, 7, 7), 1), ((1, 5, 3, 3), 1), ((5, 1, 1, 1), 1), ((1, 1, 1, 1), 1),
    ((12, 2, 3, 3), 4), ((6, 1, 3, 3), 6), ((10, 17), 1), ((17, 10), 1), ((30, 4, 1, 1), 2), ((8, 4, 3), 1),
)  # fmt: skip


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_factors_make_the_weight_at_exactly_full_rank(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    weight = random_weight(*shape).to(dtype)
    u, s, v = decompose(weight, groups=groups)
    rank = min(shape[0] // groups, weight[0].numel())
    assert full_rank(weight, groups) == rank
    assert (u.dtype, s.dtype, v.dtype) == (torch.float64,) * 3
    assert list(u.shape) == [shape[0], rank]
    assert list(s.shape) == [groups * rank]
    assert list(v.shape) == [groups * rank, *shape[1:]]
    assert error_ratio(recompose(u, s, v), weight) < 1e-12
    assert (s > 0).all()
    for group in range(groups):
        left = u.view(groups, -1, rank)[group]
        right = v.view(groups, rank, -1)[group]
        values = s.view(groups, rank)[group]
        assert (values[:-1] >= values[1:]).all()
        assert torch.allclose(left.mT @ left, torch.eye(rank).double(), atol=1e-12)
        assert torch.allclose(right @ right.mT, torch.eye(rank).double(), atol=1e-12)


def test_a_group_is_decomposed_by_itself() -> None:
    weight = random_weight(12, 3, 3, 3)
    whole = decompose(weight, groups=4)
    for group in range(4):
        part = decompose(weight[3 * group : 3 * group + 3])
        assert torch.allclose(whole.u[3 * group : 3 * group + 3], part.u, atol=1e-12)
        assert torch.allclose(whole.s[3 * group : 3 * group + 3], part.s, atol=1e-12)
        assert torch.allclose(whole.v[3 * group : 3 * group + 3], part.v, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_lower_rank_is_the_best_approximation(groups: int) -> None:
    weight = random_weight(8, 4, 3, 3)
    full, low = decompose(weight, groups=groups), decompose(weight, groups=groups, rank=3)
    lost = full.s.view(groups, -1)[:, 3:].square().sum().sqrt()
    assert torch.allclose((recompose(*low) - weight).norm(), lost)


def other_routines() -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """SVDs of a batch of matrices that are as right as torch's, by other ways."""
    svd = torch.linalg.svd

    def flipped(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = svd(a, full_matrices=False)
        sign = 1.0 - 2.0 * (torch.arange(s.shape[-1]) % 2)
        return u * sign, s, vt * sign.unsqueeze(-1)

    def transposed(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = svd(a.mT.contiguous(), full_matrices=False)
        return vt.mT.contiguous(), s, u.mT.contiguous()

    def permuted(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = torch.arange(a.shape[1]).flip(0), torch.arange(a.shape[2]).roll(3)
        u, s, vt = svd(a[:, rows][:, :, columns], full_matrices=False)
        return u[:, rows.argsort()].contiguous(), s, vt[:, :, columns.argsort()].contiguous()

    return {"flipped signs": flipped, "of the transpose": transposed, "of permuted rows and columns": permuted}


def spectrum(values: list[float], rows: int, columns: int, seed: int = 7) -> Tensor:
    """A matrix with these singular values."""
    left = torch.linalg.qr(random_weight(rows, len(values), seed=seed))[0]
    right = torch.linalg.qr(random_weight(columns, len(values), seed=seed + 1))[0]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.mT


WEIGHTS = {
    "random": random_weight(12, 5, 3, 3),
    "tall": random_weight(20, 6),
    "identity": torch.eye(9, dtype=torch.float64),
    "orthogonal": torch.linalg.qr(random_weight(10, 10))[0],
    "pairs of equal values": spectrum([5, 5, 3, 3, 3, 1, 0.5, 0.5], 8, 11),
    "rank deficient": spectrum([4, 2, 1], 7, 9),
    "rank deficient with a pair": spectrum([4, 4, 1], 9, 6),
    "zero": torch.zeros(4, 6, dtype=torch.float64),
    "one zero row": random_weight(6, 4).index_fill(0, torch.tensor([2]), 0),
    "equal rows": random_weight(1, 6).expand(5, 6).contiguous(),
    "nearly equal values": spectrum([3 + 1e-13, 3, 3 - 1e-13, 1, 1 + 1e-14], 6, 6),
    "delta kernels": torch.nn.init.dirac_(torch.empty(6, 6, 3, 3, dtype=torch.float64)),
}


@contextmanager
def routine(svd: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", lambda a, full_matrices=False: svd(a))
        yield


@pytest.mark.parametrize("name", other_routines())
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_factors_do_not_depend_on_the_svd_routine(weight: str, name: str) -> None:
    usual = decompose(WEIGHTS[weight])
    with routine(other_routines()[name]):
        other = decompose(WEIGHTS[weight])
    for part, ours, theirs in zip(Factors._fields, usual, other, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7), part


@pytest.mark.parametrize("weight", WEIGHTS)
def test_canonical_factors_are_still_orthonormal_and_exact(weight: str) -> None:
    u, s, v = decompose(WEIGHTS[weight])
    right = v.flatten(1)
    assert torch.allclose(recompose(u, s, v), WEIGHTS[weight], atol=1e-10)
    assert torch.allclose(u.mT @ u, torch.eye(len(s)).double(), atol=1e-10)
    assert torch.allclose(right @ right.mT, torch.eye(len(s)).double(), atol=1e-10)


def test_the_largest_entry_of_a_left_factor_is_positive() -> None:
    u, _, _ = decompose(WEIGHTS["random"])
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_same_factors_for_every_memory_layout_of_the_weight() -> None:
    weight = random_weight(8, 4, 3, 3)
    usual = decompose(weight)
    for other in (weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        assert all(torch.equal(a, b) for a, b in zip(usual, decompose(other), strict=True))


def test_the_weight_is_left_alone_and_no_graph_is_built() -> None:
    weight = torch.nn.Parameter(random_weight(4, 3))
    before = weight.detach().clone()
    factors = decompose(weight)
    assert torch.equal(weight, before)
    assert not any(t.requires_grad for t in factors)


@pytest.mark.parametrize(
    ("weight", "keywords", "message"),
    [
        (torch.empty(0, 3, 1, 1), {}, "weight must have at least two non-empty dimensions"),
        (torch.empty(3), {}, "weight must have at least two non-empty dimensions"),
        (torch.full((2, 2), float("nan")), {}, "not finite"),
        (torch.full((2, 2), float("inf")), {}, "not finite"),
        (torch.ones(4, 2), {"rank": 3}, "rank must be between 1 and 2"),
        (torch.ones(4, 2), {"rank": 0}, "rank must be between 1 and 2"),
        (torch.ones(4, 2), {"groups": 3}, "groups must divide"),
    ],
)
def test_errors(weight: Tensor, keywords: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(weight, **keywords)


def test_an_integer_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="weight must be floating point"):
        decompose(torch.ones(2, 2, dtype=torch.int64))
