"""The processes that share a run under ``torchrun``: who is which, and what they add up or agree on. One process alone
is the simplest case of it, so that nobody else has to ask. Knows no model and no data."""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")

# Longer than any validation takes: the others wait for the first process while it writes a checkpoint, and where one
# has more samples to look at.
_PATIENCE = timedelta(hours=2)
_ENDED = "another process of this run has ended"


class ProcessError(RuntimeError):
    """What ends a process beside the first one: its message is the only one that tells it."""


class PeerLost(RuntimeError):
    """This process cannot go on because another one does not, which says why itself."""


@dataclass(frozen=True)
class Processes:
    """This process's ``rank`` among ``size``."""

    rank: int = 0
    size: int = 1
    # gloo, for small facts on the CPU, whatever carries the gradients
    _control: Any = None

    @property
    def is_first(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``size``-th item: over all processes each item once."""
        return items[self.rank :: self.size]

    def rounds(self, items: Sequence[Item]) -> int:
        """How many items every process has in its share: so often all of them can be asked something in between."""
        return len(items) // self.size

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum over the processes; whole numbers stay exact."""
        if self.size == 1:
            return values
        summed = torch.from_numpy(np.array(values))
        with self.exchange():
            dist.all_reduce(summed, group=self._control)
        return np.asarray(summed.numpy())

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around what needs the other processes: PeerLost when one of them has ended meanwhile."""
        try:
            yield
        except dist.DistError as error:
            raise PeerLost(_ENDED) from error
        except RuntimeError as error:
            # gloo has no error class of its own
            if self.size > 1 and "gloo" in str(error):
                raise PeerLost(_ENDED) from error
            raise

    @contextmanager
    def signed(self, *kinds: type[BaseException]) -> Iterator[None]:
        """Errors of these ``kinds`` that another than the first process meets become ProcessErrors with its number."""
        try:
            yield
        except kinds as error:
            if self.is_first or isinstance(error, PeerLost):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ProcessError(f"process {self.rank} of {self.size}: {reason}") from error

    def any(self, fact: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.total(np.array([int(fact)]))[0]) if self.size > 1 else fact

    def agreed(self, work: Callable[[], Result], errors: tuple[type[Exception], ...]) -> Result:
        """What ``work`` returns, when it succeeds in every process. Otherwise the first process raises its own error or
        quotes another one's, for all of them, and the others a PeerLost."""
        if self.size == 1:
            return work()
        own: Exception | None = None
        try:
            result = work()
        except errors as error:
            own = error
        found: list[str | None] = [None] * self.size
        with self.exchange():
            dist.all_gather_object(found, None if own is None else str(own), group=self._control)
        failed = [(rank, message) for rank, message in enumerate(found) if message is not None]
        if not failed:
            return result
        if self.is_first and own is not None:
            raise own
        rank, message = failed[0]
        raise PeerLost(f"process {rank} of {self.size}: {message}") from own


ALONE = Processes()


def launched_size() -> int:
    """How many processes ``torchrun`` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def launched_rank() -> int:
    """This process's rank under ``torchrun``; 0 without it."""
    return int(os.environ["RANK"]) if launched_size() > 1 else 0


class Launched(NamedTuple):
    """This process's ``rank`` among the ``size`` that ``torchrun`` has started on this machine."""

    rank: int
    size: int


def launched_here() -> Launched | None:
    """None without ``torchrun``, or where it has started one process alone."""
    if launched_size() == 1:
        return None
    return Launched(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))


def joined(device: str) -> Processes:
    """The processes that ``torchrun`` has started, connected over NCCL for GPUs and gloo for ``cpu``; one process alone
    without it. All work of a process has one connection, which lasts until the process ends."""
    if launched_size() == 1:
        return ALONE
    return _connected("nccl" if device != "cpu" and torch.cuda.is_available() else "gloo")


@cache
def _connected(backend: str) -> Processes:
    # Once: a second connection under the same addresses finds what is left of the first.
    dist.init_process_group(backend, timeout=_PATIENCE)
    atexit.register(dist.destroy_process_group)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size(), control)
