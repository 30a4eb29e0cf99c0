"""What the field's own prepared lists count, as data: pictures of the lists, of every fold, and of every class of a fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counted:
    """Pictures of one split, and of every class (by id) that counts in them; of published lists, the classes that are known."""

    pictures: int
    of_class: Mapping[int, int]


# A fold's splits: `train_trick` (without pictures that show a novel class), `train`, `val`; all three of a folder that was made, of
# the published lists those that are known.
FoldCounts = Mapping[str, Counted]


@dataclass(frozen=True)
class Expected:
    """`list_lengths` by the list's name, `folds` by the fold rule's."""

    list_lengths: Mapping[str, int]
    folds: Mapping[str, tuple[FoldCounts, ...]] = field(default_factory=dict)


# Pictures of every class 1–20 in training, whatever the fold.
_PASCAL_TRAIN = (307, 246, 351, 230, 223, 225, 506, 555, 564, 157, 293, 613, 252, 261, 1856, 222, 174, 292, 289, 287)
# A fold: pictures of training with the trick, of training, of validation; those of every base class with the trick and of every novel
# class in validation.
_PASCAL_FOLDS = (
    (4208, 4760, 364, (216, 459, 540, 486, 154, 205, 593, 249, 250, 1441, 193, 168, 264, 286, 245), (81, 63, 89, 61, 71)),
    (3726, 4588, 445, (296, 206, 346, 215, 187, 106, 550, 237, 224, 1386, 139, 168, 180, 276, 190), (70, 100, 118, 110, 69)),
    (2752, 4097, 592, (286, 107, 334, 152, 103, 128, 287, 493, 228, 129, 125, 134, 144, 215, 179), (73, 125, 76, 74, 386)),
    (4510, 5108, 336, (307, 229, 350, 226, 192, 222, 496, 506, 344, 155, 217, 562, 249, 255, 1522), (63, 53, 90, 82, 69)),
)  # fmt: skip


def _pascal_fold(index: int) -> FoldCounts:
    trick, train, val, trick_of_class, val_of_class = _PASCAL_FOLDS[index]
    novel = range(5 * index + 1, 5 * index + 6)
    base = [class_id for class_id in range(1, 21) if class_id not in novel]
    return {
        "train_trick": Counted(trick, dict(zip(base, trick_of_class, strict=True))),
        "train": Counted(train, {class_id: _PASCAL_TRAIN[class_id - 1] for class_id in base}),
        "val": Counted(val, dict(zip(novel, val_of_class, strict=True))),
    }


# From the lists that the authors of PFENet, BAM and SVF share (their caches for the folds).
PASCAL = Expected({"train": 5953, "val": 1449}, {"pascal": tuple(map(_pascal_fold, range(len(_PASCAL_FOLDS))))})
# The lists' lengths; and of the interleaved folds the lengths of validation lists that two independent projects share. Their union is
# 39,059 of the 40,137 pictures, which speaks for the area rule; it has not been compared on COCO's own annotations.
_COCO_VAL = (26052, 15305, 13138, 12640)
COCO = Expected({"train": 82081, "val": 40137}, {"coco": tuple({"val": Counted(length, {})} for length in _COCO_VAL)})
