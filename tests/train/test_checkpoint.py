"""Checkpoints: whole or not at all on the disk, and one sentence for every file that is none."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import nn

from svf_fast.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunState,
    load_checkpoint,
    load_method_state,
    save_checkpoint,
)
from svf_fast.train.files import write_atomically


def checkpoint(iteration: int = 7, width: int = 4) -> Checkpoint:
    weight = torch.arange(width * 3, dtype=torch.float32).view(width, 3)
    return Checkpoint(
        config={"run": {"seed": 321}, "blocks": [1, 2], "none": None},
        state=RunState(iteration=iteration, validated=5, best_miou=0.25, best_iteration=5, validations_since_best=0),
        method={"weight": weight, "steps": torch.tensor(3)},
        optimiser={"state": {0: {"momentum_buffer": -weight}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save_checkpoint(checkpoint(), tmp_path / "last.pt")
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert (loaded.config, loaded.state) == (checkpoint().config, checkpoint().state)
    assert torch.equal(loaded.method["weight"], checkpoint().method["weight"])
    buffers = (point.optimiser["state"][0]["momentum_buffer"] for point in (loaded, checkpoint()))
    assert torch.equal(*buffers)
    assert files(tmp_path) == ["last.pt"]


def test_a_new_checkpoint_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save_checkpoint(checkpoint(iteration), tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt").state.iteration == 2


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_checkpoint(checkpoint(1), tmp_path / "last.pt")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync", fail), "replace": (Path, "replace", fail)}[failing])
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(checkpoint(2), tmp_path / "last.pt")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.pt").state.iteration == 1
    assert files(tmp_path) == ["last.pt"]


CUT_OFF = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import checkpoint
from svf_fast.train.checkpoint import save_checkpoint
path = Path(sys.argv[1])
save_checkpoint(checkpoint(1), path)
{before}
try:
    save_checkpoint(checkpoint(2, width=100_000), path)
except OSError as error:
    print(error)
"""
# a disk that takes no more, and a death in the middle of the file
NO_SPACE = (
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
)
KILLED = "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
@pytest.mark.parametrize(("before", "status"), [(NO_SPACE, 0), (KILLED, -9)])
def test_a_process_cut_off_while_writing_leaves_the_old_checkpoint(tmp_path: Path, before: str, status: int) -> None:
    path = tmp_path / "last.pt"
    code = CUT_OFF.format(before=before)
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr
    assert load_checkpoint(path).state.iteration == 1
    save_checkpoint(checkpoint(3), path)  # over whatever the dead process left
    assert load_checkpoint(path).state.iteration == 3
    assert files(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_told_so(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(checkpoint(width=1000), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"last\.pt is no readable checkpoint \(cut short") as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)


class Foreign:
    """Pickles as a call: loading it must not run anything."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch broken_in",)


def save_text(file: IO[bytes]) -> None:
    file.write(b"hello, this is no checkpoint at all\n" * 50)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (save_text, "is no readable checkpoint"),
        (lambda file: pickle.dump(Foreign(), file), "is no readable checkpoint"),
        (lambda file: torch.save(Foreign(), file), "is no readable checkpoint"),
        (
            lambda file: torch.save({"weight": torch.ones(2)}, file),
            "is a PyTorch file but not a checkpoint of svf-fast",
        ),
        (lambda file: torch.save(torch.ones(2), file), "is a PyTorch file but not a checkpoint of svf-fast"),
        (
            lambda file: torch.save({"format": "svf_fast checkpoint", "version": 99}, file),
            "has checkpoint layout 99, this version reads 1",
        ),
        (
            lambda file: torch.save({"format": "svf_fast checkpoint", "version": 1, "config": {}, "state": {}}, file),
            "is a checkpoint without method, optimiser",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, write: Callable[[IO[bytes]], object], sentence: str) -> None:
    path = tmp_path / "other.pt"
    write_atomically(path, write)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(path)
    assert not Path("broken_in").exists()


def test_a_missing_file_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last\.pt"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.pt does not hold the model that its own settings describe"):
        load_method_state(nn.Linear(3, 4), checkpoint(), tmp_path / "last.pt")
