"""The kernels' tests run on a CUDA device where there is one, else through Triton's interpreter; without Triton they skip.
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

from device import CAN_RUN


@pytest.fixture(autouse=True)
def _kernels_can_run() -> None:
    if not CAN_RUN:
        pytest.skip(
            "needs Triton: a CUDA device, or its interpreter, which must be loaded before anything imports Triton"
        )


def poison(t: torch.Tensor) -> torch.Tensor:
    """`t` filled with NaN, or with what is conspicuous in an integer."""
    return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(85)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        stock: Callable[..., Any] = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _stock=stock, **k: poison(_stock(*a, **k)))


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
def in_triton() -> Iterator[Callable[[Any], Any]]:
    """`with in_triton(backend):` runs every svf_fast op in that TritonBackend, on CPU tensors too."""
    stock = backends._entries["triton"]

    @contextmanager
    def run(backend: Any) -> Iterator[None]:
        backends.register("triton", lambda: backend, lambda device: None)
        with svf_fast.backend("triton"):
            yield

    yield run
    backends.register("triton", *stock)
