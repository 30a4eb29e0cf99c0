"""Episodes a second of the data loader, where its time goes, and how many cores feed one GPU; against the field's loader written
straightforwardly (`loader_reference.py`). The episodes of both are compared first: no speed-up is reported for other tensors.
Photographs are made up unless a folder in VOC layout is given. Interleaved in one run, so that ratios hold on a noisy machine; time
is processor time, so that what else the machine does is left out.

python -m svf_fast.bench.loader [--sizes 473 641] [--shots 1 5] [--rounds 7] [--data FOLDER --list LIST] [--step-ms MS] [--out DIR]"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch

from svf_fast.bench import results
from svf_fast.bench.loader_photos import CLASS_IDS, LIST_FILE, write_photos
from svf_fast.bench.loader_reference import ReferenceLoader
from svf_fast.bench.loader_steps import time_steps
from svf_fast.train.batches import BATCHES_AHEAD, SampleKey, load_ahead, training_keys
from svf_fast.train.data.episodes import EpisodeSampler, collate
from svf_fast.train.data.memory import BatchMemory, Recycler
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Augmentation
from svf_fast.train.data.voc import VOCFolder

BATCH = 8
SEED = 321
PHOTOS = 48
# (height, width) of Pascal's pictures for its own size, of COCO's for COCO's
PHOTO_SIZES = {473: (375, 500), 641: (480, 640)}
TRANSFORMS = {"training": Augmentation(), "test": None}
CACHES = {"cold": 0, "warm": 2**40}
IMAGE_LIMIT = 1e-3
# bf16, layers 2-4 of ResNet-50 forward and backward in a CUDA graph on an H200 (results/device_suite_h200.json): 10.1 ms for 8
# pictures of 473, 5.4 ms for 2 of 641. Stem, layer 1, prior and head come on top, so a real step is longer and needs fewer cores.
STEP_MS_PER_PICTURE = {473: 10.1 / 8, 641: 5.4 / 2}


class Setting(NamedTuple):
    size: int
    shots: int
    transforms: str

    def __str__(self) -> str:
        return f"{self.size}, {self.shots}-shot, {self.transforms} transforms"


def require_equal(setting: Setting, split: Split, episodes: int = 6) -> float:
    """Largest difference of the images; ends the program where an image or a label is another than the field's loader makes."""
    sampler, reference = _loaders(setting, split, cache_bytes=CACHES["warm"])
    largest = 0.0
    for pass_index, index in itertools.product(range(2), range(min(episodes, len(split)))):
        ours = sampler.episode(pass_index, index)
        query_image, query_label, support_images, support_labels = reference.episode(pass_index, index)
        error = max(
            float((found - expected).abs().max())
            for found, expected in ((ours.query_image, query_image), (ours.support_images, support_images))
        )
        are_labels_equal = torch.equal(ours.query_label, query_label) and torch.equal(
            ours.support_labels, support_labels
        )
        if error > IMAGE_LIMIT or not are_labels_equal:
            raise SystemExit(
                f"episode {index} of pass {pass_index} ({setting}) is another than the field's loader makes: images differ by "
                f"{error:.1e}, labels are {'equal' if are_labels_equal else 'not equal'}; no speed is reported"
            )
        largest = max(largest, error)
    return largest


def time_setting(setting: Setting, split: Split, rounds: int, batches: int) -> dict[str, Any]:
    """Processor seconds of `batches` batches of each loader, in one thread, round by round; one round before is not counted."""
    sampler, reference = _loaders(setting, split, cache_bytes=0)
    streams: dict[str, Iterator[object]] = {"reference": map(reference.batch, _keys(sampler))}
    for name, cache_bytes in CACHES.items():
        sampler, _ = _loaders(setting, split, cache_bytes=cache_bytes)
        _meet_every_picture(sampler)
        streams[name] = load_ahead(sampler.episode, collate, _keys(sampler), workers=0)
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for round_number, (name, stream) in itertools.product(range(rounds + 1), streams.items()):
        start = time.process_time()
        _take(stream, batches)
        if round_number:
            seconds[name].append(time.process_time() - start)
    episodes = batches * BATCH
    return {
        "episodes_per_cpu_second": {name: episodes / statistics.median(taken) for name, taken in seconds.items()},
        "speed_up": {
            name: statistics.median(a / b for a, b in zip(seconds["reference"], seconds[name], strict=True))
            for name in CACHES
        },
        "cache_speed_up": statistics.median(a / b for a, b in zip(seconds["cold"], seconds["warm"], strict=True)),
        "seconds": seconds,
    }


def time_workers(setting: Setting, split: Split, rounds: int, batches: int) -> dict[str, float]:
    """Episodes a second on the wall clock by number of worker threads, from the median round; the cache is warm."""
    sampler, _ = _loaders(setting, split, cache_bytes=CACHES["warm"])
    _meet_every_picture(sampler)
    seconds: dict[int, list[float]] = {count: [] for count in sorted({1, 2, os.cpu_count() or 1})}
    for _, count in itertools.product(range(rounds), seconds):
        with closing(load_ahead(sampler.episode, collate, _keys(sampler), workers=count)) as stream:
            _take(stream, 2 * BATCHES_AHEAD)  # nothing is left of what was loaded before the clock started
            start = time.perf_counter()
            _take(stream, batches)
            seconds[count].append(time.perf_counter() - start)
    return {str(count): batches * BATCH / statistics.median(taken) for count, taken in seconds.items()}


def scratch_bytes(setting: Setting, split: Split) -> int:
    """The most that one worker holds beside cache and batch while it makes an episode: NumPy's arrays, OpenCV's results among them."""
    sampler, _ = _loaders(setting, split, cache_bytes=CACHES["warm"])
    # memory of PyTorch, which is not counted here
    memory = BatchMemory(Recycler(), 1).of_sample(0)
    peak = 0
    for index in range(min(8, len(split))):
        sampler.episode(0, index, memory)
        tracemalloc.start()
        sampler.episode(0, index, memory)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return peak


def cores_for_one_gpu(episodes_per_second: float, step_ms: float) -> int:
    """Cores that make a batch in the time of a step."""
    return math.ceil(BATCH / (episodes_per_second * step_ms / 1e3))


def main() -> None:
    parser = results.arguments(__doc__ or "")
    parser.add_argument("--sizes", type=int, nargs="+", choices=tuple(PHOTO_SIZES), default=list(PHOTO_SIZES))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4, help="batches of 8 episodes a round")
    parser.add_argument(
        "--data", type=Path, default=None, help="a folder in VOC layout, in the place of made-up photographs"
    )
    parser.add_argument("--list", default="lists/train.txt", help="list file in that folder")
    parser.add_argument("--step-ms", type=float, default=None, help="a training step of 8 episodes on your GPU")
    options = parser.parse_args()
    # one core each: a worker's own thread does everything, as it does beside as many workers as cores
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes:
            split = _split(options, size, Path(scratch) / str(size))
            rows += [
                _measured(Setting(size, *rest), split, options) for rest in itertools.product(options.shots, TRANSFORMS)
            ]
            steps = time_steps(split, size)
            print(f"\nmilliseconds a picture at {size} (share of pictures that take the step)")
            for step in steps:
                print(f"  {step['step']:<32} {step['ms']:>7.2f}  {step['share']:>4.0%}")
            rows += [{"what": "step", "size": size, **step} for step in steps]
    settings = {"batch": BATCH, "rounds": options.rounds, "batches": options.batches}
    settings["data"] = "made up" if options.data is None else f"{options.data.name}, {options.list}"
    results.write(options.out, "loader", settings, rows)


def _measured(setting: Setting, split: Split, options: Any) -> dict[str, Any]:
    """Compares, measures and prints."""
    error = require_equal(setting, split)
    row: dict[str, Any] = {"what": "episodes", **setting._asdict(), "largest_difference": error}
    row |= time_setting(setting, split, options.rounds, options.batches)
    row["workers"] = time_workers(setting, split, options.rounds, options.batches)
    row["scratch_bytes"] = scratch_bytes(setting, split)
    row["step_ms"] = options.step_ms or BATCH * (1 + setting.shots) * STEP_MS_PER_PICTURE[setting.size]
    rates = row["episodes_per_cpu_second"]
    row["cores"] = {name: cores_for_one_gpu(rates[name], row["step_ms"]) for name in rates}
    print(f"\n{setting} (images within {error:.0e} of the field's loader, labels equal)")
    for name, rate in rates.items():
        faster = "" if name == "reference" else f"{row['speed_up'][name]:>6.2f} times the reference"
        print(f"  {name:<10} {rate:>7.1f} episodes a second and core {faster:<26} {row['cores'][name]:>3} cores a GPU")
    threads = ", ".join(f"{count}: {rate:.0f}" for count, rate in row["workers"].items())
    print(f"  episodes a second by workers: {threads}; scratch of a worker {row['scratch_bytes'] / 1e6:.1f} MB")
    print(
        f"  a step is taken to last {row['step_ms']:.1f} ms",
        "" if options.step_ms else "(estimate, see STEP_MS_PER_PICTURE)",
    )
    return row


def _split(options: Any, size: int, folder: Path) -> Split:
    if options.data is not None:
        given = VOCFolder(options.data)
        return given.split(options.list, given.classes)
    write_photos(folder, PHOTOS, *PHOTO_SIZES[size], options.seed)
    return VOCFolder(folder).split(LIST_FILE, CLASS_IDS)


def _loaders(setting: Setting, split: Split, *, cache_bytes: int) -> tuple[EpisodeSampler, ReferenceLoader]:
    augmentation = TRANSFORMS[setting.transforms]
    arguments = (split, setting.shots, setting.size, SEED, augmentation)
    return EpisodeSampler(*arguments, cache_bytes=cache_bytes), ReferenceLoader(*arguments)


def _meet_every_picture(sampler: EpisodeSampler) -> None:
    """Fills a cache that keeps anything; the files themselves are then in the system's own."""
    for index in range(len(sampler)):
        sampler.episode(0, index)


def _keys(sampler: EpisodeSampler) -> Iterator[tuple[SampleKey, ...]]:
    return training_keys(sampler, BATCH, seed=SEED, start=0, stop=sys.maxsize)


def _take(stream: Iterator[object], batches: int) -> None:
    for _ in range(batches):
        next(stream)


if __name__ == "__main__":
    main()
