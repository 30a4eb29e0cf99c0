"""How a backend over kernels decides: what is on offer, the order of preference, and what happens where nothing may be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_cases import CASES, EXTRAS, ConvCase, make_problem
from device import DEVICE
from error_ratio import assert_close
from torch import Tensor
from ways import on_device

from svf_fast import functional
from svf_fast.backends import measured as measuring
from svf_fast.backends.by_ways import WaysBackend
from svf_fast.backends.kernel_set import KernelSet
from svf_fast.backends.measured import Measured
from svf_fast.backends.ways import COMPOSED, Key, Way, first_offer
from svf_fast.choice import Chooser

CASE = ConvCase(channels=(24, 32), kernel=(1, 1), padding=(0, 0))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVF_FAST_CACHE_DIR", str(tmp_path))


@pytest.fixture
def measured(kernels: KernelSet, within: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Ways are measured by a clock that favours the third that it is given; the runs it has timed."""
    timed: list[Any] = []

    def clock(way: Callable[[], object]) -> list[float]:
        timed.append(way())
        return [1.0 if len(timed) % 3 else 0.5]

    with within(WaysBackend(kernels, Measured(Chooser("a test", clock)))):
        yield timed


def run(save: str = "exact", case: ConvCase = CASE) -> dict[str, Any]:
    problem = make_problem(case, torch.float32, EXTRAS[5], memory_format=torch.channels_last)
    return on_device(problem, DEVICE).run(save)


def test_measured_once_for_each_shape(measured: list[Any]) -> None:
    run()
    count = len(measured)
    # forward and backward each have several ways
    assert count >= 6
    run()
    assert len(measured) == count
    run("int8")
    assert len(measured) > count


def test_a_new_process_measures_nothing_again(
    measured: list[Any], kernels: KernelSet, within: Callable[[Any], Any]
) -> None:
    run()

    def refuse(way: Callable[[], object]) -> list[float]:
        raise AssertionError("measured although the choice is on disk")

    with within(WaysBackend(kernels, Measured(Chooser("a test", refuse)))):
        run()


@pytest.mark.parametrize("why", ["deterministic", "captured"])
def test_a_fixed_choice_where_nothing_may_be_timed(
    why: str, kernels: KernelSet, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first offer that agrees; during capture, where nothing can be compared either, the plain composition."""
    if why == "captured":
        monkeypatch.setattr(measuring, "_is_capturing", lambda: True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    taken: list[Way] = []
    stock = WaysBackend.run_forward

    def watch(self: WaysBackend, way: Way, *arguments: Any) -> Any:
        taken.append(way)
        return stock(self, way, *arguments)

    monkeypatch.setattr(WaysBackend, "run_forward", watch)
    first, second = run(), run()
    assert measured == []
    assert all(torch.equal(first[k], second[k]) for k in first)
    # compared once: stock operations, the first offer, and that again for its result
    offered = "project" if kernels.name == "triton" else "fused"
    assert [way.path for way in taken] == (["composed"] * 2 if why == "captured" else ["composed", *[offered] * 3])


def test_a_choice_on_record_that_is_no_longer_on_offer_is_made_anew(measured: list[Any]) -> None:
    """Tiles of another version, say."""
    chooser = Chooser("a test", lambda way: [1.0])
    picks = Measured(chooser)
    key = Key("a test", "ieee")
    chooser._known[key] = "fused 1x1"
    assert picks(key, lambda: [Way("project")], lambda way: (torch.ones(3),)) == COMPOSED


def test_a_way_that_computes_something_else_is_never_taken(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that a device runs wrongly costs speed and a warning, not a result."""
    stock = WaysBackend.run_forward

    def wrong(self: WaysBackend, way: Way, *arguments: Any) -> Any:
        y, kept = stock(self, way, *arguments)
        if way.path in ("fused", "project"):
            y[0, 0] += y.max() / 4
        return y, kept

    monkeypatch.setattr(WaysBackend, "run_forward", wrong)
    problem = on_device(make_problem(CASE, torch.float32, EXTRAS[5], memory_format=torch.channels_last), DEVICE)
    with pytest.warns(UserWarning, match="differs from stock operations by .* and is not used"):
        out = problem.run()
    assert_close(out, problem.reference(out["y"]), torch.float32)


def test_a_search_that_names_other_winners_is_never_taken(
    measured: list[Any], kernels: KernelSet, within: Callable[[Any], Any]
) -> None:
    """Its largest cosines may be right: what gradients are sent to are the winners."""

    class Wrong:
        @staticmethod
        def max_cosine(*arguments: Any) -> tuple[Tensor, Tensor]:
            value, winner = kernels.cosine.max_cosine(*arguments)
            return value, (winner + 1) % 20

    query, support = (torch.randn(2, 16, 4, 5, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (0, 1))
    broken: Any = Wrong()
    picks = Measured(Chooser("another test", lambda way: [1.0]))
    backend = WaysBackend(replace(kernels, cosine=broken), picks)
    with pytest.warns(UserWarning, match="streamed differs from stock operations"):
        _, winner = backend.max_cosine(query, support, None, 1e-7)
    assert torch.equal(winner, kernels.cosine.max_cosine(query, support, None, 1e-7)[1])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("PassManager::run failed")], ids=str)
def test_a_way_that_cannot_run_is_left_out(
    error: Exception, measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For good where it does not compile; for this process alone where memory was short."""
    stock = WaysBackend.run_forward

    def fail(self: WaysBackend, way: Way, *arguments: Any) -> Any:
        if way.path == "fused":
            raise error
        return stock(self, way, *arguments)

    monkeypatch.setattr(WaysBackend, "run_forward", fail)
    problem = on_device(make_problem(CASE, torch.bfloat16, EXTRAS[5], memory_format=torch.channels_last), DEVICE)
    if isinstance(error, torch.OutOfMemoryError):
        problem.run()
    else:
        with pytest.warns(UserWarning, match=r"fused .* cannot run here \(RuntimeError: PassManager::run failed\)"):
            problem.run()
    (record,) = tmp_path.glob("choices-*.json")
    assert ("forward" in record.read_text(encoding="utf-8")) == (not isinstance(error, torch.OutOfMemoryError))


def test_nothing_is_decided_from_what_is_not_finite(measured: list[Any]) -> None:
    problem = on_device(make_problem(CASE, torch.float32, EXTRAS[5], memory_format=torch.channels_last), DEVICE)
    problem.x[0, 0, 0, 0] = float("inf")
    problem.run()
    assert measured == []


def test_what_is_on_offer(kernels: KernelSet) -> None:
    def paths(case: ConvCase, dtype: torch.dtype, save: str, layout: torch.memory_format) -> list[str]:
        seen: list[list[Way]] = []

        def pick(key: Any, offer: Callable[[], list[Way]], _: Any) -> Way:
            seen.append(offer())
            return COMPOSED

        from svf_fast.contract import Geometry, Layer

        problem = make_problem(case, dtype, {}, memory_format=layout)
        layer = Layer(problem.v, problem.s, problem.u, None, None, Geometry(groups=case.groups))
        WaysBackend(kernels, pick).forward(problem.x, layer, None, save, False, layout)
        return list(dict.fromkeys(way.path for way in seen[0]))

    last, first = torch.channels_last, torch.contiguous_format
    half, full = torch.bfloat16, torch.float32
    assert paths(CASE, half, "exact", last) == ["fused", "project", "epilogue"]
    # Triton's three products of one tile do not fit on the chip beside z
    is_triton = kernels.name == "triton"
    assert paths(CASE, full, "exact", last) == ["fused", "project", "epilogue"][is_triton:]
    assert paths(CASE, half, "input", last) == ["fused", "project", "epilogue", "merged"]
    # contiguous pictures and what the kernels do not take: stock operations first
    assert paths(CASE, half, "exact", first) == ["composed", "epilogue"]
    assert paths(CASE, torch.float64, "exact", last) == ["composed"]
    assert paths(CASES[10], full, "exact", last) == ["epilogue"]
    assert paths(ConvCase(channels=(300, 300), kernel=(1, 1), padding=(0, 0)), half, "exact", last)[0] == "project"


def test_compiled_and_captured_code_sees_one_op(kernels: KernelSet, within: Callable[[Any], Any]) -> None:
    """torch.compile traces the op through its fake kernel, int8's scales included, and runs the kernels inside it."""
    problem = on_device(make_problem(CASE, torch.float32, EXTRAS[5], memory_format=torch.channels_last), DEVICE)

    def step(x: Any, s: Any) -> Any:
        return functional.svf_conv2d(
            x, problem.v, s, problem.u, residual=problem.residual, **problem.vectors, **problem.keywords, save="int8"
        )

    with within(WaysBackend(kernels, first_offer)):
        results = []
        for form in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            x, s = problem.x.detach().clone().requires_grad_(), problem.s.detach().clone().requires_grad_()
            form(x, s).backward(problem.dy)
            results.append((x.grad, s.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        torch.library.opcheck(
            torch.ops.svf_fast.conv2d.default,
            (
                problem.x.detach().requires_grad_(), problem.v, problem.s.detach().requires_grad_(), problem.u, None, None,
                None, True, [1, 1], [0, 0], [1, 1], 1, "int8", True,
            ),
        )  # fmt: skip


class _Compiled:
    """Stands for a kernel that Triton has compiled."""

    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.launches.append((grid, arguments))


class _Kernel:
    """Stands for Triton's look-up: counts how often it is asked."""

    def __init__(self) -> None:
        self.fn, self.asked, self.launches = object(), 0, list[tuple[Any, ...]]()

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., _Compiled]:
        def find(*arguments: Any, **options: int) -> _Compiled:
            self.asked += 1
            self.launches.append((grid, arguments))
            return _Compiled(self.launches)

        return find


class _OnADevice:
    """What a launch reads of a tensor on a CUDA device."""

    is_cuda, dtype = True, torch.bfloat16

    def __init__(self, address: int = 0, device: int = 0) -> None:
        self._address, self._device = address, device

    def data_ptr(self) -> int:
        return self._address

    def get_device(self) -> int:
        return self._device


def test_a_kernel_is_looked_up_once_for_what_it_is_specialised_on(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("svf_fast.kernels.launch")
    monkeypatch.setattr(launch, "_compiled", {})
    kernel = _Kernel()
    usual: tuple[Any, ...] = ((3, 1, 1), (_OnADevice(), None), (5, (1, 2)), (True,), {"num_warps": 4})
    for _ in range(3):
        launch.launch(kernel, *usual)
    assert kernel.asked == 1
    assert [grid for grid, _ in kernel.launches] == [(3, 1, 1)] * 3
    assert {arguments[1:] for _, arguments in kernel.launches} == {(None, 5, (1, 2), True)}
    others = (
        (usual[0], (_OnADevice(8), None), *usual[2:]),
        (usual[0], (_OnADevice(device=1), None), *usual[2:]),
        (usual[0], (_OnADevice(), _OnADevice()), *usual[2:]),
        (*usual[:2], (6, (1, 2)), *usual[3:]),
        (*usual[:3], (False,), usual[4]),
        (*usual[:4], {"num_warps": 8}),
    )
    for number, other in enumerate(others, start=2):
        launch.launch(kernel, *other)
        assert kernel.asked == number
    monkeypatch.setattr(launch, "_MOST_REMEMBERED", len(launch._compiled))
    launch.launch(kernel, (1, 1, 1), usual[1], (7,), usual[3], usual[4])
    assert len(launch._compiled) == 1
