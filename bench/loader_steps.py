"""Where the time of `loader.py` goes: every step of an episode's picture timed alone, over the pictures of a split. Knows nothing of
episodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np

from svf_fast.train.data import transforms
from svf_fast.train.data.chance import generator_of
from svf_fast.train.data.reading import read_image, read_label
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Augmentation, Label, Picture, Placed

_PICTURES = 24
_FACTOR = 1.05
_DEGREES = 5.0


def time_steps(split: Split, size: int) -> list[dict[str, Any]]:
    """Median milliseconds of processor time, and the share of pictures that take the step in training (in the test, for `fit`)."""
    entries = split.entries[:_PICTURES]
    images, labels = ([split.root / getattr(entry, kind) for entry in entries] for kind in ("image", "label"))
    decoded = [(read_image(image), read_label(label)) for image, label in zip(images, labels, strict=True)]
    pairs = [(image.astype(np.float32), label) for image, label in decoded]
    scaled = [transforms.scale(*pair, _FACTOR) for pair in pairs]
    planes = np.empty((3, size, size), np.float32)
    wide_label = np.empty((size, size), np.int64)
    values = np.arange(256, dtype=np.uint8)
    source = generator_of("benchmark of the steps")

    def cropped(pair: tuple[Picture, Label]) -> tuple[Placed, Label]:
        return transforms.crop(*pair, size, source)

    crops = [cropped(pair) for pair in scaled]
    ranges = Augmentation()

    def write_label(pair: tuple[Picture, Label]) -> None:
        wide_label[...] = cv2.LUT(pair[1], values)

    steps: list[tuple[str, float, Callable[[Any], object], Sequence[Any]]] = [
        ("read and decode the picture", 1.0, read_image, images),
        ("read and decode the label", 1.0, read_label, labels),
        ("exchange the label's values", 1.0, lambda pair: cv2.LUT(pair[1], values), decoded),
        ("to float32", 1.0, lambda pair: pair[0].astype(np.float32), decoded),
        ("scale", 1.0, lambda pair: transforms.scale(*pair, _FACTOR), pairs),
        ("rotate", ranges.rotation_probability, lambda pair: transforms.rotate(*pair, _DEGREES), scaled),
        ("blur", ranges.blur_probability, lambda pair: transforms.blur(pair[0]), scaled),
        ("flip", ranges.flip_probability, lambda pair: [transforms.flip(array) for array in pair], scaled),
        ("crop", 1.0, cropped, scaled),
        ("normalise into the batch", 1.0, lambda pair: transforms.normalise(pair[0], planes), crops),
        ("label into the batch", 1.0, write_label, crops),
        ("fit (test, instead of these)", 1.0, lambda pair: transforms.fit(*pair, size), pairs),
    ]
    return [
        {"step": name, "share": share, "ms": _milliseconds(step, subjects)} for name, share, step, subjects in steps
    ]


def _milliseconds(step: Callable[[Any], object], subjects: Sequence[Any], rounds: int = 5) -> float:
    """Of one call, from the median of all but the first round."""
    taken: list[float] = []
    for round_number in range(rounds + 1):
        for subject in subjects:
            call = partial(step, subject)
            start = time.thread_time()
            call()
            if round_number:
                taken.append(time.thread_time() - start)
    return 1e3 * statistics.median(taken)
