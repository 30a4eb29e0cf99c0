"""Plots of few-shot runs as Matplotlib figures in one style, and their files: curves, singular values, predictions, cues. Takes
plain numbers and arrays; knows no run and no HTML."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps, patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from numpy.typing import NDArray

from svf_fast.train.files import write_atomically

Picture = NDArray[np.uint8]  # [H, W, 3] RGB
Mask = NDArray[np.uint8]  # [H, W]: 0 background, 1 the class, 255 void

# the Okabe–Ito colours, which colour-blind readers can tell apart; markers say it once more
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
_BEFORE, _AFTER = "#BCC5CE", "#009E73"  # they differ in lightness too
_INK = "#1F2933"
_SUPPORT_COLOUR, _RIGHT_COLOUR, _PREDICTED_COLOUR = (230, 159, 0), (0, 158, 115), (213, 94, 0)
_SCREEN_DPI, _PRINT_DPI = 130, 300
_PANEL_INCHES = (4.8, 3.4)
_PAGE_INCHES = 7.0  # width of a figure across a printed page, whose smallest letters are then 6.5 pt
_PANELS_A_ROW = 4
_SUPPORT_TILE = 240  # pixels, of several supports in one cell
_RESPONSE_COLOURS = "magma"  # its lightness rises with the value


@dataclass(frozen=True)
class Curve:
    """One line of a plot: a name and its points, steps ascending."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class PredictionRow:
    """One episode: supports and query with their masks, and the prediction [H, W] (0 or 1) of each strategy, by name."""

    class_name: str
    supports: Sequence[tuple[Picture, Mask]]
    query: Picture
    query_mask: Mask
    predictions: dict[str, Mask]
    ious: dict[str, float]  # fractions, of this episode alone


@dataclass(frozen=True)
class CueGroup:
    """Cues under one title, and a heading of a few short lines for each."""

    title: str
    headings: Sequence[str]


@dataclass(frozen=True)
class CueRow:
    """A picture with its object's mask, and each cue's response there [H, W], 0 to 1, in the order of the groups."""

    class_name: str
    picture: Picture
    mask: Mask
    responses: Sequence[NDArray[np.float32]]


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file for a screen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` with the endings .pdf (its letters are text, its fonts inside) and .png for print, each whole or not at
    all; equal figures give equal bytes."""
    # a PDF would hold the time otherwise
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (("pdf", {"CreationDate": None}), ("png", {}))
    written = []
    for kind, metadata in kinds:
        written.append(path.with_name(f"{path.name}.{kind}"))
        draw = partial(figure.savefig, format=kind, dpi=_PRINT_DPI, facecolor="white", metadata=metadata)
        # 42: TrueType, which editors and publishers take; Matplotlib's default, Type 3, many do not
        with rc_context({"pdf.fonttype": 42}):
            write_atomically(written[-1], draw)
    return written


def curves(y_label: str, lines: Sequence[Curve], *, x_label: str = "training step") -> Figure:
    """One plot; a curve's colour and marker go by its position, so that plots of the same runs agree."""
    figure = _figure(*_PANEL_INCHES)
    axes = figure.add_subplot()
    _draw_curves(axes, lines)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _finish(axes)
    return figure


def curve_panels(
    y_label: str, panels: Sequence[tuple[str, Sequence[Curve]]], *, x_label: str = "training step"
) -> Figure:
    """A plot for each (title, curves), side by side under one legend, all on one y axis. Every panel has curves of the same
    names; the highest point of each curve is written out."""
    columns = min(len(panels), _PANELS_A_ROW)
    rows = math.ceil(len(panels) / columns)
    width = min(_PAGE_INCHES, 2.6 * columns)
    figure = _figure(width, 0.35 + 2.1 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for number, (axes, (title, lines)) in enumerate(zip(grid.flat, panels, strict=False)):
        _draw_curves(axes, lines)
        for curve, (colour, _) in zip(lines, _STYLES, strict=False):
            _mark_highest(axes, curve, colour)
        axes.set_title(f"({chr(ord('a') + number)}) {title}", fontsize=8.5, color=_INK)
        axes.set_xlabel(x_label, fontsize=8)
        axes.margins(x=0.08)
        if number % columns == 0:
            axes.set_ylabel(y_label, fontsize=8)
        _clear(axes, tick_size=7.5)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    highest = max(max(curve.values) for _, lines in panels for curve in lines)
    grid.flat[0].set_ylim(0, 1.15 * highest if highest else 1)  # room for the figures at the highest points
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=8)
    return figure


def spectrum(title: str, before: Sequence[float], after: Sequence[float]) -> Figure:
    """Singular values of one layer before and after tuning, in the order they had before."""
    figure = _figure(*_PANEL_INCHES)
    axes = figure.add_subplot()
    _draw_spectrum(axes, before, after, label_size=10)
    axes.set_title(title, fontsize=10)
    _finish(axes)
    return figure


def spectrum_panels(panels: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Figure:
    """As ``spectrum``, a plot for each (title, before, after) side by side; layers differ in scale, so each has its own y axis."""
    figure = _figure(_PAGE_INCHES * len(panels) / 2, 2.3)
    for number, (axes, (title, before, after)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)
    ):
        _draw_spectrum(axes, before, after, label_size=8)
        axes.set_title(f"({chr(ord('a') + number)}) {title}", fontsize=8.5, color=_INK)
        _clear(axes, tick_size=7.5)
        axes.legend(frameon=False, fontsize=8)
    return figure


def predictions(rows: Sequence[PredictionRow]) -> Figure:
    """A grid: supports (several share a cell), query with its label, then each strategy's prediction with its IoU over it."""
    names = list(rows[0].predictions)
    figure = _figure(1.75 * (2 + len(names)), 1.95 * len(rows))
    grid = figure.subplots(len(rows), 2 + len(names), squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        supports = [_overlay(picture, mask == 1, _SUPPORT_COLOUR) for picture, mask in row.supports]
        truth = _overlay(row.query, row.query_mask == 1, _RIGHT_COLOUR)
        said = "support" if len(supports) == 1 else f"{len(supports)} supports"
        cells = [(_collage(supports), f"{said}: {row.class_name}"), (truth, "query, label")]
        for name in names:
            shown = _overlay(row.query, row.predictions[name] == 1, _PREDICTED_COLOUR)
            cells.append((shown, f"{name}: IoU {100 * row.ious[name]:.0f} %"))
        for axes, (picture, title) in zip(line, cells, strict=True):
            axes.imshow(picture)
            axes.set_title(title, fontsize=8, color=_INK)
            axes.set_axis_off()
    return figure


def cue_maps(groups: Sequence[CueGroup], rows: Sequence[CueRow], scale: str, note: str) -> Figure:
    """A grid: each row's picture with its object outlined, then the cues' responses over it, group by group. ``scale`` names
    what the colours stand for, ``note`` says what the figures in titles and headings are; a title is one or two lines."""
    counts = [1, *(len(group.headings) for group in groups)]
    # inches; the layout engines do not centre a title over some of the columns
    gap, margin, above, below = 0.16, 0.16, 0.8, 0.6
    cell = min((_PAGE_INCHES - margin - gap * len(groups)) / sum(counts), 1.1)
    # a cell is as wide as high for an upright picture, and lower for others
    row_heights = [cell * min(1.0, row.picture.shape[0] / row.picture.shape[1]) for row in rows]
    height = above + sum(row_heights) + below
    figure = Figure(figsize=(_PAGE_INCHES, height), dpi=_SCREEN_DPI)
    lefts = [
        margin + cell * column + gap * group for column, group in enumerate(np.repeat(np.arange(len(counts)), counts))
    ]

    def place(left: float, top: float, width: float, high: float) -> Axes:
        return figure.add_axes((left / _PAGE_INCHES, 1 - (top + high) / height, width / _PAGE_INCHES, high / height))

    def write(left: float, top: float, text: str, size: float, **options: Any) -> None:
        figure.text(left / _PAGE_INCHES, 1 - top / height, text, fontsize=size, color=_INK, **options)

    headings = ["", *(heading for group in groups for heading in group.headings)]
    for number, (row, row_height) in enumerate(zip(rows, row_heights, strict=True)):
        top = above + sum(row_heights[:number])
        write(margin / 2, top + row_height / 2, row.class_name, 6.5, rotation=90, ha="center", va="center")
        shown = [row.picture, *(_lit(row.picture, response) for response in row.responses)]
        for left, picture, heading in zip(lefts, shown, headings, strict=True):
            axes = place(left, top, 0.95 * cell, 0.95 * row_height)
            axes.imshow(picture)
            axes.set_axis_off()
            _outline(axes, row.mask == 1)
            if number == 0:
                write(left + 0.475 * cell, above - 0.04, heading, 6.5, ha="center", va="bottom", linespacing=1.15)
    first = 1
    for group in groups:
        last = first + len(group.headings) - 1
        middle = (lefts[first] + lefts[last] + 0.95 * cell) / 2
        write(middle, 0.04, group.title, 8, ha="center", va="top", linespacing=1.1)
        first = last + 1
    bar = place(margin, height - below + 0.06, 0.95 * cell, 0.08)
    figure.colorbar(ScalarMappable(cmap=_RESPONSE_COLOURS), cax=bar, orientation="horizontal", ticks=[0, 1])
    bar.tick_params(labelsize=6.5, length=2, pad=1)
    write(margin + 1.05 * cell, height - below + 0.1, scale, 6.5, va="center")
    write(margin, height - 0.04, note, 6.5, va="bottom", linespacing=1.2)
    return figure


def _draw_curves(axes: Axes, lines: Sequence[Curve]) -> None:
    for curve, (colour, marker) in zip(lines, _STYLES, strict=False):
        is_sparse = len(curve.steps) <= 40
        kind = marker if is_sparse else None
        axes.plot(curve.steps, curve.values, color=colour, marker=kind, ms=4, label=curve.name, clip_on=False)


def _mark_highest(axes: Axes, curve: Curve, colour: str) -> None:
    index = int(np.argmax(curve.values))
    value = curve.values[index]
    axes.annotate(
        f"{value:.1f}",
        (curve.steps[index], value),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        color=colour,
        path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
    )


def _draw_spectrum(axes: Axes, before: Sequence[float], after: Sequence[float], *, label_size: float) -> None:
    ranks = np.arange(1, len(before) + 1)
    axes.bar(ranks - 0.2, before, 0.4, color=_BEFORE, label="before")
    axes.bar(ranks + 0.2, after, 0.4, color=_AFTER, label="after")
    axes.set_xlabel("rank before tuning", fontsize=label_size)
    axes.set_ylabel("singular value", fontsize=label_size)


def _overlay(picture: Picture, inside: NDArray[np.bool_], colour: tuple[int, int, int]) -> Picture:
    """The picture, greyed a little outside the region, which is tinted and outlined."""
    shown = (0.55 * _grey(picture) + 0.45 * picture).astype(np.uint8)
    shown[inside] = (0.55 * picture[inside] + 0.45 * np.array(colour)).astype(np.uint8)
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.ascontiguousarray(shown), outlines, -1, colour, 1), dtype=np.uint8)


def _collage(pictures: Sequence[Picture]) -> Picture:
    """One picture as it is; several as square tiles on white, as many columns as rows or one more."""
    if len(pictures) == 1:
        return pictures[0]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows, pitch = math.ceil(len(pictures) / columns), _SUPPORT_TILE + _SUPPORT_TILE // 20
    canvas = np.full((rows * pitch, columns * pitch, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        scale = _SUPPORT_TILE / max(picture.shape[:2])
        tile = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        top, left = (pitch * place for place in divmod(number, columns))
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


def _lit(picture: Picture, response: NDArray[np.float32]) -> Picture:
    """The picture in grey under the response's colours."""
    colours = colormaps[_RESPONSE_COLOURS](response)[..., :3] * 255
    return np.asarray((0.3 * _grey(picture) + 0.7 * colours).astype(np.uint8))


def _grey(picture: Picture) -> Picture:
    return np.repeat(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)


def _outline(axes: Axes, inside: NDArray[np.bool_]) -> None:
    """White on black, to be seen on any picture; a line of the page, not of pixels."""
    # a frame of background closes the line of an object that the picture's edge cuts
    framed = np.pad(inside, 1).astype(np.float32)
    height, width = inside.shape
    lines = axes.contour(
        np.arange(-1, width + 1), np.arange(-1, height + 1), framed, [0.5], colors="white", linewidths=0.5
    )
    lines.set_path_effects([patheffects.withStroke(linewidth=1.2, foreground="black")])
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _figure(width_inches: float, height_inches: float) -> Figure:
    # not pyplot: it keeps global state and picks a window system
    return Figure(figsize=(width_inches, height_inches), dpi=_SCREEN_DPI, layout="constrained")


def _finish(axes: Axes) -> None:
    _clear(axes, tick_size=9)
    axes.legend(frameon=False, fontsize=9)


def _clear(axes: Axes, *, tick_size: float) -> None:
    """Nothing but what is read: no box, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#E4E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=tick_size)
