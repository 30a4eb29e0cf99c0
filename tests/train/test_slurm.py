"""The SLURM example, with a scheduler and a launcher that only pretend: what is launched, and what becomes of the job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import svf_fast.train
from svf_fast.train.cli import main

SCRIPT = Path(svf_fast.train.__file__).resolve().parent / "slurm.sh"
# srun runs its command in its own place; scontrol notes what is asked of it; torchrun notes its arguments and is busy
SRUN = 'shift 2; exec "$@"'
SCONTROL = 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> asked; fi'
TORCHRUN = """printf '%s\\n' "$@" > launched.part; mv launched.part launched
trap 'exit 1' TERM
for _ in $(seq 200); do [ ! -e ends ] || exit "$(cat ends)"; sleep 0.02; done"""


@pytest.fixture
def job(tmp_path: Path) -> subprocess.Popen[bytes]:
    """The script at work in ``tmp_path``, once it has launched its processes."""
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment = {**os.environ, **slurm, "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", SCRIPT, "train", "pascal_bam_resnet50", "data.root=a folder"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    patience_s = time.monotonic() + 20
    while not (tmp_path / "launched").exists() and time.monotonic() < patience_s:
        time.sleep(0.01)
    return process


def test_the_script_is_sound() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_every_node_launches_a_process_for_each_gpu_with_the_users_command(
    tmp_path: Path, job: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "ends").write_text("0")
    assert job.wait(20) == 0
    launched = (tmp_path / "launched").read_text().splitlines()
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=node7:20041"} <= set(launched)
    command = launched[launched.index("-m") :]
    assert command == ["-m", "svf_fast.train", "train", "pascal_bam_resnet50", "data.root=a folder", "--resume"]
    # torchrun takes all of it
    assert get_args_parser().parse_args(launched).training_script == "svf_fast.train"


def test_a_job_whose_time_is_nearly_over_stops_its_run_and_queues_again(
    tmp_path: Path, job: subprocess.Popen[bytes]
) -> None:
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (tmp_path / "asked").read_text() == "requeue 41\n"


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_ends_by_itself_does_not_queue_again(
    tmp_path: Path, job: subprocess.Popen[bytes], status: int
) -> None:
    (tmp_path / "ends").write_text(str(status))
    assert job.wait(20) == status
    assert not (tmp_path / "asked").exists()


def test_the_options_of_svf_fast_that_it_names_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    for command in set(re.findall(r"slurm\.sh (\S+)", text)):
        assert main([command, "--help"]) == 0
        assert "--resume" in capsys.readouterr().out
    for name, arguments in re.findall(r"slurm\.sh train (\S+) (.*)", text):
        # with values that a key takes
        assert main(["config", name, *arguments.split()]) == 0
