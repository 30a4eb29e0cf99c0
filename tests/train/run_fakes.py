"""Small runs for tests: a folder in VOC layout with a few pictures of fold 0, overrides that make a configuration tiny,
and a method and episodes that cost nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from voc_folders import draw, line, write_label, write_picture

from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.config import Config, config_from_plain
from svf_fast.train.data.episodes import Episode, Order
from svf_fast.train.data.memory import SampleMemory
from svf_fast.train.engine import BEST, LAST, LOG, Parts, Run
from svf_fast.train.journal import read_journal
from svf_fast.train.methods import Losses, TrainingBatch
from svf_fast.train.tasks import DeviceBatch, EpisodeTask
from svf_fast.train.tuning import ParameterGroup
from svf_fast.train.validation import EpisodePlan

SIDE = 9
QUIET = Console(quiet=True)
FOLD_0_CLASSES = {"train": (6, 7, 8), "val": (1, 2)}
TINY = (
    "data.size=33",
    "data.batch=2",
    "data.workers=0",
    "backbone.blocks=1,1,1",
    "backbone.width=4",
    "method.head_width=8",
    "schedule.iterations=6",
    "validation.every_iterations=3",
    "validation.episodes=4",
    "run.checkpoint_every=2",
    "run.threads=1",
)


def write_voc_folder(root: Path, pictures_per_class: int = 4) -> Path:
    """Pictures and labels (one square a picture, large enough to count) for fold 0; the other folds have no lists."""
    rng = np.random.default_rng(0)
    (root / "lists").mkdir(parents=True)
    classes = "".join(f"{class_id} kind {class_id}\n" for class_id in range(1, 21))
    (root / "classes.txt").write_text(f"0 background\n{classes}")
    for part, class_ids in FOLD_0_CLASSES.items():
        names = [f"{class_id}_{number}" for class_id in class_ids for number in range(pictures_per_class)]
        for seed, name in enumerate(names):
            top, left = (int(value) for value in rng.integers(0, 14, 2))
            label = draw(64, 72, [(int(name.partition("_")[0]), top, left, 48, 48)])
            write_picture(root / "JPEGImages" / f"{name}.jpg", 64, 72, seed=seed)
            write_label(root / "SegmentationClass" / f"{name}.png", label)
        (root / "lists" / f"fold0_{part}.txt").write_text("".join(line(name) + "\n" for name in names))
    return root


class FakeEpisodes:
    """Seven query images of noise, class 1 where a channel is bright: something that can be learnt."""

    def __len__(self) -> int:
        return 7

    def episode(self, pass_index: int, index: int, memory: SampleMemory | None = None) -> Episode:
        images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(100 * pass_index + index))
        labels = (images[:, 0] > 0.3).long()
        return Episode(
            query_image=images[0],
            query_label=labels[0],
            support_images=images[1:],
            support_labels=labels[1:],
            class_id=1 + index % 2,
            query_name=str(index),
            support_names=("support",),
            original_label=labels[0].to(torch.uint8),
        )

    def training_order(self, epoch: int, seed: int) -> list[int]:
        return np.random.default_rng([seed, epoch]).permutation(len(self)).tolist()

    def validation_indices(self, count: int, seed: int, order: Order) -> list[tuple[int, int]]:
        return [(number // len(self), number % len(self)) for number in range(count)]


class FakeMethod(nn.Module):
    """Two convolutions with dropout in between, a loss, and the signature of a few-shot method."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.dropout = nn.Dropout2d(0.5)
        self.decide = nn.Conv2d(8, 2, 1)
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, query: Tensor, supports: Tensor, support_labels: Tensor) -> Tensor:
        shift = (supports * support_labels[:, :, None]).mean(dim=(1, 3, 4))
        return self.decide(self.dropout(torch.relu(self.features(query + shift[:, :, None, None]))))

    def losses(self, batch: TrainingBatch) -> Losses:
        logits = self(batch.query_images, batch.support_images, batch.support_labels)
        main = nn.functional.cross_entropy(logits, batch.query_labels, ignore_index=255)
        return Losses(main, {"main": main})


def fake_config(*overrides: str) -> Config:
    """Ten steps of two episodes (three steps an epoch), validated every five, saved every three."""
    settings = {
        "data": {"batch": 2, "workers": 0},
        "optimiser": {"base_lr": 0.2},
        "schedule": {"iterations": 10},
        "validation": {"every_iterations": 5, "episodes": 4},
        "run": {"checkpoint_every": 3},
    }
    return config_from_plain(settings, overrides)


def fake_run(folder: Path, *overrides: str, method: nn.Module | None = None) -> Run:
    folder.mkdir(exist_ok=True)
    method = method or FakeMethod()
    groups = [ParameterGroup(name="head", params=list(method.parameters()), lr_scale=1.0)]
    config = fake_config(*overrides)
    rule = config.validation
    task = EpisodeTask(FakeEpisodes(), FakeEpisodes(), {1: "one", 2: "two"}, EpisodePlan(rule.episodes, rule.seed))
    return Run(config, Parts(method, groups, task), folder, device=torch.device("cpu"), console=QUIET)


def stop_after(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Every run gets a SIGTERM when that many steps are done."""
    step = Run._step

    def step_and_signal(run: Run, batches: list[DeviceBatch]) -> None:
        step(run, batches)
        if run.state.iteration == iteration:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "_step", step_and_signal)


def require_same_ending(folder: Path, expected: Path) -> None:
    """Weights, momentum and best scores equal to the bit, and the log without a gap or a step told twice."""
    for name in (LAST, BEST):
        found, wanted = load_checkpoint(folder / name), load_checkpoint(expected / name)
        assert found.state == wanted.state
        for key, tensor in wanted.method.items():
            assert torch.equal(found.method[key], tensor), key
        assert found.scaler == wanted.scaler
        for key, state in wanted.optimiser["state"].items():
            assert torch.equal(found.optimiser["state"][key]["momentum_buffer"], state["momentum_buffer"])
    assert told(folder) == told(expected)


def told(folder: Path) -> list[dict[str, object]]:
    """The log without what was measured and without beginnings."""
    lines = [line for line in read_journal(folder / LOG) if line["kind"] != "start"]
    measured = ("step_ms", "seconds", "peak_memory_mb")
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]
