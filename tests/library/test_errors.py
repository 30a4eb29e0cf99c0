"""Every mistake gets one sentence that names the argument, what was given and what was expected, before anything runs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS, conv, settle
from torch import Tensor, nn

import svf_fast
from svf_fast import SVFConv2d, SVFLinear
from svf_fast.functional import svf_conv2d, svf_linear


def arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 4, 5, 5),
        "v": torch.randn(3, 4, 3, 3),
        "s": torch.rand(3, requires_grad=True),
        "u": torch.randn(6, 3),
        "padding": 1,
    }


Errors = type[Exception] | tuple[type[Exception], ...]
FUNCTIONAL: list[tuple[dict[str, Any], Errors, str]] = [
    ({"x": torch.randn(4, 5, 5)}, ValueError, "x must be [N, Ci, H, W], got shape [4, 5, 5]"),
    ({"x": torch.randn(2, 5, 5, 5)}, ValueError, "x has 5 channels, v with groups=1 expects 4"),
    ({"x": torch.ones(2, 4, 5, 5, dtype=torch.int64)}, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
    ({"x": torch.randn(2, 4, 5, 5, dtype=torch.complex64)}, TypeError, "x must be float16, bfloat16, float32 or float64"),
    ({"x": torch.randn(2, 4, 5, 5, dtype=torch.float64)}, TypeError, "v must have x's dtype torch.float64, got torch.float32"),
    ({"x": torch.randn(2, 4, 2, 1), "padding": 0}, ValueError, "x of height and width [2, 1] is smaller than the kernel [3, 3]"),
    ({"v": torch.randn(3, 4, 3)}, ValueError, "v must be [R, Ci/groups, Kh, Kw], got shape [3, 4, 3]"),
    ({"v": torch.randn(3, 4, 3, 3).half()}, TypeError, "v must have x's dtype torch.float32, got torch.float16"),
    ({"u": torch.randn(6, 3, 1, 1)}, ValueError, "u must be [Co, R/groups], got shape [6, 3, 1, 1]"),
    ({"u": torch.randn(6, 4)}, ValueError, "u has 4 factors a group, v with groups=1 expects 3"),
    ({"u": torch.randn(6, 3).double()}, TypeError, "u must have x's dtype"),
    ({"s": torch.rand(4)}, ValueError, "s must be [3], one value a right factor, got shape [4]"),
    ({"s": torch.rand(1, 3, 1, 1)}, ValueError, "s must be [3], one value a right factor, got shape [1, 3, 1, 1]"),
    ({"s": torch.rand(3).double()}, TypeError, "s must be torch.float32"),
    ({"bias": torch.rand(5)}, ValueError, "bias must be [6], one value an output channel, got shape [5]"),
    ({"scale": torch.rand(6, 1)}, ValueError, "scale must be [6], one value an output channel, got shape [6, 1]"),
    ({"shift": torch.rand(())}, ValueError, "shift must be [6], one value an output channel, got shape []"),
    ({"shift": torch.rand(6).half()}, TypeError, "shift must be torch.float32"),
    ({"residual": torch.rand(2, 6, 4, 5)}, ValueError, "residual must be [2, 6, 5, 5] like the output, got shape [2, 6, 4, 5]"),
    ({"residual": torch.rand(1, 6, 5, 5)}, ValueError, "residual must be [2, 6, 5, 5] like the output"),
    ({"residual": torch.rand(2, 6, 5, 5).double()}, TypeError, "residual must have x's dtype torch.float32, got torch.float64"),
    ({"u": torch.randn(6, 3, device="meta")}, ValueError, "u is on meta, x on cpu"),
    ({"activation": "gelu"}, ValueError, "activation must be None or 'relu', got 'gelu'"),
    ({"save": "all"}, ValueError, "save must be one of exact, int8, recompute, got 'all'"),
    ({"stride": 0}, ValueError, "stride must be one integer or two of at least 1, got 0"),
    ({"stride": (1, 2, 3)}, ValueError, "stride must be one integer or two of at least 1, got (1, 2, 3)"),
    ({"stride": 1.5}, (ValueError, TypeError), "stride must be one integer or two of at least 1, got 1.5"),
    ({"stride": None}, (ValueError, TypeError), "stride must be one integer or two of at least 1, got None"),
    ({"padding": -1}, ValueError, "padding must be one integer or two of at least 0, got -1"),
    ({"padding": "same"}, ValueError, "padding must be one integer or two of at least 0, got 'same'"),
    ({"dilation": (0, 1)}, ValueError, "dilation must be one integer or two of at least 1, got (0, 1)"),
    ({"groups": 0}, ValueError, "groups must be a positive integer, got 0"),
    ({"groups": 2}, ValueError, "x has 4 channels, v with groups=2 expects 8"),
    ({"groups": 2, "v": torch.randn(3, 2, 3, 3)}, ValueError, "v has 3 factors, not a multiple of groups=2"),
    (
        {"groups": 3, "v": torch.randn(3, 4, 3, 3), "x": torch.randn(2, 12, 5, 5), "u": torch.randn(5, 1)},
        ValueError,
        "u has 5 output channels, not a multiple of groups=3",
    ),
    ({"x": "a picture"}, TypeError, "x must be a tensor, got str"),
    ({"s": [1.0, 2.0, 3.0]}, TypeError, "s must be a tensor, got list"),
    ({"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), FUNCTIONAL, ids=[message[:60] for _, _, message in FUNCTIONAL])
def test_functional(change: dict[str, Any], error: Errors, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        svf_conv2d(**{**arguments(), **change})


LINEAR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(2, 5)}, ValueError, "x has 5 features, v expects 4"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
    ({"v": torch.randn(3, 4, 1)}, ValueError, "v must be [R, In], got shape [3, 4, 1]"),
    ({"u": torch.randn(6, 2)}, ValueError, "u has 2 factors"),
    ({"s": torch.rand(4)}, ValueError, "s must be [3]"),
    ({"bias": torch.rand(5)}, ValueError, "bias must be [6]"),
    ({"activation": "tanh"}, ValueError, "activation must be None or 'relu', got 'tanh'"),
    ({"save": "all"}, ValueError, "save must be one of exact, int8, recompute, got 'all'"),
]


@pytest.mark.parametrize(("change", "error", "message"), LINEAR, ids=[message[:60] for _, _, message in LINEAR])
def test_linear(change: dict[str, Any], error: Errors, message: str) -> None:
    given: dict[str, Any] = {"x": torch.randn(2, 4), "v": torch.randn(3, 4), "s": torch.rand(3), "u": torch.randn(6, 3)}
    with pytest.raises(error, match=re.escape(message)):
        svf_linear(**{**given, **change})


def poisoned(value: float) -> nn.Module:
    model = nn.Sequential(conv(), nn.Sequential(conv()))
    with torch.no_grad():
        model.get_parameter("1.0.weight")[0, 0, 0, 0] = value
    return model


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


def with_hook() -> nn.Module:
    model = nn.Sequential(conv(), conv())
    model[1].register_forward_hook(lambda *_: None)
    return model


def with_instance_forward() -> nn.Module:
    model = nn.Sequential(conv(), conv())
    written = model[1].forward
    model[1].forward = lambda x: written(x) * 2
    return model


MODELS: list[tuple[Callable[[], nn.Module], Errors, str]] = [
    (lambda: poisoned(float("nan")), ValueError, "1.0: weight holds values that are not finite"),
    (lambda: poisoned(float("inf")), ValueError, "1.0: weight holds values that are not finite"),
    (lambda: nn.Sequential(nn.Linear(0, 3)), ValueError, "0: weight must have at least two non-empty dimensions"),
    (lambda: nn.Sequential(nn.ReLU()), ValueError, "no Conv2d or Linear among them"),
    (lambda: nn.Sequential(OwnConv(6, 6, 3)), TypeError, "0: OwnConv overrides Conv2d's forward"),
    (lambda: nn.Sequential(OwnConvForward(6, 6, 3)), TypeError, "0: OwnConvForward overrides Conv2d's forward"),
    (with_hook, ValueError, "1: it has hooks"),
    (with_instance_forward, (TypeError, ValueError), "1: "),
    (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), ValueError, "0: its weight is not initialised yet"),
    (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv())), ValueError, "0: its weight is computed by a parametrization"),
    (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))),
        ValueError,
        "0: its weight is computed by a parametrization",
    ),
    (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), ValueError, "0.out_proj: nn.MultiheadAttention reads this weight directly"),
    (lambda: nn.Sequential(nn.Conv2d(2, 2, 1, dtype=torch.complex64)), (TypeError, ValueError), "0: weight must be floating point"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), MODELS, ids=[message[:60] for _, _, message in MODELS])
def test_models_that_cannot_be_converted_exactly(make: Any, error: Any, message: str) -> None:
    model = make()
    before = copy.copy(dict(model.named_modules()))
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=re.escape(message)):
        svf_fast.convert(model)
    assert all(before[n] is m for n, m in model.named_modules()), "something was changed"
    assert [p.requires_grad for p in model.parameters()] == flags


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"save": "most"}, ValueError, "save must be one of exact, int8, recompute, got 'most'"),
    ({"parametrization": "log"}, ValueError, "parametrization must be one of direct, scale, got 'log'"),
    ({"rank": 0}, ValueError, "rank must be None or a positive integer, got 0"),
    ({"rank": 2.5}, ValueError, "rank must be None or a positive integer, got 2.5"),
    ({"rank": 5}, ValueError, "0.conv1: rank must be between 1 and 4"),
    ({"targets": 3}, TypeError, "targets must"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=[message[:60] for _, _, message in OPTIONS])
def test_options_of_convert(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        svf_fast.convert(settle(NETWORKS["bottlenecks"]()), **options)


def test_a_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        svf_fast.convert(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function", [svf_fast.merge, lambda m: svf_fast.disabled(m).__enter__(), svf_fast.singular_values]
)
def test_a_model_that_is_not_converted(function: Any) -> None:
    if function is svf_fast.singular_values:
        assert function(nn.Sequential(conv())) == {}
        return
    with pytest.raises(ValueError, match="Sequential holds no converted layer"):
        function(nn.Sequential(conv()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SVFConv2d.from_conv(nn.Linear(3, 4)), "conv must be an nn.Conv2d, got Linear"),  # type: ignore[arg-type]
        (lambda: SVFConv2d.from_conv(nn.Conv1d(3, 4, 1)), "conv must be an nn.Conv2d, got Conv1d"),  # type: ignore[arg-type]
        (lambda: SVFLinear.from_linear(nn.Conv2d(3, 4, 1)), "linear must be an nn.Linear, got Conv2d"),  # type: ignore[arg-type]
    ],
)
def test_layers_of_another_kind(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("save", ["exact", "recompute"])
def test_a_converted_network_says_what_is_wrong_with_its_input(save: str, has_grad: bool) -> None:
    layers = [conv(), nn.BatchNorm2d(6), nn.ReLU(), conv(), nn.BatchNorm2d(6), nn.ReLU()]
    model = svf_fast.convert(nn.Sequential(*layers), save=save)
    with torch.set_grad_enabled(has_grad):
        with pytest.raises(ValueError, match=re.escape("x must be [N, 6, H, W], got shape [1, 5, 4, 4]")):
            model(torch.randn(1, 5, 4, 4))
        with pytest.raises(TypeError, match=r"torch\.float64.*torch\.float32|torch\.float32.*torch\.float64"):
            model(torch.randn(1, 6, 4, 4, dtype=torch.float64))
        with pytest.raises(ValueError, match="smaller than the kernel"):
            svf_fast.convert(nn.Sequential(conv(padding=0)), save=save)(torch.randn(1, 6, 2, 4))


@pytest.mark.parametrize("has_grad", [True, False])
def test_a_converted_linear_layer_says_what_is_wrong_with_its_input(has_grad: bool) -> None:
    layer = SVFLinear.from_linear(nn.Linear(4, 3))
    with torch.set_grad_enabled(has_grad):
        with pytest.raises(ValueError, match=re.escape("x must be [..., 4], got shape [2, 5]")):
            layer(torch.randn(2, 5))
        with pytest.raises(TypeError, match=r"torch\.float64.*torch\.float32|torch\.float32.*torch\.float64"):
            layer(torch.randn(2, 4, dtype=torch.float64))


def test_errors_come_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a convolution ran")

    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    for change, error, _message in FUNCTIONAL:
        with pytest.raises(error):
            svf_conv2d(**{**arguments(), **change})


def test_every_message_is_one_sentence_on_one_line() -> None:
    for change, error, _ in FUNCTIONAL:
        with pytest.raises(error) as caught:
            svf_conv2d(**{**arguments(), **change})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200
