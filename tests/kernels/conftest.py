"""Each test of the kernels runs with every set of them: on a CUDA device where there is one, else interpreted or emulated.
Fresh tensors hold NaN, so that what a kernel forgets to write shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import svf_fast
from svf_fast import backends

sys.path.append(str(Path(__file__).parent.parent / "library"))

from device import SETS, kernel_set, why_missing
from poison import poison_fresh_tensors

from svf_fast.backends.kernel_set import KernelSet


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    """One set of kernels after the other; skips where one cannot run."""
    reason = why_missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    return kernel_set(request.param)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_fresh_tensors(monkeypatch)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """TF32 only where a test asks for it."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.fixture
def within() -> Iterator[Callable[[Any], Any]]:
    """`with within(backend):` runs every svf_fast op in that backend, on CPU tensors too."""
    stock = backends._entries["triton"]

    @contextmanager
    def run(backend: Any) -> Iterator[None]:
        backends.register("triton", lambda device: backend, lambda device: None)
        with svf_fast.backend("triton"):
            yield

    yield run
    backends.register("triton", *stock)
