"""The ops under opcheck and fake tensors: schemas, registration, and the strides of real outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import CASES, EXTRAS, ConvCase, make_problem
from implementations import IMPLEMENTATIONS
from networks import CHANNELS, NETWORKS, picture, settle
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import svf_fast

on_each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)

SAVES = ("exact", "int8", "recompute")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_arguments(case: ConvCase, layout: torch.memory_format, keep_z: str, **extras: bool) -> tuple[Any, ...]:
    given: dict[str, Any] = {k: v for k, v in extras.items() if v}
    problem = make_problem(case, torch.float32, given, memory_format=layout)
    residual = None if problem.residual is None else problem.residual.requires_grad_()
    return (
        problem.x.requires_grad_(), problem.v, problem.s.requires_grad_(), problem.u,
        problem.vectors.get("scale"), problem.vectors.get("shift"), residual, "relu" in given,
        list(case.stride), list(case.padding), list(case.dilation), case.groups, keep_z, "relu" in given,
    )  # fmt: skip


OPCHECK_CASES = (ConvCase(size=(5, 4)), CASES[4], CASES[6], CASES[10], CASES[16], CASES[17], CASES[18])


@on_each_implementation
@pytest.mark.parametrize("keep_z", ["exact", "int8", "input"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_of_the_convolution(case: ConvCase, layout: torch.memory_format, keep_z: str) -> None:
    arguments = op_arguments(case, layout, keep_z, scale=True, shift=True, residual=True, relu=True)
    checks = OPCHECKS if case is OPCHECK_CASES[0] else OPCHECKS[:3]
    torch.library.opcheck(torch.ops.svf_fast.conv2d.default, arguments, test_utils=checks)


@on_each_implementation
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck_without_anything_optional(layout: torch.memory_format) -> None:
    torch.library.opcheck(torch.ops.svf_fast.conv2d.default, op_arguments(ConvCase(size=(5, 4)), layout, "exact"))


@on_each_implementation
@pytest.mark.parametrize("is_sliced", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck_of_a_chain(layout: torch.memory_format, is_sliced: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(2, 12, 5, 4).contiguous(memory_format=layout)
    x = (x[:, 3:9] if is_sliced else x[:, :6].contiguous(memory_format=layout)).detach().requires_grad_()
    residual = normal(2, 8, 3, 2).contiguous(memory_format=layout).requires_grad_()
    arguments = (
        x, [normal(4, 6, 1, 1), normal(4, 4, 3, 3)], [normal(4).requires_grad_(), normal(4).requires_grad_()],
        [normal(4, 4), normal(8, 4)], [normal(4), normal(8)], [normal(4), normal(8)], residual, True,
        [1, 1, 0, 0, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.svf_fast.chain.default, arguments, test_utils=OPCHECKS[:3])


@on_each_implementation
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck_of_max_cosine(layout: torch.memory_format) -> None:
    query, support = (
        picture(2, 5, 4, 3, seed=n, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
        for n in (0, 1)
    )
    mask = (picture(2, 1, 4, 3, seed=2, dtype=torch.float32) > 0).float()
    for given in (None, mask):
        torch.library.opcheck(
            torch.ops.svf_fast.max_cosine.default, (query, support, given, 1e-7), test_utils=OPCHECKS[:3]
        )


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_fake_outputs_and_gradients_have_the_strides_of_real_ones(
    index: int, layout: torch.memory_format, save: str
) -> None:
    problem = make_problem(CASES[index], torch.float32, EXTRAS[index % len(EXTRAS)], memory_format=layout)
    real = problem.run(save)
    with FakeTensorMode() as mode:
        for name in ("x", "v", "s", "u", "dy", "residual"):
            tensor = getattr(problem, name)
            setattr(problem, name, None if tensor is None else mode.from_tensor(tensor))
        problem.vectors = {k: mode.from_tensor(t) for k, t in problem.vectors.items()}
        fake = problem.run(save)
    for name, value in real.items():
        assert fake[name].dtype == value.dtype
        assert fake[name].shape == value.shape
        strides = [
            (a, b) for a, b, size in zip(fake[name].stride(), value.stride(), value.shape, strict=True) if size > 1
        ]
        assert all(a == b for a, b in strides), name


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_runs_on_the_meta_device(name: str, save: str) -> None:
    model = svf_fast.convert(settle(NETWORKS[name]()).float(), save=save).to("meta")
    out = model(torch.empty(2, CHANNELS, 9, 8, device="meta"))
    for tensor in out.values() if isinstance(out, dict) else [out]:
        tensor.sum().backward(retain_graph=True)
    assert all(v.grad is not None for v in svf_fast.singular_values(model).values())


def test_a_network_made_on_the_meta_device_converts_to_the_same_shapes() -> None:
    """What a large setting keeps can be counted without its memory."""
    with torch.device("meta"):
        model = svf_fast.convert(nn.Sequential(nn.Conv2d(6, 21, 3, groups=3), nn.BatchNorm2d(21), nn.ReLU()))
        out = model(torch.empty(2, 6, 9, 8))
    real = svf_fast.convert(nn.Sequential(nn.Conv2d(6, 21, 3, groups=3), nn.BatchNorm2d(21), nn.ReLU()))
    assert out.shape == (2, 21, 7, 6)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
