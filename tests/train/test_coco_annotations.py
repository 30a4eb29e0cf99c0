"""COCO's instance files as tables, and the sentence for everything in them that cannot be used."""

import json
from collections.abc import Callable

import pytest
from coco_files import HEIGHT, WIDTH, Plain, file_name, instance_file, rectangle, region

from svf_fast.train.data import VOID
from svf_fast.train.prepare.coco_annotations import Instances, read_instances
from svf_fast.train.prepare.coco_categories import COCO_CATEGORIES
from svf_fast.train.prepare.problems import Problems

BOX = [rectangle(0, 0, 10, 10)]
CROWD = {"size": [HEIGHT, WIDTH], "counts": [10, HEIGHT * WIDTH - 10]}
THREE = {4: "four", 90: "ninety", 7: "seven"}


def small_file() -> Plain:
    """Pictures 30 (nothing on it), 12 and 5, three regions."""
    return instance_file(
        "val", {30: [], 12: [region(3, 7, BOX), region(1, 4, BOX)], 5: [region(2, 90, CROWD, is_crowd=1)]}, THREE
    )


def sentences_of(text: str) -> list[str]:
    problems = Problems()
    assert read_instances(text, "FILE", problems) is None
    with pytest.raises(ValueError, match="problem") as caught:
        problems.raise_all("FILE")
    return str(caught.value).split("\n  ")[1:]


def read(content: Plain) -> Instances:
    problems = Problems()
    instances = read_instances(json.dumps(content), "FILE", problems)
    problems.raise_all("a good file")
    assert instances is not None
    return instances


def test_pictures_with_an_annotation_are_listed_by_id_and_values_are_ranks() -> None:
    instances = read(small_file())
    assert instances.category_names == {4: "four", 7: "seven", 90: "ninety"}
    assert list(instances.category_names) == [4, 7, 90]
    assert [(picture.image_id, picture.file_name) for picture in instances.pictures] == [
        (5, file_name("val", 5)),
        (12, file_name("val", 12)),
    ]
    assert instances.left_out == 1
    assert {(picture.height, picture.width) for picture in instances.pictures} == {(HEIGHT, WIDTH)}
    assert [(r.annotation_id, r.value) for p in instances.pictures for r in p.regions] == [(2, VOID), (3, 2), (1, 1)]


def test_polygons_of_fewer_than_three_points_are_told() -> None:
    content = small_file()
    assert read(content).degenerate == ()
    _set("annotations", 1, "segmentation", [*BOX, [1, 2, 3, 4]])(content)
    assert read(content).degenerate == (1,)


def test_there_are_eighty_categories_with_gaps_in_their_ids() -> None:
    assert len(COCO_CATEGORIES) == 80
    assert list(COCO_CATEGORIES) == sorted(COCO_CATEGORIES)
    assert sorted(set(range(1, 91)) - set(COCO_CATEGORIES)) == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    ranks = dict(enumerate(COCO_CATEGORIES.values(), start=1))
    assert (ranks[1], ranks[12], ranks[57], ranks[80]) == ("person", "stop sign", "chair", "toothbrush")


def _set(table: str, row: int, key: str, value: object) -> Callable[[Plain], None]:
    return lambda content: content[table][row].__setitem__(key, value)


def _repeat(table: str) -> Callable[[Plain], None]:
    return lambda content: content[table].append(content[table][0])


DAMAGED: dict[str, tuple[Callable[[Plain], object], str]] = {
    "no images": (lambda c: c.pop("images"), "FILE has nothing under 'images'; expected a list"),
    "no annotations": (lambda c: c["annotations"].clear(), "FILE has an empty list under 'annotations'"),
    "categories of another kind": (
        lambda c: c.update(categories={}),
        "FILE has a value of type dict under 'categories'",
    ),
    "unknown image": (
        _set("annotations", 0, "image_id", 6),
        "FILE: annotation 3 is of the image 6, which is not among the images",
    ),
    "unknown category": (
        _set("annotations", 1, "category_id", 12),
        "FILE: annotation 1 is of the category 12, which is not among the categories",
    ),
    "annotation twice": (_repeat("annotations"), "FILE: the annotation id 3 is given 2 times"),
    "image twice": (_repeat("images"), "FILE: the image id 30 is given 2 times"),
    "file name twice": (
        _set("images", 0, "file_name", file_name("val", 5)),
        f"FILE: the file name {file_name('val', 5)} is given 2 times",
    ),
    "category twice": (_repeat("categories"), "FILE: category id 4 is given twice (four, four)"),
    "category without a name": (_set("categories", 0, "name", None), "FILE: category {'id': 4, 'name': None"),
    "a name of two lines": (_set("categories", 0, "name", "a\r2 b"), "expected an id and a name"),
    "a path": (
        _set("images", 2, "file_name", "../x.jpg"),
        "FILE: image 5 has the file name '../x.jpg'; expected a plain",
    ),
    "a path of Windows": (_set("images", 2, "file_name", "..\\x.jpg"), "expected a plain name ending in .jpg"),
    "a space": (_set("images", 2, "file_name", "a b.jpg"), "expected a plain name ending in .jpg"),
    "another ending": (_set("images", 2, "file_name", "a.JPG"), "expected a plain name ending in .jpg"),
    "no height": (
        _set("images", 2, "height", None),
        "FILE: image 5 has the height None and the width 80; expected whole",
    ),
    "no pixels": (_set("images", 2, "width", 0), "image 5 has the height 60 and the width 0"),
    "an id of another kind": (_set("images", 2, "id", "5"), "has the id '5'; expected a whole number"),
    "a truth value as id": (_set("annotations", 0, "image_id", True), "annotation 3 has the image_id True"),
    "an annotation without an id": (lambda c: c["annotations"][0].pop("id"), "annotation None has"),
    "crowd of another kind": (
        _set("annotations", 0, "iscrowd", 2),
        "FILE: annotation 3 has iscrowd 2; expected 0 or 1",
    ),
    "no segmentation": (lambda c: c["annotations"][0].pop("segmentation"), "among the annotations; expected an object"),
    "no file name": (
        lambda c: c["images"][0].pop("file_name"),
        "among the images; expected an object with a file_name",
    ),
    "a number among the images": (lambda c: c["images"].append(7), "FILE has 7 among the images"),
    "a polygon of seven numbers": (
        _set("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]),
        "FILE: annotation 3 cannot be drawn: it has a polygon of 7 numbers",
    ),
    "not a number": (_set("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, float("nan")]]), "not finite"),
    "run lengths of another size": (
        _set("annotations", 2, "segmentation", {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}),
        f"FILE: annotation 2 has run lengths of {HEIGHT}x{WIDTH} pixels (width x height), but {file_name('val', 5)} is",
    ),
    "more categories than label values": (
        lambda c: c["categories"].extend({"id": 100 + i, "name": str(i)} for i in range(252)),
        "FILE has 255 categories; a label has room for 254",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_used_gets_a_sentence(case: str) -> None:
    damage, sentence = DAMAGED[case]
    content = small_file()
    damage(content)
    assert any(sentence in found for found in sentences_of(json.dumps(content)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "FILE is no valid JSON at character 1 of 0 (Expecting value); is it complete?"),
        (json.dumps(small_file())[:500], "of 500 ("),
        ("[1]", "FILE holds a value of type list; expected an object with images, annotations and categories"),
        ("[" * 200_000, "FILE is nested too deeply"),
        (f"[{'9' * 5000}]", "FILE holds a number of more digits than can be read"),
    ],
    ids=["empty", "cut short", "list", "nested", "digits"],
)
def test_another_file_gets_one_sentence(text: str, sentence: str) -> None:
    (found,) = sentences_of(text)
    assert sentence in found


def test_all_problems_are_named_at_once() -> None:
    content = small_file()
    _set("annotations", 0, "iscrowd", 2)(content)
    _set("annotations", 1, "category_id", 12)(content)
    _set("categories", 2, "name", None)(content)
    _set("images", 0, "width", -1)(content)
    assert len(sentences_of(json.dumps(content))) == 4
