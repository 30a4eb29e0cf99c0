"""For every test: one thread. The networks here are small, and two threads on two busy cores wait for each other. At the end of a
run, the largest error ratios that were measured."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

_from_workers: dict[str, float] = {}


def _measured() -> dict[str, float]:
    """Largest ratio by dtype and tensor, as error_ratio.py of this process has them."""
    module = sys.modules.get("error_ratio")
    return {f"{dtype:<9} {name:<22}": ratio for (dtype, name), ratio in module.LARGEST.items()} if module else {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    # a worker of pytest-xdist hands its ratios to the process that reports
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["largest"] = _measured()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for label, ratio in getattr(node, "workeroutput", {}).get("largest", {}).items():
        _from_workers[label] = max(_from_workers.get(label, 0.0), ratio)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest = {**_from_workers, **_measured()}
    if largest:
        terminalreporter.section("largest error ratios against float64")
        for label, ratio in sorted(largest.items()):
            terminalreporter.write_line(f"{label} {ratio:.2e}")
