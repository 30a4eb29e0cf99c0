"""The prior mask: both forms agree in value and gradient, and degenerate episodes stay finite."""

import pytest
import torch
from torch import Tensor

from svf_fast.train.methods.prior import prior_mask


def features(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def soft_mask(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    mask = torch.rand(batch, 1, height, width, dtype=torch.float64, generator=generator)
    return torch.where(mask < 0.5, 0.0, mask)


@pytest.mark.parametrize("query_size", [(5, 5), (4, 7)])
@pytest.mark.parametrize("support_size", [(5, 5), (3, 6)])
def test_streaming_is_the_matrix_form(query_size, support_size):
    results = {}
    for cosine in ("streaming", "matrix"):
        query, support = features(2, 6, *query_size, seed=1), features(2, 6, *support_size, seed=2)
        prior = prior_mask(query, support, soft_mask(2, *support_size), cosine=cosine)
        assert prior.shape == (2, 1, *query_size)
        (prior * features(*prior.shape, seed=3).detach()).sum().backward()
        results[cosine] = (prior, query.grad, support.grad)
    for streaming, matrix in zip(*results.values(), strict=True):
        assert torch.isfinite(matrix).all()
        torch.testing.assert_close(streaming, matrix, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cosine", ["streaming", "matrix"])
def test_each_picture_spans_zero_to_one(cosine):
    prior = prior_mask(features(3, 4, 6, 6, seed=1), features(3, 4, 6, 6, seed=2), soft_mask(3, 6, 6), cosine=cosine)
    torch.testing.assert_close(prior.amin(dim=(1, 2, 3)), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(prior.amax(dim=(1, 2, 3)), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cosine", ["streaming", "matrix"])
def test_an_empty_mask_gives_no_prior_and_finite_gradients(cosine):
    query, support = features(1, 4, 5, 5, seed=1), features(1, 4, 5, 5, seed=2)
    prior = prior_mask(query, support, torch.zeros(1, 1, 5, 5, dtype=torch.float64), cosine=cosine)
    assert torch.equal(prior, torch.zeros_like(prior))
    prior.sum().backward()
    for given in (query, support):
        assert given.grad is not None
        assert torch.equal(given.grad, torch.zeros_like(given))


@pytest.mark.parametrize("cosine", ["streaming", "matrix"])
def test_the_object_is_found(cosine):
    query = torch.zeros(1, 3, 4, 4)
    query[:, 0] = 1.0
    query[:, :, 1:3, 1:3] = torch.tensor([0.0, 1.0, 0.2]).view(1, 3, 1, 1)
    support = query.roll(1, dims=3)
    mask = (support[:, 1:2] > 0.5).float()
    prior = prior_mask(query, support, mask, cosine=cosine)
    assert torch.equal(prior > 0.5, query[:, 1:2] > 0.5)
