"""Plots of few-shot runs as PNG bytes: curves, singular values, predictions. Takes plain numbers and arrays; knows no run, no
file and no HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # [H, W, 3] RGB
Mask = NDArray[np.uint8]  # [H, W]: 0 background, 1 the class, 255 void

# the Okabe–Ito colours, which colour-blind readers can tell apart; markers say it once more
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
_BEFORE, _AFTER = "#9AA5B1", "#009E73"
_INK = "#1F2933"
_DPI = 130
_PANEL_INCHES = (4.8, 3.4)
_SUPPORT_COLOUR, _RIGHT_COLOUR, _PREDICTED_COLOUR = (230, 159, 0), (0, 158, 115), (213, 94, 0)


@dataclass(frozen=True)
class Curve:
    """One line of a plot: a name and its points, steps ascending."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class PredictionRow:
    """One episode: support and query with their masks, and the prediction [H, W] (0 or 1) of each strategy, by name."""

    class_name: str
    support: Picture
    support_mask: Mask
    query: Picture
    query_mask: Mask
    predictions: dict[str, Mask]
    ious: dict[str, float]  # fractions, of this episode alone


def curves(y_label: str, lines: Sequence[Curve], *, x_label: str = "training step") -> bytes:
    """One plot; a curve's colour and marker go by its position, so that plots of the same runs agree."""
    figure = _figure(*_PANEL_INCHES)
    axes = figure.add_subplot()
    for curve, (colour, marker) in zip(lines, _STYLES, strict=False):
        is_sparse = len(curve.steps) <= 40
        axes.plot(curve.steps, curve.values, color=colour, marker=marker if is_sparse else None, ms=4, label=curve.name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return _finish(figure, axes)


def spectrum(title: str, before: Sequence[float], after: Sequence[float]) -> bytes:
    """Singular values of one layer before and after tuning, in the order they had before."""
    figure = _figure(*_PANEL_INCHES)
    axes = figure.add_subplot()
    ranks = np.arange(1, len(before) + 1)
    axes.bar(ranks - 0.2, before, 0.4, color=_BEFORE, label="before")
    axes.bar(ranks + 0.2, after, 0.4, color=_AFTER, label="after")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("rank before tuning")
    axes.set_ylabel("singular value")
    return _finish(figure, axes)


def predictions(rows: Sequence[PredictionRow]) -> bytes:
    """A grid: support, query with its label, then each strategy's prediction with its IoU under it."""
    names = list(rows[0].predictions)
    figure = _figure(1.75 * (2 + len(names)), 1.95 * len(rows))
    grid = figure.subplots(len(rows), 2 + len(names), squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        support = _overlay(row.support, row.support_mask == 1, _SUPPORT_COLOUR)
        truth = _overlay(row.query, row.query_mask == 1, _RIGHT_COLOUR)
        cells = [(support, f"support: {row.class_name}"), (truth, "query, label")]
        for name in names:
            shown = _overlay(row.query, row.predictions[name] == 1, _PREDICTED_COLOUR)
            cells.append((shown, f"{name}: IoU {100 * row.ious[name]:.0f} %"))
        for axes, (picture, title) in zip(line, cells, strict=True):
            axes.imshow(picture)
            axes.set_title(title, fontsize=8, color=_INK)
            axes.set_axis_off()
    return _png(figure)


def _overlay(picture: Picture, inside: NDArray[np.bool_], colour: tuple[int, int, int]) -> Picture:
    """The picture, greyed a little outside the region, which is tinted and outlined."""
    grey = np.repeat(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    shown = (0.55 * grey + 0.45 * picture).astype(np.uint8)
    shown[inside] = (0.55 * picture[inside] + 0.45 * np.array(colour)).astype(np.uint8)
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.ascontiguousarray(shown), outlines, -1, colour, 1), dtype=np.uint8)


def _figure(width_inches: float, height_inches: float) -> Figure:
    # not pyplot: it keeps global state and picks a window system
    return Figure(figsize=(width_inches, height_inches), dpi=_DPI, layout="constrained")


def _finish(figure: Figure, axes: Axes) -> bytes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#E4E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
