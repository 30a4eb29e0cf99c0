"""Logs of runs that never were, for what collects and shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_log(
    folder: Path, *validations: tuple[int, float, float], steps: int = 400, reached: int | None = None
) -> Path:
    """A run of ``steps`` with validations (step, mIoU, FB-IoU); finished unless it ``reached`` a step only."""
    lines: list[dict[str, Any]] = [{"kind": "start", "iteration": 0, "iterations": steps}]
    lines += [{"kind": "validation", "iteration": step, "miou": miou, "fb_iou": fb} for step, miou, fb in validations]
    if reached is None:
        lines.append({"kind": "finished", "iteration": steps})
    else:
        lines.append({"kind": "step", "iteration": reached, "loss": 0.5, "step_ms": 100.0})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
