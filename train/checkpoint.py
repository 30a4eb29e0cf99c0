"""One file that holds a run at one iteration: enough to go on bit for bit, and to evaluate without any other file.

There is no generator state in it: everything random in a run derives from (seed, iteration) and (seed, epoch, index),
so the iteration number is the whole state. Knows tensors by their names, not what they mean.
"""

import pickle
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from svf_fast.train.files import write_atomically

FORMAT = "svf_fast checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message is one sentence that names the file."""


@dataclass
class RunState:
    """How far a run is. ``iteration`` counts the steps taken, ``validated`` is the iteration of the last complete
    validation (a run stopped during one does it again)."""

    iteration: int = 0
    validated: int = 0
    best_miou: float | None = None
    best_iteration: int = 0
    validations_since_best: int = 0
    # which pictures the run trains and validates on (runs.py), so that a resumed one goes on with the same
    data: str = ""
    # of the fold that the run trains on; empty in files of older versions
    novel: tuple[int, ...] = ()
    base: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """``method`` is the method's whole state, frozen parameters included; ``config`` is plain data; ``scaler``, of fp16's
    losses, is empty without it."""

    config: dict[str, Any]
    state: RunState
    method: dict[str, Tensor]
    optimiser: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write ``path`` whole or not at all: a temporary file in the same folder, flushed to the disk, then renamed.

    OSError when it cannot be written; a file that was there before is then untouched.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": checkpoint.config,
        "state": asdict(checkpoint.state),
        "method": checkpoint.method,
        "optimiser": checkpoint.optimiser,
        "scaler": checkpoint.scaler,
    }
    write_atomically(Path(path), lambda file: _save(content, file))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. FileNotFoundError when there is none; CheckpointError when the file is cut short,
    is something else, or has a layout that this version does not know."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint (cut short, or of another kind): use another one of the run's folder"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a PyTorch file but not a checkpoint of svf-fast train")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has checkpoint layout {content.get('version')!r}, this version reads {VERSION}")
    content.setdefault("scaler", {})  # files of older versions have none
    missing = [part.name for part in fields(Checkpoint) if not isinstance(content.get(part.name), dict)]
    if missing:
        raise CheckpointError(f"{path} is a checkpoint without {', '.join(missing)}")
    return Checkpoint(
        config=content["config"],
        state=RunState(**content["state"]),
        method=content["method"],
        optimiser=content["optimiser"],
        scaler=content["scaler"],
    )


def load_method_state(method: nn.Module, checkpoint: Checkpoint, path: str | Path) -> None:
    """Fill ``method`` from a checkpoint, every tensor; CheckpointError when names or shapes differ. ``path`` is for the
    message."""
    try:
        method.load_state_dict(checkpoint.method)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the model that its own settings describe") from error


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # how PyTorch's zip writer reports a disk that took less than it gave
        raise OSError(f"writing the checkpoint failed: {str(error).splitlines()[0]}") from error
