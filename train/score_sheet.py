"""What an evaluation found, as plain data for files and other programs, and as a table for people. Takes finished
scores; runs nothing."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from svf_fast.train.files import write_atomically
from svf_fast.train.generalised import GeneralisedScores
from svf_fast.train.judging import Evaluation, GeneralisedEvaluation
from svf_fast.train.provenance import describe_device, describe_machine
from svf_fast.train.schema import PlainData
from svf_fast.train.validation import Scores

FORMAT = "svf_fast evaluation"
VERSION = 1
# The figures of each kind of evaluation, by the scores' own names, and what they are called.
NOVEL_FIGURES = {"miou": "mIoU", "fb_iou": "FB-IoU", "foreground_iou": "foreground IoU"}
BRANCH_FIGURES = {
    "meta_miou": "meta branch mIoU",
    "meta_fb_iou": "meta branch FB-IoU",
    "base_miou": "base branch mIoU",
}
GENERALISED_FIGURES = {
    "novel_miou": "mIoU novel",
    "base_miou": "mIoU base",
    "miou": "mIoU all",
    "fb_iou": "FB-IoU",
}
TITLES = {"novel": NOVEL_FIGURES | BRANCH_FIGURES, "generalised": GENERALISED_FIGURES}
SPREAD = "sample standard deviation over the seeds (n - 1)"


def score_sheet(evaluation: Evaluation | GeneralisedEvaluation) -> PlainData:
    """Everything about an evaluation as JSON holds it: per seed the figures and each class's IoU (fractions) and number of
    episodes, their mean and ``spread`` (None for one seed), and what was evaluated, how, with what and when.

    ``protocol.kind`` is "novel" or "generalised". A base class has no number of episodes: none asks for one.
    """
    origin, scores = evaluation.origin, evaluation.scores
    config, rule = origin.config, origin.config.validation
    is_generalised = isinstance(evaluation, GeneralisedEvaluation)
    protocol: PlainData = {
        "kind": "generalised" if is_generalised else "novel",
        "seeds": [score.seed for score in scores],
        "episodes": rule.episodes,
        "order": rule.order,
        "batch": rule.batch,
        "shots": rule.shots or config.data.shots,
    }
    if isinstance(evaluation, GeneralisedEvaluation):
        protocol |= {"tau": evaluation.tau, "rule": evaluation.rule}
    per_seed = [_of_seed(score, evaluation.class_names) for score in scores]
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": {"path": str(origin.checkpoint), "sha256": origin.sha256, "iteration": origin.iteration},
        "protocol": protocol,
        "data": {"root": config.data.root, "list": str(origin.list_file), "digest": origin.data},
        "per_seed": per_seed,
        "mean": _over_seeds(statistics.mean, per_seed),
        "spread": _over_seeds(statistics.stdev, per_seed) if len(per_seed) > 1 else None,
        "spread_is": SPREAD,
        "settings": config.to_plain(),
        "machine": {**describe_machine(), "device": describe_device(origin.device)},
    }


def score_table(sheet: PlainData) -> str:
    """The scores of a sheet in per cent: the classes, then the figures, one column a seed; below them what to know."""
    titles = TITLES[sheet["protocol"]["kind"]]
    per_seed, mean, spread = sheet["per_seed"], sheet["mean"], sheet["spread"]
    names = [*(row["name"] for row in mean["classes"]), *(titles[key] for key in mean["figures"])]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{'seed ' + str(scores['seed']):>12}" for scores in per_seed)]
    for name, *values in zip(names, *map(_percentages, per_seed), strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{value:12.2f}" for value in values))
    if spread is not None:
        both = zip(_percentages(mean), _percentages(spread), strict=True)
        lines[1:] = [
            f"{line}   mean {middle:6.2f} ± {deviation:.2f}"
            for line, (middle, deviation) in zip(lines[1:], both, strict=True)
        ]
    absent = [
        rows[0]["name"]
        for rows in zip(*(scores["classes"] for scores in per_seed), strict=True)
        if any(row["episodes"] == 0 for row in rows)
    ]
    if absent:
        lines.append(f"without an episode under some seed, and counted as 0 there: {', '.join(absent)}")
    if spread is not None:
        lines.append(f"±: {sheet['spread_is']}")
    return "\n".join(lines)


def require_place(path: Path) -> None:
    """ValueError where :func:`write_score_sheet` could not write: to be asked before long work."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a JSON file to write")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: {path.parent} is not a folder")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: the folder {path.parent} takes no new files")


def write_score_sheet(path: Path, sheet: PlainData) -> None:
    """A sheet as JSON, in the place of what stood there; whole or not at all."""
    text = json.dumps(sheet, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _of_seed(scores: Scores | GeneralisedScores, class_names: dict[int, str]) -> PlainData:
    holders: list[tuple[dict[str, str], object]]
    if isinstance(scores, GeneralisedScores):
        holders = [(GENERALISED_FIGURES, scores)]
    else:
        holders = [(NOVEL_FIGURES, scores)]
        if scores.branches is not None:
            holders.append((BRANCH_FIGURES, scores.branches))
    return {
        "seed": scores.seed,
        "episodes": scores.episodes,
        "figures": {key: getattr(holder, key) for figures, holder in holders for key in figures},
        "classes": [
            {"id": class_id, "name": class_names[class_id], "iou": iou, "episodes": scores.class_episodes.get(class_id)}
            for class_id, iou in scores.class_iou.items()
        ],
    }


def _over_seeds(figure: Callable[[Sequence[float]], float], per_seed: Sequence[PlainData]) -> PlainData:
    """``figure`` of each value's column over the seeds."""
    return {
        "figures": {key: figure([scores["figures"][key] for scores in per_seed]) for key in per_seed[0]["figures"]},
        "classes": [
            {"id": rows[0]["id"], "name": rows[0]["name"], "iou": figure([row["iou"] for row in rows])}
            for rows in zip(*(scores["classes"] for scores in per_seed), strict=True)
        ],
    }


def _percentages(part: PlainData) -> list[float]:
    return [100 * value for value in (*(row["iou"] for row in part["classes"]), *part["figures"].values())]
