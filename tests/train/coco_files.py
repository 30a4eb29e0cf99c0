"""Small folders as COCO's archives unpack: made-up instance files and pictures of noise, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voc_folders import write_picture

from svf_fast.train.prepare.coco_categories import COCO_CATEGORIES

HEIGHT, WIDTH = 60, 80

Plain = dict[str, Any]


def rectangle(top: int, left: int, height: int, width: int) -> list[float]:
    """The polygon that covers exactly these pixels."""
    bottom, right = top + height, left + width
    return [left, top, right, top, right, bottom, left, bottom]


def region(annotation_id: int, category_id: int, segmentation: object, *, is_crowd: int = 0) -> Plain:
    """An annotation; `instance_file` adds its picture."""
    return {"id": annotation_id, "category_id": category_id, "segmentation": segmentation, "iscrowd": is_crowd}


def file_name(part: str, image_id: int) -> str:
    return f"COCO_{part}2014_{image_id:012d}.jpg"


def instance_file(
    part: str, regions_of: Mapping[int, Sequence[Plain]], categories: Mapping[int, str] = COCO_CATEGORIES
) -> Plain:
    """The content of an instance file: image id → regions, all pictures of one size."""
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": [
            {"id": image_id, "file_name": file_name(part, image_id), "height": HEIGHT, "width": WIDTH}
            for image_id in regions_of
        ],
        "annotations": [
            {**found, "image_id": image_id, "area": 1.0, "bbox": [0, 0, 1, 1]}
            for image_id, regions in regions_of.items()
            for found in regions
        ],
        "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in categories.items()],
    }


def write_coco(root: Path, content: Mapping[str, Plain]) -> Path:
    """`annotations/instances_{train,val}2014.json` and every picture that they list; returns the root."""
    (root / "annotations").mkdir(parents=True)
    for part, instances in content.items():
        (root / "annotations" / f"instances_{part}2014.json").write_text(json.dumps(instances))
        for image in instances["images"]:
            write_picture(root / f"{part}2014" / image["file_name"], image["height"], image["width"], image["id"])
    return root
