"""Fusion: whatever a forward does, the fused network is the same function with the same gradients as the written one."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import svf_fast
import torch
import torch.nn.functional as F
from error_ratio import assert_close, error_ratio
from networks import (
    CHANNELS,
    NETWORKS,
    Bottleneck,
    ListOfLayers,
    TwoConvs,
    assert_same_network,
    conv,
    forward_of,
    notes,
    picture,
    run,
    settle,
    vgg,
)
from svf_fast.modules import SVFConv2d
from torch import Tensor, nn

SAVES = ("exact", "recompute")


@pytest.mark.parametrize("needs_dx", (True, False))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, save: str, layout: torch.memory_format, needs_dx: bool) -> None:
    x = picture(2, CHANNELS, 9, 8).contiguous(memory_format=layout)
    assert_same_network(settle(NETWORKS[name]()), x, save=save, needs_dx=needs_dx)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_training_mode(name: str, save: str) -> None:
    assert_same_network(settle(NETWORKS[name]()), save=save, training=True)


def test_the_whole_bottleneck_fuses() -> None:
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()))
    for name, note in notes(model).items():
        expected = {
            "conv3": "fused: conv → norm → residual → relu",
            "0": "fused: conv → norm",
        }.get(name.rpartition(".")[2], "fused: conv → norm → relu")
        assert note == expected, name


@pytest.mark.parametrize("name", ("basic blocks", "vgg", "inline downsample", "module list", "module dict"))
def test_every_layer_of_an_ordinary_network_fuses(name: str) -> None:
    model = svf_fast.convert(settle(NETWORKS[name]()))
    assert all(note.startswith("fused: conv → ") for note in notes(model).values()), notes(model)


# --- additions -------------------------------------------------------------------------------------------------------


def add_operator(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x)


def add_reversed(self: Any, x: Tensor) -> Tensor:
    return self.relu(x + self.bn1(self.conv1(x)))


def add_in_place(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    out += x
    return self.relu(out)


def add_into_the_other(self: Any, x: Tensor) -> Tensor:
    other = x * 2
    other += self.bn1(self.conv1(x))
    return torch.relu(other) + other


def add_method_into_the_other(self: Any, x: Tensor) -> Tensor:
    other = x * 2
    other.add_(self.bn1(self.conv1(x)))
    return torch.relu(other) + other


def add_function(self: Any, x: Tensor) -> Tensor:
    return self.relu(torch.add(self.bn1(self.conv1(x)), x))


def add_with_alpha(self: Any, x: Tensor) -> Tensor:
    return self.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=2))


def add_method_with_alpha(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)).add(x, alpha=-3))


def add_itself(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    return self.relu(out + out)


def add_broadcast(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


def add_that_grows_the_batch(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x[:1])) + x)


def add_that_grows_the_rank(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.unsqueeze(0))


def add_another_dtype(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.float())


def add_number(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + 0.5)


def add_size(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.size(0))


def add_shape(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.shape[-1] / 7)


def add_parameter(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + self.bn2.bias.view(1, -1, 1, 1))


def add_two_convolutions(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


def add_its_own_input(self: Any, x: Tensor) -> Tensor:
    h = self.relu(self.bn1(self.conv1(x)))
    return self.relu(self.bn2(self.conv2(h)) + h)


def add_to_the_convolution(self: Any, x: Tensor) -> Tensor:
    return self.bn1(self.conv1(x) + x)


def subtract(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) - x)


def add_detached(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)) + x.detach())


ADDITIONS = (
    add_operator, add_reversed, add_in_place, add_into_the_other, add_method_into_the_other, add_function, add_with_alpha,
    add_method_with_alpha, add_itself, add_broadcast, add_that_grows_the_batch, add_that_grows_the_rank, add_another_dtype,
    add_number, add_size, add_shape, add_parameter, add_two_convolutions, add_its_own_input, add_to_the_convolution,
    subtract, add_detached,
)  # fmt: skip


# --- other uses of the values between --------------------------------------------------------------------------------


def relu_used_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def convolution_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(self.relu(self.bn1(self.conv1(x))))))


def norm_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def functional_relus(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).relu()


def relu_without_norm(self: Any, x: Tensor) -> Tensor:
    return self.conv2(self.conv1(x).relu_())


def value_before_the_relu_is_used(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    return torch.relu(out) + out.sigmoid()


def value_before_the_norm_is_used(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    return self.relu(self.bn1(out)) + out


def in_place_relu_whose_result_is_ignored(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    self.relu(out)
    return out + x


def in_place_relu_on_a_view(self: Any, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    out.view(-1).relu_()
    return out


def alias_of_an_in_place_sum(self: Any, x: Tensor) -> Tensor:
    out = before = self.bn1(self.conv1(x))
    out += x
    return torch.relu(out) + before


def collected_before_an_in_place_sum(self: Any, x: Tensor) -> list[Tensor]:
    out = self.bn1(self.conv1(x))
    features = [out]
    out += x
    features.append(torch.relu(out))
    return features


def in_place_product_of_an_alias(self: Any, x: Tensor) -> Tensor:
    out = before = self.relu(self.bn1(self.conv1(x)))
    out *= 2
    return before + self.conv2(out)


def two_outputs(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.relu(self.bn1(self.conv1(x)))
    return h, self.bn2(self.conv2(h))


def leaky(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(self.bn1(self.conv1(x)), 0.3)


def relu6(self: Any, x: Tensor) -> Tensor:
    return F.relu6(self.bn1(self.conv1(x)))


def clamp(self: Any, x: Tensor) -> Tensor:
    return self.bn1(self.conv1(x)).clamp(min=0)


def detached_between(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))).detach())) + x)


def part_of_the_batch(self: Any, x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat([self.relu(self.bn1(self.conv1(first))), self.relu(self.bn2(self.conv2(second)))])


OTHER_USES = (
    relu_used_twice, convolution_called_twice, norm_called_twice, functional_relus, relu_without_norm,
    value_before_the_relu_is_used, value_before_the_norm_is_used, in_place_relu_whose_result_is_ignored,
    in_place_relu_on_a_view, alias_of_an_in_place_sum, collected_before_an_in_place_sum, in_place_product_of_an_alias,
    two_outputs, leaky, relu6, clamp, detached_between, part_of_the_batch,
)  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("forward", (*ADDITIONS, *OTHER_USES), ids=lambda f: f.__name__)
def test_forwards(forward: Callable[..., Any], save: str) -> None:
    assert_same_network(forward_of(forward), save=save)


# --- something in between writes in place: x is read later than it was written -----------------------------------------


class DoubleInPlace(nn.Module):
    """A user's own module that says nowhere that it writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class WithOwnModule(TwoConvs):
    def __init__(self) -> None:
        super().__init__()
        self.double_in_place = DoubleInPlace()


def identity_branch_relu(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    identity = self.relu(x)
    return torch.relu(self.bn1(out) + identity)


def identity_branch_relu_first(self: Any, x: Tensor) -> Tensor:
    identity = self.relu(x)
    return torch.relu(self.bn1(self.conv1(x)) + identity)


def identity_branch_relu_between_layers(self: Any, x: Tensor) -> Tensor:
    h = torch.relu(self.bn1(self.conv1(x)))
    identity = self.relu(x)
    return torch.relu(self.bn2(self.conv2(h)) + identity)


def write_between_layers(self: Any, x: Tensor) -> Tensor:
    h = torch.relu(self.bn1(self.conv1(x)))
    x.mul_(2)
    return torch.relu(self.bn2(self.conv2(h)) + x)


def write_by_a_module_of_its_own(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    identity = self.double_in_place(x)
    return torch.relu(self.bn1(out) + identity)


def write_between_layers_by_a_module_of_its_own(self: Any, x: Tensor) -> Tensor:
    h = torch.relu(self.bn1(self.conv1(x)))
    identity = self.double_in_place(x)
    return torch.relu(self.bn2(self.conv2(h)) + identity)


def write_by_an_aten_op(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    torch.ops.aten.mul_.Scalar(x, 3)
    return torch.relu(self.bn1(out) + x)


def write_by_a_positional_in_place_flag(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    F.leaky_relu(x, 0.3, True)
    return torch.relu(self.bn1(out) + x)


def write_by_an_out_argument(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    torch.mul(x, 3, out=x)
    return torch.relu(self.bn1(out) + x)


def write_by_item_assignment(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(x)
    x[:, 0] = 0
    return torch.relu(self.bn1(out) + x)


def write_by_augmented_assignment(self: Any, x: Tensor) -> Tensor:
    out, alias = self.conv1(x), x
    x *= 3
    return torch.relu(self.bn1(out) + alias)


def write_by_a_power(self: Any, x: Tensor) -> Tensor:
    out, alias = self.conv1(x), x
    x **= 2
    return torch.relu(self.bn1(out) + alias)


def write_into_a_view(self: Any, x: Tensor) -> Tensor:
    view = x[:, :2]
    out = self.conv1(x)
    view.zero_()
    return torch.relu(self.bn1(out) + x)


WRITES = (
    identity_branch_relu, identity_branch_relu_first, identity_branch_relu_between_layers, write_between_layers,
    write_by_a_module_of_its_own, write_between_layers_by_a_module_of_its_own, write_by_an_aten_op,
    write_by_a_positional_in_place_flag, write_by_an_out_argument, write_by_item_assignment, write_by_augmented_assignment,
    write_by_a_power, write_into_a_view,
)  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_nothing_is_read_after_it_was_overwritten(forward: Callable[..., Any], save: str) -> None:
    """A frozen network without a gradient of x may overwrite x: so may the converted one, or it says that it cannot."""
    original = forward_of(forward, WithOwnModule)
    try:
        assert_same_network(original, save=save, needs_dx=False)
    except RuntimeError as error:
        # save="recompute" on a lone layer keeps x by reference: autograd notices the write
        assert save == "recompute", error
        assert "modified by an inplace operation" in str(error)


# --- forwards that tracing would read wrongly --------------------------------------------------------------------------


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
    return torch.utils.checkpoint.checkpoint(
        lambda t: self.relu(self.bn1(self.conv1(t))), x, use_reentrant=False
    )


TRACE_TRAPS = (
    optional_argument, optional_flag, looks_at_the_type, no_grad_inside, no_grad_around, asks_for_the_grad_mode,
    looks_at_the_shape, looks_at_values, loops_over_pictures, checkpoints,
)  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("forward", TRACE_TRAPS, ids=lambda f: f.__name__)
def test_python_that_a_trace_does_not_see(forward: Callable[..., Any], save: str) -> None:
    assert_same_network(forward_of(forward), save=save)


@pytest.mark.parametrize("argument", (None, True, False))
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
    assert error_ratio(fused(x), exact.conv2(exact.relu(exact.bn1(exact.conv1(x.double()))))) > 1e-4  # type: ignore[operator,union-attr]


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
        return out if random.random() < 0.5 else -out  # noqa: S311

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
        assert_close(*results, torch.float64)


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


# --- what a forward reads may change after the conversion ---------------------------------------------------------------


class Switch(nn.Module):
    """A child with a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class Configurable(TwoConvs):
    class_flag = True

    def __init__(self) -> None:
        super().__init__()
        self.flag, self._private = True, True
        self.options = {"skip": True}
        self.choices = [True]
        self.switch = Switch()
        self.register_buffer("buffer_flag", torch.ones(()))

    @property
    def derived(self) -> bool:
        return self._private


def set_flag(m: Any) -> None:
    m.flag = False


def set_private(m: Any) -> None:
    m._private = False


def set_class_flag(m: Any) -> None:
    m.class_flag = False


def set_option(m: Any) -> None:
    m.options["skip"] = False


def set_choice(m: Any) -> None:
    m.choices[0] = False


def set_switch(m: Any) -> None:
    m.switch.is_on = False


def set_child_mode(m: Any) -> None:
    m.switch.training = True


READS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], None]]] = {
    "attribute": (lambda m: m.flag, set_flag),
    "private attribute": (lambda m: m._private, set_private),
    "property": (lambda m: m.derived, set_private),
    "class attribute": (lambda m: m.class_flag, set_class_flag),
    "dictionary": (lambda m: m.options["skip"], set_option),
    "list": (lambda m: m.choices[0], set_choice),
    "a child's attribute": (lambda m: m.switch.is_on, set_switch),
    "a child's mode": (lambda m: not m.switch.training, set_child_mode),
    "getattr": (lambda m: getattr(m, "flag", False), set_flag),
    "vars": (lambda m: vars(m)["flag"], set_flag),
}


@pytest.mark.parametrize("is_changed", (False, True))
@pytest.mark.parametrize("kind", READS)
def test_flags_read_by_the_forward(kind: str, is_changed: bool) -> None:
    read, change = READS[kind]

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        if read(self):
            out = out + x
        return self.relu(out)

    assert_same_network(forward_of(forward, Configurable), change=change if is_changed else None)


@pytest.mark.parametrize("training", (False, True))
def test_a_forward_that_reads_the_mode(training: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return self.relu(out) if self.training else self.relu(out + x)

    model = assert_same_network(forward_of(forward), training=training)
    assert all(n.startswith("fused") or n.startswith("alone: followed by") or not n for n in notes(model).values())


def test_a_tensor_that_is_a_plain_attribute() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)) * self.gains)

    original = forward_of(forward)
    original.gains = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64).view(1, -1, 1, 1)  # type: ignore[assignment]
    assert_same_network(original)


def test_a_child_is_replaced_after_the_conversion() -> None:
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda m: setattr(m, "relu", nn.LeakyReLU()),
        lambda m: setattr(m, "bn1", nn.Identity()),
        lambda m: setattr(m, "conv1", settle(conv()).requires_grad_(False)),
        lambda m: m.add_module("relu", nn.Sigmoid()),
        lambda m: m.register_module("relu", nn.Sigmoid()),
        lambda m: m.set_submodule("relu", nn.Tanh()),
        lambda m: m._modules.__setitem__("relu", nn.Tanh()),
    )
    for save in SAVES:
        for change in changes:
            assert_same_network(forward_of(add_its_own_input), change=change, save=save)


SEQUENTIAL_CHANGES: dict[str, Callable[[Any], Any]] = {
    "item": lambda m: m.__setitem__(2, nn.LeakyReLU()),
    "append": lambda m: m.append(nn.LeakyReLU()),
    "insert": lambda m: m.insert(2, nn.Softplus()),
    "extend": lambda m: m.extend([nn.Tanh()]),
    "delete the last": lambda m: m.__delitem__(-1),
    "delete inside": lambda m: m.__delitem__(2),
    "pop": lambda m: m.pop(-1),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("change", SEQUENTIAL_CHANGES)
def test_a_sequential_changes_after_the_conversion(change: str, save: str) -> None:
    layers = [conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    assert_same_network(settle(nn.Sequential(*layers)), change=SEQUENTIAL_CHANGES[change], save=save)


LIST_CHANGES: dict[str, Callable[[Any], Any]] = {
    "activation": lambda m: m.blocks.__setitem__(2, nn.LeakyReLU()),
    "norm": lambda m: m.blocks.__setitem__(1, nn.Identity()),
    "convolution": lambda m: m.blocks.__setitem__(0, settle(conv()).requires_grad_(False)),
    "append": lambda m: m.blocks.append(nn.LeakyReLU()),
    "insert": lambda m: m.blocks.insert(1, nn.Tanh()),
    "delete": lambda m: m.blocks.__delitem__(2),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("change", LIST_CHANGES)
def test_a_module_list_changes_after_the_conversion(change: str, save: str) -> None:
    assert_same_network(settle(ListOfLayers()), change=LIST_CHANGES[change], save=save)


def test_a_bottleneck_loses_its_downsample() -> None:
    block = Bottleneck(16, 4, 1, nn.Sequential(conv(16, 16, 1), nn.BatchNorm2d(16)))
    assert_same_network(settle(block), picture(2, 16, 5, 5), change=lambda m: setattr(m, "downsample", None))


# --- hooks, copies, names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("relu", "bn1"))
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
        model.conv1.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.detach().clone()))  # type: ignore[union-attr,operator]
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


@pytest.mark.parametrize("count", (1, 2, 3, 4, 5, 6, 9))
def test_long_chains_are_rebuilt_exactly(count: int) -> None:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)]
    assert_same_network(settle(nn.Sequential(*layers)), save="recompute")


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
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
    assert_close(*results, torch.float64)


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
    assert_close(*results, torch.float64)


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


def test_a_forward_that_cannot_be_traced_says_so() -> None:
    model = svf_fast.convert(forward_of(looks_at_values))
    assert "cannot be traced" in notes(model)["conv1"]


def test_unbatched_pictures() -> None:
    for save in SAVES:
        assert_same_network(forward_of(add_operator), picture(CHANNELS, 6, 5), save=save)
