"""Fusion of forwards whose Python a trace reads wrongly or once for all: modes, randomness, state, types."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from error_ratio import assert_close, error_ratio
from networks import (
    CHANNELS,
    TwoConvs,
    assert_same_network,
    forward_of,
    notes,
    picture,
    run,
)
from torch import Tensor

import svf_fast

SAVES = ("exact", "recompute")


def optional_argument(self: Any, x: Tensor, identity: Tensor | None = None) -> Tensor:
    if identity is None:
        identity = x
    return self.relu(self.bn1(self.conv1(x)) + identity)


def optional_flag(self: Any, x: Tensor, skip: Any = None) -> Tensor:
    out = self.bn1(self.conv1(x))
    if skip is True:
        out = out + x
    return self.relu(out)


def looks_at_the_type(self: Any, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        x = [x, x]
    return self.relu(self.bn1(self.conv1(x[0] + x[1])))


def no_grad_inside(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = self.relu(self.bn1(self.conv1(x)))
    return self.relu(self.bn2(self.conv2(h)) + x)


@torch.no_grad()
def no_grad_around(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)))


def asks_for_the_grad_mode(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    return self.relu(out) if torch.is_grad_enabled() else torch.relu(out)


def looks_at_the_shape(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    return self.relu(out) if x.shape[0] > 1 else out


def looks_at_values(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    return self.relu(out) if x.sum() > 0 else out


def loops_over_pictures(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.relu(self.bn1(self.conv1(one.unsqueeze(0)))).squeeze(0) for one in x])


def checkpoints(self: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda t: self.relu(self.bn1(self.conv1(t))), x, use_reentrant=False)


TRACE_TRAPS = (
    optional_argument, optional_flag, looks_at_the_type, no_grad_inside, no_grad_around, asks_for_the_grad_mode,
    looks_at_the_shape, looks_at_values, loops_over_pictures, checkpoints,
)  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("forward", TRACE_TRAPS, ids=lambda f: f.__name__)
def test_python_that_a_trace_does_not_see(forward: Callable[..., Any], save: str) -> None:
    assert_same_network(forward_of(forward), save=save)


@pytest.mark.parametrize("argument", [None, True, False])
def test_flags_in_the_call(argument: Any) -> None:
    assert_same_network(forward_of(optional_flag), None, argument)


def test_an_optional_tensor_that_is_given() -> None:
    assert_same_network(forward_of(optional_argument), None, picture(seed=5))
    assert_same_network(forward_of(optional_argument), identity=picture(seed=5))


def test_autocast_inside_the_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.relu(self.bn1(self.conv1(x)))
        return self.conv2(h.float())

    original = forward_of(forward).float()
    x = picture(dtype=torch.float32)
    fused, unfused = (svf_fast.convert(copy.deepcopy(original), fuse=fuse) for fuse in (True, False))
    # bfloat16 was used in both: equal far beyond float32 rounding's reach would mean that it was not
    assert_close(run(fused, x), run(unfused, x), torch.bfloat16)
    exact = copy.deepcopy(original).double()
    assert error_ratio(fused(x), exact.conv2(exact.relu(exact.bn1(exact.conv1(x.double()))))) > 1e-4  # type: ignore[operator]


def test_stochastic_depth_stays_random() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return self.relu(self.bn1(self.conv1(x)) + x)

    original = forward_of(forward)
    converted = svf_fast.convert(copy.deepcopy(original)).train()
    x = picture()
    torch.manual_seed(0)
    skipped = {torch.equal(converted(x), x) for _ in range(30)}
    assert skipped == {True, False}


def test_python_random_stays_random() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return out if random.random() < 0.5 else -out

    converted = svf_fast.convert(forward_of(forward))
    random.seed(0)
    assert {bool((converted(picture()) >= 0).all()) for _ in range(30)} == {True, False}


def test_noise_drawn_in_the_forward_is_drawn_every_time() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)) + torch.rand(1, CHANNELS, 1, 1, dtype=torch.float64))

    converted = svf_fast.convert(forward_of(forward))
    assert not torch.equal(converted(picture()), converted(picture()))


def test_dropout_between_layers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.dropout(self.relu(self.bn1(self.conv1(x))), 0.5, self.training)
        return self.relu(self.bn2(self.conv2(h)) + x)

    original = forward_of(forward)
    for training in (False, True):
        results = []
        for fuse in (True, False):
            model = svf_fast.convert(copy.deepcopy(original), fuse=fuse).train(training)
            torch.manual_seed(3)
            results.append(run(model, picture()))
        assert_close(results[0], results[1], torch.float64)


def test_a_feature_kept_on_the_module_is_kept_at_every_call() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.features = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(self.features)))

    original = forward_of(forward)
    converted: Any = svf_fast.convert(copy.deepcopy(original))
    assert not hasattr(converted, "features"), "the conversion left something of its own"
    for seed in (0, 1):
        x = picture(seed=seed)
        original(x)
        converted(x)
        assert error_ratio(converted.features, original.features) < 1e-12  # type: ignore[arg-type]


def test_a_counter_counts_calls_and_not_conversions() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.relu(self.bn1(self.conv1(x)))

    converted: Any = svf_fast.convert(forward_of(forward))
    for _ in range(3):
        converted(picture())
    assert converted.calls == 3


class WithBuffer(TwoConvs):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("level", torch.zeros(1, CHANNELS, 1, 1))


def test_a_buffer_updated_in_the_forward_is_updated_at_every_call() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.steps += 1
        return self.relu(self.bn1(self.conv1(x)))

    converted: Any = svf_fast.convert(forward_of(forward, WithBuffer))
    for _ in range(3):
        converted(picture())
    assert converted.steps.item() == 3


def test_a_running_average_in_the_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.level.mul_(0.9).add_(x.mean((0, 2, 3), keepdim=True), alpha=0.1)
        return self.relu(self.bn1(self.conv1(x)) - self.level)

    original: Any = forward_of(forward, WithBuffer)
    converted: Any = svf_fast.convert(copy.deepcopy(original))
    for seed in range(3):
        assert error_ratio(converted(picture(seed=seed)), original(picture(seed=seed))) < 1e-12
    assert error_ratio(converted.level, original.level) < 1e-12


def test_a_forward_that_cannot_be_traced_says_so() -> None:
    model = svf_fast.convert(forward_of(looks_at_values))
    assert "cannot be traced" in notes(model)["conv1"]
