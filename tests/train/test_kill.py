"""A run that is killed with -9 again and again, also while it writes a checkpoint, and resumed: the same end to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from run_fakes import QUIET, TINY, write_voc_folder

from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.config import load_config
from svf_fast.train.engine import BEST, LAST, LOG
from svf_fast.train.journal import read_journal
from svf_fast.train.runs import train

MEASURED = ("step_ms", "seconds", "peak_memory_mb")


def told(folder: Path) -> list[dict[str, object]]:
    lines = [line for line in read_journal(folder / LOG) if line["kind"] != "start"]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    root = write_voc_folder(tmp_path / "data")
    long = ("schedule.iterations=60", "validation.every_iterations=20", "run.checkpoint_every=1", "run.device=cpu")
    settings = [*TINY, *long, f"data.root={root}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(load_config("voc_folder", [*settings, f"run.dir={whole}"]), resume=False, console=QUIET)
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), "train", "voc_folder", *settings, f"run.dir={killed}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    *deaths, end = done.stdout.splitlines()
    assert end == "finished", done.stderr
    assert len(deaths) == 10
    assert all(death.startswith("killed") for death in deaths), deaths
    assert sum(death.endswith("while it wrote") for death in deaths) >= 3, deaths
    for name in (LAST, BEST):
        found, expected = load_checkpoint(killed / name), load_checkpoint(whole / name)
        assert found.state == expected.state
        for key, tensor in expected.method.items():
            assert torch.equal(found.method[key], tensor), key
    assert told(killed) == told(whole)
