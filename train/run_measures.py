"""What can be looked at in a finished few-shot run: its method as a checkpoint has it, and predictions on its first validation
episodes. Reads; starts no run, writes nothing and draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from svf_fast.train.assembly import build_model, choose_device, validation_sampler
from svf_fast.train.checkpoint import load_checkpoint, load_method_state
from svf_fast.train.config import Config
from svf_fast.train.data import VOID
from svf_fast.train.data.episodes import Episode, EpisodeSampler, collate
from svf_fast.train.data.reading import read_image, read_label
from svf_fast.train.evaluation import count, prediction_at_original_size
from svf_fast.train.figures import Mask, PredictionRow
from svf_fast.train.methods import MetaLearner
from svf_fast.train.precision import arithmetic

_QUIET = Console(quiet=True)  # the runs have shown the check of these files


def trained_method(config: Config, path: Path) -> MetaLearner:
    """The method of a run's checkpoint on the run's device, in eval mode. FileNotFoundError or CheckpointError, a sentence
    that names the file, where there is none or it is of another model."""
    method = build_model(config, pretrained=False).method
    load_method_state(method, load_checkpoint(path), path)
    return method.eval().to(choose_device(config.run.device))


def validation_episodes(config: Config) -> EpisodeSampler:
    """The episodes that a run is validated on, without a word about their files."""
    return validation_sampler(config, seed=config.validation.seed, console=_QUIET)


def example_rows(config: Config, methods: Mapping[str, MetaLearner], rows: int) -> list[PredictionRow]:
    """The first validation episode of each novel class, up to ``rows`` of them, with every method's prediction."""
    sampler = validation_episodes(config)
    first_of_class: dict[int, Episode] = {}
    rule = config.validation
    for key in sampler.validation_indices(rule.episodes, rule.seed, rule.order):
        episode = sampler.episode(*key)
        first_of_class.setdefault(episode.class_id, episode)
        if len(first_of_class) == min(rows, len(sampler.split.class_ids)):
            break
    return [_example(config, sampler, first_of_class[class_id], methods) for class_id in sorted(first_of_class)]


@torch.no_grad()
def _example(
    config: Config, sampler: EpisodeSampler, episode: Episode, methods: Mapping[str, MetaLearner]
) -> PredictionRow:
    root = sampler.split.root
    predictions, ious = {}, {}
    for name, method in methods.items():
        device = next(method.parameters()).device
        batch = collate([episode]).to(device)
        with arithmetic(config.run.precision, device):
            logits = method(batch.query_images, batch.support_images, batch.support_labels)[0]
        prediction = prediction_at_original_size(logits.cpu(), episode.original_label)
        predictions[name] = prediction.numpy()
        ious[name] = float(count(prediction, episode.original_label).iou[1])
    label_of = {entry.image: entry.label for entry in sampler.split.entries}
    return PredictionRow(
        class_name=sampler.split.class_names[episode.class_id],
        supports=[
            (read_image(root / name), _mask(root / label_of[name], episode.class_id)) for name in episode.support_names
        ],
        query=read_image(root / episode.query_name),
        query_mask=episode.original_label.numpy(),
        predictions=predictions,
        ious=ious,
    )


def _mask(path: Path, class_id: int) -> Mask:
    """Of the label in ``path``, the class as 1, void, 0 all else."""
    label = read_label(path)
    return np.where(label == VOID, VOID, label == class_id).astype(np.uint8)
