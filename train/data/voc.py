"""Folders in Pascal-VOC layout: a data root, its classes, and the splits of its lists.

A list file has one `image label` pair a line, relative to the root. Every file of a list is looked at here, once, so that
`episodes.py` meets few surprises in the middle of a run: read, or where a census or a fold index lies beside the list,
compared with it by size. Knows nothing of tensors or of how episodes are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from svf_fast.train.data.census import Census, OnProgress, census_path, read_census, take_census
from svf_fast.train.data.fold_index import read_fold_index
from svf_fast.train.data.lists import read_classes, read_pairs
from svf_fast.train.data.split import Split, split_of, whole_of
from svf_fast.train.files import sha256_of


class VOCFolder:
    """A data root and its `classes` (1-based id → name), those of its `classes.txt`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data root {self.root} is not a folder; expected pictures and labels in VOC layout"
            )
        self.classes = read_classes(self.root / "classes.txt")

    def split(
        self,
        list_file: str | Path,
        class_ids: Iterable[int],
        *,
        drop_images_with: Iterable[int] = (),
        on_progress: OnProgress | None = None,
    ) -> Split:
        """The split of `list_file` (relative to the root, or absolute) for the classes `class_ids`, by the rules of
        `split_of`; a `.json` file is a fold index, which must have been made for the same classes. `on_progress` as in
        `take_census`; a fold index, which opens no picture, reports none.

        Raises FileNotFoundError or ValueError, naming every file that is missing, truncated, of another size than its
        partner, or labelled with an unknown class; of a fold index, every file that is missing, or of another size in
        bytes than the census beside its list says.
        """
        path = self.root / list_file
        if path.suffix == ".json":
            return read_fold_index(
                path, self.root, self.classes, class_ids=class_ids, drop_images_with=drop_images_with
            )
        return split_of(
            self.census(list_file, on_progress=on_progress),
            class_ids,
            root=self.root,
            list_file=path,
            classes=self.classes,
            drop_images_with=drop_images_with,
        )

    def whole(
        self,
        list_file: str | Path,
        class_ids: Iterable[int],
        *,
        drop_images_with: Iterable[int] = (),
        on_progress: OnProgress | None = None,
    ) -> Split:
        """Every picture of `list_file`, by the rules of `whole_of`; otherwise as `split`, but a fold index is refused,
        because it has left pictures out."""
        path = self.root / list_file
        if path.suffix == ".json":
            raise ValueError(f"{path} is a fold index, but every picture of a list is asked for: give the list file")
        return whole_of(
            self.census(list_file, on_progress=on_progress),
            class_ids,
            root=self.root,
            list_file=path,
            classes=self.classes,
            drop_images_with=drop_images_with,
        )

    def census(self, list_file: str | Path, *, on_progress: OnProgress | None = None) -> Census:
        """What the pictures of `list_file` show: from the census beside the list where that still fits, else read from
        all labels. Otherwise as `split`."""
        path = self.root / list_file
        pairs = read_pairs(path)
        kept = census_path(path)
        earlier = read_census(kept, pairs, sha256_of(path)) if kept.is_file() else None
        return take_census(self.root, pairs, self.classes, earlier=earlier, named=str(path), on_progress=on_progress)
