"""`disabled` gives the pre-trained network back for a while; `summary` counts and names."""

from __future__ import annotations

import copy

import pytest
import torch
from error_ratio import error_ratio
from networks import CHANNELS, NETWORKS, TwoConvs, picture, settle
from torch import Tensor
from whole_model import model_with_everything

import svf_fast


@pytest.mark.parametrize("save", ["exact", "recompute"])
@pytest.mark.parametrize("parametrization", ["direct", "scale"])
def test_disabled_is_the_pretrained_network(parametrization: str, save: str) -> None:
    original = settle(NETWORKS["bottlenecks"]())
    model = svf_fast.convert(copy.deepcopy(original), parametrization=parametrization, save=save)
    x = picture(2, CHANNELS, 9, 8)
    with torch.no_grad():
        for value in svf_fast.singular_values(model).values():
            value.mul_(1.7)
        trained, expected = model(x), original(x)
        assert error_ratio(trained, expected) > 1e-2
        with svf_fast.disabled(model) as same:
            assert same is model
            assert error_ratio(model(x), expected) < 1e-12
            with svf_fast.disabled(model):
                assert error_ratio(model(x), expected) < 1e-12
            assert error_ratio(model(x), expected) < 1e-12
        assert torch.equal(model(x), trained)
        with pytest.raises(KeyError), svf_fast.disabled(model):
            raise KeyError
        assert torch.equal(model(x), trained)
    with svf_fast.disabled(model):
        assert error_ratio(model(x), expected) < 1e-12
    assert error_ratio(model(x), trained) < 1e-12


def test_the_gradient_of_x_flows_while_disabled() -> None:
    model = svf_fast.convert(settle(NETWORKS["vgg"]()))
    with torch.no_grad():
        for value in svf_fast.singular_values(model).values():
            value.mul_(1.7)
    with svf_fast.disabled(model):
        x = picture().requires_grad_()
        model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.ne(0).any()
    assert all(v.grad is None for v in svf_fast.singular_values(model).values())


def test_summary_counts_and_names() -> None:
    model = svf_fast.convert(model_with_everything())
    text = svf_fast.summary(model, (1, 3, 16, 16))
    values = sum(v.numel() for v in svf_fast.singular_values(model).values())
    total = sum(p.numel() for p in model.parameters())
    assert f"{values:,} of {total:,} parameters train" in text
    for name in svf_fast.singular_values(model):
        assert name in text
    assert "fused: conv → norm → residual → relu" in text
    assert "not counted" not in text


def test_summary_of_a_model_that_takes_something_else() -> None:
    class Odd(TwoConvs):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.conv1(x["image"])

    assert "not counted" in svf_fast.summary(svf_fast.convert(Odd()))
