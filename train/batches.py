"""Which samples a run sees in which order, loaded ahead in threads. Order and content depend on seeds only, never on
the number of threads. Knows no model, and of a sample no more than its key."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from svf_fast.train.data.episodes import Episode

BATCHES_AHEAD = 2

SampleKey = tuple[int, int]  # (pass over the list, index in the list)
Sample = TypeVar("Sample")
Batch = TypeVar("Batch")


class TrainingSource(Protocol):
    """What the order of training needs of a source of samples: the same answers to the same arguments."""

    def __len__(self) -> int: ...

    def training_order(self, epoch: int, seed: int) -> list[int]: ...


class EpisodeSource(TrainingSource, Protocol):
    """What a run needs of an episode sampler: the same answers to the same arguments, from any thread."""

    def episode(self, pass_index: int, index: int) -> Episode: ...

    def validation_indices(self, count: int, seed: int) -> list[SampleKey]: ...


def training_keys(
    source: TrainingSource, batch: int, *, seed: int, start: int, stop: int
) -> Iterator[tuple[SampleKey, ...]]:
    """The samples of steps ``start`` … ``stop − 1``: each comes once an epoch, in an order that belongs to (seed,
    epoch); an incomplete last batch is dropped. The source must hold at least one batch."""
    per_epoch = len(source) // batch
    epoch, order = -1, list[int]()
    for iteration in range(start, stop):
        if iteration // per_epoch != epoch:
            epoch = iteration // per_epoch
            order = source.training_order(epoch, seed)
        first = (iteration % per_epoch) * batch
        yield tuple((epoch, index) for index in order[first : first + batch])


def load_ahead(
    load: Callable[[int, int], Sample],
    stack: Callable[[Sequence[Sample]], Batch],
    batches: Iterable[tuple[SampleKey, ...]],
    *,
    workers: int,
) -> Generator[Batch, None, None]:
    """The samples behind ``batches``, each loaded by its key, stacked, in order. ``workers`` threads stay a few batches
    ahead; with 0 nothing is loaded before it is asked for. Close the iterator to stop loading; an error is raised where
    its batch is due."""
    if workers == 0:
        for keys in batches:
            yield stack([load(*key) for key in keys])
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="samples")
    waiting: deque[list[Future[Sample]]] = deque()
    try:
        for keys in batches:
            waiting.append([pool.submit(load, *key) for key in keys])
            if len(waiting) > BATCHES_AHEAD:
                yield stack([future.result() for future in waiting.popleft()])
        while waiting:
            yield stack([future.result() for future in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)
