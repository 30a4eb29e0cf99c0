"""The streaming max-cosine kernel and its backward against the whole matrix in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from device import DEVICE
from error_ratio import assert_close
from test_max_cosine import LAYOUTS, MASKS, features, make_mask, run
from torch import Tensor

from svf_fast.backends import streamed_cosine
from svf_fast.backends.by_ways import WaysBackend
from svf_fast.backends.kernel_set import KernelSet
from svf_fast.backends.ways import first_offer
from svf_fast.functional import max_cosine
from svf_fast.reference import max_cosine_matrix


@pytest.fixture(autouse=True)
def _kernels(kernels: KernelSet, within: Callable[[Any], Any]) -> Any:
    with within(WaysBackend(kernels, first_offer)):
        yield


def compare(query: Tensor, support: Tensor, mask: Tensor | None, **keywords: Any) -> dict[str, Tensor]:
    """Value and gradients against float64; the winners of half precisions may be other than float64's, so their gradients are
    compared where the matrix form sees the same numbers."""
    out = run(max_cosine, *(None if t is None else t.to(DEVICE) for t in (query, support, mask)), **keywords)
    exact = run(
        max_cosine_matrix, query.double(), support.double(), None if mask is None else mask.double(), **keywords
    )  # fmt: skip
    assert_close(out, exact, query.dtype)
    return out


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(2, 5, 4, 6, 3, 7), (3, 8, 1, 1, 1, 1), (1, 70, 9, 9, 13, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_to_the_matrix_form(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    batch, channels, *sizes = shape
    query = features(batch, channels, *sizes[:2], seed=0, dtype=dtype)
    support = features(batch, channels, *sizes[2:], seed=1, dtype=dtype)
    mask = make_mask(kind, batch, *sizes[2:])
    compare(query, support, None if mask is None else mask.to(dtype))


@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)), ids=str)
def test_layouts_splits_and_slices(layouts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The support divided among several programs, and inputs cut out of larger tensors."""
    for programs, batch in ((1, 2), (512, 1)):
        monkeypatch.setattr(streamed_cosine, "_PROGRAMS", programs)
        query = features(batch + 1, 20, 9, 11, seed=2, dtype=torch.float32).contiguous(memory_format=layouts[0])
        support = features(batch, 22, 14, 13, seed=3, dtype=torch.float32).contiguous(memory_format=layouts[1])
        mask = make_mask("binary", batch, 7, 13)
        assert mask is not None
        compare(query[1:, :18, :, 1:10], support[:, 3:21, ::2], mask.float())


@pytest.mark.parametrize("kind", ["none", "binary"])
def test_the_sign_of_all_cosines_does_not_matter(kind: str) -> None:
    query = features(1, 4, 3, 3, seed=4, dtype=torch.float32).abs()
    support = -features(1, 4, 3, 3, seed=5, dtype=torch.float32).abs()
    mask = make_mask(kind, 1, 3, 3)
    compare(query, support, None if mask is None else mask.float())


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_eps_enters_value_and_gradient(eps: float) -> None:
    compare(*(features(1, 4, 3, 3, seed=n, dtype=torch.float32) for n in (18, 19)), None, eps=eps)


def test_zero_features_and_what_is_not_a_number() -> None:
    query, support = (features(2, 4, 3, 3, seed=n, dtype=torch.float32) for n in (14, 15))
    query[..., 1, 1] = 0
    support[..., 0, :] = 0
    out = compare(query, support, None)
    assert all(t.isfinite().all() for t in out.values())
    query[0, 0, 0, 0] = float("nan")
    support[1, 0, 1, 1] = float("nan")
    value = max_cosine(query.to(DEVICE), support.to(DEVICE))
    assert torch.equal(value.isnan().cpu(), max_cosine_matrix(query, support).isnan())


def test_the_first_of_equals_wins_and_bits_repeat(kernels: KernelSet) -> None:
    # whole numbers: their products are summed without rounding, in any order
    query = (4 * features(1, 16, 9, 9, seed=20, dtype=torch.float32)).round().to(DEVICE)
    support = (4 * features(1, 16, 1, 1, seed=21, dtype=torch.float32)).round().to(DEVICE).expand(1, 16, 10, 10)
    _, winner = kernels.cosine.max_cosine(query, support, None, 1e-7)
    assert winner.eq(0).all()
    first, second = (run(max_cosine, query, support.clone(), None) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("is_gathered", [True, False])
def test_backward_from_the_rows_that_won_or_the_whole_support(is_gathered: bool, kernels: KernelSet) -> None:
    """What a captured graph keeps, and what eager mode keeps, give the same gradients."""
    from svf_fast.cosine import _winning_rows

    query, support = (features(2, 16, 7, 6, seed=n, dtype=torch.float32).to(DEVICE) for n in (22, 23))
    mask = make_mask("soft", 2, 7, 6)
    assert mask is not None
    mask = mask.float().to(DEVICE)
    _, winners = kernels.cosine.max_cosine(query, support, mask, 1e-7)
    source = _winning_rows(support, winners) if is_gathered else support
    dvalue = features(2, 42, seed=24, dtype=torch.float32).to(DEVICE)
    dquery, dsupport = kernels.cosine.max_cosine_backward(
        dvalue, query, source, winners, mask, 1e-7, support.shape, is_gathered, True, True
    )
    q, a = (t.double().requires_grad_() for t in (query, support))
    (max_cosine_matrix(q, a, mask.double()) * dvalue.double()).sum().backward()
    assert_close(
        {"dquery": dquery, "dsupport": dsupport}, {"dquery": q.grad, "dsupport": a.grad}, torch.float32
    )  # fmt: skip


def test_one_mask_for_all_pictures(kernels: KernelSet) -> None:
    """Expanded: its rows are one in memory."""
    query, support = (features(3, 8, 5, 6, seed=n, dtype=torch.float32).to(DEVICE) for n in (27, 28))
    mask = make_mask("soft", 1, 5, 6)
    assert mask is not None
    mask = mask.float().to(DEVICE).expand(3, -1, -1, -1)
    assert mask.stride(0) == 0
    value, winners = kernels.cosine.max_cosine(query, support, mask, 1e-7)
    dvalue = features(3, 30, seed=29, dtype=torch.float32).to(DEVICE)
    dquery, dsupport = kernels.cosine.max_cosine_backward(
        dvalue, query, support, winners, mask, 1e-7, support.shape, False, True, True
    )
    q, a = (t.double().requires_grad_() for t in (query, support))
    exact = max_cosine_matrix(q, a, mask.double())
    (exact * dvalue.double()).sum().backward()
    expected = {"value": exact.detach(), "dquery": q.grad, "dsupport": a.grad}
    assert_close({"value": value, "dquery": dquery, "dsupport": dsupport}, expected, torch.float32)


def test_the_result_may_be_written_to() -> None:
    query, support = (features(1, 4, 3, 3, seed=n, dtype=torch.float32).to(DEVICE) for n in (25, 26))
    value = max_cosine(query.requires_grad_(), support)
    value.mul_(2).sum().backward()
    assert query.grad is not None
