"""One thread for every test of the library, and the implementation that a file asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from implementations import running_on


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The one that `parametrize("implementation", IMPLEMENTATIONS, indirect=True)` names, else what `auto` picks."""
    name = getattr(request, "param", None)
    with nullcontext() if name is None else running_on(name):
        yield
