"""Choosing among the ways on offer: those that agree with stock operations are timed on first use, and the fastest is remembered.
Knows ways and their results, no kernel."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from svf_fast.backends.ways import COMPOSED, Key, Results, Way
from svf_fast.bits import pack_nonzero
from svf_fast.choice import Chooser
from svf_fast.contract import dense_view

# Largest difference between two exact ways, relative to the result, by how they multiply: several times the rounding, and far
# below what a wrong index does. int8's levels may differ by one in 127.
_AGREEMENT = {"ieee": 3e-2, "tf32": 1e-2, "tf32x3": 1e-4}
_INT8_AGREEMENT = 3e-2
# Runs with results that are not finite after which stock operations are settled for.
_PATIENCE = 3
# Device cycles to wait, some milliseconds: longer than launching ten runs takes.
_HEAD_START = 8_000_000


class Measured:
    """The fastest way of each key as a Chooser finds it, of those whose results agree with the plain composition's.

    Under torch.use_deterministic_algorithms nothing is timed: the first offer that agrees, the same in every run. While a CUDA
    graph is captured nothing can be compiled or compared: shapes met there first take the plain composition. (Inside
    torch.compile the op is opaque, and its first run measures.)

    A way that raises one of `unfit` does not compile, or does not fit, on this device, and is left out.
    """

    def __init__(self, chooser: Chooser, unfit: tuple[type[Exception], ...] = (RuntimeError,)) -> None:
        self._chooser = chooser
        self._unfit = unfit
        # by whether algorithms have to be deterministic: two roundings of one sum are both right, but not the same
        self._ways: dict[bool, dict[Key, Way]] = {False: {}, True: {}}
        self._undecided: dict[Key, int] = {}

    def __call__(self, key: Key, offer: Callable[[], list[Way]], run: Callable[[Way], Results]) -> Way:
        is_fixed = torch.are_deterministic_algorithms_enabled()
        way = self._ways[is_fixed].get(key)
        if way is not None:
            return way
        by_name = {str(way): way for way in (*offer(), COMPOSED)}
        name = None if is_fixed else self._chooser.known(key)
        if name not in by_name:
            name = None if _is_capturing() else self._decide(key, by_name, run, is_fixed)
            if name is None:
                return COMPOSED
        self._ways[is_fixed][key] = by_name[name]
        return by_name[name]

    def _decide(self, key: Key, ways: dict[str, Way], run: Callable[[Way], Results], is_fixed: bool) -> str | None:
        """The name of the fastest, or when `is_fixed` the first, of the ways that agree with stock operations; None where nothing
        can be compared yet."""
        stock = str(COMPOSED)
        expected = _tensors(run(COMPOSED))
        if not all(t.isfinite().all() for t in expected if t.is_floating_point()):
            # decided another time, though not every time: some networks are never finite
            self._undecided[key] = self._undecided.get(key, 0) + 1
            return None if self._undecided[key] < _PATIENCE else stock
        is_lasting = True
        agreeing = {stock: partial(run, COMPOSED)}
        for name, way in ways.items():
            try:
                if way == COMPOSED or _agrees(key, way, _tensors(run(way)), expected):
                    if is_fixed:
                        return name
                    agreeing[name] = partial(run, way)
            except torch.OutOfMemoryError:
                # there may be room for it another day
                is_lasting = False
            except self._unfit as error:
                _warn(key, way, f"cannot run here ({type(error).__name__}: {str(error).splitlines()[0]})")
        return self._chooser.choose(key, agreeing, stock, is_lasting=is_lasting)


def _agrees(key: Key, way: Way, found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether the results of `way` are those expected, to rounding."""
    for result, reference in zip(found, expected, strict=True):
        limit = _INT8_AGREEMENT if reference.dtype == torch.int8 else _AGREEMENT[key.products]
        if reference.dtype == torch.int32:
            # winners of a max: among equals any may be named, and their cosines are beside them
            continue
        if result.shape != reference.shape or result.dtype != reference.dtype:
            difference = torch.inf
        elif reference.dtype == torch.uint8:
            # the mask of the y beside it, bit for bit: rounding may decide other signs than in `expected`
            difference = float((result != pack_nonzero(dense_view(found[0]))).any()) if reference.numel() else 0.0
        else:
            difference = max(_ratio(result.float() - reference, reference.float(), order) for order in (2.0, torch.inf))
        # NaN compares false
        if not difference <= limit:
            _warn(key, way, f"differs from stock operations by {difference:.1e}")
            return False
    return True


def _warn(key: Key, way: Way, what: str) -> None:
    warnings.warn(f"svf_fast: the kernel {way} {what} and is not used for {key}", stacklevel=2)


def _ratio(difference: Tensor, reference: Tensor, order: float) -> float:
    """‖difference‖ / ‖reference‖: of order 2 for what is wrong everywhere, of the largest elements for what is wrong in a few."""
    if difference.numel() == 0:
        return 0.0
    off, size = (float(torch.linalg.vector_norm(t, order)) for t in (difference, reference))
    return (off / size if size else torch.inf) if off else 0.0


def _tensors(results: Results) -> list[Tensor]:
    """The tensors of a forward's, projection's or backward's results."""
    return [t for part in results for t in ([part] if isinstance(part, Tensor) else part)]


def device_seconds(way: Callable[[], object]) -> list[float]:
    """Seconds of ten runs on the current CUDA device, after three that compile and warm up."""
    for _ in range(3):
        way()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    # all runs are queued before the first begins: time on the device is compared, not time to launch
    torch.cuda._sleep(_HEAD_START)
    marks[0].record()
    for mark in marks[1:]:
        way()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
