"""Shapes-5i and a small backbone that learnt from its base classes: what stands in for a data set and for ImageNet weights where there
is neither. Shared by the demo and the reproduction at small scale; each part is skipped where its result lies on the disk.

``python -m svf_fast.train.shapes_backbone FILE.yaml`` pre-trains one backbone; the file holds the fields of :class:`Pretraining`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import save

from svf_fast.train.backbones import BackboneConfig
from svf_fast.train.data.folds import fold_of
from svf_fast.train.data.shapes5i import generate
from svf_fast.train.files import write_atomically
from svf_fast.train.pretrain import PretrainConfig, pretrain
from svf_fast.train.progress import WorkProgress
from svf_fast.train.schema import from_plain


@dataclass(frozen=True)
class Pretraining:
    """One backbone on one fold of the Shapes-5i folder ``data``; its weights go to the file ``weights``, what is to be told about
    them beside it. ``threads`` as in ``run.threads``."""

    data: str
    weights: str
    fold: int = 0
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    settings: PretrainConfig = field(default_factory=PretrainConfig)
    threads: int | None = None

    @property
    def facts(self) -> Path:
        return Path(self.weights).with_suffix(".json")

    @property
    def is_done(self) -> bool:
        return Path(self.weights).is_file() and self.facts.is_file()


def draw_shapes(root: Path, console: Console, *, seed: int = 321, images: int = 2000, size: int = 152) -> Path:
    """Shapes-5i in ``root``, drawn unless it is there; errors as of :func:`svf_fast.train.data.shapes5i.generate`."""
    with WorkProgress(console) as progress:
        progress.begin("drawing", 0, images)
        return generate(
            root,
            seed=seed,
            images=images,
            size=size,
            on_picture=lambda done, all_: progress.show("drawing", done, all_),
        )


def pretrained_backbone(wanted: Pretraining, console: Console) -> dict[str, Any]:
    """Pre-train unless it is done, and return what is to be told about it; errors as of
    :func:`svf_fast.train.pretrain.pretrain`."""
    if wanted.is_done:
        known: dict[str, Any] = json.loads(wanted.facts.read_text(encoding="utf-8"))
        return known
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    started_s, data = perf_counter(), Path(wanted.data)
    with WorkProgress(console) as progress:
        progress.begin("pre-training", 0, wanted.settings.steps)
        done = pretrain(
            data,
            data / "lists" / f"fold{wanted.fold}_train.txt",
            fold_of("pascal", wanted.fold).base,
            wanted.backbone,
            wanted.settings,
            on_step=lambda step, steps, loss: progress.show("pre-training", step, steps, f"loss {loss:.3f}"),
        )
    told = {
        "base-class crops": done.crops,
        "steps × crops": f"{wanted.settings.steps} × {wanted.settings.batch}",
        "accuracy on crops held out": f"{100 * done.held_out_accuracy:.1f} % of {done.held_out_crops} (15 classes and ground)",
        "seconds": round(perf_counter() - started_s, 1),
    }
    weights = Path(wanted.weights)
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(weights, lambda file: file.write(save(done.backbone)))
    write_atomically(wanted.facts, lambda file: file.write((json.dumps(told, indent=2) + "\n").encode()))
    return told


def main() -> int:
    wanted = from_plain(Pretraining, yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")))
    pretrained_backbone(wanted, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
