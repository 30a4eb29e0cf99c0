"""``svf-fast prepare coco``: COCO 2014's pictures and instance files, as they are downloaded, become the folder that training reads.

Lists hold the pictures with at least one annotation (a crowd counts), in ascending image id. A label's value is the rank of
the category id among the 80 (1–80); how regions become a label, and which of two lies on top, stands in `coco_labels.py`.
Everything is checked before anything is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

from rich.console import Console

from svf_fast.train.data.census import Pair
from svf_fast.train.data.folds import FOLD_RULES
from svf_fast.train.data.palette import palette_png
from svf_fast.train.prepare.archives import Source, open_source
from svf_fast.train.prepare.coco_annotations import Picture, read_instances
from svf_fast.train.prepare.coco_categories import COCO_CATEGORIES
from svf_fast.train.prepare.coco_labels import draw_label
from svf_fast.train.prepare.expected import COCO, Expected
from svf_fast.train.prepare.finish import DataSet, already_prepared, finish
from svf_fast.train.prepare.pictures import needed_bytes, picture_size, place_pictures
from svf_fast.train.prepare.problems import Problems
from svf_fast.train.prepare.work import run_jobs
from svf_fast.train.prepare.workspace import Workspace, digest_of
from svf_fast.train.progress import WorkProgress

_RULES = ("coco", "coco_contiguous")
_LAYOUT = 1  # goes up whenever the same files would give another folder
_PICTURES_A_JOB = 64
_BYTES_IN_A_JOB = 8  # pictures out of an archive travel with their bytes
_LABEL_BYTES = 8192  # of a label on the disk, about: 640x480 pixels, seven objects

_Item = TypeVar("_Item")


def prepare_coco(
    coco: str | Path,
    out: str | Path,
    *,
    workers: int,
    base_labels: bool = False,
    console: Console,
    expected: Expected = COCO,
) -> str:
    """Make `out` from the folder `coco`; returns what there is to say about it.

    `coco` holds `annotations/instances_{train,val}2014.json` and `{train,val}2014/*.jpg`, or in their place the original
    `annotations_trainval2014.zip`, `train2014.zip` and `val2014.zip`. With `base_labels` BAM's cached base labels are written
    too, for both fold rules. `workers` processes; `expected` are the field's counts. A stopped call is gone on with by the
    same call. Raises ValueError with every unusable input by name, before anything is written; FileExistsError when `out` is
    something else; OSError when the disk does not take it.
    """
    with WorkProgress(console) as shown:
        parts = _open_parts(Path(coco))
        workspace = Workspace(out, {"data set": "coco", "layout": _LAYOUT, "base labels": base_labels, **_plan(parts)})
        if workspace.is_finished:
            return already_prepared(workspace.out)
        pictures, notes = _read_and_check(parts, workers, shown)
        workspace.require_room(_needed_bytes(parts, pictures, workspace, base_labels))
        with workspace.begun():
            pairs = {part.name: _place(part, pictures.pop(part.name), workspace, workers, shown) for part in parts}
            data_set = DataSet(
                classes=dict(enumerate(COCO_CATEGORIES.values(), start=1)),
                lists=pairs,
                rules=_RULES,
                expected=expected,
                sources={"coco": str(coco)},
                notes=notes,
            )
            return finish(workspace, data_set, base_labels=base_labels, workers=workers, shown=shown)


def pair_of(part_name: str, picture: Picture) -> Pair:
    """Where a picture of `train` or `val` and its label stand in the folder, as the lists say it."""
    folder = _folder(part_name)
    return f"{folder}/{picture.file_name}", f"annotations/{folder}/{PurePosixPath(picture.file_name).stem}.png"


@dataclass(frozen=True)
class _Part:
    """COCO's training or validation part: its instance file, and its pictures by file name."""

    name: str
    annotations: Source
    annotation_path: str
    pictures: Source
    path_of: Mapping[str, str]  # file name → path in `pictures`

    @property
    def folder(self) -> str:
        return _folder(self.name)

    @property
    def annotation_file(self) -> str:
        return self.annotations.where(self.annotation_path)


@dataclass(frozen=True)
class _Given:
    """A picture as it was given, by its path or its bytes, and the size in pixels that the instance file says."""

    where: str
    file: Path | bytes
    height: int
    width: int


def _open_parts(coco: Path) -> list[_Part]:
    if not coco.is_dir():
        raise FileNotFoundError(
            f"{coco} is no folder; the one with COCO's annotations, train2014 and val2014 is expected"
        )
    problems = Problems()
    annotations = _open_either(coco, "annotations", "annotations_trainval2014.zip", problems)
    pictures = {name: _open_either(coco, _folder(name), f"{_folder(name)}.zip", problems) for name in ("train", "val")}
    parts: list[_Part] = []
    for name, source in pictures.items():
        annotation_file = f"instances_{_folder(name)}.json"
        paths = _path_of_name(annotations)
        if annotations is not None and annotation_file not in paths:
            problems.add(f"{annotations.name} holds no {annotation_file}")
        elif annotations is not None and source is not None:
            parts.append(_Part(name, annotations, paths[annotation_file], source, _path_of_name(source)))
    problems.raise_all(f"{coco} is not COCO 2014 as it is downloaded")
    return parts


def _folder(part_name: str) -> str:
    return f"{part_name}2014"


def _open_either(coco: Path, folder: str, archive: str, problems: Problems) -> Source | None:
    for path in (coco / folder, coco / archive):
        if path.exists():
            try:
                return open_source(path)
            except ValueError as error:
                problems.add(error)
                return None
    problems.add(f"{coco / folder} and {coco / archive} are missing: one of them is expected")
    return None


def _path_of_name(source: Source | None) -> dict[str, str]:
    """File name → path, wherever in the source it lies; of one that comes twice, the nearest to the top. Links that lead nowhere are not
    there."""
    paths = sorted((path for path in source.names() if path in source), key=_depth) if source is not None else []
    return {PurePosixPath(path).name: path for path in reversed(paths)}


def _depth(path: str) -> tuple[int, str]:
    return path.count("/"), path


def _plan(parts: Iterable[_Part]) -> dict[str, object]:
    """What decides the folder's content, wherever the files lie: the instance files' bytes, the pictures' names and sizes."""
    plan: dict[str, object] = {}
    for part in parts:
        content = part.annotations.read(part.annotation_path)
        plan[f"annotations of {part.folder}"] = hashlib.sha256(content).hexdigest()
        pictures = sorted((name, path) for name, path in part.path_of.items() if name.endswith(".jpg"))
        plan[f"pictures of {part.folder}"] = digest_of(f"{name} {part.pictures.size(path)}" for name, path in pictures)
    return plan


def _read_and_check(
    parts: Iterable[_Part], workers: int, shown: WorkProgress
) -> tuple[dict[str, tuple[Picture, ...]], list[str]]:
    """The listed pictures of every part, and sentences on what is left out. ValueError names every unusable input."""
    problems = Problems()
    pictures: dict[str, tuple[Picture, ...]] = {}
    notes: list[str] = []
    for part in parts:
        shown.note(f"reading {part.annotation_file}")
        instances = read_instances(_text(part), part.annotation_file, problems)
        if instances is None:
            continue
        if instances.category_names != COCO_CATEGORIES:
            _name_other_categories(instances.category_names, part.annotation_file, problems)
        if instances.left_out:
            notes.append(f"{instances.left_out:,} pictures of {part.folder} have no annotation and are left out")
        if instances.degenerate:
            notes.append(
                f"polygons of fewer than three points in {part.folder} enclose nothing and are left out; they are in the "
                f"annotations {', '.join(map(str, instances.degenerate))}"
            )
        pictures[part.name] = instances.pictures
    for part in parts:
        _check_pictures(part, pictures.get(part.name, ()), workers, problems, shown)
    problems.raise_all("Nothing was written, because COCO's files are damaged or incomplete")
    return pictures, notes


def _text(part: _Part) -> str:
    # bytes that are no UTF-8 do no harm where nothing is read from (a licence, an address); names with them are refused later
    return part.annotations.read(part.annotation_path).decode(errors="replace")


def _name_other_categories(found: Mapping[int, str], annotation_file: str, problems: Problems) -> None:
    for what, entries in (
        ("categories that are none of COCO's 80", found.items() - COCO_CATEGORIES.items()),
        ("not all of COCO's 80 categories; it lacks", COCO_CATEGORIES.items() - found.items()),
    ):
        if entries:
            named = ", ".join(f"{category_id} {name}" for category_id, name in sorted(entries))
            problems.add(f"{annotation_file} has {what}: {named}")


def _check_pictures(
    part: _Part, pictures: Sequence[Picture], workers: int, problems: Problems, shown: WorkProgress
) -> None:
    """Every listed picture is there, whole, and of the size that the instance file says."""
    picture_at: dict[str, Picture] = {}
    for picture in pictures:
        if picture.file_name in part.path_of:
            picture_at[part.path_of[picture.file_name]] = picture
        else:
            problems.add(f"{part.pictures.where(picture.file_name)} is missing; {part.annotation_file} lists it")

    def given() -> Iterator[_Given]:
        try:
            for path, file in part.pictures.files(picture_at):
                picture = picture_at[path]
                yield _Given(part.pictures.where(path), file, picture.height, picture.width)
        except ValueError as error:  # a damaged archive, from there on
            problems.add(error)

    is_folder = all(part.pictures.local(path) is not None for path in islice(picture_at, 1))
    size = _PICTURES_A_JOB if is_folder else _BYTES_IN_A_JOB
    sentences = run_jobs(
        _problems_of,
        _chunks(given(), size),
        workers=workers,
        problems=problems,
        progress=_chunk_counter(shown, f"checking {part.folder}", len(picture_at), size),
    )
    for some in sentences:
        problems.extend(some or ())


def _problems_of(pictures: Sequence[_Given]) -> list[str]:
    sentences: list[str] = []
    for given in pictures:
        try:
            size = picture_size(given.file, given.where)
        except (FileNotFoundError, ValueError) as error:
            sentences.append(str(error))
            continue
        if size != (given.height, given.width):
            sentences.append(
                f"{given.where} is {size[1]}x{size[0]} pixels (width x height), but the instance file says "
                f"{given.width}x{given.height}"
            )
    return sentences


def _needed_bytes(
    parts: Iterable[_Part], pictures: Mapping[str, Sequence[Picture]], workspace: Workspace, base_labels: bool
) -> int:
    """About what the folder will take."""
    labels_a_picture = 1 + (sum(FOLD_RULES[rule].folds for rule in _RULES) if base_labels else 0)
    needed = 0
    for part in parts:
        listed = pictures[part.name]
        needed += needed_bytes(part.pictures, (part.path_of[picture.file_name] for picture in listed), workspace)
        needed += len(listed) * labels_a_picture * _LABEL_BYTES
    return needed


def _place(
    part: _Part, pictures: Sequence[Picture], workspace: Workspace, workers: int, shown: WorkProgress
) -> list[Pair]:
    """Put the pictures and labels into the folder where they are not there yet; returns the part's list."""
    pairs = [pair_of(part.name, picture) for picture in pictures]
    target_of = {part.path_of[picture.file_name]: target for picture, (target, _) in zip(pictures, pairs, strict=True)}
    place_pictures(part.pictures, target_of, workspace, shown, f"pictures of {part.folder}")
    missing = [
        (label, picture) for picture, (_, label) in zip(pictures, pairs, strict=True) if not workspace.has(label)
    ]
    problems = Problems()
    run_jobs(
        partial(_place_some_labels, workspace),
        _chunks(missing, _PICTURES_A_JOB),
        workers=workers,
        problems=problems,
        progress=_chunk_counter(shown, f"labels of {part.folder}", len(missing), _PICTURES_A_JOB),
    )
    problems.raise_all("Labels could not be drawn")
    return pairs


def _place_some_labels(workspace: Workspace, job: Sequence[tuple[str, Picture]]) -> None:
    for path, picture in job:
        workspace.place(path, palette_png(draw_label(picture.height, picture.width, picture.regions)))


def _chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk


def _chunk_counter(shown: WorkProgress, name: str, pictures: int, size: int) -> Callable[[int], None]:
    """Of jobs done, where a picture is what a user counts."""
    count = shown.counter(name, pictures)
    return lambda jobs: count(min(jobs * size, pictures))
