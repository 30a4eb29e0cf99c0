"""Figures as files: both formats whole, letters that stay letters, equal bytes for equal figures; and panels that can be compared."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from svf_fast.train import figures
from svf_fast.train.figures import CueGroup, CueRow, Curve, PredictionRow

RNG = np.random.default_rng(0)
NAMES = ("freeze", "svf")


def _picture(height: int = 40, width: int = 60) -> figures.Picture:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def _mask(height: int = 40, width: int = 60) -> figures.Mask:
    mask = np.zeros((height, width), np.uint8)
    mask[5:20, 10:] = 1  # up to the picture's edge
    return mask


def _predictions(shots: int) -> Figure:
    supports = [(_picture(60 - 10 * shot, 40), _mask(60 - 10 * shot, 40)) for shot in range(shots)]
    row = PredictionRow("cat", supports, _picture(), _mask(), dict.fromkeys(NAMES, _mask()), dict.fromkeys(NAMES, 0.5))
    return figures.predictions([row])


def _cue_maps() -> Figure:
    shapes = ((40, 60), (60, 40))
    rows = [
        CueRow("cat", _picture(*shape), _mask(*shape), [RNG.random(shape, np.float32) for _ in range(3)])
        for shape in shapes
    ]
    groups = [CueGroup("(a) fell", ["rank 1", "rank 2"]), CueGroup("(b) rose", ["rank 7"])]
    return figures.cue_maps(groups, rows, "response", "a note")


def _curve_panels(*highest: float) -> Figure:
    panels = [
        (f"run {value}", [Curve("training", [1, 2], [0.0, value]), Curve("validation", [1, 2], [0, 1])])
        for value in highest
    ]
    return figures.curve_panels("mIoU, %", panels)


def _texts(figure: Figure) -> list[str]:
    return [
        text.get_text() for text in (*figure.texts, *(t for axes in figure.axes for t in (axes.title, *axes.texts)))
    ]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.curves("mIoU", [Curve("svf", [1, 2], [0.1, 0.2])]),
        lambda: _curve_panels(50.0, 60.0),
        lambda: figures.spectrum_panels([("1×1", [2, 1], [1, 2]), ("3×3", [3, 2], [3, 1])]),
        lambda: _predictions(1),
        _cue_maps,
    ],
)
def test_a_figure_is_saved_in_both_formats_whole(draw, tmp_path: Path) -> None:
    figure = draw()
    pdf, png = figures.save(figure, tmp_path / "figure.v1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.v1.pdf", "figure.v1.png"]
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.rstrip().endswith(b"%%EOF")
    with Image.open(png) as picture:
        picture.load()
        assert picture.width == pytest.approx(300 * figure.get_figwidth(), abs=1)


def test_letters_are_text_in_fonts_that_the_pdf_holds(tmp_path: Path) -> None:
    content = figures.save(_curve_panels(50.0), tmp_path / "figure")[0].read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content


def test_the_same_figure_has_the_same_bytes_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [path.read_bytes() for path in figures.save(_curve_panels(50.0), tmp_path / "first")]
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 1e6)
    second = [path.read_bytes() for path in figures.save(_curve_panels(50.0), tmp_path / "second")]
    assert first == second
    assert b"Date" not in first[0]


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [path.read_bytes() for path in figures.save(_curve_panels(50.0), tmp_path / "figure")]

    def fail(self: Figure, file: io.BytesIO, **options: object) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        figures.save(_curve_panels(60.0), tmp_path / "figure")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_panels_share_their_axis_and_write_out_the_highest_points() -> None:
    figure = _curve_panels(50.0, 60.0)
    assert [axes.get_ylim() for axes in figure.axes] == [(0, pytest.approx(69.0))] * 2
    assert {"(a) run 50.0", "(b) run 60.0", "50.0", "60.0"} <= set(_texts(figure))


def test_five_panels_take_two_rows() -> None:
    rows = {axes.get_subplotspec().rowspan.start for axes in _curve_panels(*range(1, 6)).axes if axes.get_visible()}
    assert rows == {0, 1}


@pytest.mark.parametrize(("shots", "title"), [(1, "support: cat"), (5, "5 supports: cat")])
def test_all_supports_of_an_episode_share_the_first_cell(shots: int, title: str) -> None:
    figure = _predictions(shots)
    assert len(figure.axes) == 2 + len(NAMES)
    assert _texts(figure)[:3] == [title, "query, label", "freeze: IoU 50 %"]


def test_cues_stand_in_their_groups_with_the_object_outlined() -> None:
    figure = _cue_maps()
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 2 * (1 + 3)
    assert all(axes.collections for axes in pictures)
    assert {"(a) fell", "(b) rose", "rank 7", "response", "a note", "cat"} <= set(_texts(figure))
    left_of_rank_7 = [axes.get_position().x0 for axes in pictures[:4]]
    assert left_of_rank_7[3] - left_of_rank_7[2] > left_of_rank_7[2] - left_of_rank_7[1]
