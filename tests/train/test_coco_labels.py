"""COCO's regions as label images: against expectations made by hand and against pycocotools' own masks."""

import math
import random

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, rectangle
from pycocotools import mask
from voc_folders import Rectangle, draw

from svf_fast.train.data import VOID
from svf_fast.train.prepare.coco_labels import Region, draw_label, read_segmentation

# of pycocotools' decoding, which only these tests use
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# one polygon that runs along the outer edge, over a bridge of no width, and back along the hole's
RING = [10, 10, 50, 10, 50, 50, 10, 50, 10, 10, 20, 20, 20, 40, 40, 40, 40, 20, 20, 20]


def run_lengths(drawn: np.ndarray) -> dict[str, object]:
    """As crowds stand in the instance files."""
    columns = drawn.ravel(order="F")
    edges = np.flatnonzero(np.diff(columns, prepend=0, append=0))
    return {"size": list(drawn.shape), "counts": np.diff(edges, prepend=0, append=columns.size).tolist()}


def text(drawn: np.ndarray) -> dict[str, object]:
    """The same, as pycocotools shortens it."""
    encoded = mask.encode(np.asfortranarray(drawn))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def label_of(*regions: tuple[int, int, object]) -> np.ndarray:
    """Of (annotation id, value, segmentation)."""
    return draw_label(HEIGHT, WIDTH, [Region(i, value, read_segmentation(found)) for i, value, found in regions])


HALF = draw(HEIGHT, WIDTH, [(1, 0, 0, HEIGHT, 40)])
DRAWN: dict[str, tuple[list[tuple[int, int, object]], list[Rectangle]]] = {
    "nothing": ([], []),
    "one rectangle": ([(1, 7, [rectangle(5, 10, 20, 30)])], [(7, 5, 10, 20, 30)]),
    "three sizes, the smallest on top": (
        [
            (1, 1, [rectangle(20, 20, 10, 10)]),
            (2, 2, [rectangle(0, 0, 60, 80)]),
            (3, 3, [rectangle(10, 10, 30, 30)]),
        ],
        [(2, 0, 0, 60, 80), (3, 10, 10, 30, 30), (1, 20, 20, 10, 10)],
    ),
    "equal areas, the higher id on top": (
        [(9, 1, [rectangle(0, 0, 20, 20)]), (8, 2, [rectangle(10, 10, 20, 20)])],
        [(2, 10, 10, 20, 20), (1, 0, 0, 20, 20)],
    ),
    "the area of the mask decides, not of what is outside the picture": (
        [(1, 1, [rectangle(-500, 0, 520, 20)]), (2, 2, [rectangle(10, 0, 30, 20)])],
        [(2, 10, 0, 30, 20), (1, 0, 0, 20, 20)],
    ),
    "partly outside on every side": ([(1, 4, [rectangle(-10, -10, 200, 200)])], [(4, 0, 0, HEIGHT, WIDTH)]),
    "outside": ([(1, 4, [rectangle(70, 90, 5, 5)])], []),
    "below a pixel": ([(1, 4, [[10.1, 10.1, 10.3, 10.1, 10.2, 10.3]])], []),
    "two points enclose nothing, nor are they a box": ([(1, 4, [[10, 10, 30, 30]])], []),
    "two points beside a polygon": (
        [(1, 4, [[10, 10, 30, 30], rectangle(0, 0, 9, 9), []])],
        [(4, 0, 0, 9, 9)],
    ),
    "two parts of one object": (
        [(1, 3, [rectangle(0, 0, 10, 10), rectangle(30, 30, 10, 10)])],
        [(3, 0, 0, 10, 10), (3, 30, 30, 10, 10)],
    ),
    "a polygon inside another is no hole": (
        [(1, 3, [rectangle(0, 0, 40, 40), rectangle(10, 10, 10, 10)])],
        [(3, 0, 0, 40, 40)],
    ),
    "a ring drawn in one line has a hole": ([(1, 3, [RING])], [(3, 10, 10, 40, 40), (0, 20, 20, 20, 20)]),
    "a crowd is void": ([(1, VOID, run_lengths(HALF))], [(VOID, 0, 0, HEIGHT, 40)]),
    "a crowd as text": ([(1, VOID, text(HALF))], [(VOID, 0, 0, HEIGHT, 40)]),
    "objects lie above a crowd, however large": (
        [(1, 5, [rectangle(0, 0, 60, 80)]), (2, VOID, run_lengths(HALF)), (3, 6, [rectangle(30, 30, 20, 20)])],
        [(5, 0, 0, 60, 80), (6, 30, 30, 20, 20)],
    ),
    "a crowd keeps what no object covers": (
        [(7, 6, [rectangle(30, 30, 20, 20)]), (1, VOID, text(HALF))],
        [(VOID, 0, 0, HEIGHT, 40), (6, 30, 30, 20, 20)],
    ),
    "an object as run lengths": ([(1, 6, text(HALF)), (2, 2, run_lengths(HALF))], [(2, 0, 0, HEIGHT, 40)]),
    "run lengths of nothing": ([(1, 6, {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]})], []),
    "run lengths of everything": (
        [(1, 6, {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]})],
        [(6, 0, 0, HEIGHT, WIDTH)],
    ),
}


@pytest.mark.parametrize("case", DRAWN)
def test_a_label_shows(case: str) -> None:
    regions, expected = DRAWN[case]
    label = label_of(*regions)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, draw(HEIGHT, WIDTH, expected))
    # the order of the file decides nothing
    np.testing.assert_array_equal(label_of(*reversed(regions)), label)


@pytest.mark.parametrize("seed", range(3))
def test_labels_equal_pycocotools_masks_painted_one_by_one(seed: int) -> None:
    chance = random.Random(seed)
    height, width = chance.randint(40, 300), chance.randint(40, 300)
    found: list[tuple[int, int, object]] = []
    for annotation_id in range(12):
        polygons = [_star(chance, height, width) for _ in range(chance.randint(1, 3))]
        drawn = mask.decode(mask.merge(mask.frPyObjects(polygons, height, width)))
        form = chance.choice([polygons, polygons, run_lengths(drawn), text(drawn)])
        found.append((annotation_id, VOID if annotation_id % 5 == 4 else annotation_id % 7 + 1, form))
    masks = []
    for annotation_id, value, form in found:
        if isinstance(form, list):
            drawn = mask.decode(mask.merge(mask.frPyObjects(form, height, width)))
        elif isinstance(form["counts"], list):
            drawn = mask.decode(mask.frPyObjects(form, height, width))
        else:
            drawn = mask.decode(form)
        masks.append((value != VOID, -int(drawn.sum()), annotation_id, value, drawn))
    expected = np.zeros((height, width), np.uint8)
    for _, _, _, value, drawn in sorted(masks, key=lambda entry: entry[:3]):
        expected[drawn == 1] = value
    regions = [Region(annotation_id, value, read_segmentation(form)) for annotation_id, value, form in found]
    np.testing.assert_array_equal(draw_label(height, width, regions), expected)


def _star(chance: random.Random, height: int, width: int) -> list[float]:
    """A jagged polygon with two decimals, as COCO's are, perhaps partly outside."""
    middle = chance.uniform(0, width), chance.uniform(0, height)
    polygon: list[float] = []
    for corner in range(chance.randint(3, 40)):
        radius, angle = chance.uniform(1, 60), corner / 40 * 2 * math.pi
        polygon += [round(middle[0] + radius * math.cos(angle), 2), round(middle[1] + radius * math.sin(angle), 2)]
    return polygon


REFUSED = {
    "no list": ("polygon", "segmentation is 'polygon'; expected a list of polygons"),
    "empty": ([], r"segmentation is \[\]; expected a list of polygons"),
    "numbers without a polygon": ([1, 2, 3, 4, 5, 6], "the polygon 1; expected a list of numbers"),
    "a word in a polygon": ([[1, 2, 3, 4, 5, "6"]], "expected a list of numbers"),
    "a truth value in a polygon": ([[1, 2, 3, 4, 5, True]], "expected a list of numbers"),
    "an odd number of numbers": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers; expected"),
    "no number": ([[1, 2, 3, 4, 5, math.nan]], "not finite"),
    "infinite": ([[1, 2, 3, 4, 5, math.inf]], "not finite"),
    "far away": ([[1, 2, 3, 4, 5, 10**400]], "farther out than 100000 pixels"),
    "no size": ({"counts": [1]}, r"size None; expected \[height, width\]"),
    "a size beyond any": ({"size": [10**20, 1], "counts": [10**20]}, r"expected \[height, width\], each 1 to 100000"),
    "three sides": ({"size": [1, 2, 3], "counts": [6]}, r"size \[1, 2, 3\]"),
    "no counts": ({"size": [2, 2]}, "run lengths are None; expected whole numbers"),
    "fractions": ({"size": [2, 2], "counts": [1.5, 2.5]}, "expected whole numbers"),
    "huge counts": ({"size": [2, 2], "counts": [10**30]}, "expected whole numbers"),
    "too few pixels": ({"size": [2, 2], "counts": [1, 2]}, "add up to 3 pixels; expected 4"),
    "negative": ({"size": [2, 2], "counts": [3, -2, 3]}, "with negative ones among them"),
    "text that stops in a number": ({"size": [2, 2], "counts": "4P"}, "expected whole numbers, or pycocotools' text"),
    "text of other characters": ({"size": [2, 2], "counts": "4 ü"}, "expected whole numbers, or pycocotools' text"),
    "text without an end": ({"size": [2, 2], "counts": "P" * 40 + "0"}, "expected whole numbers"),
    "empty text": ({"size": [2, 2], "counts": ""}, "expected whole numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_segmentations_are_refused_in_a_sentence(case: str) -> None:
    segmentation, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        read_segmentation(segmentation)
