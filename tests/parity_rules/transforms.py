"""Checks of the golden file ``data``: every transform of a picture and its label, and the evaluation's counts
(specification, sections 6.4-6.6, 7 and 10.3)."""

import random
import re
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from parity_rules.account import Account, GoldenError
from parity_rules.filling import stream
from parity_rules.inputs import make_photo
from svf_fast.train.data.transforms import (
    MEAN,
    STD,
    Augmentation,
    Label,
    Placed,
    augment,
    blur,
    crop,
    fit,
    normalise,
    rotate,
    scale,
)
from svf_fast.train.evaluation import count, prediction_at_original_size

# of section 10.4
IMAGE_LIMIT = 1e-3
COUNT_LIMIT = 3.0
RANGES = Augmentation()  # scale 0.9-1.1, rotation ±10°: those that the items were made with
CROPPED_HEIGHT = 60  # of the photo that ``crop_pad`` pads; the others have the evaluation's shape


class ScriptedOffsets:
    """A random source whose offsets are those of the file's note: the first pair once, then the second for ever."""

    def __init__(self, note: str) -> None:
        pairs = [(int(row), int(column)) for row, column in re.findall(r"\((\d+),\s*(\d+)\)", note)]
        if len(pairs) != 2:
            raise GoldenError(f"items/crop_pad/note is {note!r}, expected two pairs of offsets like (0,42)")
        self._offsets = self._draw(pairs)

    @staticmethod
    def _draw(pairs: list[tuple[int, int]]) -> Iterator[int]:
        yield from pairs[0]
        while True:
            yield from pairs[1]

    def random(self) -> float:
        raise AssertionError("cropping draws offsets only")

    def randint(self, a: int, b: int, /) -> int:
        return next(self._offsets)


def check_data(account: Account) -> Iterator[tuple[str, Callable[[], None]]]:
    """The items to check, one after the other."""
    account.describes_the_reference("cv2", "photo_seed", "size")
    for item in account.golden.settings.get("items", ()):
        yield item, lambda item=item: check_item(account, item)
    if "evaluation" in account.golden.settings:
        yield "evaluation", lambda: check_evaluation(account)


def check_item(account: Account, item: str) -> None:
    """A transformed photo, its label, and what was drawn for it."""
    settings = account.golden.settings
    size, seed, entry = settings["size"], settings["photo_seed"], settings["items"][item]
    height, width = settings["evaluation"]["shape"]
    image, label = make_photo(height, width, seed)
    path = f"items/{item}"
    match entry["op"]:
        case "Resize+ToTensor+Normalize":
            named = re.fullmatch(r"resize_(\d+)x(\d+)", item)
            if named is None:
                raise GoldenError(f"{path} is no name like resize_100x131, which would tell the photo's size")
            photo = make_photo(int(named[1]), int(named[2]), seed)
            image, label = normalised(*fit(*photo, size))
        case "RandScale":
            low, high = RANGES.scale_range
            image, label = scale(image, label, low + (high - low) * entry["u"])
            account.describes_the_reference(f"{path}/u")
        case "RandRotate":
            low, high = RANGES.rotation_range_degrees
            degrees = low + (high - low) * entry["u"][1]
            account.close(f"{path}/angle", degrees, 1e-9)
            image, label = rotate(image, label, degrees)
            account.describes_the_reference(f"{path}/u")
        case "RandomGaussianBlur":
            image = blur(image)
        case "Crop":
            photo = make_photo(CROPPED_HEIGHT, width, seed)
            planes, label = normalised(*crop(*photo, size, ScriptedOffsets(entry["note"])))
            image = planes.transpose(1, 2, 0) * STD + MEAN  # recorded before normalisation
            account.describes_the_reference(f"{path}/note")
        case "full training pipeline":
            source = random.Random(entry["python_random_seed"])
            image, label = normalised(*augment(image, label, size, RANGES, source))
            account.equal(f"{path}/next_random", source.random())
            account.describes_the_reference(f"{path}/python_random_seed")
        case unknown:
            raise GoldenError(f"{path}/op is {unknown!r}, which no rule is known for")
    account.describes_the_reference(f"{path}/op")
    recorded = settings["cv2"]
    how = (
        "" if major(recorded) == major(cv2.__version__) else f" with OpenCV {cv2.__version__}, recorded with {recorded}"
    )
    account.close(f"{item}/image", image, IMAGE_LIMIT, to="absolute", how=how)
    account.close(f"{item}/label", label, 0.0, to="absolute")
    account.equal(f"{path}/image_shape", list(image.shape))
    account.equal(f"{path}/label_shape", list(label.shape))


def normalised(placed: Placed, label: Label) -> tuple[np.ndarray, Label]:
    """The picture as float32 planes [3, S, S], and its label."""
    planes = np.empty((3, *label.shape), np.float32)
    normalise(placed, planes)
    return planes, label


def check_evaluation(account: Account) -> None:
    """Section 7's counts of logits that are smoothed noise."""
    settings = account.golden.settings
    size, seed = settings["size"], settings["photo_seed"]
    height, width = settings["evaluation"]["shape"]
    noise = torch.from_numpy(stream(f"{seed}|eval_logits", 1, 2, size, size)).float()
    logits = F.avg_pool2d(noise, 5, stride=1, padding=2)[0]
    _, label = make_photo(height, width, seed)
    original = torch.from_numpy(np.where(label == 2, np.uint8(0), label))
    prediction = prediction_at_original_size(logits, original)
    counts = count(prediction, original)
    account.equal("evaluation/shape", list(prediction.shape))
    for name in ("intersection", "union", "target"):
        account.close(f"evaluation/{name}", getattr(counts, name), COUNT_LIMIT, to="absolute")


def major(version: str) -> str:
    return version.partition(".")[0]
