"""`svf_conv2d` and `svf_linear` against the plain formula in float64: the output and every gradient, by name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from conv_cases import CASES, EXTRAS, ConvCase, Problem, make_problem, random_cases
from error_ratio import INT8_DS_TOLERANCE, TOLERANCE, assert_close, error_ratio
from implementations import IMPLEMENTATIONS
from torch import Tensor
from torch.autograd import forward_ad

from svf_fast import functional, reference
from svf_fast.backends import composed

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)

SAVES = ("exact", "int8", "recompute")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = tuple(TOLERANCE)
# large enough that the rounding noise of int8 averages out where a gradient has a direction at all
LARGE = ConvCase(batch=2, channels=(16, 24), size=(33, 31))


def gradient_of_a_fit(problem: Problem) -> Tensor:
    """dy of ½‖y − target‖² with a target as large as y: half a direction, half noise."""
    y = problem.run()["y"]
    return y - y.std() * problem.dy


def check(problem: Problem, save: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compares one run with float64; small int8 problems have a noisy ds, so it is left to the large one."""
    out = problem.run(save)
    expected = problem.reference(out["y"])
    for name, value in out.items():
        assert value.dtype == (problem.s.dtype if name == "ds" else dtype), name
    if save == "int8":
        compared = {k: v for k, v in out.items() if k != "ds"}
        assert_close(compared, {k: expected[k] for k in compared}, dtype)
    else:
        assert_close(out, expected, dtype)
    return out


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_geometry(index: int, dtype: torch.dtype, save: str) -> None:
    for number, layout in enumerate(LAYOUTS):
        extras = EXTRAS[(index + 4 * number) % len(EXTRAS)]
        check(make_problem(CASES[index], dtype, extras, memory_format=layout, seed=index), save, dtype)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=lambda e: "+".join(e) or "plain")
def test_what_follows_the_convolution(
    extras: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format, save: str
) -> None:
    check(make_problem(ConvCase(size=(8, 11)), dtype, extras, memory_format=layout, seed=5), save, dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES[-5:], ids=str)
def test_several_threads_and_no_onednn(case: ConvCase, layout: torch.memory_format) -> None:
    """Which of torch's kernels runs depends on both; the result does not."""
    problem = make_problem(case, torch.float32, EXTRAS[5], memory_format=layout)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(problem, "exact", torch.float32)
    finally:
        torch.set_num_threads(threads)
    with torch.backends.mkldnn.flags(enabled=False):
        check(problem, "exact", torch.float32)


@pytest.mark.parametrize("index", range(40))
def test_random_geometry(index: int) -> None:
    case = random_cases(40, seed=11)[index]
    for dtype, layout in product((torch.float64, torch.float32), LAYOUTS):
        problem = make_problem(case, dtype, EXTRAS[index % len(EXTRAS)], memory_format=layout, seed=index)
        check(problem, SAVES[index % 3], dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_moves_only_ds_and_little(dtype: torch.dtype, layout: torch.memory_format) -> None:
    problem = make_problem(LARGE, dtype, EXTRAS[5], memory_format=layout)
    problem.dy = gradient_of_a_fit(problem)
    exact, rounded = problem.run("exact"), problem.run("int8")
    for name in ("y", "dx", "dresidual"):
        assert torch.equal(exact[name], rounded[name]), name
    assert_close(rounded, problem.reference(rounded["y"]), dtype, tolerance={"ds": INT8_DS_TOLERANCE})


def sliced(t: Tensor) -> Tensor:
    """The same values, cut out of a larger tensor in every dimension."""
    n, c, h, w = t.shape
    large = t.new_full((n + 2, c + 3, 2 * h + 1, w + 2), float("nan"))
    view = large[1 : n + 1, 2 : c + 2, 1 : 2 * h + 1 : 2, 1 : w + 1]
    view.copy_(t)
    return view


def sliced_channels_last(t: Tensor) -> Tensor:
    n, c, h, w = t.shape
    large = t.new_full((n, c + 5, h, w + 1), float("nan")).contiguous(memory_format=torch.channels_last)
    view = large[:, 3 : c + 3, :, :w]
    view.copy_(t)
    return view


def transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def batch_inside(t: Tensor) -> Tensor:
    return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def offset_by_one(t: Tensor) -> Tensor:
    """Contiguous, but not at the beginning of its storage, and aligned to one element only."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


VIEWS = (sliced, sliced_channels_last, transposed, batch_inside, offset_by_one)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["x", "dy", "residual"])
def test_views_cut_out_of_larger_tensors(which: str, view: Callable[[Tensor], Tensor], save: str) -> None:
    for layout in LAYOUTS:
        problem = make_problem(ConvCase(size=(6, 5)), torch.float64, EXTRAS[5], memory_format=layout, seed=2)
        setattr(problem, which, view(getattr(problem, which)))
        check(problem, save, torch.float64)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_expanded_inputs_and_gradients(dimension: int, save: str) -> None:
    problem = make_problem(ConvCase(), torch.float64, EXTRAS[5], memory_format=torch.contiguous_format, seed=3)
    for name in ("x", "dy", "residual"):
        t = getattr(problem, name)
        setattr(problem, name, t.narrow(dimension, 0, 1).expand_as(t))
    check(problem, save, torch.float64)


def test_gradient_of_a_sum_is_a_stride_zero_tensor() -> None:
    problem = make_problem(ConvCase(), torch.float32, EXTRAS[3], memory_format=torch.channels_last)
    problem.dy = torch.ones(()).expand(problem.dy.shape)
    check(problem, "exact", torch.float32)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradient_take_the_memory_format_of_x(
    case: ConvCase, layout: torch.memory_format, save: str
) -> None:
    out = make_problem(case, torch.float32, EXTRAS[5], memory_format=layout).run(save)
    for name in ("y", "dx"):
        assert out[name].is_contiguous(memory_format=layout), name


def test_channel_expanded_picture_keeps_the_layout_of_conv2d() -> None:
    """A grey picture expanded to three channels is NCHW for every stock convolution."""
    x = torch.randn(2, 1, 8, 8).expand(2, 3, 8, 8)
    conv = torch.nn.Conv2d(3, 4, 3)
    problem = make_problem(ConvCase(channels=(3, 4)), torch.float32, {}, memory_format=torch.contiguous_format)
    y = functional.svf_conv2d(x, problem.v, problem.s, problem.u)
    assert y.is_contiguous() == conv(x).is_contiguous()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_empty_batch(layout: torch.memory_format, save: str) -> None:
    out = make_problem(ConvCase(batch=0), torch.float32, EXTRAS[5], memory_format=layout).run(save)
    assert out["y"].shape == (0, 8, 9, 7)
    assert out["dx"].shape == (0, 6, 9, 7)
    assert torch.equal(out["ds"], torch.zeros_like(out["ds"]))


@pytest.mark.parametrize("save", ["exact", "recompute"])
@pytest.mark.parametrize("extras", [EXTRAS[0], EXTRAS[5], EXTRAS[7]], ids=lambda e: "+".join(e) or "plain")
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(groups: int, extras: dict[str, Any], save: str) -> None:
    case = ConvCase(channels=(4, 4), size=(4, 3), stride=(2, 1), groups=groups)
    problem = make_problem(case, torch.float64, extras, memory_format=torch.contiguous_format, seed=1)
    inputs = [problem.x.requires_grad_(), problem.s.requires_grad_()]
    if problem.residual is not None:
        inputs.append(problem.residual.requires_grad_())

    def function(x: Tensor, s: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.svf_conv2d(
            x, problem.v, s, problem.u, residual=residual, save=save, **problem.vectors, **problem.keywords
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("save", SAVES)
def test_double_backward_is_refused_in_one_sentence(save: str) -> None:
    problem = make_problem(ConvCase(), torch.float64, EXTRAS[1], memory_format=torch.contiguous_format)
    x, s = problem.x.requires_grad_(), problem.s.requires_grad_()
    y = functional.svf_conv2d(x, problem.v, s, problem.u, padding=1, activation="relu", save=save)
    dx, ds = torch.autograd.grad(y.square().sum(), (x, s), create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .* not supported"):
        torch.autograd.grad(dx.sum() + ds.sum(), (x, s))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("asked", [a for a in product((False, True), repeat=3) if any(a)], ids=str)
def test_only_the_gradients_that_are_asked_for(asked: tuple[bool, bool, bool], save: str) -> None:
    problem = make_problem(LARGE, torch.float64, EXTRAS[5], memory_format=torch.contiguous_format)
    assert problem.residual is not None
    tensors = {"x": problem.x, "s": problem.s, "residual": problem.residual}
    for tensor, needed in zip(tensors.values(), asked, strict=True):
        tensor.requires_grad_(needed)
    problem.dy = gradient_of_a_fit(problem)
    y = functional.svf_conv2d(
        tensors["x"], problem.v, tensors["s"], problem.u, residual=tensors["residual"], save=save,
        **problem.vectors, **problem.keywords,
    )  # fmt: skip
    y.backward(problem.dy)
    expected = problem.reference(y)
    for (name, tensor), needed in zip(tensors.items(), asked, strict=True):
        assert (tensor.grad is not None) == needed, name
        if tensor.grad is not None:
            is_noisy = name == "s" and save == "int8"
            assert_close(
                {f"d{name}": tensor.grad}, {f"d{name}": expected[f"d{name}"]}, torch.float64,
                tolerance={f"d{name}": INT8_DS_TOLERANCE} if is_noisy else None,
            )  # fmt: skip


def test_no_data_gradient_is_computed_below_the_first_trained_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the data gradient was computed although nothing asked for it")

    monkeypatch.setattr(composed, "v_convolution_backward", refuse)
    problem = make_problem(ConvCase(), torch.float32, {}, memory_format=torch.contiguous_format)
    s = problem.s.requires_grad_()
    functional.svf_conv2d(problem.x, problem.v, s, problem.u, padding=1).sum().backward()
    assert s.grad is not None


def test_no_graph_without_anything_to_train() -> None:
    problem = make_problem(ConvCase(), torch.float32, EXTRAS[5], memory_format=torch.contiguous_format)
    y = functional.svf_conv2d(problem.x, problem.v, problem.s, problem.u, padding=1)
    assert not y.requires_grad
    with torch.no_grad():
        y = functional.svf_conv2d(problem.x, problem.v, problem.s.requires_grad_(), problem.u, padding=1)
    assert not y.requires_grad


@pytest.mark.parametrize("name", ["u", "v", "bias", "scale", "shift"])
def test_frozen_factors_may_be_trained_too(name: str) -> None:
    problem = make_problem(ConvCase(), torch.float64, EXTRAS[5], memory_format=torch.contiguous_format)
    tensors = {"u": problem.u, "v": problem.v, **problem.vectors}
    gradients = []
    for function in (functional.svf_conv2d, reference.svf_conv2d):
        copies = {k: t.detach().clone().requires_grad_(k == name) for k, t in tensors.items()}
        s = problem.s.detach().clone().requires_grad_()
        u, v = copies.pop("u"), copies.pop("v")
        y = function(problem.x, v, s, u, residual=problem.residual, **copies, **problem.keywords)
        y.backward(problem.dy)
        gradient = {"u": u, "v": v, **copies}[name].grad
        assert gradient is not None
        assert s.grad is not None
        gradients.append({f"d{name}": gradient, "ds": s.grad, "y": y.detach()})
    assert_close(gradients[0], gradients[1], torch.float64)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_run_to_run(dtype: torch.dtype, save: str) -> None:
    problem = make_problem(LARGE, dtype, EXTRAS[5], memory_format=torch.channels_last)
    first = problem.run(save)
    torch.manual_seed(987)
    second = problem.run(save)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_int8_leaves_the_global_generator_alone() -> None:
    problem = make_problem(ConvCase(), torch.float32, {}, memory_format=torch.contiguous_format)
    before = torch.get_rng_state()
    problem.run("int8")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", ["exact", "recompute"])
def test_not_a_number_and_infinity_pass_as_through_relu(
    save: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """One channel and unit factors: the op is ReLU itself."""
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, -1.0, 1e-5, -1e-5]
    x = torch.tensor(special, dtype=dtype).repeat(len(special), 1).view(1, 1, len(special), -1)
    dy = x.mT.contiguous(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    one = torch.ones(1, dtype=dtype)
    results = []
    s = torch.ones(1, requires_grad=True, dtype=dtype)
    for function in (
        torch.relu,
        lambda t: functional.svf_conv2d(t, one.view(1, 1, 1, 1), s, one.view(1, 1), activation="relu", save=save),
    ):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        y.backward(dy)
        assert leaf.grad is not None
        results.append((y.detach(), leaf.grad))
    for name, ours, relus in (("y", results[1][0], results[0][0]), ("dx", results[1][1], results[0][1])):
        assert torch.equal(ours.isnan(), relus.isnan()), name
        assert torch.equal(ours.nan_to_num(nan=7.0), relus.nan_to_num(nan=7.0)), name


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_half_precision_ds_does_not_overflow(layout: torch.memory_format, save: str) -> None:
    """z and g are far inside float16's range, their product is not: it belongs into float32 (a scaled loss does this)."""
    generator = torch.Generator().manual_seed(0)
    x = (50 * torch.randn(2, 8, 9, 9, generator=generator)).half().contiguous(memory_format=layout)
    dy = (2000 * torch.randn(2, 8, 9, 9, generator=generator)).half().contiguous(memory_format=layout)
    eye = torch.eye(8, dtype=torch.float16)
    problem = Problem(x, eye.view(8, 8, 1, 1), torch.ones(8), eye, dy)
    out = problem.run(save)
    assert out["ds"].isfinite().all()
    # the noise of int8 averages out only over more pixels, with a gradient that has a direction
    tolerance = {"ds": 0.05} if save == "int8" else None
    assert_close({"ds": out["ds"]}, {"ds": problem.reference()["ds"]}, torch.float16, tolerance=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_half_precision_ds_does_not_underflow(layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (1e-3 * torch.randn(2, 8, 9, 9, generator=generator)).half().contiguous(memory_format=layout)
    dy = (1e-5 * torch.randn(2, 8, 9, 9, generator=generator)).half().contiguous(memory_format=layout)
    eye = torch.eye(8, dtype=torch.float16)
    problem = Problem(x, eye.view(8, 8, 1, 1), torch.ones(8), eye, dy)
    assert_close({"ds": problem.run()["ds"]}, {"ds": problem.reference()["ds"]}, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """The self-scaling tolerance: 2× the error of the plain composition in the same precision, 3× for gradients."""
    problem = make_problem(LARGE, dtype, EXTRAS[5], memory_format=layout)
    ours, plain = problem.run(), problem.run(function=reference.svf_conv2d)
    expected, expected_plain = problem.reference(ours["y"]), problem.reference(plain["y"])
    for name in ours:
        factor = 2 if name == "y" else 3
        assert error_ratio(ours[name], expected[name]) <= factor * error_ratio(plain[name], expected_plain[name]), name


def test_low_precision_parameters_get_low_precision_gradients() -> None:
    problem = make_problem(ConvCase(), torch.bfloat16, EXTRAS[5], memory_format=torch.contiguous_format)
    problem.s = problem.s.bfloat16()
    assert problem.run()["ds"].dtype == torch.bfloat16


def run_linear(x: Tensor, v: Tensor, s: Tensor, u: Tensor, bias: Tensor | None, **keywords: Any) -> dict[str, Tensor]:
    x, s = x.detach().requires_grad_(), s.detach().requires_grad_()
    if "save" in keywords:
        y = functional.svf_linear(x, v, s, u, bias=bias, **keywords)
    else:
        y = torch.nn.functional.linear(torch.nn.functional.linear(x, v) * s, u, bias)
        y = torch.relu(y) if keywords["activation"] else y
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights.to(y.dtype)).sum().backward()
    assert x.grad is not None
    assert s.grad is not None
    return {"y": y.detach(), "dx": x.grad, "ds": s.grad}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 10), (10,), (2, 3, 5, 10), (1, 10), (0, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear(dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool, activation: str | None) -> None:
    generator = torch.Generator().manual_seed(4)
    x, v, u = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in (shape, (6, 10), (5, 6)))
    s, bias = (
        torch.rand(6, generator=generator, dtype=torch.float64) + 0.5,
        torch.randn(5, generator=generator).double(),
    )
    x, v, s, u, bias = (t.to(dtype) for t in (x, v, s, u, bias))
    given = bias if has_bias else None
    double = bias.double() if has_bias else None
    expected = run_linear(x.double(), v.double(), s.double(), u.double(), double, activation=activation)
    for save in SAVES:
        out = run_linear(x, v, s, u, given, activation=activation, save=save)
        assert out["y"].shape == (*shape[:-1], 5)
        if save == "int8":
            out["ds"] = expected["ds"]
        assert_close(out, expected, dtype)


def test_linear_of_a_transposed_input() -> None:
    x = torch.randn(10, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    v, s, u = torch.randn(6, 10).double(), torch.rand(6).double() + 1, torch.randn(5, 6).double()
    out = run_linear(x, v, s, u, None, activation="relu", save="exact")
    assert_close(out, run_linear(x.contiguous(), v, s, u, None, activation="relu"), torch.float64)


@pytest.mark.parametrize("save", SAVES)
def test_batched_gradients_are_those_one_by_one(save: str) -> None:
    problem = make_problem(
        LARGE, torch.float32, {"residual": True, "activation": "relu"}, memory_format=torch.channels_last
    )
    inputs = [t.detach().requires_grad_() for t in (problem.x, problem.s, problem.residual) if t is not None]
    y = functional.svf_conv2d(
        inputs[0], problem.v, inputs[1], problem.u, residual=inputs[2], save=save, **problem.vectors, **problem.keywords
    )
    several = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, inputs, several, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(several):
        for found, expected in zip(batched, torch.autograd.grad(y, inputs, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("name", ["x", "s", "residual"])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused_and_never_silent(name: str, grad_mode: bool) -> None:
    problem = make_problem(LARGE, torch.float32, {"residual": True}, memory_format=torch.channels_last)
    tensors = {n: getattr(problem, n) for n in ("x", "v", "s", "u", "residual")}
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match="jvp"):
            functional.svf_conv2d(**tensors, **problem.vectors, **problem.keywords)
