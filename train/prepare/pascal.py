"""``svf-fast prepare pascal``: VOC 2012 and SBD, as they are downloaded, become the folder that training reads.

Everything is checked before anything is written. Which pictures are taken is `pascal_lists.py`'s business; a picture's mask is VOC's where
VOC has one (finer, with void borders), else SBD's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from svf_fast.train.data.folds import FOLD_RULES
from svf_fast.train.data.reading import require_same_size
from svf_fast.train.prepare import pascal_masks
from svf_fast.train.prepare.archives import Source, open_source
from svf_fast.train.prepare.expected import PASCAL, Expected
from svf_fast.train.prepare.finish import DataSet, already_prepared, finish
from svf_fast.train.prepare.pascal_lists import PascalLists, pascal_lists, read_names
from svf_fast.train.prepare.pascal_masks import InputFile
from svf_fast.train.prepare.pictures import needed_bytes, place_pictures
from svf_fast.train.prepare.problems import Problems
from svf_fast.train.prepare.work import run_jobs
from svf_fast.train.prepare.workspace import Workspace, digest_of, size_on_disk
from svf_fast.train.progress import WorkProgress

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_VOC_FOLDER = "VOC2012"
_FOLD_RULE = "pascal"
_UNUSABLE = "Nothing was written, because VOC 2012 or SBD is not whole"
_LAYOUT = 1  # goes up whenever the same files would give another folder


def prepare_pascal(
    voc: str | Path,
    sbd: str | Path,
    out: str | Path,
    *,
    workers: int,
    base_labels: bool = False,
    console: Console,
    expected: Expected = PASCAL,
) -> str:
    """Make `out` from VOC 2012 (`voc`) and SBD (`sbd`), each a folder or the original archive; returns what there is to say about it.

    With `base_labels` BAM's cached base labels are written too. `workers` processes; `expected` are the field's counts. A stopped call is
    gone on with by the same call. Raises ValueError with every unusable input by name, before anything is written; FileExistsError when
    `out` is something else; OSError when the disk does not take it.
    """
    with WorkProgress(console) as shown:
        for path in (voc, sbd):
            shown.note(f"finding the files of {path}")
        problems = Problems()
        inputs = find_inputs(voc, sbd, problems)
        if len(problems):
            _checked_labels(inputs, workers, problems, shown)  # raises, with what is damaged of the rest
        workspace = Workspace(
            out, {"data set": "pascal", "layout": _LAYOUT, "base labels": base_labels, **inputs.plan()}
        )
        if workspace.is_finished:
            return already_prepared(workspace.out)
        workspace.require_room(_needed_bytes(inputs, workspace, base_labels))
        labels = _checked_labels(inputs, workers, problems, shown)
        pairs = {
            part: [(_picture(name), _label(name)) for name in names]
            for part, names in (("train", inputs.lists.train), ("val", inputs.lists.val))
        }
        data_set = DataSet(
            classes=dict(enumerate(CLASS_NAMES, start=1)),
            lists=pairs,
            rules=(_FOLD_RULE,),
            expected=expected,
            sources={"voc": str(voc), "sbd": str(sbd)},
            notes=inputs.lists.notes,
        )
        with workspace.begun():
            workspace.bind("labels.sha256", _digest(labels))
            place_pictures(inputs.voc, {path: path for path in inputs.pictures.values()}, workspace, shown, "pictures")
            _place_labels(labels, workspace, shown)
            return finish(workspace, data_set, base_labels=base_labels, workers=workers, shown=shown)


@dataclass(frozen=True)
class Inputs:
    """The lists and, for the names of both, what there is: `pictures` are paths in VOC, `masks` (source, path in it)."""

    voc: Source
    lists: PascalLists
    pictures: Mapping[str, str]
    masks: Mapping[str, tuple[Source, str]]

    def paths_by_source(self) -> list[tuple[Source, list[str]]]:
        """Every picture and mask once, those of one source together: an archive is read in one go."""
        by_source: dict[int, tuple[Source, list[str]]] = {id(self.voc): (self.voc, list(self.pictures.values()))}
        for source, path in self.masks.values():
            by_source.setdefault(id(source), (source, []))[1].append(path)
        return list(by_source.values())

    def plan(self) -> dict[str, object]:
        """What decides the folder's content, wherever the files lie: their names and sizes."""
        sizes = (f"{path} {source.size(path)}" for source, paths in self.paths_by_source() for path in sorted(paths))
        return {
            "training list": digest_of(self.lists.train),
            "validation list": digest_of(self.lists.val),
            "files": digest_of(sizes),
        }


def find_inputs(voc_path: str | Path, sbd_path: str | Path, problems: Problems) -> Inputs:
    """The lists, and where every picture and mask is; each that is missing goes to `problems`.

    Raises ValueError, with all of `problems`, when a source or one of its lists cannot be read.
    """
    voc = _open(voc_path, "ImageSets/Segmentation/train.txt", problems)
    sbd = _open(sbd_path, "cls/*.mat", problems)
    names = {
        path: _names_if_there(source, path, problems, is_needed=is_needed)
        for source, path, is_needed in (
            (sbd, "train.txt", True),
            (sbd, "val.txt", True),
            (voc, "ImageSets/Segmentation/train.txt", True),
            (voc, "ImageSets/Segmentation/val.txt", True),
            (voc, "ImageSets/Main/train.txt", False),
            (sbd, "train_noval.txt", False),
        )
        if source is not None
    }
    problems.raise_all(_UNUSABLE)
    assert voc is not None
    assert sbd is not None
    lists = pascal_lists(
        sbd=[*(names["train.txt"] or ()), *(names["val.txt"] or ())],
        voc_train=names["ImageSets/Segmentation/train.txt"] or (),
        voc_val=names["ImageSets/Segmentation/val.txt"] or (),
        voc_main_train=names["ImageSets/Main/train.txt"],
        sbd_train_noval=names["train_noval.txt"],
    )
    pictures: dict[str, str] = {}
    masks: dict[str, tuple[Source, str]] = {}
    for name in lists.train + lists.val:
        if _picture(name) in voc:
            pictures[name] = _picture(name)
        else:
            problems.add(f"{voc.where(_picture(name))} is missing")
        places = [(voc, f"SegmentationClass/{name}.png"), (sbd, f"cls/{name}.mat")]
        there = [place for place in places if place[1] in place[0]]
        if there:
            masks[name] = there[0]
        else:
            both = " and ".join(source.where(path) for source, path in places)
            problems.add(f"{both} are missing: one of them is expected")
    return Inputs(voc, lists, pictures, masks)


def _open(path: str | Path, marker: str, problems: Problems) -> Source | None:
    try:
        return open_source(path).below(marker, preferred=_VOC_FOLDER)
    except (FileNotFoundError, ValueError) as error:
        problems.add(error)
        return None


def _names_if_there(source: Source, path: str, problems: Problems, *, is_needed: bool) -> list[str] | None:
    """The names in a list; None for one that is missing or no list, which goes to `problems` unless it is merely not there."""
    if path not in source:
        if is_needed:
            problems.add(f"{source.where(path)} is missing")
        return None
    try:
        return read_names(source.read(path), source.where(path))
    except ValueError as error:
        problems.add(error)
        return None


def _picture(name: str) -> str:
    return f"JPEGImages/{name}.jpg"


def _label(name: str) -> str:
    return f"SegmentationClassAug/{name}.png"


def _checked_labels(inputs: Inputs, workers: int, problems: Problems, shown: WorkProgress) -> dict[str, bytes]:
    """Name → the label file to be written. ValueError unless every picture and mask can be used: all of `problems`, and each that cannot.

    The labels of all 7,402 pictures take 30 MB, a second reading of the archives as long as the first: they are kept.
    """
    order: list[tuple[bool, str]] = []  # is it a mask, and the picture's name

    def jobs() -> Iterator[InputFile]:
        for source, paths in inputs.paths_by_source():
            try:
                for path, file in source.files(paths):
                    order.append((not path.endswith(".jpg"), Path(path).stem))
                    yield InputFile(path, source.where(path), file)
            except ValueError as error:  # the rest of a damaged archive
                problems.add(error)

    count = shown.counter("checking", len(inputs.pictures) + len(inputs.masks))
    checked = run_jobs(pascal_masks.check, jobs(), workers=workers, problems=problems, progress=count)
    checked_of = dict(zip(order, checked, strict=True))
    labels: dict[str, bytes] = {}
    for name in inputs.lists.train + inputs.lists.val:
        picture, mask = checked_of.get((False, name)), checked_of.get((True, name))
        if picture is None or mask is None or mask.label is None:
            continue
        source, path = inputs.masks[name]
        try:
            require_same_size(inputs.voc.where(inputs.pictures[name]), picture.size, source.where(path), mask.size)
        except ValueError as error:
            problems.add(error)
        labels[name] = mask.label
    problems.raise_all(_UNUSABLE)
    return labels


def _digest(labels: Mapping[str, bytes]) -> str:
    """Of all labels: the plan knows their names and sizes alone."""
    return digest_of(f"{name} {hashlib.sha256(label).hexdigest()}" for name, label in labels.items()) + "\n"


def _needed_bytes(inputs: Inputs, workspace: Workspace, base_labels: bool) -> int:
    """About what the folder will take. Neither an SBD mask as PNG nor a base label is larger than the mask's own file."""
    masks = sum(size_on_disk(source.size(path)) for source, path in inputs.masks.values())
    copies = 1 + FOLD_RULES[_FOLD_RULE].folds * base_labels
    return needed_bytes(inputs.voc, inputs.pictures.values(), workspace) + copies * masks


def _place_labels(labels: Mapping[str, bytes], workspace: Workspace, shown: WorkProgress) -> None:
    count = shown.counter("labels", len(labels))
    for done, (name, label) in enumerate(labels.items(), start=1):
        if not workspace.has(_label(name)):
            workspace.place(_label(name), label)
        count(done)
