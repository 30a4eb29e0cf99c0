"""The command line of `svf-fast prepare`: arguments into calls. Decides nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from svf_fast.train.prepare.work import default_workers


def add_prepare(commands: Any) -> None:
    """Add `prepare` to the sub-commands of `svf-fast` (what `add_subparsers` returned)."""
    prepare = commands.add_parser("prepare", help="what training reads, from the data sets as they are downloaded")
    data_sets = prepare.add_subparsers(dest="data_set", required=True, metavar="DATA_SET")

    pascal = data_sets.add_parser("pascal", help="Pascal-5i from VOC 2012 and SBD")
    pascal.add_argument(
        "--voc", metavar="PATH", type=Path, required=True, help="VOC2012 folder, or VOCtrainval_11-May-2012.tar"
    )
    pascal.add_argument("--sbd", metavar="PATH", type=Path, required=True, help="SBD's folder, or benchmark.tgz")
    _add_common(pascal)
    pascal.set_defaults(run=_pascal)

    coco = data_sets.add_parser("coco", help="COCO-20i from COCO 2014, by both fold rules")
    coco.add_argument(
        "--coco",
        metavar="DIR",
        type=Path,
        required=True,
        help="train2014, val2014 and annotations: folders or the zips",
    )
    _add_common(coco)
    coco.set_defaults(run=_coco)

    index = data_sets.add_parser("index", help="a fold index from the text caches of PFENet, BAM and the SVF authors")
    index.add_argument("data_list", metavar="DATA_LIST", type=Path, help="data_list_<fold>.txt")
    index.add_argument("sub_classes", metavar="SUB_CLASS_FILE_LIST", type=Path, help="sub_class_file_list_<fold>.txt")
    index.add_argument("--root", metavar="DIR", type=Path, required=True, help="the prepared folder")
    index.add_argument(
        "--out", metavar="FILE.json", type=Path, required=True, help="the index; its list and census go beside it"
    )
    index.set_defaults(run=_index)

    folder = data_sets.add_parser(
        "folder", help="your own folder in VOC layout: checked, and a census beside each list"
    )
    folder.add_argument("root", metavar="DIR", type=Path, help="classes.txt, lists/*.txt, pictures and labels")
    folder.add_argument("--workers", metavar="N", type=_count, default=default_workers(), help="threads")
    folder.set_defaults(run=_folder)

    for parser in (pascal, coco, index, folder):
        parser.set_defaults(takes_overrides=False)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="made whole or not at all; a stopped call is gone on with",
    )
    parser.add_argument(
        "--workers", metavar="N", type=_count, default=default_workers(), help="processes; default: all cores"
    )
    parser.add_argument(
        "--base-labels", action="store_true", help="BAM's base labels as files too, for code that reads them"
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _pascal(options: argparse.Namespace, overrides: list[str]) -> int:
    from svf_fast.train.prepare.pascal import prepare_pascal

    print(
        prepare_pascal(
            options.voc,
            options.sbd,
            options.out,
            workers=options.workers,
            base_labels=options.base_labels,
            console=_console(),
        )
    )
    return 0


def _coco(options: argparse.Namespace, overrides: list[str]) -> int:
    from svf_fast.train.prepare.coco import prepare_coco

    print(
        prepare_coco(
            options.coco, options.out, workers=options.workers, base_labels=options.base_labels, console=_console()
        )
    )
    return 0


def _index(options: argparse.Namespace, overrides: list[str]) -> int:
    from svf_fast.train.prepare.published import convert_published

    print(
        convert_published(
            options.data_list, options.sub_classes, root=options.root, out=options.out, console=_console()
        )
    )
    return 0


def _folder(options: argparse.Namespace, overrides: list[str]) -> int:
    from svf_fast.train.prepare.folder import prepare_folder

    print(prepare_folder(options.root, workers=options.workers, console=_console()))
    return 0


def _console() -> Console:
    return Console(stderr=True)
