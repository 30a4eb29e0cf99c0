"""What the demo measures of its finished runs: costs, curves, singular values, predictions. Reads run folders; starts no run and
writes nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import svf_fast
from svf_fast.memory import kept_bytes
from svf_fast.reference import convert_naive
from svf_fast.train.assembly import base_rates, build_model, training_sampler, validation_sampler
from svf_fast.train.backbones import build_backbone
from svf_fast.train.checkpoint import load_checkpoint, load_method_state
from svf_fast.train.config import Config
from svf_fast.train.data.episodes import Episode, EpisodeSampler, collate
from svf_fast.train.data.reading import read_image
from svf_fast.train.demo_results import MovedValue, Spectrum, StrategyResult, ValidationPoint
from svf_fast.train.engine import LAST, LOG
from svf_fast.train.evaluation import count, prediction_at_original_size
from svf_fast.train.figures import PredictionRow
from svf_fast.train.journal import read_journal
from svf_fast.train.methods import MetaLearner
from svf_fast.train.methods.baseline import Baseline
from svf_fast.train.tuning import TUNED_STAGES, trainable_counts

_QUIET = Console(quiet=True)  # the runs have shown the check of these files
_TOP = 30  # singular values that the paper's Figure 6 shows


def measure_run(config: Config, folder: Path) -> StrategyResult:
    """Costs and curve of the finished run in `folder`, from its log and from one forward pass of a fresh model."""
    journal = read_journal(folder / LOG)
    steps = [line for line in journal if line["kind"] == "step"]
    validations = [line for line in journal if line["kind"] == "validation"]
    model = build_model(config, pretrained=False)
    rates, counts = base_rates(config, model.groups), trainable_counts(model.method)
    backbone_rate = next((rate for name, rate in rates.items() if name != "head"), None)
    return StrategyResult(
        name=config.tuning.strategy,
        trains=model.strategy.trains,
        head_parameters=counts["head"],
        backbone_parameters=counts["backbone"],
        head_rate=rates["head"],
        backbone_rate=backbone_rate,
        kept_bytes=_kept_bytes(model.method, training_sampler(config, console=_QUIET)),
        step_ms=statistics.median(line["step_ms"] for line in steps),
        training_s=sum(line["step_ms"] for line in steps) / 1000.0,
        validation_s=sum(line["seconds"] for line in validations),
        losses=[line["loss"] for line in steps],
        curve=[ValidationPoint(p["iteration"], p["miou"], p["fb_iou"], p["class_iou"]) for p in validations],
    )


def algorithm1_kept_bytes(config: Config) -> int:
    """Bytes kept for one training episode by the paper's Algorithm 1 and the matrix form of the prior, in the same model."""
    backbone = build_backbone(config.backbone, seed=config.run.seed)
    method = Baseline(backbone, head_width=config.method.head_width, cosine="matrix", seed=config.run.seed)
    for stage in method.stages:
        method.get_submodule(stage).requires_grad_(False)
    convert_naive(method, TUNED_STAGES)
    return _kept_bytes(method, training_sampler(config, console=_QUIET))


def _kept_bytes(method: MetaLearner, sampler: EpisodeSampler) -> int:
    batch = collate([sampler.episode(0, 0)])
    method.train()

    with torch.random.fork_rng(devices=[]):  # dropout must not move the caller's stream
        return kept_bytes(lambda: method.losses(batch).total, owned=method)


def tuned_method(config: Config, folder: Path) -> MetaLearner:
    """The method of a run's last checkpoint, in eval mode."""
    method = build_model(config, pretrained=False).method
    load_method_state(method, load_checkpoint(folder / LAST), folder / LAST)
    return method.eval()


def top_spectra(method: MetaLearner) -> list[Spectrum]:
    """The largest singular values of the last 3×3 and the last 1×1 convolution of layer 3, before and after (Figure 6)."""
    found: list[Spectrum] = []
    pairs = _spectra(method)
    for child, kernel in (("conv2", "3×3"), ("conv3", "1×1")):
        names = sorted(name for name in pairs if name.startswith("layer3.") and name.endswith(child))
        if names:
            before, after = pairs[names[-1]]
            found.append(Spectrum(names[-1], kernel, before[:_TOP].tolist(), after[:_TOP].tolist()))
    return found


def most_moved(method: MetaLearner, amount: int = 8) -> list[MovedValue]:
    """The singular values of all converted convolutions with the largest relative change; those near zero are left out."""
    moved: list[MovedValue] = []
    for layer, (before, after) in _spectra(method).items():
        for index in np.flatnonzero(before > 0.05 * before.max()):
            moved.append(MovedValue(layer, int(index) + 1, float(before[index]), float(after[index])))
    return sorted(moved, key=lambda value: -abs(value.change))[:amount]


def _spectra(method: MetaLearner) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(before, after) of every converted convolution, by name, in the order of falling values before."""
    after = {name: s.detach().double().numpy() for name, s in svf_fast.singular_values(method).items()}
    pairs: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for name, values in after.items():
        module = method.get_submodule(name)
        assert isinstance(module, svf_fast.SVFConv2d)
        before = module.s0.detach().double().numpy()
        order = np.argsort(-before, kind="stable")
        pairs[name] = (before[order], values[order])
    return pairs


def example_rows(config: Config, methods: dict[str, MetaLearner], rows: int) -> list[PredictionRow]:
    """The first validation episode of each novel class, up to `rows` of them, with every method's prediction."""
    sampler = validation_sampler(config, seed=config.validation.seed, console=_QUIET)
    first_of_class: dict[int, Episode] = {}
    rule = config.validation
    for key in sampler.validation_indices(rule.episodes, rule.seed, rule.order):
        episode = sampler.episode(*key)
        first_of_class.setdefault(episode.class_id, episode)
        if len(first_of_class) == min(rows, len(sampler.split.class_ids)):
            break
    return [_example(sampler, first_of_class[class_id], methods) for class_id in sorted(first_of_class)]


@torch.no_grad()
def _example(sampler: EpisodeSampler, episode: Episode, methods: dict[str, MetaLearner]) -> PredictionRow:
    batch = collate([episode])
    root = sampler.split.root
    support, query = read_image(root / episode.support_names[0]), read_image(root / episode.query_name)
    predictions, ious = {}, {}
    for name, method in methods.items():
        logits = method(batch.query_images, batch.support_images, batch.support_labels)[0]
        prediction = prediction_at_original_size(logits, episode.original_label)
        predictions[name] = prediction.numpy()
        ious[name] = float(count(prediction, episode.original_label).iou[1])
    return PredictionRow(
        class_name=sampler.split.class_names[episode.class_id],
        support=support,
        support_mask=_at_size(episode.support_labels[0], support.shape[:2]),
        query=query,
        query_mask=episode.original_label.numpy(),
        predictions=predictions,
        ious=ious,
    )


def _at_size(label: torch.Tensor, size: Sequence[int]) -> NDArray[np.uint8]:
    """The label of a tested picture, which lies in the top-left corner of its square [S, S], at the picture's own size."""
    height, width = size
    side = max(height, width)
    resized = torch.nn.functional.interpolate(label[None, None].float(), (side, side), mode="nearest")[0, 0]
    return resized[:height, :width].to(torch.uint8).numpy()
