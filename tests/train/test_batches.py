"""Streams of batches: the same whatever loads them, however often they are killed and resumed; and memory that is used again,
but never too early."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, current_thread

import numpy as np
import pytest
import torch
from torch import Tensor
from voc_folders import draw, write_folder

from svf_fast.train.batches import BATCHES_AHEAD, load_ahead, training_keys
from svf_fast.train.data.episodes import EpisodeBatch, EpisodeSampler, collate
from svf_fast.train.data.memory import BatchMemory, Recycler, SampleMemory, stacked
from svf_fast.train.data.transforms import Augmentation
from svf_fast.train.data.voc import VOCFolder

PICTURES, BATCH, STEPS = 9, 4, 7
CACHE_SIZES = {"no cache": 0, "three pictures": 3 * 4 * 80 * 100, "everything": 2**30}


def write_pictures(root: Path) -> Path:
    labels = {f"picture_{i}": draw(80, 100, [(1, i, 1, 46, 46), (2, 30 - i, 52, 46, 46)]) for i in range(PICTURES)}
    return write_folder(root, labels)


def sampler_of(root: Path, cache_bytes: int = 2**30) -> EpisodeSampler:
    split = VOCFolder(root).split("list.txt", (1, 2))
    return EpisodeSampler(split, 2, 33, 5, Augmentation(), base_classes=(1, 2), cache_bytes=cache_bytes)


def hash_of(batch: EpisodeBatch) -> str:
    """Of every tensor and every name."""
    digest = hashlib.sha256()
    for name, value in sorted(vars(batch).items()):
        for tensor in value if isinstance(value, tuple) else (value,):
            part = tensor.numpy().tobytes() if isinstance(tensor, Tensor) else str(tensor).encode()
            digest.update(name.encode() + part)
    return digest.hexdigest()


def hashes(sampler: EpisodeSampler, workers: int, start: int = 0, stop: int = STEPS) -> Iterator[str]:
    keys = training_keys(sampler, BATCH, seed=5, start=start, stop=stop)
    return map(hash_of, load_ahead(sampler.episode, collate, keys, workers=workers))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def expected(root: Path) -> list[str]:
    """Each episode made alone, stacked by PyTorch."""
    sampler = sampler_of(root, 0)
    batches = []
    for keys in training_keys(sampler, BATCH, seed=5, start=0, stop=STEPS):
        batch = collate([sampler.episode(*key) for key in keys])
        batches.append(hash_of(batch))
    assert len(set(batches)) == STEPS
    return batches


@pytest.mark.parametrize("cache", CACHE_SIZES)
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_workers_and_cache_change_nothing(root: Path, expected: list[str], workers: int, cache: str) -> None:
    assert list(hashes(sampler_of(root, CACHE_SIZES[cache]), workers)) == expected


@pytest.mark.parametrize("start", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_stream_goes_on_at_any_step(root: Path, expected: list[str], workers: int, start: int) -> None:
    sampler = sampler_of(root)
    # what was loaded ahead before the stop is lost, and nothing else
    stopped = hashes(sampler, workers, 0)
    assert [next(stopped) for _ in range(start)] == expected[:start]
    assert list(hashes(sampler, workers, start)) == expected[start:]


def test_a_sampler_sent_to_another_process_makes_the_same_stream(root: Path, expected: list[str]) -> None:
    sampler = sampler_of(root)
    sampler.episode(0, 0)
    assert list(hashes(pickle.loads(pickle.dumps(sampler)), 2)) == expected


def test_a_process_killed_in_the_middle_goes_on_with_the_same_stream(
    root: Path, expected: list[str], tmp_path: Path
) -> None:
    written = tmp_path / "hashes.txt"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        f"import test_batches; test_batches.stream({str(root)!r}, {str(written)!r})",
    ]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while not written.is_file() or written.read_text().count("\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    whole_lines = written.read_text().split("\n")[:-1]
    assert 3 <= len(whole_lines) < STEPS
    resumed = list(hashes(sampler_of(root), 4, len(whole_lines)))
    assert whole_lines + resumed == expected


def stream(root: str, written: str) -> None:
    """Writes a line a step; after the third slowly, so that there is something left to be killed."""
    with open(written, "w", encoding="utf-8") as file:
        for step, line in enumerate(hashes(sampler_of(Path(root)), workers=2)):
            file.write(line + "\n")
            file.flush()
            time.sleep(0.02 if step < 3 else 5)


def test_batches_that_are_kept_are_never_written_over(root: Path, expected: list[str]) -> None:
    sampler = sampler_of(root)
    keys = training_keys(sampler, BATCH, seed=5, start=0, stop=STEPS)
    assert [hash_of(batch) for batch in list(load_ahead(sampler.episode, collate, keys, workers=2))] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_not_copied_together_and_its_memory_is_used_again(root: Path, workers: int) -> None:
    sampler = sampler_of(root)
    keys = training_keys(sampler, BATCH, seed=5, start=0, stop=20)
    addresses = []
    for batch in load_ahead(sampler.episode, collate, keys, workers=workers):
        for tensor in (batch.query_images, batch.query_labels, batch.support_images, batch.support_labels):
            assert tensor.is_contiguous()
        addresses.append(batch.query_images.data_ptr())
    # those ahead, the one in use, the one that the loop variable holds until the next is there
    assert len(set(addresses)) <= (BATCHES_AHEAD + 3 if workers else 2)


def number(pass_index: int, index: int, memory: SampleMemory) -> int:
    return 100 * pass_index + index


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_in_any_size(workers: int) -> None:
    keys = [((0, 3),), ((0, 1), (1, 2), (0, 0)), ((2, 2), (0, 9))]
    assert list(load_ahead(number, tuple, keys, workers=workers)) == [(3,), (1, 102, 0), (202, 9)]
    assert list(load_ahead(number, tuple, [], workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_where_its_batch_is_due(workers: int) -> None:
    def load(pass_index: int, index: int, memory: SampleMemory) -> int:
        if index == 3:
            raise ValueError("picture 3 is damaged")
        return index

    batches = load_ahead(load, list, [((0, i), (0, i + 1)) for i in range(0, 8, 2)], workers=workers)
    assert next(batches) == [0, 1]
    with pytest.raises(ValueError, match="picture 3 is damaged"):
        next(batches)


def test_closing_the_iterator_ends_its_threads() -> None:
    threads = set()
    is_closing = Event()

    def load(pass_index: int, index: int, memory: SampleMemory) -> int:
        threads.add(current_thread())
        if index > 4:
            is_closing.wait(5)
        return index

    batches = load_ahead(load, list, [((0, i),) for i in range(100)], workers=2)
    assert next(batches) == [0]
    is_closing.set()
    batches.close()
    assert threads
    assert not any(thread.is_alive() for thread in threads)


def kept_view(tensor: Tensor) -> object:
    return tensor[1:]


def kept_for_backward(tensor: Tensor) -> object:
    return (torch.ones(1, requires_grad=True) * tensor).sum()


def kept_by_numpy(tensor: Tensor) -> object:
    return tensor.numpy()[::2]


@pytest.mark.parametrize("keep", [kept_view, kept_for_backward, kept_by_numpy], ids=lambda keep: keep.__name__)
def test_memory_is_used_again_only_when_nothing_refers_to_it(keep: Callable[[Tensor], object]) -> None:
    recycler = Recycler()
    first = recycler.empty((4, 25), torch.float32)
    address = first.data_ptr()
    kept = keep(first)
    del first
    assert recycler.empty((4, 25), torch.float32).data_ptr() != address
    del kept
    # of whatever shape and type, if it has as many bytes
    found = {recycler.empty((50,), torch.int64).data_ptr()}
    held = [recycler.empty((10, 10), torch.float32) for _ in range(2)]
    found |= {tensor.data_ptr() for tensor in held}
    assert address in found


def test_memory_of_a_recycler_that_is_gone_stays_valid() -> None:
    tensor = Recycler().empty((1000, 1000), torch.float32).fill_(7)
    others = [torch.empty(1000, 1000).fill_(1) for _ in range(4)]
    assert (tensor == 7).all()
    del others


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_stacking_gives_what_torch_gives_copied_or_not(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    memory = BatchMemory(Recycler(), 3)
    tensors = [memory.of_sample(n)("values", shape, dtype).fill_(n) for n in range(3)]
    together = stacked(tensors)
    assert torch.equal(together, torch.stack(tensors))
    assert together.data_ptr() == tensors[0].data_ptr()
    for others in (tensors[::-1], [tensors[0], tensors[2]], [tensors[0], tensors[1].clone()], [tensors[1]] * 2):
        assert torch.equal(stacked(others), torch.stack(others))


def test_tensors_that_lie_side_by_side_by_chance_are_stacked_by_their_values() -> None:
    whole = torch.arange(24.0).reshape(2, 12)
    strided = [whole[:, 0], whole[:, 2]]  # as far apart as each is long, but with gaps
    assert torch.equal(stacked(strided), torch.stack(strided))
    assert stacked(strided).is_contiguous()
    np.testing.assert_array_equal(stacked([whole[0], whole[1]]).numpy(), whole.numpy())
