"""Void pixels everywhere: they are neither in a loss nor in a prototype or a prior, and a batch of nothing else costs
nothing. So does a support without its object."""

from __future__ import annotations

import pytest
import torch
from method_cases import BASE_CLASSES, OPTIONS, Batch, batch, narrow, narrow_backbone
from torch.nn import functional

from svf_fast.train.methods import Losses, PSPNet
from svf_fast.train.methods.losses import segmentation_loss
from svf_fast.train.tuning import build_strategy

METHODS = list(OPTIONS)


def all_void(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, 255)


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 9, 9, generator=generator, requires_grad=True)
    label = torch.randint(0, 4, (3, 9, 9), generator=generator)
    label[:, :2], label[1] = 255, 255
    return logits, label


def test_a_loss_is_the_mean_over_the_pixels_that_are_not_void() -> None:
    logits, label = random_case()
    loss = segmentation_loss(logits, label)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = functional.cross_entropy(logits, label, ignore_index=255)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
    per_pixel = functional.cross_entropy(logits, label.clamp(max=3), reduction="none")
    torch.testing.assert_close(loss, per_pixel[label != 255].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_loss_of_nothing_is_0_with_a_gradient_of_zeros(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 5, 5, dtype=dtype, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 5, 5), 255))
    loss.backward()
    # a mean over many pixels is not taken in half precision
    assert (loss.item(), loss.dtype) == (0, torch.float32 if dtype == torch.bfloat16 else dtype)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_loss_that_is_not_finite_stays_so() -> None:
    logits, label = random_case()
    assert segmentation_loss(logits * float("nan"), label).isnan()


def require_nothing(losses: Losses, module: torch.nn.Module) -> None:
    assert losses.total.item() == 0
    assert {part.item() for part in losses.parts.values()} == {0.0}
    losses.total.backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", METHODS)
def test_queries_of_nothing_but_void_train_nothing(name: str) -> None:
    method = narrow(name).train()
    build_strategy("svf").apply(method)
    given = batch()
    assert given.base_labels is not None
    void = given._replace(query_labels=all_void(given.query_labels), base_labels=all_void(given.base_labels))
    require_nothing(method.losses(void), method)


def test_pictures_of_nothing_but_void_train_no_base_learner() -> None:
    learner = PSPNet(narrow_backbone(), classes=BASE_CLASSES).train()
    images = batch().query_images
    require_nothing(learner.losses(images, torch.full((2, 33, 33), 255)), learner)


@pytest.mark.parametrize("name", METHODS)
def test_a_query_of_void_leaves_the_others_of_its_batch_their_losses(name: str) -> None:
    method = narrow(name).double().eval()
    given = batch(dtype=torch.float64)
    assert given.base_labels is not None
    labels, base_labels = given.query_labels.clone(), given.base_labels.clone()
    labels[1], base_labels[1] = 255, 255
    both = method.losses(given._replace(query_labels=labels, base_labels=base_labels))
    alone = method.losses(Batch(*(part[:1] for part in given if part is not None)))
    torch.testing.assert_close(both.total, alone.total)


@pytest.mark.parametrize("name", METHODS)
def test_void_in_a_support_is_no_object_and_no_more_than_background(name: str) -> None:
    method = narrow(name).eval()
    given = batch()
    labels = given.support_labels
    assert (labels == 255).any()

    def described(support_labels: torch.Tensor) -> list[torch.Tensor]:
        low = method.segment(given.query_images, given.support_images, support_labels)
        return [low.prototype, low.prior]

    found = described(labels)
    for value, is_same in ((0, True), (1, False)):
        others = described(labels.masked_fill(labels == 255, value))
        assert [torch.equal(*pair) for pair in zip(found, others, strict=True)] == [is_same, is_same]


@pytest.mark.parametrize("empty", [0, 255], ids=["background", "void"])
@pytest.mark.parametrize("name", METHODS)
def test_a_support_whose_object_was_cropped_away_says_nothing(name: str, empty: int) -> None:
    method = narrow(name).train()
    build_strategy("svf").apply(method)
    given = batch()
    bare = given._replace(support_labels=torch.full_like(given.support_labels, empty))
    low = method.segment(*bare.episode)
    assert not low.prototype.any()
    assert not low.prior.any()
    losses = method.losses(bare)
    losses.total.backward()
    assert losses.total.isfinite()
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
