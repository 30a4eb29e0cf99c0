"""A run that is killed with -9 again and again, also while it writes a checkpoint, and resumed: the same end to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from run_fakes import QUIET, TINY, require_same_ending, write_voc_folder

from svf_fast.train.config import load_config
from svf_fast.train.runs import train


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
    require_same_ending(killed, whole)
