"""Fresh tensors that hold NaN, so that what a kernel forgets to write shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def poison(t: torch.Tensor) -> torch.Tensor:
    """`t` filled with NaN, or with what is conspicuous in an integer."""
    return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(85)


def poison_fresh_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here to the end of the test."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        stock: Callable[..., Any] = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _stock=stock, **k: poison(_stock(*a, **k)))
