"""What the two stages of training differ in, as the engine sees it: which samples there are, how a batch becomes a loss,
and how the model is judged. Here the protocol and the few-shot methods' task; the base learner's has its own file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svf_fast.train.batches import EpisodeSource, SampleKey, TrainingSource, load_ahead
from svf_fast.train.data.episodes import EpisodeBatch, collate
from svf_fast.train.distributed import ALONE, Processes
from svf_fast.train.methods import Losses, MetaLearner
from svf_fast.train.methods.losses import IGNORED_LABEL
from svf_fast.train.validation import EpisodePlan, Scores, validate

Watch = Callable[[int, int], None]  # how many of how many are done; what it raises ends the validation


def count_scored(labels: Tensor) -> int:
    """Pixels of labels [B, S, S] that are not void."""
    return int((labels != IGNORED_LABEL).sum())


class DeviceBatch(Protocol):
    """Samples stacked, which a device can take."""

    def to(self, device: torch.device) -> Any: ...


@dataclass(frozen=True)
class Judgement:
    """A validation's outcome: ``miou`` decides which model is best, ``values`` go to the log, ``sentence`` to people."""

    miou: float
    values: dict[str, Any]
    sentence: str


class Task(Protocol):
    """One stage's training. ``judged`` is how many samples a validation looks at."""

    @property
    def training(self) -> TrainingSource: ...

    @property
    def judged(self) -> int: ...

    def load(self, keys: Iterable[tuple[SampleKey, ...]], workers: int) -> Generator[DeviceBatch, None, None]: ...

    def losses(self, method: nn.Module, batch: Any) -> Losses: ...

    def scored_pixels(self, batch: Any) -> int:
        """How many pixels the losses of a batch are means over."""

    def judge(
        self, method: nn.Module, *, workers: int, device: torch.device, watch: Watch, processes: Processes
    ) -> Judgement: ...


@dataclass(frozen=True)
class SeenClasses:
    """Episodes of the training list under the test transform, and the classes that they ask for."""

    source: EpisodeSource
    class_ids: tuple[int, ...]
    plan: EpisodePlan


@dataclass(frozen=True)
class EpisodeTask:
    """Meta-training on episodes of the base classes, judged on the episodes of the novel ones that ``plan`` names.
    ``class_names`` are those of the novel classes, by id. With ``seen`` the model is also tried on episodes of the base
    classes, which decide nothing: they show how far training has fitted its own classes (the paper's figures 2 and 3)."""

    training: EpisodeSource
    validation: EpisodeSource
    class_names: dict[int, str]
    plan: EpisodePlan
    seen: SeenClasses | None = None

    @property
    def judged(self) -> int:
        return self.plan.episodes + (0 if self.seen is None else self.seen.plan.episodes)

    def load(self, keys: Iterable[tuple[SampleKey, ...]], workers: int) -> Generator[EpisodeBatch, None, None]:
        return load_ahead(self.training.episode, collate, keys, workers=workers)

    def losses(self, method: MetaLearner, batch: EpisodeBatch) -> Losses:
        return method.losses(batch)

    def scored_pixels(self, batch: EpisodeBatch) -> int:
        return count_scored(batch.query_labels)

    def judge(
        self,
        method: MetaLearner,
        *,
        workers: int,
        device: torch.device,
        watch: Watch,
        processes: Processes = ALONE,
    ) -> Judgement:
        def scores_of(source: EpisodeSource, class_ids: tuple[int, ...], plan: EpisodePlan, before: int) -> Scores:
            return validate(
                method,
                source,
                class_ids,
                plan,
                workers=workers,
                device=device,
                watch=lambda done, _: watch(before + done, self.judged),
                processes=processes,
            )

        scores = scores_of(self.validation, tuple(self.class_names), self.plan, 0)
        values: dict[str, Any] = {
            "miou": scores.miou,
            "fb_iou": scores.fb_iou,
            "foreground_iou": scores.foreground_iou,
            "class_iou": {self.class_names[class_id]: iou for class_id, iou in scores.class_iou.items()},
            "episodes": scores.episodes,
            "seed": scores.seed,
        }
        if scores.branches is not None:
            values["branches"] = vars(scores.branches)
        if self.seen is not None:
            seen = scores_of(self.seen.source, self.seen.class_ids, self.seen.plan, self.plan.episodes)
            values |= {"training_miou": seen.miou, "training_fb_iou": seen.fb_iou}
        return Judgement(scores.miou, values, f"validation mIoU {scores.miou:.4f}, FB-IoU {scores.fb_iou:.4f}")
