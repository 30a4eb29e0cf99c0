"""`convert` and `merge`: exactly the right things frozen, targets, sharing, repetition, and all of it undone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_ratio import error_ratio
from networks import CHANNELS, NETWORKS, conv, forward_of, notes, picture, run, settle
from torch import Tensor, nn
from whole_model import block, model_with_everything

import svf_fast
from svf_fast import SVFConv2d, SVFLinear
from svf_fast.modules import SVFModule


def test_within_the_targets_only_singular_values_train() -> None:
    model = svf_fast.convert(model_with_everything())
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"s"}
    assert sum(p.requires_grad for p in model.parameters()) == 6
    model = svf_fast.convert(model_with_everything(), ["body"])
    for name, parameter in model.named_parameters():
        if name.startswith("body."):
            assert parameter.requires_grad == name.endswith(".s"), name
        else:
            assert parameter.requires_grad, name


def test_the_values_are_reachable_by_name() -> None:
    model = svf_fast.convert(model_with_everything(), ["body.0", "head"])
    values = svf_fast.singular_values(model)
    assert list(values) == ["body.0.conv1", "body.0.conv2", "head"]
    assert all(isinstance(v, nn.Parameter) and v.requires_grad for v in values.values())


@pytest.mark.parametrize("fuse", [True, False])
def test_batch_norm_is_frozen_for_good(fuse: bool) -> None:
    model: Any = svf_fast.convert(model_with_everything(), ["body"], fuse=fuse)
    model.train()
    before = {k: v.clone() for k, v in model.body.state_dict().items() if "running" in k or "num_batches" in k}
    first = model.body(picture(seed=1))
    model.body(picture(seed=2) * 3)
    assert torch.equal(first, model.body(picture(seed=1)))
    for key, value in before.items():
        assert torch.equal(model.body.state_dict()[key], value), key
    assert model.training
    assert not model.body[0].bn1.training
    assert model.stem[1].training


@pytest.mark.parametrize("kind", ["affine=False", "no momentum", "subclass", "sync"])
def test_kinds_of_batch_norm(kind: str) -> None:
    class OwnNorm(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    norm: nn.Module = {
        "affine=False": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
        "no momentum": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
        "subclass": lambda: OwnNorm(CHANNELS),
        "sync": lambda: nn.SyncBatchNorm(CHANNELS),
    }[kind]()
    original = settle(nn.Sequential(conv(), norm, nn.ReLU()))
    expected = original(picture()) if kind != "sync" else None
    model = svf_fast.convert(copy.deepcopy(original)).train()
    if expected is not None:
        assert error_ratio(model(picture()), expected) < 1e-12
    assert torch.equal(model(picture()), model(picture()))
    merged: Any = svf_fast.merge(model)
    assert type(merged[1]) is type(norm)


def test_batch_norm_without_statistics_is_refused() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS, track_running_stats=False))
    with pytest.raises(ValueError, match=r"^1: BatchNorm without running statistics"):
        svf_fast.convert(model)
    assert type(model[0]) is nn.Conv2d
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, {"stem.0", "body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2", "head"}),
        (["body"], {"body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2"}),
        (("body.1", "head"), {"body.1.conv1", "body.1.conv2", "head"}),
        (r"conv1$", {"body.0.conv1", "body.1.conv1"}),
        (re.compile(r"^(stem|head)"), {"stem.0", "head"}),
        (lambda name, module: isinstance(module, nn.Linear), {"head"}),
        ({"stem": 1}.keys(), {"stem.0"}),
        ((n for n in ("head",)), {"head"}),
    ],
)
def test_targets(targets: Any, expected: set[str]) -> None:
    model = svf_fast.convert(model_with_everything(), targets)
    assert set(svf_fast.singular_values(model)) == expected
    assert {n for n, m in model.named_modules() if isinstance(m, SVFModule)} == expected


def test_a_prefix_is_a_whole_name() -> None:
    model = nn.ModuleDict({"layer1": conv(), "layer10": conv()})
    svf_fast.convert(model, ["layer1"])
    assert isinstance(model["layer10"], nn.Conv2d)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["layer9"], "no module is named 'layer9'"),
        (["body", "layer9"], "no module is named 'layer9'"),
        ([], "matches no module"),
        ("^nothing$", "matches no module"),
        ("(", "not a valid regular expression"),
        (lambda name, module: False, "matches no module"),
        (["norm"], "no Conv2d or Linear among them"),
        (["bod"], "no module is named 'bod'"),
    ],
)
def test_targets_that_match_nothing_are_an_error(targets: Any, message: str) -> None:
    model = model_with_everything()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        svf_fast.convert(model, targets)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_prefix_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="targets must hold module-name prefixes, got 3"):
        svf_fast.convert(model_with_everything(), [3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("root", "kind"), [(lambda: nn.Conv2d(3, 4, 3), SVFConv2d), (lambda: nn.Linear(3, 4), SVFLinear)]
)
def test_a_bare_root_is_converted_and_merged(root: Callable[[], nn.Module], kind: type[nn.Module]) -> None:
    original = root()
    converted = svf_fast.convert(copy.deepcopy(original))
    assert isinstance(converted, kind)
    assert list(svf_fast.singular_values(converted)) == [""]
    merged = svf_fast.merge(converted)
    assert type(merged) is type(original)
    assert all(p.requires_grad for p in merged.parameters())
    for key, value in original.state_dict().items():
        assert error_ratio(merged.state_dict()[key], value) < 1e-6


def test_a_module_under_two_names_is_one_module_before_and_after() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = conv()
            self.list = nn.ModuleList([self.first, conv(), self.first])

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x))) + self.list[2](x)

    original = settle(Shared())
    model: Any = svf_fast.convert(copy.deepcopy(original))
    assert isinstance(model.first, SVFConv2d)
    assert model.first is model.second is model.list[0] is model.list[2]
    assert error_ratio(model(picture()), original(picture())) < 1e-12
    merged: Any = svf_fast.merge(model)
    assert merged.first is merged.second is merged.list[2]


def test_a_block_shared_by_two_parents() -> None:
    shared = forward_of(block)
    model: Any = nn.Sequential(nn.Sequential(shared, shared), nn.Sequential(shared)).eval()
    expected = model(picture())
    svf_fast.convert(model)
    assert error_ratio(model(picture()), expected) < 1e-12
    svf_fast.merge(model)
    assert error_ratio(model(picture()), expected) < 1e-12


def test_tied_weights_are_refused() -> None:
    model = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="1: its weight is shared with 0"):
        svf_fast.convert(model)


def test_converting_twice_is_refused() -> None:
    model = svf_fast.convert(model_with_everything())
    with pytest.raises(ValueError, match="already converted"):
        svf_fast.convert(model)


@pytest.mark.parametrize("order", [("stem", "body", "head"), ("body.1", "body.0", "stem")])
def test_converting_part_after_part(order: tuple[str, ...]) -> None:
    original = model_with_everything()
    model = copy.deepcopy(original)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    x = picture(2, 3, 8, 8)
    expected = original(x)
    for part in order:
        svf_fast.convert(model, [part])
        assert error_ratio(model(x), expected) < 1e-11
    svf_fast.merge(model)
    assert error_ratio(model(x), expected) < 1e-11
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {type(m) for m in model.modules()} == {type(m) for m in original.modules()}


def test_converting_layers_of_one_block_one_after_the_other() -> None:
    original = forward_of(block)
    model: Any = nn.Sequential(copy.deepcopy(original)).eval()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for pattern in ("conv1|bn1", "conv2|bn2|bn1"):
        svf_fast.convert(model, pattern)
        assert error_ratio(model(picture()), original(picture())) < 1e-12
    assert all(note.startswith("fused") for note in notes(model).values()), notes(model)
    duplicate: Any = copy.deepcopy(model)
    assert error_ratio(duplicate(picture()), original(picture())) < 1e-12
    svf_fast.merge(model)
    assert type(model[0]) is type(original)
    assert error_ratio(model(picture()), original(picture())) < 1e-12
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("save", ["exact", "recompute"])
@pytest.mark.parametrize("parametrization", ["direct", "scale"])
@pytest.mark.parametrize("name", NETWORKS)
def test_merge_round_trip(name: str, parametrization: str, save: str) -> None:
    original = settle(NETWORKS[name]())
    model = svf_fast.convert(copy.deepcopy(original), save=save, parametrization=parametrization)
    merged = svf_fast.merge(model)
    assert merged is model
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert list(merged.state_dict()) == list(original.state_dict())
    for key, value in original.state_dict().items():
        assert error_ratio(merged.state_dict()[key], value) < 1e-12, key
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in original.parameters()]
    assert vars(merged).keys() == vars(original).keys()
    assert error_ratio(run(merged, picture())["out0"], run(original, picture())["out0"]) < 1e-12


def test_merge_after_training_keeps_the_trained_function() -> None:
    model = svf_fast.convert(model_with_everything())
    x = picture(2, 3, 8, 8)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(x)
    before.square().sum().backward()
    optimiser.step()
    trained = model(x).detach()
    assert error_ratio(trained, before) > 1e-3
    assert error_ratio(svf_fast.merge(model)(x), trained) < 1e-12


@pytest.mark.parametrize("frozen", [True, False])
def test_merge_restores_what_trained_before(frozen: bool) -> None:
    original = model_with_everything().requires_grad_(not frozen)
    original.get_parameter("body.0.bn1.weight").requires_grad_(False)
    model = svf_fast.merge(svf_fast.convert(copy.deepcopy(original)))
    flags, expected = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (model, original))
    assert flags == expected


@pytest.mark.parametrize("mode_between", [None, True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_merge_restores_training_modes(mode: bool, mode_between: bool | None) -> None:
    model = svf_fast.convert(model_with_everything().train(mode))
    if mode_between is not None:
        model.train(mode_between)
    merged = svf_fast.merge(model)
    assert {m.training for m in merged.modules()} == {mode if mode_between is None else mode_between}


def test_merge_leaves_a_stage_in_evaluation_mode_there() -> None:
    """A network in training mode whose early stages are in evaluation mode: usual in segmentation."""
    model: Any = model_with_everything().train()
    model.body.eval()
    merged = svf_fast.merge(svf_fast.convert(model))
    assert {n: m.training for n, m in merged.named_modules() if n.startswith("body")} == {
        n: False for n, _ in merged.named_modules() if n.startswith("body")
    }


def test_batch_norm_learns_again_after_merge() -> None:
    model: Any = svf_fast.merge(svf_fast.convert(model_with_everything())).train()
    before = model.stem[1].running_mean.clone()
    model(picture(2, 3, 8, 8))
    assert not torch.equal(before, model.stem[1].running_mean)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_merge_refuses_what_is_not_finite_and_changes_nothing(poison: float) -> None:
    model = svf_fast.convert(model_with_everything())
    with torch.no_grad():
        svf_fast.singular_values(model)["body.1.conv2"][0] = poison
    with pytest.raises(ValueError, match=r"^body\.1\.conv2: .*not finite"):
        svf_fast.merge(model)
    assert len(svf_fast.singular_values(model)) == 6
