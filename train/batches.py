"""Which episodes a run sees in which order, loaded ahead in threads. Order and content depend on seeds only, never on
the number of threads. Knows no model."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from svf_fast.train.data.episodes import Episode, EpisodeBatch, collate

BATCHES_AHEAD = 2

EpisodeKey = tuple[int, int]  # (pass over the list, index of the query image)


class EpisodeSource(Protocol):
    """What a run needs of an episode sampler: the same answers to the same arguments, from any thread."""

    def __len__(self) -> int: ...

    def episode(self, pass_index: int, index: int) -> Episode: ...

    def training_order(self, epoch: int, seed: int) -> list[int]: ...

    def validation_indices(self, count: int, seed: int) -> list[EpisodeKey]: ...


def training_keys(
    source: EpisodeSource, batch: int, *, seed: int, start: int, stop: int
) -> Iterator[tuple[EpisodeKey, ...]]:
    """The episodes of steps ``start`` … ``stop − 1``: each image is the query once an epoch, in an order that belongs
    to (seed, epoch); an incomplete last batch is dropped. The source must hold at least one batch."""
    per_epoch = len(source) // batch
    epoch, order = -1, list[int]()
    for iteration in range(start, stop):
        if iteration // per_epoch != epoch:
            epoch = iteration // per_epoch
            order = source.training_order(epoch, seed)
        first = (iteration % per_epoch) * batch
        yield tuple((epoch, index) for index in order[first : first + batch])


def load_ahead(
    source: EpisodeSource, batches: Iterable[tuple[EpisodeKey, ...]], *, workers: int
) -> Generator[EpisodeBatch, None, None]:
    """The episodes behind ``batches``, stacked, in order. ``workers`` threads stay a few batches ahead; with 0 nothing
    is loaded before it is asked for. Close the iterator to stop loading; an error is raised where its batch is due."""
    if workers == 0:
        for keys in batches:
            yield collate([source.episode(*key) for key in keys])
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="episodes")
    waiting: deque[list[Future[Episode]]] = deque()
    try:
        for keys in batches:
            waiting.append([pool.submit(source.episode, *key) for key in keys])
            if len(waiting) > BATCHES_AHEAD:
                yield collate([future.result() for future in waiting.popleft()])
        while waiting:
            yield collate([future.result() for future in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)
