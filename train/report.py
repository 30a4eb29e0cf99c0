"""The demo's report: results in, one HTML file with its pictures inside and one JSON file out. Says what was measured and what
it rests on; knows nothing of how a run is made."""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from svf_fast.train.demo_results import DemoResults
from svf_fast.train.figures import Curve, curves, png_bytes, predictions, spectrum
from svf_fast.train.files import write_atomically
from svf_fast.train.html_page import bullets, facts, page, section, table

_MIB = 2**20
_LOSS_WINDOW = 20  # steps that a point of the loss curve is the mean of
_LEAD = (
    "The SVF paper's baseline method, one-shot, meta-trained three times from the same start: backbone frozen, fully tuned, and with only "
    "its singular values tuned. A small run on drawn pictures that shows the whole path; it is no evidence about photographs."
)


def write_report(results: DemoResults, folder: Path) -> Path:
    """Write `report.html` and `results.json` into `folder` and return the first one's path; neither is ever half there."""
    page, data = folder / "report.html", folder / "results.json"
    text = json.dumps(_plain(results), indent=2, ensure_ascii=False) + "\n"
    write_atomically(data, lambda file: file.write(text.encode()))
    html = render(results)
    write_atomically(page, lambda file: file.write(html.encode()))
    return page


def render(results: DemoResults) -> str:
    """The page as text. Raises ValueError when a run has no validation to show."""
    for strategy in results.strategies:
        if not strategy.curve:
            raise ValueError(f"strategies: {strategy.name} has no validation point, expected at least one")
    sections = [
        section("What was measured", _scores_table(results), _reading(results)),
        section(
            "Novel-class mIoU and training loss along the way", _curve_figure(results), _caption_of_curves(results)
        ),
        section("IoU of each novel class at the end", _class_table(results)),
        section("What training costs", _cost_table(results), _cost_note(results)),
        section("Singular values that moved", _spectrum_figure(results), _moved_table(results)),
        section("Predictions", _prediction_figure(results)),
        section("How it was made", bullets(results.notes), facts("Pre-training", results.pretraining)),
        section("Settings and machine", facts("Settings", results.settings), facts("Machine", results.machine)),
    ]
    return page(f"svf-fast demo, seed {results.seed}", "Few-shot segmentation on Shapes-5i", _LEAD, sections)


def _plain(results: DemoResults) -> dict[str, Any]:
    """Everything but the pictures, with derived figures written out."""
    plain = {
        key: value for key, value in vars(results).items() if key not in ("strategies", "spectra", "moved", "examples")
    }
    plain["strategies"] = [
        {**asdict(strategy), "final_miou": strategy.final.miou, "best_miou": strategy.best.miou, "best_step": strategy.best.step}
        for strategy in results.strategies
    ]  # fmt: skip
    plain["spectra"] = [asdict(spectrum) for spectrum in results.spectra]
    plain["moved"] = [{**asdict(value), "change": value.change} for value in results.moved]
    plain["examples"] = [{"class": row.class_name, "iou": row.ious} for row in results.examples]
    return plain


def _scores_table(results: DemoResults) -> str:
    rows = [
        [
            strategy.name,
            strategy.trains,
            _percent(strategy.final.miou),
            _percent(strategy.final.fb_iou),
            f"{_percent(strategy.best.miou)} <small>(step {strategy.best.step})</small>",
            _percent(strategy.best.fb_iou),
        ]
        for strategy in results.strategies
    ]
    head = ["", "of the backbone trains", "final mIoU", "final FB-IoU", "best mIoU", "FB-IoU there"]
    return table(head, rows)


def _reading(results: DemoResults) -> str:
    return (
        f"<p>Per cent. One seed ({results.seed}), one fold, {results.validation_episodes} one-shot episodes of "
        f"{len(results.class_names)} novel classes ({escape(', '.join(results.class_names))}), the same episodes for all three. "
        "Differences between the rows include the chance of this one run: no spread was measured, and nothing here says that a "
        "strategy is better in general. “Best” is chosen on the episodes it is reported on, as the field does, and so flatters "
        "all three.</p>"
    )


def _curve_figure(results: DemoResults) -> str:
    scores = [Curve(s.name, [p.step for p in s.curve], [100 * p.miou for p in s.curve]) for s in results.strategies]
    losses = [Curve(s.name, *_smoothed(s.losses)) for s in results.strategies]
    return _panels(
        _image(curves("mIoU on novel classes, %", scores), "Novel-class mIoU against the training step"),
        _image(curves(f"training loss, mean of {_LOSS_WINDOW} steps", losses), "Training loss against the step"),
    )


def _caption_of_curves(results: DemoResults) -> str:
    return (
        "<p>The first plot is the kind of the paper's Figure 3, which draws mIoU on training classes where the second plot has the "
        "training loss. All three runs start from the same backbone, the same random head and see the same episodes in the same "
        "order.</p>"
    )


def _smoothed(losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of consecutive windows, at the step where each ends."""
    window = max(1, min(_LOSS_WINDOW, len(losses)))
    ends = range(window, len(losses) + 1, window)
    return [float(end) for end in ends], [statistics.fmean(losses[end - window : end]) for end in ends]


def _class_table(results: DemoResults) -> str:
    names = list(results.strategies[0].final.class_iou)
    rows = [[escape(name), *(_percent(s.final.class_iou[name]) for s in results.strategies)] for name in names]
    return table(["class", *(s.name for s in results.strategies)], rows)


def _cost_table(results: DemoResults) -> str:
    rows = [
        [
            strategy.name,
            f"{strategy.backbone_parameters:,}",
            f"{strategy.head_parameters:,}",
            _rate(strategy.head_rate),
            _rate(strategy.backbone_rate),
            f"{strategy.kept_bytes / _MIB:.2f}",
            f"{strategy.step_ms:.0f}",
            f"{strategy.training_s:.0f} + {strategy.validation_s:.0f}",
        ]
        for strategy in results.strategies
    ]
    rows.append(["svf as Algorithm 1", *["–"] * 4, f"{results.algorithm1_kept_bytes / _MIB:.2f}", "–", "–"])
    head = [
        "",
        "trainable, backbone",
        "trainable, head",
        "rate of the head",
        "rate of the backbone",
        "kept for backward, MiB",
        "ms a step (median)",
        "steps + validation, s",
    ]
    return table(head, rows)


def _cost_note(results: DemoResults) -> str:
    return (
        "<p>Kept for backward: bytes of all tensors that autograd holds between forward and backward of one training episode "
        "(one query, one support), parameters left out, each storage counted once. “Algorithm 1” is the paper's pseudo-code with "
        "the released prior: three modules a convolution, plain autograd, the whole cosine matrix; its memory was counted, it was "
        "not trained. Step times are those of the three runs, one after the other, on a machine that may have had other work.</p>"
    )


def _spectrum_figure(results: DemoResults) -> str:
    if not results.spectra:
        return "<p>No convolution of layer 3 was converted.</p>"
    figure = _panels(
        *(
            _image(
                spectrum(f"{layer.layer} ({layer.kernel})", layer.before, layer.after),
                f"Singular values of {layer.layer} before and after tuning",
            )
            for layer in results.spectra
        )
    )
    return figure + (
        "<p>The largest singular values of the last 3×3 and the last 1×1 convolution of layer 3, as in the paper's Figure 6.</p>"
    )


def _moved_table(results: DemoResults) -> str:
    if not results.moved:
        return ""
    rows = [
        [
            escape(value.layer),
            str(value.rank),
            f"{value.before:.4f}",
            f"{value.after:.4f}",
            f"{100 * value.change:+.1f} %",
        ]
        for value in results.moved
    ]
    text = (
        "<p>Of all converted convolutions, the singular values with the largest relative change, those below 5 % of their "
        "layer's largest left out:</p>"
    )
    return text + table(["convolution", "rank", "before", "after", "change"], rows)


def _prediction_figure(results: DemoResults) -> str:
    if not results.examples:
        return "<p>No examples were drawn.</p>"
    figure = _image(predictions(results.examples), "Support, query and the strategies' predictions", is_wide=True)
    return figure + (
        "<p>For each novel class the first episode of the validation order, not chosen by looks. Models are those of the last "
        "step; the IoU is of the one episode.</p>"
    )


def _panels(*images: str) -> str:
    return f"<div class='panels'>{''.join(images)}</div>"


def _image(figure: Figure, description: str, *, is_wide: bool = False) -> str:
    data = base64.b64encode(png_bytes(figure)).decode("ascii")
    picture = f"<img alt='{escape(description, quote=True)}' src='data:image/png;base64,{data}'>"
    return f"<div class='wide'><div class='roomy'>{picture}</div></div>" if is_wide else f"<div>{picture}</div>"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.4g}"
