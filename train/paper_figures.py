"""The paper's figures from finished runs: which runs each one takes, what it draws of them, its caption and its numbers. Starts
no run; knows nothing of how runs are arranged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from svf_fast.train import figures
from svf_fast.train.config import Config
from svf_fast.train.cues import CueStudy, study_cues
from svf_fast.train.data.reading import read_image
from svf_fast.train.engine import BEST, LOG
from svf_fast.train.files import write_atomically
from svf_fast.train.journal import read_journal
from svf_fast.train.methods import MetaLearner
from svf_fast.train.progress import WorkProgress
from svf_fast.train.run_measures import example_rows, trained_method, validation_episodes
from svf_fast.train.spectra import NEAR_ZERO, TOP, MovedValue, last_convolution, top_spectra

CUE_PICTURES = 100  # that the preferences of cues are measured on
CUE_ROWS = 4  # pictures shown
CUE_AMOUNT = 3  # cues that fell, and that rose
EXAMPLES = 5  # novel classes of which predictions are shown

# what runs have in common whose scores or predictions stand side by side
_SAME_EPISODES = (
    "data.root",
    "data.folds",
    "data.fold",
    "data.val_list",
    "data.shots",
    "validation.shots",
    "validation.seed",
    "validation.order",
)


@dataclass(frozen=True)
class FinishedRun:
    """A run as a figure names it, its settings, and its folder, which holds best.pt, last.pt and log.jsonl."""

    label: str
    config: Config
    folder: Path


@dataclass(frozen=True)
class Drawing:
    """A figure, what is to be said under it, and the numbers that it shows."""

    figure: Figure
    caption: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class PaperFigure:
    """One figure: the ``name`` of its files, and in ``expects`` which runs it takes, a sentence."""

    name: str
    expects: str
    make: Callable[[Sequence[FinishedRun], WorkProgress], Drawing]

    def draw(self, runs: Sequence[FinishedRun], out: Path, *, console: Console | None = None) -> list[Path]:
        """Write the figure as .pdf and .png and its caption and numbers as .json into the folder ``out``, each file whole or not
        at all, and return the paths; ``console`` shows long work.

        ValueError, one sentence, when the runs do not fit; FileNotFoundError or CheckpointError when a run's file is missing or
        of no use. Nothing is written then.
        """
        labels = [run.label for run in runs]
        if not runs or len(set(labels)) < len(labels):
            raise ValueError(
                f"{self.name}: the runs are {labels}, expected one or more, each label once: {self.expects}"
            )
        try:
            with WorkProgress(console or Console(quiet=True)) as progress:
                drawing = self.make(runs, progress)
        except _Unfit as error:
            raise ValueError(f"{self.name}: {error}; it takes {self.expects}") from None
        out.mkdir(parents=True, exist_ok=True)
        beside = out / f"{self.name}.json"
        facts = {"figure": self.name, "caption": drawing.caption, "runs": labels, **drawing.numbers}
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        write_atomically(beside, lambda file: file.write(text.encode()))
        return [*figures.save(drawing.figure, out / self.name), beside]


class _Unfit(ValueError):
    """Runs that a figure does not take; the message is a clause that says why."""


def _curves(runs: Sequence[FinishedRun], method: str) -> Drawing:
    for run in runs:
        if run.config.method.name != method:
            raise _Unfit(f"run {run.label!r} is of {run.config.method.name}")
    _require_same(runs, (*_SAME_EPISODES, "validation.episodes"))
    panels, numbers = [], {}
    for run in runs:
        validations = _judged_on_both(run)
        steps = [line["iteration"] for line in validations]
        scores = {key: [line[key] for line in validations] for key in ("training_miou", "miou")}
        names = {"training_miou": "training (base classes)", "miou": "validation (novel classes)"}
        lines = [figures.Curve(names[key], steps, [100 * score for score in scores[key]]) for key in names]
        panels.append((run.label, lines))
        numbers[run.label] = {"steps": steps, **scores}
    caption = (
        f"mIoU (%) of {method} along the way, fold {runs[0].config.data.fold}, by what of the backbone trains: on training episodes "
        "(base classes, pictures of the training list under the test transform, without augmentation) and on validation episodes "
        "(novel classes). Written out: the highest point of each curve, which for validation is the model that is kept."
    )
    return Drawing(figures.curve_panels("mIoU, %", panels), caption, {"curves": numbers})


def _judged_on_both(run: FinishedRun) -> list[dict[str, Any]]:
    """The validations in a run's log, which were on training episodes too."""
    log = run.folder / LOG
    validations = [line for line in read_journal(log) if line["kind"] == "validation"]
    if not validations:
        raise _Unfit(f"run {run.label!r} has no validation in {log}")
    without = sum("training_miou" not in line for line in validations)
    if without:
        raise _Unfit(
            f"run {run.label!r} has no training mIoU in {without} of the {len(validations)} validations of {log}, "
            "because validation.training_episodes was 0"
        )
    return validations


def _cues(runs: Sequence[FinishedRun], progress: WorkProgress, kernel: str) -> Drawing:
    run, method = _svf_run(runs)
    config, rule = run.config, run.config.validation
    found = last_convolution(method, "layer3", kernel)
    if found is None:
        raise _Unfit(
            f"run {run.label!r} has a {config.backbone.architecture} without a converted {kernel} convolution in layer 3"
        )
    name, layer = found
    source = validation_episodes(config)
    study = study_cues(
        method,
        name,
        layer,
        source,
        rule.order,
        pictures=CUE_PICTURES,
        shown=CUE_ROWS,
        amount=CUE_AMOUNT,
        watch=progress.watch("cues"),
    )
    fell, rose = _verbs(study)
    groups = [
        figures.CueGroup(
            f"({letter}) singular value {verb}\nobject {_spread(study.of(cues))}",
            [_heading(study, cue) for cue in cues],
        )
        for letter, verb, cues in (("a", fell, study.fallen), ("b", rose, study.risen))
    ]
    rows = [
        figures.CueRow(
            class_name=source.split.class_names[shown.episode.class_id],
            picture=read_image(source.split.root / shown.episode.query_name),
            mask=shown.episode.original_label.numpy(),
            responses=shown.responses,
        )
        for shown in study.shown
    ]
    note = (
        "“Object”: the share of a response that lies on the outlined object over the object’s share of the picture (1: no preference); "
        f"means of {len(study.preferences)}\nvalidation pictures, ± standard deviation."
    )
    drawn = figures.cue_maps(groups, rows, "magnitude of the cue’s response over its maximum in the picture", note)
    return Drawing(drawn, _cue_caption(study, name, kernel), _cue_numbers(study, name))


def _verbs(study: CueStudy) -> tuple[str, str]:
    """What the two groups of cues did."""
    fell = "fell most" if study.fallen[0].change < 0 else "rose least (none fell)"
    rose = "rose most" if study.risen[0].change > 0 else "fell least (none rose)"
    return fell, rose


def _heading(study: CueStudy, cue: MovedValue) -> str:
    return (
        f"rank {cue.rank}, {100 * cue.change:+.1f} %\n"
        f"s: {cue.before:.4g} → {cue.after:.4g}\n"
        f"object {study.of([cue]).mean():.2f}"
    ).replace("-", "−")


def _cue_caption(study: CueStudy, name: str, kernel: str) -> str:
    fallen, risen = study.of(study.fallen), study.of(study.risen)
    fell, rose = _verbs(study)
    return (
        f"Segmentation cues of the last {kernel} convolution of layer 3 ({name}) whose singular values (a) {fell} and (b) {rose}, "
        f"relative to the value before; those that began below {100 * NEAR_ZERO:.0f} % of the layer’s largest are left out, "
        f"{len(study.cues)} remain. Shown for the first validation picture of {len(study.shown)} novel classes, the object outlined: "
        "the magnitude of uᵢᵀy = sᵢzᵢ, where y = U diag(s) Vᵀx is the convolution’s output without BatchNorm, divided by its maximum "
        f"over the picture. Over {len(study.preferences)} validation pictures the share of the response that lies on the object, "
        f"divided by the object’s share of the picture (1: no preference), is {_spread(fallen)} for (a), {_spread(risen)} for (b) and "
        f"{_spread(study.of(study.cues))} for all {len(study.cues)} cues (mean ± standard deviation over pictures); picture by picture "
        f"(b) − (a) is {_spread(risen - fallen)}. Rank correlation over all cues of relative change and preference: "
        f"{round(study.rank_correlation, 2) + 0.0:+.2f}."
    ).replace("-", "−")


def _cue_numbers(study: CueStudy, name: str) -> dict[str, Any]:
    def told(cue: MovedValue) -> dict[str, Any]:
        return {**asdict(cue), "change": cue.change, "object_preference": _moments(study.of([cue]))}

    fallen, risen = study.of(study.fallen), study.of(study.risen)
    return {
        "layer": name,
        "pictures": len(study.preferences),
        "left_out_below": NEAR_ZERO,
        "cues": len(study.cues),
        "fallen": {"object_preference": _moments(fallen), "cues": [told(cue) for cue in study.fallen]},
        "risen": {"object_preference": _moments(risen), "cues": [told(cue) for cue in study.risen]},
        "all": {"object_preference": _moments(study.of(study.cues))},
        "risen_minus_fallen": _moments(risen - fallen),
        "rank_correlation": study.rank_correlation,
    }


def _spectra(runs: Sequence[FinishedRun]) -> Drawing:
    spectra = top_spectra(_svf_run(runs)[1])[::-1]
    panels = [(f"last {s.kernel} convolution, {s.layer}", s.before, s.after) for s in spectra]
    caption = (
        f"The {TOP} largest singular values of the last {' and the last '.join(s.kernel for s in spectra)} convolution of layer 3 "
        "before and after tuning, in the order they had before."
    )
    return Drawing(figures.spectrum_panels(panels), caption, {"spectra": [asdict(spectrum) for spectrum in spectra]})


def _predictions(runs: Sequence[FinishedRun]) -> Drawing:
    _require_same(runs, (*_SAME_EPISODES, "data.size", "run.precision"))
    methods = {run.label: trained_method(run.config, run.folder / BEST) for run in runs}
    rows = example_rows(runs[0].config, methods, EXAMPLES)
    caption = (
        "Supports, query with its label, and predictions on the first validation episode of each novel class, not chosen by looks. "
        "Models are those of the best validation; the IoU is of the one episode."
    )
    return Drawing(
        figures.predictions(rows), caption, {"examples": [{"class": row.class_name, "iou": row.ious} for row in rows]}
    )


def _svf_run(runs: Sequence[FinishedRun]) -> tuple[FinishedRun, MetaLearner]:
    """The one run, and its best method."""
    if len(runs) > 1:
        raise _Unfit(f"there are {len(runs)} runs ({', '.join(run.label for run in runs)})")
    (run,) = runs
    tuning = run.config.tuning
    if tuning.strategy != "svf":
        raise _Unfit(f"run {run.label!r} has tuning.strategy={tuning.strategy}")
    if tuning.subspaces not in (None, ("S",)):
        # a factor that has trained is no longer orthonormal, nor the pre-trained one
        raise _Unfit(f"run {run.label!r} has tuning.subspaces={','.join(tuning.subspaces)}")
    if tuning.stages is not None and "layer3" not in tuning.stages:
        raise _Unfit(f"run {run.label!r} has tuning.stages={','.join(tuning.stages)}, without layer 3")
    return run, trained_method(run.config, run.folder / BEST)


def _require_same(runs: Sequence[FinishedRun], keys: Sequence[str]) -> None:
    for run in runs[1:]:
        for key in keys:
            first, other = (_setting(each.config, key) for each in (runs[0], run))
            if first != other:
                raise _Unfit(f"{key} is {first} in run {runs[0].label!r} and {other} in run {run.label!r}")


def _setting(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _moments(values: NDArray[np.float64]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None for the latter of one value."""
    return {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else None}


def _spread(values: NDArray[np.float64]) -> str:
    found = _moments(values)
    return f"{found['mean']:.2f}" + ("" if found["sd"] is None else f" ± {found['sd']:.2f}")


_CUE_RUN = "one run of tuning.strategy=svf, its singular values alone trained, layer 3 among its stages"

FIGURES: dict[str, PaperFigure] = {
    "2": PaperFigure(
        "figure2",
        "runs of pfenet on one fold with validation.training_episodes above 0, a panel each in their order (the paper's: freeze, "
        "full, svf)",
        lambda runs, _: _curves(runs, "pfenet"),
    ),
    "3": PaperFigure(
        "figure3",
        "runs of baseline on one fold with validation.training_episodes above 0, a panel each in their order (the paper's: freeze, full, "
        "full of the 1×1 convolutions, svf)",
        lambda runs, _: _curves(runs, "baseline"),
    ),
    "4": PaperFigure("figure4", _CUE_RUN, lambda runs, progress: _cues(runs, progress, "3×3")),
    "5": PaperFigure("figure5", f"{_CUE_RUN}, on a ResNet", lambda runs, progress: _cues(runs, progress, "1×1")),
    "6": PaperFigure("figure6", _CUE_RUN, lambda runs, _: _spectra(runs)),
    "predictions": PaperFigure(
        "predictions",
        "runs of the same validation episodes, a column each in their order",
        lambda runs, _: _predictions(runs),
    ),
}
