"""`svf-fast prepare coco` on made-up COCO folders with every tricky case, and the membership of folds at full size."""

import gzip
import io
import itertools
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, Plain, file_name, instance_file, rectangle, region, write_coco
from pycocotools import mask
from rich.console import Console
from voc_folders import Rectangle, draw, write_picture

from svf_fast.train.data import VOID
from svf_fast.train.data.census import Census, CensusRow
from svf_fast.train.data.folds import fold_of
from svf_fast.train.data.reading import read_label
from svf_fast.train.data.split import split_of
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.prepare.coco import pair_of, prepare_coco
from svf_fast.train.prepare.coco_annotations import Picture, read_instances
from svf_fast.train.prepare.coco_categories import COCO_CATEGORIES
from svf_fast.train.prepare.coco_labels import Region
from svf_fast.train.prepare.expected import COCO, Expected
from svf_fast.train.prepare.problems import Problems
from svf_fast.train.prepare.work import run_jobs
from svf_fast.train.prepare.workspace import Workspace

LISTS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "lists"
CLASSES = dict(enumerate(COCO_CATEGORIES.values(), start=1))


def of_rank(rank: int) -> int:
    """The category id that becomes this label value."""
    return list(COCO_CATEGORIES)[rank - 1]


LEFT_HALF = draw(HEIGHT, WIDTH, [(1, 0, 0, HEIGHT, WIDTH // 2)])
CROWD = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH // 2, HEIGHT * WIDTH // 2]}
CROWD_TEXT = {"size": [HEIGHT, WIDTH], "counts": mask.encode(np.asfortranarray(LEFT_HALF))["counts"].decode()}

# image id → its regions as the file has them, and its label as rectangles; not in the order of ids
TRICKY: dict[int, tuple[list[Plain], list[Rectangle] | None]] = {
    # three sizes; 2,400 and 2,300 pixels of 1 and 22 stay visible
    50: (
        [
            region(3, of_rank(80), [rectangle(0, 0, 10, 10)]),
            region(1, of_rank(1), [rectangle(0, 0, 60, 80)]),
            region(2, of_rank(22), [rectangle(0, 0, 40, 60)]),
        ],
        [(1, 0, 0, 60, 80), (22, 0, 0, 40, 60), (80, 0, 0, 10, 10)],
    ),
    # an object partly in a crowd of another category
    10: (
        [region(5, of_rank(3), [rectangle(10, 30, 50, 50)]), region(4, of_rank(1), CROWD, is_crowd=1)],
        [(VOID, 0, 0, 60, 40), (3, 10, 30, 50, 50)],
    ),
    20: ([region(6, of_rank(5), CROWD_TEXT, is_crowd=1)], [(VOID, 0, 0, 60, 40)]),
    30: ([], None),
    # smaller than a pixel, and two points: annotated, and not to be seen
    7: (
        [region(7, of_rank(1), [[10.1, 10.1, 10.3, 10.1, 10.2, 10.3]]), region(12, of_rank(2), [[5, 5, 50, 50]])],
        [],
    ),
    # 2,047 pixels in two parts
    60: (
        [region(8, of_rank(2), [rectangle(0, 0, 31, 66), rectangle(40, 0, 1, 1)])],
        [(2, 0, 0, 31, 66), (2, 40, 0, 1, 1)],
    ),
    61: ([region(9, of_rank(2), [rectangle(0, 0, 32, 64)])], [(2, 0, 0, 32, 64)]),
    # two parts, both partly outside the picture
    5: (
        [region(10, of_rank(79), [rectangle(-20, -20, 60, 60), rectangle(10, 50, 50, 40)])],
        [(79, 0, 0, 40, 40), (79, 10, 50, 50, 30)],
    ),
    # equal areas; of 6 stay 1,400 pixels
    8: (
        [
            region(102, of_rank(7), [rectangle(10, 20, 50, 60)]),
            region(101, of_rank(6), [rectangle(0, 0, 50, 60)]),
        ],
        [(6, 0, 0, 50, 60), (7, 10, 20, 50, 60)],
    ),
    70: ([region(11, of_rank(44), [rectangle(0, 0, 40, 60)])], [(44, 0, 0, 40, 60)]),
}
LISTED = [5, 7, 8, 10, 20, 50, 60, 61, 70]
# rule → fold → image ids in training with the trick, in training, in validation
FOLDS = {
    "coco": [
        ([5, 8, 10, 61, 70], [5, 8, 10, 50, 61, 70], [50]),
        ([5, 10, 70], [5, 8, 10, 50, 70], [50, 61]),
        ([50, 61, 70], [50, 61, 70], [5, 8, 10]),
        ([5, 8, 10, 61], [5, 8, 10, 50, 61], [70]),
    ],
    "coco_contiguous": [
        ([5, 70], [5, 50, 70], [8, 10, 50, 61]),
        ([5, 8, 10, 61, 70], [5, 8, 10, 50, 61, 70], [50]),
        ([5, 8, 10, 50, 61], [5, 8, 10, 50, 61], [70]),
        ([8, 10, 61, 70], [8, 10, 50, 61, 70], [5]),
    ],
}


def tricky_file(part: str) -> Plain:
    return instance_file(part, {image_id: regions for image_id, (regions, _) in TRICKY.items()})


def write_tricky(root: Path) -> Path:
    return write_coco(root, {part: tricky_file(part) for part in ("train", "val")})


def prepare(coco: Path, out: Path, *, workers: int = 0, base_labels: bool = False) -> str:
    console = Console(file=io.StringIO())
    expected = Expected({"train": len(LISTED), "val": len(LISTED)})
    return prepare_coco(coco, out, workers=workers, base_labels=base_labels, console=console, expected=expected)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the summary, which names the sources."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "summary.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`coco`, as downloaded, and `out` of it with base labels."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(write_tricky(folder / "coco"), folder / "out", base_labels=True)
    return folder


@pytest.mark.parametrize("image_id", LISTED)
def test_labels_are_as_drawn_by_hand(prepared: Path, image_id: int) -> None:
    rectangles = TRICKY[image_id][1]
    assert rectangles is not None
    for part in ("train", "val"):
        label = prepared / "out" / "annotations" / f"{part}2014" / f"COCO_{part}2014_{image_id:012d}.png"
        np.testing.assert_array_equal(read_label(label), draw(HEIGHT, WIDTH, rectangles))


def test_lists_hold_the_annotated_pictures_by_ascending_id(prepared: Path) -> None:
    for part in ("train", "val"):
        names = [f"COCO_{part}2014_{image_id:012d}" for image_id in LISTED]
        lines = [f"{part}2014/{name}.jpg annotations/{part}2014/{name}.png\n" for name in names]
        assert (prepared / "out" / "lists" / f"{part}.txt").read_text() == "".join(lines)
        pictures = sorted(path.stem for path in (prepared / "out" / f"{part}2014").iterdir())
        assert pictures == names


def test_classes_are_the_eighty_by_rank(prepared: Path) -> None:
    lines = (prepared / "out" / "classes.txt").read_text().splitlines()
    assert len(lines) == 80
    assert (lines[0], lines[11], lines[79]) == ("1 person", "12 stop sign", "80 toothbrush")


@pytest.mark.parametrize("rule", FOLDS)
@pytest.mark.parametrize("index", range(4))
def test_folds_hold_the_pictures_that_count(prepared: Path, rule: str, index: int) -> None:
    fold, folder = fold_of(rule, index), VOCFolder(prepared / "out")
    with_trick, without, validation = FOLDS[rule][index]
    for kind, part, class_ids, dropped, expected in (
        ("train_trick", "train", fold.base, fold.novel, with_trick),
        ("train", "train", fold.base, (), without),
        ("val", "val", fold.novel, (), validation),
    ):
        indexed = folder.split(f"folds/{rule}/fold{index}_{kind}.json", class_ids, drop_images_with=dropped)
        assert [int(Path(entry.image).stem[-12:]) for entry in indexed.entries] == expected
        assert folder.split(f"lists/{part}.txt", class_ids, drop_images_with=dropped) == indexed


def test_base_labels_are_written_for_both_rules(prepared: Path) -> None:
    name = "COCO_val2014_000000000010.png"
    for rule, fold, value in (("coco", 0, 2), ("coco", 2, 0), ("coco_contiguous", 1, 3)):
        label = read_label(prepared / "out" / "base_labels" / rule / "val" / str(fold) / name)
        expected = draw(HEIGHT, WIDTH, [(VOID, 0, 0, 60, 40), (value, 10, 30, 50, 50)])
        np.testing.assert_array_equal(label, expected)


def test_the_summary_counts_and_compares(prepared: Path) -> None:
    summary = json.loads((prepared / "out" / "summary.json").read_text())
    assert summary["agrees_with_the_field"] is True
    assert summary["notes"] == [
        f"{sentence} {part}2014 {rest}"
        for part in ("train", "val")
        for sentence, rest in (
            ("1 pictures of", "have no annotation and are left out"),
            (
                "polygons of fewer than three points in",
                "enclose nothing and are left out; they are in the annotations 12",
            ),
        )
    ]
    assert [fold["val"]["pictures"] for fold in summary["folds"]["coco"]] == [1, 2, 3, 1]


def test_the_known_counts_of_validation_are_compared(prepared: Path, tmp_path: Path) -> None:
    report = prepare_coco(prepared / "coco", tmp_path / "out", workers=0, console=Console(quiet=True))
    assert "these counts differ from the published ones (6):" in report
    assert "coco fold 1, validation: pictures 2 (published: 15,305)" in report


def test_the_original_zips_give_the_same_folder(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_processes_get_it(function: Callable[[Any], Any], jobs: Iterable[Any], **options: Any) -> list[Any]:
        sent = (pickle.loads(pickle.dumps(job)) for job in jobs)
        return run_jobs(pickle.loads(pickle.dumps(function)), sent, **options)

    monkeypatch.setattr("svf_fast.train.prepare.coco.run_jobs", as_processes_get_it)
    coco = prepared / "coco"
    for folder, archive in (("annotations", "annotations_trainval2014.zip"), ("train2014", "train2014.zip")):
        with zipfile.ZipFile(tmp_path / archive, "w") as packed:
            for path in sorted((coco / folder).iterdir()):
                packed.write(path, f"{folder}/{path.name}")
    (tmp_path / "val2014").symlink_to(coco / "val2014")
    prepare(tmp_path, tmp_path / "out", base_labels=True)
    assert content(tmp_path / "out") == content(prepared / "out")


def test_it_goes_on_where_it_was_stopped(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    calls = 0
    place = Workspace.place

    def stop_in_the_middle(workspace: Workspace, relative: str, bytes_: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        place(workspace, relative, bytes_)

    monkeypatch.setattr(Workspace, "place", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        prepare(prepared / "coco", out, base_labels=True)
    monkeypatch.undo()
    assert not out.exists()
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.part").rglob("*.png")}
    assert len(made) == 4
    prepare(prepared / "coco", out, base_labels=True)
    assert content(out) == content(prepared / "out")
    labels = {path.name: path.stat().st_mtime_ns for path in (out / "annotations").rglob("*.png")}
    assert made.items() <= labels.items()
    assert "already prepared" in prepare(prepared / "coco", out, base_labels=True)


def _spoil_json(coco: Path) -> None:
    path = coco / "annotations" / "instances_train2014.json"
    path.write_bytes(path.read_bytes()[:-40])


def _other_categories(coco: Path) -> None:
    path = coco / "annotations" / "instances_val2014.json"
    found = json.loads(path.read_text())
    found["categories"][0]["name"] = "people"
    path.write_text(json.dumps(found))


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _lead_nowhere(coco: Path) -> None:
    (coco / PICTURES[50]).unlink()
    (coco / PICTURES[50]).symlink_to(coco / "nowhere")


PICTURES = {image_id: Path("val2014") / file_name("val", image_id) for image_id in TRICKY}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "instance file cut short": (_spoil_json, "instances_train2014.json is no valid JSON at character"),
    "other categories": (_other_categories, "has categories that are none of COCO's 80: 1 people"),
    "link to nowhere": (_lead_nowhere, f"{PICTURES[50]} is missing"),
    "missing picture": (lambda coco: (coco / PICTURES[5]).unlink(), f"{PICTURES[5]} is missing"),
    "picture cut short": (lambda coco: _cut_short(coco / PICTURES[7]), f"{PICTURES[7]} is truncated"),
    "no picture": (lambda coco: (coco / PICTURES[8]).write_bytes(b"<html>"), f"{PICTURES[8]} cannot be decoded"),
    "picture of another size": (
        lambda coco: write_picture(coco / PICTURES[10], WIDTH, HEIGHT),
        f"{PICTURES[10]} is 60x80 pixels (width x height), but the instance file says 80x60",
    ),
}


def test_everything_that_cannot_be_used_is_named_before_anything_is_written(tmp_path: Path) -> None:
    coco, out = write_tricky(tmp_path / "coco"), tmp_path / "out"
    for damage, _ in DAMAGE.values():
        damage(coco)
    # other categories are two: one too many, one too few
    with pytest.raises(ValueError, match=f"{len(DAMAGE) + 1} problems") as caught:
        prepare(coco, out)
    for _, sentence in DAMAGE.values():
        assert sentence in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco"]


def test_a_picture_without_annotations_may_be_missing_or_have_any_name(tmp_path: Path) -> None:
    coco = write_tricky(tmp_path / "coco")
    Path(os.fsdecode(os.fsencode(coco / "val2014") + b"/\xff.jpg")).write_bytes(b"no UTF-8 in its name")
    (coco / PICTURES[30]).unlink()
    assert "out" in prepare(coco, tmp_path / "out")


def test_of_a_name_that_comes_twice_the_file_nearest_to_the_top_is_taken(prepared: Path, tmp_path: Path) -> None:
    coco = write_tricky(tmp_path / "coco")
    for folder, below in (("annotations", "old"), ("val2014", "zz")):
        (coco / folder / below).mkdir()
        for path in (coco / folder).glob("*.j*"):
            (coco / folder / below / path.name).write_bytes(b"other")
    prepare(coco, tmp_path / "out", base_labels=True)
    assert content(tmp_path / "out" / "annotations") == content(prepared / "out" / "annotations")


def test_a_damaged_zip_is_named_beside_the_other_problems(tmp_path: Path) -> None:
    coco = write_tricky(tmp_path / "coco")
    _spoil_json(coco)
    with zipfile.ZipFile(coco / "val2014.zip", "w") as packed:
        for path in sorted((coco / "val2014").iterdir()):
            packed.write(path, f"val2014/{path.name}")
    shutil.rmtree(coco / "val2014")
    content = bytearray((coco / "val2014.zip").read_bytes())
    content[content.index(PICTURES[8].name.encode()) + 1000] ^= 255  # amid the picture
    (coco / "val2014.zip").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"2 problems[\s\S]*train2014.json is no valid JSON[\s\S]*val2014.zip is no readable"
    ):
        prepare(coco, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco"]


def test_missing_parts_of_coco_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 problems") as caught:
        prepare(tmp_path, tmp_path / "out")
    for name in ("annotations_trainval2014.zip", "train2014.zip", "val2014.zip"):
        assert f"{tmp_path / name} are missing" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.skipif(not LISTS.is_dir(), reason="the field's lists are not here")
def test_the_membership_rule_gives_back_the_fields_validation_lists() -> None:
    """Of the rule, not of COCO: the annotations are made up after the lists, which rule those follow is not known.

    Every picture gets an object of 2,048 pixels of a novel class of each fold whose list names it. 1,078 more pictures, as
    many as COCO has beside these, show an object of 2,047 pixels.
    """
    lists = [gzip.decompress((LISTS / f"coco_val_fold{i}.txt.gz").read_bytes()).decode().split() for i in range(4)]
    novel = [fold_of("coco", fold).novel for fold in range(4)]
    chance, number = random.Random(0), itertools.count()
    regions_of: dict[int, list[Plain]] = {}
    for fold, names in enumerate(lists):
        for name in names:
            found = region(next(number), of_rank(chance.choice(novel[fold])), [rectangle(0, 0, 32, 64)])
            regions_of.setdefault(int(Path(name).stem[-12:]), []).append(found)
    unlisted = (image_id for image_id in range(1, 10**6) if image_id not in regions_of)
    while len(regions_of) < 40_137:
        regions_of[next(unlisted)] = [region(next(number), of_rank(1), [rectangle(0, 0, 23, 89)])]
    problems = Problems()
    instances = read_instances(json.dumps(instance_file("val", regions_of)), "made up", problems)
    problems.raise_all("the made-up file")
    assert instances is not None

    def row(picture: Picture) -> CensusRow:
        pixels = {found.value: box_area(found) for found in picture.regions}
        return CensusRow(*pair_of("val", picture), (HEIGHT, WIDTH), (1, 1), pixels)

    census = Census(tuple(map(row, instances.pictures)))
    assert len(census.rows) == 40_137
    for fold, names in enumerate(lists):
        assert len(names) == COCO.folds["coco"][fold]["val"].pictures
        split = split_of(census, novel[fold], root=Path(), list_file=Path("val.txt"), classes=CLASSES)
        assert [entry.image for entry in split.entries] == names


def box_area(found: Region) -> int:
    (polygon,) = found.segmentation  # type: ignore[misc]
    return int((polygon[2] - polygon[0]) * (polygon[5] - polygon[1]))
