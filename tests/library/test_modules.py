"""`SVFConv2d` and `SVFLinear` as drop-in modules: every option of Conv2d, merged evaluation, caches that never go stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_ratio import TOLERANCE, assert_close, error_ratio
from torch import Tensor, nn

import svf_fast
from svf_fast import SVFConv2d, SVFLinear
from svf_fast.modules import SVFModule

CONVS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "stride and dilation": {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 6, "out_channels": 12},
    "reflect": {"padding_mode": "reflect", "padding": (1, 2)},
    "replicate": {"padding_mode": "replicate", "padding": 1, "stride": 2},
    "circular": {"padding_mode": "circular", "padding": (2, 1)},
    "zeros": {"padding": (2, 1)},
    "same, even kernel": {"padding": "same", "kernel_size": (2, 4)},
    "same, reflect, even kernel": {"padding": "same", "kernel_size": (4, 2), "padding_mode": "reflect"},
    "same, circular, dilated": {"padding": "same", "dilation": 2, "padding_mode": "circular"},
    "valid": {"padding": "valid"},
    "reflect with groups": {"padding_mode": "reflect", "padding": 2, "groups": 3, "out_channels": 9},
    "one by one": {"kernel_size": 1, "out_channels": 24},
    "one output channel": {"out_channels": 1},
    "21 output channels": {"out_channels": 21},
}


def make_conv(name: str, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    options = {"out_channels": 8, "kernel_size": 3, "bias": False, **CONVS[name]}
    conv = nn.Conv2d(6, options.pop("out_channels"), options.pop("kernel_size"), **options, dtype=dtype)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return conv


def picture(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    shape = shape or (2, 6, 9, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outputs(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(leaf)
    (dx,) = torch.autograd.grad((y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum(), leaf)
    return {"y": y.detach(), "dx": dx}


@pytest.mark.parametrize("save", ["exact", "int8", "recompute"])
@pytest.mark.parametrize("parametrization", ["direct", "scale"])
@pytest.mark.parametrize("name", CONVS)
def test_every_kind_of_convolution(name: str, parametrization: str, save: str) -> None:
    conv = make_conv(name)
    layer = SVFConv2d.from_conv(conv, save=save, parametrization=parametrization)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = picture().contiguous(memory_format=layout)
        assert_close(outputs(layer, x), outputs(conv, x), torch.float64)
        for _ in range(2):
            with torch.no_grad():
                assert_close({"y": layer(x)}, {"y": conv(x)}, torch.float64)


@pytest.mark.parametrize("name", CONVS)
def test_merged_is_the_convolution_again(name: str) -> None:
    conv = make_conv(name)
    merged = SVFConv2d.from_conv(conv.eval()).merged()
    assert type(merged) is nn.Conv2d
    assert not merged.training
    assert error_ratio(merged.weight, conv.weight) < 1e-12
    assert repr(merged) == repr(conv)
    assert list(merged.state_dict()) == list(conv.state_dict())
    assert_close({"y": merged(picture())}, {"y": conv(picture())}, torch.float64)


@pytest.mark.parametrize("name", CONVS)
def test_merged_after_training_is_the_same_function(name: str) -> None:
    layer = SVFConv2d.from_conv(make_conv(name))
    with torch.no_grad():
        layer.s.mul_(torch.linspace(0.5, 2, len(layer.s)).double())
    assert_close(outputs(layer, picture()), outputs(layer.merged(), picture()), torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_unbatched_pictures_and_every_dtype(dtype: torch.dtype) -> None:
    conv = make_conv("reflect", dtype)
    exact = copy.deepcopy(conv).double()
    layer = SVFConv2d.from_conv(conv)
    x = picture(6, 7, 5, dtype=dtype)
    for y in (layer(x), layer(x.unsqueeze(0)).squeeze(0)):
        assert y.dtype == dtype
        assert_close({"y": y}, {"y": exact(x.double())}, dtype)


@pytest.mark.parametrize("shape", [(5, 10), (10,), (2, 3, 10), (0, 10)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("sizes", [(10, 4), (10, 17), (10, 1)], ids=str)
def test_linear(sizes: tuple[int, int], has_bias: bool, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(*sizes, bias=has_bias, dtype=torch.float64)
    layer = SVFLinear.from_linear(linear)
    x = picture(*shape)
    assert_close(outputs(layer, x), outputs(linear, x), torch.float64)
    with torch.no_grad():
        for _ in range(2):
            assert_close({"y": layer(x)}, {"y": linear(x)}, torch.float64)
    assert error_ratio(layer.merged().weight, linear.weight) < 1e-12


def test_an_empty_batch_of_rows_still_gives_s_a_gradient() -> None:
    """Under DDP every rank must take part in the reduction, also the one whose batch is empty."""
    layer = SVFLinear.from_linear(nn.Linear(4, 3))
    layer(torch.empty(0, 4)).sum().backward()
    assert layer.s.grad is not None
    assert torch.equal(layer.s.grad, torch.zeros(3))


def test_parameters_and_buffers() -> None:
    layer = SVFConv2d.from_conv(make_conv("bias"))
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
        "s": True,
        "u": False,
        "v": False,
        "bias": False,
    }
    assert set(dict(layer.named_buffers())) == {"s0", "base_fingerprint"}
    assert layer.rank == 8
    assert torch.equal(layer.s, layer.s0)


def test_scale_parametrization_starts_at_one_and_trains_the_factor() -> None:
    conv = make_conv("plain")
    direct, scale = (SVFConv2d.from_conv(conv, parametrization=p) for p in ("direct", "scale"))
    assert torch.equal(scale.s, torch.ones(8).double())
    for layer in (direct, scale):
        layer(picture()).square().sum().backward()
    assert direct.s.grad is not None
    assert scale.s.grad is not None
    assert error_ratio(scale.s.grad, direct.s.grad * direct.s0) < 1e-12


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank(rank: int) -> None:
    for name, total in (("plain", rank), ("groups", 2 * rank)):
        layer = SVFConv2d.from_conv(make_conv(name), rank=rank)
        assert layer.rank == total
        assert_close(outputs(layer, picture()), outputs(layer.merged(), picture()), torch.float64)


def step(layer: SVFModule) -> None:
    layer.s.grad = torch.ones_like(layer.s)
    torch.optim.SGD([layer.s], lr=0.1).step()


def fused_adam_step(layer: SVFModule) -> None:
    layer.s.grad = torch.ones_like(layer.s)
    torch.optim.Adam([layer.s], lr=0.1, fused=True).step()


def foreach_step(layer: SVFModule) -> None:
    layer.s.grad = torch.ones_like(layer.s)
    torch.optim.AdamW([layer.s], lr=0.1, foreach=True).step()


def write_in_place(layer: SVFModule) -> None:
    with torch.no_grad():
        layer.s.mul_(2)


def write_through_data(layer: SVFModule) -> None:
    layer.s.data.mul_(2)


def replace_data(layer: SVFModule) -> None:
    layer.s.data = layer.s.data * 2


def replace_parameter(layer: SVFModule) -> None:
    layer.s = nn.Parameter(layer.s.detach() * 2)


def write_bias(layer: SVFModule) -> None:
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.add_(1)


def write_bias_through_data(layer: SVFModule) -> None:
    assert layer.bias is not None
    layer.bias.data.add_(1)


def load_state(layer: SVFModule) -> None:
    layer.load_state_dict({k: v * 2 if k in ("s", "bias") else v for k, v in layer.state_dict().items()})


def assign_state(layer: SVFModule) -> None:
    state = {k: v.clone() * 2 if k in ("s", "bias") else v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def write_under_inference_mode(layer: SVFModule) -> None:
    with torch.inference_mode():
        layer.s.mul_(2)


CHANGES = (
    step, fused_adam_step, foreach_step, write_in_place, write_through_data, replace_data, replace_parameter, write_bias,
    write_bias_through_data, load_state, assign_state, write_under_inference_mode,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("parametrization", ["direct", "scale"])
def test_the_merged_weight_follows_every_change(parametrization: str, change: Callable[[SVFModule], None]) -> None:
    layer = SVFConv2d.from_conv(make_conv("bias"), parametrization=parametrization).eval()
    x = picture()
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        after = layer(x)
    assert not torch.equal(before, after)
    assert_close({"y": after}, {"y": layer(x.requires_grad_())}, torch.float64)


def test_evaluation_merges_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from svf_fast import modules

    merge, calls = modules.recompose, []

    def counted(*factors: Tensor) -> Tensor:
        calls.append(1)
        return merge(*factors)

    monkeypatch.setattr(modules, "recompose", counted)
    layer = SVFConv2d.from_conv(make_conv("bias")).eval()
    with torch.no_grad():
        for _ in range(3):
            layer(picture())
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["dtype", "layout", "disabled"])
def test_the_cache_knows_what_it_was_made_for(change: str) -> None:
    conv = make_conv("bias", torch.float32)
    layer = SVFConv2d.from_conv(conv).eval()
    with torch.no_grad():
        layer.s.mul_(1.5)
        x = picture(dtype=torch.float32)
        layer(x)
        if change == "dtype":
            layer.double()
            assert error_ratio(layer(x.double()), layer(x.double().requires_grad_())) < 1e-12
        elif change == "layout":
            assert_close({"y": layer(x.contiguous(memory_format=torch.channels_last))}, {"y": layer(x)}, torch.float32)
        else:
            with svf_fast.disabled(layer):
                assert_close({"y": layer(x)}, {"y": conv(x)}, torch.float32)


def test_inference_mode_then_training() -> None:
    """What an evaluation under inference mode cached must not reach autograd afterwards."""
    model = svf_fast.convert(nn.Sequential(make_conv("bias", torch.float32), nn.BatchNorm2d(8), nn.ReLU()))
    x = picture(dtype=torch.float32)
    with torch.inference_mode():
        before = model(x)
    y = model(x)
    y.sum().backward()
    assert_close({"y": y}, {"y": before}, torch.float32)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)


def test_fake_tensors_leave_nothing_behind() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = svf_fast.convert(nn.Sequential(make_conv("bias", torch.float32), nn.BatchNorm2d(8), nn.ReLU()))
    for grad in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(grad):
            model(torch.empty(2, 6, 9, 8))
        with torch.set_grad_enabled(grad):
            assert type(model(picture(dtype=torch.float32))) is Tensor


def test_summary_leaves_nothing_behind() -> None:
    model = svf_fast.convert(nn.Sequential(make_conv("bias", torch.float32), nn.BatchNorm2d(8), nn.ReLU()))
    svf_fast.summary(model, (1, 6, 9, 8))
    assert type(model(picture(dtype=torch.float32))) is Tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.weight.data.mul_(2),
        lambda norm: norm.running_mean.data.add_(1),
        lambda norm: norm.running_var.mul_(3),
        lambda norm: norm.load_state_dict({k: v + 1 for k, v in norm.state_dict().items()}),
        lambda norm: setattr(norm, "eps", 0.5),
        lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight.detach() * 2, requires_grad=False)),
        lambda norm: nn.init.constant_(norm.weight, 0.3),
    ],
)
def test_a_frozen_norm_follows_every_change(change: Callable[[Any], Any]) -> None:
    model: Any = svf_fast.convert(nn.Sequential(make_conv("bias"), nn.BatchNorm2d(8, dtype=torch.float64), nn.ReLU()))
    x = picture()
    model(x)
    with torch.no_grad():
        model(x)
    change(model[1])
    norm = model[1]
    expected = torch.relu(
        nn.functional.batch_norm(
            model[0](x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps
        )
    )
    assert_close({"y": model(x)}, {"y": expected}, torch.float64)
    with torch.no_grad():
        assert_close({"y": model(x)}, {"y": expected}, torch.float64)


@pytest.mark.parametrize("cached", [False, True])
def test_copies(cached: bool) -> None:
    for layer, x in (
        (SVFConv2d.from_conv(make_conv("bias")), picture()),
        (SVFLinear.from_linear(nn.Linear(10, 4, dtype=torch.float64)), picture(3, 10)),
    ):
        if cached:
            with torch.no_grad():
                layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_close(outputs(other, x), outputs(layer, x), torch.float64)
            with torch.no_grad():
                other.s.zero_()
            assert layer.s.ne(0).any()


def test_state_dict_round_trip() -> None:
    layer, other = (SVFConv2d.from_conv(make_conv(name)) for name in ("bias", "bias"))
    with torch.no_grad():
        layer.s.mul_(3)
    other.load_state_dict(layer.state_dict())
    assert_close(outputs(other, picture()), outputs(layer, picture()), torch.float64)


def test_training_moves_s_and_nothing_else() -> None:
    layer = SVFConv2d.from_conv(make_conv("bias"))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer(picture()).square().mean().backward()
    optimiser.step()
    changed = {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"s"}


def test_model_code_may_look_at_the_weight() -> None:
    """Networks read `conv.weight.dtype`, and nn.TransformerEncoderLayer reads `linear1.weight` on its fast path."""
    conv = make_conv("bias")
    layer: Any = SVFConv2d.from_conv(conv)
    assert error_ratio(layer.weight, conv.weight) < 1e-12


def test_a_transformer_layer_still_evaluates() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = picture(2, 5, 16, dtype=torch.float32)
    expected = layer(x)
    svf_fast.convert(layer, ["linear1", "linear2"])
    assert error_ratio(layer(x), expected) < 1e-5
    with torch.no_grad():
        assert error_ratio(layer(x), expected) < 1e-5


def test_parts_that_no_longer_fit_are_named() -> None:
    x = picture(dtype=torch.float32)
    for change, sentence in (
        (lambda m: setattr(m, "s", nn.Parameter(m.s.detach().to("meta"))), "s must be"),
        (lambda m: setattr(m, "s", nn.Parameter(m.s.detach()[:1])), "s must be"),
        (lambda m: setattr(m, "s", nn.Parameter(m.s.detach().double())), "s and v must be"),
        (lambda m: setattr(m, "v", nn.Parameter(m.v.detach().double(), requires_grad=False)), "s and v must be"),
    ):
        layer: Any = SVFConv2d.from_conv(make_conv("bias", torch.float32))
        change(layer)
        with pytest.raises((ValueError, TypeError), match=sentence):
            layer(x)
    layer = SVFConv2d.from_conv(make_conv("bias", torch.float32))
    with pytest.raises((ValueError, RuntimeError)):
        layer(x, residual=torch.zeros_like(layer(x), device="meta"))
    model: Any = svf_fast.convert(nn.Sequential(make_conv("bias", torch.float32), nn.BatchNorm2d(8), nn.ReLU()))
    for number in (1, 3):
        other: Any = svf_fast.convert(nn.Sequential(nn.Conv2d(6, number, 1), nn.BatchNorm2d(number)))[1]
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="norm must have 8 channels"):
                model[0](x, norm=other)


def test_vmap_over_what_is_merged() -> None:
    layer: Any = SVFConv2d.from_conv(make_conv("bias", torch.float32))
    x, values = picture(dtype=torch.float32), torch.stack([layer.s.detach(), 2 * layer.s.detach()])
    norm: Any = svf_fast.convert(nn.Sequential(make_conv("bias", torch.float32), nn.BatchNorm2d(8)))[1]
    weights = torch.rand(2, 8)
    with torch.no_grad():
        layer(x)
        each = [torch.func.functional_call(layer, {"s": s}, (x,)) for s in values]
        found = torch.vmap(lambda s: torch.func.functional_call(layer, {"s": s}, (x,)))(values)
        assert_close({"y": found}, {"y": torch.stack(each)}, torch.float32)
        y = layer(x)
        normed = torch.vmap(lambda w: torch.func.functional_call(norm, {"weight": w}, (y,)))(weights)
        each = [torch.func.functional_call(norm, {"weight": w}, (y,)) for w in weights]
        assert_close({"y": normed}, {"y": torch.stack(each)}, torch.float32)


def test_a_factor_that_takes_the_place_of_a_freed_one_is_noticed() -> None:
    layer: Any = SVFConv2d(nn.Conv2d(64, 64, 1), parametrization="scale")
    x = torch.randn(1, 64, 3, 3)
    for _ in range(20):
        with torch.no_grad():
            layer(x)
        for _ in range(3):
            layer.u = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        with torch.no_grad():
            assert_close({"y": layer(x)}, {"y": layer.merged()(x)}, torch.float32)
