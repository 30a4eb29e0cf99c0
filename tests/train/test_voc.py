"""List files and the rules by which a list becomes a split (the field's, sections on folds and lists)."""

from pathlib import Path

import numpy as np
import pytest
from voc_folders import draw, line, write_folder, write_label, write_picture

from svf_fast.train.data.folds import fold_of
from svf_fast.train.data.lists import read_classes
from svf_fast.train.data.split import MINIMUM_CLASS_PIXELS
from svf_fast.train.data.voc import VOCFolder

COSEG = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "voc_coseg"
needs_coseg = pytest.mark.skipif(not COSEG.is_dir(), reason="the VOC co-segmentation photographs are not here")


def big(value: int, top: int = 0) -> tuple[int, int, int, int, int]:
    """A rectangle of exactly the smallest area that counts."""
    return (value, top, 0, 32, 64)


def test_a_class_counts_from_2048_pixels_on_but_is_present_from_one_pixel_on(tmp_path: Path) -> None:
    assert MINIMUM_CLASS_PIXELS == 32 * 64
    root = write_folder(
        tmp_path,
        {
            "enough": draw(80, 90, [big(1)]),
            "one_short": draw(80, 90, [big(1), (0, 31, 63, 1, 1)]),
            "beside": draw(80, 90, [big(2), (1, 79, 89, 1, 1)]),
            "both": draw(80, 90, [big(1), big(2, top=40)]),
            "void": draw(80, 90, [(255, 0, 0, 80, 90)]),
            "other": draw(80, 90, [big(3)]),
        },
    )
    split = VOCFolder(root).split("list.txt", (2, 1))
    assert [Path(entry.image).stem for entry in split.entries] == ["enough", "beside", "both"]
    assert [entry.present_classes for entry in split.entries] == [(1,), (1, 2), (1, 2)]
    assert split.files_of_class == {1: (0, 2), 2: (1, 2)}
    assert split.class_ids == (1, 2)
    assert split.class_names == {1: "one", 2: "two"}
    assert len(split) == 3


def test_one_pixel_of_a_dropped_class_drops_the_picture(tmp_path: Path) -> None:
    root = write_folder(
        tmp_path,
        {"kept": draw(80, 90, [big(1), (3, 70, 0, 9, 9)]), "dropped": draw(80, 90, [big(1), (4, 79, 89, 1, 1)])},
    )
    folder = VOCFolder(root)
    assert [Path(e.image).stem for e in folder.split("list.txt", (1,), drop_images_with=(4,)).entries] == ["kept"]
    assert len(folder.split("list.txt", (1,))) == 2


def test_the_list_file_may_be_absolute_and_have_empty_lines(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", {"a": draw(80, 90, [big(1)])})
    outside = tmp_path / "outside.txt"
    outside.write_text("\n" + line("a") + "  \r\n\n")
    assert len(VOCFolder(root).split(outside, (1,))) == 1


def test_the_root_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "data", {"a": draw(80, 90, [big(1)])})
    monkeypatch.chdir(tmp_path)
    folder = VOCFolder("data")
    assert len(folder.split("list.txt", (1,))) == len(folder.whole("list.txt", (1,))) == 1


def test_all_unusable_files_are_listed_at_once(tmp_path: Path) -> None:
    names = ["fine", "no_picture", "no_label", "cut_picture", "cut_label", "sizes", "colours", "unknown"]
    noise = np.random.default_rng(0).integers(1, 4, (80, 90), dtype=np.uint8)
    root = write_folder(tmp_path, dict.fromkeys(names, noise))
    (root / "JPEGImages/no_picture.jpg").unlink()
    (root / "SegmentationClass/no_label.png").unlink()
    for path in (root / "JPEGImages/cut_picture.jpg", root / "SegmentationClass/cut_label.png"):
        path.write_bytes(path.read_bytes()[:-900])
    write_picture(root / "JPEGImages/sizes.jpg", 90, 80)
    write_label(root / "SegmentationClass/colours.png", noise, "RGB")
    write_label(root / "SegmentationClass/unknown.png", noise + 100)
    with pytest.raises(ValueError, match=r"7 of the 8 lines of .*list\.txt") as caught:
        VOCFolder(root).split("list.txt", (1,))
    message = str(caught.value)
    assert len(message.splitlines()) == 8
    assert "fine" not in message
    assert all(name in message for name in names[1:])


def test_the_list_of_unusable_files_names_each_of_many_in_order(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": draw(80, 90, [big(1)])})
    (root / "list.txt").write_text("".join(line(f"missing_{i}") + "\n" for i in range(150)))
    with pytest.raises(ValueError, match="150 of the 150 lines") as caught:
        VOCFolder(root).split("list.txt", (1,))
    expected = [f"  {root}/JPEGImages/missing_{i}.jpg does not exist" for i in range(150)]
    assert str(caught.value).splitlines()[1:] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"list\.txt is empty"),
        ("JPEGImages/a.jpg\n", r"list\.txt line 1 is 'JPEGImages/a\.jpg'; expected `image label`"),
        (line("a") + "\n" + line("a") + " extra\n", "line 2 is .* expected `image label`"),
        (line("a") + "\n\n" + line("a") + "\n", "line 3 repeats line 1"),
    ],
)
def test_a_malformed_list_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    root = write_folder(tmp_path, {"a": draw(80, 90, [big(1)])})
    (root / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        VOCFolder(root).split("list.txt", (1,))


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": draw(80, 90, [big(1)])})
    (root / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"list\.txt cannot be read as a text file"):
        VOCFolder(root).split("list.txt", (1,))


@pytest.mark.parametrize(
    ("class_ids", "dropped", "message"),
    [
        ((), (), "class_ids is empty"),
        ((1, 9), (), r"class_ids holds \[9\]"),
        ((1,), (0,), r"drop_images_with holds \[0\]"),
        ((1, 2), (2, 3), r"drop_images_with holds classes that class_ids asks for: \[2\]"),
        ((4,), (), "leaves no picture for the classes"),
        ((1,), (2,), r"without a class of \[2\]"),
    ],
)
def test_classes_that_make_no_split_are_refused(
    tmp_path: Path, class_ids: tuple[int, ...], dropped: tuple[int, ...], message: str
) -> None:
    root = write_folder(tmp_path, {"a": draw(80, 90, [big(1), big(2, top=40)])})
    with pytest.raises(ValueError, match=message):
        VOCFolder(root).split("list.txt", class_ids, drop_images_with=dropped)


def test_missing_roots_lists_and_class_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        VOCFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"classes\.txt does not exist"):
        VOCFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"list\.txt does not exist"):
        VOCFolder(write_folder(tmp_path, {}, "empty.txt")).split("list.txt", (1,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no class"),
        ("0 background\n", "lists no class"),
        ("1 cat\nx dog\n", "line 2 is 'x dog'; expected `id name`"),
        ("1\n", "line 1 is '1'"),
        ("1 cat\n1 dog\n", "line 2 gives class 1 a second time"),
        ("255 void\n", "class id 255; expected 1 to 254"),
        ("300 void\n", "class id 300; expected 1 to 254"),
        ("-1 void\n", "line 1 is '-1 void'"),
        pytest.param("1 cat\n" + "9" * 5000 + " dog\n", r"classes\.txt line 2 is '999", id="digits"),
    ],
)
def test_a_malformed_class_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classes.txt")


def test_class_names_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("0 background\n1 potted plant\n")
    assert read_classes(tmp_path / "classes.txt") == {1: "potted plant"}


@needs_coseg
def test_real_photographs_follow_the_rules_of_their_index() -> None:
    fold = fold_of("pascal", 0)
    split = VOCFolder(COSEG).split("lists/fold0_val.txt", fold.novel)
    assert split.class_names[1] == "aeroplane"
    counts = {}
    for row in (COSEG / "index.csv").read_text().splitlines()[1:]:
        stem, _, _, class_ids, pixels, _ = row.split(",")
        counts[stem] = dict(zip(map(int, class_ids.split()), map(int, pixels.split()), strict=True))
    listed = [Path(row.split()[0]).stem for row in (COSEG / "lists/fold0_val.txt").read_text().splitlines()]
    expected = [stem for stem in listed if any(counts[stem].get(c, 0) >= MINIMUM_CLASS_PIXELS for c in fold.novel)]
    assert [Path(entry.image).stem for entry in split.entries] == expected
    for class_id, files in split.files_of_class.items():
        assert [expected[index] for index in files] == [
            stem for stem in expected if counts[stem].get(class_id, 0) >= MINIMUM_CLASS_PIXELS
        ]
