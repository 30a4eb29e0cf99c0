"""COCO's instance files (`instances_train2014.json`) as checked tables: every picture with its regions, and the categories.

A file of 450 MB is packed while it is parsed: polygons become arrays of doubles, and what a label does not need is
dropped. Knows nothing of pictures on the disk and of how labels are drawn.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from svf_fast.train.data import VOID
from svf_fast.train.prepare.coco_labels import (
    Region,
    RunLengths,
    Segmentation,
    encloses_an_area,
    read_segmentation,
)
from svf_fast.train.prepare.problems import Problems

_LARGEST_SIDE = 65_500  # of a JPEG


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of an instance file, in pixels, and its regions in the order of the file."""

    image_id: int
    file_name: str
    height: int
    width: int
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Instances:
    """What an instance file says.

    `category_names` goes from the category id to its name, ascending; a region's value is the rank of its category there,
    from 1, or void. `pictures` are those with at least one annotation, a crowd included, in ascending image id; `left_out`
    counts those without. `degenerate` are the ids of annotations with a polygon of fewer than three points.
    """

    category_names: Mapping[int, str]
    pictures: tuple[Picture, ...]
    left_out: int
    degenerate: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Image:
    image_id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class _Annotation:
    annotation_id: int
    image_id: int
    category_id: int
    is_crowd: bool
    segmentation: Segmentation


@dataclass(frozen=True, slots=True)
class _Unusable:
    """What stands in the place of an image or annotation of another form: the sentence that says why."""

    reason: str


def read_instances(text: str, name: str, problems: Problems) -> Instances | None:
    """The tables of an instance file with the content `text`; `name` is for messages.

    A sentence is added to `problems` for everything that cannot be used: a file that is no JSON or has another layout,
    ids that are met twice or refer to nothing, sizes and file names that no picture can have, segmentations of another
    form or of another size than their picture. None if there was anything to add.
    """
    known_problems = len(problems)
    top = _parse(text, name, problems)
    if len(problems) > known_problems:
        return None
    categories = _categories(top["categories"], name, problems)
    images = _images(top["images"], name, problems)
    regions_of = _regions(top["annotations"], name, images, categories, problems)
    if len(problems) > known_problems:
        return None
    listed = [(images[image_id], regions) for image_id, regions in sorted(regions_of.items())]
    return Instances(
        category_names=categories,
        pictures=tuple(
            Picture(image.image_id, image.file_name, image.height, image.width, tuple(regions))
            for image, regions in listed
        ),
        left_out=len(images) - len(listed),
        degenerate=tuple(
            region.annotation_id for _, regions in listed for region in regions if _is_degenerate(region.segmentation)
        ),
    )


def _parse(text: str, name: str, problems: Problems) -> dict[str, Any]:
    """The object at the top of the file; its three lists are there unless a problem was added."""
    try:
        top = json.loads(text, object_hook=_pack)
    except json.JSONDecodeError as error:
        problems.add(
            f"{name} is no valid JSON at character {error.pos + 1} of {len(text)} ({error.msg}); is it complete?"
        )
        return {}
    except ValueError:
        problems.add(f"{name} holds a number of more digits than can be read")
        return {}
    except RecursionError:
        problems.add(f"{name} is nested too deeply for an instance file")
        return {}
    if not isinstance(top, dict):
        problems.add(f"{name} holds {_kind(top)}; expected an object with images, annotations and categories")
        return {}
    for key in ("categories", "images", "annotations"):
        if not isinstance(top.get(key), list) or not top[key]:
            problems.add(f"{name} has {_kind(top.get(key))} under {key!r}; expected a list that is not empty")
    return top


def _pack(found: dict[str, Any]) -> object:
    """An object of the file as soon as it is parsed, so that no two forms of the whole file are in memory at once."""
    try:
        if "segmentation" in found:
            return _annotation(found)
        if "file_name" in found:
            return _image(found)
    except ValueError as error:
        return _Unusable(str(error))
    return found


def _annotation(found: dict[str, Any]) -> _Annotation:
    annotation_id, image_id, category_id = (found.get(key) for key in ("id", "image_id", "category_id"))
    who = f"annotation {reprlib.repr(annotation_id)}"
    if type(annotation_id) is not int or type(image_id) is not int or type(category_id) is not int:
        raise ValueError(
            f"{who} has the image_id {reprlib.repr(image_id)} and the category_id {reprlib.repr(category_id)}; expected "
            f"whole numbers for all three"
        )
    is_crowd = found.get("iscrowd", 0)
    if is_crowd not in (0, 1):
        raise ValueError(f"{who} has iscrowd {reprlib.repr(is_crowd)}; expected 0 or 1")
    try:
        segmentation = read_segmentation(found["segmentation"])
    except ValueError as error:
        raise ValueError(f"{who} cannot be drawn: {error}") from None
    return _Annotation(annotation_id, image_id, category_id, bool(is_crowd), segmentation)


def _image(found: dict[str, Any]) -> _Image:
    image_id, file_name, height, width = (found.get(key) for key in ("id", "file_name", "height", "width"))
    if type(image_id) is not int:
        raise ValueError(
            f"image {reprlib.repr(file_name)} has the id {reprlib.repr(image_id)}; expected a whole number"
        )
    if not isinstance(file_name, str) or not _is_plain(file_name):
        raise ValueError(
            f"image {image_id} has the file name {reprlib.repr(file_name)}; expected a plain name ending in .jpg, "
            f"without folders and spaces"
        )
    if (
        type(height) is not int
        or type(width) is not int
        or not 0 < min(height, width) <= max(height, width) <= _LARGEST_SIDE
    ):
        raise ValueError(
            f"image {image_id} has the height {reprlib.repr(height)} and the width {reprlib.repr(width)}; expected whole "
            f"numbers of pixels from 1 to {_LARGEST_SIDE}"
        )
    return _Image(image_id, file_name, height, width)


def _categories(entries: list[Any], name: str, problems: Problems) -> dict[int, str]:
    """Category id → name, ascending."""
    names: dict[int, str] = {}
    for entry in entries:
        category_id, category = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(category_id) is not int or not isinstance(category, str) or len(category.splitlines()) != 1:
            problems.add(f"{name}: category {reprlib.repr(entry)} is of no use; expected an id and a name")
        elif category_id in names:
            problems.add(f"{name}: category id {category_id} is given twice ({names[category_id]}, {category})")
        else:
            names[category_id] = category
    if len(names) >= VOID:
        problems.add(f"{name} has {len(names)} categories; a label has room for {VOID - 1}")
    return dict(sorted(names.items()))


def _images(entries: list[Any], name: str, problems: Problems) -> dict[int, _Image]:
    images = list(_usable(entries, _Image, "images", "file_name", name, problems))
    problems.extend(_given_twice((image.image_id for image in images), "image id", name))
    problems.extend(_given_twice((image.file_name for image in images), "file name", name))
    return {image.image_id: image for image in images}


def _regions(
    entries: list[Any], name: str, images: Mapping[int, _Image], categories: Mapping[int, str], problems: Problems
) -> dict[int, list[Region]]:
    """Image id → regions, for every picture that has one."""
    annotations = list(_usable(entries, _Annotation, "annotations", "segmentation", name, problems))
    problems.extend(_given_twice((a.annotation_id for a in annotations), "annotation id", name))
    value_of = {category_id: rank for rank, category_id in enumerate(categories, start=1)}
    regions_of: dict[int, list[Region]] = {}
    for annotation in annotations:
        if problem := _contradiction(annotation, images, categories):
            problems.add(f"{name}: annotation {annotation.annotation_id} {problem}")
            continue
        value = VOID if annotation.is_crowd else value_of[annotation.category_id]
        region = Region(annotation.annotation_id, value, annotation.segmentation)
        regions_of.setdefault(annotation.image_id, []).append(region)
    return regions_of


def _contradiction(annotation: _Annotation, images: Mapping[int, _Image], categories: Mapping[int, str]) -> str | None:
    """What an annotation says that the images and categories of its file do not."""
    image, segmentation = images.get(annotation.image_id), annotation.segmentation
    if image is None:
        return f"is of the image {annotation.image_id}, which is not among the images"
    if annotation.category_id not in categories:
        return f"is of the category {annotation.category_id}, which is not among the categories"
    if isinstance(segmentation, RunLengths) and (segmentation.height, segmentation.width) != (
        image.height,
        image.width,
    ):
        return (
            f"has run lengths of {segmentation.width}x{segmentation.height} pixels (width x height), but "
            f"{image.file_name} is {image.width}x{image.height}"
        )
    return None


def _usable(entries: list[Any], kind: type[Any], what: str, key: str, name: str, problems: Problems) -> Iterator[Any]:
    """The entries of a list that were packed as `kind`."""
    for entry in entries:
        if isinstance(entry, kind):
            yield entry
        elif isinstance(entry, _Unusable):
            problems.add(f"{name}: {entry.reason}")
        else:
            problems.add(f"{name} has {reprlib.repr(entry)} among the {what}; expected an object with a {key}")


def _given_twice(values: Iterable[int | str], what: str, name: str) -> list[str]:
    counts = Counter(values)
    return [f"{name}: the {what} {value} is given {count} times" for value, count in counts.items() if count > 1]


def _is_degenerate(segmentation: Segmentation) -> bool:
    return not isinstance(segmentation, RunLengths) and not all(map(encloses_an_area, segmentation))


def _is_plain(file_name: str) -> bool:
    """Whether it can be a path's last part, stand in a list, where a space ends a path, and give its label a name."""
    return file_name.endswith(".jpg") and not set(file_name) & set("/\\:\0") and file_name.split() == [file_name]


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    return "an empty list" if value == [] else f"a value of type {type(value).__name__}"
