"""What a run of the demo has cost, and its curve: from its log, and from one forward pass of a fresh model. Reads run folders;
starts no run and writes nothing."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from rich.console import Console

from svf_fast.memory import kept_bytes
from svf_fast.reference import convert_naive
from svf_fast.train.assembly import base_rates, build_model, training_sampler
from svf_fast.train.backbones import build_backbone
from svf_fast.train.config import Config
from svf_fast.train.data.episodes import EpisodeSampler, collate
from svf_fast.train.demo_results import StrategyResult, ValidationPoint
from svf_fast.train.engine import LOG
from svf_fast.train.journal import read_journal
from svf_fast.train.methods import MetaLearner
from svf_fast.train.methods.baseline import Baseline
from svf_fast.train.tuning import TUNED_STAGES, trainable_counts

_QUIET = Console(quiet=True)  # the runs have shown the check of these files


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
