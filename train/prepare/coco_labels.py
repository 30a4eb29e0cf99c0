"""COCO's regions (polygons, run lengths) as one label image: reading a `segmentation`, rasterising, who lies on top.

Rule of a label: 0 is background; crowd regions are void (255) and lie below every instance, so that an object annotated by
itself keeps its pixels inside a crowd; instances are drawn in descending order of area, so that of two that overlap the
smaller is on top. The area is that of the rasterised mask, in pixels; of two equal ones the higher annotation id is on top.
Several polygons of an instance are united, none is a hole; one of fewer than three points encloses nothing. An instance that
covers no pixel does not show. Knows nothing of files, pictures and categories.
"""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from svf_fast.train.data import VOID
from svf_fast.train.data.reading import Bytes

# pycocotools keeps every fifth of a pixel along an edge in memory
_FARTHEST_COORDINATE = 100_000
_COORDINATES_OF_AN_AREA = 6
# pycocotools' text of run lengths: a character holds five bits of a number, the lowest first
_FIRST_CHARACTER = 48
_BITS, _LOW_BITS, _NEGATIVE, _MORE = 5, 0x1F, 0x10, 0x20
_MOST_CHARACTERS = 12

Polygons = tuple["array[float]", ...]  # each x, y, x, y, … in pixels; the region is their union


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A region as pixels outside, inside, outside, … down the columns of a picture, from left to right."""

    height: int
    width: int
    counts: NDArray[np.int64]


Segmentation = Polygons | RunLengths


@dataclass(frozen=True, slots=True)
class Region:
    """An annotated region of a picture and the label value of its pixels (void for a crowd)."""

    annotation_id: int
    value: int
    segmentation: Segmentation


def draw_label(height: int, width: int, regions: Iterable[Region]) -> Bytes:
    """The label of `regions`, uint8 [height, width], by the rule at the head of this file.

    Polygons are rasterised as `pycocotools.mask` does, cut at the picture's border; run lengths must be of this size.
    """
    drawn = [(region, _inside_and_outside(region.segmentation, height, width)) for region in regions]
    drawn.sort(key=lambda pair: (pair[0].value != VOID, -int(pair[1][1::2].sum()), pair[0].annotation_id))
    columns = np.zeros(width * height, np.uint8)
    for region, counts in drawn:
        edges = np.cumsum(counts).tolist()
        # an odd number of edges ends with the pixels outside
        for start, end in zip(edges[0::2], edges[1::2], strict=False):
            columns[start:end] = region.value
    return np.ascontiguousarray(columns.reshape(width, height).T)


def read_segmentation(value: object) -> Segmentation:
    """The `segmentation` of an annotation: a list of polygons, or run lengths `{"size": [height, width], "counts": …}` as
    whole numbers or as pycocotools' text.

    Raises ValueError with a sentence that says what was found and what was expected.
    """
    if isinstance(value, dict):
        return _read_run_lengths(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"its segmentation is {reprlib.repr(value)}; expected a list of polygons, or run lengths")
    return tuple(_read_polygon(polygon) for polygon in value)


def encloses_an_area(polygon: Sequence[float]) -> bool:
    """Whether a polygon x, y, x, y, … has three points or more."""
    return len(polygon) >= _COORDINATES_OF_AN_AREA


def _read_polygon(value: object) -> array[float]:
    if not _is_list_of(value, int, float):
        raise ValueError(f"it has the polygon {reprlib.repr(value)}; expected a list of numbers")
    if len(value) % 2:
        raise ValueError(f"it has a polygon of {len(value)} numbers; expected an even number: x, y, x, y, …")
    # true of no NaN
    if not all(-_FARTHEST_COORDINATE <= number <= _FARTHEST_COORDINATE for number in value):
        raise ValueError(
            f"it has a polygon with a coordinate that is not finite or is farther out than {_FARTHEST_COORDINATE} pixels"
        )
    return array("d", value)


def _read_run_lengths(value: dict[str, object]) -> RunLengths:
    size, counts = value.get("size"), value.get("counts")
    if not _is_list_of(size, int) or len(size) != 2 or not all(0 < side <= _FARTHEST_COORDINATE for side in size):
        raise ValueError(
            f"its run lengths have the size {reprlib.repr(size)}; expected [height, width], each 1 to {_FARTHEST_COORDINATE}"
        )
    pixels = size[0] * size[1]
    numbers: NDArray[np.int64] | None = None
    if isinstance(counts, str):
        numbers = _numbers_of_text(counts.encode())
    elif _is_list_of(counts, int) and all(-pixels <= count <= pixels for count in counts):
        numbers = np.array(counts, np.int64)
    if numbers is None:
        raise ValueError(f"its run lengths are {reprlib.repr(counts)}; expected whole numbers, or pycocotools' text")
    if (numbers < 0).any() or numbers.sum() != pixels:
        raise ValueError(
            f"its run lengths add up to {numbers.sum()} pixels"
            f"{' with negative ones among them' if (numbers < 0).any() else ''}; expected {pixels} ({size[0]}x{size[1]})"
        )
    return RunLengths(size[0], size[1], numbers)


def _inside_and_outside(segmentation: Segmentation, height: int, width: int) -> NDArray[np.int64]:
    """Run lengths of a region in a picture, pixels outside first."""
    if isinstance(segmentation, RunLengths):
        return segmentation.counts
    from pycocotools import mask

    # pycocotools would take the four numbers of two points for a box
    polygons = [polygon for polygon in segmentation if encloses_an_area(polygon)]
    if not polygons:
        return np.array([height * width])
    text = mask.merge(mask.frPyObjects(polygons, height, width))["counts"]
    numbers = _numbers_of_text(text)
    assert numbers is not None, f"pycocotools wrote the run lengths {text!r}"
    return numbers


def _numbers_of_text(text: bytes) -> NDArray[np.int64] | None:
    """The run lengths in pycocotools' text form, None if it is not one.

    Painting runs is several times faster than pycocotools' decoding to one full mask a region. From the fourth on a
    number is written as its difference to the last but one.
    """
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - _FIRST_CHARACTER
    ends = np.flatnonzero(characters < _MORE) + 1
    if not ends.size or ends[-1] != characters.size or characters.min() < 0 or characters.max() >= 2 * _MORE:
        return None
    starts = np.concatenate(([0], ends[:-1]))
    lengths = ends - starts
    if lengths.max() > _MOST_CHARACTERS:
        return None
    places = np.arange(characters.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((characters & _LOW_BITS) << (_BITS * places), starts)
    numbers -= ((characters[ends - 1] & _NEGATIVE) != 0) * (1 << (_BITS * lengths))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _is_list_of(value: object, *types: type) -> TypeGuard[list[Any]]:
    """Whether `value` is a list of nothing but `types`; a truth value is no number."""
    return isinstance(value, list) and set(map(type, value)) <= set(types)
