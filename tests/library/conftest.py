"""One thread for every test of the library, and the largest error ratios at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from error_ratio import LARGEST


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not LARGEST:
        return
    terminalreporter.section("largest error ratios against float64")
    for (dtype, name), ratio in sorted(LARGEST.items()):
        terminalreporter.write_line(f"{dtype:<9} {name:<22} {ratio:.2e}")
