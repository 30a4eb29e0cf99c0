"""Fused models under hooks, copies and pickles, and rebuilt chains in every variation."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from error_ratio import assert_close, error_ratio
from networks import (
    CHANNELS,
    NETWORKS,
    Bottleneck,
    TwoConvs,
    add_operator,
    assert_same_network,
    conv,
    forward_of,
    notes,
    picture,
    run,
    settle,
    vgg,
)
from torch import Tensor, nn

import svf_fast
from svf_fast.modules import SVFConv2d

SAVES = ("exact", "recompute")


@pytest.mark.parametrize("kind", ["relu", "bn1"])
def test_a_hook_that_was_there_before_the_conversion_still_runs(kind: str) -> None:
    original = forward_of(add_operator)
    original.get_submodule(kind).register_forward_hook(lambda m, i, out: out * 2)
    assert_same_network(original)


def test_hooks_on_the_block_itself_run() -> None:
    original = forward_of(add_operator)
    original.register_forward_hook(lambda m, i, out: out * 2)
    original.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    assert_same_network(original)


@pytest.mark.parametrize("save", SAVES)
def test_a_hook_on_a_convolution_sees_the_convolution(save: str) -> None:
    """Feature taps (Grad-CAM, activation statistics) hook convolutions of a converted model: they must get what they ask for."""
    original = forward_of(add_operator)
    converted = svf_fast.convert(copy.deepcopy(original), save=save)
    seen: dict[str, Tensor] = {}
    for name, model in (("original", original), ("converted", converted)):
        model.conv1.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.detach().clone()))  # type: ignore[union-attr]
        model(picture())
    assert error_ratio(seen["converted"], seen["original"]) < 1e-12


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_deep_copy_is_independent_and_the_same(name: str, save: str) -> None:
    model = svf_fast.convert(settle(NETWORKS[name]()), save=save)
    x = picture(2, CHANNELS, 9, 8)
    before = run(model, x)
    with torch.no_grad():
        model(x)
    duplicate = copy.deepcopy(model)
    assert notes(duplicate) == notes(model)
    assert_close(run(duplicate, x), before, torch.float64)
    with torch.no_grad():
        for value in svf_fast.singular_values(model).values():
            value.zero_()
    assert_close(run(duplicate, x), before, torch.float64)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_pickle(name: str, save: str) -> None:
    model = svf_fast.convert(settle(NETWORKS[name]()), save=save)
    x = picture(2, CHANNELS, 9, 8)
    with torch.no_grad():
        model(x)
    restored = pickle.loads(pickle.dumps(model))
    assert_close(run(restored, x), run(model, x), torch.float64)
    assert isinstance(svf_fast.merge(restored), type(NETWORKS[name]()))


class Locked(TwoConvs):
    """A module that says itself how it is pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.relu(self.bn1(self.conv1(x)))


def test_a_module_that_pickles_itself_its_own_way() -> None:
    model = svf_fast.convert(settle(Locked()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(run(other, picture()), run(model, picture()), torch.float64)


def test_the_class_of_a_block_stays_what_it_was() -> None:
    model: Any = svf_fast.convert(settle(NETWORKS["bottlenecks"]()))
    assert isinstance(model[0], Bottleneck)
    assert type(model[0]).__name__ == "Bottleneck"
    assert model[0].expansion == 4
    assert "Bottleneck(" in repr(model)


def test_another_block_can_be_made_from_the_class_of_a_converted_one() -> None:
    model: Any = svf_fast.convert(settle(NETWORKS["bottlenecks"]()))
    another = settle(type(model[1])(16, 4))
    assert another(picture(1, 16, 4, 4)).shape == (1, 16, 4, 4)


def test_data_parallel_replicas_share_the_fused_forward() -> None:
    model = svf_fast.convert(settle(vgg()))
    replica = model._replicate_for_data_parallel()
    assert_close({"y": replica(picture())}, {"y": model(picture())}, torch.float64)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 9])
def test_long_chains_are_rebuilt_exactly(count: int) -> None:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)]
    assert_same_network(settle(nn.Sequential(*layers)), save="recompute")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_has_the_bits_of_its_layers(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Recompute repeats the very operations of the forward pass: y, dx and every ds are equal bit for bit."""
    original = settle(NETWORKS["bottlenecks"]()).to(dtype)
    x = picture(2, CHANNELS, 9, 8, dtype=dtype).contiguous(memory_format=layout)
    exact, rebuilt = (run(svf_fast.convert(copy.deepcopy(original), save=save), x) for save in SAVES)
    for name, value in exact.items():
        assert torch.equal(value, rebuilt[name]), name


def test_a_chain_with_padding_modes_biases_and_groups() -> None:
    model = nn.Sequential(
        conv(padding_mode="reflect", bias=True), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        conv(groups=3, bias=True), nn.ReLU(),
        conv(padding_mode="circular"), nn.BatchNorm2d(CHANNELS, affine=False), nn.ReLU(),
        conv(kernel=2, padding="same"), nn.BatchNorm2d(CHANNELS),
    )  # fmt: skip
    for save in SAVES:
        assert_same_network(settle(model), save=save)


@pytest.mark.parametrize("save", SAVES)
def test_some_singular_values_frozen(save: str) -> None:
    original = settle(NETWORKS["bottlenecks"]())
    results = []
    for fuse in (True, False):
        model = svf_fast.convert(copy.deepcopy(original), save=save, fuse=fuse)
        for i, value in enumerate(svf_fast.singular_values(model).values()):
            value.requires_grad_(i % 2 == 0)
        results.append(run(model, picture(2, CHANNELS, 9, 8)))
    assert_close(results[0], results[1], torch.float64)


@pytest.mark.parametrize("save", SAVES)
def test_a_norm_or_factor_that_trains_after_all(save: str) -> None:
    original = settle(NETWORKS["bottlenecks"]())
    results = []
    for fuse in (True, False):
        model: Any = svf_fast.convert(copy.deepcopy(original), save=save, fuse=fuse)
        trained = [model[1].bn2.weight, model[1].bn2.bias, model[1].conv3.u]
        for parameter in trained:
            parameter.requires_grad_()
        result = run(model, picture(2, CHANNELS, 9, 8))
        result |= {f"d{i}": p.grad for i, p in enumerate(trained)}
        results.append(result)
    assert_close(results[0], results[1], torch.float64)


@pytest.mark.parametrize("save", SAVES)
def test_empty_batch(save: str) -> None:
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()), save=save)
    out = run(model, torch.empty(0, CHANNELS, 9, 8, dtype=torch.float64))
    assert out["out0"].shape == (0, 16, 5, 4)
    for _ in range(2):
        with torch.no_grad():
            assert model(torch.empty(0, CHANNELS, 9, 8, dtype=torch.float64)).shape == (0, 16, 5, 4)


def test_fuse_false_leaves_every_forward_alone() -> None:
    original = settle(NETWORKS["bottlenecks"]())
    model: Any = svf_fast.convert(original, fuse=False)
    assert type(model[0]) is Bottleneck
    assert all(isinstance(m, SVFConv2d) for m in (model[0].conv1, model[0].conv2))


def test_unbatched_pictures() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)

    for save in SAVES:
        assert_same_network(forward_of(forward), picture(CHANNELS, 6, 5), save=save)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_norm_refuses_what_it_refused_before(fuse: bool) -> None:
    """BatchNorm2d takes no unbatched picture: the converted network must not normalise along another dimension."""
    original = forward_of(add_operator)
    with pytest.raises(ValueError, match="expected 4D input"):
        original(picture(CHANNELS, 6, 5))
    with pytest.raises(ValueError, match=r"4|\[N"):
        svf_fast.convert(original, fuse=fuse)(picture(CHANNELS, 6, 5))
