"""The processes that share a run under ``torchrun``: who is which, and what they add up or agree on. One process alone
is the simplest case of it, so that nobody else has to ask. Knows no model and no data."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")

# Longer than any validation takes: the others wait for the first process while it writes a checkpoint, and where one
# has more samples to look at.
_PATIENCE = timedelta(hours=2)


class PeerLost(RuntimeError):
    """Another process of the run is gone; its own message says why."""


@dataclass(frozen=True)
class Processes:
    """This process's ``rank`` among ``size``, and its number on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    # gloo, for small facts on the CPU, whatever carries the gradients
    _control: Any = None

    @property
    def is_first(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``size``-th item: over all processes each item once."""
        return items[self.rank :: self.size]

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum over the processes; whole numbers stay exact."""
        if self.size == 1:
            return values
        summed = torch.from_numpy(np.array(values))
        try:
            dist.all_reduce(summed, group=self._control)
        except RuntimeError as error:
            raise PeerLost("another process of this run has ended") from error
        return np.asarray(summed.numpy())

    def any(self, fact: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.total(np.array([int(fact)]))[0]) if self.size > 1 else fact

    def agreed(self, work: Callable[[], Result], errors: tuple[type[Exception], ...]) -> Result:
        """What ``work`` returns, when it succeeds in every process. Otherwise each process raises: its own error, or a
        PeerLost that quotes the first other one."""
        if self.size == 1:
            return work()
        own: Exception | None = None
        try:
            result = work()
        except errors as error:
            own = error
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, None if own is None else str(own), group=self._control)
        if own is not None:
            raise own
        failed = [(rank, message) for rank, message in enumerate(found) if message is not None]
        if failed:
            rank, message = failed[0]
            raise PeerLost(f"process {rank} of {self.size}: {message}")
        return result


ALONE = Processes()


def launched_size() -> int:
    """How many processes ``torchrun`` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def launched_rank() -> int:
    """This process's rank under ``torchrun``; 0 without it."""
    return int(os.environ["RANK"]) if launched_size() > 1 else 0


def launched_local_rank() -> int | None:
    """This process's number on its machine under ``torchrun``; None without it."""
    return int(os.environ["LOCAL_RANK"]) if launched_size() > 1 else None


@contextmanager
def joined(device_type: str) -> Iterator[Processes]:
    """The processes that ``torchrun`` has started, connected over NCCL for ``cuda`` and gloo for ``cpu``; one process
    alone without it."""
    if launched_size() == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), control)
    finally:
        dist.destroy_process_group()
