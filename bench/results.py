"""Writing a benchmark's result so that it can be traced: machine, versions, commit, seed and settings beside the figures."""

from __future__ import annotations

import argparse
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from svf_fast.train.provenance import describe_machine


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="also write the figures as JSON into DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def write(folder: Path | None, name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes `folder/name.json`, whole or not at all; nothing when `folder` is None."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": settings,
        "rows": rows,
    }
    temporary = folder / f"{name}.json.part"
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, folder / f"{name}.json")
    print(f"written: {folder / (name + '.json')}")
