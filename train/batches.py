"""Which samples a run sees in which order, loaded ahead in threads. Order and content depend on seeds only, never on
the number of threads. Knows no model, and of a sample no more than its key."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from svf_fast.train.data.episodes import Episode, Order
from svf_fast.train.data.memory import BatchMemory, Recycler, SampleMemory, keep_freed_memory

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

    def episode(self, pass_index: int, index: int, memory: SampleMemory, /) -> Episode: ...

    def validation_indices(self, count: int, seed: int, order: Order) -> list[SampleKey]: ...


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


def in_batches(keys: Sequence[SampleKey], batch: int) -> list[tuple[SampleKey, ...]]:
    """``keys`` in order, ``batch`` at a time; the last batch may be smaller."""
    return [tuple(keys[start : start + batch]) for start in range(0, len(keys), batch)]


def load_ahead(
    load: Callable[[int, int, SampleMemory], Sample],
    stack: Callable[[Sequence[Sample]], Batch],
    batches: Iterable[tuple[SampleKey, ...]],
    *,
    workers: int,
) -> Generator[Batch, None, None]:
    """The samples behind ``batches``, each loaded by its key into the batch's memory, stacked, in order. ``workers``
    threads stay a few batches ahead; with 0 nothing is loaded before it is asked for. Close the iterator to stop loading;
    an error is raised where its batch is due.

    A batch's memory is used again once nothing refers to the batch or to a tensor of it: a copy that goes on in the
    background must be over by then."""
    keep_freed_memory()
    recycler = Recycler()
    if workers == 0:
        for keys in batches:
            memory = BatchMemory(recycler, len(keys))
            yield stack([load(*key, memory.of_sample(position)) for position, key in enumerate(keys)])
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="samples")

    def stack_when_loaded(samples: list[Future[Sample]]) -> Batch:
        # the pool starts jobs in order: these are loaded, or in the hands of other threads
        return stack([sample.result() for sample in samples])

    waiting: deque[Future[Batch]] = deque()
    try:
        for keys in batches:
            memory = BatchMemory(recycler, len(keys))
            samples = [pool.submit(load, *key, memory.of_sample(position)) for position, key in enumerate(keys)]
            waiting.append(pool.submit(stack_when_loaded, samples))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
