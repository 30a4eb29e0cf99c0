"""`max_cosine` against the whole cosine matrix: values, gradients, masks, ties, layouts, and what is kept."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from error_ratio import assert_close, error_ratio
from implementations import IMPLEMENTATIONS
from torch import Tensor

from svf_fast.backends import composed_cosine
from svf_fast.functional import max_cosine
from svf_fast.memory import kept_bytes
from svf_fast.reference import max_cosine_matrix

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def features(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_mask(kind: str, batch: int, height: int, width: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(9)
    draws = torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64)
    if kind == "none":
        return None
    if kind == "one picture empty":
        draws[0] = 0
        return (draws > 0.5).double()
    return {
        "binary": (draws > 0.6).double(),
        "soft": draws,
        "all zero": torch.zeros_like(draws),
        "all one": torch.ones_like(draws),
    }[kind]


MASKS = ("none", "binary", "soft", "all zero", "all one", "one picture empty")


def run(function: Any, query: Tensor, support: Tensor, mask: Tensor | None, **keywords: Any) -> dict[str, Tensor]:
    q, a = (t.detach().requires_grad_() for t in (query, support))
    value = function(q, a, mask=mask, **keywords)
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
    (value * weights).sum().backward()
    assert q.grad is not None
    assert a.grad is not None
    return {"value": value.detach(), "dquery": q.grad, "dsupport": a.grad}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    "shape", [(2, 5, 4, 6, 3, 7), (1, 2, 3, 3, 3, 3), (3, 8, 1, 1, 1, 1), (1, 4, 1, 9, 5, 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_to_the_matrix_form(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    batch, channels, *sizes = shape
    query = features(batch, channels, *sizes[:2], seed=0, dtype=dtype)
    support = features(batch, channels, *sizes[2:], seed=1, dtype=dtype)
    mask = make_mask(kind, batch, *sizes[2:])
    expected = run(max_cosine_matrix, query.double(), support.double(), mask)
    out = run(max_cosine, query, support, None if mask is None else mask.to(dtype))
    assert out["value"].shape == (batch, sizes[0] * sizes[1])
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layouts", list(product(LAYOUTS, LAYOUTS)), ids=str)
def test_many_tiles_and_both_layouts(
    layouts: tuple[torch.memory_format, torch.memory_format], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composed_cosine, "_TILE_ELEMENTS", 100)
    monkeypatch.setattr(composed_cosine, "_CHUNK_COLUMNS", 7)
    query = features(2, 6, 5, 6, seed=2).contiguous(memory_format=layouts[0])
    support = features(2, 6, 7, 4, seed=3).contiguous(memory_format=layouts[1])
    mask = make_mask(kind, 2, 7, 4)
    out = run(max_cosine, query, support, mask)
    assert_close(out, run(max_cosine_matrix, query, support, mask), torch.float64)
    assert out["dquery"].is_contiguous(memory_format=layouts[0])


@pytest.mark.parametrize("kind", ["none", "binary", "soft"])
def test_the_sign_of_all_cosines_does_not_matter(kind: str) -> None:
    """Negative everywhere: a masked position has cosine 0 and wins, without a mask the least negative does."""
    query, support = features(1, 4, 3, 3, seed=4).abs(), -features(1, 4, 3, 3, seed=5).abs()
    mask = make_mask(kind, 1, 3, 3)
    assert_close(run(max_cosine, query, support, mask), run(max_cosine_matrix, query, support, mask), torch.float64)


def test_sliced_and_expanded_inputs() -> None:
    large = features(3, 9, 8, 10, seed=6)
    query, support = large[1:, 2:7, 1:8:2, 3:9], large[:1, :5, 1:5].expand(2, 5, 4, 10)
    mask = make_mask("binary", 1, 4, 10)
    assert mask is not None
    mask = mask.expand(2, 1, 4, 10)
    assert_close(run(max_cosine, query, support, mask), run(max_cosine_matrix, query, support, mask), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    query, support = features(1, 64, 9, 9, seed=7, dtype=dtype), features(1, 64, 9, 9, seed=8, dtype=dtype)
    mask = make_mask("binary", 1, 9, 9)
    value = max_cosine(query, support, mask=mask)
    assert value.dtype == dtype
    assert_close({"value": value}, {"value": max_cosine_matrix(query.double(), support.double(), mask)}, dtype)


def test_float16_features_of_ordinary_size_do_not_overflow() -> None:
    """1024 channels of about 20: the dot product is beyond 65504, the cosine is 1."""
    query = (10 + 20 * torch.rand(1, 1024, 4, 4, generator=torch.Generator().manual_seed(0))).half()
    value = max_cosine(query, query.clone())
    assert torch.allclose(value.float(), torch.ones(1, 16), atol=1e-2)


def test_float16_gradient_of_a_masked_position_is_zero() -> None:
    """1 / eps is beyond 65504: what a weight of 0 cancels must not be rounded to infinity before."""
    query, support = (features(1, 8, 3, 3, seed=n, dtype=torch.float16).requires_grad_() for n in (28, 29))
    max_cosine(query, support, mask=torch.zeros(1, 1, 3, 3).half()).sum().backward()
    assert support.grad is not None
    assert support.grad.eq(0).all()


@pytest.mark.parametrize("kind", ["none", "soft", "binary"])
def test_gradcheck(kind: str) -> None:
    query, support = (features(2, 3, 2, 3, seed=n).requires_grad_() for n in (10, 11))
    mask = make_mask(kind, 2, 2, 3)
    assert torch.autograd.gradcheck(lambda q, a: max_cosine(q, a, mask=mask), (query, support))


@pytest.mark.parametrize("asked", [(True, False), (False, True)], ids=str)
def test_only_the_gradients_that_are_asked_for(asked: tuple[bool, bool]) -> None:
    query, support = (
        features(2, 4, 5, 5, seed=n).requires_grad_(needed) for n, needed in zip((12, 13), asked, strict=True)
    )
    max_cosine(query, support).sum().backward()
    expected = run(lambda q, a, mask: max_cosine_matrix(q, a, mask).sum().view(1), query, support, None)
    for tensor, name, needed in ((query, "dquery", asked[0]), (support, "dsupport", asked[1])):
        assert (tensor.grad is not None) == needed
        if tensor.grad is not None:
            # the helper weights a single value by linspace(-1, 2, 1) = -1
            assert error_ratio(-tensor.grad, expected[name]) < 1e-12


def test_zero_features_have_cosine_zero_and_no_gradient_of_their_norm() -> None:
    query, support = features(1, 4, 3, 3, seed=14), features(1, 4, 3, 3, seed=15)
    query[..., 1, 1] = 0
    support[..., 0, :] = 0
    out, expected = run(max_cosine, query, support, None), run(max_cosine_matrix, query, support, None)
    assert_close(out, expected, torch.float64)
    assert all(t.isfinite().all() for t in out.values())


@pytest.mark.parametrize("kind", ["none", "binary"])
def test_not_a_number_shows(kind: str) -> None:
    query, support = features(2, 4, 3, 3, seed=16), features(2, 4, 3, 3, seed=17)
    query[0, 0, 0, 0] = float("nan")
    mask = make_mask(kind, 2, 3, 3)
    if mask is not None:
        mask[:, :, 1, 1] = 1
    support[1, 0, 1, 1] = float("nan")
    ours, matrix = max_cosine(query, support, mask=mask), max_cosine_matrix(query, support, mask)
    assert torch.equal(ours.isnan(), matrix.isnan())


@pytest.mark.parametrize("eps", [0.0, 1e-7, 0.3])
def test_eps_enters_value_and_gradient(eps: float) -> None:
    query, support = features(1, 4, 3, 3, seed=18), features(1, 4, 3, 3, seed=19)
    assert_close(
        run(max_cosine, query, support, None, eps=eps),
        run(max_cosine_matrix, query, support, None, eps=eps),
        torch.float64,
    )


def test_the_same_bits_run_to_run() -> None:
    query, support = (features(2, 16, 12, 12, seed=n, dtype=torch.float32) for n in (20, 21))
    first, second = run(max_cosine, query, support, None), run(max_cosine, query, support, None)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_never_holds_the_matrix() -> None:
    """Kept: the query by reference, an integer a query position, and of the support the rows that won."""
    query, support = (features(1, 8, 24, 24, seed=n, dtype=torch.float32) for n in (22, 23))
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., :2, :3] = 1
    query.requires_grad_()
    support.requires_grad_()
    kept = kept_bytes(lambda: max_cosine(query, support, mask=mask), owned=[query, support, mask])
    winners = 4 * 24 * 24
    assert winners <= kept <= winners + 7 * 8 * 4 + 64


def test_double_backward_is_refused() -> None:
    query = features(1, 3, 2, 2, seed=24).requires_grad_()
    gradient = torch.autograd.grad(
        max_cosine(query, features(1, 3, 2, 2, seed=25)).square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"double backward .* not supported"):
        gradient[0].sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": torch.ones(2, 3, 4)}, ValueError, r"query must be \[B, C, H, W\], got shape \[2, 3, 4\]"),
        ({"support": torch.ones(3, 4)}, ValueError, r"support must be \[B, C, H, W\]"),
        ({"support": torch.ones(1, 3, 4, 4)}, ValueError, "support must have query's batch and channels"),
        ({"support": torch.ones(2, 4, 4, 4)}, ValueError, "support must have query's batch and channels"),
        ({"support": torch.ones(2, 3, 4, 4).double()}, TypeError, "support must have query's dtype"),
        ({"query": torch.ones(2, 3, 4, 4).long()}, TypeError, "query must be floating point"),
        ({"mask": torch.ones(2, 1, 4, 5)}, ValueError, r"mask must be \[2, 1, 4, 4\], got shape \[2, 1, 4, 5\]"),
        ({"mask": torch.ones(2, 4, 4)}, ValueError, r"mask must be \[2, 1, 4, 4\]"),
        ({"mask": torch.ones(2, 1, 4, 4, requires_grad=True)}, ValueError, "mask must not require a gradient"),
        ({"support": torch.ones(2, 3, 0, 4)}, ValueError, "support is empty"),
        ({"support": torch.ones(2, 3, 4, 4, device="meta")}, ValueError, "support is on meta"),
    ],
)
def test_errors(arguments: dict[str, Tensor], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"query": torch.ones(2, 3, 4, 4), "support": torch.ones(2, 3, 4, 4), **arguments}
    with pytest.raises(error, match=message):
        max_cosine(**given)


def test_a_boolean_mask_counts_as_zeros_and_ones() -> None:
    query, support = features(1, 4, 3, 3, seed=26), features(1, 4, 3, 3, seed=27)
    mask = make_mask("binary", 1, 3, 3)
    assert mask is not None
    assert torch.equal(max_cosine(query, support, mask=mask.bool()), max_cosine(query, support, mask=mask))
