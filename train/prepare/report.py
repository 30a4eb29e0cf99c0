"""What a preparation says at its end: counts of the folds as tables, and every difference from the field's counts as a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from svf_fast.train.files import sha256_of
from svf_fast.train.prepare.expected import Counted, Expected, FoldCounts

_SPLITS = (("train_trick", "training †"), ("train", "training"), ("val", "validation"))
_TRICK = "† without pictures that show a novel class (data.drop_novel_images)"


def mismatches(found: Expected, expected: Expected, classes: Mapping[int, str]) -> list[str]:
    """A sentence for every list and every split of a fold whose counts are not the expected ones; what is not expected is not compared."""
    sentences = [
        f"lists/{part}.txt has {found.list_lengths[part]:,} pictures, the published list {length:,}"
        for part, length in expected.list_lengths.items()
        if found.list_lengths[part] != length
    ]
    for rule, folds in expected.folds.items():
        for index, (ours, theirs) in enumerate(zip(found.folds[rule], folds, strict=True)):
            for kind, name in _SPLITS:
                difference = _difference(ours[kind], theirs[kind], classes) if kind in theirs else ""
                if difference:
                    sentences.append(f"{rule} fold {index}, {name}: {difference}")
    return sentences


def render(
    out: Path, found: Expected, classes: Mapping[int, str], notes: Sequence[str], differences: Sequence[str]
) -> str:
    """Tables of all rules, the classes by the first one, and what was noted."""
    lines = [
        f"{out}: "
        + ", ".join(
            f"{length:,} pictures in lists/{part}.txt (SHA-256 {sha256_of(out / 'lists' / f'{part}.txt')[:12]}…)"
            for part, length in found.list_lengths.items()
        )
    ]
    for rule, folds in found.folds.items():
        lines += [
            "",
            *_table([f"{rule}: fold", *(name for _, name in _SPLITS)], [_fold_row(i, f) for i, f in enumerate(folds)]),
        ]
    if found.folds:
        rule, folds = next(iter(found.folds.items()))
        header = [f"{rule}: pictures of", *(f"train † {index}" for index in range(len(folds))), "train", "val"]
        lines += ["", *_table(header, [_class_row(c, name, folds) for c, name in classes.items()])]
    lines += ["", _TRICK, *notes]
    if differences:
        lines.append(f"these counts differ from the published ones ({len(differences)}):")
        lines += [f"  {sentence}" for sentence in differences]
    else:
        lines.append("every count that is known of the published lists agrees")
    return "\n".join(lines)


def _difference(ours: Counted, theirs: Counted, classes: Mapping[int, str]) -> str:
    parts = []
    if ours.pictures != theirs.pictures:
        parts.append(f"pictures {ours.pictures:,} (published: {theirs.pictures:,})")
    parts += [
        f"{classes[c]} {ours.of_class.get(c, 0):,} (published: {count:,})"
        for c, count in theirs.of_class.items()
        if ours.of_class.get(c, 0) != count
    ]
    return "; ".join(parts)


def _fold_row(index: int, fold: FoldCounts) -> list[str]:
    return [str(index), *(f"{fold[kind].pictures:,}" for kind, _ in _SPLITS)]


def _class_row(class_id: int, name: str, folds: Sequence[FoldCounts]) -> list[str]:
    tricks = [fold["train_trick"].of_class.get(class_id) for fold in folds]
    trick = ["novel" if count is None else f"{count:,}" for count in tricks]
    train, val = (
        next((f[kind].of_class[class_id] for f in folds if class_id in f[kind].of_class), 0)
        for kind in ("train", "val")
    )
    return [name, *trick, f"{train:,}", f"{val:,}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of one width a column, the first to the left and the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in (header, *rows)
    ]
