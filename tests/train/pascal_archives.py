"""VOC 2012 and SBD in small, for tests: the same folders and lists, tiny pictures; as folders or as the original archives."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat

from svf_fast.train.data.palette import palette_png

Files = dict[str, bytes]
HEIGHT, WIDTH = 48, 64  # 3,072 pixels: a class that fills a picture counts (2,048)


@cache
def jpeg(height: int = HEIGHT, width: int = WIDTH) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 90, np.uint8))[1].tobytes()


def mask(class_id: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The class everywhere but in the first row, which is background."""
    values = np.full((height, width), class_id, np.uint8)
    values[0] = 0
    return values


@cache
def voc_mask(class_id: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """As VOC's: with a void border."""
    values = mask(class_id, height, width)
    values[:, 0] = 255
    return palette_png(values)


@cache
def sbd_mask(class_id: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    return mat(mask(class_id, height, width))


def mat(segmentation: object, field: str = "Segmentation") -> bytes:
    file = io.BytesIO()
    savemat(file, {"GTcls": {field: segmentation, "CategoriesPresent": np.uint8([1])}}, do_compression=True)
    return file.getvalue()


def class_of(name: str) -> int:
    """Some class of a picture, from its name alone."""
    return sum(name.encode()) % 20 + 1


def voc_and_sbd(
    *,
    main_train: Sequence[str],
    voc_train: Sequence[str],
    voc_val: Sequence[str],
    sbd_train: Sequence[str],
    sbd_val: Sequence[str],
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> tuple[Files, Files]:
    """Files of `VOC2012` and of `benchmark_RELEASE/dataset` by their paths in there; all pictures are of one size."""
    voc = {
        "ImageSets/Main/train.txt": main_train,
        "ImageSets/Segmentation/train.txt": voc_train,
        "ImageSets/Segmentation/val.txt": voc_val,
    }
    voc_files: Files = {path: "".join(f"{name}\n" for name in names).encode() for path, names in voc.items()}
    for name in {*main_train, *voc_train, *voc_val}:
        voc_files[f"JPEGImages/{name}.jpg"] = jpeg(*size)
    for name in (*voc_train, *voc_val):
        voc_files[f"SegmentationClass/{name}.png"] = voc_mask(class_of(name), *size)
    sbd_files: Files = {}
    for part, names in (("train", sbd_train), ("val", sbd_val)):
        sbd_files[f"{part}.txt"] = "".join(f"{name}\n" for name in names).encode()
        for name in names:
            sbd_files[f"cls/{name}.mat"] = sbd_mask(class_of(name), *size)
            sbd_files[f"img/{name}.jpg"] = jpeg(*size)
    return voc_files, sbd_files


def small_voc_and_sbd() -> tuple[Files, Files]:
    """Twenty pictures of training (13 of them by SBD, 4 of these by VOC too) and six of validation, with names around them that belong to
    neither list."""
    by_sbd = [f"2008_{number:06d}" for number in range(1, 14)]
    only_voc = [f"2007_{number:06d}" for number in range(1, 8)]
    val = [f"2009_{number:06d}" for number in (5, 3, 9, 1, 7, 2)]
    return voc_and_sbd(
        main_train=[*by_sbd, "2010_000001"],  # no one segmented this one
        voc_train=[*only_voc[:3], *by_sbd[2:6], *only_voc[3:]],
        voc_val=val,
        sbd_train=[*by_sbd[8:], *val[:2], *by_sbd[:3]],
        sbd_val=[*by_sbd[3:8], "2011_000001"],  # SBD labels it, but VOC does not count it as training
    )


SMALL_TRAIN = [f"2008_{number:06d}" for number in range(1, 14)] + [f"2007_{number:06d}" for number in range(1, 8)]
SMALL_VAL = [f"2009_{number:06d}" for number in (5, 3, 9, 1, 7, 2)]


def as_folder(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def as_tar(files: Mapping[str, bytes], path: Path, mode: str = "w") -> Path:
    """`mode`: "w" or "w:gz"; the files in another order than the lists'."""
    with tarfile.open(path, mode) as archive:
        for name in sorted(files, key=lambda name: name[::-1]):
            entry = tarfile.TarInfo(name)
            entry.size = len(files[name])
            archive.addfile(entry, io.BytesIO(files[name]))
    return path


def below(prefix: str, files: Mapping[str, bytes]) -> Files:
    return {f"{prefix}/{name}": content for name, content in files.items()}
